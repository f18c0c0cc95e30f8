"""Superblock and global heaps of an HDF5 file: checked before the HDF5 library reads them, and repaired.

The superblock is the first 48 bytes of a file (versions 2 and 3): signature 8 bytes, version u8, size of offsets u8,
size of lengths u8, consistency flags u8, base address u64, address of the extension u64, end-of-file address u64,
address of the root group u64, checksum u32 (lookup3 of all bytes before it). A writer sets the flags while it has the
file open, and a killed writer leaves them set. Its end-of-file address is still that of the moment when it began: with
the flags alone cleared the file opens, but everything written since is out of reach.

Global heaps hold the texts of variable-length attributes. They are the only part of our files without a checksum, and
a damaged length in one sends the HDF5 library (also 2.0) into an endless loop that holds the interpreter, so that no
thread and no signal helps. A collection is "GCOL", version 1, 3 bytes, its length u64 (with these 16 bytes), and
objects: number u16, references u16, 4 bytes, length u64, then the object, filled up to 8 bytes. Number 0 is free
space, whose length includes its header.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

from larpixdaq.errors import FileError

SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
#: Consistency flags: a writer has the file open, and it writes in the order that readers rely on (SWMR).
WRITING: Final = 0x01
SWMR: Final = 0x04
SIZE: Final = 48
_FIELDS: Final = struct.Struct("<8sBBBBQQQQI")
_NO_ADDRESS: Final = (1 << 64) - 1
_MASK: Final = 0xFFFFFFFF
#: Collections are searched in this many first bytes, because the attributes are made with the file: in our files and
#: in those of larpix-control the only collection is at byte 2048.
_HEAP_REACH: Final = 1 << 16
#: Minimum length of a collection. The HDF5 library itself refuses shorter ones, and those that exceed the file.
_MIN_HEAP_BYTES: Final = 4096
_HEAP_SIGNATURE: Final = b"GCOL\x01"
_HEAP_LENGTH: Final = struct.Struct("<8xQ")
_HEAP_OBJECT: Final = struct.Struct("<H6xQ")


class Superblock(NamedTuple):
    """Fields of a superblock, in the order of the file."""

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
    """Read and check the superblock; None when the file is shorter, or does not begin as HDF5 files do.

    FileError for another version, other sizes or a wrong checksum, and when the file cannot be read.
    """
    data = _read_start(path, SIZE)
    if not data.startswith(SIGNATURE) or len(data) < SIZE:
        return None
    name = f"{path}: superblock"
    superblock = Superblock(*_FIELDS.unpack(data))
    if superblock.version not in (2, 3) or (superblock.offset_bytes, superblock.length_bytes) != (8, 8):
        raise FileError(
            f"{name}: expected version 2 or 3 with offsets and lengths of 8 bytes, found version {superblock.version}"
            f" with {superblock.offset_bytes} and {superblock.length_bytes}"
        )
    if superblock.checksum != (expected := lookup3(data[:-4])):
        raise FileError(f"{name}: expected checksum {expected:08x}, found {superblock.checksum:08x}")
    return superblock


def growing_superblock(path: Path) -> Superblock | None:
    """Read the superblock of a file that a process writes, or died while writing; None for a closed file.

    Such a file can only be read as a growing one (SWMR). None also for the versions before 2, which have no SWMR and
    which the HDF5 library checks itself. FileError as of read_superblock().
    """
    if _read_start(path, len(SIGNATURE) + 1)[len(SIGNATURE) :] not in (b"\x02", b"\x03"):
        return None
    superblock = read_superblock(path)
    return superblock if superblock is not None and superblock.flags else None


def closed_superblock(superblock: Superblock, size: int) -> bytes:
    """Pack the superblock of the same file as if it had been closed with `size` bytes."""
    data = _FIELDS.pack(*superblock._replace(flags=0, end=size, checksum=0))[:-4]
    return data + struct.pack("<I", lookup3(data))


def repair_superblock(path: Path) -> None:
    """Write the superblock of a closed file (flags 0, end-of-file address = file size), and sync.

    FileError as of read_superblock(), when it is no HDF5 file, and when the disk fails.
    """
    superblock = read_superblock(path)
    if superblock is None:
        raise FileError(f"{path}: it is not an HDF5 file")
    if superblock.base:
        raise FileError(f"{path}: superblock: expected base address 0, found {superblock.base}")
    addresses = [("root group", superblock.root)]
    if superblock.extension != _NO_ADDRESS:
        addresses.append(("extension", superblock.extension))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            for name, address in addresses:
                if not SIZE <= address < size:
                    raise FileError(f"{path}: superblock: its {name} is at {address}, the file has {size} bytes")
            os.pwrite(fd, closed_superblock(superblock, size), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot repair {path}: {error.strerror}") from None


def check_heaps(path: Path) -> None:
    """FileError when a global heap could send the HDF5 library into an endless loop, or the file cannot be read."""
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            start = file.read(_HEAP_REACH + _HEAP_LENGTH.size)
            place = -1
            while (place := start.find(_HEAP_SIGNATURE, place + 1, _HEAP_REACH)) >= 0:
                if place + _HEAP_LENGTH.size > len(start):
                    break
                (length,) = _HEAP_LENGTH.unpack_from(start, place)
                if _MIN_HEAP_BYTES <= length <= end - place:
                    file.seek(place)
                    _check_heap(f"{path}: global heap at byte {place}", file.read(length))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def _check_heap(name: str, heap: bytes) -> None:
    """FileError when the lengths of the objects do not lead to the end of the collection."""
    at = _HEAP_LENGTH.size
    while (left := len(heap) - at) >= _HEAP_OBJECT.size:
        number, size = _HEAP_OBJECT.unpack_from(heap, at)
        taken = _HEAP_OBJECT.size + (size + 7) // 8 * 8 if number else size
        if not _HEAP_OBJECT.size <= taken <= left:
            raise FileError(
                f"{name}: damaged: object {number} takes {taken} bytes, expected {_HEAP_OBJECT.size} to {left}"
            )
        at += taken


def _read_start(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None


def lookup3(data: bytes) -> int:
    """Compute Bob Jenkins' lookup3 (hashlittle, initial value 0), the checksum of HDF5 metadata."""
    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    if not data:
        return c
    words = struct.unpack(f"<{(len(data) + 11) // 12 * 3}I", data.ljust((len(data) + 11) // 12 * 12, b"\0"))
    for at in range(0, len(words), 3):
        a, b, c = (a + words[at]) & _MASK, (b + words[at + 1]) & _MASK, (c + words[at + 2]) & _MASK
        if at + 3 == len(words):
            break
        a = (a - c) & _MASK ^ _rotate(c, 4)
        c = (c + b) & _MASK
        b = (b - a) & _MASK ^ _rotate(a, 6)
        a = (a + c) & _MASK
        c = (c - b) & _MASK ^ _rotate(b, 8)
        b = (b + a) & _MASK
        a = (a - c) & _MASK ^ _rotate(c, 16)
        c = (c + b) & _MASK
        b = (b - a) & _MASK ^ _rotate(a, 19)
        a = (a + c) & _MASK
        c = (c - b) & _MASK ^ _rotate(b, 4)
        b = (b + a) & _MASK
    c = ((c ^ b) - _rotate(b, 14)) & _MASK
    a = ((a ^ c) - _rotate(c, 11)) & _MASK
    b = ((b ^ a) - _rotate(a, 25)) & _MASK
    c = ((c ^ b) - _rotate(b, 16)) & _MASK
    a = ((a ^ c) - _rotate(c, 4)) & _MASK
    b = ((b ^ a) - _rotate(a, 14)) & _MASK
    return ((c ^ b) - _rotate(b, 24)) & _MASK


def _rotate(value: int, bits: int) -> int:
    """Rotate 32 bits to the left."""
    return (value << bits | value >> 32 - bits) & _MASK
