"""The register values that were last sent to each chip, and last read from it.

The producer sees them in the words that it sends and in the chips' answers, so that they are known whichever routine or
action sent the words, and after that has died.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.protocol.stream import READ, REGISTERS, SENT, Configurations
from larpixdaq.schema import ChipIndex, PacketType, chips_of, registers_of, types_of

#: Chip id in words that are for all chips of an io_channel.
_BROADCAST: Final = 255


class ConfigurationTracker:
    """Tracks chips of one generation (`asic`: a value of --asic) for the life of the producer."""

    def __init__(self, asic: str) -> None:
        self._asic = asic
        self._table = ChipIndex()
        self._keys = np.zeros(0, np.intp)  # by place; each as schema.chips_of() returns it
        self._sent, self._read, self._known = (np.zeros((0, REGISTERS), np.uint8) for _ in range(3))
        self._changed = np.zeros(0, bool)
        self._chips = np.zeros(0, np.intp)  # places of the existing chips

    def set_chips(self, chips: NDArray[np.uint8]) -> None:
        """Set the list of existing chips, shape (N, 3): io_group, io_channel, chip_id.

        Answers from other ids, such as the power-up id, are not reported.
        """
        io_group, io_channel, chip_id = chips.astype(np.intp).T
        self._chips = self._places_of(io_group << 16 | io_channel << 8 | chip_id)

    def record_sent(self, rows: NDArray[Any]) -> None:
        """Note the configuration writes in rows of words that are being sent; the rows have the producer's layout."""
        rows = rows[types_of(rows) == PacketType.CONFIG_WRITE]
        if not len(rows):
            return
        keys, (registers, values) = chips_of(rows), registers_of(rows)
        if (keys & 0xFF == _BROADCAST).any():
            self._places_of(keys[keys & 0xFF != _BROADCAST])
            addressed = [np.flatnonzero(self._is_addressed(key)) for key in keys.tolist()]
            times = [len(places) for places in addressed]
            places, registers, values = np.concatenate(addressed), np.repeat(registers, times), np.repeat(values, times)
        else:
            places = self._places_of(keys)
        known = self._known[places, registers]
        stale = (known & READ != 0) & (self._read[places, registers] != values)
        new = (known & SENT == 0) | (self._sent[places, registers] != values)
        self._changed[places[new | stale]] = True
        self._sent[places, registers] = values
        # Where a register is twice in these rows, its read value is out of date if it differs from either sent value.
        self._known[places, registers] |= SENT
        self._known[places[stale], registers[stale]] = SENT

    def _is_addressed(self, key: int) -> NDArray[np.bool_]:
        """Which chips take a word that is addressed to this key, shape (len(self._keys),)."""
        if key & 0xFF == _BROADCAST:
            return np.asarray(self._keys >> 8 == key >> 8)
        return np.asarray(self._keys == key)

    def record_answers(self, rows: NDArray[Any]) -> None:
        """Note the register values in rows of received words. Rows with wrong parity are ignored."""
        rows = rows[(types_of(rows) == PacketType.CONFIG_READ) & (rows["direction"] == 1)]
        rows = rows[rows["valid_parity"] == 1]
        if not len(rows):
            return
        keys, (registers, values) = chips_of(rows), registers_of(rows)
        places = self._places_of(keys)
        new = (self._known[places, registers] & READ == 0) | (self._read[places, registers] != values)
        self._changed[places[new]] = True
        self._read[places, registers] = values
        self._known[places, registers] |= READ

    def invalidate(self, io_groups: list[int]) -> None:
        """Forget the values of all chips of these boards, because a reset or a power switch may have changed them."""
        affected = np.isin(self._keys >> 16, io_groups)
        self._changed |= affected & self._known.any(axis=1)
        self._known[affected] = 0

    def configurations(self) -> Configurations:
        """The configurations of all existing chips."""
        return self._configurations_at(self._chips)

    def changes(self) -> Configurations:
        """The configurations of existing chips with new values since mark_reported()."""
        return self._configurations_at(self._chips[self._changed[self._chips]])

    def mark_reported(self) -> None:
        """Mark all changes as reported."""
        self._changed[self._chips] = False

    def _configurations_at(self, places: NDArray[np.intp]) -> Configurations:
        keys = self._keys[places]
        chips = np.stack([keys >> 16, keys >> 8 & 0xFF, keys & 0xFF], axis=1).astype(np.uint8)
        return Configurations(self._asic, chips, self._sent[places], self._read[places], self._known[places])

    def _places_of(self, keys: NDArray[np.intp]) -> NDArray[np.intp]:
        """The places (indices in the arrays) of chips; new chips are appended."""
        places = self._table.find(keys)
        if (places < 0).any():
            new = np.unique(keys[places < 0])
            self._table.add(np.stack([new >> 16, new >> 8 & 0xFF, new & 0xFF], axis=1).astype(np.uint8))
            self._keys = np.concatenate([self._keys, new])
            self._changed = np.concatenate([self._changed, np.zeros(len(new), bool)])
            unknown = np.zeros((len(new), REGISTERS), np.uint8)
            self._sent, self._read, self._known = (
                np.concatenate([array, unknown]) for array in (self._sent, self._read, self._known)
            )
            places = self._table.find(keys)
        return places
