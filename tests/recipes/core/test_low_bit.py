"""The 8-bit AdamW's state, decoded for checkpoints and encoded again, against bitsandbytes' own arithmetic."""

import warnings

import pytest
import torch

from bigbatch.recipes.core import low_bit
from bigbatch.recipes.core.config import OptimizerSection
from bigbatch.recipes.core.optim import build_optimizer, set_state

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, about kernels for GPUs
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

SIZE = 10_000  # not a multiple of the block


def trained(steps=5):
    torch.manual_seed(0)
    module = torch.nn.Linear(SIZE // 10, 10)  # one tensor that is encoded, one too small to be
    optimizer = build_optimizer(OptimizerSection(name="adamw_8bit", learning_rate=1e-2, betas=(0.9, 0.99)), module)
    for _ in range(steps):
        step(module, optimizer)
    return module, optimizer


def step(module, optimizer):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_the_decoded_state_is_what_bitsandbytes_decodes():
    module, optimizer = trained()
    state = optimizer.state[module.weight]
    for key, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        expected = bitsandbytes.functional.dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        ).view(-1)
        torch.testing.assert_close(low_bit.decode(state, key, 0, SIZE), expected, rtol=0, atol=0)
        # Any range, across the borders of blocks.
        torch.testing.assert_close(low_bit.decode(state, key, 250, 900), expected[250:1150], rtol=0, atol=0)


def test_a_small_tensor_keeps_its_float32_state_exactly():
    module, optimizer = trained()
    values = {
        key: low_bit.decode(optimizer.state[module.bias], key, 0, 10).clone() for key in ("exp_avg", "exp_avg_sq")
    }
    twin, other = trained(steps=0)
    set_state(other, twin.bias, values, steps=5)
    for key, value in values.items():
        assert torch.equal(low_bit.decode(other.state[twin.bias], key, 0, 10), value)


def test_a_restored_state_takes_the_same_step_within_the_rounding_of_its_codes():
    module, optimizer = trained()
    twin, other = trained(steps=0)
    twin.load_state_dict(module.state_dict())
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        keys = ("exp_avg", "exp_avg_sq")
        values = {key: low_bit.decode(optimizer.state[ours], key, 0, ours.numel()) for key in keys}
        set_state(other, theirs, values, steps=5)
    before = module.weight.detach().clone()
    step(module, optimizer)
    step(twin, other)
    moved, moved_after_restore = module.weight.detach() - before, twin.weight.detach() - before
    assert float((moved - moved_after_restore).norm() / moved.norm()) < 0.02
    assert other.state[twin.weight]["step"] == optimizer.state[module.weight]["step"] == 6
