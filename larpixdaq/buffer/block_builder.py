"""Makes blocks of rows: slices of the ring, closed when full or 20 ms old, numbered, with the run's totals so far in
their headers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq import constants, schema
from larpixdaq._native.ring_buffer import END, INFO, Ring
from larpixdaq.constants import Count
from larpixdaq.protocol.stream import Block, Configs, End, Gap, LossVerdict, Totals, UnknownWord, pack, text_pieces
from larpixdaq.runtime.record_file import crc32
from larpixdaq.schema import PacketType

#: Seconds from a block's first row until it is closed.
BLOCK_AGE = 0.020


def info_rows(text: str, layout: schema.RowLayout, seconds: int) -> NDArray[Any]:
    """Make the rows of type 5 of an INFO message, one for each piece of its text in /messages.

    `counter` is 0 until the writer sets it to the piece's row there. `seconds`: unix time.
    """
    rows = np.zeros(len(text_pieces(text, schema.MESSAGE_BYTES)), layout.dtype)
    rows[schema.type_column(rows.dtype)] = PacketType.MESSAGE
    rows["timestamp"] = seconds
    return rows


class BlockBuilder:
    """Makes the blocks of one producer in its ring, from rows that decoders write there.

    `io_groups`: those of the producer's sources; io_group 0 (INFO messages) is added.
    """

    def __init__(
        self,
        ring: Ring,
        producer: str,
        epoch: int,
        layout: schema.RowLayout,
        io_groups: Sequence[int],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._ring = ring
        self.producer = producer
        self.epoch = epoch
        self.layout = layout
        self.io_groups = sorted({0, *io_groups})
        self.run: int | None = None
        self._clock = clock
        self._host_ns = wall
        self._close_at: float | None = None
        self._base, self._base_ns = clock(), wall()
        self.began_ns = 0  # unix ns at which the run began, by the host's clock
        #: Rows for a decoder that are not kept: outside of runs, or when the ring is full.
        self.scratch = np.zeros(constants.BLOCK_ROWS, layout.dtype)

    def begin(self, run: int, required: Sequence[str]) -> None:
        """Begin `run`, to which all rows belong until end(). `required`: names of its storages."""
        self._base, self._base_ns = self._clock(), self._host_ns()
        self.began_ns = self._base_ns
        size = self.layout.dtype.itemsize
        self._ring.begin(run, self.layout.code, size, required, self.io_groups, self.began_ns)
        self.run = run

    def resume(self, run: int, began_ns: int) -> None:
        """Continue the run that a dead producer has left in the ring, so that end() can close it."""
        self.run = run
        self.began_ns = began_ns

    def rows(self) -> NDArray[Any] | None:
        """Return the free rows of the open block, for a decoder and publish(); None when the ring is full.

        A block ends at the latest at a multiple of BLOCK_ROWS rows of the run, as chunks of a file do, so that a
        storage can write the packed blocks of a fast producer as chunks.
        """
        room = self._ring.rows(self._wall(), constants.BLOCK_ROWS - self._ring.first_packet % constants.BLOCK_ROWS)
        return None if room is None else np.frombuffer(room, self.layout.dtype)

    def publish(self, n: int) -> None:
        """Add the first n of rows() to the block, with the counters as they are now. Both survive a killed process."""
        if not n:
            self._ring.checkpoint()
        elif self._ring.publish(n):
            self.close_block()
        elif self._close_at is None:
            self._close_at = self._clock() + BLOCK_AGE

    def drop(self, rows: NDArray[Any]) -> None:
        """Count rows as dropped: they were decoded and counted, but had no room."""
        if not len(rows):
            return
        now = self._wall()
        for io_group, n in enumerate(np.bincount(schema.io_groups_of(rows)).tolist()):
            if n:
                self._ring.counts[io_group, Count.DROPPED] += np.uint64(n)
                gap = self._ring.gaps[io_group]
                gap[:] = (int(gap[0]) + n, int(gap[1]) or now, now)
        self._ring.checkpoint()

    def due(self) -> float | None:
        """The time (monotonic seconds) at which the open block must be closed; None: no block is open."""
        return self._close_at

    def work(self) -> None:
        if self._close_at is not None and self._clock() >= self._close_at:
            self.close_block()

    def close_block(self) -> None:
        """Close the open block, if it has rows."""
        self._close_at = None
        if self._ring.open_rows:
            self._ring.close_block(self._wall(), crc32(self._ring.open_payload()))

    def info(self, text: str, configs: Configs | None = None, *, seconds: int | None = None) -> bool:
        """Append an INFO message, in a block of its own, with the configurations that it is about.

        It counts in io_group 0. The ring keeps room for such messages; False when that is used up too. `seconds`: the
        message's time (unix), by default now.
        """
        self.close_block()
        rows = info_rows(text, self.layout, self._wall() // 10**9 if seconds is None else seconds)
        self._ring.counts[0, Count.INFO_ROWS] += np.uint64(len(rows))
        payload = rows.tobytes()
        gaps = self._ring.gaps.copy()
        if self._ring.append(INFO, payload, len(rows), self._header(len(rows), payload, text, configs)):
            return True
        self._ring.gaps[:] = gaps  # because the header with them was not appended
        self.drop(rows)
        return False

    def end(
        self, how: str, unknown: list[UnknownWord], outside: list[list[int]], verdicts: Sequence[LossVerdict] = ()
    ) -> End:
        """Close the run with its end record, and return that.

        `outside`: counters of rows outside of runs, as counts() returns them.
        """
        assert self.run is not None
        self.close_block()
        end = End(
            self.run,
            self.producer,
            self.epoch,
            self._ring.sequence,
            how,
            self.began_ns,
            self._wall(),
            self.counts(),
            self._take_gaps(),
            unknown,
            outside,
            list(verdicts),
        )
        while not self._ring.append(END, b"", 0, pack(end)):
            if not end.unknown:
                raise RuntimeError(f"run {self.run}: no room for the end record")  # far more room is kept for it
            end = msgspec.structs.replace(end, unknown=end.unknown[: len(end.unknown) // 2])
        self.run = None
        return end

    def counts(self, counts: NDArray[np.uint64] | None = None) -> list[list[int]]:
        """Return the counters of all io_groups with counts, in the form of stream.End."""
        table = self._ring.counts if counts is None else counts
        return [[g, *table[g].tolist()] for g in np.flatnonzero(table.any(axis=1)).tolist()]

    def _wall(self) -> int:
        """Unix ns: the host's clock at the begin of the run, continued by the monotonic clock.

        Otherwise a step of the host's clock in the run would make its rates and gaps wrong.
        """
        return self._base_ns + int((self._clock() - self._base) * 1e9)

    def _header(self, rows: int, payload: bytes, text: str, configs: Configs | None) -> bytes:
        """Return the header of an INFO message. Ring.close_block() makes those of other blocks."""
        assert self.run is not None
        now = self._wall()
        block = Block(
            self.run,
            self.producer,
            self.epoch,
            self._ring.sequence,
            self._ring.first_packet,
            rows,
            self.layout.code,
            0,
            now,
            now,
            crc32(payload),
            list(map(Totals.of, self.io_groups, self._ring.counts[self.io_groups].tolist())),
            self._take_gaps(),
            text,
            configs,
        )
        return pack(block)

    def _take_gaps(self) -> list[Gap]:
        gaps = self._ring.gaps
        taken_gaps = [Gap(g, *gaps[g].tolist()) for g in np.flatnonzero(gaps[:, 0]).tolist()]
        if taken_gaps:
            gaps[:] = 0
        return taken_gaps
