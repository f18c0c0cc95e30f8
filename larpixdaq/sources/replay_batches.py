"""Pieces of recorded files on their way through the decoders: messages as they were, and rows that become messages
again.

A piece hands out rows bit by bit, as there is room, and the counters say at each moment what was handed out.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native import word_codec
from larpixdaq._native.decoders import PacmanDecoder, encode_pacman
from larpixdaq.constants import BLOCK_ROWS, Count
from larpixdaq.schema import NOTICE, NOTICES, UNKNOWN_WORD, Asic, PacketType, types_of
from larpixdaq.sources.data_quality import added, setup_findings
from larpixdaq.sources.source import BoardStatus

#: Bytes of a header or word of PACMAN format 1.0.
_UNIT: Final = 24
#: What decoders notice of messages, and not of their words.
_OF_MESSAGES: Final = [NOTICES.index(name) for name in ("doubled", "back", "ahead")]
#: The counters of a message's header and the amounts that it adds to them.
_HEADER: Final = {Count.MESSAGES: 1, Count.BYTES_IN: _UNIT, Count.HEADER_BYTES: _UNIT, Count.TIME_ROWS: 1}


def _blank(rows: NDArray[Any]) -> NDArray[Any]:
    """The same rows without their columns: numpy copies such rows whole, and not column by column."""
    return rows.view(np.dtype((np.void, rows.dtype.itemsize)))


def row_times(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Seconds and ticks as replay.Clock takes them: seconds of rows of type 4, ticks of received words; -1
    elsewhere."""
    kinds = types_of(rows)
    seconds = np.where(kinds == PacketType.TIMESTAMP, rows["timestamp"].astype(np.int64), -1)
    ticks = np.full(len(rows), -1, np.int64)
    if "receipt_timestamp" in (rows.dtype.names or ()):
        words = (kinds < PacketType.TIMESTAMP) & (rows["direction"] == 1)
        ticks[words] = rows["receipt_timestamp"][words]
    return seconds, ticks


class Decoders:
    """One decoder for each io_group, made when its first message comes, and one for each whose rows are encoded
    again."""

    def __init__(self, asic: Asic, *, format: str, clock64: bool) -> None:
        self.asic = asic
        self._options: dict[str, Any] = {"format": format, "clock64": clock64}
        self._decoders: dict[tuple[int, bool], PacmanDecoder] = {}
        self.counts = np.zeros((0, len(Count)), np.uint64)

    def start(self, counts: NDArray[np.uint64]) -> None:
        self.counts = counts
        for (io_group, _), decoder in self._decoders.items():
            decoder.start(counts[io_group])

    def of(self, io_group: int, *, encoded: bool = False) -> PacmanDecoder:
        decoder = self._decoders.get((io_group, encoded))
        if decoder is None:
            options = {"format": "1.0"} if encoded else self._options
            decoder = self._decoders[io_group, encoded] = PacmanDecoder(io_group, int(self.asic), **options)
            decoder.start(self.counts[io_group])
        decoder.heard(time.time_ns())
        return decoder

    def reject(self, io_group: int, size: int) -> None:
        """Count bytes that are in no message."""
        for count, value in ((Count.BYTES_IN, size), (Count.REJECTED_BYTES, size), (Count.REJECTED_MESSAGES, 1)):
            self.counts[io_group, count] += np.uint64(value)
        self.of(io_group).note(NOTICES.index("rejected"), 1, size)

    def noticed(self, io_group: int) -> NDArray[Any]:
        """What speaks for a loss before these bytes were recorded, dtype schema.NOTICE."""
        found = [np.zeros(len(NOTICES), NOTICE)]
        for (group, encoded), decoder in self._decoders.items():
            if group == io_group:
                notices = decoder.noticed()
                if encoded:  # the messages are of our own making
                    notices[_OF_MESSAGES] = 0
                found.append(notices)
        return added(found)

    def forget(self) -> None:
        """Another recording begins: its messages do not go on from those of the one before."""
        for decoder in self._decoders.values():
            decoder.forget()

    def take_unknown(self) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, UNKNOWN_WORD), *(each.take_unknown() for each in self._decoders.values())])


class _Piece:
    """`times`, shape (N,): when its messages or rows came (None: that does not matter).

    What is before `_end` may be handed out, what is before `_at` was. `text` is an INFO text that belongs before it,
    with its time (unix seconds).
    """

    text: tuple[str, int] | None = None

    def __init__(self, count: int, times: NDArray[np.float64] | None) -> None:
        self._times = np.zeros(count) if times is None else times
        self._at = self._end = 0

    @property
    def used_up(self) -> bool:
        return self._at == len(self._times)

    def next_time(self) -> float:
        """Recorded time of what comes next; of a piece that is used up: at once."""
        return 0.0 if self.used_up else float(self._times[self._at])

    def release(self, until: float) -> bool:
        """Let what came until this recorded time be decoded; False when that is nothing."""
        self._end = int(np.searchsorted(self._times, until, side="right"))
        return self._end > self._at


class RecordedMessages(_Piece):
    """Board messages: bytes, spans (dtype schema.SPAN) and the io_group of each."""

    def __init__(
        self,
        decoders: Decoders,
        data: NDArray[np.uint8],
        spans: NDArray[Any],
        groups: NDArray[np.uint8],
        times: NDArray[np.float64] | None,
    ) -> None:
        super().__init__(len(spans), times)
        self._decoders = decoders
        self._data = data
        self._spans = spans
        self._groups = groups
        # A message makes a row of its own and one for each word, of which none is shorter than 16 bytes.
        self._most = np.concatenate(([0], np.cumsum(1 + np.maximum(spans["length"].astype(np.int64) - 8, 0) // 16)))
        self._open: PacmanDecoder | None = None  # in the middle of a message that did not fit into the rows given

    def decode(self, rows: NDArray[Any]) -> int:
        made = 0
        while made < len(rows):
            if self._open is not None:
                made += self._open.decode(rows[made:])
                if made == len(rows):
                    break
                self._open = None
            if self._at >= self._end:
                break
            # A decoder that fills less than its rows is done with its input: so one row more than is needed.
            room = self._most[self._at] + len(rows) - made - 1
            fit = min(int(np.searchsorted(self._most, room, side="right")) - 1, self._end)
            if fit <= self._at:
                self._open = self._decoders.of(int(self._groups[self._at]))
                self._open.feed(self._data, self._spans[self._at : self._at + 1])
                self._at += 1
            else:
                made += self._whole(slice(self._at, fit), rows[made:])
                self._at = fit
        return made

    def _whole(self, part: slice, rows: NDArray[Any]) -> int:
        """Decode these messages, which all fit into the rows."""
        groups, spans = self._groups[part], self._spans[part]
        if (groups == groups[0]).all():
            return self._decode(int(groups[0]), spans, rows)
        lengths = np.zeros(len(spans), np.int64)
        parts: list[tuple[NDArray[np.intp], NDArray[Any], NDArray[np.intp]]] = []
        ordered = True
        for group in np.unique(groups):
            which = np.flatnonzero(groups == group)
            most = int((self._most[part.start + which + 1] - self._most[part.start + which]).sum())
            own = np.empty(most + 1, rows.dtype)
            own = own[: self._decode(int(group), spans[which], own)]
            first = np.flatnonzero(types_of(own) == PacketType.TIMESTAMP)
            parts.append((which, own, first))
            ordered &= len(first) == len(which)
            if ordered:
                lengths[which] = np.diff(first, append=len(own))
        if not ordered:
            # A message that was rejected as a whole has no row that would show its place: one io_group after the other
            # then.
            made = np.concatenate([own for _, own, _ in parts])
            _blank(rows)[: len(made)] = _blank(made)
            return len(made)
        place = np.cumsum(lengths) - lengths
        for which, own, first in parts:
            _blank(rows)[np.repeat(place[which] - first, lengths[which]) + np.arange(len(own))] = _blank(own)
        return int(lengths.sum())

    def _decode(self, group: int, spans: NDArray[Any], rows: NDArray[Any]) -> int:
        decoder = self._decoders.of(group)
        decoder.feed(self._data, spans)
        return decoder.decode(rows)


class RecordedRows(_Piece):
    """Rows of a packet file as hdf5.recordings gives them, without INFO rows, and the io_group of each. Each row of
    the file gives one row."""

    def __init__(
        self,
        decoders: Decoders,
        rows: NDArray[Any],
        groups: NDArray[np.uint8],
        times: NDArray[np.float64] | None,
        text: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(len(rows), times)
        self.text = text
        self._decoders = decoders
        self._rows = rows
        self._groups = groups

    def decode(self, rows: NDArray[Any]) -> int:
        made = 0
        while made < len(rows) and self._at < self._end:
            count = min(len(rows) - made, self._end - self._at, BLOCK_ROWS)
            part = slice(self._at, self._at + count)
            self._some(self._rows[part], self._groups[part], rows[made : made + count])
            self._at += count
            made += count
        return made

    def _some(self, given: NDArray[Any], groups: NDArray[np.uint8], rows: NDArray[Any]) -> None:
        kinds = types_of(given)
        counts = self._decoders.counts
        sent = (kinds < PacketType.TIMESTAMP) & (given["direction"] == 0)
        if sent.any():
            rows[sent] = self._sent_rows(given[sent])
            counts[:, Count.SENT_ROWS] += np.bincount(groups[sent], minlength=len(counts)).astype(np.uint64)
        others = ~sent
        for group in np.unique(groups[others]):
            which = np.flatnonzero(others & (groups == group))
            own = _blank(given)[which].view(given.dtype)
            own = self._again(int(group), own, continued=kinds[which[0]] != PacketType.TIMESTAMP)
            _blank(rows)[which] = _blank(own)

    def _again(self, group: int, given: NDArray[Any], *, continued: bool) -> NDArray[Any]:
        """Received rows of one io_group through messages and decoder.

        Where the first of them belong to a message whose header has gone before (or that never had any), the header
        that they get is taken out of the rows and counters again: else both would depend on how the rows were cut.
        """
        decoder = self._decoders.of(group, encoded=True)
        data, spans = encode_pacman(given, asic=int(self._decoders.asic), format="1.0")
        rows = np.empty(len(given) + continued + 1, given.dtype)
        decoder.feed(data, spans)
        made = decoder.decode(rows)
        if continued:
            for count, value in _HEADER.items():
                self._decoders.counts[group, count] -= np.uint64(value)
        return rows[int(continued) : made]

    def _sent_rows(self, given: NDArray[Any]) -> NDArray[Any]:
        """Words that had been sent: every column from the bits, as for received ones, beside what is not in the
        word."""
        rows = np.empty_like(given)
        asic = int(self._decoders.asic)
        word_codec.decode(word_codec.encode(given, asic=asic), rows, asic=asic, direction=0)
        for name in {"chip_key", "io_group", "io_channel", "receipt_timestamp"} & set(given.dtype.names or ()):
            rows[name] = given[name]
        return rows


class PieceSource:
    """What sources that play pieces one after the other have in common. They make `_decoders`, and set `_piece` to what
    is played now."""

    name: str
    io_groups: tuple[int, ...]
    _decoders: Decoders

    def __init__(self) -> None:
        self._piece: RecordedMessages | RecordedRows | None = None
        self._problems: list[str] = []

    def decode(self, rows: NDArray[Any]) -> int:
        return self._piece.decode(rows) if self._piece is not None else 0

    def take_unknown(self) -> NDArray[Any]:
        return self._decoders.take_unknown()

    def delivered(self, made: int, stored: int, now: int) -> None:
        pass

    def boards(self) -> list[BoardStatus]:
        return [
            BoardStatus(group, self.name, setup=tuple(setup_findings(group, self._decoders.noticed(group))))
            for group in self.io_groups
        ]

    def problems(self) -> list[str]:
        problems, self._problems = self._problems, []
        return problems
