"""The stream's protocol against a simple model of what storages have.

Frames and connections are lost or delayed, processes killed, superseded and forgotten, keys revoked, the core is
restarted, ring and spool are full, in any order. docs/reliability.md, section "Model", lists the properties, which must
hold after each step (Stream.check, Stream.take) and in the end (Stream.teardown).
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

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
from larpixdaq.errors import ProtocolError
from larpixdaq.keys.curve import Admission
from larpixdaq.keys.peer_limits import PeerLimits
from larpixdaq.protocol.control import ConsumerSession, Update, session_digest
from larpixdaq.protocol.packed_rows import PackedRows
from larpixdaq.protocol.stream import (
    STREAM_VERSION,
    Ack,
    Block,
    BlockOrigin,
    End,
    FromConsumer,
    Hello,
    Maps,
    Packs,
    Position,
    Refused,
    Welcome,
    pack,
    unpack_producer,
)
from larpixdaq.runtime.record_file import crc32
from larpixdaq.stream import Publisher, publisher
from larpixdaq.stream.publisher import PACK_LIMIT

NAME = "board"
STORAGES = ("first", "second")
REQUIRED = st.sets(st.sampled_from(STORAGES), min_size=1)
#: A position far beyond all blocks, which nobody has.
LIE = 1 << 40


class Tracker:
    done = False


class Packed(NamedTuple):
    """The second and third part of a message with packed rows. `is_right`: they were not changed on the way."""

    rows: bytes
    description: bytes
    is_right: bool = True

    def unpack(self, block: Block) -> bytes:
        """The rows. ProtocolError if they are damaged."""
        packed = PackedRows.parse(memoryview(self.rows), memoryview(self.description), block.rows)
        assert packed.is_intact() or not self.is_right
        return packed.unpack(block.rows, LAYOUT).tobytes()


class Wire:
    """The producer's ROUTER without a network: a queue of frames to each peer, which may be cut, and one from all."""

    def __init__(self) -> None:
        self.inbox: deque[list[bytes]] = deque()
        self.down: dict[bytes, deque[tuple[bytes, Any, Tracker]]] = {}
        self.keys: dict[bytes, str] = {}
        self.closing: set[bytes] = set()  # connections that were shut down, which libzmq has not noticed yet
        self._head: tuple[bytes, bytes] | None = None
        self._parts: deque[bytes] = deque()  # the rest of the message that is being received

    def recv(self, flags: int, copy: bool) -> zmq.Frame:
        if not self._parts:
            if not self.inbox:
                raise zmq.Again
            self._parts.extend(self.inbox.popleft())
        frame = zmq.Frame(self._parts.popleft())
        frame.more = bool(self._parts)
        return frame

    def getsockopt(self, option: int) -> int:
        assert option == zmq.EVENTS
        return zmq.POLLIN if self.inbox else 0

    def send_multipart(self, parts: list[Any], flags: int) -> None:
        if parts[0] not in self.down:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        if flags & zmq.SNDMORE:
            self._head = parts[0], parts[1]
        elif len(parts) == 4 and len(parts[2]):
            self.down[parts[0]].append((parts[1], Packed(*parts[2:]), Tracker()))
        elif len(parts) == 4:  # the consumer reads the rows in the ring
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

    def connect(self, route: bytes, key: str) -> None:
        self.down[route] = deque()
        self.keys[route] = key

    def cut(self, route: bytes) -> None:
        for header, payload, tracker in self.down.pop(route, ()):
            check_rows(header, payload)
            tracker.done = True


def check_rows(header: bytes, payload: Any) -> None:
    """Check that the rows of a block on its way were not overwritten."""
    frame = unpack_producer(header, NAME)
    if isinstance(payload, Packed):
        assert isinstance(frame, Block)
        assert not payload.is_right or crc32(payload.unpack(frame)) == frame.crc32, "other rows than were packed"
    elif isinstance(frame, Block) and not isinstance(payload, int):
        assert crc32(payload) == frame.crc32, "other rows than were sent"


class Door:
    """Stands for curve.Doorkeeper."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.limits = PeerLimits("stream")

    def answer(self) -> None:
        pass

    def sender(self, route: bytes, frame: zmq.Frame) -> str:
        return self._wire.keys[route]

    def heard_keys(self) -> set[str]:
        return set(self._wire.keys.values())

    def disconnect(self, key: str) -> list[bytes]:
        routes = [route for route, known in self._wire.keys.items() if known == key]
        self._wire.closing.update(routes)
        return routes


class Gate(Admission):
    """The producer's list of consumers, with a Door."""

    def __init__(self, wire: Wire) -> None:
        self.door = Door(wire)  # type: ignore[assignment]
        self._has_pair, self.insecure = True, False
        self._names, self._children = {}, {}


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


class State(NamedTuple):
    """What a storage has of an origin. `stamp`: of the next row, None after a gap; `missing`: skipped sequences."""

    stamp: int | None = 0
    infos: int = 0
    following: int = 0
    end: End | None = None
    missing: frozenset[int] = frozenset()


class Storage:
    """The model of a storage. `durable` survives its processes, `volatile` is that of the present one.

    `queue`: the frames between its thread and its loop; rows in the ring are not copied yet.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.key = self.session = ""
        self.durable: dict[BlockOrigin, State] = {}
        self.volatile: dict[BlockOrigin, State] = {}
        self.queue: deque[tuple[Block | End, Any]] = deque()
        self.route: bytes | None = None
        self.welcome = False
        self.last_welcome: Welcome | None = None
        self.maps = False  # it is on the producer's host and reads the ring
        self.send_rows = False  # plain, in its next subscription
        self.ring: Reader | None = None
        self.up: deque[bytes] = deque()
        self.last_ack: Ack | None = None

    def state(self, source: BlockOrigin) -> State:
        return self.volatile.get(source) or self.durable.get(source) or State()

    def start(self) -> None:
        """Start another process, in the same directory."""
        self.volatile.clear()
        self.queue.clear()

    def connect(self, wire: Wire) -> None:
        self.number += 1
        self.route = f"{self.name} {self.number}".encode()
        wire.connect(self.route, self.key)
        self.up.clear()
        self.hello()

    def hello(self, *, send_rows: bool = False) -> None:
        self.welcome = False
        self.send_rows |= send_rows
        positions = [Position(*source, has.following) for source, has in self.durable.items()]
        self.say(Hello(STREAM_VERSION, self.name, self.session, "all", positions))

    def say(self, frame: FromConsumer) -> None:
        self.up.append(pack(frame))

    def receive(self, header: bytes, payload: Any) -> None:
        """Receive a frame, as the thread of a Consumer does."""
        frame = unpack_producer(header, NAME)
        if isinstance(frame, Welcome):
            self.welcome, self.last_welcome = True, frame
            if not self.send_rows:
                self.map_or_pack()
            self.send_rows = False
        elif isinstance(frame, Refused):
            self.welcome = False
            if frame.reason == "hello":
                self.hello()
        elif self.welcome:
            assert isinstance(frame, Block | End)
            if isinstance(payload, int):
                assert self.ring is not None
                payload = self.ring.view(payload)
                if payload is None:  # it was overwritten in the ring
                    self.hello(send_rows=True)
                    return
            elif isinstance(payload, Packed):
                try:
                    payload = payload.unpack(frame)  # type: ignore[arg-type]
                except ProtocolError:
                    self.hello(send_rows=True)
                    return
            else:
                payload = bytes(payload)
            self.queue.append((frame, payload))

    def map_or_pack(self) -> None:
        """Read the ring, or ask for packed rows, from now on."""
        assert self.last_welcome is not None
        if self.maps:
            self.ring = open_reader(Path(self.last_welcome.ring), NAME, self.last_welcome.epoch)
            self.say(Maps(self.last_welcome.epoch))
        else:
            self.say(Packs())

    def keep(self, *, say: bool) -> None:
        """Make all blocks that were taken durable and, with `say`, acknowledge them."""
        for source, has in self.volatile.items():
            self.durable[source] = has
            if say and self.welcome:
                self.last_ack = Ack(source.run, source.epoch, has.following)
                self.say(self.last_ack)


class Zombie(NamedTuple):
    """A superseded process of a storage. It acknowledges what it does not have."""

    route: bytes
    session: str
    key: str


class Stream(RuleBasedStateMachine):
    """`made`: rows and INFO blocks published per origin; `required`: the storages that must have them.

    `excused`: storage and origin -> number of its first blocks that were freed while the storage was forgotten.
    `acknowledged`: storage and origin -> position that the present producer has noted.
    """

    def __init__(self) -> None:
        super().__init__()
        shared = DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="larpixdaq-test-", dir=shared))
        (self.folder / "spool").mkdir()
        self.now = 100.0
        self.storages = {name: Storage(name) for name in STORAGES}
        self.zombies: dict[str, Zombie] = {}
        self.excused: dict[tuple[str, BlockOrigin], int] = {}
        self.acknowledged: dict[tuple[str, BlockOrigin], int] = {}
        self.core_keys: dict[str, str] = {}  # what the core knows
        self.core_sessions: dict[str, ConsumerSession] = {}
        self.numbers = count(1)
        self.made: dict[BlockOrigin, list[int]] = {}
        self.required: dict[BlockOrigin, tuple[str, ...]] = {}
        self.kept: dict[BlockOrigin, tuple[BlockStore, Segment]] = {}
        self.run = 0
        self.epoch = 0

    @initialize(required=REQUIRED, forgets=st.booleans(), hurries=st.booleans())
    def first_run(self, required: set[str], forgets: bool, hurries: bool) -> None:
        """`hurries`: a turn of the producer has time to pack one block."""
        self.forget_after = 20.0 if forgets else 1e6
        publisher.PACK_LIMIT = 0.0 if hurries else PACK_LIMIT
        for storage in self.storages.values():
            self.invite(storage)
            self.register(storage)
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
        self.gate = Gate(self.wire)
        self.publisher = Publisher(
            own,
            self.wire,
            lambda: self.now,
            forget_after=self.forget_after,
            admission=self.gate,  # type: ignore[arg-type]
        )
        self.acknowledged.clear()
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
            self.work()
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
        self.check()

    @rule()
    def disk_works(self) -> None:
        self.disk.work()

    @rule(required=REQUIRED, now=st.integers(0, 2), join=st.booleans(), full=st.booleans())
    def kill(self, required: set[str], now: int, join: bool, full: bool) -> None:
        """Kill the producer with its unfinished writes to the disk. The next producer starts and may join the run.

        `full`: it has just filled ring and spool.
        """
        if now:
            return
        if full and self.recorder.run is not None:
            self.flood(15, True)
        for store in self.publisher.stores:
            store.leave()
        for do, _ in self.disk.jobs:
            if isinstance(file := getattr(do, "__self__", None), SpoolFile):  # it was to be removed
                file.leave()
        for storage in self.storages.values():
            storage.route, storage.welcome = None, False
        self.zombies = {name: zombie._replace(route=b"") for name, zombie in self.zombies.items()}
        self.start()
        if join:
            self.begin(required)

    @rule(seconds=st.sampled_from((0.5, 1.5, 30.0)))
    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds
        if seconds > 20.0:  # storages that are not connected are forgotten
            self.work()

    # The core

    @rule()
    def core_tells(self) -> None:
        """The core's update reaches the producer."""
        self.publisher.admit(Update(keys=dict(self.core_keys), consumers=dict(self.core_sessions)))
        self.check()

    @rule()
    def core_restarts(self) -> None:
        """It has its keys, and knows no component yet."""
        self.core_sessions.clear()

    @rule(name=st.sampled_from(STORAGES))
    def registers(self, name: str) -> None:
        """A storage gets a new session, and says it in its next HELLO."""
        self.register(self.storages[name])

    def register(self, storage: Storage) -> None:
        storage.session = f"session {next(self.numbers)}"
        if storage.key in self.core_keys:
            self.core_sessions[storage.name] = ConsumerSession(storage.key, session_digest(storage.session))

    def invite(self, storage: Storage) -> None:
        storage.key = f"key {next(self.numbers)}"
        self.core_keys[storage.key] = storage.name

    @rule(name=st.sampled_from(STORAGES))
    def revoke(self, name: str) -> None:
        """Its connections are closed when the producer knows, and the storage needs another invitation."""
        self.core_keys.pop(self.storages[name].key, None)
        self.core_sessions.pop(name, None)

    # Storages and the wire

    @rule(name=st.sampled_from(STORAGES), restarted=st.booleans())
    def is_cut_off(self, name: str, restarted: bool) -> None:
        self.connect(name, restarted=restarted)

    @rule(name=st.sampled_from(STORAGES))
    def moves(self, name: str) -> None:
        """Move the storage to the producer's host, or away from it."""
        self.storages[name].maps ^= True
        self.connect(name)

    def connect(self, name: str, *, restarted: bool = False) -> None:
        """Lose the connection with all frames on their way, or restart the storage too; it subscribes again."""
        storage = self.storages[name]
        if storage.route is not None:
            self.wire.cut(storage.route)
        if storage.key not in self.core_keys:
            self.invite(storage)
            self.register(storage)
        if restarted:
            storage.start()
            self.register(storage)
        storage.connect(self.wire)

    @rule(name=st.sampled_from(STORAGES))
    def second_connection(self, name: str) -> None:
        """Subscribe again while the producer still has the old connection."""
        if self.storages[name].key in self.core_keys:
            self.storages[name].connect(self.wire)

    @rule(name=st.sampled_from(STORAGES))
    def is_superseded(self, name: str) -> None:
        """Another process with this name has registered, in the same directory; the old one does not know it."""
        storage = self.storages[name]
        if storage.route is not None and storage.key in self.core_keys:
            self.zombies[name] = Zombie(storage.route, storage.session, storage.key)
            storage.start()
            self.register(storage)
            storage.connect(self.wire)

    @rule(name=st.sampled_from(STORAGES), subscribes=st.booleans())
    def is_superseded_and_continues(self, name: str, subscribes: bool) -> None:
        self.is_superseded(name)
        self.exchange(name, 5, False)
        self.zombie_acknowledges(name, subscribes)
        self.work()

    @rule(name=st.sampled_from(STORAGES), subscribes=st.booleans())
    def zombie_acknowledges(self, name: str, subscribes: bool) -> None:
        """A superseded process acknowledges everything, once the producer knows its successor."""
        zombie, known = self.zombies.get(name), self.publisher._consumers.get(name)
        if zombie is None or known is None or known.digest == session_digest(zombie.session):
            return
        if zombie.route in self.publisher.subscribers and self.storages[name].route not in self.publisher.subscribers:
            return  # its successor has not said HELLO yet
        if not zombie.route:
            zombie = self.zombies[name] = zombie._replace(route=f"old {name} {self.epoch}".encode())
            self.wire.connect(zombie.route, zombie.key)
        frames: list[FromConsumer] = [Ack(source.run, source.epoch, LIE) for source in self.made]
        if subscribes:
            positions = [Position(*source, LIE) for source in self.made]
            frames = [Hello(STREAM_VERSION, name, zombie.session, "all", positions), *frames]
        self.wire.inbox += [[zombie.route, pack(frame)] for frame in frames]

    @rule(name=st.sampled_from(STORAGES))
    def repeats(self, name: str) -> None:
        """Repeat the last acknowledgement, which may be older than the positions in the last HELLO."""
        storage = self.storages[name]
        if storage.welcome and storage.last_ack is not None:
            storage.say(storage.last_ack)

    @rule(name=st.sampled_from(STORAGES), n=st.integers(1, 20))
    def up(self, name: str, n: int) -> None:
        storage = self.storages[name]
        while storage.up and storage.route is not None and n:
            self.wire.inbox.append([storage.route, storage.up.popleft()])
            n -= 1

    @rule(name=st.sampled_from(STORAGES), n=st.integers(1, 20))
    def down(self, name: str, n: int) -> None:
        storage = self.storages[name]
        for route in self.wire.closing:
            self.wire.cut(route)
        queue = self.wire.down.get(storage.route or b"")
        while queue and n:
            header, payload, tracker = queue.popleft()
            check_rows(header, payload)
            storage.receive(header, payload)
            tracker.done = True
            n -= 1

    @rule(name=st.sampled_from(STORAGES), at=st.integers(0, 1 << 20), flip=st.integers(0, 255))
    def packed_rows_are_damaged(self, name: str, at: int, flip: int) -> None:
        """Change a byte of the next packed block on its way, or cut it there. The storage asks for plain rows."""
        queue = self.wire.down.get(self.storages[name].route or b"", deque[Any]())
        for place, (header, payload, tracker) in enumerate(queue):
            if isinstance(payload, Packed):
                rows = bytearray(payload.rows)
                rows[at % len(rows)] ^= flip
                changed = bytes(rows) if flip else payload.rows[: at % len(rows)]
                queue[place] = header, Packed(changed or b"?", payload.description, False), tracker
                break

    @rule(name=st.sampled_from(STORAGES))
    def plain_rows_end(self, name: str) -> None:
        """A storage that got plain rows reads the ring, or asks for packed rows, again."""
        if self.storages[name].welcome:
            self.storages[name].map_or_pack()

    @rule(name=st.sampled_from(STORAGES), n=st.integers(1, 20))
    def process(self, name: str, n: int) -> None:
        """Take frames from the queue, as the loop of a storage does."""
        storage = self.storages[name]
        while storage.queue and n:
            self.take(storage, *storage.queue.popleft())
            n -= 1

    def take(self, storage: Storage, frame: Block | End, payload: Any) -> None:
        source = frame.origin
        stamp, infos, following, end, missing = storage.state(source)
        sequence = frame.next if isinstance(frame, End) else frame.sequence
        if sequence < following:
            return
        excused = self.excused.get((storage.name, source), 0)
        gap = range(following, sequence)
        assert not gap or gap[-1] < excused, f"{storage.name}: expected {following}, found {sequence}, of {source}"
        stamp = None if gap else stamp
        for other, names in self.required.items():
            earlier = (other.epoch, other.run) < (source.epoch, source.run)
            if earlier and storage.name in names and (storage.name, other) not in self.excused:
                assert storage.state(other).end is not None, f"{source} before the end of {other}"
        if isinstance(frame, Block):
            rows = bytes(payload)
            if crc32(rows) != frame.crc32:
                store, segment = self.kept[source]
                assert store.ring is not None
                assert segment.first + sequence < store.ring.tail, "rows changed that were not freed"
                storage.queue.clear()
                storage.hello(send_rows=True)
                return
            if frame.text is None:
                stamps = np.frombuffer(rows, LAYOUT.dtype)["timestamp"]
                stamp = int(stamps[0]) if stamp is None else stamp
                assert np.array_equal(stamps, np.arange(stamp, stamp + frame.rows)), "other rows than were written"
                stamp += frame.rows
            infos += frame.text is not None
        assert end is None, "a block behind the end"
        end = frame if isinstance(frame, End) else None
        storage.volatile[source] = State(stamp, infos, sequence + 1, end, missing | frozenset(gap))

    @rule(name=st.sampled_from(STORAGES), n=st.integers(1, 40), keep=st.booleans())
    def exchange(self, name: str, n: int, keep: bool) -> None:
        """Send and receive in the usual order."""
        storage = self.storages[name]
        if storage.route not in self.wire.down or storage.key not in self.core_keys:
            self.connect(name)
        if name not in self.core_sessions:
            self.register(storage)
        if not storage.welcome and not storage.up:
            storage.hello()
        self.core_tells()
        self.up(name, n)
        self.work()
        self.down(name, n)
        self.process(name, n)
        if keep:
            self.keep(name, True)
        else:
            self.repeats(name)
        self.up(name, n)
        self.work()

    @rule(n=st.integers(1, 40))
    def exchange_with_all(self, n: int) -> None:
        self.disk.work()
        for name in STORAGES:
            self.exchange(name, n, True)

    @rule(name=st.sampled_from(STORAGES), say=st.booleans())
    def keep(self, name: str, say: bool) -> None:
        self.storages[name].keep(say=say)

    # Invariants

    def check(self) -> None:
        """Check what the producer has freed and noted."""
        for source, (store, segment) in self.kept.items():
            freed = min(store.tail, store.end_of(segment)) - segment.first
            durable = {name: self.storages[name].durable.get(source, State()) for name in self.required[source]}
            assert freed <= max(has.following for has in durable.values()), f"no storage has all {freed} freed blocks"
            for name, has in durable.items():
                key = name, source
                if name in self.publisher.forgotten and freed > has.following:
                    self.excused[key] = max(self.excused.get(key, 0), freed)
                needed = max(has.following, self.excused.get(key, 0))
                assert freed <= needed, f"{freed} blocks of {source} are freed, {name} has {has.following}"
                position = segment.position(name) - segment.first
                assert position <= has.following, f"{name} has {has.following} of {source}, and not {position}"
                assert position >= self.acknowledged.get(key, 0), f"an acknowledgement of {name} was taken back"
                self.acknowledged[key] = position
        for route, subscriber in self.publisher.subscribers.items():
            assert self.gate.whose(self.wire.keys[route]) == subscriber.name, "subscribed without a valid key"

    @invariant()
    def the_spool_keeps_to_its_limit(self) -> None:
        assert sum(path.stat().st_size for path in (self.folder / "spool").iterdir()) < 3.1 * (1 << 20)

    def teardown(self) -> None:
        try:
            self._deliver_all()
        finally:
            publisher.PACK_LIMIT = PACK_LIMIT
            self.ring_file.close()
            shutil.rmtree(self.folder)

    def _deliver_all(self) -> None:
        """Let all storages connect and take everything, and check that all blocks are delivered once."""
        if self.recorder.run is not None:
            self.end()
        for name in STORAGES:
            self.connect(name, restarted=True)
        self.core_tells()
        for turn in range(2000):
            for name in STORAGES:
                self.up(name, 100)
            self.disk.work()
            self.work()
            for name in STORAGES:
                self.down(name, 1000)
                self.process(name, 1000)
                self.keep(name, say=True)
            if turn > 3 and not self.publisher.pending():
                break
        assert self.publisher.pending() == 0, "not all is delivered"
        for route in list(self.wire.down):
            self.wire.cut(route)
        self.work()
        self.disk.work()
        for source, (rows, infos) in self.made.items():
            _, segment = self.kept[source]
            assert segment.last is not None
            blocks = range(segment.last + 1 - segment.first)
            nowhere = set(blocks)
            for name in self.required[source]:
                has = self.storages[name].durable.get(source, State())
                missing = has.missing | set(blocks[has.following :])
                assert all(block < self.excused.get((name, source), 0) for block in missing), f"{name} lacks {missing}"
                assert missing or (has.stamp, has.infos) == (rows, infos), (
                    f"{name} has {has}, {rows}, {infos} were made"
                )
                nowhere &= missing
            assert not nowhere, f"no storage has {nowhere} of {source}"
        assert self.publisher.stores == [self.publisher.own]
        assert list(self.folder.glob("*.ring")) == [self.ring_file.path]
        assert list((self.folder / "spool").iterdir()) == []


Stream.TestCase.settings = settings(max_examples=examples(200), stateful_step_count=80)
test_stream_against_model = Stream.TestCase
