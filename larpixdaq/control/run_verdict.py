"""The verdict on a run: its condition, from the answers of producers and storages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from larpixdaq.constants import Count, RunCondition, best, rows_made, worst
from larpixdaq.control.catalogue import Run
from larpixdaq.control.scatter_gather import MANY_NAMES, ComponentAnswer
from larpixdaq.errors import ComponentError
from larpixdaq.protocol.reports import EpochEnd, ProducerEnd, RunEnd, StorageEnd, checked

#: (producer, epoch)
_Source = tuple[str, int]


def take_end(run: Run, name: str, outcome: ComponentAnswer) -> str:
    """Note the totals of a producer and of its dead predecessors in the run. Returns the error if there are none, or
    ""."""
    try:
        end = checked(outcome.result(), ProducerEnd, name, "end_run")
    except ComponentError as error:
        return str(error)
    ends = [RunEnd(totals.epoch, totals.next, totals.rows, totals.counts, name) for totals in end.inherited]
    ends.append(RunEnd(end.epoch, end.next, end.rows, end.counts, name, end.warning))
    new = [totals.epoch for totals in ends]
    epochs = run.producers.setdefault(name, [])
    epochs[:] = dict.fromkeys([*new[:-1], *epochs, end.epoch])  # the epoch of the living producer stays last
    run.ends = [old for old in run.ends if old.name != name or old.epoch not in new] + ends
    return ""


def take_report(run: Run, name: str, outcome: ComponentAnswer) -> str:
    """Note a storage's report in the run. Returns the error if there is none, or ""."""
    try:
        report = checked(outcome.result(), StorageEnd, name, "end_run")
    except ComponentError as error:
        return str(error)
    known = {(end.name, end.epoch) for end in run.ends}
    report.totals = [totals for totals in report.totals if (totals.producer, totals.epoch) not in known]
    run.reports[name] = report
    return ""


def _counts(end: EpochEnd) -> dict[int, list[int]]:
    """Return the counters of each io_group, in the order of Count."""
    return {line[0]: line[1:] for line in end.counts if len(line) == 1 + len(Count)}


class RunVerdict(NamedTuple):
    condition: RunCondition
    rows: int | None  # made by the producers; None: the totals of a producer are unknown
    stored: int | None  # in the storage that has most; None: no storage has reported
    files: list[str]
    reasons: list[str]


def judge(run: Run, failures: list[str], silent: Mapping[str, str]) -> RunVerdict:
    """Compare the rows that the producers made with those that the storages have.

    `failures` are always reasons. `silent` says why a producer has sent no totals, by its name: a reason only if no end
    record of a storage has the totals.
    """
    ends = {(end.name, end.epoch): end for end in run.ends}
    reports = {name: run.reports[name] for name in run.storages if name in run.reports}
    recorded = {(end.producer, end.epoch): end for report in reports.values() for end in report.ends}
    announced = [(name, epoch) for name, epochs in run.producers.items() for epoch in epochs]
    unknown = [source for source in announced if source not in ends and source not in recorded]

    reasons = list(failures)
    reasons += [why for name, why in silent.items() if why and any(source[0] == name for source in unknown)]
    few = len(unknown) <= MANY_NAMES  # many become one reason, without their epochs
    reasons += [
        f"{name}: {f'the totals of epoch {epoch:x} are' if few else 'totals'} unknown" for name, epoch in unknown
    ]
    away = [name for name, epochs in run.producers.items() if len(epochs) > 1]
    away += [end.producer for end in recorded.values() if end.how == "recovered"]
    for name in dict.fromkeys(away):
        reasons.append(f"{name} was down for part of the run: data that its boards sent then are lost")
    aborted = run.condition == RunCondition.ABORTED
    if not aborted:
        cut = [end.producer for end in recorded.values() if end.how == "aborted"]
        reasons += [f"{name} ended in the middle of the run" for name in dict.fromkeys(cut)]
    for run_end in ends.values():
        if run_end.warning:
            reasons.append(f"{run_end.name}: {run_end.warning}")
        made = sum(map(rows_made, _counts(run_end).values()))
        if made != run_end.rows:
            reasons.append(f"{run_end.name}: counts {run_end.rows} rows, its io_groups {made} rows")

    verdicts: list[RunCondition] = []
    files: list[str] = []
    stored: int | None = None
    for name in run.storages:
        if name not in reports:
            verdicts.append(RunCondition.INTERRUPTED)
            reasons.append(f"{name}: has not reported")
            continue
        report = reports[name]
        files += report.files
        stored = max(stored or 0, sum(stored_rows.rows for stored_rows in report.stored))
        missing = _missing(ends, {source: end.rows for source, end in recorded.items()}, report)
        reasons += [f"{name}: {reason}" for reason in missing + report.reasons]
        not_closed = report.condition == RunCondition.CONTINUED  # the run's next part is still open
        conditions = {RunCondition.INTERRUPTED: unknown or not_closed, RunCondition.INCOMPLETE: missing}
        verdicts.append(worst(conditions, report.condition))
    suspect = (
        away or RunCondition.SUSPECT in verdicts
    )  # another copy cannot replace rows that were lost before the storages
    condition = worst({RunCondition.ABORTED: aborted, RunCondition.SUSPECT: suspect}, best(verdicts))
    rows = sum(end.rows for end in ends.values())
    rows += sum(end.rows for source, end in recorded.items() if source not in ends)
    return RunVerdict(condition, None if unknown else rows, stored, files, list(dict.fromkeys(reasons)))


def _missing(ends: Mapping[_Source, EpochEnd], recorded: Mapping[_Source, int], report: StorageEnd) -> list[str]:
    """Return a sentence for each io_group or epoch of which a storage has too few or too many rows.

    By io_group where the producer has sent its counts, else by the total in an end record. Rows that found no room at
    the producer do not count here: the end record counts them, and the storage's own reasons name them.
    """
    stored: defaultdict[_Source, dict[int, int]] = defaultdict(dict)
    for producer, epoch, io_group, rows in report.stored:
        stored[producer, epoch][io_group] = stored[producer, epoch].get(io_group, 0) + rows
    sentences = []
    for key, end in ends.items():
        has, counts = stored[key], _counts(end)
        for io_group in sorted(has.keys() | counts.keys()):
            own = counts.get(io_group, [0] * len(Count))
            lacking = rows_made(own) - own[Count.DROPPED] - has.get(io_group, 0)
            where = f"{key[0]} io_group {io_group} (epoch {key[1]:x})"
            if lacking > 0:
                sentences.append(f"{lacking} of {rows_made(own)} rows are missing of {where}")
            elif lacking:
                sentences.append(f"{-lacking} rows too many of {where}")
    for key, rows in recorded.items():
        has_all = sum(stored[key].values())
        if key not in ends and has_all != rows:
            sentences.append(f"{has_all} rows of {key[0]} (epoch {key[1]:x}) are stored, {rows} were made")
    return sentences
