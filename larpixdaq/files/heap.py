"""Global heaps, where HDF5 keeps the texts of variable-length attributes: looked at before the library reads them.

Alone of what makes up a file of ours, they have no checksum, and a damaged length in one sends the library (2.0 too)
round a loop without end, in which it holds the interpreter: no thread and no signal helps. A collection is "GCOL",
version 1, 3 bytes, its length u64 (with these 16 bytes), and objects: number u16, references u16, 4 bytes, length u64,
then the object, filled up to 8 bytes. Number 0 is free space, whose length has its header in it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from larpixdaq.errors import FileError

#: Collections are looked for in so many first bytes: the attributes are made with the file (in ours, and in those of
#: larpix-control, the only collection lies at 2048).
REACH: Final = 1 << 16
#: What is shorter, or reaches beyond the file's end, the library refuses by itself.
SHORTEST: Final = 4096
_SIGNATURE: Final = b"GCOL\x01"
_LENGTH: Final = struct.Struct("<8xQ")
_OBJECT: Final = struct.Struct("<H6xQ")


def check(path: Path) -> None:
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
