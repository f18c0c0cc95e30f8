"""Message logs: board messages one after another, each behind its length (u32 little-endian)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.frames import split_log
from larpixdaq.errors import FileError
from larpixdaq.schema import SPAN

#: No board sends a longer message: 65,535 words of 24 bytes and a header.
MAX_MESSAGE: Final = 24 + 24 * 65_535
_READ: Final = 1 << 20
#: First bytes of PACMAN messages: data, request, reply, text.
_TYPES: Final = b"D?!S"
_NOTHING: Final = np.empty(0, np.uint8)
_NO_SPANS: Final = np.empty(0, SPAN)


class MessageLog:
    """Open for reading until close(); FileError when the beginning does not look like a log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        head = self._file.read(5)
        self._file.seek(0)
        length = int.from_bytes(head[:4], "little")
        if len(head) < 5 or not 8 <= length <= MAX_MESSAGE or head[4] not in _TYPES:
            self._file.close()
            raise FileError(f"{path}: neither a raw file, nor a packet file, nor a log of board messages")

    def pieces(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], int, str]]:
        """Bytes, spans (dtype schema.SPAN) of the messages in them, how many bytes are in no message, and what is wrong
        then.

        A message that the file's end cuts off is given as far as it goes. After a length that no message has there is
        no telling where the next one begins: all that follows is in no message.
        """
        pending = b""
        place = self._file.seek(0)  # of `pending` in the file
        while data := self._file.read(_READ):
            pending += data
            spans, used = split_log(pending)
            if len(spans):
                yield np.frombuffer(pending, np.uint8), spans, 0, ""
            pending = pending[used:]
            place += used
            length = int.from_bytes(pending[:4], "little")
            if len(pending) >= 4 and length > MAX_MESSAGE:
                text = f"{self.path}: at byte {place}: a message of {length} bytes; what follows is left out"
                yield _NOTHING, _NO_SPANS, self._file.seek(0, os.SEEK_END) - place, text
                return
        if pending:
            spans = np.array([(4, len(pending) - 4)], SPAN) if len(pending) > 4 else _NO_SPANS
            text = f"{self.path}: ends inside a message, at byte {place + len(pending)}"
            yield np.frombuffer(pending, np.uint8), spans, 0 if len(spans) else len(pending), text

    def close(self) -> None:
        self._file.close()
