"""bitsandbytes' 8-bit AdamW: its state is blocks of 8-bit codes, each block with its largest value.

Checkpoints hold the decoded float32 state, so that they resume under any plan. Encoding it again rounds once more: this
is the one optimizer whose resume comes near to the uninterrupted run and does not equal it.
"""

import logging
from typing import Any

import torch

from bigbatch.recipes.core.errors import UserError

BLOCK = 256  # values that share a scale, in bitsandbytes' own blockwise optimizers
_PARTS = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}


def build_adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Build the optimizer; raise UserError where bitsandbytes is not installed."""
    try:
        bitsandbytes = import_bitsandbytes()
    except ImportError:
        message = "adamw_8bit needs bitsandbytes: pip install 'bigbatch[low-bit]', or use adamw"
        raise UserError("optimizer.name", message) from None
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def import_bitsandbytes() -> Any:
    """Import it without what it logs about kernels for inference."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: PLC0415 - an extra

    return bitsandbytes


def is_encoded(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimizer's state has to go through this module."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def decode(state: dict[str, Any], key: str, start: int, length: int) -> torch.Tensor:
    """Return `length` values of a state tensor from `start` on, float32 [length]."""
    codes, table, scales = _PARTS[key]
    part = state[codes].view(-1)[start : start + length]
    if table not in state:  # a small tensor, kept in float32
        return part
    blocks = torch.arange(start, start + length, device=part.device) // BLOCK
    return state[table][part.long()] * state[scales][blocks]


def encode(optimizer: torch.optim.Optimizer, flat: torch.Tensor, values: dict[str, torch.Tensor], steps: float) -> None:
    """Give a parameter its state from float32 tensors [n]."""
    from bitsandbytes.functional import quantize_blockwise  # noqa: PLC0415

    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[0], "params": [flat]}]  # under ZeRO-3 the groups stand empty between steps
    optimizer.init_state(optimizer.param_groups[0], flat, 0, 0)  # type: ignore[attr-defined]
    optimizer.param_groups = groups
    state = optimizer.state[flat]
    state["step"] = int(steps)
    for key, value in values.items():
        codes, table, scales = _PARTS[key]
        if table not in state:
            state[codes].view(-1).copy_(value)
            continue
        encoded, quantization = quantize_blockwise(value.contiguous(), code=state[table], blocksize=BLOCK)
        state[codes].view(-1).copy_(encoded)
        state[scales].copy_(quantization.absmax)
