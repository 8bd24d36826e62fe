"""Examples, which are rows of columns: prepared once for each content, and read from memory-mapped Arrow files.

prepared_dir/<content id>/ holds an Arrow file a split, the tokenizer's files and the manifest. It is built beside its
place and renamed, so that it is whole or not there.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
import xxhash

from bigbatch.recipes.core.config import Section
from bigbatch.recipes.core.data.folders import VERIFIED_BYTES, bundled, is_latest, latest, locked, point_to
from bigbatch.recipes.core.data.identity import fingerprint_of, short_hash
from bigbatch.recipes.core.data.manifest import (
    MANIFEST_FILE,
    Source,
    check_file,
    hash_of,
    parse_manifest,
    source_record,
    sync,
    write_atomically,
)
from bigbatch.recipes.core.data.rows import hash_file
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.errors import UserError

EXAMPLES_VERSION = 1
SUFFIX = ".arrow"
ROWS_AT_ONCE = 1024
ORIGIN = "origin"  # the column that tells where a row comes from


class ExampleFile(Section):
    """A file of a prepared folder."""

    size_bytes: int
    content_hash: str


class ExampleSplit(Section):
    """An Arrow file, split + SUFFIX."""

    num_rows: int
    content_hash: str
    """Of all columns but the origins, so that it is the same wherever the sources lie."""


class ExamplesManifest(Section):
    """Everything about a prepared folder of examples."""

    version: Literal[1] = EXAMPLES_VERSION
    content_id: str
    data: dict[str, Any]
    """The settings that shape the content."""
    facts: dict[str, Any]
    """What the recipe wants to remember: labels, counts, what was left out."""
    splits: dict[str, ExampleSplit]
    files: dict[str, ExampleFile]
    sources: tuple[Source, ...]


class Request(NamedTuple):
    """What makes up a prepared folder; its content id is a hash of all this."""

    settings: dict[str, Any]
    files: dict[str, list[SourceFile]]
    """By the split that they are for."""
    hashes: tuple[str, ...] = ()
    """Of what else goes in, such as a given tokenizer."""

    @property
    def settings_id(self) -> str:
        """Stand for the settings alone."""
        return short_hash(self.settings)

    @property
    def content_id(self) -> str:
        """Stand for the settings and all that is read."""
        files = [(file.identity, split) for split, found in self.files.items() for file in found]
        return short_hash([EXAMPLES_VERSION, self.settings, self.hashes, files])


class Built(NamedTuple):
    """What the function that fills a folder has to say."""

    splits: dict[str, ExampleSplit]
    facts: dict[str, Any]


class Examples:
    """The rows of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        """Map the split into memory, after a look at its file and the tokenizer's: whole unless they are large."""
        manifest = read_examples(folder)
        names = [name for name in manifest.files if name == split + SUFFIX or not name.endswith(SUFFIX)]
        _check_files(folder, {name: manifest.files[name] for name in names})
        self.facts = manifest.facts
        self.num_rows = manifest.splits[split].num_rows
        others = [manifest.files[name].content_hash for name in sorted(names) if not name.endswith(SUFFIX)]
        content = "\n".join([manifest.splits[split].content_hash, *others])
        self.fingerprint = fingerprint_of(content)
        # Zero-copy: the arrays hold on to the mapped file.
        self.table = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / (split + SUFFIX)))).read_all()
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self.table.column(0).chunks])
        self._lists: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def numbers(self, column: str) -> np.ndarray:
        """Return a whole column of numbers [num_rows]."""
        return self.table[column].to_numpy()

    def lengths(self, column: str) -> np.ndarray:
        """Return how long each list of a column is [num_rows]."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self._chunks(column)])

    def lists(self, column: str, ids: np.ndarray) -> list[np.ndarray]:
        """Return the lists of some rows, views of the mapped file."""
        chunks = self._chunks(column)
        found = []
        for number, place in self._places(ids):
            offsets, values = chunks[number]
            found.append(values[offsets[place] : offsets[place + 1]])
        return found

    def texts(self, column: str, ids: np.ndarray) -> list[str]:
        """Return the texts of some rows."""
        values = self.table[column]
        return [values.chunk(number)[place].as_py() for number, place in self._places(ids)]

    def _places(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Return each row's chunk, and its place there."""
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        return list(zip(numbers.tolist(), (ids - self._starts[numbers]).tolist(), strict=True))

    def _chunks(self, column: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return offsets and values of each chunk of a column of lists."""
        if column not in self._lists:
            chunks = self.table[column].chunks
            self._lists[column] = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        return self._lists[column]


def prepare_examples(root: Path, request: Request, build: Callable[[Path], Built]) -> Path:
    """Find the prepared folder of a request below `root`, or make it by `build`, which writes into an empty folder.

    Where another process prepares the same, wait for it.
    """
    if folder := bundled(root, request.settings_id):
        _check_files(folder, read_examples(folder).files)
        return folder
    folder = root / request.content_id
    if (folder / MANIFEST_FILE).exists() and is_latest(root, request.settings_id, request.content_id):
        _check_files(folder, read_examples(folder).files)
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{request.content_id}.lock"):
            if not (folder / MANIFEST_FILE).exists():
                _make(folder, request, build)
            point_to(root, request.settings_id, request.content_id)
    except OSError as error:  # a source that cannot be read is a UserError by now
        raise UserError("data.prepared_dir", f"{folder} cannot be written: {error}") from error
    return folder


def latest_examples(root: Path, request_settings: dict[str, Any]) -> Path:
    """Return the folder that was made last for these settings; the sources may be gone by now."""
    return latest(root, short_hash(request_settings))


def write_split(
    folder: Path, split: str, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]
) -> ExampleSplit:
    """Write the rows of a split; each batch becomes one chunk."""
    path, num_rows, hasher = folder / (split + SUFFIX), 0, xxhash.xxh3_128()
    hashed = [name for name in schema.names if name != ORIGIN]
    with path.open("wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            hasher.update(batch.select(hashed).serialize())
            num_rows += batch.num_rows
    sync(path)
    return ExampleSplit(num_rows=num_rows, content_hash=hasher.hexdigest())


def record_batches(schema: pyarrow.Schema, records: Iterable[Sequence[Any]]) -> Iterator[pyarrow.RecordBatch]:
    """Yield records, whose values stand in the schema's order, as Arrow has them."""
    waiting = iter(records)
    while found := list(islice(waiting, ROWS_AT_ONCE)):
        columns = zip(*found, strict=True)
        arrays = [pyarrow.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
        yield pyarrow.record_batch(arrays, schema=schema)


def read_examples(folder: Path) -> ExamplesManifest:
    """Read the manifest of a prepared folder of examples."""
    return parse_manifest(folder, ExamplesManifest)


def _make(folder: Path, request: Request, build: Callable[[Path], Built]) -> None:
    stage = folder.with_name(f"{folder.name}.building")
    for leftover in (stage, folder):  # of a process that was killed, or a folder whose manifest has been lost
        shutil.rmtree(leftover, ignore_errors=True)
    stage.mkdir()
    try:
        built = build(stage)
        sources = [
            source_record(file.identity, split, hash_file(file))
            for split, files in request.files.items()
            for file in files
        ]
        files = {
            path.name: ExampleFile(size_bytes=path.stat().st_size, content_hash=hash_of(path))
            for path in sorted(stage.iterdir())
        }
        manifest = ExamplesManifest(
            content_id=request.content_id,
            data=request.settings,
            facts=built.facts,
            splits=built.splits,
            files=files,
            sources=tuple(sources),
        )
        write_atomically(stage / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
        stage.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_files(folder: Path, files: dict[str, ExampleFile]) -> None:
    is_small = sum(facts.size_bytes for facts in files.values()) <= VERIFIED_BYTES
    for name, facts in files.items():
        check_file(folder, name, facts.size_bytes, facts.content_hash if is_small else None)
