"""What leads from one run state to the next: who is asked what, in which order, and what follows from the answers.

What the core tells producers and storages about a run, and what must be true before it tells them anything.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from larpixdaq.constants import (
    CANCELLED,
    ENDED,
    ENDING,
    LAST_RUN,
    LAYOUT_NAMES,
    LOST,
    MIN_FREE,
    PRODUCER,
    READY,
    RUN,
    RUN_DATA,
    RUN_DIGITS,
    STOP,
    STORAGE,
    RunCondition,
)
from larpixdaq.control import disk_watch
from larpixdaq.control.catalogue import Catalogue, Run
from larpixdaq.control.registry import Component, Registry
from larpixdaq.control.run_verdict import RunVerdict, judge, take_end, take_report
from larpixdaq.control.scatter_gather import ComponentAnswer, ComponentRequest, Item, Steps
from larpixdaq.errors import ComponentError, FileError, LarpixDaqError, StateError
from larpixdaq.protocol.reports import ProducerReady, StorageReady, checked
from larpixdaq.protocol.stream import KINDS_WITHOUT_DETECTOR, ConnectedBoard
from larpixdaq.version import VERSION

_log = logging.getLogger("larpixdaq.core")
# Seconds that components have for the steps of a run.
PREPARE_LIMIT: Final = 10.0
BEGIN_LIMIT: Final = 10.0
PRODUCER_END_LIMIT: Final = 10.0
END_LIMIT: Final = 30.0
#: Monitors are not waited for longer; without them the run goes on.
MONITOR_LIMIT: Final = 1.0
#: end_run waits so long for a required component that was lost.
LOST_PATIENCE: Final = 5.0
#: Storages' run numbers count up to this much above the catalogue's.
MOST_AHEAD: Final = 1_000_000


class RunProcedures:
    """`state` is STOP, READY or RUN; `run` is the run from the moment its number is drawn until it is over."""

    def __init__(self, peers: Registry, catalogue: Catalogue) -> None:
        self.state: str = STOP
        self.run: Run | None = None
        #: Grows whenever state or run, as told to others, change.
        self.changes = 0
        self._peers, self._catalogue = peers, catalogue
        self._now = time.monotonic()

    def _prepare(self, run: Run, producers: list[str], warnings: list[str]) -> Steps:
        warnings += shared_io_groups([self._peers.components[name] for name in producers])
        warnings += disk_watch.warnings([self._peers.components[name] for name in run.storages])
        try:
            # Storages first: what producers tell of the chips finds the file open.
            monitors = self._monitor_items({"run": run.run, "kind": run.kind, "comment": run.comment})
            stores = {name: Item(storage_params(run, producers), PREPARE_LIMIT) for name in run.storages}
            outcomes = yield ComponentRequest("prepare_run", {**stores, **monitors})
            warnings += [outcomes[name].text for name in monitors if not outcomes[name].ok]
            files = [self._take_file(name, outcomes[name]) for name in run.storages]
            asked = {name: Item(producer_params(run), PREPARE_LIMIT) for name in producers}
            outcomes = yield ComponentRequest("prepare_run", asked)
            warnings += [text for name in producers if (text := self._take_ready(run, name, outcomes[name]))]
            run.phase = READY
            self._catalogue.save(run)
        except LarpixDaqError as error:
            yield from self._cancel(run, producers, str(error))
            raise
        self._go(READY)
        self._warn("prepare_run", warnings)
        return {"run": run.run, "files": files, "warnings": warnings}

    def _begin(self, run: Run) -> Steps:
        params = {"run": run.run}
        monitors = self._monitor_items(params)
        begin = begin_params(run)
        stores = {name: Item(begin, BEGIN_LIMIT) for name in run.storages if not self._has_begun(name)}
        outcomes = yield ComponentRequest("begin_run", {**stores, **monitors})
        warnings = [outcomes[name].text for name in monitors if not outcomes[name].ok]
        failures = [outcomes[name].text for name in stores if not outcomes[name].ok]
        if not failures:
            asked = {name: Item(params, BEGIN_LIMIT) for name in run.producers if not self._has_begun(name)}
            outcomes = yield ComponentRequest("begin_run", asked)
            failures = [outcome.text for outcome in outcomes.values() if not outcome.ok]
        if failures:
            # Data may have come since READY, and they are the run's: it is aborted and kept, not thrown away.
            run.condition = RunCondition.ABORTED
            run.reasons = failures
            yield from self._end(run)
            raise ComponentError(f"run {run.run} was aborted, since it could not begin: {'; '.join(failures)}")
        run.phase = RUN
        self._save(run)
        self._go(RUN)
        self._warn("begin_run", warnings)
        return {"run": run.run, "warnings": warnings}

    def _end(self, run: Run) -> Steps:
        started = self._now
        run.phase = ENDING
        run.stopped_ns = run.stopped_ns or time.time_ns()
        self._note_connected(run)
        failures = list(run.reasons)
        self._save(run, failures)
        aborted = run.condition == RunCondition.ABORTED
        patience = 0.0 if aborted else LOST_PATIENCE
        known = {(one["name"], one["epoch"]) for one in run.ends}
        asked = {
            name: Item({"run": run.run}, PRODUCER_END_LIMIT, min(patience, self._patience(name)))
            for name, epochs in run.producers.items()
            if (name, epochs[-1]) not in known
        }
        outcomes = yield ComponentRequest("abort_run" if aborted else "end_run", asked)
        silent = {name: why for name in asked if (why := take_end(run, name, outcomes[name]))}
        self._save(run, failures)
        left = max(MONITOR_LIMIT, END_LIMIT - (self._now - started))
        wait = min(patience, left)
        waiting = [name for name in run.storages if name not in run.reports]
        stores = {name: Item(end_params(run), left, min(wait, self._patience(name))) for name in waiting}
        monitors = self._monitor_items({"run": run.run})
        outcomes = yield ComponentRequest("end_run", {**stores, **monitors})
        self._warn("end_run", [outcomes[name].text for name in monitors if not outcomes[name].ok])
        failed = {name: why for name in stores if (why := take_report(run, name, outcomes[name]))}
        # One that was restarted, or whose answer was lost with the core before, has no open file: it can still tell.
        left = END_LIMIT - (self._now - started)
        able = [name for name in failed if left > 0 and self._can_report(name)]
        outcomes = yield ComponentRequest("report_run", {name: Item({"run": run.run}, left) for name in able})
        for name in able:
            if not take_report(run, name, outcomes[name]):
                del failed[name]
        failures += failed.values()
        run.ended_ns = time.time_ns()
        return self._close(run, failures, silent)

    def _close(self, run: Run, failures: list[str], silent: dict[str, str]) -> dict[str, Any]:
        verdict = judge(run, failures, silent)
        run.phase = ENDED
        self._settle_verdict(run, verdict)
        self._save(run, run.reasons)
        self.run = None
        self._go(STOP)
        return {"run": run.run, **verdict._asdict()}

    def _cancel(self, run: Run, producers: list[str], reason: str) -> Steps:
        """Back to STOP from a run that never was READY."""
        params = {"run": run.run}
        names = dict.fromkeys([*producers, *run.storages])
        yield ComponentRequest(
            "cancel_run", {name: Item(params, MONITOR_LIMIT) for name in names if name in self._peers.components}
        )
        yield ComponentRequest("end_run", self._monitor_items(params))
        run.phase, run.condition = CANCELLED, RunCondition.CANCELLED
        run.ended_ns, run.reasons = time.time_ns(), [reason]
        self._save(run)
        self.run = None
        self._go(STOP)
        return {"run": run.run, "condition": run.condition, "rows": 0, "stored": 0, "files": [], "reasons": [reason]}

    def _join(self, run: Run, component: Component) -> Steps:
        """Bring a component that came late, or back, into the run that is going on."""
        name = component.name
        if component.run is None:
            if component.kind == PRODUCER:
                outcomes = yield ComponentRequest("prepare_run", {name: Item(producer_params(run), PREPARE_LIMIT)})
                if warning := self._take_ready(run, name, outcomes[name]):
                    self._warn("prepare_run", [warning])
            elif component.kind == STORAGE:
                outcomes = yield ComponentRequest(
                    "prepare_run", {name: Item(storage_params(run, run.producers), PREPARE_LIMIT)}
                )
                self._take_file(name, outcomes[name])
            else:
                params: dict[str, Any] = {"run": run.run, "kind": run.kind, "comment": run.comment}
                yield ComponentRequest("prepare_run", {name: Item(params, PREPARE_LIMIT)})
            self._save(run)
        if self.state == RUN and self.run is run and run.phase != ENDING:
            begin = begin_params(run) if component.kind == STORAGE else {"run": run.run}
            outcomes = yield ComponentRequest("begin_run", {name: Item(begin, BEGIN_LIMIT)})
            if not outcomes[name].ok:
                raise ComponentError(outcomes[name].text)

    def _review(self, run: Run, component: Component) -> Steps:
        """Ask a storage what it has, by now, of a run that is over, and judge it anew."""
        outcomes = yield ComponentRequest("report_run", {component.name: Item({"run": run.run}, END_LIMIT)})
        outcome = outcomes[component.name]
        if not outcome.ok:
            raise ComponentError(outcome.text)
        self._amend(run.run, component, outcome)

    def _finish(self, run: Run, component: Component) -> Steps:
        """End a run that was over, for the others, while this component was away."""
        action = "end_run"
        params: dict[str, Any] = {"run": run.run}
        if run.phase == CANCELLED and component.kind != RUN_DATA:
            action = "cancel_run"
        elif component.kind == STORAGE:
            params = end_params(run)
        elif run.condition == RunCondition.ABORTED and component.kind == PRODUCER:
            action = "abort_run"
        outcomes = yield ComponentRequest(action, {component.name: Item(params, END_LIMIT)})
        outcome = outcomes[component.name]
        if not outcome.ok:
            raise ComponentError(outcome.text)
        if action != "cancel_run":
            self._amend(run.run, component, outcome)

    def _abort_strays(self) -> Steps:
        """In STOP: end what components are in although no run is going on."""
        strays = [one for one in self._peers.components.values() if one.run is not None]
        cancelled = {
            one.name: Item({"run": one.run}, MONITOR_LIMIT)
            for one in strays
            if one.kind != RUN_DATA and (run := self._catalogue.find(one.run)) is not None and run.phase == CANCELLED
        }
        yield ComponentRequest("cancel_run", cancelled)
        strays = [one for one in strays if one.name not in cancelled]
        producers = {one.name: Item({"run": one.run}, PRODUCER_END_LIMIT) for one in strays if one.kind == PRODUCER}
        yield ComponentRequest("abort_run", producers)
        others: dict[str, Item] = {}
        for one in strays:
            if one.kind == STORAGE:
                others[one.name] = Item({"run": one.run, "how": "aborted", "producers": []}, END_LIMIT)
            elif one.kind == RUN_DATA:
                others[one.name] = Item({"run": one.run}, MONITOR_LIMIT)
        yield ComponentRequest("end_run", others)
        return {"run": None, "condition": "", "rows": 0, "stored": 0, "files": [], "reasons": []}

    # What they are made of.

    def _monitor_items(self, params: dict[str, Any]) -> dict[str, Item]:
        return {one.name: Item(params, MONITOR_LIMIT) for one in self._peers.of_kind(RUN_DATA)}

    def _take_ready(self, run: Run, name: str, outcome: ComponentAnswer) -> str | None:
        if not outcome.ok:
            raise ComponentError(outcome.text)
        ready = checked(outcome.value, ProducerReady, name, "prepare_run")
        if run.layout and run.layout != ready.layout:
            raise ComponentError(
                f"{name}: its rows have layout {layout_name(ready.layout)}, "
                f"those of run {run.run} have {layout_name(run.layout)}"
            )
        run.layout = ready.layout
        epochs = run.producers.setdefault(name, [])
        if ready.epoch not in epochs:
            epochs.append(ready.epoch)
        return ready.warning

    def _note_connected(self, run: Run) -> None:
        """What the run's producers read by now: some have come later, and boards tell their firmware later."""
        there = {(one["producer"], one["io_group"]): one for one in run.connected}
        producers = [self._peers.components[name] for name in run.producers if name in self._peers.components]
        for one in connected(producers):
            before = there.get((one.producer, one.io_group), {})
            now = msgspec.to_builtins(one)
            there[one.producer, one.io_group] = now | {"firmware": one.firmware or before.get("firmware", "")}
        run.connected = list(there.values())

    def _take_file(self, name: str, outcome: ComponentAnswer) -> str:
        if not outcome.ok:
            raise ComponentError(outcome.text)
        ready = checked(outcome.value, StorageReady, name, "prepare_run")
        check_free(name, ready.file, ready.free_bytes)
        return ready.file

    def _amend(self, number: int, component: Component, outcome: ComponentAnswer) -> None:
        """A producer's or storage's last word on a run that was closed without it: judge again."""
        # Looked up only now: others may have had their last word since the question was asked.
        run = self.run if self.run is not None and self.run.run == number else self._catalogue.find(number)
        if run is None or component.kind == RUN_DATA:
            return
        silent: dict[str, str] = {}
        failures: list[str] = []
        if component.kind == PRODUCER:
            silent[component.name] = take_end(run, component.name, outcome)
        elif why := take_report(run, component.name, outcome):
            failures.append(why)
        if run.phase != ENDED:
            return
        before, verdict = run.condition, judge(run, failures, silent)
        level = logging.INFO if verdict.condition == before else logging.WARNING
        _log.log(level, "run %d: %s after the last word of %s", number, verdict.condition, component.name)
        self._settle_verdict(run, verdict)
        self._save(run)

    def _patience(self, name: str) -> float:
        """How long end_run still waits for this one, should it be lost: not at all when it has been for long."""
        lost = self._peers.lost.get(name)
        return LOST_PATIENCE if lost is None else max(0.0, LOST_PATIENCE + LOST - (self._now - lost[0]))

    def _can_report(self, name: str) -> bool:
        component = self._peers.components.get(name)
        return component is not None and "report_run" in component.actions

    def _settle_verdict(self, run: Run, verdict: RunVerdict) -> None:
        run.condition, run.rows, run.stored = verdict.condition, verdict.rows, verdict.stored
        run.files, run.reasons = verdict.files, verdict.reasons

    def _has_begun(self, name: str) -> bool:
        component = self._peers.components.get(name)
        return component is not None and component.begun

    def _go(self, state: str) -> None:
        self.state = state
        self.changes += 1

    def _save(self, run: Run, failures: list[str] | None = None) -> None:
        """Write to the catalogue where failing to must not hold up the run."""
        try:
            self._catalogue.save(run)
        except FileError as error:
            _log.error("run %d: %s", run.run, error)
            if failures is not None and str(error) not in failures:
                failures.append(str(error))

    def _warn(self, what: str, warnings: list[str]) -> None:
        for one in warnings:
            _log.warning("%s: %s", what, one)


def check_team(producers: list[Component], storages: list[Component]) -> None:
    """ComponentError, in one line, when no run can be prepared with these."""
    if not producers or not storages:
        missing = "producer" if not producers else "offline storage"
        raise ComponentError(f"prepare_run: no {missing} is registered")
    for one in [*producers, *storages]:
        if one.run is not None:
            raise ComponentError(f"prepare_run: {one.name} is still in run {one.run} (abort_run ends it)")
    layouts: defaultdict[Any, list[str]] = defaultdict(list)
    for one in producers:
        layouts[one.info.get("layout")].append(one.name)
    if len(layouts) > 1:
        which = "; ".join(f"{layout_name(code)}: {', '.join(names)}" for code, names in layouts.items())
        raise ComponentError(f"prepare_run: the producers' rows have different layouts, a run has one: {which}")
    for one in storages:
        free = one.status.get("free_bytes", one.info.get("free_bytes"))
        check_free(one.name, str(one.info.get("directory", "?")), free)


def highest_run(known: int, storages: list[Component]) -> tuple[int, list[str]]:
    """The highest run number so far, by the catalogue (`known`) and the storages, and a sentence for each number that
    is not counted because it cannot be one: a file of a wrong name would move all numbers for ever."""
    warnings = []
    highest = known
    for one in storages:
        for told in (one.info, one.status):
            number = told.get("highest_run", 0)
            if not isinstance(number, int):
                continue
            if number > min(known + MOST_AHEAD, LAST_RUN):
                warnings.append(
                    f"{one.name}: the highest run in {one.info.get('directory', '?')} is {number}, more than "
                    f"{MOST_AHEAD} above the catalogue's {known}: not counted"
                )
            else:
                highest = max(highest, number)
    if highest >= LAST_RUN:
        raise StateError(f"prepare_run: run {highest} was the last one, numbers have {RUN_DIGITS} digits")
    return highest, warnings


def team_layout(producers: list[Component]) -> int:
    """The layout of the run's rows; ComponentError when a producer names none that there is."""
    code = producers[0].info.get("layout")
    if not isinstance(code, int) or code not in LAYOUT_NAMES:
        raise ComponentError(f"prepare_run: {producers[0].name}: its rows have {layout_name(code)}")
    return code


def team_versions(producers: list[Component]) -> dict[str, str]:
    """What software the producers run, by name; where they differ, who runs which."""
    found: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for one in producers:
        versions = one.info.get("versions")
        for name, version in versions.items() if isinstance(versions, dict) else ():
            found[str(name)].setdefault(str(version), []).append(one.name)
    return {
        name: ", ".join(
            version if len(owners) == 1 else f"{version} ({' and '.join(names)})" for version, names in owners.items()
        )
        for name, owners in found.items()
    }


def connected(producers: Iterable[Component]) -> list[ConnectedBoard]:
    """What these producers read, with the firmware that the boards have told by now. What a producer says that cannot
    be such a list is left out."""
    found: list[ConnectedBoard] = []
    for one in producers:
        firmware = one.status.get("firmware")
        firmware = firmware if isinstance(firmware, dict) else {}
        try:
            for given in msgspec.convert(one.info.get("connected", []), list[ConnectedBoard]):
                told = {"producer": one.name, "firmware": firmware.get(str(given.io_group), "")}
                found.append(msgspec.convert(msgspec.to_builtins(given) | told, ConnectedBoard))
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            _log.error("%s: what it says of its boards is not understood: %s", one.name, error)
    return found


def kind_of_run(boards: Iterable[ConnectedBoard]) -> str:
    """What a run is for, when nobody says it: a test when its data come from no detector now."""
    return "test" if any(one.kind in KINDS_WITHOUT_DETECTOR for one in boards) else "physics"


def shared_io_groups(producers: list[Component]) -> list[str]:
    """A sentence for each io_group that several producers have: their rows cannot be told apart in the file."""
    owners: defaultdict[Any, list[str]] = defaultdict(list)
    for one in producers:
        io_groups = one.info.get("io_groups")
        for io_group in io_groups if isinstance(io_groups, list) else []:
            owners[str(io_group)].append(one.name)
    return [f"io_group {key} belongs to {' and '.join(names)}" for key, names in owners.items() if len(names) > 1]


def check_free(name: str, where: str, free: Any) -> None:
    if isinstance(free, int) and free < MIN_FREE:
        raise ComponentError(
            f"prepare_run: {name} has {free / 2**20:.1f} MiB left on the disk of {where}, "
            f"needed are {MIN_FREE / 2**20:.0f} MiB"
        )


def producer_params(run: Run) -> dict[str, Any]:
    return {
        "run": run.run,
        "kind": run.kind,
        "comment": run.comment,
        "operator": run.operator,
        "required": run.storages,
    }


def storage_params(run: Run, producers: Iterable[str]) -> dict[str, Any]:
    return {
        "run": run.run,
        "kind": run.kind,
        "comment": run.comment,
        "operator": run.operator,
        "started_ns": run.prepared_ns,
        "layout": run.layout,
        "asic_version": run.asic,
        "producers": list(producers),
        "versions": {"larpix-daq": VERSION, **run.versions},
        "connected": run.connected,
        "begun_ns": run.begun_ns or 0,
        "stopped_ns": run.stopped_ns or 0,
    }


def begin_params(run: Run) -> dict[str, Any]:
    """For storages: `begun_ns` is when RUN begins, unix ns by the core's clock."""
    return {"run": run.run, "begun_ns": run.begun_ns or 0}


def end_params(run: Run) -> dict[str, Any]:
    """`next` is None for an epoch whose totals are not known; `stopped_ns` is when RUN ended, unix ns by the core's
    clock."""
    ends = {(one["name"], one["epoch"]): one["next"] for one in run.ends}
    producers = [
        {"name": name, "epoch": epoch, "next": ends.get((name, epoch))}
        for name, epochs in run.producers.items()
        for epoch in epochs
    ]
    return {
        "run": run.run,
        "how": "aborted" if run.condition == RunCondition.ABORTED else "closed",
        "producers": producers,
        "connected": run.connected,
        "stopped_ns": run.stopped_ns or 0,
    }


def layout_name(code: Any) -> str:
    name = LAYOUT_NAMES.get(code) if isinstance(code, int) else None
    return f"unknown layout {code!r}" if name is None else name
