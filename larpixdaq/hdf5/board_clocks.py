"""Time stamps of a file: steps from row to row, resets and rollovers, offsets between boards, and SYNC intervals.

The clock of an io_group is that of its board, by the receipt time of its packets and the times of its SYNC and trigger
words. Boards without such times (serial boards, v1 chips) have the times of their chips instead, which come out of
order when FIFOs are emptied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.schema import PacketType

#: Nominal frequency of the boards' and chips' clocks.
TICKS_PER_S: Final = 10_000_000
#: Kinds of SYNC words, by their code in `trigger_type`.
SYNC_KINDS: Final = {83: "reset", 72: "heartbeat", 67: "other clock source"}
_RESET: Final = 83
_HEARTBEAT: Final = 72
#: Bins of the histogram of steps, two an octave, from 1 to 2^32 ticks.
STEP_BINS: Final = 64
#: Minimum backward step that is a reset of the clock, if the clock also falls to less than half.
_RESET_TICKS: Final = 10_000
#: A row after a reset is late if its time is at most this number of ticks before that of the last row before the reset.
_LATE_TICKS: Final = 100_000
#: Points that are kept of each series, at most twice as many for a while.
_POINTS: Final = 2048
#: Points that one piece of rows gives to the series of an io_group.
_POINTS_OF_PIECE: Final = 16
_WRAP_32: Final = 1 << 32


class Series:
    """Points (x, y) of a series, thinned evenly to at most 4096, with number, minimum, maximum and mean of all y."""

    def __init__(self) -> None:
        self.count = 0
        self.low = np.inf
        self.high = -np.inf
        self._sum = 0.0
        self._stride = 1
        self._x: list[NDArray[np.float64]] = []
        self._y: list[NDArray[np.float64]] = []

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        if not len(y):
            return
        first = -self.count % self._stride
        self.count += len(y)
        self.low, self.high = min(self.low, float(y.min())), max(self.high, float(y.max()))
        self._sum += float(y.sum(dtype=np.float64))
        self._x.append(x[first :: self._stride].astype(np.float64))
        self._y.append(y[first :: self._stride].astype(np.float64))
        while sum(map(len, self._y)) > 2 * _POINTS:
            self._x, self._y = [np.concatenate(self._x)[::2]], [np.concatenate(self._y)[::2]]
            self._stride *= 2

    @property
    def mean(self) -> float | None:
        return self._sum / self.count if self.count else None

    def points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return x and y of the points that were kept, each of shape (n,)."""
        return np.concatenate([np.zeros(0), *self._x]), np.concatenate([np.zeros(0), *self._y])


@dataclass
class SyncWords:
    """SYNC words of one kind of an io_group: their number, and intervals (s) against unix time.

    The interval of a reset is the time that the clock had reached. That of a heartbeat is the time since the previous
    one, known only where all rows between the two were read. Words of other kinds have no intervals.
    """

    kind: str
    words: int = 0
    intervals: Series = field(default_factory=Series)


@dataclass
class Clock:
    """The clock of one io_group. Ticks are those of the nominal 10 MHz; steps lead from a row to the next one read.

    `source`: "board" or "chips". `offset`: seconds by which the clock is ahead of that of the reference io_group,
    modulo `period` seconds, with an uncertainty of `offset_error`; None: not known.
    """

    io_group: int
    source: str = "board"
    steps: int = 0
    backward: int = 0  # without resets and rollovers
    largest_backward: int = 0  # ticks
    resets: int = 0
    rollovers: int = 0
    largest_gap: int = 0  # ticks, forward
    histogram: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(STEP_BINS, np.uint64))  # of forward steps
    points: Series = field(default_factory=Series)  # unix s -> ticks
    sync: dict[int, SyncWords] = field(default_factory=dict)  # by code
    period: float | None = None
    offset: float | None = None
    offset_error: float | None = None
    deviation: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    # State from piece to piece: the last ticks, and the last SYNC word (code, ticks).
    last: int | None = None
    last_sync: tuple[int, int] | None = None


class BoardClocks:
    """Follows the clocks of all io_groups through pieces of rows. `chip_bits`: bits of the chips' time stamps."""

    def __init__(self, chip_bits: int) -> None:
        self._chip_bits = chip_bits
        self._clocks: dict[tuple[int, str], Clock] = {}

    def add(
        self,
        rows: NDArray[Any],
        groups: NDArray[Any],
        packets: NDArray[np.bool_],
        times: NDArray[np.float64],
        joined: bool,
    ) -> None:
        """Take rows of a layout of schema.LAYOUTS, in the order of the file.

        `groups`: their io_groups; `packets`: which are packets from chips; `times`: unix s, NaN where not known;
        `joined`: they follow the rows of the last call without a gap.
        """
        if not joined:
            for clock in self._clocks.values():
                clock.last = clock.last_sync = None
        v1 = "type" in (rows.dtype.names or ())
        types = rows["type" if v1 else "packet_type"]
        board_words = (types == PacketType.SYNC) | (types == PacketType.TRIGGER)
        stamps = rows["timestamp"].astype(np.int64)
        receipts = np.zeros(len(rows), np.int64) if v1 else rows["receipt_timestamp"].astype(np.int64)
        chip_times = packets & (types <= PacketType.TEST)
        used = np.flatnonzero(packets | board_words)
        used = used[np.argsort(groups[used], kind="stable")]
        present, starts = np.unique(groups[used], return_index=True)
        for group, own in zip(present.tolist(), np.split(used, starts)[1:], strict=True):
            own_packets = packets[own]
            if own_packets.any() and not receipts[own[own_packets]].any():
                own = own[chip_times[own]]
                ticks = stamps[own] % self._chip_period()
                self._add_steps(self._clock(group, "chips"), ticks, times[own], self._chip_period())
                continue
            ticks = np.where(board_words[own], stamps[own], receipts[own])
            self._add_steps(self._clock(group, "board"), ticks, times[own], _WRAP_32)
        sync = np.flatnonzero(types == PacketType.SYNC)
        if len(sync):
            codes = rows["register" if v1 else "trigger_type"][sync]
            for group in np.unique(groups[sync]).tolist():
                own = groups[sync] == group
                self._add_sync(self._clock(group, "board"), codes[own], stamps[sync[own]], times[sync[own]])

    def _clock(self, io_group: int, source: str) -> Clock:
        key = io_group, source
        if key not in self._clocks:
            self._clocks[key] = Clock(io_group, source)
        return self._clocks[key]

    def _chip_period(self) -> int:
        return 1 << self._chip_bits

    def _add_steps(self, clock: Clock, ticks: NDArray[np.int64], times: NDArray[np.float64], wrap: int) -> None:
        if not len(ticks):
            return
        chosen = np.flatnonzero(np.isfinite(times))
        chosen = chosen[:: max(1, len(chosen) // _POINTS_OF_PIECE)]
        clock.points.add(times[chosen], ticks[chosen])
        if clock.last is not None:
            ticks = np.concatenate(([clock.last], ticks))
        clock.last = int(ticks[-1])
        before, after = ticks[:-1], ticks[1:]
        steps = after - before
        if not len(steps):
            return
        # A late row after a rollover seems to lead far ahead, back over the rollover.
        low = (before < wrap) & (after < wrap)
        forward, backward = low & (steps < -(wrap // 2)), low & (steps > wrap // 2)
        steps[forward] += wrap
        steps[backward] -= wrap
        clock.rollovers += int(np.count_nonzero(forward)) - int(np.count_nonzero(backward))
        resets = np.zeros(len(steps), np.bool_)
        if clock.source == "board":
            resets = (steps < -_RESET_TICKS) & (2 * after < before)
        # Rows around a reset may be out of order: 9,999,990, 5, 9,999,995, 8 is one reset, and one late row.
        late = np.zeros(len(steps), np.bool_)
        late[1:] = resets[:-1] & (after[1:] > before[:-1] - _LATE_TICKS)
        late_rows = int(np.count_nonzero(late))
        clock.resets += int(np.count_nonzero(resets)) - late_rows
        back = (steps < 0) & ~resets
        clock.steps += len(steps)
        clock.backward += int(np.count_nonzero(back)) + late_rows
        if back.any():
            clock.largest_backward = max(clock.largest_backward, -int(np.min(steps[back])))
        ahead = steps[(steps > 0) & ~late]
        if len(ahead):
            clock.largest_gap = max(clock.largest_gap, int(np.max(ahead)))
            bins = np.minimum((2 * np.log2(ahead)).astype(np.intp), STEP_BINS - 1)
            clock.histogram += np.bincount(bins, minlength=STEP_BINS).astype(np.uint64)

    def _add_sync(
        self, clock: Clock, codes: NDArray[Any], ticks: NDArray[np.int64], times: NDArray[np.float64]
    ) -> None:
        for code in np.unique(codes).tolist():
            words = clock.sync.setdefault(code, SyncWords(SYNC_KINDS.get(code, f"code {code}")))
            chosen = codes == code
            words.words += int(np.count_nonzero(chosen))
            if code == _RESET:
                words.intervals.add(times[chosen], ticks[chosen] / TICKS_PER_S)
        timed = np.isin(codes, (_RESET, _HEARTBEAT))
        codes, ticks, times = codes[timed].astype(np.int64), ticks[timed], times[timed]
        if clock.last_sync is not None:
            codes = np.concatenate(([clock.last_sync[0]], codes))
            ticks = np.concatenate(([clock.last_sync[1]], ticks))
            times = np.concatenate(([np.nan], times))
        if len(codes):
            clock.last_sync = int(codes[-1]), int(ticks[-1])
        pairs = (codes[:-1] == _HEARTBEAT) & (codes[1:] == _HEARTBEAT)
        intervals = (ticks[1:] - ticks[:-1])[pairs]
        intervals[intervals < 0] += _WRAP_32
        if _HEARTBEAT in clock.sync:
            clock.sync[_HEARTBEAT].intervals.add(times[1:][pairs], intervals / TICKS_PER_S)

    def result(self) -> list[Clock]:
        """Return the clock of each io_group, sorted, with offsets to the io_group with the most points."""
        clocks: dict[int, Clock] = {}
        for (io_group, _), clock in sorted(self._clocks.items()):
            other = clocks.get(io_group)
            if other is None or clock.steps > other.steps:
                if other is not None:
                    clock.sync = clock.sync or other.sync
                clocks[io_group] = clock
        _find_offsets(list(clocks.values()))
        return list(clocks.values())


def _find_offsets(clocks: list[Clock]) -> None:
    """Compare the clocks with each other, by the times of their rows on the hosts of the producers."""
    for clock in clocks:
        clock.period = _period(clock)
    known = [clock for clock in clocks if clock.period is not None and clock.points.count]
    if not known:
        return
    reference = max(known, key=lambda clock: clock.points.count)
    start = float(np.min(reference.points.points()[0]))
    period = reference.period or 0.0
    base, base_error = _middle(_phases(reference, start, 0.0, period))
    if base_error >= period / 8:
        return
    for clock in known:
        phases = _phases(clock, start, base, period)
        middle, error = _middle(phases)
        if clock.period == period and error < period / 8:
            clock.offset = _within(middle, period)
            clock.offset_error = error + (base_error if clock is not reference else 0.0)
            clock.deviation = clock.points.points()[0], phases


def _period(clock: Clock) -> float | None:
    """Return after how many seconds a clock begins again; None: irregular. Clocks of 64 bits never do."""
    if clock.source == "chips":
        return None
    high = clock.points.high
    resets = clock.sync.get(_RESET)
    if resets is not None and resets.intervals.count:
        seconds = resets.intervals.mean or 0.0
        whole = round(seconds)
        return float(whole) if whole and abs(seconds - whole) < 0.01 * whole else None
    if clock.resets:
        return None
    return _WRAP_32 / TICKS_PER_S if high < _WRAP_32 else float(1 << 40)


def _phases(clock: Clock, start: float, base: float, period: float) -> NDArray[np.float64]:
    """Return clock minus host time minus `base` (s) of each point, without jumps by the period."""
    times, ticks = clock.points.points()
    phases = _within(ticks / TICKS_PER_S - (times - start) - base, period)
    return np.asarray(_within(phases - phases[0], period) + phases[0], np.float64)


def _middle(phases: NDArray[np.float64]) -> tuple[float, float]:
    """Return the median, and half the width of the central 80 %."""
    low, middle, high = np.quantile(phases, (0.1, 0.5, 0.9))
    return float(middle), float(high - low) / 2


def _within(seconds: Any, period: float) -> Any:
    """Return seconds modulo the period, between minus and plus half of it."""
    return (seconds + period / 2) % period - period / 2
