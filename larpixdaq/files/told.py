"""The INFO texts of packet files: which of /messages a row of type 5 stands for."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

#: larpix-control writes counter 0 into all message rows of these versions, and appends their texts in order.
_WITHOUT_COUNTER: Final = ("2.3", "2.4")


class Texts:
    """Of one file, whose rows are to be passed in order.

    In files of our own each message is a block, whose rows are the lines of its text in /messages. (Those written
    before 2026-11-29 have the number of the first line in all of them.) In other files each row is a message.
    """

    def __init__(self, file: h5py.File, version: str) -> None:
        self.missing = 0
        self._in_order = "run" not in file and version in _WITHOUT_COUNTER
        self._passed = 0
        self._lines: list[bytes] = []
        self._begins: NDArray[np.int64] | None = None  # rows at which blocks begin
        self._end = 0  # row behind the last block; a file that grows may have rows of further blocks from there on
        # Without /messages, or with others than these, every text is missing, and that is counted.
        with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
            self._lines = [bytes(line) for line in file["messages"]["message"]]
        with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
            blocks = file["run/blocks"][:]
            self._begins = blocks["first_row"].astype(np.int64)
            self._end = int(blocks["first_row"][-1:].sum() + blocks["rows"][-1:].sum())

    def of(self, counters: NDArray[Any], places: NDArray[np.intp]) -> list[tuple[int, str]]:
        """The texts of these rows of type 5, given by their column `counter` and their place in the file: index among
        these rows, and text.

        A message whose text is not there is counted in `missing`, row by row, and stands as an empty text.
        """
        numbers = counters.astype(np.int64)
        if self._in_order:
            numbers = np.arange(self._passed, self._passed + len(counters))
        self._passed += len(counters)
        first = np.ones(len(numbers), np.bool_)
        if self._begins is not None:
            first = np.isin(places, self._begins) | (places >= self._end) & (np.diff(numbers, prepend=-1) != 0)
            first[:1] = True
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=len(numbers))
        return [(int(at), self._text(int(numbers[at]), int(rows))) for at, rows in zip(starts, lengths, strict=True)]

    def _text(self, number: int, rows: int) -> str:
        lines = self._lines[number : number + rows]
        self.missing += rows - len(lines)
        return b"".join(lines).decode("utf-8", "replace")
