"""What the tests of recipes ask of the runs that train_documents.py trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core import recipe as recipes

STEPS = 5
STAGES, RANKS = (0, 1, 2, 3), (1, 2)
EVERY_PLAN = tuple((ranks, stage, None) for ranks in RANKS for stage in STAGES)


class Plans:
    """Documents, and the plans (ranks, ZeRO stage, stop step) that each is trained under."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.plans: list[tuple[Any, ...]] = []

    def add(self, name: str, document: dict[str, Any], *plans: tuple[int, int, int | None]) -> None:
        """Let a document be trained under these plans; NAME_RANKS_STAGE become their run folders."""
        (self.out / f"{name}.json").write_text(json.dumps(document))
        self.plans.extend((name, *plan) for plan in plans)

    def train(self, run_program: Callable[..., str]) -> Path:
        """Train all in one start; return the folder that holds the runs."""
        (self.out / "plans.json").write_text(json.dumps(self.plans))
        run_program("train_documents.py", self.out)
        return self.out


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return what a run has reported of a kind."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(out: Path, name: str, ranks: int, stage: int, steps: int = STEPS) -> list[float]:
    """Return the losses of a run's first steps, each of which was reported once."""
    found = rows(out / f"{name}_{ranks}_{stage}", "train")[:steps]
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    return [row["loss"] for row in found]


def opened(run_dir: Path) -> tuple[Any, recipes.DataSplits, torch.nn.Module]:
    """Open a run's data and its best model, else its newest."""
    document = (run_dir / "run.json").read_text()
    name = json.loads(document)["recipe"]
    config, recipe = recipes.find_config(name).model_validate_json(document), recipes.find(name)
    data = recipe.open_data(config)
    model = recipe.build_model(config, data.facts, initialize=False)
    checkpoint.load_weights(run_dir, model)
    return config, data, model.eval()
