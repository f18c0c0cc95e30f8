"""The answers of producers and storages to the run's instructions: structs for both ends."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from larpixdaq.constants import rows_made
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


def checked(value: Any, kind: type[_T], who: str, action: str) -> _T:
    """Convert a component's answer to its struct; raises ComponentError, which names the component, if it does not
    fit."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ComponentError(f"{who} answered {action} with something else than expected: {error}") from None
