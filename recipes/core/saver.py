"""Saves that a run does not wait for: the checkpoint's transaction over a copy of the state, in a thread.

The copy too is made behind: nothing of the state changes before the next update of the weights, and that alone waits
for the copy (Engine.before_change). The thread's agreements with the other ranks' go over a group of processes of its
own: they never meet those of training in a queue, and a commit waits for no step. A failure is told at the next step's
own agreement, so that all ranks leave training at the same one.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from bigbatch.recipes.core.checkpoint import Part, engine_state, owned, save, write
from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.parallel import Mesh

AGREEMENT_HOURS = 2  # a rank may write for longer than another by this much
LAST_WAIT_SECONDS = 30.0  # of a run that fails, for the save that is under way
MOST_REASON_BYTES = 400


class Saved(NamedTuple):
    """A save that was committed."""

    step: int
    folder: Path
    stall_seconds: float
    """What the training loop waited for it."""
    whole_seconds: float
    """From its begin to its commit."""


@dataclass
class _UnderWay:
    """A save that the thread works on; its result is the folder and when it was committed."""

    step: int
    begin: float
    copied: Event = field(default_factory=Event)
    """The copy is made, or has failed."""
    stall_seconds: float = 0.0
    outcome: Future[tuple[Path, float]] = field(default_factory=Future)


class Saver:
    """Saves a run's checkpoints, with `checkpoint.asynchronous` behind the steps: one at a time, none forgotten.

    Whoever leaves its block in order has all saves committed. `tell` hears of each, in the thread of the caller.
    """

    def __init__(self, run_dir: Path, engine: Engine, mesh: Mesh, tell: Callable[[Saved], None]) -> None:
        """Set up; nothing large is allocated before the first save. Collective: every rank must call it."""
        self._run_dir, self._engine, self._mesh, self._tell = run_dir, engine, mesh, tell
        self._under_way: _UnderWay | None = None
        self._buffer = torch.empty(0)
        if engine.config.checkpoint.asynchronous:
            group = dist.new_group(backend="gloo", timeout=timedelta(hours=AGREEMENT_HOURS))
            self._first_text = lambda text: _first_text(text, mesh, group)
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            self._stream = torch.cuda.Stream(mesh.device) if mesh.device.type == "cuda" else None
            engine.before_change = self.wait_for_copy

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for the save under way; when the run has failed, not for long, and say what became of it."""
        if error is None:
            self.wait()
        elif self._under_way:
            try:
                self._under_way.outcome.result(LAST_WAIT_SECONDS)
                self.poll()
            except Exception as behind:
                what = str(behind) or "it had not ended"
                print(f"the save of step {self._under_way.step} is lost: {what}", file=sys.stderr, flush=True)

    def save(self, state: dict[str, Any]) -> None:
        """Save, when the save before is done; raise what that one failed of.

        Asynchronously it returns at once, and the engine's next change of the weights waits for the copy of the state.
        Collective: every rank must call it.
        """
        self.wait()
        begin = time.perf_counter()
        if not self._engine.config.checkpoint.asynchronous:
            folder = save(self._run_dir, self._engine, self._mesh, state)
            seconds = time.perf_counter() - begin
            self._tell(Saved(state["step"], folder, seconds, seconds))
            return
        state, parts = {**state, **engine_state(self._engine)}, list(owned(self._engine, self._mesh))
        self._under_way = under_way = _UnderWay(state["step"], begin)
        ready = torch.cuda.current_stream().record_event() if self._stream else None
        under_way.outcome = self._thread.submit(self._copy_and_write, parts, state, ready, under_way.copied)
        under_way.stall_seconds = time.perf_counter() - begin

    def poll(self) -> None:
        """Tell of the save under way if it is committed."""
        if self._under_way and self._under_way.outcome.done() and not self.has_failed:
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has failed, as far as this rank knows; then every rank must call `wait`."""
        under_way = self._under_way
        return bool(under_way and under_way.outcome.done() and under_way.outcome.exception())

    def wait(self) -> None:
        """Have no save under way; raise what it failed of, UserError on all ranks where the disk was the reason."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        begin = time.perf_counter()
        folder, end = under_way.outcome.result()
        stall_seconds = under_way.stall_seconds + time.perf_counter() - begin
        # A thread that waits wakes up a little after the commit.
        self._tell(Saved(under_way.step, folder, stall_seconds, max(end - under_way.begin, stall_seconds)))

    def wait_for_copy(self) -> None:
        """Have the state copied, so that it may change."""
        under_way = self._under_way
        if under_way and not under_way.copied.is_set():
            begin = time.perf_counter()
            under_way.copied.wait()
            under_way.stall_seconds += time.perf_counter() - begin

    def _copy_and_write(
        self, parts: list[Part], state: dict[str, Any], ready: Any, copied: Event
    ) -> tuple[Path, float]:
        try:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                if self._stream:
                    self._stream.wait_event(ready)
                parts = self._snapshot(parts)
        finally:
            copied.set()
        folder = write(self._run_dir, self._engine.config, self._mesh, self._first_text, parts, state)
        return folder, time.perf_counter()

    def _snapshot(self, parts: list[Part]) -> list[Part]:
        """Copy what this rank writes into host memory that stays for the next time; pinned where a GPU copies."""
        size, end = sum(part.values.numel() for part in parts), 0
        if self._buffer.numel() != size:
            self._buffer = torch.empty(0)  # gone before the next one comes
            self._buffer = torch.empty(size, pin_memory=self._stream is not None)
        copies = list(parts)
        for run in _side_by_side(parts):
            first = end
            for index in run:
                length = parts[index].values.numel()
                copies[index] = parts[index]._replace(values=self._buffer[end : end + length])
                end += length
            source = parts[run[0]].values.as_strided((end - first,), (1,))
            self._buffer[first:end].copy_(source, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
        return copies


def _side_by_side(parts: list[Part]) -> list[list[int]]:
    """Group parts that follow each other in memory: one copy of much is several times as fast as many of little."""
    starts = [part.values.data_ptr() for part in parts]
    runs: list[list[int]] = []
    end = storage = -1
    for index in sorted(range(len(parts)), key=starts.__getitem__):
        values = parts[index].values
        same_storage = values.untyped_storage().data_ptr() == storage
        if starts[index] != end or not same_storage:
            runs.append([])
        runs[-1].append(index)
        end, storage = starts[index] + values.nbytes, values.untyped_storage().data_ptr()
    return runs


def _first_text(text: str, mesh: Mesh, group: Any) -> str:
    """Return the text of the lowest rank that has one, or "", without a device and in one collective over `group`."""
    texts = torch.zeros(mesh.world_size, MOST_REASON_BYTES, dtype=torch.uint8)
    own = torch.tensor(list(text.encode()[:MOST_REASON_BYTES]), dtype=torch.uint8)
    texts[mesh.rank, : len(own)] = own
    dist.all_reduce(texts, group=group)
    first = next((row[row > 0] for row in texts if row.any()), own[:0])
    return bytes(first.tolist()).decode(errors="ignore")
