"""Collect the rows of a growing file in batches, and write these as shuffled and deflated chunks.

WriteBack makes the kernel write the file to the disk steadily, so that it does not fill the memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native.hdf5_chunks import Packer
from larpixdaq.hdf5 import layout
from larpixdaq.protocol.packed_rows import unpack_chunk

#: Full chunks that are written to the file when the first of their blocks has waited for long enough. With fewer, the
#: journal takes the blocks, because each write costs some ten system calls.
LEAST: Final = 4
#: Full chunks that are written at once. Half of the stream's window holds more of them, so that blocks come meanwhile.
MOST: Final = 12
#: Rows between two calls of show() below which a plain chunk takes less room than a chunk that is packed each time.
_SLOW_ROWS: Final = schema.CHUNK_ROWS // 8
#: Share of a plain chunk's size: when the packed copies of a chunk exceed it, the chunk is written plain. Short runs do
#: not reach it.
_PACKED_SHARE: Final = 1 / 8
#: Bytes by which the file grows between two requests to the kernel.
WINDOW: Final = 16 << 20
#: Bytes at the end of the file that stay in memory, for readers of the growing file.
KEPT: Final = 256 << 20


class _Chunk:
    """A chunk of a batch. `rows`: buffer of its rows, None before it is needed and after the rows are not needed."""

    __slots__ = ("packed", "packing", "received", "rows")

    def __init__(self) -> None:
        self.rows: NDArray[np.uint8] | None = None
        self.received: bytes | None = None  # as it came packed, unless it was unpacked before it was in the file
        self.packed: bytes | Exception | None = None  # by a thread, which releases `packing` then
        self.packing = threading.Lock()

    def result(self) -> bytes:
        """Return the packed chunk, when it is packed."""
        if self.received is not None:
            return self.received
        with self.packing:
            assert self.packed is not None
        if isinstance(self.packed, Exception):
            raise self.packed
        return self.packed

    @property
    def is_packed(self) -> bool:
        return self.received is not None or self.packed is not None


class Batch:
    """The newest rows of a file, in chunks: from the first chunk that is not written for good to the newest row.

    Threads pack full chunks while others fill up. The rows of a chunk are kept as long as the journal may need them,
    and those of the last chunk before the batch, because a block may straddle its boundary and the journal needs it
    whole.

    `rows`: all rows of the file, written or not; `base`: the first row of the batch, counted from the file's first.
    """

    def __init__(self, packets: Any, itemsize: int, threads: int = 1) -> None:
        """`packets`: the dataset; `threads`: those that pack chunks."""
        self.rows = 0
        self.base = 0
        self._chunks: list[_Chunk] = []
        self._previous: _Chunk | None = None  # the last chunk before the batch
        self._free: list[NDArray[np.uint8]] = []  # buffers, the newest last, because the cache has it
        self._unfinished = -1, 0  # the chunk in the file that is written anew: first row, size in bytes
        self._written = 0  # chunks of the batch that are in the file and do not change any more
        self._packed = 0  # chunks of the batch, from the first, that are packed
        self._visible_rows = 0  # rows in the file
        self._packed_bytes = 0  # bytes that show() has written of its last chunk
        self._packets = packets
        self._size = itemsize
        self._full: SimpleQueue[_Chunk | None] = SimpleQueue()  # chunks for the threads; None ends one
        self._threads = threads  # those to be started with the first full chunk
        self._packer = Packer(schema.CHUNK_ROWS, itemsize)  # of unfinished chunks
        #: Chunks in the file that came packed, and were not unpacked.
        self.unread_chunks = 0

    def resume(self, rows: int) -> None:
        """Continue a file after its first `rows` rows, perhaps within a chunk; rows after these are removed."""
        self.rows, self.base = rows, rows - rows % schema.CHUNK_ROWS
        # Whole chunks are removed unread. To cut within a chunk HDF5 reads it, and these may be damaged.
        whole = -(-rows // schema.CHUNK_ROWS) * schema.CHUNK_ROWS
        if whole < self._packets.shape[0]:
            self._packets.resize((whole,))
        if self.base < self._packets.shape[0]:
            self._unfinished = self.base, int(self._packets.id.get_chunk_info_by_coord((self.base,)).size)
        self._visible_rows = int(self._packets.shape[0])
        if rows > self.base:
            kept = self._packets[self.base : rows].view(np.uint8).reshape(-1, self._size)
            self._rows_of(0)[: rows - self.base] = kept

    @property
    def full_chunks(self) -> int:
        """Number of full chunks in the batch."""
        return (self.rows - self.base) // schema.CHUNK_ROWS

    def stage(self, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Copy rows into the batch, for commit() to add; return the copy, in one piece for each chunk.

        data: bytes of rows, shape (N,).
        """
        rows = data.reshape(-1, self._size)
        index, used = divmod(self.rows - self.base, schema.CHUNK_ROWS)
        pieces = []
        while True:
            n = min(len(rows), schema.CHUNK_ROWS - used)
            piece = self._rows_of(index)[used : used + n]
            piece[:] = rows[:n]
            pieces.append(piece.reshape(-1))
            rows = rows[n:]
            if not len(rows):
                return pieces
            index, used = index + 1, 0

    @property
    def begins_chunk(self) -> bool:
        """Whether the next row is the first one of a chunk."""
        return self.rows % schema.CHUNK_ROWS == 0

    def add_chunk(self, packed: bytes) -> None:
        """Add a packed chunk at the beginning of a chunk, as commit() adds rows."""
        chunk = self._chunk(self.full_chunks)
        self._release(chunk)  # rows that were staged and not committed
        chunk.received = packed
        self.commit(schema.CHUNK_ROWS)

    def commit(self, n: int) -> None:
        """Add the n rows that were staged last to the batch."""
        before = self.full_chunks
        self.rows += n
        for index in range(before, self.full_chunks):
            self._start_packing(self._chunks[index])
        self._release_rows()

    def pieces(self, start: int, stop: int) -> list[NDArray[np.uint8]]:
        """Return the bytes of rows `start` to `stop` of the file, in one piece for each chunk. ChecksumError if they
        came packed and are damaged.

        The rows must belong to a block that does not end in one of LEAST or more full chunks: write() takes these. A
        chunk that is unpacked for this before it is in the file is packed anew: HDF5 reads it by zlib, which refuses
        some data that ISA-L takes.
        """
        found = []
        while start < stop:
            index, first = divmod(start - self.base, schema.CHUNK_ROWS)
            n = min(stop - start, schema.CHUNK_ROWS - first)
            chunk = self._chunk(index) if index >= 0 else self._previous
            assert chunk is not None
            if chunk.rows is None:
                assert chunk.received is not None
                rows = self._buffer()
                unpack_chunk(chunk.received, rows.reshape(-1), self._size)
                chunk.rows = rows
                if index >= self._written:
                    chunk.received = None
                    self._start_packing(chunk)
                    self._packed = min(self._packed, index)
            found.append(chunk.rows[first : first + n].reshape(-1))
            start += n
        return found

    def write(self, *, wait: bool = True) -> int:
        """Write the full chunks, which leave the batch; return the row after them.

        wait: until all of them are packed; otherwise at least LEAST chunks are written, and those that are packed.
        """
        full = self.full_chunks
        self._release_rows()
        n = full if wait else max(self._packed, min(LEAST, full))
        self._set_rows(max(self.base + n * schema.CHUNK_ROWS, self._visible_rows))
        self._write_chunks(n)
        self.unread_chunks += sum(chunk.received is not None for chunk in self._chunks[:n])
        if n:
            for kept in (self._previous, *self._chunks[: n - 1]):
                self._release(kept)
            self._previous = self._chunks[n - 1]
            del self._chunks[:n]
            self.base += n * schema.CHUNK_ROWS
            self._written, self._packed = max(0, self._written - n), max(0, self._packed - n)
        return self.base

    def write_all(self) -> int:
        """Write the full chunks and the unfinished one, which stays in the batch; return the row after them."""
        self.write()
        self._set_rows(self.rows)
        if rows := self.rows - self.base:
            self._place(0, self._packer.pack(self._padded(0, rows)))
        return self.rows

    def show(self) -> None:
        """Write the rows of the batch for readers of the growing file; write() writes its last chunk anew.

        A packed chunk takes a new place in the file each time, because a reader of a place that is overwritten would
        get a mixture; the old place is lost. A chunk that fills up slowly is written without filters, and overwritten
        in place, because its rows so far do not change.
        """
        new, full = self.rows - self._visible_rows, self.full_chunks
        self._set_rows(self.rows)
        self._write_chunks(full)
        if self.begins_chunk:
            return
        first, chunk = self.base + full * schema.CHUNK_ROWS, self._padded(full, self.rows % schema.CHUNK_ROWS)
        plain = self._unfinished == (first, len(chunk))
        if not plain:
            packed = self._packer.pack(chunk)
            self._packed_bytes += len(packed)
            plain = new < _SLOW_ROWS and self._packed_bytes > _PACKED_SHARE * len(chunk)
        if plain:
            self._packets.id.write_direct_chunk((first,), chunk, filter_mask=layout.NO_FILTERS)
            self._unfinished = first, len(chunk)
        else:
            self._place(full, packed)

    def _set_rows(self, rows: int) -> None:
        """Set the number of rows in the file."""
        if rows != self._visible_rows:
            self._packets.id.set_extent((rows,))
            self._visible_rows = rows

    def _write_chunks(self, stop: int) -> None:
        """Write the chunks of the batch below `stop` that are not final in the file."""
        for index in range(self._written, stop):
            self._place(index, self._chunks[index].result())
            self._packed_bytes = 0
        self._written = max(self._written, stop)

    def _place(self, index: int, packed: bytes) -> None:
        first = self.base + index * schema.CHUNK_ROWS
        if (first, len(packed)) == self._unfinished:
            # HDF5 would write a chunk of the same size in place, and a kill meanwhile would tear acknowledged rows.
            # A chunk of another size gets a place of its own; bytes after the end of deflated data are not read.
            packed += b"\0"
        self._packets.id.write_direct_chunk((first,), packed)
        self._unfinished = first, len(packed)

    def _start_packing(self, chunk: _Chunk) -> None:
        """Let a thread pack a full chunk, unless it came packed."""
        if chunk.received is None:
            chunk.packing.acquire()
            self._full.put(chunk)
            for _ in range(self._threads):
                packer = Packer(schema.CHUNK_ROWS, self._size)
                threading.Thread(target=_pack, args=(self._full, packer), name="packing", daemon=True).start()
                weakref.finalize(self, self._full.put, None)
            self._threads = 0

    def _release_rows(self) -> None:
        """Note which chunks are packed, and use the buffers of rows again that the journal cannot need any more.

        The rows of the last packed chunk stay, because a block may begin in it and end in a chunk that is not packed.
        """
        full = self.full_chunks
        while self._packed < full and self._chunks[self._packed].is_packed:
            self._packed += 1
        if full >= LEAST:
            for chunk in self._chunks[: max(0, self._packed - 1)]:
                self._release(chunk)

    def _release(self, chunk: _Chunk | None) -> None:
        if chunk is not None and chunk.rows is not None:
            self._free.append(chunk.rows)
            chunk.rows = None

    def _chunk(self, index: int) -> _Chunk:
        """Return a chunk of the batch, of which there is at least the one before."""
        if index == len(self._chunks):
            self._chunks.append(_Chunk())
        return self._chunks[index]

    def _rows_of(self, index: int) -> NDArray[np.uint8]:
        """Return the rows of a chunk that is not full, shape (CHUNK_ROWS, itemsize)."""
        chunk = self._chunk(index)
        if chunk.rows is None:
            chunk.rows = self._buffer()
        return chunk.rows

    def _padded(self, index: int, rows: int) -> NDArray[np.uint8]:
        """Return the bytes of a chunk with zeros after its first `rows` rows."""
        chunk = self._rows_of(index)
        chunk[rows:] = 0
        return chunk.reshape(-1)

    def _buffer(self) -> NDArray[np.uint8]:
        return self._free.pop() if self._free else np.zeros((schema.CHUNK_ROWS, self._size), np.uint8)


def _pack(full: SimpleQueue[_Chunk | None], packer: Packer) -> None:
    """Pack chunks, in a thread. A queue and a lock take a quarter of the time of an executor."""
    while (chunk := full.get()) is not None:
        assert chunk.rows is not None
        try:
            chunk.packed = packer.pack(chunk.rows.reshape(-1))
        except Exception as error:  # for the loop
            chunk.packed = error
        chunk.packing.release()


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
