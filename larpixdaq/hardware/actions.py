"""The actions on chips, boards and pixel layouts, which the child carries out for an Operator.

Each action is a method of the same name. It checks its arguments and returns the result of the request, made of plain
values. A RequestError has one line, which names the chip, register or board.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import RequestError
from larpixdaq.hardware import network_bringup
from larpixdaq.hardware.board_commands import NO_REVISION, BoardOrders
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
from larpixdaq.hardware.power import Dacs, Progress
from larpixdaq.hardware.power_up import power_report, report_text
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.register_io import RegisterAnswers, RegisterExchange
from larpixdaq.hardware.routine_arguments import check_number as check_number
from larpixdaq.hardware.routine_arguments import check_numbers as check_numbers
from larpixdaq.protocol import hardware

#: Registers of a PACMAN that board_status reads in one request.
_STATUS: Final = (
    CLOCK_STATUS, CLOCK, CLOCK_CONTROL, HEARTBEAT_CYCLES, TILES, POWER, FIRMWARE, MAP_VERSION,
)  # fmt: skip
_LONGEST_RESET: Final = (1 << 32) - 1
#: Maximum tiles and io_channels of a board.
_MOST_TILES, _MOST_CHANNELS = 10, 40
#: Text about the chips' configuration after a reset, by BoardOrders.reset_keeps_configuration().
_KEPT: Final = {True: "kept", False: "lost", None: "not known"}
#: Maximum channels of one answer; they take about 0.1 s of the producer's loop.
_MOST_LAYOUT_CHANNELS: Final = 500_000
#: Maximum differing registers that a result lists; all are counted.
LISTED: Final = 10_000
#: Maximum times that enforce_configuration writes registers that differ.
_TRIES: Final = 3


class BoardActions:
    """The actions on boards. `io_group`: a number, a list of numbers, or None for all boards."""

    def __init__(
        self,
        link: ProducerPipe,
        invalidate: Callable[[list[int]], None],
        progress: Progress,
        dacs: Dacs | None = None,
    ) -> None:
        """`invalidate` and `dacs` as in BoardOrders."""
        self._link, self._invalidate, self._progress = link, invalidate, progress
        self.orders = BoardOrders(link, invalidate, dacs)

    def ping(self, io_group: Any = None) -> dict[str, Any]:
        answers = self.orders.ask_pings(io_group)
        wrong = [str(answer) for answer in answers.values() if isinstance(answer, BoardError)]
        if len(wrong) == len(answers):
            raise BoardError("; ".join(wrong))
        return {str(group): not isinstance(answer, BoardError) for group, answer in answers.items()}

    def board_status(self, io_group: Any = None, supplies: Any = True) -> list[dict[str, Any]]:
        if not isinstance(supplies, bool):
            raise RequestError(f"board_status: supplies: expected True or False, found {supplies!r:.100}")
        groups = self.orders.groups(io_group)
        requested = {}
        for group in groups:
            if self.orders.kinds[group] == "pacman":
                requested[group] = b"".join(map(read, _STATUS))
            elif self.orders.kinds[group] == "bern":
                requested[group] = b"PING_HB"
        answers = self.orders.ask_all(requested)
        statuses = {}
        revisions: dict[int, PacmanRevision] = {}
        for group in groups:
            statuses[group] = self._describe(group, answers.get(group), revisions)
        if supplies:
            self._measure(statuses, revisions)
        return list(statuses.values())

    def _describe(
        self, io_group: int, answer: bytes | BoardError | None, revisions: dict[int, PacmanRevision]
    ) -> dict[str, Any]:
        """Return the status of a board from its answer. Adds its revision, if known, to `revisions`."""
        kind = self.orders.kinds[io_group]
        facts: dict[str, Any] = {"io_group": io_group, "kind": kind, "name": self.orders.names[io_group]}
        if answer is None:
            board = "a board on a serial line" if kind == "serial" else "an IO class"
            return facts | {"answers": False, "error": f"{board} answers no orders"}
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
                doubts.append(NO_REVISION)
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
            "uncertain": sorted(revision.uncertain) if revision is not None and tiles else [],
            "doubts": [*doubts, *(revision.doubts if revision is not None and tiles else ())],
        }

    def _measure(self, statuses: dict[int, dict[str, Any]], revisions: dict[int, PacmanRevision]) -> None:
        """Add the measured supplies of the tiles that are on. Read tile by tile, because a tile can take 2 s."""
        inputs = {
            group: b"".join(read(m.register.first) for m in r.board.values())
            for group, r in revisions.items()
            if r.board
        }
        for group, answer in self.orders.ask_all(inputs).items():
            if isinstance(answer, BoardError):
                statuses[group]["doubts"].append(str(answer))
                continue
            for (name, monitor), value in zip(revisions[group].board.items(), values_in(answer), strict=True):
                statuses[group][name] = monitor.convert(value)
        maximum = max((len(statuses[group]["tiles"]) for group in revisions), default=0)
        for position in range(maximum):
            readable = {group: r for group, r in revisions.items() if position < len(statuses[group]["tiles"])}
            self._progress(f"supplies: {position} of {maximum} tiles were read", position, maximum)
            bodies, seconds = {}, 0.0
            for group, revision in readable.items():
                monitors = revision.monitors().values()
                bodies[group] = b"".join(read(m.register.address(statuses[group]["tiles"][position])) for m in monitors)
                seconds = max(seconds, sum(m.seconds for m in monitors))
            for group, answer in self.orders.ask_all(bodies, seconds).items():
                if isinstance(answer, BoardError):
                    statuses[group]["doubts"].append(str(answer))
                    del revisions[group]
                    continue
                monitors_of = revisions[group].monitors().items()
                row = {name: m.convert(value) for (name, m), value in zip(monitors_of, values_in(answer), strict=True)}
                tile = statuses[group]["tiles"][position]
                dacs = {f"{name}_dac": self.orders.dacs.get((group, tile, name)) for name in revisions[group].supplies}
                known = {name: dac for name, dac in dacs.items() if dac is not None}
                statuses[group]["supplies"].append({"tile": tile, **known, **row})
        for group, revision in revisions.items():
            rows = [{"io_group": group, "state": "on", **row} for row in statuses[group]["supplies"]]
            report = power_report(group, revision, rows)
            self._link.send(hardware.PowerReport(group, report_text(report)))

    def power(
        self,
        on: Any,
        tiles: Any = None,
        vddd_dac: Any = None,
        vdda_dac: Any = None,
        io_group: Any = None,
        ramp: Any = False,
    ) -> list[dict[str, Any]]:
        groups = self.orders.groups_of_kind("power", "pacman", requested=io_group)
        for name, value in (("on", on), ("ramp", ramp)):
            if not isinstance(value, bool):
                raise RequestError(f"power: {name}: expected True or False, found {value!r:.100}")
        chosen = None if tiles is None else check_numbers("power: tiles", tiles, 0, _MOST_TILES - 1)
        settings = {"vddd": vddd_dac, "vdda": vdda_dac}.items()
        dacs = {name: check_number(f"power: {name}_dac", dac, 0, 0xFFFF) for name, dac in settings if dac is not None}
        if ramp and not dacs:
            raise RequestError("power: ramp: expected vdda_dac or vddd_dac, the DAC setting at the end of the ramp")
        if dacs and not on:
            raise RequestError(f"power: {' and '.join(f'{name}_dac' for name in dacs)}: only with on=True")
        boards = []
        for group in groups:  # check all boards before the first one is changed
            board = self.orders.tile_power(group, off=not on, supplies=bool(dacs), progress=self._progress)
            board.valid_tiles(chosen)
            boards.append(board)
        for group, board in zip(groups, boards, strict=True):
            self._invalidate([group])
            if on:
                board.switch_on(chosen, dacs, ramp=ramp)
            else:
                board.switch_off(chosen)
        return self.board_status(groups)

    def reset(self, length: Any = 256, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.groups_of_kind("reset", "pacman", "bern", "serial", requested=io_group)
        kinds = self.orders.kinds
        for group in groups:  # check all boards before the first one is changed
            if kinds[group] == "pacman":
                self.orders.reset_keeps_configuration(check_number("reset: length", length, 1, _LONGEST_RESET))
            elif kinds[group] == "serial":
                check_number("reset: length on a serial board", length, 1, 256)
        configuration = dict.fromkeys(map(str, groups), _KEPT[None])
        for group in groups:
            if kinds[group] == "pacman":
                configuration[str(group)] = _KEPT[self.orders.reset_keeps_configuration(length)]
                self.orders.reset(group, length)
            elif kinds[group] == "bern":
                self._invalidate([group])
                self._link.ask(group, b"SYRESET")
            else:
                self._invalidate([group])
                self._link.ask(group, b"c\x01" + bytes([length - 1]) + bytes(6) + b"q")
                self._link.ask(group, b"c\x02" + bytes(7) + b"q")
        return {"io_groups": groups, "length": length, "configuration": configuration}

    def set_uart_clock(self, ratio: Any, io_channel: Any = None, io_group: Any = None) -> dict[str, Any]:
        groups = self.orders.groups_of_kind("set_uart_clock", "pacman", "serial", requested=io_group)
        check_number("set_uart_clock: ratio", ratio, 1, 255)
        results: dict[str, Any] = {}
        serial = [group for group in groups if self.orders.kinds[group] == "serial"]
        maximum = 1 if serial else _MOST_CHANNELS
        requested = None if io_channel is None else check_numbers("set_uart_clock: io_channel", io_channel, 1, maximum)
        channels = {group: self.orders.io_channels(group, requested) for group in groups if group not in serial}
        for group in groups:
            if group in serial:
                self._link.ask(group, b"c\x00" + bytes([ratio]) + bytes(6) + b"q")
                results[str(group)] = {"1": ratio}
            else:
                ratios = self.orders.set_ratios(group, channels[group], ratio)
                results[str(group)] = {str(at): value for at, value in ratios.items()}
        return {"ratio": ratio, "io_groups": results}


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
        requested = chip if isinstance(chip, list) and not (chip and isinstance(chip[0], int)) else [chip]
        chips = list(layout.chips) if chip is None else list(dict.fromkeys(map(layout.find, requested)))
        channels = sum(map(layout.channels, chips))
        if channels > _MOST_LAYOUT_CHANNELS:
            raise RequestError(
                f"retrieve_pixel_layout: {channels} channels of {len(chips)} chips; "
                f"one answer has at most {_MOST_LAYOUT_CHANNELS}: name fewer chips"
            )
        return layout.summary() | {"channels": {chip_name: layout.describe(chip_name) for chip_name in chips}}


class ChipActions:
    """The actions on chips: registers, board files, networks."""

    def __init__(self, chips: ChipState, progress: Progress) -> None:
        self._chips, self._progress = chips, progress

    def write_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        return self._write(*self._select_wanted(chip, registers))

    def send_configuration(self, updates: Any) -> dict[str, Any]:
        if not isinstance(updates, dict) or not updates:
            raise RequestError('send_configuration: expected {chip: {register: value}}, "all" for every chip')
        wanted = self._chips.wanted.copy()
        mask = np.zeros(wanted.shape, bool)
        for chip, values in updates.items():
            if not isinstance(values, dict) or not values:
                raise RequestError(
                    f"send_configuration: chip {chip}: expected {{register: value}}, found {values!r:.100}"
                )
            indices = self._chips.find(None if chip == "all" else chip)
            grown = len(self._chips.chip_keys) - len(wanted)
            if grown:  # find() has added chips that were named for the first time
                wanted = np.concatenate([wanted, self._chips.wanted[-grown:]])
                mask = np.concatenate([mask, np.zeros((grown, mask.shape[1]), bool)])
            changed = wanted[indices]
            addresses = self._chips.registers.change(changed, values, f"chip {chip}: ")
            wanted[indices] = changed
            mask[np.ix_(indices, addresses)] = True
        self._chips.wanted = wanted
        self._chips.given |= mask
        indices = np.flatnonzero(mask.any(axis=1))
        return self._write(indices, mask[indices])

    def read_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        indices = self._chips.find(chip)
        addresses = self._chips.registers.select(registers)
        answers = self._read(indices, self._mask(len(indices), addresses))
        if answers.silent.all():
            silent = self._silent(indices, answers)
            chips = f"chip {silent[0]}" if len(silent) == 1 else f"{len(silent)} chips ({short_list(silent)})"
            raise BoardError("; ".join(answers.errors.values()) or f"{chips}: no answer")
        answered = answers.counts > 0
        values = {
            self._chips.key(index): self._readable(answers.values[i], answered[i], addresses)
            for i, index in enumerate(indices.tolist())
            if answered[i].any()
        }
        return {"chips": values, **self._faults(indices, answers)}

    def validate_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        indices, mask = self._select_wanted(chip, registers)
        return self._compare(indices, self._read(indices, mask))

    def enforce_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        indices, mask = self._select_wanted(chip, registers)
        answers = self._read(indices, mask)
        written = 0
        for _ in range(_TRIES):
            wrong = self._differing(indices, answers)
            if not wrong.any():
                break
            self._progress(f"{int(wrong.sum())} registers are written again", 0, 0)
            written += int(wrong.sum())
            self._write(indices, wrong)
            retry = self._read(indices, wrong)
            for name in ("values", "counts", "conflicts"):
                getattr(answers, name)[wrong] = getattr(retry, name)[wrong]
            answers.asked_again += retry.asked_again
            answers.bad_parity += retry.bad_parity
            answers.strange += retry.strange
            answers.without_magic += retry.without_magic
            answers.errors |= retry.errors
        return self._compare(indices, answers) | {"written": written}

    def retrieve_configuration(self, chip: Any = None, registers: Any = None) -> dict[str, Any]:
        indices = self._chips.find(chip)
        addresses = self._chips.registers.select(registers)
        chips = self._chips
        return {
            chips.key(index): {
                "wanted": self._readable(chips.wanted[index], chips.given[index], addresses),
                "confirmed": self._readable(chips.confirmed[index], chips.known[index], addresses),
            }
            for index in indices.tolist()
        }

    def load_board(self, file: Any) -> dict[str, Any]:
        if not isinstance(file, str) or not file:
            raise RequestError(f"load_board: expected the name of a board file, found {file!r:.100}")
        self._chips.load_board(file)
        return self._board()

    def configure_network(self, tries: Any = 3) -> dict[str, Any]:
        check_number("configure_network: tries", tries, 1, 100)
        chips = self._chips
        if not chips.board_file:
            raise RequestError("configure_network: load_board(file) first: the board file has the wiring of the chips")
        names = [name for name in network_bringup.NETWORK if name in chips.registers.addresses]
        if chips.registers.version == 1:  # no network to configure: the chips answer as soon as they have power
            return self.enforce_configuration()
        controller = chips.controller()
        wrong: set[str] | None = None
        for attempt in range(tries):
            prefix = f"try {attempt + 1}: " if attempt else ""

            def report(done: int, total: int, prefix: str = prefix) -> None:
                self._progress(f"{prefix}{done} of {total} chips are configured", done, total)

            network_bringup.bring_up(controller, wrong, report)
            chips.take_over(controller)
            result = self.validate_configuration(None, names)
            wrong = {*result["silent"], *(difference["chip"] for difference in result["differences"])}
            if not wrong:
                break
        return result | {"tries": attempt + 1}

    def get_boards(self) -> dict[str, Any]:
        boards = [
            {
                "io_group": board.io_group,
                "kind": board.kind or "takes no commands",
                "name": board.name,
                "revision": board.revision or None,
            }
            for board in self._chips.link.setup.boards
        ]
        return {"boards": boards, **self._board()}

    def _board(self) -> dict[str, Any]:
        chips = self._chips
        groups = np.unique(chips.chip_keys[:, :2], axis=0, return_counts=True)
        channels = [
            {"io_group": io_group, "io_channel": io_channel, "chips": n}
            for (io_group, io_channel), n in zip(groups[0].tolist(), groups[1].tolist(), strict=True)
        ]
        return {
            "board": chips.board_name,
            "file": chips.board_file,
            "asic": chips.registers.asic,
            "chips": len(chips.chip_keys),
            "networks": channels,
        }

    # Shared by several actions.

    def _mask(self, chips: int, addresses: NDArray[np.intp]) -> NDArray[np.bool_]:
        mask = np.zeros((chips, self._chips.registers.count), bool)
        mask[:, addresses] = True
        return mask

    def _select_wanted(self, chip: Any, registers: Any) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return the indices of chips, and which of their selected registers, (chips, registers), have a wanted value.

        RequestError if a register that was named has no wanted value.
        """
        chips = self._chips
        indices = chips.find(chip)
        requested = self._mask(len(indices), chips.registers.select(registers))
        mask = requested & chips.given[indices]
        missing = np.argwhere(requested & ~mask)
        if len(missing) and registers is not None:
            index, address = missing[0].tolist()
            what = f"chip {chips.key(indices[index])}: {chips.registers.name(address)}"
            raise RequestError(f"{what}: chips count in this register, so it has no wanted value")
        some = mask.any(axis=1)
        return indices[some], mask[some]

    def _exchange(self, indices: NDArray[np.intp]) -> RegisterExchange:
        return RegisterExchange(self._chips.link, self._chips.registers, self._chips.chip_keys[indices])

    def _write(self, indices: NDArray[np.intp], mask: NDArray[np.bool_]) -> dict[str, Any]:
        errors = self._exchange(indices).write(
            self._chips.wanted[indices],
            mask,
            lambda done, total: self._progress(f"written: {done} of {total} chips", done, total),
        )
        if errors:
            raise BoardError("; ".join(errors))
        return {"chips": len(indices), "registers": int(mask.sum())}

    def _read(self, indices: NDArray[np.intp], mask: NDArray[np.bool_]) -> RegisterAnswers:
        answers = self._exchange(indices).read(
            mask, lambda done, total: self._progress(f"read: {done} of {total} chips", done, total)
        )
        self._chips.confirm(indices, answers.values, (answers.counts > 0) & ~answers.conflicts)
        return answers

    def _differing(self, indices: NDArray[np.intp], answers: RegisterAnswers) -> NDArray[np.bool_]:
        """Return which registers have no answer or another value than wanted, of chips that have answered."""
        other: NDArray[np.bool_] = answers.values != self._chips.wanted[indices]
        return (answers.missing | answers.mask & other) & ~answers.silent[:, None]

    def _silent(self, indices: NDArray[np.intp], answers: RegisterAnswers) -> list[str]:
        return [self._chips.key(index) for index in indices[answers.silent].tolist()]

    def _compare(self, indices: NDArray[np.intp], answers: RegisterAnswers) -> dict[str, Any]:
        at = np.argwhere(self._differing(indices, answers))
        registers = self._chips.registers
        differences = [
            {
                "chip": self._chips.key(indices[chip]),
                "register": registers.name(address),
                "address": address,
                "expected": int(self._chips.wanted[indices[chip], address]),
                "found": int(answers.values[chip, address]) if answers.counts[chip, address] else None,
            }
            for chip, address in at[:LISTED].tolist()
        ]
        return {
            "ok": not len(at) and not answers.silent.any() and not answers.conflicts.any(),
            "chips": len(indices),
            "registers": int(answers.mask.sum()),
            "different": len(at),
            "differences": differences,
            **self._faults(indices, answers),
        }

    def _faults(self, indices: NDArray[np.intp], answers: RegisterAnswers) -> dict[str, Any]:
        """Return the faults of a readout: silent chips, registers without or with several answers, board errors."""
        registers = self._chips.registers

        def names(marked: NDArray[np.bool_]) -> list[str]:
            at = np.argwhere(marked)[:100].tolist()
            return [f"{self._chips.key(indices[chip])} {registers.name(address)}" for chip, address in at]

        return {
            "silent": self._silent(indices, answers),
            "unanswered": names(answers.missing & ~answers.silent[:, None]),
            "answered_twice": names(answers.counts > 1),
            "contradicting": names(answers.conflicts),
            "asked_again": answers.asked_again,
            "bad_parity": answers.bad_parity,
            "strange_answers": answers.strange,
            "without_magic": answers.without_magic,
            "board_errors": list(answers.errors.values()),
        }

    def _readable(
        self, values: NDArray[np.uint8], have: NDArray[np.bool_], addresses: NDArray[np.intp]
    ) -> dict[str, Any]:
        """Return known values by register name, or by address if not all addresses of a register are known."""
        registers = self._chips.registers
        wanted = set(addresses[have[addresses]].tolist())
        names = [name for name, at in registers.addresses.items() if wanted.issuperset(at)]
        covered = {address for name in names for address in registers.addresses[name]}
        shown: dict[str, Any] = {}
        if names:
            shown = {name: column[0] for name, column in registers.values_by_name(values[None, :], names).items()}
        others = {registers.name(address): int(values[address]) for address in sorted(wanted - covered)}
        return shown | others
