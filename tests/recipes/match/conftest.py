"""Sentences that are the same everywhere, and run documents of tiny models on them."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

THINGS = ("rose", "hedge", "lawn", "spade", "oven", "kettle", "desk", "printer", "chair", "knife")
LOOKS = ("green", "blue", "old", "Crème", "loud", "cold", "red", "two-fold")
PLACES = ("garden", "wall", "tree", "house", "river", "hill", "road")
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32, "dropout": 0.0}


def make_pairs(count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Return sentences on things, once short and once long; a score tells how much both have in common."""
    generator = random.Random(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    rows = []
    for number in range(count):
        look, thing, place = pick(LOOKS), pick(THINGS), pick(PLACES)
        said = [part if generator.random() < 0.7 else pick(LOOKS) for part in (look, thing, place)]
        same = sum(one == other for one, other in zip(said, (look, thing, place), strict=True))
        rows.append(
            {
                "left": f"{look} {thing}, {place} {number}",
                "right": f"Near the {place} {number} there is a {thing}; it is {look}.",
                "said": f"The {said[1]} at the {said[2]} is {said[0]}.",
                "score": same,
            }
        )
    return rows


def put_lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def write_lines() -> Callable[..., str]:
    """Give a function that writes objects as JSON lines and returns the file's path."""
    return put_lines


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes pairs into a folder and returns a run document of a tiny bi-encoder on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        document = {
            "recipe": "match",
            "model": {"encoder": SHAPE},
            "data": {
                "train": [put_lines(folder / "pairs.jsonl", make_pairs(120))],
                "validation_fraction": 0.2,
                "tokenizer": {"kind": "wordpiece", "vocabulary_size": 150},
                "sequence_length": 32,
                "group_size": 4,
                "prepared_dir": str(folder / "prepared"),
            },
            "batch": {"global_size": 4, "micro_size": 1},
        }
        return five_steps(document, changes)

    return make


SCORED = {"right_column": "said", "score_column": "score", "score_range": [0.0, 3.0], "group_size": 1}


@pytest.fixture(scope="session")
def make_cross(make_document) -> Callable[..., dict[str, Any]]:
    """Give the same function for a cross-encoder on pairs with scores."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        cross = {"model": {"encoder": SHAPE, "kind": "cross"}, "objective": {"loss": "binary"}, "data": SCORED}
        cross |= {"batch": {"global_size": 16, "micro_size": 4}}
        return make_document(
            folder, **{name: cross.get(name, {}) | changes.get(name, {}) for name in {*cross, *changes}}
        )

    return make
