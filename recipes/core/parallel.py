"""The live process groups of a run, handed down; no module globals."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bigbatch.recipes.core.plan import ParallelPlan


@dataclass(frozen=True)
class Axis:
    """Ranks of the mesh that share one piece of work, and this rank's place among them; one alone needs no group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over the axis. Collective: every rank of it must call it."""
        dist.all_reduce(tensor, group=self.group)

    def max_in_place(self, tensor: torch.Tensor) -> None:
        """Take the largest of each element over the axis. Collective: every rank of it must call it."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def first_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by the first rank's, and return it. Collective: every rank of the axis must call it."""
        if self.size > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), self.group)  # type: ignore[arg-type]
        return tensor


ALONE = Axis()


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks of the run: tensor ranks are neighbours, then sequence ranks.

    All of these together are a data rank; behind each other stand the pipeline's stages, each with all its data ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    tensor: Axis = ALONE
    """The ranks that hold the parts of one model."""
    data_group: dist.ProcessGroup | None = None
    """The ranks that hold the same parts as this one, and of other samples the same tokens; None: all."""
    pipeline: Axis = ALONE
    """The stages of one model."""
    pipeline_ends: dist.ProcessGroup | None = None
    """The first and the last stage, for those two."""
    sequence: Axis = ALONE
    """The ranks that share the tokens of each row."""
    zero_group: dist.ProcessGroup | None = None
    """The ranks that hold the same parts as this one, whatever tokens they have; None: all."""
    expert: Axis = ALONE
    """The neighbouring data ranks that have all experts of a mixture between them."""

    @property
    def data_rank(self) -> int:
        """Which share of the batch this rank takes."""
        return self.rank // self.tensor.size // self.sequence.size % self.data_ranks

    @property
    def data_ranks(self) -> int:
        """How many ranks share the batch."""
        return self.world_size // self.tensor.size // self.sequence.size // self.pipeline.size

    @property
    def zero(self) -> Axis:
        """The ranks that share the state of the same weights: those of the data and the sequence axis."""
        size = self.sequence.size
        return Axis(self.data_rank * size + self.sequence.rank, self.data_ranks * size, self.zero_group)

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for its data rank in sums: its last stage does, where the loss is."""
        return self.tensor.rank == self.sequence.rank == 0 and self.pipeline.rank == self.pipeline.size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the files that one rank writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add up each value over the data ranks, each counted once, in float64. Collective: every rank must call it."""
        return self.sum_of_all(*(values if self.counts else (0.0,) * len(values)))

    def sum_of_all(self, *values: float) -> list[float]:
        """Add up each value over all ranks, in float64. Collective: every rank must call it."""
        # MPS has no float64 and NCCL needs device tensors; CPU and CUDA both take this.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over the data ranks. Collective: every rank must call it."""
        dist.all_reduce(tensor, group=self.data_group)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows [n, ...] of all data ranks, one's after another's; n may differ.

        Collective: every rank must call it.
        """
        counts = torch.zeros(self.data_ranks, dtype=torch.int64, device=self.device)
        counts[self.data_rank] = len(rows)
        dist.all_reduce(counts, group=self.data_group)
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.data_ranks)]
        dist.all_gather(parts, padded, group=self.data_group)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def barrier(self) -> None:
        """Wait for all ranks. Collective: every rank must call it."""
        self.sum(0.0)

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """Return one rank's text on every rank. Collective: every rank must call it."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, source)
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, source)
        return bytes(data.tolist()).decode()

    def first_text(self, text: str) -> str:
        """Return the text of the lowest rank that has one on every rank, or "". Collective: every rank must call it."""
        has_text = self.sum_of_all(*(float(bool(text) and rank == self.rank) for rank in range(self.world_size)))
        return self.broadcast_text(text, has_text.index(1.0)) if any(has_text) else ""


def build_mesh(rank: int, plan: ParallelPlan, device: torch.device) -> Mesh:
    """Make the groups of a plan. Collective: every rank must call it."""
    if plan.tensor == plan.pipeline == plan.sequence == 1:
        expert = ALONE
        if plan.expert > 1:
            expert = Axis(rank % plan.expert, plan.expert, _group_of(rank, plan.expert_groups()))
        return Mesh(rank, plan.world_size, device, expert=expert)
    place = plan.coordinates(rank)
    data, tensor, pipeline, ends, sequence = _group_of(rank, plan.groups("data")), ALONE, ALONE, None, ALONE
    zero = data
    if plan.sequence > 1:
        sequence = Axis(place.sequence, plan.sequence, _group_of(rank, plan.groups("sequence")))
        zero = _group_of(rank, plan.groups("data", "sequence"))
    if plan.tensor > 1:
        tensor = Axis(place.tensor, plan.tensor, _group_of(rank, plan.groups("tensor")))
    if plan.pipeline > 1:
        stages = plan.groups("pipeline")
        pipeline = Axis(place.pipeline, plan.pipeline, _group_of(rank, stages))
        ends = _group_of(rank, [(ranks[0], ranks[-1]) for ranks in stages])
    return Mesh(rank, plan.world_size, device, tensor, data, pipeline, ends, sequence, zero)


def _group_of(rank: int, groups: list[tuple[int, ...]]) -> Any:
    """Make all the groups, as every rank has to, and return the one that this rank is in, if any."""
    made = {ranks: dist.new_group(list(ranks)) for ranks in groups}
    return next((group for ranks, group in made.items() if rank in ranks), None)
