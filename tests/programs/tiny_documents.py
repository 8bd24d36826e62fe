"""What the run documents of tiny models have in common."""

from typing import Any


def five_steps(document: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Complete a document so that it trains five steps in float32, and lay changes over its sections."""
    complete: dict[str, Any] = {
        "version": 1,
        "batch": {"global_size": 16, "micro_size": 4},
        "precision": {"dtype": "fp32"},
        "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.1},
        "schedule": {"name": "constant", "total_steps": 5},
        "report": {"every_steps": 1, "tensorboard": False},
        "seed": 3,
        **document,
    }
    return complete | {name: {**complete.get(name, {}), **settings} for name, settings in changes.items()}
