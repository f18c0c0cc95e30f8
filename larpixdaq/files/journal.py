"""NAME.h5.journal: blocks (and ends) that were acknowledged before their chunk of the file was full.

A record is `magic, header length, payload length, CRC-32` (16 bytes, little-endian), the frame as it stands in the
stream (blocks.pack), and the rows as they are stored. The CRC covers the two lengths, header and payload. What follows
the last whole record was being written when the writer died, and was never acknowledged.

The journal is locked (flock) for as long as its part is open, so that nobody else writes to, or recovers, that part.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from larpixdaq import blocks, checksum
from larpixdaq.errors import FileError, FileLocked, ProtocolError

MAGIC: Final = b"LDJ1"
_HEAD: Final = struct.Struct("<4sIII")
_LENGTHS: Final = struct.Struct("<II")
#: The kernel takes this many pieces a call (IOV_MAX is 1024 on Linux).
_PIECES: Final = 1000


class Record(NamedTuple):
    frame: blocks.Block | blocks.End
    rows: bytes  # of a block, as they are to be stored; empty for an end


class Journal:
    def __init__(self, path: Path, *, fsync: bool = False, recovery: bool = False) -> None:
        """Create and lock it. FileError when it exists already or cannot be made.

        fsync: what has been appended survives a power cut.
        recovery: take the one that a dead writer left, or make one for its lock's sake. What it holds is not cleared,
        it goes with the file; nothing can be appended. FileLocked when another process has it.
        """
        self.path = path
        self.size = 0
        self._fsync = fsync
        self._recovery = recovery
        self._fd = _locked(path, recovery)

    def append(self, records: Sequence[tuple[bytes, Sequence[Any]]]) -> None:
        """Write records, each a header and the pieces of its payload (contiguous buffers of bytes), behind the others.

        FileError when the disk does not take them; the journal then ends where it ended before.
        """
        if self._recovery:
            raise FileError(f"cannot write {self.path}: it is being recovered")
        parts: list[Any] = []
        for header, payload in records:
            lengths = _LENGTHS.pack(len(header), sum(len(piece) for piece in payload))
            crc = checksum.crc32(header, checksum.crc32(lengths))
            for piece in payload:
                crc = checksum.crc32(piece, crc)
            parts += [_HEAD.pack(MAGIC, *_LENGTHS.unpack(lengths), crc), header]
            parts += [piece for piece in payload if len(piece)]
        end = self.size
        try:
            for first in range(0, len(parts), _PIECES):
                end += self._write(parts[first : first + _PIECES], end)
            if self._fsync:
                os.fdatasync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self.size)
            raise FileError(f"cannot write {self.path}: {error.strerror}") from None
        self.size = end

    def _write(self, parts: list[Any], offset: int) -> int:
        views = [memoryview(part).cast("B") for part in parts]
        total = sum(len(view) for view in views)
        done = 0
        while done < total:
            n = os.pwritev(self._fd, views, offset + done)
            done += n
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if views:
                views[0] = views[0][n:]
        return total

    def clear(self) -> None:
        """Forget all records: their blocks stand in the file now."""
        if self.size:
            try:
                os.ftruncate(self._fd, 0)
            except OSError as error:
                raise FileError(f"cannot write {self.path}: {error.strerror}") from None
            self.size = 0

    def close(self, *, remove: bool = False) -> None:
        """Give the lock back; harmless when repeated."""
        if self._fd >= 0:
            if remove:
                with contextlib.suppress(OSError):  # a disk that fails: there is nothing in it that is not elsewhere
                    os.unlink(self.path)
            os.close(self._fd)
            self._fd = -1


def _locked(path: Path, recovery: bool) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if recovery else os.O_EXCL)
    # Between a writer's open and its lock a recovery may get in. It finds an empty journal, and removes that at once.
    lock = fcntl.LOCK_EX | (fcntl.LOCK_NB if recovery else 0)
    while True:
        try:
            fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise FileError(f"cannot {'open' if recovery else 'create'} {path}: {error.strerror}") from None
        try:
            fcntl.flock(fd, lock)
        except BlockingIOError:
            os.close(fd)
            raise FileLocked(f"{path} is locked: another process writes or recovers this part") from None
        except OSError as error:
            os.close(fd)
            if not recovery:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise FileError(f"cannot lock {path}: {error.strerror}") from None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # whoever had the lock has removed it


def records(path: Path) -> Iterator[Record]:
    """The whole records of a journal, one at a time; what is torn at its end is left out.

    FileError when the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while (record := _next(file, size)) is not None:
                yield record
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def _next(file: Any, size: int) -> Record | None:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, header_length, payload_length, crc = _HEAD.unpack(head)
    # Lengths from a torn record must not make us ask for gigabytes.
    if magic != MAGIC or header_length + payload_length > size - file.tell():
        return None
    header, payload = file.read(header_length), file.read(payload_length)
    lengths = _LENGTHS.pack(header_length, payload_length)
    if checksum.crc32(payload, checksum.crc32(header, checksum.crc32(lengths))) != crc:
        return None
    try:
        frame = blocks.unpack_producer(header, "the journal")
    except ProtocolError:
        return None
    return Record(frame, payload) if isinstance(frame, blocks.Block | blocks.End) else None
