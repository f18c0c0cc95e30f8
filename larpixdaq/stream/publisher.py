"""The producer's side of the stream: who subscribes, what each has got, and how far the ring's tail may move."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from larpixdaq._native.ring import END, INFO, Ring
from larpixdaq.blocks import (
    STREAM_VERSION,
    Ack,
    Bye,
    Credit,
    FromConsumer,
    FromProducer,
    Hello,
    Refused,
    Welcome,
    pack,
    unpack_consumer,
)
from larpixdaq.errors import ProtocolError

#: Bytes of rows on their way to a storage and not yet acknowledged.
WINDOW = 16 << 20
#: A subscriber unheard for so long, after the socket has been drained, is dropped and must say HELLO again.
SILENT = 1.0
#: Frames taken in one turn: nobody can keep the producer from its boards by talking.
DRAIN_LIMIT = 10_000


@dataclass
class Segment:
    """The blocks of one run in the ring: descriptors from `first` on, the end record at `last` once it is there."""

    run: int
    first: int
    required: frozenset[str]
    last: int | None = None
    durable: dict[str, int] = field(default_factory=dict)  # storage -> descriptors of this run below are durable there

    def behind(self, head: int) -> int:
        """The descriptor behind the run's last one so far; `head` is the ring's."""
        return head if self.last is None else self.last + 1

    def wants(self, name: str) -> int:
        """The first descriptor of the run that a storage does not have yet."""
        return self.durable.get(name, self.first)


@dataclass
class Subscriber:
    route: bytes
    name: str
    mode: str
    cursor: int  # the next descriptor to send
    heard: float
    sent: int = 0  # "latest": blocks sent since HELLO
    credit: int = 0
    #: "all": run -> (sequence, bytes) of the blocks that it has not acknowledged yet.
    in_flight: dict[int, deque[tuple[int, int]]] = field(default_factory=dict)
    flight_bytes: int = 0
    skipped: int = 0


class Publisher:
    """Serves the ring's blocks on `socket`, a bound ROUTER. Everything happens in the producer's own loop.

    A block stays in the ring until every storage that its run requires has acknowledged it and libzmq has released it.
    """

    def __init__(
        self,
        ring: Ring,
        socket: zmq.Socket[bytes],
        producer: str,
        epoch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ring = ring
        self.socket = socket
        self._clock = clock
        self.producer = producer
        self.epoch = epoch
        self.layout = 0
        self.run: int | None = None
        self.segments: deque[Segment] = deque()
        self.subscribers: dict[bytes, Subscriber] = {}
        self.refused = 0
        self.freed = 0  # blocks
        self._order: tuple[str, ...] = ()
        self._held: deque[tuple[int, zmq.MessageTracker]] = deque()
        self._drained = clock()
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, 0)

    # runs

    def begin(self, run: int, layout: int, required: Sequence[str]) -> None:
        """From here on the ring's blocks are those of `run`; `required` storages must have each of them. (They are the
        ring's own, in the same order.)"""
        self.run, self.layout = run, layout
        self._order = tuple(required)
        self.segments.append(Segment(run, self._ring.head, frozenset(required)))

    def end(self) -> None:
        """The end record has been put into the ring."""
        self.segments[-1].last = self._ring.head - 1
        self.run = None

    def release(self, run: int) -> None:
        """The run needs no storage any more."""
        for segment in self.segments:
            if segment.run == run:
                segment.required = frozenset()

    def owed(self) -> int:
        """Blocks that some required storage has not acknowledged yet."""
        return self._ring.head - self._acknowledged()

    # the loop

    def receive(self) -> None:
        """Take every frame that has come from consumers."""
        for _ in range(DRAIN_LIMIT):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self._drained = self._clock()
                return
            route = parts[0]
            try:
                if len(parts) != 2:
                    raise ProtocolError(f"stream frame from {route.hex()}: expected 1 part, found {len(parts) - 1}")
                self._handle(route, unpack_consumer(parts[1], route.hex()))
            except ProtocolError as error:
                self._refuse(route, str(error))

    def work(self) -> None:
        """One turn: hear the consumers, send what may be sent, drop who has fallen silent, free what nobody needs."""
        self.receive()
        for subscriber in list(self.subscribers.values()):
            if self._drained - subscriber.heard > SILENT:
                self._drop(subscriber)
            elif subscriber.mode == "all":
                self._serve_all(subscriber)
            else:
                self._serve_latest(subscriber)
        self._free()

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
            subscriber.credit = max(subscriber.credit, frame.blocks)
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
        cursor = self._ring.head
        if hello.mode == "all":
            for position in hello.positions:
                if (position.producer, position.epoch) == (self.producer, self.epoch):
                    self._durable(hello.name, position.run, position.next)
            wanted = (s.wants(hello.name) for s in self.segments if hello.name in s.required)
            cursor = max(min(wanted, default=cursor), self._ring.tail)
        subscriber = Subscriber(route, hello.name, hello.mode, cursor, self._clock())
        if self._send(subscriber, Welcome(self.producer, self.epoch, self.run, self.layout)):
            self.subscribers[route] = subscriber

    def _ack(self, subscriber: Subscriber, ack: Ack) -> None:
        if ack.epoch != self.epoch or subscriber.mode != "all":
            return
        self._durable(subscriber.name, ack.run, ack.next)
        flying = subscriber.in_flight.get(ack.run)
        while flying and flying[0][0] < ack.next:
            subscriber.flight_bytes -= flying.popleft()[1]
        if flying is not None and not flying:
            del subscriber.in_flight[ack.run]

    def _durable(self, name: str, run: int, following: int) -> None:
        """Storage `name` has everything of `run` below sequence `following`. That says nothing of the runs before."""
        for segment in self.segments:
            if segment.run == run and name in segment.required:
                index = max(segment.wants(name), min(segment.first + following, segment.behind(self._ring.head)))
                segment.durable[name] = index
                if segment is self.segments[-1]:
                    self._ring.acknowledge(self._order.index(name), index)

    # sending

    def _serve_all(self, subscriber: Subscriber) -> None:
        for segment in self.segments:
            behind = segment.behind(self._ring.head)
            if subscriber.cursor >= behind:
                continue
            if subscriber.name not in segment.required:
                subscriber.cursor = behind
                continue
            subscriber.cursor = max(subscriber.cursor, segment.wants(subscriber.name), self._ring.tail)
            while subscriber.cursor < behind and subscriber.flight_bytes < WINDOW:
                payload = self._ring.payload(subscriber.cursor)
                if not self._send_block(subscriber, payload, copy=False):
                    return
                flying = subscriber.in_flight.setdefault(segment.run, deque())
                flying.append((subscriber.cursor - segment.first, len(payload)))
                subscriber.flight_bytes += len(payload)
                subscriber.cursor += 1
            if subscriber.cursor < behind:
                return

    def _serve_latest(self, subscriber: Subscriber) -> None:
        subscriber.cursor = max(subscriber.cursor, self._ring.tail)
        while subscriber.cursor < self._ring.head:
            told = self._ring.kind(subscriber.cursor) in (INFO, END)  # small and rare: never skipped
            if told or subscriber.sent < subscriber.credit:
                payload = self._ring.payload(subscriber.cursor)
                if not self._send_block(subscriber, payload, copy=True):
                    return
                subscriber.sent += not told
            else:
                subscriber.skipped += 1
            subscriber.cursor += 1

    def _send_block(self, subscriber: Subscriber, payload: memoryview, *, copy: bool) -> bool:
        index = subscriber.cursor
        header = self._ring.packed_header(index)
        try:
            if not len(payload):
                self.socket.send_multipart([subscriber.route, header], zmq.NOBLOCK)
            elif copy:
                self.socket.send_multipart([subscriber.route, header, payload], zmq.NOBLOCK)
            else:
                self.socket.send_multipart([subscriber.route, header], zmq.NOBLOCK | zmq.SNDMORE)
                tracker = self.socket.send(payload, zmq.NOBLOCK, copy=False, track=True)
                if tracker is not None and not tracker.done:
                    self._held.append((index, tracker))
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

    def _acknowledged(self) -> int:
        """The first descriptor that some required storage still has to acknowledge."""
        for segment in self.segments:
            behind = segment.behind(self._ring.head)
            done = min(map(segment.wants, segment.required), default=behind)
            if done < behind:
                return done
        return self._ring.head

    def _free(self) -> None:
        held = [entry for entry in self._held if not entry[1].done]
        self._held = deque(held)
        free = self._acknowledged()
        for index, _ in held:
            free = min(free, index)
        if free > self._ring.tail:
            self.freed += free - self._ring.tail
            self._ring.free_to(free)
        while self.segments and self.segments[0].last is not None and self.segments[0].last < self._ring.tail:
            self.segments.popleft()
