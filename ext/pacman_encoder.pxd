# Encode rows as PACMAN messages, legacy or format 1.0: the messages from which the decoder makes these rows.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, UINT32_MAX, UINT64_MAX
from libc.string cimport memcpy, memset

from row_codec cimport Row, SYNC, TIMESTAMP, TRIGGER, key_channel, row_type, row_word
from row_structs cimport Row10, Span

cdef enum Misfit:                    # reason why a row cannot be encoded without loss
    FITS
    HEADER_TIME
    RECEIPT_TIME
    BOARD_TIME
    BOARD_DETAIL

cdef enum:
    MOST_WORDS = 65535               # a legacy header counts words in 16 bits

cdef struct Writer:
    uint8_t* begin
    uint8_t* at
    uint8_t* message                 # header of the open message; NULL: none
    Py_ssize_t words                 # of the open message
    Span* spans
    Py_ssize_t n_spans
    uint64_t seconds                 # of the next header
    Py_ssize_t row                   # index of the row that does not fit
    int asic
    bint legacy
    bint clock64


cdef inline void store16(uint8_t* at, uint16_t value) noexcept nogil:
    memcpy(at, &value, 2)


cdef inline void store32(uint8_t* at, uint32_t value) noexcept nogil:
    memcpy(at, &value, 4)


cdef inline void store64(uint8_t* at, uint64_t value) noexcept nogil:
    memcpy(at, &value, 8)


cdef inline void close_message(Writer* out) noexcept nogil:
    if out.message == NULL:
        return
    if out.legacy:
        store16(out.message + 6, <uint16_t>out.words)
    else:
        store32(out.message + 4, <uint32_t>(24 * out.words))
    out.spans[out.n_spans].start = <uint32_t>(out.message - out.begin)
    out.spans[out.n_spans].length = <uint32_t>(out.at - out.message)
    out.n_spans += 1
    out.message = NULL


cdef inline Misfit begin_message(Writer* out) noexcept nogil:
    cdef uint8_t* at = out.at
    close_message(out)
    if out.seconds > (<uint64_t>UINT32_MAX if out.legacy else UINT64_MAX // 1000000000):
        return HEADER_TIME
    if out.legacy:
        memset(at, 0, 8)
        store32(at + 1, <uint32_t>out.seconds)
        out.at += 8
    else:
        memset(at, 0, 24)
        at[2] = 1
        store64(at + 8, out.seconds * 1000000000)
        out.at += 24
    at[0] = c'D'
    out.message = at
    out.words = 0
    return FITS


cdef inline Misfit packet_word(Writer* out, uint64_t word, uint8_t io_channel, uint64_t receipt) noexcept nogil:
    cdef uint8_t* at = out.at
    at[0] = c'D'
    if out.legacy:
        at[1] = io_channel
        if out.clock64:
            if receipt & 0xffff:
                return RECEIPT_TIME
            memcpy(at + 2, <const uint8_t*>&receipt + 2, 6)
        else:
            if receipt > UINT32_MAX:
                return RECEIPT_TIME
            store32(at + 2, <uint32_t>receipt)
        store64(at + 8, word)
    else:
        at[2] = io_channel
        store64(at + 8, receipt)
        store64(at + 16, word)
    return FITS


cdef inline Misfit board_word(
    Writer* out, uint8_t letter, uint8_t detail, uint16_t source, uint32_t status, uint64_t timestamp
) noexcept nogil:
    cdef uint8_t* at = out.at
    at[0] = letter
    if out.legacy:
        at[1] = detail
        at[2] = <uint8_t>source
        if status or source > (1 if letter == c'S' else 0):
            return BOARD_DETAIL
        if out.clock64:
            store64(at + 8, timestamp)
        else:
            if timestamp > UINT32_MAX:
                return BOARD_TIME
            store32(at + 4, <uint32_t>timestamp)
    else:
        at[2] = detail
        at[3] = <uint8_t>source
        if source > 255 or (status and letter == c'T'):
            return BOARD_DETAIL
        store64(at + 8, timestamp)
        store32(at + 16, status)
    return FITS


cdef inline Misfit write_rows(Writer* out, const Row* rows, Py_ssize_t n) noexcept nogil:
    cdef Misfit misfit = FITS
    cdef const Row* row
    cdef int kind
    for out.row in range(n):
        row = rows + out.row
        kind = row_type(row)
        if kind == TIMESTAMP:
            out.seconds = row.timestamp
            misfit = begin_message(out)
            if misfit:
                return misfit
            continue
        if not (kind < 4 and row.direction == 1) and kind != SYNC and kind != TRIGGER:
            continue
        if out.message == NULL or (out.legacy and out.words == MOST_WORDS):
            misfit = begin_message(out)
            if misfit:
                return misfit
        memset(out.at, 0, 16 if out.legacy else 24)
        if kind < 4:
            if Row is Row10:
                misfit = packet_word(out, row_word(row, out.asic), key_channel(row.chip_key), 0)
            else:
                misfit = packet_word(out, row_word(row, out.asic), row.io_channel, row.receipt_timestamp)
        else:
            if Row is Row10:
                misfit = board_word(
                    out, c'S' if kind == SYNC else c'T', row.register, row.value, row.counter, row.timestamp
                )
            else:
                misfit = board_word(
                    out, c'S' if kind == SYNC else c'T', row.trigger_type, row.dataword, row.counter, row.timestamp
                )
        if misfit:
            return misfit
        out.at += 16 if out.legacy else 24
        out.words += 1
    close_message(out)
    return FITS
