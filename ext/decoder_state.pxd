# State that the decoders of all boards share: counters, words that made no row, and the input of whole messages.
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

from loss_evidence cimport Evidence, REJECTED, UNKNOWN, note
from row_codec cimport INVALID_PACKET_TYPE, UNKNOWN_TYPE, expect
from row_structs cimport (
    BAD_PARITY, BYTES_IN, HEADER_BYTES, MESSAGES, PACKETS, REJECTED_BYTES, REJECTED_MESSAGES, REJECTED_WORDS, Span,
    TIME_ROWS, TRAILING_BYTES, UNKNOWN_WORDS, UnknownWord, WORD_BYTES, WORD_ROWS, WORDS_IN,
)

cdef enum:
    KEPT = 1000                      # schema.UNKNOWN_KEPT

cdef struct Sink:
    uint64_t* counts                 # of one io_group, in the order of constants.Count
    UnknownWord* kept
    Py_ssize_t n_kept                # since the last take_unknown
    Py_ssize_t room                  # words that may still be kept before the next start()
    uint64_t seconds                 # of the header of the words being decoded
    int asic
    uint8_t io_group
    Evidence evidence

cdef struct Messages:                # input of decoders that get whole messages
    const uint8_t* data
    const Span* spans
    Py_ssize_t n
    Py_ssize_t i                     # index of the next message, after the open one
    const uint8_t* word              # the open message's next word
    Py_ssize_t words                 # words left in the open message

cdef struct Tally:                   # of consecutive words, added to the counters at once
    Py_ssize_t rows
    Py_ssize_t packets
    Py_ssize_t bad_parity


cdef inline const uint8_t* previous(const Messages* input) noexcept nogil:
    """Return the message before the open one; NULL when that is the first."""
    return input.data + input.spans[input.i - 2].start if input.i > 1 else NULL


cdef inline Py_ssize_t previous_length(const Messages* input) noexcept nogil:
    return input.spans[input.i - 2].length if input.i > 1 else 0


cdef inline void keep_word(Sink* sink, int reason, const uint8_t* raw, int size) noexcept nogil:
    """Count a word that makes no row, and keep its bytes while there is room."""
    cdef UnknownWord* kept
    sink.counts[UNKNOWN_WORDS if reason in (UNKNOWN_TYPE, INVALID_PACKET_TYPE) else REJECTED_WORDS] += 1
    note(&sink.evidence, UNKNOWN, 1, sink.evidence.now_ns)
    if sink.room == 0:
        return
    kept = sink.kept + sink.n_kept
    kept.seconds = sink.seconds
    kept.io_group = sink.io_group
    kept.reason = <uint8_t>reason
    kept.size = <uint8_t>size
    memset(kept.raw, 0, sizeof(kept.raw))
    memcpy(kept.raw, raw, size)
    sink.n_kept += 1
    sink.room -= 1


cdef inline void reject_message(Sink* sink, Py_ssize_t length) noexcept nogil:
    sink.counts[BYTES_IN] += length
    sink.counts[REJECTED_BYTES] += length
    sink.counts[REJECTED_MESSAGES] += 1
    note(&sink.evidence, REJECTED, length, sink.evidence.now_ns)


cdef inline void accept_message(Sink* sink, Py_ssize_t header, Py_ssize_t trailing) noexcept nogil:
    """Count the bytes around the words of a message that is opened; the words are counted as they are decoded.

    So bytes in = header + words + trailing also holds while a message is decoded in several calls.
    """
    sink.counts[MESSAGES] += 1
    sink.counts[BYTES_IN] += header + trailing
    sink.counts[HEADER_BYTES] += header
    if expect(trailing != 0, False):
        sink.counts[TRAILING_BYTES] += trailing


cdef inline void count_time(Sink* sink) noexcept nogil:
    sink.counts[TIME_ROWS] += 1


cdef inline void count_words(Sink* sink, Py_ssize_t words, int size, Tally* tally) noexcept nogil:
    sink.counts[BYTES_IN] += words * size
    sink.counts[WORDS_IN] += words
    sink.counts[WORD_BYTES] += words * size
    sink.counts[WORD_ROWS] += tally.rows
    sink.counts[PACKETS] += tally.packets
    if tally.bad_parity:
        sink.counts[BAD_PARITY] += tally.bad_parity
