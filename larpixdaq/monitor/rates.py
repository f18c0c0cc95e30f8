"""Totals and rates of each producer in a run, and the tables of the monitor's packet_rate().

Every block has running totals of its producer, so that rates of io_groups are exact although the monitor skips blocks.
The rate of an io_group is divided among its chips and channels by the numbers of seen packets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any, Final

import numpy as np
from msgspec.structs import astuple
from numpy.typing import NDArray

from larpixdaq.constants import IO_GROUPS, Count
from larpixdaq.errors import ProtocolError
from larpixdaq.protocol.stream import Block, End, Totals

#: Nanoseconds over which the present rate is averaged.
WINDOW_NS: Final = 1_000_000_000
#: Maximum seconds from a row to the arrival of its block. After a longer pause the producer has had no new rows.
MAX_DELAY: Final = 0.1
#: Minimum seconds over which a rate is averaged, because the first packet of a run would have an infinite rate.
MIN_SPAN: Final = 0.1
#: Names of the exact totals of an io_group: packets, rows, bad_parity, unknown, dropped.
TOTALS: Final = Totals.__struct_fields__[1:]
_KEY: Final = ("io_group", "io_channel", "chip_id", "channel_id")
#: Columns of PacketCounters.flags().
_FLAGS: Final = ("bad_parity", "local_half", "local_full", "shared_half", "shared_full")
_COUNTED: Final = ("packets", "data", *_FLAGS)
_SEEN: Final = tuple(f"seen_{name}" for name in _COUNTED)


class OriginTotals:
    """Totals and rates of one producer and epoch in one run.

    `now`: the monitor's monotonic clock in seconds. Times in ns: the clock of the producer's host. The totals are
    assumed to grow evenly from the first row of a block to its last row, and over blocks that were not seen. They are
    constant in the pause between two successive blocks.
    """

    def __init__(self, producer: str, epoch: int) -> None:
        self.producer = producer
        self.epoch = epoch
        self.totals: dict[int, Totals] = {}
        self.seen_rows = 0
        self.skipped_rows = 0
        self.rows_before = 0  # rows made before the first block or end that arrived
        self.skipped_blocks = 0
        self.repeated_blocks = 0
        self.end_kind = ""  # kind of the end record, "" before it
        self.start_ns = 0
        self.last_ns = 0
        self.baseline: dict[int, int] = {}  # packets of each io_group at start_ns; not 0 if the monitor joined later
        self._updated_at: float | None = None
        self._started_at = 0.0  # start_ns on the monitor's clock
        self._next = 0  # sequence
        self._next_row = 0
        self._shift = 0  # ns added to the host's clock, so that it continues after it was set back
        self._points: deque[tuple[int, dict[int, int]]] = deque()  # (ns, packets of each io_group until then)

    def add(self, block: Block, now: float) -> bool:
        """Take the totals of a block. Returns False, and ignores it, if it is not newer than an earlier block."""
        if block.sequence < self._next:
            self.repeated_blocks += 1
            return False
        _check(block.totals, block)
        follows = block.sequence == self._next
        self._skip(block.sequence, block.first_packet)
        self._next, self._next_row = block.sequence + 1, block.first_packet + block.rows
        self.seen_rows += block.rows
        if self._points:
            self._shift = max(self._shift, self.last_ns - block.last_ns)
        if follows:
            self._add_point(block.first_ns + self._shift, self._packets())
        self._add_totals(block.totals, block.last_ns + self._shift, now)
        return True

    def end(self, end: End, now: float) -> None:
        """Take the final counts of the end record."""
        totals = []
        for io_group, *counts in end.counts:
            if len(counts) != len(Count):
                raise ProtocolError(f"end of run {end.run} from {end.producer}: {len(counts)} counts, not {len(Count)}")
            totals.append(Totals.of(io_group, counts))
        _check(totals, end)
        if not self._points:
            self._add_point(end.first_ns, {})
        if end.next >= self._next:
            self._skip(end.next, sum(total.rows - total.dropped for total in totals))
            self._next = end.next + 1
        self.end_kind = end.how
        self._add_totals(totals, max(end.last_ns + self._shift, self.last_ns), now)

    def rates(self, now: float) -> dict[int, float]:
        """Return the packets/s of each io_group over the last second. Without blocks they fall to 0 within 1.1 s."""
        end = self._known_until(now)
        begin = max(end - WINDOW_NS, self.start_ns)
        if end <= begin:
            return {}
        earlier = self._packets_at(begin) if begin > self.start_ns else self.baseline
        seconds = max((end - begin) / 1e9, MIN_SPAN)
        return {
            io_group: (packets - earlier.get(io_group, 0)) / seconds
            for io_group, packets in self._packets_at(end).items()
        }

    def span(self, now: float) -> tuple[float, float]:
        """Return start and end of the known totals on the monitor's clock, because the clocks of hosts may differ."""
        end = self.last_ns if self.end_kind else self._known_until(now)
        return self._started_at, self._started_at + (end - self.start_ns) / 1e9

    def _known_until(self, now: float) -> int:
        age = 0.0 if self._updated_at is None else now - self._updated_at
        return self.last_ns + max(0, int((age - MAX_DELAY) * 1e9))

    def _skip(self, sequence: int, row: int) -> None:
        if not self._points:
            self.rows_before = row
        self.skipped_blocks += sequence - self._next
        self.skipped_rows += max(0, row - self._next_row)

    def _add_totals(self, totals: list[Totals], ns: int, now: float) -> None:
        self.totals.update((total.io_group, total) for total in totals)
        if self._updated_at is None and not self._points:
            # the monitor has joined during the run: earlier packets count in the totals, not in the rates
            self.start_ns = ns
            self.baseline = self._packets()
        if self._updated_at is None:
            self._started_at = now - (ns - self.start_ns) / 1e9
        self._updated_at = now
        self._add_point(ns, self._packets())
        self.last_ns = self._points[-1][0]
        while len(self._points) > 2 and self._points[1][0] < self.last_ns - WINDOW_NS:
            self._points.popleft()

    def _packets(self) -> dict[int, int]:
        return {io_group: total.packets for io_group, total in self.totals.items()}

    def _add_point(self, ns: int, packets: dict[int, int]) -> None:
        if not self._points:
            self.start_ns = ns
        else:
            ns = max(ns, self._points[-1][0])
        if len(self._points) > 1 and self._points[-2][0] == ns:
            self._points.pop()  # of several points at the same time only the first and the last are needed
        self._points.append((ns, packets))

    def _packets_at(self, ns: int) -> dict[int, float]:
        """Return the packets of each io_group up to this time, by interpolation."""
        last_ns, last = self._points[0]
        for next_ns, following in self._points:
            if next_ns > ns:
                part = max(0.0, (ns - last_ns) / (next_ns - last_ns)) if next_ns > last_ns else 0.0
                return {g: n - (1 - part) * (n - last.get(g, 0)) for g, n in following.items()}
            last_ns, last = next_ns, following
        return {g: float(n) for g, n in last.items()}


def _check(totals: list[Totals], frame: Block | End) -> None:
    for total in totals:
        if not 0 <= total.io_group < IO_GROUPS or min(astuple(total)) < 0:
            raise ProtocolError(f"totals of run {frame.run} from {frame.producer}: impossible {total}")


def _table(keys: int, *columns: str) -> np.dtype[Any]:
    kinds = {"rate": "<f8", "mean_rate": "<f8", "seen": "<f8"}
    return np.dtype([*((name, "u1") for name in _KEY[:keys]), *((name, kinds.get(name, "<u8")) for name in columns)])


IO_GROUP_RATES: Final = _table(1, "rate", "mean_rate", *TOTALS, "seen", *_SEEN)

IO_CHANNEL_RATES: Final = _table(2, "rate", "mean_rate", *_SEEN)

CHIP_RATES: Final = _table(3, "rate", "mean_rate", *_SEEN)

CHANNEL_RATES: Final = _table(4, "rate", "mean_rate", "seen_packets")


def io_groups(origins: Collection[OriginTotals], now: float) -> tuple[NDArray[Any], float]:
    """Return rates and totals of all producers and epochs, dtype IO_GROUP_RATES, and the seconds that they cover.

    The columns of seen packets stay 0. `now`: the monitor's monotonic clock.
    """
    spans = [origin.span(now) for origin in origins]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0
    numbers = sorted({io_group for origin in origins for io_group in origin.totals})
    table = np.zeros(len(numbers), IO_GROUP_RATES)
    table["io_group"] = numbers
    entry = {number: table[i : i + 1] for i, number in enumerate(numbers)}
    for origin in origins:
        for io_group, total in origin.totals.items():
            for name in TOTALS:
                entry[io_group][name] += np.uint64(getattr(total, name))
            since_start = total.packets - origin.baseline.get(io_group, 0)
            entry[io_group]["mean_rate"] += since_start / max(seconds, MIN_SPAN)
        for io_group, rate in origin.rates(now).items():
            entry[io_group]["rate"] += rate
    return table, seconds


def packets_since_start(origins: Collection[OriginTotals]) -> NDArray[np.uint64]:
    """Return the packets of each io_group since the run's start, or since the monitor joined it, shape (256,)."""
    packets = np.zeros(IO_GROUPS, np.uint64)
    for origin in origins:
        for io_group, total in origin.totals.items():
            packets[io_group] += np.uint64(total.packets - origin.baseline.get(io_group, 0))
    return packets


def add_seen(
    groups: NDArray[Any], packets: NDArray[np.uint64], data: NDArray[np.uint64], flags: NDArray[np.uint64]
) -> None:
    """Fill the columns of seen packets of `groups`, dtype IO_GROUP_RATES.

    `packets`, `data`: seen packets and data packets of each io_group, shape (256,); `flags`: of PacketCounters.flags().
    """
    at = groups["io_group"]
    groups["seen_packets"], groups["seen_data"] = packets[at], data[at]
    for column, name in enumerate(_FLAGS):
        groups[f"seen_{name}"] = flags[at, column]
    groups["seen"] = np.where(groups["packets"], ratio(groups["seen_packets"], groups["packets"]), 1.0)


def by_io_group(groups: NDArray[Any], column: str) -> NDArray[np.float64]:
    """Return a column of a table of io_groups by io_group, shape (256,)."""
    values = np.zeros(IO_GROUPS)
    values[groups["io_group"]] = groups[column]
    return values


def rate_tables(
    groups: NDArray[Any],
    seen: NDArray[Any],
    packets: NDArray[np.uint64],
    recent: NDArray[np.uint64],
    channels: bool,
) -> dict[str, NDArray[Any]]:
    """Return the tables `io_groups`, `io_channels`, `chips` and, if asked for, `channels`, each sorted by its key.

    `groups`: dtype IO_GROUP_RATES, complete. `seen`: result of PacketCounters.chips(). `packets`, `recent`: packets by
    [chip, channel], since the start and of the last 1.0 to 1.5 s.
    """
    group = seen["io_group"]
    recent_of_chips = recent.sum(axis=1)
    per_recent = ratio(by_io_group(groups, "rate"), np.bincount(group, recent_of_chips, IO_GROUPS))[group]
    per_packet = ratio(by_io_group(groups, "mean_rate"), np.bincount(group, seen["packets"], IO_GROUPS))[group]

    chips = np.zeros(len(seen), CHIP_RATES)
    for name in _KEY[:3]:
        chips[name] = seen[name]
    for name in _COUNTED:
        chips[f"seen_{name}"] = seen[name]
    chips["rate"] = recent_of_chips * per_recent
    chips["mean_rate"] = seen["packets"] * per_packet
    tables = {"io_groups": groups, "io_channels": _io_channels(chips), "chips": _sorted(chips, 3)}
    if channels:
        chip, channel = np.nonzero(packets)
        table = np.zeros(len(chip), CHANNEL_RATES)
        for name in _KEY[:3]:
            table[name] = chips[name][chip]
        table["channel_id"] = channel
        table["rate"] = recent[chip, channel] * per_recent[chip]
        table["mean_rate"] = packets[chip, channel] * per_packet[chip]
        table["seen_packets"] = packets[chip, channel]
        tables["channels"] = _sorted(table, 4)
    return tables


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Return part / whole, 0 where whole is 0."""
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
    """Return the sums over the chips of each io_channel."""
    _, first, index = np.unique(_packed_key(chips, 2), return_index=True, return_inverse=True)
    table = np.zeros(len(first), IO_CHANNEL_RATES)
    for name in _KEY[:2]:
        table[name] = chips[name][first]
    for name in ("rate", "mean_rate", *_SEEN):
        np.add.at(table[name], index, chips[name])
    return table
