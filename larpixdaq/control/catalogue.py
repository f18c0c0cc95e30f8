"""The run catalogue: every run number ever drawn, what was about to be done about it, and how it ended.

SQLite, written by the core alone; it says what is about to happen before anybody is told.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from larpixdaq.errors import FileError
from larpixdaq.states import CANCELLED, ENDED, PREPARING, RUNNING

_SCHEMA: Final = 2
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS runs (
    run INTEGER PRIMARY KEY, phase TEXT NOT NULL, kind TEXT NOT NULL, comment TEXT NOT NULL, operator TEXT NOT NULL,
    prepared_ns INTEGER NOT NULL, begun_ns INTEGER, ended_ns INTEGER, condition TEXT NOT NULL, details TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS comments (
    run INTEGER NOT NULL, time_ns INTEGER NOT NULL, operator TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    storage TEXT NOT NULL, path TEXT NOT NULL, run INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    condition TEXT NOT NULL, time_ns INTEGER NOT NULL, PRIMARY KEY (storage, path));
CREATE INDEX IF NOT EXISTS files_of_run ON files (run);
"""
#: Older schemas become this one by the tables that they lack: 1 had no `files`.
_OLDER: Final = (0, 1)
_COLUMNS: Final = (
    "run",
    "phase",
    "kind",
    "comment",
    "operator",
    "prepared_ns",
    "begun_ns",
    "ended_ns",
    "condition",
)


@dataclass
class Run:
    """One run. Times are unix ns; `phase` and `condition` are those of states.py."""

    run: int
    kind: str
    comment: str
    operator: str
    prepared_ns: int
    phase: str = PREPARING
    condition: str = RUNNING
    begun_ns: int | None = None
    ended_ns: int | None = None
    layout: int = 0
    asic: str = ""
    #: Of the producers' software.
    versions: dict[str, str] = field(default_factory=dict)
    #: Names of the storages, and producers with every epoch that they announced: those the run cannot do without.
    storages: list[str] = field(default_factory=list)
    producers: dict[str, list[int]] = field(default_factory=dict)
    #: Totals of producers that have ended, and what the storages reported, as reports.py has them.
    ends: list[dict[str, Any]] = field(default_factory=list)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: int = 0
    stored: int | None = 0  # None: no storage has said
    files: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.phase in (ENDED, CANCELLED)


class Catalogue:
    """FileError, in one line, from every method when the file cannot be used."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "catalogue.sqlite"
        lock = directory / "catalogue.lock"
        try:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FileError(f"{lock}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise FileError(f"{self.path}: another core uses it (give this one a --state-dir of its own)") from None
        try:
            self._db = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self) -> sqlite3.Connection:
        with self._errors():
            db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=FULL")
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version not in (*_OLDER, _SCHEMA):
                    raise FileError(f"{self.path}: made by another larpix-daq (schema {version}, here {_SCHEMA})")
                db.executescript(_TABLES)
                db.execute(f"PRAGMA user_version={_SCHEMA}")
            except BaseException:
                db.close()
                raise
        return db

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise FileError(f"{self.path}: {error}") from None

    def close(self) -> None:
        """Also a second time."""
        self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def highest(self) -> int:
        """The highest run number ever drawn, 0 when there is none."""
        with self._errors():
            (highest,) = self._db.execute("SELECT coalesce(max(run), 0) FROM runs").fetchone()
        return int(highest)

    def save(self, run: Run, *, new: bool = False) -> None:
        """Write what is known of a run; `new`: FileError when its number is there already."""
        details = asdict(run)
        values = [details.pop(column) for column in _COLUMNS]
        values.append(json.dumps(details, separators=(",", ":")))
        with self._errors():
            self._db.execute(
                f"INSERT {'' if new else 'OR REPLACE '}INTO runs ({','.join(_COLUMNS)},details) "
                f"VALUES ({','.join('?' * len(values))})",
                values,
            )

    def find(self, number: int | None = None) -> Run | None:
        """The run of this number, or the last one; None when there is none."""
        what = "ORDER BY run DESC LIMIT 1" if number is None else "WHERE run = ?"
        with self._errors():
            query = f"SELECT {','.join(_COLUMNS)},details FROM runs {what}"
            row = self._db.execute(query, () if number is None else (number,)).fetchone()
        if row is None:
            return None
        try:
            return Run(**dict(zip(_COLUMNS, row, strict=False)), **json.loads(row[-1]))
        except (TypeError, ValueError) as error:
            raise FileError(f"{self.path}: run {row[0]}: {error}") from None

    def add_file(self, storage: str, path: str, run: int, size: int, sha256: str, condition: str) -> bool:
        """Write down a file that a storage has closed; whether there is more to know of the run by it.

        Its checksum may follow later, and may be lacking when a storage tells us again of what it has found.
        """
        with self._errors():
            query = "SELECT run, bytes, condition, sha256 FROM files WHERE storage = ? AND path = ?"
            *known, checksum = self._db.execute(query, (storage, path)).fetchone() or ("",)
            same = known == [run, size, condition]
            if same and sha256 in ("", checksum):
                return False
            self._db.execute(
                "INSERT OR REPLACE INTO files (storage, path, run, bytes, sha256, condition, time_ns) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (storage, path, run, size, sha256, condition, time.time_ns()),
            )
        return not same

    def files(self, run: int) -> list[dict[str, Any]]:
        """The files of a run that storages have closed: {"storage", "path", "bytes", "sha256", "condition", "time"}."""
        with self._errors():
            query = (
                "SELECT storage, path, bytes, sha256, condition, time_ns FROM files WHERE run = ? "
                "ORDER BY storage, path"
            )
            rows = self._db.execute(query, (run,)).fetchall()
        names = ("storage", "path", "bytes", "sha256", "condition")
        return [{**dict(zip(names, row, strict=False)), "time": row[-1] / 1e9} for row in rows]

    def add_comment(self, run: int, operator: str, text: str) -> None:
        with self._errors():
            self._db.execute("INSERT INTO comments VALUES (?, ?, ?, ?)", (run, time.time_ns(), operator, text))

    def comments(self, run: int) -> list[dict[str, Any]]:
        """Comments made about a run, in order: {"time": unix s, "operator", "text"}."""
        with self._errors():
            query = "SELECT time_ns, operator, text FROM comments WHERE run = ? ORDER BY rowid"
            rows = self._db.execute(query, (run,)).fetchall()
        return [{"time": ns / 1e9, "operator": who, "text": text} for ns, who, text in rows]
