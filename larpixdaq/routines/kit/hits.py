"""What the channels send while a routine listens: from the stream that is recorded, or through any IO of
larpix-control."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.routines.kit.lines import Lines
from larpixdaq.routines.kit.rows import is_hit
from larpixdaq.routines.kit.window import Window
from larpixdaq.schema import chips_of

#: Seconds for which what was on its way before is not counted, through an IO that is not the DAQ's: its packets are
#: not those of one stream, in which answers could mark the moment.
SETTLE: Final = 0.05
#: Seconds between two looks at what has come.
_LOOK: Final = 0.02

#: A data packet with the right parity; `chip` is a place in the list of chips asked for.
HIT: Final = np.dtype([("chip", "<i4"), ("channel", "<i4"), ("adc", "<i4"), ("trigger", "<i4")])


class Hits(NamedTuple):
    """`hits`: dtype HIT, in the order in which they came. `seconds`: how long was listened. `left_out`: packets that
    nobody could look at, because more came than there was time for."""

    hits: NDArray[Any]
    seconds: float
    left_out: int


def collect(controller: Any, chips: Sequence[str], seconds: float, *, act: Callable[[], None] | None = None) -> Hits:
    """All hits of these chips, for so long; `act` is called when that has begun."""
    parts = [np.zeros(0, HIT)]
    with _listening(controller.io):
        found = _Stream(controller, chips, seconds, act)
        parts += found
        left_out = getattr(controller.io, "left_out", 0)
    return Hits(np.concatenate(parts), found.seconds, left_out)


class Rates(NamedTuple):
    """`hits` of each channel, shape (chips, channels), and the `seconds` in which they came: fewer than was listened
    for when more came than could be looked at. `saturated`: the "io_group-io_channel" of those that carried as much as
    they can, so that hits of their chips may be missing; none are noticed through an IO that is not the DAQ's."""

    hits: NDArray[np.int64]
    seconds: float
    saturated: list[str]

    @property
    def hz(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.hits / self.seconds
        return found


def rates(controller: Any, chips: Sequence[str], channels: int, seconds: float) -> Rates:
    """Hits of each channel while these chips are listened to for so long."""
    counts = np.zeros(len(chips) * channels, np.int64)
    with _listening(controller.io):
        found = _Stream(controller, chips, seconds)
        for hits in found:
            at = hits["chip"] * channels + hits["channel"]
            counts += np.bincount(at[hits["channel"] < channels], minlength=len(counts))
        left_out = getattr(controller.io, "left_out", 0)
    looked_at = int(counts.sum())
    share = looked_at / (looked_at + left_out) if looked_at else 1.0
    seconds = found.seconds * share
    return Rates(counts.reshape(len(chips), channels), seconds, found.saturated(seconds))


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


class _Stream:
    """Hits as they come; `seconds` says at the end how long that was."""

    def __init__(
        self, controller: Any, chips: Sequence[str], seconds: float, act: Callable[[], None] | None = None
    ) -> None:
        self._controller, self._chips, self._act = controller, chips, act
        self._lines = Lines(controller.io, chips) if hasattr(controller.io, "take_rows") else None
        self.seconds = seconds

    def __iter__(self) -> Iterator[NDArray[Any]]:
        io, places = self._controller.io, _places(self._chips)
        if self._lines is not None:
            window = Window(self._controller, self._chips, self.seconds, self._act)
            for rows in window:
                self._lines.look(rows)
                yield _of_rows(rows, places)
            self.seconds = window.seconds
            return
        time.sleep(SETTLE)
        io.empty_queue()
        if self._act is not None:
            self._act()
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(_LOOK, left))
            yield _of_packets(io.empty_queue()[0], places)

    def saturated(self, seconds: float) -> list[str]:
        return self._lines.saturated(seconds) if self._lines is not None else []


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
