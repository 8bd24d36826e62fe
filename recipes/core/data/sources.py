"""Raw text, document by document: files, folders, globs, Hugging Face data sets and Python's own documentation.

Every source is a list of files with an identity, and a file is a sequence of documents that never changes its order:
so whoever remembers a file and a count can go on from there.
"""

import codecs
import csv
import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet
import xxhash

from bigbatch.recipes.core.data.manifest import hash_of
from bigbatch.recipes.core.data.stdlib_text import stdlib_documents, stdlib_files
from bigbatch.recipes.core.errors import UserError

TEXT_BLOCK_BYTES = 2**23  # a longer .txt file is cut at line ends into documents of about this size
LARGEST_FIELD_CHARACTERS = 2**24  # of a .csv file: an unclosed quote swallows no more than this
ROWS_AT_ONCE = 256
STDLIB = "python:stdlib"
HUGGING_FACE = "hf:"
DATA_ROOT_VARIABLE = "BIGBATCH_DATA"


class SourceFile(NamedTuple):
    """A file and what tells it from an edited one without reading it."""

    path: str
    """Absolute; or `hf:NAME:CONFIG:SPLIT`, whose size and time are those of its Arrow files."""
    size_bytes: int
    modified_ns: int


class Document(NamedTuple):
    """One text."""

    text: str
    origin: str
    """Where it comes from, for messages: file, or file:line."""
    file_fraction: float
    """How much of its file has been read when it arrives, from 0 to 1."""


def documents(sources: tuple[str, ...], text_key: str = "text") -> Iterator[Document]:
    """Yield every document of the sources in order, in bounded memory."""
    for file in list_files(sources):
        yield from read_documents(file, text_key)


def list_files(sources: tuple[str, ...], where: str = "data.train") -> list[SourceFile]:
    """Find the files that the sources name, folders and globs sorted; `where` is the JSON path for messages."""
    files = []
    for position, source in enumerate(sources):
        files += _files_of(source, f"{where}[{position}]")
    return files


def read_documents(file: SourceFile, text_key: str = "text") -> Iterator[Document]:
    """Yield the documents of one file, always the same in the same order."""
    if file.path.startswith(HUGGING_FACE):
        return _read_hugging_face(file.path, text_key)
    path = Path(file.path)
    return _READERS[_extension(path)](path, text_key)


def hash_file(file: SourceFile) -> str:
    """Return the xxh3-128 of the bytes as they lie on disk, having made sure that they are still the ones listed."""
    paths, now = [Path(file.path)], None
    if file.path.startswith(HUGGING_FACE):
        paths, now = _hugging_face_files(file.path, file.path)
    elif paths[0].exists():
        now = identify(paths[0])
    if now != file:
        raise UserError(file.path, "changed while it was read; prepare again when nothing writes to it any more")
    return xxhash.xxh3_128_hexdigest("".join(hash_of(path) for path in paths).encode())


def identify(path: Path) -> SourceFile:
    """Return the identity of a file on disk."""
    facts = path.stat()
    return SourceFile(str(path.absolute()), facts.st_size, facts.st_mtime_ns)


def locate(path: str) -> Path:
    """Return the path as it is, or under $BIGBATCH_DATA where only that exists."""
    here = Path(path).expanduser()
    below = Path(os.environ.get(DATA_ROOT_VARIABLE, ".")) / here
    return below if not here.exists() and below.exists() else here


def _files_of(source: str, where: str) -> list[SourceFile]:
    if source == STDLIB:
        return [file for file in map(identify, stdlib_files()) if file.size_bytes]
    if source.startswith(HUGGING_FACE):
        return [_hugging_face_files(source, where)[1]]
    files = [identify(path) for path in _paths_of(source, where)]
    for file in files:
        if file.size_bytes == 0:
            raise UserError(where, f"{file.path} is empty")
    return files


def _paths_of(source: str, where: str) -> list[Path]:
    path = locate(source)
    if path.is_dir():
        found = sorted(item for item in path.rglob("*") if item.is_file() and _extension(item) in EXTENSIONS)
        found = [item for item in found if not any(part[0] == "." for part in item.relative_to(path).parts)]
        if not found:
            raise UserError(where, f"the folder {path} holds no {_KINDS}")
        return found
    found = [path] if path.is_file() else _glob(source)
    if not found:
        root = os.environ.get(DATA_ROOT_VARIABLE, "not set")
        raise UserError(where, f"{source!r} is no file, folder or glob in {Path.cwd()}, nor in $BIGBATCH_DATA ({root})")
    for item in found:
        if _extension(item) not in EXTENSIONS:
            raise UserError(where, f"{item} is no {_KINDS}")
    return found


def _glob(pattern: str) -> list[Path]:
    for root in (".", os.environ.get(DATA_ROOT_VARIABLE, ".")):
        # Path.glob takes no absolute pattern.
        matches = sorted(glob.glob(str(Path(pattern).expanduser()), root_dir=root, recursive=True))  # noqa: PTH207
        if files := [path for match in matches if (path := Path(root) / match).is_file()]:
            return files
    return []


def _extension(path: Path) -> str:
    name = path.name.lower()
    compressed = name.endswith(".gz")
    extension = Path(name.removesuffix(".gz")).suffix
    return "" if compressed and extension == ".parquet" else extension


def _read_text(path: Path, _text_key: str) -> Iterator[Document]:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with _opened(path) as (stream, fraction):
        while block := stream.read(TEXT_BLOCK_BYTES):
            block += stream.readline(TEXT_BLOCK_BYTES)
            held_bytes = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - held_bytes + error.start) from None
            yield Document(text.removeprefix("\ufeff") if offset == 0 else text, str(path), fraction())
            offset += len(block)
    if held_bytes := len(decoder.getstate()[0]):
        raise _not_utf8(path, offset - held_bytes)


def _read_json_lines(path: Path, text_key: str) -> Iterator[Document]:
    with _opened(path) as (stream, fraction):
        for number, line in _lines(stream, path):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(origin, f"is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(origin, f"is {_shown(row)}; each line must be an object that holds {text_key!r}")
            if text_key not in row:
                raise _no_column(origin, text_key, row)
            yield Document(_as_text(row[text_key], origin, text_key), origin, fraction())


def _read_csv(path: Path, text_key: str) -> Iterator[Document]:
    csv.field_size_limit(LARGEST_FIELD_CHARACTERS)
    # Tab-separated files have no quoting: a quotation mark at the start of a field is part of the text.
    style: dict[str, Any] = {"strict": True}
    if _extension(path) == ".tsv":
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with _opened(path) as (stream, fraction):
        rows = csv.reader((line for _, line in _lines(stream, path)), **style)
        try:
            columns = next(rows, [])
            if text_key not in columns:
                raise _no_column(str(path), text_key, columns)
            column = columns.index(text_key)
            for row in rows:
                origin = f"{path}:{rows.line_num}"
                if row and len(row) != len(columns):
                    raise UserError(origin, f"has {len(row)} fields; the header names {len(columns)}")
                if row:
                    yield Document(row[column], origin, fraction())
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}", f"is not a row: {error}") from None


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise _no_column(str(path), text_key, file.schema_arrow.names)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    origin = f"{path}:{row}"
                    yield Document(_as_text(value, origin, text_key), origin, row / file.metadata.num_rows)
    except UnicodeDecodeError:
        raise UserError(f"{path}:{row + 1}", f"column {text_key!r} is not UTF-8 in one of the next rows") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(str(path), f"cannot be read: {_first_line(error)}") from None


def _read_stdlib(path: Path, _text_key: str) -> Iterator[Document]:
    for text in stdlib_documents(path):
        yield Document(text, str(path), 1.0)


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".py": _read_stdlib,
}
EXTENSIONS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")  # what a user may name
_KINDS = ".txt, .jsonl, .csv, .tsv (each also .gz) or .parquet file"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """Open a file, compressed or not, with a function that tells how much of it has been read."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            yield stream, lambda: raw.tell() / size_bytes
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(str(path), f"cannot be read: {_first_line(error)}") from None


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line); only line feeds end a line, not all that Unicode says would."""
    offset = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start) from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text
        offset += len(line)


def _read_hugging_face(source: str, text_key: str) -> Iterator[Document]:
    dataset = _load_hugging_face(source, source)
    if text_key not in dataset.column_names:
        raise _no_column(source, text_key, dataset.column_names)
    row = 0
    for batch in dataset.select_columns([text_key]).iter(batch_size=ROWS_AT_ONCE):
        for value in batch[text_key]:
            row += 1
            origin = f"{source}:{row}"
            yield Document(_as_text(value, origin, text_key), origin, row / dataset.num_rows)


def _hugging_face_files(source: str, where: str) -> tuple[list[Path], SourceFile]:
    dataset = _load_hugging_face(source, where)
    if not dataset.num_rows:
        raise UserError(where, f"{source} is empty")
    paths = [Path(file["filename"]) for file in dataset.cache_files]
    facts = [path.stat() for path in paths]
    return paths, SourceFile(source, sum(f.st_size for f in facts), max(f.st_mtime_ns for f in facts))


def _load_hugging_face(source: str, where: str) -> Any:
    """Return a memory-mapped `datasets.Dataset`, from a local folder, the cache or the hub."""
    import datasets  # noqa: PLC0415 - takes a second, and most runs read plain files

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry without a network is two warnings

    name, config, split, *_ = [*source.removeprefix(HUGGING_FACE).split(":", 2), "", ""]  # a split may be train[1:9]
    folder = locate(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if not saved:
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else name, config or None, split=split or "train"
            )
        dataset = datasets.load_from_disk(str(folder))
        return dataset[split or "train"] if isinstance(dataset, datasets.DatasetDict) else dataset
    except (OSError, ValueError, KeyError) as error:
        hint = "" if folder.is_dir() else "; without a network it must be in the cache, or be a local folder"
        raise UserError(where, f"the data set {source!r} cannot be loaded: {_first_line(error)}{hint}") from None


def _as_text(value: Any, origin: str, text_key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(origin, f"{text_key!r} is {_shown(value)}, not a text")
    return value


def _not_utf8(path: Path, offset: int) -> UserError:
    return UserError(str(path), f"is not UTF-8: the first wrong byte is at offset {offset}")


def _no_column(where: str, text_key: str, columns: Any) -> UserError:
    there = ", ".join(_shown(column) for column in columns) or "none"
    return UserError(where, f"has no column {text_key!r} (data.text_key); there are: {there}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
