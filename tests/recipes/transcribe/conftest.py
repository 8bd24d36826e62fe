"""Recordings that are the same everywhere, and run documents of tiny models on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tiny_documents import five_steps

RATE = 4000
HERTZ = {"a": 400.0, "b": 800.0, "c": 1500.0}


def play(text: str, seed: int, rate: int = RATE) -> np.ndarray:
    """Return samples int16 of a text: a tone of 50 ms for each letter, then as long a pause."""
    times = np.arange(rate // 20) / rate
    parts = [np.concatenate([0.3 * np.sin(2 * np.pi * HERTZ[letter] * times), 0 * times]) for letter in text]
    noise = np.random.default_rng(seed).normal(0, 0.01, len(text) * len(parts[0]))
    return ((np.concatenate(parts) + noise) * 2**15).round().astype(np.int16)


def make_texts(count: int, seed: int = 5) -> list[str]:
    """Return texts of one to three letters."""
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(HERTZ), generator.integers(1, 4))) for _ in range(count)]


def write_folder(folder: Path, count: int) -> None:
    """Write recordings 0_abc.wav, 1_b.wav, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(make_texts(count)):
        soundfile.write(folder / f"{number}_{text}.wav", play(text, number), RATE)


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes recordings into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        write_folder(folder / "letters", 90)
        convolution = {"channels": 4, "frames": 3, "frame_stride": 2, "band_stride": 2}
        document = {
            "recipe": "transcribe",
            "model": {"num_mels": 12, "convolutions": [convolution], "cell": "gru", "num_layers": 1, "hidden_size": 24},
            "data": {
                "train": [{"path": str(folder / "letters"), "pattern": "[0-9]+_(?P<text>[a-z]+)"}],
                "validation_fraction": 0.2,
                "sample_rate": RATE,
                "prepared_dir": str(folder / "prepared"),
            },
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
        }
        return five_steps(document, changes)

    return make
