"""S-curves: the fraction of test pulses that each channel sees against its threshold, and its noise from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips
from larpixdaq.routines.kit.chips import COUNTS, per_channel
from larpixdaq.routines.kit.fits import SCurves, fit_s_curves, fraction_seen
from larpixdaq.routines.kit.pulses import HIGH, Pulser
from larpixdaq.routines.kit.report import Report

#: Trims of the scan, and the trim at which half of a chip's channels are to see the pulses.
_TRIMS: Final = np.arange(31, -1, -1)
_MIDDLE: Final = 16
#: Step of the global threshold on its way down, and pulses after each step.
_STEP_DOWN, _FEW = 8, 2
#: Trims at which a channel sees all pulses until its scan ends.
_COMPLETE: Final = 2
#: Maximum further scans of channels without a complete s-curve, and steps of the global threshold by which it is moved
#: if their rise is not within the trims. Excess of a fit from which a channel is measured again, too.
_REPEATS, _MOVE = 2, 4
_DOUBTFUL: Final = 4.0
#: Fractions of pulses at the highest and lowest trim beyond which the rise is not within the trims.
_BOTTOM, _TOP = 0.1, 0.9
#: Hits for one pulse from which a channel fires by itself, so that its hits tell nothing about pulses.
_BY_ITSELF: Final = 1.5
#: Channels whose s-curves the picture shows.
_DRAWN: Final = 5
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
    pulses at each. Channels without a good s-curve are measured again, up to twice, because boards can lose
    messages: at a higher or lower global threshold if their rise is not within the trims. Other triggers are off. The
    registers of the chips are restored. A channel is bad without a complete s-curve, or with a noise above MOST_NOISE
    (electrons). PULSE_MV {chip: [mV, ...]}: height of one count of the pulser's DAC, as `gain` measures it.

    Result: "chips" {chip: {"threshold", "threshold_error" (mV), at which half of the pulses are seen; "noise_mv",
    "noise_mv_error"; "noise", "noise_error" (electrons); "baseline" (mV, threshold at the pedestal, with PULSE_MV)}},
    each a list with a value for each channel, None where the data do not tell; "noise" is also None where the s-curve
    is steeper than the trims tell. Thresholds are VDDA_MV/256 a step, plus TRIM_MV a trim, and electrons come from
    UV_PER_ELECTRON (µV for one electron): none of them is measured. "thresholds" {chip: global threshold of the first
    scan}; "repeated": number of channels that were measured again; "bad", "disable", "limits" as of pedestal;
    "saturated" {io_channel: number of measurements} that were not used, because the io_channel sent as much as its line
    carries. With DIRECTORY, on the producer's machine: "files", the result as JSON and a picture.
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
        scan.find_thresholds(start)
        scan.measure(scan.base, ~off, "trims")
        curves, repeated = scan.fit(), np.zeros_like(off)
        for _ in range(_REPEATS):
            again = scan.measure_again((np.isnan(curves.midpoint) | (curves.excess > _DOUBTFUL)) & ~off)
            if not again.any():
                break
            repeated |= again
            curves = scan.fit()
    trim, trim_error, width, width_error, _ = curves
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
        "thresholds": dict(zip(selected.keys, scan.base.tolist(), strict=True)),
        "repeated": int(repeated.sum()),
        "saturated": scan.saturated,
        "assumed": {"vdda_mv": vdda_mv, "trim_mv": trim_mv, "uv_per_electron": uv_per_electron},
    }
    found = int((~np.isnan(threshold) & ~off).sum())
    title = f"s-curves of {found:,} of {int((~off).sum()):,} channels"
    drawing = _Drawing(scan, curves, off, vdda_mv / COUNTS, trim_mv)
    report.write(directory, result, title, drawing.draw)
    return controller, result


class _Scan:
    """Counts the pulses that channels see. `seen`, `sent`: shape (chips, channels, `trims`); `sent` is 0 where nothing
    is known. `base`: global thresholds of the first scan, shape (chips,). `threshold`: the global threshold at which a
    channel was measured, shape (chips, channels)."""

    def __init__(
        self, chips: Chips, off: Flags, trims: NDArray[Any], amplitude: int, pulses: int, info: Callable[..., None]
    ) -> None:
        self.chips, self._off, self.trims = chips, off, trims
        self._amplitude, self._pulses, self._info = amplitude, pulses, info
        self.seen = np.zeros((*off.shape, len(trims)), np.int64)
        self.sent = np.zeros_like(self.seen)
        self.base = np.zeros(len(chips), np.int64)
        self.threshold = np.zeros(off.shape, np.int64)
        self.saturated: dict[str, int] = {}

    def find_thresholds(self, start: int) -> None:
        """Find `base`: the lowest threshold of each chip at which less than half of its channels see the pulses."""
        chips, open_ = self.chips, ~self._off
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
        self.base = threshold

    def measure(self, threshold: NDArray[np.int64], part: Flags, title: str) -> None:
        """Count the pulses that the channels in `part` see at each trim, with all others masked.

        Trims below those at which all these channels have seen all pulses twice are left out.
        """
        chips = self.chips
        chips.set(threshold=threshold)
        self.threshold = np.where(part, threshold[:, None], self.threshold)
        self.seen[part], self.sent[part] = 0, 0
        pulser = Pulser(chips, ~part)
        other_trims = chips.get("trim")  # of masked channels: they stay, because each trim is a word to its chip
        complete = np.zeros(part.shape, np.int64)
        for at, trim in enumerate(self.trims.tolist()):
            self._info(title, at, len(self.trims))
            chips.set(trim=np.where(part, trim, other_trims))
            measured = pulser.send(self._amplitude, self._pulses)
            self._count(measured.saturated)
            usable = part & ~measured.full & (measured.hits <= _BY_ITSELF * self._pulses) & (measured.left_out == 0)
            self.seen[..., at] = np.where(part, measured.hits, self.seen[..., at])
            self.sent[..., at] = np.where(part, np.where(usable, self._pulses, 0), self.sent[..., at])
            complete = np.where(usable & (measured.hits >= self._pulses), complete + 1, 0)
            if (complete[part] >= _COMPLETE).all():
                break

    def fit(self) -> SCurves:
        """Fit the s-curves; the values have shape (chips, channels)."""
        size = self._off.size, len(self.trims)
        curves = fit_s_curves(self.trims, self.seen.reshape(size), self.sent.reshape(size))
        return SCurves(*(part.reshape(self._off.shape) for part in curves))

    def measure_again(self, part: Flags) -> Flags:
        """Measure those of these channels again that see pulses at all. Returns them, of the same shape."""
        threshold = np.clip(self.threshold + self._moves(), 0, 255)
        shifts = threshold - self.base[:, None]
        measured = np.zeros_like(part)
        for shift in np.unique(shifts[part]).tolist():
            moved = np.clip(self.base + shift, 0, 255)
            chosen = self._responding(moved, part & (shifts == shift))
            if chosen.any():
                self.measure(moved, chosen, f"{int(chosen.sum())} channels again, at thresholds {shift:+d}")
            measured |= chosen
        return measured

    def _moves(self) -> NDArray[np.int64]:
        """Return the steps by which each channel's global threshold must move, so that its rise is within the trims.

        A scan that ended before the lowest trim is complete there.
        """
        known = self.sent > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            fraction = np.where(known, self.seen / self.sent, np.nan)
        highest = known.argmax(-1)
        lowest = len(self.trims) - 1 - known[..., ::-1].argmax(-1)
        top, bottom = (np.take_along_axis(fraction, at[..., None], -1)[..., 0] for at in (highest, lowest))
        return np.where(top > _BOTTOM, _MOVE, np.where(bottom < _TOP, -_MOVE, 0))

    def _responding(self, threshold: NDArray[np.int64], part: Flags) -> Flags:
        """Return which of these channels see pulses at the lowest trim: dead channels would take as long as others."""
        if not part.any():
            return part
        self.chips.set(threshold=threshold, trim=np.where(part, 0, self.chips.get("trim")))
        measured = Pulser(self.chips, ~part).send(self._amplitude, _FEW)
        return part & (measured.hits > 0)

    def _count(self, saturated: list[str]) -> None:
        for line in saturated:
            self.saturated[line] = self.saturated.get(line, 0) + 1


class _Drawing(NamedTuple):
    """Draws s-curves of single channels against the threshold, in mV: `step_mv` for a step, `trim_mv` for a trim."""

    scan: _Scan
    curves: SCurves
    off: Flags
    step_mv: float
    trim_mv: float

    def draw(self, left: Any, right: Any) -> None:
        """Draw curves from the lowest to the highest noise, and curves that are not complete."""
        width = self.curves.width
        known = np.argwhere(~np.isnan(width) & ~self.off)
        order = known[np.argsort(width[tuple(known.T)])]
        chosen = order[np.unique(np.linspace(0, len(order) - 1, _DRAWN).round().astype(int))] if len(order) else order
        missing = np.argwhere(np.isnan(self.curves.midpoint) & ~self.off)
        self._draw_some(left, chosen, "channels from the lowest to the highest noise")
        self._draw_some(right, missing[:_DRAWN], f"{len(missing):,} channels without a complete s-curve")

    def _draw_some(self, axes: Any, channels: NDArray[Any], title: str) -> None:
        scan = self.scan
        for number, (chip, channel) in enumerate(channels.tolist()):
            used = scan.sent[chip, channel] > 0
            sent, trims = scan.sent[chip, channel][used], scan.trims[used]
            fraction = scan.seen[chip, channel][used] / sent
            error = np.sqrt(np.clip(fraction * (1 - fraction), 0, None) / sent)
            zero = scan.threshold[chip, channel] * self.step_mv
            middle, width = self.curves.midpoint[chip, channel], self.curves.width[chip, channel]
            noise = "" if np.isnan(width) else f": {width * self.trim_mv:.1f} mV"
            name, colour = f"{scan.chips.keys[chip]} channel {channel}{noise}", f"C{number}"
            axes.errorbar(zero + trims * self.trim_mv, fraction, error, fmt="o", ms=3, color=colour, label=name)
            if noise:
                fine = np.linspace(_TRIMS[-1], _TRIMS[0], 200)
                axes.plot(zero + fine * self.trim_mv, fraction_seen(fine, middle, width), color=colour, lw=1)
        axes.set(xlabel="threshold [mV]", ylabel="fraction of pulses seen", ylim=(-0.05, 1.25))
        axes.set_title(title, fontsize=10)
        if len(channels):
            axes.legend(fontsize=6, ncols=2, loc="upper right")
        else:
            axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)


registration = {"s_curve": Routine("s_curve", _s_curve)}
