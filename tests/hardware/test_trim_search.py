"""The search for trims, on channels whose rates follow a known curve."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from larpixdaq.routines.kit.threshold_search import STEP, TOLERANCE, TOP, CoarseSearch, FineSearch

#: For each channel, the trim at which its rate is 1 Hz, and the factor of a step.
CHANNELS = st.lists(
    st.tuples(st.integers(-500, 3600).map(lambda n: n / 100), st.floats(2, 30)), min_size=1, max_size=20
)


def rate(channels, trim):
    middle, factor = np.array(channels).T[:, None, :]
    return factor ** np.clip(middle - trim, -30, 30)


@given(CHANNELS)
def test_the_coarse_search_finds_the_lowest_quiet_trim_and_never_goes_far_below(channels):
    search = CoarseSearch((1, len(channels)))
    middle = np.array(channels)[:, 0]
    for _ in range(20):
        if search.done.all():
            break
        assert (search.trim >= np.ceil(np.clip(middle, 0, TOP)) - STEP).all(), "at most a step below the right trim"
        search.update(rate(channels, search.trim) > 1, np.True_)
    assert search.done.all()
    quiet = np.ceil(middle)
    assert (search.hot[0] == (middle > TOP)).all()
    assert (search.trim[0] == np.clip(quiet, 0, TOP)).all()


@given(CHANNELS, st.integers(-2, 2))
def test_the_fine_search_ends_at_the_noisiest_trim_within_limits(channels, off):
    begin = np.clip(np.ceil(np.array(channels)[None, :, 0]).astype(int) + off, 0, TOP)
    choice = FineSearch(begin, 0.1, 1.0)
    for _ in range(40):
        if choice.done.all():
            break
        choice.update(np.round(rate(channels, choice.trim) * 1e6).astype(np.int64), 1e6, np.True_)
    assert choice.done.all()
    found, all_rates = choice.trim[0], np.array([rate(channels, t)[0] for t in range(TOP + 1)])
    for channel, trim in enumerate(found.tolist()):
        mine = np.round(all_rates[:, channel] * 1e6) / 1e6
        within = (mine >= 0.1) & (mine <= 1.0)
        if within.any():
            assert within[trim]
        elif mine[-1] > TOLERANCE:
            assert trim == TOP
        else:  # a step jumps over both limits
            assert mine[trim] <= TOLERANCE
            assert trim == 0 or mine[trim - 1] > TOLERANCE
    assert (choice.rates >= 0).all()


def test_hits_at_the_same_trim_are_added():
    choice, known = FineSearch(np.array([[5]]), 0.1, 1.0), np.array([[True]])
    choice.update(np.array([[30]]), 20.0, known)
    assert choice.trim.item() == 6
    choice.update(np.array([[2]]), 20.0, known)
    assert (choice.done.item(), choice.trim.item(), choice.rates.item()) == (True, 6, 0.1)
    choice.update(np.array([[1]]), 20.0, known)  # 3 hits in 40 s are too few, but trim 5 is too noisy
    assert (choice.trim.item(), choice.rates.item()) == (6, 0.075)
    choice.finish()
    assert choice.done.all()
