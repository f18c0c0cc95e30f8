"""Fits to the measurements of many channels at once: s-curves and straight lines, with uncertainties.

A value is NaN where the data do not determine it.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

#: Fractions of pulses that may be seen or missed for other reasons than the noise, such as a lost message: in a first
#: fit, and in the second one, which does not use what is missed more than _FAR widths from the midpoint. With the first
#: alone widths would be too small, and with the second alone one lost pulse would make a curve wide.
_STRAYS: Final = (2e-3, 1e-4)
_FAR: Final = 3.5
#: Fractions of pulses that a complete s-curve reaches at its ends.
_BOTTOM, _TOP = 0.1, 0.9
#: Standard deviations by which the deviance of data that a fit describes may exceed the number of degrees of freedom.
_MOST_DEVIANCE: Final = 7.0
#: Steps of a fit. It is given up if the last step is still longer than this fraction of the width.
_STEPS, _CONVERGED = 60, 0.01

_erf: Final = np.frompyfunc(math.erf, 1, 1)


class SCurves(NamedTuple):
    """S-curves of channels, shape (channels,), in the unit of the levels: `midpoint`, at which half of the pulses are
    seen, and `width`, the standard deviation of the noise, with their standard deviations.

    `excess`: how much the deviance of the data exceeds the number of degrees of freedom, in standard deviations.
    """

    midpoint: Values
    midpoint_error: Values
    width: Values
    width_error: Values
    excess: Values


def fit_s_curves(levels: NDArray[Any], seen: NDArray[Any], pulses: NDArray[Any]) -> SCurves:
    """Fit Φ((midpoint - level) / width) to the fractions of pulses that were seen, by maximum likelihood.

    `seen`, `pulses`: numbers, shape (channels, levels); `levels`: the same shape or (levels,). Levels without pulses
    are not used. A channel whose data are no complete s-curve gets NaN, also if most pulses of a level are missing. If
    at most one level is within the rise, the width is NaN, and the midpoint lies between two levels, with an error from
    their distance.
    """
    x = np.broadcast_to(np.asarray(levels, np.float64), seen.shape)
    n = np.asarray(pulses, np.float64)
    k = np.minimum(np.asarray(seen, np.float64), n)
    with np.errstate(invalid="ignore", divide="ignore"):
        fraction = np.where(n > 0, k / n, np.nan)
    result = SCurves(*np.full((5, len(k)), np.nan))
    order = np.argsort(np.where(n > 0, x, np.inf), axis=1)
    x, n, k, fraction = (np.take_along_axis(array, order, 1) for array in (x, n, k, fraction))
    partial = ((k > 0) & (k < n)).sum(1)
    for row in range(len(k)):  # the ends of each curve
        known = fraction[row][n[row] > 0]
        if len(known) < 2 or known[0] < _TOP or known[-1] > _BOTTOM:
            continue
        at = x[row][n[row] > 0]
        last = int(np.flatnonzero(known >= 0.5)[-1])
        if partial[row] < 2 and (known[:last] < 0.5).any():
            continue
        result.midpoint[row] = (at[last] + at[last + 1]) / 2
        result.midpoint_error[row] = (at[last + 1] - at[last]) / math.sqrt(12)
    fitted = np.flatnonzero(~np.isnan(result.midpoint) & (partial >= 2))
    if len(fitted):
        _fit(x[fitted], k[fitted], n[fitted], result, fitted)
    return result


def _fit(x: Values, k: Values, n: Values, result: SCurves, rows: NDArray[np.intp]) -> None:
    """Fit these curves by Fisher scoring, and put the values into these rows of the result."""
    x = np.where(n > 0, x, 0.0)
    middle = result.midpoint[rows].copy()
    inside = (k > 0) & (k < n)
    spread = np.array([np.ptp(at[flags]) for at, flags in zip(x, inside, strict=True)])
    log_width = np.log(np.maximum(spread / 4, 1e-9))
    counted = k
    for stray in _STRAYS:
        step = np.full((2, len(middle)), np.inf)
        for _ in range(_STEPS):
            width = np.exp(log_width)
            z, p, slope = _model(x, middle, width, stray)
            score = (k - n * p) / (p * (1 - p)) * slope
            info = n / (p * (1 - p)) * slope**2
            a, b, c = info.sum(1), (-info * z).sum(1), (info * z**2).sum(1)
            determinant = np.maximum(a * c - b * b, 1e-300)
            u, v = score.sum(1), (-score * z).sum(1)
            step = np.stack([(c * u - b * v) / determinant, (a * v - b * u) / determinant])
            middle = middle + width * np.clip(step[0], -1.0, 1.0)
            log_width = log_width + np.clip(step[1], -0.5, 0.5)
            if np.abs(step).max() < 1e-6:
                break
        width = np.exp(log_width)
        if stray == _STRAYS[0]:
            z, p, _ = _model(x, middle, width, stray)
            deviance = 2 * (_likelihood_ratio(counted, n * p) + _likelihood_ratio(n - counted, n * (1 - p))).sum(1)
            freedom = np.maximum((n * p * (1 - p) > 0.25).sum(1) - 2, 1)
            k = np.where(z > _FAR, n, np.where(z < -_FAR, 0, k))
    excess = (deviance - freedom) / np.sqrt(2 * freedom)
    with np.errstate(invalid="ignore"):
        errors = width * np.sqrt(c / determinant), width * np.sqrt(a / determinant)
    good = (np.abs(step).max(0) < _CONVERGED) & (excess < _MOST_DEVIANCE)
    known = good & (errors[1] < width / 2)
    result.excess[rows] = excess
    for values, fitted, valid in (
        (result.midpoint, middle, good),
        (result.midpoint_error, errors[0], good),
        (result.width, width, known),
        (result.width_error, errors[1], known),
    ):
        values[rows] = np.where(valid, fitted, np.nan)


def fraction_seen(levels: NDArray[Any], midpoint: float, width: float) -> Values:
    """Return the fraction of pulses that a channel sees at these levels, as fit_s_curves() describes it."""
    _, p, _ = _model(np.asarray(levels, np.float64)[None, :], np.array([midpoint]), np.array([width]), _STRAYS[1])
    fraction: Values = p[0]
    return fraction


def _likelihood_ratio(counts: Values, expected: Values) -> Values:
    """Return counts * log(counts / expected), 0 for no counts."""
    ratio = np.where(counts > 0, counts, 1.0) / np.where(counts > 0, expected, 1.0)
    result: Values = counts * np.log(ratio)
    return result


def _model(x: Values, middle: Values, width: Values, stray: float) -> tuple[Values, Values, Values]:
    """Return (middle - x) / width, the expected fraction, and its derivative by the former."""
    z = np.clip((middle[:, None] - x) / width[:, None], -9.0, 9.0)
    normal = 0.5 * (1 + np.asarray(_erf(z / math.sqrt(2)), np.float64))
    p = stray + (1 - 2 * stray) * normal
    slope = (1 - 2 * stray) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return z, p, slope


class Lines(NamedTuple):
    """Straight lines of channels, shape (channels,): `slope` and `offset` with their standard deviations.

    `deviation`: largest distance of a value from the line, in the unit of the values. `chi2`: per degree of freedom.
    """

    slope: Values
    slope_error: Values
    offset: Values
    offset_error: Values
    deviation: Values
    chi2: Values


def fit_lines(x: NDArray[Any], values: Values, errors: Values) -> Lines:
    """Fit straight lines to values with standard deviations, shape (channels, points). NaN is no point.

    A line needs three points.
    """
    known = ~np.isnan(values) & (errors > 0)
    weight = np.where(known, 1 / np.where(known, errors, 1.0) ** 2, 0.0)
    y = np.where(known, values, 0.0)
    at = np.broadcast_to(np.asarray(x, np.float64), y.shape)
    total, sum_x, sum_y = weight.sum(1), (weight * at).sum(1), (weight * y).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        center = sum_x / total
        spread = (weight * (at - center[:, None]) ** 2).sum(1)
        slope = (weight * (at - center[:, None]) * y).sum(1) / spread
        offset = sum_y / total - slope * center
        distance = np.where(known, y - offset[:, None] - slope[:, None] * at, 0.0)
        freedom = known.sum(1) - 2
        lines = Lines(
            slope,
            1 / np.sqrt(spread),
            offset,
            np.sqrt(1 / total + center**2 / spread),
            np.abs(distance).max(1),
            (weight * distance**2).sum(1) / freedom,
        )
    return Lines(*(np.where(freedom > 0, part, np.nan) for part in lines))
