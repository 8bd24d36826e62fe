"""Pairs of texts: from rows to a prepared folder, and its splits as samples.

A sample of the training split is a row of several pairs, one of another split, or of pairs with scores, is one pair.
S tokens of the sources lie in each of B rows, and T tokens of the targets.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from tokenizers.processors import TemplateProcessing

from bigbatch.recipes.core.data.examples import ORIGIN, Built, Examples, read_examples, record_batches, write_split
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.packing import first_fit_pairs
from bigbatch.recipes.core.data.rows import as_number, as_text, read_rows, shown
from bigbatch.recipes.core.data.sampler import sample_order
from bigbatch.recipes.core.data.shards import IGNORED_LABEL
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
from bigbatch.recipes.core.data.tokenizing import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    TextTokenizer,
    encode_documents,
    load_tokenizer,
    make_tokenizer,
)
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.translate.config import PairDataSection

ROWS_AT_ONCE = 1024
_TOKENS = pyarrow.list_(pyarrow.uint32())
SCHEMA = pyarrow.schema(
    {
        "source": pyarrow.string(),
        "target": pyarrow.string(),
        "source_tokens": _TOKENS,
        "target_tokens": _TOKENS,
        "score": pyarrow.float64(),
        ORIGIN: pyarrow.string(),
    }
)


class PairRow(NamedTuple):
    """A pair; rows are equal where their sources are."""

    text: str
    """The source."""
    target: str
    score: float
    """0 where pairs have none."""
    origin: str

    labels = ()  # rows are not of several kinds


def prepare(data: PairDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it.

    The tokenizer is that of a folder, or is made as the settings say.
    """
    folder = prepare_splits(data, _build, tokenizer_folder)
    tell_prepared(folder, data, _held(folder, data), "texts that stand")
    return folder


class PairSamples:
    """A split as `Samples`."""

    def __init__(self, folder: Path, split: str, data: PairDataSection, begin_of_target: int, seed: int = 0) -> None:
        """Map the split into memory; training pairs without scores come in rows, which ones together by the seed."""
        self.examples, self.has_scores = Examples(folder, split), data.score_column is not None
        self.begin_of_target = begin_of_target
        self.facts: dict[str, Any] = self.examples.facts
        self.lengths = np.stack([self.examples.lengths(f"{side}_tokens") for side in ("source", "target")], 1)  # [N, 2]
        is_packed = split == TRAIN and data.shares_rows
        self.row_tokens = data.sequence_length if is_packed else None
        self.pairs = np.arange(self.examples.num_rows)  # sample by sample
        rows = self.pairs
        if is_packed:
            self.pairs = sample_order(seed, self.examples.num_rows, 0, self.examples.num_rows).ids
            rows = first_fit_pairs(self.lengths[self.pairs], data.sequence_length)
            order = np.argsort(rows, kind="stable")
            self.pairs, rows = self.pairs[order], rows[order]
        self.begins = np.searchsorted(rows, np.arange(rows[-1] + 2))  # of each sample's pairs
        self.num_samples = len(self.begins) - 1
        content = [self.examples.fingerprint, self.row_tokens, begin_of_target, seed if is_packed else 0]
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples as `collate` does; with scores also scores [B] float64."""
        groups = [self.pairs[self.begins[number] : self.begins[number + 1]] for number in sample_ids]
        pairs = np.concatenate(groups)
        sources, targets = (self.examples.lists(f"{side}_tokens", pairs) for side in ("source", "target"))
        rows = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        batch = collate(sources, targets, rows, self.begin_of_target, self.row_tokens)
        return batch | ({"scores": self.examples.numbers("score")[pairs]} if self.has_scores else {})

    @property
    def mean_tokens(self) -> tuple[float, float]:
        """Of a sample, the source's and the target's."""
        source, target = self.lengths.sum(0) / self.num_samples
        return float(source), float(target)


def open_split(folder: Path, split: str, data: PairDataSection, begin_of_target: int) -> PairSamples | None:
    """Open a split of a prepared folder; None where there is none of this name."""
    return PairSamples(folder, split, data, begin_of_target) if split in read_examples(folder).splits else None


def collate(
    sources: list[np.ndarray],
    targets: list[np.ndarray],
    rows: np.ndarray,  # ascending, the row of each pair
    begin_of_target: int,
    row_tokens: int | None,
) -> dict[str, np.ndarray]:
    """Lay pairs out side by side in rows of `row_tokens`, or of as many as the fullest needs.

    tokens [B, S] and written [B, T] int64, what encoder and decoder read; labels [B, T] int64, what the decoder is to
    say; documents [B, S] and target_documents [B, T] int32, the number of the pair in its row, -1 where nothing lies.
    """
    numbers = np.arange(len(rows)) - np.searchsorted(rows, rows)
    tokens, documents = _lay_out(sources, rows, numbers, row_tokens, 0)
    labels, target_documents = _lay_out(targets, rows, numbers, row_tokens, IGNORED_LABEL)
    begin = np.array([begin_of_target])
    inputs = _lay_out([np.append(begin, target[:-1]) for target in targets], rows, numbers, row_tokens, 0)[0]
    parts = {"tokens": tokens, "written": inputs, "labels": labels}
    return parts | {"documents": documents, "target_documents": target_documents}


def _lay_out(
    texts: list[np.ndarray], rows: np.ndarray, numbers: np.ndarray, row_tokens: int | None, filler: int
) -> tuple[np.ndarray, np.ndarray]:
    ends = np.zeros(int(rows[-1]) + 1, np.int64)
    offsets = []
    for text, row in zip(texts, rows, strict=True):
        offsets.append(ends[row])
        ends[row] += len(text)
    shape = (len(ends), row_tokens or int(ends.max()))
    values, documents = np.full(shape, filler, np.int64), np.full(shape, -1, np.int32)
    for text, row, number, offset in zip(texts, rows, numbers, offsets, strict=True):
        values[row, offset : offset + len(text)] = text
        documents[row, offset : offset + len(text)] = number
    return values, documents


# ---------------------------------------------------------------------------------------------------------- prepare


def _build(folder: Path, files: dict[str, list[SourceFile]], data: PairDataSection) -> Built:
    counts: Counter[str] = Counter()
    rows = {split: list(_read(data, found, counts)) for split, found in files.items()}
    rows = cut_splits(data, rows)
    leaks = count_leaks(data, rows)
    if not rows[TRAIN]:
        raise UserError("data.train", f"no pair is left to train on ({shown_counts(counts)})")
    texts = (text for row in rows[TRAIN] for text in (row.text, row.target))
    tokenizer = make_tokenizer(data.tokenizer, texts, folder, knows_all=False)
    if tokenizer.begin_of_text is None and data.tokenizer.kind != "pretrained":
        tokenizer = _with_an_end(tokenizer, folder)
    encoded = {split: list(_encode(found, tokenizer, data, counts)) for split, found in rows.items()}
    left = {split: [row for row, *_ in items] for split, items in encoded.items()}
    check_splits(data, left, counts)
    if not left[TRAIN]:
        raise UserError("data.train", f"no pair is left to train on ({shown_counts(counts)})")
    written = {
        split: write_split(folder, split, SCHEMA, record_batches(SCHEMA, map(_record, items)))
        for split, items in encoded.items()
        if items
    }
    scores = np.array([row.score for row in left[TRAIN]])
    spread = {"score_mean": float(scores.mean()), "score_deviation": float(scores.std()) or 1.0}
    return Built(written, {"counts": dict(+counts), "leaks": leaks, **spread})


def _with_an_end(tokenizer: TextTokenizer, folder: Path) -> TextTokenizer:
    """Let programs that know no more than the tokenizer end a text as the model reads it, and pad."""
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    end = settings["eos_token"]
    tokenizer.tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.end_of_text)]
    )
    (folder / TOKENIZER_FILE).write_text(tokenizer.tokenizer.to_str(pretty=True) + "\n")
    (folder / SETTINGS_FILE).write_text(json.dumps(settings | {"pad_token": end}, indent=2) + "\n")
    return load_tokenizer(folder)


def _read(data: PairDataSection, files: list[SourceFile], counts: Counter[str]) -> Iterator[PairRow]:
    """Yield the pairs of some files without those that the settings leave out, and count."""
    for row in (row for file in files for row in read_rows(file, data.columns)):
        counts["read"] += 1
        names = (data.source_column, data.target_column)
        missing = [name for name in names if row.values[name] is None]
        if missing:
            found = f"has no {missing[0]!r}: the files, or columns, are not of the same length"
            leave_out(data, counts, "without_a_partner", row.origin, found)
            continue
        source, target = (as_text(row.values[name], row.origin, name).strip() for name in names)
        score = row.values[data.score_column] if data.score_column else 0.0
        if not source or not target:
            leave_out(data, counts, "empty", row.origin, f"has an empty {names[int(bool(source))]!r}")
        elif (number := as_number(score)) is None:
            leave_out(data, counts, "bad_score", row.origin, f"has the score {shown(score)}; right is a number")
        else:
            yield PairRow(source, target, number, row.origin)


def _encode(
    rows: list[PairRow], tokenizer: TextTokenizer, data: PairDataSection, counts: Counter[str]
) -> Iterator[tuple[PairRow, np.ndarray, np.ndarray]]:
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[begin : begin + ROWS_AT_ONCE]
        sources = encode_documents(tokenizer, [row.text for row in part])
        targets = encode_documents(tokenizer, [row.target for row in part])
        for row, source, target in zip(part, sources, targets, strict=True):
            longest = max(len(source), len(target))
            if longest > data.sequence_length:
                found = f"has a text of {longest} tokens; data.sequence_length is {data.sequence_length}"
                leave_out(data, counts, "too_long", row.origin, found)
            else:
                yield row, source, target


def _record(item: tuple[PairRow, np.ndarray, np.ndarray]) -> tuple[Any, ...]:
    """Return the values of SCHEMA."""
    row, source, target = item
    return row.text, row.target, source, target, row.score, row.origin


def _held(folder: Path, data: PairDataSection) -> Iterator[str]:
    """Yield what a prepared folder holds, a line each."""
    manifest = read_examples(folder)
    for split in (split for split in SPLITS if split in manifest.splits):
        samples = PairSamples(folder, split, data, 0)
        source, target = samples.lengths.mean(0)
        line = f"{split}: {samples.examples.num_rows:,} pairs of {source:.1f} and {target:.1f} tokens on average"
        if samples.row_tokens:
            filled = samples.lengths.sum() / (2 * samples.num_samples * samples.row_tokens)
            line += f", in {samples.num_samples:,} rows of {samples.row_tokens} and as many, {filled:.1%} full"
        yield line
