"""Masking: its statistics, its purity, and what it leaves alone."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from bigbatch.recipes.bert_pretrain import recipe
from bigbatch.recipes.bert_pretrain.config import BertPretrainConfig, MaskingSection
from bigbatch.recipes.bert_pretrain.data import MaskedSamples, Vocabulary, mask_tokens
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.errors import UserError

SIZE, SPECIAL, MASK, LENGTH = 1000, 5, 4, 128
CLASS, SEPARATOR = 2, 3


def vocabulary():
    """Return 1,000 tokens: five special ones, and every third of the rest goes on with a word."""
    numbers = np.arange(SIZE)
    is_special = numbers < SPECIAL
    return Vocabulary(MASK, np.flatnonzero(~is_special), is_special, (numbers % 3 == 0) & ~is_special)


def rows(count=400):
    tokens = np.random.default_rng(0).integers(SPECIAL, SIZE, (count, LENGTH))
    tokens[:, 0], tokens[:, -1], tokens[:, 60], tokens[:, 61] = CLASS, SEPARATOR, SEPARATOR, CLASS
    return tokens


def order_of(count=400, epoch=0):
    return Order(np.arange(count), np.full(count, epoch))


def unmasked(masked):
    """Put the labels back where they were."""
    tokens, counts = masked.tokens.copy(), masked.labels != -100
    places = np.broadcast_to(np.arange(len(tokens))[:, None], counts.shape)[counts]
    tokens[places, masked.targets[counts]] = masked.labels[counts]
    return tokens


@pytest.mark.parametrize("whole_words", [False, True])
def test_labels_are_the_tokens_that_stood_there_and_nothing_else_has_changed(whole_words):
    section = MaskingSection(whole_words=whole_words)
    masked = mask_tokens(rows(), order_of(), vocabulary(), section, seed=1)
    assert (unmasked(masked) == rows()).all()
    counts = masked.labels != -100
    assert (masked.labels[counts] >= SPECIAL).all()  # no special token is ever a target
    for targets, counted in zip(masked.targets, counts, strict=True):
        assert len(set(targets[counted])) == counted.sum()


def test_fifteen_percent_of_each_row_are_targets_and_of_them_80_10_10():
    masked = mask_tokens(rows(), order_of(), vocabulary(), MaskingSection(), seed=1)
    counts = masked.labels != -100
    assert (counts.sum(1) == round(0.15 * (LENGTH - 4))).all()
    now = np.take_along_axis(masked.tokens, masked.targets, axis=1)[counts]
    then, total = masked.labels[counts], counts.sum()
    assert (now == MASK).sum() / total == pytest.approx(0.8, abs=0.015)  # three deviations of 7,600 draws
    assert (now == then).sum() / total == pytest.approx(0.1, abs=0.011)
    others = now[(now != MASK) & (now != then)]
    assert len(others) / total == pytest.approx(0.1, abs=0.011)
    assert others.min() >= SPECIAL
    assert np.histogram(others, bins=5, range=(SPECIAL, SIZE))[0] / len(others) == pytest.approx(0.2, abs=0.05)


def test_every_place_is_as_likely_as_any_other():
    tokens = np.full((6000, 20), 7)
    masked = mask_tokens(tokens, order_of(6000), vocabulary(), MaskingSection(fraction=0.2), seed=2)
    shares = np.bincount(masked.targets.ravel(), minlength=20) / 6000
    assert shares == pytest.approx(0.2, abs=0.021)  # four deviations


def test_shares_are_followed():
    section = MaskingSection(fraction=0.5, masked_share=0.0, random_share=0.0)
    masked = mask_tokens(rows(), order_of(), vocabulary(), section, seed=1)
    assert (masked.tokens == rows()).all()
    assert (masked.labels != -100).sum(1).tolist() == [62] * 400


def test_a_sample_is_masked_alike_in_any_company_and_otherwise_in_another_epoch_or_run():
    whole = mask_tokens(rows(), order_of(), vocabulary(), MaskingSection(), seed=1)
    picked = np.array([17, 3, 399])
    alone = mask_tokens(rows()[picked], Order(picked, np.zeros(3, int)), vocabulary(), MaskingSection(), seed=1)
    for field in range(3):
        assert (alone[field] == whole[field][picked]).all()
    for seed, epoch in ((1, 1), (2, 0)):
        other = mask_tokens(rows(), order_of(epoch=epoch), vocabulary(), MaskingSection(), seed=seed)
        same = np.mean([len(set(a) & set(b)) for a, b in zip(other.targets, whole.targets, strict=True)])
        assert same == pytest.approx(19 * 19 / 124, abs=0.4)  # as many as two independent draws share


def test_whole_words_are_masked_whole():
    known = vocabulary()
    masked = mask_tokens(rows(), order_of(), known, MaskingSection(whole_words=True), seed=1)
    chosen = np.zeros((400, LENGTH), bool)
    for row, targets, labels in zip(chosen, masked.targets, masked.labels, strict=True):
        row[targets[labels != -100]] = True
    goes_on = known.goes_on[rows()]
    inside = goes_on & ~np.roll(known.is_special[rows()], 1, axis=1)
    inside[:, 0] = False
    assert (chosen[inside] == np.roll(chosen, 1, axis=1)[inside]).all()
    assert chosen.sum(1).max() == round(0.15 * 124)
    assert chosen.sum(1).mean() > 17  # a little less than 19: a word that would exceed is left out


def test_shares_that_exceed_the_whole_are_refused():
    with pytest.raises(ValueError, match=r"masked_share and random_share are 1\.1 together; right is 1 or less"):
        MaskingSection(masked_share=0.9, random_share=0.2)


def config_of(document):
    return BertPretrainConfig.model_validate_json(json.dumps(document))


@pytest.fixture(scope="module")
def opened(make_document, tmp_path_factory):
    config = config_of(make_document(tmp_path_factory.mktemp("bert")))
    recipe.prepare(config)
    return config, recipe.open_data(config)


def test_documents_stand_between_class_and_separator_and_no_position_is_padding(opened, made_documents):
    config, data = opened
    tokenizer = Tokenizer.from_file(f"{data.facts['tokenizer']}/tokenizer.json")
    stream = []
    for split in (data.train, data.validation):
        ids = np.arange(split.num_samples)
        stream.append(unmasked_stream(split.batch(ids, np.zeros_like(ids))))
    expected = {tuple(tokenizer.encode(text).ids) for text in made_documents}
    names = [tokenizer.id_to_token(token) for token in next(iter(expected))]
    assert (names[0], names[-1]) == ("[CLS]", "[SEP]")
    found = set()
    for tokens in stream:
        assert (tokens != tokenizer.token_to_id("[PAD]")).all()
        ends = np.flatnonzero(tokens == data.facts["end_of_text"]) + 1
        found |= {tuple(part.tolist()) for part in np.split(tokens, ends)[:-1]}
    assert found <= expected
    assert len(found) > 100
    assert config.data.packing == "isolate"


def unmasked_stream(batch):
    tokens = batch["tokens"].copy()
    for row, targets, labels in zip(tokens, batch["targets"], batch["labels"], strict=True):
        row[targets[labels != -100]] = labels[labels != -100]
    return tokens.ravel()


def test_the_fingerprint_follows_the_masking_and_the_seed(opened):
    config, data = opened
    train = data.train
    assert train.fingerprint == MaskedSamples(train.samples, train.vocabulary, config.masking, 3).fingerprint
    others = [(MaskingSection(fraction=0.2), 3), (MaskingSection(whole_words=True), 3), (MaskingSection(), 4)]
    fingerprints = {MaskedSamples(train.samples, train.vocabulary, *other).fingerprint for other in others}
    assert len(fingerprints | {train.fingerprint}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"tokenizer": {"kind": "character"}}}, r"data\.tokenizer: has no token \[MASK\]; kind 'wordpiece'"),
        ({"sample": {"prompts": ["no gap"]}}, r"sample\.prompts\[0\]: 'no gap' has nothing to fill in; write \[MASK\]"),
        ({"sample": {"prompts": ["[MASK] " * 60]}}, r"sample\.prompts\[0\]: .* has 62 tokens; at most 40"),
    ],
)
def test_what_cannot_be_masked_is_told_when_the_data_are_opened(changes, message, make_document, tmp_path):
    document = make_document(tmp_path)
    for section, settings in changes.items():
        document[section] = {**document.get(section, {}), **settings}
    config = config_of(document)
    recipe.prepare(config)
    with pytest.raises(UserError, match=message):
        recipe.open_data(config)
