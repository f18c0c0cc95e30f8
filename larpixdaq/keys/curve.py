"""CURVE on ZeroMQ sockets: key pairs, the check at each connection, and whose key a message came with.

Keys are Z85 texts of 40 characters. libzmq asks a ZAP handler in the same context about each new connection of a
listening socket; without one it would accept every key.
"""

from __future__ import annotations

import logging
import os
import socket as sockets
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils import z85

from larpixdaq import config
from larpixdaq.errors import ProtocolError

_log = logging.getLogger("larpixdaq.keys")
_ZAP: Final = "inproc://zeromq.zap.01"
#: Milliseconds until a connection that does not finish its handshake is closed.
_HANDSHAKE_LIMIT: Final = 5000
#: Connections whose key is remembered; that of an older one is read again from its next message.
_REMEMBERED: Final = 4096
#: Bytes that CURVE adds to a message part (33), which count in libzmq's MAXMSGSIZE.
_OVERHEAD: Final = 64
#: Maximum number of ZAP requests that are answered in one turn of the loop.
_TURN: Final = 100


class KeyPair(NamedTuple):
    """A CURVE key pair."""

    public: str
    secret: str


def new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def connect_with(socket: zmq.Socket[Any], own: KeyPair, server: str) -> None:
    """Make a socket, before connect(), show the key `own`, and accept only the peer whose public key is `server`."""
    socket.curve_publickey = own.public.encode()
    socket.curve_secretkey = own.secret.encode()
    socket.curve_serverkey = server.encode()


def dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    largest: int,
    *,
    own: KeyPair | None,
    server: str,
    queue: int = 1000,
) -> zmq.Socket[bytes]:
    """Return a DEALER socket that connects as soon as its peer listens. Raises zmq.ZMQError for an invalid address.

    Without a connection it takes no messages, so that a peer does not get minutes of old ones after a restart.
    `largest`: maximum bytes of a message part from the peer. `own` and `server`: as for connect_with(); None and "":
    without keys. `queue`: maximum messages from the peer that wait, 0 without limit.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.MAXMSGSIZE, largest + _OVERHEAD)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 2000)  # because the kernel's own waits grow while a network is down
    config.close_dead_connections(socket, config.DEAD_CONNECTION)
    try:
        if own is not None and server:
            connect_with(socket, own, server)
        socket.ipv6 = config.is_ipv6(address)
        socket.connect(address)
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    return socket


class _Connection(NamedTuple):
    key: str
    descriptor: int
    peer: Any  # address and port, by which a descriptor that was closed and used again is told apart


class Doorkeeper:
    """Checks the keys of all who connect to the listening sockets of one context, and closes connections.

    `pair` is the key pair of these sockets; None: no keys are in use, everybody is admitted. `admits` says whether a
    public key may connect. Everything happens in the loop that polls `socket` and calls answer().
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], pair: KeyPair | None, admits: Callable[[str], bool], what: str
    ) -> None:
        self._pair, self._admits, self._what = pair, admits, what
        #: Connections that were refused since the start.
        self.refused = 0
        self._unsaid, self._say_at = 0, 0.0
        self._connections: OrderedDict[bytes, _Connection] = OrderedDict()  # by ZeroMQ's route
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.bind(_ZAP)

    def guard(self, socket: zmq.Socket[Any]) -> None:
        """Require keys on a listening socket; to be called before bind(), and after its MAXMSGSIZE was set."""
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_LIMIT)
        if self._pair is not None:
            socket.curve_server = True
            socket.curve_secretkey = self._pair.secret.encode()
            socket.zap_domain = b"larpixdaq"
            limit = int(socket.getsockopt(zmq.MAXMSGSIZE))
            if limit > 0:
                socket.setsockopt(zmq.MAXMSGSIZE, limit + _OVERHEAD)

    def answer(self) -> None:
        """Answer libzmq's questions about new connections."""
        for _ in range(_TURN):
            try:
                version, request, _, address, _, mechanism, *keys = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            key = z85.encode(keys[0]).decode() if mechanism == b"CURVE" and len(keys) == 1 else ""
            admitted = bool(key) and self._admits(key)
            if not admitted:
                self._refuse(address.decode("ascii", "replace"))
            status, text = (b"200", b"OK") if admitted else (b"400", b"unknown key")
            self.socket.send_multipart([version, request, status, text, key.encode() if admitted else b"", b""])

    def _refuse(self, address: str) -> None:
        self.refused += 1
        self._unsaid += 1
        now = time.monotonic()
        if now >= self._say_at:  # at most one line a second, however many come
            _log.warning(
                "%s: refused a connection from %s with an unknown key (%d refused)", self._what, address, self._unsaid
            )
            self._unsaid, self._say_at = 0, now + 1.0

    def sender(self, route: bytes, frame: zmq.Frame) -> str:
        """The public key of the peer that sent this frame over a ROUTER's connection `route`; "" without keys.

        ProtocolError when the peer has chosen its own route, by which it could take another one's place.
        """
        if self._pair is None:
            return ""
        known = self._connections.get(route)
        if known is not None:
            return known.key
        if route[:1] != b"\0":  # ZeroMQ's own are unique as long as the socket lives
            raise ProtocolError(f"{self._what}: connection {route.hex()}: its routing id was set by the peer")
        key = self.key_of(frame)
        descriptor = int(frame.get(zmq.SRCFD))
        with suppress(OSError):
            self._connections[route] = _Connection(key, descriptor, _peer(descriptor))
            if len(self._connections) > _REMEMBERED:
                self._connections.popitem(last=False)
        return key

    def key_of(self, frame: zmq.Frame) -> str:
        """The public key with which a frame came; "" without keys. Takes about 20 µs."""
        return "" if self._pair is None else str(frame.get("User-Id"))

    def disconnect(self, key: str) -> list[bytes]:
        """Close the connections of a key that is not admitted any more; their routes."""
        found = [(route, one) for route, one in self._connections.items() if one.key == key]
        for route, one in found:
            del self._connections[route]
            with suppress(OSError), sockets.socket(fileno=os.dup(one.descriptor)) as connection:
                if connection.getpeername() == one.peer:
                    connection.shutdown(sockets.SHUT_RDWR)
        return [route for route, _ in found]

    def close(self) -> None:
        self.socket.close(0)


def _peer(descriptor: int) -> Any:
    with sockets.socket(fileno=os.dup(descriptor)) as connection:
        return connection.getpeername()


class Handshakes:
    """Tells why a connecting socket gets no connection.

    look() must be called several times a minute, because libzmq's thread waits when a thousand events wait.
    """

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        events |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._socket = socket
        self._monitor = socket.get_monitor_socket(events)
        #: The last one failed: "key" (ours is refused), "peer" (the other side has another key, or none); "" else.
        self.failure = ""

    def look(self) -> str:
        """Take in what has happened; returns `failure`."""
        while self._monitor.poll(0):
            event = int.from_bytes(self._monitor.recv_multipart()[0][:2], "little")
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.failure = ""
            else:
                self.failure = "key" if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH else "peer"
        return self.failure

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
