"""Judge a whole run of one storage over all its parts, find its positions in a directory, and summarise a file.

All of this reads the small tables of closed parts, and no rows, with one exception: a storage that lost its name to
another one left a part with the text `superseded from`. Its successor in another directory may have the same blocks,
because the first storage cannot know which of its last acknowledgements arrived. Blocks that both have count once, in
the successor's part, so that their rows are subtracted from the first one's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from larpixdaq import constants
from larpixdaq._native import hdf5_chunks
from larpixdaq.constants import RunCondition, worst
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import journal, ledger, names, tables
from larpixdaq.hdf5.layout import E_LOG
from larpixdaq.hdf5.ledger import describe_group, describe_origin
from larpixdaq.hdf5.reader import DataFile, comments, text
from larpixdaq.protocol.packed_rows import new_tally
from larpixdaq.protocol.reports import StoredEnd, StoredRows, StoredTotals
from larpixdaq.protocol.stream import READ, SENT, BlockOrigin
from larpixdaq.runtime.units import utc_datetime

#: Name of the text in a part whose storage lost its name to another one.
SUPERSEDED: Final = "superseded from"


class RunReport(NamedTuple):
    """Judgement of a run over its parts."""

    run: int
    files: list[Path]  # closed parts, in order
    condition: str
    rows: int
    stored: list[StoredRows]
    reasons: list[str]  # why the condition is not COMPLETE, in one line each
    ends: list[StoredEnd]
    notes: list[str]  # facts that are no fault
    totals: Sequence[StoredTotals] = ()


def survey_run(directory: Path, run: int, label: str = "") -> RunReport:
    """Judge a run by all files in a directory of the storage with this label.

    Faults of files are among the reasons. FileError only when the directory cannot be read.
    """
    return judge_run(run, [path for *_, path in names.files_of_storage(directory, label, run)], whole=True)


def judge_run(run: int, paths: Iterable[Path], *, whole: bool) -> RunReport:
    """Judge a run by some of its files. `whole`: there are no others; otherwise earlier and later parts may exist."""
    parts, waiting = [], []
    for path in paths:
        if not path.name.endswith(names.FINISHED):
            if path.name.endswith(names.PART) or not _part_of(path).exists():
                waiting.append(f"{path.name} is not closed")
            continue
        try:
            parts.append(read_part(path))
        except FileError as error:
            waiting.append(str(error))
    try:
        parts = join_superseded(parts)
    except FileError as error:
        waiting.append(str(error))
    parts.sort(key=lambda part: (part.number, part.path.name))
    return _Judgement(run, parts, waiting, whole).report()


def _part_of(journal: Path) -> Path:
    return journal.with_name(journal.name.removesuffix(names.JOURNAL) + names.PART)


class _Judgement:
    """Checks the tables of all parts against each other."""

    def __init__(self, run: int, parts: Sequence[Part], waiting: list[str], whole: bool) -> None:
        self._run = run
        self._parts = parts
        self._waiting = waiting  # totals unknown, or rows owed
        self._missing: list[str] = []
        self._notes: list[str] = []
        self._whole = whole
        self._ends = {origin: (part, *end) for part in parts for origin, end in part.ends.items()}
        self._origins = dict.fromkeys(origin for part in parts for origin in part.positions)
        self._open = [origin for origin in self._origins if origin not in self._ends]
        self._stored: defaultdict[tuple[BlockOrigin, int], int] = defaultdict(int)
        self._dropped: defaultdict[tuple[BlockOrigin, int], int] = defaultdict(int)
        for part in parts:
            for key, counts in part.counts.items():
                self._stored[key] += counts["stored"]
                self._dropped[key] += counts["dropped"] if counts["how"] == ledger.OPEN else 0

    def report(self) -> RunReport:
        self._check_parts()
        for origin in self._origins:
            self._check_blocks(origin)
        self._check_totals()
        self._missing += [line for part in self._parts for line in part.damaged]
        verdict_lines = list(dict.fromkeys(line for part in self._parts for line in part.verdict_lines))
        return RunReport(
            self._run,
            [part.path for part in self._parts],
            self._condition(verdict_lines),
            sum(part.rows for part in self._parts),
            [StoredRows(*origin[1:], group, rows) for (origin, group), rows in self._stored.items() if rows],
            self._waiting + self._missing + verdict_lines,
            [
                StoredEnd(origin.producer, origin.epoch, following, how, self._made_rows(origin, part))
                for origin, (part, following, how) in self._ends.items()
            ],
            self._notes,
            [
                StoredTotals(origin.producer, origin.epoch, self._counts(origin, part))
                for origin, (part, *_) in self._ends.items()
            ],
        )

    def _counts(self, origin: BlockOrigin, part: Part) -> list[list[int]]:
        return [
            [group, *(int(counts[name]) for name in constants.COUNTS)]
            for (key, group), counts in part.counts.items()
            if key == origin
        ]

    def _condition(self, verdict_lines: list[str]) -> RunCondition:
        conditions = [part.condition for part in self._parts]
        found = {
            RunCondition.ABORTED: RunCondition.ABORTED in conditions,
            RunCondition.INTERRUPTED: self._waiting,
            RunCondition.INCOMPLETE: self._missing,
            RunCondition.CONTINUED: self._notes and conditions[-1] == RunCondition.CONTINUED,
            RunCondition.SUSPECT: verdict_lines or RunCondition.SUSPECT in conditions,
        }
        return worst(found)

    def _check_parts(self) -> None:
        """Check that all parts are there, and that all origins have ended."""
        numbers = [part.number for part in self._parts]
        absent = sorted(set(range(0 if self._whole else min(numbers, default=0), max(numbers, default=0))) - {*numbers})
        if absent or not (numbers or self._waiting):
            self._missing.append(f"part {', '.join(map(str, absent or [0]))} of run {self._run} is not there")
        self._missing += [f"there are two parts {n} of it" for n in sorted(set(numbers)) if numbers.count(n) > 1]
        continued = bool(self._parts) and self._parts[-1].condition == RunCondition.CONTINUED and not self._whole
        for origin in self._open:
            if continued:
                self._notes.append(f"{describe_origin(origin)}: continues in the next file")
            elif not self._began_earlier(origin) or self._stretches(origin):
                self._waiting.append(f"{describe_origin(origin)}: no end record, totals unknown")
        producers = {origin.producer for origin in self._origins}
        required = dict.fromkeys(name for part in self._parts for name in part.required)
        absent_producers = [name for name in required if name not in producers]
        lines = [f"producer {name!r}: no data came, totals unknown" for name in absent_producers]
        (self._notes if continued else self._waiting).extend(lines)

    def _began_earlier(self, origin: BlockOrigin) -> bool:
        """Whether an origin began in an earlier part that is not among these."""
        return self._parts[0].number > 0 and self._parts[0].positions.get(origin, (0, 0))[0] > 0

    def _stretches(self, origin: BlockOrigin) -> list[tuple[int, int]]:
        """Return the stored stretches (first sequence, sequence after the last) of an origin, sorted."""
        stretches = []
        for part in self._parts:
            start, stop = part.positions.get(origin, (0, 0))
            if origin in part.ends:
                stop = part.ends[origin][0]
            for missing_origin, first, following in sorted(part.missing):
                if missing_origin == origin:
                    stretches.append((start, first))
                    start = following
            stretches.append((start, stop))
        return sorted((first, stop) for first, stop in stretches if first < stop)

    def _check_blocks(self, origin: BlockOrigin) -> None:
        """Check that each block of an origin is in exactly one part."""
        stretches = self._stretches(origin)
        expected = self._parts[0].positions[origin][0] if self._began_earlier(origin) else 0
        end = self._ends[origin][1] if origin in self._ends else expected
        for first, stop in [*stretches, (max(end, *(stop for _, stop in stretches), expected), 0)]:
            if first > expected:
                self._missing.append(f"{describe_origin(origin)}: blocks {expected} to {first - 1} are in no part")
            elif stop and first < expected:
                last = min(expected, stop) - 1
                self._missing.append(f"{describe_origin(origin)}: blocks {first} to {last} are in two parts")
            expected = max(expected, stop)

    def _check_totals(self) -> None:
        """Check equation (d) of the ledger for each io_group, over all parts."""
        for key in dict.fromkeys((*self._stored, *self._dropped)):
            origin, group = key
            where = describe_group(origin, group)
            counts = dict.fromkeys(constants.COUNTS, 0) | {"dropped": self._dropped[key], "owed": 0}
            if origin in self._ends:
                counts = self._ends[origin][0].counts.get(key, counts)
            if counts["owed"]:
                self._waiting.append(f"{where}: {counts['owed']} rows are still pending")
            balanced = origin in self._ends and not self._began_earlier(origin)
            self._missing += ledger.missing_rows(where, counts, self._stored[key], balanced=balanced)

    def _made_rows(self, origin: BlockOrigin, part: Part) -> int:
        return sum(ledger.rows_made(counts) for (key, _), counts in part.counts.items() if key == origin)


class Part(NamedTuple):
    """Content of the small tables of one closed part."""

    path: Path
    number: int
    opened_ns: int  # unix ns
    superseded: bool  # another storage took over its name, in another directory
    condition: str
    rows: int
    required: list[str]  # producers
    positions: dict[BlockOrigin, tuple[int, int]]  # first, next
    ends: dict[BlockOrigin, tuple[int, str]]  # next, how
    counts: dict[tuple[BlockOrigin, int], dict[str, Any]]
    missing: list[tuple[BlockOrigin, int, int]]
    verdict_lines: list[str]
    damaged: list[str]


def read_part(path: Path) -> Part:
    """Read the small tables of a part. FileError when it cannot be read, or larpix-daq did not write it."""
    with DataFile(path, own=True) as file:
        info, texts, rows = file.run_info(), file.texts(), file.rows_by_origin
        return Part(
            path=path,
            number=info["part"],
            opened_ns=info["opened_ns"],
            superseded=SUPERSEDED in texts,
            condition=info["condition"],
            rows=info["rows"],
            required=texts.get("required producer", []),
            positions={origin: (row["first"], row["next"]) for origin, row in rows("run/positions")},
            ends={origin: (row["next"], row["how"]) for origin, row in rows("run/ends")},
            counts={(origin, row["io_group"]): row for origin, row in rows("ledger/counts")},
            missing=[(origin, row["first"], row["next"]) for origin, row in rows("run/missing")],
            verdict_lines=verdict_lines(file),
            damaged=[f"{path.name}: {line}" for line in texts.get("damaged", [])],
        )


def verdict_lines(file: DataFile) -> list[str]:
    """Return one line for each verdict in a file that is not "complete"."""
    return ledger.verdict_lines(
        (origin, row["io_group"], row["verdict"], row["why"]) for origin, row in file.rows_by_origin("ledger/verdicts")
    )


def join_superseded(parts: Sequence[Part]) -> list[Part]:
    """Renumber the parts of a superseded storage and its successors as if one storage had written them all.

    Parts are unchanged when none was superseded, or when all are in one directory. FileError when a part is unreadable.
    """
    superseded = {part.path.parent for part in parts if part.superseded}
    directories: dict[Path, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.number):
        directories.setdefault(part.path.parent, []).append(part)
    if not superseded or len(directories) == 1:
        return list(parts)
    joined: list[Part] = []
    for directory in sorted(directories, key=lambda path: (path not in superseded, directories[path][0].opened_ns)):
        first = joined[-1].number + 1 if joined else 0
        joined += [part._replace(number=first + part.number) for part in directories[directory]]
    return _without_copies(joined, superseded)


def _without_copies(parts: list[Part], superseded: set[Path]) -> list[Part]:
    """Subtract from the parts in superseded directories all blocks that later parts have too."""
    known: set[tuple[BlockOrigin, int]] = set()
    reduced: list[Part] = []
    for part in reversed(parts):
        with DataFile(part.path) as file:
            blocks = list(_blocks(file))
            if part.path.parent in superseded:
                copies = [(key, row) for key, row in blocks if key in known]
                part = _without_blocks(part, file, copies) if copies else part
        known |= {key for key, _ in blocks}
        reduced.append(part)
    return reduced[::-1]


def _blocks(file: DataFile) -> Iterator[tuple[tuple[BlockOrigin, int], Any]]:
    """Read /run/blocks: (origin, sequence) and row of each block."""
    for row in file.table("run/blocks"):
        yield (file.origin(row), int(row["sequence"])), row


def _without_blocks(part: Part, file: DataFile, blocks: list[tuple[tuple[BlockOrigin, int], Any]]) -> Part:
    """Subtract blocks, with the counts of their rows, from a part; they become missing there."""
    counts = {key: dict(line) for key, line in part.counts.items()}
    rows = 0
    for (origin, _), block in blocks:
        first, n = int(block["first_row"]), int(block["rows"])
        tally = new_tally()
        if file.layout is not None:
            hdf5_chunks.tally(file.packets(first, first + n).view(np.uint8), file.layout.code, tally)
        stored = ledger.stored_rows(tally)
        for group in np.flatnonzero(stored).tolist():
            if (origin, group) in counts:
                counts[origin, group]["stored"] -= int(stored[group])
        rows += n
    missing = [*part.missing, *_missing_stretches(sorted(key for key, _ in blocks))]
    return part._replace(rows=part.rows - rows, counts=counts, missing=missing)


def _missing_stretches(keys: list[tuple[BlockOrigin, int]]) -> Iterator[tuple[BlockOrigin, int, int]]:
    """Join sorted blocks to stretches (origin, first sequence, sequence after the last)."""
    first = keys[0]
    for key, following in pairwise([*keys, (keys[-1][0], -1)]):
        if following != (key[0], key[1] + 1):
            yield first[0], first[1], key[1] + 1
            first = following


def continuable_runs(directory: Path, storage: str = "") -> list[int]:
    """List the runs of a storage that may continue: those with a part or a journal, and the newest run.

    `storage`: its label. FileError when the directory cannot be read.

    The other runs are closed. Their files are not opened, because that takes a minute for 10,000 files at every start;
    their positions are read when a producer sends blocks of them.
    """
    files = names.files_of_storage(directory, storage)
    runs = {run for run, _, ending, _ in files if ending != names.FINISHED}
    return sorted((runs | {run for run, *_ in files[-1:]}) - {0})


def positions(
    directory: Path, run: int | None = None, warnings: list[str] | None = None, storage: str = ""
) -> dict[BlockOrigin, int]:
    """Return the next expected sequence of each origin, of one run or of all, over a storage's files in a directory.

    `storage`: its label; files of other storages are copies. The position of an origin with an end record is one after
    the end. Files that cannot be read are left out, with a line for each in `warnings`. FileError when the directory
    cannot be read.
    """
    next_of: dict[BlockOrigin, int] = {}
    for number, _, ending, path in names.files_of_storage(directory, storage, run):
        try:
            found = _positions_of_journal(path) if ending == names.JOURNAL else positions_of_file(path, number)
        except FileError as error:
            # Journal and part vanish when a run is closed meanwhile: the finished file has all of their content.
            if path.exists() and warnings is not None:
                warnings.append(str(error))
            continue
        for origin, value in found.items():
            next_of[origin] = max(value, next_of.get(origin, 0))
    return next_of


def positions_of_file(path: Path, run: int) -> dict[BlockOrigin, int]:
    """Return the next expected sequence of each origin in one file of this run. FileError as of read_part()."""
    found: dict[BlockOrigin, int] = {}
    with DataFile(path, own=True, unfinished=True) as file:
        for name, column in (("run/blocks", "sequence"), ("run/ends", "next")):
            for start in range(0, file.length(name), 65_536):
                rows = file.table(name, start, start + 65_536)
                for row in np.unique(rows[["producer", "epoch"]]):
                    selected = (rows["producer"] == row["producer"]) & (rows["epoch"] == row["epoch"])
                    origin = file.origin(row, run)
                    found[origin] = max(int(rows[column][selected].max()) + 1, found.get(origin, 0))
    return found


def _positions_of_journal(path: Path) -> dict[BlockOrigin, int]:
    found: dict[BlockOrigin, int] = {}
    contents = journal.read(path)
    for record in contents.records:
        origin = record.frame.origin
        found[origin] = max(record.frame.following, found.get(origin, 0))
    if not found and contents.damaged:
        raise FileError(f"{path}: holds no whole record")
    return found


def file_info(path: Path | str) -> dict[str, Any]:
    """Summarise a file without reading its rows, for JSON. Times are UTC in ISO 8601, those named `_ns` unix ns.

    FileError when the file cannot be read.
    """
    with DataFile(path) as file:
        facts: dict[str, Any] = {
            "path": str(file.path),
            "bytes": file.path.stat().st_size,
            "version": file.version,
            "layout": file.layout.name if file.layout else None,
            "rows": file.rows,
            "row_bytes": file.dtype.itemsize,
            "stored_bytes": file.stored_bytes,
            "created": _utc(float(file.attribute("_header", "created"))),
            "modified": _utc(float(file.attribute("_header", "modified"))),
            "own": file.own,
        }
        if file.own:
            facts |= _run_facts(file)
        return facts


def _run_facts(file: DataFile) -> dict[str, Any]:
    row = file.run_info()
    texts = file.texts()
    e_log = comments(texts)
    texts.pop(E_LOG, None)

    def lines(name: str) -> list[dict[str, Any]]:
        """Rows of a table with the name of the producer in place of its index."""
        return [line | {"producer": origin.producer} for origin, line in file.rows_by_origin(name)]

    counts = lines("ledger/counts")
    total = {name: sum(int(line[name]) for line in counts) for name in (*constants.COUNTS, "owed")}
    gaps = file.table("ledger/gaps")
    chips = tables.newest_configurations(file.table("run/configs"))
    return {
        "run": file.run,
        "part": row["part"],
        "condition": row["condition"],
        "reasons": texts.pop("reason", []),
        "required_producers": list(dict.fromkeys(texts.pop("required producer", []))),
        "started": _utc(row["started_ns"] / 1e9),
        "opened": _utc(row["opened_ns"] / 1e9),
        "closed": _utc(row["closed_ns"] / 1e9) if row["closed_ns"] else None,
        "started_ns": row["started_ns"],
        "closed_ns": row["closed_ns"],
        "begun": _utc(row["begun_ns"] / 1e9) if row["begun_ns"] else None,
        "begun_ns": row["begun_ns"],
        "ended": _utc(row["ended_ns"] / 1e9) if row["ended_ns"] else None,
        "ended_ns": row["ended_ns"],
        "live_s": row["live_ns"] / 1e9,
        "connected": [msgspec.to_builtins(board) for board in file.connected()],
        "comments": [msgspec.to_builtins(comment) for comment in e_log],
        "duplicate_blocks": row["duplicate_blocks"],
        "missing_blocks": row["missing_blocks"],
        "blocks": file.length("run/blocks"),
        "texts": {name: values[-1] for name, values in texts.items()},
        "producers": file.producers,
        "messages": [text(line["message"]) for line in file.table("messages", 0, 100)],
        "ledger": counts,
        "totals": total | {"made": ledger.rows_made(total)},
        "verdicts": lines("ledger/verdicts"),
        "gaps": {"rows": int(gaps["rows"].sum()), "number": len(gaps)},
        "chips": {
            "number": len(chips),
            "sent": int(np.count_nonzero(chips["known"] & SENT)),
            "read": int(np.count_nonzero(chips["known"] & READ)),
            "different": int(chips["different"].sum()),
        },
        "unknown_words_kept": file.length("ledger/unknown"),
    }


def _utc(seconds: float) -> str:
    try:
        return utc_datetime(seconds).isoformat(timespec="seconds")
    except ValueError as error:
        raise FileError(str(error)) from None
