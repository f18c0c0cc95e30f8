"""Snapshots of the chips' configurations (control/snapshots.py): made, compared, and loaded into the chips."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.control import snapshots
from larpixdaq.control.snapshots import Snapshot, one_line
from larpixdaq.errors import RequestError
from larpixdaq.hardware.actions import LISTED, ChipActions
from larpixdaq.hardware.chip_state import ChipState, short_list
from larpixdaq.hardware.network_bringup import NETWORK
from larpixdaq.hardware.power import Progress
from larpixdaq.hardware.producer_link import BoardError
from larpixdaq.schema import key_of, parse_key, tile_of

#: Registers of the lines between chips, by the begin of their names. They are loaded only if the snapshot names them,
#: because those of another network have other lines in use.
_LINES: Final = ("tx_slices", "i_tx_diff", "i_rx", "r_term", "v_cm_lvds")
#: Registers by which a channel is disabled, and their values then.
_DISABLED: Final = {"channel_mask": 1, "periodic_trigger_mask": 1, "csa_enable": 0}
#: Channels in a list of disabled channels that has a reading: those that are masked.
_MASK: Final = "channel_mask"
#: Begin of the names of registers that do nothing.
_RESERVED: Final = "RESERVED"
#: A register without a name, as ChipRegisters.name() calls it.
_UNNAMED: Final = re.compile(r"register (\d{1,3})\Z")

_Key = tuple[int, int, int]


def _place(key: _Key) -> _Key:
    return key[0], tile_of(key[1]), key[2]


class SnapshotActions:
    """The actions on snapshots. A packed snapshot is that of control/snapshots.pack()."""

    def __init__(self, chips: ChipState, progress: Progress) -> None:
        self._chips, self._registers, self._progress = chips, chips.registers, progress
        addresses = self._registers.addresses
        self._network = sorted({at for name in NETWORK if name in addresses for at in addresses[name]})
        self._lines = sorted({at for name in addresses if name.startswith(_LINES) for at in addresses[name]})

    def retrieve_snapshot(self) -> dict[str, Any]:
        chips, registers = self._chips, self._registers
        indices = chips.find(None)
        names = [name for name in registers.names if not name.startswith(_RESERVED)]
        values = registers.values_by_name(chips.wanted, names)
        power_up = registers.values_by_name(registers.defaults[None, :], names)
        wanted: list[dict[str, Any]] = [{} for _ in indices]
        for name in names:
            given = chips.given[:, registers.addresses[name]].all(axis=1).tolist()
            for row, value, known in zip(wanted, values[name], given, strict=True):
                if known and value != power_up[name][0]:
                    row[name] = value
        # What was set by address where no name is.
        nameless = (chips.wanted ^ registers.defaults) & ~registers.bits_of(names)
        for index, address in np.argwhere(nameless * chips.given).tolist():
            wanted[index][f"register {address}"] = int(chips.wanted[index, address])
        return {"asic": registers.asic, "chips": {chips.key(index): wanted[index] for index in indices.tolist()}}

    def load_snapshot(self, content: Any, skip_missing: Any = False) -> dict[str, Any]:
        if not isinstance(skip_missing, bool):
            raise RequestError(f"load_snapshot: skip_missing: expected True or False, found {skip_missing!r:.100}")
        chips = self._chips
        chips.find(None)
        snapshot = self._open(content)
        places, missing, moved = self._match(_keys_in(snapshot), self._keys())
        values = self._power_up(len(places))
        rows = np.flatnonzero(places >= 0)
        indices = places[rows]
        values[np.ix_(rows, self._lines)] = chips.wanted[np.ix_(indices, self._lines)]
        named = self._set(snapshot, values)  # also of missing chips, so that a wrong file is noticed
        if missing and (not skip_missing or not len(rows)):
            raise RequestError(
                f"{len(missing)} of its {len(places)} chips are not among the {len(chips.chip_keys)} chips here: "
                f"{short_list(missing)}; nothing was loaded"
                + (" (skip_missing=True loads the others)" if len(rows) else "")
            )
        mask = self._compared(named[rows])
        chips.wanted[indices] = np.where(mask, values[rows], chips.wanted[indices])
        chips.given[indices] |= mask
        try:
            result = ChipActions(chips, self._progress).enforce_configuration([chips.key(i) for i in indices.tolist()])
        except BoardError as error:
            state = "the wanted values are those of the snapshot, and chips may have a part of them"
            raise BoardError(f"{error}; {state}") from None
        others = np.setdiff1d(np.arange(len(chips.chip_keys)), indices).tolist()
        return result | {"missing": missing, "moved": moved, "unchanged": [chips.key(index) for index in others]}

    def compare_snapshot(self, content: Any, other: Any = None) -> dict[str, Any]:
        first = self._open(content)
        keys, values = _keys_in(first), self._power_up(len(first.chips))
        named = self._set(first, values)
        if other is None:
            self._chips.find(None)
            other_keys, other_values = self._keys(), self._chips.wanted
            other_named = np.zeros(other_values.shape, bool)
        else:
            second = self._open(other)
            other_keys, other_values = _keys_in(second), self._power_up(len(second.chips))
            other_named = self._set(second, other_values)
        places, missing, moved = self._match(keys, other_keys)
        rows = np.flatnonzero(places >= 0)
        indices = places[rows]
        mask = self._compared(named[rows] | other_named[indices])
        at = np.argwhere(mask & (values[rows] != other_values[indices]))
        new = [key_of(other_keys[index]) for index in np.setdiff1d(np.arange(len(other_keys)), indices).tolist()]
        return {
            "same": not len(at) and not missing and not new,
            "chips": len(rows),
            "different": len(at),
            "differences": [
                {
                    "chip": key_of(keys[rows[row]]),
                    "register": self._registers.name(address),
                    "address": address,
                    "snapshot": int(values[rows[row], address]),
                    "other": int(other_values[indices[row], address]),
                }
                for row, address in at[:LISTED].tolist()
            ],
            "missing": missing,
            "new": new,
            "moved": moved,
        }

    def disable_channels(self, channels: Any) -> dict[str, Any]:
        chips, registers = self._chips, self._registers
        chips.find(None)
        if not isinstance(channels, dict) or not channels:
            raise RequestError('disable_channels: expected {"io_group-tile-chip_id": [channel, ...]}')
        names = {name: value for name, value in _DISABLED.items() if name in registers.addresses}
        by_place: dict[_Key, list[int]] = {}
        for index, key in enumerate(self._keys()):
            by_place.setdefault(_place(key), []).append(index)
        present = registers.values_by_name(chips.wanted, list(names))
        problems: list[str] = []
        updates: dict[str, dict[str, list[int]]] = {}
        for place, numbers in channels.items():
            try:
                indices = by_place.get(parse_key(place), [])
            except RequestError:
                problems.append(f"chip {place!r:.40}: expected io_group-tile-chip_id, such as 1-1-21")
                continue
            count = len(present[_MASK][0])
            wrong = [
                number
                for number in (numbers if isinstance(numbers, list) else [numbers])
                if type(number) is not int or not 0 <= number < count
            ]
            if wrong:
                problems.append(f"chip {place}: channel {wrong[0]!r:.40}: expected 0 to {count - 1}")
            elif len(indices) != 1:
                found = (
                    "no chip here"
                    if not indices
                    else f"{len(indices)} chips: {short_list([chips.key(index) for index in indices])}"
                )
                problems.append(f"chip {place} (io_group-tile-chip_id): {found}")
            elif numbers:
                row = {name: list(present[name][indices[0]]) for name in names}
                for name, value in names.items():
                    for number in numbers:
                        row[name][number] = value
                updates[chips.key(indices[0])] = row
        if problems:
            raise RequestError(f"{one_line(problems)}; nothing was changed")
        if not updates:
            return {"chips": 0, "registers": 0}
        return ChipActions(chips, self._progress).send_configuration(updates)

    def disabled_channels(self) -> dict[str, list[int]]:
        masks = self._registers.values_by_name(self._chips.wanted[self._chips.find(None)], [_MASK])[_MASK]
        return {
            key_of(_place(key)): np.flatnonzero(mask).tolist()
            for key, mask in zip(self._keys(), masks, strict=True)
            if any(mask)
        }

    def _keys(self) -> list[_Key]:
        return [(a, b, c) for a, b, c in self._chips.chip_keys.tolist()]

    def _power_up(self, chips: int) -> NDArray[np.uint8]:
        return np.tile(self._registers.defaults, (chips, 1))

    def _compared(self, named: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which registers a snapshot sets, shape (chips, registers); `named`: which it names.

        All but those of the network, those that chips count themselves, and those of lines that are not named.
        """
        mask = np.tile(~self._registers.counted, (len(named), 1))
        mask[:, self._lines] &= named[:, self._lines]
        mask[:, self._network] = False
        return mask

    def _open(self, content: Any) -> Snapshot:
        if not isinstance(content, bytes):
            raise RequestError(f"expected a packed snapshot, found {type(content).__name__}")
        snapshot, asic = snapshots.unpack(content), self._registers.asic
        if snapshot.asic and snapshot.asic != asic:
            file = next((f"{chip.file}: " for chip in snapshot.chips.values() if chip.file), "")
            raise RequestError(f"{file}for chips of --asic {snapshot.asic}; this producer has --asic {asic}")
        return snapshot

    def _set(self, snapshot: Snapshot, values: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Set the registers of a snapshot in `values`, shape (its chips, registers). Returns which it names.

        RequestError names file, chip and register of the first problems.
        """
        named = np.zeros(values.shape, bool)
        problems = []
        for row, (name, chip) in enumerate(snapshot.chips.items()):
            wanted = {register: value for register, value in chip.wanted.items() if not register.startswith(_RESERVED)}
            where = f"{chip.file}: chip {name}: " if chip.file else f"chip {name}: "
            for register, value in wanted.items():
                known: str | int = int(match[1]) if (match := _UNNAMED.match(register)) else register
                try:
                    named[row, self._registers.change(values[row : row + 1], {known: value}, where)] = True
                except RequestError as error:
                    problems.append(str(error))
        if problems:
            raise RequestError(f"{one_line(problems)}; nothing was loaded")
        return named

    def _match(self, keys: list[_Key], known: list[_Key]) -> tuple[NDArray[np.intp], list[str], dict[str, str]]:
        """Find chips among known ones: by their keys, or else on another io_channel of their tile.

        Returns the index of each, -1 for missing chips, the keys of these, and the known keys of chips that have
        another one, {key: known key}.
        """
        index = {key: at for at, key in enumerate(known)}
        by_place: dict[_Key, list[int]] = {}
        for at, key in enumerate(known):
            by_place.setdefault(_place(key), []).append(at)
        places, missing, moved = np.full(len(keys), -1, np.intp), [], {}
        taken: dict[int, _Key] = {}
        for row, key in enumerate(keys):
            found = [index[key]] if key in index else by_place.get(_place(key), [])
            if not found:
                missing.append(key_of(key))
                continue
            if len(found) > 1:
                raise RequestError(
                    f"chip {key_of(key)}: on its tile are {', '.join(key_of(known[at]) for at in found)}"
                )
            (at,) = found
            if at in taken:
                raise RequestError(
                    f"chips {key_of(taken[at])} and {key_of(key)} are both chip {key_of(known[at])} here"
                )
            taken[at] = key
            places[row] = at
            if known[at] != key:
                moved[key_of(key)] = key_of(known[at])
        return places, missing, moved


def _keys_in(snapshot: Snapshot) -> list[_Key]:
    return [parse_key(key) for key in snapshot.chips]
