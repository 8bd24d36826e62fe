"""How often each n-gram stands in a text: the memory of an n-gram model, and the probabilities that follow from it.

Table k holds the n-grams of k words, ordered. One is numbered by its place there, and spelt by the number of its first
k - 1 words in the table before, and its last word: key = number * vocabulary + word. So all that go on from the same
words are neighbours. A text begins behind end-of-text tokens. The counts are those of Kneser and Ney: in the longest
table how often an n-gram occurs, in the others after how many different words.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BLOCK_TOKENS = 2**22
BUCKETS = 3
"""Counts of 1, of 2, and of 3 or more have discounts of their own."""
NOTHING = np.empty((0, 1 + BUCKETS), np.int64)


class Table(NamedTuple):
    """The n-grams of one length."""

    keys: np.ndarray  # uint64 [n], ascending
    counts: np.ndarray  # int64 [n]
    followers: np.ndarray  # int64 [contexts, 1 + BUCKETS]
    """Of each n-gram one word shorter: the sum of the counts that go on from it, and how many of these are 1, 2, 3+."""


class Tables(NamedTuple):
    """The n-grams of all lengths, the shortest first."""

    by_length: tuple[Table, ...]
    vocabulary_size: int
    fingerprint: str = ""

    def numbers(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Look up the n-grams of each length k that end at tokens [..., T]: yield the numbers of the first k - 1 words.

        And their own; -1 for what does not occur. Where there are not k words, the first ones are missing: -1.
        """
        before = np.zeros(tokens.shape, np.int64)
        for table in self.by_length:
            key = before.astype(np.uint64) * np.uint64(self.vocabulary_size) + tokens.astype(np.uint64)
            place = np.searchsorted(table.keys, key)
            found = (before >= 0) & (table.keys[np.minimum(place, len(table.keys) - 1)] == key)
            number = np.where(found, place, -1)
            yield before, number
            before = np.full_like(number, -1)
            before[..., 1:] = number[..., :-1]


def discounts_by_formula(table: Table) -> list[float]:
    """Return the three discounts of a table from how many of its counts are small (Chen and Goodman 1998, section 3).

    Where a text is too small to have all of them, half of the count.
    """
    n1, n2, n3, n4 = (int((table.counts == count).sum()) for count in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return [0.5, 1.0, 1.5]
    share = n1 / (n1 + 2 * n2)
    found = [1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3]
    return [value if 0 < value < count else count / 2 for count, value in enumerate(found, 1)]


def distribution(tables: Tables, discounts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return the probability [V] of each word behind words [T], with discounts [K, 3] for tables of K lengths.

    Interpolated as Chen and Goodman 1998, section 3, have it: what the discounts free goes to the shorter n-grams.
    """
    size, order = tables.vocabulary_size, len(tables.by_length)
    probability = np.full(size, 1 / size)
    contexts = [0, *(int(numbers[-1]) for _, numbers in tables.numbers(words[-order:]))]
    for table, context, three in zip(tables.by_length, contexts, discounts, strict=False):
        if context < 0 or not table.followers[context, 0]:
            break  # nor was any longer context ever seen
        begin, end = np.searchsorted(table.keys, np.array([context, context + 1], np.uint64) * np.uint64(size))
        counts = table.counts[begin:end]
        total, *followers = table.followers[context]
        kept = counts - np.concatenate([[0.0], three])[np.minimum(counts, BUCKETS)]
        probability *= np.dot(followers, three) / total
        probability[(table.keys[begin:end] % np.uint64(size)).astype(np.int64)] += kept / total
    return probability


# ------------------------------------------------------------------------------------------------------------- counting


def count_ngrams(stream: Sequence[np.ndarray], vocabulary_size: int, end_of_text: int, order: int) -> Tables:
    """Count the n-grams of 1 to `order` words of a text that is given in parts, read once for each length.

    Exact. It takes memory for the different n-grams, and for BLOCK_TOKENS tokens of the text at once.
    """
    counted: list[Table] = []
    for length in range(1, order + 1):
        shorter = Tables(tuple(counted), vocabulary_size)
        keys = np.arange(vocabulary_size, dtype=np.uint64) if length == 1 else _start_key(shorter, end_of_text)
        counts = np.zeros(len(keys), np.int64)
        for block in _blocks(stream, length - 1, end_of_text):
            found = np.unique(_keys_ending_in(block, shorter), return_counts=True)
            keys, counts = _merged(keys, counts, *found)
        counted.append(Table(keys, counts, NOTHING))
    finished = []
    sizes = [1, *(len(table.keys) for table in counted)]
    for table, counts, num_contexts in zip(counted, _continuations(counted, vocabulary_size), sizes, strict=False):
        followers = _followers(table.keys, counts, num_contexts, vocabulary_size)
        finished.append(Table(table.keys, counts, followers))
    return Tables(tuple(finished), vocabulary_size)


def _start_key(shorter: Tables, end_of_text: int) -> np.ndarray:
    """Return the key [1] of end-of-text repeated, from behind which the text's first word is predicted."""
    return _keys_ending_in(np.full(len(shorter.by_length) + 1, end_of_text, np.uint64), shorter)


def _keys_ending_in(block: np.ndarray, shorter: Tables) -> np.ndarray:
    """Return the keys of the n-grams one word longer than `shorter` has, from the first on that the block holds."""
    length = len(shorter.by_length)
    if not length:
        return block
    *_, (_, numbers) = shorter.numbers(block)
    return numbers[length - 1 : -1].astype(np.uint64) * np.uint64(shorter.vocabulary_size) + block[length:]


def _blocks(stream: Sequence[np.ndarray], overlap: int, end_of_text: int) -> Iterator[np.ndarray]:
    """Yield the text in blocks, each with the last `overlap` tokens before it."""
    before = np.full(overlap, end_of_text, np.uint64)
    for part in stream:
        for begin in range(0, len(part), BLOCK_TOKENS):
            block = np.concatenate([before, part[begin : begin + BLOCK_TOKENS].astype(np.uint64)])
            yield block
            before = block[len(block) - overlap :]


def _merged(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    keys, counts = np.concatenate([keys, more_keys]), np.concatenate([counts, more_counts])
    order = np.argsort(keys, kind="stable")  # merges two runs in order in linear time
    keys = keys[order]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[begins], np.add.reduceat(counts[order], begins)


def _continuations(tables: list[Table], vocabulary_size: int) -> list[np.ndarray]:
    """Return the counts of the longest n-grams, and of the others the number of different words before them."""
    size = np.uint64(vocabulary_size)
    suffixes = [np.zeros(vocabulary_size, np.int64)]  # the number of each n-gram without its first word
    for shorter, longer in itertools.pairwise(tables):
        begins = suffixes[-1][(longer.keys // size).astype(np.int64)].astype(np.uint64)
        suffixes.append(np.searchsorted(shorter.keys, begins * size + longer.keys % size))
    counts = [tables[-1].counts]
    for shorter, suffix in zip(tables[-2::-1], suffixes[:0:-1], strict=True):
        counts.insert(0, np.bincount(suffix[counts[0] > 0], minlength=len(shorter.keys)))
    return counts


def _followers(keys: np.ndarray, counts: np.ndarray, num_contexts: int, vocabulary_size: int) -> np.ndarray:
    contexts = np.zeros(len(keys), np.int64)
    if num_contexts > 1:
        contexts = (keys // np.uint64(vocabulary_size)).astype(np.int64)
    found = np.empty((num_contexts, 1 + BUCKETS), np.int64)
    found[:, 0] = np.bincount(contexts, counts, num_contexts)  # float64 is exact up to 2^53
    for bucket in range(1, 1 + BUCKETS):
        is_in = counts == bucket if bucket < BUCKETS else counts >= BUCKETS
        found[:, bucket] = np.bincount(contexts[is_in], minlength=num_contexts)
    return found
