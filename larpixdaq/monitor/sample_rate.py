"""How many of the blocks the monitor takes, so that it does not use up the processors of its host.

Producers send it one of each `every` blocks, chosen at random: an even sample of all boards and of all times, as long
as `every` changes slowly. A monitor that takes what it can would see more of a quiet second than of a busy one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

#: Maximum part of the host's processors that the monitor uses for blocks while it sees only a part of them.
SHARE: Final = 0.07
#: Seconds between two measurements, and after a pause of the monitor's loop that makes one void.
PERIOD: Final = 0.25
_PAUSE: Final = 1.0
#: Weight of the earlier measurements in each new one: those of the last half second count.
_WEIGHT: Final = 0.6
#: Maximum factors by which `every` grows or shrinks with a measurement.
_GROWTH: Final = 2.0
_DECAY: Final = 0.8
#: Part of the wanted rows below which the blocks have come too fast for the credit.
_TOO_FEW: Final = 0.75


class SampleRate:
    """`every`: one of so many blocks is wanted."""

    def __init__(self, processors: int) -> None:
        self.every = 1.0
        self._limit = SHARE * processors
        self._last = np.zeros(4)
        #: Seconds, processor time, rows seen, all rows, and wanted rows, with the weights of their times.
        self._sums = np.zeros(5)

    def due(self, now: float) -> bool:
        return now - float(self._last[0]) >= PERIOD

    def measure(self, now: float, processor: float, seen: int, rows: int) -> None:
        """Take the time (s), the processor time for blocks so far (s), and the rows seen and made so far."""
        present = np.array([now, processor, seen, rows])
        passed, self._last = present - self._last, present
        if np.min(passed) < 0 or passed[0] > _PAUSE:
            return  # another run, or the loop has paused
        if not passed[2]:
            self.every = max(1.0, _DECAY * self.every)
            return
        self._sums = _WEIGHT * self._sums + [*passed, passed[3] / self.every]
        seconds, used, seen_rows, all_rows, wanted = self._sums
        every = all_rows / seen_rows * used / seconds / self._limit
        if seen_rows < _TOO_FEW * wanted:
            every = max(every, all_rows / seen_rows)
        self.every = float(max(1.0, min(max(every, _DECAY * self.every), _GROWTH * self.every)))
