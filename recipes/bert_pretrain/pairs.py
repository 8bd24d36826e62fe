"""Rows of two segments, a pure function of (seed, sample id, epoch). B samples, T tokens each, L tokens of a window.

A document is cut into chunks of no more than T - 3 tokens, and each chunk is a sample. A chunk begins and ends, where
it can, between sentences, and so do the two segments that it is cut into.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from bigbatch.recipes.bert_pretrain.config import MaskingSection
from bigbatch.recipes.bert_pretrain.data import Vocabulary, mask_tokens
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.manifest import STARTS_SUFFIX, read_manifest
from bigbatch.recipes.core.data.sampler import Order, random_words
from bigbatch.recipes.core.data.shards import TokenSamples
from bigbatch.recipes.core.data.tokenizing import CLASS, load_tokenizer
from bigbatch.recipes.core.errors import UserError

PAIRS = 3  # the stream of random numbers next to the mask's
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")
SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]
LEAST_TOKENS = 2  # of a chunk: one a segment
MOST_SLACK = 32


class Chunks(NamedTuple):
    """A window of the stream for each chunk, and where in it the chunk lies; column 0 is the token before."""

    tokens: np.ndarray  # int64 [B, L]
    starts: np.ndarray  # int64 [B], of the columns
    stops: np.ndarray  # int64 [B]
    ends_sentence: np.ndarray  # bool [B, L]


class PairSamples:
    """The chunks of a prepared split as `Samples`, cut in two, paired and masked anew in every epoch.

    next_sentence (https://arxiv.org/abs/1810.04805, appendix A.2): half of the first segments are followed by the last
    sentences of a chunk of another document, as many as fit where the chunk's own were. sentence_order
    (https://arxiv.org/abs/1909.11942, section 3.1): half of the pairs are swapped.
    """

    def __init__(
        self,
        samples: TokenSamples,
        split: str,
        task: Literal["next_sentence", "sentence_order"],
        vocabulary: Vocabulary,
        section: MaskingSection,
        seed: int,
    ) -> None:
        """Index the documents of the split that `samples` reads; raise UserError where they give no pairs."""
        self.samples, self.task, self.vocabulary, self.section, self.seed = samples, task, vocabulary, section, seed
        room = samples.sequence_length - SPECIAL_TOKENS
        self.slack = min(MOST_SLACK, room // 4)  # how far a chunk may go on to end with a sentence
        self.stride = room - self.slack - LEAST_TOKENS + 1
        self.begin_of_text, self.ends_sentence = _read_tokenizer(samples.tokenizer_folder)
        bounds = _document_bounds(samples.tokenizer_folder, split)
        # Without the first and the last special token, and no further than `samples` reads.
        ends = np.minimum(bounds[1:] - 1, samples.num_samples * samples.sequence_length)
        lengths = ends - bounds[:-1] - 1
        kept = lengths >= LEAST_TOKENS
        self.begins, self.ends, lengths = bounds[:-1][kept] + 1, ends[kept], lengths[kept]
        needed = 2 if task == "next_sentence" else 1
        if len(lengths) < needed:
            raise UserError(f"data.{split}", f"has {len(lengths)} documents to cut; {task} needs {needed} or more")
        counts = np.maximum(1, -(-(lengths - self.slack - LEAST_TOKENS + 1) // self.stride))
        self.first_samples = np.concatenate([[0], np.cumsum(counts)])
        self.num_samples = int(self.first_samples[-1])
        self.mean_tokens = float(lengths.sum()) / self.num_samples + SPECIAL_TOKENS
        content = f"{samples.fingerprint} {task} {section.model_dump_json()} {seed}"
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return tokens [B, T], targets and labels [B, K] (`Masked`), and what tells the segments apart.

        These are segments [B, T] int64 (0 or 1), documents [B, T] int32 (0, padding 1), and pair_labels [B] int64, 0
        for a pair that belongs together in this order, else 1.
        """
        order = Order(sample_ids, epochs)
        coins, cuts, others = random_words(self.seed, order, PAIRS, 3).T
        chunks = self._chunks(sample_ids)
        middles = self._cut(chunks, cuts)
        first, second = np.stack([chunks.starts, middles]), np.stack([middles, chunks.stops])  # [2, B] start and stop
        labels = (coins >> np.uint64(63)).astype(np.int64)
        is_changed = labels == 1
        if self.task == "sentence_order":
            first, second = np.where(is_changed, second, first), np.where(is_changed, first, second)
            window = chunks.tokens
        else:
            other = self._chunks(self._of_other_documents(sample_ids, others))
            ending = _last_sentences(other, most=chunks.stops - middles) + chunks.tokens.shape[1]
            second = np.where(is_changed, ending, second)
            window = np.concatenate([chunks.tokens, other.tokens], axis=1)
        rows = self._lay_out(window, first, second)
        masked = mask_tokens(rows["tokens"], order, self.vocabulary, self.section, self.seed)
        return {**rows, **masked._asdict(), "pair_labels": labels}

    def _chunks(self, sample_ids: np.ndarray) -> Chunks:
        """Read chunks; where one ends and the next begins depends on the same tokens for both."""
        documents = np.searchsorted(self.first_samples, sample_ids, side="right") - 1
        numbers = sample_ids - self.first_samples[documents]
        is_last = sample_ids + 1 == self.first_samples[documents + 1]
        places = self.begins[documents] + numbers * self.stride
        tokens = self._read(places - 1, self.stride + self.slack + LEAST_TOKENS)
        ends_sentence = self.ends_sentence[tokens]
        # A boundary is put off to the next end of a sentence, if there is one within the slack.
        start = np.where(numbers == 0, 0, ends_sentence[:, : self.slack + 1].argmax(1))
        stop = self.stride + ends_sentence[:, self.stride : self.stride + self.slack + 1].argmax(1)
        stop = np.where(is_last, self.ends[documents] - places, stop)
        return Chunks(tokens, start + 1, stop + 1, ends_sentence)

    def _cut(self, chunks: Chunks, words: np.ndarray) -> np.ndarray:
        """Return where each second segment begins: behind any of the sentences but the last, else at any word."""
        columns = np.arange(chunks.tokens.shape[1])
        inside = (columns > chunks.starts[:, None]) & (columns < chunks.stops[:, None])
        choices = [inside & np.roll(chunks.ends_sentence, 1, axis=1), inside & ~self.vocabulary.goes_on[chunks.tokens]]
        choice = inside
        for better in reversed(choices):
            choice = np.where(better.any(1, keepdims=True), better, choice)
        chosen = (words % choice.sum(1).astype(np.uint64)).astype(np.int64)
        return (choice.cumsum(1) > chosen[:, None]).argmax(1)

    def _of_other_documents(self, sample_ids: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Draw for each sample one of another document's, each as likely."""
        documents = np.searchsorted(self.first_samples, sample_ids, side="right") - 1
        own_first, next_first = self.first_samples[documents], self.first_samples[documents + 1]
        drawn = (words % (self.num_samples - (next_first - own_first)).astype(np.uint64)).astype(np.int64)
        return np.where(drawn >= own_first, drawn + next_first - own_first, drawn)

    def _lay_out(self, window: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
        """Put [CLS] A [SEP] B [SEP] into rows; padding is [SEP], which no token sees and no mask takes."""
        columns = np.arange(self.samples.sequence_length)  # [T]
        middle = 1 + first[1] - first[0]  # [B], where the first [SEP] stands
        last = middle + 1 + second[1] - second[0]
        middle, last = middle[:, None], last[:, None]
        source = np.where(columns < middle, first[0][:, None] + columns - 1, second[0][:, None] + columns - middle - 1)
        is_text = (columns > 0) & (columns != middle) & (columns < last)
        tokens = np.take_along_axis(window, np.where(is_text, source, 0), axis=1)
        tokens = np.where(is_text, tokens, np.where(columns == 0, self.begin_of_text, self.samples.end_of_text))
        segments = ((columns > middle) & (columns <= last)).astype(np.int64)
        return {"tokens": tokens, "segments": segments, "documents": (columns > last).astype(np.int32)}

    def _read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the tokens [B, length] from `starts` [B] on; beyond the end of the split, any."""
        size = self.samples.sequence_length
        ids = np.minimum(np.stack([starts // size, starts // size + 1], axis=1), self.samples.num_samples - 1)
        windows = self.samples.batch(ids.ravel(), np.zeros(ids.size, np.int64))["tokens"].reshape(len(starts), -1)
        return np.take_along_axis(windows, (starts % size)[:, None] + np.arange(length), axis=1)


def _last_sentences(chunks: Chunks, most: np.ndarray) -> np.ndarray:
    """Return where the last whole sentences begin that have no more than `most` tokens, and end: [2, B].

    Where the last sentence alone has more, it is its last tokens.
    """
    columns = np.arange(chunks.tokens.shape[1])
    least = np.maximum(chunks.starts, chunks.stops - most)
    begins = np.roll(chunks.ends_sentence, 1, axis=1) | (columns == chunks.starts[:, None])
    choice = begins & (columns >= least[:, None]) & (columns < chunks.stops[:, None])
    return np.stack([np.where(choice.any(1), choice.argmax(1), least), chunks.stops])


def _read_tokenizer(folder: Path) -> tuple[int, np.ndarray]:
    """Return the token that begins a row, and which tokens end a sentence, bool [V]."""
    loaded = load_tokenizer(folder)
    if loaded.begin_of_text is None:
        raise UserError("data.tokenizer", f"has no token that begins a row, such as {CLASS}; sentence_task needs one")
    found = [loaded.tokenizer.token_to_id(token) for token in SENTENCE_ENDS]
    return loaded.begin_of_text, np.isin(np.arange(loaded.vocabulary_size), [end for end in found if end is not None])


def _document_bounds(folder: Path, split: str) -> np.ndarray:
    """Return where the documents of a split begin, and where the last ends, in tokens, int64."""
    found = read_manifest(folder).splits[split]
    parts = [np.fromfile((folder / shard.name).with_suffix(STARTS_SUFFIX), np.uint64) for shard in found.shards]
    return np.concatenate([*parts, [found.num_tokens]]).astype(np.int64)
