"""Hot and dead channels of a run, found in the counts of its summary, with the limits of the statistics.

The number of packets of a channel in a given time is taken as a Poisson number. So a channel is named only if chance
would name less than one channel in FALSE runs: of n channels each is tested at the level FALSE / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.constants import IO_GROUPS
from larpixdaq.errors import ConfigError
from larpixdaq.hdf5.run_summary import STRETCHES, RunSummary

#: Expected number of channels that chance alone names in a run, if all have the rate of the threshold.
FALSE: Final = 0.01
#: A channel is hot from this multiple of the median rate of its io_group's channels on, without another threshold.
FACTOR: Final = 10.0
#: A channel is silent if its rate is certainly below this fraction of the median rate of its chip's channels.
SILENT: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A hot or dead channel. Rates are in packets/s; `packets`: data packets in the rows read.

    `low`, `high`: limits of the rate at the confidence of the test. `stretches`: in how many of the run's 64 equal
    stretches it had packets. `last`: unix s after which a dead channel was silent; None: from the begin.
    """

    io_group: int
    io_channel: int
    chip_id: int
    channel_id: int
    rate: float
    low: float
    high: float
    packets: int
    stretches: int
    compared: float  # rate with which it was compared
    why: str
    last: float | None = None

    @property
    def key(self) -> str:
        return f"{self.io_group}-{self.io_channel}-{self.chip_id}-{self.channel_id}"


def hot_channels(summary: RunSummary, *, above: float | None = None, factor: float = FACTOR) -> list[Channel]:
    """Return the channels whose rate is certainly above `above` (packets/s), the hottest first.

    Without `above` the threshold is `factor` times the median rate of the channels with packets of the same io_group.
    ConfigError if the rates are not known.
    """
    rates, per_packet = _rates(summary)
    level = FALSE / max(1, int(np.count_nonzero(summary.packets)))
    found = []
    low = _lower_limit(summary.packets, level) * per_packet[:, None]
    high = _upper_limit(summary.packets, level) * per_packet[:, None]
    groups = summary.chips["io_group"]
    threshold = np.full(len(groups), math.inf if above is None else above)
    if above is None:
        for group in np.unique(groups).tolist():
            own = rates[groups == group]
            if (own > 0).any():
                threshold[groups == group] = factor * float(np.median(own[own > 0]))
    why = (
        f"above {above:g} packets/s"
        if above is not None
        else f"above {factor:g} times the median of the channels of its io_group"
    )
    for chip, channel in zip(*np.nonzero(low > threshold[:, None]), strict=True):
        limits = float(low[chip, channel]), float(high[chip, channel])
        found.append(_channel(summary, chip, channel, rates, limits, float(threshold[chip]), why))
    return sorted(found, key=lambda channel: -channel.rate)


def dead_channels(summary: RunSummary, expected: NDArray[np.bool_] | None = None) -> list[Channel]:
    """Return the channels that were certainly silent: all the time, or from some stretch on.

    `expected`: which channels could have packets, shape (chips, channels); None: all of the chips seen. A channel that
    had no packet is compared with a tenth of the median rate of its chip's other channels; one that became silent with
    its own rate before. ConfigError as of hot_channels().
    """
    rates, per_packet = _rates(summary)
    if expected is None:
        expected = np.ones(rates.shape, np.bool_)
    level = FALSE / max(1, int(np.count_nonzero(expected)))
    least = -math.log(level)  # Poisson: the number of expected packets of which none came
    found: list[Channel] = []
    for chip, own in enumerate(rates):
        active = own[own > 0]
        if not len(active):
            continue
        compared = SILENT * float(np.median(active))
        limit = least * float(per_packet[chip])
        if limit >= compared:
            continue
        why = f"no packet, and below {SILENT:g} times the median of the channels of its chip"
        for channel in np.flatnonzero((own == 0) & expected[chip]).tolist():
            found.append(_channel(summary, chip, channel, rates, (0.0, limit), compared, why))
    found += _silenced(summary, rates, per_packet, expected, least)
    return sorted(
        found, key=lambda channel: (channel.io_group, channel.io_channel, channel.chip_id, channel.channel_id)
    )


def _silenced(
    summary: RunSummary,
    rates: NDArray[np.float64],
    per_packet: NDArray[np.float64],
    expected: NDArray[np.bool_],
    least: float,
) -> list[Channel]:
    """Return the channels that had packets and then none, although packets of their io_group came."""
    column = np.zeros(IO_GROUPS, np.intp)
    column[summary.io_groups["io_group"]] = np.arange(len(summary.io_groups))
    # Packets of the io_group after each stretch, and until its end, for each chip.
    until = np.cumsum(summary.stretch_data, axis=0, dtype=np.float64)
    until = until[:, column[summary.chips["io_group"]]] if len(summary.chips) else np.zeros((STRETCHES, 0))
    active = summary.active
    last = np.zeros(active.shape, np.intp)
    for stretch in range(STRETCHES):
        last[(active >> np.uint64(stretch)) & np.uint64(1) == 1] = stretch
    stretches = _bits(summary.active)
    chips = np.arange(len(summary.chips))[:, None]
    before = until[last, chips] if len(summary.chips) else np.zeros(active.shape)
    after = until[-1][:, None] - before if len(summary.chips) else np.zeros(active.shape)
    # Stretches with packets are counted, not packets, because packets come in bursts.
    silence = np.divide(stretches * after, before, out=np.zeros(active.shape), where=before > 0)
    found = []
    for chip, channel in zip(*np.nonzero((silence >= least) & expected & (stretches > 0)), strict=True):
        share = until[-1, chip] / before[chip, channel]
        earlier = float(rates[chip, channel] * share)
        start = summary.stretch_times[min(int(last[chip, channel]) + 1, STRETCHES - 1)]
        limits = 0.0, least * float(per_packet[chip]) * float(until[-1, chip] / after[chip, channel])
        why = "silent after packets at this rate"
        since = float(start) if math.isfinite(start) else None
        found.append(_channel(summary, chip, channel, rates, limits, earlier, why, since))
    return found


def _rates(summary: RunSummary) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the rates by [chip, channel], and the rate of one packet read, by chip."""
    if not summary.seconds:
        raise ConfigError(f"{summary.files[0]}: the times of its rows are not known, so neither are rates")
    scale = np.zeros(IO_GROUPS)
    groups = summary.io_groups
    read = groups["seen_packets"] > 0
    scale[groups["io_group"][read]] = groups["packets"][read] / groups["seen_packets"][read] / summary.seconds
    return summary.channel_rates(), scale[summary.chips["io_group"]]


def _channel(
    summary: RunSummary,
    chip: Any,
    channel: Any,
    rates: NDArray[np.float64],
    limits: tuple[float, float],
    compared: float,
    why: str,
    last: float | None = None,
) -> Channel:
    io_group, io_channel, chip_id = summary.chips[chip].tolist()
    return Channel(
        io_group=io_group,
        io_channel=io_channel,
        chip_id=chip_id,
        channel_id=int(channel),
        rate=float(rates[chip, channel]),
        low=limits[0],
        high=limits[1],
        packets=int(summary.packets[chip, channel]),
        stretches=int(_bits(summary.active[chip, channel])),
        compared=compared,
        why=why,
        last=last,
    )


def _bits(words: Any) -> NDArray[np.intp]:
    """Count the bits of 64-bit words."""
    as_bytes = np.atleast_1d(np.asarray(words, "<u8"))[..., None].view(np.uint8)
    counts = np.unpackbits(as_bytes, axis=-1).sum(axis=-1, dtype=np.intp)
    return counts if np.ndim(words) else counts[0]


def _lower_limit(counts: NDArray[Any], level: float) -> NDArray[np.float64]:
    """Return the Poisson mean below which `counts` or more come with at most this probability (Wilson and Hilferty)."""
    z = NormalDist().inv_cdf(1.0 - level)
    k = np.maximum(counts.astype(np.float64), 1e-9)
    cube = 1.0 - 1.0 / (9.0 * k) - z / (3.0 * np.sqrt(k))
    return np.where(counts > 0, k * np.maximum(cube, 0.0) ** 3, 0.0)


def _upper_limit(counts: NDArray[Any], level: float) -> NDArray[np.float64]:
    """Return the Poisson mean above which `counts` or less come with at most this probability (Wilson and Hilferty)."""
    z = NormalDist().inv_cdf(1.0 - level)
    k = counts.astype(np.float64) + 1.0
    return np.asarray(k * (1.0 - 1.0 / (9.0 * k) + z / (3.0 * np.sqrt(k))) ** 3, np.float64)
