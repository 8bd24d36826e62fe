"""Texts that are the same everywhere, and a run document of BERT pretraining on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

NOUNS = ("engine", "river", "lamp", "teacher", "window", "garden", "letter", "machine", "road", "number")
VERBS = ("carries", "follows", "finds", "leaves", "paints", "counts", "opens", "remembers")
ADJECTIVES = ("old", "quiet", "seventh", "green", "patient", "broken", "narrow")


@pytest.fixture(scope="session")
def made_documents() -> list[str]:
    """Return 150 short documents of one to four sentences, the same ones everywhere."""
    generator = random.Random(4)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    def sentence() -> str:
        return f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} a {pick(NOUNS)}."

    return [" ".join(sentence() for _ in range(1 + int(generator.random() * 4))) for _ in range(150)]


@pytest.fixture(scope="session")
def make_document(made_documents: list[str]) -> Callable[..., dict[str, Any]]:
    """Give a function that writes the texts into a folder and returns a run document of a tiny BERT on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": text}) + "\n" for text in made_documents))
        document = {
            "recipe": "bert_pretrain",
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 40, "dropout": 0.0},
            "data": {
                "train": [str(text)],
                "validation_fraction": 0.2,
                "tokenizer": {"kind": "wordpiece", "vocabulary_size": 90},
                "sequence_length": 32,
                "packing": "isolate",
                "prepared_dir": str(folder / "prepared"),
            },
            "batch": {"global_size": 8, "micro_size": 2},
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
        }
        return five_steps(document, changes)

    return make
