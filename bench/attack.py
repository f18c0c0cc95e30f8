"""Attack a running line from outside, and report what was refused, and whether data or heartbeats suffered.

    python bench/attack.py [--seconds S] [--frames N] [--flood S] [--rate R] [--limit S] [--seed S]
                           [--update docs/security.md] [--json]

Emulated PACMANs send R packets/s through producer and storage in one run, which is attacked in three ways:

strangers  Another user of this host (uid 65534; needs root) knows all addresses and public keys. For S seconds it tries
           to register, command, subscribe, acknowledge and log without key, with an unknown key and for a wrong server,
           sends raw bytes and GET requests, holds connections open without a handshake, and opens all files and
           directories of the system and of its processes.
members    N mutated frames are sent to each port with a key of the lowest role: of an observer to the core, of a
           component to stream and log. They are made from valid messages of each kind.
floods     Members and strangers send as fast as they can, --flood seconds each, from two processes.

A heartbeat of one more component is sent every 250 ms; its slowest answer is reported. The exit status is 1 when an
attempt was not refused, a process ended or was reported lost or stuck, the state changed, a packet was lost, or an
answer took longer than --limit. As another user than root the strangers are of the same user, and leave files and
processes alone.
"""

from __future__ import annotations

import argparse
import contextlib
import encodings.idna  # noqa: F401  (strangers cannot read files of the interpreter, and host names need it)
import json
import logging
import multiprocessing
import os
import random
import resource
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
from common import STEP, argument_parser, begin_run, machine, update, with_source
from emulated_board import Emulator
from loss_accounting import parts_of, tally
from processes import until as wait_until
from system import System, system

from larpixdaq.control.log_shipping import LogRecord
from larpixdaq.control.node import Node
from larpixdaq.keys import credentials
from larpixdaq.keys.curve import KeyPair, connect_with, new_pair
from larpixdaq.operator import Operator
from larpixdaq.protocol import control, stream
from larpixdaq.runtime import launcher

MARK = "attacks on one host"
#: User id of strangers.
NOBODY = 65534
#: Seconds to wait for the end of a handshake, and in which a port must close connections that do nothing.
HANDSHAKE, CLOSED_AFTER = 1.0, 8.0
OBSERVER, COMPONENT = "onlooker", "Second monitor"
PROCESSES = {"core": "core", "stream": "producer", "log": "log"}
ENTRIES = {"core": zmq.DEALER, "stream": zmq.DEALER, "log": zmq.PUSH}
encode = msgspec.msgpack.encode


class Port(NamedTuple):
    """A listening socket of the system under attack; `key`: its public key."""

    name: str
    address: str
    key: str

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        return host, int(port)

    def connect(self, context: zmq.Context[Any], pair: KeyPair | None, server: str = "") -> zmq.Socket[Any]:
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
        return stream.pack(message) if self.name == "stream" else encode(message)


# Strangers


@dataclass
class Tries:
    """Attempts of one kind. `through`: descriptions of attempts that were not refused."""

    tries: int = 0
    refused: int = 0
    through: list[str] = field(default_factory=list)

    def count(self, refused: bool, what: str = "") -> None:
        self.tries += 1
        self.refused += refused
        if not refused and len(self.through) < 20:
            self.through.append(what)

    def add(self, other: Tries) -> None:
        self.tries, self.refused = self.tries + other.tries, self.refused + other.refused
        self.through = list(dict.fromkeys([*self.through, *other.through]))[:20]


Found = dict[str, Tries]


def keyless(ports: list[Port], until: float) -> Found:
    """Connect without key, with an unknown one, and for a wrong server, and send all messages of each port."""
    found: Found = {}
    context: zmq.Context[Any] = zmq.Context()
    kinds: dict[str, Callable[[], tuple[KeyPair | None, str]]] = {
        "no key": lambda: (None, ""),
        "an unknown key": lambda: (new_pair(), ""),
        "a wrong server key": lambda: (new_pair(), new_pair().public),
    }
    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    events |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    while time.monotonic() < until:
        for kind, make in kinds.items():
            for port in ports:
                pair, server = make()
                made = port.connect(context, pair, server)
                monitor = made.get_monitor_socket(events)
                made.connect(port.address)
                messages = port.messages()
                for message in messages.values():  # they wait in the socket for the end of the handshake
                    with contextlib.suppress(zmq.Again):  # it has been refused already
                        made.send(port.pack(message), zmq.NOBLOCK)
                admitted = False
                if monitor.poll(HANDSHAKE * 1000):
                    event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
                    admitted = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
                answered = made.type == zmq.DEALER and made.poll(0) != 0
                for what in messages:
                    entry = found.setdefault(f"{port.name}: {what}, with {kind}", Tries())
                    entry.count(not (admitted or answered), "a connection was made")
                made.disable_monitor()
                monitor.close(0)
                made.close(0)
    context.destroy(0)
    return found


def closes(connection: socket.socket, limit: float) -> bool:
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


def raw(ports: list[Port], until: float) -> Found:
    """Send bytes over TCP that are not ZeroMQ, or break its protocol."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01"
    kinds = {
        "random bytes": lambda: os.urandom(5000),
        "a GET request": lambda: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(64),
        "a greeting without keys": lambda: greeting + b"NULL" + bytes(48) + b"\x04\x19\x05READY" + bytes(30),
        "a greeting, then random bytes": lambda: greeting + b"CURVE" + bytes(47) + os.urandom(300),
    }
    found: Found = {}
    while time.monotonic() < until:
        for port in ports:
            for kind, make in kinds.items():
                with socket.create_connection(port.host_and_port, STEP) as connection:
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(make())
                    closed = closes(connection, CLOSED_AFTER)
                found.setdefault(f"{port.name}: {kind}", Tries()).count(closed, f"open after {CLOSED_AFTER:g} s")
    return found


def half_open(ports: list[Port], until: float) -> Found:
    """Hold as many connections open without a handshake as this process may, some of them with a half greeting."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found, open_now = {port.name: Tries() for port in ports}, Counter[str]()
    room = (min(hard, 60_000) - 100) // len(ports)
    held: dict[int, tuple[socket.socket, str]] = {}
    poller = select.epoll()

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
            found[name].count(True)

    while time.monotonic() < until:
        for port in ports:
            for n in range(min(100, room - open_now[port.name])):
                with contextlib.suppress(OSError):  # no room in the kernel's queue: tried again
                    connection = socket.create_connection(port.host_and_port, 0.2)
                    connection.setblocking(False)
                    held[connection.fileno()] = connection, port.name
                    open_now[port.name] += 1
                    poller.register(connection, select.EPOLLIN)
                    if n % 2:
                        connection.send(b"\xff" + bytes(8) + b"\x7f\x03")
            let_go(0)
    end = time.monotonic() + CLOSED_AFTER
    while held and time.monotonic() < end:
        let_go(0.1)
    for connection, name in held.values():
        found[name].count(False, f"open after {CLOSED_AFTER:g} s")
        connection.close()
    poller.close()
    return {f"{name}: a connection without handshake, held open": tries for name, tries in found.items()}


def files(paths: list[tuple[str, str]], pids: dict[str, int], until: float) -> Found:
    """Read and write files, list and change directories; `paths`: what a path is, and the path."""
    found: Found = {}

    def attempt(what: str, path: str, do: Callable[[], object]) -> None:
        entry = found.setdefault(what, Tries())
        try:
            do()
        except OSError:
            entry.count(True)
        else:
            entry.count(False, path)

    def opened(path: str, flags: int) -> None:
        os.close(os.open(path, flags | os.O_NONBLOCK))

    def made(path: str) -> None:
        new = os.path.join(path, "stranger")
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(new)

    while time.monotonic() < until:
        for what, path in paths:
            if what == "directory":
                attempt("files: list a directory", path, lambda path=path: os.listdir(path))  # type: ignore[misc]
                attempt("files: make a file in a directory", path, lambda path=path: made(path))  # type: ignore[misc]
                continue
            attempt(f"files: read {what}", path, lambda path=path: opened(path, os.O_RDONLY))  # type: ignore[misc]
            attempt(f"files: write {what}", path, lambda path=path: opened(path, os.O_WRONLY))  # type: ignore[misc]
        for name, pid in pids.items():
            for entry in ("mem", "environ", "maps"):
                path = f"/proc/{pid}/{entry}"
                attempt(
                    "processes: memory and environment",
                    f"{name}: {path}",
                    lambda path=path: opened(path, os.O_RDONLY),  # type: ignore[misc]
                )
            attempt("processes: descriptors", name, lambda pid=pid: os.listdir(f"/proc/{pid}/fd"))  # type: ignore[misc]
            attempt("processes: signal", name, lambda pid=pid: os.kill(pid, 0))  # type: ignore[misc]
    return found


# Members

EXTREMES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**48, 2**56, 2**63 - 1, 2**64 - 1, -(2**63), 1e308, -0.0, float("nan"), float("inf"),
    "", "x", "x" * 65, "x" * 70_000, "\x00\x1b[2J\n", "\u202e\U0010ffff", "all", b"", b"\xff" * 300, [], {}, [[]] * 300,
    [[1, "b", 1, 1]] * 300, {"a": {"b": {}}}, {str(n): n for n in range(300)}, msgspec.msgpack.Ext(1, b"\xc1"),
    msgspec.msgpack.Ext(1, encode([[["f", "u1"]], [2**62], b""])), msgspec.msgpack.Ext(-1, bytes(8)),
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


class Mutator:
    """Makes mutated frames from valid messages."""

    def __init__(self, port: Port, messages: list[Any], dice: random.Random) -> None:
        self._dice = dice
        self._prefix = port.name == "stream"
        self._valid = [port.pack(message) for message in messages]
        self._trees = [self._decode(data) for data in self._valid]
        self._deep = [encode(nested(depth)) for depth in (33, 200, 900)]
        self._deep += [b"\x91" * 30_000, b"\x81\xa1a" * 30_000]

    def _decode(self, data: bytes) -> tuple[bytes, Any]:
        return (data[:1], msgspec.msgpack.decode(data[1:])) if self._prefix else (b"", msgspec.msgpack.decode(data))

    def frame(self) -> list[bytes]:
        """Return the parts of a mutated message."""
        dice = self._dice
        number = dice.randrange(len(self._valid))
        data = self._valid[number]
        kind = dice.random()
        if kind < 0.45:
            prefix, tree = self._trees[number]
            tree = self._changed(tree)
            return [prefix + encode(tree)]
        if kind < 0.65:
            changed = bytearray(data)
            for _ in range(dice.randrange(1, 5)):
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            return [bytes(changed)]
        if kind < 0.75:
            return [data[: dice.randrange(len(data))]]
        if kind < 0.85:
            return [data + (data if dice.random() < 0.5 else dice.randbytes(dice.randrange(1, 50)))]
        if kind < 0.9:
            return [data[:1] + dice.choice(self._deep)] if self._prefix else [dice.choice(self._deep)]
        if kind < 0.95:
            return [dice.choice((data, b"", dice.randbytes(20))) for _ in range(dice.choice((2, 3, 10, 500)))]
        if kind < 0.9999:
            return [dice.randbytes(dice.randrange(200))]
        return [bytes(dice.choice((1 << 17, (1 << 20) + 1, 3 << 20)))]

    def _changed(self, tree: Any) -> Any:
        """Return a copy with one to three changed fields."""
        for _ in range(self._dice.randrange(1, 4)):
            tree = self._change(tree)
        return tree

    def _change(self, tree: Any) -> Any:
        dice = self._dice
        if isinstance(tree, dict) and tree and dice.random() < 0.9:
            key = dice.choice(list(tree))
            rest = {name: value for name, value in tree.items() if name != key}
            action = dice.random()
            if action < 0.1:
                return rest
            if action < 0.15:
                return rest | {dice.choice(("x", 5, "")): tree[key]}
            return tree | {key: self._change(tree[key])}
        if isinstance(tree, list) and tree and dice.random() < 0.9:
            at = dice.randrange(len(tree))
            action = dice.random()
            if action < 0.1:
                return tree[:at] + tree[at + 1 :]
            if action < 0.15:
                return [*tree, tree[at]]
            return [*tree[:at], self._change(tree[at]), *tree[at + 1 :]]
        if isinstance(tree, int) and dice.random() < 0.3:
            return min(max(tree + dice.choice((-1, 1, 1000, 2**40)), -(2**63)), 2**64 - 1)
        return dice.choice(EXTREMES)


class Member:
    """A connection with a valid key of the lowest role, which answers to nothing but keeps its session."""

    def __init__(self, port: Port, pair: KeyPair) -> None:
        self.port = port
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = port.connect(self._context, pair)
        self.socket.connect(port.address)
        self.answers = 0

    def send(self, *parts: bytes) -> bool:
        """Send, and discard what has come. Returns False if the port takes nothing for 0.2 s."""
        self.drain()
        try:
            self.socket.send_multipart(parts)
        except zmq.Again:
            return False
        return True

    def drain(self) -> None:
        with contextlib.suppress(zmq.Again):
            while self.port.name != "log":
                self.socket.recv_multipart(zmq.NOBLOCK)
                self.answers += 1

    def session(self) -> str:
        """Open an observer's session at the core, again if the key has registered too often before."""
        end = time.monotonic() + STEP
        while time.monotonic() < end:
            self.send(control.pack(control.Open(name=OBSERVER, instance="attack")))
            while self.socket.poll(300):
                message = control.unpack_core(self.socket.recv())
                if isinstance(message, control.Welcome):
                    return message.session
        raise SystemExit("the core gives an observer no session")

    def close(self) -> None:
        self._context.destroy(0)


@contextlib.contextmanager
def member(port: Port, pair: KeyPair, core: str) -> Iterator[tuple[Member, str]]:
    """Connect to a port as a member. Gives the connection and its session, at the stream that of a monitor."""
    made = Member(port, pair)
    stop = threading.Event()
    try:
        if port.name == "core":
            yield made, made.session()
        elif port.name == "log":
            yield made, ""
        else:
            node = monitor_node(COMPONENT, core)

            def serve() -> None:
                while not stop.is_set():
                    select.select([node.fileno()], [], [], 0.05)
                    node.dispatch()
                    node.report(0, 0)

            node.connect(STEP)
            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            try:
                yield made, node.session
            finally:
                stop.set()
                thread.join()
                node.close()
    finally:
        made.close()


def monitor_node(name: str, core: str) -> Node:
    actions = {action: lambda call, **params: {} for action in ("prepare_run", "begin_run", "end_run")}
    return Node(name, "run_data", core, actions, info={})


def mutated(port: Port, pair: KeyPair, core: str, frames: int, seed: int) -> dict[str, Any]:
    """Send mutated frames, every thousandth a valid one. Returns the number of answers."""
    with member(port, pair, core) as (made, session):
        dice, refills = random.Random(seed), 0
        for n in range(frames):
            if n % 1000 == 0:
                session = made.session() if port.name == "core" else session
                messages = port.messages(session, OBSERVER if port.name == "core" else COMPONENT)
                if port.name == "core":
                    messages["say goodbye"] = control.Bye(session="made up")  # the session is needed for the others
                mutator = Mutator(port, list(messages.values()), dice)
                made.send(port.pack(next(iter(messages.values()))))
            parts = mutator.frame()
            while not made.send(*parts):
                refills += 1
                if refills > 100:
                    raise SystemExit(f"{port.name} takes no frames any more")
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            time.sleep(0.05)
            made.drain()
        return {"answers": made.answers}


# Floods


def flood_messages(port: Port, pair: KeyPair, core: str, what: str, until: float) -> int:
    """Send valid messages as fast as the port takes them. Returns their number."""
    sent = 0
    with member(port, pair, core) as (made, session):
        numbers = count()
        position = stream.Position(1, "x" * 64, 2**63, 2**47)
        fixed = {
            "heartbeats": lambda: port.pack(control.Heartbeat(session=session)),
            "largest messages": lambda: bytes(50 << 20),
            "HELLO of 22 kB": lambda: port.pack(stream.Hello(1, COMPONENT, session, "latest", [position] * 256)),
            "credit": lambda: port.pack(stream.Credit(3)),
            "records of 30 kB": lambda: port.pack(LogRecord(time.time(), logging.ERROR, COMPONENT, "y" * 30_000)),
            "records": lambda: port.pack(LogRecord(time.time(), logging.ERROR, COMPONENT, "y")),
        }
        Request, own = control.ActionRequest, os.getpid()
        numbered = {
            "requests": lambda n: Request(session=session, request=f"{own} {n}", action="status"),
            "sessions": lambda n: control.Open(name="x", instance=f"{own} {n}"),
        }
        data = fixed[what]() if what in fixed else b""
        while time.monotonic() < until:
            sent += made.send(data or port.pack(numbered[what](next(numbers))))
    return sent


def flood_connections(port: Port, how: str, pair: KeyPair | None, until: float) -> int:
    """Open connections and close them again as fast as possible. Returns their number."""
    made = 0
    if how in ("connections", "garbage"):
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(port.host_and_port, 0.5) as connection:
                made += 1
                if how == "garbage":
                    connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47) + os.urandom(2000))
        return made
    context: zmq.Context[Any] = zmq.Context()
    try:
        while time.monotonic() < until:
            batch = []
            for _ in range(20):
                one = port.connect(context, pair or new_pair())
                batch.append(
                    (one, one.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH))
                )
                one.connect(port.address)
            for one, monitor in batch:
                made += bool(monitor.poll(max(0.0, until - time.monotonic()) * 1000))
                one.disable_monitor()
                monitor.close(0)
                one.close(0)
    finally:
        context.destroy(0)
    return made


MEMBER_FLOODS = {
    "core": ("requests", "heartbeats", "sessions", "largest messages"),
    "stream": ("HELLO of 22 kB", "credit"),
    "log": ("records of 30 kB", "records"),
}
STRANGER_FLOODS = ("connections", "garbage", "handshakes with unknown keys")


# Processes of attackers


class Attacker:
    """A process that does jobs. It is forked, because strangers may not be able to read the package's files."""

    def __init__(self, *, stranger: bool) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=self._serve, args=(theirs, stranger), daemon=True)
        self._process.start()
        theirs.close()

    def _serve(self, pipe: Any, stranger: bool) -> None:
        self._pipe.close()
        if stranger and os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.chdir("/")
        logging.disable()
        with contextlib.suppress(EOFError, ConnectionError):
            while (job := pipe.recv()) is not None:
                do, arguments, env = job
                os.environ.update(env)
                try:
                    pipe.send((do(*arguments), ""))
                except BaseException as error:
                    pipe.send((None, f"{do.__name__}: {type(error).__name__}: {error}"))

    def start(self, do: Callable[..., Any], *arguments: Any, env: dict[str, str] | None = None) -> None:
        self._pipe.send((do, arguments, env or {}))

    @property
    def done(self) -> bool:
        return bool(self._pipe.poll(0))

    def result(self) -> Any:
        value, failure = self._pipe.recv()
        if failure:
            raise SystemExit(f"an attacker failed: {failure}")
        return value

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(STEP)


class Watch:
    """One more component, whose heartbeats are timed, and the descriptors and memory of the processes."""

    def __init__(self, core: str, pids: dict[str, int]) -> None:
        self._node = monitor_node("Watch", core)
        self._pids = pids
        self._stop = threading.Event()
        self.slowest = 0.0  # seconds until a heartbeat was answered, since reset()
        self.descriptors: dict[str, int] = {}
        self.memory: dict[str, int] = {}  # MiB
        self._node.connect(STEP)
        wait_until(lambda: self._node.confirmed, "the first heartbeat to be answered")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.slowest, self.descriptors, self.memory = 0.0, {}, {}

    def _run(self) -> None:
        confirmed, sampled = self._node.confirmed, 0.0
        while not self._stop.is_set():
            select.select([self._node.fileno()], [], [], 0.005)
            self._node.dispatch()
            self._node.report(0, 0)
            now = time.monotonic()
            if self._node.confirmed != confirmed:
                confirmed = self._node.confirmed
                self.slowest = max(self.slowest, self._node.heard - confirmed)
            self.slowest = max(
                self.slowest, now - confirmed - 0.3
            )  # the next one, sent 0.25 s later, has no answer yet
            if now - sampled > 0.05:
                sampled = now
                for name, pid in self._pids.items():
                    with contextlib.suppress(OSError):
                        count = len(os.listdir(f"/proc/{pid}/fd"))
                        self.descriptors[name] = max(self.descriptors.get(name, 0), count)
                        total, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
                        resident = (total - shared) >> 8  # without ring and libraries
                        self.memory[name] = max(self.memory.get(name, 0), resident)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._node.close()


class Siege:
    """One run under attack. `failures`: broken promises."""

    def __init__(self, line: System, options: argparse.Namespace, strangers: list[Attacker], members: list[Attacker]):
        self.line, self.options = line, options
        self.strangers, self.members = strangers, members
        self.failures: list[str] = []
        self.tries: Found = {}
        self.rows: list[dict[str, Any]] = []
        self.disturbed: Counter[str] = Counter()  # components that were reported lost or stuck
        self.reported: set[str] = set()  # processes with a traceback

    def prepare(self, board: Emulator) -> None:
        line = self.line
        (line.folder / "state").mkdir(mode=0o755)  # made by hand, so that its files protect themselves
        line.launch_core()
        line.launch_log()
        self.operator = begin_run(line, "--pacman", *board.addresses, "--ring", "512MiB")
        line.await_kinds(self.operator, "log")
        info = {c["kind"]: c["info"] for c in self.operator.components().result(STEP)}
        own = credentials.find(line.core)
        assert own is not None
        self.ports = [
            Port("core", line.core, own.server),
            Port("stream", *info["producer"]["stream"]),
            Port("log", *info["log"]["log"]),
        ]
        self.pids = {name: process.popen.pid for name, process in line.processes.items()}
        self.keys = {
            "core": self._join(OBSERVER, "observer"),
            "stream": (component := self._join(COMPONENT, "component")),
            "log": component,
        }
        self.watch = Watch(line.core, self.pids)
        board.go()
        self.before = self._state()

    def _join(self, name: str, role: str) -> KeyPair:
        token = self.operator.invite(name, role).result(STEP)["token"]
        env = os.environ | self._members_env
        subprocess.run(launcher.command("cli", "keys", "join", token), env=env, check=True, capture_output=True)
        for path in (self.line.folder / "members").rglob("*.key.json"):
            found = credentials.read(path)
            if found is not None and found.name == name:
                return found.pair
        raise SystemExit(f"no key of {name}")

    @property
    def _members_env(self) -> dict[str, str]:
        return {"XDG_STATE_HOME": str(self.line.folder / "members")}

    def _state(self) -> dict[str, Any]:
        """Return what no attack may change."""
        status = self.operator.status().result(STEP)
        return {
            "state": status["state"],
            "run": status["run"]["run"],
            "components": sorted(
                (c["name"], c["kind"]) for c in status["components"] if c["alive"] and c["name"] != COMPONENT
            ),
            "control": status["control"]["by"] if status["control"] else None,
            "keys": [(key["name"], key["role"]) for key in self.operator.keys().result(STEP)["members"]],
        }

    def phase(self, name: str, port: str, attackers: list[Attacker]) -> tuple[list[Any], dict[str, Any]]:
        """Wait for attackers of a port ("": of all). Returns their results, and the figures of the time until then."""
        self.watch.reset()
        slowest, began = 0.0, time.monotonic()
        while not all(attacker.done for attacker in attackers):
            asked = time.monotonic()
            for component in self.operator.components().result(STEP):
                if component["name"] != COMPONENT and not component["alive"]:
                    self.disturbed[f"{name}: {component['name']} was lost"] += 1
                elif component["name"] != COMPONENT and component["stuck"]:
                    self.disturbed[f"{name}: {component['name']} was stuck"] += 1
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.1)
        results = [attacker.result() for attacker in attackers]
        attacked = [PROCESSES[port]] if port else list(PROCESSES.values())
        figures = {
            "attack": name,
            "port": port,
            "seconds": round(time.monotonic() - began, 1),
            "heartbeat_s": round(self.watch.slowest, 3),
            "answer_s": round(slowest, 3),
            "descriptors": max(self.watch.descriptors.get(process, 0) for process in attacked),
            "memory_mib": max(self.watch.memory.get(process, 0) for process in attacked),
        }
        if self.watch.slowest > self.options.limit:
            self.failures.append(f"{name}: a heartbeat was answered after {self.watch.slowest:.2f} s")
        for process, started in self.line.processes.items():
            if started.popen.poll() is not None:
                self.failures.append(f"{name}: {process} has ended: {started.stderr[-500:]}")
            elif "Traceback" in started.stderr and process not in self.reported:
                self.reported.add(process)
                self.failures.append(f"{name}: {process}: {started.stderr[-1500:]}")
        if (after := self._state()) != self.before:
            self.failures.append(f"{name}: the state was {self.before}, is {after}")
            self.before = after
        self.rows.append(figures)
        print(figures, file=sys.stderr, flush=True)
        return results, figures

    def attack_as_strangers(self) -> None:
        until = time.monotonic() + self.options.seconds
        first, second, third, fourth = self.strangers
        first.start(keyless, self.ports, until)
        second.start(raw, self.ports, until)
        third.start(half_open, self.ports, until)
        busy = self.strangers[:3]
        if os.geteuid() == 0:  # else the files are the strangers' own
            fourth.start(files, self._paths(), self.pids, until)
            busy = self.strangers
        results, _ = self.phase("strangers", "", busy)
        for found in results:
            for name, tries in found.items():
                self.tries.setdefault(name, Tries()).add(tries)
        for name, tries in self.tries.items():
            if tries.tries != tries.refused:
                self.failures.append(f"not refused: {name}: {tries.through}")

    def _paths(self) -> list[tuple[str, str]]:
        """Return all files and directories of the system, except the data."""
        found = []
        for top, what in (
            (self.line.rings, "a ring"),
            (self.line.folder / "state" / "spool", "the spool"),
            (self.line.folder / "state" / "keys", "the core's keys"),
            (self.line.folder / "xdg" / "larpixdaq", "a connection file"),
            (self.line.folder / "members" / "larpixdaq", "a member's key"),
            (self.line.folder / "state", "run catalogue and log"),
        ):
            for directory, _, names in os.walk(top):
                if directory != str(self.line.folder / "state"):
                    found.append(("directory", directory))
                found += [(what, os.path.join(directory, name)) for name in names]
        return found

    def attack_as_members(self) -> None:
        for port in self.ports:
            arguments = (port, self.keys[port.name], self.line.core, self.options.frames, self.options.seed)
            self.members[0].start(mutated, *arguments, env=self._members_env)
            before = self._counted_by_log()
            (found,), figures = self.phase("mutated frames", port.name, self.members[:1])
            handled = found["answers"] if port.name != "log" else self._counted_by_log() - before
            figures |= {"frames": self.options.frames, "handled": handled}
            if handled < 0.5 * self.options.frames:
                self.failures.append(f"{port.name}: {self.options.frames} mutated frames, only {handled} were handled")

    def _counted_by_log(self) -> int:
        """Return the number of records that the log has written, held back or refused."""
        status = self.line.status_of(self.operator, "log")
        return sum(status[name] for name in ("written", "held_back", "refused"))

    def flood(self) -> None:
        for port in self.ports:
            for what in MEMBER_FLOODS[port.name]:
                until = time.monotonic() + self.options.flood
                for attacker in self.members if port.name != "stream" else self.members[:1]:
                    arguments = (port, self.keys[port.name], self.line.core, what, until)
                    attacker.start(flood_messages, *arguments, env=self._members_env)
                busy = self.members if port.name != "stream" else self.members[:1]
                self._flooded(f"{what}, with a valid key", port.name, busy)
            until = time.monotonic() + self.options.flood
            for attacker in self.members:
                attacker.start(flood_connections, port, "handshakes", self.keys[port.name], until)
            self._flooded("connections with a valid key", port.name, self.members)
            for how in STRANGER_FLOODS:
                until = time.monotonic() + self.options.flood
                for attacker in self.strangers[:2]:
                    attacker.start(flood_connections, port, how, None, until)
                self._flooded(f"{how}, of strangers", port.name, self.strangers[:2])

    def _flooded(self, name: str, port: str, attackers: list[Attacker]) -> None:
        counts, figures = self.phase(name, port, attackers)
        figures["per_second"] = round(sum(counts) / self.options.flood)

    def end(self, board: Emulator) -> dict[str, Any]:
        """End the run, and count the words in its files."""
        board.stop()
        sent = {int(group): counts["words"] for group, counts in board.finish()["sent"].items()}
        self.watch.close()
        with Operator(self.line.core, timeout=STEP):  # a new one is served
            pass
        ended = self.operator.end_run().result(STEP)
        totals = tally(parts_of([self.line.data], ended["run"]), os.cpu_count() or 1)
        lost = {group: n - totals.stored.get(group, 0) for group, n in sent.items()}
        self.failures += [f"{what}, in {n} looks" for what, n in self.disturbed.items()] + totals.problems
        if ended["condition"] != "COMPLETE":
            self.failures.append(f"the run is {ended['condition']}: {ended['reasons']}")
        if any(lost.values()):
            self.failures.append(f"packets lost, by io_group: {lost}")
        status = self.operator.status().result(STEP)
        return {
            "sent": sum(sent.values()),
            "stored": sum(totals.stored.values()),
            "lost": sum(lost.values()),
            "condition": ended["condition"],
            "refused_messages": status["refused_messages"],
        }


def text(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    outcome = report["outcome"]
    slowest = max(row["heartbeat_s"] for row in report["attacks"])
    lines = [
        f"{outcome['sent']:,} packets sent in {outcome['seconds']:.0f} s, {outcome['lost']:,} lost, run "
        f"{outcome['condition']}; slowest answer to a heartbeat {slowest:.2f} s.",
        "",
        "| tried by strangers | attempts | refused |",
        "| --- | ---: | ---: |",
    ]
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, tries in report["tries"].items():
        what, _, key = name.partition(", with ")
        place, _, what = what.partition(": ")
        groups.setdefault((place, key or what), {"what": [], "tries": 0, "refused": 0})
        group = groups[place, key or what]
        group["what"].append(what)
        group["tries"] += tries["tries"]
        group["refused"] += tries["refused"]
    for (place, key), group in groups.items():
        what = ", ".join(group["what"]) + ("" if key in group["what"] else f", with {key}")
        lines.append(f"| {place}: {what} | {group['tries']:,} | {group['refused']:,} |")
    lines += [
        "",
        "| attack | port | rate, number | slowest heartbeat, s | slowest request, s | descriptors | memory, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["attacks"]:
        amount = f"{row['per_second']:,}/s" if "per_second" in row else f"{row['frames']:,}" if "frames" in row else ""
        figures = f"{row['heartbeat_s']:.2f} | {row['answer_s']:.2f} | {row['descriptors']} | {row['memory_mib']}"
        lines.append(f"| {row['attack']} | {row['port'] or 'all'} | {amount} | {figures} |")
    failures = [f"- {failure}" for failure in report["failures"]]
    lines += ["", *(["Failures:", "", *failures] if failures else ["No failures."])]
    return "\n".join(lines)


def attack(options: argparse.Namespace, folder: Path, strangers: list[Attacker], members: list[Attacker]) -> Any:
    """Attack one run. Returns the report."""
    board_options = ("--io-groups", "2", "--rate", str(options.rate / 2), "--words-per-message", "auto")
    with contextlib.closing(Emulator(*board_options, "--wait-for-go", "--lossless")) as board, system(folder) as line:
        siege = Siege(line, options, strangers, members)
        siege.prepare(board)
        began = time.monotonic()
        siege.attack_as_strangers()
        siege.attack_as_members()
        siege.flood()
        seconds = time.monotonic() - began
        outcome = siege.end(board) | {"seconds": round(seconds, 1)}
    tries = {name: asdict(found) for name, found in siege.tries.items()}
    return {"outcome": outcome, "tries": tries, "attacks": siege.rows, "failures": siege.failures}


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--seconds", type=float, default=10.0, metavar="S", help="length of the strangers' attack (default %(default)g)"
    )
    add("--frames", type=int, default=100_000, metavar="N", help="mutated frames a port (default %(default)d)")
    add("--flood", type=float, default=3.0, metavar="S", help="length of each flood (default %(default)g)")
    add("--rate", type=float, default=500_000.0, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--limit", type=float, default=0.5, metavar="S", help="for the answer to a heartbeat (default %(default)g)")
    add("--seed", type=int, default=1, metavar="S", help="of the random numbers (default %(default)d)")
    add("--update", type=Path, metavar="FILE", help=f"write the report into this document, at the marks '{MARK}'")
    options = parser.parse_args()
    strangers = [Attacker(stranger=True) for _ in range(4)]
    members = [Attacker(stranger=False) for _ in range(2)]
    try:
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as name:
            folder = Path(name)
            folder.chmod(0o755)  # as many home directories: what is in it protects itself
            os.environ["XDG_STATE_HOME"] = str(folder / "xdg")
            report = attack(options, folder, strangers, members)
    finally:
        for attacker in (*strangers, *members):
            attacker.close()
    command = (
        f"python bench/attack.py --seconds {options.seconds:g} --frames {options.frames} --flood {options.flood:g}"
    )
    shown = with_source(text(report), command)
    print(json.dumps(report | {"command": command, "machine": machine()}) if options.json else shown)
    if options.update:
        update(options.update, MARK, shown)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
