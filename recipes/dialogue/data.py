"""Dialogues: from rows to a prepared folder, and its splits as samples, which are rows of tokens.

W windows, each a dialogue or a part of one that fits a row, lie in R rows of T tokens.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from bigbatch.recipes.core.data.chat import (
    Chat,
    Messages,
    check_messages,
    encode_dialogue,
    install_template,
    open_chat,
)
from bigbatch.recipes.core.data.examples import ORIGIN, Built, Examples, read_examples, record_batches, write_split
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.packing import first_fit
from bigbatch.recipes.core.data.rows import read_rows
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
from bigbatch.recipes.core.data.tokenizing import make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.dialogue.config import DialogueDataSection

PACKED_AT_ONCE = 2048  # windows: packing takes the square of their number

_NUMBERS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    {
        "tokens": pyarrow.list_(pyarrow.uint32()),
        "firsts": _NUMBERS,  # of the replies to learn from: the first token, and the one behind the last
        "ends": _NUMBERS,
        "places": _NUMBERS,  # and their numbers among the messages
        "messages": pyarrow.string(),
        ORIGIN: pyarrow.string(),
    }
)


class DialogueRow(NamedTuple):
    """A dialogue; rows are equal where all is that is said."""

    messages: Messages
    origin: str

    @property
    def text(self) -> str:
        """What is said."""
        return "\n".join(message["content"] for message in self.messages)

    labels = ()  # rows are not of several kinds


class Window(NamedTuple):
    """A dialogue, or a part of a long one, that fits a row."""

    messages: Messages
    tokens: np.ndarray
    replies: list[tuple[int, int]]
    """Tokens of the replies that are learned from here."""
    places: list[int]
    """Their numbers among the messages."""
    is_cut: bool = False
    """A single turn was too long: its beginning or its end is missing."""


def prepare(data: DialogueDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it.

    The tokenizer is that of a folder, or is made as the settings say.
    """
    folder = prepare_splits(data, _build, tokenizer_folder)
    tell_prepared(folder, data, _held(folder, data), "dialogues that stand")
    return folder


class DialogueSamples:
    """A split as `Samples`: sample i is row i, with the windows that share it."""

    def __init__(self, folder: Path, split: str, data: DialogueDataSection) -> None:
        """Map the split into memory and lay its windows out."""
        self.examples, self.length = Examples(folder, split), data.sequence_length
        lengths = self.examples.lengths("tokens")
        self.rows = _pack(lengths, data.sequence_length) if data.packing else [[n] for n in range(len(lengths))]
        self.num_samples = len(self.rows)
        content = f"{self.examples.fingerprint} {data.sequence_length} {data.packing}"
        self.fingerprint = fingerprint_of(content)

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows [R, T]: tokens, labels and positions int64, documents int32; the same in every epoch.

        A label is the token that follows where a reply is to be learned, else -100. The documents number a row's
        windows from 0; behind the last one lies another of tokens 0.
        """
        shape = (len(sample_ids), self.length)
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED_LABEL, np.int64)
        positions, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int32)
        for row, sample in enumerate(sample_ids.tolist()):
            ids, begin = np.array(self.rows[sample]), 0
            columns = [self.examples.lists(name, ids) for name in ("tokens", "firsts", "ends")]
            for number, (window, firsts, ends) in enumerate(zip(*columns, strict=True)):
                place = slice(begin, begin + len(window))
                tokens[row, place], documents[row, place] = window, number
                positions[row, place] = np.arange(len(window))
                for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
                    labels[row, begin + first - 1 : begin + end - 1] = window[first:end]
                begin += len(window)
            documents[row, begin:] = len(ids)
            positions[row, begin:] = np.arange(self.length - begin)
        return {"tokens": tokens, "labels": labels, "positions": positions, "documents": documents}


class Reply(NamedTuple):
    """A reply of a dialogue, and what came before it."""

    request: np.ndarray
    """Tokens."""
    before: Messages
    content: str


def replies_of(examples: Examples, most: int | None = None) -> list[Reply]:
    """Return the replies of a split; with `most`, no more than so many, evenly spread."""
    counts = examples.lengths("firsts")
    total = int(counts.sum())
    chosen = np.unique(np.linspace(0, total - 1, min(most or total, total)).astype(np.int64))
    windows = np.searchsorted(np.cumsum(counts), chosen, side="right")
    within = (chosen - (np.cumsum(counts) - counts)[windows]).tolist()
    found = []
    columns = [examples.lists(name, windows) for name in ("tokens", "firsts", "places")]
    for tokens, firsts, places, text, number in zip(*columns, examples.texts("messages", windows), within, strict=True):
        messages, place = json.loads(text), int(places[number])
        found.append(Reply(tokens[: firsts[number]], messages[:place], messages[place]["content"]))
    return found


def open_split(folder: Path, split: str, data: DialogueDataSection) -> DialogueSamples | None:
    """Open a split of a prepared folder; None where there is none of this name."""
    return DialogueSamples(folder, split, data) if split in read_examples(folder).splits else None


def windows_of(chat: Chat, messages: Messages, row_tokens: int) -> Iterator[Window]:
    """Yield the windows of a dialogue, each reply once among those to learn from.

    Raises ValueError where the chat template refuses the messages.
    """
    places = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    whole = encode_dialogue(chat, messages)
    if len(whole.tokens) <= row_tokens:
        yield Window(messages[: places[-1] + 1], whole.tokens, whole.replies, places)
        return
    kept = int(messages[0]["role"] == "system")
    begins = [kept, *(place + 1 for place in places[:-1])]  # of the turns, each up to a reply
    sizes = np.diff([0, *(end for _, end in whole.replies)])
    turn = 0
    while turn < len(places):
        first = next(n for n in range(turn + 1) if n == turn or sizes[n:turn].sum() <= row_tokens // 2)
        last = max(n for n in range(turn, len(places)) if n == turn or sizes[first : n + 1].sum() <= row_tokens)
        while True:
            part = messages[:kept] + messages[begins[first] : places[last] + 1]
            found = encode_dialogue(chat, part)
            if len(found.tokens) <= row_tokens or first == last == turn:
                break
            first, last = (first, last - 1) if last > turn else (first + 1, last)
        offset = begins[first] - kept
        own = [place - offset for place in places[turn : last + 1]]
        yield _cut(Window(part, found.tokens, found.replies[turn - first :], own), row_tokens)
        turn = last + 1


def _cut(window: Window, row_tokens: int) -> Window:
    """Cut a turn that is longer than a row: what is said before the reply keeps half of the row, its end."""
    surplus = len(window.tokens) - row_tokens
    if surplus <= 0:
        return window
    ((first, end),) = window.replies
    start = min(surplus, max(0, first - row_tokens // 2))
    tokens = window.tokens[start : start + row_tokens]
    replies = [(first - start, min(end - start, row_tokens))]
    return window._replace(tokens=tokens, replies=replies, is_cut=True)


def _pack(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Return the windows of each row."""
    rows: list[list[int]] = []
    for begin in range(0, len(lengths), PACKED_AT_ONCE):
        numbers, _ = first_fit(lengths[begin : begin + PACKED_AT_ONCE], row_tokens)
        found: list[list[int]] = [[] for _ in range(int(numbers.max()) + 1)]
        for window, row in enumerate(numbers.tolist(), begin):
            found[row].append(window)
        rows += found
    return rows


# ---------------------------------------------------------------------------------------------------------- prepare


def _build(folder: Path, files: dict[str, list[SourceFile]], data: DialogueDataSection) -> Built:
    counts: Counter[str] = Counter()
    rows = cut_splits(data, {split: list(_read(data, found, counts)) for split, found in files.items()})
    leaks = count_leaks(data, rows)
    if not rows[TRAIN]:
        raise UserError("data.train", f"no dialogue is left to train on ({shown_counts(counts)})")
    make_tokenizer(data.tokenizer, map(_training_text, rows[TRAIN]), folder, knows_all=False)
    install_template(folder, data.template)
    chat = open_chat(folder)
    windows = {split: list(_encode(data, found, chat, counts)) for split, found in rows.items()}
    cut = sum(window.is_cut for found in windows.values() for window, _ in found)
    check_splits(data, windows, counts)
    written = {
        split: write_split(folder, split, SCHEMA, record_batches(SCHEMA, (_record(*item) for item in found)))
        for split, found in windows.items()
        if found
    }
    sizes = {split: len({origin for _, origin in found}) for split, found in windows.items()}
    return Built(written, {"counts": dict(+counts), "leaks": leaks, "dialogues": sizes, "cut": cut})


def _read(data: DialogueDataSection, files: list[SourceFile], counts: Counter[str]) -> Iterator[DialogueRow]:
    """Yield the dialogues of some files without those that cannot be taken, and count."""
    for row in (row for file in files for row in read_rows(file, data.columns)):
        counts["read"] += 1
        try:
            messages = check_messages(row.values[data.messages_column])
        except ValueError as error:
            leave_out(data, counts, "wrong_messages", row.origin, str(error))
            continue
        if all(message["role"] != "assistant" for message in messages):
            leave_out(data, counts, "without_reply", row.origin, "has no reply, a message of the assistant")
            continue
        plain = [{key: message[key] for key in ("role", "content")} for message in messages]
        yield DialogueRow(plain, row.origin)


def _training_text(row: DialogueRow) -> str:
    """Return what a tokenizer is trained on: the messages, and their roles as the templates write them."""
    return "\n".join(
        f"{message['role']}\n{message['role'].capitalize()}:\n{message['content']}" for message in row.messages
    )


def _encode(
    data: DialogueDataSection, rows: list[DialogueRow], chat: Chat, counts: Counter[str]
) -> Iterator[tuple[Window, str]]:
    for row in rows:
        try:
            found = list(windows_of(chat, check_messages(row.messages, chat), data.sequence_length))
        except ValueError as error:
            leave_out(data, counts, "refused_by_template", row.origin, str(error))
            continue
        yield from ((window, row.origin) for window in found)


def _record(window: Window, origin: str) -> tuple[Any, ...]:
    """Return the values of SCHEMA."""
    firsts, ends = zip(*window.replies, strict=True)
    return window.tokens, firsts, ends, window.places, json.dumps(window.messages), origin


def _held(folder: Path, data: DialogueDataSection) -> Iterator[str]:
    """Yield what a prepared folder holds, a line each."""
    manifest = read_examples(folder)
    facts = manifest.facts
    for split in (split for split in SPLITS if split in manifest.splits):
        samples = DialogueSamples(folder, split, data)
        examples, count = samples.examples, facts["dialogues"][split]
        tokens, replies = examples.lengths("tokens").sum(), examples.lengths("firsts").sum()
        line = (
            f"{split}: {count:,} dialogues with {replies:,} replies, {tokens:,} tokens in {samples.num_samples:,} rows"
        )
        if (parts := examples.num_rows) > count:
            line += f"; the longer ones are cut, {parts:,} parts in all"
        yield line
    if facts["cut"]:
        length = data.sequence_length
        yield f"{facts['cut']:,} turns are longer than a row of {length} tokens and lose their beginning or end"
