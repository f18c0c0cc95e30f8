"""Emulated chips: registers as in larpix-control, the hydra network, and answers over real sockets."""

from __future__ import annotations

import json
import struct
from itertools import pairwise

import numpy as np
import pytest
import zmq
from emulated_board import (
    POWER_UP,
    READ,
    WRITE,
    board_register,
    context,
    data_words,
    emulator,
    own_address,
    reply_to,
    request,
    run_script,
    subscriber,
    word,
)
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMIT, until
from system import system

from larpixdaq import emulators, schema
from larpixdaq._native import chip_emulator as native
from larpixdaq._native import word_codec
from larpixdaq.emulators import network as chip_network
from larpixdaq.emulators import pacman
from larpixdaq.emulators.chips import EmulatedChips
from larpixdaq.emulators.network import VERSIONS, register_map
from larpixdaq.errors import RequestError
from larpixdaq.hardware.register_tables import CONFIGURATIONS

ID, UP, DOWN, IN = 122, 124, 125, 126
SLOW = 60.0


def sent(chips, *words):
    """Send (io_channel, word) to the chips. Returns their answers as (io_channel, word)."""
    channels, bare = np.array([w[0] for w in words], np.uint8), np.array([w[1] for w in words], np.uint64)
    answers, on = chips.send(bare, channels)
    return list(zip(on.tolist(), answers.tolist(), strict=True))


def fields(answer):
    """Return chip_id, register and value of an answer, which must be valid and go towards the board."""
    assert answer.bit_count() % 2 == 1
    assert answer >> 62 & 1
    assert answer & 3 == READ
    return answer >> 2 & 0xFF, answer >> 10 & 0xFF, answer >> 18 & 0xFF


# --- registers


@pytest.mark.parametrize("asic", sorted(schema.ASICS))
def test_registers_are_those_of_larpix_control(asic):
    """Power-up values, and each named field of registers at random, against its configuration classes."""
    from larpix import Chip

    def written():
        return {packet.register_address: packet.register_data for packet in chip.get_configuration_write_packets()}

    known = register_map(asic)
    chip = Chip("1-1-1", version=VERSIONS[asic])
    if asic in CONFIGURATIONS:
        chip.config = CONFIGURATIONS[asic]()
    config = chip.config
    assert known.count == config.num_registers
    assert dict(enumerate(known.defaults[: known.count].tolist())) == written()
    config.channel_mask[3] = 1 - config.channel_mask[3]
    config.channel_mask[20] = 1 - config.channel_mask[20]
    name = {"1": "pixel_trim_thresholds"}.get(asic, "pixel_trim_dac")
    getattr(config, name)[5] = 3
    setattr(config, "reset_cycles" if asic == "1" else "periodic_reset_cycles", 0x123456)
    registers = np.zeros((2, 256), np.uint8)
    registers[1, list(written())] = list(written().values())
    assert known.fields["channel_mask"].values(registers)[1].tolist() == list(config.channel_mask)
    assert known.fields["pixel_trim_dac"].values(registers)[1].tolist() == list(getattr(config, name))
    assert known.fields["periodic_reset_cycles"].values(registers).tolist() == [0, 0x123456]


# --- the network


def test_default_tiles():
    board = chip_network.tile_wiring(230)
    assert len(board.keys) == len(set(board.keys)) == 230
    assert [sum(channel == c for channel, _ in board.keys) for c in range(1, 9)] == [25] * 8
    assert {channel for channel, _, _ in board.entries} == set(range(1, 13))
    assert len(board.tree) == 230 - 12


@pytest.mark.parametrize(
    ("asic", "roots"),
    [
        ("2", [11, 41, 71, 101]),
        ("lightpix-1", [11, 41, 71, 101]),
        ("2b", [21, 41, 71, 91]),
        ("2d", [21, 41, 71, 91]),
        ("3", [11, 21, 31, 41]),
    ],
)
def test_default_tiles_have_the_root_chips_of_their_generation(asic, roots, tmp_path):
    words = ["--chips", "100", "--asic", asic, "--write-network", str(tmp_path / "net.json")]
    args = pacman.argument_parser().parse_args(words)
    pacman.check_arguments(args)
    board = args.detector.boards[1]
    found = [(channel, board.keys[chip]) for channel, chip, _ in board.entries]
    assert found == [(channel, (channel, root)) for channel, root in enumerate(roots, 1)]
    network = json.loads((tmp_path / "net.json").read_text())["network"]["1"]
    assert [next(root for root in network[c]["nodes"][0]["miso_us"] if root) for c in "1234"] == roots


@pytest.mark.parametrize(
    "file",
    [
        *(f"controller/network-3x3-tile-channel{n}.json" for n in range(3)),
        "controller/v2_example.json",
        "controller/lightpix_v1_example.json",
        "controller/bare-die-v2-v1.0.0.json",
        "controller/pcb-1_chip_info.json",
    ],
)
def test_files_of_larpix_control_load(file):
    asic, boards = chip_network.read_network(file)
    assert list(boards) == [1]
    chips = EmulatedChips(boards[1], asic, powered=True)
    assert len(chips.keys) == len(set(chips.keys)) >= 1


def test_the_written_network_is_part_of_the_wiring(tmp_path):
    """The links in the file are links of the tile, which has more."""
    tile = chip_network.tile_wiring(37)
    chip_network.write_network(tmp_path / "net.json", "2b", {1: tile, 4: chip_network.tile_wiring(3)})
    asic, boards = chip_network.read_network(str(tmp_path / "net.json"))
    assert asic == "2b"
    assert sorted(boards) == [1, 4]
    number = {key: chip for chip, key in enumerate(tile.keys)}
    there = [number[key] for key in boards[1].keys]
    assert {(there[a], u, there[b], v) for a, u, b, v in boards[1].wires} < set(tile.wires)
    assert {(c, there[chip], u) for c, chip, u in boards[1].entries} == set(tile.entries)
    assert {(there[chip], u, c) for chip, u, c in boards[1].exits} == set(tile.exits)
    assert {(there[a], there[b]) for a, b in boards[1].tree} == set(tile.tree)


def test_a_file_with_includes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(
        json.dumps({"_config_type": "controller", "_include": ["controller/v2_example.json"], "name": "mine"})
    )
    _, boards = chip_network.read_network("mine.json")
    assert boards[1].keys == [(1, 2), (1, 3), (1, 4), (1, 5)]


def test_a_file_of_several_tiles_includes_those_beside_it(tmp_path):
    """As scripts of the 2x2 write them: a file a tile, with maps of their own, and one that only includes them."""
    maps = {"miso_us_uart_map": [3, 0, 1, 2], "miso_ds_uart_map": [1, 2, 3, 0], "mosi_uart_map": [2, 3, 0, 1]}
    for tile in (1, 2):
        channels = {}
        for io_channel in range(4 * tile - 3, 4 * tile + 1):
            chips = [10 * (io_channel % 4) + 11 + n for n in range(3)]
            nodes = [{"chip_id": "ext", "root": True, "miso_us": [None, None, None, chips[0]]}]
            nodes += [{"chip_id": a, "miso_us": [None, None, None, b]} for a, b in pairwise(chips)]
            channels[str(io_channel)] = {"nodes": [*nodes, {"chip_id": chips[-1]}]}
        head = {"_config_type": "controller", "name": f"tile-{tile}.json", "asic_version": 2, "layout": "2.5.0"}
        (tmp_path / f"tile-{tile}.json").write_text(json.dumps({**head, "network": {"1": channels, **maps}}))
    both = tmp_path / "config.json"
    both.write_text(json.dumps({"_config_type": "controller", "_include": ["tile-1.json", "tile-2.json"]}))
    with emulator("--chips", str(both), "--power-on") as board, system(tmp_path) as made:
        operator = made.start("--pacman", *board.addresses, "--asic", "2")
        assert operator.load_board(str(both)).result(LIMIT)["chips"] == 24
        assert operator.configure_network().result(SLOW)["ok"]
        assert operator.validate_configuration().result(SLOW)["ok"]
        both.write_text(json.dumps({"_config_type": "controller", "_include": ["tile-1.json", "tile-3.json"]}))
        with pytest.raises(RequestError, match=r"it includes tile-3\.json, which is neither here nor beside it"):
            operator.load_board(str(both)).result(LIMIT)
        assert operator.validate_configuration().result(SLOW)["ok"], "the board of before stays loaded"


@pytest.fixture
def pair():
    """Powered chips of v2_example: ext - 2, then 3 and 4 after 2, and 5 after 4."""
    asic, boards = chip_network.read_network("controller/v2_example.json")
    return EmulatedChips(boards[1], asic, powered=True)


def test_a_chip_answers_when_both_paths_are_open(pair):
    assert sent(pair, (1, word(READ, 1, ID))) == []  # heard, but no path back is open
    assert pair.counts()["unheard"] == 0
    assert sent(pair, (1, word(WRITE, 1, ID, 2)), (1, word(READ, 1, ID)), (2, word(READ, 2, ID))) == []
    assert pair.counts()["unheard"] == 2
    answers = sent(pair, *((1, word(WRITE, 2, DOWN, 1 << uart)) for uart in range(4)), (1, word(READ, 2, ID)))
    assert answers == []
    ((channel, answer),) = sent(pair, (1, word(WRITE, 2, DOWN, 0b1111)), (1, word(READ, 2, ID)))
    assert (channel, fields(answer)) == (1, (2, ID, 2))
    # the next chip hears nothing until the path is open, and then has the power-up id
    assert sent(pair, (1, word(READ, 1, ID))) == []
    assert pair.counts()["unheard"] == 3
    sent(pair, (1, word(WRITE, 2, UP, 0b1111)), (1, word(WRITE, 1, DOWN, 0b1111)))
    assert sorted(fields(answer) for _, answer in sent(pair, (1, word(READ, 1, ID)))) == [(1, ID, 1), (1, ID, 1)]
    # a chip that does not receive passes no answers on
    sent(pair, (1, word(WRITE, 2, IN, 0)))
    assert sent(pair, (1, word(READ, 2, ID))) == []


def test_broadcasts_reach_all_chips_on_their_path(pair):
    sent(pair, (1, word(WRITE, 1, ID, 2)), (1, word(WRITE, 2, DOWN, 15)), (1, word(WRITE, 2, UP, 15)))
    sent(pair, (1, word(WRITE, 255, 64, 77)))
    assert pair.registers[:, 64].tolist() == [77, 77, 77, 255]


def test_power_and_reset(pair):
    sent(pair, (1, word(WRITE, 1, ID, 2)), (1, word(WRITE, 2, DOWN, 15)), (1, word(WRITE, 2, 64, 9)))
    pair.power(0xFFFFFFFE)
    assert sent(pair, (1, word(READ, 2, 64))) == []
    pair.power(1)
    assert pair.registers[0, 64] == 255
    sent(pair, (1, word(WRITE, 1, ID, 2)), (1, word(WRITE, 2, DOWN, 15)), (1, word(WRITE, 2, 64, 9)))
    pair.power(1)
    assert pair.registers[0, 64] == 9
    pair.reset(256, tick=0)
    assert pair.registers[0, [ID, 64]].tolist() == [1, 255]


@pytest.mark.parametrize(
    ("asic", "clock", "registers"),
    [("2", 10, 256), ("2b", 10, 256), ("2d", 10, 256), ("lightpix-1", 10, 256), ("3", 15, 31)],
)
def test_the_length_of_a_reset_decides_its_effect(asic, clock, registers):
    """A short reset restarts the chips' time stamps and keeps the registers; tiles that it does not reach keep both."""
    chips = EmulatedChips(chip_network.tile_wiring(200), asic, powered=True)
    for length in (clock - 1, clock, 24, registers - 1):
        chips.registers[:, 64] = 9
        chips.clock_start[:] = 0
        chips.reset(length, tick=1000)
        assert (chips.registers[:, 64] == 9).all()
        assert set(chips.clock_start.tolist()) == {1000 if length >= clock else 0}
    chips.reset(registers, tick=2000, tiles=0b10)
    assert set(chips.registers[:100, 64].tolist()) == {9}
    assert set(chips.clock_start[:100].tolist()) == {1000}
    assert set(chips.registers[100:, 64].tolist()) == {255}
    assert set(chips.clock_start[100:].tolist()) == {2000}


def test_io_channels_of_any_number_have_power(tmp_path):
    names = {"_config_type": "controller", "name": "x", "asic_version": 1, "chip_list": ["1-0-2", "1-255-3"]}
    (tmp_path / "v1.json").write_text(json.dumps(names))
    asic, boards = chip_network.read_network(str(tmp_path / "v1.json"))
    chips = EmulatedChips(boards[1], asic, powered=True)
    assert chips.alive.all()
    read = [3 | chip_id << 2 | 32 << 10 for chip_id in (2, 3)]
    answers = sent(chips, (0, read[0]), (255, read[1]), (1, read[0]))
    assert [(channel, answer >> 18 & 255) for channel, answer in answers] == [(0, 16), (255, 16)]
    assert all(answer.bit_count() % 2 and answer < 1 << 54 for _, answer in answers)


@pytest.mark.parametrize("asic", ["2d", "3"])
def test_words_that_chips_refuse(asic):
    _, boards = chip_network.read_network("controller/v2_example.json")
    v3, v2 = (EmulatedChips(boards[1], generation, powered=True) for generation in (asic, "2"))
    plain = word(WRITE, 1, 64, 5)
    magic = plain & (1 << 26) - 1 | 0x89504E47 << 26
    magic |= (magic.bit_count() & 1 ^ 1) << 63
    for wrong in (plain, magic ^ 1 << 26 ^ 1 << 27, magic | 1 << 62, 1 | 1 << 2, *([magic ^ 1 << 63] * (asic == "3"))):
        sent(v3, (1, wrong))
    assert v3.counts()["refused"] == (5 if asic == "3" else 4)
    assert v3.registers[0, 64] == 255
    sent(v3, (1, magic))
    assert v3.registers[0, 64] == 5
    # v2 and v2d chips take a wrong parity: larpix-control sends such words when it sets up a network
    sent(v2, (1, plain ^ 1 << 63))
    assert v2.registers[0, 64] == 5
    if asic == "2d":
        v3.registers[0, 64] = 255
        sent(v3, (1, magic ^ 1 << 63))
        assert v3.registers[0, 64] == 5
    sent(v2, (1, word(WRITE, 1, 240, 5)))
    assert not v2.registers[0, 237:].any()


class Model:
    """Model of v2_example, word by word: each chip with its links, without memory between words."""

    def __init__(self, board):
        self.registers = [register_map("2").defaults.tolist() for _ in board.keys]
        self.board = board

    def send(self, channel, packet):
        answers = []
        queue = [chip for c, chip, uart in self.board.entries if c == channel and self.registers[chip][IN] >> uart & 1]
        while queue:
            chip = queue.pop()
            registers, addressed = self.registers[chip], packet >> 2 & 0xFF
            if addressed not in (255, registers[ID]):
                queue += [b for a, u, b, v in self.board.wires if a == chip and self.open(chip, UP, u, b, v)]
                continue
            if addressed == 255:
                queue += [b for a, u, b, v in self.board.wires if a == chip and self.open(chip, UP, u, b, v)]
            address = packet >> 10 & 0xFF
            if packet & 3 == WRITE:
                registers[address] = packet >> 18 & 0xFF
            else:
                answers += [(c, (addressed, address, registers[address])) for c in self.out(chip)]
        return answers

    def open(self, chip, register, uart, neighbour, arrives):
        return self.registers[chip][register] >> uart & 1 and self.registers[neighbour][IN] >> arrives & 1

    def out(self, chip):
        found, ahead = [], [chip]
        while ahead:
            at = ahead.pop()
            found += [c for a, u, c in self.board.exits if a == at and self.registers[at][DOWN] >> u & 1]
            ahead += [b for a, u, b, v in self.board.wires if a == at and self.open(at, DOWN, u, b, v)]
        return found


#: Paths in one direction only (the links of the tree), so that the model needs no rule for rings.
_, EXAMPLE = chip_network.read_network("controller/v2_example.json")
UPWARD = {(a, u) for a, u, b, _ in EXAMPLE[1].wires if (a, b) in EXAMPLE[1].tree}
UP_MASKS = [sum(1 << u for a, u in UPWARD if a == chip) for chip in range(4)]
DOWN_MASKS = [sum(1 << u for u in range(4) if (chip, u) not in UPWARD) for chip in range(4)]

commands = st.lists(
    st.tuples(
        st.sampled_from([WRITE, WRITE, READ]),
        st.sampled_from([1, 2, 3, 4, 255]),
        st.sampled_from([ID, UP, DOWN, IN, 64, 10]),
        st.sampled_from([0, 1, 2, 3, 4]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=examples(150))
@given(commands=commands, cuts=st.lists(st.integers(0, 40)))
def test_any_words_in_batches_of_any_size(commands, cuts):
    """The chips give the same answers, in the same order, and have the same registers as the model."""
    board = EXAMPLE[1]
    chips, model = EmulatedChips(board, "2", powered=True), Model(board)
    words, expected = [], []
    for kind, chip_id, address, value in commands:
        data = value
        if address in (UP, DOWN, IN):  # open or close paths of the tree, so that words reach chips
            data = 0 if value == 0 else {UP: UP_MASKS[value - 1], DOWN: DOWN_MASKS[value - 1], IN: 15}[address]
            if address != IN and chip_id == 255:
                continue
        words.append((1, word(kind, chip_id, address, data)))
    # the masks of the chips are known only now: skip words that would open a ring
    got = []
    bounds = sorted({0, len(words), *(cut for cut in cuts if cut < len(words))})
    for channel, packet in words:
        answers = model.send(channel, packet)
        expected.append(sorted(answers))
        for chip in range(4):
            for register, mask in ((UP, UP_MASKS), (DOWN, DOWN_MASKS)):
                if model.registers[chip][register] & ~mask[chip]:
                    return
    for a, b in pairwise(bounds):
        got += [(channel, fields(answer)) for channel, answer in sent(chips, *words[a:b])]
    at = 0
    for answers in expected:
        assert sorted(got[at : at + len(answers)]) == answers
        at += len(answers)
    assert at == len(got)
    assert chips.registers[:, :237].tolist() == [registers[:237] for registers in model.registers]


# --- over sockets

BRING_UP = f"""{POWER_UP}
controller.load(args[0])
for io_group, io_channels in controller.network.items():
    for io_channel in io_channels:
        controller.init_network(io_group, io_channel)
ok, differences = controller.verify_network()
"""


def test_larpix_control_brings_up_a_hundred_chips(tmp_path):
    """Network, every register of every chip, before and after a write; answers are counted exactly."""
    script = (
        BRING_UP
        + """
all_ok, more = controller.verify_configuration(timeout=4)
for chip in list(controller.chips.values())[:10]:
    chip.config.threshold_global = 40
    chip.config.pixel_trim_dac = list(range(32)) * 2
stale_ok, stale = controller.verify_configuration([key for key in list(controller.chips)[:10]], timeout=1)
for key in list(controller.chips)[:10]:
    controller.write_configuration(key)
fresh_ok, fresh = controller.verify_configuration([key for key in list(controller.chips)[:10]], timeout=1)
io.reset_larpix(io_group=1)
reset_ok, _ = controller.verify_registers([(list(controller.chips)[0], 122)], timeout=0.2)
print(json.dumps([len(controller.chips), ok, all_ok, stale_ok, sorted(next(iter(stale.values()))), fresh_ok, reset_ok]))
"""
    )
    network = tmp_path / "net.json"
    with own_address("--chips", "100", "--asic", "2b", "--write-network", str(network)) as board:
        assert run_script(script, board, tmp_path, network) == [
            100,
            True,
            True,
            False,
            [*(n for n in range(64) if n % 32 != 16), 64],
            True,
            False,
        ]
        board.stop()
        counts = board.finish()["sent"]["1"]
    assert counts["D"] == 100 * 4 + 100 * 256 + 2 * 10 * 256
    assert counts["refused"] == 0


def test_dead_chips_and_broken_links_are_found(tmp_path):
    """Only the chips that cannot be reached are missing, and a stuck bit is found at its place."""
    script = BRING_UP + "ok, more = controller.verify_configuration(timeout=3)\n"
    script += "print(json.dumps({str(key): {str(r): v for r, v in found.items()} for key, found in more.items()}))\n"
    network = tmp_path / "net.json"
    chips = ("--chips", "40", "--write-network", str(network), "--stuck-bits", "1-1-11:64.2=0")
    with own_address(*chips, "--dead-chips", "1", "--broken-links", "1", "--seed", "4") as board:
        found = run_script(script, board, tmp_path, network)
    wiring_ = chip_network.tile_wiring(40)
    names = [f"1-{channel}-{chip}" for channel, chip in wiring_.keys]
    (dead,), (link,) = board.planted["dead_chips"], board.planted["broken_links"]
    cut_off = {names.index(dead), names.index(link.split("/")[1])}
    for parent, chip in wiring_.tree:
        if parent in cut_off:
            cut_off.add(chip)
    missing = {names[chip] for chip in cut_off}
    assert {key for key, registers in found.items() if len(registers) == 237} == missing
    if "1-1-11" not in missing:
        assert found.pop("1-1-11") == {"64": [255, 251]}
    assert set(found) == missing


def test_larpix_control_calibrates_and_sends_test_pulses(tmp_path):
    """Masks and thresholds decide which packets come. Periodic triggers sample pedestals; test pulses are higher."""
    script = (
        BRING_UP
        + """
key = controller.get_network_keys(1, 1)[0]
chip = controller[key]

def hits(seconds=0.3):
    controller.run(seconds, "hits")
    return [p for p in controller.reads[-1] if p.packet_type == 0 and p.chip_id == key.chip_id]

def write(**registers):
    for name, value in registers.items():
        setattr(chip.config, name, value)
        controller.write_configuration(key, name)

found = [len(hits())]
write(channel_mask=[0] * 8 + [1] * 56, enable_periodic_reset=1, threshold_global=200)
found.append(len(hits()))
write(threshold_global=80)
noise = hits()
found += [len(noise) > 1000, sorted({p.channel_id for p in noise})]
write(pixel_trim_dac=[31] * 64, threshold_global=89)
while len(hits()) > 50:  # unread packets come first
    pass
high = len(hits())
write(pixel_trim_dac=[0] * 64)
found.append(len(hits()) > 4 * (high + 50))
write(threshold_global=110, pixel_trim_dac=[16] * 64)
while hits():
    pass
write(periodic_trigger_mask=[0] * 64, periodic_trigger_cycles=1000000, enable_hit_veto=0, enable_periodic_trigger=1)
pedestals = hits(1.0)
write(enable_periodic_trigger=0)
while hits():
    pass
found += [sorted({p.channel_id for p in pedestals}), {p.trigger_type for p in pedestals} == {3}]
controller.enable_testpulse(key, [3, 40], start_dac=200)
pulsed = [p for p in controller.issue_testpulse(key, 100, read_time=0.3) if p.packet_type == 0]
level = [p.dataword for p in pedestals if p.channel_id == 3]
found += [[p.channel_id for p in pulsed], round((pulsed[0].dataword - sum(level) / len(level)) / 100, 1)]
print(json.dumps(found))
"""
    )
    network = tmp_path / "net.json"
    with own_address("--chips", "4", "--asic", "2b", "--write-network", str(network), "--power-on") as board:
        every = list(range(64))
        assert run_script(script, board, tmp_path, network) == [0, 0, True, every[:8], True, every, True, [3], 1.0]


def test_powered_tiles_are_in_the_register():
    with emulator("--chips", "230", "--power-on") as board, context() as ctx:
        command = ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{board.ready['1']['command']}")
        assert struct.unpack_from("<c3xI4xI", reply_to(command, board_register(b"R", 0x10)), 8) == (b"R", 0x10, 7)


def collected(socket, enough):
    got = []

    def turn():
        while socket.poll(20):
            got.append(socket.recv())
        return enough(data_words(got))

    until(turn, "the answers")
    return data_words(got)


def test_answers_in_order_and_in_large_messages():
    with emulator("--chips", "4", "--asic", "2b", "--power-on", "--lossless") as board, context() as ctx:
        command = ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{board.ready['1']['command']}")
        socket = subscriber(ctx, board.ready["1"]["data"])
        reply_to(command, request([(1, word(WRITE, 1, ID, 11)), (1, word(WRITE, 11, DOWN, 15))]))
        read = [(1, word(READ, 11, address % 256)) for address in range(65_535)]
        reply = reply_to(command, request(read))
        assert reply[8:] == request(read)[8:]
        answers = collected(socket, lambda words: len(words) >= 65_535)["packet"]
        assert len(answers) == 65_535
        rows = np.zeros(65_535, schema.PACKETS_2_4)
        word_codec.decode(answers.copy(), rows, asic=schema.Asic.V2)
        assert rows["valid_parity"].all()
        assert (rows["register_address"] == np.arange(65_535) % 256).all()
        assert set(rows["packet_type"].tolist()) == {READ}
        # without power: silence
        reply_to(command, board_register(b"W", 0x10, 0))
        reply_to(command, request(read[:1]))
        board.stop()
        counts = board.finish()["sent"]["1"]
        assert (counts["D"], counts["unheard"]) == (65_535, 1)


@pytest.mark.parametrize("option", ["--lose-answers", "--double-answers", "--bug-512"])
def test_lost_and_doubled_words(option):
    args = [option] if option == "--bug-512" else [option, "0.1"]
    with emulator("--chips", "4", "--power-on", "--lossless", *args) as board, context() as ctx:
        command = ctx.socket(zmq.REQ)
        command.connect(f"tcp://127.0.0.1:{board.ready['1']['command']}")
        socket = subscriber(ctx, board.ready["1"]["data"])
        reply_to(command, request([(1, word(WRITE, 1, ID, 11)), (1, word(WRITE, 11, DOWN, 15))]))
        reply_to(command, request([(1, word(READ, 11, address % 237)) for address in range(10_000)]))
        least = {"--lose-answers": 8_500, "--double-answers": 10_500, "--bug-512": 9_981}[option]
        words = collected(socket, lambda words: len(words) >= least)
        board.stop()
        counts = board.finish()["sent"]["1"]
        words = np.concatenate([words, data_words(list(iter(lambda: socket.poll(50) and socket.recv(), 0)))])
    wrong = {"--lose-answers": "answers_lost", "--double-answers": "answers_doubled", "--bug-512": "words_lost"}[option]
    change = counts[wrong] if option == "--double-answers" else -counts[wrong]
    assert len(words) == counts["D"] == 10_000 + change
    assert counts[wrong] == 19 if option == "--bug-512" else 850 < counts[wrong] < 1150


# --- wrong use


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["--dead-chips", "1"], 2, "--dead-chips goes with --chips"),
        (["--chips", "4", "--replay", "x"], 2, "--chips determines the packets"),
        (["--chips", "4", "--asic", "1"], 2, "v1 chips are no network"),
        (["--inverted"], 2, "--inverted goes with --chips"),
        (["--inverted", "--chips", "4", "--revision", "2"], 2, "which those of revision 2 cannot"),
        (["--slow-read", "61"], 2, "--slow-read: expected 0 to 60 seconds, found 61"),
        (["--revision", "6"], 2, "--revision: invalid choice: '6'"),
        (["--chips", "0"], 2, "--chips: expected 1 to 1000 chips on a board, found 0"),
        (["--chips", "nowhere.json"], 1, "nowhere.json: File not found"),
        (["--chips", "io/pacman.json"], 1, "io/pacman.json: no controller configuration"),
        (["--chips", "4", "--dead-chips", "5"], 2, "5 requested, only 4 exist"),
        (["--chips", "4", "--dead-chips", "1-1-99"], 2, "no chip '1-1-99'; the first is 1-1-11"),
        (["--chips", "4", "--broken-links", "1-1-11"], 2, "expected a number or CHIP/CHIP"),
        (["--chips", "4", "--one-way-links", "9"], 2, "9 requested, only 4 exist"),
        (["--chips", "4", "--flipping-links", "1-1-11/1-1-15"], 2, "no chip '1-1-15'"),
        (["--chips", "4", "--impostors", "1-1-11"], 2, "expected a number or CHIP=ID"),
        (["--chips", "4", "--impostors", "1-1-11=255"], 2, "chip_id 255: expected 1 to 254"),
        (["--flips", "2", "--chips", "4"], 2, "expected a fraction"),
        (["--chips", "4", "--hot-channels", "1-1-11-64"], 2, "channel 64 of 64"),
        (["--chips", "4", "--stuck-bits", "1-1-11:237.0=0"], 2, "register 237 of 237"),
        (["--chips", "4", "--lose-answers", "2"], 2, "expected a fraction"),
        (["--chips", "4", "--write-network", "/nowhere/x"], 1, "cannot write /nowhere/x"),
    ],
)
def test_wrong_options(args, status, text, capsys):
    try:
        got = emulators.main(["pacman", *args])
    except SystemExit as end:
        got = end.code
    err = capsys.readouterr().err
    assert (got, text in err, err.count("\n")) == (status, True, 1), err


# --- the compiled part


def arrays(chips=2, **changes):
    shapes = {"registers": (chips, 256), "keep": (chips, 256), "force": (chips, 256), "watched": (256,)}
    tables = {name: np.zeros(shape, np.uint8) for name, shape in {**shapes, "changed": (chips,)}.items()}
    tables["hears"], tables["leaves"] = np.full((256, 256), -1, np.int32), np.full(chips, -1, np.int16)
    return {**tables, "count": 256, **changes}


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": np.zeros((2, 255), np.uint8)},
        {"force": np.zeros((3, 256), np.uint8)},
        {"watched": np.zeros(255, np.uint8)},
        {"changed": np.zeros(1, np.uint8)},
        {"hears": np.zeros((256, 255), np.int32)},
        {"leaves": np.zeros(3, np.int16)},
        {"count": 257},
    ],
)
def test_invalid_arrays(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        native.RegisterBank(**arrays(**wrong))


def test_invalid_calls():
    chips = native.RegisterBank(**arrays())
    words, channels, answers, on = (np.zeros(4, kind) for kind in ("u8", "u1", "u8", "u1"))
    for start, made, many in ((5, 0, 4), (0, 5, 4), (0, 0, 3)):
        with pytest.raises(ValueError, match="serve: 4 words"):
            chips.serve(words, channels[:many], start, answers, on, made)
    with pytest.raises(ValueError, match="deliver: chip 2 of 2"):
        chips.deliver(2, 3)
    chips.serve(words, channels, 0, answers, on, 0)
    assert (chips.refused, chips.unheard) == (4, 0)


def test_answers_wait_for_room():
    """Without room serve() stops at a word; no word is answered twice or not at all."""
    tables = arrays()
    tables["hears"][1, 1], tables["leaves"][0] = 0, 1
    chips = native.RegisterBank(**tables)
    words = np.array([word(READ, 1, address) for address in range(5)], np.uint64)
    answers, on = np.zeros(2, np.uint64), np.zeros(2, np.uint8)
    at, got = 0, []
    while at < 5:
        at, made, reason = chips.serve(words, np.ones(5, np.uint8), at, answers, on, 0)
        assert reason == native.Stop.DONE
        got += [fields(answer)[1] for answer in answers[:made].tolist()]
    assert got == list(range(5))


def test_a_path_around_a_dead_chip():
    """3 x 3 chips on one io_channel; the chip between the root (14) and the lower right corner (19) is dead."""
    tile = chip_network.tile_wiring(9, channels=1, asic="2b")
    chips = EmulatedChips(tile, "2b", dead=[4], powered=True)
    uart = {(a, b): u for a, u, b, _ in tile.wires}
    way = [3, 6, 7, 8]
    assert tile.entries[0][1] == way[0]
    (exit_,) = (u for _, u, _ in tile.exits)
    sent(chips, (1, word(WRITE, 1, ID, 14)), (1, word(WRITE, 14, DOWN, 1 << exit_)))
    for near, far in pairwise(way):
        sent(chips, (1, word(WRITE, near + 11, UP, 1 << uart[near, far])))
        sent(chips, (1, word(WRITE, 1, ID, far + 11)), (1, word(WRITE, far + 11, DOWN, 1 << uart[far, near])))
    assert [fields(answer) for _, answer in sent(chips, (1, word(READ, 19, ID)))] == [(19, ID, 19)]
    sent(chips, (1, word(WRITE, 14, UP, 1 << uart[3, 4])))
    assert sent(chips, (1, word(READ, 1, ID)), (1, word(READ, 19, ID))) == []
