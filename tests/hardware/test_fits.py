"""Fits of s-curves and lines: unbiased, with true uncertainties, and no value where the data do not tell."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.routines.kit.fits import fit_lines, fit_s_curves

TRIMS = np.arange(31, -1, -1)
CHANNELS = 1500


def counts(middle, width, pulses, seed=1):
    """Return the pulses seen at each trim, from pulses with normal noise."""
    random = np.random.default_rng(seed)
    heights = random.normal(middle[:, None, None], np.asarray(width)[:, None, None], (len(middle), len(TRIMS), pulses))
    return (heights > TRIMS[None, :, None]).sum(2)


def test_s_curves_are_unbiased_with_true_errors():
    random = np.random.default_rng(2)
    middle, width = random.uniform(8, 24, CHANNELS), random.uniform(1.2, 2.8, CHANNELS)
    fit = fit_s_curves(TRIMS, counts(middle, width, 40), np.full((CHANNELS, len(TRIMS)), 40))
    known = ~np.isnan(fit.width)
    assert known.mean() > 0.99
    for found, error, true in (
        (fit.midpoint, fit.midpoint_error, middle),
        (fit.width, fit.width_error, width),
    ):
        pull = ((found - true) / error)[known]
        assert abs(pull.mean()) < 0.25  # of its error; fits of few counts make widths a little too small
        assert 0.85 < pull.std() < 1.15
    assert np.median(fit.width_error[known] / width[known]) < 0.15


def test_a_rise_within_one_trim_has_a_place_and_no_width():
    middle = np.array([10.5, 10.02, 20.25])
    fit = fit_s_curves(TRIMS, counts(middle, np.full(3, 1e-6), 20), np.full((3, len(TRIMS)), 20))
    assert np.isnan(fit.width).all()
    assert (abs(fit.midpoint - middle) <= 0.5).all()
    assert np.allclose(fit.midpoint_error, 1 / np.sqrt(12))


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        (np.zeros(32), "dead"),
        (np.full(32, 20), "above all trims"),
        (np.where(TRIMS > 25, 20, 0), "the wrong way"),
        (np.full(32, 10), "half of the pulses everywhere"),
        (np.where(TRIMS % 2, 20, 0), "no rise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_are_no_s_curve_have_no_values(seen, what):
    fit = fit_s_curves(TRIMS, seen[None].astype(int), np.full((1, 32), 20))
    assert np.isnan(fit.width).all(), what
    if what != "no rise":
        assert np.isnan(fit.midpoint).all(), what


def test_a_lost_pulse_makes_no_curve_wide_and_a_lost_level_no_value():
    middle, width = np.full(200, 14.0), np.full(200, 2.0)
    sent = np.full((200, 32), 20)
    seen = counts(middle, width, 20)
    whole = fit_s_curves(TRIMS, seen, sent)
    assert not np.isnan(whole.midpoint).any()
    lost = seen.copy()
    lost[np.arange(200), 31 - np.arange(200) % 7] -= 1  # at trims 0 to 6, where all pulses are seen
    fit = fit_s_curves(TRIMS, lost, sent)
    assert abs(fit.midpoint - whole.midpoint).max() < 0.1
    assert abs(fit.width / whole.width - 1).max() < 0.15
    lost[np.arange(200), 31 - np.arange(200) % 7] = 0
    assert np.isnan(fit_s_curves(TRIMS, lost, sent).midpoint).all()
    steep = np.where(TRIMS < 14, 20, 0)[None]
    assert fit_s_curves(TRIMS, steep, sent[:1]).midpoint == 13.5
    steep[0, 28] = 0
    assert np.isnan(fit_s_curves(TRIMS, steep, sent[:1]).midpoint).all()


def test_levels_without_pulses_do_not_count():
    middle, width = np.full(50, 15.0), np.full(50, 2.0)
    seen, sent = counts(middle, width, 40), np.full((50, 32), 40)
    whole = fit_s_curves(TRIMS, seen, sent)
    seen[:, :4] = 40  # garbage at the highest trims
    sent[:, :4] = 0
    part = fit_s_curves(TRIMS, seen, sent)
    assert np.allclose(part.midpoint, whole.midpoint, atol=0.05)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=2, max_size=32))
def test_any_counts_give_values_with_errors_or_nothing(pairs):
    seen, sent = np.array(pairs).T[:, None]
    fit = fit_s_curves(np.arange(len(pairs)), seen, sent)
    assert (np.isnan(fit.midpoint) == np.isnan(fit.midpoint_error)).all()
    assert (np.isnan(fit.width) == np.isnan(fit.width_error)).all()
    assert not (fit.width <= 0).any()
    assert not (fit.width_error <= 0).any()
    assert np.isnan(fit.width[np.isnan(fit.midpoint)]).all()


def test_lines_are_unbiased_with_true_errors():
    random = np.random.default_rng(3)
    x = np.arange(20, 180, 20)
    slope, offset = random.uniform(0.5, 1.5, CHANNELS), random.uniform(10, 40, CHANNELS)
    errors = np.broadcast_to(random.uniform(0.05, 0.3, (CHANNELS, 1)), (CHANNELS, len(x))).copy()
    values = offset[:, None] + slope[:, None] * x + random.normal(0, errors)
    values[:200, 5:] = np.nan
    line = fit_lines(x, values, errors)
    for found, error, true in (
        (line.slope, line.slope_error, slope),
        (line.offset, line.offset_error, offset),
    ):
        pull = (found - true) / error
        assert abs(pull.mean()) < 0.1
        assert 0.93 < pull.std() < 1.07
    assert 0.9 < line.chi2.mean() < 1.1
    values[0, 2:] = np.nan
    values[1] = np.nan
    assert np.isnan(np.array(fit_lines(x, values, errors))[:, :2]).all()
