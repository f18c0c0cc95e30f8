"""A growing file on its way to the disk: written steadily, and not kept in memory as a whole."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

#: The kernel is told so often (bytes of the file).
WINDOW: Final = 16 << 20
#: The end of the file stays in memory, for whoever reads along (bytes).
KEPT: Final = 256 << 20


class Behind:
    """Has the kernel write what a file has grown by, and forget what lies far behind.

    By itself it writes when gigabytes have gathered, which whoever syncs the file then waits for, and lets a run of
    hours take the place of all else in memory. A disk that is slow holds up nobody: what it has not taken stays in
    memory, as ever.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = 0
        self._thread: threading.Thread | None = None

    def grown(self, size: int) -> None:
        """The file has so many bytes by now."""
        if size - self._told < WINDOW or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._tell, args=(self._told, size), name="behind", daemon=True)
        self._thread.start()
        self._told = size

    def _tell(self, first: int, last: int) -> None:
        with contextlib.suppress(OSError):  # its name may have changed; it is advice, no more
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Linux begins to write what is not on the disk yet, and forgets what is.
                os.posix_fadvise(file, first, last - first, os.POSIX_FADV_DONTNEED)
                if last > KEPT:
                    os.posix_fadvise(file, max(0, first - KEPT), last - max(first, KEPT), os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
