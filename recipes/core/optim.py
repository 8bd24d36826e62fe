"""Optimizers by name, written so that they are right on the flat partitions that ZeRO gives them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from bigbatch.recipes.core import low_bit
from bigbatch.recipes.core.config import OptimizerSection
from bigbatch.recipes.core.layout import logical_parameters


class Segment(NamedTuple):
    """Where a part of one logical parameter lies in a flat partition."""

    start: int
    length: int
    parameter: int  # the same number on every rank


def build_optimizer(
    section: OptimizerSection, module: nn.Module, learning_rate_scales: dict[str, float] | None = None
) -> Optimizer:
    """Build the optimizer by name: matrices decay, vectors (biases, norms) do not.

    Parameters of one kind and one factor on the learning rate are one group, whose `scale` is that factor. Experts have
    groups of their own, marked and named as DeepSpeed wants them.
    """
    groups: dict[tuple[str, bool, float], dict[str, Any]] = {}
    for name, parameter in logical_parameters(module).items():
        if parameter.requires_grad:
            # A ZeRO-3 parameter is empty here; ds_shape remembers what it was.
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            scale = (learning_rate_scales or {}).get(name, 1.0)
            decay = 0.0 if is_vector else section.weight_decay
            expert_ranks = getattr(parameter, "group_name", "")
            marks = {"moe": True, "name": expert_ranks} if expert_ranks else {}
            new = {"params": [], "weight_decay": decay, "scale": scale, **marks}
            group = groups.setdefault((expert_ranks, is_vector, scale), new)
            group["params"].append(parameter)
    return _BUILDERS[section.name](section, [groups[key] for key in sorted(groups)])


def state_keys(section: OptimizerSection) -> tuple[str, ...]:
    """Name the optimizer's tensors that have a parameter's shape, as its own `state` spells them."""
    if section.name == "sgd":
        return ("momentum_buffer",) if section.momentum else ()
    return _STATE_KEYS[section.name]


def set_state(optimizer: Optimizer, flat: torch.Tensor, tensors: dict[str, torch.Tensor], steps: float | None) -> None:
    """Give one tensor that the optimizer steps on its restored state: float32 tensors of its shape, updates done."""
    if low_bit.is_encoded(optimizer):
        low_bit.encode(optimizer, flat, {key: tensor.view(-1) for key, tensor in tensors.items()}, steps or 0)
        return
    optimizer.state[flat].update(tensors)
    if steps is not None:  # torch's fused kernels want it beside the parameter
        device = flat.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[flat]["step"] = torch.tensor(steps, dtype=torch.float32, device=device)


class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011) whose state begins at the first step.

    DeepSpeed rebuilds torch's own Adagrad from its defaults and so loses the groups' weight decay
    (runtime/zero/stage_1_and_2.py, initialize_optimizer_states); this class is left alone.
    """

    def __init__(self, params: Iterable[Any], lr: float, eps: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group, parameter, gradient, state in _with_gradient(self, ("sum",)):
            gradient = gradient.add(parameter, alpha=group["weight_decay"])  # noqa: PLW2901
            state["sum"].addcmul_(gradient, gradient)
            parameter.addcdiv_(gradient, state["sum"].sqrt().add_(group["eps"]), value=-group["lr"])


class Lion(Optimizer):
    """Lion (Chen et al. 2023, algorithm 2), with decoupled weight decay."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group, parameter, gradient, state in _with_gradient(self, ("exp_avg",)):
            beta1, beta2 = group["betas"]
            update = torch.lerp(gradient, state["exp_avg"], beta1).sign_()
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
            state["exp_avg"].lerp_(gradient, 1 - beta2)


class Lamb(Optimizer):
    """LAMB (You et al. 2020, algorithm 2): Adam's direction, scaled for each layer by |weight| / |direction|.

    DeepSpeed's own has no CPU version, and any that sees ZeRO's flat partitions as one tensor gets the layers' norms
    wrong. This one is told the segments of the flat tensors (`set_segments`) and sums the norms over the data ranks.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._segments: dict[torch.Tensor, list[Segment]] = {}
        self._num_parameters = 0
        self._sum_over_ranks: Callable[[torch.Tensor], None] = lambda norms: None

    def set_segments(
        self,
        segments: dict[torch.Tensor, list[Segment]],
        num_parameters: int,
        sum_over_ranks: Callable[[torch.Tensor], None],
    ) -> None:
        """Tell where the logical parameters lie in the flat tensors, and how to sum a vector over the data ranks."""
        self._segments, self._num_parameters, self._sum_over_ranks = segments, num_parameters, sum_over_ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update. Collective: every data rank must call it."""
        updates = [
            (
                group["lr"],
                parameter.view(-1),
                self._direction(group, parameter, gradient, state).view(-1),
                self._segments.get(parameter, ()),
            )
            for group, parameter, gradient, state in _with_gradient(self, ("exp_avg", "exp_avg_sq"))
        ]
        if not updates:  # a step that was not finite, on every rank
            return
        squares = torch.zeros(2, self._num_parameters, device=updates[0][1].device)  # [weights | directions, parameter]
        for _, weight, direction, segments in updates:
            for start, length, number in segments:
                squares[0, number] += weight[start : start + length].square().sum()
                squares[1, number] += direction[start : start + length].square().sum()
        self._sum_over_ranks(squares)
        weight_norms, direction_norms = squares.sqrt()
        ratios = torch.where((weight_norms > 0) & (direction_norms > 0), weight_norms / direction_norms, 1.0).tolist()
        for learning_rate, weight, direction, segments in updates:
            for start, length, number in segments:
                part = slice(start, start + length)
                weight[part].sub_(direction[part], alpha=learning_rate * ratios[number])

    def _direction(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any]
    ) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction = (state["exp_avg"] / (1 - beta1**step)).div_(denominator)
        return direction.add_(parameter, alpha=group["weight_decay"])


def _with_gradient(
    optimizer: Optimizer, keys: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Yield (group, parameter, gradient, state); the state is made when missing, its step counted."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state.update({key: torch.zeros_like(parameter) for key in keys})
            state["step"] += 1
            yield group, parameter, parameter.grad, state


Builder = Callable[[OptimizerSection, list[dict[str, Any]]], Optimizer]


def _build_adamw(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.epsilon, weight_decay=0.0, fused=True
    )


def _build_adam(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.Adam(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.epsilon, weight_decay=0.0, fused=True
    )


def _build_sgd(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum, fused=True)


def _build_adagrad(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    return Adagrad(groups, lr=section.learning_rate, eps=section.epsilon)


def _build_lion(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    return Lion(groups, lr=section.learning_rate, betas=section.betas)


def _build_lamb(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    return Lamb(groups, lr=section.learning_rate, betas=section.betas, eps=section.epsilon)


def _build_adamw_8bit(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    settings = {"lr": section.learning_rate, "betas": section.betas, "eps": section.epsilon}
    return low_bit.build_adamw_8bit(groups, **settings)


_BUILDERS: dict[str, Builder] = {
    "adamw": _build_adamw,
    "adam": _build_adam,
    "sgd": _build_sgd,
    "adagrad": _build_adagrad,
    "lion": _build_lion,
    "lamb": _build_lamb,
    "adamw_8bit": _build_adamw_8bit,
}
_STATE_KEYS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adagrad": ("sum",),
    "lion": ("exp_avg",),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "adamw_8bit": ("exp_avg", "exp_avg_sq"),
}
