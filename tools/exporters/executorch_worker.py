"""The conversion to ExecuTorch, in its own environment: answers the call of mobile.py."""

from pathlib import Path
from typing import Any

from bigbatch.tools.engines.executorch_worker import open_call
from bigbatch.tools.exporters.traced import Opened, compare, example, open_traced
from bigbatch.tools.worker import Arrays, serve

GROUP_SIZE = 32  # weights that share a scale


def handle(message: dict[str, Any], _: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Write a .pte file with a method for each length, or one for all."""
    opened = open_traced(message["folder"], message["lengths"], message["max_length"])
    reference = open_traced(message["folder"], message["lengths"], message["max_length"])
    write(opened, message["file"], message["precision"])
    record = compare(reference, open_call(message["file"], opened.layout, message["threads"]))
    return {"layout": opened.layout, "record": record}, {}


def write(opened: Opened, file: str, precision: str) -> None:
    """Convert for XNNPACK; in int4, weights have 4 bits in groups, and activations 8, as they come."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_  # pyright: ignore[reportMissingImports]
    from torchao.quantization.granularity import PerGroup  # pyright: ignore[reportMissingImports]

    layout = opened.layout
    if precision == "int4":
        int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
        weights = {"weight_dtype": int4, "weight_granularity": PerGroup(GROUP_SIZE)}
        quantize_(opened.model, Int8DynamicActivationIntxWeightConfig(**weights), filter_fn=_is_divisible)
    programs = {}
    for length in layout["lengths"] or [0]:
        inputs = tuple(example(layout, layout["settings"], length or layout["max_length"]))
        shapes = None
        if not length and inputs[0].dim() == 2:
            free = torch.export.Dim("length", min=layout["min_length"], max=layout["max_length"])
            shapes = {"arrays": tuple({1: free} for _ in inputs)}
        with torch.no_grad():
            programs[f"length_{length}"] = torch.export.export(
                opened.model, inputs, dynamic_shapes=shapes, strict=False
            )
    lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
    Path(file).write_bytes(lowered.to_executorch().buffer)


def _is_divisible(module: Any, name: str) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and module.in_features % GROUP_SIZE == 0


if __name__ == "__main__":
    serve(handle)
