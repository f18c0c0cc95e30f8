"""The tables of the monitor's packet_rate(): exact rates of io_groups, shared out by what was seen of their packets."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.blocks import Totals
from larpixdaq.monitor.tracks import SHORTEST, Track
from larpixdaq.schema import IO_GROUPS as N_IO_GROUPS

#: Exact numbers of an io_group: packets, rows, bad_parity, unknown, dropped.
TOTALS: Final = Totals.__struct_fields__[1:]
_KEY: Final = ("io_group", "io_channel", "chip_id", "channel_id")
_COUNTED: Final = ("packets", "data", "bad_parity", "local_half", "local_full", "shared_half", "shared_full")


def _table(keys: int, *columns: str) -> np.dtype[Any]:
    kinds = {"rate": "<f8", "mean_rate": "<f8", "seen": "<f8"}
    return np.dtype([*((name, "u1") for name in _KEY[:keys]), *((name, kinds.get(name, "<u8")) for name in columns)])


_SEEN: Final = tuple(f"seen_{name}" for name in _COUNTED)
IO_GROUPS: Final = _table(1, "rate", "mean_rate", *TOTALS, "seen", *_SEEN)
IO_CHANNELS: Final = _table(2, "rate", "mean_rate", *_SEEN)
CHIPS: Final = _table(3, "rate", "mean_rate", *_SEEN)
CHANNELS: Final = _table(4, "rate", "mean_rate", "seen_packets")


def io_groups(tracks: Collection[Track], now: float) -> tuple[NDArray[Any], float]:
    """Rates and totals of all producers and epochs, dtype IO_GROUPS, and the seconds that they cover.

    The columns of what was seen are left 0; `now` is the monitor's monotonic clock.
    """
    spans = [track.span(now) for track in tracks]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0
    numbers = sorted({io_group for track in tracks for io_group in track.totals})
    table = np.zeros(len(numbers), IO_GROUPS)
    table["io_group"] = numbers
    entry = {number: table[i : i + 1] for i, number in enumerate(numbers)}
    for track in tracks:
        for io_group, total in track.totals.items():
            for name in TOTALS:
                entry[io_group][name] += np.uint64(getattr(total, name))
            since_start = total.packets - track.baseline.get(io_group, 0)
            entry[io_group]["mean_rate"] += since_start / max(seconds, SHORTEST)
        for io_group, rate in track.rates(now).items():
            entry[io_group]["rate"] += rate
    return table, seconds


def rate_tables(
    groups: NDArray[Any],
    seen: NDArray[Any],
    packets: NDArray[np.uint64],
    recent: NDArray[np.uint64],
    channels: bool,
) -> dict[str, NDArray[Any]]:
    """The tables `io_groups`, `io_channels`, `chips` and, if wanted, `channels`, each sorted by its key.

    groups: dtype IO_GROUPS, rates, totals and seen_packets filled in; seen: what Rates.chips() gave; packets and
    recent: packets by [chip, channel], since the start and lately.
    """
    rate, mean_rate = np.zeros((2, N_IO_GROUPS))
    rate[groups["io_group"]] = groups["rate"]
    mean_rate[groups["io_group"]] = groups["mean_rate"]
    group = seen["io_group"]
    per_recent = _ratio(rate, np.bincount(group, recent.sum(axis=1), N_IO_GROUPS))[group]
    per_packet = _ratio(mean_rate, np.bincount(group, seen["packets"], N_IO_GROUPS))[group]

    chips = np.zeros(len(seen), CHIPS)
    for name in _KEY[:3]:
        chips[name] = seen[name]
    for name in _COUNTED:
        chips[f"seen_{name}"] = seen[name]
    chips["rate"] = recent.sum(axis=1) * per_recent
    chips["mean_rate"] = seen["packets"] * per_packet
    groups["seen"] = np.where(groups["packets"], _ratio(groups["seen_packets"], groups["packets"]), 1.0)
    for name in _COUNTED[1:]:
        groups[f"seen_{name}"] = np.bincount(group, seen[name], N_IO_GROUPS)[groups["io_group"]]
    tables = {"io_groups": groups, "io_channels": _io_channels(chips), "chips": _sorted(chips, 3)}
    if channels:
        chip, channel = np.nonzero(packets)
        table = np.zeros(len(chip), CHANNELS)
        for name in _KEY[:3]:
            table[name] = chips[name][chip]
        table["channel_id"] = channel
        table["rate"] = recent[chip, channel] * per_recent[chip]
        table["mean_rate"] = packets[chip, channel] * per_packet[chip]
        table["seen_packets"] = packets[chip, channel]
        tables["channels"] = _sorted(table, 4)
    return tables


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """part / whole, 0 where there is no whole."""
    out = np.zeros(len(part))
    np.divide(part, whole, out=out, where=whole != 0)
    return out


def _packed_key(table: NDArray[Any], keys: int) -> NDArray[np.uint32]:
    packed = np.zeros(len(table), np.uint32)
    for name in _KEY[:keys]:
        packed = packed << np.uint32(8) | table[name]
    return packed


def _sorted(table: NDArray[Any], keys: int) -> NDArray[Any]:
    return table[np.argsort(_packed_key(table, keys))]


def _io_channels(chips: NDArray[Any]) -> NDArray[Any]:
    """The sums over the chips of each io_channel."""
    _, first, index = np.unique(_packed_key(chips, 2), return_index=True, return_inverse=True)
    table = np.zeros(len(first), IO_CHANNELS)
    for name in _KEY[:2]:
        table[name] = chips[name][first]
    for name in ("rate", "mean_rate", *_SEEN):
        np.add.at(table[name], index, chips[name])
    return table
