"""What a row, a layout and a ledger are: dtypes and names, no behaviour beyond looking things up.

A *row* is the packed LArPix+HDF5 record of one packet (or timestamp, message, sync, trigger). The compiled core fills
rows in place; ``ext/row_structs.pxd`` holds the same structs, and the memoryview types check one against the other at
every call.

Where chips stand in arrays that have a row for each.
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
#: Where a message lies in the buffer that holds it.
SPAN: Final = np.dtype([("start", "<u4"), ("length", "<u4")])
#: A word that could not become a row, as a decoder hands it over: `raw[:size]` are its bytes.
UNKNOWN_WORD: Final = np.dtype(
    [("seconds", "<u8"), ("io_group", "u1"), ("reason", "u1"), ("size", "u1"), ("raw", "u1", (24,))]
)
#: What a decoder notices that speaks for a loss before its bytes reached us, in the order of ext/loss_evidence.pxd.
#: sources/data_quality.py says what follows from it.
NOTICES: Final = (
    "short",  # messages with fewer words than their headers count; amount: words
    "trailing",  # messages with more than that; bytes
    "rejected",  # messages that were thrown away whole; bytes
    "unknown",  # unknown and rejected words
    "resync",  # serial: bytes in no frame
    "oversized",  # messages larger than any that a board sends, dropped; bytes
    "full",  # data packets whose FIFO flags say "full"
    "doubled",  # messages that came twice; words
    "back",  # headers with an earlier time than the one before; seconds
    "ahead",  # headers with a far later time than the one before, without a pause; seconds
    "heartbeats",  # intervals with heartbeats missing; heartbeats
    "resets",  # intervals with SYNC words of clock resets missing
    "holes",  # jumps of the board's clock within data that were held up; microseconds
    "cut",  # packets of PACMAN format 1.0 whose time is above 32 bits, in a layout with 32; packets
    "clock64",  # words with a time where only firmware with a 64-bit clock has one, which was not asked for; words
    "clock32",  # the reverse: sync and trigger words with a time where firmware with a 64-bit clock has none; words
    "as_v1",  # samples of 64 packets that look like those of v1 chips, which --asic does not name; packets
    "as_v2",  # of v2 chips; packets
    "as_v3",  # of v3 chips; packets
    "parity",  # samples of 64 packets of which more than a quarter have wrong parity; packets with it
)
NOTICE: Final = np.dtype([("events", "<u8"), ("amount", "<u8"), ("first_ns", "<u8"), ("last_ns", "<u8")])
#: `reason` in UNKNOWN_WORD.
REASONS: Final = {
    1: "unknown word type",
    2: "io_channel above 255",
    3: "invalid packet type",
    4: "receipt timestamp above 32 bits",  # in layout 2.4, by releases that did not keep the lower half
}
#: Unknown words that a decoder keeps, per run.
UNKNOWN_KEPT: Final = 1000
#: Rows of a chunk of the file. A chunk of every layout fits into the 1 MiB that HDF5 before 2.0 caches per dataset: to
#: read row by row, as larpix-control's from_file does, takes 47 us a row; with 65,536 it took 12 ms (HDF5 1.14.6).
CHUNK_ROWS: Final = 16_384
MESSAGE_BYTES: Final = 64
TEXT_BYTES: Final = 256


def _with(columns: dict[str, str], *more: tuple[str, str]) -> np.dtype[Any]:
    return np.dtype([(name, columns.get(name, kind)) for name, kind in _COMMON] + list(more))


#: v2, v2a, v2b, v2d and LightPix chips: 36 bytes. `timestamp` in ticks of the chip's clock, `receipt_timestamp` in
#: ticks of the board's 10 MHz master clock; rows of type 4 have unix seconds in `timestamp`.
PACKETS_2_4: Final = _with({})

#: The same with the board's 64-bit clock (40 bytes).
PACKETS_2_4_CLOCK64: Final = _with({"receipt_timestamp": "<u8"})

#: v3 chips: 43 bytes.
PACKETS_3_0: Final = _with(
    {"dataword": "<u2", "receipt_timestamp": "<u8"}, ("reset_sample_flag", "u1"), ("cds_flag", "u1")
)


class RowLayout(NamedTuple):
    """How the rows of a run look. `code` stands in block headers, `version` in the file's header."""

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
    """The layout with this code; ValueError names the code when there is none."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise ValueError(f"unknown layout code {code}; known are {sorted(_BY_CODE)}") from None


class Asic(IntEnum):
    """Chip generations that differ on the wire or in the layout. The codes are those of ``ext/row_structs.pxd``."""

    V1 = 1
    V2 = 2
    V2_DIAGNOSTICS = 3
    V3 = 4


#: `--asic` on the command line -> the generation that decodes it. v2b and LightPix differ from v2 in registers only.
ASICS: Final = {"1": Asic.V1, "2": Asic.V2, "2b": Asic.V2, "lightpix-1": Asic.V2, "3": Asic.V3}


def layout_of(asic: Asic, *, clock64: bool = False) -> RowLayout:
    """The layout that rows of this chip generation have (`clock64`: boards with a 64-bit clock)."""
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
    """The column with the packet type: layouts before 2.0 call it `type`."""
    return "packet_type" if "packet_type" in (dtype.names or ()) else "type"


def types_of(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """The packet type of each row, shape (N,)."""
    types: NDArray[np.uint8] = rows[type_column(rows.dtype)]
    return types


def registers_of(rows: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Addresses and values of rows about registers, each of shape (N,); layout 1.0 calls them otherwise."""
    v1 = "register" in (rows.dtype.names or ())
    address, value = ("register", "value") if v1 else ("register_address", "register_data")
    return rows[address], rows[value]


def io_groups_of(rows: NDArray[Any]) -> NDArray[np.intp]:
    """The io_group of each row, shape (N,); layout 1.0 has it in its chip_key."""
    if "io_group" in (rows.dtype.names or ()):
        return np.asarray(rows["io_group"], np.intp)
    return np.array([int(key.split(b"-")[0] or 0) for key in rows["chip_key"]], np.intp)


def chips_of(rows: NDArray[Any]) -> NDArray[np.intp]:
    """io_group << 16 | io_channel << 8 | chip_id of rows that chips have sent, shape (N,); layout 1.0 has them in its
    chip_key."""
    if "io_group" in (rows.dtype.names or ()):
        io_group, io_channel, chip_id = (rows[name].astype(np.intp) for name in ("io_group", "io_channel", "chip_id"))
        return np.asarray(io_group << 16 | io_channel << 8 | chip_id, np.intp)
    keys, back = np.unique(rows["chip_key"], return_inverse=True)
    parts = np.array([key.split(b"-") for key in keys.tolist()]).astype(np.intp).reshape(-1, 3)
    chips: NDArray[np.intp] = parts[:, 0] << 16 | parts[:, 1] << 8 | parts[:, 2]
    return chips[back]


class Places:
    def __init__(self) -> None:
        self._tables: dict[int, NDArray[np.int32]] = {}  # io_group -> place by io_channel << 8 | chip_id
        self._count = 0

    def add(self, chips: NDArray[np.uint8]) -> None:
        """Each of them gets the next place; shape (N, 3): io_group, io_channel, chip_id."""
        for io_group, io_channel, chip_id in chips.tolist():
            table = self._tables.setdefault(io_group, np.full(1 << 16, -1, np.int32))
            table[io_channel << 8 | chip_id] = self._count
            self._count += 1

    def find(self, chips: NDArray[np.intp]) -> NDArray[np.intp]:
        """The place of each, -1 of those that have none; shape (N,), a chip in one number as schema.chips_of has it."""
        places = np.full(len(chips), -1, np.intp)
        for io_group, table in self._tables.items():
            at = chips >> 16 == io_group
            places[at] = table[chips[at] & 0xFFFF]
        return places


def key_of(parts: Any) -> str:
    return "-".join(map(str, parts))


def parse_key(asked: Any) -> tuple[int, int, int]:
    """io_group, io_channel, chip_id of "1-2-3" or [1, 2, 3]; RequestError for what is no chip key."""
    parts = asked.split("-") if isinstance(asked, str) else asked
    with contextlib.suppress(TypeError, ValueError):
        if len(parts) == 3 and not any(isinstance(part, bool | float) for part in parts):
            io_group, io_channel, chip_id = (int(part) for part in parts)
            if all(0 <= part <= 255 for part in (io_group, io_channel, chip_id)):
                return io_group, io_channel, chip_id
    raise RequestError(f'chip {asked!r:.100}: expected a chip key such as "1-2-3" (io_group, io_channel, chip_id)')
