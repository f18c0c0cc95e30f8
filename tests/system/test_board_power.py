"""Power and registers of emulated boards through real processes: limits, a board that restarts, the report in the
file, and chips of two generations in one run."""

import h5py
import pytest
from emulated_board import emulator
from processes import LIMIT, until
from system import rows_of, system

from larpixdaq.control.catalogue import read_audit
from larpixdaq.errors import RequestError

SLOW = 120.0
#: Low DACs, so that ramps are short: 0.39 and 0.31 V.
LOW = {"vdda_dac": 10_000, "vddd_dac": 8_000}


ROUTINE = """
from larpixdaq.routines import Routine


def _up(controller, send_data, send_info):
    limits = {"vdda_ma": 150}
    return controller, controller.io.power_up(0, 10_000, 8_000, limits, io_group=1, progress=send_info)


registration = {"up": Routine("up", _up, [])}
"""


def messages(file):
    """Return the INFO messages of a file as one text."""
    with h5py.File(file) as opened:
        return b"".join(opened["messages"]["message"]).decode()


def test_a_tile_that_draws_too_much_is_off_and_the_report_is_in_the_file(line, tmp_path):
    chips = ("--chips", "200", "--asic", "2b", "--revision", "4", "--slow-read", "0")
    with emulator(*chips, "--overload", "1:900") as board:
        (tmp_path / "up.py").write_text(ROUTINE)
        source = ("--pacman", *board.addresses, "--asic", "2b", "--pacman-revision", "4")
        operator = line.start(*source, "--routines", tmp_path)
        report = operator.power_up(tiles=[0, 1], **LOW, limits={"vdda_ma": 150}).result(LIMIT)
        good, bad = report["tiles"]
        assert not report["ok"]
        assert (good["state"], good["fault"], bad["state"]) == ("on", "", "off")
        assert good["vdda_ma"] == pytest.approx(54, abs=2)  # 100 chips at 0.39 V
        assert "tile 1: vdda_ma is 1" in bad["fault"]
        assert "above its limit of 150; the tile was switched off" in bad["fault"]
        assert "vdda_ma ?" in operator.power_up(tiles=0, **LOW).readable(LIMIT)
        operator.power(False).result(LIMIT)
        assert operator.run_routine("up").result(LIMIT)["ok"]

        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        (status,) = operator.board_status().result(LIMIT)
        assert (status["tiles"], status["supplies"][0]["vdda_dac"]) == ([0], 10_000)
        ended = operator.end_run().result(LIMIT)
        text = messages(ended["files"][0])
        assert text.index("Power of io_group 1 (revision 4), ") < text.index("Beginning run")
        assert "VDDA/VDDD: tile 0 on 10000/8000 DAC, 38" in text
        assert text.count("Power of io_group 1") == 2, "before the run, and in it"

        rows = operator.write_board({"trigger_mask": 0xFF}).result(LIMIT)
        assert rows[0]["read_back"]
        assert operator.read_board("0x2014").result(LIMIT)[0]["value"] == 0xFF
        with pytest.raises(RequestError, match="registers end at 0x24fff"):
            operator.read_board(0x25000).result(LIMIT)

        def audited():
            return [row for row in read_audit(line.folder / "state") if row.action == "write_board"]

        until(lambda: len(audited()) == 2, "the rows of the audit")
        assert audited()[0].detail == "values={'trigger_mask': 255}, io_group=None"
        assert [row.outcome for row in audited()] == ["accepted", "done"]
        board.stop()
        assert "server_crashes" not in board.finish()["sent"]["1"]


def test_a_board_that_restarts_in_the_middle_of_a_ramp_leaves_a_known_state(line, tmp_path):
    chips = ("--chips", "100", "--asic", "2b", "--revision", "4", "--slow-read", "0", "--reboot", "0.5:1")
    with emulator(*chips, "--wait-for-go") as board:
        operator = line.start("--pacman", *board.addresses, "--asic", "2b", "--pacman-revision", "4")
        ramp = operator.power_up(tiles=0, vdda_dac=30_000, vddd_dac=20_000)
        for response in ramp:
            if "tile 0: vdda DAC 2000" in response.text:
                board.go()
        (row,) = ramp.result(LIMIT)["tiles"]
        assert row["state"] == "off"
        assert row["fault"].endswith("the tile was switched off")
        (status,) = operator.board_status().result(LIMIT)
        assert status["tiles"] == []
        assert operator.power_up(tiles=0, **LOW).result(LIMIT)["ok"], "the board works again"


def test_a_ramp_that_is_aborted_leaves_its_tile_off(line, tmp_path):
    chips = ("--chips", "100", "--asic", "2b", "--revision", "4", "--slow-read", "0")
    with emulator(*chips) as board:
        operator = line.start("--pacman", *board.addresses, "--asic", "2b", "--pacman-revision", "4")
        ramp = operator.power_up(tiles=0, vdda_dac=60_000, vddd_dac=60_000)
        for response in ramp:
            if "tile 0: vdda DAC 2000" in response.text:
                break
        operator.abort_routine().result(LIMIT)
        with pytest.raises(RequestError, match="aborted by the operator; tile 0 of io_group 1 is being switched off"):
            ramp.result(LIMIT)
        (status,) = operator.board_status().result(LIMIT)  # after the orders that switch the tile off
        assert status["tiles"] == []
        dacs = operator.read_board(["tiles", "tile_0_vdda_mv_raw"]).result(LIMIT)
        assert [row["value"] for row in dacs] == [0, 0]


def test_boards_with_chips_of_two_generations_are_read_by_two_producers_in_one_run(tmp_path):
    """As docs/operate.md says: v2a tiles on a board of revision 3, v2b tiles on one of revision 4."""
    network = tmp_path / "2.json", tmp_path / "2b.json"
    v2a = ("--chips", "4", "--asic", "2", "--revision", "3", "--power-on", "--write-network", str(network[0]))
    v2b = ("--chips", "4", "--asic", "2b", "--revision", "4", "--power-on", "--write-network", str(network[1]))
    with emulator(*v2a) as first, emulator(*v2b) as second, system(tmp_path) as started:
        operator = started.start(
            "--pacman", first.addresses[0], "--asic", "2", "--pacman-revision", "3", "--name", "v2a"
        )
        other = second.addresses[0].replace("1=", "2=", 1)
        text = network[1].read_text().replace('"1": {\n   "1"', '"2": {\n   "1"')
        network[1].write_text(text)
        producer = ("producer", "--core", started.core, "--state-dir", tmp_path / "state", "--ring-dir", started.rings)
        started.launch(
            *producer, "--ring", "64MiB", "--pacman", other, "--asic", "2b", "--pacman-revision", "4", "--name", "v2b",
            key="second",
        )  # fmt: skip

        def both():
            return {"v2a", "v2b"} <= {c["name"] for c in operator.components().result(LIMIT) if c["alive"]}

        until(both, "both producers")
        for name, file in zip(("v2a", "v2b"), network, strict=True):
            operator.load_board(str(file), component=name).result(LIMIT)
            assert operator.configure_network(component=name).result(LIMIT)["ok"]
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        for name, generation in (("v2a", "enable_miso_upstream"), ("v2b", "enable_piso_upstream")):
            assert operator.validate_configuration(None, generation, component=name).result(LIMIT)["ok"]
        ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE"
        (file,) = ended["files"]
        rows = rows_of(file)
        assert {1, 2} <= set(rows["io_group"].tolist())
        with h5py.File(file) as opened:
            configs = opened["run/configs"][:]
            assert not len(opened["configs"])
        found = {(int(row["io_group"]), row["asic"].decode()) for row in configs}
        assert found == {(1, "2"), (2, "2b")}


def test_a_board_with_32_uarts_has_the_clocks_of_the_right_io_channels(line, tmp_path):
    """Four tiles, the last two without their fourth io_channel. UARTs from the 12th on have other numbers."""
    network = tmp_path / "network.json"
    chips = ("--chips", "400", "--asic", "2b", "--revision", "5u32", "--power-on", "--write-network", str(network))
    with emulator(*chips) as board:
        operator = line.start("--pacman", *board.addresses, "--asic", "2b", "--pacman-uarts", "32")
        loaded = operator.load_board(str(network)).result(LIMIT)
        assert loaded["chips"] == 400
        result = operator.configure_network().result(SLOW)
        assert result["ok"], result
        keys = operator.retrieve_configuration(None, "chip_id").result(LIMIT)
        lines = {int(key.split("-")[1]) for key in keys}
        assert lines == {*range(1, 12), 13, 14, 15}
        operator.set_uart_clock(4, io_channel=13).result(LIMIT)
        silent = operator.validate_configuration(None, "chip_id").result(SLOW)["silent"]
        assert silent == [key for key in keys if key.startswith("1-13-")]
        operator.set_uart_clock(2, io_channel=13).result(LIMIT)
        operator.set_uarts(15, receive=False).result(LIMIT)
        silent = operator.validate_configuration(None, "chip_id").result(SLOW)["silent"]
        assert silent == [key for key in keys if key.startswith("1-15-")]
        operator.set_uarts(15, receive=True).result(LIMIT)
        assert operator.validate_configuration(None, "chip_id").result(SLOW)["ok"]
        with pytest.raises(RequestError, match="without 12, 16, 20 and so on, found 12"):
            operator.set_uart_clock(2, io_channel=12).result(LIMIT)
        found = operator.discover_network(str(tmp_path / "found.json"), tiles=2).result(SLOW)
        assert (found["chips"], found["faults"]) == (100, [])
        assert found["tiles"][0]["roots"] == {"9": 21, "10": 41, "11": 71}
