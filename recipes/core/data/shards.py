"""Samples cut from a prepared token stream. B samples, T tokens each."""

from pathlib import Path
from typing import Literal

import numpy as np

from bigbatch.recipes.core.data import tokenizing
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.manifest import TOKENS_SUFFIX, Manifest, check_sizes, read_manifest
from bigbatch.recipes.core.errors import UserError

IGNORED_LABEL = -100


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Raise UserError unless the folder's tokenizer is the one that made its shards."""
    path = folder / tokenizing.TOKENIZER_FILE
    if tokenizing.fingerprint(path) != manifest.tokenizer_fingerprint:
        raise UserError(
            str(path),
            f"is not the tokenizer that made these shards; bring it back, or remove {folder} and prepare again",
        )


class Stream:
    """A split's tokens, one behind the other over all its shards."""

    def __init__(self, folder: Path, split: str) -> None:
        """Map the shards into memory after a look at their sizes and at the tokenizer."""
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        check_tokenizer(folder, manifest)
        self.folder, self.split = folder, split
        self.vocabulary_size, self.end_of_text = manifest.vocabulary_size, manifest.end_of_text
        self.fingerprint = manifest.fingerprint
        shards = manifest.splits[split].shards if split in manifest.splits else ()
        paths = [(folder / shard.name).with_suffix(TOKENS_SUFFIX) for shard in shards]
        self.parts = [np.memmap(path, manifest.dtype, "r").view(np.ndarray) for path in paths]
        self._starts = np.cumsum([0] + [len(part) for part in self.parts])

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return int(self._starts[-1])

    def read(self, firsts: np.ndarray, length: int) -> np.ndarray:
        """Return the tokens [rows, length] int64 from each place on; ahead of the stream and behind it end-of-text."""
        window = np.full((len(firsts), length), self.end_of_text, np.int64)
        for row, first in zip(window, firsts.tolist(), strict=True):
            place, end = max(0, first), min(first + length, self.num_tokens)
            number = int(np.searchsorted(self._starts, place, side="right")) - 1
            while place < end:  # it may go on in the next shards
                part = self.parts[number][place - self._starts[number] :][: end - place]
                row[place - first : place - first + len(part)] = part
                place, number = place + len(part), number + 1
        if window.size and window.max() >= self.vocabulary_size:
            # On a GPU the embedding would end the process without a word of why.
            wrong = f"hold token {window.max()} of {self.vocabulary_size}: their bytes have changed"
            raise UserError(str(self.folder), f"the shards {wrong}; remove the folder and prepare again")
        return window


class TokenSamples:
    """A split of a prepared folder as `Samples`: sample i is tokens i*T to i*T+T, its labels the same one further.

    So every token but the first is a target once an epoch, except for fewer than T at the end. With `isolate`, the
    batch also holds positions [B, T] int64, which begin anew at each document, and documents [B, T] int32, the number
    of the document within its row; and no document has to predict the beginning of the next (label -100).
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        sequence_length: int,
        packing: Literal["concatenate", "isolate"] = "concatenate",
    ) -> None:
        """Map the shards into memory; raise UserError where they do not make a sample."""
        self._stream = stream = Stream(folder, split)
        tokens = stream.num_tokens
        if tokens <= sequence_length:
            needed = f"a sample of data.sequence_length {sequence_length} needs {sequence_length + 1}"
            raise UserError(f"data.{split}", f"has {tokens} tokens; {needed}")
        self.tokenizer_folder = folder
        self.vocabulary_size, self.end_of_text = stream.vocabulary_size, stream.end_of_text
        self.sequence_length = sequence_length
        self.isolate = packing == "isolate"
        self.num_samples = (tokens - 1) // sequence_length
        self.data_fingerprint = stream.fingerprint
        content = f"{stream.fingerprint} {split} {sequence_length} {packing}"
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return tokens and labels [B, T] int64 of these samples; they are the same in every epoch."""
        firsts = np.asarray(sample_ids, np.int64) * self.sequence_length
        window = self._stream.read(firsts, self.sequence_length + 1)
        tokens, labels = window[:, :-1], window[:, 1:]
        if not self.isolate:
            return {"tokens": tokens, "labels": labels}
        ends = tokens == self.end_of_text
        documents = np.cumsum(ends, axis=1, dtype=np.int32) - ends
        begins = np.zeros_like(tokens)
        begins[:, 1:] = np.where(ends[:, :-1], np.arange(1, self.sequence_length), 0)
        positions = np.arange(self.sequence_length) - np.maximum.accumulate(begins, axis=1)
        labels = np.where(ends, IGNORED_LABEL, labels)
        return {"tokens": tokens, "labels": labels, "positions": positions, "documents": documents.astype(np.int32)}
