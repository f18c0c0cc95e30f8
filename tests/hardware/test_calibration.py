"""The routines of larpix-daq on emulated tiles, through board, producer and Operator, during a run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulated_board import Emulator, SerialEmulator
from processes import LIMIT, until
from system import rows_of, system

from larpixdaq.errors import RequestError

SLOW = 180.0
DAC_MV, TRIM_MV = 7.03125, 1.45
EARLIER_V1 = '''
from larpixdaq.routines import Routine
import copy

def _threshold(controller, send_data, send_info, *args):
    """threshold(chip, value): writes a global threshold and reads it back."""
    chip_key, value = args[0], int(args[1])
    chip = controller[chip_key]
    before = copy.deepcopy(chip.config)
    chip.config.global_threshold = value
    controller.write_configuration(chip_key, 32)
    controller.read_configuration(chip_key, 32)
    send_data(b"")
    found = [p.register_data for p in controller.reads[-1] if p.packet_type == p.CONFIG_READ_PACKET]
    chip.config = before
    controller.write_configuration(chip_key, 32)
    return controller, found

registration = {"threshold": Routine("threshold", _threshold, ["chip", "value"])}
'''
EARLIER_V2 = """
from larpixdaq.routines import Routine

def _rates(controller, send_data, send_info, *args):
    chip_key = args[0]
    run_time = float(args[1])
    chip = controller[chip_key]
    chip.config.threshold_global = 85
    chip.config.channel_mask = [0] * 64
    controller.write_configuration(chip_key)
    controller.io.empty_queue()
    controller.run(run_time, message="rates {}".format(chip_key))
    packets = [p for p in controller.reads[-1] if getattr(p, "chip_key", None) == chip_key and p.packet_type == 0]
    send_info("{} Hz".format(len(packets) / run_time))
    ok, different = controller.verify_configuration([chip_key])
    return controller, [ok, len(packets)]

registration = {"rates": Routine("rates", _rates, ["chip", "run_time"])}
"""


def tile(tmp_path, chips, *more):
    network = tmp_path / "network.json"
    truth = tmp_path / "truth.json"
    options = ("--chips", str(chips), "--asic", "2b", "--write-network", str(network), "--truth", str(truth), *more)
    return Emulator(*options, "--power-on", "--lossless"), network, truth


@pytest.fixture
def small(line, tmp_path, request):
    """An Operator in a run, with four configured chips or as many as a test requests."""
    board, network, truth = tile(tmp_path, getattr(request, "param", 4))
    (tmp_path / "routines").mkdir()
    (tmp_path / "routines" / "rates.py").write_text(EARLIER_V2)
    ports = board.ready["1"]
    try:
        where = f"127.0.0.1:{ports['data']}:{ports['command']}"
        operator = line.start("--asic", "2b", "--routines", str(tmp_path / "routines"), "--pacman", where)
        bring_up(operator, network)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        yield operator, json.loads(truth.read_text())
    finally:
        board.close()


def bring_up(operator, network):
    operator.power(True).result(LIMIT)
    operator.load_board(str(network)).result(LIMIT)
    assert operator.configure_network().result(SLOW)["ok"]


@pytest.mark.timeout(300)
def test_the_demo_brings_up_calibrates_and_reads_out(tmp_path):
    """A tile of 100 chips in a run without losses: all planted hot and dead channels are found.

    The other channels have the wanted rates, according to the emulator's own numbers.
    """
    demo = [sys.executable, "-m", "larpixdaq", "demo", "--calibrate", "--seconds", "1", "--json", "-o", str(tmp_path)]
    done = subprocess.run(demo, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["ok"], outcome["lost"], outcome["verified"]) == (True, 0, True)
    rows = np.concatenate([rows_of(path) for path in outcome["files"]])
    here = np.count_nonzero((rows["direction"] == 1) & np.isin(rows["packet_type"], (0, 1, 2, 3, 6, 7)))
    assert outcome["sent"] == outcome["stored"] == here > 10_000

    calibration = outcome["calibration"]
    assert calibration["registers_ok"]
    assert calibration["saturated_after"] == []
    assert (
        calibration["hot_found"]
        == calibration["hot_planted"]
        == calibration["dead_found"]
        == calibration["dead_planted"]
        == 8
    )
    assert calibration["within"] >= 0.95 * calibration["live"]
    picture, report = map(Path, calibration["report"])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    result, truth_ = (json.loads(Path(path).read_text()) for path in (report, calibration["truth"]))
    assert (result["live"], result["within"]) == (calibration["live"], calibration["within"])

    hot, dead = ({tuple(k.rsplit("-", 1)) for k in truth_["planted"][f"{name}_channels"]} for name in ("hot", "dead"))
    disabled, silent = (
        {(key, str(channel)) for key, channels in result[name].items() for channel in channels}
        for name in ("disable", "dead")
    )
    assert silent == dead
    assert hot <= disabled
    # Some channels are beyond the range of their trims, because a step of the global threshold is five trim steps.
    assert len(disabled) <= len(hot) + 0.02 * 6400
    rates = true_rates(truth_, result)
    live = [key for key in rates if key not in disabled | silent]
    good = [key for key in live if 0.8 * result["low_hz"] <= rates[key] <= 1.2 * result["high_hz"]]
    assert len(live) == calibration["live"]
    assert len(good) >= 0.95 * len(live), f"{len(good)} of {len(live)}"


def true_rates(truth_, result):
    """Return the rate (Hz) of each channel with the found thresholds, from the emulator's own numbers."""
    found = {}
    for key, trims in result["trims"].items():
        chip = truth_["channels"][key]
        above = result["thresholds"][key] + np.array(trims) * TRIM_MV / DAC_MV - np.array(chip["threshold"])
        hz = 1e4 * np.exp(-(np.maximum(above / np.array(chip["noise_dac"]), 0) ** 2) / 2)
        found |= {(key, str(channel)): float(value) for channel, value in enumerate(hz)}
    return found


@pytest.mark.parametrize("small", [100], indirect=True)
def test_routines_measure_the_values_of_the_emulator(small, tmp_path):
    operator, truth_ = small
    asked = operator.run_routine("quickstart", seconds=0.2).result(SLOW)
    assert (asked["ok"], asked["chips"], asked["different"]) == (True, 100, {})
    operator.send_configuration({"1-1-11": {"threshold_global": 100}}).result(LIMIT)
    before = operator.retrieve_configuration().result(LIMIT)

    pedestals = operator.run_routine("pedestal", samples=60, trigger_hz=30.0).result(SLOW)
    assert pedestals["left_out"] == 0
    for key, measured in pedestals["chips"].items():
        assert min(measured["samples"]) > 20
        channels = {name: np.array(values) for name, values in truth_["channels"][key].items()}
        # Seven standard deviations of the mean: 2e-8 for all channels together.
        sigma = np.sqrt((channels["noise"] ** 2 + 1 / 12) / np.array(measured["samples"]))
        assert np.all(abs(np.array(measured["mean"]) - (channels["pedestal"] - 0.5)) < 7 * sigma + 0.02)

    pulses = operator.run_routine("test_pulse", "1-1-11", [3, 5], amplitude=40, pulses=5).result(SLOW)
    quiet = operator.run_routine("test_pulse", "1-1-11", [3], amplitude=1, pulses=5).result(SLOW)
    assert quiet["chips"]["1-1-11"]["3"]["pulses"] == 0
    with pytest.raises(RequestError, match=r"channels: expected 0 to 63, found \[64\]"):
        operator.run_routine("test_pulse", channels=[64]).result(SLOW)

    for routine in ("threshold_scan", "leakage", "hot_channels"):
        with pytest.raises(RequestError, match="all channels are masked, as they are at power-up"):
            operator.run_routine(routine).result(SLOW)
    with pytest.raises(RequestError, match=r"low: .* io_channel 1-1 .* carries 75,758"):
        operator.run_routine("calibrate", 1000.0, 2000.0, directory=str(tmp_path)).result(SLOW)
    with pytest.raises(RequestError, match="no chip 9-9-9; load_board"):
        operator.run_routine("pedestal", "9-9-9").result(SLOW)
    after = operator.retrieve_configuration().result(LIMIT)
    assert after["1-1-11"]["wanted"] == before["1-1-11"]["wanted"], "all registers are restored"
    assert operator.validate_configuration().result(SLOW)["ok"]
    assert {channel: found["pulses"] for channel, found in pulses["chips"]["1-1-11"].items()} == {"3": 5, "5": 5}

    operator.send_configuration({"all": {"channel_mask": [0] * 64}}).result(SLOW)
    scan = operator.run_routine("threshold_scan", "1-1-11", start=110, stop=80, step=2, seconds=0.2).result(SLOW)
    sums = [sum(rates) for rates in scan["chips"]["1-1-11"]["rates"] if rates is not None]
    assert sums[0] < 100  # from leakage
    assert sums[-1] > 1000
    assert scan["thresholds"][: len(sums)] == list(range(110, 110 - 2 * len(sums), -2))


def test_leaking_and_hot_channels_are_found(small, tmp_path):
    """Triggers that another routine has left on do not count as natural hits, and are restored."""
    operator, _ = small
    left_on = {
        "enable_periodic_trigger": 1,
        "periodic_trigger_cycles": 200_000,  # 50 Hz
        "periodic_trigger_mask": [0] * 64,
        "external_trigger_mask": [0] * 64,
    }
    operator.send_configuration({"all": left_on}).result(LIMIT)
    # The coarse search takes at most 2 hits in 7.5 ms for quiet enough, which a channel of 2 kHz has with a chance of
    # 1e-4. Each round then moves it by one trim, a factor of 2.5 or more; with only 2 rounds it may end at 1 kHz. After
    # 8 rounds each channel has had at most 24 hits in 0.1 s (240 Hz). That it has 1000 Hz in the 0.5 s below
    # nevertheless has a chance of 1e-17, at a true rate of 800 Hz.
    found = operator.run_routine("calibrate", 20.0, 200.0, apply=True, directory=str(tmp_path), rounds=8, start=130)
    result = found.result(SLOW)
    assert result["applied"]
    assert max(result["thresholds"].values()) < 120, "nothing is counted at the initial threshold"
    assert sum(map(len, result["disable"].values())) < 10
    assert set(result["saturated"]) <= {"1-1", "1-2"}
    assert result["saturated_after"] == []
    hot = operator.run_routine("hot_channels", above_hz=1000.0, seconds=0.5).result(SLOW)
    assert (hot["hot"], hot["saturated"]) == ({}, [])
    truth_ = operator.retrieve_configuration(None, "pixel_trim_dac").result(LIMIT)
    trims = {chip: registers["wanted"]["pixel_trim_dac"] for chip, registers in truth_.items()}
    # A trim step multiplies a channel's rate by four. With half of the channels a step lower, the lines carry half of
    # their maximum of 75,758 packets/s, and four times the maximum of the slow clock.
    noisier = {
        chip: {"pixel_trim_dac": [max(0, trim - (channel & 1)) for channel, trim in enumerate(each)]}
        for chip, each in trims.items()
    }
    operator.send_configuration(noisier).result(LIMIT)
    fast = operator.run_routine("hot_channels", above_hz=1e5, seconds=0.5).result(SLOW)
    assert fast["saturated"] == []
    operator.send_configuration({"all": {"clk_ctrl": 3}}).result(LIMIT)
    operator.set_uart_clock(16, io_channel=[1, 2]).result(LIMIT)  # 9,470 packets/s
    slow = operator.run_routine("hot_channels", above_hz=1e5, seconds=0.5).result(SLOW)
    assert slow["saturated"] == ["1-1", "1-2"]
    operator.send_configuration({"all": {"clk_ctrl": 0}}).result(LIMIT)
    operator.set_uart_clock(2, io_channel=[1, 2]).result(LIMIT)
    operator.send_configuration({chip: {"pixel_trim_dac": each} for chip, each in trims.items()}).result(LIMIT)
    operator.send_configuration({"1-1-11": {"pixel_trim_dac": [0] * 64}}).result(LIMIT)
    hot = operator.run_routine("hot_channels", above_hz=1000.0, seconds=0.5, disable=True).result(SLOW)
    assert list(hot["hot"]) == ["1-1-11"]
    assert hot["saturated"] == ["1-1"]
    masks = operator.retrieve_configuration("1-1-11", "channel_mask").result(LIMIT)["1-1-11"]["wanted"]["channel_mask"]
    assert {str(channel) for channel, masked in enumerate(masks) if masked} >= set(hot["hot"]["1-1-11"])
    leaks = operator.run_routine("leakage", "1-1-12", seconds=1.0).result(SLOW)
    assert set(leaks["chips"]["1-1-12"]) >= {"with_reset", "without_reset", "leakage", "leakage_error"}
    assert leaks["saturated"] == []
    for chip in operator.retrieve_configuration(None, list(left_on)).result(LIMIT).values():
        assert {name: chip["wanted"][name] for name in left_on} == left_on
    assert operator.validate_configuration().result(SLOW)["ok"]


def test_routines_of_earlier_versions_run_unchanged(line, small):
    operator, _ = small
    ok, packets = operator.run_routine("rates", "1-1-11", 0.5).result(SLOW)
    assert ok
    assert packets > 100
    with pytest.raises(
        RequestError, match=r"tuple index out of range \(given 1 of the arguments of rates\(chip, run_time\)\)"
    ):
        operator.run_routine("rates", "1-1-11").result(SLOW)
    assert line.status_of(operator, "producer")["state"] == "RUN", "the readout continues"


def test_chips_of_every_generation_are_brought_up(tmp_path):
    """v1 on a serial line, v2 and LightPix: registers, networks and rates."""
    (tmp_path / "system").mkdir()
    boards, files = {}, {"1": "controller/pcb-1_chip_info.json"}
    try:
        boards["1"] = SerialEmulator()
        for asic in ("2", "lightpix-1"):
            files[asic] = str(tmp_path / f"{asic}.json")
            network = ("--asic", asic, "--write-network", files[asic])
            boards[asic] = Emulator("--chips", "4", "--power-on", *network, "--lossless")
        with system(tmp_path / "system") as made:
            made.launch_core()
            for asic, board in boards.items():
                at = ("--serial", board.device) if asic == "1" else ("--pacman", board.addresses[0])
                made.launch_producer("--name", asic, "--asic", asic, *at)
            operator = made.operator()
            until(lambda: len([c for c in operator.components().result(LIMIT) if c["alive"]]) == 3, "three producers")
            for asic, file in files.items():
                if asic != "1":
                    operator.power(True, component=asic).result(LIMIT)
                assert operator.load_board(file, component=asic).result(LIMIT)["chips"] == 4
                assert operator.configure_network(component=asic).result(SLOW)["ok"]
                assert operator.validate_configuration(component=asic).result(SLOW)["ok"]
                quick = operator.run_routine("quickstart", seconds=0.1, component=asic).result(SLOW)
                assert (quick["ok"], quick["chips"], quick["different"]) == (True, 4, {})
                channels = 32 if asic == "1" else 64
                operator.send_configuration({"all": {"channel_mask": [0] * channels}}, component=asic).result(LIMIT)
                scan = operator.run_routine(
                    "threshold_scan", start=100, stop=80, step=10, seconds=0.2, component=asic
                ).result(SLOW)
                rates = [sum(chip["rates"][1]) for chip in scan["chips"].values()]
                assert min(rates) > 10 * max(sum(chip["rates"][0]) for chip in scan["chips"].values())
    finally:
        for board in boards.values():
            board.close()
