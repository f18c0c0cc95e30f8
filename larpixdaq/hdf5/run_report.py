"""A whole run of one storage, judged over all its parts: from their small tables alone. No row is read but those of
blocks that stand in two directories.

One closed part of a run, by its small tables alone: no row is read.

Where a storage stands: what it has of each source, over all parts and journals in its directory.

A run whose storage lost its name to another one, which went on in another directory.

The part of the first one says `superseded from`: what it holds, its successor may hold too, since it cannot know which
of its last acknowledgements counted. What both have counts once, in the successor's part.

What a file holds, in short, without reading its rows.
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
from larpixdaq.constants import RunCondition, unusable, worst
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import journal, ledger, names, tables
from larpixdaq.hdf5.reader import DataFile, row_dict, text
from larpixdaq.protocol.reports import StoredEnd, StoredRows
from larpixdaq.protocol.stream import READ, SENT, BlockOrigin, Position
from larpixdaq.runtime.units import utc_datetime

#: The name of the text that a part gets whose storage lost its name to another one (superseded.py).
SUPERSEDED: Final = "superseded from"


class RunReport(NamedTuple):
    run: int
    files: list[Path]  # those that are closed, in the order of the parts
    condition: str
    rows: int
    stored: list[StoredRows]
    reasons: list[str]  # why the condition is not COMPLETE, in one line each
    ends: list[StoredEnd]
    notes: list[str]  # what a reader should know though nothing is wrong


def survey_run(directory: Path, run: int, label: str = "") -> RunReport:
    """The run as it is in a directory, of the storage with this label. Nothing is raised but FileError, when the
    directory cannot be read; what is wrong with files is among the reasons."""
    return judge_run(run, [path for *_, path in names.files_of_storage(directory, label, run)], whole=True)


def judge_run(run: int, paths: Iterable[Path], *, whole: bool) -> RunReport:
    """Some parts of a run; `whole`: there are no others. Otherwise parts before and behind these are not missed."""
    parts, waiting = [], []
    for path in paths:
        if not path.name.endswith(names.FINISHED):
            if path.name.endswith(names.PART) or not path.with_name(_stem(path) + names.PART).exists():
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


def _stem(path: Path) -> str:
    return path.name.removesuffix(names.JOURNAL)


class _Judgement:
    def __init__(self, run: int, parts: Sequence[Part], waiting: list[str], whole: bool) -> None:
        self._run = run
        self._parts = parts
        self._waiting = waiting  # totals unknown, or rows owed
        self._missing: list[str] = []
        self._notes: list[str] = []
        self._whole = whole
        self._ends = {source: (part, *end) for part in parts for source, end in part.ends.items()}
        self._sources = dict.fromkeys(source for part in parts for source in part.positions)
        self._open = [source for source in self._sources if source not in self._ends]
        self._stored: defaultdict[tuple[BlockOrigin, int], int] = defaultdict(int)
        self._dropped: defaultdict[tuple[BlockOrigin, int], int] = defaultdict(int)
        for part in parts:
            for key, counts in part.counts.items():
                self._stored[key] += counts["stored"]
                self._dropped[key] += counts["dropped"] if counts["how"] == ledger.OPEN else 0

    def report(self) -> RunReport:
        self._which_parts()
        for source in self._sources:
            self._blocks(source)
        self._totals()
        self._missing += [line for part in self._parts for line in part.damaged]
        doubts = list(dict.fromkeys(line for part in self._parts for line in part.doubts))
        return RunReport(
            self._run,
            [part.path for part in self._parts],
            self._condition(doubts),
            sum(part.rows for part in self._parts),
            [StoredRows(*source[1:], group, rows) for (source, group), rows in self._stored.items() if rows],
            self._waiting + self._missing + doubts,
            [
                StoredEnd(source.producer, source.epoch, following, how, self._made(source, part))
                for source, (part, following, how) in self._ends.items()
            ],
            self._notes,
        )

    def _condition(self, doubts: list[str]) -> RunCondition:
        conditions = [part.condition for part in self._parts]
        found = {
            RunCondition.ABORTED: RunCondition.ABORTED in conditions,
            RunCondition.INTERRUPTED: self._waiting,
            RunCondition.INCOMPLETE: self._missing,
            RunCondition.CONTINUED: self._notes and conditions[-1] == RunCondition.CONTINUED,
            RunCondition.SUSPECT: doubts or RunCondition.SUSPECT in conditions,
        }
        return worst(found)

    def _which_parts(self) -> None:
        """Are parts missing, and has everybody ended who should?"""
        numbers = [part.number for part in self._parts]
        absent = sorted(set(range(0 if self._whole else min(numbers, default=0), max(numbers, default=0))) - {*numbers})
        if absent or not (numbers or self._waiting):
            self._missing.append(f"part {', '.join(map(str, absent or [0]))} of run {self._run} is not there")
        self._missing += [f"there are two parts {n} of it" for n in sorted(set(numbers)) if numbers.count(n) > 1]
        goes_on = bool(self._parts) and self._parts[-1].condition == RunCondition.CONTINUED and not self._whole
        for source in self._open:
            if goes_on:
                self._notes.append(f"{describe_part(source)}: continues in the next file")
            elif not self._early(source) or self._span(source):
                self._waiting.append(f"{describe_part(source)}: no end record, totals unknown")
        came = {source.producer for source in self._sources}
        required = dict.fromkeys(name for part in self._parts for name in part.required)
        lacking = [f"producer {name!r}: no data came, totals unknown" for name in required if name not in came]
        (self._notes if goes_on else self._waiting).extend(lacking)

    def _early(self, source: BlockOrigin) -> bool:
        """Whether it began in a part that is not among these."""
        return self._parts[0].number > 0 and self._parts[0].positions.get(source, (0, 0))[0] > 0

    def _span(self, source: BlockOrigin) -> list[tuple[int, int]]:
        """Which sequences of blocks are stored: stretches (first, behind the last), sorted."""
        found = []
        for part in self._parts:
            at, stop = part.positions.get(source, (0, 0))
            if source in part.ends:
                stop = part.ends[source][0]
            for whose, first, following in sorted(part.missing):
                if whose == source:
                    found.append((at, first))
                    at = following
            found.append((at, stop))
        return sorted((first, stop) for first, stop in found if first < stop)

    def _blocks(self, source: BlockOrigin) -> None:
        """Each block must be in exactly one part."""
        spans = self._span(source)
        at = self._parts[0].positions[source][0] if self._early(source) else 0
        end = self._ends[source][1] if source in self._ends else at
        for first, stop in [*spans, (max(end, *(stop for _, stop in spans), at), 0)]:
            if first > at:
                self._missing.append(f"{describe_part(source)}: blocks {at} to {first - 1} are in no part")
            elif stop and first < at:
                twice = min(at, stop)
                self._missing.append(f"{describe_part(source)}: blocks {first} to {twice - 1} are in two parts")
            at = max(at, stop)

    def _totals(self) -> None:
        """Equation (d), of each io_group over all parts."""
        for key in dict.fromkeys((*self._stored, *self._dropped)):
            source, group = key
            where = f"{describe_part(source)}, io_group {group}"
            counts = dict.fromkeys(constants.COUNTS, 0) | {"dropped": self._dropped[key], "owed": 0}
            if source in self._ends:
                counts = self._ends[source][0].counts.get(key, counts)
            if counts["owed"]:
                self._waiting.append(f"{where}: {counts['owed']} rows are still pending")
            if counts["dropped"]:
                self._missing.append(f"{where}: {counts['dropped']} rows dropped, because ring and spool were full")
            line = ledger.owing(counts, self._stored[key], counts["owed"])
            if line and source in self._ends and not self._early(source):
                self._missing.append(f"{where}: {line}")
            if line := unusable(counts):
                self._missing.append(f"{where}: {line}")

    def _made(self, source: BlockOrigin, part: Part) -> int:
        return sum(ledger.made(counts) for (whose, _), counts in part.counts.items() if whose == source)


class Part(NamedTuple):
    """What the tables of one part say."""

    path: Path
    number: int
    opened_ns: int  # unix ns
    superseded: bool  # another storage of its name went on, in another directory
    condition: str
    rows: int
    required: list[str]
    positions: dict[BlockOrigin, tuple[int, int]]  # first, next
    ends: dict[BlockOrigin, tuple[int, str]]  # next, how
    counts: dict[tuple[BlockOrigin, int], dict[str, Any]]
    missing: list[tuple[BlockOrigin, int, int]]
    doubts: list[str]
    damaged: list[str]


def read_part(path: Path) -> Part:
    """FileError when it cannot be read, or is none of ours."""
    with DataFile(path) as file:
        if not file.own:
            raise FileError(f"{path}: has no /run, so it is none of ours")
        info, texts, producers = file.run_info(), file.texts(), file.producers()
        run = int(info["run"])

        def rows(name: str) -> Iterable[tuple[BlockOrigin, dict[str, Any]]]:
            return ((file.origin(row, producers, run), row_dict(row)) for row in file.table(name))

        return Part(
            path=path,
            number=info["part"],
            opened_ns=info["opened_ns"],
            superseded=SUPERSEDED in texts,
            condition=info["condition"],
            rows=info["rows"],
            required=texts.get("required producer", []),
            positions={source: (row["first"], row["next"]) for source, row in rows("run/positions")},
            ends={source: (row["next"], row["how"]) for source, row in rows("run/ends")},
            counts={(source, row["io_group"]): row for source, row in rows("ledger/counts")},
            missing=[(source, row["first"], row["next"]) for source, row in rows("run/missing")],
            doubts=[
                f"{describe_part(source)}, io_group {row['io_group']}: {row['verdict']}: {row['why']}"
                for source, row in rows("ledger/verdicts")
                if row["verdict"] != "complete"
            ],
            damaged=[f"{path.name}: {line}" for line in texts.get("damaged", [])],
        )


def describe_part(source: BlockOrigin) -> str:
    return f"producer {source.producer!r}, epoch {source.epoch:x}"


def unfinished(directory: Path, storage: str | None = None) -> list[int]:
    """The runs that may go on: those with a part or a journal, and the newest. FileError as of positions().

    storage: only the files of this one count; None: those of all.

    The others are closed: to open them all at every start would take a minute for 10,000 files. What a producer still
    holds of one of them has to be looked up when it comes.
    """
    files = _files(directory, storage)
    going = {run for run, ending, _ in files if ending != names.FINISHED}
    return sorted(going | {max((run for run, _, _ in files), default=0)} - {0})


def _files(directory: Path, storage: str | None, run: int | None = None) -> list[tuple[int, str, Path]]:
    if storage is None:
        return names.run_files(directory, run)
    return [(number, ending, path) for number, _, ending, path in names.files_of_storage(directory, storage, run)]


def positions(
    directory: Path, run: int | None = None, warnings: list[str] | None = None, storage: str | None = None
) -> list[Position]:
    """The next sequence of each source, of one run or of all, that no file in the directory holds.

    storage: only the files of this one count, since those of others are copies; None: those of all.

    A source whose end is there stands one behind the sequence that its end names. Files that cannot be read are left
    out, and a line about each goes to `warnings`. FileError when the directory itself cannot be read.
    """
    next_of: dict[BlockOrigin, int] = {}
    for number, ending, path in _files(directory, storage, run):
        try:
            found = _journal(path) if ending == names.JOURNAL else positions_of_file(path, number)
        except FileError as error:
            # What vanishes meanwhile are journal and part of a run that was just closed: the finished file has it all.
            if path.exists() and warnings is not None:
                warnings.append(str(error))
            continue
        for source, value in found.items():
            next_of[source] = max(value, next_of.get(source, 0))
    return [Position(source.run, source.producer, source.epoch, value) for source, value in next_of.items()]


def _journal(path: Path) -> dict[BlockOrigin, int]:
    found: dict[BlockOrigin, int] = {}
    contents = journal.read(path)
    for record in contents.records:
        source = record.frame.source
        found[source] = max(record.frame.following, found.get(source, 0))
    if not found and contents.damaged:
        raise FileError(f"{path}: holds no whole record")
    return found


def positions_of_file(path: Path, number: int) -> dict[BlockOrigin, int]:
    """The same of one file, which holds this run."""
    found: dict[BlockOrigin, int] = {}
    with DataFile(path) as file:
        if not file.own:
            raise FileError(f"{path}: has no /run, so it is none of ours")
        producers = file.producers()
        for name, column in (("run/blocks", "sequence"), ("run/ends", "next")):
            for start in range(0, file.length(name), 65_536):
                rows = file.table(name, start, start + 65_536)
                for row in np.unique(rows[["producer", "epoch"]]):
                    mine = (rows["producer"] == row["producer"]) & (rows["epoch"] == row["epoch"])
                    source = file.origin(row, producers, number)
                    found[source] = max(int(rows[column][mine].max()) + 1, found.get(source, 0))
    return found


def join_superseded(parts: Sequence[Part]) -> list[Part]:
    """The parts of a run as if one storage had written them all, one behind the other; as they are when none was
    superseded, or when they stand in one directory. FileError when a part cannot be read."""
    left = {part.path.parent for part in parts if part.superseded}
    homes: dict[Path, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.number):
        homes.setdefault(part.path.parent, []).append(part)
    if not left or len(homes) == 1:
        return list(parts)
    order = sorted(homes, key=lambda home: (home not in left, homes[home][0].opened_ns))
    found: list[Part] = []
    for home in order:
        first = found[-1].number + 1 if found else 0
        found += [part._replace(number=first + part.number) for part in homes[home]]
    return _without_copies(found, left)


def _without_copies(parts: list[Part], left: set[Path]) -> list[Part]:
    """Blocks of parts in these directories that later parts have too are taken out, as if they had never come."""
    there: set[tuple[BlockOrigin, int]] = set()
    found: list[Part] = []
    for part in reversed(parts):
        with DataFile(part.path) as file:
            blocks = list(_blocks(file))
            if part.path.parent in left:
                copies = [(key, row) for key, row in blocks if key in there]
                part = _without(part, file, copies) if copies else part
        there |= {key for key, _ in blocks}
        found.append(part)
    return sorted(found, key=lambda part: part.number)


def _blocks(file: DataFile) -> Iterator[tuple[tuple[BlockOrigin, int], Any]]:
    producers, run = file.producers(), int(file.run_info()["run"])
    for row in file.table("run/blocks"):
        yield (file.origin(row, producers, run), int(row["sequence"])), row


def _without(part: Part, file: DataFile, copies: list[tuple[tuple[BlockOrigin, int], Any]]) -> Part:
    counts = {key: dict(line) for key, line in part.counts.items()}
    rows = 0
    for (source, _), block in copies:
        first, n = int(block["first_row"]), int(block["rows"])
        tally = ledger.new_tally()
        if file.layout is not None:
            hdf5_chunks.tally(file.packets(first, first + n).view(np.uint8), file.layout.code, tally)
        stored = ledger.stored(tally)
        for group in np.flatnonzero(stored).tolist():
            if (source, group) in counts:
                counts[source, group]["stored"] -= int(stored[group])
        rows += n
    missing = [*part.missing, *_stretches(sorted(key for key, _ in copies))]
    return part._replace(rows=part.rows - rows, counts=counts, missing=missing)


def _stretches(keys: list[tuple[BlockOrigin, int]]) -> Iterator[tuple[BlockOrigin, int, int]]:
    """(source, first, behind the last) of sorted blocks."""
    first = keys[0]
    for before, after in pairwise([*keys, (keys[-1][0], -1)]):
        if after != (before[0], before[1] + 1):
            yield first[0], first[1], before[1] + 1
            first = after


def file_info(path: Path | str) -> dict[str, Any]:
    """A summary that json can write; times are UTC in ISO 8601, with `_ns` in unix ns.

    FileError when the file cannot be read.
    """
    with DataFile(path) as file:
        found: dict[str, Any] = {
            "path": str(file.path),
            "bytes": file.path.stat().st_size,
            "version": file.version,
            "layout": file.layout.name if file.layout else None,
            "rows": file.rows,
            "row_bytes": file.dtype.itemsize,
            "stored_bytes": file.stored_bytes,
            "created": _time(float(file.attribute("_header", "created"))),
            "modified": _time(float(file.attribute("_header", "modified"))),
            "own": file.own,
        }
        if file.own:
            found |= _run(file)
        return found


def _run(file: DataFile) -> dict[str, Any]:
    row = file.run_info()
    texts = file.texts()
    number = int(row["run"])
    producers = file.producers()
    counts = []
    for line in file.table("ledger/counts"):
        counts.append(row_dict(line) | {"producer": file.origin(line, producers, number).producer})
    total = {name: sum(int(line[name]) for line in counts) for name in (*constants.COUNTS, "owed")}
    verdicts = [
        row_dict(line) | {"producer": file.origin(line, producers, number).producer}
        for line in file.table("ledger/verdicts")
    ]
    gaps = file.table("ledger/gaps")
    chips = tables.newest_configurations(file.table("run/configs"))
    return {
        "run": number,
        "part": row["part"],
        "condition": row["condition"],
        "reasons": texts.pop("reason", []),
        "required_producers": list(dict.fromkeys(texts.pop("required producer", []))),
        "started": _time(row["started_ns"] / 1e9),
        "opened": _time(row["opened_ns"] / 1e9),
        "closed": _time(row["closed_ns"] / 1e9) if row["closed_ns"] else None,
        "started_ns": row["started_ns"],
        "closed_ns": row["closed_ns"],
        "begun": _time(row["begun_ns"] / 1e9) if row["begun_ns"] else None,
        "begun_ns": row["begun_ns"],
        "ended": _time(row["ended_ns"] / 1e9) if row["ended_ns"] else None,
        "ended_ns": row["ended_ns"],
        "live_s": row["live_ns"] / 1e9,
        "connected": [msgspec.to_builtins(one) for one in file.connected()],
        "duplicate_blocks": row["duplicate_blocks"],
        "missing_blocks": row["missing_blocks"],
        "blocks": file.length("run/blocks"),
        "texts": {name: values[-1] for name, values in texts.items()},
        "producers": producers,
        "messages": [text(line["message"]) for line in file.table("messages", 0, 100)],
        "ledger": counts,
        "totals": total | {"made": ledger.made(total)},
        "verdicts": verdicts,
        "gaps": {"rows": int(gaps["rows"].sum()), "number": len(gaps)},
        "chips": {
            "number": len(chips),
            "sent": int(np.count_nonzero(chips["known"] & SENT)),
            "read": int(np.count_nonzero(chips["known"] & READ)),
            "different": int(chips["different"].sum()),
        },
        "unknown_words_kept": file.length("ledger/unknown"),
    }


def _time(seconds: float) -> str:
    try:
        return utc_datetime(seconds).isoformat(timespec="seconds")
    except ValueError as error:
        raise FileError(str(error)) from None
