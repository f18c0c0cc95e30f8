"""Instructions to the components of a run: the checks before the first one, their parameters, and the answers to it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from larpixdaq.constants import LAST_RUN, LAYOUT_NAMES, MIN_FREE, RUN_DIGITS, RunCondition
from larpixdaq.control.catalogue import Run
from larpixdaq.control.registry import Component
from larpixdaq.control.scatter_gather import ComponentAnswer
from larpixdaq.errors import ComponentError, StateError
from larpixdaq.protocol.reports import ProducerReady, ProducerStatus, StorageReady, StorageStatus, checked
from larpixdaq.protocol.stream import KINDS_WITHOUT_DETECTOR, ConnectedBoard
from larpixdaq.version import VERSION

_log = logging.getLogger("larpixdaq.core")
#: Run numbers of storages count up to this much above the catalogue's.
MAX_AHEAD: Final = 1_000_000


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
        status = one.read_status(StorageStatus)
        free = None if status is None else status.free_bytes
        free = one.info.get("free_bytes") if free is None else free
        check_free(one.name, str(one.info.get("directory", "?")), free)


def highest_run(known: int, storages: list[Component]) -> tuple[int, list[str]]:
    """The highest run number so far, by the catalogue (`known`) and the storages, and a sentence for each number that
    is not counted because it cannot be one: a file of a wrong name would move all numbers for ever."""
    warnings = []
    highest = known
    for one in storages:
        number = one.info.get("highest_run", 0)
        if not isinstance(number, int):
            continue
        if number > min(known + MAX_AHEAD, LAST_RUN):
            warnings.append(
                f"{one.name}: the highest run in {one.info.get('directory', '?')} is {number}, more than "
                f"{MAX_AHEAD} above the catalogue's {known}: not counted"
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
        status = one.read_status(ProducerStatus)
        firmware = {} if status is None else status.firmware
        try:
            for given in msgspec.convert(one.info.get("connected", []), list[ConnectedBoard]):
                told = {"producer": one.name, "firmware": firmware.get(str(given.io_group), "")}
                found.append(msgspec.convert(msgspec.to_builtins(given) | told, ConnectedBoard))
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            _log.error("%s: what it says of its boards is not understood: %s", one.name, error)
    return found


def note_connected(run: Run, components: Mapping[str, Component]) -> None:
    """Note in the run the boards of its producers: some producers came later, and boards tell their firmware later."""
    there = {(one.producer, one.io_group): one for one in run.connected}
    for one in connected(components[name] for name in run.producers if name in components):
        before = there.get((one.producer, one.io_group), one)
        there[one.producer, one.io_group] = msgspec.structs.replace(one, firmware=one.firmware or before.firmware)
    run.connected = list(there.values())


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


def take_ready(run: Run, name: str, outcome: ComponentAnswer) -> str | None:
    """Note a producer's answer to prepare_run in the run. Returns its warning; ComponentError when it has failed."""
    ready = checked(outcome.result(), ProducerReady, name, "prepare_run")
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


def take_file(name: str, outcome: ComponentAnswer) -> str:
    """Return the file that a storage has opened, by its answer to prepare_run; ComponentError when it has failed."""
    ready = checked(outcome.result(), StorageReady, name, "prepare_run")
    check_free(name, ready.file, ready.free_bytes)
    return ready.file


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


def monitor_params(run: Run) -> dict[str, Any]:
    return {"run": run.run, "kind": run.kind, "comment": run.comment}


def begin_params(run: Run) -> dict[str, Any]:
    """For storages: `begun_ns` is when RUN begins, unix ns by the core's clock."""
    return {"run": run.run, "begun_ns": run.begun_ns or 0}


def end_params(run: Run) -> dict[str, Any]:
    """`next` is None for an epoch whose totals are not known; `stopped_ns` is when RUN ended, unix ns by the core's
    clock."""
    ends = {(end.name, end.epoch): end.next for end in run.ends}
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
