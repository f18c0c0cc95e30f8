"""Takeover: the next producer of the same name finds a dead producer's ring and spool, locks them and ends its run.

A run that the dead producer did not end gets an end record `recovered`. Its counters are those of the last checkpoint,
which belong to exactly the rows that were published. Rows that were decoded later are neither counted nor delivered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

from larpixdaq import schema
from larpixdaq._native.ring_buffer import END
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.ring_file import RingFile, damaged_files, ring_files
from larpixdaq.buffer.spool import SpoolDirectory, SpoolFile
from larpixdaq.errors import FileError, ProtocolError, RingError
from larpixdaq.protocol.stream import Block, End, LossVerdict, unpack_producer
from larpixdaq.runtime.file_access import rename_damaged
from larpixdaq.runtime.record_file import crc32

log = logging.getLogger(__name__)

#: Limits of counters and times (unix ns) in the frames of a stream.
_MOST_COUNTED: Final = 1 << 56
_LAST_TIME: Final = (1 << 63) - 1
_DIED = "its producer died: data that the boards sent until its successor had connected are lost"


class LeftBlocks(NamedTuple):
    """The locked files of one predecessor: its ring, its spool files, and the end records in the ring (run -> END)."""

    epoch: int
    ring_file: RingFile | None
    files: list[SpoolFile]
    ends: dict[int, End]


class Predecessors:
    """Finds the ring and spool files of dead producers of the name `producer`."""

    def __init__(
        self, producer: str, state_dir: Path, ring_dir: Path, spool: SpoolDirectory, listening_ns: int
    ) -> None:
        """`listening_ns`: unix ns when this producer began to read its boards."""
        self._producer = producer
        self._state_dir = state_dir
        self._ring_dir = ring_dir
        self._spool = spool
        self._listening_ns = listening_ns
        #: Damaged files that the last call of take_over() found.
        self.kept_aside: list[Path] = []
        self._left_alone: dict[Path, str] = {}  # files that were not taken over, and why

    def take_over(self, known: Collection[int]) -> list[LeftBlocks]:
        """Take over and lock the files of all epochs but the `known` ones. Blocks while the spool's disk hangs."""
        # A producer whose ring directory had no room at its end has moved its ring into the spool's directory.
        rings = ring_files(self._spool.path, self._state_dir, self._producer)
        rings |= ring_files(self._ring_dir, self._state_dir, self._producer)
        spooled = self._spool.files()
        taken = []
        for epoch in sorted((rings.keys() | spooled.keys()) - set(known)):
            left = self._take_over_epoch(epoch, rings.get(epoch), spooled.get(epoch, []))
            if left is not None:
                taken.append(left)
        directories = {self._ring_dir, self._spool.path}
        self.kept_aside = [path for directory in directories for path in damaged_files(directory, self._spool.prefix)]
        return taken

    def _take_over_epoch(self, epoch: int, ring: Path | None, paths: list[Path]) -> LeftBlocks | None:
        ring_file, ends = None, {}
        if ring is not None:
            try:
                ring_file = RingFile.adopt(ring, self._producer, epoch)
                if ring_file is None:
                    return None  # its producer lives, or died before the ring was made
                ends = self._check(ring_file)
                self._close_run(ring_file, ends)
            except FileError as error:
                self._leave_alone(ring, error)
                return None  # the spool waits too, because a known epoch is not taken over a second time
            except RingError as error:
                if ring_file is not None:
                    ring_file.leave()
                ring_file = None
                rename_damaged(ring, f"cannot be taken over: {error}")
        if ring_file is not None:
            ring_file.shrink()
        files: list[SpoolFile] = []
        for path in paths:
            try:
                file = SpoolFile.adopt(path, self._producer, epoch)
            except OSError as error:
                self._leave_alone(path, error)
                # No file of this epoch then, because a storage with later blocks would take those of this file, when
                # they come, for duplicates.
                for taken in files:
                    taken.leave()
                if ring_file is not None:
                    ring_file.leave()
                return None
            except ValueError as error:
                rename_damaged(path, f"cannot be taken over: {error}")
                continue
            if file is not None:
                # The ring still has the block that was being written to the spool, unless there is no ring any more.
                file.damaged |= file.torn and (ring_file is None or ring_file.ring.tail > file.next)
                files.append(file)
        return LeftBlocks(epoch, ring_file, files, ends) if ring_file is not None or files else None

    def _leave_alone(self, path: Path, error: OSError) -> None:
        """Log, once, that a file cannot be opened or is another user's. The next take_over() tries it again."""
        text = str(error) if isinstance(error, FileError) else f"{path}: {error.strerror}"
        if self._left_alone.get(path) != text:
            self._left_alone[path] = text
            log.error("not taken over: %s", text)

    def _check(self, ring_file: RingFile) -> dict[int, End]:
        """Check the headers of all blocks, and return the end records (run -> END). RingError for a wrong header; rows
        whose CRC-32 is wrong, and impossible counters, make the ring `damaged`."""
        ends = {}
        ring = ring_file.ring
        for run, _, code, size, *_ in ring.runs():
            if code not in [known.code for known in schema.LAYOUTS] or schema.layout(code).dtype.itemsize != size:
                raise RingError(f"run {run} has rows of {size} bytes in layout {code}")
        for index in range(ring.tail, ring.head):
            try:
                frame = unpack_producer(ring.packed_header(index), "the ring")
            except ProtocolError as error:
                raise RingError(f"block {index}: {error}") from None
            matches = isinstance(frame, End) == (ring.kind(index) == END)
            if not matches or not isinstance(frame, Block | End) or frame.origin[1:] != (self._producer, ring.epoch):
                raise RingError(f"block {index}: its header belongs to another block")
            if isinstance(frame, End):
                ends[frame.run] = frame
            elif crc32(ring.payload(index)) != frame.crc32:
                log.error("%s: block %d is damaged", ring_file.path, index)
                ring_file.damaged = True
        gaps = ring.gaps
        numbers, times = (ring.counts, ring.outside_counts, gaps[:, 0]), gaps[:, 1:]
        if any((number >= _MOST_COUNTED).any() for number in numbers) or (times > _LAST_TIME).any():
            log.error("%s: its counters are damaged, and left out", ring_file.path)
            ring_file.damaged = True
            for table in (ring.counts, ring.outside_counts, gaps):
                table[:] = 0
        return ends

    def _close_run(self, ring_file: RingFile, ends: dict[int, End]) -> None:
        """Close the open block, and end the open run with an end record.

        If this process is killed meanwhile, the next one continues. RingError when no consumer would take the result.
        """
        ring = ring_file.ring
        if not ring.run_open:
            return
        run, _, code, _, began_ns, io_groups, *_ = ring.runs()[-1]
        died_ns = min(ring.alive_ns, time.time_ns())
        first = ring.head
        recorder = BlockBuilder(ring, self._producer, ring.epoch, schema.layout(code), io_groups, wall=lambda: died_ns)
        recorder.resume(run, began_ns)
        until_ns = max(died_ns, self._listening_ns)
        verdicts = [LossVerdict(group, "suspect", _DIED, 0, died_ns, until_ns) for group in io_groups if group]
        ends[run] = recorder.end("recovered", [], recorder.counts(ring.outside_counts), verdicts)
        try:
            for index in range(first, ring.head):
                unpack_producer(ring.packed_header(index), "the ring")
        except ProtocolError as error:
            raise RingError(f"run {run} cannot be ended: {error}") from None
