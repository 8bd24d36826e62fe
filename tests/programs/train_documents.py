"""Train run documents under several plans, in one start: `train_documents.py OUT`.

OUT/plans.json lists [name, ranks, ZeRO stage, stop step]; OUT/<name>.json is a run document, and
OUT/<name>_<ranks>_<stage>/ becomes its run folder, set up as the command line sets one up. A plan with a stop step is
stopped there, and gone on with; one without has null.
"""

import json
import sys
from functools import partial
from itertools import groupby
from pathlib import Path

from forked_ranks import import_everything, run_forked

from bigbatch.launcher.resolve import resolve
from bigbatch.launcher.run_dir import RunDir, write
from bigbatch.recipes.core import recipe, runtime, train
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.parts import load_run
from bigbatch.recipes.core.process import StopFlag

Plan = tuple[str, int, int, int | None]

# By default tensors this small stay whole on every rank.
SHARD_ALL = {"version": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def set_up(out: Path, plan: Plan, stop_step: int | None) -> Path:
    """Write the documents of a plan's run folder and return it."""
    name, num_ranks, stage, _ = plan
    overrides = [f"parallel.zero_stage={stage}"]
    if stage == 3:
        (out / "deepspeed").mkdir(exist_ok=True)
        (out / "deepspeed/zero3.json").write_text(json.dumps(SHARD_ALL))
        overrides = ["parallel.zero_stage=null", f"deepspeed={out / 'deepspeed/zero3.json'}"]
    if stop_step:
        overrides.append(f"schedule.stop_step={stop_step}")
    resolved = resolve(str(out / f"{name}.json"), overrides)
    folder = RunDir(out / f"{name}_{num_ranks}_{stage}")
    folder.path.mkdir(exist_ok=True)
    write(folder, resolved.document, complete(resolved.config, resolved.deepspeed, num_ranks), resolved.content_id)
    return folder.path


def prepare_all(run_dirs: list[Path]) -> None:
    """Prepare the data of all runs; equal data are prepared once."""
    for run_dir in run_dirs:
        run = load_run(run_dir)
        run.recipe.prepare(run.config)


def train_all(run_dirs: list[Path]) -> None:
    """Train run after run as one rank of the same process group."""
    mesh = runtime.start_mesh()
    for run_dir in run_dirs:
        train.train(load_run(run_dir), mesh, StopFlag(), {"phase": "", "step": None})
    runtime.leave_mesh(mesh)


def processes(plan: Plan) -> tuple[int, bool]:
    """Return what runs must share to be trained by the same processes.

    Stage 3 has processes of its own: DeepSpeed replaces torch's linear function there for the rest of the process.
    """
    return plan[1], plan[2] == 3


def main(out: Path) -> int:
    """Train everything; return 1 when a process fails."""
    plans = sorted(map(tuple, json.loads((out / "plans.json").read_text())), key=processes)
    import_everything()
    for name in {plan[0] for plan in plans}:
        recipe.find(json.loads((out / f"{name}.json").read_text())["recipe"])  # for the children
    log = out / "log.txt"
    statuses = run_forked(partial(prepare_all, [set_up(out, plan, plan[3]) for plan in plans]), 1, log)
    for goes_on in (False, True):
        chosen = [plan for plan in plans if plan[3] or not goes_on]
        run_dirs = {plan: set_up(out, plan, None if goes_on else plan[3]) for plan in chosen}
        for (num_ranks, _), group in groupby(chosen, processes):
            statuses += run_forked(partial(train_all, [run_dirs[plan] for plan in group]), num_ranks, log)
    if any(statuses):
        print(statuses, *(path.read_text() for path in out.glob("log.*.txt")))
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
