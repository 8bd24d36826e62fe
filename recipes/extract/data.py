"""Sentences: from sources to a prepared folder, and its splits as samples, which are windows of words.

N windows of at most T words; P tokens and L letters of the longest word, F features. An encoder's tokens lie in R rows
of K.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from bigbatch.recipes.core.data.examples import ORIGIN, Built, Examples, read_examples, record_batches, write_split
from bigbatch.recipes.core.data.identity import fingerprint_of
from bigbatch.recipes.core.data.labels import is_known, label_names
from bigbatch.recipes.core.data.packing import lay_out
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
from bigbatch.recipes.core.data.tokenizing import TextTokenizer, load_tokenizer, make_tokenizer
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.extract.config import (
    MOST_PIECES,
    SPECIAL_TOKENS,
    EncoderBackboneSection,
    ExtractConfig,
    ExtractDataSection,
)
from bigbatch.recipes.extract.features import hashed, letters_of, pair_features, word_features
from bigbatch.recipes.extract.sentences import Sentence, Span, read_sentences

MARKERS = ("$", "#")  # around the first entity and the second, as tokens of an encoder (arXiv 1905.08284, section 3.1)
DROPOUT = 0  # a stream of random numbers

_NUMBERS, _TOKENS = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.uint32())
SCHEMA = pyarrow.schema(
    {
        "text": pyarrow.string(),
        "starts": _NUMBERS,
        "ends": _NUMBERS,
        "tokens": _TOKENS,
        "counts": _NUMBERS,
        "firsts": _NUMBERS,
        "stops": _NUMBERS,
        "tags": _NUMBERS,
        "relation": pyarrow.int32(),
        ORIGIN: pyarrow.string(),
    }
)


class Window(NamedTuple):
    """Words that a model sees together."""

    words: list[str]
    tokens: np.ndarray  # uint32, of all words
    counts: np.ndarray  # of each word's tokens
    marks: tuple[Span, ...]
    """Of relations the words of both entities."""


def prepare(data: ExtractDataSection, tokenizer_folder: Path | None = None) -> Path:
    """Make the prepared folder of these settings and sources, or find it, and say on standard error what is in it."""
    folder = prepare_splits(data, _build, tokenizer_folder)
    tell_prepared(folder, data, _held(folder, data), "sentences that stand")
    return folder


class ExtractSamples:
    """A split as `Samples`, each a window; of relations there is one window a sentence."""

    def __init__(self, folder: Path, split: str, config: ExtractConfig) -> None:
        """Map the split into memory."""
        self.config, self.split = config, SPLITS.index(split)
        self.tokenizer = load_tokenizer(folder)
        if config.model.backbone == "encoder" and self.tokenizer.begin_of_text is None:
            found = "has no token that begins a text; kind 'wordpiece' has, and so has BERT's own"
            raise UserError("data.tokenizer", found)
        self.examples = Examples(folder, split)
        self.facts: dict[str, Any] = self.examples.facts
        self.token_dropout = config.objective.token_dropout if split == TRAIN else 0.0
        self.relations = self.examples.numbers("relation")
        self.rows, self.spans = self._cut()
        self.num_samples = len(self.rows)
        self.mean_tokens = float(self.examples.lengths("tokens").sum() / self.num_samples)
        self.fingerprint = self._fingerprint()
        self._features: dict[int, np.ndarray] = {}

    def batch(self, sample_ids: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows as `collate` does, and what is right: labels [N, T], or [N] of relations.

        rows [N] is the window's sentence, begins [N] its first word there, splits [N] the number of the split.
        """
        rows, spans = self.rows[sample_ids], self.spans[sample_ids]
        windows = self._windows(rows, spans)
        features = self._hash(sample_ids, windows)
        if self.token_dropout:
            windows = self._drop(windows, Order(sample_ids, epochs))
        batch = collate(windows, features, self.config, self.tokenizer)
        if self.config.data.task == "relations":
            labels = self.relations[rows].astype(np.int64)
        else:
            tags = zip(self.examples.lists("tags", rows), spans, strict=True)
            labels = _padded([found[begin:stop] for found, (begin, stop) in tags], 0)
        whose = {"rows": rows, "begins": spans[:, 0], "splits": np.full(len(rows), self.split)}
        return batch | whose | {"labels": labels}

    def _cut(self) -> tuple[np.ndarray, np.ndarray]:
        """Return of each window the sentence [W], and the first word and the one behind the last [W, 2]."""
        rows, spans = [], []
        ids = np.arange(self.examples.num_rows)
        counts = self.examples.lists("counts", ids)
        marks = [self.examples.lists(name, ids) for name in ("firsts", "stops")]
        for row, (own, *marked) in enumerate(zip(counts, *marks, strict=True)):
            if self.config.data.task == "relations":
                (origin,) = self.examples.texts(ORIGIN, np.array([row]))
                found = [around(own, int(marked[0].min()), int(marked[1].max()), self.config, origin)]
            else:
                found = cut_words(own, self.config)
            rows += [row] * len(found)
            spans += found
        return np.array(rows), np.array(spans)

    def _windows(self, rows: np.ndarray, spans: np.ndarray) -> list[Window]:
        is_pair = self.config.data.task == "relations"
        names = ("starts", "ends", "tokens", "counts", "firsts", "stops")
        columns = [self.examples.lists(name, rows) for name in names]
        found = []
        for text, span, starts, ends, tokens, counts, firsts, stops in zip(
            self.examples.texts("text", rows), spans.tolist(), *columns, strict=True
        ):
            words = [text[begin:end] for begin, end in zip(starts, ends, strict=True)]
            marks = tuple(zip(firsts.tolist(), stops.tolist(), strict=True)) if is_pair else ()
            found.append(part(Window(words, tokens, counts, marks), *span))
        return found

    def _hash(self, sample_ids: np.ndarray, windows: list[Window]) -> list[np.ndarray]:
        """Return the features of windows, kept in memory: they are always the same."""
        buckets = getattr(self.config.model, "feature_buckets", 0)
        for number, window in zip(sample_ids.tolist() if buckets else (), windows, strict=False):
            if number not in self._features:
                self._features[number] = hash_window(window, buckets).astype(np.int32)
        return [self._features[number] for number in sample_ids.tolist()] if buckets else []

    def _drop(self, windows: list[Window], order: Order) -> list[Window]:
        """Replace all tokens of a word by the unknown one with a chance of `objective.token_dropout`."""
        unknown = np.uint32(self.tokenizer.unknown or 0)
        words = random_words(self.config.seed, order, DROPOUT, max(len(window.words) for window in windows))
        is_dropped = words < np.uint64(self.token_dropout * 2.0**64)
        found = []
        for window, dropped in zip(windows, is_dropped, strict=True):
            chosen = np.repeat(dropped[: len(window.words)], window.counts)
            found.append(window._replace(tokens=np.where(chosen, unknown, window.tokens)))
        return found

    def _fingerprint(self) -> str:
        data, objective = self.config.data, self.config.objective
        content = [self.examples.fingerprint, data.sequence_length, data.packing, self.token_dropout]
        content += [self.config.seed if objective.token_dropout else 0]
        return fingerprint_of(content)


def open_split(folder: Path, split: str, config: ExtractConfig) -> ExtractSamples | None:
    """Open a split of a prepared folder; None where there is none of this name."""
    return ExtractSamples(folder, split, config) if split in read_examples(folder).splits else None


def part(window: Window, begin: int, stop: int) -> Window:
    """Return the words begin..stop of a window."""
    offset = int(window.counts[:begin].sum())
    tokens = window.tokens[offset : offset + int(window.counts[begin:stop].sum())]
    marks = tuple((first - begin, last - begin) for first, last in window.marks)
    return Window(window.words[begin:stop], tokens, window.counts[begin:stop], marks)


def collate(
    windows: Sequence[Window], features: list[np.ndarray], config: ExtractConfig, tokenizer: TextTokenizer
) -> dict[str, np.ndarray]:
    """Return what the model of this configuration takes of windows: see its `forward`."""
    word_counts = np.array([len(window.words) for window in windows], np.int64)
    if isinstance(config.model, EncoderBackboneSection):
        return _collate_tokens(windows, config.data, tokenizer) | {"word_counts": word_counts}
    splits = [np.split(window.tokens, np.cumsum(window.counts)[:-1]) for window in windows]
    batch = {"word_counts": word_counts, "pieces": _nested([list(map(list, found)) for found in splits], -1)}
    if config.model.character_size:
        batch["characters"] = _nested([[letters_of(word) for word in window.words] for window in windows], 0)
    if config.data.task == "relations":
        batch["marks"] = np.array([[*one, *other] for one, other in (window.marks for window in windows)])
    if features:
        batch["features"] = _padded(features, -1)
    return batch


def _collate_tokens(
    windows: Sequence[Window], data: ExtractDataSection, tokenizer: TextTokenizer
) -> dict[str, np.ndarray]:
    """Lay windows out in rows as `lay_out` does; places [N, T] is where each word's first token lies there."""
    assert tokenizer.begin_of_text is not None
    first, end = (np.array([token], np.uint32) for token in (tokenizer.begin_of_text, tokenizer.end_of_text))
    markers = encode_words(tokenizer, MARKERS)
    laid, places = [], []
    for window in windows:
        parts, numbers, marked = [first], [], _markers_around(window.marks, markers)
        for number, word in enumerate(np.split(window.tokens, np.cumsum(window.counts)[:-1])):
            parts += marked.get(number, [])
            numbers.append(len(parts))
            parts += [word, *marked.get(~number, [])]
        laid.append(np.concatenate([*parts, end]))
        places.append(np.cumsum([0, *map(len, parts)])[numbers])
    batch = lay_out(laid, data.sequence_length if data.packing else None)
    offsets = [found + begin for found, begin in zip(places, batch["firsts"], strict=True)]
    del batch["lengths"]
    return batch | {"places": _padded(offsets, 0)}


def _markers_around(marks: tuple[Span, ...], markers: dict[str, np.ndarray]) -> dict[int, list[np.ndarray]]:
    """Return the tokens before words, by number, and behind them, by the number inverted."""
    found: dict[int, list[np.ndarray]] = {}
    for (begin, stop), marker in zip(marks, MARKERS, strict=False):
        found.setdefault(begin, []).append(markers[marker])
        found.setdefault(~(stop - 1), []).append(markers[marker])
    return found


def hash_window(window: Window, num_buckets: int) -> np.ndarray:
    """Return the numbers of the features [T, F] of a window's words, or [F] of its marked pair."""
    if window.marks:
        return hashed(pair_features(window.words, *window.marks), num_buckets)
    return np.stack([hashed(found, num_buckets) for found in word_features(window.words)])


def encode_words(tokenizer: TextTokenizer, words: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the tokens of each word by itself, at least one, at most MOST_PIECES."""
    tokenizer.tokenizer.encode_special_tokens = True
    distinct = list(dict.fromkeys(words))
    none = [tokenizer.end_of_text if tokenizer.unknown is None else tokenizer.unknown]
    found = tokenizer.tokenizer.encode_batch(distinct, add_special_tokens=False)
    return {
        word: np.array((encoding.ids or none)[:MOST_PIECES], np.uint32)
        for word, encoding in zip(distinct, found, strict=True)
    }


def room_of(config: ExtractConfig) -> int:
    """Return how many tokens of an encoder, else words, a window has room for."""
    special = SPECIAL_TOKENS if isinstance(config.model, EncoderBackboneSection) else 0
    return config.data.sequence_length - special


def cut_words(counts: np.ndarray, config: ExtractConfig) -> list[Span]:
    """Return windows one behind the other, each as long as there is room."""
    room, sizes = room_of(config), _sizes(counts, config)
    spans, begin, used = [], 0, 0
    for place, size in enumerate(sizes):
        if used + size > room and used:
            spans.append((begin, place))
            begin, used = place, 0
        used += size
    return [*spans, (begin, len(sizes))]


def around(counts: np.ndarray, first: int, stop: int, config: ExtractConfig, origin: str) -> Span:
    """Return the window that holds words first..stop and as much on both sides as there is room for.

    Raises UserError where these do not fit.
    """
    sizes = _sizes(counts, config)
    left = room_of(config) - sum(sizes[first:stop])
    left -= 4 if isinstance(config.model, EncoderBackboneSection) else 0
    if left < 0:
        found = f"has entities that take more than data.sequence_length ({config.data.sequence_length})"
        raise UserError(origin, f"{found} from the first to the last word; a greater one is right")
    grew = True
    while grew:
        grew = False
        for place in (first - 1, stop):
            if 0 <= place < len(sizes) and sizes[place] <= left:
                first, stop = min(first, place), max(stop, place + 1)
                left -= sizes[place]
                grew = True
    return first, stop


def _sizes(counts: np.ndarray, config: ExtractConfig) -> list[int]:
    return counts.tolist() if isinstance(config.model, EncoderBackboneSection) else [1] * len(counts)


def _padded(arrays: Sequence[np.ndarray], filler: int) -> np.ndarray:
    """Put arrays of different lengths into one, int64."""
    shape = (len(arrays), max(len(array) for array in arrays), *arrays[0].shape[1:])
    found = np.full(shape, filler, np.int64)
    for number, array in enumerate(arrays):
        found[number, : len(array)] = array
    return found


def _nested(lists: list[list[list[int]]], filler: int) -> np.ndarray:
    """Put lists of lists into an array [N, T, longest], int64."""
    shape = (len(lists), max(map(len, lists)), max(len(inner) for found in lists for inner in found))
    found = np.full(shape, filler, np.int64)
    for number, outer in enumerate(lists):
        for place, inner in enumerate(outer):
            found[number, place, : len(inner)] = inner
    return found


# ---------------------------------------------------------------------------------------------------------- prepare


def _build(folder: Path, files: dict[str, list[SourceFile]], data: ExtractDataSection) -> Built:
    counts: Counter[str] = Counter()
    rows = {split: list(read_sentences(data, found, counts)) for split, found in files.items()}
    rows = cut_splits(data, rows)
    leaks = count_leaks(data, rows)
    labels = _labels(data, rows, counts)
    texts = (" ".join(_words(row)) for row in rows[TRAIN])
    markers = [" ".join(MARKERS)] if data.task == "relations" else []
    tokenizer = make_tokenizer(data.tokenizer, [*texts, *markers], folder, knows_all=False)
    check_splits(data, rows, counts)
    written = {}
    for split in (split for split in SPLITS if rows[split]):
        pieces = encode_words(tokenizer, [word for row in rows[split] for word in _words(row)])
        records = (_record(row, pieces, labels) for row in rows[split])
        written[split] = write_split(folder, split, SCHEMA, record_batches(SCHEMA, records))
    return Built(written, {"labels": labels, "counts": dict(+counts), "leaks": leaks})


def _labels(data: ExtractDataSection, rows: dict[str, list[Sentence]], counts: Counter[str]) -> list[str]:
    """Return the relations, or the tags of the types, that training rows have; leave out rows with others."""
    if data.task == "relations":
        labels = label_names(rows[TRAIN], (), counts)
        for split in SPLITS[1:]:
            rows[split] = [row for row in rows[split] if is_known(row, labels, data.on_error, counts)]
        return labels
    kinds = sorted({entity.kind for row in rows[TRAIN] for entity in row.entities})
    if not kinds:
        raise UserError("data.train", f"no sentence has an entity to learn from ({shown_counts(counts)})")
    for split in SPLITS[1:]:
        kept = []
        for row in rows[split]:
            if unknown := {entity.kind for entity in row.entities} - set(kinds):
                found = f"has an entity of the type {min(unknown)!r}, which no training row has"
                leave_out(data, counts, "unseen_type", row.origin, found)
            else:
                kept.append(row)
        rows[split] = kept
    return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def _words(row: Sentence) -> list[str]:
    return [row.text[begin:end] for begin, end in row.words]


def _record(row: Sentence, pieces: dict[str, np.ndarray], labels: list[str]) -> tuple[Any, ...]:
    """Return the values of SCHEMA."""
    starts, ends = zip(*row.words, strict=True)
    own = [pieces[word] for word in _words(row)]
    tags, relation = [], -1
    if row.relation:
        relation = labels.index(row.relation)
    else:
        tags = [0] * len(own)
        for first, stop, kind in row.entities:
            tags[first:stop] = [labels.index(f"B-{kind}"), *[labels.index(f"I-{kind}")] * (stop - first - 1)]
    firsts, stops = ([entity[side] for entity in row.entities] for side in (0, 1))
    return row.text, starts, ends, np.concatenate(own), list(map(len, own)), firsts, stops, tags, relation, row.origin


def _held(folder: Path, data: ExtractDataSection) -> Iterator[str]:
    """Yield what a prepared folder holds, a line each."""
    manifest = read_examples(folder)
    for split in (split for split in SPLITS if split in manifest.splits):
        examples = Examples(folder, split)
        words, entities = int(examples.lengths("counts").sum()), int(examples.lengths("firsts").sum())
        what = f"{len(manifest.facts['labels'])} relations" if data.task == "relations" else f"{entities:,} entities"
        yield f"{split}: {examples.num_rows:,} sentences, {words:,} words, {what}"
