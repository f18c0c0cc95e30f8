"""The ledger of a file, held against what its rows and blocks say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from larpixdaq import terms
from larpixdaq._native import chunks
from larpixdaq.blocks import Source
from larpixdaq.files import layout, ledger
from larpixdaq.files.part import describe
from larpixdaq.files.reader import DataFile, plain

#: Counters that a tally of the rows gives again.
_SAME = chunks.TALLY[:6]


class _Source:
    def __init__(self, first: int) -> None:
        self.expected = first  # the sequence that comes next
        self.late = first > 0  # begins in an earlier part of the run
        self.lost = False
        self.ended = False
        self.tally = ledger.new_tally()


class Books:
    """What the blocks of each source add up to."""

    def __init__(self, file: DataFile, info: dict[str, Any]) -> None:
        self._file = file
        self._run = int(info["run"])
        self._closed = info["condition"] != layout.RUNNING
        self._layout = file.layout.code if file.layout else 0
        self.producers = file.producers()
        self._places = {self._whose(row): (int(row["first"]), int(row["next"])) for row in file.table("run/positions")}
        self._sources: dict[Source, _Source] = {}
        self._missing: dict[tuple[Source, int, int], int] = {}
        for row in file.table("run/missing"):
            self._missing[self._whose(row), int(row["first"]), int(row["next"])] = int(row["rows"])

    def _whose(self, row: Any) -> Source:
        return self._file.source(row, self.producers, self._run)

    def _source(self, whose: Source) -> _Source:
        if whose not in self._sources:
            self._sources[whose] = _Source(self._places.get(whose, (0, 0))[0])
        return self._sources[whose]

    @property
    def packets(self) -> int:
        column = chunks.TALLY.index("packets")
        return sum(int(source.tally[:, column].sum()) for source in self._sources.values())

    def block(self, row: Any, rows: NDArray[np.uint8] | None, finding: Callable[[str], None]) -> None:
        """One row of /run/blocks and its rows as bytes; None when these cannot be read, or have unknown columns."""
        whose = self._whose(row)
        source = self._source(whose)
        self._reach(whose, source, int(row["sequence"]), finding)
        source.expected += 1
        if rows is not None:
            chunks.tally(rows, self._layout, source.tally)

    def _reach(self, whose: Source, source: _Source, sequence: int, finding: Callable[[str], None]) -> None:
        first, source.expected = source.expected, sequence
        if sequence != first:
            source.lost = True
            if (whose, first, sequence) not in self._missing:
                finding(f"{describe(whose)}: sequence {sequence} follows where {first} should")

    def close(self, finding: Callable[[str], None], lacking: Callable[[str], None], *, continued: bool) -> None:
        """`lacking` gets the lines about what is not here and may be in other parts; continued: the run goes on in one,
        where those end that have not."""
        for (whose, first, stop), rows in self._missing.items():
            lacking(f"{describe(whose)}: blocks {first} to {stop - 1} missing ({rows} rows, by the next header)")
        for row in self._file.table("run/ends"):
            whose = self._whose(row)
            source = self._source(whose)
            if source.ended:
                finding(f"{describe(whose)}: ends twice")
            source.ended = True
            self._reach(whose, source, int(row["next"]), finding)
        for whose, source in self._sources.items():
            if not (source.ended or continued):
                lacking(f"{describe(whose)}: no end record, totals unknown")
            place = self._places.get(whose, (0, 0))[1]
            if self._closed and place != source.expected + source.ended:
                finding(
                    f"{describe(whose)}: /run/positions says that {place} comes next, by its blocks that is"
                    f" {source.expected + source.ended}"
                )
        self._ledger(finding, lacking)

    def _ledger(self, finding: Callable[[str], None], lacking: Callable[[str], None]) -> None:
        seen = set()
        for row in self._file.table("ledger/counts"):
            whose, group = self._whose(row), int(row["io_group"])
            where = f"{describe(whose)}, io_group {group}"
            if (whose, group) in seen:
                finding(f"{where}: listed twice in the ledger")
            seen.add((whose, group))
            self._line(where, self._source(whose), group, plain(row), finding, lacking)
        for whose, source in self._sources.items():
            for index in np.flatnonzero(ledger.stored(source.tally)):
                if (whose, int(index)) not in seen:
                    finding(f"{describe(whose)}, io_group {index}: has rows, but no line in the ledger")
        for row in self._file.table("ledger/outside"):
            for line in ledger.unbalanced(plain(row)):
                finding(f"{describe(self._whose(row))}, io_group {row['io_group']}, outside of runs: {line}")

    def _line(
        self,
        where: str,
        source: _Source,
        group: int,
        counts: dict[str, Any],
        finding: Callable[[str], None],
        lacking: Callable[[str], None],
    ) -> None:
        tally = dict(zip(chunks.TALLY, source.tally[group].tolist(), strict=True))
        stored = int(ledger.stored(source.tally)[group])
        if counts["stored"] != stored:
            finding(f"{where}: the ledger says {counts['stored']} rows are stored, the file has {stored}")
        if tally["other_rows"]:
            finding(f"{where}: {tally['other_rows']} rows of an unknown packet type")
        if counts["how"] == ledger.OPEN:
            return
        for line in ledger.unbalanced(counts):
            finding(f"{where}: {line}")
        if useless := terms.unusable(counts):
            finding(f"{where}: {useless}")
        if source.late:
            return  # the rows of earlier parts are in other files
        if unpaid := ledger.owing(counts, stored, counts["owed"]):
            lacking(f"{where}: {unpaid}")
        if counts["owed"]:
            finding(f"{where}: {counts['owed']} rows are still pending")
        if counts["dropped"]:
            finding(f"{where}: {counts['dropped']} rows dropped, because ring and spool were full")
        whole = not (counts["owed"] or counts["dropped"] or source.lost)
        for name in _SAME:
            if tally[name] > counts[name] or (whole and tally[name] != counts[name]):
                finding(f"{where}: the ledger says {counts[name]} {name}, the file has {tally[name]}")
