"""How a process ends: its exit status, and what SIGINT and SIGTERM do."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from larpixdaq.errors import LarpixDaqError

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
#: After the first signal further ones are ignored for so long (s): a terminal's Ctrl-C reaches all of a process
#: group, and the one that started them tells them again. Closing must not be interrupted by that.
_GRACE: Final = 5.0


#: When the first signal came (time.monotonic()), if one has.
_came: Final[list[float]] = []


def _first() -> bool:
    """Note that a signal has come; whether it is to be heeded."""
    now = time.monotonic()
    if _came and now - _came[0] <= _GRACE:
        return False
    _came[:] = [now]
    return True


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; run_main() turns it into exit status 0."""


class Signals:
    """Within this context signals do not interrupt; they set `stop` and make `fileno()` readable.

    For loops that must not be left in the middle of a turn::

        with Signals() as signals:
            while not signals.stop: poll([..., signals.fileno()])
    """

    def __init__(self) -> None:
        self.stop = False
        self._before: dict[int, Any] = {}
        self._wakeup = -1
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def _came(self, number: int, frame: FrameType | None) -> None:
        _first()
        self.stop = True

    def __enter__(self) -> Signals:
        # The C-level handler writes a byte at once: a signal between the test of `stop` and the poll is not slept over.
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)


def run_main(function: Callable[[], int | None]) -> int:
    """Run a program's main part and return its exit status.

    0 when it is done or SIGINT or SIGTERM ended it (they raise Stopped, a KeyboardInterrupt, where it runs, so that its
    `finally` clauses close everything; see Signals for the quieter way), 1 with one line on stderr when it raises a
    LarpixDaqError. Log records of level warning and above go to stderr too; on a terminal also those that tell a
    person that all is well.
    """
    program = os.path.basename(sys.argv[0]) or "larpixdaq"
    _came.clear()

    def stop(number: int, frame: FrameType | None) -> None:
        if _first():
            raise Stopped

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    stderr = logging.StreamHandler()
    stderr.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    stderr.setFormatter(logging.Formatter(f"{program}: %(levelname)s: %(message)s"))
    logger = logging.getLogger("larpixdaq")
    logger.addHandler(stderr)
    try:
        return function() or 0
    except KeyboardInterrupt:
        return 0
    except LarpixDaqError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has gone (`larpixdaq status | head`): the interpreter's last flush must not complain.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        logger.removeHandler(stderr)
        for number, handler in before.items():
            signal.signal(number, handler)
