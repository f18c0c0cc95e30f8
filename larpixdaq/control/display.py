"""Results as text for people: the core's status for `larpixdaq status`, and any result for IPython and `readable()`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Final

import msgspec
import numpy as np

from larpixdaq.constants import RUN_DATA
from larpixdaq.control.alarm_conditions import disconnection
from larpixdaq.control.alarms import Alarm, open_line, row_line
from larpixdaq.control.catalogue import AlarmRow, AuditRow
from larpixdaq.control.component_groups import (
    Facts,
    Group,
    component_groups,
    component_state,
    component_status,
    converted,
    is_alarming,
    is_grouped,
    joined,
    limit_lines,
    lost_line,
    own_problems,
    split_lost,
)
from larpixdaq.control.disk_watch import time_to_full
from larpixdaq.errors import printable
from larpixdaq.protocol.reports import (
    LogStatus,
    MonitorStatus,
    ProducerStatus,
    StorageStatus,
    SupervisorStatus,
)
from larpixdaq.runtime.timing import load_text
from larpixdaq.runtime.units import size, utc

#: Maximum number of rows of a table, half of them from its end, and of elements of an array.
MAX_SHOWN: Final = 20
#: Maximum number of groups without a problem that have a line each.
_MANY_GROUPS: Final = 40
#: Keys of results whose values are times (unix s).
_TIMES: Final = frozenset({"time", "since", "prepared", "begun", "ended", "started", "start", "last"})


def status_lines(status: Facts, *, unfold: bool = False) -> list[str]:
    """Convert the core's status to lines of text. Many components, or those with a module, are in groups, the worst
    first; `unfold`: also of groups in which nothing is wrong, each component has its line."""
    components = status["components"]
    grouped = is_grouped(components)
    run = status.get("run")
    busy = f" ({status['busy']} in progress)" if status.get("busy") else ""
    lines = [f"state {status['state']}{f', run {_run(run)}' if run else ''}{busy}"]
    alarms = converted(status.get("alarms") or [], Alarm)
    # In groups, components are shown with what is wrong with them.
    named = {component["name"] for component in components} if grouped else set()
    lines += [open_line(alarm) for alarm in alarms if alarm.component not in named]
    if missing := [name for name in (run or {}).get("missing", []) if name not in named]:
        lines.append(f"MISSING in this run: {', '.join(missing)}")
    told = {(alarm.condition, alarm.component, alarm.subject) for alarm in alarms}
    for component in components:
        if component["alive"] and not grouped:
            lines += [problem.text for problem in own_problems(component["name"], component_status(component), told)]
    lines += _delivery((status.get("alarm_state") or {}).get("destinations") or [])
    if control := status.get("control"):
        lines.append(f"control: {control['by']}, since {utc(control['since'])}")
    if (shifter := status.get("shifter") or {}).get("name"):
        lines.append(f"shifter: {shifter['name']}, since {utc(shifter['since'])}")
    if last := status.get("last_run"):
        lines.append(_last_run(last))
    if status.get("insecure"):
        lines.append("INSECURE: no keys are in use: anybody who can connect to the core can control the detector")
    if (second := status.get("second_core")) is not None:
        where = f"second core: on standby at {second.get('core')} ({second.get('host')})"
        lines.append(where if second else "NO SECOND CORE is on standby: nothing takes over from this one")
    audit = status.get("audit") or {}
    if audit.get("lost") or audit.get("error"):
        why = f": {audit['error']}" if audit.get("error") else ""
        lines.append(f"AUDIT: {audit.get('lost')} rows lost, {audit.get('waiting')} wait{why}")
    lines += limit_lines("core", status.get("limits") or [])
    groups = component_groups(status) if grouped else []
    shown = [group for group in groups if group.level]
    healthy = groups[len(shown) :]
    if unfold or len(healthy) <= _MANY_GROUPS:
        shown, healthy = groups, []
    names = [group.name for group in shown] if grouped else [component["name"] for component in components]
    width = max(map(len, names), default=0)
    if "load" in status:
        level = _log_level(status)
        lines.append(f"{'core':<{width}}  alive  {load_text(status['load'])}{f'; {level}' if level else ''}")
    if not grouped:
        return lines + [_component_line(component, width) for component in components]
    bad, number = sum(bool(group.level) for group in groups), f"{len(groups)} group{'' if len(groups) == 1 else 's'}"
    lines.append(f"{joined(groups).state()}, in {number}, {bad} with a problem")
    for group in shown:
        lines.append(f"{group.name:<{width}}  {group.level.upper():<7}  {group.state()}; {group.figures()}")
        if group.level or unfold:
            lines += [f"    {line}" for line in _member_lines(group, unfold=unfold)]
    if healthy:
        rest = joined(healthy)
        lines.append(f"{len(healthy)} groups without a problem: {rest.state()}; {rest.figures()}")
    return lines


def _component_line(component: Facts, width: int) -> str:
    return f"{component['name']:<{width}}  {component_state(component):<5}  {_details(component)}".rstrip()


def _member_lines(group: Group, *, unfold: bool) -> list[str]:
    """Return the lines of the members of a group: of those with a problem, or (`unfold`) of all."""
    lost, others = split_lost(group.bad)
    lines = [lost_line(lost)] if lost else []
    shown = others + ([member for member in group.members if not member.problems] if unfold else [])
    width = max((len(member.name) for member in shown), default=0)
    for member in shown:
        lines.append(_component_line(member.facts, width))
        lines += [f"  {problem.text}" for problem in member.problems]
    if rest := len(group.members) - len(lost) - len(shown):
        lines.append(f"{rest} other{'' if rest == 1 else 's'} alive")
    return lines


def alarm_lines(answer: Facts) -> str:
    """Convert the answer of Operator.alarms() to text."""
    lines = [row_line(row) for row in converted(answer.get("history", []), AlarmRow)]
    lines += [open_line(alarm) for alarm in converted(answer["open"], Alarm)] or ["no alarm is open"]
    return "\n".join(map(printable, lines))


def audit_line(row: AuditRow) -> str:
    """Convert a row of the audit to a line of text."""
    key = " ".join(part for part in (row.role, repr(row.key) if row.key != row.role else "") if part)
    name = row.name if row.name != row.key else ""
    who = f"{key} ({name})" if key and name else key or name or "nobody"
    where = "at" if row.outcome == "refused" else "of"
    what = f"{row.action} {where} {row.component}" if row.component else row.action
    detail = f", {row.detail}" if row.detail else ""
    times = f", {row.count} times" if row.count != 1 else ""
    outcome = f": {row.outcome}{times}" if row.outcome or times else ""
    return f"{utc(row.time_ns / 1e9)}  {who}: {what}{detail}{outcome}"


def needs_attention(status: Facts) -> bool:
    """Whether a component is LOST, PAUSED or NOT PUBLISHING, or MISSING in the run."""
    return bool((status.get("run") or {}).get("missing")) or any(
        not component["alive"] or is_alarming(component) for component in status["components"]
    )


def _details(component: Facts) -> str:
    facts, status = component["status"], component_status(component)
    if facts and status is None:
        return ", ".join(f"{name} {value}" for name, value in facts.items())
    parts = [str(component["info"][name]) for name in ("source", "directory", "file") if name in component["info"]]
    if isinstance(status, ProducerStatus):
        parts += _producer(status)
    elif isinstance(status, StorageStatus):
        parts += _storage(status)
    elif isinstance(status, MonitorStatus) and status.run is not None:
        parts += _monitor(status)
    elif component["kind"] == RUN_DATA:
        parts.append("no run yet")
    elif isinstance(status, LogStatus):
        counts = {"records lost": status.lost, "lines held back": status.held_back}
        parts += [f"{number} {words}" for words, number in counts.items() if number]
    elif isinstance(status, SupervisorStatus):
        parts += _supervisor(status)
    if level := _log_level(component):
        parts.append(level)
    if status is not None and status.load is not None:
        parts.append(load_text(msgspec.structs.asdict(status.load)))
    return "; ".join(parts)


def _log_level(facts: Facts) -> str:
    """Return the level of log records as text, if it is not the usual one."""
    level = facts.get("log_level", "")
    return f"log level {level}" if level not in ("", "INFO") else ""


def _run(run: Facts) -> str:
    comment = f": {run['comment']}" if run["comment"] else ""
    begun = f", since {utc(run['begun'])}" if run["begun"] else ""
    return f"{run['run']} ({run['kind']}){begun}{comment}"


def _last_run(last: Facts) -> str:
    reasons = "".join(f"; {reason}" for reason in last.get("reasons", []))
    files = "".join(f", {file}" for file in last.get("files", []))
    stored = "number of rows stored unknown" if last.get("stored") is None else f"{last['stored']} rows stored"
    return f"last run: {last['run']} {last['condition']}, {stored}{files}{reasons}"


def _delivery(destinations: list[Facts]) -> list[str]:
    """Return a line for each destination of alarms that has not got all of them."""
    lines = []
    for one in destinations:
        counts = {"not sent": one["failed"], "lost": one["lost"], "waiting": one["waiting"]}
        problems = [f"{count} {words}" for words, count in counts.items() if count]
        if problems and (one["error"] or one["failed"] or one["lost"]):
            why = f": {one['error']}" if one["error"] else ""
            lines.append(f"ALARMS to {one['name']}: {', '.join(problems)}{why}")
    return lines


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _supervisor(status: SupervisorStatus) -> list[str]:
    running = sum(process.state == "running" for process in status.processes)
    restarted = [process for process in status.processes if process.restarts]
    return [
        f"{running} of {len(status.processes)} processes running",
        *(f"{each.name} was started again {_times(each.restarts)}, last: it {each.last_exit}" for each in restarted),
    ]


def _producer(status: ProducerStatus) -> list[str]:
    parts = []
    if status.run is not None:
        parts.append(f"{status.packets} packets of the run")
    elif status.counted_run is not None:
        parts.append(f"{status.packets} packets of run {status.counted_run}")
    losses = {"rows dropped": status.dropped, "unknown words": status.unknown, "with bad parity": status.bad_parity}
    parts += [f"{number} {words}" for words, number in losses.items() if number]
    if status.run is None:
        parts.append(f"{status.outside_run} packets outside of runs")
    verdicts = status.verdicts.items()
    parts += [f"io_group {io_group} is {verdict}" for io_group, verdict in verdicts if verdict != "complete"]
    for board in status.boards:
        lines = [disconnection(board), *board.setup, board.clock.text if board.clock is not None else ""]
        parts += [f"io_group {board.io_group}: {line}" for line in lines if line]
    if status.owed_blocks:
        parts.append(f"{status.owed_blocks} blocks pending (ring {status.ring:.0%} full)")
    if status.spooled_blocks:
        parts.append(f"{status.spooled_blocks} of them in the spool ({size(status.spooled_bytes)})")
    if status.inherited:
        parts.append(f"{status.inherited} blocks of its predecessor pending")
    if (uplink := status.uplink) is not None:
        parts.append(f"{uplink.acknowledged_messages} messages ({size(uplink.acknowledged_bytes)}) at the brokers")
        if uplink.fill is not None:
            parts.append(f"their stream {uplink.fill:.0%} full")
        if not uplink.connected:
            parts.append(f"NOT PUBLISHING: {uplink.problem or 'not connected to the brokers yet'}")
        if uplink.lost_messages:
            parts.append(f"{uplink.lost_messages} messages lost by the brokers")
    if status.made_anew:
        parts.append(f"the ring's file was removed and replaced, {status.made_anew} times")
    if status.finished:
        parts.append("source finished")
    return parts


def _storage(status: StorageStatus) -> list[str]:
    parts = [] if status.free_bytes is None else [f"{size(status.free_bytes)} free"]
    if status.paused:
        parts.append("PAUSED")
    if left := time_to_full(status):
        parts.append(left)
    if status.files:
        parts.append(f"writing {', '.join(status.files)}: {status.rows} rows, {size(status.bytes)}")
    if status.recovering:
        parts.append(f"recovering {', '.join(status.recovering)}")
    if status.finished:
        last = status.finished[-1]
        parts.append(f"last closed: {PurePath(last.file).name}, {size(last.bytes)}, {last.condition}")
    if status.duplicates:
        parts.append(f"{status.duplicates} duplicate blocks removed")
    if status.on_close_failed:
        parts.append(f"--on-close or --raw failed for {status.on_close_failed} files")
    return parts


def _monitor(status: MonitorStatus) -> list[str]:
    parts = [f"run {status.run}: {status.rate:.5g} packets/s, {status.packets} packets"]
    if status.bad_parity:
        parts.append(f"{status.bad_parity} with bad parity")
    if status.seen < 1:
        parts.append(f"{status.seen:.1%} of the rows sampled")
    return parts


def readable(value: Any) -> str:
    """Convert a result to text: a dict to a line per entry, a structured array or list of flat dicts to a table.

    A table leaves out columns that are 0 or empty in all rows, except the first. Other values as str() gives them.
    """
    if isinstance(value, dict) and value:
        width = max(len(str(name)) for name in value)
        return "\n".join(_entry(f"{name!s:<{width}}", name, part) for name, part in value.items())
    if is_table(value):
        return _table(value)
    if isinstance(value, list | tuple) and value and any(isinstance(part, dict | list) for part in value):
        return "\n\n".join(readable(part) for part in value)
    return cell("", value)


def show(value: Any, printer: Any) -> None:
    """Print a result with IPython's pretty printer: dicts, tables and long texts as readable(), others as repr()."""
    if isinstance(value, dict) or is_table(value) or (isinstance(value, str) and "\n" in value):
        printer.text(readable(value))
    else:
        printer.pretty(value)


def _entry(label: str, name: str, part: Any) -> str:
    if is_table(part) and len(part):
        lines = _table(part).splitlines()
        return "\n".join((f"{label}  ({len(part)})", *(f"    {line}" for line in lines)))
    indent = "\n" + " " * (len(label) + 2)
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if any(isinstance(inner, dict) for inner in inside):
        text = readable(part)
    elif isinstance(part, list) and part and all(isinstance(inner, str) for inner in part):
        text = "\n".join(map(printable, part))
    else:
        text = cell(name, part)
    return f"{label}  {text.replace(chr(10), indent)}".rstrip()


def cell(name: str, value: Any) -> str:
    """Return a value as text, in one line if it has no tables; `name` is its key or column."""
    if value is None or (isinstance(value, dict | list | tuple) and not value):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(key, part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(name, part) for part in value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float | np.floating):
        return utc(float(value)) if name in _TIMES and value > 1e8 else _number(float(value))
    if isinstance(value, np.ndarray):
        return np.array2string(value, threshold=MAX_SHOWN, max_line_width=10_000)
    return "\n".join(map(printable, str(value).split("\n")))


def _number(value: float) -> str:
    """Return five significant digits, and all digits before the point: 0.98765, 12.345, 10006, 2420000."""
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


def is_table(value: Any) -> bool:
    """Return whether a value is a structured array of one dimension, or a list of flat dicts with the same keys."""
    if isinstance(value, np.ndarray):
        return value.dtype.names is not None and value.ndim == 1
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and row.keys() == value[0].keys() for row in value)
        and not any(isinstance(part, dict) or is_table(part) for row in value for part in row.values())
    )


def _table(rows: Any) -> str:
    """Return the rows as aligned columns under their names, numbers to the right."""
    if not len(rows):
        return f"no rows of {', '.join(rows.dtype.names)}"
    return "\n".join(_aligned(*shown_rows(rows)))


def shown_rows(rows: Any) -> tuple[list[str], list[Any], int]:
    """Return the columns of a table that are shown, its first and last rows, and the number of rows left out between.

    Columns that are 0 or empty in all rows are left out, except the first.
    """
    array = isinstance(rows, np.ndarray)
    names = list(rows.dtype.names if array else rows[0])
    count = len(rows)
    left_out = max(0, count - MAX_SHOWN)
    shown = [*rows[: count - left_out - MAX_SHOWN // 2], *rows[-(MAX_SHOWN // 2) :]] if left_out else list(rows)

    def used(name: str) -> bool:
        # In all rows, not only in those shown, so that the columns do not depend on the rows shown.
        return bool(np.any(rows[name] != np.zeros((), rows[name].dtype))) if array else any(row[name] for row in rows)

    return [name for place, name in enumerate(names) if not place or used(name)], shown, left_out


def _aligned(columns: Sequence[str], rows: Sequence[Any], left_out: int) -> list[str]:
    cells = [[cell(name, row[name]) for name in columns] for row in rows]
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
        lines.insert(1 + MAX_SHOWN // 2, f"... {left_out} more ...")
    return lines
