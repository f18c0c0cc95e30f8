"""Pixel layouts: positions of the chips' channels, from YAML files of larpix-geometry and of detector simulations.

There are two forms of file. A file of one board has `pixels`, [id, x, y, ...] in mm, and `chips`, [chip, [pixel id or
null of each channel]], with chips by chip_id or key. A file of equal tiles has `chip_channel_to_position`, [x, y] in
pixel pitches by 1000 * chip_id + channel_id; `tile_chip_to_io`, the chips of each tile with 1000 * io_group +
io_channel; `tile_positions` and `tile_orientations` (drift, y, x), centre and orientation of each tile; and
`tpc_centers` (x, y, drift), the centres of the anodes in `tile_indeces`. Positions are calculated as in larnd-sim and
module0_flow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import FormatError, RequestError, cause
from larpixdaq.schema import key_of, parse_key

#: Maximum bytes of a file. (A file with 39,200 single pixels has 3 MB.)
_MOST_BYTES: Final = 16 << 20
#: Maximum channels of a chip.
_CHANNELS: Final = 256
_VERSION: Final = re.compile(r"\d+\.\d+\.\d+")


class TilePlacement(NamedTuple):
    """Centre of a tile (x, y, and z along the drift, in mm), and factors of x and y on the tile (1 or -1)."""

    position: tuple[float, ...] = (0.0, 0.0, 0.0)
    orientation: tuple[float, ...] = (1.0, 1.0)


class PixelLayout(NamedTuple):
    """Positions of all channels.

    `coordinates`: x and y in mm, shape (channels, 2), NaN without a pixel, by chip_id on a tile or by chip of a board.
    `chips`: tile of a chip and its name in `coordinates`, by chip key, or by chip_id if the file has no keys.
    """

    name: str
    file: str
    version: str | None
    pitch: float | None  # mm
    coordinates: dict[str, NDArray[np.float64]]
    tiles: dict[int | None, TilePlacement]
    chips: dict[str, tuple[int | None, str]]

    def summary(self) -> dict[str, Any]:
        """Return name, file, version, pitch (mm), numbers of pixels, chips and tiles, x and y ([from, to], mm)."""
        pixels = {chip_name: int(np.isfinite(xy[:, 0]).sum()) for chip_name, xy in self.coordinates.items()}
        positions = [_on_detector(tile, xy) for tile in self.tiles.values() for xy in self.coordinates.values()]
        placed = np.concatenate([np.zeros((0, 2)), *positions])
        placed = placed[np.isfinite(placed[:, 0])]
        box = [[round(float(end(axis)), 4) for end in (np.min, np.max)] if len(axis) else [] for axis in placed.T]
        return {
            "name": self.name,
            "file": self.file,
            "version": self.version,
            "pitch": self.pitch,
            "pixels": sum(pixels[chip_name] for _, chip_name in self.chips.values()),
            "chips": len(self.chips),
            "tiles": len(self.tiles),
            "x": box[0],
            "y": box[1],
        }

    def find(self, chip: Any) -> str:
        """Return the name in `chips` of a chip, given by key or chip_id; RequestError if it is not in the layout."""
        names = [str(chip)]
        if names[0] not in self.chips and not names[0].isdecimal():
            key = parse_key(chip)
            names = [key_of(key), str(key[2])]
        for name in names:
            if name in self.chips:
                return name
        raise RequestError(f"chip {names[0]}: not among the {len(self.chips)} chips of pixel layout {self.name}")

    def channels(self, chip: str) -> int:
        return len(self.coordinates[self.chips[chip][1]])

    def positions(self, chip: Any) -> NDArray[np.float64]:
        """Return x and y (mm) of a chip's channels, shape (channels, 2), NaN without a pixel. Errors as in find()."""
        tile, chip_name = self.chips[self.find(chip)]
        return _on_detector(self.tiles[tile], self.coordinates[chip_name])

    def describe(self, chip: str) -> dict[str, Any]:
        """Return x, y (mm, by channel_id, None without a pixel), z (mm, along the drift) and tile of a chip."""
        tile = self.chips[chip][0]
        x, y = (
            [None if math.isnan(value) else round(value, 4) for value in axis]
            for axis in self.positions(chip).T.tolist()
        )
        return {"x": x, "y": y, "z": self.tiles[tile].position[2], "tile": tile}


class LoadedLayout:
    """The last loaded pixel layout. A new child reads its file again at the first use."""

    def __init__(self, name: str) -> None:
        """`name`: path or name of the file, "" before the first load()."""
        self.name = name
        self._layout: PixelLayout | None = None

    def get(self) -> PixelLayout:
        """Return the layout; RequestError if none is loaded."""
        if self._layout is None:
            if not self.name:
                raise RequestError("no pixel layout is known yet: load_pixel_layout(name) loads one")
            self._layout = read(self.name)
        return self._layout

    def load(self, name: str) -> PixelLayout:
        """Read a layout and keep it. If that fails, RequestError, and the previous layout stays."""
        self._layout = read(name)
        self.name = name
        return self._layout


def read(name: str) -> PixelLayout:
    """Read the layout from a file: a path, or the name of a file in larpix-geometry. RequestError if it fails."""
    path = _find(name)
    try:
        return parse(_content(path), name, str(path.absolute()))
    except FormatError as error:
        raise RequestError(f"pixel layout {path}: {error}") from None


def parse(content: Any, name: str, file: str) -> PixelLayout:
    """Return the layout from the content of a YAML file; FormatError, in one line, if it is no layout."""
    if not isinstance(content, dict):
        raise FormatError(f"expected a mapping, found {_shown(content)}")
    if "chip_channel_to_position" in content:
        return _tiles(content, name, file)
    if "pixels" in content:
        return _board(content, name, file)
    names = ", ".join(_shown(key) for key in list(content)[:10]) or "none"
    raise FormatError(f"expected pixels and chips, or chip_channel_to_position and tile_chip_to_io, found {names}")


def _find(name: str) -> Path:
    try:
        path = Path(name)
        if path.is_file():
            return path
        spec = find_spec("larpixgeometry")
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (shipped := Path(folder) / "layouts" / name).is_file():
                return shipped
    except (OSError, ValueError) as error:  # not a valid file name
        raise RequestError(f"pixel layout {name!r:.100}: {cause(error)}") from None
    brought = "in larpix-geometry" if spec is not None else "larpix-geometry installed"
    raise RequestError(f"pixel layout {name!r:.100}: no such file here, nor {brought}")


def _content(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise RequestError("pixel layouts need PyYAML: pip install larpix-daq[geometry]") from None

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Loader without merge keys (<<), because nested ones can double the content again and again."""

        def flatten_mapping(self, node: Any) -> None: ...

    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise FormatError(f"expected at most {_MOST_BYTES} bytes, found {size}")
        return yaml.load(path.read_bytes(), Loader)
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(error.strerror or str(error)) from None
    except Exception as error:  # PyYAML can raise anything
        raise FormatError(f"not YAML: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


def _board(content: dict[Any, Any], name: str, file: str) -> PixelLayout:
    pixels: dict[Any, tuple[float, float]] = {}
    for entry in _items(content, "pixels", list):
        match entry:
            case [int() | str() as pixel, x, y, *_]:
                pixels[pixel] = _numbers([x, y], 2, f"pixel {_shown(pixel)}")  # type: ignore[assignment]
            case _:
                raise FormatError(f"pixels: expected [id, x, y, ...], found {_shown(entry)}")
    coordinates: dict[str, NDArray[np.float64]] = {}
    for entry in _items(content, "chips", list):
        match entry:
            case [int() | str() as chip, list(connected)] if len(connected) <= _CHANNELS:
                chip_name = _chip(chip) if isinstance(chip, int) else _key(chip)
            case _:
                raise FormatError(f"chips: expected [chip, [pixel ids, {_CHANNELS} at most]], found {_shown(entry)}")
        if chip_name in coordinates:
            raise FormatError(f"chips: chip {chip_name} comes twice")
        coordinates[chip_name] = xy = np.full((len(connected), 2), np.nan)
        for channel, pixel in enumerate(connected):
            if pixel is not None:
                if not isinstance(pixel, int | str) or pixel not in pixels:
                    raise FormatError(f"chip {chip_name}, channel {channel}: there is no pixel {_shown(pixel)}")
                xy[channel] = pixels[pixel]
    version = _VERSION.search(Path(name).name)
    chips: dict[str, tuple[int | None, str]] = {chip: (None, chip) for chip in coordinates}
    return PixelLayout(name, file, version and version[0], None, coordinates, {None: TilePlacement()}, chips)


def _tiles(content: dict[Any, Any], name: str, file: str) -> PixelLayout:
    (pitch,) = _numbers([content.get("pixel_pitch")], 1, "pixel_pitch")
    tiles: dict[int | None, TilePlacement] = {}
    chips: dict[str, tuple[int | None, str]] = {}
    coordinates = _tile_coordinates(content, pitch)
    for tile, tile_chips in _items(content, "tile_chip_to_io", dict):
        if not isinstance(tile, int) or not isinstance(tile_chips, dict):
            raise FormatError(f"tile_chip_to_io {_shown(tile)}: expected {{chip: io}}, found {_shown(tile_chips)}")
        tiles[tile] = _tile(content, tile)
        for chip, io in tile_chips.items():
            chip_id = _chip(chip)
            if not isinstance(io, int) or not 0 <= io < 256_000 or io % 1000 > 255:
                raise FormatError(
                    f"tile {tile}, chip {chip_id}: expected 1000 io_group + io_channel, found {_shown(io)}"
                )
            key = key_of((io // 1000, io % 1000, chip_id))
            if key in chips:
                raise FormatError(f"chip {key} is on tile {chips[key][0]} and on tile {tile}")
            if chip_id in coordinates:
                chips[key] = tile, chip_id
    version = content.get("multitile_layout_version")
    return PixelLayout(name, file, None if version is None else str(version)[:100], pitch, coordinates, tiles, chips)


def _tile_coordinates(content: dict[Any, Any], pitch: float) -> dict[str, NDArray[np.float64]]:
    """Return the positions on a tile with its centre at 0."""
    positions: dict[str, dict[int, tuple[float, ...]]] = {}
    for key, xy in _items(content, "chip_channel_to_position", dict):
        if not isinstance(key, int) or not 0 <= key < 256_000 or key % 1000 >= _CHANNELS:
            raise FormatError(f"chip_channel_to_position: expected 1000 * chip_id + channel_id, found {_shown(key)}")
        positions.setdefault(str(key // 1000), {})[key % 1000] = _numbers(xy, 2, f"chip_channel_to_position {key}")
    all_pixels = np.array([xy for channels in positions.values() for xy in channels.values()]).reshape(-1, 2)
    width = (all_pixels.max(axis=0) - all_pixels.min(axis=0)) * pitch if len(all_pixels) else np.zeros(2)
    coordinates = {}
    for chip, channels in positions.items():
        coordinates[chip] = np.full((max(channels) + 1, 2), np.nan)
        coordinates[chip][list(channels)] = np.array(list(channels.values())) * pitch - width / 2
    return coordinates


def _tile(content: dict[Any, Any], tile: int) -> TilePlacement:
    position = _entry(content, "tile_positions", tile)
    orientation = _entry(content, "tile_orientations", tile)
    if orientation is None and isinstance(position, list) and len(position) == 2:  # both in one, as in the oldest files
        position, orientation = position
    z, y, x = _numbers(position, 3, f"tile_positions of tile {tile}")
    _, orientation_y, orientation_x = _numbers(orientation, 3, f"tile_orientations of tile {tile}")
    indices = _entry(content, "tile_indeces", tile)
    anode = indices[-2] if isinstance(indices, list) and len(indices) >= 2 else None  # [module,] anode, tile
    centre = _entry(content, "tpc_centers", anode) if isinstance(anode, int) else None
    if centre is not None:
        x, y, z = (sum(both) for both in zip((x, y, z), _numbers(centre, 3, f"tpc_centers {anode}"), strict=True))
    return TilePlacement((x, y, z), (orientation_x, orientation_y))


def _on_detector(tile: TilePlacement, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    return coordinates * tile.orientation + tile.position[:2]


def _items(content: dict[Any, Any], name: str, kind: type[Any]) -> Iterator[Any]:
    value = content.get(name)
    if not isinstance(value, kind):
        raise FormatError(f"{name}: expected a {'mapping' if kind is dict else 'list'}, found {_shown(value)}")
    return iter(value.items() if kind is dict else value)


def _entry(content: dict[Any, Any], name: str, key: int) -> Any:
    """Return the entry of a table in the file; None without the table or the entry."""
    table = content.get(name)
    return table.get(key) if isinstance(table, dict) else None


def _numbers(values: Any, count: int, what: str) -> tuple[float, ...]:
    if isinstance(values, list) and len(values) == count:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:  # nor NaN
                raise FormatError(f"{what}: expected a number, found {_shown(value)}")
        return tuple(float(value) for value in values)
    raise FormatError(f"{what}: expected {count} numbers, found {_shown(values)}")


def _chip(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
        raise FormatError(f"chip: expected a chip_id from 0 to 255, found {_shown(value)}")
    return str(value)


def _key(value: str) -> str:
    try:
        return key_of(parse_key(value))
    except RequestError as error:
        raise FormatError(str(error)) from None


def _shown(value: Any) -> str:
    """Return a short text of a value for an error. (Lists that contain each other would print without end.)"""
    if isinstance(value, list | dict | set | tuple):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.60}"
