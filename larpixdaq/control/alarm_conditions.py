"""Conditions of alarms, evaluated from the statuses of components.

Evaluation yields Readings: a condition is true, or known to be in order. A number that is not known yields no Reading,
so that it neither raises nor clears an alarm.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from larpixdaq.alarm_config import AlarmConfig, RateBand
from larpixdaq.control.disk_watch import time_to_full
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
from larpixdaq.runtime.units import size, utc

WARNING: Final = "warning"
ALARM: Final = "alarm"
#: Seconds for which a restart, or a loss of log records, counts.
EVENT_KEPT: Final = 60.0
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
            yield from _board(subject_of(name, board.io_group), board, config, in_run)
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


def subject_of(name: str, io_group: int) -> str:
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
                recent = recent and abs(time.time() - process.since) < EVENT_KEPT
                text = f"RESTARTED: the core, {process.restarts} times: {process.last_exit}; {process.last_line}"
                yield Reading("component-restarted", "core", WARNING if recent else "", text)
        elif isinstance(status, LogStatus):
            known, grown = self._log_losses.get(name, (status.lost, None))
            grown = now if status.lost > known else grown
            self._log_losses[name] = status.lost, grown
            recent = grown is not None and now - grown < EVENT_KEPT
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
        subject = subject_of(name, group.io_group)
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
