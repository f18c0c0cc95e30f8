"""The registers of an emulated PACMAN: those of its FPGA, and the DACs and monitors of its power supplies (I2C)."""

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
#: The UART of io_channel n is so many banks behind this one.
UARTS: Final = 0x2000
BANK: Final = 0x1000
CLOCK_RATIO: Final = 0x10
INVERSION: Final = 0x1C
#: Where registers of the I2C bus begin.
I2C: Final = 0x24000
#: In each bank of the FPGA: registers that can be written. Those in front of them are read-only, and no others exist.
_WRITABLE: Final = range(0x10, 0x20, 4)
_ANALOG_ON: Final = 1
_U32: Final = 0xFFFFFFFF
#: Both PLLs locked, clock valid.
_CLOCK_GOOD: Final = 0b1011
#: What the chips' clock is divided from, in Hz, and its rate where nothing divides it.
_MASTER: Final = 40_000_000
_UNDIVIDED: Final = 4
#: What a chip draws at 1.8 V, in mA, on VDDA and VDDD.
_DRAWN: Final = {VDDA: 2.5, VDDD: 4.0}

#: What FPGA registers are at power-up, where that is not 0.
_DEFAULTS: Final = {
    CLOCK_CONTROL: 0b10,  # heartbeat enabled
    RESET_CYCLES: 0x100,
    HEARTBEAT_CYCLES: 1_000_000_000,  # ticks of 100 MHz
    CLOCK_DIVIDER: 4,  # 10 MHz
    TRIGGER_CYCLES: 10_000_000,
}


class ServerCrashError(Exception):
    """A request that the real command server does not survive."""


class UartLine(NamedTuple):
    """What an io_channel's UART passes on. `ticks_per_bit`: ticks of the chips' clock, 0 for no whole number."""

    to_chips: bool
    from_chips: bool
    ticks_per_bit: int


class BoardRegisters:
    """`chips`: how many there are on each tile, for the currents. `changed(register, before, after)` is called after
    each write to a register that exists. `inverted`: the tiles' lines are wired the other way round. `slow_read`:
    seconds, in place of the revision's."""

    def __init__(
        self,
        revision: EmulatedRevision,
        *,
        chips: list[int] | None = None,
        inverted: bool = False,
        slow_read: float | None = None,
    ) -> None:
        self.revision = revision
        self.changed: Callable[[int, int, int], None] = lambda register, before, after: None
        #: What the board's clock shows.
        self.clock: Callable[[], int] = lambda: 0
        self._chips = [*(chips or []), *[0] * revision.tiles][: revision.tiles]
        self._inverted = 0b11 if inverted else 0
        self._slow_read = revision.slow_read if slow_read is None else slow_read
        banks = [0, 0x1000, UARTS, *(UARTS + BANK * n for n in range(1, revision.uarts + 1))]
        self._fpga = {bank + at: 0 for bank in banks if bank < I2C for at in _WRITABLE}
        self._fpga |= _DEFAULTS
        for bank in banks[3:]:
            if bank < I2C:
                self._fpga[bank + CLOCK_RATIO] = revision.uart_ratio
        self._constants = {CLOCK_STATUS: _CLOCK_GOOD} | revision.fpga_constants | revision.constants
        self._dacs = {rail: 0 for rails in revision.dacs.values() for rail in rails}
        self._scratch = dict.fromkeys(revision.scratch, 0)

    def __getitem__(self, register: int) -> int:
        """A register of the FPGA that can be written; 0 for those that this board does not have."""
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
        """The value of any register; ServerCrashError where the real server crashes."""
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
            return encode(1000 * volts, self._chips[rail.tile] * _DRAWN[rail.name] * volts / 1.8)
        return 0

    def seconds(self, register: int) -> float:
        """How long the server takes to read this register."""
        monitor = self.revision.monitors.get(self._address(register))
        return self._slow_read if monitor and monitor.slow else 0.0

    def write(self, register: int, value: int) -> None:
        """Write any register; a value for one that cannot be written is ignored."""
        address = self._address(register)
        rails = self.revision.dacs.get(address, ())
        if rails:
            before = self._dacs[rails[0]]
            for rail in rails:
                self._dacs[rail] = value & 0xFFFF
        elif address in self._fpga:
            before, self._fpga[address] = self._fpga[address], value
        elif address in self._scratch:
            before, self._scratch[address] = self._scratch[address], value
        else:
            return
        self.changed(address, before, value)

    # What the registers mean

    def volts(self, rail: Rail) -> float:
        """What the rail has at the tile: nothing while the tile or the analog power is off."""
        analog = self[ANALOG_POWER] & _ANALOG_ON or not self.revision.analog_switch
        if not analog or not self[TILE_ENABLE] >> rail.tile & 1:
            return 0.0
        return self._dacs[rail] / self.revision.dac_per_volt

    def line(self, io_channel: int) -> UartLine:
        """What the UART of an io_channel passes on, by its own registers and those of the board."""
        revision = self.revision
        clocked = not revision.tile_clocks or bool(self[TILE_ENABLE] & revision.tile_clocks)
        if not clocked or not 1 <= io_channel <= revision.uarts:
            return UartLine(False, False, 0)
        receives = True
        if revision.receivers is not None and io_channel <= 32:
            receives = self[revision.receivers] >> io_channel - 1 & 1 == revision.receiver_on
        wrong = self._inverted
        if revision.inversion:
            wrong ^= self[UARTS + BANK * io_channel + INVERSION] & 0b11
        return UartLine(not wrong & 1, receives and not wrong & 2, self._ticks_per_bit(io_channel))

    def _ticks_per_bit(self, io_channel: int) -> int:
        divider = self[CLOCK_DIVIDER] & 0xFF if self.revision.divider else _UNDIVIDED
        if not divider:
            return 0
        ticks, rest = divmod(self.ratio(io_channel) * _MASTER, self.revision.uart_clock * divider)
        return 0 if rest else ticks

    def ratio(self, io_channel: int) -> int:
        """Ticks of the UARTs' clock for each bit."""
        return self._fpga.get(UARTS + BANK * io_channel + CLOCK_RATIO, self.revision.uart_ratio)

    def reset_tiles(self) -> int:
        """The tiles that a reset reaches, a bit each."""
        every = (1 << self.revision.tiles) - 1
        return every & ~(self[CLOCK_DIVIDER] >> 16) if self.revision.reset_mask else every

    def switch_on(self, tiles: int, volts: tuple[float, float], ticks_per_bit: int) -> None:
        """Leave all registers as after a power-up of these tiles (a bit each) by an operator: supplies, clocks, UARTs.

        `volts`: of VDDA and VDDD. `ticks_per_bit`: what the chips' lines take.
        """
        revision = self.revision
        for rail in self._dacs:
            if tiles >> rail.tile & 1:
                self._dacs[rail] = round(volts[rail.name] * revision.dac_per_volt)
        self._fpga[ANALOG_POWER] = _ANALOG_ON if revision.analog_switch else 0
        self._fpga[TILE_ENABLE] = tiles | revision.tile_clocks
        if revision.receivers is not None:
            self._fpga[revision.receivers] = _U32 if revision.receiver_on else 0
        for io_channel in range(1, revision.uarts + 1):
            bank = UARTS + BANK * io_channel
            if bank < I2C:
                self._fpga[bank + CLOCK_RATIO] = ticks_per_bit * revision.uart_clock * _UNDIVIDED // _MASTER
                self._fpga[bank + INVERSION] = self._inverted
