"""Leakage of the channels: their rates with and without periodic reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates
from larpixdaq.routines.kit.chips import COUNTS, per_channel
from larpixdaq.routines.kit.report import Report


def _leakage(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    seconds: float = 10.0,
    leave_off: dict[str, list[int]] | None = None,
    raise_by: int = 0,
    most_hz: float | None = None,
    baseline: dict[str, list[float | None]] | None = None,
    most_mv_s: float | None = None,
    vdda_mv: float = 1800.0,
    trim_mv: float = 1.45,
    uv_per_electron: float = 4.0,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Measures the rate of each channel (Hz) with periodic reset and without it, for SECONDS (s) each.

    Without reset, leakage charges a channel up to its threshold, and it triggers. The difference of the two rates,
    times the distance from pedestal to threshold, is the leakage of the channel. CHIPS: a chip key, a list of chip
    keys, or None for all chips. All channels but LEAVE_OFF {chip: [channel, ...]} are unmasked; without LEAVE_OFF the
    masks stay as they are. The global thresholds go up by RAISE_BY meanwhile, because noise near the threshold hides
    leakage. The registers of the chips are restored. A channel is bad above MOST_HZ (of "leakage"), or above MOST_MV_S
    (of "leakage_mv_s").

    BASELINE {chip: [mV, ...]}: at which threshold the discriminator meets the pedestal, as `s_curve` measures it. Only
    with it is the distance known. Thresholds are VDDA_MV/256 a step, and trims TRIM_MV.

    Result: "chips" {chip: {"with_reset", "without_reset", "leakage" (their difference), "leakage_error": Hz;
    "leakage_mv_s", "leakage_mv_s_error": mV/s; "leakage_electrons_s": with UV_PER_ELECTRON}}, each a list with a value
    for each channel, None where it is not known; "bad", "disable", "limits" as of pedestal; "saturated", io_channels
    that sent as much as their line carries, so that rates there are too low. With DIRECTORY, on the producer's machine:
    "files", the result as JSON and a picture.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected more than 0, found {seconds:g}")
    selected = Chips(controller, chips)
    measured = []
    with selected.restored(), selected.untriggered():
        off = selected.open(leave_off)
        selected.raise_thresholds(raise_by)
        threshold = selected.get("threshold")[:, None] * vdda_mv / COUNTS + selected.get("trim") * trim_mv
        for number, reset in enumerate((1, 0)):
            send_info(f"periodic reset {'on' if reset else 'off'}", number, 2)
            selected.set(periodic_reset=reset)
            measured.append(rates(controller, selected.keys, selected.channels, seconds))
    on, without = (measurement.hz for measurement in measured)
    saturated = sorted({line for measurement in measured for line in measurement.saturated})
    full = np.isin(selected.lines(), saturated)[:, None]
    hz = without - on
    error = np.sqrt(sum(np.maximum(m.hits, 1) / m.seconds**2 for m in measured))
    distance = threshold - per_channel("baseline", baseline, selected.keys, selected.channels)
    # A threshold at or below the pedestal fires by itself, and says nothing about leakage.
    known = ~full & (distance > 0)
    mv_s, mv_s_error = (np.where(known, part * np.where(known, distance, 0), np.nan) for part in (hz, error))
    report = Report("leakage", selected.keys, off)
    report.record("with_reset", on)
    report.record("without_reset", without)
    report.add("leakage", hz, "Hz", errors=error, high=most_hz)
    report.add("leakage_mv_s", mv_s, "mV/s", errors=mv_s_error, high=most_mv_s)
    report.record("leakage_electrons_s", np.where(off, np.nan, mv_s * 1000 / uv_per_electron))
    result = report.result() | {
        "seconds": seconds,
        "saturated": saturated,
        "assumed": {"vdda_mv": vdda_mv, "trim_mv": trim_mv, "uv_per_electron": uv_per_electron},
    }
    report.write(directory, result, f"leakage of {int((~off).sum()):,} channels")
    return controller, result


registration = {"leakage": Routine("leakage", _leakage)}
