"""Global thresholds and trims for a wanted rate of each channel, step by step, with the rates as they come.

An io_channel that carries as much as its line can loses hits, so that all rates of its chips seem lower than they are.
Of such a measurement only what was too noisy is believed, until thresholds there are high enough.

The search for trims: of each channel the lowest one at which it is not too noisy, among rates that are counted.
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
#: Hits of a channel that each round of the two searches waits for: of the first at twice the highest rate wanted, since
#: a trim makes a factor of 5 to 20, of the second at that rate.
COARSE, FINE = 3, 20
#: Trim at which half of a chip's channels are near the rates wanted: from there others can go up and down as far.
_MIDDLE: Final = 18
#: Steps of the global threshold on its way down, and how long each is looked at (seconds).
_DOWN, _GLANCE = 4, 0.1
#: What is as wide as a step of the global threshold, in trims, and how often a chip may go up one for its noisiest.
_STEP, _MOST_STEPS = 5, 3
#: A channel that sends so many times as much as the mean of its io_channel may drown others.
_LOUD: Final = 2
#: Whether a channel that never said anything is dead is tried with a global threshold lower by so much.
_DEEPER: Final = 12
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
#: Steps downward while no trim of the channel was too noisy yet. Four change the rate by a factor of some thousand.
STEP: Final = 4
#: What is above a limit by no more than this factor is not far above it.
NEAR: Final = 1.2


class Thresholds:
    """All of shape (chips, channels): `trim`, `off` (channels that are not looked at) and `hot` (too noisy at the
    highest trim); `threshold`: (chips,). `saturated`: in how many measurements each io_channel was."""

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
        """Hits of each channel, the seconds in which they came, and for which chips, (chips, 1), more may have been
        lost than came."""
        found = rates(self.controller, self.chips.keys, self.off.shape[1], seconds)
        for line in found.saturated:
            self.saturated[line] = self.saturated.get(line, 0) + 1
        return found.hits, found.seconds, np.isin(self._lines, found.saturated)[:, None]

    def find_globals(self, begin: int) -> None:
        """For each chip the lowest global threshold at which less than half of its channels, with trims in the middle,
        fire within a glance."""
        chips, threshold = self.chips, self.threshold
        threshold[:] = begin
        aside = np.zeros_like(self.off)  # channels that fire, and are masked so as not to drown others
        chips.set(trim=_MIDDLE, threshold=begin)
        half = np.maximum((~self.off).sum(1), 1) / 2
        down, up = np.ones(len(threshold), np.bool_), np.zeros(len(threshold), np.bool_)
        while (down | up).any():
            counts, seconds, full = self.measure(_GLANCE)
            fires = counts >= max(1, round(seconds / _GLANCE))  # as in a glance, had it been longer
            up = (up | down) & (((fires | aside) & ~self.off).sum(1) >= half)
            # Where none of the chips of a full line goes up, it is single channels that fill it.
            filled = full & ~self._on_lines(up)[:, None]
            loud = filled & (counts > _LOUD * self._mean(counts, ~(self.off | aside)))
            up |= (filled & ~self._on_lines(loud.any(1))[:, None])[:, 0]
            aside = (aside | loud) & ~up[:, None]
            down &= ~up & (threshold > 0)
            threshold += np.where(up, 1, np.where(down & ~full[:, 0], -_DOWN, 0))
            np.clip(threshold, 0, 255, out=threshold)
            up &= threshold < 255
            chips.set(threshold=threshold, mask=self.off | aside)
            lowest, highest = int(np.min(threshold)), int(np.max(threshold))
            self.info(f"global thresholds: {lowest} to {highest}", begin - lowest, begin)

    def find_trims(self, raise_for: float) -> None:
        """The lowest at which each channel is not too noisy. Where some have come to the highest, the chip's global
        threshold goes up if at most `raise_for` others come to the lowest for each that need not be there then."""
        self.hot[:] = False
        self._search(~self.off)
        tried = np.zeros(len(self.threshold), np.bool_)
        for _ in range(_MOST_STEPS):
            quiet = ((self.trim > 0) & (self.trim < _STEP) & ~self.off).sum(1)
            noisy = (self.trim == TOP) & ~self.off  # or nearly: whether at the highest is seen by counting longer
            up = noisy.any(1) & (quiet <= raise_for * noisy.sum(1)) & (self.threshold < 255) & ~tried
            if not up.any():
                break
            before = self.threshold.copy(), self.trim.copy(), self.hot.copy()
            again = noisy & up[:, None]
            self.threshold[up] += 1
            self.trim = np.where(up[:, None], np.maximum(self.trim - _STEP, 0), self.trim)
            self.hot &= ~again
            self._search(again)
            saved = (again & (self.trim < TOP)).sum(1)
            vain = up & ((saved == 0) | (quiet > raise_for * saved))
            for now, was in zip((self.threshold, self.trim, self.hot), before, strict=True):
                now[vain] = was[vain]
            tried |= vain
        self._set()

    def fine(self, rounds: int) -> FineSearch:
        """Up and down, until the rates lie between the limits."""
        choice = FineSearch(self.trim, TOP, self.low, self.high)
        for number in range(1, rounds + 1):
            self.trim = choice.trim
            self._set()
            hits, seconds, full = self.measure(FINE / self.high)
            choice.take(hits, seconds, ~full | (hits > self.high * seconds))
            done = choice.done | self.off | self.hot
            self.info(f"rates, round {number}", int(done.sum()), done.size)
            if done.all():
                break
        choice.finish()
        self.trim = choice.trim
        # What is too noisy at its highest trim by counting long only, is so too.
        self.hot |= (choice.trim == TOP) & (choice.rates > NEAR * self.high) & ~self.off
        return choice

    def dead(self, quiet: Flags) -> Flags:
        """Which of these channels say nothing even far below the threshold of the others, which are masked
        meanwhile."""
        if not quiet.any():
            return quiet
        self.chips.set(mask=~quiet, trim=0)
        self.chips.set(threshold=np.where(quiet.any(1), np.maximum(self.threshold - _DEEPER, 0), self.threshold))
        counts, _, _ = self.measure(2 * _GLANCE)  # also of a full line each that works has its share
        found: Flags = quiet & (counts == 0)
        self.chips.set(threshold=self.threshold)
        return found

    def check(self, choice: FineSearch) -> tuple[NDArray[np.float64], Flags]:
        """Hz of each channel with what was found, counted twice as long as in a round, and where that may be too few;
        it counts with what was counted before."""
        self._set()
        hits, seconds, full = self.measure(2 * FINE / self.high)
        choice.add(hits, seconds, ~full)
        return hits / seconds, full

    def _set(self) -> None:
        self.chips.set(trim=self.trim, threshold=self.threshold, mask=self.off | self.hot)

    def _search(self, which: Flags) -> None:
        """The trims of these channels, from the highest down; those that are too noisy even there are hot."""
        search = CoarseSearch(which.shape, TOP)
        rest = self.trim
        while True:
            self.trim = np.where(which, search.trim, rest)
            self.hot |= search.hopeless & which
            done = search.settled | ~which
            self._set()
            if done.all():
                return
            self.info("trims", int((done | self.off).sum()), done.size)
            counts, seconds, full = self.measure(COARSE / (2 * self.high))
            noisy = counts >= max(COARSE, round(2 * self.high * seconds))
            # A full line without a channel that is too noisy would stay so for ever.
            search.take(noisy, noisy | ~full | ~self._on_lines((noisy & ~done).any(1))[:, None])

    def _on_lines(self, chips: Any) -> Flags:
        """Which chips share an io_channel with any of these, both (chips,)."""
        found: Flags = np.isin(self._lines, self._lines[chips])
        return found

    def _mean(self, counts: Numbers, open_: Flags) -> NDArray[np.float64]:
        """For each chip, (chips, 1), the mean over the open channels of its io_channel."""
        _, place = np.unique(self._lines, return_inverse=True)
        total, n = (np.bincount(place, each.sum(1))[place] for each in (counts * open_, open_))
        found: NDArray[np.float64] = (total / np.maximum(n, 1))[:, None]
        return found


class CoarseSearch:
    """Coarse: from the highest trim down, then halving. `trim`: what to measure next, shape (chips, channels)."""

    def __init__(self, shape: tuple[int, int], top: int) -> None:
        self.top = top
        self.trim = np.full(shape, top, np.int64)
        self._noisy = np.full(shape, -1, np.int64)  # the highest that was too noisy
        self._quiet = np.full(shape, top + 1, np.int64)  # the lowest that was not

    @property
    def settled(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self._quiet == self._noisy + 1
        return found

    @property
    def hopeless(self) -> NDArray[np.bool_]:
        """Too noisy at the highest trim."""
        found: NDArray[np.bool_] = self._noisy >= self.top
        return found

    def take(self, too_noisy: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        """What was found at `trim`, where that is known; the next ones to measure."""
        open_ = ~self.settled & known
        self._noisy = np.where(open_ & too_noisy, np.maximum(self._noisy, self.trim), self._noisy)
        self._quiet = np.where(open_ & ~too_noisy, np.minimum(self._quiet, self.trim), self._quiet)
        down = np.maximum(self._quiet - STEP, 0)
        halfway = (self._noisy + self._quiet) // 2
        found = np.where(self._noisy < 0, down, halfway)
        self.trim = np.minimum(np.where(self.settled, self._quiet, found), self.top)


class FineSearch:
    """Fine: from the trims that the coarse search found, one up or down until the rate lies within limits. What is
    measured again counts with what was.

    Of several the noisiest within the limits; if there is none, the noisiest that is not far above them: a step may
    jump over both limits, and what seemed to be above for a short time may not be."""

    def __init__(self, trim: NDArray[np.int64], top: int, low: float, high: float) -> None:
        self.trim = trim.copy()
        self.done = np.zeros(trim.shape, np.bool_)
        self._top, self._low, self._high = top, low, high
        self._hits = np.zeros((*trim.shape, top + 1), np.int64)
        self._seconds = np.zeros((*trim.shape, top + 1))

    @property
    def rates(self) -> NDArray[np.float64]:
        """Hz at `trim`; nan: not measured there."""
        return self._of(self._rates(), self.trim)

    def add(self, hits: NDArray[np.int64], seconds: float, known: NDArray[np.bool_]) -> None:
        """Of each channel at `trim`, where that is known."""
        at = self.trim[..., None]
        hits, more = np.where(known, hits, 0), np.where(known, seconds, 0.0)
        np.put_along_axis(self._hits, at, self._of(self._hits, self.trim)[..., None] + hits[..., None], -1)
        np.put_along_axis(self._seconds, at, self._of(self._seconds, self.trim)[..., None] + more[..., None], -1)

    def take(self, hits: NDArray[np.int64], seconds: float, known: NDArray[np.bool_]) -> None:
        """Of each channel at `trim`, where that is known; the next ones to measure. `done` is where there is nothing
        better to try."""
        self.add(hits, seconds, known)
        rates = self.rates
        wish = self.trim + (rates > self._high).astype(np.int64) - (rates < self._low).astype(np.int64)
        wish = np.clip(wish, 0, self._top)
        self.done = (self._of(self._seconds, wish) > 0) & known
        self.trim = np.where(self.done, self._best(), wish)

    def finish(self) -> None:
        """No more is measured: the best of what was."""
        self.trim = self._best()
        self.done[:] = True

    def _best(self) -> NDArray[np.int64]:
        rates = self._rates()
        within = (rates >= self._low) & (rates <= self._high)
        fits = np.where(within.any(-1, keepdims=True), within, rates <= NEAR * self._high)
        least = np.where(np.isnan(rates), np.inf, rates).argmin(-1)
        best: NDArray[np.int64] = np.where(fits.any(-1), np.where(fits, rates, -1.0).argmax(-1), least)
        return np.where(np.isnan(rates).all(-1), self.trim, best)

    def _rates(self) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            found: NDArray[np.float64] = self._hits / self._seconds
        return found

    @staticmethod
    def _of(table: NDArray[Any], trim: NDArray[np.int64]) -> NDArray[Any]:
        found: NDArray[Any] = np.take_along_axis(table, trim[..., None], -1)[..., 0]
        return found
