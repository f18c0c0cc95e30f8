"""What a measurement counts: the stream between two answers, in whatever pieces and however late it comes."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq import schema
from larpixdaq.routines.kit import window
from larpixdaq.routines.kit.lines import Lines
from larpixdaq.routines.kit.window import Window

DATA, READ = 0, 3


def row(io_group, kind, chip_id, number=0, v1=False):
    if v1:
        rows = np.zeros(1, schema.PACKETS_1_0)
        rows["chip_key"], rows["type"] = f"{io_group}-1-{chip_id}", kind
    else:
        rows = np.zeros(1, schema.PACKETS_2_4)
        rows["io_group"], rows["io_channel"], rows["chip_id"], rows["packet_type"] = io_group, 1, chip_id, kind
    rows["direction"], rows["timestamp"] = 1, number
    return rows


class FakeIO:
    """A stream in which each board goes on; `silent` chips do not answer, others after `late` further rows."""

    def __init__(self, groups, silent, late, pieces, v1=False):
        self._v1 = v1
        self.marks = {}
        self.silent = silent
        self._late = late
        self._pieces = pieces
        self._number = dict.fromkeys(groups, 0)
        self._waiting = []  # group, chip, rows to come before its answer
        self.truth = {group: [] for group in groups}  # the number of the row before which each answer came
        self.turn = 0

    def asked(self, packets):
        for group, chip in packets:
            if chip not in self.silent:
                self._waiting.append([group, chip, self._late])

    def take_rows(self):
        for _ in range(self._pieces[self.turn % len(self._pieces)]):
            found = []
            for group in self._number:
                for waiting in [w for w in self._waiting if w[0] == group]:
                    waiting[2] -= 1
                    if waiting[2] < 0:
                        self._waiting.remove(waiting)
                        found.append(row(group, READ, int(waiting[1].split("-")[2]), v1=self._v1))
                        self.truth[group].append(self._number[group])
                found.append(row(group, DATA, 11, self._number[group], self._v1))
                self._number[group] += 1
            yield np.concatenate(found)
        self.turn += 1


class FakeController:
    def __init__(self, io):
        self.io = io

    def __getitem__(self, key):
        return types.SimpleNamespace(get_configuration_read_packets=lambda registers: [(int(key[0]), key)])

    def send(self, packets):
        self.io.asked(packets)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    first_is_silent=st.booleans(),
    late=st.integers(0, 5),
    pieces=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    v1=st.booleans(),
)
def test_exactly_what_stands_between_the_answers(groups, first_is_silent, late, pieces, v1):
    io_groups = list(range(1, groups + 1))
    chips = [f"{group}-1-{chip}" for group in io_groups for chip in (11, 12)]
    silent = {f"{group}-1-11" for group in io_groups} if first_is_silent else set()
    io = FakeIO(io_groups, silent, late, pieces, v1)
    before, window._PATIENCE, window._LOOK = (window._PATIENCE, window._LOOK), 0.05, 0.0005
    try:
        made = Window(FakeController(io), chips, 0.005)
        rows = np.concatenate(list(made))
    finally:
        window._PATIENCE, window._LOOK = before
    assert set(io.marks.values()) == {f"{group}-1-{12 if first_is_silent else 11}" for group in io_groups}
    for group in io_groups:
        begin, end = io.truth[group][-2:]
        mine = rows[(schema.io_groups_of(rows) == group) & (rows["type" if v1 else "packet_type"] == DATA)]
        assert mine["timestamp"].tolist() == list(range(begin, end))
    assert made.seconds >= 0.005


def test_without_a_chip_that_answers_all_that_comes_counts():
    io = FakeIO([1], {"1-1-11"}, 0, [1])
    before, window._PATIENCE = window._PATIENCE, 0.02
    try:
        rows = np.concatenate(list(Window(FakeController(io), ["1-1-11"], 0.05)))
        assert io.marks == {1 << 8 | 1: ""}
        assert len(rows) > 2
    finally:
        window._PATIENCE = before


@pytest.mark.parametrize("v1", [False, True])
def test_io_channels_that_carry_all_they_can_are_named(v1):
    io = types.SimpleNamespace(carries=lambda lines: [100.0, 20.0, 100.0][: len(lines)])

    def saturated(*rows, seconds=1.0):
        lines = Lines(io, ["1-1-11", "1-1-12", "2-1-11", "3-1-11"])
        for part in rows:
            lines.look(part)
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
