"""The producer's reading side: sources polled, their rows put where they belong."""

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

#: While the ring is full and the sources wait, it is looked at again so often (seconds).
FULL_AGAIN = 0.002


class Listener(Protocol):
    """A receiver of decoded rows: take_rows() is called only while `listening` is not 0."""

    listening: int

    def take_rows(self, rows: NDArray[Any]) -> None: ...


class Readout:
    """Reads `sources`, which are open, in turn, one batch each, so that none keeps the others, or the consumers,
    waiting.

    In a run the rows go into the recorder's blocks; outside of runs they are decoded, counted and forgotten. When the
    ring is full, either nothing is read (`wait`), or what is read is counted as dropped.
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
        """`listener` gets the decoded rows, also outside of runs; `record_sent`: words sent to chips become rows of
        the run."""
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
        self._unfinished: set[Source] = set()  # their batch has rows that found no room yet
        self._sockets: dict[Source, tuple[Any, ...]] = {}
        self.batches = 0
        #: In the last turn each source gave all that it had by then, and all of it found its place.
        self.quiet = True
        #: Rows of the last turn.
        self.rows = 0
        for source in sources:
            source.start(ring.outside)

    def record(self, recording: bool) -> None:
        """From now on rows are the run's (True) or of no run. Kept unknown words are forgotten."""
        self._recording = recording
        self._playing = False
        self._full = False
        self._dropped = 0
        for source in self._sources:
            source.start(self._ring.counts if recording else self._ring.outside)

    def play(self) -> None:
        """The run begins: recorded files are read from their beginning."""
        for source in self._sources:
            if source.recorded:
                source.close()
                source.open()
                source.start(self._ring.counts)
        self._playing = True

    def take_unknown(self) -> Iterator[NDArray[Any]]:
        for source in self._sources:
            yield from source.take_unknown()

    def due(self) -> Iterator[float]:
        """Seconds until each source wants to be read although no socket says so."""
        now = time.monotonic()
        if self._full:
            yield FULL_AGAIN
            return
        for source in self._sources:
            due = source.due() if self._active(source) else None
            if due is not None:
                yield due - now

    def watch(self, poller: zmq.Poller) -> None:
        """Keep the poller to the sockets that are to be read now."""
        for source in self._sources:
            wanted = source.sockets if self._active(source) and not self._full else ()
            keep_polled(poller, self._sockets, source, wanted)

    def turn(self, poller: zmq.Poller) -> bool:
        """One batch of each source that has one; True when any had, or has rows left that found no room yet."""
        busy = False
        self.quiet = True
        self.rows = 0
        self._full = False
        for source in self._sources:
            if not self._active(source):
                continue
            if source not in self._unfinished:
                if self._wait and self._recording and self._recorder.rows() is None:
                    self._full = True
                    continue
                if not source.read():
                    self._report(source)
                    continue
                self.batches += 1
            self.quiet &= source.drained
            busy = True
            self._take(source)
            self._report(source)
        self.watch(poller)
        self.quiet &= not self._full
        return busy or self._full

    def put(self, rows: NDArray[Any], io_group: int) -> int:
        """Rows of words about to be sent, direction 0: how many have found their place (0: the words have to wait)."""
        if not self._record_sent:
            return len(rows)
        if not self._recording:
            self._ring.outside[io_group, Count.SENT_ROWS] += np.uint64(len(rows))
            return len(rows)
        room = self._recorder.rows()
        if room is None:
            if self._wait:
                return 0
            self._ring.counts[io_group, Count.SENT_ROWS] += np.uint64(len(rows))
            self._recorder.drop(rows)
            self._dropping(len(rows))
            return len(rows)
        n = min(len(rows), len(room))
        room[:n] = rows[:n]
        self._ring.counts[io_group, Count.SENT_ROWS] += np.uint64(n)
        self._recorder.publish(n)
        return n

    def _active(self, source: Source) -> bool:
        return source in self._unfinished or (not source.finished and (self._playing or not source.recorded))

    def _take(self, source: Source) -> None:
        """Take texts and rows of the source's batch, to its end or, with `wait`, until the ring is full."""
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
            rows = self._recorder.scratch() if room is None else room
            n = source.decode(rows)
            more = n == len(rows)
            if self._listener.listening:
                self._listener.take_rows(rows[:n])
            if room is not None:
                self.rows += n
                self._recorder.publish(n)
                self._dropping(0)
            elif self._recording:
                self._recorder.drop(rows[:n])
                self._dropping(n)

    def _dropping(self, rows: int) -> None:
        """An alarm when rows begin to be dropped, and one, with their number, when there is room again."""
        if rows and not self._dropped:
            log.warning("the ring is full: rows are decoded and counted, but dropped, until storages have acknowledged")
        elif not rows and self._dropped:
            log.warning("the ring has space again; %d rows were dropped", self._dropped)
            self._dropped = 0
        self._dropped += rows

    @staticmethod
    def _report(source: Source) -> None:
        for problem in source.problems():
            log.warning(problem)
