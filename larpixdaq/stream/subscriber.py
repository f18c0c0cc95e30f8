"""The consumers' side of the stream: one thread with a DEALER to each producer.

The thread receives, keeps up the subscription and repeats the last ACK or CREDIT, whatever the process around it is
busy with. What it has received waits in a queue that the producers' windows bound.

The connection of a consumer to one producer: what is said over it, and how rows come to be here.

Whether a process is still who it was: one that has stood still may have been taken for dead, and another of its name
started.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import zmq

from larpixdaq import config
from larpixdaq._native.ring_buffer import Reader
from larpixdaq.buffer import ring_file
from larpixdaq.constants import NO_CORE
from larpixdaq.errors import ProtocolError, RingError
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
    Position,
    Refused,
    Welcome,
    pack,
    unpack_producer,
)
from larpixdaq.runtime.event_loop import Waker
from larpixdaq.runtime.timing import next_beat, wait_ms

#: The last ACK or CREDIT is said again in this rhythm (seconds), which is that of all consumers of a host: a producer
#: wakes for all of them at once.
REPEAT = 0.25
#: Without a WELCOME the HELLO is said again so often.
HELLO_AGAIN = 0.5
#: Producers that neither the core names nor anything comes from are kept up to this number.
MOST_GONE = 16
log = logging.getLogger(__name__)
Received = tuple[str, FromProducer, memoryview | None]
#: Blocks that a monitor lets come before it has dealt with the first of them.
CREDIT = 2
#: More than this between two turns of a loop, in seconds, and we may have been taken for dead: the core says `lost`
#: after 1 s without a heartbeat.
STOOD_STILL: Final = 0.8


class Consumer:
    """Subscribes to producers as `name`; `mode` is "all" (each block, acknowledged) or "latest" (what there is credit
    for).

    `positions()` tells, at each HELLO, where this consumer stands; it is called in the thread. `core` (a Node) is asked
    whether our name is still ours when the thread has stood still: before that nothing is said to any producer, since
    the newest HELLO of a name wins.
    """

    def __init__(
        self,
        name: str,
        session: str,
        mode: str,
        *,
        positions: Callable[[], list[Position]] = list,
        core: CoreContact | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.session = session
        self.mode = mode
        self._positions = positions
        self._clock = clock
        self._core = core
        self._standing = None if core is None else SessionCheck(core, clock)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links: dict[str, ProducerConnection] = {}
        self._queue: deque[Received] = deque()
        self._lock = threading.Lock()
        self._wanted: dict[str, str] | None = None
        self._acks: dict[str, dict[tuple[int, int], int]] = {}
        self._done: dict[str, int] = {}
        self._again = self._sent = False
        self._arrived = Waker()  # wakes the process
        self._waker = Waker()  # wakes the thread
        self._closing = False
        self._poller = zmq.Poller()
        self._thread = threading.Thread(target=self._run, name=f"stream of {name}", daemon=True)
        self._thread.start()

    # the process's side

    def connect(self, producers: Mapping[str, str]) -> None:
        """Subscribe to these producers (name -> address) too.

        One that is not named any more stays subscribed: a core that has just come back does not know everybody yet, and
        data must not wait for it. It goes when its name appears at another address, or when too many others have gone.
        """
        with self._lock:
            self._wanted = dict(producers)
        self._waker.wake()

    def fileno(self) -> int:
        """Polls readable while next() has something."""
        return self._arrived.fileno()

    @property
    def queued(self) -> int:
        """Frames that wait for next()."""
        return len(self._queue)

    def next(self) -> Received | None:
        """The oldest frame that waits: (producer, Welcome | Block | End | Refused, rows of a Block); None when none
        does. In mode "all" the rows may lie in the producer's ring: they may change as soon as they are acknowledged,
        or when we have been given up, so that whoever takes them has to copy them before they are checked."""
        if self._again:
            return None
        if not self._queue:
            self._arrived.clear()  # before another look, because a frame may have come meanwhile
        return self._queue.popleft() if self._queue else None

    def done(self, producer: str, blocks: int = 1) -> None:
        """Mode "latest": so many blocks have been dealt with, others may come in their place."""
        with self._lock:
            self._done[producer] = self._done.get(producer, 0) + blocks
        self._waker.wake()

    def acknowledge(self, source: BlockOrigin, following: int) -> None:
        """Mode "all": everything of `source` below sequence `following` is durable."""
        with self._lock:
            self._acks.setdefault(source.producer, {})[source.run, source.epoch] = following
        self._waker.wake()

    def again(self, *, sent: bool = False) -> None:
        """Subscribe anew to every producer: what was sent and not acknowledged comes again; with `sent` the rows are
        not read out of rings then.

        Nothing of the subscription before is handed over any more: who calls this has let some of it pass, and what
        came after that would seem to follow a gap.
        """
        with self._lock:
            self._again, self._sent = True, self._sent or sent
        self._waker.wake()

    def close(self) -> None:
        """Send the last acknowledgements, say BYE and stop."""
        self._closing = True
        self._waker.wake()
        self._thread.join(timeout=5)
        self._queue.clear()
        self._arrived.close()
        self._waker.close()

    # the thread's side

    def _run(self) -> None:
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        closing = False
        try:
            while not closing:
                closing = self._closing  # one turn more then: what was acknowledged before close() has to go out
                if self._waker.fileno() in dict(self._poller.poll(self._timeout())):
                    self._waker.clear()
                self._good()
                self._apply()
                for link in list(self._links.values()):
                    self._receive(link)
                    if not link.socket.closed:
                        self._keep_up(link)
        finally:
            for link in self._links.values():
                link.send(Bye())
                link.socket.close(linger=100)
            self._context.term()

    def _timeout(self) -> int:
        """Milliseconds until something is to be said although nothing has come."""
        now = self._clock()
        parted = any(not link.welcome for link in self._links.values())
        return wait_ms(min(next_beat(now, REPEAT), now + HELLO_AGAIN / 4 if parted else math.inf), now)

    def _apply(self) -> None:
        """Take over what the process asked for."""
        with self._lock:
            wanted, self._wanted = self._wanted, None
            acks, self._acks = self._acks, {}
            done, self._done = self._done, {}
            if self._again:
                for link in self._links.values():
                    link.part()
                    link.hello_at, link.sent = 0.0, self._sent
                self._queue.clear()
                self._again = self._sent = False
        if wanted is not None:
            for link in [one for one in self._links.values() if wanted.get(one.name, one.address) != one.address]:
                self._drop(link)
            gone = [link for link in self._links.values() if link.name not in wanted and not link.welcome]
            for link in gone[:-MOST_GONE]:
                self._drop(link)
            for name, address in wanted.items():
                if name not in self._links and (opened := self._open(name, address)) is not None:
                    self._links[name] = opened
        for name, blocks in done.items():
            if name in self._links:
                self._links[name].credit += blocks
                self._links[name].repeat_at = 0.0
        for name, entries in acks.items():
            if name in self._links:
                self._links[name].acks.update(entries)
                self._links[name].repeat_at = 0.0

    def _open(self, name: str, address: str) -> ProducerConnection | None:
        try:
            link = ProducerConnection(self._context, name, address, keeps=self.mode == "all")
        except zmq.ZMQError as error:  # this thread serves the other producers too
            log.error("%s: cannot subscribe at %r: %s", name, address, error.strerror)
            return None
        self._poller.register(link.socket, zmq.POLLIN)
        return link

    def _drop(self, link: ProducerConnection) -> None:
        del self._links[link.name]
        self._poller.unregister(link.socket)
        link.send(Bye())
        link.socket.close(linger=100)

    def _receive(self, link: ProducerConnection) -> None:
        arrived = False
        while not link.socket.closed:
            try:
                received = link.receive()
                if received is None:
                    break
                arrived |= self._frame(link, *received)
            except ProtocolError as error:
                self._warn(link, str(error))
        if arrived:
            self._arrived.wake()

    def _frame(self, link: ProducerConnection, frame: FromProducer, payload: memoryview | None) -> bool:
        if isinstance(frame, Welcome):
            if frame.producer != link.name:  # another producer listens where ours has been
                self._drop(link)
                return False
            link.welcome, link.epoch = True, frame.epoch
            link.warned = ""
            link.map(frame)
        elif isinstance(frame, Refused):
            link.part()
            if frame.reason == "hello":
                link.hello_at = 0.0  # the producer does not know us (any more): say HELLO at once
                return False
            link.hello_at = self._clock() + HELLO_AGAIN
            if frame.reason == "superseded":
                # Whoever has our name now is right until the core says that it is ours; to insist would be a war.
                link.superseded = self.session, self._clock()
            self._warn(link, f"{link.name} refuses the stream to {self.name}: {frame.reason}")
        elif isinstance(frame, Block | End):
            if not link.welcome:
                return False  # left over from a subscription before this one; it will be sent again
            if isinstance(frame, Block) and payload is None:
                self._missed(link, frame)
                return False
        self._queue.append((link.name, frame, payload))
        return True

    def _missed(self, link: ProducerConnection, block: Block) -> None:
        """A block came without rows: the producer has given it up for us in its ring, or it sends nonsense."""
        self._warn(link, f"block {block.sequence} of run {block.run} from {link.name} has no rows (any more)")
        if self.mode == "latest":
            link.credit += block.text is None
            link.repeat_at = 0.0
        else:  # what comes behind it would seem to follow a gap
            link.part()
            link.hello_at, link.sent = self._clock() + HELLO_AGAIN, True

    def _keep_up(self, link: ProducerConnection) -> None:
        if not self._good():
            return
        now = self._clock()
        if not link.welcome:
            # Before the connection stands nothing can be said; then at once, not after HELLO_AGAIN.
            if now >= link.hello_at and not self._superseded(link) and link.socket.poll(0, zmq.POLLOUT):
                link.credit = CREDIT
                link.acks.clear()
                hello = Hello(STREAM_VERSION, self.name, self.session, self.mode, self._positions_at(link.name))
                if link.send(hello) and self.mode == "latest":
                    link.send(Credit(link.credit))
                link.hello_at = now + HELLO_AGAIN
                link.repeat_at = next_beat(now, REPEAT)
            return
        if self.mode == "all" and link.acks:
            for (run, epoch), following in link.acks.items():
                link.last_ack = Ack(run, epoch, following)
                link.send(link.last_ack)
            link.acks.clear()
            link.repeat_at = next_beat(now, REPEAT)
        elif now >= link.repeat_at:
            link.send(link.last_ack or Credit(link.credit) if self.mode == "all" else Credit(link.credit))
            link.repeat_at = next_beat(now, REPEAT)

    def _positions_at(self, producer: str) -> list[Position]:
        """The positions in this producer's blocks, of the newest runs. For older ones the producer goes by what was
        acknowledged, and a block that comes again is known by its identity."""
        found = [position for position in self._positions() if position.producer == producer]
        return heapq.nlargest(MAX_POSITIONS, found, key=lambda position: position.run)

    def _good(self) -> bool:
        """Whether our name is still ours, as far as we know."""
        return self._standing is None or self._standing.good()

    def _superseded(self, link: ProducerConnection) -> bool:
        """Whether another has our name: until we are registered anew, or the core confirms that it is ours."""
        if link.superseded is None or link.superseded[0] != self.session:
            return False
        return self._core is None or self._core.confirmed <= link.superseded[1]

    def _warn(self, link: ProducerConnection, text: str) -> None:
        if text != link.warned:
            link.warned = text
            log.warning(text)


class ProducerConnection:
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
        self.socket = config.dealer(context, address, MAX_HEADER, queue=0)  # the producer's window is the bound

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
                self._ring = ring_file.open_reader(Path(welcome.ring), welcome.producer, welcome.epoch)
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


class CoreContact(Protocol):
    """What is needed of a Node: times (monotonic) of the last message from the core, and of the newest heartbeat of
    ours that it has answered."""

    @property
    def heard(self) -> float: ...
    @property
    def confirmed(self) -> float: ...


class SessionCheck:
    """Notices when a loop has stood still, and says when it may act again. To be asked before each act, and often."""

    def __init__(self, core: CoreContact, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._clock = clock
        #: For how long we stood still the last time, in seconds.
        self.stood = 0.0
        self._last: float | None = None
        self._since: float | None = None  # when we were back from standing still; None: all is well

    def good(self) -> bool:
        """Whether we may act: yes, until we stand still, and then when the core has answered what we sent after it."""
        now = self._clock()
        stood, self._last = now - (now if self._last is None else self._last), now
        if stood > STOOD_STILL:
            self._since = now
            self.stood = stood
        if self._since is None:
            return True
        if self._core.confirmed > self._since or now - max(self._since, self._core.heard) > NO_CORE:
            self._since = None
        return self._since is None
