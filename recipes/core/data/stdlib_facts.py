"""Entities and relations that Python's own parser knows: functions, their parameters and the parameters' defaults."""

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from bigbatch.recipes.core.data.stdlib_text import Function, documented_functions

ENTITY_COLUMNS = ("text", "entities")
PAIR_COLUMNS = ("text", "entities", "relation")
FUNCTION, PARAMETER, DEFAULT, NONE = "function", "parameter", "default", "Other"
TAKES, HAS_DEFAULT = "takes(e1,e2)", "has_default(e1,e2)"
MOST_PAIRS = 6  # of a function
SHORTEST_NAME = 3  # letters of a parameter that is recognized in a summary; `a` is an article too

Span = tuple[int, int]


def stdlib_entities(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the signature and the summary of each documented function of a file, with what stands in them.

    Functions, parameters and defaults in the signature, and the parameters that the summary names.
    """
    for function in documented_functions(path):
        text = f"{function.signature} {function.summary}"
        spans = [
            (span, FUNCTION if not owner else PARAMETER if relation == TAKES else DEFAULT)
            for span, (owner, relation) in _owners(function).items()
        ]
        names = {name for name, *_ in function.parameters if len(name) >= SHORTEST_NAME}
        named = [found.span() for found in re.finditer(r"\w+", text) if found[0] in names]
        spans += [(span, PARAMETER) for span in named if span[0] > len(function.signature)]
        entities = [{"start": start, "end": end, "type": kind} for (start, end), kind in spans]
        yield dict(zip(ENTITY_COLUMNS, (text, entities), strict=True))


def stdlib_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield pairs of entities in signatures: a function takes a parameter, which may have a default, or neither.

    The first of a pair stands before the second.
    """
    for function in documented_functions(path):
        owners = _owners(function)
        pairs = list(combinations(sorted(owners), 2))
        related = [pair for pair in pairs if owners[pair[1]][0] == pair[0]]
        others = [pair for pair in pairs if owners[pair[1]][0] != pair[0]]
        for first, second in [*related[:MOST_PAIRS], *others[: len(related)][:MOST_PAIRS]]:
            owner, relation = owners[second]
            spans = [{"start": begin, "end": end} for begin, end in (first, second)]
            values = (function.signature, spans, relation if owner == first else NONE)
            yield dict(zip(PAIR_COLUMNS, values, strict=True))


def _owners(function: Function) -> dict[Span, tuple[Span | None, str]]:
    """Return the characters of each entity of a signature, what it belongs to, and how."""
    name = (0, len(function.name))
    found: dict[Span, tuple[Span | None, str]] = {name: (None, NONE)}
    for _, parameter, default in function.parameters:
        found[parameter] = (name, TAKES)
        if default:
            found[default] = (parameter, HAS_DEFAULT)
    return found
