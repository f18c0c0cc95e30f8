"""The first 48 bytes of an HDF5 file, versions 2 and 3: what a killed writer left in them, put right.

signature 8 bytes, version u8, size of offsets u8, size of lengths u8, consistency flags u8, base address u64, address
of the extension u64, end-of-file address u64, address of the root group u64, checksum u32 (lookup3 of all before it).

A writer sets the flags while it has the file open, and a dead one leaves them; its end-of-file address is that of the
moment when it began. With the flags alone cleared the file opens, and what was written since cannot be reached.

Global heaps, where HDF5 keeps the texts of variable-length attributes: looked at before the library reads them.

Alone of what makes up a file of ours, they have no checksum, and a damaged length in one sends the library (2.0 too)
round a loop without end, in which it holds the interpreter: no thread and no signal helps. A collection is "GCOL",
version 1, 3 bytes, its length u64 (with these 16 bytes), and objects: number u16, references u16, 4 bytes, length u64,
then the object, filled up to 8 bytes. Number 0 is free space, whose length has its header in it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

from larpixdaq.errors import FileError

SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
#: Consistency flags: some writer has the file open, and it writes in the order that readers rely on (SWMR).
WRITING: Final = 0x01
SWMR: Final = 0x04
SIZE: Final = 48
_FIELDS: Final = struct.Struct("<8sBBBBQQQQI")
_NOWHERE: Final = (1 << 64) - 1
_MASK: Final = 0xFFFFFFFF
#: Collections are looked for in so many first bytes: the attributes are made with the file (in ours, and in those of
#: larpix-control, the only collection lies at 2048).
REACH: Final = 1 << 16
#: What is shorter, or reaches beyond the file's end, the library refuses by itself.
SHORTEST: Final = 4096
_SIGNATURE: Final = b"GCOL\x01"
_LENGTH: Final = struct.Struct("<8xQ")
_OBJECT: Final = struct.Struct("<H6xQ")


class Superblock(NamedTuple):
    signature: bytes
    version: int
    offset_bytes: int
    length_bytes: int
    flags: int
    base: int
    extension: int
    end: int
    root: int
    checksum: int


def read_superblock(path: Path) -> Superblock | None:
    """None when the file does not begin as HDF5 files do, or ends there; FileError when it does and the rest is not
    what it should be, or when it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    if not data.startswith(SIGNATURE) or len(data) < SIZE:
        return None
    name = f"{path}: superblock"
    found = Superblock(*_FIELDS.unpack(data))
    if found.version not in (2, 3) or (found.offset_bytes, found.length_bytes) != (8, 8):
        raise FileError(
            f"{name}: expected version 2 or 3 with offsets and lengths of 8 bytes, found version {found.version} with"
            f" {found.offset_bytes} and {found.length_bytes}"
        )
    if found.checksum != (expected := lookup3(data[:-4])):
        raise FileError(f"{name}: expected checksum {expected:08x}, found {found.checksum:08x}")
    return found


def is_growing(path: Path) -> bool:
    """Whether somebody writes the file, or died while writing it: it can be read as a growing file (SWMR) only.
    FileError as of read(); of older versions, which know no SWMR, the HDF5 library is the judge."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(SIGNATURE) + 1)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    if start[:-1] != SIGNATURE or start[-1] not in (2, 3):
        return False
    found = read_superblock(path)
    return found is not None and found.flags != 0


def closed(found: Superblock, size: int) -> bytes:
    """The superblock of the same file, closed with so many bytes."""
    data = _FIELDS.pack(*found._replace(flags=0, end=size, checksum=0))[:-4]
    return data + struct.pack("<I", lookup3(data))


def repair_superblock(path: Path) -> None:
    """Make it that of a closed file: flags 0, the end where the file ends. Synced; FileError as of read(), and when
    it is no HDF5 file."""
    found = read_superblock(path)
    if found is None:
        raise FileError(f"{path}: it is not an HDF5 file")
    if found.base:
        raise FileError(f"{path}: superblock: expected base address 0, found {found.base}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            for what, address in (("root group", found.root), ("extension", found.extension)):
                if not SIZE <= address < size and (what, address) != ("extension", _NOWHERE):
                    raise FileError(f"{path}: superblock: its {what} is at {address}, the file has {size} bytes")
            os.pwrite(fd, closed(found, size), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot repair {path}: {error.strerror}") from None


def _rotated(value: int, bits: int) -> int:
    return (value << bits | value >> 32 - bits) & _MASK


def lookup3(data: bytes) -> int:
    """Bob Jenkins' lookup3 (hashlittle, initial value 0), which HDF5 puts behind its metadata."""
    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    if not data:
        return c
    words = struct.unpack(f"<{(len(data) + 11) // 12 * 3}I", data.ljust((len(data) + 11) // 12 * 12, b"\0"))
    for at in range(0, len(words), 3):
        a, b, c = (a + words[at]) & _MASK, (b + words[at + 1]) & _MASK, (c + words[at + 2]) & _MASK
        if at + 3 == len(words):
            break
        a = (a - c) & _MASK ^ _rotated(c, 4)
        c = (c + b) & _MASK
        b = (b - a) & _MASK ^ _rotated(a, 6)
        a = (a + c) & _MASK
        c = (c - b) & _MASK ^ _rotated(b, 8)
        b = (b + a) & _MASK
        a = (a - c) & _MASK ^ _rotated(c, 16)
        c = (c + b) & _MASK
        b = (b - a) & _MASK ^ _rotated(a, 19)
        a = (a + c) & _MASK
        c = (c - b) & _MASK ^ _rotated(b, 4)
        b = (b + a) & _MASK
    c = ((c ^ b) - _rotated(b, 14)) & _MASK
    a = ((a ^ c) - _rotated(c, 11)) & _MASK
    b = ((b ^ a) - _rotated(a, 25)) & _MASK
    c = ((c ^ b) - _rotated(b, 16)) & _MASK
    a = ((a ^ c) - _rotated(c, 4)) & _MASK
    b = ((b ^ a) - _rotated(a, 14)) & _MASK
    return ((c ^ b) - _rotated(b, 24)) & _MASK


def check_heaps(path: Path) -> None:
    """FileError when the file cannot be read, or holds a global heap that the HDF5 library might not come back from."""
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            start = file.read(REACH + _LENGTH.size)
            place = -1
            while (place := start.find(_SIGNATURE, place + 1, REACH)) >= 0 and place + _LENGTH.size <= len(start):
                (length,) = _LENGTH.unpack_from(start, place)
                if SHORTEST <= length <= end - place:
                    file.seek(place)
                    _walk(f"{path}: global heap at byte {place}", file.read(length))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def _walk(name: str, heap: bytes) -> None:
    """The objects of a collection, one after the other; FileError when they do not lead to its end."""
    at = _LENGTH.size
    while (left := len(heap) - at) >= _OBJECT.size:
        number, size = _OBJECT.unpack_from(heap, at)
        taken = _OBJECT.size + (size + 7) // 8 * 8 if number else size
        if not _OBJECT.size <= taken <= left:
            raise FileError(f"{name}: damaged: object {number} takes {taken} bytes, expected {_OBJECT.size} to {left}")
        at += taken
