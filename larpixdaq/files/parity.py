"""The parity of every word, computed again from the row, against what the row says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native import packets
from larpixdaq.files.reader import DataFile


class ParityCheck:
    def __init__(self, file: DataFile) -> None:
        self._layout = file.layout
        self._wrong = 0  # rows whose column is not what their word says
        self._first = -1
        self._bad = 0
        self._words = 0

    def add(self, rows: NDArray[Any], first: int) -> None:
        """Rows of the file, `first` being the index of the first of them."""
        if self._layout is None:
            return
        if self._layout.dtype == schema.PACKETS_1_0:
            self._check(rows, schema.Asic.V1, first)
        elif self._layout.dtype == schema.PACKETS_3_0:
            self._check(rows, schema.Asic.V3, first)
        else:
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
        valid = packets.parity(words, asic=asic) == words
        wrong = places[valid != (rows["valid_parity"][places] == 1)]
        if len(wrong):
            self._first = first + int(wrong[0]) if self._first < 0 else self._first
            self._wrong += len(wrong)
        self._bad += int(np.count_nonzero(~valid))
        self._words += len(words)

    def close(self, finding: Callable[[str], None], note: Callable[[str], None]) -> None:
        if self._layout is None:
            note("parity was not checked: these columns do not hold whole words")
        if self._wrong:
            finding(f"{self._wrong} rows, the first is {self._first}: valid_parity is not what their bits say")
        if self._bad:
            note(f"{self._bad} of {self._words} words have wrong parity")
