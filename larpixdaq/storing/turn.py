"""Who may write: one process for each name and directory, and none that has stood still and was not told to go on.

A process that was stopped for a while may have been taken for dead, and another of its name started.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from larpixdaq.errors import FileError
from larpixdaq.files import names

_log = logging.getLogger(__name__)

#: More than this between two turns of the loop, in seconds, and we may have been taken for dead: the core says `lost`
#: after 1 s without a heartbeat.
STOOD_STILL: Final = 0.8
#: A core that is unheard for so long (seconds) is not there, and nobody can register with it in our name.
NO_CORE: Final = 2.0
#: Whoever waits for his turn looks so often (seconds).
_LOOK: Final = 0.25


class Lock:
    """The right to write files of one storage in a directory, for as long as this process lives or until release().

    It is a lock (flock) on a hidden file, which goes with a clean end. A journal has a lock of its own, which says that
    somebody works on that very part (`larpixdaq recover`, say): then it is not our turn either.
    """

    def __init__(self, directory: Path, storage: str) -> None:
        self._directory, self._storage = directory, storage
        self.path = directory / names.lock(storage)
        self._fd = -1

    def take(self) -> Path | None:
        """Take it; or the file that is locked by somebody else. FileError when files cannot be locked here."""
        if self._fd < 0:
            try:
                self._fd = self._open()
            except OSError as error:
                raise FileError(f"cannot lock {self.path}: {error.strerror}") from None
        return self.path if self._fd < 0 else self._busy_journal()

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before may have removed the file after we had opened it.
            if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                return fd
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
        return -1

    def _busy_journal(self) -> Path | None:
        for _, _, ending, path in names.parts_of(self._directory, self._storage):
            if ending == names.JOURNAL and is_locked(path):
                return path
        return None

    def release(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._fd)
            self._fd = -1


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock on this file now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


class Stoppable(Protocol):
    """What is needed of Signals."""

    stop: bool

    def fileno(self) -> int: ...


def await_turn(lock: Lock, signals: Stoppable) -> bool:
    """Wait until nobody else writes this storage's files in this directory; False when a signal has come before."""
    warned: Path | None = None
    while not signals.stop:
        busy = lock.take()
        if busy is None:
            return True
        if busy != warned:
            _log.warning(
                "another storage of this name is at work here (%s is locked): waiting until it has ended", busy
            )
            warned = busy
        select.select([signals.fileno()], [], [], _LOOK)
    return False


class Heard(Protocol):
    """What is needed of a Node: times (monotonic) of the last message from the core, and of the newest heartbeat of
    ours that it has answered."""

    @property
    def heard(self) -> float: ...
    @property
    def confirmed(self) -> float: ...


class Standing:
    """Notices when this process has stood still, and says when it may write again. To be asked before each write."""

    def __init__(self, core: Heard, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._clock = clock
        self._last: float | None = None
        self._since: float | None = None  # when we were back from standing still; None: all is well

    def good(self) -> bool:
        """Whether we may write: yes, until we stand still, and then when the core has answered what we sent after it.

        From False back to True the stream has to be subscribed to anew.
        """
        now = self._clock()
        stood, self._last = now - (now if self._last is None else self._last), now
        if stood > STOOD_STILL:
            self._since = now
            _log.warning("stood still for %.1f s: nothing is written before the core has answered", stood)
        if self._since is None:
            return True
        if self._core.confirmed > self._since:
            self._since = None
        elif now - max(self._since, self._core.heard) > NO_CORE:
            _log.warning("no core has answered for %g s: writing goes on", NO_CORE)
            self._since = None
        return self._since is None
