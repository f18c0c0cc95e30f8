# Evidence of losses before the data reached this computer. Boards do not number their messages, so the decoders gather the
# evidence from the messages themselves; larpixdaq/sources/data_quality.py draws the conclusions.
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcmp, memcpy

from row_codec cimport expect, odd_parity, word_mask
from row_structs cimport V1, V2, V2_DIAGNOSTICS, V3

cdef enum:                           # schema.NOTICES, in its order
    SHORT
    TRAILING
    REJECTED
    UNKNOWN
    RESYNC
    OVERSIZED
    FULL
    DOUBLED
    BACK
    AHEAD
    HEARTBEATS
    RESETS
    HOLES
    CUT
    CLOCK64
    CLOCK32
    AS_V1
    AS_V2
    AS_V3
    PARITY
    N_NOTICES

cdef enum:
    LONGEST_STALL = 1000             # seconds; the kernel closes a connection earlier, so a longer jump is a clock that was set
    QUEUE = 100                      # messages that a board queues for a slow subscriber before it drops
    MARKS = 128                      # power of two above QUEUE
    SHORTEST_HOLE = 100_000          # ticks: 10 ms
    LONGEST_HOLE = 100               # seconds; a clock of 32 bits goes round in 429
    SAMPLES = 64                     # words that decide about the chips' generation

cdef packed struct Notice:           # schema.NOTICE
    uint64_t events
    uint64_t amount
    uint64_t first_ns
    uint64_t last_ns

cdef struct Mark:
    uint64_t first                   # board's clock at the first and at the last word
    uint64_t last
    double since                     # the message arrived after this time

cdef struct Evidence:
    Notice* notices
    # arrival of the current batch: unix ns, and bounds by the monotonic clock
    uint64_t now_ns
    double since
    double until
    # arrival of the previous batch
    uint64_t before_ns
    double before
    bint header_decoded
    double header_since              # `since` of the batch in which the header's time first came
    # board's clock minus the host's, ns: bounds from the headers since the last clock_bounds()
    uint64_t header_ns               # time of the last header; 0: no header in this batch
    double lowest
    double highest
    # the previous message
    uint64_t head                    # eight bytes of its first word, which rarely repeat
    uint8_t* copy                    # last message of the previous input
    Py_ssize_t copied
    Py_ssize_t room
    # heartbeats, in ticks of the board's clock
    bint beating
    uint64_t beat
    uint64_t beat_ns
    uint64_t reset_ticks             # lost by resets of the clock since the last heartbeat
    uint64_t period                  # 0: unknown
    uint64_t odd                     # the last interval if it is no multiple of the period
    # resets of the board's clock
    bint was_reset
    uint64_t reset_seconds           # by the header
    double reset_until
    uint64_t reset_ns
    double tick                      # seconds; 0: unknown
    # one word of each of the last batches, at most SAMPLES
    uint32_t samples
    uint32_t types[4]
    uint32_t bad_parity
    uint64_t bits                    # bits set in any sample
    uint64_t sampled_ns              # time before the first sample
    # the last messages
    uint64_t n_marks                 # number of all messages so far
    Mark marks[MARKS]


cdef inline void note(Evidence* evidence, int what, uint64_t amount, uint64_t first_ns) noexcept nogil:
    """Count an observation that began at `first_ns` and shows in the current batch."""
    cdef Notice* notice = evidence.notices + what
    if notice.events == 0:
        notice.first_ns = first_ns
    notice.events += 1
    notice.amount += amount
    notice.last_ns = evidence.now_ns


cdef inline void forget_context(Evidence* evidence) noexcept nogil:
    """Forget all context, because the next data are unrelated to the previous ones. The notices stay."""
    evidence.since = evidence.before = evidence.header_since = -INFINITY
    evidence.until = evidence.highest = INFINITY
    evidence.lowest = -INFINITY
    evidence.header_ns = 0
    evidence.header_decoded = evidence.beating = evidence.was_reset = False
    evidence.head = 0
    evidence.copied = 0
    evidence.period = evidence.odd = 0
    evidence.tick = 0
    evidence.n_marks = 0
    _restart_samples(evidence)


cdef inline void next_batch(Evidence* evidence, uint64_t now_ns, double since, double until) noexcept nogil:
    fold_clock(evidence)
    evidence.before_ns = evidence.now_ns if evidence.now_ns else now_ns
    evidence.before = evidence.since
    evidence.now_ns = now_ns
    evidence.since = since
    evidence.until = until


# Offset of the board's clock

cdef inline void fold_clock(Evidence* evidence) noexcept nogil:
    """Narrow the bounds of the clock's offset by the last header of the batch.

    The header was written before the batch arrived, which gives the lower bound. It arrived after the last read that
    emptied the connection, which gives the upper bound if nothing delayed the message.
    """
    cdef double offset, step
    if evidence.header_ns == 0:
        return
    step = 1e9 if evidence.header_ns % <uint64_t>1_000_000_000 == 0 else 1  # of a header in whole seconds
    offset = <double><int64_t>(evidence.header_ns - evidence.now_ns)
    evidence.lowest = max(evidence.lowest, offset)
    evidence.highest = min(evidence.highest, offset + step + (evidence.until - evidence.since) * 1e9)
    evidence.header_ns = 0


# Header seconds

cdef inline uint64_t _jump_began(Evidence* evidence, uint64_t seconds) noexcept nogil:
    """Return when a jump ahead began by the host's clock (ns).

    Data behind a stalled connection arrive all at once: the previous header may have arrived just now, although the
    missing data were sent during all these seconds.
    """
    if seconds > LONGEST_STALL:
        return evidence.before_ns
    return min(evidence.before_ns, evidence.now_ns - seconds * <uint64_t>1_000_000_000)


cdef inline void note_seconds(Evidence* evidence, uint64_t before, uint64_t seconds) noexcept nogil:
    """Judge a header whose seconds differ from those `before`.

    Headers have whole seconds, and clocks are corrected in steps, so one second either way means nothing. The previous
    header came in this batch or the previous one, but not before the batch in which its time first came.
    """
    cdef double pause = evidence.until - max(evidence.before, evidence.header_since)
    if evidence.header_decoded:
        if before > seconds and before - seconds > 1:
            note(evidence, BACK, before - seconds, evidence.before_ns)
            evidence.was_reset = False
        elif seconds > before and <double>(seconds - before) > pause + 2:
            note(evidence, AHEAD, seconds - before, _jump_began(evidence, seconds - before))
            evidence.was_reset = False
    evidence.header_decoded = True
    evidence.header_since = evidence.since


# Repeated messages

cdef inline bint repeated(
    Evidence* evidence, const uint8_t* at, Py_ssize_t length, const uint8_t* before, Py_ssize_t before_length
) noexcept nogil:
    """Whether a message repeats the previous one byte for byte. `before` is NULL when that came with the previous input."""
    if before == NULL:
        before = evidence.copy
        before_length = evidence.copied
    return length == before_length and memcmp(at, before, length) == 0


cdef inline void note_doubled(
    Evidence* evidence, const uint8_t* packet, Py_ssize_t words, Py_ssize_t size, const uint8_t* kind
) noexcept nogil:
    """Note a repeated message if one of its packets cannot occur twice.

    Packets of types 0 and 1 have the chip's time or counter. Answers to the same configuration read are equal, and so
    are SYNC words of a clock that is reset each second. `packet`, `kind` (NULL: all are packets): of the first word.
    """
    cdef Py_ssize_t i
    for i in range(words):
        if (kind == NULL or kind[i * size] == c'D') and packet[i * size] & 3 < 2:
            note(evidence, DOUBLED, words, evidence.before_ns)
            return


cdef inline void keep_message(Evidence* evidence, const uint8_t* at, Py_ssize_t length) noexcept nogil:
    """Copy the last message of an input that is released, to compare the next message with it."""
    cdef uint8_t* grown
    if length > evidence.room:
        evidence.copied = 0
        grown = <uint8_t*>realloc(evidence.copy, length)
        if grown == NULL:
            return
        evidence.copy = grown
        evidence.room = length
    if length:                       # before the first longer message `copy` is NULL, which memcpy does not take
        memcpy(evidence.copy, at, length)
    evidence.copied = length


# FIFO flags

cdef inline uint64_t full_mask(int asic) noexcept nogil:
    """Return the bits of a data packet that report a full FIFO."""
    return <uint64_t>1 << 52 if asic == V1 else <uint64_t>1 << 59 | <uint64_t>1 << 61


cdef inline void note_full(Evidence* evidence, uint64_t word, int asic) noexcept nogil:
    """Note a full FIFO. Only data packets have these flags, which are reliable only with correct parity."""
    if word & full_mask(asic) and word & 3 == (1 if asic == V3 else 0) and odd_parity(word & word_mask(asic)):
        note(evidence, FULL, 1, evidence.now_ns)


# Generations of chips

cdef inline void _restart_samples(Evidence* evidence) noexcept nogil:
    cdef int i
    for i in range(4):
        evidence.types[i] = 0
    evidence.samples = 0
    evidence.bad_parity = 0
    evidence.bits = 0
    evidence.sampled_ns = evidence.now_ns


cdef inline void sample_word(Evidence* evidence, uint64_t word, int asic) noexcept nogil:
    """Take one packet word of a batch as a sample for the generation of the chips."""
    evidence.types[word & 3] += 1
    evidence.bits |= word
    evidence.bad_parity += 1 - odd_parity(word & word_mask(asic))
    evidence.samples += 1
    if expect(evidence.samples == SAMPLES, False):
        _judge_generation(evidence, asic)


cdef inline void _judge_generation(Evidence* evidence, int asic) noexcept nogil:
    """Note words that chips of this generation do not send.

    Data are type 0 up to v2, where type 1 are test packets, and type 1 from v3 on, where there is no type 0. A v1 word
    has 54 bits; a v2 word has its parity in bit 63, so that 64 words without any of the upper ten bits are none of v2.
    """
    cdef uint64_t began = evidence.sampled_ns if evidence.sampled_ns else evidence.now_ns
    cdef bint ones = evidence.types[1] > SAMPLES // 2 and evidence.types[1] > 8 * evidence.types[0]
    cdef bint zeros = evidence.types[0] > SAMPLES // 2 and evidence.types[0] > 8 * evidence.types[1]
    if asic == V2 or asic == V2_DIAGNOSTICS:
        if ones:
            note(evidence, AS_V3, SAMPLES, began)
        elif zeros and evidence.bits >> 54 == 0:
            note(evidence, AS_V1, SAMPLES, began)
    elif asic == V3 and zeros:
        note(evidence, AS_V2, SAMPLES, began)
    if 4 * evidence.bad_parity > SAMPLES:
        note(evidence, PARITY, evidence.bad_parity, began)
    _restart_samples(evidence)


# SYNC words

cdef inline void note_heartbeat(Evidence* evidence, uint64_t timestamp, bint wide) noexcept nogil:
    """Compare a heartbeat with the period of heartbeats, which the first two, or two later equal intervals, define.

    An interval that is no multiple of the period means that the clock was reset. `wide`: a clock of 64 bits, else of 32.
    """
    cdef uint64_t ticks, multiple, rest
    if evidence.beating:
        ticks = timestamp - evidence.beat + evidence.reset_ticks
        if not wide:
            ticks &= <uint64_t>0xffffffff
        if evidence.period == 0:
            evidence.period = ticks
        else:
            multiple = (ticks + evidence.period // 2) // evidence.period
            rest = (
                ticks - multiple * evidence.period if ticks > multiple * evidence.period else multiple * evidence.period - ticks
            )
            if multiple and rest <= evidence.period // 256:
                if multiple > 1:
                    note(evidence, HEARTBEATS, multiple - 1, evidence.beat_ns)
                evidence.odd = 0
            else:
                if evidence.odd and (ticks - evidence.odd if ticks > evidence.odd else evidence.odd - ticks) <= ticks // 256:
                    evidence.period = ticks
                    evidence.odd = 0
                else:
                    evidence.odd = ticks
    evidence.beating = True
    evidence.beat = timestamp
    evidence.beat_ns = evidence.now_ns
    evidence.reset_ticks = 0


cdef inline void note_reset(Evidence* evidence, uint64_t timestamp, uint64_t seconds) noexcept nogil:
    """Compare a reset of the board's clock with the previous reset that arrived, whose age the clock gives.

    The headers may show up to one second more. If they show more than that, or the host's clock confirms it, words between
    the two resets are missing. The first two resets define the length of a tick (100 ns by default).
    """
    cdef double by_headers, by_clock   # seconds between the two resets
    evidence.reset_ticks += timestamp
    evidence.n_marks = 0
    if evidence.was_reset and timestamp:
        by_headers = <double>seconds - <double>evidence.reset_seconds
        by_clock = timestamp * evidence.tick
        if evidence.tick == 0 or by_headers < by_clock - 1.1:
            evidence.tick = max(1e-7, by_headers / <double>timestamp)
        elif by_headers > by_clock + 1.1 or (
            by_headers > by_clock + 0.9 and evidence.since - evidence.reset_until > by_clock + 0.5
        ):
            note(evidence, RESETS, 1, evidence.reset_ns)
    evidence.was_reset = True
    evidence.reset_seconds = seconds
    evidence.reset_until = evidence.until
    evidence.reset_ns = evidence.now_ns


# Holes in delayed data

cdef inline void mark_message(Evidence* evidence, uint64_t first, uint64_t last, bint wide) noexcept nogil:
    """Look for a hole before a message whose words are from `first` to `last` of the board's clock (`wide`: of 64 bits).

    A board drops messages when its queue is full. A full queue of delayed messages then arrives together with messages that
    were sent long after it. A jump of the clock between the two that is longer than the whole queue is a hole, because a
    pause without data would have emptied the queue.
    """
    cdef uint64_t n = evidence.n_marks, bits = ~<uint64_t>0 if wide else <uint64_t>0xffffffff, jump
    cdef Mark* before = &evidence.marks[(n - 1) % MARKS]
    cdef Mark* queued = &evidence.marks[(n - QUEUE) % MARKS]
    if n >= QUEUE:
        jump = (first - before.last) & bits
        if expect(jump > SHORTEST_HOLE, False):
            _note_hole(evidence, jump, (before.last - queued.first) & bits, queued.since)
    before = &evidence.marks[n % MARKS]
    before.first = first
    before.last = last
    before.since = evidence.since
    evidence.n_marks = n + 1


cdef inline void _note_hole(Evidence* evidence, uint64_t jump, uint64_t queued, double since) noexcept nogil:
    """Note a jump behind a full queue if it is a hole. The queue's first message arrived after `since`."""
    cdef double seconds = jump * (evidence.tick if evidence.tick else 1e-7)
    # a longer jump means that the clock was set or went back, which other notices report
    if jump > queued and evidence.until - since < seconds < LONGEST_HOLE:
        note(evidence, HOLES, <uint64_t>(seconds * 1e6), min(evidence.before_ns, evidence.now_ns - <uint64_t>(seconds * 1e9)))
