"""Where DeepSpeed keeps each logical parameter's float32 master and optimizer state on this rank.

DeepSpeed flattens the parameters of a group and gives each data rank one piece. A fragment says which flat range of one
logical parameter this rank holds, with views into DeepSpeed's own tensors: saving reads them, restoring writes them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from bigbatch.recipes.core import low_bit
from bigbatch.recipes.core.layout import Share, logical_parameters, logical_shape, logical_shapes, share_of
from bigbatch.recipes.core.optim import Segment


class Fragment(NamedTuple):
    """One rank's piece of one logical parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole logical parameter."""
    start: int
    """First element of the piece, in the flattened parameter, of which a tensor rank has a share."""
    master: torch.Tensor  # [n] float32, a view; of a weight that is not trained, in its working format
    flat: torch.Tensor
    """The tensor that the optimizer steps on, and the key of its state."""
    offset: int
    """Where the piece begins in the flattened `flat`."""
    share: Share | None
    """What this tensor rank has of the logical parameter; None: the whole."""
    is_expert: bool = False
    """Only some of the data ranks have it: one of each group of expert ranks."""

    def state(self, optimizer: torch.optim.Optimizer, key: str) -> torch.Tensor:
        """Return this piece of an optimizer state tensor, float32 [n]: a view, but a copy of an 8-bit state."""
        if low_bit.is_encoded(optimizer):
            return low_bit.decode(optimizer.state[self.flat], key, self.offset, self.master.numel())
        return optimizer.state[self.flat][key].view(-1)[self.offset : self.offset + self.master.numel()]


def fragments(engine: Any, module: nn.Module) -> list[Fragment]:
    """List this rank's pieces, in the order of the model's parameters."""
    names = {parameter: name for name, parameter in logical_parameters(module).items() if parameter.requires_grad}
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        found = _stage3(wrapper, names)
    elif hasattr(wrapper, "single_partition_of_fp32_groups"):
        found = _mapped(wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, names)
    elif hasattr(wrapper, "fp32_groups_flat_partition"):  # ZeRO-1 with data_types.grad_accum_dtype fp32
        found = _mapped(wrapper.bf16_groups, wrapper.fp32_groups_flat_partition, names)
    elif hasattr(wrapper, "fp32_groups"):  # stage 0, bf16 or fp16: a float32 copy of each parameter
        found = _whole(wrapper.fp16_groups, wrapper.fp32_groups, names)
    else:  # stage 0, fp32: the parameters themselves
        groups = [group["params"] for group in wrapper.param_groups]
        found = _whole(groups, groups, names)
    order = {name: index for index, name in enumerate(names.values())}
    return sorted(found, key=lambda fragment: order[fragment.name])


def frozen(module: nn.Module, data_rank: int) -> list[Fragment]:
    """List this rank's pieces of the parameters that are not trained: whole ones, at stage 3 its partitions."""
    found = []
    for name, weight in logical_parameters(module).items():
        if weight.requires_grad:
            continue
        start, flat = 0, weight.data.view(-1)
        if hasattr(weight, "ds_tensor"):
            start = data_rank * weight.ds_tensor.ds_numel
            flat = weight.ds_tensor.data[: max(0, min(weight.ds_tensor.ds_numel, weight.ds_numel - start))]
        found.append(Fragment(name, logical_shape(weight), start, flat, flat, 0, share_of(weight)))
    return found


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def segments(pieces: list[Fragment], module: nn.Module) -> tuple[dict[torch.Tensor, list[Segment]], int]:
    """Return where each logical parameter lies in the flat tensors, and the number of all logical parameters."""
    numbers = {name: number for number, name in enumerate(sorted(logical_shapes(module)))}
    found: dict[torch.Tensor, list[Segment]] = {}
    for piece in pieces:
        segment = Segment(piece.offset, piece.master.numel(), numbers[piece.name])
        found.setdefault(piece.flat, []).append(segment)
    return found, len(numbers)


def is_replicated(engine: Any) -> bool:
    """Tell whether every data rank holds everything (stage 0)."""
    return engine.zero_optimization_stage() == 0


def write_back(engine: Any) -> None:
    """Bring the working weights up to date with restored masters. Collective: every rank must call it."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        for index in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):
        for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master.data)


def _is_expert(weight: nn.Parameter) -> bool:
    return hasattr(weight, "group_name")


def _whole(
    weights: list[list[nn.Parameter]], masters: list[list[torch.Tensor]], names: dict[nn.Parameter, str]
) -> Iterator[Fragment]:
    for weight_group, master_group in zip(weights, masters, strict=True):
        for weight, master in zip(weight_group, master_group, strict=True):
            shape, share = logical_shape(weight), share_of(weight)
            yield Fragment(names[weight], shape, 0, master.data.view(-1), master, 0, share, _is_expert(weight))


def _mapped(
    weights: list[list[nn.Parameter]], flats: list[torch.Tensor], names: dict[nn.Parameter, str]
) -> Iterator[Fragment]:
    for group, flat in zip(weights, flats, strict=True):
        for weight in group:
            mapping = weight._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # another rank holds all of it
                continue
            address = mapping.hp_fragment_address
            master = flat.data.view(-1)[address.start : address.start + address.numel]
            start = mapping.lp_fragment_address.start
            shape, share = logical_shape(weight), share_of(weight)
            yield Fragment(names[weight], shape, start, master, flat, address.start, share, _is_expert(weight))


def _stage3(wrapper: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    for weight, name in names.items():
        group, offset, _ = wrapper.grad_position[wrapper.get_param_id(weight)]
        flat = wrapper.fp32_partitioned_groups_flat[group]
        start = wrapper._get_param_partition_rank(weight) * weight.ds_tensor.ds_numel  # type: ignore[attr-defined]
        length = min(weight.ds_tensor.ds_numel, weight.ds_numel - start)  # type: ignore[attr-defined]
        if length > 0:  # the last rank's piece may be padding alone
            master = flat.data[offset : offset + length]
            yield Fragment(name, logical_shape(weight), start, master, flat, offset, share_of(weight))
