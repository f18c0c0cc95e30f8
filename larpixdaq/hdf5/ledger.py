"""The ledger's equations, and what one file knows of one source of blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants, schema
from larpixdaq._native import hdf5_chunks
from larpixdaq.constants import RunCondition, worst
from larpixdaq.errors import ChecksumError, ProtocolError
from larpixdaq.hdf5 import layout
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import BlockOrigin, unpack_configurations
from larpixdaq.runtime.record_file import crc32

#: `how` of a source whose end never came.
OPEN: Final = "open"
#: Columns of a tally that add up to all rows.
_ROWS: Final = [
    hdf5_chunks.TALLY.index(name) for name in ("word_rows", "time_rows", "info_rows", "sent_rows", "other_rows")
]


def new_tally() -> NDArray[np.uint64]:
    """Counters for chunks.tally(), one line per io_group."""
    return np.zeros((constants.IO_GROUPS, len(hdf5_chunks.TALLY)), np.uint64)


def stored(tally: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """All rows of each io_group, shape (IO_GROUPS,)."""
    return np.asarray(tally[:, _ROWS].sum(axis=1), np.uint64)


def made(counts: Mapping[str, int]) -> int:
    """Rows that a producer made: equation (c)."""
    return constants.rows_made([counts[name] for name in constants.COUNTS])


def unbalanced(counts: Mapping[str, int]) -> list[str]:
    """Which of the equations (a) and (b), of the producer alone, do not hold; each one line with both sides."""
    c = counts
    found = []
    held = c["pending_before"] + c["bytes_in"]
    spent = ("header_bytes", "word_bytes", "trailing_bytes", "rejected_bytes", "resync_bytes", "pending_after")
    if held != (total := sum(c[name] for name in spent)):
        found.append(f"ledger (a): {held} bytes came in, {total} are accounted for")
    words = c["word_rows"] + c["unknown_words"] + c["rejected_words"]
    if c["words_in"] != words:
        found.append(f"ledger (b): {c['words_in']} words came in, {words} are accounted for")
    return found


def owing(counts: Mapping[str, int], stored: int, owed: int) -> str | None:
    """Equation (d), in one line when it does not hold."""
    there = stored + counts["dropped"] + owed
    if there == made(counts):
        return None
    return (
        f"ledger (d): {made(counts)} rows were made, {there} are accounted for"
        f" ({stored} stored, {counts['dropped']} dropped, {owed} pending)"
    )


def check_block(block: stream.Block, rows: NDArray[Any], one: schema.RowLayout) -> None:
    """ProtocolError when a block is none of this layout, or its rows cannot be those that its header speaks of.

    Header fields alone are not checked here, because unpacking a frame has checked them.
    """
    if block.layout != one.code:
        raise ProtocolError(f"{describe(block)}: expected layout {one.code}, found {block.layout}")
    if block.configs is not None:
        if block.text is None:
            raise ProtocolError(f"{describe(block)}: configurations belong to a text")
        try:
            unpack_configurations(block.configs)
        except ProtocolError as error:
            raise ProtocolError(f"{describe(block)}: {error}") from None
    if rows.dtype != one.dtype or rows.shape != (block.rows,):
        raise ProtocolError(
            f"{describe(block)}: expected {block.rows} rows of layout {one.name},"
            f" found shape {rows.shape} of {rows.dtype.itemsize} bytes each"
        )


def check_content(block: stream.Block, pieces: Sequence[NDArray[np.uint8]], one: schema.RowLayout) -> None:
    """The same for the bytes of the rows, in pieces of whole rows; ChecksumError when the block's sender had others."""
    crc = 0
    for piece in pieces:
        crc = crc32(piece, crc)
    if crc != block.crc32:
        raise ChecksumError(f"{describe(block)}: expected CRC-32 {block.crc32:08x}, found {crc:08x}")
    if block.text is not None:
        column = schema.type_column(one.dtype)
        kinds = np.concatenate([piece.view(one.dtype)[column] for piece in pieces])
        if not len(kinds) or np.any(kinds != schema.PacketType.MESSAGE):
            raise ProtocolError(f"{describe(block)}: has a text, but not rows of messages")


def check_end(end: stream.End) -> None:
    """ProtocolError when the counters of an end are not those of different io_groups."""
    for table in (end.counts, end.outside):
        groups = {counts[0] for counts in table}
        if len(groups) != len(table) or max(groups, default=0) >= constants.IO_GROUPS:
            raise ProtocolError(f"{describe(end)}: an io_group is counted twice, or is above {constants.IO_GROUPS - 1}")


def describe(frame: stream.Block | stream.End) -> str:
    """Whose block or end it is, for messages to people."""
    what = f"block {frame.sequence}" if isinstance(frame, stream.Block) else f"end at {frame.next}"
    return f"{what} of run {frame.run}, {describe_source(frame.source)}"


def describe_source(source: BlockOrigin) -> str:
    return f"producer {source.producer!r}, epoch {source.epoch:x}"


class Account:
    """What this file knows of one source: `expected` is the sequence that comes next, over all parts of the run."""

    def __init__(self, source: stream.BlockOrigin, index: int, expected: int = 0) -> None:
        self.source = source
        self.index = index
        self.expected = expected
        self.begun_at = expected
        self.next_packet: int | None = None if expected else 0
        self.tally = new_tally()
        self.end: stream.End | None = None
        self.missing_blocks = 0
        self.dropped: dict[int, int] = {}  # io_group -> rows that found no room, as the gaps in this part say

    def skip(self, sequence: int, first_packet: int | None) -> tuple[int, int, int, int, int] | None:
        """Note that `sequence` comes next; a row for /run/missing when others should have come before."""
        first = self.expected
        if sequence == first:
            return None
        self.missing_blocks += sequence - first
        rows = 0
        if first_packet is not None and self.next_packet is not None:
            rows = max(0, first_packet - self.next_packet)
        self.expected = sequence
        return self.index, self.source.epoch, first, sequence, rows

    def take(self, sequence: int, next_packet: int) -> None:
        self.expected = sequence + 1
        self.next_packet = next_packet

    def drop(self, gaps: Iterable[tuple[int, int]]) -> None:
        """Note gaps, each an io_group and rows."""
        for io_group, rows in gaps:
            self.dropped[io_group] = self.dropped.get(io_group, 0) + rows

    @property
    def next(self) -> int:
        """The sequence that comes next; an end counts as the one it names."""
        return self.expected + (self.end is not None)

    def counts(self, owed: int = 0) -> NDArray[Any]:
        """The rows of /ledger/counts: by the end record, or, without one, by what came in this part."""
        here = stored(self.tally)
        given: dict[int, dict[str, int]] = {}
        if self.end is not None:
            given = {counts[0]: dict(zip(constants.COUNTS, counts[1:], strict=True)) for counts in self.end.counts}
        else:
            for group in self.dropped.keys() | {int(group) for group in np.flatnonzero(here)}:
                found = dict(zip(hdf5_chunks.TALLY, self.tally[group].tolist(), strict=True))
                given[group] = {name: found[name] for name in ("packets", "bad_parity")}
                given[group]["dropped"] = self.dropped.get(group, 0)
        groups = sorted(given.keys() | {int(group) for group in np.flatnonzero(here)})
        rows = np.zeros(len(groups), layout.COUNTS)
        for row, group in zip(rows, groups, strict=True):
            row["producer"], row["epoch"], row["io_group"] = self.index, self.source.epoch, group
            row["how"] = self.how.encode()
            for name, value in given.get(group, {}).items():
                row[name] = value
            row["stored"] = here[group]
            if self.end is not None and group in given:
                rest = made(given[group]) - given[group]["dropped"] - int(here[group])
                row["owed"] = max(0, min(rest, owed))
                owed -= int(row["owed"])
        return rows

    @property
    def how(self) -> str:
        return OPEN if self.end is None else self.end.how

    def outside(self) -> NDArray[Any]:
        """The rows of /ledger/outside: run 0 of this source since its end before."""
        found = np.zeros(len(self.end.outside) if self.end else 0, layout.COUNTS)
        for row, counts in zip(found, self.end.outside if self.end else [], strict=True):
            row["producer"], row["epoch"], row["io_group"] = self.index, self.source.epoch, counts[0]
            row["how"] = self.how.encode()
            for name, value in zip(constants.COUNTS, counts[1:], strict=True):
                row[name] = value
        return found

    def gaps(self, frame: stream.Block | stream.End) -> NDArray[Any]:
        """The rows of /ledger/gaps that a block or an end brings."""
        before = frame.sequence if isinstance(frame, stream.Block) else frame.next
        rows = [
            (self.index, self.source.epoch, before, gap.io_group, gap.rows, gap.first_ns, gap.last_ns)
            for gap in frame.gaps
        ]
        return np.array(rows, layout.GAPS)

    def verdicts(self) -> NDArray[Any]:
        """The rows of /ledger/verdicts; a longer sentence is cut."""
        rows = [
            (
                *(self.index, self.source.epoch, one.io_group, one.verdict.encode()),
                *(stream.text_pieces(one.why, schema.TEXT_BYTES)[0], one.lost, one.first_ns, one.last_ns),
            )
            for one in (self.end.verdicts if self.end else [])
        ]
        return np.array(rows, layout.VERDICTS)

    def doubts(self) -> list[str]:
        """What may have been lost before it reached us, one line for each verdict that is not "complete"."""
        return [
            f"{describe_source(self.source)}, io_group {one.io_group}: {one.verdict}: {one.why}"
            for one in (self.end.verdicts if self.end else [])
            if one.verdict != stream.VERDICTS[0]
        ]

    def unknown(self) -> NDArray[Any]:
        """The rows of /ledger/unknown: at most schema.UNKNOWN_KEPT of each io_group."""
        kept: dict[int, int] = {}
        rows = []
        for word in self.end.unknown if self.end else []:
            kept[word.io_group] = kept.get(word.io_group, 0) + 1
            if kept[word.io_group] <= schema.UNKNOWN_KEPT:
                raw = np.frombuffer(word.raw.ljust(constants.UNKNOWN_BYTES, b"\0"), np.uint8)
                rows.append(
                    (self.index, self.source.epoch, word.io_group, word.seconds, word.reason, len(word.raw), raw)
                )
        return np.array(rows, layout.UNKNOWN)

    def complaints(self, owed: int) -> tuple[list[str], list[str]]:
        """Why this source's data are not whole: (totals unknown or rows owed, rows or blocks missing)."""
        name = describe_source(self.source)
        waiting = [f"{name}: no end record, totals unknown"] if self.end is None else []
        waiting += [f"{name}: {owed} rows pending"] if owed and self.end is not None else []
        missing = [f"{name}: {self.missing_blocks} blocks are missing"] if self.missing_blocks else []
        for row in self.counts(owed):
            counts = {field: int(row[field]) for field in constants.COUNTS}
            where = f"{name}, io_group {row['io_group']}"
            if counts["dropped"]:
                missing.append(f"{where}: {counts['dropped']} rows dropped, because ring and spool were full")
            # Rows of earlier parts are not in this file; there the unbroken sequence says that they are stored.
            if (
                self.end is not None
                and not self.begun_at
                and (line := owing(counts, counts["stored"], int(row["owed"])))
            ):
                missing.append(f"{where}: {line}")
            if line := constants.unusable(counts):
                missing.append(f"{where}: {line}")
        return waiting, missing


def verdict(
    accounts: Sequence[Account],
    owed: Mapping[BlockOrigin, int],
    required: Sequence[str],
    *,
    aborted: bool,
    continued: bool = False,
    before: Collection[BlockOrigin] = (),
    damaged: Sequence[str] = (),
) -> tuple[RunCondition, list[str]]:
    """Return the condition of a run by this part of it, and the reasons why it is not COMPLETE, one line each.

    A loss that producers suspect before the host is always among the reasons, and makes a run no worse than `COMPLETE,
    suspect`.

    continued: the run continues in another part, in which the sources without an end may end; before: sources of
    earlier parts; damaged: lines about damage that recovery found.
    """
    waiting: list[str] = []
    missing, doubts = list(damaged), list[str]()
    for account in accounts:
        some_waiting, some_missing = account.complaints(owed.get(account.source, 0))
        waiting += some_waiting
        missing += some_missing
        doubts += account.doubts()
    known = {account.source for account in accounts}
    names = {source.producer for source in (*known, *before)}
    waiting += [f"producer {name!r}: no data came, totals unknown" for name in required if name not in names]
    waiting += [
        f"producer {source.producer!r}, epoch {source.epoch:x}: no data came, {rows} rows pending"
        for source, rows in owed.items()
        if source not in known
    ]
    if continued:
        waiting = []
    reasons = waiting + missing + doubts
    found = {
        RunCondition.ABORTED: aborted or any(account.how == "aborted" for account in accounts),
        RunCondition.INTERRUPTED: waiting,
        RunCondition.INCOMPLETE: missing,
        RunCondition.CONTINUED: continued,
        RunCondition.SUSPECT: doubts,
    }
    return worst(found), reasons


def stored_rows(accounts: Sequence[Account]) -> list[tuple[str, int, int, int]]:
    """(producer, epoch, io_group, rows) of all that this file holds."""
    return [
        (account.source.producer, account.source.epoch, int(group), int(rows[group]))
        for account in accounts
        for rows in (stored(account.tally),)
        for group in np.flatnonzero(rows)
    ]
