"""What the channels of emulated chips see: pedestals, noise and leakage, and how often that makes packets.

All in mV, in a model that is as simple as the routines allow: a channel sits at its pedestal, with normal noise. Its
discriminator fires at MOST_RATE where the threshold is at or below the pedestal, and above it as exp(-z²/2), z being
the distance in sigmas. Leakage moves it up from the pedestal, until it reaches the threshold or is reset.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.emulators.chips import EmulatedChips

SUPPLY: Final = 1800.0
DAC_STEP: Final = SUPPLY / 256
TRIM_STEP: Final = 1.45
#: What a count of a falling step of the test pulse DAC adds: about one count of an 8-bit ADC, as it is at power-up.
PULSE_STEP: Final = 3.9
#: References of the ADC of v1 chips, which have no registers for them; the power-up values of later ones.
VCM, VREF = 77 * DAC_STEP, 219 * DAC_STEP
MOST_RATE: Final = 10_000.0  # self triggers/s of a channel
HOT: Final = 10.0  # times the noise of others
TICKS: Final = 10_000_000

NATURAL, EXTERNAL, CROSS, PERIODIC = range(4)


class Channels:
    """What the seed gives each channel; shape (chips, channels). `pedestal`, `noise` mV, `offset` of the threshold mV,
    `leakage` mV/s; `working` is False for dead ones."""

    def __init__(self, chips: int, channels: int, seed: list[int]) -> None:
        random = np.random.default_rng(seed)
        shape = chips, channels
        self.pedestal = random.normal(640.0, 8.0, shape)
        self.noise = random.uniform(2.0, 4.0, shape)
        self.offset = random.normal(0.0, 4.0, shape)
        self.leakage = random.exponential(20.0, shape)
        self.working = np.ones(shape, np.bool_)


class Noise:
    """`rates`: self triggers/s of each channel, with the registers that the chips have; see `update()`. `share`: which
    part of its self triggers finds a way, of each chip; see `carry()`."""

    def __init__(self, chips: EmulatedChips, channels: Channels, seed: list[int]) -> None:
        self.chips = chips
        self.channels = channels
        shape = channels.pedestal.shape
        self._channels_each = chips.map.channels
        self.rates = np.zeros(shape)
        self._leaking = np.zeros(shape)  # the part of it that leakage makes
        self._threshold = np.zeros(shape)
        self._scale = np.zeros((shape[0], 2))  # ADC: mV at 0, counts per mV
        self._periods = np.zeros(shape[0], np.int64)  # ticks between periodic triggers, 0: none
        self._masks = {name: np.ones(shape, np.bool_) for name in ("periodic", "external", "cross", "pulse")}
        self.share = np.ones(shape[0])
        self._sums = np.zeros(1)
        self._crowded = 0.0  # self triggers/s that find none, of chips that have one
        self._top = 256 if chips.asic not in ("1", "3") else 1024
        self._random = np.random.default_rng(seed)

    def update(self) -> bool:
        """Look at the registers that have changed; whether there were any."""
        (which,) = np.nonzero(self.chips.changed)
        if not len(which):
            return False
        self.chips.changed[which] = 0
        registers, fields = self.chips.registers[which], self.chips.map.fields

        def value(name: str, missing: int = 0) -> NDArray[np.int64]:
            field = fields.get(name)
            return np.full(len(which), missing) if field is None else field.values(registers)

        def channels(name: str, missing: int) -> NDArray[np.bool_]:
            field = fields.get(name)
            shape = len(which), self._channels_each
            return (np.full(shape, missing) if field is None else field.values(registers)).astype(np.bool_)

        seen = self.channels
        on = self.chips.alive[which, None] & channels("csa_enable", 1) & seen.working[which]
        threshold = (
            value("threshold_global")[:, None] * DAC_STEP + fields["pixel_trim_dac"].values(registers) * TRIM_STEP
        )
        threshold = threshold + seen.offset[which]
        above = threshold - seen.pedestal[which]
        rates = MOST_RATE * np.exp(-(np.maximum(above / seen.noise[which], 0.0) ** 2) / 2)
        reset_after = value("periodic_reset_cycles")[:, None] / TICKS
        never = value("enable_periodic_reset").astype(np.bool_)[:, None] & (seen.leakage[which] * reset_after < above)
        leaking = np.where(never, 0.0, seen.leakage[which] / np.maximum(above, 1.0))
        open_ = on & ~channels("channel_mask", 0)
        self._leaking[which] = np.where(open_ & (above > 0), leaking, 0.0)
        self.rates[which] = np.where(open_, np.minimum(rates + leaking, MOST_RATE), 0.0)
        self._threshold[which] = threshold
        low, high = (value(name, default) * DAC_STEP for name, default in (("vcm_dac", 77), ("vref_dac", 219)))
        self._scale[which, 0] = low
        self._scale[which, 1] = self._top / np.maximum(high - low, 1.0)
        cycles = value("periodic_trigger_cycles")
        self._periods[which] = np.where(value("enable_periodic_trigger") > 0, cycles, 0)
        self._masks["periodic"][which] = channels("periodic_trigger_mask", 1) | ~on
        self._masks["external"][which] = channels("external_trigger_mask", 1) | ~on
        crossing = value("enable_cross_trigger").astype(np.bool_)[:, None]
        self._masks["cross"][which] = channels("cross_trigger_mask", 0) | ~crossing | ~on
        self._masks["pulse"][which] = channels("csa_testpulse_enable", 1) | channels("channel_mask", 0) | ~on
        self.carry(self.share)
        return True

    def carry(self, share: NDArray[np.float64]) -> None:
        """From now on this part of the self triggers of each chip finds a way, and the others are lost."""
        self.share = share
        self._sums = np.cumsum(self.rates * share[:, None])
        self._crowded = float((self.rates.sum(1) * (1 - share))[share > 0].sum())

    @property
    def busy(self) -> bool:
        """Whether anything may come by itself."""
        return bool(self._sums[-1] > 0 or self._periods.any())

    def hits(self, since: int, now: int, most: int) -> tuple[NDArray[Any], int, int]:
        """Packets of ticks `since` to `now`: dtype HIT, sorted, at most `most`; how many found no way, and how many
        more than that there would be."""
        parts = [self._natural(since, now, most)]
        lost = int(self._random.poisson(self._crowded * (now - since) / TICKS))
        if self._periods.any():
            parts.append(self._periodic(since, now, most))
        elif not len(parts[0][0]):
            return parts[0][0], lost, parts[0][1]
        natural = parts[0][0]
        if not self._masks["cross"].all():
            parts.append((self._cross(natural), 0))
        found = np.concatenate([part[0] for part in parts])
        found = found[np.argsort(found["tick"], kind="stable")]
        return found[:most], lost, sum(part[1] for part in parts) + max(0, len(found) - most)

    def external(self, tick: int) -> NDArray[Any]:
        """An external trigger comes to all chips."""
        chip, channel = np.nonzero(~self._masks["external"])
        return self._sampled(chip, channel, tick, EXTERNAL)

    def pulse(self, chip: int, step: int, tick: int) -> NDArray[Any]:
        """The test pulse DAC of a chip falls by `step` counts."""
        (channel,) = np.nonzero(~self._masks["pulse"][chip])
        height = self.channels.pedestal[chip, channel] + step * PULSE_STEP
        height += self._random.normal(0.0, self.channels.noise[chip, channel])
        fires = height > self._threshold[chip, channel]
        return self._made(np.full(int(fires.sum()), chip), channel[fires], tick, NATURAL, height[fires])

    def _natural(self, since: int, now: int, most: int) -> tuple[NDArray[Any], int]:
        total = float(self._sums[-1])
        n = int(self._random.poisson(total * (now - since) / TICKS)) if total > 0 else 0
        if not n:
            return np.zeros(0, HIT), 0
        lost = max(0, n - most)
        places = np.searchsorted(self._sums, self._random.random(n - lost) * total, side="right")
        chip, channel = np.divmod(np.minimum(places, self.rates.size - 1), self._channels_each)
        ticks = np.sort(self._random.integers(since, now, n - lost))
        height = self._random.normal(self.channels.pedestal[chip, channel], self.channels.noise[chip, channel])
        leaked = self._random.random(n - lost) * self.rates[chip, channel] < self._leaking[chip, channel]
        height = np.where(leaked, self._threshold[chip, channel], height)
        return self._made(chip, channel, ticks, NATURAL, height), lost

    def _periodic(self, since: int, now: int, most: int) -> tuple[NDArray[Any], int]:
        (chips,) = np.nonzero(self._periods)
        periods = self._periods[chips]
        times = now // periods - since // periods
        each = times * (~self._masks["periodic"][chips]).sum(1)
        fit = np.cumsum(each) <= most
        lost = int(each[~fit].sum())
        chips, periods, times = chips[fit], periods[fit], times[fit]
        chip = np.repeat(chips, times)
        nth = np.arange(len(chip)) - np.repeat(np.cumsum(times) - times, times)
        ticks = (np.repeat(since // periods, times) + 1 + nth) * np.repeat(periods, times)
        event, channel = np.nonzero(~self._masks["periodic"][chip])
        return self._sampled(chip[event], channel, ticks[event], PERIODIC), lost

    def _cross(self, natural: NDArray[Any]) -> NDArray[Any]:
        """All channels of a chip that has hit are sampled with it."""
        event, channel = np.nonzero(~self._masks["cross"][natural["chip"]])
        other = channel != natural["channel"][event]
        event, channel = event[other], channel[other]
        return self._sampled(natural["chip"][event], channel, natural["tick"][event], CROSS)

    def _sampled(self, chip: NDArray[Any], channel: NDArray[Any], ticks: Any, trigger: int) -> NDArray[Any]:
        height = self._random.normal(self.channels.pedestal[chip, channel], self.channels.noise[chip, channel])
        return self._made(chip, channel, ticks, trigger, height)

    def _made(
        self, chip: NDArray[Any], channel: NDArray[Any], ticks: Any, trigger: int, height: NDArray[Any]
    ) -> NDArray[Any]:
        hits = np.empty(len(chip), HIT)
        hits["chip"], hits["channel"], hits["tick"], hits["trigger"] = chip, channel, ticks, trigger
        low, scale = self._scale[chip].T
        hits["adc"] = np.clip((height - low) * scale, 0, self._top - 1)
        return hits

    def counts_per_mv(self) -> float:
        """Of the ADC with the references that it has at power-up."""
        return self._top / (VREF - VCM)


#: What a channel has seen; `chip` is its number on the board, `tick` of the board's clock.
HIT: Final = np.dtype([("chip", "<i4"), ("channel", "<i4"), ("tick", "<i8"), ("adc", "<i8"), ("trigger", "<i8")])
