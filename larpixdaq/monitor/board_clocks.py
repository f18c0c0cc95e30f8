"""Clocks of the boards of a run, from the rows that the monitor has seen: SYNC intervals, and how far clocks differ.

A SYNC word of a reset (S) has the clock's value before the reset, which is an interval by itself. Heartbeats (H) have
the clock's present value, so that only two of them in rows without a gap give an interval.

The delay from a board to its host is not known, but it is never negative: the smallest difference between the host's
time and a board's clock is close to the true one. Clocks are compared by it, which is good to some milliseconds, and to
the difference between the clocks of the hosts if the boards have different ones.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq.constants import IO_GROUPS
from larpixdaq.protocol.stream import Block
from larpixdaq.schema import TICK, PacketType

#: Seconds for which intervals are kept, and their maximum number.
_MINUTE: Final = 60.0
_INTERVALS: Final = 4096
#: Maximum number of SYNC words of a block whose intervals are taken.
_SYNC_ROWS: Final = 1000
#: Seconds between two samples of the clocks of a producer's boards, and number of samples that are kept.
_SAMPLE: Final = 0.2
_SAMPLES: Final = 100
#: Seconds between the first and the last sample from which on it is known whether a clock runs at its usual rate.
_SETTLE: Final = 1.0
_SECOND: Final = round(1 / TICK)  # ticks
#: Relative difference of an interval from one second up to which resets come each second.
_TOLERANCE: Final = 0.01
#: Maximum ticks by which samples of a steady clock differ, because some data take longer to the host than others.
_STEADY: Final = _SECOND // 4
_RESET, _HEARTBEAT = ord("S"), ord("H")


class BoardClocks:
    """Clocks of all boards of one run. `now`: the monitor's monotonic clock, s."""

    def __init__(self) -> None:
        self._boards: defaultdict[int, _Clock] = defaultdict(_Clock)
        self._gaps: Counter[tuple[str, int]] = Counter()  # by producer and epoch
        self._sample_at: dict[tuple[str, int], float] = {}

    def take(self, block: Block, rows: NDArray[Any], now: float, *, follows: bool, has_sync: bool) -> None:
        """Take the rows of a block. `follows`: no rows of its producer were skipped before; `has_sync`: SYNC rows."""
        origin = block.producer, block.epoch
        self._gaps[origin] += not follows
        if has_sync:
            self._take_sync(rows, now, (*origin, self._gaps[origin]))
        if has_sync or now >= self._sample_at.get(origin, now):
            self._sample_at[origin] = now + _SAMPLE
            self._sample(block, rows)

    def _take_sync(self, rows: NDArray[Any], now: float, piece: tuple[str, int, int]) -> None:
        rows = rows[schema.types_of(rows) == PacketType.SYNC]
        kinds = rows["trigger_type" if "trigger_type" in (rows.dtype.names or ()) else "register"]
        groups = _io_groups(rows)
        for io_group, count in Counter(groups.tolist()).items():
            self._boards[io_group].sync_rows += count
        found = zip(groups.tolist(), kinds.tolist(), rows["timestamp"].tolist(), strict=True)
        for io_group, kind, ticks in list(found)[-_SYNC_ROWS:]:
            self._boards[io_group].take_sync(kind, ticks, now, piece)

    def _sample(self, block: Block, rows: NDArray[Any]) -> None:
        """Note the newest time of each board in a block, and the first row's, whose arrival is known better."""
        types = schema.types_of(rows)
        clocks = rows["timestamp"]
        has_clock = (types == PacketType.SYNC) | (types == PacketType.TRIGGER)
        if "receipt_timestamp" in (rows.dtype.names or ()):
            received = (types < PacketType.TIMESTAMP) & (rows["receipt_timestamp"] != 0)
            clocks = np.where(received, rows["receipt_timestamp"], clocks)
            has_clock |= received
        at = np.flatnonzero(has_clock)
        groups = _io_groups(rows[at])
        newest = np.full(IO_GROUPS, -1)
        newest[groups] = np.arange(len(at))  # of several rows of a board, the last one is assigned
        for i in {0, *newest[newest >= 0].tolist()} if len(at) else ():
            arrived = block.last_ns if at[i] else block.first_ns
            self._boards[int(groups[i])].samples.append((arrived // 100, int(clocks[at[i]])))

    def sync(self, io_groups: Iterable[int], now: float) -> list[dict[str, Any]]:
        """Return the SYNC rows of each io_group, and their intervals.

        `rows`: number seen; `kind` of the intervals: "reset" or "heartbeat"; `ticks`, `seconds`: the last interval;
        `min_ticks`, `max_ticks`: of the last minute. None: not known.
        """
        return [{"io_group": io_group, **self._boards[io_group].sync(now)} for io_group in io_groups]

    def spread(self, io_groups: Iterable[int]) -> list[dict[str, Any]]:
        """Return how far the clock of each io_group is ahead of the others (their median), in `ticks` and `seconds`.

        `how`: "resets" (both clocks are reset each second), "clock" (both run freely, so that they differ by any amount
        unless they were reset together), or "" when it is not known: the data have no such clock, it is not steady, or
        there is no other board of its kind.
        """
        found = {io_group: self._boards[io_group].offset() for io_group in io_groups}
        return [{"io_group": io_group, **_difference(io_group, found)} for io_group in found]


class _Clock:
    """Clock of one board. Samples are a time of the host, in units of 100 ns, and the clock at that time or before."""

    def __init__(self) -> None:
        self.sync_rows = 0
        self.samples: deque[tuple[int, int]] = deque(maxlen=_SAMPLES)
        self._kind = ""
        self._intervals: deque[tuple[float, int]] = deque(maxlen=_INTERVALS)
        self._beat: tuple[int, tuple[str, int, int]] | None = None  # the last heartbeat, and its piece without a gap

    def take_sync(self, kind: int, ticks: int, now: float, piece: tuple[str, int, int]) -> None:
        if kind == _RESET:
            self._add("reset", ticks, now)
        elif kind == _HEARTBEAT:
            if self._beat is not None and self._beat[1] == piece:
                self._add("heartbeat", (ticks - self._beat[0]) % _period(max(ticks, self._beat[0])), now)
            self._beat = ticks, piece
            return
        self._beat = None  # the clock was reset, or is another one now

    def _add(self, kind: str, ticks: int, now: float) -> None:
        if kind != self._kind:
            self._kind = kind
            self._intervals.clear()
        self._intervals.append((now, ticks))

    def sync(self, now: float) -> dict[str, Any]:
        if not self._intervals:
            unknown = dict.fromkeys(("ticks", "seconds", "min_ticks", "max_ticks"))
            return {"rows": self.sync_rows, "kind": "", **unknown}
        last = self._intervals[-1][1]
        recent = [ticks for at, ticks in self._intervals if now - at <= _MINUTE]
        return {
            "rows": self.sync_rows,
            "kind": self._kind,
            "ticks": last,
            "seconds": last * TICK,
            "min_ticks": min(recent, default=None),
            "max_ticks": max(recent, default=None),
        }

    def offset(self) -> tuple[str, int, int] | None:
        """Return how it is known, the ticks after which the clock begins again, and the host's time minus the clock.

        None when it is not known, or not steady: then the clock was set, has another rate, or its data are late.
        """
        if not self.samples or (self.samples[-1][0] - self.samples[0][0]) * TICK < _SETTLE:
            return None
        resets = self._kind == "reset" and abs(self._intervals[-1][1] / _SECOND - 1) < _TOLERANCE
        period = _SECOND if resets else _period(max(clock for _, clock in self.samples))
        reference = self.samples[-1][0] - self.samples[-1][1]
        differences = [_signed(host - clock - reference, period) for host, clock in self.samples]
        lowest = min(differences)
        if max(differences) - lowest > _STEADY:
            return None
        return "resets" if resets else "clock", period, (reference + lowest) % period


def _difference(io_group: int, found: dict[int, tuple[str, int, int] | None]) -> dict[str, Any]:
    own = found[io_group]
    others = [other for key, other in found.items() if key != io_group and other and own and other[:2] == own[:2]]
    if own is None or not others:
        return {"ticks": None, "seconds": None, "how": ""}
    how, period, offset = own
    ticks = round(statistics.median(_signed(other[2] - offset, period) for other in others))
    return {"ticks": ticks, "seconds": ticks * TICK, "how": how}


def _period(ticks: int) -> int:
    """Return the ticks after which a clock that has reached `ticks` begins again: it has 32 or 64 bits."""
    return 1 << 64 if ticks >> 32 else 1 << 32


def _signed(ticks: int, period: int) -> int:
    """Return the number of least magnitude that equals `ticks` modulo `period`."""
    return (ticks + period // 2) % period - period // 2


def _io_groups(rows: NDArray[Any]) -> NDArray[np.intp]:
    """Return the io_group of each row; 0 for a chip_key of layout 1.0 without one, which a replayed file may have."""
    if "io_group" in (rows.dtype.names or ()):
        return rows["io_group"].astype(np.intp)
    numbers = [key.partition(b"-")[0] for key in rows["chip_key"].tolist()]
    return np.array([int(n) if n.isdigit() and len(n) < 4 and int(n) < IO_GROUPS else 0 for n in numbers], np.intp)
