"""The metrics of a detector: what each is, and their values from the status of the core and the summaries of monitors.

SECTIONS has all metrics, and is their documentation (docs/metrics.md). Counters count since the start of the process
that reports them, over all runs, because Prometheus sees only a fall of a counter as its reset.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

import msgspec

from larpixdaq.alarm_config import Condition, Level
from larpixdaq.constants import COUNTS, READY, RUN, STOP, Count, RunCondition
from larpixdaq.errors import printable
from larpixdaq.protocol.reports import (
    STATUS,
    BoardReport,
    LoadShares,
    LogStatus,
    ProducerStatus,
    Status,
    StorageStatus,
    SupervisorStatus,
)
from larpixdaq.protocol.stream import VERDICTS

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

_log = logging.getLogger("larpixdaq.metrics")

_UNITS: Final = ("seconds", "bytes", "ratio")
_PREFIX: Final = "larpixdaq_"


class Metric(NamedTuple):
    """A metric. `name`: without prefix and `_total`. `kind`: counter, gauge, info, or stateset with these `states`."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str
    states: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """The name of its samples."""
        return _PREFIX + self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


def _counter(name: str, labels: str, text: str) -> Metric:
    return Metric(name, "counter", tuple(labels.split()), text)


def _gauge(name: str, labels: str, text: str) -> Metric:
    return Metric(name, "gauge", tuple(labels.split()), text)


def _states(name: str, labels: str, states: Iterable[str], text: str) -> Metric:
    return Metric(name, "stateset", tuple(labels.split()), text, tuple(states))


#: Conditions of a run that has ended.
_CONDITIONS: Final = tuple(str(one) for one in RunCondition if one not in ("RUNNING", "CONTINUED"))
#: Where rows are lost, and the counters of the ledger that count them.
_PLACES: Final = {
    "unknown_words": Count.UNKNOWN_WORDS,
    "rejected_words": Count.REJECTED_WORDS,
    "ring_full": Count.DROPPED,
}
_UNUSED: Final = {
    "trailing": Count.TRAILING_BYTES,
    "rejected_messages": Count.REJECTED_BYTES,
    "resync": Count.RESYNC_BYTES,
}
_ROWS: Final = {"word": Count.WORD_ROWS, "time": Count.TIME_ROWS, "info": Count.INFO_ROWS, "sent": Count.SENT_ROWS}
_PLAIN_COUNTS: Final = {
    "board_messages": Count.MESSAGES,
    "board_messages_rejected": Count.REJECTED_MESSAGES,
    "board_messages_wrong_count": Count.WRONG_COUNTS,
    "board_bytes": Count.BYTES_IN,
    "words": Count.WORDS_IN,
    "packets": Count.PACKETS,
    "packets_bad_parity": Count.BAD_PARITY,
}
_CHANNEL: Final = "monitor io_group io_channel chip_id channel_id"
SECTIONS: Final[dict[str, tuple[Metric, ...]]] = {
    "Core": (
        _gauge("up", "", "1 if the core has answered; 0 if not: then only exporter_info is there beside it"),
        Metric("exporter", "info", ("version",), "Version of larpixdaq-metrics"),
        Metric("core", "info", ("version",), "Version of the core"),
        _gauge("core_start_time_seconds", "", "Start of the core, unix time"),
        _gauge("operators", "", "Connected Operators, with that of larpixdaq-metrics"),
        _counter("refused_messages", "", "Malformed messages that the core has refused since its start"),
        _counter("audit_rows_lost", "", "Rows of the audit that could not be written since the core's start"),
    ),
    "Run": (
        _states("run_state", "", (STOP, READY, RUN), "Run state; 1 for the present one"),
        _gauge("run_number", "", "Number of the run; in STOP that of the last one"),
        _gauge("run_begin_time_seconds", "", "Begin of RUN, unix time; only in RUN"),
        _gauge("run_missing_components", "", "Producers and storages of the run that are lost; 0 in STOP"),
        _gauge("last_run_number", "", "Number of the last run that is over"),
        _states("last_run_condition", "", _CONDITIONS, "Condition of the last run; 1 for the present one"),
        _gauge("last_run_end_time_seconds", "", "End of the last run, unix time"),
        _gauge("last_run_rows", "", "Rows of the last run that its producers have made; only if known"),
        _gauge("last_run_stored_rows", "", "Rows of the last run that are in its files; only if known"),
    ),
    "Data of a producer": (
        _counter("board_messages", "producer io_group", "Messages of the board that were decoded"),
        _counter("board_messages_rejected", "producer io_group", "Messages of the board that could not be understood"),
        _counter(
            "board_messages_wrong_count", "producer io_group", "Messages whose headers have a wrong number of words"
        ),
        _counter("board_bytes", "producer io_group", "Bytes from the board"),
        _counter("bytes_unused", "producer io_group place", f"Bytes that are in no word: {', '.join(_UNUSED)}"),
        _counter("words", "producer io_group", "Words from the board"),
        _counter("packets", "producer io_group", "Packets from chips"),
        _counter("packets_bad_parity", "producer io_group", "Packets with wrong parity, which are stored too"),
        _counter(
            "packets_fifo_full", "producer io_group", "Packets with the flag of a full FIFO, which are stored too"
        ),
        _counter("rows_made", "producer io_group kind", f"Rows made, by kind: {', '.join(_ROWS)}; INFO is io_group 0"),
        _counter(
            "rows_lost",
            "producer io_group place",
            "Rows that no file will have: words of unknown type, words with impossible content, rows without room in "
            "ring and spool",
        ),
        _counter("packets_outside_runs", "producer", "Packets that came outside of runs, which are not stored"),
        _states(
            "io_group_verdict", "producer io_group", VERDICTS, "Worst verdict on the data of this run, or the last"
        ),
        _gauge(
            "io_group_silence_seconds", "producer io_group", "Time since its last packet, if long for its rate, else 0"
        ),
        _gauge("board_connected", "producer io_group board", "1 if the board is connected"),
        _gauge("board_clock_offset_seconds", "producer io_group", "The board's clock less that of its host"),
        _gauge("board_clock_offset_uncertainty_seconds", "producer io_group", "Uncertainty of this offset"),
        _gauge("board_clock_drift_ratio", "producer io_group", "Drift of this offset, in seconds per second"),
    ),
    "Ring, spool and stream of a producer": (
        _gauge("ring_used_ratio", "producer", "Fraction of the ring in use"),
        _gauge("pending_blocks", "producer", "Blocks that a required storage has not acknowledged"),
        _gauge("spool_blocks", "producer", "Blocks in the spool"),
        _gauge("spool_bytes", "producer", "Bytes in the spool"),
        _gauge("spool_limit_bytes", "producer", "Maximum bytes of the spool; 0: there is none"),
        _gauge("subscribers", "producer", "Storages and monitors that are connected"),
    ),
    "Storages": (
        _counter("storage_rows", "storage", "Rows that went into files; after a disk error some come again"),
        _counter("storage_bytes", "storage", "Bytes by which the files have grown"),
        _gauge("storage_open_files", "storage", "Files that are being written"),
        _gauge("storage_paused", "storage", "1 if nothing is written, because the disk is full or fails"),
        _gauge("storage_unrecovered_files", "storage", "Parts that could not be recovered"),
        _counter("storage_duplicate_blocks", "storage", "Blocks that came twice and are stored once"),
        _counter("storage_on_close_failures", "storage", "Files for which --on-close or --raw has failed"),
        _gauge("disk_free_bytes", "storage", "Free space on its disk"),
        _gauge("disk_left_seconds", "storage", "Time until its disk is full at the present rate; only if known"),
    ),
    "Monitors": (
        _gauge("monitor_up", "monitor", "1 if the monitor has answered"),
        _gauge("monitor_seen_ratio", "monitor", "Fraction of the run's rows that it has counted"),
        _gauge("monitor_packets_per_second", "monitor", "Packets per second over the last second, exact"),
        _gauge("io_group_packets_per_second", "monitor io_group", "Packets per second of an io_group, exact"),
        _gauge("channel_packets_per_second", _CHANNEL, "Rates of the channels with the highest rates (--hottest)"),
        _gauge("dead_channels", "monitor", "Channels that have stopped while their io_group goes on; only if known"),
        _gauge("silent_channels", "monitor", "Known channels without a packet in this run"),
        _gauge(
            "sync_interval_seconds", "monitor io_group statistic", "Time between SYNC words: last; min, max of a minute"
        ),
        _gauge(
            "time_stamp_spread_seconds", "monitor io_group", "How far its clock is ahead of those of the other boards"
        ),
        _gauge(
            "chip_packets_per_second",
            "monitor io_group io_channel chip_id",
            "Rate of a chip, at most 10 s old (--chips)",
        ),
    ),
    "Components": (
        _gauge("component_up", "component kind", "1 if the component is alive, 0 if it is lost"),
        _gauge("component_stuck", "component kind", "1 if its waiting work has not moved for 1 s"),
        _gauge("component_heartbeat_age_seconds", "component kind", "Time since its last heartbeat"),
        _gauge("component_processor_cores", "component kind", "Processor time per second, of all its threads"),
        _gauge(
            "component_loop_load_ratio", "component kind", "Processor time per second of its loop; at 1 it is too slow"
        ),
        _counter("refused_connections", "component", "Connections that were refused for want of a key"),
        _states(
            "process_state",
            "supervisor process",
            ("running", "waiting", "ending", "given up"),
            "State of a process under supervision; 1 for the present one",
        ),
        _counter("process_restarts", "supervisor process", "Times that the supervisor has started it again"),
    ),
    "Alarms and log": (
        _gauge("alarms_open", "condition level", "Open alarms; 0 also for conditions without one"),
        _gauge("alarms_unacknowledged", "level", "Open alarms that nobody has acknowledged"),
        _counter("log_records", "log", "Records that the log has written"),
        _counter("log_records_lost", "log", "Records that the log could not write"),
        _counter("log_records_held_back", "log", "Records that the log has left out, because one sender sent too many"),
    ),
}
_BY_NAME: Final = {metric.name: metric for metrics in SECTIONS.values() for metric in metrics}


def table() -> str:
    """Return the tables of all metrics in Markdown, as docs/metrics.md has them."""
    lines = []
    for section, metrics in SECTIONS.items():
        lines += [f"### {section}", "", "| metric | type | labels | what it is |", "| --- | --- | --- | --- |"]
        for metric in metrics:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            states = f": {', '.join(f'`{state}`' for state in metric.states)}" if metric.states else ""
            kind = "state set" if metric.states else metric.kind
            lines.append(f"| `{metric.full_name}` | {kind} | {labels} | {metric.text}{states} |")
        lines.append("")
    return "\n".join(lines)


class Samples:
    """Values of metrics by labels: a Collector of prometheus_client. Text of labels is printable."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], Any]] = {}

    def add(self, name: str, value: Any, *labels: object) -> None:
        """Add a value, or the state of a state set. None: it is not known, and there is no sample."""
        if value is not None:
            self._values.setdefault(name, {})[tuple(printable(str(label)) for label in labels)] = value

    def collect(self) -> Iterator[Family]:
        """Yield the metrics that have values, in the order of SECTIONS."""
        from prometheus_client import core

        for name, metric in _BY_NAME.items():
            if name not in self._values:
                continue
            full, values = _PREFIX + name, self._values[name].items()
            if metric.kind == "stateset":
                states = core.StateSetMetricFamily(full, metric.text, labels=metric.labels)
                for labels, present in values:
                    states.add_metric(labels, {state: state == present for state in metric.states})
                yield states
            elif metric.kind == "info":
                info = core.InfoMetricFamily(full, metric.text, labels=metric.labels)
                for labels, _ in values:
                    info.add_metric(labels, {})
                yield info
            else:
                kind = core.CounterMetricFamily if metric.kind == "counter" else core.GaugeMetricFamily
                unit = next((unit for unit in _UNITS if name.endswith(f"_{unit}")), "")
                plain = kind(full, metric.text, labels=metric.labels, unit=unit)
                for labels, value in values:
                    plain.add_metric(labels, value)
                yield plain


# What the core says. All fields that another version may not have are optional.


class RunStatus(msgspec.Struct):
    run: int
    condition: str = ""
    begun: float | None = None
    ended: float | None = None
    rows: int | None = None
    stored: int | None = None
    missing: list[str] = []


class ComponentStatus(msgspec.Struct):
    name: str
    kind: str
    alive: bool = True
    stuck: bool = False
    heard_s: float = 0.0
    actions: list[str] = []
    status: dict[str, Any] = {}


class OpenAlarm(msgspec.Struct):
    condition: str
    level: str
    acknowledged: float | None = None


class AuditStatus(msgspec.Struct):
    lost: int = 0


class CoreStatus(msgspec.Struct):
    state: str
    components: list[ComponentStatus]
    run: RunStatus | None = None
    last_run: RunStatus | None = None
    operators: list[str] = []
    alarms: list[OpenAlarm] = []
    load: LoadShares | None = None
    refused_messages: int = 0
    refused_connections: int = 0
    audit: AuditStatus = msgspec.field(default_factory=AuditStatus)
    version: str = ""
    started: float | None = None


def add_core(samples: Samples, status: CoreStatus) -> None:
    """Add what the core says of itself, the run and the alarms."""
    samples.add("core", 1, status.version)
    samples.add("core_start_time_seconds", status.started)
    samples.add("operators", len(status.operators))
    samples.add("refused_messages", status.refused_messages)
    samples.add("refused_connections", status.refused_connections, "core")
    samples.add("audit_rows_lost", status.audit.lost)
    _add_load(samples, status.load, "core", "core")
    run, last = status.run, status.last_run
    samples.add("run_state", status.state)
    samples.add("run_number", run.run if run is not None else last.run if last is not None else None)
    samples.add("run_missing_components", len(run.missing) if run is not None else 0)
    if run is not None and status.state == RUN:
        samples.add("run_begin_time_seconds", run.begun)
    if last is not None:
        samples.add("last_run_number", last.run)
        samples.add("last_run_condition", last.condition)
        samples.add("last_run_end_time_seconds", last.ended)
        samples.add("last_run_rows", last.rows)
        samples.add("last_run_stored_rows", last.stored)
    counts = dict.fromkeys(((condition, level) for condition in get_args(Condition) for level in get_args(Level)), 0)
    waiting = dict.fromkeys(get_args(Level), 0)
    for alarm in status.alarms:
        kind = alarm.condition, alarm.level
        counts[kind] = counts.get(kind, 0) + 1
        waiting[alarm.level] = waiting.get(alarm.level, 0) + (alarm.acknowledged is None)
    for (condition, level), count in counts.items():
        samples.add("alarms_open", count, condition, level)
    for level, count in waiting.items():
        samples.add("alarms_unacknowledged", count, level)


def add_component(samples: Samples, component: ComponentStatus) -> None:
    """Add what the core knows of a component and, if it is alive and not stuck, what its last heartbeat says."""
    who = component.name, component.kind
    samples.add("component_up", int(component.alive), *who)
    samples.add("component_stuck", int(component.stuck), *who)
    samples.add("component_heartbeat_age_seconds", component.heard_s, *who)
    if not component.alive or component.stuck or not component.status:
        return
    try:
        status: Status = msgspec.convert(component.status, STATUS[component.kind])
    except (KeyError, msgspec.ValidationError, TypeError, ValueError) as error:  # of another version
        _log.debug("%s: its status is not understood: %s", component.name, error)
        return
    _add_load(samples, status.load, *who)
    if isinstance(status, ProducerStatus):
        _add_producer(samples, component.name, status)
    elif isinstance(status, StorageStatus):
        _add_storage(samples, component.name, status)
    elif isinstance(status, LogStatus):
        samples.add("log_records", status.written, component.name)
        samples.add("log_records_lost", status.lost, component.name)
        samples.add("log_records_held_back", status.held_back, component.name)
        samples.add("refused_connections", status.refused_connections, component.name)
    elif isinstance(status, SupervisorStatus):
        for process in status.processes:
            samples.add("process_state", process.state, component.name, process.name)
            samples.add("process_restarts", process.restarts, component.name, process.name)


def _add_load(samples: Samples, load: LoadShares | None, name: str, kind: str) -> None:
    if load is not None:
        samples.add("component_processor_cores", load.process, name, kind)
        samples.add("component_loop_load_ratio", load.loop, name, kind)


def _add_producer(samples: Samples, name: str, status: ProducerStatus) -> None:
    if status.totals is not None:
        # Counters begin at 0 with the board, so that Prometheus sees the first lost row as an increase.
        counts = {board.io_group: [0] * len(COUNTS) for board in status.boards} | {0: [0] * len(COUNTS)}
        counts |= {io_group: numbers for io_group, *numbers in status.totals if len(numbers) == len(COUNTS)}
        for io_group, numbers in counts.items():
            _add_counts(samples, numbers, name, io_group)
        samples.add("packets_outside_runs", status.total_outside, name)
    for group in status.groups or []:
        samples.add("packets_fifo_full", group.total_fifo_full, name, group.io_group)
        samples.add("io_group_silence_seconds", group.silent or 0.0, name, group.io_group)
    for number, verdict in status.verdicts.items():
        samples.add("io_group_verdict", verdict, name, number)
    for board in status.boards:
        _add_board(samples, name, board)
    samples.add("ring_used_ratio", status.ring, name)
    samples.add("pending_blocks", status.owed_blocks, name)
    samples.add("spool_blocks", status.spooled_blocks, name)
    samples.add("spool_bytes", status.spooled_bytes, name)
    samples.add("spool_limit_bytes", status.spool_limit, name)
    samples.add("subscribers", len(status.subscribers), name)
    samples.add("refused_connections", status.refused_connections, name)


def _add_counts(samples: Samples, numbers: list[int], name: str, io_group: int) -> None:
    """Add the counters of the ledger of one io_group. INFO messages have the io_group 0, and it has nothing else."""

    def add(metric: str, index: Count, *labels: str) -> None:
        if numbers[index] or (io_group != 0) != (index == Count.INFO_ROWS) or index == Count.DROPPED:
            samples.add(metric, numbers[index], name, io_group, *labels)

    for metric, index in _PLAIN_COUNTS.items():
        add(metric, index)
    for metric, parts in (("rows_made", _ROWS), ("rows_lost", _PLACES), ("bytes_unused", _UNUSED)):
        for part, index in parts.items():
            add(metric, index, part)


def _add_board(samples: Samples, name: str, board: BoardReport) -> None:
    samples.add("board_connected", int(board.away_since is None), name, board.io_group, board.name)
    if (clock := board.clock) is not None:
        samples.add("board_clock_offset_seconds", clock.offset, name, board.io_group)
        samples.add("board_clock_offset_uncertainty_seconds", clock.offset_uncertainty, name, board.io_group)
        drift = None if clock.drift is None else clock.drift * 1e-6
        samples.add("board_clock_drift_ratio", drift, name, board.io_group)


def _add_storage(samples: Samples, name: str, status: StorageStatus) -> None:
    samples.add("storage_rows", status.total_rows, name)
    samples.add("storage_bytes", status.total_bytes, name)
    samples.add("storage_open_files", len(status.files), name)
    samples.add("storage_paused", int(bool(status.paused)), name)
    samples.add("storage_unrecovered_files", len(status.not_recovered), name)
    samples.add("storage_duplicate_blocks", status.duplicates, name)
    samples.add("storage_on_close_failures", status.on_close_failed, name)
    samples.add("disk_free_bytes", status.free_bytes, name)
    samples.add("disk_left_seconds", status.seconds_left, name)


# What the monitors say.


class IoGroupRate(msgspec.Struct):
    io_group: int
    rate: float


class Channel(msgspec.Struct):
    io_group: int
    io_channel: int
    chip_id: int
    channel_id: int
    rate: float

    @classmethod
    def named(cls, name: str, rate: float) -> Channel:
        """Return the channel with this name, io_group-io_channel-chip_id-channel_id; ValueError if it is none."""
        io_group, io_channel, chip_id, channel_id = map(int, name.split("-"))
        return cls(io_group, io_channel, chip_id, channel_id, rate)


class ChannelRates(msgspec.Struct):
    silent: int | None = None


class SyncInterval(msgspec.Struct):
    io_group: int
    ticks: int | None = None
    seconds: float | None = None
    min_ticks: int | None = None
    max_ticks: int | None = None


class ClockSpread(msgspec.Struct):
    io_group: int
    seconds: float | None = None


class Summary(msgspec.Struct):
    """Answer of a monitor to summary(), or the same fields of its packet_rate()."""

    rate: float
    seen: float = 1.0
    io_groups: list[IoGroupRate] = []
    hottest: list[Channel] | None = None
    dead_channels: int | None = None
    channel_rates: ChannelRates | None = None
    sync: list[SyncInterval] = []
    spread: list[ClockSpread] = []


def add_summary(samples: Samples, name: str, summary: Summary, hottest: int) -> None:
    """Add what a monitor has counted. `hottest`: number of channels."""
    samples.add("monitor_seen_ratio", summary.seen, name)
    samples.add("monitor_packets_per_second", summary.rate, name)
    for group in summary.io_groups:
        if not group.io_group:  # INFO messages
            continue
        samples.add("io_group_packets_per_second", group.rate, name, group.io_group)
    for channel in (summary.hottest or [])[:hottest]:
        *where, rate = msgspec.structs.astuple(channel)
        samples.add("channel_packets_per_second", rate, name, *where)
    samples.add("dead_channels", summary.dead_channels, name)
    if summary.channel_rates is not None:
        samples.add("silent_channels", summary.channel_rates.silent, name)
    for sync in summary.sync:
        if sync.ticks and sync.seconds is not None:
            for statistic, ticks in {"last": sync.ticks, "min": sync.min_ticks, "max": sync.max_ticks}.items():
                seconds = None if ticks is None else ticks * (sync.seconds / sync.ticks)
                samples.add("sync_interval_seconds", seconds, name, sync.io_group, statistic)
    for spread in summary.spread:
        samples.add("time_stamp_spread_seconds", spread.seconds, name, spread.io_group)
