"""What is wrong with a document: each problem one line, and all of them told at once."""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bigbatch.recipes.core.errors import UserError, one_line


class Problem(NamedTuple):
    """One mistake: a JSON path or a file, and the value found with what would be right."""

    where: str
    message: str


class InvalidDocumentError(UserError):
    """Every problem of a document; as text, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(*problems[0])
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(one_line(f"{where}: {message}" if where else message) for where, message in self.problems)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that this one was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def meant(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that says what was probably meant, else all that there is."""
    names = sorted(known)
    match = nearest(name, names)
    return f"did you mean {match!r}?" if match else f"there are: {', '.join(names)}"


def shown(value: Any) -> str:
    """Return a value as it stands in the file, cut to a line."""
    text = one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
