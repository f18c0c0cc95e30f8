"""Hits and rates of channels while a routine listens to the recorded stream, or to any other IO of larpix-control.

A measurement consists of the rows between two answers of a chip, which mark its begin and its end. At the begin and at
the end, one chip of each io_channel is asked for registers. An io_channel keeps the order of its rows: rows that were
on their way before the begin are not counted, and rows that come late are. A measurement without both marks on each of
its io_channels is invalid.

LineLoads notices io_channels that are saturated, so that hits are missing.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import RequestError
from larpixdaq.schema import PacketType, chips_of, registers_of, types_of

#: Seconds before a measurement through an IO without a producer, so that earlier packets are not counted. Its packets
#: are not in one stream, in which answers could mark the begin.
SETTLE: Final = 0.05
#: Seconds that each attempt at a measurement waits for its marks.
_PATIENCE: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
#: A data packet with valid parity. `chip`: index in the list of chips. `trigger`: NATURAL, EXTERNAL, CROSS or PERIODIC;
#: NATURAL for all hits of v1 chips, whose packets have no trigger type.
HIT: Final = np.dtype([("chip", "<i4"), ("channel", "<i4"), ("adc", "<i4"), ("trigger", "<i4")])
NATURAL, EXTERNAL, CROSS, PERIODIC = range(4)
#: Registers that are read for one mark. The first answer is the mark, because answers can get lost.
_READS: Final = 3
#: Number of marks with different registers, so that a late answer is not taken for a later mark. v1 chips have 63
#: registers.
_MARKS: Final = 21
#: Maximum seconds between a board's read word and the chip's answer.
_ANSWER_TIME: Final = 0.002
#: Frequency of the boards' clocks in Hz.
TICKS: Final = 10_000_000
#: Seconds between two reads of the rows that came.
_READ_PERIOD: Final = 0.01
#: Fraction of a line's maximum rate from which an io_channel counts as saturated, because chips send in bursts.
_FULL: Final = 0.8
#: Bit of the FIFO flags of a packet: the FIFO is full.
_FIFO_FULL: Final = 2
_DATA_V3: Final = 1


class Hits(NamedTuple):
    """Hits of a measurement: `hits`, dtype HIT, in order of arrival; `seconds`, its length.

    `left_out`: packets that were not analysed, because more came than the routine could read. `saturated`: as in Rates.
    """

    hits: NDArray[Any]
    seconds: float
    left_out: int
    saturated: list[str]


def collect(controller: Any, chips: Sequence[str], seconds: float, *, act: Callable[[], None] | None = None) -> Hits:
    """Measure all hits of these chips for `seconds`. `act` is called after the begin, in each attempt.

    RequestError names io_channels on which no chip answers.
    """
    parts: list[NDArray[Any]] = []
    measured = _measure(controller, chips, seconds, parts.clear, parts.append, act)
    return Hits(np.concatenate([np.zeros(0, HIT), *parts]), measured.seconds, measured.left_out, measured.saturated)


class Rates(NamedTuple):
    """Natural `hits` of each channel, shape (chips, channels), in `seconds`.

    `seconds` is less than the length of the measurement by the share of packets that were not analysed. `saturated`:
    "io_group-io_channel" of the io_channels that sent as much as their line carries, so that hits may be missing; empty
    for an IO without a producer.
    """

    hits: NDArray[np.int64]
    seconds: float
    saturated: list[str]

    @property
    def hz(self) -> NDArray[np.float64]:
        return self.hits / self.seconds


def rates(controller: Any, chips: Sequence[str], channels: int, seconds: float) -> Rates:
    """Count the natural hits of each channel of these chips for `seconds`.

    Packets of v1 chips have no trigger type: with `Chips.untriggered()` all their hits are natural. RequestError names
    io_channels on which no chip answers.
    """
    counts = np.zeros(len(chips) * channels, np.int64)

    def take(hits: NDArray[Any]) -> None:
        hits = hits[(hits["channel"] < channels) & (hits["trigger"] == NATURAL)]
        counts[:] += np.bincount(hits["chip"] * channels + hits["channel"], minlength=len(counts))

    measured = _measure(controller, chips, seconds, lambda: counts.fill(0), take)
    return Rates(counts.reshape(len(chips), channels), measured.seconds, measured.saturated)


class _Measured(NamedTuple):
    seconds: float
    left_out: int
    saturated: list[str]


def _measure(
    controller: Any,
    chips: Sequence[str],
    seconds: float,
    begin: Callable[[], object],
    take: Callable[[NDArray[Any]], object],
    act: Callable[[], None] | None = None,
) -> _Measured:
    """Pass the hits of these chips to `take` as they come. `begin` is called at the start of each attempt.

    An attempt without a mark on one of the io_channels is repeated; its hits are invalid.
    """
    io, indices = controller.io, {_number(chip): index for index, chip in enumerate(chips)}
    with _listening(io):
        if not hasattr(io, "take_rows"):
            begin()
            return _measure_by_clock(io, seconds, lambda packets: take(_hits_in_packets(packets, indices)), act)
        lines = LineLoads(io, chips)
        for patience in _PATIENCE:
            begin()
            lines.clear()
            window = Window(controller, chips, seconds, patience, act)
            for rows in window:
                lines.count(rows)
                take(_hits_in_rows(rows, indices))
            if not window.unmarked:
                return _Measured(window.seconds, window.left_out, lines.saturated(window.seconds))
    names = ", ".join(f"{io_group}-{io_channel}" for io_group, io_channel in window.unmarked)
    raise RequestError(
        f"io_channel {names}: not measured, because no chip there answers the reads that mark begin and end "
        f"({len(_PATIENCE)} attempts, the last one waited {_PATIENCE[-1]:g} s); leave out its chips with chips="
    )


def _measure_by_clock(
    io: Any, seconds: float, take: Callable[[Sequence[Any]], object], act: Callable[[], None] | None
) -> _Measured:
    """Measure through an IO without a producer, by the computer's clock."""
    time.sleep(SETTLE)
    io.empty_queue()
    if act is not None:
        act()
    end = time.monotonic() + seconds
    while (remaining := end - time.monotonic()) > 0:
        time.sleep(min(_READ_PERIOD, remaining))
        take(io.empty_queue()[0])
    return _Measured(seconds, 0, [])


@contextlib.contextmanager
def _listening(io: Any) -> Iterator[None]:
    """Let the IO listen to all packets inside the `with` block."""
    if hasattr(io, "listen_to"):
        io.listen_to = "all"
    io.start_listening()
    try:
        yield
    finally:
        io.stop_listening()
        if hasattr(io, "listen_to"):
            io.listen_to = None


def _hits_in_rows(rows: NDArray[Any], indices: dict[int, int]) -> NDArray[Any]:
    """Return the hits in rows from chips. `indices`: index of each chip by _number()."""
    v1 = "chip_key" in (rows.dtype.names or ())
    rows = rows[is_hit(rows) & (rows["valid_parity"] == 1)]
    chips, inverse = np.unique(chips_of(rows), return_inverse=True)
    hits = np.zeros(len(rows), HIT)
    hits["chip"] = np.array([indices.get(chip, -1) for chip in chips.tolist()], np.int32)[inverse]
    hits["channel"] = rows["channel" if v1 else "channel_id"]
    hits["adc"] = rows["adc_counts" if v1 else "dataword"]
    if not v1:
        hits["trigger"] = rows["trigger_type"]
    return hits[hits["chip"] >= 0]


def _hits_in_packets(packets: Sequence[Any], indices: dict[int, int]) -> NDArray[Any]:
    """Return the hits in larpix-control's packets, from an IO without a producer."""
    hits = []
    for packet in packets:
        data = getattr(packet, "DATA_PACKET", None)
        if data is None or packet.packet_type != data or not packet.has_valid_parity() or packet.chip_key is None:
            continue
        index = indices.get(_number(packet.chip_key))
        if index is not None:
            hits.append((index, packet.channel_id, packet.dataword, getattr(packet, "trigger_type", NATURAL)))
    return np.array(hits, HIT)


class Window:
    """One attempt at a measurement, on the io_channels of `chips`. The Controller's io must listen to all packets.

    Iterating gives the rows (schema.py) that chips sent between begin and end. After it the attributes are valid.
    `unmarked`: (io_group, io_channel) of io_channels without a mark; if there are any, the rows are invalid. `seconds`:
    time between the marks, less the share of rows that were left out. `left_out`: number of rows between the marks that
    the routine did not get, because it read too slowly.
    """

    def __init__(
        self,
        controller: Any,
        chips: Sequence[str],
        seconds: float,
        patience: float,
        act: Callable[[], None] | None = None,
    ) -> None:
        """`patience`: maximum seconds to wait for answers. `act` is called after the begin."""
        self.seconds = seconds
        self.left_out = 0
        self.unmarked: list[tuple[int, int]] = []
        self._io = controller.io
        self._patience = patience
        self._act = act
        self._chips: dict[int, list[str]] = {_number(chip) >> 8: [] for chip in chips}
        for chip in dict.fromkeys([*chips, *map(str, controller.chips)]):
            if _number(chip) >> 8 in self._chips:
                self._chips[_number(chip) >> 8].append(chip)
        self._counting = np.zeros(1 << 16, np.bool_)  # by io_group << 8 | io_channel
        self._unanswered: dict[int, set[int]] = {}  # by the same index, chips whose answer will be a mark
        self._registers: list[int] = []
        #: Receipt timestamps of the last two marks.
        self._timestamps: dict[int, tuple[int, ...]] = dict.fromkeys(self._chips, ())
        self._rows = 0

    def __iter__(self) -> Iterator[NDArray[Any]]:
        marks: dict[int, str] = self._io.marks
        unknown = {line: chips for line, chips in self._chips.items() if marks.get(line) not in chips}
        if unknown:
            for _ in self._mark(unknown, begin=True):
                pass
            self._counting[:] = False
            if self._unanswered:
                return
        marking = {line: [marks[line]] for line in self._chips}
        begin = yield from self._mark(marking, begin=True)
        if self._unanswered:
            return
        rows, left_out = self._rows, self._io.left_out
        if self._act is not None:
            self._act()
        while (remaining := begin[1] + self.seconds - time.monotonic()) > 0:
            time.sleep(min(_READ_PERIOD, remaining))
            yield from self._read_rows()
        end = yield from self._mark(marking, begin=False)
        rows, self.left_out = self._rows - rows, self._io.left_out - left_out
        self.seconds = elapsed(begin, end, self._timestamps) * (rows / (rows + self.left_out) if rows else 1.0)

    def _mark(self, chips: dict[int, list[str]], *, begin: bool) -> Any:
        """Ask these chips, by io_channel, and wait for an answer on each io_channel.

        Returns the times before and after asking (monotonic seconds). `unmarked` and `_unanswered` then have the
        io_channels without an answer.
        """
        self._io.mark_number = (self._io.mark_number + 1) % _MARKS
        self._registers = list(range(self._io.mark_number * _READS, (self._io.mark_number + 1) * _READS))
        self._unanswered = {line: {_number(chip) for chip in each} for line, each in chips.items()}
        self._begin = begin
        started = time.monotonic()
        self._io.request_registers([chip for each in chips.values() for chip in each], self._registers)
        finished = time.monotonic()
        expired = False
        while self._unanswered and not expired:
            # Rows are read once more after the limit, because this process may have been stopped meanwhile.
            expired = time.monotonic() > finished + self._patience
            time.sleep(_READ_PERIOD)
            yield from self._read_rows()
        for line in self._unanswered:
            self._io.marks.pop(line, None)
        self.unmarked = [(line >> 8, line & 0xFF) for line in self._unanswered]
        return started, finished

    def _read_rows(self) -> Iterator[NDArray[Any]]:
        pieces = self._io.take_rows()
        if pieces:
            rows = np.concatenate(pieces)
            self._rows += len(rows)
            yield self._select_rows(rows_from_chips(rows))

    def _select_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return the rows between the marks, and take note of marks among them."""
        chips = chips_of(rows)
        lines = chips >> 8
        keep: NDArray[np.bool_] = self._counting[lines]
        for at in np.flatnonzero(is_answer(rows, self._registers)).tolist() if self._unanswered else ():
            chip, line = int(chips[at]), int(lines[at])
            if chip in self._unanswered.get(line, ()):
                del self._unanswered[line]
                self._io.marks[line] = "-".join(map(str, (chip >> 16, chip >> 8 & 0xFF, chip & 0xFF)))
                if "receipt_timestamp" in (rows.dtype.names or ()):
                    self._timestamps[line] = *self._timestamps[line][-1:], int(rows["receipt_timestamp"][at])
                self._counting[line] = self._begin
                keep[at:][lines[at:] == line] = self._begin
                keep[at] = False
        return rows[keep]


def elapsed(begin: tuple[float, float], end: tuple[float, float], timestamps: Mapping[int, tuple[int, ...]]) -> float:
    """Return the seconds between two marks, each set between two times of this computer's clock.

    The boards' clocks are more exact when asking takes long on a busy computer. `timestamps`: receipt timestamps of
    both answers by io_channel, in ticks that restart from 0 every second or after 2^32. A timestamp that contradicts
    the computer's clock is ignored, and so is a board without a clock.
    """
    shortest, longest = end[0] - begin[1], end[1] - begin[0]
    middle = (shortest + longest) / 2
    intervals = []
    for first, last in (pair for pair in timestamps.values() if len(pair) == 2):
        ticks = last - first
        seconds = (ticks / TICKS, (ticks + (1 << 32)) / TICKS, ticks / TICKS + round(middle - ticks / TICKS))
        nearest = min(seconds, key=lambda interval: abs(interval - middle))
        if shortest - _ANSWER_TIME <= nearest <= longest + _ANSWER_TIME:
            intervals.append(nearest)
    return statistics.median(intervals) if intervals else middle


def _number(chip: Any) -> int:
    """Return a chip key as a number, in the form of schema.chips_of()."""
    io_group, io_channel, chip_id = map(int, str(chip).split("-"))
    return io_group << 16 | io_channel << 8 | chip_id


class LineLoads:
    """Packets on the io_channels of these chips, compared with the maximum of their lines. `names`: "1-2" and so on."""

    def __init__(self, io: Any, chips: Sequence[str]) -> None:
        parts = sorted({tuple(map(int, chip.split("-")[:2])) for chip in chips})
        self.names = ["-".join(map(str, part)) for part in parts]
        self._ids = np.array([io_group << 8 | io_channel for io_group, io_channel in parts])
        #: Maximum packets per second of each io_channel, in the order of `names`.
        self.capacity: NDArray[np.float64] = np.array(io.capacity(parts))
        self._packets = np.zeros(len(parts), np.int64)
        self._full = np.zeros(len(parts), np.bool_)

    def clear(self) -> None:
        """Set all counts to 0."""
        self._packets[:] = 0
        self._full[:] = False

    def count(self, rows: NDArray[Any]) -> None:
        """Count rows from chips."""
        ids = chips_of(rows) >> 8
        index = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        listed = self._ids[index] == ids
        self._packets += np.bincount(index[listed], minlength=len(self._ids))
        self._full[index[listed & _fifo_is_full(rows)]] = True

    def saturated(self, seconds: float) -> list[str]:
        """Return the names of io_channels that may have lost hits in these `seconds`.

        They sent nearly the maximum of their line, or a chip reported a full FIFO.
        """
        full = self._full | (self._packets > _FULL * self.capacity * seconds)
        return [self.names[index] for index in np.flatnonzero(full).tolist()]


def _fifo_is_full(rows: NDArray[Any]) -> NDArray[np.bool_]:
    names = rows.dtype.names or ()
    if "fifo_full" in names:  # v1
        flag = rows["fifo_full"] > 0
    elif "reset_sample_flag" in names:  # v3, where these bits can be a packet counter
        return np.zeros(len(rows), np.bool_)
    else:
        flag = ((rows["local_fifo"] | rows["shared_fifo"]) & _FIFO_FULL) > 0
    return flag & is_hit(rows)


def rows_from_chips(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the rows that chips have sent."""
    result: NDArray[Any] = rows[(types_of(rows) < PacketType.TIMESTAMP) & (rows["direction"] == 1)]
    return result


def is_hit(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which of these rows from chips are data, shape (N,)."""
    data = _DATA_V3 if "reset_sample_flag" in (rows.dtype.names or ()) else PacketType.DATA
    result: NDArray[np.bool_] = types_of(rows) == data
    return result


def is_answer(rows: NDArray[Any], registers: Sequence[int]) -> NDArray[np.bool_]:
    """Return which of these rows from chips are answers with valid parity for one of these registers, shape (N,)."""
    address, _ = registers_of(rows)
    result: NDArray[np.bool_] = (types_of(rows) == PacketType.CONFIG_READ) & (rows["valid_parity"] == 1)
    return result & np.isin(address, registers)
