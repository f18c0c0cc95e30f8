"""The known state of the chips: their keys, wanted and confirmed register values, and the pixel layout.

A routine gets it as a Controller of larpix-control, and the values that it leaves there are the new wanted values.
After the end of the child, the next child continues with state(), and with the registers that the producer has seen.
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
from larpixdaq.hardware.power import Dacs, Progress
from larpixdaq.hardware.producer_link import ProducerPipe
from larpixdaq.hardware.register_map import ChipRegisters
from larpixdaq.protocol import hardware
from larpixdaq.protocol.stream import READ, REGISTERS
from larpixdaq.schema import key_of, parse_key

#: Maximum chip keys in a message.
_NAMED: Final = 5
#: Registers that let a chip send without a signal: what they switch on, and whether they do so with 0.
_TRIGGERS: Final = {
    "enable_periodic_trigger": ("periodic triggers", False),
    "enable_rolling_periodic_trigger": ("rolling triggers", False),
    "enable_cross_trigger": ("cross triggers", False),
    "cross_trigger_mode": ("cross triggers", False),
    "external_trigger_mask": ("external triggers", True),
    "csa_testpulse_enable": ("test pulses", True),
}


def short_list(keys: list[str]) -> str:
    """Return chip keys for a message, shortened to the first few."""
    return ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")


def _bad_board_file(file: str, reason: str) -> RequestError:
    return RequestError(f"board file {file:.200}: {reason}")


def _key(chip: Any) -> tuple[int, int, int]:
    return chip.io_group, chip.io_channel, chip.chip_id


class ChipState:
    """All chips, in the order of the board file; arrays have one row for each chip. The child has one instance."""

    def __init__(self, registers: ChipRegisters, link: ProducerPipe) -> None:
        self.registers = registers
        self.link = link
        #: io_groups of the boards that take commands.
        self.io_groups = [board.io_group for board in link.setup.boards if board.kind]
        self.layout = LoadedLayout(link.setup.pixel_layout)
        #: DAC settings that this process has sent to boards.
        self.dacs: Dacs = {}
        self._forget_chips()

    def _forget_chips(self) -> None:
        registers = self.registers
        self.board_file = ""
        self.board_name = ""
        self.chip_keys: NDArray[np.uint8] = np.zeros((0, 3), np.uint8)
        self.wanted: NDArray[np.uint8] = np.zeros((0, registers.count), np.uint8)
        #: Where `wanted` is wanted: not in registers in which chips count, unless they were set.
        self.given: NDArray[np.bool_] = np.zeros((0, registers.count), bool)
        self.confirmed: NDArray[np.uint8] = self.wanted.copy()
        #: Where `confirmed` is a value that was read.
        self.known: NDArray[np.bool_] = np.zeros((0, registers.count), bool)
        self._index: dict[tuple[int, int, int], int] = {}
        self._controller: Any = None

    # Chips.

    def find(self, requested: Any) -> NDArray[np.intp]:
        """Return the indices of chips: None (all), a key, or a list of keys."""
        if requested is None:
            if not len(self.chip_keys):
                raise RequestError("no chips are known yet: load_board(file) loads them, or name a chip")
            return np.arange(len(self.chip_keys))
        if isinstance(requested, str) or (isinstance(requested, list) and requested and isinstance(requested[0], int)):
            requested = [requested]
        if not isinstance(requested, list) or not requested:
            raise RequestError(f"chip: expected a chip key, a list of them, or None for all, found {requested!r:.100}")
        keys = list(dict.fromkeys(map(parse_key, requested)))
        if not self.board_file:
            self._add(keys)
        unknown = [key_of(key) for key in keys if key not in self._index]
        if unknown:
            raise RequestError(
                f"chip {short_list(unknown)}: not among the {len(self.chip_keys)} chips of board {self.board_name}"
            )
        return np.array([self._index[key] for key in keys], np.intp)

    def key(self, index: int) -> str:
        return key_of(self.chip_keys[index].tolist())

    def _add(self, keys: list[tuple[int, int, int]]) -> None:
        """Add the chips that are not known yet, with the register values at power-up."""
        keys = [key for key in keys if key not in self._index]
        for key in keys:
            if key[0] not in self.io_groups:
                io_groups = ", ".join(map(str, self.io_groups)) or "none"
                raise RequestError(
                    f"chip {key_of(key)}: no board of io_group {key[0]} takes commands here ({io_groups})"
                )
        for key in keys:
            self._index[key] = len(self._index)
        n = len(keys)
        self.chip_keys = np.concatenate([self.chip_keys, np.array(keys, np.uint8).reshape(n, 3)])
        defaults = np.tile(self.registers.defaults, (n, 1))
        if "chip_id" in self.registers.addresses:
            defaults[:, self.registers.addresses["chip_id"][0]] = [key[2] for key in keys]
        self.wanted = np.concatenate([self.wanted, defaults])
        self.given = np.concatenate([self.given, np.tile(~self.registers.counted, (n, 1))])
        self.confirmed = np.concatenate([self.confirmed, np.zeros_like(defaults)])
        self.known = np.concatenate([self.known, np.zeros(defaults.shape, bool)])

    def confirm(self, indices: NDArray[np.intp], values: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
        """Take register values that were read, where `mask` says so; both of shape (indices, registers)."""
        self.confirmed[indices] = np.where(mask, values, self.confirmed[indices])
        self.known[indices] |= mask

    # Boards.

    def load_board(self, file: str) -> None:
        """Load chips and their initial wanted values from a controller configuration file of larpix-control."""
        controller = self._load(file)
        keys = [_key(chip) for chip in controller.chips.values()]
        unknown = sorted({key[0] for key in keys} - set(self.io_groups))
        if unknown:
            io_groups = ", ".join(map(str, self.io_groups)) or "none"
            raise _bad_board_file(file, f"no board of io_group {unknown[0]} takes commands here ({io_groups})")
        self._forget_chips()
        self._add(keys)
        self.board_file = file
        self.board_name = controller.board_name
        self.take_over(controller)

    def _load(self, file: str) -> Any:
        from larpix import configs  # here, because it takes a second

        controller = self.registers.controller()
        controller.board_name = ""
        for table in ("_enable_piso_upstream", "_enable_posi", "_enable_piso_downstream"):
            # larpix-control cannot configure networks of LightPix chips, which have the registers of v2
            names = getattr(controller, table)
            setattr(controller, table, {**names, "lightpix-v1.0": names[2]})
        if not file:
            return controller
        version = self.registers.version
        try:
            content = network_bringup.load_with_included(file, lambda name: configs.load(name, "controller"))
            version_of_file = content["asic_version"]
            if str(version_of_file) not in self.registers.file_versions:
                raise _bad_board_file(
                    file, f"asic_version is {version_of_file}, this producer has --asic {self.registers.asic}"
                )
            with contextlib.redirect_stdout(io.StringIO()):
                if version == 1:
                    name = controller.load_controller(file)
                else:  # Controller.load does not know the version name that Chip has for LightPix
                    name = network_bringup.load_with_included(
                        file, lambda name: controller.load_network(name, version=version)
                    )
                    network_bringup.plan(controller)
        except RequestError:
            raise
        except OSError as error:
            missing = str(error).removeprefix("File not found: ")
            reason = "no such file, here or in larpix-control"
            if missing != file:
                reason = f"it includes {missing:.200}, which is neither here nor beside it nor in larpix-control"
            raise _bad_board_file(file, error.strerror or reason) from None
        except Exception as error:  # larpix-control can raise anything for a wrong file
            raise _bad_board_file(file, f"larpix-control cannot read it: {type(error).__name__}: {error}") from None
        controller.board_name = name
        return controller

    # The Controller of routines.

    def controller(self) -> Any:
        """Return a Controller of larpix-control with the wanted values of all chips, and a StreamIO if there
        are boards.

        The caller gives it back to take_over(). After a routine that failed, the next Controller is a new one.
        """
        controller, self._controller = self._controller or self._load(self.board_file), None
        if controller.io is None and self.link.setup.boards:
            from larpixdaq.hardware.controller_io import StreamIO

            controller.io = StreamIO(self.link, self.registers, self.invalidate, self.layout, self._discover_network)
            controller.io.dacs = self.dacs
        for key in self._index:
            if key_of(key) not in controller.chips:
                controller.add_chip(key_of(key), version=self.registers.version)
        indices, configs = self._configurations(controller)
        differ = (self.registers.values_of_all(configs) != self.wanted[indices]).any(axis=1)
        for at in np.flatnonzero(differ).tolist():
            self.registers.set_values(configs[at], self.wanted[indices[at]])
        return controller

    def _discover_network(self, progress: Progress, *arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Discover networks for a routine. Returns the Controller of the found chips, and the result."""
        from larpixdaq.hardware.discovery_action import DiscoveryActions  # which knows this class

        found = DiscoveryActions(self, progress).discover_network(*arguments)
        return self.controller(), found

    def _configurations(self, controller: Any) -> tuple[list[int], list[Any]]:
        """Return the indices of the known chips in this Controller, and their configurations."""
        pairs = [
            (self._index[key], chip.config)
            for key, chip in ((_key(chip), chip) for chip in controller.chips.values())
            if key in self._index
        ]
        return [index for index, _ in pairs], [config for _, config in pairs]

    def take_over(self, controller: Any) -> None:
        """Take a Controller's register values as the wanted values, and keep the Controller for the next routine.

        RequestError if it has chips of another generation; then nothing is taken.
        """
        strangers = [chip for chip in controller.chips.values() if not self.registers.fits(chip.config)]
        if strangers:
            raise RequestError(
                f"chip {key_of(_key(strangers[0]))}: expected a configuration of {self.registers.chips} in the "
                f"Controller, found {type(strangers[0].config).__name__}"
            )
        keys = [_key(chip) for chip in controller.chips.values()]
        self._add([key for key in keys if key[0] in self.io_groups])
        indices, configs = self._configurations(controller)
        if indices:
            self.wanted[indices] = self.registers.values_of_all(configs)
        self._controller = controller

    def triggers_on(self) -> set[tuple[str, str]]:
        """Return what is on by the wanted values: (periodic triggers or others, chip key)."""
        names = [name for name in _TRIGGERS if name in self.registers.addresses]
        if not len(self.wanted) or not names:
            return set()
        on = set()
        for name, values in self.registers.values_by_name(self.wanted, names).items():
            text, zero = _TRIGGERS[name]
            table = np.array(values).reshape(len(self.wanted), -1)
            marked = (table == 0 if zero else table != 0).any(axis=1)
            on |= {(text, self.key(index)) for index in np.flatnonzero(marked).tolist()}
        return on

    def invalidate(self, io_groups: list[int]) -> None:
        """Forget the confirmed values of these boards' chips, here and in the producer.

        Call it before the chips are reset or their power is switched.
        """
        self.link.send(hardware.Invalidate(io_groups))
        self.known[np.isin(self.chip_keys[:, 0], io_groups)] = False

    # The state that outlives the child.

    def state(self) -> hardware.Remember:
        """Return the state for the next child."""
        return hardware.Remember(
            self.board_file, self.chip_keys.tobytes(), self.wanted.tobytes(), self.given.tobytes(), self.layout.name
        )

    def restore(self) -> None:
        """Restore the state of the previous child, with the registers that the producer has seen."""
        setup = self.link.setup
        if setup.board_file:
            self.load_board(setup.board_file)
        chip_keys = np.frombuffer(setup.chips, np.uint8).reshape(-1, 3)
        keys = [(a, b, c) for a, b, c in chip_keys.tolist()]
        self._add(keys)
        indices = np.array([self._index[key] for key in keys], np.intp)
        count = self.registers.count
        read, known = (
            np.frombuffer(data, np.uint8).reshape(len(keys), REGISTERS)[:, :count] for data in (setup.read, setup.known)
        )
        self.confirm(indices, read, known & READ != 0)
        self.wanted[indices] = np.frombuffer(setup.wanted, np.uint8).reshape(len(keys), count)
        self.given[indices] = np.frombuffer(setup.given, bool).reshape(len(keys), count)
