"""Fake source: rows at the given rate, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from source_driver import Driver

from larpixdaq import constants, schema
from larpixdaq.errors import ConfigError
from larpixdaq.sources import fake
from larpixdaq.sources.fake import FakeSource


class Clock:
    """Stands in for the module time: monotonic() returns `now`, time() a fixed date."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1_700_000_000.0

    def time_ns(self):
        return 1_700_000_000 * 10**9


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(fake, "time", clock)
    return clock


def take(source, rows):
    pieces = []
    while source.read():
        while True:
            n = source.decode(rows)
            pieces.append(rows[:n].copy())
            if n < len(rows):
                break
    return pieces


@pytest.mark.parametrize("asic", list(schema.Asic))
def test_as_many_rows_as_are_due(clock, asic):
    source = FakeSource(4, 1_000_000, asic=asic)
    counts = np.zeros((constants.IO_GROUPS, len(constants.COUNTS)), np.uint64)
    source.start(counts)
    source.open()
    assert source.waits
    assert not source.finished
    assert source.layout == schema.layout_of(asic)
    rows = np.zeros(5000, source.layout.dtype)
    words = counts[4, constants.Count.WORDS_IN :]
    for _ in range(100):
        clock.now += 0.01
        assert source.due() <= clock.now
        take(source, rows)
        assert source.due() > clock.now
    assert abs(int(words[0]) - 1_000_000) < 20
    assert counts[4, constants.Count.BAD_PARITY] == 0
    assert counts[4, constants.Count.UNKNOWN_WORDS] == 0
    assert len(source.take_unknown()) == 0
    assert source.problems() == []
    source.close()


def test_no_burst_after_a_stall(clock):
    source = FakeSource(1, 10_000)
    driver = Driver(source)
    source.open()
    clock.now += 100.0
    pieces = take(source, np.zeros(20_000, source.layout.dtype))
    assert sum(np.count_nonzero(piece["packet_type"] != 4) for piece in pieces) == 10_000
    assert driver.counts.sum() > 0


def test_the_same_seed_the_same_rows(clock):
    def rows_of(seed, io_group=1):
        clock.now = 1000.0
        source = FakeSource(io_group, 100_000, seed=seed)
        Driver(source)
        source.open()
        clock.now += 0.1
        return np.concatenate(take(source, np.zeros(30_000, source.layout.dtype)))

    first = rows_of(1)
    assert (first == rows_of(1)).all()
    assert len(first) > 10_000
    for other in (rows_of(2), rows_of(1, io_group=2)):
        assert (first["dataword"][:5000] != other["dataword"][:5000]).any()
    # the chips' 31-bit clocks roll over 2 s after the start
    assert first["timestamp"][first["packet_type"] == 0].max() < 1 << 31


def test_rows_at_the_real_clock():
    source = FakeSource(1, 20_000)
    driver = Driver(source)
    source.open()
    driver.until(lambda: driver.count("words_in") >= 4_000, "4,000 words")
    source.close()


def test_impossible_rates_are_refused():
    with pytest.raises(ConfigError, match=r"fake board io_group 1: .*rate must be 10 to 1e9 words/s, found 1"):
        FakeSource(1, 1)
