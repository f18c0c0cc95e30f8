"""The tracked register values of chips, against a plain dictionary of the words that were sent and received."""

import contextlib

import numpy as np
import pytest
from example_counts import examples
from file_builder import ASIC, CLOCK64, V1, V2, V3
from hypothesis import given, settings
from hypothesis import strategies as st

from larpixdaq._native import word_codec
from larpixdaq.errors import ProtocolError
from larpixdaq.hardware.register_map import words
from larpixdaq.protocol.stream import READ, REGISTERS, SENT, Configs, Configurations, unpack_configurations
from larpixdaq.readout.command_queue import sent_rows
from larpixdaq.readout.configuration_tracker import ConfigurationTracker
from larpixdaq.schema import PacketType

CHIPS = [(1, 1, 2), (1, 1, 3), (1, 2, 2), (2, 1, 2), (2, 1, 254)]
REGISTER = st.integers(0, 3).map(lambda n: n * 20)
STEP = st.tuples(
    st.sampled_from(["sent", "answer", "wrong parity", "read request"]),
    st.lists(st.tuples(st.sampled_from(CHIPS), REGISTER, st.integers(0, 2)), min_size=1, max_size=6),
)
RESET = st.tuples(st.just("reset"), st.sampled_from([[1], [2], [1, 2]]))
BROADCAST = st.tuples(st.just("broadcast"), st.tuples(st.sampled_from([(1, 1), (2, 1)]), REGISTER, st.integers(0, 2)))


def rows_of(kind, layout, steps, direction):
    """The rows of words, board after board as in a producer, each board's in the order of the steps."""
    found = []
    for group in sorted({chip[0] for chip, _, _ in steps}):
        mine = [step for step in steps if step[0][0] == group]
        ids, registers, values = (np.array(part) for part in zip(*[(c[2], r, v) for c, r, v in mine], strict=True))
        made = words(ASIC[layout], kind, ids, registers, values)
        channels = np.array([chip[1] for chip, _, _ in mine], np.uint8)
        if direction == 0:
            found.append(sent_rows(made, channels, group, ASIC[layout], layout))
            continue
        for word, channel in zip(made, channels.tolist(), strict=True):
            rows = np.zeros(1, layout.dtype)
            word_codec.decode(
                np.array([word]), rows, asic=ASIC[layout], io_group=group, io_channel=channel, direction=1
            )
            found.append(rows)
    return np.concatenate(found)


@settings(max_examples=examples(150))
@given(st.sampled_from([V1, V2, CLOCK64, V3]), st.lists(STEP | RESET | BROADCAST, max_size=12), st.data())
def test_the_values_last_sent_and_last_read_are_known(layout, steps, data):
    tracker = ConfigurationTracker("2")
    tracker.set_chips(np.array(CHIPS, np.uint8))
    sent, read, reported = {}, {}, {}
    for kind, about in steps:
        if kind == "reset":
            tracker.invalidate(about)
            sent = {at: value for at, value in sent.items() if at[0][0] not in about}
            read = {at: value for at, value in read.items() if at[0][0] not in about}
        elif kind == "broadcast":
            line, register, value = about
            if layout is V1:
                continue
            tracker.record_sent(rows_of(PacketType.CONFIG_WRITE, layout, [((*line, 255), register, value)], 0))
            for chip in CHIPS:
                if chip[:2] == line:
                    note_sent(sent, read, chip, register, value)
        elif kind == "sent":
            about = [one for n, one in enumerate(about) if one[:2] not in [other[:2] for other in about[:n]]]
            tracker.record_sent(rows_of(PacketType.CONFIG_WRITE, layout, about, 0))
            for chip, register, value in about:
                note_sent(sent, read, chip, register, value)
        elif kind == "read request":
            tracker.record_sent(rows_of(PacketType.CONFIG_READ, layout, about, 0))
        else:
            rows = rows_of(PacketType.CONFIG_READ, layout, about, 1)
            if kind == "wrong parity":
                rows["valid_parity"] = 0
            else:
                read.update({(chip, register): value for chip, register, value in about})
            tracker.record_answers(rows)
        if data.draw(st.booleans()):
            changed = {chip for chip in CHIPS if known_of(sent, read, chip) != reported.get(chip, ({}, {}))}
            changes = tracker.changes()
            assert {tuple(chip) for chip in changes.chips.tolist()} >= changed
            tracker.mark_reported()
            assert not len(tracker.changes().chips)
            reported = {chip: known_of(sent, read, chip) for chip in CHIPS}
    found = tracker.configurations()
    assert [tuple(chip) for chip in found.chips.tolist()] == CHIPS
    for place, chip in enumerate(CHIPS):
        sent_values = {r: int(found.sent[place, r]) for r in np.flatnonzero(found.known[place] & SENT).tolist()}
        read_values = {r: int(found.read[place, r]) for r in np.flatnonzero(found.known[place] & READ).tolist()}
        assert (sent_values, read_values) == known_of(sent, read, chip)
    differ = {(chip, r) for chip, r in sent if (chip, r) in read and read[chip, r] != sent[chip, r]}
    assert int(found.different.sum()) == len(differ)


def note_sent(sent, read, chip, register, value):
    sent[chip, register] = value
    if read.get((chip, register), value) != value:
        del read[chip, register]  # the register may have the new value now


def known_of(sent, read, chip):
    return ({r: v for (c, r), v in sent.items() if c == chip}, {r: v for (c, r), v in read.items() if c == chip})


def test_ids_that_no_chip_has_are_not_among_the_chips():
    tracker = ConfigurationTracker("2")
    tracker.record_sent(rows_of(PacketType.CONFIG_WRITE, V2, [((1, 1, 1), 122, 11), ((1, 1, 11), 64, 30)], 0))
    assert not len(tracker.configurations().chips)
    tracker.set_chips(np.array([(1, 1, 11)], np.uint8))
    assert tracker.configurations().chips.tolist() == [[1, 1, 11]]
    assert tracker.configurations().text() == "Configuration of chip 1-1-11: 1 registers sent, 0 read back, 0 different"


@given(st.integers(1, 600), st.integers(0, 1 << 32))
def test_blocks_carry_configurations_of_any_number_of_chips(n, seed):
    rng = np.random.default_rng(seed)
    arrays = rng.integers(0, 4, (3, n, REGISTERS), np.uint8)
    made = Configurations("2b", rng.integers(0, 256, (n, 3), np.uint8), *arrays)
    pieces = [unpack_configurations(piece.pack()) for piece in made.pieces()]
    for field in range(1, 5):
        np.testing.assert_array_equal(np.concatenate([piece[field] for piece in pieces]), made[field])
    assert {piece.asic for piece in pieces} == {"2b"}


@given(st.binary(max_size=30), st.binary(max_size=200) | st.just(Configurations("", *[np.zeros((9, 256), "u1")] * 4)))
def test_bytes_that_are_no_configuration_are_refused(chips, registers):
    packed = registers if isinstance(registers, bytes) else registers.pack().registers
    if len(chips) == 27:
        chips = b""
    with pytest.raises(ProtocolError, match="configurations: "):
        unpack_configurations(Configs("2", chips, packed))


def test_no_more_is_unpacked_than_the_chips_need():
    many = Configurations("", *[np.zeros((256, REGISTERS), np.uint8)] * 4).pack()
    with pytest.raises(ProtocolError, match="expected 768 bytes for 1 chips"):
        unpack_configurations(Configs("2", bytes(3), many.registers))


def test_cut_and_changed_configurations_are_refused():
    """Also when all registers came out before the damage: the checksum comes last."""
    rng = np.random.default_rng(1)
    made = Configurations("2", np.zeros((1, 3), np.uint8), *rng.integers(0, 9, (3, 1, REGISTERS), np.uint8))
    registers = made.pack().registers
    for size in range(len(registers)):
        with pytest.raises(ProtocolError, match="configurations: "):
            unpack_configurations(Configs("2", bytes(3), registers[:size]))
    for at in range(len(registers)):
        changed = registers[:at] + bytes([registers[at] ^ 16]) + registers[at + 1 :]
        with contextlib.suppress(ProtocolError):  # a few bits behind the data have no meaning
            np.testing.assert_equal(unpack_configurations(Configs("2", bytes(3), changed)), made)
