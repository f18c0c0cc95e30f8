"""Alarms: open ones are kept, and what happens to them is told.

An alarm is known by its condition, the component that reports it, and its subject (such as "LArPix board, io_group 1").
It is raised, may be acknowledged, and clears by itself when the condition has been in order for a while. All of this
goes into the run catalogue, into the log, and to the destinations of alarm_delivery.py. alarm_conditions.py finds out
which conditions are true.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from larpixdaq.alarm_config import AlarmConfig
from larpixdaq.constants import PRODUCER, STORAGE, RunCondition
from larpixdaq.control.alarm_conditions import ALARM, EVENT_KEPT, WARNING, Evaluation, Reading, subject_of
from larpixdaq.control.audit import RowWriter
from larpixdaq.control.catalogue import AlarmRow, Run, append_alarms, open_alarms, read_alarms
from larpixdaq.control.registry import Component
from larpixdaq.errors import FileError, RequestError, printable
from larpixdaq.protocol.reports import STATUS, MonitorStatus, ProducerStatus
from larpixdaq.runtime.units import cut, duration, utc

if TYPE_CHECKING:
    from larpixdaq.control.alarm_delivery import Delivery

_log = logging.getLogger("larpixdaq.core")
_LEVELS: Final = ("", WARNING, ALARM)
#: Seconds for which a condition must be true until its alarm is raised, if not at once: boards need time to connect.
_DELAYS: Final[Mapping[str, float]] = {"board-disconnected": 0.75, "ring-filling": 1.0, "rate": 1.0}
#: Seconds after its end in which a condition that is true again raises the same alarm again. Each time its hold-off
#: doubles, up to the maximum.
_MEMORY: Final = 600.0
_MAX_HOLD: Final = 300.0
#: Seconds without any news until an acknowledged alarm clears, because its component or board is used no more.
_NO_NEWS: Final = 12 * 3600.0
#: Maximum number of alarms that are kept, open ones and those that may be raised again; further ones are counted.
MAX_ALARMS: Final = 1000
#: Maximum characters of subject and text.
_MAX_SUBJECT: Final = 200
_MAX_TEXT: Final = 500
#: Maximum characters of the newest alarm in messages to Operators.
_MAX_LINE: Final = 1000
#: Conditions that stay true when their component ends: files are left behind, and the run is not complete.
_LASTING: Final = frozenset({"not-recovered", "producer-files", "run-verdict", "component-lost", "given-up"})


class Alarm(msgspec.Struct):
    """An alarm. Times in unix seconds; `component`: the one that reports it, "" for the core.

    `count`: how many times its condition became true. `raised`: the first time, `last`: the last time. `as_of`: the
    time of the text and of the count, if an earlier core has written them and nothing was heard of the condition since.
    `in_order`: since when the condition of an open alarm has been in order; it clears after the hold-off.
    """

    id: int
    condition: str
    component: str
    subject: str
    level: str
    text: str
    raised: float
    last: float
    count: int = 1
    acknowledged: float | None = None
    by: str = ""
    comment: str = ""
    cleared: float | None = None
    as_of: float | None = None
    in_order: float | None = None


def sentence(event: str, alarm: Alarm) -> str:
    """Return what happened to an alarm as one line: `ALARM 3 raised: disk 1: disk full in 9 min at 18 MB/s`."""
    if event == "acknowledged":
        event = f"acknowledged by {alarm.by}" + (f" ({alarm.comment})" if alarm.comment else "")
    elif event == "cleared" and alarm.cleared is not None:
        event = f"cleared after {duration(max(0.0, alarm.cleared - alarm.raised))}"
    times = f", {alarm.count} times" if alarm.count > 1 else ""
    return printable(f"{alarm.level.upper()} {alarm.id} {event}{times}: {alarm.text}")


def open_line(alarm: Alarm) -> str:
    """Return an open alarm as one line."""
    times = f", {alarm.count} times" if alarm.count > 1 else ""
    seen = ""
    if alarm.acknowledged is not None:
        seen = f" (acknowledged by {alarm.by}{f': {alarm.comment}' if alarm.comment else ''})"
    state = f" (as of {utc(alarm.as_of)}, before a restart of the core)" if alarm.as_of is not None else ""
    if alarm.in_order is not None:
        state = f" (in order since {utc(alarm.in_order)}, clears soon)"
    return f"{alarm.level.upper()} {alarm.id} since {utc(alarm.raised)}{times}: {alarm.text}{state}{seen}"


def row_line(row: AlarmRow) -> str:
    """Return a row of the history as one line."""
    who = f" by {row.who}" if row.who else ""
    comment = f" ({row.comment})" if row.comment else ""
    times = f", {row.count} times" if row.count > 1 else ""
    return f"{utc(row.time_ns / 1e9)}  {row.level.upper()} {row.alarm} {row.event}{who}{comment}{times}: {row.text}"


_LOST: Final = "component-lost"
_PENDING: Final = "pending"
_OPEN: Final = "open"
_OVER: Final = "over"


@dataclass
class _Entry:
    """An alarm, or a condition whose alarm is not raised yet. Times are time.monotonic()."""

    alarm: Alarm
    state: str
    #: When the condition became true (_PENDING), when it was in order again (_OPEN; None: it is true), or when the
    #: alarm was cleared (_OVER).
    since: float | None
    hold: float
    heard: float  # last Reading
    cleared: float = 0.0  # the last time


class AlarmBook:
    """The alarms by condition, component and subject. It knows no sockets, files or threads."""

    def __init__(
        self,
        hold_off: float,
        changed: Callable[[str, Alarm], None],
        *,
        highest: int = 0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`changed` is called with "raised", "acknowledged" or "cleared" and the alarm. `highest`: number of the last
        alarm. `wall` returns unix seconds."""
        self._hold_off, self._changed, self._wall = hold_off, changed, wall
        self._highest = highest
        #: By component, then by condition and subject.
        self._entries: dict[str, dict[tuple[str, str], _Entry]] = {}
        self._count = 0
        #: Conditions for which there was no room.
        self.refused = 0

    def restore(self, alarm: Alarm, now: float) -> None:
        """Take over an alarm that is open in the catalogue."""
        entries = self._entries.setdefault(alarm.component, {})
        entries[alarm.condition, alarm.subject] = _Entry(alarm, _OPEN, None, self._hold_off, now)
        self._count += 1
        self._highest = max(self._highest, alarm.id)

    def open(self) -> list[Alarm]:
        """Return the open alarms: those that are not acknowledged first, alarms before warnings, then by number."""
        entries = (entry for of_component in self._entries.values() for entry in of_component.values())
        found = [entry.alarm for entry in entries if entry.state == _OPEN]
        return sorted(found, key=lambda a: (a.acknowledged is not None, -_LEVELS.index(a.level), a.id))

    def take(self, component: str, readings: Iterable[Reading], now: float) -> None:
        """Take readings of a component. `now`: time.monotonic()."""
        entries = self._entries.get(component, {})
        for reading in readings:
            key = reading.condition, reading.subject[:_MAX_SUBJECT]
            entry = entries.get(key)
            if reading.level:
                self._is_true(entry, component, key, reading, now)
            elif entry is not None and not self._is_in_order(entry, now):
                del entries[key]
                self._count -= 1

    def knows(self, component: str) -> bool:
        """Whether a condition of a component is raised, may be soon, or was raised lately."""
        return bool(self._entries.get(component))

    def subjects(self, component: str) -> list[tuple[str, str]]:
        """Return conditions and subjects of a component that are raised, or may be soon."""
        return [key for key, entry in self._entries.get(component, {}).items() if entry.state != _OVER]

    def components(self, condition: str) -> list[tuple[str, str]]:
        """Return components and subjects of which this condition is raised, or may be soon."""
        return [
            (component, subject)
            for component in self._entries
            for known, subject in self.subjects(component)
            if known == condition
        ]

    def tick(self, now: float) -> None:
        """Raise and clear the alarms that are due."""
        for component, entries in list(self._entries.items()):
            over = [key for key, entry in entries.items() if not self._tick(entry, now)]
            for key in over:
                del entries[key]
            self._count -= len(over)
            if not entries:
                del self._entries[component]

    def _tick(self, entry: _Entry, now: float) -> bool:
        """Return False when the entry may be forgotten."""
        if entry.state == _PENDING:
            self._raise_when_due(entry, now)
        elif entry.state == _OVER:
            return entry.since is None or now - entry.since < _MEMORY
        elif entry.since is not None:
            if now - entry.since >= entry.hold:
                self._clear(entry, now)
        elif entry.alarm.acknowledged is not None and now - entry.heard >= _NO_NEWS:
            self._clear(entry, now)
        return True

    def acknowledge(self, number: int, by: str, comment: str) -> Alarm:
        """Acknowledge an open alarm; RequestError if there is none of this number."""
        alarms = self.open()
        alarm = next((one for one in alarms if one.id == number), None)
        if alarm is None:
            known = ", ".join(str(one.id) for one in alarms) or "none"
            raise RequestError(f"acknowledge_alarm: no alarm {number} is open; open alarms: {known}")
        alarm.acknowledged, alarm.by, alarm.comment = self._wall(), by, comment
        self._changed("acknowledged", alarm)
        return alarm

    def _is_true(
        self, entry: _Entry | None, component: str, key: tuple[str, str], reading: Reading, now: float
    ) -> None:
        if entry is None:
            if self._count >= MAX_ALARMS:
                self.refused += 1
                return
            alarm = Alarm(0, reading.condition, component, key[1], "", "", 0.0, 0.0)
            entry = _Entry(alarm, _PENDING, now, self._hold_off, now)
            self._entries.setdefault(component, {})[key] = entry
            self._count += 1
        alarm = entry.alarm
        entry.heard = now
        alarm.text, alarm.as_of, alarm.in_order = cut(printable(reading.text), _MAX_TEXT), None, None
        if entry.state != _OPEN:
            alarm.level = reading.level
            if entry.state == _OVER:
                entry.state, entry.since = _PENDING, now
            self._raise_when_due(entry, now)
            return
        if entry.since is not None:
            entry.since = None
            alarm.count += 1
            alarm.last = self._wall()
        if _LEVELS.index(reading.level) > _LEVELS.index(alarm.level):
            alarm.level = reading.level
            alarm.acknowledged, alarm.by, alarm.comment = None, "", ""
            self._changed("raised", alarm)

    def _is_in_order(self, entry: _Entry, now: float) -> bool:
        """Return False if the condition was true for too short a time to be raised."""
        entry.heard = now
        if entry.state == _OPEN:
            if entry.since is None:
                entry.since, entry.alarm.in_order = now, self._wall()
        elif entry.state == _PENDING:
            if not entry.alarm.id:
                return False
            entry.state, entry.since = _OVER, entry.cleared
        return True

    def _raise_when_due(self, entry: _Entry, now: float) -> None:
        alarm = entry.alarm
        if entry.since is not None and now - entry.since < _DELAYS.get(alarm.condition, 0.0):
            return
        entry.state, entry.since = _OPEN, None
        alarm.last = self._wall()
        if alarm.id:  # the same alarm once more
            entry.hold = min(2 * entry.hold, max(_MAX_HOLD, self._hold_off))
            alarm.count += 1
            alarm.cleared = None
            alarm.acknowledged, alarm.by, alarm.comment = None, "", ""
        else:
            self._highest += 1
            alarm.id = self._highest
            alarm.raised = alarm.last
        self._changed("raised", alarm)

    def _clear(self, entry: _Entry, now: float) -> None:
        entry.state, entry.since, entry.cleared = _OVER, now, now
        entry.alarm.cleared, entry.alarm.in_order = self._wall(), None
        self._changed("cleared", entry.alarm)


class Alarms:
    """The alarms of a core. Its methods are called in the core's loop, and none but close() waits."""

    def __init__(self, config: AlarmConfig, path: Path, core: str) -> None:
        """`path`: of the catalogue. `core`: its address, for the messages to destinations."""
        self._config, self._path = config, path
        self._off = frozenset(config.off)
        self._evaluation = Evaluation(config)
        self._restarted: dict[str, tuple[float, str]] = {}  # by component: when, and the text
        self._last_run: tuple[int, str, list[str]] | None = None
        self._writer: RowWriter[AlarmRow] = RowWriter(
            "alarms", lambda rows: append_alarms(path, rows), lambda count: None
        )
        self._delivery: Delivery | None = None
        if config.command or config.webhook or config.mail:
            from larpixdaq.control.alarm_delivery import Delivery  # late: half of the core's start without it

            self._delivery = Delivery(config, core)
        try:
            rows, highest = open_alarms(path)
        except FileError as error:
            rows, highest = [], 0
            _log.error("open alarms of an earlier core are not known: %s", error)
        self._book = AlarmBook(config.hold_off, self._changed, highest=highest)
        #: Number of alarms raised since the start, and the last one as a line, for the prompts of Operators.
        self.raised = 0
        self.newest = ""
        now = time.monotonic()
        for row in rows:
            alarm = alarm_of(row)
            alarm.as_of = row.time_ns / 1e9
            self._book.restore(alarm, now)
            if row.condition == "component-restarted" and row.component == row.subject:
                self._restarted[row.component] = now, row.text
        if rows:
            _log.warning("%d alarms of an earlier core are open", len(rows))

    # Events of the core.

    def heard(self, component: Component, now: float) -> None:
        """A component has sent a heartbeat."""
        kind = STATUS.get(component.kind)
        status = component.read_status(kind) if kind is not None else None
        if status is None or (isinstance(status, MonitorStatus) and component.stuck):  # its numbers are old
            return
        known = self._book.knows(component.name)
        readings = list(self._evaluation.readings(component.name, status, now, in_order=known))
        if known and isinstance(status, ProducerStatus) and status.boards:
            # Boards that were read by an earlier process of this name, with other options.
            boards = {subject_of(component.name, board.io_group) for board in status.boards}
            readings += [
                Reading(condition, subject, "")
                for condition, subject in self._book.subjects(component.name)
                if subject.startswith(f"{component.name}, io_group ") and subject not in boards
            ]
        self._take(component.name, readings, now)
        if isinstance(status, ProducerStatus):
            self._take("", list(self._evaluation.unread(now)), now)

    def registered(self, component: Component, now: float, *, restarted: bool) -> None:
        """A component has registered. `restarted`: an earlier process of this name was lost."""
        subjects = [subject for condition, subject in self._book.subjects(component.name) if condition == _LOST]
        self._take(component.name, [Reading(_LOST, subject, "") for subject in subjects], now)
        if restarted:
            self._evaluation.forget(component.name)
            text = f"RESTARTED: {component.name}: an earlier process was lost, {_process(component)} is in its place"
            self._restarted[component.name] = now, text
            self._take(component.name, [Reading("component-restarted", component.name, WARNING, text)], now)

    def lost(self, component: Component, what: str, run: int | None, now: float) -> None:
        """A component was lost, or has ended (`what` is "closed"). `run`: the run that requires it, if any."""
        name = component.name
        self._evaluation.forget(name)
        if what == "closed" and run is None:
            subjects = [pair for pair in self._book.subjects(name) if pair[0] not in _LASTING]
            self._take(name, [Reading(condition, subject, "") for condition, subject in subjects], now)
            return
        level = ALARM if run is not None or component.kind in (PRODUCER, STORAGE) else WARNING
        how = "has ended" if what == "closed" else f"is LOST ({_process(component)})"
        text = f"{name} {how}" + (f", and run {run} requires it" if run is not None else "")
        subject = f"{name}, run {run}" if what == "closed" else name
        self._take(name, [Reading(_LOST, subject, level, text), Reading("component-stuck", name, "")], now)

    def missing(self, name: str, run: int, now: float) -> None:
        """A component has not registered with this core, and the present run requires it."""
        text = f"{name} has not registered since the start of the core, and run {run} requires it"
        self._take(name, [Reading(_LOST, f"{name}, run {run}", ALARM, text)], now)

    def stuck(self, component: Component, now: float) -> None:
        """A component is stuck, or no longer."""
        text = f"STUCK: {component.name} is alive, but its waiting work has not moved for 1 s"
        reading = Reading("component-stuck", component.name, WARNING if component.stuck else "", text)
        self._take(component.name, [reading], now)

    def run_over(self, last: Run | None, now: float) -> None:
        """`last`: the last run of the catalogue that is over. Called in each turn of the core."""
        known = (last.run, last.condition, last.reasons) if last is not None else None
        if last is None or known == self._last_run or last.condition == RunCondition.CANCELLED:
            return
        self._last_run = known
        for name, subject in self._book.components(_LOST):
            number = subject.removeprefix(f"{name}, run ")  # that requires it; also in an alarm of an earlier core
            if number.isdecimal() and subject != number and int(number) <= last.run:
                self._take(name, [Reading(_LOST, subject, "")], now)
        level = ALARM
        if last.condition == RunCondition.COMPLETE:
            level = ""
        elif last.condition in (RunCondition.SUSPECT, RunCondition.ABORTED):
            level = WARNING
        reasons = "; ".join(last.reasons)
        text = f"run {last.run} is {last.condition}" + (f": {reasons}" if reasons else "")
        self._take("", [Reading("run-verdict", "runs", level, text)], now)

    def catalogue(self, error: str, now: float) -> None:
        """The catalogue or its audit cannot be written for this reason; "": they can."""
        self._take("", [Reading("catalogue", "catalogue", ALARM if error else "", f"CATALOGUE: {error}")], now)

    def turn(self, now: float) -> None:
        """Raise and clear alarms that are due, and pass rows to the thread that writes them."""
        for name, (since, text) in list(self._restarted.items()):
            if now - since >= EVENT_KEPT:
                del self._restarted[name]
                self._take(name, [Reading("component-restarted", name, "", text)], now)
        self._book.tick(now)
        self._writer.turn(now)

    # Requests of Operators.

    def open(self) -> list[dict[str, Any]]:
        """Return the open alarms, as Alarm."""
        return [msgspec.structs.asdict(alarm) for alarm in self._book.open()]

    def history(self, since: float, limit: int, then: Callable[[list[AlarmRow] | OSError], None]) -> None:
        """Call `then` in a later turn() with the last rows since this time (unix s), or the error."""
        self._writer.submit(lambda: read_alarms(self._path, int(since * 1e9), limit), then)

    def acknowledge(self, number: int, by: str, comment: str) -> dict[str, Any]:
        """Acknowledge an open alarm, and return it; RequestError if there is none of this number."""
        return msgspec.structs.asdict(self._book.acknowledge(number, by, comment))

    def status(self) -> dict[str, Any]:
        """For `status`: what the destinations and the catalogue have got."""
        return {
            "destinations": self._delivery.status() if self._delivery is not None else [],
            "history": self._writer.status(),
            "refused": self._book.refused,
            "off": sorted(self._off),
        }

    def close(self, limit: float) -> None:
        """Write and send what waits, for at most `limit` seconds."""
        until = time.monotonic() + limit
        self._writer.close(limit)
        if self._delivery is not None:
            self._delivery.close(max(0.0, until - time.monotonic()))

    def _take(self, component: str, readings: list[Reading], now: float) -> None:
        if self._off:
            readings = [reading for reading in readings if reading.condition not in self._off]
        self._book.take(component, readings, now)

    def _changed(self, event: str, alarm: Alarm) -> None:
        line = sentence(event, alarm)
        level = logging.INFO if event != "raised" else logging.ERROR if alarm.level == ALARM else logging.WARNING
        _log.log(level, "%s", line)
        self._writer.add(alarm_row(event, alarm))
        if event == "raised":
            self.raised += 1
            self.newest = cut(line, _MAX_LINE)
        if self._delivery is not None:
            self._delivery.send(event, alarm.level, line, msgspec.structs.asdict(alarm))


def alarm_row(event: str, alarm: Alarm) -> AlarmRow:
    """Return the row of the history for what has happened to an alarm now."""
    acknowledged = event == "acknowledged"
    return AlarmRow(
        time.time_ns(),
        alarm.id,
        event,
        alarm.condition,
        alarm.component,
        alarm.subject,
        alarm.level,
        alarm.text,
        int(alarm.raised * 1e9),
        alarm.count,
        alarm.by if acknowledged else "",
        alarm.comment if acknowledged else "",
    )


def alarm_of(row: AlarmRow) -> Alarm:
    """Convert the last row of an open alarm."""
    alarm = Alarm(
        row.alarm,
        row.condition,
        row.component,
        row.subject,
        row.level if row.level in _LEVELS else ALARM,
        row.text,
        row.raised_ns / 1e9,
        row.time_ns / 1e9,
        row.count,
    )
    if row.event == "acknowledged":
        alarm.acknowledged, alarm.by, alarm.comment = row.time_ns / 1e9, row.who, row.comment
    return alarm


def _process(component: Component) -> str:
    return f"process {component.info.get('pid', '?')} on {component.info.get('host', '?')}"
