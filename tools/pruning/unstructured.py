"""Single weights become zero: by their magnitude, by how training would move them, or two of every four.

The shapes stay, and so does the file's size; zeros pay where something makes use of them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import Batch
from bigbatch.tools.pruning.training_data import compute_gradients

Scores = dict[str, torch.Tensor]
"""Of each weight of the matrices that are pruned, by name."""
GROUP = 4  # https://arxiv.org/abs/2104.08378: two of four weights in a row are zero
HEADS = ("head", "pair_head")  # what they make is small, and counts most


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices between the embeddings and the head, by name."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.RNNBase)
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, kinds) and path.split(".")[0] not in HEADS
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and id(parameter) not in tables
    }


def magnitudes(model: nn.Module) -> Scores:
    """Score weights by their absolute value."""
    return {name: weight.detach().abs() for name, weight in prunable(model).items()}


def movements(recipe: Any, model: nn.Module, batches: Iterable[Batch], num_steps: int, ratio: float) -> Scores:
    """Score weights by -(weight x gradient), summed over batches: high where training would move them away from 0.

    The gradient is that of the weights left by the scores so far, whose share falls along a cubic curve to 1 - `ratio`
    (https://arxiv.org/abs/2005.07683, 3 and 4); the weights themselves stay, as a recovery run moves them afterwards.
    """
    weights = prunable(model)
    dense = {name: weight.detach().clone() for name, weight in weights.items()}
    scores = {name: torch.zeros_like(weight) for name, weight in dense.items()}
    for step, batch in enumerate(batches):
        now = ratio * (1 - (1 - step / num_steps) ** 3)
        for name, mask in masks(scores, now, is_global=False).items():
            weights[name].data = dense[name] * mask
        compute_gradients(recipe, model, batch)
        for name, weight in weights.items():
            if weight.grad is not None:
                scores[name] -= dense[name] * weight.grad
    for name, weight in weights.items():
        weight.data = dense[name]
    return scores


def masks(scores: Scores, ratio: float, is_global: bool) -> dict[str, torch.Tensor]:
    """Return what stays (1) of each matrix: all but the share `ratio` that scores lowest, of each or of all."""
    if not is_global:
        return {name: _highest(own.flatten(), ratio).view_as(own) for name, own in scores.items()}
    joined = _highest(torch.cat([own.flatten() for own in scores.values()]), ratio)
    parts = joined.split([own.numel() for own in scores.values()])
    return {name: part.view_as(own) for (name, own), part in zip(scores.items(), parts, strict=True)}


def two_of_four(scores: Scores) -> dict[str, torch.Tensor]:
    """Return what stays (1) where of every four weights along a matrix's inputs the two highest do."""
    found = {}
    for name, own in scores.items():
        rows = own.flatten(1)
        if rows.shape[1] % GROUP:
            raise UserError("--method", f"2:4 takes rows of a multiple of {GROUP}; {name} has {rows.shape[1]} inputs")
        groups = rows.view(len(rows), -1, GROUP)
        mask = torch.zeros_like(groups).scatter_(-1, groups.topk(GROUP // 2, dim=-1).indices, 1)
        found[name] = mask.view_as(own)
    return found


def apply_masks(model: nn.Module, found: dict[str, torch.Tensor]) -> None:
    """Set to zero what does not stay."""
    weights = prunable(model)
    for name, mask in found.items():
        weights[name].data = weights[name].data * mask


def _highest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    mask = torch.ones_like(scores)
    mask[scores.topk(round(ratio * len(scores)), largest=False).indices] = 0
    return mask
