"""Network of emulated chips: their wires, the paths of words as set by their registers, and their register maps.

The wiring comes from a controller configuration of larpix-control or is that of default tiles. Names, addresses and
power-up values of registers are those of larpix-control.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.chip_emulator import PathEnd
from larpixdaq.errors import ConfigError, FileError, UsageError
from larpixdaq.hardware.network_bringup import load_with_included

BROADCAST: Final = 255
#: A default tile: its chips in rows of at most ten with chip_ids from 11 on, as on the tiles of a detector. The roots,
#: up to four chips in the first column, are wired to one io_channel each.
TILE_CHIPS: Final = 100
TILE_WIDTH: Final = 10
TILE_CHANNELS: Final = 4
FIRST_ID: Final = 11
#: Maximum number of default tiles on a board: a board of revision 5 has ten.
_MAX_TILES: Final = 10
#: By direction (up, left, down, right): the UART that sends to the neighbour, the UART that receives from it, the
#: direction in which the neighbour sees the chip, and the step in rows and columns.
_SEND: Final = (3, 0, 1, 2)
_RECEIVE: Final = (0, 1, 2, 3)
_OPPOSITE: Final = (2, 3, 0, 1)
_STEPS: Final = ((-1, 0), (0, -1), (1, 0), (0, 1))
_LEFT: Final = 1
#: Chip generations as larpix-control names them. v2d and v3, which it does not know, have networks as v2b.
VERSIONS: Final[dict[str, Any]] = {
    "1": 1, "2": 2, "2b": "2b", "2d": "2b", "lightpix-1": "lightpix-v1.0", "3": "2b",
}  # fmt: skip
#: Chip generations as in --asic, by their names in larpix-control's files.
_FILE_GENERATIONS: Final = {asic: asic for asic in VERSIONS} | {"lightpix-v1.0": "lightpix-1"}
#: Common names of registers that v1, v2 and v2b name differently.
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
    """Paths of words to and from v1 chips: each hears all words of its io_channel, and its wires give its chip_id.

    `hears` and `leaves` are the tables of `_native.chip_emulator.RegisterBank`, UNKNOWN until listeners() or
    exits() has found the entries. `ticks_per_bit`: ticks of the chips' clock for each bit on their lines at power-up.
    """

    #: Addresses of registers that change the paths.
    watched: tuple[int, ...] = ()

    def __init__(self, wiring: Wiring, alive: NDArray[np.bool_], ticks_per_bit: int) -> None:
        chips = len(wiring.keys)
        #: By io_channel: whether the board's UART sends to chips and receives from them, and its ticks for each bit.
        self.to_chips = np.ones(256, np.bool_)
        self.from_chips = np.ones(256, np.bool_)
        self.ticks_per_bit = np.full(256, ticks_per_bit, np.int64)
        self._chip_ticks = ticks_per_bit
        self.hears = np.full((256, 256), PathEnd.UNKNOWN, np.int32)
        self.leaves = np.full(chips, PathEnd.UNKNOWN, np.int16)
        self._keys = wiring.keys
        self._alive = alive

    def listeners(self, io_channel: int, chip_id: int) -> list[int]:
        """Return the chips that hear a word, and enter all listeners of the io_channel in `hears`."""
        by_id: dict[int, list[int]] = {}
        if self._ticks_to_chips(io_channel) == self._chip_ticks:
            for chip, (chip_channel, own_id) in enumerate(self._keys):
                if chip_channel == io_channel and self._alive[chip]:
                    by_id.setdefault(own_id, []).append(chip)
        return self._enter_listeners(io_channel, by_id).get(chip_id, [])

    def exits(self, chip: int) -> list[int]:
        """Return the io_channels on which the chip's answers reach the board, and enter them in `leaves`."""
        io_channel = self._keys[chip][0]
        connected = self._ticks_from_chips(io_channel) == self._chip_ticks
        self.leaves[chip] = io_channel if connected else PathEnd.NONE
        return [io_channel] if connected else []

    def _ticks_to_chips(self, io_channel: int) -> int:
        """Ticks for each bit that the board sends on this io_channel, 0 when it does not send."""
        return int(self.ticks_per_bit[io_channel]) if self.to_chips[io_channel] else 0

    def _ticks_from_chips(self, io_channel: int) -> int:
        """Ticks for each bit that the board receives on this io_channel, 0 when it does not receive."""
        return int(self.ticks_per_bit[io_channel]) if self.from_chips[io_channel] else 0

    def invalidate_chip(self, chip: int, address: int) -> None:
        """Discard the paths through a chip, because its watched register at this address has changed."""

    def invalidate(self) -> None:
        """Discard all paths, because the power of chips or the board's UARTs have changed."""
        self.hears.fill(PathEnd.UNKNOWN)
        self.leaves.fill(PathEnd.UNKNOWN)

    def _enter_listeners(self, io_channel: int, by_id: dict[int, list[int]]) -> dict[int, list[int]]:
        row = self.hears[io_channel]
        row.fill(PathEnd.NONE)
        for chip_id, chips in by_id.items():
            row[chip_id] = chips[0] if len(chips) == 1 else PathEnd.SEVERAL
        return by_id


class Network(Chain):
    """Paths of words in a hydra network of v2 chips or later ones.

    A chip receives on the UARTs of enable_posi. It takes words for its chip_id, and passes other words on: those from
    the board by the UARTs of enable_piso_upstream, those to the board by the UARTs of enable_piso_downstream. It takes
    broadcasts and passes them on, too. Real chips send words round a ring of paths for ever; here they go round once.
    A receiver with another number of ticks for each bit than the sender hears nothing.
    """

    def __init__(
        self,
        wiring: Wiring,
        alive: NDArray[np.bool_],
        ticks_per_bit: int,
        registers: NDArray[np.uint8],
        register_map: RegisterMap,
        *,
        clk_ctrl: bool,
    ) -> None:
        """`clk_ctrl`: the chips have this register, and each step of it doubles their ticks for each bit."""
        super().__init__(wiring, alive, ticks_per_bit)
        self._registers = registers
        self._id, self._upstream, self._downstream, self._posi = (
            register_map.address(name)
            for name in ("chip_id", "enable_piso_upstream", "enable_piso_downstream", "enable_posi")
        )
        self.watched = (self._id, self._upstream, self._downstream, self._posi)
        if clk_ctrl:
            clock = register_map.fields["clk_ctrl"]
            self._clock, self._clock_shift = clock.low // 8, clock.low % 8
            self._clock_mask = (1 << clock.high - clock.low) - 1
            self.watched += (self._clock,)
        self._clk_ctrl = clk_ctrl
        self._wires: list[list[tuple[int, int, int]]] = [[] for _ in wiring.keys]  # (UART, neighbour, its UART)
        for chip, uart, neighbour, receiver in wiring.wires:
            self._wires[chip].append((uart, neighbour, receiver))
        self._entries: dict[int, list[tuple[int, int]]] = {}
        for io_channel, chip, receiver in wiring.entries:
            self._entries.setdefault(io_channel, []).append((chip, receiver))
        self._also, self._flipping = wiring.also, wiring.flipping
        #: Results of listeners() and exits() as long as the entries in `hears` and `leaves` are not UNKNOWN.
        self._listeners: dict[int, dict[int, list[int]]] = {}
        self._io_channels: dict[int, list[int]] = {}
        #: Number of links that flip bits on the way: of words by (io_channel, chip), and of a chip's answers.
        self.flips_to: dict[tuple[int, int], int] = {}
        self.flips_from: dict[int, int] = {}
        self._exits: list[list[tuple[int, int]]] = [[] for _ in wiring.keys]
        for chip, uart, io_channel in wiring.exits:
            self._exits[chip].append((uart, io_channel))
        self._reached_from: list[set[int]] = [set() for _ in wiring.keys]  # io_channels whose words reach the chip

    def listeners(self, io_channel: int, chip_id: int) -> list[int]:
        if self.hears[io_channel, 0] != PathEnd.UNKNOWN:
            return self._listeners[io_channel].get(chip_id, [])
        by_id: dict[int, list[int]] = {}
        self._listeners[io_channel] = by_id
        ticks = self._ticks_to_chips(io_channel)
        # chips to visit: the chip, the UART that receives the words, the mask of the chip_ids on their path, and the
        # number of links there that flip bits
        queue = [(chip, receiver, 0, 0) for chip, receiver in self._entries.get(io_channel, ())]
        visited = set()
        while queue:
            chip, receiver, path_ids, flips = queue.pop()
            self._reached_from[chip].add(io_channel)
            if chip in visited or not self._receives(chip, receiver) or self._ticks(chip) != ticks:
                continue
            visited.add(chip)
            own_id, senders = int(self._registers[chip, self._id]), int(self._registers[chip, self._upstream])
            for taken in (own_id, self._also[chip]) if chip in self._also else (own_id,):
                if not path_ids >> taken & 1 and taken != BROADCAST:
                    by_id.setdefault(taken, []).append(chip)
                path_ids |= 1 << taken
            by_id.setdefault(BROADCAST, []).append(chip)
            self.flips_to[io_channel, chip] = flips
            if not senders:
                continue
            for uart, neighbour, neighbour_uart in self._wires[chip]:
                if senders >> uart & 1:
                    flipped = (chip, neighbour) in self._flipping
                    queue.append((neighbour, neighbour_uart, path_ids, flips + flipped))
        return self._enter_listeners(io_channel, by_id).get(chip_id, [])

    def exits(self, chip: int) -> list[int]:
        if self.leaves[chip] != PathEnd.UNKNOWN:
            return self._io_channels[chip]
        known = self._exit_of_neighbour(chip)
        if known is not None:
            self.leaves[chip], self.flips_from[chip] = known, 0
            self._io_channels[chip] = [known] if known >= 0 else []
            return self._io_channels[chip]
        io_channels: list[int] = []
        self._io_channels[chip] = io_channels
        queue, visited = [chip], {chip}
        flips = {chip: 0}
        self.flips_from[chip] = 0
        ticks = self._ticks(chip)
        while queue:
            sender = queue.pop()
            uarts = int(self._registers[sender, self._downstream])
            for uart, io_channel in self._exits[sender]:
                if uarts >> uart & 1 and self._ticks_from_chips(io_channel) == ticks:
                    io_channels.append(io_channel)
                    self.flips_from[chip] = flips[sender]
            for uart, neighbour, receiver in self._wires[sender]:
                if uarts >> uart & 1 and neighbour not in visited and self._receives(neighbour, receiver):
                    visited.add(neighbour)
                    flips[neighbour] = flips[sender] + ((sender, neighbour) in self._flipping)
                    if self._ticks(neighbour) == ticks:
                        queue.append(neighbour)
        direct = len(io_channels) < 2 and not self.flips_from[chip]
        self.leaves[chip] = (io_channels[0] if io_channels else PathEnd.NONE) if direct else PathEnd.SEVERAL
        return io_channels

    def _exit_of_neighbour(self, chip: int) -> int | None:
        """Return the exit of the only neighbour that hears this chip, or NONE, if it is known; else None."""
        uarts = int(self._registers[chip, self._downstream]) & 0xF
        if uarts.bit_count() != 1 or self._flipping or any(uarts >> uart & 1 for uart, _ in self._exits[chip]):
            return None
        for uart, neighbour, receiver in self._wires[chip]:
            if uarts >> uart & 1 and self._receives(neighbour, receiver):
                known = int(self.leaves[neighbour])
                return known if known >= PathEnd.NONE and self._ticks(neighbour) == self._ticks(chip) else None
        return None

    def _enter_listeners(self, io_channel: int, by_id: dict[int, list[int]]) -> dict[int, list[int]]:
        super()._enter_listeners(io_channel, by_id)
        if self._flipping:
            for chip_id, chips in by_id.items():
                if any(self.flips_to[io_channel, chip] for chip in chips):
                    self.hears[io_channel, chip_id] = PathEnd.SEVERAL
        return by_id

    def _receives(self, chip: int, uart: int) -> bool:
        return bool(self._alive[chip] and int(self._registers[chip, self._posi]) >> uart & 1)

    def _ticks(self, chip: int) -> int:
        if not self._clk_ctrl:
            return self._chip_ticks
        return self._chip_ticks << (int(self._registers[chip, self._clock]) >> self._clock_shift & self._clock_mask)

    def invalidate_chip(self, chip: int, address: int) -> None:
        if address != self._downstream:
            for io_channel in self._reached_from[chip]:
                self.hears[io_channel].fill(PathEnd.UNKNOWN)
        if address not in (self._id, self._upstream):
            self.leaves.fill(PathEnd.UNKNOWN)


@dataclass
class Wiring:
    """Chips and wires of one board. Chips are numbered in the order of `keys`, from 0."""

    #: io_channel and chip_id of each chip after its configuration.
    keys: list[tuple[int, int]] = field(default_factory=list)
    #: Sending chip, its UART, receiving chip, its UART.
    wires: list[tuple[int, int, int, int]] = field(default_factory=list)
    #: io_channel, chip, UART that receives from the board.
    entries: list[tuple[int, int, int]] = field(default_factory=list)
    #: Chip, UART that sends to the board, io_channel.
    exits: list[tuple[int, int, int]] = field(default_factory=list)
    #: Links of the configured network: the chip nearer to the board, the chip behind it.
    tree: list[tuple[int, int]] = field(default_factory=list)
    #: Chips that also take words for another chip_id, and that chip_id.
    also: dict[int, int] = field(default_factory=dict)
    #: Sender and receiver of wires that flip bits.
    flipping: set[tuple[int, int]] = field(default_factory=set)

    def cut(self, a: int, b: int) -> None:
        """Remove all wires between two chips."""
        self.wires = [wire for wire in self.wires if {wire[0], wire[2]} != {a, b}]

    def cut_one_way(self, sender: int, receiver: int) -> None:
        """Remove the wires from one chip to another, and keep those back."""
        self.wires = [wire for wire in self.wires if (wire[0], wire[2]) != (sender, receiver)]

    def links(self) -> list[tuple[int, int]]:
        """Return the pairs of chips with wires between them."""
        return sorted({(min(a, b), max(a, b)) for a, _, b, _ in self.wires})


class Field(NamedTuple):
    """Field of a chip's configuration: bits `low` to `high` - 1 of its registers, bit 0 of register 0 first.

    `items`: length of a list with elements of equal size; 0 for a single number.
    """

    low: int
    high: int
    items: int = 0

    def values(self, registers: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Values in registers of shape (chips, 256): shape (chips,) or (chips, items)."""
        first = self.low // 8
        part = np.ascontiguousarray(registers[:, first : (self.high + 7) // 8])
        bits = np.unpackbits(part, axis=1, bitorder="little")[:, self.low - 8 * first : self.high - 8 * first]
        parts = bits.reshape(len(bits), max(self.items, 1), -1).astype(np.int64)
        values: NDArray[np.int64] = parts @ (1 << np.arange(parts.shape[2]))
        return values if self.items else values[:, 0]


@dataclass(frozen=True)
class RegisterMap:
    """Registers of a chip generation. `count`: number of registers. `channels`: pixels of a chip.

    `defaults`: power-up values, shape (256,); registers from `count` on do not exist.
    """

    count: int
    channels: int
    defaults: NDArray[np.uint8]
    fields: dict[str, Field]

    def address(self, name: str) -> int:
        """Address of the first register of a field."""
        return self.fields[name].low // 8


@cache
def register_map(asic: str) -> RegisterMap:
    """Return the registers of a chip generation, a key of `schema.ASICS`."""
    from larpix import Chip  # late, because the import takes a second

    chip: Any = Chip("1-1-1", version=VERSIONS[asic])
    from larpixdaq.hardware.register_tables import CONFIGURATIONS

    if asic in CONFIGURATIONS:
        chip.config = CONFIGURATIONS[asic]()
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
    """Bits of each field of v1 chips, because larpix-control has only addresses for them, under irregular names."""
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


def read_network(path: str) -> tuple[str, dict[int, Wiring]]:
    """Read a controller configuration of larpix-control: the chip generation, and the wiring by io_group.

    Its network is taken for all existing wires. larpix-control looks paths up in the current directory, then in its
    package; files that are included may also be beside it. Raises FileError and ConfigError.
    """
    from larpix import Controller, configs  # late, because the import takes a second

    controller: Any = Controller()
    try:
        content = load_with_included(path, lambda name: configs.load(name, "controller"))
        asic = _FILE_GENERATIONS[str(content["asic_version"])]
        if asic == "1":
            controller.load_controller(path)
            return asic, _chains(controller.chips)
        load_with_included(path, lambda name: controller.load_network(name, version=VERSIONS[asic]))
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
    """Boards with v1 chips, which have no wires here because each hears every word of its io_channel."""
    boards: dict[int, Wiring] = {}
    for key in keys:
        boards.setdefault(key.io_group, Wiring()).keys.append((key.io_channel, key.chip_id))
    return boards


def _add_network(wiring: Wiring, io_channel: int, network: Any) -> None:
    """Add the chips of an io_channel. `network`: larpix-control's three graphs, with a link as an edge of two of them.

    An edge of `miso_us` or `miso_ds` has the UART that sends, the same edge of `mosi` the UART that receives.
    """
    upstream, downstream, mosi = (network[name] for name in ("miso_us", "miso_ds", "mosi"))
    numbers = {}
    for node in upstream:
        if isinstance(node, int):
            numbers[node] = len(wiring.keys)
            wiring.keys.append((io_channel, node))
    for tail, head, uart in (*upstream.edges(data="uart"), *downstream.edges(data="uart")):
        if tail in numbers and head in numbers:
            wiring.wires.append((numbers[tail], uart, numbers[head], mosi.edges[tail, head]["uart"]))
    for tail, head in upstream.edges:
        if tail in numbers and head in numbers:
            wiring.tree.append((numbers[tail], numbers[head]))
    for root in (node for node, is_root in upstream.nodes(data="root") if is_root):
        if root in numbers:  # the file does not say which UARTs are wired to the board: all that are not used
            chip = numbers[root]
            sends = {wire[1] for wire in wiring.wires if wire[0] == chip}
            receives = {wire[3] for wire in wiring.wires if wire[2] == chip}
            wiring.entries += [(io_channel, chip, uart) for uart in range(4) if uart not in receives]
            wiring.exits += [(chip, uart, io_channel) for uart in range(4) if uart not in sends]
            continue
        for _, head in upstream.out_edges(root):
            wiring.entries.append((io_channel, numbers[head], mosi.edges[root, head]["uart"]))
        for tail, _, uart in downstream.in_edges(root, data="uart"):
            wiring.exits.append((numbers[tail], uart, io_channel))


def tile_wiring(
    chips: int, channels: int = TILE_CHANNELS, asic: str = "2", io_channels: Container[int] = range(1, 41)
) -> Wiring:
    """Return the wiring of a board with this number of chips on default tiles of up to `channels` io_channels.

    All neighbours on a tile are wired, so that the network can be rerouted. The roots depend on the chip generation.
    `io_channels`: those of the board. On a tile that has some of them, a root of another one is an ordinary chip.
    """
    if not 1 <= chips <= _MAX_TILES * TILE_CHIPS:
        raise UsageError(f"--chips: expected 1 to {_MAX_TILES * TILE_CHIPS} chips on a board, found {chips}")
    wiring = Wiring()
    for tile in range(ceil(chips / TILE_CHIPS)):
        first = 1 + TILE_CHANNELS * tile
        every = range(first, first + channels)
        own = [c if c in io_channels else None for c in every]
        _add_tile(wiring, min(chips - TILE_CHIPS * tile, TILE_CHIPS), own if any(own) else every, asic)
    return wiring


def _add_tile(wiring: Wiring, chips: int, io_channels: Sequence[int | None], asic: str) -> None:
    """Add a tile. `io_channels`: of its roots; None for a root that is not wired to the board."""
    width = min(TILE_WIDTH, ceil(chips**0.5))
    rows = -(-chips // width)
    first = len(wiring.keys)
    root_rows = _root_rows(rows, min(len(io_channels), rows), asic)
    roots = {c: width * row for c, row in zip(io_channels, root_rows, strict=False) if c is not None}
    tree, channels = _grow_network(chips, width, roots)
    wiring.keys += [(channel, FIRST_ID + chip) for chip, channel in enumerate(channels)]
    wiring.tree += [(first + parent, first + chip) for parent, chip in tree]
    for chip in range(chips):
        for direction in range(4):
            neighbour = _neighbour(chip, direction, chips, width)
            if neighbour is not None:
                receiver = _RECEIVE[_OPPOSITE[direction]]
                wiring.wires.append((first + chip, _SEND[direction], first + neighbour, receiver))
    for channel, root in roots.items():
        wiring.entries.append((channel, first + root, _RECEIVE[_LEFT]))
        wiring.exits.append((first + root, _SEND[_LEFT], channel))


def _neighbour(chip: int, direction: int, chips: int, width: int) -> int | None:
    row, column = chip // width + _STEPS[direction][0], chip % width + _STEPS[direction][1]
    neighbour = row * width + column
    return neighbour if row >= 0 and 0 <= column < width and neighbour < chips else None


def _root_rows(rows: int, n: int, asic: str) -> list[int]:
    """Return the rows of the n roots of a tile.

    On a tile of 100 chips the roots are 11, 41, 71, 101 (v2), 21, 41, 71, 91 (v2b, v2d) and 11, 21, 31, 41 (v3).
    """
    if asic == "3":
        return list(range(n))
    if asic in ("2b", "2d"):
        return [(2 * channel + 1) * rows // (2 * n) for channel in range(n)]
    return [channel * (rows - 1) // max(1, n - 1) for channel in range(n)]


def _grow_network(chips: int, width: int, roots: Mapping[int, int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the links, and the io_channel of each chip. `roots`: by io_channel.

    The io_channels take turns to add one free neighbour, those nearest to their root first.
    """
    channels = [0] * chips
    for channel, root in roots.items():
        channels[root] = channel
    tree = []
    fronts = {channel: deque([root]) for channel, root in roots.items()}
    while any(fronts.values()):
        for channel, front in fronts.items():
            while front:
                neighbours = (_neighbour(front[0], direction, chips, width) for direction in range(4))
                free = next((chip for chip in neighbours if chip is not None and not channels[chip]), None)
                if free is not None:
                    channels[free] = channel
                    tree.append((front[0], free))
                    front.append(free)
                    break
                front.popleft()
    return tree, channels


def write_network(path: Path, asic: str, boards: dict[int, Wiring]) -> None:
    """Write the network of default tiles as a controller configuration for larpix-control. Raises FileError."""
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
    links: dict[str | int, list[int | None]] = {"ext": [None] * 4}
    links["ext"][_OPPOSITE[_LEFT]] = wiring.keys[root][1]
    uart = {(wire[0], wire[2]): wire[1] for wire in wiring.wires}
    for parent, chip in wiring.tree:
        if wiring.keys[parent][0] == io_channel:
            chip_links = links.setdefault(wiring.keys[parent][1], [None] * 4)
            chip_links[_SEND.index(uart[parent, chip])] = wiring.keys[chip][1]
    nodes: list[dict[str, Any]] = [{"chip_id": "ext", "root": True, "miso_us": links["ext"]}]
    for channel, chip_id in wiring.keys:
        if channel == io_channel:
            nodes.append({"chip_id": chip_id, **({"miso_us": links[chip_id]} if chip_id in links else {})})
    return nodes
