"""The bytes that a connecting socket gets from its peer: when too many wait, its connection is closed.

libzmq keeps the frames of a message until the last one has come, however many they are, and any number of messages
where no limit is set. connections.py watches the connections of listening sockets.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import stat
import time
from collections.abc import Iterator
from typing import Any, Final

from larpixdaq.keys.connections import TCP_BYTES, UNFINISHED

_log = logging.getLogger("larpixdaq.keys")
#: Seconds between two looks.
_INTERVAL: Final = 0.25
#: Bytes that CURVE adds to a frame.
_CURVE: Final = 33
#: Seconds between two lines in the log about the same peer.
_LINE_INTERVAL: Final = 60.0
#: Peer -> monotonic time of its next line.
_say_at: dict[str, float] = {}


class Inflow:
    """Counts the bytes that wait in one connection: the kernel has received them, and the process has not taken them.

    To be used in the loop that takes the messages: connected() with each new connection, took() with each message, and
    look() several times a second, after all messages that are there were taken. Only TCP connections are watched.
    """

    def __init__(self, peer: str, longest: int, *, backlog: int = 0, curve: bool = False) -> None:
        """`peer`: its address, for the log. `longest`: maximum bytes of a message with all its parts.

        `backlog`: maximum bytes of all messages that wait; 0: any number of whole messages may wait. `curve`: the
        connection has keys.
        """
        self._peer = peer
        self._most = max(longest, backlog) + UNFINISHED
        self._counts_messages = backlog > 0
        self._overhead = _CURVE if curve else 0
        self._descriptor = -1
        self._ends: Any = None  # both addresses of the connection, by which a descriptor that was used again is told
        self._received = self._waiting = self._taken = 0  # bytes
        self._was_taken = self._is_long = False
        self._look_at = 0.0
        #: Number of connections that were closed.
        self.closed = 0

    def connected(self, descriptor: int) -> None:
        """Note a new connection, from the event CONNECTED of the socket's monitor."""
        self._descriptor, self._ends = descriptor, None
        self._received = self._waiting = self._taken = 0
        self._was_taken = self._is_long = False
        with contextlib.suppress(OSError), _duplicate(descriptor) as connection:
            self._ends = connection.getsockname(), connection.getpeername()

    def took(self, *frames: int) -> None:
        """Note a message that was taken, with the bytes of its frames."""
        self._was_taken = True
        for size in frames if self._counts_messages else ():
            body = size + self._overhead
            self._taken += body + (2 if body < 256 else 9)  # as ZMTP sends it

    def look(self) -> bool:
        """Close the connection if too many bytes wait in two looks. Returns whether that was done now.

        Two, because messages may have come since the last one was taken. The second look is that of the next call.
        """
        now = time.monotonic()
        if self._ends is None or now < self._look_at:
            return False
        ends, self._ends = self._ends, None  # it may be closed
        with contextlib.suppress(OSError), _duplicate(self._descriptor) as connection:
            if (connection.getsockname(), connection.getpeername()) != ends:
                return False
            info = connection.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, TCP_BYTES.size)
            # On a system without this number no byte waits.
            self._count(TCP_BYTES.unpack(info)[1] if len(info) == TCP_BYTES.size else 0)
            was_long, self._is_long = self._is_long, self._waiting > self._most
            if was_long and self._is_long:
                connection.shutdown(sockets.SHUT_RDWR)  # libzmq's thread then closes it
                self._report(now)
                return True
            self._ends = ends
            self._look_at = now if self._is_long else now + _INTERVAL
        return False

    def _count(self, received: int) -> None:
        if self._was_taken and not self._counts_messages:
            self._waiting = 0
        else:
            self._waiting = max(0, self._waiting + received - self._received - self._taken)
        self._received, self._taken, self._was_taken = received, 0, False

    def _report(self, now: float) -> None:
        self.closed += 1
        if now >= _say_at.get(self._peer, 0.0):
            _say_at[self._peer] = now + _LINE_INTERVAL
            _log.warning(
                "%s: closed the connection, because %d bytes wait, in a message that does not end or in more messages"
                " than may wait; %d bytes may",
                self._peer, self._waiting, self._most,
            )  # fmt: skip


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[sockets.socket]:
    """Give a duplicate of the descriptor of a socket, because libzmq's thread may close it and use its number again.

    OSError if it is no socket. Never of a file, because closing the duplicate would end the locks of SQLite.
    """
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError
    with sockets.socket(fileno=os.dup(descriptor)) as duplicate:
        yield duplicate
