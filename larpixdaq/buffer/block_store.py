"""What a producer holds of one epoch, its own or a predecessor's: the spool (oldest), and behind it the ring.

Both have one row of indices: a block keeps the number of its descriptor in the ring when it moves to the spool.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from larpixdaq._native.ring_buffer import END, INFO, Ring
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.buffer.spool import BATCH_BLOCKS, BATCH_BYTES, LOST, Spool, SpoolHeader, SpoolRecord

#: A ring that may move to the spool is read in place as long as it is not fuller than that.
LENDS = 0.5


@dataclass
class Segment:
    """The blocks of one run: those from index `first` on, the end record at `last` once it is there."""

    run: int
    first: int
    layout: int
    required: tuple[str, ...]
    last: int | None = None
    durable: dict[str, int] = field(default_factory=dict)  # storage -> blocks of this run below are durable there

    def wants(self, name: str) -> int:
        """The first block of the run that a storage does not have yet."""
        return self.durable.get(name, self.first)

    def needed(self, name: str, forgotten: frozenset[str]) -> int:
        """The first block that has to be kept for a required storage; a forgotten one needs what no other has."""
        if name not in forgotten:
            return self.wants(name)
        return max(map(self.wants, self.required))


class StoredBlock(NamedTuple):
    """A block to send. `pinned`: its rows lie in the ring."""

    header: bytes
    payload: Any
    pinned: bool


class BlockStore:
    """The blocks of one epoch. `tail`: all below have what they need; `pins`: rows in the ring that libzmq still holds.

    `arena` is that of a predecessor, unlinked when nothing is owed any more.
    """

    def __init__(
        self, producer: str, epoch: int, ring: Ring | None, spool: Spool | None, arena: RingFile | None = None
    ):
        self.producer = producer
        self.epoch = epoch
        self.ring = ring
        self.spool = spool
        self.arena = arena
        self.segments: deque[Segment] = deque()
        self.pins: deque[tuple[int, Any]] = deque()
        self.tail = ring.tail if ring is not None else 0

    @classmethod
    def inherited(cls, producer: str, epoch: int, arena: RingFile | None, spool: Spool | None) -> BlockStore:
        """What a predecessor left: a ring that has its end record already, files of the spool, or both."""
        ring = arena.ring if arena is not None else None
        store = cls(producer, epoch, ring, spool, arena)
        known: dict[int, Segment] = {}
        if spool is not None and spool.files:
            store.tail = spool.files[0].header.start
            for file in spool.files:
                header = file.header
                known[header.first] = Segment(header.run, header.first, header.layout, tuple(header.required))
        if ring is not None:
            for run, first, layout, _, _, _, required, acknowledged in ring.runs():
                segment = Segment(run, first, layout, tuple(required))
                segment.durable = dict(zip(required, acknowledged, strict=True))
                known[first] = segment
        segments = [known[first] for first in sorted(known)]
        for segment, following in pairwise(segments):
            segment.last = following.first - 1
        if segments:
            segments[-1].last = store.head - 1
        store.segments.extend(s for s in segments if s.last is not None and s.last >= store.tail)
        return store

    @property
    def head(self) -> int:
        return self.ring.head if self.ring is not None else self.spool.head if self.spool is not None else 0

    @property
    def made_ns(self) -> int:
        if self.ring is not None:
            return self.ring.made_ns
        return self.spool.files[0].header.made_ns if self.spool is not None and self.spool.files else 0

    def begin(self, run: int, layout: int, required: Sequence[str]) -> None:
        self.segments.append(Segment(run, self.head, layout, tuple(required)))

    def end(self) -> None:
        self.segments[-1].last = self.head - 1

    def release(self, run: int) -> None:
        for segment in self.segments:
            if segment.run == run:
                segment.required = ()
                if self.ring is not None:
                    with contextlib.suppress(IndexError):
                        self.ring.release(run)

    def behind(self, segment: Segment) -> int:
        """The index behind the run's last block so far."""
        return self.head if segment.last is None else segment.last + 1

    def durable(self, name: str, run: int, following: int) -> None:
        """Storage `name` has everything of `run` below sequence `following`. That says nothing of the runs before."""
        for segment in self.segments:
            if segment.run == run and name in segment.required:
                index = max(segment.wants(name), min(segment.first + following, self.behind(segment)))
                segment.durable[name] = index
                if self.ring is not None:
                    with contextlib.suppress(
                        IndexError
                    ):  # the ring has no entry of a run whose blocks have all left it
                        self.ring.acknowledge(run, segment.required.index(name), index)

    def get(self, index: int) -> StoredBlock | None:
        """A block, with an empty header when the spool has lost it; None: it is being read from the disk."""
        if self.ring is not None and index >= self.ring.tail:
            return StoredBlock(self.ring.packed_header(index), self.ring.payload(index), True)
        record = self.spool.get(index) if self.spool is not None else LOST
        return None if record is None else StoredBlock(record.header, record.payload, False)

    def lends(self) -> bool:
        """Whether consumers may read rows where they are. What they are reading when it has to move to the spool is
        sent again, so not when that may soon be: it begins when three quarters of the ring are full."""
        return self.spool is None or (self.ring is not None and self.ring.fill < LENDS)

    def told(self, index: int) -> bool:
        """An INFO message or an end record, which no monitor skips."""
        return self.ring is not None and index >= self.ring.tail and self.ring.kind(index) in (INFO, END)

    def acknowledged(self, forgotten: frozenset[str] = frozenset()) -> int:
        """The first block that some required storage still needs."""
        for segment in self.segments:
            behind = self.behind(segment)
            done = min((segment.needed(name, forgotten) for name in segment.required), default=behind)
            if done < behind:
                return max(done, self.tail)
        return self.head

    def owed(self) -> int:
        return self.head - self.acknowledged()

    def spooled(self) -> int:
        """Blocks that wait in the spool."""
        return max(0, self.spool.head - self.tail) if self.spool is not None and self.spool.files else 0

    # room

    def free(self, forgotten: frozenset[str] = frozenset()) -> int:
        """Give up what nobody needs any more; how many blocks that were."""
        before = self.tail
        self.tail = self.acknowledged(forgotten)
        if self.spool is not None:
            self.spool.free_to(self.tail)
        if self.ring is not None:
            free = max(self.tail, self.spool.head) if self.spool is not None else self.tail
            self.pins = deque(pin for pin in self.pins if not pin[1].done)
            free = min([free, *(index for index, _ in self.pins)])
            if free > self.ring.tail:
                self.ring.free_to(free)
        while self.segments and self.segments[0].last is not None and self.segments[0].last < self.tail:
            self.segments.popleft()
        return self.tail - before

    def spill(self) -> None:
        """When the ring is nearly full, hand the oldest blocks that are not in flight to the spool."""
        if self.ring is None or self.spool is None or not self.spool.ready():
            return
        first = max(self.tail, self.ring.tail, self.spool.head)
        if not self.ring.short(first):
            return
        segment = next((s for s in self.segments if s.first <= first < self.behind(s)), None)
        if segment is None:
            return
        pinned = min((index for index, _ in self.pins), default=self.head)
        records: list[SpoolRecord] = []
        size = 0
        for index in range(first, min(pinned, self.behind(segment), first + BATCH_BLOCKS)):
            header, payload = self.ring.packed_header(index), self.ring.payload(index)
            size += len(header) + len(payload)
            if size > BATCH_BYTES or not self.ring.short(index) or not self.spool.directory.takes(size):
                break
            records.append(
                SpoolRecord(header, bytes(payload))
            )  # a copy: a disk that hangs must not hold the ring's tail
        if records:
            whose = SpoolHeader(
                self.producer, self.epoch, segment.run, segment.first, first, segment.layout, self.ring.made_ns,
                list(segment.required),
            )  # fmt: skip
            self.spool.write(whose, records)

    def leave(self) -> None:
        """Unlock what there is, for the next producer of this name."""
        if self.spool is not None:
            for file in self.spool.files:
                file.leave()
        if self.arena is not None:
            self.arena.leave()

    def close(self) -> None:
        """Nothing is owed any more: what a predecessor left goes."""
        if self.spool is not None:
            self.spool.free_to(self.head)
        if self.arena is not None:
            self.arena.close()
