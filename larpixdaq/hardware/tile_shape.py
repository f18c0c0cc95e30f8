"""Shapes of tiles: the positions of chips, their ids, the UARTs between neighbours, and the roots.

Chips stand in rows. Ids grow from left to right, and by `row_step` from a row to the next. Directions are numbers: up
0, left 1, down 2, right 3, as the entries of larpix-control's `miso_uart_map`.
"""

from __future__ import annotations

import difflib
from typing import Any, Final, NamedTuple

from larpixdaq.errors import RequestError

OPPOSITE: Final = (2, 3, 0, 1)
_LEFT: Final = 1
_STEPS: Final = ((-1, 0), (0, -1), (1, 0), (0, 1))
#: io_channels of a tile.
CHANNELS: Final = 4
#: The id of chips at power-up, and the first and last id that a chip can get.
_FIRST, _LAST = 2, 254


class TileShape(NamedTuple):
    """`roots`: ids of the chips that are wired to the io_channels of the tile, in order, with their outer side.

    `send` and `receive`: the UART that sends to the neighbour, and that receives from it, by direction.
    """

    rows: int
    columns: int
    roots: tuple[int, ...]
    first_id: int = 11
    row_step: int = 10
    send: tuple[int, ...] = (3, 0, 1, 2)
    receive: tuple[int, ...] = (0, 1, 2, 3)

    def ids(self) -> list[int]:
        """Return the ids of all positions, row by row."""
        return [
            self.first_id + row * self.row_step + column for row in range(self.rows) for column in range(self.columns)
        ]

    def position(self, chip_id: int) -> tuple[int, int]:
        """Return row and column of a chip, from 0."""
        return divmod(chip_id - self.first_id, self.row_step)

    def neighbour(self, chip_id: int, direction: int) -> int:
        """Return the id of the neighbour in this direction, 0 if there is none."""
        row, column = self.position(chip_id)
        row, column = row + _STEPS[direction][0], column + _STEPS[direction][1]
        inside = 0 <= row < self.rows and 0 <= column < self.columns
        return self.first_id + row * self.row_step + column if inside else 0

    def outsides(self, chip_id: int) -> list[int]:
        """Return the directions without a neighbour, left first."""
        return sorted((side for side in range(4) if not self.neighbour(chip_id, side)), key=lambda side: side != _LEFT)


#: Roots of the tiles of 100 chips, by value of --asic: those of the boards that public programs configure.
_ROOTS: Final = {"2b": (21, 41, 71, 91), "2d": (21, 41, 71, 91), "3": (11, 21, 31, 41)}
_ROOTS_OF_V2: Final = (11, 41, 71, 101)
#: `send` and `receive` of the tile of 160 chips, which is wired as a mirror image of the others.
_MIRRORED: Final = (3, 2, 1, 0), (0, 3, 2, 1)


def tile_shape(requested: Any, asic: str) -> TileShape:
    """Return a shape by name (None: 10x10), or from a dictionary with the fields of TileShape. Raises RequestError."""
    names = {
        "10x10": TileShape(10, 10, _ROOTS.get(asic, _ROOTS_OF_V2)),
        "10x16": TileShape(16, 10, (21, 61, 101, 151), 11, 10, *_MIRRORED),
        "5x5": TileShape(5, 5, (11, 21, 31, 41)),
    }
    if requested is None:
        return names["10x10"]
    if isinstance(requested, str):
        if requested not in names:
            raise RequestError(f"shape: expected {', '.join(names)} or a dictionary, found {requested!r:.100}")
        return names[requested]
    if not isinstance(requested, dict):
        raise RequestError(f"shape: expected a name or a dictionary, found {requested!r:.100}")
    fields = dict(requested)
    for name in fields:
        if name not in TileShape._fields:
            close = difflib.get_close_matches(str(name), TileShape._fields, 1)
            raise RequestError(f"shape: no field {name!r:.100}{f'; close to it: {close[0]}' if close else ''}")
    for name in ("rows", "columns", "roots"):
        if name not in fields:
            raise RequestError(f"shape: expected rows, columns and roots, found no {name}")
    for name, value in fields.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise RequestError(f"shape: {name}: expected whole numbers, found {value!r:.100}")
        if isinstance(value, list | tuple) != (name in ("roots", "send", "receive")):
            expected = "a list" if name in ("roots", "send", "receive") else "a number"
            raise RequestError(f"shape: {name}: expected {expected}, found {value!r:.100}")
        fields[name] = tuple(value) if isinstance(value, list | tuple) else value
    shape = TileShape(**({"row_step": fields["columns"]} | fields))
    _check(shape)
    return shape


def _check(shape: TileShape) -> None:
    if shape.rows < 1 or shape.columns < 1 or shape.row_step < shape.columns:
        raise RequestError(
            f"shape: expected at least one row and column, and a row_step of at least the columns, found {shape.rows} "
            f"rows, {shape.columns} columns, row_step {shape.row_step}"
        )
    last = shape.first_id + (shape.rows - 1) * shape.row_step + shape.columns - 1
    if shape.first_id < _FIRST or last > _LAST:
        raise RequestError(f"shape: expected ids from {_FIRST} to {_LAST}, found {shape.first_id} to {last}")
    for name, uarts in (("send", shape.send), ("receive", shape.receive)):
        if sorted(uarts) != [0, 1, 2, 3]:
            raise RequestError(f"shape: {name}: expected the UARTs 0 to 3 in some order, found {list(uarts)}")
    ids = set(shape.ids())
    if not 1 <= len(shape.roots) <= CHANNELS or len(set(shape.roots)) != len(shape.roots):
        raise RequestError(f"shape: roots: expected 1 to {CHANNELS} different chips, found {list(shape.roots)}")
    for root in shape.roots:
        if root not in ids or not shape.outsides(root):
            raise RequestError(f"shape: roots: expected chips at the edge of the tile, found {root}")
