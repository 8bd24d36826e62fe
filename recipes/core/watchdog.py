"""A thread in every rank that ends it when the run cannot go on: a rank stands still, has failed, or is dead.

A collective waits for a rank that is gone: with gloo until the connection breaks, with NCCL without end. So each rank
writes a heartbeat every few seconds and looks at its neighbour's: a ring, so that the work does not grow with the
ranks. What one finds, it writes to failure.json, where the others see it. It ends by os._exit, which no collective
blocks.
"""

import contextlib
import faulthandler
import itertools
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import torch.distributed
from torch.distributed import distributed_c10d

from bigbatch.recipes.core.errors import EXIT_FAILED, one_line
from bigbatch.recipes.core.heartbeat import (
    GONE,
    Heartbeat,
    death_digest,
    identity,
    in_step_with,
    is_gone,
    launch_id,
    read_failure,
    read_heartbeat,
    remove_earlier_failure,
    resume_advice,
    this_rank,
    write_failure,
    write_heartbeat,
)

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # a neighbour on another host that has not beaten for so long is dead
LEAVING_SECONDS = 10.0  # for a rank to end by itself, in order, after another has failed
GATHERING_SECONDS = 3.0  # for all ranks to have put down where they hang
STACK_FRAMES = 6
WAITING_PLACES = ("/torch/distributed/", "/deepspeed/comm/", "/core/parallel.py")


@contextlib.contextmanager
def watched(run_dir: Path, phase: dict[str, Any], limit_seconds: float | None) -> Iterator[None]:
    """Watch this rank and its peers while the block runs.

    A change of `phase` is a sign of life; `limit_seconds` without one end all ranks with their stacks in log/, a few
    seconds later. None: however long, as long as nobody is dead.
    """
    watchdog = Watchdog(run_dir, phase, limit_seconds)
    watchdog.start()
    try:
        yield
    except BaseException:
        watchdog.leave("failed")
        raise
    watchdog.leave("done")


class Watchdog:
    """The thread and what it remembers from beat to beat."""

    def __init__(self, run_dir: Path, phase: dict[str, Any], limit_seconds: float | None) -> None:
        self.run_dir, self.phase, self.limit_seconds = run_dir, phase, limit_seconds
        self.beat_seconds = min(BEAT_SECONDS, limit_seconds / 10) if limit_seconds else BEAT_SECONDS
        self.rank, self.num_ranks = this_rank(), int(os.environ.get("WORLD_SIZE", "1"))
        self._stacks = run_dir / "log" / f"stacks_rank{self.rank}.txt"
        self._stacks_file: TextIO = sys.stderr
        self._main_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._left = threading.Event()
        self._count = 0
        self._seen = dict(phase)
        self._idle_seconds = 0.0
        self._neighbour: Heartbeat | None = None
        self._silent_seconds = 0.0
        self._failed_seconds: float | None = None

    def start(self) -> None:
        """Beat once, before any peer can be met, and go on in the background."""
        (self.run_dir / "log").mkdir(exist_ok=True)
        if self.rank == 0:
            remove_earlier_failure(self.run_dir)
        with contextlib.suppress(OSError):  # a full disk
            self._stacks_file = self._stacks.open("w")
        self._beat()
        self._arm()
        self._thread.start()

    def leave(self, state: str) -> None:
        """Stop watching; the peers read how this rank left."""
        self._left.set()
        self._thread.join(2 * self.beat_seconds)  # no longer: a disk that hangs is no reason to stay
        faulthandler.cancel_dump_traceback_later()
        self._beat(state=state)
        with contextlib.suppress(OSError):
            if not self._stacks.stat().st_size:
                self._stacks.unlink()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._left.wait(self.beat_seconds):
            now = time.monotonic()
            # A scheduler that suspends a whole job stops this thread too: that time is nobody's fault.
            passed, last = min(now - last, 2 * self.beat_seconds), now
            self._arm()
            self._look(passed)

    def _arm(self) -> None:
        """Have the process ended from below Python, should a call keep the interpreter, and so this thread, waiting."""
        if self.limit_seconds:
            seconds = self.limit_seconds + GATHERING_SECONDS + 4 * self.beat_seconds  # so the peers tell of it first
            faulthandler.dump_traceback_later(seconds, file=self._stacks_file, exit=True)

    def _look(self, passed: float) -> None:
        """Take one look at everything, `passed` seconds after the last one; may end the process."""
        seen = dict(self.phase)
        self._idle_seconds = self._idle_seconds + passed if seen == self._seen else 0.0
        self._seen = seen
        written = self._beat()
        if failure := read_failure(self.run_dir):
            self._follow(failure, passed)
        elif self.limit_seconds and self._idle_seconds >= self.limit_seconds:
            self._give_up()
        elif torch.distributed.is_initialized():  # all have begun: no file is of a launch before
            self._look_at_neighbour(passed if written else 0.0)

    def _beat(self, state: str = "running", **more: Any) -> bool:
        self._count += 1
        place = self.phase.get("phase"), self.phase.get("step"), round(self._idle_seconds, 1)
        process = launch_id(), self.rank, socket.gethostname(), os.getpid()
        return write_heartbeat(
            self.run_dir, Heartbeat(*process, self.beat_seconds, self._count, *place, state=state, **more)
        )

    def _follow(self, failure: dict[str, Any], passed: float) -> None:
        """End when another rank has failed, after a while in which this one may end by itself."""
        if self._failed_seconds is None:
            self._failed_seconds = 0.0
            if "ranks" in failure:  # of a hang, each rank's stacks are of interest, late ones too
                faulthandler.dump_traceback(self._stacks_file)
        self._failed_seconds += passed
        if self._failed_seconds > min(LEAVING_SECONDS, self.limit_seconds or LEAVING_SECONDS):
            self._end(f"rank {failure['rank']} has failed (failure.json), and this one waits for it")

    def _look_at_neighbour(self, passed: float) -> None:
        """End when the rank before this one is dead; never as long as this one gets on, which no dead peer allows."""
        beat = read_heartbeat(self.run_dir, (self.rank - 1) % self.num_ranks)
        if beat is None:
            return
        if self._neighbour is None or beat.count != self._neighbour.count:
            self._neighbour, self._silent_seconds = beat, 0.0
            return
        self._silent_seconds += passed
        how, allowed_seconds = _death(beat)
        if min(self._silent_seconds, self._idle_seconds) > allowed_seconds:
            faulthandler.dump_traceback(self._stacks_file)
            write_failure(self.run_dir, death_digest(self.run_dir, beat, how, self.rank, self.phase))
            self._end(f"rank {beat.rank} on {beat.host} {how}")

    def _give_up(self) -> None:
        """Put down where this rank hangs, gather where the others do, and end."""
        faulthandler.dump_traceback(self._stacks_file)
        frames = sys._current_frames()
        del frames[threading.get_ident()]
        self._beat(
            state="hung",
            collectives=_collectives(),
            in_collective=any(_is_waiting(frame) for frame in frames.values()),
            stack=list(_stack(frames[self._main_thread])),
        )
        ranks = self._gather()
        write_failure(self.run_dir, hang_digest(self.run_dir, ranks, self.limit_seconds or 0.0))
        self._end(f"no progress for {self.limit_seconds:g} s (watchdog.limit_seconds); {self._stacks} shows where")

    def _gather(self) -> list[Heartbeat]:
        """Return all ranks' heartbeats, in order; the state of one that does not beat is `silent`."""
        first = [self._read(rank) for rank in range(self.num_ranks)]
        beats = list(first)
        deadline = time.monotonic() + GATHERING_SECONDS + 2 * self.beat_seconds
        while time.monotonic() < deadline and any(beat.state == "running" for beat in beats):
            time.sleep(self.beat_seconds / 5)
            beats = [self._read(beat.rank) if beat.state == "running" else beat for beat in beats]
        silent = [beat.rank for beat in beats if beat.state == "running" and beat.count == first[beat.rank].count]
        return [beat._replace(state="silent") if beat.rank in silent else beat for beat in beats]

    def _read(self, rank: int) -> Heartbeat:
        beat = read_heartbeat(self.run_dir, rank)
        return beat or Heartbeat(launch_id(), rank, "unknown host", 0, self.beat_seconds, 0, "start", None, 0.0)

    def _end(self, why: str) -> NoReturn:
        print(one_line(f"error: rank {self.rank} ends: {why}"), file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)


def hang_digest(run_dir: Path, ranks: list[Heartbeat], limit_seconds: float) -> dict[str, Any]:
    """Return the digest of a run that stands still, in the name of the rank that is behind the others."""
    behind = min(ranks, key=_progress)
    if heard := [beat for beat in ranks if beat.state != "silent"]:
        slowest = min(heard, key=_progress)
        behind = in_step_with(behind, slowest.phase, slowest.step)
    what = f"rank {behind.rank} is behind the others"
    if behind.state == "silent":
        what += " and does not answer: it is stopped, dead, or in a call that keeps the interpreter"
    elif len(ranks) == 1:
        what = f"it is in {behind.stack[0]}"
    elif len({_progress(beat) for beat in ranks}) == 1:
        place = "all wait in a collective" if behind.in_collective else f"rank {behind.rank} is in {behind.stack[0]}"
        what = f"no rank is behind; {place}"
    else:
        what += f", in {behind.stack[0] if behind.stack else behind.phase}"
    return {
        **identity(behind),
        "exception": f"no progress for {limit_seconds:g} s (watchdog.limit_seconds): {what}",
        "what_to_do": "log/stacks_rank*.txt show where each rank was; raise watchdog.limit_seconds if it was but slow; "
        + resume_advice(run_dir),
        "ranks": [
            {
                **identity(beat),
                "state": beat.state,
                "idle_seconds": beat.idle_seconds,
                "in_collective": beat.in_collective,
                "collectives": beat.collectives,
                "stack": beat.stack,
            }
            for beat in ranks
        ],
    }


def _progress(beat: Heartbeat) -> tuple[bool, int, bool, int]:
    """Return a key by which the rank that the others wait for comes first.

    Ranks that wait have entered the collective that it has not; a kernel's result may be waited for elsewhere too, so
    the number of collectives decides among those of which nothing is seen.
    """
    return beat.state != "silent", -1 if beat.step is None else beat.step, beat.in_collective, beat.collectives


def _death(beat: Heartbeat) -> tuple[str, float]:
    """Return in which way a rank that beats no more would be dead, and after how many seconds without a beat it is."""
    if beat.state == "failed":
        return "has left, and its log says why", LEAVING_SECONDS
    if is_gone(beat):
        return GONE, 2 * beat.beat_seconds
    if beat.state == "running" and beat.host != socket.gethostname():
        return f"has not been heard of for {SILENT_SECONDS:g} s: it or its host is dead or stopped", SILENT_SECONDS
    return "", math.inf  # a stopped one on this host may go on; it is the limit's business


def _collectives() -> int:
    if not torch.distributed.is_initialized():
        return 0
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _is_waiting(frame: FrameType) -> bool:
    return any(place in at.f_code.co_filename for at in _walk(frame) for place in WAITING_PLACES)


def _stack(frame: FrameType) -> Iterator[str]:
    for at in itertools.islice(_walk(frame), STACK_FRAMES):
        yield f"{at.f_code.co_filename}:{at.f_lineno} {at.f_code.co_name}"


def _walk(frame: FrameType | None) -> Iterator[FrameType]:
    while frame:
        yield frame
        frame = frame.f_back
