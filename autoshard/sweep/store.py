"""Results on disk: an append-only SQLite file, one row per key, safe against kills at any moment.

Every result is one transaction, synced to disk (write-ahead log, `synchronous=FULL`). Triggers refuse changes and removals.
`attempts` has a row for every started search, which makes kills visible.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from autoshard.errors import AutoshardError
from autoshard.sweep.results import Result, result_from_dict

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS results (
        key TEXT PRIMARY KEY, point TEXT NOT NULL, result TEXT NOT NULL, made_at REAL NOT NULL, session TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS plans (key TEXT, phase TEXT, plan BLOB NOT NULL, PRIMARY KEY (key, phase)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS attempts (
        number INTEGER PRIMARY KEY, key TEXT NOT NULL, begun_at REAL NOT NULL, session TEXT NOT NULL
    );
    CREATE TRIGGER IF NOT EXISTS results_stay
        BEFORE UPDATE ON results BEGIN SELECT RAISE(ABORT, 'results never change'); END;
    CREATE TABLE IF NOT EXISTS compiled (
        key TEXT, phase TEXT, target TEXT, seconds REAL NOT NULL, PRIMARY KEY (key, phase, target)
    );
    CREATE TRIGGER IF NOT EXISTS results_last
        BEFORE DELETE ON results BEGIN SELECT RAISE(ABORT, 'results are never removed'); END;
"""
_BUSY_SECONDS = 60.0
"""The time that one job waits for another that writes to the same store."""


def find_store(recorded: str, beside: Path) -> Path | None:
    """The store that a sweep's file records, where it was or beside that file; None if neither exists."""
    if not recorded:
        return None
    places = (Path(recorded), beside.parent / Path(recorded).name)
    return next((each for each in places if each.is_file()), None)


class StoreError(AutoshardError, OSError):
    """Raised if the store cannot be read or written: a full disk, a damaged file, another kind of file."""


class Store:
    """A file of results; `with Store(path) as store`."""

    def __init__(self, path: str | os.PathLike[str], most_pages: int | None = None) -> None:
        self.path, self.session = Path(path), uuid.uuid4().hex
        try:
            self.database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=FULL")
            if most_pages is not None:
                self.database.execute(f"PRAGMA max_page_count={most_pages}")
            self.database.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be used as a store of results: {error}.") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self.database.close()

    def get(self, key: str) -> Result | None:
        """The result of a key, without its plans.

        **Raises:** `StoreError`.
        """
        found = self._all("SELECT result FROM results WHERE key = ?", key)
        return result_from_dict(json.loads(found[0][0])) if found else None

    def plan(self, key: str, phase: str) -> bytes | None:
        """The plan of one phase of a key, compressed."""
        found = self._all("SELECT plan FROM plans WHERE key = ? AND phase = ?", key, phase)
        return found[0][0] if found else None

    def compiled(self, key: str, phase: str, target: str) -> float | None:
        """The compiled step of one phase of a key, in seconds; None if it was not compiled for this target."""
        query = "SELECT seconds FROM compiled WHERE key = ? AND phase = ? AND target = ?"
        found = self._all(query, key, phase, target)
        return found[0][0] if found else None

    def add_compiled(self, key: str, phase: str, target: str, seconds: float) -> None:
        """Stores a compiled step.

        **Raises:** `StoreError`.
        """
        statement = "INSERT OR REPLACE INTO compiled VALUES (?, ?, ?, ?)"
        self._transaction([(statement, (key, phase, target, seconds))])

    def begin(self, key: str) -> None:
        """Records the start of a search.

        **Raises:** `StoreError`.
        """
        statement = "INSERT INTO attempts (key, begun_at, session) VALUES (?, ?, ?)"
        self._transaction([(statement, (key, time.time(), self.session))])

    def add(self, key: str, point: str, result: Result) -> None:
        """Stores a result unless there is one; it is on disk when this returns.

        **Raises:** `StoreError`; nothing of the result is stored then.
        """
        row = (key, point, json.dumps(result.to_dict()), time.time(), self.session)
        statements: list[tuple[str, tuple]] = [("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?)", row)]
        for phase, plan in result.plans.items():
            statements.append(("INSERT OR IGNORE INTO plans VALUES (?, ?, ?)", (key, phase, plan)))
        self._transaction(statements)

    def keys(self) -> list[str]:
        """The keys that have a result, in order."""
        return [key for (key,) in self._all("SELECT key FROM results ORDER BY key")]

    def attempts(self) -> Iterator[tuple[str, str]]:
        """Every started search, in order: its key and its session."""
        yield from self._all("SELECT key, session FROM attempts ORDER BY number")

    def _all(self, query: str, *values: str) -> list[tuple]:
        try:
            return self.database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} cannot be read: {error}.") from error

    def _transaction(self, statements: Iterable[tuple[str, tuple]]) -> None:
        try:
            self.database.execute("BEGIN IMMEDIATE")
            for statement, values in statements:
                self.database.execute(statement, values)
            self.database.execute("COMMIT")
        except sqlite3.Error as error:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise StoreError(f"{self.path} cannot be written: {error}.") from error
