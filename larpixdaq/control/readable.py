"""Answers as text for people: what IPython shows of a Request, and its `readable()`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, Final

import numpy as np

from larpixdaq.errors import printable

#: Of a longer table the first and the last rows are shown, so many in all; of a longer array numpy's summary.
SHOWN: Final = 20
#: What our answers call a time (unix s).
_TIMES: Final = frozenset({"time", "since", "prepared", "begun", "ended", "started", "start", "last"})


def readable(value: Any) -> str:
    """A dict as one line per entry, rows (a structured array, or a list of flat dicts) as an aligned table.

    Columns that are 0 or empty throughout are left out of a table. Anything else as str() has it.
    """
    if isinstance(value, dict) and value:
        width = max(len(str(name)) for name in value)
        return "\n".join(_entry(f"{name!s:<{width}}", name, part) for name, part in value.items())
    if _is_table(value):
        return _table(value)
    if isinstance(value, list | tuple) and value and any(isinstance(part, dict | list) for part in value):
        return "\n\n".join(readable(part) for part in value)
    return _cell("", value)


def show(value: Any, printer: Any) -> None:
    """Give the value to IPython's pretty printer: readable, where that is more than what repr() makes of it."""
    if isinstance(value, dict) or _is_table(value) or (isinstance(value, str) and "\n" in value):
        printer.text(readable(value))
    else:
        printer.pretty(value)


def _entry(label: str, name: str, part: Any) -> str:
    if _is_table(part) and len(part):
        lines = _table(part).splitlines()
        return "\n".join((f"{label}  ({len(part)})", *(f"    {line}" for line in lines)))
    indent = "\n" + " " * (len(label) + 2)
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if any(isinstance(inner, dict) for inner in inside):
        text = readable(part)
    elif isinstance(part, list) and part and all(isinstance(inner, str) for inner in part):
        text = "\n".join(map(printable, part))
    else:
        text = _cell(name, part)
    return f"{label}  {text.replace(chr(10), indent)}".rstrip()


def _cell(name: str, value: Any) -> str:
    """One value on one line; `name` is what it is called where it stands."""
    if value is None or (isinstance(value, dict | list | tuple) and not value):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(key, part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(name, part) for part in value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float | np.floating):
        return _utc(float(value)) if name in _TIMES and value > 1e8 else _number(float(value))
    if isinstance(value, np.ndarray):
        return np.array2string(value, threshold=SHOWN, max_line_width=10_000)
    return "\n".join(map(printable, str(value).split("\n")))


def _number(value: float) -> str:
    """Five digits, and all before the point: 0.98765, 12.345, 10006, 2420000."""
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


def _utc(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def _is_table(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.names is not None and value.ndim == 1
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and row.keys() == value[0].keys() for row in value)
        and not any(isinstance(part, dict) or _is_table(part) for row in value for part in row.values())
    )


def _table(rows: Any) -> str:
    """Aligned columns under their names; numbers to the right."""
    array = isinstance(rows, np.ndarray)
    names = list(rows.dtype.names if array else rows[0])
    count = len(rows)
    if not count:
        return f"no rows of {', '.join(names)}"
    left_out = max(0, count - SHOWN)
    shown = [*rows[: count - left_out - SHOWN // 2], *rows[-(SHOWN // 2) :]] if left_out else list(rows)

    def used(name: str) -> bool:
        # Looked at in all rows, not only in those shown: where somebody looks must not change the columns.
        return bool(np.any(rows[name] != np.zeros((), rows[name].dtype))) if array else any(row[name] for row in rows)

    columns = [name for place, name in enumerate(names) if not place or used(name)]
    return "\n".join(_aligned(columns, shown, left_out))


def _aligned(columns: Sequence[str], rows: Sequence[Any], left_out: int) -> list[str]:
    cells = [[_cell(name, row[name]) for name in columns] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    right = [isinstance(rows[0][name], int | float | np.number) for name in columns]

    def line(parts: Sequence[str]) -> str:
        padded = (
            part.rjust(width) if number else part.ljust(width)
            for part, width, number in zip(parts, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    lines = [line(columns), *map(line, cells)]
    if left_out:
        lines.insert(1 + SHOWN // 2, f"... {left_out} more ...")
    return lines
