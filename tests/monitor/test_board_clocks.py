"""Intervals of SYNC words, and the spread of the boards' clocks, in the monitor's summary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from simulated_blocks import Clock, Producer

from larpixdaq import schema
from larpixdaq.monitor.monitor import Monitor

SECOND = 10_000_000
STEP = 0.02


def sync(io_group: int, kind: str, ticks: int, layout: schema.RowLayout = schema.LAYOUTS[1]) -> NDArray[Any]:
    rows = np.zeros(1, layout.dtype)
    rows["timestamp"], rows["direction"] = ticks, 1
    if layout.code == 1:
        rows["chip_key"], rows["type"], rows["register"] = b"%d-0-0" % io_group, 6, ord(kind)
    else:
        rows["io_group"], rows["packet_type"], rows["trigger_type"] = io_group, 6, ord(kind)
    return rows


def packet(io_group: int, receipt: int, layout: schema.RowLayout = schema.LAYOUTS[1]) -> NDArray[Any]:
    rows = np.zeros(1, layout.dtype)
    rows["io_group"], rows["io_channel"], rows["chip_id"] = io_group, 1, 11
    rows["direction"] = rows["valid_parity"] = 1
    rows["receipt_timestamp"] = receipt
    rows["packet_type"] = int(layout.code == 4)
    return rows


class Line:
    """A producer and its monitor. `at`: seconds since the start."""

    def __init__(self, code: int = 2) -> None:
        self.layout = schema.layout(code)
        self.clock = Clock()
        self.monitor, self.producer = Monitor(self.clock), Producer(layout=self.layout)
        self.at = 0.0

    def send(self, *rows: NDArray[Any], seen: bool = True) -> None:
        self.at += STEP
        self.clock.now += STEP
        block = self.producer.block(np.concatenate(rows), self.at - STEP, self.at)
        if seen:
            self.monitor.block(*block)

    def sync(self, io_group: int = 1) -> dict[str, Any]:
        (found,) = [each for each in self.monitor.summary()["sync"] if each["io_group"] == io_group]
        return found

    def spread(self) -> dict[int, Any]:
        return {each["io_group"]: each for each in self.monitor.summary()["spread"]}


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_intervals_of_resets_are_known_although_rows_were_skipped(code: int) -> None:
    line = Line(code)
    line.send(sync(1, "S", 9_999_998, line.layout))
    line.send(sync(1, "S", 10_000_004, line.layout), seen=False)
    line.send(sync(1, "S", 10_000_001, line.layout))
    assert line.sync() == {
        "io_group": 1,
        "rows": 2,
        "kind": "reset",
        "ticks": 10_000_001,
        "seconds": pytest.approx(1.0000001),
        "min_ticks": 9_999_998,
        "max_ticks": 10_000_001,
    }
    line.clock.now += 61
    assert (line.sync()["ticks"], line.sync()["min_ticks"], line.sync()["max_ticks"]) == (10_000_001, None, None)


@pytest.mark.parametrize(("code", "bits"), [(1, 32), (2, 32), (3, 64)])
def test_intervals_of_heartbeats_need_rows_without_a_gap(code: int, bits: int) -> None:
    line = Line(code)
    line.send(sync(1, "H", 2**bits - 40_000_000, line.layout))
    assert line.sync()["ticks"] is None
    line.send(sync(1, "H", 60_000_000, line.layout))
    assert (line.sync()["kind"], line.sync()["ticks"], line.sync()["seconds"]) == ("heartbeat", 100_000_000, 10.0)
    line.send(sync(1, "H", 160_000_000, line.layout), seen=False)
    line.send(sync(1, "H", 260_000_000, line.layout))
    line.send(sync(1, "C", 5, line.layout))
    line.send(sync(1, "H", 300_000_000, line.layout))
    assert (line.sync()["rows"], line.sync()["max_ticks"]) == (5, 100_000_000)
    line.send(sync(1, "H", 400_000_001, line.layout))
    assert line.sync()["max_ticks"] == 100_000_001


def test_boards_without_sync_words() -> None:
    line = Line()
    line.send(packet(1, 5), packet(2, 5))
    unknown = {"rows": 0, "kind": "", "ticks": None, "seconds": None, "min_ticks": None, "max_ticks": None}
    assert line.monitor.summary()["sync"] == [{"io_group": 1, **unknown}, {"io_group": 2, **unknown}]
    assert {each["how"] for each in line.spread().values()} == {""}


@settings(max_examples=examples(25))
@given(
    ahead=st.lists(st.integers(-2_000_000, 2_000_000), min_size=2, max_size=4),
    pps=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    wide=st.booleans(),
)
def test_the_spread_is_that_of_the_clocks(ahead: list[int], pps: bool, seed: int, wide: bool) -> None:
    """The data of each board take up to 5 ms to the host, and now and then 100 ms."""
    line = Line(3 if wide else 2)
    random = np.random.default_rng(seed)
    boards = dict(enumerate(ahead, 1))
    # A clock of 32 bits rolls over.
    start, period = (0, SECOND) if pps else (2**63, 2**64) if wide else (2**32 - 2 * SECOND, 2**32)

    def clock(io_group: int, at: float) -> int:
        return start + SECOND + round(at * SECOND) + boards[io_group]

    for _ in range(250):
        rows, resets = [], []
        for io_group in boards:
            delay = 100e-3 if random.random() < 0.02 else random.random() * 5e-3
            arrived = line.at if io_group == 1 else line.at + STEP  # the block's first row, and the others
            rows.append(packet(io_group, clock(io_group, arrived - delay) % period, line.layout))
            if pps and clock(io_group, line.at) // SECOND < clock(io_group, line.at + STEP) // SECOND:
                resets.append(sync(io_group, "S", SECOND, line.layout))
        line.send(*rows, *resets, seen=random.random() < 0.5)
    found = line.spread()
    for io_group, offset in boards.items():
        others = np.median([other for key, other in boards.items() if key != io_group])
        if pps and line.sync(io_group)["ticks"] is None:  # no reset was seen
            assert found[io_group]["how"] == ""
            continue
        known = [key for key in boards if not pps or line.sync(key)["ticks"]]
        if len(known) < len(boards):
            continue
        assert found[io_group]["how"] == ("resets" if pps else "clock")
        assert found[io_group]["ticks"] == pytest.approx(offset - others, abs=60_000)
        assert found[io_group]["seconds"] == pytest.approx(found[io_group]["ticks"] / SECOND)


def test_the_spread_of_a_clock_with_another_rate_is_not_known() -> None:
    line = Line()
    for i in range(200):
        line.send(packet(1, 200_000 * i), packet(2, 200_000 * (i + 1)), packet(3, 100_000 * i))
    found = line.spread()
    assert [found[io_group]["how"] for io_group in (1, 2, 3)] == ["clock", "clock", ""]
    assert found[3]["ticks"] is None
    assert found[1]["ticks"] == 0


def test_chip_keys_without_an_io_group_do_no_harm() -> None:
    line = Line(1)
    for key in (b"", b"999-0-0", b"a-1-1", b"\xb2-1-1"):
        rows = sync(1, "S", SECOND, line.layout)
        rows["chip_key"] = key
        line.send(rows)
    assert line.monitor.summary()["rows_by_type"]["sync"] == 4
