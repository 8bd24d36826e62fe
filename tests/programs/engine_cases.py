"""Train the toy model in many ways, in one start: `engine_cases.py OUT`.

First every case is trained on 1 and on 2 ranks, saved half-way and at the end; then new processes go on from half-way
checkpoints, under the same plan and under others. OUT/<phase>_<ranks>/<case>/ gets result_<rank>.json and checkpoints.
"""

import json
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked_ranks import import_everything, run_forked
from toy import Toy, loss, make_config, samples

from bigbatch.recipes.core import checkpoint, runtime
from bigbatch.recipes.core.batch import plan_batch
from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.parallel import Mesh

STEPS, HALF = 6, 3
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    # By default tensors this small stay whole on every rank.
    "zero3_sharded": (3, {"stage3_param_persistence_threshold": 0}),
    "zero2_offload": (2, {"offload_optimizer": {"device": "cpu"}}),
    "zero3_offload": (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
}
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_sharded")
SOME_STAGES = ("zero0", "zero1", "zero2", "zero3_sharded")
OPTIMIZERS = ("sgd", "adagrad", "lion", "lamb")


@dataclass(frozen=True)
class Case:
    """One way to train."""

    plan: str = "zero1"
    overrides: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    factors: dict[int, float] = field(default_factory=dict)
    """By step: what the loss of the first sample's micro-batch is multiplied with."""
    save_steps: tuple[int, ...] = (HALF, STEPS)


def train_cases() -> dict[str, Case]:
    """Return all cases by name."""
    cases = {f"{plan}_plain": Case(plan) for plan in STAGES}
    cases["accumulation_1"] = Case(overrides={"batch": {"micro_size": 4}})
    cases["accumulation_8"] = Case("zero2", {"batch": {"micro_size": 1}})
    for plan in STAGES:
        cases.update({f"{plan}_{dtype}_dropout": dropout_case(plan, dtype) for dtype in ("fp32", "bf16", "fp16")})
    for plan in SOME_STAGES:
        cases[f"{plan}_ramp"] = Case(plan, {"batch": {"ramp": [{"until_step": 2, "global_size": 4}]}})
        cases.update({f"{plan}_{name}": Case(plan, optimizer(name)) for name in OPTIMIZERS})
        for dtype in ("fp32", "bf16"):
            precision = {"precision": {"dtype": dtype, "on_non_finite": "skip"}}
            cases[f"{plan}_{dtype}_nan"] = Case(
                plan, precision, factors={HALF: float("nan")}, save_steps=(HALF, HALF + 1)
            )
        cases[f"{plan}_lamb_nan"] = Case(plan, optimizer("lamb"), factors={HALF: float("nan")})
        cases[f"{plan}_fp16_overflow"] = Case(
            plan, {"precision": {"dtype": "fp16"}}, factors={2: float("inf"), 3: float("inf")}, save_steps=(2, 4)
        )
    return cases


def dropout_case(plan: str, dtype: str) -> Case:
    """Return the case that is resumed bit for bit."""
    return Case(plan, {"precision": {"dtype": dtype}}, dropout=0.1)


def optimizer(name: str) -> dict[str, Any]:
    """Return the overrides for an optimizer."""
    return {"optimizer": {"name": name, **({"momentum": 0.9} if name == "sgd" else {})}}


def resume_cases() -> dict[str, tuple[int, str, Case]]:
    """Return by name: the ranks (0: as many, -1: not as many) and case to take half-way, and how to go on."""
    cases = {}
    for plan in STAGES:
        for dtype in ("fp32", "bf16", "fp16"):
            cases[f"{plan}_{dtype}_dropout"] = (0, f"{plan}_{dtype}_dropout", dropout_case(plan, dtype))
    for before in ("zero0", "zero1", "zero3_sharded"):
        for after in ("zero0", "zero1", "zero3_sharded", "zero2_offload", "zero3_offload"):
            cases[f"{after}_after_{before}"] = (-1, f"{before}_plain", Case(after))
    for name in OPTIMIZERS:
        cases[f"zero3_sharded_{name}"] = (2, f"zero1_{name}", Case("zero3_sharded", optimizer(name)))
        cases[f"zero0_{name}"] = (2, f"zero1_{name}", Case("zero0", optimizer(name)))
    return cases


def train_case(case: Case, mesh: Mesh, folder: Path, start_from: Path | None = None) -> dict[str, Any]:
    """Train (on from a checkpoint's folder, if one is given) to the last step; return what each step said."""
    stage, zero = PLANS[case.plan]
    config = make_config({**case.overrides, "parallel": {"zero_stage": stage}})
    torch.manual_seed(0)
    document = complete(config, {"zero_optimization": zero}, mesh.data_ranks)
    engine = Engine(Toy(case.dropout), config, document, mesh)
    messages: list[str] = []
    begin = 0
    if start_from:
        if mesh.is_writer:
            shutil.copytree(start_from, folder / "checkpoints" / start_from.name)
        mesh.barrier()
        state = checkpoint.restore(folder, engine, mesh, messages.append)
        assert state
        begin = state["step"]
    steps = []
    for step in range(begin, STEPS):
        batches, num_targets = own_batches(config, mesh, step, case.factors.get(step, 1.0))
        steps.append(engine.train_step(step, batches, loss, num_targets)._asdict())
        if step + 1 in case.save_steps:
            checkpoint.save(folder, engine, mesh, {"step": step + 1})
    return {"steps": steps, "messages": messages}


def own_batches(config: RunConfig, mesh: Mesh, step: int, factor: float) -> tuple[list[dict[str, np.ndarray]], int]:
    """Cut this rank's micro-batches out of the global batch; return the targets of all."""
    plan = plan_batch(config.batch, mesh.data_ranks, step)
    whole = samples(step, plan.global_size)
    whole["factor"][0] = factor
    num_targets = int((whole["targets"] >= 0).sum())
    size = plan.micro_size
    begins = [(micro * plan.data_ranks + mesh.data_rank) * size for micro in range(plan.accumulation_steps)]
    return [{name: array[begin : begin + size] for name, array in whole.items()} for begin in begins], num_targets


def run_phase(phase: str, stage3: bool, out: Path) -> None:
    """Run every case of a phase as one rank.

    Stage 3 has processes of its own: DeepSpeed replaces torch's linear function there, for the rest of the process, by
    one that rounds the product before it adds the bias.
    """
    torch.set_num_threads(1)
    mesh = runtime.start_mesh()
    folder = out / f"{phase}_{mesh.world_size}"
    for name, prepared in (train_cases() if phase == "train" else resume_cases()).items():
        case = prepared if isinstance(prepared, Case) else prepared[-1]
        if (PLANS[case.plan][0] == 3) != stage3:
            continue
        began = time.monotonic()
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            if phase == "train":
                result = train_case(prepared, mesh, folder / name)
            else:
                ranks, source, case = prepared
                source_ranks = {0: mesh.world_size, -1: 3 - mesh.world_size}.get(ranks, ranks)
                taken = out / f"train_{source_ranks}" / source
                result = train_case(case, mesh, folder / name, checkpoint.checkpoint_dir(taken, HALF))
        except Exception:
            result = {"error": traceback.format_exc()}
        result["seconds"] = time.monotonic() - began
        (folder / name / f"result_{mesh.rank}.json").write_text(json.dumps(result))
    runtime.leave_mesh(mesh)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    import_everything()
    for phase in ("train", "resume"):
        for num_ranks in (1, 2):
            for stage3 in (False, True):
                began = time.monotonic()
                name = f"{phase}_{num_ranks}" + ("_zero3" if stage3 else "")
                statuses = run_forked(partial(run_phase, phase, stage3, out), num_ranks, out / f"{name}.txt")
                print(name, statuses, f"{time.monotonic() - began:.1f} s", flush=True)
