"""Response of the channels to the test pulses of their chips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from larpixdaq.routines import Routine
from larpixdaq.routines.kit import Chips
from larpixdaq.routines.kit.pulses import HIGH, Pulser
from larpixdaq.routines.kit.report import Report, by_chip


def _test_pulse(
    controller: Any,
    send_data: Callable[..., None],
    send_info: Callable[..., None],
    chips: str | list[str] | None = None,
    channels: list[int] | None = None,
    amplitude: int = 30,
    pulses: int = 10,
    leave_off: dict[str, list[int]] | None = None,
    least_seen: float | None = 0.9,
    most_seen: float | None = 1.1,
    raise_by: int = 0,
    directory: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Sends PULSES test pulses to CHANNELS of CHIPS, and measures the packets.

    CHIPS: a chip key, a list of chip keys, or None for all chips. CHANNELS: a list, or None for all channels, without
    LEAVE_OFF {chip: [channel, ...]}. AMPLITUDE (1 to 255): counts by which the pulser's DAC falls. Other channels are
    masked, other triggers are off, and the global thresholds go up by RAISE_BY meanwhile, because near the noise other
    hits come between the pulses. The registers of the chips are restored. A channel is bad that has
    packets for less than LEAST_SEEN of the pulses, or for more than MOST_SEEN.

    Result: "chips" {chip: {channel: {"pulses": number of packets, "mean", "error": ADC counts, None without packets}}};
    "bad", "disable", "limits" as of pedestal; "left_out", packets that were not analysed; "saturated", io_channels that
    sent as much as their line carries, so that packets are missing. With DIRECTORY, on the producer's machine: "files",
    the result as JSON and a picture.
    """
    if not 1 <= amplitude <= HIGH or pulses < 1:
        raise ValueError(f"amplitude, pulses: expected 1 to {HIGH} and at least 1, found {amplitude} and {pulses}")
    selected = Chips(controller, chips)
    wanted = list(range(selected.channels)) if channels is None else channels
    unknown = [channel for channel in wanted if not 0 <= channel < selected.channels]
    if unknown:
        raise ValueError(f"channels: expected 0 to {selected.channels - 1}, found {unknown}")
    off = selected.off(leave_off)
    others = np.ones(selected.channels, np.bool_)
    others[wanted] = False
    with selected.restored(), selected.untriggered():
        selected.raise_thresholds(raise_by)
        send_info(f"{pulses} pulses to {len(selected)} chips", 0, 1)
        measured = Pulser(selected, off | others).send(amplitude, pulses)
    with np.errstate(invalid="ignore"):
        error = measured.std / np.sqrt(measured.hits)
    report = Report("test_pulse", selected.keys, off | others)
    report.add("seen", measured.seen(), "of the pulses", low=least_seen, high=most_seen)
    report.add("mean", measured.mean, "ADC counts")
    found = {
        key: {
            str(channel): {
                "pulses": int(measured.hits[at, channel]),
                "mean": _number(measured.mean[at, channel]),
                "error": _number(error[at, channel]),
            }
            for channel in wanted
            if not off[at, channel]
        }
        for at, key in enumerate(selected.keys)
    }
    result = report.result() | {
        "amplitude": amplitude,
        "chips": found,
        "disable": by_chip(selected.keys, report.bad() | off),
        "left_out": measured.left_out,
        "saturated": measured.saturated,
    }
    report.write(directory, result, f"{pulses} test pulses of {amplitude} DAC counts")
    return controller, result


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 3)


registration = {"test_pulse": Routine("test_pulse", _test_pulse)}
