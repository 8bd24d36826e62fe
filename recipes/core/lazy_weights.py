"""Run a model whose weights are not in memory: each module's are read when it begins and dropped when it ends."""

from collections.abc import Callable

import torch
from torch import nn


def read_lazily(model: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Give a model on the meta device its weights one module at a time, for forward passes alone.

    `read` gets a name of `named_parameters`, the first one where modules share a parameter, and returns the tensor. The
    peak of memory is the largest module's own parameters, not the model.
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            names = {key: first_names[id(parameter)] for key, parameter in own.items()}
            module.register_forward_pre_hook(_filler(names, read))
            module.register_forward_hook(_dropper(own))


def _filler(names: dict[str, str], read: Callable[[str], torch.Tensor]) -> Callable[..., None]:
    def fill(module: nn.Module, inputs: object) -> None:
        for key, name in names.items():
            module._parameters[key] = nn.Parameter(read(name), requires_grad=False)

    return fill


def _dropper(own: dict[str, nn.Parameter]) -> Callable[..., None]:
    def drop(module: nn.Module, inputs: object, outputs: object) -> None:
        module._parameters.update(own)

    return drop
