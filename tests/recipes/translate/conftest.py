"""Pairs that are the same everywhere, and run documents of tiny models on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import five_steps

from bigbatch.recipes.core.data.number_words import english, german


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes parallel files into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        numbers = range(1, 400)
        (folder / "numbers.de").write_text("".join(f"{german(number)}\n" for number in numbers))
        (folder / "numbers.en").write_text("".join(f"{english(number)}\n" for number in numbers))
        shape = {"num_encoder_layers": 2, "num_decoder_layers": 2, "hidden_size": 32, "num_heads": 4, "dropout": 0.0}
        document = {
            "recipe": "translate",
            "model": {"shape": {**shape, "feed_forward_size": 64, "max_positions": 48, "initializer_range": 0.1}},
            "data": {
                "train": [{"path": str(folder / "numbers.de"), "target": str(folder / "numbers.en")}],
                "validation_fraction": 0.1,
                "tokenizer": {"kind": "bpe", "vocabulary_size": 300},
                "sequence_length": 40,
                "prepared_dir": str(folder / "prepared"),
            },
            "search": {"num_beams": 3, "max_new_tokens": 20},
            "batch": {"global_size": 8, "micro_size": 4},
        }
        return five_steps(document, changes)

    return make
