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

#: Seconds between two checks of a lock.
_INTERVAL: Final = 0.25


class Lock:
    """The right to write the files of one storage in a directory, until release() or the end of this process.

    It is a lock (flock) on a hidden file, which a clean end removes. A journal has a lock of its own, by which another
    process, such as `larpixdaq recover`, works on that part. Then a storage must wait, too.
    """

    def __init__(self, directory: Path, storage: str) -> None:
        self._directory, self._storage = directory, storage
        self.path = directory / names.lock_name(storage)
        self._file: LockedFile | None = None
        self._check_time = 0.0
        self._problem = ""

    def take(self) -> Path | None:
        """Take the lock, or return the file that another process has locked. FileError when files cannot be locked."""
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
        """Take the lock again if its file was removed, because another storage could take it. Call this repeatedly."""
        old = self._file
        if old is None or time.monotonic() < self._check_time:
            return
        self._check_time = time.monotonic() + _INTERVAL
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
            _log.warning("%s: this lock was removed; it has been replaced", self.path)
        elif text != self._problem:
            _log.error("%s: this lock was removed, and cannot be replaced: %s", self.path, text)
        self._problem = text

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
    """Whether a process holds the lock of this file now. FileError when that cannot be tested."""
    try:
        fd = open_regular(path)
    except (FileNotFoundError, FileError):  # links and pipes are never files of a storage
        return False
    except OSError as error:
        raise FileError(f"cannot open {path}: {error.strerror}") from None
    file = lock_directory.lock(fd, path)
    if file is not None:
        file.close()
    return file is None


def await_turn(lock: Lock, signals: Signals) -> bool:
    """Wait until no other process writes this storage's files in this directory; False when a signal comes first."""
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
        select.select([signals.fileno()], [], [], _INTERVAL)
    return False
