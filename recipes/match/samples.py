"""A prepared split as samples: groups of pairs to train on, texts or candidates to rank.

W windows lie in R rows of T tokens; P pairs, each with n negatives.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.recipes.core.data.examples import Examples, read_examples
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.packing import lay_out, truncated
from bigbatch.recipes.core.data.sampler import Order, sample_order
from bigbatch.recipes.core.data.splits import SPLITS
from bigbatch.recipes.core.data.token_dropout import drop_tokens
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, encode_documents, load_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.match.config import MatchConfig, MatchDataSection
from bigbatch.recipes.match.data import TEXTS, read_found, read_grades

PAIR_SPECIAL = 3  # [CLS] left [SEP] right [SEP]


class _Texts:
    """The texts of a split and its tables, mapped into memory."""

    def __init__(self, folder: Path, split: str, config: MatchConfig) -> None:
        data = config.data
        self.evaluation_size = data.group_size * (config.batch.micro_size or 1) if data.group_size > 1 else None
        self.tokenizer, self.data, self.split = load_tokenizer(folder), data, SPLITS.index(split)
        self.pairs, self.texts = Examples(folder, split), Examples(folder, split + TEXTS)

    def tokens(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Return the tokens of texts with their special ones, cut to the longest length."""
        return [truncated(text, self.data.sequence_length) for text in self.texts.lists("tokens", numbers)]

    def hash_of(self, *further: Any) -> str:
        """Return a fingerprint of the content, the lengths and what else there is."""
        content = [self.pairs.fingerprint, self.texts.fingerprint, self.data.sequence_length, self.data.packing]
        return fingerprint_of([*content, *further])


class PairSamples(_Texts):
    """Pairs as `Samples`: a sample is a group of `group_size` of them, drawn anew in every epoch.

    What is left over of an epoch is less than a group, and other pairs each time.
    """

    def __init__(self, folder: Path, split: str, config: MatchConfig, is_training: bool = False) -> None:
        """Map the split into memory."""
        super().__init__(folder, split, config)
        self.is_cross, self.has_scores = config.model.kind == "cross", config.data.score_column is not None
        self.group_size, self.seed = config.data.group_size if is_training else 1, config.seed
        self.token_dropout = config.objective.token_dropout if is_training else 0.0
        self.left, self.right, self.score = (self.pairs.numbers(name) for name in ("left", "right", "score"))
        self.num_pairs, self.counts = self.pairs.num_rows, np.bincount(self.right).astype(np.float32)
        self.num_samples = self.num_pairs // self.group_size
        if not self.num_samples:
            raise UserError("data.group_size", f"is {self.group_size}; right is {self.num_pairs}, all pairs, or less")
        self.num_negatives = int(self.pairs.lengths("negatives")[0])
        lengths = self.texts.lengths("tokens").clip(max=self.data.sequence_length)
        self.mean_tokens = self.group_size * float((lengths[self.left] + lengths[self.right]).mean())
        self.mean_tokens += self.group_size * self.num_negatives * float(lengths[self.right].mean())
        self.fingerprint = self.hash_of(self.group_size, self.token_dropout, self.seed)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the texts of the samples' pairs as `lay_out` does; for a cross-encoder those of `paired`.

        Of P pairs all left texts, all right ones, all negatives; lefts, rights [P] and negatives [P, n] are their
        numbers, scores [P] float32, groups [P] the place of each pair's sample, counts [P]
        float32 how many pairs have the right text. For a cross-encoder targets [W].
        """
        size = self.group_size
        pairs, groups = sample_ids, np.repeat(np.arange(len(sample_ids)), size)
        if size > 1:
            starts = (epochs * self.num_pairs + sample_ids * size).tolist()
            pairs = np.concatenate([sample_order(self.seed, self.num_pairs, start, size).ids for start in starts])
        order = Order(pairs, np.repeat(epochs, size))
        left, right = self.left[pairs].astype(np.int64), self.right[pairs].astype(np.int64)
        negatives = np.array(self.pairs.lists("negatives", pairs), np.int64).reshape(len(pairs), -1)
        found = {"lefts": left, "rights": right, "negatives": negatives, "groups": groups}
        found |= {"scores": self.score[pairs], "counts": self.counts[right]}
        if self.is_cross:
            return found | self._paired(found, order)
        lists = [self._read(numbers, order, part) for part, numbers in enumerate((left, right, *negatives.T))]
        # Negatives lie as their numbers do: those of a pair side by side.
        texts = [*lists[0], *lists[1], *(text for own in zip(*lists[2:], strict=True) for text in own)]
        return found | laid_out(texts, self.data)

    def _paired(self, found: dict[str, np.ndarray], order: Order) -> dict[str, np.ndarray]:
        """Return windows of pairs; without scores, also of each left text with its negatives and another right one."""
        lefts, rights = [found["lefts"]], [found["rights"]]
        targets = [found["scores"] if self.has_scores else np.ones(len(order.ids), np.float32)]
        if not self.has_scores:
            others = [*found["negatives"].T]
            if self.group_size > 1:
                others.append(np.roll(found["rights"].reshape(-1, self.group_size), 1, axis=1).ravel())
            lefts += [found["lefts"]] * len(others)
            rights += others
            targets += [(other == found["rights"]).astype(np.float32) for other in others]
        firsts = [text for part, numbers in enumerate(lefts) for text in self._read(numbers, order, 2 * part)]
        seconds = [text for part, numbers in enumerate(rights) for text in self._read(numbers, order, 2 * part + 1)]
        return paired(firsts, seconds, self.data, self.tokenizer) | {"targets": np.concatenate(targets)}

    def _read(self, numbers: np.ndarray, order: Order, stream: int) -> list[np.ndarray]:
        """Return texts' tokens, each inner one replaced by the unknown one with a chance of `token_dropout`."""
        texts = self.tokens(numbers)
        if not self.token_dropout:
            return texts
        drawn = (self.token_dropout, self.seed, order, self.tokenizer, stream)
        return drop_tokens(texts, *drawn, has_special=True)


class TextSamples(_Texts):
    """The texts of a split that is ranked as `Samples` for a bi-encoder: each is one."""

    def __init__(self, folder: Path, split: str, config: MatchConfig) -> None:
        """Map the split into memory."""
        super().__init__(folder, split, config)
        self.num_samples, self.fingerprint = self.texts.num_rows, self.hash_of()

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the texts as `lay_out` does; rows [B] are their numbers, splits [B] the number of the split."""
        found = {"rows": sample_ids, "splits": np.full(len(sample_ids), self.split)}
        return found | laid_out(self.tokens(sample_ids), self.data)


class CandidateSamples(_Texts):
    """For a cross-encoder: each query with each of the best documents that BM25 finds is a sample."""

    def __init__(self, folder: Path, split: str, config: MatchConfig) -> None:
        """Map the split into memory."""
        super().__init__(folder, split, config)
        found = read_found(folder, split)
        best = [(left, ranked.documents[: config.data.rerank]) for left, (ranked, _) in found.items()]
        self.lefts = np.concatenate([np.full(len(documents), left) for left, documents in best])
        self.rights = np.concatenate([documents for _, documents in best])
        if not len(self.lefts):
            raise UserError(f"data.{split}", "has no query that shares a word with a document")
        self.right = read_grades(self.pairs)
        self.num_samples, self.fingerprint = len(self.lefts), self.hash_of(config.data.rerank)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return windows as `paired` does, targets [B], lefts and rights [B], and splits [B]."""
        lefts, rights = self.lefts[sample_ids], self.rights[sample_ids]
        asked = zip(lefts.tolist(), rights.tolist(), strict=True)
        targets = np.array([right in self.right[left] for left, right in asked], np.float32)
        found = {"lefts": lefts, "rights": rights, "scores": targets, "targets": targets}
        found["splits"] = np.full(len(lefts), self.split)
        return found | paired(self.tokens(lefts), self.tokens(rights), self.data, self.tokenizer)


def open_split(folder: Path, split: str, config: MatchConfig) -> PairSamples | TextSamples | CandidateSamples | None:
    """Open a split to evaluate on; None where there is none of this name."""
    if split not in read_examples(folder).splits:
        return None
    if config.data.score_column:
        return PairSamples(folder, split, config)
    return (TextSamples if config.model.kind == "bi" else CandidateSamples)(folder, split, config)


def encode(texts: list[str], data: MatchDataSection, tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Return the tokens of texts that are not prepared."""
    return [truncated(tokens, data.sequence_length) for tokens in encode_documents(tokenizer, texts)]


def laid_out(texts: list[np.ndarray], data: MatchDataSection) -> dict[str, np.ndarray]:
    """Lay texts out in rows as `lay_out` does."""
    return lay_out(texts, data.sequence_length if data.packing else None)


def paired(
    lefts: list[np.ndarray], rights: list[np.ndarray], data: MatchDataSection, tokenizer: TextTokenizer
) -> dict[str, np.ndarray]:
    """Lay pairs of texts with special tokens out as windows in rows; segments [R, T] int64 is 1 behind the left one.

    Where both are too long together, the longer one is cut.
    """
    first, end = (np.array([token], np.uint32) for token in (tokenizer.begin_of_text, tokenizer.end_of_text))
    windows, columns = [], []
    room = data.sequence_length - PAIR_SPECIAL
    for left, right in zip((text[1:-1] for text in lefts), (text[1:-1] for text in rights), strict=True):
        kept = min(len(left), max(room // 2, room - len(right)))
        windows.append(np.concatenate([first, left[:kept], end, right[: room - kept], end]))
        columns.append(kept + 2)
    batch = laid_out(windows, data)
    segments = np.zeros(batch["tokens"].size, np.int64)
    for place, column, length in zip(batch["firsts"], columns, batch["lengths"], strict=True):
        segments[place + column : place + length] = 1
    return batch | {"segments": segments.reshape(batch["tokens"].shape)}
