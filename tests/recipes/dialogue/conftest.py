"""Dialogues that are the same everywhere, and run documents of tiny models on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

THINGS = {"bread": "two euros", "milk": "one euro", "tea": "nine euros", "rice": "four euros", "salt": "a euro"}
DAYS = ("today", "on Monday", "at noon")


def make_dialogues(count: int, seed: int = 5) -> list[list[dict[str, str]]]:
    """Return dialogues of one to three turns in a shop; every third begins with a system message."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        messages = [{"role": "system", "content": "You keep a shop."}] if number % 3 == 0 else []
        things = sorted(THINGS, key=lambda _: generator.random())[: 1 + number % 3]
        for thing in things:
            day = DAYS[int(generator.random() * len(DAYS))]  # random() alone is promised to stay as it is
            messages.append({"role": "user", "content": f"How much is the {thing} {day}?"})
            messages.append({"role": "assistant", "content": f"The {thing} is {THINGS[thing]} {day}."})
        found.append(messages)
    return found


def as_lines(dialogues: list[Any]) -> str:
    """Return a .jsonl file's content."""
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues)


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes dialogues into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        source = folder / "dialogues.jsonl"
        source.write_text(as_lines(make_dialogues(150)))
        shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 96}
        document = {
            "recipe": "dialogue",
            "model": {"family": "llama", **shape},
            "data": {
                "train": [str(source)],
                "validation_fraction": 0.2,
                "tokenizer": {"kind": "bpe", "vocabulary_size": 330},
                "sequence_length": 96,
                "prepared_dir": str(folder / "prepared"),
            },
            "batch": {"global_size": 8, "micro_size": 2},
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
            "sample": {"prompts": ["How much is the tea today?"], "max_new_tokens": 24, "temperature": 0.0},
        }
        return five_steps(document, changes)

    return make
