"""What a producer notes about its boards in a run: connection, silence, identity."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.readout.board_watch import BoardWatch, Silence
from larpixdaq.sources.source import BoardStatus

HERE, AWAY = BoardStatus(1, "PACMAN"), BoardStatus(1, "PACMAN", away_ns=5, problem="cannot find host")


class Watched:
    """A BoardWatch with one board; look() moves the time."""

    def __init__(self):
        self.texts = []
        self.watch = BoardWatch([1], self.texts.append)
        self.watch.start()
        self.now = 100.0

    def look(self, seconds=0.25, packets=0, board=HERE, alone=True):
        self.now += seconds
        back = self.watch.take([board], {1: packets}, self.now, alone=alone)
        return back, self.watch.silent(1)


def test_unplugged_and_back():
    one = Watched()
    assert one.look() == ([], None)
    one.look(board=AWAY)
    one.look(board=AWAY)
    assert one.look(2.0) == ([1], None)
    assert one.texts == ["io_group 1: board not connected: cannot find host", "io_group 1: board connected again"]


def test_a_flapping_board_does_not_fill_the_file():
    one = Watched()
    for _ in range(200):  # 100 s
        one.look(board=AWAY)
        one.look()
    assert 2 <= len(one.texts) <= 101
    told = [text.endswith("again") for text in one.texts]
    assert all(first != second for first, second in itertools.pairwise(told))


def test_another_board():
    one = Watched()
    assert one.watch.changed(1) is None  # not known yet
    for identity in ("map 5", "map 5", "map 0", "map 5"):
        one.now += 2.0
        one.watch.take_identity(1, identity, one.now)
    assert one.watch.changed(1) == ""
    assert one.texts == [
        "io_group 1: another board: map 0; the run began with map 5",
        "io_group 1: the first board again: map 5",
    ]
    one.watch.start()
    one.watch.take_identity(1, "map 0", one.now)  # the next run begins with it
    assert one.watch.changed(1) == ""


def test_silent_after_a_second_and_again_with_packets():
    one = Watched()
    packets = 0
    for _ in range(40):
        packets += 25
        assert one.look(packets=packets) == ([], None)
    silences = [one.look(packets=packets)[1] for _ in range(8)]
    assert silences == [None] * 3 + [1.0, 1.25, 1.5, 1.75, 2.0]
    one.look(packets=packets, board=AWAY)  # does not end the silence: there are no packets
    assert one.watch.silent(1) == 2.0
    one.look(1.0, packets=packets + 1)
    assert one.texts == [
        "io_group 1: no packets any more",
        "io_group 1: board not connected: cannot find host",
        "io_group 1: board connected again",
        "io_group 1: packets again",
    ]


def test_nothing_is_silent_that_was_not_left_alone_or_had_no_packets():
    for changes in ({"alone": False}, {"board": AWAY}):
        one = Watched()
        for packets in range(0, 1000, 25):
            one.look(packets=packets)
        for _ in range(100):
            assert one.look(packets=975, **changes)[1] is None
    one = Watched()
    assert all(one.look(packets=3)[1] is None for _ in range(100))
    for packets in range(0, 1000, 25):
        one.look(packets=packets)
    assert one.look(5.0, packets=975)[1] is None  # the producer has paused


def test_spills_are_no_silence():
    silence, packets, now = Silence(), 0, 0.0
    for _ in range(50):
        for step in range(24):  # 0.5 s of data, then 5.5 s without
            now += 0.25
            packets += 1000 if step < 2 else 0
            silence.take(packets, now)
            assert now < 12 or silence.seconds is None
    for _ in range(100):
        now += 0.25
        silence.take(packets, now)
    assert silence.seconds is not None


@given(st.floats(0.5, 1e5), st.integers(0, 2**31))
def test_random_packets_of_a_steady_rate_are_not_silent(rate, seed):
    source, silence, packets, now, due = random.Random(seed), Silence(), 0, 0.0, 0.0
    for _ in range(400):
        now += 0.25
        if rate > 100:
            packets += round(rate / 4)
        while rate <= 100 and due < now:
            due += source.expovariate(rate)
            packets += 1
        silence.take(packets, now)
        assert silence.seconds is None
