"""The search for trims: of each channel the lowest one at which it is not too noisy, among rates that are counted."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: Steps downward while no trim of the channel was too noisy yet. Four change the rate by a factor of some thousand.
STEP: Final = 4
#: What is above a limit by no more than this factor is not far above it.
NEAR: Final = 1.2


class Search:
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


class Choice:
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
