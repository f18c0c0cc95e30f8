"""Read LArPix+HDF5 files: those of larpix-daq, finished or growing, and those of larpix-control.

Any problem of a file is a FileError of one line. A damaged or foreign file may announce 2^45 rows, which HDF5 reads as
zeros for days, or link to another file, which HDF5 opens, even a pipe without a writer. So no table is read that is
longer than its space in the file, or that has its data elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.hdf5_chunks import gather
from larpixdaq.errors import ChecksumError, FileError, cause
from larpixdaq.hdf5 import layout, names, repair
from larpixdaq.hdf5.row_reader import Columns, RowFilter, RowReader, in_order
from larpixdaq.protocol.packed_rows import inflate
from larpixdaq.protocol.reports import Comment
from larpixdaq.protocol.stream import BlockOrigin, ConnectedBoard
from larpixdaq.runtime.file_access import check_link, open_regular
from larpixdaq.schema import PacketType, io_groups_of, types_of

T = TypeVar("T")
#: Exceptions of h5py for a damaged file.
_DAMAGED: Final = (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError)
#: Maximum bytes of one chunk: reading a single row inflates all of it.
_CHUNK_BYTES: Final = 256 << 20
#: Maximum number of rows of an unfinished file for which its writer had no room: more than it writes at once. HDF5
#: takes forever to cut a table that announces any number of rows.
_UNWRITTEN_ROWS: Final = 1 << 20
#: Maximum bytes of a table that has no space in the file yet.
_UNWRITTEN_BYTES: Final = 4096
#: Rows that are read at once.
PIECE_ROWS: Final = 4 * schema.CHUNK_ROWS
_INTERNAL_LINKS: Final = (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT)
#: Types of words that a board itself makes; their rows always have direction 1.
_BOARD_WORDS: Final = (PacketType.SYNC, PacketType.TRIGGER)
#: Allowed dtypes of each table.
_DTYPES: Final = {name: (dtype,) for name, (dtype, _) in layout.TABLES.items()} | {
    "run/info": (layout.INFO, layout.OLD_INFO),
    "run/checksums": (layout.CHECKSUMS,),
}


class DataFile:
    """One open file of packets.

    `own`: whether larpix-daq wrote it; only then are there runs, blocks and a ledger. `version`: the layout's version
    as the file says it. `layout`: one of schema.LAYOUTS; None when the columns are those of another program.
    """

    def __init__(self, path: Path | str, *, own: bool = False, unfinished: bool = False) -> None:
        """Open a file. `own`: FileError also when larpix-daq did not write it. `unfinished`: if it is a part, its
        writer may have announced rows for which the disk had no room; these are not counted."""
        self.path = Path(path)
        self._unfinished = unfinished and self.path.name.endswith(names.PART)
        self._file = self._open()
        # Datasets stay open, because after a refresh a second handle may have a stale index of its chunks (HDF5 2.0).
        self._datasets: dict[str, Any] = {}
        try:
            self._guard("its links", lambda: check_links(self.path, self._file))
            self.version = str(self._guard("/_header", lambda: self._file["_header"].attrs["version"]))
            self._packets = self._guard("/packets", lambda: self._dataset("packets"))
            self.dtype: np.dtype[Any] = self._guard("/packets", lambda: self._packets.dtype)
            types = schema.type_column(self.dtype)
            if types not in (self.dtype.names or ()) or self.dtype[types].kind not in "iu":
                raise FileError(f"{self.path}: /packets has no column with packet types")
            self.own = self._guard("/run", lambda: "run" in self._file)
            if own and not self.own:
                raise FileError(f"{self.path}: has no /run, so larpix-daq did not write it")
        except BaseException:
            self.close()
            raise
        layouts = (each for each in schema.LAYOUTS if (each.version, each.dtype) == (self.version, self.dtype))
        self.layout = next(layouts, None)

    def _open(self) -> h5py.File:
        check_link(self.path)
        if not os.path.isfile(self.path):
            reason = "is not a file" if os.path.exists(self.path) else "there is no such file"
            raise FileError(f"cannot open {self.path}: {reason}")
        try:
            return open_hdf5(self.path)
        except FileError:
            raise
        except _DAMAGED as error:
            raise FileError(f"cannot open {self.path}: {cause(error)}") from None

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _guard(self, name: str, do: Callable[[], T]) -> T:
        """Call `do`, which reads the object `name`; FileError when that is missing or damaged."""
        try:
            return do()
        except FileError:
            raise
        except KeyError:
            raise FileError(f"{self.path}: has no {name}") from None
        except _DAMAGED as error:
            raise FileError(f"{self.path}: {name} cannot be read: {cause(error)}") from None

    # Rows

    @property
    def rows(self) -> int:
        return int(self._guard("/packets", lambda: self._length(self._packets)))

    def packets(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows `start` to `stop`, shape (N,), with the file's own dtype."""
        stop = self.rows if stop is None else stop
        name = f"/packets, rows {start} to {stop},"
        return self._guard(name, lambda: self.reader.read(start, min(stop, int(self._packets.shape[0]))))

    @cached_property
    def reader(self) -> RowReader:
        """What reads the rows, for callers that want only some of them."""
        return self._guard("/packets", lambda: RowReader(self._packets))

    def select(
        self,
        start: int,
        stop: int,
        columns: Columns,
        chosen: RowFilter | None = None,
        stretches: Sequence[tuple[int, int]] | None = None,
        first: int = 0,
    ) -> NDArray[Any]:
        """Read columns of some of the rows `start` to `stop`, as RowReader.read(). In any thread."""
        name = f"/packets, rows {start} to {stop},"
        return self._guard(name, lambda: self.reader.read(start, stop, columns, chosen, stretches, first))

    def pieces(self) -> Iterator[NDArray[Any]]:
        """Read all rows, four chunks at a time; threads read the next ones meanwhile."""
        starts = range(0, self.rows, PIECE_ROWS)
        return (rows for _, rows in in_order(lambda start: self.packets(start, start + PIECE_ROWS), starts))

    def chunk(self, first: int) -> NDArray[np.uint8]:
        """Read the chunk of schema.CHUNK_ROWS rows that begins at row `first`; return the bytes of the rows.

        Without the lock of h5py while the rows are unpacked, so that a writer in another thread goes on. FileError if
        the chunk is damaged.
        """
        name = f"/packets, rows {first} to {first + schema.CHUNK_ROWS},"
        mask, stored = self._guard(name, lambda: self._packets.id.read_direct_chunk((first,)))
        size, itemsize = schema.CHUNK_ROWS * self.dtype.itemsize, self.dtype.itemsize
        if mask == layout.NO_FILTERS and len(stored) == size:
            return np.frombuffer(stored, np.uint8)
        rows = np.empty(size, np.uint8)
        try:
            if mask:
                raise ChecksumError(f"{len(stored)} bytes with filters left out ({mask:#x})")
            planes, _ = inflate(stored, size, zlib)  # the library by which HDF5 reads
        except ChecksumError as error:
            raise FileError(f"{self.path}: {name} cannot be read: {error}") from None
        gather(np.frombuffer(planes, np.uint8), schema.CHUNK_ROWS, np.arange(itemsize, dtype=np.int32), rows)
        return rows

    def refresh(self) -> None:
        """Make visible all rows that the writer of a growing file has added so far."""
        for name, dataset in self._datasets.items():
            self._guard(f"/{name}", dataset.refresh)
        for cached in ("producers", "run"):
            vars(self).pop(cached, None)

    @property
    def chunk_rows(self) -> int | None:
        """Rows of a chunk of /packets; None if the rows are in one piece."""
        chunks = self._guard("/packets", lambda: self._packets.chunks)
        return None if chunks is None else int(chunks[0])

    @property
    def stored_bytes(self) -> int:
        """Compressed bytes of /packets."""
        return int(self._guard("/packets", lambda: self._packets.id.get_storage_size()))

    # Tables beside the rows

    def length(self, name: str) -> int:
        """Return the number of rows of the table `name` (layout.TABLES, without a leading slash)."""
        return int(self._guard(f"/{name}", lambda: self._length(self._table(name))))

    def table(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows `start` to `stop` of a table."""

        def read() -> NDArray[Any]:
            table = self._table(name)
            return np.asarray(table[start : self._length(table) if stop is None else min(stop, self._length(table))])

        return self._guard(f"/{name}", read)

    def _length(self, table: Any) -> int:
        rows = int(table.shape[0])
        return min(rows, _allocated_rows(table)) if self._unfinished and isinstance(table, h5py.Dataset) else rows

    def _dataset(self, name: str) -> Any:
        if name not in self._datasets:
            dataset = self._file[name]
            check_dataset(self.path, name, dataset, unwritten=_UNWRITTEN_ROWS if self._unfinished else 0)
            if self._file.swmr_mode:  # check_links() has cached it with the rows at the time of opening
                dataset.refresh()
            self._datasets[name] = dataset
        return self._datasets[name]

    def _table(self, name: str) -> Any:
        if name in layout.ADDED_TABLES and name not in self._file:
            return np.zeros(0, layout.TABLES[name][0])
        table = self._dataset(name)
        if name in _DTYPES and table.dtype not in _DTYPES[name]:
            raise FileError(f"{self.path}: /{name} has other columns than expected: {table.dtype}")
        return table

    def attribute(self, group: str, name: str) -> Any:
        return self._guard(f"attribute {name} of /{group}", lambda: self._file[group].attrs[name])

    def foreign_table(self, name: str) -> NDArray[Any] | None:
        """Read a table of any columns, which another program may have written; None if there is none."""
        rows: NDArray[Any] | None = self._guard(
            f"/{name}", lambda: self._dataset(name)[:] if name in self._file else None
        )
        return rows

    def copy_attributes(self, name: str, target: Any, *, missing: bool = False) -> None:
        """Copy the attributes of a group or dataset to an object of another file. `missing`: it may be absent."""

        def copy() -> None:
            if not missing or name in self._file:
                target.attrs.update(self._file[name].attrs)

        self._guard(f"attributes of /{name}", copy)

    def made_from(self) -> list[str]:
        """Return of which rows of which files a file without /run was made, by the tools of larpix-daq."""
        lines = self._guard("/_header", lambda: self._file["_header"].attrs.get("made_from", ()))
        return [str(line) for line in np.atleast_1d(np.asarray(lines, object))]

    def crc32(self, name: str) -> int:
        """Compute the CRC-32 of a table's bytes, as in /run/checksums."""
        return self._guard(f"/{name}", lambda: layout.table_crc32(self._dataset(name)))

    def connected(self) -> list[ConnectedBoard]:
        """Return the boards, devices or files that the producers read: the last entry of each io_group."""
        boards: dict[tuple[str, int], ConnectedBoard] = {}
        for row in self.table("run/sources"):
            board = ConnectedBoard(**row_dict(row) | {"producer": self.producer(row)})
            boards[board.producer, board.io_group] = board
        return list(boards.values())

    @cached_property
    def producers(self) -> list[str]:
        """Names in /run/producers; other tables have the index into this list."""
        return [text(row["name"]) for row in self.table("run/producers")]

    @cached_property
    def run(self) -> int:
        """Number of the run, by /run/info."""
        return int(self.run_info()["run"])

    def producer(self, row: Any) -> str:
        """Return the producer that a row of a table names. FileError when /run/producers does not have it."""
        index = int(row["producer"])
        if index >= len(self.producers):
            raise FileError(f"{self.path}: names producer {index} of {len(self.producers)}")
        return self.producers[index]

    def origin(self, row: Any, run: int | None = None) -> BlockOrigin:
        """Return the origin that a row of a table belongs to. `run`: known run number, if /run/info is not to be read.

        FileError as of producer().
        """
        return BlockOrigin(self.run if run is None else run, self.producer(row), int(row["epoch"]))

    def rows_by_origin(self, name: str) -> Iterator[tuple[BlockOrigin, dict[str, Any]]]:
        """Read a small table: the origin and the columns of each row."""
        return ((self.origin(row), row_dict(row)) for row in self.table(name))

    def run_info(self) -> dict[str, Any]:
        """Read the row of /run/info; 0 in columns that older files do not have."""
        row = self.table("run/info")
        if row.shape != (1,):
            raise FileError(f"{self.path}: /run/info: expected one row, found shape {row.shape}")
        return dict.fromkeys(layout.ADDED_INFO_COLUMNS, 0) | row_dict(row[0])

    def texts(self) -> dict[str, list[str]]:
        """Read /run/texts: name -> texts, in the order of writing."""
        parts: dict[str, list[bytes]] = {}
        for row in self.table("run/texts"):
            entries = parts.setdefault(text(row["name"]), [])
            if row["piece"] == 0 or not entries:
                entries.append(b"")
            entries[-1] += bytes(row["text"])
        return {name: [entry.decode("utf-8", "replace") for entry in entries] for name, entries in parts.items()}


def comments(texts: Mapping[str, Sequence[str]]) -> list[Comment]:
    """Return the comments of the e-log in texts(), each once. What is no comment is one without author and time."""
    found: dict[Comment, None] = {}
    for entry in texts.get(layout.E_LOG, []):
        try:
            found[msgspec.json.decode(entry, type=Comment)] = None
        except (msgspec.MsgspecError, RecursionError):
            found[Comment(0, 0, "", "", entry)] = None
    return list(found)


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading: as a growing file (SWMR) only while its writer may live.

    In SWMR mode HDF5 reads damaged metadata 100 times before it gives up, which takes two minutes for each. So all
    other files are opened plainly, and the part of a dead writer with the superblock of a closed file. HDF5's
    lock of a part is released at once, because it would keep a recovery from opening it. FileError or an exception of
    h5py when it cannot be opened.
    """
    repair.check_heaps(path)
    if not h5py.is_hdf5(path):
        raise FileError(f"cannot open {path}: it is {'not an HDF5 file' if path.stat().st_size else 'empty'}")
    superblock = repair.growing_superblock(path)
    is_part = path.name.endswith(names.PART)
    if superblock is None or not is_part or may_be_written(path):
        file = layout.open_file(path, "r", swmr=superblock is not None)
        if is_part:
            with contextlib.suppress(OSError):
                fcntl.flock(file.id.get_vfd_handle(), fcntl.LOCK_UN)
        return file
    part = PatchedFile(path, repair.closed_superblock(superblock, path.stat().st_size))
    try:
        return h5py.File(part, "r")
    except BaseException:
        part.close()
        raise


class PatchedFile(io.FileIO):
    """Read-only view of a file with other first bytes: of a part whose writer died, with a closed superblock."""

    def __init__(self, path: Path, start: bytes) -> None:
        super().__init__(path, "rb")
        self._start = start

    def __del__(self) -> None:
        self.close()  # h5py drops its reference when its file is closed

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        size = super().readinto(buffer)
        if start < len(self._start):
            replaced = self._start[start : start + size]
            memoryview(buffer).cast("B")[: len(replaced)] = replaced
        return size


def may_be_written(part: Path) -> bool:
    """Whether a process holds the lock of the part's journal, as writers and recoveries do.

    True also when the lock cannot be tested.
    """
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


def check_links(path: Path, file: h5py.File) -> None:
    """FileError when a link of the file names another file. No link is followed."""

    def external_name(name: bytes, link: Any) -> bytes | None:
        return None if link.type in _INTERNAL_LINKS else name

    external = file.id.links.visit(external_name, info=True)
    if external is not None:
        name = external.decode("utf-8", "replace")
        raise FileError(f"{path}: /{name} is a link to another file, expected all data in this one")


def check_dataset(path: Path, name: str, dataset: Any, *, unwritten: int = 0) -> None:
    """FileError when a dataset is no table (one dimension), or its rows are not all in this file, but for as many as
    `unwritten`."""
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
    if (rows := dataset.shape[0]) > (allocated := _allocated_rows(dataset)) + unwritten:
        raise FileError(f"{where} announces {rows} rows, the file has room for {allocated}")


def _allocated_rows(dataset: Any) -> int:
    """Return the number of rows that a dataset has space for in the file."""
    if dataset.chunks is None:
        # A table of fixed length gets its space when it is first written. Until then its few rows are read as zeros.
        return max(int(dataset.id.get_storage_size()), _UNWRITTEN_BYTES) // int(dataset.dtype.itemsize)
    return int(dataset.id.get_num_chunks() * dataset.chunks[0])


def text(value: bytes) -> str:
    """Decode a text of a table."""
    return bytes(value).decode("utf-8", "replace")


def row_dict(row: Any) -> dict[str, Any]:
    """Convert a row of a table to a dict of Python's int, str and lists."""
    fields: dict[str, Any] = {}
    for name in row.dtype.names:
        value = row[name]
        fields[name] = text(value) if isinstance(value, bytes) else value.tolist()
    return fields


def count_words(path: Path) -> dict[int, int]:
    """Count received words by io_group: rows of types 0 to 3 with direction 1, and of types 6 and 7.

    It reads nothing but rows, so that it can be compared with an independent count, such as that of an emulated board.
    """
    counts: dict[int, int] = {}
    with DataFile(path) as file:
        for rows in file.pieces():
            kinds = types_of(rows)
            words = ((kinds <= PacketType.CONFIG_READ) & (rows["direction"] == 1)) | np.isin(kinds, _BOARD_WORDS)
            for io_group, n in enumerate(np.bincount(io_groups_of(rows[words])).tolist()):
                if n:
                    counts[io_group] = counts.get(io_group, 0) + n
    return counts
