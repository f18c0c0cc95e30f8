"""Tiles and boards that go wrong in laboratories: each fault is named in one line, and so is the state that it leaves.

Others are tested where they belong: a chip that answers for another one in test_network_discovery.py, a link that flips
bits there and in test_lab_routines.py, a tile that draws too much and a board that restarts during a ramp in
test_board_power.py, triggers that a routine leaves on in test_lab_routines.py, and a folder of configurations for other
chips in test_snapshots.py.
"""

import json
from contextlib import closing

import pytest
from emulated_board import Emulator
from processes import LIMIT, free_port, until

from larpixdaq.errors import RequestError

SLOW = 180.0


def leaves_alike(network):
    """Return two chips at the ends of an io_channel's network whose neighbours towards the board are on one side."""
    nodes = json.loads(network.read_text())["network"]["1"]["1"]["nodes"]
    side = {child: at for node in nodes for at, child in enumerate(node.get("miso_us", [])) if child}
    ends = [node["chip_id"] for node in nodes if "miso_us" not in node]
    return next((a, b) for a in ends for b in ends if a < b and side[a] == side[b])


def test_two_chips_with_one_id_are_named(line, tmp_path):
    network = tmp_path / "network.json"
    tile = ("--chips", "100", "--asic", "2b", "--power-on", "--lossless")
    with closing(Emulator(*tile, "--write-network", str(network))):
        one, other = leaves_alike(network)
    with closing(Emulator(*tile, "--impostors", f"1-1-{one}={other}")) as board:
        operator = line.start("--pacman", *board.addresses, "--asic", "2b")
        operator.load_board(str(network)).result(LIMIT)
        operator.configure_network().result(SLOW)
        keys = [f"1-1-{one}", f"1-1-{other}"]
        read = operator.validate_configuration(keys).result(SLOW)
        assert f"1-1-{other} chip_id" in read["contradicting"]
        assert {entry.split()[0] for entry in read["answered_twice"]} == {keys[1]}
        quality = operator.run_routine("link_quality", keys, words=160).result(SLOW)
        assert quality["twice"] == [keys[1]]
        steps = {"steps": ["registers", "link_quality"], "options": {"link_quality": {"words": 160}}}
        result = operator.run_routine("qc", keys, directory=str(tmp_path), **steps).result(SLOW)
        assert not result["ok"]
        (named,) = [text for text in result["not_measured"] if "twice" in text]
        assert named == f"chips that answer twice, perhaps with one id: {keys[1]}"


def test_a_board_that_restarts_during_a_routine_leaves_a_state_that_is_told(line, tmp_path):
    """Its chips have lost power and configuration; the routine fails, and the wanted values are those from before."""
    network = tmp_path / "network.json"
    ports = ("--data-port", str(free_port()), "--command-port", str(free_port()))
    tile = ("--chips", "4", "--asic", "2b", "--write-network", str(network), *ports)
    with closing(Emulator(*tile, "--power-on")) as board:
        operator = line.start("--pacman", *board.addresses, "--asic", "2b")
        operator.load_board(str(network)).result(LIMIT)
        assert operator.configure_network().result(SLOW)["ok"]
        operator.send_configuration({"all": {"threshold_global": 77}}).result(LIMIT)
        request = operator.run_routine("pedestal", samples=200, trigger_hz=50.0)
        for response in request:
            if response.text.startswith("sampling"):
                break
        board.close()
        with closing(Emulator(*tile)) as again:
            with pytest.raises(RequestError, match=r"command port .*: no answer within 2 s|no chip there answers"):
                request.result(SLOW)
            until(lambda: operator.ping().result(LIMIT) == {"1": True}, "the board")
            (status,) = operator.board_status().result(LIMIT)
            assert (status["tiles"], status["supplies"]) == ([], [])
            checked = operator.validate_configuration().result(SLOW)
            assert len(checked["silent"]) == 4, "the tile has no power"
            wanted = operator.retrieve_configuration(None, "threshold_global").result(LIMIT)
            assert {chip["wanted"]["threshold_global"] for chip in wanted.values()} == {77}
            operator.power(True, tiles=0, vdda_dac=46_260, vddd_dac=30_840).result(SLOW)
            assert operator.configure_network().result(SLOW)["ok"]
            assert operator.enforce_configuration().result(SLOW)["ok"]
            assert again.ready["1"] == board.ready["1"]
