"""Commands `larpixdaq up`, `down` and `status`: start and end a complete system on this machine, and show its state."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from larpixdaq import config
from larpixdaq.constants import STOP
from larpixdaq.control.catalogue import read_audit
from larpixdaq.control.display import audit_line, needs_attention, status_lines
from larpixdaq.errors import ComponentError, ConfigError, FileError, LarpixDaqError, NoCore, printable
from larpixdaq.offline_storage import add_own_arguments as add_storage_arguments
from larpixdaq.offline_storage import own_options
from larpixdaq.operator import Operator
from larpixdaq.producer import add_own_arguments as add_producer_arguments
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.launcher import (
    Entry,
    Group,
    RunningSystem,
    components,
    end_running,
    is_running,
    logind_removes_files,
    read_running,
    running_file,
    up_lock,
    write_running,
)
from larpixdaq.runtime.units import parse_since, utc
from larpixdaq.sources import options as source_options

#: Maximum seconds until every process that `up` starts has registered.
UP_LIMIT = 20.0
#: Maximum seconds until `down` has aborted a run in progress.
ABORT_LIMIT = 40.0


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "up",
        help="start every process on this machine",
        description="Starts core, log, offline storage, online monitor and a producer on this machine, in the "
        "background. `larpixdaq down` ends them. When some of them have ended, the same command starts these again.",
        allow_abbrev=False,
    )
    _add_own_arguments(parser)
    add_storage_arguments(parser)
    source_options.add_arguments(parser)
    add_producer_arguments(parser)
    parser.set_defaults(function=up)
    parser = commands.add_parser(
        "down",
        help="end what `larpixdaq up` started",
        description="Ends what `larpixdaq up` started, and waits until it has. A run in progress is aborted: its data "
        "are stored, its condition is ABORTED.",
    )
    config.add_state_dir_argument(parser)
    parser.set_defaults(function=down)
    parser = commands.add_parser(
        "status",
        help="the run, and every component",
        description="Shows the run state, the Operator in control, the last run, and the status of every component. "
        "Exits with 1 when a component is LOST or PAUSED, or MISSING in the run.",
    )
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=status)
    parser = commands.add_parser(
        "audit",
        help="who did what when",
        description="Shows the audit in the run catalogue: changes of the run state, control, actions on chips and "
        "boards, routines, keys, and refused attempts, with the key and role in use. The core may be running.",
    )
    parser.add_argument(
        "--since",
        type=parse_since,
        default=0.0,
        metavar="TIME",
        help="only from this time on: UTC, such as 2023-03-15T02:48, or before now, such as 90min, 12h, 3d",
    )
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=audit)


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `up` itself. All others belong to the storage or the producer, which get them unchanged."""
    config.add_address_argument(parser)
    config.add_log_address_argument(parser, None)
    config.add_state_dir_argument(parser)
    config.add_insecure_argument(parser)
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path("."), metavar="DIR", help="for the files (default .)"
    )


def up(options: argparse.Namespace) -> int:
    state = state_dir(options.state_dir)
    if not options.output_dir.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: no such directory")
    if logind_removes_files(options.ring_dir, os.getuid()):
        print(
            f"larpixdaq: WARNING: when you log out, systemd-logind removes the ring's file from {options.ring_dir} "
            "(RemoveIPC): the producer makes it again within a second, but if it is killed before, data are lost; "
            "`loginctl enable-linger` prevents it",
            file=sys.stderr,
        )
    source_options.create(options)  # here, so that an error in the options is reported to the user, not in a file
    others = argparse.ArgumentParser(allow_abbrev=False)
    _add_own_arguments(others)
    add_storage_arguments(others)
    source = others.parse_known_args(options.argv[1:])[1]
    storage = own_options(options)
    listens = config.listen_address(options.address, config.CORE_PORT)
    core = config.reachable_address(listens, config.LOOPBACK)  # from this machine, whatever interfaces it listens at
    log = config.address(options.log_address or f"tcp://{config.interface_towards(core)}", config.LOG_PORT)
    if not config.is_loopback(listens) and config.is_loopback(core):
        print(
            f"larpixdaq: WARNING: other hosts reach the core at {listens}, but not the producer, which listens at "
            f"127.0.0.1, and the log only if they reach {log}; --address tcp://HOST with the name or address of this "
            "host opens all of them",
            file=sys.stderr,
        )
    insecure = ["--insecure"] if options.insecure else []
    commands = {
        module: [*arguments, *insecure]
        for module, arguments in components(core, log, options.output_dir, state, source, listens, storage)
    }
    with up_lock(state):
        running = _running_processes(state, commands)
        missing = [module for module in commands if module not in running]
        group = Group(state / "out")
        try:
            for module in missing:
                group.start(module, *commands[module], detach=True)
            by_module = running | {entry.module: entry for entry in group.entries()}
            entries = [by_module[module] for module in commands]
            write_running(state, RunningSystem(core, entries, os.getcwd()))
            with connect(core, group, entries) as operator:
                wait_for(operator, {"producer", "storage", "run_data", "log"}, group, entries)
        except BaseException:
            group.close()
            if running:
                write_running(state, RunningSystem(core, list(running.values()), os.getcwd()))
            else:
                running_file(state).unlink(missing_ok=True)
            raise
    if not running:
        print(f"up at {core}; the output of the processes is in {group.log_dir}")
    elif missing:
        print(f"up at {core}: started {', '.join(missing)} again, {len(running)} others were running")
    else:
        print(f"up already at {core}: all {len(running)} processes are running")
    return 0


def _running_processes(state: Path, commands: dict[str, list[str]]) -> dict[str, Entry]:
    """Return the processes of an earlier `up` that still run, by module.

    Raises ConfigError if that `up` had other options or another working directory.
    """
    earlier = read_running(state)
    running = {} if earlier is None else {entry.module: entry for entry in earlier.processes if is_running(entry)}
    if earlier is None or not running:
        return {}
    up_at = f"a system is up already at {earlier.core} ({running_file(state)})"
    advice = "use its options to restart processes that have ended, or end it with `larpixdaq down`"
    if earlier.directory != os.getcwd():
        raise ConfigError(f"{up_at}, started in {earlier.directory}, not in {os.getcwd()}: {advice}")
    for module, entry in running.items():
        if entry.arguments != commands[module]:
            has, asked = " ".join(entry.arguments), " ".join(commands[module])
            raise ConfigError(f"{up_at}; {module} runs with {has!r}, this command has {asked!r}: {advice}")
    return running


def connect(core: str, group: Group, processes: Sequence[Entry]) -> Operator:
    """Return an Operator connected to the core, which must be one of `processes`.

    Raises NoCore after UP_LIMIT seconds, and ComponentError if a process of the group has ended with an error or
    another core answers.
    """
    deadline = time.monotonic() + UP_LIMIT
    own_pid = next(entry.pid for entry in processes if entry.module == "core")
    while True:
        try:
            operator = Operator(core, timeout=0.5)
        except NoCore:
            group.check()
            if time.monotonic() > deadline:
                raise
            continue
        try:
            answer = operator.status().result(timeout=UP_LIMIT)
        except NoCore:
            operator.close()
            continue
        process = answer.get("process", {})
        if (process.get("host"), process.get("pid")) == (config.process_identity()["host"], own_pid):
            return operator
        operator.close()
        raise ComponentError(
            f"another core answers at {core}: process {process.get('pid', '?')} of {process.get('user', '?')} on "
            f"{process.get('host', '?')}, started {utc(answer['started'])}, state directory "
            f"{answer.get('state_dir', 'unknown')}; end it, or choose another --address and --log-address"
        )


def wait_for(operator: Operator, kinds: set[str], group: Group, processes: Sequence[Entry]) -> None:
    """Wait until each of these kinds has a living component in one of `processes`.

    Raises ComponentError after UP_LIMIT seconds, or if a process of the group has ended with an error.
    """
    deadline = time.monotonic() + UP_LIMIT
    host = config.process_identity()["host"]
    own = {(host, entry.pid) for entry in processes}
    while True:
        group.check()
        try:
            registered = operator.components().result(timeout=UP_LIMIT)
            own_alive = [c for c in registered if c["alive"] and (c["info"].get("host"), c["info"].get("pid")) in own]
            missing = kinds - {c["kind"] for c in own_alive}
        except NoCore:
            missing = {"core"}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise ComponentError(f"waited {UP_LIMIT:g} s for {', '.join(sorted(missing))}")
        time.sleep(0.05)


def _abort_run(core: str) -> None:
    """Abort the run in progress, if any, so that the catalogue has its condition and files."""
    try:
        with Operator(core, timeout=1.0) as operator:
            if operator.state().result(timeout=UP_LIMIT) != STOP:
                operator.take_control().result(timeout=UP_LIMIT)
                operator.abort_run().result(timeout=ABORT_LIMIT)
    except LarpixDaqError as error:
        print(f"larpixdaq: WARNING: the run in progress could not be aborted: {error}", file=sys.stderr)


def down(options: argparse.Namespace) -> int:
    state = state_dir(options.state_dir)
    running = read_running(state)
    if running is None:
        raise FileError(f"nothing is up: no {running_file(state)}")
    if any(entry.module == "core" and is_running(entry) for entry in running.processes):
        _abort_run(running.core)
    killed = end_running(running)
    running_file(state).unlink(missing_ok=True)
    if killed:
        raise ComponentError(f"{', '.join(killed)} did not end in time and had to be killed")
    return 0


def status(options: argparse.Namespace) -> int:
    with Operator(options.core, insecure=options.insecure) as operator:
        answer = operator.status().result(timeout=5)
    if options.json:
        print(json.dumps(answer))
    else:
        console = plain_console()
        for line in status_lines(answer):
            console.print(printable(line))
    return 1 if needs_attention(answer) else 0


def audit(options: argparse.Namespace) -> int:
    rows = read_audit(state_dir(options.state_dir), round(options.since * 1e9))
    if options.json:
        print(json.dumps({"rows": [msgspec.structs.asdict(row) for row in rows]}))
        return 0
    console = plain_console()
    for row in rows:
        console.print(printable(audit_line(row)))
    return 0


def plain_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return a console that prints texts unchanged: brackets are no markup, and colons no emoji."""
    return Console(quiet=quiet, stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
