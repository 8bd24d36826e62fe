"""A folder's model as exporters trace it, and how an exported one compares with it.

Runs in the exporters' own environments: needs torch, transformers, numpy and the standard library.
"""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import nn

from bigbatch.tools.engines.rows import Call, run_rows

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
PARITY_ROWS = 4


class Traced(nn.Module):
    """A transformers model that takes tensors in order, of 32-bit integers too, and gives a tuple."""

    def __init__(self, model: Any, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model on inputs in the order of `inputs`."""
        found = self.model(**dict(zip(self.inputs, arrays, strict=True)))
        return tuple(found[name] for name in self.outputs)


class Opened(NamedTuple):
    """A model to export, and what goes in and comes out."""

    model: Traced
    layout: dict[str, Any]


def open_traced(folder: str, lengths: list[int], max_length: int) -> Opened:
    """Open a folder in float32, in the class that its config.json names; see mobile.export for the lengths."""
    settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, settings["architectures"][0])
    further = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    model = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **further)
    known = inspect.signature(model.forward).parameters
    names = ["pixel_values"] if "pixel_values" in known else ["input_ids", "attention_mask", "token_type_ids"]
    inputs = [name for name in names if name in known]
    layout = {"inputs": inputs, "lengths": lengths, "min_length": 2, "max_length": max_length}
    traced = Traced(model.eval(), inputs, [])
    with torch.no_grad():
        found = [model(**dict(zip(inputs, example(layout, settings, length), strict=True))) for length in (4, 6)]
    traced.outputs = [name for name in OUTPUTS if name in found[0]]
    shapes = [[one[name].shape for one in found] for name in traced.outputs]
    layout["outputs"] = [
        {"name": name, "by_token": short != long} for name, (short, long) in zip(traced.outputs, shapes, strict=True)
    ]
    return Opened(traced, layout | {"settings": settings})


def example(
    layout: dict[str, Any], settings: dict[str, Any], length: int, dtype: Any = torch.long
) -> list[torch.Tensor]:
    """Return inputs of one row: random tokens, all of them there, or a random image."""
    generator = torch.Generator().manual_seed(length)
    if layout["inputs"] == ["pixel_values"]:
        size = settings["image_size"]
        return [torch.randn(1, settings.get("num_channels", 3), size, size, generator=generator)]
    tokens = torch.randint(settings["vocab_size"], (1, length), generator=generator)
    arrays = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    return [arrays[name].to(dtype) for name in layout["inputs"]]


def compare(opened: Opened, call: Call) -> dict[str, Any]:
    """Compare outputs with those of transformers on rows of several lengths, padded to the longest, or on images."""
    layout, settings = opened.layout, opened.layout["settings"]
    longest = layout["max_length"]
    lengths = [longest * (row + 1) // PARITY_ROWS or row for row in range(PARITY_ROWS)]  # of images only the seeds
    differences, sizes, agrees = [], [], []
    for length in lengths:
        inputs = example(layout, settings, length)
        with torch.no_grad():
            expected = [array.numpy() for array in opened.model(*inputs)]
        padded = {
            name: array.numpy() if array.dim() > 2 else np.pad(array.numpy(), ((0, 0), (0, longest - length)))
            for name, array in zip(layout["inputs"], inputs, strict=True)
        }
        found = run_rows(call, layout, padded)
        for one, output in zip(expected, layout["outputs"], strict=True):
            other = found[output["name"]]
            other = other[:, :length] if output["by_token"] else other
            differences.append(np.abs(one - other).max())
            sizes.append(np.abs(one).max())
            agrees.append(one.argmax(-1).ravel() == other.argmax(-1).ravel())
    return {
        "largest_difference": float(np.max(differences)),
        "largest_output": float(np.max(sizes)),
        "agreement": float(np.concatenate(agrees).mean()),
        "num_inputs": len(lengths),
    }
