"""Train run documents under plans of several axes, and go on under others, in one start: `tensor_cases.py OUT`.

OUT/cases.json lists [name, document, plan, start]: OUT/<document>.json is a run document, OUT/<name>/ becomes the run
folder, and a start is the name of a case that was trained before, whose checkpoint of step HALF is gone on with to the
last step. A case without one ends at step HALF, but goes on where its name ends with "_whole". Where it ends with
"_evaluated", OUT/<name>/figures_<rank>.json gets what `evaluate` says on each rank.
"""

import json
import shutil
import sys
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from forked_ranks import import_everything, run_forked

from bigbatch.launcher.resolve import resolve
from bigbatch.launcher.run_dir import RunDir, write
from bigbatch.recipes.core import checkpoint, recipe, runtime, train
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.parallel import Mesh, build_mesh
from bigbatch.recipes.core.parts import load_run
from bigbatch.recipes.core.plan import ParallelPlan
from bigbatch.recipes.core.process import StopFlag

HALF = 5
PLANS = {
    "one": ParallelPlan(zero_stage=0),
    "dp2": ParallelPlan(data=2),
    "zero0x2": ParallelPlan(data=2, zero_stage=0),
    "zero1x2": ParallelPlan(data=2),
    "zero3x2": ParallelPlan(data=2, zero_stage=3),
    "tp2": ParallelPlan(tensor=2),
    "dp2xtp2": ParallelPlan(data=2, tensor=2),
    "pp2": ParallelPlan(pipeline=2),
    "pp4": ParallelPlan(pipeline=4),
    "dp2xpp2": ParallelPlan(data=2, pipeline=2),
    "tp2xpp2": ParallelPlan(tensor=2, pipeline=2),
    "sp2": ParallelPlan(sequence=2),
    "sp2_zero0": ParallelPlan(sequence=2, zero_stage=0),
    "dp2xsp2": ParallelPlan(data=2, sequence=2, zero_stage=3),
    "dp2xsp2_zero0": ParallelPlan(data=2, sequence=2, zero_stage=0),
    "tp2xsp2": ParallelPlan(tensor=2, sequence=2, zero_stage=2),
    "sp4": ParallelPlan(sequence=4),
    "dp2xtp2xpp2": ParallelPlan(data=2, tensor=2, pipeline=2),
}
PLANS |= {
    "tp2_spread": ParallelPlan(tensor=2, zero_stage=0, tensor_sequence=True),
    "dp2xtp2_spread": ParallelPlan(data=2, tensor=2, zero_stage=3, tensor_sequence=True),
    "tp2xsp2_spread": ParallelPlan(tensor=2, sequence=2, zero_stage=2, tensor_sequence=True),
}
PLANS |= {f"ep2_zero{stage}": ParallelPlan(data=2, zero_stage=stage, expert=2) for stage in range(3)}
PLANS |= {"ep2xdp2": ParallelPlan(data=4, expert=2)}
PLANS |= {f"tp2_zero{stage}": ParallelPlan(tensor=2, zero_stage=stage) for stage in range(4)}
PLANS |= {f"dp2xtp2_zero{stage}": ParallelPlan(data=2, tensor=2, zero_stage=stage) for stage in range(4)}
# By default tensors this small stay whole on every rank.
SHARD_ALL = {"version": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
Case = tuple[str, str, str, str | None]


def set_up(out: Path, case: Case) -> None:
    """Write the documents of a case's run folder, and bring the checkpoint that it goes on from."""
    name, document, plan_name, start = case
    plan = PLANS[plan_name]
    overrides = [f"parallel.tensor={plan.tensor}", f"parallel.zero_stage={plan.zero_stage}"]
    if plan.zero_stage == 3:
        (out / "zero3.json").write_text(json.dumps(SHARD_ALL))
        overrides[1:] = ["parallel.zero_stage=null", f"deepspeed={out / 'zero3.json'}"]
    if plan.pipeline > 1:
        overrides.append(f"parallel.pipeline={plan.pipeline}")
    if plan.expert > 1:
        overrides.append(f"parallel.expert={plan.expert}")
    if plan.tensor_sequence:
        overrides.append("parallel.tensor_sequence=true")
    if plan.sequence > 1:
        overrides.append(f"parallel.sequence={plan.sequence}")
    if start is None and not name.endswith("_whole"):
        overrides.append(f"schedule.stop_step={HALF}")
    resolved = resolve(str(out / f"{document}.json"), overrides)
    folder = RunDir(out / name)
    folder.path.mkdir()
    deepspeed = complete(resolved.config, resolved.deepspeed, plan.world_size)
    write(folder, resolved.document, deepspeed, resolved.content_id)
    if start:
        saved = checkpoint.checkpoint_dir(out / start, HALF)
        shutil.copytree(saved, checkpoint.checkpoint_dir(folder.path, HALF))


def train_all(out: Path, cases: list[Case]) -> None:
    """Train case after case of the same number of ranks as one rank of the same processes."""
    train.measured_peak_flops = cache(train.measured_peak_flops)  # half a second each time
    alone = runtime.start_mesh()
    for name, _, plan, _ in cases:
        mesh = build_mesh(alone.rank, PLANS[plan], alone.device)
        run = load_run(out / name)
        train.train(run, mesh, StopFlag(), {"phase": "", "step": None})
        if name.endswith("_evaluated"):
            figures = evaluate_checkpoint(run, mesh)
            (out / name / f"figures_{mesh.rank}.json").write_text(json.dumps(figures))
    runtime.leave_mesh(alone)


def evaluate_checkpoint(run: train.Run, mesh: Mesh) -> dict[str, Any]:
    """Read the newest checkpoint into a model without DeepSpeed, divided as the run's, and evaluate it."""
    data = run.recipe.open_data(run.config)
    model = train.build_model(run, mesh, data.facts, initialize=False)
    checkpoint.fill(checkpoint.best(run.run_dir), model)
    assert data.validation
    return train.evaluate(run, model, data.validation, mesh, data.facts)


def num_ranks_of(case: Case) -> int:
    """Return how many processes train a case."""
    return PLANS[case[2]].world_size


def main(out: Path) -> int:
    """Train everything; return 1 when a process fails."""
    torch.set_num_threads(1)
    cases: list[Case] = sorted(map(tuple, json.loads((out / "cases.json").read_text())), key=num_ranks_of)
    import_everything()
    for document in {case[1] for case in cases}:
        recipe.find(json.loads((out / f"{document}.json").read_text())["recipe"])  # for the children
    log, statuses = out / "log.txt", []
    for goes_on in (False, True):
        chosen = [case for case in cases if bool(case[3]) == goes_on]
        for case in chosen:
            set_up(out, case)
        if not goes_on:
            statuses += run_forked(partial(prepare_all, [out / case[0] for case in chosen]), 1, log)
        for num_ranks, group in groupby(chosen, num_ranks_of):
            statuses += run_forked(partial(train_all, out, list(group)), num_ranks, log, timeout_seconds=900)
    if any(statuses):
        print(statuses, *(path.read_text() for path in out.glob("log.*.txt")))
    return int(any(statuses))


def prepare_all(run_dirs: list[Path]) -> None:
    """Prepare the data of all runs; equal data are prepared once."""
    for run_dir in run_dirs:
        run = load_run(run_dir)
        run.recipe.prepare(run.config)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
