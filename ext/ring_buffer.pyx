"""The ring: an arena of rows and headers, a queue of block descriptors, and the ledger's counters, in one shared file.

A block is a contiguous slice of the arena: its rows, then its packed stream header. Positions count bytes since the ring was
made and only grow; a position modulo the arena's size is the place in the arena. A block never wraps: when it does not fit
before the arena's end, the bytes up to the end are skipped. Invariants, also when the process is killed between any two
instructions:
  - A block is written completely before the head moves over its descriptor. This single store publishes the block.
  - Rows of the open block, counters and unreported gaps become valid together, by the single store that makes a checkpoint
    the newest. There are two checkpoints, written in turn.
  - A run begins with the single store that counts its entry.
  - The tail only grows, and never passes the head.
  - `claimed` moves before bytes up to there are written, so that a Reader knows which blocks are not overwritten.
A successor derives all other fields of the header from these (`_restore`).
"""
cimport cython
from cpython.exc cimport PyErr_SetFromErrno
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_FIXED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap
from row_structs cimport (BAD_PARITY, DROPPED, INFO_ROWS, N_COUNTS, PACKETS, REJECTED_WORDS, SENT_ROWS, TIME_ROWS, UNKNOWN_WORDS,
                          WORD_ROWS, checked_byte, uint8_t, uint16_t, uint32_t, uint64_t)

from mmap import mmap as mapped_memory

import numpy as np

cdef extern from *:
    """
    #define store_release(where, value) __atomic_store_n(where, value, __ATOMIC_RELEASE)
    #define load_acquire(where) __atomic_load_n(where, __ATOMIC_ACQUIRE)
    #define fence() __atomic_thread_fence(__ATOMIC_ACQ_REL)
    """
    void store_release(uint64_t* where, uint64_t value) noexcept nogil
    uint64_t load_acquire(const uint64_t* where) noexcept nogil
    void fence() noexcept nogil

cdef enum:
    IO_GROUPS = 256
    DESCRIPTORS = 65536
    RUNS = 64                  # maximum number of runs with blocks in the ring at the same time
    MAX_REQUIRED = 16
    NAME_BYTES = 64
    RESERVED_DESCRIPTORS = 64  # for INFO messages and the end record
    HEADER_ROOM = 32768        # maximum size of a packed header, bytes
    ALIGNMENT = 64
    MIN_ROWS_AT_END = 1024     # the arena's end is skipped when it has room for fewer rows
    COUNTS_SIZE = 256 * N_COUNTS * 8
    GAPS_SIZE = 256 * 3 * 8
    BLOCK_TAG = 12             # of stream.Block, with the number of its fields
    BLOCK_FIELDS = 15
    NIL = 0xC0                 # msgpack's

cdef struct Descriptor:
    uint64_t start             # position of the rows
    uint64_t end               # position after rows and header
    uint64_t run
    uint64_t sequence
    uint32_t payload           # bytes of rows
    uint32_t header            # bytes of the packed header
    uint32_t rows
    uint8_t kind
    uint8_t layout
    uint16_t spare
    uint64_t first_packet
    uint64_t reserved

cdef struct Run:
    uint64_t run
    uint64_t first             # descriptor with the run's sequence 0
    uint64_t began_ns
    uint32_t layout
    uint32_t row_size
    uint32_t n_required
    uint32_t spare
    uint8_t io_groups[32]      # one bit for each io_group of the producer
    uint8_t required[MAX_REQUIRED * NAME_BYTES]
    uint64_t acknowledged[MAX_REQUIRED]

cdef struct Checkpoint:
    uint64_t head              # later blocks closed the open block, or are INFO rows or the end record
    uint64_t open_start
    uint64_t open_rows
    uint64_t open_first_ns
    uint8_t gaps[GAPS_SIZE]
    uint8_t counts[COUNTS_SIZE]

cdef struct Header:
    uint8_t magic[8]
    uint32_t version
    uint32_t n_counts
    uint64_t size              # of the whole file
    uint64_t arena_size
    uint64_t epoch
    uint8_t producer[NAME_BYTES]
    uint64_t made_ns
    uint64_t alive_ns          # wall clock at the last turn of the producer's loop
    uint64_t head              # number of descriptors published so far
    uint64_t tail              # number of descriptors freed so far
    uint64_t n_runs            # number of runs begun so far
    uint64_t n_checkpoints     # number of checkpoints so far; the newest is at n_checkpoints % 2
    uint64_t claimed           # the arena may have been written up to this position
    # derived by a successor from the fields above
    uint64_t head_position
    uint64_t tail_position
    uint64_t sequence          # of the next block
    uint64_t first_packet      # index of the open block's first row in its run
    uint64_t open_start        # position of the open block
    uint64_t open_rows         # its rows so far
    uint64_t open_capacity     # its maximum number of rows; 0: no block is open
    uint64_t open_first_ns

cdef struct Head:              # the file before the arena
    Header header
    Run runs[RUNS]
    Checkpoint checkpoints[2]
    uint8_t counts[2 * COUNTS_SIZE]
    uint8_t gaps[GAPS_SIZE]
    Descriptor descriptors[DESCRIPTORS]

cdef uint64_t _OVERHEAD = (sizeof(Head) + 4095) & ~<uint64_t>4095
cdef uint64_t _SMALLEST = _OVERHEAD + (8 << 20)
cdef enum:
    VERSION = 3

#: Bytes of a ring before the arena, and of the smallest ring.
OVERHEAD = _OVERHEAD
SMALLEST = _SMALLEST
BLOCK, INFO, END = 1, 2, 3

assert sizeof(Descriptor) == 64


def map_file(memory, int file):
    """Map a file over `memory`, an mmap.mmap of the file's size: at the same address, shared, readable and writable.

    All views of the memory show the file's content afterwards. OSError when the file cannot be mapped. ValueError for
    memory of another kind, which may hold other objects too.
    """
    if not isinstance(memory, mapped_memory):
        raise ValueError(f"expected the memory of an mmap.mmap, found {type(memory).__name__}")
    cdef const uint8_t[::1] view = memory
    if mmap(<void*>&view[0], view.shape[0], PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED:
        PyErr_SetFromErrno(OSError)


cdef uint64_t _aligned(uint64_t position) noexcept nogil:
    return (position + ALIGNMENT - 1) & ~<uint64_t>(ALIGNMENT - 1)


cdef uint64_t _arena_size(uint64_t size) noexcept:
    """Return the arena's size in a file of `size` bytes."""
    return (size - _OVERHEAD) & ~<uint64_t>(ALIGNMENT - 1)


cdef _check_header(const Header* header, uint64_t size, bytes name, uint64_t epoch):
    """Raise ValueError when a file of `size` bytes does not hold the ring of this producer and epoch."""
    if bytes(header.magic[:8]) != b"LPXRING\x03" or header.version != VERSION or header.n_counts != N_COUNTS:
        raise ValueError("ring: not made by this version of larpix-daq")
    if header.size != size or header.arena_size != _arena_size(size):
        raise ValueError(f"ring: a file of {header.size} bytes expected, found {size}")
    if header.epoch != epoch or bytes(header.producer[:NAME_BYTES]).rstrip(b"\0") != name:
        raise ValueError(f"ring: its producer or epoch ({header.epoch:x}) is not that of its file name")


cdef uint8_t* _pack_uint(uint8_t* out, uint64_t value) noexcept nogil:
    """Write a number as msgpack, in as few bytes as possible. Returns the place after it."""
    cdef int size, i
    if value < 128:
        out[0] = <uint8_t>value
        return out + 1
    if value < 1 << 8:
        out[0], size = 0xCC, 1
    elif value < 1 << 16:
        out[0], size = 0xCD, 2
    elif value >> 32 == 0:
        out[0], size = 0xCE, 4
    else:
        out[0], size = 0xCF, 8
    for i in range(size):
        out[1 + i] = <uint8_t>(value >> 8 * (size - 1 - i))
    return out + 1 + size


cdef uint8_t* _pack_array(uint8_t* out, uint32_t length) noexcept nogil:
    """Write the beginning of a msgpack array of fewer than 65,536 values. Returns the place after it."""
    if length < 16:
        out[0] = <uint8_t>(0x90 | length)
        return out + 1
    out[0], out[1], out[2] = 0xDC, <uint8_t>(length >> 8), <uint8_t>length
    return out + 3


cdef uint8_t* _pack_text(uint8_t* out, const uint8_t* text, uint8_t length) noexcept nogil:
    """Write a msgpack string. Returns the place after it."""
    if length < 32:
        out[0] = <uint8_t>(0xA0 | length)
        out += 1
    else:
        out[0], out[1] = 0xD9, length
        out += 2
    memcpy(out, text, length)
    return out + length


@cython.final
cdef class Ring:
    """A ring in `memory`, a writable buffer of at least SMALLEST bytes, all zero for a new ring.

    `counts` and `outside_counts` are the ledger's counters of the run and of data outside of runs: views of the memory,
    shape (IO_GROUPS, N_COUNTS), dtype u8. `gaps`, shape (IO_GROUPS, 3), dtype u8, are the gaps that no header has reported
    yet: number of rows, first and last time (unix ns).

    `attach`: the memory holds the ring of a dead producer. ValueError when it is damaged or of another producer; otherwise
    all published blocks are still there, and the open block can be closed.
    """

    cdef uint8_t[::1] memory
    cdef Header* header
    cdef Head* file
    cdef Run* run               # entry of the newest run
    cdef Descriptor* descriptors
    cdef uint8_t* arena
    cdef object writable        # the arena; its slices keep the memory alive while they are in use
    cdef object readable
    cdef uint8_t name_size
    cdef uint64_t reserved      # bytes for INFO messages and the end record
    cdef readonly object counts
    cdef readonly object outside_counts
    cdef readonly object gaps

    def __cinit__(self, memory, *, str producer, uint64_t epoch, uint64_t made_ns=0, bint attach=False):
        cdef bytes name = producer.encode()
        if len(name) > NAME_BYTES:
            raise ValueError(f"producer name: expected at most {NAME_BYTES} bytes, found {len(name)}")
        self.name_size = <uint8_t>len(name)
        cdef uint8_t[::1] view = memory
        if view.shape[0] < <Py_ssize_t>_SMALLEST:
            raise ValueError(f"ring: expected at least {SMALLEST} bytes, found {view.shape[0]}")
        self.memory = view
        self.file = <Head*>&view[0]
        self.header = &self.file.header
        self.descriptors = &self.file.descriptors[0]
        self.arena = &view[0] + _OVERHEAD
        self.writable = memoryview(memory).cast("B")[_OVERHEAD:]
        self.readable = self.writable.toreadonly()
        cdef uint64_t offset = <uint8_t*>&self.file.counts[0] - &view[0]
        array = np.frombuffer(memory, np.uint64, 2 * IO_GROUPS * N_COUNTS, offset).reshape(2, IO_GROUPS, N_COUNTS)
        self.counts, self.outside_counts = array[0], array[1]
        self.gaps = np.frombuffer(memory, np.uint64, 3 * IO_GROUPS, offset + 2 * COUNTS_SIZE).reshape(IO_GROUPS, 3)
        if attach:
            self._check(name, epoch)
            self.reserved = min(<uint64_t>(4 << 20), self.header.arena_size // 8)
            self._restore()
            return
        self.header.version = VERSION
        self.header.n_counts = N_COUNTS
        self.header.size = <uint64_t>view.shape[0]
        self.header.arena_size = _arena_size(<uint64_t>view.shape[0])
        self.header.epoch = epoch
        self.header.made_ns = self.header.alive_ns = made_ns
        memcpy(self.header.producer, <const char*>name, len(name))
        self.reserved = min(<uint64_t>(4 << 20), self.header.arena_size // 8)
        self.run = &self.file.runs[0]
        memcpy(self.header.magic, b"LPXRING\x03", 8)

    # Start of a successor

    cdef _check(self, bytes name, uint64_t epoch):
        """Raise ValueError when no producer of this name and epoch can have left this content."""
        cdef Header* header = self.header
        cdef Descriptor* block
        cdef Run* run
        cdef uint64_t index, position, k
        cdef uint64_t size = _arena_size(<uint64_t>self.memory.shape[0])
        _check_header(header, <uint64_t>self.memory.shape[0], name, epoch)
        if header.tail > header.head or header.head - header.tail > DESCRIPTORS:
            raise ValueError(f"ring: its blocks cannot be {header.tail} to {header.head}")
        for k in range(self._oldest_run(), header.n_runs):
            run = &self.file.runs[k % RUNS]
            if run.n_required > <uint32_t>MAX_REQUIRED or run.first > header.head or not 1 <= run.row_size <= 4096:
                raise ValueError(f"ring: the entry of run {run.run} is damaged")
        position = 0
        for index in range(header.tail, header.head):
            block = &self.descriptors[index % DESCRIPTORS]
            if (block.start < position or block.end <= block.start or block.end - block.start > size or block.end > 1 << 62
                    or block.start % size + (block.end - block.start) > size
                    or <uint64_t>block.payload + block.header > block.end - block.start or not BLOCK <= block.kind <= END):
                raise ValueError(f"ring: block {index} is damaged")
            position = block.end
        # The next block comes after the last one, also when that is freed.
        if header.head and self.descriptors[(header.head - 1) % DESCRIPTORS].end > 1 << 62:
            raise ValueError(f"ring: block {header.head - 1} is damaged")
        if header.head > header.tail and position - self.descriptors[header.tail % DESCRIPTORS].start > size:
            raise ValueError("ring: its blocks overlap")

    cdef uint64_t _oldest_run(self) noexcept:
        # A killed producer may have half overwritten the entry before these.
        return self.header.n_runs - min(self.header.n_runs, <uint64_t>(RUNS - 1))

    cdef _restore(self):
        """Derive all fields that are not written by a single store, to continue where the producer died."""
        cdef Header* header = self.header
        cdef Checkpoint* newest = &self.file.checkpoints[header.n_checkpoints % 2]
        cdef Descriptor* last = NULL
        cdef uint64_t index, size = header.arena_size
        self.run = &self.file.runs[(header.n_runs - 1) % RUNS] if header.n_runs else &self.file.runs[0]
        header.head_position = header.sequence = header.first_packet = 0
        header.open_capacity = header.open_rows = 0
        if header.head:
            last = &self.descriptors[(header.head - 1) % DESCRIPTORS]
            header.head_position = last.end
            if header.head > self.run.first:
                header.sequence = last.sequence + 1
                header.first_packet = last.first_packet + last.rows
        header.tail_position = header.head_position
        if header.head > header.tail:
            header.tail_position = self.descriptors[header.tail % DESCRIPTORS].start
        self._claim(header.tail_position + size)  # memory without blocks may have been given back to the system
        if newest.head > header.head:
            raise ValueError("ring: its checkpoint is newer than its blocks")
        memcpy(&self.file.counts[0], &newest.counts[0], COUNTS_SIZE)
        # Also of blocks that were freed since: their descriptors are still there.
        for index in range(max(newest.head, header.head - min(header.head, <uint64_t>DESCRIPTORS)), header.head):
            if self.descriptors[index % DESCRIPTORS].kind == INFO:
                (<uint64_t*>&self.file.counts[0])[INFO_ROWS] += self.descriptors[index % DESCRIPTORS].rows
        if newest.head < header.head:  # the header of a later block has reported the gaps
            memset(&self.file.gaps[0], 0, GAPS_SIZE)
            return
        memcpy(&self.file.gaps[0], &newest.gaps[0], GAPS_SIZE)
        if not newest.open_rows:
            return
        if (newest.open_start < header.head_position or newest.open_rows > size
                or newest.open_start % size + newest.open_rows * self.run.row_size + HEADER_ROOM > size
                or newest.open_start + newest.open_rows * self.run.row_size - header.tail_position > size):
            raise ValueError("ring: its open block is damaged")
        header.open_start = newest.open_start
        header.open_rows = header.open_capacity = newest.open_rows
        header.open_first_ns = newest.open_first_ns

    # State

    @property
    def epoch(self) -> int:
        return self.header.epoch

    @property
    def made_ns(self) -> int:
        return self.header.made_ns

    @property
    def alive_ns(self) -> int:
        return self.header.alive_ns

    def mark_alive(self, uint64_t now_ns):
        """Note the time (wall clock) of a turn of the producer's loop."""
        self.header.alive_ns = now_ns

    @property
    def run_open(self) -> bool:
        """Whether the newest run has no end record yet."""
        if not self.header.n_runs:
            return False
        return self.header.head == self.run.first or self.descriptors[(self.header.head - 1) % DESCRIPTORS].kind != END

    cdef uint64_t _end(self) noexcept:
        """Return the position after all blocks, the open block with its whole capacity included."""
        if self.header.open_capacity:
            return self.header.open_start + self.header.open_capacity * self.run.row_size + HEADER_ROOM
        return self.header.head_position

    @property
    def position(self) -> int:
        """Position after the last closed block. Bytes before it do not change any more."""
        return self.header.head_position

    def used_ranges(self, uint64_t after=0):
        """Return (offset in the memory, bytes) of the header and of all blocks from position `after` on, the open one too."""
        cdef uint64_t size = self.header.arena_size
        cdef uint64_t start = max(after, self.header.tail_position)
        cdef uint64_t first = start % size
        cdef uint64_t length = min(self._end() - min(start, self._end()), size)
        cdef uint64_t straight = min(length, size - first)
        ranges = [(0, _OVERHEAD), (_OVERHEAD + first, straight), (_OVERHEAD, length - straight)]
        return [piece for piece in ranges if piece[1]]

    def unused_ranges(self):
        """Return (offset in the memory, bytes) of the parts of the arena without blocks."""
        cdef uint64_t size = self.header.arena_size
        cdef uint64_t first = self.header.tail_position % size
        cdef uint64_t length = min(self._end() - self.header.tail_position, size)
        cdef uint64_t straight = min(length, size - first)
        ranges = [(_OVERHEAD + first + straight, size - first - straight),
                  (_OVERHEAD + length - straight, first - (length - straight))]
        return [piece for piece in ranges if piece[1]]

    def runs(self):
        """Return the runs that may have blocks in the ring, oldest first.

        Each is (run, first descriptor, layout, bytes per row, unix ns of its beginning, io_groups, required storages, first
        descriptor that each storage has not acknowledged).
        """
        cdef uint64_t k
        cdef int i
        cdef Run* run
        entries = []
        for k in range(self._oldest_run(), self.header.n_runs):
            run = &self.file.runs[k % RUNS]
            io_groups = [i for i in range(IO_GROUPS) if run.io_groups[i // 8] >> (i % 8) & 1]
            names = [bytes(run.required[i * NAME_BYTES:(i + 1) * NAME_BYTES]).rstrip(b"\0").decode("utf-8", "replace")
                     for i in range(<int>run.n_required)]
            entries.append((run.run, run.first, run.layout, run.row_size, run.began_ns, io_groups, names,
                            [run.acknowledged[i] for i in range(<int>run.n_required)]))
        return entries

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
        """Used share, 0 to 1, of the bytes or of the descriptors, whichever is larger."""
        cdef double room = self.header.arena_size - self.reserved
        return max((self.header.head_position - self.header.tail_position) / room,
                   (self.header.head - self.header.tail) / <double>(DESCRIPTORS - RESERVED_DESCRIPTORS))

    def nearly_full(self, uint64_t after) -> bool:
        """Whether less than a quarter, or less than two blocks, would be free without the blocks below `after`."""
        cdef uint64_t room = self.header.arena_size - self.reserved
        cdef uint64_t tail = self.header.tail_position
        if self.header.tail < after <= self.header.head:
            tail = self.descriptors[(after - 1) % DESCRIPTORS].end
        cdef uint64_t margin = max(room // 4, 2 * (HEADER_ROOM + <uint64_t>16384 * self.run.row_size))
        return (self.header.head_position - tail + margin > room
                or self.header.head - max(after, self.header.tail) > <uint64_t>(DESCRIPTORS - DESCRIPTORS // 4))

    # Runs

    def begin(self, uint64_t run, uint32_t layout, uint32_t row_size, required, io_groups=(), uint64_t now_ns=0):
        """Begin a run: sequence, row index and counters are 0. The previous run must have its end record."""
        cdef Py_ssize_t i
        groups = [checked_byte("io_group", io_group) for io_group in io_groups]
        names = [name.encode() for name in required]
        if len(names) > MAX_REQUIRED or any(len(name) > NAME_BYTES for name in names):
            raise ValueError(f"ring: expected at most {MAX_REQUIRED} storages with names of at most {NAME_BYTES} bytes, "
                             f"found {list(required)}")
        if self.header.open_rows:
            raise ValueError(f"ring: run {run} begins while a block of run {self.run.run} is open")
        cdef uint64_t n = self.header.n_runs
        if n >= <uint64_t>(RUNS - 1) and self.file.runs[(n + 2) % RUNS].first > self.header.tail:
            raise ValueError(f"ring: blocks of {RUNS - 1} runs still wait for storages")
        cdef Run* entry = &self.file.runs[n % RUNS]
        self.header.open_capacity = 0
        self.counts[:] = 0
        self.gaps[:] = 0
        self.checkpoint()
        memset(entry, 0, sizeof(Run))
        for i, name in enumerate(names):
            memcpy(entry.required + i * NAME_BYTES, <const char*><bytes>name, len(name))
        for i in groups:
            entry.io_groups[i // 8] |= <uint8_t>(1 << (i % 8))
        for i in range(len(names)):
            entry.acknowledged[i] = self.header.head
        entry.run = run
        entry.n_required = len(names)
        entry.first = self.header.head
        entry.layout = layout
        entry.row_size = row_size
        entry.began_ns = now_ns
        self.header.sequence = 0
        self.header.first_packet = 0
        self.run = entry
        store_release(&self.header.n_runs, n + 1)

    cdef Run* _entry(self, uint64_t run) except NULL:
        cdef uint64_t k
        for k in range(self._oldest_run(), self.header.n_runs):
            if self.file.runs[k % RUNS].run == run:
                return &self.file.runs[k % RUNS]
        raise IndexError(f"ring: no run {run}")

    def acknowledge(self, uint64_t run, Py_ssize_t storage, uint64_t position):
        """Note for a successor the first descriptor that a storage (its index in `required`) has not acknowledged."""
        cdef Run* entry = self._entry(run)
        if not 0 <= storage < <Py_ssize_t>entry.n_required:
            raise IndexError(f"ring: storage {storage} of {entry.n_required}")
        store_release(&entry.acknowledged[storage], position)

    def release(self, uint64_t run):
        """Note that no storage needs the run any more."""
        self._entry(run).n_required = 0

    # Blocks

    cdef uint64_t _room(self, uint64_t needed, bint use_reserve) noexcept:
        """Return the contiguous free bytes at the head, at least `needed`, or 0. Skips the arena's end if necessary."""
        cdef uint64_t size = self.header.arena_size
        cdef uint64_t limit = size if use_reserve else size - self.reserved
        cdef uint64_t used = self.header.head_position - self.header.tail_position
        cdef uint64_t straight = size - self.header.head_position % size
        if self.header.head - self.header.tail >= <uint64_t>(DESCRIPTORS - (1 if use_reserve else RESERVED_DESCRIPTORS)):
            return 0
        if straight < needed:
            if used + straight + needed > limit:
                return 0
            self.header.head_position += straight
            used += straight
            straight = size
        if used + needed > limit:
            return 0
        return min(straight, limit - used)

    cdef void _claim(self, uint64_t position) noexcept:
        """Announce to readers that bytes up to this position will be written, over those one arena size below."""
        if position > self.header.claimed:
            store_release(&self.header.claimed, position)
            fence()

    def rows(self, uint64_t now_ns, uint32_t most):
        """Return the free rows of the open block as writable bytes, or None when the ring is full.

        Opens a block of up to `most` rows when none is open.
        """
        cdef uint64_t room, start
        cdef uint64_t size = self.run.row_size
        if not self.header.open_capacity:
            if not size:
                raise ValueError("ring: no run was begun")
            room = self._room(HEADER_ROOM + MIN_ROWS_AT_END * size, False)
            if not room:
                return None
            self.header.open_start = self.header.head_position
            self.header.open_rows = 0
            self.header.open_capacity = min(<uint64_t>most, (room - HEADER_ROOM) // size)
            self._claim(self.header.open_start + self.header.open_capacity * size + HEADER_ROOM)
        if not self.header.open_rows:
            self.header.open_first_ns = now_ns
        start = self.header.open_start % self.header.arena_size
        return self.writable[start + self.header.open_rows * size:start + self.header.open_capacity * size]

    def publish(self, uint64_t n):
        """Add the next n rows, which have been written, to the open block. Returns True when it is full."""
        if n > self.header.open_capacity - self.header.open_rows:
            raise ValueError(f"ring: {n} rows published, room for {self.header.open_capacity - self.header.open_rows}")
        self.header.open_rows += n
        self.checkpoint()
        return self.header.open_rows == self.header.open_capacity

    def checkpoint(self):
        """Save counters, gaps and the open block's rows together for a successor. Copies 51 kB in the cache: 1 to 2 us."""
        cdef uint64_t n = self.header.n_checkpoints + 1
        cdef Checkpoint* newest = &self.file.checkpoints[n % 2]
        newest.head = self.header.head
        newest.open_start = self.header.open_start
        newest.open_rows = self.header.open_rows
        newest.open_first_ns = self.header.open_first_ns
        memcpy(&newest.gaps[0], &self.file.gaps[0], GAPS_SIZE)
        memcpy(&newest.counts[0], &self.file.counts[0], COUNTS_SIZE)
        store_release(&self.header.n_checkpoints, n)

    def open_payload(self):
        """Return the rows of the open block so far as read-only bytes."""
        cdef uint64_t start = self.header.open_start % self.header.arena_size
        return self.readable[start:start + self.header.open_rows * self.run.row_size]

    def close_block(self, uint64_t now_ns, uint32_t crc32):
        """Publish the open block, whose last row came at `now_ns`. `crc32`: of open_payload().

        Its header is that of a stream.Block, with the totals of the run's io_groups and the gaps, which are then reported. It is
        packed here, because a producer closes a thousand blocks a second.
        """
        cdef uint64_t rows = self.header.open_rows, size = rows * self.run.row_size
        if not self.header.open_capacity or not rows:
            raise ValueError(f"ring: a block of {rows} rows cannot be closed")
        cdef uint8_t* header = self.arena + self.header.open_start % self.header.arena_size + size
        cdef uint8_t* end = self._pack_header(header, rows, now_ns, crc32)
        self._push(BLOCK, self.header.open_start, size, rows, <uint64_t>(end - header))
        memset(&self.file.gaps[0], 0, GAPS_SIZE)

    cdef uint8_t* _pack_header(self, uint8_t* out, uint64_t rows, uint64_t now_ns, uint32_t crc32) noexcept:
        """Write the header of the open block, in the format of stream.pack(Block(...)). Returns the place after it.

        It takes less than HEADER_ROOM also with 256 io_groups.
        """
        cdef const uint64_t* counts
        cdef const uint64_t* gap
        cdef uint32_t n_groups = 0, n_gaps = 0
        cdef int i
        for i in range(IO_GROUPS):
            n_groups += self.run.io_groups[i // 8] >> (i % 8) & 1
            n_gaps += (<const uint64_t*>&self.file.gaps[0])[3 * i] != 0
        out[0] = BLOCK_TAG
        out = _pack_array(out + 1, 1 + BLOCK_FIELDS)
        out = _pack_uint(out, BLOCK_TAG)
        out = _pack_uint(out, self.run.run)
        out = _pack_text(out, self.header.producer, self.name_size)
        out = _pack_uint(out, self.header.epoch)
        out = _pack_uint(out, self.header.sequence)
        out = _pack_uint(out, self.header.first_packet)
        out = _pack_uint(out, rows)
        out = _pack_uint(out, self.run.layout)
        out = _pack_uint(out, 0)  # flags
        out = _pack_uint(out, self.header.open_first_ns)
        out = _pack_uint(out, now_ns)
        out = _pack_uint(out, crc32)
        out = _pack_array(out, n_groups)
        for i in range(IO_GROUPS):
            if self.run.io_groups[i // 8] >> (i % 8) & 1:
                counts = <const uint64_t*>&self.file.counts[0] + i * N_COUNTS
                out = _pack_array(out, 6)
                out = _pack_uint(out, i)
                out = _pack_uint(out, counts[PACKETS])
                out = _pack_uint(out, counts[WORD_ROWS] + counts[TIME_ROWS] + counts[INFO_ROWS] + counts[SENT_ROWS])
                out = _pack_uint(out, counts[BAD_PARITY])
                out = _pack_uint(out, counts[UNKNOWN_WORDS] + counts[REJECTED_WORDS])
                out = _pack_uint(out, counts[DROPPED])
        out = _pack_array(out, n_gaps)
        for i in range(IO_GROUPS):
            gap = <const uint64_t*>&self.file.gaps[0] + 3 * i
            if gap[0]:
                out = _pack_array(out, 4)
                out = _pack_uint(out, i)
                out = _pack_uint(out, gap[0])
                out = _pack_uint(out, gap[1])
                out = _pack_uint(out, gap[2])
        out[0] = out[1] = NIL  # text, configs
        return out + 2

    def append(self, int kind, payload, uint32_t rows, bytes header):
        """Add INFO rows, or the end record (without rows), as a block of its own. No block may be open.

        May use the reserve for them; returns False when that is used up, too.
        """
        cdef const uint8_t[::1] view = payload
        cdef uint64_t size = <uint64_t>view.shape[0]
        if self.header.open_rows:
            raise ValueError("ring: a block is open")
        if size != <uint64_t>rows * self.run.row_size:
            raise ValueError(f"ring: {rows} rows of {self.run.row_size} bytes expected, found {size} bytes")
        if not self._room(_aligned(size + len(header)), True):
            return False
        self._claim(self.header.head_position + size + len(header))
        if size:
            memcpy(self.arena + self.header.head_position % self.header.arena_size, &view[0], size)
        memcpy(self.arena + self.header.head_position % self.header.arena_size + size, <const char*>header, len(header))
        self._push(kind, self.header.head_position, size, rows, len(header))
        return True

    cdef void _push(self, int kind, uint64_t start, uint64_t size, uint64_t rows, uint64_t header) noexcept:
        """Publish a block whose rows, `size` bytes, and packed header, `header` bytes, are in the arena."""
        cdef Descriptor* block = &self.descriptors[self.header.head % DESCRIPTORS]
        fence()  # a Reader that sees this slot change must see the head with which that begins
        block.start = start
        block.end = _aligned(start + size + header)
        block.run = self.run.run
        block.sequence = self.header.sequence
        block.payload = <uint32_t>size
        block.header = <uint32_t>header
        block.rows = <uint32_t>rows
        block.kind = <uint8_t>kind
        block.layout = <uint8_t>self.run.layout
        block.first_packet = self.header.first_packet
        store_release(&self.header.head, self.header.head + 1)
        self.header.open_capacity = 0
        self.header.open_rows = 0
        self.header.head_position = block.end
        self.header.sequence += 1
        self.header.first_packet += rows

    cdef Descriptor* _descriptor(self, uint64_t index) except NULL:
        if not self.header.tail <= index < self.header.head:
            raise IndexError(f"ring: block {index} of {self.header.tail} to {self.header.head}")
        return &self.descriptors[index % DESCRIPTORS]

    def kind(self, uint64_t index) -> int:
        return self._descriptor(index).kind

    def payload(self, uint64_t index):
        """Return the rows of a block as read-only bytes, valid until the tail moves over it."""
        cdef Descriptor* block = self._descriptor(index)
        cdef uint64_t start = block.start % self.header.arena_size
        return self.readable[start:start + block.payload]

    def packed_header(self, uint64_t index) -> bytes:
        cdef Descriptor* block = self._descriptor(index)
        cdef uint8_t* header = self.arena + block.start % self.header.arena_size + block.payload
        return header[:block.header]

    def free_to(self, uint64_t index):
        """Free all blocks below `index`."""
        if not self.header.tail <= index <= self.header.head:
            raise IndexError(f"ring: cannot free to {index}: blocks are {self.header.tail} to {self.header.head}")
        if index == self.header.tail:
            return
        cdef uint64_t position = self.descriptors[(index - 1) % DESCRIPTORS].end
        self.header.tail_position = position
        store_release(&self.header.tail, index)


@cython.final
cdef class Reader:
    """Reads the blocks of a live producer's ring, which is mapped in this process.

    A block for a required storage stays until the storage acknowledges it, unless the producer has given the storage up. Other
    blocks may be overwritten at any moment. ValueError when the memory does not hold the ring of this producer and epoch.
    """

    cdef const uint8_t[::1] memory
    cdef object readable        # the arena
    cdef const Head* file
    cdef uint64_t size

    def __cinit__(self, const uint8_t[::1] memory, *, str producer, uint64_t epoch):
        if memory.shape[0] < <Py_ssize_t>_SMALLEST:
            raise ValueError(f"ring: expected at least {SMALLEST} bytes, found {memory.shape[0]}")
        self.memory = memory
        self.file = <const Head*>&memory[0]
        self.readable = memoryview(memory)[_OVERHEAD:]
        self.size = _arena_size(<uint64_t>memory.shape[0])
        _check_header(&self.file.header, <uint64_t>memory.shape[0], producer.encode(), epoch)

    def view(self, uint64_t index):
        """Return the rows of block `index` in the ring as read-only bytes, or None when they are not there."""
        cdef Descriptor block = self.file.descriptors[index % DESCRIPTORS]
        fence()
        if not self._intact(index, block.start) or block.start % self.size + block.payload > self.size:
            return None
        return self.readable[block.start % self.size:block.start % self.size + block.payload]

    def read(self, uint64_t index):
        """Return a copy of the rows of block `index`, or None when they are not there or were overwritten meanwhile."""
        cdef uint64_t start = self.file.descriptors[index % DESCRIPTORS].start
        rows = self.view(index)
        if rows is None:
            return None
        copy = bytes(rows)
        fence()
        return copy if self._intact(index, start) else None

    cdef bint _intact(self, uint64_t index, uint64_t start) noexcept nogil:
        """Whether block `index`, which begins at this position, is published and not overwritten."""
        cdef uint64_t head = load_acquire(&self.file.header.head)
        # A descriptor's slot is used again before the head moves over it.
        return index < head < index + DESCRIPTORS and load_acquire(&self.file.header.claimed) <= start + self.size
