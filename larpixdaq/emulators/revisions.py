"""Hardware revisions of PACMAN boards: tiles, UARTs, clocks, and the registers of their power supplies.

Tiles count from 0 and io_channels from 1: tile k has io_channels 4k+1 to 4k+4. Some of these properties are choices,
because the behaviour of real boards is not published; docs/rehearsal.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

VDDA, VDDD = 0, 1

#: Computes the value of a register from millivolts and milliamperes.
Encoder = Callable[[float, float], int]


class Rail(NamedTuple):
    """Supply of a tile; `name` is VDDA or VDDD."""

    tile: int
    name: int


class EmulatedMonitor(NamedTuple):
    """Register with a measurement of a rail. The server sleeps before it answers a read of a `slow` one."""

    rail: Rail
    encode: Encoder
    slow: bool = False


@dataclass(frozen=True)
class EmulatedRevision:
    """Properties of the boards of one revision."""

    tiles: int
    #: io_channels of the UARTs, which have registers in this order.
    io_channels: Sequence[int]
    #: DAC counts per volt of a supply.
    dac_per_volt: float
    #: Registers on the I2C bus, by address; all others on it read 0. A readback is in bits 31 to 16.
    dacs: dict[int, list[Rail]]
    monitors: dict[int, EmulatedMonitor]
    readbacks: dict[int, Rail] = field(default_factory=dict)
    scratch: range = range(0)
    #: Read-only registers that are not 0, of the I2C bus and the FPGA.
    constants: dict[int, int] = field(default_factory=dict)
    #: Only the lowest 12 bits of an I2C address count.
    masked: bool = False
    #: First address at which the command server crashes.
    crashes_at: int | None = None
    #: Seconds that the server sleeps before it answers a read of a slow monitor.
    slow_read: float = 0.0
    #: Frequency that the UARTs divide, in Hz, and the ratio at power-up.
    uart_clock: int = 10_000_000
    uart_ratio: int = 2
    #: Register 0x14 switches the supplies.
    analog_switch: bool = True
    #: Register 0x101C divides the chips' clock, and masks resets by tile.
    divider: bool = True
    reset_mask: bool = False
    #: The command server repeats requests on its echo port, beside replies.
    echoes_requests: bool = False
    #: UARTs can invert their lines.
    inversion: bool = True
    #: Bits of register 0x10 that enable the chips' clocks; without any of them no chip has a clock. 0: always enabled.
    tile_clocks: int = 0
    #: Register with a bit for the receiver of each io_channel, which is on when its bit is `receiver_on`.
    receivers: int | None = None
    receiver_on: int = 1


# Encodings of measurements


def _upper_mv(mv: float, ma: float) -> int:
    return (round(mv / 4) & 0x1FFF) << 19


def _upper_mw(mv: float, ma: float) -> int:
    return (round(mv * ma / 1000) & 0xFFFF) << 16


def _upper_current(ma_per_count: float) -> Encoder:
    return lambda mv, ma: (round(ma / ma_per_count) & 0xFFFF) << 16


def _plain_mv(mv: float, ma: float) -> int:
    return round(mv)


def _shunt(mv: float, ma: float) -> int:
    return round(ma / 0.5) & 0xFFFF


def _coulomb_counter(mv: float, ma: float) -> int:
    return round(ma / 0.25) << 10 & 0xFFFFFF


def _four_times(mv: float, ma: float) -> int:
    """Four times the current, because the server assumes a full scale of 20 A and it is 5 A."""
    return round(4 * ma)


def _rev2() -> EmulatedRevision:
    vdda, vddd = Rail(0, VDDA), Rail(0, VDDD)
    monitors = {}
    for base, rail in ((0x24040, vdda), (0x24030, vddd)):
        for at, encode in enumerate((_upper_current(5.0), _upper_mv, _upper_mw), base + 1):
            monitors[at] = EmulatedMonitor(rail, encode)
    return EmulatedRevision(
        tiles=1,
        io_channels=range(1, 5),
        dac_per_volt=54_691 / 1.8,
        dacs={0x24011: [vdda], 0x24001: [vddd]},
        monitors=monitors,
        constants={0x24021: 100 << 16, 0x24022: 3000 << 19},  # VPLUS: 500 mA, 12 V
        analog_switch=False,
        divider=False,
        inversion=False,
    )


def _rev3() -> EmulatedRevision:
    rails = [Rail(n // 2, n % 2) for n in range(16)]
    monitors = {}
    for rail in rails:
        base = 0x24000 + 0x20 * rail.tile + 0x10 * rail.name
        for at, encode in enumerate((_upper_current(0.5), _upper_mv, _upper_mw), base + 1):
            monitors[at] = EmulatedMonitor(rail, encode)
    dacs = {base + n: [rail] for base in (0x24100, 0x24130) for n, rail in enumerate(rails)}
    return EmulatedRevision(
        tiles=8,
        io_channels=range(1, 33),
        dac_per_volt=25_700.0,
        dacs=dacs | {0x241B0: rails},  # the last register sets all supplies at once
        monitors=monitors,
        readbacks={0x24190 + n: rail for n, rail in enumerate(rails)},
        crashes_at=0x26000,
    )


def _rev3_fast() -> EmulatedRevision:
    """Revision 3 with firmware 1.3-1.0, whose UARTs divide 50 MHz."""
    return replace(_rev3(), uart_clock=50_000_000, uart_ratio=10)


def _revision_with_rows(tiles: int, vdda_current: Encoder, vddd_current: Encoder) -> EmulatedRevision:
    """DACs and monitors of revisions 4 and 5: a row of registers for each quantity, with one register per tile."""
    dacs, monitors = {}, {}
    for tile in range(tiles):
        vdda, vddd = Rail(tile, VDDA), Rail(tile, VDDD)
        dacs[0x24010 + tile], dacs[0x24020 + tile] = [vdda], [vddd]
        monitors[0x24030 + tile] = EmulatedMonitor(vdda, _plain_mv)
        monitors[0x24040 + tile] = EmulatedMonitor(vddd, _plain_mv, slow=True)
        monitors[0x24050 + tile] = EmulatedMonitor(vdda, vdda_current)
        monitors[0x24060 + tile] = EmulatedMonitor(vddd, vddd_current, slow=True)
    return EmulatedRevision(
        tiles=tiles,
        io_channels=range(1, 4 * tiles + 1),
        dac_per_volt=25_700.0,
        dacs=dacs,
        monitors=monitors,
        scratch=range(0x24100, 0x2410F),
    )


def _rev4() -> EmulatedRevision:
    revision = _revision_with_rows(8, _shunt, _coulomb_counter)
    return replace(revision, uart_clock=50_000_000, uart_ratio=10, crashes_at=0x25000, slow_read=1.0)


def _rev4_module2() -> EmulatedRevision:
    return replace(
        _rev4(),
        constants=dict.fromkeys(range(0, 0x10, 4), 894),
        tile_clocks=0b11 << 8,
        receivers=0x18,
        reset_mask=True,
    )


def _rev5_32_uarts() -> EmulatedRevision:
    """Revision 5 with the firmware of 32 UARTs: four each for the first two tiles, three each for the others."""
    return replace(_rev5(), io_channels=[*range(1, 9), *(4 * tile + n for tile in range(2, 10) for n in (1, 2, 3))])


def _rev5() -> EmulatedRevision:
    return replace(
        _revision_with_rows(10, _four_times, _four_times),
        constants={0x24220: 5, 0x24221: 2},
        masked=True,
        slow_read=0.01,
        echoes_requests=True,
        receivers=0x201C,
        receiver_on=0,
        reset_mask=True,
    )


#: Revisions by their names in --revision.
REVISIONS: Final = {
    "2": _rev2(),
    "3": _rev3(),
    "3b": _rev3_fast(),
    "4": _rev4(),
    "4m2": _rev4_module2(),
    "5": _rev5(),
    "5u32": _rev5_32_uarts(),
}
DEFAULT: Final = "5"
