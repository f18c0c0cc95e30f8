"""Alarms: conditions are evaluated from the statuses of components and the events of the core; open alarms are kept.

An alarm is known by its condition, the component that reports it, and its subject (such as "LArPix board, io_group 1").
It is raised, may be acknowledged, and clears by itself when the condition has been in order for a while. All of this
goes into the run catalogue, into the log, and to the destinations of alarm_delivery.py.

Evaluation yields Readings: a condition is true, or known to be in order. A number that is not known yields no Reading,
so that it neither raises nor clears an alarm.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from larpixdaq.alarm_config import AlarmConfig, RateBand
from larpixdaq.constants import LOG, PRODUCER, RUN_DATA, STORAGE, SUPERVISOR, RunCondition
from larpixdaq.control.audit import RowWriter
from larpixdaq.control.catalogue import AlarmRow, Run, append_alarms, open_alarms, read_alarms
from larpixdaq.control.disk_watch import time_to_full
from larpixdaq.control.registry import Component
from larpixdaq.errors import FileError, RequestError, printable
from larpixdaq.protocol.reports import (
    BoardReport,
    ChannelRate,
    ClockReport,
    IoGroupReport,
    LogStatus,
    MonitorStatus,
    ProducerStatus,
    Status,
    StorageStatus,
    SupervisorStatus,
)
from larpixdaq.runtime.units import duration, size, utc

if TYPE_CHECKING:
    from larpixdaq.control.alarm_delivery import Delivery

_log = logging.getLogger("larpixdaq.core")
WARNING: Final = "warning"
ALARM: Final = "alarm"
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
#: Seconds for which a restart, or a loss of log records, counts.
_EVENT_KEPT: Final = 60.0
#: Seconds over which rates and fractions are averaged, and minimum number of packets for a fraction.
_RATE_SPAN: Final = 5.0
_FRACTION_SPAN: Final = 10.0
_FRACTION_PACKETS: Final = 1000
#: Seconds between two points of these averages.
_POINT_INTERVAL: Final = 0.45
#: Fractions of ring and spool in use from which the level is "alarm".
_RING_ALARM: Final = 0.9
_SPOOL_ALARM: Final = 0.5
#: Maximum number of channels that a text names, and that a monitor reports as the hottest.
_NAMED: Final = 5
_HOTTEST: Final = 20


class Reading(NamedTuple):
    """State of a condition for a subject. `level`: "" in order, "warning" or "alarm"."""

    condition: str
    subject: str
    level: str
    text: str = ""


class Alarm(msgspec.Struct):
    """An alarm. Times in unix seconds; `component`: the one that reports it, "" for the core.

    `count`: how many times its condition became true. `raised`: the first time, `last`: the last time. `as_of`: the time
    of the text and of the count, if an earlier core has written them and nothing was heard of the condition since.
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
    old = f" (as of {utc(alarm.as_of)}, before a restart of the core)" if alarm.as_of is not None else ""
    return f"{alarm.level.upper()} {alarm.id} since {utc(alarm.raised)}{times}: {alarm.text}{old}{seen}"


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
        alarm.text, alarm.as_of = printable(reading.text)[:_MAX_TEXT], None
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
            entry.since = now if entry.since is None else entry.since
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
        entry.alarm.cleared = self._wall()
        self._changed("cleared", entry.alarm)


def disconnection(board: BoardReport) -> str:
    """Return `NOT CONNECTED since TIME (reason)`, or "" while the board is connected."""
    if board.away_since is None:
        return ""
    return f"NOT CONNECTED since {utc(board.away_since)}" + (f" ({board.problem})" if board.problem else "")


def present_readings(
    name: str, status: Status | None, config: AlarmConfig, *, in_order: bool = True
) -> Iterator[Reading]:
    """Yield the readings that one status alone tells. `name`: of its component. `in_order`: also those in order.

    Those in order are left out, and no texts are made for them, because this runs for each heartbeat.
    """
    if isinstance(status, StorageStatus):
        yield from _storage(name, status, config)
    elif isinstance(status, ProducerStatus):
        yield from _producer(name, status, config, in_order)
    elif isinstance(status, MonitorStatus):
        yield from _monitor(name, status, config)
    elif isinstance(status, SupervisorStatus):
        for process in status.processes:
            text = ""
            if process.state == "given up":
                why = ": ".join(part for part in (process.last_exit, process.last_line) if part)
                text = f"GIVEN UP: {process.name}: {why}; `larpixdaq up` tries again"
            yield Reading("given-up", process.name, ALARM if text else "", text)


def _storage(name: str, status: StorageStatus, config: AlarmConfig) -> Iterator[Reading]:
    paused, left = status.paused, status.seconds_left
    text = f"PAUSED: {name} is not writing: {paused}" if paused else ""
    yield Reading("storage-paused", name, ALARM if paused else "", text)
    damaged = status.not_recovered
    text = f"NOT RECOVERED: {name}: {'; '.join(damaged)}" if damaged else ""
    yield Reading("not-recovered", name, ALARM if damaged else "", text)
    if left is not None and left >= 0:
        level = ALARM if left < config.disk_alarm else WARNING if left < config.disk_warning else ""
        text = f"DISK NEARLY FULL: {name}: {time_to_full(status)}" if level else ""
        yield Reading("disk-left", name, level, text)
    elif left is None and status.free_bytes is not None and not status.files:
        yield Reading("disk-left", name, "")  # nothing is written: the disk does not fill
    text = f"COMMAND FAILED: {name}: {status.on_close}" if status.on_close else ""
    yield Reading("on-close", name, WARNING if text else "", text)


def _producer(name: str, status: ProducerStatus, config: AlarmConfig, in_order: bool) -> Iterator[Reading]:
    in_run = status.run is not None
    removed = [f"FILE REMOVED: {name}: {text}; lost if the process is killed" for text in status.nameless]
    yield Reading("producer-files", f"{name}, removed", ALARM if removed else "", "; ".join(removed))
    kept = [f"DAMAGED FILE KEPT: {name}: {path} could not be read whole; move it away" for path in status.kept_aside]
    yield Reading("producer-files", f"{name}, damaged", WARNING if kept else "", "; ".join(kept))
    for board in status.boards:
        off = board.clock is not None and _is_off(board.clock, config)
        if in_order or off or board.away_since is not None or board.setup or board.changed:
            yield from _board(_subject(name, board.io_group), board, config, in_run)
    for io_group, verdict in status.verdicts.items():
        if verdict == "complete" and not in_order:
            continue
        level = "" if not in_run or verdict == "complete" else WARNING if verdict == "suspect" else ALARM
        text = ""
        if level:
            text = f"io_group {io_group} is {verdict}: data were or may have been lost before they reached {name}"
        yield Reading("board-losses", f"{name}, io_group {io_group}", level, text)
    text = ""
    if in_run and status.dropped:
        text = f"ROWS DROPPED: {name}: {status.dropped} rows of run {status.counted_run}: ring and spool were full"
    yield Reading("rows-dropped", name, ALARM if text else "", text)
    if status.waits is not None:
        level = "" if status.waits or status.ring < config.ring else ALARM if status.ring >= _RING_ALARM else WARNING
        text = ""
        if level:
            text = f"{name}: ring {status.ring:.0%} full, limit {config.ring:.0%}; {status.owed_blocks} blocks pending"
        yield Reading("ring-filling", name, level, text)
    if status.spool_limit is not None:
        used = status.spooled_bytes / status.spool_limit if status.spool_limit else 0.0
        level = "" if not used or used < config.spool else ALARM if used >= _SPOOL_ALARM else WARNING
        text = ""
        if level:
            text = f"{name}: spool {used:.0%} full, limit {config.spool:.0%} of {size(status.spool_limit)}"
        yield Reading("spool-filling", name, level, text)


def _monitor(name: str, status: MonitorStatus, config: AlarmConfig) -> Iterator[Reading]:
    if status.run is None:
        return
    if status.hottest is not None:
        hot = [channel for channel in status.hottest if channel.rate > config.hot_channel]
        text = ""
        if hot:
            more = " or more" if len(hot) == len(status.hottest) and len(hot) >= _HOTTEST else ""
            text = f"HOT CHANNELS: {len(hot)}{more} above {config.hot_channel:g} Hz in run {status.run}: {_named(hot)}"
        yield Reading("hot-channels", name, WARNING if hot else "", text)
    if (dead := status.dead_channels) is not None:
        text = ""
        if dead > config.dead_channels:
            text = (
                f"DEAD CHANNELS: {dead} (limit {config.dead_channels}) have stopped in run {status.run} while their "
                f"io_groups go on; rates before: {_named(status.dead)}"
            )
        yield Reading("dead-channels", name, WARNING if text else "", text)


def _named(channels: list[ChannelRate]) -> str:
    """Return the first channels (io_group-io_channel-chip_id-channel_id) with their rates."""
    return ", ".join(f"{each.channel} at {each.rate:.4g} Hz" for each in channels[:_NAMED])


def _board(subject: str, board: BoardReport, config: AlarmConfig, in_run: bool) -> Iterator[Reading]:
    level = "" if board.away_since is None else ALARM if in_run else WARNING
    yield Reading("board-disconnected", subject, level, f"{board.name}: {disconnection(board)}" if level else "")
    setup = board.setup
    text = f"io_group {board.io_group}: {'; '.join(setup)}" if setup else ""
    yield Reading("board-setup", subject, WARNING if setup else "", text)
    if board.changed is not None:
        text = f"io_group {board.io_group}: {board.changed}" if board.changed else ""
        yield Reading("board-changed", subject, WARNING if text else "", text)
    if (clock := board.clock) is not None:
        text = f"{board.name}: {clock.text}, limit {config.clock_offset:g} s" if _is_off(clock, config) else ""
        yield Reading("clock-offset", subject, WARNING if text else "", text)


def _is_off(clock: ClockReport, config: AlarmConfig) -> bool:
    """Whether the offset of a board's clock is certainly above the limit."""
    return abs(clock.offset) - clock.offset_uncertainty > config.clock_offset


def _subject(name: str, io_group: int) -> str:
    return f"{name}, io_group {io_group}"


class _Point(NamedTuple):
    """Counts of an io_group at a time (time.monotonic())."""

    time: float
    packets: int
    bad_parity: int
    fifo_full: int | None


@dataclass
class _Counts:
    """Counts of one producer in its run over the last seconds."""

    run: int | None = None
    running_since: float | None = None  # when its state became RUN
    points: dict[int, deque[_Point]] = field(default_factory=dict)  # by io_group


class Evaluation:
    """Readings that need earlier statuses too: rates, fractions, and counts that have grown."""

    def __init__(self, config: AlarmConfig) -> None:
        self._config = config
        self._bands: dict[int, RateBand] = {band.io_group: band for band in config.rate}
        self._producers: dict[str, _Counts] = {}
        self._log_losses: dict[str, tuple[int, float | None]] = {}  # by log: lost records, and when they grew
        self._run, self._read = 0, set[int]()  # the newest run, and the io_groups that its producers read

    def forget(self, name: str) -> None:
        """Forget the statuses of a component, because it has ended or was restarted."""
        self._producers.pop(name, None)
        self._log_losses.pop(name, None)

    def readings(self, name: str, status: Status | None, now: float, *, in_order: bool = True) -> Iterator[Reading]:
        """Yield all readings of a status. `now`: time.monotonic(). `in_order` as in present_readings()."""
        yield from present_readings(name, status, self._config, in_order=in_order)
        if isinstance(status, ProducerStatus) and status.groups is not None:
            counts = self._producers.setdefault(name, _Counts())
            running = status.run is not None and status.state == "RUN" and not status.finished
            if not running or counts.run != status.run:
                counts.run, counts.running_since = status.run, now if running else None
                counts.points.clear()
            elif counts.running_since is None:
                counts.running_since = now
            if counts.running_since is not None or in_order:
                for group in status.groups:
                    yield from self._group(name, group, counts, now, in_order)
            if running and status.run is not None and status.run >= self._run:
                if status.run > self._run:
                    self._run, self._read = status.run, set()
                self._read.update(group.io_group for group in status.groups)
        elif isinstance(status, SupervisorStatus):
            # The core cannot see its own restart; of components it sees the loss.
            for process in (one for one in status.processes if one.name == "core"):
                recent = process.restarts > 0 and process.state == "running"
                recent = recent and abs(time.time() - process.since) < _EVENT_KEPT
                text = f"RESTARTED: the core, {process.restarts} times: {process.last_exit}; {process.last_line}"
                yield Reading("component-restarted", "core", WARNING if recent else "", text)
        elif isinstance(status, LogStatus):
            known, grown = self._log_losses.get(name, (status.lost, None))
            grown = now if status.lost > known else grown
            self._log_losses[name] = status.lost, grown
            recent = grown is not None and now - grown < _EVENT_KEPT
            text = f"{name}: {status.lost} log records lost since its start"
            yield Reading("log-losses", name, WARNING if recent else "", text)

    def unread(self, now: float) -> Iterator[Reading]:
        """Yield a reading for each expected io_group: whether no producer of the run reads it."""
        begins = [one.running_since for one in self._producers.values() if one.running_since is not None]
        if begins and now - min(begins) < self._config.expected_after:
            return
        for io_group in self._config.expected_io_groups:
            text = ""
            if begins and io_group not in self._read:
                text = f"SILENT: io_group {io_group}: expected, but no producer of run {self._run} reads it"
            yield Reading("io-group-silent", f"io_group {io_group}", ALARM if text else "", text)

    def _group(self, name: str, group: IoGroupReport, counts: _Counts, now: float, in_order: bool) -> Iterator[Reading]:
        subject = _subject(name, group.io_group)
        since = counts.running_since
        if since is None:
            for condition in ("io-group-silent", "rate", "bad-parity", "fifo-full"):
                yield Reading(condition, subject, "")
            return
        text = ""
        if not group.packets and group.io_group in self._config.expected_io_groups:
            if now - since >= self._config.expected_after:
                text = f"SILENT: io_group {group.io_group} of {name}: expected, but no packet in run {counts.run} yet"
        elif group.silent is not None:
            text = f"SILENT: io_group {group.io_group} of {name}: no packet for {group.silent:.1f} s"
        if text or in_order:
            yield Reading("io-group-silent", subject, ALARM if text else "", text)
        points = counts.points.setdefault(group.io_group, deque())
        if points and group.packets < points[-1].packets:  # of a restarted producer
            points.clear()
        point = _Point(now, group.packets, group.bad_parity, group.fifo_full)
        if not points or now - points[-1].time >= _POINT_INTERVAL:
            points.append(point)
        elif not in_order:
            return
        while len(points) > 2 and points[1].time <= now - _FRACTION_SPAN:
            points.popleft()
        if (band := self._bands.get(group.io_group)) is not None:
            yield from _rate(subject, band, points, point)
        first = points[0]
        packets = group.packets - first.packets
        if packets >= _FRACTION_PACKETS:
            bad = group.bad_parity - first.bad_parity
            yield _fraction("bad-parity", subject, group.io_group, bad, packets, self._config.bad_parity)
            if group.fifo_full is not None and first.fifo_full is not None:
                full = group.fifo_full - first.fifo_full
                yield _fraction("fifo-full", subject, group.io_group, full, packets, self._config.fifo_full)


def _rate(subject: str, band: RateBand, points: deque[_Point], last: _Point) -> Iterator[Reading]:
    first = next((point for point in reversed(points) if point.time <= last.time - _RATE_SPAN), None)
    if first is None:
        return
    rate = (last.packets - first.packets) / (last.time - first.time)
    text = ""
    if rate < band.min or (band.max is not None and rate > band.max):
        limits = f"at least {band.min:g}" if band.max is None else f"{band.min:g} to {band.max:g}"
        text = f"io_group {band.io_group}: {rate:.4g} packets/s, limits {limits} packets/s"
    yield Reading("rate", subject, WARNING if text else "", text)


#: What the fractions count.
_FRACTIONS: Final = {"bad-parity": "with bad parity", "fifo-full": "with the flag of a full FIFO"}


def _fraction(condition: str, subject: str, io_group: int, count: int, packets: int, limit: float) -> Reading:
    if count <= limit * packets:
        return Reading(condition, subject, "")
    share = f"{count / packets:.2%} of {packets} packets {_FRACTIONS[condition]}"
    return Reading(condition, subject, WARNING, f"io_group {io_group}: {share}, limit {limit:.2%}")


_KINDS: Final[Mapping[str, type[Any]]] = {
    PRODUCER: ProducerStatus,
    STORAGE: StorageStatus,
    RUN_DATA: MonitorStatus,
    LOG: LogStatus,
    SUPERVISOR: SupervisorStatus,
}


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
        kind = _KINDS.get(component.kind)
        status = component.read_status(kind) if kind is not None else None
        if status is None or (isinstance(status, MonitorStatus) and component.stuck):  # its numbers are old
            return
        known = self._book.knows(component.name)
        readings = list(self._evaluation.readings(component.name, status, now, in_order=known))
        if known and isinstance(status, ProducerStatus) and status.boards:
            # Boards that were read by an earlier process of this name, with other options.
            boards = {_subject(component.name, board.io_group) for board in status.boards}
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
            number = subject.removeprefix(f"{name}, run ")  # of the run that requires it; also of an earlier core's alarm
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
            if now - since >= _EVENT_KEPT:
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
            self.newest = line[:_MAX_LINE]
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
