"""The child process itself: started by `process.Child` with the descriptor of its socket, it ends with its parent.

It is run by path, so that neither the working directory nor this folder can hide a module of the library.
"""

import os
import sys

if __spec__ is None:
    # The last place, so that only a package that is not installed is found by it.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    del sys.path[0]

import ctypes
import inspect
import io
import queue
import signal
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Final

from larpixdaq.chips import talk
from larpixdaq.chips.arguments import checked, parameters, usage
from larpixdaq.errors import ProtocolError
from larpixdaq.routines import Routine, load

_PR_SET_PDEATHSIG: Final = 1
#: Progress messages that may go at once, and how many a second after that: the rest is left out, and counted.
_BURST: Final = 100
_PER_SECOND: Final = 20.0


class Worker:
    """Carries out one request after the other; the Controller lives from one routine to the next."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._controller: Any = None

    def handle(self, request: talk.Request) -> None:
        if isinstance(request, talk.ListRoutines):
            routines, broken = load(map(Path, request.folders))
            self.send(talk.Known(request.request, [_describe(*item) for item in sorted(routines.items())], broken))
        else:
            self._run(request)

    def send(self, answer: talk.Answer) -> None:
        data = talk.pack(answer)
        with self._lock:
            self._sock.sendall(data)

    def _run(self, request: talk.RunRoutine) -> None:
        reports = _Reports(self, request.request)
        # The kernel ends this process at the limit, whatever the routine is doing and whoever holds the interpreter's
        # lock.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request.time_limit)
        try:
            answer = self._call(request, reports)
        except (KeyboardInterrupt, SystemExit, Exception) as error:
            text = f"routine {request.name}: {type(error).__name__}: {error}".strip()
            answer = talk.Failed(request.request, _line(text), traceback=traceback.format_exc(limit=-50)[-20_000:])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            self.send(answer)
        except ProtocolError as error:
            self.send(talk.Failed(request.request, f"routine {request.name}: its result: {_line(str(error))}"))

    def _call(self, request: talk.RunRoutine, reports: "_Reports") -> talk.Result | talk.Failed:
        routines, broken = load(map(Path, request.folders))
        routine = routines.get(request.name)
        if routine is None:
            text = f"no routine {request.name!r}; there are {', '.join(sorted(routines)) or 'none'}"
            if broken:
                text += f" (not loaded: {'; '.join(broken)})"
            return talk.Failed(request.request, _line(text), code="unknown")
        try:
            args, kwargs = checked(routine, request.args, request.kwargs)
        except TypeError as error:
            return talk.Failed(request.request, _line(f"routine {usage(routine)}: {error}"))
        if self._controller is None:
            from larpix import Controller  # here, because it takes a second

            self._controller = Controller()
        try:
            answer = routine.func(self._controller, reports.send_data, reports.send_info, *args, **kwargs)
        except IndexError as error:
            if len(args) < len(routine.params or ()):
                error.args = (f"{error} (given {len(args)} of the arguments of {usage(routine)})",)
            raise
        if not isinstance(answer, tuple) or len(answer) != 2:
            text = f"routine {request.name}: expected (controller, result) from it, found {type(answer).__name__}"
            return talk.Failed(request.request, text)
        self._controller, value = answer
        return talk.Result(request.request, value, reports.left_out())


class _Reports:
    """`send_info` and `send_data` of one run of a routine, held to a rate that the producer bears beside its data."""

    def __init__(self, worker: Worker, request: int) -> None:
        self._worker = worker
        self._request = request
        self._allowed = float(_BURST)
        self._last = time.monotonic()
        self._dropped = 0

    def send_info(self, info: Any = "", done: int = 0, total: int = 0) -> None:
        """Report progress: a text, or a value of numbers, texts, lists and dictionaries."""
        now = time.monotonic()
        self._allowed = min(_BURST, self._allowed + (now - self._last) * _PER_SECOND)
        self._last = now
        if self._allowed < 1:
            self._dropped += 1
            return
        self._allowed -= 1
        text, value = (info, None) if isinstance(info, str) else ("", info)
        self._worker.send(talk.Progress(self._request, int(done), int(total), text, value))

    def send_data(self, data: Any = b"", metadata: Any = None) -> None:
        """Report that there were data: the packets are in the recorded stream already."""
        size = f"{len(data)} bytes" if isinstance(data, bytes | bytearray) else type(data).__name__
        self.send_info(f"data ({size}): its packets are in the stream already")

    def left_out(self) -> str:
        return f"{self._dropped} progress reports were left out" if self._dropped else ""


def _describe(name: str, routine: Routine) -> talk.RoutineInfo:
    return talk.RoutineInfo(name, parameters(routine), inspect.getdoc(routine.func) or "")


def _line(text: str) -> str:
    return " ".join(text.split())[:2000]


def _listen(sock: socket.socket, requests: "queue.SimpleQueue[Any]") -> None:
    """The socket's thread. Its end means that the producer is gone: nobody waits for anything then."""
    inbox = talk.Inbox(requests=True)
    try:
        while data := sock.recv(1 << 16):
            for request in inbox.take(data):
                requests.put(request)
    except (OSError, ProtocolError) as error:
        print(f"child process: {error}", file=sys.stderr, flush=True)
    os._exit(0)


def main() -> None:
    (fd,) = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    sock = socket.socket(fileno=int(fd))
    sock.set_inheritable(False)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sock, requests), daemon=True).start()
    worker = Worker(sock)
    while True:
        worker.handle(requests.get())


if __name__ == "__main__":
    main()
