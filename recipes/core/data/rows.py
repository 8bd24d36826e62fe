"""Raw data, row by row: a file is a sequence of rows that never changes its order.

So whoever remembers a file and a count can go on from there.
"""

import codecs
import csv
import gzip
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet
import xxhash

from bigbatch.recipes.core.data.annotations import RELATION_COLUMNS, SENTENCE_COLUMNS, conll_rows, semeval_rows
from bigbatch.recipes.core.data.dialogues import SGD_COLUMNS, sgd_rows
from bigbatch.recipes.core.data.manifest import hash_of
from bigbatch.recipes.core.data.number_words import NUMBER_COLUMNS, number_pairs
from bigbatch.recipes.core.data.questions import SLOT_COLUMNS, SQUAD_COLUMNS, slot_rows, squad_rows
from bigbatch.recipes.core.data.sources import (
    AUDIO_FORMATS,
    IMAGE_FORMATS,
    Source,
    SourceFile,
    archive_and_member,
    first_line,
    hugging_face_files,
    identify,
    identify_parts,
    list_files,
    load_hugging_face,
    locate,
    parts_of,
)
from bigbatch.recipes.core.data.stdlib_facts import ENTITY_COLUMNS, PAIR_COLUMNS, stdlib_entities, stdlib_pairs
from bigbatch.recipes.core.data.stdlib_text import (
    DIALOGUE_COLUMNS,
    FUNCTION_COLUMNS,
    IMPORT_COLUMNS,
    MODULE_COLUMNS,
    QUESTION_COLUMNS,
    SUMMARY_COLUMNS,
    stdlib_dialogues,
    stdlib_docstrings,
    stdlib_documents,
    stdlib_functions,
    stdlib_imports,
    stdlib_modules,
    stdlib_questions,
    stdlib_summaries,
)
from bigbatch.recipes.core.errors import UserError

TEXT_BLOCK_BYTES = 2**23  # a longer .txt file is cut at line ends into documents of about this size
LARGEST_FIELD_CHARACTERS = 2**24  # of a .csv file: an unclosed quote swallows no more than this
ROWS_AT_ONCE = 256
TEXT_COLUMN = "text"  # the only column of a file without columns
PARALLEL_COLUMNS = ("source", "target")
KIND_COLUMN = "kind"  # of a docstring

Columns = Mapping[str, str]  # name of a column -> JSON path of the setting that asks for it, for messages


class Row(NamedTuple):
    """Values of the columns that were asked for."""

    values: dict[str, Any]
    origin: str
    """Where it comes from, for messages: file, or file:line."""
    file_fraction: float
    """How much of its file has been read when it arrives, from 0 to 1."""


class Document(NamedTuple):
    """One text."""

    text: str
    origin: str
    file_fraction: float


def documents(sources: Sequence[Source], text_key: str = TEXT_COLUMN) -> Iterator[Document]:
    """Yield every document of the sources in order, in bounded memory."""
    for file in list_files(sources):
        yield from read_documents(file, text_key)


def read_rows(file: SourceFile, columns: Columns) -> Iterator[Row]:
    """Yield the rows of one file that its source takes, always the same in the same order."""
    table = file.table
    constants = {name: value for name, value in table.constants.items() if name in columns}
    read = {name: setting for name, setting in columns.items() if name not in constants}
    for number, row in enumerate(_READERS[file.format](file, read), 1):
        if number % (table.take_every or 1) == 0 and (table.skip_every is None or number % table.skip_every):
            yield row._replace(values=row.values | constants) if constants else row


def read_documents(file: SourceFile, text_key: str = TEXT_COLUMN) -> Iterator[Document]:
    """Yield one column of a file; files without columns are texts whatever it is called."""
    has_columns = file.format not in ("txt", "stdlib") and (file.format != "lines" or file.table.pattern)
    name = text_key if has_columns else TEXT_COLUMN
    for values, origin, file_fraction in read_rows(file, {name: "data.text_key"}):
        yield Document(as_text(values[name], origin, name), origin, file_fraction)


def hash_file(file: SourceFile) -> str:
    """Return the xxh3-128 of the bytes as they lie on disk, having made sure that they are still the ones listed."""
    paths, now = [Path(archive_and_member(file.path)[0])], None
    if file.format == "hf":
        paths, now = hugging_face_files(file.path, file.path)
    elif file.format in (*IMAGE_FORMATS, *AUDIO_FORMATS, "parallel", "numbers"):
        paths, now = [path for path in parts_of(file) if path.is_file()], identify_parts(file, file.path).identity
    elif paths[0].exists():
        now = identify(file.path, file.path)
    if now != file.identity:
        raise UserError(file.path, "changed while it was read; prepare again when nothing writes to it any more")
    return xxhash.xxh3_128_hexdigest("".join(hash_of(path) for path in paths).encode())


def as_text(value: Any, origin: str, column: str) -> str:
    """Return a column's text, which a null has none of."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(origin, f"{column!r} is {shown(value)}, not a text")
    return value


def text_of(row: Row, column: str) -> str:
    """Return the same of a row, where half of a surrogate pair, which UTF-8 has not, is another character."""
    found = as_text(row.values[column], row.origin, column)
    return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def as_number(value: Any) -> float | None:
    """Return the finite number that a value is, or spells; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_text(file: SourceFile, columns: Columns) -> Iterator[Row]:
    _require(columns, [TEXT_COLUMN], file.path)
    decoder, offset = codecs.getincrementaldecoder(file.table.encoding)(), 0
    with _opened(file) as (stream, fraction):
        while block := stream.read(TEXT_BLOCK_BYTES):
            block += stream.readline(TEXT_BLOCK_BYTES)
            held_bytes = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_decoded(file, offset - held_bytes + error.start) from None
            text = text.removeprefix("\ufeff") if offset == 0 else text
            yield Row({TEXT_COLUMN: text}, file.path, fraction())
            offset += len(block)
    if held_bytes := len(decoder.getstate()[0]):
        raise _not_decoded(file, offset - held_bytes)


def _read_lines(file: SourceFile, columns: Columns) -> Iterator[Row]:
    pattern = re.compile(file.table.pattern or f"(?P<{TEXT_COLUMN}>.*)")
    _require(columns, pattern.groupindex, file.path)
    with _opened(file) as (stream, fraction):
        for number, line in _lines(stream, file):
            origin = f"{file.path}:{number}"
            text = line.removesuffix("\n").removesuffix("\r")
            found = pattern.fullmatch(text)
            if found is None:
                raise UserError(origin, f"is {shown(text)}, which the pattern {file.table.pattern!r} does not match")
            yield Row({name: found[name] for name in columns}, origin, fraction())


def _read_parallel(file: SourceFile, columns: Columns) -> Iterator[Row]:
    """Yield pairs of lines; where one file is longer, None stands for the other's."""
    _require(columns, PARALLEL_COLUMNS, file.path)
    target = file._replace(path=str(locate(file.table.target)))
    with _opened(file) as (stream, fraction), _opened(target) as (target_stream, _):
        pairs = zip_longest(_lines(stream, file), _lines(target_stream, target), fillvalue=(0, None))
        for number, lines in enumerate(pairs, 1):
            texts = (None if line is None else line.removesuffix("\n").removesuffix("\r") for _, line in lines)
            values: dict[str, str | None] = dict(zip(PARALLEL_COLUMNS, texts, strict=True))
            longer = file.path if values["source"] is not None else target.path
            yield Row({name: values[name] for name in columns}, f"{longer}:{number}", fraction())


def _read_numbers(file: SourceFile, columns: Columns) -> Iterator[Row]:
    _require(columns, NUMBER_COLUMNS, file.path)
    for number, values in enumerate(number_pairs(), 1):
        yield Row({name: values[name] for name in columns}, f"{file.path}:{number}", 1.0)


def _read_json_lines(file: SourceFile, columns: Columns) -> Iterator[Row]:
    with _opened(file) as (stream, fraction):
        for number, line in _lines(stream, file):
            if not line.strip():
                continue
            origin = f"{file.path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(origin, f"is not JSON: {error}") from None
            if not isinstance(row, dict):
                wanted = " and ".join(map(repr, columns))
                raise UserError(origin, f"is {shown(row)}; each line must be an object that holds {wanted}")
            _require(columns, row, origin)
            yield Row({name: row[name] for name in columns}, origin, fraction())


def _read_document(file: SourceFile, columns: Columns) -> Iterator[Row]:
    known, rows = _DOCUMENTS[file.format]
    _require(columns, known, file.path)
    with _opened(file) as (stream, _):
        content = stream.read()
    try:
        document = json.loads(content.decode(file.table.encoding).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise _not_decoded(file, error.start) from None
    except json.JSONDecodeError as error:
        hint = "; `format` jsonl reads an object a line" if error.msg == "Extra data" else ""
        raise UserError(f"{file.path}:{error.lineno}", f"is not JSON: {error}{hint}") from None
    for values, place in rows(document, file.path):
        yield Row({name: values[name] for name in columns}, f"{file.path}:{place}", 1.0)


def _read_annotations(file: SourceFile, columns: Columns) -> Iterator[Row]:
    known, rows = (SENTENCE_COLUMNS, conll_rows) if file.format == "conll" else (RELATION_COLUMNS, semeval_rows)
    _require(columns, known, file.path)
    with _opened(file) as (stream, fraction):
        for values, number in rows(_lines(stream, file)):
            yield Row({name: values[name] for name in columns}, f"{file.path}:{number}", fraction())


def _read_csv(file: SourceFile, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_FIELD_CHARACTERS)
    # Tab-separated files have no quoting: a quotation mark at the start of a field is part of the text.
    style: dict[str, Any] = {"strict": True}
    if file.format == "tsv":
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with _opened(file) as (stream, fraction):
        rows = csv.reader((line for _, line in _lines(stream, file)), **style)
        try:
            names = list(file.table.columns) or next(rows, [])
            named_by = "`columns`" if file.table.columns else "the header"
            _require(columns, names, file.path, "" if file.table.columns else "; `columns` names them without a header")
            places = {name: names.index(name) for name in columns}
            for row in rows:
                origin = f"{file.path}:{rows.line_num}"
                if row and len(row) != len(names):
                    raise UserError(origin, f"has {len(row)} fields; {named_by} names {len(names)}")
                if row:
                    yield Row({name: row[place] for name, place in places.items()}, origin, fraction())
        except csv.Error as error:
            raise UserError(f"{file.path}:{rows.line_num}", f"is not a row: {error}") from None


def _read_parquet(file: SourceFile, columns: Columns) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            _require(columns, table.schema_arrow.names, file.path)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=list(columns)):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file.path}:{number}", number / table.metadata.num_rows)
    except UnicodeDecodeError:
        found = f"one of {', '.join(map(repr, columns))} is not UTF-8 in one of the next rows"
        raise UserError(f"{file.path}:{number + 1}", found) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(file.path, f"cannot be read: {first_line(error)}") from None


def _read_stdlib(file: SourceFile, columns: Columns) -> Iterator[Row]:
    _require(columns, [TEXT_COLUMN], file.path)
    for text in stdlib_documents(Path(file.path)):
        yield Row({TEXT_COLUMN: text}, file.path, 1.0)


def _read_docstrings(file: SourceFile, columns: Columns) -> Iterator[Row]:
    _require(columns, [TEXT_COLUMN, KIND_COLUMN], file.path)
    for number, found in enumerate(stdlib_docstrings(Path(file.path)), 1):
        yield Row(dict(zip((TEXT_COLUMN, KIND_COLUMN), found, strict=True)), f"{file.path}:{number}", 1.0)


def _read_stdlib_rows(file: SourceFile, columns: Columns) -> Iterator[Row]:
    known, rows = _STDLIB_ROWS[file.format]
    _require(columns, known, file.path)
    for number, values in enumerate(rows(Path(file.path)), 1):
        yield Row({name: values[name] for name in columns}, f"{file.path}:{number}", 1.0)


_STDLIB_ROWS = {
    "questions": (QUESTION_COLUMNS, stdlib_questions),
    "dialogues": (DIALOGUE_COLUMNS, stdlib_dialogues),
    "summaries": (SUMMARY_COLUMNS, stdlib_summaries),
    "functions": (FUNCTION_COLUMNS, stdlib_functions),
    "modules": (MODULE_COLUMNS, stdlib_modules),
    "imports": (IMPORT_COLUMNS, stdlib_imports),
    "entities": (ENTITY_COLUMNS, stdlib_entities),
    "relations": (PAIR_COLUMNS, stdlib_pairs),
}


def _read_smart(file: SourceFile, columns: Columns) -> Iterator[Row]:
    """Yield the records of a collection in the form of Salton's SMART system, as Cranfield's is published."""
    fields: dict[str, str] = {}
    origin, field, number = "", "", 0
    with _opened(file) as (stream, fraction):
        for line_number, line in _lines(stream, file):
            text = line.rstrip("\r\n")
            if found := re.fullmatch(r"\.I\s+(\S+)\s*", text):
                if fields:
                    yield _smart_row(fields, columns, origin, fraction())
                origin, number, field = f"{file.path}:{line_number}", number + 1, ""
                fields = {"I": found[1], "number": str(number)}
            elif fields and (found := re.fullmatch(r"\.([A-Z])\s*", text)):
                field = found[1]
                fields.setdefault(field, "")
            elif field:
                fields[field] += line
            elif text.strip():
                raise UserError(
                    f"{file.path}:{line_number}", f"is {shown(text)}; right is .I and an id, or a field's .X"
                )
    if fields:
        yield _smart_row(fields, columns, origin, 1.0)


def _smart_row(fields: dict[str, str], columns: Columns, origin: str, fraction: float) -> Row:
    _require(columns, fields, origin)
    return Row({name: fields[name].strip() for name in columns}, origin, fraction)


def _read_hugging_face(file: SourceFile, columns: Columns) -> Iterator[Row]:
    dataset = load_hugging_face(file.path, file.path)
    _require(columns, dataset.column_names, file.path)
    number = 0
    for batch in dataset.select_columns(list(columns)).iter(batch_size=ROWS_AT_ONCE):
        named = [_label_names(batch[name], dataset.features[name]) for name in columns]
        for values in zip(*named, strict=True):
            number += 1
            row = dict(zip(columns, values, strict=True))
            yield Row(row, f"{file.path}:{number}", number / dataset.num_rows)


_DOCUMENTS = {
    "squad": (SQUAD_COLUMNS, squad_rows),
    "slots": (SLOT_COLUMNS, slot_rows),
    "sgd": (SGD_COLUMNS, sgd_rows),
}
_READERS: dict[str, Callable[[SourceFile, Columns], Iterator[Row]]] = {
    "txt": _read_text,
    "lines": _read_lines,
    "parallel": _read_parallel,
    "numbers": _read_numbers,
    "jsonl": _read_json_lines,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "squad": _read_document,
    "slots": _read_document,
    "sgd": _read_document,
    "conll": _read_annotations,
    "semeval": _read_annotations,
    "hf": _read_hugging_face,
    "stdlib": _read_stdlib,
    "docstrings": _read_docstrings,
    **dict.fromkeys(_STDLIB_ROWS, _read_stdlib_rows),
    "smart": _read_smart,
}


@contextmanager
def _opened(file: SourceFile) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """Open a file, compressed, in an archive or neither, with a function that tells how much of it has been read."""
    name, member = archive_and_member(file.path)
    try:
        with ExitStack() as stack:
            stored: Any = stack.enter_context(Path(name).open("rb"))
            if member:
                stored = stack.enter_context(stack.enter_context(zipfile.ZipFile(stored)).open(member))
            stream: Any = gzip.GzipFile(fileobj=stored) if file.path.lower().endswith(".gz") else stored
            yield stream, lambda: stored.tell() / file.size_bytes
    except (EOFError, zlib.error, zipfile.BadZipFile, OSError) as error:
        raise UserError(file.path, f"cannot be read: {first_line(error)}") from None


def _lines(stream: IO[bytes], file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yield (line number, line); only line feeds end a line, not all that Unicode says would."""
    offset = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode(file.table.encoding)
        except UnicodeDecodeError as error:
            raise _not_decoded(file, offset + error.start) from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text
        offset += len(line)


def _label_names(values: list[Any], feature: Any) -> list[Any]:
    """Replace the numbers of a data set's own classes by their names; -1, which stands for none, by None."""
    import datasets  # noqa: PLC0415 - takes a second, and most runs read plain files

    if isinstance(feature, datasets.ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else None for value in values]
    if isinstance(inner := getattr(feature, "feature", None), datasets.ClassLabel):
        return [value and _label_names(value, inner) for value in values]
    return values


def _not_decoded(file: SourceFile, offset: int) -> UserError:
    found = f"is not {file.table.encoding.upper()}: the first wrong byte is at offset {offset}"
    return UserError(file.path, found)


def _require(columns: Columns, there: Iterable[str], where: str, hint: str = "") -> None:
    for name, setting in columns.items():
        if name not in there:
            found = ", ".join(map(shown, there)) or "none"
            raise UserError(where, f"has no column {name!r} ({setting}); there are: {found}{hint}")
