"""Emulated serial board: larpix-control's SerialPort and SerialSource at its pseudo-terminal."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from emulated_board import SerialEmulator
from hypothesis import given
from hypothesis import strategies as st
from larpix import Controller, Packet_v1
from larpix.io import SerialPort, serialport
from processes import until
from source_driver import Driver

from larpixdaq import emulators
from larpixdaq.emulators import network as chip_network
from larpixdaq.emulators.chips import EmulatedChips
from larpixdaq.emulators.noise import Channels, Noise
from larpixdaq.emulators.serial_board import Frames, SerialBoard
from larpixdaq.emulators.tile import EmulatedTile
from larpixdaq.schema import Asic
from larpixdaq.sources.serial import SerialSource


@pytest.fixture
def serial():
    boards = []

    def start(*args):
        boards.append(SerialEmulator(*args))
        return boards[-1]

    yield start
    for board in boards:
        board.close()


@pytest.fixture
def control():
    """Return a Controller at a device, and close its port at the end."""
    controllers = []

    def start(device):
        controllers.append(Controller())
        controllers[-1].io = SerialPort(device)
        return controllers[-1]

    yield start
    for controller in controllers:
        controller.io.serial_com.close()


@pytest.fixture
def v1_port(monkeypatch):
    """Let larpix-control send and read v1 packets as its version 2.3 did; 3 sends nine bytes and reads all as v2."""
    monkeypatch.setattr(
        SerialPort, "_format_UART", staticmethod(lambda packet: b"s" + packet.bytes().ljust(8, b"\0") + b"q")
    )
    monkeypatch.setattr(serialport, "Packet", lambda data: Packet_v1(data[:7]))


def quiet(controller, register):
    for key in controller.chips:
        controller.write_configuration(key, register)


def test_v1_chips_with_larpix_control(serial, control, v1_port):
    """Every register of every chip, before and after writes; a reset of the board resets the chips."""
    board = serial()
    controller = control(board.device)
    controller.load("controller/pcb-1_chip_info.json")
    for chip in controller.chips.values():
        chip.config.global_threshold = 255
    quiet(controller, 32)

    def differences(*keys):
        """Read once, after the timeout: a busy computer may need several attempts."""
        return controller.verify_configuration(list(keys) or None, timeout=0.3)[1]

    until(lambda: differences() == {}, "all registers of all chips")
    key = list(controller.chips)[2]
    changed = {*range(16), *range(17, 32), 60, 61, 62}
    controller[key].config.pixel_trim_thresholds = list(range(32))
    controller[key].config.reset_cycles = 0x123456
    until(lambda: set(differences(key).get(key, ())) == changed, "the changed registers")
    controller.write_configuration(key)
    until(lambda: differences(key) == {}, "the written registers")
    controller.io.larpix_reset()
    quiet(controller, 32)
    until(lambda: set(differences(key).get(key, ())) == changed, "the registers after the reset")
    board.stop()
    sent = board.finish()["sent"]["1"]
    assert sent["commands"] == 1
    assert sent["skipped_bytes"] == sent["unheard"] == sent["refused"] == 0
    assert sent["D"] >= 4 * 63 + 3 * 63


def test_v2_chips_with_larpix_control(serial, control, tmp_path):
    network = tmp_path / "net.json"
    board = serial("--chips", "6", "--asic", "2b", "--write-network", str(network), "--dead-chips", "1-1-16")
    controller = control(board.device)
    controller.load(str(network))
    controller.init_network(1, 1)
    ok, different = controller.verify_network()
    assert not ok
    assert [str(key) for key in different] == ["1-1-16"]
    # It reads once, after the timeout, and a terminal keeps 4 kB: the registers of one chip. A busy computer may need
    # more time.
    for key in list(controller.chips)[:5]:
        until(
            lambda key=key: controller.verify_configuration(key, timeout=0.5) == (True, {}), f"the registers of {key}"
        )


def test_the_source_reads_all_sent_frames(serial):
    """v1 chips are noisy at power-up: all frames arrive, no faster than the line carries them."""
    board = serial("--seed", "3")
    source = SerialSource(board.device, asic=Asic.V1)
    source.open()
    try:
        driver = Driver(source)
        began = time.monotonic()
        driver.until(lambda: driver.n > 5000, "noise")
        assert time.monotonic() - began > 0.4
        board.stop()
        sent = board.finish()["sent"]["1"]
        driver.until(lambda: driver.count("words_in") >= sent["D"], "the last frame")
    finally:
        source.close()
    rows = driver.rows[driver.rows["type"] == 0]
    assert len(rows) == sent["D"] == driver.count("words_in")
    assert rows["valid_parity"].all()
    assert set(rows["chipid"].tolist()) == {246, 245, 252, 243}
    assert set(rows["channel"].tolist()) == set(range(32))
    assert sent["crowded"] > 0


@given(st.binary(max_size=60), st.lists(st.integers(0, 60)), st.lists(st.binary(min_size=8, max_size=8), max_size=4))
def test_frames_in_parts_of_any_size(garbage, cuts, words):
    data = garbage + b"".join(b"s" + word + b"q" for word in words)
    whole, pieces = Frames(), Frames()
    expected = list(whole.feed(data))
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    got = [frame for a, b in pairwise(bounds) for frame in pieces.feed(data[a:b])]
    assert got == expected
    assert pieces.skipped == whole.skipped
    if not garbage:
        assert got == [b"s" + word + b"q" for word in words]


@pytest.mark.parametrize("asic", ["1", "2"])
def test_clock_ratio_and_length_of_resets(asic):
    """A reset has 128 ticks by default, which keep the registers of v2 chips. Chips hear nothing at another speed."""
    wiring_ = chip_network.tile_wiring(1, channels=1) if asic == "2" else chip_network.Wiring([(1, 1)])
    chips = EmulatedChips(wiring_, asic, powered=True)
    tile = EmulatedTile(
        Noise(chips, Channels(1, chips.map.channels, [1]), [2]), seconds=0, tick=0, heartbeat=0, carries=1000
    )
    board = SerialBoard(tile, None)
    address = {"1": 32, "2": 64}[asic]

    def write(value):
        bare = 2 | 1 << 2 | address << 10 | value << 18
        board.receive(b"s" + bare.to_bytes(8, "little") + b"q")
        return int(chips.registers[0, address])

    def command(number, value=0):
        board.receive(b"c" + bytes([number, value, *bytes(6)]) + b"q")

    usual = int(chips.map.defaults[address])
    assert write(9) == 9
    command(2)
    assert chips.registers[0, address] == (usual if asic == "1" else 9)
    command(1, 255)
    command(2)
    assert chips.registers[0, address] == usual
    command(0, 4)
    assert write(9) == usual
    command(0, 2)
    assert write(9) == 9


def test_wrong_options(capsys, tmp_path):
    assert emulators.main(["serial", "--baud", "0"]) == 2
    assert "--baud: expected a positive number, found 0" in capsys.readouterr().err
    two = {"_config_type": "controller", "name": "x", "asic_version": 1, "chip_list": ["1-1-2", "2-1-3"]}
    (tmp_path / "two.json").write_text(json.dumps(two))
    assert emulators.main(["serial", "--chips", str(tmp_path / "two.json")]) == 1
    assert "a serial line has one io_group, found [1, 2]" in capsys.readouterr().err
