"""The search for thresholds and trims, on simulated channels with known rates, behind lines of limited capacity."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from larpixdaq.emulators.noise import DAC_STEP, MAX_RATE, TRIM_STEP, Channels
from larpixdaq.routines import calibrate
from larpixdaq.routines.kit import report, threshold_search
from larpixdaq.routines.kit.measurement import Rates

LOW, HIGH = 2.0, 20.0


class SimulatedChips:
    """Simulated chips on two lines. `others`: packets/s of chips on the first line that are not calibrated."""

    def __init__(self, carries, hot, dead, others=0.0, chips=20, seed=1):
        self.channels_ = Channels(chips, 64, [seed])
        self.random = np.random.default_rng([seed, 1])
        self.hot, self.dead = np.zeros((2, chips, 64), np.bool_)
        places = self.random.permutation(self.hot.size)
        self.hot.flat[places[:hot]] = self.dead.flat[places[hot : hot + dead]] = True
        self.channels_.noise[self.hot] *= 10
        self.keys = [f"1-{1 + chip * 2 // chips}-{11 + chip}" for chip in range(chips)]
        self.registers = {
            "trim": np.full((chips, 64), 16),
            "threshold": np.full(chips, 255),
            "mask": np.ones((chips, 64), np.int64),
            "periodic_reset": np.zeros(chips, np.int64),
        }
        self.io = None
        self._carries, self._others = carries, np.array([others, 0.0])

    def true(self, trim, threshold):
        above = threshold[:, None] * DAC_STEP + trim * TRIM_STEP + self.channels_.offset - self.channels_.pedestal
        return MAX_RATE * np.exp(-(np.maximum(above / self.channels_.noise, 0) ** 2) / 2) * ~self.dead

    def rates(self, controller, keys, channels, seconds):
        hz = self.true(self.registers["trim"], self.registers["threshold"]) * (1 - self.registers["mask"])
        line = np.arange(len(keys)) * 2 // len(keys)
        load = np.bincount(line, hz.sum(1)) + self._others
        share = np.minimum(1, self._carries / np.maximum(load, 1))
        full = [f"1-{n + 1}" for n in range(2) if load[n] > 0.8 * self._carries]
        return Rates(self.random.poisson(hz * share[line][:, None] * seconds), seconds, full)


class FakeChips:
    channels = 64

    def __init__(self, world, keys):
        self.keys, self._registers = world.keys, world.registers

    def __len__(self):
        return len(self.keys)

    def has(self, what):
        return True

    def untriggered(self):
        return contextlib.nullcontext()

    def set(self, **values):
        for what, new in values.items():
            new = np.asarray(new, np.int64)
            registers = self._registers[what]
            self._registers[what] = np.broadcast_to(
                new[:, None] if new.ndim < registers.ndim and new.ndim else new, registers.shape
            )


def calibrated(world, monkeypatch, **options):
    """Return the result, and by channel the true final rate, disabled, dead."""
    monkeypatch.setattr(threshold_search, "Chips", FakeChips)
    monkeypatch.setattr(threshold_search, "rates", world.rates)
    monkeypatch.setattr(report, "write", lambda *args: {})
    function = calibrate.registration["calibrate"].func
    _, result = function(world, lambda *args: None, lambda *args: None, LOW, HIGH, apply=True, **options)
    found = [np.zeros_like(world.hot) for _ in range(2)]
    for flags, name in zip(found, ("disable", "dead"), strict=True):
        for key, channels in result[name].items():
            flags[world.keys.index(key), channels] = True
    trim, threshold = (np.array([result[name][key] for key in world.keys]) for name in ("trims", "thresholds"))
    return result, world.true(trim, threshold), *found


@pytest.mark.parametrize(
    ("carries", "hot"), [(75_757.0, 4), (75_757.0, 60), (16_000.0, 4)], ids=["as usual", "many hot", "slow lines"]
)
def test_lines_that_are_full_at_times_do_not_make_thresholds_too_low(monkeypatch, carries, hot):
    world = SimulatedChips(carries, hot, 4)
    result, rates, disabled, dead = calibrated(world, monkeypatch)
    assert result["saturated"]
    assert result["saturated_after"] == []
    assert (dead == world.dead).all()
    assert (world.hot & ~disabled).sum() == 0
    assert (disabled & ~world.hot).sum() <= 0.01 * rates.size
    live = ~disabled & ~dead
    assert result["live"] == live.sum()
    good = live & (rates >= 0.8 * LOW) & (rates <= 1.2 * HIGH)
    assert good.sum() >= 0.96 * live.sum()
    assert (live & (rates > 1.2 * HIGH)).sum() <= 0.01 * live.sum()


def test_without_matplotlib_only_the_picture_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(threshold_search, "Chips", FakeChips)
    world = SimulatedChips(75_757.0, 0, 0, chips=2)
    monkeypatch.setattr(threshold_search, "rates", world.rates)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    texts = []
    function = calibrate.registration["calibrate"].func
    _, result = function(
        world, None, lambda *info: texts.append(info[0]), LOW, HIGH, directory=str(tmp_path), apply=True
    )
    assert 'pip install "larpix-daq[plot]"' in result["no_picture"]
    assert texts[-1] == result["no_picture"]
    (path,) = result["files"]
    assert json.loads(Path(path).read_text())["thresholds"] == result["thresholds"]


def test_a_line_that_stays_full_is_named_and_none_of_its_channels_counts(monkeypatch):
    result, *_ = calibrated(SimulatedChips(75_757.0, 4, 4, others=80_000.0), monkeypatch)
    assert result["saturated_after"] == ["1-1"]
    assert 0.45 * 1280 < result["within"] < 640


def test_a_higher_threshold_saves_more_channels_than_it_makes_too_quiet(monkeypatch):
    lost, quiet = [], []
    for raise_for in (0.0, 1.0, 1000.0):
        world = SimulatedChips(75_757.0, 4, 4, chips=60)
        _, rates, disabled, dead = calibrated(world, monkeypatch, raise_for=raise_for)
        lost.append((disabled & ~world.hot).sum())
        quiet.append((~disabled & ~dead & (rates < 0.8 * LOW)).sum())
    assert lost[0] > 2 * lost[1] > 2 * lost[2]
    assert quiet[1] - quiet[0] <= lost[0] - lost[1] + 5
