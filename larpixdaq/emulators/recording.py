"""Recorded board messages, to be sent again byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.frames import split_log
from larpixdaq.errors import FileError


class Recording:
    """The messages of a log (each preceded by its length, u32 little-endian), in the manner of emulate.PacmanBoard.

    `fill()` makes the next messages the ones at `spans` of `buffer`; `left` is False once all have been handed out.
    """

    receipt = 0
    full = 0

    def __init__(self, path: Path) -> None:
        try:
            self.buffer: NDArray[np.uint8] = np.fromfile(path, np.uint8)
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from None
        self._all = _split(self.buffer, path)
        words = np.maximum(self._all["length"].astype(np.int64) - 8, 0) // 16
        self._before = np.concatenate(([0], np.cumsum(words)))
        self._next = 0
        self.spans: NDArray[Any] = self._all[:0]

    @property
    def left(self) -> bool:
        return self._next < len(self._all)

    def fill(self, words: int, per_message: int = 0, window: int = 0) -> int:
        """Hand out messages of at most `words` words in all, but at least one; return how many."""
        end = int(np.searchsorted(self._before, self._before[self._next] + words, side="right")) - 1
        end = min(max(end, self._next + 1), len(self._all))
        self.spans = self._all[self._next : end]
        self._next = end
        return len(self.spans)

    def jump(self, seconds: int) -> None:
        raise FileError("recorded messages keep their times")

    def restart(self) -> None:
        raise FileError("recorded messages keep their times")


def _split(buffer: NDArray[np.uint8], path: Path) -> NDArray[Any]:
    spans, used = split_log(buffer)
    if used < len(buffer) or not len(spans):
        raise FileError(
            f"{path}: expected a message log (u32 length + message, at most 4 GiB), "
            f"found {len(spans)} messages in the first {used} of {len(buffer)} bytes"
        )
    return spans
