"""What the core's `status` says, in words: for `larpixdaq status`, and for Operators who look at theirs.

Answers as text for people: what IPython shows of a Request, and its `readable()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, Final

import numpy as np

from larpixdaq.control.disk_watch import SOON, time_to_full
from larpixdaq.errors import printable
from larpixdaq.runtime.timing import load_words
from larpixdaq.runtime.units import size, utc

Facts = dict[str, Any]
#: Of a longer table the first and the last rows are shown, so many in all; of a longer array numpy's summary.
SHOWN: Final = 20
#: What our answers call a time (unix s).
_TIMES: Final = frozenset({"time", "since", "prepared", "begun", "ended", "started", "start", "last"})


def status_lines(found: Facts) -> list[str]:
    """The core's status in words, a line each."""
    run = found.get("run")
    busy = f" ({found['busy']} in progress)" if found.get("busy") else ""
    shown = [f"state {found['state']}{f', run {_run(run)}' if run else ''}{busy}"]
    if run and run["missing"]:
        shown.append(f"MISSING in this run: {', '.join(run['missing'])}")
    shown += [line for component in found["components"] if component["alive"] for line in _alarms(component)]
    if control := found.get("control"):
        shown.append(f"control: {control['by']}, since {utc(control['since'])}")
    if last := found.get("last_run"):
        shown.append(_last_run(last))
    if found.get("insecure"):
        shown.append("INSECURE: no keys are in use: anybody who can connect to the core can control the detector")
    width = max((len(component["name"]) for component in found["components"]), default=0)
    if "load" in found:
        shown.append(f"{'core':<{width}}  alive  {load_words(found['load'])}")
    for component in found["components"]:
        shown.append(f"{component['name']:<{width}}  {_liveness(component):<5}  {_words(component)}".rstrip())
    return shown


def needs_attention(found: Facts) -> bool:
    """Whether a component is LOST or PAUSED, or MISSING in the run."""
    parts = found["components"]
    return bool((found.get("run") or {}).get("missing")) or any(
        not component["alive"] or component["status"].get("paused") for component in parts
    )


def _words(component: Facts) -> str:
    facts = component["status"]
    try:
        said = _WORDS[component["kind"]](component["info"], facts)
        return f"{said}; {load_words(facts['load'])}" if "load" in facts else said
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError):  # of another version than we are
        return ", ".join(f"{name} {value}" for name, value in facts.items())


def _liveness(component: Facts) -> str:
    return "stuck" if component["stuck"] else "alive" if component["alive"] else "LOST"


def _run(run: Facts) -> str:
    comment = f": {run['comment']}" if run["comment"] else ""
    begun = f", since {utc(run['begun'])}" if run["begun"] else ""
    return f"{run['run']} ({run['kind']}){begun}{comment}"


def _last_run(last: Facts) -> str:
    reasons = "".join(f"; {reason}" for reason in last.get("reasons", []))
    files = "".join(f", {file}" for file in last.get("files", []))
    stored = "number of rows stored unknown" if last.get("stored") is None else f"{last['stored']} rows stored"
    return f"last run: {last['run']} {last['condition']}, {stored}{files}{reasons}"


def _alarms(component: Facts) -> list[str]:
    """What nobody may overlook."""
    facts, found = component["status"], []
    if facts.get("paused"):
        found.append(f"PAUSED: {component['name']} is not writing: {facts['paused']}")
    for text in _list(facts, "nameless"):
        found.append(f"FILE REMOVED: {component['name']}: {text}; lost if the process is killed")
    for path in _list(facts, "kept_aside"):
        found.append(f"DAMAGED FILE KEPT: {component['name']}: {path} could not be read whole; move it away")
    for text in _list(facts, "not_recovered"):
        found.append(f"NOT RECOVERED: {component['name']}: {text}")
    for board in _list(facts, "boards"):
        since = board.get("away_since") if isinstance(board, dict) else None
        if isinstance(since, int | float) and 0 < since < 1e11:
            found.append(f"{board.get('name')}: {_away(board)}")
    left = facts.get("seconds_left")
    if isinstance(left, int | float) and left < SOON[0]:
        found.append(f"DISK NEARLY FULL: {component['name']}: {time_to_full(facts)}")
    if facts.get("on_close"):
        found.append(f"COMMAND FAILED: {component['name']}: {facts['on_close']}")
    return found


def _list(facts: Facts, name: str) -> list[Any]:
    found = facts.get(name)
    return found if isinstance(found, list) else []


def _away(board: Facts) -> str:
    problem = f" ({board['problem']})" if board.get("problem") else ""
    return f"NOT CONNECTED since {utc(board['away_since'])}{problem}"


# A component that has just registered has said nothing yet: its facts are empty.


def _producer(info: Facts, facts: Facts) -> str:
    parts = [str(info.get("source", ""))]
    if facts:
        if facts["run"] is not None:
            parts.append(f"{facts['packets']} packets of the run")
        elif facts["counted_run"] is not None:
            parts.append(f"{facts['packets']} packets of run {facts['counted_run']}")
        losses = (("dropped", "rows dropped"), ("unknown", "unknown words"), ("bad_parity", "with bad parity"))
        parts += [f"{facts[name]} {words}" for name, words in losses if facts[name]]
        if facts["run"] is None:
            parts.append(f"{facts['outside_run']} packets outside of runs")
        doubts = facts.get("verdicts", {}).items()
        parts += [f"io_group {io_group} is {verdict}" for io_group, verdict in doubts if verdict != "complete"]
        for board in facts.get("boards", []):
            if board["away_since"] is not None:
                parts.append(f"io_group {board['io_group']}: {_away(board)}")
            parts += [f"io_group {board['io_group']}: {line}" for line in board["setup"]]
            if board["clock"] is not None:
                parts.append(f"io_group {board['io_group']}: {board['clock']['text']}")
        if facts["owed_blocks"]:
            parts.append(f"{facts['owed_blocks']} blocks pending (ring {facts['ring']:.0%} full)")
        if facts.get("spooled_blocks"):
            parts.append(f"{facts['spooled_blocks']} of them in the spool ({size(facts['spooled_bytes'])})")
        if facts.get("inherited"):
            parts.append(f"{facts['inherited']} blocks of its predecessor pending")
        if made_anew := facts.get("made_anew"):
            parts.append(f"the ring's file was removed and made anew, {made_anew} times")
        if facts["finished"]:
            parts.append("source finished")
    return "; ".join(parts)


def _storage(info: Facts, facts: Facts) -> str:
    parts = [f"{info.get('directory', '')}"]
    if facts:
        parts.append(f"{size(facts['free_bytes'])} free")
        if facts.get("paused"):
            parts.append("PAUSED")
        if left := time_to_full(facts):
            parts.append(left)
        if facts["files"]:
            parts.append(f"writing {', '.join(facts['files'])}: {facts['rows']} rows, {size(facts['bytes'])}")
        if recovering := facts.get("recovering"):
            parts.append(f"recovering {', '.join(recovering)}")
        if finished := facts.get("finished"):
            last = finished[-1]
            parts.append(f"last closed: {PurePath(last['file']).name}, {size(last['bytes'])}, {last['condition']}")
        if facts["duplicates"]:
            parts.append(f"{facts['duplicates']} duplicate blocks removed")
        if facts.get("on_close_failed"):
            parts.append(f"--on-close failed for {facts['on_close_failed']} files")
    return "; ".join(parts)


def _monitor(info: Facts, facts: Facts) -> str:
    if not facts or facts["run"] is None:
        return "no run yet"
    parts = [f"run {facts['run']}: {facts['rate']:.5g} packets/s, {facts['packets']} packets"]
    if facts["bad_parity"]:
        parts.append(f"{facts['bad_parity']} with bad parity")
    if facts["seen"] < 1:
        parts.append(f"{facts['seen']:.1%} of the rows sampled")
    return "; ".join(parts)


def _records(info: Facts, facts: Facts) -> str:
    lost = f"; {facts['lost']} records lost" if facts.get("lost") else ""
    return f"{info.get('file', '')}{lost}"


_WORDS: Final[dict[str, Callable[[Facts, Facts], str]]] = {
    "producer": _producer,
    "storage": _storage,
    "run_data": _monitor,
    "log": _records,
}


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
        return utc(float(value)) if name in _TIMES and value > 1e8 else _number(float(value))
    if isinstance(value, np.ndarray):
        return np.array2string(value, threshold=SHOWN, max_line_width=10_000)
    return "\n".join(map(printable, str(value).split("\n")))


def _number(value: float) -> str:
    """Five digits, and all before the point: 0.98765, 12.345, 10006, 2420000."""
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


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
