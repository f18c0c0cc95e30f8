"""Structs for both ends: the answers of producers and storages to the run's instructions, and the components' status.

A heartbeat carries the status. The core shows it as it came, so that a status of another version can be read too.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from larpixdaq.constants import LOG, PRODUCER, RUN_DATA, STORAGE, rows_made
from larpixdaq.errors import ComponentError
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
    inherited: list[EpochEnd] = []  # the epochs of its predecessors that died in this run, as it found them in the ring


class RunEnd(EpochEnd):
    """Totals of one epoch as the run catalogue has them; `name` is that of the producer."""

    name: str
    warning: str | None = None


class FinishedFile(msgspec.Struct):
    """A file that a storage has closed, as its heartbeat names it."""

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
    """Rows of one io_group that a storage has."""

    producer: str
    epoch: int
    io_group: int
    rows: int


class StoredEnd(NamedTuple):
    """An end record that a storage has; `rows` were made by the producer in this epoch, `how` as in stream.End."""

    producer: str
    epoch: int
    next: int
    how: str
    rows: int


class StorageEnd(msgspec.Struct):
    """Answer of a storage to end_run and report_run, over all parts of the run that it has."""

    files: list[str]
    condition: str
    rows: int
    stored: list[StoredRows]
    reasons: list[str] = []
    ends: list[StoredEnd] = []


class LoadShares(msgspec.Struct):
    """The load of a process in the last seconds, in cores: of its main loop, and of all its threads together."""

    loop: float
    process: float


class ClockReport(msgspec.Struct):
    """A board's clock beside the host's: offset in seconds and drift in ppm, None when it is not known yet."""

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


class DeliveryStatus(msgspec.Struct):
    """The part of a producer's status that is about ring, spool and stream.

    Each field of a status has a default, so that one that lacks a field still raises its other alarms.
    """

    ring: float = 0.0  # fraction of the ring in use
    owed_blocks: int = 0  # blocks that some required storage has not acknowledged
    inherited: int = 0  # those of predecessors among them
    spooled_blocks: int = 0
    spooled_bytes: int = 0
    nameless: list[str] = []  # removed files that have no new name
    made_anew: int = 0  # removed ring files that were made anew
    kept_aside: list[str] = []  # damaged files
    forgotten: list[str] = []  # storages that are waited for no longer
    subscribers: list[str] = []


class ProducerStatus(DeliveryStatus):
    run: int | None = None
    state: str = ""
    counted_run: int | None = None  # the run of the counts: this one, or else the last
    packets: int = 0
    dropped: int = 0
    unknown: int = 0
    bad_parity: int = 0
    outside_run: int = 0  # packets outside of runs
    boards: list[BoardReport] = []
    verdicts: dict[str, str] = {}  # by io_group
    finished: bool = False  # all sources are at their end
    firmware: dict[str, str] = {}  # by io_group
    load: LoadShares | None = None


class StorageStatus(msgspec.Struct):
    files: list[str] = []
    rows: int = 0
    bytes: int = 0
    free_bytes: int | None = None
    bytes_per_second: int = 0
    seconds_left: int | None = None  # until the disk is full, at this rate
    paused: str = ""  # why nothing is written
    recovering: list[str] = []
    not_recovered: list[str] = []
    duplicates: int = 0
    finished: list[FinishedFile] = []  # the last ones
    on_close: str = ""  # why the last command for a finished file has failed
    on_close_failed: int = 0
    load: LoadShares | None = None


class MonitorStatus(msgspec.Struct):
    run: int | None = None
    rate: float = 0.0  # packets per second
    packets: int = 0
    bad_parity: int = 0
    skipped_rows: int = 0
    seen: float = 0.0  # fraction of the run's rows that were counted
    load: LoadShares | None = None


class LogStatus(msgspec.Struct):
    file: str = ""
    written: int = 0
    held_back: int = 0
    lost: int = 0
    refused: int = 0
    load: LoadShares | None = None


Status = ProducerStatus | StorageStatus | MonitorStatus | LogStatus
#: The type of a component's status, by its kind.
STATUS: Final[dict[str, type[Status]]] = {
    PRODUCER: ProducerStatus,
    STORAGE: StorageStatus,
    RUN_DATA: MonitorStatus,
    LOG: LogStatus,
}


def checked(value: Any, kind: type[_T], who: str, action: str) -> _T:
    """Convert a component's answer to its struct; raises ComponentError, which names the component, if it does not
    fit."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ComponentError(f"{who} answered {action} with something else than expected: {error}") from None
