"""The producer's side of its child process: requests to it, its commands to boards, and rows for it."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq.control.node import Call
from larpixdaq.errors import ConfigError, ProtocolError, cause
from larpixdaq.hardware.pacman_registers import TILES, read, values_in, write
from larpixdaq.protocol import hardware
from larpixdaq.readout.command_queue import CommandQueue
from larpixdaq.readout.configuration_tracker import ConfigurationTracker
from larpixdaq.runtime.child_process import ChildProcess, signal_name

#: Default time limit of a routine or action, in seconds.
TIME_LIMIT: Final = 3600.0
#: Maximum time limit of a request, in seconds, because the kernel's timers have a maximum.
_LONGEST: Final = 1e6
#: Maximum bytes that wait for a child that listens but does not read. Further rows are left out.
_MOST_UNSENT: Final = 32 << 20
#: Maximum lines of a routine's output in the log. Further lines are counted.
_LOGGED: Final = 100
#: Maximum bytes of a line of output in the log.
_LINE: Final = 500

_log: Final = logging.getLogger(__name__)


class _Running(NamedTuple):
    request: int
    name: str
    title: str  # for messages: "routine NAME", or the action's name
    time_limit: float  # seconds


class Child:
    """Runs routines and actions in a child process of the producer. No method blocks.

    The process is started at the first request, and again after it has died. `fileno()` polls readable when dispatch()
    has something to do. All methods belong to one thread, which must live as long as the child.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        commands: CommandQueue,
        setup: hardware.Setup,
        tracker: ConfigurationTracker,
        request_ended: Callable[[], None],
    ) -> None:
        """`folders`: directories with further routine files; load_routines() adds directories below them.

        `commands` leads to the boards that `setup` describes. `tracker` gets the rows for which the child listens.
        `request_ended` is called after the end of each routine and action.
        """
        self._roots = [folder.resolve() for folder in folders]
        self._folders = [str(folder) for folder in self._roots]
        self._commands = commands
        self._setup = setup
        self._tracker = tracker
        self._request_ended = request_ended
        self._left_out = 0
        #: Rows for which the child listens: hardware.NO_ROWS, CONFIG_ANSWERS or ALL_ROWS.
        self.listening = hardware.NO_ROWS
        self._process = ChildProcess(Path(__file__).with_name("child.py"), capture=True)
        self._inbox = hardware.Inbox(requests=False)
        self._output = RoutineOutput()
        self._calls: dict[int, Call] = {}
        self._request = 0
        self._running: _Running | None = None
        self._routines: list[dict[str, Any]] | None = None
        #: Result of the last load_pixel_layout that succeeded, and `loaded`, its time (unix s).
        self.pixel_layout: dict[str, Any] | None = None
        #: The last report on the supplies of each board, by io_group: texts for the run's file.
        self.power_reports: dict[int, str] = {}
        self._new_power: set[int] = set()
        self._ramps: dict[int, hardware.Ramp] = {}  # by io_group, while the supplies of a tile rise

    def fileno(self) -> int:
        return self._process.fileno()

    @property
    def running(self) -> str | None:
        """The name of the running routine or action."""
        return self._running.name if self._running is not None else None

    def new_power_reports(self) -> list[str]:
        """Return the reports on supplies that have come since the last call."""
        new = [self.power_reports[io_group] for io_group in sorted(self._new_power)]
        self._new_power.clear()
        return new

    def list_routines(self, call: Call) -> None:
        """List routines: [{"name", "params", "help", "error"}], `params` [{"name", "type", "required", "default"}].

        A file that could not be loaded is in the list with its error, which is "" for routines. While a routine or
        action runs, the result is the last list.
        """
        if self._running is not None and self._routines is not None:
            call.result(self._routines, f"as before {self._running.title}, which is running")
            return
        self._send(call, hardware.ListRoutines(self._next_request(), self._folders))

    def load_routines(self, call: Call, directory: str) -> None:
        """Add a directory of routine files, absolute or relative to one of `folders`. Result: as list_routines().

        Fails if the directory is not below one of `folders`, because its files will be executed.
        """
        if not isinstance(directory, str) or not directory.isprintable():
            call.fail(f"load_routines: expected the name of a directory, found {directory!r:.100}")
            return
        allowed = ", ".join(map(str, self._roots)) or "none"
        try:
            paths = [path for root in self._roots if (path := (root / directory).resolve()).is_relative_to(root)]
            folder = next((path for path in paths if path.is_dir()), None)
        except OSError as error:  # the name is too long
            call.fail(f"load_routines: {directory!r:.100}: {cause(error)}")
            return
        if folder is not None:
            if str(folder) not in self._folders:
                self._folders.append(str(folder))
            self.list_routines(call)
        elif paths:
            call.fail(f"load_routines: {paths[0]}: no such directory")
        else:
            call.fail(f"load_routines: {directory:.500}: not below a directory of --routines: {allowed}")

    def run_routine(
        self,
        call: Call,
        name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        time_limit: float | None = None,
    ) -> None:
        """Run a routine. The call gets its progress and its result. Refused (code "state") while another one runs."""
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
            running = self._running = _Running(self._next_request(), name, f"routine {name}", float(limit))
            request = hardware.RunRoutine(running.request, self._folders, name, list(args), by_name, running.time_limit)
            if self._send(call, request):
                call.ack(running.title)

    def abort_routine(self, call: Call) -> None:
        """Kill the child with the running routine or action, whose call fails. Result: its name.

        Refused (code "state") if none runs.
        """
        running = self._running
        if running is None:
            call.fail("no routine is running", code="state")
        else:
            self.end("aborted by the operator")
            call.result(running.name, f"{running.title} is aborted")

    def act(self, call: Call, action: str, params: dict[str, Any]) -> None:
        """Carry out an action on chips or boards (hardware/actions.py), like a routine in run_routine()."""
        if self._refuse(call):
            return
        self._running = _Running(self._next_request(), action, action, TIME_LIMIT)
        if self._send(call, hardware.Action(self._running.request, action, params, TIME_LIMIT)):
            call.ack(action)

    def take_rows(self, rows: NDArray[Any]) -> None:
        """Send the decoded rows for which the child listens. Call it only while `listening` is not 0."""
        if self.listening == hardware.CONFIG_ANSWERS:
            rows = hardware.config_answers(rows)
        self._tracker.record_answers(rows)
        if self._process.unsent > _MOST_UNSENT:
            # Answers are sent up to twice the limit, because they mark begin and end of measurements and are few.
            answers = hardware.config_answers(rows) if self._process.unsent <= 2 * _MOST_UNSENT else rows[:0]
            self._left_out += len(rows) - len(answers)
            rows = answers
        if not len(rows):
            return
        self._write(hardware.ListenedRows(rows.tobytes(), self._left_out))
        self._left_out = 0

    def dispatch(self) -> None:
        """Handle output and messages of the child, at most PIECE bytes of each, so that the loop is not held up."""
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
                self._handle(message)
                if not self._process.alive:  # the message has ended the child: drop the rest
                    return
        except ProtocolError as error:
            self.end(str(error))

    def end(self, reason: str) -> None:
        """Kill the child. The call of a running routine fails with the reason ("": the child has ended by itself)."""
        self._output.take(self._process.read_output())
        status = self._process.end()
        if status is not None:
            self._fail_calls(status, reason)

    def close(self) -> None:
        """Kill the child. fileno() is no longer valid."""
        self.end("the producer is closing")
        self._process.close()

    def _refuse(self, call: Call) -> bool:
        if self._running is None:
            return False
        call.fail(f"{self._running.title} is running, and only one can", code="state")
        return True

    def _write(self, message: hardware.FromParent) -> None:
        self._process.write(hardware.pack(message))

    def _answer_command(self, number: int, body: bytes, error: str) -> None:
        self._write(hardware.CommandDone(number, body, error))

    def _next_request(self) -> int:
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
        tracked = self._tracker.configurations()
        setup = msgspec.structs.replace(self._setup, read=tracked.read.tobytes(), known=tracked.known.tobytes())
        data = hardware.pack(setup)  # before the start, because a child takes its first message for the setup
        try:
            self._process.start()
        except OSError as error:
            raise ConfigError(f"the process for routines cannot be started: {error}") from None
        self._inbox = hardware.Inbox(requests=False)
        self._output = RoutineOutput()
        self._process.write(data)

    def _handle(self, message: hardware.FromChild) -> None:
        if isinstance(message, hardware.Listen):
            self.listening = message.what
        elif isinstance(message, hardware.Remember):
            self._keep_state(message)
        elif isinstance(message, hardware.Invalidate):
            self._tracker.invalidate(message.io_groups)
        elif isinstance(message, hardware.PowerReport):
            self.power_reports[message.io_group] = message.text
            self._new_power.add(message.io_group)
        elif isinstance(message, hardware.Ramp):
            self._ramps.pop(message.io_group, None)
            if message.tile >= 0:
                self._ramps[message.io_group] = message
        elif isinstance(message, hardware.SendWords):
            done = partial(self._answer_command, message.command)
            self._commands.send_words(message.io_group, message.io_channels, message.words, done)
        elif isinstance(message, hardware.BoardOrder):
            self._commands.send_order(
                message.io_group, message.body, partial(self._answer_command, message.command), message.seconds
            )
        else:
            self._answer(message)

    def _keep_state(self, state: hardware.Remember) -> None:
        if len(state.chips) % 3:
            raise ProtocolError(f"Remember: expected chips of 3 bytes, found {len(state.chips)} bytes")
        self._setup = msgspec.structs.replace(self._setup, **msgspec.structs.asdict(state))
        self._tracker.set_chips(np.frombuffer(state.chips, np.uint8).reshape(-1, 3))

    def _answer(self, answer: hardware.Answer) -> None:
        call = self._calls.get(answer.request)
        if call is None:
            return
        if isinstance(answer, hardware.Progress):
            call.progress(answer.done, answer.total, answer.text, answer.value)
            return
        call = self._end_call(answer.request)
        if isinstance(answer, hardware.RoutineList):
            broken = [routine.error for routine in answer.routines if routine.error]
            for line in broken:
                _log.warning("routine file not loaded: %s", line)
            self._routines = msgspec.to_builtins(answer.routines)
            call.result(self._routines, f"not loaded: {'; '.join(broken)}" if broken else "")
        elif isinstance(answer, hardware.Result):
            if call.action == "load_pixel_layout":
                self.pixel_layout = {**answer.value, "loaded": time.time()}
            call.result(answer.value, answer.text)
        else:
            text = answer.text
            if answer.traceback:
                text += f"\n{answer.traceback.rstrip()}"
                _log.error(text)
            call.fail(text, code=answer.code)

    def _end_call(self, request: int) -> Call:
        if self._running is not None and self._running.request == request:
            self._output.end(self._running.title)
            self._running = None
            self._request_ended()
        return self._calls.pop(request)

    def _fail_calls(self, status: int, reason: str) -> None:
        """Fail the calls that wait for the dead child."""
        running = self._running
        self._output.end(running.title if running is not None else "the process for routines")
        self.listening = hardware.NO_ROWS
        self._left_out = 0
        self._commands.clear()
        ramps, self._ramps = self._ramps, {}
        for ramp in ramps.values():
            self._switch_off(ramp)
        detail = reason or _status(status, running.time_limit if running is not None else None)
        if not reason:
            _log.error("process for routines: %s; the end of its output: %s", detail, self._output.tail() or "none")
        for request in list(self._calls):
            what = running.title if running is not None and running.request == request else "list of routines"
            off = "".join(f"; tile {r.tile} of io_group {r.io_group} is being switched off" for r in ramps.values())
            self._end_call(request).fail(f"{what}: {detail}{off}")

    def _switch_off(self, ramp: hardware.Ramp) -> None:
        """Switch off a tile whose ramp the child has not ended, and set its DACs to 0."""
        tile = f"io_group {ramp.io_group}: tile {ramp.tile}, whose supplies were being ramped up"

        def have_read(body: bytes, error: str) -> None:
            if error:
                _log.error("%s, cannot be switched off: %s", tile, error)
                return
            (enabled,) = values_in(body)
            off = write(TILES, enabled & ~(1 << ramp.tile))
            orders = b"".join((off, *(write(address, 0) for address in ramp.dacs)))
            self._commands.send_order(ramp.io_group, orders, have_written)

        def have_written(body: bytes, error: str) -> None:
            if error:
                _log.error("%s, may still be on: %s", tile, error)
            else:
                _log.warning("%s, was switched off, because its request has ended", tile)

        self._tracker.invalidate([ramp.io_group])
        self._commands.send_order(ramp.io_group, read(TILES), have_read)


class RoutineOutput:
    """Output of one child. The first lines go into the log, and the last lines are kept in case the child dies."""

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
        """Log the last line and the number of lines left out, at the end of the routine or process `name`."""
        if self._rest:
            _log.info("routine says: %s", self._rest.decode(errors="replace"))
        if self._lines > _LOGGED:
            _log.info("%s: %d further lines of output left out", name, self._lines - _LOGGED)
        self._rest, self._lines = b"", 0

    def tail(self) -> str:
        """Return the last 4096 bytes as text."""
        return self._tail.decode(errors="replace").strip()


def _status(status: int, time_limit: float | None) -> str:
    if status == -signal.SIGALRM and time_limit is not None:
        return f"stopped at its time limit of {time_limit:g} s"
    if status < 0:
        return f"its process was ended by signal {signal_name(-status)}"
    return f"its process ended with status {status}"
