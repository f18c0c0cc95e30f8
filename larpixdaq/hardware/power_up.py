"""The action power_up, which ramps the supplies of tiles, and the reports on supplies for the run's file."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from larpixdaq.errors import RequestError
from larpixdaq.hardware.board_commands import NO_REVISION, BoardOrders
from larpixdaq.hardware.pacman_registers import INVERTED, PacmanRevision, read, uart, write
from larpixdaq.hardware.power import Dacs, Limits, Progress, RampError, TilePower
from larpixdaq.hardware.power_settings import BoardSettings, name_of, parse_limits, read_settings
from larpixdaq.hardware.producer_link import BoardError, ProducerPipe
from larpixdaq.hardware.routine_arguments import check_number, check_numbers
from larpixdaq.protocol import hardware
from larpixdaq.runtime.units import utc

SUPPLIES: Final = ("vdda", "vddd")
#: Length in ticks of the reset after a power-up, as laboratories use it; chips lose their configuration from 256 on.
_RESET: Final = 4096
_MOST_TILES: Final = 10
#: Quantities of a supply and their units, in the text of a report.
_QUANTITIES: Final = {"dac": "DAC", "mv": "mV", "ma": "mA", "shunt_uv": "uV at the shunts"}
TILE_CHANNELS: Final = 4
#: DAC settings (VDDA, VDDD) that laboratories have used, by revision and generation of chips: for the text of an error
#: alone, because a tile's cables and chips decide what it needs.
_USED: Final = {
    (2, "2"): (54_691, 54_691), (3, "2"): (46_000, 40_000), (4, "2b"): (46_000, 31_000), (4, "2d"): (46_500, 28_500),
    (5, "2d"): (48_092, 32_838), (5, "3"): (46_000, 22_000),
}  # fmt: skip


@dataclass
class _Plan:
    """What power_up does with a board."""

    io_group: int
    power: TilePower
    #: DAC settings by tile and supply.
    dacs: dict[int, dict[str, int]]
    limits: Limits
    inverted: bool


class PowerActions:
    """The action power_up, on PACMAN boards."""

    def __init__(
        self, link: ProducerPipe, invalidate: Callable[[list[int]], None], progress: Progress, dacs: Dacs
    ) -> None:
        """`invalidate` and `dacs` as in BoardOrders."""
        self._link, self._invalidate, self._progress = link, invalidate, progress
        self._orders = BoardOrders(link, invalidate, dacs)

    def power_up(
        self, tiles: Any = None, vdda_dac: Any = None, vddd_dac: Any = None, limits: Any = None, io_group: Any = None
    ) -> dict[str, Any]:
        groups = self._orders.groups_of_kind("power_up", "pacman", requested=io_group)
        chosen = None if tiles is None else check_numbers("power_up: tiles", tiles, 0, _MOST_TILES - 1)
        given = {
            supply: check_number(f"power_up: {supply}_dac", dac, 0, 0xFFFF)
            for supply, dac in zip(SUPPLIES, (vdda_dac, vddd_dac), strict=True)
            if dac is not None
        }
        own_limits = {} if limits is None else parse_limits(limits)
        file = self._link.setup.power_settings
        settings = read_settings(file) if file else {}
        if chosen is None and io_group is None and settings:
            groups = [group for group in groups if group in settings and settings[group].tiles] or groups
        plans = [
            self._plan(group, settings.get(group, BoardSettings()), chosen, given, own_limits) for group in groups
        ]  # check all boards before the first one is changed
        for plan in plans:
            self._invalidate([plan.io_group])
        with ThreadPoolExecutor(len(plans)) as threads:
            boards = list(threads.map(self._power_up, plans))
        rows = [row for board in boards for row in board["tiles"]]
        doubts = [f"io_group {board['io_group']}: {doubt}" for board in boards for doubt in board["doubts"]]
        uncertain = sorted({name for board in boards for name in board["uncertain"]})
        # A tile that was on before has a text, but is in order.
        ok = all(row["state"] == "on" for row in rows)
        return {"ok": ok, "tiles": rows, "uncertain": uncertain, "doubts": doubts}

    def _plan(
        self,
        io_group: int,
        settings: BoardSettings,
        tiles: list[int] | None,
        given: dict[str, int],
        limits: Limits,
    ) -> _Plan:
        """Return what to do with a board; RequestError if arguments and settings do not say it, or contradict it."""
        name, file, asic = self._orders.names[io_group], name_of(self._link.setup.power_settings), self._link.setup.asic
        revision = self._orders.revision(io_group)
        if revision is None:
            hint = f" (version of {file}: {settings.revision})" if settings.revision else ""
            raise RequestError(f"{name}: {NO_REVISION} {io_group}=N, N from 2 to 5{hint}")
        if settings.revision not in (0, revision.number):
            raise RequestError(f"{name}: its revision is {revision.number}, but {file} says {settings.revision}")
        if settings.asic not in ("", asic):
            raise RequestError(f"{name}: its producer has --asic {asic}, but {file} says {settings.asic}")
        power = self._orders.tile_power(io_group, supplies=True, progress=self._of_board(io_group))
        selected = settings.tiles if tiles is None else tiles
        if not selected:
            raise RequestError(f"{name}: power_up: no tiles, in the arguments or in settings")
        dacs = {tile: self._dacs_of(tile, name, revision, settings, given) for tile in power.valid_tiles(selected)}
        merged = {**settings.limits, **limits}
        if unknown := sorted(merged.keys() - revision.monitors().keys()):
            shunts = " (the unit of its currents is not established)" if "vdda_shunt_uv" in revision.monitors() else ""
            known = ", ".join(revision.monitors())
            raise RequestError(
                f"{name}: limits: boards of revision {revision.number} have {known}{shunts}, found {unknown[0]:.100}"
            )
        return _Plan(io_group, power, dacs, merged, settings.inverted and revision.inversion)

    def _dacs_of(
        self, tile: int, name: str, revision: PacmanRevision, settings: BoardSettings, given: dict[str, int]
    ) -> dict[str, int]:
        dacs = {supply: values[tile] for supply, values in settings.dacs.items() if tile < len(values)} | given
        for supply in SUPPLIES:
            if supply not in dacs:
                asic = self._link.setup.asic
                used = _USED.get((revision.number, asic))
                hint = (
                    f"; laboratories have used vdda_dac={used[0]}, vddd_dac={used[1]} for {asic} chips on revision "
                    f"{revision.number}"
                    if used
                    else ""
                )
                raise RequestError(f"{name}: tile {tile}: no {supply}_dac, in the arguments or in settings{hint}")
        return {supply: dacs[supply] for supply in SUPPLIES}

    def _of_board(self, io_group: int) -> Progress:
        return lambda text, done, total: self._progress(f"io_group {io_group}: {text}", done, total)

    def _power_up(self, plan: _Plan) -> dict[str, Any]:
        """Ramp the tiles of a board up, one after the other. Returns the board's report. Runs in a thread."""
        power, group = plan.power, plan.io_group
        rows: list[dict[str, Any]] = []
        on: list[int] = []
        stopped = ""
        try:
            on = power.on()
        except BoardError as error:
            stopped = str(error)
        for tile, dacs in plan.dacs.items():
            if tile in on:
                rows.append(self._measure(plan, tile))
            elif stopped:
                rows.append(_row(group, tile, "not known", {}, {}, f"it was not begun: {stopped}"))
            else:
                rows.append(self._ramp(plan, tile, dacs))
                if rows[-1]["state"] == "not known":
                    stopped = rows[-1]["fault"]
        return self._report(group, power.known_revision, self._final(plan, rows, reset=not on))

    def _measure(self, plan: _Plan, tile: int) -> dict[str, Any]:
        """Return the row of a tile that was on already."""
        sent = {supply: self._orders.dacs.get((plan.io_group, tile, supply)) for supply in SUPPLIES}
        dacs = {supply: dac for supply, dac in sent.items() if dac is not None}
        try:
            monitors = plan.power.monitors(tile)
        except BoardError as error:
            return _row(plan.io_group, tile, "on", dacs, {}, str(error))
        return _row(plan.io_group, tile, "on", dacs, monitors, "it was on already, and was left as it is")

    def _ramp(self, plan: _Plan, tile: int, dacs: dict[str, int]) -> dict[str, Any]:
        group = plan.io_group
        try:
            plan.power.analog_on()  # for each tile, because the board may have restarted
            monitors = plan.power.ramp_up(tile, dacs, plan.limits)
            if plan.inverted:
                self._invert(group, tile)
        except RampError as error:
            return _row(group, tile, "off" if error.off else "not known", dacs, {}, str(error))
        except BoardError as error:
            return _row(group, tile, "not known", dacs, {}, str(error))
        return _row(group, tile, "on", dacs, monitors, "")

    def _final(self, plan: _Plan, rows: list[dict[str, Any]], *, reset: bool) -> list[dict[str, Any]]:
        """Return the rows with the tiles' states as they are in the end. `reset`: reset the chips of the board."""
        try:
            if reset and any(row["state"] == "on" for row in rows):
                self._orders.reset(plan.io_group, _RESET)
            on = plan.power.on()
        except BoardError as error:
            return [row | {"state": "not known", "fault": row["fault"] or str(error)} for row in rows]
        lost = "it is off again: the board has restarted, or another program has switched it off"
        return [
            row | {"state": "off", "fault": lost if row["state"] == "on" else row["fault"]}
            if row["tile"] not in on
            else row | {"state": "on"}
            for row in rows
        ]

    def _invert(self, io_group: int, tile: int) -> None:
        revision = self._orders.known_revision(io_group)
        channels = range(TILE_CHANNELS * tile + 1, TILE_CHANNELS * (tile + 1) + 1)
        registers = [uart(channel, "inversion", revision) for channel in channels if channel in revision.io_channels]
        orders = [order for register in registers for order in (write(register, INVERTED), read(register))]
        if any(value != INVERTED for value in self._orders.values(io_group, orders)[1::2]):
            raise BoardError(f"{self._orders.names[io_group]}: tile {tile}: its lines do not read back as inverted")

    def _report(self, io_group: int, revision: PacmanRevision, rows: list[dict[str, Any]]) -> dict[str, Any]:
        report = power_report(io_group, revision, rows)
        self._link.send(hardware.PowerReport(io_group, report_text(report)))
        return report


def _row(
    io_group: int, tile: int, state: str, dacs: dict[str, int], monitors: dict[str, float], fault: str
) -> dict[str, Any]:
    settings = {f"{supply}_dac": dacs.get(supply) for supply in SUPPLIES}
    return {"io_group": io_group, "tile": tile, "state": state, **settings, **monitors, "fault": fault}


def power_report(io_group: int, revision: PacmanRevision, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report on a board's supplies: a row for each tile, and which numbers are uncertain."""
    used = {name for row in rows for name in row}
    return {
        "io_group": io_group,
        "revision": revision.number,
        "measured": utc(time.time()),
        "tiles": rows,
        "uncertain": sorted(used & revision.uncertain),
        "doubts": list(revision.doubts) if used & revision.uncertain else [],
    }


def report_text(report: dict[str, Any]) -> str:
    """Return the INFO message of a report: values of VDDA/VDDD for each tile, uncertain ones with a question mark."""
    tiles = []
    for row in report["tiles"]:
        pairs = []
        for quantity, unit in _QUANTITIES.items():
            names = [f"{supply}_{quantity}" for supply in SUPPLIES]
            values = [_number(row.get(name), name in report["uncertain"]) for name in names]
            if any(value != "-" for value in values):
                pairs.append(f"{'/'.join(values)} {unit}")
        fault = f" ({row['fault']:.300})" if row.get("fault") else ""
        tiles.append(f"tile {row['tile']} {row['state']} {', '.join(pairs)}".rstrip() + fault)
    title = f"Power of io_group {report['io_group']} (revision {report['revision']}), {report['measured']}, VDDA/VDDD: "
    return title + ("; ".join(tiles) or "no tile is on")


def _number(value: float | None, uncertain: bool) -> str:
    return "-" if value is None else f"{value:.0f}{'?' if uncertain else ''}"
