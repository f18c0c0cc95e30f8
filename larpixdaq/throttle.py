"""How much anybody may write into a log: a flood from one sender must neither fill a disk nor hide what others say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: Maximum number of names that have an allowance of their own; further ones share one.
_NAMES: Final = 256


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
