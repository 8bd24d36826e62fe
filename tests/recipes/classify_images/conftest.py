"""Images that are the same everywhere, and run documents of tiny models on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_documents import five_steps

LABELS = ("low", "middle", "top")


def make_images(count: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [count, 8, 8] of a bright spot low, in the middle or high, and their labels' numbers."""
    generator = np.random.default_rng(seed)
    images, labels = generator.integers(0, 100, (count, 8, 8)), np.arange(count) % 3
    for image, label in zip(images, labels, strict=True):
        row, column = 6 - 3 * label, generator.integers(0, 6)
        image[row : row + 2, column : column + 3] += 150
    return images.astype(np.uint8), labels


@pytest.fixture(scope="session")
def make_document() -> Callable[..., dict[str, Any]]:
    """Give a function that writes the images into a folder and returns a run document of a tiny model on them."""

    def make(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
        images, labels = make_images(150)
        np.savez(folder / "spots.npz", image=images, label=np.array(LABELS)[labels])
        document = {
            "recipe": "classify_images",
            "model": {"patch_size": 4, "num_layers": 2, "hidden_size": 32, "num_heads": 4},
            "data": {
                "train": [{"path": str(folder / "spots.npz")}],
                "validation_fraction": 0.2,
                "image_size": 8,
                "channels": "grey",
                "prepared_dir": str(folder / "prepared"),
            },
        }
        return five_steps(document, changes)

    return make
