"""The offset of a board's clock from the host's, and its drift, from the times in the headers of its messages.

A header was written before its message had reached us, so the clock is ahead of ours by at least their difference, and
by no more than the difference from our last look at an empty socket, plus a second where whole seconds are written.
The second bound does not know of messages that the network held up.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

#: Readings of the last minute say what the offset is now.
_KEPT: Final = 60
#: Seconds between two minutes from which a drift is worked out, at least.
_APART: Final = 120.0
#: A reading that misses the ones before by so much (seconds) is that of a clock that was set.
_SET: Final = 0.5
#: Readings one after the other that are so much too late before the clock is taken to be set: messages may be held up.
_LATE: Final = 20


class ClockReading(NamedTuple):
    """Seconds that the board's clock is ahead of the host's, and parts per million by which it runs faster, each with
    half of the interval in which it lies; `drift` None: not known yet."""

    offset: float
    offset_uncertainty: float
    drift: float | None = None
    drift_uncertainty: float = 0.0

    def __str__(self) -> str:
        digits = max(0, min(6, 1 - math.floor(math.log10(max(self.offset_uncertainty, 1e-6)))))
        text = f"clock {self.offset:+.{digits}f} ± {self.offset_uncertainty:.2g} s from the host's"
        if self.drift is None:
            return text
        return f"{text}, drift {self.drift:+.1f} ± {self.drift_uncertainty:.2g} ppm"

    def beyond(self, limit: float) -> bool:
        """Whether the offset is larger than so many seconds for certain."""
        return abs(self.offset) - self.offset_uncertainty > limit


class BoardClock:
    """One board's clock; times are monotonic seconds."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, float, float]] = deque(maxlen=_KEPT)  # time, bounds of the offset (seconds)
        self._first: tuple[float, float, float] | None = None  # the same of the first minute
        self._late = 0  # readings one after the other that say that the clock was set back

    def take(self, now: float, bounds: tuple[float, float] | None) -> None:
        """Take what a decoder's clock_bounds() says, once a second."""
        if bounds is None:
            return
        low, high = bounds[0] / 1e9, bounds[1] / 1e9
        known = self._bounds()
        self._late = self._late + 1 if known is not None and high < known[0] - _SET else 0
        if known is not None and (low > known[1] + _SET or self._late >= _LATE):
            self._readings.clear()
            self._first, self._late = None, 0
        self._readings.append((now, low, high))
        if self._first is None and now - self._readings[0][0] >= _KEPT / 2:
            self._first = (now, *self._interval())

    def reading(self) -> ClockReading | None:
        """What is known by now; None before the first header."""
        if not self._readings:
            return None
        low, high = self._interval()
        offset, uncertainty = (low + high) / 2, (high - low) / 2
        now = self._readings[-1][0]
        if self._first is None or now - self._first[0] < _APART:
            return ClockReading(offset, uncertainty)
        then, first_low, first_high = self._first
        passed = (now - then) / 1e6
        drift = (offset - (first_low + first_high) / 2) / passed
        return ClockReading(offset, uncertainty, drift, (uncertainty + (first_high - first_low) / 2) / passed)

    def _bounds(self) -> tuple[float, float] | None:
        return self._interval() if self._readings else None

    def _interval(self) -> tuple[float, float]:
        """In which the offset lies, by the last minute. An upper bound below a lower one is that of a message that was
        held up."""
        low = max(one[1] for one in self._readings)
        highs = [one[2] for one in self._readings]
        # All of them held up: by about as much as the bounds miss each other.
        high = min((one for one in highs if one >= low), default=min(2 * low - max(highs), low + 1.0))
        return (low, high) if high < math.inf else (low, low + 1.0)
