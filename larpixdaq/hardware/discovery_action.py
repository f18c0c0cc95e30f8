"""The action discover_network: its arguments, the board file and the picture that it writes, and its result."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from larpixdaq.errors import RequestError
from larpixdaq.hardware.actions import BoardActions
from larpixdaq.hardware.chip_state import ChipState
from larpixdaq.hardware.discovered_tile import Tile
from larpixdaq.hardware.network_discovery import NetworkDiscovery
from larpixdaq.hardware.pacman_registers import FIRMWARE, MAP_VERSION, TILES, read, tile_mask, values_in
from larpixdaq.hardware.power import Progress
from larpixdaq.hardware.producer_link import BoardError
from larpixdaq.hardware.tile_shape import CHANNELS, OPPOSITE, TileShape, tile_shape
from larpixdaq.routines.kit import network_picture
from larpixdaq.schema import parse_key

_MOST_TILES: Final = 10
#: Ticks of the chips' clock after which chips of all generations are at power-up again, also on a serial board.
RESET_LENGTH: Final = 256
#: Faults that the result lists; all are counted.
_LISTED: Final = 10_000


class DiscoveryActions:
    """The action that finds the chips of tiles, and writes their networks as a board file."""

    def __init__(self, chips: ChipState, progress: Progress) -> None:
        boards = BoardActions(chips.link, chips.invalidate, progress, chips.dacs)
        self._chips, self._orders, self._reset, self._progress = chips, boards.orders, boards.reset, progress

    def discover_network(
        self,
        file: Any = None,
        tiles: Any = None,
        io_group: Any = None,
        shape: Any = None,
        exclude: Any = None,
        reset: Any = True,
    ) -> dict[str, Any]:
        began = time.monotonic()
        registers = self._chips.registers
        if registers.version == 1:
            raise RequestError("discover_network: v1 chips form no network: load_board(file) lists them")
        if not isinstance(reset, bool):
            raise RequestError(f"discover_network: reset: expected True or False, found {reset!r:.100}")
        form = tile_shape(shape, registers.asic)
        path = _new_file(file)
        groups = self._orders.groups(io_group)
        found = [
            Tile(group, number, self._io_channels(group, number, form), form)
            for group in groups
            for number in self._tiles_of(group, tiles)
        ]
        _exclude(found, exclude)
        reset_chips = partial(self._reset, RESET_LENGTH) if reset else None
        discovery = NetworkDiscovery(self._chips.link, registers, found, self._progress, reset_chips)
        self._chips.invalidate(groups)
        if reset_chips:
            reset_chips(groups)
        discovery.discover()
        state = "the found networks are up; chips that were not found have registers that are not known"
        if reset:
            state = self._reset_again(groups, discovery)
        self._chips.invalidate(groups)
        if not any(tile.chips for tile in found):
            errors = dict.fromkeys(tile.error for tile in found if tile.error)
            raise BoardError(
                "; ".join(errors)
                or f"discover_network: no chip answers on {', '.join(tile.name for tile in found)}: "
                "have they power (power()), and do their UARTs have the clock of the chips (set_uart_clock())?"
            )
        _write(path, registers.asic, found)
        self._chips.load_board(str(path))
        faults = [fault for tile in found for fault in tile.faults()]
        result = {
            "ok": not faults,
            "file": str(path.absolute()),
            "picture": str(path.absolute().with_suffix(".html")),
            "asic": registers.asic,
            "chips": sum(len(tile.chips) for tile in found),
            "missing": sum(len(tile.missing()) for tile in found),
            "faults": faults[:_LISTED],
            "state": state,
            "seconds": round(time.monotonic() - began, 2),
            "tiles": [_describe(tile) for tile in found],
        }
        _write_new(path.with_suffix(".html"), network_picture.page(result))
        return result

    def _reset_again(self, groups: list[int], discovery: NetworkDiscovery) -> str:
        """Reset the boards' chips. Returns the state of the chips."""
        errors = []
        for group in groups:
            try:
                self._reset(RESET_LENGTH, [group])
            except BoardError as error:
                errors.append(str(error))
        if left := discovery.answering_roots():
            errors.append(f"{len(left)} root chips still answer after a reset, among them {left[0]}")
        return (
            f"not known: {'; '.join(errors)}" if errors else "all chips have their power-up configuration, by a reset"
        )

    def _io_channels(self, io_group: int, tile: int, shape: TileShape) -> list[int]:
        """Return the io_channels of a tile's roots. A serial board has io_channel 1 only.

        The last root of a tile has none where a board has three io_channels for a tile.
        """
        roots = 1 if self._orders.kinds[io_group] == "serial" else len(shape.roots)
        first = CHANNELS * tile + 1
        return [c for c in range(first, first + roots) if self._orders.has_io_channel(io_group, c)]

    def _tiles_of(self, io_group: int, requested: Any) -> list[int]:
        """Return the tiles of a board (None: those that are switched on, as far as the board can tell)."""
        if requested is not None:
            numbers = requested if isinstance(requested, list) else [requested]
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MOST_TILES:
                    raise RequestError(
                        f"discover_network: tiles: expected numbers from 0 to {_MOST_TILES - 1}, found {number!r:.100}"
                    )
            if not numbers:
                raise RequestError("discover_network: tiles: expected at least one number, found none")
            return list(dict.fromkeys(numbers))
        if self._orders.kinds[io_group] != "pacman":
            return [0]
        orders = [read(TILES), read(FIRMWARE), read(MAP_VERSION)]
        enabled, firmware, map_version = values_in(self._chips.link.ask(io_group, b"".join(orders)))
        on = enabled & tile_mask(self._orders.revision_of(io_group, map_version), firmware)
        numbers = [tile for tile in range(on.bit_length()) if on >> tile & 1]
        if not numbers:
            raise RequestError(
                f"discover_network: no tile of {self._orders.names[io_group]} is on: power(True) switches them on, "
                "or name tiles"
            )
        return numbers


def _exclude(tiles: list[Tile], chips: Any) -> None:
    """Exclude chips, named by their keys; the io_channel may be any of their tile."""
    if chips is None:
        return
    for name in chips if isinstance(chips, list) else [chips]:
        io_group, io_channel, chip_id = parse_key(name)
        for tile in tiles:
            if tile.io_group == io_group and tile.number == (io_channel - 1) // CHANNELS:
                if chip_id not in tile.shape.ids():
                    raise RequestError(f"discover_network: exclude: {tile.name} has no chip {chip_id}")
                tile.excluded.add(chip_id)
                break
        else:
            raise RequestError(f"discover_network: exclude: chip {name!r:.100} is on none of the requested tiles")


def _new_file(file: Any) -> Path:
    """Return the path of the board file to write. RequestError if it exists or cannot be a board file."""
    if file is None:
        return Path(f"network-{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}.json")
    if not isinstance(file, str) or not file.isprintable() or not file.endswith(".json"):
        raise RequestError(f"discover_network: file: expected a name that ends with .json, found {file!r:.100}")
    path = Path(file)
    for new in (path, path.with_suffix(".html")):
        if new.exists():
            raise RequestError(f"discover_network: file {new!s:.200}: it exists, and is not overwritten: name another")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"discover_network: file {file:.200}: no such folder")
    return path


def _write(path: Path, asic: str, tiles: list[Tile]) -> None:
    """Write a controller configuration of larpix-control with the networks of these tiles."""
    shape = tiles[0].shape
    network: dict[str, Any] = {
        "miso_uart_map": list(shape.send),
        "mosi_uart_map": list(shape.receive),
        "usds_link_map": list(OPPOSITE),
    }
    for tile in tiles:
        for root in tile.roots:
            nodes = [{"chip_id": "ext", "root": True, "miso_us": _children({OPPOSITE[root.side]: root.chip_id})}]
            for chip in tile.ordered():
                if chip.io_channel == root.io_channel:
                    links = {OPPOSITE[child.side]: child.chip_id for child in chip.children}
                    nodes.append({"chip_id": chip.chip_id} | ({"miso_us": _children(links)} if links else {}))
            network.setdefault(str(tile.io_group), {})[str(root.io_channel)] = {"nodes": nodes}
    content = {
        "_config_type": "controller",
        "name": path.stem,
        "asic_version": int(asic) if asic.isdigit() else asic,
        "layout": None,
        "network": network,
    }
    _write_new(path, json.dumps(content, indent=1) + "\n")


def _write_new(path: Path, content: str) -> None:
    try:
        with path.open("x") as file:
            file.write(content)
    except OSError as error:
        raise RequestError(f"discover_network: cannot write {path}: {error.strerror}") from None


def _children(links: dict[int, int]) -> list[int | None]:
    return [links.get(direction) for direction in range(4)]


def _describe(tile: Tile) -> dict[str, Any]:
    """Return the facts of a tile, as result_views.py draws them.

    `network`: id, io_channel, and parent (0 for a root) of each chip. `one_way`: wires that work, sender first, while
    the wire back does not. Positions are those of `ids`, row by row.
    """
    shape = tile.shape
    return {
        "io_group": tile.io_group,
        "tile": tile.number,
        "chips": len(tile.chips),
        "roots": {str(root.io_channel): root.chip_id for root in tile.roots},
        "missing": tile.missing(),
        "faults": len(tile.faults()),
        "rows": shape.rows,
        "columns": shape.columns,
        "first_id": shape.first_id,
        "row_step": shape.row_step,
        "network": [
            [chip.chip_id, chip.io_channel, chip.parent.chip_id if chip.parent else 0] for chip in tile.ordered()
        ],
        "broken": [sorted(wire) for wire in tile.broken if wire[0] < wire[1]],
        "one_way": [list(wire) for wire in tile.one_way],
        "bad_links": sorted(sorted(link) for link in tile.bad_links),
        "excluded": sorted(tile.excluded),
        "grown_anew": tile.restarts,
    }
