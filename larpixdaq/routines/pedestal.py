"""Pedestals of the channels: their ADC values without a signal, from forced triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import PERIODIC, Chips, collect
from larpixdaq.routines.kit.pulses import moments
from larpixdaq.routines.kit.report import Report

#: Frequency of the chips' clock in Hz.
_CLOCK_HZ: Final = 10_000_000
#: Variance that whole ADC counts add, and least noise in ADC counts that can be told from it: below, the steps of the
#: ADC decide what is seen.
_QUANTIZATION, _LEAST_NOISE = 1 / 12, 0.4


def _pedestal(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    samples: int = 100,
    trigger_hz: float = 20.0,
    leave_off: dict[str, list[int]] | None = None,
    low: float | None = 1.0,
    high: float | None = 200.0,
    most_std: float | None = 4.0,
    vdda_mv: float = 1800.0,
    uv_per_electron: float = 4.0,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Measures mean and standard deviation of each channel's ADC values, from periodic triggers of all channels.

    CHIPS: a chip key, a list of chip keys, or None for all chips. Each channel but LEAVE_OFF {chip: [channel, ...]} is
    triggered about SAMPLES times, at TRIGGER_HZ (Hz), with the highest threshold and other triggers off. The hit veto
    is off, because v2 chips drop samples below the threshold with it. The registers of the chips are restored. A
    channel is bad without samples, with a mean below LOW or above HIGH (ADC counts), or with a standard deviation above
    MOST_STD (ADC counts); None for no limit.

    Result: "chips" {chip: {"mean", "std" (ADC counts) with "mean_error", "std_error"; "samples": their number;
    "pedestal_mv"; "noise_mv", "noise_electrons": the standard deviation without that of the ADC's steps}}, each a list
    with a value for each channel, None where it is not known; "bad" {chip: {channel: [reason, ...]}}; "disable" {chip:
    [channel, ...]}: bad channels and those left off; "limits"; "left_out", packets that were not analysed; "saturated",
    io_channels that sent as much as their line carries, so that samples are missing. mV come from vref_dac and vcm_dac
    at the analog supply VDDA_MV, and electrons from UV_PER_ELECTRON (µV at the ADC for one electron), both of which
    are not measured. With DIRECTORY, on the producer's machine: "files", the result as JSON and a picture.
    """
    if samples < 2 or not 1 <= trigger_hz <= 10_000:
        raise ValueError(f"samples, trigger_hz: expected at least 2, and 1 to 10,000, found {samples}, {trigger_hz:g}")
    selected = Chips(controller, chips)
    off = selected.off(leave_off)
    with selected.restored(), selected.untriggered():
        selected.set(threshold=255, periodic_trigger_mask=off, periodic_trigger_cycles=round(_CLOCK_HZ / trigger_hz))
        if selected.has("hit_veto"):
            selected.set(hit_veto=0)
        selected.set(periodic_trigger=1)
        send_info(f"sampling {(~off).sum()} channels", 0, 1)
        measured = collect(controller, selected.keys, samples / trigger_hz)
    hits = measured.hits[(measured.hits["channel"] < off.shape[1]) & (measured.hits["trigger"] == PERIODIC)]
    n, mean, std = moments(hits, off.shape)
    report = Report("pedestal", selected.keys, off)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_error, std_error = std / np.sqrt(n), std / np.sqrt(2 * (n - 1))
        noise = np.sqrt(np.maximum(std**2 - _QUANTIZATION, 0))
        noise = np.where(noise > _LEAST_NOISE, noise, np.nan)
        noise_error = std_error * std / noise
    report.add("mean", mean, "ADC counts", errors=mean_error, low=low, high=high, needed="no samples")
    report.add("std", std, "ADC counts", errors=std_error, high=most_std)
    report.record("samples", n)
    scale = selected.adc_scale(vdda_mv)
    zero, step = (np.full((len(selected), 1), np.nan),) * 2 if scale is None else scale
    # A whole count stands for the middle of its step.
    report.record("pedestal_mv", zero + (mean + 0.5) * step)
    report.record("noise_mv", noise * step)
    report.record("noise_mv_error", noise_error * step)
    report.add("noise_electrons", noise * step * 1000 / uv_per_electron, "electrons")
    result = report.result() | {
        "left_out": measured.left_out,
        "saturated": measured.saturated,
        "assumed": {"vdda_mv": vdda_mv, "uv_per_electron": uv_per_electron},
    }
    report.write(directory, result, f"pedestals of {(~off).sum():,} channels")
    return controller, result


registration = {"pedestal": Routine("pedestal", _pedestal)}
