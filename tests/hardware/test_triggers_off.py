"""Triggers of chips are off during a measurement and restored after it, whatever their known state is."""

import contextlib
import io

import numpy as np
import pytest
from larpix import Controller

from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.routines.kit import Chips

TRIGGERS = (
    *("external_trigger_mask", "enable_cross_trigger", "cross_trigger_mode", "enable_periodic_trigger"),
    "adc_burst_length",
)
KEYS = ["1-1-11", "1-1-12"]


class FakeIO:
    """Two chips that keep the written values."""

    def __init__(self, asic):
        self.registers = ChipRegisters(asic)
        self.held = np.tile(self.registers.defaults, (2, 1))

    def write_registers(self, keys, values, which):
        assert list(keys) == KEYS
        self.held[which] = values[which]

    def values_by_name(self):
        names = [name for name in TRIGGERS if name in self.registers.names]
        return self.registers.values_by_name(self.held, names)


@pytest.fixture(params=["1", "2b", "lightpix-1"])
def chips(request):
    controller = Controller()
    controller.io = FakeIO(request.param)
    with contextlib.redirect_stdout(io.StringIO()):
        for key in KEYS:
            controller.add_chip(key, version=controller.io.registers.version)
    return Chips(controller)


@pytest.mark.parametrize("known", [True, False], ids=["known to be on", "left on by an aborted routine"])
def test_triggers_are_off_during_a_measurement_and_restored_after_an_error(chips, known):
    channels, device = chips.channels, chips.controller.io
    off = device.values_by_name()
    on = {"external_trigger_mask": 0, "cross_trigger": 1, "burst": 4}
    on |= {"periodic_trigger": 1} if chips.has("periodic_trigger") else {}
    chips.set(**on)
    left_on = device.values_by_name()
    assert left_on != off
    if not known:
        held = device.held.copy()
        chips.restore()
        device.held[:] = held

    def measure():
        with chips.untriggered():
            assert device.values_by_name() == off
            assert device.values_by_name()["external_trigger_mask"] == [[1] * channels] * 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure()
    assert device.values_by_name() == (left_on if known else off), "the wanted values"
