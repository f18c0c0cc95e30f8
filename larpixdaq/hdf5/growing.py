"""Follow a run while a storage writes it: every row once, in order, a moment after it was acknowledged.

Acknowledged blocks are in /run/blocks of the part or in its journal. The journal is read first, so that a block that
moves to the part meanwhile is in at least one of them. The journal's blocks have the rows after those of /run/blocks,
in order: so row numbers are those of the finished part. Only the storage's user can read the journal; others see what
the storage shows every 4 s (writer.SHOW_INTERVAL): rows of /packets after the last block.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq.constants import RunCondition
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import journal, names
from larpixdaq.hdf5.reader import PIECE_ROWS, DataFile, may_be_written, text
from larpixdaq.protocol.stream import Block, BlockOrigin, text_pieces

#: Seconds between two looks at the files.
_INTERVAL: Final = 0.1
#: Seconds to wait for a part that is being created, for the recovery of a part, and for the next part.
PATIENCE: Final = 15.0
#: Looks after which a missing block between those of the journal counts as one that never came.
_LOOKS: Final = 5


class Rows(NamedTuple):
    """New rows of a part. `first`: number of the first one. `messages`: lines of INFO messages so far, by number."""

    file: DataFile
    first: int
    rows: NDArray[Any]
    messages: list[str]


def follow(path: Path, start: int = 0) -> Iterator[Rows | None]:
    """Read the rows of a growing run until it ends; None between two looks.

    `path`: one of its files, whose part is the first one, or a directory, of whose newest run all parts are read.
    `start`: first row of the first part, negative: from the end. FileError if a file cannot be read, if the storage has
    died and none recovers its part, or if there is no such run.
    """
    directory, run, label, number = _find(path)
    while True:
        deadline = time.monotonic() + PATIENCE
        while (found := _part(directory, run, label, number)) is None:
            if time.monotonic() > deadline:
                raise FileError(f"{directory}: part {number} of run {run} does not come: is a storage there?")
            yield None
            time.sleep(_INTERVAL)
        condition = yield from _follow_part(found, start)
        if condition not in (RunCondition.CONTINUED, RunCondition.INTERRUPTED):
            return
        number, start = number + 1, 0


def _find(path: Path) -> tuple[Path, int, str, int]:
    """Return directory, run, storage and number of the first part."""
    if path.is_dir():
        newest = names.highest_run(path)
        parts = [name for _, _, file in names.run_files(path, newest or None) if (name := names.parse(file.name))]
        if not newest or not parts:
            raise FileError(f"{path}: holds no file of a run")
        label = min(name.storage for name in parts)
        return path, newest, label, min(name.part for name in parts if name.storage == label)
    name = names.parse(path.name)
    if name is None:
        raise FileError(f"{path}: not the name of a file of a run, whose further parts could be followed")
    return path.parent, name.run, name.storage, name.part


def _part(directory: Path, run: int, label: str, number: int) -> Path | None:
    """Return the file of a part, finished or not; None before it exists."""
    found = {ending: path for _, part, ending, path in names.files_of_storage(directory, label, run) if part == number}
    return found.get(names.FINISHED) or found.get(names.PART)


def _open(path: Path) -> DataFile | None:
    """Open a part; None if it is being created."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            file = DataFile(path, own=True)
            if file.run_info()["opened_ns"]:
                return file
            file.close()
        except FileError:
            if time.monotonic() > deadline or not path.exists():
                if path.exists():
                    raise
                return None
        time.sleep(_INTERVAL)


def _follow_part(path: Path, start: int) -> Generator[Rows | None, None, str]:
    """Read the rows of a part until it is finished. Returns its condition."""
    at = start
    if path.name.endswith(names.PART):
        final = path.with_name(path.name.removesuffix(names.PART) + names.FINISHED)
        if (file := _open(path)) is not None:
            with file:
                part = _GrowingPart(file, start)
                abandoned: float | None = None
                while not final.exists():
                    abandoned = None if may_be_written(path) else abandoned or time.monotonic()
                    if abandoned is not None and time.monotonic() > abandoned + PATIENCE and not final.exists():
                        raise FileError(f"{path}: its storage has died, and none recovers it (larpixdaq recover)")
                    found = part.look()
                    yield from found
                    if not found:
                        yield None
                        time.sleep(_INTERVAL)
                at = part.at if part.looked else start
        path = final
    with DataFile(path, own=True) as file:
        lines = [text(line["message"]) for line in file.table("messages")]
        at = max(0, file.rows + at) if at < 0 else at
        for first in range(at, file.rows, PIECE_ROWS):
            yield Rows(file, first, file.packets(first, first + PIECE_ROWS), lines)
        return str(file.run_info()["condition"])


class _GrowingPart:
    """A part that is being written. `at`: the row after those that were read."""

    def __init__(self, file: DataFile, start: int) -> None:
        self._file = file
        self._start = start
        self.at = max(0, start)
        self.looked = False
        self._blocks = 0  # lines of /run/blocks that are known
        self._end = 0  # row after the last of these blocks
        self._next: dict[BlockOrigin, int] = {}
        self._lines: list[str] = []
        self._jumps = 0  # looks at which a block was missing between those of the journal

    def look(self) -> list[Rows]:
        """Return the new rows."""
        file, self.looked = self._file, True
        records = self._records()
        file.refresh()
        self._read_blocks()
        known = file.length("messages")
        if known > len(self._lines):
            self._lines = [text(line["message"]) for line in file.table("messages", 0, known)]
        waiting = self._waiting(records) if records is not None else []
        total = self._end + sum(len(rows) for _, rows in waiting) if records is not None else max(file.rows, self._end)
        if self._start < 0:
            self.at, self._start = max(0, total + self._start), 0
        stop = self._end if records is not None else total
        found = []
        for first in range(self.at, stop, PIECE_ROWS):
            found.append(Rows(file, first, file.packets(first, min(first + PIECE_ROWS, stop)), self._lines))
        self.at = max(self.at, stop)
        first = self._end
        for block, rows in waiting:
            self._add_text(block, rows)
            if first + len(rows) > self.at:
                new = rows[self.at - first :] if self.at > first else rows
                found.append(Rows(file, first + len(rows) - len(new), new, self._lines))
                self.at = first + len(rows)
            first += len(rows)
        return found

    def _records(self) -> list[journal.JournalRecord] | None:
        """Read the journal; None if this user may not."""
        path = self._file.path
        journal_path = path.with_name(path.name.removesuffix(names.PART) + names.JOURNAL)
        try:
            return journal.read(journal_path).records
        except FileError:
            return [] if not journal_path.exists() else None

    def _read_blocks(self) -> None:
        file = self._file
        while len(blocks := file.table("run/blocks", self._blocks, self._blocks + 65_536)):
            for key in np.unique(blocks[["producer", "epoch"]]):
                own = (blocks["producer"] == key["producer"]) & (blocks["epoch"] == key["epoch"])
                self._next[file.origin(key)] = int(blocks["sequence"][own].max()) + 1
            self._blocks += len(blocks)
            self._end = int(blocks["first_row"][-1]) + int(blocks["rows"][-1])
        if self._end > file.rows:  # a block comes after its rows, whose number was read before
            file.refresh()

    def _waiting(self, records: list[journal.JournalRecord]) -> list[tuple[Block, NDArray[Any]]]:
        """Return the blocks of the journal that the part does not have, up to one before which others are missing.

        These others may have come while the journal was read; after some looks they count as blocks that never came.
        """
        following = dict(self._next)
        found: list[tuple[Block, NDArray[Any]]] = []
        for frame, rows in records:
            if frame.following <= following.get(frame.origin, 0) or not isinstance(frame, Block):
                continue
            if frame.origin in following and frame.sequence != following[frame.origin]:
                self._jumps += 1
                if self._jumps < _LOOKS:
                    return found
            following[frame.origin] = frame.following
            if self._file.layout is None or frame.layout != self._file.layout.code:
                raise FileError(f"{self._file.path}: its journal has rows of layout {frame.layout}")
            found.append((frame, np.frombuffer(rows, self._file.dtype)))
        else:
            self._jumps = 0
        return found

    def _add_text(self, block: Block, rows: NDArray[Any]) -> None:
        """Note the text of a message, which the part may not have yet."""
        if block.text is None or not len(rows) or int(rows["counter"][0]) != len(self._lines):
            return
        self._lines += [text(line) for line in text_pieces(block.text, schema.MESSAGE_BYTES)]
