"""The known state of the chips: their keys, wanted and confirmed register values, and the pixel layout.

A routine gets it as a Controller of larpix-control, and what it leaves in the Controller is taken over. After the end
of the child, the next child continues with state(), and with the registers that the producer has seen meanwhile.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import RequestError
from larpixdaq.hardware import network_bringup
from larpixdaq.hardware.pixel_layout import LoadedLayout
from larpixdaq.hardware.producer_link import ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.protocol import hardware
from larpixdaq.protocol.stream import READ, REGISTERS
from larpixdaq.schema import key_of, parse_key

#: Maximum chips that a message names.
_NAMED: Final = 5


def short_list(keys: list[str]) -> str:
    """Chip keys for a message, which names only the first few."""
    return ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")


def _unfit(file: str, why: str) -> RequestError:
    return RequestError(f"board file {file:.200}: {why}")


def _parts(chip: Any) -> tuple[int, int, int]:
    return chip.io_group, chip.io_channel, chip.chip_id


class ChipState:
    """Chips in the order of the board file; arrays have one row for each chip. One for the life of the child."""

    def __init__(self, registers: ChipRegisters, link: ProducerPipe) -> None:
        self.registers = registers
        self.link = link
        #: Of the boards that take commands.
        self.io_groups = [board.io_group for board in link.setup.boards if board.kind]
        self.layout = LoadedLayout(link.setup.pixel_layout)
        self._forget_chips()

    def _forget_chips(self) -> None:
        registers = self.registers
        self.board_file = ""
        self.board_name = ""
        self.parts: NDArray[np.uint8] = np.zeros((0, 3), np.uint8)
        self.wanted: NDArray[np.uint8] = np.zeros((0, registers.count), np.uint8)
        #: Where `wanted` is a value, of power-up or set by somebody. Other registers are never written.
        self.given: NDArray[np.bool_] = np.zeros((0, registers.count), bool)
        self.confirmed: NDArray[np.uint8] = self.wanted.copy()
        #: Where `confirmed` is a value that was read.
        self.known: NDArray[np.bool_] = np.zeros((0, registers.count), bool)
        self._index: dict[tuple[int, int, int], int] = {}
        self._controller: Any = None

    # Chips.

    def find(self, asked: Any) -> NDArray[np.intp]:
        """Places of the chips asked for: None (all), a key, or a list of keys."""
        if asked is None:
            if not len(self.parts):
                raise RequestError("no chips are known yet: load_board(file) tells which there are, or name a chip")
            return np.arange(len(self.parts))
        single = isinstance(asked, str) or (isinstance(asked, list) and asked and isinstance(asked[0], int))
        keys = [parse_key(one) for one in ([asked] if single else self._listed(asked))]
        if not self.board_file:
            self._add([key for key in dict.fromkeys(keys) if key not in self._index])
        strangers = [key_of(key) for key in keys if key not in self._index]
        if strangers:
            raise RequestError(
                f"chip {short_list(strangers)}: not among the {len(self.parts)} chips of board {self.board_name}"
            )
        return np.array([self._index[key] for key in dict.fromkeys(keys)], np.intp)

    @staticmethod
    def _listed(asked: Any) -> list[Any]:
        if not isinstance(asked, list) or not asked:
            raise RequestError(f"chip: expected a chip key, a list of them, or None for all, found {asked!r:.100}")
        return asked

    def key(self, place: int) -> str:
        return key_of(self.parts[place].tolist())

    def _add(self, keys: list[tuple[int, int, int]]) -> None:
        if not keys:
            return
        for key in keys:
            if key[0] not in self.io_groups:
                there = ", ".join(map(str, self.io_groups)) or "none"
                raise RequestError(f"chip {key_of(key)}: no board of io_group {key[0]} takes commands here ({there})")
        for key in keys:
            self._index[key] = len(self._index)
        n = len(keys)
        self.parts = np.concatenate([self.parts, np.array(keys, np.uint8).reshape(n, 3)])
        defaults = np.tile(self.registers.defaults, (n, 1))
        if "chip_id" in self.registers.addresses:
            defaults[:, self.registers.addresses["chip_id"][0]] = [key[2] for key in keys]
        self.wanted = np.concatenate([self.wanted, defaults])
        self.given = np.concatenate([self.given, np.full(defaults.shape, self.registers.version is not None)])
        self.confirmed = np.concatenate([self.confirmed, np.zeros_like(defaults)])
        self.known = np.concatenate([self.known, np.zeros(defaults.shape, bool)])

    def confirm(self, places: NDArray[np.intp], values: NDArray[np.uint8], which: NDArray[np.bool_]) -> None:
        """These registers were read to hold these values, all (places, registers)."""
        self.confirmed[places] = np.where(which, values, self.confirmed[places])
        self.known[places] |= which

    # Boards.

    def load_board(self, file: str) -> None:
        """Load chips and their first wanted values from a controller configuration file of larpix-control."""
        controller = self._load(file)
        keys = [_parts(chip) for chip in controller.chips.values()]
        strangers = sorted({key[0] for key in keys} - set(self.io_groups))
        if strangers:
            there = ", ".join(map(str, self.io_groups)) or "none"
            raise _unfit(file, f"no board of io_group {strangers[0]} takes commands here ({there})")
        self._forget_chips()
        self._add(keys)
        self.board_file = file
        self.board_name = controller.board_name
        self.take_over(controller)

    def _load(self, file: str) -> Any:
        from larpix import Controller, configs  # here, because it takes a second

        controller = Controller()
        controller.board_name = ""
        for table in ("_enable_piso_upstream", "_enable_posi", "_enable_piso_downstream"):
            # larpix-control's steps for networks do not know LightPix, whose registers are those of v2
            names = getattr(controller, table)
            setattr(controller, table, {**names, "lightpix-v1.0": names[2]})
        if not file:
            return controller
        version = self.registers.version
        try:
            found = configs.load(file, "controller")["asic_version"]
            if str(found) not in (str(version), self.registers.asic):
                raise _unfit(file, f"asic_version is {found}, this producer has --asic {self.registers.asic}")
            with contextlib.redirect_stdout(io.StringIO()):
                if version == 1:
                    name = controller.load_controller(file)
                else:  # Controller.load does not know what its own Chip calls LightPix
                    name = controller.load_network(file, version=version)
                    network_bringup.plan(controller)
        except RequestError:
            raise
        except OSError as error:
            raise _unfit(file, error.strerror or "no such file, and none of this name in larpix-control") from None
        except Exception as error:  # whatever larpix-control makes of a file that is none
            raise _unfit(file, f"nothing that larpix-control can read: {type(error).__name__}: {error}") from None
        controller.board_name = name
        return controller

    # The Controller of routines.

    def controller(self) -> Any:
        """A Controller of larpix-control with the wanted values of all chips, and a StreamIO if there are boards.

        The caller gives it back to take_over(). If it does not, because a routine has failed, the next one is new.
        """
        controller, self._controller = self._controller or self._load(self.board_file), None
        if controller.io is None and self.link.setup.boards:
            from larpixdaq.hardware.controller_io import StreamIO

            controller.io = StreamIO(self.link, self.registers, self.doubt, self.layout)
        if self.registers.version is None:
            return controller
        for key in self._index:
            if key_of(key) not in controller.chips:
                controller.add_chip(key_of(key), version=self.registers.version)
        places, configs = self._configurations(controller)
        differ = (self.registers.of_all(configs) != self.wanted[places]).any(axis=1)
        for at in np.flatnonzero(differ).tolist():
            self.registers.put(configs[at], self.wanted[places[at]])
        return controller

    def _configurations(self, controller: Any) -> tuple[list[int], list[Any]]:
        """The configurations of chips that both we and a Controller know, and our places of these chips."""
        found = [
            (self._index[key], chip.config)
            for key, chip in ((_parts(chip), chip) for chip in controller.chips.values())
            if key in self._index
        ]
        return [place for place, _ in found], [config for _, config in found]

    def take_over(self, controller: Any) -> None:
        """Take the register values that a routine left in its Controller as the wanted values."""
        keys = [_parts(chip) for chip in controller.chips.values()]
        self._add([key for key in keys if key not in self._index and key[0] in self.io_groups])
        places, configs = self._configurations(controller)
        if places and self.registers.version is not None:  # else these are values of another generation
            self.wanted[places] = self.registers.of_all(configs)
        self._controller = controller

    def doubt(self, io_groups: list[int]) -> None:
        """Forget the confirmed values of these boards' chips, here and in the producer.

        Call it before these chips are reset, or get or lose their power.
        """
        self.link.send(hardware.Invalidate(io_groups))
        self.known[np.isin(self.parts[:, 0], io_groups)] = False

    # The state that outlives the child.

    def state(self) -> hardware.Remember:
        """The state for the next child."""
        return hardware.Remember(
            self.board_file, self.parts.tobytes(), self.wanted.tobytes(), self.given.tobytes(), self.layout.name
        )

    def restore(self) -> None:
        """Take over the state that the previous child left, and the registers that the producer has seen."""
        setup = self.link.setup
        if setup.board_file:
            self.load_board(setup.board_file)
        parts = np.frombuffer(setup.chips, np.uint8).reshape(-1, 3)
        count = self.registers.count
        wanted = np.frombuffer(setup.wanted, np.uint8).reshape(len(parts), count)
        given = np.frombuffer(setup.given, bool).reshape(len(parts), count)
        read, known = (
            np.frombuffer(data, np.uint8).reshape(len(parts), REGISTERS)[:, :count]
            for data in (setup.read, setup.known)
        )
        keys = [(a, b, c) for a, b, c in parts.tolist()]
        self._add([key for key in keys if key not in self._index])
        places = np.array([self._index[key] for key in keys], np.intp)
        self.confirm(places, read, known & READ != 0)
        self.wanted[places] = wanted
        self.given[places] = given
