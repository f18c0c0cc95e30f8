"""Event loop of a process: wake-ups, worker threads, signals (SIGINT, SIGTERM, SIGHUP, SIGQUIT) and exit status.

Threads only post results and wake the loop, which handles the results.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import queue
import resource
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from larpixdaq.errors import LarpixDaqError, UsageError, is_text, printable
from larpixdaq.runtime.timing import Throttle

if TYPE_CHECKING:
    import zmq

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
#: Signals of a closed terminal and of Ctrl-\\. They end a process as SIGTERM does, unless it was started with them
#: ignored (nohup).
_TERMINAL_SIGNALS: Final = (signal.SIGHUP, signal.SIGQUIT)
#: Seconds after the first signal in which further signals are ignored, so that they do not interrupt closing. Ctrl-C
#: reaches the whole process group, and the parent then sends SIGTERM too.
_GRACE: Final = 5.0
#: Maximum bytes of log records on stderr at once, and per second after that.
_STDERR_BURST: Final = 256 << 10
_STDERR_RATE: Final = 4 << 10
#: time.monotonic() of the first signal; empty before it.
_first_signal: Final[list[float]] = []
log = logging.getLogger(__name__)
Job = tuple[Callable[[], Any], Callable[[Any], None]]


class Waker:
    """Descriptor that polls readable from wake() to clear(). Any thread may call wake()."""

    def __init__(self) -> None:
        # a pipe, because signal.set_wakeup_fd() writes single bytes, which an eventfd does not accept
        self._read, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # reentrant, because the garbage collector may call close() during wake()
        self._lock = threading.RLock()
        self._woken = False

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        """Make the descriptor readable. Has no effect after close()."""
        # Before the write, during which the other thread goes on with clear(), and after it, because clear() may have
        # found nothing to discard yet.
        self._woken = True
        with self._lock, contextlib.suppress(BlockingIOError):  # full: it is readable already
            if self.write_end >= 0:
                os.write(self.write_end, b"\0")
        self._woken = True

    def clear(self) -> None:
        """Discard all wake-ups so far. Call it before reading the posted results, so that no wake-up is missed."""
        if self._woken:  # because a read() of an empty pipe lets other threads take the interpreter
            self._woken = False
            self.drain()

    def drain(self) -> None:
        """Discard also what others have written to `write_end`."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._read, 4096)) == 4096:
                pass

    def close(self) -> None:
        with self._lock:
            os.close(self._read)
            os.close(self.write_end)
            self.write_end = -1  # so that a late wake() does not write into another file


def keep_polled(poller: zmq.Poller, known: dict[Any, tuple[Any, ...]], key: Any, wanted: tuple[Any, ...]) -> None:
    """Register exactly the sockets `wanted` for `key` in the poller. `known` has the registered sockets by key."""
    registered = known.get(key, ())
    if wanted != registered:
        for socket in registered:
            poller.unregister(socket)
        for socket in wanted:
            poller.register(socket, select.POLLIN)
        known[key] = wanted


def _accept_signal() -> bool:
    """Return whether a signal that has just arrived counts, or is ignored because of an earlier signal."""
    now = time.monotonic()
    if _first_signal and now - _first_signal[0] <= _GRACE:
        return False
    _first_signal[:] = [now]
    return True


class _Printable(logging.Formatter):
    """Formats log records for a terminal without control characters. A traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class Stopped(KeyboardInterrupt):
    """A signal ends the process. run_main() turns it into the exit status."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number


def _catch_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set the handler of all signals that end a process. Returns the previous handlers."""
    terminal = [number for number in _TERMINAL_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in (*_SIGNALS, *terminal)}


class Signals:
    """Context in which signals do not interrupt: they set `stop` and make `fileno()` readable.

    It is for loops that must not end in the middle of a turn::

        with Signals() as signals:
            while not signals.stop: poll([..., signals.fileno()])
    """

    def __init__(self, reload: int | None = None) -> None:
        """`reload`: a signal that does not end the process, but makes `take_reload()` return True."""
        self.stop = False
        self._reload, self._reloads = reload, False
        #: time.monotonic() and number of each signal so far.
        self.received: list[tuple[float, int]] = []
        self._handlers: dict[int, Any] = {}  # of the signals outside of this context
        self._wakeup = -1
        self._waker = Waker()

    def fileno(self) -> int:
        return self._waker.fileno()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        _accept_signal()
        self.received.append((time.monotonic(), number))
        self.stop = True

    def _handle_reload(self, number: int, frame: FrameType | None) -> None:
        self._reloads = True

    def take_reload(self) -> bool:
        """Return whether the reload signal has come since the last call."""
        if not self.stop:
            self._waker.drain()
        came, self._reloads = self._reloads, False
        return came

    def __enter__(self) -> Signals:
        # Python's C handler writes a byte at once, so that a signal between the test of `stop` and the poll wakes it
        self._wakeup = signal.set_wakeup_fd(self._waker.write_end, warn_on_full_buffer=False)
        self._handlers = _catch_signals(self._handle)
        if self._reload is not None:
            self._handlers[self._reload] = signal.signal(self._reload, self._handle_reload)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._waker.close()


class _OutputError(Exception):
    """Standard output cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.number = error.errno


class _Output(io.FileIO):
    """Standard output that raises _OutputError, which is distinct from errors of files.

    After an error it discards everything, so that the interpreter's last flush does not fail again.
    """

    _failed = False

    def write(self, data: Any) -> int:
        if self._failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            raise _OutputError(error) from None


def _wrap_output() -> None:
    """Replace sys.stdout, so that its errors raise _OutputError and bytes that are not UTF-8 print as \\xff."""
    original = sys.__stdout__
    if original is None:  # closed by the parent
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stdout is original:  # else a test has replaced it
        raw = io.BufferedWriter(_Output(original.fileno(), "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, original.encoding, "backslashreplace", line_buffering=original.isatty())


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # has no parameter before Python 3.11
    """Writes log records to stderr, which may be a file. Records above the limits are only counted."""

    def __init__(self) -> None:
        super().__init__()
        self._throttle = Throttle(_STDERR_RATE, _STDERR_BURST)

    def emit(self, record: logging.LogRecord) -> None:
        if self._throttle.passes("", len(self.format(record))):
            self.report_dropped()
            super().emit(record)

    def report_dropped(self) -> None:
        """Write how many records were not written."""
        for text in self._throttle.summaries():
            print(f"{_program()}: WARNING: {text}", file=self.stream)


def _program() -> str:
    return os.path.basename(sys.argv[0]) or "larpixdaq"


def _raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as the system permits, because each connection from outside takes one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_main(function: Callable[[], int | None], *, endless: bool = True, log_level: str | None = None) -> int:
    """Run a program's main part and return its exit status.

    A signal raises Stopped, a KeyboardInterrupt, in `function`, so that its `finally` clauses close everything; a
    function that uses Signals ends its loop instead. After a signal the status of an endless program is 0. A command
    that was interrupted has not done its work: its status is 128 + the signal's number, with one line on stderr. After
    a LarpixDaqError (UsageError: 2), or when the output cannot be written, the status is 1, with one line on stderr.

    Log records from level WARNING on go to stderr; on a terminal all that are written. `log_level`: from which on this
    process writes them; None: as it is set.
    """
    program = _program()
    if endless and (wrong := [argument for argument in sys.argv[1:] if not is_text(argument)]):
        print(f"{program}: argument {wrong[0]!r}: expected UTF-8, since other processes read it", file=sys.stderr)
        return 2
    _first_signal.clear()
    _raise_descriptor_limit()

    def stop(number: int, frame: FrameType | None) -> None:
        if _accept_signal():
            raise Stopped(number)

    _wrap_output()
    handlers = _catch_signals(stop)
    stderr = _Stderr()
    stderr.setLevel(logging.NOTSET if sys.stderr.isatty() else logging.WARNING)
    stderr.setFormatter(_Printable(f"{program}: %(levelname)s: %(message)s"))
    logger = logging.getLogger("larpixdaq")
    if log_level is not None:
        logger.setLevel(log_level)
    logger.addHandler(stderr)
    try:
        status = function() or 0
        sys.stdout.flush()  # here, so that a failure becomes the exit status
        return status
    except KeyboardInterrupt as error:
        if endless:
            return 0
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        print(f"{program}: interrupted by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except LarpixDaqError as error:
        print(printable(f"{program}: {error}"), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except _OutputError as error:
        if error.number != errno.EPIPE:  # else the reader has closed the pipe: `larpixdaq status | head`
            print(f"{program}: {error}", file=sys.stderr)
        return 1
    finally:
        logger.removeHandler(stderr)
        stderr.report_dropped()
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Worker:
    """Thread that does jobs in order. turn() passes their results to callbacks in the loop that submitted them."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._waker = Waker()
        self._pending = 0  # jobs whose callbacks were not called yet
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Call `do` in the thread. turn() then calls `then` with the result, or with the OSError that `do` raised."""
        self._pending += 1
        self._jobs.put((do, then))

    def fileno(self) -> int:
        """Descriptor that polls readable while turn() has results to pass on."""
        return self._waker.fileno()

    def turn(self) -> None:
        """Pass the results so far to their callbacks."""
        self._waker.clear()
        while self._results:
            then, result = self._results.popleft()
            self._pending -= 1
            then(result)

    def drain(self, limit: float) -> bool:
        """Wait at most `limit` seconds for the callbacks of all jobs. Returns whether all were called."""
        deadline = time.monotonic() + limit
        while self._pending and (left := deadline - time.monotonic()) > 0:
            select.select([self._waker], [], [], left)
            self.turn()
        return not self._pending

    def close(self, limit: float) -> bool:
        """Finish the jobs in at most `limit` seconds. Returns False if the thread hangs; it ends with the process."""
        if not self._thread.is_alive():
            return True
        self._jobs.put(None)
        self._thread.join(limit)
        if self._thread.is_alive():
            return False
        self.turn()
        self._waker.close()
        return True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            do, then = job
            result: Any
            try:
                result = do()
            except OSError as error:
                result = error
            except Exception as error:  # a fault of this program; the loop still gets a result
                log.exception("%s", self._thread.name)
                result = OSError(str(error))
            self._results.append((then, result))
            self._waker.wake()
