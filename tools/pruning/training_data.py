"""Losses and gradients of a model on a seeded choice of its training samples."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from bigbatch.recipes.core.recipe import Batch
from bigbatch.tools.measure import Options, open_samples

SAMPLES_PER_BATCH = 8


def training_batches(source: Any, num_batches: int, seed: int, run: str | None) -> Iterator[Batch]:
    """Yield batches of training samples; where there are too few, they come again."""
    _, _, samples = open_samples(source, Options(split="train", run=run))
    generator, order = np.random.default_rng(seed), np.empty(0, np.int64)
    for number in range(num_batches):
        while len(order) < SAMPLES_PER_BATCH:
            order = np.concatenate([order, generator.permutation(samples.num_samples)])
        own, order = np.sort(order[:SAMPLES_PER_BATCH]), order[SAMPLES_PER_BATCH:]
        batch = samples.batch(own, np.full_like(own, number))
        yield {name: torch.from_numpy(array) for name, array in batch.items()}


def compute_gradients(recipe: Any, model: nn.Module, batch: Batch) -> None:
    """Fill `grad` of a model in evaluation mode with the gradient of a batch's mean loss."""
    model.zero_grad()
    loss = recipe.loss(model, batch)
    (loss.sum / max(1, loss.num_targets)).backward()


def mean_loss(recipe: Any, model: nn.Module, batches: list[Batch]) -> float:
    """Return the mean loss over the targets of batches."""
    with torch.no_grad():
        losses = [recipe.loss(model, batch) for batch in batches]
    return sum(float(loss.sum) for loss in losses) / max(1, sum(loss.num_targets for loss in losses))
