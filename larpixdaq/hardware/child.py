"""The program of the child process, which `supervisor.Child` starts with the number of its socket.

It is started by its path, so that neither the working directory nor this folder can hide a module of a library.
"""

from __future__ import annotations

import os
import sys

if __spec__ is None:
    # At the end of the path, so that an installed package is preferred.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    del sys.path[0]

import inspect
import io
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from larpixdaq.errors import LarpixDaqError, ProtocolError, RequestError
from larpixdaq.hardware.producer_link import ProducerPipe
from larpixdaq.hardware.routine_arguments import check_arguments, parameters, usage
from larpixdaq.protocol import hardware
from larpixdaq.routines import load
from larpixdaq.routines._former_names import advice
from larpixdaq.runtime.child_process import PIECE, parent_socket

if TYPE_CHECKING:
    from larpixdaq.hardware.chip_state import ChipState

#: Maximum progress messages at once, and per second after that. Further messages are left out and counted.
_BURST: Final = 100
_PER_SECOND: Final = 20.0


class RequestWorker:
    """Carries out one request after the other and keeps the state of the chips."""

    def __init__(self, link: ProducerPipe) -> None:
        self._link = link
        self._chips: ChipState | None = None
        self._saved = hardware.Remember("", b"", b"", b"")  # the last state sent

    def handle(self, request: hardware.Request) -> None:
        if isinstance(request, hardware.ListRoutines):
            routines, broken = load(map(Path, request.folders))
            described = [
                hardware.RoutineInfo(name, parameters(routine), inspect.getdoc(routine.func) or "")
                for name, routine in sorted(routines.items())
            ]
            described += [
                hardware.RoutineInfo(Path(path).name, error=_escaped(f"{path}: {reason}"))
                for path, reason in broken.items()
            ]
            self._link.send(hardware.RoutineList(request.request, described))
        else:
            self._run(request)

    def _run(self, request: hardware.RunRoutine | hardware.Action) -> None:
        name = request.action if isinstance(request, hardware.Action) else f"routine {request.name}"
        reports = _Reports(self._link, request.request)
        # The kernel ends this process at the limit, even if C code of the routine holds the interpreter's lock.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request.time_limit)
        try:
            answer: hardware.Result | hardware.ActionFailed
            answer = (
                self._act(request, reports) if isinstance(request, hardware.Action) else self._call(request, reports)
            )
        except LarpixDaqError as error:
            code = error.code if isinstance(error, RequestError) else "failed"
            text = str(error)
            text = text if text.startswith(f"{name}: ") else f"{name}: {text}"
            answer = hardware.ActionFailed(request.request, _one_line(text), code=code)
        except BaseException as error:  # a routine can raise anything
            today = advice(error)
            stated = "".join(traceback.format_exception_only(error))  # with Python's guess at another name
            text = f"{name}: {type(error).__name__}: {error}{today}" if today else f"{name}: {stated}"
            trace = _escaped(traceback.format_exc(limit=-50))[-20_000:]
            answer = hardware.ActionFailed(request.request, _one_line(text), traceback=trace)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._link.forget()
        self._save_state()
        try:
            self._link.send(answer)
        except ProtocolError as error:
            self._link.send(hardware.ActionFailed(request.request, f"{name}: its result: {_one_line(str(error))}"))

    def _chip_state(self) -> ChipState:
        """Return the state of the chips. Made at the first call, because larpix-control takes a second to import."""
        if self._chips is None:
            from larpixdaq.hardware.chip_state import ChipState
            from larpixdaq.hardware.register_map import ChipRegisters

            chips = ChipState(ChipRegisters(self._link.setup.asic), self._link)
            try:
                chips.restore()
            except LarpixDaqError as error:  # the board file may be gone
                print(f"the known state of the chips is lost: {error}", flush=True)
            self._chips = chips
        return self._chips

    def _save_state(self) -> None:
        """Send the state for the next child to the producer, if it has changed."""
        if self._chips is not None and (state := self._chips.state()) != self._saved:
            self._saved = state
            self._link.send(state)

    def _act(self, request: hardware.Action, reports: _Reports) -> hardware.Result:
        from larpixdaq.hardware.act import act

        value = act(self._chip_state(), request.action, request.params, reports.send_info)
        return hardware.Result(request.request, value, reports.left_out())

    def _call(self, request: hardware.RunRoutine, reports: _Reports) -> hardware.Result | hardware.ActionFailed:
        routines, broken = load(map(Path, request.folders))
        routine = routines.get(request.name)
        if routine is None:
            text = f"no routine {request.name!r:.100}; there are {', '.join(sorted(routines)) or 'none'}"
            if broken:
                text += f" (not loaded: {'; '.join(f'{path}: {reason}' for path, reason in broken.items())})"
            return hardware.ActionFailed(request.request, _one_line(text), code="unknown")
        try:
            args, kwargs = check_arguments(routine, request.args, request.kwargs)
        except TypeError as error:
            text = f"routine {usage(routine)}: {error}"
            if "timeout" in request.kwargs:  # of version 0.2
                text += "; run_routine(..., time_limit=) ends the routine, .result(timeout=) ends the waiting"
            return hardware.ActionFailed(request.request, _one_line(text))
        chips = self._chip_state()
        controller = chips.controller()
        before = chips.triggers_on()
        try:
            answer = routine.func(controller, reports.send_data, reports.send_info, *args, **kwargs)
        except IndexError as error:
            if len(args) < len(routine.params or ()):
                error.args = (f"{error} (given {len(args)} of the arguments of {usage(routine)})",)
            raise
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], type(controller)):
            returned = type(answer).__name__
            if isinstance(answer, tuple):
                returned = f"({', '.join(type(item).__name__ for item in answer)})"
            text = f"routine {request.name}: expected (controller, result) from it, found {returned}"
            return hardware.ActionFailed(request.request, _one_line(text))
        controller, value = answer
        chips.take_over(controller)
        texts = [_left_on(chips.triggers_on() - before), reports.left_out()]
        return hardware.Result(request.request, value, "; ".join(filter(None, texts)))


class _Reports:
    """`send_info` and `send_data` of one request, limited to a rate that the producer can handle beside its data."""

    def __init__(self, link: ProducerPipe, request: int) -> None:
        self._link = link
        self._request = request
        self._allowed = float(_BURST)
        self._last = time.monotonic()
        self._dropped = 0

    def send_info(self, info: Any = "", done: int = 0, total: int = 0) -> None:
        """Report progress: a text, or a value made of numbers, texts, lists and dictionaries."""
        now = time.monotonic()
        self._allowed = min(_BURST, self._allowed + (now - self._last) * _PER_SECOND)
        self._last = now
        if self._allowed < 1:
            self._dropped += 1
            return
        self._allowed -= 1
        text, value = (info, None) if isinstance(info, str) else ("", info)
        self._link.send(hardware.Progress(self._request, max(0, int(done)), max(0, int(total)), text, value))

    def send_data(self, data: Any = b"", metadata: Any = None) -> None:
        """Report that data came. The packets themselves are in the recorded stream already."""
        size = f"{len(data)} bytes" if isinstance(data, bytes | bytearray) else type(data).__name__
        self.send_info(f"data ({size}): its packets are in the stream already")

    def left_out(self) -> str:
        return f"{self._dropped} progress reports were left out" if self._dropped else ""


def _left_on(triggers: set[tuple[str, str]]) -> str:
    """Return a text about the triggers that a routine has left on, "" without any."""
    from larpixdaq.hardware.chip_state import short_list

    texts = []
    for kind in sorted({kind for kind, _ in triggers}):
        keys = sorted(key for other, key in triggers if other == kind)
        texts.append(f"{kind} of {len(keys)} chips ({short_list(keys)})")
    return f"the routine has left on: {', '.join(texts)}" if texts else ""


def _one_line(text: str) -> str:
    return " ".join(_escaped(text).split())[:2000]


def _escaped(text: str) -> str:
    """Escape characters that UTF-8 cannot encode, such as those in file names."""
    return text.encode(errors="backslashreplace").decode()


def _messages(sock: socket.socket) -> Iterator[Any]:
    """Yield the producer's messages. At the end of the socket the producer is gone, and this process ends."""
    inbox = hardware.Inbox(requests=True)
    try:
        while data := sock.recv(PIECE):
            yield from inbox.take(data)
    except (OSError, ProtocolError) as error:
        print(f"child process: {error}", file=sys.stderr, flush=True)
    os._exit(0)


def _read_messages(messages: Iterator[Any], link: ProducerPipe, requests: queue.SimpleQueue[Any]) -> None:
    """Read the socket, in a thread of its own."""
    for message in messages:
        if isinstance(message, hardware.ListenedRows | hardware.CommandDone):
            link.put(message)
        else:
            requests.put(message)


def main() -> None:
    (fd,) = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    sock = parent_socket(fd)
    messages = _messages(sock)
    link = ProducerPipe(sock, next(messages))
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read_messages, args=(messages, link, requests), daemon=True).start()
    worker = RequestWorker(link)
    while True:
        worker.handle(requests.get())


if __name__ == "__main__":
    main()
