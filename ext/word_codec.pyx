"""Decode words of every chip generation into rows and back. The interface is documented in word_codec.pyi, the bits are in
row_codec.pxd.
"""

from libc.stdint cimport uint8_t, uint64_t, UINT32_MAX

import numpy as np

from row_codec cimport Row, row_type, row_word, with_odd_parity, word_mask, word_row
from row_structs cimport (
    KIND10, KIND24, KIND24_CLOCK64, Row10, Row24, Row24Clock64, Row30, Rows, V1, checked_asic, checked_byte, open_rows,
)


cdef Py_ssize_t decode_all(
    Row* rows, const uint64_t* words, Py_ssize_t n, int asic, uint8_t io_group, uint8_t io_channel, uint64_t receipt,
    uint8_t direction,
) noexcept nogil:
    cdef Py_ssize_t i, made = 0
    for i in range(n):
        if word_row(rows + made, words[i], asic, io_group, io_channel, receipt, direction) >= 0:
            made += 1
    return made


cdef Py_ssize_t encode_all(uint64_t* words, const Row* rows, Py_ssize_t n, int asic) noexcept nogil:
    cdef Py_ssize_t i, made = 0
    for i in range(n):
        if row_type(rows + i) < 4:
            words[made] = row_word(rows + i, asic)
            made += 1
    return made


def decode(const uint64_t[::1] words, rows, *, asic, io_group=0, io_channel=0, receipt=0, direction=1):
    cdef int chip = checked_asic(asic)
    cdef uint8_t group = checked_byte("io_group", io_group)
    cdef uint8_t channel = checked_byte("io_channel", io_channel)
    cdef Rows out = open_rows(rows, chip, True)
    cdef Py_ssize_t n = words.shape[0], made
    cdef uint64_t ticks
    cdef uint8_t way
    if direction not in (0, 1):
        raise ValueError(f"direction: expected 0 (sent) or 1 (received), found {direction!r}")
    if not 0 <= receipt <= (UINT32_MAX if out.kind == KIND24 else 2**64 - 1):
        raise ValueError(f"receipt: {receipt!r} does not fit the receipt_timestamp of these rows")
    if out.n < n:
        raise ValueError(f"rows: expected at least {n}, one for each word, found {out.n}")
    ticks = receipt
    way = direction
    if n == 0:
        return 0
    with nogil:
        if out.kind == KIND10:
            made = decode_all(<Row10*>out.at, &words[0], n, chip, group, channel, ticks, way)
        elif out.kind == KIND24:
            made = decode_all(<Row24*>out.at, &words[0], n, chip, group, channel, ticks, way)
        elif out.kind == KIND24_CLOCK64:
            made = decode_all(<Row24Clock64*>out.at, &words[0], n, chip, group, channel, ticks, way)
        else:
            made = decode_all(<Row30*>out.at, &words[0], n, chip, group, channel, ticks, way)
    return made


def encode(rows, *, asic):
    cdef int chip = checked_asic(asic)
    cdef Rows source = open_rows(rows, chip, False)
    cdef Py_ssize_t made
    array = np.empty(source.n, np.uint64)
    cdef uint64_t[::1] words = array
    if source.n == 0:
        return array
    with nogil:
        if source.kind == KIND10:
            made = encode_all(&words[0], <const Row10*>source.at, source.n, chip)
        elif source.kind == KIND24:
            made = encode_all(&words[0], <const Row24*>source.at, source.n, chip)
        elif source.kind == KIND24_CLOCK64:
            made = encode_all(&words[0], <const Row24Clock64*>source.at, source.n, chip)
        else:
            made = encode_all(&words[0], <const Row30*>source.at, source.n, chip)
    return array[:made]


def parity(const uint64_t[::1] words, *, asic):
    cdef int chip = checked_asic(asic)
    cdef int bit = 53 if chip == V1 else 63
    cdef uint64_t mask = word_mask(chip) & ~(<uint64_t>1 << bit)
    cdef Py_ssize_t i
    array = np.empty(words.shape[0], np.uint64)
    cdef uint64_t[::1] out = array
    with nogil:
        for i in range(words.shape[0]):
            out[i] = with_odd_parity(words[i] & mask, bit)
    return array
