"""Schedules without drift, the processor load of a process, and limits for the lines of a log.

The limits keep a flood of lines from one sender from filling the disk, or from hiding the lines of others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from math import ceil, floor
from typing import Final

#: Minimum seconds over which processor time is averaged.
SPAN = 1.0
#: Seconds over which the rate of a count is averaged.
RATE_SPAN = 5.0
#: Maximum number of names that have used up a part of their own allowance; all further names share one.
_NAMES: Final = 256


def next_beat(now: float, period: float) -> float:
    """Return the first multiple of `period` after `now` (time.monotonic(), seconds).

    All processes of a host read the same monotonic clock, so that their messages arrive within a millisecond or two.
    The receiver then wakes once for all messages, not once for each.
    """
    return (floor(now / period) + 1) * period


def wait_ms(until: float, now: float) -> int:
    """Return the milliseconds from `now` to `until` for poll(), rounded up, so that it does not wake too early."""
    return max(0, ceil((until - now) * 1000))


class Pace:
    """Schedule of words at `rate` words/s from the first due() on. Times are those of time.monotonic(), in seconds.

    Words that are late by more than `max_delay` seconds are left out, so that a long burst does not follow a stall.
    """

    def __init__(self, rate: float, max_delay: float = 1.0) -> None:
        self.rate = rate
        self._max_delay = max_delay
        self._made = 0
        self._start = 0.0
        self._paused: float | None = 0.0

    def due(self, now: float) -> int:
        """Return the number of words that are due and not yet made."""
        if self._paused is not None:
            self._start += now - self._paused
            self._paused = None
        late = now - self._start - self._made / self.rate - self._max_delay
        if late > 0:
            self._start += late
        return max(0, int((now - self._start) * self.rate) - self._made)

    def add_made(self, words: int) -> None:
        """Count words that were made."""
        self._made += words

    def pause(self, now: float) -> None:
        """Stop the schedule until the next due()."""
        if self._paused is None:
            self._paused = now

    def time_of(self, words: int) -> float:
        """Return the time at which `words` words will be due."""
        return self._start + (self._made + words) / self.rate


class Load:
    """Processor load of this process and of its main loop. Call its methods in the thread of the main loop."""

    def __init__(self) -> None:
        self._last = self._read_times()
        self._shares = {"loop": 0.0, "process": 0.0}

    def shares(self) -> dict[str, float]:
        """Return processor time per second, averaged over the last SPAN seconds or more.

        `loop`: of the main loop, 1 if it has no time left. `process`: of all threads together, in processor cores.
        """
        if time.monotonic() - self._last[0] < SPAN:
            return self._shares
        now = self._read_times()
        span, loop, process = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        self._shares = {"loop": round(loop / span, 3), "process": round(process / span, 3)}
        return self._shares

    @staticmethod
    def _read_times() -> tuple[float, float, float]:
        return time.monotonic(), time.thread_time(), time.process_time()


class CountRate:
    """Mean rate of a count over the last seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def per_second(self, count: int) -> float | None:
        """Return how fast the count has grown to its present value, over the last RATE_SPAN seconds; None while that
        is not known. Call this repeatedly. After a count that is lower than before it begins anew."""
        now = time.monotonic()
        if self._points and count < self._points[-1][1]:
            self._points.clear()
        self._points.append((now, count))
        while len(self._points) > 2 and self._points[1][0] <= now - RATE_SPAN:
            self._points.popleft()
        first, before = self._points[0]
        return (count - before) / (now - first) if now - first >= SPAN else None


def load_text(shares: dict[str, float]) -> str:
    """Return text such as "CPU 8%, can take at least 13 times this rate".

    The factor counts the time of the main loop, and assumes that other threads find free processor cores.
    """
    loop, process = shares["loop"], shares["process"]
    if loop < 0.05:
        return f"CPU {process:.0%}"
    if loop > 0.95:
        return f"CPU {process:.0%}, at its limit"
    times = f"{1 / loop:.1f}" if loop > 0.1 else f"{int(1 / loop)}"
    return f"CPU {process:.0%}, can take at least {times} times this rate"


class _Allowance:
    """Allowance of `burst` bytes at once, and `rate` bytes a second after that."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._since = burst, now

    def covers(self, size: float, now: float) -> bool:
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now
        return self._left >= size

    def is_whole(self, now: float) -> bool:
        return self.covers(self._burst, now)

    def take(self, size: int) -> None:
        self._left -= size


class Throttle:
    """Decides for each line whether it is written, and counts the dropped lines."""

    def __init__(
        self, rate: float, burst: float, *, shares: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Allow each name `burst` bytes at once and `rate` bytes a second, and all together `shares` times as much."""
        self.rate, self._burst, self._clock = rate, burst, clock
        self._all = _Allowance(rate * shares, burst * shares, clock())
        self._names: dict[str, _Allowance] = {}
        self._forget_at = 0.0
        #: Dropped lines of each name since the last summaries().
        self._unreported: dict[str, int] = {}
        #: Dropped lines since the start.
        self.dropped = 0

    def passes(self, name: str, size: int) -> bool:
        """Return whether `name` may write this many bytes now."""
        now = self._clock()
        if name not in self._names and len(self._names) >= _NAMES:
            self._forget_idle(now)
            if len(self._names) >= _NAMES:
                name = ""
        own = self._names.get(name) or self._names.setdefault(name, _Allowance(self.rate, self._burst, now))
        if own.covers(size, now) and self._all.covers(size, now):
            own.take(size)
            self._all.take(size)
            return True
        self.dropped += 1
        if name not in self._unreported and len(self._unreported) >= _NAMES:
            name = ""
        self._unreported[name] = self._unreported.get(name, 0) + 1
        return False

    def _forget_idle(self, now: float) -> None:
        """Forget the names that have their whole allowance again, at most once a second."""
        if now >= self._forget_at:
            self._forget_at = now + 1.0
            self._names = {name: own for name, own in self._names.items() if not own.is_whole(now)}

    def summaries(self) -> list[str]:
        """Return a sentence for each name with dropped lines since the last call."""
        dropped, self._unreported = self._unreported, {}
        return [
            f"{count} lines{f' of {name}' if name else ''} were not written: too many"
            for name, count in dropped.items()
        ]
