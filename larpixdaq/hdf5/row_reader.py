"""Read rows of /packets fast: chunks without HDF5's filters, of these only wanted rows and columns, several at a time.

A shuffled chunk is inflated to planes, one for each byte of a row. Most columns by which rows are selected are one
plane, which numpy compares at once; rows are made of the wanted planes and only of the chosen rows. Threads do this
for several pieces at a time, because inflating takes most of the time and does not hold the interpreter.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.hdf5_chunks import gather
from larpixdaq.errors import ChecksumError, FileError, FormatError, RequestError
from larpixdaq.hdf5 import layout
from larpixdaq.protocol.packed_rows import inflate
from larpixdaq.schema import PacketType

Item = TypeVar("Item")
Result = TypeVar("Result")
#: Column with the number of a row, which every selection of columns may name.
ROW: Final = "row"
_KEY: Final = re.compile(rb"(\d{1,9})-(\d{1,9})-(\d{1,9})")
#: Threads that read ahead.
THREADS: Final = min(len(os.sched_getaffinity(0)), 8)
#: Minimum rows of a chunk, and maximum bytes of a row, that are read without HDF5.
_MIN_CHUNK_ROWS: Final = 256
_MAX_ROW_BYTES: Final = 4096
_FILTERS: Final = ([h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_DEFLATE])


class Selection(NamedTuple):
    """Which rows are wanted: by their columns, None: all, by their numbers and their time. A row must fit each field.

    Rows of types 4 to 7 belong to no io_channel, chip and channel.
    """

    types: Collection[int] | None = None
    io_groups: Collection[int] | None = None
    io_channels: Collection[int] | None = None
    chips: Collection[tuple[int, int, int]] | None = None  # io_group, io_channel, chip_id
    channels: Collection[int] | None = None
    #: As of a slice: negative numbers count from the end; `stop` None: to the end.
    start: int = 0
    stop: int | None = None
    #: Time of arrival, unix ns: of whole blocks that arrived from `begin_ns` on and before `end_ns`, at least in part.
    begin_ns: float = -math.inf
    end_ns: float = math.inf
    #: Whether configuration packets (types 2 and 3) have the channel that stands in their rows, or none.
    config_channels: bool = True

    @classmethod
    def of(
        cls,
        io_group: Any = None,
        io_channel: Any = None,
        chip: Any = None,
        channel: Any = None,
        packet_type: Any = None,
    ) -> Selection:
        """Make a selection of single values or several. FormatError, which is a ValueError, for impossible ones.

        `chip`: keys such as "1-2-3" or (1, 2, 3); `packet_type`: numbers, or names such as "data" or "config read".
        Rows of types 2 to 7 belong to no channel.
        """
        return cls(
            _numbers("type", packet_type),
            _numbers("io_group", io_group),
            _numbers("io_channel", io_channel),
            _chips(chip),
            _numbers("channel", channel),
            config_channels=False,
        )

    @property
    def by_time(self) -> bool:
        return self.begin_ns > -math.inf or self.end_ns < math.inf

    @property
    def by_content(self) -> bool:
        """Whether rows are selected by their columns."""
        return any(field is not None for field in self[:5])

    def row_filter(self, dtype: np.dtype[Any], name: object) -> RowFilter | None:
        """Return what selects rows with certain columns, by their content; None: all rows.

        FileError if they do not have a column for it. `name`: of the file.
        """
        if not self.by_content:
            return None
        chosen = RowFilter(self, dtype)
        if chosen.missing:
            raise FileError(f"{name}: /packets has no column {chosen.missing}, by which to select")
        return chosen


#: The selection of all rows.
EVERYTHING: Final = Selection()


def _numbers(name: str, given: Any) -> frozenset[int] | None:
    if given is None:
        return None
    values = [given] if isinstance(given, int | str | np.integer) else given
    try:
        return frozenset(_number(name, value) for value in values)
    except TypeError:
        raise FormatError(f"{name} {given!r:.100}: expected a number or several") from None


def _number(name: str, value: Any) -> int:
    if name == "type" and isinstance(value, str):
        try:
            return PacketType[value.strip().upper().replace(" ", "_")]
        except KeyError:
            known = ", ".join(kind.name.lower().replace("_", " ") for kind in PacketType)
            raise FormatError(f"type {value!r:.100}: expected 0 to 255, or one of {known}") from None
    if isinstance(value, bool | str) or not isinstance(value, int | np.integer) or not 0 <= value <= 255:
        raise FormatError(f"{name} {value!r:.100}: expected a whole number from 0 to 255")
    return int(value)


def _chips(given: Any) -> frozenset[tuple[int, int, int]] | None:
    if given is None:
        return None
    try:
        keys = [given] if isinstance(given, str) else list(given)
        if keys and all(isinstance(part, int | np.integer) for part in keys):
            keys = [keys]
        return frozenset(schema.parse_key(key if isinstance(key, str) else tuple(key)) for key in keys)
    except TypeError:
        raise FormatError(f"chip {given!r:.100}: expected a key such as '1-2-3' (1, 2, 3), or several") from None
    except RequestError as error:
        raise FormatError(str(error)) from None


class Columns:
    """Columns of the rows that are read. `dtype`: of the result. `scalar`: it has no columns, but is one of them.

    `planes`: the byte of a row of the file for each byte of a row of the result.
    """

    def __init__(self, given: np.dtype[Any], names: str | Sequence[str] | None = None) -> None:
        """`given`: dtype of the file. FormatError for a name that is no column, or comes twice."""
        known = given.names or ()
        self.scalar = isinstance(names, str)
        self.names = known if names is None else (names,) if isinstance(names, str) else tuple(names)
        for name in self.names:
            if name not in (*known, ROW):
                raise FormatError(f"column {name!r:.100}: expected one of {', '.join((*known, ROW))}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise FormatError(f"columns {', '.join(self.names) or '()'}: expected different names, at least one")
        self.has_row = ROW in self.names and ROW not in known
        if names is None:
            self.dtype, self.planes = given, np.arange(given.itemsize, dtype=np.int32)
            return
        self.dtype = np.dtype([(name, np.dtype("<u8") if name not in known else given[name]) for name in self.names])
        planes: list[int] = []
        for name in self.names:
            kind, first = _field(given, name) if name in known else (self.dtype[name], -1)
            planes += range(first, first + kind.itemsize) if first >= 0 else [0] * kind.itemsize  # filled in later
        self.planes = np.array(planes, np.int32)

    def empty(self) -> NDArray[Any]:
        """Return no rows."""
        return self.result(np.empty(0, self.dtype), 0)

    def result(self, out: NDArray[Any], made: int) -> NDArray[Any]:
        """Return the first `made` rows of `out`, which has this dtype: a copy if they are few."""
        rows = out[:made] if 2 * made > len(out) else out[:made].copy()
        return rows[self.names[0]] if self.scalar else rows


def _field(dtype: np.dtype[Any], name: str) -> tuple[np.dtype[Any], int]:
    """Return the dtype of a column, and its first byte in a row."""
    assert dtype.fields is not None
    return dtype.fields[name][0], dtype.fields[name][1]


class Chunk:
    """Rows of one chunk, as planes or as rows. `size`: number of rows, of which the last may be unused."""

    def __init__(
        self, dtype: np.dtype[Any], *, planes: NDArray[np.uint8] | None = None, rows: NDArray[Any] | None = None
    ) -> None:
        self._dtype = dtype
        self._planes = planes
        self._rows = rows
        self.size = len(planes) // dtype.itemsize if planes is not None else len(rows if rows is not None else ())

    def column(self, name: str) -> NDArray[Any]:
        """Return a column, contiguous if it is one plane."""
        if self._planes is None:
            assert self._rows is not None
            return np.asarray(self._rows[name])
        kind, first = _field(self._dtype, name)
        if kind.itemsize == 1:
            return self._planes[first * self.size : (first + 1) * self.size].view(kind)
        out = np.empty(self.size * kind.itemsize, np.uint8)
        gather(self._planes, self.size, np.arange(first, first + kind.itemsize, dtype=np.int32), out)
        return out.view(kind)

    def take(self, columns: Columns, chosen: NDArray[np.bool_] | None, out: NDArray[Any], first: int) -> int:
        """Write columns of the chosen rows (None: all) into `out`; return their number. `first`: number of row 0."""
        if self._planes is not None:
            wanted = None if chosen is None else chosen.view(np.uint8)
            made = gather(self._planes, self.size, columns.planes, out.view(np.uint8), wanted)
        else:
            assert self._rows is not None
            rows = self._rows if chosen is None else self._rows[chosen]
            made = len(rows)
            if columns.dtype == rows.dtype:
                out[:made] = rows
            else:
                for name in columns.names:
                    if name != ROW or not columns.has_row:
                        out[name][:made] = rows[name]
        if columns.has_row:
            numbers = np.arange(self.size) if chosen is None else np.flatnonzero(chosen)
            out[ROW][:made] = numbers + first
        return made


class RowFilter:
    """A selection of rows with certain columns. `missing`: a column that it needs and the rows do not have, or ""."""

    def __init__(self, selection: Selection, dtype: np.dtype[Any]) -> None:
        self._selection = selection
        self._type = schema.type_column(dtype)
        self._channel = _numeric(dtype, "channel_id", "channel")
        self._columns = [_numeric(dtype, *names) for names in (("io_group",), ("io_channel",), ("chip_id", "chipid"))]
        #: Whether io_group, io_channel and chip_id are taken from the chip_key, as in layout 1.0.
        self._has_keys = self._columns[0] == "" and "chip_key" in (dtype.names or ()) and dtype["chip_key"].kind == "S"
        wanted = selection
        needed = [("channel_id", self._channel)] if wanted.channels is not None else []
        if not self._has_keys:
            used = (
                wanted.io_groups is not None or wanted.chips is not None,
                wanted.io_channels is not None or wanted.chips is not None,
                wanted.chips is not None,
            )
            known = zip(("io_group", "io_channel", "chip_id"), self._columns, used, strict=True)
            needed += [(name, column) for name, column, is_used in known if is_used]
        self.missing = next((name for name, column in needed if not column), "")
        self._chips: dict[int, NDArray[np.bool_]] = {}  # io_group -> by io_channel << 8 | chip_id
        for io_group, io_channel, chip_id in selection.chips or ():
            table = self._chips.setdefault(io_group, np.zeros(1 << 16, np.bool_))
            table[io_channel << 8 | chip_id] = True

    def chosen(self, chunk: Chunk) -> NDArray[np.bool_]:
        """Determine which rows of a chunk are wanted, shape (size,), contiguous."""
        wanted = self._selection
        types = chunk.column(self._type)
        masks: list[Any] = []
        if wanted.types is not None:
            masks.append(_among(types, wanted.types))
        if wanted.io_channels is not None or wanted.chips is not None:
            masks.append(types <= PacketType.CONFIG_READ)
        if wanted.channels is not None:
            last = PacketType.CONFIG_READ if wanted.config_channels else PacketType.TEST
            masks += [types <= last, _among(chunk.column(self._channel), wanted.channels)]
        if wanted.io_groups is not None or wanted.io_channels is not None or wanted.chips is not None:
            columns = _parts_of_keys(chunk.column("chip_key")) if self._has_keys else None
            if wanted.io_groups is not None:
                masks.append(_among(self._part(chunk, columns, 0), wanted.io_groups))
            if wanted.io_channels is not None:
                masks.append(_among(self._part(chunk, columns, 1), wanted.io_channels))
            if wanted.chips is not None:
                masks.append(self._of_chips([self._part(chunk, columns, i) for i in range(3)]))
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        return np.ascontiguousarray(mask, np.bool_)

    def _part(self, chunk: Chunk, of_keys: NDArray[np.int64] | None, i: int) -> NDArray[Any]:
        """Return io_group, io_channel or chip_id."""
        return chunk.column(self._columns[i]) if of_keys is None else of_keys[i]

    def _of_chips(self, parts: list[NDArray[Any]]) -> NDArray[np.bool_]:
        groups, *columns = parts
        fits = np.ones(len(groups), np.bool_)
        for column in columns:
            if column.dtype != np.uint8:
                fits &= (column >= 0) & (column <= 255)
        io_channel, chip_id = (np.where(fits, column, 0).astype(np.uint16) for column in columns)
        place = io_channel << np.uint16(8) | chip_id
        mask = np.zeros(len(groups), np.bool_)
        for group, table in self._chips.items():
            mask |= fits & (groups == group) & table[place]
        return mask


def _numeric(dtype: np.dtype[Any], *names: str) -> str:
    """Return the first of these columns that is there and has numbers; "" if none."""
    present = dtype.names or ()
    return next((name for name in names if name in present and dtype[name].kind in "iuf"), "")


def _parts_of_keys(keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Return io_group, io_channel and chip_id of chip keys, shape (3, N): 0, -1 and -1 for other texts."""
    texts, which = np.unique(keys, return_inverse=True)
    parts = np.tile(np.array([[0], [-1], [-1]], np.int64), (1, len(texts)))
    for i, text in enumerate(texts.tolist()):
        if (match := _KEY.fullmatch(text)) is not None:
            parts[:, i] = [int(part) for part in match.groups()]
    return parts[:, which.reshape(-1)]


def _among(column: NDArray[Any], values: Collection[int]) -> NDArray[np.bool_]:
    """Determine which entries are among these values, 0 to 255."""
    if len(values) == 1:
        return np.asarray(column == next(iter(values)), np.bool_)
    if column.dtype == np.uint8:
        table = np.zeros(256, np.bool_)
        table[list(values)] = True
        return np.asarray(table[column])
    return np.isin(column, list(values))


def take_rows(
    chunk: Chunk,
    begin: int,
    columns: Columns,
    chosen: RowFilter | None,
    stretches: Sequence[tuple[int, int]],
    first: int,
    out: NDArray[Any],
) -> int:
    """Write columns of the chosen rows of a chunk within the stretches into `out`; return their number.

    `begin`: the row of the file with which the chunk begins, counted as in the stretches.
    """
    mask = chosen.chosen(chunk) if chosen is not None else None
    if not (len(stretches) == 1 and stretches[0][0] <= begin and stretches[0][1] >= begin + chunk.size):
        within = np.zeros(chunk.size, np.bool_)
        for start, stop in stretches:
            within[max(0, start - begin) : max(0, stop - begin)] = True
        mask = within if mask is None else mask & within
    return chunk.take(columns, mask, out, first + begin)


class RowReader:
    """Reads rows of an open dataset, in any thread. Errors are those of h5py."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._dtype: np.dtype[Any] = dataset.dtype
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        chunk = dataset.chunks[0] if dataset.chunks is not None else 0
        is_packed = chunk >= _MIN_CHUNK_ROWS and self._dtype.itemsize <= _MAX_ROW_BYTES and filters in _FILTERS
        self._size = chunk if is_packed else 0  # rows of a chunk that is read without HDF5
        self._is_shuffled = is_packed and filters == _FILTERS[0]

    def read(
        self,
        start: int,
        stop: int,
        columns: Columns | None = None,
        chosen: RowFilter | None = None,
        stretches: Sequence[tuple[int, int]] | None = None,
        first: int = 0,
    ) -> NDArray[Any]:
        """Read rows `start` to `stop`, of these only the chosen ones, and only within the stretches (row, row after).

        The stretches are in order, and lie between `start` and `stop`.
        `first`: number of row 0, for the column of row numbers.
        """
        start, stop = int(start), int(stop)  # numbers of rows in tables are unsigned, and overflow below 0
        columns = columns or Columns(self._dtype)
        out = np.empty(max(0, stop - start), columns.dtype)
        made = 0
        for begin, chunk in self._chunks(start, stop):
            made += take_rows(chunk, begin, columns, chosen, stretches or [(start, stop)], first, out[made:])
        return columns.result(out, made)

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, Chunk]]:
        """Read the chunks with rows `start` to `stop`: the first row of each, and its rows."""
        size = self._size
        if not size:
            if start < stop:
                yield start, Chunk(self._dtype, rows=np.asarray(self._dataset[start:stop]))
            return
        for first in range(start - start % size, stop, size):
            yield first, self._unpacked(first) or Chunk(self._dtype, rows=self._dataset[first : first + size])

    def _unpacked(self, first: int) -> Chunk | None:
        """Read a chunk without HDF5's filters. None if HDF5 must read it, which also judges damaged ones."""
        try:
            skipped, data = self._dataset.id.read_direct_chunk((first,))
            nbytes = self._size * self._dtype.itemsize
            if skipped == layout.NO_FILTERS and self._is_shuffled and len(data) == nbytes:
                return Chunk(self._dtype, rows=np.frombuffer(data, self._dtype))
            if skipped:
                return None
            # HDF5 ignores bytes after the deflated data, and a writer may have put one there (Batch._place).
            planes = np.frombuffer(inflate(data, nbytes)[0], np.uint8)
        except (OSError, RuntimeError, ValueError, ChecksumError):
            return None
        return (
            Chunk(self._dtype, planes=planes)
            if self._is_shuffled
            else Chunk(self._dtype, rows=planes.view(self._dtype))
        )


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of work(item), in order; threads work on the next ones meanwhile.

    At most `threads` + 1 results wait. An exception of `work` is raised at its place.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, "reading") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > threads:
                    done, result = waiting.popleft()
                    yield done, result.result()
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
