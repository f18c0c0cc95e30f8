"""A measurement counts the stream between two answers, in any pieces and however late it comes.

A measurement without these answers is repeated or fails.
"""

import itertools
import random
import time
import types

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq import schema
from larpixdaq.errors import RequestError
from larpixdaq.routines.kit import collect, measurement, rates
from larpixdaq.routines.kit.measurement import LineLoads, Window

DATA, READ = 0, 3


def row(io_group, kind, chip_id, number=0, v1=False, register=0, trigger=0):
    if v1:
        rows = np.zeros(1, schema.PACKETS_1_0)
        rows["chip_key"], rows["type"], rows["register"] = f"{io_group}-1-{chip_id}", kind, register
    else:
        rows = np.zeros(1, schema.PACKETS_2_4)
        rows["io_group"], rows["io_channel"], rows["chip_id"], rows["packet_type"] = io_group, 1, chip_id, kind
        rows["register_address"], rows["trigger_type"], rows["dataword"] = register, trigger, number % 256
    rows["direction"], rows["valid_parity"], rows["timestamp"] = 1, 1, number
    return rows


class FakeIO:
    """A stream of several boards. Chips answer `late` rows after they were asked, except the chips in `silent`.

    Answers for which `lost()` is true are lost. `missed` rows are left out with each piece.
    """

    def __init__(self, groups, silent=(), late=0, pieces=(1,), v1=False, lost=lambda: False, missed=0):
        self._v1 = v1
        self.marks = {}
        self.mark_number = 0
        self.left_out = 0
        self.triggers = [0]  # trigger types of the hits, in turn
        self._silent, self._late, self._lost, self._missed = silent, late, lost, missed
        self._pieces = itertools.cycle(pieces)
        self._number = dict.fromkeys(groups, 0)
        self._waiting = []  # group, chip, register, rows before its answer, number of the request
        self.asked = 0
        self.truth = {
            group: {} for group in groups
        }  # number of the request -> number of the row before the first answer

    def start_listening(self):
        pass

    stop_listening = start_listening

    def capacity(self, lines):
        return [1e9 for _ in lines]

    def request_registers(self, keys, registers):
        self.asked += 1
        self._waiting += [
            [int(key[0]), key, register, self._late, self.asked]
            for key in keys
            for register in registers
            if key not in self._silent and not self._lost()
        ]

    def take_rows(self):
        self.left_out += self._missed
        return [row for _ in range(next(self._pieces)) for group in self._number for row in self._rows(group)]

    def _rows(self, group):
        for waiting in [w for w in self._waiting if w[0] == group]:
            waiting[3] -= 1
            if waiting[3] < 0:
                self._waiting.remove(waiting)
                _, key, register, _, asked = waiting
                self.truth[group].setdefault(asked, self._number[group])
                yield row(group, READ, int(key.split("-")[2]), v1=self._v1, register=register)
        trigger = self.triggers[self._number[group] % len(self.triggers)]
        yield row(group, DATA, 11, self._number[group], self._v1, trigger=trigger)
        self._number[group] += 1


def controller(io, *chips):
    return types.SimpleNamespace(io=io, chips=dict.fromkeys(chips))


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "_READ_PERIOD", 0.0005)
        patch.setattr(measurement, "_PATIENCE", (0.01, 0.02, 0.04))
        yield


@settings(max_examples=examples(40))
@given(
    groups=st.integers(1, 3),
    first_is_silent=st.booleans(),
    late=st.integers(0, 5),
    pieces=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    v1=st.booleans(),
)
def test_exactly_the_rows_between_the_answers_are_counted(groups, first_is_silent, late, pieces, v1):
    io_groups = list(range(1, groups + 1))
    chips = [f"{group}-1-{chip}" for group in io_groups for chip in (11, 12)]
    silent = {f"{group}-1-11" for group in io_groups} if first_is_silent else set()
    io = FakeIO(io_groups, silent, late, pieces, v1)
    made = Window(controller(io), chips, 0.005, patience=1.0)
    rows = np.concatenate(list(made))
    assert made.unmarked == []
    assert set(io.marks.values()) == {f"{group}-1-{12 if first_is_silent else 11}" for group in io_groups}
    for group in io_groups:
        mine = rows[(schema.io_groups_of(rows) == group) & (rows["type" if v1 else "packet_type"] == DATA)]
        assert mine["timestamp"].tolist() == list(range(io.truth[group][2], io.truth[group][3]))
    assert made.seconds >= 0.005


@settings(max_examples=examples(25))
@given(lost=st.floats(0, 0.9), seed=st.integers(0, 2**32), late=st.integers(0, 40))
def test_a_measurement_without_its_marks_is_repeated_or_fails(lost, seed, late):
    """Only rows between two answers are returned, however many answers are lost or come too late."""
    draw = random.Random(seed)
    io = FakeIO([1, 2], late=late, lost=lambda: draw.random() < lost)
    begun = []
    try:
        found = collect(controller(io), ["1-1-11", "2-1-11"], 0.002, act=lambda: begun.append(io.asked))
    except RequestError:
        return
    assert found.hits.size > 0
    for place, group in enumerate((1, 2)):
        begin, end = (io.truth[group][asked] for asked in (begun[-1], begun[-1] + 1))
        counted = found.hits["adc"][found.hits["chip"] == place]
        assert counted.tolist() == [number % 256 for number in range(begin, end)]


@given(
    start=st.floats(0, 1000),
    seconds=st.floats(0.05, 300),
    asked=st.lists(st.floats(0, 0.1), min_size=4, max_size=4),
    period=st.sampled_from([10_000_000, 1 << 32, None]),
)
def test_the_boards_clock_gives_the_length_if_asking_takes_long(start, seconds, asked, period):
    """`asked`: seconds before each mark at which asking began, and after it at which asking ended."""
    marks = start, start + seconds
    began, ended = (
        (mark - before, mark + after) for mark, before, after in zip(marks, asked[::2], asked[1::2], strict=True)
    )
    stamps = tuple(int(mark * 1e7) % period if period else 0 for mark in marks)
    found = measurement.elapsed(began, ended, {0x101: stamps, 0x102: ()})
    if period:
        assert found == pytest.approx(seconds, abs=1e-6)
    else:  # a board without a clock
        assert abs(found - seconds) <= sum(asked) + measurement._ANSWER_TIME


def test_an_io_channel_without_answers_is_named_and_any_chip_of_it_may_answer():
    io = FakeIO([1, 2], silent={"1-1-11", "2-1-11"})
    with pytest.raises(RequestError, match=r"^io_channel 1-1, 2-1: not measured, .* \(3 attempts"):
        rates(controller(io), ["1-1-11", "2-1-11"], 64, 0.002)
    with pytest.raises(RequestError, match=r"^io_channel 1-1: not measured"):
        rates(controller(io, "1-1-11", "2-1-12"), ["1-1-11", "2-1-11"], 64, 0.002)
    assert rates(controller(io, "2-1-12"), ["2-1-11"], 64, 0.002).hits[0, 0] > 0


def test_rates_count_only_natural_triggers():
    io = FakeIO([1])
    io.triggers = [1, 2, 3]
    assert rates(controller(io), ["1-1-11"], 64, 0.01).hits.sum() == 0
    io.triggers = [0, 1, 2, 3]
    hits = collect(controller(io), ["1-1-11"], 0.1).hits  # at least four, also on a busy machine
    assert set(hits["trigger"].tolist()) == {0, 1, 2, 3}


def test_left_out_rows_shorten_the_measurement_by_their_share_on_all_boards():
    io = FakeIO([1, 2, 3, 4], missed=4)  # half of all that comes
    began = time.monotonic()
    found = rates(controller(io), ["1-1-11"], 64, 0.05)
    assert 0.02 < found.seconds < 0.6 * (time.monotonic() - began)


@pytest.mark.parametrize("v1", [False, True])
def test_saturated_io_channels_are_named(v1):
    io = types.SimpleNamespace(capacity=lambda lines: [100.0, 20.0, 100.0][: len(lines)])

    def saturated(*rows, seconds=1.0):
        lines = LineLoads(io, ["1-1-11", "1-1-12", "2-1-11", "3-1-11"])
        for part in rows:
            lines.count(part)
        return lines.saturated(seconds)

    def many(io_group, n):
        return np.repeat(row(io_group, DATA, 11, v1=v1), n)

    assert saturated() == saturated(many(1, 70), many(2, 15), many(4, 1000)) == []
    assert saturated(many(1, 70), many(2, 15), many(2, 15)) == ["2-1"]
    assert saturated(many(1, 70), many(2, 15), seconds=0.5) == ["1-1", "2-1"]
    says = many(3, 2)
    says["fifo_full" if v1 else "shared_fifo"] = 1
    assert saturated(says) == (["3-1"] if v1 else [])  # half full, in v2
    if not v1:
        says["local_fifo"] = 3
        assert saturated(says) == ["3-1"]
