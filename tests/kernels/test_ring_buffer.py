"""The ring, compared with a simple model: blocks come out unchanged and in order."""

import argparse
import mmap
import os
from collections import deque

import hypothesis.strategies as st
import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from larpixdaq import constants, schema
from larpixdaq._native.ring_buffer import BLOCK, END, INFO, SMALLEST, Ring
from larpixdaq.buffer.ring_file import RingFile, ring_file_name
from larpixdaq.errors import RingError
from larpixdaq.protocol.stream import Block, Gap, Totals, pack
from larpixdaq.runtime.units import parse_size

ROW = schema.PACKETS_2_4


def make_ring(extra: int = 0) -> Ring:
    return Ring(mmap.mmap(-1, SMALLEST + extra), producer="LArPix board", epoch=7)


class RingMachine(RuleBasedStateMachine):
    """Writes, reads and frees blocks of random sizes. The model is a deque of (kind, payload, header)."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = make_ring()
        self.ring.begin(1, 2, ROW.itemsize, ["Offline storage"])
        self.model: deque[tuple[int, bytes, bytes]] = deque()
        self.open = b""
        self.value = 0
        self.full = False

    def _payload(self, n: int) -> bytes:
        self.value = (self.value + 1) % 251
        return bytes([self.value]) * (n * ROW.itemsize)

    @rule(n=st.integers(1, constants.BLOCK_ROWS))
    def write(self, n: int) -> None:
        room = self.ring.rows(123, constants.BLOCK_ROWS)
        if room is None:
            self.full = True
            assert self.ring.fill > 0.7
            return
        assert len(room) % ROW.itemsize == 0
        payload = self._payload(min(n, len(room) // ROW.itemsize))
        room[: len(payload)] = payload
        self.open += payload
        full = self.ring.publish(len(payload) // ROW.itemsize)
        assert full == (len(payload) == len(room))
        if full:
            self.close()

    @precondition(lambda self: self.open)
    @rule()
    def close(self) -> None:
        assert bytes(self.ring.open_payload()) == self.open
        header = Block(
            1, "LArPix board", 7, self.ring.sequence, self.ring.first_packet, self.ring.open_rows, 2, 0, 123, 456,
            self.value, [], [],
        )  # fmt: skip
        self.ring.close_block(456, self.value)
        self.model.append((BLOCK, self.open, pack(header)))
        self.open = b""

    @precondition(lambda self: not self.open)
    @rule(n=st.integers(0, 3))
    def info(self, n: int) -> None:
        payload, header = self._payload(n), b"i%d" % self.ring.sequence
        assert self.ring.append(INFO, payload, n, header), "no reserve for INFO rows"
        self.model.append((INFO, payload, header))

    @rule(share=st.floats(0, 1))
    def free(self, share: float) -> None:
        n = int(len(self.model) * share)
        self.ring.free_to(self.ring.tail + n)
        for _ in range(n):
            self.model.popleft()

    @rule()
    def check(self) -> None:
        assert self.ring.head - self.ring.tail == len(self.model)
        for index, (kind, payload, header) in enumerate(self.model, self.ring.tail):
            assert self.ring.kind(index) == kind
            assert self.ring.packed_header(index) == header
            assert self.ring.payload(index) == payload


RingMachine.TestCase.settings = settings(max_examples=examples(30), stateful_step_count=40)
test_ring_against_model = RingMachine.TestCase


@given(sizes=st.lists(st.integers(1, constants.BLOCK_ROWS), min_size=60, max_size=120))
@settings(max_examples=examples(10))
def test_blocks_go_round_the_arena_many_times(sizes: list[int]) -> None:
    ring = make_ring()
    ring.begin(1, 2, ROW.itemsize, [])
    for i, n in enumerate(sizes):
        room = ring.rows(0, constants.BLOCK_ROWS)
        assert room is not None
        n = min(n, len(room) // ROW.itemsize)
        room[: n * ROW.itemsize] = bytes([i % 256]) * (n * ROW.itemsize)
        ring.publish(n)
        ring.close_block(0, 0)
        assert ring.payload(ring.head - 1) == bytes([i % 256]) * (n * ROW.itemsize)
        if ring.head - ring.tail > 3:
            ring.free_to(ring.tail + 1)


_NUMBER = st.integers(0, 2**32 - 1) | st.integers(0, 2**50) | st.sampled_from([127, 128, 255, 256, 65535, 65536, 2**32])


@given(
    producer=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda name: len(name.encode()) <= 64
    ),
    epoch=st.integers(0, 2**64 - 1),
    run=st.integers(1, constants.LAST_RUN),
    counts=st.dictionaries(st.integers(0, 255), st.lists(_NUMBER, min_size=22, max_size=22), max_size=20)
    | st.just({g: [2**52] * 22 for g in range(256)}),
    gaps=st.dictionaries(st.integers(0, 255), st.tuples(st.integers(1, 2**50), _NUMBER, _NUMBER), max_size=20)
    | st.just(dict.fromkeys(range(256), (2**55, 2**62, 2**62))),
    times=st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)),
    crc32=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([1, 127, 128, 255, 256, constants.BLOCK_ROWS]),
)
@settings(max_examples=examples(100))
def test_header_of_a_block_is_that_of_msgspec(producer, epoch, run, counts, gaps, times, crc32, rows) -> None:
    ring = Ring(mmap.mmap(-1, SMALLEST), producer=producer, epoch=epoch)
    ring.begin(run, 2, ROW.itemsize, [], sorted(counts))
    for io_group, values in counts.items():
        ring.counts[io_group] = values
    for io_group, gap in gaps.items():
        ring.gaps[io_group] = gap
    ring.append(INFO, bytes(ROW.itemsize), 1, b"h")
    assert ring.rows(times[0], constants.BLOCK_ROWS) is not None
    ring.publish(rows)
    ring.close_block(times[1], crc32)
    totals = [Totals.of(io_group, counts[io_group]) for io_group in sorted(counts)]
    expected = [Gap(io_group, *gaps[io_group]) for io_group in sorted(gaps)]
    block = Block(run, producer, epoch, 1, 1, rows, 2, 0, *times, crc32, totals, expected)
    assert ring.packed_header(1) == pack(block)
    assert not ring.gaps.any()


def test_end_record_has_a_reserved_descriptor() -> None:
    ring = make_ring(64 << 20)
    ring.begin(1, 2, ROW.itemsize, [])
    blocks = 0
    while (room := ring.rows(0, constants.BLOCK_ROWS)) is not None:
        room[: ROW.itemsize] = b"r" * ROW.itemsize
        ring.publish(1)
        ring.close_block(0, 0)
        blocks += 1
    assert blocks == 65536 - 64
    assert ring.fill == 1.0
    assert ring.append(END, b"", 0, b"end" * 1000)


def test_a_run_begins_with_zero_sequence_and_counters() -> None:
    ring = make_ring()
    ring.begin(1, 2, ROW.itemsize, ["a"])
    ring.counts[3, 0] = 5
    ring.append(INFO, bytes(ROW.itemsize), 1, b"h")
    assert (ring.sequence, ring.first_packet) == (1, 1)
    ring.begin(2, 4, schema.PACKETS_3_0.itemsize, ["a", "b"])
    assert (ring.sequence, ring.first_packet, ring.counts.sum()) == (0, 0, 0)
    assert ring.head == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ring: ring.publish(1),
        lambda ring: ring.close_block(0, 0),
        lambda ring: ring.append(INFO, b"123", 1, b""),
        lambda ring: ring.begin(2, 2, 36, ["x" * 65]),
        lambda ring: ring.begin(2, 2, 36, [str(i) for i in range(17)]),
        lambda ring: ring.begin(2, 2, 36, [], [256]),
        lambda ring: ring.payload(0),
        lambda ring: ring.free_to(1),
        lambda ring: ring.acknowledge(1, 1, 0),
        lambda ring: ring.acknowledge(2, 0, 0),
        lambda ring: ring.release(2),
    ],
)
def test_wrong_calls_raise_an_error(wrong) -> None:
    ring = make_ring()
    ring.begin(1, 2, ROW.itemsize, ["a"])
    with pytest.raises((ValueError, IndexError), match=r"ring|io_group"):
        wrong(ring)


def test_a_ring_has_no_rows_before_its_first_run() -> None:
    with pytest.raises(ValueError, match="no run was begun"):
        make_ring().rows(0, constants.BLOCK_ROWS)


def test_a_freed_block_with_an_impossible_end_is_damage() -> None:
    """A successor continues behind the last block: from here its end record would be written behind the memory."""
    memory = mmap.mmap(-1, SMALLEST)
    ring = Ring(memory, producer="LArPix board", epoch=7)
    ring.begin(1, 2, ROW.itemsize, ["a"])
    ring.append(INFO, bytes(ROW.itemsize), 1, b"h")
    ring.free_to(1)
    start = memory.find(np.array([0, 64, 1], np.uint64).tobytes())  # start, end and run of the block
    memory[start + 8 : start + 16] = (2**64 - 64).to_bytes(8, "little")
    with pytest.raises(ValueError, match="ring: block 0 is damaged"):
        Ring(memory, producer="LArPix board", epoch=7, attach=True)


def test_too_small_memory_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"at least {SMALLEST}"):
        Ring(bytearray(4096), producer="p", epoch=1)


def test_ring_file_is_locked_private_and_gone_after_close(tmp_path) -> None:
    ring_file = RingFile.make(tmp_path, tmp_path / "state", "LArPix board", 5, SMALLEST)
    assert ring_file.path.name == ring_file_name(tmp_path / "state", "LArPix board", 5)
    assert ring_file.path.stat().st_mode & 0o777 == 0o600
    assert ring_file.path.stat().st_blocks * 512 >= SMALLEST  # reserved, not sparse
    view = (
        np.frombuffer(ring_file.ring.rows(0, 10) or b"", np.uint8)
        if ring_file.ring.begin(1, 2, 36, []) is None
        else None
    )
    ring_file.close()
    assert not ring_file.path.exists()
    assert view is not None
    assert view.sum() == 0  # the memory lives as long as its views


def test_interrupted_making_leaves_no_ring_file(tmp_path, monkeypatch) -> None:
    def interrupt(*args: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RingFile.make(tmp_path, tmp_path, "p", 1, SMALLEST)
    assert list(tmp_path.iterdir()) == []


def test_error_of_ring_that_does_not_fit_names_the_options(tmp_path) -> None:
    with pytest.raises(RingError, match=r"--ring .*--ring-dir"):
        RingFile.make(tmp_path, tmp_path, "p", 1, 1 << 60)
    assert not list(tmp_path.glob("*.ring"))
    with pytest.raises(RingError, match="--ring: expected at least"):
        RingFile.make(tmp_path, tmp_path, "p", 1, 1000)
    with pytest.raises(RingError, match="--ring-dir"):
        RingFile.make(tmp_path / "nowhere", tmp_path, "p", 1, SMALLEST)


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 << 20), ("1GB", 10**9), ("4096", 4096), (" 2 KiB ", 2048)])
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "12parsec", "1e999GB", "-", "nan"])
def test_parse_size_rejects_other_texts(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="size"):
        parse_size(text)
