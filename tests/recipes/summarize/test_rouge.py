"""ROUGE, labels, and the choice of sentences: against the library's own figures and networkx's PageRank."""

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from bigbatch.recipes.summarize.choosing import choose, lead, text_rank
from bigbatch.recipes.summarize.rouge import KINDS, Rouge, Words, intervals

SENTENCES = [
    "The committee discussed the cost of the new bridge.",
    "A bridge costs money.",
    "It was Tuesday.",
    "The new bridge, the committee found, costs too much money.",
    "Nothing else!",
]
REFERENCES = ["The committee found the bridge too costly.\nNothing else was on Tuesday.", "a meeting about money"]


@given(st.text())
def test_words_are_those_of_the_library(text):
    assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


def test_each_figure_is_the_librarys_against_the_reference_that_is_best_by_it():
    library = RougeScorer(KINDS, use_stemmer=True)
    text = "\n".join(SENTENCES[:3])
    each = [library.score(reference, text) for reference in REFERENCES]
    expected = [max(found[kind].fmeasure for found in each) for kind in KINDS]
    assert Rouge().score(text, REFERENCES).tolist() == pytest.approx(expected)
    assert Rouge().score("?", REFERENCES).tolist() == [0, 0, 0, 0]


def test_labels_are_what_a_greedy_search_with_the_librarys_figures_finds():
    library = RougeScorer(["rouge1", "rouge2"], use_stemmer=True)

    def worth(chosen):
        text = " ".join(SENTENCES[number] for number in sorted(chosen))
        found = [library.score(reference, text) for reference in REFERENCES]
        return max(np.mean([score.fmeasure for score in scores.values()]) for scores in found)

    alone = [worth([number]) for number in range(len(SENTENCES))]
    expected: list[int] = []
    while rest := [number for number in range(len(SENTENCES)) if number not in expected]:
        best = max(rest, key=lambda number: worth([*expected, number]))
        if expected and worth([*expected, best]) <= worth(expected):
            break
        expected.append(best)
    labels, worths = Rouge().label(SENTENCES, REFERENCES, most=5)
    assert worths == pytest.approx(alone)
    assert labels == sorted(expected)
    assert len(labels) == 3
    assert Rouge().label(SENTENCES, REFERENCES, most=1)[0] == [int(np.argmax(alone))]
    assert Rouge().label(["Water!", "?"], REFERENCES, most=3) == ([], [0.0, 0.0])


def test_sentences_with_a_trigram_of_a_better_one_are_left_out():
    words = [text.split() for text in ("a b c d", "x a b c", "a b x", "y z")]
    scores = [3.0, 2.5, 2.0, 1.0]
    assert choose(scores, words, 2, block_trigrams=False) == [0, 1]
    assert choose(scores, words, 2, block_trigrams=True) == [0, 2]
    assert choose(scores, words, 9, block_trigrams=True) == [0, 2, 3]
    assert choose([1.0, 1.0, 2.0], words, 2, block_trigrams=False) == [0, 2]
    assert lead(2, 3) == [0, 1]


def test_text_rank_is_the_page_rank_of_sentences_that_share_words():
    words = Words()
    found = [words.tokenize(sentence) for sentence in SENTENCES]
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(found)))
    for one in range(len(found)):
        for other in range(one):
            shared = len(set(found[one]) & set(found[other]))
            weight = shared / (np.log(len(found[one])) + np.log(len(found[other])))
            if weight:
                graph.add_edge(one, other, weight=weight)
    ranks = networkx.pagerank(graph, tol=1e-12)
    for count in range(1, 5):
        best = sorted(ranks, key=lambda number: (-round(ranks[number], 9), number))[:count]
        assert text_rank(SENTENCES, words, count) == sorted(best)
    assert text_rank(["?", "!"], words, 1) == [0]


def test_intervals_are_those_of_the_mean_of_a_normal_sample():
    values = np.random.default_rng(3).normal(0.3, 0.1, size=(400, len(KINDS)))
    around = intervals(values, 2000)
    for place, kind in enumerate(KINDS):
        half = 1.96 * values[:, place].std() / 20
        assert around[kind] == pytest.approx((values[:, place].mean() - half, values[:, place].mean() + half), abs=1e-3)
