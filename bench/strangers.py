"""Attacks of strangers, who know all addresses and public keys but have no key that the system knows (see attack.py).

Each function works until a monotonic time, and returns its attempts by kind, or for a flood their number.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  (strangers cannot read files of the interpreter, and host names need it)
import logging
import os
import resource
import select
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import msgspec
import zmq
from common import STEP

from larpixdaq.control.log_shipping import LogRecord
from larpixdaq.keys.curve import KeyPair, connect_with, new_pair
from larpixdaq.protocol import control, stream

#: Seconds to wait for the end of a handshake, and in which a port must close connections that do nothing.
HANDSHAKE, CLOSED_AFTER = 1.0, 8.0
ENTRIES = {"core": zmq.DEALER, "stream": zmq.DEALER, "log": zmq.PUSH}
EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
EVENTS |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
#: The beginning of ZeroMQ's greeting, and what follows it up to the name of the mechanism.
SIGNATURE, VERSION = b"\xff" + bytes(8) + b"\x7f", b"\x03\x01"
FLOODS = ("connections", "garbage", "handshakes with unknown keys")


class Port(NamedTuple):
    """A listening socket of the system under attack; `key`: its public key."""

    name: str
    address: str
    key: str

    def open(self, seconds: float) -> socket.socket:
        """Connect over TCP."""
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        return socket.create_connection((host, int(port)), seconds)

    def make_socket(self, context: zmq.Context[Any], pair: KeyPair | None, server: str = "") -> zmq.Socket[Any]:
        """Make a socket for connect(), with a key pair for the server with the public key `server`, by default this."""
        made = context.socket(ENTRIES[self.name])
        made.linger = 0
        made.sndtimeo = 200
        made.setsockopt(zmq.CONNECT_TIMEOUT, 2000)
        if pair is not None:
            connect_with(made, pair, server or self.key)
        return made

    def messages(self, session: str = "made up", name: str = "Offline storage") -> dict[str, Any]:
        """Return valid messages of each kind, by what they would do."""
        Request = control.ActionRequest
        if self.name == "core":
            return {
                "register": control.Register(name=name, kind="storage", instance="i", info={"directory": "/tmp"}),
                "open a session": control.Open(name=name, instance="i"),
                "heartbeat": control.Heartbeat(session=session, progress=1, status={"packets": 1}),
                "command": Request(session=session, request="r1", action="end_run"),
                "command a component": Request(
                    session=session, request="r2", action="power_up", params={"io_group": 1}, kind="producer"
                ),
                "look": Request(session=session, request="r3", action="packets", params={"n": 5}, kind="run_data"),
                "answer": control.Answer(session=session, request="r4", kind="result", value=control.packed([1, 2.5])),
                "join": control.Join(public=new_pair().public),
                "say goodbye": control.Bye(session=session),
            }
        if self.name == "stream":
            position = stream.Position(1, "LArPix board", 1, 5)
            return {
                "subscribe": stream.Hello(stream.STREAM_VERSION, name, session, "latest", [position]),
                "subscribe as a storage": stream.Hello(stream.STREAM_VERSION, name, session, "all", [position]),
                "acknowledge": stream.Ack(1, 1, 1 << 40),
                "credit": stream.Credit(3),
                "map the ring": stream.Maps(1),
                "say goodbye": stream.Bye(),
            }
        return {"log": LogRecord(time.time(), logging.ERROR, name, "a forged line")}

    def pack(self, message: Any) -> bytes:
        if self.name == "core":
            return control.pack(message)
        return stream.pack(message) if self.name == "stream" else msgspec.msgpack.encode(message)


@dataclass
class Tries:
    """Attempts of one kind. `through`: descriptions of attempts that were not refused."""

    tries: int = 0
    refused: int = 0
    through: list[str] = field(default_factory=list)

    def count(self, refused: bool, what: str = "") -> None:
        self.add(Tries(1, int(refused), [] if refused else [what]))

    def add(self, other: Tries) -> None:
        self.tries, self.refused = self.tries + other.tries, self.refused + other.refused
        self.through = list(dict.fromkeys([*self.through, *other.through]))[:20]


Found = defaultdict[str, Tries]


class Handshake:
    """A connection with a key, or without one, whose handshake is watched."""

    def __init__(self, context: zmq.Context[Any], port: Port, pair: KeyPair | None, server: str = "") -> None:
        self.socket = port.make_socket(context, pair, server)
        self._monitor = self.socket.get_monitor_socket(EVENTS)
        self.socket.connect(port.address)

    def admitted(self, seconds: float) -> bool | None:
        """Wait for the end of the handshake. None when it has not ended."""
        if not self._monitor.poll(max(0.0, seconds) * 1000):
            return None
        return int.from_bytes(self._monitor.recv_multipart()[0][:2], "little") == zmq.EVENT_HANDSHAKE_SUCCEEDED

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(0)


def keyless(ports: list[Port], until: float) -> Found:
    """Connect without key, with an unknown one, and for a wrong server, and send all messages of each port."""
    found = Found(Tries)
    context: zmq.Context[Any] = zmq.Context()
    kinds: dict[str, Callable[[], tuple[KeyPair | None, str]]] = {
        "no key": lambda: (None, ""),
        "an unknown key": lambda: (new_pair(), ""),
        "a wrong server key": lambda: (new_pair(), new_pair().public),
    }
    while time.monotonic() < until:
        for kind, make in kinds.items():
            for port in ports:
                made = Handshake(context, port, *make())
                messages = port.messages()
                for message in messages.values():  # they wait in the socket for the end of the handshake
                    with contextlib.suppress(zmq.Again):  # it has been refused already
                        made.socket.send(port.pack(message), zmq.NOBLOCK)
                admitted = made.admitted(HANDSHAKE)
                answered = made.socket.type == zmq.DEALER and made.socket.poll(0) != 0
                for what in messages:
                    refused = not (admitted or answered)
                    found[f"{port.name}: {what}, with {kind}"].count(refused, "a connection was made")
                made.close()
    context.destroy(0)
    return found


def raw(ports: list[Port], until: float) -> Found:
    """Send bytes over TCP that are not ZeroMQ, or break its protocol."""
    kinds = {
        "random bytes": lambda: os.urandom(5000),
        "a GET request": lambda: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(64),
        "a greeting without keys": lambda: SIGNATURE + VERSION + b"NULL" + bytes(48) + b"\x04\x19\x05READY" + bytes(30),
        "a greeting, then random bytes": lambda: broken_greeting(300),
    }
    found = Found(Tries)
    while time.monotonic() < until:
        for port in ports:
            for kind, make in kinds.items():
                with port.open(STEP) as connection:
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(make())
                    closed = _closes(connection, CLOSED_AFTER)
                found[f"{port.name}: {kind}"].count(closed, f"open after {CLOSED_AFTER:g} s")
    return found


def broken_greeting(more: int) -> bytes:
    """Return a greeting with CURVE, and `more` random bytes."""
    return SIGNATURE + VERSION + b"CURVE" + bytes(47) + os.urandom(more)


def _closes(connection: socket.socket, limit: float) -> bool:
    """Return whether the other side closes a connection in `limit` seconds."""
    end = time.monotonic() + limit
    with contextlib.suppress(ConnectionError):
        while (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            try:
                if not connection.recv(4096):
                    return True
            except TimeoutError:
                return False
        return False
    return True


def half_open(ports: list[Port], until: float) -> Found:
    """Hold as many connections open without a handshake as this process may, some of them with a half greeting."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found, open_now = Found(Tries), Counter[str]()
    room = (min(hard, 60_000) - 100) // len(ports)
    held: dict[int, tuple[socket.socket, str]] = {}
    poller = select.epoll()

    def note(name: str, closed: bool) -> None:
        found[f"{name}: a connection without handshake, held open"].count(closed, f"open after {CLOSED_AFTER:g} s")

    def let_go(wait: float) -> None:
        for descriptor, _ in poller.poll(wait):
            connection, name = held[descriptor]
            with contextlib.suppress(ConnectionError):
                if connection.recv(4096):  # the port's greeting
                    continue
            poller.unregister(descriptor)
            connection.close()
            del held[descriptor]
            open_now[name] -= 1
            note(name, True)

    while time.monotonic() < until:
        for port in ports:
            for n in range(min(100, room - open_now[port.name])):
                with contextlib.suppress(OSError):  # no room in the kernel's queue: tried again
                    connection = port.open(0.2)
                    connection.setblocking(False)
                    held[connection.fileno()] = connection, port.name
                    open_now[port.name] += 1
                    poller.register(connection, select.EPOLLIN)
                    if n % 2:
                        connection.send(SIGNATURE + VERSION[:1])
            let_go(0)
    end = time.monotonic() + CLOSED_AFTER
    while held and time.monotonic() < end:
        let_go(0.1)
    for connection, name in held.values():
        note(name, False)
        connection.close()
    poller.close()
    return found


def files(paths: list[tuple[str, str]], pids: dict[str, int], until: float) -> Found:
    """Read and write files, list and change directories; `paths`: what a path is, and the path."""

    def opened(path: str, flags: int = os.O_RDONLY) -> None:
        os.close(os.open(path, flags | os.O_NONBLOCK))

    def made(path: str) -> None:
        new = os.path.join(path, "stranger")
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(new)

    attempts: list[tuple[str, str, Callable[[], object]]] = []  # what, where, and the attempt
    for what, path in paths:
        if what == "directory":
            attempts.append(("files: list a directory", path, partial(os.listdir, path)))
            attempts.append(("files: make a file in a directory", path, partial(made, path)))
        else:
            attempts.append((f"files: read {what}", path, partial(opened, path)))
            attempts.append((f"files: write {what}", path, partial(opened, path, os.O_WRONLY)))
    for name, pid in pids.items():
        for entry in ("mem", "environ", "maps"):
            path = f"/proc/{pid}/{entry}"
            attempts.append(("processes: memory and environment", f"{name}: {path}", partial(opened, path)))
        attempts.append(("processes: descriptors", name, partial(os.listdir, f"/proc/{pid}/fd")))
        attempts.append(("processes: signal", name, partial(os.kill, pid, 0)))
    found = Found(Tries)
    while time.monotonic() < until:
        for what, where, attempt in attempts:
            try:
                attempt()
            except OSError:
                found[what].count(True)
            else:
                found[what].count(False, where)
    return found


def flood(port: Port, how: str, pair: KeyPair | None, until: float) -> int:
    """Open connections and close them again as fast as possible; `how`: one of FLOODS, or handshakes with `pair`."""
    made = 0
    if how in ("connections", "garbage"):
        while time.monotonic() < until:
            with contextlib.suppress(OSError), port.open(0.5) as connection:
                made += 1
                if how == "garbage":
                    connection.sendall(broken_greeting(2000))
        return made
    context: zmq.Context[Any] = zmq.Context()
    try:
        while time.monotonic() < until:
            batch = [Handshake(context, port, pair or new_pair()) for _ in range(20)]
            for one in batch:
                made += one.admitted(until - time.monotonic()) is not None
                one.close()
    finally:
        context.destroy(0)
    return made
