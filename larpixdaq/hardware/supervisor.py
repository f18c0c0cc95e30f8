"""The producer's side of its child process: requests, one at a time, commands to boards, rows for the child."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq.control.node import Call
from larpixdaq.errors import ConfigError, ProtocolError, cause
from larpixdaq.protocol import hardware
from larpixdaq.readout.command_queue import CommandQueue
from larpixdaq.readout.configuration_tracker import ConfigurationTracker
from larpixdaq.runtime.child_process import ChildProcess, signal_name

#: Seconds that a routine or action may take, unless the request of a routine says otherwise.
TIME_LIMIT: Final = 3600.0
#: Maximum time limit of a request, in seconds: the kernel's timers have a largest value.
_LONGEST: Final = 1e6
#: Maximum bytes that wait for a child that listens but does not read; further rows are left out.
_MOST_UNSENT: Final = 32 << 20
#: Maximum lines of a child's output in the log; further ones are counted.
_LOGGED: Final = 100
#: Maximum bytes of such a line.
_LINE: Final = 500

_log: Final = logging.getLogger(__name__)


class _Running(NamedTuple):
    request: int
    name: str
    what: str  # the name for messages: "routine NAME", or the action's name
    time_limit: float  # seconds


class Child:
    """Runs routines and actions in a child process, for the actions of a producer; none of the methods blocks.

    The process is started when the first request comes, and again after it has died. `fileno()` polls readable when
    dispatch() has something to do. All methods belong to one thread, which must live as long as the child.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        commands: CommandQueue,
        setup: hardware.Setup,
        tracker: ConfigurationTracker,
        settled: Callable[[], None],
    ) -> None:
        """`folders`: directories of routine files beside the shipped ones; load_routines() adds directories below them.
        `commands` is the way to the boards that `setup` describes. `tracker` gets the rows that the child listens for.
        `settled` is called after the end of each routine and action."""
        self._roots = [folder.resolve() for folder in folders]
        self._folders = [str(folder) for folder in self._roots]
        self._commands = commands
        self._setup = setup
        self._tracker = tracker
        self._settled = settled
        self._left_out = 0
        #: Rows that the child listens for: hardware.NO_ROWS, CONFIG_ANSWERS or ALL_ROWS.
        self.listening = hardware.NO_ROWS
        self._process = ChildProcess(Path(__file__).with_name("child.py"), capture=True)
        self._inbox = hardware.Inbox(requests=False)
        self._output = RoutineOutput()
        self._calls: dict[int, Call] = {}
        self._request = 0
        self._running: _Running | None = None
        self._known: list[dict[str, Any]] | None = None

    def fileno(self) -> int:
        return self._process.fileno()

    @property
    def running(self) -> str | None:
        """The name of the running routine or action."""
        return self._running.name if self._running is not None else None

    def list_routines(self, call: Call) -> None:
        """List routines: a list of {"name", "params", "help"}, `params` of {"name", "type", "required", "default"}.

        While a routine or action runs, the result is that of the last time.
        """
        if self._running is not None and self._known is not None:
            call.result(self._known, f"as before {self._running.what}, which is running")
            return
        self._send(call, hardware.ListRoutines(self._next(), self._folders))

    def load_routines(self, call: Call, directory: str) -> None:
        """Add a directory of routine files, absolute or relative to one of `folders`. Result: as list_routines().

        Fails when it lies below none of `folders`, because its files will be executed.
        """
        if not isinstance(directory, str) or not directory.isprintable():
            call.fail(f"load_routines: expected the name of a directory, found {directory!r:.100}")
            return
        allowed = ", ".join(map(str, self._roots)) or "none"
        try:
            found = [path for root in self._roots if (path := (root / directory).resolve()).is_relative_to(root)]
            folder = next((path for path in found if path.is_dir()), None)
        except OSError as error:  # the name is too long
            call.fail(f"load_routines: {directory!r:.100}: {cause(error)}")
            return
        if folder is not None:
            if str(folder) not in self._folders:
                self._folders.append(str(folder))
            self.list_routines(call)
        elif found:
            call.fail(f"load_routines: {found[0]}: no such directory")
        else:
            call.fail(
                f"load_routines: {directory:.500}: below none of the directories that --routines names: {allowed}"
            )

    def run_routine(
        self,
        call: Call,
        name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        time_limit: float | None = None,
    ) -> None:
        """Run a routine; the call gets its progress and its result. Refused (code "state") while another one runs."""
        limit = TIME_LIMIT if time_limit is None else time_limit
        if self._refuse(call):
            return
        by_name = {} if kwargs is None else kwargs
        if not isinstance(name, str):
            call.fail(f"run_routine: name: expected a routine's name, found {name!r:.100}")
        elif not isinstance(args, list | tuple):
            call.fail(f"run_routine: args: expected a list, found {args!r:.100}")
        elif not isinstance(by_name, dict) or not all(isinstance(key, str) for key in by_name):
            call.fail(f"run_routine: kwargs: expected a dictionary by names, found {kwargs!r:.100}")
        elif isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= _LONGEST:
            call.fail(f"run_routine: time_limit: expected seconds above 0, at most {_LONGEST:g}, found {limit!r:.100}")
        else:
            running = self._running = _Running(self._next(), name, f"routine {name}", float(limit))
            request = hardware.RunRoutine(running.request, self._folders, name, list(args), by_name, running.time_limit)
            if self._send(call, request):
                call.ack(running.what)

    def abort_routine(self, call: Call) -> None:
        """Kill the process with the running routine or action, whose call fails. Result: its name.

        Refused (code "state") when none runs.
        """
        running = self._running
        if running is None:
            call.fail("no routine is running", code="state")
        else:
            self.end("aborted by the operator")
            call.result(running.name, f"{running.what} is aborted")

    def act(self, call: Call, action: str, params: dict[str, Any]) -> None:
        """Do an action on chips or boards (hardware/actions.py); otherwise as run_routine()."""
        if self._refuse(call):
            return
        self._running = _Running(self._next(), action, action, TIME_LIMIT)
        if self._send(call, hardware.Action(self._running.request, action, params, TIME_LIMIT)):
            call.ack(action)

    def take_rows(self, rows: NDArray[Any]) -> None:
        """Send those of the decoded rows to the child that it listens for. Call it only while `listening`."""
        if self.listening == hardware.CONFIG_ANSWERS:
            rows = hardware.config_answers(rows)
        self._tracker.record_answers(rows)
        if self._process.unsent > _MOST_UNSENT:
            # Answers are still sent for a while, because measurements begin and end with them, and they are few.
            kept = hardware.config_answers(rows) if self._process.unsent <= 2 * _MOST_UNSENT else rows[:0]
            self._left_out += len(rows) - len(kept)
            rows = kept
        if not len(rows):
            return
        self._tell(hardware.ListenedRows(rows.tobytes(), self._left_out))
        self._left_out = 0

    def dispatch(self) -> None:
        """Handle what the child has printed and sent: at most PIECE bytes of each, so that the loop is not held up."""
        if not self._process.ready():
            return
        self._output.take(self._process.read_output())
        data = self._process.receive()
        if data is None:
            return
        if not data:
            self.end("")
            return
        try:
            for message in self._inbox.take(data):
                self._take(message)
                if not self._process.alive:  # the message has ended it, and the rest is void
                    return
        except ProtocolError as error:
            self.end(str(error))

    def end(self, reason: str) -> None:
        """Kill the child, and with it the routine that runs: its call fails with the reason, "" if it has died."""
        self._output.take(self._process.read_output())
        status = self._process.end()
        if status is not None:
            self._died(status, reason)

    def close(self) -> None:
        """Kill the child. fileno() is no longer valid."""
        self.end("the producer is closing")
        self._process.close()

    def _refuse(self, call: Call) -> bool:
        if self._running is None:
            return False
        call.fail(f"{self._running.what} is running, and only one can", code="state")
        return True

    def _tell(self, message: hardware.FromParent) -> None:
        self._process.write(hardware.pack(message))

    def _commanded(self, number: int, body: bytes, error: str) -> None:
        self._tell(hardware.CommandDone(number, body, error))

    def _next(self) -> int:
        self._request += 1
        return self._request

    def _send(self, call: Call, request: hardware.Request) -> bool:
        self._calls[request.request] = call
        try:
            data = hardware.pack(request)
            if not self._process.alive:
                self._start()
        except (ProtocolError, ConfigError) as error:
            self._end_call(request.request).fail(str(error))
            return False
        self._process.write(data)
        return True

    def _start(self) -> None:
        seen = self._tracker.configurations()
        setup = msgspec.structs.replace(self._setup, read=seen.read.tobytes(), known=seen.known.tobytes())
        data = hardware.pack(setup)  # before the start: a child without it takes a request for it
        try:
            self._process.start()
        except OSError as error:
            raise ConfigError(f"the process for routines cannot be started: {error}") from None
        self._inbox = hardware.Inbox(requests=False)
        self._output = RoutineOutput()
        self._process.write(data)

    def _take(self, message: hardware.FromChild) -> None:
        if isinstance(message, hardware.Listen):
            self.listening = message.what
        elif isinstance(message, hardware.Remember):
            self._remember(message)
        elif isinstance(message, hardware.Invalidate):
            self._tracker.invalidate(message.io_groups)
        elif isinstance(message, hardware.SendWords):
            done = partial(self._commanded, message.command)
            self._commands.send_words(message.io_group, message.io_channels, message.words, done)
        elif isinstance(message, hardware.BoardOrder):
            self._commands.send_order(
                message.io_group, message.body, partial(self._commanded, message.command), message.seconds
            )
        else:
            self._answer(message)

    def _remember(self, found: hardware.Remember) -> None:
        if len(found.chips) % 3:
            raise ProtocolError(f"Remember: expected chips of 3 bytes, found {len(found.chips)} bytes")
        self._setup = msgspec.structs.replace(self._setup, **msgspec.structs.asdict(found))
        self._tracker.set_chips(np.frombuffer(found.chips, np.uint8).reshape(-1, 3))

    def _answer(self, answer: hardware.Answer) -> None:
        call = self._calls.get(answer.request)
        if call is None:
            return
        if isinstance(answer, hardware.Progress):
            call.progress(answer.done, answer.total, answer.text, answer.value)
            return
        call = self._end_call(answer.request)
        if isinstance(answer, hardware.RoutineList):
            for line in answer.broken:
                _log.warning("routine file not loaded: %s", line)
            self._known = msgspec.to_builtins(answer.routines)
            call.result(self._known, f"not loaded: {'; '.join(answer.broken)}" if answer.broken else "")
        elif isinstance(answer, hardware.Result):
            call.result(answer.value, answer.text)
        else:
            text = answer.text
            if answer.traceback:
                text += f"\n{answer.traceback.rstrip()}"
                _log.error(text)
            call.fail(text, code=answer.code)

    def _end_call(self, request: int) -> Call:
        if self._running is not None and self._running.request == request:
            self._output.end(self._running.what)
            self._running = None
            self._settled()
        return self._calls.pop(request)

    def _died(self, status: int, reason: str) -> None:
        """Fail the calls that the child leaves behind."""
        running = self._running
        self._output.end(running.what if running is not None else "the process for routines")
        self.listening = hardware.NO_ROWS
        self._left_out = 0
        self._commands.clear()
        why = reason or _status(status, running.time_limit if running is not None else None)
        if not reason:
            _log.error("process for routines: %s; the end of its output: %s", why, self._output.tail() or "none")
        for request in list(self._calls):
            what = running.what if running is not None and running.request == request else "list of routines"
            self._end_call(request).fail(f"{what}: {why}")


class RoutineOutput:
    """Output of one child: the first lines go into the log, and the last ones are kept for the case that it dies."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines = 0
        self._tail = b""

    def take(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-4096:]
        if self._lines >= _LOGGED:
            self._lines += data.count(b"\n")
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:_LINE]
        for line in lines[: _LOGGED - self._lines]:
            _log.info("routine says: %s", line[:_LINE].decode(errors="replace"))
        self._lines += len(lines)

    def end(self, name: str) -> None:
        """Log the last line, and how many lines were left out, at the end of the routine or process `name`."""
        if self._rest:
            _log.info("routine says: %s", self._rest.decode(errors="replace"))
        if self._lines > _LOGGED:
            _log.info("%s: %d further lines of output left out", name, self._lines - _LOGGED)
        self._rest, self._lines = b"", 0

    def tail(self) -> str:
        """The last 4096 bytes as text."""
        return self._tail.decode(errors="replace").strip()


def _status(status: int, time_limit: float | None) -> str:
    if status == -signal.SIGALRM and time_limit is not None:
        return f"stopped at its time limit of {time_limit:g} s"
    if status < 0:
        return f"its process was ended by signal {signal_name(-status)}"
    return f"its process ended with status {status}"
