"""The run catalogue: an SQLite database of every run number, with the phase of the run and its end, the e-log, the
audit, and the alarms.

Only the core writes it, and writes each step of a run before it sends the step to the components. Rows of e-log, audit
and alarms are only appended: triggers refuse every change of a row.

The highest run number is also in its own file, `highest_run`, because files of two runs with the same number would be
confused. A damaged catalogue is renamed, its readable rows are copied to a new catalogue, and run numbers continue
after the highest one.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.constants import CANCELLED, ENDED, PREPARING, RUN_DIGITS, RunCondition
from larpixdaq.errors import FileError, RequestError, advice
from larpixdaq.protocol.reports import Comment, RunEnd, StorageEnd
from larpixdaq.protocol.stream import ConnectedBoard
from larpixdaq.runtime.file_access import (
    LockedFile,
    check_regular,
    damaged_path,
    has_no_locks,
    no_locks_error,
    open_locked,
)

_SCHEMA: Final = 4
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS runs (
    run INTEGER PRIMARY KEY, phase TEXT NOT NULL, kind TEXT NOT NULL, comment TEXT NOT NULL, operator TEXT NOT NULL,
    prepared_ns INTEGER NOT NULL, begun_ns INTEGER, ended_ns INTEGER, condition TEXT NOT NULL, details TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS comments (
    run INTEGER NOT NULL, time_ns INTEGER NOT NULL, operator TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shifters (
    id INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, name TEXT NOT NULL, operator TEXT NOT NULL, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attachments (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL, time_ns INTEGER NOT NULL, name TEXT NOT NULL, file TEXT NOT NULL,
    bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, shifter TEXT NOT NULL, operator TEXT NOT NULL, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS delivered (storage TEXT PRIMARY KEY, comment INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    storage TEXT NOT NULL, path TEXT NOT NULL, run INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    condition TEXT NOT NULL, time_ns INTEGER NOT NULL, PRIMARY KEY (storage, path));
CREATE INDEX IF NOT EXISTS files_of_run ON files (run);
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, key TEXT NOT NULL, role TEXT NOT NULL, name TEXT NOT NULL,
    action TEXT NOT NULL, component TEXT NOT NULL, detail TEXT NOT NULL, outcome TEXT NOT NULL, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS alarms (
    id INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, alarm INTEGER NOT NULL, event TEXT NOT NULL,
    condition TEXT NOT NULL, component TEXT NOT NULL, subject TEXT NOT NULL, level TEXT NOT NULL, text TEXT NOT NULL,
    raised_ns INTEGER NOT NULL, count INTEGER NOT NULL, who TEXT NOT NULL, comment TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS snapshots (
    name TEXT PRIMARY KEY, time_ns INTEGER NOT NULL, asic TEXT NOT NULL, chips INTEGER NOT NULL, comment TEXT NOT NULL,
    operator TEXT NOT NULL, key TEXT NOT NULL, data BLOB NOT NULL);
"""
#: Columns that tables of older schemas lack; all are texts.
_ADDED: Final = {"runs": ("shifter",), "comments": ("shifter", "key")}
#: Made after the columns. The index of runs has all that `larpixdaq runs` searches, so that it reads no details.
_INDEXES: Final = """
CREATE INDEX IF NOT EXISTS runs_searched ON runs (run, prepared_ns, condition, kind, operator, shifter, comment);
CREATE INDEX IF NOT EXISTS rows_of_alarm ON alarms (alarm, id);
CREATE INDEX IF NOT EXISTS alarms_by_time ON alarms (time_ns);
CREATE INDEX IF NOT EXISTS comments_of_run ON comments (run);
CREATE INDEX IF NOT EXISTS attachments_of_run ON attachments (run);
"""
_APPENDED: Final = """
CREATE TRIGGER IF NOT EXISTS {table}_update BEFORE UPDATE ON {table}
    BEGIN SELECT RAISE(ABORT, 'rows of the {table} are never changed'); END;
CREATE TRIGGER IF NOT EXISTS {table}_delete BEFORE DELETE ON {table}
    BEGIN SELECT RAISE(ABORT, 'rows of the {table} are never removed'); END;
CREATE TRIGGER IF NOT EXISTS {table}_replace BEFORE INSERT ON {table}
    WHEN EXISTS (SELECT 1 FROM {table} WHERE rowid = NEW.rowid)
    BEGIN SELECT RAISE(ABORT, 'rows of the {table} are never replaced'); END;
"""
_NAME: Final = "catalogue.sqlite"
_HIGHEST: Final = "highest_run"
#: Older schemas only lack tables and columns, which are added: schema 1 has no `files`, schema 2 no `audit`, schema 3
#: neither `shifters` nor `alarms`.
_OLD_SCHEMAS: Final = (0, 1, 2, 3)
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
    "shifter",
)
#: Columns of each table that are copied from a damaged catalogue.
_COPIED: Final = {
    "runs": ",".join((*_COLUMNS, "details")),
    "comments": "rowid,run,time_ns,operator,text,shifter,key",
    "files": "storage,path,run,bytes,sha256,condition,time_ns",
    "audit": "id,time_ns,key,role,name,action,component,detail,outcome,count",
    "alarms": "id,time_ns,alarm,event,condition,component,subject,level,text,raised_ns,count,who,comment",
    "shifters": "id,time_ns,name,operator,key",
    "attachments": "id,run,time_ns,name,file,bytes,sha256,shifter,operator,key",
    "delivered": "storage,comment",
    "snapshots": "name,time_ns,asic,chips,comment,operator,key,data",
}
#: Maximum characters of a run's comment and of a comment of the e-log, of a run's kind, and of a shifter's name.
MAX_COMMENT: Final = 10_000
MAX_KIND: Final = 64
MAX_SHIFTER: Final = 100
#: Maximum number of comments on a run, and of their bytes: they are all in its sidecars.
MAX_COMMENTS: Final = 5_000
MAX_COMMENT_BYTES: Final = 2 << 20
#: Maximum number of snapshots, of up to 1 MB each.
MAX_SNAPSHOTS: Final = 1_000


class AuditRow(msgspec.Struct, frozen=True):
    """Who did what when. `time_ns`: unix ns. `key` and `role`: of the key in use; "core" for the core itself.

    `name`: of the Operator or component, or the address of a connection. `outcome`: "accepted", "done", "failed: …",
    "refused", or "" for a change of the core's state. `count`: number of attempts or actions for which the row stands.
    """

    time_ns: int
    key: str
    role: str
    name: str
    action: str
    component: str = ""
    detail: str = ""
    outcome: str = ""
    count: int = 1


_AUDIT_COLUMNS: Final = AuditRow.__struct_fields__


class AlarmRow(msgspec.Struct, frozen=True):
    """What happened to an alarm. `time_ns`: unix ns. `alarm`: its number. `event`: "raised", "acknowledged", "cleared".

    `condition`, `component`, `subject`, `level`, `text`, `raised_ns` (unix ns of the first time) and `count` as in
    alarms.Alarm, so that the last row of an alarm tells all about it. `who` and `comment`: of an acknowledgement.
    """

    time_ns: int
    alarm: int
    event: str
    condition: str
    component: str
    subject: str
    level: str
    text: str
    raised_ns: int
    count: int = 1
    who: str = ""
    comment: str = ""


_ALARM_COLUMNS: Final = AlarmRow.__struct_fields__


class Author(NamedTuple):
    """Who writes into the e-log: the shifter's name as it was given, and the names of the Operator and its key."""

    shifter: str
    operator: str
    key: str


class Run(msgspec.Struct, forbid_unknown_fields=True):
    """One run. Times in unix ns; `phase` and `condition` as in constants.py."""

    run: int
    kind: str
    comment: str
    operator: str
    prepared_ns: int
    phase: str = PREPARING
    condition: str = RunCondition.RUNNING
    begun_ns: int | None = None
    ended_ns: int | None = None
    shifter: str = ""
    layout: int = 0
    asic: str = ""
    #: Time of the request end_run or abort_run, when RUN ended. `ended_ns`: when all data were stored.
    stopped_ns: int | None = None
    #: The boards that the producers read.
    connected: list[ConnectedBoard] = []
    #: Versions of the producers' software, by name.
    versions: dict[str, str] = {}
    #: Required components: names of storages, and of producers with every epoch that they announced.
    storages: list[str] = []
    producers: dict[str, list[int]] = {}
    #: Totals of ended producers, and reports of storages by name.
    ends: list[RunEnd] = []
    reports: dict[str, StorageEnd] = {}
    rows: int | None = None  # that producers made; None: not known yet, or the totals of a producer are unknown
    stored: int | None = None  # in the storage that has most; None: not known yet, or no storage has reported
    files: list[str] = []
    reasons: list[str] = []

    @property
    def is_over(self) -> bool:
        return self.phase in (ENDED, CANCELLED)


class Catalogue:
    """The open catalogue, locked for this core. All methods raise FileError if the file cannot be used."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / _NAME
        self._highest_path = directory / _HIGHEST
        #: The highest run number ever drawn, 0 before the first.
        self.highest = 0
        #: Problems of the catalogue at its opening, one line each.
        self.warnings: list[str] = []
        self._lock_path = directory / "catalogue.lock"
        self._lock = self._take_lock()
        try:
            check_regular(self.path)
            self._db = self._open_or_replace()
            self._file = os.stat(self.path)
        except BaseException:
            self._lock.close()
            raise

    def _open_or_replace(self) -> sqlite3.Connection:
        """Open the catalogue. Replaces a damaged catalogue by a new one with all its readable rows."""
        drawn = self._read_highest()
        damage = self._find_damage()
        if damage and drawn is None:
            raise FileError(
                f"{self.path}: is damaged ({damage}), and the highest run number is not known: write it into"
                f" {self._highest_path}, and start again"
            )
        kept = self._rename_damaged() if damage else None
        db = self._open()
        try:
            if kept is not None:
                with self._errors():
                    runs = _copy(kept, db)
                self.warnings.append(
                    f"{self.path} was damaged ({damage}): it is kept as {kept.name}, {runs} runs could be read of it"
                )
            (found,) = db.execute("SELECT coalesce(max(run), 0) FROM runs").fetchone()
            if found < (drawn or 0):
                self.warnings.append(
                    f"{self.path} ends with run {found}, but run {drawn} was drawn: numbers continue after it"
                )
            elif found != drawn:
                self._write_highest(found)
            self.highest = max(found, drawn or 0)
        except BaseException:
            db.close()
            raise
        return db

    def _find_damage(self) -> str:
        """Return the damage of the database file, which is only read; "" if it is sound or does not exist."""
        if not self.path.exists():
            return ""
        try:
            with closing(_read_only(self.path)) as db:
                (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    return " ".join(str(found).split())
                if 0 < db.execute("PRAGMA user_version").fetchone()[0] <= _SCHEMA:
                    row = db.execute(f"SELECT {_selection(db, 'runs')} FROM runs ORDER BY run DESC LIMIT 1").fetchone()
                    if row is not None:
                        _run(row)
        except sqlite3.OperationalError as error:  # not the file's content: no permission, a failing disk
            raise FileError(f"{self.path}: {error}") from None
        except (sqlite3.Error, TypeError, ValueError) as error:
            return str(error)
        return ""

    def _rename_damaged(self) -> Path:
        """Rename the damaged database with SQLite's files beside it. Returns the new name of the database."""
        kept = damaged_path(self.path)
        for more in ("-wal", "-shm", ""):
            beside = self.path.with_name(self.path.name + more)
            if beside.exists():
                beside.rename(kept.with_name(kept.name + more))
        return kept

    def _read_highest(self) -> int | None:
        """Return the number in the file highest_run; None if the file does not exist or is damaged."""
        try:
            text = self._highest_path.read_text("ascii")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self.warnings.append(f"{self._highest_path} cannot be read: {error}")
            return None
        if not text.strip().isdigit() or len(text) > 20:
            self.warnings.append(f"{self._highest_path} is damaged: expected a run number, found {text[:40]!r}")
            return None
        return int(text)

    def _write_highest(self, number: int) -> None:
        new = self._highest_path.with_name(_HIGHEST + ".new")
        try:
            new.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the directory may have been removed
            with open(new, "w") as file:
                file.write(f"{number}\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._highest_path)
        except OSError as error:
            raise FileError(f"cannot write {self._highest_path}: {error.strerror}") from None

    def _take_lock(self) -> LockedFile:
        try:
            file = open_locked(self._lock_path)
        except FileError:
            raise
        except OSError as error:
            if has_no_locks(error):  # SQLite needs locks too
                raise no_locks_error(self.path.parent, error, "--state-dir") from None
            raise FileError(f"cannot lock {self._lock_path}: {error.strerror}") from None
        if file is None:
            raise FileError(f"{self.path}: another core uses it (give this one a --state-dir of its own)")
        return file

    def keep(self) -> bool:
        """Write catalogue, lock and highest_run again if they were removed, so that the next core finds the runs.

        Returns whether a file had been removed.
        """
        try:
            exists = os.path.samestat(self._file, os.lstat(self.path))
        except OSError:
            exists = False
        if exists and self._lock.in_place() and self._highest_path.exists():
            return False
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{self.path.parent}: {error.strerror}") from None
        if not self._lock.in_place():
            lock = self._take_lock()
            self._lock.close()
            self._lock = lock
        if not exists:
            if os.path.lexists(self.path):
                raise FileError(f"{self.path}: was replaced by another file")
            for ending in ("-wal", "-shm"):  # of the removed file
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            new = self._open()
            try:
                with self._errors():
                    self._db.backup(new)
            except FileError:
                new.close()
                self.path.unlink(missing_ok=True)
                raise
            self._db.close()
            self._db, self._file = new, os.stat(self.path)
        if not self._highest_path.exists():
            self._write_highest(self.highest)
        return True

    def _open(self) -> sqlite3.Connection:
        with self._errors():
            db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=FULL")
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version not in (*_OLD_SCHEMAS, _SCHEMA):
                    raise FileError(f"{self.path}: made by another larpix-daq (schema {version}, here {_SCHEMA})")
                db.executescript(_TABLES)
                for table, columns in _ADDED.items():
                    known = _column_names(db, table)
                    for column in columns:
                        if column not in known:
                            db.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")
                db.executescript(_INDEXES)
                for table in ("audit", "comments", "shifters", "attachments", "alarms"):
                    db.executescript(_APPENDED.format(table=table))
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
        """Close database and lock; a second call has no effect."""
        self._db.close()
        self._lock.close()

    def draw(self, highest: int) -> int:
        """Draw the number of a new run, above `highest`."""
        return highest + 1

    def save(self, run: Run, *, new: bool = False) -> None:
        """Write a run. With `new`, FileError if its number exists already."""
        details = msgspec.to_builtins(run)
        values = [details.pop(column) for column in _COLUMNS]
        values.append(json.dumps(details, separators=(",", ":")))
        if new and run.run > self.highest:
            self._write_highest(run.run)
            self.highest = run.run
        with self._errors():
            self._db.execute(
                f"INSERT {'' if new else 'OR REPLACE '}INTO runs ({','.join(_COLUMNS)},details) "
                f"VALUES ({','.join('?' * len(values))})",
                values,
            )

    def find(self, number: int | None = None) -> Run | None:
        """Return the run of this number, by default the last run; None if there is none."""
        what = "ORDER BY run DESC LIMIT 1" if number is None else "WHERE run = ?"
        with self._errors():
            query = f"SELECT {','.join(_COLUMNS)},details FROM runs {what}"
            row = self._db.execute(query, () if number is None else (number,)).fetchone()
        if row is None:
            return None
        try:
            return _run(row)
        except (TypeError, ValueError) as error:
            raise FileError(f"{self.path}: run {row[0]}: {error}") from None

    def add_file(self, storage: str, path: str, run: int, size: int, sha256: str, condition: str) -> bool:
        """Record a file that a storage has closed. Returns whether the file or its contents are new.

        The checksum may come later. It may be missing in a second report, after a restart of the storage.
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
        """List the closed files of a run: {"storage", "path", "bytes", "sha256", "condition", "time" (unix s)}."""
        with self._errors():
            return read_files(self._db, run)

    # The e-log

    def add_comment(self, run: int, text: str, author: Author) -> None:
        """Add a comment on a run. RequestError if the run would have more than MAX_COMMENTS, or more than
        MAX_COMMENT_BYTES of them."""
        with self._errors():
            # The length of a BLOB, because that of a text ends at a NUL.
            query = "SELECT count(*) + 1, coalesce(sum(length(CAST(text AS BLOB))), 0) FROM comments WHERE run = ?"
            number, length = self._db.execute(query, (run,)).fetchone()
            length += len(text.encode())
            if number > MAX_COMMENTS or length > MAX_COMMENT_BYTES:
                raise RequestError(
                    f"comment: run {run} would have {number} comments of {length} bytes, at most {MAX_COMMENTS} of "
                    f"{MAX_COMMENT_BYTES} bytes"
                )
        new, row = self._next_comment(), (run, time.time_ns(), text, *author)
        self._share_comment(new, row)
        self._insert_comment(new, row)

    def _next_comment(self) -> int:
        with self._errors():
            return int(self._db.execute("SELECT coalesce(max(rowid), 0) + 1 FROM comments").fetchone()[0])

    def _share_comment(self, number: int, row: Sequence[Any]) -> None:
        """Give a comment to other cores, before it is written here."""

    def _insert_comment(self, number: int, row: Sequence[Any]) -> None:
        with self._errors():
            self._db.execute(
                "INSERT INTO comments (rowid, run, time_ns, text, shifter, operator, key) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, *row),
            )

    def comments(self, run: int) -> list[dict[str, Any]]:
        """List the comments on a run, oldest first: {"time" (unix s), "by" (shifter), "operator", "key", "text"}."""
        with self._errors():
            return read_comments(self._db, run)

    def add_storage(self, storage: str) -> None:
        """Note that a storage gets all comments from now on, or from an earlier call on."""
        with self._errors():
            self._db.execute(
                "INSERT OR IGNORE INTO delivered SELECT ?, coalesce(max(rowid), 0) FROM comments", (storage,)
            )

    def undelivered(self, storage: str) -> list[tuple[int, Comment]]:
        """List up to 100 comments that this storage has not got yet, oldest first: (run, comment)."""
        with self._errors():
            query = (
                "SELECT run, rowid, time_ns, shifter, operator, text FROM comments WHERE rowid > "
                "(SELECT comment FROM delivered WHERE storage = ?) ORDER BY rowid LIMIT 100"
            )
            return [(run, Comment(*row)) for run, *row in self._db.execute(query, (storage,)).fetchall()]

    def note_delivered(self, storage: str, comment: int) -> None:
        """Note that a storage has all comments up to this id."""
        with self._errors():
            self._db.execute("UPDATE delivered SET comment = ? WHERE storage = ?", (comment, storage))

    def add_attachment(self, run: int, name: str, file: str, size: int, sha256: str, author: Author) -> None:
        """Add a file of `size` bytes that was attached to a run; see read_attachments()."""
        with self._errors():
            self._db.execute(
                "INSERT INTO attachments (run, time_ns, name, file, bytes, sha256, shifter, operator, key) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (run, time.time_ns(), name, file, size, sha256, *author),
            )

    def attachments(self, run: int) -> list[dict[str, Any]]:
        """List the attachments of a run, as read_attachments()."""
        with self._errors():
            return read_attachments(self._db, run)

    def set_shifter(self, author: Author) -> None:
        """Note who is on shift from now on; an empty name: nobody."""
        with self._errors():
            self._db.execute(
                "INSERT INTO shifters (time_ns, name, operator, key) VALUES (?, ?, ?, ?)", (time.time_ns(), *author)
            )

    def shifter(self) -> dict[str, Any]:
        """Return who is on shift: {"name", "since" (unix s)}; the name is empty when nobody is."""
        with self._errors():
            row = self._db.execute("SELECT name, time_ns FROM shifters ORDER BY id DESC LIMIT 1").fetchone()
        return {"name": row[0], "since": row[1] / 1e9} if row is not None else {"name": "", "since": 0.0}

    # Snapshots of the chips' configurations.

    def add_snapshot(self, name: str, asic: str, chips: int, comment: str, author: Author, data: bytes) -> None:
        """Add a snapshot (control/snapshots.py). RequestError if the name is in use, or there are MAX_SNAPSHOTS."""
        with self._errors():
            (count,) = self._db.execute("SELECT count(*) FROM snapshots").fetchone()
            if count >= MAX_SNAPSHOTS:
                raise RequestError(f"save_snapshot: there are {count} snapshots already: remove_snapshot(name)")
            try:
                self._db.execute(
                    "INSERT INTO snapshots (name, time_ns, asic, chips, comment, operator, key, data) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (name, time.time_ns(), asic, chips, comment, author.operator, author.key, data),
                )
            except sqlite3.IntegrityError:
                raise RequestError(f"save_snapshot: there is a snapshot {name!r} already") from None

    def snapshots(self) -> list[dict[str, Any]]:
        """List the snapshots, oldest first: {"name", "time" (unix s), "asic", "chips" (their number), "comment",
        "operator", "key"}."""
        names = ("name", "asic", "chips", "comment", "operator", "key")
        with self._errors():
            rows = self._db.execute(
                f"SELECT time_ns,{','.join(names)} FROM snapshots ORDER BY time_ns, name"
            ).fetchall()
        return [{**dict(zip(names, row[1:], strict=True)), "time": row[0] / 1e9} for row in rows]

    def snapshot(self, name: str) -> bytes:
        """Return the data of a snapshot. RequestError if there is none of this name."""
        with self._errors():
            row = self._db.execute("SELECT data FROM snapshots WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise RequestError(self._no_snapshot(name))
        return bytes(row[0])

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot. RequestError if there is none of this name."""
        with self._errors():
            removed = self._db.execute("DELETE FROM snapshots WHERE name = ?", (name,)).rowcount
        if not removed:
            raise RequestError(self._no_snapshot(name))

    def _no_snapshot(self, name: str) -> str:
        known = [snapshot["name"] for snapshot in self.snapshots()]
        return f"there is no snapshot {name!r}; {advice(name, known, 'there are')}"


def read_files(db: sqlite3.Connection, run: int) -> list[dict[str, Any]]:
    """List the closed files of a run, as Catalogue.files()."""
    query = "SELECT storage, path, bytes, sha256, condition, time_ns FROM files WHERE run = ? ORDER BY storage, path"
    names = ("storage", "path", "bytes", "sha256", "condition")
    return [{**dict(zip(names, row, strict=False)), "time": row[-1] / 1e9} for row in db.execute(query, (run,))]


def read_comments(db: sqlite3.Connection, run: int) -> list[dict[str, Any]]:
    """List the comments on a run, as Catalogue.comments()."""
    query = "SELECT time_ns, shifter, operator, key, text FROM comments WHERE run = ? ORDER BY rowid"
    names = ("by", "operator", "key", "text")
    return [{"time": row[0] / 1e9, **dict(zip(names, row[1:], strict=True))} for row in db.execute(query, (run,))]


def read_attachments(db: sqlite3.Connection, run: int) -> list[dict[str, Any]]:
    """List the attachments of a run, oldest first: {"time" (unix s), "name" (as it was given), "file" (its name in
    attachments_dir()), "bytes", "sha256", "by" (shifter), "operator", "key"}."""
    query = (
        "SELECT time_ns, name, file, bytes, sha256, shifter, operator, key FROM attachments WHERE run = ? ORDER BY id"
    )
    names = ("name", "file", "bytes", "sha256", "by", "operator", "key")
    return [{"time": row[0] / 1e9, **dict(zip(names, row[1:], strict=True))} for row in db.execute(query, (run,))]


def read_runs(db: sqlite3.Connection, numbers: Sequence[int]) -> list[Run]:
    """Read the runs of these numbers, the newest first. ValueError if the row of a run is damaged."""
    query = f"SELECT {','.join(_COLUMNS)},details FROM runs WHERE run IN ({','.join(map(str, numbers))})"
    runs = []
    for row in db.execute(f"{query} ORDER BY run DESC"):
        try:
            runs.append(_run(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"run {row[0]}: {error}") from None
    return runs


def open_for_reading(directory: Path) -> tuple[Path, sqlite3.Connection]:
    """Open the catalogue in a state directory for reading; a core may be writing it. Returns its path too.

    FileError if there is none, if it cannot be read, or if it is of another schema.
    """
    path = directory / _NAME
    check_regular(path)
    if not path.exists():
        raise FileError(f"{path}: there is no run catalogue")
    try:
        db = _read_only(path)
    except sqlite3.Error as error:
        raise FileError(f"{path}: {error}") from None
    try:
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        if schema not in (*_OLD_SCHEMAS, _SCHEMA):
            raise FileError(f"{path}: made by another larpix-daq (schema {schema}, here {_SCHEMA})")
        if schema != _SCHEMA:
            raise FileError(
                f"{path}: of an earlier version (schema {schema}, here {_SCHEMA}): a core of this version brings it up "
                "to date when it starts"
            )
    except sqlite3.Error as error:
        db.close()
        raise FileError(f"{path}: {error}") from None
    except BaseException:
        db.close()
        raise
    return path, db


def attachments_dir(directory: Path, run: int) -> Path:
    """Return the directory for the attachments of a run in a state directory."""
    return directory / "attachments" / f"{run:0{RUN_DIGITS}d}"


def append_audit(path: Path, rows: Sequence[AuditRow]) -> None:
    """Append rows to the audit of the catalogue at `path`, in any thread. FileError if they cannot be written."""
    _append(path, "audit", _AUDIT_COLUMNS, rows)


def append_alarms(path: Path, rows: Sequence[AlarmRow]) -> None:
    """Append rows to the history of alarms, as append_audit() does."""
    _append(path, "alarms", _ALARM_COLUMNS, rows)


def _append(path: Path, table: str, columns: Sequence[str], rows: Sequence[msgspec.Struct]) -> None:
    """Append rows to a table.

    The connection lasts for one call, because keep() may have replaced the file. It does not sync, so that the lock,
    for which save() may wait, is never held while a disk syncs: a crash of the host may lose the rows since the last
    step of a run.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                f"INSERT INTO {table} ({','.join(columns)}) VALUES ({','.join('?' * len(columns))})",
                map(msgspec.structs.astuple, rows),
            )
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise FileError(f"{path}: {error}") from None


def read_alarms(path: Path, since_ns: int = 0, limit: int = 1000) -> list[AlarmRow]:
    """Read the last `limit` rows of alarms from this time (unix ns) on, oldest first, in any thread. FileError if that
    is impossible."""
    query = "FROM alarms WHERE time_ns >= ? ORDER BY id DESC LIMIT ?"
    return _read_alarms(path, query, (since_ns, limit))[::-1]


def open_alarms(path: Path) -> tuple[list[AlarmRow], int]:
    """Read the last row of each open alarm, and the highest number of an alarm. FileError as read_alarms()."""
    highest = _read_alarms(path, "FROM alarms ORDER BY alarm DESC LIMIT 1", ())
    query = "FROM alarms WHERE id IN (SELECT max(id) FROM alarms GROUP BY alarm) AND event != 'cleared' ORDER BY alarm"
    return _read_alarms(path, query, ()), highest[0].alarm if highest else 0


def _read_alarms(path: Path, query: str, values: tuple[int, ...]) -> list[AlarmRow]:
    try:
        with closing(_read_only(path)) as db:
            rows = db.execute(f"SELECT {','.join(_ALARM_COLUMNS)} {query}", values).fetchall()
        return [msgspec.convert(dict(zip(_ALARM_COLUMNS, row, strict=True)), AlarmRow) for row in rows]
    except msgspec.ValidationError as error:
        raise FileError(f"{path}: alarms: {error}") from None
    except sqlite3.Error as error:
        raise FileError(f"{path}: {error}") from None


def read_audit(directory: Path, since_ns: int = 0) -> Iterator[AuditRow]:
    """Read the audit in a state directory, from this time (unix ns) on, while a core may be writing it.

    FileError if there is no catalogue, if it cannot be read, or if no core of this version has used it yet.
    """
    path = directory / _NAME
    check_regular(path)
    if not path.exists():
        raise FileError(f"{path}: there is no run catalogue")
    try:
        with closing(_read_only(path)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'audit'").fetchone():
                raise FileError(f"{path}: has no audit yet; it begins when a core of this version starts")
            query = (
                f"SELECT id,{','.join(_AUDIT_COLUMNS)} FROM audit WHERE id > ? AND time_ns >= ? ORDER BY id LIMIT 1000"
            )
            last = -1
            # In pieces, because SQLite's log grows as long as a query is open, such as behind a pager.
            while rows := db.execute(query, (last, since_ns)).fetchall():
                for row in rows:
                    last = row[0]
                    yield msgspec.convert(dict(zip(_AUDIT_COLUMNS, row[1:], strict=True)), AuditRow)
    except msgspec.ValidationError as error:
        raise FileError(f"{path}: audit, row {last}: {error}") from None
    except sqlite3.Error as error:
        raise FileError(f"{path}: {error}") from None


def _run(row: tuple[Any, ...]) -> Run:
    """Convert a row to a Run; TypeError or ValueError if the row is damaged."""
    try:
        return msgspec.convert(dict(zip(_COLUMNS, row, strict=False)) | json.loads(row[-1]), Run)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _column_names(db: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"PRAGMA table_info({table})")}


def _selection(db: sqlite3.Connection, table: str) -> str:
    """List the columns in _COPIED for a SELECT, with "" in place of those that a table of an older schema lacks."""
    known = _column_names(db, table) | {"rowid"}
    return ",".join(column if column in known else "''" for column in _COPIED[table].split(","))


def _read_only(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    db.text_factory = lambda text: text.decode("utf-8", "replace")
    return db


def _copy(damaged: Path, db: sqlite3.Connection) -> int:
    """Copy all readable rows, from both ends of each table. Returns the number of runs."""
    db.execute("BEGIN")
    with closing(_read_only(damaged)) as old:
        for table, columns in _COPIED.items():
            values = ",".join("?" * (columns.count(",") + 1))
            for order in ("ASC", "DESC"):
                with suppress(sqlite3.Error):
                    for row in old.execute(f"SELECT {_selection(old, table)} FROM {table} ORDER BY rowid {order}"):
                        with suppress(sqlite3.IntegrityError, TypeError, ValueError):
                            if table == "runs":
                                _run(row)
                            db.execute(f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({values})", row)
    db.execute("COMMIT")
    return int(db.execute("SELECT count(*) FROM runs").fetchone()[0])
