"""Which channels send too much."""

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
    """The channels that trigger themselves more than ABOVE_HZ times a second; with DISABLE they are masked.

    CHIPS are chip keys, None all; they are counted for SECONDS, with other triggers off. The result: "hot" {chip:
    {channel: Hz}}, "disabled", "total_hz" of all channels, "saturated": io_channels that carried all they could, so
    that rates there are higher than was counted.
    """
    if not above_hz > 0 or not seconds > 0:
        raise ValueError(f"above_hz, seconds: expected more than 0, found {above_hz:g} and {seconds:g}")
    mine = Chips(controller, chips).unmasked()
    send_info(f"counting {len(mine)} chips for {seconds:g} s", 0, 1)
    with mine.untriggered():
        found = rates(controller, mine.keys, mine.channels, seconds)
    hz = found.hz
    hot = hz > above_hz
    if disable and hot.any():
        mine.set(mask=mine.get("mask").astype(np.bool_) | hot)
    listed = {
        key: {str(channel): round(float(hz[place, channel]), 3) for channel in np.flatnonzero(hot[place]).tolist()}
        for place, key in enumerate(mine.keys)
        if hot[place].any()
    }
    result = {"hot": listed, "disabled": disable and bool(listed), "total_hz": round(float(hz.sum()), 3)}
    return controller, {**result, "saturated": found.saturated}


registration = {"hot_channels": Routine("hot_channels", _hot_channels, ["above_hz", "seconds", "chips", "disable"])}
