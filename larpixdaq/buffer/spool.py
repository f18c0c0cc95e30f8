"""The spool: files on the producer's disk for the oldest blocks when the ring has no more room.

A producer locks its files (flock); its successor takes over those that it leaves at its death. Nothing is synced,
because the page cache survives the process, and a power cut loses the ring in any case.

Opening, writing, reading and removing may hang with a disk, so one thread does them while boards are read.

A spool file has a header, which names the origin of its blocks, and records (runtime/record_file.py) with their index.
A record is one block: its stream header and its rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.buffer.ring_file import files_of_epochs, lock_abandoned
from larpixdaq.protocol.stream import LayoutCode
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.file_access import copy_content, in_place, make_locked, open_private, remove, rename_damaged
from larpixdaq.runtime.record_file import RecordFormat, crc32, write_at

log = logging.getLogger(__name__)
#: Maximum bytes and blocks that the thread writes, or reads ahead, at a time.
BATCH_BYTES: Final = 8 << 20
BATCH_BLOCKS: Final = 300
#: Maximum bytes of rows that stay in memory after they were read: two storages may need the same blocks one after the
#: other.
CACHE_BYTES: Final = 4 * BATCH_BYTES
#: Seconds before a failed write or read is tried again.
RETRY_INTERVAL: Final = 5.0
#: Failed reads after which a block is lost.
TRIES: Final = 3
_MAGIC: Final = b"LPXSPOL\x01"
_START: Final = struct.Struct("<8sII")  # magic, length and CRC-32 of the header
_FORMAT: Final = RecordFormat(b"LDS1", indexed=True)


class SpoolDirectory:
    """The spool files of a producer and its predecessors: at most `limit` bytes, in names that begin with `prefix`."""

    def __init__(self, path: Path, prefix: str, limit: int, worker: Worker) -> None:
        self.path = path
        self.prefix = prefix
        self.limit = limit
        self.worker = worker
        self.bytes = 0
        self.file_bytes = max(1 << 20, min(64 << 20, limit // 16), limit // 128)
        self._full = False
        self._error = ""
        self._retry_at = 0.0

    def file(self, epoch: int, number: int) -> Path:
        return self.path / f"{self.prefix}-{epoch:016x}-{number:06d}.spool"

    def files(self) -> dict[int, list[Path]]:
        """Return epoch -> its files, oldest first."""
        files: dict[int, list[Path]] = {}
        for epoch, path in files_of_epochs(self.path, self.prefix, r"-\d{6,}\.spool"):
            files.setdefault(epoch, []).append(path)
        return files

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes are within the limit; logs once when the spool becomes full."""
        if self.bytes + size > self.limit:
            if not self._full:
                log.error("the spool in %s is full (--spool-limit, %d bytes)", self.path, self.limit)
            self._full = True
            return False
        if self.bytes < 0.75 * self.limit:
            self._full = False
        return True

    def is_pausing(self) -> bool:
        """Whether the disk has failed in the last RETRY_INTERVAL seconds, so that it must not be used yet."""
        return bool(self._error) and time.monotonic() < self._retry_at

    def report_error(self, error: OSError) -> None:
        """Log that a write or read has failed, and begin a pause."""
        self._retry_at = time.monotonic() + RETRY_INTERVAL
        if self._error != (text := error.strerror or str(error)):
            log.error("the spool in %s: %s; it is tried again every %g s", self.path, text, RETRY_INTERVAL)
        self._error = text

    def report_success(self) -> None:
        """Log that a write has worked again after an error."""
        if self._error:
            log.warning("the spool in %s works again", self.path)
            self._error = ""


class Spool:
    """The spooled blocks of one epoch, up to index `head`, including lost ones."""

    def __init__(self, directory: SpoolDirectory, files: Sequence[SpoolFile] = ()) -> None:
        self.directory = directory
        self.files = deque(files)
        self.head = self.files[-1].next if self.files else 0
        self.writing = False
        self.lost: set[int] = set()
        #: Why a removed file could not be written anew; empty when all is well.
        self.name_error = ""
        self._number = 0  # of the next file
        self._reading: int | None = None  # index of the first block that the thread reads now
        self._tries = 0  # failed reads of the block that is wanted
        self._write_began: float | None = None  # monotonic; None after the alarm of a hanging disk
        self._cache: dict[int, SpoolRecord] = {}  # index -> block that was read, oldest read first
        self._cache_bytes = 0
        self._read_at = 0.0  # monotonic time before which nothing is read
        self._renewing = False  # the thread checks and renews the names of files
        self._renew_at = 0.0  # monotonic time before which names are not renewed again
        directory.bytes += sum(file.size for file in self.files)

    def can_write(self) -> bool:
        """Whether write() may be called: no batch is being written, and no pause. Logs once when the disk hangs."""
        if not self.writing:
            return not self.directory.is_pausing()
        if self._write_began is not None and time.monotonic() > self._write_began + RETRY_INTERVAL:
            self._write_began = None
            log.error("the spool in %s: the disk has not answered for %g s", self.directory.path, RETRY_INTERVAL)
        return False

    def write(self, header: SpoolHeader, records: Sequence[SpoolRecord]) -> None:
        """Have the thread write blocks from index `header.start` on. `head` moves when they are in the file."""
        last = self.files[-1] if self.files else None
        if (
            last is None
            or last.size > self.directory.file_bytes
            or last.header.run != header.run
            or last.next != header.start
        ):
            self.files.append(SpoolFile(self.directory.file(header.epoch, self._number), header))
            self._number += 1
        file = self.files[-1]
        self.writing = True
        self._write_began = time.monotonic()

        def written(result: tuple[list[int], int] | OSError) -> None:
            self.writing = False
            if isinstance(result, OSError):
                self.directory.report_error(result)
                if not file.size:
                    self.files.remove(file)
                return
            self.directory.report_success()
            offsets, size = result
            self.directory.bytes += size - file.size
            file.offsets.extend(offsets)
            file.size = size
            self.head = file.next

        self.directory.worker.submit(lambda: file.append(records), written)

    def get(self, index: int) -> SpoolRecord | None:
        """Return a block, or LOST; None while the thread reads it: call again after the worker's next result."""
        if index in self._cache:
            return self._cache[index]
        file = next((file for file in self.files if file.header.start <= index < file.next), None)
        if file is None:
            return self._report_lost(index, "is in none of its files")
        if self._reading is None and time.monotonic() >= self._read_at:
            self._read(file, index)
        return None

    def _read(self, file: SpoolFile, first: int) -> None:
        stop = min(file.next, first + BATCH_BLOCKS)
        self._reading = first

        def done(result: list[SpoolRecord] | OSError) -> None:
            self._reading = None
            if isinstance(result, OSError):
                self.directory.report_error(result)
                self._read_at = time.monotonic() + RETRY_INTERVAL
                self._tries += 1
                if self._tries >= TRIES:
                    file.damaged = True
                    self._add_to_cache(first, self._report_lost(first, f"cannot be read: {result.strerror}"))
                    self._read_at = 0.0
                return
            self._tries = 0
            for index, record in enumerate(result, first):
                file.damaged |= record is LOST
                self._add_to_cache(index, self._report_lost(index, "is damaged") if record is LOST else record)

        self.directory.worker.submit(lambda: file.read(first, stop, BATCH_BYTES), done)

    def _add_to_cache(self, index: int, record: SpoolRecord) -> None:
        self._evict(index)
        self._cache[index] = record
        self._cache_bytes += len(record.payload)
        while self._cache_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._evict(next(iter(self._cache)))

    def _evict(self, index: int) -> None:
        record = self._cache.pop(index, None)
        if record is not None:
            self._cache_bytes -= len(record.payload)

    def _report_lost(self, index: int, why: str) -> SpoolRecord:
        if index not in self.lost:
            self.lost.add(index)
            log.error("the spool in %s: block %d %s: it is lost", self.directory.path, index, why)
        return LOST

    def renew_names(self) -> None:
        """Have the thread write those files anew whose names were removed, because a successor could not find them."""
        if self.files and not self._renewing and time.monotonic() >= self._renew_at:
            self._renewing = True
            files = tuple(self.files)
            self.directory.worker.submit(lambda: [file.path for file in files if file.renew_name()], self._renewed)

    def retry_names(self) -> None:
        """Let renew_names() try again at once after a failure, because the process ends."""
        self._renew_at = 0.0

    def _renewed(self, result: list[Path] | OSError) -> None:
        self._renewing = False
        if isinstance(result, OSError):
            self._renew_at = time.monotonic() + RETRY_INTERVAL
            previous, self.name_error = self.name_error, f"{self.directory.path}: {result.strerror or result}"
            if self.name_error != previous:
                log.error("a file of the spool was removed, and there is no new one yet: %s", self.name_error)
            return
        self.name_error = ""
        for path in result:
            log.warning("%s: this file of the spool was removed; it has been replaced", path)

    def free_to(self, index: int) -> None:
        """Remove the files whose blocks are all below `index`, because no storage needs these blocks any more."""
        for freed in [freed for freed in self._cache if freed < index]:
            self._evict(freed)
        while self.files and self.files[0].next <= index and not (self.writing and len(self.files) == 1):
            file = self.files.popleft()
            self.directory.bytes -= file.size
            self.directory.worker.submit(file.remove, _removed)


def _removed(result: OSError | None) -> None:
    if result is not None:
        log.error("the spool: cannot remove a file: %s", result)


class SpoolHeader(msgspec.Struct, array_like=True, frozen=True):
    """Origin and indices of the blocks in a spool file."""

    producer: str
    epoch: int
    run: int
    first: int  # index of the run's first block
    start: int  # index of the file's first block
    layout: LayoutCode
    made_ns: int  # of the epoch
    required: list[str]


class SpoolRecord(NamedTuple):
    """A block: its packed stream header and its rows. LOST: it was in the spool and cannot be read."""

    header: bytes
    payload: Any


LOST: Final = SpoolRecord(b"", b"")


class SpoolFile:
    """One file of the spool. Only the spool's thread calls its methods that use the disk.

    `offsets`: where its records begin, in bytes; 0 for a damaged record. `size`: its bytes. `damaged`: not all of it
    could be read, so that remove() renames it to `NAME.damaged`. `torn`: its last record is incomplete, because its
    producer was killed while writing it; the ring still has that block.
    """

    def __init__(self, path: Path, header: SpoolHeader, fd: int = -1) -> None:
        self.path = path
        self.header = header
        self.offsets: array[int] = array("Q")
        self.size = 0
        self.damaged = self.torn = False
        self._fd = fd

    @property
    def next(self) -> int:
        """The index after the last block."""
        return self.header.start + len(self.offsets)

    def append(self, records: Sequence[SpoolRecord]) -> tuple[list[int], int]:
        """Append blocks; return their offsets and the new size. After an OSError the file is as it was before."""
        pieces: list[Any] = []
        end = self.size
        if self._fd < 0:
            self._fd = _make_file(self.path)
            packed = msgspec.msgpack.encode(self.header)
            pieces = [_START.pack(_MAGIC, len(packed), crc32(packed)) + packed]
            end = len(pieces[0])
        offsets = []
        for index, (header, payload) in enumerate(records, self.next):
            record = _FORMAT.pack(header, [payload], index)
            pieces += record
            offsets.append(end)
            end += sum(len(piece) for piece in record)
        try:
            write_at(self._fd, pieces, self.size)
        except OSError:
            if self.size:
                os.ftruncate(self._fd, self.size)
            else:
                self.remove()
            raise
        return offsets, end

    def read(self, first: int, stop: int, most: int) -> list[SpoolRecord]:
        """Read blocks from index `first` to below `stop`: at least one, and no more after `most` bytes."""
        records: list[SpoolRecord] = []
        size = 0
        for index in range(first, stop):
            offset = self.offsets[index - self.header.start]
            records.append(self._record(index, offset) if offset else LOST)
            size += len(records[-1].payload)
            if size >= most:
                break
        return records

    def _record(self, index: int, offset: int) -> SpoolRecord:
        size = _FORMAT.size(os.pread(self._fd, _FORMAT.head.size, offset))
        record = _FORMAT.read(os.pread(self._fd, size, offset)) if offset + size <= self.size else None
        return LOST if record is None or record.number != index else SpoolRecord(record.header, record.payload)

    def renew_name(self) -> bool:
        """Write the file anew if its name was removed; return whether it was. OSError when that fails."""
        if self._fd < 0 or in_place(self._fd, self.path):
            return False
        file = _make_file(self.path)
        try:
            copy_content(self._fd, file)
        except OSError:
            remove(file, self.path)
            os.close(file)
            raise
        os.close(self._fd)
        self._fd = file
        return True

    def remove(self) -> None:
        if self._fd >= 0:
            if not self.damaged:
                remove(self._fd, self.path)
            elif in_place(self._fd, self.path):
                rename_damaged(self.path, "not all of it could be read")
            self.leave()

    def leave(self) -> None:
        """Unlock the file and keep it for the next producer of this name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @classmethod
    def adopt(cls, path: Path, producer: str, epoch: int) -> SpoolFile | None:
        """Take over a dead producer's file; None when another process holds it, or it was not completely made.

        ValueError when it has no blocks of this producer and epoch; FileError when it belongs to another user; other
        OSErrors when it cannot be opened.
        """
        try:
            fd = open_private(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            if not lock_abandoned(fd, path):
                os.close(fd)
                return None
            with open(fd, "rb", closefd=False) as stream:
                data = stream.read()
            file = cls(path, _header(data, producer, epoch), fd)
            file._index(data)
        except BaseException:
            os.close(fd)
            raise
        return file

    def _index(self, data: bytes) -> None:
        """Find the complete records, and whether the file is damaged or torn."""
        self.size = len(data)
        end = _START.size + _START.unpack_from(data)[1]
        for record in _FORMAT.scan(data, end):
            if not self.next <= record.number < self.next + (1 << 20):
                continue
            self.damaged |= record.start != end
            self.offsets.extend([0] * (record.number - self.next))
            self.offsets.append(record.start)
            end = record.end
        if end != len(data):
            rest = data[end:]
            self.torn = _FORMAT.is_torn(rest) and (
                len(rest) < _FORMAT.head.size or _FORMAT.head.unpack_from(rest)[-1] == self.next
            )
            self.damaged |= not self.torn


def _make_file(path: Path) -> int:
    """Make a new, locked file, and its directory if that is missing. OSError when that fails."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return make_locked(path)


def _header(data: bytes, producer: str, epoch: int) -> SpoolHeader:
    if len(data) >= _START.size:
        magic, length, crc = _START.unpack_from(data)
        packed = data[_START.size : _START.size + length]
        if magic == _MAGIC and len(packed) == length and crc32(packed) == crc:
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                header = msgspec.msgpack.decode(packed, type=SpoolHeader)
                if (header.producer, header.epoch) == (producer, epoch) and 0 <= header.first <= header.start < 1 << 62:
                    return header
    raise ValueError("its header is damaged, or that of another producer")
