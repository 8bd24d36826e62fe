"""What a prepared folder holds: one manifest, written last, with a hash for every file; without it nothing is there."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pydantic
import xxhash

from bigbatch.recipes.core.config import Section
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.errors import UserError

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
TOKENS_SUFFIX, STARTS_SUFFIX = ".bin", ".idx"
START_BYTES = 8

AnyManifest = TypeVar("AnyManifest", bound=Section)


class Shard(Section):
    """Two files: tokens (NAME.bin), and where documents start (NAME.idx, uint64, counted in tokens of the split)."""

    name: str
    """Path below the folder, without suffix."""
    num_tokens: int
    num_documents: int
    """Documents that start in it."""
    tokens_hash: str
    starts_hash: str


class Split(Section):
    """A stream of documents, each with end-of-text behind it, cut into shards at fixed sizes."""

    num_tokens: int
    num_documents: int
    shards: tuple[Shard, ...]


class Source(Section):
    """A file that was read."""

    path: str
    split: str
    size_bytes: int
    modified_ns: int
    content_hash: str


class Manifest(Section):
    """Everything about a prepared folder."""

    version: Literal[1] = MANIFEST_VERSION
    content_id: str
    data: dict[str, Any]
    """The settings that shape the content."""
    tokenizer_fingerprint: str
    vocabulary_size: int
    end_of_text: int
    dtype: Literal["uint16", "uint32"]
    counts: dict[str, int]
    """Documents read and left out, with the reason."""
    splits: dict[str, Split]
    sources: tuple[Source, ...]

    @property
    def fingerprint(self) -> str:
        """Change with any token, wherever the folder and its sources lie."""
        parts = [self.tokenizer_fingerprint, self.dtype]
        parts += [f"{name} {shard.tokens_hash}" for name, split in self.splits.items() for shard in split.shards]
        return fingerprint_of("\n".join(parts))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared folder of token shards."""
    return parse_manifest(folder, Manifest)


def parse_manifest(folder: Path, kind: type[AnyManifest]) -> AnyManifest:
    """Read a prepared folder's manifest."""
    path = folder / MANIFEST_FILE
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(str(folder), "is not a prepared folder: it has no manifest.json") from None
    except pydantic.ValidationError as error:
        raise UserError(str(path), f"is damaged: {error.errors()[0]['msg']}") from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise for a shard that is missing or has another size than the manifest says; cheap enough for every start."""
    for name, size_bytes, _ in _files(manifest):
        check_file(folder, name, size_bytes)


def verify(folder: Path) -> Manifest:
    """Read every byte and compare its hash; raise for the first shard that differs."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for name, size_bytes, content_hash in _files(manifest):
        check_file(folder, name, size_bytes, content_hash)
    return manifest


def check_file(folder: Path, name: str, size_bytes: int, content_hash: str | None = None) -> None:
    """Raise UserError for a file that is missing, or has another size, or other bytes where a hash is given."""
    path = folder / name
    found = path.stat().st_size if path.is_file() else None
    if found != size_bytes:
        state = "is missing" if found is None else f"has {found} bytes instead of {size_bytes}"
        raise UserError(str(path), f"{state}; remove {folder} and prepare again")
    if content_hash and hash_of(path) != content_hash:
        raise UserError(str(path), f"has changed since it was written; remove {folder} and prepare again")


def source_record(identity: tuple[str, int, int], split: str, content_hash: str) -> Source:
    """Describe a file that was read, by its path, size and time."""
    path, size_bytes, modified_ns = identity
    return Source(path=path, split=split, size_bytes=size_bytes, modified_ns=modified_ns, content_hash=content_hash)


def hash_of(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole, on disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a folder's names, or a file's bytes, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Return each file's name, size and hash."""
    token_bytes = np.dtype(manifest.dtype).itemsize
    files = []
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        files.append((shard.name + TOKENS_SUFFIX, shard.num_tokens * token_bytes, shard.tokens_hash))
        files.append((shard.name + STARTS_SUFFIX, shard.num_documents * START_BYTES, shard.starts_hash))
    return files
