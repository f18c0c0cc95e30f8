"""Pixel layouts, YAML files as larpix-geometry and the detectors' simulations have them: where channels of chips are.

There are two forms. A board has `pixels`, [id, x, y, ...] in mm, and `chips`, [chip, [pixel id or null of each
channel]], each chip by its chip_id or its key. Of tiles, which are all alike, `chip_channel_to_position` has [x, y] in
pixel pitches by 1000 * chip_id + channel_id; `tile_chip_to_io` says which chips a tile has, each with 1000 * io_group +
io_channel, `tile_positions` and `tile_orientations` (drift, y, x) where a tile's middle is and how it is turned,
`tpc_centers` (x, y, drift) where the anodes of `tile_indeces` are. Places are worked out as larnd-sim and module0_flow
do it.
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

#: A larger file is not read (one that tells of 39,200 pixels one by one has 3 MB).
_MOST_BYTES: Final = 16 << 20
#: A chip has no more channels.
_CHANNELS: Final = 256
_VERSION: Final = re.compile(r"\d+\.\d+\.\d+")


class TilePlacement(NamedTuple):
    """Where its middle is (x, y, and z along the drift, mm), and by what x and y as seen on it are multiplied."""

    position: tuple[float, ...] = (0.0, 0.0, 0.0)
    turned: tuple[float, ...] = (1.0, 1.0)


class PixelLayout(NamedTuple):
    """`places`: by chip_id on a tile, or by chip of a board, x and y in mm, shape (channels, 2), NaN without a pixel.
    `chips`: by key, or by chip_id where the file says no more, the tile of a chip and its name in `places`."""

    name: str
    file: str
    version: str | None
    pitch: float | None  # mm
    places: dict[str, NDArray[np.float64]]
    tiles: dict[int | None, TilePlacement]
    chips: dict[str, tuple[int | None, str]]

    def summary(self) -> dict[str, Any]:
        """name, file, version, pitch (mm), pixels, chips, tiles (how many), x and y ([from, to], mm)."""
        pixels = {place: int(np.isfinite(at[:, 0]).sum()) for place, at in self.places.items()}
        every = np.concatenate([np.zeros((0, 2)), *self.places.values()])
        every = every[np.isfinite(every[:, 0])]
        ends = [end(_on(tile, every), axis=0) for tile in self.tiles.values() for end in (np.min, np.max) if len(every)]
        box = [[round(float(end([one[i] for one in ends])), 4) for end in (np.min, np.max) if ends] for i in (0, 1)]
        return {
            "name": self.name,
            "file": self.file,
            "version": self.version,
            "pitch": self.pitch,
            "pixels": sum(pixels[place] for _, place in self.chips.values()),
            "chips": len(self.chips),
            "tiles": len(self.tiles),
            "x": box[0],
            "y": box[1],
        }

    def find(self, chip: Any) -> str:
        """The name that a chip has here, asked for by key or chip_id; RequestError when it is not in the layout."""
        names = [str(chip)]
        if names[0] not in self.chips and not names[0].isdecimal():
            key = parse_key(chip)
            names = [key_of(key), str(key[2])]
        for name in names:
            if name in self.chips:
                return name
        raise RequestError(f"chip {names[0]}: not among the {len(self.chips)} chips of pixel layout {self.name}")

    def channels(self, chip: str) -> int:
        return len(self.places[self.chips[chip][1]])

    def positions(self, chip: Any) -> NDArray[np.float64]:
        """x and y of a chip's channels in mm, shape (channels, 2), NaN without a pixel; RequestError as find()."""
        tile, place = self.chips[self.find(chip)]
        return _on(self.tiles[tile], self.places[place])

    def described(self, chip: str) -> dict[str, Any]:
        """x, y (mm, by channel_id, None without a pixel), z (mm, along the drift) and tile of a chip."""
        tile = self.chips[chip][0]
        x, y = (
            [None if math.isnan(value) else round(value, 4) for value in axis]
            for axis in self.positions(chip).T.tolist()
        )
        return {"x": x, "y": y, "z": self.tiles[tile].position[2], "tile": tile}


class LoadedLayout:
    """The pixel layout that was loaded last. A new child reads its file again when the layout is needed first."""

    def __init__(self, name: str) -> None:
        """`name`: path or name of its file; "" before the first was loaded."""
        self.name = name
        self._layout: PixelLayout | None = None

    def get(self) -> PixelLayout:
        """The layout; RequestError when none was loaded."""
        if self._layout is None:
            if not self.name:
                raise RequestError("no pixel layout is known yet: load_pixel_layout(name) loads one")
            self._layout = read(self.name)
        return self._layout

    def load(self, name: str) -> PixelLayout:
        """Read a layout and keep it; RequestError, and the one before is kept, when there is none."""
        self._layout = read(name)
        self.name = name
        return self._layout


def read(name: str) -> PixelLayout:
    """The layout in a file, a path or the name of one that larpix-geometry brings; RequestError when there is none."""
    path = _find(name)
    try:
        return parse(_content(path), name, str(path.absolute()))
    except FormatError as error:
        raise RequestError(f"pixel layout {path}: {error}") from None


def parse(content: Any, name: str, file: str) -> PixelLayout:
    """The layout that the content of a YAML file describes; FormatError in one line when it is none."""
    if not isinstance(content, dict):
        raise FormatError(f"expected a mapping, found {_shown(content)}")
    if "chip_channel_to_position" in content:
        return _tiles(content, name, file)
    if "pixels" in content:
        return _board(content, name, file)
    there = ", ".join(_shown(key) for key in list(content)[:10]) or "none"
    raise FormatError(f"expected pixels and chips, or chip_channel_to_position and tile_chip_to_io, found {there}")


def _find(name: str) -> Path:
    try:
        path = Path(name)
        if path.is_file():
            return path
        spec = find_spec("larpixgeometry")
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (shipped := Path(folder) / "layouts" / name).is_file():
                return shipped
    except (OSError, ValueError) as error:  # no name of a file
        raise RequestError(f"pixel layout {name!r:.100}: {cause(error)}") from None
    brought = "in larpix-geometry" if spec is not None else "larpix-geometry installed"
    raise RequestError(f"pixel layout {name!r:.100}: no such file here, nor {brought}")


def _content(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise RequestError("pixel layouts need PyYAML: pip install larpix-daq[geometry]") from None

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Without merge keys (<<), which double what is there each time that one merges another."""

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
    except Exception as error:  # a constructor of YAML's may raise anything
        raise FormatError(f"not YAML: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


def _board(content: dict[Any, Any], name: str, file: str) -> PixelLayout:
    pixels: dict[Any, tuple[float, float]] = {}
    for entry in _items(content, "pixels", list):
        match entry:
            case [int() | str() as pixel, x, y, *_]:
                pixels[pixel] = _numbers([x, y], 2, f"pixel {_shown(pixel)}")  # type: ignore[assignment]
            case _:
                raise FormatError(f"pixels: expected [id, x, y, ...], found {_shown(entry)}")
    places: dict[str, NDArray[np.float64]] = {}
    for entry in _items(content, "chips", list):
        match entry:
            case [int() | str() as chip, list(connected)] if len(connected) <= _CHANNELS:
                known = _chip(chip) if isinstance(chip, int) else _key(chip)
            case _:
                raise FormatError(f"chips: expected [chip, [pixel ids, {_CHANNELS} at most]], found {_shown(entry)}")
        if known in places:
            raise FormatError(f"chips: chip {known} comes twice")
        places[known] = at = np.full((len(connected), 2), np.nan)
        for channel, pixel in enumerate(connected):
            if pixel is not None:
                if not isinstance(pixel, int | str) or pixel not in pixels:
                    raise FormatError(f"chip {known}, channel {channel}: there is no pixel {_shown(pixel)}")
                at[channel] = pixels[pixel]
    version = _VERSION.search(Path(name).name)
    chips: dict[str, tuple[int | None, str]] = {chip: (None, chip) for chip in places}
    return PixelLayout(name, file, version and version[0], None, places, {None: TilePlacement()}, chips)


def _tiles(content: dict[Any, Any], name: str, file: str) -> PixelLayout:
    (pitch,) = _numbers([content.get("pixel_pitch")], 1, "pixel_pitch")
    tiles: dict[int | None, TilePlacement] = {}
    chips: dict[str, tuple[int | None, str]] = {}
    places = _places(content, pitch)
    for tile, there in _items(content, "tile_chip_to_io", dict):
        if not isinstance(tile, int) or not isinstance(there, dict):
            raise FormatError(f"tile_chip_to_io {_shown(tile)}: expected {{chip: io}}, found {_shown(there)}")
        tiles[tile] = _tile(content, tile)
        for chip, io in there.items():
            place = _chip(chip)
            if not isinstance(io, int) or not 0 <= io < 256_000 or io % 1000 > 255:
                raise FormatError(f"tile {tile}, chip {place}: expected 1000 io_group + io_channel, found {_shown(io)}")
            key = key_of((io // 1000, io % 1000, place))
            if key in chips:
                raise FormatError(f"chip {key} is on tile {chips[key][0]} and on tile {tile}")
            if place in places:
                chips[key] = tile, place
    version = content.get("multitile_layout_version")
    return PixelLayout(name, file, None if version is None else str(version)[:100], pitch, places, tiles, chips)


def _places(content: dict[Any, Any], pitch: float) -> dict[str, NDArray[np.float64]]:
    """Those of one tile, its middle at 0."""
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    for key, at in _items(content, "chip_channel_to_position", dict):
        if not isinstance(key, int) or not 0 <= key < 256_000 or key % 1000 >= _CHANNELS:
            raise FormatError(f"chip_channel_to_position: expected 1000 * chip_id + channel_id, found {_shown(key)}")
        found.setdefault(str(key // 1000), {})[key % 1000] = _numbers(at, 2, f"chip_channel_to_position {key}")
    every = np.array([at for channels in found.values() for at in channels.values()]).reshape(-1, 2)
    width = (every.max(axis=0) - every.min(axis=0)) * pitch if len(every) else np.zeros(2)
    places = {}
    for chip, channels in found.items():
        places[chip] = np.full((max(channels) + 1, 2), np.nan)
        places[chip][list(channels)] = np.array(list(channels.values())) * pitch - width / 2
    return places


def _tile(content: dict[Any, Any], tile: int) -> TilePlacement:
    at = _of(content, "tile_positions", tile)
    turned = _of(content, "tile_orientations", tile)
    if turned is None and isinstance(at, list) and len(at) == 2:  # both in one, as in the first of these files
        at, turned = at
    z, y, x = _numbers(at, 3, f"tile_positions of tile {tile}")
    _, turned_y, turned_x = _numbers(turned, 3, f"tile_orientations of tile {tile}")
    indices = _of(content, "tile_indeces", tile)
    anode = indices[-2] if isinstance(indices, list) and len(indices) >= 2 else None  # [module,] anode, tile
    centre = _of(content, "tpc_centers", anode) if isinstance(anode, int) else None
    if centre is not None:
        x, y, z = (sum(both) for both in zip((x, y, z), _numbers(centre, 3, f"tpc_centers {anode}"), strict=True))
    return TilePlacement((x, y, z), (turned_x, turned_y))


def _on(tile: TilePlacement, places: NDArray[np.float64]) -> NDArray[np.float64]:
    return places * tile.turned + tile.position[:2]


def _items(content: dict[Any, Any], name: str, kind: type[Any]) -> Iterator[Any]:
    found = content.get(name)
    if not isinstance(found, kind):
        raise FormatError(f"{name}: expected a {'mapping' if kind is dict else 'list'}, found {_shown(found)}")
    return iter(found.items() if kind is dict else found)


def _of(content: dict[Any, Any], name: str, key: int) -> Any:
    """What stands there in a table of the file; None when neither is there."""
    table = content.get(name)
    return table.get(key) if isinstance(table, dict) else None


def _numbers(found: Any, count: int, what: str) -> tuple[float, ...]:
    if isinstance(found, list) and len(found) == count:
        for value in found:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:  # nor NaN
                raise FormatError(f"{what}: expected a number, found {_shown(value)}")
        return tuple(float(value) for value in found)
    raise FormatError(f"{what}: expected {count} numbers, found {_shown(found)}")


def _chip(found: Any) -> str:
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= 255:
        raise FormatError(f"chip: expected a chip_id from 0 to 255, found {_shown(found)}")
    return str(found)


def _key(found: str) -> str:
    try:
        return key_of(parse_key(found))
    except RequestError as error:
        raise FormatError(str(error)) from None


def _shown(value: Any) -> str:
    """A value in an error: short, whatever it is (lists that hold each other print without end)."""
    if isinstance(value, list | dict | set | tuple):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.60}"
