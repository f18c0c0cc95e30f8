"""Rows of a block packed for consumers on other hosts, in the form of a chunk of a file: bytes shuffled, then deflated.

A storage writes a packed block that fills a chunk of its file as it came. So the third part of its message says what a
consumer otherwise finds out from the rows: checksums, and how many rows of each kind there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.hdf5_chunks import TALLY, Packer, gather, tally
from larpixdaq.constants import BLOCK_ROWS, IO_GROUPS
from larpixdaq.errors import ChecksumError, ProtocolError
from larpixdaq.runtime.record_file import crc32, zlib_library

#: Minimum rows of a packed block. The codes of fewer rows take more room than they save.
MIN_ROWS: Final = 64
#: Seconds for which the rows of a producer are taken plain, or unpacked before they are stored, after packed rows of it
#: were damaged, or rows in its ring overwritten.
PLAIN_ROWS: Final = 60.0
#: Maximum number of packed blocks that are kept for further subscribers.
_KEPT: Final = 32
#: Bytes of the largest row, and maximum bytes that packing adds to rows that it cannot make smaller.
_LARGEST_ROW: Final = max(layout.dtype.itemsize for layout in schema.LAYOUTS)
_OVERHEAD: Final = 8192
#: Columns of a tally that add up to all rows.
ROW_COLUMNS: Final = [TALLY.index(name) for name in ("word_rows", "time_rows", "info_rows", "sent_rows", "other_rows")]


class _Description(msgspec.Struct, array_like=True, frozen=True):
    """The third part of a message with packed rows."""

    crc32: Annotated[int, Meta(ge=0, le=2**32 - 1)]  # of the packed rows
    rows_crc32: Annotated[int, Meta(ge=0, le=2**32 - 1)]  # of the rows that were packed
    #: For each io_group with rows: the io_group, and its rows by kind, in the order of hdf5_chunks.TALLY.
    tally: Annotated[
        list[
            Annotated[
                list[Annotated[int, Meta(ge=0, le=BLOCK_ROWS)]],
                Meta(min_length=1 + len(TALLY), max_length=1 + len(TALLY)),
            ]
        ],
        Meta(max_length=IO_GROUPS),
    ]


_decoder: Final = msgspec.msgpack.Decoder(_Description)


def new_tally() -> NDArray[np.uint64]:
    """Make counters of rows for hdf5_chunks.tally(), shape (IO_GROUPS, columns of TALLY), all 0."""
    return np.zeros((IO_GROUPS, len(TALLY)), np.uint64)


class PackedRows(NamedTuple):
    """The packed rows of a block as they came.

    `crc32` of the packed rows, `rows_crc32` of the rows, `tally` as of hdf5_chunks.tally(): by the producer.
    """

    data: memoryview
    crc32: int
    rows_crc32: int
    tally: NDArray[np.uint64]

    @classmethod
    def parse(cls, data: memoryview, description: memoryview, rows: int) -> PackedRows:
        """Parse the parts of a message with a block of `rows` rows. ProtocolError if they do not belong together."""
        try:
            found = _decoder.decode(description)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"packed rows: {error}") from None
        counts = new_tally()
        for io_group, *values in found.tally:
            if io_group >= IO_GROUPS or counts[io_group].any():
                raise ProtocolError(f"packed rows: io_group {io_group} is counted twice, or above {IO_GROUPS - 1}")
            counts[io_group] = values
        if (total := int(counts[:, ROW_COLUMNS].sum())) != rows:
            raise ProtocolError(f"packed rows: expected {rows} rows, {total} are counted")
        if len(data) > (most := rows * _LARGEST_ROW + _OVERHEAD):
            raise ProtocolError(f"packed rows: expected at most {most} bytes for {rows} rows, found {len(data)}")
        return cls(data, found.crc32, found.rows_crc32, counts)

    def is_intact(self) -> bool:
        """Whether the packed bytes are those that were sent."""
        return crc32(self.data) == self.crc32

    def unpack(self, rows: int, layout: schema.RowLayout) -> NDArray[Any]:
        """Return the rows. ChecksumError if there are other than `rows` rows of this layout, or other kinds of rows."""
        out = np.empty(rows * layout.dtype.itemsize, np.uint8)
        unpack_chunk(self.data, out, layout.dtype.itemsize)
        counts = new_tally()
        tally(out, layout.code, counts)
        if not np.array_equal(counts, self.tally):
            raise ChecksumError("packed rows: their numbers by kind are not those that were sent")
        return out.view(layout.dtype)


def inflate(packed: Any, size: int, library: Any = zlib_library) -> tuple[bytes, int]:
    """Inflate `size` bytes with zlib or isal; return them, and the number of bytes after the deflated data.

    ChecksumError if there are more or fewer, or if they are damaged.
    """
    decoder = library.decompressobj()
    try:
        data: bytes = decoder.decompress(packed, size + 1)
    except library.error as error:
        raise ChecksumError(f"packed rows: {error}") from None
    if len(data) != size or not decoder.eof:
        raise ChecksumError(f"packed rows: expected {size} bytes, found {len(data)}{'' if decoder.eof else ' or more'}")
    return data, len(decoder.unused_data)


def unpack_chunk(packed: Any, out: NDArray[np.uint8], itemsize: int) -> None:
    """Unpack rows of `itemsize` bytes into `out`, which they fill. ChecksumError if they are damaged."""
    planes, more = inflate(packed, len(out))
    if more:
        raise ChecksumError(f"packed rows: {more} bytes after them")
    if len(out):
        gather(np.frombuffer(planes, np.uint8), len(out) // itemsize, np.arange(itemsize, dtype=np.int32), out)


class RowPacker:
    """Packs blocks, each once for several subscribers if they take it soon after each other."""

    def __init__(self) -> None:
        self._packers: dict[int, Packer] = {}  # by layout
        self._kept: OrderedDict[tuple[int, int], tuple[bytes, bytes]] = OrderedDict()

    def pack(
        self, epoch: int, index: int, rows: Any, layout: schema.RowLayout, may_pack: Callable[[], bool]
    ) -> tuple[bytes, bytes] | None:
        """Pack the rows (bytes-like) of block `index`. Returns the second and third part of its message.

        None if they must be packed now and `may_pack` says that there is no time for it.
        """
        parts = self._kept.get((epoch, index))
        if parts is None:
            if not may_pack():
                return None
            if layout.code not in self._packers:
                self._packers[layout.code] = Packer(BLOCK_ROWS, layout.dtype.itemsize)
            data = np.frombuffer(rows, np.uint8)
            packed = self._packers[layout.code].pack(data)
            counts = new_tally()
            tally(data, layout.code, counts)
            lines = [[group, *counts[group].tolist()] for group in np.flatnonzero(counts.any(axis=1)).tolist()]
            description = msgspec.msgpack.encode(_Description(crc32(packed), crc32(data), lines))
            parts = self._kept[epoch, index] = packed, description
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return parts
