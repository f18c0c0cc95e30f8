"""A discrete simulation of the line at any size: the ways of rows between its parts, and faults.

An uplink has one message on its way to the brokers at a time, like the real one. A Line needs SimPy (`pip install
simpy`).
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from line_parts import Batch, Broker, Costs, Delivery, Fault, Plan, Producer, Server, Signal, Storage, Stream

from larpixdaq.buffer.block_store import LENDING_LIMIT
from larpixdaq.stream.downlink import MAX_UNACKNOWLEDGED
from larpixdaq.stream.jetstream import API_LIMIT
from larpixdaq.stream.publisher import CHILD_WINDOW, WINDOW
from larpixdaq.stream.subscriber import STALL_LIMIT
from larpixdaq.stream.uplink_child import ACK_LIMIT, RETRY_INTERVAL

if TYPE_CHECKING:
    import simpy

    Events = Generator[simpy.Event, Any, None]

#: Maximum bytes of a message of an uplink: half of the brokers' max_payload.
MESSAGE = 1 << 19


class Sample(NamedTuple):
    """A look at fill levels."""

    at: float  # seconds
    ring: float  # the highest fill
    spool: float  # bytes, of all producers
    waiting: int  # rows that wait, counted for each storage
    published: int  # rows that the brokers had acknowledged so far
    stored: int  # rows that at least one storage had so far


@dataclass
class Result:
    """What became of the rows of all boards, and the largest values of one producer.

    `sent` = `stored` + `missed` + `dropped` + `lost` + `waiting`. stored: in at least one storage; missed: by a
    producer that was down or busy; dropped: ring and spool were full; lost: with the power of a host. `skipped`: rows
    that a storage has not, and another one has. `delays`: seconds from a row's block until the first storage's file has
    it: median, 99 %, longest. `load`: share of the time for which the busiest of each kind worked.
    """

    sent: int = 0
    stored: int = 0
    missed: int = 0
    dropped: int = 0
    lost: int = 0
    waiting: int = 0
    skipped: int = 0
    ring: float = 0.0
    spool: float = 0.0
    delays: tuple[float, float, float] = (0.0, 0.0, 0.0)
    drained_at: float = 0.0
    load: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


class Line:
    """A simulated system. run() returns what became of its rows."""

    def __init__(self, plan: Plan, costs: Costs, seed: int = 1) -> None:
        if plan.brokers and not 1 <= plan.replicas <= plan.brokers:
            raise ValueError(f"replicas: expected 1 to {plan.brokers}, the number of brokers, found {plan.replicas}")
        self.plan, self.costs = plan, costs
        self.random = random.Random(seed)
        try:
            from simpy import Environment
        except ImportError:
            raise SystemExit("the simulation needs SimPy: pip install simpy") from None
        self.env = Environment()
        self._cores = Server(self.env, number=plan.cores) if plan.cores else None
        self.stored_once = self.lost = 0
        self.delays: list[tuple[float, int]] = []
        self.streams: list[Stream] = []
        self.brokers = [Broker(self) for _ in range(plan.brokers)]
        self.producers = [Producer(self, number) for number in range(plan.producers)]
        self.storages = [Storage(self, number) for number in range(plan.storages)]
        self._samples: list[Sample] = []
        for number, producer in enumerate(self.producers):
            if not plan.brokers:
                for storage in self.storages:
                    self._direct(producer, storage)
                continue
            stream = Stream(self, number)
            self.streams.append(stream)
            uplink = Delivery(self.env, producer.release)
            producer.deliveries.append(uplink)
            self.env.process(self._uplink(producer, uplink, stream))
            for storage in self.storages:
                delivery = Delivery(self.env, lambda batch: None)  # brokers keep what was stored
                stream.deliveries.append(delivery)
                storage.deliveries.append(delivery)
                self.env.process(self._from_broker(stream, delivery, storage))
        for fault in plan.faults:
            self.env.process(self._fail(fault))

    def processor(self, number: int = 1) -> Server:
        """Return the processor of a process, with this number of cores."""
        return self._cores or Server(self.env, number=number)

    def run(self) -> Result:
        self.env.run(self.env.process(self._watch()))
        result = Result(
            sent=sum(producer.sent for producer in self.producers),
            stored=self.stored_once,
            missed=sum(producer.missed for producer in self.producers),
            dropped=sum(producer.dropped for producer in self.producers),
            lost=self.lost,
            waiting=self.waiting_once(),
            skipped=sum(delivery.skipped for storage in self.storages for delivery in storage.deliveries),
            ring=max(producer.ring_most for producer in self.producers),
            spool=max(producer.spool_most for producer in self.producers),
            delays=quantiles(self.delays, (0.5, 0.99, 1.0)),
            drained_at=self.env.now,
            samples=self._samples,
        )
        kinds: dict[str, Iterable[Server]] = {
            "producer": [producer.processor for producer in self.producers],
            "uplink": [producer.uplink for producer in self.producers],
            "producer's network": [producer.port for producer in self.producers],
            "storage": [storage.processor for storage in self.storages],
            "storage's network": [storage.port_in for storage in self.storages],
            "disk": [storage.disk for storage in self.storages],
            "broker": [broker.processor for broker in self.brokers],
            "broker's network": [broker.port_out for broker in self.brokers],
        }
        for kind, servers in kinds.items():
            cores = self.plan.broker_cores if kind == "broker" else 1
            result.load[kind] = max((server.busy for server in servers), default=0.0) / self.env.now / cores
        return result

    def waiting_once(self) -> int:
        """Return the number of rows that are in no storage yet and are not lost, from all places where rows wait."""
        seen: dict[int, int] = {}
        ways = [producer.deliveries for producer in self.producers] + [stream.deliveries for stream in self.streams]
        for deliveries in ways:
            for delivery in deliveries:
                for batch in [*delivery.queue, *delivery.flight]:
                    if not batch.copies:
                        seen[id(batch)] = batch.rows
        return sum(seen.values()) + sum(producer.backlog for producer in self.producers)

    def store(self, storage: Storage, delivery: Delivery, batch: Batch) -> None:
        """Note that the storage's file has the oldest batch on its way to it."""
        if not batch.copies:
            self.stored_once += batch.rows
            self.delays.append((self.env.now - batch.made_at, batch.rows))
        batch.copies += 1
        batch.outstanding -= 1
        if delivery.arrived() is not batch:
            raise AssertionError("a batch was stored that is not the oldest on its way")
        storage.rows += batch.rows
        storage.idle_since = self.env.now

    def settle(self, batch: Batch, storages: int = 1) -> None:
        """Note that some storages will never get the batch."""
        batch.outstanding -= storages
        if not batch.outstanding and not batch.copies:
            self.lost += batch.rows

    # Ways

    def _direct(self, producer: Producer, storage: Storage) -> None:
        delivery = Delivery(self.env, producer.release)
        producer.deliveries.append(delivery)
        storage.deliveries.append(delivery)
        self.env.process(self._from_producer(producer, delivery, storage))

    def _pack(self, producer: Producer, batch: Batch) -> Events:
        """Read a batch from the spool, if it is there, and pack it for its first consumer."""
        if batch.in_spool:
            yield producer.spool_disk.use(batch.bytes)
        if self.streams:
            yield producer.uplink.use(batch.rows * self.costs.uplink * 1e-9)
        elif not batch.packed:
            batch.packed = True
            yield producer.processor.use(batch.rows * self.costs.pack * 1e-9)

    def _from_producer(self, producer: Producer, delivery: Delivery, storage: Storage) -> Events:
        """Send batches over ZeroMQ, as the window allows."""
        while True:
            if not (delivery.queue and delivery.flight_bytes < WINDOW and storage.up and producer.up):
                yield delivery.changed.wait()
                continue
            batch, generation = delivery.send(), storage.generation
            if self.plan.same_host:
                lent = not batch.in_spool and producer.fill < LENDING_LIMIT
                ns = self.costs.from_ring if lent else self.costs.plain
                if batch.in_spool:
                    yield producer.spool_disk.use(batch.bytes)
            else:
                ns = self.costs.packed
                yield from self._pack(producer, batch)
                yield from transfer(batch.rows * self.costs.bytes, producer.port, storage.port_in)
            if generation == storage.generation:
                storage.take(delivery, batch, ns)

    def _uplink(self, producer: Producer, uplink: Delivery, stream: Stream) -> Events:
        """Pack batches for the brokers, as the window allows."""
        packed: deque[Batch] = deque()
        more = Signal(self.env)
        self.env.process(self._publish(producer, uplink, stream, packed, more))
        while True:
            window = CHILD_WINDOW if producer.fill < LENDING_LIMIT else WINDOW
            if not (uplink.queue and producer.up and uplink.flight_bytes < window):
                yield uplink.changed.wait()
                continue
            batch = uplink.send()
            yield from self._pack(producer, batch)
            packed.append(batch)
            more.wake()

    def _publish(
        self, producer: Producer, uplink: Delivery, stream: Stream, packed: deque[Batch], more: Signal
    ) -> Events:
        """Publish packed batches, one message at a time, with all of them that fit into it."""
        while True:
            while packed and not packed[0].alive:
                packed.popleft()
            if not packed:
                yield more.wait()
                continue
            message: list[Batch] = []
            size = 0.0
            for batch in packed:
                if message and size + batch.rows * self.costs.bytes > MESSAGE:
                    break
                message.append(batch)
                size += batch.rows * self.costs.bytes
            if stream.bytes + size > self.plan.stream_bytes:
                yield stream.changed.wait()
                continue
            leader, sent_at = stream.leader, self.env.now
            if leader is not None and self.brokers[stream.connected].up:
                yield from self._replicate(producer, stream, leader, sum(batch.rows for batch in message), size)
                if stream.leader != leader and self.brokers[stream.connected].up:  # nobody answers
                    yield self.env.timeout(max(0.0, sent_at + ACK_LIMIT - self.env.now))
            if leader is None or stream.leader != leader or not self.brokers[stream.connected].up:
                yield from self._find_leader(stream)
                continue  # without an acknowledgement it is sent once more
            if not message[0].alive:
                continue
            stream.bytes += size
            for batch in message:
                packed.popleft()
                uplink.arrived()
                for delivery in stream.deliveries:
                    delivery.add(batch)

    def _replicate(self, producer: Producer, stream: Stream, leader: int, rows: int, size: float) -> Events:
        """Bring a message to the leader and to its followers, until most of them have it."""
        costs, broker = self.costs, self.brokers[leader]
        publish, trip = (costs.publish_3, costs.trip_3) if self.plan.replicas > 1 else (costs.publish_1, costs.trip_1)
        yield from transfer(size, producer.port, broker.port_in)
        yield broker.processor.use(rows * publish * 1e-9)
        followers = sorted(
            max(
                broker.port_out.load(size),
                self.brokers[member].port_in.load(size),
                self.brokers[member].processor.load(rows * publish * 1e-9),
                self.brokers[member].disk.delay(size),
            )
            for member in stream.members
            if member != leader and self.brokers[member].up
        )
        awaited = followers[: len(stream.members) // 2]
        yield self.env.timeout(max([broker.disk.delay(size), *awaited]) + trip * 1e-3)

    def _find_leader(self, stream: Stream) -> Events:
        """Connect to a broker, and ask for the end of the stream until its leader answers."""
        while stream.leader is None or not self.brokers[stream.connected].up:
            if self.brokers[stream.connected].up:
                yield self.env.timeout(API_LIMIT + RETRY_INTERVAL)
                continue
            yield self.env.timeout(RETRY_INTERVAL)
            if alive := [number for number, broker in enumerate(self.brokers) if broker.up]:
                stream.connected = self.random.choice(alive)

    def _from_broker(self, stream: Stream, delivery: Delivery, storage: Storage) -> Events:
        while True:
            if not (delivery.queue and len(delivery.flight) < MAX_UNACKNOWLEDGED and storage.up):
                yield delivery.changed.wait()
                continue
            if stream.leader is None:
                yield stream.changed.wait()
                continue
            broker = self.brokers[stream.leader]
            batch, generation = delivery.send(), storage.generation
            yield broker.processor.use(batch.rows * self.costs.deliver * 1e-9)
            yield from transfer(batch.rows * self.costs.bytes, broker.port_out, storage.port_in)
            if generation == storage.generation:
                storage.take(delivery, batch, self.costs.from_broker)

    # Faults

    def _fail(self, fault: Fault) -> Events:
        yield self.env.timeout(fault.at)
        if fault.kind in ("disk", "processor"):
            storage = self.storages[fault.number]
            server = storage.disk if fault.kind == "disk" else storage.processor
            usual, server.speed = server.speed, fault.speed
            if not math.isinf(fault.seconds):
                yield self.env.timeout(fault.seconds)
                server.speed = usual
            return
        of_rack = fault.kind == "rack"
        chosen = {
            kind: [
                member
                for number, member in enumerate(members)
                if (of_rack and number % self.plan.racks == fault.number)
                or (fault.kind == kind and number == fault.number)
            ]
            for kind, members in (
                ("storage", self.storages), ("broker", self.brokers), ("producer", self.producers),
            )
        }  # fmt: skip
        for storage in chosen["storage"]:
            storage.stop()
        for broker in chosen["broker"]:
            broker.up = False
        for stream in self.streams:
            if stream.leader is not None and not self.brokers[stream.leader].up:
                stream.leader = None
            alive = sum(self.brokers[member].up for member in stream.members)
            if 2 * alive <= len(stream.members):
                stream.leader = None
            if stream.leader is None:
                self.env.process(stream.elect())
        for producer in chosen["producer"]:
            producer.cut()
        if math.isinf(fault.seconds):
            return
        yield self.env.timeout(fault.seconds)
        for broker in chosen["broker"]:
            broker.up = True
        for stream in self.streams:
            if stream.leader is None:
                self.env.process(stream.elect())
        for producer in chosen["producer"]:
            producer.restart()
        stalled = fault.seconds > STALL_LIMIT
        if stalled and chosen["storage"]:
            yield self.env.timeout(self.costs.resume_brokers if self.streams else self.costs.resume)
        for storage in chosen["storage"]:
            storage.restart(stalled=stalled)
        for member in (*self.producers, *self.streams):
            for delivery in member.deliveries:
                delivery.changed.wake()

    def _forget(self) -> None:
        """No longer keep for a storage what another one has, when it has acknowledged nothing for forget_after."""
        if self.streams or len(self.storages) < 2:
            return
        for storage in self.storages:
            if not any(delivery.rows for delivery in storage.deliveries):
                storage.idle_since = self.env.now
            if self.env.now - storage.idle_since <= self.plan.forget_after:
                continue
            for delivery in storage.deliveries:
                if not storage.up:
                    for batch in delivery.reset():
                        self.settle(batch)
                for batch in delivery.skip_stored():
                    batch.outstanding -= 1

    def _watch(self) -> Events:
        """Note fill levels, until all rows are stored or no more can be."""
        end = self.plan.seconds + self.plan.drain
        quiet_since, done = 0.0, -1
        while self.env.now < end:
            yield self.env.timeout(self.plan.look)
            self._forget()
            waiting = sum(producer.backlog for producer in self.producers) + sum(
                delivery.rows for member in (*self.producers, *self.streams) for delivery in member.deliveries
            )
            self._samples.append(
                Sample(
                    self.env.now,
                    max(producer.fill for producer in self.producers),
                    sum(producer.spool_bytes for producer in self.producers),
                    waiting,
                    sum(producer.deliveries[0].stored for producer in self.producers) if self.streams else 0,
                    self.stored_once,
                )
            )
            if self.env.now < self.plan.seconds + self.plan.tick:
                continue
            if not waiting:
                return
            stored = sum(storage.rows for storage in self.storages)
            if stored != done:
                quiet_since, done = self.env.now, stored
            elif self.env.now - quiet_since > self.plan.forget_after + 60.0 and not self._returns():
                return

    def _returns(self) -> bool:
        """Whether a fault will still end."""
        return any(
            self.env.now < fault.at + fault.seconds + self.costs.resume + self.costs.resume_brokers + 1.0
            for fault in self.plan.faults
            if not math.isinf(fault.seconds)
        )


def transfer(size: float, sender: Server, receiver: Server) -> Events:
    """Send bytes through the ports of two hosts at the same time."""
    sent, received = sender.use(size), receiver.use(size)
    yield sent
    yield received


def quantiles(values: Iterable[tuple[float, int]], shares: Sequence[float]) -> tuple[float, ...]:
    """Return the quantiles of (value, weight)."""
    ordered = sorted(values)
    total = sum(weight for _, weight in ordered)
    found: list[float] = []
    for share in shares:
        reached = 0
        for value, weight in ordered:
            reached += weight
            if reached >= share * total:
                found.append(value)
                break
        else:
            found.append(0.0)
    return tuple(found)
