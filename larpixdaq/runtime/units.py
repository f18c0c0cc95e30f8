"""Times, durations and sizes as text, and back; the order of names."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import reprlib
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Final

from larpixdaq.constants import LOG_LEVELS
from larpixdaq.errors import is_text

#: Units of options, in seconds, bytes and rows.
SECONDS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400}
BYTES: Final = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40
}  # fmt: skip
ROWS: Final = {"rows": 1, "krows": 10**3, "Mrows": 10**6, "Grows": 10**9}
#: The levels of log records in help texts and errors.
LEVEL_NAMES: Final = f"{', '.join(LOG_LEVELS[:-1])} or {LOG_LEVELS[-1]}".lower()
_NAME_FORM: Final = "%Y%m%dT%H%M%SZ"


def utc_datetime(seconds: float) -> datetime:
    """Return unix seconds as a datetime. Raises ValueError if they are outside of its range."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"not a time: {seconds} s since 1970") from None


def _utc(seconds: float, form: str) -> str:
    try:
        return utc_datetime(seconds).strftime(form)
    except ValueError:
        return f"{seconds:g} s"


def utc(seconds: float) -> str:
    """Return unix seconds as text: `2023-03-15 02:48:43 UTC`, or the number if it is outside of datetime's range."""
    return _utc(seconds, "%Y-%m-%d %H:%M:%S UTC")


def utc_iso(seconds: float) -> str:
    """Return unix seconds as ISO text: `2023-03-15T02:48:43Z`, or the number if it is outside of datetime's range."""
    return _utc(seconds, "%Y-%m-%dT%H:%M:%SZ")


def utc_name(seconds: float) -> str:
    """Return unix seconds as text for file names: `20230315T024843Z`."""
    return utc_datetime(seconds).strftime(_NAME_FORM)


def parse_utc_name(text: str) -> int:
    """Return the unix seconds of a text from utc_name(). Raises ValueError."""
    return int(datetime.strptime(text, _NAME_FORM).replace(tzinfo=timezone.utc).timestamp())


def size(count: float) -> str:
    """Return a number of bytes as text: 512 B, 1.5 MB, 77 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a key that sorts names with numbers as people do: module 2 before module 10."""
    parts = re.split(r"(\d{1,18})", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = 8
        self.maxstring = self.maxother = 100

    def repr_ndarray(self, value: Any, level: int) -> str:
        return f"array of shape {value.shape}"


def brief(value: Any, limit: int = 300) -> str:
    """Return a value as text of at most `limit` characters, with ... for what is left out."""
    return cut(_brief.repr(value), limit)


def call_text(action: str, params: Mapping[str, Any]) -> str:
    """Return an action with its parameters as short text, without those that are None or empty:
    `power(on=True, tiles=[1])`."""
    given = [f"{name}={brief(value, 100)}" for name, value in params.items() if not _is_empty(value)]
    return f"{action}({cut(', '.join(given), 300)})"


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def cut(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters, with ... for what is left out."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_brief: Final = _Brief()


def duration(seconds: float) -> str:
    """Return seconds as text: 45 s, 12 min, 3 h 20 min, 5 days."""
    minutes = round(seconds) // 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} days"


def parse_size(text: str) -> int:
    """Return the bytes of a text such as "512MiB", "64MB" or "1048576". Raises ArgumentTypeError."""
    units = {unit.lower(): number for unit, number in BYTES.items() if not unit.startswith("T")} | {"": 1}
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in units:
        raise argparse.ArgumentTypeError(f"size {text!r}: expected a number and one of B, kB, KiB, MB, MiB, GB, GiB")
    return int(float(match[1]) * units[match[2]])


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as "60s", "5min", "2h" or "90". Raises ArgumentTypeError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(s|min|h)?\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"time {text!r}: expected a number and one of s, min, h")
    return float(match[1]) * SECONDS[match[2] or "s"]


def parse_positive_duration(text: str, most: float = math.inf) -> float:
    """Return the seconds of a text, more than 0 and at most `most`. Raises ArgumentTypeError."""
    seconds = parse_duration(text)
    if not 0 < seconds <= most:
        limit = "" if most == math.inf else f", and at most {duration(most)}"
        raise argparse.ArgumentTypeError(f"time {text!r}: expected more than 0 s{limit}")
    return seconds


def parse_text(text: str, most: int) -> str:
    """Return a text of at most `most` characters. Raises ArgumentTypeError, also if it is not UTF-8."""
    if not is_text(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected UTF-8")
    if len(text) > most:
        raise argparse.ArgumentTypeError(f"expected at most {most} characters, found {len(text)}")
    return text


def parse_since(text: str) -> float:
    """Return the unix seconds of a UTC time or of a duration before now. Raises ArgumentTypeError.

    Times are "2023-03-15", "2023-03-15T02:48", "2023-03-15 02:48:43 UTC" or "2023-03-15T02:48:43.123456Z", durations
    "90min", "12h" or "3d".
    """
    if match := re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(s|min|h|d)\s*", text, re.ASCII):
        return max(0.0, time.time() - float(match[1]) * SECONDS[match[2]])
    form = re.fullmatch(
        r"\s*(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d(?:\.\d{1,6})?)?\s*(?:Z|UTC)?)?\s*", text, re.ASCII
    )
    if form is not None:
        second, _, fraction = (form[3] or ":00").partition(".")
        with contextlib.suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(f"{form[1]}T{form[2] or '00:00'}{second}.{fraction:<06}+00:00")
            return max(0.0, moment.timestamp())
    raise argparse.ArgumentTypeError(
        f"time {text!r}: expected a UTC time such as 2023-03-15T02:48, or a number and one of s, min, h, d"
    )


def parse_level(text: str) -> str:
    """Return the name of a level of log records, in capital letters. Raises ArgumentTypeError."""
    if text.upper() not in LOG_LEVELS:
        raise argparse.ArgumentTypeError(f"level {text!r:.100}: expected {LEVEL_NAMES}")
    return text.upper()


def parse_positive(text: str) -> float:
    """Parse a finite number above 0; ArgumentTypeError, a usage error, for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def parse_whole(text: str, low: int = 1, high: int | None = None) -> int:
    """Parse a whole number from `low` to `high`; ArgumentTypeError, a usage error, for anything else."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, found {text}")
    return value
