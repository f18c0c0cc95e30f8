# PACMAN messages to rows. Legacy: header of 8 bytes, words of 16; format 1.0: 24 and 24. Everything is little-endian.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from loss_evidence cimport (
    CLOCK32, CLOCK64, CUT, Evidence, SHORT, TRAILING, full_mask, mark_message, note, note_doubled, note_full,
    note_heartbeat, note_reset, note_seconds, repeated, sample_word,
)
from row_codec cimport (
    Row, Row24, SYNC, TRIGGER, UNKNOWN_TYPE, WIDE_CHANNEL, board_row, expect, load32, load64, time_row, word_row,
)
from decoder_state cimport (
    Messages, Sink, Tally, accept_message, count_time, count_words, keep_word, previous, previous_length, reject_message,
)
from row_structs cimport V2, WRONG_COUNTS
from word_pairs cimport pair_rows

cdef enum Format:
    NO_FORMAT
    LEGACY
    FORMAT_1_0

cdef struct Pacman:
    Sink sink
    Messages messages
    Format fixed                     # NO_FORMAT: recognised from each message
    Format seen                      # of the last unambiguous message
    Format open                      # of the message whose words come next
    bint clock64


cdef inline uint16_t load16(const uint8_t* at) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, at, 2)
    return value


cdef inline Format message_format(Pacman* board, const uint8_t* at, Py_ssize_t length) noexcept nogil:
    """Recognise the format of a message; NO_FORMAT when the message must be rejected.

    A message whose length contradicts its header is decoded in the format of the board's earlier messages, and rejected
    when there are none. (No message fits both formats: the legacy count is the upper half of the byte count of format 1.0,
    which makes that count too large.)
    """
    cdef bint legacy, newer, marked
    if length < 8 or at[0] != c'D':
        return NO_FORMAT
    marked = length >= 24 and at[2] == 1 and at[3] == 0
    legacy = length == 8 + 16 * <Py_ssize_t>load16(at + 6)
    newer = marked and length == 24 + <Py_ssize_t>load32(at + 4) and (length - 24) % 24 == 0
    if legacy or newer:
        board.seen = LEGACY if legacy else FORMAT_1_0
    if expect(board.fixed != NO_FORMAT, False):
        return LEGACY if board.fixed == LEGACY else FORMAT_1_0 if marked else NO_FORMAT
    if legacy or newer:
        return board.seen
    return NO_FORMAT if board.seen == FORMAT_1_0 and not marked else board.seen


cdef inline uint64_t legacy_ticks(const uint8_t* at, bint clock64) noexcept nogil:
    """Return the board's clock in a legacy word; a data word of 64-bit firmware has bits 63..16 only."""
    if clock64:
        return (load64(at) if at[0] == c'D' else load64(at + 8)) & ~<uint64_t>0xffff
    return load32(at + 2) if at[0] == c'D' else load32(at + 4)


cdef inline bint open_message(Pacman* board) noexcept nogil:
    """Read the header of the next message; False when the whole message is rejected."""
    cdef Messages* input = &board.messages
    cdef const uint8_t* at = input.data + input.spans[input.i].start
    cdef Py_ssize_t length = input.spans[input.i].length, present, counted, header, size
    cdef bint wrong
    cdef uint64_t seconds, head
    cdef Evidence* evidence = &board.sink.evidence
    input.i += 1
    board.open = message_format(board, at, length)
    if board.open == NO_FORMAT:
        reject_message(&board.sink, length)
        return False
    if board.open == LEGACY:
        header = 8
        size = 16
        seconds = load32(at + 1)
        counted = load16(at + 6)
        present = (length - header) // 16
        wrong = header + counted * 16 != length
        # a word begins with its type, io_channel and 32-bit timestamp
        head = load64(at + 8) if present else 0
        if min(counted, present):
            mark_message(
                evidence, legacy_ticks(at + 8, board.clock64),
                legacy_ticks(at + 16 * min(counted, present) - 8, board.clock64), board.clock64,
            )
    else:
        header = 24
        size = 24
        seconds = load64(at + 8) // 1000000000
        counted = load32(at + 4) // 24
        present = (length - header) // 24
        wrong = header + <Py_ssize_t>load32(at + 4) != length or (length - header) % 24 != 0
        head = load64(at + 32) if present else 0  # its timestamp
        if min(counted, present):
            mark_message(evidence, head, load64(at + 24 * min(counted, present) + 8), True)
    input.words = min(counted, present)
    input.word = at + header
    if expect(seconds != board.sink.seconds, False):
        note_seconds(evidence, board.sink.seconds, seconds)
        board.sink.seconds = seconds
    if expect(head == evidence.head, False) and repeated(evidence, at, length, previous(input), previous_length(input)):
        note_doubled(evidence, input.word + size - 8, input.words, size, input.word)
    evidence.head = head
    if expect(wrong, False):
        board.sink.counts[WRONG_COUNTS] += 1
        if counted > present:
            note(evidence, SHORT, counted - present, evidence.now_ns)
        if length - header > input.words * size:
            note(evidence, TRAILING, length - header - input.words * size, evidence.now_ns)
    accept_message(&board.sink, header, length - header - input.words * size)
    return True


cdef inline void find_full(Pacman* board, Py_ssize_t words, Py_ssize_t size) noexcept nogil:
    """Find the words with a FIFO flag among the next `words` words. (Testing every word as it is decoded costs 9 %.)"""
    cdef const uint8_t* at = board.messages.word
    cdef Py_ssize_t i
    for i in range(words):
        if at[0] == c'D':
            note_full(&board.sink.evidence, load64(at + size - 8), board.sink.asic)
        at += size


cdef inline void find_cut(Pacman* board, Py_ssize_t words) noexcept nogil:
    """Find the words of format 1.0 whose times do not fit 32 bits among the next `words` words."""
    cdef const uint8_t* at = board.messages.word
    cdef Py_ssize_t i
    for i in range(words):
        if (at[0] == c'D' or at[0] == c'C') and load64(at + 8) >> 32:
            note(&board.sink.evidence, CUT, 1, board.sink.evidence.now_ns)
        at += 24


cdef inline Py_ssize_t legacy_words(Pacman* board, Row* rows, Py_ssize_t words) noexcept nogil:
    """Decode the next `words` words; return the number of rows.

    Firmware with a 64-bit clock sends in D words its bits 63..16, in the six bytes from byte 2: they are stored as ticks of
    that clock, the lower 16 bits zero. Its S and T words have the whole clock in their last eight bytes.
    """
    cdef Sink* sink = &board.sink
    cdef const uint8_t* at = board.messages.word
    cdef const uint8_t* end = at + 16 * words
    cdef uint8_t group = sink.io_group
    cdef int asic = sink.asic, code
    cdef bint clock64 = board.clock64
    cdef Row* row = rows
    cdef Tally tally
    cdef Py_ssize_t other = 0, bad = 0
    cdef uint64_t flags = 0, word, timestamp
    while at != end:
        if at[0] == c'D':
            word = load64(at + 8)
            flags |= word
            code = word_row(
                row, word, asic, group, at[1], load64(at) & ~<uint64_t>0xffff if clock64 else load32(at + 2), 1,
            )
            if code >= 0:
                bad += code
                row += 1
            else:
                keep_word(sink, -code, at, 16)
        elif at[0] == c'S' or at[0] == c'T':
            # 64-bit firmware has its clock in the last eight bytes and zeros before them, legacy firmware the reverse
            if clock64 and load64(at) >> 32:
                note(&sink.evidence, CLOCK32, 1, sink.evidence.now_ns)
            elif not clock64 and load64(at + 8):
                note(&sink.evidence, CLOCK64, 1, sink.evidence.now_ns)
            if at[0] == c'S':
                timestamp = load64(at + 8) if clock64 else load32(at + 4)
                board_row(row, SYNC, group, at[1], at[2] & 1, 0, timestamp)
                if at[1] == c'H':
                    note_heartbeat(&sink.evidence, timestamp, clock64)
                elif at[1] == c'S' and not clock64:
                    note_reset(&sink.evidence, timestamp, sink.seconds)
            else:
                board_row(row, TRIGGER, group, at[1], 0, 0, load64(at + 8) if clock64 else load32(at + 4))
            other += 1
            row += 1
        else:
            keep_word(sink, UNKNOWN_TYPE, at, 16)
        at += 16
    if expect(flags & full_mask(asic) != 0, False):
        find_full(board, words, 16)
    tally.rows = row - rows
    tally.packets = tally.rows - other
    tally.bad_parity = bad
    count_words(sink, words, 16, &tally)
    return tally.rows


cdef inline Py_ssize_t paired_words(Pacman* board, uint8_t* rows, Py_ssize_t words) noexcept nogil:
    """Decode pairs of D words, at most `words` words, as legacy_words() does; return the number of rows. 0: it must do so."""
    cdef Tally tally
    cdef uint64_t flags = 0
    tally.bad_parity = 0
    tally.rows = tally.packets = pair_rows(
        board.messages.word, words, rows, board.sink.io_group, &tally.bad_parity, &flags
    )
    if expect(flags & full_mask(V2) != 0, False):
        find_full(board, tally.rows, 16)
    count_words(&board.sink, tally.rows, 16, &tally)
    return tally.rows


cdef inline Py_ssize_t words_1_0(Pacman* board, Row* rows, Py_ssize_t words) noexcept nogil:
    """Decode words of format 1.0, whose timestamps have 64 bits at byte 8; return the number of rows.

    A column of 32 bits gets the lower half of a data word's time, as a 32-bit clock would have it, and this is noted.
    """
    cdef Sink* sink = &board.sink
    cdef const uint8_t* at = board.messages.word
    cdef const uint8_t* end = at + 24 * words
    cdef uint8_t group = sink.io_group
    cdef int asic = sink.asic, code
    cdef Row* row = rows
    cdef Tally tally
    cdef Py_ssize_t other = 0, bad = 0
    cdef uint64_t flags = 0, ticks = 0, word, timestamp
    while at != end:
        if at[0] == c'D' or at[0] == c'C':
            code = -WIDE_CHANNEL
            word = load64(at + 16)
            flags |= word
            timestamp = load64(at + 8)
            if Row is Row24:
                ticks |= timestamp
                timestamp = <uint32_t>timestamp
            if at[3] == 0:
                code = word_row(row, word, asic, group, at[2], timestamp, 1)
            if code >= 0:
                bad += code
                row += 1
            else:
                keep_word(sink, -code, at, 24)
        elif at[0] == c'S' or at[0] == c'T':
            if at[0] == c'S':
                board_row(row, SYNC, group, at[2], at[3], load32(at + 16), load64(at + 8))
                if at[2] == c'H':
                    note_heartbeat(&sink.evidence, load64(at + 8), True)
            else:
                board_row(row, TRIGGER, group, at[2], at[3], 0, load64(at + 8))
            other += 1
            row += 1
        else:
            keep_word(sink, UNKNOWN_TYPE, at, 24)
        at += 24
    if expect(flags & full_mask(asic) != 0, False):
        find_full(board, words, 24)
    if expect(ticks >> 32 != 0, False):
        find_cut(board, words)
    tally.rows = row - rows
    tally.packets = tally.rows - other
    tally.bad_parity = bad
    count_words(sink, words, 24, &tally)
    return tally.rows


cdef inline Py_ssize_t pacman_rows(Pacman* board, Row* rows, Py_ssize_t n) noexcept nogil:
    cdef Messages* input = &board.messages
    cdef Py_ssize_t made = 0, words, pairs
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
        if board.open == LEGACY:
            if Row is Row24:
                if words > 1 and board.sink.asic == V2 and not board.clock64:
                    pairs = paired_words(board, <uint8_t*>(rows + made), words)
                    if pairs:
                        made += pairs
                        input.word += 16 * pairs
                        input.words -= pairs
                        continue
                    words = 2
            made += legacy_words(board, rows + made, words)
            input.word += 16 * words
        else:
            made += words_1_0(board, rows + made, words)
            input.word += 24 * words
        input.words -= words
    return made


cdef inline void inspect_last(Pacman* board) noexcept nogil:
    """Inspect the last message of a used-up input: its time, and whether its first word fits `asic` and `clock64`.

    (Inspecting every message costs the decoder 7 % with messages of one word.)
    """
    cdef Messages* input = &board.messages
    cdef Evidence* evidence = &board.sink.evidence
    cdef const uint8_t* at
    cdef Py_ssize_t length
    if input.n == 0 or board.open == NO_FORMAT:
        return
    at = input.data + input.spans[input.n - 1].start
    length = input.spans[input.n - 1].length
    if board.open == FORMAT_1_0:
        evidence.header_ns = load64(at + 8)
        if length >= 48 and at[24] == c'D':
            sample_word(evidence, load64(at + 40), board.sink.asic)
        return
    evidence.header_ns = load32(at + 1) * <uint64_t>1_000_000_000
    if length >= 24 and at[8] == c'D':
        if load64(at + 8) >> 48 and not board.clock64:  # legacy firmware leaves these bytes zero
            note(evidence, CLOCK64, 1, evidence.now_ns)
        sample_word(evidence, load64(at + 16), board.sink.asic)
