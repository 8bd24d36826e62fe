"""What passes between the ranks that share the tokens of each row (Ulysses, https://arxiv.org/abs/2309.14509).

Each has consecutive tokens of every row; in attention all tokens, of its share of the heads. Weights are replicated;
their gradients have to be added up over the ranks, for each brings those of its own part of the loss. Alone, a rank
passes everything through.

Shapes: B rows, T tokens, s sequence ranks, t = T / s tokens of a rank, H heads here, E size of a head, D hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist

from bigbatch.recipes.core.parallel import Axis


def own_tokens(values: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return this rank's part [B, t] of what there is for each token [B, T]."""
    return values if axis.size == 1 else values.unflatten(1, (axis.size, -1))[:, axis.rank]


def to_heads(parts: tuple[torch.Tensor, ...], axis: Axis) -> tuple[torch.Tensor, ...]:
    """Exchange all heads [B, t, H, E] of own tokens for own heads [B, T, H / s, E] of all tokens, in one message.

    The kinds of heads (queries, keys, values) may differ in number; each is divided. Collective over the axis.
    """
    if axis.size == 1:
        return parts
    cut = [part.unflatten(2, (axis.size, -1)).movedim(2, 0) for part in parts]  # [s, B, t, H / s, E]
    received = _AllToAll.apply(torch.cat(cut, dim=3), axis)
    return received.movedim(0, 1).flatten(1, 2).split([part.shape[3] for part in cut], dim=2)


def to_tokens(mixed: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Exchange own heads [B, T, H / s * E] of all tokens for all heads [B, t, H * E] of own tokens. Collective."""
    if axis.size == 1:
        return mixed
    received = _AllToAll.apply(mixed.unflatten(1, (axis.size, -1)).movedim(1, 0), axis)  # [s, B, t, H / s * E]
    return received.movedim(0, 2).flatten(2)


def first_token(hidden: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return the states [B, D] of each row's first token, which the first rank has, on every rank. Collective."""
    first = hidden[:, 0]
    return first if axis.size == 1 else _FromFirst.apply(first, axis)


def counted_once(replicated: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Let what every rank computes alike count once: each rank's gradient is its share of the whole one."""
    return replicated if axis.size == 1 else _CountedOnce.apply(replicated, axis)


class _AllToAll(torch.autograd.Function):
    """Part i [s, ...] goes to rank i; the gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _exchange(parts, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grad_outputs[0], ctx.axis), None


def _exchange(parts: torch.Tensor, axis: Axis) -> torch.Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=axis.group)
    return received


class _FromFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        first = first.clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, dist.get_global_rank(axis.group, 0), axis.group)  # type: ignore[arg-type]
        return first

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        ctx.axis.sum_in_place(gradient)
        return gradient if ctx.axis.rank == 0 else torch.zeros_like(gradient), None


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replicated: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.size = axis.size
        return replicated.view_as(replicated)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_outputs[0] / ctx.size, None
