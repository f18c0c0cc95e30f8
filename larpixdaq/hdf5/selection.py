"""Selection of rows by type, board, chip and channel, for every layout and for files of other programs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import FileError, RequestError
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recordings import key_groups
from larpixdaq.schema import PacketType, parse_key, types_of

_KEY: Final = re.compile(rb"\d+-(\d+)-\d+")
#: Names of types for people: `config_write` and `config-write`.
_TYPES: Final = {kind.name.lower(): int(kind) for kind in PacketType}


class Selection(NamedTuple):
    """Rows that all given conditions allow; an empty tuple allows everything.

    Chips are (io_group, io_channel, chip_id).

    io_channels, chips and channels select among packets: rows of other types have none, and are left out.
    """

    types: tuple[int, ...] = ()
    io_groups: tuple[int, ...] = ()
    io_channels: tuple[int, ...] = ()
    chips: tuple[tuple[int, int, int], ...] = ()
    channels: tuple[int, ...] = ()
    #: Range of row numbers; `stop` None: to the end, negative: counted from the end, as in Python.
    start: int = 0
    stop: int | None = None

    @property
    def by_content(self) -> bool:
        """Whether rows are selected by their columns."""
        return any(self[:5])

    def mask(self, rows: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which rows are selected by their columns, shape (N,). FileError if the rows lack such a column."""
        kinds = types_of(rows)
        chosen = np.ones(len(rows), np.bool_)
        if self.types:
            chosen &= np.isin(kinds, self.types)
        if self.io_groups:
            chosen &= np.isin(self._column(rows, "io_group"), self.io_groups)
        if self.io_channels or self.chips or self.channels:
            chosen &= kinds <= PacketType.CONFIG_READ
        if self.io_channels:
            chosen &= np.isin(self._column(rows, "io_channel"), self.io_channels)
        if self.channels:
            chosen &= np.isin(self._column(rows, "channel_id", "channel"), self.channels)
        if self.chips:
            names = ("io_group",), ("io_channel",), ("chip_id", "chipid")
            found = np.stack([self._column(rows, *name).astype(np.int64) for name in names], axis=-1)
            wanted = np.array(self.chips, np.int64)
            chosen &= np.isin(found @ [1 << 32, 1 << 16, 1], wanted @ [1 << 32, 1 << 16, 1])
        return chosen

    @staticmethod
    def _column(rows: NDArray[Any], *names: str) -> NDArray[Any]:
        present = rows.dtype.names or ()
        for name in names:
            if name in present and rows.dtype[name].kind in "iuf":
                return np.asarray(rows[name])
        if "chip_key" in present and rows.dtype["chip_key"].kind == "S":
            if names[0] == "io_group":
                return key_groups(rows["chip_key"], 0)
            if names[0] == "io_channel":
                return _key_channels(rows["chip_key"])
        raise FileError(f"/packets has no column {names[0]}, by which rows are selected")

    def range(self, rows: int) -> tuple[int, int]:
        """Return the first row and the one after the last, of a file with this number of rows."""
        start, stop, _ = slice(self.start, self.stop).indices(rows)
        return start, max(start, stop)

    def pieces(self, file: DataFile, size: int) -> Iterator[tuple[int, NDArray[Any], NDArray[np.intp] | None]]:
        """Read the selected rows in pieces of at most `size` rows of the file.

        Yields the number of the first row of each piece, its selected rows, and their places in the piece, None for
        all.
        """
        first, last = self.range(file.rows)
        for start in range(first - first % size, last, size):
            begin, end = max(start, first), min(start + size, last)
            rows = file.packets(begin, end)
            if not self.by_content:
                yield begin, rows, None
                continue
            places = np.flatnonzero(self.mask(rows))
            yield begin, rows[places], places


def _key_channels(keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Return the io_channels of chip keys, -1 for other texts."""
    texts, which = np.unique(keys, return_inverse=True)
    matches = [_KEY.fullmatch(text) for text in texts.tolist()]
    channels = np.array([int(match[1][:9]) if match else -1 for match in matches] or [-1], np.int64)
    return channels[which.reshape(-1)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select rows."""
    add = parser.add_argument
    names = ", ".join(name.replace("_", "-") for name in _TYPES)
    add(
        "--types",
        type=parse_types,
        default=(),
        metavar="TYPE,...",
        help=f"only rows of these types: {names}, or 0 to 7",
    )
    add("--io-groups", type=_numbers(255), default=(), metavar="N,...", help="only of these io_groups, such as 1,3-5")
    add("--io-channels", type=_numbers(255), default=(), metavar="N,...", help="only packets of these io_channels")
    add("--chips", type=parse_chips, default=(), metavar="KEY,...", help="only packets of these chips, such as 1-2-11")
    add("--channels", type=_numbers(255), default=(), metavar="N,...", help="only packets of these channels")
    add(
        "--rows",
        type=parse_range,
        default=(0, None),
        metavar="FIRST:END",
        help="only rows from FIRST to before END, by their number in the file, before other selections; negative "
        "numbers count from the end: -100: are the last 100 (write --rows=-100:)",
    )


def selection(options: argparse.Namespace) -> Selection:
    """Return the selection of parsed options."""
    return Selection(
        options.types, options.io_groups, options.io_channels, options.chips, options.channels, *options.rows
    )


def parse_types(text: str) -> tuple[int, ...]:
    """Parse names or numbers of packet types. Raises ArgumentTypeError."""
    kinds = []
    for name in text.split(","):
        kind = _TYPES.get(name.strip().lower().replace("-", "_").replace(" ", "_"))
        if kind is None and name.strip() in map(str, range(8)):
            kind = int(name)
        if kind is None:
            known = ", ".join(each.replace("_", "-") for each in _TYPES)
            raise argparse.ArgumentTypeError(f"type {name!r:.40}: expected one of {known}, or 0 to 7")
        kinds.append(kind)
    return tuple(kinds)


def parse_chips(text: str) -> tuple[tuple[int, int, int], ...]:
    """Parse chip keys. Raises ArgumentTypeError."""
    try:
        return tuple(parse_key(key.strip()) for key in text.split(","))
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_range(text: str) -> tuple[int, int | None]:
    """Parse FIRST:END, of which either may be left out. Raises ArgumentTypeError."""
    match = re.fullmatch(r"\s*(-?\d{1,15})?\s*:\s*(-?\d{1,15})?\s*", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"rows {text!r:.40}: expected FIRST:END, such as 1000:2000 or -100:")
    return int(match[1] or 0), None if match[2] is None else int(match[2])


def _numbers(high: int) -> Any:
    def parse(text: str) -> tuple[int, ...]:
        found: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
            if match is None or int(match[2] or match[1]) > high or int(match[2] or match[1]) < int(match[1]):
                raise argparse.ArgumentTypeError(f"{part!r:.40}: expected numbers from 0 to {high}, such as 1,3-5")
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
        return tuple(found)

    return parse
