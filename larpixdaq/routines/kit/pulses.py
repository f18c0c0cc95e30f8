"""Test pulses to many chips at once, no faster than the lines carry their hits."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines.kit.chips import Chips
from larpixdaq.routines.kit.measurement import NATURAL, LineLoads, collect

#: Value of the pulser's DAC before a pulse. A pulse is a fall of the DAC.
HIGH: Final = 255
#: Fraction of a line's maximum that the hits of the pulses fill.
_LOAD: Final = 0.6
#: Maximum chips that get a pulse together, because boards lose messages of hits that come at the same moment.
_TOGETHER: Final = 16
#: Minimum seconds between two pulses, and between the last pulse and the end of the measurement.
_PAUSE, _WAIT = 0.002, 0.02
#: Distance from the median, in ADC counts and in medians of all distances, up to which a hit has its channel's height.
_LEAST_SPREAD, _WITHIN = 5, 8


class Pulses(NamedTuple):
    """Natural hits of each channel, of shape (chips, channels), from this number of `pulses`.

    `mean`, `std`: of their ADC counts, without single hits of other heights, NaN without hits or with one. `full`:
    chips whose io_channel was saturated, so that hits may be missing, shape (chips, 1). `left_out`, `saturated`: as in
    Hits.
    """

    pulses: int
    hits: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    full: NDArray[np.bool_]
    left_out: int
    saturated: list[str]

    def seen(self) -> NDArray[np.float64]:
        """Return the fraction of pulses that each channel has seen, NaN on saturated io_channels.

        It is above 1 for channels with other hits.
        """
        result: NDArray[np.float64] = np.where(self.full, np.nan, self.hits / self.pulses)
        return result


class Pulser:
    """Sends test pulses to all channels of `chips` but those `off`, shape (chips, channels), and masks these.

    Chips without other channels get no pulses.

    Periodic reset is on, so that leakage causes no hits. The registers stay changed until `chips.restore()`.
    """

    def __init__(self, chips: Chips, off: NDArray[np.bool_]) -> None:
        self._chips, self._groups = chips, _groups(chips.lines(), ~off.all(1))
        reset = {"periodic_reset": 1} if chips.has("periodic_reset") else {}
        chips.set(mask=off, testpulse_enable=off, testpulse_dac=HIGH, **reset)
        lines = np.unique(chips.lines(), return_inverse=True)[1]
        hits = np.bincount(lines, (~off).sum(1))
        io = chips.controller.io
        self._pause = float(np.max(hits)) / _LOAD / 10_000
        if hasattr(io, "capacity"):
            loads = LineLoads(io, chips.keys)
            order = [loads.names.index(name) for name in np.unique(chips.lines()).tolist()]
            self._pause = float(np.max(hits / (_LOAD * loads.capacity[order])))
        self._pause = max(self._pause, _PAUSE * len(self._groups))

    def send(self, amplitude: int, pulses: int) -> Pulses:
        """Send pulses of `amplitude` DAC counts and measure their hits."""
        chips = self._chips

        def act() -> None:
            chips.pulse(HIGH, HIGH - amplitude, pulses, self._pause, self._groups)

        measured = collect(chips.controller, chips.keys, _WAIT + self._pause, act=act)
        shape = len(chips), chips.channels
        hits = measured.hits[(measured.hits["channel"] < shape[1]) & (measured.hits["trigger"] == NATURAL)]
        n, _, _ = moments(hits, shape)
        _, mean, std = moments(hits[_of_pulses(hits, shape)], shape)
        full = np.isin(chips.lines(), measured.saturated)[:, None]
        return Pulses(pulses, n, mean, std, full, measured.left_out, measured.saturated)


def _groups(lines: list[str], part: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Return groups of the chips in `part`, each with chips of all lines, as flags of shape (chips,)."""
    chips = np.flatnonzero(part).tolist()
    ranks: dict[str, int] = {}
    order = []
    for chip in chips:
        ranks[lines[chip]] = ranks.get(lines[chip], 0) + 1
        order.append((ranks[lines[chip]], chip))
    ordered = [chip for _, chip in sorted(order)]
    groups = []
    for start in range(0, len(ordered), _TOGETHER):
        group = np.zeros(len(part), np.bool_)
        group[ordered[start : start + _TOGETHER]] = True
        groups.append(group)
    return groups or [part]


def _of_pulses(hits: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which hits have the height of most hits of their channel; others do not come from pulses."""
    index = (hits["chip"] * shape[1] + hits["channel"]).astype(np.int64)
    center = _medians(index, hits["adc"], shape[0] * shape[1])[index]
    distance = np.abs(hits["adc"] - center)
    spread = _medians(index, distance, shape[0] * shape[1])[index]
    result: NDArray[np.bool_] = distance <= np.maximum(_LEAST_SPREAD, _WITHIN * spread)
    return result


def _medians(index: NDArray[np.int64], values: NDArray[Any], size: int) -> NDArray[np.int64]:
    """Return the median of the values of each index, 0 without values."""
    order = np.lexsort((values, index))
    n = np.bincount(index, minlength=size)
    medians = np.zeros(size, np.int64)
    middle = np.cumsum(n) - n + n // 2
    medians[n > 0] = values[order][middle[n > 0]]
    return medians


def moments(
    hits: NDArray[Any], shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return number, mean and standard deviation of the ADC counts of `hits` (dtype HIT), shape (chips, channels).

    NaN where there are too few hits.
    """
    index = hits["chip"] * shape[1] + hits["channel"]
    size = shape[0] * shape[1]
    n = np.bincount(index, minlength=size)
    adc = hits["adc"].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(index, adc, size) / n
        squares = np.bincount(index, (adc - mean[index]) ** 2, size)
        std = np.sqrt(np.where(n > 1, squares / (n - 1), np.nan))
    return n.reshape(shape), mean.reshape(shape), std.reshape(shape)
