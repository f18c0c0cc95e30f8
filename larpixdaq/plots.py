"""Pictures of the summaries of runs, as PNG or PDF: rates, ADC values, pixels, time stamps, SYNC words, data quality.

matplotlib is the extra `plot`, and imported only here, when a picture is drawn.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import ConfigError, FileError, RequestError, UsageError, cause, printable
from larpixdaq.hardware.pixel_layout import PixelLayout
from larpixdaq.hdf5.board_clocks import TICKS_PER_S, Clock
from larpixdaq.hdf5.run_summary import RunSummary
from larpixdaq.runtime.units import utc
from larpixdaq.schema import key_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

#: The kinds of pictures, in their order.
KINDS: Final = ("rates", "adc", "pixels", "timestamps", "sync", "quality")
#: Formats of pictures, by the ending of their file.
FORMATS: Final = (".png", ".pdf")
#: Size in inches of the panel of one kind and one run.
_WIDTH: Final = 9.0
_HEIGHT: Final = 4.6
_DPI: Final = 110
#: Maximum number of anodes with a map of their own.
_MAX_ANODES: Final = 8
#: Maximum places of a grid of pixels, some of which may have no pixel.
_MAX_PLACES: Final = 4_000_000
#: Maximum lines of text in a panel.
_MAX_LINES: Final = 16
_MAX_LINE: Final = 135
#: Channels named in the map of pixels.
_NAMED: Final = 5


def check_format(path: Path) -> None:
    """ConfigError if a picture cannot have this name, or matplotlib is not installed."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: expected a name that ends in {' or '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ConfigError('pictures need pip install "larpix-daq[plot]"')


def save(
    summaries: Sequence[RunSummary],
    path: Path,
    *,
    kinds: Sequence[str] = KINDS,
    layout: PixelLayout | None = None,
    overwrite: bool = False,
) -> None:
    """Save the pictures that figure() draws in a new file.

    A PDF has one page a kind, a PNG all kinds in one picture. FileError if the file exists already, unless
    `overwrite`, or cannot be written; ConfigError as of check_format().
    """
    check_format(path)
    content = io.BytesIO()  # so that a picture that cannot be drawn leaves no file
    with _matplotlib():
        if path.suffix.lower() == ".png":
            figure(summaries, kinds, layout).savefig(content, format="png", dpi=_DPI)
        else:
            from matplotlib.backends.backend_pdf import PdfPages

            with PdfPages(content, metadata={"Creator": "larpix-daq", "CreationDate": None}) as pages:
                for kind in kinds:
                    pages.savefig(figure(summaries, [kind], layout), dpi=_DPI)
    try:
        with open(path, "wb" if overwrite else "xb") as file:
            try:
                file.write(content.getbuffer())
                file.flush()
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        raise FileError(f"{path}: exists already") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {cause(error)}") from None


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Draw with matplotlib's own defaults, whatever the user's matplotlibrc says, and without its warnings."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(matplotlib.rcParamsDefault):
        # Texts of files may have letters that the font lacks; they become boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def figure(summaries: Sequence[RunSummary], kinds: Sequence[str] = KINDS, layout: PixelLayout | None = None) -> Figure:
    """Draw the kinds of pictures of one run, or of several runs side by side on the same scales.

    `layout`: positions of the pixels; None: chips against channels.
    """
    from matplotlib.figure import Figure

    # One run: at most two kinds beside each other. Several runs: one column for each.
    columns = len(summaries) if len(summaries) > 1 else min(2, len(kinds))
    rows = len(kinds) if len(summaries) > 1 else -(-len(kinds) // columns)
    heading = 0.15 + 0.17 * max(len(_heading(summary)) for summary in summaries)
    drawing = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + heading))
    parts: Any = drawing.subfigures(2, 1, height_ratios=(heading, _HEIGHT * rows))
    top, below = parts
    heads: Any = top.subfigures(1, len(summaries), squeeze=False)
    for head, summary in zip(heads[0], summaries, strict=True):
        lines = [printable(line)[:_MAX_LINE] for line in _heading(summary)]
        head.text(0.02, 0.95, "\n".join(lines), va="top", fontsize=10, parse_math=False)
    panels = np.asarray(below.subfigures(rows, columns, squeeze=False))
    for i, kind in enumerate(kinds):
        drawn = []
        for j, summary in enumerate(summaries):
            place = (i, j) if len(summaries) > 1 else divmod(i, columns)
            drawn.append(_PANELS[kind](panels[place], summary, _Shared(summaries, layout)))
        _share_limits(drawn)
    return drawing


def _heading(summary: RunSummary) -> list[str]:
    """Return what the run is, what is known of it, and which part of its rows was read."""
    run = f"run {summary.run} ({summary.kind})" if summary.own else "no run: not written by larpix-daq"
    names = [Path(file).name for file in summary.files]
    more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
    lines = [f"{run}, {summary.condition}" if summary.condition else run, f"{names[0]}{more}"]
    if summary.comment:
        lines.append(summary.comment)
    if summary.start is not None and summary.seconds is not None:
        clock = "clock of the producers' hosts" if summary.own else "clock of the boards, in whole seconds"
        lines.append(f"{utc(summary.start)}, {_length(summary.seconds)} ({clock})")
    if summary.rows_read == summary.rows:
        lines.append(f"all {summary.rows:,} rows were read")
    else:
        lines.append(f"{summary.rows_read:,} of {summary.rows:,} rows were read, evenly chosen ({summary.seen:.2%})")
    return lines


def _length(seconds: float) -> str:
    unit, scale = _time_unit(seconds)
    return f"{seconds / scale:.1f} {unit}"


def _time_unit(seconds: float) -> tuple[str, float]:
    return next((unit for unit in (("h", 3600.0), ("min", 60.0)) if seconds >= 5 * unit[1]), ("s", 1.0))


class _Shared:
    """What the panels of all runs have in common: the scales of the channels' rates and means, and the pixel layout."""

    def __init__(self, summaries: Sequence[RunSummary], layout: PixelLayout | None) -> None:
        self.layout = layout
        active = [rates[rates > 0] for rates in (summary.channel_rates() for summary in summaries)]
        positive = np.concatenate([np.zeros(0), *active])
        self.rates = _range(positive)
        self.means = _range(np.concatenate([summary.mean[np.isfinite(summary.mean)] for summary in summaries]))


def _range(values: NDArray[Any]) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _share_limits(drawn: list[list[Axes]]) -> None:
    """Give the axes of all runs at the same place the same limits."""
    for axes in zip(*drawn, strict=False):
        for get, put in (("get_ylim", "set_ylim"), ("get_xlim", "set_xlim")):
            limits = np.array([getattr(each, get)() for each in axes])
            if len(axes) > 1 and np.isfinite(limits).all() and all(each.has_data() for each in axes):
                inverted = limits[0, 0] > limits[0, 1]
                low, high = limits.min(), limits.max()
                for each in axes:
                    getattr(each, put)((high, low) if inverted else (low, high))


def _colours(summary: RunSummary) -> list[Any]:
    from matplotlib import colormaps

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    return [colours[int(group) % 10] for group in summary.io_groups["io_group"]]


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, wrap=True, parse_math=False)
    axes.set_xscale("linear")
    axes.set_yscale("linear")
    axes.set_xticks([])
    axes.set_yticks([])


def _time_axis(axes: Axes, summary: RunSummary) -> float:
    """Label the time axis. Returns the seconds of its unit."""
    unit, scale = _time_unit(summary.seconds or 0.0)
    axes.set_xlabel(f"time since {utc(summary.start)} [{unit}]" if summary.start is not None else "time, not known")
    axes.set_xlim(0, max(summary.seconds or 0.0, 1e-3) / scale)
    return scale


def _steps(axes: Axes, summary: RunSummary, values: NDArray[Any], labels: Sequence[str]) -> None:
    scale = _time_axis(axes, summary)
    edges = (summary.edges - (summary.start or 0.0)) / scale
    for line, colour, label in zip(values.T, _colours(summary), labels, strict=True):
        axes.stairs(line, edges, color=colour, label=label, baseline=None, linewidth=1.3)


def _rates(panel: SubFigure, summary: RunSummary, shared: _Shared) -> list[Axes]:
    axes: Axes = panel.subplots()
    panel.subplots_adjust(left=0.11, right=0.98, top=0.9, bottom=0.13)
    axes.set_title("packets per second from each io_group", fontsize=10)
    if not len(summary.edges) or not len(summary.io_groups):
        _empty(axes, "no packets" if not len(summary.io_groups) else "the times of the rows are not known")
        return [axes]
    labels = [
        f"io_group {line['io_group']}: {line['packets']:,} packets{'' if line['exact'] else ' (estimated)'}"
        for line in summary.io_groups
    ]
    _steps(axes, summary, summary.rates, labels)
    scale = _time_unit(summary.seconds or 0.0)[1]
    for moment, name in ((summary.begun, "begin of RUN"), (summary.ended, "end of RUN")):
        place = -1.0 if moment is None else (moment - (summary.start or 0.0)) / scale
        if 0 <= place <= (summary.seconds or 0.0) / scale:
            axes.axvline(place, color="0.4", linestyle=":", linewidth=1)
            side = "left" if place < (summary.seconds or 0.0) / scale / 2 else "right"
            axes.text(place, 1.0, name, transform=axes.get_xaxis_transform(), fontsize=7, ha=side, va="bottom")
    axes.set_ylim(0, 1.08 * max(1e-3, float(np.max(np.nan_to_num(summary.rates), initial=0.0))))
    axes.set_ylabel(f"packets/s, means of {float(np.diff(summary.edges)[0]):.3g} s")
    axes.legend(fontsize=7, loc="best")
    return [axes]


def _adc(panel: SubFigure, summary: RunSummary, shared: _Shared) -> list[Axes]:
    spread, channels = panel.subplots(1, 2)
    panel.subplots_adjust(left=0.11, right=0.95, top=0.9, bottom=0.13, wspace=0.25)
    spread.set_title("ADC values of data packets", fontsize=10)
    channels.set_title("mean and spread of each channel", fontsize=10)
    if not summary.adc.any():
        for axes in (spread, channels):
            _empty(axes, "no data packets with valid parity")
        return [spread, channels]
    edges = np.arange(summary.adc.shape[1] + 1) - 0.5
    for counts, colour, group in zip(summary.adc, _colours(summary), summary.io_groups["io_group"], strict=True):
        if counts.any():
            spread.stairs(counts, edges, color=colour, label=f"io_group {group}", linewidth=1.2)
    spread.set(yscale="log", xlabel="ADC value [ADC counts]", ylabel="data packets read")
    spread.set_ylim(bottom=0.5)
    spread.set_xlim(0, summary.adc.shape[1] - 1)
    spread.legend(fontsize=7)
    known = np.isfinite(summary.mean)
    few = known & (summary.packets > 1)
    x, y = summary.mean[few], summary.std[few]
    if len(x):
        image = channels.hist2d(x, y, bins=(100, 100), norm=_log_norm(1, None), cmap="viridis")[3]
        panel.colorbar(image, ax=channels, label="channels")
    channels.set(xlabel="mean [ADC counts]", ylabel="standard deviation [ADC counts]")
    if not len(x):
        _empty(channels, "no channel with two packets")
    return [spread, channels]


def _log_norm(low: float | None, high: float | None) -> Any:
    from matplotlib.colors import LogNorm

    return LogNorm(low, high)


def _pixels(panel: SubFigure, summary: RunSummary, shared: _Shared) -> list[Axes]:
    rates = summary.channel_rates()
    in_counts = not summary.seconds
    shown = summary.packets.astype(np.float64) if in_counts else rates
    label = "data packets read" if in_counts else "data packets/s"
    if not len(summary.chips):
        _empty(panel.subplots(), "no data packets")
        return []
    low, high = (1.0, float(max(np.max(shown), 1.0))) if in_counts else shared.rates
    if low == high:
        low, high = low / 2, high * 2
    quantities = (
        (np.where(shown > 0, shown, np.nan), label, {"norm": _log_norm(low, high), "cmap": "viridis"}),
        (summary.mean, "mean [ADC counts]", {"vmin": shared.means[0], "vmax": shared.means[1], "cmap": "plasma"}),
    )
    grids, missing = _pixel_grids(summary, shared.layout) if shared.layout is not None else ([], "")
    panel.text(0.02, 0.005, missing, fontsize=7, parse_math=False)
    columns = max(1, len(grids))
    axes = np.asarray(panel.subplots(2 if columns > 1 else 1, columns if columns > 1 else 2, squeeze=False))
    panel.subplots_adjust(left=0.08, right=0.97, top=0.88, bottom=0.16, wspace=0.35, hspace=0.45)
    for row, (values, title, style) in enumerate(quantities):
        for column in range(columns):
            place = axes[row, column] if columns > 1 else axes[0, row]
            if grids:
                grid = grids[column]
                filled = np.where(grid.chip >= 0, values[grid.chip, grid.channel], np.nan)
                image = place.imshow(filled, origin="lower", extent=grid.box, interpolation="nearest", **style)
                place.set(xlabel="x [mm]", ylabel="y [mm]", aspect="equal")
                place.set_title(f"{title}{grid.name}", fontsize=9)
            else:
                image = place.imshow(values, aspect="auto", interpolation="nearest", **style)
                _chip_ticks(place, summary)
                place.set_title(title, fontsize=9)
            place.set_facecolor("0.85")
            panel.colorbar(image, ax=place)
    hottest = np.argsort(-shown, axis=None, kind="stable")[:_NAMED]
    named = [
        f"{key_of(summary.chips[chip].tolist())}-{channel}: {shown[chip, channel]:.4g}"
        for chip, channel in zip(*np.unravel_index(hottest, shown.shape), strict=True)
        if shown[chip, channel] > 0
    ]
    panel.text(0.02, 0.03, f"highest ({label}): {', '.join(named)}", fontsize=7, parse_math=False)
    channels = int(np.count_nonzero(summary.packets))
    grey = "no packet, or no pixel" if grids else "no packet"
    title = f"{channels:,} channels of {len(summary.chips)} chips with data packets; grey: {grey}"
    panel.suptitle(title, fontsize=10)
    return []


def _chip_ticks(axes: Axes, summary: RunSummary) -> None:
    """Label the lines of a map of chips x channels by the first chip of each io_channel."""
    places = summary.chips["io_group"].astype(np.intp) << 8 | summary.chips["io_channel"]
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    starts = starts[:: max(1, -(-len(starts) // 12))]
    axes.set_yticks(starts, [key_of(summary.chips[start].tolist()) for start in starts], fontsize=6)
    axes.set(xlabel="channel_id", ylabel="chip (io_group-io_channel-chip_id)")


class _Grid(NamedTuple):
    """Grid of the pixels of one anode: its name, edges (mm), and chip (-1: none) and channel of each place."""

    name: str
    box: tuple[float, float, float, float]
    chip: NDArray[np.intp]
    channel: NDArray[np.intp]


def _pixel_grids(summary: RunSummary, layout: PixelLayout) -> tuple[list[_Grid], str]:
    """Return the grids of the anodes, and a text about chips of the run that are on none of them."""
    anodes: dict[float, list[tuple[NDArray[np.float64], int]]] = {}
    for index, chip in enumerate(summary.chips.tolist()):
        with suppress(RequestError):
            name = layout.find(key_of(chip))
            z = layout.tiles[layout.chips[name][0]].position[2]
            anodes.setdefault(z, []).append((layout.positions(name), index))
    grids: list[_Grid] = []
    drawn = 0
    for z, chips in sorted(anodes.items()):
        grid = _grid(f", z = {z:g} mm" if len(anodes) > 1 else "", chips, layout.pitch, summary.packets.shape[1])
        if grid is not None and len(grids) < _MAX_ANODES:
            grids.append(grid)
            drawn += len(chips)
    left = len(summary.chips) - drawn
    return grids, f"{left} chips of the run are not drawn: they have no place in {layout.name}" if left else ""


def _grid(name: str, chips: list[tuple[NDArray[np.float64], int]], pitch: float | None, channels: int) -> _Grid | None:
    """Return the grid of some chips, each with its channels' positions; None if they are on no grid."""
    xy = np.concatenate([positions for positions, _ in chips])
    chip = np.concatenate([np.full(len(positions), index) for positions, index in chips])
    channel = np.concatenate([np.arange(len(positions)) for positions, _ in chips])
    kept = np.isfinite(xy[:, 0]) & (channel < channels)
    xy, chip, channel = xy[kept], chip[kept], channel[kept]
    if not len(xy):
        return None
    pitch = pitch or _pitch(xy)
    low = np.min(xy, axis=0)
    places = np.rint((xy - low) / pitch).astype(np.intp)
    width, height = (np.max(places, axis=0) + 1).tolist()
    if width * height > _MAX_PLACES:
        return None
    grid, which = np.full((height, width), -1), np.zeros((height, width), np.intp)
    grid[places[:, 1], places[:, 0]], which[places[:, 1], places[:, 0]] = chip, channel
    x, y = low - pitch / 2
    return _Grid(name, (x, x + width * pitch, y, y + height * pitch), grid, which)


def _pitch(xy: NDArray[np.float64]) -> float:
    """Return the smallest distance of two columns or rows of pixels (mm)."""
    gaps = np.concatenate([np.diff(np.unique(np.round(axis, 3))) for axis in xy.T])
    return float(gaps.min()) if len(gaps) else 1.0


def _timestamps(panel: SubFigure, summary: RunSummary, shared: _Shared) -> list[Axes]:
    left, right = panel.subplots(1, 2)
    panel.subplots_adjust(left=0.11, right=0.98, top=0.9, bottom=0.36, wspace=0.25)
    right.set_title("steps from a packet to the next one of its io_group", fontsize=10)
    colours = dict(zip(summary.io_groups["io_group"].tolist(), _colours(summary), strict=True))
    clocks = [clock for clock in summary.clocks if clock.points.count]
    compared = bool(clocks) and all(clock.deviation is not None for clock in clocks)
    left.set_title(
        "clock of each io_group less the hosts' clock" if compared else "clock of each io_group", fontsize=10
    )
    scale = _time_axis(left, summary)
    for clock in clocks:
        x, y = clock.deviation if compared and clock.deviation is not None else clock.points.points()
        label = f"io_group {clock.io_group} ({clock.source})"
        y = y * 1e3 if compared else y / TICKS_PER_S
        left.plot((x - (summary.start or 0.0)) / scale, y, ".", ms=2, color=colours.get(clock.io_group), label=label)
    for clock in summary.clocks:
        used = np.flatnonzero(clock.histogram)
        if len(used):
            edges = 2.0 ** (np.arange(used[0], used[-1] + 2) / 2) / TICKS_PER_S
            counts = clock.histogram[used[0] : used[-1] + 1]
            right.stairs(counts, edges, color=colours.get(clock.io_group), linewidth=1.2)
    periods = {clock.period for clock in clocks}
    modulo = f" modulo {periods.pop():g} s" if compared and len(periods) == 1 else ""
    left.set_ylabel(f"difference{modulo} [ms]" if compared else "clock [s of 10 MHz ticks]")
    right.set(xscale="log", yscale="log", xlabel="step [s of 10 MHz ticks]", ylabel="steps read")
    right.set_ylim(bottom=0.5)
    if clocks:
        left.legend(fontsize=7, loc="best")
    else:
        _empty(left, "no time stamps with known times")
    if not any(clock.histogram.any() for clock in summary.clocks):
        _empty(right, "no steps")
    _text(panel, [clock_line(clock, len(clocks) > 1) for clock in summary.clocks], 0.26)
    return [left, right]


def clock_line(clock: Clock, compared: bool) -> str:
    """Return what was found about the clock of an io_group as a line of text. `compared`: with other clocks."""
    parts = [f"{clock.steps:,} steps", f"{clock.backward:,} backward"]
    if clock.backward:
        parts[-1] += f" (by at most {clock.largest_backward / TICKS_PER_S:.3g} s)"
    parts += [f"{clock.resets:,} resets", f"{clock.rollovers:,} rollovers"]
    parts.append(f"longest pause {clock.largest_gap / TICKS_PER_S:.3g} s")
    if not compared:
        pass
    elif clock.offset is not None and clock.offset_error is not None:
        parts.append(f"ahead by {clock.offset * 1e3:+.3f} ± {clock.offset_error * 1e3:.3f} ms")
    elif clock.source == "board":
        parts.append("offset not known")
    source = "" if clock.source == "board" else " (times of chips)"
    return f"io_group {clock.io_group}{source}: {', '.join(parts)}"


def _sync(panel: SubFigure, summary: RunSummary, shared: _Shared) -> list[Axes]:
    axes: Axes = panel.subplots()
    panel.subplots_adjust(left=0.11, right=0.98, top=0.9, bottom=0.36)
    axes.set_title("intervals of SYNC words", fontsize=10)
    scale = _time_axis(axes, summary)
    colours = dict(zip(summary.io_groups["io_group"].tolist(), _colours(summary), strict=True))
    markers = {83: "o", 72: "x"}
    lines = []
    drawn = False
    for clock in summary.clocks:
        for code, words in sorted(clock.sync.items()):
            lines.append(_sync_line(clock.io_group, words))
            x, y = words.intervals.points()
            if np.isfinite(x).any():
                drawn = True
                axes.plot(
                    (x - (summary.start or 0.0)) / scale, y, markers.get(code, "."), ms=3,
                    color=colours.get(clock.io_group, "0.5"), label=f"io_group {clock.io_group}: {words.kind}",
                )  # fmt: skip
    axes.set_ylabel("interval [s of 10 MHz ticks]")
    if drawn:
        axes.legend(fontsize=7, loc="best")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    else:
        _empty(axes, "no SYNC words were read" if not lines else "no interval of SYNC words is known")
    if summary.seen < 1:
        lines.append("in the rows read; heartbeats have an interval only where all rows between two of them were read")
    _text(panel, lines, 0.26)
    return [axes]


def _sync_line(io_group: int, words: Any) -> str:
    known = words.intervals
    if not known.count:
        return f"io_group {io_group}: {words.words:,} words ({words.kind}), no interval known"
    return (
        f"io_group {io_group}: {words.words:,} words ({words.kind}), intervals {known.low:.7g} to {known.high:.7g} s, "
        f"mean {known.mean:.7g} s"
    )


def _quality(panel: SubFigure, summary: RunSummary, shared: _Shared) -> list[Axes]:
    parity, fifo = panel.subplots(1, 2)
    panel.subplots_adjust(left=0.11, right=0.98, top=0.9, bottom=0.52, wspace=0.25)
    for axes, values, title in (
        (parity, summary.bad_parity, "packets with wrong parity"),
        (fifo, summary.fifo_full, "data packets with the flag of a full FIFO"),
    ):
        axes.set_title(title, fontsize=10)
        if not np.isfinite(values).any():
            _empty(axes, "no packets with known times")
            continue
        _steps(axes, summary, values, [f"io_group {group}" for group in summary.io_groups["io_group"]])
        axes.set_ylabel("fraction")
        axes.set_ylim(0, max(1e-3, float(np.nanmax(values))) * 1.1)
    _text(panel, quality_lines(summary), 0.4)
    return [parity, fifo]


def quality_lines(summary: RunSummary) -> list[str]:
    """Return lines about the quality of the data: condition, losses by place, and what could not be read."""
    lines = [f"condition {summary.condition}"] if summary.condition else ["no condition and no ledger in these files"]
    lines += summary.reasons
    for group in summary.io_groups:
        if seen := int(group["seen_packets"]):
            full = int(group["seen_local_full"]) + int(group["seen_shared_full"])
            lines.append(
                f"io_group {group['io_group']}: {seen:,} packets read, {int(group['seen_bad_parity']):,} with wrong "
                f"parity, {full:,} with a full FIFO"
            )
    for loss in summary.losses:
        where = f", io_group {loss.io_group}" if loss.io_group is not None else ""
        least = "at least " if loss.place == "board and network" else ""
        lines.append(f"{loss.place}{where}: {least}{loss.number:,} {loss.unit} ({loss.what})")
    if summary.own and not summary.losses and summary.condition != "RUNNING":
        lines.append("the ledger knows of no loss")
    lines += [f"unknown words kept: {number} of {reason}" for reason, number in summary.unknown_words.items()]
    return list(dict.fromkeys([*lines, *summary.verdicts, *summary.notes]))


def _text(panel: SubFigure, lines: Sequence[str], top: float) -> None:
    """Write lines of text below `top`, a fraction of the panel's height; texts of files are cut and escaped."""
    fits = max(1, int(top * _HEIGHT / 0.125) - 1)
    most = min(_MAX_LINES, fits)
    shown = [printable(line) for line in lines]
    if len(shown) > most:
        shown = [*shown[: most - 1], f"and {len(shown) - most + 1} more lines"]
    shown = [line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 1]}…" for line in shown]
    panel.text(0.04, top, "\n".join(shown), va="top", fontsize=7, family="monospace", parse_math=False)


_PANELS: Final[dict[str, Callable[[Any, RunSummary, _Shared], list[Any]]]] = dict(
    zip(KINDS, (_rates, _adc, _pixels, _timestamps, _sync, _quality), strict=True)
)
