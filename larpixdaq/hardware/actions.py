"""The actions on chips, boards and pixel layouts, as the child does them for an Operator.

Each is a method of the same name, which checks its arguments and returns the request's result, made of plain values. A
RequestError, in one line, names the chip, register or board that it is about.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import RequestError, misuse
from larpixdaq.hardware import network_bringup
from larpixdaq.hardware.board_commands import BoardOrders
from larpixdaq.hardware.chip_state import ChipState, short_list
from larpixdaq.hardware.pacman_registers import (
    CLOCK,
    CLOCK_CONTROL,
    CLOCK_STATUS,
    FIRMWARE,
    HEARTBEAT_CYCLES,
    MAP_VERSION,
    POWER,
    TILES,
    PacmanRevision,
    read,
    tile_mask,
    values_in,
)
from larpixdaq.hardware.pixel_layout import LoadedLayout
from larpixdaq.hardware.power import Progress
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.register_io import RegisterAnswers, RegisterExchange

#: Registers of a PACMAN that board_status reads, in one request.
_STATUS: Final = (
    CLOCK_STATUS, CLOCK, CLOCK_CONTROL, HEARTBEAT_CYCLES, TILES, POWER, FIRMWARE, MAP_VERSION,
)  # fmt: skip
_LONGEST_RESET: Final = (1 << 32) - 1
#: Maximum tiles and io_channels of a board.
_MOST_TILES, _MOST_CHANNELS = 10, 40
#: The chips' configuration after a reset, by BoardOrders.kept().
_KEPT: Final = {True: "kept", False: "lost", None: "not known"}
_UNKNOWN: Final = (
    "its revision is not known, and with it where its supplies are: start the producer with --pacman-revision"
)
#: Maximum channels of one answer. So many take about 0.1 s of the producer's loop.
_MOST_LAYOUT_CHANNELS: Final = 500_000
#: Maximum differing registers that a result lists; all are counted.
_LISTED: Final = 10_000
#: Maximum times that enforce_configuration writes registers that differ.
_TRIES: Final = 3


def act(chips: ChipState, action: str, params: dict[str, Any], progress: Progress) -> Any:
    """Do an action, one of constants.HARDWARE_ACTIONS, with these arguments by name; returns its result."""
    groups = ChipActions(chips, progress), BoardActions(chips.link, chips.doubt, progress), LayoutActions(chips.layout)
    method = next(getattr(actions, action) for actions in groups if hasattr(actions, action))
    signature = inspect.signature(method)
    try:
        bound = signature.bind(**params)
    except TypeError as error:
        raise misuse(action, error, signature) from None
    return method(*bound.args, **bound.kwargs)


def whole(what: str, value: Any, low: int, high: int) -> int:
    """Check that an argument is a whole number within limits; RequestError if not."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        expected = f"a whole number from {low} to {high}" if low < high else f"{low}"
        raise RequestError(f"{what}: expected {expected}, found {value!r:.100}")
    return value


def several(what: str, asked: Any, low: int, high: int) -> list[int]:
    """Check that an argument is such a number or a list of them; returns each once. RequestError if not."""
    numbers = asked if isinstance(asked, list) else [asked]
    if not numbers:
        raise RequestError(f"{what}: expected one or more whole numbers, found none")
    return list(dict.fromkeys(whole(what, one, low, high) for one in numbers))


class BoardActions:
    """The actions on boards, which are named by their io_group; None: all."""

    def __init__(self, link: ProducerPipe, doubt: Callable[[list[int]], None], progress: Progress) -> None:
        """`doubt` as in BoardOrders."""
        self._link, self._doubt, self._progress = link, doubt, progress
        self.orders = BoardOrders(link, doubt)

    def ping(self, io_group: Any = None) -> dict[str, Any]:
        answers = self.orders.ask_pings(io_group)
        wrong = [str(answer) for answer in answers.values() if isinstance(answer, BoardError)]
        if len(wrong) == len(answers):
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
        revisions: dict[int, PacmanRevision] = {}
        for one in groups:
            found[one] = self._described(one, answers.get(one), revisions)
        if supplies:
            self._measure(found, revisions)
        return list(found.values())

    def _described(
        self, io_group: int, answer: bytes | BoardError | None, revisions: dict[int, PacmanRevision]
    ) -> dict[str, Any]:
        """The status in a board's answer. Its revision, if known, is added to `revisions`."""
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

    def _measure(self, found: dict[int, dict[str, Any]], revisions: dict[int, PacmanRevision]) -> None:
        """Add what the boards measure of the tiles that are on, tile by tile, because each may take 2 s."""
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
            self._progress(f"supplies: {place} of {most} tiles were read", place, most)
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
        for one in groups:  # all boards are checked before the first is changed
            board = self.orders.tile_power(one, off=not on, supplies=bool(dacs), progress=self._progress)
            board.chosen(chosen)
            boards.append(board)
        for one, board in zip(groups, boards, strict=True):
            self._doubt([one])
            if on:
                board.switch_on(chosen, dacs, ramp=ramp)
            else:
                board.switch_off(chosen)
        return self.board_status(groups)

    def reset(self, length: Any = 256, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.only("reset", "pacman", "bern", "serial", asked=io_group)
        kinds = self.orders.kinds
        for one in groups:  # all boards are checked before the first is changed
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
                self._doubt([one])
                self._link.ask(one, b"SYRESET")
            else:
                self._doubt([one])
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


class LayoutActions:
    """The actions on pixel layouts."""

    def __init__(self, layout: LoadedLayout) -> None:
        self._layout = layout

    def load_pixel_layout(self, name: Any) -> dict[str, Any]:
        if not isinstance(name, str) or not name:
            raise RequestError(f"load_pixel_layout: expected the name of a layout file, found {name!r:.100}")
        return self._layout.load(name).summary()

    def retrieve_pixel_layout(self, chip: Any = None) -> dict[str, Any]:
        layout = self._layout.get()
        asked = chip if isinstance(chip, list) and not (chip and isinstance(chip[0], int)) else [chip]
        chips = list(layout.chips) if chip is None else list(dict.fromkeys(map(layout.find, asked)))
        channels = sum(map(layout.channels, chips))
        if channels > _MOST_LAYOUT_CHANNELS:
            raise RequestError(
                f"retrieve_pixel_layout: {channels} channels of {len(chips)} chips; "
                f"one answer has {_MOST_LAYOUT_CHANNELS} at most: name fewer chips"
            )
        return layout.summary() | {"channels": {one: layout.described(one) for one in chips}}


class ChipActions:
    """The actions on chips: their registers, boards of chips, networks."""

    def __init__(self, chips: ChipState, progress: Progress) -> None:
        self._chips, self._progress = chips, progress

    def write_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        return self._write(*self._given(chip, registers))

    def send_configuration(self, updates: Any) -> dict[str, Any]:
        if not isinstance(updates, dict) or not updates:
            raise RequestError('send_configuration: expected {chip: {register: value}}, "all" for every chip')
        wanted = self._chips.wanted.copy()
        which = np.zeros(wanted.shape, bool)
        for chip, values in updates.items():
            if not isinstance(values, dict) or not values:
                raise RequestError(
                    f"send_configuration: chip {chip}: expected {{register: value}}, found {values!r:.100}"
                )
            places = self._chips.find(None if chip == "all" else chip)
            grown = len(self._chips.parts) - len(wanted)
            if grown:  # a chip that is named for the first time
                wanted = np.concatenate([wanted, self._chips.wanted[-grown:]])
                which = np.concatenate([which, np.zeros((grown, which.shape[1]), bool)])
            changed = wanted[places]
            addresses = self._chips.registers.change(changed, values, f"chip {chip}: ")
            wanted[places] = changed
            which[np.ix_(places, addresses)] = True
        self._chips.wanted = wanted
        self._chips.given |= which
        places = np.flatnonzero(which.any(axis=1))
        return self._write(places, which[places])

    def read_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places = self._chips.find(chip)
        addresses = self._chips.registers.select(registers)
        which = self._marked(len(places), addresses)
        found = self._read(places, which)
        silent = self._silent(places, found, which)
        if len(silent) == len(places):
            chips = f"chip {silent[0]}" if len(silent) == 1 else f"{len(silent)} chips ({short_list(silent)})"
            raise BoardError("; ".join(found.errors) or f"{chips}: no answer")
        answered = found.answers > 0
        values = {
            self._chips.key(place): self._readable(found.values[i], answered[i], addresses)
            for i, place in enumerate(places.tolist())
            if answered[i].any()
        }
        return {"chips": values, **self._trouble(places, found, which)}

    def validate_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places, which = self._given(chip, registers)
        found = self._read(places, which)
        return self._verdict(places, which, found)

    def enforce_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places, which = self._given(chip, registers)
        found = self._read(places, which)
        written = 0
        for _ in range(_TRIES):
            wrong = self._wrong(places, found, which)
            if not wrong.any():
                break
            self._progress(f"{int(wrong.sum())} registers are written again", 0, 0)
            written += int(wrong.sum())
            self._write(places, wrong)
            again = self._read(places, wrong)
            for name in ("values", "answers", "conflicts"):
                getattr(found, name)[wrong] = getattr(again, name)[wrong]
            found.asked_again += again.asked_again
            found.errors += again.errors
        return self._verdict(places, which, found) | {"written": written}

    def retrieve_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        places = self._chips.find(chip)
        addresses = self._chips.registers.select(registers)
        chips = self._chips
        return {
            chips.key(place): {
                "wanted": self._readable(chips.wanted[place], chips.given[place], addresses),
                "confirmed": self._readable(chips.confirmed[place], chips.known[place], addresses),
            }
            for place in places.tolist()
        }

    def load_board(self, file: Any) -> dict[str, Any]:
        if not isinstance(file, str) or not file:
            raise RequestError(f"load_board: expected the name of a board file, found {file!r:.100}")
        if self._chips.registers.version is None:
            raise RequestError(f"load_board: larpix-control knows no {self._chips.registers.chips}")
        self._chips.load_board(file)
        return self._board()

    def configure_network(self, tries: Any = 3) -> dict[str, Any]:
        whole("configure_network: tries", tries, 1, 100)
        chips = self._chips
        if not chips.board_file:
            raise RequestError("configure_network: load_board(file) first, which says how the chips are wired")
        names = [name for name in network_bringup.NETWORK if name in chips.registers.addresses]
        if chips.registers.version == 1:  # nothing to bring up: the chips are there as soon as they have power
            return self.enforce_configuration()
        controller = chips.controller()
        wrong: set[str] | None = None
        for attempt in range(tries):
            words = f"try {attempt + 1}: " if attempt else ""

            def told(done: int, total: int, words: str = words) -> None:
                self._progress(f"{words}{done} of {total} chips are told their place", done, total)

            network_bringup.bring_up(controller, wrong, told)
            chips.take_over(controller)
            result = self.validate_configuration(None, names)
            wrong = {*result["silent"], *(one["chip"] for one in result["differences"])}
            if not wrong:
                break
        return result | {"tries": attempt + 1}

    def get_boards(self) -> dict[str, Any]:
        boards = [
            {
                "io_group": one.io_group,
                "kind": one.kind or "takes no commands",
                "name": one.name,
                "revision": one.revision or None,
            }
            for one in self._chips.link.setup.boards
        ]
        return {"boards": boards, **self._board()}

    def _board(self) -> dict[str, Any]:
        chips = self._chips
        groups = np.unique(chips.parts[:, :2], axis=0, return_counts=True)
        channels = [
            {"io_group": a, "io_channel": b, "chips": n}
            for (a, b), n in zip(groups[0].tolist(), groups[1].tolist(), strict=True)
        ]
        return {
            "board": chips.board_name,
            "file": chips.board_file,
            "asic": chips.registers.asic,
            "chips": len(chips.parts),
            "networks": channels,
        }

    # Shared by several actions.

    def _marked(self, chips: int, addresses: NDArray[np.intp]) -> NDArray[np.bool_]:
        which = np.zeros((chips, self._chips.registers.count), bool)
        which[:, addresses] = True
        return which

    def _given(self, chip: Any, registers: Any) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Places of chips, and which of their registers, (chips, registers), were asked for and have a wanted value.

        RequestError when there are none, or when a register that was asked for by name has no wanted value.
        """
        chips = self._chips
        places = chips.find(chip)
        asked = self._marked(len(places), chips.registers.select(registers))
        which = asked & chips.given[places]
        missing = np.argwhere(asked & ~which)
        if len(missing) and (registers is not None or not which.any()):
            place, address = missing[0].tolist()
            what = "any register" if registers is None else chips.registers.name(address)
            unknown = f"what {chips.registers.chips} hold at power-up is not known"
            raise RequestError(f"chip {chips.key(places[place])}: nobody has set {what}, and {unknown}")
        some = which.any(axis=1)
        return places[some], which[some]

    def _exchange(self, places: NDArray[np.intp]) -> RegisterExchange:
        return RegisterExchange(self._chips.link, self._chips.registers, self._chips.parts[places])

    def _write(self, places: NDArray[np.intp], which: NDArray[np.bool_]) -> dict[str, Any]:
        errors = self._exchange(places).write(
            self._chips.wanted[places],
            which,
            lambda done, total: self._progress(f"written: {done} of {total} chips", done, total),
        )
        if errors:
            raise BoardError("; ".join(errors))
        return {"chips": len(places), "registers": int(which.sum())}

    def _read(self, places: NDArray[np.intp], which: NDArray[np.bool_]) -> RegisterAnswers:
        found = self._exchange(places).read(
            which, lambda done, total: self._progress(f"read: {done} of {total} chips", done, total)
        )
        self._chips.confirm(places, found.values, (found.answers > 0) & ~found.conflicts)
        return found

    def _deaf(self, found: RegisterAnswers, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which chips have not answered at all."""
        deaf: NDArray[np.bool_] = ((found.answers == 0) | ~which).all(axis=1)
        return deaf

    def _wrong(self, places: NDArray[np.intp], found: RegisterAnswers, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Registers without an answer, or with another value than wanted, of chips that have answered."""
        other = (found.answers == 0) | (found.values != self._chips.wanted[places])
        wrong: NDArray[np.bool_] = which & other & ~self._deaf(found, which)[:, None]
        return wrong

    def _silent(self, places: NDArray[np.intp], found: RegisterAnswers, which: NDArray[np.bool_]) -> list[str]:
        return [self._chips.key(place) for place in places[self._deaf(found, which)].tolist()]

    def _verdict(self, places: NDArray[np.intp], which: NDArray[np.bool_], found: RegisterAnswers) -> dict[str, Any]:
        at = np.argwhere(self._wrong(places, found, which))
        registers = self._chips.registers
        differences = [
            {
                "chip": self._chips.key(places[chip]),
                "register": registers.name(address),
                "address": address,
                "expected": int(self._chips.wanted[places[chip], address]),
                "found": int(found.values[chip, address]) if found.answers[chip, address] else None,
            }
            for chip, address in at[:_LISTED].tolist()
        ]
        return {
            "ok": not len(at) and not self._deaf(found, which).any() and not found.conflicts.any(),
            "chips": len(places),
            "registers": int(which.sum()),
            "different": len(at),
            "differences": differences,
            **self._trouble(places, found, which),
        }

    def _trouble(self, places: NDArray[np.intp], found: RegisterAnswers, which: NDArray[np.bool_]) -> dict[str, Any]:
        """The irregularities of a reading: silent chips, registers without or with several answers, board errors."""
        registers = self._chips.registers
        missing = which & (found.answers == 0) & ~self._deaf(found, which)[:, None]

        def named(marked: NDArray[np.bool_]) -> list[str]:
            at = np.argwhere(marked)[:100].tolist()
            return [f"{self._chips.key(places[chip])} {registers.name(address)}" for chip, address in at]

        return {
            "silent": self._silent(places, found, which),
            "unanswered": named(missing),
            "answered_twice": named(found.answers > 1),
            "contradicting": named(found.conflicts),
            "asked_again": found.asked_again,
            "bad_parity": found.bad_parity,
            "strange_answers": found.strange,
            "board_errors": found.errors,
        }

    def _readable(
        self, values: NDArray[np.uint8], have: NDArray[np.bool_], addresses: NDArray[np.intp]
    ) -> dict[str, Any]:
        """Values by register name, if all addresses of the register were asked for and are known; else by address."""
        registers = self._chips.registers
        wanted = set(addresses[have[addresses]].tolist())
        names = [name for name, at in registers.addresses.items() if wanted.issuperset(at)]
        covered = {address for name in names for address in registers.addresses[name]}
        shown: dict[str, Any] = {}
        if names:
            shown = {name: one[0] for name, one in registers.named(values[None, :], names).items()}
        rest = {registers.name(address): int(values[address]) for address in sorted(wanted - covered)}
        return shown | rest
