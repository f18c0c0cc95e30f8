"""The examples of the documentation, run unchanged with each kind of emulated board that has chips."""

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
#: Layout of a detector with two chips of the tile.
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
#: Methods of an Operator for chips, boards and routines; each must have an example.
METHODS = set(HARDWARE_ACTIONS) | {name for name in vars(Operator) if name.endswith(("routine", "routines"))}


def blocks(chapter):
    """Return the Python examples of a chapter."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / chapter).read_text(), re.M | re.S)


def missing(kind):
    """Return the methods that boards of this kind do not have, from the table in chips.md."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", (DOCS / "chips.md").read_text(), re.M)
    column = ("pacman", "bern", "serial").index(kind)
    return {name for name, *cells in rows if not cells[column].strip()}


def paste(example, names, cannot):
    """Run an example, statement by statement. Methods in `cannot` must raise an error that names the board."""
    for statement in ast.parse(example).body:
        code = compile(ast.Module([statement], []), "example", "exec")
        called = {node.attr for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
        with contextlib.ExitStack() as stack:
            for method in called & cannot:
                stack.enter_context(pytest.raises(RequestError, match=f"^{method}: .* io_group 1.* cannot do that"))
            exec(code, names)


@pytest.fixture(params=["pacman", "serial"])
def board(request, tmp_path, monkeypatch):
    """Yield the kind of board, and the producer's options for it. Make the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routines" / "more").mkdir(parents=True)
    (tmp_path / "multi_tile_layout-2.4.16.yaml").write_text(str(LAYOUT))
    drawing = plt.get_backend()
    plt.switch_backend("template")  # draws nothing
    chips = ("--chips", "4", "--asic", "2b", "--write-network", "tile.json")
    if request.param == "serial":
        emulated = SerialEmulator(*chips)
        source = emulated.device
    else:
        emulated = Emulator(*chips)
        source = emulated.addresses[0]
    yield request.param, f"--{request.param}", source
    emulated.close()
    plt.close("all")
    plt.switch_backend(drawing)


def test_examples_of_chips_and_routines(board, tmp_path, monkeypatch):
    kind, *source = board
    requested, send = set(), Operator._producer

    def record(self, component, action, **params):
        requested.add(action)
        return send(self, component, action, **params)

    monkeypatch.setattr(Operator, "_producer", record)
    (tmp_path / "system").mkdir()
    with system(tmp_path / "system") as started:
        started.start(*source, "--asic", "2b", "--routines", "routines")
        monkeypatch.setattr(Operator.__init__, "__defaults__", (started.core,))
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
        assert names["o"].validate_configuration().result(20)["ok"], "examples do not change the chips' configuration"
        names["o"].close()
    assert missing("serial") == {
        "ping", "power", "power_up", "read_board", "write_board", "set_uarts", "set_trigger"
    }  # fmt: skip
    assert names["forced"] > 100
    assert len(names["result"]["chips"]) == 4
    assert requested >= METHODS, f"without an example: {METHODS - requested}"
