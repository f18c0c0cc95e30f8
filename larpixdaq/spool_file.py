"""A file of the spool: a header that says whose blocks it holds, and records, each a block as it stands in the stream.

Whole records are good whatever happened to others: each has its index and a CRC-32 of all of it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.arena import take
from larpixdaq.checksum import crc32
from larpixdaq.file_locks import try_lock
from larpixdaq.private_files import copy_content, in_place, keep_aside, open_private, remove

_MAGIC: Final = b"LPXSPOL\x01"
_START: Final = struct.Struct("<8sII")  # magic, length and CRC-32 of the header
_RECORD_MAGIC: Final = b"LDS1"
_RECORD: Final = struct.Struct("<4sIIIQ")  # magic, lengths of header and payload, CRC-32 of all the rest, index
_CHECKED: Final = struct.Struct("<IIQ")


class Header(msgspec.Struct, array_like=True, frozen=True):
    """Whose blocks a file holds."""

    producer: str
    epoch: int
    run: int
    first: int  # index of the run's first block
    start: int  # index of the file's first block
    layout: int
    made_ns: int  # of the epoch
    required: list[str]


class Record(NamedTuple):
    """A block: its packed header and its rows. LOST: it was in the spool and cannot be read."""

    header: bytes
    payload: Any


LOST: Final = Record(b"", b"")


class File:
    """One file of the spool. `offsets` of its records; 0: one that is damaged. Used by the thread but for these.

    `damaged`: not all of it could be read, so that remove() keeps it aside. `torn`: its last record is cut short, as
    when its writer was killed; the ring has that block still.
    """

    def __init__(self, path: Path, header: Header, fd: int = -1) -> None:
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

    def append(self, records: Sequence[Record]) -> tuple[list[int], int]:
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
            lengths = (len(header), len(payload))
            crc = crc32(payload, crc32(header, crc32(_CHECKED.pack(*lengths, index))))
            pieces += [_RECORD.pack(_RECORD_MAGIC, *lengths, crc, index), header, payload]
            offsets.append(end)
            end += _RECORD.size + sum(lengths)
        try:
            self._write(pieces)
        except OSError:
            if self.size:
                os.ftruncate(self._fd, self.size)
            else:
                self.remove()
            raise
        return offsets, end

    def _write(self, pieces: list[Any]) -> None:
        at = self.size
        views = [memoryview(piece) for piece in pieces if len(piece)]
        while views:
            n = os.pwritev(self._fd, views, at)
            at += n
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if n:
                views[0] = views[0][n:]

    def read(self, first: int, stop: int, most: int) -> list[Record]:
        """Blocks from index `first` on, at most to `stop` and `most` bytes, but one at least."""
        found: list[Record] = []
        size = 0
        for index in range(first, stop):
            offset = self.offsets[index - self.header.start]
            found.append(self._record(index, offset) if offset else LOST)
            size += len(found[-1].payload)
            if size >= most:
                break
        return found

    def _record(self, index: int, offset: int) -> Record:
        head = os.pread(self._fd, _RECORD.size, offset)
        if len(head) == _RECORD.size:
            magic, header, payload, crc, found = _RECORD.unpack(head)
            if magic == _RECORD_MAGIC and found == index and offset + header + payload <= self.size:
                data = memoryview(os.pread(self._fd, header + payload, offset + _RECORD.size))
                if crc32(data, crc32(_CHECKED.pack(header, payload, index))) == crc:
                    return Record(bytes(data[:header]), data[header:])
        return LOST

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
    def adopt(cls, path: Path, producer: str, epoch: int) -> File | None:
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
        """Find the whole records; a damaged one ends where the next whole one begins, whatever its lengths say."""
        at = behind = _START.size + _START.unpack_from(data)[1]
        self.size = len(data)
        while (at := data.find(_RECORD_MAGIC, at)) >= 0 and at + _RECORD.size <= len(data):
            _, header, payload, _, index = _RECORD.unpack_from(data, at)
            end = at + _RECORD.size + header + payload
            if not self.next <= index < self.next + (1 << 20) or self._record(index, at) is LOST:
                at += 1
                continue
            self.damaged |= at != behind
            self.offsets.extend([0] * (index - self.next))
            self.offsets.append(at)
            at = behind = end
        if behind != len(data):
            self.torn = self._is_torn(data[behind : behind + _RECORD.size], len(data) - behind)
            self.damaged |= not self.torn

    def _is_torn(self, head: bytes, size: int) -> bool:
        """Whether these `size` bytes at the file's end can be the beginning of the next record."""
        if len(head) < _RECORD.size:
            return _RECORD_MAGIC.startswith(head[:4])
        magic, header, payload, _, index = _RECORD.unpack(head)
        return (magic, index) == (_RECORD_MAGIC, self.next) and size < _RECORD.size + header + payload


def _new(path: Path) -> int:
    """A new file, locked; its directory is made anew if need be. OSError when there can be none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        try_lock(file, wait=True)
    except OSError:
        remove(file, path)
        os.close(file)
        raise
    return file


def _header(data: bytes, producer: str, epoch: int) -> Header:
    if len(data) >= _START.size:
        magic, length, crc = _START.unpack_from(data)
        packed = data[_START.size : _START.size + length]
        if magic == _MAGIC and len(packed) == length and crc32(packed) == crc:
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                header = msgspec.msgpack.decode(packed, type=Header)
                if (header.producer, header.epoch) == (producer, epoch) and 0 <= header.first <= header.start < 1 << 62:
                    return header
    raise ValueError("its header is damaged, or not one of this producer's")
