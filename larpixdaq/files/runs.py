"""A whole run of one storage, judged over all its parts: from their small tables alone. No row is read but those of
blocks that stand in two directories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from larpixdaq import schema
from larpixdaq.blocks import Source
from larpixdaq.errors import FileError
from larpixdaq.files import layout, ledger, names
from larpixdaq.files.part import Part, describe, read
from larpixdaq.files.superseded import joined
from larpixdaq.terms import unusable


class RunReport(NamedTuple):
    run: int
    files: list[Path]  # those that are closed, in the order of the parts
    condition: str
    rows: int
    stored: list[tuple[str, int, int, int]]  # producer, epoch, io_group, rows
    reasons: list[str]  # why the condition is not COMPLETE, in one line each
    ends: list[tuple[str, int, int, str, int]]  # producer, epoch, next, how, rows made
    notes: list[str]  # what a reader should know though nothing is wrong


def survey(directory: Path, run: int, label: str = "") -> RunReport:
    """The run as it is in a directory, of the storage with this label. Nothing is raised but FileError, when the
    directory cannot be read; what is wrong with files is among the reasons."""
    paths = []
    for _, _, path in names.run_files(directory, run):
        name = names.parse(path.name)
        if name is not None and name.storage == names.label(label):
            paths.append(path)
    return judge(run, paths, whole=True)


def judge(run: int, paths: Iterable[Path], *, whole: bool) -> RunReport:
    """Some parts of a run; `whole`: there are no others. Otherwise parts before and behind these are not missed."""
    parts, waiting = [], []
    for path in paths:
        if not path.name.endswith(names.FINISHED):
            if path.name.endswith(names.PART) or not path.with_name(_stem(path) + names.PART).exists():
                waiting.append(f"{path.name} is not closed")
            continue
        try:
            parts.append(read(path))
        except FileError as error:
            waiting.append(str(error))
    try:
        parts = joined(parts)
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
        self._stored: defaultdict[tuple[Source, int], int] = defaultdict(int)
        self._dropped: defaultdict[tuple[Source, int], int] = defaultdict(int)
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
            [(source.producer, source.epoch, group, rows) for (source, group), rows in self._stored.items() if rows],
            self._waiting + self._missing + doubts,
            [
                (source.producer, source.epoch, following, how, self._made(source, part))
                for source, (part, following, how) in self._ends.items()
            ],
            self._notes,
        )

    def _condition(self, doubts: list[str]) -> str:
        if any(part.condition == layout.ABORTED for part in self._parts):
            return layout.ABORTED
        if self._waiting:
            return layout.INTERRUPTED
        if self._missing:
            return layout.INCOMPLETE
        if self._notes and self._parts[-1].condition == layout.CONTINUED:
            return layout.CONTINUED
        suspect = doubts or any(part.condition == layout.SUSPECT for part in self._parts)
        return layout.SUSPECT if suspect else layout.COMPLETE

    def _which_parts(self) -> None:
        """Are parts missing, and has everybody ended who should?"""
        numbers = [part.number for part in self._parts]
        absent = sorted(set(range(0 if self._whole else min(numbers, default=0), max(numbers, default=0))) - {*numbers})
        if absent or not (numbers or self._waiting):
            self._missing.append(f"part {', '.join(map(str, absent or [0]))} of run {self._run} is not there")
        self._missing += [f"there are two parts {n} of it" for n in sorted(set(numbers)) if numbers.count(n) > 1]
        goes_on = bool(self._parts) and self._parts[-1].condition == layout.CONTINUED and not self._whole
        for source in self._open:
            if goes_on:
                self._notes.append(f"{describe(source)}: continues in the next file")
            elif not self._early(source) or self._span(source):
                self._waiting.append(f"{describe(source)}: no end record, totals unknown")
        came = {source.producer for source in self._sources}
        required = dict.fromkeys(name for part in self._parts for name in part.required)
        lacking = [f"producer {name!r}: no data came, totals unknown" for name in required if name not in came]
        (self._notes if goes_on else self._waiting).extend(lacking)

    def _early(self, source: Source) -> bool:
        """Whether it began in a part that is not among these."""
        return self._parts[0].number > 0 and self._parts[0].positions.get(source, (0, 0))[0] > 0

    def _span(self, source: Source) -> list[tuple[int, int]]:
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

    def _blocks(self, source: Source) -> None:
        """Each block must be in exactly one part."""
        spans = self._span(source)
        at = self._parts[0].positions[source][0] if self._early(source) else 0
        end = self._ends[source][1] if source in self._ends else at
        for first, stop in [*spans, (max(end, *(stop for _, stop in spans), at), 0)]:
            if first > at:
                self._missing.append(f"{describe(source)}: blocks {at} to {first - 1} are in no part")
            elif stop and first < at:
                twice = min(at, stop)
                self._missing.append(f"{describe(source)}: blocks {first} to {twice - 1} are in two parts")
            at = max(at, stop)

    def _totals(self) -> None:
        """Equation (d), of each io_group over all parts."""
        for key in dict.fromkeys((*self._stored, *self._dropped)):
            source, group = key
            where = f"{describe(source)}, io_group {group}"
            counts = dict.fromkeys(schema.COUNTS, 0) | {"dropped": self._dropped[key], "owed": 0}
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

    def _made(self, source: Source, part: Part) -> int:
        return sum(ledger.made(counts) for (whose, _), counts in part.counts.items() if whose == source)
