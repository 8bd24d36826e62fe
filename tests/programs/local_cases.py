"""Train the toy model on ranks that train alone, in one start: `local_cases.py OUT`.

OUT/<case>/ gets result_<rank>.json and checkpoints of the steps that a case saves at; OUT/sum_<rank>.json what
`sum_in_pairs` says.
"""

import json
import shutil
import sys
import traceback
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from engine_cases import own_batches
from forked_ranks import import_everything, run_forked
from toy import Toy, loss, make_config

from bigbatch.recipes.core import checkpoint, runtime
from bigbatch.recipes.core.engine import Engine, import_deepspeed
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.parallel import Mesh

STEPS, MET, ALONE = 7, 4, 5  # ranks meet after steps 2, 4, 6 and, as the schedule ends there, 7
SYNCHRONOUS = {"sync": "all_reduce", "zero_stage": None}
PLAIN_SGD = {"name": "sgd", "momentum": 0.9, "gradient_clipping": None}


def local(**settings: Any) -> dict[str, Any]:
    """Return a `parallel` section."""
    return {"sync": "local_sgd", "zero_stage": None, "local_sgd": {"every_steps": 2, **settings}}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    ranks: int = 2
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of sections; `parallel` is local() by default."""
    dropout: float = 0.0
    factors: dict[int, float] = field(default_factory=dict)
    """By step: what the loss of the first sample's micro-batch is multiplied with."""
    equal_targets: bool = False
    start: tuple[str, int] | None = None
    """Case and step of a checkpoint to go on from."""


def cases() -> dict[str, Case]:
    """Return all cases by name, those that others start from first."""
    found = {
        "plain": Case(),
        "one_rank": Case(1),
        "each_step": Case(
            overrides={
                "optimizer": PLAIN_SGD,
                "parallel": local(every_steps=1, outer_learning_rate=1.0, outer_momentum=0.0),
            },
            equal_targets=True,
        ),
        "all_reduce": Case(overrides={"optimizer": PLAIN_SGD, "parallel": SYNCHRONOUS}, equal_targets=True),
        "synchronous": Case(overrides={"parallel": SYNCHRONOUS}),
        "skipping": Case(
            overrides={"precision": {"dtype": "fp32", "on_non_finite": "skip"}}, factors={2: float("nan")}
        ),
        "fp16_overflow": Case(overrides={"precision": {"dtype": "fp16"}}, factors={2: float("inf")}),
    }
    for dtype in ("fp32", "bf16", "fp16"):
        case = {"overrides": {"precision": {"dtype": dtype}}, "dropout": 0.1}
        found[dtype] = Case(**case)
        for step in (MET, ALONE):
            found[f"{dtype}_after_{step}"] = Case(**case, start=(dtype, step))
    for step in (MET, ALONE):
        found[f"one_rank_after_{step}"] = Case(1, start=("plain", step))
        found[f"zero2_after_{step}"] = Case(overrides={"parallel": {"zero_stage": 2}}, start=("plain", step))
    found["after_synchronous"] = Case(start=("synchronous", MET))
    found["shorter_rounds"] = Case(overrides={"parallel": local(every_steps=3)}, start=("plain", ALONE))
    return found


def train_case(case: Case, mesh: Mesh, folder: Path, out: Path) -> dict[str, Any]:
    """Train to the last step; return what each step said."""
    defaults = {"parallel": local(), "schedule": {"total_steps": STEPS}, "checkpoint": {"keep": STEPS}}
    config = make_config({**defaults, **case.overrides})
    torch.manual_seed(0)
    engine = Engine(Toy(case.dropout), config, complete(config, {}, mesh.data_ranks), mesh)
    begin = 0
    if case.start:
        name, step = case.start
        saved = checkpoint.checkpoint_dir(out / name, step)
        if mesh.is_writer:
            shutil.copytree(saved, checkpoint.checkpoint_dir(folder, step))
        mesh.barrier()
        state = checkpoint.restore(folder, engine, mesh, print)
        assert state
        begin = state["step"]
        checkpoint.save(folder / "restored", engine, mesh, {"step": begin})
    steps = []
    for step in range(begin, STEPS):
        batches, num_targets = own_batches(config, mesh, step, case.factors.get(step, 1.0))
        if case.equal_targets:
            for batch in batches:
                batch["targets"] = (batch["tokens"] * 7 + 3) % 23
            num_targets = config.batch.global_size * batches[0]["tokens"].shape[1]
        steps.append(engine.train_step(step, batches, loss, num_targets)._asdict())
        if step + 1 in (2, 3, MET, ALONE, STEPS):
            checkpoint.save(folder, engine, mesh, {"step": step + 1})
    return {"steps": steps}


def run_cases(out: Path, names: list[str]) -> None:
    """Train cases of the same number of ranks as one rank of the same processes."""
    torch.set_num_threads(1)
    mesh = runtime.start_mesh()
    for name in names:
        folder = out / name
        folder.mkdir(exist_ok=True)
        try:
            result = train_case(cases()[name], mesh, folder, out)
        except Exception:
            result = {"error": traceback.format_exc()}
        (folder / f"result_{mesh.rank}.json").write_text(json.dumps(result))
    runtime.leave_mesh(mesh)


def sum_in_pairs(out: Path) -> None:
    """Write down what DeepSpeed's sum for inference gives on ranks 0 and 1, and on 2 and 3."""
    mesh = runtime.start_mesh()
    first = mesh.rank // 2 * 2
    pair = torch.distributed.new_group([first, first + 1], use_local_synchronization=True)
    own = torch.tensor([mesh.rank + 1.0])
    import_deepspeed().comm.inference_all_reduce(own, group=pair)
    (out / f"sum_{mesh.rank}.json").write_text(json.dumps(own.item()))
    runtime.leave_mesh(mesh)


def num_ranks(name: str) -> int:
    """Return how many processes train a case."""
    return cases()[name].ranks


if __name__ == "__main__":
    out = Path(sys.argv[1])
    import_everything()
    print(run_forked(partial(sum_in_pairs, out), 4, out / "log_4.txt"), flush=True)
    for goes_on in (False, True):
        chosen = [name for name, case in cases().items() if bool(case.start) == goes_on]
        for ranks, group in groupby(sorted(chosen, key=num_ranks), num_ranks):
            statuses = run_forked(partial(run_cases, out, list(group)), ranks, out / f"log_{ranks}.txt")
            print(ranks, statuses, flush=True)
