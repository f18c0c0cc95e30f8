"""Registers of many chips at a time, against larpix-control's Configuration and Packet classes."""

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from larpix import Packet_v1, Packet_v2

from larpixdaq._native import word_codec
from larpixdaq.errors import RequestError
from larpixdaq.hardware.register_io import interleave
from larpixdaq.hardware.register_map import ChipRegisters, words
from larpixdaq.schema import PACKETS_2_4, Asic, PacketType

byte = st.integers(0, 255)
known = {asic: ChipRegisters(asic) for asic in ("1", "2", "2b", "2d", "lightpix-1", "3")}


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


@given(st.sampled_from([PacketType.CONFIG_WRITE, PacketType.CONFIG_READ]), byte, byte, byte)
def test_v2d_words_are_v2_words_with_the_magic_of_v3_words(kind, chip, address, value):
    """Also those that larpix-control makes; its data and test words stay as they are."""
    made = known["2d"].words(kind, [chip], [address], [value])
    assert made.tolist() == words(Asic.V3, kind, [chip], [address], [value]).tolist()
    plain = words(Asic.V2, kind, [chip], [address], [value])
    assert known["2d"].complete(plain).tolist() == made.tolist()
    assert known["2b"].complete(plain).tolist() == plain.tolist()
    others = np.array([int(plain[0]) & ~3, int(plain[0]) & ~3 | 1], np.uint64)
    assert known["2d"].complete(others).tolist() == others.tolist()


@pytest.mark.parametrize("asic", [Asic.V2, Asic.V2_DIAGNOSTICS])
def test_answers_with_another_magic_word_are_recognised(asic):
    made = words(Asic.V2, PacketType.CONFIG_READ, [2, 3, 4], 64, 7, magic=True)
    made[1] ^= np.uint64(0b11 << 40)  # two flipped bits leave the parity as it is
    made[2] = words(Asic.V2, PacketType.CONFIG_READ, 4, 64, 7)[0]
    rows = np.zeros(3, PACKETS_2_4)
    assert word_codec.decode(made, rows, asic=asic) == 3
    assert rows["valid_parity"].all()
    assert known["2d"].have_magic(rows, asic).tolist() == [True, False, False]
    assert known["2b"].have_magic(rows, asic).all()


def test_v2d_has_the_registers_of_v2b_but_for_one():
    new, old = known["2d"], known["2b"]
    power_up = {
        asic: known[asic].values_by_name(known[asic].defaults[None, :], known[asic].names) for asic in ("2b", "2d")
    }
    same = set(new.names) & set(old.names)
    assert set(old.names) - same == {"tx_dynamic_powerdown_cycles"}
    assert set(new.names) - same == {"enable_external_trigger", "enable_external_sync"}
    assert {name: (new._bits[name], power_up["2d"][name]) for name in same} == {
        name: (old._bits[name], power_up["2b"][name]) for name in same
    }
    values = new.defaults[None, :].copy()
    new.change(values, {"enable_external_trigger": 1, "clk_ctrl": 2})
    assert values[0, 123] == 1 << 5 | 2 << 3
    assert new.name(123) == (
        "enable_tx_dynamic_powerdown/load_config_defaults/enable_fifo_diagnostics/clk_ctrl/"
        "enable_external_trigger/enable_external_sync"
    )


def test_v3_has_the_power_up_values_of_the_design():
    """As the v3b design states them, by address."""
    expected = np.zeros(256, np.uint8)
    expected[:64] = 0x10
    for first, n, value in (
        (64, 1, 0xFF), (65, 1, 4), (74, 6, 8), (80, 1, 5), (81, 1, 0x50), (82, 1, 0xDE), (83, 1, 8), (100, 8, 0xFF),
        (122, 1, 1), (123, 1, 0x90), (126, 1, 0x0F), (128, 1, 0x60), (131, 32, 0xFF), (164, 1, 0x10), (170, 1, 0x4C),
        (171, 1, 0xFF), (237, 1, 0x20), (238, 1, 0x1E), (239, 4, 0x88), (247, 1, 4), (248, 3, 2), (254, 2, 0x55),
    ):  # fmt: skip
        expected[first : first + n] = value
    assert known["3"].defaults.tolist() == expected.tolist()
    assert np.flatnonzero(known["3"].counted).tolist() == list(range(116, 121))
    values = known["3"].defaults[None, :].copy()
    known["3"].change(values, {"i_rx1": 3, "voltage_monitor_bank1": [1, 0, 0], "reset_threshold_msbs": 2})
    assert values[0, [243, 111, 127]].tolist() == [0xC0, 1 << 3, 4]


#: Registers whose 8 bits all have a meaning.
whole = [64, *range(66, 74), 82, 83, 108, *range(120, 123), *range(131, 170), *range(171, 237)]


@given(st.dictionaries(st.sampled_from(whole), byte, max_size=8), st.sampled_from(["little", "big"]))
def test_a_table_configuration_does_what_those_of_larpix_control_do(registers, endian):
    """Bits and values of 2b and 2d are the same, but those of register 123, after any registers were set."""
    configs = [known["2b"]._class(), known["2d"]._class()]
    for config in configs:
        config.from_dict_registers(registers, endian=endian)
    theirs, own = (dict(zip(*config.some_data(range(256)), strict=True)) for config in configs)
    assert {address: bits for address, bits in theirs.items() if address != 123} == {
        address: bits for address, bits in own.items() if address != 123
    }
    assert {name: value for name, value in configs[1].to_dict().items() if name in configs[0].register_names} == {
        name: value for name, value in configs[0].to_dict().items() if name in configs[1].register_names
    }
    config = configs[1]
    config.channel_mask[5] = 0
    assert config.some_data(["channel_mask"])[1][0][5] == 0
    with pytest.raises(ValueError, match="bounds"):
        config.channel_mask[5] = 2
    with pytest.raises(AttributeError):
        config.threshold = 1
    assert len(config.all_data()) == 256


@given(st.lists(byte, max_size=50))
def test_io_channels_take_turns_and_keep_their_order(channels):
    order = interleave(np.array(channels, np.uint8)).tolist()
    assert sorted(order) == list(range(len(channels)))
    for channel in set(channels):
        mine = [at for at in order if channels[at] == channel]
        assert mine == sorted(mine)
    rounds = [sum(channels[b] == channels[a] for b in order[:i]) for i, a in enumerate(order)]
    assert rounds == sorted(rounds)


@pytest.mark.parametrize("asic", ["1", "2", "2b", "2d", "lightpix-1", "3"])
def test_power_up_values_by_name_are_those_of_larpix_control(asic):
    registers = known[asic]
    config = registers._class()
    found = registers.values_by_name(registers.defaults[None, :], registers.names)
    assert {name: values_[0] for name, values_ in found.items()} == {
        name: getattr(config, name) for name in registers.names
    }


@pytest.mark.parametrize("asic", ["1", "2", "2b", "2d", "lightpix-1", "3"])
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
        ("3", {"vcm_dac": 1}, "register 'vcm_dac': v3 chips have none of this name"),
        ("3", {"r_term0": 8}, "chip 1-1-2: register r_term0: 8: value must be between 0 and 7"),
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
    assert [known["3"].name(at) for at in (7, 121, 251)] == ["pixel_trim_dac[7]", "adc_hold_delay", "register 251"]
    for registers in known.values():
        assert all(registers.name(address) for address in range(registers.count))
