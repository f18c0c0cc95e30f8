"""The connection of a consumer to one producer: what is said over it, and how rows come to be here."""

from __future__ import annotations

import contextlib
from pathlib import Path

import zmq

from larpixdaq import arena, config
from larpixdaq._native.ring import Reader
from larpixdaq.blocks import MAX_HEADER, Ack, Block, FromConsumer, FromProducer, Maps, Welcome, pack, unpack_producer
from larpixdaq.errors import RingError

#: Blocks that a monitor lets come before it has dealt with the first of them.
CREDIT = 2


class Link:
    """Used by the stream's thread alone. zmq.ZMQError where nothing can be connected to the address."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str, address: str, *, keeps: bool) -> None:
        """`keeps`: the producer keeps each block until we have acknowledged it."""
        self.name = name
        self.address = address
        self.welcome = False
        self.epoch = 0
        self.hello_at = 0.0  # not before that do we ask to be subscribed
        self.repeat_at = 0.0  # when something is said again, whether or not there is news
        self.credit = CREDIT
        self.acks: dict[tuple[int, int], int] = {}  # (run, epoch) -> next, still to be sent
        self.last_ack: Ack | None = None
        self.warned = ""
        #: Our session, and when (monotonic) the producer said that a newer HELLO of our name had come.
        self.superseded: tuple[str, float] | None = None
        self._keeps = keeps
        self._ring: Reader | None = None  # the producer's, when it is on our host
        self.sent = False  # the next subscription is to bring the rows themselves
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # the producer's window is the bound
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_HEADER)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # what is said to a producer that is away must not pile up
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, 2000)  # the system's own grows while a network is away
        config.close_dead_connections(self.socket, config.DEAD_CONNECTION)
        try:
            self.socket.ipv6 = config.is_ipv6(address)
            self.socket.connect(address)
        except zmq.ZMQError:
            self.socket.close(linger=0)
            raise

    def send(self, frame: FromConsumer) -> bool:
        try:
            self.socket.send(pack(frame), zmq.NOBLOCK)
        except zmq.Again:
            self.part()  # not connected: a new connection begins with HELLO
            return False
        return True

    def part(self) -> None:
        """We are not subscribed any more. The ring goes too: the memory of a producer that has ended is free then."""
        self.welcome = False
        self._ring = None

    def receive(self) -> tuple[FromProducer, memoryview | None] | None:
        """The next frame, with the rows of a block as far as they are there; None when nothing has come.

        ProtocolError for what is no frame; it is gone then.
        """
        try:
            header = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        payload, place = None, b""
        if self.socket.get(zmq.RCVMORE):  # the parts of one message arrive together
            payload = self.socket.recv(copy=False).buffer
        if self.socket.get(zmq.RCVMORE):
            place = self.socket.recv()
        while self.socket.get(zmq.RCVMORE):
            self.socket.recv()
        frame = unpack_producer(header, self.name)
        if place and isinstance(frame, Block):
            payload = self._fetch(place) if self.welcome and frame.epoch == self.epoch else None
        return frame, payload

    def map(self, welcome: Welcome) -> None:
        """Read the rows out of the producer's ring from now on, if that is on our host; else they are sent."""
        self._ring = None
        sent, self.sent = self.sent, False
        if welcome.ring and not sent:
            with contextlib.suppress(RingError):
                self._ring = arena.reader(Path(welcome.ring), welcome.producer, welcome.epoch)
                self.send(Maps(welcome.epoch))

    def _fetch(self, place: bytes) -> memoryview | None:
        """A block's rows in the ring, or, where they may be written over, a copy; None when they are not there."""
        if self._ring is None:
            return None
        index = int.from_bytes(place[:8], "little")
        if self._keeps:
            return self._ring.lend(index)
        rows = self._ring.read(index)
        return None if rows is None else memoryview(rows)
