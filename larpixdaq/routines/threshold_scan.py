"""How often the channels fire against the global threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates


def _threshold_scan(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    start: int = 255,
    stop: int = 0,
    step: int = 4,
    seconds: float = 0.5,
    most_hz: float = 1000.0,
) -> tuple[Any, dict[str, Any]]:
    """How often each channel triggers itself at global thresholds from START down to STOP, in steps of STEP, SECONDS
    each.

    CHIPS are chip keys, None all; other triggers are off meanwhile. A chip stays where it is, and its later rates are
    None, once its channels send more than MOST_HZ each on average: below that it could say nothing new, and would drown
    the others. The chips are in the end as they were before. The result: "thresholds", and for each chip "rates", Hz by
    threshold and channel; "saturated" {threshold: io_channels} that carried all they could, so that rates there are
    higher than was counted.
    """
    if not 0 <= stop <= start <= 255 or step < 1 or not seconds > 0:
        raise ValueError(
            f"start, stop, step, seconds: expected 255 >= start >= stop >= 0, a step and seconds above 0, "
            f"found {start}, {stop}, {step} and {seconds:g}"
        )
    mine = Chips(controller, chips).unmasked()
    thresholds = list(range(start, stop - 1, -step))
    at = np.full(len(mine), start, np.int64)
    going = np.ones(len(mine), np.bool_)
    found: list[Any] = []
    saturated: dict[str, list[str]] = {}
    with mine.restored(), mine.untriggered():
        for number, threshold in enumerate(thresholds):
            if not going.any():
                break
            at[going] = threshold
            mine.set(threshold=at)
            counted = rates(controller, mine.keys, mine.channels, seconds)
            hz = counted.hz
            if counted.saturated:
                saturated[str(threshold)] = counted.saturated
            found.append([row if on else None for row, on in zip(hz.round(3).tolist(), going.tolist(), strict=True)])
            going &= hz.mean(1) <= most_hz
            send_info(f"threshold {threshold}: {hz.sum():,.0f} Hz in all", number + 1, len(thresholds))
    result = {key: {"rates": [step_[place] for step_ in found]} for place, key in enumerate(mine.keys)}
    return controller, {"thresholds": thresholds[: len(found)], "chips": result, "saturated": saturated}


registration = {
    "threshold_scan": Routine(
        "threshold_scan", _threshold_scan, ["chips", "start", "stop", "step", "seconds", "most_hz"]
    )
}
