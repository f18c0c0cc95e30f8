"""How much room the disk has, and for how long at the rate at which the files grow."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from larpixdaq.states import MIN_FREE

#: Nothing is written that would leave less than this, bytes: what was begun needs room to be ended, and what is
#: looked at every LOOK seconds may shrink by what a fast disk takes meanwhile.
RESERVE: Final = MIN_FREE
#: Writing goes on when there is so much more than that: a file that is removed piece by piece must not make us
#: stop and go.
_MORE: Final = 16 << 20
LOOK: Final = 0.1
#: Seconds over which the rate is taken: files grow in steps.
_SPAN: Final = 10.0


class Space:
    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self._clock = clock
        self._free = 0
        #: Why the directory cannot be asked for its space; empty when it can.
        self.trouble = ""
        self._looked: float | None = None
        self._grown: deque[tuple[float, int]] = deque()

    def free(self) -> int:
        """Bytes that we may still write, as of now."""
        self._looked = self._clock()
        try:
            found = os.statvfs(self.directory)
        except OSError as error:  # the disk is away: no room is what that means
            self._free, self.trouble = 0, error.strerror or str(error)
        else:
            self._free, self.trouble = found.f_bavail * found.f_frsize, ""
        return self._free

    def enough(self, *, again: bool = False) -> bool:
        """Whether there is room to write, as of at most LOOK seconds ago; `again`: after there has been none."""
        if self._looked is None or self._clock() - self._looked >= LOOK:
            self.free()
        return self._free >= RESERVE + (_MORE if again else 0)

    def grown(self, total: int) -> None:
        """Our files have `total` bytes by now, in all; to be called every now and then."""
        now = self._clock()
        self._grown.append((now, total))
        while now - self._grown[0][0] > _SPAN:
            self._grown.popleft()

    def bytes_per_second(self) -> int:
        """Over the last ten seconds."""
        if len(self._grown) < 2:
            return 0
        (first, before), (last, after) = self._grown[0], self._grown[-1]
        return max(0, round((after - before) / max(last - first, LOOK)))

    def seconds_left(self) -> int | None:
        """Until there is no room left at this rate; None while nothing grows."""
        rate = self.bytes_per_second()
        return max(0, self._free - RESERVE) // rate if rate else None
