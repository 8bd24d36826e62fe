"""The tables of n-grams of a prepared folder's training text, on disk and mapped into memory."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bigbatch.recipes.core.data.manifest import hash_of, read_manifest, sync, write_atomically
from bigbatch.recipes.core.data.ngrams import Table, Tables, count_ngrams
from bigbatch.recipes.core.data.shards import Stream
from bigbatch.recipes.core.errors import UserError

VERSION = 1
FILE, FILES = "ngrams.json", "{}_{}.npy"


def prepare_tables(folder: Path, order: int, num_tokens: int) -> None:
    """Count the n-grams of a prepared folder's training text up to a token, unless that is done."""
    target, stream = tables_folder(folder, order, num_tokens), Stream(folder, "train")
    if (target / FILE).exists():
        return
    tables = count_ngrams(_first(stream.parts, num_tokens), stream.vocabulary_size, stream.end_of_text, order)
    try:
        target.mkdir(exist_ok=True)
        for name, array in _arrays(tables):
            np.save(target / name, array)
            sync(target / name)
        hashes = {name: hash_of(target / name) for name, _ in _arrays(tables)}
        document = {"version": VERSION, "text": stream.fingerprint, "hashes": hashes}
        write_atomically(target / FILE, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError("data.prepared_dir", f"{target} cannot be written: {error}; make room") from error


def open_tables(folder: Path, order: int, num_tokens: int) -> Tables:
    """Map the tables of a prepared folder into memory; raise UserError where they are not of its text."""
    manifest = read_manifest(folder)
    return read_tables(tables_folder(folder, order, num_tokens), order, manifest.vocabulary_size, manifest.fingerprint)


def read_tables(target: Path, order: int, vocabulary_size: int, text: str | None = None) -> Tables:
    """Map a folder of tables into memory; where the fingerprint of a text is given, raise UserError for another's."""
    try:
        document = json.loads((target / FILE).read_text("utf-8"))
        if text not in (None, document["text"]):
            raise UserError(str(target), "holds the counts of another text; remove it and prepare again")
        names = (FILES.format(part, length) for length in range(1, order + 1) for part in Table._fields)
        arrays = iter([np.load(target / name, mmap_mode="r") for name in names])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(str(target), f"holds no counts of n-grams ({error}); remove it and prepare again") from None
    tables = tuple(Table(*three) for three in zip(arrays, arrays, arrays, strict=True))  # one iterator: three by three
    content = json.dumps(document, sort_keys=True).encode()
    return Tables(tables, vocabulary_size, hashlib.blake2b(content, digest_size=16).hexdigest())


def tables_folder(folder: Path, order: int, num_tokens: int) -> Path:
    """Return where the tables of a prepared folder, or of a model's, lie."""
    return folder / f"ngrams_{order}_{num_tokens}"


def _first(parts: Sequence[np.ndarray], num_tokens: int) -> list[np.ndarray]:
    starts = np.cumsum([0, *map(len, parts)])
    return [part[: max(0, num_tokens - start)] for part, start in zip(parts, starts.tolist(), strict=False)]


def _arrays(tables: Tables) -> list[tuple[str, np.ndarray]]:
    numbered = enumerate(tables.by_length, 1)
    return [
        (FILES.format(part, length), array) for length, table in numbered for part, array in table._asdict().items()
    ]
