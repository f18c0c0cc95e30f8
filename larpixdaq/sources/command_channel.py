"""Command channels: they send words to the chips and orders to the board, one request at a time, without waiting.

A channel belongs to one board. It connects at the first request, so that a command port without a server is no error
before. Each request has a time limit. readout.command_queue drives a channel::

    channel.send_words(io_channels, words)      # or send_raw(body); only while it is not `busy`
    ...  when `sockets` are readable, or the time of `due()` has come:
    reply = channel.take()                      # None: no answer yet

HostLookup finds the addresses of boards' hosts. A thread waits for the resolver, which may take half a minute.
"""

from __future__ import annotations

import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import zmq
from numpy.typing import NDArray

from larpixdaq.keys.curve import Handshakes, receive
from larpixdaq.keys.inflow import Inflow

#: Default TCP ports of a board's data and command servers.
DATA_PORT: Final = 5556
COMMAND_PORT: Final = 5555
#: Seconds for the answer to a request, beyond the time that the board needs for it.
LIMIT: Final = 2.0
#: Register maps of PACMAN boards.
REVISIONS: Final = (2, 3, 4, 5)
#: Maximum bytes of an answer: a PACMAN repeats every word of the request.
_LARGEST_REPLY: Final = 2 << 20
#: Maximum number of answers that wait, because a board sends one for each request.
_WAITING_REPLIES: Final = 10
#: Seconds between two lookups of a host.
LOOKUP_INTERVAL: Final = 2.0
#: Maximum seconds that the first lookup holds up its caller: names in /etc/hosts or in a resolver's cache take less.
_FIRST_LOOKUP: Final = 0.2


class BoardReply(NamedTuple):
    """Outcome of a request: the board's answer, or the reason why there is none, in one line."""

    body: bytes
    error: str = ""


class Channel(ABC):
    """Command channel to one board. A request is in flight while it is `busy`; then no other one may be sent."""

    #: Kind of orders that it takes: "pacman", "bern", "serial" or "class" (no orders).
    kind = ""
    #: Register map of a PACMAN, one of REVISIONS; 0: not known.
    revision = 0
    #: UARTs of a PACMAN of revision 5 whose firmware has 32; 0: as others of its revision.
    uarts = 0
    #: Maximum words of a request.
    batch = 1
    #: Sockets to poll for reading while it is busy.
    sockets: tuple[Any, ...] = ()

    def __init__(self, name: str, io_group: int, limit: float = LIMIT) -> None:
        """`name`: board and address, for errors; `limit`: seconds for a request, beyond those that the board needs."""
        self.name = name
        self.io_group = io_group
        self.busy = False
        self._usual_limit = limit
        self._limit = limit
        self._deadline = 0.0
        self._reply: BoardReply | None = None  # outcome of the request, once it is known

    @abstractmethod
    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        """Send at most `batch` words to the chips."""

    @abstractmethod
    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        """Send an order, in the format of this kind of board. It needs `seconds` beyond the usual limit."""

    def take(self) -> BoardReply | None:
        """Return the outcome of the request in flight; None while it is open."""
        self.busy = self._reply is None
        return self._reply

    def due(self) -> float | None:
        """Time of the next take() without a readable socket, in seconds of time.monotonic(); None: no such time."""
        if not self.busy:
            return None
        return self._deadline if self._reply is None else 0.0

    @property
    def identify(self) -> bytes:
        """The order that asks the board for its firmware and register map; empty: the board cannot be asked."""
        return b""

    def firmware(self, answer: bytes) -> str:
        """Return the board's firmware as text, from its answer to `identify`."""
        return ""

    def identity(self, answer: bytes) -> str:
        """Return firmware and register map as text, from its answer to `identify`, to tell boards apart."""
        return self.firmware(answer)

    def _begin(self, seconds: float = 0.0) -> None:
        """Begin a request, for which the board needs `seconds` beyond the usual limit."""
        self.busy = True
        self._reply = None
        self._limit = self._usual_limit + seconds
        self._deadline = time.monotonic() + self._limit

    def _refuse(self, error: str) -> None:
        """End a request before it is sent."""
        self._begin()
        self._reply = self._failure(error)

    def _failure(self, error: str) -> BoardReply:
        return BoardReply(b"", f"{self.name}: {error}")


class RequestChannel(Channel):
    """Channel to a command server, a REP socket of ZeroMQ. Our side is a DEALER, so that nothing blocks."""

    def __init__(
        self, board: str, io_group: int, host: HostLookup, port: int, parse: Callable[[bytes], BoardReply]
    ) -> None:
        """`parse` checks an answer of the board."""
        super().__init__(f"{board} io_group {io_group}, command port {endpoint(host.host, port)}", io_group)
        self._host = host
        self._port = port
        self._parse = parse
        self._socket: zmq.Socket[bytes] | None = None
        self._handshakes: Handshakes | None = None
        self._inflow = Inflow(self.name, _LARGEST_REPLY)
        self._context: zmq.Context[Any] | None = None

    def take(self) -> BoardReply | None:
        if self._reply is None:
            self._reply = self._receive()
        return super().take()

    def close(self) -> None:
        self.busy = False
        self.sockets = ()
        if self._socket is not None and self._handshakes is not None:
            self._handshakes.close()
            self._socket.close(linger=0)
            self._socket = self._handshakes = None
        if self._context is not None:
            self._context.term()
            self._context = None

    def watch(self) -> None:
        """Close the connection if a message of the board does not end. To be called several times a second."""
        if self._handshakes is not None:
            self._handshakes.look()

    def _receive(self) -> BoardReply | None:
        assert self._socket is not None
        try:
            parts = [part.bytes for part in receive(self._socket, 2)]
        except zmq.Again:
            if time.monotonic() < self._deadline:
                return None
            # Otherwise the request could still reach the board later, and its answer would be taken for the next one's.
            self.close()
            return self._failure(f"no answer within {self._limit:g} s")
        except zmq.ZMQError as error:
            self.close()
            return self._failure(str(error))
        self._inflow.took()
        if len(parts) != 2 or parts[0]:
            found = "more" if len(parts) > 2 else len(parts) - 1
            return self._failure(f"expected an answer of one part, found {found}")
        return self._parse(parts[1])

    def _request(self, message: bytes, seconds: float = 0.0) -> None:
        """Send a request; the board needs `seconds` for it beyond the limit."""
        host = self._host.find()
        if not host:
            self._refuse(self._host.problem or "the host is being looked for")
            return
        self._begin(seconds)
        if self._socket is None:
            self._context = zmq.Context()
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.ipv6 = ":" in host
            self._socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_REPLY)
            self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            self._socket.setsockopt(zmq.RCVHWM, _WAITING_REPLIES)
            self._handshakes = Handshakes(self._socket, self._inflow)
            self._socket.connect(endpoint(host, self._port))
            self.sockets = (self._socket,)
        self._socket.send_multipart([b"", message], zmq.DONTWAIT)


class HostLookup:
    """Lookup of one host's numeric `address`: empty while it is not known, for the reason in `problem`."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.problem = ""
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._thread: threading.Thread | None = None
        self._result: tuple[str, str] | None = None  # address and problem, from the thread
        self._retry_at = 0.0
        try:
            socket.getaddrinfo(host, None, self._family, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
            self.address = host
        except (OSError, UnicodeError):
            self.address = ""

    def find(self) -> str:
        """Return the address; while it is not known, "", and look it up every 2 s."""
        if not self.address and self._thread is None and time.monotonic() >= self._retry_at:
            self._thread = threading.Thread(target=self._resolve, name=f"host {self.host}", daemon=True)
            self._thread.start()
            if not self.problem:
                self._thread.join(_FIRST_LOOKUP)
        if self._result is not None:
            (self.address, self.problem), self._result = self._result, None
            self._thread = None
            self._retry_at = time.monotonic() + LOOKUP_INTERVAL
        return self.address

    def forget(self) -> None:
        """Look up the host's name again, because it may have a new address. A numeric address stays."""
        if self.address != self.host:
            self.address = ""

    def _resolve(self) -> None:
        try:
            addresses = socket.getaddrinfo(self.host, None, self._family, socket.SOCK_STREAM)
            self._result = str(addresses[0][4][0]), ""
        except (OSError, UnicodeError) as error:
            self._result = "", f"cannot find host {self.host!r}: {error}"


def endpoint(host: str, port: int) -> str:
    """Return the ZeroMQ address of a host's port."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
