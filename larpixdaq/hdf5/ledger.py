"""Equations of the ledger, checks of blocks and end records, and the account of each origin in a part."""

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
from larpixdaq.protocol.packed_rows import ROW_COLUMNS, new_tally
from larpixdaq.protocol.stream import BlockOrigin, unpack_configurations
from larpixdaq.runtime.record_file import crc32

#: `how` of an origin whose end record never came.
OPEN: Final = "open"


def stored_rows(tally: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sum up all rows of each io_group, shape (IO_GROUPS,)."""
    return np.asarray(tally[:, ROW_COLUMNS].sum(axis=1), np.uint64)


def rows_made(counts: Mapping[str, int]) -> int:
    """Compute the rows that a producer made, by equation (c)."""
    return constants.rows_made([counts[name] for name in constants.COUNTS])


def input_imbalances(counts: Mapping[str, int]) -> list[str]:
    """Check equations (a) and (b), which concern the producer alone; one line with both sides for each that fails."""
    c = counts
    lines = []
    bytes_in = c["pending_before"] + c["bytes_in"]
    spent = ("header_bytes", "word_bytes", "trailing_bytes", "rejected_bytes", "resync_bytes", "pending_after")
    if bytes_in != (total := sum(c[name] for name in spent)):
        lines.append(f"ledger (a): {bytes_in} bytes came in, {total} are accounted for")
    words = c["word_rows"] + c["unknown_words"] + c["rejected_words"]
    if c["words_in"] != words:
        lines.append(f"ledger (b): {c['words_in']} words came in, {words} are accounted for")
    return lines


def row_imbalance(counts: Mapping[str, int], stored: int) -> str | None:
    """Check equation (d); one line when it fails."""
    total = stored + counts["dropped"] + counts["owed"]
    if total == rows_made(counts):
        return None
    return (
        f"ledger (d): {rows_made(counts)} rows were made, {total} are accounted for"
        f" ({stored} stored, {counts['dropped']} dropped, {counts['owed']} pending)"
    )


def check_block(block: stream.Block, rows: NDArray[Any], row_layout: schema.RowLayout) -> None:
    """ProtocolError when a block has another layout, or its rows are not as many as its header says.

    Single fields of the header are not checked, because unpacking the frame has checked them.
    """
    check_layout(block, row_layout)
    if block.configs is not None:
        if block.text is None:
            raise ProtocolError(f"{describe(block)}: configurations belong to a text")
        try:
            unpack_configurations(block.configs)
        except ProtocolError as error:
            raise ProtocolError(f"{describe(block)}: {error}") from None
    if rows.dtype != row_layout.dtype or rows.shape != (block.rows,):
        raise ProtocolError(
            f"{describe(block)}: expected {block.rows} rows of layout {row_layout.name},"
            f" found shape {rows.shape} of {rows.dtype.itemsize} bytes each"
        )


def check_layout(block: stream.Block, row_layout: schema.RowLayout) -> None:
    """ProtocolError when a block has another layout."""
    if block.layout != row_layout.code:
        raise ProtocolError(f"{describe(block)}: expected layout {row_layout.code}, found {block.layout}")


def check_content(block: stream.Block, pieces: Sequence[NDArray[np.uint8]], row_layout: schema.RowLayout) -> None:
    """Check the bytes of a block's rows, in pieces of whole rows.

    ChecksumError when they are not the rows that were sent; ProtocolError when a text has other rows than messages.
    """
    crc = 0
    for piece in pieces:
        crc = crc32(piece, crc)
    if crc != block.crc32:
        raise ChecksumError(f"{describe(block)}: expected CRC-32 {block.crc32:08x}, found {crc:08x}")
    if block.text is not None:
        column = schema.type_column(row_layout.dtype)
        kinds = np.concatenate([piece.view(row_layout.dtype)[column] for piece in pieces])
        if not len(kinds) or np.any(kinds != schema.PacketType.MESSAGE):
            raise ProtocolError(f"{describe(block)}: has a text, but not rows of messages")


def check_end(end: stream.End) -> None:
    """ProtocolError when an end record has several counters of one io_group, or an impossible io_group."""
    for table in (end.counts, end.outside):
        groups = {counts[0] for counts in table}
        if len(groups) != len(table) or max(groups, default=0) >= constants.IO_GROUPS:
            raise ProtocolError(f"{describe(end)}: an io_group is counted twice, or is above {constants.IO_GROUPS - 1}")


def describe(frame: stream.Block | stream.End) -> str:
    """Describe a block or an end record with its origin, for errors."""
    subject = f"block {frame.sequence}" if isinstance(frame, stream.Block) else f"end at {frame.next}"
    return f"{subject} of run {frame.run}, {describe_origin(frame.origin)}"


def describe_origin(origin: BlockOrigin) -> str:
    return f"producer {origin.producer!r}, epoch {origin.epoch:x}"


def describe_group(origin: BlockOrigin, io_group: int) -> str:
    return f"{describe_origin(origin)}, io_group {io_group}"


def verdict_lines(verdicts: Iterable[tuple[BlockOrigin, int, str, str]]) -> list[str]:
    """Return one line for each of the verdicts (origin, io_group, verdict, why) that is not "complete"."""
    return [
        f"{describe_group(origin, io_group)}: {verdict}: {why}"
        for origin, io_group, verdict, why in verdicts
        if verdict != stream.VERDICTS[0]
    ]


def missing_rows(where: str, counts: Mapping[str, int], stored: int, *, balanced: bool) -> list[str]:
    """Return why rows of an io_group are missing, one line each. `balanced`: equation (d) must hold."""
    dropped = f"{counts['dropped']} rows dropped, because ring and spool were full" if counts["dropped"] else None
    lines = (dropped, row_imbalance(counts, stored) if balanced else None, constants.unusable(counts))
    return [f"{where}: {line}" for line in lines if line]


class Account:
    """Counts of one origin in this part. `expected`: next sequence of a block, over all parts of the run."""

    def __init__(self, origin: stream.BlockOrigin, index: int, expected: int = 0) -> None:
        self.origin = origin
        self.index = index
        self.expected = expected
        self.first_sequence = expected
        self.next_packet: int | None = None if expected else 0
        self.tally = new_tally()
        self.end: stream.End | None = None
        self.missing_blocks = 0
        self.dropped: dict[int, int] = {}  # io_group -> rows that found no room, by the gaps in this part

    def skip_to(self, sequence: int, first_packet: int | None = None) -> list[tuple[int, ...]]:
        """Note that `sequence` comes next. Returns a row for /run/missing when blocks before it are missing."""
        first = self.expected
        if sequence == first:
            return []
        self.missing_blocks += sequence - first
        rows = 0
        if first_packet is not None and self.next_packet is not None:
            rows = max(0, first_packet - self.next_packet)
        self.expected = sequence
        return [(self.index, self.origin.epoch, first, sequence, rows)]

    def add_block(self, sequence: int, first_packet: int, rows: int) -> list[tuple[int, ...]]:
        """Count a block. Returns a row for /run/missing when blocks before it are missing."""
        missing = self.skip_to(sequence, first_packet)
        self.expected, self.next_packet = sequence + 1, first_packet + rows
        return missing

    def drop(self, gaps: Iterable[tuple[int, int]]) -> None:
        """Note gaps, each an io_group and rows."""
        for io_group, rows in gaps:
            self.dropped[io_group] = self.dropped.get(io_group, 0) + rows

    @property
    def next(self) -> int:
        """Next sequence; an end record counts as the sequence that it names."""
        return self.expected + (self.end is not None)

    def _counts_by_group(self) -> dict[int, dict[str, int]]:
        """Return the counters of each io_group by the end record, or else by the rows and gaps in this part."""
        rows = stored_rows(self.tally)
        present = np.flatnonzero(rows).tolist()
        given: dict[int, dict[str, int]] = {}
        if self.end is not None:
            given = {group: dict(zip(constants.COUNTS, values, strict=True)) for group, *values in self.end.counts}
        else:
            for group in {*self.dropped, *present}:
                tally = dict(zip(hdf5_chunks.TALLY, self.tally[group].tolist(), strict=True))
                given[group] = {name: tally[name] for name in ("packets", "bad_parity")}
                given[group]["dropped"] = self.dropped.get(group, 0)
        none = dict.fromkeys(("owed", *constants.COUNTS), 0)
        return {
            group: none | given.get(group, {}) | {"stored": int(rows[group])} for group in sorted({*given, *present})
        }

    def counts(self) -> NDArray[Any]:
        """Make the rows of /ledger/counts."""
        rows = [
            (self.index, self.origin.epoch, group, self.how.encode(), *counts.values())
            for group, counts in self._counts_by_group().items()
        ]
        return np.array(rows, layout.COUNTS)

    @property
    def how(self) -> str:
        return OPEN if self.end is None else self.end.how

    def outside(self, end: stream.End) -> NDArray[Any]:
        """Make the rows of /ledger/outside: the producer's run 0 since its previous end record."""
        rows = [(self.index, end.epoch, group, end.how.encode(), 0, *values) for group, *values in end.outside]
        return np.array(rows, layout.COUNTS)

    def gaps(self, frame: stream.Block | stream.End) -> NDArray[Any]:
        """Make the rows of /ledger/gaps for a block or an end record."""
        sequence = frame.sequence if isinstance(frame, stream.Block) else frame.next
        rows = [
            (self.index, self.origin.epoch, sequence, gap.io_group, gap.rows, gap.first_ns, gap.last_ns)
            for gap in frame.gaps
        ]
        return np.array(rows, layout.GAPS)

    def verdicts(self, end: stream.End) -> NDArray[Any]:
        """Make the rows of /ledger/verdicts, with reasons cut to TEXT_BYTES."""
        rows = [
            (
                *(self.index, end.epoch, verdict.io_group, verdict.verdict.encode()),
                stream.text_pieces(verdict.why, schema.TEXT_BYTES)[0],
                *(verdict.lost, verdict.first_ns, verdict.last_ns),
            )
            for verdict in end.verdicts
        ]
        return np.array(rows, layout.VERDICTS)

    def verdict_lines(self) -> list[str]:
        """Return one line for each verdict that is not "complete"."""
        verdicts = self.end.verdicts if self.end else []
        return verdict_lines((self.origin, verdict.io_group, verdict.verdict, verdict.why) for verdict in verdicts)

    def unknown(self, end: stream.End) -> NDArray[Any]:
        """Make the rows of /ledger/unknown: at most schema.UNKNOWN_KEPT of each io_group."""
        kept: dict[int, int] = {}
        rows = []
        for word in end.unknown:
            kept[word.io_group] = kept.get(word.io_group, 0) + 1
            if kept[word.io_group] <= schema.UNKNOWN_KEPT:
                raw = np.frombuffer(word.raw.ljust(constants.UNKNOWN_BYTES, b"\0"), np.uint8)
                rows.append((self.index, end.epoch, word.io_group, word.seconds, word.reason, len(word.raw), raw))
        return np.array(rows, layout.UNKNOWN)

    def missing_lines(self) -> list[str]:
        """Return which blocks and rows of this origin are missing, one line each."""
        lines = (
            [f"{describe_origin(self.origin)}: {self.missing_blocks} blocks are missing"] if self.missing_blocks else []
        )
        # Rows of earlier parts are not in this file; the unbroken sequence shows that they are stored there.
        balanced = self.end is not None and not self.first_sequence
        for group, counts in self._counts_by_group().items():
            lines += missing_rows(describe_group(self.origin, group), counts, counts["stored"], balanced=balanced)
        return lines


def verdict(
    accounts: Sequence[Account],
    required: Sequence[str],
    *,
    aborted: bool,
    continued: bool,
    before: Collection[BlockOrigin],
    damaged: Sequence[str],
) -> tuple[RunCondition, list[str]]:
    """Return the condition of a run by this part of it, and the reasons why it is not COMPLETE, one line each.

    Verdicts of producers on losses before the host are always among the reasons, and make a run no worse than
    `COMPLETE, suspect`.

    continued: the run continues in another part, which may have the end records that are absent here; before: origins
    of earlier parts; damaged: lines about damage that recovery found.
    """
    missing = [*damaged, *(line for account in accounts for line in account.missing_lines())]
    losses = [line for account in accounts for line in account.verdict_lines()]
    waiting: list[str] = []
    if not continued:
        names = {origin.producer for origin in (*(account.origin for account in accounts), *before)}
        waiting += [
            f"{describe_origin(account.origin)}: no end record, totals unknown"
            for account in accounts
            if account.end is None
        ]
        waiting += [f"producer {name!r}: no data came, totals unknown" for name in required if name not in names]
    reasons = waiting + missing + losses
    conditions = {
        RunCondition.ABORTED: aborted or any(account.how == "aborted" for account in accounts),
        RunCondition.INTERRUPTED: waiting,
        RunCondition.INCOMPLETE: missing,
        RunCondition.CONTINUED: continued,
        RunCondition.SUSPECT: losses,
    }
    return worst(conditions), reasons
