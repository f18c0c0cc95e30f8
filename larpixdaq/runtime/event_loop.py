"""The loop of a process: its wake-ups, its worker threads, and its end (exit status; SIGINT, SIGTERM, SIGHUP, SIGQUIT).

Threads only post results: the loop polls a descriptor, and takes the results over itself.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from larpixdaq.errors import LarpixDaqError, printable
from larpixdaq.runtime.timing import Throttle

if TYPE_CHECKING:
    import zmq

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
#: A closed terminal, and Ctrl-\\. They end a process as SIGTERM does, unless it was started to ignore them (nohup).
_TERMINAL_SIGNALS: Final = (signal.SIGHUP, signal.SIGQUIT)
#: After the first signal further ones are ignored for so long (s): a terminal's Ctrl-C reaches all of a process
#: group, and the one that started them tells them again. Closing must not be interrupted by that.
_GRACE: Final = 5.0
#: Bytes of log records that a process may write to stderr at once, and in a second after that.
_STDERR_BURST: Final = 256 << 10
_STDERR_RATE: Final = 4 << 10
#: When the first signal came (time.monotonic()), if one has.
_came: Final[list[float]] = []
log = logging.getLogger(__name__)
Job = tuple[Callable[[], Any], Callable[[Any], None]]


class Waker:
    """A descriptor that polls readable from wake() to clear(). Any thread may call wake()."""

    def __init__(self) -> None:
        # A pipe, because signal.set_wakeup_fd() writes single bytes, which an eventfd does not take.
        self._read, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Reentrant, because the garbage collector may call close() in the middle of wake().
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        """Make the descriptor readable; without effect after close()."""
        with self._lock, contextlib.suppress(BlockingIOError):  # full: it is readable already
            if self.write_end >= 0:
                os.write(self.write_end, b"\0")

    def clear(self) -> None:
        """Consume all wake-ups so far. Call it before the look at what they announce, so that none is missed."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._read, 4096)) == 4096:
                pass

    def close(self) -> None:
        with self._lock:
            os.close(self._read)
            os.close(self.write_end)
            self.write_end = -1  # so that a late wake() does not write into another file


def keep_polled(poller: zmq.Poller, known: dict[Any, tuple[Any, ...]], key: Any, wanted: tuple[Any, ...]) -> None:
    """Register exactly the sockets `wanted` for `key` in the poller; `known` maps each key to its registered ones."""
    had = known.get(key, ())
    if wanted != had:
        for socket in had:
            poller.unregister(socket)
        for socket in wanted:
            poller.register(socket, select.POLLIN)
        known[key] = wanted


def _first() -> bool:
    """Note that a signal has come; whether it is to be heeded."""
    now = time.monotonic()
    if _came and now - _came[0] <= _GRACE:
        return False
    _came[:] = [now]
    return True


class _Printable(logging.Formatter):
    """Records for a terminal; a traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class Stopped(KeyboardInterrupt):
    """One of the signals came; run_main() turns it into the exit status."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle the signals that end a process in this way; returns the handlers of before."""
    wanted = [one for one in _TERMINAL_SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in (*_SIGNALS, *wanted)}


class Signals:
    """Within this context signals do not interrupt; they set `stop` and make `fileno()` readable.

    For loops that must not be left in the middle of a turn::

        with Signals() as signals:
            while not signals.stop: poll([..., signals.fileno()])
    """

    def __init__(self) -> None:
        self.stop = False
        self._handlers: dict[int, Any] = {}  # those outside of this context
        self._wakeup = -1
        self._waker = Waker()

    def fileno(self) -> int:
        return self._waker.fileno()

    def _came(self, number: int, frame: FrameType | None) -> None:
        _first()
        self.stop = True

    def __enter__(self) -> Signals:
        # The C-level handler writes a byte at once: a signal between the test of `stop` and the poll is not slept over.
        self._wakeup = signal.set_wakeup_fd(self._waker.write_end, warn_on_full_buffer=False)
        self._handlers = catch(self._came)
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
    """Standard output whose errors are distinct from those of files. After an error it accepts and drops everything,
    so that the interpreter's last flush does not complain again."""

    _failed = False

    def write(self, data: Any) -> int:
        if self._failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            raise _OutputError(error) from None


def _watch_output() -> None:
    """Have errors of standard output raised as _OutputError, and bytes of paths that are no text shown as \\xff."""
    before = sys.__stdout__
    if before is None:  # closed by the parent
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stdout is before:  # else a test has replaced it
        raw = io.BufferedWriter(_Output(before.fileno(), "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, before.encoding, "backslashreplace", line_buffering=before.isatty())


def is_text(argument: str) -> bool:
    """Whether an argument or path can be sent to others: bytes that are not UTF-8 are surrogates in Python."""
    return not any("\ud800" <= letter <= "\udfff" for letter in argument)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # has no parameter before Python 3.11
    """Log records on stderr, which may be a file: of a flood only a part is written, and the rest counted."""

    def __init__(self) -> None:
        super().__init__()
        self._throttle = Throttle(_STDERR_RATE, _STDERR_BURST)

    def emit(self, record: logging.LogRecord) -> None:
        if self._throttle.passes("", len(self.format(record))):
            self.tell()
            super().emit(record)

    def tell(self) -> None:
        """Say how many records were not written."""
        for text in self._throttle.told():
            print(f"{_program()}: WARNING: {text}", file=self.stream)


def _program() -> str:
    return os.path.basename(sys.argv[0]) or "larpixdaq"


def run_main(function: Callable[[], int | None], *, endless: bool = True) -> int:
    """Run a program's main part and return its exit status.

    A signal raises Stopped, a KeyboardInterrupt, where it runs, so that its `finally` clauses close everything; see
    Signals for the quieter way. It is the proper end of an endless program: 0. A command that is interrupted has not
    done its work: 128 + the signal's number, with one line on stderr. 1, with one line on stderr, when it raises a
    LarpixDaqError or its output cannot be written. Log records of level warning and above go to stderr too; on a
    terminal also those that tell a person that all is well.
    """
    program = _program()
    if endless and (wrong := [argument for argument in sys.argv[1:] if not is_text(argument)]):
        print(f"{program}: argument {wrong[0]!r}: expected UTF-8, since other processes read it", file=sys.stderr)
        return 2
    _came.clear()

    def stop(number: int, frame: FrameType | None) -> None:
        if _first():
            raise Stopped(number)

    _watch_output()
    before = catch(stop)
    stderr = _Stderr()
    stderr.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    stderr.setFormatter(_Printable(f"{program}: %(levelname)s: %(message)s"))
    logger = logging.getLogger("larpixdaq")
    logger.addHandler(stderr)
    try:
        status = function() or 0
        sys.stdout.flush()  # here, so that output which cannot be written is an error of ours
        return status
    except KeyboardInterrupt as error:
        if endless:
            return 0
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        print(f"{program}: interrupted by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except LarpixDaqError as error:
        print(printable(f"{program}: {error}"), file=sys.stderr)
        return 1
    except _OutputError as error:
        if error.number != errno.EPIPE:  # else the reader of our output has gone: `larpixdaq status | head`
            print(f"{program}: {error}", file=sys.stderr)
        return 1
    finally:
        logger.removeHandler(stderr)
        stderr.tell()
        for number, handler in before.items():
            signal.signal(number, handler)


class Worker:
    """A thread that does jobs in order; turn() hands over their results in the loop that submitted them."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._waker = Waker()
        self._pending = 0  # jobs whose results were not handed over yet
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Call `do` in the thread; turn() calls `then` with its result, or with the OSError that it raised."""
        self._pending += 1
        self._jobs.put((do, then))

    def fileno(self) -> int:
        """Polls readable while turn() has something to do."""
        return self._waker.fileno()

    def turn(self) -> None:
        """Hand over the results that are there."""
        self._waker.clear()
        while self._results:
            then, result = self._results.popleft()
            self._pending -= 1
            then(result)

    def settle(self, limit: float) -> bool:
        """Wait at most `limit` seconds until the results of all jobs are handed over; whether they are."""
        deadline = time.monotonic() + limit
        while self._pending and (left := deadline - time.monotonic()) > 0:
            select.select([self._waker], [], [], left)
            self.turn()
        return not self._pending

    def close(self, limit: float) -> bool:
        """Finish the jobs in at most `limit` seconds; False when the thread hangs, which then ends with the process."""
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
            except Exception as error:  # a mistake of ours: the loop must not wait for its result for ever
                log.exception("%s", self._thread.name)
                result = OSError(str(error))
            self._results.append((then, result))
            self._waker.wake()
