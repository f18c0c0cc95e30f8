"""What producers and storages answer to the run's instructions, and the condition that follows from it."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from larpixdaq.errors import ComponentError
from larpixdaq.protocol.stream import RunNumber

_T = TypeVar("_T")


class ProducerReady(msgspec.Struct):
    """Answer of a producer to prepare_run."""

    epoch: int
    layout: int
    warning: str | None = None


class EpochEnd(msgspec.Struct):
    """Totals of a predecessor's epoch, as its successor found them in the ring; `counts` as in ProducerEnd."""

    epoch: int
    next: int
    rows: int
    counts: list[list[int]]


class ProducerEnd(msgspec.Struct):
    """Answer of a producer to end_run and abort_run; `counts`: as in stream.End."""

    epoch: int
    next: int
    rows: int
    counts: list[list[int]]
    warning: str | None = None
    inherited: list[EpochEnd] = []  # of the same run: epochs whose producer died in it


class FinishedFile(msgspec.Struct):
    """A file that a storage has closed, as its heartbeat names it."""

    run: RunNumber
    file: Annotated[str, Meta(min_length=1, max_length=4096)]
    bytes: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    sha256: Annotated[str, Meta(max_length=64)]
    condition: Annotated[str, Meta(max_length=64)]


class StorageReady(msgspec.Struct):
    """Answer of a storage to prepare_run."""

    file: str
    free_bytes: int


class StorageEnd(msgspec.Struct):
    """Answer of a storage to end_run and report_run, over all parts of the run that it has.

    `stored` has [producer, epoch, io_group, rows] each, `ends` [producer, epoch, next, how, rows made] of each source
    whose end it has.
    """

    files: list[str]
    condition: str
    rows: int
    stored: list[tuple[str, int, int, int]]
    reasons: list[str] = []
    ends: list[tuple[str, int, int, str, int]] = []


def checked(value: Any, kind: type[_T], who: str, action: str) -> _T:
    """An answer as what it should be; ComponentError names who answered what otherwise."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ComponentError(f"{who} answered {action} with something else than expected: {error}") from None
