"""Results in IPython: as text in a terminal, and as HTML in a notebook. All texts in them are escaped.

A result is shown by readable() or as an HTML table, except those of actions that have a View: histograms and maps. The
HTML has no script, and its pictures are inline SVG or PNG. A result that does not have the form that its View expects
is shown like any other, because a component of another version may have sent it.
"""

from __future__ import annotations

import base64
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from html import escape
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.control.display import cell, is_table, readable, shown_rows
from larpixdaq.errors import printable
from larpixdaq.routines.kit import network_picture

#: Lines of a histogram, and characters of its longest bar.
_LINES: Final = 24
_BAR: Final = 50
_BLOCKS: Final = " ▏▎▍▌▋▊▉█"
#: Characters of a map, from the lowest to the highest value, and those of a line.
_SHADES: Final = ".:-=+*#%@"
_MAP_LINE: Final = 64
_MAP_LINES: Final = 40
#: Colours of a map, in equal steps from the lowest value to the highest, and that of 0.
_COLOURS: Final = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_NONE: Final = (217, 217, 217)
_LEFT: Final = "text-align:left;padding:1px 8px"
_RIGHT: Final = "text-align:right;padding:1px 8px"


class View(NamedTuple):
    """How a result is shown: as text, and as HTML."""

    text: Callable[[Any], str]
    html: Callable[[Any], str]


def view_of(action: str, words: Callable[[Any], str] | None) -> View:
    """Return the view of an action's result. `words`: what makes its text, in place of readable()."""
    if words is not None:
        return View(words, lambda value: _preformatted(words(value)))
    return _VIEWS.get(action, GENERAL)


def html(value: Any) -> str:
    """Convert a result to HTML: tables, and texts as they are."""
    if is_table(value) and len(value):
        return _html_table(value)
    if not isinstance(value, dict) or not value:
        return _preformatted(readable(value))
    tables = {name: part for name, part in value.items() if is_table(part) and len(part)}
    lines = [
        f"<tr><th style='{_LEFT}'>{_escaped(name)}</th>"
        f"<td style='{_LEFT}'><pre style='margin:0'>{_escaped(_fact(name, part))}</pre></td></tr>"
        for name, part in value.items()
        if name not in tables
    ]
    parts = [f"<table>{''.join(lines)}</table>"] if lines else []
    for name, table in tables.items():
        parts.append(f"<div><b>{_escaped(name)}</b> ({len(table)})</div>{_html_table(table)}")
    return "".join(parts)


def _fact(name: Any, value: Any) -> str:
    return readable(value) if isinstance(value, dict | list) and value else cell(str(name), value)


def _escaped(text: Any) -> str:
    return escape("\n".join(map(printable, str(text).split("\n"))))


def _preformatted(text: str) -> str:
    return f"<pre>{_escaped(text)}</pre>"


def _html_table(rows: Any) -> str:
    columns, shown, left_out = shown_rows(rows)
    heads = "".join(f"<th style='{_RIGHT}'>{_escaped(name)}</th>" for name in columns)
    lines = [f"<tr>{heads}</tr>"]
    for index, row in enumerate(shown):
        if left_out and index == len(shown) // 2:
            lines.append(f"<tr><td colspan='{len(columns)}'>… {left_out} more …</td></tr>")
        cells = (f"<td style='{_RIGHT}'>{_escaped(cell(name, row[name]))}</td>" for name in columns)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


# Histograms of ADC values


class _Histogram(NamedTuple):
    title: str
    counts: NDArray[np.uint64]  # by ADC value


def _histogram(value: Any) -> _Histogram:
    """Read a result of adc_histogram()."""
    counts = np.asarray(value["counts"]).astype(np.uint64)
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"counts of shape {counts.shape}")
    selection = [
        f"{name} {value[name]}" for name in ("io_group", "io_channel", "chip", "channel") if value[name] is not None
    ]
    parts = [f"run {value['run']}" if value["run"] is not None else "no run", ", ".join(selection) or "all channels"]
    parts.append(f"{value['entries']} data packets")
    if value["mean"] is not None:
        parts.append(f"mean {value['mean']:.2f}, standard deviation {value['std']:.2f} ADC counts")
    if value["seen"] < 1:
        parts.append(f"{value['seen']:.1%} of the rows were seen")
    if value.get("merged_channels"):
        parts.append(f"{value['merged_channels']} channels are missing: they share a histogram with others")
    return _Histogram("; ".join(map(str, parts)), counts)


def _range(counts: NDArray[np.uint64]) -> tuple[int, int]:
    """Return the first ADC value with entries, and the one after the last."""
    filled = np.flatnonzero(counts)
    return (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)


def _histogram_text(value: Any) -> str:
    histogram = _histogram(value)
    low, high = _range(histogram.counts)
    if low == high:
        return f"{histogram.title}"
    width = -(-(high - low) // _LINES)
    starts = np.arange(low, high, width)
    sums = np.add.reduceat(histogram.counts[:high], starts)
    names = [str(start) if width == 1 else f"{start}-{min(start + width, high) - 1}" for start in starts.tolist()]
    numbers = [str(number) for number in sums.tolist()]
    left, right = max(map(len, [*names, "ADC"])), max(map(len, [*numbers, "packets"]))
    lines = [histogram.title, f"{'ADC':>{left}}  {'packets':>{right}}"]
    lines += [
        f"{name:>{left}}  {number:>{right}}  {_bar(count / int(np.max(sums)))}".rstrip()
        for name, number, count in zip(names, numbers, sums.tolist(), strict=True)
    ]
    return "\n".join(lines)


def _bar(fraction: float) -> str:
    """Return a bar of at most _BAR characters, in eighths where the terminal has them; never none for more than 0."""
    eighths = max(round(8 * _BAR * fraction), 1 if fraction > 0 else 0)
    if not (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf"):
        return "#" * -(-eighths // 8)
    return _BLOCKS[8] * (eighths // 8) + _BLOCKS[eighths % 8].strip()


def _histogram_html(value: Any) -> str:
    histogram = _histogram(value)
    low, high = _range(histogram.counts)
    title = f"<div>{_escaped(histogram.title)}</div>"
    if low == high:
        return title
    counts = histogram.counts[low:high].astype(np.float64)
    top, left, width, height = 8, 60, 560, 150
    x = left + width * np.arange(len(counts) + 1) / len(counts)
    y = top + height * (1 - counts / np.max(counts))
    corners = np.column_stack([x[:-1], y, x[1:], y]).reshape(-1, 2)
    outline = " ".join(
        f"{a:.1f},{b:.1f}" for a, b in [(left, top + height), *corners.tolist(), (left + width, top + height)]
    )
    labels = [(x, "middle", top + height + 16, str(text)) for x, text in _ticks(low, high, left, width)]
    labels += [
        (left - 4, "end", top + 10, str(int(np.max(counts)))),
        (left - 4, "end", top + height, "0"),
        (left + width / 2, "middle", top + height + 34, "ADC value [ADC counts]; data packets upwards"),
    ]
    texts = "".join(
        f"<text x='{x:.1f}' y='{y}' text-anchor='{anchor}' font-size='12' fill='currentColor'>{_escaped(text)}</text>"
        for x, anchor, y, text in labels
    )
    return (
        f"{title}<svg xmlns='http://www.w3.org/2000/svg' width='640' height='200' role='img'>"
        f"<polygon points='{outline}' fill='#3b528b'/>"
        f"<path d='M{left} {top}V{top + height}H{left + width}' fill='none' stroke='currentColor'/>{texts}</svg>"
    )


def _ticks(low: int, high: int, left: int, width: int) -> Iterator[tuple[float, int]]:
    """Yield place and value of at most ten round ADC values."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200) if (high - low) / step <= 10)
    for value in range(-(-low // step) * step, high, step):
        yield left + width * (value + 0.5 - low) / (high - low), value


# Maps of pixels


class _Map(NamedTuple):
    title: str
    values: NDArray[np.uint8]  # codes by [chip, channel]; 0: none
    groups: NDArray[np.intp]  # io_group of each chip


def _map(value: Any) -> _Map:
    """Read a result of pixel_map()."""
    values, chips, scale = np.asarray(value["values"], np.uint8), np.asarray(value["chips"]), value["scale"]
    if values.ndim != 2 or len(values) != len(chips):
        raise ValueError(f"{len(chips)} chips, values of shape {values.shape}")
    order = np.lexsort((chips["chip_id"], chips["io_channel"], chips["io_group"]))
    filled = int(np.count_nonzero(values))
    parts = [f"run {value['run']}", str(value["quantity"]), f"{len(chips)} chips, {filled} channels with packets"]
    if isinstance(scale, dict) and "low" in scale:
        unit = " packets/s" if value["quantity"] == "rate" else ""
        parts.append(f"from {scale['low']:.4g} to {scale['high']:.4g}{unit}, logarithmic")
    if value["seen"] < 1:
        parts.append(f"{value['seen']:.1%} of the rows were seen")
    return _Map("; ".join(parts), values[order], chips["io_group"][order].astype(np.intp))


def _map_text(value: Any) -> str:
    """Show the highest value of each chip, or of some chips, as a character."""
    pixels = _map(value)
    together = max(1, -(-len(pixels.values) // (_MAP_LINE * _MAP_LINES)))
    chips = "chip" if together == 1 else f"{together} chips"
    lines = [
        pixels.title,
        f"highest channel of each {chips}, by io_channel and chip_id; from {_SHADES[0]} to {_SHADES[-1]}",
    ]
    highest = pixels.values.max(axis=1, initial=0).astype(np.intp)
    for group in np.unique(pixels.groups).tolist():
        own = highest[pixels.groups == group]
        own = np.maximum.reduceat(own, np.arange(0, len(own), together))
        shades = "".join(_SHADES[(code - 1) * len(_SHADES) // 255] if code else " " for code in own.tolist())
        for start in range(0, len(shades), _MAP_LINE):
            name = f"io_group {group}" if start == 0 else ""
            lines.append(f"{name:<12} |{shades[start : start + _MAP_LINE]}|")
    return "\n".join(lines)


def _map_html(value: Any) -> str:
    pixels = _map(value)
    parts = [f"<div>{_escaped(pixels.title)}; each column is a chip, by io_channel and chip_id, grey: no packet</div>"]
    for group in np.unique(pixels.groups).tolist():
        own = pixels.values[pixels.groups == group].T
        data = base64.b64encode(png(own)).decode()
        style = f"width:{min(900, 8 * own.shape[1])}px;height:{2 * own.shape[0]}px;image-rendering:pixelated"
        parts.append(
            f"<div>io_group {group}</div>"
            f"<img alt='io_group {group}' style='{style}' src='data:image/png;base64,{data}'>"
        )
    return "".join(parts)


def png(codes: NDArray[np.uint8]) -> bytes:
    """Return a PNG picture of codes, shape (height, width): grey for 0, and from dark to bright from 1 to 255."""
    anchors = np.linspace(1, 255, len(_COLOURS))
    palette = np.array([np.interp(np.arange(256), anchors, part) for part in zip(*_COLOURS, strict=True)]).T
    palette[0] = _NONE
    height, width = codes.shape
    lines = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter, 0
    lines[:, 1:] = codes
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette.astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 1)),
        (b"IEND", b""),
    )
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        parts += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(name + data))]
    return b"".join(parts)


def _or_else(special: Callable[[Any], str], general: Callable[[Any], str]) -> Callable[[Any], str]:
    def show(value: Any) -> str:
        try:
            return special(value)
        except network_picture.WRONG_FORM:
            return general(value)

    return show


#: The view of all other results.
GENERAL: Final = View(readable, html)
# Supplies of boards


def _marked(rows: Any, uncertain: Any) -> list[dict[str, Any]]:
    """Return rows of monitors with a question mark at the names of uncertain ones."""
    return [{f"{name} ?" if name in uncertain else name: value for name, value in row.items()} for row in rows]


def _power(value: Any) -> dict[str, Any]:
    """Return the result of power_up() for people."""
    return {**value, "tiles": _marked(value["tiles"], value["uncertain"])}


def _statuses(value: Any) -> list[dict[str, Any]]:
    """Return the result of board_status() or power() for people."""
    return [
        {**status, "supplies": _marked(status["supplies"], status["uncertain"])} if "uncertain" in status else status
        for status in value
    ]


_SUPPLIES: Final = View(
    _or_else(lambda value: readable(_statuses(value)), readable), _or_else(lambda value: html(_statuses(value)), html)
)
_VIEWS: Final = {
    "adc_histogram": View(_or_else(_histogram_text, readable), _or_else(_histogram_html, html)),
    "board_status": _SUPPLIES,
    "power": _SUPPLIES,
    "power_up": View(
        _or_else(lambda value: readable(_power(value)), readable), _or_else(lambda value: html(_power(value)), html)
    ),
    "discover_network": View(_or_else(network_picture.text, readable), _or_else(network_picture.html, html)),
    "pixel_map": View(_or_else(_map_text, readable), _or_else(_map_html, html)),
}
