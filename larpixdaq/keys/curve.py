"""CURVE on ZeroMQ sockets: key pairs, the check at each connection, and whose key a message came with.

Keys are Z85 texts of 40 characters. libzmq asks a ZAP handler in the same context about each new connection of a
listening socket; without one it would accept every key.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import socket as sockets
import stat
import struct
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils import z85

from larpixdaq import config
from larpixdaq.errors import ProtocolError
from larpixdaq.keys.peer_limits import OPEN, OPEN_OWNER, PeerLimits, connection_rates

_log = logging.getLogger("larpixdaq.keys")
_ZAP: Final = "inproc://zeromq.zap.01"
#: Milliseconds until a connection that does not finish its handshake is closed.
_HANDSHAKE_LIMIT: Final = 2000
#: Connections whose key is remembered; that of an older one is read again from its next message.
_REMEMBERED: Final = 4096
#: Bytes that CURVE adds to a message part (33), which count in libzmq's MAXMSGSIZE.
_OVERHEAD: Final = 64
#: Maximum number of ZAP requests that are answered in one turn of the loop.
_TURN: Final = 100
#: Connections that wait in the kernel until libzmq accepts them, so that a flood delays a member's one less.
_BACKLOG: Final = 1024
#: Descriptors of this process up to which all connections stay open, or a quarter of the maximum. Above it, connections
#: that were not admitted are closed, because without descriptors the process cannot open files.
_ENOUGH: Final = 1024
#: Descriptors that are tried when they cannot be listed.
_MANY: Final = 1 << 16
#: Seconds between two looks for them, and maximum processor seconds of a look.
_LOOK_INTERVAL: Final = 0.1
_LOOK_LIMIT: Final = 0.02
#: Bytes that only an admitted peer gets: greeting 64, WELCOME 170, READY 52 or more. Others get ERROR, 14 at most.
_ADMITTED_BYTES: Final = 260
#: Place of tcpi_bytes_acked in Linux' struct tcp_info.
_BYTES_ACKED: Final = struct.Struct("120xQ")


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
) -> tuple[zmq.Socket[bytes], Handshakes]:
    """Return a DEALER socket that connects as soon as its peer listens. Raises zmq.ZMQError for an invalid address.

    Its handshakes are watched from the first one on, because libzmq does not connect again after its key was refused.

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
    handshakes = Handshakes(socket)
    try:
        if own is not None and server:
            connect_with(socket, own, server)
        socket.ipv6 = config.is_ipv6(address)
        socket.connect(address)
    except zmq.ZMQError:
        handshakes.close()
        socket.close(linger=0)
        raise
    return socket, handshakes


class _Connection(NamedTuple):
    key: str
    descriptor: int
    peer: Any  # address and port, by which a descriptor that was closed and used again is told apart

    @property
    def is_open(self) -> bool:
        try:
            return bool(_peer(self.descriptor) == self.peer)
        except OSError:
            return False


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
        self._rate, self._owner_rate = connection_rates()
        self._admitted: Counter[str] = Counter()  # by key: the highest possible number of open connections
        self._count_at = 0.0
        self._guarded: list[zmq.Socket[Any]] = []
        self._connections: OrderedDict[bytes, _Connection] = OrderedDict()  # by ZeroMQ's route
        self._look_at = 0.0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.bind(_ZAP)
        # Two descriptors for a flood, when none is left: a socket without connection, and a place for duplicates.
        self._nothing = sockets.socket().detach()
        self._place = os.dup(self._nothing)

    def guard(self, socket: zmq.Socket[Any]) -> None:
        """Require keys on a listening socket; to be called before bind(), and after its MAXMSGSIZE was set."""
        self._guarded.append(socket)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_LIMIT)
        socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        if self._pair is not None:
            socket.curve_server = True
            socket.curve_secretkey = self._pair.secret.encode()
            socket.zap_domain = b"larpixdaq"
            limit = int(socket.getsockopt(zmq.MAXMSGSIZE))
            if limit > 0:
                socket.setsockopt(zmq.MAXMSGSIZE, limit + _OVERHEAD)

    def answer(self) -> None:
        """Answer libzmq's questions about new connections, and close some of those that are not admitted."""
        now = time.monotonic()
        if self._pair is not None and now >= self._look_at:
            self._look_at = now + _LOOK_INTERVAL
            for guarded in self._guarded:
                self._limit_strangers(guarded)
        for _ in range(_TURN):
            try:
                version, request, _, address, _, mechanism, *keys = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            key = z85.encode(keys[0]).decode() if mechanism == b"CURVE" and len(keys) == 1 else ""
            name = self._whose(key) if key else None
            status, text = b"200", b"OK"
            if name is None:
                self._refuse(address.decode("ascii", "replace"))
                status, text = b"400", b"unknown key"
            elif limit := self._reached(key, name):
                self.limits.reached(name or "the core's own user", limit)
                status, text = b"300", limit.encode()
            else:
                self._admitted[key] += 1
            self.socket.send_multipart([version, request, status, text, key.encode() if status == b"200" else b"", b""])

    def _reached(self, key: str, name: str) -> str:
        """Return the limit that another connection of a key exceeds; "" if none."""
        if not (self._rate if name else self._owner_rate).passes(key, 1):
            return "new connections a second"
        most = OPEN if name else OPEN_OWNER
        if self._admitted[key] < most or (time.monotonic() >= self._count_at and self._has_room(key, most)):
            return ""
        return f"{most} open connections"

    def _has_room(self, key: str, most: int) -> bool:
        """Count the open connections, and return whether a key may have another one.

        libzmq does not tell whose the connections are that have not sent a message yet. If they may be too many, all of
        them are closed: who wants to work connects again and sends at once.
        """
        begun = time.monotonic()
        self._connections = OrderedDict((route, one) for route, one in self._connections.items() if one.is_open)
        self._admitted = Counter(one.key for one in self._connections.values())
        silent = self._silent()
        now = time.monotonic()
        self._count_at = now + 10 * (now - begun)  # so that counting takes a tenth of the time at most
        try:
            if self._admitted[key] + len(silent) <= most:  # the one in question is among the silent ones
                self._admitted[key] += len(silent) - 1
                return True
            for connection in silent:
                with suppress(OSError):
                    connection.shutdown(sockets.SHUT_RDWR)
            return False
        finally:
            for connection in silent:
                connection.close()

    def _silent(self) -> list[sockets.socket]:
        """Duplicates of the connections to the guarded sockets over which no message has come yet."""
        known = {one.peer for one in self._connections.values()}
        ports = {int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]) for socket in self._guarded}
        found = []
        for entry in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if not stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                    continue
                connection = sockets.socket(fileno=os.dup(int(entry)))
                try:
                    is_tcp = connection.family in (sockets.AF_INET, sockets.AF_INET6)
                    if is_tcp and connection.getsockname()[1] in ports and connection.getpeername() not in known:
                        found.append(connection)
                        continue
                except OSError:  # it listens, or was closed meanwhile
                    pass
                connection.close()
        return found

    def _refuse(self, address: str, why: str = "with an unknown key") -> None:
        self.refused += 1
        self.last_refused = address
        self._unsaid += 1
        now = time.monotonic()
        if now >= self._say_at:  # at most one line a second, however many come
            _log.warning("%s: refused a connection from %s %s (%d refused)", self._what, address, why, self._unsaid)
            self._unsaid, self._say_at = 0, now + 1.0

    def _limit_strangers(self, socket: zmq.Socket[Any]) -> None:
        """Close connections that were not admitted, if there are too many: any of them, for at most _LOOK_LIMIT."""
        until = time.thread_time() + _LOOK_LIMIT
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
        except OSError:  # no descriptor is left for the listing
            descriptors = list(range(min(limit, _MANY)))
        left = len(descriptors) - min(_ENOUGH, limit // 4)
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if left <= 0 or not endpoint.startswith("tcp://"):
            return
        random.shuffle(descriptors)
        with _Probe(self._place, self._nothing, int(endpoint.rpartition(":")[2])) as probe:
            for descriptor in descriptors:
                if (peer := probe.stranger(descriptor)) is not None:
                    probe.shut_down()
                    self._refuse(peer[0], "without a key")
                    left -= 1
                if not left or time.thread_time() >= until:
                    break

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
        key = str(frame.get("User-Id"))
        descriptor = int(frame.get(zmq.SRCFD))
        with suppress(OSError):
            self._connections[route] = _Connection(key, descriptor, _peer(descriptor))
            if len(self._connections) > _REMEMBERED:
                self._connections.popitem(last=False)
        return key

    def key_of(self, frame: zmq.Frame) -> str:
        """The public key with which a frame came over a socket without routes; "" without keys. Takes about 30 µs."""
        if self._pair is None:
            return ""
        key = str(frame.get("User-Id"))
        descriptor = int(frame.get(zmq.SRCFD))
        route = descriptor.to_bytes(4, "little")
        known = self._connections.get(route)
        if known is None or known.key != key or not known.is_open:
            with suppress(OSError):
                self._connections[route] = _Connection(key, descriptor, _peer(descriptor))
        return key

    def disconnect(self, key: str) -> list[bytes]:
        """Close the connections of a key that is not admitted any more; their routes."""
        found = [(route, one) for route, one in self._connections.items() if one.key == key]
        for route, one in found:
            del self._connections[route]
            with suppress(OSError), sockets.socket(fileno=os.dup(one.descriptor)) as connection:
                if connection.getpeername() == one.peer:
                    connection.shutdown(sockets.SHUT_RDWR)
        self._admitted.pop(key, None)
        return [route for route, _ in found]

    def close(self) -> None:
        os.close(self._place)
        os.close(self._nothing)
        self.socket.close(0)


class _Probe:
    """Looks at connections through a duplicate, because libzmq's thread may close and reuse a descriptor at any time.

    The duplicate replaces the descriptor `place`, because no other may be free; in the end `nothing` replaces it.
    """

    def __init__(self, place: int, nothing: int, port: int) -> None:
        self._place, self._nothing, self._port = place, nothing, port
        # The family only says how long an address may be.
        self._socket = sockets.socket(sockets.AF_INET6, sockets.SOCK_STREAM, 0, place)

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.detach()
        os.dup2(self._nothing, self._place, inheritable=False)

    def stranger(self, descriptor: int) -> Any:
        """Return the peer's address if this is a connection to the port that was not admitted yet; else None."""
        try:
            if descriptor != self._place:
                os.dup2(descriptor, self._place, inheritable=False)
            info = self._socket.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _BYTES_ACKED.size)
            if _BYTES_ACKED.unpack(info)[0] >= _ADMITTED_BYTES or self._socket.getsockname()[1] != self._port:
                return None
            return self._socket.getpeername()
        except (OSError, struct.error):  # closed, no TCP connection, the listening socket, or a system without tcp_info
            return None

    def shut_down(self) -> None:
        """Shut down the connection that was looked at last; libzmq's thread then closes it."""
        with suppress(OSError):
            self._socket.shutdown(sockets.SHUT_RDWR)


def _peer(descriptor: int) -> Any:
    with sockets.socket(fileno=os.dup(descriptor)) as connection:
        return connection.getpeername()


class Handshakes:
    """Tells why a connecting socket gets no connection: the other side refuses its key, or is no one it knows.

    To be made before connect(), so that no refusal is missed. look() must be called several times a minute, because
    libzmq's thread waits when a thousand events wait.
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
