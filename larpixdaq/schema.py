"""Dtypes of rows in each layout, codes and names of their values, and lookups of columns and chips.

A *row* is the packed LArPix+HDF5 record of one packet (or timestamp, message, sync, trigger). The compiled decoders
write rows in place. ``ext/row_structs.pxd`` has the same structs, and the memoryview types compare them at every call.
"""

from __future__ import annotations

import contextlib
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.constants import LAYOUT_NAMES
from larpixdaq.errors import RequestError

_COMMON: Final = [
    ("io_group", "u1"),
    ("io_channel", "u1"),
    ("chip_id", "u1"),
    ("packet_type", "u1"),
    ("downstream_marker", "u1"),
    ("parity", "u1"),
    ("valid_parity", "u1"),
    ("channel_id", "u1"),
    ("timestamp", "<u8"),
    ("dataword", "u1"),
    ("trigger_type", "u1"),
    ("local_fifo", "u1"),
    ("shared_fifo", "u1"),
    ("register_address", "u1"),
    ("register_data", "u1"),
    ("direction", "u1"),
    ("local_fifo_events", "u1"),
    ("shared_fifo_events", "<u2"),
    ("counter", "<u4"),
    ("fifo_diagnostics_enabled", "u1"),
    ("first_packet", "u1"),
    ("receipt_timestamp", "<u4"),
]
#: v1 chips: 56 bytes; `chip_key` is "io_group-io_channel-chip_id", `adc_counts` has all 10 bits.
PACKETS_1_0: Final = np.dtype(
    [
        ("chip_key", "S32"),
        ("type", "u1"),
        ("chipid", "u1"),
        ("parity", "u1"),
        ("valid_parity", "u1"),
        ("channel", "u1"),
        ("timestamp", "<u8"),
        ("adc_counts", "<u2"),
        ("fifo_half", "u1"),
        ("fifo_full", "u1"),
        ("register", "u1"),
        ("value", "u1"),
        ("counter", "<u4"),
        ("direction", "u1"),
    ]
)
#: Position of a message in a buffer.
SPAN: Final = np.dtype([("start", "<u4"), ("length", "<u4")])
#: Word of which a decoder could not make a row. `raw[:size]`: its bytes.
UNKNOWN_WORD: Final = np.dtype(
    [("seconds", "<u8"), ("io_group", "u1"), ("reason", "u1"), ("size", "u1"), ("raw", "u1", (24,))]
)
#: Evidence in the received bytes that data were lost before the producer, in the order of ext/loss_evidence.pxd.
#: sources/data_quality.py has the consequences.
NOTICES: Final = (
    "short",  # messages with fewer words than their headers count; amount: words
    "trailing",  # messages with more bytes than their words; bytes
    "rejected",  # messages of which no word was decoded; bytes
    "unknown",  # unknown and rejected words
    "resync",  # serial: bytes outside of frames
    "oversized",  # messages larger than any of a board, dropped; bytes
    "full",  # data packets with the flag of a full FIFO
    "doubled",  # messages received twice; words
    "back",  # headers with an earlier time than the previous header; seconds
    "ahead",  # headers with a far later time than the previous header, without a pause; seconds
    "heartbeats",  # intervals with missing heartbeats; heartbeats
    "resets",  # intervals with missing SYNC words of clock resets
    "holes",  # jumps of the board's clock in data that were delayed on their way; microseconds
    "cut",  # packets of PACMAN format 1.0 with a time above 32 bits, in a layout with 32 bits; packets
    "clock64",  # without --clock64: words with a time at the place of a 64-bit clock; words
    "clock32",  # with --clock64: sync and trigger words with a time at the place of a 32-bit clock; words
    "as_v1",  # samples of 64 packets that look like packets of v1 chips, against --asic; packets
    "as_v2",  # of v2 chips; packets
    "as_v3",  # of v3 chips; packets
    "parity",  # samples of 64 packets, more than a quarter with wrong parity; packets with wrong parity
)
NOTICE: Final = np.dtype([("events", "<u8"), ("amount", "<u8"), ("first_ns", "<u8"), ("last_ns", "<u8")])
#: Values of `reason` in UNKNOWN_WORD.
REASONS: Final = {
    1: "unknown word type",
    2: "io_channel above 255",
    3: "invalid packet type",
    4: "receipt timestamp above 32 bits",  # in layout 2.4, in files of earlier releases
}
#: Maximum number of unknown words that a decoder keeps in a run.
UNKNOWN_KEPT: Final = 1000
#: Seconds per tick of a board's master clock, unless it was configured otherwise.
TICK: Final = 1e-7
#: Rows of a chunk of the file. A chunk of every layout fits into the cache of 1 MiB that HDF5 before 2.0 has for each
#: dataset. larpix-control's from_file reads row by row: 47 us a row, and 12 ms with 65,536 (HDF5 1.14.6).
CHUNK_ROWS: Final = 16_384
#: Bytes of a row of /messages, and of a row of other texts.
MESSAGE_BYTES: Final = 64
TEXT_BYTES: Final = 256


def _common_layout(columns: dict[str, str], *more: tuple[str, str]) -> np.dtype[Any]:
    """Return a dtype with the common columns, some of them of another type, and with more columns."""
    return np.dtype([(name, columns.get(name, kind)) for name, kind in _COMMON] + list(more))


#: v2, v2a, v2b, v2d and LightPix chips: 36 bytes. `timestamp`: ticks of the chip's clock, in rows of type 4 unix
#: seconds. `receipt_timestamp`: ticks of the board's 10 MHz master clock.
PACKETS_2_4: Final = _common_layout({})

#: The same chips at boards with a 64-bit clock: 40 bytes.
PACKETS_2_4_CLOCK64: Final = _common_layout({"receipt_timestamp": "<u8"})

#: v3 chips: 43 bytes.
PACKETS_3_0: Final = _common_layout(
    {"dataword": "<u2", "receipt_timestamp": "<u8"}, ("reset_sample_flag", "u1"), ("cds_flag", "u1")
)


class RowLayout(NamedTuple):
    """Layout of the rows of a run. `code`: its code in block headers. `version`: its version in the file's header."""

    code: int
    name: str
    version: str
    dtype: np.dtype[Any]


LAYOUTS: Final = (
    RowLayout(1, LAYOUT_NAMES[1], "1.0", PACKETS_1_0),
    RowLayout(2, LAYOUT_NAMES[2], "2.4", PACKETS_2_4),
    RowLayout(3, LAYOUT_NAMES[3], "2.4", PACKETS_2_4_CLOCK64),
    RowLayout(4, LAYOUT_NAMES[4], "3.0", PACKETS_3_0),
)

_BY_CODE: Final = {layout.code: layout for layout in LAYOUTS}


def layout(code: int) -> RowLayout:
    """Return the layout with this code. Raises ValueError."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise ValueError(f"unknown layout code {code}; known are {sorted(_BY_CODE)}") from None


class Asic(IntEnum):
    """Chip generations that differ in words or layout. The codes are those of ``ext/row_structs.pxd``."""

    V1 = 1
    V2 = 2
    V2_DIAGNOSTICS = 3
    V3 = 4


#: Chip generation that decodes the words, by --asic. v2b and LightPix differ from v2 in registers only, v2d also in the
#: magic word of configuration words (hardware/register_map.py).
ASICS: Final = {"1": Asic.V1, "2": Asic.V2, "2b": Asic.V2, "2d": Asic.V2, "lightpix-1": Asic.V2, "3": Asic.V3}


def layout_of(asic: Asic, *, clock64: bool = False) -> RowLayout:
    """Return the layout of rows of this chip generation. `clock64`: the boards have a 64-bit clock."""
    if asic == Asic.V1:
        return LAYOUTS[0]
    if asic == Asic.V3:
        return LAYOUTS[3]
    return LAYOUTS[2] if clock64 else LAYOUTS[1]


class PacketType(IntEnum):
    DATA = 0
    TEST = 1
    CONFIG_WRITE = 2
    CONFIG_READ = 3
    TIMESTAMP = 4
    MESSAGE = 5
    SYNC = 6
    TRIGGER = 7


def type_column(dtype: np.dtype[Any]) -> str:
    """Return the name of the column with the packet type, which is `type` in layouts before 2.0."""
    return "packet_type" if "packet_type" in (dtype.names or ()) else "type"


def types_of(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the packet type of each row, shape (N,)."""
    types: NDArray[np.uint8] = rows[type_column(rows.dtype)]
    return types


def registers_of(rows: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the register addresses and values of rows, each of shape (N,). Layout 1.0 has other column names."""
    v1 = "register" in (rows.dtype.names or ())
    address, value = ("register", "value") if v1 else ("register_address", "register_data")
    return rows[address], rows[value]


def io_groups_of(rows: NDArray[Any]) -> NDArray[np.intp]:
    """Return the io_group of each row, shape (N,). In layout 1.0 it is in the chip_key."""
    if "io_group" in (rows.dtype.names or ()):
        return np.asarray(rows["io_group"], np.intp)
    return np.array([int(key.split(b"-")[0] or 0) for key in rows["chip_key"]], np.intp)


def chips_of(rows: NDArray[Any]) -> NDArray[np.intp]:
    """Return io_group << 16 | io_channel << 8 | chip_id of rows of chips, shape (N,).

    In layout 1.0 they are in the chip_key.
    """
    if "io_group" in (rows.dtype.names or ()):
        io_group, io_channel, chip_id = (rows[name].astype(np.intp) for name in ("io_group", "io_channel", "chip_id"))
        return np.asarray(io_group << 16 | io_channel << 8 | chip_id, np.intp)
    keys, inverse = np.unique(rows["chip_key"], return_inverse=True)
    parts = np.array([key.split(b"-") for key in keys.tolist()]).astype(np.intp).reshape(-1, 3)
    chips: NDArray[np.intp] = parts[:, 0] << 16 | parts[:, 1] << 8 | parts[:, 2]
    return chips[inverse]


class ChipIndex:
    """Index of each chip, in the order of add(), for arrays with a row for each chip."""

    def __init__(self) -> None:
        self._tables: dict[int, NDArray[np.int32]] = {}  # io_group -> index by io_channel << 8 | chip_id
        self._count = 0

    def add(self, chips: NDArray[np.uint8]) -> None:
        """Give the next indices to chips, shape (N, 3): io_group, io_channel, chip_id."""
        for io_group, io_channel, chip_id in chips.tolist():
            table = self._tables.setdefault(io_group, np.full(1 << 16, -1, np.int32))
            table[io_channel << 8 | chip_id] = self._count
            self._count += 1

    def find(self, chips: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the index of each chip, -1 for unknown chips, shape (N,). `chips`: shape (N,), as of chips_of()."""
        indices = np.full(len(chips), -1, np.intp)
        for io_group, table in self._tables.items():
            on_board = chips >> 16 == io_group
            indices[on_board] = table[chips[on_board] & 0xFFFF]
        return indices


def tile_of(io_channel: int) -> int:
    """Return the number of an io_channel's tile, from 1, as boards and most scripts count them."""
    return (io_channel - 1) // 4 + 1


def key_of(parts: Any) -> str:
    """Return the chip key of io_group, io_channel and chip_id."""
    return "-".join(map(str, parts))


def parse_key(key: Any) -> tuple[int, int, int]:
    """Return io_group, io_channel and chip_id of "1-2-3" or [1, 2, 3]. Raises RequestError."""
    parts = key.split("-") if isinstance(key, str) else key
    with contextlib.suppress(TypeError, ValueError):
        if len(parts) == 3 and not any(isinstance(part, bool | float) for part in parts):
            io_group, io_channel, chip_id = (int(part) for part in parts)
            if all(0 <= part <= 255 for part in (io_group, io_channel, chip_id)):
                return io_group, io_channel, chip_id
    raise RequestError(f'chip {key!r:.100}: expected a chip key such as "1-2-3" (io_group, io_channel, chip_id)')
