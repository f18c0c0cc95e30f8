"""Hot and dead channels in the monitor's status, of a producer whose blocks are all seen, or only some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from simulated_blocks import START_NS, Clock, Producer

from larpixdaq import schema
from larpixdaq.monitor.channel_watch import HOTTEST
from larpixdaq.monitor.monitor import Monitor
from larpixdaq.protocol.reports import MonitorStatus
from larpixdaq.protocol.stream import Configs

STEP = 0.1
STEADY = dict.fromkeys(range(10), 5.0)


class Line:
    """A producer with one chip, whose channels send data packets at these mean rates (Hz), and its monitor."""

    def __init__(self, asic: int = 1) -> None:
        self.clock = Clock()
        self.monitor, self.producer = Monitor(self.clock), Producer(layout=schema.LAYOUTS[asic])
        self.monitor.start(7)
        self.random = np.random.default_rng(1)
        self.blocks = 0

    def block(
        self, rows: NDArray[Any], *, seen: bool = True, text: str | None = None, configs: Configs | None = None
    ) -> None:
        start = (self.producer.last_ns - START_NS) / 1e9
        header, rows = self.producer.block(rows, start, start + STEP, text)
        self.clock.now += STEP
        self.blocks += 1
        if seen:
            self.monitor.block(msgspec.structs.replace(header, configs=configs), rows)

    def run(self, seconds: float, rates: Mapping[int, float], seen: int = 1) -> Iterator[MonitorStatus]:
        """Yield the status after each step; every `seen`-th block reaches the monitor."""
        for _ in range(round(seconds / STEP)):
            counts = self.random.poisson([rate * STEP for rate in rates.values()])
            self.block(packets(np.repeat(list(rates), counts)), seen=self.blocks % seen == 0)
            yield self.monitor.status()

    def last(self, seconds: float, rates: Mapping[int, float], seen: int = 1) -> MonitorStatus:
        return list(self.run(seconds, rates, seen))[-1]


def packets(channels: Any, packet_type: int = 0, direction: int = 1) -> NDArray[Any]:
    rows = np.zeros(len(channels), schema.PACKETS_2_4)
    rows["io_group"] = rows["io_channel"] = rows["valid_parity"] = 1
    rows["chip_id"], rows["channel_id"], rows["dataword"] = 11, channels, 40
    rows["packet_type"], rows["direction"] = packet_type, direction
    return rows


def hottest(status: MonitorStatus) -> dict[str, float]:
    assert status.hottest is not None
    return {each.channel: each.rate for each in status.hottest}


def test_the_hottest_channels_have_their_rates_and_a_burst_is_none() -> None:
    line = Line()
    first = list(line.run(5.0, STEADY | {33: 200.0}))
    assert {(status.hottest, status.dead_channels) for status in first} == {(None, None)}  # not known yet
    line.block(packets([7] * 5000))
    status = line.last(10.0, STEADY | {33: 200.0})
    found = hottest(status)
    assert next(iter(found)) == "1-1-11-33"
    assert found["1-1-11-33"] == pytest.approx(200.0, rel=0.25)
    assert len(found) > 5
    assert all(rate < 10.0 for channel, rate in found.items() if channel != "1-1-11-33")
    line.last(3.0, STEADY)
    assert "1-1-11-33" not in hottest(line.monitor.status())
    many = line.last(10.0, dict.fromkeys(range(60), 50.0))
    assert len(hottest(many)) == HOTTEST


def test_answers_to_configuration_reads_are_neither_hot_nor_dead() -> None:
    line = Line()
    for _ in range(200):
        line.block(packets(np.full(200, 50), packet_type=3))
        line.last(STEP * 3, STEADY)
    assert "1-1-11-50" not in hottest(line.monitor.status())
    assert line.last(200.0, STEADY).dead_channels == 0


def test_a_channel_that_stops_is_dead_until_it_sends_again_or_its_run_ends() -> None:
    line = Line()
    assert line.last(70.0, STEADY | {20: 8.0}).dead_channels == 0
    assert {status.dead_channels for status in line.run(56.0, STEADY)} == {0}
    status = line.last(36.0, STEADY)
    assert status.dead_channels == 1
    (dead,) = status.dead
    assert dead.channel == "1-1-11-20"
    assert dead.rate == pytest.approx(8.0, rel=0.2)
    assert line.last(7.0, STEADY | {20: 8.0}).dead_channels == 0
    assert line.last(300.0, dict.fromkeys(range(6, 10), 5.0)).dead_channels == 6
    assert len(line.monitor.status().dead) == 5
    line.monitor.end(line.producer.end())
    assert line.monitor.status().dead_channels == 0
    line.monitor.start(8)
    assert line.monitor.status().dead_channels is None


def write(line: Line) -> None:
    line.block(packets([0], packet_type=2, direction=0))


def tell(line: Line) -> None:
    """The producer's message about changed configurations, which comes although blocks are skipped."""
    configs = Configs("2", bytes([1, 1, 11]), b"")
    rows = np.zeros(1, schema.PACKETS_2_4)
    rows["packet_type"] = 5
    line.block(rows, text="configurations", configs=configs)


@pytest.mark.parametrize("configure", [write, tell])
def test_a_channel_that_was_masked_is_not_dead(configure: Callable[[Line], None]) -> None:
    line = Line()
    line.last(70.0, STEADY | {20: 8.0})
    configure(line)
    assert {status.dead_channels for status in line.run(120.0, STEADY)} == {0}


def test_other_rates_of_the_io_group_make_no_dead_channels() -> None:
    line = Line()
    line.last(80.0, STEADY | {20: 1.0})
    for _ in range(1200):  # nothing at all
        line.clock.now += STEP
        assert line.monitor.status().dead_channels == 0
    line.producer.last_ns += 120 * 10**9
    # fewer packets of all, and then one loud channel
    assert {status.dead_channels for status in line.run(120.0, {0: 0.05})} == {0}
    assert {status.dead_channels for status in line.run(20.0, {0: 2000.0})} == {0}


def test_a_slow_channel_that_sends_in_bursts_is_not_dead() -> None:
    line = Line()
    for _ in range(40):
        line.block(packets([20] * 50))
        assert {status.dead_channels for status in line.run(line.random.exponential(15.0) + STEP, STEADY)} <= {0, None}


@pytest.mark.parametrize("seen", [4, 10])
def test_skipped_blocks_make_no_hot_or_dead_channels(seen: int) -> None:
    line = Line()
    rates = dict.fromkeys(range(40), 5.0) | dict.fromkeys(range(40, 60), 0.4)
    found = [status for part in (1, seen, 1, seen) for status in line.run(80.0, rates, part)]
    assert {status.dead_channels for status in found} == {0, None}
    known = [status for status in found if status.hottest is not None]
    assert len(known) > 0.9 * len(found)
    assert max(rate for status in known for rate in hottest(status).values()) < 15.0
    hot = line.last(10.0, rates | {33: 400.0}, seen)
    assert 100.0 < hottest(hot)["1-1-11-33"] < 440.0


def test_dead_channels_are_found_in_a_sample() -> None:
    line = Line()
    rates = dict.fromkeys(range(12), 5.0)
    assert line.last(100.0, rates, 4).dead_channels == 0
    status = line.last(120.0, dict.fromkeys(range(10), 5.0), 4)
    assert status.dead_channels == 2
    assert [each.rate for each in status.dead] == pytest.approx([5.0, 5.0], rel=0.3)


def test_nothing_is_known_when_hardly_anything_was_seen() -> None:
    line = Line()
    line.last(10.0, STEADY)
    status = line.last(20.0, STEADY, seen=50)
    assert (status.hottest, status.dead_channels, status.dead) == (None, None, [])


def test_a_monitor_that_joins_a_run() -> None:
    line = Line()
    for _ in range(300):
        line.block(packets(np.arange(64)), seen=False)
    assert max(hottest(line.last(10.0, STEADY)).values()) < 12.0
