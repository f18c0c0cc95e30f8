"""The part of the blocks that a monitor wants, in a simulation of what its processor time is spent on."""

from __future__ import annotations

import pytest

from larpixdaq.monitor.sample_rate import PERIOD, SHARE, SampleRate

#: Rows/s of a saturated detector, and seconds per row.
SATURATED = 20e6
COST = 30e-9


class Line:
    """A monitor that takes at most `room` rows/s, and uses `idle` cores and COST for each row that it sees."""

    def __init__(self, processors: int = 2, room: float = float("inf"), idle: float = 0.005) -> None:
        self.sample_rate = SampleRate(processors)
        self.room, self.idle = room, idle
        self.now, self.processor, self.seen, self.rows = 1000.0, 3.0, 0, 0

    def run(self, seconds: float, rate: float, period: float = PERIOD) -> float:
        """Run the line. Returns the fraction of rows seen."""
        seen, rows = self.seen, self.rows
        for _ in range(round(seconds / period)):
            taken = min(rate / self.sample_rate.every, self.room) * period
            self.now += period
            self.rows += round(rate * period)
            self.seen += round(taken)
            self.processor += self.idle * period + COST * taken
            assert self.sample_rate.due(self.now)
            self.sample_rate.measure(self.now, self.processor, self.seen, self.rows)
        return (self.seen - seen) / max(1, self.rows - rows)


@pytest.mark.parametrize("processors", [1, 2, 16])
def test_the_monitor_uses_its_part_of_the_processors(processors: int) -> None:
    line = Line(processors)
    line.run(4.0, SATURATED)
    used = line.processor
    seen = [line.run(1.0, SATURATED) for _ in range(10)]
    cores = (line.processor - used) / 10
    assert cores == pytest.approx(min(SHARE * processors, line.idle + COST * SATURATED), rel=0.05)
    assert max(seen) - min(seen) < 0.02
    assert seen[0] == pytest.approx(min(1.0, (SHARE * processors - line.idle) / COST / SATURATED), rel=0.05)


def test_all_is_seen_at_ordinary_rates_and_again_after_a_burst() -> None:
    line = Line()
    assert line.run(5.0, 1e6) == 1.0
    line.run(5.0, SATURATED)
    assert line.sample_rate.every > 3.0
    line.run(6.0, 1e6)
    assert line.run(1.0, 1e6) == 1.0


def test_blocks_that_come_too_fast_for_the_credit_become_a_sample() -> None:
    line = Line(processors=64, room=1e6)
    line.run(10.0, SATURATED)
    assert [line.run(1.0, SATURATED) for _ in range(5)] == pytest.approx([0.05] * 5, rel=0.2)
    assert line.sample_rate.every > 10.0


def test_a_pause_another_run_and_a_run_without_rows() -> None:
    line = Line()
    line.run(2.0, 1e6)
    line.run(20.0, SATURATED, period=10.0)  # the process was stopped
    assert line.sample_rate.every == 1.0
    line.run(5.0, SATURATED)
    line.seen = line.rows = 0
    every = line.sample_rate.every
    line.run(PERIOD, SATURATED)
    assert line.sample_rate.every == every
    line.run(10.0, 0.0)
    assert line.sample_rate.every == 1.0
