"""What an Operator can ask of the boards themselves: whether they answer, how they are, power, reset, clocks."""

from __future__ import annotations

from typing import Any, Final

from larpixdaq.chips.boards import BoardOrders
from larpixdaq.chips.link import BoardError
from larpixdaq.chips.pacman_registers import (
    CLOCK,
    CLOCK_CONTROL,
    CLOCK_STATUS,
    FIRMWARE,
    HEARTBEAT_CYCLES,
    MAP_VERSION,
    PING,
    POWER,
    TILES,
    Revision,
    read,
    tile_mask,
    values_in,
)
from larpixdaq.chips.power import Progress
from larpixdaq.errors import RequestError

#: Registers that board_status asks every PACMAN for, in one request.
_STATUS: Final = (
    CLOCK_STATUS, CLOCK, CLOCK_CONTROL, HEARTBEAT_CYCLES, TILES, POWER, FIRMWARE, MAP_VERSION,
)  # fmt: skip
_LONGEST_RESET: Final = (1 << 32) - 1
#: Tiles and io_channels of the largest board, at most.
_MOST_TILES, _MOST_CHANNELS = 10, 40
#: What becomes of the chips' configuration in a reset.
_KEPT: Final = {True: "kept", False: "lost", None: "not known"}
_UNKNOWN: Final = (
    "its revision is not known, and with it where its supplies are: start the producer with --pacman-revision"
)


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

    #: send_info of a routine: text, done, total.
    _info: Progress

    def __init__(self, link: Any) -> None:
        self._link = link
        self.orders = BoardOrders(link)

    def groups(self, asked: Any = None) -> list[int]:
        return self.orders.groups(asked)

    def ping(self, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.only("ping", "pacman", "bern", asked=io_group)
        bodies = {one: PING if self.orders.kinds[one] == "pacman" else b"PING_HB" for one in groups}
        answers = self.orders.ask_all(bodies)
        wrong = [str(answer) for answer in answers.values() if isinstance(answer, BoardError)]
        if len(wrong) == len(groups):
            raise BoardError("; ".join(wrong))
        return {str(one): not isinstance(answer, BoardError) for one, answer in answers.items()}

    def board_status(self, io_group: Any = None, supplies: Any = True) -> list[dict[str, Any]]:
        if not isinstance(supplies, bool):
            raise RequestError(f"board_status: supplies: expected True or False, found {supplies!r:.100}")
        groups = self.orders.groups(io_group)
        asked = {}
        for one in groups:
            if self.orders.kinds[one] == "pacman":
                asked[one] = b"".join(map(read, _STATUS))
            elif self.orders.kinds[one] == "bern":
                asked[one] = b"PING_HB"
        answers = self.orders.ask_all(asked)
        found = {}
        revisions: dict[int, Revision] = {}
        for one in groups:
            found[one] = self._described(one, answers.get(one), revisions)
        if supplies:
            self._measure(found, revisions)
        return list(found.values())

    def _described(
        self, io_group: int, answer: bytes | BoardError | None, revisions: dict[int, Revision]
    ) -> dict[str, Any]:
        """What a board has answered; its revision, if that is known, is added to `revisions`."""
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
        control, status = value[CLOCK_CONTROL], value[CLOCK_STATUS]
        doubts: list[str] = []
        revision = None
        try:
            revision = self.orders.revision_of(io_group, value[MAP_VERSION])
            if revision is None:
                doubts.append(_UNKNOWN)
            else:
                revisions[io_group] = revision
        except BoardError as error:
            doubts.append(str(error))
        tiles = value[TILES] & tile_mask(revision, value[FIRMWARE])
        return facts | {
            "clock_locked": status & 3 == 3,
            "clock_source": status >> 2 & 1,
            "clock_valid": bool(status >> 3 & 1),
            "clock_ticks": value[CLOCK],
            "heartbeat": bool(control >> 1 & 1),
            "heartbeat_s": value[HEARTBEAT_CYCLES] / 100e6,
            "revision": None if revision is None else revision.number,
            "tiles": [tile for tile in range(tiles.bit_length()) if tiles >> tile & 1],
            "analog_power": bool(value[POWER] & 1),
            "supplies": [],
            "doubts": [*doubts, *(revision.doubts if revision is not None and tiles else ())],
        }

    def _measure(self, found: dict[int, dict[str, Any]], revisions: dict[int, Revision]) -> None:
        """Add what boards measure: of the tiles that are on, tile by tile, since a board may take 2 s for each."""
        inputs = {
            one: b"".join(read(m.place.first) for m in r.board.values()) for one, r in revisions.items() if r.board
        }
        for one, answer in self.orders.ask_all(inputs).items():
            if isinstance(answer, BoardError):
                found[one]["doubts"].append(str(answer))
                continue
            for (name, monitor), value in zip(revisions[one].board.items(), values_in(answer), strict=True):
                found[one][name] = monitor.convert(value)
        most = max((len(found[one]["tiles"]) for one in revisions), default=0)
        for place in range(most):
            asked = {one: r for one, r in revisions.items() if place < len(found[one]["tiles"])}
            self._info(f"supplies: {place} of {most} tiles were read", place, most)
            bodies, seconds = {}, 0.0
            for one, revision in asked.items():
                monitors = revision.monitors().values()
                bodies[one] = b"".join(read(m.place.of(found[one]["tiles"][place])) for m in monitors)
                seconds = max(seconds, sum(m.seconds for m in monitors))
            for one, answer in self.orders.ask_all(bodies, seconds).items():
                if isinstance(answer, BoardError):
                    found[one]["doubts"].append(str(answer))
                    del revisions[one]
                    continue
                monitors_of = revisions[one].monitors().items()
                row = {name: m.convert(value) for (name, m), value in zip(monitors_of, values_in(answer), strict=True)}
                found[one]["supplies"].append({"tile": found[one]["tiles"][place]} | row)

    def power(
        self,
        on: Any,
        tiles: Any = None,
        vddd_dac: Any = None,
        vdda_dac: Any = None,
        io_group: Any = None,
        ramp: Any = False,
    ) -> list[dict[str, Any]]:
        groups = self.orders.only("power", "pacman", asked=io_group)
        for name, value in (("on", on), ("ramp", ramp)):
            if not isinstance(value, bool):
                raise RequestError(f"power: {name}: expected True or False, found {value!r:.100}")
        chosen = None if tiles is None else several("power: tiles", tiles, 0, _MOST_TILES - 1)
        dacs = {"vddd": vddd_dac, "vdda": vdda_dac}
        dacs = {name: whole(f"power: {name}_dac", dac, 0, 0xFFFF) for name, dac in dacs.items() if dac is not None}
        if ramp and not dacs:
            raise RequestError("power: ramp: which supplies are to rise to what is said by vdda_dac and vddd_dac")
        if dacs and not on:
            raise RequestError(f"power: {' and '.join(f'{name}_dac' for name in dacs)}: for switching on only")
        boards = []
        for one in groups:  # of all boards, before anything is done with any
            board = self.orders.tile_power(one, off=not on, supplies=bool(dacs), progress=self._info)
            board.chosen(chosen)
            boards.append(board)
        for one, board in zip(groups, boards, strict=True):
            self._link.doubt([one])
            if on:
                board.switch_on(chosen, dacs, ramp=ramp)
            else:
                board.switch_off(chosen)
        return self.board_status(groups)

    def reset(self, length: Any = 256, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.only("reset", "pacman", "bern", "serial", asked=io_group)
        kinds = self.orders.kinds
        for one in groups:  # of all boards, before anything is done with any
            if kinds[one] == "pacman":
                self.orders.kept(whole("reset: length", length, 1, _LONGEST_RESET))
            elif kinds[one] == "serial":
                whole("reset: length on a serial board", length, 1, 256)
        kept: dict[str, bool | None] = {}
        for one in groups:
            kept[str(one)] = None
            if kinds[one] == "pacman":
                kept[str(one)] = self.orders.kept(length)
                self.orders.reset(one, length)
            elif kinds[one] == "bern":
                self._link.doubt([one])
                self._link.ask(one, b"SYRESET")
            else:
                self._link.doubt([one])
                self._link.ask(one, b"c\x01" + bytes([length - 1]) + bytes(6) + b"q")
                self._link.ask(one, b"c\x02" + bytes(7) + b"q")
        return {"io_groups": groups, "length": length, "configuration": {one: _KEPT[how] for one, how in kept.items()}}

    def set_uart_clock(self, ratio: Any, io_channel: Any = None, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.only("set_uart_clock", "pacman", "serial", asked=io_group)
        whole("set_uart_clock: ratio", ratio, 1, 255)
        found: dict[str, Any] = {}
        serial = [one for one in groups if self.orders.kinds[one] == "serial"]
        most = 1 if serial else _MOST_CHANNELS
        asked = None if io_channel is None else several("set_uart_clock: io_channel", io_channel, 1, most)
        channels = {one: self.orders.io_channels(one, asked) for one in groups if one not in serial}
        for one in groups:
            if one in serial:
                self._link.ask(one, b"c\x00" + bytes([ratio]) + bytes(6) + b"q")
                found[str(one)] = {"1": ratio}
            else:
                ratios = self.orders.set_ratios(one, channels[one], ratio)
                found[str(one)] = {str(at): value for at, value in ratios.items()}
        return {"ratio": ratio, "io_groups": found}
