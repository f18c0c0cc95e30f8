"""What the channels send while a routine listens: from the stream that is recorded, or through any IO of
larpix-control.

One measurement: what chips sent between two answers, which mark its begin and its end, however late they come.

Rows before a chip's answer were sent on its io_channel before that answer, and rows behind it after. So one chip of
each io_channel is asked for registers when a measurement begins, and again when it ends: rows that were on their way
when registers were written are not counted, and rows that come late are. A measurement without both marks on each of
its io_channels says so, and is worth nothing.

What the io_channels of some chips carry while a routine counts, and whether that is as much as they can.

What routines look for in rows as they are recorded (schema.py), of any generation of chips.
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

#: Seconds for which what was on its way before is not counted, through an IO that is not the DAQ's: its packets are
#: not those of one stream, in which answers could mark the moment.
SETTLE: Final = 0.05
#: Seconds that each attempt at a measurement waits for the answers that mark it.
_PATIENCE: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
#: A data packet with the right parity; `chip` is a place in the list of chips asked for. `trigger` is what made it:
#: NATURAL (also of all hits of v1 chips, which do not say it), EXTERNAL, CROSS or PERIODIC.
HIT: Final = np.dtype([("chip", "<i4"), ("channel", "<i4"), ("adc", "<i4"), ("trigger", "<i4")])
NATURAL, EXTERNAL, CROSS, PERIODIC = range(4)
#: Registers that one mark asks for. Any of their answers marks, because answers get lost.
_READS: Final = 3
#: Marks until the same registers are asked for again, so that a late answer is not taken for that of a later mark. v1
#: chips have 63 registers.
_MARKS: Final = 21
#: Seconds within which a chip answers what its board has sent.
_ANSWER: Final = 0.002
#: Of the boards' clocks a second.
TICKS: Final = 10_000_000
#: Seconds between two looks at what has come.
_LOOK: Final = 0.01
#: Of the packets that its line can carry, an io_channel that sends so many is full: chips send in bursts.
_FULL: Final = 0.8
#: The bit of a FIFO's flags that says so.
_FIFO_FULL: Final = 2
_DATA_V3: Final = 1


class Hits(NamedTuple):
    """`hits`: dtype HIT, in the order in which they came. `seconds`: how long was listened. `left_out`: packets that
    nobody could look at, because more came than there was time for. `saturated`: as in Rates."""

    hits: NDArray[Any]
    seconds: float
    left_out: int
    saturated: list[str]


def collect(controller: Any, chips: Sequence[str], seconds: float, *, act: Callable[[], None] | None = None) -> Hits:
    """All hits of these chips, for so long; `act` is called when that has begun, again if the measurement has to be
    made again. RequestError names io_channels on which it cannot be made."""
    parts: list[NDArray[Any]] = []
    found = _measure(controller, chips, seconds, parts.clear, parts.append, act)
    return Hits(np.concatenate([np.zeros(0, HIT), *parts]), found.seconds, found.left_out, found.saturated)


class Rates(NamedTuple):
    """Natural `hits` of each channel, shape (chips, channels), and the `seconds` in which they came: fewer than was
    listened for when more came than could be looked at. `saturated`: the "io_group-io_channel" of those that carried as
    much as they can, so that hits of their chips may be missing; none are noticed through an IO that is not the
    DAQ's."""

    hits: NDArray[np.int64]
    seconds: float
    saturated: list[str]

    @property
    def hz(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.hits / self.seconds
        return found


def rates(controller: Any, chips: Sequence[str], channels: int, seconds: float) -> Rates:
    """Natural hits of each channel while these chips are listened to for so long: those of other triggers say nothing
    of its threshold. v1 chips do not say what made a hit; `Chips.untriggered()` keeps other triggers off.

    RequestError names io_channels on which the measurement cannot be made.
    """
    counts = np.zeros(len(chips) * channels, np.int64)

    def begin() -> None:
        counts[:] = 0

    def take(hits: NDArray[Any]) -> None:
        hits = hits[(hits["channel"] < channels) & (hits["trigger"] == NATURAL)]
        counts[:] += np.bincount(hits["chip"] * channels + hits["channel"], minlength=len(counts))

    found = _measure(controller, chips, seconds, begin, take)
    return Rates(counts.reshape(len(chips), channels), found.seconds, found.saturated)


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
    """Give the hits of these chips to `take`, as they come. `begin` comes before the first, and again when all before
    it count for nothing: a measurement whose begin or end is not marked on each io_channel is made again."""
    io, places = controller.io, _places(chips)
    with _listening(io):
        if not hasattr(io, "take_rows"):
            begin()
            return _by_the_clock(io, seconds, lambda packets: take(_of_packets(packets, places)), act)
        lines = LineLoads(io, chips)
        for patience in _PATIENCE:
            begin()
            lines.clear()
            window = Window(controller, chips, seconds, patience, act)
            for rows in window:
                lines.look(rows)
                take(_of_rows(rows, places))
            if not window.unmarked:
                return _Measured(window.seconds, window.left_out, lines.saturated(window.seconds))
    names = ", ".join(f"{io_group}-{io_channel}" for io_group, io_channel in window.unmarked)
    raise RequestError(
        f"io_channel {names}: not measured, since no chip there answers the reads that mark begin and end "
        f"({len(_PATIENCE)} attempts, the last one waited {_PATIENCE[-1]:g} s); chips= can leave its chips out"
    )


def _by_the_clock(
    io: Any, seconds: float, take: Callable[[Sequence[Any]], object], act: Callable[[], None] | None
) -> _Measured:
    """The packets of an IO that is not the DAQ's."""
    time.sleep(SETTLE)
    io.empty_queue()
    if act is not None:
        act()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_LOOK, left))
        take(io.empty_queue()[0])
    return _Measured(seconds, 0, [])


@contextlib.contextmanager
def _listening(io: Any) -> Iterator[None]:
    """To everything."""
    if hasattr(io, "listen_to"):
        io.listen_to = "all"
    io.start_listening()
    try:
        yield
    finally:
        io.stop_listening()
        if hasattr(io, "listen_to"):
            io.listen_to = None


def _places(chips: Sequence[str]) -> dict[tuple[int, int, int], int]:
    keys = [tuple(int(part) for part in str(chip).split("-")) for chip in chips]
    return {(key[0], key[1], key[2]): place for place, key in enumerate(keys)}


def _of_rows(rows: NDArray[Any], places: dict[tuple[int, int, int], int]) -> NDArray[Any]:
    """Of rows that chips have sent."""
    v1 = "chip_key" in (rows.dtype.names or ())
    rows = rows[is_hit(rows) & (rows["valid_parity"] == 1)]
    found, back = np.unique(chips_of(rows), return_inverse=True)
    known = [places.get((k >> 16, k >> 8 & 255, k & 255), -1) for k in found.tolist()]
    hits = np.zeros(len(rows), HIT)
    hits["chip"] = np.array(known, np.int32)[back]
    hits["channel"] = rows["channel" if v1 else "channel_id"]
    hits["adc"] = rows["adc_counts" if v1 else "dataword"]
    if not v1:
        hits["trigger"] = rows["trigger_type"]
    return hits[hits["chip"] >= 0]


def _of_packets(packets: Sequence[Any], places: dict[tuple[int, int, int], int]) -> NDArray[Any]:
    """Of larpix-control's packets, for an IO that is not the DAQ's."""
    found = []
    for packet in packets:
        data = getattr(packet, "DATA_PACKET", None)
        if data is None or packet.packet_type != data or not packet.has_valid_parity():
            continue
        place = places.get((packet.io_group, packet.io_channel, packet.chip_id), -1)
        if place >= 0:
            trigger = getattr(packet, "trigger_type", 0)
            found.append((place, packet.channel_id, packet.dataword, trigger))
    return np.array(found, HIT)


class Window:
    """One attempt at a measurement. Iterate over it for the rows (schema.py) that chips sent on the io_channels of
    `chips` meanwhile; after that the attributes are valid. The Controller's io listens already, to everything.

    `unmarked`: (io_group, io_channel) of those without a mark; the rows are worth nothing then. `seconds`: between the
    marks, less the share of the rows that was left out. `left_out`: rows between the marks that nobody could look at.
    """

    def __init__(
        self,
        controller: Any,
        chips: Sequence[str],
        seconds: float,
        patience: float,
        act: Callable[[], None] | None = None,
    ) -> None:
        """`patience`: seconds within which answers have to come. `act` is called after the begin."""
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
        self._within = np.zeros(1 << 16, np.bool_)  # by io_group << 8 | io_channel
        self._asked: dict[int, set[int]] = {}  # by the same, chips whose answer is a mark
        self._registers: list[int] = []
        self._stamps: dict[int, tuple[int, ...]] = dict.fromkeys(self._chips, ())  # of the last two marks
        self._rows = 0

    def __iter__(self) -> Iterator[NDArray[Any]]:
        marks: dict[int, str] = self._io.marks
        unknown = {line: chips for line, chips in self._chips.items() if marks.get(line) not in chips}
        if unknown:
            for _ in self._mark(unknown, begin=True):
                pass
            self._within[:] = False
            if self._asked:
                return
        mine = {line: [marks[line]] for line in self._chips}
        began = yield from self._mark(mine, begin=True)
        if self._asked:
            return
        rows, left_out = self._rows, self._io.left_out
        if self._act is not None:
            self._act()
        while (left := began[1] + self.seconds - time.monotonic()) > 0:
            time.sleep(min(_LOOK, left))
            yield from self._come()
        ended = yield from self._mark(mine, begin=False)
        rows, self.left_out = self._rows - rows, self._io.left_out - left_out
        self.seconds = elapsed(began, ended, self._stamps) * (rows / (rows + self.left_out) if rows else 1.0)

    def _mark(self, chips: dict[int, list[str]], *, begin: bool) -> Any:
        """Ask these chips, by io_channel, and wait for an answer on each io_channel. Returns the moments (monotonic
        seconds) between which they were asked; `unmarked` and `_asked` are then those without an answer."""
        self._io.marked = (self._io.marked + 1) % _MARKS
        self._registers = list(range(self._io.marked * _READS, (self._io.marked + 1) * _READS))
        self._asked = {line: {_number(chip) for chip in each} for line, each in chips.items()}
        self._begin = begin
        before = time.monotonic()
        self._io.request_registers([chip for each in chips.values() for chip in each], self._registers)
        after = time.monotonic()
        late = False
        while self._asked and not late:
            late = time.monotonic() > after + self._patience  # once more then: this process may have stood still
            time.sleep(_LOOK)
            yield from self._come()
        for line in self._asked:
            self._io.marks.pop(line, None)
        self.unmarked = [(line >> 8, line & 0xFF) for line in self._asked]
        return before, after

    def _come(self) -> Iterator[NDArray[Any]]:
        pieces = self._io.take_rows()
        if pieces:
            rows = np.concatenate(pieces)
            self._rows += len(rows)
            yield self._cut(of_chips(rows))

    def _cut(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Those within the window."""
        chips = chips_of(rows)
        lines = chips >> 8
        keep: NDArray[np.bool_] = self._within[lines]
        for at in np.flatnonzero(is_answer(rows, self._registers)).tolist() if self._asked else ():
            chip, line = int(chips[at]), int(lines[at])
            if chip in self._asked.get(line, ()):
                del self._asked[line]
                self._io.marks[line] = "-".join(map(str, (chip >> 16, chip >> 8 & 0xFF, chip & 0xFF)))
                if "receipt_timestamp" in (rows.dtype.names or ()):
                    self._stamps[line] = *self._stamps[line][-1:], int(rows["receipt_timestamp"][at])
                self._within[line] = self._begin
                keep[at:][lines[at:] == line] = self._begin
                keep[at] = False
        return rows[keep]


def elapsed(began: tuple[float, float], ended: tuple[float, float], stamps: Mapping[int, tuple[int, ...]]) -> float:
    """Seconds between two marks, each made between two moments of this computer's clock.

    How long asking takes, on a computer that is busy, does not count if the boards' clocks say better: `stamps` are
    the receipt timestamps of both answers on each io_channel, in ticks that start anew every second, or after 2^32. A
    board that says what cannot be, or has no clock, is not believed.
    """
    shortest, longest = ended[0] - began[1], ended[1] - began[0]
    middle = (shortest + longest) / 2
    found = []
    for first, last in (pair for pair in stamps.values() if len(pair) == 2):
        ticks = last - first
        seconds = (ticks / TICKS, (ticks + (1 << 32)) / TICKS, ticks / TICKS + round(middle - ticks / TICKS))
        nearest = min(seconds, key=lambda each: abs(each - middle))
        if shortest - _ANSWER <= nearest <= longest + _ANSWER:
            found.append(nearest)
    return statistics.median(found) if found else middle


def _number(chip: str) -> int:
    """As chips_of() has it."""
    io_group, io_channel, chip_id = map(int, chip.split("-"))
    return io_group << 16 | io_channel << 8 | chip_id


class LineLoads:
    """`names`: "io_group-io_channel" of these chips."""

    def __init__(self, io: Any, chips: Sequence[str]) -> None:
        parts = sorted({tuple(map(int, chip.split("-")[:2])) for chip in chips})
        self.names = ["-".join(map(str, part)) for part in parts]
        self._ids = np.array([io_group << 8 | io_channel for io_group, io_channel in parts])
        #: Packets a second, by place in `names`.
        self.carries: NDArray[np.float64] = np.array(io.carries(parts))
        self._packets = np.zeros(len(parts), np.int64)
        self._full = np.zeros(len(parts), np.bool_)

    def clear(self) -> None:
        """Forget what was looked at."""
        self._packets[:] = 0
        self._full[:] = False

    def look(self, rows: NDArray[Any]) -> None:
        """At what chips have sent."""
        ids = chips_of(rows) >> 8
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        ours = self._ids[place] == ids
        self._packets += np.bincount(place[ours], minlength=len(self._ids))
        self._full[place[ours & _says_full(rows)]] = True

    def saturated(self, seconds: float) -> list[str]:
        """Names of those that may have lost hits: in so many seconds they carried as much as they can, or chips said
        that a FIFO was full."""
        full = self._full | (self._packets > _FULL * self.carries * seconds)
        return [self.names[place] for place in np.flatnonzero(full).tolist()]


def _says_full(rows: NDArray[Any]) -> NDArray[np.bool_]:
    names = rows.dtype.names or ()
    if "fifo_full" in names:  # v1
        flag = rows["fifo_full"] > 0
    elif "reset_sample_flag" in names:  # v3, which may count packets in these bits
        return np.zeros(len(rows), np.bool_)
    else:
        flag = ((rows["local_fifo"] | rows["shared_fifo"]) & _FIFO_FULL) > 0
    said: NDArray[np.bool_] = flag & is_hit(rows)
    return said


def of_chips(rows: NDArray[Any]) -> NDArray[Any]:
    """Those that chips have sent."""
    found: NDArray[Any] = rows[(types_of(rows) < PacketType.TIMESTAMP) & (rows["direction"] == 1)]
    return found


def is_hit(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of those that chips have sent are data."""
    data = _DATA_V3 if "reset_sample_flag" in (rows.dtype.names or ()) else PacketType.DATA
    found: NDArray[np.bool_] = types_of(rows) == data
    return found


def is_answer(rows: NDArray[Any], registers: Sequence[int]) -> NDArray[np.bool_]:
    """Which of those that chips have sent say, with the right parity, what one of these registers holds."""
    address, _ = registers_of(rows)
    found: NDArray[np.bool_] = (types_of(rows) == PacketType.CONFIG_READ) & (rows["valid_parity"] == 1)
    return found & np.isin(address, registers)
