"""Registers of many chips at a time, against larpix-control's Configuration and Packet classes."""

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix import Packet_v1, Packet_v2

from larpixdaq.errors import RequestError
from larpixdaq.hardware.register_io import interleave
from larpixdaq.hardware.register_map import ChipRegisters, words
from larpixdaq.schema import Asic, PacketType

byte = st.integers(0, 255)
known = {asic: ChipRegisters(asic) for asic in ("1", "2", "2b", "lightpix-1", "3")}


@pytest.mark.parametrize(("asic", "packet"), [(Asic.V1, Packet_v1), (Asic.V2, Packet_v2)])
@given(kind=st.sampled_from([PacketType.CONFIG_WRITE, PacketType.CONFIG_READ]), chip=byte, address=byte, value=byte)
def test_words_are_those_of_larpix_control(asic, packet, kind, chip, address, value):
    made = packet()
    made.packet_type, made.chip_id = kind, chip
    made.register_address, made.register_data = address, value
    made.assign_parity()
    found = words(asic, kind, [chip], [address], [value])
    assert found.tolist() == [int.from_bytes(made.bytes(), "little")]


def test_v3_words_have_the_magic_and_the_parity_of_others():
    assert words(Asic.V3, PacketType.CONFIG_WRITE, [11], [125], [1]).tolist() == [0x822541391C05F42E]


@given(st.lists(byte, max_size=50))
def test_io_channels_take_turns_and_keep_their_order(channels):
    order = interleave(np.array(channels, np.uint8)).tolist()
    assert sorted(order) == list(range(len(channels)))
    for channel in set(channels):
        mine = [at for at in order if channels[at] == channel]
        assert mine == sorted(mine)
    rounds = [sum(channels[b] == channels[a] for b in order[:i]) for i, a in enumerate(order)]
    assert rounds == sorted(rounds)


@pytest.mark.parametrize("asic", ["1", "2", "2b", "lightpix-1"])
def test_power_up_values_by_name_are_those_of_larpix_control(asic):
    registers = known[asic]
    config = registers._class()
    found = registers.values_by_name(registers.defaults[None, :], registers.names)
    assert {name: values_[0] for name, values_ in found.items()} == {
        name: getattr(config, name) for name in registers.names
    }


@pytest.mark.parametrize("asic", ["1", "2", "2b", "lightpix-1"])
@settings(max_examples=examples(50))
@given(data=st.data())
def test_a_register_set_for_many_chips_is_set_as_larpix_control_does(asic, data):
    """The register and its neighbours in the same byte can have any value before."""
    registers = known[asic]
    names = [name for name in registers.names if name != "RESERVED"]
    name = data.draw(st.sampled_from(names))
    configs = [registers._class(), registers._class()]
    for other in data.draw(st.lists(st.sampled_from(names), max_size=3)):
        before = getattr(configs[0], other)
        setattr(configs[0], other, [1] * len(before) if isinstance(before, list) else 1)
    value = data.draw(st.integers(0, 1))
    before = getattr(configs[0], name)
    value = [value] * len(before) if isinstance(before, list) else value
    values = np.stack([registers.values_of(config) for config in configs])
    touched = registers.change(values, {name: value})
    assert touched.tolist() == registers.addresses[name]
    for row, config in zip(values, configs, strict=True):
        setattr(config, name, value)
        assert row.tolist() == registers.values_of(config).tolist()
        again = registers._class()
        registers.set_values(again, row)
        assert again == config
    assert registers.values_of_all(configs).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("asic", "updates", "says"),
    [
        (
            "2",
            {"threshold_globl": 3},
            "register 'threshold_globl': v2 chips have none of this name; close to it: threshold_global",
        ),
        ("2", {"threshold_global": 256}, "chip 1-1-2: register threshold_global: 256: value must be between 0 and 255"),
        ("2", {"threshold_global": "x"}, "chip 1-1-2: register threshold_global: 'x': value must be of type"),
        ("2", {"channel_mask": [1] * 63}, "chip 1-1-2: register channel_mask: expected a list of 64 values"),
        ("2", {"channel_mask": [2] * 64}, "chip 1-1-2: register channel_mask"),
        ("2", {237: 1}, "register 237: expected a name or an address from 0 to 236"),
        ("2", {64: -1}, "chip 1-1-2: register 64: expected 0 to 255, found -1"),
        ("2", {True: 1}, "register True: expected a name or an address"),
        (
            "3",
            {"threshold_global": 1},
            "register 'threshold_global': registers of v3 chips have only addresses, 0 to 255",
        ),
    ],
)
def test_invalid_updates_are_refused_in_one_line(asic, updates, says):
    registers = known[asic]
    values = registers.defaults[None, :].copy()
    with pytest.raises(RequestError) as raised:
        registers.change(values, updates, "chip 1-1-2: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert values.tolist() == registers.defaults[None, :].tolist()


def test_every_address_has_a_name():
    v2 = known["2"]
    assert (v2.name(5), v2.name(64), v2.name(131)) == ("pixel_trim_dac[5]", "threshold_global", "channel_mask[0:8]")
    assert v2.name(163) == "periodic_reset_cycles, byte 0"
    assert "/" in v2.name(170)
    assert known["3"].name(7) == "register 7"
    for registers in known.values():
        assert all(registers.name(address) for address in range(registers.count))
