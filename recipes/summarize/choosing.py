"""Which sentences of a document make its summary: by scores, and by two baselines that learn nothing."""

import math
from collections.abc import Sequence

import numpy as np

from bigbatch.recipes.summarize.rouge import Words

DAMPING, ROUNDS = 0.85, 100


def choose(scores: Sequence[float], words: Sequence[list[str]], count: int, block_trigrams: bool) -> list[int]:
    """Return the `count` sentences with the highest scores, ascending; of equal ones the first.

    `words` are those of each sentence; with `block_trigrams` a sentence that shares three in a row with one chosen
    before is left out.
    """
    chosen: list[int] = []
    seen: set[tuple[str, ...]] = set()
    for number in sorted(range(len(scores)), key=lambda number: -scores[number]):
        trigrams = set(zip(words[number], words[number][1:], words[number][2:], strict=False))
        if not (block_trigrams and trigrams & seen):
            chosen.append(number)
            seen |= trigrams
        if len(chosen) == count:
            break
    return sorted(chosen)


def lead(num_sentences: int, count: int) -> list[int]:
    """Return the first sentences."""
    return list(range(min(num_sentences, count)))


def text_rank(sentences: Sequence[str], words: Words, count: int) -> list[int]:
    """Return the most central sentences, ascending.

    PageRank over all pairs of sentences, weighed by the words they share over the sum of the logarithms of their
    lengths (TextRank, https://aclanthology.org/W04-3252, section 4).
    """
    found = [words.tokenize(sentence) for sentence in sentences]
    size = len(found)
    weights = np.zeros((size, size))
    for one in range(size):
        for other in range(one):
            norm = math.log(max(1, len(found[one]))) + math.log(max(1, len(found[other])))
            shared = len(set(found[one]) & set(found[other]))
            weights[one, other] = weights[other, one] = shared / norm if norm else 0.0
    totals = weights.sum(0)
    flow = np.divide(weights, totals, out=np.full_like(weights, 1 / size), where=totals > 0)  # by column, to others
    ranks = np.full(size, 1 / size)
    for _ in range(ROUNDS):
        ranks = (1 - DAMPING) / size + DAMPING * flow @ ranks
    return choose(ranks.round(12).tolist(), found, count, block_trigrams=False)
