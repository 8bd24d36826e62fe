"""Questions that are the same everywhere, and run documents of tiny models on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

THINGS = ("rose", "hedge", "lawn", "spade", "oven", "kettle", "desk", "printer", "chair", "knife")
LOOKS = ("dark green", "blue", "old", "Crème", "very loud", "cold and wet", "red", "two-fold")
PLACES = ("in the garden", "near a wall", "under the tall tree", "at home")


def make_squad(num_contexts: int, seed: int = 5) -> dict[str, Any]:
    """Return a document in SQuAD's format: how things are, and where; every third question has no answer."""
    generator = random.Random(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(generator.random() * len(words))]  # random() alone is promised to stay as it is

    paragraphs = []
    for number in range(num_contexts):
        things = sorted(THINGS, key=lambda _: generator.random())
        context, questions = f"Note {number}. ", []
        for thing in things[:3]:
            look, place = pick(LOOKS), pick(PLACES)
            context += f"The {thing} is "
            questions.append((f"How is the {thing}?", look, len(context)))
            context += f"{look} {place}. "
        questions[2] = (f"How is the {things[3]}?", None, None)
        qas = [
            {
                "id": f"{number}/{place}",
                "question": question,
                "is_impossible": text is None,
                "answers": [] if text is None else [{"text": text, "answer_start": start}],
            }
            for place, (question, text, start) in enumerate(questions)
        ]
        paragraphs.append({"context": context.strip(), "qas": qas})
    return {"version": "v2.0", "data": [{"title": "notes", "paragraphs": paragraphs}]}


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes questions into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        source = folder / "questions.json"
        source.write_text(json.dumps(make_squad(60)))
        shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32, "dropout": 0.0}
        document = {
            "recipe": "question_answering",
            "model": {"encoder": shape},
            "data": {
                "train": [str(source)],
                "validation_fraction": 0.2,
                "tokenizer": {"kind": "wordpiece", "vocabulary_size": 150},
                "sequence_length": 32,
                "question_tokens": 10,
                "stride_tokens": 8,
                "prepared_dir": str(folder / "prepared"),
            },
        }
        return five_steps(document, changes)

    return make
