"""Pixel layouts: positions of channels in both forms of file, invalid files, and layouts through the Operator."""

import json
import math

import numpy as np
import pytest
import yaml
from example_counts import examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import LIMIT, until
from system import system

from larpixdaq.errors import FormatError, RequestError
from larpixdaq.hardware import actions, pixel_layout
from larpixdaq.hardware.actions import LayoutActions
from larpixdaq.hardware.pixel_layout import LoadedLayout

BOARD = {
    "pixels": [[0, 1.5, 2.5, [], []], [7, 4.5, 2.5, [[1, 2]]], ["a", -1, 0]],
    "chips": [[12, [0, None, 7]], [13, ["a"]]],
    "x": 0,
    "y": 0,
    "width": 6,
    "height": 5,
}
#: Chip 11 has channels 0 and 2, chip 12 has channel 1. Tile 2 is turned round and on another anode.
TILES = {
    "multitile_layout_version": "2.4.16",
    "pixel_pitch": 4,
    "chip_channel_to_position": {11000: [0, 0], 11002: [1, 0], 12001: [2, 3]},
    "tile_chip_to_io": {1: {11: 1001, 12: 1002, 200: 1003}, 2: {11: 2001}},
    "tile_positions": {1: [-300, 100.0, 10.0], 2: [300, 0, 0]},
    "tile_orientations": {1: [1, 1, 1], 2: [-1, -1, -1]},
    "tile_indeces": {1: [1, 1], 2: [2, 1]},
    "tpc_centers": {1: [0, 0, 0], 2: [1, 2, 3]},
}


def parsed(content):
    return pixel_layout.parse(content, "layout-2.4.0.yaml", "/somewhere/layout-2.4.0.yaml")


def test_a_board_has_the_pixel_of_each_channel():
    layout = parsed(BOARD)
    np.testing.assert_equal(layout.positions("12"), [[1.5, 2.5], [np.nan, np.nan], [4.5, 2.5]])
    assert layout.describe("12") == {"x": [1.5, None, 4.5], "y": [2.5, None, 2.5], "z": 0.0, "tile": None}
    assert layout.find("3-4-13") == layout.find(13) == "13"  # the file has only chip_ids
    summary = layout.summary()
    assert (summary["version"], summary["pixels"], summary["chips"], summary["tiles"]) == ("2.4.0", 3, 2, 1)
    assert (summary["x"], summary["y"]) == ([-1, 4.5], [0, 2.5])
    keys = parsed(BOARD | {"chips": [["1-2-12", [0]]]})
    assert list(keys.chips) == ["1-2-12"]
    with pytest.raises(RequestError, match=r"chip 1-3-12: not among the 1 chips of pixel layout layout-2\.4\.0"):
        keys.find("1-3-12")


def test_tiles_are_placed_and_turned():
    layout = parsed(TILES)
    assert list(layout.chips) == ["1-1-11", "1-2-12", "2-1-11"]  # chip 200 has no pixels
    # A tile is 12 x 16 mm: the pixels of a corner are at -4 and -6.
    np.testing.assert_equal(layout.positions("1-1-11"), [[6, 94], [np.nan, np.nan], [10, 94]])
    np.testing.assert_equal(layout.positions([1, 2, 12]), [[np.nan, np.nan], [14, 106]])
    assert layout.describe("2-1-11") == {"x": [5.0, None, 1.0], "y": [8.0, None, 8.0], "z": 303.0, "tile": 2}
    summary = layout.summary()
    assert (summary["version"], summary["pitch"], summary["pixels"], summary["tiles"]) == ("2.4.16", 4.0, 5, 2)
    # The first of these files had position and orientation in one.
    both = {tile: [TILES["tile_positions"][tile], TILES["tile_orientations"][tile]] for tile in (1, 2)}
    first = {name: found for name, found in TILES.items() if name != "tile_orientations"} | {"tile_positions": both}
    assert parsed(first).describe("2-1-11") == layout.describe("2-1-11")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "expected a mapping, found a list of 0"),
        ({"x": 1}, "expected pixels and chips, or chip_channel_to_position and tile_chip_to_io, found 'x'"),
        (BOARD | {"pixels": 3}, "pixels: expected a list, found 3"),
        (BOARD | {"pixels": [[1, 2]]}, "pixels: expected [id, x, y, ...], found a list of 2"),
        (BOARD | {"pixels": [[1, 2, "3"]]}, "pixel 1: expected a number, found '3'"),
        (BOARD | {"pixels": [[1, 2, math.nan]]}, "pixel 1: expected a number, found nan"),
        (BOARD | {"pixels": [[1, 2, 1 << 9999]]}, "pixel 1: expected a number, found a number of 10000 bits"),
        (BOARD | {"chips": [[12, [1]]]}, "chip 12, channel 0: there is no pixel 1"),
        (BOARD | {"chips": [[12, [[]]]]}, "chip 12, channel 0: there is no pixel a list of 0"),
        (BOARD | {"chips": [[300, []]]}, "chip: expected a chip_id from 0 to 255, found 300"),
        (BOARD | {"chips": [["one", []]]}, "chip 'one': expected a chip key"),
        (BOARD | {"chips": [[12, []], [12, []]]}, "chips: chip 12 comes twice"),
        (BOARD | {"chips": [[12, [0] * 257]]}, "chips: expected [chip, [pixel ids, 256 at most]], found a list of 2"),
        (TILES | {"pixel_pitch": None}, "pixel_pitch: expected a number, found None"),
        (TILES | {"chip_channel_to_position": {11256: [0, 0]}}, "expected 1000 * chip_id + channel_id, found 11256"),
        (TILES | {"chip_channel_to_position": {11000: [0]}}, "chip_channel_to_position 11000: expected 2 numbers"),
        (TILES | {"tile_chip_to_io": {1: 5}}, "tile_chip_to_io 1: expected {chip: io}, found 5"),
        (TILES | {"tile_chip_to_io": {1: {11: 1256}}}, "tile 1, chip 11: expected 1000 io_group + io_channel"),
        (TILES | {"tile_chip_to_io": {1: {11: 1}, 2: {11: 1}}}, "chip 0-1-11 is on tile 1 and on tile 2"),
        (TILES | {"tile_positions": {}}, "tile_positions of tile 1: expected 3 numbers, found None"),
        (TILES | {"tile_orientations": {1: [1, 1, "x"]}}, "tile_orientations of tile 1: expected a number, found 'x'"),
        (TILES | {"tpc_centers": {1: 0}}, "tpc_centers 1: expected 3 numbers, found 0"),
    ],
)
def test_invalid_layouts_are_refused_in_one_line(content, says):
    with pytest.raises(FormatError) as raised:
        parsed(content)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
_JUNK = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(), inner))


@settings(max_examples=examples(100))
@given(base=st.sampled_from([BOARD, TILES]), name=st.sampled_from([*BOARD, *TILES]), junk=_JUNK)
def test_junk_in_a_layout_gives_one_error_line_or_a_layout(base, name, junk):
    raised = ""
    try:
        layout = parsed(base | {name: junk})
    except FormatError as error:
        raised = str(error)
    else:
        layout.summary()
        for chip in layout.chips:
            json.dumps(layout.describe(chip), allow_nan=False)
    assert len(raised.splitlines()) <= 1


_BILLION = "a: &a [1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
_MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in zip("abcdefgh" * 8, "bcdefgha" * 8, strict=True)
)


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=100) | st.text("{}[]:&*!<- \n\"'ab1", max_size=60).map(str.encode))
@example(b"")
@example(b"!!python/object/apply:os.system [id]")
@example(b"pixels: !!python/tuple [1, 2]")
@example(b"a: 2020-13-45")
@example(b"a: &a [*a]\npixels: *a")
@example(b"[" * 100_000)
@example(b"0x" + b"f" * 9000)
@example(_BILLION.encode())
@example((_BILLION + "pixels: [*i]").encode())
@example(_MERGES.encode())
def test_any_bytes_give_one_error_line(tmp_path, data):
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    with pytest.raises(RequestError) as raised:
        pixel_layout.read(str(path))
    assert str(raised.value).startswith(f"pixel layout {path}: ")
    assert len(str(raised.value).splitlines()) == 1


def test_names_are_paths_or_files_of_larpix_geometry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"pixel layout 'layout-2\.4\.0\.yaml': no such file here"):
        pixel_layout.read("layout-2.4.0.yaml")
    with pytest.raises(RequestError, match="pixel layout"):
        pixel_layout.read("\0")
    (tmp_path / "installed/larpixgeometry/layouts").mkdir(parents=True)
    (tmp_path / "installed/larpixgeometry/__init__.py").touch()
    brought = tmp_path / "installed/larpixgeometry/layouts/layout-2.4.0.yaml"
    brought.write_text(yaml.safe_dump(BOARD))
    monkeypatch.syspath_prepend(tmp_path / "installed")
    assert pixel_layout.read("layout-2.4.0.yaml").summary()["file"] == str(brought)
    (tmp_path / "layout-2.4.0.yaml").write_text(yaml.safe_dump(TILES))
    assert pixel_layout.read("layout-2.4.0.yaml").version == "2.4.16"
    with open(tmp_path / "large.yaml", "wb") as large:
        large.truncate((16 << 20) + 1)
    with pytest.raises(RequestError, match="expected at most 16777216 bytes, found 16777217"):
        pixel_layout.read("large.yaml")


def test_an_answer_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(actions, "_MOST_LAYOUT_CHANNELS", 4)
    file = tmp_path / "tiles.yaml"
    file.write_text(yaml.safe_dump(TILES))
    layouts = LayoutActions(LoadedLayout(str(file)))
    assert list(layouts.retrieve_pixel_layout(["1-2-12"])["channels"]) == ["1-2-12"]
    with pytest.raises(RequestError, match="8 channels of 3 chips; one answer has at most 4: name fewer chips"):
        layouts.retrieve_pixel_layout()


ROUTINES = """
import os
from larpixdaq.routines import Routine

def _where(controller, send_data, send_info, chip):
    return controller, controller.io.positions(chip).tolist()

def _dies(controller, send_data, send_info):
    os._exit(3)

registration = {"where": Routine("where", _where, ["chip"]), "dies": Routine("dies", _dies, [])}
"""


def test_layouts_over_the_operator_and_the_death_of_the_child(tmp_path):
    (tmp_path / "routines").mkdir()
    (tmp_path / "routines/mine.py").write_text(ROUTINES)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(TILES))
    with system(tmp_path) as made:
        made.launch_core()
        made.launch_producer("--fake", "1000", "--routines", tmp_path / "routines")
        operator = made.operator()
        made.await_kinds(operator, "producer")
        with pytest.raises(RequestError, match=r"no pixel layout is known yet: load_pixel_layout\(name\) loads one"):
            operator.retrieve_pixel_layout().result(LIMIT)
        loaded = operator.load_pixel_layout(str(file)).result(LIMIT)
        said = until(lambda: made.status_of(operator, "producer")["pixel_layout"], "the layout in the status")
        assert {**loaded, "loaded": said["loaded"]} == said
        assert (loaded["file"], loaded["pixels"]) == (str(file), 5)
        with pytest.raises(RequestError, match=f"pixel layout {tmp_path}: |no such file"):
            operator.load_pixel_layout(str(tmp_path)).result(LIMIT)
        with pytest.raises(RequestError, match="its process ended with status 3"):
            operator.run_routine("dies").result(LIMIT)
        found = operator.retrieve_pixel_layout().result(LIMIT)
        assert found == loaded | {"channels": {one: parsed(TILES).describe(one) for one in parsed(TILES).chips}}
        assert list(operator.retrieve_pixel_layout("2-1-11").result(LIMIT)["channels"]) == ["2-1-11"]
        with pytest.raises(RequestError, match="chip 9-9-9: not among the 3 chips"):
            operator.retrieve_pixel_layout("9-9-9").result(LIMIT)
        where = operator.run_routine("where", "1-2-12").result(LIMIT)
        assert where[1] == [14.0, 106.0]
