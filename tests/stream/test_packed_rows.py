"""Packed rows of blocks: exact, each block packed once, and never taken when they are damaged."""

from __future__ import annotations

import contextlib
import select
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from example_counts import examples
from file_builder import count, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMIT
from processes import until as processes_until
from stream_harness import LAYOUT, STORAGE, Line, Reader, make_consumer, until

from larpixdaq import constants, schema
from larpixdaq._native.hdf5_chunks import TALLY
from larpixdaq.errors import ChecksumError, ProtocolError
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.packed_rows import MIN_ROWS, ROW_COLUMNS, PackedRows, RowPacker
from larpixdaq.protocol.stream import Ack, Block, BlockOrigin, Hello, Packs, Welcome, pack, unpack_consumer
from larpixdaq.runtime.record_file import crc32
from larpixdaq.stream import publisher, subscriber

ROWS = random_rows(np.random.default_rng(7), constants.BLOCK_ROWS)


def packed_rows(rows: np.ndarray[Any, Any], row_layout: schema.RowLayout = LAYOUT) -> PackedRows:
    """Pack rows as a producer does, and parse the message's parts as a consumer does."""
    parts = RowPacker().pack(1, 2, rows.view(np.uint8).data, row_layout, lambda: True)
    assert parts is not None
    return PackedRows.parse(memoryview(parts[0]), memoryview(parts[1]), len(rows))


@settings(max_examples=examples(50))
@given(
    row_layout=st.sampled_from(schema.LAYOUTS),
    n=st.one_of(st.integers(1, 100), st.integers(16_380, constants.BLOCK_ROWS)),
    seed=st.integers(0, 2**32),
)
def test_rows_are_equal_after_packing_and_unpacking(row_layout: schema.RowLayout, n: int, seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), n, row_layout)
    packed = packed_rows(rows, row_layout)
    assert packed.is_intact()
    assert packed.rows_crc32 == crc32(rows.view(np.uint8))
    assert packed.unpack(n, row_layout).tobytes() == rows.tobytes()
    expected = count(rows)
    found = {g: int(packed.tally[g, ROW_COLUMNS].sum()) for g in np.flatnonzero(packed.tally.any(axis=1)).tolist()}
    assert sum(found.values()) == n
    assert {g: int(packed.tally[g, TALLY.index("packets")]) for g in found} == {
        g: numbers["packets"] for g, numbers in expected.items()
    }


@settings(max_examples=examples(200))
@given(data=st.data())
def test_damaged_rows_are_refused(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    right = packed_rows(ROWS[:n])
    packed = bytearray(right.data)
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "fewer rows", "more rows", "bytes", "other rows"]))
    if kind == "flip":
        packed[data.draw(st.integers(2, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del packed[data.draw(st.integers(0, len(packed) - 1)) :]
    elif kind == "more":
        packed += data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "bytes":
        packed = bytearray(data.draw(st.binary(max_size=100)))
    elif kind == "other rows":
        rows = ROWS[:n].copy()
        rows["io_group"] += 1
        packed = bytearray(packed_rows(rows).data)
    else:
        n += -1 if kind == "fewer rows" else data.draw(st.integers(1, constants.BLOCK_ROWS))
    damaged = right._replace(data=memoryview(packed))
    if packed != right.data:
        assert not damaged.is_intact()
    with pytest.raises(ChecksumError, match="packed rows: ") if kind != "flip" else contextlib.suppress(ChecksumError):
        unpacked = damaged.unpack(n, LAYOUT)
        # Adler-32, at the end of deflated data, misses some changes; the checksum of the rows does not.
        assert unpacked.tobytes() == ROWS[:n].tobytes() or crc32(unpacked.view(np.uint8)) != right.rows_crc32


@settings(max_examples=examples(100))
@given(
    description=st.one_of(
        st.binary(max_size=60), st.recursive(st.integers(-(2**63), 2**64 - 1), st.lists, max_leaves=30)
    )
)
def test_no_description_crashes_a_consumer(description: Any) -> None:
    encoded = description if isinstance(description, bytes) else msgspec.msgpack.encode(description)
    with contextlib.suppress(ProtocolError):
        PackedRows.parse(memoryview(b"x"), memoryview(encoded), 5)


@pytest.mark.parametrize(
    ("tally", "says"),
    [
        ([[1, 5, 5, 0, 0, 0, 0, 0]], ""),
        ([[1, 4, 4, 0, 0, 0, 0, 0]], "expected 5 rows, 4 are counted"),
        ([[1, 3, 3, 0, 0, 0, 0, 0], [1, 2, 2, 0, 0, 0, 0, 0]], "io_group 1 is counted twice"),
        ([[256, 5, 5, 0, 0, 0, 0, 0]], "io_group 256 is counted twice, or above 255"),
        ([[1, 5]], "length >= 8"),
    ],
)
def test_counts_that_cannot_be_are_refused(tally: list[list[int]], says: str) -> None:
    parts = memoryview(b"x"), memoryview(msgspec.msgpack.encode([0, 0, tally]))
    if not says:
        assert PackedRows.parse(*parts, 5).tally[1].tolist() == tally[0][1:]
        return
    with pytest.raises(ProtocolError, match=says):
        PackedRows.parse(*parts, 5)


def test_packed_rows_are_hardly_larger_than_rows() -> None:
    """Random bytes cannot be packed. Much more than the rows themselves is refused."""
    for row_layout in schema.LAYOUTS:
        for n in (MIN_ROWS, constants.BLOCK_ROWS):
            size = n * row_layout.dtype.itemsize
            data = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8).view(row_layout.dtype)
            assert packed_rows(data, row_layout).unpack(n, row_layout).tobytes() == data.tobytes()
    parts = RowPacker().pack(1, 2, ROWS[:100].view(np.uint8).data, LAYOUT, lambda: True)
    assert parts is not None
    with pytest.raises(ProtocolError, match="expected at most"):
        PackedRows.parse(memoryview(bytes(1 << 20)), memoryview(parts[1]), 100)


def test_a_block_is_packed_once_for_several_subscribers() -> None:
    packer = RowPacker()
    few = ROWS[:MIN_ROWS].view(np.uint8)
    first = packer.pack(5, 0, few, LAYOUT, lambda: True)
    assert packer.pack(5, 0, few, LAYOUT, lambda: False) is first
    assert packer.pack(5, 1, few, LAYOUT, lambda: False) is None
    assert packer.pack(6, 0, few, LAYOUT, lambda: False) is None
    for index in range(1, 100):
        packer.pack(5, index, few, LAYOUT, lambda: True)
    assert packer.pack(5, 0, few, LAYOUT, lambda: False) is None, "old blocks take no memory"


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_two_storages_get_every_block_when_packing_takes_long(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn packs for a limited time, at least one block, and the next turn continues with the other storage."""
    names = (STORAGE, "second storage")
    monkeypatch.setattr(publisher, "PACK_LIMIT", limit)
    with contextlib.ExitStack() as stack:
        line = Line()
        stack.callback(line.close)
        readers = []
        for name in names:
            consumer = make_consumer(name)
            stack.callback(consumer.close)
            consumer.connect({"board": line.endpoint})
            readers.append(Reader(consumer))
        line.begin(required=names)
        until(line, lambda: sum(s.packs for s in line.publisher.subscribers.values()) == 2, "two subscriptions")
        for _ in range(6):
            line.write(constants.BLOCK_ROWS)
        line.write(MIN_ROWS - 1)
        line.end()
        line.work()
        assert line.publisher.unsent == (not limit), "the loop must come back at once"
        for reader in readers:
            until(line, reader.has(lambda r: r.ends), "the end record")
            assert reader.stamps == list(range(line.written))
        line.work()
        assert not line.publisher.unsent


def test_a_monitor_gets_messages_and_the_end_although_there_is_no_time_to_pack_all_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks that no storage needs are freed in the turn in which they were made; the monitor skips some of them."""
    monkeypatch.setattr(publisher, "PACK_LIMIT", 0.0)
    line, monitor = Line(), make_consumer("monitor", mode="latest")
    try:
        monitor.connect({"board": line.endpoint})
        line.begin(required=())
        until(line, lambda: any(s.packs for s in line.publisher.subscribers.values()), "the subscription")
        reader = Reader(monitor)
        long_text = "x" * schema.MESSAGE_BYTES * MIN_ROWS
        for _ in range(2):
            line.write(constants.BLOCK_ROWS)
            line.write(constants.BLOCK_ROWS)
            assert line.recorder.info(long_text)
            line.work()
            assert line.ring.tail == line.ring.head
        line.write(constants.BLOCK_ROWS)
        line.write(constants.BLOCK_ROWS)
        end = line.end()
        line.work()
        until(line, reader.has(lambda r: r.ends), "the end record")
        assert reader.ends == [end]
        assert [block.text for block in reader.blocks if block.text] == [long_text] * 2
        assert 1 <= sum(block.rows for block in reader.blocks if not block.text) < line.written
    finally:
        monitor.close()
        line.close()


def test_a_storage_that_subscribes_late_is_served_although_another_one_could_use_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The late storage needs blocks that are packed no more. Each turn packs one block, and writes another one."""
    monkeypatch.setattr(publisher, "PACK_LIMIT", 0.0)
    line = Line()
    names = (STORAGE, "late storage")
    try:
        line.begin(required=names)
        subscribers = []
        for name, index in zip(names, (50, 0), strict=True):
            subscriber = publisher.Subscriber(name.encode(), name, "all", time.monotonic(), [], {5: index}, packs=True)
            line.publisher.subscribers[subscriber.route] = subscriber
            subscribers.append(subscriber)
        monkeypatch.setattr(line.publisher, "receive", lambda: None)
        monkeypatch.setattr(line.publisher, "socket", SimpleNamespace(send_multipart=lambda parts, flags: None))
        for _ in range(60):
            line.write(MIN_ROWS)
        for _ in range(20):
            line.write(MIN_ROWS)
            line.publisher.work()
        assert [subscriber.cursors[5] for subscriber in subscribers] == [60, 10]
    finally:
        line.close()


def test_blocks_end_at_multiples_of_a_chunk() -> None:
    """So that packed blocks of a fast producer can be chunks of a file, also after short blocks."""
    line = Line(extra=64 << 20)
    try:
        line.begin()
        line.recorder.info("Beginning run")
        ends = []
        for n in (constants.BLOCK_ROWS, constants.BLOCK_ROWS, 20, constants.BLOCK_ROWS, constants.BLOCK_ROWS):
            line.write(n)
            ends.append(line.ring.first_packet)
        chunk = schema.CHUNK_ROWS
        assert ends == [chunk, 2 * chunk, 2 * chunk + 20, 3 * chunk, 4 * chunk]
    finally:
        line.close()


def test_a_damaged_packed_block_is_requested_again_with_its_rows_and_later_ones_come_packed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(subscriber, "PLAIN_ROWS", 0.5)
    context: zmq.Context[Any] = zmq.Context()
    producer = context.socket(zmq.ROUTER)
    producer.rcvtimeo = int(LIMIT * 1000)
    producer.bind("tcp://127.0.0.1:0")
    consumer = make_consumer()
    rows = ROWS[:200]
    block = Block(1, "p", 5, 0, 0, len(rows), 2, 0, 0, 0, crc32(rows.view(np.uint8)), [], [])

    def receive(kind: type) -> bytes:
        while True:
            route, frame = producer.recv_multipart()
            if isinstance(unpack_consumer(frame, "consumer"), kind):
                return route

    try:
        consumer.connect({"p": Endpoint(producer.get(zmq.LAST_ENDPOINT).decode())})
        route = receive(Hello)
        missing = str(tmp_path / "ring of another host")
        producer.send_multipart([route, pack(Welcome("p", 5, 1, 2, missing, packs=True))])
        receive(Packs)
        parts = RowPacker().pack(5, 0, rows.view(np.uint8), LAYOUT, lambda: True)
        assert parts is not None
        producer.send_multipart([route, pack(block), parts[0][:-1], parts[1]])
        receive(Hello)
        producer.send_multipart([route, pack(Welcome("p", 5, 1, 2, missing, packs=True))])
        producer.send_multipart([route, pack(block), rows.tobytes()])
        reader = Reader(consumer)
        for _ in range(100):
            reader.take()
            if reader.blocks:
                break
            producer.poll(50)
        assert reader.blocks == [block]
        consumer.acknowledge(BlockOrigin(1, "p", 5), 1)
        receive(Ack)
        receive(Packs)
        second = msgspec.structs.replace(block, sequence=1, first_packet=200)
        producer.send_multipart([route, pack(second), *parts])
        processes_until(lambda: reader.has(lambda r: r.blocks == [block, second])(), "the second block")
        said = [record.getMessage() for record in caplog.records]
        assert [line for line in said if "plain" in line or "again" in line] == [
            "p sends plain rows for 0.5 s", "rows of p come packed again",
        ]  # fmt: skip
    finally:
        consumer.close()
        context.destroy(linger=0)


def test_a_producer_that_cannot_pack_is_not_asked_to(tmp_path: Path) -> None:
    """It is of an earlier version, and would refuse the consumer for the frame, again after each HELLO."""
    context: zmq.Context[Any] = zmq.Context()
    producer = context.socket(zmq.ROUTER)
    producer.rcvtimeo = int(LIMIT * 1000)
    producer.bind("tcp://127.0.0.1:0")
    consumer = make_consumer()
    try:
        consumer.connect({"p": Endpoint(producer.get(zmq.LAST_ENDPOINT).decode())})
        route, _ = producer.recv_multipart()
        producer.send_multipart([route, pack(Welcome("p", 5, 1, 2, str(tmp_path / "ring of another host")))])
        assert select.select([consumer.fileno()], [], [], LIMIT)[0], "WELCOME"
        consumer.acknowledge(BlockOrigin(1, "p", 5), 1)
        frames: list[Any] = []
        while not frames or not isinstance(frames[-1], Ack):
            frames.append(unpack_consumer(producer.recv_multipart()[1], "consumer"))
        assert not any(isinstance(frame, Packs) for frame in frames)
    finally:
        consumer.close()
        context.destroy(linger=0)
