"""What the child process prints: taken in bounded pieces, so that a talkative routine fills neither memory nor log."""

from __future__ import annotations

import logging
from typing import Final

#: Lines of a routine's own output that go to the log; the rest is counted.
_LOGGED: Final = 100
_LINE: Final = 500

_log: Final = logging.getLogger(__name__)


class Output:
    """What a routine prints: the first lines go to the log, the last are kept in case that it dies."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines = 0
        self._tail = b""

    def take(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-4096:]
        if self._lines >= _LOGGED:
            self._lines += data.count(b"\n")
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:_LINE]
        for line in lines[: _LOGGED - self._lines]:
            _log.info("routine says: %s", line[:_LINE].decode(errors="replace"))
        self._lines += len(lines)

    def end(self, what: str) -> None:
        if self._rest:
            _log.info("routine says: %s", self._rest.decode(errors="replace"))
        if self._lines > _LOGGED:
            _log.info("%s: %d further lines of output left out", what, self._lines - _LOGGED)
        self._rest, self._lines = b"", 0

    def tail(self) -> str:
        return self._tail.decode(errors="replace").strip()
