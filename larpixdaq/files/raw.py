"""Raw files of larpix-control (`rawhdf5format` 0.0): board messages byte for byte, each with its io_group.

`/msgs` has one variable-length u1 array a message, `/msg_headers` one compound {io_groups u1}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import FileError, cause
from larpixdaq.schema import SPAN

#: Bytes of messages that a piece aims at, and messages of a piece at most: nothing tells the lengths beforehand, so a
#: piece of the longest messages (1 MB) behind short ones takes 512 MB for a moment.
_PIECE_BYTES: Final = 8 << 20
_PIECE_MESSAGES: Final = 512


class RawFile:
    """Open for reading until close(). FileError in one line for a file that is none, or is damaged."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        messages = file.get("msgs")
        kind = h5py.check_vlen_dtype(messages.dtype) if isinstance(messages, h5py.Dataset) else None
        if kind != np.uint8 or messages.ndim != 1:
            raise FileError(f"{path}: raw file without /msgs of bytes")
        self._messages = messages
        headers = file.get("msg_headers")
        self._headers = headers if isinstance(headers, h5py.Dataset) and headers.dtype.names == ("io_groups",) else None
        self.messages = len(messages)
        #: Messages at the end whose io_group is not there: of a file whose writer was killed between the two.
        self.left_out = 0
        if self._headers is not None and len(self._headers) < self.messages:
            if not file.swmr_mode:
                raise FileError(f"{path}: {self.messages} messages, but io_groups of only {len(self._headers)}")
            self.left_out = self.messages - len(self._headers)
            self.messages -= self.left_out

    def io_groups(self, default: int) -> tuple[int, ...]:
        """The io_groups of the messages; `default` is that of a file that does not say."""
        found: set[int] = set()
        for start in range(0, self.messages, 1 << 20):
            found.update(np.unique(self._groups(start, min(start + (1 << 20), self.messages), default)).tolist())
        return tuple(sorted(found)) or (default,)

    def pieces(self, default: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]]:
        """Bytes, spans (dtype schema.SPAN) and io_groups of some messages after the other."""
        at, count = 0, 64
        while at < self.messages:
            end = min(at + count, self.messages)
            try:
                messages = self._messages[at:end]
            except (OSError, RuntimeError, ValueError) as error:
                raise FileError(f"{self.path}: messages {at} to {end} cannot be read: {cause(error)}") from None
            lengths = np.fromiter(map(len, messages), np.uint32, end - at)
            spans = np.empty(end - at, SPAN)
            spans["length"] = lengths
            spans["start"] = np.cumsum(lengths) - lengths
            buffer = np.concatenate([*messages, np.empty(0, np.uint8)], dtype=np.uint8)
            yield buffer, spans, self._groups(at, end, default)
            at = end
            count = int(np.clip(count * _PIECE_BYTES // max(len(buffer), 1), 1, _PIECE_MESSAGES))

    def _groups(self, start: int, end: int, default: int) -> NDArray[np.uint8]:
        if self._headers is None:
            return np.full(end - start, default, np.uint8)
        try:
            groups = self._headers[start:end]["io_groups"]
        except (OSError, RuntimeError, ValueError) as error:
            raise FileError(f"{self.path}: io_groups {start} to {end} cannot be read: {cause(error)}") from None
        return np.ascontiguousarray(groups, np.uint8)

    def close(self) -> None:
        self._file.close()
