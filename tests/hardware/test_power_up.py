"""Ramped power-up with settings and limits, on models of command servers and on emulated boards."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pacman_server_models import MODELS, Boards

from larpixdaq.errors import RequestError
from larpixdaq.hardware import power as power_module
from larpixdaq.hardware import power_up as power_up_module
from larpixdaq.hardware.pacman_registers import REVISIONS
from larpixdaq.hardware.power_settings import parse_limits, parse_settings, read_settings
from larpixdaq.hardware.power_up import PowerActions
from larpixdaq.hardware.producer_link import BoardError
from larpixdaq.schema import Asic

#: As laboratories have it, with keys that do not concern power.
RUN_CONFIG = {
    "destination_dir_": "/data/",
    "io_group_pacman_tile_": {"1": [1, 3], "2": [2]},
    "iog_pacman_version_": {"1": "v1rev4", "2": "v1rev3b"},
    "io_group_asic_version_": {"1": 2, "2": 2},
    "iog_VDDD_DAC": {"1": [2_800] * 8, "2": [4_000, 4_100, 4_000, 4_000, 4_000, 4_000, 4_000, 4_000]},
    "iog_VDDA_DAC": {"1": [4_600] * 8, "2": 4_650},
}


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Record the pauses between steps instead of making them."""
    made = []
    monkeypatch.setattr(power_module.time, "sleep", made.append)
    return made


def boards(*revisions, file="", asic="2"):
    models = {group: MODELS[revision]() for group, revision in enumerate(revisions, 1)}
    link = Boards(models, dict(enumerate(revisions, 1)), Asic.V2, asic, file)
    return models, PowerActions(link, link.invalidate, power_module.no_progress, {}), link


def settings_file(tmp_path, **changes):
    file = tmp_path / "RUN_CONFIG.json"
    file.write_text(json.dumps(RUN_CONFIG | changes))
    return str(file)


@pytest.mark.parametrize("revision", [2, 3, 4, 5])
def test_a_tile_is_ramped_up_checked_and_its_chips_are_reset(revision):
    models, actions, link = boards(revision)
    report = actions.power_up(tiles=[0], vdda_dac=2_500, vddd_dac=1_200)
    model, (row,) = models[1], report["tiles"]
    assert report["ok"]
    assert (row["state"], row["fault"], row["vdda_dac"], row["vddd_dac"]) == ("on", "", 2_500, 1_200)
    assert row["vdda_mv"] == pytest.approx(model.mv("A", 0), abs=4)
    steps = [value for register, value in model.writes if value and register >= 0x24000]
    assert steps == [1000, 2000, 2500, 1000, 1200]
    assert model.writes[-3:] == [(0x1014, 4096), (0x1010, 6), (0x1010, 2)]
    assert link.invalidated
    ready = report["uncertain"], bool(report["doubts"])
    assert (
        ready
        == {
            2: ([], False),
            3: (["vdda_shunt_uv", "vddd_shunt_uv"], True),
            4: (["vdda_ma", "vddd_mv"], True),
            5: (["vdda_ma", "vddd_ma"], True),
        }[revision]
    )
    message = link.sent[-1]
    assert message.text.startswith(f"Power of io_group 1 (revision {revision}), 20")
    assert " UTC, VDDA/VDDD: tile 0 on 2500/1200 DAC, " in message.text
    assert ("?" in message.text) == (revision != 2)


def test_the_settings_of_a_laboratory_say_tiles_and_dacs(tmp_path):
    models, actions, _ = boards(4, 3, file=settings_file(tmp_path))
    report = actions.power_up()
    assert [(row["io_group"], row["tile"], row["vdda_dac"], row["vddd_dac"]) for row in report["tiles"]] == [
        (1, 0, 4_600, 2_800), (1, 2, 4_600, 2_800), (2, 1, 4_650, 4_100)
    ]  # fmt: skip
    assert report["ok"]
    assert (models[1].fpga[0x10], models[2].fpga[0x10]) == (0b101, 0b10)
    models, actions, _ = boards(4, 3, file=settings_file(tmp_path))
    actions.power_up(tiles=1, vdda_dac=100, io_group=1)  # arguments count more
    assert (models[1].dac["A", 1], models[1].dac["D", 1], models[2].writes) == (100, 2_800, [])


@pytest.mark.parametrize(
    ("asic", "changes", "inverted"),
    [
        ("2b", {}, True),
        ("2", {}, False),
        ("2b", {"line_inversion": {"1": False}}, False),
        ("2", {"line_inversion": {"1": True}}, True),
    ],
)
def test_the_lines_of_2b_tiles_or_as_the_settings_say_are_inverted(asic, changes, inverted, tmp_path):
    settings = {"io_group_asic_version_": {"1": asic}, "io_group_pacman_tile_": {"1": [2]}} | changes
    for file in (settings_file(tmp_path, **settings), json.dumps(RUN_CONFIG | settings)):  # a path, or JSON itself
        models, actions, _ = boards(4, file=file, asic=asic)
        actions.power_up()
        assert {register: value for register, value in models[1].writes if 0x3000 <= register < 0x24000} == {
            0x2000 + 0x1000 * io_channel + 0x1C: 3 for io_channel in (5, 6, 7, 8) if inverted
        }


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"vdda_ma": 90}, "vdda_ma is 100 with DAC 1000, above its limit of 90"),
        ({"vddd_ma": [0, 150]}, "vddd_ma is 200 with DAC 1000, above its limit of 150"),
        ({"vdda_mv": [1_800, None]}, "vdda_mv is 94 with DAC 2500, below its limit of 1800"),
        ({"vdda_mv": 50}, "vdda_mv is 75 with DAC 2000, above its limit of 50"),
    ],
)
def test_a_tile_outside_of_its_limits_is_switched_off_and_the_others_go_on(limits, says):
    models, actions, _ = boards(5)
    report = actions.power_up(tiles=[3, 4], vdda_dac=2_500, vddd_dac=1_200, limits=limits)
    model, first = models[1], report["tiles"][0]
    assert not report["ok"]
    assert (first["state"], [row["tile"] for row in report["tiles"]]) == ("off", [3, 4])
    assert says in first["fault"]
    assert first["fault"].endswith("the tile was switched off")
    assert (model.fpga[0x10], set(model.dac.values())) == (0, {0})


def test_a_voltage_above_its_dac_setting_ends_the_ramp_at_once():
    models, actions, _ = boards(4)
    models[1].mv = lambda supply, tile: 3300.0
    (row,) = actions.power_up(tiles=0, vdda_dac=46_000, vddd_dac=31_000)["tiles"]
    assert row["state"] == "off"
    assert "vdda_mv is 3300 with DAC 1000, expected 39 within 106" in row["fault"]
    assert max(value for register, value in models[1].writes if register == 0x24010) == 1000


def test_a_slow_board_is_read_at_a_few_steps_of_the_ramp_only():
    models, actions, _ = boards(4)
    actions.power_up(tiles=0, vdda_dac=46_000, vddd_dac=31_000)
    assert models[1].slept == 2 * (4 + 1)  # VDDD and its current, at four steps and at the end


def test_a_board_that_restarts_in_the_middle_is_noticed_and_its_tiles_are_off():
    models, actions, _ = boards(4)
    model, steps = models[1], []
    write = model.write

    def restart(offset, value):
        write(offset, value)
        steps.append(value)
        if steps.count(2000) == 2 and model.fpga[0x10] == 0b11:  # tile 1 is being ramped, tile 0 was on
            model.fpga.update({0x10: 0, 0x14: 0})

    model.write = restart
    report = actions.power_up(tiles=[0, 1], vdda_dac=2_500, vddd_dac=1_200)
    assert not report["ok"]
    assert [row["state"] for row in report["tiles"]] == ["off", "off"]
    assert "it is off again: the board has restarted" in report["tiles"][0]["fault"]
    assert "tile 1 is off again (register 0x10 reads 0x0): the board has restarted" in report["tiles"][1]["fault"]


def test_a_board_that_does_not_answer_any_more_leaves_its_tiles_unknown(pauses):
    _, actions, link = boards(4)
    ask, left = link.ask, [20]

    def dying(io_group, body, seconds=0.0):
        left[0] -= 1
        if left[0] < 0:
            raise BoardError("PACMAN io_group 1: no answer after 2 s")
        return ask(io_group, body, seconds)

    link.ask = dying
    report = actions.power_up(tiles=[0, 1], vdda_dac=46_000, vddd_dac=31_000)
    assert not report["ok"]
    assert [row["state"] for row in report["tiles"]] == ["not known", "not known"]
    assert "the tile cannot be switched off: PACMAN io_group 1: no answer" in report["tiles"][0]["fault"]
    assert "it was not begun" in report["tiles"][1]["fault"]
    assert pauses.count(1.0) == 4  # it tries again to switch the tile off


def test_tiles_that_are_on_are_left_alone_and_their_chips_are_not_reset():
    models, actions, _ = boards(4)
    models[1].fpga.update({0x10: 1, 0x14: 1})
    report = actions.power_up(tiles=[0, 1], vdda_dac=2_500, vddd_dac=1_200)
    assert report["ok"]
    assert report["tiles"][0]["fault"] == "it was on already, and was left as it is"
    assert report["tiles"][0]["vddd_ma"] == 400
    assert {register for register, _ in models[1].writes}.isdisjoint({0x1010, 0x24010})


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "no tiles, in the arguments or in settings"),
        ({"tiles": 0}, "tile 0: no vdda_dac, in the arguments or in settings; laboratories have used vdda_dac=46000, "),
        ({"tiles": 0, "vdda_dac": 46_000}, "tile 0: no vddd_dac"),
        ({"tiles": 9, "vdda_dac": 1, "vddd_dac": 1}, "tiles: a board of revision 4 has 0 to 7, found 9"),
        (
            {"tiles": 0, "vdda_dac": 1, "vddd_dac": 1, "limits": {"vdda_uv": 1}},
            "limits: boards of revision 4 have vdda",
        ),
        ({"tiles": 0, "vdda_dac": 1 << 16}, "vdda_dac: expected a whole number from 0 to 65535"),
        ({"tiles": 0, "limits": [1]}, "limits: expected {monitor: highest value or [lowest, highest]}"),
    ],
)
def test_what_is_missing_or_wrong_is_said_before_anything_is_written(params, says):
    models, actions, _ = boards(4, asic="2b")
    with pytest.raises(RequestError) as raised:
        actions.power_up(**params)
    assert says in str(raised.value)
    assert models[1].writes == []


def test_limits_in_ma_are_refused_where_the_unit_of_currents_is_not_established():
    _, actions, _ = boards(3)
    with pytest.raises(RequestError, match=r"vdda_shunt_uv.*unit of its currents is not established.*found vdda_ma"):
        actions.power_up(tiles=0, vdda_dac=1, vddd_dac=1, limits={"vdda_ma": 500})
    (row,) = actions.power_up(tiles=0, vdda_dac=1_000, vddd_dac=1_000, limits={"vdda_shunt_uv": 300})["tiles"]
    assert "vdda_shunt_uv is 400 with DAC 1000, above its limit of 300" in row["fault"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iog_pacman_version_": {"1": "v1rev5"}}, "its revision is 4, but .*RUN_CONFIG.json says 5"),
        ({"io_group_asic_version_": {"1": "2b"}}, "its producer has --asic 2, but .*RUN_CONFIG.json says 2b"),
        ({"iog_VDDA_DAC": {"1": [70_000]}}, "iog_VDDA_DAC: 1: expected a whole number from 0 to 65535, found 70000"),
        ({"iog_VDDA_DAC": {"1": []}}, "iog_VDDA_DAC: 1: expected 1 to 10 DAC settings, found 0"),
        ({"iog_VDDA_DAC": {"x": 1}}, "iog_VDDA_DAC: expected io_groups from 1 to 255 as keys, found 'x'"),
        ({"io_group_pacman_tile_": {"1": [0]}}, "io_group_pacman_tile_: 1: expected a whole number from 1 to 10"),
        ({"iog_pacman_version_": {"1": "rev9"}}, "iog_pacman_version_: 1: expected v1rev4 or the like, found 'rev9'"),
        ({"line_inversion": {"1": 1}}, "line_inversion: 1: expected true or false, found 1"),
        ({"power_limits": {"all": {"vdda_ma": "x"}}}, "limits: vdda_ma: expected a number or .lowest, highest., found"),
        ({"power_limits": {"1": {"vdda_mv": [2, 1]}}}, "limits: vdda_mv: the lowest value 2 is above the highest 1"),
    ],
)
def test_settings_that_are_wrong_or_for_other_boards_are_refused(changes, says, tmp_path):
    models, actions, _ = boards(4, file=settings_file(tmp_path, **changes))
    with pytest.raises(RequestError, match=says):
        actions.power_up(io_group=1)
    assert models[1].writes == []


def test_limits_in_the_settings_count_for_all_boards_or_one(tmp_path):
    limits = {"all": {"vdda_ma": 600, "vddd_ma": 700}, "2": {"vdda_ma": [1, 500]}}
    found = read_settings(settings_file(tmp_path, power_limits=limits))
    assert found[1].limits == {"vdda_ma": (None, 600), "vddd_ma": (None, 700)}
    assert found[2].limits == {"vdda_ma": (1, 500), "vddd_ma": (None, 700)}


def test_files_that_are_no_settings_are_named(tmp_path):
    file = tmp_path / "x.json"
    for content, says in (
        (b"{", "no JSON"),
        (b"[]", "expected an object"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff", "no JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=f"power settings {file}: {says}"):
            read_settings(str(file))
    with pytest.raises(RequestError, match="No such file"):
        read_settings(str(tmp_path / "y.json"))
    with pytest.raises(RequestError, match=r"^power settings: no JSON: "):
        read_settings("{no JSON")


_groups = st.sampled_from(["1", "2", "all", "x"])
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["v1rev4", "2b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_groups, inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
_keys = st.sampled_from([*RUN_CONFIG, "power_limits", "line_inversion"])


@given(st.dictionaries(_keys, _json, max_size=4) | _json)
def test_any_json_is_read_or_refused_in_one_line(content):
    try:
        found = parse_settings(content)
    except RequestError as error:
        lines = str(error).split("\n")
        assert len(lines) == 1
    else:
        assert all(0 <= dac <= 0xFFFF for board in found.values() for dacs in board.dacs.values() for dac in dacs)
        assert all(0 <= tile < 10 for board in found.values() for tile in board.tiles)


def test_limits_are_numbers():
    assert parse_limits({"vdda_ma": (None, 3)}) == {"vdda_ma": (None, 3)}
    for wrong in ({"a": True}, {"a": float("nan")}, {"a": [1]}, {"a": 10**400}, {1: 1}, "x"):
        with pytest.raises(RequestError):
            parse_limits(wrong)


def test_a_report_fits_into_a_message():
    from larpixdaq.protocol import hardware

    rows = [
        power_up_module._row(255, tile, "not known", {"vdda": 65_535}, {"vdda_mv": 1.5}, "x" * 600)
        for tile in range(10)
    ]
    text = power_up_module.report_text(power_up_module.power_report(255, REVISIONS[4], rows))
    ((answer,),) = [list(hardware.Inbox(requests=False).take(hardware.pack(hardware.PowerReport(1, text))))]
    assert answer.text == text
