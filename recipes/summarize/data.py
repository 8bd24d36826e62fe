"""Documents and summaries: from rows to a prepared folder, and its splits as samples, which are windows.

W windows of at most S sentences, each sentence [CLS] its tokens [SEP], lie in R rows of T tokens.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from bigbatch.recipes.core.data.clean import units
from bigbatch.recipes.core.data.examples import (
    ORIGIN,
    Built,
    record_batches,
    write_split,
)
from bigbatch.recipes.core.data.rows import read_rows, shown
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.data.splits import (
    TRAIN,
    check_splits,
    count_leaks,
    cut_splits,
    leave_out,
    prepare_splits,
    shown_counts,
)
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, encode_documents, make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.summarize.config import DocumentDataSection
from bigbatch.recipes.summarize.rouge import Rouge

ROWS_AT_ONCE = 256
BETWEEN_SENTENCES, BETWEEN_REFERENCES = "\n", "\n\n"
_SURROGATE = re.compile(r"[\ud800-\udfff]")

SCHEMA = pyarrow.schema(
    {
        "text": pyarrow.string(),
        "references": pyarrow.string(),
        "lengths": pyarrow.list_(pyarrow.int32()),  # of each sentence's tokens, without special ones
        "tokens": pyarrow.list_(pyarrow.uint32()),
        "summary_lengths": pyarrow.list_(pyarrow.int32()),  # of each reference's tokens, the special ones too
        "summary_tokens": pyarrow.list_(pyarrow.uint32()),
        "oracle": pyarrow.list_(pyarrow.int32()),
        "worths": pyarrow.list_(pyarrow.float32()),
        ORIGIN: pyarrow.string(),
    }
)


class DocumentRow(NamedTuple):
    """A document; rows are equal where their texts are."""

    text: str
    """A line a sentence."""
    references: tuple[str, ...]
    """The same, of each summary."""
    origin: str

    labels = ()  # rows are not of several kinds

    @property
    def sentences(self) -> list[str]:
        """Return the document's sentences."""
        return self.text.split(BETWEEN_SENTENCES)


def prepare(data: DocumentDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Make the prepared folder of these settings and sources, or find it.

    The tokenizer is that of a folder, or is made as the settings say.
    """
    return prepare_splits(data, _build, tokenizer_folder)


def sentences_of(value: Any) -> list[str]:
    """Return the sentences of a text, or of a list of them; raise ValueError for what is neither.

    Space inside a sentence becomes a single one, half of a surrogate pair U+FFFD; empty ones are left out.
    """
    if isinstance(value, str):
        parts = units(value, "sentence")
    elif isinstance(value, list) and all(isinstance(part, str) for part in value):
        parts = value
    else:
        raise ValueError(f"is {shown(value)}; right is a text or a list of sentences")
    found = (" ".join(_SURROGATE.sub("\ufffd", part).split()) for part in parts)
    return [sentence for sentence in found if sentence]


def references_of(value: Any, are_sentences: bool) -> list[str]:
    """Return the summaries that a row gives, a line a sentence; raise ValueError for what is none.

    A list is of references, or of the sentences of one; a list of lists of the sentences of each.
    """
    several = isinstance(value, list) and not (are_sentences and all(isinstance(part, str) for part in value))
    found = [sentences_of(part) for part in (value if several else [value])]
    return [BETWEEN_SENTENCES.join(sentences) for sentences in found if sentences]


# ---------------------------------------------------------------------------------------------------------- prepare


def _build(folder: Path, files: dict[str, list[SourceFile]], data: DocumentDataSection) -> Built:
    counts: Counter[str] = Counter()
    rouge = Rouge()
    rows = {split: list(_read(data, found, rouge, counts)) for split, found in files.items()}
    rows = cut_splits(data, rows)
    leaks = count_leaks(data, rows)
    if not rows[TRAIN]:
        raise UserError("data.train", f"no document is left to train on ({shown_counts(counts)})")
    check_splits(data, rows, counts)
    tokenizer = make_tokenizer(data.tokenizer, _training_texts(rows[TRAIN]), folder, knows_all=False)
    written = {}
    for split, found in rows.items():
        if found:
            records = _records(found, tokenizer, rouge, data.oracle_sentences)
            written[split] = write_split(folder, split, SCHEMA, record_batches(SCHEMA, records))
    return Built(written, {"counts": dict(+counts), "leaks": leaks})


def _read(
    data: DocumentDataSection, files: list[SourceFile], rouge: Rouge, counts: Counter[str]
) -> Iterator[DocumentRow]:
    """Yield the documents of some files without those that the settings leave out, and count."""
    for row in (row for file in files for row in read_rows(file, data.columns)):
        counts["read"] += 1
        column = data.document_column
        try:
            sentences = sentences_of(row.values[column])
            column = data.summary_column
            references = references_of(row.values[column], data.summary_list == "sentences")
        except ValueError as error:
            leave_out(data, counts, "of no right type", row.origin, f"{column!r} {error}")
            continue
        worded = tuple(reference for reference in references if rouge.words.tokenize(reference))
        if not sentences:
            leave_out(data, counts, "without a sentence", row.origin, f"{data.document_column!r} has no sentence")
        elif not worded:
            leave_out(data, counts, "without a summary", row.origin, f"{column!r} has no summary with a word")
        else:
            counts["empty_references"] += len(references) - len(worded)
            yield DocumentRow(BETWEEN_SENTENCES.join(sentences), worded, row.origin)


def _training_texts(rows: list[DocumentRow]) -> Iterator[str]:
    """Yield what a tokenizer is trained on: documents and summaries."""
    for row in rows:
        yield row.text
        yield from row.references


def _records(
    rows: list[DocumentRow], tokenizer: TextTokenizer, rouge: Rouge, oracle_sentences: int
) -> Iterator[tuple[Any, ...]]:
    """Yield the values of SCHEMA."""
    waiting = iter(rows)
    while some := list(islice(waiting, ROWS_AT_ONCE)):
        encoded = iter(encode_sentences(tokenizer, [row.sentences for row in some]))
        texts = [" ".join(text.split(BETWEEN_SENTENCES)) for row in some for text in row.references]
        summaries = iter(encode_documents(tokenizer, texts))
        for row, tokens in zip(some, encoded, strict=True):
            oracle, worths = rouge.label(row.sentences, row.references, oracle_sentences)
            written = list(islice(summaries, len(row.references)))
            columns = (*_flat(tokens), *_flat(written), oracle, worths, row.origin)
            yield row.text, BETWEEN_REFERENCES.join(row.references), *columns


def _flat(lists: list[np.ndarray]) -> tuple[list[int], np.ndarray]:
    return [len(tokens) for tokens in lists], np.concatenate(lists)


def encode_sentences(tokenizer: TextTokenizer, documents: list[list[str]]) -> list[list[np.ndarray]]:
    """Return for each document its sentences' tokens, without special ones, as they are in its running text."""
    spaced = [[" " * (place > 0) + text for place, text in enumerate(sentences)] for sentences in documents]
    first = int(tokenizer.begin_of_text is not None)
    encoded = iter(encode_documents(tokenizer, [text for sentences in spaced for text in sentences]))
    return [[tokens[first:-1] for tokens in islice(encoded, len(sentences))] for sentences in spaced]
