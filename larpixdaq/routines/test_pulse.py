"""What the channels make of the chips' own test pulses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import NATURAL, Chips, Hits, collect

#: Where the pulser's DAC stands before a pulse, which is its fall.
_HIGH = 255
#: Seconds for which hits may be on their way.
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
    """PULSES test pulses, falls of the pulser's DAC by AMPLITUDE, into CHANNELS (None: all) of CHIPS (None: all), one
    chip after the other.

    Other channels are masked meanwhile, these are not, and triggers other than their own are off; the chips are in the
    end as they were before. The result: "chips", for each, by channel, "pulses" (packets that came) and "mean" (ADC
    counts, None where none came); "left_out": packets that were not looked at; "saturated": io_channels that carried
    all they could, so that packets are missing.
    """
    if not 1 <= amplitude <= _HIGH or pulses < 1:
        raise ValueError(f"amplitude, pulses: expected 1 to {_HIGH} and at least 1, found {amplitude} and {pulses}")
    everyone = Chips(controller, chips)
    wanted = list(range(everyone.channels)) if channels is None else channels
    strangers = [channel for channel in wanted if not 0 <= channel < everyone.channels]
    if strangers:
        raise ValueError(f"channels: expected 0 to {everyone.channels - 1}, found {strangers}")
    off = np.ones(everyone.channels, np.int64)
    off[wanted] = 0
    found: dict[str, Any] = {}
    saturated: set[str] = set()
    left_out = 0
    for number, key in enumerate(everyone.keys):
        send_info(f"chip {key}", number, len(everyone))
        mine = Chips(controller, key)
        with mine.restored(), mine.untriggered():
            mine.set(mask=off[None], testpulse_enable=off[None], testpulse_dac=_HIGH)
            came = _pulsed(controller, mine, amplitude, pulses)
        saturated.update(came.saturated)
        left_out += came.left_out
        hits = came.hits[came.hits["trigger"] == NATURAL]
        n = np.bincount(hits["channel"], minlength=everyone.channels)
        total = np.bincount(hits["channel"], hits["adc"], everyone.channels)
        found[key] = {
            str(channel): {
                "pulses": int(n[channel]),
                "mean": round(float(total[channel] / n[channel]), 3) if n[channel] else None,
            }
            for channel in wanted
        }
    result = {"amplitude": amplitude, "chips": found, "left_out": left_out, "saturated": sorted(saturated)}
    return controller, result


def _pulsed(controller: Any, mine: Chips, amplitude: int, pulses: int) -> Hits:
    """Those of one chip while its DAC falls so often."""

    def fall() -> None:
        for _ in range(pulses):
            mine.set(testpulse_dac=_HIGH - amplitude)
            mine.set(testpulse_dac=_HIGH)

    return collect(controller, mine.keys, _WAIT, act=fall)


registration = {"test_pulse": Routine("test_pulse", _test_pulse, ["chips", "channels", "amplitude", "pulses"])}
