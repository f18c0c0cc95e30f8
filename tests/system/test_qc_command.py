"""`larpixdaq qc` without a board file: it discovers the network; and its interruption in the middle."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from emulated_board import Emulator
from processes import LIMIT, wait_for_line
from system import system

SLOW = 60.0
SHAPE = {"rows": 2, "columns": 2, "roots": [11, 13]}
DEAD = "1-1-12"


@pytest.fixture
def tile(tmp_path):
    """Start the system of a tile without power, of which one chip is dead. Returns Operator and core's address."""
    (tmp_path / "system").mkdir()
    board = Emulator("--chips", "4", "--asic", "2b", "--lossless", "--dead-chips", DEAD)
    try:
        with system(tmp_path / "system") as started:
            yield started.start("--asic", "2b", "--pacman", board.addresses[0]), started.core
    finally:
        board.close()


@contextmanager
def command(core, folder, *options):
    """Start the command in a folder, for tile 0."""
    shape = folder / "shape.json"
    shape.write_text(json.dumps(SHAPE))
    dacs = ("--vdda-dac", "46000", "--vddd-dac", "31000")
    start = [sys.executable, "-m", "larpixdaq", "qc", "--shape", shape, "--tile", "0", *dacs, "-o", folder, *options]
    process = subprocess.Popen(
        [*map(str, start), "--core", core], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines_until(process, text):
    """Return the lines of the command up to the first with this text."""
    lines = [wait_for_line(process, SLOW)]
    while text not in lines[-1]:
        if not lines[-1]:
            raise AssertionError(f"{text!r} did not come: {lines}; {process.communicate(timeout=SLOW)[1].decode()}")
        lines.append(wait_for_line(process, SLOW))
    return lines


def test_a_tile_is_discovered_and_an_interruption_leaves_the_registers_as_before(tile, tmp_path):
    operator, core = tile
    with command(core, tmp_path) as process:
        lines = lines_until(process, "pedestal")
        assert any("3 of 4 chips found on 1 tiles" in line for line in lines), lines
        assert any("io_group 1 tile 0: no answer from chip 12" in line for line in lines), lines
        assert any("3 chips, all in their network" in line for line in lines), lines
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SLOW)
    assert process.returncode == 128 + signal.SIGINT
    state, last = errors.decode().splitlines()
    assert state == "interrupted; chips: all registers as before the quality control, by reading them back"
    assert last.endswith("interrupted by SIGINT")
    (network,) = tmp_path.glob("network_*.json")
    assert json.loads(network.read_text())["_config_type"] == "controller"
    assert "<svg" in network.with_suffix(".html").read_text()
    assert operator.state().result(LIMIT) == "STOP"
    checked = operator.validate_configuration().result(LIMIT)
    assert (checked["ok"], checked["chips"]) == (True, 3)
    names = ["enable_periodic_trigger", "external_trigger_mask", "channel_mask", "csa_testpulse_enable"]
    for chip in operator.read_configuration(None, names).result(LIMIT)["chips"].values():
        assert chip["enable_periodic_trigger"] == 0, "no triggers are left on"
        assert all(all(chip[name]) for name in names[1:]), "as at power-up"


def test_an_interruption_of_a_ramp_leaves_the_tile_off(tile, tmp_path):
    operator, core = tile
    with command(core, tmp_path, "--ramp") as process:
        lines_until(process, "tile 0")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=SLOW)
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted; chips: without power: their tiles were switched off" in errors.decode()
    (status,) = operator.board_status(supplies=False).result(LIMIT)
    assert status["tiles"] == []


def test_an_interruption_of_the_discovery_resets_the_chips(tile, tmp_path):
    operator, core = tile
    with command(core, tmp_path) as process:
        lines_until(process, "tiles are found")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SLOW)
    assert process.returncode == 128 + signal.SIGINT
    assert "interrupted; chips: power-up configuration, by a reset" in errors.decode()
    found = operator.discover_network(str(tmp_path / "again.json"), tiles=0, shape=SHAPE, reset=False).result(SLOW)
    assert found["chips"] == 3, "the chips can be discovered without another reset"


def test_a_discovery_as_a_routine_and_its_tile_in_the_report(tile, tmp_path):
    operator, _ = tile
    operator.power(True, tiles=[0], vdda_dac=46000, vddd_dac=31000).result(LIMIT)
    file = tmp_path / "found.json"
    request = operator.run_routine("discover_network", str(file), tiles=0, shape=SHAPE)
    found = request.result(SLOW)
    assert (found["chips"], found["missing"], found["file"]) == (3, 1, str(file))
    assert operator.get_boards().result(LIMIT)["chips"] == 3
    assert operator.configure_network().result(SLOW)["ok"]
    result = operator.run_routine("qc", steps=["registers"], network=found, directory=str(tmp_path)).result(SLOW)
    assert not result["ok"], "a chip is missing"
    limit = result["limits"][0]
    assert (limit["step"], limit["outside"], limit["channels"], limit["verdict"]) == ("network", 1, 4, "FAIL")
    assert result["network"]["faults"] == found["faults"]
    page = Path(result["files"][0]).read_text()
    assert "no answer from chip 12" in page
    assert page.count("<svg") == 1
    assert "<script" not in page
    operator.load_board(str(file)).result(LIMIT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("tile.json", "--shape", "5x5"), "--shape, --exclude are for a discovery, without FILE"),
        (("--limits", "wrong.json"), "wrong.json: damaged JSON"),
        (("--limits", "list.json"), "list.json: expected a JSON object, found list"),
        (("--limits", "none.json"), "none.json: No such file"),
        (("--leave-off", "off.json"), "off.json: chip 1-1-11: expected a list of channels, found 5"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, options, says):
    for name, text in {"wrong": "{", "list": "[]", "off": '{"1-1-11": 5}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    start = [sys.executable, "-m", "larpixdaq", "qc", *options]
    done = subprocess.run(start, capture_output=True, text=True, timeout=LIMIT, check=False, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
