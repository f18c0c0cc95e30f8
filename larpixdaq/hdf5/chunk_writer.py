"""Collect the rows of a growing file in batches, and write these as shuffled and deflated chunks.

WriteBack makes the kernel write the file to the disk steadily, so that it does not fill the memory.
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
from larpixdaq.hdf5 import layout
from larpixdaq.protocol.packed_rows import unpack_chunk

#: Rows of a batch, a few chunks of schema.CHUNK_ROWS: there are two flushes per batch instead of two per chunk.
BATCH_ROWS: Final = 4 * schema.CHUNK_ROWS
#: Chunks of a batch that a thread packs while the batch fills up: all except the last.
_PACKED_EARLY: Final = BATCH_ROWS // schema.CHUNK_ROWS - 1
#: Rows between two calls of show() below which a plain chunk takes less room than a chunk that is packed each time.
_SLOW_ROWS: Final = schema.CHUNK_ROWS // 8
#: Share of a plain chunk's size: when the packed copies of a chunk exceed it, the chunk is written plain. Short runs do
#: not reach it.
_PACKED_SHARE: Final = 1 / 8
#: Bytes by which the file grows between two requests to the kernel.
WINDOW: Final = 16 << 20
#: Bytes at the end of the file that stay in memory, for readers of the growing file.
KEPT: Final = 256 << 20


class Batch:
    """Double buffer of rows: the batch that is being filled, and the previous one.

    The previous batch is kept because a block may straddle the boundary, and the journal needs it whole. Rows beyond
    the end of the current batch are staged at the beginning of the previous one, which is far from that block.

    `rows`: all rows of the file, written or not; `base`: the first row of the batch, counted from the file's first.
    """

    def __init__(self, packets: Any, itemsize: int) -> None:
        self.rows = 0
        self.base = 0
        self._unfinished = -1, 0  # the chunk in the file that is written anew: first row, size in bytes
        self._final_chunks = 0  # chunks of the batch that are in the file and do not change any more
        self._visible_rows = 0  # rows of the batch that show() has written
        self._packed_bytes = 0  # bytes that show() has written of its last chunk
        self._packets = packets
        self._size = itemsize
        self._current = np.zeros((BATCH_ROWS, itemsize), np.uint8)
        self._previous = np.zeros((BATCH_ROWS, itemsize), np.uint8)
        self._thread = ThreadPoolExecutor(1, "packing")
        self._packed: list[Future[bytes]] = []  # the first chunks of the batch
        self._received: dict[int, bytes] = {}  # chunks of the batch that came packed, and were not unpacked
        #: Chunks in the file that came packed, and were not unpacked.
        self.unread_chunks = 0
        self._thread_packer, self._packer = (Packer(schema.CHUNK_ROWS, itemsize) for _ in range(2))

    def resume(self, rows: int) -> None:
        """Continue a file after its first `rows` rows, perhaps within a chunk; rows after these are removed."""
        self.rows, self.base = rows, rows - rows % schema.CHUNK_ROWS
        # Whole chunks are removed unread. To cut within a chunk HDF5 reads it, and these may be damaged.
        whole = -(-rows // schema.CHUNK_ROWS) * schema.CHUNK_ROWS
        if whole < self._packets.shape[0]:
            self._packets.resize((whole,))
        if self.base < self._packets.shape[0]:
            self._unfinished = self.base, int(self._packets.id.get_chunk_info_by_coord((self.base,)).size)
        self._current[: rows - self.base] = self._packets[self.base : rows].view(np.uint8).reshape(-1, self._size)

    def stage(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Copy rows into the buffer, for commit() to add to the batch; return the copy, in one or two pieces.

        data: bytes of fewer than BATCH_ROWS rows, shape (N,).
        """
        rows = data.reshape(-1, self._size)
        used = self.rows - self.base
        room = BATCH_ROWS - used
        self._current[used : used + len(rows)] = rows[:room]
        pieces = [self._current[used : used + len(rows)].reshape(-1)]
        if len(rows) > room:
            self._previous[: len(rows) - room] = rows[room:]
            pieces.append(self._previous[: len(rows) - room].reshape(-1))
        return pieces

    @property
    def begins_chunk(self) -> bool:
        """Whether the next row is the first one of a chunk."""
        return self.rows % schema.CHUNK_ROWS == 0

    def add_chunk(self, packed: bytes, full: Callable[[], None]) -> None:
        """Add a packed chunk at the beginning of a chunk, as commit() adds rows."""
        index = (self.rows - self.base) // schema.CHUNK_ROWS
        self._received[index] = packed
        self.commit(schema.CHUNK_ROWS, full)

    def commit(self, n: int, full: Callable[[], None]) -> None:
        """Add the n rows that were staged last to the batch; call `full` when that fills it up."""
        room = BATCH_ROWS - (self.rows - self.base)
        self.rows += n
        for index in range(len(self._packed), min((self.rows - self.base) // schema.CHUNK_ROWS, _PACKED_EARLY)):
            self._packed.append(self._thread.submit(self._pack, self._thread_packer, index))
        if n >= room:
            full()
            self._previous, self._current = self._current, self._previous
            self.base += BATCH_ROWS

    def pieces(self, start: int, stop: int) -> list[NDArray[np.uint8]]:
        """Return the bytes of rows `start` to `stop` of the file, in one or two pieces; both batches together must have
        them. ChecksumError if they came packed and are damaged.

        A chunk that is unpacked for this before it is in the file is packed anew: HDF5 reads it by zlib, which refuses
        some data that ISA-L takes.
        """
        start, stop = start - self.base, stop - self.base
        for index in list(self._received):
            if start < (index + 1) * schema.CHUNK_ROWS and index * schema.CHUNK_ROWS < stop:
                unpack_chunk(self._received[index], self._chunk(index), self._size)
                if index < self._final_chunks:
                    continue
                del self._received[index]
                if index < len(self._packed):
                    self._packed[index] = self._thread.submit(self._pack, self._thread_packer, index)
        previous = [self._previous[start:].reshape(-1)] if start < 0 else []
        return [*previous, self._current[max(start, 0) : stop].reshape(-1)]

    def write(self) -> int:
        """Write the rows of the batch, which at the end of a file may be partly filled; return the row after them."""
        filled = self._fill_up()
        self._write_chunks(-(-filled // schema.CHUNK_ROWS))
        self._packed.clear()
        self.unread_chunks += len(self._received)
        self._received.clear()
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
        plain = self._unfinished == (first, len(chunk))
        if not plain:
            packed = self._packer.pack(chunk)
            self._packed_bytes += len(packed)
            plain = new < _SLOW_ROWS and self._packed_bytes > _PACKED_SHARE * len(chunk)
        if plain:
            self._packets.id.write_direct_chunk((first,), chunk, filter_mask=layout.NO_FILTERS)
            self._unfinished = first, len(chunk)
        else:
            self._place(self._final_chunks, packed)

    def _fill_up(self) -> int:
        """Make room in the file for the rows of the batch, with zeros to the end of the last chunk; return their
        number."""
        filled = min(self.rows - self.base, BATCH_ROWS)
        self._packets.resize((self.base + filled,))
        self._current[filled : -(-filled // schema.CHUNK_ROWS) * schema.CHUNK_ROWS] = 0
        return filled

    def _write_chunks(self, stop: int) -> None:
        """Write the chunks of the batch below `stop` that are not final in the file."""
        for index in range(self._final_chunks, stop):
            packed = self._packed[index].result() if index < len(self._packed) else self._pack(self._packer, index)
            self._place(index, packed)
            self._packed_bytes = 0
        self._final_chunks = max(self._final_chunks, stop)

    def _place(self, index: int, packed: bytes) -> None:
        first = self.base + index * schema.CHUNK_ROWS
        if (first, len(packed)) == self._unfinished:
            # HDF5 would write a chunk of the same size in place, and a kill meanwhile would tear acknowledged rows.
            # A chunk of another size gets a place of its own; bytes after the end of deflated data are not read.
            packed += b"\0"
        self._packets.id.write_direct_chunk((first,), packed)
        self._unfinished = first, len(packed)

    def _pack(self, packer: Packer, index: int) -> bytes:
        """Return a full chunk of the batch packed."""
        received = self._received.get(index)
        return packer.pack(self._chunk(index)) if received is None else received

    def _chunk(self, index: int) -> NDArray[np.uint8]:
        """Return the bytes of a chunk of the batch."""
        return self._current[index * schema.CHUNK_ROWS : (index + 1) * schema.CHUNK_ROWS].reshape(-1)


class WriteBack:
    """Asks the kernel to write new bytes of a file, and to drop bytes far before its end from memory.

    Otherwise the kernel writes only after gigabytes, for which a sync then waits, and a run of hours fills the memory.
    The requests have a thread of their own, because a slow disk blocks them. The thread is a daemon and not one of an
    executor, because the end of the process must not wait for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._requested = 0  # bytes of the file
        self._thread: threading.Thread | None = None

    def advance(self, size: int) -> None:
        """Note that the file has `size` bytes now. While a request is blocked, new bytes wait for the next request."""
        if size - self._requested < WINDOW or (self._thread is not None and self._thread.is_alive()):
            return
        span = self._requested, size
        self._thread = threading.Thread(target=self._request, args=span, name="write-back", daemon=True)
        self._thread.start()
        self._requested = size

    def _request(self, first: int, last: int) -> None:
        with contextlib.suppress(OSError):  # the name of the file may have changed, and no data depend on the request
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Linux begins to write the dirty pages, and drops the clean ones.
                os.posix_fadvise(file, first, last - first, os.POSIX_FADV_DONTNEED)
                if last > KEPT:
                    os.posix_fadvise(file, max(0, first - KEPT), last - max(first, KEPT), os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
