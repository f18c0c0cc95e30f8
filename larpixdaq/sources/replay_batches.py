"""Pieces of recorded files on their way through the decoders: board messages, and rows that become messages again.

A piece fills as many rows as there is room for, and the counters count these rows only.
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
from larpixdaq.sources.data_quality import sum_notices
from larpixdaq.sources.source import Source

#: Bytes of a header or word of PACMAN format 1.0.
_UNIT: Final = 24
#: Notices about messages, and not about their words.
_MESSAGE_NOTICES: Final = [NOTICES.index(name) for name in ("doubled", "back", "ahead")]
#: The counters of a message's header and the amounts that it adds to them.
_HEADER: Final = {Count.MESSAGES: 1, Count.BYTES_IN: _UNIT, Count.HEADER_BYTES: _UNIT, Count.TIME_ROWS: 1}


def _as_void(rows: NDArray[Any]) -> NDArray[Any]:
    """View rows without their columns, because numpy copies such rows whole and not column by column."""
    return rows.view(np.dtype((np.void, rows.dtype.itemsize)))


def row_times(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return seconds and ticks for replay.Clock: seconds of rows of type 4, ticks of received words; -1 elsewhere."""
    kinds = types_of(rows)
    seconds = np.where(kinds == PacketType.TIMESTAMP, rows["timestamp"].astype(np.int64), -1)
    ticks = np.full(len(rows), -1, np.int64)
    if "receipt_timestamp" in (rows.dtype.names or ()):
        words = (kinds < PacketType.TIMESTAMP) & (rows["direction"] == 1)
        ticks[words] = rows["receipt_timestamp"][words]
    return seconds, ticks


class Decoders:
    """Two decoders per io_group, made at its first message: for messages as recorded, and for rows encoded again."""

    def __init__(self, asic: Asic, *, format: str, clock64: bool) -> None:
        self.asic = asic
        self._options: dict[str, Any] = {"format": format, "clock64": clock64}
        self._decoders: dict[tuple[int, bool], PacmanDecoder] = {}
        self.counts = np.zeros((0, len(Count)), np.uint64)

    def start(self, counts: NDArray[np.uint64]) -> None:
        self.counts = counts
        for (io_group, _), decoder in self._decoders.items():
            decoder.start(counts[io_group])

    def decoder(self, io_group: int, *, encoded: bool = False) -> PacmanDecoder:
        decoder = self._decoders.get((io_group, encoded))
        if decoder is None:
            options = {"format": "1.0"} if encoded else self._options
            decoder = self._decoders[io_group, encoded] = PacmanDecoder(io_group, int(self.asic), **options)
            decoder.start(self.counts[io_group])
        decoder.heard(time.time_ns())
        return decoder

    def reject(self, io_group: int, size: int) -> None:
        """Count bytes outside of messages."""
        for count, value in ((Count.BYTES_IN, size), (Count.REJECTED_BYTES, size), (Count.REJECTED_MESSAGES, 1)):
            self.counts[io_group, count] += np.uint64(value)
        self.decoder(io_group).note(NOTICES.index("rejected"), 1, size)

    def noticed(self, io_group: int) -> NDArray[Any]:
        """Return the traces of losses before the recording, dtype schema.NOTICE."""
        parts = [np.zeros(len(NOTICES), NOTICE)]
        for (group, encoded), decoder in self._decoders.items():
            if group == io_group:
                notices = decoder.noticed()
                if encoded:  # the messages were made here, so only their words count
                    notices[_MESSAGE_NOTICES] = 0
                parts.append(notices)
        return sum_notices(parts)

    def forget(self) -> None:
        """Begin another recording, whose messages do not follow those of the previous one."""
        for decoder in self._decoders.values():
            decoder.forget()

    def take_unknown(self) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, UNKNOWN_WORD), *(each.take_unknown() for each in self._decoders.values())])


class _Piece:
    """`times`, shape (N,): recorded times of its messages or rows; None: they do not matter.

    Messages or rows before `_end` may be decoded, those before `_at` have been. `text`: an INFO text before the piece,
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
        """Return the recorded time of the next message or row; 0 if the piece is used up."""
        return 0.0 if self.used_up else float(self._times[self._at])

    def release(self, until: float) -> bool:
        """Release the messages or rows until this recorded time for decode(). Returns False when there are none."""
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
        # Maximum rows of all messages before each one: a message makes a row of its own, and one for each word of at
        # least 16 bytes.
        self._max_rows = np.concatenate(([0], np.cumsum(1 + np.maximum(spans["length"].astype(np.int64) - 8, 0) // 16)))
        self._open: PacmanDecoder | None = None  # the decoder of a message with more rows than there was room for

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
            # One row more than needed, because a decoder has used up its input only when it leaves a row free.
            room = self._max_rows[self._at] + len(rows) - made - 1
            fit = min(int(np.searchsorted(self._max_rows, room, side="right")) - 1, self._end)
            if fit <= self._at:
                self._open = self._decoders.decoder(int(self._groups[self._at]))
                self._open.feed(self._data, self._spans[self._at : self._at + 1])
                self._at += 1
            else:
                made += self._decode_messages(slice(self._at, fit), rows[made:])
                self._at = fit
        return made

    def _decode_messages(self, part: slice, rows: NDArray[Any]) -> int:
        """Decode messages whose rows all fit into `rows`."""
        groups, spans = self._groups[part], self._spans[part]
        if (groups == groups[0]).all():
            return self._decode(int(groups[0]), spans, rows)
        lengths = np.zeros(len(spans), np.int64)
        parts: list[tuple[NDArray[np.intp], NDArray[Any], NDArray[np.intp]]] = []
        ordered = True
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            most = int((self._max_rows[part.start + places + 1] - self._max_rows[part.start + places]).sum())
            own = np.empty(most + 1, rows.dtype)
            own = own[: self._decode(int(group), spans[places], own)]
            first = np.flatnonzero(types_of(own) == PacketType.TIMESTAMP)
            parts.append((places, own, first))
            ordered &= len(first) == len(places)
            if ordered:
                lengths[places] = np.diff(first, append=len(own))
        if not ordered:
            # A message that was rejected as a whole has no row to show its place, so the io_groups follow each other.
            made = np.concatenate([own for _, own, _ in parts])
            _as_void(rows)[: len(made)] = _as_void(made)
            return len(made)
        starts = np.cumsum(lengths) - lengths
        for places, own, first in parts:
            _as_void(rows)[np.repeat(starts[places] - first, lengths[places]) + np.arange(len(own))] = _as_void(own)
        return int(lengths.sum())

    def _decode(self, group: int, spans: NDArray[Any], rows: NDArray[Any]) -> int:
        decoder = self._decoders.decoder(group)
        decoder.feed(self._data, spans)
        return decoder.decode(rows)


class RecordedRows(_Piece):
    """Rows of a packet file from hdf5.recordings, without INFO rows, and the io_group of each. Each makes one row."""

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
            self._decode_rows(self._rows[part], self._groups[part], rows[made : made + count])
            self._at += count
            made += count
        return made

    def _decode_rows(self, recorded: NDArray[Any], groups: NDArray[np.uint8], rows: NDArray[Any]) -> None:
        kinds = types_of(recorded)
        counts = self._decoders.counts
        sent = (kinds < PacketType.TIMESTAMP) & (recorded["direction"] == 0)
        if sent.any():
            rows[sent] = self._sent_rows(recorded[sent])
            counts[:, Count.SENT_ROWS] += np.bincount(groups[sent], minlength=len(counts)).astype(np.uint64)
        others = ~sent
        for group in np.unique(groups[others]):
            places = np.flatnonzero(others & (groups == group))
            own = _as_void(recorded)[places].view(recorded.dtype)
            own = self._reencode(int(group), own, continued=kinds[places[0]] != PacketType.TIMESTAMP)
            _as_void(rows)[places] = _as_void(own)

    def _reencode(self, group: int, recorded: NDArray[Any], *, continued: bool) -> NDArray[Any]:
        """Encode received rows of one io_group as messages, and decode these.

        `continued`: the first rows belong to a message whose header came in an earlier part, or is missing. The header
        that they get here is taken out of rows and counters, because both would otherwise depend on the cut.
        """
        decoder = self._decoders.decoder(group, encoded=True)
        data, spans = encode_pacman(recorded, asic=int(self._decoders.asic), format="1.0")
        rows = np.empty(len(recorded) + continued + 1, recorded.dtype)
        decoder.feed(data, spans)
        made = decoder.decode(rows)
        if continued:
            for count, value in _HEADER.items():
                self._decoders.counts[group, count] -= np.uint64(value)
        return rows[int(continued) : made]

    def _sent_rows(self, recorded: NDArray[Any]) -> NDArray[Any]:
        """Return rows of sent words: every column from the bits of the word, the others as recorded."""
        rows = np.empty_like(recorded)
        asic = int(self._decoders.asic)
        word_codec.decode(word_codec.encode(recorded, asic=asic), rows, asic=asic, direction=0)
        for name in {"chip_key", "io_group", "io_channel", "receipt_timestamp"} & set(recorded.dtype.names or ()):
            rows[name] = recorded[name]
        return rows


class PieceSource(Source):
    """Base of sources that play pieces one after another. They set `_decoders`, and `_piece` to the present one."""

    _decoders: Decoders
    _piece: RecordedMessages | RecordedRows | None = None

    def start(self, counts: NDArray[np.uint64]) -> None:
        super().start(counts)
        self._decoders.start(counts)

    def decode(self, rows: NDArray[Any]) -> int:
        return self._piece.decode(rows) if self._piece is not None else 0

    def take_unknown(self) -> NDArray[Any]:
        return self._decoders.take_unknown()

    def _noticed(self, io_group: int) -> NDArray[Any]:
        return self._decoders.noticed(io_group)
