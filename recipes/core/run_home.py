"""Where a run was started from: the relative paths in its documents lead from there, wherever one goes on from."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def describe_home(run_dir: Path) -> dict[str, str]:
    """Return what `enter_home` needs to know later, for environment.json."""
    return {"working_directory": str(Path.cwd()), "run_folder": str(run_dir.absolute())}


def enter_home(path: Path) -> Path:
    """Make the folder that a run was started from the current one; return the path of its folder that is right there.

    `path` is a run folder or one of its checkpoints. The current folder stays where the run folder lies no longer where
    it was, as in a copy of a whole project, and where it says nothing.
    """
    for run_dir in (path, path.absolute().parent.parent):
        record = _read_record(run_dir / "environment.json")
        home, recorded = Path(record.get("working_directory", "")), Path(record.get("run_folder", ""))
        if not record.get("run_folder") or not home.is_dir() or home.samefile(Path.cwd()):
            continue
        if recorded.is_dir() and recorded.samefile(run_dir):
            path = path.absolute()
            os.chdir(home)
            print(f"working in {home}, where this run was started", file=sys.stderr, flush=True)
            return path
    return path


def recorded_path(checkpoint: Path, path: str) -> Path:
    """Return where a path that stands in a checkpoint's run leads, seen from the current folder."""
    record = _read_record(checkpoint.absolute().parents[1] / "environment.json")
    below = Path(record.get("working_directory", "")) / path
    return below if below.exists() else Path(path)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
