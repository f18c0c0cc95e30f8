"""Signals of emulated channels: pedestals, noise and leakage, and the triggers that they cause.

The model, in mV, is as simple as the routines allow. A channel is at its pedestal, with normal noise. Its discriminator
fires at MAX_RATE if the threshold is at or below the pedestal, and at MAX_RATE exp(-z²/2) if it is z sigmas above.
Leakage moves the channel up from the pedestal until it reaches the threshold or is reset.

A trigger gives adc_burst_length samples, of which the first is at the height that fired, and the others at its level
with noise of their own. The hit veto drops forced samples of v2 chips that are below the threshold.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.emulators.chips import EmulatedChips

#: Steps of the DACs, in mV per count.
DAC_STEP: Final = 1800.0 / 256
TRIM_STEP: Final = 1.45
#: Signal in mV per count of a falling step of the test pulse DAC: about one count of an 8-bit ADC at power-up.
PULSE_STEP: Final = 3.9
#: References of the ADC in mV: power-up values, and those of v1 chips, which have no registers for them.
VCM, VREF = 77 * DAC_STEP, 219 * DAC_STEP
#: Maximum self triggers/s of a channel.
MAX_RATE: Final = 10_000.0
#: Noise of a hot channel, in multiples of that of others.
HOT: Final = 10.0
#: Ticks of the board's clock per second.
TICKS: Final = 10_000_000
#: Bits of a board's ticks in numbers that also have a chip, above them.
TICK_BITS: Final = 44
#: Trigger types of v2 chips and later ones.
NATURAL, EXTERNAL, CROSS, PERIODIC = range(4)
#: Words that a chip keeps until its line carries them.
FIFO: Final = 2_048
#: Ticks of the chips' clock from one sample of a burst to the next, without those of adc_hold_delay.
CONVERSION: Final = 10
#: One sample of a channel. `chip`: its number on the board. `tick`: of the board's clock. `first`: of its burst.
#: `full`: the FIFO of the chip has no room for the rest of the burst.
HIT: Final = np.dtype(
    [
        ("chip", "<i4"),
        ("channel", "<i4"),
        ("tick", "<i8"),
        ("adc", "<i8"),
        ("trigger", "<i8"),
        ("first", "?"),
        ("full", "?"),
    ]
)


class Channels:
    """Properties that the seed gives to each channel, of shape (chips, channels).

    `pedestal`, `noise` and `offset` (of the threshold) in mV, `leakage` in mV/s; `working` is False for dead channels.
    """

    def __init__(self, chips: int, channels: int, seed: list[int]) -> None:
        random = np.random.default_rng(seed)
        shape = chips, channels
        self.pedestal = random.normal(640.0, 8.0, shape)
        self.noise = random.uniform(2.0, 4.0, shape)
        self.offset = random.normal(0.0, 4.0, shape)
        self.leakage = random.exponential(20.0, shape)
        self.working = np.ones(shape, np.bool_)


class Noise:
    """Generates the hits of a board's chips.

    `rates`: self triggers/s, shape (chips, channels), as of the last `update()`. `share`: fraction of its self triggers
    that the io_channel of each chip carries. `marks`, `diagnostics`: chips that mark the first packet of a burst, and
    those that send the number of words in their FIFOs. `crowded`: samples lost because a burst did not fit into a FIFO.
    """

    def __init__(self, chips: EmulatedChips, channels: Channels, seed: list[int]) -> None:
        self.chips = chips
        self.channels = channels
        shape = channels.pedestal.shape
        self._channels_per_chip = chips.map.channels
        self.rates = np.zeros(shape)
        self._leakage_rates = np.zeros(shape)  # the part of `rates` caused by leakage
        self._threshold = np.zeros(shape)
        self._scale = np.zeros((shape[0], 2))  # ADC: mV at 0, counts per mV
        self._periods = np.zeros(shape[0], np.int64)  # ticks between periodic triggers, 0: none
        self._rolling = np.zeros(shape[0], np.bool_)  # a periodic trigger samples one channel, in turn
        self._masks = {name: np.ones(shape, np.bool_) for name in ("periodic", "external", "cross", "pulse")}
        self._samples = np.ones(shape[0], np.int64)  # in a burst
        self._spacing = np.full(shape[0], CONVERSION)  # ticks from one to the next
        self._hit_veto = np.zeros(shape[0], np.bool_)
        self._periodic_veto = np.zeros(shape[0], np.bool_)
        self.marks = np.ones(shape[0], np.bool_)
        self.diagnostics = np.zeros(shape[0], np.bool_)
        self.crowded = 0
        self.share = np.ones(shape[0])
        self._cumulative_rates = np.zeros(1)
        self._lost_rate = 0.0  # self triggers/s that io_channels do not carry, without chips that have no io_channel
        self._adc_counts = 256 if chips.asic not in ("1", "3") else 1024
        self._random = np.random.default_rng(seed)

    def update(self) -> bool:
        """Update rates and masks of the chips whose registers have changed. Returns whether there were any."""
        (changed,) = np.nonzero(self.chips.changed)
        if not len(changed):
            return False
        self.chips.changed[changed] = 0
        registers, fields = self.chips.registers[changed], self.chips.map.fields

        def value(name: str, default: int = 0) -> NDArray[np.int64]:
            field = fields.get(name)
            return np.full(len(changed), default) if field is None else field.values(registers)

        def flags(name: str, default: int) -> NDArray[np.bool_]:
            field = fields.get(name)
            shape = len(changed), self._channels_per_chip
            return (np.full(shape, default) if field is None else field.values(registers)).astype(np.bool_)

        channels = self.channels
        on = self.chips.sensing[changed, None] & flags("csa_enable", 1) & channels.working[changed]
        threshold = (
            value("threshold_global")[:, None] * DAC_STEP + fields["pixel_trim_dac"].values(registers) * TRIM_STEP
        )
        threshold = threshold + channels.offset[changed]
        distance = threshold - channels.pedestal[changed]
        noise_rates = MAX_RATE * np.exp(-(np.maximum(distance / channels.noise[changed], 0.0) ** 2) / 2)
        leakage = channels.leakage[changed]
        reset_period = value("periodic_reset_cycles")[:, None] / TICKS
        # a rolling reset resets one channel, in turn
        reset_period = np.where(
            value("enable_rolling_periodic_reset")[:, None] > 0, reset_period * self._channels_per_chip, reset_period
        )
        reset_in_time = value("enable_periodic_reset").astype(np.bool_)[:, None] & (leakage * reset_period < distance)
        leakage_rates = np.where(reset_in_time, 0.0, leakage / np.maximum(distance, 1.0))
        triggering = on & ~flags("channel_mask", 0)
        self._leakage_rates[changed] = np.where(triggering & (distance > 0), leakage_rates, 0.0)
        samples = np.maximum(value("adc_burst_length"), 1)
        spacing = value("adc_hold_delay") + CONVERSION
        most = np.minimum(MAX_RATE, TICKS / (samples * spacing))[:, None]  # no trigger while a channel converts
        self.rates[changed] = np.where(triggering, np.minimum(noise_rates + leakage_rates, most), 0.0)
        self._samples[changed], self._spacing[changed] = samples, spacing
        v2 = self.chips.asic not in ("1", "3")
        self._hit_veto[changed] = value("enable_hit_veto").astype(np.bool_) & v2
        self._periodic_veto[changed] = value("enable_periodic_trigger_veto") > 0
        self.marks[changed] = value("mark_first_packet", 1) > 0
        self.diagnostics[changed] = value("enable_fifo_diagnostics").astype(np.bool_) & v2
        self._threshold[changed] = threshold
        low, high = (value(name, default) * DAC_STEP for name, default in (("vcm_dac", 77), ("vref_dac", 219)))
        self._scale[changed, 0] = low
        self._scale[changed, 1] = self._adc_counts / np.maximum(high - low, 1.0)
        cycles = value("periodic_trigger_cycles")
        self._periods[changed] = np.where(value("enable_periodic_trigger") > 0, cycles, 0)
        self._rolling[changed] = value("enable_rolling_periodic_trigger") > 0
        self._masks["periodic"][changed] = flags("periodic_trigger_mask", 1) | ~on
        self._masks["external"][changed] = flags("external_trigger_mask", 1) | ~on
        cross_trigger = value("enable_cross_trigger").astype(np.bool_)[:, None]
        self._masks["cross"][changed] = flags("cross_trigger_mask", 0) | ~cross_trigger | ~on
        self._masks["pulse"][changed] = flags("csa_testpulse_enable", 1) | flags("channel_mask", 0) | ~on
        self.set_share(self.share)
        return True

    def set_share(self, share: NDArray[np.float64]) -> None:
        """Set the fraction of each chip's self triggers that its io_channel carries; the others are lost."""
        self.share = share
        self._cumulative_rates = np.cumsum(self.rates * share[:, None])
        self._lost_rate = float((self.load() * (1 - share))[share > 0].sum())

    def load(self) -> NDArray[np.float64]:
        """Return the packets/s of each chip's self triggers."""
        packets: NDArray[np.float64] = self.rates.sum(1) * self._samples
        return packets

    @property
    def busy(self) -> bool:
        """Whether self triggers or periodic triggers are possible."""
        return bool(self._cumulative_rates[-1] > 0 or self._periods.any())

    def hits(self, start: int, end: int, limit: int) -> tuple[NDArray[Any], int, int]:
        """Generate at most `limit` hits of ticks `start` to `end`, of dtype HIT, sorted by tick.

        Returns them, the number of hits that the io_channels did not carry, and the number of those beyond the limit.
        """
        natural, excess = self._natural(start, end, limit)
        lost = int(self._random.poisson(self._lost_rate * (end - start) / TICKS))
        parts = [natural]
        if self._periods.any():
            periodic, excess_periodic = self._periodic(start, end, limit)
            parts.append(periodic)
            excess += excess_periodic
        elif not len(natural):
            return natural, lost, excess
        if not self._masks["cross"].all():
            parts.append(self._cross(natural))
        hits = np.concatenate(parts)
        hits = hits[np.argsort(hits["tick"], kind="stable")]
        return hits[:limit], lost, excess + max(0, len(hits) - limit)

    def external(self, tick: int) -> NDArray[Any]:
        """Return the hits of an external trigger to all chips."""
        chip, channel = np.nonzero(~self._masks["external"])
        return self._sample(chip, channel, tick, EXTERNAL)

    def pulse(self, chip: int, step: int, tick: int) -> NDArray[Any]:
        """Return the hits of a falling step of a chip's test pulse DAC, in counts."""
        (channel,) = np.nonzero(~self._masks["pulse"][chip])
        level = self.channels.pedestal[chip, channel] + step * PULSE_STEP
        height = level + self._random.normal(0.0, self.channels.noise[chip, channel])
        fires = height > self._threshold[chip, channel]
        fired = np.full(int(fires.sum()), chip), channel[fires]
        return self._digitize(*fired, tick, NATURAL, height[fires], level[fires])

    def _natural(self, start: int, end: int, limit: int) -> tuple[NDArray[Any], int]:
        total = float(self._cumulative_rates[-1])
        n = int(self._random.poisson(total * (end - start) / TICKS)) if total > 0 else 0
        if not n:
            return np.zeros(0, HIT), 0
        fit = min(n, limit)
        positions = np.searchsorted(self._cumulative_rates, self._random.random(fit) * total, side="right")
        chip, channel = np.divmod(np.minimum(positions, self.rates.size - 1), self._channels_per_chip)
        samples = np.cumsum(self._samples[chip])
        fit = int(np.searchsorted(samples, limit, side="right"))
        excess = (int(samples[-1]) * n // len(samples) if len(samples) else n) - int(samples[fit - 1] if fit else 0)
        chip, channel = chip[:fit], channel[:fit]
        ticks = np.sort(self._random.integers(start, end, fit))
        level = self.channels.pedestal[chip, channel]
        height = self._random.normal(level, self.channels.noise[chip, channel])
        leaked = self._random.random(fit) * self.rates[chip, channel] < self._leakage_rates[chip, channel]
        level = np.where(leaked, self._threshold[chip, channel], level)
        height = np.where(leaked, level, height)
        return self._digitize(chip, channel, ticks, NATURAL, height, level), excess

    def _periodic(self, start: int, end: int, limit: int) -> tuple[NDArray[Any], int]:
        (chips,) = np.nonzero(self._periods)
        periods = self._periods[chips]
        triggers = end // periods - start // periods
        enabled = (~self._masks["periodic"][chips]).sum(1)
        channels = np.where(self._rolling[chips], np.minimum(enabled, 1), enabled)
        hits = triggers * channels * np.minimum(self._samples[chips], FIFO // np.maximum(channels, 1))
        fit = np.cumsum(hits) <= limit
        excess = int(hits[~fit].sum())
        chips, periods, triggers = chips[fit], periods[fit], triggers[fit]
        chip = np.repeat(chips, triggers)
        nth = np.arange(len(chip)) - np.repeat(np.cumsum(triggers) - triggers, triggers)
        ticks = (np.repeat(start // periods, triggers) + 1 + nth) * np.repeat(periods, triggers)
        rolling = self._rolling[chip]
        whole, one = np.flatnonzero(~rolling), np.flatnonzero(rolling)
        event, channel = np.nonzero(~self._masks["periodic"][chip[whole]])
        turn = ticks[one] // np.repeat(periods, triggers)[one] % self._channels_per_chip
        taken = ~self._masks["periodic"][chip[one], turn]
        event = np.concatenate([whole[event], one[taken]])
        channel = np.concatenate([channel, turn[taken]])
        return self._sample(chip[event], channel, ticks[event], PERIODIC), excess

    def _cross(self, natural: NDArray[Any]) -> NDArray[Any]:
        """Sample the other channels of each chip with a hit."""
        natural = natural[natural["first"]]
        event, channel = np.nonzero(~self._masks["cross"][natural["chip"]])
        other = channel != natural["channel"][event]
        event, channel = event[other], channel[other]
        return self._sample(natural["chip"][event], channel, natural["tick"][event], CROSS)

    def _sample(self, chip: NDArray[Any], channel: NDArray[Any], ticks: Any, trigger: int) -> NDArray[Any]:
        """Sample channels that a trigger forces, except those that the chips' vetoes leave out."""
        level = self.channels.pedestal[chip, channel]
        height = self._random.normal(level, self.channels.noise[chip, channel])
        fires = height >= self._threshold[chip, channel]
        vetoed = self._hit_veto[chip] & ~fires
        if trigger == PERIODIC:
            vetoed |= self._periodic_veto[chip] & fires
        if vetoed.any():
            kept = ~vetoed
            chip, channel, height, level = chip[kept], channel[kept], height[kept], level[kept]
            ticks = ticks[kept] if isinstance(ticks, np.ndarray) else ticks
        return self._digitize(chip, channel, ticks, trigger, height, level)

    def _digitize(
        self,
        chip: NDArray[Any],
        channel: NDArray[Any],
        ticks: Any,
        trigger: int,
        height: NDArray[Any],
        level: NDArray[Any],
    ) -> NDArray[Any]:
        """Return the bursts of these triggers: their first samples at `height`, the others at `level` with noise (mV).

        If channels of a chip begin together, each takes only as many samples as the chip's FIFO has room for.
        """
        hits = np.empty(len(chip), HIT)
        hits["chip"], hits["channel"], hits["tick"], hits["trigger"] = chip, channel, ticks, trigger
        hits["first"], hits["full"] = True, False
        if (self._samples[chip] > 1).any():
            hits, height = self._burst(hits, height, level)
        low, scale = self._scale[hits["chip"]].T
        hits["adc"] = np.clip((height - low) * scale, 0, self._adc_counts - 1)
        return hits

    def _burst(
        self, hits: NDArray[Any], height: NDArray[Any], level: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return all samples of bursts that begin with these hits, and their heights."""
        chip, channel = hits["chip"], hits["channel"]
        events = chip.astype(np.int64) << TICK_BITS | hits["tick"]
        _, event, together = np.unique(events, return_inverse=True, return_counts=True)
        samples = np.minimum(self._samples[chip], FIFO // together[event])
        self.crowded += int((self._samples[chip] - samples).sum())
        hits["full"] = samples < self._samples[chip]
        burst = np.repeat(np.arange(len(hits)), samples)
        nth = np.arange(len(burst)) - np.repeat(np.cumsum(samples) - samples, samples)
        noisy = self._random.normal(level[burst], self.channels.noise[chip, channel][burst])
        hits = hits[burst]
        hits["first"] = nth == 0
        hits["tick"] += nth * self._spacing[hits["chip"]]
        return hits, np.where(hits["first"], height[burst], noisy)

    def counts_per_mv(self) -> float:
        """Return the ADC counts per mV with the references of power-up."""
        return self._adc_counts / (VREF - VCM)
