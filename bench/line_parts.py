"""What a simulated line (line_model.py) consists of: boards and producers with ring and spool, storages, brokers.

Rows move in batches of at most MOST_ROWS. Each thing that takes time (a processor, a disk, a network port) is a Server,
which serves one batch after the other. Windows, limits and waits are those of the processes. The costs are measured
(scaling.json). The simulation leaves out control messages, monitors, and what processes need without packets.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from larpixdaq import schema
from larpixdaq.buffer.block_builder import BLOCK_AGE
from larpixdaq.constants import BLOCK_ROWS
from larpixdaq.hdf5.chunk_writer import MOST
from larpixdaq.hdf5.writer import WAIT
from larpixdaq.stream.publisher import WINDOW

if TYPE_CHECKING:
    import simpy
    from line_model import Line

    Events = Generator[simpy.Event, Any, None]

#: The measured costs, each with its command and date.
COSTS = Path(__file__).with_name("scaling.json")
ROW = schema.PACKETS_2_4.itemsize
#: Bytes of a block's header in the ring, with the totals of some io_groups.
HEADER = 300
#: Descriptors of blocks that a ring has (ext/ring_buffer.pyx), without those for INFO messages.
DESCRIPTORS = 65_536 - 64
#: Bytes of the ring that are kept free for INFO messages.
RESERVED = 4 << 20
#: Share of the ring above which the oldest blocks move to the spool.
SPILL_ABOVE = 0.75
#: Maximum number of rows of a batch: a packed one fits into a message of the brokers.
MOST_ROWS = 65_536
#: Rows that a storage writes without waiting for further ones.
PRESSED = min(MOST * schema.CHUNK_ROWS, WINDOW // 2 // ROW)


class Costs(NamedTuple):
    """Measured costs of a row, ns of a processor, and of other things."""

    receive: float  # a producer, for a row that it reads, decodes and puts into its ring
    pack: float  # a producer, for a row that it packs and encrypts for storages on other hosts
    uplink: float  # a producer's uplink, for a row that it packs and publishes
    from_ring: float  # a storage, for a row that it reads in the ring of a producer on its host
    packed: float  # a storage, for a row that comes packed and encrypted
    from_broker: float  # a storage, for a row that comes from a broker
    plain: float  # a storage, for a row that comes as it is, because the ring is more than half full
    publish_1: float  # a broker, for a packed row of a stream with one copy
    publish_3: float  # each of three brokers, for a packed row of a stream with three copies
    deliver: float  # a broker, for a packed row that a storage takes
    trip_1: float  # milliseconds from a small message to its acknowledgement, stream with one copy
    trip_3: float  # the same with three copies
    bytes: float  # bytes of a packed row on the network, in brokers and in files
    resume: float  # seconds from a storage's continuation until blocks come again, after a stop of more than 0.8 s
    resume_brokers: float  # the same for a storage that reads from brokers
    election: tuple[float, float] = (4.0, 9.0)  # seconds without a leader, at least and at most

    @classmethod
    def measured(cls) -> Costs:
        """Return those in scaling.json."""
        entries = json.loads(COSTS.read_text())
        return cls(**{name: entries[name]["value"] for name in cls._fields if name in entries})


@dataclass(frozen=True)
class Fault:
    """What fails, when, and for how long (s; inf: for good).

    `kind`: "storage" (stopped), "processor" (of a storage, to a share `speed` of its time), "disk" (of a storage, to
    `speed` bytes/s), "broker" (killed), or "rack" (power cut of all its hosts). `number`: that of storage, broker or
    rack.
    """

    kind: str
    number: int
    at: float
    seconds: float
    speed: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A system and what happens to it. Producer, storage and broker i are in rack i modulo `racks`."""

    rates: Sequence[tuple[float, float]]  # (from this second on, rows/s of one producer), in order of time
    seconds: float  # for which boards send
    producers: int = 1
    storages: int = 1
    same_host: bool = False  # storages are on the producer's host and read its ring
    ring: int = 512 << 20
    spool: int = 8 << 30
    spool_disk: float = 300e6  # bytes/s
    disk: float = 300e6  # bytes/s, of each storage and broker
    cache: float = (
        256 << 20
    )  # bytes that wait for it at most, while what is written counts as stored (--durability flush)
    network: float = 1.1e9  # bytes/s of each host, in each direction
    brokers: int = 0
    replicas: int = 3
    stream_bytes: float = math.inf  # maximum of a stream in the brokers
    broker_cores: int = 2
    cores: int = 0  # of the one host of all processes, without faults of a "processor"; 0: each process has its own
    racks: int = 1
    forget_after: float = 60.0
    board_queue: int = 100_000  # rows that boards and kernel hold for a producer that is busy
    faults: Sequence[Fault] = ()
    tick: float = 0.1  # seconds
    look: float = 0.1  # seconds between two looks at fill levels
    drain: float = 3600.0  # maximum seconds after the last row


class Server:
    """Serves requests one after the other, or `number` at a time. `busy`: seconds of service so far."""

    def __init__(self, env: simpy.Environment, speed: float = 1.0, number: int = 1) -> None:
        self.speed = speed
        self.busy = 0.0
        self._env = env
        self._free_at = [0.0] * number

    def use(self, amount: float) -> simpy.Event:
        """Return the event at which `amount` is done, after all requests before it."""
        return self._env.timeout(self.load(amount))

    def load(self, amount: float) -> float:
        """Do `amount` after all requests before it; return the seconds until it is done."""
        seconds = amount / self.speed
        self.busy += seconds
        first = min(range(len(self._free_at)), key=self._free_at.__getitem__)
        self._free_at[first] = max(self._env.now, self._free_at[first]) + seconds
        return self._free_at[first] - self._env.now


class Disk(Server):
    """A disk with a cache of the kernel: a write waits only when more than the cache is to be written."""

    def __init__(self, env: simpy.Environment, speed: float, cache: float) -> None:
        super().__init__(env, speed)
        self._cache = cache

    def delay(self, size: float) -> float:
        """Write, after all requests before it; return the seconds for which that waits."""
        return max(0.0, self.load(size) - self._cache / self.speed)

    def write(self, size: float) -> simpy.Event:
        return self._env.timeout(self.delay(size))


@dataclass(eq=False)
class Batch:
    """Rows of one producer in consecutive blocks.

    `holders`: consumers of the ring that need it; `outstanding`: storages that neither have it nor have lost it;
    `copies`: storages that have it.
    """

    rows: int
    blocks: int
    made_at: float
    holders: int
    outstanding: int
    copies: int = 0
    in_spool: bool = False
    packed: bool = False
    alive: bool = True  # it can be sent again

    @property
    def bytes(self) -> int:
        return self.rows * ROW + self.blocks * HEADER


class Signal:
    """Wakes the processes that wait for it."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._event = env.event()

    def wait(self) -> simpy.Event:
        return self._event

    def wake(self) -> None:
        if not self._event.triggered:
            self._event.succeed()
            self._event = self._env.event()


class Delivery:
    """The way of batches from a producer, or from its stream in the brokers, to one consumer, in order.

    `release`: tells the producer that the consumer needs a batch no longer. `rows`: those that wait or are on their
    way. `stored`, `lost`, `skipped`: rows that arrived for good, that were lost with their host, and that were no
    longer kept for this consumer.
    """

    def __init__(self, env: simpy.Environment, release: Callable[[Batch], None]) -> None:
        self.queue: deque[Batch] = deque()
        self.flight: deque[Batch] = deque()
        self.flight_bytes = 0
        self.rows = self.stored = self.lost = self.skipped = 0
        self.changed = Signal(env)
        self._release = release
        self._made_at = 0.0  # of the newest batch that arrived

    def add(self, batch: Batch) -> None:
        self.queue.append(batch)
        self.rows += batch.rows
        self.changed.wake()

    def send(self) -> Batch:
        batch = self.queue.popleft()
        self.flight.append(batch)
        self.flight_bytes += batch.bytes
        return batch

    def arrived(self) -> Batch:
        """Return the oldest batch on its way, which the consumer has now for good."""
        batch = self.flight.popleft()
        if batch.made_at < self._made_at:
            raise AssertionError("a batch came after a newer one")
        self._made_at = batch.made_at
        self.flight_bytes -= batch.bytes
        self.rows -= batch.rows
        self.stored += batch.rows
        self._release(batch)
        self.changed.wake()
        return batch

    def reset(self) -> list[Batch]:
        """Let all that was on its way come again. Returns the batches that nobody can send any more."""
        dead = [batch for batch in self.flight if not batch.alive]
        self.queue.extendleft(batch for batch in reversed(self.flight) if batch.alive)
        self.flight.clear()
        self.flight_bytes = 0
        self._lose(dead)
        return dead

    def cut(self) -> list[Batch]:
        """Lose all that is not on its way yet, and return it."""
        dead = list(self.queue)
        self.queue.clear()
        self._lose(dead)
        return dead

    def _lose(self, batches: Iterable[Batch]) -> None:
        lost = sum(batch.rows for batch in batches)
        self.lost += lost
        self.rows -= lost
        self.changed.wake()

    def skip_stored(self) -> list[Batch]:
        """Give up what another storage has, and return it."""
        skipped = [batch for batch in self.queue if batch.copies]
        if skipped:
            self.queue = deque(batch for batch in self.queue if not batch.copies)
        for batch in skipped:
            self.skipped += batch.rows
            self.rows -= batch.rows
            self._release(batch)
        return skipped


class Producer:
    """Boards, ring and spool of one host. `sent`: rows of its boards; `missed`: those that it never received."""

    def __init__(self, line: Line, number: int) -> None:
        self.line, self.number = line, number
        self.up = True
        self.sent = self.missed = self.dropped = self.made = 0
        self.backlog = 0  # rows that wait in boards and kernel
        self.ring_bytes = self.ring_blocks = self.spool_bytes = 0
        self.ring_most = self.spool_most = 0.0
        self.in_spool: deque[Batch] = deque()  # older than those in the ring
        self.in_ring: deque[Batch] = deque()
        self.deliveries: list[Delivery] = []
        self.processor, self.uplink = line.processor(), line.processor()
        self.port = Server(line.env, line.plan.network)
        self.spool_disk = Server(line.env, line.plan.spool_disk)
        self._capacity = line.plan.ring - min(RESERVED, line.plan.ring // 8)
        self._receiving = self._spilling = False
        line.env.process(self._boards())

    @property
    def fill(self) -> float:
        return max(self.ring_bytes / self._capacity, self.ring_blocks / DESCRIPTORS)

    def _boards(self) -> Events:
        plan, env = self.line.plan, self.line.env
        sent = 0.0
        tick = plan.tick * self.line.random.uniform(0.05, 1.0)  # producers do not read at the same moments
        while env.now < plan.seconds - 1e-9:
            began = env.now
            yield env.timeout(min(tick, plan.seconds - env.now))
            tick = plan.tick
            sent += rows_between(plan.rates, began, env.now)
            rows = int(sent + 1e-6) - self.sent
            self.sent += rows
            if not self.up:
                self.missed += rows
                continue
            self.backlog += rows
            # Rows of the present tick have not waited.
            if (excess := self.backlog - rows - plan.board_queue) > 0:
                self.missed += excess
                self.backlog -= excess
            if self.backlog and not self._receiving:
                env.process(self._receive())

    def _receive(self) -> Events:
        self._receiving = True
        while self.backlog and self.up:
            rows = min(self.backlog, MOST_ROWS)
            yield self.processor.use(rows * self.line.costs.receive * 1e-9)
            rows = min(rows, self.backlog)
            self.backlog -= rows
            if self.up:
                self._make(rows)
            else:
                self.missed += rows
        self._receiving = False

    def _make(self, rows: int) -> None:
        """Put rows into the ring. Those without room are dropped."""
        blocks = max(math.ceil(rows / BLOCK_ROWS), min(rows, round(self.line.plan.tick / BLOCK_AGE)))
        room = min(
            1.0,
            (self._capacity - self.ring_bytes) / (rows * ROW + blocks * HEADER),
            (DESCRIPTORS - self.ring_blocks) / blocks,
        )
        taken = max(0, int(rows * room))
        self.dropped += rows - taken
        if taken:
            batch = Batch(taken, int(blocks * room), self.line.env.now, len(self.deliveries), self.line.plan.storages)
            self.made += taken
            self.in_ring.append(batch)
            self._count(batch, 1)
            for delivery in self.deliveries:
                delivery.add(batch)
        if self.fill > SPILL_ABOVE and not self._spilling:
            self.line.env.process(self._spill())

    def _count(self, batch: Batch, sign: int) -> None:
        if batch.in_spool:
            self.spool_bytes += sign * batch.bytes
            self.spool_most = max(self.spool_most, self.spool_bytes)
        else:
            self.ring_bytes += sign * batch.bytes
            self.ring_blocks += sign * batch.blocks
            self.ring_most = max(self.ring_most, self.fill)

    def _spill(self) -> Events:
        """Move the oldest blocks to the spool while the ring is nearly full and the spool has room."""
        self._spilling = True
        while self.fill > SPILL_ABOVE and self.spool_bytes + self.in_ring[0].bytes <= self.line.plan.spool:
            batch = self.in_ring[0]
            yield self.spool_disk.use(batch.bytes)
            if self.in_ring and self.in_ring[0] is batch:
                self.in_spool.append(self.in_ring.popleft())
                self._count(batch, -1)
                batch.in_spool = True
                self._count(batch, 1)
        self._spilling = False

    def release(self, batch: Batch) -> None:
        """Note that one consumer less needs the batch, and free the oldest ones that nobody needs."""
        batch.holders -= 1
        while (kept := self.in_spool or self.in_ring) and not kept[0].holders:
            self._count(kept.popleft(), -1)

    def cut(self) -> None:
        """Lose ring and spool with the power of the host."""
        self.up = False
        self.missed += self.backlog
        self.backlog = 0
        for batch in (*self.in_spool, *self.in_ring):
            batch.alive = False
        self.in_spool.clear()
        self.in_ring.clear()
        self.ring_bytes = self.ring_blocks = self.spool_bytes = 0
        for delivery in self.deliveries:
            dead = delivery.cut()
            if self.line.streams:  # what was on its way to the brokers, too
                dead += delivery.reset()
            for batch in dead:
                self.line.settle(batch, self.line.plan.storages if self.line.streams else 1)

    def restart(self) -> None:
        self.up = True


class Storage:
    """Writes the batches of all producers, and acknowledges them when its disk has them."""

    def __init__(self, line: Line, number: int) -> None:
        self.line, self.number = line, number
        self.up, self.generation = True, 0
        self.rows = 0
        self.idle_since = 0.0
        self.deliveries: list[Delivery] = []
        self.processor, self.port_in = line.processor(), Server(line.env, line.plan.network)
        self.disk = Disk(line.env, line.plan.disk, line.plan.cache)
        self.inbox: deque[tuple[Delivery, Batch, float]] = deque()  # with the ns of a row
        self.changed = Signal(line.env)
        line.env.process(self._write())

    def _write(self) -> Events:
        env = self.line.env
        waiting: list[tuple[Delivery, Batch]] = []
        rows, oldest, generation = 0, 0.0, 0
        while True:
            if generation != self.generation:
                waiting, rows, generation = [], 0, self.generation
            if not self.up or not (self.inbox or waiting):
                yield self.changed.wait()
                continue
            seconds = 0.0
            while self.inbox and rows < PRESSED:
                delivery, batch, ns = self.inbox.popleft()
                oldest = oldest if waiting else env.now
                waiting.append((delivery, batch))
                rows += batch.rows
                seconds += batch.rows * ns * 1e-9
            if seconds:
                yield self.processor.use(seconds)
            if not self.up or generation != self.generation:
                continue
            if rows < PRESSED and env.now < oldest + WAIT - 1e-9:
                yield env.timeout(oldest + WAIT - env.now) | self.changed.wait()
                continue
            yield self.disk.write(rows * self.line.costs.bytes)
            if generation != self.generation:
                continue
            while not self.up and generation == self.generation:
                yield self.changed.wait()
            if generation == self.generation:
                for delivery, batch in waiting:
                    self.line.store(self, delivery, batch)
                waiting, rows = [], 0

    def take(self, delivery: Delivery, batch: Batch, ns: float) -> None:
        self.inbox.append((delivery, batch, ns))
        rows = sum(batch.rows for _, batch, _ in self.inbox) if len(self.inbox) < 20 else PRESSED
        if len(self.inbox) == 1 or rows >= PRESSED:
            self.changed.wake()

    def stop(self) -> None:
        self.up = False

    def restart(self, *, stalled: bool = True) -> None:
        """Continue. After a longer stop everything on its way comes again, because the subscription is a new one."""
        self.up = True
        if stalled:
            self.generation += 1
            self.inbox.clear()
            for delivery in self.deliveries:
                for batch in delivery.reset():
                    self.line.settle(batch)
        self.changed.wake()


class Stream:
    """The brokers' stream of one producer: a leader and its followers. `connected`: the broker of the uplink."""

    def __init__(self, line: Line, number: int) -> None:
        self.line = line
        self.members = [(number + i) % line.plan.brokers for i in range(line.plan.replicas)]
        self.leader: int | None = self.members[0]
        self.connected = line.random.randrange(line.plan.brokers)
        self.bytes = 0.0
        self.deliveries: list[Delivery] = []
        self.changed = Signal(line.env)

    def elect(self) -> Events:
        """Find another leader, if most members are alive."""
        line = self.line
        yield line.env.timeout(line.random.uniform(*line.costs.election) if line.plan.replicas > 1 else 0.0)
        alive = [number for number in self.members if line.brokers[number].up]
        if self.leader is None and 2 * len(alive) > len(self.members):
            self.leader = alive[0]
            self.changed.wake()


class Broker:
    def __init__(self, line: Line) -> None:
        self.up = True
        self.processor = line.processor(line.plan.broker_cores)
        self.disk = Disk(line.env, line.plan.disk, line.plan.cache)
        self.port_in, self.port_out = Server(line.env, line.plan.network), Server(line.env, line.plan.network)


def rows_between(rates: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Return the rows that a producer's boards send between two times, s."""
    rows = 0.0
    for index, (start, rate) in enumerate(rates):
        stop = rates[index + 1][0] if index + 1 < len(rates) else math.inf
        rows += rate * max(0.0, min(end, stop) - max(begin, start))
    return rows
