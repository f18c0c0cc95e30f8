"""Instructions to the components of a run: the checks before prepare_run, the parameters, and the answers to it."""

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
#: A storage's highest run number is ignored if it is more than this above the catalogue's.
MAX_AHEAD: Final = 1_000_000


def check_team(producers: list[Component], storages: list[Component]) -> None:
    """Check that a run can be prepared with these components; ComponentError, in one line, if not."""
    if not producers or not storages:
        missing = "producer" if not producers else "offline storage"
        raise ComponentError(f"prepare_run: no {missing} is registered")
    for component in [*producers, *storages]:
        if component.run is not None:
            raise ComponentError(f"prepare_run: {component.name} is still in run {component.run} (abort_run ends it)")
    layouts: defaultdict[Any, list[str]] = defaultdict(list)
    for component in producers:
        layouts[component.info.get("layout")].append(component.name)
    if len(layouts) > 1:
        which = "; ".join(f"{layout_name(code)}: {', '.join(names)}" for code, names in layouts.items())
        raise ComponentError(f"prepare_run: the producers' rows have different layouts, a run has one: {which}")
    if mixed := mixed_ways(producers, storages):
        raise ComponentError(f"prepare_run: {mixed}")
    for component in storages:
        status = component.read_status(StorageStatus)
        free = None if status is None else status.free_bytes
        free = component.info.get("free_bytes") if free is None else free
        check_free(component.name, str(component.info.get("directory", "?")), free)


def mixed_ways(producers: Iterable[Component], storages: Iterable[Component]) -> str:
    """Return in one line which producers and storages use brokers and which do not; "" if all use the same way."""
    uses: dict[bool, list[str]] = {True: [], False: []}
    for component in [*producers, *storages]:
        uses[bool(component.info.get("brokers"))].append(component.name)
    if not (uses[True] and uses[False]):
        return ""
    return (
        f"--stream is needed for all producers and storages, or for none: {', '.join(uses[True])} with it, "
        f"{', '.join(uses[False])} without"
    )


def highest_run(known: int, storages: list[Component]) -> tuple[int, list[str]]:
    """Return the highest run number of the catalogue (`known`) and the storages, and warnings.

    There is a warning for each number that is ignored because it is much too high: a file with a wrong name would move
    all numbers for ever. StateError after the last possible number.
    """
    warnings = []
    highest = known
    for storage in storages:
        number = storage.info.get("highest_run", 0)
        if not isinstance(number, int):
            continue
        if number > min(known + MAX_AHEAD, LAST_RUN):
            warnings.append(
                f"{storage.name}: the highest run in {storage.info.get('directory', '?')} is {number}, more than "
                f"{MAX_AHEAD} above the catalogue's {known}: not counted"
            )
        else:
            highest = max(highest, number)
    if highest >= LAST_RUN:
        raise StateError(f"prepare_run: run {highest} was the last one, numbers have {RUN_DIGITS} digits")
    return highest, warnings


def team_layout(producers: list[Component]) -> int:
    """Return the layout of the run's rows; ComponentError if the producers' layout does not exist."""
    code = producers[0].info.get("layout")
    if not isinstance(code, int) or code not in LAYOUT_NAMES:
        raise ComponentError(f"prepare_run: {producers[0].name}: its rows have {layout_name(code)}")
    return code


def team_versions(producers: list[Component]) -> dict[str, str]:
    """Return the versions of the producers' software by name; with the producers' names if they differ."""
    owners_of: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for producer in producers:
        versions = producer.info.get("versions")
        for name, version in versions.items() if isinstance(versions, dict) else ():
            owners_of[str(name)].setdefault(str(version), []).append(producer.name)
    return {
        name: ", ".join(
            version if len(owners) == 1 else f"{version} ({' and '.join(names)})" for version, names in owners.items()
        )
        for name, owners in owners_of.items()
    }


def connected(producers: Iterable[Component]) -> list[ConnectedBoard]:
    """Return the boards of these producers, with the firmware as far as it is known. A malformed list is logged and
    left out."""
    boards: list[ConnectedBoard] = []
    for producer in producers:
        status = producer.read_status(ProducerStatus)
        firmware = {} if status is None else status.firmware
        try:
            for board in msgspec.convert(producer.info.get("connected", []), list[ConnectedBoard]):
                added = {"producer": producer.name, "firmware": firmware.get(str(board.io_group), "")}
                boards.append(msgspec.convert(msgspec.to_builtins(board) | added, ConnectedBoard))
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            _log.error("%s: its list of boards is malformed: %s", producer.name, error)
    return boards


def note_connected(run: Run, components: Mapping[str, Component]) -> None:
    """Update the boards of the run: since prepare_run, producers may have joined, and firmware may be known."""
    boards = {(board.producer, board.io_group): board for board in run.connected}
    for board in connected(components[name] for name in run.producers if name in components):
        known = boards.get((board.producer, board.io_group), board)
        boards[board.producer, board.io_group] = msgspec.structs.replace(
            board, firmware=board.firmware or known.firmware
        )
    run.connected = list(boards.values())


def kind_of_run(boards: Iterable[ConnectedBoard]) -> str:
    """Return the default kind of a run: "test" if a source is no detector, else "physics"."""
    return "test" if any(board.kind in KINDS_WITHOUT_DETECTOR for board in boards) else "physics"


def shared_io_groups(producers: list[Component]) -> list[str]:
    """Return a warning for each io_group of several producers, because the file cannot distinguish their rows."""
    owners: defaultdict[Any, list[str]] = defaultdict(list)
    for producer in producers:
        io_groups = producer.info.get("io_groups")
        for io_group in io_groups if isinstance(io_groups, list) else []:
            owners[str(io_group)].append(producer.name)
    return [f"io_group {key} belongs to {' and '.join(names)}" for key, names in owners.items() if len(names) > 1]


def check_free(name: str, where: str, free: Any) -> None:
    if isinstance(free, int) and free < MIN_FREE:
        raise ComponentError(
            f"prepare_run: {name} has {free / 2**20:.1f} MiB left on the disk of {where}, "
            f"needed are {MIN_FREE / 2**20:.0f} MiB"
        )


def take_ready(run: Run, name: str, outcome: ComponentAnswer) -> str | None:
    """Note a producer's answer to prepare_run in the run. Returns its warning; ComponentError if it has failed."""
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
    """Return the file that a storage has opened, from its answer to prepare_run; ComponentError if it has failed."""
    ready = checked(outcome.result(), StorageReady, name, "prepare_run")
    check_free(name, ready.file, ready.free_bytes)
    return ready.file


def producer_params(run: Run) -> dict[str, Any]:
    return monitor_params(run) | {"operator": run.operator, "required": run.storages}


def storage_params(run: Run, producers: Iterable[str]) -> dict[str, Any]:
    return monitor_params(run) | {
        "operator": run.operator,
        "shifter": run.shifter,
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
    """Parameters of begin_run for storages: `begun_ns` is the begin of RUN, unix ns by the core's clock."""
    return {"run": run.run, "begun_ns": run.begun_ns or 0}


def end_params(run: Run) -> dict[str, Any]:
    """Parameters of end_run for storages. `next` is None for an epoch with unknown totals; `stopped_ns` is the end of
    RUN, unix ns by the core's clock."""
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
