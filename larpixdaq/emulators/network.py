"""Who hears whom: the ways of words through the chips, as far as their registers open them."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.chips import Heard
from larpixdaq.emulators.registers import RegisterMap
from larpixdaq.emulators.wiring import Wiring

BROADCAST: Final = 255


class Chain:
    """v1 chips: each hears all words of its io_channel, under a chip_id that its wires give it."""

    #: Addresses of registers that open and close ways.
    watched: tuple[int, ...] = ()

    def __init__(self, wiring: Wiring, alive: NDArray[np.bool_]) -> None:
        chips = len(wiring.keys)
        self.hears = np.full((256, 256), Heard.UNKNOWN, np.int32)
        self.leaves = np.full(chips, Heard.UNKNOWN, np.int16)
        self._keys = wiring.keys
        self._alive = alive

    def listeners(self, io_channel: int, chip_id: int) -> list[int]:
        """The chips that hear a word; `hears` knows them from then on."""
        found: dict[int, list[int]] = {}
        for chip, key in enumerate(self._keys):
            if key[0] == io_channel and self._alive[chip]:
                found.setdefault(key[1], []).append(chip)
        return self._note(io_channel, found).get(chip_id, [])

    def ways_out(self, chip: int) -> list[int]:
        """The io_channels on which its answers leave; `leaves` knows them from then on."""
        self.leaves[chip] = self._keys[chip][0]
        return [self._keys[chip][0]]

    def changed(self, chip: int) -> None:
        """A watched register of the chip has changed."""

    def changed_power(self) -> None:
        """Other chips than before are alive."""
        self.hears.fill(Heard.UNKNOWN)
        self.leaves.fill(Heard.UNKNOWN)

    def _note(self, io_channel: int, found: dict[int, list[int]]) -> dict[int, list[int]]:
        row = self.hears[io_channel]
        row.fill(Heard.NOBODY)
        for chip_id, chips in found.items():
            row[chip_id] = chips[0] if len(chips) == 1 else Heard.SEVERAL
        return found


class Network(Chain):
    """v2 and later: a hydra network.

    A chip receives on the UARTs of enable_posi. A word for its chip_id it takes; another one, away from the board, it
    passes on by the UARTs of enable_piso_upstream, one towards the board by those of enable_piso_downstream. Broadcasts
    it takes and passes on. A ring of open ways, in which chips would send words round for ever, is gone round once.
    """

    def __init__(
        self, wiring: Wiring, alive: NDArray[np.bool_], registers: NDArray[np.uint8], fields: RegisterMap
    ) -> None:
        super().__init__(wiring, alive)
        self._registers = registers
        self._id, self._up, self._down, self._in = self.watched = tuple(
            fields.address(name)
            for name in ("chip_id", "enable_piso_upstream", "enable_piso_downstream", "enable_posi")
        )
        self._wires: list[list[tuple[int, int, int]]] = [[] for _ in wiring.keys]  # (UART, chip, its UART)
        for chip, uart, other, arrives in wiring.wires:
            self._wires[chip].append((uart, other, arrives))
        self._entries: dict[int, list[tuple[int, int]]] = {}
        for io_channel, chip, arrives in wiring.entries:
            self._entries.setdefault(io_channel, []).append((chip, arrives))
        self._exits: list[list[tuple[int, int]]] = [[] for _ in wiring.keys]
        for chip, uart, io_channel in wiring.exits:
            self._exits[chip].append((uart, io_channel))
        self._touches: list[set[int]] = [set() for _ in wiring.keys]  # io_channels whose words come up to it

    def listeners(self, io_channel: int, chip_id: int) -> list[int]:
        found: dict[int, list[int]] = {}
        # what is still to be visited: a chip, the UART on which words come, the ids on the way (a bit each)
        ahead = [(chip, arrives, 0) for chip, arrives in self._entries.get(io_channel, ())]
        visited = set()
        while ahead:
            chip, arrives, taken = ahead.pop()
            self._touches[chip].add(io_channel)
            if chip in visited or not self._receives(chip, arrives):
                continue
            visited.add(chip)
            own, opened = int(self._registers[chip, self._id]), int(self._registers[chip, self._up])
            if not taken >> own & 1 and own != BROADCAST:
                found.setdefault(own, []).append(chip)
            found.setdefault(BROADCAST, []).append(chip)
            for uart, other, place in self._wires[chip]:
                if opened >> uart & 1:
                    ahead.append((other, place, taken | 1 << own))
        return self._note(io_channel, found).get(chip_id, [])

    def ways_out(self, chip: int) -> list[int]:
        found = []
        ahead, visited = [chip], {chip}
        while ahead:
            at = ahead.pop()
            opened = int(self._registers[at, self._down])
            found += [io_channel for uart, io_channel in self._exits[at] if opened >> uart & 1]
            for uart, other, arrives in self._wires[at]:
                if opened >> uart & 1 and other not in visited and self._receives(other, arrives):
                    visited.add(other)
                    ahead.append(other)
        self.leaves[chip] = Heard.SEVERAL if len(found) > 1 else found[0] if found else Heard.NOBODY
        return found

    def _receives(self, chip: int, uart: int) -> bool:
        return bool(self._alive[chip] and int(self._registers[chip, self._in]) >> uart & 1)

    def changed(self, chip: int) -> None:
        for io_channel in self._touches[chip]:
            self.hears[io_channel].fill(Heard.UNKNOWN)
        self.leaves.fill(Heard.UNKNOWN)
