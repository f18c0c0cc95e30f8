"""Rows that are not in the file yet, and how they get there: in batches, as shuffled and deflated chunks.

A growing file on its way to the disk: written steadily, and not kept in memory as a whole.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.hdf5_chunks import Packer

#: Rows that are written at once, in chunks of schema.CHUNK_ROWS: two flushes a batch, not two a chunk.
BATCH_ROWS: Final = 4 * schema.CHUNK_ROWS
_BESIDE: Final = BATCH_ROWS // schema.CHUNK_ROWS - 1
#: Bits of HDF5's filter mask: a chunk that is neither shuffled nor deflated.
_NO_FILTERS: Final = 0b11
#: Rows between two show() below which a plain chunk takes less room than one that is packed anew each time.
_SLOW_ROWS: Final = schema.CHUNK_ROWS // 8
#: Share of a plain chunk that packed ones may take before, because a short run ends before a plain one pays.
_PACKED_SHARE: Final = 1 / 8
#: The kernel is told so often (bytes of the file).
WINDOW: Final = 16 << 20
#: The end of the file stays in memory, for whoever reads along (bytes).
KEPT: Final = 256 << 20


class Batch:
    """The batch that fills up, and the one before: a block that straddles the end of that one is still whole here. What
    comes after the end of the batch goes to the beginning of the one before, far from there.

    `rows`: all rows of the file, in it or not; `base`: the first row of the batch, counted from the file's first.
    """

    def __init__(self, packets: Any, itemsize: int) -> None:
        self.rows = 0
        self.base = 0
        self._left = -1, 0  # a chunk that is in the file and is written anew: first row, size
        self._final_chunks = 0  # chunks of the batch that are in the file as they stay
        self._visible_rows = 0  # rows of the batch that show() has written
        self._packed_bytes = 0  # bytes that show() has written of its last chunk
        self._packets = packets
        self._size = itemsize
        self._now = np.zeros((BATCH_ROWS, itemsize), np.uint8)
        self._before = np.zeros((BATCH_ROWS, itemsize), np.uint8)
        # The chunks of a batch but its last are packed in a thread beside, while the rest of it fills up.
        self._thread = ThreadPoolExecutor(1, "packing")
        self._packed: list[Future[bytes]] = []
        self._beside, self._here = (Packer(schema.CHUNK_ROWS, itemsize) for _ in range(2))

    def resume(self, rows: int) -> None:
        """Go on behind so many of the file's rows, in the midst of a chunk perhaps; what follows them goes."""
        self.rows, self.base = rows, rows - rows % schema.CHUNK_ROWS
        # Whole chunks are removed unread. To cut within a chunk HDF5 reads it, and these may be damaged.
        whole = -(-rows // schema.CHUNK_ROWS) * schema.CHUNK_ROWS
        if whole < self._packets.shape[0]:
            self._packets.resize((whole,))
        if self.base < self._packets.shape[0]:
            self._left = self.base, int(self._packets.id.get_chunk_info_by_coord((self.base,)).size)
        self._now[: rows - self.base] = self._packets[self.base : rows].view(np.uint8).reshape(-1, self._size)

    def stage(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Copy rows, given as bytes, shape (N,), N / itemsize < BATCH_ROWS, to where they belong; the copy, in one or
        two pieces. They are not part of the batch before commit()."""
        rows = data.reshape(-1, self._size)
        used = self.rows - self.base
        room = BATCH_ROWS - used
        self._now[used : used + len(rows)] = rows[:room]
        pieces = [self._now[used : used + len(rows)].reshape(-1)]
        if len(rows) > room:
            self._before[: len(rows) - room] = rows[room:]
            pieces.append(self._before[: len(rows) - room].reshape(-1))
        return pieces

    def commit(self, n: int, full: Callable[[], None]) -> None:
        """Take the n rows that were staged last; call `full` when they fill the batch up."""
        room = BATCH_ROWS - (self.rows - self.base)
        self.rows += n
        for at in range(len(self._packed), min((self.rows - self.base) // schema.CHUNK_ROWS, _BESIDE)):
            self._packed.append(self._thread.submit(self._beside.pack, self._chunk(at)))
        if n >= room:
            full()
            self._before, self._now = self._now, self._before
            self.base += BATCH_ROWS

    def pieces(self, start: int, stop: int) -> list[NDArray[np.uint8]]:
        """The bytes of rows `start` to `stop` of the file, in one or two pieces; they must lie in these two batches."""
        start, stop = start - self.base, stop - self.base
        before = [self._before[start:].reshape(-1)] if start < 0 else []
        return [*before, self._now[max(start, 0) : stop].reshape(-1)]

    def write(self) -> int:
        """Write the rows of the batch, the last one of a file perhaps partly filled; return the row behind them."""
        filled = self._fill_up()
        self._write_chunks(-(-filled // schema.CHUNK_ROWS))
        self._packed.clear()
        self._final_chunks = self._visible_rows = 0
        return self.base + filled

    def show(self) -> None:
        """Write the rows of the unfinished batch for readers of the growing file; write() writes its last chunk anew.

        A packed chunk takes a new place in the file each time, because a reader of a place that is overwritten would
        get a mixture; the old place is lost. A chunk that fills up slowly is written without filters, and overwritten
        in place, because its rows so far do not change.
        """
        filled = self._fill_up()
        new, self._visible_rows = filled - self._visible_rows, filled
        self._write_chunks(filled // schema.CHUNK_ROWS)
        if not filled % schema.CHUNK_ROWS:
            return
        first, chunk = self.base + self._final_chunks * schema.CHUNK_ROWS, self._chunk(self._final_chunks)
        plain = self._left == (first, len(chunk))
        if not plain:
            packed = self._here.pack(chunk)
            self._packed_bytes += len(packed)
            plain = new < _SLOW_ROWS and self._packed_bytes > _PACKED_SHARE * len(chunk)
        if plain:
            self._packets.id.write_direct_chunk((first,), chunk, filter_mask=_NO_FILTERS)
            self._left = first, len(chunk)
        else:
            self._place(self._final_chunks, packed)

    def _fill_up(self) -> int:
        """Make room in the file for the rows of the batch, with zeros to the end of the last chunk; how many rows."""
        filled = min(self.rows - self.base, BATCH_ROWS)
        self._packets.resize((self.base + filled,))
        self._now[filled : -(-filled // schema.CHUNK_ROWS) * schema.CHUNK_ROWS] = 0
        return filled

    def _write_chunks(self, stop: int) -> None:
        """Write the chunks of the batch before this one that are not in the file as they stay."""
        for at in range(self._final_chunks, stop):
            packed = self._packed[at].result() if at < len(self._packed) else self._here.pack(self._chunk(at))
            self._place(at, packed)
            self._packed_bytes = 0
        self._final_chunks = max(self._final_chunks, stop)

    def _place(self, at: int, packed: bytes) -> None:
        first = self.base + at * schema.CHUNK_ROWS
        if (first, len(packed)) == self._left:
            # HDF5 would write it in place, and a kill in the midst of that would tear rows that were acknowledged.
            # Of another size it gets a place of its own first; what follows the end of deflated data is not read.
            packed += b"\0"
        self._packets.id.write_direct_chunk((first,), packed)
        self._left = first, len(packed)

    def _chunk(self, at: int) -> NDArray[np.uint8]:
        """The bytes of the batch's chunk of this number."""
        return self._now[at * schema.CHUNK_ROWS : (at + 1) * schema.CHUNK_ROWS].reshape(-1)


class WriteBack:
    """Has the kernel write what a file has grown by, and forget what lies far behind.

    By itself it writes when gigabytes have gathered, which whoever syncs the file then waits for, and lets a run of
    hours take the place of all else in memory. A disk that is slow holds up nobody: what it has not taken stays in
    memory, as ever.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = 0
        self._thread: threading.Thread | None = None

    def grown(self, size: int) -> None:
        """The file has so many bytes by now."""
        if size - self._told < WINDOW or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._tell, args=(self._told, size), name="behind", daemon=True)
        self._thread.start()
        self._told = size

    def _tell(self, first: int, last: int) -> None:
        with contextlib.suppress(OSError):  # its name may have changed; it is advice, no more
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Linux begins to write what is not on the disk yet, and forgets what is.
                os.posix_fadvise(file, first, last - first, os.POSIX_FADV_DONTNEED)
                if last > KEPT:
                    os.posix_fadvise(file, max(0, first - KEPT), last - max(first, KEPT), os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
