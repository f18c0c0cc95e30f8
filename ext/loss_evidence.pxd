# What speaks for a loss before data reached us. Boards do not number what they send, so it is gathered here, in the
# decoders, from what their messages say; larpixdaq/sources/data_quality.py says what follows from it.
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
    LONGEST_STALL = 1000             # seconds; the kernel gives a connection up before: then a clock was set
    QUEUE = 100                      # messages that a board keeps for a subscriber who does not take them; then it drops
    MARKS = 128                      # a power of two above that
    SHORTEST_HOLE = 100_000          # ticks: 10 ms
    LONGEST_HOLE = 100               # seconds; a clock of 32 bits goes round in 429
    SAMPLES = 64                     # words from which the chips' generation is judged

cdef packed struct Notice:           # schema.NOTICE
    uint64_t events
    uint64_t amount
    uint64_t first_ns
    uint64_t last_ns

cdef struct Mark:
    uint64_t first                   # the board's clock, of its first and its last word
    uint64_t last
    double since                     # it reached us after that

cdef struct Evidence:
    Notice* notices
    # when the batch at hand reached the host: unix ns, and bounds by the monotonic clock
    uint64_t now_ns
    double since
    double until
    # the same of the batch before
    uint64_t before_ns
    double before
    bint spoken                      # there was a header before
    double spoken_since              # `since` of the batch in which its time was first seen
    # the board's clock less the host's, ns: bounds from the headers since clock_bounds() was last asked for
    uint64_t header_ns               # the last header's time; 0: none in this batch
    double lowest
    double highest
    # the message before
    uint64_t head                    # eight bytes of its first word, which hardly ever agree
    uint8_t* copy                    # of the last one of the input before
    Py_ssize_t copied
    Py_ssize_t room
    # heartbeats, in ticks of the board's clock
    bint beating
    uint64_t beat
    uint64_t beat_ns
    uint64_t reset_ticks             # that resets of the clock have taken away since
    uint64_t period                  # 0: not known yet
    uint64_t odd                     # the last interval, if it was no multiple of the period
    # resets of the board's clock
    bint was_reset
    uint64_t reset_seconds           # by the header
    double reset_until
    uint64_t reset_ns
    double tick                      # seconds; 0: not known yet
    # words of the last batches, one of each, at most SAMPLES
    uint32_t samples
    uint32_t types[4]
    uint32_t bad_parity
    uint64_t bits                    # that are set in any of them
    uint64_t sampled_ns              # the first of them came after that
    # the last messages
    uint64_t n_marks                 # how many there were
    Mark marks[MARKS]


cdef inline void note(Evidence* evidence, int what, uint64_t amount, uint64_t first_ns) noexcept nogil:
    """Something was noticed that began at `first_ns` and shows in the batch at hand."""
    cdef Notice* notice = evidence.notices + what
    if notice.events == 0:
        notice.first_ns = first_ns
    notice.events += 1
    notice.amount += amount
    notice.last_ns = evidence.now_ns


cdef inline void forget_context(Evidence* evidence) noexcept nogil:
    """What comes next has nothing to do with what came before; what was noticed stays."""
    evidence.since = evidence.before = evidence.spoken_since = -INFINITY
    evidence.until = evidence.highest = INFINITY
    evidence.lowest = -INFINITY
    evidence.header_ns = 0
    evidence.spoken = evidence.beating = evidence.was_reset = False
    evidence.head = 0
    evidence.copied = 0
    evidence.period = evidence.odd = 0
    evidence.tick = 0
    evidence.n_marks = 0
    _sample_anew(evidence)


cdef inline void next_batch(Evidence* evidence, uint64_t now_ns, double since, double until) noexcept nogil:
    fold_clock(evidence)
    evidence.before_ns = evidence.now_ns if evidence.now_ns else now_ns
    evidence.before = evidence.since
    evidence.now_ns = now_ns
    evidence.since = since
    evidence.until = until


# The board's clock beside the host's

cdef inline void fold_clock(Evidence* evidence) noexcept nogil:
    """Narrow the bounds of the clock's offset by the last header of the batch, which is decoded.

    It was written before the batch had come, so the clock is ahead by no less than their difference. It came after the
    last read that left nothing behind, so the clock is ahead by no more than that one, if nothing held the message up.
    """
    cdef double offset, step
    if evidence.header_ns == 0:
        return
    step = 1e9 if evidence.header_ns % <uint64_t>1_000_000_000 == 0 else 1  # whole seconds, if it is written in these
    offset = <double><int64_t>(evidence.header_ns - evidence.now_ns)
    evidence.lowest = max(evidence.lowest, offset)
    evidence.highest = min(evidence.highest, offset + step + (evidence.until - evidence.since) * 1e9)
    evidence.header_ns = 0


# Header seconds

cdef inline uint64_t _left_out(Evidence* evidence, uint64_t seconds) noexcept nogil:
    """When a jump ahead began by our clock (ns). What comes after a connection stalled comes all at once: the header
    before may have reached us only just now, though what is missing was sent in all these seconds."""
    if seconds > LONGEST_STALL:
        return evidence.before_ns
    return min(evidence.before_ns, evidence.now_ns - seconds * <uint64_t>1_000_000_000)


cdef inline void note_seconds(Evidence* evidence, uint64_t before, uint64_t seconds) noexcept nogil:
    """For headers whose seconds differ from those `before`.

    They are whole seconds of clocks that are set right by a step now and then: so a second either way says nothing. The
    header before came in this batch, or the one before; not earlier than the batch in which its time was first seen.
    """
    cdef double pause = evidence.until - max(evidence.before, evidence.spoken_since)
    if evidence.spoken:
        if before > seconds and before - seconds > 1:
            note(evidence, BACK, before - seconds, evidence.before_ns)
            evidence.was_reset = False
        elif seconds > before and <double>(seconds - before) > pause + 2:
            note(evidence, AHEAD, seconds - before, _left_out(evidence, seconds - before))
            evidence.was_reset = False
    evidence.spoken = True
    evidence.spoken_since = evidence.since


# Messages that come twice

cdef inline bint repeated(
    Evidence* evidence, const uint8_t* at, Py_ssize_t length, const uint8_t* before, Py_ssize_t before_length
) noexcept nogil:
    """Whether a message is the one before it, byte for byte; `before` NULL: that one came with the input before."""
    if before == NULL:
        before = evidence.copy
        before_length = evidence.copied
    return length == before_length and memcmp(at, before, length) == 0


cdef inline void note_doubled(
    Evidence* evidence, const uint8_t* packet, Py_ssize_t words, Py_ssize_t size, const uint8_t* kind
) noexcept nogil:
    """Note a message that came twice, if one of its packets could not just have happened twice.

    Packets of types 0 and 1 have the chip's time or counter. Answers to the same configuration read are alike, and so
    are SYNC words of a clock that is reset each second. `packet`, `kind` (NULL: all are packets): of the first word.
    """
    cdef Py_ssize_t i
    for i in range(words):
        if (kind == NULL or kind[i * size] == c'D') and packet[i * size] & 3 < 2:
            note(evidence, DOUBLED, words, evidence.before_ns)
            return


cdef inline void keep_message(Evidence* evidence, const uint8_t* at, Py_ssize_t length) noexcept nogil:
    """The input is about to go: keep its last message, which the next one is compared with."""
    cdef uint8_t* grown
    if length > evidence.room:
        evidence.copied = 0
        grown = <uint8_t*>realloc(evidence.copy, length)
        if grown == NULL:
            return
        evidence.copy = grown
        evidence.room = length
    memcpy(evidence.copy, at, length)
    evidence.copied = length


# FIFO flags

cdef inline uint64_t full_mask(int asic) noexcept nogil:
    """The bits of a data packet that say that a FIFO is full."""
    return <uint64_t>1 << 52 if asic == V1 else <uint64_t>1 << 59 | <uint64_t>1 << 61


cdef inline void note_full(Evidence* evidence, uint64_t word, int asic) noexcept nogil:
    """Only data packets have these flags, and only with right parity they can be believed."""
    if word & full_mask(asic) and word & 3 == (1 if asic == V3 else 0) and odd_parity(word & word_mask(asic)):
        note(evidence, FULL, 1, evidence.now_ns)


# Generations of chips

cdef inline void _sample_anew(Evidence* evidence) noexcept nogil:
    cdef int i
    for i in range(4):
        evidence.types[i] = 0
    evidence.samples = 0
    evidence.bad_parity = 0
    evidence.bits = 0
    evidence.sampled_ns = evidence.now_ns


cdef inline void sample_word(Evidence* evidence, uint64_t word, int asic) noexcept nogil:
    """Sample a packet word, one of a batch, for the generation of its chip."""
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
    _sample_anew(evidence)


# SYNC words

cdef inline void note_heartbeat(Evidence* evidence, uint64_t timestamp, bint wide) noexcept nogil:
    """Heartbeats come at equal intervals of the board's clock; the first two, or two later ones that agree, say which.

    An interval that is no multiple of it is the clock's new beginning. `wide`: a clock of 64 bits, else it wraps at 32.
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
            rest = ticks - multiple * evidence.period if ticks > multiple * evidence.period else multiple * evidence.period - ticks
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
    """A reset of the board's clock tells how long ago the one before was; that one should be the last that we heard of.

    By the headers more time than that may seem to have passed, by up to a second; beyond that, or with the host's clock
    to confirm it, words between the two did not come. How long a tick is the first two resets say (by default 100 ns).
    """
    cdef double passed, told
    evidence.reset_ticks += timestamp
    evidence.n_marks = 0
    if evidence.was_reset and timestamp:
        passed = <double>seconds - <double>evidence.reset_seconds
        told = timestamp * evidence.tick
        if evidence.tick == 0 or passed < told - 1.1:
            evidence.tick = max(1e-7, passed / <double>timestamp)
        elif passed > told + 1.1 or (
            passed > told + 0.9 and evidence.since - evidence.reset_until > told + 0.5
        ):
            note(evidence, RESETS, 1, evidence.reset_ns)
    evidence.was_reset = True
    evidence.reset_seconds = seconds
    evidence.reset_until = evidence.until
    evidence.reset_ns = evidence.now_ns


# Holes in data that were held up

cdef inline void mark_message(Evidence* evidence, uint64_t first, uint64_t last, bint wide) noexcept nogil:
    """A message whose words were taken from `first` to `last` of the board's clock (`wide`: of 64 bits).

    A board drops when its queue is full, and then so many messages have been held up: they reach us together with what was
    sent long after them. A jump of the clock between the two that is longer than all the queue took is then a hole; a
    pause in which there was nothing to send would have let them through.
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
    """A jump behind so many messages: is it a hole? The first of them reached us after `since`."""
    cdef double seconds = jump * (evidence.tick if evidence.tick else 1e-7)
    # more than LONGEST_HOLE is a clock that was set, or that went back: told otherwise
    if jump > queued and evidence.until - since < seconds < LONGEST_HOLE:
        note(evidence, HOLES, <uint64_t>(seconds * 1e6), min(evidence.before_ns, evidence.now_ns - <uint64_t>(seconds * 1e9)))
