"""The official rule of SemEval-2010 task 8 by worked numbers, and entities by hand."""

import numpy as np
import pytest

from bigbatch.recipes.extract.scores import (
    entity_counts,
    entity_figures,
    interval,
    relation_counts,
    relation_figures,
)


def test_the_official_macro_f1_by_worked_numbers():
    """A wrong direction is given and there, but not right; Other is no class of its own, yet what it hides is missed.

    A: given (e1,e2) twice right, once with the wrong direction, once for Other: 2 of 4; there 4, one of them taken for
    Other: 2 of 4. B: given once, right; there twice. So F1 are 1/2 and 2/3.
    """
    gold = ["A(e1,e2)", "A(e1,e2)", "A(e2,e1)", "A(e1,e2)", "Other", "B(e2,e1)", "B(e2,e1)", "Other"]
    given = ["A(e1,e2)", "A(e1,e2)", "A(e1,e2)", "Other", "A(e2,e1)", "B(e2,e1)", "Other", "Other"]
    found = relation_figures(gold, given, "Other")
    assert found["relation_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (found["precision"], found["recall"]) == pytest.approx(((2 / 4 + 1) / 2, (2 / 4 + 1 / 2) / 2))
    assert (found["f1/A"], found["f1/B"], found["accuracy"]) == pytest.approx((1 / 2, 2 / 3, 4 / 8))
    names, counts = relation_counts(gold, given, "Other")
    assert names == ["A", "B"]
    assert counts.sum(0).tolist() == [[2, 4, 4], [1, 1, 2]]


def test_a_relation_that_is_never_given_counts_as_nothing():
    assert relation_figures(["A(e1,e2)", "B"], ["A(e1,e2)", "Other"], "Other")["relation_f1"] == pytest.approx(0.5)


def test_an_entity_is_right_as_a_whole_alone():
    gold = [["B-x", "I-x", "O", "B-y"], ["O", "B-x"]]
    given = [["B-x", "O", "O", "B-y"], ["B-x", "B-x"]]
    found = entity_figures(gold, given)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((2 / 4, 2 / 3, 4 / 7))
    assert (found["f1/x"], found["f1/y"]) == pytest.approx((2 * 1 / (3 + 2), 1.0))
    counts = entity_counts(gold, given)
    assert counts.tolist() == [[[1, 2, 2]], [[1, 2, 1]]]
    assert entity_figures([["O"]], [["O"]])["f1"] == 0.0


def test_an_interval_holds_the_figure_and_is_as_wide_as_a_share_is_unsure():
    counts = np.array([[[right, 1, 1]] for right in (0, 1) * 200])  # F1 is the share that is right
    low, high = interval(counts)
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(400), rel=0.15)
