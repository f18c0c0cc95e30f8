"""Routines with chips of the generations that larpix-control does not know, and with FIFO diagnostics."""

import json
from contextlib import closing

import numpy as np
import pytest
from emulated_board import Emulator
from processes import LIMIT

from larpixdaq.emulators.noise import DAC_STEP, PULSE_STEP

SLOW = 180.0
PACKETS = '''
from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips


def _packets(controller, send_data, send_info, cycles: int = 200_000):
    """Packets of periodic triggers, as larpix-control's Controller gives them: by channel, and what they have."""
    chips = Chips(controller)
    with chips.restored():
        chips.set(hit_veto=0, periodic_trigger_mask=0, periodic_trigger_cycles=cycles, periodic_trigger=1)
        controller.run(0.5, "packets")
    packets = [p for p in controller.reads[-1] if getattr(p, "packet_type", None) == getattr(p, "DATA_PACKET", -1)]
    seen = {}
    for packet in packets:
        assert packet.has_valid_parity() and packet.trigger_type == packet.PERIODIC_TRIG
        seen.setdefault(str(packet.chip_key), {}).setdefault(packet.channel_id, []).append(packet.dataword)
    events = [packet.shared_fifo_events for packet in packets]
    kinds = sorted({type(packet).__name__ for packet in packets})
    extracted = controller.reads[-1].extract("dataword", packet_type=packets[0].packet_type)
    exported = packets[0].export()
    return controller, [kinds, seen, events, len(extracted), exported["dataword"] == packets[0].dataword]


registration = {"packets": Routine("packets", _packets)}
'''


def started(line, folder, asic, *options):
    """Return a board with four chips and an Operator that has brought up their network."""
    network, truth = folder / "network.json", folder / "truth.json"
    emulated = ("--chips", "4", "--asic", asic, "--power-on", "--lossless", "--truth", str(truth))
    board = Emulator(*emulated, "--write-network", str(network))
    (folder / "packets.py").write_text(PACKETS)
    producer = ("--asic", asic, "--pacman", *board.addresses, "--routines", str(folder), *options)
    operator = line.start(*producer)
    operator.load_board(str(network)).result(LIMIT)
    assert operator.configure_network().result(SLOW)["ok"]
    if asic == "3":  # channels of v3 chips are off at power-up
        operator.send_configuration({"all": {"csa_enable": [1] * 64}}).result(LIMIT)
    return board, operator, json.loads(truth.read_text())["channels"]


def table(values, truth, name=None):
    """Return a quantity by chip as an array, in the order of the truth."""
    rows = [values[key] if name is None else values[key][name] for key in truth]
    return np.array([[np.nan if value is None else value for value in row] for row in rows])


@pytest.mark.parametrize("asic", ["2d", "3"])
def test_routines_measure_what_the_emulator_has(line, tmp_path, asic):
    board, operator, truth = started(line, tmp_path, asic)
    with closing(board):
        adc_counts = 1024 if asic == "3" else 256
        limits = {"low": 1.0, "high": 0.8 * adc_counts, "most_std": 4.0 * adc_counts / 256}
        request = operator.run_routine("pedestal", samples=100, trigger_hz=100.0, **limits)
        pedestal = request.result(SLOW)
        assert pedestal["bad"] == {}
        mean = table(pedestal["chips"], truth, "mean") + 0.5
        true = table(truth, truth, "pedestal")
        if asic == "2d":  # of v3 chips the truth is told with references that they do not have
            assert abs(mean - true).max() < 0.5
        else:
            assert np.corrcoef(mean.ravel(), true.ravel())[0, 1] > 0.99
            assert not operator.run_routine("pedestal", samples=10).result(SLOW)["chips"]["1-1-11"]["pedestal_mv"][0]

        found = operator.run_routine("calibrate", 20.0, 200.0, apply=True, directory=str(tmp_path)).result(SLOW)
        assert found["within"] > 0.97 * found["live"] > 240
        trims, thresholds = table(found["trims"], truth), np.array([found["thresholds"][key] for key in truth])
        distance = thresholds[:, None] + trims * 1.45 / DAC_STEP - table(truth, truth, "threshold")
        rates = 1e4 * np.exp(-(np.maximum(distance / table(truth, truth, "noise_dac"), 0) ** 2) / 2)
        assert np.mean((rates > 5) & (rates < 400)) > 0.95, "by the emulator's own thresholds"

        operator.send_configuration({"all": {"threshold_global": 255}}).result(LIMIT)
        if asic == "3":  # the curve of v2d chips is that of v2b, in test_lab_routines
            curve = operator.run_routine("s_curve", leave_off={}, pulses=10, step=2, most_noise=None).result(SLOW)
            threshold = table(curve["chips"], truth, "threshold")
            assert np.isnan(threshold).mean() < 0.05
            expected = table(truth, truth, "threshold") * DAC_STEP + 30 * PULSE_STEP
            assert np.nanmax(abs(threshold - expected)) < 8.0  # mV, of channels with up to 4 mV of noise

        kinds, seen, _, extracted, exports = operator.run_routine("packets").result(SLOW)
        assert kinds == ["Packet_v3" if asic == "3" else "Packet_v2"]
        samples = [adc for channels in seen.values() for adcs in channels.values() for adc in adcs]
        assert len(samples) == extracted > 1000
        assert exports
        for at, key in enumerate(truth):
            own = [np.mean(adcs) + 0.5 for _, adcs in sorted(seen[key].items(), key=lambda item: int(item[0]))]
            assert len(own) == 64
            assert abs(own - mean[at]).max() < 3 * adc_counts / 256


@pytest.mark.parametrize("asic", ["2d", "3"])
def test_networks_of_these_chips_are_discovered(line, tmp_path, asic):
    with closing(Emulator("--chips", "12", "--asic", asic, "--power-on", "--dead-chips", "1-1-12")) as board:
        operator = line.start("--asic", asic, "--pacman", *board.addresses)
        shape = {"rows": 3, "columns": 4, "roots": [11, 15, 19]}
        found = operator.discover_network(str(tmp_path / "found.json"), shape=shape).result(SLOW)
        assert (found["chips"], found["missing"], len(found["faults"])) == (11, 1, 1), found["faults"]
        assert operator.configure_network().result(SLOW)["ok"]
        assert operator.validate_configuration().result(SLOW)["ok"]


def test_packets_of_routines_have_the_counts_of_fifo_diagnostics(line, tmp_path):
    board, operator, _ = started(line, tmp_path, "2b", "--fifo-diagnostics")
    with closing(board):
        operator.send_configuration({"all": {"enable_fifo_diagnostics": 1}}).result(LIMIT)
        kinds, seen, events, _, _ = operator.run_routine("packets").result(SLOW)
        assert kinds == ["Packet_v2"]
        assert len(seen) == 4
        assert set(events) >= set(range(64))
