"""A made text, and run documents of tiny models on it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

NOUNS = ("engine", "river", "lamp", "teacher", "window", "garden", "letter", "machine", "road", "number")
VERBS = ("carries", "follows", "finds", "leaves", "paints", "counts", "opens", "remembers")
ADJECTIVES = ("old", "quiet", "seventh", "green", "patient", "broken", "narrow")
UNDROPPED = dict.fromkeys(("embedding_dropout", "input_dropout", "output_dropout", "weight_dropout"), 0.0)
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {
        "kind": "rnn",
        "embedding_size": 16,
        "hidden_size": 24,
        "num_layers": 2,
        "hidden_dropout": 0.0,
        **UNDROPPED,
    },
    "gru": {"kind": "rnn", "cell": "gru", "embedding_size": 16, **UNDROPPED},
    "ngram": {"kind": "ngram", "order": 3, "held_out_fraction": 0.25},
}


def make_text(num_sentences: int, seed: int = 2) -> str:
    """Return sentences, a line each; the word after an adjective depends on the word before."""
    generator = random.Random(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    lines = [f"the {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} a {pick(NOUNS)} ." for _ in range(num_sentences)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes the texts into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
        for split, count, seed in (("train", 200, 2), ("test", 30, 3)):
            (folder / f"{split}.txt").write_text(make_text(count, seed))
        document = {
            "recipe": "next_word",
            "model": MODELS[name],
            "data": {
                "train": [str(folder / "train.txt")],
                "validation_fraction": 0.1,
                "validation_split": "tail",
                "test": [str(folder / "test.txt")],
                "tokenizer": {"kind": "word", "words": "spaces"},
                "sequence_length": 12,
                "prepared_dir": str(folder / "prepared"),
            }
            | ({} if name == "ngram" else {"context_length": 6}),
            "batch": {"global_size": 8, "micro_size": 2},
            "optimizer": {"learning_rate": 0.02, "weight_decay": 0.1},
        }
        return five_steps(document, changes)

    return make
