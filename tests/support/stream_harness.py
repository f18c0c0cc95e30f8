"""The parts of a producer that make and send blocks, without its process, and a reader that acknowledges them."""

from __future__ import annotations

import select
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from processes import LIMIT

from larpixdaq import constants, schema
from larpixdaq._native.ring_buffer import SMALLEST, Ring
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.block_store import BlockStore
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.buffer.spool import Spool, SpoolDirectory
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.stream import Block, End
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.record_file import crc32
from larpixdaq.stream import Consumer, Publisher
from larpixdaq.stream.publisher import stream_router

LAYOUT = schema.layout(2)
STORAGE = "Offline storage"


class Line:
    """A BlockBuilder with ring, spool and publisher, as in a producer."""

    def __init__(
        self,
        spool: Path | None = None,
        limit: int = 1 << 30,
        extra: int = 32 << 20,
        folder: Path | None = None,
        **options: Any,
    ) -> None:
        """`spool`: folder of a spool of `limit` bytes. `extra`: bytes of the ring above the minimum. `folder`: folder
        of a ring that consumers can read; without it the ring is in private memory."""
        self.context = zmq.Context()
        socket = stream_router(self.context)
        socket.bind("tcp://127.0.0.1:0")
        self.address = socket.get(zmq.LAST_ENDPOINT).decode()
        self.endpoint = Endpoint(self.address)
        self.ring_file = None if folder is None else RingFile.make(folder, folder, "board", 5, SMALLEST + extra)
        if self.ring_file is not None:
            self.ring = self.ring_file.ring
        else:
            self.ring = Ring(bytearray(SMALLEST + extra), producer="board", epoch=5)
        self.recorder = BlockBuilder(self.ring, "board", 5, LAYOUT, [1, 2])
        self.worker = Worker("spool")
        self.spool = None if spool is None else Spool(SpoolDirectory(spool, "larpixdaq", limit, self.worker))
        options.setdefault("forget_after", 60.0)
        self.publisher = Publisher(BlockStore("board", 5, self.ring, self.spool, self.ring_file), socket, **options)
        self.written = 0
        self.peers: list[zmq.Socket[bytes]] = []

    def begin(self, run: int = 1, required: tuple[str, ...] = (STORAGE,)) -> None:
        self.recorder.begin(run, required)
        self.publisher.begin(run, LAYOUT.code, required)

    def write(self, n: int) -> None:
        """Write one block of n rows, or fewer if the open block has less room. The timestamps count all rows."""
        rows = self.recorder.rows()
        assert rows is not None
        n = min(n, len(rows))
        rows[:n] = np.zeros(n, LAYOUT.dtype)
        rows["timestamp"][:n] = np.arange(self.written, self.written + n)
        rows["io_group"][:n] = 1
        self.ring.counts[1, constants.Count.PACKETS] += np.uint64(n)
        self.ring.counts[1, constants.Count.WORD_ROWS] += np.uint64(n)
        self.recorder.publish(n)
        self.recorder.close_block()
        self.written += n

    def end(self) -> End:
        end = self.recorder.end("closed", [], [])
        self.publisher.end()
        return end

    def work(self) -> None:
        self.worker.turn()
        self.publisher.work()

    def close(self) -> None:
        assert self.worker.close(LIMIT)
        for peer in self.peers:
            peer.close(linger=0)
        self.context.destroy(linger=0)
        if self.ring_file is not None:
            self.ring_file.close()


def until(line: Line, condition: Any, what: str, limit: float = LIMIT) -> None:
    """Run the publisher's loop until the condition is true."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit} s for {what}"
        line.publisher.socket.poll(5)
        line.work()


class Core:
    """What a consumer knows of the core: times of its last message and of the last answered heartbeat, and no key."""

    def __init__(self) -> None:
        self.heard = self.confirmed = 0.0
        self.key_pair = None


def make_consumer(name: str = STORAGE, session: str = "s", mode: str = "all", **options: Any) -> Consumer:
    return Consumer(name, session, mode, **{"core": Core()} | options)


class Reader:
    """Takes all frames from a consumer and acknowledges them as a storage does."""

    def __init__(self, consumer: Consumer, *, acknowledge: bool = True) -> None:
        self.consumer = consumer
        self.acknowledge = acknowledge
        self.blocks: list[Block] = []
        self.stamps: list[int] = []
        self.ends: list[End] = []
        self.other: list[Any] = []

    def take(self) -> None:
        select.select([self.consumer.fileno()], [], [], 0)
        while (received := self.consumer.next()) is not None:
            name, frame, payload, packed = received
            if isinstance(frame, Block):
                if packed is not None:
                    assert packed.is_intact()
                    payload = packed.unpack(frame.rows, schema.layout(frame.layout)).data.cast("B")
                assert payload is not None
                assert crc32(payload) == frame.crc32
                rows = np.frombuffer(payload, schema.layout(frame.layout).dtype)
                assert len(rows) == frame.rows
                self.blocks.append(frame)
                self.stamps += rows["timestamp"][rows["packet_type"] != 5].tolist()
                if self.acknowledge:
                    self.consumer.acknowledge(frame.origin, frame.sequence + 1)
                self.consumer.add_credit(name)
            elif isinstance(frame, End):
                self.ends.append(frame)
                if self.acknowledge:
                    self.consumer.acknowledge(frame.origin, frame.next + 1)
            else:
                self.other.append(frame)

    def has(self, condition: Any) -> Any:
        def check() -> bool:
            self.take()
            return bool(condition(self))

        return check
