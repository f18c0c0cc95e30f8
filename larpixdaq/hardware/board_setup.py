"""The actions on single registers of PACMAN boards: read and write them, set up UARTs and triggers.

Each action is a method of the same name, as in actions.py. Registers have a name (pacman_registers.names) or an
address, a number or a text such as "0x2014". Results are tables with a row for each register.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Final

from larpixdaq.errors import RequestError, advice
from larpixdaq.hardware.board_commands import BoardOrders
from larpixdaq.hardware.pacman_registers import (
    FIRMWARE,
    I2C,
    INVERTED,
    MAP_VERSION,
    MODULE_2,
    MODULE_2_CHANNELS,
    RECEIVERS_OFF,
    TRIGGER_CONTROL,
    TRIGGER_CYCLES,
    TRIGGER_MASK,
    PacmanRevision,
    names,
    read,
    uart,
    write,
)
from larpixdaq.hardware.power import Dacs
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.routine_arguments import check_number, check_numbers

#: Frequency in Hz of the clock that counts the period of a board's triggers.
_TRIGGER_CLOCK: Final = 100e6
#: Shortest and longest period of triggers in seconds.
_PERIODS: Final = (1e-6, ((1 << 32) - 1) / _TRIGGER_CLOCK)
#: Tiles for which a trigger has a mask bit, and number of triggers.
_MASKED_TILES: Final = 8
_TRIGGERS: Final = 4
#: io_channels whose receivers a register of 32 bits can switch.
_RECEIVERS: Final = 32
_MOST_CHANNELS: Final = 40


class RegisterActions:
    """The actions on registers of PACMANs. `io_group`: a number, a list of numbers, or None for all boards."""

    def __init__(self, link: ProducerPipe, invalidate: Callable[[list[int]], None], dacs: Dacs | None = None) -> None:
        """`invalidate` and `dacs` as in BoardOrders."""
        self.orders = BoardOrders(link, invalidate, dacs)

    def read_board(self, registers: Any = None, io_group: Any = None) -> list[dict[str, Any]]:
        boards = self._boards("read_board", io_group)
        requested = {
            board.io_group: {name: address for name, address in board.names.items() if address < I2C}
            if registers is None
            else board.find(registers if isinstance(registers, list) else [registers])
            for board in boards
        }
        for board in boards:  # check all boards before the first one is asked
            for address in requested[board.io_group].values():
                self.orders.check_register(board.io_group, address, board.revision)
        return [row for board in boards for row in self._read(board, requested[board.io_group])]

    def write_board(self, values: Any, io_group: Any = None) -> list[dict[str, Any]]:
        if not isinstance(values, dict) or not values:
            raise RequestError(f"write_board: expected {{register name or address: value}}, found {values!r:.100}")
        boards = self._boards("write_board", io_group)
        return self._write(boards, {board.io_group: board.settings(values) for board in boards})

    def set_uarts(
        self, io_channel: Any = None, receive: Any = None, inverted: Any = None, io_group: Any = None
    ) -> list[dict[str, Any]]:
        for name, value in (("receive", receive), ("inverted", inverted)):
            if value is not None and not isinstance(value, bool):
                raise RequestError(f"set_uarts: {name}: expected True or False, found {value!r:.100}")
        if receive is None and inverted is None:
            raise RequestError("set_uarts: expected receive or inverted, True or False")
        boards = self._boards("set_uarts", io_group)
        chosen = None if io_channel is None else check_numbers("set_uarts: io_channel", io_channel, 1, _MOST_CHANNELS)
        settings: dict[int, dict[str, tuple[int, int]]] = {}
        for board in boards:
            channels = self.orders.io_channels(board.io_group, chosen)
            wanted = settings[board.io_group] = {}
            if inverted is not None:
                if board.revision is not None and not board.revision.inversion:
                    raise RequestError(
                        f"{board.name}: inverted: boards of revision {board.revision.number} cannot invert"
                    )
                for channel in channels:
                    address = uart(channel, "inversion", board.revision)
                    wanted[f"uart_{channel}_inversion"] = address, INVERTED if inverted else 0
            if receive is not None:
                wanted |= self._receivers(board, channels, on=receive)
        return self._write(boards, settings)

    def _receivers(self, board: _Board, channels: list[int], *, on: bool) -> dict[str, tuple[int, int]]:
        """Return the register with the receivers of a board and its new value."""
        if board.firmware == MODULE_2:
            name, address, set_when_on = "uart_receivers", MODULE_2_CHANNELS, True
        elif board.revision is not None and board.revision.number == 5:
            name, address, set_when_on = "uart_receivers_off", RECEIVERS_OFF, False
        else:
            raise RequestError(
                f"{board.name}: receive: its receivers are always on; only revision 5 and the firmware of Module 2 "
                "(revision 4) have a register that switches them"
            )
        uarts = channels if board.revision is None else list(map(board.revision.uart, channels))
        beyond = [channel for channel, number in zip(channels, uarts, strict=True) if number > _RECEIVERS]
        if beyond:
            raise RequestError(
                f"{board.name}: receive: register 0x{address:x} has a bit for io_channels 1 to {_RECEIVERS}, "
                f"found {beyond[0]}: name the io_channels"
            )
        (value,) = self.orders.values(board.io_group, [read(address)])
        mask = sum(1 << number - 1 for number in uarts)
        return {name: (address, value | mask if on == set_when_on else value & ~mask)}

    def set_trigger(
        self, period: Any = None, tiles: Any = None, trigger: Any = None, io_group: Any = None
    ) -> list[dict[str, Any]]:
        if period is None and tiles is None:
            raise RequestError("set_trigger: expected period (seconds, 0: off) or tiles (a list)")
        wrong = isinstance(period, bool) or not isinstance(period, int | float | None)
        if wrong or (period and not _PERIODS[0] <= period <= _PERIODS[1]):
            raise RequestError(
                f"set_trigger: period: expected 0 (off) or {_PERIODS[0]:g} to {_PERIODS[1]:.1f} s, "
                f"found {period!r:.100}"
            )
        if trigger is not None and tiles is None:
            raise RequestError("set_trigger: trigger: only with tiles, those that get this trigger")
        chosen = [] if tiles is None or tiles == [] else check_numbers("set_trigger: tiles", tiles, 0, 9)
        last = _TRIGGERS - 1
        triggers = (
            list(range(_TRIGGERS)) if trigger is None else check_numbers("set_trigger: trigger", trigger, 0, last)
        )
        boards = self._boards("set_trigger", io_group)
        settings = {board.io_group: self._trigger(board, period, tiles, chosen, triggers) for board in boards}
        return self._write(boards, settings)

    def _trigger(
        self, board: _Board, period: float | None, tiles: Any, chosen: list[int], triggers: list[int]
    ) -> dict[str, tuple[int, int]]:
        """Return the registers of a board's triggers and their new values."""
        wanted: dict[str, tuple[int, int]] = {}
        control, mask = self.orders.values(board.io_group, [read(TRIGGER_CONTROL), read(TRIGGER_MASK)])
        if tiles is not None:
            count = _MASKED_TILES if board.revision is None else min(_MASKED_TILES, board.revision.tiles)
            for tile in chosen:
                if tile >= count:
                    raise RequestError(
                        f"{board.name}: tiles: triggers have a mask bit for tiles 0 to {count - 1}, found {tile}"
                    )
            masked = 0xFF & ~sum(1 << tile for tile in chosen)
            for number in triggers:
                mask = mask & ~(0xFF << 8 * number) | masked << 8 * number
            wanted["trigger_mask"] = TRIGGER_MASK, mask
        if period:
            wanted["trigger_cycles"] = TRIGGER_CYCLES, round(period * _TRIGGER_CLOCK)
        if period is not None:
            wanted["trigger_control"] = TRIGGER_CONTROL, control | 1 if period else control & ~1
        return wanted

    def _boards(self, action: str, io_group: Any) -> list[_Board]:
        """Read what determines the registers of these boards."""
        boards = []
        for group in self.orders.groups_of_kind(action, "pacman", requested=io_group):
            map_version, firmware = self.orders.values(group, [read(MAP_VERSION), read(FIRMWARE)])
            revision = self.orders.revision_of(group, map_version)
            boards.append(_Board(group, self.orders.names[group], revision, firmware))
        return boards

    def _read(self, board: _Board, registers: dict[str, int]) -> list[dict[str, Any]]:
        revision = board.revision
        seconds = 0.0 if revision is None else sum(map(revision.seconds, registers.values()))
        values = self.orders.values(board.io_group, map(read, registers.values()), seconds)
        return [
            _row(board.io_group, name, address, value)
            for (name, address), value in zip(registers.items(), values, strict=True)
        ]

    def _write(self, boards: list[_Board], settings: dict[int, dict[str, tuple[int, int]]]) -> list[dict[str, Any]]:
        """Write registers: names, addresses and values by io_group. Those of the FPGA are read back; BoardError if one
        reads back something else."""
        for board in boards:  # check all boards before the first one is changed
            for address, _ in settings[board.io_group].values():
                if address >= I2C:
                    self.orders.known_revision(board.io_group)
                self.orders.check_register(board.io_group, address, board.revision, writing=True)
        rows = []
        for board in boards:
            written = settings[board.io_group]
            for address, value in written.values():
                self.orders.forget_chips(board.io_group, address, value)
            self.orders.values(board.io_group, [write(address, value) for address, value in written.values()])
            own = [(name, address) for name, (address, _) in written.items() if address < I2C]
            found = dict(zip(own, self.orders.values(board.io_group, [read(at) for _, at in own]), strict=True))
            wrong = [
                f"{name} (0x{address:x}): set to 0x{written[name][1]:x}, reads back 0x{value:x}"
                for (name, address), value in found.items()
                if value != written[name][1]
            ]
            if wrong:
                raise BoardError(f"{board.name}: {'; '.join(wrong[:10])}")
            for name, (address, value) in written.items():
                row = _row(board.io_group, name, address, value)
                rows.append(row | {"read_back": address < I2C})
        return rows


class _Board:
    """A PACMAN whose revision, if known, and firmware are known, and thereby its registers."""

    def __init__(self, io_group: int, name: str, revision: PacmanRevision | None, firmware: int) -> None:
        self.io_group, self.name, self.revision, self.firmware = io_group, name, revision, firmware
        self.names = names(revision, firmware)
        self._by_address = {address: name for name, address in reversed(self.names.items())}

    def find(self, registers: Iterable[Any]) -> dict[str, int]:
        """Return addresses by name of registers that are given by name or address; RequestError for others."""
        found: dict[str, int] = {}
        for register in registers:
            address = self._address(register)
            found[self._by_address.get(address, "") or f"0x{address:x}"] = address
        return found

    def settings(self, values: dict[Any, Any]) -> dict[str, tuple[int, int]]:
        """Return addresses and values by name; RequestError for what no register is or can hold."""
        settings: dict[str, tuple[int, int]] = {}
        for register, value in values.items():
            ((name, address),) = self.find([register]).items()
            if name in settings:
                raise RequestError(f"{self.name}: register {name} (0x{address:x}) twice")
            settings[name] = address, check_number(f"{self.name}: register {name}", value, 0, (1 << 32) - 1)
        return settings

    def _address(self, register: Any) -> int:
        if isinstance(register, str) and register in self.names:
            return self.names[register]
        if isinstance(register, str) and register[:2].lower() == "0x" and register[2:].isascii():
            with contextlib.suppress(ValueError):
                register = int(register, 16)
        if isinstance(register, str):
            known = advice(register, self.names, "its registers are")
            raise RequestError(f"{self.name}: no register {register!r:.100}; {known:.1500}")
        return check_number(f"{self.name}: address of a register", register, 0, (1 << 32) - 1)


def _row(io_group: int, name: str, address: int, value: int) -> dict[str, Any]:
    return {"io_group": io_group, "register": name, "address": f"0x{address:x}", "value": value, "hex": f"0x{value:x}"}
