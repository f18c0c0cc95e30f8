"""The blocks of one epoch, the producer's own or a predecessor's: the oldest in the spool, the others in the ring.

Spool and ring share one numbering: a block that moves to the spool keeps its index, the number of its descriptor in the
ring.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from larpixdaq._native.ring_buffer import END, INFO, Ring
from larpixdaq.buffer.crash_recovery import LeftBlocks
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.buffer.spool import BATCH_BLOCKS, BATCH_BYTES, LOST, Spool, SpoolDirectory, SpoolHeader, SpoolRecord

#: Maximum fill of a ring (0 to 1) at which consumers read its rows in place, if blocks may move to the spool.
LENDING_LIMIT = 0.5


@dataclass
class Segment:
    """The blocks of one run, from index `first` to `last`, which is the end record; None while the run goes on."""

    run: int
    first: int
    layout: int
    required: tuple[str, ...]
    last: int | None = None
    positions: dict[str, int] = field(default_factory=dict)  # storage -> index below which it has all blocks of the run

    def position(self, name: str) -> int:
        """The index of the first block of the run that this storage does not have yet."""
        return self.positions.get(name, self.first)

    def first_needed(self, name: str, forgotten: frozenset[str]) -> int:
        """The index of the first block that must be kept for a required storage.

        For a forgotten storage only the blocks are kept that no other required storage has.
        """
        if name not in forgotten:
            return self.position(name)
        return max(map(self.position, self.required))


class StoredBlock(NamedTuple):
    """A block to send. `pinned`: its rows are in the ring, which must not free them meanwhile."""

    header: bytes
    payload: Any
    pinned: bool


class BlockStore:
    """The blocks of one epoch, from index `tail` to `head`; no storage needs those below `tail` any more.

    `pins`: index and message tracker of blocks whose rows in the ring libzmq is still sending. `ring_file`: None when
    the ring is in no file, and consumers cannot read it.
    """

    def __init__(
        self, producer: str, epoch: int, ring: Ring | None, spool: Spool | None, ring_file: RingFile | None = None
    ):
        self.producer = producer
        self.epoch = epoch
        self.ring = ring
        self.spool = spool
        self.ring_file = ring_file
        self.segments: deque[Segment] = deque()
        self.pins: deque[tuple[int, Any]] = deque()
        self.tail = ring.tail if ring is not None else 0

    @classmethod
    def inherited(cls, producer: str, left: LeftBlocks, directory: SpoolDirectory) -> BlockStore:
        """Make the store of a predecessor: of its ring, in which every run is ended, its spool files, or both."""
        ring = left.ring_file.ring if left.ring_file is not None else None
        store = cls(producer, left.epoch, ring, Spool(directory, left.files) if left.files else None, left.ring_file)
        known: dict[int, Segment] = {}
        if left.files:
            store.tail = left.files[0].header.start
            for file in left.files:
                header = file.header
                known[header.first] = Segment(header.run, header.first, header.layout, tuple(header.required))
        if ring is not None:
            for run, first, layout, _, _, _, required, acknowledged in ring.runs():
                segment = Segment(run, first, layout, tuple(required))
                segment.positions = dict(zip(required, acknowledged, strict=True))
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
        """Note that no storage needs the blocks of a cancelled run, so that free() frees them."""
        for segment in self.segments:
            if segment.run == run:
                segment.required = ()
                if self.ring is not None:
                    with contextlib.suppress(IndexError):
                        self.ring.release(run)

    def end_of(self, segment: Segment) -> int:
        """The index after the run's last block so far."""
        return self.head if segment.last is None else segment.last + 1

    def acknowledge(self, name: str, run: int, following: int) -> None:
        """Note that storage `name` has all blocks of `run` below sequence `following`; other runs are not affected."""
        for segment in self.segments:
            if segment.run == run and name in segment.required:
                index = max(segment.position(name), min(segment.first + following, self.end_of(segment)))
                segment.positions[name] = index
                if self.ring is not None:
                    with contextlib.suppress(IndexError):  # the blocks of this run have all left the ring
                        self.ring.acknowledge(run, segment.required.index(name), index)

    def get(self, index: int) -> StoredBlock | None:
        """Return a block, with an empty header when the spool has lost it; None while the disk reads it."""
        if self.ring is not None and index >= self.ring.tail:
            return StoredBlock(self.ring.packed_header(index), self.ring.payload(index), True)
        record = self.spool.get(index) if self.spool is not None else LOST
        return None if record is None else StoredBlock(record.header, record.payload, False)

    def can_lend(self) -> bool:
        """Whether consumers may read rows in the ring.

        False from half full on if there is a spool, because blocks that move there (from three quarters full on) must
        be sent again.
        """
        return self.spool is None or (self.ring is not None and self.ring.fill < LENDING_LIMIT)

    def is_never_skipped(self, index: int) -> bool:
        """Whether the block is an INFO message or an end record, which are sent to monitors without credit too."""
        return self.ring is not None and index >= self.ring.tail and self.ring.kind(index) in (INFO, END)

    def acknowledged(self, forgotten: frozenset[str] = frozenset()) -> int:
        """The index of the first block that a required storage still needs."""
        for segment in self.segments:
            end = self.end_of(segment)
            needed = min((segment.first_needed(name, forgotten) for name in segment.required), default=end)
            if needed < end:
                return max(needed, self.tail)
        return self.head

    def pending(self) -> int:
        """The number of blocks that a required storage still needs."""
        return self.head - self.acknowledged()

    def spooled_blocks(self) -> int:
        """The number of blocks that wait in the spool."""
        return max(0, self.spool.head - self.tail) if self.spool is not None and self.spool.files else 0

    # Room in the ring

    def free(self, forgotten: frozenset[str] = frozenset()) -> int:
        """Free the blocks that no storage needs any more; return their number."""
        old_tail = self.tail
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
        return self.tail - old_tail

    def spill(self) -> None:
        """When the ring is nearly full, write the oldest blocks that libzmq does not hold to the spool."""
        if self.ring is None or self.spool is None or not self.spool.can_write():
            return
        first = max(self.tail, self.ring.tail, self.spool.head)
        if not self.ring.nearly_full(first):
            return
        segment = next((s for s in self.segments if s.first <= first < self.end_of(s)), None)
        if segment is None:
            return
        pinned = min((index for index, _ in self.pins), default=self.head)
        records: list[SpoolRecord] = []
        size = 0
        for index in range(first, min(pinned, self.end_of(segment), first + BATCH_BLOCKS)):
            header, payload = self.ring.packed_header(index), self.ring.payload(index)
            size += len(header) + len(payload)
            if size > BATCH_BYTES or not self.ring.nearly_full(index) or not self.spool.directory.has_room(size):
                break
            # A copy, because a disk that hangs must not hold the ring's tail.
            records.append(SpoolRecord(header, bytes(payload)))
        if records:
            spool_header = SpoolHeader(
                self.producer, self.epoch, segment.run, segment.first, first, segment.layout, self.ring.made_ns,
                list(segment.required),
            )  # fmt: skip
            self.spool.write(spool_header, records)

    def leave(self) -> None:
        """Unlock all files, for the next producer of this name."""
        if self.spool is not None:
            for file in self.spool.files:
                file.leave()
        if self.ring_file is not None:
            self.ring_file.leave()

    def close(self) -> None:
        """Remove all files, because no block is pending any more."""
        if self.spool is not None:
            self.spool.free_to(self.head)
        if self.ring_file is not None:
            self.ring_file.close()
