"""The lock on a storage's files in a directory: one process at a time writes them, and others wait for their turn."""

from __future__ import annotations

import logging
import os
import select
import time
from pathlib import Path
from typing import Final

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import names
from larpixdaq.runtime.event_loop import Signals
from larpixdaq.runtime.file_access import LockedFile, lock_directory, open_regular

_log = logging.getLogger(__name__)

#: Seconds between two looks at a lock.
_LOOK: Final = 0.25


class Lock:
    """The right to write files of one storage in a directory, for as long as this process lives or until release().

    It is a lock (flock) on a hidden file, which goes with a clean end. A journal has a lock of its own, which says that
    somebody works on that very part (`larpixdaq recover`, say): then it is not our turn either.
    """

    def __init__(self, directory: Path, storage: str) -> None:
        self._directory, self._storage = directory, storage
        self.path = directory / names.lock_name(storage)
        self._file: LockedFile | None = None
        self._look_at = 0.0
        self._trouble = ""

    def take(self) -> Path | None:
        """Take the lock; returns the file that another process has locked, None when there is none. FileError when
        files cannot be locked here."""
        if self._file is None:
            self._open()
        return self.path if self._file is None else self._busy_journal()

    def _open(self) -> None:
        try:
            file = lock_directory.open(self.path, os.O_RDWR | os.O_CREAT)
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"cannot lock {self.path}: {error.strerror}") from None
        if file is not None:
            self._file = file

    def keep(self) -> None:
        """Take it anew when somebody has removed its file: another storage would get in. To be called now and then."""
        old = self._file
        if old is None or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK
        if old.in_place():
            return
        old.release_substitute()
        try:
            self._open()
            text = "another storage has it now" if self._file is old else ""
        except FileError as error:
            text = str(error)
        if self._file is not old:
            old.close()
            _log.warning("%s: somebody has removed this lock: it was made anew", self.path)
        elif text != self._trouble:
            _log.error("%s: somebody has removed this lock: %s", self.path, text)
        self._trouble = text

    def _busy_journal(self) -> Path | None:
        for _, _, ending, path in names.files_of_storage(self._directory, self._storage):
            if ending == names.JOURNAL and is_locked(path):
                return path
        return None

    def release(self) -> None:
        if self._file is not None:
            self._file.close(remove_name=True)
            self._file = None


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock on this file now. FileError when that cannot be known."""
    try:
        fd = open_regular(path)
    except (FileNotFoundError, FileError):  # a link or a pipe is no file of ours, whatever its name
        return False
    except OSError as error:
        raise FileError(f"cannot open {path}: {error.strerror}") from None
    file = lock_directory.lock(fd, path)
    if file is not None:
        file.close()
    return file is None


def await_turn(lock: Lock, signals: Signals) -> bool:
    """Wait until no other process writes this storage's files in this directory; False when a signal has come first."""
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
