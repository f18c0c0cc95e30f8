"""Counts of the online monitor in a run, and its answers to requests.

Totals and rates of io_groups are exact, because producers send them with each block. Numbers counted from rows (chips,
channels, histograms, FIFO flags) cover the blocks that the monitor has seen. Each answer has the seen fraction of rows.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.monitor_counters import PacketCounters
from larpixdaq.errors import FormatError, RequestError
from larpixdaq.monitor.board_clocks import BoardClocks
from larpixdaq.monitor.channel_watch import ChannelWatch, GroupCounts
from larpixdaq.monitor.packet_text import text as as_text
from larpixdaq.monitor.rates import (
    OriginTotals,
    add_seen,
    by_io_group,
    io_groups,
    packets_since_start,
    rate_tables,
    ratio,
)
from larpixdaq.protocol.reports import ChannelRate, MonitorStatus
from larpixdaq.protocol.stream import Block, End
from larpixdaq.runtime.units import utc_iso

#: Number of rows kept for packets(), and of messages kept for messages().
KEPT_ROWS: Final = 16_384
KEPT_MESSAGES: Final = 1000
#: Seconds between snapshots of the channel counts, and maximum age of a snapshot: the shares of chips and channels in
#: the rate of their io_group are those of the last 1.0 to 1.5 s.
_SNAPSHOT: Final = 0.5
_SHARE: Final = 1.5
#: Seconds for which the codes of the rates are used again, because summary() and pixel_map() are asked for together.
_FRESH: Final = 0.1
#: Maximum number of dead channels in heartbeats.
_NAMED: Final = 5
#: Columns of the chips of pixel_map().
_CHIPS: Final = np.dtype([("io_group", "u1"), ("io_channel", "u1"), ("chip_id", "u1")])


class _Scale(NamedTuple):
    """Logarithmic scale of codes 1 to 255; code 0 stands for 0. Values outside have the nearest code."""

    low: float  # the value of code 1
    codes: int  # per decade

    def value(self, code: float) -> float:
        """Return the value of a code, a half-integral one for the edge between two codes."""
        return float(self.low * 10 ** ((code - 1) / self.codes))

    def line(self) -> tuple[float, float]:
        """Return slope and start of the code over the binary logarithm of the value, before it is rounded down.

        The start has 1, 0.5 for rounding, and a little for the errors of 32 bits, so that a value at an edge is above.
        """
        return self.codes * math.log10(2), 1.501 - self.codes * math.log10(self.low)

    def encode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        slope, start = self.line()
        codes = np.log2(np.maximum(values, self.low, dtype=np.float32))
        codes *= np.float32(slope)
        codes += np.float32(start)
        np.minimum(codes, 255, out=codes)
        found: NDArray[np.uint8] = codes.astype(np.uint8)
        found *= values > 0
        return found

    def bounds(self) -> dict[str, float]:
        return {"low": self.value(1), "high": self.value(255)}


#: Of rates: the edges between codes include 0.1, 1, 10 packets/s.
_RATES: Final = _Scale(0.1 * 10 ** (0.5 / 36), 36)
_PACKETS: Final = _Scale(1.0, 25)
#: Codes of a bin in the histogram of channels over their rates.
_BIN: Final = 6


class _Snapshot(NamedTuple):
    """Counts of seen packets at one time."""

    time: float  # monotonic seconds
    packets: NDArray[np.uint64]  # by io_group
    data: NDArray[np.uint32]  # data packets by [chip, channel], modulo 2^32
    others: NDArray[np.uint64]  # other packets, likewise


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
        self._all_messages = 0
        self._snapshots: deque[_Snapshot] = deque()
        self._rate_coded: tuple[float, tuple[NDArray[np.uint8], NDArray[np.int64]]] | None = None
        self._watch = ChannelWatch()
        self._clocks = BoardClocks()

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
        skipped = origin.skipped_rows
        if not origin.add(header, now):
            return
        self._origins[header.producer, header.epoch] = origin
        self.layout = layout
        if header.text is not None:
            self._add_message(header, rows, header.text)
        if header.configs is not None:
            self._watch.renew({total.io_group for total in header.totals})
        if not self._snapshots or now - self._snapshots[-1].time >= _SNAPSHOT:
            self._snapshots.append(_Snapshot(now, self._seen_packets(), self._rates.data(), self._rates.others()))
            while len(self._snapshots) > 1 + _SHARE / _SNAPSHOT:
                self._snapshots.popleft()
        if len(rows):
            sync_rows = self._rates.sync_rows
            self._rates.count(rows)
            self._clocks.take(
                header, rows, now, follows=origin.skipped_rows == skipped, has_sync=self._rates.sync_rows > sync_rows
            )
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
        self._all_messages += 1
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
        groups, seconds = self._io_groups()
        counted = self._rates.channels()
        tables = rate_tables(groups, self._rates.chips(), counted, self._recent(), channels)
        return {**self._totals(groups, seconds), **tables}

    def summary(self) -> dict[str, Any]:
        """Return what a display of the run shows, small enough to be asked for each second.

        `kind`, `layout`, `time` (unix seconds) and, as in packet_rate(), `run`, `rate`, `mean_rate`, `packets`,
        `seconds`, `seen` and the table `io_groups`. `rows_by_type` and `late_blocks` as in run_info(); `messages`:
        number of INFO messages.

        `channel_rates`: channels by their rate of data packets in the last 1.0 to 1.5 s, estimated from the seen ones:
        `channels[i]` have rates between `edges[i]` and `edges[i + 1]` packets/s (lower and higher ones are in the first
        and last bin), and none was seen of `silent` ones, which have had packets in this run. `hottest`: up to 20
        channels (the rate is the lowest of the last three spans of 2 s), `dead`: up to 20 of `dead_channels` channels
        that had this rate and then stopped while their io_group went on; as dicts with io_group, io_channel, chip_id,
        channel_id, rate. None: not known.

        `sync`: for each io_group the seen SYNC `rows`; `kind`, `ticks` and `seconds` (at 10 MHz) of the last interval:
        "reset" (of the clock, which each such word gives) or "heartbeat" (between two, if no rows between them were
        skipped); `min_ticks`, `max_ticks` of the last minute. `spread`: for each io_group how far its clock is ahead of
        those of the others (their median), in `ticks` and `seconds`, to some milliseconds; `how`: by clocks that are
        reset each second ("resets"), or that run freely ("clock"). None: not known.
        """
        groups, seconds = self._io_groups()
        boards = [io_group for io_group in groups["io_group"].tolist() if io_group]
        hottest, dead_channels, dead = self._watched()
        return {
            **self._totals(groups, seconds),
            "kind": self.kind,
            "layout": self.layout.name if self.layout else None,
            "time": time.time(),
            "io_groups": groups,
            "channel_rates": self._channel_rates(groups),
            "hottest": None if hottest is None else [_channel(each) for each in hottest],
            "dead": [_channel(each) for each in dead],
            "dead_channels": dead_channels,
            "sync": self._clocks.sync(boards, self._clock()),
            "spread": self._clocks.spread(boards),
            "rows_by_type": self._rows_by_type(),
            "late_blocks": self.late_blocks,
            "messages": self._all_messages,
        }

    def pixel_map(self, quantity: str = "rate", chips: bool = True) -> dict[str, Any]:
        """Return one byte for each channel of the seen chips, in `values`, shape (chips, channels).

        `quantity`: "rate" of data packets in the last 1.0 to 1.5 s, estimated from the seen ones, "packets": data
        packets seen in the run, or "mean_adc" of those in the ADC histogram. 0: no such packet was seen. With
        `scale` {"low", "high"}, code c stands for low * (high / low) ** ((c - 1) / 254), to 4 % ("packets": 5 %); for
        "mean_adc" for c * `scale` {"step"}, rounded (below one step: 1).

        `chips`: array with io_group, io_channel, chip_id of each row of `values`; during a run it only grows at its
        end. With chips=False only their number is returned, as `chips_known`. `run`, `layout`, `time` (unix seconds),
        `seen`: fraction of the run's rows that were counted.
        """
        if quantity == "mean_adc":
            values, scale = self._rates.mean_adc(), {"step": float(self._rates.bins // 256)}
        elif quantity == "packets":
            values, scale = _PACKETS.encode(self._rates.channels() - self._rates.others()), _PACKETS.bounds()
        elif quantity == "rate":
            values, scale = self._rate_codes(self._io_groups()[0])[0], _RATES.bounds()
        else:
            raise RequestError(f"pixel_map: quantity: expected rate, mean_adc or packets, found {quantity!r:.100}")
        keys = self._rates.keys()[: len(values)]
        known = {"chips": keys.view(_CHIPS).reshape(-1)} if chips else {"chips_known": len(keys)}
        return {
            "run": self.run,
            "layout": self.layout.name if self.layout else None,
            "quantity": quantity,
            "time": time.time(),
            "seen": self.seen,
            "scale": scale,
            "values": values,
            **known,
        }

    def pixel(self, io_group: int, io_channel: int, chip: int, channel: int) -> dict[str, Any]:
        """Return the numbers of one channel.

        `rate`, `mean_rate`: of its data packets, in the last 1.0 to 1.5 s and as in packet_rate(), exact if all rows
        were seen and otherwise estimated from the seen ones (`rate`: None if none of its io_group was seen);
        `seen_packets`: data packets seen; `mean_adc`, `std`: of the ADC histogram, None without entries or without a
        histogram of its own; `seen`: fraction of the run's rows that was counted; `run`, `time` (unix seconds), and the
        parameters.
        """
        key = {"io_group": io_group, "io_channel": io_channel, "chip": chip, "channel": channel}
        for name, value in key.items():
            _check_integer("pixel", name, value, 0, 255)
        histogram = self.adc_histogram(**key)
        answer = {
            **key,
            "run": self.run,
            "time": time.time(),
            "rate": 0.0,
            "mean_rate": 0.0,
            "seen_packets": 0,
            "mean_adc": None if histogram["merged_channels"] else histogram["mean"],
            "std": None if histogram["merged_channels"] else histogram["std"],
            "seen": self.seen,
        }
        groups, oldest = self._io_groups()[0], self._oldest()
        at = np.flatnonzero((self._rates.keys() == (io_group, io_channel, chip)).all(axis=1))
        data = self._rates.channels() - self._rates.others()
        if len(at) and channel < data.shape[1]:
            here = int(at[0]), channel
            seen = int(data[here])
            before = 0 if oldest is None or here[0] >= len(oldest.data) else int(oldest.data[here])
            mean = ratio(by_io_group(groups, "mean_rate"), by_io_group(groups, "seen_packets"))
            per_packet = float(self._per_packet(groups)[io_group])
            unseen = by_io_group(groups, "rate")[io_group] and not per_packet
            answer["rate"] = None if unseen else (seen - before) % 2**32 * per_packet
            answer["mean_rate"] = seen * float(mean[io_group])
            answer["seen_packets"] = seen
        return answer

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
        return {
            "run": self.run,
            "kind": self.kind,
            "comment": self.comment,
            "layout": self.layout.name if self.layout else None,
            "rows_by_type": self._rows_by_type(),
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
        if self._origins and not self._ended and self._watch.is_due(now):
            self._compare_channels(now)
        status.hottest, status.dead_channels, dead = self._watched()
        status.dead = dead[:_NAMED]
        return status

    def _compare_channels(self, now: float) -> None:
        writes = self._rates.types()[:, 0, schema.PacketType.CONFIG_WRITE]
        counts = GroupCounts(self._seen_packets(), packets_since_start(self._origins.values()), writes)
        self._watch.compare(now, self._rates.keys(), self._rates.data(), counts)

    def _watched(self) -> tuple[list[ChannelRate] | None, int | None, list[ChannelRate]]:
        """Return the hottest channels, and the number of dead ones with some of them; None: not known."""
        if self._ended:
            return [], 0, []
        return self._watch.hottest(), *self._watch.dead()

    @property
    def _ended(self) -> bool:
        return bool(self._origins) and all(origin.end_kind for origin in self._origins.values())

    def rows(self) -> tuple[int, int]:
        """Return the rows of the run that were seen, and all rows since the monitor joined it."""
        missed = sum(origin.rows_before for origin in self._origins.values())
        return self._rates.rows, self._rates.rows + self.skipped_rows - missed

    @property
    def skipped_rows(self) -> int:
        return sum(origin.skipped_rows for origin in self._origins.values())

    @property
    def seen(self) -> float:
        """Fraction of the run's rows that the monitor has counted; 1 before the first row."""
        skipped = self.skipped_rows
        return self._rates.rows / (self._rates.rows + skipped) if skipped else 1.0

    def _io_groups(self) -> tuple[NDArray[Any], float]:
        """Return the table of io_groups, dtype IO_GROUP_RATES, and the seconds that it covers."""
        groups, seconds = io_groups(self._origins.values(), self._clock())
        data = self._rates.types()[:, 1, self._data_type]
        add_seen(groups, self._seen_packets(), data, self._rates.flags())
        return groups, seconds

    def _totals(self, groups: NDArray[Any], seconds: float) -> dict[str, Any]:
        return {
            "run": self.run,
            "rate": float(groups["rate"].sum()),
            "mean_rate": float(groups["mean_rate"].sum()),
            "packets": int(groups["packets"].sum()),
            "seconds": seconds,
            "seen": self.seen,
        }

    @property
    def _data_type(self) -> int:
        """The type of data packets: v3 chips send their data as type 1, and no test packets."""
        v3 = self.layout is not None and self.layout.dtype == schema.PACKETS_3_0
        return int(schema.PacketType.TEST if v3 else schema.PacketType.DATA)

    def _rows_by_type(self) -> dict[str, int]:
        sent, received = self._rates.types().sum(axis=0)
        sent[4:], received[4:] = 0, received[4:] + sent[4:]
        if self._data_type:
            received[:2] = received[1], 0
        return {
            "sent": int(sent.sum()),
            **{kind.name.lower(): int(received[kind]) for kind in schema.PacketType},
        }

    def _seen_packets(self) -> NDArray[np.uint64]:
        """Return the seen packets of each io_group, shape (256,)."""
        return self._rates.types()[:, 1, :4].sum(axis=1, dtype=np.uint64)

    def _oldest(self) -> _Snapshot | None:
        """Return the oldest snapshot that is valid; the present rates are those since then."""
        limit = self._clock() - _SHARE
        return next((snapshot for snapshot in self._snapshots if snapshot.time >= limit), None)

    def _recent(self) -> NDArray[np.uint64]:
        """Return the packets seen since the oldest valid snapshot, by [chip, channel]."""
        data, others, oldest = self._rates.data(), self._rates.others(), self._oldest()
        if oldest is not None and (chips := len(oldest.data)):  # before the first rows, a snapshot has no shape
            data[:chips] -= oldest.data
            others[:chips] -= oldest.others
        return data + others

    def _per_packet(self, groups: NDArray[Any]) -> NDArray[np.float64]:
        """Return by what packets seen since the oldest valid snapshot are multiplied to get present rates, by io_group.

        `groups`: table of io_groups, with their exact rates.
        """
        oldest = self._oldest()
        seen = self._seen_packets() - (0 if oldest is None else oldest.packets)
        return ratio(by_io_group(groups, "rate"), seen)

    def _rate_codes(self, groups: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the codes of the channels' present rates of data packets, and the number of channels by code."""
        now, oldest = self._clock(), self._oldest()
        if self._rate_coded is None or now - self._rate_coded[0] >= _FRESH:
            before = np.zeros((0, 0), np.uint32) if oldest is None else oldest.data
            self._rate_coded = now, self._rates.rates(before, self._per_packet(groups), *_RATES.line())
        return self._rate_coded[1]

    def _channel_rates(self, groups: NDArray[Any]) -> dict[str, Any]:
        """Return the histogram of channels over their present rates."""
        counts = self._rate_codes(groups)[1]
        first = np.arange(1, 256, _BIN)
        return {
            "edges": np.array([_RATES.value(code - 0.5) for code in (*first, 256)]),
            "channels": np.add.reduceat(counts, first),
            "silent": int(counts[0]),
        }


def _channel(found: ChannelRate) -> dict[str, Any]:
    parts = zip(("io_group", "io_channel", "chip_id", "channel_id"), found.channel.split("-"), strict=True)
    return {**{name: int(number) for name, number in parts}, "rate": found.rate}


def _check_integer(action: str, name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{action}: {name}: expected a whole number from {low} to {high}, found {value!r}")
    return value
