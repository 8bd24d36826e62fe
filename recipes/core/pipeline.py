"""A model over the stages of a pipeline: each rank keeps consecutive layers and hands the hidden states on.

The model's own forward pass runs on every stage with the stage's own batch. Stand-ins take the places of the layers
that are elsewhere: the first layer's returns what came from the stage before, a block's does nothing, and the one
behind the blocks ends the pass. So a model needs no more for it than `layers()`, in order of use: one before its
blocks, `section.num_layers` blocks, which keep the shape of the hidden states, and those behind them.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bigbatch.recipes.core.layout import logical_shapes, name_logically
from bigbatch.recipes.core.parallel import Axis, Mesh


class Stage(nn.Module):
    """One rank's layers of a model, as DeepSpeed's pipeline calls them.

    `model` keeps these layers alone, but its call, for evaluation and generation, goes through all stages: it returns
    on each rank what the whole model would. Collective over the pipeline: all must call it with the same arguments.
    """

    work: Callable[[Callable[..., Any]], torch.Tensor]
    """Do the next micro-batch of a train step with the forward pass that it is given; return its loss."""

    def __init__(self, model: Any, axis: Axis, device: torch.device) -> None:
        """Cut the model in place, built whole or in `stage_building`."""
        super().__init__()
        self.entry, self.axis, self.device = _Entry(), axis, device
        self.ties = _keep_stage(model, axis, self.entry)
        """Parameters that the first and the last stage both have, by name; the first one's count."""
        self.own_layers = model.forward
        model.forward = self._all_stages
        self.model = model

    def forward(self, incoming: torch.Tensor) -> torch.Tensor:
        """Return the hidden states for the next stage, or on the last one the loss."""
        self.entry.hidden = incoming
        try:
            return self.work(self.own_layers)
        except _LeftStageError as left:
            return left.hidden

    def _all_stages(self, *arguments: Any, **named: Any) -> Any:
        axis, device, result = self.axis, self.device, None
        if axis.rank > 0:
            self.entry.hidden = _receive(axis, device)
        try:
            result = self.own_layers(*arguments, **named)
        except _LeftStageError as left:
            _send(left.hidden, axis)
        return _from_last(result, axis, device)


def pipeline_module(deepspeed: Any, stage: Stage, mesh: Mesh) -> Any:
    """Wrap a stage for DeepSpeed's engine. Collective: every rank must call it."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # noqa: PLC0415 - see import_deepspeed

    topology = PipeModelDataParallelTopology(mesh.pipeline.size, mesh.tensor.size, mesh.data_ranks)
    layers = [stage] * mesh.pipeline.size  # of which each rank keeps its own
    with redirect_stdout(io.StringIO()):  # a command's results go there
        module = deepspeed.pipe.PipelineModule(layers, topology=topology, partition_method="uniform")
    # What TiedLayerSpec would do, but with our names of the parameters: their gradients are added up over both stages,
    # and the norm counts them once.
    tied = list(stage.ties.values())
    module.get_tied_weights_and_groups = lambda: [(parameter, mesh.pipeline_ends) for parameter in tied]
    for parameter in tied:
        parameter.ds_pipe_replicated = mesh.pipeline.rank > 0
    return module


@contextmanager
def stage_building(num_blocks: int, axis: Axis) -> Iterator[None]:
    """Within it a block of another stage is dropped as soon as its weights are drawn: no rank holds the whole model."""
    own = _own_blocks(num_blocks, axis)

    def drop(parent: nn.Module, name: str, block: Any) -> Any:
        return _Elsewhere(block) if isinstance(parent, nn.ModuleList) and int(name) not in own else None

    handle = register_module_module_registration_hook(drop)
    try:
        yield
    finally:
        handle.remove()


class _LeftStageError(Exception):
    """The layers that follow are the next stage's."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("the forward pass has left its stage")
        self.hidden = hidden


class _Entry(nn.Module):
    """In place of the first layer."""

    hidden: torch.Tensor

    def forward(self, *_: Any) -> torch.Tensor:
        return self.hidden


class _Elsewhere(nn.Module):
    """In place of a block, whose tensors' shapes it remembers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.shapes_of_all = logical_shapes(block)

    def forward(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden


class _Exit(nn.Module):
    """In place of what follows the blocks."""

    def forward(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        raise _LeftStageError(hidden)


def _keep_stage(model: Any, axis: Axis, entry: _Entry) -> dict[str, Any]:
    """Replace the layers of other stages; return those parameters of this stage that the first and the last share."""
    name_logically(model)
    layers, num_blocks = model.layers(), model.section.num_layers
    tail, is_last = num_blocks + 1, axis.rank == axis.size - 1
    shared = set(layers[0].parameters()) & {parameter for layer in layers[tail:] for parameter in layer.parameters()}
    ties = {name: parameter for name, parameter in model.named_parameters() if parameter in shared}
    own = _own_blocks(num_blocks, axis)
    places = {module: name for name, module in model.named_modules()}
    for index, layer in enumerate(layers):
        if index == 0 and axis.rank > 0:
            model.set_submodule(places[layer], entry)
        elif 0 < index < tail and index - 1 not in own:
            model.set_submodule(places[layer], _Elsewhere(layer))
        elif index >= tail and not is_last:
            model.set_submodule(places[layer], _Exit())
    return ties if axis.rank == 0 or is_last else {}


def _own_blocks(num_blocks: int, axis: Axis) -> range:
    return range(num_blocks * axis.rank // axis.size, num_blocks * (axis.rank + 1) // axis.size)


def _send(hidden: torch.Tensor, axis: Axis) -> None:
    target = dist.get_global_rank(axis.group, axis.rank + 1)  # type: ignore[arg-type]
    dist.send_object_list([(hidden.shape, hidden.dtype)], target, axis.group, hidden.device)
    dist.send(hidden.contiguous(), target, axis.group)


def _receive(axis: Axis, device: torch.device) -> torch.Tensor:
    source = dist.get_global_rank(axis.group, axis.rank - 1)  # type: ignore[arg-type]
    described: list[Any] = [None]
    dist.recv_object_list(described, source, axis.group, device)
    shape, dtype = described[0]
    hidden = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(hidden, source, axis.group)
    return hidden


def _from_last(result: Any, axis: Axis, device: torch.device) -> Any:
    """Return what the last stage's pass returned, a tensor or several, on all stages."""
    source = dist.get_global_rank(axis.group, axis.size - 1)  # type: ignore[arg-type]
    tensors = [result] if isinstance(result, torch.Tensor) else list(result or ())
    described: list[Any] = [isinstance(result, tuple), [(tensor.shape, tensor.dtype) for tensor in tensors]]
    dist.broadcast_object_list(described, source, axis.group, device)
    is_tuple, shapes = described
    if axis.rank < axis.size - 1:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    tensors = [tensor.contiguous() for tensor in tensors]
    for tensor in tensors:
        dist.broadcast(tensor, source, axis.group)
    return tuple(tensors) if is_tuple else tensors[0]
