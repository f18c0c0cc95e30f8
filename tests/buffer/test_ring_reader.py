"""A ring that another process reads while its producer writes: it reads what was published, or nothing."""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ring_overwriter
import zmq
from processes import LIMIT
from processes import until as eventually
from ring_overwriter import EPOCH, NAME, ROWS, publish
from stream_harness import STORAGE, Line, make_consumer, until

from larpixdaq._native.ring_buffer import END, OVERHEAD, SMALLEST
from larpixdaq.buffer.block_store import LENDING_LIMIT
from larpixdaq.buffer.ring_file import RingFile, open_reader
from larpixdaq.errors import RingError
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.stream import (
    STREAM_VERSION,
    Block,
    Credit,
    Hello,
    Maps,
    Welcome,
    pack,
    unpack_consumer,
    unpack_producer,
)
from larpixdaq.runtime.record_file import crc32
from larpixdaq.schema import PACKETS_2_4
from larpixdaq.stream.subscriber import RING_CREDIT


def test_overwritten_blocks_are_not_read(tmp_path: Path) -> None:
    """A process overwrites the ring of 8 MiB, some 77 blocks at a time, without waiting for readers."""
    command = [sys.executable, ring_overwriter.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as producer:
        assert producer.stdin is not None
        assert producer.stdout is not None
        try:
            ring = open_reader(Path(producer.stdout.readline().strip()), NAME, EPOCH)
            rng = np.random.default_rng(1)
            seen, gone = 0, 0
            while seen < 3000 or gone < 300:
                newest = int(producer.stdout.readline())
                if newest % 64 == 0:
                    producer.stdin.write("\n")
                    producer.stdin.flush()
                index = int(newest - min(newest, rng.integers(0, 120)))
                found = ring.read(index)
                if found is None:
                    gone += 1
                    continue
                seen += 1
                assert (np.frombuffer(found, PACKETS_2_4)["timestamp"] == index).all()
        finally:
            producer.kill()


def test_a_freed_block_can_be_read_until_it_is_overwritten(tmp_path: Path) -> None:
    with contextlib.closing(RingFile.make(tmp_path, tmp_path, NAME, 5, SMALLEST)) as ring_file:
        ring_file.ring.begin(1, 2, PACKETS_2_4.itemsize, [])
        publish(ring_file, 0)
        ring = open_reader(ring_file.path, NAME, 5)
        assert ring.read(1) is None
        ring_file.ring.free_to(1)
        assert len(ring.read(0) or b"") == ROWS * PACKETS_2_4.itemsize
        assert ring_file.ring.append(END, b"", 0, b"end record")
        assert ring.read(1) == b""
        for index in range(2, 200):
            publish(ring_file, index)
            newest = ring.read(index)
            assert newest is not None
            assert (np.frombuffer(newest, PACKETS_2_4)["timestamp"] == index).all()
        assert ring.read(0) is None
        assert ring.read(1 << 63) is None


def test_blocks_whose_memory_a_successor_has_given_back_are_not_read(tmp_path: Path) -> None:
    ring_file = RingFile.make(tmp_path, tmp_path, NAME, 5, SMALLEST)
    ring_file.ring.begin(1, 2, PACKETS_2_4.itemsize, ["Offline storage"])
    for index in range(3):
        publish(ring_file, index)
    ring_file.ring.free_to(1)
    ring = open_reader(ring_file.path, NAME, 5)
    assert ring.read(0) is not None
    ring_file.leave()
    taken = RingFile.adopt(ring_file.path, NAME, 5)
    assert taken is not None
    taken.shrink()
    assert ring.read(0) is None
    assert ring.read(1) is not None
    taken.close()
    assert ring.read(2) is not None  # the memory stays as long as a process has it mapped


@pytest.mark.parametrize(
    "what", ["nothing", "fifo", "link", "folder", "garbage", "short", "epoch", "name", "user", "mode", "nul"]
)
def test_only_rings_of_this_user_producer_and_epoch_are_opened(tmp_path: Path, what: str) -> None:
    with contextlib.closing(RingFile.make(tmp_path, tmp_path, NAME, 5, SMALLEST)) as ring_file:
        path, name, epoch = tmp_path / "other", NAME, 5
        if what == "fifo":
            os.mkfifo(path)
        elif what == "link":
            path.symlink_to(ring_file.path)
        elif what == "folder":
            path.mkdir()
        elif what == "garbage":
            path.write_bytes(os.urandom(4096) * (SMALLEST // 4096 + 1))
        elif what == "short":
            path.write_bytes(ring_file.path.read_bytes()[:OVERHEAD])
        elif what in ("epoch", "name"):
            path, name, epoch = ring_file.path, "another" if what == "name" else NAME, 6 if what == "epoch" else 5
        elif what == "user":
            if os.geteuid():
                path = Path("/etc/passwd")
            else:
                os.chown(ring_file.path, 1, 1)
                path = ring_file.path
        elif what == "mode":
            path = ring_file.path
            path.chmod(0o666)
        elif what == "nul":
            path = Path("a\0b")
        with pytest.raises(RingError, match=r"other|ring|user|mode|null"):
            open_reader(path, name, epoch)
        assert ring_file.ring.head == 0


def test_rows_are_not_sent_to_a_consumer_that_reads_the_ring(tmp_path: Path) -> None:
    with contextlib.closing(Line(folder=tmp_path)) as line:
        peer = line.context.socket(zmq.DEALER)
        line.peers.append(peer)
        peer.connect(line.address)
        peer.send(pack(Hello(STREAM_VERSION, STORAGE, "", "all", [])))
        until(line, lambda: peer.poll(0), "WELCOME")
        welcome = unpack_producer(peer.recv(), "producer")
        assert isinstance(welcome, Welcome)
        line.begin()
        line.write(10)
        until(line, lambda: peer.poll(0), "a block")
        assert len(peer.recv_multipart()[1]) == 10 * PACKETS_2_4.itemsize
        peer.send(pack(Maps(welcome.epoch + 1)))  # of another producer
        peer.send(pack(Maps(welcome.epoch)))
        until(line, lambda: next(iter(line.publisher.subscribers.values())).maps, "MAPS to arrive")
        line.write(20)
        until(line, lambda: peer.poll(0), "a block")
        header, payload, place = peer.recv_multipart()
        block = unpack_producer(header, "producer")
        rows = open_reader(Path(welcome.ring), "board", welcome.epoch).read(int.from_bytes(place, "little"))
        assert isinstance(block, Block)
        assert (payload, crc32(rows)) == (b"", block.crc32)


def mapped(path: Path) -> bool:
    return path.name in Path("/proc/self/maps").read_text()


def test_the_memory_of_an_ended_producer_is_given_back(tmp_path: Path) -> None:
    line = Line(folder=tmp_path)
    consumer = make_consumer()
    try:
        consumer.connect({"board": line.endpoint})
        until(line, lambda: any(s.maps for s in line.publisher.subscribers.values()), "MAPS to arrive")
        assert line.ring_file is not None
        path = line.ring_file.path
        assert mapped(path)
        line.close()
        del line.ring, line.recorder, line.publisher, line.ring_file
        gc.collect()
        eventually(lambda: not mapped(path), "the ring to be unmapped")
    finally:
        consumer.close()


def test_rows_are_sent_when_blocks_may_soon_move_to_the_spool(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    with contextlib.closing(Line(spool=tmp_path / "spool", extra=0, folder=tmp_path)) as line:
        peer = line.context.socket(zmq.DEALER)
        line.peers.append(peer)
        peer.connect(line.address)
        peer.send_multipart([pack(Hello(STREAM_VERSION, STORAGE, "", "all", []))])
        peer.send(pack(Maps(EPOCH)))
        until(line, lambda: any(s.maps for s in line.publisher.subscribers.values()), "MAPS to arrive")
        peer.recv()
        line.begin()
        for _ in range(10):
            line.write(16_384)
            full = line.ring.fill > LENDING_LIMIT
            line.work()
            until(line, lambda: peer.poll(0), "a block")
            assert len(peer.recv_multipart()) == (2 if full else 3)
        assert full


@pytest.mark.parametrize("mode", ["all", "latest"])
def test_an_overwritten_block_is_requested_again_or_skipped(tmp_path: Path, mode: str) -> None:
    """A producer names a block that is not in the ring, as if it had been overwritten meanwhile."""
    context = zmq.Context()
    producer = context.socket(zmq.ROUTER)
    producer.bind("tcp://127.0.0.1:0")
    consumer = make_consumer(mode=mode)

    sequences: list[int] = []
    last = 0 if mode == "all" else 2

    def receive() -> tuple[bytes, Any]:
        assert producer.poll(LIMIT * 1000)
        route, frame = producer.recv_multipart()
        return route, unpack_consumer(frame, "consumer")

    def take() -> list[int]:
        while (received := consumer.next()) is not None:
            sequences.extend([received[1].sequence] if isinstance(received[1], Block) else [])
        return sequences

    try:
        consumer.connect({NAME: Endpoint(producer.get(zmq.LAST_ENDPOINT).decode())})
        with contextlib.closing(RingFile.make(tmp_path, tmp_path, NAME, 5, SMALLEST)) as ring_file:
            ring_file.ring.begin(1, 2, PACKETS_2_4.itemsize, [])
            publish(ring_file, 0)
            route, hello = receive()
            assert isinstance(hello, Hello)
            producer.send_multipart([route, pack(Welcome(NAME, 5, 1, 2, str(ring_file.path)))])
            while not isinstance(frame := receive()[1], Maps):
                assert isinstance(frame, Credit)
            for sequence, index in enumerate((0, 1, 0)):  # the second block is not in the ring
                block = Block(1, NAME, 5, sequence, 0, ROWS, 2, 0, 0, 0, 0, [], [])
                producer.send_multipart([route, pack(block), b"", index.to_bytes(8, "little")])
            if mode == "all":
                while not isinstance(frame := receive()[1], Hello):
                    pass
            eventually(lambda: last in take(), "the last block")
            if mode == "latest":
                while not isinstance(frame := receive()[1], Credit) or frame.blocks < RING_CREDIT + 1:
                    pass
        assert take() == ([0] if mode == "all" else [0, 2])
    finally:
        consumer.close()
        context.destroy(linger=0)
