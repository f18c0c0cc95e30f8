"""Recorded files as the messages of emulated boards: real bytes of board messages, from files of any kind.

Logs and raw files have the messages as a board sent them. Rows of packet files become messages again, in the first
format of a PACMAN that holds them (legacy, legacy with a 64-bit clock, 1.0). Rows of words that were sent to chips, and
INFO messages, are left out, since no board sends them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import encode_pacman, split_log
from larpixdaq.errors import FileError
from larpixdaq.hdf5.raw_file import FORMAT_1_0, LEGACY, LEGACY_CLOCK64, MessageFormat
from larpixdaq.hdf5.recordings import PacketFile, RawFile, open_recording
from larpixdaq.schema import SPAN, Asic, PacketType, layout_of, types_of
from larpixdaq.sources.replay import is_format_1_0

#: Bytes of a header and of a word of each format.
LEGACY_SIZES: Final = 8, 16
SIZES_1_0: Final = 24, 24
_Piece = tuple[NDArray[np.uint8], NDArray[Any]]


class Recording:
    """Messages of a recording for one board; a `MessageSource`. Raises FileError, also when later parts are damaged.

    `sizes`: bytes of a header and of a word. `left_out`: messages, or rows, of io_groups for which there is no board,
    as far as the file was read.
    """

    receipt = 0
    full = 0

    def __init__(self, path: Path, io_group: int = 1, io_groups: tuple[int, ...] = (1,)) -> None:
        """`io_group`: the messages of this one, in a file that has io_groups. `io_groups`: those of all boards."""
        self.path = path
        self.left_out = 0
        self._io_group, self._io_groups = io_group, io_groups
        self._asic = Asic.V2
        self._formats: tuple[MessageFormat, ...] = ()
        try:
            found = open_recording(path)
        except OSError as error:
            raise (
                error if isinstance(error, FileError) else FileError(f"cannot read {path}: {error.strerror}")
            ) from None
        if found is None:
            self._pieces = iter([_read_log(path)])
        else:
            self._pieces = self._messages(found) if isinstance(found, RawFile) else self._encoded(found)
        self.buffer: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.spans: NDArray[Any] = np.empty(0, SPAN)
        self.sizes = LEGACY_SIZES
        self._all = self.spans
        self._ends: NDArray[np.int64] = np.zeros(1, np.int64)  # words before each message of the piece
        self._next = 0
        self._following = self._read()
        self._advance()
        if not len(self._all):
            raise FileError(f"{path}: has no messages of io_group {io_group}")

    def _read(self) -> _Piece | None:
        """Return the next piece with messages."""
        return next((piece for piece in self._pieces if len(piece[1])), None)

    def _advance(self) -> None:
        """Go to the next piece, and read the one after it, so that the end of the file is known before."""
        if self._following is None:
            return
        self.buffer, self._all = self._following
        if bool(is_format_1_0(self.buffer, self._all[:1])[0]):
            self.sizes = SIZES_1_0
        self._ends = np.concatenate(([0], np.cumsum(words_of(self._all, self.sizes))))
        self._next = 0
        self._following = self._read()

    @property
    def left(self) -> bool:
        return self._next < len(self._all) or self._following is not None

    def fill(self, words: int, per_message: int, window: int) -> int:
        """Set `spans` to the next messages, at least one, of at most `words` words in all. Returns their number."""
        if self._next == len(self._all):
            self._advance()
        end = int(np.searchsorted(self._ends, self._ends[self._next] + words, side="right")) - 1
        end = min(max(end, self._next + 1), len(self._all))
        self.spans = self._all[self._next : end]
        self._next = end
        return len(self.spans)

    def jump(self, seconds: int) -> None:
        raise FileError("recorded messages keep their times")

    def restart(self) -> None:
        raise FileError("recorded messages keep their times")

    def _messages(self, file: RawFile) -> Iterator[_Piece]:
        """Read the messages of a raw file."""
        for data, spans, groups in file.pieces(self._io_group):
            self.left_out += int(np.count_nonzero(~np.isin(groups, self._io_groups)))
            yield np.require(data, requirements="W"), spans[groups == self._io_group]
        file.close()

    def _encoded(self, file: PacketFile) -> Iterator[_Piece]:
        """Encode the rows of a packet file. A message that goes on in the next rows waits for them."""
        self._asic = file.asic
        layout = layout_of(file.asic, clock64=True)
        self._formats = (FORMAT_1_0,) if file.asic == Asic.V1 else (LEGACY, LEGACY_CLOCK64, FORMAT_1_0)
        if file.asic == Asic.V1:
            self._formats = LEGACY, FORMAT_1_0
        waiting = np.zeros(0, layout.dtype)
        diagnostics = file.has_diagnostics
        if diagnostics:
            self._asic = Asic.V2_DIAGNOSTICS
        for rows, groups, _, _ in file.pieces(layout, self._asic, self._io_group):
            self.left_out += int(np.count_nonzero(~np.isin(groups, self._io_groups)))
            rows = np.concatenate([waiting, rows[groups == self._io_group]])
            headers = np.flatnonzero(types_of(rows) == PacketType.TIMESTAMP)
            last = int(headers[-1]) if len(headers) else 0
            waiting = rows[last:].copy()
            if last:
                yield self._encode(rows[:last])
        if len(waiting):
            yield self._encode(waiting)
        file.close()

    def _encode(self, rows: NDArray[Any]) -> _Piece:
        """Encode rows in the first format that holds them; from then on all rows must fit into it."""
        reason = ""
        for form in self._formats:
            try:
                data, spans = encode_pacman(rows, asic=int(self._asic), format=form.name, clock64=form.clock64)
            except ValueError as error:
                reason = str(error)
                continue
            if len(spans):
                self._formats = (form,)
            return np.frombuffer(data, np.uint8), spans
        raise FileError(f"{self.path}: rows that fit into no messages of a PACMAN: {reason}")


def _read_log(path: Path) -> _Piece:
    """Read a log, whole: messages, each preceded by its length (u32 little-endian)."""
    try:
        buffer: NDArray[np.uint8] = np.fromfile(path, np.uint8)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    spans, used = split_log(buffer)
    if used < len(buffer) or not len(spans):
        raise FileError(
            f"{path}: expected a raw file, a packet file, or a message log (u32 length + message, at most 4 GiB), "
            f"found {len(spans)} messages in the first {used} of {len(buffer)} bytes"
        )
    return buffer, spans


def words_of(spans: NDArray[Any], sizes: tuple[int, int] = LEGACY_SIZES) -> NDArray[np.int64]:
    """Return the number of words of each board message, from the messages' lengths."""
    header, word = sizes
    words: NDArray[np.int64] = np.maximum(spans["length"].astype(np.int64) - header, 0) // word
    return words


def count_1_0(buffer: NDArray[np.uint8], spans: NDArray[Any]) -> tuple[int, int, int, int]:
    """Count the words of messages of format 1.0 by type, as board_emulator.count_words(): D, S, T, others."""
    words = words_of(spans, SIZES_1_0)
    ends = np.cumsum(words)
    places = np.repeat(spans["start"].astype(np.int64), words) + 24
    places += 24 * (np.arange(len(places)) - np.repeat(ends - words, words))
    kinds = np.bincount(buffer[places], minlength=256)
    d, s, t = (int(kinds[ord(kind)]) for kind in "DST")
    return d, s, t, len(places) - d - s - t
