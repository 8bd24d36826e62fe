"""Our optimizers against references that see each parameter by itself, unflattened and on flat partitions."""

import math

import pytest
import torch
from torch import nn

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core.config import OptimizerSection
from bigbatch.recipes.core.optim import Adagrad, Lamb, Lion, Segment, build_optimizer, state_keys

BETA1, BETA2, EPSILON, DECAY = 0.9, 0.95, 1e-8, 0.1
STEPS = 6


class PlainLamb:
    """Algorithm 2 of You et al. 2020 with the identity for phi, one parameter at a time."""

    def __init__(self, weight: torch.Tensor, decay: float) -> None:
        self.weight, self.decay, self.step = weight, decay, 0
        self.mean, self.variance = torch.zeros_like(weight), torch.zeros_like(weight)

    def update(self, gradient: torch.Tensor, learning_rate: float) -> None:
        self.step += 1
        self.mean = BETA1 * self.mean + (1 - BETA1) * gradient
        self.variance = BETA2 * self.variance + (1 - BETA2) * gradient**2
        ratio = self.mean / (1 - BETA1**self.step) / ((self.variance / (1 - BETA2**self.step)).sqrt() + EPSILON)
        direction = ratio + self.decay * self.weight
        norm, direction_norm = self.weight.norm(), direction.norm()
        trust = norm / direction_norm if norm > 0 and direction_norm > 0 else 1.0
        self.weight -= learning_rate * trust * direction


class PlainLion:
    """Algorithm 2 of Chen et al. 2023, one parameter at a time."""

    def __init__(self, weight: torch.Tensor, decay: float) -> None:
        self.weight, self.decay, self.momentum = weight, decay, torch.zeros_like(weight)

    def update(self, gradient: torch.Tensor, learning_rate: float) -> None:
        direction = torch.sign(BETA1 * self.momentum + (1 - BETA1) * gradient)
        self.momentum = BETA2 * self.momentum + (1 - BETA2) * gradient
        self.weight -= learning_rate * (direction + self.decay * self.weight)


class OfTorch:
    """One of torch's own optimizers on one parameter."""

    def __init__(self, kind: type, weight: torch.Tensor, **settings) -> None:
        self.parameter = nn.Parameter(weight)
        self.optimizer = kind([self.parameter], **settings)

    def update(self, gradient: torch.Tensor, learning_rate: float) -> None:
        self.parameter.grad = gradient
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()


def references(name: str, weight: torch.Tensor, decay: float):
    """Return the reference that updates this weight in place."""
    if name == "adagrad":
        return OfTorch(torch.optim.Adagrad, weight, eps=EPSILON, weight_decay=decay)
    if name == "sgd":
        return OfTorch(torch.optim.SGD, weight, momentum=0.9, weight_decay=decay)
    return {"lamb": PlainLamb, "lion": PlainLion}[name](weight, decay)


def section(name: str) -> OptimizerSection:
    momentum = 0.9 if name == "sgd" else 0.0
    return OptimizerSection(name=name, learning_rate=0.1, weight_decay=DECAY, momentum=momentum)


def whole_segments(module: nn.Module) -> dict[torch.Tensor, list[Segment]]:
    return {weight: [Segment(0, weight.numel(), number)] for number, weight in enumerate(module.parameters())}


@pytest.mark.parametrize("name", ["sgd", "adagrad", "lion", "lamb"])
def test_ten_steps_are_those_of_the_reference_and_vectors_do_not_decay(name, toy):
    torch.manual_seed(1)
    module = toy.Toy()
    optimizer = build_optimizer(section(name), module)
    if name == "lamb":
        optimizer.set_segments(whole_segments(module), 9, lambda norms: None)
    plain = [
        references(name, weight.detach().clone(), DECAY if weight.dim() == 2 else 0.0) for weight in module.parameters()
    ]
    for step in range(10):
        rate = 0.1 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for weight, reference in zip(module.parameters(), plain, strict=True):
            weight.grad = torch.randn_like(weight)
            reference.update(weight.grad.clone(), rate)
        optimizer.step()
    for weight, reference in zip(module.parameters(), plain, strict=True):
        expected = reference.parameter if isinstance(reference, OfTorch) else reference.weight
        torch.testing.assert_close(weight.detach(), expected.detach(), rtol=2e-6, atol=2e-6)


def test_lamb_on_a_flat_padded_partition_is_lamb_on_whole_parameters():
    torch.manual_seed(2)
    weights = [torch.randn(5, 3), torch.randn(7), torch.randn(2, 4)]
    plain = [PlainLamb(weight.clone(), DECAY) for weight in weights]
    flat = nn.Parameter(torch.cat([*(weight.view(-1) for weight in weights), torch.zeros(4)]))
    optimizer = Lamb([flat], lr=0.05, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=DECAY)
    optimizer.set_segments({flat: [Segment(0, 15, 0), Segment(15, 7, 1), Segment(22, 8, 2)]}, 3, lambda norms: None)
    for _ in range(4):
        gradients = [torch.randn_like(weight) for weight in weights]
        flat.grad = torch.cat([*(gradient.view(-1) for gradient in gradients), torch.zeros(4)])
        for reference, gradient in zip(plain, gradients, strict=True):
            reference.update(gradient, 0.05)
        optimizer.step()
    expected = torch.cat([*(reference.weight.view(-1) for reference in plain), torch.zeros(4)])
    torch.testing.assert_close(flat.detach(), expected, rtol=2e-6, atol=2e-6)


def test_lamb_moves_a_weight_that_is_zero():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Lamb([weight], lr=0.5, betas=(BETA1, BETA2), eps=EPSILON)
    optimizer.set_segments({weight: [Segment(0, 3, 0)]}, 1, lambda norms: None)
    weight.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.5, 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("optimizer_class", [Adagrad, Lion, Lamb])
def test_a_step_without_gradients_changes_nothing(optimizer_class):
    weight = nn.Parameter(torch.ones(3))
    settings = {"betas": (BETA1, BETA2)} if optimizer_class is not Adagrad else {}
    settings |= {"eps": EPSILON} if optimizer_class is not Lion else {}
    optimizer = optimizer_class([weight], lr=0.5, weight_decay=DECAY, **settings)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert not optimizer.state


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad", "lion", "lamb"])
def test_the_state_keys_are_the_optimizers_own_tensors_of_a_parameters_shape(name):
    module = nn.Linear(3, 2)
    optimizer = build_optimizer(section(name), module)
    if name == "lamb":
        optimizer.set_segments(whole_segments(module), 2, lambda norms: None)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state[module.weight]
    found = {key for key, value in state.items() if torch.is_tensor(value) and value.shape == module.weight.shape}
    assert found == set(state_keys(section(name)))


def plain_training(toy, name: str, skipped=()) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the engine cases' model with references, one parameter at a time; return losses and final weights."""
    torch.manual_seed(0)
    model = toy.Toy()
    plain = [references(name, weight.data, DECAY if weight.dim() == 2 else 0.0) for weight in model.parameters()]
    losses = []
    for step in range(STEPS):
        batch = {key: torch.from_numpy(array) for key, array in toy.samples(step, 8).items()}
        result = toy.loss(model, batch)
        mean = result.sum / result.num_targets
        losses.append(mean.item())
        model.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm_up, cosine = (step + 1) / 3, 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 7)) / 2
        if step in skipped:
            continue
        with torch.no_grad():
            for weight, reference in zip(model.parameters(), plain, strict=True):
                reference.update(weight.grad, 1e-2 * (warm_up if step < 2 else cosine))
    return losses, {key: weight.detach() for key, weight in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("plan", ["zero0", "zero1", "zero2", "zero3_sharded"])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "lion", "lamb"])
def test_zero_partitions_on_any_ranks_give_the_reference_of_whole_parameters(name, plan, ranks, engine_cases, toy):
    outcome = engine_cases("train", ranks, f"{plan}_{name}")
    losses, expected = plain_training(toy, name)
    assert [step["loss"] for step in outcome.steps] == pytest.approx(losses, rel=2e-6)
    reader = checkpoint.Reader(checkpoint.checkpoint_dir(outcome.folder, STEPS))
    assert set(reader.tensors) == set(expected)
    for key, weight in expected.items():
        torch.testing.assert_close(reader.read(key), weight, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("plan", ["zero0", "zero1", "zero2", "zero3_sharded"])
def test_lamb_passes_over_a_step_that_is_not_finite(plan, ranks, engine_cases, toy):
    outcome = engine_cases("train", ranks, f"{plan}_lamb_nan")
    assert [step["skipped"] for step in outcome.steps] == [False, False, False, True, False, False]
    losses, _ = plain_training(toy, "lamb", skipped=(3,))
    assert [step["loss"] for step in outcome.steps][4:] == pytest.approx(losses[4:], rel=2e-6)
