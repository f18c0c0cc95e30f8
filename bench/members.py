"""Attacks of members, who have a key of the lowest role: an observer's at the core, a component's at stream and log.

See attack.py. Each function attacks one port.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import threading
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec
import zmq
from common import STEP
from strangers import Port

from larpixdaq.control.log_shipping import LogRecord
from larpixdaq.control.node import Node
from larpixdaq.keys.curve import KeyPair
from larpixdaq.protocol import control, stream

OBSERVER, COMPONENT = "onlooker", "Second monitor"
FLOODS = {
    "core": ("requests", "heartbeats", "sessions", "largest messages"),
    "stream": ("HELLO of 22 kB", "credit"),
    "log": ("records of 30 kB", "records"),
}
encode = msgspec.msgpack.encode
EXTREMES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**48, 2**56, 2**63 - 1, 2**64 - 1, -(2**63), 1e308, -0.0, float("nan"), float("inf"),
    "", "x", "x" * 65, "x" * 70_000, "\x00\x1b[2J\n", "\u202e\U0010ffff", "all", b"", b"\xff" * 300, [], {}, [[]] * 300,
    [[1, "b", 1, 1]] * 300, {"a": {"b": {}}}, {str(n): n for n in range(300)}, msgspec.msgpack.Ext(1, b"\xc1"),
    msgspec.msgpack.Ext(1, encode([[["f", "u1"]], [2**62], b""])), msgspec.msgpack.Ext(-1, bytes(8)),
)  # fmt: skip


class Member:
    """A connection with a valid key, which answers to nothing but keeps its session."""

    def __init__(self, port: Port, pair: KeyPair) -> None:
        self.port = port
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = port.make_socket(self._context, pair)
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
    with contextlib.closing(Member(port, pair)) as made:
        if port.name == "core":
            yield made, made.session()
        elif port.name == "log":
            yield made, ""
        else:
            with beating(monitor_node(COMPONENT, core)) as node:
                yield made, node.session


def monitor_node(name: str, core: str) -> Node:
    actions = {action: lambda call, **params: {} for action in ("prepare_run", "begin_run", "end_run")}
    return Node(name, "run_data", core, actions, info={})


@contextlib.contextmanager
def beating(node: Node) -> Iterator[Node]:
    """Register a component and send its heartbeats, in a thread."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            select.select([node.fileno()], [], [], 0.05)
            node.dispatch()
            node.report(0, 0)

    node.connect(STEP)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield node
    finally:
        stop.set()
        thread.join()
        node.close()


# Mutated frames


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


class Mutator:
    """Makes mutated frames from valid messages."""

    def __init__(self, port: Port, messages: list[Any], dice: random.Random) -> None:
        self._dice = dice
        self._kind = 1 if port.name == "stream" else 0  # bytes before the fields, which name the kind of the frame
        self._valid = [port.pack(message) for message in messages]
        self._trees = [msgspec.msgpack.decode(data[self._kind :]) for data in self._valid]
        self._deep = [encode(_nested(depth)) for depth in (33, 200, 900)]
        self._deep += [b"\x91" * 30_000, b"\x81\xa1a" * 30_000]

    def frame(self) -> list[bytes]:
        """Return the parts of a mutated message."""
        dice = self._dice
        number = dice.randrange(len(self._valid))
        data = self._valid[number]
        kind = dice.random()
        if kind < 0.45:
            tree = self._trees[number]
            for _ in range(dice.randrange(1, 4)):
                tree = self._change(tree)
            return [data[: self._kind] + encode(tree)]
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
            return [data[: self._kind] + dice.choice(self._deep)]
        if kind < 0.95:
            return [dice.choice((data, b"", dice.randbytes(20))) for _ in range(dice.choice((2, 3, 10, 500)))]
        if kind < 0.9999:
            return [dice.randbytes(dice.randrange(200))]
        return [bytes(dice.choice((1 << 17, (1 << 20) + 1, 3 << 20)))]

    def _change(self, tree: Any) -> Any:
        """Return a copy with one field changed, removed, doubled or renamed."""
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


def _nested(depth: int) -> Any:
    value: Any = 1
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


# Floods


def flood(port: Port, pair: KeyPair, core: str, what: str, until: float) -> int:
    """Send valid messages as fast as the port takes them; `what`: one of FLOODS. Returns their number."""
    sent, own = 0, os.getpid()
    with member(port, pair, core) as (made, session):
        position = stream.Position(1, "x" * 64, 2**63, 2**47)
        Request, now = control.ActionRequest, time.time()
        same = {
            "heartbeats": control.Heartbeat(session=session),
            "HELLO of 22 kB": stream.Hello(1, COMPONENT, session, "latest", [position] * 256),
            "credit": stream.Credit(3),
            "records of 30 kB": LogRecord(now, logging.ERROR, COMPONENT, "y" * 30_000),
            "records": LogRecord(now, logging.ERROR, COMPONENT, "y"),
        }
        numbered = {
            "requests": lambda n: Request(session=session, request=f"{own} {n}", action="status"),
            "sessions": lambda n: control.Open(name="x", instance=f"{own} {n}"),
        }
        parts = control.split(bytes(50 << 20)) if what == "largest messages" else []
        parts = [port.pack(same[what])] if what in same else parts
        numbers = count()
        while time.monotonic() < until:
            sent += made.send(*parts or [port.pack(numbered[what](next(numbers)))])
    return sent
