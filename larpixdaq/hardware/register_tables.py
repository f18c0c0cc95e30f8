"""Registers and packets of chips that larpix-control 3.7 does not know, as classes and a Controller for it.

larpix-control sets up these chips as its 2b chips, whose network registers have the same names and addresses. Import
this module late, because larpix-control takes a second.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, NamedTuple

from larpix import Controller
from larpix.bitarrayhelper import fromuint
from larpix.configuration import BaseConfiguration_v2, _Smart_List
from larpix.packet import Packet_v2

#: Generation as larpix-control is told.
LARPIX_CONTROL_VERSION: Final = "2b"

#: Registers at the same place in v2d and v3 chips: name, address[.bit], bits of a number, [xNUMBERS of a list], value
#: at power-up. Numbers of several bits in a list have a register each.
_COMMON: Final = """
pixel_trim_dac                   0     5 x64 16
threshold_global                 64    8     255
csa_gain                         65    1     0
csa_bypass_enable                65.1  1     0
bypass_caps_en                   65.2  1     1
ibias_tdac                       74    4     8
ibias_comp                       75    4     8
ibias_buffer                     76    4     8
ibias_csa                        77    4     8
ibias_vref_buffer                78    4     8
ibias_vcm_buffer                 79    4     8
ibias_tpulse                     80    4     5
ref_current_trim                 81    5     16
csa_bypass_select                84    1 x64 0
csa_monitor_select               92    1 x64 0
csa_testpulse_enable             100   1 x64 1
csa_testpulse_dac                108   8     0
chip_id                          122   8     1
load_config_defaults             123.1 1     0
enable_fifo_diagnostics          123.2 1     0
enable_external_trigger          123.5 1     0
enable_external_sync             123.6 1     0
enable_piso_upstream             124   1 x4  0
enable_piso_downstream           125   1 x4  0
enable_posi                      126   1 x4  1
enable_cross_trigger             128   1     0
enable_periodic_reset            128.1 1     0
enable_rolling_periodic_reset    128.2 1     0
enable_periodic_trigger          128.3 1     0
enable_rolling_periodic_trigger  128.4 1     0
enable_periodic_trigger_veto     128.5 1     1
enable_hit_veto                  128.6 1     1
shadow_reset_length              129   8     0
adc_burst_length                 130   8     0
channel_mask                     131   1 x64 1
external_trigger_mask            139   1 x64 1
cross_trigger_mask               147   1 x64 1
periodic_trigger_mask            155   1 x64 1
periodic_reset_cycles            163   24    4096
periodic_trigger_cycles          166   32    0
enable_dynamic_reset             170   1     0
enable_min_delta_adc             170.1 1     0
threshold_polarity               170.2 1     1
reset_length                     170.3 3     1
mark_first_packet                170.6 1     1
min_delta_adc                    172   8     0
digital_threshold                173   8 x64 0
tx_slices0                       239   4     8
tx_slices1                       239.4 4     8
tx_slices2                       240   4     8
tx_slices3                       240.4 4     8
v_cm_lvds_tx0                    254   3     5
v_cm_lvds_tx1                    254.4 3     5
v_cm_lvds_tx2                    255   3     5
v_cm_lvds_tx3                    255.4 3     5
"""

#: v2d: registers of larpix-control's 2b but for register 123, where upstream's newer larpix-control has two bits for
#: external signals in place of tx_dynamic_powerdown_cycles. Their values at power-up are taken to be those of v2b.
_V2D: Final = """
csa_enable                       66    1 x64 1
override_ref                     81.5  1     0
ref_kickstart                    81.6  1     0
vref_dac                         82    8     219
vcm_dac                          83    8     77
current_monitor_bank0            109   1 x4  0
current_monitor_bank1            110   1 x4  0
current_monitor_bank2            111   1 x4  0
current_monitor_bank3            112   1 x4  0
voltage_monitor_bank0            113   1 x3  0
voltage_monitor_bank1            114   1 x3  0
voltage_monitor_bank2            115   1 x3  0
voltage_monitor_bank3            116   1 x3  0
voltage_monitor_refgen           117   1 x8  0
digital_monitor_enable           118   1     0
digital_monitor_select           118.1 4     0
digital_monitor_chan             119   6     0
adc_hold_delay                   120   16    0
enable_tx_dynamic_powerdown      123   1     0
clk_ctrl                         123.3 2     0
test_mode_uart0                  127   2     0
test_mode_uart1                  127.2 2     0
test_mode_uart2                  127.4 2     0
test_mode_uart3                  127.6 2     0
reset_threshold                  171   8     0
RESERVED                         237   16    0
i_tx_diff0                       241   4     12
i_tx_diff1                       241.4 4     12
i_tx_diff2                       242   4     12
i_tx_diff3                       242.4 4     12
i_rx0                            243   4     8
i_rx1                            243.4 4     8
i_rx2                            244   4     8
i_rx3                            244.4 4     8
i_rx_clk                         245   4     8
i_rx_rst                         245.4 4     8
i_rx_ext_trig                    246   4     8
r_term0                          247   5     2
r_term1                          248   5     2
r_term2                          249   5     2
r_term3                          250   5     2
r_term_clk                       251   5     0
r_term_reset                     252   5     0
r_term_ext_trig                  253   5     0
"""

#: v3: names, places and values at power-up in the design of v3b (github.com/crgrace/larpix_v3b a98b145, its
#: config_regfile_assign.sv and digital_core.sv). Where upstream's newer larpix-control has another name for a register
#: of the design, its name is taken. Four things are not settled, because no real chip was at hand: the design has
#: adc_hold_delay at 120, where it also counts dropped packets, and larpix-control at 121; i_rx is the upper half of
#: each nibble in the design, and the lower half in some of larpix-control; the design gives v_cm_lvds_tx a fourth bit;
#: and the values of v3a at power-up may differ.
_V3: Final = """
csa_enable                       66    1 x64 0
adc_comp_trim                    81.5  2     2
vref_dac                         82    8     222
adc_ibias_delay                  83    4     8
adc_ibias_delay_monitor          83.4  1 x4  0
current_monitor_bank0            109   1 x4  0
current_monitor_bank1            109.4 1 x4  0
current_monitor_bank2            110   1 x4  0
current_monitor_bank3            110.4 1 x4  0
voltage_monitor_bank0            111   1 x3  0
voltage_monitor_bank1            111.3 1 x3  0
voltage_monitor_bank2            112   1 x3  0
voltage_monitor_bank3            112.3 1 x3  0
voltage_monitor_refgen           113   1 x8  0
digital_monitor_enable           114   1     0
digital_monitor_select           114.1 4     0
digital_monitor_chan             115   6     0
fifo_high_water_lsbs             116   8     0
fifo_high_water_msbs             117   8     0
total_packets_lsbs               118   8     0
total_packets_msbs               119   8     0
dropped_packets                  120   8     0
adc_hold_delay                   121   8     0
cds_mode                         123   1     0
enable_local_fifo_diagnostics    123.3 1     0
enable_tally                     123.4 1     1
enable_data_stats                123.7 1     1
en_analog_monitor                127   1     0
reset_threshold_msbs             127.1 2     0
reset_threshold_lsbs             171   8     255
lightpix_mode                    237   1     0
hit_threshold                    237.1 7     16
timeout                          238   8     30
i_tx_diff0                       241   4     8
i_tx_diff1                       241.4 4     8
i_tx_diff2                       242   4     8
i_tx_diff3                       242.4 4     8
i_rx0                            243.2 2     0
i_rx1                            243.6 2     0
i_rx2                            244.2 2     0
i_rx3                            244.6 2     0
i_rx_clk                         245.2 2     0
i_rx_rst                         245.6 2     0
i_rx_ext_trig                    246.6 2     0
r_term0                          247   3     4
r_term1                          248   3     2
r_term2                          249   3     2
r_term3                          250   3     2
"""


class _Register(NamedTuple):
    """Place of a register: its first bit, counted from bit 0 of address 0. `entries`: length of a list, 0 for a number.

    `width`: bits of a number, `stride`: bits from one entry to the next.
    """

    first: int
    width: int
    stride: int
    entries: int
    default: int

    @property
    def end(self) -> int:
        return self.first + self.stride * max(1, self.entries)

    @property
    def addresses(self) -> range:
        return range(self.first // 8, (self.end + 7) // 8)


def _parse(table: str) -> dict[str, _Register]:
    registers = {}
    for line in table.split("\n"):
        if line:
            name, place, width, *entries, default = line.split()
            address, _, bit = place.partition(".")
            n = int(entries[0][1:]) if entries else 0
            stride = 8 if n and width != "1" else int(width)
            registers[name] = _Register(8 * int(address) + int(bit or 0), int(width), stride, n, int(default))
    return dict(sorted(registers.items(), key=lambda item: item[1].first))


def _property(name: str, register: _Register) -> property:
    maximum = (1 << register.width) - 1

    def check(value: Any) -> None:
        if not isinstance(value, int):
            raise TypeError(f"value must be of type {int}")
        if not 0 <= value <= maximum:
            raise ValueError(f"value must be between 0 and {maximum}")

    def put(config: Any, value: Any) -> None:
        if register.entries:
            if not isinstance(value, list | tuple):
                raise TypeError("argument must be a list or tuple")
            if len(value) != register.entries:
                raise ValueError(f"length of list must be {register.entries}")
            for entry in value:
                check(entry)
            value = _Smart_List(list(value), 0, maximum)
        else:
            check(value)
        setattr(config, f"_{name}", value)

    return property(lambda config: getattr(config, f"_{name}"), put)


class TableConfiguration(BaseConfiguration_v2):  # type: ignore[misc]
    """Configuration of larpix-control with the registers of `table`."""

    table: ClassVar[dict[str, _Register]]
    #: Registers in which chips count themselves, so that they have no wanted value.
    counted: ClassVar[tuple[str, ...]] = ()
    #: Options of larpix-control's init_network, and the termination of receivers in use, None: as at power-up.
    link_options: ClassVar[dict[str, int]] = {}
    termination: ClassVar[int | None] = None
    num_registers = 256
    num_bits = 2048

    def __init_subclass__(cls) -> None:
        cls.register_names = list(cls.table)
        cls.bit_map = {name: (register.first, register.end) for name, register in cls.table.items()}
        cls.register_map = {name: register.addresses for name, register in cls.table.items()}
        cls.register_map_inv = {address: [] for address in range(cls.num_registers)}
        for name, register in cls.table.items():
            setattr(cls, name, _property(name, register))
            for address in register.addresses:
                cls.register_map_inv[address].append(name)

    def __init__(self) -> None:
        for name, register in self.table.items():
            setattr(self, name, [register.default] * register.entries if register.entries else register.default)

    def _data(self) -> int:
        """Return all registers as one number, address 0 in its lowest 8 bits."""
        data = 0
        for name, register in self.table.items():
            value = getattr(self, name)
            for place, entry in enumerate(value if register.entries else [value]):
                data |= int(entry) << register.first + register.stride * place
        return data

    def all_data(self, endian: str = "little") -> list[Any]:
        return list(self.some_data(range(self.num_registers), endian)[1])

    def some_data(self, registers: Any, endian: str = "little") -> tuple[list[int], list[Any]]:
        data = self._data()
        addresses = [
            address
            for register in registers
            for address in (self.register_map[register] if isinstance(register, str) else [register])
        ]
        return addresses, [fromuint(data >> 8 * address & 0xFF, 8, endian=endian) for address in addresses]

    def from_dict_registers(self, d: dict[int, int], endian: str = "little") -> None:
        data = self._data()
        for address, value in d.items():
            byte = int(fromuint(value, 8, endian=endian).to01()[::-1], 2)
            data = data & ~(0xFF << 8 * address) | byte << 8 * address
        for name in dict.fromkeys(name for address in d for name in self.register_map_inv[address]):
            register = self.table[name]
            entries = [
                data >> register.first + register.stride * place & (1 << register.width) - 1
                for place in range(max(1, register.entries))
            ]
            setattr(self, name, entries if register.entries else entries[0])


class Configuration_v2d(TableConfiguration):
    asic_version = "2d"
    table = _parse(_COMMON + _V2D)


class Configuration_v3(TableConfiguration):
    asic_version = 3
    table = _parse(_COMMON + _V3)
    counted = (
        "fifo_high_water_lsbs", "fifo_high_water_msbs", "total_packets_lsbs", "total_packets_msbs", "dropped_packets",
    )  # fmt: skip
    # As github.com/larpix/larpix-5x5-test 0ea52d2 sets up lines. It also sets i_rx, whose place is not settled.
    link_options: ClassVar = {"i_tx_diff": 7, "tx_slices": 15}
    termination = 7


#: By value of --asic.
CONFIGURATIONS: Final[dict[str, type[TableConfiguration]]] = {"2d": Configuration_v2d, "3": Configuration_v3}


class TableController(Controller):  # type: ignore[misc]
    """Controller of larpix-control whose chips have a TableConfiguration."""

    def __init__(self, configuration: type[TableConfiguration]) -> None:
        super().__init__()
        self._configuration = configuration

    def add_chip(self, chip_key: Any, version: Any = None, config: Any = None, root: bool = False) -> Any:
        """Add a chip as in larpix-control; `version` is ignored."""
        config = self._configuration() if config is None else config
        return super().add_chip(chip_key, LARPIX_CONTROL_VERSION, config, root)

    def init_network(self, io_group: int = 1, io_channel: int = 1, chip_id: Any = None, **options: Any) -> None:
        """Configure a chip, or all of a network, as in larpix-control, with the lines of this generation."""
        super().init_network(io_group, io_channel, chip_id, **(self._configuration.link_options | options))
        termination = self._configuration.termination
        if termination is None or not isinstance(chip_id, int):
            return
        chip = self[io_group, io_channel, chip_id]
        names = [f"r_term{uart}" for uart, receives in enumerate(chip.config.enable_posi) if receives]
        for name in names:
            setattr(chip.config, name, termination)
        addresses = [address for name in names for address in chip.config.register_map[name]]
        self.send(chip.get_configuration_write_packets(addresses))


class Packet_v3(Packet_v2):  # type: ignore[misc]
    """A packet of a v3 chip: larpix-control's Packet_v2 with the data fields at their places in v3 packets."""

    asic_version = 3
    DATA_PACKET = 1
    TEST_PACKET = 0  # v3 chips send none
    timestamp_bits = slice(16, 44)
    first_packet_bits = slice(43, 44)
    dataword_bits = slice(46, 56)

    @property
    def reset_sample_flag(self) -> int:
        """1 for the sample of a channel's reset, in correlated double sampling."""
        return int(self.bits[44])

    @property
    def cds_flag(self) -> int:
        """1 for a sample with correlated double sampling."""
        return int(self.bits[45])

    def export(self) -> dict[str, Any]:
        """Return the fields as larpix-control does, with the two flags of data packets."""
        flags = {"reset_sample_flag": self.reset_sample_flag, "cds_flag": self.cds_flag}
        exported: dict[str, Any] = super().export()
        return exported | (flags if self.packet_type == self.DATA_PACKET else {})

    def __repr__(self) -> str:
        return f"Packet_v3({self.bytes()})"


for _name in ("first_packet", "dataword"):  # larpix-control's properties have the places of v2
    setattr(Packet_v3, _name, property(Packet_v3._basic_getter(_name), Packet_v3._basic_setter(_name)))
