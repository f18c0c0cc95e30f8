"""The addresses of boards' hosts. A resolver may take half a minute for a name, so a thread waits for it."""

from __future__ import annotations

import socket
import threading
import time
from typing import Final

#: Seconds between two attempts to find a host.
AGAIN: Final = 2.0
#: Seconds that the first attempt may hold up its caller: names in /etc/hosts and in a resolver's cache take less.
_AT_ONCE: Final = 0.2


class HostLookup:
    """One host. `address` is its numeric address; empty while that is not known, and `problem` says why then."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.problem = ""
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._thread: threading.Thread | None = None
        self._found: tuple[str, str] | None = None  # address and problem, from the thread
        self._again_at = 0.0
        try:
            socket.getaddrinfo(host, None, self._family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
            self.address = host
        except (OSError, UnicodeError):
            self.address = ""

    def find(self) -> str:
        """The address, as far as it is known; else looks for it, again every 2 s."""
        if not self.address and self._thread is None and time.monotonic() >= self._again_at:
            self._thread = threading.Thread(target=self._look, name=f"host {self.host}", daemon=True)
            self._thread.start()
            if not self.problem:
                self._thread.join(_AT_ONCE)
        if self._found is not None:
            (self.address, self.problem), self._found = self._found, None
            self._thread = None
            self._again_at = time.monotonic() + AGAIN
        return self.address

    def forget(self) -> None:
        """Look for the host anew: it may have another address now. One that was given as a number has not."""
        if self.address != self.host:
            self.address = ""

    def _look(self) -> None:
        try:
            found = socket.getaddrinfo(self.host, None, self._family, socket.SOCK_STREAM)
            self._found = str(found[0][4][0]), ""
        except (OSError, UnicodeError) as error:
            self._found = "", f"cannot find host {self.host!r}: {error}"


def endpoint(host: str, port: int) -> str:
    """The ZeroMQ address of a port of a host."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
