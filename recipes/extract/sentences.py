"""Sentences as sources have them: words, where they stand in the text, and what is known of them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from bigbatch.recipes.core.data.rows import as_text, read_rows, shown
from bigbatch.recipes.core.data.sources import SourceFile
from bigbatch.recipes.core.data.splits import leave_out
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.extract.config import ExtractDataSection

LONGEST_SENTENCE = 2000  # words; more have no end
_WORD = re.compile(r"https?://\S+|[@#]\w+|\w+|[^\w\s]")
_MARKER = re.compile(r"<(/?)e([12])>")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

Span = tuple[int, int]  # first, and one behind the last


class Entity(NamedTuple):
    """Words of a sentence."""

    first: int
    stop: int
    kind: str


class Sentence(NamedTuple):
    """A row of either task."""

    text: str
    words: tuple[Span, ...]
    """Characters of each."""
    entities: tuple[Entity, ...]
    """All, in their order; of relations the marked two, the first one first, which may stand behind the second."""
    relation: str
    origin: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Of relations every split gets its share."""
        return (self.relation,) if self.relation else ()


def read_sentences(data: ExtractDataSection, files: Iterable[SourceFile], counts: Counter[str]) -> Iterator[Sentence]:
    """Yield the sentences of some files; what cannot be taken is left out or refused, as `data.on_error` says."""
    for file in files:
        width = 0
        for row in read_rows(file, data.columns_of(file.format)):
            counts["read"] += 1
            try:
                if file.format == "conll":
                    width = width or len(row.values["lines"][0])
                    yield _of_lines(row.values["lines"], width, data.scheme, row.origin)
                elif data.tokens_column:
                    words, tags = row.values[data.tokens_column], row.values[data.tags_column]
                    yield _of_tags(words, tags, data.scheme, row.origin)
                else:
                    yield _of_text(row.values, data, row.origin)
            except BadSentenceError as error:
                leave_out(data, counts, error.kind, error.origin or row.origin, str(error))
            except UserError as error:  # a value that is no text
                leave_out(data, counts, "no_text", error.where, error.message)


class BadSentenceError(ValueError):
    """What a sentence cannot be taken for."""

    def __init__(self, kind: str, message: str, origin: str = "") -> None:
        super().__init__(message)
        self.kind, self.origin = kind, origin


def words_of(text: str) -> tuple[Span, ...]:
    """Return the characters of each word: addresses, names behind @ or #, runs of letters and digits, single marks."""
    return tuple(found.span() for found in _WORD.finditer(text))


def unmarked(text: str) -> tuple[str, list[Span]]:
    """Return a text without the markers of two entities, and the characters of each entity; raise BadSentenceError."""
    parts = _MARKER.split(text)  # text, "" or "/", number, text, ...
    found = [f"<{slash}e{number}>" for slash, number in zip(parts[1::3], parts[2::3], strict=True)]
    right = (["<e1>", "</e1>", "<e2>", "</e2>"], ["<e2>", "</e2>", "<e1>", "</e1>"])
    if found not in right:
        missing = [marker for marker in right[0] if found.count(marker) != 1]
        what = f"has {missing[0]} {found.count(missing[0])} times" if missing else f"has the markers {' '.join(found)}"
        raise BadSentenceError("bad_markers", f"{what}; right is one <e1>...</e1> and one <e2>...</e2>, side by side")
    texts = parts[::3]
    ends = [sum(map(len, texts[: number + 1])) for number in range(4)]
    spans = [(ends[0], ends[1]), (ends[2], ends[3])]
    return "".join(texts), spans if found[0] == "<e1>" else spans[::-1]


def touched(words: tuple[Span, ...], text: str, span: Span) -> Span:
    """Return the words that characters touch."""
    places = [place for place, (start, end) in enumerate(words) if start < span[1] and end > span[0]]
    if not places:
        raise BadSentenceError("bad_span", f"has the entity {shown(text[slice(*span)])}, which has no word")
    return places[0], places[-1] + 1


def entities_of_tags(tags: list[str], scheme: str = "iob1") -> list[Entity]:
    """Return what tags stand for; raise BadSentenceError with the place of one that has no meaning in `scheme`.

    In `iob1` every sequence of O, B- and I- has one, so that it also reads what a model says.
    """
    found: list[Entity] = []
    before = "O"
    for place, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        goes_on = prefix == "I" and before[2:] == kind and before != "O"
        if tag != "O" and (prefix not in ("B", "I") or not kind):
            raise BadTagError(place, f"has the tag {tag!r}; right is O, B-type or I-type")
        if prefix == "I" and not goes_on and scheme == "iob2":
            hint = "; data.scheme 'iob1' takes it" if before == "O" else ""
            raise BadTagError(place, f"has {tag!r} behind {before!r}; right is B-{kind}{hint}")
        if goes_on:
            found[-1] = found[-1]._replace(stop=place + 1)
        elif tag != "O":
            found.append(Entity(place, place + 1, kind))
        before = tag
    return found


class BadTagError(BadSentenceError):
    """A tag that has no meaning where it stands."""

    def __init__(self, place: int, message: str) -> None:
        super().__init__("bad_tag", message)
        self.place = place


def _of_lines(lines: list[list[str]], width: int, scheme: str, origin: str) -> Sentence:
    """Return a sentence of CoNLL columns; errors name the line."""
    file, _, number = origin.rpartition(":")

    def line(place: int) -> str:
        return f"{file}:{int(number) + place}"

    for place, fields in enumerate(lines):
        if len(fields) != width or width < 2:
            right = f"{width}, as the first line of the file" if width > 1 else "a word and its tag"
            raise BadSentenceError("columns", f"has {len(fields)} columns; right is {right}", line(place))
    if len(lines) > LONGEST_SENTENCE:
        found = f"begins a sentence that has no end after {LONGEST_SENTENCE} words; right is a blank line behind each"
        raise BadSentenceError("no_end", found)
    try:
        return _of_tags([fields[0] for fields in lines], [fields[-1] for fields in lines], scheme, origin)
    except BadTagError as error:
        raise BadSentenceError("bad_tag", str(error), line(error.place)) from None


def _of_tags(words: Any, tags: Any, scheme: str, origin: str) -> Sentence:
    """Return a sentence of words and as many tags; its text has a space between each two."""
    for what, found in (("words", words), ("tags", tags)):
        if not isinstance(found, list) or not all(isinstance(item, str) and item.strip() for item in found):
            raise BadSentenceError("no_list", f"has {shown(found)} for {what}; right is a list of texts")
    if len(words) != len(tags) or not words:
        raise BadSentenceError("bad_tag", f"has {len(words)} words and {len(tags)} tags; right is one tag a word")
    entities = entities_of_tags(tags, scheme)
    ends = [-1]
    for word in words:
        ends.append(ends[-1] + 1 + len(word))
    spans = tuple((end + 1, end + 1 + len(word)) for end, word in zip(ends, words, strict=False))
    return Sentence(_whole(" ".join(words)), spans, tuple(entities), "", origin)


def _of_text(values: dict[str, Any], data: ExtractDataSection, origin: str) -> Sentence:
    """Return a sentence of a text, and of spans or markers in it."""
    text = _whole(as_text(values[data.text_column], origin, data.text_column))
    relation = ""
    if data.task == "relations":
        relation = as_text(values[data.relation_column], origin, data.relation_column).strip()
        if not relation:
            raise BadSentenceError("no_relation", "has no relation; right is a name such as Cause-Effect(e1,e2)")
    if data.task == "relations" and data.entities_column is None:
        text, spans = unmarked(text)
        named = [(span, "") for span in spans]
    else:
        named = _named_spans(values[data.entities_column or "entities"], text, data.task == "entities")
    words = words_of(text)
    entities = [Entity(*touched(words, text, span), kind) for span, kind in named]
    if not words:
        raise BadSentenceError("empty", "has no word")
    if data.task == "relations" and len(entities) != 2:
        raise BadSentenceError("bad_markers", f"has {len(entities)} entities; right is the two that are related")
    in_order = sorted(entities)
    for one, other in pairwise(in_order):
        if other.first < one.stop:
            shown_ones = (shown(text[words[item.first][0] : words[item.stop - 1][1]]) for item in (one, other))
            raise BadSentenceError("overlap", f"has the entities {' and '.join(shown_ones)}, which share a word")
    return Sentence(text, words, tuple(in_order if data.task == "entities" else entities), relation, origin)


def _named_spans(value: Any, text: str, has_types: bool) -> list[tuple[Span, str]]:
    """Return the characters and the type of each entity in a list."""
    found = []
    for item in value if isinstance(value, list) else [None]:
        keys = ("start", "end", "type") if has_types else ("start", "end")
        start, end, kind = (*(item.get(key) for key in keys), "")[:3] if isinstance(item, dict) else (None, None, None)
        if type(start) is not int or type(end) is not int or not isinstance(kind, str) or (has_types and not kind):
            wanted = ", ".join(f'"{key}"' for key in keys)
            raise BadSentenceError("bad_span", f"has {shown(value)} for entities; right is a list of {{{wanted}}}")
        if not 0 <= start < end <= len(text):
            raise BadSentenceError(
                "bad_span", f"has an entity at characters {start} to {end} of a text with {len(text)}"
            )
        found.append(((start, end), kind))
    return found


def _whole(text: str) -> str:
    """Return the text, where half of a surrogate pair, which UTF-8 has not, is another character."""
    return _SURROGATE.sub("\ufffd", text)
