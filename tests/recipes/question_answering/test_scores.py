"""The official rules by hand-computed cases, and the threshold against trying every one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.recipes.question_answering.scores import (
    Judged,
    exact_match,
    fit_threshold,
    intervals,
    normalized,
    score,
    word_f1,
)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The  Cat's hat!", "cats hat"),
        ("an A. the a", ""),
        ("theatre, another", "theatre another"),  # articles are whole words
        ("U.S.A", "usa"),
        ("twenty-one\n(21)", "twentyone 21"),
        ("Ünïted « Nations »", "ünïted « nations »"),  # punctuation is ASCII's
    ],
)
def test_texts_are_compared_without_capitals_punctuation_articles_and_spaces(text, left):
    assert normalized(text) == left


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos", "the Broncos"], 1, 1),
        ("The Broncos!", ["Denver Broncos", "Broncos"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),  # precision 1, recall 1/2
        ("in the old town of Bern", ["Bern", "the old town"], 0, 4 / 7),  # 5 words; 2 of 2 in common with the second
        ("no no yes", ["no yes yes"], 0, 2 / 3),  # two words in common, each counted once
        ("Basel", ["Bern"], 0, 0),
        ("", [], 1, 1),
        ("Bern", [], 0, 0),
        ("", ["Bern"], 0, 0),
        ("the", [], 1, 1),  # an article alone is no answer either
        ("", ["the", "Bern"], 0, 0),  # nothing is left of the first, so the second is the only one
        ("", ["a"], 1, 1),
    ],
)
def test_exact_match_and_f1_follow_the_official_rules(answer, golds, exact, f1):
    assert exact_match(answer, golds) == exact
    assert word_f1(answer, golds) == pytest.approx(f1)


margins_and_worths = st.lists(
    st.tuples(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), st.sampled_from([0.0, 0.4, 1.0]), st.booleans()), min_size=1
)


def judged_of(rows):
    margins = np.array([row[0] for row in rows])
    null = np.array([float(row[2]) for row in rows])
    f1 = np.where(null == 1, 0.0, np.array([row[1] for row in rows]))
    return Judged((f1 == 1).astype(float), f1, null, f1 == 1, margins)


@given(margins_and_worths)
def test_no_threshold_has_a_better_f1_than_the_fitted_one(rows):
    judged = judged_of(rows)

    def f1_at(threshold):
        return np.where(judged.margins > threshold, judged.null, judged.f1).mean()

    every = [f1_at(threshold) for threshold in (-9.0, -2.0, -0.5, 0.2, 1.0, 9.0)]
    assert f1_at(fit_threshold(judged)) == pytest.approx(max(every))


def test_spans_are_right_where_a_gold_answer_stands_and_each_group_counts_alike():
    # Three dates: right, wrong, wrongly none. Two times: none rightly, given where there is none.
    judged = Judged(
        exact=np.array([1.0, 0, 0, 0, 0]),
        f1=np.array([1.0, 0.5, 1, 0, 0]),
        null=np.array([0.0, 0, 0, 1, 1]),
        is_span=np.array([True, False, True, False, False]),
        margins=np.array([-1.0, -1, 1, 1, -1]),
    )
    groups = np.array(["date", "date", "date", "time", "time"])
    found = score(judged, 0.0, groups, ["date", "time"])
    assert found["exact_match"] == pytest.approx(2 / 5)
    assert found["f1"] == pytest.approx((1 + 0.5 + 0 + 1 + 0) / 5)
    assert (found["f1_with_answer"], found["f1_without_answer"]) == (0.5, 0.5)
    assert found["span_precision"] == pytest.approx(1 / 3)
    assert found["span_recall"] == pytest.approx(1 / 3)
    assert found["span_f1"] == pytest.approx(2 / 6)
    assert found["span_f1/date"] == pytest.approx(2 / 5)
    assert found["span_f1/time"] == 0
    assert found["span_f1_macro"] == pytest.approx(1 / 5)
    low, high = intervals(judged, 0.0, 500)["f1"]
    assert 0 <= low < 0.5 < high <= 1
