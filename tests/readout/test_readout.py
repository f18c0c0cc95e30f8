"""BlockBuilder and Readout without processes: where rows go when there is room, when there is none, and outside of
runs."""

import logging
from typing import Any

import numpy as np
import pytest
import zmq
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq import constants, schema
from larpixdaq._native.ring_buffer import BLOCK, END, INFO, SMALLEST, Ring
from larpixdaq.buffer.block_builder import BLOCK_AGE, BlockBuilder, info_rows
from larpixdaq.constants import Count
from larpixdaq.protocol.stream import Block, End, UnknownWord, unpack_producer
from larpixdaq.readout.readout import Readout
from larpixdaq.runtime.record_file import crc32
from larpixdaq.schema import io_groups_of

LAYOUT = schema.layout(2)


class NoListener:
    """A listener that wants no rows."""

    listening = 0

    def take_rows(self, rows: Any) -> None:
        raise AssertionError("rows for a listener that does not listen")


class Batches:
    """A source with batches of these numbers of rows, whose timestamps count on."""

    name, layout, waits, recorded, finished = "batches", LAYOUT, True, False, False
    drained = True
    sockets: tuple[Any, ...] = ()

    def __init__(self, batches: list[int], io_group: int = 1) -> None:
        self.io_groups = (io_group,)
        self._batches = list(batches)
        self._left = 0
        self._next = 0
        self._counts = np.zeros((constants.IO_GROUPS, len(Count)), np.uint64)

    def open(self) -> None: ...
    def close(self) -> None: ...

    def start(self, counts: Any) -> None:
        self._counts = counts

    def due(self) -> float | None:
        return 0.0 if self._batches else None

    def read(self) -> bool:
        assert not self._left, "a batch was abandoned before its end"
        if not self._batches:
            return False
        self._left = self._batches.pop(0)
        return True

    def texts(self) -> list[tuple[str, int]]:
        return []

    def decode(self, rows: Any) -> int:
        n = min(self._left, len(rows))
        rows[:n] = np.zeros(n, LAYOUT.dtype)
        rows["io_group"][:n] = self.io_groups[0]
        rows["timestamp"][:n] = np.arange(self._next, self._next + n)
        self._next += n
        self._left -= n
        for count in (Count.WORD_ROWS, Count.PACKETS):
            self._counts[self.io_groups[0], count] += np.uint64(n)
        return n

    def take_unknown(self) -> Any:
        return np.zeros(0, schema.UNKNOWN_WORD)

    def problems(self) -> list[str]:
        return []


def make_readout(sources: list[Batches], *, wait: bool) -> tuple[Ring, BlockBuilder, Readout]:
    ring = Ring(bytearray(SMALLEST), producer="p", epoch=1)
    recorder = BlockBuilder(ring, "p", 1, LAYOUT, [g for source in sources for g in source.io_groups])
    readout = Readout(sources, recorder, ring, wait=wait, listener=NoListener())
    return ring, recorder, readout


def blocks(ring: Ring) -> list[tuple[Any, np.ndarray]]:
    found = []
    for index in range(ring.tail, ring.head):
        header = unpack_producer(ring.packed_header(index), "ring")
        found.append((header, np.frombuffer(ring.payload(index), LAYOUT.dtype)))
    return found


@given(
    first=st.lists(st.integers(1, 70_000), min_size=1, max_size=20),
    second=st.lists(st.integers(1, 70_000), max_size=20),
    wait=st.booleans(),
)
@settings(max_examples=examples(25))
def test_every_row_is_in_a_block_or_counted_as_dropped(first: list[int], second: list[int], wait: bool) -> None:
    logging.disable(logging.WARNING)
    sources = [Batches(first, 1), Batches(second, 2)]
    ring, recorder, readout = make_readout(sources, wait=wait)
    recorder.begin(1, ["s"])
    readout.record(True)
    recorder.info("Beginning run")
    poller = zmq.Poller()
    stored: dict[int, list[int]] = {0: [], 1: [], 2: []}
    gaps = 0

    def take() -> None:
        nonlocal gaps
        for header, rows in blocks(ring):
            gaps += sum(gap.rows for gap in header.gaps)
            if isinstance(header, End):
                take.end = header
                continue
            assert header.sequence == take.sequence
            take.sequence += 1
            assert header.crc32 == crc32(rows.tobytes())
            assert header.rows == len(rows) <= constants.BLOCK_ROWS
            assert header.first_packet == sum(map(len, stored.values()))
            for group in np.unique(rows["io_group"]):
                stored[int(group)] += rows["timestamp"][rows["io_group"] == group].tolist()
            for total in header.totals:
                assert total.rows == len(stored[total.io_group]) + total.dropped
        ring.free_to(ring.head)

    take.sequence, take.end = 0, None
    turns = 0
    while readout.turn(poller):
        turns += 1
        assert turns < 10_000
        if wait and ring.fill > 0.9:
            take()
    recorder.info("Ending run")
    end = recorder.end("closed", [], [])
    take()
    assert take.end == end
    counts = {row[0]: dict(zip(constants.COUNTS, row[1:], strict=True)) for row in end.counts}
    for group, sent in ((1, sum(first)), (2, sum(second))):
        made = counts.get(group, {"word_rows": 0, "dropped": 0})
        assert made["word_rows"] == sent == len(stored[group]) + made["dropped"]
        assert stored[group] == sorted(set(stored[group]))
        if wait:
            assert made["dropped"] == 0
    assert gaps == sum(c["dropped"] for c in counts.values())
    assert counts[0]["info_rows"] == 2
    logging.disable(logging.NOTSET)


def test_sources_that_wait_for_room_have_equal_parts_of_it() -> None:
    sources = [Batches([70_000] * 100, io_group) for io_group in (1, 2, 3)]
    ring, recorder, readout = make_readout(sources, wait=True)
    recorder.begin(1, ["s"])
    readout.record(True)
    poller = zmq.Poller()
    for _ in range(60):
        readout.turn(poller)
        ring.free_to(ring.head - (ring.head - ring.tail) // 2)  # room for less than a batch of each source
    packets = ring.counts[1:4, Count.PACKETS].astype(int)
    assert packets.max() - packets.min() <= 2 * 70_000
    assert packets.min() > 1_000_000


def test_a_block_closes_after_its_age() -> None:
    now = [100.0]
    ring = Ring(bytearray(SMALLEST), producer="p", epoch=1)
    recorder = BlockBuilder(ring, "p", 1, LAYOUT, [1], clock=lambda: now[0], wall=lambda: int(now[0] * 1e9))
    recorder.begin(3, [])
    assert recorder.due() is None
    rows = recorder.rows()
    assert rows is not None
    recorder.publish(5)
    assert recorder.due() == now[0] + BLOCK_AGE
    now[0] += BLOCK_AGE / 2
    recorder.publish(5)  # the age counts from the first row
    recorder.work()
    assert ring.head == 0
    now[0] += BLOCK_AGE / 2
    recorder.work()
    assert ring.head == 1
    assert recorder.due() is None
    (block,) = blocks(ring)
    assert isinstance(block[0], Block)
    assert (block[0].rows, block[0].first_ns, block[0].run) == (10, int(100e9), 3)


def test_a_step_of_the_clock_does_not_show_within_a_run() -> None:
    now, stepped = [100.0], [0.0]
    ring = Ring(bytearray(SMALLEST), producer="p", epoch=1)
    wall = lambda: int((now[0] + stepped[0]) * 1e9)  # noqa: E731
    recorder = BlockBuilder(ring, "p", 1, LAYOUT, [1], clock=lambda: now[0], wall=wall)
    for run, step in ((1, 3600.0), (2, -7200.0)):
        recorder.begin(run, [])
        began = wall()
        for _ in range(3):
            assert recorder.rows() is not None
            now[0] += 0.25
            recorder.publish(5)
            stepped[0] += step
            recorder.close_block()
        end = recorder.end("closed", [], [])
        assert (end.first_ns, end.last_ns) == (began, began + 750_000_000)
        times = [(frame.first_ns - began, frame.last_ns - began) for frame, _ in blocks(ring) if frame.run == run]
        assert times[:3] == [(i * 250_000_000, (i + 1) * 250_000_000) for i in range(3)]


def test_rows_outside_of_a_run_are_counted_and_not_kept() -> None:
    source = Batches([100, 30_000])
    ring, recorder, readout = make_readout([source], wait=False)
    while readout.turn(zmq.Poller()):
        pass
    assert ring.head == 0
    assert ring.outside_counts[1, Count.WORD_ROWS] == 30_100
    recorder.begin(1, [])
    assert ring.counts.sum() == 0
    assert recorder.counts(ring.outside_counts)[0][0] == 1


def test_rows_of_a_batch_after_an_abort_belong_to_no_run(caplog: pytest.LogCaptureFixture) -> None:
    source = Batches([400_000])
    ring, recorder, readout = make_readout([source], wait=True)
    recorder.begin(1, ["s"])
    readout.record(True)
    poller = zmq.Poller()
    assert readout.turn(poller)
    in_run = int(ring.counts[1, Count.WORD_ROWS])
    assert 0 < in_run < 400_000
    recorder.end("aborted", [], [])
    readout.record(False)
    while readout.turn(poller):
        pass
    assert in_run + int(ring.outside_counts[1, Count.WORD_ROWS]) == 400_000


def test_the_end_record_always_has_room() -> None:
    ring = Ring(bytearray(SMALLEST), producer="p", epoch=1)
    recorder = BlockBuilder(ring, "p", 1, LAYOUT, [1])
    recorder.begin(1, ["s"])
    while (rows := recorder.rows()) is not None:
        recorder.publish(len(rows))
    unknown = [UnknownWord(1, 1, 1, bytes(24)) for _ in range(100_000)]
    assert recorder.info("Ending run")
    end = recorder.end("closed", unknown, [])
    kinds = [ring.kind(index) for index in range(ring.tail, ring.head)]
    assert kinds == [BLOCK] * (len(kinds) - 2) + [INFO, END]
    assert 1000 < len(end.unknown) < 100_000  # cut to the room; their number is in the counts


@pytest.mark.parametrize("layout", schema.LAYOUTS, ids=lambda layout: layout.name)
def test_info_rows_have_a_row_for_each_64_bytes(layout: schema.RowLayout) -> None:
    for text, n in (("", 1), ("x" * 64, 1), ("x" * 65, 2), ("ü" * 40, 2)):
        rows = info_rows(text, layout, 1_700_000_000)
        assert len(rows) == n
        assert (rows["timestamp"] == 1_700_000_000).all()
        assert (io_groups_of(rows) == 0).all()


def test_dropped_rows_are_logged_when_it_begins_and_with_their_number_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Batches([300_000, 100_000, 10])
    ring, recorder, readout = make_readout([source], wait=False)
    recorder.begin(1, ["s"])
    readout.record(True)
    poller = zmq.Poller()
    readout.turn(poller)
    readout.turn(poller)
    ring.free_to(ring.head)
    readout.turn(poller)
    dropped = int(ring.counts[1, Count.DROPPED])
    assert [record.message for record in caplog.records] == [
        "the ring is full: rows are decoded and counted, but dropped, until storages have acknowledged",
        f"the ring has space again; {dropped} rows were dropped",
    ]


def test_gaps_are_reported_even_if_a_message_had_no_room(caplog: pytest.LogCaptureFixture) -> None:
    source = Batches([400_000, 1000])
    ring, recorder, readout = make_readout([source], wait=False)
    recorder.begin(1, ["s"])
    readout.record(True)
    poller = zmq.Poller()
    readout.turn(poller)
    turns = 0
    while recorder.info("x" * 100_000):
        turns += 1
        assert turns < 1000
    dropped = int(ring.counts[1, Count.DROPPED])
    readout.turn(poller)
    assert int(ring.counts[1, Count.DROPPED]) == dropped + 1000
    assert not recorder.info("x" * 100_000)
    reported = sum(gap.rows for header, _ in blocks(ring) for gap in header.gaps)
    ring.free_to(ring.head)
    reported += sum(gap.rows for gap in recorder.end("closed", [], []).gaps)
    assert reported == int(ring.counts[:, Count.DROPPED].sum()) > dropped


def test_readout_is_quiet_when_a_source_was_read_to_its_end() -> None:
    source = Batches([10] * 5)
    _, recorder, readout = make_readout([source], wait=True)
    recorder.begin(1, ["s"])
    readout.record(True)
    poller = zmq.Poller()
    for drained in (True, False, True):
        source.drained = drained
        assert readout.turn(poller)
        assert readout.quiet == drained
