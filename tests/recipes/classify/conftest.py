"""Rows that are the same everywhere, and run documents of tiny classifiers on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

THEMES = {
    "garden": ("rose", "hedge", "lawn", "seed", "spade", "apple"),
    "kitchen": ("oven", "spoon", "bread", "kettle", "butter", "knife"),
    "office": ("desk", "printer", "meeting", "stapler", "report", "chair"),
}
FILLERS = ("the", "a", "old", "green", "near", "under", "carries", "finds", "leaves", "two", "quiet", "behind")
BACKBONES: dict[str, dict[str, Any]] = {
    "encoder": {
        "backbone": "encoder",
        "encoder": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32, "dropout": 0.0},
        "head_dropout": 0.0,
    },
    "attention": {
        "backbone": "attention",
        "embedding_size": 32,
        "num_heads": 4,
        "num_layers": 1,
        "dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    "rnn": {"backbone": "rnn", "embedding_size": 16, "hidden_size": 16, "dropout": 0.0, "embedding_dropout": 0.0},
}


def make_rows(count: int, seed: int = 5) -> list[dict[str, str]]:
    """Return texts of 3 to 14 words, two of them of the label's theme."""
    generator = random.Random(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    rows = []
    for _ in range(count):
        label = pick(tuple(THEMES))
        words = [pick(FILLERS) for _ in range(1 + int(generator.random() * 12))]
        for _ in range(2):
            words.insert(int(generator.random() * len(words)), pick(THEMES[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes the rows into a folder and returns a run document of a tiny classifier on them."""

    def make(folder: Path, backbone: str = "encoder", **changes: dict[str, Any]) -> dict[str, Any]:
        table = folder / "rows.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in make_rows(160)))
        document = {
            "recipe": "classify",
            "model": BACKBONES[backbone],
            "data": {
                "train": [str(table)],
                "validation_fraction": 0.17,
                "test_fraction": 0.1,
                "tokenizer": {"kind": "wordpiece", "vocabulary_size": 120},
                "sequence_length": 24,
                "prepared_dir": str(folder / "prepared"),
            },
        }
        return five_steps(document, changes)

    return make
