"""Reports of routines: values of all channels compared with limits, as numbers for JSON and as a picture."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import ConfigError
from larpixdaq.runtime.units import utc_name

#: Maximum number of channels that a picture marks one by one.
_MARKED: Final = 2_000
#: Maximum number of chips whose keys are at the axis of a picture.
_NAMED: Final = 25
Values = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Quantity(NamedTuple):
    """Values of all channels, shape (chips, channels), NaN where they are not known. Values outside the limits are bad.

    `unit`: "" for a number. `needed`: a channel without a value is bad, too, for the reason `needed`.
    """

    name: str
    unit: str
    values: Values
    low: float | None = None
    high: float | None = None
    needed: str = ""

    def outside(self) -> Flags:
        """Return which values are outside the limits, shape (chips, channels). NaN is not."""
        result = np.zeros(self.values.shape, np.bool_)
        with np.errstate(invalid="ignore"):
            if self.low is not None:
                result |= self.values < self.low
            if self.high is not None:
                result |= self.values > self.high
        return result


class Report:
    """Collects the values that a routine has measured, and judges the channels by their limits.

    `off`: channels that took no part, shape (chips, channels): they have no values, and are to disable further on.
    """

    def __init__(self, routine: str, keys: Sequence[str], off: Flags) -> None:
        self.routine = routine
        self.keys = list(keys)
        self.off = off
        self._quantities: list[Quantity] = []
        self._listed: dict[str, list[list[Any]]] = {}

    def add(
        self,
        name: str,
        values: NDArray[Any],
        unit: str = "",
        *,
        errors: NDArray[Any] | None = None,
        low: float | None = None,
        high: float | None = None,
        needed: str = "",
    ) -> None:
        """Add a quantity, as in Quantity; its limits make it part of the judgement and of the picture.

        `errors`: standard deviations of the values, listed as NAME_error.
        """
        shown = np.where(self.off, np.nan, values)
        self._quantities.append(Quantity(name, unit, shown, low, high, needed))
        self.record(name, shown)
        if errors is not None:
            self.record(f"{name}_error", np.where(np.isnan(shown), np.nan, errors))

    def record(self, name: str, values: NDArray[Any]) -> None:
        """List values in the result that are neither judged nor drawn, shape (chips, channels)."""
        self._listed[name] = _plain(values)

    def bad(self) -> Flags:
        """Return which channels are bad, shape (chips, channels)."""
        result = np.zeros(self.off.shape, np.bool_)
        for quantity in self._quantities:
            result |= quantity.outside()
            if quantity.needed:
                result |= np.isnan(quantity.values) & ~self.off
        return result

    def result(self) -> dict[str, Any]:
        """Return the numbers: "chips", "limits", "bad", "disable".

        "chips" {chip: {quantity: a value for each channel, None if it is not known}}. "limits": for each quantity with
        a limit {"name", "unit", "low", "high", "median", "channels": their number, "outside": number of channels
        outside, "unknown": number of channels without a value}. "bad" {chip: {channel: [reason, ...]}}. "disable"
        {chip: [channel, ...]}: bad channels, and those that were left off.
        """
        return {
            "chips": {key: {name: rows[at] for name, rows in self._listed.items()} for at, key in enumerate(self.keys)},
            "limits": [self._limit(quantity) for quantity in self._quantities if _is_limited(quantity)],
            "bad": self._reasons(),
            "disable": by_chip(self.keys, self.bad() | self.off),
        }

    def _limit(self, quantity: Quantity) -> dict[str, Any]:
        known = quantity.values[~np.isnan(quantity.values)]
        channels = int((~self.off).sum())
        return {
            "name": quantity.name,
            "unit": quantity.unit,
            "low": quantity.low,
            "high": quantity.high,
            "median": round(float(np.median(known)), 4) if len(known) else None,
            "channels": channels,
            "outside": int(quantity.outside().sum()),
            "unknown": channels - len(known),
        }

    def _reasons(self) -> dict[str, dict[str, list[str]]]:
        reasons: dict[str, dict[str, list[str]]] = {}
        for quantity in self._quantities:
            unit = f" {quantity.unit}" if quantity.unit else ""
            marked = quantity.outside()
            if quantity.needed:
                marked |= np.isnan(quantity.values) & ~self.off
            for at, channel in np.argwhere(marked).tolist():
                value = quantity.values[at, channel]
                if np.isnan(value):
                    text = quantity.needed
                elif quantity.high is not None and value > quantity.high:
                    text = f"{quantity.name} {value:.4g}{unit}, above {quantity.high:g}"
                else:
                    text = f"{quantity.name} {value:.4g}{unit}, below {quantity.low:g}"
                reasons.setdefault(self.keys[at], {}).setdefault(str(channel), []).append(text)
        return reasons

    def write(
        self, directory: str | None, result: dict[str, Any], title: str, draw: Callable[[Any, Any], None] | None = None
    ) -> None:
        """Write `result` and a picture into the directory, which must exist; nothing if it is None.

        The picture has a row for each quantity, and before them the row that `draw` fills, with two axes of matplotlib.
        Adds "files", their absolute paths, to the result, and "no_picture", the reason, if there is no picture.
        """
        if directory is not None:
            result.update(write(directory, self.routine, result, lambda figure: self._draw(figure, title, draw)))

    def _draw(self, figure: Any, title: str, draw: Callable[[Any, Any], None] | None) -> None:
        drawn = [quantity for quantity in self._quantities if not np.isnan(quantity.values).all()]
        own = [] if draw is None else [draw]
        rows = len(own) + len(drawn)
        figure.set_size_inches(11, 0.8 + 3 * max(1, rows))
        figure.suptitle(title)
        if not rows:
            figure.text(0.5, 0.5, "nothing was measured", ha="center")
            return
        axes = figure.subplots(rows, 2, squeeze=False)
        for fill, (left, right) in zip(own, axes, strict=False):
            fill(left, right)
        for (spread, place), quantity in zip(axes[len(own) :], drawn, strict=True):
            self._draw_quantity(figure, spread, place, quantity)

    def _draw_quantity(self, figure: Any, spread: Any, place: Any, quantity: Quantity) -> None:
        label = f"{quantity.name} [{quantity.unit}]" if quantity.unit else quantity.name
        known = quantity.values[~np.isnan(quantity.values)]
        spread.hist(known, _bins(known), color="tab:blue")
        for limit in (quantity.low, quantity.high):
            if limit is not None:
                spread.axvline(limit, color="tab:red", linestyle="--")
        spread.set(xlabel=label, ylabel="channels" if self.off.shape[1] > 1 else "chips", yscale="symlog")
        spread.set_title(f"median {np.median(known):.4g}; {int(quantity.outside().sum())} outside", fontsize=10)
        if self.off.shape[1] == 1:
            place.plot(quantity.values[:, 0], "o", ms=3)
            place.set(xlabel="chip", ylabel=label)
            return
        low, high = np.percentile(known, (1, 99))
        image = place.imshow(
            quantity.values, aspect="auto", interpolation="nearest", vmin=low, vmax=max(high, low + 1e-9)
        )
        figure.colorbar(image, ax=place, label=label)
        bad = np.argwhere(quantity.outside())
        if 0 < len(bad) <= _MARKED:
            place.plot(bad[:, 1], bad[:, 0], "x", color="tab:red", ms=4)
        place.set(xlabel="channel", ylabel="chip")
        step = -(-len(self.keys) // _NAMED)
        place.set_yticks(range(0, len(self.keys), step), self.keys[::step], fontsize=6)


def write(directory: str, routine: str, result: dict[str, Any], draw: Any) -> dict[str, Any]:
    """Write `result` as JSON and the picture that `draw(figure)` makes, as ROUTINE_TIME in the directory.

    Returns {"files": absolute paths, the picture first}, and "no_picture", the reason, if matplotlib is not installed.
    """
    name = f"{routine}_{utc_name(time.time())}"
    path, number = Path(directory).absolute() / name, 1
    while path.with_suffix(".json").exists():  # of the same second
        number += 1
        path = path.with_name(f"{name}_{number}")
    files: list[str] = []
    told: dict[str, Any] = {"files": files}
    try:
        path.with_suffix(".png").write_bytes(picture(draw))
        files.append(str(path.with_suffix(".png")))
    except ConfigError as error:
        told["no_picture"] = str(error)
    path.with_suffix(".json").write_text(json.dumps(result) + "\n")
    files.append(str(path.with_suffix(".json")))
    return told


def picture(draw: Any) -> bytes:
    """Return a PNG of what `draw(figure)` draws on an empty figure of matplotlib; ConfigError without matplotlib."""
    try:  # here, because it takes a second to import and is optional; pyplot would look for a screen
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f'no picture: it needs pip install "larpix-daq[plot]" ({error})') from None
    figure = Figure(figsize=(11, 4), layout="constrained")
    draw(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def draw_rates(figure: Any, before: Values, after: Values, low: float, high: float, title: str) -> None:
    """Draw the channels' rates (Hz) before and after a calibration."""
    figure.set_size_inches(10, 4)
    spread, one_by_one = figure.subplots(1, 2)
    least = min([low, *(float(np.min(rates[rates > 0])) for rates in (before, after) if (rates > 0).any())]) / 2
    bins = np.geomspace(least, max(float(np.max(before)), float(np.max(after)), high) * 2, 60)
    for rates, label, colour in ((before, "before", "0.6"), (after, "after", "tab:blue")):
        shown = np.maximum(rates.ravel(), least)
        spread.hist(shown, bins, label=f"{label}: {rates.sum():,.0f} Hz in all", color=colour, alpha=0.7)
        one_by_one.plot(np.sort(shown)[::-1], label=label, color=colour)
    spread.axvspan(low, high, color="tab:green", alpha=0.2, label="wanted")
    one_by_one.axhspan(low, high, color="tab:green", alpha=0.2)
    spread.set(xscale="log", yscale="symlog", xlabel="rate of a channel [Hz]", ylabel="channels")
    one_by_one.set(yscale="log", xlabel="channels, by their rates", ylabel="rate [Hz]")
    spread.legend()
    figure.suptitle(title)


def by_chip(keys: Sequence[str], marked: Flags) -> dict[str, list[int]]:
    """Return marked channels, shape (chips, channels), as {chip: [channel, ...]}."""
    return {key: np.flatnonzero(row).tolist() for key, row in zip(keys, marked, strict=True) if row.any()}


def _is_limited(quantity: Quantity) -> bool:
    return quantity.low is not None or quantity.high is not None or bool(quantity.needed)


def _plain(values: NDArray[Any]) -> list[list[Any]]:
    """Return numbers as lists, rounded to five digits, with None for NaN."""
    if values.dtype.kind in "iub":
        whole: list[list[Any]] = values.tolist()
        return whole
    return [[None if value != value else float(f"{value:.5g}") for value in row] for row in values.tolist()]


def _bins(known: Values) -> Values:
    """Return the edges of 60 bins over most values; the first and last bin hold the others."""
    low, high = np.percentile(known, (0.5, 99.5))
    margin = max((high - low) / 4, abs(low) * 1e-3, 1e-9)
    edges: Values = np.linspace(low - margin, high + margin, 61)
    edges[0], edges[-1] = min(edges[0], float(np.min(known))), max(edges[-1], float(np.max(known)))
    return edges
