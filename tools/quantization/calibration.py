"""What a model of transformers is called with on training samples, as the recipe calls it.

W windows, the longest of L tokens.
"""

import inspect
from pathlib import Path
from typing import Any

import torch

from bigbatch.tools import ladder
from bigbatch.tools.engines.transformers_engine import TransformersSession
from bigbatch.tools.quantization.layers import Inputs

OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


class Recorder:
    """A session that remembers what it is called with."""

    def __init__(self, model: Any) -> None:
        self.session = TransformersSession(model)
        self.known = inspect.signature(model.forward).parameters
        self.inputs: list[Inputs] = []

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model."""
        self.inputs.append({name: array for name, array in inputs.items() if name in self.known})
        return self.session(**inputs)


def calibration_inputs(
    source: ladder.Source, model: Any, num_samples: int, seed: int, run: Path | None = None
) -> list[Inputs]:
    """Return the model's inputs on a seeded choice of training samples, a window each and no padding."""
    recorder = Recorder(model)
    stand_in = source.recipe.foreign(source.config, source.facts, recorder).eval()
    with torch.inference_mode():
        for sample in ladder.calibration(source, num_samples, seed, run):
            source.recipe.loss(stand_in, sample)
    return [window for inputs in recorder.inputs for window in windows(inputs)]


def windows(inputs: Inputs) -> list[Inputs]:
    """Take windows [W, L] apart, each [1, its own length]."""
    mask = inputs.get("attention_mask")
    found = []
    for row in range(len(next(iter(inputs.values())))):
        one = {name: array[row : row + 1] for name, array in inputs.items()}
        if mask is not None:
            length = int(mask[row].sum())
            one = {name: array[:, :length] if name in OF_TOKENS else array for name, array in one.items()}
        found.append({name: array.clone() for name, array in one.items()})
    return found
