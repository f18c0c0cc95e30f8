"""Thresholds for a wanted rate of each channel, found with the rates of the stream while it is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips, rates, report
from larpixdaq.routines.kit.trims import NEAR, Choice, Search

#: Trim at which half of a chip's channels are near the rates wanted: from there others can go up and down as far.
_MIDDLE = 18
#: Steps of the global threshold on its way down, and how long each is looked at (seconds).
_DOWN, _GLANCE = 4, 0.1
#: Hits of a channel that the two searches wait for in each round, at the highest rate wanted.
_COARSE, _FINE = 3, 20
#: Whether a channel that never said anything is dead is tried with a global threshold lower by so much.
_DEEPER = 12


class _Calibration:
    def __init__(self, controller: Any, info: Callable[..., None], keys: Any, low: float, high: float) -> None:
        self.controller, self.info = controller, info
        self.low, self.high = low, high
        self.chips = Chips(controller, keys)
        self.shape = len(self.chips), self.chips.channels
        self.off = np.zeros(self.shape, np.bool_)  # channels that are not looked at (any more)
        self.top = 31

    def measure(self, seconds: float) -> tuple[NDArray[np.int64], float]:
        """Hits of each channel, and the seconds in which they came."""
        return rates(self.controller, self.chips.keys, self.shape[1], seconds)

    def globals(self, begin: int) -> NDArray[np.int64]:
        """For each chip the lowest global threshold at which less than half of its channels, with trims in the middle,
        fire within a glance."""
        chips = self.chips
        chips.set(trim=_MIDDLE, threshold=begin)
        threshold = np.full(self.shape[0], begin, np.int64)
        going_down = np.ones(self.shape[0], np.bool_)
        rising = np.zeros(self.shape[0], np.bool_)
        open_ = np.maximum((~self.off).sum(1), 1)
        while (going_down | rising).any():
            counts, _ = self.measure(_GLANCE)
            fires = ((counts > 0) & ~self.off).sum(1) * 2 >= open_
            rising = (rising | going_down) & fires
            going_down &= ~fires & (threshold > 0)
            threshold = np.where(rising, np.minimum(threshold + 1, 255), threshold)
            threshold = np.where(going_down, np.maximum(threshold - _DOWN, 0), threshold)
            rising &= threshold < 255
            chips.set(threshold=threshold)
            lowest, highest = int(np.min(threshold)), int(np.max(threshold))
            self.info(f"global thresholds: {lowest} to {highest}", begin - lowest, begin)
        return threshold

    def coarse(self) -> Search:
        search = Search(self.shape, self.top)
        while not (search.settled | self.off).all():
            self.chips.set(trim=search.trim)
            counts, _ = self.measure(_COARSE / self.high)
            search.take(counts >= _COARSE)
            self.info("trims", int((search.settled | self.off).sum()), self.off.size)
        return search

    def fine(self, trim: NDArray[np.int64], rounds: int) -> Choice:
        choice = Choice(trim, self.top, self.low, self.high)
        for number in range(1, rounds + 1):
            self.chips.set(trim=choice.trim)
            choice.take(*self.measure(_FINE / self.high))
            self.info(f"rates, round {number}", int((choice.done | self.off).sum()), self.off.size)
            if (choice.done | self.off).all():
                break
        choice.finish()
        return choice

    def check(self, choice: Choice) -> NDArray[np.float64]:
        """Hz of each channel with what was chosen, counted twice as long as in a round; counts with what was."""
        hits, seconds = self.measure(2 * _FINE / self.high)
        choice.add(hits, seconds)
        return hits / seconds

    def dead(self, quiet: NDArray[np.bool_], threshold: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these channels say nothing even far below the threshold of the others, which are masked
        meanwhile."""
        if not quiet.any():
            return quiet
        deep = np.where(quiet.any(1), np.maximum(threshold - _DEEPER, 0), threshold)
        self.chips.set(mask=~quiet, trim=0)
        self.chips.set(threshold=deep)
        counts, _ = self.measure(2 * _GLANCE)
        self.chips.set(threshold=threshold)
        found: NDArray[np.bool_] = quiet & (counts == 0)
        return found


def _calibrate(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    low: float = 0.1,
    high: float = 1.0,
    chips: str | list[str] | None = None,
    apply: bool = False,
    leave_off: dict[str, list[int]] | None = None,
    rounds: int = 6,
    start: int = 255,
    directory: str = ".",
) -> tuple[Any, dict[str, Any]]:
    """Finds global thresholds, trims and channels to disable, so that each channel sends between LOW and HIGH packets a
    second (Hz).

    CHIPS are chip keys such as "1-2-34", None all that the board file names; all of their channels are unmasked for
    this, but those of LEAVE_OFF {chip: [channel, ...]}. Without APPLY the chips are in the end as they were before;
    with it they keep what was found, and the channels to disable are masked. The global threshold comes down from
    START, and the trims of all channels after it; every step is measured in the packets that come, until the rates lie
    between the limits, in at most ROUNDS last measurements of 20/HIGH seconds each. Periodic reset is on meanwhile, so
    that leakage does not count.

    The result: "thresholds" {chip: value}, "trims" {chip: [value, ...]}, "disable" {chip: [channel, ...]} (too noisy at
    the highest trim), "dead" and "silent_chips" (say nothing at all), rates before and after (Hz), how many channels
    are within the limits, and "files": a report in DIRECTORY of the producer's machine, as JSON and as a picture.
    """
    if not 0 < low < high:
        raise ValueError(f"low, high: expected 0 < low < high, found {low:g} and {high:g} Hz")
    if not 1 <= start <= 255 or rounds < 1:
        raise ValueError(f"start, rounds: expected 1 to 255 and at least 1, found {start} and {rounds}")
    began = time.monotonic()
    work = _Calibration(controller, send_info, chips, low, high)
    mine = work.chips
    for key, channels in (leave_off or {}).items():
        if key not in mine.keys or not all(0 <= channel < work.shape[1] for channel in channels):
            raise ValueError(f"leave_off: {key}: expected a chip and its channels, found {channels}")
        work.off[mine.keys.index(key), channels] = True
    kept = False
    try:
        if mine.has("periodic_reset"):
            mine.set(periodic_reset=1)
        mine.set(mask=work.off)
        hits, seconds = work.measure(_FINE / high)
        before = hits / seconds
        threshold = work.globals(start)
        search = work.coarse()
        hot = search.hopeless & ~work.off
        choice = work.fine(np.minimum(search.trim, work.top), rounds)
        # What is too noisy at its highest trim by counting long only, is so too.
        hot |= (choice.trim == work.top) & (choice.rates > NEAR * high) & ~work.off
        quiet = (choice.trim == 0) & (choice.rates == 0) & ~work.off & ~hot
        dead = work.dead(quiet, threshold)
        mine.set(trim=choice.trim)
        mine.set(mask=work.off | hot)
        after = work.check(choice)
        kept = apply
    finally:
        if not kept:
            mine.restore()
    live = ~(work.off | hot | dead)
    within = live & (choice.rates >= (2 - NEAR) * low) & (choice.rates <= NEAR * high)
    gone = dead | work.off
    silent = [key for place, key in enumerate(mine.keys) if gone[place].all() and dead[place].any()]
    result: dict[str, Any] = {
        "low_hz": low,
        "high_hz": high,
        "applied": kept,
        "seconds": round(time.monotonic() - began, 1),
        "live": int(live.sum()),
        "within": int(within.sum()),
        "thresholds": dict(zip(mine.keys, threshold.tolist(), strict=True)),
        "trims": dict(zip(mine.keys, choice.trim.tolist(), strict=True)),
        "disable": _by_chip(mine.keys, hot),
        "dead": {key: channels for key, channels in _by_chip(mine.keys, dead).items() if key not in silent},
        "silent_chips": silent,
        "rates_before_hz": dict(zip(mine.keys, before.round(3).tolist(), strict=True)),
        "rates_after_hz": dict(zip(mine.keys, after.round(3).tolist(), strict=True)),
    }
    name = f"calibration_{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    title = f"{result['within']:,} of {result['live']:,} live channels between {low:g} and {high:g} Hz"
    picture = report.draw(directory, name, before, after, low, high, title)
    result["files"] = [picture, report.write(directory, name, result)]
    return controller, result


def _by_chip(keys: list[str], marked: NDArray[np.bool_]) -> dict[str, list[int]]:
    return {key: np.flatnonzero(row).tolist() for key, row in zip(keys, marked, strict=True) if row.any()}


registration = {
    "calibrate": Routine(
        "calibrate", _calibrate, ["low", "high", "chips", "apply", "leave_off", "rounds", "start", "directory"]
    )
}
