"""The conversion to LiteRT, in its own environment: answers the call of mobile.py."""

from typing import Any

from bigbatch.tools.engines.litert_worker import open_call
from bigbatch.tools.exporters.traced import Opened, compare, example, open_traced
from bigbatch.tools.worker import Arrays, serve

RECIPES = {"int8": "dynamic_wi8_afp32", "int4": "dynamic_wi4_afp32"}
"""Of ai_edge_quantizer: weights by channel, activations quantized as they come."""


def handle(message: dict[str, Any], _: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Write a .tflite file with a signature for each length; they share the weights."""
    opened = open_traced(message["folder"], message["lengths"], message["max_length"])
    write(opened, message["file"], message["precision"])
    record = compare(opened, open_call(message["file"], opened.layout, message["threads"]))
    return {"layout": opened.layout, "record": record}, {}


def write(opened: Opened, file: str, precision: str) -> None:
    """Convert, and quantize where asked to."""
    import litert_torch  # pyright: ignore[reportMissingImports]
    import torch
    from ai_edge_quantizer import quantizer, recipe  # pyright: ignore[reportMissingImports]

    converter: Any = litert_torch
    for length in opened.layout["lengths"] or [0]:
        inputs = tuple(example(opened.layout, opened.layout["settings"], length, torch.int32))
        converter = converter.signature(f"length_{length}", opened.model, inputs)
    converter.convert().export(file)
    if precision in RECIPES:
        quantizing = quantizer.Quantizer(file)
        quantizing.load_quantization_recipe(getattr(recipe, RECIPES[precision])())
        quantizing.quantize().export_model(file, overwrite=True)


if __name__ == "__main__":
    serve(handle)
