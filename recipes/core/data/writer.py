"""Writes one split's token stream into shards, so that it can stop anywhere and go on from its last saved state."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bigbatch.recipes.core.config import Section
from bigbatch.recipes.core.data.manifest import STARTS_SUFFIX, TOKENS_SUFFIX, Shard, Split, hash_of, sync
from bigbatch.recipes.core.errors import UserError


class WriterState(Section):
    """What has been written: whole shards, and the beginning of the next one."""

    num_tokens: int = 0
    num_documents: int = 0
    shards: tuple[Shard, ...] = ()

    @property
    def open_tokens(self) -> int:
        """Tokens in the shard that is not whole yet."""
        return self.num_tokens - sum(shard.num_tokens for shard in self.shards)

    @property
    def open_documents(self) -> int:
        """Documents that start in the shard that is not whole yet."""
        return self.num_documents - sum(shard.num_documents for shard in self.shards)


class ShardWriter:
    """Appends documents to a split; the bytes do not depend on how often it was stopped and started."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, state: WriterState) -> None:
        """Go on from a state that `commit` returned, dropping what was written after it."""
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.state = state
        self.files: tuple[BinaryIO, BinaryIO] | None = None
        if state.open_tokens:
            sizes = (state.open_tokens * self.dtype.itemsize, state.open_documents * np.dtype(np.uint64).itemsize)
            self.files = (_reopen(self._path(TOKENS_SUFFIX), sizes[0]), _reopen(self._path(STARTS_SUFFIX), sizes[1]))

    def append(self, documents: list[np.ndarray]) -> None:
        """Write documents [length] one behind the other."""
        tokens = np.concatenate(documents).astype(self.dtype)
        ends = np.cumsum([len(document) for document in documents])
        starts = np.concatenate([[0], ends[:-1]]).astype(np.uint64) + np.uint64(self.state.num_tokens)
        while tokens.size:
            count = min(tokens.size, self.shard_tokens - self.state.open_tokens)
            started = int(np.searchsorted(starts, self.state.num_tokens + count))
            self._write(tokens[:count], starts[:started])
            tokens, starts = tokens[count:], starts[started:]
            if self.state.open_tokens == self.shard_tokens:
                self._close_shard()

    def commit(self) -> WriterState:
        """Bring everything written to disk and return the state to go on from."""
        for file in self.files or ():
            file.flush()
            os.fsync(file.fileno())
        return self.state

    def finish(self) -> Split:
        """Close the last shard."""
        if self.state.open_tokens:
            self._close_shard()
        return Split(num_tokens=self.state.num_tokens, num_documents=self.state.num_documents, shards=self.state.shards)

    def close(self) -> None:
        """Close the files without a further promise."""
        for file in self.files or ():
            file.close()

    def _write(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        if self.files is None:
            self._path(TOKENS_SUFFIX).parent.mkdir(exist_ok=True)
            self.files = (self._path(TOKENS_SUFFIX).open("wb"), self._path(STARTS_SUFFIX).open("wb"))
        self.files[0].write(tokens.tobytes())
        self.files[1].write(starts.tobytes())
        counts = {"num_tokens": len(tokens), "num_documents": len(starts)}
        self.state = self.state.model_copy(update={key: getattr(self.state, key) + n for key, n in counts.items()})

    def _close_shard(self) -> None:
        self.commit()
        self.close()
        shard = Shard(
            name=f"{self.split}/{self._path('').name}",
            num_tokens=self.state.open_tokens,
            num_documents=self.state.open_documents,
            tokens_hash=hash_of(self._path(TOKENS_SUFFIX)),
            starts_hash=hash_of(self._path(STARTS_SUFFIX)),
        )
        sync(self.folder / self.split)
        self.files = None
        self.state = self.state.model_copy(update={"shards": (*self.state.shards, shard)})

    def _path(self, suffix: str) -> Path:
        return self.folder / self.split / f"shard_{len(self.state.shards):05d}{suffix}"


def _reopen(path: Path, size_bytes: int) -> BinaryIO:
    if not path.is_file() or path.stat().st_size < size_bytes:
        raise UserError(str(path), "is shorter than it was left; remove its folder and prepare again")
    file = path.open("r+b")
    file.truncate(size_bytes)
    file.seek(size_bytes)
    return file
