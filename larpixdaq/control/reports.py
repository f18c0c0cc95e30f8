"""What producers and storages answer to the run's instructions, and the condition that follows from it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from larpixdaq.control.catalogue import Run
from larpixdaq.errors import ComponentError
from larpixdaq.schema import COUNTS, ROW_COUNTS
from larpixdaq.states import ABORTED, COMPLETE, INCOMPLETE, INTERRUPTED, best, worst


class ProducerReady(msgspec.Struct):
    """Answer of a producer to prepare_run."""

    epoch: int
    layout: int


class EpochEnd(msgspec.Struct):
    """Totals of a predecessor's epoch, as its successor found them in the ring; `counts` as in ProducerEnd."""

    epoch: int
    next: int
    rows: int
    counts: list[list[int]]


class ProducerEnd(msgspec.Struct):
    """Answer of a producer to end_run and abort_run; `counts` has [io_group, *schema.COUNTS] each."""

    epoch: int
    next: int
    rows: int
    counts: list[list[int]]
    warning: str | None = None
    inherited: list[EpochEnd] = []  # of the same run: epochs whose producer died in it


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


_T = TypeVar("_T")
_ROWS: Final = [1 + COUNTS.index(name) for name in ROW_COUNTS]


def checked(value: Any, kind: type[_T], who: str, action: str) -> _T:
    """An answer as what it should be; ComponentError names who answered what otherwise."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ComponentError(f"{who} answered {action} with something else than expected: {error}") from None


def made(end: ProducerEnd) -> dict[int, int]:
    """Rows that the producer made, per io_group: equation (c) of the ledger."""
    return {line[0]: sum(line[i] for i in _ROWS) for line in end.counts if len(line) == 1 + len(COUNTS)}


class Verdict(NamedTuple):
    condition: str
    rows: int  # that the producers made
    stored: int  # in the storage that has most
    files: list[str]
    reasons: list[str]


def judge(run: Run, failures: list[str]) -> Verdict:
    """Compare what the producers made with what the storages have; `failures` says who did not answer."""
    ends = {(one["name"], one["epoch"]): msgspec.convert(one, ProducerEnd) for one in run.ends}
    reasons = list(failures)
    announced = [(name, epoch) for name, epochs in run.producers.items() for epoch in epochs]
    unknown = [source for source in announced if source not in ends]
    reasons += [f"{name}: totals of epoch {epoch} did not reach the core" for name, epoch in unknown]
    for (name, _), end in ends.items():
        if end.warning:
            reasons.append(f"{name}: {end.warning}")
        if sum(made(end).values()) != end.rows:
            reasons.append(f"{name}: counts {end.rows} rows, its io_groups {sum(made(end).values())} rows")
    verdicts: list[str] = []
    files: list[str] = []
    stored = 0
    for name in run.storages:
        if name not in run.reports:
            verdicts.append(INTERRUPTED)
            reasons.append(f"{name}: has not reported")
            continue
        report = msgspec.convert(run.reports[name], StorageEnd)
        files += report.files
        stored = max(stored, sum(line[3] for line in report.stored))
        missing = _missing(ends, report)
        reasons += [f"{name}: {one}" for one in missing + report.reasons]
        # A storage that has the end record of an epoch knows its totals, although its producer could not tell us.
        heard = {(line[0], line[1]) for line in report.stored}
        cut = any(source not in heard for source in unknown)
        verdicts.append(worst(report.condition, INCOMPLETE if missing else COMPLETE, INTERRUPTED if cut else COMPLETE))
    condition = best(*verdicts) if verdicts else INTERRUPTED
    if run.condition == ABORTED:
        condition = ABORTED
    return Verdict(condition, sum(end.rows for end in ends.values()), stored, files, list(dict.fromkeys(reasons)))


def _missing(ends: dict[tuple[str, int], ProducerEnd], report: StorageEnd) -> list[str]:
    """Sentences about rows that the producers made and this storage does not have, or has too many of."""
    stored: defaultdict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    for producer, epoch, io_group, rows in report.stored:
        stored[producer, epoch][io_group] = stored[producer, epoch].get(io_group, 0) + rows
    found = []
    for key, end in ends.items():
        has, should = stored[key], made(end)
        for io_group in sorted(has.keys() | should.keys()):
            lacking = should.get(io_group, 0) - has.get(io_group, 0)
            if lacking:
                what = (
                    f"{lacking} of {should[io_group]} rows are missing" if lacking > 0 else f"{-lacking} rows too many"
                )
                found.append(f"{what} of {key[0]} io_group {io_group} (epoch {key[1]})")
    return found
