"""The examples of the documentation, pasted as they stand there, with each kind of emulated board that has chips."""

import ast
import contextlib
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from emulated_board import Emulator, SerialEmulator
from system import system

from larpixdaq.constants import HARDWARE_ACTIONS
from larpixdaq.errors import RequestError
from larpixdaq.operator import Operator

DOCS = Path(__file__).parents[2] / "docs"
#: Of a detector with two of the tile's chips.
LAYOUT = {
    "multitile_layout_version": "2.4.16",
    "pixel_pitch": 4,
    "chip_channel_to_position": {11000: [0, 0], 12000: [1, 0]},
    "tile_chip_to_io": {1: {11: 1001, 12: 1001}},
    "tile_positions": {1: [0, 0, 0]},
    "tile_orientations": {1: [1, 1, 1]},
    "tile_indeces": {1: [1, 1]},
    "tpc_centers": {1: [0, 0, 0]},
}
#: What an Operator does with chips, boards and routines: each has to have an example.
METHODS = set(HARDWARE_ACTIONS) | {name for name in vars(Operator) if name.endswith(("routine", "routines"))}


def blocks(chapter):
    """The Python examples of a chapter."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / chapter).read_text(), re.M | re.S)


def missing(kind):
    """The methods that boards of this kind do not have, as the table in chips.md says."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", (DOCS / "chips.md").read_text(), re.M)
    column = ("pacman", "bern", "serial").index(kind)
    return {name for name, *cells in rows if not cells[column].strip()}


def paste(example, names, cannot):
    """Run it, one statement after the other; those with a method that the board does not have must say so."""
    for statement in ast.parse(example).body:
        code = compile(ast.Module([statement], []), "example", "exec")
        called = {node.attr for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
        with contextlib.ExitStack() as stack:
            for method in called & cannot:
                stack.enter_context(pytest.raises(RequestError, match=f"^{method}: .* io_group 1.* cannot do that"))
            exec(code, names)


@pytest.fixture(params=["pacman", "serial"])
def board(request, tmp_path, monkeypatch):
    """The kind of board, and how a producer is told of it. The files that the examples name are here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routines" / "more").mkdir(parents=True)
    (tmp_path / "multi_tile_layout-2.4.16.yaml").write_text(str(LAYOUT))
    drawing = plt.get_backend()
    plt.switch_backend("template")  # which draws nothing
    chips = ("--chips", "4", "--asic", "2b", "--write-network", "tile.json")
    if request.param == "serial":
        made = SerialEmulator(*chips)
        source = made.device
    else:
        made = Emulator(*chips)
        source = made.addresses[0]
    yield request.param, f"--{request.param}", source
    made.close()
    plt.close("all")
    plt.switch_backend(drawing)


def test_examples_of_chips_and_routines(board, tmp_path, monkeypatch):
    kind, *source = board
    asked, ask = set(), Operator._producer

    def noted(self, component, action, **params):
        asked.add(action)
        return ask(self, component, action, **params)

    monkeypatch.setattr(Operator, "_producer", noted)
    (tmp_path / "system").mkdir()
    with system(tmp_path / "system") as made:
        made.start(*source, "--asic", "2b", "--routines", "routines")
        monkeypatch.setattr(Operator.__init__, "__defaults__", (made.core,))
        names = {}
        examples = [example for chapter in ("chips.md", "routines.md") for example in blocks(chapter)]
        for example in examples:
            if example.startswith("# "):  # a file
                (tmp_path / "routines" / example.split()[1]).write_text(example)
        for example in examples:
            if re.search(r"\bo\.", example) and '"calibrate"' not in example:  # which takes minutes
                paste(example, names, missing(kind))
        forced = names["o"].retrieve_configuration(None, "enable_periodic_trigger").result(20)
        assert [chip["wanted"]["enable_periodic_trigger"] for chip in forced.values()] == [0] * 4
        assert names["o"].validate_configuration().result(20)["ok"], "examples leave the chips as they found them"
        names["o"].close()
    assert missing("serial") == {"ping", "power"}
    assert names["forced"] > 100
    assert len(names["result"]["chips"]) == 4
    assert asked >= METHODS, f"without an example: {METHODS - asked}"
