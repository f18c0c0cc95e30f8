"""Command channels: how words and orders reach a board. One request at a time, a limit on each, and nothing waits.

A channel belongs to one board. It connects when the first request is sent, so that a command port where nobody answers
is no error before. readout.command_queue drives it::

    channel.send_words(io_channels, words)      # or send_raw(body); only when it is not `busy`
    ...  when `sockets` are readable, or `due()` has come:
    reply = channel.take()                      # None: not yet

The addresses of boards' hosts. A resolver may take half a minute for a name, so a thread waits for it.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import zmq
from numpy.typing import NDArray

#: TCP ports of a board's data and command servers, unless others are given.
DATA_PORT: Final = 5556
COMMAND_PORT: Final = 5555
#: Seconds for the answer to a request, unless it says that the board needs more.
LIMIT: Final = 2.0
#: Register maps of PACMAN boards.
REVISIONS: Final = (2, 3, 4, 5)
#: No answer of a board is larger (bytes): a PACMAN repeats every word of the request.
_LARGEST_REPLY: Final = 2 << 20
#: Seconds between two attempts to find a host.
AGAIN: Final = 2.0
#: Seconds that the first attempt may hold up its caller: names in /etc/hosts and in a resolver's cache take less.
_AT_ONCE: Final = 0.2


class BoardReply(NamedTuple):
    """What came of a request: what the board said, or, in one line, why that is not known."""

    body: bytes
    error: str = ""


class Channel(Protocol):
    #: For messages to people: board, host:port.
    name: str
    #: "pacman", "bern", "serial" or "class" (none): which orders it understands.
    kind: str
    io_group: int
    #: Register map of a PACMAN, one of REVISIONS; 0: not known.
    revision: int
    #: Words of one request, at most.
    batch: int
    #: Sockets to poll for reading while it is busy.
    sockets: tuple[Any, ...]
    #: A request was sent, and take() has not said yet what came of it.
    busy: bool

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        """Send these words to the chips, at most `batch`."""

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        """Send an order to the board itself, in the form that boards of this kind understand. The board needs so many
        seconds for it beyond the usual limit."""

    def take(self) -> BoardReply | None:
        """What came of the request in flight; None while that is open."""

    def due(self) -> float | None:
        """When take() wants to be called although no socket is readable (monotonic seconds)."""

    def close(self) -> None: ...

    @property
    def identify(self) -> bytes:
        """The order that asks the board for its firmware, whose answer firmware() understands; empty: it cannot say."""

    def firmware(self, answer: bytes) -> str:
        """The board's firmware in words, by its answer to `identify`."""


class RequestChannel:
    """A board's command server, which speaks REQ/REP over ZeroMQ: a DEALER here, so that nothing ever blocks."""

    kind = ""
    revision = 0
    batch = 1

    def __init__(self, board: str, io_group: int, host: HostLookup, port: int) -> None:
        self.io_group = io_group
        self.name = f"{board} io_group {io_group}, command port {endpoint(host.host, port)}"
        self.sockets: tuple[Any, ...] = ()
        self.busy = False
        self._host = host
        self._port = port
        self._unknown = False  # the request in flight was not sent, since the host is not known
        self._socket: zmq.Socket[bytes] | None = None
        self._context: zmq.Context[Any] | None = None
        self._limit = LIMIT
        self._deadline = 0.0

    def take(self) -> BoardReply | None:
        if self._unknown:
            self.busy = self._unknown = False
            return BoardReply(b"", f"{self.name}: {self._host.problem or 'the host is being looked for'}")
        assert self._socket is not None
        try:
            parts = self._socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            if time.monotonic() < self._deadline:
                return None
            # What is still under way would otherwise reach the board later, and its answer the next request.
            self.close()
            return BoardReply(b"", f"{self.name}: no answer within {self._limit:g} s")
        except zmq.ZMQError as error:
            self.close()
            return BoardReply(b"", f"{self.name}: {error}")
        self.busy = False
        if len(parts) != 2 or parts[0]:
            return BoardReply(b"", f"{self.name}: expected an answer of one part, found {len(parts) - 1}")
        return self._understand(parts[1])

    def due(self) -> float | None:
        if self._unknown:
            return 0.0
        return self._deadline if self.busy else None

    def close(self) -> None:
        self.busy = self._unknown = False
        self.sockets = ()
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
        if self._context is not None:
            self._context.term()
            self._context = None

    @property
    def identify(self) -> bytes:
        return b""

    def firmware(self, answer: bytes) -> str:
        return ""

    def _understand(self, message: bytes) -> BoardReply:
        """What the board's answer means."""
        raise NotImplementedError

    def _request(self, message: bytes, seconds: float = 0.0) -> None:
        """Send it; the board needs so many seconds for it beyond the usual limit."""
        self.busy = True
        host = self._host.find()
        if not host:
            self._unknown = True
            return
        if self._socket is None:
            self._context = zmq.Context()
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.ipv6 = ":" in host
            self._socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_REPLY)
            self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            self._socket.connect(endpoint(host, self._port))
            self.sockets = (self._socket,)
        self._socket.send_multipart([b"", message], zmq.DONTWAIT)
        self._limit = LIMIT + seconds
        self._deadline = time.monotonic() + self._limit


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
