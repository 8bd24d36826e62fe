"""The live process groups of a run, handed down; no module globals."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def data_rank(self) -> int:
        """Which share of the batch this rank takes."""
        return self.rank

    @property
    def data_ranks(self) -> int:
        """How many ranks share the batch."""
        return self.world_size

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the files that one rank writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add up each value over all ranks, in float64. Collective: every rank must call it."""
        # MPS has no float64 and NCCL needs device tensors; CPU and CUDA both take this.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Add up a tensor over the data ranks. Collective: every rank must call it."""
        dist.all_reduce(tensor)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows [n, ...] of all ranks, one rank's after another's; n may differ.

        Collective: every rank must call it.
        """
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
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
        has_text = self.sum(*(float(bool(text) and rank == self.rank) for rank in range(self.world_size)))
        return self.broadcast_text(text, has_text.index(1.0)) if any(has_text) else ""
