"""Documents of older versions made current: one pure function a step."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from bigbatch.recipes.core.config import DOCUMENT_VERSION
from bigbatch.recipes.core.errors import UserError

Migration = Callable[[dict[str, Any]], dict[str, Any]]

# Version -> the function that makes a document of it one of the next: {1: migrate_1_to_2, ...}.
MIGRATIONS: Mapping[int, Migration] = {}


def migrate(
    document: dict[str, Any],
    where: str,
    current: int = DOCUMENT_VERSION,
    migrations: Mapping[int, Migration] = MIGRATIONS,
) -> dict[str, Any]:
    """Return the document in the current version, the one given untouched; raise UserError for a version unknown."""
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= current:
        found = "missing" if "version" not in document else repr(version)
        raise UserError(f"{where} version", f"{found}; this bigbatch reads 1 to {current}, write {current}")
    document = copy.deepcopy(document)
    for step in range(version, current):
        document = {**migrations[step](document), "version": step + 1}
    return document
