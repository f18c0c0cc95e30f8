"""Rows of packet files of any age (LArPix+HDF5 0.0 to 3.0) as rows of our layouts.

The version label of a file does not determine its columns, so they are taken by name from the file's own dtype.
Whatever is absent is 0; columns that share bits of the word are made to agree when the words are decoded again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq._native import packets as words_of
from larpixdaq.errors import ConfigError, FileError, cause
from larpixdaq.files.told import Texts
from larpixdaq.schema import ASICS, IO_GROUPS, LAYOUTS, Asic, Layout, PacketType

#: Rows of a piece: a few megabytes.
_PIECE: Final = 65_536
#: Rows that are looked through for words that a board sent, which tell whether directions were recorded.
_LOOK: Final = 1 << 20
#: The largest value that a word's field can hold, of columns that could hold more.
_WIDTHS: Final = {
    "downstream_marker": 1,
    "parity": 1,
    "channel_id": 63,
    "trigger_type": 3,
    "local_fifo": 3,
    "shared_fifo": 3,
    "local_fifo_events": 3,
    "shared_fifo_events": 4095,
    "first_packet": 1,
    "reset_sample_flag": 1,
    "cds_flag": 1,
    # Layout 1.0
    "channel": 127,
    "adc_counts": 1023,
    "fifo_half": 1,
    "fifo_full": 1,
}
_TIMESTAMP_BITS: Final = {Asic.V1: 24, Asic.V2: 32, Asic.V2_DIAGNOSTICS: 16, Asic.V3: 28}
#: Seconds of a type-4 row beyond which no board message can carry them (64 bits of nanoseconds).
_LAST_SECOND: Final = (2**64 - 1) // 10**9

Piece = tuple[NDArray[Any], NDArray[np.uint8], int, list[tuple[int, str, int]]]


class PacketFile:
    """Open for reading until close(). FileError in one line for a file that is none, or is damaged."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        packets = file.get("packets", file.get("raw_packet"))  # version 0.0 has the latter
        table = isinstance(packets, h5py.Dataset) and packets.ndim == 1
        names = set(packets.dtype.names or () if table else ())
        self._type = "type" if "chip_key" in names else "packet_type"
        known = {name for one in LAYOUTS for name in one.dtype.names or ()} & names
        if (
            not {self._type, "timestamp", "parity"} <= known
            or packets.dtype[self._type].kind not in "iu"
            or any(packets.dtype[name].shape for name in known)
        ):
            raise FileError(f"{path}: packet file without /packets of known columns")
        self._packets = packets
        #: INFO rows, of those that pieces() has passed, whose text is not in /messages.
        self.textless = 0
        self.rows = len(packets)
        header = file.get("_header")
        self.version = str(header.attrs.get("version", "")) if header is not None else ""
        self.asic = generation(names, self.version)
        self._wide = "receipt_timestamp" in names and packets.dtype["receipt_timestamp"].itemsize > 4
        self._directions = self._has_directions()

    def check(self, asic: Asic, layout: Layout) -> None:
        """ConfigError, naming the option, when the file's packets are of other chips than these, or of a wider
        clock."""
        if self.asic != (Asic.V2 if asic == Asic.V2_DIAGNOSTICS else asic):
            option = next(name for name, code in ASICS.items() if code == self.asic)
            raise ConfigError(
                f"{self.path}: packets of v{option} chips (LArPix+HDF5 {self.version}): give --asic {option}"
            )
        if self._wide and asic != Asic.V1 and layout.dtype["receipt_timestamp"].itemsize == 4:
            raise ConfigError(f"{self.path}: receipt timestamps of 64 bits: give --clock64")
        if "fifo_diagnostics_enabled" in self._packets.dtype.names:
            rows = self._read(0, min(_PIECE, self.rows))
            diagnostics = rows["fifo_diagnostics_enabled"][rows["packet_type"] < PacketType.TIMESTAMP]
            # Most of them: a damaged row must not decide.
            if len(diagnostics) and (diagnostics.mean() > 0.5) != (asic == Asic.V2_DIAGNOSTICS):
                advice = (
                    "packets not in fifo diagnostics mode: leave out"
                    if asic == Asic.V2_DIAGNOSTICS
                    else "packets in fifo diagnostics mode: give"
                )
                raise ConfigError(f"{self.path}: {advice} --fifo-diagnostics")

    def io_groups(self, default: int) -> tuple[int, ...]:
        """The io_groups among the first rows; `default` is that of rows that name none."""
        rows = self._read(0, min(_PIECE, self.rows))
        rows = rows[rows[self._type] != PacketType.MESSAGE]
        if self.asic == Asic.V1:
            groups = _key_groups(rows["chip_key"], default)
        else:
            groups = rows["io_group"] if "io_group" in (rows.dtype.names or ()) else np.empty(0, np.uint8)
        return tuple(np.unique(groups).tolist()) or (default,)

    def pieces(self, layout: Layout, asic: Asic, default: int) -> Iterator[Piece]:
        """Rows of this layout, but none of type 5; their io_groups; how many rows were left out because no word can
        look like them; and the INFO texts, each with the number of those rows that come before it and its time (unix
        seconds).

        `default` is the io_group of rows that name none (layout 1.0). Rows of types 0 to 3 have direction 0 when they
        were sent; of files that do not record directions all count as received.
        """
        texts = Texts(self._file, self.version)
        first = 0
        for given in self._given():
            rows, fits = self._normalise(given, layout, asic)
            info = rows[self._type] == PacketType.MESSAGE
            unfit = len(rows) - int((fits | info).sum())
            fits &= ~info
            told: list[tuple[int, str, int]] = []
            if info.any():
                before, seconds = np.cumsum(fits)[info], rows["timestamp"][info]
                found = texts.of(rows["counter"][info], first + np.flatnonzero(info))
                told = [(int(before[i]), text, int(seconds[i])) for i, text in found]
                self.textless = texts.missing
            first += len(given)
            groups = _key_groups(rows["chip_key"], default) if asic == Asic.V1 else rows["io_group"]
            if fits.all():
                yield rows, np.ascontiguousarray(groups), 0, told
            else:
                yield rows[fits], groups[fits], unfit, told

    def _given(self) -> Iterator[NDArray[Any]]:
        """All rows as they are, in pieces in which the rows of one INFO text stay together."""
        carried = self._read(0, 0)
        for start in range(0, self.rows, _PIECE):  # where chunks begin: a damaged one then costs no rows of others
            try:
                given = self._read(start, min(start + _PIECE, self.rows))
            except FileError:
                yield carried
                raise
            given = np.concatenate((carried, given)) if len(carried) else given
            others = np.flatnonzero(given[self._type] != PacketType.MESSAGE)
            end = others[-1] + 1 if len(others) else 0
            carried, given = given[end:], given[:end]
            yield given
        yield carried

    def close(self) -> None:
        self._file.close()

    def _read(self, start: int, end: int) -> NDArray[Any]:
        try:
            rows: NDArray[Any] = self._packets[start:end]
        except (OSError, RuntimeError, ValueError) as error:
            raise FileError(f"{self.path}: rows {start} to {end} cannot be read: {cause(error)}") from None
        return rows

    def _has_directions(self) -> bool:
        """larpix-control's conversions leave direction 0 everywhere, also in data words and in what a board has
        received."""
        if "direction" not in self._packets.dtype.names:
            return False
        if "run" in self._file:
            return True
        data = PacketType.TEST if self.asic == Asic.V3 else PacketType.DATA
        for start in range(0, min(self.rows, _LOOK), _PIECE):
            rows = self._read(start, min(start + _PIECE, self.rows))
            received = rows[self._type] == data
            if "receipt_timestamp" in self._packets.dtype.names:
                received |= (rows[self._type] < PacketType.TIMESTAMP) & (rows["receipt_timestamp"] > 0)
            if received.any():
                return bool(rows["direction"][received].any())
        return True

    def _normalise(self, given: NDArray[Any], layout: Layout, asic: Asic) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        rows = np.zeros(len(given), layout.dtype)
        fits = copy_columns(given, rows)
        kind = rows[self._type]
        words = kind < PacketType.TIMESTAMP
        if asic == Asic.V2 and "first_packet" not in (given.dtype.names or ()):
            self._find_first_packet(rows, words, given)
        fits &= ~(words & (rows["timestamp"] >= np.uint64(1 << _TIMESTAMP_BITS[asic])))
        for name in set(_WIDTHS) & set(layout.dtype.names or ()):
            fits &= ~(words & (rows[name] > _WIDTHS[name]))
        if asic == Asic.V3:
            fits &= kind != PacketType.DATA
        fits &= (kind != PacketType.TIMESTAMP) | (rows["timestamp"] <= _LAST_SECOND)
        fits &= (kind != PacketType.TRIGGER) | (rows["counter"] == 0)
        if asic == Asic.V1:
            fits &= (kind != PacketType.TEST) | (rows["counter"] < 1 << 16)
        else:
            fits &= ~words | (rows["fifo_diagnostics_enabled"] == (asic == Asic.V2_DIAGNOSTICS))
            fits &= (kind < PacketType.SYNC) | (rows["dataword"] <= 255)
        received = words & (rows["direction"] != 0) if self._directions else words
        rows["direction"] = received | (kind >= PacketType.SYNC)
        return rows, fits & (kind <= PacketType.TRIGGER)

    @staticmethod
    def _find_first_packet(rows: NDArray[Any], words: NDArray[np.bool_], given: NDArray[Any]) -> None:
        """Fill a column that files before 2.1 do not have.

        larpix-control 3.0 has it as the timestamp's highest bit, 3.1 left it out: there it is the one bit of a data
        word that is not known, and what was recorded of the parity says which it was.
        """
        rows["first_packet"][words] = (rows["timestamp"][words] >> np.uint64(31)) & np.uint64(1)
        rows["timestamp"][words] &= np.uint64(2**31 - 1)
        if "valid_parity" in (given.dtype.names or ()):
            data = np.flatnonzero(words & (rows["packet_type"] == PacketType.DATA) & (rows["first_packet"] == 0))
            found = words_of.encode(rows[data], asic=Asic.V2)
            valid = words_of.parity(found, asic=Asic.V2) == found
            rows["first_packet"][data] = valid != (rows["valid_parity"][data] == 1)


def generation(names: Collection[str], version: str) -> Asic:
    """Which chips the rows with these columns are of, in a file of this version."""
    if "chip_key" in names:
        return Asic.V1
    return Asic.V3 if "reset_sample_flag" in names or version.startswith("3") else Asic.V2


def copy_columns(given: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Fill the columns of `rows` that the given rows have too, whatever their types; False, shape (N,), for each row
    with a value that does not fit (it is 0 then)."""
    fits = np.ones(len(given), np.bool_)
    for name in rows.dtype.names or ():
        if name in (given.dtype.names or ()):
            fits &= _copy(given[name], rows[name])
    return fits


def _copy(given: NDArray[Any], column: NDArray[Any]) -> NDArray[np.bool_]:
    """Into a column of another type; False where the value does not fit (it is 0 then)."""
    if column.dtype.kind == "S":
        column[:] = given.astype(column.dtype)
        return np.ones(len(given), np.bool_)
    if given.dtype.kind not in "uif":
        return np.zeros(len(given), np.bool_)
    fits = (given >= 0) & (given <= np.iinfo(column.dtype).max)  # not a number is neither
    column[:] = np.where(fits, given, 0)
    return np.asarray(fits)


def _key_groups(keys: NDArray[np.bytes_], default: int) -> NDArray[np.uint8]:
    """The io_groups of chip keys "io_group-io_channel-chip_id"."""
    names, which = np.unique(keys, return_inverse=True)
    groups = np.full(len(names), default, np.uint8)
    for i, name in enumerate(names.tolist()):
        group = name.split(b"-")[0]
        if name.count(b"-") == 2 and group.isdigit() and len(group) < 4 and int(group) < IO_GROUPS:
            groups[i] = int(group)
    return groups[which.reshape(-1)]
