"""Stretches of running text to predict word by word, for either kind of model.

Shapes: B stretches of T words (C more before each where it is validated), K the longest n-gram.
"""

from pathlib import Path

import numpy as np

from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.ngrams import BUCKETS, Tables
from bigbatch.recipes.core.data.sampler import Order, random_words
from bigbatch.recipes.core.data.shards import IGNORED_LABEL, Stream
from bigbatch.recipes.core.errors import UserError

STATISTICS = 2 + BUCKETS
"""An n-gram's own count, and of all that begin like it: the sum, how many are 1, 2, 3+."""


class TextSamples:
    """A split of a prepared folder as `Samples`: stretches of `length` words, each word from `begin` on a target.

    Ahead of a stretch stand `context` words that are no targets; ahead of the text, ends of a text. With `shift_seed`
    the stretches begin elsewhere in every epoch, so that a word is not always as far from the beginning.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        length: int,
        context: int = 0,
        begin: int = 0,
        shift_seed: int | None = None,
    ) -> None:
        """Map the shards into memory."""
        self.stream = Stream(folder, split)
        if not self.stream.num_tokens > begin:
            raise UserError(f"data.{split}", f"has {self.stream.num_tokens} words; right is more than {begin}")
        self.length, self.context, self.begin, self.shift_seed = length, context, begin, shift_seed
        self.num_samples = -(-(self.stream.num_tokens - begin) // length) + (shift_seed is not None)
        content = f"{self.stream.fingerprint} {split} {length} {context} {begin} {shift_seed}"
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return tokens [B, C + T] and labels [B, T] int64 of these samples."""
        window, labels = self.window(sample_ids, epochs, self.context + 1)
        return {"tokens": window[:, :-1], "labels": labels[:, self.context + 1 :]}

    def window(self, sample_ids: np.ndarray, epochs: np.ndarray, before: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the words [B, before + T] of stretches with so many before them, and the same as labels."""
        firsts = self.begin + sample_ids * self.length - self._shifts(epochs) - before
        window = self.stream.read(firsts, before + self.length)
        places = firsts[:, np.newaxis] + np.arange(before + self.length)
        inside = (places >= self.begin) & (places < self.stream.num_tokens)
        return window, np.where(inside, window, IGNORED_LABEL)

    def _shifts(self, epochs: np.ndarray) -> np.ndarray:
        if self.shift_seed is None:
            return np.zeros_like(epochs)
        draws = random_words(self.shift_seed, Order(np.zeros_like(epochs), epochs), 0, 1)[:, 0]
        return (draws % np.uint64(self.length)).astype(np.int64)


class NgramSamples:
    """The same stretches, each word with the statistics of the n-grams that end at it."""

    def __init__(self, samples: TextSamples, tables: Tables) -> None:
        self.samples, self.tables = samples, tables
        self.num_samples = samples.num_samples
        content = f"{samples.fingerprint} {tables.fingerprint}"
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return statistics [B, T, K, STATISTICS] float32 and labels [B, T] int64 of these samples."""
        before = len(self.tables.by_length) - 1
        window, labels = self.samples.window(sample_ids, epochs, before)
        return {"statistics": look_up(self.tables, window)[:, before:], "labels": labels[:, before:]}


def look_up(tables: Tables, words: np.ndarray) -> np.ndarray:
    """Return the statistics [..., T, K, STATISTICS] of the n-grams that end at words [..., T]; 0 of none."""
    found = np.zeros((*words.shape, len(tables.by_length), STATISTICS), np.float32)
    for index, (contexts, numbers) in enumerate(tables.numbers(words)):
        table = tables.by_length[index]
        found[..., index, 0] = np.where(numbers >= 0, table.counts[np.maximum(numbers, 0)], 0)
        followers = table.followers[np.maximum(contexts, 0)]
        found[..., index, 1:] = np.where((contexts >= 0)[..., np.newaxis], followers, 0)
    return found
