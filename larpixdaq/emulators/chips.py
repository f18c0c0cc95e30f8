"""The chips of one board: power, registers, and the answers to the words that are sent to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native import chip_emulator as native
from larpixdaq._native.chip_emulator import Heard, Stop
from larpixdaq.emulators.network import TILE_CHANNELS, Chain, Network, RegisterMap, Wiring, register_map

_CHIP_ID: Final = 2  # its lowest bit in a word


class Supplies(NamedTuple):
    """Volts of VDDA and VDDD: as laboratories set them, and the least with which chips work."""

    usual: tuple[float, float]
    least: tuple[float, float]


#: By chip generation.
SUPPLIES: Final = {
    "1": Supplies((1.8, 1.8), (1.5, 1.4)),
    "2": Supplies((1.8, 1.8), (1.5, 1.4)),
    "lightpix-1": Supplies((1.8, 1.8), (1.5, 1.4)),
    "2b": Supplies((1.8, 1.2), (1.5, 1.0)),
    "3": Supplies((1.8, 0.9), (1.5, 0.8)),
}
#: Ticks of the chips' clock for each bit on their lines, at power-up. v3 chips cannot change it, and have only
#: v2b's registers here.
TICKS_PER_BIT: Final = {"1": 2, "2": 2, "2b": 2, "lightpix-1": 2, "3": 1}


class Reset(NamedTuple):
    """Least ticks of the chips' clock for a reset that begins time stamps anew, and for one that restores registers."""

    clock: int
    registers: int


#: By chip generation. From 24 ticks on v2 chips also reset their state machines, which are not emulated.
RESETS: Final = {
    "1": Reset(1, 1),
    "2": Reset(10, 256),
    "lightpix-1": Reset(10, 256),
    "2b": Reset(10, 256),
    "3": Reset(15, 31),
}
#: The tile enable register has 32 bits.
MOST_TILES: Final = 32


class EmulatedChips:
    """`registers`: shape (chips, 256). `changed`: of which chips any has changed, until somebody resets it.

    `dead` chips hear and say nothing. `stuck`: (chip, address, bit, value) for bits that never change.
    """

    def __init__(
        self,
        wiring: Wiring,
        asic: str,
        *,
        dead: Iterable[int] = (),
        stuck: Iterable[tuple[int, int, int, int]] = (),
        powered: bool = False,
    ) -> None:
        n = len(wiring.keys)
        self.keys = wiring.keys
        self.asic = asic
        self.map: RegisterMap = register_map(asic)
        self.registers = np.zeros((n, 256), np.uint8)
        self.changed = np.ones(n, np.uint8)
        #: What a falling step of the test pulse DAC does: chip, DAC counts.
        self.on_pulse: Callable[[int, int], None] = lambda chip, step: None
        self.alive = np.zeros(n, np.bool_)
        tiles = [(io_channel - 1) // TILE_CHANNELS for io_channel, _ in wiring.keys]
        self._tile = np.clip(tiles, 0, MOST_TILES - 1)
        self._working = np.ones(n, np.bool_)
        self._working[list(dead)] = False
        self._keep = np.full((n, 256), 0xFF, np.uint8)
        self._force = np.zeros((n, 256), np.uint8)
        for chip, address, bit, value in stuck:
            self._keep[chip, address] &= 0xFF ^ (1 << bit)
            self._force[chip, address] |= value << bit
        if asic == "1":
            self.network = Chain(wiring, self.alive, TICKS_PER_BIT[asic])
        else:
            ticks, slower = TICKS_PER_BIT[asic], asic != "3"
            self.network = Network(wiring, self.alive, ticks, self.registers, self.map, slower=slower)
        self._pulse = self.map.address("csa_testpulse_dac")
        watched = np.zeros(256, np.uint8)
        self._watched = [*self.network.watched, self._pulse]
        watched[self._watched] = 1
        self._native = native.RegisterBank(
            self.registers,
            self._keep,
            self._force,
            watched,
            self.changed,
            self.network.hears,
            self.network.leaves,
            count=self.map.count,
            v1=asic == "1",
            magic=asic == "3",
        )
        #: The board's tick at which the clock of each chip was 0.
        self.began = np.zeros(n, np.int64)
        #: The tiles that have power, a bit each.
        self.tiles = 0
        #: The tiles that have chips, a bit each.
        self.tiles_there = sum(1 << tile for tile in set(self._tile.tolist()))
        if powered:
            self.power(self.tiles_there)

    def on_tiles(self) -> list[int]:
        """How many chips each tile has."""
        counts: list[int] = np.bincount(self._tile).tolist()
        return counts

    def count(self) -> dict[str, int]:
        return {"unheard": self._native.unheard, "refused": self._native.refused}

    def power(self, tiles: int, tick: int = 0) -> None:
        """Bit k: tile k, whose io_channels are 4k+1 to 4k+4, has power. Chips that get it at this tick start anew."""
        on = (tiles >> self._tile & 1).astype(np.bool_) & self._working
        self.tiles = tiles
        fresh = on & ~self.alive
        self._restart(fresh)
        self.began[fresh] = tick
        self.changed[on != self.alive] = 1
        self.alive[:] = on
        self.network.changed_all()

    def reset(self, length: int, tick: int = 0, tiles: int = -1) -> None:
        """A reset of so many ticks of the chips' clock comes to these tiles, a bit each, and ends at this tick."""
        reached = (tiles >> self._tile & 1).astype(np.bool_) & self.alive
        thresholds = RESETS[self.asic]
        if length >= thresholds.clock:
            self.began[reached] = tick
        if length >= thresholds.registers:
            self._restart(reached)
            self.network.changed_all()

    def _restart(self, which: NDArray[np.bool_]) -> None:
        self.registers[which] = (self.map.defaults & self._keep[which]) | self._force[which]
        self.changed[which] = 1

    def send(self, words: NDArray[np.uint64], channels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Words (u8) on io_channels (u1) to the chips; their answers and the io_channels on which these come."""
        answers, on = np.zeros(len(words), np.uint64), np.zeros(len(words), np.uint8)
        parts = []
        at = made = 0
        while True:
            at, made, why = self._native.serve(words, channels, at, answers, on, made)
            if why == Stop.CHANGED:
                self._has_changed(self._native.chip, self._native.address, self._native.before)
            elif why == Stop.ASK:
                word, io_channel = int(words[at]), int(channels[at])
                several = self._ask(word, io_channel)
                if several is not None:
                    parts.append((answers[:made].copy(), on[:made].copy()))
                    made = 0
                    parts.append(self._several(word, several))
                    at += 1
            elif at == len(words):
                parts.append((answers[:made], on[:made]))
                return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def ids(self) -> NDArray[np.uint8]:
        """The chip_id that each has now."""
        if self.asic == "1":
            return np.array([chip_id for _, chip_id in self.keys], np.uint8)
        return self.registers[:, self.map.address("chip_id")]

    def channels_of(self, chips: NDArray[Any]) -> NDArray[Any]:
        """The io_channels on which packets of these chips leave (the first, where there are several), -1: nowhere."""
        leaves = self.network.leaves
        first = {}
        for chip in np.unique(chips[leaves[chips] < Heard.NOBODY]).tolist():
            ways = self.network.ways_out(chip)
            if len(ways) > 1:
                first[chip] = ways[0]
        found: NDArray[Any] = leaves[chips]
        for chip, way in first.items():
            found[chips == chip] = way
        return found

    def _ask(self, word: int, io_channel: int) -> list[int] | None:
        """Work out who hears the word; those chips, when the loop in C cannot serve them."""
        chip_id = word >> _CHIP_ID & 0xFF
        chips = self.network.listeners(io_channel, chip_id)
        if len(chips) > 1:
            return chips
        ways = self.network.ways_out(chips[0]) if chips else []
        return chips if len(ways) > 1 else None

    def _several(self, word: int, chips: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """What the chips say that all hear this word (or the one whose answer leaves on several ways)."""
        said = []
        before = self.registers[np.ix_(chips, self._watched)]
        for chip in chips:
            answer = self._native.one(chip, word)
            if answer:
                said += [(answer, io_channel) for io_channel in self.network.ways_out(chip)]
        for at, place in np.argwhere(before != self.registers[np.ix_(chips, self._watched)]).tolist():
            self._has_changed(chips[at], self._watched[place], int(before[at, place]))
        return np.array([s[0] for s in said], np.uint64), np.array([s[1] for s in said], np.uint8)

    def _has_changed(self, chip: int, address: int, before: int) -> None:
        if address == self._pulse:
            step = before - int(self.registers[chip, address])
            if step > 0:
                self.on_pulse(chip, step)
        else:
            self.network.changed(chip)
