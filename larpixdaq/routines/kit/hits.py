"""What the channels send while a routine listens: from the stream that is recorded, or through any IO of
larpix-control."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import RequestError
from larpixdaq.routines.kit.lines import Lines
from larpixdaq.routines.kit.rows import is_hit
from larpixdaq.routines.kit.window import Window
from larpixdaq.schema import chips_of

#: Seconds for which what was on its way before is not counted, through an IO that is not the DAQ's: its packets are
#: not those of one stream, in which answers could mark the moment.
SETTLE: Final = 0.05
#: Seconds between two looks at what has come.
_LOOK: Final = 0.02
#: Seconds that each attempt at a measurement waits for the answers that mark it.
_PATIENCE: Final = (0.25, 0.5, 1.0, 2.0, 4.0)

#: A data packet with the right parity; `chip` is a place in the list of chips asked for. `trigger` is what made it:
#: NATURAL (also of all hits of v1 chips, which do not say it), EXTERNAL, CROSS or PERIODIC.
HIT: Final = np.dtype([("chip", "<i4"), ("channel", "<i4"), ("adc", "<i4"), ("trigger", "<i4")])
NATURAL, EXTERNAL, CROSS, PERIODIC = range(4)


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
        lines = Lines(io, chips)
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
