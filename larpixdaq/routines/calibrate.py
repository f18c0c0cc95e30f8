"""Calibration: thresholds and trims for a wanted rate of each channel, from the rates in the recorded stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import report
from larpixdaq.routines.kit.chips import left_off
from larpixdaq.routines.kit.measurement import LineLoads
from larpixdaq.routines.kit.threshold_search import FINE, TOLERANCE, Thresholds


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
    """Finds global thresholds, trims and channels to disable, for a rate of each channel between LOW and HIGH (Hz).

    CHIPS: a chip key such as "1-2-34", a list of chip keys, or None for all chips. All their channels are unmasked,
    except LEAVE_OFF {chip: [channel, ...]}. Periodic reset is on, so that leakage does not count; periodic, external
    and cross triggers are off. With APPLY the chips keep the thresholds and trims found, and the channels to disable
    are masked; without it the registers of the chips are restored.

    The global threshold comes down from START (1 to 255), then the trims of all channels come down. At most ROUNDS
    measurements of 20/HIGH seconds follow, after each of which trims go up or down by one. A chip's global threshold
    goes up again if for each channel that then need not be disabled at most RAISE_FOR other channels come to the lowest
    trim; 0 keeps all thresholds as low as possible.

    Result: "thresholds" {chip: value}; "trims" {chip: [value, ...]}; "disable" {chip: [channel, ...]}, too noisy at the
    highest trim, or left off; "dead" {chip: [channel, ...]} and "silent_chips", without any hit; "rates_before_hz" and
    "rates_after_hz" {chip: [Hz, ...]}; "live", the number of channels that are neither left off, disabled nor dead, and
    "within", the number of them with rates from 0.8 LOW to 1.2 HIGH; "files", the report as JSON and as a picture, in
    DIRECTORY of the producer's machine, or "no_picture", the reason why there is no picture (it needs the extra
    `plot`); "saturated" {io_channel: number of measurements} in which the io_channel sent as much as its line carries,
    so that only its too noisy channels were used; "saturated_after", io_channels that still do so at the end: their
    rates are too low, and none of their channels counts as within the limits.
    """
    if not 0 < low < high:
        raise ValueError(f"low, high: expected 0 < low < high, found {low:g} and {high:g} Hz")
    if not 1 <= start <= 255 or rounds < 1 or not raise_for >= 0:
        raise ValueError(
            f"start, rounds, raise_for: expected 1 to 255, at least 1 and at least 0, "
            f"found {start}, {rounds} and {raise_for:g}"
        )
    begin = time.monotonic()
    search = Thresholds(controller, send_info, chips, low, high)
    selected = search.chips
    search.off |= left_off(leave_off, selected.keys, selected.channels, selected.keys)
    _must_fit(search, low)
    applied = False
    with selected.untriggered():
        try:
            if selected.has("periodic_reset"):
                selected.set(periodic_reset=1)
            selected.set(mask=search.off)
            hits, seconds, _ = search.measure(FINE / high)
            before = hits / seconds
            search.find_globals(start)
            search.find_trims(raise_for)
            choice = search.refine_trims(rounds)
            dead = search.find_dead((choice.trim == 0) & (choice.rates == 0) & ~search.off & ~search.hot)
            after, full = search.check(choice)
            applied = apply
        finally:
            if not applied:
                selected.restore()
    live = ~(search.off | search.hot | dead)
    within = live & ~full & (choice.rates >= (2 - TOLERANCE) * low) & (choice.rates <= TOLERANCE * high)
    silent_or_off = dead | search.off
    dead_by_chip = report.by_chip(selected.keys, dead)
    silent_chips = [key for index, key in enumerate(selected.keys) if silent_or_off[index].all() and dead[index].any()]
    saturated_after = sorted(
        {key.rpartition("-")[0] for key, saturated in zip(selected.keys, full, strict=True) if saturated}
    )
    result: dict[str, Any] = {
        "low_hz": low,
        "high_hz": high,
        "applied": applied,
        "seconds": round(time.monotonic() - begin, 1),
        "live": int(live.sum()),
        "within": int(within.sum()),
        "thresholds": dict(zip(selected.keys, search.threshold.tolist(), strict=True)),
        "trims": dict(zip(selected.keys, choice.trim.tolist(), strict=True)),
        "disable": report.by_chip(selected.keys, search.hot | search.off),
        "dead": {key: channels for key, channels in dead_by_chip.items() if key not in silent_chips},
        "silent_chips": silent_chips,
        "saturated": search.saturated,
        "saturated_after": saturated_after,
        "rates_before_hz": dict(zip(selected.keys, before.round(3).tolist(), strict=True)),
        "rates_after_hz": dict(zip(selected.keys, after.round(3).tolist(), strict=True)),
    }
    title = f"{result['within']:,} of {result['live']:,} live channels between {low:g} and {high:g} Hz"
    if saturated_after:
        title += f"; io_channels {', '.join(saturated_after)} are saturated, with higher rates than shown"

    def draw(figure: Any) -> None:
        report.draw_rates(figure, before, after, low, high, title)

    result.update(report.write(directory, "calibration", result, draw))
    if "no_picture" in result:
        send_info(result["no_picture"])
    return controller, result


def _must_fit(search: Thresholds, low: float) -> None:
    """Check that each io_channel can carry the rate `low` (Hz) of all its channels; ValueError if not."""
    keys = search.chips.keys
    if not hasattr(search.controller.io, "capacity"):  # an IO without a producer
        return
    lines = LineLoads(search.controller.io, keys)
    for name, capacity in zip(lines.names, lines.capacity.tolist(), strict=True):
        n = int((~search.off)[[key.rpartition("-")[0] == name for key in keys]].sum())
        if low * n > capacity:
            raise ValueError(
                f"low: {n:,} channels of io_channel {name} at {low:g} Hz are {low * n:,.0f} packets/s; "
                f"it carries {capacity:,.0f}"
            )


registration = {"calibrate": Routine("calibrate", _calibrate)}
