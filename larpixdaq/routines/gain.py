"""Gain and linearity of the channels, from test pulses of several amplitudes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips
from larpixdaq.routines.kit.fits import fit_lines
from larpixdaq.routines.kit.pulses import HIGH, Pulser
from larpixdaq.routines.kit.report import Report

_AMPLITUDES: Final = (20, 40, 60, 80, 100, 120, 140, 160)
#: Least fraction of pulses that a channel must see at an amplitude: of others the threshold has chosen the larger ones.
_LEAST_SEEN: Final = 0.95
#: ADC counts from the ends of the ADC within which a mean is not used, and variance that whole counts add.
_MARGIN, _QUANTIZATION = 5, 1 / 12


def _gain(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    leave_off: dict[str, list[int]] | None = None,
    amplitudes: list[int] | None = None,
    pulses: int = 20,
    most_spread: float | None = 0.3,
    most_deviation: float | None = 2.0,
    raise_by: int = 0,
    vdda_mv: float = 1800.0,
    electrons_per_step: float | None = None,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Measures the ADC value of each channel against the amplitude of test pulses, and fits a straight line.

    CHIPS: a chip key, a list of chip keys, or None for all chips. All channels but LEAVE_OFF {chip: [channel, ...]} get
    PULSES pulses of each of AMPLITUDES (1 to 255 counts by which the pulser's DAC falls; None: 20 to 160), at the
    thresholds of the chips plus RAISE_BY, which keeps away hits of noise. Other triggers are off. The registers of the
    chips are restored. An amplitude counts for a channel that has seen at least 95 % of its pulses, below the end of
    the ADC; a line needs three. A channel is bad without a line, if its gain differs from the median of all channels by
    more than the fraction MOST_SPREAD, or if a value is more than MOST_DEVIATION (ADC counts) off the line.

    Result: "chips" {chip: {"gain", "gain_error" (ADC counts for one count of the pulser's DAC); "offset",
    "offset_error" (ADC counts at amplitude 0); "deviation" (ADC counts, largest distance from the line); "chi2" (per
    degree of freedom); "pulse_mv" (mV at the ADC for one count of the pulser's DAC, from vref_dac and vcm_dac at the
    analog supply VDDA_MV)}}, each a list with a value for each channel, None where the data do not tell;
    "uv_per_electron": median gain in µV for one electron, None without ELECTRONS_PER_STEP, the charge of one count of
    the pulser's DAC, which no measurement of the chips alone tells; "bad", "disable", "limits" as of pedestal;
    "saturated", io_channels that sent as much as their line carries. With DIRECTORY, on the producer's machine:
    "files", the result as JSON and a picture.
    """
    steps = list(_AMPLITUDES) if amplitudes is None else sorted(set(amplitudes))
    if len(steps) < 3 or not 1 <= steps[0] <= steps[-1] <= HIGH or pulses < 2:
        raise ValueError(
            f"amplitudes, pulses: expected at least three from 1 to {HIGH}, and at least 2, found {steps} and {pulses}"
        )
    selected = Chips(controller, chips)
    off = selected.off(leave_off)
    means, stds, hits = (np.full((*off.shape, len(steps)), np.nan) for _ in range(3))
    saturated: set[str] = set()
    left_out = 0
    with selected.restored(), selected.untriggered():
        selected.raise_thresholds(raise_by)
        pulser = Pulser(selected, off)
        for number, amplitude in enumerate(steps):
            send_info(f"amplitude {amplitude}", number, len(steps))
            measured = pulser.send(amplitude, pulses)
            seen = measured.seen()
            with np.errstate(invalid="ignore"):
                used = (seen >= _LEAST_SEEN) & (seen <= 2 - _LEAST_SEEN)
            means[..., number] = np.where(used, measured.mean, np.nan)
            stds[..., number] = np.where(used, measured.std, np.nan)
            hits[..., number] = np.where(used, measured.hits, np.nan)
            saturated.update(measured.saturated)
            left_out += measured.left_out
    # All amplitudes tell the noise together, because few pulses may all have the same ADC count.
    weights = np.where(np.isnan(stds), 0, hits - 1)
    total = np.maximum(weights.sum(-1, keepdims=True), 1)
    variance = np.maximum((weights * np.nan_to_num(stds) ** 2).sum(-1, keepdims=True) / total, _QUANTIZATION)
    means = np.where(means < selected.adc_counts - _MARGIN, means, np.nan)
    size = off.size, len(steps)
    line = fit_lines(np.array(steps), means.reshape(size), np.sqrt(variance / hits).reshape(size))
    gain, gain_error, offset, offset_error, deviation, chi2 = (part.reshape(off.shape) for part in line)
    report = Report("gain", selected.keys, off)
    known = gain[~np.isnan(gain) & ~off]
    median = float(np.median(known)) if len(known) else None
    low, high = (None, None) if median is None or most_spread is None else (
        median * (1 - most_spread), median * (1 + most_spread),
    )  # fmt: skip
    unit = "ADC counts"
    report.add("gain", gain, f"{unit}/step", errors=gain_error, low=low, high=high, needed="no straight line")
    report.add("offset", offset, unit, errors=offset_error)
    report.add("deviation", deviation, unit, high=most_deviation)
    report.record("chi2", chi2)
    scale = selected.adc_scale(vdda_mv)
    pulse_mv = np.full(off.shape, np.nan) if scale is None else gain * scale[1]
    report.record("pulse_mv", np.where(off, np.nan, pulse_mv))
    uv = None
    if electrons_per_step is not None and not np.isnan(pulse_mv).all():
        uv = round(float(np.nanmedian(pulse_mv)) * 1000 / electrons_per_step, 4)
    result = report.result() | {
        "amplitudes": steps,
        "median": median,
        "uv_per_electron": uv,
        "left_out": left_out,
        "saturated": sorted(saturated),
        "assumed": {"vdda_mv": vdda_mv, "electrons_per_step": electrons_per_step},
    }
    report.write(directory, result, f"gain from test pulses of {len(steps)} amplitudes")
    return controller, result


registration = {"gain": Routine("gain", _gain)}
