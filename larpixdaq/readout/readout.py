"""Reads a producer's sources in turn, and puts their rows into blocks, or counts them without a run or room."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import zmq
from numpy.typing import NDArray

from larpixdaq._native.ring_buffer import Ring
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.constants import Count
from larpixdaq.runtime.event_loop import keep_polled
from larpixdaq.sources.source import Source

log = logging.getLogger(__name__)

#: Seconds between two checks for room in a full ring while the sources wait.
FULL_AGAIN = 0.002


class Listener(Protocol):
    """A receiver of decoded rows: take_rows() is called only while `listening` is not 0."""

    listening: int

    def take_rows(self, rows: NDArray[Any]) -> None: ...


class Readout:
    """Reads open sources in turn, one batch each, so that no source keeps the others or the consumers waiting.

    In a run the rows go into the recorder's blocks. Outside of runs they are decoded and counted, but not kept. When
    the ring is full, either nothing is read (`wait`), or the rows are counted as dropped.
    """

    def __init__(
        self,
        sources: list[Source],
        recorder: BlockBuilder,
        ring: Ring,
        *,
        wait: bool,
        listener: Listener,
        record_sent: bool = True,
    ) -> None:
        """`listener` gets the decoded rows, also outside of runs. `record_sent`: words sent to chips become rows of the
        run."""
        self._sources = sources
        self._recorder = recorder
        self._ring = ring
        self._wait = wait
        self._listener = listener
        self._record_sent = record_sent
        self._recording = False
        self._playing = False
        self._full = False
        self._dropped = 0
        self._unfinished: set[Source] = set()  # sources with rows in their batch that had no room yet
        self._sockets: dict[Source, tuple[Any, ...]] = {}
        self.batches = 0
        #: In the last turn every source was read to its end, and all rows had room.
        self.quiet = True
        #: Rows that went into blocks in the last turn.
        self.rows = 0
        for source in sources:
            source.start(ring.outside_counts)

    def record(self, recording: bool) -> None:
        """Begin (True) or stop putting rows into the run's blocks. Unknown words that were kept are dropped."""
        self._recording = recording
        self._playing = False
        self._full = False
        self._dropped = 0
        for source in self._sources:
            source.start(self._ring.counts if recording else self._ring.outside_counts)

    def play(self) -> None:
        """Begin to read recorded files, from their beginning, because the run begins."""
        for source in self._sources:
            if source.recorded:
                source.close()
                source.open()
                source.start(self._ring.counts)
        self._playing = True

    def take_unknown(self) -> Iterator[NDArray[Any]]:
        """Yield the unknown words that the sources have kept, dtype schema.UNKNOWN_WORD, and drop them there."""
        for source in self._sources:
            yield from source.take_unknown()

    def due(self) -> Iterator[float]:
        """Seconds until each source must be read even if no socket is readable."""
        now = time.monotonic()
        if self._full:
            yield FULL_AGAIN
            return
        for source in self._sources:
            due = source.due() if self._active(source) else None
            if due is not None:
                yield due - now

    def watch(self, poller: zmq.Poller) -> None:
        """Have the poller poll exactly the sockets that may be read now."""
        for source in self._sources:
            wanted = source.sockets if self._active(source) and not self._full else ()
            keep_polled(poller, self._sockets, source, wanted)

    def hold(self, held: bool) -> None:
        """Have the kernel keep what the boards send (True) for some milliseconds in which nothing is read anyway."""
        for source in self._sources:
            source.hold(held)

    def turn(self, poller: zmq.Poller) -> bool:
        """Take one batch of each source that has one. True if there was one, or rows still wait for room.

        The first source that finds no room is the first one of the next turn.
        """
        busy = False
        without_room: Source | None = None
        self.quiet = True
        self.rows = 0
        self._full = False
        for source in self._sources:
            if not self._active(source):
                continue
            if source not in self._unfinished:
                if self._wait and self._recording and self._recorder.rows() is None:
                    self._full = True
                    without_room = without_room or source
                    continue
                if not source.read():
                    self._log_problems(source)
                    continue
                self.batches += 1
            self.quiet &= source.drained
            busy = True
            self._decode(source)
            if source in self._unfinished:
                without_room = without_room or source
            self._log_problems(source)
        if without_room is not None:
            at = self._sources.index(without_room)
            self._sources = self._sources[at:] + self._sources[:at]
        self.watch(poller)
        self.quiet &= not self._full
        return busy or self._full

    def put(self, rows: NDArray[Any], io_group: int) -> int:
        """Put rows of words about to be sent (direction 0) into a block; return how many had room (0: try again)."""
        if not self._record_sent:
            return len(rows)
        if not self._recording:
            self._ring.outside_counts[io_group, Count.SENT_ROWS] += np.uint64(len(rows))
            return len(rows)
        room = self._recorder.rows()
        if room is None:
            if self._wait:
                return 0
            self._ring.counts[io_group, Count.SENT_ROWS] += np.uint64(len(rows))
            self._recorder.drop(rows)
            self._report_dropped(len(rows))
            return len(rows)
        n = min(len(rows), len(room))
        room[:n] = rows[:n]
        self._ring.counts[io_group, Count.SENT_ROWS] += np.uint64(n)
        self._recorder.publish(n)
        return n

    def _active(self, source: Source) -> bool:
        return source in self._unfinished or (not source.finished and (self._playing or not source.recorded))

    def _decode(self, source: Source) -> None:
        """Decode texts and rows of the source's batch, to its end or, with `wait`, until the ring is full."""
        self._unfinished.discard(source)
        for text, seconds in source.texts():
            if self._recording:
                self._recorder.info(text, seconds=seconds)
        more = True
        while more:
            room = self._recorder.rows() if self._recording else None
            if room is None and self._recording and self._wait:
                self._unfinished.add(source)
                self._full = True
                return
            rows = self._recorder.scratch if room is None else room
            n = source.decode(rows)
            more = n == len(rows)
            if self._listener.listening:
                self._listener.take_rows(rows[:n])
            if room is not None:
                self.rows += n
                self._recorder.publish(n)
                self._report_dropped(0)
            elif self._recording:
                self._recorder.drop(rows[:n])
                self._report_dropped(n)

    def _report_dropped(self, rows: int) -> None:
        """Log when rows begin to be dropped, and their number when there is room again."""
        if rows and not self._dropped:
            log.warning("the ring is full: rows are decoded and counted, but dropped, until storages have acknowledged")
        elif not rows and self._dropped:
            log.warning("the ring has space again; %d rows were dropped", self._dropped)
            self._dropped = 0
        self._dropped += rows

    @staticmethod
    def _log_problems(source: Source) -> None:
        for problem in source.problems():
            log.warning(problem)
