"""Where the channels sit without a signal: the ADC values of forced triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import PERIODIC, Chips, collect

#: Of the chips' clock a second.
_CLOCK_HZ = 10_000_000


def _pedestal(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    samples: int = 100,
    trigger_hz: float = 20.0,
) -> tuple[Any, dict[str, Any]]:
    """Mean and standard deviation of each channel's ADC values, from periodic triggers of all channels.

    CHIPS are chip keys, None all. Each channel is sampled some SAMPLES times, TRIGGER_HZ times a second, with its
    threshold out of reach and other triggers off; the chips are in the end as they were before. The result: "chips",
    for each "mean" and "std" (ADC counts, None where nothing came) and "samples", a list over its channels; "left_out":
    packets that were not looked at; "saturated": io_channels that carried all they could, so that samples are missing.
    """
    if samples < 2 or not 1 <= trigger_hz <= 10_000:
        raise ValueError(f"samples, trigger_hz: expected at least 2, and 1 to 10,000, found {samples}, {trigger_hz:g}")
    mine = Chips(controller, chips)
    shape = len(mine), mine.channels
    with mine.restored(), mine.untriggered():
        mine.set(threshold=255, periodic_trigger_mask=0, periodic_trigger_cycles=round(_CLOCK_HZ / trigger_hz))
        mine.set(periodic_trigger=1)
        send_info(f"sampling {shape[0] * shape[1]} channels", 0, 1)
        found = collect(controller, mine.keys, samples / trigger_hz)
    hits = found.hits[(found.hits["channel"] < shape[1]) & (found.hits["trigger"] == PERIODIC)]
    at = hits["chip"] * shape[1] + hits["channel"]
    size = shape[0] * shape[1]
    n = np.bincount(at, minlength=size)
    adc = hits["adc"].astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(at, adc, size) / n
        std = np.sqrt(np.bincount(at, (adc - mean[at]) ** 2, size) / n)
    table = np.stack([mean, std]).round(3).reshape(2, *shape)
    listed = table.astype(object)
    listed[np.isnan(table)] = None
    result = {
        key: {
            "mean": listed[0][place].tolist(),
            "std": listed[1][place].tolist(),
            "samples": n.reshape(shape)[place].tolist(),
        }
        for place, key in enumerate(mine.keys)
    }
    return controller, {"chips": result, "left_out": found.left_out, "saturated": found.saturated}


registration = {"pedestal": Routine("pedestal", _pedestal, ["chips", "samples", "trigger_hz"])}
