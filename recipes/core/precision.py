"""What a model computes in, and how a processor without 16-bit arithmetic does it.

torch multiplies matrices of bfloat16 and float16 in scalar loops where the processor lacks AVX-512, as most laptops do:
up to 30 times slower than float32. There the products are computed in float32 of the same numbers and rounded once, as
processors with such instructions do it, in the forward and the backward pass of every model of the process.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names of `precision.dtype`."""
HALVES = (torch.bfloat16, torch.float16)
OPERATORS = ("mm", "addmm", "bmm", "baddbmm")
"""What all of torch's matrix products come down to, those of recurrent layers and of backward passes too."""


def place(model: nn.Module, device: torch.device | str, dtype: str) -> nn.Module:
    """Bring a model's weights to a device, in a type by its name."""
    if torch.device(device).type == "cpu":
        multiply_fast(DTYPES[dtype])
    return model.to(device, DTYPES[dtype])


def multiply_fast(dtype: torch.dtype) -> None:
    """Make products of this type fast on the CPU for the rest of this process, where they are not."""
    if dtype in HALVES and not _has_instructions(dtype):
        _replace_kernels()


def _has_instructions(dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies numbers of this type with oneDNN, which it does on suitable processors alone."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return supported[dtype]()


@functools.cache
def _replace_kernels() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # that one is replaced
        for operator in OPERATORS:
            for name in (operator, f"{operator}.out"):
                kernel = _wrapped(operator, torch.library.get_kernel(f"aten::{name}", "CPU"))
                library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return library  # as long as it lives, they are replaced


def _wrapped(operator: str, kernel: Any) -> Callable[..., torch.Tensor]:
    """Return torch's kernel, or for 16-bit numbers the same operator on float32 ones."""
    product = getattr(torch.ops.aten, operator).default

    def multiply(keys: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        dtype = arguments[0].dtype
        if dtype not in HALVES:
            return kernel.call_boxed(keys, *arguments, **named)
        out = named.pop("out", None)
        found = product(*(one.float() if isinstance(one, torch.Tensor) else one for one in arguments), **named)
        if out is None:
            return found.to(dtype)
        return out.resize_(found.shape).copy_(found)

    return multiply
