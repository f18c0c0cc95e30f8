"""Tiles of emulated chips in this process, in place of a producer and its boards, and the truth about their faults."""

import math
import random
import time
from collections import Counter, defaultdict

import numpy as np

from larpixdaq.emulators.chips import EmulatedChips
from larpixdaq.emulators.detector import DEFAULT_FLIPS
from larpixdaq.emulators.network import Wiring, tile_wiring
from larpixdaq.hardware.producer_link import BoardError
from larpixdaq.hardware.tile_shape import OPPOSITE
from larpixdaq.protocol.hardware import BoardInfo, Setup
from larpixdaq.schema import ASICS, layout_of


def wiring_of(shape):
    """Return the wiring of a tile of this shape, whose roots have the board on their left."""
    ids = shape.ids()
    channels = {root: channel for channel, root in enumerate(shape.roots, 1)}
    wiring = Wiring(keys=[(channels.get(chip_id, 1), chip_id) for chip_id in ids])
    for chip, chip_id in enumerate(ids):
        for side in range(4):
            if neighbour := shape.neighbour(chip_id, side):
                receiver = shape.receive[OPPOSITE[side]]
                wiring.wires.append((chip, shape.send[side], ids.index(neighbour), receiver))
    for root, channel in channels.items():
        wiring.entries.append((channel, ids.index(root), shape.receive[1]))
        wiring.exits.append((ids.index(root), shape.send[1], channel))
    return wiring


class EmulatedTile:
    """A tile with chips that are dead and links that are broken, both ways or one way."""

    def __init__(
        self,
        asic,
        seed,
        dead=0.0,
        broken=0.0,
        one_way=0.0,
        flipping=(),
        also=None,
        stuck=(),
        shape=None,
        dead_chips=(),
        cut=(),
    ):
        """`flipping`, `also`, `stuck`, `dead_chips`, `cut` (wires: sender, receiver): planted faults, by chip_id."""
        chosen = random.Random(seed)
        self.wiring = wiring_of(shape) if shape else tile_wiring(100, asic=asic)
        chips = len(self.wiring.keys)
        number = {chip_id: chip for chip, (_, chip_id) in enumerate(self.wiring.keys)}
        self.dead = {chip for chip in range(chips) if chosen.random() < dead} | {number[i] for i in dead_chips}
        for a, b in self.wiring.links():
            fate = chosen.random()
            if fate < broken:
                self.wiring.cut(a, b)
            elif fate < broken + one_way:
                self.wiring.cut_one_way(*chosen.sample((a, b), 2))
        for sender, receiver in cut:
            self.wiring.cut_one_way(number[sender], number[receiver])
        for a, b in flipping:
            self.wiring.flipping |= {(number[a], number[b]), (number[b], number[a])}
        self.wiring.also |= {number[chip]: other for chip, other in (also or {}).items()}
        stuck = [(number[chip], *bit) for chip, *bit in stuck]
        faults = {"dead": self.dead, "stuck": stuck, "flips": DEFAULT_FLIPS}
        self.chips = EmulatedChips(self.wiring, asic, powered=True, seed=seed, **faults)

    def wires(self):
        """Sender and receiver of the wires between living chips, by chip_id."""
        ids = [chip_id for _, chip_id in self.wiring.keys]
        return {(ids[a], ids[b]) for a, _, b, _ in self.wiring.wires if not {a, b} & self.dead}

    def reachable(self, without=()):
        """Ids of the chips that links working both ways join to a living root."""
        wires = self.wires()
        links = defaultdict(set)
        for a, b in wires:
            if (b, a) in wires and not {a, b} & set(without):
                links[a].add(b)
        found = {self.wiring.keys[root][1] for _, root, _ in self.wiring.entries if root not in self.dead}
        found -= set(without)
        queue = list(found)
        while queue:
            new = links[queue.pop()] - found
            found |= new
            queue += new
        return found


class FakeLink:
    """The child's side of a producer (hardware/producer_link.py), with a tile on each io_group from 1 on."""

    def __init__(self, tiles, asic, lose=0.0, seed=0, breaks=None, power_off=None):
        """`breaks`, `power_off`: io_group -> number of the message at which the board or its chips stop to answer."""
        self.tiles = tiles
        self._dtype = layout_of(ASICS[asic]).dtype
        boards = [BoardInfo(group, "pacman", f"board {group}") for group in range(1, len(tiles) + 1)]
        self.setup = Setup(boards, asic, ASICS[asic], 2)
        self._rows = []
        self._random = np.random.default_rng(seed)
        self._lose = lose
        self._breaks, self._power_off = breaks or {}, power_off or {}
        self._messages = Counter()

    def listen(self, what):
        self._rows.clear()

    def send(self, message):
        pass

    def send_words(self, io_group, io_channels, words):
        self._messages[io_group] += 1
        if self._messages[io_group] == self._power_off.get(io_group):
            self.tiles[io_group - 1].chips.power(0)
        if self._messages[io_group] >= self._breaks.get(io_group, math.inf):
            return io_group
        keep = self._random.random(len(words)) >= self._lose
        io_channels, words = np.ascontiguousarray(io_channels[keep]), np.ascontiguousarray(words[keep])
        answers, channels = self.tiles[io_group - 1].chips.send(words, io_channels)
        rows = np.zeros(len(answers), self._dtype)
        rows["io_group"], rows["io_channel"], rows["direction"] = io_group, channels, 1
        rows["packet_type"], rows["chip_id"] = answers & 3, answers >> 2 & 0xFF
        rows["register_address"], rows["register_data"] = answers >> 10 & 0xFF, answers >> 18 & 0xFF
        rows["valid_parity"] = np.bitwise_count(answers) & 1
        self._rows.append(rows[rows["packet_type"] == 3])
        return 0

    def reset(self, io_groups):
        for io_group in io_groups:
            self.tiles[io_group - 1].chips.reset(256, 0)

    def await_answer(self, number):
        if number:
            raise BoardError(f"board {number}: no answer")
        return b""

    def rows(self):
        rows, self._rows = self._rows, []
        return rows

    def wait(self, until):
        if not self._rows:
            time.sleep(max(0.0, until - time.monotonic()))
