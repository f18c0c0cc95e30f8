"""What every chip was told, and what it said: seen by the producer in the words that go out and the answers that come,
whoever asked for them, and whatever became of him since."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.protocol.stream import READ, REGISTERS, SENT, Configurations
from larpixdaq.schema import PacketType, Places, chips_of, registers_of, types_of

#: The chip id that all chips of an io_channel hear.
_BROADCAST: Final = 255


class ConfigurationTracker:
    """One for the life of the producer, of chips of one generation (`asic`, as --asic has it)."""

    def __init__(self, asic: str) -> None:
        self._asic = asic
        self._places = Places()
        self._keys = np.zeros(0, np.intp)  # as schema.chips_of has them
        self._sent, self._read, self._known = (np.zeros((0, REGISTERS), np.uint8) for _ in range(3))
        self._changed = np.zeros(0, bool)
        self._listed = np.zeros(0, np.intp)  # places of the chips that there are

    def know(self, chips: NDArray[np.uint8]) -> None:
        """There are these chips, shape (N, 3), and no others: an id to which a chip answers before it gets its own is
        nobody's."""
        io_group, io_channel, chip_id = chips.astype(np.intp).T
        self._listed = self._find(io_group << 16 | io_channel << 8 | chip_id)

    def sent(self, rows: NDArray[Any]) -> None:
        """Rows of words that go out now, of the producer's layout."""
        rows = rows[types_of(rows) == PacketType.CONFIG_WRITE]
        if not len(rows):
            return
        keys, (registers, values) = chips_of(rows), registers_of(rows)
        if (keys & 0xFF == _BROADCAST).any():
            self._find(keys[keys & 0xFF != _BROADCAST])
            heard = [np.flatnonzero(self._hear(key)) for key in keys.tolist()]
            times = [len(places) for places in heard]
            places, registers, values = np.concatenate(heard), np.repeat(registers, times), np.repeat(values, times)
        else:
            places = self._find(keys)
        known = self._known[places, registers]
        stale = (known & READ != 0) & (self._read[places, registers] != values)
        new = (known & SENT == 0) | (self._sent[places, registers] != values)
        self._changed[places[new | stale]] = True
        self._sent[places, registers] = values
        # A register that stands twice in these rows counts as not read since, when either value is another.
        self._known[places, registers] |= SENT
        self._known[places[stale], registers[stale]] = SENT

    def _hear(self, key: int) -> NDArray[np.bool_]:
        """Which chips a word for this one is for."""
        if key & 0xFF == _BROADCAST:
            return np.asarray(self._keys >> 8 == key >> 8)
        return np.asarray(self._keys == key)

    def answers(self, rows: NDArray[Any]) -> None:
        """Rows that came; what chips say of their registers is taken from them."""
        rows = rows[(types_of(rows) == PacketType.CONFIG_READ) & (rows["direction"] == 1)]
        rows = rows[rows["valid_parity"] == 1]
        if not len(rows):
            return
        keys, (registers, values) = chips_of(rows), registers_of(rows)
        places = self._find(keys)
        new = (self._known[places, registers] & READ == 0) | (self._read[places, registers] != values)
        self._changed[places[new]] = True
        self._read[places, registers] = values
        self._known[places, registers] |= READ

    def doubt(self, io_groups: list[int]) -> None:
        """The chips of these boards are reset, or their power is switched: nobody knows what their registers hold."""
        doubted = np.isin(self._keys >> 16, io_groups)
        self._changed |= doubted & self._known.any(axis=1)
        self._known[doubted] = 0

    def everything(self) -> Configurations:
        """Of all chips that there are."""
        return self._of(self._listed)

    def news(self) -> Configurations:
        """Of those that were told or said something new since settle()."""
        return self._of(self._listed[self._changed[self._listed]])

    def settle(self) -> None:
        """There are no news any more."""
        self._changed[self._listed] = False

    def _of(self, places: NDArray[np.intp]) -> Configurations:
        keys = self._keys[places]
        chips = np.stack([keys >> 16, keys >> 8 & 0xFF, keys & 0xFF], axis=1).astype(np.uint8)
        return Configurations(self._asic, chips, self._sent[places], self._read[places], self._known[places])

    def _find(self, keys: NDArray[np.intp]) -> NDArray[np.intp]:
        """The places of chips; those that are new get one."""
        places = self._places.find(keys)
        if (places < 0).any():
            new = np.unique(keys[places < 0])
            self._places.add(np.stack([new >> 16, new >> 8 & 0xFF, new & 0xFF], axis=1).astype(np.uint8))
            self._keys = np.concatenate([self._keys, new])
            self._changed = np.concatenate([self._changed, np.zeros(len(new), bool)])
            nothing = np.zeros((len(new), REGISTERS), np.uint8)
            self._sent, self._read, self._known = (
                np.concatenate([array, nothing]) for array in (self._sent, self._read, self._known)
            )
            places = self._places.find(keys)
        return places
