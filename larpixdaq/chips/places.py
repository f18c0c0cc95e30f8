"""Where chips stand in arrays that have a row for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
