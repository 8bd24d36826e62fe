import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.loss import chunked_cross_entropy


def problem(num_rows=37, num_classes=50, size=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(num_classes, size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < 0.3] = -100
    return hidden, weight, labels


def reference(hidden, weight, labels, factor=1.0):
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * factor, (hidden, weight))


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 70), num_classes=st.integers(2, 300), chunk_rows=st.integers(1, 80), seed=st.integers(0, 9)
)
def test_loss_and_gradients_equal_pytorchs_in_float32_whatever_the_chunks(num_rows, num_classes, chunk_rows, seed):
    hidden, weight, labels = problem(num_rows, num_classes, seed=seed)
    labels[0] = 1  # at least one counts
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows)
    (loss / 7).backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels, 1 / 7)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 1e-6 * (expected.item() + 1)
    for found, right in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert (found.double() - right).norm() < 1e-6 * (right.norm() + 1)


def test_gradients_are_the_slopes_of_the_loss_in_float64():
    hidden, weight, labels = problem(num_rows=7, num_classes=5, size=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: chunked_cross_entropy(*x, labels, chunk_rows=3) * 0.3, (hidden, weight))


def test_the_incoming_gradient_scales_the_result_each_time():
    hidden, weight, labels = problem()
    loss = chunked_cross_entropy(hidden, weight, labels)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    tripled = torch.autograd.grad(loss * 3, (hidden, weight))
    for one, three in zip(once, tripled, strict=True):
        torch.testing.assert_close(three, one * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [64, 2048])
def test_sixteen_bit_gradients_are_as_good_as_their_format(dtype, chunk_rows):
    hidden, weight, labels = problem(2048, 3000, 32, dtype)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows)
    factor = 2.0**15 / 3 / 2048  # a loss scale over a number of targets
    (loss * factor).backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels, factor)
    rounding = torch.finfo(dtype).eps
    assert abs(loss.item() / expected.item() - 1) < rounding / 4
    assert relative(hidden.grad, grad_hidden) < 3 * rounding  # the logits, of size 15, are rounded too
    assert relative(weight.grad, grad_weight) < 3 * rounding


def test_float16_neither_underflows_at_a_mean_over_many_targets_nor_overflows_at_many_equal_labels():
    hidden, weight, labels = problem(4096, 4000, 8, torch.float16)
    labels[:] = 3
    with torch.no_grad():
        hidden.mul_(0.1).add_(30.0)  # 4,096 rows of 30 sum to more than float16 holds
        weight.mul_(0.01)
    factor = 2.0**11 / 1e6
    (chunked_cross_entropy(hidden, weight, labels, chunk_rows=4096) * factor).backward()
    _, grad_hidden, grad_weight = reference(hidden, weight, labels, factor)
    assert relative(weight.grad, grad_weight) < 2e-3
    assert relative(hidden.grad, grad_hidden) < 2e-3


def test_a_factor_is_not_rounded_to_bfloat16_on_its_way():
    hidden, weight, labels = problem(64, 100, 8, torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, labels)
    plain = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    scaled = torch.autograd.grad(loss * (1 + 2**-8 - 2**-12), weight)[0]  # in bfloat16 this is 1
    assert not torch.equal(plain, scaled)


def test_rows_beyond_the_classes_have_no_part():
    hidden, weight, labels = problem(num_classes=50)
    padded = torch.cat((weight.detach(), torch.full((14, 16), 5.0))).requires_grad_()
    loss = chunked_cross_entropy(hidden, padded, labels, num_classes=50)
    loss.backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    assert relative(hidden.grad, grad_hidden) < 1e-6
    assert relative(padded.grad[:50], grad_weight) < 1e-6
    assert not padded.grad[50:].any()


def test_a_batch_without_targets_has_loss_zero_and_no_gradient():
    hidden, weight, labels = problem()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_certain_and_hopeless_predictions_stay_finite():
    hidden = torch.tensor([[300.0], [300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 600.0
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [2.0]]))


def test_no_gradient_is_made_where_none_is_asked():
    hidden, weight, labels = problem()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels)
    assert loss.grad_fn is None
    chunked_cross_entropy(hidden, weight.detach(), labels).backward()
    _, grad_hidden, _ = reference(hidden, weight, labels)
    assert relative(hidden.grad, grad_hidden) < 1e-6


def test_the_whole_matrix_of_logits_never_exists():
    hidden, weight, labels = problem(512, 4096, 4)
    logits_bytes = 512 * 4096 * 4
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        chunked_cross_entropy(hidden, weight, labels, chunk_rows=16).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 16 * 4096 * 4 <= largest < logits_bytes / 4


def test_a_bias_is_added_to_the_logits_and_gets_its_gradient():
    hidden, weight, labels = problem()
    bias = torch.randn(50, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=8, bias=bias)
    expected = F.cross_entropy(hidden @ weight.T + bias, labels, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    wanted = (hidden, weight, bias)
    pairs = zip(torch.autograd.grad(loss / 7, wanted), torch.autograd.grad(expected / 7, wanted), strict=True)
    assert all(relative(found, reference) < 1e-6 for found, reference in pairs)


def test_smoothed_labels_have_the_loss_and_gradients_of_pytorch_and_padding_has_none():
    hidden, weight, labels = problem()
    labels[labels >= 47] = -100
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=8, num_classes=47, label_smoothing=0.1)
    logits = hidden @ weight[:47].T
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    wanted = (hidden, weight)
    pairs = zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True)
    assert all(relative(found, reference) < 1e-6 for found, reference in pairs)
