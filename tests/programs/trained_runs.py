"""What the tests of recipes ask of the runs that train_documents.py trains."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bigbatch.recipes.core import checkpoint
from bigbatch.recipes.core import recipe as recipes
from bigbatch.recipes.core.data.sampler import Order, sample_order

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


def first(run_dir: Path) -> tuple[Any, recipes.DataSplits, torch.nn.Module]:
    """Open a run's data, and build its model with the weights that it began with."""
    document = (run_dir / "run.json").read_text()
    name = json.loads(document)["recipe"]
    config, recipe = recipes.find_config(name).model_validate_json(document), recipes.find(name)
    data = recipe.open_data(config)
    torch.manual_seed(config.seed)
    return config, data, recipe.build_model(config, data.facts)


def as_transformers(config: Any, data: recipes.DataSplits, model: torch.nn.Module, build: Callable[..., Any]) -> Any:
    """Return transformers' own model, which `build` makes of its configuration, with the same weights."""
    import transformers

    export = recipes.find(config.recipe).hugging_face(config, data.facts)
    theirs = build(transformers.AutoConfig.for_model(**export.config))
    parameters = dict(model.named_parameters())
    pieces = [(piece, parameters[name].detach()) for name, found in export.tensors.items() for piece in found]
    missing = theirs.load_state_dict({piece.name: p[piece.start : piece.stop].clone() for piece, p in pieces}, False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    return theirs


def plain_steps(
    model: torch.nn.Module, config: Any, data: recipes.DataSplits, losses_of: Callable[[Order], Iterator[torch.Tensor]]
) -> list[float]:
    """Train a model as a run does, with no more than torch; return the loss of each step.

    `losses_of` yields what adds up to the mean loss of a step's samples.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, config.optimizer.learning_rate, config.optimizer.betas)
    size, found = config.batch.global_size, []
    for step in range(STEPS):
        total = 0.0
        for loss in losses_of(sample_order(config.seed, data.train.num_samples, step * size, size)):
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


def single_samples(data: recipes.DataSplits, order: Order) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of a sample each."""
    for number in range(len(order.ids)):
        batch = data.train.batch(order.ids[number : number + 1], order.epochs[number : number + 1])
        yield {name: torch.from_numpy(array) for name, array in batch.items()}
