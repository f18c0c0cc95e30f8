"""How chips are wired: from a controller configuration of larpix-control, or tiles of a default kind."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Final

from larpixdaq.emulators.registers import VERSIONS
from larpixdaq.errors import ConfigError, FileError

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


def read(path: str) -> tuple[str, dict[int, Wiring]]:
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


def tiles(chips: int, channels: int = TILE_CHANNELS, asic: str = "2") -> Wiring:
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


def write(path: Path, asic: str, boards: dict[int, Wiring]) -> None:
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
