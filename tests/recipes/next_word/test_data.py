"""Stretches of text as samples."""

import json

import numpy as np
import pytest

from bigbatch.recipes.core.data.shards import Stream
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.next_word import recipe
from bigbatch.recipes.next_word.config import NextWordConfig
from bigbatch.recipes.next_word.data import TextSamples

LENGTH = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory, make_document):
    data = {"shard_tokens": 500}  # stretches lie across the ends of shards
    document = make_document(tmp_path_factory.mktemp("data"), "lstm", data=data)
    return NextWordConfig.model_validate_json(json.dumps(document))


@pytest.fixture(scope="module")
def folder(config):
    return recipe.prepare(config)


def whole(folder, split):
    return np.concatenate(Stream(folder, split).parts).astype(np.int64)


@pytest.mark.parametrize(("context", "begin"), [(0, 0), (5, 0), (5, 777)])
def test_every_word_is_a_target_once_behind_those_before_it(folder, context, begin):
    text = whole(folder, "train")
    samples = TextSamples(folder, "train", LENGTH, context, begin)
    batch = samples.batch(np.arange(samples.num_samples), np.zeros(samples.num_samples, np.int64))
    assert batch["tokens"].shape == (samples.num_samples, context + LENGTH)
    assert batch["labels"].shape == (samples.num_samples, LENGTH)
    is_target = batch["labels"] >= 0
    np.testing.assert_array_equal(batch["labels"][is_target], text[begin:])
    padded = np.concatenate([np.zeros(context + 1, np.int64), text])  # end-of-text is token 0
    starts = begin + np.arange(samples.num_samples) * LENGTH
    for row, start in zip(batch["tokens"], starts.tolist(), strict=True):
        expected = padded[start : start + context + LENGTH]
        np.testing.assert_array_equal(row[: len(expected)], expected)


def test_stretches_begin_elsewhere_in_every_epoch_and_miss_less_than_one_of_them(folder):
    text = whole(folder, "train")
    samples = TextSamples(folder, "train", LENGTH, shift_seed=3)
    firsts = set()
    for epoch in range(6):
        ids = np.arange(samples.num_samples)
        batch = samples.batch(ids, np.full_like(ids, epoch))
        targets = batch["labels"][batch["labels"] >= 0]
        np.testing.assert_array_equal(targets, text[: len(targets)])
        assert len(text) - len(targets) < LENGTH
        firsts.add(int((batch["labels"][0] >= 0).sum()))
    assert len(firsts) > 2


def test_a_text_as_it_was_cut_into_words_has_its_words_and_line_ends_as_tokens(config, folder):
    facts = recipe.open_data(config).facts
    text = (folder.parents[1] / "test.txt").read_text()
    expected = [word for line in text.splitlines() for word in [*line.split(), "\n"]]
    names = recipe.load_tokenizer(folder).tokenizer
    found = [names.id_to_token(token) for token in whole(folder, "test").tolist()]
    assert found == [*expected, "<|endoftext|>"]
    assert facts["vocabulary_size"] == 31


def test_a_split_that_is_empty_is_refused(folder):
    num_tokens = Stream(folder, "train").num_tokens
    with pytest.raises(UserError, match=f"has {num_tokens} words; right is more than {num_tokens}"):
        TextSamples(folder, "train", LENGTH, begin=num_tokens)
