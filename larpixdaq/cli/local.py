"""`larpixdaq up` and `down`: a complete system on this machine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from larpixdaq import config, sources
from larpixdaq.errors import ComponentError, ConfigError, FileError, NoCore
from larpixdaq.launch import (
    Group,
    Running,
    alive,
    components,
    end_running,
    read_running,
    running_file,
    write_running,
)
from larpixdaq.offline_storage import add_own_arguments as add_storage_arguments
from larpixdaq.offline_storage import own_options
from larpixdaq.operator import Operator
from larpixdaq.producer import add_own_arguments as add_producer_arguments

#: `up` returns when every process has registered; it gives up after so long (seconds).
UP_LIMIT = 20.0


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "up",
        help="start every process on this machine",
        description="Starts core, log, offline storage, online monitor and a producer on this machine, in the "
        "background. `larpixdaq down` ends them.",
        allow_abbrev=False,
    )
    _add_own_arguments(parser)
    add_storage_arguments(parser)
    sources.add_arguments(parser)
    add_producer_arguments(parser)
    parser.set_defaults(function=up)
    parser = commands.add_parser(
        "down",
        help="end what `larpixdaq up` started",
        description="Ends what `larpixdaq up` started, and waits until it has. A run that goes on is aborted: what was "
        "taken is stored, its condition is ABORTED.",
    )
    config.add_state_dir_argument(parser)
    parser.set_defaults(function=down)


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
    before = read_running(state)
    if before is not None and any(alive(entry) for entry in before.processes):
        raise ConfigError(
            f"a system is up already at {before.core} ({running_file(state)}); end it with `larpixdaq down`"
        )
    if not options.output_dir.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: no such directory")
    sources.create(options)  # wrong options are told here, not in a file
    others = argparse.ArgumentParser(allow_abbrev=False)
    _add_own_arguments(others)
    add_storage_arguments(others)
    source = others.parse_known_args(options.argv[1:])[1]
    storage = own_options(options)
    listens = config.listen_address(options.address, config.CORE_PORT, insecure=options.insecure, what="core")
    core = config.reachable(listens, config.LOOPBACK)  # from this machine, whatever interfaces it listens at
    log = config.address(options.log_address, config.LOG_PORT)
    insecure = ["--insecure"] if options.insecure else []
    group = Group(state / "out")
    try:
        for module, arguments in components(core, log, options.output_dir, state, source, listens, storage):
            group.start(module, *arguments, *insecure, detach=True)
        write_running(state, Running(core, group.entries()))
        with connect(core, group) as operator:
            wait_for(operator, {"producer", "storage", "run_data", "log"}, group)
    except BaseException:
        group.close()
        running_file(state).unlink(missing_ok=True)
        raise
    print(f"up at {core}; what the processes say is in {group.log_dir}")
    return 0


def connect(core: str, group: Group) -> Operator:
    """An Operator of the core that the group has started; ComponentError as soon as one of its processes has ended."""
    deadline = time.monotonic() + UP_LIMIT
    while True:
        group.check()
        try:
            return Operator(core, timeout=0.5)
        except NoCore:
            if time.monotonic() > deadline:
                raise


def wait_for(operator: Operator, kinds: set[str], group: Group) -> None:
    """Wait until a component of each kind is alive; ComponentError when that takes too long or one has ended."""
    deadline = time.monotonic() + UP_LIMIT
    while True:
        group.check()
        try:
            found = operator.components().result(timeout=UP_LIMIT)
            missing = kinds - {c["kind"] for c in found if c["alive"]}
        except NoCore:
            missing = {"core"}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise ComponentError(f"waited {UP_LIMIT:g} s for {', '.join(sorted(missing))}")
        time.sleep(0.05)


def down(options: argparse.Namespace) -> int:
    state = config.state_dir(options.state_dir)
    running = read_running(state)
    if running is None:
        raise FileError(f"nothing is up: no {running_file(state)}")
    killed = end_running(running)
    running_file(state).unlink(missing_ok=True)
    if killed:
        raise ComponentError(f"{', '.join(killed)} did not end in time and had to be killed")
    return 0
