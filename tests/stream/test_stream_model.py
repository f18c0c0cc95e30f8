"""The stream's protocol against a simple model of what storages have.

Frames and connections are lost or delayed, processes killed, ring and spool full. In the end each required storage must
have every block once, in order, and no block may have been freed before.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from example_counts import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stream_harness import LAYOUT

from larpixdaq import constants
from larpixdaq._native.ring_buffer import SMALLEST, Reader
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.block_store import BlockStore, Segment
from larpixdaq.buffer.crash_recovery import Predecessors
from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY, RingFile, name_prefix, open_reader
from larpixdaq.buffer.spool import Spool, SpoolDirectory, SpoolFile
from larpixdaq.protocol.stream import (
    STREAM_VERSION,
    Ack,
    Block,
    BlockOrigin,
    End,
    FromConsumer,
    Hello,
    Maps,
    Position,
    Refused,
    Welcome,
    pack,
    unpack_producer,
)
from larpixdaq.runtime.record_file import crc32
from larpixdaq.stream import Publisher

NAME = "board"
STORAGES = ("first", "second")
REQUIRED = st.sets(st.sampled_from(STORAGES), min_size=1)


class Tracker:
    done = False


class Wire:
    """The producer's ROUTER without a network: a queue of frames to each peer, which may be cut, and one from all."""

    def __init__(self) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.down: dict[bytes, deque[tuple[bytes, Any, Tracker]]] = {}
        self._head: tuple[bytes, bytes] | None = None
        self._parts: deque[bytes] = deque()  # the rest of the message that is being received

    def recv(self, flags: int, copy: bool) -> zmq.Frame:
        if not self._parts:
            if not self.inbox:
                raise zmq.Again
            self._parts.extend(self.inbox.popleft())
        return zmq.Frame(self._parts.popleft())

    def getsockopt(self, option: int) -> bool:
        assert option == zmq.RCVMORE
        return bool(self._parts)

    def send_multipart(self, parts: list[Any], flags: int) -> None:
        if parts[0] not in self.down:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        if flags & zmq.SNDMORE:
            self._head = parts[0], parts[1]
        elif len(parts) == 4:  # the consumer reads the rows in the ring
            assert parts[2] == b""
            self.down[parts[0]].append((parts[1], int.from_bytes(parts[3], "little"), Tracker()))
        else:
            self.down[parts[0]].append((parts[1], b"".join(map(bytes, parts[2:])), Tracker()))

    def send(self, payload: Any, flags: int, copy: bool, track: bool) -> Tracker:
        assert self._head is not None
        route, header = self._head
        tracker = Tracker()
        self.down[route].append(
            (header, payload, tracker)
        )  # not a copy: the rows stay in the ring until the frame is delivered
        return tracker

    def cut(self, route: bytes) -> None:
        for header, payload, tracker in self.down.pop(route, ()):
            check_rows(header, payload)
            tracker.done = True


def check_rows(header: bytes, payload: Any) -> None:
    """Check that the rows of a block on its way were not overwritten."""
    frame = unpack_producer(header, NAME)
    if isinstance(frame, Block) and not isinstance(payload, int):
        assert crc32(payload) == frame.crc32, "other rows than were sent"


class Disk:
    """Stands for event_loop.Worker: does its jobs when work() is called."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Callable[[], Any], Callable[[Any], None]]] = deque()

    def submit(self, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self.jobs.append((do, then))

    def work(self) -> None:
        while self.jobs:
            do, then = self.jobs.popleft()
            then(do())


class Storage:
    """The model of a storage. Per origin: rows, INFO blocks, next sequence, end; `durable` values survive it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.durable: dict[BlockOrigin, tuple[int, int, int, End | None]] = {}  # rows, INFO blocks, next, end
        self.volatile: dict[BlockOrigin, tuple[int, int, int, End | None]] = {}
        self.route: bytes | None = None
        self.welcome = False
        self.maps = False  # it is on the producer's host and reads the ring
        self.ring: Reader | None = None
        self.up: deque[bytes] = deque()

    def state(self, source: BlockOrigin) -> tuple[int, int, int, End | None]:
        return self.volatile.get(source) or self.durable.get(source) or (0, 0, 0, None)

    def connect(self, wire: Wire) -> None:
        self.number += 1
        self.route = f"{self.name} {self.number}".encode()
        wire.down[self.route] = deque()
        self.welcome = False
        self.up.clear()
        self.volatile.clear()
        self.hello()

    def hello(self) -> None:
        self.welcome = False
        self.say(Hello(STREAM_VERSION, self.name, "", "all", [Position(*s, d[2]) for s, d in self.durable.items()]))

    def say(self, frame: FromConsumer) -> None:
        self.up.append(pack(frame))

    def take(self, header: bytes, payload: Any) -> None:
        frame = unpack_producer(header, NAME)
        if isinstance(frame, Welcome):
            self.welcome = True
            if self.maps:
                self.ring = open_reader(Path(frame.ring), NAME, frame.epoch)
                self.say(Maps(frame.epoch))
        elif isinstance(frame, Refused):
            self.welcome = False
            if frame.reason == "hello":
                self.volatile.clear()
                self.hello()
        elif self.welcome:
            assert isinstance(frame, Block | End)
            rows, infos, following, end = self.state(frame.origin)
            sequence = frame.next if isinstance(frame, End) else frame.sequence
            assert sequence <= following, (
                f"{self.name}: expected sequence {following}, found {sequence}, of {frame.origin}"
            )
            if sequence < following:
                return
            if isinstance(payload, int):
                assert self.ring is not None
                payload = self.ring.read(payload)
                if payload is None:  # it was overwritten in the ring
                    self.hello()
                    return
                assert isinstance(frame, Block)
                assert crc32(payload) == frame.crc32, "other rows than were published"
            assert end is None, "a block behind the end"
            if isinstance(frame, End):
                end = frame
            elif frame.text is not None:
                infos += 1
            else:
                stamps = np.frombuffer(payload, LAYOUT.dtype)["timestamp"]
                assert np.array_equal(stamps, np.arange(rows, rows + frame.rows)), "other rows than were written"
                rows += frame.rows
            self.volatile[frame.origin] = rows, infos, sequence + 1, end

    def keep(self, *, say: bool) -> None:
        """Make all received blocks durable and, with `say`, acknowledge them."""
        for source, has in self.volatile.items():
            self.durable[source] = has
            if say and self.welcome:
                self.say(Ack(source.run, source.epoch, has[2]))


class Stream(RuleBasedStateMachine):
    """`made`: rows and INFO blocks published per origin; `required`: the storages that must have them."""

    def __init__(self) -> None:
        super().__init__()
        shared = DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="larpixdaq-test-", dir=shared))
        (self.folder / "spool").mkdir()
        self.now = 100.0
        self.storages = {name: Storage(name) for name in STORAGES}
        self.made: dict[BlockOrigin, list[int]] = {}
        self.required: dict[BlockOrigin, tuple[str, ...]] = {}
        self.kept: dict[BlockOrigin, tuple[BlockStore, Segment]] = {}
        self.run = 0
        self.epoch = 0

    @initialize(required=REQUIRED)
    def first_run(self, required: set[str]) -> None:
        self.start()
        self.begin(required)

    def start(self) -> None:
        """Start a producer, which takes over the blocks of its predecessors."""
        self.epoch += 1
        self.wire, self.disk = Wire(), Disk()
        spool = SpoolDirectory(self.folder / "spool", name_prefix(self.folder, NAME), 3 << 20, self.disk)  # type: ignore[arg-type]
        self.ring_file = RingFile.make(self.folder, self.folder, NAME, self.epoch, SMALLEST)
        self.recorder = BlockBuilder(self.ring_file.ring, NAME, self.epoch, LAYOUT, [1])
        own = BlockStore(NAME, self.epoch, self.ring_file.ring, Spool(spool), self.ring_file)
        self.publisher = Publisher(own, self.wire, lambda: self.now, forget_after=1e6)  # type: ignore[arg-type]
        for left in Predecessors(NAME, self.folder, self.folder, spool, 0).take_over({self.epoch}):
            store = BlockStore.inherited(NAME, left, spool)
            self.publisher.adopt(store)
            for segment in store.segments:
                self.kept[BlockOrigin(segment.run, NAME, store.epoch)] = store, segment

    @property
    def source(self) -> BlockOrigin:
        return BlockOrigin(self.run, NAME, self.epoch)

    # The producer

    @precondition(lambda self: self.recorder.run is None)
    @rule(required=REQUIRED)
    def next_run(self, required: set[str]) -> None:
        self.begin(required)

    def begin(self, required: set[str]) -> None:
        # The run of its predecessor goes on, or a new run begins.
        late = self.run and self.source not in self.made
        self.run += not late
        names = tuple(sorted(required))
        if late:
            names = next(n for source, n in self.required.items() if source.run == self.run)
        self.made[self.source] = [0, 0]
        self.required[self.source] = names
        self.recorder.begin(self.run, names)
        self.publisher.begin(self.run, LAYOUT.code, names)
        self.kept[self.source] = self.publisher.own, self.publisher.own.segments[-1]

    @precondition(lambda self: self.recorder.run is not None)
    @rule(n=st.sampled_from((1, 7, 3000)), close=st.booleans())
    def write(self, n: int, close: bool) -> None:
        rows = self.recorder.rows()
        if rows is None:
            return  # full: dropped rows are no matter of the protocol
        n = min(n, len(rows))
        made = self.made[self.source]
        rows["packet_type"][:n] = 0
        rows["io_group"][:n] = 1
        rows["timestamp"][:n] = np.arange(made[0], made[0] + n)
        self.ring_file.ring.counts[1, constants.Count.WORD_ROWS] += np.uint64(n)
        self.recorder.publish(n)
        made[0] += n
        if close:
            self.recorder.close_block()

    @precondition(lambda self: self.recorder.run is not None)
    @rule(blocks=st.integers(3, 15), disk=st.booleans())
    def flood(self, blocks: int, disk: bool) -> None:
        """Write more than the ring can hold, unless storages take it."""
        for _ in range(blocks):
            self.write(constants.BLOCK_ROWS, False)
            self.publisher.work()
            if disk:
                self.disk.work()

    @precondition(lambda self: self.recorder.run is not None)
    @rule()
    def info(self) -> None:
        assert self.recorder.info("text")
        self.made[self.source][1] += 1

    @precondition(lambda self: self.recorder.run is not None)
    @rule(required=REQUIRED, now=st.integers(0, 2))
    def end_run(self, required: set[str], now: int) -> None:
        if not now:
            self.end()
            self.begin(required)

    def end(self) -> None:
        self.recorder.end("closed", [], [])
        self.publisher.end()

    @rule()
    def work(self) -> None:
        self.publisher.work()

    @rule()
    def disk_works(self) -> None:
        self.disk.work()

    @rule(required=REQUIRED, now=st.integers(0, 2), join=st.booleans())
    def kill(self, required: set[str], now: int, join: bool) -> None:
        """Kill the producer with its unfinished writes to the disk. The next producer starts and may join the run."""
        if now:
            return
        for store in self.publisher.stores:
            store.leave()
        for do, _ in self.disk.jobs:
            if isinstance(file := getattr(do, "__self__", None), SpoolFile):  # it was to be removed
                file.leave()
        for storage in self.storages.values():
            storage.route, storage.welcome = None, False
        self.start()
        if join:
            self.begin(required)

    @rule(seconds=st.sampled_from((0.5, 1.5)))
    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds

    # Storages and the wire

    @rule(name=st.sampled_from(STORAGES))
    def is_cut_off(self, name: str) -> None:
        self.connect(name)

    @rule(name=st.sampled_from(STORAGES))
    def moves(self, name: str) -> None:
        """Move the storage to the producer's host, or away from it."""
        self.storages[name].maps ^= True
        self.connect(name)

    def connect(self, name: str) -> None:
        """Lose the connection with all frames on their way, or restart the storage; it subscribes again."""
        storage = self.storages[name]
        if storage.route is not None:
            self.wire.cut(storage.route)
        storage.connect(self.wire)

    @rule(name=st.sampled_from(STORAGES))
    def second_connection(self, name: str) -> None:
        """Subscribe again while the producer still has the old connection."""
        self.storages[name].connect(self.wire)

    @rule(name=st.sampled_from(STORAGES), n=st.integers(1, 20))
    def up(self, name: str, n: int) -> None:
        storage = self.storages[name]
        while storage.up and storage.route is not None and n:
            self.wire.inbox.append([storage.route, storage.up.popleft()])
            n -= 1

    @rule(name=st.sampled_from(STORAGES), n=st.integers(1, 20))
    def down(self, name: str, n: int) -> None:
        storage = self.storages[name]
        queue = self.wire.down.get(storage.route or b"")
        while queue and n:
            header, payload, tracker = queue.popleft()
            check_rows(header, payload)
            storage.take(header, payload)
            tracker.done = True
            n -= 1

    @rule(name=st.sampled_from(STORAGES), n=st.integers(1, 40), keep=st.booleans())
    def exchange(self, name: str, n: int, keep: bool) -> None:
        """Send and receive in the usual order."""
        if self.storages[name].route not in self.wire.down:
            self.connect(name)
        self.up(name, n)
        self.publisher.work()
        self.down(name, n)
        if keep:
            self.keep(name, True)
            self.up(name, n)
            self.publisher.work()

    @rule(n=st.integers(1, 40))
    def exchange_with_all(self, n: int) -> None:
        self.disk.work()
        for name in STORAGES:
            self.exchange(name, n, True)

    @rule(name=st.sampled_from(STORAGES), say=st.booleans())
    def keep(self, name: str, say: bool) -> None:
        self.storages[name].keep(say=say)

    # Invariants

    @invariant()
    def no_block_is_freed_that_a_storage_needs(self) -> None:
        for source, (store, segment) in self.kept.items():
            freed = min(store.tail, store.end_of(segment)) - segment.first
            for name in self.required[source]:
                has = self.storages[name].durable.get(source, (0, 0, 0, None))[2]
                assert freed <= has, f"{freed} blocks of {source} are freed, {name} has {has}"

    @invariant()
    def the_spool_keeps_to_its_limit(self) -> None:
        assert sum(path.stat().st_size for path in (self.folder / "spool").iterdir()) < 3.1 * (1 << 20)

    def teardown(self) -> None:
        try:
            self._deliver_all()
        finally:
            self.ring_file.close()
            shutil.rmtree(self.folder)

    def _deliver_all(self) -> None:
        """Let all storages connect and take everything, and check that all blocks are delivered once."""
        if self.recorder.run is not None:
            self.end()
        for name in STORAGES:
            self.connect(name)
        for turn in range(2000):
            for name in STORAGES:
                self.up(name, 100)
            self.disk.work()
            self.work()
            for name in STORAGES:
                self.down(name, 1000)
                self.keep(name, say=True)
            self.no_block_is_freed_that_a_storage_needs()
            if turn > 3 and not self.publisher.pending():
                break
        assert self.publisher.pending() == 0, "not all is delivered"
        for route in list(self.wire.down):
            self.wire.cut(route)
        self.work()
        self.disk.work()
        for source, (rows, infos) in self.made.items():
            for name in self.required[source]:
                has = self.storages[name].durable[source]
                assert has[:2] == (rows, infos), (
                    f"{name} has {has} of {source}, {rows} rows and {infos} texts were made"
                )
                assert has[3] is not None, f"{name} has no end of {source}"
        assert self.publisher.stores == [self.publisher.own]
        assert list(self.folder.glob("*.ring")) == [self.ring_file.path]
        assert list((self.folder / "spool").iterdir()) == []


Stream.TestCase.settings = settings(max_examples=examples(300), stateful_step_count=80)
test_stream_against_model = Stream.TestCase
