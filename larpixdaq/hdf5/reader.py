"""Reading a LArPix+HDF5 file: ours, finished or still growing, or larpix-control's.

Whatever is wrong with a file comes out as a FileError of one line.

How many words of the boards a file holds: what a count made elsewhere, such as an emulated board's, is compared
with.

Bounds of an HDF5 file: its data lie in the file itself, and no dataset announces more than the file has room for.

A damaged or foreign file may announce 2^45 rows, which HDF5 reads as zeros for days, or name another file, which HDF5
opens, be it a pipe that nobody writes to.
"""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq.errors import FileError, cause
from larpixdaq.hdf5 import layout, names, repair
from larpixdaq.protocol.stream import BlockOrigin, ConnectedBoard
from larpixdaq.runtime.file_access import check_place, open_regular
from larpixdaq.schema import PacketType, io_groups_of, types_of

T = TypeVar("T")
#: What h5py raises when a file is not what it should be.
_BROKEN = (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError)
_ALWAYS = (PacketType.SYNC, PacketType.TRIGGER)
#: Maximum bytes of one chunk: reading a single row inflates all of it.
_CHUNK_BYTES: Final = 256 << 20
_UNWRITTEN_BYTES: Final = 4096
_INSIDE: Final = (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT)


class LeftPart(io.FileIO):
    """A part that a dead writer left, with the superblock of a closed file in place of its own. Only read."""

    def __init__(self, path: Path, first: repair.Superblock) -> None:
        super().__init__(path, "rb")
        self._first = repair.closed(first, os.fstat(self.fileno()).st_size)

    def __del__(self) -> None:
        self.close()  # h5py lets go of it when its file is closed

    def readinto(self, buffer: Any) -> int:
        at = self.tell()
        found = super().readinto(buffer)
        if at < len(self._first):
            hidden = self._first[at : at + found]
            memoryview(buffer).cast("B")[: len(hidden)] = hidden
        return found


def may_be_written(part: Path) -> bool:
    """Whether a process holds the lock on the part's journal, as writers and recoveries do, or nobody can tell."""
    try:
        fd = open_regular(part.with_name(part.name.removesuffix(names.PART) + names.JOURNAL))
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


class DataFile:
    """One open file. `own` tells whether we wrote it: only then are there runs, blocks and a ledger.

    `version` is the layout's version as the file says it; `layout` is one of schema.LAYOUTS, or None when the columns
    are those of another writer.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._left: LeftPart | None = None
        self._file = self._open()
        # Datasets stay open: one that is opened again after a refresh may show a stale index of its chunks (HDF5 2.0).
        self._held: dict[str, Any] = {}
        try:
            self._guard("its links", lambda: check_links(self.path, self._file))
            self.version = str(self._guard("/_header", lambda: self._file["_header"].attrs["version"]))
            self._packets = self._guard("/packets", lambda: self._dataset("packets"))
            self.dtype: np.dtype[Any] = self._guard("/packets", lambda: self._packets.dtype)
            types = schema.type_column(self.dtype)
            if types not in (self.dtype.names or ()) or self.dtype[types].kind not in "iu":
                raise FileError(f"{self.path}: /packets has no column with packet types")
            self.own = self._guard("/run", lambda: "run" in self._file)
        except BaseException:
            self.close()
            raise
        known = [one for one in schema.LAYOUTS if (one.version, one.dtype) == (self.version, self.dtype)]
        self.layout = known[0] if known else None

    def _open(self) -> h5py.File:
        check_place(self.path)
        if not self.path.is_file():
            reason = "is not a file" if self.path.exists() else "there is no such file"
            raise FileError(f"cannot open {self.path}: {reason}")
        repair.check_heaps(self.path)
        # When a file is opened as SWMR, HDF5 reads damaged metadata 100 times before it gives up: two minutes for each.
        # So only a file whose writer may live is opened as SWMR. All others are opened plainly, which also shows that
        # they are whole; a part that a dead writer left is shown to HDF5 as if it were closed.
        first = repair.read_superblock(self.path) if self.path.name.endswith(names.PART) else None
        growing = repair.is_growing(self.path)
        try:
            if first is not None and growing and not may_be_written(self.path):
                self._left = LeftPart(self.path, first)
                return h5py.File(self._left, "r")
            if not h5py.is_hdf5(self.path):
                raise FileError(f"cannot open {self.path}: it is not an HDF5 file")
            return layout.open_file(self.path, "r", swmr=growing)
        except FileError:
            raise
        except _BROKEN as error:
            if self._left is not None:
                self._left.close()
            raise FileError(f"cannot open {self.path}: {cause(error)}") from None

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        if self._left is not None:
            self._left.close()

    def _guard(self, name: str, do: Callable[[], T]) -> T:
        try:
            return do()
        except FileError:
            raise
        except KeyError:
            raise FileError(f"{self.path}: has no {name}") from None
        except _BROKEN as error:
            raise FileError(f"{self.path}: {name} cannot be read: {cause(error)}") from None

    # Rows

    @property
    def rows(self) -> int:
        return int(self._guard("/packets", lambda: self._packets.shape[0]))

    def packets(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start` to `stop`, shape (N,), with the file's own dtype."""
        name = f"/packets, rows {start} to {self.rows if stop is None else stop},"
        rows: NDArray[Any] = self._guard(name, lambda: self._packets[start:stop])
        return rows

    def pieces(self, rows: int = 4 * schema.CHUNK_ROWS) -> Iterator[NDArray[Any]]:
        """All rows, so many at a time."""
        for start in range(0, self.rows, rows):
            yield self.packets(start, start + rows)

    def refresh(self) -> None:
        """See what the writer of a growing file has added since it was opened."""
        for name, dataset in self._held.items():
            self._guard(f"/{name}", dataset.refresh)

    @property
    def stored_bytes(self) -> int:
        """Bytes that /packets takes in the file, compressed."""
        return int(self._guard("/packets", lambda: self._packets.id.get_storage_size()))

    # What we have written beside them

    def length(self, name: str) -> int:
        """Rows of the table `name` (layout.TABLES, without a leading slash)."""
        return int(self._guard(f"/{name}", lambda: self._table(name).shape[0]))

    def table(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows of a table, as it is."""
        rows: NDArray[Any] = self._guard(f"/{name}", lambda: self._table(name)[start:stop])
        return rows

    def _dataset(self, name: str) -> Any:
        if name not in self._held:
            dataset = self._file[name]
            check_dataset(self.path, name, dataset)
            if self._file.swmr_mode:  # check_links() has seen it when the file was opened, with the rows of that time
                dataset.refresh()
            self._held[name] = dataset
        return self._held[name]

    def _table(self, name: str) -> Any:
        if name in layout.LATER and name not in self._file:
            return np.zeros(0, layout.TABLES[name][0])
        table = self._dataset(name)
        expected = layout.INFO if name == "run/info" else layout.CHECKSUMS if name == "run/checksums" else None
        expected = layout.TABLES[name][0] if name in layout.TABLES else expected
        if expected is not None and table.dtype != expected and (name, table.dtype) != ("run/info", layout.INFO_BEFORE):
            raise FileError(f"{self.path}: /{name} has other columns than expected: {table.dtype}")
        return table

    def attribute(self, group: str, name: str) -> Any:
        return self._guard(f"attribute {name} of /{group}", lambda: self._file[group].attrs[name])

    def crc32(self, name: str) -> int:
        """CRC-32 of a table's bytes, as /run/checksums has it."""
        return self._guard(f"/{name}", lambda: layout.table_crc32(self._dataset(name)))

    def connected(self) -> list[ConnectedBoard]:
        """What the producers read, as /run/sources says it last of each io_group."""
        producers = self.producers()
        found: dict[tuple[str, int], ConnectedBoard] = {}
        for row in self.table("run/sources"):
            one = plain(row)
            if (index := one.pop("producer")) >= len(producers):
                raise FileError(f"{self.path}: /run/sources names producer {index} of {len(producers)}")
            producer = producers[index]
            found[producer, one["io_group"]] = ConnectedBoard(producer, **one)
        return list(found.values())

    def producers(self) -> list[str]:
        return [text(row["name"]) for row in self.table("run/producers")]

    def source(self, row: Any, producers: list[str], run: int) -> BlockOrigin:
        """Whose row of a table this is; FileError when it names a producer that is not there."""
        index = int(row["producer"])
        if index >= len(producers):
            raise FileError(f"{self.path}: names producer {index} of {len(producers)}")
        return BlockOrigin(run, producers[index], int(row["epoch"]))

    def run_info(self) -> dict[str, Any]:
        """The row of /run/info as plain Python; 0 in columns that older files do not have."""
        row = self.table("run/info")
        if row.shape != (1,):
            raise FileError(f"{self.path}: /run/info: expected one row, found shape {row.shape}")
        return dict.fromkeys(layout.INFO_LATER, 0) | plain(row[0])

    def texts(self) -> dict[str, list[str]]:
        """All of /run/texts: name -> texts, in the order in which they were written."""
        parts: dict[str, list[bytes]] = {}
        for row in self.table("run/texts"):
            entries = parts.setdefault(text(row["name"]), [])
            if row["piece"] == 0 or not entries:
                entries.append(b"")
            entries[-1] += bytes(row["text"])
        return {name: [entry.decode("utf-8", "replace") for entry in entries] for name, entries in parts.items()}


def text(value: bytes) -> str:
    return bytes(value).decode("utf-8", "replace")


def plain(row: Any) -> dict[str, Any]:
    """A row of a table as a dict of int, str and so on."""
    found: dict[str, Any] = {}
    for name in row.dtype.names:
        value = row[name]
        found[name] = text(value) if isinstance(value, bytes) else value.tolist()
    return found


def count_words(path: Path) -> dict[int, int]:
    """Rows of types 0 to 3 with direction 1, and of types 6 and 7, per io_group; straight from the rows of the file."""
    counts: dict[int, int] = {}
    with DataFile(path) as file:
        for rows in file.pieces():
            kinds = types_of(rows)
            words = ((kinds <= PacketType.CONFIG_READ) & (rows["direction"] == 1)) | np.isin(kinds, _ALWAYS)
            for io_group, n in enumerate(np.bincount(io_groups_of(rows[words])).tolist()):
                if n:
                    counts[io_group] = counts.get(io_group, 0) + n
    return counts


def check_links(path: Path, file: h5py.File) -> None:
    """FileError when a link of the file names another file. No link is followed."""

    def outside(name: bytes, link: Any) -> bytes | None:
        return None if link.type in _INSIDE else name

    found = file.id.links.visit(outside, info=True)
    if found is not None:
        name = found.decode("utf-8", "replace")
        raise FileError(f"{path}: /{name} is a link to another file, expected all data in this one")


def check_dataset(path: Path, name: str, dataset: Any) -> None:
    """FileError when it is no table (one dimension), or its rows are not all in this file."""
    where = f"{path}: /{name}"
    if not isinstance(dataset, h5py.Dataset):
        raise FileError(f"{where} is a group, expected a table")
    if dataset.shape is None or len(dataset.shape) != 1:
        raise FileError(f"{where} has the shape {dataset.shape}, expected a table")
    if dataset.is_virtual or dataset.external:
        raise FileError(f"{where} has its rows in another file, expected all data in this one")
    size = dataset.dtype.itemsize
    if dataset.chunks is not None and dataset.chunks[0] * size > _CHUNK_BYTES:
        raise FileError(
            f"{where} has chunks of {dataset.chunks[0]} rows of {size} bytes, at most {_CHUNK_BYTES} bytes are read"
        )
    if (rows := dataset.shape[0]) > (held := room_for_rows(dataset)):
        raise FileError(f"{where} announces {rows} rows, the file has room for {held}")


def room_for_rows(dataset: Any) -> int:
    """Rows that a dataset has space for in the file."""
    if dataset.chunks is None:
        # A table of fixed length gets its space when it is first written. Until then a few rows read as zeros.
        return max(int(dataset.id.get_storage_size()), _UNWRITTEN_BYTES) // int(dataset.dtype.itemsize)
    return int(dataset.id.get_num_chunks() * dataset.chunks[0])
