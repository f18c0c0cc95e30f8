"""NAME.h5.journal: blocks (and ends) that were acknowledged before their chunk of the file was full.

A record is `magic, header length, payload length, CRC-32` (16 bytes, little-endian), the frame as it stands in the
stream (stream.pack), and the rows as they are stored. The CRC covers the two lengths, header and payload.

A writer that is killed leaves the beginning of a record at the end: it was never acknowledged. Everything else that is
no whole record is damage. Reading goes on at the next whole record, and a damaged journal is kept, not removed.

The journal is locked (flock) for as long as its part is open, so that nobody else writes to, or recovers, that part.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from larpixdaq import schema
from larpixdaq.errors import FileError, FileLocked, ProtocolError
from larpixdaq.protocol import stream
from larpixdaq.runtime import checksum
from larpixdaq.runtime.file_access import FileLock, in_place, lock_directory, open_regular, read_regular

MAGIC: Final = b"LDJ1"
_HEAD: Final = struct.Struct("<4sIII")
_LENGTHS: Final = struct.Struct("<II")
#: The kernel takes this many pieces a call (IOV_MAX is 1024 on Linux).
_PIECES: Final = 1000
#: Maximum bytes of a journal that is read. A writer's holds a batch of rows (some 6 MB) and the ends of its producers.
_LARGEST: Final = 1 << 30


class JournalRecord(NamedTuple):
    frame: stream.Block | stream.End
    rows: bytes  # of a block, as they are to be stored; empty for an end


class Contents(NamedTuple):
    records: list[JournalRecord]  # the whole ones, in order
    damaged: list[tuple[int, int]]  # stretches of bytes (first, behind the last) that are no whole record


class Journal:
    def __init__(self, path: Path, *, fsync: bool = False, recovery: bool = False) -> None:
        """Create and lock it. FileError when it exists already or cannot be made.

        fsync: what has been appended survives a power cut.
        recovery: take the one that a dead writer left, or make one for its lock's sake. What it holds is not cleared,
        it goes with the file; nothing can be appended. FileLocked when another process has it.
        """
        self.path = path
        self.size = 0
        #: The name under which close(remove=True) keeps the file; None: the file is removed.
        self.aside: Path | None = None
        self._fsync = fsync
        self._recovery = recovery
        self._fd, self._lock = _locked(path, recovery)

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

    def in_place(self) -> bool:
        """Whether a recovery would find it under its name."""
        return in_place(self._fd, self.path)

    def close(self, *, remove: bool = False) -> None:
        """Give the lock back; harmless when repeated."""
        if self._fd >= 0:
            if remove:
                with contextlib.suppress(OSError):  # a disk that fails: there is nothing in it that is not elsewhere
                    if self.aside is None:
                        os.unlink(self.path)
                    else:
                        os.rename(self.path, self.aside)
            self._lock.release()
            os.close(self._fd)
            self._fd = -1


def _locked(path: Path, recovery: bool) -> tuple[int, FileLock]:
    flags = os.O_RDWR | os.O_CREAT | (0 if recovery else os.O_EXCL)
    # Between a writer's open and its lock a recovery may get in. It finds an empty journal, and removes that at once.
    while True:
        try:
            fd = open_regular(path, flags)
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"cannot {'open' if recovery else 'create'} {path}: {error.strerror}") from None
        try:
            lock = lock_directory.lock(fd, path, wait=not recovery)
        except FileError:
            os.close(fd)
            if not recovery:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise
        if lock is None:
            os.close(fd)
            raise FileLocked(f"{path} is locked: another process writes or recovers this part")
        if in_place(fd, path):
            return fd, lock
        lock.release()
        os.close(fd)  # the process that had the lock has removed it, or given it another name


def records(path: Path) -> list[JournalRecord]:
    """The whole records of a journal. FileError when the file cannot be read."""
    return read(path).records


def read(path: Path) -> Contents:
    """Read a journal: its whole records, and where it is damaged. FileError when the file cannot be read."""
    data = read_regular(path, _LARGEST)
    contents = Contents([], [])
    at = 0
    while at < len(data):
        record, end = _record(data, at)
        if record is not None:
            contents.records.append(record)
            at = end
            continue
        following = _next_record(data, at)
        if following == len(data) and _is_torn(data[at:]):
            break
        contents.damaged.append((at, following))
        at = following
    return contents


def _record(data: bytes, at: int) -> tuple[JournalRecord | None, int]:
    """The whole record that begins at a byte, or None; and the byte behind it."""
    if len(data) - at < _HEAD.size:
        return None, at
    magic, header_length, payload_length, crc = _HEAD.unpack_from(data, at)
    header_end = at + _HEAD.size + header_length
    end = header_end + payload_length
    if magic != MAGIC or end > len(data):
        return None, at
    header = data[at + _HEAD.size : header_end]
    frame = _frame(header)
    if frame is None or _payload_length(frame) != payload_length:
        return None, at
    payload = data[header_end:end]
    lengths = _LENGTHS.pack(header_length, payload_length)
    if checksum.crc32(payload, checksum.crc32(header, checksum.crc32(lengths))) != crc:
        return None, at
    return JournalRecord(frame, payload), end


def _next_record(data: bytes, at: int) -> int:
    """Where the next whole record behind a byte begins; the end of the data when there is none."""
    while (at := data.find(MAGIC, at + 1)) >= 0:
        if _record(data, at)[0] is not None:
            return at
    return len(data)


def _is_torn(rest: bytes) -> bool:
    """Whether the last bytes of a journal are the beginning of a longer record, which was never whole here."""
    if len(rest) < _HEAD.size:
        return rest[: len(MAGIC)] == MAGIC[: len(rest)]
    magic, header_length, payload_length, crc = _HEAD.unpack_from(rest)
    rest = rest[_HEAD.size :]
    if magic != MAGIC or header_length > stream.MAX_HEADER or header_length + payload_length <= len(rest):
        return False
    if header_length <= len(rest):
        frame = _frame(rest[:header_length])
        return frame is not None and _payload_length(frame) == payload_length
    # Not even the header is whole, or its length is damaged: then all bytes may be here, and fit the CRC.
    lengths = _LENGTHS.pack(max(0, len(rest) - payload_length), payload_length)
    return checksum.crc32(rest, checksum.crc32(lengths)) != int(crc)


def _frame(header: bytes) -> stream.Block | stream.End | None:
    try:
        frame = stream.unpack_producer(header, "the journal")
    except ProtocolError:
        return None
    return frame if isinstance(frame, stream.Block | stream.End) else None


def _payload_length(frame: stream.Block | stream.End) -> int:
    """Bytes of rows behind a header; -1 when no header of ours says so."""
    if isinstance(frame, stream.End):
        return 0
    try:
        return frame.rows * schema.layout(frame.layout).dtype.itemsize
    except ValueError:
        return -1
