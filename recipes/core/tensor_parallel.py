"""What passes between the tensor ranks of one model, forward and backward; alone, a rank passes everything through.

What lies between two layers of a model is replicated: the same on all tensor ranks, and so are its gradient, the norms
and the biases added to it. Inside an attention or a feed-forward layer each rank has its own heads or inner units.

Or it is spread (https://arxiv.org/abs/2205.05198, section 4.2.2): each rank has an equal part of the tokens of all
rows, [N / t, D] of [N, D]. A replicated weight that it uses there goes through `copy_in`, so that the weight's gradient
is summed over the ranks before anything looks at it: clipping, ZeRO, a checkpoint.

Shapes: N tokens of all rows, t tensor ranks, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

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


def own_rows(values: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return this rank's part [N / t, ...] of what there is for each token [B, T, ...]; of all rows, if it is alone."""
    return values if axis.size == 1 else values.flatten(0, 1).chunk(axis.size)[axis.rank]


def gather_in(own: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Let each rank do its part with all tokens [N, D] of what is spread: a token's gradient is the sum of theirs."""
    return own if axis.size == 1 else _GatherIn.apply(own, axis)


def scatter_out(partial: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Add up what the ranks have made of all tokens [..., D], and spread the sum."""
    return _ScatterOut.apply(partial.flatten(0, -2), axis)


def whole_rows(own: torch.Tensor, axis: Axis, num_rows: int) -> torch.Tensor:
    """Put what is spread together again: the rows [B, T, D] are replicated, and so has to be what is made of them."""
    return own if axis.size == 1 else _WholeRows.apply(own, axis).unflatten(0, (num_rows, -1))


def spread_linear(own: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: Axis) -> torch.Tensor:
    """Map all tokens of what is spread by this rank's rows of a matrix; kept for the backward pass are its own alone.

    So they are gathered twice, the second time beside the product that makes their gradient.
    """
    return _SpreadLinear.apply(own, weight, bias, axis)


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


class _GatherIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _done(_gather(own, axis))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _done(_scatter(grad_outputs[0], ctx.axis)), None


class _ScatterOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _done(_scatter(partial, axis))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _done(_gather(grad_outputs[0], ctx.axis)), None


class _WholeRows(_GatherIn):
    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_outputs[0].chunk(ctx.axis.size)[ctx.axis.rank], None


class _SpreadLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: Axis
    ) -> torch.Tensor:
        ctx.axis = axis
        ctx.save_for_backward(own, weight)
        return F.linear(_done(_gather(own, axis)), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, (own, weight) = grad_outputs[0], ctx.saved_tensors
        gathering = _gather(own, ctx.axis)
        scattering = _scatter(gradient @ weight, ctx.axis)
        grad_weight = gradient.T @ _done(gathering)
        grad_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return _done(scattering), grad_weight, grad_bias, None


def _gather(own: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Any]:
    """Begin to put the ranks' rows one behind the other."""
    own = own.contiguous()
    whole = own.new_empty(len(own) * axis.size, *own.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, own, group=axis.group, async_op=True)


def _scatter(partial: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Any]:
    """Begin to add the ranks' rows up and leave each its part."""
    own = partial.new_empty(len(partial) // axis.size, *partial.shape[1:])
    return own, dist.reduce_scatter_tensor(own, partial.contiguous(), group=axis.group, async_op=True)


def _done(begun: tuple[torch.Tensor, Any]) -> torch.Tensor:
    result, work = begun
    work.wait()
    return result
