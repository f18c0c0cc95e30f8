"""What an Operator can ask of the boards themselves: whether they answer, how they are, power, reset, clocks."""

from __future__ import annotations

from typing import Any, Final

from larpixdaq.chips import boards
from larpixdaq.chips.boards import BoardOrders, read, values_in
from larpixdaq.chips.link import BoardError
from larpixdaq.errors import RequestError

#: Registers that board_status asks a PACMAN for, in one request.
_STATUS: Final = [
    boards.CLOCK_STATUS, boards.CLOCK, boards.CLOCK_CONTROL, boards.HEARTBEAT_CYCLES, boards.TILES, boards.POWER,
    *(register for pair in boards.SUPPLIES.values() for register in pair),
]  # fmt: skip
_LONGEST_RESET: Final = (1 << 32) - 1


def whole(what: str, value: Any, low: int, high: int) -> int:
    """A whole number that somebody gave, or RequestError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        expected = f"a whole number from {low} to {high}" if low < high else f"{low}"
        raise RequestError(f"{what}: expected {expected}, found {value!r:.100}")
    return value


def several(what: str, asked: Any, low: int, high: int) -> list[int]:
    """One whole number, or a list of them, each once, or RequestError."""
    numbers = asked if isinstance(asked, list) else [asked]
    if not numbers:
        raise RequestError(f"{what}: expected one or more whole numbers, found none")
    return list(dict.fromkeys(whole(what, one, low, high) for one in numbers))


class BoardCare:
    """Mixed into `actions.Actions`. Boards are named by their io_group; None: all."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self.orders = BoardOrders(link)

    def groups(self, asked: Any = None) -> list[int]:
        return self.orders.groups(asked)

    def ping(self, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.only("ping", "pacman", "bern", asked=io_group)
        bodies = {one: boards.PING if self.orders.kinds[one] == "pacman" else b"PING_HB" for one in groups}
        answers = self.orders.ask_all(bodies)
        wrong = [str(answer) for answer in answers.values() if isinstance(answer, BoardError)]
        if len(wrong) == len(groups):
            raise BoardError("; ".join(wrong))
        return {str(one): not isinstance(answer, BoardError) for one, answer in answers.items()}

    def board_status(self, io_group: Any = None) -> list[dict[str, Any]]:
        groups = self.orders.groups(io_group)
        asked = {}
        for one in groups:
            if self.orders.kinds[one] == "pacman":
                asked[one] = b"".join(map(read, _STATUS))
            elif self.orders.kinds[one] == "bern":
                asked[one] = b"PING_HB"
        answers = self.orders.ask_all(asked)
        return [self._described(one, answers.get(one)) for one in groups]

    def _described(self, io_group: int, answer: bytes | BoardError | None) -> dict[str, Any]:
        kind = self.orders.kinds[io_group]
        facts: dict[str, Any] = {"io_group": io_group, "kind": kind, "name": self.orders.names[io_group]}
        if answer is None:
            what = "a board on a serial line" if kind == "serial" else "an IO class"
            return facts | {"answers": False, "error": f"{what} answers no orders"}
        if isinstance(answer, BoardError):
            return facts | {"answers": False, "error": str(answer)}
        facts["answers"] = True
        if kind != "pacman":
            return facts
        value = dict(zip(_STATUS, values_in(answer), strict=True))
        control, status = value[boards.CLOCK_CONTROL], value[boards.CLOCK_STATUS]
        facts |= {
            "clock_locked": status & 3 == 3,
            "clock_source": status >> 2 & 1,
            "clock_valid": bool(status >> 3 & 1),
            "clock_ticks": value[boards.CLOCK],
            "heartbeat": bool(control >> 1 & 1),
            "heartbeat_s": value[boards.HEARTBEAT_CYCLES] / 100e6,
            "tiles": [tile for tile in range(8) if value[boards.TILES] >> tile & 1],
            "analog_power": bool(value[boards.POWER] & 1),
        }
        for name, (current, voltage) in boards.SUPPLIES.items():
            facts[f"{name}_mv"] = boards.millivolts(value[voltage])
            facts[f"{name}_ma"] = boards.milliamperes(value[current])
        return facts

    def power(
        self, on: Any, tiles: Any = None, vddd_dac: Any = None, vdda_dac: Any = None, io_group: Any = None
    ) -> list[dict[str, Any]]:
        groups = self.orders.only("power", "pacman", asked=io_group)
        if not isinstance(on, bool):
            raise RequestError(f"power: on: expected True or False, found {on!r:.100}")
        chosen = None if tiles is None else several("power: tiles", tiles, 0, 7)
        dacs = {"vddd": vddd_dac, "vdda": vdda_dac}
        for name, dac in dacs.items():
            if dac is not None:
                whole(f"power: {name}_dac", dac, 0, 0xFFFF)
        for one in groups:
            if on:
                if vddd_dac is not None:
                    self.orders.set_vddd(vddd_dac, one)
                if vdda_dac is not None:
                    self.orders.set_vdda(vdda_dac, one)
                self.orders.set_reg(boards.POWER, 1, one)
                self.orders.enable_tile(chosen, one)
            elif self.orders.disable_tile(chosen, one) == 0:
                self.orders.set_reg(boards.POWER, 0, one)
        return self.board_status(groups)

    def reset(self, length: Any = 256, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.only("reset", "pacman", "bern", "serial", asked=io_group)
        for one in groups:
            kind = self.orders.kinds[one]
            if kind == "pacman":
                self.orders.reset_larpix(whole("reset: length", length, 1, _LONGEST_RESET), one)
            elif kind == "bern":
                self._link.doubt([one])
                self._link.ask(one, b"SYRESET")
            else:
                pulse = whole("reset: length on a serial board", length, 1, 256) - 1
                self._link.doubt([one])
                self._link.ask(one, b"c\x01" + bytes([pulse]) + bytes(6) + b"q")
                self._link.ask(one, b"c\x02" + bytes(7) + b"q")
        return {"io_groups": groups, "length": length}

    def set_uart_clock(self, ratio: Any, io_channel: Any = None, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.only("set_uart_clock", "pacman", "serial", asked=io_group)
        whole("set_uart_clock: ratio", ratio, 1, 255)
        found: dict[str, Any] = {}
        for one in groups:
            lines = 1 if self.orders.kinds[one] == "serial" else boards.CHANNELS
            every = list(range(1, lines + 1))
            channels = every if io_channel is None else several("set_uart_clock: io_channel", io_channel, 1, lines)
            if self.orders.kinds[one] == "serial":
                self._link.ask(one, b"c\x00" + bytes([ratio]) + bytes(6) + b"q")
                found[str(one)] = {"1": ratio}
                continue
            registers = [boards.UART + boards.BANK * channel for channel in channels]
            orders = [order for at in registers for order in (boards.write(at, ratio), read(at))]
            found[str(one)] = dict(zip(map(str, channels), self.orders.values(one, orders)[1::2], strict=True))
        return {"ratio": ratio, "io_groups": found}
