"""When a part is full: `--rotate 5min`, `4GB`, `100Mrows`.

How much room the disk has, and for how long at the rate at which the files grow.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from larpixdaq.constants import MIN_FREE
from larpixdaq.runtime.units import BYTES, ROWS, SECONDS

_LIMIT: Final = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)")
#: Nothing is written that would leave less than this, bytes: what was begun needs room to be ended, and what is
#: looked at every LOOK seconds may shrink by what a fast disk takes meanwhile.
RESERVE: Final = MIN_FREE
#: Writing goes on when there is so much more than that: a file that is removed piece by piece must not make us
#: stop and go.
_MORE: Final = 16 << 20
LOOK: Final = 0.1
#: Seconds over which the rate is taken: files grow in steps.
_SPAN: Final = 10.0


class Limits(NamedTuple):
    """A part ends where it reaches the first of these; None: never for that reason.

    rows: not one more, unless a single block has more; bytes: of the file, which grows by a batch of rows at a time;
    seconds: since the part was opened, however the clock is set.
    """

    rows: int | None = None
    bytes: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """As limit() takes it, of one that has a single limit."""
        units = zip(self, ("rows", "B", "s"), strict=True)
        return ", ".join(f"{value:f}".removesuffix(".000000") + unit for value, unit in units if value is not None)

    @classmethod
    def of(cls, each: Iterable[Limits]) -> Limits:
        """All of them together: the smallest of each kind."""
        return cls(*(min((one for one in column if one), default=None) for column in zip(cls(), *each, strict=True)))


def parse_limit(text: str) -> Limits:
    """One limit as it stands in an option; argparse.ArgumentTypeError, which names the units, for anything else."""
    match = _LIMIT.fullmatch(text.strip())
    value = float(match[1]) if match else 0.0
    unit = match[2] if match else ""
    if value > 0:
        if unit in SECONDS:
            return Limits(seconds=value * SECONDS[unit])
        if unit in ROWS:
            return Limits(rows=max(1, round(value * ROWS[unit])))
        if unit in BYTES:
            return Limits(bytes=max(1, round(value * BYTES[unit])))
    units = ", ".join((*SECONDS, *BYTES, *ROWS))
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 and one of {units}")


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
