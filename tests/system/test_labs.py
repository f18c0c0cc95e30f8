"""docs/labs.md, run as it is written: the emulated tile, the command, and the examples."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_board import Emulator
from system import system

from larpixdaq.operator import Operator
from larpixdaq.routines.qc import STEPS

PAGE = (Path(__file__).parents[2] / "docs" / "labs.md").read_text()
LIMIT = 280


def shell_line(command):
    """Return the arguments of the line of the page that begins with this command."""
    (line,) = re.findall(rf"^{command} (.*?)(?: &)?$", PAGE, re.M)
    return shlex.split(line)


@pytest.fixture
def tile(tmp_path, monkeypatch):
    """Start the page's tile and its system in a folder; return the folder and the core's address."""
    monkeypatch.chdir(tmp_path)
    for name in ("qc", "system"):
        (tmp_path / name).mkdir()
    (limits,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)
    (tmp_path / "limits.json").write_text(limits)
    board = Emulator(*shell_line("larpixdaq-emulator pacman"), "--truth", "truth.json")
    try:
        with system(tmp_path / "system") as started:
            started.start("--asic", "2b", "--pacman", board.addresses[0])
            yield started.core
    finally:
        board.close()


@pytest.mark.timeout(2 * LIMIT)
def test_the_command_brings_up_a_tile_and_reports(tile):
    start = [sys.executable, "-m", "larpixdaq", "qc", *shell_line("larpixdaq qc"), "--core", tile, "--json"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert (done.returncode, result["ok"], result["not_measured"]) == (0, True, []), result["limits"]
    assert {limit["verdict"] for limit in result["limits"]} == {"pass"}
    assert set(result["steps"]) == set(STEPS)
    planted = json.loads(Path("truth.json").read_text())["planted"]
    disabled = {f"{chip}-{channel}" for chip, channels in result["disable"].items() for channel in channels}
    assert disabled >= {*planted["hot_channels"], *planted["dead_channels"]}
    assert len(disabled) < 0.05 * 256
    assert result["state"] == "calibrated: all registers of 4 chips were read back as they were sent"
    page, numbers = map(Path, result["files"])
    assert "tile 3: PASSED" in page.read_text()
    assert json.loads(numbers.read_text())["ok"]


@pytest.mark.timeout(2 * LIMIT)
def test_the_examples_of_the_page(tile, monkeypatch):
    monkeypatch.setattr(Operator.__init__, "__defaults__", (tile,))
    names = {}
    for example in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
        exec(compile(example, "labs.md", "exec"), names)
    planted = json.loads(Path("truth.json").read_text())["planted"]
    disabled = {f"{chip}-{channel}" for chip, each in names["quality"]["disable"].items() for channel in each}
    assert disabled >= {*planted["hot_channels"], *planted["dead_channels"]}
    assert names["network"]["ok"]
    assert names["quality"]["state"].startswith("calibrated")
    assert names["ended"]["condition"].startswith("COMPLETE")
    assert names["links"]["bad_links"] == []


def test_a_board_file_that_is_missing_is_one_line(tile):
    start = [sys.executable, "-m", "larpixdaq", "qc", "nothing.json", "--core", tile]
    done = subprocess.run(start, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    assert "board file nothing.json: no such file" in done.stderr
    assert "Traceback" not in done.stderr
