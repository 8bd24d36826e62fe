"""Recurrent layers: PyTorch's own, drawn in float32 whatever the dtype, part of their recurrent weights dropped.

Every parameter is used only inside the forward pass of the layer that owns it, which is where ZeRO-3 gathers it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.layers import draw


class LSTM(nn.LSTM):
    """PyTorch's, with `weight_dropout` on what leads from state to state."""

    weight_dropout = 0.0

    def reset_parameters(self) -> None:
        """Draw the weights."""
        _draw_recurrent(self)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the layers over inputs, packed or [B, T, D] with batch_first, from states or from zero."""
        with _dropped(self):
            return super().forward(input, hx)


class GRU(nn.GRU):
    """PyTorch's, with `weight_dropout` on what leads from state to state."""

    weight_dropout = 0.0

    def reset_parameters(self) -> None:
        """Draw the weights."""
        _draw_recurrent(self)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the layers over inputs, packed or [B, T, D] with batch_first, from states or from zero."""
        with _dropped(self):
            return super().forward(input, hx)


def recurrent(
    cell: str, in_features: int, hidden_size: int, weight_dropout: float = 0.0, **settings: Any
) -> LSTM | GRU:
    """Build LSTM or GRU layers, batch first; `settings` are PyTorch's."""
    layers = (LSTM if cell == "lstm" else GRU)(in_features, hidden_size, batch_first=True, **settings)
    layers.weight_dropout = weight_dropout
    return layers


def locked_dropout(hidden: torch.Tensor, chance: float, training: bool) -> torch.Tensor:
    """Drop the same features at all times of a row of hidden [B, T, D] (https://arxiv.org/abs/1512.05287)."""
    if not training or not chance:
        return hidden
    return hidden * F.dropout(hidden.new_ones(len(hidden), 1, hidden.shape[-1]), chance)


@contextmanager
def _dropped(layers: LSTM | GRU) -> Iterator[None]:
    """Within it, drop recurrent weights, the same ones at all times (https://arxiv.org/abs/1708.02182, section 2)."""
    kept: Any = layers._flat_weights
    if torch.is_grad_enabled() and not kept[0].is_cuda:
        together: Any = _Together.apply(*kept)
        layers._flat_weights = list(together)
    if layers.training and layers.weight_dropout:
        named: Any = zip(layers._flat_weights_names, layers._flat_weights, strict=True)
        layers._flat_weights = [
            F.dropout(weight, layers.weight_dropout) if name.startswith("weight_hh") else weight
            for name, weight in named
        ]
    try:
        yield
    finally:
        layers._flat_weights = kept


class _Together(torch.autograd.Function):
    """Hand all weights on, and their gradients back at once, in one order.

    Outside of cuDNN they come a step and a direction at a time, in an order that depends on the lengths at hand. ZeRO
    stage 2 reduces gradients in the order in which they come, which has to be the same on all ranks: otherwise those of
    two directions, equally large, are added to each other.
    """

    @staticmethod
    def forward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def _draw_recurrent(layers: nn.RNNBase) -> None:
    """Draw normal numbers of the variance that PyTorch's uniform ones have."""
    for weight in layers.parameters():
        draw(weight, (3 * layers.hidden_size) ** -0.5)
