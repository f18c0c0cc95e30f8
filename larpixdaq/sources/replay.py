"""Replay of recorded files through the decoder of live boards, at the recorded speed, at another, or at full speed.

Board messages (raw files, logs) go through the decoder as they are. Rows of packet files first become messages of
PACMAN format 1.0, which has room for every column. Rows of sent words do not go through the decoder. INFO rows are left
out, because the recorder makes them again from their texts. The order of the file is kept, also between io_groups.

Clock gives the times of recorded messages, from the seconds of their headers and the ticks of their receipt timestamps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import FileError
from larpixdaq.hdf5 import names
from larpixdaq.hdf5.recordings import MessageLog, PacketFile, RawFile, open_recording
from larpixdaq.schema import TICK, Asic, layout_of
from larpixdaq.sources.replay_batches import Decoders, PieceSource, RecordedMessages, RecordedRows, row_times

#: Minimum seconds between two batches at recorded speed; less would only cost turns of the producer's loop.
_TURN: Final = 0.002
Recording = RawFile | PacketFile | MessageLog
#: Maximum seconds of a pause between two messages. A longer pause, or a step back of the clock, is skipped, because a
#: file may hold several runs or a broken header.
LONGEST_PAUSE: Final = 60


def _has_wide_clock(recording: Recording) -> bool:
    """Return whether the first messages of a recording have PACMAN format 1.0, whose clock has 64 bits."""
    if isinstance(recording, PacketFile):
        return False
    pieces: Iterator[tuple[Any, ...]] = recording.pieces(1) if isinstance(recording, RawFile) else recording.pieces()
    try:
        return any(bool(is_format_1_0(data, spans).any()) for data, spans, *_ in itertools.islice(pieces, 1))
    except (FileError, OSError):  # reported when the file is played
        return False


class ReplaySource(PieceSource):
    """Replay of files one after another.

    `files` are (io_group, path); the io_group is for files without io_groups. `speed` 1 is the recorded speed, math.inf
    full speed. The time runs from the first read() after start(). Damaged parts of a file are reported and left out.
    """

    kind = "replay"
    recorded = True
    drained = False  # a file has more until it is finished

    def __init__(
        self,
        files: Sequence[tuple[int, str | Path]],
        *,
        asic: Asic,
        format: str = "auto",
        clock64: bool = False,
        speed: float = 1.0,
    ) -> None:
        self._files = [(io_group, Path(path)) for io_group, path in files]
        self.address = ", ".join(str(path) for _, path in self._files)
        layout = layout_of(asic, clock64=clock64 or format == "1.0")
        super().__init__(f"replay of {self.address}", layout, tuple(sorted({io_group for io_group, _ in files})))
        self._presence.connected(0)  # whether boards were connected during the recording is not known
        self._asic = asic
        self._speed = speed
        self._at_once = math.isinf(speed)
        self._format = format
        self._clock64 = clock64
        self._pieces: Iterator[RecordedMessages | RecordedRows] = iter(())
        #: Open recordings, in the order of the files.
        self.recordings: list[Recording] = []
        self._began: tuple[float, float] | None = None  # first read(): monotonic seconds, and recorded time
        self._next_turn = 0.0
        self._clock = Clock()
        self._texts: list[tuple[str, int]] = []
        self._opened = False  # True: the layout stays as it is

    def open(self) -> None:
        """Open all files, so that a wrong file is reported first. After close(): play from the beginning."""
        self._decoders = Decoders(self._asic, format=self._format, clock64=self._clock64)
        self.recordings, self._piece, self._texts, self.finished = [], None, [], False
        io_groups: set[int] = set()
        for io_group, path in self._files:
            try:
                recording: Recording = open_recording(path) or MessageLog(path)
            except OSError as error:
                raise error if isinstance(error, FileError) else FileError(f"{path}: {error.strerror}") from None
            self.recordings.append(recording)
            if isinstance(recording, RawFile) and recording.left_out:
                self._problems.append(
                    f"{path}: the last {recording.left_out} messages have no io_group and are left out"
                )
            if path.name.endswith(names.PART) and _journaled(path):
                self._problems.append(f"{path}: not finished: blocks in its journal are not played (larpixdaq recover)")
            io_groups.update((io_group,) if isinstance(recording, MessageLog) else recording.io_groups(io_group))
        if (
            not self._opened
            and self._format == "auto"
            and any(_has_wide_clock(recording) for recording in self.recordings)
        ):
            self.layout = layout_of(self._asic, clock64=True)
        self._opened = True
        for recording in self.recordings:
            if isinstance(recording, PacketFile):
                recording.check(self._asic, self.layout)
        self.io_groups = tuple(sorted(io_groups))
        self._pieces = self._play()

    def close(self) -> None:
        for recording in self.recordings:
            recording.close()

    def start(self, counts: NDArray[np.uint64]) -> None:
        super().start(counts)
        self._began = None

    def due(self) -> float | None:
        if self.finished:
            return None
        if self._piece is None or self._began is None or self._at_once:
            return 0.0
        began, recorded = self._began
        return max(self._next_turn, began + (self._piece.next_time() - recorded) / self._speed)

    def read(self) -> bool:
        if self.finished:
            return False
        while self._piece is None or self._piece.used_up:
            self._piece = next(self._pieces, None)
            if self._piece is None:
                self.finished = True
                return False
            if self._piece.text is not None:
                # A batch of its own, so that the reader checks for room between any two texts.
                self._texts.append(self._piece.text)
                return True
        if self._at_once:
            return self._piece.release(math.inf)
        now = time.monotonic()
        if self._began is None:
            self._began = (now, self._piece.next_time())
        if now < self._next_turn:
            return False
        began, recorded = self._began
        released = self._piece.release(recorded + (now - began) * self._speed)
        if not released or not self._piece.used_up:
            self._next_turn = now + _TURN
        self.drained = not self._piece.used_up
        return released

    def texts(self) -> list[tuple[str, int]]:
        texts, self._texts = self._texts, []
        return texts

    def _play(self) -> Iterator[RecordedMessages | RecordedRows]:
        for (io_group, _), recording in zip(self._files, self.recordings, strict=True):
            self._decoders.forget()
            try:
                if isinstance(recording, PacketFile):
                    yield from self._play_rows(recording, io_group)
                else:
                    yield from self._play_messages(recording, io_group)
            except (FileError, OSError) as error:
                self._problems.append(f"{error}; the rest of this file is left out")
            recording.close()

    def _play_messages(self, recording: RawFile | MessageLog, io_group: int) -> Iterator[RecordedMessages]:
        pieces = recording.pieces(io_group) if isinstance(recording, RawFile) else self._log(recording, io_group)
        for data, spans, groups in pieces:
            times = None if self._at_once else self._clock.times(groups, *message_times(data, spans))
            yield RecordedMessages(self._decoders, data, spans, groups, times)

    def _log(self, log: MessageLog, io_group: int) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        for data, spans, lost, problem in log.pieces():
            if problem:
                self._problems.append(problem)
            if lost:
                self._decoders.reject(io_group, lost)
            yield data, spans, np.full(len(spans), io_group, np.uint8)

    def _play_rows(self, recording: PacketFile, io_group: int) -> Iterator[RecordedRows]:
        left_out = 0
        for rows, groups, unfit, texts in recording.pieces(self.layout, self._asic, io_group):
            left_out += unfit
            times = None if self._at_once else self._clock.times(groups, *row_times(rows))
            text: tuple[str, int] | None = None
            start = 0
            for end, following in [*((at, (line, seconds)) for at, line, seconds in texts), (len(rows), None)]:
                if text is not None or end > start:
                    own = None if times is None else times[start:end]
                    yield RecordedRows(self._decoders, rows[start:end], groups[start:end], own, text)
                start, text = end, following
        if left_out:
            self._problems.append(f"{recording.path}: {left_out} rows left out: no packet can look like them")
        if recording.textless:
            self._problems.append(f"{recording.path}: {recording.textless} INFO rows without a text in /messages")


def _journaled(part: Path) -> bool:
    """Return whether the journal of an unfinished part has blocks."""
    journal = part.with_name(part.name.removesuffix(names.PART) + names.JOURNAL)
    try:
        return journal.stat().st_size > 0
    except OSError:
        return False


class Clock:
    """Times of messages since the beginning of a replay, which never decrease. Each io_group has a clock of its own."""

    def __init__(self) -> None:
        self._now = 0.0
        self._boards: dict[int, _BoardClock] = {}

    def times(self, groups: NDArray[Any], seconds: NDArray[Any], ticks: NDArray[Any]) -> NDArray[np.float64]:
        """Return times in s, shape (N,), of messages with these io_groups, unix seconds and ticks (-1: unknown)."""
        times = np.full(len(groups), self._now)
        _, first = np.unique(groups, return_index=True)
        for place in np.sort(first):
            group = int(groups[place])
            board = self._boards.get(group)
            if board is None:
                board = self._boards[group] = _BoardClock(float(times[:place].max(initial=self._now)))
            which = np.flatnonzero(groups == group)
            times[which] = board.times(seconds[which], ticks[which])
        np.maximum.accumulate(np.maximum(times, self._now), out=times)
        if len(times):
            self._now = float(times[-1])
        return times


class _BoardClock:
    """Clock of one io_group: whole seconds from the headers, and ticks since the first message of each second."""

    def __init__(self, base: float) -> None:
        self._base = base  # time at which the current second began
        self._second = -1
        self._tick = -1  # the last known one
        self._tick_second = -1  # and its second
        self._ticks = 0  # since the first known tick of the current second

    def times(self, seconds: NDArray[Any], ticks: NDArray[Any]) -> NDArray[np.float64]:
        second = _fill_forward(np.concatenate(([self._second], seconds)))
        step = np.diff(second)
        step[(step < 0) | (step > LONGEST_PAUSE) | (second[:-1] < 0)] = 0
        base = self._base + np.cumsum(step)
        tick = _fill_forward(np.concatenate(([self._tick], ticks)))
        tick_second = _fill_forward(np.concatenate(([self._tick_second], np.where(ticks >= 0, second[1:], -1))))
        passed = np.diff(tick)
        # The ticks that have passed are unknown where the counter was reset or has rolled over.
        passed[(passed < 0) | (passed > 1 / TICK) | (tick[:-1] < 0) | (np.diff(tick_second) != 0)] = 0
        since = self._ticks + np.cumsum(passed)
        begins = np.flatnonzero(np.diff(second))
        which = np.searchsorted(begins, np.arange(len(seconds)), side="right")
        since -= np.concatenate(([0], since[begins]))[which]
        self._base, self._second = float(base[-1]), int(second[-1])
        self._tick, self._tick_second, self._ticks = int(tick[-1]), int(tick_second[-1]), int(since[-1])
        # The next second begins with its header. Without headers the time comes from the ticks alone.
        times: NDArray[np.float64] = base + np.minimum(since * TICK, np.where(second[1:] < 0, np.inf, 0.999))
        return times


def _fill_forward(values: NDArray[Any]) -> NDArray[np.int64]:
    """Replace each negative value by the last one that is not negative."""
    values = values.astype(np.int64)
    last = np.maximum.accumulate(np.where(values >= 0, np.arange(len(values)), 0))
    return values[last]


def is_format_1_0(data: NDArray[np.uint8], spans: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which messages have PACMAN format 1.0, shape (N,)."""
    start, length = spans["start"].astype(np.int64), spans["length"].astype(np.int64)
    sized = length == 24 + _numbers(data, start + 4, 4)
    return np.asarray((length >= 24) & (_numbers(data, start + 2, 2) == 1) & sized, np.bool_)


def message_times(data: NDArray[np.uint8], spans: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the seconds of the headers of PACMAN messages, and the ticks of their first words; -1 where missing."""
    start, length = spans["start"].astype(np.int64), spans["length"].astype(np.int64)
    newer = is_format_1_0(data, spans)
    seconds = np.where(newer, _numbers(data, start + 8, 8) // 10**9, _numbers(data, start + 1, 4))
    seconds[length < 8] = -1
    word = start + np.where(newer, 24, 8)
    ticks = np.where(newer, _numbers(data, word + 8, 7), _numbers(data, word + 2, 4))
    ticks[(word + np.where(newer, 24, 16) > start + length) | (_numbers(data, word, 1) != ord("D"))] = -1
    return seconds, ticks


def _numbers(data: NDArray[np.uint8], at: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return little-endian numbers of `size` bytes at these positions; bytes after the end count as 0."""
    padded = np.concatenate((data, np.zeros(1, np.uint8)))
    total = np.zeros(len(at), np.uint64)
    for i in range(size):
        total |= padded[np.minimum(at + i, len(data))].astype(np.uint64) << np.uint64(8 * i)
    return total.view(np.int64)
