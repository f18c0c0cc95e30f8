"""Search for global thresholds and trims with a wanted rate of each channel, in steps with a measurement each.

A saturated io_channel loses hits, so that all rates of its chips seem too low. Of such a measurement only the too noisy
channels are used, until thresholds there are high enough.

CoarseSearch finds the lowest trim of each channel at which it is not too noisy, and FineSearch improves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines.kit.chips import Chips
from larpixdaq.routines.kit.measurement import rates

#: The highest trim.
TOP: Final = 31
#: Hits of a channel in each measurement of the coarse search, at twice the upper limit of the rate, because a trim step
#: changes the rate by a factor of 5 to 20; and in each round of the fine search, at the upper limit.
COARSE, FINE = 3, 20
#: Trim during the search for global thresholds, so that trims can later go up and down by a similar range.
_MIDDLE: Final = 18
#: Step of the global threshold on its way down, and seconds of the measurement after each step.
_STEP_DOWN, _STEP_SECONDS = 4, 0.1
#: Width of a step of the global threshold in trims, and maximum steps up of a chip for its noisiest channels.
_STEP, _MOST_STEPS = 5, 3
#: Multiple of an io_channel's mean rate above which a channel counts as loud: it may displace hits of others.
_LOUD: Final = 2
#: Steps by which the global threshold is lowered to see whether a channel without hits is dead.
_DEAD_STEPS: Final = 12
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
#: Trims per step down, until a trim of the channel was too noisy. Four change the rate by a factor of some thousand.
STEP: Final = 4
#: Maximum factor by which an accepted rate may exceed the upper limit.
TOLERANCE: Final = 1.2


class Thresholds:
    """Thresholds and trims of these chips for rates between `low` and `high` (Hz).

    Arrays of shape (chips, channels): `trim`; `off`, channels that take no part; `hot`, channels too noisy at the
    highest trim. `threshold`: shape (chips,). `saturated`: by io_channel, the number of measurements in which it was
    saturated.
    """

    def __init__(self, controller: Any, info: Callable[..., None], keys: Any, low: float, high: float) -> None:
        self.controller, self.info = controller, info
        self.low, self.high = low, high
        self.chips = Chips(controller, keys)
        shape = len(self.chips), self.chips.channels
        self.off = np.zeros(shape, np.bool_)
        self.hot = np.zeros(shape, np.bool_)
        self.trim = np.full(shape, TOP, np.int64)
        self.threshold = np.zeros(len(self.chips), np.int64)
        self.saturated: dict[str, int] = {}
        self._lines = np.array([key.rpartition("-")[0] for key in self.chips.keys])

    def measure(self, seconds: float) -> tuple[Numbers, float, Flags]:
        """Measure for `seconds`. Returns hits by channel, their seconds, and which chips are on saturated io_channels.

        The last has shape (chips, 1).
        """
        result = rates(self.controller, self.chips.keys, self.off.shape[1], seconds)
        for line in result.saturated:
            self.saturated[line] = self.saturated.get(line, 0) + 1
        return result.hits, result.seconds, np.isin(self._lines, result.saturated)[:, None]

    def find_globals(self, begin: int) -> None:
        """Find the lowest global threshold of each chip at which less than half of its channels fire.

        The search comes down from `begin`, with all trims at _MIDDLE and measurements of _STEP_SECONDS.
        """
        chips, threshold = self.chips, self.threshold
        threshold[:] = begin
        muted = np.zeros_like(self.off)  # channels that fire and are masked, because they displace hits of others
        chips.set(trim=_MIDDLE, threshold=begin)
        half = np.maximum((~self.off).sum(1), 1) / 2
        falling, rising = np.ones(len(threshold), np.bool_), np.zeros(len(threshold), np.bool_)
        while (falling | rising).any():
            counts, seconds, full = self.measure(_STEP_SECONDS)
            firing = counts >= max(1, round(seconds / _STEP_SECONDS))  # scaled, because a measurement may be longer
            rising = (rising | falling) & (((firing | muted) & ~self.off).sum(1) >= half)
            # If no chip of a saturated line goes up, single channels fill the line.
            full_lines = full & ~self._on_lines(rising)[:, None]
            loud = full_lines & (counts > _LOUD * self._mean(counts, ~(self.off | muted)))
            rising |= (full_lines & ~self._on_lines(loud.any(1))[:, None])[:, 0]
            muted = (muted | loud) & ~rising[:, None]
            falling &= ~rising & (threshold > 0)
            threshold += np.where(rising, 1, np.where(falling & ~full[:, 0], -_STEP_DOWN, 0))
            np.clip(threshold, 0, 255, out=threshold)
            rising &= threshold < 255
            chips.set(threshold=threshold, mask=self.off | muted)
            lowest, highest = int(np.min(threshold)), int(np.max(threshold))
            self.info(f"global thresholds: {lowest} to {highest}", begin - lowest, begin)

    def find_trims(self, raise_for: float) -> None:
        """Find the lowest trim of each channel at which it is not too noisy.

        If channels need the highest trim, the chip's global threshold goes up by one step, provided that for each
        channel saved in this way at most `raise_for` other channels come to the lowest trim.
        """
        self.hot[:] = False
        self._search(~self.off)
        tried = np.zeros(len(self.threshold), np.bool_)
        for _ in range(_MOST_STEPS):
            quiet = ((self.trim > 0) & (self.trim < _STEP) & ~self.off).sum(1)
            noisy = (self.trim == TOP) & ~self.off  # perhaps too noisy even there
            rising = noisy.any(1) & (quiet <= raise_for * noisy.sum(1)) & (self.threshold < 255) & ~tried
            if not rising.any():
                break
            previous = self.threshold.copy(), self.trim.copy(), self.hot.copy()
            retried = noisy & rising[:, None]
            self.threshold[rising] += 1
            self.trim = np.where(rising[:, None], np.maximum(self.trim - _STEP, 0), self.trim)
            self.hot &= ~retried
            self._search(retried)
            saved = (retried & (self.trim < TOP)).sum(1)
            reverted = rising & ((saved == 0) | (quiet > raise_for * saved))
            for array, old in zip((self.threshold, self.trim, self.hot), previous, strict=True):
                array[reverted] = old[reverted]
            tried |= reverted
        self._write()

    def refine_trims(self, rounds: int) -> FineSearch:
        """Move trims up and down by one until rates are within the limits, in at most `rounds` measurements."""
        choice = FineSearch(self.trim, self.low, self.high)
        for number in range(1, rounds + 1):
            self.trim = choice.trim
            self._write()
            hits, seconds, full = self.measure(FINE / self.high)
            choice.update(hits, seconds, ~full | (hits > self.high * seconds))
            done = choice.done | self.off | self.hot
            self.info(f"rates, round {number}", int(done.sum()), done.size)
            if done.all():
                break
        choice.finish()
        self.trim = choice.trim
        # Some channels are too noisy at the highest trim by so little that only a long measurement shows it.
        self.hot |= (choice.trim == TOP) & (choice.rates > TOLERANCE * self.high) & ~self.off
        return choice

    def find_dead(self, quiet: Flags) -> Flags:
        """Return which of these quiet channels have no hits even at a much lower threshold, with all others masked."""
        if not quiet.any():
            return quiet
        self.chips.set(mask=~quiet, trim=0)
        self.chips.set(threshold=np.where(quiet.any(1), np.maximum(self.threshold - _DEAD_STEPS, 0), self.threshold))
        counts, _, _ = self.measure(2 * _STEP_SECONDS)  # long enough for hits of all working channels of a full line
        result: Flags = quiet & (counts == 0)
        self.chips.set(threshold=self.threshold)
        return result

    def check(self, choice: FineSearch) -> tuple[NDArray[np.float64], Flags]:
        """Measure rates (Hz) with the final trims, for twice the time of a round; returns them and the saturated chips.

        The hits are added to those of earlier measurements.
        """
        self._write()
        hits, seconds, full = self.measure(2 * FINE / self.high)
        choice.add(hits, seconds, ~full)
        return hits / seconds, full

    def _write(self) -> None:
        self.chips.set(trim=self.trim, threshold=self.threshold, mask=self.off | self.hot)

    def _search(self, selected: Flags) -> None:
        """Search the trims of these channels, from the highest down. Channels too noisy even there become hot."""
        search = CoarseSearch(selected.shape)
        rest = self.trim
        while True:
            self.trim = np.where(selected, search.trim, rest)
            self.hot |= search.hot & selected
            done = search.done | ~selected
            self._write()
            if done.all():
                return
            self.info("trims", int((done | self.off).sum()), done.size)
            counts, seconds, full = self.measure(COARSE / (2 * self.high))
            noisy = counts >= max(COARSE, round(2 * self.high * seconds))
            # A saturated line without a too noisy channel is used as well: otherwise the search would never end.
            search.update(noisy, noisy | ~full | ~self._on_lines((noisy & ~done).any(1))[:, None])

    def _on_lines(self, chips: Any) -> Flags:
        """Return which chips share an io_channel with any of these, both of shape (chips,)."""
        return np.isin(self._lines, self._lines[chips])

    def _mean(self, counts: Numbers, open_: Flags) -> NDArray[np.float64]:
        """Return for each chip, shape (chips, 1), the mean count of the open channels of its io_channel."""
        _, line_index = np.unique(self._lines, return_inverse=True)
        total, n = (np.bincount(line_index, array.sum(1))[line_index] for array in (counts * open_, open_))
        return (total / np.maximum(n, 1))[:, None]


class CoarseSearch:
    """Search from the highest trim down, then by halving. `trim`: to measure next, shape (chips, channels)."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.trim = np.full(shape, TOP, np.int64)
        self._noisy = np.full(shape, -1, np.int64)  # highest trim that was too noisy
        self._quiet = np.full(shape, TOP + 1, np.int64)  # lowest trim that was not too noisy

    @property
    def done(self) -> NDArray[np.bool_]:
        return self._quiet <= self._noisy + 1

    @property
    def hot(self) -> NDArray[np.bool_]:
        """Channels that are too noisy at the highest trim."""
        return self._noisy >= TOP

    def update(self, too_noisy: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        """Take the result at `trim`, where it is `known`, and choose the next trims."""
        open_ = ~self.done & known
        self._noisy = np.where(open_ & too_noisy, np.maximum(self._noisy, self.trim), self._noisy)
        self._quiet = np.where(open_ & ~too_noisy, np.minimum(self._quiet, self.trim), self._quiet)
        lower = np.maximum(self._quiet - STEP, 0)
        halfway = (self._noisy + self._quiet) // 2
        next_trim = np.where(self._noisy < 0, lower, halfway)
        self.trim = np.minimum(np.where(self.done, self._quiet, next_trim), TOP)


class FineSearch:
    """Search from the trims of the coarse search, step by step, until each rate is between `low` and `high` (Hz).

    Hits at the same trim are added. The best trim is the noisiest within the limits, or else the noisiest up to
    TOLERANCE * `high`, because a step can jump over both limits and a short measurement can show too high a rate.
    """

    def __init__(self, trim: NDArray[np.int64], low: float, high: float) -> None:
        self.trim = trim.copy()
        self.done = np.zeros(trim.shape, np.bool_)
        self._low, self._high = low, high
        self._hits = np.zeros((*trim.shape, TOP + 1), np.int64)
        self._seconds = np.zeros((*trim.shape, TOP + 1))
        self._channels = tuple(np.indices(trim.shape))

    @property
    def rates(self) -> NDArray[np.float64]:
        """Rates at `trim` in Hz; nan where it was not measured."""
        return np.take_along_axis(self._rates(), self.trim[..., None], -1)[..., 0]

    def add(self, hits: NDArray[np.int64], seconds: float, known: NDArray[np.bool_]) -> None:
        """Add the hits of each channel at `trim`, where they are `known`."""
        at_trim = *self._channels, self.trim
        self._hits[at_trim] += np.where(known, hits, 0)
        self._seconds[at_trim] += np.where(known, seconds, 0.0)

    def update(self, hits: NDArray[np.int64], seconds: float, known: NDArray[np.bool_]) -> None:
        """Take the hits of each channel at `trim`, where they are `known`, and choose the next trims.

        A channel is `done` when its next trim has been measured already.
        """
        self.add(hits, seconds, known)
        rates = self.rates
        next_trim = self.trim + (rates > self._high).astype(np.int64) - (rates < self._low).astype(np.int64)
        next_trim = np.clip(next_trim, 0, TOP)
        self.done = (np.take_along_axis(self._seconds, next_trim[..., None], -1)[..., 0] > 0) & known
        self.trim = np.where(self.done, self._best(), next_trim)

    def finish(self) -> None:
        """Choose the best trims of all that were measured."""
        self.trim = self._best()
        self.done[:] = True

    def _best(self) -> NDArray[np.int64]:
        rates = self._rates()
        within = (rates >= self._low) & (rates <= self._high)
        fits = np.where(within.any(-1, keepdims=True), within, rates <= TOLERANCE * self._high)
        least = np.where(np.isnan(rates), np.inf, rates).argmin(-1)
        best: NDArray[np.int64] = np.where(fits.any(-1), np.where(fits, rates, -1.0).argmax(-1), least)
        return np.where(np.isnan(rates).all(-1), self.trim, best)

    def _rates(self) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            return self._hits / self._seconds
