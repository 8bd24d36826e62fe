"""Pairs of texts: from rows to a prepared folder, and its splits as samples.

Of each split a table of its texts, left ones first, and one of pairs, as numbers of texts; of splits that are ranked a
third: what BM25 finds for each left text.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from bigbatch.recipes.core.data.examples import (
    ORIGIN,
    Built,
    Examples,
    ExampleSplit,
    read_examples,
    record_batches,
    write_split,
)
from bigbatch.recipes.core.data.rows import Row, as_number, read_rows, shown, text_of
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.data.splits import (
    SPLITS,
    TRAIN,
    check_splits,
    count_leaks,
    cut_splits,
    leave_out,
    prepare_splits,
    shown_counts,
    tell_prepared,
)
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, encode_documents, make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.match.config import CollectionSection, MatchDataSection
from bigbatch.recipes.match.ranking import Lexical, Ranked, top, without

TEXTS, FOUND = "_texts", "_found"  # behind a split's name
ROWS_AT_ONCE = 1024

_NUMBERS = pyarrow.list_(pyarrow.int32())
TEXT_SCHEMA = pyarrow.schema(
    {
        "text": pyarrow.string(),
        "tokens": pyarrow.list_(pyarrow.uint32()),
        "id": pyarrow.string(),
        "is_right": pyarrow.int8(),
    }
)
PAIR_SCHEMA = pyarrow.schema(
    {
        "left": pyarrow.int32(),
        "right": pyarrow.int32(),
        "score": pyarrow.float32(),
        "negatives": _NUMBERS,
        ORIGIN: pyarrow.string(),
    }
)
FOUND_SCHEMA = pyarrow.schema(
    {
        "left": pyarrow.int32(),
        "documents": _NUMBERS,
        "scores": pyarrow.list_(pyarrow.float64()),
        "excluded": _NUMBERS,
    }
)

Embed = Callable[[list[str]], np.ndarray]
"""From texts to vectors of length 1."""


class PairRow(NamedTuple):
    """Two texts, and how well they match: a score from 0 to 1, or the grade of a judgement."""

    left: str
    right: str
    score: float
    negatives: tuple[str, ...]
    excluded: tuple[str, ...]
    """Texts that are no candidates for the left one."""
    text: str
    """What rows of one split share."""
    origin: str

    labels = ()  # rows are not of several kinds


class Collection(NamedTuple):
    """Texts by their ids."""

    documents: dict[str, str]
    queries: dict[str, str]


def prepare(
    data: MatchDataSection, tokenizer_folder: Path | None = None, miner: tuple[Embed, str] | None = None
) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it.

    The tokenizer is that of a folder, or is made as the settings say. The miner is a model and a hash that stands for
    it.
    """
    build = partial(_build, embed=miner and miner[0])
    folder = prepare_splits(data, build, tokenizer_folder, miner[1:] if miner else ())
    tell_prepared(folder, data, _held(folder, data), "rows that stand")
    return folder


def read_found(folder: Path, split: str) -> dict[int, tuple[Ranked, np.ndarray]]:
    """Return for each query what BM25 finds, and the documents that are no candidates."""
    table = Examples(folder, split + FOUND)
    rows = np.arange(table.num_rows)
    lists = [table.lists(name, rows) for name in ("documents", "scores", "excluded")]
    found = zip(table.numbers("left").tolist(), *lists, strict=True)
    return {left: (Ranked(documents.astype(np.int64), scores), excluded) for left, documents, scores, excluded in found}


def read_grades(pairs: Examples) -> dict[int, dict[int, float]]:
    """Return for each query its relevant documents; of several judgements of one the best counts."""
    grades: dict[int, dict[int, float]] = {}
    columns = (pairs.numbers(name).tolist() for name in ("left", "right", "score"))
    for left, right, score in zip(*columns, strict=True):
        own = grades.setdefault(left, {})
        own[right] = max(score, own.get(right, 0.0))
    return grades


def rarities(folder: Path, vocabulary_size: int) -> np.ndarray:
    """Return log((N + 1) / (n + 1)) of each token [V] that n of the N training texts hold, over its mean."""
    texts = Examples(folder, TRAIN + TEXTS)
    counts = np.zeros(vocabulary_size)
    for text in texts.lists("tokens", np.arange(texts.num_rows)):
        counts[np.unique(text)] += 1
    found = np.log((texts.num_rows + 1) / (counts + 1))
    return found / found.mean()


def _build(folder: Path, files: dict[str, list[SourceFile]], data: MatchDataSection, embed: Embed | None) -> Built:
    counts: Counter[str] = Counter()
    collection = _read_collection(data, files, counts)
    rows = {split: list(_read(data, split, files[split], collection, counts)) for split in SPLITS}
    rows = cut_splits(data, rows)
    leaks = count_leaks(data, rows)
    if not rows[TRAIN]:
        raise UserError("data.train", f"no pair is left to train on ({shown_counts(counts)})")
    check_splits(data, rows, counts)
    if data.mining:
        rows[TRAIN] = _with_mined(rows[TRAIN], data, embed)
    tokenizer = make_tokenizer(data.tokenizer, _training_texts(rows[TRAIN], collection), folder, knows_all=False)
    written: dict[str, ExampleSplit] = {}
    for split, found in rows.items():
        if found:
            written |= _write(folder, split, found, data, collection, tokenizer)
    facts: dict[str, Any] = {"counts": dict(+counts), "leaks": leaks}
    facts["empty_documents"] = sum(not text.strip() for text in collection.documents.values())
    return Built(written, facts)


def _read_collection(data: MatchDataSection, files: dict[str, list[SourceFile]], counts: Counter[str]) -> Collection:
    if not (section := data.collection):
        return Collection({}, {})
    documents = (files["collection.documents"], section.document_id_column, section.document_columns, "document")
    queries = (files["collection.queries"], section.query_id_column, section.query_columns, "query")
    return Collection(*(_read_texts(data, *asked, counts) for asked in (documents, queries)))


def _read_texts(
    data: MatchDataSection,
    files: list[SourceFile],
    id_column: str,
    columns: tuple[str, ...],
    kind: str,
    counts: Counter[str],
) -> dict[str, str]:
    """Return texts by their ids; empty ones too, which a search never finds."""
    found: dict[str, str] = {}
    wanted = {id_column: f"data.collection.{kind}_id_column"}
    wanted |= dict.fromkeys(columns, f"data.collection.{kind}_columns")
    for row in (row for file in files for row in read_rows(file, wanted)):
        name = str(row.values[id_column])
        if name in found:
            leave_out(data, counts, f"repeated_{kind}_id", row.origin, f"has the id {name!r}, as an earlier one has")
            continue
        found[name] = "\n".join(text_of(row, column) for column in columns).strip()
    return found


def _read(
    data: MatchDataSection, split: str, files: list[SourceFile], collection: Collection, counts: Counter[str]
) -> Iterator[PairRow]:
    """Yield the pairs of some files without those that cannot be taken, and count."""
    section = data.collection if data.collection and split in data.collection.judged else None
    columns = (section.judgement_columns if section else data.pair_columns) | data.group_columns
    num_negatives = None
    for row in (row for file in files for row in read_rows(file, columns)):
        counts["read"] += 1
        try:
            pair = _judged(data, section, row, collection) if section else _pair(data, row)
            if not pair.left.strip() or not pair.right.strip():
                raise _BadRowError("empty", f"has an empty {'left' if pair.right.strip() else 'right'} text")
            num_negatives = len(pair.negatives) if num_negatives is None else num_negatives
            if len(pair.negatives) != num_negatives:
                found = f"has {len(pair.negatives)} negatives, an earlier row {num_negatives}; right is equally many"
                raise _BadRowError("wrong_negatives", found)
        except _BadRowError as error:
            leave_out(data, counts, error.kind, row.origin, error.found)
            continue
        if section and pair.score <= 0:
            counts["not_relevant"] += 1
            continue
        yield pair


class _BadRowError(Exception):
    def __init__(self, kind: str, found: str) -> None:
        self.kind, self.found = kind, found


def _pair(data: MatchDataSection, row: Row) -> PairRow:
    left, right = text_of(row, data.left_column), text_of(row, data.right_column)
    score, group = 1.0, left
    if data.score_column:
        score, group = _scaled(row.values[data.score_column], data), f"{left}\n{right}"
    if data.group_column:
        group = str(row.values[data.group_column])
    negatives = row.values[data.negatives_column] if data.negatives_column else ()
    negatives = (negatives,) if isinstance(negatives, str) else tuple(negatives or ())
    if not all(isinstance(text, str) and text.strip() for text in negatives):
        raise _BadRowError(
            "wrong_negatives", f"has {shown(negatives)} for negatives; right is a text or a list of such"
        )
    return PairRow(left, right, score, negatives, (), group, row.origin)


def _scaled(value: Any, data: MatchDataSection) -> float:
    """Return a score as a part of its range."""
    low, high = data.score_range
    score = as_number(value)
    if score is None or not low <= score <= high:
        raise _BadRowError("wrong_score", f"has the score {shown(value)}; right is a number from {low:g} to {high:g}")
    return (score - low) / (high - low)


def _judged(data: MatchDataSection, section: CollectionSection, row: Row, collection: Collection) -> PairRow:
    query, excluded = row.values[section.query_column], ()
    if section.queries:
        left = _named(query, collection.queries, "query", "queries")
    elif isinstance(query, list):
        excluded = tuple(_named(name, collection.documents, "document", "documents") for name in query)
        left = "\n".join(reversed(excluded))  # the newest first: a long history loses its end
    else:
        left = text_of(row, section.query_column)
    right = _named(row.values[section.document_column], collection.documents, "document", "documents")
    grade = 1.0
    if section.grade_column:
        value = row.values[section.grade_column]
        found = section.grades.get(str(value)) if section.grades else as_number(value)
        if found is None:
            known = f"one of {', '.join(section.grades)}" if section.grades else "a number"
            raise _BadRowError("wrong_grade", f"has the grade {shown(value)}; right is {known}")
        grade = found
    group = str(row.values[data.group_column]) if data.group_column else left
    return PairRow(left, right, grade, (), excluded, group, row.origin)


def _named(name: Any, texts: dict[str, str], kind: str, sources: str) -> str:
    if str(name) not in texts:
        raise _BadRowError(f"unknown_{kind}", f"names the {kind} {shown(name)}, which data.collection.{sources} lacks")
    return texts[str(name)]


def _training_texts(rows: list[PairRow], collection: Collection) -> Iterator[str]:
    """Yield what a tokenizer is trained on, each text once; what is searched is no secret."""
    pairs = (text for row in rows for text in (row.left, row.right, *row.negatives))
    yield from dict.fromkeys([*pairs, *collection.documents.values()])


def _with_mined(rows: list[PairRow], data: MatchDataSection, embed: Embed | None) -> list[PairRow]:
    """Give each pair its nearest wrong right texts; where BM25 finds too few, the next ones in the rows' order."""
    section = data.mining
    assert section
    lefts, rights = (list(dict.fromkeys(getattr(row, side) for row in rows)) for side in ("left", "right"))
    numbers = {text: number for number, text in enumerate(rights)}
    own: dict[str, set[int]] = {}
    for row in rows:
        own.setdefault(row.left, set()).add(numbers[row.right])
    most = max(map(len, own.values()))
    depth = section.skip + section.count + most
    if depth > len(rights):
        found = f"asks for {section.skip} + {section.count} wrong right texts"
        raise UserError("data.mining", f"{found}; there are {len(rights)}, up to {most} of them right")
    ranked = _by_vectors(lefts, rights, depth, embed) if embed else Lexical(rights, data.stemming).rank(lefts, depth)
    mined = {}
    for place, (left, found) in enumerate(zip(lefts, ranked, strict=True)):
        near = without(found, own[left]).documents[section.skip :].tolist()
        others = ((place + step) % len(rights) for step in range(len(rights)))
        near += [number for number in others if number not in own[left] and number not in near][: section.count]
        mined[left] = tuple(rights[number] for number in near[: section.count])
    return [row._replace(negatives=row.negatives + mined[row.left]) for row in rows]


def _by_vectors(lefts: list[str], rights: list[str], depth: int, embed: Embed) -> Iterator[Ranked]:
    candidates = embed(rights)
    for begin in range(0, len(lefts), ROWS_AT_ONCE):
        yield from (top(scores, depth) for scores in embed(lefts[begin : begin + ROWS_AT_ONCE]) @ candidates.T)


def _write(
    folder: Path,
    split: str,
    rows: list[PairRow],
    data: MatchDataSection,
    collection: Collection,
    tokenizer: TextTokenizer,
) -> dict[str, ExampleSplit]:
    """Write the tables of a split."""
    is_ranked = split != TRAIN and not data.score_column
    is_judged = data.collection is not None and split in data.collection.judged
    lefts = list(dict.fromkeys(row.left for row in rows))
    rights = list(collection.documents.values()) if is_ranked and is_judged else []
    rights = list(dict.fromkeys([*rights, *(text for row in rows for text in (row.right, *row.negatives))]))
    left_numbers = {text: number for number, text in enumerate(lefts)}
    right_numbers = {text: number for number, text in enumerate(rights, len(lefts))}
    ids = {text: name for name, text in collection.documents.items()}
    tokens = encode_documents(tokenizer, lefts + rights)
    sides = zip(lefts + rights, tokens, range(len(tokens)), strict=True)
    texts = ((t, encoded, ids.get(t, "") if n >= len(lefts) else "", int(n >= len(lefts))) for t, encoded, n in sides)
    pairs = (
        (
            left_numbers[row.left],
            right_numbers[row.right],
            row.score,
            [right_numbers[t] for t in row.negatives],
            row.origin,
        )
        for row in rows
    )
    tables = {split: (PAIR_SCHEMA, pairs), split + TEXTS: (TEXT_SCHEMA, texts)}
    if is_ranked:
        excluded = {row.left: [right_numbers[text] for text in row.excluded] for row in rows}
        tables[split + FOUND] = (FOUND_SCHEMA, _found(lefts, rights, excluded, data))
    return {
        name: write_split(folder, name, schema, record_batches(schema, found))
        for name, (schema, found) in tables.items()
    }


def _found(
    lefts: list[str], rights: list[str], excluded: dict[str, list[int]], data: MatchDataSection
) -> Iterator[tuple[Any, ...]]:
    """Yield what BM25 finds for each left text."""
    most = max(map(len, excluded.values()))
    ranked = Lexical(rights, data.stemming).rank(lefts, data.depth + most)
    for number, (left, one) in enumerate(zip(lefts, ranked, strict=True)):
        found = without(one._replace(documents=one.documents + len(lefts)), excluded[left])
        yield number, found.documents[: data.depth], found.scores[: data.depth], excluded[left]


def _held(folder: Path, data: MatchDataSection) -> Iterator[str]:
    """Yield what a prepared folder holds, a line each."""
    manifest = read_examples(folder)
    facts = manifest.facts
    for split in (split for split in SPLITS if split in manifest.splits):
        texts = Examples(folder, split + TEXTS)
        is_right = texts.numbers("is_right")
        line = f"{split}: {manifest.splits[split].num_rows:,} pairs of {int((is_right == 0).sum()):,} left and "
        line += f"{int(is_right.sum()):,} right texts"
        if long := int((texts.lengths("tokens") > data.sequence_length).sum()):
            line += f"; {long:,} of them are cut at {data.sequence_length} tokens"
        yield line
    if empty := facts["empty_documents"]:
        yield f"{empty:,} documents are empty: no search finds them"
