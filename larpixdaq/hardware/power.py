"""Tiles of a PACMAN switched on and off, and their supplies set: one step after the other, each of them checked.

A board echoes every write, also one that its I2C bus has not carried out. So enables are read back, and so are DACs
where the board can do that (rev3); where it cannot, the voltage that it measures has to be what the DAC stands for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from larpixdaq.errors import RequestError
from larpixdaq.hardware.pacman_registers import (
    FIRMWARE,
    MODULE_2,
    MODULE_2_CHANNELS,
    MODULE_2_CLOCKS,
    POWER,
    TILE_BITS,
    TILES,
    PacmanRevision,
    read,
    tile_mask,
    write,
)
from larpixdaq.hardware.producer_link import BoardError

#: Seconds after a DAC was set, or a tile switched on, until the next step.
SETTLE: Final = 0.1
#: Ramp of a supply: DAC counts of one step, and the seconds after it.
_STEP: Final = 1000
_STEP_SECONDS: Final = {"vdda": 0.1, "vddd": 0.15}
#: Order in which supplies are set: at once, while the tile is off; and in steps, with the tile on.
_AT_ONCE: Final = ("vddd", "vdda")
_RAMPED: Final = ("vdda", "vddd")
#: Tiles of a board whose revision is not known: those that all but rev2 have.
_TILES: Final = 8

Progress = Callable[[str, int, int], None]


def unheard(text: str, done: int, total: int) -> None:
    """Progress that nobody wants to know of."""


class RegisterAccess(Protocol):
    """What is needed of `board_commands.BoardOrders`."""

    def values(self, io_group: int, orders: Iterable[bytes], seconds: float = 0.0) -> list[int]: ...


class TilePower:
    """The tiles of one board, which count from 0. `revision` None: not known, so that supplies cannot be set."""

    def __init__(
        self,
        registers: RegisterAccess,
        io_group: int,
        name: str,
        revision: PacmanRevision | None,
        progress: Progress = unheard,
    ) -> None:
        self._registers = registers
        self._io_group = io_group
        self._name = name
        self._revision = revision
        self._progress = progress
        self.tiles = _TILES if revision is None else revision.tiles

    @property
    def known(self) -> PacmanRevision:
        assert self._revision is not None
        return self._revision

    def chosen(self, tiles: Sequence[int] | None) -> list[int]:
        """These tiles, None: all, or RequestError for one that the board has not."""
        if tiles is None:
            return list(range(self.tiles))
        for tile in tiles:
            if not 0 <= tile < self.tiles:
                of = "" if self._revision is None else f" of revision {self._revision.number}"
                last = f"0 to {self.tiles - 1}" if self.tiles > 1 else "0"
                raise RequestError(f"{self._name}: tiles: a board{of} has {last}, found {tile}")
        return list(dict.fromkeys(tiles))

    def switch_on(self, tiles: Sequence[int] | None, dacs: dict[str, int], *, ramp: bool) -> None:
        """Switch tiles on one by one, each after its supplies (`dacs`, by name) were set; with `ramp` they rise from 0
        while the tile is on. A tile whose voltages are not what was asked for is switched off again: BoardError."""
        chosen = self.chosen(tiles)
        on, _ = self._look()
        if ramp and (already := [tile for tile in chosen if on >> tile & 1]):
            raise RequestError(f"{self._name}: ramp: tile {already[0]} is on already: switch it off first")
        self._switch_analog(on=True)
        for done, tile in enumerate(chosen):
            if on >> tile & 1 and not dacs:
                continue
            self._progress(f"tile {tile} is switched on", done, len(chosen))
            try:
                self._set_all(tile, dacs, ramp=ramp)
                self._confirm(tile, dacs)
            except BoardError as error:
                try:
                    self.disable([tile])
                except BoardError as again:
                    raise BoardError(f"{error}; and the tile cannot be switched off: {again}") from None
                raise BoardError(f"{error}; the tile was switched off") from None

    def switch_off(self, tiles: Sequence[int] | None) -> None:
        """Switch tiles off (None: all), and with the last one the analog power."""
        if not self.disable(tiles):
            self._switch_analog(on=False)

    def _set_all(self, tile: int, dacs: dict[str, int], *, ramp: bool) -> None:
        for supply in _AT_ONCE:
            if supply in dacs:
                self.set_dac(supply, tile, 0 if ramp else dacs[supply])
                time.sleep(SETTLE)
        self.enable([tile])
        time.sleep(SETTLE)
        for supply in _RAMPED if ramp else ():
            for dac in _steps(dacs.get(supply, 0)):
                self.set_dac(supply, tile, dac)
                self._progress(f"tile {tile}: {supply} DAC {dac} of {dacs[supply]}", dac, dacs[supply])
                time.sleep(_STEP_SECONDS[supply])

    def _confirm(self, tile: int, dacs: dict[str, int]) -> None:
        """BoardError when a voltage is not what its DAC stands for."""
        for supply, dac in dacs.items():
            (mv,) = self._measure(tile, supply, ["mv"])
            expected, uncertainty = self.known.expected(dac)
            if abs(mv - expected) > uncertainty:
                raise BoardError(
                    f"{self._name}: tile {tile}: {supply} is {mv:.0f} mV with DAC {dac}, expected {expected:.0f} mV "
                    f"within {uncertainty:.0f}"
                )

    def set_dac(self, supply: str, tile: int, dac: int) -> None:
        """BoardError when the board reads back another value, where it can."""
        self.chosen([tile])
        places = self.known.supplies[supply]
        orders = [write(places.dac.of(tile), dac)]
        if places.readback is not None:
            orders.append(read(places.readback.of(tile)))
        _, *found = self._registers.values(self._io_group, orders)
        # By its source the v1.3 server answers in the upper half; no answer of a board is published.
        if found and dac not in (found[0] >> 16, found[0] & 0xFFFF):
            raise BoardError(f"{self._name}: tile {tile}: {supply} DAC: set to {dac}, reads back 0x{found[0]:08x}")

    def measured(self, tile: int, supply: str) -> tuple[float, float | None]:
        """Voltage (mV) and current (mA) of one supply of a tile; None where the current's unit is not established."""
        names = list(self.known.supplies[supply].monitors)
        found = dict(zip(names, self._measure(tile, supply, names), strict=True))
        return found["mv"], found.get("ma")

    def _measure(self, tile: int, supply: str, names: list[str]) -> list[float]:
        self.chosen([tile])
        monitors = [self.known.supplies[supply].monitors[name] for name in names]
        orders = [read(monitor.place.of(tile)) for monitor in monitors]
        values = self._registers.values(self._io_group, orders, sum(monitor.seconds for monitor in monitors))
        return [monitor.convert(value) for monitor, value in zip(monitors, values, strict=True)]

    def enable(self, tiles: Sequence[int] | None) -> int:
        """Switch these tiles on (None: all) in one step; the mask of those that are on."""
        chosen = self.chosen(tiles)
        before, firmware = self._look()
        mask = _mask(chosen)
        if firmware == MODULE_2:
            (heard,) = self._registers.values(self._io_group, [read(MODULE_2_CHANNELS)])
            heard |= sum(0xF << 4 * tile for tile in chosen)
            self._registers.values(self._io_group, [write(MODULE_2_CHANNELS, heard)])
            mask |= MODULE_2_CLOCKS
        return self._write_tiles(before | mask, mask) & tile_mask(self._revision, firmware)

    def disable(self, tiles: Sequence[int] | None) -> int:
        """Switch these tiles off (None: all), and with the last one their clocks; the mask of those that are on."""
        before, firmware = self._look()
        counted = tile_mask(self._revision, firmware)
        mask = counted if tiles is None else _mask(self.chosen(tiles))
        if not before & ~mask & counted:
            mask |= TILE_BITS if self._revision is None else self._revision.tile_bits
        return self._write_tiles(before & ~mask, mask) & counted

    def _look(self) -> tuple[int, int]:
        """What the registers TILES and FIRMWARE hold."""
        enabled, firmware = self._registers.values(self._io_group, [read(TILES), read(FIRMWARE)])
        return enabled, firmware

    def _write_tiles(self, value: int, changed: int) -> int:
        _, found = self._registers.values(self._io_group, [write(TILES, value), read(TILES)])
        if (found ^ value) & changed:
            raise BoardError(f"{self._name}: tiles (register 0x{TILES:x}): set to 0x{value:x}, reads back 0x{found:x}")
        return found

    def _switch_analog(self, *, on: bool) -> None:
        if self._revision is not None and not self._revision.analog_power:
            return
        _, found = self._registers.values(self._io_group, [write(POWER, int(on)), read(POWER)])
        if found & 1 != on and self._revision is not None:  # rev2 has no such register
            raise BoardError(f"{self._name}: analog power (register 0x{POWER:x}): set to {on:d}, reads back {found}")


def _mask(tiles: Iterable[int]) -> int:
    return sum(1 << tile for tile in set(tiles))


def _steps(dac: int) -> list[int]:
    """Settings from above 0 up to this one."""
    return [*range(_STEP, dac, _STEP), dac] if dac else []
