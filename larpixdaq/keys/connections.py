"""The connections of a process's listening sockets: counted, limited and closed by their descriptors.

libzmq neither lists its connections nor closes one of them, and has no limit for them. So they are looked for among the
descriptors of the process.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import socket as sockets
import stat
import struct
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import zmq

from larpixdaq.keys.peer_limits import OPEN, OPEN_OWNER, connection_rates

#: Descriptors of this process up to which all connections stay open, or a quarter of the maximum. Above it, connections
#: that were not admitted are closed, because without descriptors the process cannot open files.
_ENOUGH: Final = 1024
#: Open connections of everybody above which invited keys get no further ones, or a quarter of the maximum number of
#: descriptors: then the core's own user, strangers, and files have the rest. One invited key gets a part of them.
_TOGETHER: Final = 4096
_PART: Final = 16
#: Descriptors that are tried when they cannot be listed.
_MANY: Final = 1 << 16
#: Bytes of a message that has not ended, in addition to the longest one, above which its connection is closed.
UNFINISHED: Final = 1 << 20
#: Maximum processor seconds of a look for strangers.
_LOOK_LIMIT: Final = 0.02
#: Bytes that only an admitted peer gets: greeting 64, WELCOME 170, READY 52 or more. Others get ERROR, 14 at most.
_ADMITTED_BYTES: Final = 260
#: Places of tcpi_bytes_acked and tcpi_bytes_received in Linux' struct tcp_info.
TCP_BYTES: Final = struct.Struct("120xQQ")
_DESCRIPTORS: Final = "/proc/self/fd"


class _Connection(NamedTuple):
    descriptor: int
    peer: Any  # address and port, by which a descriptor that was closed and used again is told apart
    key: str = ""


class _Seen(NamedTuple):
    connection: _Connection
    is_admitted: bool
    received: int  # bytes since its beginning


class _Unfinished(NamedTuple):
    """What a connection had received when a message of it last came, and whether it has received too much since."""

    received: int  # bytes
    is_long: bool


class Connections:
    """The connections to the listening sockets of one context. Used by the loop that polls these sockets alone."""

    def __init__(self) -> None:
        self._listening: list[zmq.Socket[Any]] = []
        self._known: dict[bytes, _Connection] = {}  # by ZeroMQ's route, those that have sent a message
        self._rate, self._owner_rate = connection_rates()
        self._admitted: Counter[str] = Counter()  # by key: the highest possible number of open connections
        self._count_at = 0.0
        self._longest = 0
        self._heard: set[bytes] = set()  # routes of messages since the last look at unfinished ones
        self._unfinished: dict[Any, _Unfinished] = {}  # by the peer's address
        # A descriptor is looked at through a duplicate, because libzmq's thread may close it and use its number again
        # at any time. The duplicate has a fixed place, because in a flood no other descriptor may be left.
        self._nothing = sockets.socket()
        # The family only says how long an address may be.
        self._duplicate = sockets.socket(sockets.AF_INET6, sockets.SOCK_STREAM, 0, os.dup(self._nothing.fileno()))

    def watch(self, socket: zmq.Socket[Any], longest: int) -> None:
        """Add a listening socket. `longest`: maximum bytes of a message, with all its parts."""
        self._listening.append(socket)
        self._longest = max(self._longest, longest)

    def close(self) -> None:
        self._duplicate.close()
        self._nothing.close()

    # Whose they are

    def key(self, route: bytes) -> str | None:
        """The key of a connection over which a message has just come; None if it was not noted yet."""
        self._heard.add(route)
        known = self._known.get(route)
        return None if known is None else known.key

    def note(self, route: bytes, key: str, descriptor: int) -> None:
        """Note that a message with this key has come over this descriptor."""
        peer = self._peer(descriptor)
        if peer is not None:  # not closed meanwhile
            self._known[route] = _Connection(descriptor, peer, key)

    def is_open(self, route: bytes) -> bool:
        """Whether a connection was noted and is still the same."""
        known = self._known.get(route)
        return known is not None and self._peer(known.descriptor) == known.peer

    def heard_keys(self) -> set[str]:
        """The keys of all connections that were noted, perhaps also of closed ones."""
        return {known.key for known in self._known.values()}

    def disconnect(self, key: str) -> list[bytes]:
        """Close the connections of a key over which messages have come; their routes."""
        routes = [route for route, known in self._known.items() if known.key == key]
        for route in routes:
            self._shut_down(self._known.pop(route))
        self._admitted.pop(key, None)
        return routes

    # How many there may be

    def admit(self, key: str, *, owner: bool) -> str:
        """Count another connection of a key, which is open already; "". Otherwise the limit that it exceeds.

        `owner`: the key is that of the core's own user.
        """
        if not (self._owner_rate if owner else self._rate).passes(key, 1):
            return "new connections a second"
        limit = self._exceeded(key, owner)
        if limit and time.monotonic() >= self._count_at:
            limit = self._count(key, owner)
        if not limit:
            self._admitted[key] += 1
        return limit

    def _exceeded(self, key: str, owner: bool, more: int = 0) -> str:
        """The limit that another connection of a key exceeds, with `more` that may be its own; "" if none."""
        together = min(_TOGETHER, _descriptor_limit() // 4)
        most = OPEN_OWNER if owner else max(1, min(OPEN, together // _PART))
        if self._admitted[key] + more >= most:
            return f"{most} open connections"
        if not owner and self._admitted.total() + more >= together:
            return f"{together} open connections of all keys"
        return ""

    def _count(self, key: str, owner: bool) -> str:
        """Count the open connections; as _exceeded().

        libzmq does not tell whose the connections are that have not sent a message yet. If they may be too many, all of
        them are closed: a peer with work to do connects again and sends at once.
        """
        begun = time.monotonic()
        self._known = {route: known for route, known in self._known.items() if self.is_open(route)}
        self._admitted = Counter(known.key for known in self._known.values())
        limit = self._exceeded(key, owner)
        if not limit:
            peers = {known.peer for known in self._known.values()}
            silent = [seen.connection for seen in self._walk(_descriptors()) if seen.connection.peer not in peers]
            more = max(0, len(silent) - 1)  # without the one in question
            limit = self._exceeded(key, owner, more)
            if limit:
                for connection in silent:
                    self._shut_down(connection)
            else:
                self._admitted[key] += more
        now = time.monotonic()
        self._count_at = now + 10 * (now - begun)  # so that counting takes a tenth of the time at most
        return limit

    def limit_strangers(self) -> list[str]:
        """Close connections that were not admitted, if there are too many: any of them, for at most _LOOK_LIMIT.

        Returns the addresses of their peers.
        """
        enough = min(_ENOUGH, _descriptor_limit() // 4)
        if 0 < _number() <= enough:
            return []
        closed: list[str] = []
        descriptors = _descriptors()
        until = time.thread_time() + _LOOK_LIMIT
        left = len(descriptors) - enough
        if left > 0:
            random.shuffle(descriptors)
            for seen in self._walk(descriptors):
                if not seen.is_admitted:
                    self._shut_down(seen.connection)
                    closed.append(seen.connection.peer[0])
                if len(closed) == left or time.thread_time() >= until:
                    break
        return closed

    def limit_unfinished(self) -> list[str]:
        """Close connections over which a message comes that is too long; their keys, "" if not known.

        libzmq keeps the parts of a message until the last one has come, however many they are. To be called while
        messages are taken: a connection is closed when none of it has come between two looks.
        """
        heard = {self._known[route].peer for route in self._heard if route in self._known}
        self._heard.clear()
        keys = {known.peer: known.key for known in self._known.values()}
        before, self._unfinished = self._unfinished, {}
        closed = []
        for seen in self._walk(_descriptors()):
            peer = seen.connection.peer
            start, suspect = before.get(peer, _Unfinished(0, False))
            if peer in heard:
                start, suspect = seen.received, False
            is_long = seen.received - start > self._longest + UNFINISHED
            if is_long and suspect:
                self._shut_down(seen.connection)
                closed.append(keys.get(peer, ""))
            self._unfinished[peer] = _Unfinished(start, is_long)
        return closed

    # Descriptors

    def _walk(self, descriptors: list[int]) -> Iterator[_Seen]:
        """Each TCP connection to the listening sockets among these descriptors."""
        endpoints = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in self._listening]
        ports = {int(one.rpartition(":")[2]) for one in endpoints if one.startswith("tcp://")}
        for descriptor in descriptors:
            if descriptor == self._duplicate.fileno():
                continue
            try:
                self._look_at(descriptor)
                info = self._duplicate.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, TCP_BYTES.size)
                if self._duplicate.getsockname()[1] not in ports:
                    continue
                peer = self._duplicate.getpeername()
            except OSError:  # no TCP connection, the listening socket, or closed meanwhile
                continue
            finally:
                self._look_away()
            # A system without these numbers does not tell strangers.
            sent, received = TCP_BYTES.unpack(info) if len(info) == TCP_BYTES.size else (_ADMITTED_BYTES, 0)
            yield _Seen(_Connection(descriptor, peer), sent >= _ADMITTED_BYTES, received)

    def _peer(self, descriptor: int) -> Any:
        """The peer's address of a connection; None if it is closed."""
        try:
            self._look_at(descriptor)
            return self._duplicate.getpeername()
        except OSError:
            return None
        finally:
            self._look_away()

    def _shut_down(self, connection: _Connection) -> None:
        """Shut down a connection, unless it was closed; libzmq's thread then closes it."""
        try:
            self._look_at(connection.descriptor)
            if self._duplicate.getpeername() == connection.peer:
                self._duplicate.shutdown(sockets.SHUT_RDWR)
        except OSError:
            pass
        finally:
            self._look_away()

    def _look_at(self, descriptor: int) -> None:
        """Duplicate the descriptor of a socket; OSError if it is none, or not in use.

        Never that of a file, because closing the duplicate would end the locks of SQLite.
        """
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        os.dup2(descriptor, self._duplicate.fileno(), inheritable=False)

    def _look_away(self) -> None:
        """Give the duplicate up, because it keeps a connection open that libzmq has closed."""
        os.dup2(self._nothing.fileno(), self._duplicate.fileno(), inheritable=False)


def _descriptor_limit() -> int:
    """Maximum number of descriptors of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _number() -> int:
    """Number of this process's descriptors; 0 where the kernel does not tell it, which it does since Linux 6.2."""
    try:
        return os.stat(_DESCRIPTORS).st_size
    except OSError:
        return 0


def _descriptors() -> list[int]:
    """The descriptors of this process, or, if none is left for the listing, those that may be."""
    try:
        return [int(name) for name in os.listdir(_DESCRIPTORS)]
    except OSError:
        return list(range(min(_descriptor_limit(), _MANY)))
