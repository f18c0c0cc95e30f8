"""Commands `larpixdaq up`, `down` and `config`: start and end the processes of a detector on this host, and show its
configuration file."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pwd
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq import broker, config, core, log, metrics, offline_storage, producer, run_data, supervisor, web
from larpixdaq.alarm_config import AlarmConfig, parse_alarms, read_file
from larpixdaq.config_schema import Explanation, Program, explanations, json_schema
from larpixdaq.constants import STOP
from larpixdaq.detector_config import DetectorConfig
from larpixdaq.emulators import pacman
from larpixdaq.errors import ComponentError, ConfigError, FileError, LarpixDaqError, NoCore, UsageError
from larpixdaq.keys import credentials
from larpixdaq.operator import Operator
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.launcher import (
    END_LIMIT,
    Entry,
    Plan,
    RunningSystem,
    Wanted,
    command,
    components,
    end_process,
    is_running,
    logind_removes_files,
    plan_file,
    read_plan,
    read_running,
    running_file,
    send_signal,
    up_lock,
    write_plan,
    write_private,
)
from larpixdaq.runtime.units import utc
from larpixdaq.sources import options as source_options
from larpixdaq.web.links import running_servers

#: Maximum seconds until every process that `up` starts has registered.
UP_LIMIT = 20.0
#: Maximum seconds until `down` has aborted a run in progress.
ABORT_LIMIT = 40.0
#: Seconds between two looks at the supervisor's list while `up` waits.
_LOOK: Final = 0.02
#: The programs whose options a configuration file has, in the order of starting.
PROGRAMS: Final = (
    Program(
        "broker",
        "brokers",
        False,
        broker.argument_parser,
        broker.check,
        broker.listening_ports,
        frozenset({"server-name", "listen", "peers"}),
    ),
    Program("core", "core", False, core.argument_parser),
    Program("core", "standby", False, core.argument_parser),
    Program("log", "log", False, log.argument_parser),
    Program("offline_storage", "storages", True, offline_storage.argument_parser),
    Program("run_data", "monitors", True, run_data.argument_parser),
    Program("emulators", "emulators", True, pacman.argument_parser, pacman.check_arguments, pacman.listening_ports),
    Program("producer", "producers", True, producer.argument_parser, producer.check),
    Program("metrics", "metrics", False, metrics.argument_parser, metrics.check),
    Program("web", "web", False, web.argument_parser, web.check),
)


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "up",
        help="start the processes of this host",
        description="Starts the processes that a configuration file has for this host, or, without a file, core, log, "
        "offline storage, online monitor and a producer, with these options. They run in the background under a "
        "supervisor, which starts them again when they end. `larpixdaq down` ends them. The same command again starts "
        "what was given up; after a change of the file it restarts what has changed, but not in a run.",
        allow_abbrev=False,
    )
    file = parser.add_argument_group("with a configuration file", "which has all other options")
    _add_file_arguments(file)
    file.add_argument("--force", action="store_true", help="restart what has changed also while a run is in progress")
    file.add_argument(
        "--foreground", action="store_true", help="be the supervisor, in place of starting it in the background"
    )
    file.add_argument("--systemd", action="store_true", help="only print a unit of systemd that runs this command")
    _add_own_arguments(parser)
    offline_storage.add_own_arguments(parser)
    source_options.add_arguments(parser, required=False)
    producer.add_own_arguments(parser)
    parser.set_defaults(function=up)
    parser = commands.add_parser(
        "down",
        help="end what `larpixdaq up` started",
        description="Ends what `larpixdaq up` started on this host, waits until it has, and says what was ended. A run "
        "in progress is aborted if the core is among it: its data are stored, its condition is ABORTED.",
    )
    _add_file_arguments(parser)
    config.add_state_dir_argument(parser)
    parser.set_defaults(function=down)
    parser = commands.add_parser(
        "config",
        help="show a configuration file as it is understood",
        description="Checks a configuration file, and prints it with all values and the line that each comes from.",
    )
    _add_file_arguments(parser)
    parser.add_argument("--commands", action="store_true", help="print the commands that `up` runs on the host instead")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="say what the keys are for: all, or those that contain KEY, such as producers.NAME.ring or ring",
    )
    parser.add_argument("--markdown", action="store_true", help="with --explain: as a table for documentation")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of the file, for editors")
    parser.set_defaults(function=show)


def _add_file_arguments(parser: Any) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="configuration file, such as detector.toml")
    parser.add_argument("--host", metavar="NAME", help="the host of the file that this one is (default: found out)")


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `up` itself. All others belong to the storage or the producer, which get them unchanged."""
    config.add_address_argument(parser)
    config.add_log_address_argument(parser, None)
    config.add_state_dir_argument(parser)
    config.add_insecure_argument(parser)
    config.add_log_level_argument(parser)
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path("."), metavar="DIR", help="for the files (default .)"
    )
    core.add_alarms_argument(parser)


# The commands.


def up(options: argparse.Namespace) -> int:
    if options.file is None:
        if options.host or options.force or options.systemd:
            raise UsageError("--host, --force and --systemd go with a configuration file")
        if not source_options.names_source(options):
            raise UsageError(f"one of the arguments {' '.join(source_options.SOURCES)} is required")
        return _up_with_options(options)
    only = argparse.ArgumentParser(allow_abbrev=False)
    _add_file_arguments(only)
    for flag in ("--force", "--foreground", "--systemd"):
        only.add_argument(flag, action="store_true")
    if other := only.parse_known_args(options.argv[1:])[1]:
        raise UsageError(f"{other[0]}: with a configuration file, all options of the processes are in the file")
    file = DetectorConfig(options.file, PROGRAMS)
    host = _host(file, options.host)
    if options.systemd:
        print(unit(file, host), end="")
        return 0
    return _up_with_file(file, host, force=options.force, foreground=options.foreground)


def _alarms_file(state: Path, alarms: AlarmConfig, content: bytes) -> Path:
    """Write the file with the table [alarms] for the core, which is started again when the table has changed.

    It is a copy, because the core must get what was checked, also when it is started again later.
    """
    path = state / f"alarms-{hashlib.sha256(msgspec.json.encode(alarms)).hexdigest()[:12]}.toml"
    write_private(path, content)
    return path


def _up_with_file(file: DetectorConfig, host: str, *, force: bool, foreground: bool) -> int:
    _check_keys(file, host)
    state = state_dir(file.state_dir(host))
    for component in file.components:
        if component.host == host and component.program.table == "producers":
            _warn_of_logind(file.directory / file.parsed(component).ring_dir)
    alarms = None
    if host in [core.host for core in file.cores] and file.has_alarms:
        alarms = _alarms_file(state, file.alarms, file.text.encode())
    plan = Plan(
        secrets.token_hex(8),
        file.core_address(host),
        str(file.directory),
        file.wanted(host, alarms),
        file.supervisor(host),
        file.detector.insecure,
        force,
        file.module(host),
    )
    name = f"{file.detector.name or file.path.name}{f' on {host}' if host else ''}"

    def check(running: dict[str, Entry]) -> None:
        new = {process.name for process in plan.processes if process.name not in running}
        changed = {
            process.name
            for process in plan.processes
            if process.name in running and running[process.name].arguments != process.arguments
        }
        file.check_start(host, frozenset(new | changed))

    if foreground:
        return _supervise(state, plan, check, name)
    with up_lock(state):
        print(_change(state, plan, check, name))
    return 0


def _check_keys(file: DetectorConfig, host: str) -> None:
    """Check that the components of a host without the core have keys, so that one line says how they get them all."""
    if host == file.core_host or file.detector.insecure:
        return
    core = file.core_address(host)
    if missing := [name for name in file.members(host) if credentials.find(core, name) is None]:
        for name in missing:
            others = [other for other in file.hosts if other not in (host, file.core_host)]
            if elsewhere := [other for other in others if name in file.members(other)]:
                path = credentials.joined_file(core.partition(",")[0], name)
                raise ConfigError(
                    f"{host} has no key for {name}, which {' and '.join(elsewhere)} runs too, and a name has one key: "
                    f"if that host has joined, copy {path.name} from there to {path} (scp -p); otherwise "
                    f"`larpixdaq keys invite {file.path.name} --host {host}` on {file.core_host} makes a token"
                )
        raise ConfigError(
            f"{host} has no keys for {', '.join(missing)}: `larpixdaq keys invite {file.path.name} --host {host}` on "
            f"{file.core_host} makes a token for `larpixdaq keys join` here"
        )


def _up_with_options(options: argparse.Namespace) -> int:
    state = state_dir(options.state_dir)
    if not options.output_dir.is_dir():
        raise FileError(f"--output-dir {options.output_dir}: no such directory")
    _warn_of_logind(options.ring_dir)
    source_options.create(options)  # here, so that an error in the options is reported to the user, not in a file
    others = argparse.ArgumentParser(allow_abbrev=False)
    _add_own_arguments(others)
    offline_storage.add_own_arguments(others)
    others.add_argument("--foreground", action="store_true")
    source = others.parse_known_args(options.argv[1:])[1]
    storage = offline_storage.own_options(options)
    listens = config.listen_address(options.address, config.CORE_PORT)
    address = config.reachable_address(listens, config.LOOPBACK)  # from this machine, whatever interfaces it listens at
    log_address = config.address(options.log_address or f"tcp://{config.interface_towards(address)}", config.LOG_PORT)
    if not config.is_loopback(listens) and config.is_loopback(address):
        print(
            f"larpixdaq: WARNING: other hosts reach the core at {listens}, but not the producer, which listens at "
            f"127.0.0.1, and the log only if they reach {log_address}; --address tcp://HOST with the name or address "
            "of this host opens all of them",
            file=sys.stderr,
        )
    common = ["--insecure"] if options.insecure else []
    common += [f"--log-level={options.log_level}"] if options.log_level != "INFO" else []
    names = {program.module: program.parser().get_default("name") or program.module for program in PROGRAMS}
    own: dict[str, list[str]] = {}
    if options.alarms is not None:
        content = read_file(options.alarms)
        alarms = _alarms_file(state, parse_alarms(content, f"--alarms {options.alarms}"), content)
        own["core"] = [f"--alarms={alarms}"]
    wanted = [
        Wanted(module, names[module], [*arguments, *common, *own.get(module, [])])
        for module, arguments in components(address, log_address, options.output_dir, state, source, listens, storage)
    ]
    plan = Plan(secrets.token_hex(8), address, os.getcwd(), wanted, insecure=options.insecure)

    def check(running: dict[str, Entry]) -> None:
        _check_same(state, plan, running)

    if options.foreground:
        return _supervise(state, plan, check, "")
    with up_lock(state):
        print(_change(state, plan, check, ""))
    return 0


def _check_same(state: Path, plan: Plan, running: dict[str, Entry]) -> None:
    """Raise ConfigError if an earlier `up` had other options or another working directory, and its processes run."""
    earlier = read_running(state)
    if earlier is None or not running:
        return
    up_at = f"a system is up already at {earlier.core} ({running_file(state)})"
    advice = "use its options to restart processes that have ended, or end it with `larpixdaq down`"
    if earlier.directory != plan.directory:
        raise ConfigError(f"{up_at}, started in {earlier.directory}, not in {plan.directory}: {advice}")
    wanted = {process.name: process for process in plan.processes}
    for name, entry in running.items():
        arguments = wanted[name].arguments if name in wanted else []
        if entry.arguments != arguments:
            has, asked = " ".join(entry.arguments), " ".join(arguments)
            raise ConfigError(f"{up_at}; {entry.module} runs with {has!r}, this command has {asked!r}: {advice}")


def _warn_of_logind(ring_dir: Path) -> None:
    if logind_removes_files(ring_dir, os.getuid()):
        print(
            f"larpixdaq: WARNING: when you log out, systemd-logind removes the ring's file from {ring_dir} "
            "(RemoveIPC): the producer makes it again within a second, but if it is killed before, data are lost; "
            "`loginctl enable-linger` prevents it",
            file=sys.stderr,
        )


def down(options: argparse.Namespace) -> int:
    if options.file is not None:
        if options.state_dir is not None:
            raise UsageError("--state-dir is in the configuration file")
        file = DetectorConfig(options.file, PROGRAMS)
        state = state_dir(file.state_dir(_host(file, options.host)))
    elif options.host is not None:
        raise UsageError("--host goes with a configuration file")
    else:
        state = state_dir(options.state_dir)
    running = read_running(state)
    if running is None:
        raise FileError(f"nothing is up: no {running_file(state)}")
    aborted = None
    if any(entry.name == "core" and is_running(entry) for entry in running.processes):
        aborted = _abort_run(running)
    ended = _end_all(state)
    parts = [
        f"ended {', '.join(ended.running)}" if ended.running else "nothing was running any more",
        f"run {aborted} was aborted" if aborted is not None else "",
        f"not running: {', '.join(ended.others)}" if ended.others else "",
    ]
    print("; ".join(filter(None, parts)))
    if ended.killed:
        raise ComponentError(f"{', '.join(ended.killed)} did not end in time and had to be killed")
    return 0


def show(options: argparse.Namespace) -> int:
    if options.schema:
        print(json.dumps(json_schema(PROGRAMS), indent=1))
    elif options.explain is not None:
        explain(options.explain, markdown=options.markdown)
    elif options.file is None:
        raise UsageError("name a configuration file, or --explain or --schema")
    else:
        file = DetectorConfig(options.file, PROGRAMS)
        if options.commands:
            host = _host(file, options.host)
            for component in file.components:
                if component.host == host:
                    print(" ".join([*component.program.command, *map(_quoted, file.arguments(component))]))
        else:
            print("\n".join(file.effective()).rstrip())
    return 0


def explain(wanted: str, *, markdown: bool = False) -> None:
    """Print what the keys of a configuration file are for. Raises ConfigError if none contains `wanted`."""
    found: dict[str, tuple[Explanation, list[Explanation]]] = {}
    table = None
    for each in explanations(PROGRAMS):
        if not each.key:
            table = each
        elif table is not None and wanted.lower() in f"{each.table}.{each.key}".lower():
            found.setdefault(each.table, (table, []))[1].append(each)
    if not found:
        raise ConfigError(f"--explain {wanted}: no key contains this; `larpixdaq config --explain` has all of them")
    for name, (about, keys) in found.items():
        if markdown:
            print(f"### [{name}]\n\n{about.text}\n\n| key | value | what it is |\n| --- | --- | --- |")
            for key in keys:
                print(f"| `{key.key}` | {_cell(key.values)} | {_cell(key.text)} |")
        else:
            print(f"[{name}]  {about.text}")
            for key in keys:
                print(f"  {key.key}: {key.values}\n      {key.text}")
        print()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# This host.


def _host(file: DetectorConfig, named: str | None) -> str:
    """Return the host of the file that this machine is. Raises ConfigError if that is not clear."""
    if named is not None:
        return file.find_host(named)
    if len(file.hosts) < 2:
        return next(iter(file.hosts), "")
    full = socket.gethostname()
    own_names = {full, full.partition(".")[0]}
    own = [
        name
        for name in file.hosts
        if own_names & {name, file.host_address(name)}
        or credentials.is_of_this_host(config.address(file.host_address(name), 0))
    ]
    if len(own) != 1:
        found = f"{' and '.join(own)} are" if own else "none is"
        known = ", ".join(file.hosts)
        raise ConfigError(f"{file.path}: of the hosts {known}, {found} this machine ({full}): name one with --host")
    return own[0]


# Changing what runs.


def _alive(running: RunningSystem | None) -> dict[str, Entry]:
    return {} if running is None else {entry.name: entry for entry in running.processes if is_running(entry)}


def _supervise(state: Path, plan: Plan, check: Callable[[dict[str, Entry]], None], name: str) -> int:
    """Be the supervisor, until a signal comes. The processes continue."""
    with up_lock(state):
        running = read_running(state)
        check(_alive(running))
        if running is not None and running.supervisor is not None and is_running(running.supervisor):
            end_process(running.supervisor)
        write_plan(state, plan)

    def started() -> None:
        supervisor.notify("READY=1")
        now = read_running(state)
        waiting = f"; not changed: {now.waiting}" if now is not None and now.waiting else ""
        print(f"{name}: " * bool(name) + f"up at {plan.core}{waiting}", flush=True)

    supervisor.serve(state, started)
    return 0


def _change(state: Path, plan: Plan, check: Callable[[dict[str, Entry]], None], name: str) -> str:
    """Let the supervisor make the processes those of the plan. Returns a line that says what has changed.

    If a new process does not start, everything is as before. Raises LarpixDaqError.
    """
    before = _alive(read_running(state))
    check(before)
    previous = None
    with contextlib.suppress(FileError):  # it cannot be read any more
        previous = read_plan(state)
    write_plan(state, plan)
    try:
        after = _reach(state, plan, before)
    except BaseException:
        if before and previous is not None:
            again = msgspec.structs.replace(previous, id=plan.id + "-")
            write_plan(state, again)
            with contextlib.suppress(LarpixDaqError):
                _Waiting(state, again).apply(END_LIMIT)
        else:
            _end_all(state)
        raise
    return "\n".join([_outcome(state, plan, name, before, after), *_web_links(after)])


def _web_links(running: RunningSystem) -> list[str]:
    """Return a line with the link to each web server among these processes."""
    pids = {entry.pid for entry in running.processes if entry.module == "web"}
    return [f"web page: {server.link}" for server in running_servers() if server.pid in pids]


class _Waiting:
    """Waits for what a supervisor does with a plan."""

    def __init__(self, state: Path, plan: Plan) -> None:
        self._state, self._plan = state, plan
        self._own: subprocess.Popen[bytes] | None = None

    def running(self) -> RunningSystem | None:
        return read_running(self._state)

    def apply(self, limit: float = UP_LIMIT) -> RunningSystem:
        """Tell the supervisor, or start one, and wait until the plan is in effect. Raises ComponentError."""
        self._tell()
        return self.until(lambda running: running.plan == self._plan.id, "the supervisor", limit)

    def until(self, condition: Callable[[RunningSystem], bool], what: str, limit: float = UP_LIMIT) -> RunningSystem:
        deadline = time.monotonic() + limit
        while True:
            running = self.running()
            if running is not None and condition(running):
                return running
            self.check()
            if time.monotonic() > deadline:
                problem = f"; the supervisor: {running.problem}" if running is not None and running.problem else ""
                raise ComponentError(f"waited {limit:g} s for {what}{problem}")
            time.sleep(_LOOK)

    def check(self) -> None:
        """Raise ComponentError, with the last line of its output, if the supervisor or a process has ended."""
        running = self.running()
        if self._own is not None and self._own.poll() is not None:
            lines = (self._state / "out" / "supervisor.out").read_text(errors="replace").strip().splitlines()
            raise ComponentError(f"the supervisor has ended: {lines[-1] if lines else 'it wrote nothing'}")
        if running is None or running.plan != self._plan.id:
            return
        for entry in running.processes:
            if entry.state in ("waiting", "given up"):
                ended = f"{entry.name} {entry.last_exit}".strip()
                raise ComponentError(f"{ended}: {entry.last_line}")

    def _tell(self) -> None:
        running = self.running()
        if running is not None and running.supervisor is not None and is_running(running.supervisor):
            same = (running.core, running.insecure, running.supervisor.name) == (
                self._plan.core, self._plan.insecure, self._plan.supervisor,
            )  # fmt: skip
            if same and send_signal(running.supervisor, supervisor.RELOAD):
                return
            end_process(running.supervisor)
        out = self._state / "out"
        out.mkdir(mode=0o700, exist_ok=True)
        with open(out / "supervisor.out", "ab") as file:
            self._own = subprocess.Popen(
                command("supervisor", "--state-dir", str(self._state)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


def _reach(state: Path, plan: Plan, before: dict[str, Entry]) -> RunningSystem:
    """Wait until all processes of the plan run and have registered. Raises LarpixDaqError."""
    waiting = _Waiting(state, plan)
    running = waiting.apply()
    own = next((entry for entry in running.processes if entry.module == "core"), None)
    if own is not None and own.name not in before and "," not in plan.core:  # else the other core may be active
        connect(plan.core, waiting.check, lambda: _pid_of_core(waiting), insecure=plan.insecure).close()

    def is_complete(running: RunningSystem) -> bool:
        return all(entry.registered and entry.state == "running" for entry in running.processes)

    missing = ", ".join(entry.name for entry in running.processes if not entry.registered)
    return waiting.until(is_complete, missing or "the end of what has changed")


def _pid_of_core(waiting: _Waiting) -> int:
    running = waiting.running()
    return next((entry.pid for entry in running.processes if entry.module == "core"), 0) if running else 0


def _outcome(state: Path, plan: Plan, name: str, before: dict[str, Entry], after: RunningSystem) -> str:
    """Say what `up` has changed. Raises ConfigError if something could not be changed because of a run."""
    now = {entry.name: entry for entry in after.processes}
    new = [each for each in now if each not in before]
    restarted = [each for each in now if each in before and now[each].pid != before[each].pid]
    ended = [each for each in before if each not in now]
    others = len(now) - len(new) - len(restarted)
    where = f"{name}: up" if name else "up"
    if after.waiting:
        raise ConfigError(f"not changed: {after.waiting}: give the same command after the run, or now with --force")
    if not before:
        return f"{where} at {plan.core}; the output of the processes is in {state / 'out'}"
    parts = [
        f"started {', '.join(new)}" if new else "",
        f"restarted {', '.join(restarted)}" if restarted else "",
        f"ended {', '.join(ended)}" if ended else "",
    ]
    if changes := "; ".join(filter(None, parts)):
        return f"{where} at {plan.core}: {changes}; {others} other{' was' if others == 1 else 's were'} running"
    return f"{where} already at {plan.core}: all {len(now)} processes are running"


class _Ended(NamedTuple):
    """Names of processes that were running, of those that were not, and of those that had to be killed."""

    running: list[str]
    others: list[str]
    killed: list[str]


def _end_all(state: Path) -> _Ended:
    """End the supervisor, and then all processes."""
    ended = _Ended([], [], [])
    running = read_running(state)
    if running is not None and running.supervisor is not None:
        (ended.running if is_running(running.supervisor) else ended.others).append(running.supervisor.name)
        if not end_process(running.supervisor):
            ended.killed.append(running.supervisor.name)
        running = read_running(state)
    for entry in reversed(running.processes if running is not None else []):
        name = entry.name or entry.module
        (ended.running if is_running(entry) else ended.others).append(name)
        if not end_process(entry):
            ended.killed.append(name)
    for path in (running_file(state), plan_file(state)):
        path.unlink(missing_ok=True)
    return ended


def connect(core: str, check: Callable[[], None], pid: Callable[[], int], *, insecure: bool = False) -> Operator:
    """Return an Operator connected to the core, which must be the process with this id.

    Raises NoCore after UP_LIMIT seconds, what `check` raises, and ComponentError if another core answers.
    """
    deadline = time.monotonic() + UP_LIMIT
    while True:
        try:
            operator = Operator(core, timeout=0.5, insecure=insecure)
        except NoCore:
            check()
            if time.monotonic() > deadline:
                raise
            continue
        try:
            answer = operator.status().result(timeout=UP_LIMIT)
        except NoCore:
            operator.close()
            continue
        process = answer.get("process", {})
        if (process.get("host"), process.get("pid")) == (config.process_identity()["host"], pid()):
            return operator
        operator.close()
        raise ComponentError(
            f"another core answers at {core}: process {process.get('pid', '?')} of {process.get('user', '?')} on "
            f"{process.get('host', '?')}, started {utc(answer['started'])}, state directory "
            f"{answer.get('state_dir', 'unknown')}; end it, or choose another --address and --log-address"
        )


def _abort_run(running: RunningSystem) -> int | None:
    """Abort the run in progress, so that the catalogue has its condition and files. Returns its number; None if there
    was none."""
    try:
        with Operator(running.core, timeout=1.0, insecure=running.insecure) as operator:
            if operator.state().result(timeout=UP_LIMIT) != STOP:
                operator.take_control().result(timeout=UP_LIMIT)
                number: int | None = operator.abort_run().result(timeout=ABORT_LIMIT)["run"]
                return number
    except LarpixDaqError as error:
        print(f"larpixdaq: WARNING: the run in progress could not be aborted: {error}", file=sys.stderr)
    return None


# systemd


def unit(file: DetectorConfig, host: str) -> str:
    """Return a unit of systemd that keeps the processes of a host running, as the user who calls this."""
    user = pwd.getpwuid(os.getuid()).pw_name
    which = [str(file.path), *(["--host", host] if host else [])]
    program = [sys.executable, "-m", "larpixdaq"]
    home = os.environ.get("XDG_STATE_HOME")  # where state directory and keys are
    return "\n".join(
        [
            f"# larpixdaq up {file.path.name} --systemd; install it as root, for example as",
            "# /etc/systemd/system/larpixdaq.service, then: systemctl daemon-reload; systemctl enable --now larpixdaq",
            "[Unit]",
            f"Description=larpix-daq {file.detector.name or file.path.name} {host}".rstrip().replace("%", "%%"),
            "Wants=network-online.target",
            "After=network-online.target time-sync.target",
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "Type=notify",
            "NotifyAccess=main",
            f"User={user}",
            "WorkingDirectory=/",
            *([f"Environment={_quoted(f'XDG_STATE_HOME={home}'.replace('%', '%%'))}"] if home else []),
            f"ExecStart={_exec([*program, 'up', *which, '--foreground'])}",
            f"ExecStop={_exec([*program, 'down', *which])}",
            "# When the supervisor ends, the processes continue, and the next supervisor adopts them.",
            "KillMode=process",
            "Restart=always",
            "RestartSec=1",
            f"TimeoutStopSec={round(ABORT_LIMIT + 6 * END_LIMIT)}",
            "LimitNOFILE=65536",
            "# The ring is in /dev/shm; logind must not remove it when this user logs out (RemoveIPC).",
            f"# Run once: loginctl enable-linger {user}",
            "",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        ]
    )


def _exec(words: Sequence[str]) -> str:
    """Return a command for a unit of systemd, which takes % and $ and quotes for its own."""
    return " ".join(_quoted(word.replace("%", "%%").replace("$", "$$")) for word in words)


def _quoted(word: str) -> str:
    plain = word and all(letter.isalnum() or letter in "-_./=:@%$+,[]" for letter in word)
    return word if plain else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
