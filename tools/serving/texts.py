"""Tokens into text: piece by piece, as far as it cannot change any more, up to a stop text or a token that ends it."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from bigbatch.recipes.core.generate import Sampling
from bigbatch.tools.serving.generation import Writer


class Piece(NamedTuple):
    """What one of a request's texts goes on with."""

    sample: int
    text: str
    finish: str | None
    """stop or length, with the last piece."""
    num_tokens: int
    """Of the text so far."""


class Text:
    """One text as it grows."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: Sequence[str], strip: bool) -> None:
        self.tokenizer, self.stops, self.strip = tokenizer, stops, strip
        self.decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
        self.waiting, self.num_tokens = "", 0

    def add(self, token: int) -> tuple[str, bool]:
        """Return what can be shown, and whether a stop text, which never is, has come."""
        self.num_tokens += 1
        self.waiting += self.decoder.step(self.tokenizer, token) or ""
        if self.strip:
            self.waiting = self.waiting.lstrip()
        self.strip = self.strip and not self.waiting
        found = [place for stop in self.stops if (place := self.waiting.find(stop)) >= 0]
        if found:
            shown, self.waiting = self.waiting[: min(found)], ""
            return shown, True
        held = self._held()
        shown, self.waiting = self.waiting[: len(self.waiting) - held], self.waiting[len(self.waiting) - held :]
        return shown, False

    def _held(self) -> int:
        """Count the characters at the end that a stop text may begin with."""
        most = min(len(self.waiting), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(most, 0, -1) if any(s.startswith(self.waiting[-n:]) for s in self.stops)), 0)


async def write_text(
    writer: Writer, tokenizer: Any, prompt: list[int], sampling: Sampling, stops: Sequence[str], strip: bool = False
) -> AsyncIterator[Piece]:
    """Yield the pieces of all samples; without leading blanks where `strip` says so."""
    texts = [Text(tokenizer, prompt, stops, strip) for _ in range(sampling.num_samples)]
    ended: set[int] = set()
    steps = writer.write(prompt, sampling)
    try:
        async for job, step in steps:
            if step.sample in ended:
                continue
            text = texts[step.sample]
            shown, is_stopped = text.add(step.token) if step.token is not None else ("", False)
            finish = "stop" if is_stopped else step.finish
            if finish:
                ended.add(step.sample)
                job.unwanted.add(step.sample)
                shown += text.waiting
            if shown or finish:
                yield Piece(step.sample, shown, finish, text.num_tokens)
            if len(ended) == len(texts):
                return
    finally:
        await steps.aclose()
