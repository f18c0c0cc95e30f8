"""Pack rows into HDF5 chunks with byte shuffle and deflate, make rows of shuffled bytes, and count rows by kind."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

cimport cython
from deflate cimport KeptCode, deflate, deflated_most, tokens_room
from row_structs cimport Row10, Row24, Row24Clock64, Row30

#: Columns of the counters of tally(); the first six are counters of the ledger (larpixdaq.constants.Count).
TALLY = ("word_rows", "packets", "bad_parity", "time_rows", "info_rows", "sent_rows", "other_rows")

cdef enum:
    T_WORD_ROWS
    T_PACKETS
    T_BAD_PARITY
    T_TIME_ROWS
    T_INFO_ROWS
    T_SENT_ROWS
    T_OTHER_ROWS
    N_TALLY

cdef enum:
    # Bits of io_group and packet_type in the first four bytes of a row, in either byte order.
    GROUP_AND_TYPE = 0xFF0000FF
    # Bytes between two planes, because a chunk has 2^n rows, and planes exactly 2^n bytes apart share lines of the
    # first-level cache.
    PLANE_GAP = 64
    # Bytes of a gathered row.
    WIDEST = 4096

cdef uint64_t ALL_CHOSEN = 0x0101010101010101

ctypedef fused Row:
    Row24
    Row24Clock64
    Row30


cdef extern from *:
    """
    typedef uint8_t Bytes16 __attribute__((vector_size(16)));
    #ifdef __clang__
    #define INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
    #else
    #define INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, (Bytes16){__VA_ARGS__})
    #endif

    /* Transpose 16 bytes of 16 rows, which are `row` bytes apart, into 16 columns, `column` bytes apart. Interleaves rows i
       and i + 8 four times; each time rotates the bits of each byte's index in the square by one. */
    static inline void interleave16(const Bytes16* a, Bytes16* b) {
        _Pragma("GCC unroll 8")
        for (int i = 0; i < 8; i++) {
            b[2 * i] = INTERLEAVE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = INTERLEAVE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
    static inline void transpose16(const uint8_t* source, size_t row, uint8_t* out, size_t column) {
        Bytes16 a[16], b[16];
        _Pragma("GCC unroll 16")
        for (int i = 0; i < 16; i++) memcpy(&a[i], source + i * row, 16);
        interleave16(a, b);
        interleave16(b, a);
        interleave16(a, b);
        interleave16(b, a);
        _Pragma("GCC unroll 16")
        for (int i = 0; i < 16; i++) memcpy(out + i * column, &a[i], 16);
    }

    /* The same from 16 planes anywhere: bytes `first` to `first` + 15 of each become a column of 16 rows, `row` bytes apart.
       The rows are written in order, so that a row may overlap with the unused end of the row before. */
    static inline void gather16(const uint8_t* const* planes, size_t first, uint8_t* out, size_t row) {
        Bytes16 a[16], b[16];
        _Pragma("GCC unroll 16")
        for (int i = 0; i < 16; i++) memcpy(&a[i], planes[i] + first, 16);
        interleave16(a, b);
        interleave16(b, a);
        interleave16(a, b);
        interleave16(b, a);
        _Pragma("GCC unroll 16")
        for (int i = 0; i < 16; i++) memcpy(out + i * row, &a[i], 16);
    }
    """
    void transpose16(const uint8_t* source, size_t row, uint8_t* out, size_t column) noexcept nogil
    void gather16(const uint8_t* const* planes, size_t first, uint8_t* out, size_t row) noexcept nogil


cdef void shuffle_rows(const uint8_t* source, uint8_t* out, size_t size, size_t rows, size_t stride) noexcept nogil:
    """Copy byte i of each row to plane i. Planes are `stride` bytes apart."""
    cdef size_t even = rows - rows % 16 if size >= 16 else 0
    cdef size_t row, column
    for row in range(0, even, 16):
        column = 0
        while column < size:
            column = min(column, size - 16)     # the last 16 columns may overlap: written twice, with equal bytes
            transpose16(source + row * size + column, size, out + column * stride + row, stride)
            column += 16
    for row in range(even, rows):
        for column in range(size):
            out[column * stride + row] = source[row * size + column]


cdef size_t gather_rows(
    const uint8_t** planes, size_t size, size_t rows, const uint8_t* chosen, uint8_t* out, size_t room
) noexcept nogil:
    """Write the chosen rows (NULL: all), whose bytes are in `size` planes; return their number. `out` has `room` bytes.

    Bytes of 64 rows are copied first, because planes 2^n bytes apart share lines of the first-level cache.
    """
    cdef uint8_t[64 * 256] lines
    cdef const uint8_t* places[256]
    cdef uint8_t[16 * 256] square       # 16 rows, when not all of them are chosen or there is no room behind them
    cdef size_t even = rows - rows % 64 if size <= 256 else 0
    cdef size_t wide = max(size, <size_t>16)
    cdef size_t row, part, column, i, step, made = 0
    cdef uint8_t* to
    cdef uint64_t low, high
    cdef bint whole
    for column in range(256):           # 16 planes at least, the last ones unused if `size` is smaller
        places[column] = lines + 64 * (column if column < size else 0)
    for row in range(0, even, 64):
        if chosen != NULL and not any_of_64(chosen + row):
            continue
        for column in range(size):
            memcpy(lines + 64 * column, planes[column] + row, 64)
        for part in range(0, 64, 16):
            whole = True
            if chosen != NULL:
                memcpy(&low, chosen + row + part, 8)
                memcpy(&high, chosen + row + part + 8, 8)
                if not low | high:
                    continue
                whole = low == ALL_CHOSEN and high == ALL_CHOSEN
            whole = whole and (made + 15) * size + wide <= room
            to = out + made * size if whole else square
            step = size if whole else wide
            column = 0
            while True:
                gather16(places + column, part, to + column, step)
                column += 16
                if column >= size:
                    break
                column = min(column, size - 16)     # the last 16 may overlap: written twice, with equal bytes
            if whole:
                made += 16
                continue
            for i in range(16):
                if chosen == NULL or chosen[row + part + i]:
                    memcpy(out + made * size, square + i * wide, size)
                    made += 1
    for row in range(even, rows):
        if chosen == NULL or chosen[row]:
            for column in range(size):
                out[made * size + column] = planes[column][row]
            made += 1
    return made


cdef inline bint any_of_64(const uint8_t* chosen) noexcept nogil:
    cdef uint64_t[8] words
    memcpy(words, chosen, 64)
    return (words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]) != 0


def gather(
    const uint8_t[::1] planes, size_t rows, const int32_t[::1] columns, uint8_t[::1] out,
    const uint8_t[::1] chosen=None,
):
    cdef const uint8_t* places[WIDEST]
    cdef const uint8_t* wanted = NULL
    cdef size_t size = columns.shape[0], n = rows, i, made = 0
    if not rows or not 1 <= size <= WIDEST or <size_t>planes.shape[0] % rows:
        raise ValueError(f"gather: {planes.shape[0]} bytes of planes of {rows} rows, {size} bytes of a row are wanted")
    if chosen is not None:
        if <size_t>chosen.shape[0] != rows:
            raise ValueError(f"gather: {rows} rows, {chosen.shape[0]} of them are chosen or not")
        n = 0
        wanted = &chosen[0]
        for i in range(rows):
            n += wanted[i] != 0
    if <size_t>out.shape[0] < n * size:
        raise ValueError(f"gather: {n} rows of {size} bytes are chosen, there is room for {out.shape[0]} bytes")
    for i in range(size):
        if not 0 <= columns[i] < <Py_ssize_t>(<size_t>planes.shape[0] // rows):
            raise ValueError(f"gather: plane {columns[i]} of {<size_t>planes.shape[0] // rows}")
        places[i] = &planes[0] + columns[i] * rows
    if n:
        with nogil:
            made = gather_rows(places, size, rows, wanted, &out[0], <size_t>out.shape[0])
    return made


@cython.final
cdef class Packer:
    """Shuffles and deflates up to `rows` rows of `itemsize` bytes. The interface is documented in hdf5_chunks.pyi."""

    cdef uint8_t* planes
    cdef uint8_t* packed
    cdef uint16_t* tokens
    cdef KeptCode* kept
    cdef size_t itemsize
    cdef size_t rows

    def __cinit__(self, size_t rows, size_t itemsize):
        if not 1 <= rows <= 1 << 24 or not 1 <= itemsize <= 1 << 12:
            raise ValueError(f"Packer: expected 1 to 2^24 rows of 1 to 4096 bytes, found {rows} of {itemsize}")
        self.rows, self.itemsize = rows, itemsize
        self.planes = <uint8_t*>malloc((rows + PLANE_GAP) * itemsize)
        self.packed = <uint8_t*>malloc(deflated_most(itemsize, rows))
        self.tokens = <uint16_t*>malloc(tokens_room(itemsize, rows) * sizeof(uint16_t))
        self.kept = <KeptCode*>calloc(itemsize, sizeof(KeptCode))
        if self.planes == NULL or self.packed == NULL or self.tokens == NULL or self.kept == NULL:
            raise MemoryError("Packer: no memory for a chunk")

    def __dealloc__(self):
        free(self.planes)
        free(self.packed)
        free(self.tokens)
        free(self.kept)

    def pack(self, const uint8_t[::1] chunk) -> bytes:
        cdef size_t n, rows = <size_t>chunk.shape[0] // self.itemsize
        if not 1 <= rows <= self.rows or <size_t>chunk.shape[0] % self.itemsize:
            raise ValueError(
                f"pack: expected 1 to {self.rows} rows of {self.itemsize} bytes, found {chunk.shape[0]} bytes"
            )
        with nogil:
            shuffle_rows(&chunk[0], self.planes, self.itemsize, rows, rows + PLANE_GAP)
            n = deflate(self.planes, self.itemsize, rows, rows + PLANE_GAP, self.tokens, self.kept, self.packed)
        return self.packed[:n]


cdef inline void count_row(uint64_t* counts, uint8_t kind, uint8_t direction, uint8_t valid) noexcept nogil:
    if kind <= 3:
        if direction == 1:
            counts[T_WORD_ROWS] += 1
            counts[T_PACKETS] += 1
            counts[T_BAD_PARITY] += valid == 0
        else:
            counts[T_SENT_ROWS] += 1
    elif kind == 4:
        counts[T_TIME_ROWS] += 1
    elif kind == 5:
        counts[T_INFO_ROWS] += 1
    elif kind <= 7:
        counts[T_WORD_ROWS] += 1
    else:
        counts[T_OTHER_ROWS] += 1


cdef void tally_rows(const Row* rows, size_t n, uint64_t* counts) noexcept nogil:
    """Count rows. Received packets of the same type and io_group, which come in long runs, are counted together."""
    cdef size_t i = 0, first
    cdef uint32_t head, other
    cdef uint64_t bad
    cdef uint64_t* line
    while i < n:
        line = counts + rows[i].io_group * N_TALLY
        if rows[i].packet_type > 3 or rows[i].direction != 1:
            count_row(line, rows[i].packet_type, rows[i].direction, rows[i].valid_parity)
            i += 1
            continue
        memcpy(&head, &rows[i], 4)
        head &= GROUP_AND_TYPE
        first, bad = i, 0
        while True:
            bad += rows[i].valid_parity == 0
            i += 1
            if i == n:
                break
            memcpy(&other, &rows[i], 4)
            if other & GROUP_AND_TYPE != head or rows[i].direction != 1:
                break
        line[T_WORD_ROWS] += i - first
        line[T_PACKETS] += i - first
        line[T_BAD_PARITY] += bad


cdef void tally_rows10(const Row10* rows, size_t n, uint64_t* counts) noexcept nogil:
    """Count rows of layout 1.0, which has the io_group only in the text of chip_key ("1-2-246"); without it under 0."""
    cdef size_t i, j
    cdef unsigned int group, digit
    for i in range(n):
        group = 0
        for j in range(3):
            digit = <unsigned int> <uint8_t> rows[i].chip_key[j] - 48
            if digit > 9:
                break
            group = group * 10 + digit
        count_row(counts + (group & 0xFF) * N_TALLY, rows[i].type, rows[i].direction, rows[i].valid_parity)


def tally(const uint8_t[::1] rows, int layout, uint64_t[:, ::1] counts):
    cdef size_t size
    if layout == 1:
        size = sizeof(Row10)
    elif layout == 2:
        size = sizeof(Row24)
    elif layout == 3:
        size = sizeof(Row24Clock64)
    elif layout == 4:
        size = sizeof(Row30)
    else:
        raise ValueError(f"tally: unknown layout code {layout}")
    if counts.shape[0] != 256 or counts.shape[1] != N_TALLY:
        raise ValueError(
            f"tally: expected counts of shape (256, {<int> N_TALLY}), found ({counts.shape[0]}, {counts.shape[1]})"
        )
    cdef size_t total = rows.shape[0]
    if total % size:
        raise ValueError(f"tally: {total} bytes are no whole number of rows of {size} bytes")
    if total == 0:
        return
    cdef const uint8_t* first = &rows[0]
    cdef uint64_t* out = &counts[0, 0]
    cdef size_t n = total // size
    with nogil:
        if layout == 1:
            tally_rows10(<const Row10*> first, n, out)
        elif layout == 2:
            tally_rows[Row24](<const Row24*> first, n, out)
        elif layout == 3:
            tally_rows[Row24Clock64](<const Row24Clock64*> first, n, out)
        else:
            tally_rows[Row30](<const Row30*> first, n, out)
