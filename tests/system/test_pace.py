"""Times of recurring work, and of the core's checks for lost and stuck components."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.control.registry import Registry
from larpixdaq.keys.key_store import ANYONE
from larpixdaq.protocol.control import Heartbeat, Register
from larpixdaq.runtime.timing import next_beat, wait_ms

TIMES = st.floats(0, 1e8)


@given(TIMES, st.sampled_from([0.25, 0.1, 1 / 3]))
def test_a_beat_is_a_later_multiple_of_the_period(now: float, period: float) -> None:
    beat = next_beat(now, period)
    assert now < beat <= now + 1.001 * period
    assert abs(beat / period - round(beat / period)) < 1e-6


def test_beats_follow_each_other_by_one_period() -> None:
    beats = [1234.5]
    for _ in range(100):
        beats.append(next_beat(beats[-1], 0.25))
    assert beats == [1234.5 + 0.25 * n for n in range(101)]


@given(TIMES, st.floats(0, 10))
def test_a_wait_does_not_end_early(now: float, seconds: float) -> None:
    until = now + seconds
    assert until - now <= wait_ms(until, now) / 1000 < until - now + 0.001_001


def test_no_wait_after_the_due_time() -> None:
    assert wait_ms(1.0, 2.0) == 0


@given(st.floats(0, 3), st.integers(0, 2), st.floats(0, 0.9))
def test_lost_and_stuck_components_are_found_at_the_due_time(silent: float, queued: int, idle: float) -> None:
    peers = Registry()
    assert peers.due() == float("inf")
    component = peers.register(Register(name="a", kind="storage", instance="i"), b"", 100.0, ANYONE)
    peers.identify(component.session, b"", 101.0, ANYONE)
    peers.take_heartbeat(component, Heartbeat(queued=queued, idle=idle), 101.0)
    now, due = 101.0 + silent, peers.due()
    if peers.check(now):
        assert now >= due - 1e-9
    else:
        assert now <= due + 1e-9
