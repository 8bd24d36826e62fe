"""Measure the most tensor memory that a rank holds while it trains: `measure_memory.py TABLE [CASE...]`.

TABLE gets for each case the peak in bytes from the first step on, on the rank that holds most, and what was predicted.
What an operation of torch takes and gives back inside itself is not seen. `measure_memory.py tests/golden/memory.json`
writes the calibration table anew, in about four minutes.
"""

import json
import sys
import weakref
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from forked_ranks import import_everything, run_forked
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigbatch.launcher.memory import Workload, predict_memory
from bigbatch.recipes.core import runtime
from bigbatch.recipes.core.engine import Engine, partitioned_building
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.plan import ParallelPlan
from bigbatch.recipes.core.saver import Saver
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig

STEPS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "num_layers": 6, "hidden_size": 256, "num_heads": 4, "max_positions": 1024},
    "llama": {
        "family": "llama",
        "num_layers": 6,
        "hidden_size": 256,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "max_positions": 1024,
        "tie_embeddings": False,
    },
}
# Small enough that what they hold is a part of the whole, as in a run of billions of parameters.
ZERO = {
    "contiguous_gradients": True,
    "overlap_comm": True,
    "reduce_bucket_size": 500_000,
    "allgather_bucket_size": 500_000,
    "stage3_prefetch_bucket_size": 200_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 1_000_000,
}


@dataclass(frozen=True)
class Case:
    """One plan of one model."""

    data: int = 1
    zero_stage: int = 1
    dtype: str = "bf16"
    shape: str = "gpt2"
    sequence_length: int = 128
    micro_size: int = 4
    accumulation_steps: int = 2
    vocabulary_size: int = 4096
    model: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    sync: str | None = None
    expert: int = 1
    asynchronous: bool = False
    sequence: int = 1
    tensor: int = 1
    tensor_sequence: bool = False

    def config(self) -> GptConfig:
        """Return the run document."""
        document = {
            "version": 1,
            "recipe": "gpt",
            "model": SHAPES[self.shape] | self.model,
            "data": {"train": ["none"], "sequence_length": self.sequence_length},
            "batch": {
                "global_size": self.micro_size * self.accumulation_steps * self.data,
                "micro_size": self.micro_size,
            },
            "parallel": {
                "zero_stage": self.zero_stage,
                "tensor": self.tensor,
                "tensor_sequence": self.tensor_sequence,
                "sequence": self.sequence,
                "expert": self.expert,
                "sync": self.sync,
                "local_sgd": {"every_steps": 2},
            },
            "checkpoint": {"asynchronous": self.asynchronous},
            "precision": {"dtype": self.dtype},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"total_steps": STEPS},
        }
        return GptConfig.model_validate_json(json.dumps(document))

    def predicted_bytes(self) -> int:
        """Predict the same peak, without the framework's part."""
        config = self.config()
        work = Workload(
            config.model,
            self.vocabulary_size,
            self.sequence_length,
            self.dtype,
            config.optimizer,
            on_cpu=True,
            trains_alone=self.sync == "local_sgd",
            saves_behind=self.asynchronous,
        )
        plan = ParallelPlan(
            self.data,
            self.tensor,
            tensor_sequence=self.tensor_sequence,
            sequence=self.sequence,
            zero_stage=self.zero_stage,
            micro_size=self.micro_size,
            accumulation_steps=self.accumulation_steps,
            expert=self.expert,
        )
        memory = predict_memory(work, plan, ZERO | self.zero, config.model.recompute_activations)
        return round(memory.total - memory.framework)


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    found = {}
    for stage in range(4):
        for ranks in (1, 2):
            found[f"zero{stage}x{ranks}"] = Case(ranks, stage)
            found[f"zero{stage}x{ranks}_fp32"] = Case(ranks, stage, "fp32")
    for stage in (1, 3):
        found[f"llama_zero{stage}x2"] = Case(2, stage, shape="llama")
        found[f"llama_zero{stage}x2_fp32"] = Case(2, stage, "fp32", "llama")
        found[f"recompute_zero{stage}x2"] = Case(2, stage, model={"recompute_activations": True}, micro_size=16)
        found[f"large_batch_zero{stage}x2"] = Case(2, stage, micro_size=16, accumulation_steps=1)
        found[f"long_zero{stage}x2"] = Case(2, stage, sequence_length=640, micro_size=2)
        found[f"sequence_zero{stage}x2"] = Case(zero_stage=stage, sequence_length=640, sequence=2)
        found[f"sequence_llama_zero{stage}x2"] = Case(1, stage, "fp32", "llama", 640, micro_size=2, sequence=2)
    found["spread_zero1x2"] = Case(1, 1, "fp32", sequence_length=640, tensor=2, tensor_sequence=True)
    whole = {name: 10**9 for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance")}
    for dtype in ("bf16", "fp32"):
        found[f"local_sgdx2_{dtype}"] = Case(2, 0, dtype, micro_size=1, sync="local_sgd")
    for ranks, stage in ((1, 0), (2, 1), (2, 3)):
        found[f"saved_behind_zero{stage}x{ranks}"] = Case(ranks, stage, asynchronous=True)
    found["local_sgdx2_saved_behind"] = Case(2, 0, sync="local_sgd", asynchronous=True)
    experts = {"num_experts": 4, "capacity_factor": 1.0}
    for stage, expert in ((0, 1), (1, 1), (1, 2), (2, 2)):
        found[f"experts_zero{stage}x2_expert{expert}"] = Case(2, stage, shape="llama", model=experts, expert=expert)
    found["zero3x2_all_live"] = Case(2, 3, zero=whole)
    found["one_micro_batch_zero2x2"] = Case(2, 2, accumulation_steps=1)
    found["large_vocabulary_zero2x2"] = Case(2, 2, vocabulary_size=32768)
    return found


def peak_bytes(case: Case) -> int:
    """Train a few steps; return the most that was held at once from the first step on."""
    mesh = runtime.start_mesh(tensor_ranks=case.tensor, sequence_ranks=case.sequence, expert_ranks=case.expert)
    config = case.config()
    document = complete(config, {"zero_optimization": ZERO | case.zero}, mesh.world_size)
    torch.manual_seed(0)
    facts = {"vocabulary_size": case.vocabulary_size}
    tokens = np.zeros((case.micro_size, case.sequence_length), np.int64)
    batches = [{"tokens": tokens, "labels": tokens}] * case.accumulation_steps
    targets = case.accumulation_steps * tokens.size * case.data
    with LiveBytes() as live, TemporaryDirectory() as folder:
        with partitioned_building(document, mesh):
            model = recipe.build_model(config, facts, tensor=mesh.tensor, sequence=mesh.sequence, expert=mesh.expert)
        engine = Engine(model, config, document, mesh)
        live.most = live.held  # what building took does not count
        with Saver(Path(mesh.broadcast_text(folder)), engine, mesh, lambda saved: None) as saver:
            for step in range(STEPS):
                engine.train_step(step, batches, recipe.loss, targets)
                if case.asynchronous:
                    saver.save({"step": step + 1})
    return live.most


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that live, each storage once, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def release(_: weakref.ref) -> None:
            self.held -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, release)
        self.held += size
        self.most = max(self.most, self.held)


def measure(case: Case, path: Path) -> None:
    """Be one rank; the first writes the largest peak of all."""
    peak = torch.tensor([peak_bytes(case)])
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if torch.distributed.get_rank() == 0:
        path.write_text(str(int(peak)))


def main(table: Path, names: list[str]) -> int:
    """Measure every case, or those named, in new processes; return 1 if one failed."""
    torch.set_num_threads(1)
    import_everything()
    rows = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "peak"
        for name, case in cases().items():
            if names and name not in names:
                continue
            if any(
                run_forked(
                    partial(measure, case, path), case.data * case.sequence * case.tensor, path.with_suffix(".log")
                )
            ):
                print(name, "failed:", *(log.read_text() for log in path.parent.glob("*.log")), sep="\n")
                return 1
            measured, predicted = int(path.read_text()), case.predicted_bytes()
            rows[name] = {
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "ratio": round(predicted / measured, 4),
            }
    table.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
