"""Whole parts go, and the model becomes smaller: units of the feed-forward layers, heads, or layers.

Every layer keeps equally many, so that config.json can say how many, and any program can load the folder.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.recipe import Batch
from bigbatch.tools.pruning.training_data import compute_gradients, mean_loss

MULTIPLE = 8  # of units that stay: lanes of a processor's vectors
_BLOCK = re.compile(r"(.*?)blocks\.(\d+)\.(.+)")
_UNITS = re.compile(r"(.*blocks\.\d+\.(?:feed_forward\.)?)(up|gate_up|down)\.(weight|bias)")


class Pruned(NamedTuple):
    """What is left of a model."""

    state: dict[str, torch.Tensor]
    """Parameters by their names."""
    shape: dict[str, int]
    """Settings of the model's section that have changed."""
    record: dict[str, Any]


def without_units(recipe: Any, model: nn.Module, batches: list[Batch] | None, ratio: float) -> Pruned:
    """Take the share `ratio` of the units out of every feed-forward layer, those that matter least.

    With batches by the square of a unit's first-order share in the loss (https://arxiv.org/abs/1906.10771), without by
    the 2-norm of its weights.
    """
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = {name: match for name in state if (match := _UNITS.fullmatch(name))}
    downs = {match[1]: name for name, match in found.items() if (match[2], match[3]) == ("down", "weight")}
    if not downs or any("experts" in name for name in state):
        raise UserError("--method", "feed_forward takes a model with one feed-forward layer a block")
    sizes = {state[name].shape[1] for name in downs.values()}
    (size,) = sizes
    kept = max(MULTIPLE, round(size * (1 - ratio) / MULTIPLE) * MULTIPLE)
    if kept >= size:
        raise UserError("--ratio", f"found {ratio}; of {size} units {size - MULTIPLE} at most are to stay")
    importance = _taylor(recipe, model, batches, downs, 1) if batches else _norms(state, downs)
    chosen = {prefix: own.topk(kept).indices.sort().values for prefix, own in importance.items()}
    for name, (prefix, part, kind) in ((name, match.groups()) for name, match in found.items()):
        units, tensor = chosen[prefix], state[name]
        if part == "gate_up":
            state[name] = torch.cat([half[units] for half in tensor.split(size)])
        elif part == "up":
            state[name] = tensor[units]
        elif kind == "weight":
            state[name] = tensor[:, units]
    return Pruned(state, {"feed_forward_size": kept}, {"units": f"{size} -> {kept}"})


def without_heads(recipe: Any, model: nn.Module, batches: list[Batch] | None, ratio: float) -> Pruned:
    """Take the share `ratio` of the heads out of every layer, each key's with all the queries that it answers.

    They matter as units do. The heads that stay keep their size, which only a llama's config.json can say.
    """
    section: Any = getattr(model, "section", None)
    if getattr(section, "family", None) != "llama" or section.num_experts > 1:
        message = (
            "heads takes a llama; transformers' other classes derive a head's size; right is feed_forward or layers"
        )
        raise UserError("--method", message)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    outs = {name.removesuffix("out.weight"): name for name in state if name.endswith("attention.out.weight")}
    count, size = section.key_value_heads, section.head_size
    width = size * section.num_heads // count
    kept = round(count * (1 - ratio))
    if not 0 < kept < count:
        raise UserError("--ratio", f"found {ratio}; of {count} heads (of keys) {kept} would stay")
    if batches:
        importance = _taylor(recipe, model, batches, outs, width)
    else:
        importance = {prefix: state[name].square().sum(0).view(count, -1).sum(1) for prefix, name in outs.items()}
    for prefix, own in importance.items():
        chosen = own.topk(kept).indices.sort().values
        queries, *others = state[f"{prefix}qkv.weight"].split((count * width, count * size, count * size))
        parts = [queries.view(count, width, -1), *(part.view(count, size, -1) for part in others)]
        state[f"{prefix}qkv.weight"] = torch.cat([part[chosen].flatten(0, 1) for part in parts])
        out = state[f"{prefix}out.weight"]
        state[f"{prefix}out.weight"] = out.view(len(out), count, width)[:, chosen].flatten(1)
    shape = {"num_heads": kept * width // size, "num_key_value_heads": kept, "head_dim": size}
    return Pruned(state, shape, {"heads": f"{section.num_heads} -> {shape['num_heads']}"})


def without_layers(recipe: Any, model: nn.Module, batches: list[Batch], ratio: float) -> Pruned:
    """Take the share `ratio` of the layers out, one after the other that of which the loss rises least.

    An encoder and a decoder both lose it.
    """
    named = ((path, module) for path, module in model.named_modules() if path.split(".")[-1] == "blocks")
    stacks: dict[str, Any] = {path: module for path, module in named if len(module)}  # type: ignore[arg-type]
    removed: dict[str, list[int]] = {}
    for path, stack in stacks.items():
        count = round(len(stack) * ratio)  # type: ignore[arg-type]
        if not 0 < count < len(stack):  # type: ignore[arg-type]
            raise UserError("--ratio", f"found {ratio}; of {len(stack)} layers that takes {count}")  # type: ignore[arg-type]
        removed[path] = [_take_least(recipe, model, stack, batches) for _ in range(count)]
    state, shape = {}, {}
    for name, parameter in model.named_parameters():
        found = _BLOCK.fullmatch(name)
        if not found:
            state[name] = parameter.detach()
            continue
        gone, number = removed[f"{found[1]}blocks"], int(found[2])
        if number not in gone:
            left = number - sum(other < number for other in gone)
            state[f"{found[1]}blocks.{left}.{found[3]}"] = parameter.detach()
    for path, stack in stacks.items():
        side = next((side for side in ("encoder", "decoder") if path == f"{side}.blocks" and len(stacks) > 1), "")
        shape[f"num_{side}_layers" if side else "num_layers"] = len(stack) - len(removed[path])  # type: ignore[arg-type]
    return Pruned(state, shape, {"removed_layers": removed})


class _Skipped(nn.Module):
    """In the place of a layer that is not there."""

    def forward(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden


def _take_least(recipe: Any, model: nn.Module, stack: Any, batches: list[Batch]) -> int:
    """Put a stand-in in the place of the layer without which the loss is lowest; return its number."""
    losses = {}
    for number, block in enumerate(stack):
        if not isinstance(block, _Skipped):
            stack[number] = _Skipped()
            losses[number] = mean_loss(recipe, model, batches)
            stack[number] = block
    least = min(losses, key=lambda number: losses[number])
    stack[least] = _Skipped()
    return least


def _taylor(
    recipe: Any, model: nn.Module, batches: list[Batch], downs: dict[str, str], width: int
) -> dict[str, torch.Tensor]:
    """Return for each layer the sum over batches of (sum of weight x gradient of `width` inputs of its matrix)^2."""
    parameters = dict(model.named_parameters())
    found = {prefix: torch.zeros(parameters[name].shape[1] // width) for prefix, name in downs.items()}
    for batch in batches:
        compute_gradients(recipe, model, batch)
        for prefix, name in downs.items():
            weight = parameters[name]
            if weight.grad is not None:
                found[prefix] += (weight.detach() * weight.grad).sum(0).view(-1, width).sum(1).square()
    return found


def _norms(state: dict[str, torch.Tensor], downs: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return for each layer the squared norm of each unit's weights, [F]."""
    found = {}
    for prefix, name in downs.items():
        ups = state.get(f"{prefix}up.weight", state.get(f"{prefix}gate_up.weight"))
        assert ups is not None
        inward = sum(half.square().sum(1) for half in ups.split(state[name].shape[1]))
        found[prefix] = state[name].square().sum(0) + inward
    return found
