"""Registers of PACMAN boards: common ones and those of each revision, meaning of their values, and words to read them.

The addresses of power and DACs depend on the command server on the board, not on the FPGA: revision 3 is the map of the
v1.3 server, which uci_* and r/oldtimestamp_rev4 firmware also ships. Tiles are numbered from 0. Sources: the servers of
larpix/pacman (v1.2, v1.3, v1.4) and mulhearn/pacman-server (2.1), and the labs' scripts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from larpixdaq.errors import RequestError

#: A word that reads or writes a register, or its answer: type, register, value.
_ORDER: Final = struct.Struct("<c3xI4xI")
PING: Final = b"P" + bytes(15)

# Registers of the FPGA, the same on all boards.
TILES, POWER = 0x10, 0x14
CLOCK_STATUS, CLOCK, CLOCK_CONTROL, RESET_CYCLES, HEARTBEAT_CYCLES = 0x1000, 0x1004, 0x1010, 0x1014, 0x1018
TRIGGER_CONTROL, TRIGGER_MASK, TRIGGER_CYCLES = 0x2010, 0x2014, 0x2018
RESET_BIT: Final = 4
#: Bytes of a bank of FPGA registers, of which the first 16 bytes are read-only and the next 16 writable, in steps of 4.
#: The UART of io_channel n has the bank n above the bank of the triggers.
BANK: Final = 0x1000
TRIGGER_BANK: Final = 0x2000
_WRITABLE: Final = range(0x10, 0x20)
#: Number of io_channels whose UART registers are no DAC registers in any revision of PACMAN.
_CHANNELS: Final = 32
#: Writable registers of a UART: offsets in its bank by name.
UART: Final = {"clock_ratio": 0x10, "tx_phase": 0x14, "rx_phase": 0x18, "inversion": 0x1C}
#: Bits of a UART's inversion: the line to the chips (POSI), the line from the chips (PISO).
INVERTED: Final = 0b11
#: All bits of TILES that can switch a tile or its clock.
TILE_BITS: Final = 0x3FF
#: Register that reads 894 with module-2 firmware, a build for rev4 in which the clocks of tiles and the receivers of
#: io_channels are off until they are switched on.
FIRMWARE: Final = 0x0000
MODULE_2: Final = 894
#: Bits of TILES that switch its clocks, and its register with a receiver bit for each io_channel.
MODULE_2_CLOCKS: Final = 0x300
MODULE_2_CHANNELS: Final = 0x18
#: Register of revision 5 in which bit C - 1 switches the receiver of io_channel C off.
RECEIVERS_OFF: Final = 0x201C

#: First address of the board's I2C window. Lower addresses are registers of the FPGA.
I2C: Final = 0x24000
#: Register with the revision of the map of pacman-server 2, which is 5. All other servers answer 0, without harm, so
#: that no other revision can be read from a board.
MAP_VERSION: Final = I2C + 0x220


class TileRegister(NamedTuple):
    """Addresses of a quantity: the address of tile 0, and the distance between tiles."""

    first: int
    step: int

    def address(self, tile: int) -> int:
        return self.first + self.step * tile


class MonitorRegister(NamedTuple):
    """A measured quantity of every tile. `seconds`: sleep of the server in each read."""

    register: TileRegister
    convert: Callable[[int], float]
    seconds: float = 0.0


class Supply(NamedTuple):
    """VDDA or VDDD. `readback`: registers with the DAC's setting, in either half; None if it cannot be read."""

    dac: TileRegister
    readback: TileRegister | None
    #: By name in the status: "mv", and "ma" or "shunt_uv" (voltage across the current's shunt in microvolts).
    monitors: dict[str, MonitorRegister]


@dataclass(frozen=True)
class PacmanRevision:
    number: int
    tiles: int
    #: io_channels whose UARTs have registers, in the order of their UARTs, which count from 1. (Those of io_channels 34
    #: to 40 of rev5 would be in the I2C window.)
    io_channels: Sequence[int]
    #: First address at which a read or write crashes the server (rev3, rev4) or reaches other registers (rev5).
    end: int
    supplies: dict[str, Supply]
    #: DAC counts per volt, and the fraction by which a voltage may differ from its DAC setting.
    counts_a_volt: float
    uncertainty: float
    #: Clock in Hz that UARTs divide by their ratio. None: 10 or 50 MHz, depending on the firmware.
    uart_clock: float | None = None
    #: Monitors of the board itself: VPLUS.
    board: dict[str, MonitorRegister] = field(default_factory=dict)
    #: Bits of TILES that switch a tile or its clock.
    tile_bits: int = TILE_BITS
    #: Register 0x14 switches the power of all tiles.
    analog_power: bool = True
    #: UARTs can invert their lines, and register 0x101C divides the chips' clock.
    inversion: bool = True
    #: Uncertainties of its numbers, a line each.
    doubts: tuple[str, ...] = ()

    def expected(self, dac: int) -> tuple[float, float]:
        """Return the voltage of a DAC setting and its uncertainty (mV)."""
        mv = 1000 * dac / self.counts_a_volt
        return mv, self.uncertainty * mv + 100

    def monitors(self) -> dict[str, MonitorRegister]:
        """Return the monitors of a tile by name: vdda_mv, vddd_mv, and so on."""
        return {
            f"{supply}_{quantity}": monitor
            for supply, supply_registers in self.supplies.items()
            for quantity, monitor in supply_registers.monitors.items()
        }

    def uart(self, io_channel: int) -> int:
        """Return the number of an io_channel's UART, from 1."""
        return self.io_channels.index(io_channel) + 1

    @property
    def uncertain(self) -> set[str]:
        """Names of the monitors about which there are doubts."""
        return {name.strip() for doubt in self.doubts for name in doubt.partition(":")[0].split(",")}

    def seconds(self, register: int) -> float:
        """Return the seconds that the server sleeps in a read of this register."""
        tiles = range(self.tiles)
        return max(m.seconds * (register in map(m.register.address, tiles)) for m in self.monitors().values())


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _high_mv(x: int) -> float:
    """Bus voltage of an INA219 (4 mV per count) in the upper half."""
    return float((x >> 19) * 4)


def _high_ma(x: int) -> float:
    return 5.0 * _signed(x >> 16, 16)


def _high_uv(x: int) -> float:
    """Shunt voltage of an INA219 (10 uV per count) in the upper half."""
    return 10.0 * _signed(x >> 16, 16)


def _vddd_mv_4(x: int) -> float:
    """VDDD of the v1.4 server, which scales 24 bits to 8000 mV and ignores that the upper half is negative."""
    return float(x - 8000 if x >= 4000 else x)


def _idda_ma_4(x: int) -> float:
    return 0.5 * _signed(x & 0xFFFF, 16)


def _iddd_ma_4(x: int) -> float:
    return (_signed(x & 0xFFFFFF, 24) >> 10) * 0.25


def _quarter(x: int) -> float:
    return x / 4


def _supply(
    dac: tuple[int, int],
    mv: MonitorRegister,
    current: tuple[str, MonitorRegister],
    readback: tuple[int, int] | None = None,
) -> Supply:
    name, monitor = current
    return Supply(TileRegister(*dac), TileRegister(*readback) if readback else None, {"mv": mv, name: monitor})


def _at(first: int, step: int, convert: Callable[[int], float], seconds: float = 0.0) -> MonitorRegister:
    return MonitorRegister(TileRegister(first, step), convert, seconds)


_REV2: Final = PacmanRevision(
    number=2,
    tiles=1,
    io_channels=range(1, 5),
    tile_bits=0xFF,  # higher bits select an analog monitor
    end=0x25000,
    analog_power=False,
    inversion=False,
    supplies={
        "vdda": _supply((0x24011, 0), _at(0x24042, 0, _high_mv), ("ma", _at(0x24041, 0, _high_ma))),
        "vddd": _supply((0x24001, 0), _at(0x24032, 0, _high_mv), ("ma", _at(0x24031, 0, _high_ma))),
    },
    board={"vplus_mv": _at(0x24022, 0, _high_mv), "vplus_ma": _at(0x24021, 0, _high_ma)},
    counts_a_volt=31_000,  # 54691 and 57060 are both called 1.8 V
    uncertainty=0.15,
    uart_clock=10e6,
)
_REV3: Final = PacmanRevision(
    number=3,
    tiles=8,
    io_channels=range(1, 33),
    end=0x26000,
    supplies={
        "vdda": _supply(
            (0x24130, 2), _at(0x24002, 0x20, _high_mv), ("shunt_uv", _at(0x24001, 0x20, _high_uv)), (0x24190, 2)
        ),
        "vddd": _supply(
            (0x24131, 2), _at(0x24012, 0x20, _high_mv), ("shunt_uv", _at(0x24011, 0x20, _high_uv)), (0x24191, 2)
        ),
    },
    counts_a_volt=25_700,
    uncertainty=0.15,
    doubts=(
        "vdda_shunt_uv, vddd_shunt_uv: the voltage across each shunt (10 uV a count) in place of a current, because "
        "public programs differ by a factor of 10 (5 or 0.5 mA a count)",
    ),
)
_REV4: Final = PacmanRevision(
    number=4,
    tiles=8,
    io_channels=range(1, 33),
    end=0x25000,
    supplies={
        "vdda": _supply((0x24010, 1), _at(0x24030, 1, float), ("ma", _at(0x24050, 1, _idda_ma_4))),
        "vddd": _supply((0x24020, 1), _at(0x24040, 1, _vddd_mv_4, 1.0), ("ma", _at(0x24060, 1, _iddd_ma_4, 1.0))),
    },
    counts_a_volt=25_700,
    uncertainty=0.15,
    uart_clock=50e6,
    doubts=(
        "vdda_ma: 0.5 mA a count, as its shunt and the newest server have it; one public program shows a fifth of it",
        "vddd_mv: the newest server has a factor that differs by 2.4 %",
    ),
)
_REV5: Final = PacmanRevision(
    number=5,
    tiles=10,
    io_channels=range(1, 34),
    end=0x25000,
    supplies={
        "vdda": _supply((0x24010, 1), _at(0x24030, 1, float, 0.01), ("ma", _at(0x24050, 1, _quarter, 0.01))),
        "vddd": _supply((0x24020, 1), _at(0x24040, 1, float, 0.01), ("ma", _at(0x24060, 1, _quarter, 0.01))),
    },
    counts_a_volt=25_700,  # not established: the value of rev4
    uncertainty=0.5,
    uart_clock=10e6,
    doubts=(
        "vdda_ma, vddd_ma: a fourth of what the server says, which assumes 20 A full scale where the monitor has 5 A; "
        "one public program shows an eighth",
    ),
)

#: Revision 5 with the firmware that has 32 UARTs: four for each of the first two tiles, and three for each other tile,
#: without the io_channels 12, 16, ..., 40.
REVISION_5_WITH_32: Final = replace(_REV5, io_channels=[c for c in range(1, 41) if c <= 8 or c % 4])

REVISIONS: Final = {revision.number: revision for revision in (_REV2, _REV3, _REV4, _REV5)}
#: End of the smallest register map: lower addresses can be read on any board.
READABLE: Final = min(revision.end for revision in REVISIONS.values())


def tile_mask(revision: PacmanRevision | None, firmware: int) -> int:
    """Return the bits of TILES that switch tiles; without a revision, all that may. `firmware`: value of FIRMWARE."""
    if revision is not None:
        return (1 << revision.tiles) - 1
    return TILE_BITS & ~MODULE_2_CLOCKS if firmware == MODULE_2 else TILE_BITS


def uart(io_channel: int, name: str = "clock_ratio", revision: PacmanRevision | None = None) -> int:
    """Return the address of a register (a name of UART) of an io_channel's UART.

    `revision` None: io_channels have the numbers of their UARTs, as on all boards but REVISION_5_WITH_32.
    """
    number = io_channel if revision is None else revision.uart(io_channel)
    return TRIGGER_BANK + BANK * number + UART[name]


def names(revision: PacmanRevision | None, firmware: int) -> dict[str, int]:
    """Return the addresses of a board's registers by name; without a revision, those that all boards have.

    `firmware`: value of FIRMWARE. Monitors have the suffix `_raw`, because their values are not converted.
    """
    fpga = {"firmware_major": 0x0, "firmware_minor": 0x4, "firmware_build": 0x8, "firmware_debug": 0xC, "tiles": TILES}
    if revision is None or revision.analog_power:
        fpga["analog_power"] = POWER
    if firmware == MODULE_2:
        fpga["uart_receivers"] = MODULE_2_CHANNELS
    elif revision is not None and revision.number == 5:
        fpga["tile_sync"] = 0x18
    fpga |= {"clock_status": CLOCK_STATUS, "clock_ticks": CLOCK, "clock_control": CLOCK_CONTROL}
    fpga |= {"reset_cycles": RESET_CYCLES, "heartbeat_cycles": HEARTBEAT_CYCLES}
    if revision is None or revision.inversion:
        fpga["clock_divider"] = 0x101C
    fpga |= {"trigger_control": TRIGGER_CONTROL, "trigger_mask": TRIGGER_MASK, "trigger_cycles": TRIGGER_CYCLES}
    if revision is not None and revision.number == 5:
        fpga["uart_receivers_off"] = RECEIVERS_OFF
    for io_channel in (_REV2 if revision is None else revision).io_channels:
        for name in UART:
            if name != "inversion" or revision is None or revision.inversion:
                fpga[f"uart_{io_channel}_{name}"] = uart(io_channel, name, revision)
    i2c = {"map_version": MAP_VERSION}
    if revision is not None:
        for tile in range(revision.tiles):
            for supply, registers in revision.supplies.items():
                i2c[f"tile_{tile}_{supply}_dac"] = registers.dac.address(tile)
                if registers.readback is not None:
                    i2c[f"tile_{tile}_{supply}_dac_readback"] = registers.readback.address(tile)
            for name, monitor in revision.monitors().items():
                i2c[f"tile_{tile}_{name}_raw"] = monitor.register.address(tile)
        i2c |= {f"{name}_raw": monitor.register.first for name, monitor in revision.board.items()}
    return fpga | i2c


def fault_of(register: int, revision: PacmanRevision | None, *, writing: bool) -> str | None:
    """Return why a register must not be read or written; None if it may.

    Addresses past the I2C window end the command server of rev3 and rev4, and nobody knows what a bank of the FPGA
    without registers does. `revision` None: not known, and the strictest bounds count.
    """
    if register >= I2C:
        end = READABLE if revision is None else revision.end
        if register >= end:
            return f"the board's registers end at 0x{end - 1:x}; a request beyond can crash its server"
        if writing and revision is None:
            return "it may set a DAC, and the board's revision is not known"
        return None
    if register & 3:
        return f"registers of the FPGA are at multiples of 4, and this would be 0x{register & ~3:x}"
    banks = TRIGGER_BANK + BANK * (1 + (_CHANNELS if revision is None else len(revision.io_channels)))
    if register >= banks:
        return (
            f"the board's FPGA has no registers from 0x{banks:x} to 0x{I2C - 1:x}; the effect of a request is unknown"
        )
    if writing and register % BANK not in _WRITABLE:
        return "it cannot be written: writable registers of a bank are at 0x10 to 0x1c"
    return None


def read(register: int) -> bytes:
    return _ORDER.pack(b"R", register, 0)


def write(register: int, value: int) -> bytes:
    if not 0 <= value < 1 << 32:
        raise RequestError(f"PACMAN register 0x{register:x}: expected a value of 32 bits, found {value}")
    return _ORDER.pack(b"W", register, value)


def values_in(body: bytes) -> list[int]:
    """Return the values in a PACMAN's answer, one for each register word."""
    return [value for _, _, value in _ORDER.iter_unpack(body)]
