"""Trigger-rate quality control: the channels that fire too much, found also behind those that fill a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates
from larpixdaq.routines.kit.report import Report


def _trigger_rate(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    leave_off: dict[str, list[int]] | None = None,
    most_hz: float = 10.0,
    seconds: float = 5.0,
    threshold: int | None = None,
    rounds: int = 5,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Measures the rate of natural triggers of each channel (Hz), and finds channels above MOST_HZ.

    CHIPS: a chip key, a list of chip keys, or None for all chips. All channels but LEAVE_OFF {chip: [channel, ...]} are
    unmasked; without LEAVE_OFF the masks stay as they are. THRESHOLD (0 to 255): a global threshold for all chips, None
    for those of the chips. The hits of SECONDS (s) are counted with periodic, external and cross triggers off. Channels
    above MOST_HZ are masked, and the others are counted again, because they lose hits on a full line: at most ROUNDS
    times. The registers of the chips are restored.

    Result: "chips" {chip: {"rate", "rate_error" (Hz)}}, each a list with a value for each channel: that of the last
    measurement of the channel, None on an io_channel that was still saturated then; the error of a channel without hits
    is that of one hit. "bad" {chip: {channel: [reason]}}; "disable" {chip: [channel, ...]}: bad channels, and those
    left off or masked; "limits"; "total_hz" of the channels that are not to disable; "rounds"; "saturated", io_channels
    that sent as much as their line carries in the last measurement. With DIRECTORY, on the producer's machine: "files",
    the result as JSON and a picture.
    """
    if not most_hz > 0 or not seconds > 0 or rounds < 1 or not (threshold is None or 0 <= threshold <= 255):
        raise ValueError(
            f"most_hz, seconds, rounds, threshold: expected above 0, above 0, at least 1 and 0 to 255, "
            f"found {most_hz:g}, {seconds:g}, {rounds} and {threshold}"
        )
    selected = Chips(controller, chips)
    lines = np.array(selected.lines())
    with selected.restored(), selected.untriggered():
        if threshold is not None:
            selected.set(threshold=threshold)
        off = selected.open(leave_off)
        rate, error = np.full((2, *off.shape), np.nan)
        hot = np.zeros_like(off)
        for number in range(rounds):
            send_info(f"round {number + 1}: {int((~off & ~hot).sum())} channels", number, rounds)
            measured = rates(controller, selected.keys, off.shape[1], seconds)
            full = np.isin(lines, measured.saturated)[:, None]
            loud = ~off & ~hot & (measured.hz > most_hz)
            # On a full line only the rates of loud channels are known, as a minimum.
            counted = ~off & ~hot & (~full | loud)
            rate = np.where(counted, measured.hz, np.where(hot, rate, np.nan))
            error = np.where(counted, np.sqrt(np.maximum(measured.hits, 1)) / measured.seconds, error)
            hot |= loud
            if not loud.any():
                break
            selected.set(mask=off | hot)
    report = Report("trigger_rate", selected.keys, off)
    report.add("rate", rate, "Hz", errors=error, high=most_hz)
    quiet = ~off & ~hot & ~np.isnan(rate)
    result = report.result() | {
        "total_hz": round(float(rate[quiet].sum()), 3),
        "rounds": number + 1,
        "saturated": measured.saturated,
    }
    report.write(directory, result, f"{int(hot.sum()):,} of {int((~off).sum()):,} channels above {most_hz:g} Hz")
    return controller, result


registration = {"trigger_rate": Routine("trigger_rate", _trigger_rate)}
