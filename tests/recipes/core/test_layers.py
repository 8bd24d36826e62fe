import math

import pytest
import torch
import torch.nn.functional as F

from bigbatch.recipes.core.layers import (
    Embedding,
    Linear,
    RMSNorm,
    _CpuGelu,
    attend,
    attention_mask,
    gelu,
    rotary_table,
    rotate,
)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def plain_attention(query, key, value, allowed):
    """Softmax attention in float64, head by head."""
    repeats = query.shape[2] // key.shape[2]
    query, key, value = (tensor.transpose(1, 2).double() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("num_key_value_heads", [6, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_attention_and_its_gradients_equal_the_textbooks(num_key_value_heads, masked, dtype, tolerance):
    torch.manual_seed(0)
    query = torch.randn(2, 20, 6, 8).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 20, num_key_value_heads, 8).to(dtype).requires_grad_() for _ in range(2))
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()
    mask = None
    if masked:
        documents = (torch.arange(20) > torch.tensor([[7], [12]])).long()
        blocks = (documents.unsqueeze(1) == documents.unsqueeze(2)) & allowed
        allowed, mask = blocks.unsqueeze(1), attention_mask(blocks, dtype)
    upstream = torch.randn(2, 20, 48)
    found = attend(query, key, value, mask, is_causal=not masked)
    expected = plain_attention(query, key, value, allowed)
    assert relative(found, expected) < tolerance
    gradients = torch.autograd.grad(found, (query, key, value), upstream.to(dtype))
    for gradient, right in zip(gradients, torch.autograd.grad(expected, (query, key, value), upstream), strict=True):
        assert relative(gradient, right) < tolerance


def test_short_bfloat16_training_takes_the_way_of_batched_products_and_the_rest_does_not():
    def way(length, dtype):
        query, key, value = (torch.randn(1, length, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        result = attend(query, key, value, None, is_causal=True)
        names, nodes = "", [result.grad_fn]
        while nodes:
            node = nodes.pop()
            names += f" {node.name()}"
            nodes += [parent for parent, _ in node.next_functions if parent]
        return "_ShortAttention" in names

    assert way(64, torch.bfloat16)
    assert not way(64, torch.float32)
    assert not way(1024, torch.bfloat16)


def test_gelu_in_bfloat16_equals_the_exact_one_within_its_format():
    torch.manual_seed(0)
    inputs = (torch.randn(3, 100_003) * 3).bfloat16()  # more than a block, no multiple of one
    inputs[0, :8] = torch.tensor([0.0, -0.0, 30.0, -30.0, 1e4, -1e4, 1e-20, -1e-20])
    inputs.requires_grad_()
    exact = inputs.detach().double().requires_grad_()
    result, expected = gelu(inputs), F.gelu(exact, approximate="tanh")
    assert isinstance(result.grad_fn, type(_CpuGelu.apply(inputs).grad_fn))
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-7)
    upstream = torch.randn(inputs.shape).bfloat16()
    (found,) = torch.autograd.grad(result, inputs, upstream)
    (right,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(found.double(), right, rtol=2**-7, atol=1e-6)


def test_gelu_takes_a_tensor_that_does_not_lie_in_one_piece():
    inputs = torch.randn(6, 8).bfloat16().T.requires_grad_()
    torch.testing.assert_close(gelu(inputs), F.gelu(inputs, approximate="tanh"), rtol=2**-7, atol=1e-6)


def test_rotation_turns_each_pair_by_its_positions_angle():
    heads = torch.randn(1, 3, 2, 4)
    positions = torch.tensor([[0, 5, 9]])
    turned = rotate(heads, rotary_table(positions, 4, 100.0, torch.float32))
    for token, position in enumerate((0, 5, 9)):
        for pair, frequency in enumerate((1.0, 0.1)):
            first, second = (heads[0, token, :, pair + offset] for offset in (0, 2))
            expected = torch.complex(first, second) * torch.exp(torch.tensor(1j * position * frequency))
            found = torch.complex(turned[0, token, :, pair], turned[0, token, :, pair + 2])
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_rms_norm_equals_its_definition(dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-5)
    torch.nn.init.normal_(norm.weight, mean=1.0)
    norm = norm.to(dtype)
    inputs = (torch.randn(5, 24) * 4).to(dtype).requires_grad_()
    exact, weight = inputs.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    upstream = torch.randn(5, 24).to(dtype)
    result = norm(inputs)
    assert result.dtype == dtype
    assert relative(result, expected) < tolerance
    found = torch.autograd.grad(result, (inputs, norm.weight), upstream)
    for gradient, right in zip(found, torch.autograd.grad(expected, (exact, weight), upstream.double()), strict=True):
        assert relative(gradient, right) < tolerance


def test_layers_are_drawn_with_their_own_deviation():
    torch.manual_seed(0)
    linear = Linear(200, 300, bias=True, standard_deviation=0.05)
    assert linear.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not linear.bias.any()
    assert Embedding(300, 200, 0.03).weight.std().item() == pytest.approx(0.03, rel=0.02)
