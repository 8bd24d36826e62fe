"""Rankings against scikit-learn's figures, BM25's formula written out, and hand-made cases."""

import math
import re

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from bigbatch.recipes.match.config import SearchSection
from bigbatch.recipes.match.ranking import Lexical, Ranked, fuse, judge, top, without

TEXTS = ("red rose garden", "blue rose blue wall", "the old oven kitchen", "rose rose rose red", "")


def test_figures_of_whole_rankings_are_scikit_learns():
    generator = np.random.default_rng(3)
    scores = generator.random((40, 30))
    grades = generator.integers(0, 4, (40, 30)) * (generator.random((40, 30)) < 0.3)
    grades[grades.sum(1) == 0, 0] = 1
    right = [{place: float(grade) for place, grade in enumerate(row) if grade} for row in grades]
    found = judge([top(row, 30) for row in scores], right)
    assert found["ndcg@10"] == pytest.approx(ndcg_score(grades, scores, k=10))
    precisions = [average_precision_score(row > 0, values) for row, values in zip(grades, scores, strict=True)]
    assert found["map"] == pytest.approx(np.mean(precisions))
    order = np.argsort(-scores, axis=1)
    hits = np.take_along_axis(grades > 0, order, 1)
    assert found["recall@10"] == pytest.approx(np.mean(hits[:, :10].sum(1) / (grades > 0).sum(1)))
    assert found["mrr@10"] == pytest.approx(np.mean([1 / (1 + row.argmax()) * (row.argmax() < 10) for row in hits]))


def test_what_is_not_found_counts_as_nothing():
    found = judge([Ranked(np.array([4, 7]), np.array([2.0, 1.0]))], [{7: 1.0, 9: 3.0}])
    assert found["map"] == pytest.approx((1 / 2) / 2)
    assert found["recall@10"] == pytest.approx(1 / 2)
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert judge([Ranked(np.zeros(0, np.int64), np.zeros(0))], [{7: 1.0}]) == dict.fromkeys(found, 0.0)


def test_words_with_one_stem_are_one_word_where_asked_to_be():
    texts = ["the flow over wings", "flowing flows", "a wing"]
    assert [one.documents.tolist() for one in Lexical(texts).rank(["flow", "wings"], 9)] == [[0], [0]]
    stemmed = Lexical(texts, "english").rank(["flowed", "wings"], 9)
    assert [one.documents.tolist() for one in stemmed] == [[1, 0], [2, 0]]


def test_bm25_is_lucenes_formula():
    """Scores of (https://doi.org/10.1561/1500000019, section 3) with the idf that is never negative."""
    words = [re.findall(r"\w\w+", text) for text in TEXTS]
    words = [[word for word in text if word != "the"] for text in words]
    mean = np.mean([len(text) for text in words])

    def score(query, text):
        total = 0.0
        for word in query:
            holders, count = sum(word in other for other in words), text.count(word)
            idf = math.log(1 + (len(words) - holders + 0.5) / (holders + 0.5))
            total += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
        return total

    (found,) = Lexical(TEXTS).rank(["the red rose"], depth=10)
    expected = np.array([score(["red", "rose"], text) for text in words])
    assert found.documents.tolist() == [int(n) for n in np.argsort(-expected, kind="stable") if expected[n] > 0]
    ours, theirs = found.scores, expected[found.documents]
    assert ours / ours[0] == pytest.approx(theirs / theirs[0], rel=1e-5)


def test_a_query_without_a_known_word_finds_nothing():
    assert [len(found.documents) for found in Lexical(TEXTS).rank(["zebra", "the", ""], 10)] == [0, 0, 0]


def test_equal_scores_stand_in_the_order_of_their_documents_whatever_the_depth():
    scores = np.array([1.0, 3.0, 1.0, 3.0, 1.0])
    assert top(scores, 5).documents.tolist() == [1, 3, 0, 2, 4]
    assert top(scores, 3).documents.tolist() == [1, 3, 0]
    assert without(top(scores, 5), [3, 0]).documents.tolist() == [1, 2, 4]


def test_two_rankings_are_fused_by_rank_or_by_score():
    words = Ranked(np.array([5, 2]), np.array([9.0, 8.0]))
    model = Ranked(np.array([2, 7, 5]), np.array([0.9, 0.8, 0.1]))
    by_rank = fuse(words, model, SearchSection())
    assert by_rank.documents.tolist() == [2, 5, 7]
    assert by_rank.scores == pytest.approx([1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62])
    by_score = fuse(words, model, SearchSection(fusion="sum", bm25_weight=0.75))
    assert by_score.documents.tolist() == [5, 2, 7]
    assert by_score.scores == pytest.approx([0.75, 0.25, 0.25 * 0.7 / 0.8])
    nothing = Ranked(np.zeros(0, np.int64), np.zeros(0))
    assert fuse(nothing, model, SearchSection(fusion="sum")).documents.tolist() == [2, 7, 5]
