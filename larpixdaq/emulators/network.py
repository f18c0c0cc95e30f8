"""Who hears whom: the ways of words through the chips, as far as their registers open them.

How chips are wired: from a controller configuration of larpix-control, or tiles of a default kind.

What the registers of each chip generation are: names, places and power-up values, as larpix-control has them.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.chip_emulator import Heard
from larpixdaq.errors import ConfigError, FileError

BROADCAST: Final = 255
#: A default tile: its chips in rows of at most ten with chip_ids from 11 on, as on the tiles of a detector. Up to four
#: of them, in the first column, are wired to an io_channel each: the roots.
TILE_CHIPS: Final = 100
TILE_WIDTH: Final = 10
TILE_CHANNELS: Final = 4
FIRST_ID: Final = 11
#: Of a board of revision 5.
MOST_TILES: Final = 10
#: Directions are up, left, down, right. A chip sends on this UART towards each of them, receives from each on that one,
#: and is itself in this direction of its neighbour.
_SEND: Final = (3, 0, 1, 2)
_RECEIVE: Final = (0, 1, 2, 3)
_OPPOSITE: Final = (2, 3, 0, 1)
_STEPS: Final = ((-1, 0), (0, -1), (1, 0), (0, 1))
_LEFT: Final = 1
#: The chip generations in larpix-control's files, as `--asic` calls them.
_IN_FILES: Final = {"1": "1", "2": "2", "2b": "2b", "lightpix-1": "lightpix-1", "lightpix-v1.0": "lightpix-1", "3": "3"}
Key = tuple[int, int]
#: How larpix-control calls the chip generations.
VERSIONS: Final[dict[str, Any]] = {"1": 1, "2": 2, "2b": "2b", "lightpix-1": "lightpix-v1.0", "3": "2b"}
#: Where v2 and v2b have one thing under two names, or v1 has its own, the names used here.
_NAMES: Final = {
    "enable_miso_upstream": "enable_piso_upstream",
    "enable_miso_downstream": "enable_piso_downstream",
    "enable_mosi": "enable_posi",
    "pixel_trim_thresholds": "pixel_trim_dac",
    "global_threshold": "threshold_global",
    "csa_testpulse_dac_amplitude": "csa_testpulse_dac",
    "cross_trigger_mode": "enable_cross_trigger",
    "periodic_reset": "enable_periodic_reset",
    "reset_cycles": "periodic_reset_cycles",
}


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


@dataclass
class Wiring:
    """The chips of one board; they are numbered in the order of `keys`.

    `keys`: io_channel and chip_id that each has once it is configured. `wires`: (chip, UART that it sends on, chip,
    UART that this one receives on). `entries`: (io_channel, chip, UART that receives), `exits`: (chip, UART that it
    sends on, io_channel). `tree`: (chip nearer to the board, the other one) for the links of the configured network.
    """

    keys: list[Key] = field(default_factory=list)
    wires: list[tuple[int, int, int, int]] = field(default_factory=list)
    entries: list[tuple[int, int, int]] = field(default_factory=list)
    exits: list[tuple[int, int, int]] = field(default_factory=list)
    tree: list[tuple[int, int]] = field(default_factory=list)

    def cut(self, a: int, b: int) -> None:
        """Take away all wires between these two chips."""
        self.wires = [wire for wire in self.wires if {wire[0], wire[2]} != {a, b}]


def read_network(path: str) -> tuple[str, dict[int, Wiring]]:
    """The chip generation and the boards by io_group that a controller configuration of larpix-control describes.

    Its network is taken for all the wires that there are. The path is looked up as larpix-control does it: here, then
    in its package. ConfigError names what cannot be used.
    """
    from larpix import Controller, configs  # here, because it takes a second

    controller: Any = Controller()
    try:
        asic = _IN_FILES[str(configs.load(path, "controller")["asic_version"])]
        if asic == "1":
            controller.load_controller(path)
            return asic, _chains(controller.chips)
        controller.load_network(path, version=VERSIONS[asic])
        boards = {}
        for io_group, channels in controller.network.items():
            boards[io_group] = wiring = Wiring()
            for io_channel, network in channels.items():
                _add_network(wiring, io_channel, network)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except (AssertionError, IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: no controller configuration that larpix-control reads: {error!r}") from None
    boards = {io_group: wiring for io_group, wiring in boards.items() if wiring.keys}
    if not boards:
        raise ConfigError(f"{path}: no chips in it")
    return asic, boards


def _chains(keys: Any) -> dict[int, Wiring]:
    """v1 chips of an io_channel hear every word of it, and need no wires here."""
    boards: dict[int, Wiring] = {}
    for key in keys:
        boards.setdefault(key.io_group, Wiring()).keys.append((key.io_channel, key.chip_id))
    return boards


def _add_network(wiring: Wiring, io_channel: int, network: Any) -> None:
    """`network`: larpix-control's three graphs. What a link is called upstream, its UARTs are edges of two of them."""
    upstream, downstream, into = (network[name] for name in ("miso_us", "miso_ds", "mosi"))
    numbers = {}
    for node in upstream:
        if isinstance(node, int):
            numbers[node] = len(wiring.keys)
            wiring.keys.append((io_channel, node))
    for tail, head, uart in (*upstream.edges(data="uart"), *downstream.edges(data="uart")):
        if tail in numbers and head in numbers:
            arrives = into.edges[tail, head]["uart"]
            wiring.wires.append((numbers[tail], uart, numbers[head], arrives))
    for tail, head in upstream.edges:
        if tail in numbers and head in numbers:
            wiring.tree.append((numbers[tail], numbers[head]))
    for root in (node for node, is_root in upstream.nodes(data="root") if is_root):
        if root in numbers:  # the file does not say how it hangs on the board: by every UART that nothing else uses
            chip = numbers[root]
            sends = {wire[1] for wire in wiring.wires if wire[0] == chip}
            receives = {wire[3] for wire in wiring.wires if wire[2] == chip}
            wiring.entries += [(io_channel, chip, uart) for uart in range(4) if uart not in receives]
            wiring.exits += [(chip, uart, io_channel) for uart in range(4) if uart not in sends]
            continue
        for _, head in upstream.out_edges(root):
            wiring.entries.append((io_channel, numbers[head], into.edges[root, head]["uart"]))
        for tail, _, uart in downstream.in_edges(root, data="uart"):
            wiring.exits.append((numbers[tail], uart, io_channel))


def tile_wiring(chips: int, channels: int = TILE_CHANNELS, asic: str = "2") -> Wiring:
    """A board with so many chips on default tiles, each with up to `channels` io_channels. All neighbours on a tile are
    wired, so that there are other ways. Tiles of different chip generations have different roots."""
    if not 1 <= chips <= MOST_TILES * TILE_CHIPS:
        raise ConfigError(f"expected 1 to {MOST_TILES * TILE_CHIPS} chips on a board, found {chips}")
    wiring = Wiring()
    for tile in range(ceil(chips / TILE_CHIPS)):
        _add_tile(wiring, min(chips - TILE_CHIPS * tile, TILE_CHIPS), 1 + TILE_CHANNELS * tile, channels, asic)
    return wiring


def _add_tile(wiring: Wiring, chips: int, first_channel: int, most_channels: int, asic: str) -> None:
    width = min(TILE_WIDTH, ceil(chips**0.5))
    first = len(wiring.keys)
    roots, tree, channels = _grow(chips, width, most_channels, asic)
    wiring.keys += [(first_channel + channel, FIRST_ID + chip) for chip, channel in enumerate(channels)]
    wiring.tree += [(first + parent, first + chip) for parent, chip in tree]
    for chip in range(chips):
        for direction in range(4):
            other = _neighbour(chip, direction, chips, width)
            if other is not None:
                arrives = _RECEIVE[_OPPOSITE[direction]]
                wiring.wires.append((first + chip, _SEND[direction], first + other, arrives))
    for channel, root in enumerate(roots, first_channel):
        wiring.entries.append((channel, first + root, _RECEIVE[_LEFT]))
        wiring.exits.append((first + root, _SEND[_LEFT], channel))


def _neighbour(chip: int, direction: int, chips: int, width: int) -> int | None:
    row, column = chip // width + _STEPS[direction][0], chip % width + _STEPS[direction][1]
    other = row * width + column
    return other if row >= 0 and 0 <= column < width and other < chips else None


def _root_rows(rows: int, n: int, asic: str) -> list[int]:
    """The rows of the chips that are wired to the n io_channels of a tile.

    On a tile of 100 chips these chips are 11, 41, 71, 101 (v2), 21, 41, 71, 91 (v2b) and 11, 21, 31, 41 (v3).
    """
    if asic == "3":
        return list(range(n))
    if asic == "2b":
        return [(2 * channel + 1) * rows // (2 * n) for channel in range(n)]
    return [channel * (rows - 1) // max(1, n - 1) for channel in range(n)]


def _grow(chips: int, width: int, most: int, asic: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Roots, links and the channel of each chip: the channels take a free neighbour each in turn, near ones first."""
    rows = -(-chips // width)
    n = min(most, rows)
    roots = [width * row for row in _root_rows(rows, n, asic)]
    channels = [-1] * chips
    for channel, root in enumerate(roots):
        channels[root] = channel
    tree = []
    fronts = [deque([root]) for root in roots]
    while any(fronts):
        for channel, front in enumerate(fronts):
            while front:
                near = (_neighbour(front[0], direction, chips, width) for direction in range(4))
                free = next((chip for chip in near if chip is not None and channels[chip] < 0), None)
                if free is not None:
                    channels[free] = channel
                    tree.append((front[0], free))
                    front.append(free)
                    break
                front.popleft()
    return roots, tree, channels


def write_network(path: Path, asic: str, boards: dict[int, Wiring]) -> None:
    """The default tiles' network as a controller configuration for larpix-control. FileError if that cannot be."""
    network: dict[str, Any] = {
        "miso_uart_map": list(_SEND),
        "mosi_uart_map": list(_RECEIVE),
        "usds_link_map": list(_OPPOSITE),
    }
    for io_group, wiring in boards.items():
        network[str(io_group)] = {str(channel): {"nodes": _nodes(wiring, channel)} for channel, _, _ in wiring.entries}
    content = {
        "_config_type": "controller",
        "name": f"emulated-{sum(len(wiring.keys) for wiring in boards.values())}-chips",
        "asic_version": int(asic) if asic.isdigit() else asic,
        "layout": None,
        "network": network,
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from None


def _nodes(wiring: Wiring, io_channel: int) -> list[dict[str, Any]]:
    (root,) = (chip for channel, chip, _ in wiring.entries if channel == io_channel)
    above: dict[str | int, list[int | None]] = {"ext": [None] * 4}
    above["ext"][_OPPOSITE[_LEFT]] = wiring.keys[root][1]
    uart = {(wire[0], wire[2]): wire[1] for wire in wiring.wires}
    for parent, chip in wiring.tree:
        if wiring.keys[parent][0] == io_channel:
            links = above.setdefault(wiring.keys[parent][1], [None] * 4)
            links[_SEND.index(uart[parent, chip])] = wiring.keys[chip][1]
    nodes: list[dict[str, Any]] = [{"chip_id": "ext", "root": True, "miso_us": above["ext"]}]
    for channel, chip_id in wiring.keys:
        if channel == io_channel:
            nodes.append({"chip_id": chip_id, **({"miso_us": above[chip_id]} if chip_id in above else {})})
    return nodes


class Field(NamedTuple):
    """Bits `low` to `high` of all registers, bit 0 first; `items` equal parts of a list, 0: one number."""

    low: int
    high: int
    items: int = 0

    def values(self, registers: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Of registers of shape (chips, 256): shape (chips,) or (chips, items)."""
        first = self.low // 8
        part = np.ascontiguousarray(registers[:, first : (self.high + 7) // 8])
        bits = np.unpackbits(part, axis=1, bitorder="little")[:, self.low - 8 * first : self.high - 8 * first]
        parts = bits.reshape(len(bits), max(self.items, 1), -1).astype(np.int64)
        found: NDArray[np.int64] = parts @ (1 << np.arange(parts.shape[2]))
        return found if self.items else found[:, 0]


@dataclass(frozen=True)
class RegisterMap:
    """`defaults`: shape (256,), power-up values; registers from `count` on do not exist."""

    count: int
    channels: int
    defaults: NDArray[np.uint8]
    fields: dict[str, Field]

    def address(self, name: str) -> int:
        """The first register that holds (a part of) this."""
        return self.fields[name].low // 8


@cache
def register_map(asic: str) -> RegisterMap:
    """Of a chip generation, one of `schema.ASICS`. v3 has v2b's: larpix-control does not know v3."""
    from larpix import Chip  # here, because it takes a second

    chip: Any = Chip("1-1-1", version=VERSIONS[asic])
    config = chip.config
    defaults = np.zeros(256, np.uint8)
    for packet in chip.get_configuration_write_packets():  # all_data() of LightPix leaves two registers out
        defaults[packet.register_address] = packet.register_data
    fields = {}
    for name, (low, high) in (_v1_bits(config) if asic == "1" else config.bit_map).items():
        value = getattr(config, name)
        fields[_NAMES.get(name, name)] = Field(low, high, len(value) if isinstance(value, list) else 0)
    return RegisterMap(config.num_registers, config.num_channels, defaults, fields)


def _v1_bits(config: Any) -> dict[str, tuple[int, int]]:
    """Its class has addresses under names of their own, and no bits for those that share a register."""
    shared = 8 * config.test_mode_xtrig_reset_diag_address
    bits = {"cross_trigger_mode": (shared + 2, shared + 3), "periodic_reset": (shared + 3, shared + 4)}
    for name in config.register_names:
        address = getattr(config, f"{name}_address", None)
        addresses = [address] if address is not None else getattr(config, f"{name}_addresses", None)
        if name == "pixel_trim_thresholds":
            addresses = config.pixel_trim_threshold_addresses
        elif name == "global_threshold":
            addresses = [config.global_threshold_address]
        if addresses:
            bits[name] = (8 * addresses[0], 8 * addresses[-1] + 8)
    return bits
