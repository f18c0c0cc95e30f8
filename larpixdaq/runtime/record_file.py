"""Files of records: framing, checksums, writing, and search for the undamaged records of a damaged file.

A record is a head, a header and a payload. The head has (little-endian) the magic, the lengths of header and payload
and the CRC-32 as u32, and in some formats the record's index as u64. The CRC-32 covers both lengths, the index, header
and payload, so that a record can be checked without other records.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

#: The fastest installed module with the interface of zlib.
zlib_library: Any
try:
    from isal import isal_zlib

    zlib_library = isal_zlib
except ImportError:  # several times slower
    import zlib

    zlib_library = zlib

#: Maximum number of buffers in one call (IOV_MAX is 1024 on Linux).
_PIECES: Final = 1000


def crc32(data: Any, start: int = 0) -> int:
    """Return zlib's CRC-32 of a contiguous buffer, continued from `start`."""
    return int(zlib_library.crc32(data, start))


def write_at(file: int, pieces: Iterable[Any], at: int) -> int:
    """Write contiguous buffers, one after the other, from byte `at` on. Returns their end. Raises OSError."""
    views = deque(memoryview(piece).cast("B") for piece in pieces if len(piece))
    while views:
        n = os.pwritev(file, list(islice(views, _PIECES)), at)
        at += n
        while views and n >= len(views[0]):
            n -= len(views.popleft())
        if n:
            views[0] = views[0][n:]
    return at


class Record(NamedTuple):
    """Undamaged record: bytes `start` to `end` of its file. `number`: its index, 0 in formats without index."""

    start: int
    end: int
    number: int
    header: bytes
    payload: memoryview


class RecordFormat:
    """Format of the records in one kind of file. `head`: struct of a record's head."""

    def __init__(self, magic: bytes, *, indexed: bool = False) -> None:
        index = "Q" if indexed else ""
        self.magic = magic
        self.head = struct.Struct("<4sIII" + index)
        self._covered = struct.Struct("<II" + index)  # fields of the head that the CRC-32 covers

    def pack(self, header: bytes, payload: Sequence[Any], *index: int) -> list[Any]:
        """Return the buffers of a record. `payload`: contiguous buffers of bytes, which are not copied."""
        lengths = len(header), sum(len(piece) for piece in payload)
        crc = crc32(header, crc32(self._covered.pack(*lengths, *index)))
        for piece in payload:
            crc = crc32(piece, crc)
        return [self.head.pack(self.magic, *lengths, crc, *index), header, *payload]

    def size(self, data: bytes, at: int = 0) -> int:
        """Return the size of the record whose head begins at byte `at`, by its lengths; 0 if there is no head."""
        if len(data) - at < self.head.size or not data.startswith(self.magic, at):
            return 0
        _, header, payload, *_ = self.head.unpack_from(data, at)
        return int(self.head.size + header + payload)

    def read(self, data: bytes, at: int = 0) -> Record | None:
        """Return the undamaged record that begins at byte `at`, or None."""
        size = self.size(data, at)
        if not 0 < size <= len(data) - at:
            return None
        _, header, payload, crc, *index = self.head.unpack_from(data, at)
        content = memoryview(data)[at + self.head.size : at + size]
        if crc32(content, crc32(self._covered.pack(header, payload, *index))) != crc:
            return None
        return Record(at, at + size, index[0] if index else 0, bytes(content[:header]), content[header:])

    def scan(self, data: bytes, at: int = 0) -> Iterator[Record]:
        """Yield the undamaged records from byte `at` on.

        Lengths of damaged records are not used: the search continues one byte later.
        """
        while (at := data.find(self.magic, at)) >= 0:
            record = self.read(data, at)
            if record is None:
                at += 1
            else:
                yield record
                at = record.end

    def is_torn(self, rest: bytes) -> bool:
        """Return whether `rest`, the last bytes of a file, is the beginning of a record that was not written whole."""
        if len(rest) < self.head.size:
            return self.magic.startswith(rest[: len(self.magic)])
        if self.size(rest) <= len(rest):
            return False
        # If only a length is damaged, all other bytes are there, and fit the CRC-32 with the true length.
        _, header, payload, crc, *index = self.head.unpack_from(rest)
        content = memoryview(rest)[self.head.size :]
        true_lengths = (len(content) - payload, payload), (header, len(content) - header)
        return not any(
            min(lengths) >= 0 and crc32(content, crc32(self._covered.pack(*lengths, *index))) == crc
            for lengths in true_lengths
        )
