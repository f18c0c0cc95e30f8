"""What a chunk of the file needs: the byte shuffle that HDF5's filter undoes, and the count of its rows by kind."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from wire cimport Row10, Row24, Row24Clock64, Row30

#: Columns of the counts that tally() adds to; the first six are the ledger's own (larpixdaq.schema.COUNTS).
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
    # Rows that are shuffled together: 128 rows of 56 bytes and their place in the output stay in the first-level cache.
    TILE = 128

ctypedef fused Row:
    Row24
    Row24Clock64
    Row30


# Rows of 8 bytes each, little-endian, become columns: byte j of word i goes to byte i of word j. Three rounds of swaps
# (4-byte, 2-byte, 1-byte halves) on registers are twice as fast as 64 single bytes.
cdef inline void transpose8(uint64_t* w) noexcept nogil:
    cdef uint64_t t
    cdef int i, j
    for i in range(4):
        t = ((w[i] >> 32) ^ w[i + 4]) & <uint64_t> 0x00000000FFFFFFFFu
        w[i + 4] ^= t
        w[i] ^= t << 32
    for j in range(0, 8, 4):
        for i in range(j, j + 2):
            t = ((w[i] >> 16) ^ w[i + 2]) & <uint64_t> 0x0000FFFF0000FFFFu
            w[i + 2] ^= t
            w[i] ^= t << 16
    for i in range(0, 8, 2):
        t = ((w[i] >> 8) ^ w[i + 1]) & <uint64_t> 0x00FF00FF00FF00FFu
        w[i + 1] ^= t
        w[i] ^= t << 8


cdef void shuffle_tile(const uint8_t* source, uint8_t* out, size_t first, size_t last, size_t size, size_t rows) noexcept nogil:
    """Rows first to last (a multiple of 8 of them) of `rows` rows of `size` bytes."""
    cdef uint64_t w[8]
    cdef size_t column, row, i
    for column in range(0, size - size % 8, 8):
        for row in range(first, last, 8):
            for i in range(8):
                memcpy(&w[i], source + (row + i) * size + column, 8)
            transpose8(w)
            for i in range(8):
                memcpy(out + (column + i) * rows + row, &w[i], 8)
    for column in range(size - size % 8, size):
        for row in range(first, last):
            out[column * rows + row] = source[row * size + column]


cdef void shuffle_rows(const uint8_t* source, uint8_t* out, size_t size, size_t rows) noexcept nogil:
    cdef size_t even = rows - rows % 8
    cdef size_t first = 0
    cdef size_t row, column
    while first < even:
        shuffle_tile(source, out, first, min(first + TILE, even), size, rows)
        first += TILE
    for row in range(even, rows):
        for column in range(size):
            out[column * rows + row] = source[row * size + column]


def shuffle(const uint8_t[::1] source, size_t itemsize, uint8_t[::1] out):
    """Write all first bytes of the items, then all second bytes, and so on: what HDF5's shuffle filter undoes.

    source: the items' bytes; itemsize: bytes of an item; out: as many bytes as source, elsewhere in memory.
    """
    cdef size_t total = source.shape[0]
    if itemsize < 1 or total % itemsize:
        raise ValueError(f"shuffle: {total} bytes are no whole number of items of {itemsize} bytes")
    if <size_t> out.shape[0] != total:
        raise ValueError(f"shuffle: expected room for {total} bytes, found {out.shape[0]}")
    if total == 0:
        return
    if &source[0] < &out[0] + total and &out[0] < &source[0] + total:
        raise ValueError("shuffle: input and output overlap")
    with nogil:
        shuffle_rows(&source[0], &out[0], itemsize, total // itemsize)


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
    cdef size_t i
    for i in range(n):
        count_row(counts + rows[i].io_group * N_TALLY, rows[i].packet_type, rows[i].direction, rows[i].valid_parity)


cdef void tally_rows10(const Row10* rows, size_t n, uint64_t* counts) noexcept nogil:
    """Layout 1.0 has the io_group in the text of chip_key only ("1-2-246"); without one the row is counted under 0."""
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
    """Add the rows to `counts`, shape (256, len(TALLY)), dtype u8: one line per io_group.

    rows: the bytes of rows of this layout (the code of larpixdaq.schema.LAYOUTS).
    """
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
        raise ValueError(f"tally: expected counts of shape (256, {<int> N_TALLY}), found ({counts.shape[0]}, {counts.shape[1]})")
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
