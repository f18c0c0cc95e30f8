"""When a part is full: `--rotate 5min`, `4GB`, `100Mrows`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

_LIMIT: Final = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)")
_SECONDS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_ROWS: Final = {"rows": 1, "krows": 10**3, "Mrows": 10**6, "Grows": 10**9}
_DECIMAL: Final = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES: Final = _DECIMAL | {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


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


def limit(text: str) -> Limits:
    """One limit as it stands in an option; argparse.ArgumentTypeError, which names the units, for anything else."""
    match = _LIMIT.fullmatch(text.strip())
    value = float(match[1]) if match else 0.0
    unit = match[2] if match else ""
    if value > 0:
        if unit in _SECONDS:
            return Limits(seconds=value * _SECONDS[unit])
        if unit in _ROWS:
            return Limits(rows=max(1, round(value * _ROWS[unit])))
        if unit in _BYTES:
            return Limits(bytes=max(1, round(value * _BYTES[unit])))
    units = ", ".join((*_SECONDS, *_BYTES, *_ROWS))
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 and one of {units}")
