"""CURVE on ZeroMQ sockets: key pairs, the check at each connection, and whose key a message came with.

Keys are Z85 texts of 40 characters. libzmq asks a ZAP handler in the same context about each new connection of a
listening socket; without one it would accept every key.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils import z85

from larpixdaq import config
from larpixdaq._native.zmq_batch import drop_rest
from larpixdaq.errors import ProtocolError
from larpixdaq.keys.connections import Connections
from larpixdaq.keys.inflow import Inflow
from larpixdaq.keys.peer_limits import PeerLimits

_log = logging.getLogger("larpixdaq.keys")
_ZAP: Final = "inproc://zeromq.zap.01"
#: Milliseconds until a connection that does not finish its handshake is closed.
_HANDSHAKE_LIMIT: Final = 2000
#: Bytes that CURVE adds to a message part (33), which count in libzmq's MAXMSGSIZE.
_OVERHEAD: Final = 64
#: Maximum number of ZAP requests that are answered in one turn of the loop.
_TURN: Final = 100
#: Connections that wait in the kernel until libzmq accepts them, so that a flood delays a member's one less.
_BACKLOG: Final = 1024
#: Seconds between two looks for connections that are not admitted.
_LOOK_INTERVAL: Final = 0.1
#: Seconds between two looks for messages that are too long.
_UNFINISHED_INTERVAL: Final = 0.5
#: Event of a socket's monitor: its number, and its value, for CONNECTED a descriptor.
_EVENT: Final = struct.Struct("=HI")
#: As a plain integer, because operators of Python's flags take a microsecond.
_POLLIN: Final = int(zmq.POLLIN)


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


def has_message(socket: zmq.Socket[Any]) -> bool:
    """Whether a message can be received without waiting: a fifth of the time of a recv() that raises zmq.Again."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _POLLIN)


def receive(socket: zmq.Socket[bytes], most: int) -> list[zmq.Frame]:
    """Receive a message of any socket without waiting; zmq.Again if there is none.

    Of a message with more than `most` frames the first `most` + 1 are returned. The others are dropped, because a
    member may send a million empty ones in one message, and objects of them take the loop 2 s.
    """
    frames = [socket.recv(zmq.NOBLOCK, copy=False)]
    while frames[-1].more:
        if len(frames) > most:
            drop_rest(socket)
            break
        frames.append(socket.recv(zmq.NOBLOCK, copy=False))
    return frames


class Doorkeeper:
    """Checks the keys of all who connect to the listening sockets of one context, and closes connections.

    `pair` is the key pair of these sockets; None: no keys are in use, everybody is admitted. `whose` returns whose
    public key this is: a name, "" for the core's own user, None if it may not connect. Everything happens in the loop
    that polls `socket` and calls answer().

    A key above its limit of connections is refused for now: libzmq tries again, at the latest when _HANDSHAKE_LIMIT is
    over.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        pair: KeyPair | None,
        whose: Callable[[str], str | None],
        what: str,
    ) -> None:
        self._pair, self._whose, self._what = pair, whose, what
        #: Connections that were refused since the start because of their key, and the address of the last one.
        self.refused = 0
        self.last_refused = ""
        self.limits = PeerLimits(what)
        self._unsaid, self._say_at = 0, 0.0
        self._connections = Connections()
        self._look_at = self._unfinished_at = 0.0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.bind(_ZAP)

    def guard(self, socket: zmq.Socket[Any], longest: int = 0) -> None:
        """Require keys on a listening socket; to be called before bind(), and after its MAXMSGSIZE was set.

        `longest`: maximum bytes of a message with all its parts, if it is not that of one part.
        """
        limit = int(socket.getsockopt(zmq.MAXMSGSIZE))
        self._connections.watch(socket, max(longest, limit))
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_LIMIT)
        socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        if self._pair is not None:
            socket.curve_server = True
            socket.curve_secretkey = self._pair.secret.encode()
            socket.zap_domain = b"larpixdaq"
            if limit > 0:
                socket.setsockopt(zmq.MAXMSGSIZE, limit + _OVERHEAD)

    def answer(self) -> None:
        """Answer libzmq's questions about new connections, and close some of those that are not admitted."""
        now = time.monotonic()
        if self._pair is not None and now >= self._look_at:
            self._look_at = now + _LOOK_INTERVAL
            for stranger in self._connections.limit_strangers():
                self._refuse(stranger, "without a key")
            if now >= self._unfinished_at:
                self._unfinished_at = now + _UNFINISHED_INTERVAL
                for key in self._connections.limit_unfinished():
                    name = self._whose(key)
                    peer = "an unknown key" if name is None else name or "the core's own user"
                    self.limits.reached(peer, "a message without end")
        for _ in range(_TURN):
            if not has_message(self.socket):
                return
            version, request, _, address, _, mechanism, *keys = self.socket.recv_multipart(zmq.NOBLOCK)
            key = z85.encode(keys[0]).decode() if mechanism == b"CURVE" and len(keys) == 1 else ""
            name = self._whose(key) if key else None
            status, text = b"200", b"OK"
            if name is None:
                self._refuse(address.decode("ascii", "replace"))
                status, text = b"400", b"unknown key"
            elif reached := self._connections.admit(key, owner=not name):
                self.limits.reached(name or "the core's own user", reached)
                status, text = b"300", reached.encode()
            self.socket.send_multipart([version, request, status, text, key.encode() if status == b"200" else b"", b""])

    def _refuse(self, address: str, why: str = "with an unknown key") -> None:
        self.refused += 1
        self.last_refused = address
        self._unsaid += 1
        now = time.monotonic()
        if now >= self._say_at:  # at most one line a second, however many come
            _log.warning("%s: refused a connection from %s %s (%d refused)", self._what, address, why, self._unsaid)
            self._unsaid, self._say_at = 0, now + 1.0

    def sender(self, route: bytes, frame: zmq.Frame) -> str:
        """The public key of the peer that sent this frame over a ROUTER's connection `route`; "" without keys.

        ProtocolError when the peer has chosen its own route, by which it could take another one's place.
        """
        if self._pair is None:
            return ""
        known = self._connections.key(route)
        if known is not None:
            return known
        if route[:1] != b"\0":  # ZeroMQ's own are unique as long as the socket lives
            raise ProtocolError(f"{self._what}: connection {route.hex()}: its routing id was set by the peer")
        key = str(frame.get("User-Id"))
        self._connections.note(route, key, int(frame.get(zmq.SRCFD)))
        return key

    def key_of(self, frame: zmq.Frame) -> str:
        """The public key with which a frame came over a socket without routes; "" without keys. Takes about 30 µs."""
        if self._pair is None:
            return ""
        key = str(frame.get("User-Id"))
        descriptor = int(frame.get(zmq.SRCFD))
        route = descriptor.to_bytes(4, "little")
        if self._connections.key(route) != key or not self._connections.is_open(route):
            self._connections.note(route, key, descriptor)
        return key

    def heard_keys(self) -> set[str]:
        """The keys of all connections over which messages have come, perhaps also of closed ones."""
        return self._connections.heard_keys()

    def disconnect(self, key: str) -> list[bytes]:
        """Close the connections of a key that is not admitted any more; their routes."""
        return self._connections.disconnect(key)

    def close(self) -> None:
        self._connections.close()
        self.socket.close(0)


class Admission:
    """The keys that may connect to the listening sockets of a component, as the core last said, and their Doorkeeper.

    `pair` is the key pair of these sockets; None: without keys.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], pair: KeyPair | None, what: str) -> None:
        self.door = Doorkeeper(context, pair, self.whose, what)
        self._has_pair = pair is not None
        #: No keys are in use: everybody is admitted.
        self.insecure = pair is None
        self._names: dict[str, str] = {}
        self._children: dict[str, str] = {}

    def whose(self, key: str) -> str | None:
        """The component whose key this is; "" for the core's own user, None if it may not connect."""
        return "" if self.insecure else self._children.get(key) or self._names.get(key)

    def admit_child(self, key: str, name: str) -> None:
        """Admit the public key that this component has made for its own child `name`, whatever the core says."""
        self._children[key] = name

    def apply(self, names: dict[str, str], *, insecure: bool) -> list[bytes]:
        """Take over the keys and `insecure` of the core's Update. Closes connections whose key is not among them, also
        those from before the core used keys.

        Returns their routes.
        """
        self.insecure, self._names = insecure or not self._has_pair, names
        refused = [key for key in self.door.heard_keys() if self.whose(key) is None]
        return [route for key in refused for route in self.door.disconnect(key)]


class Handshakes:
    """Tells why a connecting socket gets no connection: the other side refuses its key, or is no one it knows.

    To be made before connect(), so that no refusal is missed. look() must be called several times a minute, because
    libzmq's thread waits when a thousand events wait, and several times a second if it watches an `inflow` too.
    """

    def __init__(self, socket: zmq.Socket[Any], inflow: Inflow | None = None) -> None:
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        events |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_CONNECTED
        self._socket = socket
        self._inflow = inflow
        self._monitor = socket.get_monitor_socket(events)
        #: The last one failed: "key" (ours is refused), "peer" (the other side has another key, or none); "" else.
        self.failure = ""

    def look(self) -> str:
        """Take in what has happened; returns `failure`. Closes the connection if too many bytes wait in it."""
        while has_message(self._monitor):
            event, value = _EVENT.unpack_from(self._monitor.recv_multipart()[0])
            if event == zmq.EVENT_CONNECTED:
                if self._inflow is not None:
                    self._inflow.connected(value)
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.failure = ""
            else:
                self.failure = "key" if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH else "peer"
        if self._inflow is not None:
            self._inflow.look()
        return self.failure

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)


class Client:
    """A DEALER socket that connects as soon as its peer listens, with its handshakes and the bytes that come.

    Without a connection it takes no messages, so that a peer does not get minutes of old ones after a restart. Raises
    zmq.ZMQError for an invalid address.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        largest: int,
        *,
        own: KeyPair | None,
        server: str,
        parts: int = 1,
        backlog: int = 0,
    ) -> None:
        """`largest`: maximum bytes of a part of a message from the peer, and `parts` their maximum number.

        `own` and `server`: as for connect_with(); None and "": without keys. `backlog`: maximum bytes of messages that
        wait, in place of 1,000 messages.
        """
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._parts = parts
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.socket.setsockopt(zmq.RCVHWM, 0 if backlog else 1000)
        self.socket.setsockopt(zmq.MAXMSGSIZE, largest + _OVERHEAD)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, 2000)  # because the kernel's own waits grow while a network is down
        config.close_dead_connections(self.socket, config.DEAD_CONNECTION)
        self._inflow = Inflow(address, parts * largest, backlog=backlog, curve=bool(own is not None and server))
        # Watched from the first handshake on, because libzmq does not connect again after its key was refused.
        self._handshakes = Handshakes(self.socket, self._inflow)
        try:
            if own is not None and server:
                connect_with(self.socket, own, server)
            self.socket.ipv6 = config.is_ipv6(address)
            self.socket.connect(address)
        except zmq.ZMQError:
            self.close(linger=0)
            raise

    def receive(self) -> list[zmq.Frame]:
        """Receive a message without waiting; zmq.Again if there is none. One with too many parts has one part more."""
        frames = receive(self.socket, self._parts)
        self._inflow.took(*map(len, frames))
        return frames

    def look(self) -> str:
        """Why there is no connection, as Handshakes.failure. To be called several times a second.

        Closes the connection when too many bytes wait in it; it is made again by itself.
        """
        return self._handshakes.look()

    @property
    def was_closed(self) -> bool:
        """Whether look() has closed a connection. Its whole messages still wait, until this Client is closed."""
        return self._inflow.closed > 0

    def close(self, linger: int) -> None:
        """Close the socket, which sends waiting messages for at most `linger` milliseconds."""
        self._handshakes.close()
        self.socket.close(linger)
