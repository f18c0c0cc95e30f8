"""Read one part of a run: a finished file, or one that is being written, with what only its journal has.

A part that is being written has blocks in /run/blocks, and further ones in its journal until their chunks are full.
Both are stored for good, in this order, and nothing else counts here: rows after the last block in /run/blocks that
only the part shows come again from the journal. So a row that was read keeps its number and its content while the part
grows, and after a recovery.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from larpixdaq.constants import RunCondition
from larpixdaq.errors import FileError
from larpixdaq.hdf5 import journal, names, repair
from larpixdaq.hdf5.layout import BLOCKS
from larpixdaq.hdf5.reader import DataFile, may_be_written, text
from larpixdaq.hdf5.row_reader import Chunk, Columns, RowFilter, take_rows
from larpixdaq.protocol import stream
from larpixdaq.protocol.stream import BlockOrigin
from larpixdaq.schema import MESSAGE_BYTES

#: Attempts to read journal and part at the same moment.
_ATTEMPTS: Final = 20
#: Seconds between two attempts to open a part that is being made.
_PAUSE: Final = 0.01
#: Rows of /run/blocks that are read at once.
_PAGE: Final = 65_536


class InfoLine(NamedTuple):
    """A line of an INFO message: at most 64 bytes of its text. The text of a longer one continues in the next line."""

    seconds: int  # unix s, by the clock of the producer's host
    text: str


class _View(NamedTuple):
    """What a part has at one moment: a reader in another thread sees all of it or nothing."""

    file: DataFile
    end: int  # rows of the file that count
    later: list[tuple[stream.Block, int, NDArray[Any]]]  # blocks of the journal: frame, first row, rows

    @property
    def rows(self) -> int:
        return self.later[-1][1] + len(self.later[-1][2]) if self.later else self.end


class Part:
    """One part of a run: a finished file, or one that grows, with the blocks that only its journal has."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.path = path
        #: Whether the rows are final: it has been finished, or sealed.
        self.is_final = self.has_final_name
        #: Whether its writer may live and has not given it its final name yet. The part of a dead writer has all rows
        #: that a recovery will find.
        self.is_growing = not self.is_final and may_be_written(path)
        #: Whether it has the description of its run, after which it takes blocks.
        self.is_described = True
        self._next: dict[BlockOrigin, int] = {}  # next sequence after the blocks in /run/blocks
        self._blocks = 0  # rows of /run/blocks in _next
        self._block_rows = 0  # row after the last of these blocks
        #: Whether HDF5 could not read what the writer was changing, after which the file must be opened again.
        self.is_stale = False
        self._idle = threading.Condition()
        self._readings = 0  # that use the file now
        self._messages: list[str] = []  # lines of INFO messages that message() has seen
        file = self._open()
        self._identity = _identity(self.path)
        self.view = _View(file, file.rows, [])
        if not self.is_final:
            self._update(file)

    @property
    def has_final_name(self) -> bool:
        return not self.path.name.endswith(names.PART)

    @property
    def is_replaced(self) -> bool:
        """Whether another file has its name: the next part gets that of a part without rows, which was removed."""
        return not self.is_final and _identity(self.path) not in (None, self._identity)

    @property
    def file(self) -> DataFile:
        return self.view.file

    @property
    def rows(self) -> int:
        return self.view.rows

    def _open(self) -> DataFile:
        self._take_name()
        if self.has_final_name:
            self.is_final, self.is_growing = True, False
        return DataFile(self.path)

    def _take_name(self) -> None:
        """Note the final name of the part, if it has been given it."""
        finished = self.path.with_name(self.path.name.removesuffix(names.PART) + names.FINISHED)
        if not self.has_final_name and not os.path.exists(self.path) and os.path.exists(finished):
            self.path = finished

    @property
    def _journal(self) -> Path:
        return self.path.with_name(self.path.name.removesuffix(names.PART) + names.JOURNAL)

    def refresh(self) -> None:
        """Find out which rows there are now. FileError also if a file that was readable is damaged or gone."""
        if self.is_final:
            self._wait_for_name()
        elif self.is_growing or not os.path.exists(self.path):
            self.is_growing = may_be_written(self.path)  # before the rows are counted, so that False makes them final
            self._update(self.file)

    def _update(self, file: DataFile) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                if self._look(file, complete=attempt < _ATTEMPTS - 1):
                    return
            except FileError:
                if attempt == _ATTEMPTS - 1:
                    raise
                self.is_stale = True
            file = self.file

    def _look(self, file: DataFile, *, complete: bool) -> bool:
        """Find out which rows there are. Returns False if `complete` is asked for and the journal was read in parts."""
        if self.is_stale or not os.path.exists(self.path):  # or it has its final name now, or was removed
            with self._idle:  # HDF5 shares its cache between two openings of a file, and that is out of date
                self._idle.wait_for(lambda: not self._readings)
                file.close()
                file = self._open()
                self.is_stale = False
                self.view = self.view._replace(file=file)
            if self.is_final:
                self.view = _View(file, file.rows, [])
                return True
        records = self._records()
        file.refresh()
        self._read_blocks(file)
        later = self._later(file, records or (), complete=complete)
        if later is None:
            return False
        self.view = _View(file, self._block_rows if records is not None else file.rows, later)
        info = file.run_info()
        self.is_described = info["opened_ns"] > 0
        if self.is_described and info["condition"] != RunCondition.RUNNING:
            file.refresh()  # all waiting rows were written before this
            self.view = _View(file, file.rows, [])
            self.is_final = True
            self._wait_for_name()
        return True

    def _wait_for_name(self) -> None:
        """Note the final name of a part whose rows are final, or whether its writer may still give it."""
        self._take_name()
        self.is_growing = not self.has_final_name and may_be_written(self.path)

    def _records(self) -> list[journal.JournalRecord] | None:
        """Read the journal: before the part, so that each block is in at least one of them.

        None if this user may not: then the rows count that the storage shows every 4 s (writer.SHOW_INTERVAL), which
        come after those of the last block, in the order of the journal.
        """
        try:
            return journal.read(self._journal).records
        except FileError:
            if not os.path.exists(self._journal):
                return []
            if os.access(self._journal, os.R_OK, effective_ids=True):
                raise
            return None

    def _read_blocks(self, file: DataFile) -> None:
        """Read the new rows of /run/blocks."""
        while len(blocks := file.table("run/blocks", self._blocks, self._blocks + _PAGE)):
            for origin in np.unique(blocks[["producer", "epoch"]]):
                own = (blocks["producer"] == origin["producer"]) & (blocks["epoch"] == origin["epoch"])
                self._next[file.origin(origin)] = int(blocks["sequence"][own].max()) + 1
            self._blocks += len(blocks)
            self._block_rows = int(blocks["first_row"][-1]) + int(blocks["rows"][-1])
        if self._block_rows > file.rows:
            file.refresh()  # a block comes after its rows, and the number of rows was read before
        if self._block_rows > file.rows:
            raise FileError(f"{self.path}: /run/blocks reaches to row {self._block_rows}, /packets has {file.rows}")

    def _later(
        self, file: DataFile, records: Iterable[journal.JournalRecord], *, complete: bool
    ) -> list[tuple[stream.Block, int, NDArray[Any]]] | None:
        """Return the blocks of the journal that the part does not have, with the row at which each begins.

        None if `complete` is asked for and a block is missing between them: then the journal was emptied and filled
        again while it was read. (A block that never arrived is missing for good.)
        """
        following = dict(self._next)
        row = self._block_rows
        later: list[tuple[stream.Block, int, NDArray[Any]]] = []
        for frame, rows in records:
            if frame.following <= following.get(frame.origin, 0):
                continue
            if isinstance(frame, stream.Block):
                if complete and frame.origin in following and frame.sequence != following[frame.origin]:
                    return None
                if file.layout is None or frame.layout != file.layout.code:
                    raise FileError(f"{self._journal}: has rows of layout {frame.layout}, the part has other columns")
                later.append((frame, row, np.frombuffer(rows, file.dtype)))
                row += frame.rows
            following[frame.origin] = frame.following
        return later

    def read(
        self, stretches: Sequence[tuple[int, int]], columns: Columns, chosen: RowFilter | None = None, first: int = 0
    ) -> NDArray[Any]:
        """Read rows within these stretches, as RowReader.read(). In any thread."""
        start, stop = stretches[0][0], stretches[-1][1]
        with self._reading() as (file, end, later):
            pieces = []
            if start < end:  # the file may have rows after `end`, which come from the journal
                stored = [(low, min(high, end)) for low, high in stretches if low < end]
                pieces.append(file.select(start, stored[-1][1], columns, chosen, stored, first))
            for _, row, rows in later:
                if max(start, row) < min(stop, row + len(rows)):
                    out = np.empty(len(rows), columns.dtype)
                    made = take_rows(Chunk(rows.dtype, rows=rows), row, columns, chosen, stretches, first, out)
                    pieces.append(columns.result(out, made))
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[_View]:
        """The present view, which stays open meanwhile."""
        with self._idle:
            self._readings += 1
            view = self.view
        try:
            yield view
        finally:
            with self._idle:
                self._readings -= 1
                self._idle.notify_all()

    def stretches(self, begin_ns: float, end_ns: float) -> Iterator[tuple[int, int]]:
        """Find the rows of blocks that arrived, at least in part, in this time (unix ns): joined, in order.

        Rows that the part shows before their block, to those who may not read the journal, arrive now.
        """
        if not self.file.own:
            raise FileError(f"{self.path}: has no /run/blocks, so that its rows cannot be selected by their time")
        last: tuple[int, int] | None = None
        shown = self.rows
        known = 0  # row after the last block
        for blocks in self.blocks():
            known = int(blocks["first_row"][-1] + blocks["rows"][-1]) if len(blocks) else known
            times = (blocks["first_ns"] < end_ns) & (np.maximum(blocks["first_ns"], blocks["last_ns"]) >= begin_ns)
            for first, rows in blocks[["first_row", "rows"]][times].tolist():
                if last is not None and first == last[1]:
                    last = last[0], first + rows
                    continue
                if last is not None:
                    yield last
                last = first, first + rows
        if last is not None:
            yield last
        if self.is_growing and known < shown and begin_ns <= time.time_ns() < end_ns:
            yield known, shown

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Read /run/blocks in pages, and then make such rows of the blocks in the journal."""
        file, end, later = self.view
        expected = 0
        for start in range(0, file.length("run/blocks"), _PAGE):
            page = file.table("run/blocks", start, start + _PAGE)
            ends = page["first_row"] + page["rows"]
            if len(page) and (page["first_row"] != np.concatenate(([expected], ends[:-1]))).any():
                raise FileError(f"{self.path}: /run/blocks: blocks overlap, or do not follow each other")
            expected = int(ends[-1]) if len(page) else expected
            yield page[ends <= end]
        if later:
            producers = {name: number for number, name in enumerate(file.producers)}
            page = np.zeros(len(later), BLOCKS)
            for line, (frame, row, _) in zip(page, later, strict=True):
                line["producer"], line["first_row"] = producers.setdefault(frame.producer, len(producers)), row
                for name in ("epoch", "sequence", "rows", "first_ns", "last_ns"):
                    line[name] = getattr(frame, name)
            yield page

    def producers(self) -> list[str]:
        """Return the names that blocks() numbers."""
        return list(dict.fromkeys([*self.file.producers, *(frame.producer for frame, *_ in self.view.later)]))

    def lines(self, first: int = 0) -> Iterator[InfoLine]:
        """Read the lines of INFO messages from line `first` on, also those that only the journal has."""
        file, _, later = self.view
        known = file.length("messages")
        for start in range(first, known, _PAGE):
            for line in file.table("messages", start, min(known, start + _PAGE)):
                yield InfoLine(int(line["timestamp"]), text(line["message"]))
        for frame, _, rows in later:
            if frame.text is not None and len(rows) and int(rows["counter"][0]) >= max(known, first):
                for piece in stream.text_pieces(frame.text, MESSAGE_BYTES):
                    yield InfoLine(int(rows["timestamp"][0]), piece.decode("utf-8", "replace"))

    def message(self, number: int) -> str | None:
        """Return a line of an INFO message by the number in its row; None if it is not there, or cannot be read."""
        if number >= len(self._messages):
            with contextlib.suppress(FileError):
                self._messages += [line.text for line in self.lines(len(self._messages))]
        return self._messages[number] if number < len(self._messages) else None


def open_part(number: int, path: Path) -> Part:
    """Open a part. One that has just been created may not be readable for some ms, while its tables are made."""
    for attempt in range(_ATTEMPTS):
        try:
            return Part(number, path)
        except FileError:
            if attempt == _ATTEMPTS - 1 or not path.name.endswith(names.PART) or not may_be_written(path):
                raise
            time.sleep(_PAUSE)
    raise AssertionError


def is_unmade(path: Path) -> bool:
    """Whether a part is being made, or its writer died while it made it: then it has no rows."""
    if not path.name.endswith(names.PART):
        return False
    try:
        superblock = repair.read_superblock(path)
    except FileError:
        return False
    return superblock is None or superblock.flags == repair.WRITING


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
