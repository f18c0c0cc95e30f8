"""Report of a calibration: its result as JSON, and a picture of the rates before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import ConfigError


def write(directory: str, name: str, result: dict[str, Any]) -> str:
    """Write `name`.json into the directory. Returns its absolute path."""
    path = Path(directory).absolute() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    return str(path)


def draw(
    directory: str, name: str, before: NDArray[Any], after: NDArray[Any], low: float, high: float, title: str
) -> str:
    """Draw the channels' rates (Hz) before and after into `name`.png in the directory. Returns its absolute path.

    ConfigError if matplotlib is not installed.
    """
    try:  # here, because it takes a second to import and is optional; pyplot would look for a screen
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f'no picture of the rates: it needs pip install "larpix-daq[plot]" ({error})') from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    spread, one_by_one = figure.subplots(1, 2)
    least = min([low, *(float(rates[rates > 0].min()) for rates in (before, after) if (rates > 0).any())]) / 2
    bins = np.geomspace(least, max(before.max(), after.max(), high) * 2, 60)
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
    path = Path(directory).absolute() / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return str(path)
