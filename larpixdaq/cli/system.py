"""`larpixdaq up` and `down`: a complete system on this machine.

`larpixdaq status`: the run, who steers it, and what every component says of itself, in words.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from larpixdaq import config
from larpixdaq.constants import STOP
from larpixdaq.control.display import needs_attention, status_lines
from larpixdaq.errors import ComponentError, ConfigError, FileError, LarpixDaqError, NoCore, printable
from larpixdaq.offline_storage import add_own_arguments as add_storage_arguments
from larpixdaq.offline_storage import own_options
from larpixdaq.operator import Operator
from larpixdaq.producer import add_own_arguments as add_producer_arguments
from larpixdaq.runtime.launcher import (
    Entry,
    Group,
    Running,
    alive,
    components,
    end_running,
    logind_removes_files,
    only_up,
    read_running,
    running_file,
    write_running,
)
from larpixdaq.runtime.units import utc
from larpixdaq.sources import options as source_options

#: Maximum seconds until every process that `up` starts has registered.
UP_LIMIT = 20.0
#: Maximum seconds that `down` waits for the end of a run in progress.
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
    add_status_command(commands)


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `up` itself; all others are the storage's or the producer's, and handed to them as they are."""
    config.add_address_argument(parser)
    config.add_log_address_argument(parser)
    config.add_state_dir_argument(parser)
    config.add_insecure_argument(parser)
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path("."), metavar="DIR", help="for the files (default .)"
    )


def up(options: argparse.Namespace) -> int:
    state = config.state_dir(options.state_dir)
    if not options.output_dir.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: no such directory")
    if logind_removes_files(options.ring_dir, os.getuid()):
        print(
            f"larpixdaq: WARNING: when you log out, systemd-logind removes the ring's file from {options.ring_dir} "
            "(RemoveIPC): the producer makes it anew within a second, but if it is killed before that, data are lost; "
            "`loginctl enable-linger` prevents it",
            file=sys.stderr,
        )
    source_options.create(options)  # an error in the options is reported here, not in a file
    others = argparse.ArgumentParser(allow_abbrev=False)
    _add_own_arguments(others)
    add_storage_arguments(others)
    source = others.parse_known_args(options.argv[1:])[1]
    storage = own_options(options)
    listens = config.listen_address(options.address, config.CORE_PORT, insecure=options.insecure, what="core")
    core = config.reachable(listens, config.LOOPBACK)  # from this machine, whatever interfaces it listens at
    log = config.address(options.log_address, config.LOG_PORT)
    insecure = ["--insecure"] if options.insecure else []
    wanted = {
        module: [*arguments, *insecure]
        for module, arguments in components(core, log, options.output_dir, state, source, listens, storage)
    }
    with only_up(state):
        living = _living(state, core, wanted)
        missing = [module for module in wanted if module not in living]
        group = Group(state / "out")
        try:
            for module in missing:
                group.start(module, *wanted[module], detach=True)
            running = living | {entry.module: entry for entry in group.entries()}
            entries = [running[module] for module in wanted]
            write_running(state, Running(core, entries, os.getcwd()))
            with connect(core, group, entries) as operator:
                wait_for(operator, {"producer", "storage", "run_data", "log"}, group, entries)
        except BaseException:
            group.close()
            if living:
                write_running(state, Running(core, list(living.values()), os.getcwd()))
            else:
                running_file(state).unlink(missing_ok=True)
            raise
    if not living:
        print(f"up at {core}; the output of the processes is in {group.log_dir}")
    elif missing:
        print(f"up at {core}: started {', '.join(missing)} again, {len(living)} others were running")
    else:
        print(f"up already at {core}: all {len(living)} processes are running")
    return 0


def _living(state: Path, core: str, wanted: dict[str, list[str]]) -> dict[str, Entry]:
    """The processes of an earlier `up` that still run, by module. ConfigError unless this `up` asks for the same
    system, from the same directory."""
    before = read_running(state)
    living = {} if before is None else {entry.module: entry for entry in before.processes if alive(entry)}
    if before is None or not living:
        return {}
    up_at = f"a system is up already at {before.core} ({running_file(state)})"
    end = "repeat its options to start what has ended, or end it with `larpixdaq down`"
    if before.directory != os.getcwd():
        raise ConfigError(f"{up_at}, started in {before.directory}, not in {os.getcwd()}: {end}")
    for module, entry in living.items():
        if entry.arguments != wanted[module]:
            has, asked = " ".join(entry.arguments), " ".join(wanted[module])
            raise ConfigError(f"{up_at}; {module} runs with {has!r}, asked for is {asked!r}: {end}")
    return living


def connect(core: str, group: Group, processes: Sequence[Entry]) -> Operator:
    """An Operator of the core that is one of `processes`.

    ComponentError as soon as a process of the group has ended, or when the core that answers is another one.
    """
    deadline = time.monotonic() + UP_LIMIT
    own = next(entry.pid for entry in processes if entry.module == "core")
    while True:
        try:
            operator = Operator(core, timeout=0.5)
        except NoCore:
            group.check()
            if time.monotonic() > deadline:
                raise
            continue
        try:
            found = operator.status().result(timeout=UP_LIMIT)
        except NoCore:
            operator.close()
            continue
        process = found.get("process", {})
        if (process.get("host"), process.get("pid")) == (config.process_identity()["host"], own):
            return operator
        operator.close()
        raise ComponentError(
            f"another core answers at {core}: process {process.get('pid', '?')} of {process.get('user', '?')} on "
            f"{process.get('host', '?')}, started {utc(found['started'])}, state directory "
            f"{found.get('state_dir', 'unknown')}; end it, or choose another --address and --log-address"
        )


def wait_for(operator: Operator, kinds: set[str], group: Group, processes: Sequence[Entry]) -> None:
    """Wait until a component of each kind is alive in one of `processes`; ComponentError when that takes too long or
    a process of the group has ended."""
    deadline = time.monotonic() + UP_LIMIT
    host = config.process_identity()["host"]
    own = {(host, entry.pid) for entry in processes}
    while True:
        group.check()
        try:
            found = operator.components().result(timeout=UP_LIMIT)
            there = [c for c in found if c["alive"] and (c["info"].get("host"), c["info"].get("pid")) in own]
            missing = kinds - {c["kind"] for c in there}
        except NoCore:
            missing = {"core"}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise ComponentError(f"waited {UP_LIMIT:g} s for {', '.join(sorted(missing))}")
        time.sleep(0.05)


def _abort_run(core: str) -> None:
    """Abort the run in progress, if there is one, so that the catalogue says how it ended and where its files are."""
    try:
        with Operator(core, timeout=1.0) as operator:
            if operator.state().result(timeout=UP_LIMIT) != STOP:
                operator.take_control().result(timeout=UP_LIMIT)
                operator.abort_run().result(timeout=ABORT_LIMIT)
    except LarpixDaqError as error:
        print(f"larpixdaq: WARNING: the run in progress could not be aborted: {error}", file=sys.stderr)


def down(options: argparse.Namespace) -> int:
    state = config.state_dir(options.state_dir)
    running = read_running(state)
    if running is None:
        raise FileError(f"nothing is up: no {running_file(state)}")
    if any(entry.module == "core" and alive(entry) for entry in running.processes):
        _abort_run(running.core)
    killed = end_running(running)
    running_file(state).unlink(missing_ok=True)
    if killed:
        raise ComponentError(f"{', '.join(killed)} did not end in time and had to be killed")
    return 0


def add_status_command(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="the run, and every component",
        description="Shows the run state, who has control, the last run, and what every component says of itself. "
        "Exits with 1 when a component is LOST or PAUSED, or MISSING in the run.",
    )
    config.add_core_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=status)


def status(options: argparse.Namespace) -> int:
    with Operator(options.core) as operator:
        found = operator.status().result(timeout=5)
    if options.json:
        print(json.dumps(found))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for line in status_lines(found):
            console.print(escape(printable(line)))
    return 1 if needs_attention(found) else 0
