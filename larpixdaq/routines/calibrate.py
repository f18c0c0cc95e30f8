"""Thresholds for a wanted rate of each channel, found with the rates of the stream while it is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import ConfigError
from larpixdaq.routines import Routine
from larpixdaq.routines.kit import report
from larpixdaq.routines.kit.measurement import LineLoads
from larpixdaq.routines.kit.threshold_search import FINE, NEAR, Thresholds
from larpixdaq.runtime.units import utc_name


def _calibrate(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    low: float = 0.1,
    high: float = 1.0,
    chips: str | list[str] | None = None,
    apply: bool = False,
    leave_off: dict[str, list[int]] | None = None,
    rounds: int = 6,
    start: int = 255,
    directory: str = ".",
    raise_for: float = 1.0,
) -> tuple[Any, dict[str, Any]]:
    """Finds global thresholds, trims and channels to disable, so that each channel sends between LOW and HIGH packets a
    second (Hz).

    CHIPS are chip keys such as "1-2-34", None all that the board file names; all of their channels are unmasked for
    this, but those of LEAVE_OFF {chip: [channel, ...]}. Without APPLY the chips are in the end as they were before;
    with it they keep what was found, and the channels to disable are masked. The global threshold comes down from
    START, and the trims of all channels after it; every step is measured in the packets that come, until the rates lie
    between the limits, in at most ROUNDS last measurements of 20/HIGH seconds each. Periodic reset is on meanwhile, so
    that leakage does not count, and periodic, external and cross triggers are off. For each channel that needs not be
    disabled then, at most RAISE_FOR others of its chip may become quieter than LOW with a higher global threshold; 0
    keeps all thresholds as low as can be.

    The result: "thresholds" {chip: value}, "trims" {chip: [value, ...]}, "disable" {chip: [channel, ...]} (too noisy at
    the highest trim), "dead" and "silent_chips" (say nothing at all), rates before and after (Hz), how many channels
    are within the limits, and "files": a report in DIRECTORY of the producer's machine, as JSON and as a picture, or
    "no_picture": why there is none (it needs the extra `plot` there).
    "saturated" {io_channel: measurements} are those that carried all they could at times, which was not believed;
    "saturated_after" those that still do: their rates are higher than was counted, and none of them counts as within.
    """
    if not 0 < low < high:
        raise ValueError(f"low, high: expected 0 < low < high, found {low:g} and {high:g} Hz")
    if not 1 <= start <= 255 or rounds < 1 or not raise_for >= 0:
        raise ValueError(
            f"start, rounds, raise_for: expected 1 to 255, at least 1 and at least 0, "
            f"found {start}, {rounds} and {raise_for:g}"
        )
    began = time.monotonic()
    work = Thresholds(controller, send_info, chips, low, high)
    mine = work.chips
    for key, channels in (leave_off or {}).items():
        if key not in mine.keys or not all(0 <= channel < mine.channels for channel in channels):
            raise ValueError(f"leave_off: {key}: expected a chip and its channels, found {channels}")
        work.off[mine.keys.index(key), channels] = True
    _must_fit(work, low)
    kept = False
    with mine.untriggered():
        try:
            if mine.has("periodic_reset"):
                mine.set(periodic_reset=1)
            mine.set(mask=work.off)
            hits, seconds, _ = work.measure(FINE / high)
            before = hits / seconds
            work.find_globals(start)
            work.find_trims(raise_for)
            choice = work.fine(rounds)
            dead = work.dead((choice.trim == 0) & (choice.rates == 0) & ~work.off & ~work.hot)
            after, full = work.check(choice)
            kept = apply
        finally:
            if not kept:
                mine.restore()
    live = ~(work.off | work.hot | dead)
    within = live & ~full & (choice.rates >= (2 - NEAR) * low) & (choice.rates <= NEAR * high)
    gone = dead | work.off
    silent = [key for place, key in enumerate(mine.keys) if gone[place].all() and dead[place].any()]
    flooded = sorted({key.rpartition("-")[0] for key, one in zip(mine.keys, full, strict=True) if one})
    result: dict[str, Any] = {
        "low_hz": low,
        "high_hz": high,
        "applied": kept,
        "seconds": round(time.monotonic() - began, 1),
        "live": int(live.sum()),
        "within": int(within.sum()),
        "thresholds": dict(zip(mine.keys, work.threshold.tolist(), strict=True)),
        "trims": dict(zip(mine.keys, choice.trim.tolist(), strict=True)),
        "disable": _by_chip(mine.keys, work.hot),
        "dead": {key: channels for key, channels in _by_chip(mine.keys, dead).items() if key not in silent},
        "silent_chips": silent,
        "saturated": work.saturated,
        "saturated_after": flooded,
        "rates_before_hz": dict(zip(mine.keys, before.round(3).tolist(), strict=True)),
        "rates_after_hz": dict(zip(mine.keys, after.round(3).tolist(), strict=True)),
    }
    name = f"calibration_{utc_name(time.time())}"
    title = f"{result['within']:,} of {result['live']:,} live channels between {low:g} and {high:g} Hz"
    if flooded:
        title += f"; more than is shown on io_channels {', '.join(flooded)}, which are saturated"
    pictures = []
    try:
        pictures.append(report.draw(directory, name, before, after, low, high, title))
    except ConfigError as error:
        result["no_picture"] = str(error)
        send_info(str(error))
    result["files"] = [*pictures, report.write(directory, name, result)]
    return controller, result


def _must_fit(work: Thresholds, low: float) -> None:
    """ValueError names an io_channel that could not carry it if all its channels had the lowest rate wanted."""
    keys = work.chips.keys
    if not hasattr(work.controller.io, "carries"):  # an IO that is not the DAQ's
        return
    lines = LineLoads(work.controller.io, keys)
    for name, carries in zip(lines.names, lines.carries.tolist(), strict=True):
        n = int((~work.off)[[key.rpartition("-")[0] == name for key in keys]].sum())
        if low * n > carries:
            raise ValueError(
                f"low: {n:,} channels of io_channel {name} at {low:g} Hz are {low * n:,.0f} packets/s; "
                f"it carries {carries:,.0f}"
            )


def _by_chip(keys: list[str], marked: NDArray[np.bool_]) -> dict[str, list[int]]:
    return {key: np.flatnonzero(row).tolist() for key, row in zip(keys, marked, strict=True) if row.any()}


registration = {
    "calibrate": Routine(
        "calibrate",
        _calibrate,
        ["low", "high", "chips", "apply", "leave_off", "rounds", "start", "directory", "raise_for"],
    )
}
