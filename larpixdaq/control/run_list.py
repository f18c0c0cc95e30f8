"""The runs of the catalogue for `larpixdaq runs`: selected, described, and as text, while a core may be writing.

Nothing here imports numpy or ZeroMQ, so that the command starts fast.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.constants import COUNTS, RunCondition
from larpixdaq.control.catalogue import (
    Run,
    attachments_dir,
    open_for_reading,
    read_attachments,
    read_comments,
    read_files,
    read_runs,
)
from larpixdaq.errors import FileError, printable
from larpixdaq.runtime.units import duration, size, utc

#: Number of runs that are read at once, because SQLite's log grows as long as a query is open.
_PIECE: Final = 200
#: Characters of a comment in the list of runs.
_COMMENT_SHOWN: Final = 60
_FOREVER: Final = 2**63 - 1


class Selection(NamedTuple):
    """Which runs are wanted. Times are those of prepare_run, unix ns. `condition`: as in RunCondition; "": any.

    `comment`: a text in the run's comment, or in a comment of the e-log. `by`: a text in the name of a shifter or an
    Operator of the run, or of a comment on it. Upper and lower case are the same.

    `words`: each is in one of these texts, in kind or condition, or is the run's number. `before`: only lower numbers.
    """

    since_ns: int = 0
    until_ns: int = _FOREVER
    condition: str = ""
    kind: str = ""
    comment: str = ""
    by: str = ""
    words: Sequence[str] = ()
    before: int = _FOREVER

    def query(self) -> tuple[str, list[Any]]:
        """Return a query for the numbers of the runs, the newest first, and its values."""
        conditions: list[str] = ["1"]
        values: list[Any] = []
        if (self.since_ns, self.until_ns) != (0, _FOREVER):
            conditions.append("prepared_ns BETWEEN ? AND ?")
            values += [self.since_ns, self.until_ns]
        for column in ("condition", "kind"):
            if text := getattr(self, column):
                conditions.append(f"{column} = ?")
                values.append(text)
        if self.comment:
            in_run, in_log = _contains("comment", self.comment), _contains("text", self.comment)
            conditions.append(f"({in_run} OR run IN (SELECT run FROM comments WHERE {in_log}))")
            values += [_pattern(self.comment)] * 2
        if self.by:
            names = f"({_contains('shifter', self.by)} OR {_contains('operator', self.by)})"
            conditions.append(f"({names} OR run IN (SELECT run FROM comments WHERE {names}))")
            values += [_pattern(self.by)] * 4
        for word in self.words:
            texts = ("comment", "kind", "condition", "shifter", "operator")
            in_run = " OR ".join(_contains(column, word) for column in texts)
            in_log = " OR ".join(_contains(column, word) for column in ("text", "shifter", "operator"))
            conditions.append(f"({in_run} OR run IN (SELECT run FROM comments WHERE {in_log}) OR run = ?)")
            values += [_pattern(word)] * 8 + [int(word) if word.isdecimal() and len(word) < 10 else -1]
        if self.before != _FOREVER:
            conditions.append("run < ?")
            values.append(self.before)
        return f"SELECT run FROM runs WHERE {' AND '.join(conditions)} ORDER BY run DESC", values


def _contains(column: str, text: str) -> str:
    """Return the condition that a column contains a text. SQLite itself knows the cases of ASCII letters alone."""
    return f"{column} LIKE ? ESCAPE '!'" if text.isascii() else f"contains({column}, ?)"


def _pattern(text: str) -> str:
    if not text.isascii():
        return text.casefold()
    return f"%{''.join(f'!{letter}' if letter in '!%_' else letter for letter in text)}%"


class RunList:
    """The catalogue in a state directory, opened for reading. All methods raise FileError if it cannot be read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path, self._db = open_for_reading(directory)
        self._db.create_function("contains", 2, lambda text, wanted: wanted in text.casefold(), deterministic=True)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise FileError(f"{self.path}: {error}") from None

    def select(self, selection: Selection, most: int) -> list[int]:
        """Return the numbers of the selected runs, at most `most`, the newest first."""
        query, values = selection.query()
        with self._errors():
            return [number for (number,) in self._db.execute(f"{query} LIMIT ?", (*values, most))]

    def runs(self, numbers: Sequence[int]) -> Iterator[Run]:
        """Yield the runs of these numbers, which are in descending order."""
        for start in range(0, len(numbers), _PIECE):
            with self._errors():
                found = read_runs(self._db, numbers[start : start + _PIECE])
            yield from found

    def find(self, number: int) -> Run:
        """Return one run. FileError if there is none of this number."""
        for run in self.runs([number]):
            return run
        raise FileError(f"{self.path}: there is no run {number}")

    def kinds(self) -> list[str]:
        """Return the kinds of all runs."""
        with self._errors():
            return [kind for (kind,) in self._db.execute("SELECT DISTINCT kind FROM runs ORDER BY kind")]

    def describe(self, run: Run) -> dict[str, Any]:
        """Return all that the catalogue has of a run, for JSON: the fields of Run, `length_s`, `file_details`,
        `comments`, `attachments`, `ledger`."""
        with self._errors():
            attachments = read_attachments(self._db, run.run)
            for attachment in attachments:
                attachment["path"] = str(attachments_dir(self._directory, run.run) / attachment.pop("file"))
            facts: dict[str, Any] = msgspec.to_builtins(run)
            return facts | {
                "length_s": length(run),
                "file_details": read_files(self._db, run.run),
                "comments": read_comments(self._db, run.run),
                "attachments": attachments,
                "ledger": _ledger(run),
            }

    def comment_counts(self, numbers: Sequence[int]) -> dict[int, int]:
        """Return the number of comments on each of these runs, which are in descending order, that has any."""
        query = "SELECT run, count(*) FROM comments WHERE run BETWEEN ? AND ? GROUP BY run"
        with self._errors():
            return dict(self._db.execute(query, (numbers[-1], numbers[0])).fetchall()) if numbers else {}


def length(run: Run) -> float | None:
    """Return for how many seconds the state was RUN; None before the begin, and while the run goes on."""
    stopped = run.stopped_ns or run.ended_ns
    return None if run.begun_ns is None or stopped is None else (stopped - run.begun_ns) / 1e9


def _ledger(run: Run) -> list[dict[str, Any]]:
    """Return the producers' counters of each epoch and io_group, as in /ledger/counts.

    Those of a process that has ended in the middle of the run, or was killed, are from a storage's end record.
    """
    totals = {(end.name, end.epoch): end.counts for end in run.ends}
    for report in run.reports.values():
        for producer, epoch, counts in report.totals:
            totals.setdefault((producer, epoch), counts)
    return [
        {"producer": producer, "epoch": epoch, "io_group": line[0], **dict(zip(COUNTS, line[1:], strict=True))}
        for (producer, epoch), counts in totals.items()
        for line in counts
        if len(line) == 1 + len(COUNTS)
    ]


# Text


def list_lines(runs: Sequence[tuple[Run, int]]) -> list[str]:
    """Return the table of runs, each with the number of comments on it."""
    rows = [("run", "condition", "kind", "begun", "length", "rows stored", "comment")]
    rows += [
        (
            str(run.run),
            run.condition if run.is_over else f"{run.condition} ({run.phase})",
            run.kind,
            utc(run.begun_ns / 1e9).removesuffix(" UTC") if run.begun_ns is not None else "not begun",
            _length_text(run),
            _count(run.stored) if run.is_over else "not known yet",
            _summary(run, comments),
        )
        for run, comments in runs
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    right = (True, False, False, False, True, True)
    return [
        "  ".join(
            [cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=False)]
            + [row[-1]]
        ).rstrip()
        for row in rows
    ]


def _summary(run: Run, comments: int) -> str:
    text = printable(run.comment)
    if len(text) > _COMMENT_SHOWN:
        text = f"{text[:_COMMENT_SHOWN]}…"
    number = f"[{comments} comment{'s' if comments > 1 else ''}]" if comments else ""
    return " ".join(part for part in (text, number) if part)


def _length_text(run: Run) -> str:
    seconds = length(run)
    return "" if seconds is None else duration(seconds)


def _count(number: int | None) -> str:
    return "not known" if number is None else str(number)


def run_lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what RunList.describe() returns as name and text; further lines of a name have an empty name."""
    yield "run", f"{facts['run']} ({facts['kind']})"
    over = facts["condition"] != RunCondition.RUNNING
    yield (
        "condition",
        facts["condition"] if over else f"{facts['condition']} ({facts['phase']}), as the core last wrote",
    )
    yield from listed("", facts["reasons"])
    for name, key in (("comment", "comment"), ("operator", "operator"), ("shifter", "shifter")):
        if facts[key]:
            yield name, facts[key]
    for name in ("prepared", "begun", "stopped", "ended"):
        if (ns := facts[f"{name}_ns"]) is not None:
            yield name, utc(ns / 1e9)
    if facts["length_s"] is not None:
        yield "length", f"{facts['length_s']:.1f} s"
    if over:
        yield "rows", f"{_count(facts['rows'])} made by the producers, {_count(facts['stored'])} stored"
    yield from listed("boards", [board_line(board) for board in facts["connected"]])
    yield from listed("producers", [_producer(name, epochs) for name, epochs in facts["producers"].items()])
    yield from listed("storages", facts["storages"])
    yield from listed("files", [_file(file) for file in facts["file_details"]])
    known = {file["path"] for file in facts["file_details"]}
    yield from listed("" if known else "files", [file for file in facts["files"] if file not in known])
    yield from listed("totals", [*_lacking(facts), *(_totals(line) for line in _sums(facts["ledger"]))])
    if facts["versions"]:
        yield "versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield from listed("e-log", [_comment(comment) for comment in facts["comments"]])
    yield from listed("attachments", [_attachment(attachment) for attachment in facts["attachments"]])


def listed(name: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield texts, the first with a name and the others without."""
    for index, text in enumerate(texts):
        yield "" if index else name, text


def _producer(name: str, epochs: list[int]) -> str:
    return name if len(epochs) == 1 else f"{name}, {len(epochs)} processes one after the other"


def board_line(board: dict[str, Any]) -> str:
    """Return a board that was connected at the begin of a run as one line."""
    address = f" {board['address']}" if board["address"] else ""
    firmware = f", firmware {board['firmware']}" if board["firmware"] else ""
    where = f"{board['producer']}, io_group {board['io_group']}"
    return f"{where}: {board['kind']}{address}, read on {board['host']}{firmware}"


def _file(file: dict[str, Any]) -> str:
    checksum = f", sha256 {file['sha256']}" if file["sha256"] else ", no checksum yet"
    return f"{file['path']}, {size(file['bytes'])}, {file['condition']}, {file['storage']}{checksum}"


def _lacking(facts: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each producer of whose processes some have left their counters in the files alone."""
    known = {(line["producer"], line["epoch"]) for line in facts["ledger"]}
    for name, epochs in facts["producers"].items():
        if lacking := sum((name, epoch) not in known for epoch in epochs):
            yield f"without those of {lacking} of {len(epochs)} processes of {name}, which are in the files alone"


def _sums(ledger: list[dict[str, Any]]) -> list[tuple[str, Counter[str]]]:
    """Add up the counters of each io_group, over all epochs of its producers, and of all io_groups."""
    sums: dict[str, Counter[str]] = {}
    for line in ledger:
        counts = {name: line[name] for name in COUNTS}
        for key in ("all", f"{line['producer']}, io_group {line['io_group']}"):
            sums.setdefault(key, Counter()).update(counts)
    return list(sums.items())


def _totals(line: tuple[str, Counter[str]]) -> str:
    where, counts = line
    return f"{where}: " + ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items() if number)


def _author(entry: dict[str, Any]) -> str:
    names = [entry["by"], entry["operator"]] if entry["by"] else [entry["operator"]]
    key = entry["key"]
    return f"{', '.join(names)}{f', key {key}' if key and key not in names else ''}"


def _comment(comment: dict[str, Any]) -> str:
    return f"{utc(comment['time'])}, {_author(comment)}: {comment['text']}"


def _attachment(attachment: dict[str, Any]) -> str:
    path = Path(attachment["path"])
    try:
        found = path.stat().st_size
    except OSError:
        state = ", THE FILE IS GONE"
    else:
        state = "" if found == attachment["bytes"] else f", THE FILE HAS {found} BYTES NOW"
    what = f"{path}, {size(attachment['bytes'])}, sha256 {attachment['sha256']}{state}"
    return f"{utc(attachment['time'])}, {_author(attachment)}: {what}"
