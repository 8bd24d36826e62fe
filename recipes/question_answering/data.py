"""Questions and contexts: from rows to a prepared folder, and its splits as samples, which are windows.

W windows, [CLS] question [SEP] part of the context [SEP], lie in R rows of T tokens.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from bigbatch.recipes.core.data.examples import (
    ORIGIN,
    Built,
    Examples,
    read_examples,
    record_batches,
    write_split,
)
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.packing import lay_out
from bigbatch.recipes.core.data.rows import read_rows, shown, text_of
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
    shown_counts,
    tell_prepared,
)
from bigbatch.recipes.core.data.token_dropout import drop_tokens
from bigbatch.recipes.core.data.tokenizing import (
    Placed,
    TextTokenizer,
    encode_with_places,
    load_tokenizer,
    make_tokenizer,
)
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.question_answering.config import SPECIAL_TOKENS, QuestionDataSection

CONTEXTS = "_contexts"  # behind a split's name: the table of its contexts, each once
ROWS_AT_ONCE = 1024
MAX_GROUPS = 20  # of more kinds of questions none has figures of its own
QUESTION_DROPOUT, CONTEXT_DROPOUT, KEEPING = range(3)  # streams of random numbers

_NUMBERS, _TOKENS = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.uint32())
CONTEXT_SCHEMA = pyarrow.schema({"text": pyarrow.string(), "tokens": _TOKENS, "starts": _NUMBERS, "ends": _NUMBERS})
QUESTION_SCHEMA = pyarrow.schema(
    {
        "question": pyarrow.string(),
        "tokens": _TOKENS,
        "context": pyarrow.int32(),
        "answer_starts": _NUMBERS,
        "answer_ends": _NUMBERS,
        "first": pyarrow.int32(),
        "last": pyarrow.int32(),
        "group": pyarrow.string(),
        ORIGIN: pyarrow.string(),
    }
)


class QuestionRow(NamedTuple):
    """A question; rows are equal where their contexts are."""

    text: str
    """The context."""
    question: str
    spans: tuple[tuple[int, int], ...]
    """Characters of each answer; none where there is no answer."""
    group: str
    origin: str

    labels = ()  # rows are not of several kinds


class EncodedRow(NamedTuple):
    """A row, its tokens, and the tokens of the context that the first answer takes; -1 without one."""

    row: QuestionRow
    tokens: np.ndarray
    context: int
    first: int
    last: int


def prepare(data: QuestionDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it.

    The tokenizer is that of a folder, or is made as the settings say.
    """
    folder = prepare_splits(data, _build, tokenizer_folder)
    tell_prepared(folder, data, _held(folder, data), "questions on contexts that stand")
    return folder


class QuestionSamples:
    """A split as `Samples`: each window is one sample, so that a batch is as large whatever the contexts' lengths."""

    def __init__(
        self, folder: Path, split: str, data: QuestionDataSection, token_dropout: float = 0.0, seed: int = 0
    ) -> None:
        """Map the split into memory."""
        self.tokenizer = load_tokenizer(folder)
        self.split, self.data, self.token_dropout, self.seed = SPLITS.index(split), data, token_dropout, seed
        self.questions, self.contexts = Examples(folder, split), Examples(folder, split + CONTEXTS)
        self.facts: dict[str, Any] = self.questions.facts
        self.context_numbers = self.questions.numbers("context")
        self.targets = np.stack([self.questions.numbers("first"), self.questions.numbers("last")], 1)  # [N, 2]
        question_lengths = self.questions.lengths("tokens").clip(max=data.question_tokens)
        context_lengths = self.contexts.lengths("tokens")[self.context_numbers]
        rows, begins = cut_contexts(question_lengths, context_lengths, data)
        room = data.sequence_length - SPECIAL_TOKENS - question_lengths[rows]
        parts = np.minimum(context_lengths[rows] - begins, room)
        kept = self._is_kept(rows, begins, parts) if split == TRAIN else slice(None)
        self.rows, self.begins, parts = rows[kept], begins[kept], parts[kept]  # [num_samples] each
        self.mean_tokens = float((SPECIAL_TOKENS + question_lengths[self.rows] + parts).mean())
        self.num_samples = len(self.rows)
        self.fingerprint = self._fingerprint()

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows as `collate` does, and what is right: starts and ends [W] int64, columns of the window.

        Both are 0, [CLS], where the window does not hold the first answer. rows [W] is the window's question, begins
        [W] its first token of the context, splits [W] the number of the split.
        """
        rows, begins = self.rows[sample_ids], self.begins[sample_ids]
        questions = self.questions.lists("tokens", rows)
        contexts = self.contexts.lists("tokens", self.context_numbers[rows])
        if self.token_dropout:
            drawn = (self.token_dropout, self.seed, Order(sample_ids, epochs), self.tokenizer)
            questions = drop_tokens(questions, *drawn, QUESTION_DROPOUT)
            contexts = drop_tokens(contexts, *drawn, CONTEXT_DROPOUT)
        batch = collate(questions, contexts, begins, self.data, self.tokenizer)
        first, last = (self.targets[rows] - begins[:, None] + batch["contexts"][:, None]).T
        holds = self._holds(rows, begins, batch["lengths"] - batch["contexts"] - 1)
        targets = {"starts": np.where(holds, first, 0), "ends": np.where(holds, last, 0)}
        return batch | targets | {"rows": rows, "begins": begins, "splits": np.full(len(rows), self.split)}

    def _holds(self, rows: np.ndarray, begins: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """Tell which windows [W] hold the whole first answer in their part of the context, so many tokens long."""
        return (self.targets[rows, 0] >= begins) & (self.targets[rows, 1] < begins + parts)

    def _is_kept(self, rows: np.ndarray, begins: np.ndarray, parts: np.ndarray) -> np.ndarray:
        chances = random_words(0, Order(np.arange(len(rows)), np.zeros(len(rows), np.int64)), KEEPING, 1)[:, 0]
        return self._holds(rows, begins, parts) | (chances / 2.0**64 < self.data.null_windows_kept)

    def _fingerprint(self) -> str:
        section = self.data
        content = [self.questions.fingerprint, self.contexts.fingerprint, section.sequence_length]
        content += [section.question_tokens, section.stride_tokens, section.null_windows_kept, section.packing]
        content += [self.token_dropout, self.seed if self.token_dropout else 0]
        return fingerprint_of(content)


def open_split(
    folder: Path, split: str, data: QuestionDataSection, token_dropout: float = 0.0, seed: int = 0
) -> QuestionSamples | None:
    """Open a split of a prepared folder; None where there is none of this name."""
    if split not in read_examples(folder).splits:
        return None
    return QuestionSamples(folder, split, data, token_dropout, seed)


def cut_contexts(
    question_lengths: np.ndarray, context_lengths: np.ndarray, data: QuestionDataSection
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each window the question [W] and the first token of its part of the context [W].

    Windows of a question begin `stride_tokens` behind each other, or as many as one has room for, until one reaches the
    context's end.
    """
    room = data.sequence_length - SPECIAL_TOKENS - question_lengths.clip(max=data.question_tokens).astype(np.int64)
    stride = np.minimum(room, data.stride_tokens)
    counts = 1 + -(-np.maximum(0, context_lengths - room) // stride)
    rows = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, place * stride[rows]


def collate(
    questions: list[np.ndarray],
    contexts: list[np.ndarray],
    begins: np.ndarray,
    data: QuestionDataSection,
    tokenizer: TextTokenizer,
) -> dict[str, np.ndarray]:
    """Lay windows, tokens of a question and of a context from `begins` on, out in rows as `lay_out` does.

    segments [R, T] int64 is 1 behind the question; contexts [W] int64 is the column of a window's first token of the
    context.
    """
    first, end = (np.array([token], np.uint32) for token in (tokenizer.begin_of_text, tokenizer.end_of_text))
    windows, columns = [], []
    for question, context, begin in zip(questions, contexts, begins.tolist(), strict=True):
        asked = question[: data.question_tokens]
        room = data.sequence_length - SPECIAL_TOKENS - len(asked)
        windows.append(np.concatenate([first, asked, end, context[begin : begin + room], end]))
        columns.append(len(asked) + 2)
    batch = lay_out(windows, data.sequence_length if data.packing else None)
    segments = np.zeros(batch["tokens"].size, np.int64)
    for place, column, length in zip(batch["firsts"], columns, batch["lengths"], strict=True):
        segments[place + column : place + length] = 1
    columns = np.array(columns, np.int64)
    return batch | {"segments": segments.reshape(batch["tokens"].shape), "contexts": columns}


def spans_of(value: Any, context: str) -> tuple[tuple[int, int], ...]:
    """Return the characters of each answer in a context; raise ValueError for what is none, or stands elsewhere."""
    if isinstance(value, dict):  # of lists
        keys = [key for key in value if isinstance(value[key], list)]
        value = [dict(zip(keys, parts, strict=False)) for parts in zip(*(value[key] for key in keys), strict=False)]
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise ValueError(f"has {shown(value)} for answers; right is a list of objects")
    return tuple(_span(item, context) for item in value or ())


def _span(item: dict[str, Any], context: str) -> tuple[int, int]:
    text, start = item.get("text"), item.get("answer_start", item.get("start"))
    end = item.get("end", start + len(text) if isinstance(text, str) and isinstance(start, int) else None)
    if type(start) is not int or type(end) is not int:
        raise ValueError(f"has the answer {shown(item)}; right is text and answer_start, or start and end")
    if not 0 <= start < end <= len(context):
        raise ValueError(f"has an answer at characters {start} to {end} of a context with {len(context)}")
    if text is not None and context[start:end] != text:
        place = context.find(text) if isinstance(text, str) else -1
        hint = f"; it stands at {place}" if place >= 0 else "; it stands nowhere in the context"
        raise ValueError(f"has the answer {shown(text)} at {start}, where {shown(context[start:end])} stands{hint}")
    return start, end


def token_span(context: Placed, start: int, end: int) -> tuple[int, int]:
    """Return the first and the last token that characters start..end touch; (-1, -1) where there is none."""
    first = int(np.searchsorted(context.ends, start, side="right"))
    last = int(np.searchsorted(context.starts, end, side="left")) - 1
    return (first, last) if first <= last else (-1, -1)


# ---------------------------------------------------------------------------------------------------------- prepare


def _build(folder: Path, files: dict[str, list[SourceFile]], data: QuestionDataSection) -> Built:
    counts: Counter[str] = Counter()
    rows = {split: list(_read(data, found, counts)) for split, found in files.items()}
    rows = cut_splits(data, rows)
    leaks = count_leaks(data, rows)
    if not rows[TRAIN]:
        raise UserError("data.train", f"no question is left to train on ({shown_counts(counts)})")
    tokenizer = make_tokenizer(data.tokenizer, _training_texts(rows[TRAIN]), folder, knows_all=False)
    if tokenizer.begin_of_text is None:
        raise UserError(
            "data.tokenizer", "has no token that begins a text; kind 'wordpiece' has, and so has BERT's own"
        )
    encoded = {split: _encode(found, tokenizer, data, counts) for split, found in rows.items()}
    left = {split: [item.row for item in items] for split, (items, _) in encoded.items()}
    check_splits(data, left, counts)
    written = {}
    for split, (items, contexts) in encoded.items():
        if items:
            tables = (split, QUESTION_SCHEMA, map(_record, items)), (split + CONTEXTS, CONTEXT_SCHEMA, contexts)
            for name, schema, records in tables:
                written[name] = write_split(folder, name, schema, record_batches(schema, records))
    groups = sorted({row.group for row in left[TRAIN]} - {""})
    facts = {
        "has_null": any(not row.spans for row in left[TRAIN]),
        "groups": groups if len(groups) <= MAX_GROUPS else [],
        "inside": counts.pop("inside", 0),
        "counts": dict(+counts),
        "leaks": leaks,
        "answered": {split: sum(bool(row.spans) for row in found) for split, found in left.items()},
    }
    return Built(written, facts)


def _read(data: QuestionDataSection, files: list[SourceFile], counts: Counter[str]) -> Iterator[QuestionRow]:
    """Yield the questions of some files without those that the settings leave out, and count."""
    for row in (row for file in files for row in read_rows(file, data.columns)):
        counts["read"] += 1
        question, context = (text_of(row, name) for name in (data.question_column, data.context_column))
        group = row.values[data.group_column] if data.group_column else ""
        try:
            spans = spans_of(row.values[data.answers_column], context)
        except ValueError as error:
            leave_out(data, counts, "bad_answer", row.origin, str(error))
            continue
        yield QuestionRow(context, question, spans, str(group), row.origin)


def _training_texts(rows: list[QuestionRow]) -> Iterator[str]:
    """Yield what a tokenizer is trained on: the questions, and each context once."""
    yield from dict.fromkeys(row.text for row in rows)
    yield from (row.question for row in rows)


def _encode(
    rows: list[QuestionRow], tokenizer: TextTokenizer, data: QuestionDataSection, counts: Counter[str]
) -> tuple[list[EncodedRow], list[tuple[Any, ...]]]:
    """Return the rows with their tokens, and the contexts, each once, as columns of its table."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(row.text for row in rows))}
    contexts = list(_placed(tokenizer, list(numbers)))
    questions = _placed(tokenizer, [row.question for row in rows])
    encoded = []
    for row, question in zip(rows, questions, strict=True):
        context = contexts[numbers[row.text]]
        if not len(question.tokens) or not len(context.tokens):
            which = "context" if len(question.tokens) else "question"
            leave_out(data, counts, "empty", row.origin, f"has an empty {which}")
            continue
        first, last = -1, -1
        if row.spans:
            spans = [token_span(context, *span) for span in row.spans]
            if (-1, -1) in spans:
                start, end = row.spans[spans.index((-1, -1))]
                found = f"has the answer {shown(row.text[start:end])}, of which the tokenizer sees nothing"
                leave_out(data, counts, "bad_answer", row.origin, found)
                continue
            first, last = spans[0]
            start, end = row.spans[0]
            counts["inside"] += bool(start > context.starts[first] or end < context.ends[last])
        encoded.append(EncodedRow(row, question.tokens, numbers[row.text], first, last))
    return encoded, [(text, *placed) for text, placed in zip(numbers, contexts, strict=True)]


def _placed(tokenizer: TextTokenizer, texts: list[str]) -> Iterator[Placed]:
    for begin in range(0, len(texts), ROWS_AT_ONCE):
        yield from encode_with_places(tokenizer, texts[begin : begin + ROWS_AT_ONCE])


def _record(item: EncodedRow) -> tuple[Any, ...]:
    """Return the values of QUESTION_SCHEMA."""
    starts, ends = ([span[side] for span in item.row.spans] for side in (0, 1))
    row = item.row
    return row.question, item.tokens, item.context, starts, ends, item.first, item.last, row.group, row.origin


def _held(folder: Path, data: QuestionDataSection) -> Iterator[str]:
    """Yield what a prepared folder holds, a line each."""
    manifest = read_examples(folder)
    facts = manifest.facts
    for split in (split for split in SPLITS if split in manifest.splits):
        samples = QuestionSamples(folder, split, data)
        count, answered = samples.questions.num_rows, facts["answered"][split]
        line = f"{split}: {count:,} questions on {samples.contexts.num_rows:,} contexts, {count - answered:,} without "
        line += f"an answer; {samples.num_samples:,} windows of {data.sequence_length} tokens at most"
        if long := int((samples.questions.lengths("tokens") > data.question_tokens).sum()):
            line += f"; {long:,} questions are cut at {data.question_tokens} tokens"
        yield line
    if inside := facts["inside"]:
        yield f"{inside:,} answers begin or end inside a token, and are taken to reach to its ends"
