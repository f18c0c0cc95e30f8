"""Orders to the boards themselves, through the producer: registers, power, reset, clocks, of each kind of board.

The methods that routines call have the names, arguments and results of larpix-control's PACMAN_IO. Without an io_group
they ask all boards and return {io_group: value}.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from larpixdaq.chips.link import BoardError, Link
from larpixdaq.errors import RequestError

_ORDER: Final = struct.Struct("<c3xI4xI")
PING: Final = b"P" + bytes(15)
#: io_channels of a PACMAN.
CHANNELS: Final = 32

TILES, POWER = 0x10, 0x14
CLOCK_STATUS, CLOCK, CLOCK_CONTROL, RESET_CYCLES, HEARTBEAT_CYCLES = 0x1000, 0x1004, 0x1010, 0x1014, 0x1018
_RESET_BIT: Final = 4
UART: Final = 0x2010  # the first one's clock ratio less a bank
BANK: Final = 0x1000
#: What it is at first: 5 Mb/s.
RATIO: Final = 10
#: Of a word on its line: 64, start and stop.
BITS: Final = 66
#: What a serial board passes on in a second, of all its chips, at 1,000,000 baud.
SERIAL_FRAMES: Final = 10_000.0
_VDDD_DAC, _VDDA_DAC = 0x24001, 0x24011
#: current and voltage of each supply
SUPPLIES: Final = {"vplus": (0x24021, 0x24022), "vddd": (0x24031, 0x24032), "vdda": (0x24041, 0x24042)}


def millivolts(value: int) -> int:
    """What a board's voltage register says, in mV."""
    return ((value >> 16) >> 3) * 4


def milliamperes(value: int) -> float:
    """What a board's current register says, in mA."""
    return ((value >> 16) - (value >> 31) * 65535) * 500 * 0.01


def read(register: int) -> bytes:
    return _ORDER.pack(b"R", register, 0)


def write(register: int, value: int) -> bytes:
    if not 0 <= value < 1 << 32:
        raise RequestError(f"PACMAN register 0x{register:x}: expected a value of 32 bits, found {value}")
    return _ORDER.pack(b"W", register, value)


class BoardOrders:
    """What boards do beside passing words on. BoardError names the board, and why it did not."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.kinds = {board.io_group: board.kind for board in link.setup.boards if board.kind}
        self.names = {board.io_group: board.name for board in link.setup.boards}

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

    def ask_all(self, bodies: dict[int, bytes]) -> dict[int, bytes | BoardError]:
        """Ask boards side by side."""
        numbers = {io_group: self._link.post(io_group, body) for io_group, body in bodies.items()}
        answers: dict[int, bytes | BoardError] = {}
        for io_group, number in numbers.items():
            try:
                answers[io_group] = self._link.finished(number)
            except BoardError as error:
                answers[io_group] = error
        return answers

    def values(self, io_group: int, orders: Iterable[bytes]) -> list[int]:
        """Registers of a PACMAN read and written in one request; the value of each, in the same order."""
        self.only("register", "pacman", asked=io_group)
        return values_in(self._link.ask(io_group, b"".join(orders)))

    # As PACMAN_IO has them.

    def _each(self, io_group: int | None, one: Callable[[int], Any]) -> Any:
        if io_group is None:
            return {each: one(each) for each in self.groups()}
        return one(io_group)

    def set_reg(self, reg: int, val: int, io_group: int | None = None) -> Any:
        """Set a 32-bit register of the board."""
        return self._each(io_group, lambda one: self.values(one, [write(reg, val)]) and None)

    def get_reg(self, reg: int, io_group: int | None = None) -> Any:
        """A 32-bit register of the board."""
        return self._each(io_group, lambda one: self.values(one, [read(reg)])[0])

    def ping(self, io_group: int | None = None) -> Any:
        """Whether the board answers."""
        return self._each(io_group, lambda one: self.pings([one])[one])

    def pings(self, groups: list[int]) -> dict[int, bool]:
        bodies = {"pacman": PING, "bern": b"PING_HB"}
        answers = self.ask_all({one: bodies[self.kinds[one]] for one in groups})
        return {one: not isinstance(answer, BoardError) for one, answer in answers.items()}

    def _supply(self, name: str, io_group: int) -> tuple[int, float]:
        current, voltage = SUPPLIES[name]
        ma, mv = self.values(io_group, [read(current), read(voltage)])
        return millivolts(mv), milliamperes(ma)

    def get_vddd(self, io_group: int | None = None) -> Any:
        """Digital supply: (mV, mA)."""
        return self._each(io_group, lambda one: self._supply("vddd", one))

    def get_vdda(self, io_group: int | None = None) -> Any:
        """Analog supply: (mV, mA)."""
        return self._each(io_group, lambda one: self._supply("vdda", one))

    def get_vplus(self, io_group: int | None = None) -> Any:
        """Input supply: (mV, mA)."""
        return self._each(io_group, lambda one: self._supply("vplus", one))

    def set_vddd(self, vddd_dac: int = 0xD5A3, io_group: int | None = None, settling_time: float = 0.1) -> Any:
        """Set the digital supply's DAC, wait `settling_time` seconds; (mV, mA)."""
        return self._set_supply(_VDDD_DAC, "vddd", vddd_dac, io_group, settling_time)

    def set_vdda(self, vdda_dac: int = 0xD5A3, io_group: int | None = None, settling_time: float = 0.1) -> Any:
        """Set the analog supply's DAC, wait `settling_time` seconds; (mV, mA)."""
        return self._set_supply(_VDDA_DAC, "vdda", vdda_dac, io_group, settling_time)

    def _set_supply(self, dac: int, name: str, value: int, io_group: int | None, settling: float) -> Any:
        self.set_reg(dac, value, io_group)
        time.sleep(settling or 0)
        return self._each(io_group, lambda one: self._supply(name, one))

    def enable_tile(self, tile_indices: Any = None, io_group: int | None = None) -> Any:
        """Switch tiles on (index, list of indices from 0, None: all 8); the mask of those that are on."""
        return self._each(io_group, lambda one: self._tiles(one, tile_indices, on=True))

    def disable_tile(self, tile_indices: Any = None, io_group: int | None = None) -> Any:
        """Switch tiles off; the mask of those that are on."""
        return self._each(io_group, lambda one: self._tiles(one, tile_indices, on=False))

    def _tiles(self, io_group: int, indices: Any, *, on: bool) -> int:
        chosen = range(8) if indices is None else [indices] if isinstance(indices, int) else indices
        mask = sum(1 << index for index in set(chosen))
        (before,) = self.values(io_group, [read(TILES)])
        after = before | mask if on else before & ~mask
        if after != before:
            self._link.doubt([io_group])
        return self.values(io_group, [write(TILES, after), read(TILES)])[1] & 0xFF

    def set_uart_clock_ratio(self, channel: int, ratio: int, io_group: int | None = None) -> Any:
        """Clock ticks a bit of one io_channel's UART; the register's value."""
        register = UART + BANK * channel
        return self._each(io_group, lambda one: self.values(one, [write(register, ratio), read(register)])[1])

    def carries(self, lines: Sequence[tuple[int, int]]) -> list[float]:
        """Packets a second that each of these (io_group, io_channel) can send, by the clock of its UART."""
        ratios = dict.fromkeys(lines, RATIO)
        pacmans = {io_group for io_group, _ in lines if self.kinds.get(io_group) == "pacman"}
        for io_group in sorted(pacmans):
            mine = [line for line in lines if line[0] == io_group]
            ratios |= zip(mine, self.values(io_group, [read(UART + BANK * line[1]) for line in mine]), strict=True)
        return [
            SERIAL_FRAMES if self.kinds.get(line[0]) == "serial" else bits_a_second(ratio) / BITS
            for line, ratio in ratios.items()
        ]

    def reset_larpix(self, length: int = 256, io_group: int | None = None) -> Any:
        """Reset the chips for `length` ticks of their clock; the value of the clock control register."""
        return self._each(io_group, lambda one: self._reset(one, length))

    def _reset(self, io_group: int, length: int) -> int:
        self._link.doubt([io_group])
        _, control = self.values(io_group, [write(RESET_CYCLES, length), read(CLOCK_CONTROL)])
        orders = [write(CLOCK_CONTROL, control | _RESET_BIT), write(CLOCK_CONTROL, control), read(CLOCK_CONTROL)]
        return self.values(io_group, orders)[2]


def bits_a_second(ratio: int) -> float:
    """Of a UART with so many clock ticks a bit: of 50 MHz, but of 10 in older firmware, where ratios are small."""
    return (50e6 if ratio >= RATIO else 10e6) / max(ratio, 1)


def values_in(body: bytes) -> list[int]:
    """The values in a PACMAN's answer, one for each register word."""
    return [value for _, _, value in _ORDER.iter_unpack(body)]
