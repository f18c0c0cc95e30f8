"""Discovery of networks, judged by what the emulated tiles really have."""

import json

import pytest
from emulated_board import emulator
from emulated_tiles import EmulatedTile, FakeLink
from larpix import Controller
from processes import LIMIT
from system import system

from larpixdaq.emulators.network import tile_wiring
from larpixdaq.errors import RequestError
from larpixdaq.hardware import discovery_exchange
from larpixdaq.hardware.discovered_tile import Tile
from larpixdaq.hardware.discovery_action import _write
from larpixdaq.hardware.network_discovery import NetworkDiscovery
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.hardware.tile_shape import tile_shape

SLOW = 120.0


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Emulated tiles in this process have answered when their words are sent."""
    monkeypatch.setattr(discovery_exchange, "_GRACE", 0.001)
    monkeypatch.setattr(discovery_exchange, "_SILENCE", 0.001)


def discover(emulated, asic, shape=None, **link_faults):
    """Discover these tiles, one on each board. Returns the tiles as discovered."""
    form = tile_shape(shape, asic)
    tiles = [Tile(number, 0, [1, 2, 3, 4][: len(form.roots)], form) for number in range(1, len(emulated) + 1)]
    link = FakeLink(emulated, asic, **link_faults)
    NetworkDiscovery(link, ChipRegisters(asic), tiles, lambda *_: None, link.reset).discover()
    return tiles


def check(found, truth, without=()):
    """Compare a discovered tile with the truth."""
    assert set(found.chips) == truth.reachable(without)
    wires = truth.wires()
    for chip in found.chips.values():
        if chip.parent is not None:
            link = chip.parent.chip_id, chip.chip_id
            assert link in wires
            assert link[::-1] in wires
            assert chip in chip.parent.children
            assert chip.parent.io_channel == chip.io_channel
    present = found.chips
    neighbours = {
        (chip_id, found.shape.neighbour(chip_id, side))
        for chip_id in present
        for side in range(4)
        if found.shape.neighbour(chip_id, side) in present
    }
    assert {tuple(wire) for wire in found.broken} == {
        wire for wire in neighbours if wire not in wires and wire[::-1] not in wires
    }
    assert {wire for wire in found.one_way if set(wire) <= set(present)} == {
        wire for wire in neighbours if wire in wires and wire[::-1] not in wires
    }


@pytest.mark.parametrize(
    ("asic", "seeds"), [("2", range(34)), ("2b", range(34, 67)), ("lightpix-1", range(67, 100))], ids=str
)
def test_every_reachable_chip_of_random_tiles_is_found_and_none_is_invented(asic, seeds):
    """Up to 10 % of the chips are dead, and up to 10 % of the links broken, some of them in one direction."""
    emulated = [EmulatedTile(asic, seed, seed % 11 / 100, seed % 7 / 100, seed % 5 / 100) for seed in seeds]
    tiles = discover(emulated, asic)
    for found, truth in zip(tiles, emulated, strict=True):
        check(found, truth)
    assert sum(len(tile.missing()) for tile in tiles) > len(seeds)


@pytest.mark.parametrize("name", ["10x16", "5x5"])
def test_tiles_of_other_shapes(name):
    shape = tile_shape(name, "2b")
    emulated = [EmulatedTile("2b", seed, 0.05, 0.05, 0.05, shape=shape) for seed in range(5)]
    for found, truth in zip(discover(emulated, "2b", shape=name), emulated, strict=True):
        check(found, truth)


def test_lost_words_hide_no_chip():
    """1 % of the words to the chips are lost."""
    emulated = [EmulatedTile("2", seed, 0.05, 0.05) for seed in range(8)]
    for found, truth in zip(discover(emulated, "2", lose=0.01), emulated, strict=True):
        assert set(found.chips) == truth.reachable()


def test_a_board_that_stops_answering_is_named_and_the_others_are_discovered():
    emulated = [EmulatedTile("2", seed, 0.05, 0.05) for seed in range(3)]
    first, broken, off = discover(emulated, "2", breaks={2: 20}, power_off={3: 30})
    check(first, emulated[0])
    assert not broken.chips
    assert "io_group 2 tile 0: board 2: no answer" in broken.faults()
    assert not off.chips
    assert "io_group 3 tile 0: its root chips have stopped to answer" in off.faults()


def faults_of(asic="2", **faults):
    """Discover one tile with these faults. Returns it, and its faults as one text."""
    emulated = EmulatedTile(asic, 1, **faults)
    (found,) = discover([emulated], asic)
    return emulated, found, "\n".join(found.faults())


def test_dead_roots_leave_their_chips_to_other_io_channels():
    truth, found, text = faults_of(dead_chips=[11, 41, 101])
    check(found, truth)
    assert len(found.chips) == 97
    assert [root.chip_id for root in found.roots] == [71]
    assert "io_channel 1: root chip 11 does not answer" in text
    assert "no answer from chips 11, 41, 101" in text


def test_a_chip_that_is_heard_by_another_neighbour_than_it_hears_is_named():
    """Chip 110, in a corner, hears 100 and is heard by 109."""
    truth, found, text = faults_of(cut=[(110, 100), (109, 110)])
    assert set(found.chips) == truth.reachable() == set(range(11, 110))
    assert {(100, 110), (110, 109)} <= set(found.one_way)
    assert "chip 110 hears 100 and is heard by 109, but no link of it works both ways: not used" in text


@pytest.mark.parametrize(("bit", "value"), [(0, 0), (0, 1), (3, 0), (3, 1), (6, 0), (6, 1)])
def test_a_chip_that_keeps_a_bit_of_its_id_is_named(bit, value):
    chip = next(chip_id for chip_id in range(44, 110) if chip_id >> bit & 1 != value)
    truth, found, text = faults_of(stuck=[(chip, 122, bit, value)])
    assert set(found.chips) == truth.reachable([chip])
    assert chip in found.missing()
    first = 1 & ~(1 << bit) | value << bit  # the id at power-up
    kept = chip ^ 1 << bit if first == 1 else first
    # an id that another chip of the io_channel has cannot be asked for
    assert f"chip {chip} keeps id {kept}: not used" in text or f"no answer from chip {chip}" in text


@pytest.mark.parametrize(("chip", "other"), [(45, 46), (45, 55), (45, 11), (11, 12), (45, 200), (45, 1)])
def test_a_chip_that_answers_for_another_is_named_and_not_used(chip, other):
    truth, found, text = faults_of(also={chip: other})
    assert f"chip {chip} answers for id {other}" in text
    assert set(found.chips) == truth.reachable([chip])


@pytest.mark.parametrize("link", [(45, 46), (46, 56), (11, 12), (12, 22)])
def test_a_link_that_flips_bits_is_named_and_not_used(link):
    truth, found, text = faults_of(flipping=[link])
    assert set(found.chips) == truth.reachable()
    assert "changes bits" in text
    named = [line for line in found.faults() if "changes bits" in line]
    assert all(f"{link[0]} - {link[1]}" in line or f"{link[1]} - {link[0]}" in line for line in named)
    for chip in found.chips.values():
        assert chip.parent is None or {chip.chip_id, chip.parent.chip_id} != set(link)


@pytest.mark.parametrize("asic", ["2", "2b", "lightpix-1"])
def test_the_network_is_a_board_file_of_larpix_control(tmp_path, asic):
    emulated = [EmulatedTile(asic, seed, 0.1, 0.1) for seed in range(2)]
    tiles = discover(emulated, asic)
    path = tmp_path / "found.json"
    _write(path, asic, tiles)
    controller = Controller()
    if asic == "lightpix-1":  # Controller.load does not know the name that Chip has for it
        controller.load_network(str(path), version="lightpix-v1.0")
    else:
        controller.load(str(path))
    assert {str(key) for key in controller.chips} == {
        f"{tile.io_group}-{chip.io_channel}-{chip.chip_id}" for tile in tiles for chip in tile.chips.values()
    }
    shape = tiles[0].shape
    for tile in tiles:
        for chip in tile.chips.values():
            graphs = controller.network[tile.io_group][chip.io_channel]
            parent = chip.parent.chip_id if chip.parent else "ext"
            side = chip.side
            assert graphs["miso_us"].edges[parent, chip.chip_id]["uart"] == shape.send[(side + 2) % 4]
            assert graphs["miso_ds"].edges[chip.chip_id, parent]["uart"] == shape.send[side]
            assert graphs["mosi"].edges[parent, chip.chip_id]["uart"] == shape.receive[side]
    with pytest.raises(RequestError, match="cannot write"):
        _write(path, asic, tiles)
    assert str(json.loads(path.read_text())["asic_version"]) == asic


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("10x11", "shape: expected 10x10, 10x16, 5x5 or a dictionary, found '10x11'"),
        (7, "shape: expected a name or a dictionary, found 7"),
        ({"rows": 2, "columns": 2}, "shape: expected rows, columns and roots, found no roots"),
        ({"rows": 2, "columns": 2, "root": [11]}, "shape: no field 'root'; close to it: roots"),
        ({"rows": 2, "columns": "2", "roots": [11]}, "shape: columns: expected whole numbers, found '2'"),
        ({"rows": 2, "columns": 2, "roots": 11}, "shape: roots: expected a list, found 11"),
        ({"rows": 0, "columns": 2, "roots": [11]}, "shape: expected at least one row and column"),
        ({"rows": 30, "columns": 10, "roots": [11]}, "shape: expected ids from 2 to 254, found 11 to 310"),
        ({"rows": 3, "columns": 3, "roots": [15]}, "shape: roots: expected chips at the edge of the tile, found 15"),
        ({"rows": 3, "columns": 3, "roots": [11], "send": [0, 1, 2, 2]}, "shape: send: expected the UARTs 0 to 3"),
    ],
)
def test_wrong_shapes_are_refused(shape, says):
    with pytest.raises(RequestError) as raised:
        tile_shape(shape, "2")
    assert str(raised.value).startswith(says)


def start(line, board, asic="2", *options):
    return line.start("--pacman", *board.addresses, "--asic", asic, *options)


def test_a_board_is_discovered_and_then_configured(line, tmp_path):
    """Two tiles with dead chips and links of all kinds, through the whole system."""
    faults = ("--dead-chips", "9", "--one-way-links", "20", "--broken-links", "9", "--seed", "3")
    with emulator("--chips", "200", "--asic", "2b", "--power-on", "--revision", "4", *faults) as board:
        operator = start(line, board, "2b")
        file = tmp_path / "found.json"
        request = operator.discover_network(str(file))
        responses = list(request)
        assert any(response.kind == "progress" and response.total == 200 for response in responses)
        found = responses[-1].value
        assert [(tile["io_group"], tile["tile"]) for tile in found["tiles"]] == [(1, 0), (1, 1)]
        assert found["state"] == "all chips have their power-up configuration, by a reset"
        dead = {key.split("-", 1)[1] for key in board.planted["dead_chips"]}
        keys = {f"{io_channel}-{chip}" for tile in found["tiles"] for chip, io_channel, _ in tile["network"]}
        assert not {key.split("-")[1] for key in dead if int(key.split("-")[0]) < 5} & {
            str(chip) for chip, *_ in found["tiles"][0]["network"]
        }
        assert len(keys) == found["chips"] == 200 - found["missing"]
        assert operator.get_boards().result(LIMIT)["chips"] == found["chips"]
        configured = operator.configure_network().result(SLOW)
        assert configured["ok"]
        assert configured["chips"] == found["chips"]
        assert operator.validate_configuration().result(SLOW)["ok"]

        text = request.readable()
        assert f"{found['chips']} chips found on 2 tiles" in text
        assert "io_group 1 tile 1: " in text
        with pytest.raises(RequestError, match="it exists, and is not overwritten"):
            operator.discover_network(str(file)).result(LIMIT)
        with pytest.raises(RequestError, match=r"no chip answers on io_group 1 tile 5: have they power"):
            operator.discover_network(str(tmp_path / "none.json"), tiles=5).result(SLOW)
        assert not (tmp_path / "none.json").exists()


def test_bad_chips_and_links_are_named_through_the_whole_system(line, tmp_path):
    faults = {
        "--dead-chips": "1-2-42",
        "--one-way-links": "1-1-13/1-1-23",
        "--flipping-links": "1-3-72/1-3-73,1-3-73/1-3-72",
        "--impostors": "1-3-75=104",
        "--stuck-bits": "1-2-55:122.7=1",
    }
    planted = [text for fault in faults.items() for text in fault]
    with emulator("--chips", "100", "--power-on", "--flips", "0.01", *planted) as board:
        operator = start(line, board)
        found = operator.discover_network(str(tmp_path / "found.json")).result(SLOW)
        (tile,) = found["tiles"]
        assert tile["missing"] == [42, 55, 75]
        assert tile["one_way"] == [[13, 23]]
        assert tile["bad_links"] == [[72, 73]]
        text = "\n".join(found["faults"])
        for part in (
            "no answer from chip 42",
            "chip 55 keeps id 129: not used",
            "chip 75 answers for id 104",
            "link 13 - 23 works only from 13 to 23",
            "changes bits",
        ):
            assert part in text
        assert len(found["faults"]) == 5
        assert operator.configure_network().result(SLOW)["ok"]


def test_a_tile_is_discovered_beside_another_that_is_in_use(line, tmp_path):
    network = tmp_path / "network.json"
    with emulator("--chips", "200", "--power-on", "--revision", "4", "--write-network", str(network)) as board:
        operator = start(line, board, "2", "--pacman-revision", "4")
        operator.load_board(str(network)).result(LIMIT)
        assert operator.configure_network().result(SLOW)["ok"]
        operator.power(False, tiles=1).result(SLOW)
        operator.power(True, tiles=1, vdda_dac=46_020, vddd_dac=46_020).result(SLOW)
        found = operator.discover_network(str(tmp_path / "one.json"), tiles=1, reset=False).result(SLOW)
        assert (found["ok"], found["chips"], found["faults"]) == (True, 100, [])
        assert found["state"].startswith("the found networks are up")
        operator.load_board(str(network)).result(LIMIT)
        first = [f"1-{io_channel}-{chip}" for io_channel, chip in tile_wiring(100).keys]
        assert operator.validate_configuration(first).result(SLOW)["ok"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tiles": 10}, "discover_network: tiles: expected numbers from 0 to 9, found 10"),
        ({"tiles": []}, "discover_network: tiles: expected at least one number, found none"),
        ({"io_group": 2}, "discover_network: io_group 2: no such board takes commands here; those that do: 1"),
        ({"file": "found.txt"}, "discover_network: file: expected a name that ends with .json, found 'found.txt'"),
        ({"file": "/no/such/found.json"}, "discover_network: file /no/such/found.json: no such folder"),
        ({"shape": "round"}, "discover_network: shape: expected 10x10, 10x16, 5x5 or a dictionary, found 'round'"),
        ({"exclude": "1-9-11"}, "discover_network: exclude: chip '1-9-11' is on none of the requested tiles"),
        ({"exclude": ["1-1-9"]}, "discover_network: exclude: io_group 1 tile 0 has no chip 9"),
        ({"reset": 7}, "discover_network: reset: expected True or False, found 7"),
    ],
)
def test_wrong_arguments_are_refused(answering, arguments, says):
    with pytest.raises(RequestError) as raised:
        answering.discover_network(**arguments).result(LIMIT)
    assert str(raised.value).startswith(says)


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """An Operator of a board with chips."""
    with emulator("--chips", "4", "--power-on") as board, system(tmp_path_factory.mktemp("system")) as line:
        yield start(line, board)
