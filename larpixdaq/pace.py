"""Absolute schedules: how much is due by now, without drift, and when what recurs is due again."""

from __future__ import annotations

from math import ceil, floor


def next_beat(now: float, period: float) -> float:
    """The first multiple of `period` after `now` (time.monotonic(), seconds).

    All processes of a host read the same monotonic clock, so what each of them does in this rhythm comes to whoever
    hears them within a millisecond or two: it wakes once for all of it, and not once for each.
    """
    return (floor(now / period) + 1) * period


def wait_ms(until: float, now: float) -> int:
    """For poll(): milliseconds from `now` to `until`, rounded up, so that it does not wake before what is due."""
    return max(0, ceil((until - now) * 1000))


class Pace:
    """How many words are due at `rate` words/s since the first due(). Times are of time.monotonic(), in seconds.

    One that is later than `most_late` seconds does not make up for the rest any more, or a stall would end in a long
    burst.
    """

    def __init__(self, rate: float, most_late: float = 1.0) -> None:
        self.rate = rate
        self._most_late = most_late
        self._made = 0
        self._start = 0.0
        self._paused: float | None = 0.0

    def due(self, now: float) -> int:
        if self._paused is not None:
            self._start += now - self._paused
            self._paused = None
        late = now - self._start - self._made / self.rate - self._most_late
        if late > 0:
            self._start += late
        return max(0, int((now - self._start) * self.rate) - self._made)

    def made(self, words: int) -> None:
        self._made += words

    def pause(self, now: float) -> None:
        """The time from now to the next due() does not count."""
        if self._paused is None:
            self._paused = now

    def when(self, words: int) -> float:
        """When `words` words more will be due."""
        return self._start + (self._made + words) / self.rate
