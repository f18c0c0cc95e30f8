"""Registers of the chips: words to read and write them, and names for their contents.

Names, addresses and widths come from Configuration classes: those of larpix-control, and of register_tables.py for v2d
and v3 chips. Values are arrays of dtype u1, shape (chips, registers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native import word_codec
from larpixdaq.errors import RequestError
from larpixdaq.schema import ASICS, Asic, PacketType

#: Value of --asic -> version name and Configuration class of these chips in larpix-control, if it knows them.
_LARPIX_CONTROL: Final[dict[str, tuple[Any, str]]] = {
    "1": (1, "Configuration_v1"),
    "2": (2, "Configuration_v2"),
    "2b": ("2b", "Configuration_v2b"),
    "lightpix-1": ("lightpix-v1.0", "Configuration_Lightpix_v1"),
}
#: Values of --asic with registers in register_tables.py.
_TABLES: Final = ("2d", "3")
#: Values of --asic whose chips take configuration words only with the magic word, and repeat it in their answers.
MAGIC_ASICS: Final = ("2d", "3")
#: Bits 57..26 of these words.
_MAGIC: Final = 0x89504E47
_MAGIC_BITS: Final = np.uint64(_MAGIC << 26)
_MAGIC_MASK: Final = np.uint64(0xFFFFFFFF << 26)


def words(
    asic: Asic, kind: PacketType, chip_ids: Any, addresses: Any, values: Any = 0, *, magic: bool = False
) -> NDArray[np.uint64]:
    """Return words of type CONFIG_WRITE or CONFIG_READ with valid parity. The arguments are broadcast.

    `magic`: with the magic word, which words for v3 chips always have. ChipRegisters.words() knows who needs it.
    """
    chip_id, address, value = (np.asarray(part, np.uint64) for part in (chip_ids, addresses, values))
    made = np.uint64(kind) | chip_id << np.uint64(2) | address << np.uint64(10) | value << np.uint64(18)
    if magic or asic == Asic.V3:
        made = made | _MAGIC_BITS
    return word_codec.parity(np.ascontiguousarray(made.ravel(), np.uint64), asic=asic)


class ChipRegisters:
    """The registers of one generation of chips; `asic`: value of --asic."""

    def __init__(self, asic: str) -> None:
        self.asic = asic
        self.generation = ASICS[asic]
        #: Name of these chips in messages.
        self.chips = f"v{asic} chips" if asic[0].isdigit() else f"{asic} chips"
        self._magic = asic in MAGIC_ASICS
        #: Version name of these chips in larpix-control.
        self.version: Any
        #: Values of asic_version in board files of these chips.
        self.file_versions = [asic]
        #: Configuration class of these chips.
        self._class: Any
        counted: tuple[str, ...] = ()
        if asic in _LARPIX_CONTROL:
            from larpix import chip  # here, because it takes a second

            self.version, class_name = _LARPIX_CONTROL[asic]
            self.file_versions.append(str(self.version))
            self._class = getattr(chip, class_name)
        else:
            from larpixdaq.hardware import register_tables

            self.version, self._class = register_tables.LARPIX_CONTROL_VERSION, register_tables.CONFIGURATIONS[asic]
            counted = self._class.counted
        #: Settings of a link's lines that differ from those of larpix-control, for each UART: r_term and those of
        #: its init_network().
        self.lines: dict[str, int] = dict(getattr(self._class, "link_options", {}))
        if (termination := getattr(self._class, "termination", None)) is not None:
            self.lines["r_term"] = termination
        self._scratch: Any = None
        self.count: int = self._class.num_registers
        self.names: list[str] = []
        #: Register name -> addresses.
        self.addresses: dict[str, list[int]] = {}
        #: Values at power-up.
        self.defaults: NDArray[np.uint8] = np.zeros(self.count, np.uint8)
        self._entries: dict[str, int] = {}  # entries of registers that are lists
        self._bits: dict[str, tuple[int, int]] = {}  # first bit, bits of an entry; not for v1
        self._read_map(self._class())
        #: Registers in which the chips count themselves, so that they have no wanted value, shape (count,).
        self.counted = np.zeros(self.count, bool)
        self.counted[[address for name in counted for address in self.addresses[name]]] = True
        self._names_at: list[list[str]] = [[] for _ in range(self.count)]
        for name, addresses in self.addresses.items():
            for address in addresses:
                self._names_at[address].append(name)

    def controller(self) -> Any:
        """Return a Controller of larpix-control without chips, whose add_chip() makes these chips."""
        from larpix import Controller  # here, because it takes a second

        if self.asic not in _TABLES:
            return Controller()
        from larpixdaq.hardware.register_tables import TableController

        return TableController(self._class)

    def fits(self, config: Any) -> bool:
        """Return whether a Configuration object of larpix-control is one of these chips."""
        return isinstance(config, self._class)

    def words(self, kind: PacketType, chip_ids: Any, addresses: Any, values: Any = 0) -> NDArray[np.uint64]:
        """Return words of type CONFIG_WRITE or CONFIG_READ for these chips. The arguments are broadcast."""
        return words(self.generation, kind, chip_ids, addresses, values, magic=self._magic)

    def complete(self, made: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return words of larpix-control's packets, shape (N,), as these chips take them: with the magic word."""
        if not self._magic:
            return made
        config = made & np.uint64(2) != 0
        completed = word_codec.parity(made & ~_MAGIC_MASK | _MAGIC_BITS, asic=self.generation)
        return np.where(config, completed, made)

    def have_magic(self, rows: NDArray[Any], asic: Asic) -> NDArray[np.bool_]:
        """Return which rows with answers of chips have the magic word, or need none; `asic`: of the rows' decoder."""
        if not self._magic:
            return np.ones(len(rows), bool)
        return np.asarray(word_codec.encode(np.ascontiguousarray(rows), asic=asic) & _MAGIC_MASK == _MAGIC_BITS)

    def _read_map(self, config: Any) -> None:
        self.names = list(config.register_names)
        values = {name: getattr(config, name) for name in self.names}
        self._entries = {name: len(value) for name, value in values.items() if isinstance(value, list)}
        for name in self.names:
            if self.version == 1:
                self.addresses[name] = self._addresses_v1(config, name)
            else:
                self.addresses[name] = list(config.register_map[name])
                begin, end = config.bit_map[name]
                self._bits[name] = begin, (end - begin) // self._entries.get(name, 1)
        self.defaults = self.values_of(config)

    def _addresses_v1(self, config: Any, name: str) -> list[int]:
        for attribute in (f"{name}_addresses", f"{name}_address", f"{name.removesuffix('s')}_addresses"):
            result = getattr(config, attribute, None)
            if result is not None:
                return list(result) if isinstance(result, list) else [int(result)]
        # The register shares its address with others: find the address that changes with it.
        at = [self._set_v1(name, value) for value in (0, 1)]
        return [int(address) for address in np.flatnonzero(at[0] != at[1])]

    def _set_v1(self, name: str, value: Any) -> NDArray[np.uint8]:
        config = self._class()
        setattr(config, name, value)
        return self.values_of(config)

    def values_of(self, config: Any) -> NDArray[np.uint8]:
        """Return the register values of a Configuration object of larpix-control, shape (count,)."""
        if self.version == 1:
            return np.array([int(bits.to01(), 2) for bits in config.all_data()], np.uint8)
        return self.values_of_all([config]).ravel()

    def values_of_all(self, configs: Sequence[Any]) -> NDArray[np.uint8]:
        """Return the register values of many Configuration objects, shape (configs, count)."""
        if self.version == 1 or not configs:
            return np.array([self.values_of(config) for config in configs], np.uint8).reshape(-1, self.count)
        bits = np.zeros((len(configs), 8 * self.count), np.uint8)
        for name, (begin, width) in self._bits.items():
            values = np.array([getattr(config, name) for config in configs], np.int64).reshape(len(configs), -1, 1)
            part = (values >> np.arange(width)) & 1
            bits[:, begin : begin + part[0].size] = part.reshape(len(configs), -1)
        return np.packbits(bits, axis=1, bitorder="little")

    def set_values(self, config: Any, values: NDArray[np.uint8]) -> None:
        """Set these register values in a Configuration object."""
        changed = np.flatnonzero(self.values_of(config) != values).tolist()
        if changed:
            config.from_dict_registers({address: int(values[address]) for address in changed}, endian="little")

    def name(self, address: int) -> str:
        """Return what is at an address: a name, names that share it, or name[first:last] of a list."""
        names = self._names_at[address]
        if len(names) != 1:
            return "/".join(names) or f"register {address}"
        addresses = self.addresses[names[0]]
        if len(addresses) == 1:
            return names[0]
        index = addresses.index(address)
        entries_per_register = self._entries.get(names[0], 0) // len(addresses)
        if entries_per_register == 1:
            return f"{names[0]}[{index}]"
        if entries_per_register > 1:
            return f"{names[0]}[{entries_per_register * index}:{entries_per_register * (index + 1)}]"
        return f"{names[0]}, byte {index}"

    def select(self, selection: Any) -> NDArray[np.intp]:
        """Return the addresses of registers: None (all), a name, an address, or a list of names and addresses."""
        if selection is None:
            return np.arange(self.count)
        wanted = selection if isinstance(selection, list | tuple) else [selection]
        if not wanted:
            raise RequestError("registers: expected at least one name or address, found none")
        result: list[int] = []
        for item in wanted:
            if isinstance(item, str) and item in self.addresses:
                result += self.addresses[item]
            elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < self.count:
                result.append(item)
            else:
                raise RequestError(self._unknown(item))
        return np.array(list(dict.fromkeys(result)), np.intp)

    def _unknown(self, selection: Any) -> str:
        if isinstance(selection, str):
            import difflib

            close = difflib.get_close_matches(selection, self.names, 3, 0.5)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            return f"register {selection!r:.100}: {self.chips} have none of this name{hint}"
        return f"register {selection!r:.100}: expected a name or an address from 0 to {self.count - 1}"

    def change(self, values: NDArray[np.uint8], updates: Mapping[Any, Any], where: str = "") -> NDArray[np.intp]:
        """Set registers, {name or address: value}, of all chips in `values`, shape (chips, count), in place.

        Returns the addresses that were set. RequestError names `where` (the chip), the register and its valid values.
        """
        changed: list[int] = []
        scratch = self._scratch = self._scratch or self._class()
        for name, value in updates.items():
            try:
                addresses = self.select([name])
            except RequestError as error:
                raise RequestError(f"{where}{error}") from None
            if not isinstance(name, str):
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 256:
                    raise RequestError(f"{where}register {name}: expected 0 to 255, found {value!r}")
                values[:, addresses] = value
            else:
                self._set(scratch, values, name, value, where)
            changed += addresses.tolist()
        return np.array(list(dict.fromkeys(changed)), np.intp)

    def _set(self, scratch: Any, values: NDArray[np.uint8], name: str, value: Any, where: str) -> None:
        default = getattr(scratch, name)
        if isinstance(default, list) and (not isinstance(value, list) or len(value) != len(default)):
            raise RequestError(
                f"{where}register {name}: expected a list of {len(default)} values, found {value!r:.100}"
            )
        try:
            setattr(scratch, name, value)
            stored = getattr(scratch, name)
            stored = np.array(stored, np.int64)
        except (ValueError, TypeError) as error:
            raise RequestError(f"{where}register {name}: {value!r:.100}: {error}") from None
        if self.version == 1:
            for row in values:
                config = self._class()
                self.set_values(config, row)
                setattr(config, name, value)
                row[:] = self.values_of(config)
            return
        begin, width = self._bits[name]
        bits = (stored.reshape(-1, 1) >> np.arange(width)) & 1
        addresses = self.addresses[name]
        first, last = addresses[0], addresses[-1] + 1
        unpacked = np.unpackbits(values[:, first:last], axis=1, bitorder="little")
        start = begin - 8 * first
        unpacked[:, start : start + bits.size] = bits.ravel()
        values[:, first:last] = np.packbits(unpacked, axis=1, bitorder="little")

    def bits_of(self, names: Sequence[str]) -> NDArray[np.uint8]:
        """Return which bits of the registers have these names, shape (count,); all bits of v1 chips have names."""
        if self.version == 1:
            return np.full(self.count, 0xFF, np.uint8)
        bits = np.zeros(8 * self.count, np.uint8)
        for name in names:
            begin, width = self._bits[name]
            bits[begin : begin + width * self._entries.get(name, 1)] = 1
        return np.packbits(bits, bitorder="little")

    def values_by_name(self, values: NDArray[np.uint8], names: Sequence[str]) -> dict[str, list[Any]]:
        """Return values by register name, {name: [value or list of each chip]}; `values`: shape (chips, count)."""
        if self.version == 1:
            configs = []
            for row in values:
                configs.append(self._class())
                self.set_values(configs[-1], row)
            return {name: [getattr(config, name) for config in configs] for name in names}
        bits = np.unpackbits(values, axis=1, bitorder="little")
        result = {}
        for name in names:
            begin, width = self._bits[name]
            entries = self._entries.get(name, 1)
            part = bits[:, begin : begin + width * entries].reshape(len(values), entries, width)
            numbers = (part.astype(np.int64) << np.arange(width)).sum(axis=2)
            result[name] = numbers.tolist() if name in self._entries else numbers[:, 0].tolist()
        return result
