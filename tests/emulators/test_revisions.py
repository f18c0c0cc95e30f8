"""Emulated PACMANs of each hardware revision: registers of the power supplies, and their effects on the chips."""

from __future__ import annotations

import socket
import struct
import time

import numpy as np
import pytest
import zmq
from emulated_board import READ, WRITE, board_register, context, emulator, power_registers, reply_to, subscriber, word
from processes import LIMIT, until

from larpixdaq import emulators
from larpixdaq.emulators import network
from larpixdaq.emulators.board_registers import BoardRegisters, ServerCrashError
from larpixdaq.emulators.chips import TICKS_PER_BIT, EmulatedChips
from larpixdaq.emulators.noise import Channels, Noise
from larpixdaq.emulators.revisions import REVISIONS
from larpixdaq.emulators.tile import EmulatedTile

ID, UP, DOWN = 122, 124, 125


def shifted_mv(value):
    return (value >> 19) * 4


def shifted(ma_per_count):
    return lambda value: ((value >> 16) - (value >> 31 << 16)) * ma_per_count


def plain(value):
    return value


#: Of the last tile of a board: DAC registers (VDDA, VDDD), their counts for 1.8 and 1.2 V, and monitors: register and
#: decoding of its value, VDDA and VDDD in mV, then in mA.
SUPPLIES = {
    "2": (
        1,
        ((0x24011, 54_691), (0x24001, 36_461)),
        ((0x24042, shifted_mv), (0x24032, shifted_mv), (0x24041, shifted(5)), (0x24031, shifted(5))),
    ),
    "3": (
        8,
        ((0x2413E, 46_260), (0x2413F, 30_840)),
        ((0x240E2, shifted_mv), (0x240F2, shifted_mv), (0x240E1, shifted(0.5)), (0x240F1, shifted(0.5))),
    ),
    "4": (
        8,
        ((0x24017, 46_260), (0x24027, 30_840)),
        ((0x24037, plain), (0x24047, plain), (0x24057, lambda s: 0.5 * s), (0x24067, lambda x: (x >> 10) * 0.25)),
    ),
    "5": (
        10,
        ((0x24019, 46_260), (0x24029, 30_840)),
        ((0x24039, plain), (0x24049, plain), (0x24059, lambda x: x / 4), (0x24069, lambda x: x / 4)),
    ),
}
SUPPLIES["3b"], SUPPLIES["4m2"], SUPPLIES["5u32"] = SUPPLIES["3"], SUPPLIES["4"], SUPPLIES["5"]
every_revision = pytest.mark.parametrize("revision", sorted(SUPPLIES))


def registers(revision, **options):
    return BoardRegisters(REVISIONS[revision], **options)


@every_revision
def test_voltages_follow_the_dacs_and_currents_the_chips(revision):
    tiles, dacs, monitors = SUPPLIES[revision]
    board = registers(revision, chips=[0] * (tiles - 1) + [100])
    for register, counts in dacs:
        board.write(register, counts)
    assert [board.read(register) for register, _ in (*dacs, *monitors)] == [0] * 6, "DACs cannot be read; no power"
    if revision != "2":
        board.write(0x14, 1)
    board.write(0x10, 1 << tiles - 1)
    measured = [made_of(board.read(register)) for register, made_of in monitors]
    assert measured == pytest.approx([1800, 1200, 250, 400 * 1.2 / 1.8], rel=0.01)
    board.write(dacs[1][0], dacs[1][1] // 2)
    assert monitors[1][1](board.read(monitors[1][0])) == pytest.approx(600, abs=4)
    board.write(0x10, 0)
    assert [board.read(register) for register, _ in monitors] == [0] * 4


@every_revision
def test_registers_that_distinguish_the_revisions(revision):
    board = registers(revision)
    version = 894 if revision == "4m2" else 0
    assert [board.read(register) for register in range(0, 0x10, 4)] == [version] * 4
    assert [board.read(0x24220), board.read(0x24221)] == ([5, 2] if revision[0] == "5" else [0, 0])


def test_registers_with_special_behaviour():
    rev3, rev4, rev5 = (registers(revision) for revision in ("3", "4", "5"))
    rev3.write(0x24137, 1234)  # VDDD of tile 4
    rev3.write(0x24100, 77)  # on revision 4 a scratch register
    assert [rev3.read(register) for register in (0x24190, 0x24197, 0x24100)] == [77 << 16, 1234 << 16, 0]
    rev3.write(0x241B0, 500)  # all at once
    assert {rev3.read(0x24190 + n) for n in range(16)} == {500 << 16}
    rev4.write(0x24100, 77)
    assert [rev4.read(0x24100), rev4.read(0x24190)] == [77, 0]
    rev5.write(0x25019, 46_260)  # only 12 bits count: VDDA of tile 10
    rev5.write(0x14, 1)
    rev5.write(0x10, 0x3FF)
    assert rev5.read(0x7F039) == 1800
    rev4.write(0x12, 5)  # the lowest two bits do not count, and there are four registers in a bank
    rev4.write(0x20, 6)
    rev4.write(0x1004, 7)
    assert [rev4.read(register) for register in (0x10, 0x13, 0x20, 0x1004)] == [5, 5, 0, 0]
    ratios = {revision: registers(revision).read(0x3010) for revision in REVISIONS}
    assert ratios == {"2": 2, "3": 2, "3b": 10, "4": 10, "4m2": 10, "5": 2, "5u32": 2}
    assert [registers(revision).read(0x7010) for revision in ("2", "5")] == [0, 2], "io_channel 5"


@pytest.mark.parametrize(("revision", "end"), [("3", 0x26000), ("4", 0x25000), ("4m2", 0x25000)])
def test_addresses_past_the_i2c_window_crash_the_server(revision, end):
    board = registers(revision)
    assert board.read(end - 1) == 0
    for access in (board.read, lambda register: board.write(register, 0)):
        with pytest.raises(
            ServerCrashError, match=f"register 0x{end:x} is past the I2C window, which ends at 0x{end:x}"
        ):
            access(end)
    assert registers("2").read(0xFFFFFFFF) == registers("5").read(0xFFFFFFFF) == 0


def test_a_tile_with_too_much_current_and_a_restart():
    board = registers("4", chips=[100], overload={0: 500.0})
    board.switch_on(1, (1.8, 1.2), 2)
    assert [board.read(0x24050) * 0.5, (board.read(0x24060) >> 10) * 0.25] == pytest.approx([750, 600], rel=0.01)
    changes = []
    board.on_change = lambda register, old, new: changes.append((register, new))
    board.write(0x24100, 5)
    board.restart()
    assert (0x10, 0) in changes
    assert [board.read(register) for register in (0x10, 0x14, 0x24030, 0x24100)] == [0] * 4
    assert board.read(0x1014) == 0x100


@pytest.mark.parametrize(("revision", "kinds"), [("4", b"!"), ("5", b"?!")])
def test_the_echo_port_repeats_what_the_command_server_answers(revision, kinds):
    chips = ("--chips", "1", "--revision", revision, "--echo-port", "0")
    with emulator(*chips) as board, context() as ctx:
        echo, command = subscriber(ctx, board.ready["1"]["echo"]), ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{board.ready['1']['command']}")

        def heard():  # a subscription takes a moment
            reply_to(command, board_register(b"R", 0x1014))
            return bool(echo.poll(10))

        until(heard, "a message on the echo port")
        assert echo.recv()[:1] in [kinds[at : at + 1] for at in range(len(kinds))]


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), LIMIT).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it has just ended
        pass
    return False


def test_data_continue_after_the_command_server_has_crashed():
    with emulator("--revision", "4", "--rate", "5000") as board, context() as ctx:
        port = board.ready["1"]["command"]
        command = ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{port}")
        reply_to(command, board_register(b"R", 0x24FFF))
        command.send(board_register(b"R", 0x25000))
        until(lambda: refuses(port), "the end of the server")
        assert subscriber(ctx, board.ready["1"]["data"]).poll(LIMIT * 1000), "no data"
        assert not command.poll(0)
        board.stop()
        assert board.finish()["sent"]["1"]["server_crashes"] == 1
        assert b"io_group 1: command server crashed: register 0x25000 is past the I2C" in board.process.stderr.read()


def test_requests_wait_for_slow_reads():
    """A request waits for the two slow reads of an earlier request; the board's data do not wait."""
    orders = b"".join(struct.pack("<c3xI4xI", b"R", register, 0) for register in (0x24047, 0x24060, 0x24030))
    request = struct.pack("<cIxH", b"?", 0, 3) + orders
    with emulator("--revision", "4", "--slow-read", "0.1", "--rate", "5000") as board, context() as ctx:
        first, second = (ctx.socket(zmq.REQ) for _ in range(2))
        for command in (first, second):
            command.connect(f"tcp://127.0.0.1:{board.ready['1']['command']}")
            reply_to(command, board_register(b"R", 0x24030))
        began = time.monotonic()
        first.send(request)
        assert not first.poll(20)
        second.send(board_register(b"R", 0x10))
        assert second.poll(LIMIT * 1000)
        assert time.monotonic() - began >= 0.2
        assert first.poll(LIMIT * 1000)
    assert REVISIONS["4"].slow_read == 1.0
    slow = {
        revision: [registers(revision).read_seconds(at) for at in (0x24030, 0x24040, 0x24060)] for revision in REVISIONS
    }
    assert slow.pop("5") == slow.pop("5u32") == [0, 0.01, 0.01]
    assert slow == {"2": [0] * 3, "3": [0] * 3, "3b": [0] * 3, "4": [0, 1, 1], "4m2": [0, 1, 1]}


def switched_on(revision, asic="2b", chips=4):
    """Return registers and chips of a board that has just been switched on."""
    board = registers(revision)
    emulated = EmulatedChips(network.tile_wiring(chips), asic)
    tile = EmulatedTile(
        Noise(emulated, Channels(chips, emulated.map.channels, [1]), [2]), seconds=0, tick=0, registers=board
    )
    return board, emulated, tile


@every_revision
def test_chips_have_power_when_all_supplies_and_clocks_are_on(revision):
    """In any order. Chips whose VDDD is off, or below the minimum voltage, lose their configuration.

    Those without VDDA keep it, and their channels see nothing.
    """
    per_volt = 46_260 / 1.8 if revision != "2" else 54_691 / 1.8
    vdda, vddd = {"2": (0x24011, 0x24001), "3": (0x24130, 0x24131)}.get(revision[0], (0x24010, 0x24020))
    on = [(vdda, round(1.8 * per_volt)), (vddd, round(1.2 * per_volt)), (0x10, 0x301)]
    on += [(0x14, 1)] if revision != "2" else []
    board, chips, _ = switched_on(revision)
    for first in range(len(on)):
        assert not chips.alive.any()
        for register, value in on[first:] + on[:first]:
            assert not chips.sensing.any()
            board.write(register, value)
        assert chips.alive.all()
        assert chips.sensing.all()
        chips.registers[:, 64] = 9
        board.write(vddd, round(1.05 * per_volt))
        board.write(vdda, round(1.4 * per_volt))
        assert not chips.sensing.any()
        assert (chips.registers[:, 64] == 9).all()
        board.write(*[(vddd, round(0.9 * per_volt)), (vddd, 0), (0x10, 2), (0x14, 0)][first])
        assert not chips.alive.any()
        for register, value in on:
            board.write(register, value)
        assert chips.sensing.all()
        assert (chips.registers[:, 64] == 255).all()
        assert (chips.registers[:, chips.map.address("chip_id")] == 1).all()
        for register, _ in on:
            board.write(register, 0)


@pytest.mark.parametrize(("revision", "reached"), [("4", [0, 1]), ("4m2", [1]), ("5", [1])])
def test_resets_through_the_board_and_their_tile_masks(revision, reached):
    """Bits from 16 on of register 0x101C mask resets by tile, on revisions with this mask."""
    board, chips, _ = switched_on(revision, chips=200)
    board.switch_on(0b11, (1.8, 1.2), 2)
    board.write(0x14, 1)
    for length, left in ((24, 9), (256, 255)):
        chips.registers[:, 64] = 9
        board.write(0x1014, length)
        board.write(0x101C, 4 | 1 << 16)
        board.write(0x1010, 6)
        board.write(0x1010, 6)
        expected = [left if tile in reached else 9 for tile in (0, 1)]
        assert chips.registers[::100, 64].tolist() == expected
        board.write(0x1010, 2)


@pytest.mark.parametrize("pps", [False, True])
def test_time_stamps_count_from_power_up_or_the_last_reset(pps):
    """They differ from the board's clock by a constant, except on boards that reset both each second."""
    board = registers("5")
    board.switch_on(1, (1.8, 1.2), 2)
    chips = EmulatedChips(network.tile_wiring(4), "2b")
    tile = EmulatedTile(
        Noise(chips, Channels(4, 64, [1]), [2]), seconds=0, tick=1_000_000_000, pps=pps, registers=board
    )
    chips.registers[:, chips.map.address("enable_piso_downstream")] = 15
    chips.registers[:, chips.map.address("external_trigger_mask") :][:, :8] = 0
    chips.registers[:, chips.map.address("enable_hit_veto")] = 0
    chips.changed[:] = 1

    def lag():
        """Of the chips' time stamps behind the board's."""
        board.write(0x2018, 10_000)  # a trigger each 0.1 ms
        board.write(0x2010, 1)
        words = until(lambda: [found] if len(found := tile.take_packets()) else None, "hits")[0]
        board.write(0x2010, 0)
        return tile.receipt - int(words[-1] >> np.uint64(16) & np.uint64(0x7FFFFFFF))

    up = int(chips.clock_start[0])
    assert up >= 1_000_000_000
    before = lag()
    board.write(0x1014, 10)
    board.write(0x1010, 6)
    board.write(0x1010, 2)
    restart = int(chips.clock_start[0])
    after = lag()
    if pps:
        assert max(abs(before), abs(after)) <= 10_000_000
    else:
        late = 200_000_000  # a busy computer generates hits seconds late
        assert up <= before < up + late
        assert restart <= after < restart + late
    assert restart > up


def test_dac_values_of_another_revision_give_no_power():
    """DACs of revision 2 on a board of revision 4: one of them is VDDA of the second tile."""
    board, chips, _ = switched_on("4", chips=200)
    for register, value in ((0x24001, 54_691), (0x24011, 54_691), (0x14, 1), (0x10, 1)):
        board.write(register, value)
    assert not chips.alive.any()
    assert [board.read(0x24030), board.read(0x24031)] == [0, 0]
    board.write(0x10, 3)
    assert board.read(0x24031) == pytest.approx(2128, abs=1)


def test_chips_without_power_send_nothing():
    with emulator("--chips", "4", "--asic", "2b", "--lossless") as board, context() as ctx:
        command = ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{board.ready['1']['command']}")
        read = struct.pack("<cIxH", b"?", 0, 1) + struct.pack("<cB6xQ", b"D", 1, word(READ, 1, 64))
        for register, value in power_registers(1):
            reply_to(command, read)
            reply_to(command, board_register(b"W", register, value))
        reply_to(command, read)
        board.stop()
        assert board.finish()["sent"]["1"]["unheard"] == len(power_registers(1))


def test_chips_on_io_channels_that_the_revision_does_not_have(capsys):
    assert emulators.main(["pacman", "--revision", "2", "--chips", "101"]) == 1
    expected = "101: io_group 1 has chips on io_channel 5, a board of revision 2 has io_channels 1 to 4"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("revision", sorted(REVISIONS))
def test_boards_powered_at_the_start(revision):
    board, _, _ = switched_on(revision)
    board.switch_on(1, (1.8, 1.2), 2)
    emulated = EmulatedChips(network.tile_wiring(4), "2b")
    EmulatedTile(Noise(emulated, Channels(4, 64, [1]), [2]), seconds=0, tick=0, registers=board)
    assert emulated.alive.all()


# --- lines between the board and its chips


def powered_board(revision, asic="2", chips=2, **options):
    """Return registers, chips and tile of a powered board. Its first chip, 11 on io_channel 1, answers."""
    board = registers(revision, **options)
    board.switch_on(1, (1.8, 1.8), TICKS_PER_BIT[asic])
    emulated = EmulatedChips(network.tile_wiring(chips), asic, powered=True)
    tile = EmulatedTile(
        Noise(emulated, Channels(chips, emulated.map.channels, [1]), [2]), seconds=0, tick=0, registers=board
    )
    send(tile, (WRITE, 1, ID, 11), (WRITE, 11, DOWN, 15), (WRITE, 11, UP, 15))
    return board, emulated, tile


def send(tile, *words, io_channel=1):
    """Send words. Returns the answers."""
    sent = np.zeros((len(words), 16), np.uint8)
    sent[:, 0], sent[:, 1] = ord("D"), io_channel
    sent[:, 8:] = np.array([word(*each) for each in words], "<u8").view(np.uint8).reshape(-1, 8)
    tile.transmit(sent)
    return [int(packet) >> 18 & 0xFF for packet in tile.take_packets() if int(packet) & 3 == READ]


def hears(tile):
    """Return whether the first chip takes a word, and whether its answer arrives."""
    chips, before = tile.chips, int(tile.chips.registers[0, 64])
    answers = send(tile, (WRITE, 11, 64, before ^ 1), (READ, 11, ID))
    return int(chips.registers[0, 64]) != before, answers == [11]


@every_revision
def test_lines_at_power_up_and_the_wrong_clock_ratio(revision):
    board, _, tile = powered_board(revision)
    assert hears(tile) == (True, True)
    usual = board.read(0x3010)
    for ratio in (usual + 1, 2 * usual, 0, usual // 2):
        board.write(0x3010, ratio)
        assert hears(tile) == (False, False)
    board.write(0x3010, usual)
    assert hears(tile) == (True, True)
    board.write(0x101C, 8)  # the chips' clock at half its rate; revision 2 does not divide it
    assert hears(tile) == ((True, True) if revision == "2" else (False, False))
    board.write(0x3010, 2 * usual)
    assert hears(tile) == ((False, False) if revision == "2" else (True, True))


@every_revision
def test_inverted_lines(revision):
    board, _, tile = powered_board(revision)
    for value, expected in ((1, (False, True)), (2, (True, False)), (3, (False, False)), (0, (True, True))):
        board.write(0x301C, value)
        # a chip that does not hear sends no answer
        wanted = (expected[0], expected[0] and expected[1])
        assert hears(tile) == ((True, True) if revision == "2" else wanted)
    if revision != "2":
        board, _, tile = powered_board(revision, inverted=True)
        assert board.read(0x301C) == 3
        assert hears(tile) == (True, True)
        board.write(0x301C, 0)
        assert hears(tile) == (False, False)


@pytest.mark.parametrize(
    ("revision", "register", "off", "on"), [("4m2", 0x18, ~1, 1), ("5", 0x201C, 1, ~1), ("4", 0x18, 0, 0)]
)
def test_receivers_that_are_off(revision, register, off, on):
    board, _, tile = powered_board(revision)
    board.write(register, off & 0xFFFFFFFF)
    assert hears(tile) == (True, revision == "4")
    assert registers("4m2").read(0x18) == registers("5").read(0x201C) == 0
    board.write(register, on & 0xFFFFFFFF)
    assert hears(tile) == (True, True)


def test_tile_clocks_of_module_2():
    board, _, tile = powered_board("4m2")
    for value, works in ((0x001, False), (0x101, True), (0x201, True), (0x301, True)):
        board.write(0x10, value)
        assert hears(tile) == (works, works)


def test_chips_with_different_speeds_do_not_hear_each_other():
    """As operators do: first clk_ctrl of the farther chip, then that of the root, then the board's UART."""
    _, chips, tile = powered_board("5")
    board = tile._registers
    clock = chips.map.fields["clk_ctrl"]
    address, slower = clock.low // 8, 1 << clock.low % 8
    send(tile, (WRITE, 1, ID, 12), (WRITE, 12, DOWN, 15))
    assert send(tile, (READ, 12, ID), (READ, 11, ID)) == [12, 11]
    assert send(tile, (WRITE, 12, address, slower), (READ, 12, ID), (READ, 11, ID)) == [11]
    assert send(tile, (WRITE, 11, address, slower), (READ, 12, ID), (READ, 11, ID)) == []
    board.write(0x3010, 4)
    assert send(tile, (READ, 12, ID), (READ, 11, ID)) == [12, 11]


def test_v3_chips_take_ten_megabits_a_second():
    board = registers("5")
    board.switch_on(1, (1.8, 0.9), TICKS_PER_BIT["3"])
    assert [board.read(0x3010), board.uart_line(1).ticks_per_bit] == [1, 1]


def test_words_on_io_channel_255_go_to_all_io_channels():
    _, chips, tile = powered_board("5", chips=100)
    roots = [chip for _, chip, _ in network.tile_wiring(100).entries]
    send(tile, (WRITE, 11, UP, 0))
    send(tile, (WRITE, 1, ID, 99), (WRITE, 99, DOWN, 15), io_channel=255)
    assert chips.chip_ids()[roots].tolist() == [11, 99, 99, 99]
    before = tile.chips.counts()["unheard"]
    assert send(tile, (READ, 99, 64), (READ, 11, ID), io_channel=255) == [255, 255, 255, 11]
    assert tile.chips.counts()["unheard"] == before + 4
