# Messages of the Bern board's data server to rows: header of 8 bytes (version 1.0, type, io channel), words of 8.
from libc.stdint cimport uint8_t, uint64_t

from loss_evidence cimport (
    Evidence, TRAILING, full_mask, note, note_doubled, note_full, note_seconds, repeated, sample_word,
)
from row_codec cimport Row, load64, time_row, word_row
from decoder_state cimport (
    Messages, Sink, Tally, accept_message, count_time, count_words, keep_word, previous, previous_length, reject_message,
)

cdef struct Bern:
    Sink sink                        # seconds: of the last T message
    Messages messages
    uint8_t io_channel               # of the open message


cdef inline bint open_message(Bern* board) noexcept nogil:
    """Read the header of the next message; True when it is a time, which becomes a row.

    The 8 bytes of time of a T message count as header. The server sends just these; larpix-control's encoder appends one
    zero byte.
    """
    cdef Messages* input = &board.messages
    cdef const uint8_t* at = input.data + input.spans[input.i].start
    cdef Py_ssize_t length = input.spans[input.i].length
    cdef Evidence* evidence = &board.sink.evidence
    input.i += 1
    if length >= 8 and at[0] == 1 and at[1] == 0:
        if at[2] == c'D':
            board.io_channel = at[3]
            input.words = (length - 8) // 8
            input.word = at + 8
            accept_message(&board.sink, 8, (length - 8) % 8)
            if (length - 8) % 8:
                note(evidence, TRAILING, (length - 8) % 8, evidence.now_ns)
            if input.words:
                if load64(input.word) == evidence.head and repeated(
                    evidence, at, length, previous(input), previous_length(input)
                ):
                    note_doubled(evidence, input.word, input.words, 8, NULL)
                evidence.head = load64(input.word)
            return False
        if at[2] == c'T' and (length == 16 or length == 17):
            note_seconds(evidence, board.sink.seconds, load64(at + 8))
            board.sink.seconds = load64(at + 8)
            evidence.header_ns = load64(at + 8) * <uint64_t>1_000_000_000
            accept_message(&board.sink, 16, length - 16)
            return True
        if at[2] == c'H':
            accept_message(&board.sink, 8, length - 8)
            return False
    reject_message(&board.sink, length)
    return False


cdef inline Py_ssize_t bern_words(Bern* board, Row* rows, Py_ssize_t words) noexcept nogil:
    cdef Sink* sink = &board.sink
    cdef const uint8_t* at = board.messages.word
    cdef const uint8_t* end = at + 8 * words
    cdef Row* row = rows
    cdef Tally tally
    cdef int code
    cdef uint64_t full = full_mask(sink.asic), word
    tally.bad_parity = 0
    while at != end:
        word = load64(at)
        code = word_row(row, word, sink.asic, sink.io_group, board.io_channel, 0, 1)
        if code >= 0:
            if word & full:
                note_full(&sink.evidence, word, sink.asic)
            tally.bad_parity += code
            row += 1
        else:
            keep_word(sink, -code, at, 8)
        at += 8
    tally.rows = row - rows
    tally.packets = tally.rows
    count_words(sink, words, 8, &tally)
    return tally.rows


cdef inline Py_ssize_t bern_rows(Bern* board, Row* rows, Py_ssize_t n) noexcept nogil:
    cdef Messages* input = &board.messages
    cdef Py_ssize_t made = 0, words
    while made < n:
        if input.words == 0:
            if input.i == input.n:
                break
            if open_message(board):
                time_row(rows + made, board.sink.io_group, board.sink.seconds)
                count_time(&board.sink)
                made += 1
            continue
        words = min(input.words, n - made)
        made += bern_words(board, rows + made, words)
        input.word += 8 * words
        input.words -= words
    return made


cdef inline void inspect_last(Bern* board) noexcept nogil:
    """Inspect the first word of the last message of a used-up input for contradictions to `asic`."""
    cdef Messages* input = &board.messages
    cdef const uint8_t* at
    if input.n and input.spans[input.n - 1].length >= 16:
        at = input.data + input.spans[input.n - 1].start
        if at[0] == 1 and at[1] == 0 and at[2] == c'D':
            sample_word(&board.sink.evidence, load64(at + 8), board.sink.asic)
