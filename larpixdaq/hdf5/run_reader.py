"""Read a whole run, finished or growing: `open_run("run0000042_20261122T071251Z_000.h5")` or `open_run(42)`.

The rows of a run are those of its parts, one part after the other, as part_reader.py reads them: a row that was read
keeps its number and its content while the run grows, and after a recovery.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants
from larpixdaq.constants import RunCondition
from larpixdaq.errors import FileError, FormatError
from larpixdaq.hdf5 import ledger, names, run_report, tables
from larpixdaq.hdf5.part_reader import InfoLine, Part, is_unmade, open_part
from larpixdaq.hdf5.reader import PIECE_ROWS, DataFile, comments, may_be_written, text
from larpixdaq.hdf5.row_reader import EVERYTHING, THREADS, Columns, Selection, in_order
from larpixdaq.hdf5.run_report import RunReport
from larpixdaq.hdf5.tables import RunInfo
from larpixdaq.protocol.reports import Comment
from larpixdaq.protocol.stream import READ, SENT, BlockOrigin, ConnectedBoard
from larpixdaq.runtime.units import parse_since
from larpixdaq.schema import key_of

#: Maximum number of parts that stay open.
_OPEN_PARTS: Final = 32
#: Seconds between two looks at a growing run.
POLL: Final = 0.2
_BLOCK_COLUMNS: Final = ("epoch", "sequence", "first_row", "rows", "first_ns", "last_ns")
#: Conditions of a run whose storage may continue in another part.
_UNFINISHED: Final = (RunCondition.RUNNING, RunCondition.CONTINUED, RunCondition.INTERRUPTED)
Time = float | str | datetime
Chip = str | tuple[int, int, int]


class LedgerLine(NamedTuple):
    """Counts of one io_group of a producer, from its end record. `stored`: rows in all parts.

    `how`: kind of the end record; "open" without one: then only packets, bad_parity, dropped and stored are known.
    """

    producer: str
    epoch: int
    io_group: int
    how: str
    counts: dict[str, int]  # columns of /ledger/counts from `owed` on

    @property
    def stored(self) -> int:
        return self.counts["stored"]


class Verdict(NamedTuple):
    """Judgement on the data of an io_group before they reached the producer: complete, suspect or lost.

    `lost`: minimum number of lost packets, 0: unknown. Times: unix ns, by the clock of the producer's host.
    """

    producer: str
    epoch: int
    io_group: int
    verdict: str
    why: str
    lost: int
    first_ns: int
    last_ns: int


class Gap(NamedTuple):
    """Rows of an io_group that were counted, and found no room in the producer's ring and spool. Times: unix ns."""

    producer: str
    epoch: int
    sequence: int  # of the block, or end, before which the rows are missing
    io_group: int
    rows: int
    first_ns: int
    last_ns: int


class ChipConfiguration(NamedTuple):
    """Registers of a chip: register -> value. `time_ns`: unix ns, by the clock of the producer's host."""

    chip: str  # key, such as "1-2-11"
    asic: str  # generation, as in --asic
    producer: str
    time_ns: int
    sent: dict[int, int]
    read: dict[int, int]

    @property
    def values(self) -> dict[int, int]:
        """The value that was sent to each register, or read where none was sent."""
        return self.read | self.sent

    @property
    def different(self) -> dict[int, tuple[int, int]]:
        """Registers that have another value than was sent: the value sent, and the value read."""
        both = sorted(self.sent.keys() & self.read.keys())
        return {i: (self.sent[i], self.read[i]) for i in both if self.sent[i] != self.read[i]}


class Block(NamedTuple):
    """Rows that a producer sent together. `first_row`: in the run. Times: unix ns, by the clock of its host."""

    producer: str
    epoch: int
    sequence: int
    first_row: int
    rows: int
    first_ns: int
    last_ns: int


def open_run(
    source: int | str | os.PathLike[str],
    *,
    directory: str | os.PathLike[str] = ".",
    storage: str | None = None,
    parts: bool = True,
    missing_ok: bool = False,
) -> Run:
    """Open a run for reading, by its number, or by one of its files.

    source: run number; or a file, of which all other parts in the same directory are read too; or a directory with the
    files of a single run. Files of other programs in the layouts of LArPix+HDF5 are read too, each alone.
    directory: where the files of a run number are.
    storage: label of the storage whose files are read ("" for the first or only one). None: that with the best copy,
    by condition, then by rows.
    parts: False reads the given file alone.
    missing_ok: also read a run of which parts are missing in the middle; Run.missing_parts has their numbers.

    FileError, of one line, if there is no such run or file, or if it cannot be read.
    """
    if isinstance(source, bool | float):
        raise FormatError(f"run {source!r}: expected a run number, or the path of a file")
    if isinstance(source, int | np.integer):
        return Run(_of_number(Path(directory), int(source), storage), missing_ok=missing_ok)
    path = Path(source)
    if not os.fspath(source):
        raise FileError("expected a path, found an empty text")
    if os.path.isdir(path):  # Path.is_dir() raises for a name that is too long
        runs = sorted({run for run, *_ in names.run_files(path)})
        if len(runs) != 1:
            found = f"runs {', '.join(map(str, runs[:10]))}{', …' if runs[10:] else ''}" if runs else "no file of a run"
            raise FileError(f"{path} has {found}, expected the files of one run: give a run number and directory=")
        return Run(_of_number(path, runs[0], storage), missing_ok=missing_ok)
    if path.name.endswith(names.RAW):
        packets = path.name.removesuffix(names.RAW) + names.FINISHED
        raise FileError(f"{path}: has board messages, not rows: open the packet file {packets}")
    if path.name.endswith(names.JOURNAL):
        path = path.with_name(path.name.removesuffix(names.JOURNAL) + names.PART)
    return Run(_of_file(path, parts, storage), missing_ok=missing_ok)


def follow_parts(path: Path, selection: Selection = EVERYTHING, patience: float = 15.0) -> Iterator[PartRows | None]:
    """Read the rows of a growing run, part by part, until it ends; None between two looks.

    path: one of its files, whose part is the first one, or a directory, of whose newest run all parts are read.
    selection: of it first row, counted from the begin of the first part, and times count.
    patience: seconds to wait for a part that is being made, for the recovery of a part, and for the next part.

    FileError if a file cannot be read, if the storage has died and none recovers its part, or if there is no such run.
    """
    deadline = time.monotonic() + patience
    run: Run | None = None
    while run is None:
        listing = _newest(path)
        try:
            run = Run(listing, missing_ok=True)
        except FileError:
            last = [*listing.files.values()][-1:]
            if (last and _ending(last[0]) == names.FINISHED) or time.monotonic() > deadline:
                raise
            yield None
            time.sleep(POLL)
    with run:
        yield from run.follow_parts(selection, patience)


class _Listing(NamedTuple):
    """Where the parts of a run are. `key`: run, start (unix ns) and label; None: `files` are not named by a run."""

    directory: Path
    key: tuple[int, int, str] | None
    files: dict[int, Path]  # by the number of the part
    first: int = 0  # part before which none is listed


def _list_parts(
    directory: Path, key: tuple[int, int, str], files: Iterable[Path] | None = None, first: int = 0
) -> _Listing:
    """List the parts of a run and storage: the finished file, or else the part being written, or its journal alone."""
    found: dict[int, Path] = {}
    order = (names.FINISHED, names.PART, names.JOURNAL)
    listed = [path for *_, path in names.run_files(directory, key[0])] if files is None else files
    for path in listed:
        name = names.parse(path.name)
        if name is None or (name.run, name.started_ns, name.storage) != key or name.part < first:
            continue
        other = found.get(name.part)
        if other is None or order.index(name.ending) < order.index(_ending(other)):
            found[name.part] = path
    return _Listing(directory, key, dict(sorted(found.items())), first)


def _newest(path: Path) -> _Listing:
    """List the parts of the newest run in a directory, or of the run of a file, from the part of this file on."""
    if not os.path.isdir(path):
        name, directory = names.parse(path.name), path.parent
        if name is None:
            raise FileError(f"{path}: not the name of a file of a run, whose further parts could be followed")
    else:
        newest, directory = names.highest_run(path), path
        found = [name for *_, file in names.run_files(path, newest) if (name := names.parse(file.name)) is not None]
        if not found:
            raise FileError(f"{path}: holds no file of a run")
        name = min(found, key=lambda name: (name.storage, -name.started_ns, name.part))
    return _list_parts(directory, (name.run, name.started_ns, name.storage), first=name.part)


def _ending(path: Path) -> str:
    name = names.parse(path.name)
    assert name is not None
    return name.ending


def _of_number(directory: Path, run: int, storage: str | None) -> _Listing:
    if not 0 <= run <= constants.LAST_RUN:
        raise FileError(f"run {run}: expected a number from 1 to {constants.LAST_RUN}")
    files = [path for *_, path in names.run_files(directory, run)]
    keys = {(name.run, name.started_ns, name.storage) for path in files if (name := names.parse(path.name))}
    label = None if storage is None else names.label(storage)
    chosen = sorted(key for key in keys if label is None or key[2] == label)
    if not chosen:
        known = ", ".join(repr(label) for *_, label in sorted(keys))
        asked = f" of storage {storage!r}, only of {known}" if known else ""
        raise FileError(f"run {run}: {directory} has no file of it{asked}")
    if len({started for _, started, _ in chosen}) > 1:
        starts = ", ".join(sorted({path.name.split("_")[1] for path in files if names.parse(path.name)}))
        raise FileError(f"run {run}: {directory} has files of several runs with this number ({starts}): name a file")
    listings = [_list_parts(directory, key, files) for key in chosen]
    return max(listings, key=_worth) if len(listings) > 1 else listings[0]


def _worth(listing: _Listing) -> tuple[int, int, bool]:
    """Return what a storage's copy of a run is worth, for comparisons: condition, rows, and whether it has no label."""
    assert listing.key is not None
    order = list(RunCondition)
    report = run_report.judge_run(listing.key[0], listing.files.values(), whole=True)
    return -order.index(RunCondition(report.condition)), report.rows, not listing.key[2]


def _of_file(path: Path, parts: bool, storage: str | None) -> _Listing:
    directory = path.parent
    name = names.parse(path.name) or (_first_name(path) if parts else None)
    if name is None or not parts:
        return _Listing(directory, None, {name.part if name else 0: path})
    if storage is not None and names.label(storage) != name.storage:
        raise FileError(f"{path}: is of storage {name.storage!r}, asked for is storage {storage!r}")
    listing = _list_parts(directory, (name.run, name.started_ns, name.storage))
    if name.part not in listing.files:
        raise FileError(f"cannot open {path}: there is no such file")
    return listing


def _first_name(path: Path) -> names.FileName | None:
    """Return the name of a run file in the same directory of which `path` is a second name; None if there is none."""
    with DataFile(path) as file:
        if not file.own:
            return None
        run, part, storage = file.run, file.run_info()["part"], (file.texts().get("storage") or [""])[-1]
    for _, number, _, other in names.files_of_storage(path.parent, storage, run):
        if number == part and other.exists() and other.samefile(path):
            return names.parse(other.name)
    return None


class _Task(NamedTuple):
    """Stretches of rows of a part, which are read at once. `first`: the part's first row in the run."""

    part: Part
    first: int
    stretches: list[tuple[int, int]]


class PartRows(NamedTuple):
    """Rows of a part. `first`: number of the first one in the part."""

    part: Part
    first: int
    rows: NDArray[Any]


class Run:
    """A run that is read: see open_run(). Close it, or use it with `with`. Not for several threads at a time.

    `dtype`: of its rows; `version`: of LArPix+HDF5; `own`: whether larpix-daq wrote it. Without that there is no more
    than the rows, and the lists below are empty. `missing_parts`: numbers of parts that are not there.
    """

    def __init__(self, listing: _Listing, *, missing_ok: bool = False) -> None:
        self._listing = listing
        self._missing_ok = missing_ok
        self._parts: OrderedDict[int, Part] = OrderedDict()  # open ones, the last used last
        self._rows: dict[int, int] = {}  # number -> rows of finished parts
        self.missing_parts: list[int] = []
        self._set_files(listing.files)
        first = self._part(next(iter(self._files))).file
        self.dtype, self.version, self.own, self.layout = first.dtype, first.version, first.own, first.layout
        self._part(next(reversed(self._files)))

    def _set_files(self, files: dict[int, Path]) -> None:
        """Take over a list of parts. FileError if one is missing between others."""
        self._files = {
            number: path
            for number, path in files.items()
            if not path.name.endswith(names.JOURNAL) and (number < max(files) or not is_unmade(path))
        }
        for number in [number for number, part in self._parts.items() if number not in self._files or part.is_replaced]:
            del self._parts[number]
        if not self._files:
            only = f" but {', '.join(path.name for path in files.values())}, without rows" if files else ""
            raise FileError(
                f"{self._listing.directory} has no file of this run{only}: larpixdaq recover looks for them"
            )
        self.missing_parts = sorted({*range(min(files), max(self._files))} - {*self._files})
        if self.missing_parts and not self._missing_ok:
            missing, last = ", ".join(map(str, self.missing_parts)), max(self._files)
            raise FileError(
                f"{self._files[last]}: part {missing} of 0 to {last} of this run is missing beside it: give"
                " missing_ok=True to read the others"
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        name = f"run {self.number}" if self.own else str(self.files[0])
        return f"<{name}: {len(self._files)} files, {'growing' if self.is_growing else 'finished'}>"

    def close(self) -> None:
        for part in self._parts.values():
            part.file.close()
        self._parts.clear()

    # Parts

    def _part(self, number: int) -> Part:
        """Return a part, opened if need be. FileError if it is of another run, or has other columns than the first."""
        part = self._parts.pop(number, None)
        if part is None:
            part = open_part(number, self._files[number])
            self._check(part)
            final = [number for number, old in self._parts.items() if old.is_final and old.has_final_name]
            for other in final[:-_OPEN_PARTS]:
                del self._parts[other]
        self._parts[number] = part
        if part.is_final:
            self._rows[number] = part.rows
        return part

    def _check(self, part: Part) -> None:
        file, key = part.file, self._listing.key
        if key is not None and part.is_described and (not file.own or file.run != key[0]):
            found = f"run {file.run}" if file.own else "no run: larpix-daq did not write it"
            raise FileError(f"{part.path}: expected run {key[0]}, by its name, found {found}")
        if self._parts and file.dtype != self.dtype:
            raise FileError(f"{part.path}: has other columns than {self.files[0]}")

    def _visible(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, first row in the run, and rows of each part, up to the first one that grows."""
        base = 0
        for number in self._files:
            rows = self._rows.get(number)
            if rows is None:
                part = self._part(number)
                rows = part.rows
            yield number, base, rows
            base += rows
            if number not in self._rows and self._parts[number].is_growing:
                return  # rows may come that precede those of the next part

    def refresh(self) -> None:
        """See what was added to a growing run since it was opened, or since the last call."""
        vars(self).pop("report", None)
        key, known = self._listing.key, 0
        # Again after a new part, because it is made before the previous one is finished.
        while known < len(self._files):
            known = len(self._files)
            if key is not None:
                self._set_files(_list_parts(self._listing.directory, key, first=self._listing.first).files)
            for number in self._files:
                part = self._parts.get(number)
                if number not in self._rows or (part is not None and not part.has_final_name):
                    part = self._part(number)
                    part.refresh()
                    self._check(part)
                    self._part(number)  # notes its rows if it is final now

    @property
    def files(self) -> list[Path]:
        """The files of the parts, in order."""
        return [self._parts[number].path if number in self._parts else path for number, path in self._files.items()]

    @property
    def is_growing(self) -> bool:
        """Whether a part is being written, or has not been given its final name, as far as refresh() has seen."""
        return any(part.is_growing for part in self._parts.values())

    @property
    def rows(self) -> int:
        """Number of rows of all parts that are there. Opens each part once."""
        return sum(rows for _, _, rows in self._visible())

    def __len__(self) -> int:
        return self.rows

    # Rows

    def chunks(
        self,
        columns: str | Sequence[str] | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        io_group: int | Iterable[int] | None = None,
        io_channel: int | Iterable[int] | None = None,
        chip: Chip | Iterable[Chip] | None = None,
        channel: int | Iterable[int] | None = None,
        packet_type: int | str | Iterable[int | str] | None = None,
        begin: Time | None = None,
        end: Time | None = None,
        rows: int = PIECE_ROWS,
        threads: int = THREADS,
    ) -> Iterator[NDArray[Any]]:
        """Read the selected rows in order, in arrays of at most `rows` rows, the next ones in threads meanwhile.

        columns: names, in the order of the result; "row" is the number of a row in the run. A single text: arrays of
        this column, not of rows. None: all columns of the file.
        start, stop: row numbers as of a slice, negative ones from the end.
        io_group, io_channel, channel: numbers. packet_type: numbers, or names: data, test, config write, config read,
        timestamp, message, sync, trigger. chip: keys such as "1-2-11" or (1, 2, 11). Each may be one or several. Rows
        of types 4 to 7 have no io_channel and no chip, and rows of types 2 to 7 no channel.
        begin, end: time of arrival, as unix s, datetime (without zone: UTC), UTC text such as "2026-11-22T07:12:51", or
        "5min" ago. Whole blocks are read that arrived in this time, at least in part; blocks() has their times.

        A growing run is read as it was at the last refresh(). FormatError for an impossible argument; FileError, during
        the iteration, for damage, with the place.
        """
        selection = Selection.of(io_group, io_channel, chip, channel, packet_type)._replace(
            start=int(start),
            stop=None if stop is None else int(stop),
            begin_ns=_ns("begin", begin, -math.inf),
            end_ns=_ns("end", end, math.inf),
        )
        return self.selected(selection, columns, rows=rows, threads=threads)

    def selected(
        self,
        selection: Selection,
        columns: str | Sequence[str] | None = None,
        *,
        rows: int = PIECE_ROWS,
        threads: int = THREADS,
    ) -> Generator[NDArray[Any], None, None]:
        """Read rows as chunks() does."""
        wanted = Columns(self.dtype, columns)
        chosen = selection.row_filter(self.dtype, self.files[0])
        if rows < 1 or threads < 1:
            raise FormatError(f"rows {rows}, threads {threads}: expected at least 1")
        tasks = self._tasks(selection, rows)

        def read(task: _Task) -> NDArray[Any]:
            return task.part.read(task.stretches, wanted, chosen, task.first)

        def pieces() -> Generator[NDArray[Any], None, None]:
            for _, found in in_order(read, tasks, threads):
                for low in range(0, len(found), rows):
                    yield found[low : low + rows]

        return pieces()

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self.chunks()

    def read(self, columns: str | Sequence[str] | None = None, **selection: Any) -> NDArray[Any]:
        """Read all selected rows at once, into memory. Arguments as of chunks()."""
        found = list(self.chunks(columns, **selection))
        return np.concatenate([Columns(self.dtype, columns).empty(), *found]) if len(found) != 1 else found[0]

    def follow(
        self, columns: str | Sequence[str] | None = None, *, start: int = 0, patience: float = 10.0, **selection: Any
    ) -> Iterator[NDArray[Any]]:
        """Read the selected rows from row `start` on, as chunks() does, and wait for further ones until the run ends.

        patience: seconds to wait for the next part of a run whose storage has died.
        """
        for low, high in self._looks(start, patience):
            yield from self.chunks(columns, start=low, stop=high, **selection)

    def part_rows(self, selection: Selection) -> Iterator[PartRows]:
        """Read the rows that a selection allows by their numbers and their time, with the part that they are in."""
        columns = Columns(self.dtype)
        for part, _, stretches in self._tasks(selection, PIECE_ROWS):
            for stretch in stretches:
                yield PartRows(part, stretch[0], part.read([stretch], columns))

    def follow_parts(self, selection: Selection, patience: float) -> Iterator[PartRows | None]:
        """As part_rows(), until the run ends; None after each look. FileError if the run does not end."""
        for first, stop in self._looks(selection.start, patience):
            yield from self.part_rows(selection._replace(start=first, stop=stop))
            yield None
        if self._last_condition in _UNFINISHED:
            last = self._last
            if not last.has_final_name:
                raise FileError(f"{last.path}: its storage has died, and none recovers it (larpixdaq recover)")
            raise FileError(
                f"{last.path.parent}: part {last.number + 1} of run {self.number} does not come: is a storage there?"
            )

    def _looks(self, start: int, patience: float) -> Iterator[tuple[int, int]]:
        """Yield the first new row and the row after the last one, at each look, until the run ends."""
        deadline = None
        while True:
            growing, stop = self.is_growing, self.rows
            start = max(0, stop + start) if start < 0 else start
            yield start, stop
            start = max(start, stop)
            last = self._last
            if growing or (not last.has_final_name and may_be_written(last.path)):  # it is written, or recovered
                deadline = None
            else:
                now = time.monotonic()
                deadline = now + patience if deadline is None else deadline
                if self._last_condition not in _UNFINISHED or now > deadline:
                    return
            time.sleep(POLL)
            self.refresh()

    @property
    def _last_condition(self) -> str:
        """Condition of the newest part, which is that of the run as far as it goes on or has ended."""
        return str(self._last.file.run_info()["condition"]) if self.own else ""

    def _tasks(self, selection: Selection, rows: int) -> Iterator[_Task]:
        """Divide the rows that a selection allows by number and time into pieces, of whole chunks where possible."""
        start, stop = selection.start, selection.stop
        if start < 0 or (stop is not None and stop < 0):
            start, stop, _ = slice(start, stop).indices(self.rows)
        for number, first, length in self._visible():
            low, high = max(start - first, 0), length if stop is None else min(stop - first, length)
            if stop is not None and first >= stop:
                return
            if low >= high:
                continue
            part = self._part(number)
            chunk = part.file.chunk_rows or PIECE_ROWS
            size = max(rows - rows % chunk, chunk)
            arrived = part.stretches(selection.begin_ns, selection.end_ns) if selection.by_time else [(low, high)]
            for _, piece in groupby(_cut(arrived, low, high, size), key=lambda stretch: stretch[0] // size):
                yield _Task(part, first, list(piece))

    # What is known beside the rows

    @property
    def number(self) -> int | None:
        """Number of the run; None if larpix-daq did not write the file."""
        return self._last.file.run if self.own else None

    @property
    def _last(self) -> Part:
        """The newest part, which has all that was known of the run when it was opened."""
        parts = [self._part(number) for number in [*self._files][-2:]]
        return next((part for part in reversed(parts) if part.is_described), parts[0])

    @property
    def info(self) -> RunInfo | None:
        """Description of the run: comment, kind, operator, start, layout and versions, boards; None as of `number`."""
        if not self.own:
            return None
        try:
            file = self._last.file
            found = tables.make_run_info(file.run_info(), file.texts())
        except ValueError as error:
            raise FileError(f"{file.path}: /run/info: {error}") from None
        return found._replace(connected=tuple(self.sources))

    @cached_property
    def report(self) -> RunReport | None:
        """Judgement of the run by all parts that are there: condition, reasons, totals; None as of `number`."""
        if not self.own:
            return None
        return run_report.judge_run(self._last.file.run, self.files, whole=self._listing.key is not None)

    @property
    def condition(self) -> str:
        """RUNNING, COMPLETE, 'COMPLETE, suspect', INCOMPLETE, INTERRUPTED, ABORTED or CONTINUED; "" as of `number`."""
        if self.is_growing:
            return RunCondition.RUNNING
        return "" if self.report is None else str(self.report.condition)

    @property
    def reasons(self) -> list[str]:
        """Why the condition is not COMPLETE, one line each."""
        return [] if self.report is None or self.is_growing else [*self.report.reasons, *self.report.notes]

    @property
    def sources(self) -> list[ConnectedBoard]:
        """Boards, devices or files that the producers read: the last entry of each io_group."""
        found = [board for file in self._files_with_tables() for board in file.connected()]
        return list({(board.producer, board.io_group): board for board in found}.values())

    @property
    def e_log(self) -> list[Comment]:
        """Comments on the run, as far as they came while it was written, in order."""
        return list(dict.fromkeys(comment for file in self._files_with_tables() for comment in comments(file.texts())))

    @property
    def texts(self) -> dict[str, list[str]]:
        """Texts of the newest part by name, in the order of writing, such as versions of programs and reasons."""
        return self._last.file.texts() if self.own else {}

    @property
    def configurations(self) -> list[ChipConfiguration]:
        """Configuration of each chip at the end of the newest part, also if only its journal has it."""
        if not self.own:
            return []
        found = tables.configurations_of_part(self._last.path)
        return [_configuration(row, found.producers[int(row["producer"])]) for row in found.rows]

    def configuration_changes(self) -> Iterator[ChipConfiguration]:
        """Read all rows of /run/configs, in order. Each part begins with the configurations at the previous end."""
        for file in self._files_with_tables():
            for start in range(0, file.length("run/configs"), 1024):
                for row in file.table("run/configs", start, start + 1024):
                    yield _configuration(row, file.producer(row))

    @property
    def ledger(self) -> list[LedgerLine]:
        """Counts of each producer and io_group. While a run grows, there is none before the end record is in a part."""
        lines: dict[tuple[BlockOrigin, int], LedgerLine] = {}
        for file in self._files_with_tables():
            for origin, row in file.rows_by_origin("ledger/counts"):
                counts = {name: row[name] for name in ("owed", *constants.COUNTS)}
                known = lines.get((origin, row["io_group"]))
                if known is not None:
                    counts["stored"] += known.counts["stored"]
                    if row["how"] == ledger.OPEN:
                        for name in ("packets", "bad_parity", "dropped"):
                            counts[name] += known.counts[name]
                lines[origin, row["io_group"]] = LedgerLine(*origin[1:], row["io_group"], row["how"], counts)
        return list(lines.values())

    @property
    def verdicts(self) -> list[Verdict]:
        """Judgements on the data before they reached the producers."""
        return [
            Verdict(origin.producer, **{name: row[name] for name in Verdict._fields[1:]})
            for file in self._files_with_tables()
            for origin, row in file.rows_by_origin("ledger/verdicts")
        ]

    def gaps(self) -> Iterator[Gap]:
        """Read the gaps: rows that were dropped, because ring and spool of a producer were full."""
        for file in self._files_with_tables():
            for origin, row in file.rows_by_origin("ledger/gaps"):
                yield Gap(origin.producer, **{name: row[name] for name in Gap._fields[1:]})

    def messages(self) -> Iterator[InfoLine]:
        """Read the lines of INFO messages, in order."""
        for number, _, _ in self._visible() if self.own else ():
            yield from self._part(number).lines()

    def blocks(self) -> Iterator[Block]:
        """Read the blocks, in order."""
        for number, base, _ in self._visible() if self.own else ():
            part = self._part(number)
            producers = part.producers()
            for page in part.blocks():
                for row in page:
                    if int(row["producer"]) >= len(producers):
                        part.file.producer(row)  # raises
                    epoch, sequence, first, rows, first_ns, last_ns = (int(row[name]) for name in _BLOCK_COLUMNS)
                    place = base + first, rows, first_ns, last_ns
                    yield Block(producers[int(row["producer"])], epoch, sequence, *place)

    def _files_with_tables(self) -> Iterator[DataFile]:
        """Yield the file of each part, if larpix-daq wrote it."""
        for number in list(self._files) if self.own else ():
            yield self._part(number).file


def _cut(stretches: Iterable[tuple[int, int]], low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut stretches of rows (row, row after) at `low` and `high`, and at each multiple of `size`."""
    for start, stop in stretches:
        start, stop = max(start, low), min(stop, high)
        while start < stop:
            border = min(stop, start - start % size + size)
            yield start, border
            start = border


def _configuration(row: Any, producer: str) -> ChipConfiguration:
    sent, read = (np.flatnonzero(row["known"] & bit).tolist() for bit in (SENT, READ))
    return ChipConfiguration(
        key_of(int(row[name]) for name in ("io_group", "io_channel", "chip_id")),
        text(row["asic"]),
        producer,
        int(row["time_ns"]),
        {i: int(row["sent"][i]) for i in sent},
        {i: int(row["read"][i]) for i in read},
    )


def _ns(name: str, moment: Time | None, default: float) -> float:
    """Return unix ns. FormatError if this is no time."""
    if moment is None:
        return default
    if isinstance(moment, str):
        try:
            return parse_since(moment) * 1e9
        except argparse.ArgumentTypeError as error:
            raise FormatError(f"{name}: {error}") from None
    if isinstance(moment, datetime):
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1e9
    if isinstance(moment, bool) or not isinstance(moment, int | float | np.number) or math.isnan(moment):
        raise FormatError(f"{name} {moment!r:.100}: expected unix seconds, a datetime, or a UTC time as text")
    return float(moment) * 1e9
