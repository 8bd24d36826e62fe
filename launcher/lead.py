"""How long ahead of its time limit a job has to begin to save. Standard library alone."""

import json
from pathlib import Path
from typing import Any

TAIL_BYTES = 2**20
OWN_SECONDS = 15.0  # to notice, to tell all ranks, and to go back into the queue


def lead_seconds(run_dir: Path, save_seconds: float) -> float:
    """Return the seconds that an orderly end takes: twice the longest save, a step, an evaluation, and our own part.

    Measured by this run, as far as metrics.jsonl tells; `save_seconds` counts until a save has been measured.
    """
    save, step, evaluation = 0.0, 0.0, 0.0
    for line in _last_lines(run_dir / "metrics.jsonl"):
        seconds = line.get("seconds") or 0.0
        if line.get("kind") == "train":
            step = max(step, seconds / max(1, line.get("steps") or 1))
        elif line.get("kind") == "evaluation":
            evaluation = max(evaluation, seconds)
        elif line.get("event") == "saved":
            save = max(save, seconds, line.get("whole_seconds") or 0.0)
    return 2 * (save or save_seconds) + step + evaluation + OWN_SECONDS


def _last_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()[size > TAIL_BYTES :]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # half of one, at the end
            continue
    return found
