"""How much a model loses by each of its layers: one is rounded at a time, the others stay.

L layers, N samples, V classes of an output's last dimension.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.tools.quantization.layers import Inputs, linear_layers
from bigbatch.tools.quantization.methods import METHODS, Method


class Sensitivity(NamedTuple):
    """What rounding one layer costs."""

    layer: str
    parameters: int
    divergence: float
    """Mean over the outputs of KL(model, model with this layer rounded), in nats; of states their relative squared
    error."""


def measure_layers(
    model: Any, name: str, group_size: int | None, ignored: list[str], inputs: list[Inputs]
) -> list[Sensitivity]:
    """Round one layer after the other to the nearest numbers of a method; the worst comes first.

    The model is float32 and is not to be used afterwards.
    """
    method = METHODS[name]
    layers = {key: layer for key, layer in linear_layers(model).items() if key not in ignored}
    with torch.inference_mode():
        expected = [model(**one) for one in inputs]
        rounded = _rounder(model, method, group_size, ignored, list(layers.values()))
        found = []
        for key, layer in layers.items():
            with rounded(layer):
                distances = [divergence(right, model(**one), one) for right, one in zip(expected, inputs, strict=True)]
            found.append(Sensitivity(key, layer.weight.numel(), sum(distances) / len(distances)))
    return sorted(found, key=lambda one: -one.divergence)


def divergence(expected: Any, found: Any, inputs: Inputs) -> float:
    """Return the mean of KL(expected, found) over what a model says: a token, a position of a span, a text.

    Outputs of tokens count where the attention mask is 1.
    """
    if "last_hidden_state" in expected and "logits" not in expected:
        right, other = expected["last_hidden_state"], found["last_hidden_state"]
        return float(((right - other) ** 2).sum() / (right**2).sum())
    names = [name for name in ("logits", "start_logits", "end_logits") if name in expected]
    total = 0.0
    for key in names:
        right, other = (one[key].double().log_softmax(-1) for one in (expected, found))
        each = F.kl_div(other, right, reduction="none", log_target=True).sum(-1)
        mask = inputs.get("attention_mask")
        if mask is not None and each.shape == mask.shape:
            each = each[mask.bool()]
        total += float(each.mean())
    return total / len(names)


def _rounder(
    model: nn.Module, method: Method, group_size: int | None, ignored: list[str], layers: list[Any]
) -> Callable[[Any], contextlib.AbstractContextManager[None]]:
    """Return a context in which one layer is rounded."""
    if method.weights is None:
        return _normal_floats
    from bigbatch.tools.quantization.writers import attach

    attach(model, method, group_size, ignored)
    for layer in layers:
        layer.quantization_enabled = False

    @contextlib.contextmanager
    def rounded(layer: Any) -> Iterator[None]:
        layer.quantization_enabled = True
        yield
        layer.quantization_enabled = False

    return rounded


@contextlib.contextmanager
def _normal_floats(layer: Any) -> Iterator[None]:
    """Round a layer's weights to bitsandbytes' 4-bit normal floats for a while."""
    from bitsandbytes import functional

    kept = layer.weight.data
    packed, state = functional.quantize_4bit(kept, quant_type="nf4", compress_statistics=True)
    layer.weight.data = functional.dequantize_4bit(packed, state).to(kept.dtype)
    yield
    layer.weight.data = kept
