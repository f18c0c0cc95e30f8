"""NAME.h5.journal: blocks (and ends) that were acknowledged before their chunk of the file was full.

A record (runtime/record_file.py) has the frame as it stands in the stream (stream.pack) for its header, and the rows as
they are stored for its payload.

A writer that is killed leaves the beginning of a record at the end: it was never acknowledged. Everything else that is
no whole record is damage. Reading goes on at the next whole record, and a damaged journal is kept, not removed.

The journal is locked (flock) for as long as its part is open, so that nobody else writes to, or recovers, that part.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from larpixdaq import schema
from larpixdaq.errors import FileError, FileLocked, ProtocolError
from larpixdaq.protocol import stream
from larpixdaq.runtime.file_access import LockedFile, lock_directory, open_regular, read_regular
from larpixdaq.runtime.record_file import RecordFormat, write_at

_FORMAT: Final = RecordFormat(b"LDJ1")
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
        self._file = _locked(path, recovery)

    def append(self, records: Sequence[tuple[bytes, Sequence[Any]]]) -> None:
        """Write records, each a header and the pieces of its payload (contiguous buffers of bytes), behind the others.

        FileError when the disk does not take them; the journal then ends where it ended before.
        """
        if self._recovery:
            raise FileError(f"cannot write {self.path}: it is being recovered")
        pieces = [piece for header, payload in records for piece in _FORMAT.pack(header, payload)]
        try:
            end = write_at(self._file.file, pieces, self.size)
            if self._fsync:
                os.fdatasync(self._file.file)
        except OSError as error:
            os.ftruncate(self._file.file, self.size)
            raise FileError(f"cannot write {self.path}: {error.strerror}") from None
        self.size = end

    def clear(self) -> None:
        """Forget all records: their blocks stand in the file now."""
        if self.size:
            try:
                os.ftruncate(self._file.file, 0)
            except OSError as error:
                raise FileError(f"cannot write {self.path}: {error.strerror}") from None
            self.size = 0

    def in_place(self) -> bool:
        """Whether a recovery would find it under its name."""
        return self._file.in_place()

    def close(self, *, remove: bool = False) -> None:
        """Give the lock back; harmless when repeated."""
        if remove and self._file.file >= 0:
            with contextlib.suppress(OSError):  # a disk that fails: there is nothing in it that is not elsewhere
                if self.aside is None:
                    os.unlink(self.path)
                else:
                    os.rename(self.path, self.aside)
        self._file.close()


def _locked(path: Path, recovery: bool) -> LockedFile:
    # Between a writer's open and its lock a recovery may get in. It finds an empty journal, and removes that at once.
    flags = os.O_RDWR | os.O_CREAT | (0 if recovery else os.O_EXCL)
    try:
        file = lock_directory.open(path, flags, opener=open_regular, wait=not recovery)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot {'open' if recovery else 'create'} {path}: {error.strerror}") from None
    if file is None:
        raise FileLocked(f"{path} is locked: another process writes or recovers this part")
    return file


def records(path: Path) -> list[JournalRecord]:
    """The whole records of a journal. FileError when the file cannot be read."""
    return read(path).records


def read(path: Path) -> Contents:
    """Read a journal: its whole records, and where it is damaged. FileError when the file cannot be read."""
    data = read_regular(path, _LARGEST)
    contents = Contents([], [])
    end = 0
    for record in _FORMAT.scan(data):
        frame = _frame(record.header, len(record.payload))
        if frame is None:
            continue
        if record.start > end:
            contents.damaged.append((end, record.start))
        contents.records.append(JournalRecord(frame, bytes(record.payload)))
        end = record.end
    if end < len(data) and not _is_torn(data[end:]):
        contents.damaged.append((end, len(data)))
    return contents


def _is_torn(rest: bytes) -> bool:
    """Whether the last bytes of a journal are the beginning of a longer record, which was never whole here."""
    if not _FORMAT.is_torn(rest):
        return False
    head = _FORMAT.head
    if len(rest) < head.size:
        return True
    _, header_length, payload_length, _ = head.unpack_from(rest)
    header = rest[head.size : head.size + header_length]
    if len(header) < header_length:
        return bool(header_length <= stream.MAX_HEADER)
    return _frame(header, payload_length) is not None


def _frame(header: bytes, payload_length: int) -> stream.Block | stream.End | None:
    """The frame in a record's header; None when it is none of a journal, or has rows of another length."""
    try:
        frame = stream.unpack_producer(header, "the journal")
        if isinstance(frame, stream.Block):
            expected = frame.rows * schema.layout(frame.layout).dtype.itemsize
            return frame if payload_length == expected else None
    except (ProtocolError, ValueError):  # ValueError: an unknown layout
        return None
    return frame if isinstance(frame, stream.End) and not payload_length else None
