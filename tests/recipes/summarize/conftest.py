"""Documents that are the same everywhere, and run documents of tiny models on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

THINGS = ("rose", "hedge", "lawn", "spade", "oven", "kettle", "desk", "printer", "chair", "knife")
LOOKS = ("green", "blue", "old", "Crème", "loud", "cold", "red", "two-fold")
PLACES = ("in the garden", "near a wall", "under the tall tree", "at home")


def make_rows(count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Return documents of four to seven sentences of which one, anywhere, tells what is found; that is the summary."""
    generator = random.Random(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    rows = []
    for number in range(count):
        sentences = [f"The {pick(THINGS)} is {pick(LOOKS)} {pick(PLACES)}." for _ in range(3 + number % 4)]
        found = f"we found that a {pick(THINGS)} stands {pick(PLACES)}"
        sentences.insert(int(generator.random() * (len(sentences) + 1)), f"In all, {found}.")
        document: Any = sentences if number % 2 else " ".join(sentences)
        summary: Any = [found, "a thing was found"] if number % 3 else found
        rows.append({"id": number, "document": document, "summary": summary})
    return rows


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes documents into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        source = folder / "documents.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in make_rows(120)))
        shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 48, "dropout": 0.0}
        document = {
            "recipe": "summarize",
            "model": {"backbone": "encoder", "encoder": shape},
            "data": {
                "train": [str(source)],
                "validation_fraction": 0.2,
                "tokenizer": {"kind": "wordpiece", "vocabulary_size": 150},
                "sequence_length": 48,
                "oracle_sentences": 1,
                "prepared_dir": str(folder / "prepared"),
            },
            "summary": {"sentences": 1},
        }
        return five_steps(document, changes)

    return make
