"""Orders to the boards through the producer: registers, power, reset and clocks of each kind of board.

The methods for routines have the names, arguments and results of larpix-control's PACMAN_IO. Without an io_group they
ask all boards and return {io_group: value}.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

from larpixdaq.errors import RequestError
from larpixdaq.hardware.pacman_registers import (
    BANK,
    CLOCK_CONTROL,
    I2C,
    MAP_VERSION,
    PING,
    POWER,
    RESET_BIT,
    RESET_CYCLES,
    REVISION_5_WITH_32,
    REVISIONS,
    TILES,
    TRIGGER_BANK,
    PacmanRevision,
    fault_of,
    read,
    uart,
    values_in,
    write,
)
from larpixdaq.hardware.power import SETTLING, Dacs, Progress, TilePower, no_progress
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.protocol import hardware
from larpixdaq.schema import Asic

#: Clock ticks per bit of a UART at power-up: 5 Mb/s.
RATIO: Final = 10
#: Bits of a word on its line: 64, start and stop.
BITS: Final = 66
#: Frames per second of a serial board, of all its chips together, at 1,000,000 baud.
SERIAL_FRAMES: Final = 10_000.0
#: Number of io_channels whose UART register is no DAC register in any revision of PACMAN.
_CHANNELS: Final = 32
#: Frequency in Hz of the chips' clock, which counts the length of a reset.
_MASTER_CLOCK: Final = 10e6
NO_REVISION: Final = (
    "its revision is not known, and neither are the registers of its supplies: "
    "start the producer with --pacman-revision"
)
#: Default DAC setting of larpix-control, which is meant for rev2.
_REV2_DAC: Final = 0xD5A3
#: Lengths of a reset in ticks: the minimum to have an effect, the maximum at which chips keep their configuration, and
#: the minimum at which they lose it. Known: v2 keeps it at 10 and 24, and loses it from 256; v3 keeps it from 15 to 30.
_KEEP: Final = {Asic.V2: (0, 24, 256), Asic.V2_DIAGNOSTICS: (0, 24, 256), Asic.V3: (15, 30, 31)}


class BoardOrders:
    """Orders to boards, beside words for chips. BoardError names the board and the reason of the failure."""

    def __init__(self, link: ProducerPipe, invalidate: Callable[[list[int]], None], dacs: Dacs | None = None) -> None:
        """`invalidate` is called with io_groups before their chips are reset or their power is switched. `dacs` gets
        the DAC settings that are sent."""
        self._link = link
        self._invalidate = invalidate
        self.dacs: Dacs = {} if dacs is None else dacs
        self.kinds = {board.io_group: board.kind for board in link.setup.boards if board.kind}
        self.names = {board.io_group: board.name for board in link.setup.boards}
        self._revisions = {board.io_group: board.revision for board in link.setup.boards}
        self._uarts = {board.io_group: board.uarts for board in link.setup.boards}

    def groups(self, requested: Any = None) -> list[int]:
        """Return io_groups: None (all), a number, or a list. RequestError for a board that takes no commands."""
        if requested is None:
            if not self.kinds:
                raise RequestError("no board here takes commands")
            return list(self.kinds)
        groups = requested if isinstance(requested, list) else [requested]
        known = ", ".join(map(str, self.kinds)) or "none"
        if not groups:
            raise RequestError(f"io_group: expected a number, a list, or None for all ({known}), found none")
        for group in groups:
            if isinstance(group, bool) or not isinstance(group, int) or group not in self.kinds:
                raise RequestError(
                    f"io_group {group!r:.100}: no such board takes commands here; those that do: {known}"
                )
        return list(dict.fromkeys(groups))

    def groups_of_kind(self, what: str, *kinds: str, requested: Any = None) -> list[int]:
        """Return io_groups as groups() does; RequestError if a board is not of these kinds."""
        groups = self.groups(requested)
        for group in groups:
            if self.kinds[group] not in kinds:
                raise RequestError(f"{what}: {self.names[group]} cannot do that ({', '.join(kinds)} boards can)")
        return groups

    def ask_all(self, bodies: dict[int, bytes], seconds: float = 0.0) -> dict[int, bytes | BoardError]:
        """Ask boards in parallel; returns answers or errors. `seconds`: time needed beyond the usual limit."""
        numbers = {io_group: self._link.post(io_group, body, seconds) for io_group, body in bodies.items()}
        answers: dict[int, bytes | BoardError] = {}
        for io_group, number in numbers.items():
            try:
                answers[io_group] = self._link.await_answer(number)
            except BoardError as error:
                answers[io_group] = error
        return answers

    def values(self, io_group: int, orders: Iterable[bytes], seconds: float = 0.0) -> list[int]:
        """Read and write registers of a PACMAN in one request. Returns the values of all registers, in this order."""
        self.groups_of_kind("register", "pacman", requested=io_group)
        return values_in(self._link.ask(io_group, b"".join(orders), seconds))

    # The revision of a PACMAN, which determines its registers of power and DACs.

    def revision(self, io_group: int) -> PacmanRevision | None:
        """Return the register map of a board, from its configuration or from the board itself; None if not known.

        BoardError if the board contradicts its configuration.
        """
        (map_version,) = self.values(io_group, [read(MAP_VERSION)])
        return self.revision_of(io_group, map_version)

    def revision_of(self, io_group: int, map_version: int) -> PacmanRevision | None:
        """Return the same as revision(); `map_version`: value of the board's register MAP_VERSION."""
        number = self._revisions[io_group]
        if number and map_version != (number if number == 5 else 0):
            raise BoardError(
                f"{self.names[io_group]}: its revision is {number} by --pacman-revision, but its register "
                f"0x{MAP_VERSION:x} reads {map_version}: 5 on servers of revision 5, 0 on all others"
            )
        if (number or map_version) == 5 and self._uarts[io_group] == 32:
            return REVISION_5_WITH_32
        return REVISIONS.get(number or map_version)

    def known_revision(self, io_group: int) -> PacmanRevision:
        """Return the register map of a board; RequestError if it is not known."""
        revision = self.revision(io_group)
        if revision is None:
            raise RequestError(f"{self.names[io_group]}: {NO_REVISION} {io_group}=N, N from 2 to 5")
        return revision

    def has_io_channel(self, io_group: int, io_channel: int) -> bool:
        """Return False for the io_channels that are missing on a board of revision 5 with 32 UARTs."""
        return self._uarts[io_group] != 32 or io_channel in REVISION_5_WITH_32.io_channels

    def io_channels(self, io_group: int, requested: list[int] | None) -> list[int]:
        """Return io_channels of a PACMAN (None: all); RequestError for an io_channel whose UART has no registers."""
        revision = self.revision(io_group)
        known = range(1, _CHANNELS + 1) if revision is None else revision.io_channels
        if requested is None:
            if revision is None:
                raise RequestError(
                    f"{self.names[io_group]}: its revision is not known, and neither is the number of its io_channels: "
                    f"name them, or start the producer with --pacman-revision {io_group}=N, N from 2 to 5"
                )
            return list(known)
        for io_channel in requested:
            if io_channel not in known:
                suffix = "" if revision is None else f" of revision {revision.number}"
                without = "" if len(known) == known[-1] else ", without 12, 16, 20 and so on"
                raise RequestError(
                    f"{self.names[io_group]}: io_channel: boards{suffix} have UART registers of 1 to {known[-1]}"
                    f"{without}, found {io_channel}"
                )
        return requested

    # Methods of PACMAN_IO.

    def _each(self, io_group: int | None, action: Callable[[int], Any]) -> Any:
        if io_group is None:
            return {group: action(group) for group in self.groups()}
        return action(io_group)

    def set_reg(self, reg: int, val: int, io_group: int | None = None) -> Any:
        """Set a 32-bit register of the board. Refused if this could set a DAC or crash the board's server."""
        return self._each(io_group, lambda group: self._set_reg(group, reg, val))

    def _set_reg(self, io_group: int, register: int, value: int) -> None:
        revision = self.known_revision(io_group) if register >= I2C else self._revision_for(io_group, register)
        self.check_register(io_group, register, revision, writing=True)
        self.forget_chips(io_group, register, value)
        self.values(io_group, [write(register, value)])

    def get_reg(self, reg: int, io_group: int | None = None) -> Any:
        """Read a 32-bit register of the board. Refused if this could crash the board's server."""
        return self._each(io_group, lambda group: self._get_reg(group, reg))

    def _get_reg(self, io_group: int, register: int) -> int:
        revision = self._revision_for(io_group, register)
        self.check_register(io_group, register, revision)
        seconds = revision.seconds(register) if revision is not None and register >= I2C else 0.0
        return self.values(io_group, [read(register)], seconds)[0]

    def _revision_for(self, io_group: int, register: int) -> PacmanRevision | None:
        """Return the register map, if known, for a register that not all boards have; None for others."""
        return self.revision(io_group) if register >= TRIGGER_BANK + BANK * (REVISIONS[2].io_channels[-1] + 1) else None

    def check_register(
        self, io_group: int, register: int, revision: PacmanRevision | None, *, writing: bool = False
    ) -> None:
        """Raise RequestError for a register that must not be read or written (pacman_registers.fault_of)."""
        if fault := fault_of(register, revision, writing=writing):
            raise RequestError(f"{self.names[io_group]}: register 0x{register:x}: {fault}")

    def forget_chips(self, io_group: int, register: int, value: int) -> None:
        """Invalidate what is known of the board's chips, if this write may reset them or switch their power."""
        if register >= I2C or register in (TILES, POWER) or (register == CLOCK_CONTROL and value & RESET_BIT):
            self._invalidate([io_group])

    def ping(self, io_group: int | None = None) -> Any:
        """Return whether the board answers."""
        return self._each(io_group, lambda group: not isinstance(self.ask_pings(group)[group], BoardError))

    def ask_pings(self, requested: Any) -> dict[int, bytes | BoardError]:
        """Send a ping to these boards (None: all). Returns answers or errors; RequestError as in groups_of_kind()."""
        groups = self.groups_of_kind("ping", "pacman", "bern", requested=requested)
        return self.ask_all({group: PING if self.kinds[group] == "pacman" else b"PING_HB" for group in groups})

    def get_vddd(self, io_group: int | None = None, tile: int = 0) -> Any:
        """Measure the digital supply of a tile (from 0): (mV, mA); mA None if the board's unit is not established."""
        return self._each(io_group, lambda group: self._measure_supply("vddd", group, tile))

    def get_vdda(self, io_group: int | None = None, tile: int = 0) -> Any:
        """Measure the analog supply of a tile (from 0): (mV, mA); mA None if the board's unit is not established."""
        return self._each(io_group, lambda group: self._measure_supply("vdda", group, tile))

    def _measure_supply(self, name: str, io_group: int, tile: int) -> tuple[float, float | None]:
        return self.tile_power(io_group, supplies=True).measure(tile, name)

    def get_vplus(self, io_group: int | None = None) -> Any:
        """Measure the input supply: (mV, mA); only rev2 can."""
        return self._each(io_group, self._measure_input)

    def _measure_input(self, io_group: int) -> tuple[float, float]:
        revision = self.known_revision(io_group)
        if not revision.board:
            raise RequestError(f"{self.names[io_group]}: boards of revision {revision.number} do not measure VPLUS")
        monitors = list(revision.board.values())
        values = self.values(io_group, [read(monitor.register.first) for monitor in monitors])
        mv, ma = (monitor.convert(value) for monitor, value in zip(monitors, values, strict=True))
        return mv, ma

    def set_vddd(
        self, vddd_dac: int | None = None, io_group: int | None = None, settling_time: float = SETTLING, tile: int = 0
    ) -> Any:
        """Set the DAC of a tile's digital supply and wait `settling_time` seconds. Returns (mV, mA) as get_vddd()."""
        return self._each(io_group, lambda group: self._set_supply("vddd", group, tile, vddd_dac, settling_time))

    def set_vdda(
        self, vdda_dac: int | None = None, io_group: int | None = None, settling_time: float = SETTLING, tile: int = 0
    ) -> Any:
        """Set the DAC of a tile's analog supply and wait `settling_time` seconds. Returns (mV, mA) as get_vdda()."""
        return self._each(io_group, lambda group: self._set_supply("vdda", group, tile, vdda_dac, settling_time))

    def _set_supply(self, name: str, io_group: int, tile: int, dac: int | None, settling: float) -> Any:
        power = self.tile_power(io_group, supplies=True)
        revision = power.known_revision.number
        if dac is None and revision == 2:
            dac = _REV2_DAC
        if dac is None:
            raise RequestError(f"set_{name}: revision {revision} has no default DAC setting: name one")
        self._invalidate([io_group])
        power.set_dac(name, tile, dac)
        time.sleep(settling or 0)
        return power.measure(tile, name)

    def tile_power(
        self, io_group: int, *, off: bool = False, supplies: bool = False, progress: Progress = no_progress
    ) -> TilePower:
        """Return the tiles of a board, to switch them or to set or measure their `supplies`.

        RequestError if the registers of the supplies are not known. With `off`, a wrong configured revision is ignored,
        because it must always be possible to switch tiles off.
        """
        revision = None
        with contextlib.suppress(BoardError) if off else contextlib.nullcontext():
            revision = self.known_revision(io_group) if supplies else self.revision(io_group)

        def sent(tile: int, supply: str, dac: int) -> None:
            self.dacs[io_group, tile, supply] = dac

        def ramping(tile: int, dacs: list[int]) -> None:
            self._link.send(hardware.Ramp(io_group, tile, dacs))

        return TilePower(partial(self.values, io_group), self.names[io_group], revision, progress, sent, ramping)

    def enable_tile(self, tile_indices: Any = None, io_group: int | None = None) -> Any:
        """Switch tiles on (index, list of indices from 0, None: all). Returns the mask of the tiles that are on."""
        return self._each(io_group, lambda group: self._switch_tiles(group, tile_indices, on=True))

    def disable_tile(self, tile_indices: Any = None, io_group: int | None = None) -> Any:
        """Switch tiles off, as in enable_tile(). Returns the mask of the tiles that are on."""
        return self._each(io_group, lambda group: self._switch_tiles(group, tile_indices, on=False))

    def _switch_tiles(self, io_group: int, indices: Any, *, on: bool) -> int:
        power = self.tile_power(io_group, off=not on)
        chosen = None if indices is None else [indices] if isinstance(indices, int) else list(indices)
        self._invalidate([io_group])
        return power.enable(chosen) if on else power.disable(chosen)

    def set_uart_clock_ratio(self, channel: int, ratio: int, io_group: int | None = None) -> Any:
        """Set the clock ticks per bit of an io_channel's UART and read them back; BoardError if they differ."""
        return self._each(
            io_group, lambda group: self.set_ratios(group, self.io_channels(group, [channel]), ratio)[channel]
        )

    def set_ratios(self, io_group: int, channels: list[int], ratio: int) -> dict[int, int]:
        """Set the clock ticks per bit of checked io_channels; BoardError if a register reads back another value."""
        revision = self.revision(io_group)
        registers = [uart(channel, revision=revision) for channel in channels]
        orders = [order for register in registers for order in (write(register, ratio), read(register))]
        readings = dict(zip(channels, self.values(io_group, orders)[1::2], strict=True))
        wrong = [f"{channel} ({value})" for channel, value in readings.items() if value != ratio]
        if wrong:
            raise BoardError(
                f"{self.names[io_group]}: clock ratio {ratio}: {len(wrong)} of {len(readings)} io_channels read back "
                f"something else: {', '.join(wrong[:10])}"
            )
        return readings

    def capacity(self, lines: Sequence[tuple[int, int]]) -> list[float]:
        """Return the maximum packets per second of each (io_group, io_channel), from the clock of its UART."""
        capacities = {
            line: SERIAL_FRAMES if self.kinds.get(line[0]) == "serial" else bits_a_second(RATIO) / BITS
            for line in lines
        }
        pacmans = {io_group for io_group, _ in lines if self.kinds.get(io_group) == "pacman"}
        for io_group in sorted(pacmans):
            revision = self.revision(io_group)
            known = range(1, _CHANNELS + 1) if revision is None else revision.io_channels
            uarts = {
                line: read(uart(line[1], revision=revision))
                for line in capacities
                if line[0] == io_group and line[1] in known
            }
            ratios = self.values(io_group, uarts.values())
            clock = None if revision is None else revision.uart_clock
            for line, ratio in zip(uarts, ratios, strict=True):
                capacities[line] = bits_a_second(ratio, clock) / BITS
        return list(capacities.values())

    def reset_larpix(self, length: int = 256, io_group: int | None = None) -> Any:
        """Reset the chips for `length` ticks of their clock. Returns the value of the clock control register."""
        return self._each(io_group, lambda group: self.reset(group, length))

    def reset(self, io_group: int, length: int) -> int:
        """Reset the chips of a PACMAN and wait for the end. Returns the value of its clock control register."""
        if self.reset_keeps_configuration(length) is not True:
            self._invalidate([io_group])
        orders = [write(RESET_CYCLES, length), read(RESET_CYCLES), read(CLOCK_CONTROL)]
        _, cycles, control = self.values(io_group, orders)
        idle = control & ~RESET_BIT
        orders = [write(CLOCK_CONTROL, idle | RESET_BIT), write(CLOCK_CONTROL, idle), read(CLOCK_CONTROL)]
        after = self.values(io_group, orders)[2]
        time.sleep(length / _MASTER_CLOCK)
        for what, setting, readback in (("length of a reset", length, cycles), ("clock control", idle, after)):
            if readback != setting:
                raise BoardError(f"{self.names[io_group]}: {what}: set to {setting}, reads back {readback}")
        return after

    def reset_keeps_configuration(self, length: int) -> bool | None:
        """Return whether chips keep their configuration in a reset of `length` ticks; None if not known.

        RequestError if such a reset has no effect.
        """
        bounds = _KEEP.get(Asic(self._link.setup.generation))
        if bounds is None:
            return None
        least, keep, lose = bounds
        if length < least:
            raise RequestError(
                f"reset: length {length}: chips ignore a reset below {least} ticks, and lose their "
                f"configuration from {lose} on"
            )
        return True if length <= keep else False if length >= lose else None


def bits_a_second(ratio: int, clock: float | None = None) -> float:
    """Return the bits per second of a UART with `ratio` ticks of its `clock` (Hz) per bit.

    Clock None: 10 MHz with ratios below RATIO, as in older firmware, otherwise 50 MHz.
    """
    return (clock or (50e6 if ratio >= RATIO else 10e6)) / max(ratio, 1)
