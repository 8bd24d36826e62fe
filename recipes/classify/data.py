"""Labeled texts: from rows to a prepared folder, and its splits as samples.

N texts of a batch are cut into W windows, which lie in R rows of T tokens; C labels.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from bigbatch.recipes.classify.config import LabeledDataSection
from bigbatch.recipes.core.data.clean import clean
from bigbatch.recipes.core.data.examples import (
    ORIGIN,
    Built,
    Examples,
    read_examples,
    record_batches,
    write_split,
)
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.labels import SHOWN_LABELS, is_known, label_names
from bigbatch.recipes.core.data.packing import cut_windows, lay_out, truncated
from bigbatch.recipes.core.data.rows import as_text, read_rows, shown
from bigbatch.recipes.core.data.sampler import Order
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    check_splits,
    count_leaks,
    cut_splits,
    leave_out,
    prepare_splits,
    tell_prepared,
)
from bigbatch.recipes.core.data.token_dropout import drop_tokens
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, encode_documents, load_tokenizer, make_tokenizer
from bigbatch.recipes.core.errors import UserError

ROWS_AT_ONCE = 1024


class LabeledRow(NamedTuple):
    """A text, cleaned, and its labels: one, or with multi_label any number, sorted."""

    text: str
    labels: tuple[str, ...]
    origin: str


def prepare(data: LabeledDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it.

    The tokenizer is that of a folder, or is made as the settings say.
    """
    folder = prepare_splits(data, _build, tokenizer_folder)
    tell_prepared(folder, data, _held(folder, data), "texts that stand")
    return folder


def open_split(
    folder: Path, split: str, data: LabeledDataSection, packing: bool, token_dropout: float = 0.0, seed: int = 0
) -> "ClassifiedSamples | None":
    """Open a split of a prepared folder; None where there is none of this name."""
    if split not in read_examples(folder).splits:
        return None
    return ClassifiedSamples(folder, split, data, packing, token_dropout, seed)


class ClassifiedSamples:
    """A split as `Samples`: each text is one sample, which may have several windows."""

    def __init__(
        self,
        folder: Path,
        split: str,
        data: LabeledDataSection,
        packing: bool,
        token_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Map the split into memory; raise UserError for a text that is too long, where such are refused."""
        self.tokenizer = load_tokenizer(folder)
        _check_sequence_length(data, self.tokenizer)
        if token_dropout and self.tokenizer.unknown is None:
            hint = "the tokenizer has no token for unknown words, as a wordpiece has; right is 0"
            raise UserError("objective.token_dropout", f"is {token_dropout}, and {hint}")
        self.examples = Examples(folder, split)
        self.data, self.packing, self.token_dropout, self.seed = data, packing, token_dropout, seed
        lengths = self.examples.lengths("tokens")
        _refuse_long(self.examples, lengths, data)
        self.num_samples, self.end_of_text = self.examples.num_rows, self.tokenizer.end_of_text
        self.labels: list[str] = self.examples.facts["labels"]
        self.multi_label = data.multi_label
        self.targets = self._read_targets()  # [num_samples] int64, or with multi_label [num_samples, C] float32
        self.class_counts = np.array(self.examples.facts["class_counts"][split], np.int64)  # [C]
        kept = lengths if data.on_long_text == "window" else lengths.clip(max=data.sequence_length)
        self.mean_tokens = float(kept.mean())
        self.fingerprint = self._fingerprint()

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows of these texts as `collate` does; labels [N] int64, with multi_label [N, C] float32."""
        texts = self.examples.lists("tokens", sample_ids)
        if self.data.on_long_text == "truncate":
            texts = [truncated(text, self.data.sequence_length) for text in texts]
        if self.token_dropout:
            order = Order(sample_ids, epochs)
            texts = drop_tokens(texts, self.token_dropout, self.seed, order, self.tokenizer, has_special=True)
        batch = collate(texts, self.data, self.packing, self.tokenizer)
        return batch | {"labels": self.targets[sample_ids]}

    def texts(self, sample_ids: np.ndarray) -> list[str]:
        """Return what stands in these samples, cleaned."""
        return self.examples.texts("text", sample_ids)

    def _read_targets(self) -> np.ndarray:
        if not self.multi_label:
            return self.examples.numbers("label").astype(np.int64)
        targets = np.zeros((self.num_samples, len(self.labels)), np.float32)
        counts = self.examples.lengths("label")
        numbers = self.examples.lists("label", np.arange(self.num_samples))
        targets[np.repeat(np.arange(self.num_samples), counts), np.concatenate(numbers)] = 1.0
        return targets

    def _fingerprint(self) -> str:
        section = self.data
        content: list[Any] = [self.examples.fingerprint, self.labels, section.sequence_length, section.on_long_text]
        content += [self.packing, self.token_dropout, self.seed if self.token_dropout else 0]
        return fingerprint_of(content)


def collate(
    texts: list[np.ndarray], data: LabeledDataSection, packing: bool, tokenizer: TextTokenizer
) -> dict[str, np.ndarray]:
    """Lay texts, tokens [length] as `encode_documents` gives them, out in rows of windows.

    Without `packing` each window has a row of its own, and T is the longest one's length. tokens [R, T] int64, 0 where
    nothing lies; documents [R, T] int32, the number of the window, W where nothing lies; firsts [W] int64, where each
    begins in the flattened tokens; lengths [W] and examples [W] int64, its text.
    """
    length = _check_sequence_length(data, tokenizer)
    if data.on_long_text == "window":
        windows, examples = cut_windows(texts, length, tokenizer.begin_of_text is not None)
    else:
        if data.on_long_text == "refuse" and (longest := max(map(len, texts))) > length:
            raise UserError("text", f"has {longest} tokens, and data.sequence_length is {length}")
        windows, examples = [truncated(text, length) for text in texts], np.arange(len(texts))
    return lay_out(windows, length if packing else None) | {"examples": examples}


def _build(folder: Path, files: dict[str, list[SourceFile]], data: LabeledDataSection) -> Built:
    counts: Counter[str] = Counter()
    rows = {split: list(_read(data, found, counts)) for split, found in files.items()}
    rows = cut_splits(data, rows, data.multi_label)
    labels = label_names(rows[TRAIN], data.labels, counts, data.multi_label)
    for split in (VALIDATION, TEST):
        rows[split] = [row for row in rows[split] if is_known(row, labels, data.on_error, counts)]
    leaks = count_leaks(data, rows)
    check_splits(data, rows, counts)
    tokenizer = make_tokenizer(data.tokenizer, (row.text for row in rows[TRAIN]), folder, knows_all=False)
    numbers = {label: number for number, label in enumerate(labels)}
    schema = _schema(data.multi_label)
    written = {
        split: write_split(
            folder, split, schema, record_batches(schema, _records(found, tokenizer, numbers, data.multi_label))
        )
        for split, found in rows.items()
        if found
    }
    tallies = {split: Counter(label for row in rows[split] for label in row.labels) for split in written}
    class_counts = {split: [tally[label] for label in labels] for split, tally in tallies.items()}
    facts = {"labels": labels, "class_counts": class_counts, "counts": dict(+counts), "leaks": leaks}
    return Built(written, facts)


def _read(data: LabeledDataSection, files: list[SourceFile], counts: Counter[str]) -> Iterator[LabeledRow]:
    """Yield the rows of some files, cleaned, without those that the settings leave out, and count."""
    cleaning = data.clean.model_copy(update={"min_characters": 0})  # what is empty is told from what is short
    seen: dict[str, tuple[str, ...]] = {}
    for row in (row for file in files for row in read_rows(file, data.columns)):
        counts["read"] += 1
        parts = [as_text(row.values[name], row.origin, name) for name in data.text_columns]
        text = clean(" ".join(filter(None, parts)), cleaning) or ""
        if not text.strip():
            leave_out(data, counts, "empty", row.origin, "has an empty text")
        elif len(text.strip()) < data.clean.min_characters:
            counts["too_short"] += 1
        else:
            labels = _labels_of(row.values[data.label_column], row.origin, data)
            if data.clean.deduplicate and text in seen:
                counts["duplicate" if labels == seen[text] else "duplicate_with_another_label"] += 1
                continue
            if data.clean.deduplicate:
                seen[text] = labels
            yield LabeledRow(text, labels, row.origin)


def _labels_of(value: Any, origin: str, data: LabeledDataSection) -> tuple[str, ...]:
    if data.multi_label:
        parts = value.split(data.label_separator) if isinstance(value, str) else value
        parts = parts if isinstance(parts, list) else [parts]
        return tuple(sorted({_label(part, origin, data) for part in parts} - {""}))
    label = _label(value, origin, data)
    if not label:
        raise UserError(origin, f"has no label in column {data.label_column!r}")
    return (label,)


def _label(value: Any, origin: str, data: LabeledDataSection) -> str:
    """Return a label's name; numbers and truth values are named as in JSON, a null is ""."""
    if isinstance(value, str) or value is None:
        return (value or "").strip()
    if not isinstance(value, int):
        hint = "; data.multi_label takes lists" if isinstance(value, list) and not data.multi_label else ""
        found = f"{data.label_column!r} is {shown(value)}, not a label"
        raise UserError(origin, f"{found}: a text, a whole number, true or false would be right{hint}")
    return json.dumps(value)


def _schema(multi_label: bool) -> pyarrow.Schema:
    label = pyarrow.list_(pyarrow.int32()) if multi_label else pyarrow.int32()
    tokens = pyarrow.list_(pyarrow.uint32())
    columns = {"text": pyarrow.string(), "tokens": tokens, "label": label, ORIGIN: pyarrow.string()}
    return pyarrow.schema(list(columns.items()))


def _records(
    rows: list[LabeledRow], tokenizer: TextTokenizer, numbers: dict[str, int], multi_label: bool
) -> Iterator[tuple[Any, ...]]:
    """Yield the values of the schema."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        for row, tokens in zip(part, encode_documents(tokenizer, [row.text for row in part]), strict=True):
            labels = sorted(numbers[label] for label in row.labels)
            yield row.text, tokens, labels if multi_label else labels[0], row.origin


def _check_sequence_length(data: LabeledDataSection, tokenizer: TextTokenizer) -> int:
    least = 2 + (tokenizer.begin_of_text is not None)
    if data.sequence_length < least:
        found = f"is {data.sequence_length}; a token between the special ones makes {least}"
        raise UserError("data.sequence_length", found)
    return data.sequence_length


def _refuse_long(examples: Examples, lengths: np.ndarray, data: LabeledDataSection) -> None:
    too_long = np.flatnonzero(lengths > data.sequence_length)
    if data.on_long_text == "refuse" and too_long.size:
        (origin,) = examples.texts(ORIGIN, too_long[:1])
        found = f"has {lengths[too_long[0]]} tokens, and data.sequence_length is {data.sequence_length}"
        raise UserError(origin, f"{found}; data.on_long_text 'truncate' or 'window' takes longer texts")


def _held(folder: Path, data: LabeledDataSection) -> Iterator[str]:
    """Yield what a prepared folder holds, a line each; raise UserError for a text that is to be refused."""
    manifest = read_examples(folder)
    facts = manifest.facts
    for split, about in manifest.splits.items():
        examples = Examples(folder, split)
        lengths = examples.lengths("tokens")
        _refuse_long(examples, lengths, data)
        counts = sorted(zip(facts["class_counts"][split], facts["labels"], strict=True), key=lambda pair: -pair[0])
        most = ", ".join(f"{label} {count:,}" for count, label in counts[:SHOWN_LABELS])
        more = f" and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
        line = f"{split}: {about.num_rows:,} rows: {most}{more}"
        if share := float((lengths > data.sequence_length).mean()):
            treated = "read in windows" if data.on_long_text == "window" else "cut there"
            line += f"; {share:.1%} are longer than {data.sequence_length} tokens, {treated}"
        yield line
