"""From the probabilities of units at each frame to the likeliest text, with an n-gram model's help where asked.

Shapes: T frames, K units and none, which is unit 0 (CTC's blank) and for the n-gram model the end of a text.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from bigbatch.recipes.core.data.ngrams import count_ngrams, discounts_by_formula, distribution
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.transcribe.config import DecodeSection
from bigbatch.recipes.transcribe.data import SpeechSamples

LEAST = math.log(1e-5)
"""A unit that is less likely at a frame begins nothing there."""

Prefix = tuple[int, ...]


def best_path(units: Sequence[int]) -> list[int]:
    """Return the text of the likeliest unit of each frame: equal neighbours are one, and none is nothing."""
    return [unit for before, unit in zip([0, *units], units, strict=False) if unit not in (0, before)]


class Language:
    """An n-gram model of the units of training transcripts."""

    def __init__(self, samples: SpeechSamples, order: int) -> None:
        """Count the texts of the first epoch."""
        ids = np.arange(samples.num_samples)
        texts = [part for text in samples.texts(Order(ids, np.zeros_like(ids))) for part in (text, [0])]
        stream = np.concatenate(texts).astype(np.uint32)
        self.order = order
        self.tables = count_ngrams([stream], len(samples.alphabet) + 1, 0, order)
        self.discounts = np.array([discounts_by_formula(table) for table in self.tables.by_length])
        self.known: dict[Prefix, np.ndarray] = {}

    def logarithms(self, prefix: Prefix) -> np.ndarray:
        """Return the logarithm of each unit's probability [K] behind a text."""
        context = (*(0,) * (self.order - 1), *prefix)[len(prefix) :]
        if context not in self.known:
            words = np.array(context, np.int64)
            self.known[context] = np.log(distribution(self.tables, self.discounts, words))
        return self.known[context]


class BeamSearch:
    """Prefix beam search (https://arxiv.org/abs/1408.2873): of each text the probability of all its alignments.

    What all texts that are followed begin with is settled and no longer carried along, so that a recording may be of
    any length. For the n-gram model as many units are kept as it looks at.
    """

    def __init__(self, section: DecodeSection, language: Language | None) -> None:
        self.section, self.language = section, language
        self.settled: list[int] = []
        # Logarithm of the probability of all alignments that end with none, and of those that end with the last unit.
        self.beams: dict[Prefix, tuple[float, float]] = {(): (0.0, -math.inf)}
        self.scores: dict[Prefix, float] = {(): 0.0}

    def read(self, logarithms: np.ndarray) -> None:
        """Go on by some frames: the logarithm of each unit's probability [T, K]."""
        for row in logarithms.tolist():
            self._step(row, [unit for unit, value in enumerate(row) if unit and value > LEAST])
        self._settle()

    def finish(self) -> list[int]:
        """Return the units of the best text, with the n-gram model's word on where it ends."""

        def score(prefix: Prefix) -> float:
            end = self.section.ngram_weight * self.language.logarithms(prefix)[0] if self.language else 0.0
            return _sum(*self.beams[prefix]) + self.scores[prefix] + end

        return [*self.settled, *max(self.beams, key=score)]

    def _step(self, row: list[float], units: list[int]) -> None:
        found: dict[Prefix, list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (none, last) in self.beams.items():
            both, same = _sum(none, last), found[prefix]
            same[0] = _sum(same[0], both + row[0])
            if prefix:
                same[1] = _sum(same[1], last + row[prefix[-1]])
            for unit in units:  # one that equals the last needs none in between
                longer = found[(*prefix, unit)]
                longer[1] = _sum(longer[1], (none if prefix[-1:] == (unit,) else both) + row[unit])
        scores = {prefix: self._score(prefix) for prefix in found}
        best = sorted(found, key=lambda prefix: -(_sum(*found[prefix]) + scores[prefix]))[: self.section.beam_size]
        self.beams = {prefix: (found[prefix][0], found[prefix][1]) for prefix in best}
        self.scores = {prefix: scores[prefix] for prefix in best}

    def _score(self, prefix: Prefix) -> float:
        """Return what the n-gram model and the bonus add; a text's beginning has been scored before."""
        if prefix in self.scores:
            return self.scores[prefix]
        before, unit = prefix[:-1], prefix[-1]
        language = self.section.ngram_weight * self.language.logarithms(before)[unit] if self.language else 0.0
        return self.scores[before] + float(language) + self.section.unit_bonus * bool(self.language)

    def _settle(self) -> None:
        shortest = min(map(len, self.beams))
        first = next(iter(self.beams))
        count = 0
        while count < shortest and all(prefix[count] == first[count] for prefix in self.beams):
            count += 1
        count = max(0, count - max(1, self.section.ngram_order))
        self.settled += first[:count]
        self.beams = {prefix[count:]: value for prefix, value in self.beams.items()}
        self.scores = {prefix[count:]: value for prefix, value in self.scores.items()}


def _sum(a: float, b: float) -> float:
    """Return the logarithm of the sum of two numbers given by their logarithms."""
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
