"""Pedestals of the channels: their ADC values without a signal, from forced triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import PERIODIC, Chips, collect

#: Frequency of the chips' clock in Hz.
_CLOCK_HZ = 10_000_000


def _pedestal(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    samples: int = 100,
    trigger_hz: float = 20.0,
) -> tuple[Any, dict[str, Any]]:
    """Measures mean and standard deviation of each channel's ADC values, from periodic triggers of all channels.

    CHIPS: a chip key, a list of chip keys, or None for all chips. Each channel is triggered about SAMPLES times, at
    TRIGGER_HZ (Hz), with the highest threshold and other triggers off. The registers of the chips are restored.

    Result: "chips" {chip: {"mean", "std": ADC counts, None without samples; "samples": their number}}, each a list with
    a value for each channel; "left_out", packets that were not analysed; "saturated", io_channels that sent as much as
    their line carries, so that samples are missing.
    """
    if samples < 2 or not 1 <= trigger_hz <= 10_000:
        raise ValueError(f"samples, trigger_hz: expected at least 2, and 1 to 10,000, found {samples}, {trigger_hz:g}")
    selected = Chips(controller, chips)
    shape = len(selected), selected.channels
    with selected.restored(), selected.untriggered():
        selected.set(threshold=255, periodic_trigger_mask=0, periodic_trigger_cycles=round(_CLOCK_HZ / trigger_hz))
        selected.set(periodic_trigger=1)
        send_info(f"sampling {shape[0] * shape[1]} channels", 0, 1)
        measured = collect(controller, selected.keys, samples / trigger_hz)
    hits = measured.hits[(measured.hits["channel"] < shape[1]) & (measured.hits["trigger"] == PERIODIC)]
    channel_index = hits["chip"] * shape[1] + hits["channel"]
    size = shape[0] * shape[1]
    n = np.bincount(channel_index, minlength=size)
    adc = hits["adc"].astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(channel_index, adc, size) / n
        std = np.sqrt(np.bincount(channel_index, (adc - mean[channel_index]) ** 2, size) / n)
    table = np.stack([mean, std]).round(3).reshape(2, *shape)
    values = table.astype(object)
    values[np.isnan(table)] = None
    result = {
        key: {
            "mean": values[0][index].tolist(),
            "std": values[1][index].tolist(),
            "samples": n.reshape(shape)[index].tolist(),
        }
        for index, key in enumerate(selected.keys)
    }
    return controller, {"chips": result, "left_out": measured.left_out, "saturated": measured.saturated}


registration = {"pedestal": Routine("pedestal", _pedestal)}
