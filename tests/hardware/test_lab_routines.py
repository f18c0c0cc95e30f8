"""The routines that labs use daily, on an emulated tile: their numbers against the emulator's own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from emulated_board import Emulator
from processes import LIMIT

from larpixdaq.emulators.noise import DAC_STEP, PULSE_STEP
from larpixdaq.errors import RequestError

SLOW = 180.0
CHIPS = 6
FLIPS = 2e-4
#: Limits for each of some hundred channels, in standard deviations.
SIGMAS = 5.5
LEAVES_ON = '''
from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips

def _leave_on(controller, send_data, send_info):
    """Forgets its triggers."""
    Chips(controller, "1-1-11").set(periodic_trigger=1, external_trigger_mask=0)
    return controller, "done"

registration = {"leave_on": Routine("leave_on", _leave_on)}
'''


class Tile:
    """A powered, configured tile with the emulator's truth, and an Operator for it."""

    def __init__(self, line, folder, *planted):
        network, truth = folder / "network.json", folder / "truth.json"
        options = ("--chips", str(CHIPS), "--asic", "2b", "--write-network", str(network), "--truth", str(truth))
        self.board = Emulator(*options, *planted, "--power-on", "--lossless")
        (folder / "routines").mkdir()
        (folder / "routines" / "leave_on.py").write_text(LEAVES_ON)
        ports = self.board.ready["1"]
        where = f"127.0.0.1:{ports['data']}:{ports['command']}"
        self.operator = line.start("--asic", "2b", "--routines", str(folder / "routines"), "--pacman", where)
        self.network = str(network)
        self.operator.load_board(self.network).result(LIMIT)
        self.configured = self.operator.configure_network().result(SLOW)
        truth = json.loads(truth.read_text())
        self.keys = list(truth["channels"])
        self.planted = truth["planted"]
        self.channels = {
            name: np.array([truth["channels"][key][name] for key in self.keys])
            for name in ("pedestal", "noise", "threshold", "noise_dac", "leakage")
        }

    def run(self, name, *args, **kwargs):
        return self.operator.run_routine(name, *args, **kwargs).result(SLOW)

    def marked(self, kind):
        """Return the planted channels of a kind, shape (chips, channels)."""
        marked = np.zeros((len(self.keys), 64), bool)
        for channel in self.planted.get(kind, []):
            key, _, number = channel.rpartition("-")
            marked[self.keys.index(key), int(number)] = True
        return marked

    def column(self, result, name):
        """Return a quantity of a result, shape (chips, channels), NaN where it is None."""
        rows = [result["chips"][key][name] for key in self.keys]
        return np.array([[np.nan if value is None else value for value in row] for row in rows])


def flags(tile, by_chip):
    marked = np.zeros((len(tile.keys), 64), bool)
    for key, channels in by_chip.items():
        marked[tile.keys.index(key), [int(channel) for channel in channels]] = True
    return marked


def pulls(found, error, true):
    known = ~np.isnan(found)
    assert not np.isnan(error[known]).any(), "each value has its uncertainty"
    return ((found - true) / error)[known]


@pytest.fixture
def good(line, tmp_path):
    tile = Tile(line, tmp_path, "--hot-channels", "3", "--dead-channels", "4")
    yield tile
    tile.board.close()


def test_pedestals_gain_s_curves_and_leakage_are_those_of_the_emulator(good, tmp_path):
    hot, dead = good.marked("hot_channels"), good.marked("dead_channels")
    normal = ~hot & ~dead
    before = good.operator.retrieve_configuration().result(LIMIT)
    counts_per_mv = good.channels["noise"][0, 0] / (good.channels["noise_dac"][0, 0] * DAC_STEP)

    pedestal = good.run("pedestal", samples=200, trigger_hz=100.0, leave_off={"1-1-11": [5]}, directory=str(tmp_path))
    found = flags(good, pedestal["bad"])
    assert (found == (hot | dead) & (good.column(pedestal, "samples") >= 0) & ~flags(good, {"1-1-11": [5]})).all()
    assert (flags(good, pedestal["disable"]) == found | flags(good, {"1-1-11": [5]})).all()
    (key, channel) = good.planted["dead_channels"][0].rsplit("-", 1)
    assert pedestal["bad"].get(key, {}).get(channel, ["no samples"]) == ["no samples"]
    mean = good.column(pedestal, "mean")
    assert (np.isnan(mean) == dead | flags(good, {"1-1-11": [5]})).all()
    # Whole counts have an error beyond the normal one, of at most a tenth of a count for such noise.
    off = abs(mean - (good.channels["pedestal"] - 0.5))[normal & ~np.isnan(mean)]
    assert off.max() < SIGMAS * 1.1 / np.sqrt(150) + 0.05
    noise, error = good.column(pedestal, "noise_mv"), good.column(pedestal, "noise_mv_error")
    true_noise = good.channels["noise_dac"] * DAC_STEP
    pull = pulls(np.where(normal, noise, np.nan), error, true_noise)
    assert abs(np.median(pull)) < 0.5
    assert 0.7 < pull.std() < 1.3
    picture, numbers = map(Path, pedestal["files"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(numbers.read_text())["chips"] == pedestal["chips"]

    disable = pedestal["disable"]
    taken = ~flags(good, disable)
    good.operator.send_configuration({"all": {"threshold_global": 95}}).result(LIMIT)  # some 50 mV above the pedestals
    pulse = good.run("test_pulse", amplitude=60, pulses=20, leave_off=disable)
    assert pulse["disable"] == disable, pulse["bad"]
    gain = good.run("gain", leave_off=disable, pulses=20, directory=str(tmp_path))
    assert gain["disable"] == disable, gain["bad"]
    assert gain["uv_per_electron"] is None
    slope, error = good.column(gain, "gain"), good.column(gain, "gain_error")
    assert (np.isnan(slope) == ~taken).all()
    pull = pulls(slope, error, PULSE_STEP * counts_per_mv)
    assert abs(pull).max() < SIGMAS
    assert 0.8 < pull.std() < 1.2

    step = {key: values["pulse_mv"] for key, values in gain["chips"].items()}
    curve = good.run(
        "s_curve", leave_off=disable, pulses=20, step=2, most_noise=2500.0, pulse_mv=step, directory=str(tmp_path)
    )
    threshold, error = good.column(curve, "threshold"), good.column(curve, "threshold_error")
    assert np.isnan(threshold[taken]).mean() < 0.02
    assert flags(good, curve["bad"]).sum() == np.isnan(threshold[taken]).sum()
    true_threshold = good.channels["threshold"] * DAC_STEP
    pull = pulls(threshold, error, true_threshold + 30 * PULSE_STEP)
    assert abs(pull).max() < SIGMAS
    assert 0.8 < pull.std() < 1.2
    noise, error = good.column(curve, "noise_mv"), good.column(curve, "noise_mv_error")
    assert np.isnan(noise[taken]).mean() < 0.1
    pull = pulls(noise, error, true_noise)
    assert abs(np.median(pull)) < 0.6  # a fit of few counts makes widths some percent too small
    assert 0.7 < pull.std() < 1.3
    electrons = good.column(curve, "noise")
    assert np.allclose(electrons[~np.isnan(noise)], noise[~np.isnan(noise)] * 1000 / 4, rtol=1e-3)
    baseline = good.column(curve, "baseline")
    assert np.nanmax(abs(baseline - true_threshold)) < 6.0  # mV

    base = {key: values["baseline"] for key, values in curve["chips"].items()}
    leak = good.run("leakage", seconds=8.0, leave_off=curve["disable"], baseline=base)
    found, error = good.column(leak, "leakage_mv_s"), good.column(leak, "leakage_mv_s_error")
    assert leak["saturated"] == []
    assert abs(pulls(found, error, good.channels["leakage"])).max() < 7  # from few hits, Poisson's tails are long
    total = np.where(np.isnan(found), 0, good.channels["leakage"]).sum()
    assert np.nansum(found) == pytest.approx(total, rel=0.15)
    good.operator.send_configuration({"all": {"threshold_global": 255}}).result(LIMIT)
    after = good.operator.retrieve_configuration().result(LIMIT)
    assert {key: chip["wanted"] for key, chip in after.items()} == {key: chip["wanted"] for key, chip in before.items()}
    assert good.operator.validate_configuration().result(SLOW)["ok"], "all registers are restored"


def test_hot_channels_are_found_behind_full_lines(good):
    good.operator.send_configuration({"all": {"threshold_global": 93}}).result(LIMIT)
    result = good.run("trigger_rate", leave_off={}, most_hz=300.0, seconds=0.5, rounds=8)
    rates = good.column(result, "rate")
    assert result["rounds"] > 1
    assert result["saturated"] == []
    above = good.channels["threshold"]
    distance = 93 + 16 * 1.45 / DAC_STEP - above  # in DAC counts, with the trims of power-up
    true = 1e4 * np.exp(-(np.maximum(distance / good.channels["noise_dac"], 0) ** 2) / 2)
    true[good.marked("dead_channels")] = 0
    found = flags(good, result["disable"])
    assert found[true > 450].all()
    assert not found[true < 200].any()
    quiet = ~found & (true < 200)
    # Leakage adds some Hz.
    assert (abs(rates - true)[quiet] < 6 * np.sqrt((true[quiet] + 20) / 0.5) + 20).all()
    assert found[good.marked("hot_channels")].all()


def test_links_are_judged_by_their_own_errors(line, tmp_path):
    first = Tile(line, tmp_path)
    first.board.close()
    tree = first.operator.get_boards().result(LIMIT)
    assert tree["chips"] == CHIPS
    links = first_links(json.loads(Path(first.network).read_text()))
    noisy = next(link for link in links if any(other.startswith(link.split("/")[1] + "/") for other in links))
    (tmp_path / "noisy").mkdir()
    towards_the_board = "/".join(reversed(noisy.split("/")))
    tile = Tile(line, tmp_path / "noisy", "--flipping-links", towards_the_board, "--flips", str(FLIPS))
    try:
        result = tile.run("link_quality", words=3000, directory=str(tmp_path))
        errors = {name: link for name, link in result["links"].items() if link["errors"] > 5 * link["error"]}
        assert list(errors) == [noisy], "not the links behind it"
        assert result["bad_links"] == [noisy]
        expected = 1 - (1 - FLIPS) ** 64
        assert abs(errors[noisy]["errors"] - expected) < 5 * errors[noisy]["error"]
        # The mean of both directions, of which one flips no bits.
        assert errors[noisy]["bit_errors"] == pytest.approx(FLIPS / 2, rel=0.3)
        others = [link for name, link in result["links"].items() if name != noisy]
        assert all(link["errors"] <= link["limit"] < 0.01 for link in others)
        clean = [link for name, link in result["links"].items() if name.split("/")[0].count("-") == 1]
        assert all((link["errors"], link["bit_errors"]) == (0, 0) for link in clean)
        assert result["silent"] == result["twice"] == []
        assert result["bad_bits"] is not None
    finally:
        tile.board.close()


def first_links(network):
    """Return the links CHIP/CHIP of a network file, nearer chip first."""
    links = []
    for io_channel, each in network["network"]["1"].items():
        for node in each["nodes"]:
            if node["chip_id"] != "ext":
                links += [
                    f"1-{io_channel}-{node['chip_id']}/1-{io_channel}-{child}"
                    for child in node.get("miso_us", [])
                    if child
                ]
    return links


def test_a_routine_that_leaves_triggers_on_is_named(good):
    *_, last = good.operator.run_routine("leave_on")
    assert last.value == "done"
    assert last.text == (
        "the routine has left on: external triggers of 1 chips (1-1-11), periodic triggers of 1 chips (1-1-11)"
    )
    assert good.operator.validate_configuration().result(SLOW)["ok"], "and the wanted values say so"
    *_, last = good.operator.run_routine("leave_on")
    assert last.text == "", "they were on before"


def test_quality_control_of_a_tile_with_a_dead_chip_in_the_middle(line, tmp_path):
    whole = Tile(line, tmp_path)
    whole.board.close()
    links = first_links(json.loads(Path(whole.network).read_text()))
    middle = next(
        link.split("/")[1] for link in links if any(other.startswith(link.split("/")[1] + "/") for other in links)
    )
    behind = [link.split("/")[1] for link in links if link.startswith(f"{middle}/")]
    (tmp_path / "dead").mkdir()
    tile = Tile(line, tmp_path / "dead", "--dead-chips", middle, "--hot-channels", "2", "--dead-channels", "2")
    try:
        assert not tile.configured["ok"]
        folder = tmp_path / "qc"
        folder.mkdir()
        steps = ["registers", "link_quality", "pedestal", "calibrate", "trigger_rate", "test_pulse"]
        options = {"link_quality": {"words": 160}, "pedestal": {"samples": 50, "trigger_hz": 50.0}}
        result = tile.run(
            "qc",
            low=20.0,
            high=200.0,
            apply=True,
            steps=steps,
            options=options,
            directory=str(folder),
            title="<tile> 3",
        )
        assert not result["ok"]
        assert {middle, *behind} <= set(result["silent"])
        assert any(line_.startswith("chips without an answer") and middle in line_ for line_ in result["not_measured"])
        verdicts = {(limit["step"], limit["name"]): limit["verdict"] for limit in result["limits"]}
        assert verdicts["registers", "chips with wrong registers"] == "not measured"
        assert verdicts["calibrate", "channels within the rates"] == "pass"
        assert verdicts["pedestal", "std"] == verdicts["test_pulse", "seen"] == "pass"
        alive = ~np.isin(tile.keys, result["silent"])[:, None]
        planted = (tile.marked("hot_channels") | tile.marked("dead_channels")) & alive
        disabled = flags(tile, result["disable"])
        assert disabled[planted].all()
        assert (disabled & ~planted).sum() < 0.05 * disabled.size
        assert result["state"].startswith("calibrated: all registers")
        state = tile.operator.retrieve_configuration(None, ["channel_mask", "enable_periodic_trigger"]).result(LIMIT)
        for at, key in enumerate(tile.keys):
            if alive[at, 0]:
                assert (np.array(state[key]["wanted"]["channel_mask"], bool) >= disabled[at]).all()
                assert state[key]["wanted"]["enable_periodic_trigger"] == 0
        page, numbers = map(Path, result["files"])
        text = page.read_text()
        assert "<script" not in text
        assert not re.search(r'(src|href)="(?!data:)', text), "one file"
        assert text.count("data:image/png;base64,") == 5
        assert "&lt;tile&gt; 3: NOT PASSED" in text
        assert middle in text
        assert set(json.loads(numbers.read_text())["results"]) == set(steps)
    finally:
        tile.board.close()


def test_without_chips_or_network_there_is_one_clear_line(line, tmp_path):
    network = tmp_path / "network.json"
    board = Emulator("--chips", "4", "--asic", "2b", "--write-network", str(network))
    try:
        ports = board.ready["1"]
        operator = line.start("--asic", "2b", "--pacman", f"127.0.0.1:{ports['data']}:{ports['command']}")
        for routine in ("qc", "link_quality", "s_curve", "gain", "trigger_rate"):
            with pytest.raises(RequestError, match=r"no chips: load_board\(file\) loads them"):
                operator.run_routine(routine).result(SLOW)
        operator.load_board(str(network)).result(LIMIT)
        with pytest.raises(RequestError, match=r"qc: none of the 4 chips answers: power\(\) and configure_network\(\)"):
            operator.run_routine("qc", directory=str(tmp_path)).result(SLOW)
        with pytest.raises(RequestError, match=r"expected some of registers, .*, found nonsense"):
            operator.run_routine("qc", steps=["nonsense"]).result(SLOW)
        with pytest.raises(RequestError, match="options: pedestal has no parameter color; it has chips, samples, "):
            operator.run_routine("qc", options={"pedestal": {"color": 3}}).result(SLOW)
        with pytest.raises(RequestError, match="directory: /nowhere: no such directory"):
            operator.run_routine("qc", directory="/nowhere").result(SLOW)
        with pytest.raises(RequestError, match="leave_off: 1-1-99: expected a chip and its channels, found"):
            operator.run_routine("pedestal", leave_off={"1-1-99": [3]}).result(SLOW)
    finally:
        board.close()
