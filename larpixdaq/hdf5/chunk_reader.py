"""Read the chunks of a damaged or foreign file one by one, so that a damaged one costs nothing but itself.

HDF5 is asked for the place of each chunk only; its bytes are read and unpacked here. The messages of a raw file lie in
global heaps, which have no checksum, and of which a damaged length sends the HDF5 library into an endless loop
(repair.py). So they are read here, too.

A writer that was killed leaves the superblock of an open file, and a file that was cut ends before the end that its
superblock names: HDF5 refuses both. Here each file is opened through a view with the superblock of a closed file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import FileError, cause
from larpixdaq.hdf5 import repair
from larpixdaq.hdf5.reader import PatchedFile, check_links
from larpixdaq.runtime.file_access import check_link
from larpixdaq.schema import SPAN

T = TypeVar("T")
#: Exceptions of h5py for a damaged file.
DAMAGED: Final = (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError)
#: Maximum bytes of one chunk.
_CHUNK_BYTES: Final = 256 << 20
#: Maximum bytes of a heap collection, and number of collections that are kept.
_HEAP_BYTES: Final = 256 << 20
_KEPT_HEAPS: Final = 64
#: Bytes of messages, and messages, of a piece.
_PIECE_BYTES: Final = 8 << 20
_PIECE_MESSAGES: Final = 4096
#: Reference to a message of variable length, as a chunk has it: bytes, place of the heap, number of the object.
_REFERENCE: Final = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
_HEAP_HEAD: Final = struct.Struct("<4sB3xQ")
_HEAP_OBJECT: Final = struct.Struct("<H6xQ")
#: Maximum number of consecutive chunks that are not in the file, where the index of chunks is damaged.
_ABSENT: Final = 10_000
#: Superblocks of versions 0 and 1: place of the end-of-file address.
_OLD_END: Final = {0: 40, 1: 44}


class ForeignFile:
    """A file opened for reading chunk by chunk. `growing`: its superblock says that it is open, or that it was cut.

    FileError in one line if it is no HDF5 file, if a process has locked it for writing, or if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_link(path)
        if not os.path.isfile(path):
            reason = "is not a file" if os.path.exists(path) else "there is no such file"
            raise FileError(f"cannot open {path}: {reason}")
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise FileError(f"cannot open {path}: {error.strerror}") from None
        try:
            self._state = self._stat()
            self.size = self._state[0]
            _check_unlocked(path, self._fd)
            start, self.why = self._superblock()
            repair.check_heaps(path)
            view = PatchedFile(path, start)
            try:
                self.hdf5 = h5py.File(view, "r")
            except DAMAGED as error:
                view.close()
                raise FileError(f"cannot open {path}: {cause(error)}") from None
            try:
                check_links(path, self.hdf5)
            except BaseException as error:
                self.hdf5.close()
                if isinstance(error, DAMAGED) and not isinstance(error, FileError):
                    raise FileError(f"cannot open {path}: {cause(error)}") from None
                raise
        except BaseException:
            os.close(self._fd)
            raise

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _superblock(self) -> tuple[bytes, str]:
        """Return the first bytes of the file as if it had been closed with its size, and why it was not, "" if so."""
        head = self.read(0, 64)
        if not head.startswith(repair.SIGNATURE):
            if not self.size:
                raise FileError(f"cannot open {self.path}: it is empty")
            raise FileError(f"cannot open {self.path}: it is not an HDF5 file")
        if len(head) < 64:
            raise FileError(f"cannot open {self.path}: it has only {self.size} bytes")
        if (version := head[8]) in _OLD_END:
            at = _OLD_END[version]
            (end,) = struct.unpack_from("<Q", head, at)
            # From addresses of another size than 8 bytes on, the fields are elsewhere: HDF5 may open it as it is.
            known = head[13] == 8
            why = f"was cut: it has {self.size} of {end} bytes" if known and end > self.size else ""
            return (head[:at] + struct.pack("<Q", self.size) if known else head), why
        superblock = repair.read_superblock(self.path)
        assert superblock is not None
        why = ""
        if superblock.flags:
            why = "was not closed by its writer"
        elif superblock.end > self.size:
            why = f"was cut: it has {self.size} of {superblock.end} bytes"
        return repair.closed_superblock(superblock, self.size), why

    def __enter__(self) -> ForeignFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.hdf5.close()
        os.close(self._fd)

    def check_unchanged(self) -> None:
        """FileError if the file has changed since it was opened."""
        if self._stat() != self._state:
            raise FileError(f"{self.path}: has changed meanwhile: is it still being written?")

    def read(self, start: int, size: int) -> bytes:
        """Read bytes, fewer at the end of the file. FileError if the disk fails."""
        try:
            return os.pread(self._fd, size, start)
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror}") from None

    def guard(self, name: str, do: Callable[[], T]) -> T:
        """Call `do`, which reads the object `name`; FileError if this is missing or damaged."""
        try:
            return do()
        except FileError:
            raise
        except DAMAGED as error:
            raise FileError(f"{self.path}: {name} cannot be read: {cause(error)}") from None


def _check_unlocked(path: Path, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(f"{path}: is locked: another program is writing it") from None
    except OSError:
        return  # a file system without locks
    fcntl.flock(fd, fcntl.LOCK_UN)


class ChunkReader:
    """Reads a table of a file: the rows that lie in the file, and which of its rows do not."""

    def __init__(self, file: ForeignFile, name: str, dtype: np.dtype[Any] | None = None) -> None:
        """`dtype`: that of the rows in the file, for rows that h5py cannot have as they are."""
        self._file = file
        self.name = name
        dataset = file.guard(f"/{name}", lambda: file.hdf5[name])
        if not isinstance(dataset, h5py.Dataset):
            raise FileError(f"{file.path}: /{name} is a group, expected a table")
        file.guard(f"/{name}", lambda: self._set_up(dataset, dtype))

    def _set_up(self, dataset: Any, dtype: np.dtype[Any] | None) -> None:
        where = f"{self._file.path}: /{self.name}"
        if dataset.shape is None or len(dataset.shape) != 1 or dataset.is_virtual or dataset.external:
            raise FileError(f"{where} is no table with all of its rows in this file")
        self.dtype = dtype if dtype is not None else dataset.dtype
        if not self.dtype.itemsize or self.dtype.hasobject:
            raise FileError(f"{where} has rows of {self.dtype}, which are not in one piece")
        #: Rows that the table announces, which may be absurd.
        self.announced = int(dataset.shape[0])
        properties = dataset.id.get_create_plist()
        self._filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if any(each not in (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE) for each in self._filters):
            raise FileError(f"{where} has filters {self._filters}, expected shuffle and deflate only")
        self.chunk = int(dataset.chunks[0]) if dataset.chunks is not None else 0
        size = self.chunk * self.dtype.itemsize
        if size > _CHUNK_BYTES:
            raise FileError(f"{where} has chunks of {size} bytes, at most {_CHUNK_BYTES} are read")
        if self.chunk:
            self._chunks = self._find_chunks(dataset)
        else:  # one piece
            offset = dataset.id.get_offset()
            self.chunk = max(1, _PIECE_BYTES // self.dtype.itemsize)
            here = 0 if offset is None else max(0, self._file.size - offset) // self.dtype.itemsize
            size = self.chunk * self.dtype.itemsize
            self._chunks = {
                first: (offset + first * self.dtype.itemsize, size, 0)
                for first in range(0, min(here, self.announced), self.chunk)
            }

    def _find_chunks(self, dataset: Any) -> dict[int, tuple[int, int, int]]:
        """Return place, size and filter mask of each chunk that lies in the file, by its first row."""
        found: dict[int, tuple[int, int, int]] = {}

        def note(info: Any) -> None:
            if info.byte_offset is not None and 0 < info.size <= 2 * _CHUNK_BYTES:
                found[int(info.chunk_offset[0])] = int(info.byte_offset), int(info.size), int(info.filter_mask)

        try:
            dataset.id.chunk_iter(note)
        except DAMAGED:  # a part of the index is lost: ask for each chunk
            absent = 0
            for first in range(0, self.announced, self.chunk):
                with contextlib.suppress(*DAMAGED):
                    note(dataset.id.get_chunk_info_by_coord((first,)))
                absent = 0 if first in found else absent + 1
                if absent > _ABSENT:
                    break
        return dict(sorted(found.items()))

    @property
    def rows(self) -> int:
        """Rows up to the end of the last chunk in the file, at most those that the table announces."""
        last = max(self._chunks, default=-self.chunk)
        return min(self.announced, last + self.chunk)

    def pieces(self) -> Iterator[tuple[int, int, NDArray[Any] | str]]:
        """Read all rows: first row, row after the last, and the rows, or why they are not there."""
        expected = 0
        for first in self._chunks:
            stop = min(first + self.chunk, self.announced)
            if stop <= first:
                continue
            if first > expected:
                yield expected, first, "are not in the file"
            end = stop
            if not self._filters:  # so that a part of it is good, too
                here = (self._file.size - self._chunks[first][0]) // self.dtype.itemsize
                end = max(first, min(stop, first + here))
            if end > first:
                yield first, end, self._read(first, end)
            if end < stop:
                yield end, stop, "lie behind the end of the file"
            expected = stop
        if expected < self.announced:
            yield expected, self.announced, "are not in the file"

    def _read(self, first: int, stop: int) -> NDArray[Any] | str:
        place, size, mask = self._chunks[first]
        data: Any = self._file.read(place, size)
        full, itemsize = self.chunk * self.dtype.itemsize, self.dtype.itemsize
        wanted = (stop - first) * itemsize
        if len(data) < (size if self._filters else wanted):
            return "lie behind the end of the file"
        for number in reversed(range(len(self._filters))):
            if mask >> number & 1:
                continue
            if self._filters[number] == h5py.h5z.FILTER_DEFLATE:
                decoder = zlib.decompressobj()
                try:
                    data = decoder.decompress(data, full + 1)
                except zlib.error as error:
                    return f"are damaged: {error}"
                if len(data) != full:
                    return f"are damaged: {len(data)} bytes in place of {full}"
            elif itemsize > 1:
                if len(data) != full:
                    return f"are damaged: {len(data)} bytes in place of {full}"
                data = np.frombuffer(data, np.uint8).reshape(itemsize, self.chunk).T.tobytes()
        if len(data) < wanted:
            return f"are damaged: {len(data)} bytes in place of {wanted}"
        return np.frombuffer(data, np.uint8)[:wanted].view(self.dtype)


class RawMessages:
    """The messages of a raw file (`rawhdf5format`), read chunk by chunk.

    `messages`: their number as the file announces it; `headers`: the number of io_groups, None without /msg_headers.
    """

    def __init__(self, file: ForeignFile) -> None:
        self._file = file
        dataset = file.guard("/msgs", lambda: file.hdf5["msgs"])
        if not isinstance(dataset, h5py.Dataset) or h5py.check_vlen_dtype(dataset.dtype) != np.uint8:
            raise FileError(f"{file.path}: raw file without /msgs of bytes")
        self._references = ChunkReader(file, "msgs", _REFERENCE)
        self.messages = self._references.announced
        self.headers: int | None = None
        self._groups: ChunkReader | None = None
        if "msg_headers" in file.hdf5:
            groups = ChunkReader(file, "msg_headers")
            if groups.dtype.names != ("io_groups",) or groups.dtype["io_groups"].kind not in "iu":
                raise FileError(f"{file.path}: /msg_headers has the columns {groups.dtype}, expected io_groups")
            self._groups, self.headers = groups, groups.announced
        self._heaps: OrderedDict[int, dict[int, tuple[int, int]]] = OrderedDict()
        self._heap_data: dict[int, bytes] = {}

    def pieces(
        self, default: int, lost: Callable[[str], None]
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]]:
        """Read all messages that can be read, with their io_groups; `lost` is called with a line about any others.

        A piece is bytes, spans (dtype schema.SPAN) and io_groups. `default`: io_group of a file without io_groups.
        """
        groups = self._stream(self._groups, lost) if self._groups is not None else None
        group_first, group_rows = 0, np.zeros(0, np.uint8)
        for first, stop, found in self._references.pieces():
            if isinstance(found, str):
                lost(f"messages {first} to {stop} {found}")
                continue
            for at in range(first, stop, _PIECE_MESSAGES):
                end = min(at + _PIECE_MESSAGES, stop)
                while groups is not None and group_first + len(group_rows) < end:
                    following = next(groups, None)
                    if following is None:
                        break
                    keep = group_rows[max(0, at - group_first) :]
                    begin = group_first + len(group_rows) - len(keep)
                    gap = max(0, following[0] - begin - len(keep))
                    if gap > self._references.chunk * 4:  # nothing of it is needed
                        keep, begin, gap = keep[:0], following[0], 0
                    group_rows = np.concatenate([keep, np.full(gap, -1, np.int16), following[1].astype(np.int16)])
                    group_first = begin
                if self._groups is None:
                    own = np.full(end - at, default, np.int16)
                else:
                    own = np.full(end - at, -1, np.int16)
                    low, high = max(at, group_first), min(end, group_first + len(group_rows))
                    if high > low:
                        own[low - at : high - at] = group_rows[low - group_first : high - group_first]
                yield from self._take(at, found[at - first : end - first], own, lost)

    @staticmethod
    def _stream(reader: ChunkReader, lost: Callable[[str], None]) -> Iterator[tuple[int, NDArray[Any]]]:
        for first, stop, found in reader.pieces():
            if isinstance(found, str):
                lost(f"io_groups {first} to {stop} {found}")
            else:
                yield first, np.where((found["io_groups"] >= 0) & (found["io_groups"] < 256), found["io_groups"], 0)

    def _take(
        self, first: int, references: NDArray[Any], groups: NDArray[np.int16], lost: Callable[[str], None]
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]]:
        """Read the messages of some references."""
        parts: list[bytes] = []
        kept: list[int] = []
        size = 0
        bad: list[int] = []
        for number, (length, address, index) in enumerate(references.tolist()):
            message = self._message(length, address, index) if groups[number] >= 0 else None
            if message is None:
                bad.append(first + number)
                continue
            parts.append(message)
            kept.append(number)
            size += length
            if size >= _PIECE_BYTES:
                yield _piece(parts, groups[kept])
                parts, kept, size = [], [], 0
        if bad:
            without = sum(int(groups[number - first]) < 0 for number in bad)
            why = "have no io_group" if without == len(bad) else "cannot be read"
            lost(f"{len(bad)} messages between {bad[0]} and {bad[-1] + 1} {why}")
        if parts:
            yield _piece(parts, groups[kept])

    def _message(self, length: int, address: int, index: int) -> bytes | None:
        """Return the bytes of a message; None if they are not in the file."""
        if not length:
            return b""
        heap = self._heap(address)
        place = heap.get(index)
        if place is None or place[1] < length:
            return None
        start = place[0]
        return self._heap_data[address][start : start + length]

    def _heap(self, address: int) -> dict[int, tuple[int, int]]:
        """Return place and size of the objects of a collection, as far as their lengths are possible."""
        if address in self._heaps:
            self._heaps.move_to_end(address)
            return self._heaps[address]
        objects: dict[int, tuple[int, int]] = {}
        head = self._file.read(address, _HEAP_HEAD.size) if address < self._file.size else b""
        data = b""
        if len(head) == _HEAP_HEAD.size:
            signature, version, size = _HEAP_HEAD.unpack(head)
            if signature == b"GCOL" and version == 1 and size <= _HEAP_BYTES:
                data = self._file.read(address, size)
        at = _HEAP_HEAD.size
        while at + _HEAP_OBJECT.size <= len(data):
            number, size = _HEAP_OBJECT.unpack_from(data, at)
            if not number or at + _HEAP_OBJECT.size + size > len(data):
                break
            objects[number] = at + _HEAP_OBJECT.size, size
            at += _HEAP_OBJECT.size + (size + 7) // 8 * 8
        self._heaps[address], self._heap_data[address] = objects, data
        if len(self._heaps) > _KEPT_HEAPS or sum(map(len, self._heap_data.values())) > _HEAP_BYTES:
            while len(self._heaps) > 1 and (
                len(self._heaps) > _KEPT_HEAPS or sum(map(len, self._heap_data.values())) > _HEAP_BYTES
            ):
                oldest, _ = self._heaps.popitem(last=False)
                del self._heap_data[oldest]
        return objects


def _piece(parts: list[bytes], groups: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]:
    spans = np.empty(len(parts), SPAN)
    lengths = np.fromiter(map(len, parts), np.uint32, len(parts))
    spans["length"] = lengths
    spans["start"] = np.cumsum(lengths) - lengths
    return np.frombuffer(b"".join(parts), np.uint8), spans, groups.astype(np.uint8)
