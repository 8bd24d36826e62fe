"""Counts and probabilities of n-grams, against the definitions spelt out."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbatch.recipes.core.data import ngrams as module
from bigbatch.recipes.core.data.ngrams import count_ngrams, discounts_by_formula, distribution
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.next_word import recipe
from bigbatch.recipes.next_word.config import NextWordConfig
from bigbatch.recipes.next_word.data import look_up
from bigbatch.recipes.next_word.ngram import KneserNey
from bigbatch.recipes.next_word.tables import open_tables

ROOT = Path(__file__).parents[3]
END, SIZE, ORDER = 0, 9, 3
TEXT = np.random.default_rng(4).choice(np.arange(8), 400, p=np.array([1, 30, 20, 15, 12, 10, 7, 5]) / 100)  # 8 never
PADDED = [END] * ORDER + TEXT.tolist()


def kneser_ney_counts() -> list[dict[tuple[int, ...], int]]:
    """Return by definition: occurrences of the longest n-grams, different words before the shorter ones."""
    longest = [tuple(PADDED[end - ORDER + 1 : end + 1]) for end in range(ORDER, len(PADDED))]
    counts: list[dict[tuple[int, ...], int]] = [Counter(longest)]
    for _ in range(ORDER - 1):
        before = defaultdict(set)
        for ngram in counts[0]:
            before[ngram[1:]].add(ngram[0])
        counts.insert(0, {ngram: len(words) for ngram, words in before.items()})
    return counts


COUNTS = kneser_ney_counts()


def probability(word: int, context: tuple[int, ...], discounts: list[list[float]]) -> float:
    """Return p(word | context) by the recursion of Chen and Goodman, every sum taken over the whole vocabulary."""
    lower = probability(word, context[1:], discounts) if context else 1 / SIZE
    counts = [COUNTS[len(context)].get((*context, other), 0) for other in range(SIZE)]
    if not sum(counts):
        return lower
    discounted = [count - (0, *discounts[len(context)])[min(count, 3)] for count in counts]
    freed = sum(count - kept for count, kept in zip(counts, discounted, strict=True))
    return (discounted[word] + freed * lower) / sum(counts)


@pytest.fixture(scope="module")
def tables():
    return count_ngrams([TEXT[:150].astype(np.uint16), TEXT[150:].astype(np.uint16)], SIZE, END, ORDER)


def test_the_tables_hold_the_counts_by_definition(tables):
    spelt: list[tuple[int, ...]] = [()]
    for table, expected in zip(tables.by_length, COUNTS, strict=True):
        spelt = [(*spelt[key // SIZE], key % SIZE) for key in table.keys.tolist()]
        found = dict(zip(spelt, table.counts.tolist(), strict=True))
        assert {ngram: count for ngram, count in found.items() if count} == expected


def test_counts_do_not_depend_on_the_blocks_that_a_text_is_read_in(tables, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 7)
    for table, other in zip(tables.by_length, count_ngrams([TEXT], SIZE, END, ORDER).by_length, strict=True):
        for array, same in zip(table, other, strict=True):
            np.testing.assert_array_equal(array, same)


def test_discounts_are_those_of_the_formula(tables):
    n1, n2, n3, n4 = (sum(count == small for count in COUNTS[2].values()) for small in (1, 2, 3, 4))
    share = n1 / (n1 + 2 * n2)
    expected = [1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3]
    assert discounts_by_formula(tables.by_length[2]) == pytest.approx(expected)
    assert discounts_by_formula(tables.by_length[0]) == [0.5, 1.0, 1.5]  # no word stands behind one other alone


def test_the_loss_and_the_distribution_are_those_of_the_recursion(tables):
    discounts = [[0.4, 0.9, 1.7], [0.7, 1.1, 1.4], [0.8, 1.3, 2.2]]
    model = KneserNey(SIZE, discounts)
    np.testing.assert_allclose(model.discounts().detach(), discounts, rtol=1e-6)
    words = np.array([5, 7, 1, 1, 2, 8, 3, 0, 0, 1, 6, 6])  # with a word and contexts that never occurred
    statistics = torch.from_numpy(look_up(tables, words))
    for end in range(ORDER - 1, len(words)):
        context = tuple(words[end - ORDER + 1 : end].tolist())
        expected = [probability(word, context, discounts) for word in range(SIZE)]
        assert sum(expected) == pytest.approx(1)
        np.testing.assert_allclose(distribution(tables, np.array(discounts), words[:end]), expected, rtol=1e-9)
        label = torch.tensor([words[end]])
        loss = model(statistics[end : end + 1], label)
        assert loss.item() == pytest.approx(-np.log(expected[words[end]]), rel=1e-5)
        assert model(statistics[end : end + 1], torch.tensor([-100])).item() == 0


@pytest.mark.parametrize("first", [5, 8])
def test_behind_a_single_word_there_is_no_longer_context(tables, first):
    discounts = np.array([[0.5, 1.0, 1.5]] * ORDER)
    expected = [probability(word, (first,), discounts.tolist()) for word in range(SIZE)]
    np.testing.assert_allclose(distribution(tables, discounts, np.array([first])), expected)


def test_trigrams_of_wikitext2s_validation_text_are_better_on_its_test_text_than_plain_pairs_of_words(tmp_path):
    """By the count of the data's own page: 562 for single words, 276 for pairs, the best of plain n-grams."""
    data = Path(os.environ.get("BIGBATCH_TEST_DATA", ROOT.parent / "shared" / "data")) / "wikitext2_valid_test"
    if not data.is_dir():
        pytest.skip(f"NO REAL DATA: {data} does not exist; set BIGBATCH_TEST_DATA")
    document = json.loads((ROOT / "ds_configs/next_word/wikitext2_ngram.v1.json").read_text())
    document["data"] |= {"train": [str(data / "valid.txt")], "test": [str(data / "test.txt")]}
    document["data"]["prepared_dir"] = str(tmp_path)
    document["model"] |= {"order": 3}
    config = NextWordConfig.model_validate_json(json.dumps(document))
    recipe.prepare(config)
    splits = recipe.open_data(config)
    assert splits.facts["vocabulary_size"] == 13_777 + 1  # and the end of the text
    assert splits.facts["counted_tokens"] == 217_646 + 1
    assert splits.test is not None
    batch = splits.test.batch(ids := np.arange(splits.test.num_samples), np.zeros_like(ids))
    assert recipe.count_targets(batch) == 245_569 + 1
    with torch.no_grad():  # the discounts are those of the formula still
        found = recipe.loss(
            recipe.build_model(config, splits.facts), {k: torch.from_numpy(v) for k, v in batch.items()}
        )
    assert recipe.metrics(found.sum.item() / found.num_targets)["perplexity"] == pytest.approx(231.3, abs=0.3)


def test_counts_of_another_text_and_damaged_ones_are_refused(tmp_path, make_document):
    config = NextWordConfig.model_validate_json(json.dumps(make_document(tmp_path, "ngram")))
    folder = recipe.prepare(config)
    whole, part = recipe._counted(config, folder)
    assert part == int(0.75 * whole)
    assert open_tables(folder, 3, whole).vocabulary_size == 31
    record = folder / f"ngrams_3_{whole}" / "ngrams.json"
    text = record.read_text()
    record.write_text(text.replace('"text": "', '"text": "0'))
    with pytest.raises(UserError, match="counts of another text"):
        open_tables(folder, 3, whole)
    record.write_text(text)
    (record.parent / "keys_2.npy").unlink()
    with pytest.raises(UserError, match="no counts of n-grams"):
        open_tables(folder, 3, whole)
