"""Raw text to token shards: cleaned, tokenized, and split, once for each content; an interrupted run goes on.

Everything lands in prepared_dir/<content id>/. A journal there says how far the folder is whole, and the manifest,
written last, says that all of it is. The bytes depend on the settings and sources alone, not on interruptions.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import xxhash

from bigbatch.recipes.core.config import Section, TokenDataSection
from bigbatch.recipes.core.data import tokenizing
from bigbatch.recipes.core.data.clean import clean, units
from bigbatch.recipes.core.data.folders import VERIFIED_BYTES, bundled, is_latest, latest, locked, point_to
from bigbatch.recipes.core.data.identity import short_hash
from bigbatch.recipes.core.data.manifest import (
    MANIFEST_FILE,
    MANIFEST_VERSION,
    Manifest,
    Split,
    check_sizes,
    read_manifest,
    source_record,
    verify,
    write_atomically,
)
from bigbatch.recipes.core.data.progress import shown_progress
from bigbatch.recipes.core.data.rows import hash_file, read_documents
from bigbatch.recipes.core.data.seen import Seen
from bigbatch.recipes.core.data.sources import SourceFile, list_files, shared_file
from bigbatch.recipes.core.data.tokenizing import TextTokenizer
from bigbatch.recipes.core.data.writer import ShardWriter, WriterState
from bigbatch.recipes.core.errors import UserError

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
BATCH_CHARACTERS = 2**20
JOURNAL_SECONDS = 10.0  # the most work that an interruption costs
JOURNAL_FILE, SEEN_FILE = "journal.json", "seen.sqlite"
# How samples are cut is decided when the shards are opened, so these change nothing here.
NOT_CONTENT = {"prepared_dir", "sequence_length", "context_length", "packing"}


class Work(NamedTuple):
    """A file to read, and the split that its documents are for."""

    file: SourceFile
    split: str


class Position(Section):
    """How far the sources have been read: whole files, then documents of the next one."""

    num_files: int
    num_documents: int
    file_hashes: tuple[str, ...]
    counts: dict[str, int]


class Journal(Section):
    """A state of the folder to go on from."""

    position: Position
    writers: dict[str, WriterState]


class Batch(NamedTuple):
    """Texts, and where reading stands after them."""

    texts: list[tuple[str, str]]
    """Each with the split that it goes into before it."""
    position: Position
    done_bytes: float


def prepare_tokens(data: TokenDataSection, progress: bool = True) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and return it.

    An interrupted preparation goes on where it was, losing at most ten seconds of work. Where another process prepares
    the same, wait for it. When sources have changed, a new folder results. One that was there is read and compared with
    its hashes unless it is large.
    """
    root, settings_id = Path(data.prepared_dir), _settings_id(data)
    if folder := bundled(root, settings_id):
        check_sizes(folder, read_manifest(folder))
        return folder
    work = _list_work(data)
    content_id = _content_id(data, work)
    folder = root / content_id
    if (folder / MANIFEST_FILE).exists() and is_latest(root, settings_id, content_id):
        if _size_bytes(work) <= VERIFIED_BYTES:
            verify(folder)
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{content_id}.lock"):
            if not (folder / MANIFEST_FILE).exists():
                _build(folder, data, work, progress)
            for leftover in (JOURNAL_FILE, SEEN_FILE):
                (folder / leftover).unlink(missing_ok=True)
            point_to(root, settings_id, content_id)
    except (OSError, sqlite3.Error) as error:  # a source that cannot be read is a UserError by now
        hint = "make room or choose another; started again, it goes on where it stopped"
        raise UserError("data.prepared_dir", f"{folder} cannot be written: {error}; {hint}") from error
    return folder


def prepared_folder(data: TokenDataSection) -> Path:
    """Return the folder that `prepare_tokens` made last for these settings; the sources may be gone by now."""
    return latest(Path(data.prepared_dir), _settings_id(data))


def _list_work(data: TokenDataSection) -> list[Work]:
    train = list_files(data.train, "data.train")
    work = [Work(file, TRAIN) for file in train]
    for split in (VALIDATION, TEST):
        files = list_files(getattr(data, split), f"data.{split}")
        if path := shared_file(train, files):
            raise UserError(f"data.{split}", f"holds {path}, which data.train holds too")
        work += [Work(file, split) for file in files]
    return work


def _settings_id(data: TokenDataSection) -> str:
    return short_hash(data.model_dump(mode="json", exclude=NOT_CONTENT))


def _content_id(data: TokenDataSection, work: list[Work]) -> str:
    tokenizer = None
    if data.tokenizer.kind == "pretrained":
        tokenizer = tokenizing.fingerprint(tokenizing.given_tokenizer_file(data.tokenizer))
    files = [(item.file.identity, item.split) for item in work]  # how each is read is part of the settings
    return short_hash([MANIFEST_VERSION, _settings_id(data), tokenizer, files])


def _build(folder: Path, data: TokenDataSection, work: list[Work], progress: bool) -> None:
    tokenizer = _tokenizer(folder, data, work, progress)
    path = folder / JOURNAL_FILE
    journal = Journal.model_validate_json(path.read_bytes()) if path.exists() else _first_journal()
    with ExitStack() as stack:
        writers = {}
        for split, state in journal.writers.items():
            writers[split] = ShardWriter(folder, split, _dtype(tokenizer), data.shard_tokens, state)
            stack.callback(writers[split].close)
        seen = stack.enter_context(Seen(folder / SEEN_FILE if data.clean.deduplicate else None))
        show = stack.enter_context(shown_progress("tokenizing", _size_bytes(work), progress))
        keeper = _Keeper(path, seen, writers)
        for batch in _batches(data, work, journal.position, seen):
            _write(batch, tokenizer, writers)
            keeper.save_when_due(batch.position)
            show(batch.done_bytes, f"{keeper.num_tokens() / 1e6:,.1f} M tokens")
        journal = keeper.save(batch.position)
        splits = {split: writer.finish() for split, writer in writers.items()}
    manifest = _manifest(data, work, tokenizer, journal, splits)
    _check_splits(data, manifest)
    write_atomically(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")


def _first_journal() -> Journal:
    counts = {"read": 0, "too_short": 0, "duplicate": 0}
    start = Position(num_files=0, num_documents=0, file_hashes=(), counts=counts)
    return Journal(position=start, writers={split: WriterState() for split in SPLITS})


def _dtype(tokenizer: TextTokenizer) -> Literal["uint16", "uint32"]:
    return "uint16" if tokenizer.vocabulary_size <= 2**16 else "uint32"


def _manifest(
    data: TokenDataSection,
    work: list[Work],
    tokenizer: TextTokenizer,
    journal: Journal,
    splits: dict[str, Split],
) -> Manifest:
    return Manifest(
        content_id=_content_id(data, work),
        data=data.model_dump(mode="json", exclude=NOT_CONTENT),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_text=tokenizer.end_of_text,
        dtype=_dtype(tokenizer),
        counts=journal.position.counts,
        splits={split: content for split, content in splits.items() if content.num_tokens},
        sources=tuple(
            source_record(item.file.identity, item.split, content_hash)
            for item, content_hash in zip(work, journal.position.file_hashes, strict=True)
        ),
    )


class _Keeper:
    """Saves the journal after each whole shard and every few seconds."""

    def __init__(self, path: Path, seen: Seen, writers: dict[str, ShardWriter]) -> None:
        self.path, self.seen, self.writers = path, seen, writers
        self.saved_seconds, self.saved_shards = time.monotonic(), self._num_shards()

    def save_when_due(self, position: Position) -> None:
        if self._num_shards() > self.saved_shards or time.monotonic() - self.saved_seconds > JOURNAL_SECONDS:
            self.save(position)

    def save(self, position: Position) -> Journal:
        self.seen.commit()  # it may be ahead of the journal, never behind
        journal = Journal(position=position, writers={split: w.commit() for split, w in self.writers.items()})
        write_atomically(self.path, journal.model_dump_json())
        self.saved_seconds, self.saved_shards = time.monotonic(), self._num_shards()
        return journal

    def num_tokens(self) -> int:
        return sum(writer.state.num_tokens for writer in self.writers.values())

    def _num_shards(self) -> int:
        return sum(len(writer.state.shards) for writer in self.writers.values())


def _tokenizer(folder: Path, data: TokenDataSection, work: list[Work], progress: bool) -> TextTokenizer:
    if (folder / tokenizing.TOKENIZER_FILE).exists():
        return tokenizing.load_tokenizer(folder)
    with shown_progress("reading for the tokenizer", _size_bytes(work), progress) as show:
        return tokenizing.make_tokenizer(data.tokenizer, _tokenizer_texts(data, work, show), folder)


def _tokenizer_texts(data: TokenDataSection, work: list[Work], show: Callable[[float, str], None]) -> Iterator[str]:
    """Yield what a tokenizer is trained on: the training texts, and all texts to know every character."""
    wanted = SPLITS if data.tokenizer.kind == "character" else (TRAIN,)
    done_bytes = 0
    for item in work:
        for document in read_documents(item.file, data.text_key):
            text = clean(document.text, data.clean)
            yield from (part for split, part in _parts(text, item.split, data) if split in wanted)
            show(done_bytes + document.file_fraction * item.file.size_bytes, "")
        done_bytes += item.file.size_bytes


def _batches(data: TokenDataSection, work: list[Work], start: Position, seen: Seen) -> Iterator[Batch]:
    """Yield the texts from a position on; the last batch, which may be empty, stands at the end of the sources."""
    texts: list[tuple[str, str]] = []
    counts, file_hashes = dict(start.counts), list(start.file_hashes)
    skipped, characters = start.num_documents, 0
    done_bytes = _size_bytes(work[: start.num_files])
    for number, item in enumerate(work[start.num_files :], start.num_files):
        for num_read, document in enumerate(
            islice(read_documents(item.file, data.text_key), skipped, None), skipped + 1
        ):
            parts = _parts(_kept(document.text, data, counts, seen), item.split, data)
            texts += [(split, unit) for split, part in parts for unit in units(part, data.unit)]
            characters += sum(len(part) for _, part in parts)
            if characters >= BATCH_CHARACTERS:
                position = _position(number, num_read, file_hashes, counts)
                yield Batch(texts, position, done_bytes + document.file_fraction * item.file.size_bytes)
                texts, characters = [], 0
        file_hashes.append(hash_file(item.file))
        done_bytes += item.file.size_bytes
        skipped = 0
    yield Batch(texts, _position(len(work), 0, file_hashes, counts), done_bytes)


def _position(num_files: int, num_documents: int, file_hashes: list[str], counts: dict[str, int]) -> Position:
    return Position(
        num_files=num_files, num_documents=num_documents, file_hashes=tuple(file_hashes), counts=dict(counts)
    )


def _kept(text: str, data: TokenDataSection, counts: dict[str, int], seen: Seen) -> str | None:
    """Return the cleaned text, or None if it is left out, and count."""
    counts["read"] += 1
    cleaned = clean(text, data.clean)
    if cleaned is None:
        counts["too_short"] += 1
    elif seen.before(cleaned, counts["read"]):
        counts["duplicate"] += 1
        return None
    return cleaned


def _parts(text: str | None, split: str, data: TokenDataSection) -> list[tuple[str, str]]:
    """Cut a document of the training sources into what trains and what validates; a pure function of its text."""
    if text is None:
        return []
    if split != TRAIN or data.validation or not data.validation_fraction:
        return [(split, text)]
    if data.validation_split == "document":
        chosen = xxhash.xxh3_64_intdigest(text.encode()) < data.validation_fraction * 2**64
        return [(VALIDATION if chosen else TRAIN, text)]
    cut = int((1 - data.validation_fraction) * len(text))
    return [(name, part) for name, part in ((TRAIN, text[:cut]), (VALIDATION, text[cut:])) if part]


def _write(batch: Batch, tokenizer: TextTokenizer, writers: dict[str, ShardWriter]) -> None:
    documents = tokenizing.encode_documents(tokenizer, [text for _, text in batch.texts])
    for split, writer in writers.items():
        mine = [tokens for (name, _), tokens in zip(batch.texts, documents, strict=True) if name == split]
        if mine:
            writer.append(mine)


def _size_bytes(work: list[Work]) -> int:
    return sum(item.file.size_bytes for item in work)


def _check_splits(data: TokenDataSection, manifest: Manifest) -> None:
    if TRAIN not in manifest.splits:
        counts = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
        raise UserError("data.train", f"no text is left to train on (documents: {counts})")
    for split in (VALIDATION, TEST):
        if getattr(data, split) and split not in manifest.splits:
            raise UserError(f"data.{split}", "no text is left in it")
    if data.validation_fraction and VALIDATION not in manifest.splits:
        found = f"is {data.validation_fraction}, and none of {manifest.counts['read']} documents fell to it"
        raise UserError("data.validation_fraction", f"{found}; 'tail' for data.validation_split cuts each document")
