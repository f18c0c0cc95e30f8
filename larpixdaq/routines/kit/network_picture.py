"""Results of discover_network as pictures of tiles: characters in a terminal, SVG in a notebook, a page or a report.

A result of another form raises one of WRONG_FORM.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any, Final, NamedTuple

from larpixdaq.errors import printable

WRONG_FORM: Final = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
#: Maximum tiles that are drawn, those with the most faults, and maximum lines of faults.
_DRAWN: Final = 4
_DRAWN_HTML: Final = 16
_FAULTS: Final = 20
_LEGEND: Final = (
    "1 to 4: io_channel of the tile that leads to the chip; =: root; .: no answer; x at a chip: not used; - |: link in "
    "use; x: broken; < > ^ v: works only in this direction; !: changes or loses words"
)
#: Colours of the io_channels of a tile, of missing chips, and of broken links.
_COLOURS: Final = ("#3b528b", "#21908c", "#5ec962", "#e0a100")
_MISSING: Final = "#d9d9d9"
_BROKEN: Final = "#cc2222"
_PITCH: Final = 24


class _Link(NamedTuple):
    """A link to draw, from the left or upper chip `first`."""

    first: int
    second: int
    kind: str  # "used", "broken", "bad", "forward", "back"


class _Tile:
    """A tile of the result; KeyError, TypeError or ValueError for another form."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.title = f"io_group {int(facts['io_group'])} tile {int(facts['tile'])}"
        self.rows, self.columns = int(facts["rows"]), int(facts["columns"])
        if not 0 < self.rows * self.columns <= 256:
            raise ValueError(f"{self.rows} rows, {self.columns} columns")
        self.first_id, self.row_step = int(facts["first_id"]), int(facts["row_step"])
        self.channel = {int(chip): int(io_channel) for chip, io_channel, _ in facts["network"]}
        self.parents = {int(chip): int(parent) for chip, _, parent in facts["network"]}
        self.excluded = {int(chip) for chip in facts["excluded"]}
        self.faults = int(facts["faults"])
        self.links: dict[tuple[int, int], str] = {}
        for chip, parent in self.parents.items():
            self._set(chip, parent, "used")
        for a, b in facts["broken"]:
            self._set(int(a), int(b), "broken")
        for a, b in facts["one_way"]:
            self._set(int(a), int(b), "forward" if a < b else "back")
        for a, b in facts["bad_links"]:
            self._set(int(a), int(b), "bad")

    def _set(self, a: int, b: int, kind: str) -> None:
        self.links[min(a, b), max(a, b)] = kind

    def id(self, row: int, column: int) -> int:
        return self.first_id + row * self.row_step + column

    def link(self, a: int, b: int) -> str:
        return self.links.get((a, b), "")

    def summary(self) -> str:
        channels = ", ".join(
            f"io_channel {channel}: {list(self.channel.values()).count(channel)}"
            for channel in sorted(set(self.channel.values()))
        )
        return (
            f"{self.title}: {len(self.channel)} of {self.rows * self.columns} chips ({channels or 'no root answers'})"
        )

    def character(self, chip: int) -> str:
        if chip in self.channel:
            return str((self.channel[chip] - 1) % 4 + 1)
        return "x" if chip in self.excluded else "."

    def picture(self) -> Iterator[str]:
        """Yield the lines of the tile, one for a row of chips, and one for the links below it."""
        across = {"used": "-", "broken": "x", "bad": "!", "forward": ">", "back": "<"}
        down = {"used": "|", "broken": "x", "bad": "!", "forward": "v", "back": "^"}
        for row in range(self.rows):
            line, below = f"{self.id(row, 0):>5} ", " " * 7
            for column in range(self.columns):
                chip = self.id(row, column)
                if column == 0:
                    line += "=" if self.parents.get(chip) == 0 else " "
                line += self.character(chip)
                if column + 1 < self.columns:
                    line += across.get(self.link(chip, self.id(row, column + 1)), " ")
                below += down.get(self.link(chip, self.id(row + 1, column)), " ") + " "
            yield line
            if row + 1 < self.rows:
                yield below.rstrip()

    def svg(self) -> str:
        """Return the tile as SVG."""
        parts = []
        for (a, b), kind in sorted(self.links.items()):
            if a <= 0:
                x, y = self._place(b)
                colour = _BROKEN if kind == "bad" else "currentColor"
                parts.append(f"<path d='M{x - 18} {y}H{x}' stroke='{colour}' stroke-width='3'/>")
                continue
            (x1, y1), (x2, y2) = self._place(a), self._place(b)
            colour = "currentColor" if kind == "used" else _BROKEN
            dashes = "" if kind == "used" else " stroke-dasharray='3 2'"
            parts.append(f"<path d='M{x1} {y1}L{x2} {y2}' stroke='{colour}' stroke-width='2'{dashes}/>")
            if kind in ("forward", "back"):  # a dot at the end that hears
                near = 0.75 if kind == "forward" else 0.25
                at = x1 + near * (x2 - x1), y1 + near * (y2 - y1)
                parts.append(f"<circle cx='{at[0]:.1f}' cy='{at[1]:.1f}' r='3' fill='{_BROKEN}'/>")
        for row in range(self.rows):
            for column in range(self.columns):
                chip = self.id(row, column)
                x, y = self._place(chip)
                colour = _COLOURS[(self.channel[chip] - 1) % 4] if chip in self.channel else _MISSING
                ink = "white" if colour == _COLOURS[0] else "black"
                edge = _BROKEN if chip in self.excluded else "none"
                parts.append(
                    f"<circle cx='{x}' cy='{y}' r='8' fill='{colour}' stroke='{edge}' stroke-width='2'>"
                    f"<title>{chip}</title></circle>"
                    f"<text x='{x}' y='{y + 2.5}' font-size='7' text-anchor='middle' fill='{ink}'>{chip}</text>"
                )
        width, height = _PITCH * self.columns + 20, _PITCH * self.rows + 4
        start = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' role='img'>"
        return f"{start}{''.join(parts)}</svg>"

    def _place(self, chip: int) -> tuple[int, int]:
        row, column = divmod(chip - self.first_id, self.row_step)
        return 20 + _PITCH * column + 8, _PITCH * row + 12


def _head(value: Any) -> list[str]:
    faults = value["faults"]
    lines = [
        f"{value['chips']} chips found on {len(value['tiles'])} tiles, {value['missing']} positions without a chip, "
        f"{len(faults)} faults, {value['seconds']} s",
        f"board file {value['file']}, which is loaded; chips: {value['state']}",
        *map(str, faults[:_FAULTS]),
    ]
    if len(faults) > _FAULTS:
        lines.append(f"… {len(faults) - _FAULTS} more faults …")
    return [printable(line) for line in lines]


def _tiles(value: Any, maximum: int) -> tuple[list[_Tile], list[_Tile]]:
    """Return the tiles to draw, and those that are only named."""
    tiles = [_Tile(facts) for facts in value["tiles"]]
    drawn = sorted(tiles, key=lambda tile: -tile.faults)[:maximum]
    return [tile for tile in tiles if tile in drawn], [tile for tile in tiles if tile not in drawn]


def text(value: Any) -> str:
    drawn, named = _tiles(value, _DRAWN)
    lines = _head(value)
    for tile in drawn:
        lines += ["", tile.summary(), *tile.picture()]
    lines += ["", _LEGEND]
    return "\n".join([*lines, *(tile.summary() for tile in named)])


def html(value: Any) -> str:
    drawn, named = _tiles(value, _DRAWN_HTML)
    parts = [f"<pre>{escape(chr(10).join(_head(value)))}</pre>"]
    for tile in drawn:
        parts.append(
            f"<div style='display:inline-block;margin:8px'><div>{escape(tile.summary())}</div>{tile.svg()}</div>"
        )
    parts.append(
        "<div>Colour: io_channel; grey: no answer; red edge: not used; red line: broken, or with a dot at the end that "
        "hears: works only in this direction</div>"
    )
    return "".join([*parts, *(f"<div>{escape(tile.summary())}</div>" for tile in named)])


def page(value: Any) -> str:
    """Return an HTML page with the picture, which needs no other file."""
    title = escape(printable(f"{value['chips']} chips on {len(value['tiles'])} tiles"))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        "<style>pre{white-space:pre-wrap}</style></head>"
        f"<body style='font:15px sans-serif;margin:2em'>{html(value)}</body></html>\n"
    )
