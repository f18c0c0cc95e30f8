"""What a dead producer has left, in its ring and in its spool: found by the next one of its name, closed, handed on.

A run that it did not end gets an end record `recovered` from the counters of its last checkpoint, which belong to
exactly the rows that it had published: what it had decoded since then is neither counted nor delivered.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from larpixdaq import schema
from larpixdaq._native.ring_buffer import END
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.ring_file import RingFile, arenas, kept_aside
from larpixdaq.buffer.spool import SpoolDirectory, SpoolFile
from larpixdaq.errors import FileError, ProtocolError, RingError
from larpixdaq.protocol.stream import Block, End, LossVerdict, unpack_producer
from larpixdaq.runtime.file_access import keep_aside
from larpixdaq.runtime.record_file import crc32

log = logging.getLogger(__name__)

DIED = "its producer died: data that the boards sent until its successor had connected are lost"


class LeftBlocks(NamedTuple):
    """What one predecessor has left, locked: its ring, its files of the spool, and its end records (run -> END)."""

    epoch: int
    arena: RingFile | None
    files: list[SpoolFile]
    ends: dict[int, End]


class Predecessors:
    """Looks for arenas and spool files of `producer` that nobody holds."""

    def __init__(
        self, producer: str, state_dir: Path, ring_dir: Path, spool: SpoolDirectory, listening_ns: int
    ) -> None:
        """`listening_ns`: unix ns when this producer began to listen to its boards."""
        self._producer = producer
        self._state_dir = state_dir
        self._ring_dir = ring_dir
        self._spool = spool
        self._listening_ns = listening_ns
        #: Files that were kept aside because they could not be read whole, as of the last look.
        self.aside: list[Path] = []
        self._refused: dict[Path, str] = {}

    def look(self, known: Collection[int]) -> list[LeftBlocks]:
        """Take over what there is of other epochs than these, and lock it. May hang with the spool's disk."""
        # Beside the spool stands the ring of a producer that found no room for it in its own directory at its end.
        rings = arenas(self._spool.path, self._state_dir, self._producer)
        rings |= arenas(self._ring_dir, self._state_dir, self._producer)
        spooled = self._spool.files()
        found = []
        for epoch in sorted((rings.keys() | spooled.keys()) - set(known)):
            left = self._take(epoch, rings.get(epoch), spooled.get(epoch, []))
            if left is not None:
                found.append(left)
        directories = {self._ring_dir, self._spool.path}
        self.aside = [path for directory in directories for path in kept_aside(directory, self._spool.prefix)]
        return found

    def _take(self, epoch: int, ring: Path | None, paths: list[Path]) -> LeftBlocks | None:
        arena = None
        if ring is not None:
            try:
                arena = RingFile.adopt(ring, self._producer, epoch)
                if arena is None:
                    return None  # it lives
                self._check(arena)
            except FileError as error:
                self._refuse(ring, error)
                return None  # its spool waits with it: a known epoch is not looked at again
            except RingError as error:
                if arena is not None:
                    arena.leave()
                arena = None
                keep_aside(ring, f"cannot be taken over: {error}")
        ends: dict[int, End] = {}
        if arena is not None:
            self._finish(arena)
            arena.shrink()
            ends = _ends(arena)
        files: list[SpoolFile] = []
        for path in paths:
            try:
                file = SpoolFile.adopt(path, self._producer, epoch)
            except OSError as error:
                self._refuse(path, error)
                # Nothing of this epoch yet: a storage that has later blocks counts those of this file as duplicates.
                for taken in files:
                    taken.leave()
                if arena is not None:
                    arena.leave()
                return None
            except ValueError as error:
                keep_aside(path, f"cannot be taken over: {error}")
                continue
            if file is not None:
                # What was being written to the spool when the producer died is in its ring still, unless that is gone.
                file.damaged |= file.torn and (arena is None or arena.ring.tail > file.next)
                files.append(file)
        return LeftBlocks(epoch, arena, files, ends) if arena is not None or files else None

    def _refuse(self, path: Path, error: OSError) -> None:
        """A file that cannot be opened now, or is another user's, is left alone: it is looked at again. Logged once."""
        text = str(error) if isinstance(error, FileError) else f"{path}: {error.strerror}"
        if self._refused.get(path) != text:
            self._refused[path] = text
            log.error("not taken over: %s", text)

    def _check(self, arena: RingFile) -> None:
        """RingError when a header does not fit its descriptor; rows that are not those that were sent are damage."""
        ring = arena.ring
        for run, _, code, size, *_ in ring.runs():
            if code not in [known.code for known in schema.LAYOUTS] or schema.layout(code).dtype.itemsize != size:
                raise RingError(f"run {run} has rows of {size} bytes in layout {code}")
        for index in range(ring.tail, ring.head):
            try:
                frame = unpack_producer(ring.packed_header(index), "the ring")
            except ProtocolError as error:
                raise RingError(f"block {index}: {error}") from None
            fits = isinstance(frame, End) == (ring.kind(index) == END)
            if not fits or not isinstance(frame, Block | End) or frame.source[1:] != (self._producer, ring.epoch):
                raise RingError(f"block {index}: its header is another's")
            if isinstance(frame, Block) and crc32(ring.payload(index)) != frame.crc32:
                log.error("%s: block %d is damaged", arena.path, index)
                arena.damaged = True

    def _finish(self, arena: RingFile) -> None:
        """Close what its producer had not closed. Killed in the middle of it: the next one goes on."""
        ring = arena.ring
        if not ring.run_open:
            return
        run, _, code, _, began_ns, io_groups, *_ = ring.runs()[-1]
        died = ring.alive_ns
        recorder = BlockBuilder(ring, self._producer, ring.epoch, schema.layout(code), io_groups, wall=lambda: died)
        recorder.resume(run, began_ns)
        until = max(died, self._listening_ns)
        verdicts = [LossVerdict(group, "suspect", DIED, 0, died, until) for group in io_groups if group]
        recorder.end("recovered", [], recorder.counts(ring.outside), verdicts)


def _ends(arena: RingFile) -> dict[int, End]:
    ring = arena.ring
    found = {}
    for index in range(ring.tail, ring.head):
        if ring.kind(index) == END:
            end = unpack_producer(ring.packed_header(index), "the ring")
            assert isinstance(end, End)
            found[end.run] = end
    return found
