"""What passes between the tensor ranks of one model, forward and backward; alone, a rank passes everything through.

What lies between two layers of a model is replicated: the same on all tensor ranks, and so are its gradient, the norms
and the biases added to it. Inside an attention or a feed-forward layer each rank has its own heads or inner units.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from bigbatch.recipes.core.parallel import Axis


def copy_in(hidden: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Let each rank do its part with a replicated tensor: its gradient is the sum of theirs."""
    return hidden if axis.size == 1 else _CopyIn.apply(hidden, axis)


def sum_out(partial: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Add up, in place, what the ranks have made: the sum is replicated."""
    return partial if axis.size == 1 else _SumOut.apply(partial, axis)


def gather_out(part: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Put the ranks' parts [..., n] side by side: the result [..., size * n] is replicated."""
    return part if axis.size == 1 else _GatherOut.apply(part, axis)


@contextmanager
def own_random_numbers(axis: Axis, device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Draw other random numbers on each rank within the block, and behind it again the same ones on all.

    For dropout on what is divided over the ranks; on replicated tensors it has to be the same. The numbers follow from
    the default generator's state, so that a recomputed layer draws them again.
    """
    if axis.size == 1 or not wanted:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + axis.rank)
        yield


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = grad_outputs[0].clone(memory_format=torch.contiguous_format)  # others may use it too
        ctx.axis.sum_in_place(gradient)
        return gradient, None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.mark_dirty(partial)
        axis.sum_in_place(partial)
        return partial

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_outputs[0], None


class _GatherOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis, part = axis, part.contiguous()
        parts = [torch.empty_like(part) for _ in range(axis.size)]
        dist.all_gather(parts, part, group=axis.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_outputs[0].chunk(ctx.axis.size, dim=-1)[ctx.axis.rank], None
