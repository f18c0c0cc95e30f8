"""When recorded messages came: from the seconds of their headers and the ticks of their receipt timestamps."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Seconds per tick of a board's 10 MHz master clock.
TICK: Final = 1e-7
#: A longer pause (or a step back) of a board's clock is taken as none: a file may hold several runs, or a broken
#: header.
LONGEST_PAUSE: Final = 60


class Clock:
    """Times since the beginning, which never decrease. Every io_group has a clock of its own: boards' clocks differ."""

    def __init__(self) -> None:
        self._now = 0.0
        self._boards: dict[int, _Board] = {}

    def times(self, groups: NDArray[Any], seconds: NDArray[Any], ticks: NDArray[Any]) -> NDArray[np.float64]:
        """Times in seconds, shape (N,), of messages with these io_groups, unix seconds and ticks (-1: not known)."""
        times = np.full(len(groups), self._now)
        _, first = np.unique(groups, return_index=True)
        for place in np.sort(first):
            group = int(groups[place])
            board = self._boards.get(group)
            if board is None:
                board = self._boards[group] = _Board(float(times[:place].max(initial=self._now)))
            which = np.flatnonzero(groups == group)
            times[which] = board.times(seconds[which], ticks[which])
        np.maximum.accumulate(np.maximum(times, self._now), out=times)
        if len(times):
            self._now = float(times[-1])
        return times


class _Board:
    """The clock of one io_group: whole seconds from the headers, within a second the ticks since its first message."""

    def __init__(self, base: float) -> None:
        self._base = base  # time at which the current second began
        self._second = -1
        self._tick = -1  # the last one known, and in which second it was
        self._tick_second = -1
        self._ticks = 0  # since the first known tick of the current second

    def times(self, seconds: NDArray[Any], ticks: NDArray[Any]) -> NDArray[np.float64]:
        second = _filled(np.concatenate(([self._second], seconds)))
        step = np.diff(second)
        step[(step < 0) | (step > LONGEST_PAUSE) | (second[:-1] < 0)] = 0
        base = self._base + np.cumsum(step)
        tick = _filled(np.concatenate(([self._tick], ticks)))
        tick_second = _filled(np.concatenate(([self._tick_second], np.where(ticks >= 0, second[1:], -1))))
        passed = np.diff(tick)
        # A counter that was reset, or has rolled over, says nothing about the time that passed.
        passed[(passed < 0) | (passed > 1 / TICK) | (tick[:-1] < 0) | (np.diff(tick_second) != 0)] = 0
        since = self._ticks + np.cumsum(passed)
        begins = np.flatnonzero(np.diff(second))
        which = np.searchsorted(begins, np.arange(len(seconds)), side="right")
        since -= np.concatenate(([0], since[begins]))[which]
        self._base, self._second = float(base[-1]), int(second[-1])
        self._tick, self._tick_second, self._ticks = int(tick[-1]), int(tick_second[-1]), int(since[-1])
        # A second ends when the headers say so; without headers the ticks alone tell the time.
        times: NDArray[np.float64] = base + np.minimum(since * TICK, np.where(second[1:] < 0, np.inf, 0.999))
        return times


def _filled(values: NDArray[Any]) -> NDArray[np.int64]:
    """Each negative value replaced by the last one that is not."""
    values = values.astype(np.int64)
    last = np.maximum.accumulate(np.where(values >= 0, np.arange(len(values)), 0))
    return values[last]


def newer_format(data: NDArray[np.uint8], spans: NDArray[Any]) -> NDArray[np.bool_]:
    """Which messages are PACMAN messages of format 1.0, shape (N,)."""
    start, length = spans["start"].astype(np.int64), spans["length"].astype(np.int64)
    sized = length == 24 + _number(data, start + 4, 4)
    return np.asarray((length >= 24) & (_number(data, start + 2, 2) == 1) & sized, np.bool_)


def message_times(data: NDArray[np.uint8], spans: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Seconds of the headers of PACMAN messages of either format and ticks of their first words; -1 where there are
    none."""
    start, length = spans["start"].astype(np.int64), spans["length"].astype(np.int64)
    newer = newer_format(data, spans)
    seconds = np.where(newer, _number(data, start + 8, 8) // 10**9, _number(data, start + 1, 4))
    seconds[length < 8] = -1
    word = start + np.where(newer, 24, 8)
    ticks = np.where(newer, _number(data, word + 8, 7), _number(data, word + 2, 4))
    ticks[(word + np.where(newer, 24, 16) > start + length) | (_number(data, word, 1) != ord("D"))] = -1
    return seconds, ticks


def _number(data: NDArray[np.uint8], at: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The little-endian numbers of `size` bytes at these places; what would lie behind the end counts as 0."""
    padded = np.concatenate((data, np.zeros(1, np.uint8)))
    total = np.zeros(len(at), np.uint64)
    for i in range(size):
        total |= padded[np.minimum(at + i, len(data))].astype(np.uint64) << np.uint64(8 * i)
    return total.view(np.int64)
