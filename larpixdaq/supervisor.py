"""The supervisor: starts the processes of `larpixdaq up` on its host, and starts again those that have ended.

`up` writes a plan and tells the supervisor to read it; the supervisor alone starts and ends processes, and writes what
runs. The processes do not depend on it: when it has ended, they continue, and the next supervisor adopts them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

import zmq

from larpixdaq import config
from larpixdaq.constants import STOP, SUPERVISOR
from larpixdaq.control.node import Node
from larpixdaq.errors import ConfigError, printable
from larpixdaq.protocol.reports import SupervisedProcess, SupervisorStatus
from larpixdaq.runtime.child_process import signal_name
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.runtime.file_access import open_private, state_dir, try_lock
from larpixdaq.runtime.launcher import (
    END_LIMIT,
    Entry,
    Plan,
    RunningSystem,
    Wanted,
    command,
    is_running,
    read_plan,
    read_running,
    start_time,
    write_running,
)

_log = logging.getLogger("larpixdaq.supervisor")

#: Signal by which `up` tells the supervisor to read the plan again.
RELOAD: Final = signal.SIGUSR1
#: Seconds until a process is started again: after an end in use, and after each further start that failed, that is,
#: which ended before the process had registered with the core.
DELAYS: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
#: Number of failed starts in a row after which a process is given up.
MAX_FAILURES: Final = 10
#: After more than MANY ends within MANY_SPAN seconds a process is started again only every DELAYS[-1] seconds.
MANY: Final = 20
MANY_SPAN: Final = 600.0
#: Maximum seconds without an answer of the core until its last known state no longer counts.
CONTACT: Final = 2.0
#: Maximum bytes of output that are searched for its last line.
_TAIL: Final = 8 << 10
#: What processes write that do not register with the core, when they work. A broker then still reads its stream logs,
#: which may take minutes after it was killed.
_READY: Final = {
    "emulators": b'{"ready": ',
    "broker": b"Starting JetStream",
    "offline_storage": b": waiting for a majority of the brokers",
}
#: What they write when they wait for another process of their name to die (--standby).
_STANDBY: Final = {"offline_storage": b"another storage of this name is at work"}


@dataclass(eq=False)
class Process:
    """A process of the plan. Times are time.monotonic(); `since` is in unix seconds.

    `state`: "waiting" (to be started at `due`), "running", "ending" (to be killed at `due`) or "given up". `child`:
    None if an earlier supervisor has started it. `wanted` None: it is not started again.
    """

    name: str
    module: str
    arguments: list[str]
    directory: str
    wanted: Wanted | None
    state: str = "waiting"
    since: float = field(default_factory=time.time)
    due: float = 0.0
    pid: int = 0
    started: int = 0
    pidfd: int = -1
    child: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    registered: bool = False
    output: int = 0  # bytes in the file of its output before it was started
    restarts: int = 0
    failures: int = 0
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=MANY + 1))
    last_exit: str = ""
    last_line: str = ""

    def enter(self, state: str, due: float = 0.0) -> None:
        self.state, self.due, self.since = state, due, time.time()

    def entry(self) -> Entry:
        return Entry(
            self.module, self.pid, self.started, self.arguments, self.name, self.state, self.registered, self.since,
            self.restarts, self.failures, self.last_exit, self.last_line, self.directory,
        )  # fmt: skip

    def report(self) -> SupervisedProcess:
        return SupervisedProcess(
            self.name, self.module, self.pid or None, self.state, self.since, self.restarts, self.last_exit,
            self.last_line[:400],
        )  # fmt: skip


class Supervisor:
    """Keeps the processes of the plan running. `on_start` is called once, when the plan is in effect."""

    def __init__(self, directory: Path, plan: Plan, on_start: Callable[[], None] = lambda: None) -> None:
        """`directory`: the state directory. Raises FileError."""
        self._directory, self._plan = directory, plan
        self._on_start: Callable[[], None] | None = on_start
        self._output = directory / "out"
        self._output.mkdir(mode=0o700, exist_ok=True)
        self._poller = zmq.Poller()
        self._written: RunningSystem | None = None
        self._write_error = ""
        self._refused = self._problem = ""
        self._unapplied, self._asked = True, time.monotonic()  # the plan may differ from what runs
        self._in_effect = ""
        self._waiting = ""
        self._progress = 0
        own = start_time(os.getpid()) or 0
        self._self = Entry("supervisor", os.getpid(), own, [], plan.supervisor)
        earlier = read_running(directory)
        self._processes: list[Process] = []
        for entry in earlier.processes if earlier is not None else []:
            self._adopt(entry)
        self.node = Node(
            plan.supervisor,
            SUPERVISOR,
            plan.core,
            {},
            info={},
            status=self.status,
            on_name_taken=lambda: _log.error("another component has the name %s", plan.supervisor),
            module=plan.module,
            insecure=plan.insecure,
        )
        self._poller.register(self.node.fileno(), zmq.POLLIN)

    def run(self, signals: Signals) -> None:
        """Supervise until a signal comes. The processes continue."""
        self.node.start()
        self._poller.register(signals.fileno(), zmq.POLLIN)
        self.turn(0)
        while not signals.stop:
            self.turn(self.node.wait_ms(self._due()))
            if signals.take_reload():
                self.read_plan()
                self.turn(0)

    def close(self) -> None:
        self.node.close()
        for process in self._processes:
            if process.pidfd >= 0:
                os.close(process.pidfd)

    def status(self) -> SupervisorStatus:
        return SupervisorStatus([process.report() for process in self._processes])

    def turn(self, wait: int) -> None:
        """Wait at most `wait` milliseconds for an event, and do what is due."""
        ready = {descriptor for descriptor, _ in self._poller.poll(wait)}
        self.node.dispatch()
        now = time.monotonic()
        self._note_registered()
        for process in list(self._processes):
            if process.pidfd in ready:
                self._ended(process, now)
        if self._unapplied:
            self._apply(now)
        for process in list(self._processes):
            if process.due and now >= process.due:
                if process.state == "waiting":
                    self._start(process, now)
                elif process.state == "ending":
                    _log.error("%s did not end within %g s and is killed", process.name, END_LIMIT)
                    process.due = 0.0
                    self._signal(process, signal.SIGKILL)
        self._write()
        self.node.report(self._progress, 0)
        if self._on_start is not None and not self._unapplied:
            self._on_start()
            self._on_start = None

    def _due(self) -> float | None:
        return min((process.due for process in self._processes if process.due), default=None)

    def _answers(self, since: float = 0.0) -> bool:
        """Return whether the core has answered within CONTACT seconds, and after `since` (time.monotonic())."""
        return self.node.heard > max(since, time.monotonic() - CONTACT) and bool(self.node.session)

    def _note_registered(self) -> None:
        registered = self.node.update.registered
        for process in self._processes:
            if process.pid and not process.registered:
                if process.module == "core":
                    process.registered = self._answers(process.began)
                else:
                    process.registered = registered.get(process.name) == process.pid or self._is_ready(process)
                if process.registered:
                    process.failures = 0

    # The plan.

    def _apply(self, now: float) -> None:
        """Start, end and change processes so that they are those of the plan. In a run none that runs is changed."""
        wanted = {process.name: process for process in self._plan.processes}
        running = {process.name: process for process in self._processes}
        changes = [
            process
            for name, process in running.items()
            if process.pid and process.state != "ending" and self._differs(process, wanted.get(name))
        ]
        refusal = "" if not changes or self._plan.force else self._refusal()
        if refusal is None:  # the core has not answered yet
            return
        for name, new in wanted.items():
            process = running.get(name)
            if process is None:
                self._processes.append(Process(name, new.module, new.arguments, self._plan.directory, new, due=now))
            elif process in changes:
                if not refusal:
                    process.wanted = new
                    self._end(process, now)
            else:
                process.wanted = new
                if process.state in ("waiting", "given up"):
                    process.module, process.arguments = new.module, new.arguments
                    process.failures = 0
                    process.enter("waiting", now)
        for name, process in running.items():
            if name not in wanted and not (process in changes and refusal):
                process.wanted = None
                self._end(process, now)
        order = list(wanted)
        self._processes.sort(key=lambda process: order.index(process.name) if process.name in wanted else -1)
        self._unapplied, self._in_effect = False, self._plan.id
        self._waiting = f"{', '.join(process.name for process in changes)}: {refusal}" if refusal else ""
        if self._waiting:
            _log.warning("not changed: %s", self._waiting)

    def read_plan(self) -> None:
        """Read the plan again, which the next turn applies."""
        try:
            plan = read_plan(self._directory)
        except OSError as error:
            _log.error("%s", error)
            return
        if plan is not None:
            self._plan, self._unapplied, self._asked = plan, True, time.monotonic()

    def _differs(self, process: Process, wanted: Wanted | None) -> bool:
        if wanted is None or process.directory not in ("", self._plan.directory):
            return True
        return (wanted.module, wanted.arguments) != (process.module, process.arguments)

    def _refusal(self) -> str | None:
        """Return why running processes may not be changed now, "" if they may, None if that is not known yet."""
        if self._answers():
            return "" if self.node.state == STOP else f"run {self.node.run} is in progress"
        if time.monotonic() - self._asked < CONTACT:
            return None
        return "the core does not answer, so that a run may be in progress"

    # Processes.

    def _adopt(self, entry: Entry) -> None:
        """Take over a process of an earlier supervisor."""
        wanted = Wanted(entry.module, entry.name, entry.arguments)
        process = Process(
            entry.name or entry.module, entry.module, entry.arguments, entry.directory, wanted, entry.state,
            since=entry.since, restarts=entry.restarts, failures=entry.failures,
            last_exit=entry.last_exit, last_line=entry.last_line,
        )  # fmt: skip
        now = time.monotonic()
        if entry.pid:
            with contextlib.suppress(OSError):
                process.pidfd = os.pidfd_open(entry.pid)
            if process.pidfd >= 0 and is_running(entry):
                process.pid, process.started, process.registered = entry.pid, entry.started, entry.registered
                process.began = now
                self._poller.register(process.pidfd, zmq.POLLIN)
            else:
                if process.pidfd >= 0:
                    os.close(process.pidfd)
                    process.pidfd = -1
                if entry.state != "ending":
                    process.last_exit, process.last_line = "ended without a supervisor", self._last_line(process)
                    process.restarts += 1
        if not process.pid and process.state != "given up":
            process.enter("waiting", now)
        elif process.state == "ending":
            process.due = now + END_LIMIT
        self._processes.append(process)

    def _start(self, process: Process, now: float) -> None:
        assert process.wanted is not None
        process.module, process.arguments = process.wanted.module, process.wanted.arguments
        process.directory = self._plan.directory
        process.registered, process.began, process.output = False, now, 0
        try:
            with open(self._output_path(process), "ab") as out:
                process.output = os.fstat(out.fileno()).st_size
                process.child = subprocess.Popen(
                    command(process.module, *process.arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    cwd=self._plan.directory,
                    start_new_session=True,
                )
            process.pid = process.child.pid
            process.started = start_time(process.pid) or 0
            process.pidfd = os.pidfd_open(process.pid)
        except OSError as error:  # no directory, no memory, too many processes
            process.last_line = f"cannot be started: {error.strerror or error}"
            self._failed(process, "", now)
            return
        process.enter("running")
        self._poller.register(process.pidfd, zmq.POLLIN)
        _log.info("%s is started as process %d", process.name, process.pid)

    def _end(self, process: Process, now: float) -> None:
        """Ask a process to end, or forget it if it does not run."""
        if process.state == "ending":
            return
        if not process.pid:
            if process.wanted is None:
                self._processes.remove(process)
            return
        _log.info("%s is ended, because the configuration has changed", process.name)
        process.enter("ending", now + END_LIMIT)
        self._signal(process, signal.SIGTERM)

    def _signal(self, process: Process, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.pidfd, number)

    def _ended(self, process: Process, now: float) -> None:
        """Decide whether and when a process that has ended is started again."""
        self._progress += 1
        self._poller.unregister(process.pidfd)
        os.close(process.pidfd)
        status = None if process.child is None else process.child.wait()
        process.pidfd, process.child, process.pid, process.started = -1, None, 0, 0
        was_ending = process.state == "ending"
        ended = "ended" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            ended = f"was killed by {signal_name(-status)}"
        if was_ending and process.wanted is None:
            self._processes.remove(process)
        elif was_ending:
            process.failures = 0
            process.enter("waiting", now)
        else:
            process.last_line = self._last_line(process)
            self._failed(process, ended, now)

    def _failed(self, process: Process, ended: str, now: float) -> None:
        """Plan the next start of a process that has ended by itself, or could not be started."""
        process.last_exit = ended
        process.restarts += 1
        process.ends.append(now)
        if not process.registered:
            process.failures += 1
            if process.module != "core" and not self._answers():
                # Without the core no component can register, so that this alone is no reason to give it up.
                process.failures = min(process.failures, len(DELAYS) - 1)
        process.registered = False
        what = ": ".join(part for part in (f"{process.name} {ended}".strip(), process.last_line) if part)
        if process.failures >= MAX_FAILURES:
            process.enter("given up")
            _log.error("%s: given up after %d failed starts; `larpixdaq up` tries again", what, process.failures)
            return
        delay = DELAYS[min(process.failures, len(DELAYS) - 1)]
        if len(process.ends) > MANY and now - process.ends[0] < MANY_SPAN:
            delay = DELAYS[-1]
        process.enter("waiting", now + delay)
        _log.warning("%s; it is started again %s", what, f"in {delay:g} s" if delay else "now")

    def _output_path(self, process: Process) -> Path:
        return self._output / f"{quote(process.name, safe=' ')}.out"

    def _last_line(self, process: Process) -> str:
        """Return the last line that a process has written since its start."""
        try:
            with open(self._output_path(process), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(process.output, size - _TAIL))
                lines = file.read(_TAIL).decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return printable(lines[-1]) if lines else "without a word"

    def _is_ready(self, process: Process) -> bool:
        """Return whether a process that does not register with the core, or not yet, has said that it is ready."""
        markers = [_READY[process.module]] if process.module in _READY else []
        if "--standby" in process.arguments and process.module in _STANDBY:
            markers.append(_STANDBY[process.module])
        if not markers:
            return False
        try:
            with open(self._output_path(process), "rb") as file:
                file.seek(process.output)
                text = file.read(_TAIL)
                return any(marker in text for marker in markers)
        except OSError:
            return False

    def _write(self) -> None:
        """Write the list of processes when it has changed."""
        refusal = self.node.refusal
        if (error := "" if refusal is None else refusal.error) != self._refused:  # its text changes all the time
            self._refused, self._problem = error, "" if refusal is None else refusal.text
        running = RunningSystem(
            self._plan.core,
            [process.entry() for process in self._processes],
            self._plan.directory,
            self._in_effect,
            self._waiting,
            self._self,
            self._plan.insecure,
            self._problem,
        )
        if running != self._written:
            try:
                write_running(self._directory, running)
                self._written, self._write_error = running, ""
            except OSError as error:
                if self._write_error != str(error):
                    self._write_error = str(error)
                    _log.error("%s; `larpixdaq up` and `down` do not see the present processes", error)


def notify(text: str) -> None:
    """Tell systemd the state of this service, if it is one (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(text.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def serve(directory: Path, on_start: Callable[[], None] = lambda: None) -> None:
    """Supervise the plan in a state directory until a signal comes. Raises ConfigError and FileError."""
    plan = read_plan(directory)
    if plan is None:
        raise ConfigError(f"there is no plan in {directory}: `larpixdaq up` writes it and starts the supervisor")
    lock = open_private(directory / "supervisor.lock", os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            if not try_lock(lock):
                raise ConfigError(f"another supervisor runs with state directory {directory}")
        supervisor = Supervisor(directory, plan, on_start)
        with contextlib.closing(supervisor), Signals(reload=RELOAD) as signals:
            supervisor.run(signals)
    finally:
        os.close(lock)


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="python -m larpixdaq.supervisor",
        description="Starts the processes that `larpixdaq up` has planned, and starts again those that have ended. "
        "`up` starts it in the background. When it ends, the processes continue.",
    )
    config.add_state_dir_argument(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)
    return run_main(lambda: serve(state_dir(options.state_dir)))


if __name__ == "__main__":
    sys.exit(main())
