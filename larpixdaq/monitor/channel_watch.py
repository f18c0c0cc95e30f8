"""Hot and dead channels of a run, found in the counts of data packets per channel.

The counts are compared every SPAN seconds. The monitor may have seen only a part of the packets of an io_group; the
exact totals tell which part. Rates are corrected for it, and are then the lowest ones that the sample allows.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.constants import IO_GROUPS
from larpixdaq.protocol.reports import ChannelRate

#: Seconds between two comparisons of the counts.
SPAN: Final = 2.0
#: Number of successive spans whose lowest rate is the rate of a hot channel, so that a burst is none.
SPANS: Final = 3
#: Maximum number of channels in hottest() and in dead().
HOTTEST: Final = 20
#: Minimum fraction of the packets of an io_group that must have been seen.
MIN_SEEN: Final = 0.05
#: Standard deviations by which a rate from a sample is lowered.
_DEVIATIONS: Final = 4.0
#: A channel is dead after packets in this number of spans, and then a silence in which packets in as many further spans
#: were expected. Spans are counted, not packets, because packets come in bursts. For packets at random times, that is
#: one of 10^9 channels.
MIN_SPANS: Final = 30


class GroupCounts(NamedTuple):
    """Numbers of each io_group so far, shape (256,)."""

    seen: NDArray[np.uint64]  # packets in the blocks that were seen
    packets: NDArray[np.uint64]  # all packets in the same time
    writes: NDArray[np.uint64]  # configuration writes


class ChannelWatch:
    """Compares the counts of one run.

    Silence of a channel is measured in the seconds in which its io_group had packets that were seen, and in those
    packets, and the shorter one counts. So neither skipped blocks, nor a pause or another rate of the whole io_group,
    nor a hot channel beside it make a channel dead. After configuration writes an io_group begins anew, because
    channels may have been masked.
    """

    def __init__(self) -> None:
        self._at: float | None = None
        self._compared = 0
        self._last: GroupCounts | None = None
        self._renewed: set[int] = set()
        self._keys = np.zeros((0, 3), np.uint8)
        self._data = np.zeros((0, 0), np.uint32)
        # By [chip, channel], since the io_group began anew: packets before; spans with packets; _time and _seen at the
        # channel's last packet.
        self._before = np.zeros((0, 0), np.uint32)
        self._spans, self._last_time, self._last_seen = np.zeros((3, 0, 0), np.float32)
        # Of each io_group, since it began anew: seconds with seen packets, packets seen, and all packets.
        self._time, self._seen, self._packets = np.zeros((3, IO_GROUPS))
        self._rates: deque[NDArray[np.float32]] = deque(maxlen=SPANS)
        self._fractions: deque[float] = deque(maxlen=SPANS)  # the lowest of the io_groups
        self._hottest: list[ChannelRate] = []
        self._dead_channels = 0
        self._dead: list[ChannelRate] = []

    def renew(self, io_groups: set[int]) -> None:
        """Begin anew with these io_groups at the next comparison, because their chips were configured."""
        self._renewed |= io_groups

    def is_due(self, now: float) -> bool:
        """Whether SPAN seconds have passed since the last comparison. `now`: time.monotonic()."""
        return self._at is None or now - self._at >= SPAN

    def compare(self, now: float, chips: NDArray[np.uint8], data: NDArray[np.uint32], counts: GroupCounts) -> None:
        """Compare with the last counts. `chips`: io_group, io_channel and chip_id of the chips, shape (n, 3).

        `data`: data packets by [chip, channel], modulo 2^32. Chips keep their index; new ones come at the end.
        """
        self._grow(chips, data)
        last, at = self._last, self._at
        self._last, self._at = counts, now
        if last is None or at is None:
            self._data, self._before = data, data.copy()
            return
        new = (data - self._data).astype(np.float32)
        self._data = data
        seen, packets, writes = (present - earlier for present, earlier in zip(counts, last, strict=True))
        self._time += np.where(seen, now - at, 0.0)
        self._seen += seen
        self._packets += np.maximum(seen, packets)
        self._note_last(new > 0)
        renewed = writes > 0
        renewed[list(self._renewed)] = True
        self._renewed.clear()
        if renewed.any():
            self._begin_anew(renewed)
        self._compared += 1
        if self._compared % SPANS == 0 or renewed.any():
            self._find_dead()
        fraction = np.ones(IO_GROUPS)
        np.divide(seen, packets, out=fraction, where=packets > seen)
        self._fractions.append(float(np.min(fraction)))
        self._rates.append(_lowest_rates(new, fraction[self._keys[:, 0]], now - at))
        self._find_hottest()

    def hottest(self) -> list[ChannelRate] | None:
        """Return the channels with the highest rates (the lowest of SPANS spans), at most HOTTEST; None: unknown."""
        return self._hottest if self._is_known() else None

    def dead(self) -> tuple[int | None, list[ChannelRate]]:
        """Return the number of dead channels, None: unknown, and HOTTEST of them with the rates that they had."""
        return (self._dead_channels, self._dead) if self._is_known() else (None, [])

    def _is_known(self) -> bool:
        return len(self._fractions) == SPANS and min(self._fractions) >= MIN_SEEN

    def _grow(self, chips: NDArray[np.uint8], data: NDArray[np.uint32]) -> None:
        self._keys = chips
        if data.shape != self._data.shape:
            self._data = _grown(self._data, data.shape)
            self._before = _grown(self._before, data.shape)
            self._spans = _grown(self._spans, data.shape)
            self._last_time = _grown(self._last_time, data.shape)
            self._last_seen = _grown(self._last_seen, data.shape)
            self._rates = deque((_grown(rates, data.shape) for rates in self._rates), SPANS)

    def _note_last(self, active: NDArray[np.bool_]) -> None:
        self._spans += active
        for array, present in ((self._last_time, self._time), (self._last_seen, self._seen)):
            step = present[self._keys[:, 0]].astype(np.float32)[:, None] - array
            step *= active  # three times as fast as a mask, when half of the channels are active
            array += step

    def _begin_anew(self, renewed: NDArray[np.bool_]) -> None:
        for totals in (self._time, self._seen, self._packets):
            totals[renewed] = 0.0
        chips = renewed[self._keys[:, 0]]
        self._before[chips] = self._data[chips]
        for array in (self._spans, self._last_time, self._last_seen):
            array[chips] = 0.0

    def _find_dead(self) -> None:
        group = self._keys[:, 0]
        # The test of the time alone, for all channels, leaves few.
        expected = self._time[group].astype(np.float32)[:, None] - self._last_time
        expected *= self._spans
        possible = expected >= MIN_SPANS * self._last_time
        possible &= self._spans >= MIN_SPANS
        chip, channel = np.nonzero(possible)
        last_seen = self._last_seen[chip, channel]
        dead = self._spans[chip, channel] * (self._seen[group[chip]] - last_seen) >= MIN_SPANS * last_seen
        chip, channel = chip[dead], channel[dead]
        packets = (self._data[chip, channel] - self._before[chip, channel]) / self._last_time[chip, channel]
        rates = packets * (self._packets / np.maximum(self._seen, 1.0))[group[chip]]
        self._dead_channels = len(rates)
        self._dead = [self._named(chip[i], channel[i], rates[i]) for i in _highest(rates, HOTTEST)]

    def _find_hottest(self) -> None:
        if len(self._rates) < SPANS or not self._data.size:
            return
        rates = functools.reduce(np.minimum, self._rates)
        # The highest channels are on the chips with the highest channels.
        chips = _highest(rates.max(axis=1), HOTTEST)
        highest = rates[chips]
        chip, channel = np.divmod(_highest(highest.ravel(), HOTTEST), rates.shape[1])
        found = zip(chips[chip], channel, highest[chip, channel], strict=True)
        self._hottest = [self._named(*each) for each in found if each[2] > 0.0]

    def _named(self, chip: Any, channel: Any, rate: Any) -> ChannelRate:
        io_group, io_channel, chip_id = self._keys[chip].tolist()
        return ChannelRate(f"{io_group}-{io_channel}-{chip_id}-{channel}", round(float(rate), 3))


def _lowest_rates(new: NDArray[np.float32], fraction: NDArray[np.float64], seconds: float) -> NDArray[np.float32]:
    """Return the lowest rates (Hz) that are likely with `new` packets seen, of which a chip's `fraction` was seen."""
    counts = new
    sampled = np.flatnonzero(fraction < 1.0)
    if len(sampled):
        counts = new.copy()
        part = counts[sampled]
        missing = (1.0 - fraction[sampled]).astype(np.float32)[:, None]
        counts[sampled] = np.maximum(part - np.float32(_DEVIATIONS) * np.sqrt(part * missing), 0.0)
    factors = np.zeros(len(fraction))
    np.divide(1.0 / seconds, fraction, out=factors, where=fraction > 0.0)
    rates: NDArray[np.float32] = counts * factors.astype(np.float32)[:, None]
    return rates


def _highest(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Return the indices of the `count` highest values, the highest first."""
    found = np.argpartition(values, -count)[-count:] if len(values) > count else np.arange(len(values))
    return found[np.argsort(-values[found], kind="stable")]


def _grown(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of this shape that begins with `array`, followed by 0."""
    grown = np.zeros(shape, array.dtype)
    grown[: array.shape[0], : array.shape[1]] = array
    return grown
