"""The ring: one arena of rows and headers, a queue of block descriptors, and the counters, all in one shared file.

A block is a contiguous slice of the arena: its rows, then its packed stream header. Positions count bytes since the arena was
made and only grow; modulo the arena's size they say where a block lies, so that a block never wraps: what is left behind it at
the arena's end is skipped. What must stay true, also when the process is killed between any two instructions:
  - everything of a block is written before the head moves over its descriptor;
  - the row count of the open block is published after its rows;
  - the tail moves in order only, and never over the head.
"""
cimport cython
from libc.string cimport memcpy, memset
from wire cimport N_COUNTS, uint8_t, uint16_t, uint32_t, uint64_t

import numpy as np

cdef extern from *:
    """
    #define store_release(where, value) __atomic_store_n(where, value, __ATOMIC_RELEASE)
    """
    void store_release(uint64_t* where, uint64_t value) noexcept nogil

cdef enum:
    IO_GROUPS = 256
    DESCRIPTORS = 65536
    MAX_REQUIRED = 16
    NAME_BYTES = 64
    KEPT_DESCRIPTORS = 64      # for INFO messages and the end record, whatever arrives
    HEADER_ROOM = 32768        # bytes that the packed header of an open block may take
    ALIGNMENT = 64
    MIN_ROWS_AT_END = 1024     # less room than this at the arena's end is skipped
    HEADER_SIZE = 4096
    COUNTS_SIZE = 256 * N_COUNTS * 8
    _OVERHEAD = 4096 + 2 * 256 * N_COUNTS * 8 + 65536 * 64

cdef struct Descriptor:
    uint64_t start             # position of the rows
    uint64_t end               # position behind rows and header
    uint64_t run
    uint64_t sequence
    uint32_t payload           # bytes of rows
    uint32_t header            # bytes of the packed header
    uint32_t rows
    uint8_t kind
    uint8_t layout
    uint16_t spare
    uint64_t reserved[2]

cdef struct Header:
    uint8_t magic[8]
    uint32_t version
    uint32_t n_counts
    uint64_t size              # of the whole file
    uint64_t arena             # offset of the arena in the file
    uint64_t arena_size
    uint64_t epoch
    uint8_t producer[NAME_BYTES]
    uint64_t head              # descriptors published since the beginning
    uint64_t tail              # descriptors freed since the beginning
    uint64_t head_position
    uint64_t tail_position
    uint64_t run               # 0: outside a run
    uint64_t sequence          # of the next block
    uint64_t first_packet      # index of the open block's first row in its run
    uint64_t run_started       # descriptor with the run's sequence 0
    uint64_t open_start        # position of the open block
    uint64_t open_rows         # rows in it so far
    uint64_t open_capacity     # rows that it can take; 0: no block is open
    uint64_t open_first_ns
    uint32_t row_size
    uint32_t layout
    uint32_t n_required
    uint32_t spare
    uint8_t required[MAX_REQUIRED * NAME_BYTES]
    uint64_t acknowledged[MAX_REQUIRED]

#: Bytes of a ring that hold no rows, and the smallest ring that can be.
OVERHEAD = _OVERHEAD
SMALLEST = _OVERHEAD + (8 << 20)
BLOCK, INFO, END = 1, 2, 3

assert sizeof(Header) <= HEADER_SIZE and sizeof(Descriptor) == 64


cdef uint64_t _aligned(uint64_t position) noexcept nogil:
    return (position + ALIGNMENT - 1) & ~<uint64_t>(ALIGNMENT - 1)


@cython.final
cdef class Ring:
    """A ring in `memory`, a writable buffer of at least SMALLEST bytes that starts out as zeros.

    `counts` and `outside` are the ledger's counters of the run and of what comes outside of runs: views of the arena, shape
    (IO_GROUPS, N_COUNTS), dtype u8.
    """

    cdef uint8_t[::1] memory
    cdef Header* header
    cdef Descriptor* descriptors
    cdef uint8_t* arena
    cdef object writable        # the arena; slices of it keep the memory alive for as long as anybody reads them
    cdef object readable
    cdef uint64_t kept          # bytes kept free for INFO messages and the end record
    cdef readonly object counts
    cdef readonly object outside

    def __cinit__(self, memory, *, str producer, uint64_t epoch):
        cdef bytes name = producer.encode()
        if len(name) > NAME_BYTES:
            raise ValueError(f"producer name: expected at most {NAME_BYTES} bytes, found {len(name)}")
        cdef uint8_t[::1] view = memory
        if view.shape[0] < <Py_ssize_t>(_OVERHEAD + (8 << 20)):
            raise ValueError(f"ring: expected at least {SMALLEST} bytes, found {view.shape[0]}")
        self.memory = view
        cdef uint8_t* base = &view[0]
        self.header = <Header*>base
        self.descriptors = <Descriptor*>(base + HEADER_SIZE + 2 * COUNTS_SIZE)
        self.arena = base + _OVERHEAD
        self.header.version = 1
        self.header.n_counts = N_COUNTS
        self.header.size = <uint64_t>view.shape[0]
        self.header.arena = _OVERHEAD
        self.header.arena_size = (<uint64_t>view.shape[0] - _OVERHEAD) & ~<uint64_t>(ALIGNMENT - 1)
        self.header.epoch = epoch
        memcpy(self.header.producer, <const char*>name, len(name))
        self.writable = memoryview(memory).cast("B")[_OVERHEAD:]
        self.readable = self.writable.toreadonly()
        self.kept = min(<uint64_t>(4 << 20), self.header.arena_size // 8)
        array = np.frombuffer(memory, np.uint64, 2 * IO_GROUPS * N_COUNTS, HEADER_SIZE).reshape(2, IO_GROUPS, N_COUNTS)
        self.counts, self.outside = array[0], array[1]
        memcpy(self.header.magic, b"LPXRING\x01", 8)

    @property
    def head(self) -> int:
        return self.header.head

    @property
    def tail(self) -> int:
        return self.header.tail

    @property
    def sequence(self) -> int:
        return self.header.sequence

    @property
    def first_packet(self) -> int:
        return self.header.first_packet

    @property
    def open_rows(self) -> int:
        return self.header.open_rows

    @property
    def open_first_ns(self) -> int:
        return self.header.open_first_ns

    @property
    def fill(self) -> float:
        """How full it is, 0 to 1, of bytes or of descriptors, whichever is more."""
        cdef double room = self.header.arena_size - self.kept
        return max((self.header.head_position - self.header.tail_position) / room,
                   (self.header.head - self.header.tail) / <double>(DESCRIPTORS - KEPT_DESCRIPTORS))

    def begin(self, uint64_t run, uint32_t layout, uint32_t row_size, required):
        """A new run: sequence and row index 0, counters 0. The end record of the run before is in already."""
        cdef Py_ssize_t i
        names = [name.encode() for name in required]
        if len(names) > MAX_REQUIRED or any(len(name) > NAME_BYTES for name in names):
            raise ValueError(f"ring: expected at most {MAX_REQUIRED} storages with names of at most {NAME_BYTES} bytes, "
                             f"found {list(required)}")
        if self.header.open_rows:
            raise ValueError(f"ring: run {run} begins while a block of run {self.header.run} is open")
        self.header.open_capacity = 0
        self.counts[:] = 0
        memset(self.header.required, 0, sizeof(self.header.required))
        memset(self.header.acknowledged, 0, sizeof(self.header.acknowledged))
        for i, name in enumerate(names):
            memcpy(self.header.required + i * NAME_BYTES, <const char*><bytes>name, len(name))
        self.header.n_required = len(names)
        self.header.sequence = 0
        self.header.first_packet = 0
        self.header.run_started = self.header.head
        self.header.layout = layout
        self.header.row_size = row_size
        store_release(&self.header.run, run)

    def acknowledge(self, Py_ssize_t storage, uint64_t position):
        """Note for a successor how far the storage at this place in `required` has come (a descriptor number)."""
        if not 0 <= storage < <Py_ssize_t>self.header.n_required:
            raise IndexError(f"ring: storage {storage} of {self.header.n_required}")
        store_release(&self.header.acknowledged[storage], position)

    cdef uint64_t _room(self, uint64_t needed, bint kept) noexcept:
        """Bytes free in one piece at the head, at least `needed`, after skipping the arena's end if that helps; or 0."""
        cdef uint64_t size = self.header.arena_size
        cdef uint64_t limit = size if kept else size - self.kept
        cdef uint64_t used = self.header.head_position - self.header.tail_position
        cdef uint64_t behind = size - self.header.head_position % size
        if self.header.head - self.header.tail >= <uint64_t>(DESCRIPTORS if kept else DESCRIPTORS - KEPT_DESCRIPTORS):
            return 0
        if behind < needed:
            if used + behind + needed > limit:
                return 0
            self.header.head_position += behind
            used += behind
            behind = size
        if used + needed > limit:
            return 0
        return min(behind, limit - used)

    def rows(self, uint64_t now_ns, uint32_t most):
        """The free rows of the open block, as writable bytes; opens one, of up to `most` rows, when none is; None: full."""
        cdef uint64_t room, start
        cdef uint64_t size = self.header.row_size
        if not self.header.open_capacity:
            room = self._room(HEADER_ROOM + MIN_ROWS_AT_END * size, False)
            if not room:
                return None
            self.header.open_start = self.header.head_position
            self.header.open_rows = 0
            store_release(&self.header.open_capacity, min(<uint64_t>most, (room - HEADER_ROOM) // size))
        if not self.header.open_rows:
            self.header.open_first_ns = now_ns
        start = self.header.open_start % self.header.arena_size
        return self.writable[start + self.header.open_rows * size:start + self.header.open_capacity * size]

    def publish(self, uint64_t n):
        """n more rows of the open block are written. Returns True when it is full."""
        if n > self.header.open_capacity - self.header.open_rows:
            raise ValueError(f"ring: {n} rows published, room for {self.header.open_capacity - self.header.open_rows}")
        store_release(&self.header.open_rows, self.header.open_rows + n)
        return self.header.open_rows == self.header.open_capacity

    def open_payload(self):
        """The rows of the open block so far, as read-only bytes."""
        cdef uint64_t start = self.header.open_start % self.header.arena_size
        return self.readable[start:start + self.header.open_rows * self.header.row_size]

    def close_block(self, bytes header):
        """Publish the open block with its packed header."""
        cdef uint64_t rows = self.header.open_rows
        if not self.header.open_capacity or not rows or len(header) > HEADER_ROOM:
            raise ValueError(f"ring: a block of {rows} rows with a header of {len(header)} bytes cannot be closed")
        self._push(BLOCK, self.header.open_start, rows * self.header.row_size, rows, header)

    def append(self, int kind, payload, uint32_t rows, bytes header):
        """A block made elsewhere: INFO rows, or the end record (no rows). It may use the room that is kept for that.

        False when even that is used up. No block may be open.
        """
        cdef const uint8_t[::1] view = payload
        cdef uint64_t size = <uint64_t>view.shape[0]
        if self.header.open_rows:
            raise ValueError("ring: a block is open")
        if size != <uint64_t>rows * self.header.row_size:
            raise ValueError(f"ring: {rows} rows of {self.header.row_size} bytes expected, found {size} bytes")
        if not self._room(_aligned(size + len(header)), True):
            return False
        if size:
            memcpy(self.arena + self.header.head_position % self.header.arena_size, &view[0], size)
        self._push(kind, self.header.head_position, size, rows, header)
        return True

    cdef _push(self, int kind, uint64_t start, uint64_t size, uint64_t rows, bytes header):
        cdef Descriptor* block = &self.descriptors[self.header.head % DESCRIPTORS]
        memcpy(self.arena + start % self.header.arena_size + size, <const char*>header, len(header))
        block.start = start
        block.end = _aligned(start + size + len(header))
        block.run = self.header.run
        block.sequence = self.header.sequence
        block.payload = <uint32_t>size
        block.header = <uint32_t>len(header)
        block.rows = <uint32_t>rows
        block.kind = <uint8_t>kind
        block.layout = <uint8_t>self.header.layout
        self.header.open_capacity = 0
        self.header.open_rows = 0
        self.header.head_position = block.end
        self.header.sequence += 1
        self.header.first_packet += rows
        store_release(&self.header.head, self.header.head + 1)

    cdef Descriptor* _at(self, uint64_t index) except NULL:
        if not self.header.tail <= index < self.header.head:
            raise IndexError(f"ring: block {index} of {self.header.tail} to {self.header.head}")
        return &self.descriptors[index % DESCRIPTORS]

    def kind(self, uint64_t index) -> int:
        return self._at(index).kind

    def payload(self, uint64_t index):
        """The rows of a block, as read-only bytes; valid until the tail moves over it."""
        cdef Descriptor* block = self._at(index)
        cdef uint64_t start = block.start % self.header.arena_size
        return self.readable[start:start + block.payload]

    def packed_header(self, uint64_t index) -> bytes:
        cdef Descriptor* block = self._at(index)
        cdef uint8_t* where = self.arena + block.start % self.header.arena_size + block.payload
        return where[:block.header]

    def free_to(self, uint64_t index):
        """Free every block below `index`."""
        if not self.header.tail <= index <= self.header.head:
            raise IndexError(f"ring: cannot free to {index}: blocks are {self.header.tail} to {self.header.head}")
        if index == self.header.tail:
            return
        cdef uint64_t position = self.descriptors[(index - 1) % DESCRIPTORS].end
        store_release(&self.header.tail_position, position)
        store_release(&self.header.tail, index)
