"""S-curves: the fraction of test pulses that each channel sees against its threshold, and its noise from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips
from larpixdaq.routines.kit.chips import COUNTS, per_channel
from larpixdaq.routines.kit.fits import fit_s_curves
from larpixdaq.routines.kit.pulses import HIGH, Pulser
from larpixdaq.routines.kit.report import Report

#: Trims of the scan, and the trim at which half of a chip's channels are to see the pulses.
_TRIMS: Final = np.arange(31, -1, -1)
_MIDDLE: Final = 16
#: Step of the global threshold on its way down, and pulses after each step.
_STEP_DOWN, _FEW = 8, 2
#: Steps of the global threshold by which it is moved for channels whose rise is not within the trims.
_MOVE: Final = 4
#: Highest trim that is measured at a lower threshold, and trims with all pulses that end a scan.
_HIGHEST, _COMPLETE = 27, 2
#: Hits for one pulse from which a channel fires by itself, so that its hits tell nothing about pulses.
_BY_ITSELF: Final = 1.5
Flags = NDArray[np.bool_]


def _s_curve(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    leave_off: dict[str, list[int]] | None = None,
    amplitude: int = 30,
    pulses: int = 20,
    start: int = 255,
    step: int = 1,
    most_noise: float | None = 1500.0,
    pulse_mv: dict[str, list[float | None]] | None = None,
    vdda_mv: float = 1800.0,
    trim_mv: float = 1.45,
    uv_per_electron: float = 4.0,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Measures which fraction of test pulses each channel sees at each trim, and fits threshold and noise.

    CHIPS: a chip key, a list of chip keys, or None for all chips. All channels but LEAVE_OFF {chip: [channel, ...]}
    take part. The global threshold of each chip comes down from START until half of its channels see pulses of
    AMPLITUDE (counts by which the pulser's DAC falls). Then the trims come down from 31 to 0 by STEP, with PULSES
    pulses at each, and once more at a higher or lower global threshold for channels whose rise is not within the trims.
    Other triggers are off. The registers of the chips are restored. A channel is bad without a complete s-curve, or
    with a noise above MOST_NOISE (electrons). PULSE_MV {chip: [mV, ...]}: height of one count of the pulser's DAC, as
    `gain` measures it.

    Result: "chips" {chip: {"threshold", "threshold_error" (mV), at which half of the pulses are seen; "noise_mv",
    "noise_mv_error"; "noise", "noise_error" (electrons); "baseline" (mV, threshold at the pedestal, with PULSE_MV)}},
    each a list with a value for each channel, None where the data do not tell; "noise" is also None where the s-curve
    is steeper than the trims tell. Thresholds are VDDA_MV/256 a step, plus TRIM_MV a trim, and electrons come from
    UV_PER_ELECTRON (µV for one electron): none of them is measured. "thresholds" {chip: global threshold of the scan};
    "bad", "disable", "limits" as of pedestal; "saturated" {io_channel: number of measurements} that were not used,
    because the io_channel sent as much as its line carries. With DIRECTORY, on the producer's machine: "files", the
    result as JSON and a picture.
    """
    if not 1 <= amplitude <= HIGH or pulses < 4 or not 1 <= start <= 255 or not 1 <= step <= 8:
        raise ValueError(
            f"amplitude, pulses, start, step: expected 1 to {HIGH}, at least 4, 1 to 255 and 1 to 8, "
            f"found {amplitude}, {pulses}, {start} and {step}"
        )
    selected = Chips(controller, chips)
    off = selected.off(leave_off)
    scan = _Scan(selected, off, _TRIMS[::step], amplitude, pulses, send_info)
    with selected.restored(), selected.untriggered():
        thresholds = scan.find_thresholds(start)
        scan.measure(thresholds, ~off, "trims")
        for move, part in ((_MOVE, scan.too_noisy()), (-_MOVE, scan.too_quiet())):
            moved = np.clip(thresholds + move, 0, 255)
            part = scan.responding(moved, part)
            if part.any():
                title = f"{int(part.sum())} channels at thresholds {move:+d}"
                scan.measure(moved, part, title, _HIGHEST if move < 0 else 31)
    size = off.size, len(scan.trims)
    curves = fit_s_curves(scan.trims, scan.seen.reshape(size), scan.sent.reshape(size))
    trim, trim_error, width, width_error = (part.reshape(off.shape) for part in curves)
    threshold = scan.threshold * vdda_mv / COUNTS + trim * trim_mv
    pulse = per_channel("pulse_mv", pulse_mv, selected.keys, selected.channels)
    electrons = trim_mv * 1000 / uv_per_electron
    report = Report("s_curve", selected.keys, off)
    report.add("threshold", threshold, "mV", errors=trim_error * trim_mv, needed="no complete s-curve")
    report.add("noise", width * electrons, "electrons", errors=width_error * electrons, high=most_noise)
    for name, values in (
        ("noise_mv", width * trim_mv),
        ("noise_mv_error", width_error * trim_mv),
        ("baseline", threshold - amplitude * pulse),
    ):
        report.record(name, np.where(off, np.nan, values))
    result = report.result() | {
        "amplitude": amplitude,
        "pulses": pulses,
        "thresholds": dict(zip(selected.keys, thresholds.tolist(), strict=True)),
        "saturated": scan.saturated,
        "assumed": {"vdda_mv": vdda_mv, "trim_mv": trim_mv, "uv_per_electron": uv_per_electron},
    }
    found = int((~np.isnan(threshold) & ~off).sum())
    report.write(directory, result, f"s-curves of {found:,} of {int((~off).sum()):,} channels")
    return controller, result


class _Scan:
    """Counts the pulses that channels see. `seen`, `sent`: shape (chips, channels, `trims`); `sent` is 0 where nothing
    is known. `threshold`: the global threshold at which a channel was measured, shape (chips, channels)."""

    def __init__(
        self, chips: Chips, off: Flags, trims: NDArray[Any], amplitude: int, pulses: int, info: Callable[..., None]
    ) -> None:
        self._chips, self._off, self.trims = chips, off, trims
        self._amplitude, self._pulses, self._info = amplitude, pulses, info
        self.seen = np.zeros((*off.shape, len(trims)), np.int64)
        self.sent = np.zeros_like(self.seen)
        self.threshold = np.zeros(off.shape, np.int64)
        self.saturated: dict[str, int] = {}

    def find_thresholds(self, start: int) -> NDArray[np.int64]:
        """Return the lowest global threshold of each chip at which less than half of its channels see the pulses."""
        chips, open_ = self._chips, ~self._off
        threshold = np.full(len(chips), start, np.int64)
        half = np.maximum(open_.sum(1), 1) / 2
        falling, rising = open_.any(1), np.zeros(len(chips), np.bool_)
        chips.set(trim=_MIDDLE, threshold=threshold)
        pulser = Pulser(chips, self._off)
        while (falling | rising).any():
            measured = pulser.send(self._amplitude, _FEW)
            self._count(measured.saturated)
            # A chip on a full line loses hits: it is taken for one that sees the pulses, so that it goes up.
            rising = (rising | falling) & (((measured.hits > 0) & open_).sum(1) >= half) | (
                rising & measured.full[:, 0]
            )
            falling &= ~rising & (threshold > 0)
            threshold = np.clip(threshold + np.where(rising, 1, np.where(falling, -_STEP_DOWN, 0)), 0, 255)
            rising &= threshold < 255
            chips.set(threshold=threshold)
            lowest, highest = int(np.min(threshold)), int(np.max(threshold))
            self._info(f"global thresholds: {lowest} to {highest}", start - lowest, start)
        return threshold

    def measure(self, threshold: NDArray[np.int64], part: Flags, title: str, highest: int = 31) -> None:
        """Count the pulses that the channels in `part` see at the trims up to `highest`, with all others masked.

        Trims below those at which all these channels have seen all pulses twice are left out.
        """
        chips = self._chips
        chips.set(threshold=threshold)
        self.threshold = np.where(part, threshold[:, None], self.threshold)
        self.seen[part], self.sent[part] = 0, 0
        pulser = Pulser(chips, ~part)
        complete = np.zeros(part.shape, np.int64)
        for at, trim in enumerate(self.trims.tolist()):
            if trim > highest:
                continue
            self._info(title, at, len(self.trims))
            chips.set(trim=trim)
            measured = pulser.send(self._amplitude, self._pulses)
            self._count(measured.saturated)
            usable = part & ~measured.full & (measured.hits <= _BY_ITSELF * self._pulses)
            self.seen[..., at] = np.where(part, measured.hits, self.seen[..., at])
            self.sent[..., at] = np.where(part, np.where(usable, self._pulses, 0), self.sent[..., at])
            complete = np.where(usable & (measured.hits >= self._pulses), complete + 1, 0)
            if (complete[part] >= _COMPLETE).all():
                break

    def too_noisy(self) -> Flags:
        """Return which channels see pulses even at the highest trim."""
        return (self.sent[..., 0] > 0) & (self.seen[..., 0] > 0.1 * self.sent[..., 0])

    def too_quiet(self) -> Flags:
        """Return which channels do not see all pulses at the lowest trim. Scans that ended before are complete."""
        return (self.sent[..., -1] > 0) & (self.seen[..., -1] < 0.9 * self.sent[..., -1])

    def responding(self, threshold: NDArray[np.int64], part: Flags) -> Flags:
        """Return which of these channels see pulses at the lowest trim: dead channels would take as long as others."""
        if not part.any():
            return part
        self._chips.set(threshold=threshold, trim=0)
        measured = Pulser(self._chips, ~part).send(self._amplitude, _FEW)
        return part & (measured.hits > 0)

    def _count(self, saturated: list[str]) -> None:
        for line in saturated:
            self.saturated[line] = self.saturated.get(line, 0) + 1


registration = {"s_curve": Routine("s_curve", _s_curve)}
