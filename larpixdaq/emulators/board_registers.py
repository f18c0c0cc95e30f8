"""Registers of an emulated PACMAN: those of its FPGA, and the DACs and monitors of its power supplies (I2C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from larpixdaq.emulators.revisions import VDDA, VDDD, EmulatedRevision, Rail

TILE_ENABLE: Final = 0x10
ANALOG_POWER: Final = 0x14
CLOCK_STATUS: Final = 0x1000
CLOCK_TIMESTAMP: Final = 0x1004
CLOCK_CONTROL: Final = 0x1010
RESET_CYCLES: Final = 0x1014
HEARTBEAT_CYCLES: Final = 0x1018
CLOCK_DIVIDER: Final = 0x101C
TRIGGER_CONTROL: Final = 0x2010
TRIGGER_CYCLES: Final = 0x2018
#: Bytes of a bank of registers, and an offset: the n-th UART is at UARTS + n BANK.
BANK: Final = 0x1000
UARTS: Final = 0x2000
CLOCK_RATIO: Final = 0x10
INVERSION: Final = 0x1C
#: First register of the I2C bus; lower addresses are registers of the FPGA.
I2C: Final = 0x24000
#: Writable registers in each bank of the FPGA. Those before them are read-only, and no others exist.
_WRITABLE: Final = range(0x10, 0x20, 4)
_ANALOG_ON: Final = 1
_U32: Final = 0xFFFFFFFF
#: Both PLLs locked, clock valid.
_CLOCK_GOOD: Final = 0b1011
#: Frequency of the master clock in Hz, and its divider for the chips' clock on boards without register 0x101C.
_MASTER: Final = 40_000_000
_FIXED_DIVIDER: Final = 4
#: Current of a chip at 1.8 V, in mA.
_CURRENT: Final = {VDDA: 2.5, VDDD: 4.0}

#: FPGA registers that are not 0 at power-up.
_DEFAULTS: Final = {
    CLOCK_CONTROL: 0b10,  # heartbeat enabled
    RESET_CYCLES: 0x100,
    HEARTBEAT_CYCLES: 1_000_000_000,  # ticks of 100 MHz
    CLOCK_DIVIDER: 4,  # 10 MHz
    TRIGGER_CYCLES: 10_000_000,
}


class ServerCrashError(Exception):
    """A request that the real command server does not survive."""


class BoardRegisters:
    """All registers of a board by address, and their effects on supplies, lines and resets.

    `chips`: number on each tile, for the currents. `overload`: further mA that both supplies of a tile, from 0, draw at
    1.8 V. `inverted`: the tiles' lines are inverted. `slow_read`: seconds that replace the revision's.
    `on_change(register, old, new)` is called after each write to a register that exists. `clock()` returns the board's
    clock in ticks.
    """

    def __init__(
        self,
        revision: EmulatedRevision,
        *,
        chips: list[int] | None = None,
        inverted: bool = False,
        slow_read: float | None = None,
        overload: dict[int, float] | None = None,
    ) -> None:
        self.revision = revision
        self._overload = overload or {}
        self.on_change: Callable[[int, int, int], None] = lambda register, old, new: None
        self.clock: Callable[[], int] = lambda: 0
        self._chips = [*(chips or []), *[0] * revision.tiles][: revision.tiles]
        self._inverted = 0b11 if inverted else 0
        self._slow_read = revision.slow_read if slow_read is None else slow_read
        #: First register of each UART by io_channel, without those that would be on the I2C bus.
        self._banks = {c: UARTS + BANK * n for n, c in enumerate(revision.io_channels, 1) if UARTS + BANK * n < I2C}
        self._constants = {CLOCK_STATUS: _CLOCK_GOOD} | revision.constants
        self._restore()

    def _restore(self) -> None:
        """Set all registers to their values at power-up."""
        revision = self.revision
        self._fpga = {bank + offset: 0 for bank in (0, BANK, UARTS, *self._banks.values()) for offset in _WRITABLE}
        self._fpga |= _DEFAULTS | {bank + CLOCK_RATIO: revision.uart_ratio for bank in self._banks.values()}
        self._dacs = {rail: 0 for rails in revision.dacs.values() for rail in rails}
        self._scratch = dict.fromkeys(revision.scratch, 0)

    def restart(self) -> None:
        """Set all registers to their values at power-up, with their effects on the chips."""
        old = self._fpga
        self._restore()
        for register, value in self._fpga.items():
            if value != old[register]:
                self.on_change(register, old[register], value)

    def __getitem__(self, register: int) -> int:
        """Value of a writable register of the FPGA; 0 for registers that this board does not have."""
        return self._fpga.get(register, 0)

    def _address(self, register: int) -> int:
        revision = self.revision
        if register < I2C:
            return register & ~3
        if revision.crashes_at is not None and register >= revision.crashes_at:
            end = revision.crashes_at
            raise ServerCrashError(f"register 0x{register:x} is past the I2C window, which ends at 0x{end:x}")
        return I2C | register & 0xFFF if revision.masked else register

    def read(self, register: int) -> int:
        """Return the value of any register. Raises ServerCrashError where the real server crashes."""
        address = self._address(register)
        if address == CLOCK_TIMESTAMP:
            return self.clock() & _U32
        for values in (self._fpga, self._constants, self._scratch):
            if address in values:
                return values[address]
        if address in self.revision.readbacks:
            return self._dacs[self.revision.readbacks[address]] << 16
        if address in self.revision.monitors:
            rail, encode, _ = self.revision.monitors[address]
            volts = self.volts(rail)
            ma = self._chips[rail.tile] * _CURRENT[rail.name] + self._overload.get(rail.tile, 0.0)
            return encode(1000 * volts, ma * volts / 1.8)
        return 0

    def read_seconds(self, register: int) -> float:
        """Return the seconds that the server sleeps before it answers a read of this register."""
        monitor = self.revision.monitors.get(self._address(register))
        return self._slow_read if monitor and monitor.slow else 0.0

    def write(self, register: int, value: int) -> None:
        """Write any register; writes to read-only registers are ignored."""
        address = self._address(register)
        rails = self.revision.dacs.get(address, ())
        if rails:
            old = self._dacs[rails[0]]
            for rail in rails:
                self._dacs[rail] = value & 0xFFFF
        elif address in self._fpga:
            old, self._fpga[address] = self._fpga[address], value
        elif address in self._scratch:
            old, self._scratch[address] = self._scratch[address], value
        else:
            return
        self.on_change(address, old, value)

    def volts(self, rail: Rail) -> float:
        """Return the voltage of the rail at the tile, 0 while the tile or the analog power is off."""
        analog = self[ANALOG_POWER] & _ANALOG_ON or not self.revision.analog_switch
        if not analog or not self[TILE_ENABLE] >> rail.tile & 1:
            return 0.0
        return self._dacs[rail] / self.revision.dac_per_volt

    def uart_line(self, io_channel: int) -> UartLine:
        """Return the line of an io_channel, as set by its UART's registers and those of the board."""
        revision = self.revision
        clocked = not revision.tile_clocks or bool(self[TILE_ENABLE] & revision.tile_clocks)
        if not clocked or io_channel not in revision.io_channels:
            return UartLine(False, False, 0)
        receives = True
        uart = revision.io_channels.index(io_channel)  # from 0
        if revision.receivers is not None and uart < 32:
            receives = self[revision.receivers] >> uart & 1 == revision.receiver_on
        inverted = self._inverted
        if revision.inversion:
            inverted ^= self[self._banks.get(io_channel, I2C) + INVERSION] & 0b11
        return UartLine(not inverted & 1, receives and not inverted & 2, self._ticks_per_bit(io_channel))

    def _ticks_per_bit(self, io_channel: int) -> int:
        divider = self[CLOCK_DIVIDER] & 0xFF if self.revision.divider else _FIXED_DIVIDER
        if not divider:
            return 0
        ticks, remainder = divmod(self.clock_ratio(io_channel) * _MASTER, self.revision.uart_clock * divider)
        return 0 if remainder else ticks

    def clock_ratio(self, io_channel: int) -> int:
        """Return the ticks of the UARTs' clock for each bit."""
        bank = self._banks.get(io_channel)
        return self.revision.uart_ratio if bank is None else self[bank + CLOCK_RATIO]

    def reset_tiles(self) -> int:
        """Return the mask of the tiles that a reset reaches, bit 0 for tile 0."""
        tiles = (1 << self.revision.tiles) - 1
        return tiles & ~(self[CLOCK_DIVIDER] >> 16) if self.revision.reset_mask else tiles

    def switch_on(self, tiles: int, volts: tuple[float, float], ticks_per_bit: int) -> None:
        """Set supplies, clocks and UARTs as after an operator's power-up of these tiles (mask, bit 0 for tile 0).

        `volts`: VDDA and VDDD. `ticks_per_bit`: ticks of the chips' clock for each bit on their lines.
        """
        revision = self.revision
        for rail in self._dacs:
            if tiles >> rail.tile & 1:
                self._dacs[rail] = round(volts[rail.name] * revision.dac_per_volt)
        self._fpga[ANALOG_POWER] = _ANALOG_ON if revision.analog_switch else 0
        self._fpga[TILE_ENABLE] = tiles | revision.tile_clocks
        if revision.receivers is not None:
            self._fpga[revision.receivers] = _U32 if revision.receiver_on else 0
        for bank in self._banks.values():
            self._fpga[bank + CLOCK_RATIO] = ticks_per_bit * revision.uart_clock * _FIXED_DIVIDER // _MASTER
            self._fpga[bank + INVERSION] = self._inverted


class UartLine(NamedTuple):
    """Serial line of an io_channel: whether words reach the chips and the board, and its speed.

    `ticks_per_bit`: ticks of the chips' clock, 0 when that is no whole number.
    """

    to_chips: bool
    from_chips: bool
    ticks_per_bit: int
