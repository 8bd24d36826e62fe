"""Samples with masked tokens, a pure function of (seed, sample id, epoch). B samples, T tokens each."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigbatch.recipes.bert_pretrain.config import MaskingSection
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.sampler import Order, random_words
from bigbatch.recipes.core.data.shards import IGNORED_LABEL, TokenSamples
from bigbatch.recipes.core.data.tokenizing import MASK, load_tokenizer
from bigbatch.recipes.core.errors import UserError

CHOICE, TREATMENT, REPLACEMENT = range(3)  # streams of random numbers


class Vocabulary(NamedTuple):
    """What masking knows of the tokens."""

    mask: int
    ordinary: np.ndarray  # int64, the tokens that are not special
    is_special: np.ndarray  # bool [V]
    goes_on: np.ndarray  # bool [V], a piece that continues a word


class Masked(NamedTuple):
    """Tokens with some of them masked."""

    tokens: np.ndarray  # int64 [B, T]
    targets: np.ndarray  # int64 [B, K], where the masked ones stand; K is the largest number in a row
    labels: np.ndarray  # int64 [B, K], what they were, IGNORED_LABEL where a row has fewer than K


class MaskedSamples:
    """The samples of a prepared split as `Samples`, masked anew in every epoch."""

    def __init__(self, samples: TokenSamples, vocabulary: Vocabulary, section: MaskingSection, seed: int) -> None:
        self.samples, self.vocabulary, self.section, self.seed = samples, vocabulary, section, seed
        self.num_samples, self.mean_tokens = samples.num_samples, samples.sequence_length
        content = f"{samples.fingerprint} {section.model_dump_json()} {seed}"
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return tokens [B, T], targets and labels [B, K] (`Masked`); positions and documents where kept apart."""
        batch = self.samples.batch(sample_ids, epochs)
        masked = mask_tokens(batch["tokens"], Order(sample_ids, epochs), self.vocabulary, self.section, self.seed)
        return batch | masked._asdict()


def mask_tokens(tokens: np.ndarray, order: Order, vocabulary: Vocabulary, section: MaskingSection, seed: int) -> Masked:
    """Mask tokens [B, T] as BERT does (https://arxiv.org/abs/1810.04805, appendix A.1), special ones never.

    Of each row the share `section.fraction` is chosen, rounded, at least one; with whole words it may be a few less,
    as the word that would exceed it is left out.
    """
    chosen = _choose(tokens, random_words(seed, order, CHOICE, tokens.shape[1]), vocabulary, section)
    treatment = random_words(seed, order, TREATMENT, tokens.shape[1]) / 2.0**64  # in 0..1
    replacement = random_words(seed, order, REPLACEMENT, tokens.shape[1]) % np.uint64(len(vocabulary.ordinary))
    becomes_random = treatment < section.masked_share + section.random_share
    treated = np.where(becomes_random, vocabulary.ordinary[replacement.astype(np.int64)], tokens)
    treated = np.where(treatment < section.masked_share, vocabulary.mask, treated)
    num_targets = max(1, chosen.sum(axis=1).max())
    targets = np.argsort(~chosen, axis=1, kind="stable")[:, :num_targets]
    labels = np.take_along_axis(np.where(chosen, tokens, IGNORED_LABEL), targets, axis=1)
    return Masked(np.where(chosen, treated, tokens), targets, labels)


def read_vocabulary(folder: Path, whole_words: bool) -> Vocabulary:
    """Read what masking needs from a prepared folder's tokenizer; raise UserError for one that cannot mask."""
    loaded = load_tokenizer(folder)
    tokenizer = loaded.tokenizer
    mask = tokenizer.token_to_id(MASK)
    if mask is None:
        raise UserError("data.tokenizer", f"has no token {MASK}; kind 'wordpiece' has, and so has BERT's own")
    is_special = np.zeros(loaded.vocabulary_size, bool)
    is_special[[number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = True
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    if whole_words and not prefix:
        raise UserError("masking.whole_words", "needs a tokenizer that marks the pieces of a word, such as a wordpiece")
    goes_on = np.zeros(loaded.vocabulary_size, bool)
    if prefix:
        goes_on[[number for token, number in tokenizer.get_vocab().items() if token.startswith(prefix)]] = True
    return Vocabulary(mask, np.flatnonzero(~is_special), is_special, goes_on)


def _choose(tokens: np.ndarray, chances: np.ndarray, vocabulary: Vocabulary, section: MaskingSection) -> np.ndarray:
    """Return which tokens [B, T] are chosen: those of the smallest chances; the pieces of a word share the first's."""
    length = tokens.shape[1]
    if section.whole_words:
        begins = np.where(vocabulary.goes_on[tokens], 0, np.arange(length))
        chances = np.take_along_axis(chances, np.maximum.accumulate(begins, axis=1), axis=1)
    is_special = vocabulary.is_special[tokens]
    chances = np.where(is_special, np.uint64(2**64 - 1), chances)
    counts = np.rint(section.fraction * (length - is_special.sum(axis=1, keepdims=True))).astype(np.int64)
    bounds = np.take_along_axis(np.sort(chances, axis=1), counts.clip(1, length - 1), axis=1)
    return chances < bounds
