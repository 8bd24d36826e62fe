"""What each rank leaves in the run folder for the others: where it is, and the digest of the first failure.

Files, not the process group: they outlive a killed rank, speak for a stopped one, and need no peer to answer.
"""

import contextlib
import json
import os
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

LAUNCH_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "TORCHELASTIC_RUN_ID",
)
USUAL_BYTES = 1024
PASSING_PREFIX = "bigbatch-"  # of folders that last as long as a command
GONE = "ended without a word: it was killed, or crashed"


class Heartbeat(NamedTuple):
    """A rank as it was when its file was last written."""

    launch: str
    rank: int
    host: str
    pid: int
    beat_seconds: float
    """From one beat to the next."""
    count: int
    """Beats so far: stands still when the process does."""
    phase: str | None
    step: int | None
    idle_seconds: float
    """Since it last moved on."""
    state: str = "running"
    """running; hung: it has given up; failed or done: it has left, and said so; silent: others see no beat of it."""
    collectives: int = 0
    """Entered so far, over all process groups; this and what follows are known of a rank that is hung."""
    in_collective: bool = False
    stack: Sequence[str] = ()
    """Of the main thread, innermost first."""


def launch_id() -> str:
    """Return what the ranks of one launch have in common in their environment, and those of another launch have not."""
    return "|".join(os.environ.get(name, "") for name in LAUNCH_VARIABLES)


def this_rank() -> int:
    """Return this process's rank."""
    return int(os.environ.get("RANK", "0"))


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    """Return the file of a rank's heartbeat."""
    return run_dir / "log" / f"heartbeat_rank{rank}.json"


def write_heartbeat(run_dir: Path, beat: Heartbeat) -> bool:
    """Write a heartbeat; return whether the disk took it: a full one must not end a run."""
    content = json.dumps(beat._asdict()).ljust(USUAL_BYTES) + "\n"
    try:
        # Over itself, by one write of the same length as the last: a kill leaves one or the other, never an empty file.
        # Not by rename: over NFS, the name may lead to the old file for a minute.
        file = os.open(heartbeat_path(run_dir, beat.rank), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(file, content.encode())
            os.ftruncate(file, len(content))
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def read_heartbeat(run_dir: Path, rank: int) -> Heartbeat | None:
    """Return a rank's last heartbeat; None if it has not begun, or its file is being written right now."""
    try:
        record = json.loads(heartbeat_path(run_dir, rank).read_text())
        return Heartbeat(**record) if record["launch"] == launch_id() else None
    except (OSError, ValueError):
        return None


def is_gone(beat: Heartbeat) -> bool:
    """Tell whether the rank has ended without a word: its process is no longer on this host."""
    if beat.state != "running" or beat.host != socket.gethostname():
        return False
    try:
        os.kill(beat.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def identity(beat: Heartbeat) -> dict[str, Any]:
    """Return the part of a digest that says which process, where and in what."""
    return {"rank": beat.rank, "host": beat.host, "pid": beat.pid, "phase": beat.phase, "step": beat.step}


def in_step_with(beat: Heartbeat, phase: str | None, step: int | None) -> Heartbeat:
    """Return a rank's last beat brought forward to where a peer is: it was there, or just before, when it ended."""
    is_old = step is not None and (beat.step is None or beat.step < step)
    return beat._replace(phase=phase, step=step) if is_old else beat


def resume_advice(run_dir: Path) -> str:
    """Say how to go on."""
    if run_dir.name.startswith(PASSING_PREFIX):
        return "start the same command again"
    command = f"bigbatch train {shlex.quote(str(run_dir))}"
    return f"start the same command again, or `{command}`: it goes on from the last checkpoint"


def death_digest(run_dir: Path, dead: Heartbeat, how: str, noticed_by: int, phase: dict[str, Any]) -> dict[str, Any]:
    """Return the digest that a peer writes for a rank that cannot; `phase` is the peer's, which is in step with it."""
    return {
        **identity(in_step_with(dead, phase.get("phase"), phase.get("step"))),
        "exception": how,
        "noticed_by": noticed_by,
        "what_to_do": f"look on {dead.host} whether the kernel ended it for lack of memory "
        f"(dmesg | grep -i 'killed process'): then lower batch.micro_size; {resume_advice(run_dir)}",
    }


def find_dead(run_dir: Path) -> Heartbeat | None:
    """Look for the rank whose end broke a connection; None when failure.json tells of it, or none is found in time.

    On this host it is seen at once, on another when it has missed two beats.
    """
    peers = [rank for rank in range(int(os.environ.get("WORLD_SIZE", "1"))) if rank != this_rank()]
    first = [beat for rank in peers if (beat := read_heartbeat(run_dir, rank)) and beat.state == "running"]
    remote = [beat for beat in first if beat.host != socket.gethostname()]
    # A busy host may hold up a beat for a second or more.
    wait_seconds = max((3 * max(2.0, beat.beat_seconds) for beat in remote), default=2.0)
    deadline = time.monotonic() + wait_seconds
    while peers and read_failure(run_dir) is None:
        is_late = time.monotonic() > deadline
        for rank in peers:
            beat = read_heartbeat(run_dir, rank)
            if beat and (is_gone(beat) or (is_late and beat in remote)):
                return beat
        if is_late:
            break
        time.sleep(0.1 if not remote else 1.0)
    return None


def read_failure(run_dir: Path) -> dict[str, Any] | None:
    """Return the digest that a rank of this launch has written, if one has."""
    with contextlib.suppress(OSError, ValueError):
        digest = json.loads((run_dir / "failure.json").read_text())
        return digest if digest.get("launch") == launch_id() else None
    return None


def write_failure(run_dir: Path, digest: dict[str, Any]) -> OSError | None:
    """Write failure.json unless a rank of this launch already has: the first failure is the cause, others its echo.

    Return why it could not be written: a full disk is likely the failure itself.
    """
    path = run_dir / "failure.json"
    content = json.dumps({**digest, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "launch": launch_id()}, indent=2)
    try:
        remove_earlier_failure(run_dir)
        with path.open("x") as file:
            file.write(content + "\n")
    except FileExistsError:
        return None
    except OSError as error:
        return error
    return None


def remove_earlier_failure(run_dir: Path) -> None:
    """Remove the digest of an earlier launch in this folder."""
    path = run_dir / "failure.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        if json.loads(path.read_text()).get("launch") != launch_id():
            path.unlink()
