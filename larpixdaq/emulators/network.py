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
    """v1 chips: each hears all words of its io_channel, under a chip_id that its wires give it.

    `ticks_per_bit`: of the chips' clock, on their lines.
    """

    #: Addresses of registers that open and close ways.
    watched: tuple[int, ...] = ()

    def __init__(self, wiring: Wiring, alive: NDArray[np.bool_], ticks_per_bit: int) -> None:
        chips = len(wiring.keys)
        #: By io_channel: whether the board's UART sends to chips and receives from them, and its ticks for each bit.
        self.to_chips = np.ones(256, np.bool_)
        self.from_chips = np.ones(256, np.bool_)
        self.ticks_per_bit = np.full(256, ticks_per_bit, np.int64)
        self._own_ticks = ticks_per_bit
        self.hears = np.full((256, 256), Heard.UNKNOWN, np.int32)
        self.leaves = np.full(chips, Heard.UNKNOWN, np.int16)
        self._keys = wiring.keys
        self._alive = alive

    def listeners(self, io_channel: int, chip_id: int) -> list[int]:
        """The chips that hear a word; `hears` knows them from then on."""
        found: dict[int, list[int]] = {}
        opened = self._line_to_chips(io_channel) == self._own_ticks
        for chip, key in enumerate(self._keys):
            if opened and key[0] == io_channel and self._alive[chip]:
                found.setdefault(key[1], []).append(chip)
        return self._note(io_channel, found).get(chip_id, [])

    def ways_out(self, chip: int) -> list[int]:
        """The io_channels on which its answers leave; `leaves` knows them from then on."""
        io_channel = self._keys[chip][0]
        opened = self._line_from_chips(io_channel) == self._own_ticks
        self.leaves[chip] = io_channel if opened else Heard.NOBODY
        return [io_channel] if opened else []

    def _line_to_chips(self, io_channel: int) -> int:
        """Ticks for each bit that comes on this io_channel, 0 when nothing comes."""
        return int(self.ticks_per_bit[io_channel]) if self.to_chips[io_channel] else 0

    def _line_from_chips(self, io_channel: int) -> int:
        """Ticks for each bit with which the board listens, 0 when it does not."""
        return int(self.ticks_per_bit[io_channel]) if self.from_chips[io_channel] else 0

    def changed(self, chip: int) -> None:
        """A watched register of the chip has changed."""

    def changed_all(self) -> None:
        """Other chips than before are alive, or the board's UARTs are set in another way."""
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
    A receiver with another time for each bit than the sender hears nothing.
    """

    def __init__(
        self,
        wiring: Wiring,
        alive: NDArray[np.bool_],
        ticks_per_bit: int,
        registers: NDArray[np.uint8],
        fields: RegisterMap,
        *,
        slower: bool,
    ) -> None:
        """`slower`: clk_ctrl of the chips doubles the ticks for each bit as often as it says."""
        super().__init__(wiring, alive, ticks_per_bit)
        self._registers = registers
        self._id, self._up, self._down, self._in = (
            fields.address(name)
            for name in ("chip_id", "enable_piso_upstream", "enable_piso_downstream", "enable_posi")
        )
        self.watched = (self._id, self._up, self._down, self._in)
        if slower:
            at = fields.fields["clk_ctrl"]
            self._clock, self._clock_shift, self._clock_mask = at.low // 8, at.low % 8, (1 << at.high - at.low) - 1
            self.watched += (self._clock,)
        self._slower = slower
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
        ticks = self._line_to_chips(io_channel)
        # what is still to be visited: a chip, the UART on which words come, the ids on the way (a bit each)
        ahead = [(chip, arrives, 0) for chip, arrives in self._entries.get(io_channel, ())]
        visited = set()
        while ahead:
            chip, arrives, taken = ahead.pop()
            self._touches[chip].add(io_channel)
            if chip in visited or not self._receives(chip, arrives) or self._ticks(chip) != ticks:
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
        ticks = self._ticks(chip)
        while ahead:
            at = ahead.pop()
            opened = int(self._registers[at, self._down])
            for uart, io_channel in self._exits[at]:
                if opened >> uart & 1 and self._line_from_chips(io_channel) == ticks:
                    found.append(io_channel)
            for uart, other, arrives in self._wires[at]:
                if opened >> uart & 1 and other not in visited and self._receives(other, arrives):
                    visited.add(other)
                    if self._ticks(other) == ticks:
                        ahead.append(other)
        self.leaves[chip] = Heard.SEVERAL if len(found) > 1 else found[0] if found else Heard.NOBODY
        return found

    def _receives(self, chip: int, uart: int) -> bool:
        return bool(self._alive[chip] and int(self._registers[chip, self._in]) >> uart & 1)

    def _ticks(self, chip: int) -> int:
        if not self._slower:
            return self._own_ticks
        return self._own_ticks << (int(self._registers[chip, self._clock]) >> self._clock_shift & self._clock_mask)

    def changed(self, chip: int) -> None:
        for io_channel in self._touches[chip]:
            self.hears[io_channel].fill(Heard.UNKNOWN)
        self.leaves.fill(Heard.UNKNOWN)
