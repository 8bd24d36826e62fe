"""Which texts have come before: exact, in bounded memory however many there are."""

import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash


class Seen:
    """A table on disk from a text's hash to the number of the first document that had it.

    The number makes it repeatable: a document that comes again after an interruption is not a duplicate of itself.
    """

    def __init__(self, path: Path | None) -> None:
        """Open or create the table; without a path, nothing is ever seen before."""
        self.table = sqlite3.connect(path) if path else None

    def __enter__(self) -> Self:
        """Set the table up for one process that may be killed at any time."""
        if self.table:
            # One process alone: the log needs no shared memory, which network file systems lack.
            self.table.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.table.execute("PRAGMA journal_mode = WAL")
            self.table.execute("CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the table, dropping what was not committed."""
        if self.table:
            self.table.close()

    def before(self, text: str, number: int) -> bool:
        """Tell whether a document with a smaller number had this text, and remember it."""
        if not self.table:
            return False
        key = xxhash.xxh3_128_digest(text.encode())
        self.table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, number))
        (first,) = self.table.execute("SELECT number FROM seen WHERE hash = ?", (key,)).fetchone()
        return first != number

    def commit(self) -> None:
        """Bring everything remembered to disk."""
        if self.table:
            self.table.commit()
