"""The producer's side of the stream: the subscribers, the blocks sent to each, and their acknowledgements.

Also makes and binds the stream's socket: by default at the interface that reaches the core, at a free port.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import zmq

from larpixdaq import config, schema
from larpixdaq._native.zmq_batch import send_parts
from larpixdaq.buffer.block_store import BlockStore, Segment, StoredBlock
from larpixdaq.errors import ConfigError, ProtocolError
from larpixdaq.keys.curve import Admission, has_message, receive
from larpixdaq.keys.peer_limits import LimitReached
from larpixdaq.protocol.control import ConsumerSession, Update, session_digest
from larpixdaq.protocol.packed_rows import MIN_ROWS, RowPacker
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
    Packs,
    Position,
    Refused,
    Welcome,
    pack,
    unpack_consumer,
)

log = logging.getLogger(__name__)
#: Maximum bytes of rows on their way to a storage without acknowledgement.
WINDOW = 16 << 20
#: The same for a child of the producer while it reads the ring: nothing is on its way then, and it waits for brokers.
CHILD_WINDOW = 48 << 20
#: Seconds without a frame after which a subscriber is dropped and must say HELLO again, if all frames were taken.
SILENT_AFTER = 1.0
#: Seconds between two looks for subscribers and storages that are silent.
LOOK_INTERVAL = 0.1
#: Maximum seconds for which one turn takes frames, so that no consumer keeps the producer from reading its boards.
RECEIVE_LIMIT = 0.005
#: Maximum seconds after which one turn packs no further block, likewise.
PACK_LIMIT = 0.005
#: Maximum number of blocks that a monitor may have credit for beyond those sent to it.
MAX_CREDIT = 64
#: Maximum number of blocks of a turn whose rows are sent to a monitor, because it cannot read them in the ring.
MAX_SENT = 2
#: Maximum number of subscribers. Required storages are subscribed even above it.
MAX_SUBSCRIBERS = 100
#: Maximum number of a key's HELLOs that wait for the core's word on their session.
MAX_UNCONFIRMED = 8
#: Milliseconds after which the connection of a consumer that takes no data is closed, because its process is stopped or
#: the network has cut it off. This frees the ring's memory that libzmq holds for it. A busy consumer is not affected,
#: because its libzmq thread always takes data.
DEAD_CONSUMER = 1000


class Sample:
    """Draws one block of each successive `every` blocks, so that no pattern in their order shows in the sample.

    A pattern is, for example, that a producer reads its boards in turn. With every=1, all blocks are drawn.
    """

    def __init__(self) -> None:
        self.every = 1.0
        self._left = self._drawn = 0  # blocks left in the present group, and how many are left after the drawn one

    def takes_next(self) -> bool:
        if not self._left:
            # Groups of the two nearest sizes follow each other at random too.
            self._left = int(self.every) + (random.random() < self.every % 1.0)
            self._drawn = random.randrange(self._left)
        self._left -= 1
        return self._left == self._drawn


@dataclass
class Subscriber:
    route: bytes
    name: str
    mode: str
    heard_at: float  # monotonic: the time of its last frame
    positions: list[Position]
    #: epoch -> the next index to send; without an entry: the beginning of the store.
    cursors: dict[int, int] = field(default_factory=dict)
    sent: int = 0  # "latest": blocks sent since HELLO
    credit: int = 0
    sample: Sample = field(default_factory=Sample)
    unsent: int = -1  # "latest": index of a block of the sample that must be sent later
    #: "all": (run, epoch) -> (sequence, bytes) of the blocks that were sent and not acknowledged yet.
    in_flight: dict[tuple[int, int], deque[tuple[int, int]]] = field(default_factory=dict)
    flight_bytes: int = 0
    child: bool = False  # a child process of the producer
    maps: bool = False  # it reads this producer's ring itself
    packs: bool = False  # rows are sent packed


class Publisher:
    """Sends blocks through `socket`, a bound stream_router(). All methods belong to the producer's loop.

    `own` is the store of this producer's blocks. adopt() adds the stores of predecessors, whose blocks are sent first.
    A block is kept until every required storage of its run has acknowledged it.
    """

    def __init__(
        self,
        own: BlockStore,
        socket: zmq.Socket[bytes],
        clock: Callable[[], float] = time.monotonic,
        *,
        forget_after: float,
        admission: Admission | None = None,
    ) -> None:
        """`forget_after`: seconds without a subscription or an acknowledgement after which blocks that another storage
        has are no longer kept for a required storage. `admission`: which consumers may subscribe; None: all.
        """
        self._admission = admission
        self._consumers: dict[str, ConsumerSession] = {}  # by name, as the core has said
        self._children: dict[str, ConsumerSession] = {}  # by name: of this process
        self._unconfirmed: dict[bytes, tuple[Hello, str]] = {}  # by route, with the key
        self.own = own
        #: Predecessors' stores, the oldest first, and then `own`.
        self.stores = [own]
        self.socket = socket
        self._clock = clock
        self._forget_after = forget_after
        self.layout = 0
        self.run: int | None = None
        self.subscribers: dict[bytes, Subscriber] = {}
        #: Frames refused since the start: invalid, or of a session that the core does not confirm.
        self.refused = 0
        self.freed = 0  # blocks
        #: Required storages that have been disconnected, or idle, for longer than `forget_after`.
        self.forgotten: frozenset[str] = frozenset()
        #: Required storage -> sum of its positions, and since when (monotonic) it has been idle.
        self._idle: dict[str, tuple[int, float]] = {}
        self._emptied_at = clock()  # when all waiting frames were last taken
        self._flooded_since: float | None = None  # since when frames have always been waiting
        self._packer = RowPacker()
        self._pack_until: float | None = None  # monotonic; None: this turn has packed nothing yet
        #: Whether blocks wait for the next turn, because packing them takes long.
        self.unsent = False
        self._look_at = 0.0  # monotonic
        self._served_head = own.head  # when blocks were last sent
        self._changed = False  # since then, in another way than by frames and new blocks

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The sockets that are readable when receive() has work."""
        return [self.socket] if self._admission is None else [self.socket, self._admission.door.socket]

    # Blocks to deliver

    def begin(self, run: int, layout: int, required: Sequence[str]) -> None:
        """Begin a run, to which the ring's next blocks belong.

        `required`: the storages that must have each block, in the same order as in the ring.
        """
        self.run, self.layout = run, layout
        self.own.begin(run, layout, required)
        self._changed = True

    def end(self) -> None:
        """End the run, whose end record has been put into the ring."""
        self.own.end()
        self.run = None

    def adopt(self, store: BlockStore) -> None:
        """Deliver the blocks of a predecessor too."""
        self.stores = [*sorted([*self.stores[:-1], store], key=lambda other: other.made_ns), self.own]
        self._changed = True
        for subscriber in self.subscribers.values():
            self._note_positions(subscriber, store)

    def ring_moved(self) -> None:
        """Let consumers that read the ring subscribe again, because it is in another file now, which they must map."""
        for subscriber in [reader for reader in self.subscribers.values() if reader.maps]:
            self._drop(subscriber)
            self._refuse(subscriber.route, "hello")

    def pending(self) -> int:
        """The number of blocks without acknowledgement of every required storage, with those of predecessors."""
        return sum(store.pending() for store in self.stores)

    def refusals(self) -> tuple[int, int, list[LimitReached]]:
        """Return the refused connections, the refused frames, and the limits that peers have reached."""
        door = self._admission.door if self._admission is not None else None
        return door.refused if door else 0, self.refused, door.limits.report() if door else []

    def inherited(self) -> int:
        """The number of pending blocks of predecessors."""
        return sum(store.pending() for store in self.stores[:-1])

    # The loop

    def receive(self) -> bool:
        """Take frames from consumers, for at most RECEIVE_LIMIT seconds. Returns whether there were any."""
        until = self._clock() + RECEIVE_LIMIT
        taken = False
        if self._admission is not None:
            self._admission.door.answer()
        while self._clock() < until:
            if not has_message(self.socket):
                self._emptied_at = self._clock()
                self._flooded_since = None
                return taken
            parts = receive(self.socket, 2)
            taken = True
            route = parts[0].bytes
            try:
                key = self._admission.door.sender(route, parts[-1]) if self._admission is not None else ""
                if len(parts) != 2:
                    found = "none" if len(parts) < 2 else "more"
                    raise ProtocolError(f"stream frame from {route.hex()}: expected 1 part, found {found}")
                self._handle(route, unpack_consumer(parts[1].bytes, route.hex()), key)
            except ProtocolError as error:
                self.refused += 1
                self._refuse(route, str(error))
        if self._flooded_since is None:
            self._flooded_since = self._clock()
        return taken

    def _heard_until(self) -> float:
        """The monotonic time up to which all frames have been taken.

        In a flood frames are always waiting. But ZeroMQ takes them from all peers in turn, so that after SILENT_AFTER
        seconds a frame of every living subscriber was taken.
        """
        now = self._clock()
        return now if self._flooded_since is not None and now - self._flooded_since > SILENT_AFTER else self._emptied_at

    def work(self) -> None:
        """Take one turn: take frames and, if there is something new, send blocks and free those that no storage needs.

        Every LOOK_INTERVAL also drop silent subscribers, and serve the others in any case.
        """
        taken = self.receive()
        if self._clock() >= self._look_at or (taken and self.forgotten):
            self._look_at = self._clock() + LOOK_INTERVAL
            self._drop_silent()
            self._note_idle()
        elif not (taken or self._has_news()):
            return
        self._changed, self._served_head = False, self.own.head
        if self.unsent and self.subscribers:  # the next subscriber comes first in this turn
            first = next(iter(self.subscribers))
            self.subscribers[first] = self.subscribers.pop(first)
        self.unsent = False
        self._pack_until = None
        for subscriber in list(self.subscribers.values()):
            if subscriber.mode == "all":
                self._serve_all(subscriber)
            else:
                self._serve_latest(subscriber)
        for store in self.stores:
            self.freed += store.free(self.forgotten)
            if store is not self.own and store.tail == store.head:
                store.close()
        self.stores = [store for store in self.stores if store is self.own or store.tail < store.head]
        self.own.spill()

    def _has_news(self) -> bool:
        """Whether there may be work without a frame: new blocks, or blocks that wait for libzmq or a disk."""
        own = self.own
        return (
            self.unsent
            or self._changed
            or own.head != self._served_head
            or bool(own.pins)
            or (own.spool is not None and bool(own.spool.files))
            or len(self.stores) > 1
        )

    def _drop_silent(self) -> None:
        heard_until = self._heard_until()
        for subscriber in list(self.subscribers.values()):
            if heard_until - subscriber.heard_at > SILENT_AFTER:
                self._drop(subscriber)

    # Frames from consumers

    def admit(self, update: Update) -> None:
        """Take over from the core which consumers may subscribe, and drop those whose key was revoked.

        A consumer keeps its entry until its name has another session, because a restarted core does not know all
        consumers yet, and data must not wait for it.
        """
        assert self._admission is not None
        self._changed = True
        self._consumers |= update.consumers
        for route in self._admission.apply(update.keys, insecure=update.insecure):
            self._unconfirmed.pop(route, None)
            if route in self.subscribers:
                log.warning("%s has no key any more: disconnected", self.subscribers[route].name)
                self._drop(self.subscribers[route])
        for route, (hello, key) in list(self._unconfirmed.items()):
            if self._knows(hello, key):
                del self._unconfirmed[route]
                self._subscribe(route, hello)

    def admit_child(self, name: str, session: str, key: str) -> None:
        """Let a child process of the producer subscribe under `name`, which nobody else may, without the core's word.

        `session` is a secret that only producer and child know; `key`: the child's public key, "" without keys.
        """
        self._children = {name: ConsumerSession(key, session_digest(session))}
        if self._admission is not None and key:
            self._admission.admit_child(key, name)

    def _is_confirmed(self, route: bytes, hello: Hello, key: str) -> bool:
        """Whether the core has confirmed a consumer. Only its second HELLO is refused, because the core's word may come
        later than the first one."""
        if self._admission is None or self._knows(hello, key):
            self._unconfirmed.pop(route, None)
            return True
        if route in self._unconfirmed:
            self.refused += 1
            self._refuse(route, f"the core does not confirm the session of {hello.name}")
            return False
        same = [other for other, (_, known) in self._unconfirmed.items() if known == key]
        if len(same) >= MAX_UNCONFIRMED and (name := self._admission.whose(key)):  # the core's own user has many names
            self._admission.door.limits.reached(name, f"{MAX_UNCONFIRMED} unconfirmed subscriptions")
            del self._unconfirmed[same[0]]
        elif len(self._unconfirmed) >= MAX_SUBSCRIBERS:
            del self._unconfirmed[next(iter(self._unconfirmed))]
        self._unconfirmed[route] = hello, key
        return False

    def _knows(self, hello: Hello, key: str) -> bool:
        """Whether the core knows the session of a HELLO that came with this key."""
        assert self._admission is not None
        known = self._children.get(hello.name) or self._consumers.get(hello.name)
        if known is None or known.digest != session_digest(hello.session):
            return False
        # A frame of a key that was revoked may still be on its way, and the name keeps its entry.
        return self._admission.insecure or (known.key == key and self._admission.whose(key) is not None)

    def _handle(self, route: bytes, frame: FromConsumer, key: str) -> None:
        if isinstance(frame, Hello):
            if self._is_confirmed(route, frame, key):
                self._subscribe(route, frame)
            return
        subscriber = self.subscribers.get(route)
        if subscriber is None:
            if not isinstance(frame, Bye):
                self._refuse(route, "hello")
            return
        subscriber.heard_at = self._clock()
        if isinstance(frame, Ack):
            self._acknowledge(subscriber, frame)
        elif isinstance(frame, Credit):
            if frame.blocks > subscriber.sent + MAX_CREDIT:
                raise ProtocolError(
                    f"credit of {subscriber.name}: expected at most {MAX_CREDIT} blocks more than the "
                    f"{subscriber.sent} that were sent, found {frame.blocks}"
                )
            subscriber.credit = max(subscriber.credit, frame.blocks)
            subscriber.sample.every = frame.every
        elif isinstance(frame, Maps):
            subscriber.maps = frame.epoch == self.own.epoch
        elif isinstance(frame, Packs):
            subscriber.packs = True
        elif isinstance(frame, Bye):
            self._drop(subscriber)

    def _subscribe(self, route: bytes, hello: Hello) -> None:
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
        if len(self.subscribers) >= MAX_SUBSCRIBERS and hello.name not in self.required():
            if self._admission is not None:
                self._admission.door.limits.reached(hello.name, f"{MAX_SUBSCRIBERS} consumers")
            self._refuse(route, f"{len(self.subscribers)} consumers have subscribed, more are not served")
            return
        subscriber = Subscriber(route, hello.name, hello.mode, self._clock(), hello.positions)
        subscriber.child = hello.name in self._children
        for store in self.stores:
            self._note_positions(subscriber, store)
        ring = str(self.own.ring_file.path.absolute()) if self.own.ring_file is not None else ""
        if self._send(route, Welcome(self.own.producer, self.own.epoch, self.run, self.layout, ring, packs=True)):
            self.subscribers[route] = subscriber
            log.debug("%s has subscribed (%s)", hello.name, hello.mode)

    def required(self) -> set[str]:
        """The names of all required storages."""
        return {name for store in self.stores for segment in store.segments for name in segment.required}

    def _note_positions(self, subscriber: Subscriber, store: BlockStore) -> None:
        """Take over a storage's positions in a store from its HELLO. A monitor begins at the newest block."""
        if subscriber.mode != "all":
            subscriber.cursors[store.epoch] = store.head
            return
        for position in subscriber.positions:
            if (position.producer, position.epoch) == (store.producer, store.epoch):
                store.acknowledge(subscriber.name, position.run, position.next)

    def _acknowledge(self, subscriber: Subscriber, ack: Ack) -> None:
        if subscriber.mode != "all":
            return
        for store in self.stores:
            if store.epoch == ack.epoch:
                store.acknowledge(subscriber.name, ack.run, ack.next)
        in_flight = subscriber.in_flight.get((ack.run, ack.epoch))
        while in_flight and in_flight[0][0] < ack.next:
            subscriber.flight_bytes -= in_flight.popleft()[1]
        if in_flight is not None and not in_flight:
            del subscriber.in_flight[ack.run, ack.epoch]

    # Sending

    def _serve_all(self, subscriber: Subscriber) -> None:
        for store in self.stores:
            for segment in store.segments:
                if subscriber.name in segment.required and not self._serve(subscriber, store, segment):
                    return

    def _serve(self, subscriber: Subscriber, store: BlockStore, segment: Segment) -> bool:
        """Send blocks of a run as the window allows; True when there are no further ones so far."""
        end = store.end_of(segment)
        cursor = subscriber.cursors.get(store.epoch, 0)
        if cursor >= end:
            return True
        cursor = max(cursor, segment.position(subscriber.name), store.tail)
        in_flight = subscriber.in_flight.setdefault((segment.run, store.epoch), deque())
        lends = subscriber.child and subscriber.maps and store is self.own and store.can_lend()
        window = CHILD_WINDOW if lends else WINDOW
        while cursor < end and subscriber.flight_bytes < window:
            block = store.get(cursor)
            if block is None or (
                block.header and not self._send_block(subscriber, store, cursor, block, segment.layout)
            ):
                break
            if block.header:
                in_flight.append((cursor - segment.first, len(block.payload)))
                subscriber.flight_bytes += len(block.payload)
            cursor += 1
        subscriber.cursors[store.epoch] = cursor
        return cursor >= end

    def _serve_latest(self, subscriber: Subscriber) -> None:
        """Send the blocks of a monitor's sample, as its credit allows, and all that are never skipped.

        If there are more blocks than credit, those to send are drawn, because the first ones may be all of one board.
        """
        store = self.own
        assert store.ring is not None
        first = max(subscriber.cursors[store.epoch], store.ring.tail)
        kept = {index for index in range(first, store.head) if store.is_never_skipped(index)}
        wanted = [
            index
            for index in range(first, store.head)
            if index not in kept and (index == subscriber.unsent or subscriber.sample.takes_next())
        ]
        room = max(0, subscriber.credit - subscriber.sent)
        if not (subscriber.maps and store.can_lend()):
            room = min(room, MAX_SENT)
        if len(wanted) > room:
            wanted = random.sample(wanted, room)
        subscriber.cursors[store.epoch] = store.head
        for index in sorted(kept.union(wanted)):
            block = store.get(index)
            assert block is not None
            sent = self._send_block(subscriber, store, index, block, self.layout, at_once=index in kept)
            if subscriber.route not in self.subscribers:
                return
            # A block that there is no time to pack comes in the next turn, unless it would then come after a kept one.
            if not sent and index > max(kept, default=-1):
                subscriber.cursors[store.epoch] = subscriber.unsent = index
                break
            subscriber.sent += sent and index not in kept

    def _send_block(
        self,
        subscriber: Subscriber,
        store: BlockStore,
        index: int,
        block: StoredBlock,
        layout: int,
        *,
        at_once: bool = False,
    ) -> bool:
        """Send a block. Returns False when this turn has no time left to pack it, or the peer has disconnected.

        `at_once`: pack it in any case.
        """
        payload = block.payload
        packed: tuple[bytes, bytes] | None = None
        rows = schema.layout(layout)
        if subscriber.packs and len(payload) >= MIN_ROWS * rows.dtype.itemsize:
            packed = self._packer.pack(store.epoch, index, payload, rows, lambda: at_once or self._may_pack())
            if packed is None:
                self.unsent = True
                return False
        try:
            if not len(payload):
                send_parts(self.socket, subscriber.route, block.header)
            elif packed is not None:
                send_parts(self.socket, subscriber.route, block.header, *packed)
            elif subscriber.maps and block.pinned and store is self.own and store.can_lend():
                send_parts(self.socket, subscriber.route, block.header, b"", index.to_bytes(8, "little"))
            elif subscriber.mode != "all":  # a copy, because a monitor must not hold rows in the ring
                send_parts(self.socket, subscriber.route, block.header, payload)
            else:
                self.socket.send_multipart([subscriber.route, block.header], zmq.NOBLOCK | zmq.SNDMORE)
                tracker = self.socket.send(payload, zmq.NOBLOCK, copy=False, track=True)
                if block.pinned and tracker is not None and not tracker.done:
                    store.pins.append((index, tracker))
        except zmq.ZMQError:
            self._drop(subscriber)
            return False
        return True

    def _may_pack(self) -> bool:
        """Whether this turn may pack a block, which takes about half a millisecond. The first one always may."""
        if self._pack_until is None:
            self._pack_until = self._clock() + PACK_LIMIT
            return True
        return self._clock() < self._pack_until

    def _send(self, route: bytes, frame: FromProducer) -> bool:
        """Send a frame without rows; False when the peer has disconnected."""
        try:
            self.socket.send_multipart([route, pack(frame)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _refuse(self, route: bytes, reason: str) -> None:
        self._send(route, Refused(reason))

    def _drop(self, subscriber: Subscriber) -> None:
        if self.subscribers.pop(subscriber.route, None) is not None:
            log.debug("%s subscribes no longer", subscriber.name)

    # Storages that stay disconnected

    def _note_idle(self) -> None:
        """Note since when required storages have acknowledged nothing, and log those that are forgotten or come back.

        A connected storage counts as idle only while another one has blocks that it has not.
        """
        connected = {subscriber.name for subscriber in self.subscribers.values() if subscriber.mode == "all"}
        now = self._clock()
        idle: dict[str, tuple[int, float]] = {}
        for name in self.required():
            segments = [segment for store in self.stores for segment in store.segments if name in segment.required]
            done = sum(segment.position(name) for segment in segments)
            behind = any(segment.position(name) < max(map(segment.position, segment.required)) for segment in segments)
            previous, since = self._idle.get(name, (done, now))
            works = name in connected and (done != previous or not behind)
            idle[name] = done, now if works else since
        self._idle = idle
        forgotten = frozenset(name for name, (_, since) in idle.items() if now - since > self._forget_after)
        for name in forgotten - self.forgotten:
            what = "has acknowledged nothing" if name in connected else "has been disconnected"
            log.error(
                "%s %s for %g s: blocks that another storage has are no longer kept for it",
                name, what, self._forget_after,
            )  # fmt: skip
        for name in self.forgotten & idle.keys() - forgotten:
            log.warning("%s acknowledges again; blocks that were not kept for it are missing there", name)
        self.forgotten = forgotten


def stream_router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """Make the socket for a Publisher, not bound yet, because its options count from the bind on."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FROM_CONSUMER)
    config.close_dead_connections(socket, DEAD_CONSUMER)
    return socket


def bind_stream(listener: zmq.Socket[bytes], address: str | None, core: str) -> str:
    """Bind to `address` (default: towards the core), on a free port if it names none; return where others connect."""
    wanted = address or f"tcp://{config.interface_towards(core)}"
    where = config.listen_address(wanted, 0)
    try:
        listener.ipv6 = config.is_ipv6(where)
        listener.bind(where)
    except zmq.ZMQError as error:
        raise ConfigError(f"--address {where}: {error.strerror}") from None
    endpoint = listener.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return config.reachable_address(endpoint.decode().rstrip("\0"), core)
