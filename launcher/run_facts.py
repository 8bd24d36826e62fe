"""What a run folder itself tells of its run, whoever runs it and wherever: no Slurm, no torch."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.launcher.run_dir import RunDir
from bigbatch.recipes.core.errors import UserError, one_line

JOB_FILE = "job.json"
EVENTS_FILE = "job_events.jsonl"
CANCEL_FILE = "cancel.json"
BEAT_SECONDS = 60.0  # a rank writes one every few seconds
TAIL_BYTES = 65536  # a run of a million steps is told by its last lines


class RunFacts(NamedTuple):
    """A run as its folder tells it; None is what it does not tell."""

    path: Path
    job: dict[str, Any]
    """job.json, as `submit` wrote it; empty for a run of this host."""
    events: list[dict[str, Any]]
    """Of job_events.jsonl."""
    cancelled_jobs: list[str]
    """Those that `cancel` has ended."""
    holder: str | None
    """The process that trains in the folder, where that can be seen from here."""
    phase: str | None
    """What rank 0 does now: data, model, restore, step, evaluate or save."""
    idle_seconds: float | None
    """For how long it has not moved on."""
    step: int | None
    last_step: int | None
    """That the run is to reach."""
    loss: float | None
    tokens_per_second: float | None
    samples_per_second: float | None
    checkpoint_step: int | None
    checkpoint_time: float | None
    """Seconds since 1970."""
    failure: str | None

    @property
    def is_done(self) -> bool:
        """Tell whether all steps are done."""
        return self.step is not None and self.last_step is not None and self.step >= self.last_step


def runs_under(paths: list[Path]) -> list[Path]:
    """Return the run folders that are meant: each path itself, or all of those in it and in the sweeps in it.

    Raises UserError for a path that is neither.
    """
    found: list[Path] = []
    for path in paths:
        runs = list(_runs_in(path))
        if not runs:
            what = "holds no run folder" if path.is_dir() else "there is no such folder"
            raise UserError(str(path), f"{what}: a folder with a run.json, made by `bigbatch train` or `submit`")
        found += runs
    return found


def read_facts(path: Path) -> RunFacts:
    """Read what a run folder tells."""
    run_dir = RunDir(path)
    schedule = _read_object(run_dir.run).get("schedule", {})
    step, figures = _progress(path / "metrics.jsonl")
    beat = _fresh_beat(path / "log" / "heartbeat_rank0.json")
    checkpoint_step, checkpoint_time = _newest_checkpoint(run_dir.checkpoints)
    return RunFacts(
        path,
        _read_object(path / JOB_FILE),
        read_lines(path / EVENTS_FILE),
        _read_object(path / CANCEL_FILE).get("job_ids", []),
        _holder(run_dir.lock),
        beat.get("phase"),
        beat.get("idle_seconds"),
        max(filter(None, (step, beat.get("step"))), default=step),  # a beat is seconds old, a report steps
        schedule.get("stop_step") or schedule.get("total_steps"),
        figures.get("loss"),
        figures.get("tokens_per_second"),
        figures.get("samples_per_second"),
        checkpoint_step,
        checkpoint_time,
        _failure(path / "failure.json"),
    )


def read_lines(path: Path, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, those in its last bytes if so wanted; a torn line is left out."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - tail_bytes) if tail_bytes else 0
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return [line for line in map(_parsed, lines[bool(start) :]) if line]


def _runs_in(path: Path, depth: int = 2) -> Iterator[Path]:
    if RunDir(path).exists():
        yield path
    elif depth and path.is_dir():
        for below in sorted(path.iterdir(), key=lambda own: (own.name.isdecimal() and len(own.name), own.name)):
            yield from _runs_in(below, depth - 1)  # members of a sweep by their numbers


def _progress(path: Path) -> tuple[int | None, dict[str, Any]]:
    """Return the step that was reported last, and the figures of the last report."""
    step, figures = None, {}
    for line in read_lines(path, TAIL_BYTES):
        if line.get("kind") == "train":
            step, figures = line.get("step"), line
        elif "session" in line:  # of steps after this one, an earlier session's reports no longer count
            step = line.get("step")
    return step, figures


def _fresh_beat(path: Path) -> dict[str, Any]:
    """Return rank 0's last sign of life, none that is old: clocks of hosts may differ by seconds."""
    try:
        is_fresh = abs(time.time() - path.stat().st_mtime) < BEAT_SECONDS
    except OSError:
        return {}
    beat = _read_object(path) if is_fresh else {}
    return beat if beat.get("state") == "running" else {}


def _newest_checkpoint(folder: Path) -> tuple[int | None, float | None]:
    for manifest in sorted(folder.glob("step_*/manifest.json"), reverse=True):
        try:
            return int(manifest.parent.name.removeprefix("step_")), manifest.stat().st_mtime
        except (OSError, ValueError):  # retired this moment; or somebody's own folder
            continue
    return None, None


def _holder(lock: Path) -> str | None:
    """Return who has the folder, from the kernel's list: trying the lock could keep a run from taking it right then."""
    record = _read_object(lock)
    try:
        inode, locks = lock.stat().st_ino, Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for fields in map(str.split, locks):
        if fields[4] == str(record.get("pid")) and fields[5].endswith(f":{inode}"):
            return f"process {record['pid']} on {record.get('host')}"
    return None


def _failure(path: Path) -> str | None:
    digest = _read_object(path)
    if not digest:
        return None
    how = digest.get("exception") or digest.get("signal") or f"exit status {digest.get('exit_status')}"
    return one_line(f"rank {digest.get('rank')} on {digest.get('host')}: {how}")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes()) or {}
    except OSError:
        return {}


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
