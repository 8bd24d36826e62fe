"""A model of a few hundred weights and its data, small enough to train under every plan in a moment."""

import json
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.recipe import Loss

VOCABULARY_SIZE = 23
WIDTH = 12
POSITIONS = 5
IGNORED = -100


class Toy(nn.Module):
    """Odd sizes, so that partitions cut through tensors; vectors and matrices; dropout if asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY_SIZE, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY_SIZE)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.dropout(self.down(torch.tanh(self.up(self.norm(hidden)))))
        return self.head(hidden)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
    """Sum the cross-entropy over the targets that count; `factor` is there to break a step on purpose."""
    logits = model(batch["tokens"]).float()
    targets = batch["targets"].view(-1)
    total = F.cross_entropy(logits.view(-1, VOCABULARY_SIZE), targets, reduction="sum", ignore_index=IGNORED)
    return Loss(total * batch["factor"][0].float(), int((targets != IGNORED).sum()))


def samples(step: int, count: int, ignored_fraction: float = 0.4) -> dict[str, np.ndarray]:
    """Return the global batch of a step [count, POSITIONS]: a rule to learn, and targets that do not count.

    The first samples have all their targets, the last has one: ranks and micro-batches get different numbers.
    """
    random = np.random.default_rng(step)
    tokens = random.integers(0, VOCABULARY_SIZE, (count, POSITIONS))
    targets = (tokens * 7 + 3) % VOCABULARY_SIZE
    ignored = random.random(targets.shape) < ignored_fraction * 2 * np.arange(count)[:, None] / count
    targets[ignored] = IGNORED
    targets[-1, 1:] = IGNORED
    return {"tokens": tokens, "targets": targets, "factor": np.ones(count)}


def make_config(overrides: dict[str, Any]) -> RunConfig:
    """Return a run document of 10 steps with the given sections' keys changed."""
    document: dict[str, Any] = {
        "version": 1,
        "recipe": "toy",
        "batch": {"global_size": 8, "micro_size": 2},
        "parallel": {"zero_stage": 1},
        "precision": {"dtype": "fp32", "initial_scale_power": 8},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "gradient_clipping": 1.0},
        "schedule": {"total_steps": 10, "warmup_steps": 2},
    }
    for section, settings in overrides.items():
        document[section] = {**document.get(section, {}), **settings}
    return RunConfig.model_validate_json(json.dumps(document))
