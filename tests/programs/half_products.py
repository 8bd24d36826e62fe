"""Multiply 16-bit numbers as on a processor that has no instructions for them; print how far results are off, as JSON.

Of all operators, forward and backward; `speed` is that of bfloat16 over float32.
"""

import json
import time

import torch
from torch import nn

from bigbatch.recipes.core import precision


def main() -> None:
    whole = {name: call() for name, call in calls(torch.float32).items()}
    precision._replace_kernels()
    errors = {}
    for dtype in (torch.bfloat16, torch.float16):
        for name, call in calls(dtype).items():
            found = call()
            assert found.dtype == dtype, name
            largest = whole[name].abs().max()
            errors[f"{name} {dtype}"] = float((found.float() - whole[name]).abs().max() / largest / precision_of(dtype))
    again = whole["mm"].equal(calls(torch.float32)["mm"]())
    print(json.dumps({"errors": errors, "float32_is_as_before": again, "speed": speed()}))


def precision_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def calls(dtype: torch.dtype) -> dict:
    """Return products of the same numbers, which all types can hold exactly."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randint(-8, 9, shape, generator=generator) / 8).to(dtype)

    left, right, more = numbers(4, 24, 40), numbers(4, 40, 24), numbers(4, 24, 24)
    linear, recurrent = nn.Linear(40, 24), nn.LSTM(40, 16, bidirectional=True)
    for module in (linear, recurrent):
        module.to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(numbers(*parameter.shape) / 8)

    def gradient(module: nn.Module) -> torch.Tensor:
        found = module(left)
        (found[0] if isinstance(found, tuple) else found).float().square().sum().backward()
        grad = next(module.parameters()).grad
        assert grad is not None
        return grad

    return {
        "mm": lambda: left[0] @ right[0],
        "mm, out": lambda: torch.mm(left[0], right[0], out=left.new_empty(24, 24)),
        "addmm": lambda: torch.addmm(more[0], left[0], right[0], beta=0.5, alpha=2),
        "bmm": lambda: torch.bmm(left, right),
        "baddbmm, out": lambda: torch.baddbmm(more, left, right, beta=0, alpha=0.5, out=torch.empty_like(more)),
        "linear": lambda: linear(left).detach(),
        "linear, gradient": lambda: gradient(linear),
        "lstm, gradient": lambda: gradient(recurrent),
    }


def speed() -> float:
    matrices = torch.randn(2, 512, 512)
    seconds = [min(timed(matrices.to(dtype)) for _ in range(5)) for dtype in (torch.float32, torch.bfloat16)]
    return seconds[0] / seconds[1]


def timed(matrices: torch.Tensor) -> float:
    begin = time.process_time()
    torch.mm(*matrices)
    return time.process_time() - begin


if __name__ == "__main__":
    main()
