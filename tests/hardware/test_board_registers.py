"""Registers of PACMAN boards by name and address, receivers and inversion of UARTs, triggers; on models of servers."""

import pytest
from pacman_server_models import MODELS, Boards, Crash

from larpixdaq.constants import HARDWARE_ACTIONS, HARDWARE_QUERIES, QUERIES
from larpixdaq.errors import RequestError
from larpixdaq.hardware.actions import BoardActions
from larpixdaq.hardware.board_setup import RegisterActions
from larpixdaq.hardware.pacman_registers import REVISIONS, fault_of, names
from larpixdaq.hardware.power import no_progress
from larpixdaq.hardware.producer_link import BoardError


def board(revision, configured=None, *, firmware=0):
    model = MODELS[revision](firmware)
    link = Boards({1: model}, {1: revision if configured is None else configured})
    return model, RegisterActions(link, link.invalidate), link


def test_only_reading_needs_no_control_and_writing_is_audited():
    """The core notes all actions that are no queries in the audit."""
    assert {"read_board", "write_board", "set_uarts", "set_trigger"} <= set(HARDWARE_ACTIONS)
    assert "read_board" in HARDWARE_QUERIES
    assert not {"write_board", "set_uarts", "set_trigger"} & QUERIES


@pytest.mark.parametrize("revision", [2, 3, 4, 5])
def test_a_register_is_found_by_name_and_by_address(revision):
    model, actions, _ = board(revision)
    (row,) = actions.write_board({"uart_2_clock_ratio": 5})
    assert row == {
        "io_group": 1, "register": "uart_2_clock_ratio", "address": "0x4010", "value": 5, "hex": "0x5",
        "read_back": True,
    }  # fmt: skip
    assert model.fpga[0x4010] == 5
    by_address = actions.read_board([0x4010, "0x1014", "reset_cycles"])
    assert [(found["register"], found["value"]) for found in by_address] == [
        ("uart_2_clock_ratio", 5), ("reset_cycles", 256)
    ]  # fmt: skip
    everything = {row["register"]: row["value"] for row in actions.read_board()}
    assert everything["uart_2_clock_ratio"] == 5
    assert everything["heartbeat_cycles"] == 10**9
    assert not any(name.endswith("_dac") for name in everything), "without names only registers of the FPGA"


@pytest.mark.parametrize("revision", [2, 3, 4, 5])
def test_every_name_can_be_read_and_no_address_crashes_a_server(revision):
    model, actions, _ = board(revision)
    every = names(REVISIONS[revision], 0)
    assert len(set(every.values())) == len(every)
    rows = actions.read_board(list(every))
    assert [row["register"] for row in rows] == list(every)
    for address in [*range(0x23000, 0x27000), 0x7FFFFFFF, 0xFFFFFFFF]:
        if fault_of(address, REVISIONS[revision], writing=False) is None:
            model.word(b"R" + bytes(3) + address.to_bytes(4, "little") + bytes(8))
            assert fault_of(address, None, writing=True) is not None, "without a revision no supply is set"


@pytest.mark.parametrize(
    ("revision", "address", "says"),
    [
        (3, 0x26000, "register 0x26000: the board's registers end at 0x25fff; a request beyond can crash its server"),
        (4, 0x25000, "register 0x25000: the board's registers end at 0x24fff; a request beyond can crash its server"),
        (5, 0x25000, "register 0x25000: the board's registers end at 0x24fff"),
        (2, 0x7010, "register 0x7010: the board's FPGA has no registers from 0x7000 to 0x23fff"),
        (4, 0x23010, "register 0x23010: the board's FPGA has no registers from 0x23000 to 0x23fff"),
        (4, 0x12, "register 0x12: registers of the FPGA are at multiples of 4, and this would be 0x10"),
        (4, "0x25000", "register 0x25000: the board's registers end"),
        (4, "trigger_mas", "no register 'trigger_mas'; did you mean trigger_mask?"),
        (4, "tile_8_vdda_dac", "no register 'tile_8_vdda_dac'"),
        (4, True, "address of a register: expected a whole number from 0"),
        (4, -4, "address of a register: expected a whole number from 0"),
        (4, "0xzz", "no register '0xzz'"),
    ],
)
def test_addresses_that_harm_a_board_are_refused_before_anything_is_sent(revision, address, says):
    model, actions, _ = board(revision)
    for ask in (lambda: actions.read_board([address]), lambda: actions.write_board({"tiles": 1, address: 1})):
        with pytest.raises(RequestError, match="PACMAN io_group 1: ") as raised:
            ask()
        assert says in str(raised.value)
    assert model.writes == []


def test_wrong_values_and_read_only_registers_are_refused():
    model, actions, _ = board(4)
    for values, says in (
        ({}, "write_board: expected {register name or address: value}"),
        ({"tiles": 1 << 32}, "register tiles: expected a whole number from 0 to 4294967295"),
        ({"tiles": 1.5}, "register tiles: expected a whole number"),
        ({"clock_ticks": 1}, "register 0x1004: it cannot be written"),
        ({"tiles": 1, 0x10: 2}, "register tiles (0x10) twice"),
    ):
        with pytest.raises(RequestError) as raised:
            actions.write_board(values)
        assert says in str(raised.value)
    assert model.writes == []


def test_a_register_that_reads_back_another_value_is_named():
    model, actions, _ = board(4)
    model.stuck = {0x2014: 0}
    with pytest.raises(BoardError, match=r"trigger_mask \(0x2014\): set to 0xff, reads back 0x0"):
        actions.write_board({"trigger_mask": 0xFF, "reset_cycles": 24})


def test_supplies_are_written_only_with_a_known_revision_and_forget_the_chips():
    model, actions, link = board(4)
    (row,) = actions.write_board({"tile_3_vdda_dac": 1000})
    assert (row["address"], row["read_back"]) == ("0x24013", False)
    assert model.dac["A", 3] == 1000
    assert link.invalidated == [1]
    model, actions, _ = board(4, 0)
    for register in ("0x24013", 0x24013):
        with pytest.raises(RequestError, match="revision is not known"):
            actions.write_board({register: 1000})
    assert model.writes == []
    actions.read_board(["0x24013"])


def test_boards_of_different_revisions_have_their_own_addresses():
    models = {1: MODELS[3](), 2: MODELS[4]()}
    link = Boards(models, {1: 3, 2: 4})
    rows = RegisterActions(link, link.invalidate).write_board({"tile_1_vddd_dac": 77})
    assert [(row["io_group"], row["address"]) for row in rows] == [(1, "0x24133"), (2, "0x24021")]


def test_the_lines_of_uarts_are_inverted():
    model, actions, _ = board(4)
    rows = actions.set_uarts([5, 6], inverted=True)
    assert [(row["address"], row["value"]) for row in rows] == [("0x701c", 3), ("0x801c", 3)]
    actions.set_uarts(5, inverted=False)
    assert (model.fpga[0x701C], model.fpga[0x801C]) == (0, 3)
    model, actions, _ = board(2)
    with pytest.raises(RequestError, match="inverted: boards of revision 2 cannot invert"):
        actions.set_uarts(inverted=True)
    assert model.writes == []


def test_receivers_are_switched_where_a_board_has_a_register_for_them():
    model, actions, _ = board(4, firmware=894)
    actions.set_uarts([1, 32], receive=True)
    actions.set_uarts(1, receive=False)
    assert model.fpga[0x18] == 1 << 31
    model, actions, _ = board(5)
    actions.set_uarts([1, 2, 32], receive=False)  # a bit that is set switches a receiver off
    actions.set_uarts(2, receive=True)
    assert model.fpga[0x201C] == 1 << 31 | 1
    with pytest.raises(RequestError, match="has a bit for io_channels 1 to 32, found 33: name the io_channels"):
        actions.set_uarts(receive=True)
    for revision in (2, 3, 4):
        _, actions, _ = board(revision)
        with pytest.raises(RequestError, match="its receivers are always on"):
            actions.set_uarts(1, receive=True)


def test_a_board_of_revision_5_with_32_uarts_numbers_them_without_gaps():
    model = MODELS[5]()
    link = Boards({1: model}, {1: 5}, uarts=32)
    actions = BoardActions(link, link.invalidate, no_progress)
    every = [io_channel for io_channel in range(1, 41) if io_channel <= 8 or io_channel % 4]
    assert list(map(int, actions.set_uart_clock(4)["io_groups"]["1"])) == every
    ratios = {register: value for register, value in model.writes if value == 4}
    assert sorted(ratios) == [0x2010 + 0x1000 * uart for uart in range(1, 33)]
    assert actions.set_uart_clock(2, io_channel=13)["io_groups"] == {"1": {"13": 2}}
    assert model.fpga[0x2010 + 0x1000 * 12] == 2  # io_channel 13 has UART 12
    with pytest.raises(RequestError, match="UART registers of 1 to 39, without 12, 16, 20 and so on, found 12"):
        actions.set_uart_clock(2, io_channel=12)
    registers = RegisterActions(link, link.invalidate)
    registers.set_uarts([13, 39], receive=False)
    assert model.fpga[0x201C] == 1 << 11 | 1 << 31
    assert registers.read_board("uart_39_inversion")[0]["address"] == "0x2201c"
    assert actions.orders.capacity([(1, 13), (1, 12)]) == pytest.approx([5e6 / 66] * 2)
    assert not any(model.dac.values())


def test_triggers_have_a_period_and_tiles_that_get_them():
    model, actions, _ = board(4)
    model.fpga[0x2010] = 4  # length at power-up
    actions.set_trigger(period=0.01, tiles=[0, 2])
    assert (model.fpga[0x2010], model.fpga[0x2018]) == (5, 1_000_000)
    assert model.fpga[0x2014] == 0xFAFAFAFA, "a set bit keeps a trigger from a tile"
    actions.set_trigger(tiles=[1], trigger=1)
    assert model.fpga[0x2014] == 0xFAFAFDFA
    actions.set_trigger(period=0, tiles=[])
    assert (model.fpga[0x2010], model.fpga[0x2014]) == (4, 0xFFFFFFFF)
    with pytest.raises(RequestError, match="triggers have a mask bit for tiles 0 to 7, found 8"):
        actions.set_trigger(tiles=8)


@pytest.mark.parametrize(
    ("action", "params", "says"),
    [
        ("set_uarts", {}, "expected receive or inverted"),
        ("set_uarts", {"receive": 1}, "receive: expected True or False, found 1"),
        ("set_uarts", {"io_channel": 41, "inverted": True}, "io_channel: expected a whole number from 1 to 40"),
        ("set_uarts", {"io_channel": 33, "inverted": True}, "have UART registers of 1 to 32, found 33"),
        ("set_trigger", {}, "expected period (seconds, 0: off) or tiles"),
        ("set_trigger", {"period": 1e-9}, "period: expected 0 (off) or 1e-06 to 42.9 s"),
        ("set_trigger", {"period": float("nan")}, "period: expected 0 (off)"),
        ("set_trigger", {"period": "1"}, "period: expected 0 (off)"),
        ("set_trigger", {"period": 1.0, "trigger": 0}, "trigger: only with tiles"),
        ("set_trigger", {"tiles": 0, "trigger": 4}, "trigger: expected a whole number from 0 to 3"),
    ],
)
def test_wrong_arguments_of_uarts_and_triggers_are_refused_before_anything_is_written(action, params, says):
    model, actions, _ = board(4)
    with pytest.raises(RequestError) as raised:
        getattr(actions, action)(**params)
    assert says in str(raised.value)
    assert model.writes == []


def test_the_models_crash_where_the_registers_end():
    for revision, end in ((3, 0x26000), (4, 0x25000)):
        with pytest.raises(Crash):
            MODELS[revision]().word(b"R" + bytes(3) + end.to_bytes(4, "little") + bytes(8))
