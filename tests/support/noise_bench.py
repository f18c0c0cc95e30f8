"""Powered emulated chips with noise, whose registers a test writes by name."""

from __future__ import annotations

import numpy as np

from larpixdaq.emulators import network
from larpixdaq.emulators.chips import EmulatedChips
from larpixdaq.emulators.noise import Channels, Noise

SECOND = 10_000_000


class Bench:
    """Powered chips with noise. `set()` writes registers of all chips."""

    def __init__(self, n=10, asic="2b"):
        self.chips = EmulatedChips(network.tile_wiring(n), asic, powered=True)
        self.map = self.chips.map
        self.seen = Channels(n, self.map.channels, [7])
        self.noise = Noise(self.chips, self.seen, [8])

    def set(self, name, value, chips=slice(None)):
        field = self.map.fields[name]
        size = field.high - field.low
        width = size // max(field.items, 1)
        values = np.broadcast_to(np.asarray(value), max(field.items, 1))
        bits = (values[:, None] >> np.arange(width) & 1).astype(np.uint8).reshape(-1)
        every = np.unpackbits(self.chips.registers[chips], axis=1, bitorder="little")
        every[:, field.low : field.high] = bits
        self.chips.registers[chips] = np.packbits(every, axis=1, bitorder="little")
        self.chips.changed[chips] = 1
        self.noise.update()

    def hits(self, seconds=1.0, most=10**7):
        found, _, lost = self.noise.hits(0, int(seconds * SECOND), most)
        assert lost == 0
        return found
