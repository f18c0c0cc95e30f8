"""What the online monitor knows of a run, and its answers; no sockets here.

Totals and the rates of io_groups are exact, because they are the producers' own. What is counted from rows (chips,
channels, histograms, FIFO flags) covers the blocks that the monitor has seen; each answer says which fraction that is.
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
from larpixdaq.monitor.packet_text import text as as_text
from larpixdaq.monitor.rates import Track, io_groups, rate_tables
from larpixdaq.protocol.reports import MonitorStatus
from larpixdaq.protocol.stream import Block, End
from larpixdaq.runtime.units import utc_iso

#: Rows kept for packets(), and messages kept for messages().
KEPT_ROWS: Final = 16_384
KEPT_MESSAGES: Final = 1000
#: The share of a chip or channel in its io_group's rate is taken over the last 1.0 to 1.5 s.
_SNAPSHOT: Final = 0.5
_SHARE: Final = 1.5


class Monitor:
    """Counts the blocks of one run; a block of a later run starts afresh, those of earlier runs are let pass."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates = PacketCounters()
        self.run: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._rates.reset()
        self.kind = self.comment = ""
        self.layout: schema.RowLayout | None = None
        self.late_blocks = 0
        self._tracks: dict[tuple[str, int], Track] = {}
        self._rows: deque[NDArray[Any]] = deque()
        self._kept = 0
        self._messages: deque[dict[str, Any]] = deque(maxlen=KEPT_MESSAGES)
        self._snapshots: deque[tuple[float, NDArray[np.uint64]]] = deque()

    # the run's course

    def start(self, run: int, kind: str = "", comment: str = "") -> None:
        """A run is being prepared: start afresh, unless its first blocks were here before the news of it."""
        if run != self.run:
            self._forget()
            self.run = run
        self.kind, self.comment = kind, comment

    # what arrives

    def block(self, header: Block, payload: Any) -> None:
        """Count a block. `payload`: its rows as a contiguous buffer, which must not change afterwards, because the last
        ones are kept.

        FormatError, ProtocolError: the block is not counted.
        """
        block = f"block {header.sequence} of run {header.run} from {header.producer}"
        try:
            layout = schema.layout(header.layout)
        except ValueError as error:
            raise FormatError(f"{block}: {error}") from None
        size, row = memoryview(payload).nbytes, layout.dtype.itemsize
        if size != header.rows * row:
            raise FormatError(f"{block}: {header.rows} rows of {row} bytes announced, {size} bytes found")
        if not self._concerns(header.run):
            return
        if self.layout not in (None, layout):
            raise FormatError(
                f"{block}: {header.rows} rows of layout {layout.name}, expected {header.rows} of {self.layout.name}"
            )
        rows = np.frombuffer(payload, layout.dtype)
        now = self._clock()
        track = self._track(header)
        if not track.add(header, now):
            return
        self._tracks[header.producer, header.epoch] = track
        self.layout = layout
        if header.text is not None:
            self._message(header, rows, header.text)
        if not self._snapshots or now - self._snapshots[-1][0] >= _SNAPSHOT:
            self._snapshots.append((now, self._rates.channels()))
            while len(self._snapshots) > 1 + _SHARE / _SNAPSHOT:
                self._snapshots.popleft()
        if len(rows):
            self._rates.count(rows)
            self._keep(rows)

    def end(self, end: End) -> None:
        """A producer's last word on a run: its exact totals."""
        if self._concerns(end.run):
            track = self._track(end)
            track.end(end, self._clock())
            self._tracks[end.producer, end.epoch] = track

    def _concerns(self, run: int) -> bool:
        if self.run is None or run > self.run:
            self.start(run)
        if run != self.run:
            self.late_blocks += 1
        return run == self.run

    def _track(self, frame: Block | End) -> Track:
        return self._tracks.get((frame.producer, frame.epoch)) or Track(frame.producer, frame.epoch)

    def _message(self, header: Block, rows: NDArray[Any], words: str) -> None:
        seconds = header.first_ns / 1e9
        if len(rows) and int(rows["timestamp"][0]) != int(seconds):
            seconds = float(rows["timestamp"][0])  # of a replayed file
        self._messages.append(
            {"time": seconds, "utc": utc_iso(seconds), "producer": header.producer, "run": header.run, "text": words}
        )

    def _keep(self, rows: NDArray[Any]) -> None:
        # A small block is copied, so that it does not hold the larger buffer that it may have come in.
        self._rows.append(rows if len(rows) > 1000 else rows.copy())
        self._kept += len(rows)
        while self._kept - len(self._rows[0]) >= KEPT_ROWS:
            self._kept -= len(self._rows.popleft())

    # answers

    def packet_rate(self, channels: bool = True) -> dict[str, Any]:
        """How fast packets (rows of types 0 to 3 that a board sent) come, and from where; rates are in packets/s.

        `run`; `rate`: over the last second; `mean_rate`: since the start of the run (or since the monitor joined it),
        `seconds` ago; `packets`: all of the run; `seen`: the fraction of rows that the monitor has had time to look at.

        Tables (numpy structured arrays), each with `rate`, `mean_rate` and what was counted in the rows seen:
        `seen_packets`, `seen_data`, `seen_bad_parity` and, of data packets, `seen_local_half`, `seen_local_full`,
        `seen_shared_half`, `seen_shared_full` (FIFO flags; v1 chips have one FIFO, here the local one):
        `io_groups`: exact rates; also `packets`, `rows`, `bad_parity`, `unknown` (words), `dropped` (rows), which are
        exact, and `seen`, the fraction of packets seen;
        `io_channels`, `chips`, `channels` (io_group, io_channel, chip_id, channel_id; without counts of parity and
        flags; left out with channels=False): the io_group's exact rate, shared out by the packets seen.
        """
        groups, seconds = io_groups(self._tracks.values(), self._clock())
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
        """The newest rows seen, the newest last, at most `count` (1 to 16,384) and not more than are kept.

        A numpy structured array in the layout of the run, as in the file; with text=True a readable text, a line each.
        `types`: packet types wanted, such as [0] (0 data, 1 test, 2 config write, 3 config read, 4 timestamp,
        5 message, 6 sync, 7 trigger; v3 chips send data as 1); None: all.
        """
        _whole("packets", "count", count, 1, KEPT_ROWS)
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, schema.PACKETS_2_4)
        if types is not None:
            if not isinstance(types, Iterable):
                raise RequestError(f"packets: types: expected a list of packet types, found {types!r}")
            wanted = [_whole("packets", "types", kind, 0, 255) for kind in types]
            rows = rows[np.isin(schema.types_of(rows), wanted)]
        rows = rows[-count:]
        return as_text(rows) if text else rows

    def messages(self, count: int = 100) -> list[dict[str, Any]]:
        """The newest INFO messages, the newest last: `time` (unix seconds; in a replay the recorded one), `utc`,
        `producer`, `run`, `text`."""
        _whole("messages", "count", count, 1, KEPT_MESSAGES)
        return list(self._messages)[-count:]

    def adc_histogram(
        self,
        io_group: int | None = None,
        io_channel: int | None = None,
        chip: int | None = None,
        channel: int | None = None,
    ) -> dict[str, Any]:
        """How often each ADC value came since the start, in data packets with valid parity (v3: no reset samples).

        Of the whole detector, or of what is named (None: all); channel=5 alone adds up channel 5 of all chips.
        `counts`: array, `counts[adc]`, 256 values (v1 and v3: 1024); `entries`: their sum; `mean`, `std`: in ADC
        counts, None without entries; `seen`: the fraction of the run's rows that was looked at; `merged_channels`:
        channels asked for that are missing because, in a detector with very many, they share a histogram with others
        of their chip; and what was asked for.
        """
        asked = {"io_group": io_group, "io_channel": io_channel, "chip": chip, "channel": channel}
        key = [-1 if value is None else _whole("adc_histogram", name, value, 0, 255) for name, value in asked.items()]
        counts, merged = self._rates.histogram(*key)
        entries = int(counts.sum())
        adc = np.arange(len(counts))
        mean = float(counts @ adc / entries) if entries else None
        std = float(np.sqrt(counts @ (adc - mean) ** 2 / entries)) if mean is not None else None
        return {
            **asked,
            "run": self.run,
            "counts": counts,
            "entries": entries,
            "mean": mean,
            "std": std,
            "seen": self.seen,
            "merged_channels": merged,
        }

    def run_info(self) -> dict[str, Any]:
        """The run as the monitor sees it.

        `run`, `kind`, `comment`, `layout`; `rows_by_type`: of the rows seen, by name of type, and apart as `sent`
        those of types 0 to 3 that we sent to chips; `seen_rows`, `skipped_rows`, `seen` (fraction); `unplaced`: rows
        seen that no chip can have sent; `messages`: how many are kept; `late_blocks`: of runs before; `producers`:
        rows and blocks seen and skipped of each producer and epoch, `start` and `last` (unix seconds), `ended` (how,
        or "").
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
                    "name": track.producer,
                    "epoch": track.epoch,
                    "seen_rows": track.seen_rows,
                    "skipped_rows": track.skipped_rows,
                    "skipped_blocks": track.skipped_blocks,
                    "repeated_blocks": track.repeated_blocks,
                    "start": track.start_ns / 1e9,
                    "last": track.last_ns / 1e9,
                    "ended": track.how,
                }
                for track in self._tracks.values()
            ],
        }

    def status(self) -> MonitorStatus:
        """A few numbers, cheap enough for every heartbeat."""
        groups, _ = io_groups(self._tracks.values(), self._clock())
        return MonitorStatus(
            run=self.run,
            rate=float(groups["rate"].sum()),
            packets=int(groups["packets"].sum()),
            bad_parity=int(groups["bad_parity"].sum()),
            skipped_rows=self.skipped_rows,
            seen=self.seen,
        )

    @property
    def skipped_rows(self) -> int:
        return sum(track.skipped_rows for track in self._tracks.values())

    @property
    def seen(self) -> float:
        """The fraction of the run's rows that were counted here; 1 before the first."""
        skipped = self.skipped_rows
        return self._rates.rows / (self._rates.rows + skipped) if skipped else 1.0

    def _recent(self, channels: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Packets seen by [chip, channel] since the oldest snapshot that still counts as now."""
        recent: NDArray[np.uint64] = channels.copy()
        limit = self._clock() - _SHARE
        before = next((channels for when, channels in self._snapshots if when >= limit), None)
        if before is not None and len(before):
            recent[: len(before)] -= before
        return recent


def _whole(action: str, name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{action}: {name}: expected a whole number from {low} to {high}, found {value!r}")
    return value
