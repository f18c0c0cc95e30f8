"""Snapshots of emulated chips' configurations: saved, compared, loaded, and as files; lists of disabled channels."""

import json
import shutil

import pytest
from emulated_board import Emulator
from processes import LIMIT
from system import system

from larpixdaq import cli
from larpixdaq.errors import ConfigError, FileError, RequestError

SLOW = 60.0


@pytest.fixture(scope="module")
def chips(tmp_path_factory):
    """An Operator of a system whose board has 12 chips with their network, and the board file."""
    folder = tmp_path_factory.mktemp("snapshots")
    network = folder / "network.json"
    board = Emulator("--chips", "12", "--asic", "2b", "--power-on", "--write-network", str(network))
    try:
        with system(folder) as line:
            ports = board.ready["1"]
            operator = line.start("--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}", "--asic", "2b")
            operator.load_board(str(network)).result(LIMIT)
            assert operator.configure_network().result(SLOW)["ok"]
            operator.folder, operator.core, operator.keys = (
                folder,
                line.core,
                list(operator.retrieve_configuration(registers=0).result(LIMIT)),
            )
            yield operator
    finally:
        board.close()


def thresholds(operator):
    found = operator.read_configuration(registers="threshold_global").result(SLOW)["chips"]
    return {registers["threshold_global"] for registers in found.values()}


def test_a_snapshot_brings_the_registers_back(chips):
    first = chips.keys[0]
    trims = list(range(32)) * 2
    chips.send_configuration({"all": {"threshold_global": 40}, first: {"pixel_trim_dac": trims}}).result(SLOW)
    saved = chips.save_snapshot("night 1", "before the change").result(LIMIT)
    assert (saved["name"], saved["chips"]) == ("night 1", 12)
    (entry,) = chips.snapshots().result(LIMIT)
    assert (entry["name"], entry["asic"], entry["chips"], entry["comment"]) == (
        "night 1",
        "2b",
        12,
        "before the change",
    )
    assert chips.compare_snapshot("night 1").result(SLOW)["same"]

    chips.send_configuration(
        {"all": {"threshold_global": 99, "csa_gain": 1}, first: {"pixel_trim_dac": [3] * 64}}
    ).result(SLOW)
    found = chips.compare_snapshot("night 1").result(SLOW)
    assert (found["same"], found["chips"], found["different"]) == (False, 12, 12 + 12 + 62)
    assert {"chip": first, "register": "threshold_global", "address": 64, "snapshot": 40, "other": 99} in found[
        "differences"
    ]
    chips.save_snapshot("night 2").result(LIMIT)
    assert chips.compare_snapshot("night 1", "night 2").result(SLOW)["different"] == 12 + 12 + 62
    assert chips.compare_snapshot("night 2", "night 2").result(SLOW)["same"]

    loaded = chips.load_snapshot("night 1").result(SLOW)
    assert (loaded["ok"], loaded["chips"], loaded["written"]) == (True, 12, 12 + 12 + 62)
    assert (loaded["missing"], loaded["moved"], loaded["unchanged"]) == ([], {}, [])
    assert thresholds(chips) == {40}
    assert chips.read_configuration(first, "pixel_trim_dac").result(SLOW)["chips"][first]["pixel_trim_dac"] == trims

    with pytest.raises(RequestError, match="there is a snapshot 'night 1' already"):
        chips.save_snapshot("night 1").result(LIMIT)
    with pytest.raises(RequestError, match="there is no snapshot 'night 3'; did you mean night"):
        chips.load_snapshot("night 3").result(LIMIT)
    for name in ("a/b", "x.json", "", "a\nb"):
        with pytest.raises(RequestError, match="save_snapshot"):
            chips.save_snapshot(name).result(LIMIT)
    chips.remove_snapshot("night 2").result(LIMIT)
    assert [entry["name"] for entry in chips.snapshots().result(LIMIT)] == ["night 1"]


def test_folders_of_laboratories_are_written_and_read(chips):
    chips.send_configuration({"all": {"threshold_global": 50}}).result(SLOW)
    folder = chips.folder / "today"
    assert chips.write_snapshot(folder) == 12
    first = chips.keys[0]
    content = json.loads((folder / f"config_{first}.json").read_text())
    io_group, io_channel, chip_id = map(int, first.split("-"))
    meta = content.pop("meta")
    assert (meta["CHIP_KEY"], meta["ASIC_ID"], meta["ASIC_VERSION"]) == (first, f"{io_group}-1-{chip_id}", "2b")
    assert content["threshold_global"] == 50
    assert content["chip_id"] == chip_id
    assert "vref_dac" not in content  # only what differs from power-up
    with pytest.raises(FileError, match="exists already"):
        chips.write_snapshot(folder)

    # A chip that was on another io_channel of its tile, and registers that are not named: their power-up values.
    other = f"{io_group}-{io_channel % 4 + 1}-{chip_id}"
    assert other not in chips.keys
    (folder / f"config_{first}.json").rename(folder / f"config_{other}.json")
    (folder / f"config_{other}.json").write_text(
        json.dumps({"threshold_global": 51, "enable_posi": [0] * 4, "RESERVED": 0, "CHIP_KEY": other})
    )
    chips.send_configuration({"all": {"threshold_global": 60, "csa_gain": 1}}).result(SLOW)
    loaded = chips.load_snapshot(folder).result(SLOW)
    assert (loaded["ok"], loaded["moved"]) == (True, {other: first}), loaded
    found = chips.read_configuration(None, ["threshold_global", "csa_gain"]).result(SLOW)["chips"]
    assert {key: registers["threshold_global"] for key, registers in found.items()} == {
        key: 51 if key == first else 50 for key in chips.keys
    }
    assert {registers["csa_gain"] for registers in found.values()} == {0}

    # The page's own file, or one of this machine.
    assert chips.write_snapshot(chips.folder / "one.json", "night 1") == 1
    assert chips.compare_snapshot(chips.folder / "one.json", "night 1").result(SLOW)["same"]


def test_nothing_is_loaded_from_a_folder_with_a_mistake(chips):
    chips.send_configuration({"all": {"threshold_global": 70}}).result(SLOW)
    good = chips.folder / "good"
    chips.write_snapshot(good)
    chips.send_configuration({"all": {"threshold_global": 80}}).result(SLOW)
    first, last = chips.keys[0], chips.keys[-1]

    def changed(name, change):
        folder = chips.folder / name
        shutil.copytree(good, folder)
        change(folder)
        return folder

    def rewrite(key, **registers):
        def change(folder):
            file = folder / f"config_{key}.json"
            content = json.loads(file.read_text())
            content["meta"] |= registers.pop("meta", {})
            file.write_text(json.dumps(content | registers))

        return change

    def all_of(**meta):
        return lambda folder: [rewrite(key, meta=dict(meta))(folder) for key in chips.keys]

    cases = [
        ("unknown", rewrite(last, threshold_globl=3), RequestError,
         f"config_{last}.json: chip {last}: register 'threshold_globl': v2b chips have none of this name; close to it"),
        ("large", rewrite(last, threshold_global=256), RequestError,
         f"config_{last}.json: chip {last}: register threshold_global: 256: value must be between 0 and 255"),
        ("short", rewrite(last, channel_mask=[0] * 63), RequestError,
         f"config_{last}.json: chip {last}: register channel_mask: expected a list of 64 values"),
        ("damaged", lambda folder: (folder / f"config_{last}.json").write_text("{"), ConfigError,
         f"config_{last}.json: damaged JSON"),
        ("generation", all_of(ASIC_VERSION=2), RequestError,
         f"config_{first}.json: for chips of --asic 2; this producer has --asic 2b"),
        ("others", lambda folder: (folder / f"config_{last}.json").rename(folder / "config_1-9-99.json"), ConfigError,
         "its name says 1-9-99"),
        ("missing", lambda folder: (folder / "config_1-9-99.json").write_text("{}"), RequestError,
         "1 of its 13 chips are not among the 12 chips here: 1-9-99; nothing was loaded .skip_missing=True"),
        ("no snapshot", lambda folder: None, ConfigError, "expected a snapshot"),
    ]  # fmt: skip
    for name, change, error, says in cases:
        folder = changed(name, change)
        path = folder / f"config_{first}.json" if name == "no snapshot" else folder
        with pytest.raises(error, match=says):
            chips.load_snapshot(path).result(SLOW)
        wanted = chips.retrieve_configuration(registers="threshold_global").result(LIMIT)
        assert {values["wanted"]["threshold_global"] for values in wanted.values()} == {80}, name
    assert thresholds(chips) == {80}
    loaded = chips.load_snapshot(chips.folder / "missing", skip_missing=True).result(SLOW)
    assert (loaded["ok"], loaded["missing"]) == (True, ["1-9-99"])
    assert thresholds(chips) == {70}


def test_snapshots_on_the_command_line(chips, capsys):
    def run(*arguments, status=0):
        assert cli.main(["snapshot", arguments[0], "--core", chips.core, *map(str, arguments[1:])]) == status
        out = capsys.readouterr()
        return out.err if status and not out.out else out.out

    chips.send_configuration({"all": {"threshold_global": 100}}).result(SLOW)
    chips.release_control().result(LIMIT)
    try:
        assert run("save", "shell", "--comment", "by hand").startswith("shell: 12 chips saved, ")
        assert "shell  12 chips of --asic 2b, by " in run("list")
        assert run("compare", "shell") == "12 chips compared: 0 registers different\n"
        assert run("write", chips.folder / "shell").endswith(": 12 files written\n")
        for file in (chips.folder / "shell").iterdir():
            file.write_text(file.read_text().replace('"threshold_global": 100', '"threshold_global": 101'))
        assert "threshold_global: shell 100, " in run("compare", "shell", chips.folder / "shell", status=1)
        assert run("load", chips.folder / "shell").startswith(
            "12 chips: 3072 registers checked, 12 written, 0 different"
        )
        found = json.loads(run("compare", "shell", "--json", status=1))
        assert (found["different"], found["differences"][0]["other"]) == (12, 101)
        assert run("disabled", chips.folder / "list.json").endswith(f": {12 * 64} disabled channels\n")
        assert run("disable", chips.folder / "list.json").startswith("12 chips: ")
        assert run("remove", "shell") == "shell: removed\n"
        assert "there is no snapshot 'shell'" in run("load", "shell", status=1)
        assert "list.json: File exists" in run("disabled", chips.folder / "list.json", status=1)
    finally:
        chips.take_control().result(LIMIT)


def test_channels_are_disabled_by_list(chips):
    chips.send_configuration({"all": {"channel_mask": [0] * 64, "csa_enable": [1] * 64}}).result(SLOW)
    io_group, _, chip_id = chips.keys[0].split("-")
    place = f"{io_group}-1-{chip_id}"
    assert chips.disabled_channels().result(LIMIT) == {}
    assert chips.disable_channels({place: [6, 63], f"{io_group}-1-{chips.keys[1].split('-')[2]}": []}).result(SLOW) == {
        "chips": 1, "registers": 3 * 8,
    }  # fmt: skip
    assert chips.disabled_channels().result(LIMIT) == {place: [6, 63]}
    names = ["channel_mask", "periodic_trigger_mask", "csa_enable"]
    found = chips.read_configuration(chips.keys[0], names).result(SLOW)["chips"][chips.keys[0]]
    assert [channel for channel in range(64) if found["channel_mask"][channel]] == [6, 63]
    assert [channel for channel in range(64) if not found["csa_enable"][channel]] == [6, 63]
    assert found["periodic_trigger_mask"][6] == found["periodic_trigger_mask"][63] == 1
    for channels, says in (
        ({place: [64]}, f"chip {place}: channel 64: expected 0 to 63; nothing was changed"),
        ({place: ["x"]}, "channel 'x': expected 0 to 63"),
        ({"1-2-99": [1]}, "chip 1-2-99 .io_group-tile-chip_id.: no chip here; nothing was changed"),
        ({"21": [1]}, "chip '21': expected io_group-tile-chip_id"),
        ({}, "expected .*io_group-tile-chip_id"),
    ):
        with pytest.raises(RequestError, match=says):
            chips.disable_channels(channels).result(SLOW)
    assert chips.disabled_channels().result(LIMIT) == {place: [6, 63]}
