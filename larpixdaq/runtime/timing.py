"""Absolute schedules: how much is due by now, without drift, and when what recurs is due again.

How busy this process is: what `status` shows of it.

How much anybody may write into a log: a flood from one sender must neither fill a disk nor hide what others say.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil, floor
from typing import Final

#: Shares are those of spans of at least so long (seconds).
SPAN = 1.0
#: Maximum number of names that have an allowance of their own; further ones share one.
_NAMES: Final = 256


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


class Load:
    """Processor time over time. To be asked in the main loop's thread, as often as one likes."""

    def __init__(self) -> None:
        self._before = self._now()
        self._shares = {"loop": 0.0, "process": 0.0}

    def shares(self) -> dict[str, float]:
        """Of the last span: `loop`, the share of one core that the main loop has used, 1 when it has no time left;
        `process`, the cores that all threads have used together."""
        if time.monotonic() - self._before[0] < SPAN:
            return self._shares
        now = self._now()
        span, loop, process = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        self._shares = {"loop": round(loop / span, 3), "process": round(process / span, 3)}
        return self._shares

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), time.thread_time(), time.process_time()


def load_words(shares: dict[str, float]) -> str:
    """ "CPU 8 %, can take at least 13 times this rate": as far as the main loop goes, if there are cores for it."""
    loop, process = shares["loop"], shares["process"]
    if loop < 0.05:
        return f"CPU {process:.0%}"
    if loop > 0.95:
        return f"CPU {process:.0%}, at its limit"
    times = f"{1 / loop:.1f}" if loop > 0.1 else f"{int(1 / loop)}"
    return f"CPU {process:.0%}, can take at least {times} times this rate"


class _Allowance:
    """`burst` bytes at once, and `rate` bytes a second after that."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._since = burst, now

    def covers(self, size: int, now: float) -> bool:
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now
        return self._left >= size

    def take(self, size: int) -> None:
        self._left -= size


class Throttle:
    """Decides for each line whether it is written, and counts the lines that are not."""

    def __init__(
        self, rate: float, burst: float, *, shares: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Each name may write `burst` bytes at once and `rate` bytes a second; all together `shares` times as much."""
        self._rate, self._burst, self._clock = rate, burst, clock
        self._all = _Allowance(rate * shares, burst * shares, clock())
        self._names: dict[str, _Allowance] = {}
        #: Lines of each name that were held back and not told yet.
        self._held: dict[str, int] = {}
        #: Lines that were held back since the start.
        self.held = 0

    def passes(self, name: str, size: int) -> bool:
        """Whether `name` may write this many bytes now."""
        now = self._clock()
        if name not in self._names and len(self._names) >= _NAMES:
            name = ""
        own = self._names.get(name) or self._names.setdefault(name, _Allowance(self._rate, self._burst, now))
        if own.covers(size, now) and self._all.covers(size, now):
            own.take(size)
            self._all.take(size)
            return True
        self.held += 1
        self._held[name] = self._held.get(name, 0) + 1
        return False

    def told(self) -> list[str]:
        """A sentence for each name whose lines were held back since the last call."""
        held, self._held = self._held, {}
        return [
            f"{count} lines{f' of {name}' if name else ''} were not written: too many" for name, count in held.items()
        ]
