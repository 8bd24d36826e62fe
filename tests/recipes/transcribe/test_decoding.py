"""Beam search against all texts and alignments spelt out."""

import itertools
from collections import defaultdict

import numpy as np
import pytest

from bigbatch.recipes.transcribe.config import DecodeSection
from bigbatch.recipes.transcribe.decoding import BeamSearch, best_path

FRAMES, UNITS = 5, 3


class Bigrams:
    """Stands for an n-gram model of two units, with given probabilities."""

    table = np.log(np.random.default_rng(2).dirichlet(np.ones(UNITS), UNITS))

    def logarithms(self, prefix):
        return self.table[prefix[-1] if prefix else 0]


def probabilities(frames: int = FRAMES) -> np.ndarray:
    return np.random.default_rng(7).dirichlet(np.full(UNITS, 0.7), frames)


def by_text(rows: np.ndarray) -> dict[tuple[int, ...], float]:
    """Return the probability of each text by its definition: of all paths that collapse to it."""
    found = defaultdict(float)
    for path in itertools.product(range(UNITS), repeat=len(rows)):
        text = tuple(unit for unit, _ in itertools.groupby(path) if unit)
        found[text] += float(np.prod([row[unit] for row, unit in zip(rows, path, strict=True)]))
    return found


def test_equal_neighbours_of_a_path_are_one_and_none_is_nothing():
    assert best_path([0, 1, 1, 0, 1, 2, 2, 0]) == [1, 1, 2]
    assert best_path([]) == []


def test_a_wide_beam_has_the_probabilities_of_all_alignments():
    rows, section = probabilities(), DecodeSection(beam_size=1000)
    search = BeamSearch(section, None)
    search.read(np.log(rows))
    expected = by_text(rows)
    found = {(*search.settled, *prefix): np.exp(beam).sum() for prefix, beam in search.beams.items()}
    found = {text: value for text, value in found.items() if value}  # others have no alignment
    assert set(found) == set(expected)
    assert all(found[text] == pytest.approx(value) for text, value in expected.items())
    assert tuple(search.finish()) == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("weight", [0.3, 1.0, 3.0])
def test_the_ngram_model_weighs_in_from_the_first_unit_to_the_end(weight):
    rows, section = probabilities(), DecodeSection(beam_size=1000, ngram_order=2, ngram_weight=weight, unit_bonus=0.4)
    search = BeamSearch(section, Bigrams())
    search.read(np.log(rows))

    def score(text):
        pairs = itertools.pairwise((0, *text, 0))
        return np.log(by_text(rows)[text]) + weight * sum(Bigrams.table[pair] for pair in pairs) + 0.4 * len(text)

    assert tuple(search.finish()) == max(by_text(rows), key=score)


@pytest.mark.parametrize("language", [None, Bigrams()])
def test_a_recording_in_parts_is_the_same_text(language):
    rows = np.log(probabilities(60))
    section = DecodeSection(beam_size=6, ngram_order=2 if language else 0)
    whole, parts = BeamSearch(section, language), BeamSearch(section, language)
    whole.read(rows)
    for begin in range(0, 60, 7):
        parts.read(rows[begin : begin + 7])
    assert len(parts.settled) > 10  # and is not carried along
    assert parts.finish() == whole.finish()
