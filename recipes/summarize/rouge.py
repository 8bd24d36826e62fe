"""ROUGE of summaries, their intervals, and which sentences of a document have most of it.

The figures are rouge-score's F-measures with Porter's stems (https://aclanthology.org/W04-1013); words are runs of
ASCII letters and digits in small letters. Of several references the best counts, for each figure by itself. N
documents.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from bigbatch.recipes.core.metrics import BOOTSTRAP_SAMPLES, CONFIDENCE, bootstrap_intervals

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Words(Tokenizer):
    """The library's own words, each stemmed once: a document repeats them, and stemming is what takes the time."""

    def __init__(self) -> None:
        self._stems = cache(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        """Return a text's stemmed words."""
        return [stem for word in text.split() for stem in self._stems(word)]


class Rouge:
    """Compares texts; sentences are lines, which ROUGE-Lsum takes apart."""

    def __init__(self) -> None:
        self.words = Words()
        self._scorer = RougeScorer(KINDS, tokenizer=self.words)

    def score(self, text: str, references: Sequence[str]) -> np.ndarray:
        """Return the F-measures [KINDS] of a summary, each against the reference that is best by it."""
        found = [self._scorer.score(reference, text) for reference in references]
        return np.array([max(scores[kind].fmeasure for scores in found) for kind in KINDS])

    def label(self, sentences: Sequence[str], references: Sequence[str], most: int) -> tuple[list[int], list[float]]:
        """Return the sentences, ascending, that a greedy search chooses, and each sentence's own worth.

        What a choice is worth is the mean of ROUGE-1 and ROUGE-2 against the best reference; a sentence is added as
        long as it makes that better (https://arxiv.org/abs/1611.04230, section 3.2).
        """
        words = [self.words.tokenize(sentence) for sentence in sentences]
        golds = [[_grams(self.words.tokenize(reference), n) for n in (1, 2)] for reference in references]
        worths = [_worth(found, golds) for found in words]
        chosen: list[int] = []
        best = 0.0
        while len(chosen) < most:
            rest = [number for number in range(len(words)) if number not in chosen]
            tried = [(_worth(_joined(words, [*chosen, number]), golds), -number) for number in rest]
            value, number = max(tried, default=(0.0, 0))
            if value <= best:
                break
            best = value
            chosen.append(-number)
        return sorted(chosen), worths


def told(named: dict[str, list[np.ndarray]], thorough: bool) -> dict[str, Any]:
    """Return the means of figures [KINDS] of each document, by the prefix of their names.

    When thorough also how many there are, and intervals of those without a prefix.
    """
    means = {name: np.mean(values, 0) for name, values in named.items()}
    found: dict[str, Any] = {
        name + kind: float(mean[i]) for name, mean in means.items() for i, kind in enumerate(KINDS)
    }
    if thorough:
        values = np.array(named[""])
        details = {"intervals": intervals(values), "confidence": CONFIDENCE}
        found |= {"num_documents": len(values), "details": details}
    return found


def intervals(values: np.ndarray, num_samples: int = BOOTSTRAP_SAMPLES) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of the means of figures [N, KINDS], over resampled documents."""
    return bootstrap_intervals(
        len(values), lambda rows: dict(zip(KINDS, values[rows].mean(0).tolist(), strict=True)), num_samples
    )


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[place:] for place in range(n)), strict=False))


def _joined(words: list[list[str]], chosen: list[int]) -> list[str]:
    return [word for number in sorted(chosen) for word in words[number]]


def _worth(words: list[str], golds: list[list[Counter[tuple[str, ...]]]]) -> float:
    found = [_grams(words, n) for n in (1, 2)]
    return max(sum(_f1(mine, right) for mine, right in zip(found, gold, strict=True)) / 2 for gold in golds)


def _f1(found: Counter[tuple[str, ...]], right: Counter[tuple[str, ...]]) -> float:
    common = (found & right).total()
    return 2 * common / (found.total() + right.total()) if common else 0.0
