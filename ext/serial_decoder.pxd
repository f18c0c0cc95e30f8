# The byte stream of a serial board to rows: frames of 10 bytes, 's', 8 bytes of word, 'q', with resynchronisation.
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memchr

from loss_evidence cimport RESYNC, full_mask, note, note_full, sample_word
from row_codec cimport Row, load64, odd_parity, time_row, word_mask, word_row
from decoder_state cimport Sink, count_time, keep_word
from row_structs cimport (
    BAD_PARITY, BYTES_IN, MESSAGES, PACKETS, PENDING_AFTER, PENDING_BEFORE, RESYNC_BYTES, WORD_BYTES, WORD_ROWS, WORDS_IN,
)

cdef enum:
    FRAME = 10
    IO_CHANNEL = 1                   # a serial board has one, and does not send its number

cdef struct Serial:
    Sink sink
    const uint8_t* at                # bytes without a frame so far
    const uint8_t* end
    bint strict
    bint silent                      # flush(): no more bytes follow soon
    bint new_second                  # a time row is due


# Pending bytes are added and subtracted, never set, because counters may be continued later (those of run 0 are).

cdef inline void inherit_bytes(uint64_t* counts, Py_ssize_t pending) noexcept nogil:
    """Begin these counters with the bytes that wait already."""
    counts[PENDING_BEFORE] += pending
    counts[PENDING_AFTER] += pending


cdef inline void receive_bytes(uint64_t* counts, Py_ssize_t size) noexcept nogil:
    counts[BYTES_IN] += size
    counts[PENDING_AFTER] += size


cdef inline void skip(Serial* line, Py_ssize_t size) noexcept nogil:
    line.sink.counts[RESYNC_BYTES] += size
    note(&line.sink.evidence, RESYNC, size, line.sink.evidence.now_ns)
    line.at += size


cdef inline void count_frame(uint64_t* counts, int code) noexcept nogil:
    """`code` is what word_row returned for the frame's word."""
    counts[MESSAGES] += 1
    counts[WORDS_IN] += 1
    counts[WORD_BYTES] += FRAME
    if code >= 0:
        counts[WORD_ROWS] += 1
        counts[PACKETS] += 1
        counts[BAD_PARITY] += code


cdef inline bint next_framed(Serial* line) noexcept nogil:
    """Whether a frame follows the current one, as far as its bytes have arrived.

    In a running stream this is called only when all of them have arrived.
    """
    cdef Py_ssize_t there = line.end - line.at
    return (there <= FRAME or line.at[FRAME] == c's') and (there < 2 * FRAME or line.at[2 * FRAME - 1] == c'q')


cdef inline Py_ssize_t serial_rows(Serial* line, Row* rows, Py_ssize_t n) noexcept nogil:
    """Decode frames into rows and return their number.

    Bytes that begin no frame are skipped as soon as that is certain, so the result does not depend on how the
    stream was cut.
    """
    cdef Sink* sink = &line.sink
    cdef uint64_t* counts = sink.counts
    cdef uint64_t mask = word_mask(sink.asic), full = full_mask(sink.asic), word
    cdef Py_ssize_t made = 0, there
    cdef const uint8_t* frame
    cdef const uint8_t* begin = line.at
    cdef int code
    while made < n:
        if line.new_second:
            time_row(rows + made, sink.io_group, sink.seconds)
            count_time(sink)
            made += 1
            line.new_second = False
            continue
        there = line.end - line.at
        if there == 0:
            break
        if line.at[0] != c's':
            frame = <const uint8_t*>memchr(line.at, c's', there)
            skip(line, (frame if frame != NULL else line.end) - line.at)
            continue
        if there < FRAME:
            break
        word = load64(line.at + 1)
        if line.strict and line.at[FRAME - 1] == c'q' and not odd_parity(word & mask):
            if there < 2 * FRAME and not line.silent:
                break
            if not next_framed(line):
                skip(line, 1)
                continue
        elif line.at[FRAME - 1] != c'q':
            skip(line, 1)
            continue
        code = word_row(rows + made, word, sink.asic, sink.io_group, IO_CHANNEL, 0, 1)
        count_frame(counts, code)
        if code >= 0:
            if word & full:
                note_full(&sink.evidence, word, sink.asic)
            made += 1
        else:
            keep_word(sink, -code, line.at, FRAME)
        line.at += FRAME
    if line.at - begin >= FRAME:
        frame = line.at - FRAME
        if frame[0] == c's' and frame[FRAME - 1] == c'q':  # the last frame
            sample_word(&sink.evidence, load64(frame + 1), sink.asic)
    counts[PENDING_AFTER] -= line.at - begin
    return made
