"""Orders to the boards themselves, through the producer: registers, power, reset, clocks, of each kind of board.

The methods that routines call have the names, arguments and results of larpix-control's PACMAN_IO. Without an io_group
they ask all boards and return {io_group: value}.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from larpixdaq.errors import RequestError
from larpixdaq.hardware.pacman_registers import (
    CLOCK_CONTROL,
    I2C,
    MAP_VERSION,
    PING,
    POWER,
    READABLE,
    RESET_BIT,
    RESET_CYCLES,
    REVISIONS,
    TILES,
    PacmanRevision,
    read,
    uart,
    values_in,
    write,
)
from larpixdaq.hardware.power import SETTLE, Progress, TilePower, unheard
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.schema import Asic

#: Ticks a bit of a UART at first: 5 Mb/s.
RATIO: Final = 10
#: Of a word on its line: 64, start and stop.
BITS: Final = 66
#: What a serial board passes on in a second, of all its chips, at 1,000,000 baud.
SERIAL_FRAMES: Final = 10_000.0
#: io_channels of a PACMAN, of whatever revision, that have a UART register for certain to be no DAC's.
_CHANNELS: Final = 32
#: Hz of the chips' clock, which counts the length of a reset.
_MASTER_CLOCK: Final = 10e6
#: larpix-control's own DAC setting, which is meant for rev2.
_REV2_DAC: Final = 0xD5A3
#: Lengths of a reset (ticks) up to which chips keep their configuration, and from which on it is lost. Of v2 chips 10
#: and 24, and 256 and more are known, of v3 chips 15 to 30, and 31 and more (below 15 nothing happens).
_KEEP: Final = {Asic.V2: (0, 24, 256), Asic.V2_DIAGNOSTICS: (0, 24, 256), Asic.V3: (15, 30, 31)}


class BoardOrders:
    """What boards do beside passing words on. BoardError names the board, and why it did not."""

    def __init__(self, link: ProducerPipe, doubt: Callable[[list[int]], None]) -> None:
        """`doubt` is called with io_groups whose chips are going to be reset, or to get or lose their power."""
        self._link = link
        self._doubt = doubt
        self.kinds = {board.io_group: board.kind for board in link.setup.boards if board.kind}
        self.names = {board.io_group: board.name for board in link.setup.boards}
        self._revisions = {board.io_group: board.revision for board in link.setup.boards}

    def groups(self, asked: Any = None) -> list[int]:
        """The io_groups asked for: None (all), one, or a list. RequestError for one that takes no commands."""
        if asked is None:
            if not self.kinds:
                raise RequestError("no board here takes commands")
            return list(self.kinds)
        groups = asked if isinstance(asked, list) else [asked]
        there = ", ".join(map(str, self.kinds)) or "none"
        if not groups:
            raise RequestError(f"io_group: expected one, a list, or None for all ({there}), found none")
        for one in groups:
            if isinstance(one, bool) or not isinstance(one, int) or one not in self.kinds:
                raise RequestError(f"io_group {one!r:.100}: no such board takes commands here; those that do: {there}")
        return list(dict.fromkeys(groups))

    def only(self, what: str, *kinds: str, asked: Any = None) -> list[int]:
        """The io_groups asked for, all of which are boards of these kinds, or RequestError."""
        groups = self.groups(asked)
        for one in groups:
            if self.kinds[one] not in kinds:
                raise RequestError(f"{what}: {self.names[one]} cannot do that ({', '.join(kinds)} boards can)")
        return groups

    def ask_all(self, bodies: dict[int, bytes], seconds: float = 0.0) -> dict[int, bytes | BoardError]:
        """Ask boards side by side. `seconds`: how long a board may take for it beyond the usual limit."""
        numbers = {io_group: self._link.post(io_group, body, seconds) for io_group, body in bodies.items()}
        answers: dict[int, bytes | BoardError] = {}
        for io_group, number in numbers.items():
            try:
                answers[io_group] = self._link.finished(number)
            except BoardError as error:
                answers[io_group] = error
        return answers

    def values(self, io_group: int, orders: Iterable[bytes], seconds: float = 0.0) -> list[int]:
        """Registers of a PACMAN read and written in one request; the value of each, in the same order."""
        self.only("register", "pacman", asked=io_group)
        return values_in(self._link.ask(io_group, b"".join(orders), seconds))

    # The revision of a PACMAN: where its server has power and DACs.

    def revision(self, io_group: int) -> PacmanRevision | None:
        """The register map of a board, as configured or as the board says; None when nobody has said it.

        BoardError when the board says something else than its configuration."""
        (said,) = self.values(io_group, [read(MAP_VERSION)])
        return self.revision_of(io_group, said)

    def revision_of(self, io_group: int, said: int) -> PacmanRevision | None:
        """The same, with what the register MAP_VERSION of the board said."""
        number = self._revisions[io_group]
        if number and said != (number if number == 5 else 0):
            raise BoardError(
                f"{self.names[io_group]}: its revision is {number} by --pacman-revision, but its register "
                f"0x{MAP_VERSION:x} reads {said}: 5 on servers of revision 5, 0 on all others"
            )
        return REVISIONS.get(number or said)

    def known_revision(self, io_group: int) -> PacmanRevision:
        """The register map of a board; RequestError when it is not known."""
        revision = self.revision(io_group)
        if revision is None:
            raise RequestError(
                f"{self.names[io_group]}: its revision is not known, and with it where its supplies are: start the "
                f"producer with --pacman-revision {io_group}=N, N from 2 to 5"
            )
        return revision

    def io_channels(self, io_group: int, asked: list[int] | None) -> list[int]:
        """These io_channels of a PACMAN (None: all); RequestError for one whose UART has no registers."""
        revision = self.revision(io_group)
        most = _CHANNELS if revision is None else revision.uarts
        if asked is None:
            if revision is None:
                raise RequestError(
                    f"{self.names[io_group]}: its revision is not known, and with it how many io_channels it has: name "
                    f"them, or start the producer with --pacman-revision {io_group}=N, N from 2 to 5"
                )
            return list(range(1, most + 1))
        for one in asked:
            if one > most:
                of = "" if revision is None else f" of revision {revision.number}"
                raise RequestError(
                    f"{self.names[io_group]}: io_channel: boards{of} have UART registers of 1 to {most}, found {one}"
                )
        return asked

    # As PACMAN_IO has them.

    def _each(self, io_group: int | None, one: Callable[[int], Any]) -> Any:
        if io_group is None:
            return {each: one(each) for each in self.groups()}
        return one(io_group)

    def set_reg(self, reg: int, val: int, io_group: int | None = None) -> Any:
        """Set a 32-bit register of the board. Refused where that could hit a DAC, or crash the board's server."""
        return self._each(io_group, lambda one: self._set_reg(one, reg, val))

    def _set_reg(self, io_group: int, register: int, value: int) -> None:
        if register >= I2C:
            end = self.known_revision(io_group).end
            self._within(io_group, register, end)
        if register >= I2C or register in (TILES, POWER) or (register == CLOCK_CONTROL and value & RESET_BIT):
            self._doubt([io_group])
        self.values(io_group, [write(register, value)])

    def get_reg(self, reg: int, io_group: int | None = None) -> Any:
        """A 32-bit register of the board. Refused where that could crash the board's server."""
        return self._each(io_group, lambda one: self._get_reg(one, reg))

    def _get_reg(self, io_group: int, register: int) -> int:
        seconds = 0.0
        if register >= I2C:
            revision = self.revision(io_group)
            self._within(io_group, register, READABLE if revision is None else revision.end)
            seconds = 0.0 if revision is None else revision.seconds(register)
        return self.values(io_group, [read(register)], seconds)[0]

    def _within(self, io_group: int, register: int, end: int) -> None:
        if register >= end:
            raise RequestError(
                f"{self.names[io_group]}: register 0x{register:x}: the board's registers end at 0x{end - 1:x}; "
                "a request beyond can crash its server"
            )

    def ping(self, io_group: int | None = None) -> Any:
        """Whether the board answers."""
        return self._each(io_group, lambda one: not isinstance(self.ask_pings(one)[one], BoardError))

    def ask_pings(self, asked: Any) -> dict[int, bytes | BoardError]:
        """The answers of these boards (None: of all) to the order that only asks for one; RequestError as only()."""
        groups = self.only("ping", "pacman", "bern", asked=asked)
        return self.ask_all({one: PING if self.kinds[one] == "pacman" else b"PING_HB" for one in groups})

    def get_vddd(self, io_group: int | None = None, tile: int = 0) -> Any:
        """Digital supply of a tile (from 0): (mV, mA); None for mA where the board's unit is not established."""
        return self._each(io_group, lambda one: self._supply("vddd", one, tile))

    def get_vdda(self, io_group: int | None = None, tile: int = 0) -> Any:
        """Analog supply of a tile (from 0): (mV, mA); None for mA where the board's unit is not established."""
        return self._each(io_group, lambda one: self._supply("vdda", one, tile))

    def _supply(self, name: str, io_group: int, tile: int) -> tuple[float, float | None]:
        return self.tile_power(io_group, supplies=True).measured(tile, name)

    def get_vplus(self, io_group: int | None = None) -> Any:
        """Input supply: (mV, mA); rev2 alone can measure it."""
        return self._each(io_group, lambda one: self._input(one))

    def _input(self, io_group: int) -> tuple[float, float]:
        revision = self.known_revision(io_group)
        if not revision.board:
            raise RequestError(f"{self.names[io_group]}: boards of revision {revision.number} do not measure VPLUS")
        monitors = list(revision.board.values())
        values = self.values(io_group, [read(monitor.place.first) for monitor in monitors])
        mv, ma = (monitor.convert(value) for monitor, value in zip(monitors, values, strict=True))
        return mv, ma

    def set_vddd(
        self, vddd_dac: int | None = None, io_group: int | None = None, settling_time: float = SETTLE, tile: int = 0
    ) -> Any:
        """Set the digital supply's DAC of a tile, wait `settling_time` seconds; (mV, mA) as get_vddd()."""
        return self._each(io_group, lambda one: self._set_supply("vddd", one, tile, vddd_dac, settling_time))

    def set_vdda(
        self, vdda_dac: int | None = None, io_group: int | None = None, settling_time: float = SETTLE, tile: int = 0
    ) -> Any:
        """Set the analog supply's DAC of a tile, wait `settling_time` seconds; (mV, mA) as get_vdda()."""
        return self._each(io_group, lambda one: self._set_supply("vdda", one, tile, vdda_dac, settling_time))

    def _set_supply(self, name: str, io_group: int, tile: int, dac: int | None, settling: float) -> Any:
        power = self.tile_power(io_group, supplies=True)
        if dac is None and power.known.number == 2:
            dac = _REV2_DAC
        if dac is None:
            raise RequestError(f"set_{name}: revision {power.known.number} has no usual DAC setting: name it")
        self._doubt([io_group])
        power.set_dac(name, tile, dac)
        time.sleep(settling or 0)
        return power.measured(tile, name)

    def tile_power(
        self, io_group: int, *, off: bool = False, supplies: bool = False, progress: Progress = unheard
    ) -> TilePower:
        """The tiles of a board, which are to be switched off, or whose supplies are to be set or measured: RequestError
        when these are not known. To switch off works whatever the configuration says."""
        revision = None
        with contextlib.suppress(BoardError) if off else contextlib.nullcontext():
            revision = self.known_revision(io_group) if supplies else self.revision(io_group)
        return TilePower(self, io_group, self.names[io_group], revision, progress)

    def enable_tile(self, tile_indices: Any = None, io_group: int | None = None) -> Any:
        """Switch tiles on (index, list of indices from 0, None: all); the mask of those that are on."""
        return self._each(io_group, lambda one: self._tiles(one, tile_indices, on=True))

    def disable_tile(self, tile_indices: Any = None, io_group: int | None = None) -> Any:
        """Switch tiles off; the mask of those that are on."""
        return self._each(io_group, lambda one: self._tiles(one, tile_indices, on=False))

    def _tiles(self, io_group: int, indices: Any, *, on: bool) -> int:
        power = self.tile_power(io_group, off=not on)
        chosen = None if indices is None else [indices] if isinstance(indices, int) else list(indices)
        self._doubt([io_group])
        return power.enable(chosen) if on else power.disable(chosen)

    def set_uart_clock_ratio(self, channel: int, ratio: int, io_group: int | None = None) -> Any:
        """Clock ticks a bit of one io_channel's UART; the register's value. BoardError when it reads back another."""
        return self._each(io_group, lambda one: self.set_ratios(one, self.io_channels(one, [channel]), ratio)[channel])

    def set_ratios(self, io_group: int, channels: list[int], ratio: int) -> dict[int, int]:
        """Clock ticks a bit of io_channels that io_channels() has found; BoardError when one reads back another."""
        orders = [order for one in channels for order in (write(uart(one), ratio), read(uart(one)))]
        found = dict(zip(channels, self.values(io_group, orders)[1::2], strict=True))
        wrong = [f"{channel} ({value})" for channel, value in found.items() if value != ratio]
        if wrong:
            raise BoardError(
                f"{self.names[io_group]}: clock ratio {ratio}: {len(wrong)} of {len(found)} io_channels read back "
                f"something else: {', '.join(wrong[:10])}"
            )
        return found

    def carries(self, lines: Sequence[tuple[int, int]]) -> list[float]:
        """Packets a second that each of these (io_group, io_channel) can send, by the clock of its UART."""
        bits = dict.fromkeys(lines, bits_a_second(RATIO))
        pacmans = {io_group for io_group, _ in lines if self.kinds.get(io_group) == "pacman"}
        for io_group in sorted(pacmans):
            mine = [line for line in lines if line[0] == io_group and uart(line[1]) < I2C]
            said, *found = self.values(io_group, [read(MAP_VERSION), *(read(uart(line[1])) for line in mine)])
            revision = self.revision_of(io_group, said)
            clock = None if revision is None else revision.uart_clock
            bits |= {line: bits_a_second(ratio, clock) for line, ratio in zip(mine, found, strict=True)}
        return [
            SERIAL_FRAMES if self.kinds.get(line[0]) == "serial" else bits[line] / BITS for line in dict.fromkeys(lines)
        ]

    def reset_larpix(self, length: int = 256, io_group: int | None = None) -> Any:
        """Reset the chips for `length` ticks of their clock; the value of the clock control register."""
        return self._each(io_group, lambda one: self.reset(one, length))

    def reset(self, io_group: int, length: int) -> int:
        """Reset the chips of a PACMAN, and wait until the reset is over; the value of its clock control register."""
        if self.kept(length) is not True:
            self._doubt([io_group])
        cycles, control = self.values(io_group, [write(RESET_CYCLES, length), read(RESET_CYCLES), read(CLOCK_CONTROL)])[
            1:
        ]
        idle = control & ~RESET_BIT
        orders = [write(CLOCK_CONTROL, idle | RESET_BIT), write(CLOCK_CONTROL, idle), read(CLOCK_CONTROL)]
        after = self.values(io_group, orders)[2]
        time.sleep(length / _MASTER_CLOCK)
        for what, asked, found in (("length of a reset", length, cycles), ("clock control", idle, after)):
            if found != asked:
                raise BoardError(f"{self.names[io_group]}: {what}: set to {asked}, reads back {found}")
        return after

    def kept(self, length: int) -> bool | None:
        """Whether chips keep their configuration in a reset of this length; None: nobody knows.

        RequestError when they do not notice such a reset at all."""
        bounds = _KEEP.get(Asic(self._link.setup.generation))
        if bounds is None:
            return None
        least, keep, lose = bounds
        if length < least:
            raise RequestError(
                f"reset: length {length}: the chips do nothing below {least} ticks, and lose their "
                f"configuration from {lose} on"
            )
        return True if length <= keep else False if length >= lose else None


def bits_a_second(ratio: int, clock: float | None = None) -> float:
    """Of a UART with so many ticks a bit of its `clock` (Hz). None: 10 MHz where the ratio is small, as older firmware
    has it, else 50 MHz."""
    return (clock or (50e6 if ratio >= RATIO else 10e6)) / max(ratio, 1)
