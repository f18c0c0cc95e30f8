"""Snapshots of emulated chips' configurations: saved, compared, loaded, and as files; lists of disabled channels."""

import json
import shutil

import pytest
from emulated_board import Emulator
from processes import LIMIT
from system import system

from larpixdaq import cli
from larpixdaq.control.snapshots import ChipRegisters as Registers
from larpixdaq.control.snapshots import Snapshot, make, pack, read
from larpixdaq.errors import ConfigError, FileError, RequestError
from larpixdaq.hardware.actions import ChipActions
from larpixdaq.hardware.chip_state import ChipState
from larpixdaq.hardware.power import no_progress
from larpixdaq.hardware.producer_link import ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.hardware.snapshots import SnapshotActions
from larpixdaq.protocol.hardware import BoardInfo, Setup
from larpixdaq.schema import ASICS

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


class Actions:
    """The actions on snapshots of these chips, without a board: enforce_configuration() answers what it is given."""

    def __init__(self, monkeypatch, asic, *keys):
        setup = Setup([BoardInfo(1, "pacman", "board")], asic, int(ASICS[asic]), 2)
        self.chips = ChipState(ChipRegisters(asic), ProducerPipe(None, setup))
        self.chips.find(list(keys))
        self.actions = SnapshotActions(self.chips, no_progress)
        monkeypatch.setattr(ChipActions, "enforce_configuration", lambda self, keys: {"enforced": keys})

    def load(self, chips, *, asic="", **more):
        return self.actions.load_snapshot(pack(Snapshot(1, {k: Registers(v) for k, v in chips.items()}, asic)), **more)

    def wanted(self, key, *names):
        values = self.chips.wanted[self.chips.find(key)]
        return [self.chips.registers.values_by_name(values, [name])[name][0] for name in names]


def test_registers_of_network_and_lines_stay_as_they_were_brought_up(monkeypatch):
    made = Actions(monkeypatch, "2b", "1-1-11", "1-1-12")
    made.chips.registers.change(made.chips.wanted, {"i_tx_diff0": 0, "tx_slices0": 15, "enable_posi": [0, 1, 0, 0]})
    loaded = made.load({"1-1-11": {"i_tx_diff1": 3, "enable_posi": [1] * 4, "chip_id": 99, "csa_gain": 1}})
    assert (loaded["enforced"], loaded["unchanged"]) == (["1-1-11"], ["1-1-12"])
    # i_tx_diff0 shares its register with i_tx_diff1, which is named.
    names = ("i_tx_diff0", "i_tx_diff1", "tx_slices0", "enable_posi", "chip_id", "csa_gain")
    assert made.wanted("1-1-11", *names) == [0, 3, 15, [0, 1, 0, 0], 11, 1]
    assert made.wanted("1-1-12", *names) == [0, 12, 15, [0, 1, 0, 0], 12, 0]


def test_chips_are_found_on_other_io_channels_of_their_tile(monkeypatch):
    made = Actions(monkeypatch, "2b", "1-1-11", "1-5-11", "1-6-12", "1-7-13", "1-8-13")
    loaded = made.load({"1-4-11": {"threshold_global": 1}, "1-8-12": {"threshold_global": 2}})
    assert loaded["moved"] == {"1-4-11": "1-1-11", "1-8-12": "1-6-12"}
    keys = ("1-1-11", "1-5-11", "1-6-12")
    assert [made.wanted(key, "threshold_global") for key in keys] == [[1], [255], [2]]
    for chips, says in (
        ({"1-1-11": {}, "1-2-11": {}}, "chips 1-1-11 and 1-2-11 are both chip 1-1-11 here"),
        ({"1-6-13": {}}, "chip 1-6-13: on its tile are 1-7-13, 1-8-13"),
        ({"1-9-11": {}, "1-1-11": {}}, r"1 of its 2 chips are not among the 5 chips here: 1-9-11; nothing was loaded"),
        ({"1-1": {}}, "chip '1-1': expected a chip key"),
    ):
        with pytest.raises(RequestError, match=says):
            made.load(chips)
    with pytest.raises(RequestError, match=r"nothing was loaded$"):
        made.load({"1-9-11": {}}, skip_missing=True)
    assert made.wanted("1-1-11", "threshold_global") == [1]


def test_what_v3_chips_count_is_neither_saved_nor_loaded_nor_compared(monkeypatch):
    made = Actions(monkeypatch, "3", "1-1-11")
    place = made.chips.registers.addresses["total_packets_lsbs"][0]
    made.chips.wanted[0, place] = 77
    found = made.actions.retrieve_snapshot()
    assert found == {"asic": "3", "chips": {"1-1-11": {"chip_id": 11}}}
    made.load({"1-1-11": {"total_packets_lsbs": 5, "register 252": 3, "adc_hold_delay": 9}}, asic="3")
    assert made.wanted("1-1-11", "total_packets_lsbs", "adc_hold_delay") == [77, 9]
    assert made.chips.wanted[0, 252] == 3
    again = make("3", made.actions.retrieve_snapshot()["chips"])
    assert again.chips["1-1-11"].wanted == {"chip_id": 11, "adc_hold_delay": 9, "register 252": 3}
    assert made.actions.compare_snapshot(pack(again))["same"]
    with pytest.raises(RequestError, match="for chips of --asic 2b; this producer has --asic 3"):
        made.load({"1-1-11": {}}, asic="2b")


def test_a_snapshot_of_the_page_is_loaded(monkeypatch, tmp_path):
    made = Actions(monkeypatch, "2b", "1-1-11")
    chip = {"wanted": {"threshold_global": 5, "csa_enable": [0] * 64}, "confirmed": {"threshold_global": 6}}
    page = {"larpixdaq_snapshot": 1, "time": "x", "producer": "LArPix board", "run": None, "chips": {"1-1-11": chip}}
    (tmp_path / "page.json").write_text(json.dumps(page))
    made.actions.load_snapshot(pack(read(tmp_path / "page.json")))
    assert made.wanted("1-1-11", "threshold_global", "csa_enable") == [5, [0] * 64]


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
