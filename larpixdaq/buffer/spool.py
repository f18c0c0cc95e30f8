"""The spool: blocks that found no more room in a producer's ring, in files on disk, oldest first.

Files are locked (flock) by their producer; what a dead one has left belongs to its successor. Nothing is synced: the
page cache outlives the process, and against a power cut the ring in memory would not help either.

All that may hang with a disk, opening, writing, reading and removing, is done by one thread: boards are read on.

A file of the spool: a header that says whose blocks it holds, and records (runtime/record_file.py) with their index,
each a block as it stands in the stream.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.buffer.ring_file import take
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.file_access import copy_content, in_place, keep_aside, make_locked, open_private, remove
from larpixdaq.runtime.record_file import RecordFormat, crc32, write_at

log = logging.getLogger(__name__)
#: Bytes and blocks that the thread writes, or reads ahead, at a time.
BATCH_BYTES: Final = 8 << 20
BATCH_BLOCKS: Final = 300
#: Bytes of rows that are kept when they have been read: one storage reads on while another one, further on, does too.
READY_BYTES: Final = 4 * BATCH_BYTES
#: A disk that has refused is asked again so often (seconds); a block that cannot be read is lost after so many times.
AGAIN: Final = 5.0
TRIES: Final = 3
_MAGIC: Final = b"LPXSPOL\x01"
_START: Final = struct.Struct("<8sII")  # magic, length and CRC-32 of the header
_FORMAT: Final = RecordFormat(b"LDS1", indexed=True)


class SpoolDirectory:
    """The spool of a producer and its predecessors: `limit` bytes at most in files that begin with `prefix`."""

    def __init__(self, path: Path, prefix: str, limit: int, worker: Worker) -> None:
        self.path = path
        self.prefix = prefix
        self.limit = limit
        self.worker = worker
        self.bytes = 0
        self.file_bytes = max(1 << 20, min(64 << 20, limit // 16), limit // 128)
        self._full = False
        self._trouble = ""
        self._again = 0.0

    def file(self, epoch: int, number: int) -> Path:
        return self.path / f"{self.prefix}-{epoch:016x}-{number:06d}.spool"

    def files(self) -> dict[int, list[Path]]:
        """Epoch -> its files, oldest first."""
        pattern = re.compile(re.escape(self.prefix) + r"-([0-9a-f]{16})-\d{6,}\.spool")
        found: dict[int, list[Path]] = {}
        try:
            names = os.listdir(self.path)
        except OSError:
            return {}
        for name in sorted(names):
            if match := pattern.fullmatch(name):
                found.setdefault(int(match[1], 16), []).append(self.path / name)
        return found

    def takes(self, size: int) -> bool:
        """Whether there is room for `size` bytes more; one alarm when the spool becomes full."""
        if self.bytes + size > self.limit:
            if not self._full:
                log.error("the spool in %s is full (--spool-limit, %d bytes)", self.path, self.limit)
            self._full = True
            return False
        if self.bytes < 0.75 * self.limit:
            self._full = False
        return True

    def rests(self) -> bool:
        """The disk has refused a moment ago."""
        return bool(self._trouble) and time.monotonic() < self._again

    def refused(self, error: OSError) -> None:
        """The disk did not take or give something: an alarm, and a pause."""
        self._again = time.monotonic() + AGAIN
        if self._trouble != (text := error.strerror or str(error)):
            log.error("the spool in %s: %s; it is tried again every %g s", self.path, text, AGAIN)
        self._trouble = text

    def worked(self) -> None:
        if self._trouble:
            log.warning("the spool in %s works again", self.path)
            self._trouble = ""


class Spool:
    """The spooled blocks of one epoch: from `tail` to `head`, with those that are lost."""

    def __init__(self, directory: SpoolDirectory, files: Sequence[SpoolFile] = ()) -> None:
        self.directory = directory
        self.files = deque(files)
        self.head = self.files[-1].next if self.files else 0
        self.writing = False
        self.lost: set[int] = set()
        #: Why a file that somebody has removed could not be written anew; empty when all is well.
        self.nameless = ""
        self._number = 0
        self._reading: int | None = None
        self._tries = 0
        self._since: float | None = None
        self._ready: dict[int, SpoolRecord] = {}  # read ahead
        self._ready_bytes = 0
        self._again = 0.0
        self._naming = False
        self._name_at = 0.0  # monotonic: not before that again, after it could not be
        directory.bytes += sum(file.size for file in self.files)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def ready(self) -> bool:
        """Whether write() may be called: one batch at a time. An alarm when the disk hangs."""
        if not self.writing:
            return not self.directory.rests()
        if self._since is not None and time.monotonic() > self._since + AGAIN:
            self._since = None
            log.error("the spool in %s: the disk has not answered for %g s", self.directory.path, AGAIN)
        return False

    def write(self, header: SpoolHeader, records: Sequence[SpoolRecord]) -> None:
        """Hand over blocks from `header.start` on; `head` moves when they are in the file. The disk may refuse."""
        file = self.files[-1] if self.files else None
        if (
            file is None
            or file.size > self.directory.file_bytes
            or file.header.run != header.run
            or file.next != header.start
        ):
            file = SpoolFile(self.directory.file(header.epoch, self._number), header)
            self._number += 1
            self.files.append(file)
        target = file
        self.writing = True
        self._since = time.monotonic()

        def written(found: tuple[list[int], int] | OSError) -> None:
            self.writing = False
            if isinstance(found, OSError):
                self.directory.refused(found)
                if not target.size:
                    self.files.remove(target)
                return
            self.directory.worked()
            offsets, size = found
            self.directory.bytes += size - target.size
            target.offsets.extend(offsets)
            target.size = size
            self.head = target.next

        self.directory.worker.submit(lambda: target.append(records), written)

    def get(self, index: int) -> SpoolRecord | None:
        """A block; LOST; or None: it is being read, ask again when the worker has something."""
        if index in self._ready:
            return self._ready[index]
        file = next((file for file in self.files if file.header.start <= index < file.next), None)
        if file is None:
            return self._lose(index, "is in none of its files")
        if self._reading is None and time.monotonic() >= self._again:
            self._read(file, index)
        return None

    def _read(self, file: SpoolFile, first: int) -> None:
        stop = min(file.next, first + BATCH_BLOCKS)
        self._reading = first

        def done(found: list[SpoolRecord] | OSError) -> None:
            self._reading = None
            if isinstance(found, OSError):
                self.directory.refused(found)
                self._again = time.monotonic() + AGAIN
                self._tries += 1
                if self._tries >= TRIES:
                    file.damaged = True
                    self._keep(first, self._lose(first, f"cannot be read: {found.strerror}"))
                    self._again = 0.0
                return
            self._tries = 0
            for index, record in enumerate(found, first):
                file.damaged |= record is LOST
                self._keep(index, self._lose(index, "is damaged") if record is LOST else record)

        self.directory.worker.submit(lambda: file.read(first, stop, BATCH_BYTES), done)

    def _keep(self, index: int, record: SpoolRecord) -> None:
        self._forget(index)
        self._ready[index] = record
        self._ready_bytes += len(record.payload)
        while self._ready_bytes > READY_BYTES and len(self._ready) > 1:
            self._forget(next(iter(self._ready)))

    def _forget(self, index: int) -> None:
        record = self._ready.pop(index, None)
        if record is not None:
            self._ready_bytes -= len(record.payload)

    def _lose(self, index: int, why: str) -> SpoolRecord:
        if index not in self.lost:
            self.lost.add(index)
            log.error("the spool in %s: block %d %s: it is missing", self.directory.path, index, why)
        return LOST

    def keep_names(self) -> None:
        """Write the files anew whose names somebody has removed: a successor would not find them."""
        if self.files and not self._naming and time.monotonic() >= self._name_at:
            self._naming = True
            files = tuple(self.files)
            self.directory.worker.submit(lambda: [file.path for file in files if file.keep_name()], self._named)

    def try_names_again(self) -> None:
        """Do not wait after a failure of keep_names(): the process ends."""
        self._name_at = 0.0

    def _named(self, found: list[Path] | OSError) -> None:
        self._naming = False
        if isinstance(found, OSError):
            self._name_at = time.monotonic() + AGAIN
            before, self.nameless = self.nameless, f"{self.directory.path}: {found.strerror or found}"
            if self.nameless != before:
                log.error("somebody has removed a file of the spool, and there is no new one yet: %s", self.nameless)
            return
        self.nameless = ""
        for path in found:
            log.warning("%s: somebody has removed this file of the spool: it was written anew", path)

    def free_to(self, index: int) -> None:
        """No block below `index` is needed any more."""
        for known in [known for known in self._ready if known < index]:
            self._forget(known)
        while self.files and self.files[0].next <= index and not (self.writing and len(self.files) == 1):
            file = self.files.popleft()
            self.directory.bytes -= file.size
            self.directory.worker.submit(file.remove, _removed)


def _removed(found: OSError | None) -> None:
    if found is not None:
        log.error("the spool: cannot remove a file: %s", found)


class SpoolHeader(msgspec.Struct, array_like=True, frozen=True):
    """Whose blocks a file holds."""

    producer: str
    epoch: int
    run: int
    first: int  # index of the run's first block
    start: int  # index of the file's first block
    layout: int
    made_ns: int  # of the epoch
    required: list[str]


class SpoolRecord(NamedTuple):
    """A block: its packed header and its rows. LOST: it was in the spool and cannot be read."""

    header: bytes
    payload: Any


LOST: Final = SpoolRecord(b"", b"")


class SpoolFile:
    """One file of the spool. `offsets` of its records; 0: one that is damaged. Used by the thread but for these.

    `damaged`: not all of it could be read, so that remove() keeps it aside. `torn`: its last record is cut short, as
    when its writer was killed; the ring has that block still.
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
        """The index behind the last block."""
        return self.header.start + len(self.offsets)

    def append(self, records: Sequence[SpoolRecord]) -> tuple[list[int], int]:
        """Write blocks behind the others; where they begin, and the file's size then. OSError: it is as it was."""
        pieces: list[Any] = []
        end = self.size
        if self._fd < 0:
            self._fd = _new(self.path)
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
        """Blocks from index `first` on, at most to `stop` and `most` bytes, but one at least."""
        found: list[SpoolRecord] = []
        size = 0
        for index in range(first, stop):
            offset = self.offsets[index - self.header.start]
            found.append(self._record(index, offset) if offset else LOST)
            size += len(found[-1].payload)
            if size >= most:
                break
        return found

    def _record(self, index: int, offset: int) -> SpoolRecord:
        size = _FORMAT.size(os.pread(self._fd, _FORMAT.head.size, offset))
        record = _FORMAT.read(os.pread(self._fd, size, offset)) if offset + size <= self.size else None
        return LOST if record is None or record.number != index else SpoolRecord(record.header, record.payload)

    def keep_name(self) -> bool:
        """Write the file anew when somebody has removed its name; whether that was so. OSError when it cannot be."""
        if self._fd < 0 or in_place(self._fd, self.path):
            return False
        file = _new(self.path)
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
                keep_aside(self.path, "not all of it could be read")
            self.leave()

    def leave(self) -> None:
        """Unlock: whoever comes next under this name delivers what is in it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @classmethod
    def adopt(cls, path: Path, producer: str, epoch: int) -> SpoolFile | None:
        """What a dead producer left; None when it is somebody's or holds nothing.

        ValueError when it holds nothing of this producer; FileError when it cannot be opened, or is another user's.
        """
        try:
            fd = open_private(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            if not take(fd, path):
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
        """Find the whole records, and whether the file is damaged or torn."""
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


def _new(path: Path) -> int:
    """A new file, locked; its directory is made anew if need be. OSError when there can be none."""
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
    raise ValueError("its header is damaged, or not one of this producer's")
