"""Channels with too high a rate: find them, and mask them if asked to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates


def _hot_channels(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    above_hz: float = 10.0,
    seconds: float = 5.0,
    chips: str | list[str] | None = None,
    disable: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Finds channels whose rate of natural triggers is above ABOVE_HZ (Hz). With DISABLE it masks them.

    CHIPS: a chip key, a list of chip keys, or None for all chips. The hits of SECONDS (s) are counted, with periodic,
    external and cross triggers off.

    Result: "hot" {chip: {channel: rate in Hz}}; "disabled", whether channels were masked; "total_hz", the rate of all
    channels together; "saturated", io_channels that sent as much as their line carries, so that rates there are too
    low.
    """
    if not above_hz > 0 or not seconds > 0:
        raise ValueError(f"above_hz, seconds: expected more than 0, found {above_hz:g} and {seconds:g}")
    selected = Chips(controller, chips).unmasked()
    send_info(f"counting {len(selected)} chips for {seconds:g} s", 0, 1)
    with selected.untriggered():
        measured = rates(controller, selected.keys, selected.channels, seconds)
    hz = measured.hz
    hot = hz > above_hz
    if disable and hot.any():
        selected.set(mask=selected.get("mask").astype(np.bool_) | hot)
    channels = {
        key: {str(channel): round(float(hz[index, channel]), 3) for channel in np.flatnonzero(hot[index]).tolist()}
        for index, key in enumerate(selected.keys)
        if hot[index].any()
    }
    result = {"hot": channels, "disabled": disable and bool(channels), "total_hz": round(float(hz.sum()), 3)}
    return controller, {**result, "saturated": measured.saturated}


registration = {"hot_channels": Routine("hot_channels", _hot_channels)}
