"""Leakage of the channels: their rates with and without periodic reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates


def _leakage(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    seconds: float = 10.0,
) -> tuple[Any, dict[str, Any]]:
    """Measures the rate of each channel (Hz) with periodic reset and without it, for SECONDS (s) each.

    Without reset, leakage charges a channel up to its threshold, and it triggers. The difference of the two rates,
    times the distance from pedestal to threshold, is the leakage of the channel. CHIPS: a chip key, a list of chip
    keys, or None for all chips. The registers of the chips are restored.

    Result: "chips" {chip: {"with_reset", "without_reset", "leakage" (their difference)}}, each a list with a rate in Hz
    for each channel; "saturated", io_channels that sent as much as their line carries, so that rates there are too low.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected more than 0, found {seconds:g}")
    selected = Chips(controller, chips).unmasked()
    measured = []
    with selected.restored(), selected.untriggered():
        for number, reset in enumerate((1, 0)):
            send_info(f"periodic reset {'on' if reset else 'off'}", number, 2)
            selected.set(periodic_reset=reset)
            measured.append(rates(controller, selected.keys, selected.channels, seconds))
    on, off = (measurement.hz for measurement in measured)
    channels = {
        key: {
            "with_reset": on[index].round(3).tolist(),
            "without_reset": off[index].round(3).tolist(),
            "leakage": (off[index] - on[index]).round(3).tolist(),
        }
        for index, key in enumerate(selected.keys)
    }
    return controller, {
        "chips": channels,
        "saturated": sorted({line for measurement in measured for line in measurement.saturated}),
    }


registration = {"leakage": Routine("leakage", _leakage)}
