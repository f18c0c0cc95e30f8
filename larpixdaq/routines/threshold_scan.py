"""Rates of the channels against the global threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates
from larpixdaq.routines.kit.report import Report


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
    leave_off: dict[str, list[int]] | None = None,
    edge_hz: float = 1.0,
    high: float | None = None,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Measures the rate of each channel (Hz) at global thresholds from START down to STOP in steps of STEP.

    CHIPS: a chip key, a list of chip keys, or None for all chips. Each threshold is measured for SECONDS (s), with
    periodic, external and cross triggers off. A chip whose channels have more than MOST_HZ (Hz) on average is not
    lowered further, because it would saturate its io_channel; its later rates are None. All channels but LEAVE_OFF
    {chip: [channel, ...]} are unmasked; without LEAVE_OFF the masks stay as they are. The registers of the chips are
    restored.

    Result: "thresholds"; "chips" {chip: {"rates": Hz by threshold and channel; "edge": for each channel the highest of
    these thresholds with a rate above EDGE_HZ (Hz), None if there was none}}; "bad", "disable", "limits" as of
    pedestal, with an edge above HIGH as bad; "saturated" {threshold: io_channels that sent as much as their line
    carries, so that rates there are too low}. `s_curve` measures the noise itself. With DIRECTORY, on the producer's
    machine: "files", the result as JSON and a picture.
    """
    if not 0 <= stop <= start <= 255 or step < 1 or not seconds > 0:
        raise ValueError(
            f"start, stop, step, seconds: expected 255 >= start >= stop >= 0, a step and seconds above 0, "
            f"found {start}, {stop}, {step} and {seconds:g}"
        )
    selected = Chips(controller, chips)
    thresholds = list(range(start, stop - 1, -step))
    current = np.full(len(selected), start, np.int64)
    active = np.ones(len(selected), np.bool_)
    measured: list[Any] = []
    saturated: dict[str, list[str]] = {}
    edge = np.full((len(selected), selected.channels), np.nan)
    with selected.restored(), selected.untriggered():
        off = selected.open(leave_off)
        for number, threshold in enumerate(thresholds):
            if not active.any():
                break
            current[active] = threshold
            selected.set(threshold=current)
            measurement = rates(controller, selected.keys, selected.channels, seconds)
            hz = measurement.hz
            if measurement.saturated:
                saturated[str(threshold)] = measurement.saturated
            measured.append(
                [row if on else None for row, on in zip(hz.round(3).tolist(), active.tolist(), strict=True)]
            )
            edge[np.isnan(edge) & active[:, None] & (hz > edge_hz)] = threshold
            active &= hz.mean(1) <= most_hz
            send_info(f"threshold {threshold}: {hz.sum():,.0f} Hz in all", number + 1, len(thresholds))
    report = Report("threshold_scan", selected.keys, off)
    report.add("edge", edge, "DAC counts", high=high)
    result = report.result() | {"thresholds": thresholds[: len(measured)], "saturated": saturated}
    for index, key in enumerate(selected.keys):
        result["chips"][key]["rates"] = [row[index] for row in measured]
    report.write(directory, result, f"thresholds with more than {edge_hz:g} Hz")
    return controller, result


registration = {"threshold_scan": Routine("threshold_scan", _threshold_scan)}
