"""Power of a PACMAN's tiles: switch tiles on and off and set their supplies, in steps that are checked.

A board echoes every write, even if its I2C bus has not carried it out. Therefore enables are read back, and so are DACs
where the board can do it (rev3). On other boards the measured voltage must fit the DAC setting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

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

#: Seconds between setting a DAC or switching on a tile and the next step.
SETTLING: Final = 0.1
#: Ramp of a supply: DAC counts of a step, and seconds after it.
_STEP: Final = 1000
_STEP_SECONDS: Final = {"vdda": 0.1, "vddd": 0.15}
#: Order of the supplies: set in one step while the tile is off, or in a ramp while it is on.
_AT_ONCE: Final = ("vddd", "vdda")
_RAMPED: Final = ("vdda", "vddd")
#: Tiles of a board without a known revision: the number that all revisions but rev2 have.
_TILES: Final = 8

#: Monitors that the server reads in less than this time (s) are checked after every step of a ramp, slower ones at as
#: many steps as `_SLOW_CHECKS`.
_FAST: Final = 0.02
#: Attempts to switch a tile off after a failed ramp, and seconds between them.
_ATTEMPTS: Final = 5
_AGAIN: Final = 1.0
_SLOW_CHECKS: Final = 4

Progress = Callable[[str, int, int], None]
#: Lowest and highest value of monitors by name, such as vdda_ma; None: any.
Limits = Mapping[str, tuple[float | None, float | None]]
#: DAC settings that were sent, by io_group, tile and supply.
Dacs = dict[tuple[int, int, str], int]


def no_progress(text: str, done: int, total: int) -> None:
    """Drop progress."""


class RampError(BoardError):
    """A ramp that was ended. `off`: the tile was switched off, by its register."""

    def __init__(self, text: str, *, off: bool) -> None:
        super().__init__(text)
        self.off = off


class TilePower:
    """The tiles of one board, numbered from 0. `revision` None: not known, so that supplies cannot be set."""

    def __init__(
        self,
        exchange: Callable[..., list[int]],
        name: str,
        revision: PacmanRevision | None,
        progress: Progress,
        sent: Callable[[int, str, int], None] = lambda tile, supply, dac: None,
        ramping: Callable[[int, list[int]], None] = lambda tile, dacs: None,
    ) -> None:
        """`exchange(orders, seconds=0.0)`: BoardOrders.values() of this board. `sent` is called with DAC settings.

        `ramping` is called with a tile and the addresses of its DACs before its ramp, and with -1 after it.
        """
        self._ramping = ramping
        self._exchange = exchange
        self._name = name
        self._revision = revision
        self._progress = progress
        self._sent = sent
        self.tiles = _TILES if revision is None else revision.tiles

    @property
    def known_revision(self) -> PacmanRevision:
        assert self._revision is not None
        return self._revision

    def valid_tiles(self, tiles: Sequence[int] | None) -> list[int]:
        """Return these tiles, each once (None: all); RequestError for a tile that the board does not have."""
        if tiles is None:
            return list(range(self.tiles))
        for tile in tiles:
            if not 0 <= tile < self.tiles:
                suffix = "" if self._revision is None else f" of revision {self._revision.number}"
                last = f"0 to {self.tiles - 1}" if self.tiles > 1 else "0"
                raise RequestError(f"{self._name}: tiles: a board{suffix} has {last}, found {tile}")
        return list(dict.fromkeys(tiles))

    def switch_on(self, tiles: Sequence[int] | None, dacs: dict[str, int], *, ramp: bool) -> None:
        """Switch tiles on (None: all), one after the other, each after its supplies were set.

        `dacs`: DAC settings by supply. With `ramp` supplies rise from 0 while the tile is on. A tile with wrong
        voltages is switched off again: BoardError.
        """
        selected = self.valid_tiles(tiles)
        on, _ = self._read_enables()
        if ramp and (already := [tile for tile in selected if on >> tile & 1]):
            raise RequestError(f"{self._name}: ramp: tile {already[0]} is on already: switch it off first")
        self._switch_analog(on=True)
        for done, tile in enumerate(selected):
            if on >> tile & 1 and not dacs:
                continue
            self._progress(f"tile {tile} is switched on", done, len(selected))
            if ramp:
                self._ramping(tile, self._dac_addresses(tile))
            try:
                self._set_all(tile, dacs, ramp=ramp)
                self._confirm(tile, dacs)
            except BoardError as error:
                try:
                    self.disable([tile])
                except BoardError as second_error:
                    raise BoardError(f"{error}; and the tile cannot be switched off: {second_error}") from None
                raise BoardError(f"{error}; the tile was switched off") from None
            finally:
                if ramp:
                    self._ramping(-1, [])

    def ramp_up(self, tile: int, dacs: dict[str, int], limits: Limits) -> dict[str, float]:
        """Switch a tile on with its supplies at 0 and raise them to `dacs`, checked on the way. Returns its monitors.

        RampError if a monitor leaves its limits (the low one counts at the end), if a voltage does not fit its DAC
        setting, or if the tile is off again. The tile is then switched off, with its DACs at 0, which the error says.
        """
        self._ramping(tile, self._dac_addresses(tile))
        try:
            for supply in _AT_ONCE:
                self.set_dac(supply, tile, 0)
            time.sleep(SETTLING)
            self.enable([tile])
            time.sleep(SETTLING)
            reached: dict[str, int] = {}
            for supply in _RAMPED:
                steps = _steps(dacs[supply])
                for number, dac in enumerate(steps, 1):
                    self.set_dac(supply, tile, dac)
                    reached[supply] = dac
                    self._progress(f"tile {tile}: {supply} DAC {dac} of {dacs[supply]}", dac, dacs[supply])
                    time.sleep(_STEP_SECONDS[supply])
                    slow = number * _SLOW_CHECKS % len(steps) < _SLOW_CHECKS
                    self._check(tile, reached, limits, slow=slow, final=False)
            time.sleep(SETTLING)
            return self._check(tile, reached, limits, slow=True, final=True)
        except BoardError as error:
            off, state = self._shut_down(tile)
            raise RampError(f"{error}; {state}", off=off) from None
        finally:
            self._ramping(-1, [])

    def _dac_addresses(self, tile: int) -> list[int]:
        return [registers.dac.address(tile) for registers in self.known_revision.supplies.values()]

    def _shut_down(self, tile: int) -> tuple[bool, str]:
        """Switch a tile off and set its DACs to 0. Tries again for a while, because the board may be restarting.

        Returns whether the tile is off, and what was achieved, as text.
        """
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_AGAIN)
            try:
                self.disable([tile])
            except BoardError as error:
                problem = str(error)
                continue
            try:
                for supply in _AT_ONCE:
                    self.set_dac(supply, tile, 0)
            except BoardError:
                return True, "the tile was switched off, but its DACs may keep their values"
            return True, "the tile was switched off"
        return False, f"and the tile cannot be switched off: {problem}"

    def _check(self, tile: int, dacs: dict[str, int], limits: Limits, *, slow: bool, final: bool) -> dict[str, float]:
        """Return the monitors of these supplies of a tile, without slow ones unless `slow`; BoardError as ramp_up()."""
        monitors = {
            f"{supply}_{quantity}": monitor
            for supply in dacs
            for quantity, monitor in self.known_revision.supplies[supply].monitors.items()
            if slow or monitor.seconds < _FAST
        }
        orders = [read(TILES), *(read(monitor.register.address(tile)) for monitor in monitors.values())]
        on, *values = self._exchange(orders, sum(monitor.seconds for monitor in monitors.values()))
        if not on >> tile & 1:
            raise BoardError(
                f"{self._name}: tile {tile} is off again (register 0x{TILES:x} reads 0x{on:x}): the board has "
                "restarted, or another program has switched it off"
            )
        found = {name: monitor.convert(value) for (name, monitor), value in zip(monitors.items(), values, strict=True)}
        for name, value in found.items():
            supply, _, quantity = name.partition("_")
            low, high = limits.get(name, (None, None))
            at = f"{self._name}: tile {tile}: {name} is {value:.0f} with DAC {dacs[supply]}"
            if high is not None and value > high:
                raise BoardError(f"{at}, above its limit of {high:g}")
            if final and low is not None and value < low:
                raise BoardError(f"{at}, below its limit of {low:g}")
            if quantity == "mv":
                expected, uncertainty = self.known_revision.expected(dacs[supply])
                if value > expected + uncertainty or (final and value < expected - uncertainty):
                    raise BoardError(f"{at}, expected {expected:.0f} within {uncertainty:.0f}")
        return found

    def switch_off(self, tiles: Sequence[int] | None) -> None:
        """Switch tiles off (None: all), and the analog power when no tile is on any more."""
        if not self.disable(tiles):
            self._switch_analog(on=False)

    def _set_all(self, tile: int, dacs: dict[str, int], *, ramp: bool) -> None:
        for supply in _AT_ONCE:
            if supply in dacs:
                self.set_dac(supply, tile, 0 if ramp else dacs[supply])
                time.sleep(SETTLING)
        self.enable([tile])
        time.sleep(SETTLING)
        for supply in _RAMPED if ramp else ():
            for dac in _steps(dacs.get(supply, 0)):
                self.set_dac(supply, tile, dac)
                self._progress(f"tile {tile}: {supply} DAC {dac} of {dacs[supply]}", dac, dacs[supply])
                time.sleep(_STEP_SECONDS[supply])

    def _confirm(self, tile: int, dacs: dict[str, int]) -> None:
        """Compare the voltages with the DAC settings; BoardError if they do not fit."""
        for supply, dac in dacs.items():
            (mv,) = self._read_monitors(tile, supply, ["mv"])
            expected, uncertainty = self.known_revision.expected(dac)
            if abs(mv - expected) > uncertainty:
                raise BoardError(
                    f"{self._name}: tile {tile}: {supply} is {mv:.0f} mV with DAC {dac}, expected {expected:.0f} mV "
                    f"within {uncertainty:.0f}"
                )

    def set_dac(self, supply: str, tile: int, dac: int) -> None:
        """Set the DAC of a supply. BoardError if the board reads back another value (rev3)."""
        self.valid_tiles([tile])
        registers = self.known_revision.supplies[supply]
        orders = [write(registers.dac.address(tile), dac)]
        if registers.readback is not None:
            orders.append(read(registers.readback.address(tile)))
        _, *readback = self._exchange(orders)
        self._sent(tile, supply, dac)
        # According to its source, the v1.3 server answers in the upper half; no answer of a board is published.
        if readback and dac not in (readback[0] >> 16, readback[0] & 0xFFFF):
            raise BoardError(f"{self._name}: tile {tile}: {supply} DAC: set to {dac}, reads back 0x{readback[0]:08x}")

    def measure(self, tile: int, supply: str) -> tuple[float, float | None]:
        """Return voltage (mV) and current (mA) of a supply of a tile; current None if its unit is not established."""
        names = list(self.known_revision.supplies[supply].monitors)
        values = dict(zip(names, self._read_monitors(tile, supply, names), strict=True))
        return values["mv"], values.get("ma")

    def monitors(self, tile: int) -> dict[str, float]:
        """Return all monitors of a tile by name."""
        return {
            f"{supply}_{name}": value
            for supply, registers in self.known_revision.supplies.items()
            for name, value in zip(
                registers.monitors, self._read_monitors(tile, supply, list(registers.monitors)), strict=True
            )
        }

    def _read_monitors(self, tile: int, supply: str, names: list[str]) -> list[float]:
        self.valid_tiles([tile])
        monitors = [self.known_revision.supplies[supply].monitors[name] for name in names]
        orders = [read(monitor.register.address(tile)) for monitor in monitors]
        values = self._exchange(orders, sum(monitor.seconds for monitor in monitors))
        return [monitor.convert(value) for monitor, value in zip(monitors, values, strict=True)]

    def on(self) -> list[int]:
        """Return the tiles that are on."""
        enabled, firmware = self._read_enables()
        enabled &= tile_mask(self._revision, firmware)
        return [tile for tile in range(self.tiles) if enabled >> tile & 1]

    def analog_on(self) -> None:
        """Switch the analog power on, on boards that have a register for it."""
        self._switch_analog(on=True)

    def enable(self, tiles: Sequence[int] | None) -> int:
        """Switch these tiles on (None: all) in one step. Returns the mask of the tiles that are on."""
        selected = self.valid_tiles(tiles)
        enabled, firmware = self._read_enables()
        mask = _mask(selected)
        if firmware == MODULE_2:
            (receivers,) = self._exchange([read(MODULE_2_CHANNELS)])
            receivers |= sum(0xF << 4 * tile for tile in selected)
            self._exchange([write(MODULE_2_CHANNELS, receivers)])
            mask |= MODULE_2_CLOCKS
        return self._write_tiles(enabled | mask, mask) & tile_mask(self._revision, firmware)

    def disable(self, tiles: Sequence[int] | None) -> int:
        """Switch these tiles off (None: all), with the last one all clocks. Returns the mask of tiles that are on."""
        enabled, firmware = self._read_enables()
        counted = tile_mask(self._revision, firmware)
        mask = counted if tiles is None else _mask(self.valid_tiles(tiles))
        if not enabled & ~mask & counted:
            mask |= TILE_BITS if self._revision is None else self._revision.tile_bits
        return self._write_tiles(enabled & ~mask, mask) & counted

    def _read_enables(self) -> tuple[int, int]:
        """Read the registers TILES and FIRMWARE."""
        enabled, firmware = self._exchange([read(TILES), read(FIRMWARE)])
        return enabled, firmware

    def _write_tiles(self, value: int, changed: int) -> int:
        _, found = self._exchange([write(TILES, value), read(TILES)])
        if (found ^ value) & changed:
            raise BoardError(f"{self._name}: tiles (register 0x{TILES:x}): set to 0x{value:x}, reads back 0x{found:x}")
        return found

    def _switch_analog(self, *, on: bool) -> None:
        if self._revision is not None and not self._revision.analog_power:
            return
        _, found = self._exchange([write(POWER, int(on)), read(POWER)])
        if found & 1 != on and self._revision is not None:  # rev2 has no such register
            raise BoardError(f"{self._name}: analog power (register 0x{POWER:x}): set to {on:d}, reads back {found}")


def _mask(tiles: Iterable[int]) -> int:
    return sum(1 << tile for tile in set(tiles))


def _steps(dac: int) -> list[int]:
    """Return the DAC settings of a ramp up to this one."""
    return [*range(_STEP, dac, _STEP), dac] if dac else []
