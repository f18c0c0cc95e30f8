"""The queue of commands to boards, in any order of requests, answers, failures and full rings."""

from collections import deque

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from larpixdaq.hardware.register_map import words
from larpixdaq.readout.command_queue import CommandQueue, sent_rows
from larpixdaq.schema import Asic, PacketType, layout_of
from larpixdaq.sources.command_channel import BoardReply

V2 = layout_of(Asic.V2)


class BoardChannel:
    """A command channel that answers when the test calls for it."""

    sockets = ()
    batch = 3

    def __init__(self, io_group):
        self.io_group, self.name, self.kind = io_group, f"board {io_group}", "pacman"
        self.busy = False
        self.reply = None
        self.abandoned = False  # the sender of the request in flight has died
        self.log = []  # everything that was sent

    def send_words(self, io_channels, sent):
        assert not self.busy
        assert 0 < len(sent) == len(io_channels) <= self.batch
        self.busy = True
        self.log += zip(io_channels.tolist(), sent.tolist(), strict=True)

    def send_raw(self, body, seconds=0.0):
        assert not self.busy
        self.busy = True
        self.log.append(body)

    def take(self):
        if self.reply is None:
            return None
        reply, self.reply, self.busy = self.reply, None, False
        return reply

    def due(self):
        return 1.0 if self.busy else None


class Commands(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.boards = {1: BoardChannel(1), 2: BoardChannel(2)}
        self.room = 100
        self.rows = []
        self.done = []
        self.expected = {1: deque(), 2: deque()}  # not yet sent or answered, per board
        self.number = 0
        self.commands = CommandQueue(self.boards.values(), Asic.V2, V2, self.record)

    def done_of(self, number):
        return lambda *outcome: self.done.append((number, *outcome))

    def record(self, rows, io_group):
        n = min(self.room, len(rows))
        self.room -= n
        self.rows += [(io_group, *row) for row in rows[:n][["io_channel", "register_address", "direction"]].tolist()]
        return n

    @rule(io_group=st.integers(1, 3), addresses=st.lists(st.integers(0, 255), max_size=8))
    def words(self, io_group, addresses):
        self.number += 1
        made = words(Asic.V2, PacketType.CONFIG_READ, 5, addresses)
        channels = np.arange(len(made), dtype=np.uint8)
        self.commands.send_words(io_group, channels.tobytes(), made.tobytes(), self.done_of(self.number))
        if io_group == 3:
            assert self.done.pop() == (self.number, b"", "io_group 3 takes no commands; those that do: 1, 2")
        else:
            self.expected[io_group].append((self.number, list(zip(channels.tolist(), made.tolist(), strict=True))))

    @rule(io_group=st.integers(1, 2))
    def order(self, io_group):
        self.number += 1
        self.commands.send_order(io_group, b"%d" % self.number, self.done_of(self.number))
        self.expected[io_group].append((self.number, [b"%d" % self.number]))

    @rule()
    def work(self):
        self.commands.work()

    @rule(room=st.integers(0, 20))
    def free(self, room):
        self.room += room

    @rule(io_group=st.integers(1, 2), fail=st.booleans())
    def answer(self, io_group, fail):
        board = self.boards[io_group]
        if not board.busy or board.reply is not None:
            return
        abandoned, board.abandoned = board.abandoned, False
        board.reply = BoardReply(b"", "no answer") if fail else BoardReply(b"said")
        if fail and not abandoned:  # the command ends, and its words that were sent stay sent
            number, parts = self.expected[io_group][0]
            self.expected[io_group][0] = (number, [part for part in parts if part in board.log])

    @rule()
    def child_dies(self):
        self.commands.clear()
        for board in self.boards.values():
            board.log.clear()
            board.abandoned = board.busy and board.reply is None
        self.rows.clear()
        self.done.clear()
        self.expected = {1: deque(), 2: deque()}

    @invariant()
    def each_command_is_done_once_in_order(self):
        for number, _, _ in self.done:
            io_group = next(g for g, waiting in self.expected.items() if waiting and waiting[0][0] == number)
            self.expected[io_group].popleft()
        self.done.clear()

    @invariant()
    def every_sent_word_has_its_row(self):
        sent = [part for board in self.boards.values() for part in board.log if isinstance(part, tuple)]
        assert sorted((channel, word >> 10 & 255) for channel, word in sent) == sorted(row[1:3] for row in self.rows)
        assert all(row[3] == 0 for row in self.rows)


TestCommands = Commands.TestCase


def test_a_request_with_invalid_words_is_refused():
    """A word of type 0 is none of LArPix v3."""
    board, outcomes = BoardChannel(1), []
    commands = CommandQueue([board], Asic.V3, layout_of(Asic.V3), lambda rows, io_group: len(rows))
    sent = np.concatenate([words(Asic.V3, PacketType.CONFIG_READ, 5, [1, 2]), np.zeros(1, np.uint64)])
    commands.send_words(1, bytes(3), sent.tobytes(), lambda *outcome: outcomes.append(outcome))
    commands.work()
    assert outcomes == [(b"", "board 1: 1 words are not valid for these chips")]
    assert not board.log


@given(
    asic=st.sampled_from([Asic.V1, Asic.V2, Asic.V2_DIAGNOSTICS, Asic.V3]),
    sent=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255)), max_size=20),
)
def test_rows_of_sent_words_have_their_addresses_and_registers(asic, sent):
    channels = np.array([io_channel for io_channel, _, _ in sent], np.uint8)
    made = words(asic, PacketType.CONFIG_READ, [chip_id for _, chip_id, _ in sent], [address for _, _, address in sent])
    rows = sent_rows(made, channels, 7, asic, layout_of(asic))
    v1 = asic == Asic.V1
    assert rows["register" if v1 else "register_address"].tolist() == [address for _, _, address in sent]
    assert (rows["direction"] == 0).all()
    assert (rows["valid_parity"] == 1).all()
    if v1:
        assert rows["chip_key"].tolist() == [b"7-%d-%d" % (io_channel, chip_id) for io_channel, chip_id, _ in sent]
    else:
        assert rows["io_channel"].tolist() == channels.tolist()
        assert (rows["io_group"] == 7).all()
