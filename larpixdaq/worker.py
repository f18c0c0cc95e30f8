"""One thread for what may hang with a disk."""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Job = tuple[Callable[[], Any], Callable[[Any], None]]


class Worker:
    """Does what it is given, in order, in a thread; turn() tells what came of it, in the loop of whoever gave it."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do this in the thread; `then` gets what it returned, or the OSError that it raised."""
        self._open += 1
        self._jobs.put((do, then))

    def fileno(self) -> int:
        """Polls readable while turn() has something to do."""
        return self._wake

    def turn(self) -> None:
        """Tell what is done."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        while self._done:
            then, found = self._done.popleft()
            self._open -= 1
            then(found)

    def settle(self, limit: float) -> bool:
        """Wait until all that was given is done and told, at most `limit` seconds."""
        deadline = time.monotonic() + limit
        while self._open and (left := deadline - time.monotonic()) > 0:
            select.select([self._wake], [], [], left)
            self.turn()
        return not self._open

    def close(self, limit: float) -> bool:
        """Finish what was given, in at most `limit` seconds; False: it hangs, and ends with the process."""
        if not self._thread.is_alive():
            return True
        self._jobs.put(None)
        self._thread.join(limit)
        if self._thread.is_alive():
            return False
        self.turn()
        os.close(self._wake)
        return True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            do, then = job
            found: Any
            try:
                found = do()
            except OSError as error:
                found = error
            except Exception as error:  # a mistake of ours: nothing may wait for ever for what it would have told
                log.exception("%s", self._thread.name)
                found = OSError(str(error))
            self._done.append((then, found))
            os.eventfd_write(self._wake, 1)
