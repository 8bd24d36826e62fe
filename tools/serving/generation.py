"""Texts that are written side by side: a request joins between two steps, and leaves when it has ended.

Shapes: R rows that are being written, V vocabulary.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from bigbatch.recipes.core.generate import Sampling, choose, next_logits, read_prompts, stream
from bigbatch.recipes.core.models.decoder import Decoder, KeyValueCache
from bigbatch.tools.serving.telemetry import Telemetry


class Token(NamedTuple):
    """A step of one of a request's texts: a token, or why there is none any more."""

    sample: int
    token: int | None
    finish: str | None = None


class Job:
    """One prompt and the texts that are to follow it."""

    def __init__(self, prompt: list[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self.unwanted: set[int] = set()
        """Samples that nobody waits for any more."""

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for any of its texts."""
        return len(self.unwanted) < self.sampling.num_samples

    def drop(self) -> None:
        """Free its rows."""
        self.unwanted.update(range(self.sampling.num_samples))


class Row:
    """One of a job's texts while it is written."""

    def __init__(self, job: Job, sample: int) -> None:
        self.job, self.sample, self.count = job, sample, 0
        self.random = np.random.default_rng((job.sampling.seed, sample))

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return self.sample not in self.job.unwanted

    def take(self, token: int) -> Token:
        """Count a token; say whether the text ends."""
        sampling = self.job.sampling
        if token in sampling.stop_tokens:
            return Token(self.sample, None, "stop")
        self.count += 1
        return Token(self.sample, token, "length" if self.count == sampling.max_new_tokens else None)


class Rows(Protocol):
    """How one kind of model writes several texts at a time."""

    rows: list[Row]

    def fits(self, job: Job) -> bool:
        """Say whether a job can join now."""
        ...

    def join(self, job: Job) -> None:
        """Read its prompt."""
        ...

    def step(self) -> list[tuple[Row, Token]]:
        """Write a token of each row; rows that have ended leave."""
        ...

    def clear(self) -> None:
        """Forget all rows."""
        ...


def rows_of(model: Any, max_rows: int) -> Rows:
    """Return how a decoder's texts are written side by side."""
    if isinstance(model, Decoder):
        return JoiningRows(model, max_rows)
    return (StreamingRows if hasattr(model.session, "stream_tokens") else TogetherRows)(model, max_rows)


class JoiningRows:
    """A native decoder: rows come and go between steps, each with settings of its own.

    What a row says is what `generate.generate` says to its prompt alone: positions count from its own first token.
    """

    def __init__(self, model: Any, max_rows: int) -> None:
        self.model, self.max_rows = model, max_rows
        self.clear()

    def clear(self) -> None:
        self.rows: list[Row] = []
        self.cache: Any = None
        self.logits = torch.empty(0)  # [R, V]

    def fits(self, job: Job) -> bool:
        return not self.rows or len(self.rows) + job.sampling.num_samples <= self.max_rows

    def join(self, job: Job) -> None:
        logits, cache = read_prompts(self.model, [job.prompt], 0, job.sampling.num_samples)
        added = [Row(job, sample) for sample in range(job.sampling.num_samples)]
        left = max(row.job.sampling.max_new_tokens - row.count for row in [*self.rows, *added])
        self.cache = side_by_side([self.cache, cache] if self.rows else [cache], left)
        self.logits = torch.cat([self.logits, logits]) if self.rows else logits
        self.rows += added

    def step(self) -> list[tuple[Row, Token]]:
        chosen = self._choose()
        steps = [(row, row.take(token)) for row, token in zip(self.rows, chosen.tolist(), strict=True) if row.is_wanted]
        going = {id(row) for row, token in steps if token.finish is None}
        kept = [place for place, row in enumerate(self.rows) if id(row) in going]
        if not kept:
            self.clear()
            return steps
        if len(kept) < len(self.rows):
            places = torch.tensor(kept, device=chosen.device)
            self.rows, chosen = [self.rows[place] for place in kept], chosen[places]
            self.cache.select(places)
            if isinstance(self.cache, KeyValueCache):
                trim(self.cache)
        self.logits = next_logits(self.model, chosen.unsqueeze(1), self.cache)
        return steps

    def _choose(self) -> torch.Tensor:
        """Choose the next token [R] of each row by its own settings and its own random numbers."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for place, row in enumerate(self.rows):
            sampling = row.job.sampling
            kinds.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(place)
        chosen = torch.empty(len(self.rows), dtype=torch.long, device=self.logits.device)
        for places in kinds.values():
            uniforms = np.array([self.rows[place].random.random() for place in places])
            index = torch.tensor(places, device=chosen.device)
            chosen[index] = choose(self.logits[index], self.rows[places[0]].job.sampling, uniforms)
        return chosen


class TogetherRows(JoiningRows):
    """A decoder in a session, whose cache takes no new rows: they begin together, and leave one by one."""

    def fits(self, job: Job) -> bool:
        return self.cache is None and super().fits(job)

    def join(self, job: Job) -> None:
        self.rows += [Row(job, sample) for sample in range(job.sampling.num_samples)]

    def step(self) -> list[tuple[Row, Token]]:
        if self.cache is None:
            most = max(row.job.sampling.max_new_tokens for row in self.rows)
            self.logits, self.cache = read_prompts(self.model, [row.job.prompt for row in self.rows], most, 1)
        return super().step()


class StreamingRows:
    """An engine that writes by itself: jobs of the same settings run from start to end."""

    def __init__(self, model: Any, max_rows: int) -> None:
        self.model, self.max_rows = model, max_rows
        self.clear()

    def clear(self) -> None:
        self.rows: list[Row] = []
        self.jobs: list[Job] = []
        self.steps: Iterator[list[int | None]] | None = None

    def fits(self, job: Job) -> bool:
        if not self.jobs:
            return True
        if self.steps is not None or (len(self.jobs) + 1) * job.sampling.num_samples > self.max_rows:
            return False
        return _shared(job.sampling) == _shared(self.jobs[0].sampling)

    def join(self, job: Job) -> None:
        self.jobs.append(job)
        self.rows += [Row(job, sample) for sample in range(job.sampling.num_samples)]

    def step(self) -> list[tuple[Row, Token]]:
        if self.steps is None:
            most = max(job.sampling.max_new_tokens for job in self.jobs)
            sampling = self.jobs[0].sampling._replace(max_new_tokens=most)
            self.steps = stream(self.model, [job.prompt for job in self.jobs], sampling)
            self.ended = [False] * len(self.rows)
        tokens = next(self.steps, None) or [None] * len(self.rows)
        found = []
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if self.ended[place] or not row.is_wanted:
                self.ended[place] = True
                continue
            found.append((row, Token(row.sample, None, "stop") if token is None else row.take(token)))
            self.ended[place] = found[-1][1].finish is not None
        if all(self.ended):
            self.clear()
        return found


def _shared(sampling: Sampling) -> Sampling:
    return sampling._replace(max_new_tokens=0, **({"seed": 0} if sampling.temperature == 0 else {}))


def side_by_side(caches: list[KeyValueCache], num_new_tokens: int) -> KeyValueCache:
    """Return one cache with the rows of all, aligned at their ends, with room for more tokens; the first is reused."""
    length = max(cache.length for cache in caches)
    paddings = []
    layers, two, _, heads, _, size = caches[0].states.shape
    shape = (layers, two, sum(cache.states.shape[2] for cache in caches), heads, length + num_new_tokens, size)
    states, begin = caches[0].states.new_zeros(shape), 0
    for cache in caches:
        end = begin + cache.states.shape[2]
        states[:, :, begin:end, :, length - cache.length : length] = cache.states[..., : cache.length, :]
        own = cache.padding if cache.padding is not None else torch.zeros(end - begin, dtype=torch.long)
        paddings.append(own.to(states.device) + length - cache.length)
        begin = end
    merged = caches[0]
    padding = torch.cat(paddings)
    merged.states, merged.length = states, length
    merged.padding = padding if bool(padding.any()) else None
    return merged


def trim(cache: KeyValueCache) -> None:
    """Give up columns that are padding in every row."""
    if cache.padding is None or not (least := int(cache.padding.min())):
        return
    cache.states = cache.states[..., least:, :]
    cache.length -= least
    padding = cache.padding - least
    cache.padding = padding if bool(padding.any()) else None


class Writer:
    """Runs the rows on a thread of their own, and tells each job its tokens as they come."""

    def __init__(self, rows: Rows, telemetry: Telemetry) -> None:
        self.rows, self.telemetry = rows, telemetry
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    async def write(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[tuple[Job, Token], None]:
        """Yield the tokens of all samples as they come; whoever stops listening frees the rows."""
        job = Job(prompt, sampling)
        with self.changed:
            self.jobs.append(job)
            self.changed.notify()
        self.telemetry.tokens.labels("prompt").inc(len(prompt))
        running = sampling.num_samples
        try:
            while running:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                running -= event.finish is not None
                yield job, event
        finally:
            job.drop()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self.rows.rows)
            begin, joining = time.perf_counter(), []
            try:
                while self.jobs and self.rows.fits(self.jobs[0]):
                    joining.append(self.jobs.popleft())
                    if joining[-1].is_wanted:
                        self.rows.join(joining[-1])
                steps = self.rows.step() if self.rows.rows else []
            except Exception as error:  # the rows at hand are lost; the server is not
                _tell([(job, error) for job in {*joining, *(row.job for row in self.rows.rows)}])
                self.rows.clear()
                continue
            if steps:
                self.telemetry.model_seconds.inc(time.perf_counter() - begin)
                self.telemetry.batches.observe(len(steps))
                self.telemetry.tokens.labels("written").inc(sum(token.token is not None for _, token in steps))
                _tell([(row.job, token) for row, token in steps])


def _tell(events: list[tuple[Job, Any]]) -> None:
    """Hand events over to the loop that the jobs wait in, all at once."""
    if events:
        events[0][0].loop.call_soon_threadsafe(_put, events)


def _put(events: list[tuple[Job, Any]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)
