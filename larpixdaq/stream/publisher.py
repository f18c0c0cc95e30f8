"""The producer's side of the stream: who subscribes, what each has got, and how far the blocks may be given up.

The socket of a producer's stream, and where it listens: at the interface that reaches the core, at a free port,
unless told otherwise.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from larpixdaq import config
from larpixdaq.buffer.block_store import BlockStore, Segment, StoredBlock
from larpixdaq.errors import ConfigError, ProtocolError
from larpixdaq.protocol.stream import (
    MAX_FROM_CONSUMER,
    STREAM_VERSION,
    Ack,
    Bye,
    Credit,
    FromConsumer,
    FromProducer,
    Hello,
    Maps,
    Position,
    Refused,
    Welcome,
    pack,
    unpack_consumer,
)

log = logging.getLogger(__name__)
#: Bytes of rows on their way to a storage and not yet acknowledged.
WINDOW = 16 << 20
#: A subscriber unheard for so long, after the socket has been drained, is dropped and must say HELLO again.
SILENT = 1.0
#: Seconds that frames from consumers are taken in one turn: nobody can keep the producer from its boards by talking.
RECEIVE_LIMIT = 0.005
#: Maximum number of blocks that a monitor may have credit for beyond those that were sent to it.
MOST_CREDIT = 64
#: Maximum number of subscribers; storages that a run requires are subscribed in any case.
MOST_SUBSCRIBERS = 100
#: A required storage without a subscription for so long (seconds) no longer holds what another one has.
FORGET_AFTER = 60.0
#: Milliseconds after which the connection of a consumer that takes no data is closed: its process is stopped, or the
#: network has cut it off. That gives back the ring's memory that libzmq holds for it. A busy consumer is not affected,
#: since its libzmq thread always takes what comes.
DEAD_CONSUMER = 1000


@dataclass
class Subscriber:
    route: bytes
    name: str
    mode: str
    heard: float
    positions: list[Position]
    #: epoch -> the next index to send; without an entry: from where the store begins.
    cursors: dict[int, int] = field(default_factory=dict)
    sent: int = 0  # "latest": blocks sent since HELLO
    credit: int = 0
    #: "all": (run, epoch) -> (sequence, bytes) of the blocks that it has not acknowledged yet.
    in_flight: dict[tuple[int, int], deque[tuple[int, int]]] = field(default_factory=dict)
    flight_bytes: int = 0
    maps: bool = False  # it reads our ring itself


class Publisher:
    """Serves blocks on `socket`, a router() that is bound. Everything happens in the producer's own loop.

    `own` is where this producer's blocks are; adopt() adds what predecessors have left, which is delivered before. A
    block is kept until every storage that its run requires has acknowledged it.
    """

    def __init__(
        self,
        own: BlockStore,
        socket: zmq.Socket[bytes],
        clock: Callable[[], float] = time.monotonic,
        *,
        forget_after: float = FORGET_AFTER,
        ring: str = "",
    ) -> None:
        """`ring`: the file of our own ring; empty: it is in none."""
        self.own = own
        self._ring = ring
        #: Predecessors' first, the oldest of them first.
        self.stores = [own]
        self.socket = socket
        self._clock = clock
        self._forget_after = forget_after
        self.layout = 0
        self.run: int | None = None
        self.subscribers: dict[bytes, Subscriber] = {}
        self.refused = 0
        self.freed = 0  # blocks
        #: Required storages that have been away for too long.
        self.forgotten: frozenset[str] = frozenset()
        self._away: dict[str, float] = {}  # required storage without a subscription -> since when
        self._drained = clock()
        self._flooded: float | None = None  # since when the socket has not been empty

    # what there is to deliver

    def begin(self, run: int, layout: int, required: Sequence[str]) -> None:
        """From here on the ring's blocks are those of `run`; `required` storages must have each of them. (They are the
        ring's own, in the same order.)"""
        self.run, self.layout = run, layout
        self.own.begin(run, layout, required)

    def end(self) -> None:
        """The end record has been put into the ring."""
        self.own.end()
        self.run = None

    def release(self, run: int) -> None:
        """The run needs no storage any more."""
        self.own.release(run)

    def adopt(self, store: BlockStore) -> None:
        """Deliver what a predecessor has left too."""
        self.stores = [*sorted([*self.stores[:-1], store], key=lambda one: one.made_ns), self.own]
        for subscriber in self.subscribers.values():
            self._know(subscriber, store)

    def ring_moved(self) -> None:
        """Our own ring is in another file: who reads it has to map that one, and what was on its way comes again."""
        for subscriber in [one for one in self.subscribers.values() if one.maps]:
            self._drop(subscriber)
            self._refuse(subscriber.route, "hello")

    def pending(self) -> int:
        """Blocks that some required storage has not acknowledged yet, of predecessors too."""
        return sum(store.pending() for store in self.stores)

    def inherited(self) -> int:
        """Those of predecessors alone."""
        return sum(store.pending() for store in self.stores[:-1])

    # the loop

    def receive(self) -> None:
        """Take the frames that have come from consumers, for RECEIVE_LIMIT at most."""
        until = self._clock() + RECEIVE_LIMIT
        while self._clock() < until:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self._drained = self._clock()
                self._flooded = None
                return
            route = parts[0]
            try:
                if len(parts) != 2:
                    raise ProtocolError(f"stream frame from {route.hex()}: expected 1 part, found {len(parts) - 1}")
                self._handle(route, unpack_consumer(parts[1], route.hex()))
            except ProtocolError as error:
                self._refuse(route, str(error))
        if self._flooded is None:
            self._flooded = self._clock()

    def _judged(self) -> float:
        """The time up to which all that was said has been taken. In a flood the socket is never empty, but ZeroMQ takes
        from all peers in turn: after SILENT the living ones were heard."""
        now = self._clock()
        return now if self._flooded is not None and now - self._flooded > SILENT else self._drained

    def work(self) -> None:
        """One turn: hear the consumers, send what may be sent, drop who has fallen silent, free what nobody needs."""
        self.receive()
        judged = self._judged()
        for subscriber in list(self.subscribers.values()):
            if judged - subscriber.heard > SILENT:
                self._drop(subscriber)
            elif subscriber.mode == "all":
                self._serve_all(subscriber)
            else:
                self._serve_latest(subscriber)
        self._forget()
        for store in self.stores:
            self.freed += store.free(self.forgotten)
            if store is not self.own and store.tail == store.head:
                store.close()
        self.stores = [store for store in self.stores if store is self.own or store.tail < store.head]
        self.own.spill()

    # frames from consumers

    def _handle(self, route: bytes, frame: FromConsumer) -> None:
        if isinstance(frame, Hello):
            self._hello(route, frame)
            return
        subscriber = self.subscribers.get(route)
        if subscriber is None:
            if not isinstance(frame, Bye):
                self._refuse(route, "hello")
            return
        subscriber.heard = self._clock()
        if isinstance(frame, Ack):
            self._ack(subscriber, frame)
        elif isinstance(frame, Credit):
            if frame.blocks > subscriber.sent + MOST_CREDIT:
                raise ProtocolError(
                    f"credit of {subscriber.name}: expected at most {MOST_CREDIT} blocks more than the "
                    f"{subscriber.sent} that were sent, found {frame.blocks}"
                )
            subscriber.credit = max(subscriber.credit, frame.blocks)
        elif isinstance(frame, Maps):
            subscriber.maps = frame.epoch == self.own.epoch
        elif isinstance(frame, Bye):
            self._drop(subscriber)

    def _hello(self, route: bytes, hello: Hello) -> None:
        if hello.version != STREAM_VERSION:
            self._refuse(route, f"version: expected {STREAM_VERSION}, found {hello.version}")
            return
        if hello.mode not in ("all", "latest"):
            self._refuse(route, f"mode: expected all or latest, found {hello.mode[:20]!r}")
            return
        for other in [s for s in self.subscribers.values() if s.name == hello.name or s.route == route]:
            self._drop(other)
            if other.route != route:
                self._refuse(other.route, "superseded")
        if len(self.subscribers) >= MOST_SUBSCRIBERS and hello.name not in self._required():
            self._refuse(route, f"{len(self.subscribers)} consumers have subscribed, more are not served")
            return
        subscriber = Subscriber(route, hello.name, hello.mode, self._clock(), hello.positions)
        for store in self.stores:
            self._know(subscriber, store)
        if self._send(subscriber, Welcome(self.own.producer, self.own.epoch, self.run, self.layout, self._ring)):
            self.subscribers[route] = subscriber

    def _required(self) -> set[str]:
        """The storages that some run requires."""
        return {name for store in self.stores for segment in store.segments for name in segment.required}

    def _know(self, subscriber: Subscriber, store: BlockStore) -> None:
        """Where a subscriber stands: at what it says, or at what it has acknowledged; a monitor at the end."""
        if subscriber.mode != "all":
            subscriber.cursors[store.epoch] = store.head
            return
        for position in subscriber.positions:
            if (position.producer, position.epoch) == (store.producer, store.epoch):
                store.acknowledge(subscriber.name, position.run, position.next)

    def _ack(self, subscriber: Subscriber, ack: Ack) -> None:
        store = next((store for store in self.stores if store.epoch == ack.epoch), None)
        if subscriber.mode != "all":
            return
        if store is not None:
            store.acknowledge(subscriber.name, ack.run, ack.next)
        flying = subscriber.in_flight.get((ack.run, ack.epoch))
        while flying and flying[0][0] < ack.next:
            subscriber.flight_bytes -= flying.popleft()[1]
        if flying is not None and not flying:
            del subscriber.in_flight[ack.run, ack.epoch]

    # sending

    def _serve_all(self, subscriber: Subscriber) -> None:
        for store in self.stores:
            for segment in store.segments:
                if subscriber.name in segment.required and not self._serve(subscriber, store, segment):
                    return

    def _serve(self, subscriber: Subscriber, store: BlockStore, segment: Segment) -> bool:
        """Send what the window lets go of a run; True when that is all of it so far."""
        end = store.end_of(segment)
        cursor = subscriber.cursors.get(store.epoch, 0)
        if cursor >= end:
            return True
        cursor = max(cursor, segment.position(subscriber.name), store.tail)
        flying = subscriber.in_flight.setdefault((segment.run, store.epoch), deque())
        while cursor < end and subscriber.flight_bytes < WINDOW:
            found = store.get(cursor)
            if found is None or (found.header and not self._send_block(subscriber, store, cursor, found)):
                break
            if found.header:
                flying.append((cursor - segment.first, len(found.payload)))
                subscriber.flight_bytes += len(found.payload)
            cursor += 1
        subscriber.cursors[store.epoch] = cursor
        return cursor >= end

    def _serve_latest(self, subscriber: Subscriber) -> None:
        store = self.own
        assert store.ring is not None
        cursor = max(subscriber.cursors[store.epoch], store.ring.tail)
        while cursor < store.head:
            told = store.is_never_skipped(cursor)  # small and rare: never skipped
            if told or subscriber.sent < subscriber.credit:
                found = store.get(cursor)
                assert found is not None
                if not self._send_block(subscriber, store, cursor, found):
                    return
                subscriber.sent += not told
            cursor += 1
        subscriber.cursors[store.epoch] = cursor

    def _send_block(self, subscriber: Subscriber, store: BlockStore, index: int, found: StoredBlock) -> bool:
        payload = found.payload
        try:
            if not len(payload):
                self.socket.send_multipart([subscriber.route, found.header], zmq.NOBLOCK)
            elif subscriber.maps and found.pinned and store is self.own and store.can_lend():
                self.socket.send_multipart(
                    [subscriber.route, found.header, b"", index.to_bytes(8, "little")], zmq.NOBLOCK
                )
            elif subscriber.mode != "all":  # a monitor pins nothing
                self.socket.send_multipart([subscriber.route, found.header, payload], zmq.NOBLOCK)
            else:
                self.socket.send_multipart([subscriber.route, found.header], zmq.NOBLOCK | zmq.SNDMORE)
                tracker = self.socket.send(payload, zmq.NOBLOCK, copy=False, track=True)
                if found.pinned and tracker is not None and not tracker.done:
                    store.pins.append((index, tracker))
        except zmq.ZMQError:
            self._drop(subscriber)
            return False
        return True

    def _send(self, subscriber: Subscriber, frame: FromProducer) -> bool:
        try:
            self.socket.send_multipart([subscriber.route, pack(frame)], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._drop(subscriber)
            return False
        return True

    def _refuse(self, route: bytes, reason: str) -> None:
        self.refused += 1
        try:
            self.socket.send_multipart([route, pack(Refused(reason))], zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # it has gone already

    def _drop(self, subscriber: Subscriber) -> None:
        self.subscribers.pop(subscriber.route, None)

    # freeing

    def _forget(self) -> None:
        """Note which required storages are away, and for how long."""
        there = {subscriber.name for subscriber in self.subscribers.values() if subscriber.mode == "all"}
        now = self._clock()
        self._away = {name: self._away.get(name, now) for name in self._required() - there}
        forgotten = frozenset(name for name, since in self._away.items() if now - since > self._forget_after)
        for name in forgotten - self.forgotten:
            log.error(
                "%s has been disconnected for %g s: blocks that another storage has are no longer kept for it",
                name, self._forget_after,
            )  # fmt: skip
        for name in self.forgotten & there:
            log.warning("%s is connected again; blocks that were not kept for it are missing there", name)
        self.forgotten = forgotten


def stream_router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The socket for a Publisher, still to be bound: what it is set to counts from the bind on."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FROM_CONSUMER)
    config.close_dead_connections(socket, DEAD_CONSUMER)
    return socket


def bind_stream(listener: zmq.Socket[bytes], address: str | None, core: str, *, insecure: bool) -> str:
    """Bind to `address` (default: towards the core), on a free port if it names none; return where others connect."""
    wanted = address or f"tcp://{config.interface_towards(core)}"
    where = config.listen_address(wanted, 0, insecure=insecure, what="--address")
    try:
        listener.ipv6 = config.is_ipv6(where)
        listener.bind(where)
    except zmq.ZMQError as error:
        raise ConfigError(f"--address {where}: {error.strerror}") from None
    endpoint = listener.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return config.reachable(endpoint.decode().rstrip("\0"), core)
