"""The consumers' side of the stream: a thread with a DEALER to each producer.

The thread receives, renews subscriptions and repeats the last ACK or CREDIT, even while the process's own loop is busy.
The received frames wait in a queue, whose size the producers' windows limit. From a producer that exceeds its window
nothing more is received for now, and its connection is closed when too much waits there.

A process that has stalled may have been taken for dead, and another one started under its name. So it sends nothing to
producers until the core has confirmed that the name is still its own, or has been silent for NO_CORE seconds.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import zmq

from larpixdaq import schema
from larpixdaq._native.ring_buffer import Reader
from larpixdaq.buffer import ring_file
from larpixdaq.constants import NO_CORE
from larpixdaq.errors import ProtocolError, RingError
from larpixdaq.keys.curve import Client, KeyPair, has_message, new_pair
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.packed_rows import PLAIN_ROWS, PackedRows
from larpixdaq.protocol.stream import (
    MAX_HEADER,
    MAX_POSITIONS,
    STREAM_VERSION,
    Ack,
    Block,
    BlockOrigin,
    Bye,
    Credit,
    End,
    FromConsumer,
    FromProducer,
    Hello,
    Maps,
    Packs,
    Position,
    Refused,
    Welcome,
    pack,
    unpack_producer,
)
from larpixdaq.runtime.event_loop import Waker
from larpixdaq.runtime.timing import next_beat, wait_ms

#: Seconds between two repetitions of the last ACK or CREDIT. All consumers of a host send at the same moments, so that
#: a producer wakes once for all of them.
REPEAT_INTERVAL = 0.25
#: An ACK is sent with the next frame that arrives, at the latest after so many seconds, and at once after so many bytes
#: or an end record. Waking the threads of both processes for each ACK takes as much time as a small block.
ACK_DELAY: Final = 0.05
ACK_BYTES: Final = 256 << 10
#: Seconds between two HELLOs without a WELCOME.
HELLO_INTERVAL = 0.5
#: Maximum number of connections to producers that the core does not name and that send nothing.
MAX_DISCONNECTED = 16
log = logging.getLogger(__name__)
#: Producer, frame, and either the rows of a block, or its packed rows if a storage may write them as they are.
Received = tuple[str, FromProducer, memoryview | None, PackedRows | None]
_Queued = tuple[str, FromProducer, "memoryview | RingRows | None", PackedRows | None]
#: Milliseconds for which the thread of a monitor that wants only a sample of the blocks waits for more of them, because
#: several at a time take two thirds of the processor time.
REST: Final = 20
#: Milliseconds for which the thread of a storage that rests waits for more blocks, and bytes in such a time from which
#: on it does not, because the stream's window would fill meanwhile.
CALM_REST: Final = 50
CALM_BYTES: Final = 4 << 20
#: Blocks that a monitor has credit for at the beginning. A block that is sent takes up to 0.9 MB of memory; one that is
#: read in the ring takes none, and a saturated producer makes some 100 blocks before it looks for credit again.
CREDIT, RING_CREDIT = 2, 32
#: Seconds between two attempts to connect to a producer that refuses the key.
KEY_INTERVAL: Final = 1.0
#: Maximum bytes from a producer that wait for the stream's thread, and of those that wait for the process's loop. The
#: window is smaller; INFO texts and end records do not count in it.
MAX_WAITING: Final = 64 << 20
#: Maximum seconds for which the thread receives from one producer before it turns to the others.
RECEIVE_LIMIT: Final = 0.02
#: Seconds between two turns of a loop after which the process may have been taken for dead: for the core it is lost
#: after 1 s without a heartbeat.
STALL_LIMIT: Final = 0.8


class RingRows:
    """Rows of a block that are in the producer's ring and may be overwritten there."""

    def __init__(self, ring: Reader, index: int) -> None:
        self._ring, self._index = ring, index

    def read(self) -> memoryview | None:
        """Return a copy, or None when they are not there any more."""
        rows = self._ring.read(self._index)
        return None if rows is None else memoryview(rows)


class Consumer:
    """Subscribes to producers as `name`; `mode` is "all" (each block, acknowledged) or "latest" (as credit allows).

    `positions()` returns this consumer's positions for each HELLO; it is called in the thread. `core` (a Node) confirms
    after a stall that this process still has its name. Before that nothing is sent to producers, because the newest
    HELLO of a name wins. All methods but those of the thread belong to the process's loop.
    """

    def __init__(
        self,
        name: str,
        session: str,
        mode: str,
        *,
        core: CoreContact,
        positions: Callable[[], list[Position]] = list,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.session = session
        self.mode = mode
        self._positions = positions
        self._clock = clock
        self._core = core
        self._session_check = SessionCheck(core, clock)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connections: dict[str, ProducerConnection] = {}
        self._queue: deque[tuple[_Queued, int]] = deque()  # with the bytes of the message
        #: Producer -> bytes of all messages that the thread has put into the queue, and that the loop has taken.
        self._queued: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._acknowledged: Counter[str] = Counter()  # `_taken` when the thread was last woken for an ACK
        self._ended: set[str] = set()  # producers whose last frame was an end record
        self._lock = threading.Lock()
        self._endpoints: dict[str, Endpoint] | None = None
        self._acks: dict[str, dict[tuple[int, int], int]] = {}
        self._credit: dict[str, int] = {}
        self._every = 1.0
        self._rests = False
        self._received = 0  # bytes since the thread's last _is_calm()
        self._calm_at = 0.0
        self._calm = False
        self._resubscribe = self._send_rows = False
        self._arrived = Waker()  # wakes the process's loop
        self._waker = Waker()  # wakes the thread
        self._closing = False
        self._poller, self._resting = zmq.Poller(), zmq.Poller()
        self._thread = threading.Thread(target=self._run, name=f"stream of {name}", daemon=True)
        self._thread.start()

    # Called by the process's loop

    def connect(self, producers: Mapping[str, Endpoint]) -> None:
        """Subscribe to these producers (by name) too.

        A producer that is no longer named stays subscribed, because a restarted core does not know all components yet,
        and data must not wait for it. It is dropped when its name has another address, or when too many producers have
        gone.
        """
        with self._lock:
            self._endpoints = dict(producers)
        self._waker.wake()

    def fileno(self) -> int:
        """Polls readable while next() has something."""
        return self._arrived.fileno()

    @property
    def queued(self) -> int:
        """The number of frames that wait for next()."""
        return len(self._queue)

    def processor_time(self) -> float:
        """Return the processor time (s) of the thread so far."""
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def next(self) -> Received | None:
        """Return the oldest waiting frame (Welcome, Block, End or Refused) with its producer and rows, or None.

        In mode "all" the rows may be in the producer's ring. There they may change after their acknowledgement, or when
        the producer has dropped this consumer, so the caller must copy them before it checks them.
        """
        while not self._resubscribe:
            if not self._queue:
                self._arrived.clear()  # before the second look at the queue, because a frame may have come meanwhile
                if not self._queue:
                    break
            (name, frame, payload, packed), size = self._queue.popleft()
            was_full = self._is_full(name)
            self._taken[name] += size
            if isinstance(frame, End):
                self._ended.add(name)
            else:
                self._ended.discard(name)
            if was_full and not self._is_full(name):
                self._waker.wake()
            if not isinstance(payload, RingRows):
                return name, frame, payload, packed
            rows = payload.read()
            if rows is not None:
                return name, frame, rows, None
            if isinstance(frame, Block) and frame.text is None:
                self.add_credit(name)
        return None

    def add_credit(self, producer: str) -> None:
        """Mode "latest": let the producer send one further block, because one has been processed."""
        with self._lock:
            self._credit[producer] = waiting = self._credit.get(producer, 0) + 1
        connection = self._connections.get(producer)
        if connection is not None and connection.returns_credit(waiting):
            self._waker.wake()

    def sample(self, every: float) -> None:
        """Mode "latest": ask the producers for one of each `every` blocks, chosen at random."""
        self._every = every

    def rest(self, rests: bool) -> None:
        """Mode "all": whether blocks may wait for others, so that at ordinary rates several are taken at a time."""
        if rests != self._rests:
            self._rests = rests
            self._waker.wake()

    def acknowledge(self, origin: BlockOrigin, following: int, *, at_once: bool = False) -> None:
        """Mode "all": acknowledge all blocks of `origin` below sequence `following`, which are durable.

        `at_once`: without waiting for more, because many of them may fill the window.
        """
        name = origin.producer
        with self._lock:
            self._acks.setdefault(name, {})[origin.run, origin.epoch] = following
        if at_once or name in self._ended or self._taken[name] - self._acknowledged[name] >= ACK_BYTES:
            self._acknowledged[name] = self._taken[name]
            self._waker.wake()

    def resubscribe(self, *, send_rows: bool = False) -> None:
        """Subscribe anew to every producer, so that all blocks without acknowledgement come again.

        Discards all queued frames of the previous subscription, because the caller has skipped some of them and later
        ones would look like a gap. `send_rows`: the producers send the rows, which are not read in their rings.
        """
        with self._lock:
            self._resubscribe, self._send_rows = True, self._send_rows or send_rows
        self._waker.wake()

    def close(self) -> None:
        """Send the last acknowledgements, say BYE and stop."""
        self._closing = True
        self._waker.wake()
        self._thread.join(timeout=5)
        self._queue.clear()
        self._arrived.close()
        self._waker.close()

    # Called by the thread

    def _run(self) -> None:
        for poller in (self._poller, self._resting):
            poller.register(self._waker.fileno(), zmq.POLLIN)
        closing = False
        try:
            while not closing:
                closing = self._closing  # then one more turn, which sends the acknowledgements from before close()
                if self._every > 1.0:
                    self._resting.poll(REST)
                elif self._rests and self._received and self._is_calm():
                    self._resting.poll(CALM_REST)
                if self._waker.fileno() in dict(self._poller.poll(self._timeout())):
                    self._waker.clear()
                self._session_check.may_act()
                self._apply()
                for connection in list(self._connections.values()):
                    self._receive(connection)
                    if not connection.socket.closed:
                        self._maintain(connection)
        finally:
            for connection in self._connections.values():
                connection.send(Bye())
                connection.close()
            self._context.term()

    def _is_calm(self) -> bool:
        """Whether fewer than CALM_BYTES came within the last CALM_REST. Called once a turn."""
        now = self._clock()
        if now >= self._calm_at:
            self._calm = self._received < CALM_BYTES
            self._received, self._calm_at = 0, now + CALM_REST / 1000
        return self._calm

    def _timeout(self) -> int:
        """Milliseconds until a frame must be sent even if none has come."""
        now = self._clock()
        until = next_beat(now, REPEAT_INTERVAL)
        for connection in self._connections.values():
            if not connection.subscribed:
                until = min(until, now + HELLO_INTERVAL / 4)
            elif connection.awaits_ack():
                until = min(until, now + ACK_DELAY)
        return wait_ms(until, now)

    def _apply(self) -> None:
        """Do what the process's loop has asked for."""
        with self._lock:
            endpoints, self._endpoints = self._endpoints, None
            acks, self._acks = self._acks, {}
            credit, self._credit = self._credit, {}
            if self._resubscribe:
                for connection in self._connections.values():
                    connection.end_subscription()
                    connection.hello_at, connection.send_rows = 0.0, self._send_rows
                self._queue.clear()
                self._queued = self._taken.copy()  # the loop takes nothing meanwhile
                self._resubscribe = self._send_rows = False
        if endpoints is not None:
            for connection in list(self._connections.values()):
                if endpoints.get(connection.name, connection.endpoint) != connection.endpoint:
                    self._drop(connection)
            gone = [c for c in self._connections.values() if c.name not in endpoints and not c.subscribed]
            for connection in gone[:-MAX_DISCONNECTED]:
                self._drop(connection)
            for name, endpoint in endpoints.items():
                if name not in self._connections:
                    self._open(name, endpoint)
        for name, blocks in credit.items():
            if name in self._connections:
                connection = self._connections[name]
                connection.credit += blocks
                if connection.returns_credit(connection.credit - connection.sent_credit):
                    connection.repeat_at = 0.0
        for name, entries in acks.items():
            if name in self._connections:
                self._connections[name].acks.update(entries)
                self._connections[name].repeat_at = 0.0

    def _open(self, name: str, endpoint: Endpoint) -> None:
        own = None if self._core is None else self._core.key_pair
        try:
            connection = ProducerConnection(self._context, name, endpoint, own, keeps=self.mode == "all")
        except zmq.ZMQError as error:  # this thread serves the other producers too
            log.error("%s: cannot subscribe at %r: %s", name, endpoint.address, error.strerror)
            return
        self._poller.register(connection.socket, zmq.POLLIN)
        self._connections[name] = connection
        log.debug("subscribing to %s at %s", name, endpoint.address)

    def _drop(self, connection: ProducerConnection) -> None:
        del self._connections[connection.name]
        self._poller.register(connection.socket, 0)
        connection.send(Bye())
        connection.close()

    def _reopen(self, connection: ProducerConnection) -> None:
        self._drop(connection)
        self._open(connection.name, connection.endpoint)
        if connection.name in self._connections:  # one line, however often it is tried
            self._connections[connection.name].last_warning = connection.last_warning

    def _receive(self, connection: ProducerConnection) -> None:
        arrived = False
        until = self._clock() + RECEIVE_LIMIT
        while not connection.socket.closed and not self._is_full(connection.name):
            try:
                received = connection.receive()
                if received is None:
                    break
                arrived |= self._frame(connection, *received)
            except ProtocolError as error:
                self._warn(connection, str(error))
            if self._clock() > until:
                break
        if arrived:
            self._arrived.wake()
        if not connection.socket.closed:
            self._poller.register(connection.socket, 0 if self._is_full(connection.name) else zmq.POLLIN)

    def _is_full(self, producer: str) -> bool:
        """Whether so much of a producer waits for the process's loop that nothing is received from it."""
        return self._queued[producer] - self._taken[producer] > MAX_WAITING

    def _frame(
        self,
        connection: ProducerConnection,
        size: int,
        frame: FromProducer,
        payload: memoryview | RingRows | None,
        packed: PackedRows | None,
    ) -> bool:
        """Handle a message of `size` bytes. Returns whether it was put into the queue."""
        if isinstance(frame, Welcome):
            if frame.producer != connection.name:  # another producer listens at this address now
                self._drop(connection)
                return False
            connection.subscribed, connection.epoch = True, frame.epoch
            connection.last_warning = ""
            connection.begin_rows(frame, self._clock())
        elif isinstance(frame, Refused):
            connection.end_subscription()
            if frame.reason == "hello":
                connection.hello_at = 0.0  # the producer does not know this consumer: say HELLO at once
                return False
            connection.hello_at = self._clock() + HELLO_INTERVAL
            if frame.reason == "superseded":
                # The other process keeps the name until the core says that it is ours: insisting would never end.
                connection.superseded = self.session, self._clock()
            self._warn(connection, f"{connection.name} refuses the stream to {self.name}: {frame.reason}")
        elif isinstance(frame, Block | End):
            if frame.producer != connection.name:
                raise ProtocolError(f"{connection.name} has sent a block of {frame.producer}: refused")
            if not connection.subscribed:
                return False  # from a previous subscription; the block will be sent again
            if isinstance(frame, Block) and payload is None and packed is None:
                self._report_missing_rows(connection, frame)
                return False
        if self.mode == "all" and isinstance(frame, Block | End):
            connection.awaited = Ack(frame.run, frame.epoch, frame.following)
        self._queued[connection.name] += size
        self._received += size
        self._queue.append(((connection.name, frame, payload, packed), size))
        return True

    def _report_missing_rows(self, connection: ProducerConnection, block: Block) -> None:
        """Handle a block whose rows are not in the ring any more, or that came without rows."""
        self._warn(
            connection, f"block {block.sequence} of run {block.run} from {connection.name} has no rows (any more)"
        )
        if self.mode == "latest":
            connection.credit += block.text is None
            connection.repeat_at = 0.0
        else:  # later blocks would look like a gap
            connection.end_subscription()
            connection.hello_at, connection.send_rows = self._clock() + HELLO_INTERVAL, True

    def _maintain(self, connection: ProducerConnection) -> None:
        if not self._session_check.may_act():
            return
        now = self._clock()
        connection.end_plain_rows(now)
        refused = connection.key_refused()  # each time, so that libzmq's events never wait
        if connection.exceeds:
            self._reopen(connection)
            return
        if refused and not connection.subscribed and now >= connection.opened_at + KEY_INTERVAL:
            # libzmq does not connect again after that, and the producer may know the key by now.
            self._warn(connection, f"{connection.name} refuses the key of {self.name}; trying again")
            self._reopen(connection)
            return
        if not connection.subscribed:
            # Not before the socket is connected, and then at once, not after HELLO_INTERVAL.
            can_send = now >= connection.hello_at and not self._superseded(connection)
            can_send = can_send and not self._is_full(connection.name)
            if can_send and connection.socket.poll(0, zmq.POLLOUT):
                connection.credit = CREDIT
                connection.acks.clear()
                hello = Hello(STREAM_VERSION, self.name, self.session, self.mode, self._positions_at(connection.name))
                if connection.send(hello) and self.mode == "latest":
                    connection.send_credit(self._every)
                connection.hello_at = now + HELLO_INTERVAL
                connection.repeat_at = next_beat(now, REPEAT_INTERVAL)
            return
        if self.mode == "all" and connection.acks:
            for (run, epoch), following in connection.acks.items():
                connection.last_ack = Ack(run, epoch, following)
                connection.send(connection.last_ack)
            connection.acks.clear()
            connection.repeat_at = next_beat(now, REPEAT_INTERVAL)
        elif now >= connection.repeat_at:
            if connection.last_ack is not None:
                connection.send(connection.last_ack)
            else:
                connection.send_credit(self._every)
            connection.repeat_at = next_beat(now, REPEAT_INTERVAL)

    def _positions_at(self, producer: str) -> list[Position]:
        """Return the positions in this producer's blocks, of the newest runs.

        For older runs the producer uses the acknowledgements, and a block that comes twice is known by its identity.
        """
        found = [position for position in self._positions() if position.producer == producer]
        return heapq.nlargest(MAX_POSITIONS, found, key=lambda position: position.run)

    def _superseded(self, connection: ProducerConnection) -> bool:
        """Whether another process has our name, until this one registers anew or the core confirms that it has it."""
        if connection.superseded is None or connection.superseded[0] != self.session:
            return False
        return self._core.confirmed <= connection.superseded[1]

    def _warn(self, connection: ProducerConnection, text: str) -> None:
        if text != connection.last_warning:
            connection.last_warning = text
            log.warning(text)


class ProducerConnection:
    """A consumer's connection to one producer. Used by the stream's thread alone.

    zmq.ZMQError when the address is not valid.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        name: str,
        endpoint: Endpoint,
        own: KeyPair | None,
        *,
        keeps: bool,
    ) -> None:
        """`own`: the consumer's key pair. `keeps`: the producer keeps each block until it is acknowledged."""
        self.name = name
        self.endpoint = endpoint
        self.opened_at = time.monotonic()
        self.subscribed = False
        self.epoch = 0
        self.hello_at = 0.0  # monotonic time before which no HELLO is sent
        self.repeat_at = 0.0  # monotonic time of the next repetition of ACK or CREDIT
        self.credit = CREDIT  # blocks in all since the HELLO
        self.sent_credit = 0  # the same as last sent to the producer
        self.acks: dict[tuple[int, int], int] = {}  # (run, epoch) -> next, not sent yet
        self.last_ack: Ack | None = None
        self.awaited: Ack | None = None  # mode "all": of the last frame
        self.last_warning = ""
        #: The session, and the monotonic time, when the producer refused this consumer for a newer HELLO of its name.
        self.superseded: tuple[str, float] | None = None
        self._keeps = keeps
        self._ring: Reader | None = None  # the producer's, if it is on this host
        self.send_rows = False  # the next subscription begins with plain rows, which the producer must send
        self._plain: tuple[Welcome, float] | None = None  # until when (monotonic) this subscription has plain rows
        if endpoint.key and own is None:  # the core uses no keys, and so the producer admits any
            own = new_pair()
        address, server = endpoint.address, endpoint.key
        self._client = Client(context, address, MAX_HEADER, own=own, server=server, parts=3, backlog=MAX_WAITING)
        self.socket = self._client.socket

    def key_refused(self) -> bool:
        """Whether the producer has refused the key. To be called several times a second."""
        return self._client.look() == "key"

    @property
    def exceeds(self) -> bool:
        """Whether the producer has sent more than may wait, so that the connection was closed and must be made anew."""
        return self._client.was_closed

    def close(self) -> None:
        self._client.close(linger=100)

    def send(self, frame: FromConsumer) -> bool:
        try:
            self.socket.send(pack(frame), zmq.NOBLOCK)
        except zmq.Again:
            self.end_subscription()  # not connected: a new connection begins with HELLO
            return False
        return True

    def send_credit(self, every: float) -> None:
        """Send the credit. Of successive blocks, one of each `every` is wanted."""
        self.send(Credit(self.credit, every))
        self.sent_credit = self.credit

    def returns_credit(self, blocks: int) -> bool:
        """Whether credit for so many further blocks is sent at once, because the producer may soon have none left.

        Each sending costs producer and consumer as much as a block.
        """
        return blocks >= (1 if self._ring is None else RING_CREDIT // 4)

    def awaits_ack(self) -> bool:
        """Whether frames have come since the last ACK was sent."""
        awaited, last = self.awaited, self.last_ack
        if awaited is None or last is None:
            return awaited is not None
        return (last.run, last.epoch) != (awaited.run, awaited.epoch) or last.next < awaited.next

    def end_subscription(self) -> None:
        """Note that there is no subscription. Unmap the ring, so that an ended producer's memory is given back."""
        self.subscribed = False
        self.awaited = None
        self._ring = self._plain = None

    def receive(self) -> tuple[int, FromProducer, memoryview | RingRows | None, PackedRows | None] | None:
        """Return the next frame, with a block's rows or packed rows (as in Received) or neither if they are not
        available, and before it the bytes of its message and of rows that were read elsewhere; None without a message.

        ProtocolError for an invalid message, which is discarded.
        """
        if not has_message(self.socket):
            return None
        header, *parts = (part.buffer for part in self._client.receive())
        if len(parts) > 2:
            raise ProtocolError(f"stream frame from {self.name}: expected at most 3 parts, found more")
        size = len(header) + sum(map(len, parts))
        frame = unpack_producer(header, self.name)
        payload: memoryview | RingRows | None = parts[0] if parts else None
        if len(parts) > 1 and isinstance(frame, Block):
            if len(parts[0]):
                payload, packed = self._unpack(frame, parts[0], parts[1])
                return size + _bytes(payload), frame, payload, packed
            if len(parts[1]) != 8:
                raise ProtocolError(
                    f"block from {self.name}: its place in the ring has {len(parts[1])} bytes, expected 8"
                )
            payload = self._read_ring(parts[1]) if self.subscribed and frame.epoch == self.epoch else None
            size += _bytes(payload)
        return size, frame, payload, None

    def _unpack(
        self, block: Block, data: memoryview, description: memoryview
    ) -> tuple[memoryview | None, PackedRows | None]:
        """Unpack the rows of a block, if they are not to fill a chunk of a file.

        Damaged rows count as not available, so that they are requested again.
        """
        if not self.subscribed:
            return None, None
        try:
            packed = PackedRows.parse(data, description, block.rows)
            if self._keeps and block.rows == schema.CHUNK_ROWS:
                return None, packed
            return packed.unpack(block.rows, schema.layout(block.layout)).data.cast("B"), None
        except ProtocolError as error:
            log.warning("block %d of run %d from %s: %s", block.sequence, block.run, self.name, error)
            return None, None

    def begin_rows(self, welcome: Welcome, now: float) -> None:
        """Say how a new subscription gets the rows: plain for PLAIN_ROWS seconds if it must, and otherwise as best."""
        self._ring = self._plain = None
        if self.send_rows:
            self.send_rows, self._plain = False, (welcome, now + PLAIN_ROWS)
            log.warning("%s sends plain rows for %g s", self.name, PLAIN_ROWS)
        else:
            self._map_or_pack(welcome)

    def end_plain_rows(self, now: float) -> None:
        """Ask for packed rows, or read the ring, again when PLAIN_ROWS seconds are over."""
        if self._plain is not None and now >= self._plain[1]:
            welcome, self._plain = self._plain[0], None
            if how := self._map_or_pack(welcome):
                log.info("rows of %s come %s again", self.name, how)

    def _map_or_pack(self, welcome: Welcome) -> str:
        """Read rows in the producer's ring from now on, if that is on this host; otherwise they are sent, and packed if
        the producer can do that. Returns how they come, "" for plain rows."""
        if welcome.ring:
            with contextlib.suppress(RingError):
                self._ring = ring_file.open_reader(Path(welcome.ring), welcome.producer, welcome.epoch)
        if self._ring is not None:
            self.send(Maps(welcome.epoch))
            if not self._keeps:
                self.credit += RING_CREDIT - CREDIT
                self.repeat_at = 0.0
            return "out of its ring"
        if welcome.packs:
            self.send(Packs())
            return "packed"
        return ""

    def _read_ring(self, place: memoryview) -> memoryview | RingRows | None:
        """Return a block's rows in the ring, which may be overwritten unless they are kept for this consumer; None when
        they are not there."""
        if self._ring is None:
            return None
        index = int.from_bytes(place, "little")
        return self._ring.view(index) if self._keeps else RingRows(self._ring, index)


class CoreContact(Protocol):
    """The part of a Node that is needed here. `heard`: monotonic time of the core's last message; `confirmed`: of the
    newest heartbeat of this process that the core has answered."""

    @property
    def heard(self) -> float: ...
    @property
    def confirmed(self) -> float: ...
    @property
    def key_pair(self) -> KeyPair | None: ...


class SessionCheck:
    """Notices that a loop has stalled, and says when it may act again. Call may_act() often, and before each action."""

    def __init__(self, core: CoreContact, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._clock = clock
        #: Seconds of the last stall.
        self.stall = 0.0
        self._last_call: float | None = None
        self._resumed_at: float | None = None  # monotonic time of the end of a stall that is not confirmed yet

    def may_act(self) -> bool:
        """Whether the process may act: after a stall not until the core has answered a heartbeat from after the stall.

        Also when the core has been silent for NO_CORE seconds, because then no other process can have registered.
        """
        now = self._clock()
        stalled, self._last_call = now - (now if self._last_call is None else self._last_call), now
        if stalled > STALL_LIMIT:
            self._resumed_at = now
            self.stall = stalled
        if self._resumed_at is None:
            return True
        if self._core.confirmed > self._resumed_at or now - max(self._resumed_at, self._core.heard) > NO_CORE:
            self._resumed_at = None
        return self._resumed_at is None


def _bytes(payload: memoryview | RingRows | None) -> int:
    """Return the bytes of rows that were received or may be read; rows that are read later count as none."""
    return len(payload) if isinstance(payload, memoryview) else 0
