"""The stream from ring, spool and predecessors: in order, once, and no block is freed that a storage needs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from processes import LIMIT
from stream_harness import LAYOUT, STORAGE, Line, Reader, make_consumer, until

from larpixdaq import constants
from larpixdaq._native.ring_buffer import SMALLEST
from larpixdaq.buffer import spool
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.block_store import BlockStore
from larpixdaq.buffer.crash_recovery import Predecessors
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.buffer.spool import SpoolDirectory
from larpixdaq.protocol.stream import Ack, Block, BlockOrigin, End, Hello, Position, Welcome, pack, unpack_producer
from larpixdaq.stream import Consumer

BLOCK = constants.BLOCK_ROWS * LAYOUT.dtype.itemsize


@pytest.fixture
def consumers() -> Iterator[list[Consumer]]:
    made: list[Consumer] = []
    yield made
    for consumer in made:
        consumer.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Line]]:
    made: list[Line] = []

    def one(*arguments: Any, **options: Any) -> Line:
        made.append(Line(*arguments, **options))
        return made[-1]

    yield one
    for line in made:
        line.close()


@pytest.fixture
def line(make: Callable[..., Line], tmp_path: Path) -> Line:
    (tmp_path / "spool").mkdir()
    return make(tmp_path / "spool", extra=0)


def subscribe(line: Line, consumers: list[Consumer], *, acknowledge: bool = True, name: str = STORAGE) -> Reader:
    consumers.append(make_consumer(name))
    consumers[-1].connect({"board": line.endpoint})
    return Reader(consumers[-1], acknowledge=acknowledge)


def flood(line: Line, blocks: int) -> None:
    """Write full blocks, far more than the ring can hold."""
    for _ in range(blocks):
        until(line, lambda: line.recorder.rows() is not None, "room in the ring")
        line.write(constants.BLOCK_ROWS)


# The spool


def test_blocks_without_room_in_the_ring_come_from_the_spool_in_order(line: Line, consumers: list[Consumer]) -> None:
    line.begin()
    line.recorder.info("Beginning run")
    flood(line, 40)
    assert line.spool is not None
    assert line.spool.head > 25
    assert line.publisher.own.spooled_blocks() > 25
    assert line.ring.tail > 0
    end = line.end()
    reader = subscribe(line, consumers)
    until(line, reader.has(lambda r: r.ends), "the end record", LIMIT)
    assert reader.ends == [end]
    assert [block.sequence for block in reader.blocks] == list(range(41))
    assert reader.stamps == list(range(line.written))
    until(line, lambda: line.publisher.pending() == 0, "all to be stored")
    until(line, lambda: not list(line.spool.directory.path.iterdir()), "the files to go")
    assert line.ring.tail == line.ring.head


def test_runs_in_the_spool_stay_separate(line: Line, consumers: list[Consumer]) -> None:
    for run in (1, 2, 3):
        line.begin(run)
        flood(line, 12)
        line.end()
    reader = subscribe(line, consumers)
    until(line, reader.has(lambda r: len(r.ends) == 3), "three end records", LIMIT)
    assert [(b.run, b.sequence) for b in reader.blocks] == [(run, i) for run in (1, 2, 3) for i in range(12)]
    until(line, lambda: line.publisher.pending() == 0, "all to be stored")
    assert not line.publisher.own.segments


def test_a_slow_storage_gets_all_after_a_fast_one(
    make: Callable[..., Line], tmp_path: Path, consumers: list[Consumer]
) -> None:
    line = make(tmp_path, extra=8 << 20)
    line.begin(1, (STORAGE, "second"))
    fast = subscribe(line, consumers, name="second")
    flood(line, 40)
    until(line, fast.has(lambda r: len(r.blocks) == 40), "all at the fast storage", LIMIT)
    slow = subscribe(line, consumers)
    until(line, slow.has(lambda r: len(r.blocks) == 40), "all at the slow storage", LIMIT)
    assert slow.stamps == fast.stamps == list(range(line.written))
    line.end()
    until(line, slow.has(lambda r: r.ends), "the end")
    until(line, fast.has(lambda r: r.ends), "the end")
    until(line, lambda: line.publisher.pending() == 0, "all to be stored")


def test_a_full_spool_fills_the_ring_until_there_is_room(
    make: Callable[..., Line], tmp_path: Path, consumers: list[Consumer]
) -> None:
    line = make(tmp_path, limit=6 << 20, extra=0)
    line.begin()
    written = 0
    while line.recorder.rows() is not None:
        line.write(constants.BLOCK_ROWS)
        written += 1
        line.publisher.work()
        assert line.worker.drain(LIMIT)
        line.publisher.work()
    assert line.spool is not None
    assert line.spool.directory.bytes <= 6 << 20
    assert 15 < written < 30
    reader = subscribe(line, consumers)
    until(line, reader.has(lambda r: len(r.blocks) == written), "all of it", LIMIT)
    until(line, lambda: line.recorder.rows() is not None, "room")
    line.write(5)
    line.end()
    until(line, reader.has(lambda r: r.ends), "the end")
    assert reader.stamps == list(range(line.written))


def test_all_blocks_but_the_lost_one_of_the_spool_are_sent(line: Line, consumers: list[Consumer]) -> None:
    line.begin()
    flood(line, 30)
    assert line.spool is not None
    assert line.worker.drain(LIMIT)
    file = line.spool.files[0]
    with open(file.path, "r+b") as stream:
        stream.seek(file.offsets[3] + 5000)
        stream.write(b"damage")
    reader = subscribe(line, consumers)
    line.end()
    until(line, reader.has(lambda r: r.ends), "the end", LIMIT)
    assert [block.sequence for block in reader.blocks] == [i for i in range(30) if i != 3]
    until(line, lambda: line.publisher.pending() == 0, "all to be stored")


def test_a_hanging_disk_holds_up_only_the_spool(
    line: Line, consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = threading.Event()
    real = os.pwritev

    def hanging(*arguments: Any) -> int:
        assert let_go.wait(LIMIT)
        return real(*arguments)

    monkeypatch.setattr(os, "pwritev", hanging)
    monkeypatch.setattr(spool, "RETRY_INTERVAL", 0.0)
    line.begin()
    while line.recorder.rows() is not None:
        line.write(constants.BLOCK_ROWS)
        line.work()
    assert line.spool is not None
    assert line.spool.writing
    assert line.ring.tail == 0
    line.work()
    assert sum("has not answered" in one.message for one in caplog.records) == 1
    held = line.ring.head
    reader = subscribe(line, consumers)
    until(line, reader.has(lambda r: len(r.blocks) == held), "all that the ring holds")
    until(line, lambda: line.ring.tail == held, "the ring to be free")
    let_go.set()
    assert line.worker.drain(LIMIT)
    line.work()
    assert line.worker.drain(LIMIT)
    assert line.spool.directory.bytes == 0
    line.write(7)
    line.end()
    until(line, reader.has(lambda r: r.ends), "the end")
    assert reader.stamps == list(range(line.written))


SUBSCRIBER = """
import sys, zmq
from larpixdaq.protocol.stream import Credit, Hello, pack
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
socket.send(pack(Hello(1, "Offline storage", "", "all", [])))
socket.recv()
print("welcome", flush=True)
while True:
    socket.poll(100)
    socket.send(pack(Credit(1)))
"""


def test_a_stopped_storage_does_not_hold_the_ring(line: Line, consumers: list[Consumer]) -> None:
    """Its process is stopped while libzmq has blocks for it in its queues, in the ring: the connection is closed."""
    line.begin()
    child = subprocess.Popen([sys.executable, "-c", SUBSCRIBER, line.address], stdout=subprocess.PIPE, bufsize=0)
    try:
        assert child.stdout is not None
        until(line, lambda: line.publisher.subscribers, "the subscription", LIMIT)
        assert child.stdout.readline() == b"welcome\n"
        os.kill(child.pid, signal.SIGSTOP)
        while line.recorder.rows() is not None and line.publisher.subscribers:
            line.write(constants.BLOCK_ROWS)
            line.publisher.work()
        assert line.publisher.own.pins, "blocks that libzmq holds in the ring"
        flood(line, 20)
        assert line.ring.tail > 10
    finally:
        child.kill()
        child.communicate()
    reader = subscribe(line, consumers)
    line.end()
    until(line, reader.has(lambda r: r.ends), "the end", LIMIT)
    assert reader.stamps == list(range(line.written))


# Blocks of predecessors


def predecessor(folder: Path, epoch: int, run: int, sizes: list[int], name: str = "board") -> None:
    """Leave the ring of a dead producer with blocks of these numbers of rows, the last one open."""
    ring_file = RingFile.make(folder, folder, name, epoch, SMALLEST)
    recorder = BlockBuilder(ring_file.ring, name, epoch, LAYOUT, [1])
    recorder.begin(run, [STORAGE])
    stamp = 0
    for last, n in zip([False] * (len(sizes) - 1) + [True], sizes, strict=True):
        rows = recorder.rows()
        assert rows is not None
        rows[:n] = np.zeros(n, LAYOUT.dtype)
        rows["timestamp"][:n] = np.arange(stamp, stamp + n)
        rows["io_group"][:n] = 1
        ring_file.ring.counts[1, constants.Count.WORD_ROWS] += np.uint64(n)
        recorder.publish(n)
        stamp += n
        if not last:
            recorder.close_block()
    ring_file.leave()


def adopt(line: Line, folder: Path) -> list[BlockStore]:
    directory = SpoolDirectory(folder / "spool", "larpixdaq", 0, line.worker)
    found = []
    for left in Predecessors("board", folder, folder, directory, 0).take_over(()):
        found.append(BlockStore.inherited("board", left, directory))
        line.publisher.adopt(found[-1])
    return found


def test_predecessors_blocks_come_first_under_their_epochs(
    line: Line, tmp_path: Path, consumers: list[Consumer]
) -> None:
    predecessor(tmp_path, 70, 1, [10, 20])
    predecessor(tmp_path, 60, 1, [5])
    adopt(line, tmp_path)
    line.begin()
    line.write(7)
    line.end()
    assert line.publisher.inherited() == 5
    reader = subscribe(line, consumers)
    until(line, reader.has(lambda r: len(r.ends) == 3), "three ends")
    order = [(b.epoch, b.sequence, b.rows) for b in reader.blocks]
    assert order == [(70, 0, 10), (70, 1, 20), (60, 0, 5), (5, 0, 7)]
    assert [(e.epoch, e.how, e.next) for e in reader.ends] == [
        (70, "recovered", 2),
        (60, "recovered", 1),
        (5, "closed", 1),
    ]
    until(line, lambda: line.publisher.pending() == 0, "all to be stored")
    assert not list(tmp_path.glob("*.ring"))
    assert line.publisher.stores == [line.publisher.own]
    assert line.ring.tail == line.ring.head


def test_blocks_that_a_storage_has_are_not_sent_again(line: Line, tmp_path: Path, consumers: list[Consumer]) -> None:
    """Also when it subscribed before the predecessor's ring was found."""
    consumers.append(make_consumer(positions=lambda: [Position(1, "board", 70, 2)]))
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0])
    until(line, reader.has(lambda r: r.other), "WELCOME")
    predecessor(tmp_path, 70, 1, [10, 20, 30])
    adopt(line, tmp_path)
    until(line, reader.has(lambda r: r.ends), "the end")
    assert [(b.epoch, b.sequence) for b in reader.blocks] == [(70, 2)]
    until(line, lambda: line.publisher.pending() == 0, "all to be stored")


def test_acknowledgements_of_several_epochs(line: Line, tmp_path: Path) -> None:
    predecessor(tmp_path, 70, 1, [10])
    (store,) = adopt(line, tmp_path)
    line.begin()
    line.write(7)
    peer = line.context.socket(zmq.DEALER)
    peer.connect(line.address)
    peer.send(pack(Hello(1, STORAGE, "", "all", [])))
    until(line, lambda: peer.poll(0), "WELCOME")
    assert isinstance(unpack_producer(peer.recv(), "p"), Welcome)
    until(line, lambda: [s.flight_bytes for s in line.publisher.subscribers.values()] == [17 * 36], "two blocks")
    peer.send(pack(Ack(1, 5, 1)))
    until(line, lambda: line.ring.tail == 1, "the own block to be freed")
    assert (store.pending(), [s.flight_bytes for s in line.publisher.subscribers.values()]) == (2, [10 * 36])
    peer.send(pack(Ack(1, 4, 9)))  # of an epoch that is not here
    peer.send(pack(Ack(1, 70, 2)))
    until(line, lambda: store.pending() == 0, "the block of the predecessor")
    peer.close(linger=0)


def test_a_successor_delivers_spool_and_ring_in_order(
    make: Callable[..., Line], tmp_path: Path, consumers: list[Consumer]
) -> None:
    """Half of the blocks are in the spool when the first producer dies; some of them were stored."""
    (tmp_path / "spool").mkdir()
    first = make(tmp_path / "spool", extra=0)
    ring_file = RingFile.make(tmp_path, tmp_path, "board", 5, SMALLEST)
    first.ring, first.recorder = ring_file.ring, BlockBuilder(ring_file.ring, "board", 5, LAYOUT, [1])
    first.publisher.own.ring = ring_file.ring
    first.begin()
    flood(first, 30)
    reader = subscribe(first, consumers, acknowledge=False)
    until(first, reader.has(lambda r: len(r.blocks) >= 5), "five blocks")
    consumers[0].acknowledge(BlockOrigin(1, "board", 5), 5)
    until(first, lambda: first.publisher.own.tail == 5, "five to be stored")
    rows = first.recorder.rows()
    assert rows is not None
    rows[:3] = np.zeros(3, LAYOUT.dtype)
    first.recorder.publish(3)
    assert first.worker.drain(LIMIT)
    first.publisher.own.leave()
    ring_file.leave()
    second = make()
    directory = SpoolDirectory(tmp_path / "spool", "larpixdaq", 0, second.worker)
    (left,) = Predecessors("board", tmp_path, tmp_path, directory, 0).take_over(())
    store = BlockStore.inherited("board", left, directory)
    second.publisher.adopt(store)
    assert store.pending() == 30 - 5 + 2  # the open block and the end
    again = make_consumer(session="t", positions=lambda: [Position(1, "board", 5, 5)])
    consumers.append(again)
    again.connect({"board": second.endpoint})
    new = Reader(again)
    until(second, new.has(lambda r: r.ends), "the end", LIMIT)
    assert [block.sequence for block in new.blocks] == list(range(5, 31))
    assert new.ends[0].next == 31
    until(second, lambda: second.publisher.pending() == 0, "all to be stored")
    until(second, lambda: not list((tmp_path / "spool").iterdir()), "the files to go")
    assert not list(tmp_path.glob("*.ring"))


# Storages that stay disconnected


def test_a_forgotten_storage_holds_only_blocks_that_no_other_has(
    make: Callable[..., Line], consumers: list[Consumer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    now = [1000.0]
    line = make(clock=lambda: now[0], forget_after=60.0)
    line.begin(1, (STORAGE, "second"))
    for _ in range(5):
        line.write(10)
    reader = subscribe(line, consumers, acknowledge=False)
    until(line, reader.has(lambda r: len(r.blocks) == 5), "all blocks")
    consumers[0].acknowledge(BlockOrigin(1, "board", 5), 3)
    until(line, lambda: line.publisher.own.segments[0].position(STORAGE) == 3, "the acknowledgement")
    line.work()
    assert line.ring.tail == 0
    for subscriber in line.publisher.subscribers.values():
        subscriber.heard_at = now[0] + 61
    now[0] += 61
    line.work()
    assert line.ring.tail == 3, "never the last copy"
    assert line.publisher.forgotten == {"second"}
    now[0] += 61
    for subscriber in line.publisher.subscribers.values():
        subscriber.heard_at = now[0]
    line.work()
    late = subscribe(line, consumers, name="second")
    until(line, late.has(lambda r: len(r.blocks) == 2), "the blocks that are left")
    assert [block.sequence for block in late.blocks] == [3, 4]
    assert line.ring.tail == 3
    until(line, lambda: not line.publisher.forgotten, "the acknowledgement of the second storage")
    messages = [one.message for one in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("second has been disconnected for 60 s")
    assert messages[1].startswith("second acknowledges again")


def test_a_connected_storage_that_never_acknowledges_is_forgotten_too(
    make: Callable[..., Line], consumers: list[Consumer]
) -> None:
    """If another storage has its blocks. The other one, whose blocks nobody else has, is not."""
    now = [1000.0]
    line = make(clock=lambda: now[0], forget_after=60.0)
    line.begin(1, (STORAGE, "second"))
    for _ in range(5):
        line.write(10)
    silent = subscribe(line, consumers, name="second", acknowledge=False)
    reader = subscribe(line, consumers, acknowledge=False)
    for one in (silent, reader):
        until(line, one.has(lambda r: len(r.blocks) == 5), "all blocks")
    consumers[1].acknowledge(BlockOrigin(1, "board", 5), 3)
    until(line, lambda: line.publisher.own.segments[0].position(STORAGE) == 3, "the acknowledgement")
    for seconds, tail in ((59, 0), (2, 3), (1000, 3)):
        now[0] += seconds
        for subscriber in line.publisher.subscribers.values():
            subscriber.heard_at = now[0]
        line.work()
        assert line.ring.tail == tail
    assert line.publisher.forgotten == {"second"}
    consumers[0].acknowledge(BlockOrigin(1, "board", 5), 5)
    until(line, lambda: not line.publisher.forgotten, "the storage that acknowledges again")


def test_the_blocks_of_a_single_storage_are_never_freed(make: Callable[..., Line]) -> None:
    now = [1000.0]
    line = make(clock=lambda: now[0], forget_after=1.0)
    line.begin()
    line.write(10)
    line.work()
    now[0] += 1000
    line.work()
    assert (line.ring.tail, line.publisher.pending()) == (0, 1)


def test_all_kinds_of_frames_go_through_the_spool(line: Line, consumers: list[Consumer]) -> None:
    """INFO messages and end records are unchanged."""
    line.begin()
    line.recorder.info("Beginning run")
    line.write(3)
    line.recorder.info("x" * 500)
    first = line.end()
    line.begin(2)
    flood(line, 20)
    assert line.ring.tail > 4
    reader = subscribe(line, consumers)
    until(line, reader.has(lambda r: len(r.blocks) == 23), "all", LIMIT)
    assert reader.ends == [first]
    assert [b.text for b in reader.blocks[:3]] == ["Beginning run", None, "x" * 500]
    assert all(isinstance(one, Block | End) for one in (*reader.blocks, *reader.ends))


@pytest.mark.parametrize("code", [LAYOUT.code, len(constants.LAYOUT_NAMES) + 1])
def test_only_a_spool_file_with_a_known_layout_is_taken_over(tmp_path: Path, code: int) -> None:
    """Blocks of another layout, of a later version, could not be packed, which would end each producer of the name."""
    path = tmp_path / "file.spool"
    file = spool.SpoolFile(path, spool.SpoolHeader("board", 5, 1, 0, 0, code, 1, [STORAGE]))
    file.append([spool.SpoolRecord(b"header", b"rows")])
    file.leave()
    if code != LAYOUT.code:
        with pytest.raises(ValueError, match="its header is damaged"):
            spool.SpoolFile.adopt(path, "board", 5)
        return
    adopted = spool.SpoolFile.adopt(path, "board", 5)
    assert adopted is not None
    assert adopted.next == 1
    adopted.remove()
