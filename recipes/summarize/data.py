"""Documents and summaries: from rows to a prepared folder, and its splits as samples, which are windows.

W windows of at most S sentences, each sentence [CLS] its tokens [SEP], lie in R rows of T tokens.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from bigbatch.recipes.core.config import TokenizerSection
from bigbatch.recipes.core.data.clean import units
from bigbatch.recipes.core.data.examples import (
    ORIGIN,
    Built,
    Examples,
    read_examples,
    record_batches,
    write_split,
)
from bigbatch.recipes.core.data.packing import lay_out
from bigbatch.recipes.core.data.rows import read_rows, shown
from bigbatch.recipes.core.data.sampler import Order, random_words
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.data.splits import (
    SPLITS,
    TRAIN,
    check_splits,
    count_leaks,
    cut_splits,
    leave_out,
    prepare_splits,
    prepared_splits,
    shown_counts,
    split_tokenizer,
    tell_left_out,
)
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, encode_documents, load_tokenizer, make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.summarize.config import SPECIAL_TOKENS, DocumentDataSection
from bigbatch.recipes.summarize.rouge import Rouge

# What becomes of documents is decided when a split is opened, so these change nothing in the folder.
NOT_CONTENT = {"sequence_length", "window_sentences", "packing"}
ROWS_AT_ONCE = 256
BETWEEN_SENTENCES, BETWEEN_REFERENCES = "\n", "\n\n"
DROPOUT = 0  # stream of random numbers
_SURROGATE = re.compile(r"[\ud800-\udfff]")

SCHEMA = pyarrow.schema(
    {
        "text": pyarrow.string(),
        "references": pyarrow.string(),
        "lengths": pyarrow.list_(pyarrow.int32()),  # of each sentence's tokens, without special ones
        "tokens": pyarrow.list_(pyarrow.uint32()),
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

    @property
    def labels(self) -> tuple[str, ...]:
        """Rows are not of several kinds."""
        return ()

    @property
    def sentences(self) -> list[str]:
        """Return the document's sentences."""
        return self.text.split(BETWEEN_SENTENCES)


def prepare(data: DocumentDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it.

    The tokenizer is that of a folder, or is made as the settings say.
    """
    section = split_tokenizer(data, tokenizer_folder)
    folder = prepare_splits(data, NOT_CONTENT, partial(_build, data=data, section=section), tokenizer_folder)
    _tell(folder, data)
    return folder


def prepared(data: DocumentDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Return the folder that `prepare` made last for these settings; the sources may be gone by now."""
    return prepared_splits(data, NOT_CONTENT, tokenizer_folder)


class DocumentSamples:
    """A split as `Samples`: each window is one sample, so that a batch is as large whatever the documents' lengths."""

    def __init__(
        self, folder: Path, split: str, data: DocumentDataSection, token_dropout: float = 0.0, seed: int = 0
    ) -> None:
        """Map the split into memory."""
        self.tokenizer = load_tokenizer(folder)
        self.split, self.data, self.token_dropout, self.seed = SPLITS.index(split), data, token_dropout, seed
        self.documents = Examples(folder, split)
        everything = np.arange(self.documents.num_rows)
        found = [cut_document(lengths, data) for lengths in self.documents.lists("lengths", everything)]
        self.rows = np.repeat(everything, [len(cuts) for cuts in found])  # [num_samples] each
        self.begins, self.ends = np.concatenate(found).T
        lengths = self.documents.lengths("tokens") + SPECIAL_TOKENS * self.documents.lengths("lengths")
        self.mean_tokens = float(lengths.sum() / len(self.rows))
        self.num_samples = len(self.rows)
        self.fingerprint = self._fingerprint()

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows as `collate` does, and what is right: labels and worths [W, S] float32, 0 beyond.

        rows [W] is the window's document, begins [W] its first sentence there, splits [W] the number of the split.
        """
        rows, begins, ends = (side[sample_ids] for side in (self.rows, self.begins, self.ends))
        windows = [self._sentences(*window) for window in zip(rows.tolist(), begins, ends, strict=True)]
        if self.token_dropout:
            windows = self._drop(windows, Order(sample_ids, epochs))
        batch = collate(windows, self.data, self.tokenizer)
        labels, worths = (np.zeros(batch["places"].shape, np.float32) for _ in range(2))
        oracles, values = self.documents.lists("oracle", rows), self.documents.lists("worths", rows)
        for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            labels[number, : end - begin] = np.isin(np.arange(begin, end), oracles[number])
            worths[number, : end - begin] = values[number][begin:end]
        targets = {"labels": labels, "worths": worths}
        return batch | targets | {"rows": rows, "begins": begins, "splits": np.full(len(rows), self.split)}

    def _sentences(self, row: int, begin: int, end: int) -> list[np.ndarray]:
        (lengths,), (tokens,) = (self.documents.lists(name, np.array([row])) for name in ("lengths", "tokens"))
        places = np.cumsum(np.append(0, lengths))
        return [tokens[places[number] : places[number + 1]] for number in range(begin, end)]

    def _drop(self, windows: list[list[np.ndarray]], order: Order) -> list[list[np.ndarray]]:
        """Replace each token by the unknown one with a chance of `token_dropout`."""
        most = max(sum(map(len, sentences)) for sentences in windows)
        is_dropped = random_words(self.seed, order, DROPOUT, most) < np.uint64(self.token_dropout * 2.0**64)
        unknown = np.uint32(self.tokenizer.unknown or 0)
        found = []
        for chosen, sentences in zip(is_dropped, windows, strict=True):
            ends = np.cumsum([len(sentence) for sentence in sentences])
            parts = zip(sentences, np.split(chosen[: ends[-1]], ends[:-1]), strict=True)
            found.append([np.where(which, unknown, sentence) for sentence, which in parts])
        return found

    def _fingerprint(self) -> str:
        section = self.data
        content = [self.documents.fingerprint, section.sequence_length, section.window_sentences, section.packing]
        content += [self.token_dropout, self.seed if self.token_dropout else 0]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def open_split(
    folder: Path, split: str, data: DocumentDataSection, token_dropout: float = 0.0, seed: int = 0
) -> DocumentSamples | None:
    """Open a split of a prepared folder; None where there is none of this name."""
    if split not in read_examples(folder).splits:
        return None
    return DocumentSamples(folder, split, data, token_dropout, seed)


def cut_document(lengths: np.ndarray, data: DocumentDataSection) -> list[tuple[int, int]]:
    """Return each window's first sentence and the one behind its last, of sentences so many tokens long.

    A window takes whole sentences as long as they fit; one that fits into none is cut when it is laid out.
    """
    windows, begin, room = [], 0, data.sequence_length
    for number, length in enumerate(lengths.tolist()):
        needed = min(length + SPECIAL_TOKENS, data.sequence_length)
        if number > begin and (needed > room or number - begin == data.window_sentences):
            windows.append((begin, number))
            begin, room = number, data.sequence_length
        room -= needed
    return [*windows, (begin, len(lengths))]


def collate(
    windows: list[list[np.ndarray]], data: DocumentDataSection, tokenizer: TextTokenizer
) -> dict[str, np.ndarray]:
    """Lay windows, each the tokens of its sentences, out in rows as `lay_out` does.

    segments [R, T] int64 is 1 in every second sentence of a window; places [W, S] int64 is where each sentence begins
    in the flattened tokens, -1 beyond the last.
    """
    first, end = (np.array([token], np.uint32) for token in (tokenizer.begin_of_text, tokenizer.end_of_text))
    room = data.sequence_length - SPECIAL_TOKENS
    parts = [[np.concatenate([first, sentence[:room], end]) for sentence in sentences] for sentences in windows]
    batch = lay_out([np.concatenate(window) for window in parts], data.sequence_length if data.packing else None)
    segments = np.zeros(batch["tokens"].size, np.int64)
    places = np.full((len(windows), max(map(len, windows))), -1, np.int64)
    for number, (begin, window) in enumerate(zip(batch["firsts"], parts, strict=True)):
        begins = begin + np.cumsum([0, *map(len, window)])
        places[number, : len(window)] = begins[:-1]
        for start, stop in zip(begins[1:-1:2], begins[2::2], strict=True):
            segments[start:stop] = 1
    return batch | {"segments": segments.reshape(batch["tokens"].shape), "places": places}


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


def _build(
    folder: Path, files: dict[str, list[SourceFile]], data: DocumentDataSection, section: TokenizerSection
) -> Built:
    counts: Counter[str] = Counter()
    rouge = Rouge()
    rows = {split: list(_read(data, found, rouge, counts)) for split, found in files.items()}
    rows = cut_splits(data, rows)
    leaks = count_leaks(data, rows)
    if not rows[TRAIN]:
        raise UserError("data.train", f"no document is left to train on ({shown_counts(counts)})")
    check_splits(data, rows, counts)
    tokenizer = make_tokenizer(section, _training_texts(rows[TRAIN]), folder, knows_all=False)
    if tokenizer.begin_of_text is None:
        raise UserError(
            "data.tokenizer", "has no token that begins a text; kind 'wordpiece' has, and so has BERT's own"
        )
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
        encoded = iter(encode_sentences(tokenizer, [sentence for row in some for sentence in row.sentences]))
        for row in some:
            tokens = list(islice(encoded, len(row.sentences)))
            oracle, worths = rouge.label(row.sentences, row.references, oracle_sentences)
            lengths = [len(sentence) for sentence in tokens]
            references = BETWEEN_REFERENCES.join(row.references)
            yield row.text, references, lengths, np.concatenate(tokens), oracle, worths, row.origin


def encode_sentences(tokenizer: TextTokenizer, sentences: list[str]) -> list[np.ndarray]:
    """Return each sentence's tokens without special ones."""
    return [tokens[1:-1] for tokens in encode_documents(tokenizer, sentences)]


def _tell(folder: Path, data: DocumentDataSection) -> None:
    """Say what a prepared folder holds and what it does not."""
    manifest = read_examples(folder)
    lines = []
    for split in (split for split in SPLITS if split in manifest.splits):
        samples = DocumentSamples(folder, split, data)
        lengths = samples.documents.table["lengths"].combine_chunks().flatten().to_numpy()
        line = f"{split}: {samples.documents.num_rows:,} documents of {len(lengths):,} sentences; "
        line += f"{samples.num_samples:,} windows of {data.sequence_length} tokens at most"
        if long := int((lengths > data.sequence_length - SPECIAL_TOKENS).sum()):
            line += f"; {long:,} sentences are longer, and cut"
        lines.append(line)
    lines += tell_left_out(manifest.facts, data, "documents that stand")
    print("\n".join(lines), file=sys.stderr, flush=True)
