"""Counts of the online monitor in a run, and its answers to requests.

Totals and rates of io_groups are exact, because producers send them with each block. Numbers counted from rows (chips,
channels, histograms, FIFO flags) cover the blocks that the monitor has seen. Each answer has the seen fraction of rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.monitor_counters import PacketCounters
from larpixdaq.errors import FormatError, RequestError
from larpixdaq.monitor.channel_watch import ChannelWatch, GroupCounts
from larpixdaq.monitor.packet_text import text as as_text
from larpixdaq.monitor.rates import OriginTotals, io_groups, packets_since_start, rate_tables
from larpixdaq.protocol.reports import MonitorStatus
from larpixdaq.protocol.stream import Block, End
from larpixdaq.runtime.units import utc_iso

#: Number of rows kept for packets(), and of messages kept for messages().
KEPT_ROWS: Final = 16_384
KEPT_MESSAGES: Final = 1000
#: Seconds between snapshots of the channel counts, and maximum age of a snapshot: the shares of chips and channels in
#: the rate of their io_group are those of the last 1.0 to 1.5 s.
_SNAPSHOT: Final = 0.5
_SHARE: Final = 1.5


class Monitor:
    """Counts the blocks of one run. A block of a later run sets all numbers to 0; those of earlier runs are ignored."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates = PacketCounters()
        self.run: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._rates.reset()
        self.kind = self.comment = ""
        self.layout: schema.RowLayout | None = None
        self.late_blocks = 0
        self._origins: dict[tuple[str, int], OriginTotals] = {}
        self._rows: deque[NDArray[Any]] = deque()
        self._kept = 0
        self._messages: deque[dict[str, Any]] = deque(maxlen=KEPT_MESSAGES)
        self._snapshots: deque[tuple[float, NDArray[np.uint64]]] = deque()
        self._watch = ChannelWatch()
        self._chips = np.zeros((0, 3), np.uint8)  # io_group, io_channel, chip_id, as in PacketCounters.chips()

    def start(self, run: int, kind: str = "", comment: str = "") -> None:
        """Start a run. Sets all numbers to 0, unless blocks of this run have arrived already."""
        if run != self.run:
            self._reset()
            self.run = run
        self.kind, self.comment = kind, comment

    def block(self, header: Block, payload: Any) -> None:
        """Count a block. Raises FormatError or ProtocolError, and then does not count it.

        `payload`: the rows as a contiguous buffer, which must not change later, because the last rows are kept.
        """
        block = f"block {header.sequence} of run {header.run} from {header.producer}"
        try:
            layout = schema.layout(header.layout)
        except ValueError as error:
            raise FormatError(f"{block}: {error}") from None
        size, row = memoryview(payload).nbytes, layout.dtype.itemsize
        if size != header.rows * row:
            raise FormatError(f"{block}: {header.rows} rows of {row} bytes announced, {size} bytes found")
        if not self._enter_run(header.run):
            return
        if self.layout not in (None, layout):
            raise FormatError(
                f"{block}: {header.rows} rows of layout {layout.name}, expected {header.rows} of {self.layout.name}"
            )
        rows = np.frombuffer(payload, layout.dtype)
        now = self._clock()
        origin = self._origin(header)
        if not origin.add(header, now):
            return
        self._origins[header.producer, header.epoch] = origin
        self.layout = layout
        if header.text is not None:
            self._add_message(header, rows, header.text)
        if header.configs is not None:
            self._watch.renew({total.io_group for total in header.totals})
        if not self._snapshots or now - self._snapshots[-1][0] >= _SNAPSHOT:
            self._snapshots.append((now, self._rates.channels()))
            while len(self._snapshots) > 1 + _SHARE / _SNAPSHOT:
                self._snapshots.popleft()
        if len(rows):
            self._rates.count(rows)
            self._keep(rows)

    def end(self, end: End) -> None:
        """Take the exact totals of a producer's end record."""
        if self._enter_run(end.run):
            origin = self._origin(end)
            origin.end(end, self._clock())
            self._origins[end.producer, end.epoch] = origin

    def _enter_run(self, run: int) -> bool:
        """Start the run of a frame if it is a later run. Returns False, and counts the frame, for an earlier run."""
        if self.run is None or run > self.run:
            self.start(run)
        if run != self.run:
            self.late_blocks += 1
        return run == self.run

    def _origin(self, frame: Block | End) -> OriginTotals:
        return self._origins.get((frame.producer, frame.epoch)) or OriginTotals(frame.producer, frame.epoch)

    def _add_message(self, header: Block, rows: NDArray[Any], text: str) -> None:
        seconds = header.first_ns / 1e9
        if len(rows) and int(rows["timestamp"][0]) != int(seconds):
            seconds = float(rows["timestamp"][0])  # of a replayed file
        self._messages.append(
            {"time": seconds, "utc": utc_iso(seconds), "producer": header.producer, "run": header.run, "text": text}
        )

    def _keep(self, rows: NDArray[Any]) -> None:
        # a small block is copied, so that it does not keep a larger receive buffer in memory
        self._rows.append(rows if len(rows) > 1000 else rows.copy())
        self._kept += len(rows)
        while self._kept - len(self._rows[0]) >= KEPT_ROWS:
            self._kept -= len(self._rows.popleft())

    def packet_rate(self, channels: bool = True) -> dict[str, Any]:
        """Return the rates of packets (rows of types 0 to 3 from a board), in packets/s.

        `run`; `rate`: over the last second; `mean_rate`: since the start of the run (or since the monitor joined it),
        `seconds` ago; `packets`: total of the run; `seen`: fraction of rows that the monitor has counted.

        Tables (numpy structured arrays), each with `rate`, `mean_rate` and counts of the seen rows: `seen_packets`,
        `seen_data`, `seen_bad_parity` and, of data packets, `seen_local_half`, `seen_local_full`, `seen_shared_half`,
        `seen_shared_full` (FIFO flags; the FIFO of v1 chips counts as local):
        `io_groups`: exact rates; also the exact `packets`, `rows`, `bad_parity`, `unknown` (words), `dropped` (rows),
        and `seen`, the fraction of packets seen;
        `io_channels`, `chips`, `channels` (io_group, io_channel, chip_id, channel_id; without counts of parity and
        flags; left out with channels=False): the exact rate of the io_group, divided by the numbers of seen packets.
        """
        groups, seconds = io_groups(self._origins.values(), self._clock())
        groups["seen_packets"] = self._rates.types()[groups["io_group"], 1, :4].sum(axis=1)
        counted = self._rates.channels()
        return {
            "run": self.run,
            "rate": float(groups["rate"].sum()),
            "mean_rate": float(groups["mean_rate"].sum()),
            "packets": int(groups["packets"].sum()),
            "seconds": seconds,
            "seen": self.seen,
            **rate_tables(groups, self._rates.chips(), counted, self._recent(counted), channels),
        }

    def packets(self, count: int = 100, text: bool = False, types: Iterable[int] | None = None) -> Any:
        """Return the last seen rows, the newest last, at most `count` (1 to 16,384) of those that are kept.

        The result is a numpy structured array in the layout of the run, with text=True one line of text a row.
        `types`: packet types, such as [0] (0 data, 1 test, 2 config write, 3 config read, 4 timestamp, 5 message,
        6 sync, 7 trigger; v3 chips send data as 1); None: all.
        """
        _check_integer("packets", "count", count, 1, KEPT_ROWS)
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, schema.PACKETS_2_4)
        if types is not None:
            if not isinstance(types, Iterable):
                raise RequestError(f"packets: types: expected a list of packet types, found {types!r}")
            wanted = [_check_integer("packets", "types", kind, 0, 255) for kind in types]
            rows = rows[np.isin(schema.types_of(rows), wanted)]
        rows = rows[-count:]
        return as_text(rows) if text else rows

    def messages(self, count: int = 100) -> list[dict[str, Any]]:
        """Return the last INFO messages, the newest last.

        Each is a dict: `time` (unix seconds; in a replay the recorded time), `utc`, `producer`, `run`, `text`.
        """
        _check_integer("messages", "count", count, 1, KEPT_MESSAGES)
        return list(self._messages)[-count:]

    def adc_histogram(
        self,
        io_group: int | None = None,
        io_channel: int | None = None,
        chip: int | None = None,
        channel: int | None = None,
    ) -> dict[str, Any]:
        """Return the histogram of ADC values in data packets with valid parity (v3: without reset samples).

        The parameters select chips and channels, None: all; channel=5 alone adds up channel 5 of all chips.
        `counts`: array, `counts[adc]`, 256 values (v1 and v3: 1024); `entries`: their sum; `mean`, `std`: in ADC
        counts, None without entries; `seen`: fraction of the run's rows that was counted; `merged_channels`: number of
        selected channels that are missing because, in a very large detector, they share a histogram with other
        channels of their chip; and the parameters.
        """
        selection = {"io_group": io_group, "io_channel": io_channel, "chip": chip, "channel": channel}
        key = [
            -1 if value is None else _check_integer("adc_histogram", name, value, 0, 255)
            for name, value in selection.items()
        ]
        counts, merged = self._rates.histogram(*key)
        entries = int(counts.sum())
        adc = np.arange(len(counts))
        mean = float(counts @ adc / entries) if entries else None
        std = float(np.sqrt(counts @ (adc - mean) ** 2 / entries)) if mean is not None else None
        return {
            **selection,
            "run": self.run,
            "counts": counts,
            "entries": entries,
            "mean": mean,
            "std": std,
            "seen": self.seen,
            "merged_channels": merged,
        }

    def run_info(self) -> dict[str, Any]:
        """Return the monitor's numbers of the run.

        `run`, `kind`, `comment`, `layout`; `rows_by_type`: seen rows by name of their type, and as `sent` rows of types
        0 to 3 that were sent to chips; `seen_rows`, `skipped_rows`, `seen` (fraction); `unplaced`: seen rows that no
        chip can have sent; `messages`: number of kept messages; `late_blocks`: blocks of earlier runs; `producers`: for
        each producer and epoch seen and skipped rows and blocks, `start` and `last` (unix seconds), `ended` (kind of
        its end, or "").
        """
        sent, received = self._rates.types().sum(axis=0)
        sent[4:], received[4:] = 0, received[4:] + sent[4:]
        if self.layout and self.layout.dtype == schema.PACKETS_3_0:
            received[:2] = received[1], 0  # v3 chips send their data as type 1, and no test packets
        return {
            "run": self.run,
            "kind": self.kind,
            "comment": self.comment,
            "layout": self.layout.name if self.layout else None,
            "rows_by_type": {
                "sent": int(sent.sum()),
                **{kind.name.lower(): int(received[kind]) for kind in schema.PacketType},
            },
            "seen_rows": self._rates.rows,
            "skipped_rows": self.skipped_rows,
            "seen": self.seen,
            "unplaced": self._rates.unplaced,
            "messages": len(self._messages),
            "late_blocks": self.late_blocks,
            "producers": [
                {
                    "name": origin.producer,
                    "epoch": origin.epoch,
                    "seen_rows": origin.seen_rows,
                    "skipped_rows": origin.skipped_rows,
                    "skipped_blocks": origin.skipped_blocks,
                    "repeated_blocks": origin.repeated_blocks,
                    "start": origin.start_ns / 1e9,
                    "last": origin.last_ns / 1e9,
                    "ended": origin.end_kind,
                }
                for origin in self._origins.values()
            ],
        }

    def status(self) -> MonitorStatus:
        """Return the numbers for heartbeats."""
        now = self._clock()
        groups, _ = io_groups(self._origins.values(), now)
        status = MonitorStatus(
            run=self.run,
            rate=float(groups["rate"].sum()),
            packets=int(groups["packets"].sum()),
            bad_parity=int(groups["bad_parity"].sum()),
            skipped_rows=self.skipped_rows,
            seen=self.seen,
        )
        if self._origins and all(origin.end_kind for origin in self._origins.values()):
            status.hottest, status.dead_channels = [], 0  # the run is over
        elif self._origins:
            if self._watch.is_due(now):
                self._compare_channels(now)
            status.hottest = self._watch.hottest()
            status.dead_channels, status.dead = self._watch.dead()
        return status

    def _compare_channels(self, now: float) -> None:
        types, data = self._rates.types(), self._rates.data()
        if len(data) != len(self._chips):
            chips = self._rates.chips()
            self._chips = np.stack([chips[name] for name in ("io_group", "io_channel", "chip_id")], axis=1)
        seen: NDArray[np.uint64] = types[:, 1, :4].sum(axis=1, dtype=np.uint64)
        writes = types[:, 0, schema.PacketType.CONFIG_WRITE]
        counts = GroupCounts(seen, packets_since_start(self._origins.values()), writes)
        self._watch.compare(now, self._chips, data, counts)

    @property
    def skipped_rows(self) -> int:
        return sum(origin.skipped_rows for origin in self._origins.values())

    @property
    def seen(self) -> float:
        """Fraction of the run's rows that the monitor has counted; 1 before the first row."""
        skipped = self.skipped_rows
        return self._rates.rows / (self._rates.rows + skipped) if skipped else 1.0

    def _recent(self, channels: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the packets seen since the oldest valid snapshot, by [chip, channel]. `channels`: all packets seen."""
        recent: NDArray[np.uint64] = channels.copy()
        limit = self._clock() - _SHARE
        oldest = next((channels for taken_at, channels in self._snapshots if taken_at >= limit), None)
        if oldest is not None and len(oldest):
            recent[: len(oldest)] -= oldest
        return recent


def _check_integer(action: str, name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{action}: {name}: expected a whole number from {low} to {high}, found {value!r}")
    return value
