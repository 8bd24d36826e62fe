"""Sentences that are the same everywhere, and run documents of tiny models on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

PEOPLE, PLACES = ("Ada", "Bo Lin", "Cyd", "Émile", "Fay Roe"), ("Bern", "New Ulm", "Oslo", "Lima")
VERBS = {"lives in": "Home(e1,e2)", "left": "Other", "is the birthplace of": "Birth(e2,e1)"}
MODELS: dict[str, dict[str, Any]] = {
    "encoder": {
        "backbone": "encoder",
        "encoder": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32, "dropout": 0.0},
        "head_dropout": 0.0,
    },
    "words": {
        "backbone": "words",
        "hidden_size": 12,
        "embedding_size": 16,
        "character_size": 8,
        "character_filters": 8,
        "feature_buckets": 512,
        "dropout": 0.0,
    },
}


def make_sentences(count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Return who is where: text, entities, and the relation of both, the person first."""
    generator = random.Random(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    rows = []
    for number in range(count):
        person, place, verb = pick(PEOPLE), pick(PLACES), pick(tuple(VERBS))
        first, second = (place, person) if "of" in verb.split() else (person, place)
        text = f"In {number + 1800} {first} {verb} {second} again."
        spans = [(text.index(name), name, kind) for name, kind in ((person, "person"), (place, "place"))]
        entities = [{"start": start, "end": start + len(name), "type": kind} for start, name, kind in spans]
        marked = text.replace(first, f"<e1>{first}</e1>").replace(second, f"<e2>{second}</e2>")
        rows.append({"text": text, "entities": entities, "marked": marked, "relation": VERBS[verb]})
    return rows


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes the sentences into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, task: str, backbone: str = "words", **changes: dict[str, Any]) -> dict[str, Any]:
        source = folder / "sentences.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in make_sentences(160)))
        kind = "wordpiece" if backbone == "encoder" else "word"
        document = {
            "recipe": "extract",
            "model": MODELS[backbone] | ({"position_size": 4} if (task, backbone) == ("relations", "words") else {}),
            "data": {
                "task": task,
                "train": [str(source)],
                "validation_fraction": 0.2,
                "tokenizer": {"kind": kind, "vocabulary_size": 150},
                "sequence_length": 32 if backbone == "encoder" else 6 if task == "entities" else 8,
                "prepared_dir": str(folder / "prepared"),
                **({"text_column": "marked"} if task == "relations" else {}),
            },
            # Of a weight whose gradient is next to nothing Adam takes the sign, which the order of a sum may decide.
            "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.1, "epsilon": 1e-4},
        }
        return five_steps(document, changes)

    return make
