"""Dynamic batching: requests that come one by one are answered together, on a thread of the model's own."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.serving.refusal import RefusedError
from bigbatch.tools.serving.telemetry import Telemetry

Work = Callable[[list[Any]], list[Any]]


class Job:
    """The inputs of one request, answered together; dropped where nobody waits any more."""

    def __init__(self, inputs: list[Any], future: "asyncio.Future[list[Any]]") -> None:
        self.inputs, self.future = inputs, future

    def settle(self, answers: list[Any]) -> None:
        """Hand the answers over, or the first input's mistake. Called by the event loop."""
        if self.future.done():
            return
        problem = next(((n, one) for n, one in enumerate(answers) if isinstance(one, Exception)), None)
        if problem is None:
            self.future.set_result(answers)
            return
        number, error = problem
        if isinstance(error, UserError):
            where = f"inputs[{number}]" + (f".{error.where}" if error.where.isidentifier() else "")
            error = RefusedError(422, f"{where}: {error.message}", where)
        self.future.set_exception(error)


class Batcher:
    """Calls `work` with up to `max_batch` inputs of several requests."""

    def __init__(self, work: Work, max_batch: int, wait_seconds: float, telemetry: Telemetry) -> None:
        self.work, self.max_batch, self.wait_seconds, self.telemetry = work, max_batch, wait_seconds, telemetry
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    def answer(self, inputs: list[Any]) -> "asyncio.Future[list[Any]]":
        """Return what will be the answers, or a RefusedError for an input that the model cannot take."""
        self.loop = asyncio.get_running_loop()
        job = Job(inputs, self.loop.create_future())
        with self.changed:
            self.jobs.append(job)
            self.changed.notify()
        return job.future

    def _run(self) -> None:
        while True:
            jobs = self._take()
            flat = [one for job in jobs for one in job.inputs]
            begin = time.perf_counter()
            answers = answer_all(self.work, flat, self.max_batch)
            self.telemetry.model_seconds.inc(time.perf_counter() - begin)
            self.telemetry.batches.observe(len(flat))
            assert self.loop
            self.loop.call_soon_threadsafe(_settle, jobs, answers)

    def _take(self) -> list[Job]:
        """Wait for a job; take as many more as fit into a batch."""
        with self.changed:
            self.changed.wait_for(lambda: self.jobs)
            if self.wait_seconds:
                full = lambda: sum(len(job.inputs) for job in self.jobs) >= self.max_batch  # noqa: E731 - a condition
                self.changed.wait_for(full, self.wait_seconds)
            taken, size = [], 0
            while self.jobs and (not size or size + len(self.jobs[0].inputs) <= self.max_batch):
                job = self.jobs.popleft()
                if not job.future.done():  # else its client has gone
                    taken.append(job)
                    size += len(job.inputs)
            return taken


def answer_all(work: Work, inputs: list[Any], max_batch: int) -> list[Any]:
    """Return an answer or an exception for each input; one that cannot be taken is found by halving its batch."""
    found = []
    for begin in range(0, len(inputs), max_batch):
        found += _halving(work, inputs[begin : begin + max_batch])
    return found


def _halving(work: Work, inputs: list[Any]) -> list[Any]:
    try:
        return work(inputs)
    except Exception as error:
        if len(inputs) == 1:
            return [error]
        middle = len(inputs) // 2
        return _halving(work, inputs[:middle]) + _halving(work, inputs[middle:])


def _settle(jobs: list[Job], answers: list[Any]) -> None:
    begin = 0
    for job in jobs:
        job.settle(answers[begin : begin + len(job.inputs)])
        begin += len(job.inputs)
