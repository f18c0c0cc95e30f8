"""Limits of a part (`--rotate 5min`, `4GB`, `100Mrows`), and the free space of the disk."""

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
#: Bytes of free space below which writing pauses, because open parts need room for their close, and a fast disk takes
#: some of it between two checks.
RESERVE: Final = MIN_FREE
#: Bytes above RESERVE at which writing resumes, so that it does not stop and start while a file is being removed.
_MARGIN: Final = 16 << 20
#: Seconds between two checks of the free space.
CHECK_INTERVAL: Final = 0.1
#: Seconds over which the rate is averaged, because files grow in steps.
_SPAN: Final = 10.0
#: Seconds of growth before the rate is known: a new file has its structure at once, and its first rows up to 5 s later.
_KNOWN_AFTER: Final = _SPAN + 5.0


class Limits(NamedTuple):
    """Limits at which a part ends; None: no such limit.

    rows: never exceeded, unless a single block has more; bytes: of the file, which grows by a batch of rows at a time;
    seconds: since the part was opened, by the monotonic clock.
    """

    rows: int | None = None
    bytes: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """Format a single limit as parse_limit() takes it."""
        units = zip(self, ("rows", "B", "s"), strict=True)
        return ", ".join(f"{value:f}".removesuffix(".000000") + unit for value, unit in units if value is not None)

    @classmethod
    def of(cls, options: Iterable[Limits]) -> Limits:
        """Combine limits: the smallest of each kind."""
        columns = zip(cls(), *options, strict=True)
        return cls(*(min((limit for limit in column if limit), default=None) for column in columns))


def parse_limit(text: str) -> Limits:
    """Parse one limit of an option; argparse.ArgumentTypeError, which names the units, for any other text."""
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
    """Free space of a directory's disk, and the time until it is full at the present rate."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self._clock = clock
        self._free = 0
        #: Why the free space is unknown; empty when it is known.
        self.problem = ""
        self._checked: float | None = None  # monotonic time of the last check
        self._samples: deque[tuple[float, int]] = deque()  # monotonic time, bytes of all files
        self._growing_since = 0.0  # monotonic time

    def free(self) -> int:
        """Check the free space now; bytes, 0 when it is unknown."""
        self._checked = self._clock()
        try:
            found = os.statvfs(self.directory)
        except OSError as error:
            self._free, self.problem = 0, error.strerror or str(error)
        else:
            self._free, self.problem = found.f_bavail * found.f_frsize, ""
        return self._free

    def enough(self, *, paused: bool = False) -> bool:
        """Whether there is room to write, by a check within CHECK_INTERVAL; `paused`: room to resume writing."""
        if self._checked is None or self._clock() - self._checked >= CHECK_INTERVAL:
            self.free()
        return self._free >= RESERVE + (_MARGIN if paused else 0)

    def add_sample(self, total: int) -> None:
        """Note that the files have `total` bytes now. Call this repeatedly."""
        now = self._clock()
        if self._samples and total > self._samples[-1][1] == self._samples[0][1]:
            # The files begin to grow: the pause before is no part of the rate.
            self._samples = deque([self._samples[-1]])
            self._growing_since = self._samples[0][0]
        self._samples.append((now, total))
        while now - self._samples[0][0] > _SPAN:
            self._samples.popleft()

    def bytes_per_second(self) -> int:
        """Compute the rate at which the files grew over the last ten seconds; 0 while it is not known yet."""
        if len(self._samples) < 2 or self._clock() - self._growing_since < _KNOWN_AFTER:
            return 0
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return max(0, round((after - before) / max(last - first, CHECK_INTERVAL)))

    def seconds_left(self) -> int | None:
        """Compute the time until there is no room left at this rate; None while it is not known."""
        rate = self.bytes_per_second()
        return max(0, self._free - RESERVE) // rate if rate else None
