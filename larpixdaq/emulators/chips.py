"""Emulated chips of one board: their power, resets and registers, and their answers to words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native import chip_emulator as native
from larpixdaq._native.chip_emulator import PathEnd, Stop
from larpixdaq.emulators.network import TILE_CHANNELS, Chain, Network, RegisterMap, Wiring, register_map
from larpixdaq.hardware.register_map import MAGIC_ASICS


class Supplies(NamedTuple):
    """Volts of VDDA and VDDD: the usual ones, and the minimum at which channels, and chips, work."""

    usual: tuple[float, float]
    minimum: tuple[float, float]


class Reset(NamedTuple):
    """Minimum lengths of a reset, in ticks of the chips' clock: to restart time stamps, and to restore registers."""

    clock: int
    registers: int


#: By chip generation.
SUPPLIES: Final = {
    "1": Supplies((1.8, 1.8), (1.5, 1.4)),
    "2": Supplies((1.8, 1.8), (1.5, 1.4)),
    "lightpix-1": Supplies((1.8, 1.8), (1.5, 1.4)),
    "2b": Supplies((1.8, 1.2), (1.5, 1.0)),
    "2d": Supplies((1.8, 1.1), (1.5, 1.0)),
    "3": Supplies((1.8, 0.9), (1.5, 0.8)),
}
#: Ticks of the chips' clock for each bit on their lines at power-up, by chip generation. v3 chips cannot change it.
TICKS_PER_BIT: Final = {"1": 2, "2": 2, "2b": 2, "2d": 2, "lightpix-1": 2, "3": 1}
#: By chip generation. From 24 ticks on v2 chips also reset their state machines, which are not emulated.
RESETS: Final = {
    "1": Reset(1, 1),
    "2": Reset(10, 256),
    "lightpix-1": Reset(10, 256),
    "2b": Reset(10, 256),
    "2d": Reset(10, 256),
    "3": Reset(15, 31),
}
#: Maximum number of tiles of a board: the tile enable register has 32 bits.
_MAX_TILES: Final = 32
#: Lowest bit of the chip_id in a word, and the mask of the bits by which a chip takes it: chip_id, downstream marker.
_CHIP_ID: Final = 2
_ADDRESSED: Final = 0xFF << _CHIP_ID | 1 << 62


class EmulatedChips:
    """Chips of one board, numbered as in `wiring.keys`. Tiles are masks, bit 0 for tile 0 with io_channels 1 to 4.

    `registers`: shape (chips, 256). `changed`: set for a chip when its registers or power change; the reader clears it.
    `dead`: chips that neither receive nor send. `stuck`: (chip, address, bit, value) of bits that never change.
    """

    def __init__(
        self,
        wiring: Wiring,
        asic: str,
        *,
        dead: Iterable[int] = (),
        stuck: Iterable[tuple[int, int, int, int]] = (),
        powered: bool = False,
        flips: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`flips`: fraction of the bits that a link in `wiring.flipping` flips, in words of all kinds."""
        n = len(wiring.keys)
        self.keys = wiring.keys
        self.asic = asic
        self.map: RegisterMap = register_map(asic)
        self.registers = np.zeros((n, 256), np.uint8)
        self.changed = np.ones(n, np.uint8)
        #: Called with chip and DAC counts at a falling step of the test pulse DAC.
        self.on_pulse: Callable[[int, int], None] = lambda chip, step: None
        #: Chips that work, because VDDD is on, and those whose channels work, because VDDA is on too.
        self.alive = np.zeros(n, np.bool_)
        self.sensing = np.zeros(n, np.bool_)
        tiles = [(io_channel - 1) // TILE_CHANNELS for io_channel, _ in wiring.keys]
        self._tile = np.clip(tiles, 0, _MAX_TILES - 1)
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
            ticks, clk_ctrl = TICKS_PER_BIT[asic], asic != "3"
            self.network = Network(wiring, self.alive, ticks, self.registers, self.map, clk_ctrl=clk_ctrl)
        self._flips, self._random = flips, np.random.default_rng([seed, 6])
        self._flipping = wiring.flipping
        self._bits_flipped = 0
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
            magic=asic in MAGIC_ASICS,
            checks_parity=asic == "3",
        )
        #: Tick of the board's clock at which the clock of each chip was 0.
        self.clock_start = np.zeros(n, np.int64)
        #: Masks of the tiles that have VDDD, and those that have VDDA too.
        self.powered_tiles = 0, 0
        #: Tiles that have chips.
        self.equipped_tiles = sum(1 << tile for tile in set(self._tile.tolist()))
        if powered:
            self.power(self.equipped_tiles)

    def chips_per_tile(self) -> list[int]:
        """Return the number of chips on each tile."""
        counts: list[int] = np.bincount(self._tile).tolist()
        return counts

    def counts(self) -> dict[str, int]:
        """Return the numbers of words that no chip heard, and that the chip did not take, and of flipped bits."""
        flipped = {"bits_flipped": self._bits_flipped} if self._bits_flipped else {}
        return {"unheard": self._native.unheard, "refused": self._native.refused} | flipped

    def power(self, tiles: int, tick: int = 0, analog: int = -1) -> None:
        """Power these tiles and no others. Chips that get power restart at this tick of the board's clock.

        `analog`: mask of the tiles that also have VDDA. Without it chips keep and answer their configuration, and their
        channels see nothing.
        """
        on = (tiles >> self._tile & 1).astype(np.bool_) & self._working
        sensing = (analog >> self._tile & 1).astype(np.bool_) & on
        self.powered_tiles = tiles, tiles & analog
        started = on & ~self.alive
        self._restore_registers(started)
        self.clock_start[started] = tick
        self.changed[(on != self.alive) | (sensing != self.sensing)] = 1
        self.alive[:], self.sensing[:] = on, sensing
        self.network.invalidate()

    def reset(self, length: int, tick: int, tiles: int = -1) -> None:
        """Reset the chips on these tiles for `length` ticks of their clock, up to `tick` of the board's clock."""
        reached = (tiles >> self._tile & 1).astype(np.bool_) & self.alive
        minimum = RESETS[self.asic]
        if length >= minimum.clock:
            self.clock_start[reached] = tick
        if length >= minimum.registers:
            self._restore_registers(reached)
            self.network.invalidate()

    def _restore_registers(self, chips: NDArray[np.bool_]) -> None:
        self.registers[chips] = (self.map.defaults & self._keep[chips]) | self._force[chips]
        self.changed[chips] = 1

    def send(self, words: NDArray[np.uint64], channels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Send words (u8) on io_channels (u1) to the chips. Returns their answers and the answers' io_channels."""
        answers, answer_channels = np.zeros(len(words), np.uint64), np.zeros(len(words), np.uint8)
        parts = []
        position = made = 0
        while True:
            position, made, stop = self._native.serve(words, channels, position, answers, answer_channels, made)
            if stop == Stop.REGISTER_CHANGED:
                self._register_changed(self._native.chip, self._native.address, self._native.old_value)
            elif stop == Stop.PATH_UNKNOWN:
                word = int(words[position])
                chips = self._find_paths(word, int(channels[position]))
                if chips:
                    parts.append((answers[:made].copy(), answer_channels[:made].copy()))
                    made = 0
                    parts.append(self._send_to_each(word, int(channels[position]), chips))
                    position += 1
            elif position == len(words):
                parts.append((answers[:made], answer_channels[:made]))
                return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def chip_ids(self) -> NDArray[np.uint8]:
        """Return the present chip_id of each chip."""
        if self.asic == "1":
            return np.array([chip_id for _, chip_id in self.keys], np.uint8)
        return self.registers[:, self.map.address("chip_id")]

    def exit_channels(self, chips: NDArray[Any]) -> NDArray[Any]:
        """Return the io_channel on which packets of each chip reach the board: the first of several, or -1."""
        leaves = self.network.leaves
        first = {}
        for chip in np.unique(chips[leaves[chips] < PathEnd.NONE]).tolist():
            exits = self.network.exits(chip)
            if exits:
                first[chip] = exits[0]
        io_channels: NDArray[Any] = leaves[chips]
        for chip, io_channel in first.items():
            io_channels[chips == chip] = io_channel
        return io_channels

    def arrive(self, packets: NDArray[np.uint64], chips: NDArray[Any]) -> NDArray[np.uint64]:
        """Return packets of these chips as they reach the board, after links that flip bits."""
        if not self._flipping or not isinstance(self.network, Network):
            return packets
        links = np.array([self.network.flips_from.get(chip, 0) for chip in chips.tolist()], np.int64)
        return self._flip(packets, links)

    def _find_paths(self, word: int, io_channel: int) -> list[int]:
        """Find the listeners of a word and their exits for the kernel. Returns the chips that it cannot serve itself.

        These are several listeners, or a listener whose answer has several exits, or a link that flips bits on the way.
        """
        chips = self.network.listeners(io_channel, word >> _CHIP_ID & 0xFF)
        if len(chips) == 1 and len(self.network.exits(chips[0])) < 2 and not self._flipping_links(io_channel, chips[0]):
            return []
        return chips

    def _flipping_links(self, io_channel: int, chip: int) -> int:
        """Return the number of links that flip bits, on the way of a word to this chip and of its answer."""
        if not isinstance(self.network, Network):
            return 0
        return self.network.flips_to.get((io_channel, chip), 0) + self.network.flips_from.get(chip, 0)

    def _send_to_each(self, word: int, io_channel: int, chips: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Send a word to each of these chips. Returns their answers on all exits, and the answers' io_channels."""
        answers = []
        old = self.registers[np.ix_(chips, self._watched)]
        for chip in chips:
            arrived = word
            if isinstance(self.network, Network):
                arrived = self._flipped(word, self.network.flips_to.get((io_channel, chip), 0))
                if arrived & 3 < 2 or (arrived ^ word) & _ADDRESSED:
                    continue
            answer = self._native.deliver(chip, arrived)
            if answer:
                exits = self.network.exits(chip)
                if isinstance(self.network, Network):
                    answer = self._flipped(answer, self.network.flips_from[chip])
                answers += [(answer, exit_channel) for exit_channel in exits]
        for row, column in np.argwhere(old != self.registers[np.ix_(chips, self._watched)]).tolist():
            self._register_changed(chips[row], self._watched[column], int(old[row, column]))
        return np.array([a[0] for a in answers], np.uint64), np.array([a[1] for a in answers], np.uint8)

    def _flipped(self, word: int, links: int) -> int:
        """Return a word that has passed this number of links that flip bits."""
        return int(self._flip(np.array([word], np.uint64), np.array([links]))[0]) if links else word

    def _flip(self, words: NDArray[np.uint64], links: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return words that have passed these numbers of links that flip bits."""
        odd = (1 - (1 - 2 * self._flips) ** links) / 2  # a bit that is flipped twice is right again
        (at,) = np.nonzero(links)
        flipped = self._random.random((len(at), 64)) < odd[at, None]
        self._bits_flipped += int(flipped.sum())
        words = words.copy()
        words[at] ^= np.packbits(flipped, axis=1, bitorder="little").view("<u8")[:, 0]
        return words

    def _register_changed(self, chip: int, address: int, old: int) -> None:
        if address == self._pulse:
            step = old - int(self.registers[chip, address])
            if step > 0:
                self.on_pulse(chip, step)
        else:
            self.network.invalidate_chip(chip, address)
