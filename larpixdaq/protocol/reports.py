"""The answers of producers and storages to run instructions, and the status of components in heartbeats.

The core passes a status on as it came, so that `larpixdaq status` shows a status of another version too.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from larpixdaq.constants import LOG, PRODUCER, RUN_DATA, STORAGE, SUPERVISOR, rows_made
from larpixdaq.errors import ComponentError
from larpixdaq.keys.peer_limits import LimitReached
from larpixdaq.protocol.stream import End, RunNumber

_T = TypeVar("_T")
_End = TypeVar("_End", bound="EpochEnd")


class ProducerReady(msgspec.Struct):
    """Answer of a producer to prepare_run."""

    epoch: int
    layout: int
    warning: str | None = None


class EpochEnd(msgspec.Struct):
    """Totals of one epoch of a producer in a run; `counts` as in stream.End."""

    epoch: int
    next: int
    rows: int
    counts: list[list[int]]

    @classmethod
    def of(cls: type[_End], end: End) -> _End:
        return cls(end.epoch, end.next, sum(rows_made(counts) for _, *counts in end.counts), end.counts)


class ProducerEnd(EpochEnd):
    """Answer of a producer to end_run and abort_run."""

    warning: str | None = None
    inherited: list[EpochEnd] = []  # epochs of dead predecessors in this run, from the ring


class RunEnd(EpochEnd):
    """Totals of one epoch in the run catalogue; `name` is the producer's."""

    name: str
    warning: str | None = None


class Comment(msgspec.Struct, frozen=True):
    """A comment on a run, as storages write it into files and sidecars. `by`: name of the shifter; "": not given."""

    id: int  # in the catalogue
    time_ns: int  # unix ns, by the core's clock
    by: str
    operator: str
    text: str


class FinishedFile(msgspec.Struct):
    """A file that a storage has closed, in the storage's heartbeat."""

    run: RunNumber
    file: Annotated[str, Meta(min_length=1, max_length=4096)]
    bytes: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    sha256: Annotated[str, Meta(max_length=64)]
    condition: Annotated[str, Meta(max_length=64)]


class StorageReady(msgspec.Struct):
    """Answer of a storage to prepare_run: the path of its open part, and the free space on its disk."""

    file: str
    free_bytes: int


class StoredRows(NamedTuple):
    """Number of rows of one io_group that a storage has."""

    producer: str
    epoch: int
    io_group: int
    rows: int


class StoredEnd(NamedTuple):
    """An end record that a storage has. `rows` is the number made by the producer in this epoch; `how` as in
    stream.End."""

    producer: str
    epoch: int
    next: int
    how: str
    rows: int


class StoredTotals(NamedTuple):
    """Counters of an epoch whose end record a storage has; `counts` as in stream.End."""

    producer: str
    epoch: int
    counts: list[list[int]]


class StorageEnd(msgspec.Struct):
    """Answer of a storage to end_run and report_run, over all its parts of the run.

    `totals`: of the epochs in `ends`; in the catalogue only of those whose producer has not told them itself.
    """

    files: list[str]
    condition: str
    rows: int
    stored: list[StoredRows]
    reasons: list[str] = []
    ends: list[StoredEnd] = []
    totals: list[StoredTotals] = []


class LoadShares(msgspec.Struct):
    """Load of a process in the last seconds, in cores: of its main loop, and of all its threads."""

    loop: float
    process: float


class ClockReport(msgspec.Struct):
    """A board's clock against the host's: offset in seconds, drift in ppm (None before it is known)."""

    offset: float
    offset_uncertainty: float
    drift: float | None
    drift_uncertainty: float
    text: str


class BoardReport(msgspec.Struct):
    """One io_group of a producer; `away_since` in unix seconds, None while the board is connected."""

    io_group: int
    name: str
    away_since: float | None = None
    problem: str = ""  # why it is not connected
    clock: ClockReport | None = None
    setup: list[str] = []  # contradictions between its data and the producer's options
    changed: str | None = None  # how it differs from the board with which the run began; "": not at all; None: unknown


class IoGroupReport(msgspec.Struct):
    """Counts of one io_group in the run of a producer's counts."""

    io_group: int
    packets: int
    bad_parity: int = 0
    fifo_full: int | None = None  # packets with the flag of a full FIFO; None: not counted
    silent: float | None = None  # seconds since its last packet, if that is long for its rate
    total_fifo_full: int | None = None  # as fifo_full, in all runs since the process started


class UplinkStatus(msgspec.Struct):
    """How a producer's blocks come to the brokers of JetStream; counts since the producer's start."""

    stream: str = ""  # its name
    brokers: str = ""  # addresses
    connected: bool = False  # a broker is connected, and the stream takes messages
    messages: int = 0  # published; one that was not acknowledged is published again
    bytes: int = 0
    acknowledged_messages: int = 0
    acknowledged_bytes: int = 0
    fill: float | None = None  # fraction of the stream's size in use; None: not known
    lost_messages: int = 0  # that the brokers had acknowledged and then lost
    restarts: int = 0  # of the process that publishes
    problem: str = ""  # why blocks wait; "" when they do not


class DeliveryStatus(msgspec.Struct):
    """The part of a producer's status about ring, spool and stream.

    All fields of a status have defaults, so that a status of another version without some of them still raises alarms.
    """

    ring: float = 0.0  # fraction of the ring in use
    owed_blocks: int = 0  # blocks that a required storage has not acknowledged
    inherited: int = 0  # pending blocks of predecessors
    spooled_blocks: int = 0
    spooled_bytes: int = 0
    spool_limit: int | None = None  # bytes; 0: there is no spool; None: unknown
    nameless: list[str] = []  # open files that were removed and could not get a name again
    made_anew: int = 0  # number of removed ring files that were replaced
    kept_aside: list[str] = []  # paths of damaged files
    forgotten: list[str] = []  # storages that are no longer required
    subscribers: list[str] = []
    refused_connections: int = 0  # for want of a key
    refused_frames: int = 0  # of peers with a key: invalid, or without a session that the core confirms
    limits: list[LimitReached] = []


class ProducerStatus(DeliveryStatus):
    run: int | None = None
    state: str = ""
    counted_run: int | None = None  # the run of the counts: this run, or the last one
    packets: int = 0
    dropped: int = 0
    unknown: int = 0
    bad_parity: int = 0
    outside_run: int = 0  # packets outside of runs
    rate: float | None = None  # packets per second, in and outside of runs, in the last seconds; None: not known
    totals: list[list[int]] | None = None  # counts in all runs since the process started, as in stream.End
    total_outside: int = 0  # packets outside of runs since the process started
    boards: list[BoardReport] = []
    groups: list[IoGroupReport] | None = None
    waits: bool | None = None  # whether the sources wait while the ring is full
    verdicts: dict[str, str] = {}  # by io_group
    finished: bool = False  # all sources have ended
    firmware: dict[str, str] = {}  # by io_group
    pixel_layout: dict[str, Any] | None = None  # as load_pixel_layout returned it, and `loaded` (unix s)
    uplink: UplinkStatus | None = None  # None: without JetStream
    load: LoadShares | None = None


class StorageStatus(msgspec.Struct):
    files: list[str] = []
    rows: int = 0
    bytes: int = 0
    free_bytes: int | None = None
    bytes_per_second: int = 0
    seconds_left: int | None = None  # until the disk is full, at this rate
    paused: str = ""  # the reason why nothing is written
    recovering: list[str] = []
    not_recovered: list[str] = []
    total_rows: int = 0  # that went into files since the process started
    total_bytes: int = 0  # by which files have grown since then
    duplicates: int = 0
    finished: list[FinishedFile] = []  # the last files
    on_close: str = ""  # error of the last failed command for a closed file, or of the last failed raw file
    on_close_failed: int = 0  # commands and raw files
    load: LoadShares | None = None


class ChannelRate(msgspec.Struct):
    """A channel, io_group-io_channel-chip_id-channel_id, and its rate of data packets in Hz."""

    channel: str
    rate: float


class MonitorStatus(msgspec.Struct):
    run: int | None = None
    rate: float = 0.0  # packets per second
    packets: int = 0
    bad_parity: int = 0
    skipped_rows: int = 0
    seen: float = 0.0  # fraction of the run's rows that were counted
    hottest: list[ChannelRate] | None = None  # the channels with the highest rates, at most 20; None: unknown
    dead_channels: int | None = None  # channels that have stopped while their io_group goes on; None: unknown
    dead: list[ChannelRate] = []  # at most 5 of them, with the rates that they had
    load: LoadShares | None = None


class LogStatus(msgspec.Struct):
    file: str = ""
    written: int = 0
    held_back: int = 0
    lost: int = 0
    refused: int = 0
    refused_connections: int = 0
    limits: list[LimitReached] = []
    load: LoadShares | None = None


class SupervisedProcess(msgspec.Struct):
    """A process that a supervisor has started, or adopted from an earlier supervisor."""

    name: str  # of the component; "core" for the core
    module: str = ""  # of larpixdaq
    pid: int | None = None
    state: str = ""  # "running", "waiting" (until it is started again), "ending" or "given up"
    since: float = 0.0  # unix seconds of the last change of `state`
    restarts: int = 0
    last_exit: str = ""  # such as "was killed by SIGKILL" or "ended with status 1"; "" before the first
    last_line: str = ""  # of its output, before its last exit


class SupervisorStatus(msgspec.Struct):
    processes: list[SupervisedProcess] = []
    load: LoadShares | None = None


Status = ProducerStatus | StorageStatus | MonitorStatus | LogStatus | SupervisorStatus
#: The type of a component's status, by its kind.
STATUS: Final[dict[str, type[Status]]] = {
    PRODUCER: ProducerStatus,
    STORAGE: StorageStatus,
    RUN_DATA: MonitorStatus,
    LOG: LogStatus,
    SUPERVISOR: SupervisorStatus,
}


def checked(value: Any, kind: type[_T], who: str, action: str) -> _T:
    """Convert a component's answer to its struct; ComponentError, with the name of the component, if it does not
    fit."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ComponentError(f"{who}: unexpected answer to {action}: {error}") from None
