"""NAME.h5.journal: blocks and end records that were acknowledged before their chunk of the file was full.

In a record (runtime/record_file.py) the header is the frame as in the stream (stream.pack), and the payload is the
block's rows as they are stored.

A killed writer may leave the beginning of a record at the end, which was never acknowledged. All other bytes outside of
whole records are damage. Reading continues at the next whole record, and a damaged journal is kept, not removed.

The journal is locked (flock) while its part is open, so that no other process writes or recovers that part.
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
#: Maximum bytes of a journal that is read. A journal has at most a batch of rows (some 6 MB) and some end records.
_MAX_BYTES: Final = 1 << 30


class JournalRecord(NamedTuple):
    frame: stream.Block | stream.End
    rows: bytes  # rows of a block as they are stored; empty for an end record


class Contents(NamedTuple):
    records: list[JournalRecord]  # whole records, in order
    damaged: list[tuple[int, int]]  # stretches of bytes (first, after the last) outside of whole records


class Journal:
    def __init__(self, path: Path, *, fsync: bool = False, recovery: bool = False) -> None:
        """Create and lock the journal. FileError when it exists already or cannot be created.

        fsync: appended records survive a power cut.
        recovery: open the journal of a dead writer, or create one for its lock. Its records stay, and none can be
        appended. FileLocked when another process has locked it.
        """
        self.path = path
        self.size = 0
        #: The name under which close(remove=True) keeps the file; None: the file is removed.
        self.kept_path: Path | None = None
        self._fsync = fsync
        self._recovery = recovery
        self._file = _locked(path, recovery)

    def append(self, records: Sequence[tuple[bytes, Sequence[Any]]]) -> None:
        """Append records, each a header and the pieces of its payload (contiguous buffers of bytes).

        FileError when the disk fails; the journal then has its previous records only.
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
        """Remove all records, after their blocks have been written to the part."""
        if self.size:
            try:
                os.ftruncate(self._file.file, 0)
            except OSError as error:
                raise FileError(f"cannot write {self.path}: {error.strerror}") from None
            self.size = 0

    def in_place(self) -> bool:
        """Whether the journal still has its name, by which a recovery finds it."""
        return self._file.in_place()

    def close(self, *, remove: bool = False) -> None:
        """Close the journal and release its lock. Harmless when repeated."""
        if remove and self._file.file >= 0:
            with contextlib.suppress(OSError):  # on a failing disk it may stay, because its blocks are in the part
                if self.kept_path is None:
                    os.unlink(self.path)
                else:
                    os.rename(self.path, self.kept_path)
        self._file.close()


def _locked(path: Path, recovery: bool) -> LockedFile:
    # A recovery may take the lock between a writer's open and its lock; it removes the empty journal at once. So the
    # writer waits for the lock.
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


def read(path: Path) -> Contents:
    """Read the whole records of a journal, and find its damaged stretches. FileError when the file cannot be read."""
    data = read_regular(path, _MAX_BYTES)
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


def _is_torn(tail: bytes) -> bool:
    """Whether the last bytes of a journal are the beginning of a longer record, which was never whole."""
    if not _FORMAT.is_torn(tail):
        return False
    head = _FORMAT.head
    if len(tail) < head.size:
        return True
    _, header_length, payload_length, _ = head.unpack_from(tail)
    header = tail[head.size : head.size + header_length]
    if len(header) < header_length:
        return bool(header_length <= stream.MAX_HEADER)
    return _frame(header, payload_length) is not None


def _frame(header: bytes, payload_length: int) -> stream.Block | stream.End | None:
    """Unpack the frame in a record's header; None unless it is an end record, or a block with rows of this length."""
    try:
        frame = stream.unpack_producer(header, "the journal")
        if isinstance(frame, stream.Block):
            expected = frame.rows * schema.layout(frame.layout).dtype.itemsize
            return frame if payload_length == expected else None
    except (ProtocolError, ValueError):  # ValueError: an unknown layout
        return None
    return frame if isinstance(frame, stream.End) and not payload_length else None
