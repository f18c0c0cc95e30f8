"""The parity of every word, computed again from the row, against what the row says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native import packets
from larpixdaq.files.packets import copy_columns, generation
from larpixdaq.files.reader import DataFile

#: Layouts in which the words of each chip generation are put together again.
_LAYOUTS: Final = {
    schema.Asic.V1: schema.PACKETS_1_0,
    schema.Asic.V2: schema.PACKETS_2_4_CLOCK64,
    schema.Asic.V3: schema.PACKETS_3_0,
}
#: Columns that are no part of a word, or belong to words of fifo diagnostics only.
_NOT_NEEDED: Final = frozenset(
    {
        *("chip_key", "io_group", "io_channel", "direction", "receipt_timestamp", "counter"),
        *("fifo_diagnostics_enabled", "local_fifo_events", "shared_fifo_events"),
    }
)
#: Bits of a timestamp in a word; any other column needs the room that our layouts give it.
_TIMESTAMP_BITS: Final = 32


class ParityCheck:
    """Checks the rows of a file, which come in order. `unchecked_reason` is empty when its columns allow that."""

    def __init__(self, file: DataFile) -> None:
        self._asic = generation(file.dtype.names or (), file.version)
        self._dtype = file.layout.dtype if file.layout else _LAYOUTS[self._asic]
        self._own_layout = file.layout is not None
        #: Writers before 2.3 filled only the columns that the packet type uses: of data packets these are the word.
        self._data_only = not self._own_layout and file.version in ("2.0", "2.1", "2.2")
        #: Layout 2.3 of larpix-control has 8 bits for the 12 of this column, which is part of fifo diagnostics words.
        self._whole_events = self._own_layout or _holds(file.dtype, schema.PACKETS_2_4, "shared_fifo_events")
        self.unchecked_reason = "" if self._own_layout else _missing_columns(file.dtype, self._dtype)
        self._wrong = 0  # rows whose column is not what their word says
        self._first = -1
        self._bad = 0
        self._words = 0
        self._unchecked = 0  # words that their rows do not hold whole

    def add(self, rows: NDArray[Any], first: int) -> None:
        """Rows of the file, `first` being the index of the first of them."""
        if self.unchecked_reason:
            return
        if not self._own_layout:
            given, rows = rows, np.zeros(len(rows), self._dtype)
            copy_columns(given, rows)
        if self._asic != schema.Asic.V2:
            self._check(rows, self._asic, first)
            return
        modes = rows["fifo_diagnostics_enabled"] != 0
        # A chip's mode changes seldom: stretches of one mode, almost always a single one, need no copies.
        ends = [*(np.flatnonzero(modes[1:] != modes[:-1]) + 1), len(rows)]
        start = 0
        for end in ends:
            asic = schema.Asic.V2_DIAGNOSTICS if end > start and modes[start] else schema.Asic.V2
            self._check(rows[start:end], asic, first + start)
            start = end

    def _check(self, rows: NDArray[Any], asic: schema.Asic, first: int) -> None:
        places = np.flatnonzero(schema.types_of(rows) <= schema.PacketType.CONFIG_READ)
        words = packets.encode(rows, asic=asic)
        if asic == schema.Asic.V2_DIAGNOSTICS and not self._whole_events:
            self._unchecked += len(places)
            return
        if self._data_only:
            data = schema.types_of(rows)[places] == schema.PacketType.DATA
            self._unchecked += int(np.count_nonzero(~data))
            places, words = places[data], words[data]
        valid = packets.parity(words, asic=asic) == words
        wrong = places[valid != (rows["valid_parity"][places] == 1)]
        if len(wrong):
            self._first = first + int(wrong[0]) if self._first < 0 else self._first
            self._wrong += len(wrong)
        self._bad += int(np.count_nonzero(~valid))
        self._words += len(words)

    def close(self, finding: Callable[[str], None], note: Callable[[str], None]) -> None:
        if self._wrong:
            finding(f"{self._wrong} rows, the first is {self._first}: valid_parity is not what their bits say")
        if self._bad:
            note(f"{self._bad} of {self._words} words have wrong parity")
        if self._unchecked:
            note(f"parity of {self._unchecked} words was not checked: the columns do not hold all of their bits")


def _missing_columns(given: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    """Why rows of these columns do not hold whole words; empty when they do."""
    for name in wanted.names or ():
        if name in _NOT_NEEDED:
            continue
        if name not in (given.names or ()):
            return f"/packets has no column {name}"
        if not _holds(given, wanted, name):
            return f"column {name} of /packets has {8 * given[name].itemsize} bits, too few for its field"
    return ""


def _holds(given: np.dtype[Any], wanted: np.dtype[Any], name: str) -> bool:
    """Whether there is such a column, with room for all bits of its field."""
    bits = _TIMESTAMP_BITS if name == "timestamp" else 8 * wanted[name].itemsize
    return name in (given.names or ()) and 8 * given[name].itemsize >= bits
