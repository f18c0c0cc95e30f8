"""Chips and boards that answer twice, wrongly, or never; commands beside a stream of data; other kinds of boards."""

import itertools
import json
import os
import pty
import select
import threading
import tty
from contextlib import closing

import numpy as np
import pytest
import zmq
from emulated_board import Emulator
from example_counts import examples
from larpix import Controller
from larpix.io import PACMAN_IO
from misbehaving_board import AnsweringBoard
from msgspec import structs
from processes import LIMIT
from system import rows_of

from larpixdaq.errors import RequestError
from larpixdaq.hardware.actions import ChipActions
from larpixdaq.hardware.chip_state import ChipState
from larpixdaq.hardware.power import no_progress
from larpixdaq.hardware.producer_link import ProducerPipe
from larpixdaq.hardware.register_io import RegisterAnswers
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.protocol.hardware import BoardInfo, Setup
from larpixdaq.protocol.stream import REGISTERS

SLOW = 60.0


def board_file(folder, keys, asic=2):
    """Write a board file of larpix-control with chips in a row behind the board."""
    path = folder / "board.json"
    network = {"miso_uart_map": [3, 0, 1, 2], "mosi_uart_map": [0, 1, 2, 3], "usds_link_map": [2, 3, 0, 1]}
    chips = [{"chip_id": key} for key in keys]
    for first, after in itertools.pairwise(chips):
        first["miso_us"] = [None, None, None, after["chip_id"]]
    first = {"chip_id": "ext", "root": True, "miso_us": [None, None, None, keys[0]]}
    network["1"] = {"1": {"nodes": [first, *chips]}}
    path.write_text(
        json.dumps(
            {"_config_type": "controller", "name": "row", "asic_version": asic, "layout": None, "network": network}
        )
    )
    return str(path)


def test_bad_answers_are_reported_by_chip_and_register(tmp_path, line):
    """Chip 2 works; 3 is silent; 4 answers a register twice, 5 with two values; 6 loses answers; 7 has wrong parity."""
    asked = {}

    def answers(channel, chip, address, value):
        asked[chip, address] = asked.get((chip, address), 0) + 1
        if chip == 3:
            return []
        if chip == 4 and address == 64:
            return [value, value]
        if chip == 5 and address == 65:
            return [value, value ^ 1]
        if chip == 6 and address == 66:
            return [] if asked[chip, address] < 3 else [value]
        if chip == 7 and address == 67:
            return [value + 256]
        return [value]

    with closing(AnsweringBoard(answers)) as board:
        operator = line.start("--pacman", f"127.0.0.1:{board.data_port}:{board.command_port}")
        operator.load_board(board_file(tmp_path, [2, 3, 4, 5, 6, 7])).result(LIMIT)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        operator.write_configuration().result(LIMIT)
        result = operator.validate_configuration().result(SLOW)
        assert not result["ok"]
        assert result["silent"] == ["1-1-3"]
        names = ChipRegisters("2")
        assert result["answered_twice"] == ["1-1-4 threshold_global", f"1-1-5 {names.name(65)}"]
        assert result["contradicting"] == [f"1-1-5 {names.name(65)}"]
        assert result["unanswered"] == [f"1-1-7 {names.name(67)}"]
        (difference,) = result["differences"]
        assert (difference["chip"], difference["address"], difference["found"]) == ("1-1-7", 67, None)
        assert result["bad_parity"] == 4
        assert result["asked_again"] == 3 + 3 + 2  # of a silent chip, one register is asked again
        with pytest.raises(RequestError, match="chip 1-1-3: no answer"):
            operator.read_configuration("1-1-3", 64).result(SLOW)
        ended = operator.end_run().result(SLOW)
        assert ended["condition"] == "COMPLETE"
        rows = rows_of(ended["files"][0])
        assert np.count_nonzero((rows["direction"] == 0) & (rows["packet_type"] < 4)) == board.sent


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda reply: reply[:-16], "expected an answer of 1 words, found 8 bytes"),
        (lambda reply: b"?" + reply[1:], "expected an answer of 1 words, found 24 bytes that begin with 3f"),
        (lambda reply: reply[:8] + b"E\x03broken".ljust(16, b"\0"), "the board refuses 1 of 1 words: 'broken'"),
        (lambda reply: b"", "expected an answer of 1 words, found 0 bytes"),
    ],
)
def test_wrong_answers_of_a_command_server_are_reported(line, reply, says):
    with closing(AnsweringBoard(lambda *_: [], reply=reply)) as board:
        operator = line.start("--pacman", f"127.0.0.1:{board.data_port}:{board.command_port}")
        with pytest.raises(RequestError) as raised:
            operator.ping().result(LIMIT)
        assert says in str(raised.value)
        assert f"command port tcp://127.0.0.1:{board.command_port}" in str(raised.value)


def test_no_data_are_lost_during_many_commands(tmp_path, line):
    """40,000 words/s come while the same board, which has no chips, gets commands without pause."""
    count = examples(100) * 4_000
    board = Emulator("--rate", "40000", "--count", str(count), "--wait-for-go", "--lossless", "--stay")
    try:
        ports = board.ready["1"]
        operator = line.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}")
        operator.load_board(board_file(tmp_path, list(range(2, 42)))).result(LIMIT)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        board.go()
        words = 0
        while not board.ended():
            words += operator.write_configuration().result(SLOW)["registers"]
            assert operator.ping().result(LIMIT) == {"1": True}
        assert words >= count // 40_000 * 40 * 237
        ended = operator.end_run().result(SLOW)
        assert ended["condition"] == "COMPLETE", ended
        rows = rows_of(ended["files"][0])
        assert np.count_nonzero((rows["direction"] == 0) & (rows["packet_type"] < 4)) == words
        received = ((rows["direction"] == 1) & (rows["packet_type"] < 4)) | (rows["packet_type"] > 5)
        assert np.count_nonzero(received) == board.summary["sent"]["1"]["words"] == count
    finally:
        board.close()


def test_larpix_controls_own_io_sets_the_same_registers(tmp_path, line, monkeypatch):
    """Do the same steps with PACMAN_IO and with our IO, each with its own board, and compare all registers."""
    network = tmp_path / "network.json"
    found = []
    for ours in (False, True):
        board = Emulator("--chips", "4", "--power-on", "--write-network", str(network))
        try:
            ports = board.ready["1"]
            if not ours:
                configure_with_pacman_io(tmp_path, monkeypatch, str(network), ports)
            operator = line.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}")
            operator.load_board(str(network)).result(LIMIT)
            if ours:
                operator.configure_network().result(SLOW)
                operator.send_configuration({"all": {"pixel_trim_dac": list(range(32)) * 2}}).result(LIMIT)
            read = operator.read_configuration().result(SLOW)
            assert not read["silent"]
            found.append(read["chips"])
        finally:
            board.close()
    assert found[0] == found[1]


def configure_with_pacman_io(folder, monkeypatch, network, ports):
    config = folder / "io.json"
    config.write_text(json.dumps({"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[1, "127.0.0.1"]]}))
    monkeypatch.setattr(PACMAN_IO, "cmdserver_port", str(ports["command"]))
    monkeypatch.setattr(PACMAN_IO, "dataserver_port", str(ports["data"]))
    monkeypatch.setattr(PACMAN_IO, "_launch_raw_file_worker", lambda self: None)
    controller = Controller()
    controller.io = PACMAN_IO(str(config), timeout=10_000)
    try:
        controller.load(network)
        for io_group, channels in controller.network.items():
            for io_channel in channels:
                controller.init_network(io_group, io_channel)
        for key, chip in controller.chips.items():
            chip.config.pixel_trim_dac = list(range(32)) * 2
            controller.write_configuration(key, "pixel_trim_dac")
    finally:
        controller.io.cleanup()


def test_a_bern_board_gets_words_as_text(line):
    context = zmq.Context()
    command, data = context.socket(zmq.REP), context.socket(zmq.PUB)
    ports = data.bind_to_random_port("tcp://127.0.0.1"), command.bind_to_random_port("tcp://127.0.0.1")
    said, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            if command.poll(20):
                said.append(command.recv().decode())
                command.send(b"ERR\0\0" if said[-1].endswith(" 6") else b"OK\0\0\0")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        operator = line.start("--bern", f"127.0.0.1:{ports[0]}:{ports[1]}")
        assert operator.ping().result(LIMIT) == {"1": True}
        assert operator.send_configuration({"1-3-2": {64: 25}}).result(LIMIT) == {"chips": 1, "registers": 1}
        operator.reset().result(LIMIT)
        with pytest.raises(RequestError, match=r"SNDWORD 0x\w{16} 6: the board answers 'ERR'"):
            operator.send_configuration({"1-7-2": {64: 25}}).result(LIMIT)
        with pytest.raises(RequestError, match=r"power: Bern board io_group 1 .* cannot do that"):
            operator.power(True).result(LIMIT)
        assert said[:3] == ["PING_HB", "SNDWORD 0x800000000065000a 2", "SYRESET"]
    finally:
        stop.set()
        thread.join(LIMIT)
        context.destroy(linger=0)


def test_a_serial_board_gets_frames(line):
    ours, device_end = pty.openpty()
    tty.setraw(ours)
    tty.setraw(device_end)
    try:
        operator = line.start("--serial", os.ttyname(device_end))
        assert operator.send_configuration({"1-1-2": {64: 25}}).result(LIMIT) == {"chips": 1, "registers": 1}
        operator.set_uart_clock(4).result(LIMIT)
        (status,) = operator.board_status().result(LIMIT)
        assert not status["answers"]
        found = b""
        while len(found) < 20:
            assert select.select([ours], [], [], LIMIT)[0], found
            found += os.read(ours, 100)
        assert found == b"s\x0a\x00\x65\x00\x00\x00\x00\x80q" + b"c\x00\x04" + bytes(6) + b"q"
    finally:
        os.close(ours)
        os.close(device_end)


DATA = """
from larpixdaq.routines import Routine

def _data(controller, send_data, send_info):
    controller.run(0.3, "data")
    reads = controller.reads[-1]
    kinds = sorted({type(packet).__name__ for packet in reads})
    key = str(next(packet.chip_key for packet in reads if type(packet).__name__ == "Packet_v2"))
    return controller, [len(reads), kinds, key, controller.io.left_out, controller.io.is_listening]

registration = {"data": Routine("data", _data, [])}
"""


def test_a_routine_that_listens_gets_the_data(tmp_path, line):
    (tmp_path / "mine.py").write_text(DATA)
    board = Emulator("--rate", "3000", "--pps")
    try:
        ports = board.ready["1"]
        operator = line.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}", "--routines", str(tmp_path))
        n, kinds, key, left_out, listening = operator.run_routine("data").result(SLOW)
        assert n > 100
        assert {"Packet_v2", "TimestampPacket"} <= set(kinds)
        assert key.startswith("1-")
        assert (left_out, listening) == (0, False)
    finally:
        board.close()


def test_v1_chips_have_the_register_names_of_larpix_control(line):
    board = Emulator("--chips", "controller/pcb-1_chip_info.json", "--power-on")
    try:
        ports = board.ready["1"]
        operator = line.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}", "--asic", "1")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        operator.load_board("controller/pcb-1_chip_info.json").result(LIMIT)
        assert operator.configure_network().result(SLOW)["ok"]
        operator.send_configuration({"1-1-246": {"global_threshold": 33, "csa_gain": 0}}).result(LIMIT)
        read = operator.read_configuration("1-1-246", ["global_threshold", "csa_gain"]).result(LIMIT)["chips"]
        assert read["1-1-246"] == {"global_threshold": 33, "csa_gain": 0, "csa_bypass": 0, "internal_bypass": 0}
        assert operator.validate_configuration().result(LIMIT)["registers"] == 4 * 63
        ended = operator.end_run().result(SLOW)
        assert ended["condition"].startswith("COMPLETE")  # noisy chips say that their FIFOs were full
        rows = rows_of(ended["files"][0])
        assert (b"1-1-246", 32, 33, 0) in rows[["chip_key", "register", "value", "direction"]].tolist()
    finally:
        board.close()


def test_v3_chips_are_brought_up_and_configured_by_name(tmp_path, line):
    """The emulated chips count nothing, so registers in which chips count stay 0; they are never compared."""
    network = tmp_path / "network.json"
    board = Emulator("--chips", "12", "--asic", "3", "--power-on", "--write-network", str(network))
    try:
        ports = board.ready["1"]
        operator = line.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}", "--asic", "3")
        assert operator.load_board(str(network)).result(LIMIT)["chips"] == 12
        assert operator.configure_network().result(SLOW)["ok"]
        key = "1-1-11"
        sent = operator.send_configuration({"all": {"threshold_global": 77}, key: {"enable_tally": 0}}).result(LIMIT)
        assert sent == {"chips": 12, "registers": 13}
        result = operator.validate_configuration().result(SLOW)
        assert (result["ok"], result["registers"], result["without_magic"]) == (True, 12 * (256 - 5), 0), result
        read = operator.read_configuration(key, ["tx_slices0", "enable_tally", 119]).result(LIMIT)["chips"][key]
        assert (read["enable_tally"], read["total_packets_msbs"]) == (0, 0)
        # The lines in use, as for real chips: current, slices, and the termination of the receiver.
        wanted = operator.retrieve_configuration(key).result(LIMIT)[key]["wanted"]
        uart = wanted["enable_piso_downstream"].index(1)
        receiver = wanted["enable_posi"].index(1)
        assert (wanted[f"i_tx_diff{uart}"], wanted[f"tx_slices{uart}"], wanted[f"r_term{receiver}"]) == (7, 15, 7)
        for action in ("write_configuration", "validate_configuration", "enforce_configuration"):
            with pytest.raises(RequestError, match=f"{action}: chip {key}: dropped_packets: chips count in this"):
                getattr(operator, action)(key, [64, "dropped_packets"]).result(SLOW)
        assert operator.reset(31).result(LIMIT)["configuration"] == {"1": "lost"}
        assert operator.configure_network().result(SLOW)["ok"]
        assert operator.enforce_configuration().result(SLOW)["written"] > 12
    finally:
        board.close()


def chip_state(setup):
    return ChipState(ChipRegisters("3"), ProducerPipe(None, setup))


def test_the_next_child_writes_no_register_in_which_a_v3_chip_counts():
    setup = Setup([BoardInfo(1, "pacman", "board")], "3", 3, 2)
    first = chip_state(setup)
    place = first.find("1-1-1")
    first.wanted[place, 125], first.wanted[place, 118], first.given[place, 118] = 15, 9, True
    stranger = Controller()
    stranger.add_chip("1-1-1", version="2b")
    with pytest.raises(RequestError, match="chip 1-1-1: expected a configuration of v3 chips in the Controller, found"):
        first.take_over(stranger)
    left = first.state()
    seen = {"read": bytes(REGISTERS), "known": bytes(REGISTERS)}
    other = chip_state(structs.replace(setup, **structs.asdict(left), **seen))
    other.restore()
    assert np.flatnonzero(~other.given[0]).tolist() == [116, 117, 119, 120]
    assert other.wanted[0, [118, 125]].tolist() == [9, 15]


class FaultyExchange:
    """Answers one register of each read, with faults."""

    def write(self, values, mask, progress):
        return []

    def read(self, mask, progress):
        answers = RegisterAnswers(mask)
        answers.counts[0, np.flatnonzero(mask[0])[0]] = 1
        answers.asked_again, answers.bad_parity, answers.strange = 3, 1, 2
        return answers


def test_enforcing_counts_the_faults_of_all_its_tries(monkeypatch):
    chips = chip_state(Setup([BoardInfo(1, "pacman", "board")], "3", 3, 2))
    place = chips.find("1-1-2")
    chips.wanted[place, 64:66], chips.given[place, 64:66] = 1, True
    monkeypatch.setattr(ChipActions, "_exchange", lambda self, indices: FaultyExchange())
    result = ChipActions(chips, no_progress).enforce_configuration("1-1-2")
    assert (result["asked_again"], result["bad_parity"], result["strange_answers"]) == (4 * 3, 4, 4 * 2)


def test_the_fake_source_takes_no_commands(line):
    operator = line.start("--fake", "100")
    with pytest.raises(RequestError, match="no board here takes commands"):
        operator.board_status().result(LIMIT)
    with pytest.raises(RequestError, match="chip 1-1-2: no board of io_group 1 takes commands here"):
        operator.read_configuration("1-1-2").result(LIMIT)
