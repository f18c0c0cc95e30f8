"""Response of the channels to the test pulses of their chips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import NATURAL, Chips, Hits, collect

#: Value of the pulser's DAC before a pulse. A pulse is a fall of the DAC.
_HIGH = 255
#: Seconds until the hits of a pulse have arrived.
_WAIT = 0.05


def _test_pulse(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    channels: list[int] | None = None,
    amplitude: int = 30,
    pulses: int = 10,
) -> tuple[Any, dict[str, Any]]:
    """Sends PULSES test pulses to CHANNELS of CHIPS, one chip after the other, and measures the packets.

    CHIPS: a chip key, a list of chip keys, or None for all chips. CHANNELS: a list, or None for all channels. AMPLITUDE
    (1 to 255): counts by which the pulser's DAC falls. Other channels are masked and other triggers are off meanwhile.
    The registers of the chips are restored.

    Result: "chips" {chip: {channel: {"pulses": number of packets, "mean": ADC counts, None without packets}}};
    "left_out", packets that were not analysed; "saturated", io_channels that sent as much as their line carries, so
    that packets are missing.
    """
    if not 1 <= amplitude <= _HIGH or pulses < 1:
        raise ValueError(f"amplitude, pulses: expected 1 to {_HIGH} and at least 1, found {amplitude} and {pulses}")
    selected = Chips(controller, chips)
    wanted = list(range(selected.channels)) if channels is None else channels
    unknown = [channel for channel in wanted if not 0 <= channel < selected.channels]
    if unknown:
        raise ValueError(f"channels: expected 0 to {selected.channels - 1}, found {unknown}")
    masked = np.ones(selected.channels, np.int64)
    masked[wanted] = 0
    by_chip: dict[str, Any] = {}
    saturated: set[str] = set()
    left_out = 0
    for number, key in enumerate(selected.keys):
        send_info(f"chip {key}", number, len(selected))
        chip = Chips(controller, key)
        with chip.restored(), chip.untriggered():
            chip.set(mask=masked[None], testpulse_enable=masked[None], testpulse_dac=_HIGH)
            measured = _pulsed(controller, chip, amplitude, pulses)
        saturated.update(measured.saturated)
        left_out += measured.left_out
        hits = measured.hits[measured.hits["trigger"] == NATURAL]
        n = np.bincount(hits["channel"], minlength=selected.channels)
        total = np.bincount(hits["channel"], hits["adc"], selected.channels)
        by_chip[key] = {
            str(channel): {
                "pulses": int(n[channel]),
                "mean": round(float(total[channel] / n[channel]), 3) if n[channel] else None,
            }
            for channel in wanted
        }
    result = {"amplitude": amplitude, "chips": by_chip, "left_out": left_out, "saturated": sorted(saturated)}
    return controller, result


def _pulsed(controller: Any, chip: Chips, amplitude: int, pulses: int) -> Hits:
    """Returns the hits of one chip while its DAC falls `pulses` times."""

    def fall() -> None:
        for _ in range(pulses):
            chip.set(testpulse_dac=_HIGH - amplitude)
            chip.set(testpulse_dac=_HIGH)

    return collect(controller, chip.keys, _WAIT, act=fall)


registration = {"test_pulse": Routine("test_pulse", _test_pulse)}
