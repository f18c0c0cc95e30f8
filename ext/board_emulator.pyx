"""Make words and messages as a detector sends them: plausible, from a seed, and faster than the rest of the system.

A board has io_channels with chips. Each channel of a chip has a pedestal with noise, and some hits well above it. The
board's clock has 10 MHz and advances by 1/rate with each word. The interface is documented in board_emulator.pyi.
"""

import numpy as np

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from row_codec cimport with_odd_parity
from row_structs cimport Asic, Span

cdef enum:
    TICKS = 10_000_000      # per second, of the board's clock
    HEARTBEAT = 100_000_000 # ticks between two heartbeats: 10 s
    LATENCY = 290           # minimum ticks from the chip to the board; recorded runs have a median of 293
    HEADER = 8
    WORD = 16
    MOST_WORDS = 65_535     # per message, because its count is a u16
    CHIP_BASE = 11          # lowest chip_id of an io_channel, as on the tiles of a detector

cdef extern from *:
    """
    #define STEP 0x9E3779B97F4A7C15ull
    """
    uint64_t STEP


cdef inline uint64_t _random(uint64_t *state) noexcept nogil:
    """Return the next number of splitmix64, which has a full period and needs one addition."""
    state[0] += STEP
    return _mixed(state[0])


cdef inline uint64_t _mixed(uint64_t z) noexcept nogil:
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


@cython.final
cdef class PacmanBoard:
    """Data stream of one PACMAN in the legacy format."""

    cdef uint64_t _state
    cdef int _asic
    cdef int _io_channels
    cdef int _chips
    cdef int _channels
    cdef uint16_t *_pedestals
    cdef uint32_t _odd
    cdef uint32_t _fifo_full
    cdef uint64_t _seconds
    # clock, in ticks and 2^-32 of a tick; each step has one word at a random time, so that times are sorted
    cdef uint64_t _tick
    cdef uint64_t _part
    cdef uint64_t _step
    cdef uint64_t _step_part
    cdef uint64_t _receipt
    cdef uint64_t _epoch
    cdef uint64_t _epoch_before
    cdef uint64_t _period
    cdef uint64_t _next_reset
    cdef uint64_t _next_heartbeat
    cdef uint64_t _next_trigger
    cdef uint64_t _next_event
    cdef uint8_t[::1] _bytes
    cdef Span[::1] _spans
    cdef readonly object buffer
    cdef readonly object spans
    cdef readonly int words
    cdef readonly uint64_t full
    cdef readonly bint left      # always True; other sources of messages end

    def __dealloc__(self):
        free(self._pedestals)

    def __init__(
        self, asic, *, rate, seed=0, seconds=0, tick=0, io_channels=8, chips=16, pps=False, odd=0.0,
        fifo_full=0.0, words=16384,
    ):
        cdef int i
        if self._pedestals != NULL:
            raise TypeError("PacmanBoard: __init__ called twice")
        if asic not in (Asic.V1, Asic.V2, Asic.V2_DIAGNOSTICS, Asic.V3):
            raise ValueError(f"PacmanBoard: unknown asic {asic}")
        if not 10 <= rate <= 1e9:
            # an event replaces a word, so words must come more often than events
            raise ValueError(f"PacmanBoard: rate must be 10 to 1e9 words/s, found {rate}")
        if not 1 <= io_channels <= 255 or not 1 <= chips <= 240:
            raise ValueError(f"PacmanBoard: 1 to 255 io_channels, 1 to 240 chips; found {io_channels}, {chips}")
        if not 0 <= odd <= 1 or not 0 <= fifo_full <= 1:
            raise ValueError(f"PacmanBoard: expected fractions, 0 to 1, found {odd=}, {fifo_full=}")
        if not 0 <= tick < 1 << 40 or not 0 <= seconds < 1 << 32 or not 1 <= words <= 1 << 24:
            raise ValueError(f"PacmanBoard: out of range: {tick=}, {seconds=} or {words=}")
        self._asic = asic
        self._io_channels = io_channels
        self._chips = chips
        self._channels = 32 if asic == Asic.V1 else 64
        self._odd = int(odd * 65536)
        self._fifo_full = int(fifo_full * 65536)
        self._state = (seed * 0xD1342543DE82EF95 + 1) & 0xFFFFFFFFFFFFFFFF
        n = io_channels * chips * self._channels
        self._pedestals = <uint16_t *>malloc(n * sizeof(uint16_t))
        if self._pedestals == NULL:
            raise MemoryError()
        for i in range(n):
            self._pedestals[i] = <uint16_t>(24 + _random(&self._state) % 32)
            if asic == Asic.V1 or asic == Asic.V3:
                self._pedestals[i] *= 4   # 10 bits
        step = int(TICKS / rate * 4294967296.0)
        self._step = step >> 32
        self._step_part = step & 0xFFFFFFFF
        self._period = <uint64_t>TICKS if pps else <uint64_t>1 << 32
        self._set_clock(seconds, tick)
        self.words = words
        self.left = True
        self.buffer = np.zeros(words * (HEADER + WORD), np.uint8)
        self.spans = np.zeros(words, [("start", "<u4"), ("length", "<u4")])
        self._bytes = self.buffer
        self._spans = self.spans

    cdef void _set_clock(self, uint64_t seconds, uint64_t tick) noexcept:
        self._seconds = seconds
        self._part = 0
        self._tick = tick
        self._receipt = tick
        self._epoch = tick - tick % self._period
        self._epoch_before = self._epoch - self._period if self._epoch else 0
        self._next_reset = self._epoch + self._period
        self._next_heartbeat = (tick // <uint64_t>HEARTBEAT + 1) * HEARTBEAT
        self._next_trigger = (tick // <uint64_t>TICKS) * TICKS + TICKS // 2
        if self._next_trigger <= tick:
            self._next_trigger += TICKS
        self._schedule()

    def jump(self, seconds):
        self._seconds = (self._seconds + <uint64_t><int64_t>seconds) & 0xFFFFFFFF

    def restart(self):
        self._set_clock(0, 0)

    @property
    def tick(self):
        return self._tick

    @property
    def receipt(self):
        return (self._tick - self._epoch) & 0xFFFFFFFF

    def fill(self, words, per_message=0, window=200):
        if not 0 <= words <= self.words:
            raise ValueError(f"fill: asked for {words} words, the buffer holds {self.words}")
        if not 0 <= per_message <= MOST_WORDS or not 0 <= window < 1 << 40:
            raise ValueError(f"fill: per_message {per_message} must be 0 to {MOST_WORDS}, window {window} 0 to 2^40")
        cdef uint32_t n = words, most = per_message or MOST_WORDS
        cdef uint64_t within = <uint64_t>1 << 62 if per_message else window
        cdef int messages
        if n == 0:
            return 0
        with nogil:
            messages = self._fill(&self._bytes[0], &self._spans[0], n, most, within)
        return messages

    def packets(self, out):
        cdef uint64_t[::1] words = out
        cdef Py_ssize_t i
        with nogil:
            for i in range(words.shape[0]):
                words[i] = self._packet(self._advance(), NULL)

    cdef void _schedule(self) noexcept nogil:
        self._next_event = min(self._next_reset, self._next_heartbeat, self._next_trigger)

    cdef inline uint64_t _advance(self) noexcept nogil:
        """Return the tick of the next word, at a random time within its step."""
        cdef uint64_t scale = (self._step << 16) | (self._step_part >> 16)
        cdef uint64_t at = self._tick + ((scale * (_random(&self._state) >> 48) + self._part) >> 32)
        self._part += self._step_part
        self._tick += self._step + (self._part >> 32)
        self._part &= <uint64_t>0xFFFFFFFF
        return at

    cdef int _fill(
        self, uint8_t *data, Span *spans, uint32_t words, uint32_t most, uint64_t window
    ) noexcept nogil:
        cdef uint8_t *start = data
        cdef uint8_t *message
        cdef uint64_t at = 0, first
        cdef uint32_t seconds, count
        cdef uint16_t count16
        cdef int messages = 0
        cdef bint waiting = False
        while words or waiting:
            if not waiting:
                at = self._advance()
                words -= 1
            waiting = False
            first = at
            message = data
            data += HEADER
            count = 0
            while True:
                self._word(data, at)
                data += WORD
                count += 1
                if words == 0:
                    break
                if count == most:
                    break
                at = self._advance()
                words -= 1
                if at > first + window:
                    waiting = True   # this word begins the next message
                    break
            seconds = <uint32_t>(self._seconds + at // TICKS)
            count16 = <uint16_t>count
            message[0] = 0x44   # D
            memcpy(message + 1, &seconds, 4)
            message[5] = 0
            memcpy(message + 6, &count16, 2)
            spans[messages].start = <uint32_t>(message - start)
            spans[messages].length = <uint32_t>(data - message)
            messages += 1
        return messages

    cdef inline void _word(self, uint8_t *data, uint64_t at) noexcept nogil:
        """Write a word of 16 bytes: the event that is due, or a packet."""
        cdef uint64_t packet, head
        cdef uint8_t io_channel = 0
        cdef uint32_t receipt
        if at >= self._next_event:
            self._event(data)
            return
        packet = self._packet(at, &io_channel)
        receipt = <uint32_t>(self._receipt - self._epoch)
        head = <uint64_t>0x44 | (<uint64_t>io_channel << 8) | (<uint64_t>receipt << 16)
        memcpy(data, &head, 8)
        memcpy(data + 8, &packet, 8)

    cdef void _event(self, uint8_t *data) noexcept nogil:
        cdef uint32_t stamp = <uint32_t>(self._next_event - self._epoch)
        memset(data, 0, WORD)
        if self._next_event == self._next_reset:
            # the clock before the reset; 2^32 itself does not fit
            stamp = <uint32_t>(self._period if self._period == TICKS else self._period - 1)
            data[0] = 0x53   # S
            data[1] = 0x53
            self._epoch_before = self._epoch
            self._epoch = self._next_reset
            self._next_reset += self._period
        elif self._next_event == self._next_heartbeat:
            data[0] = 0x53
            data[1] = 0x48   # H
            self._next_heartbeat += HEARTBEAT
        else:
            data[0] = 0x54   # T
            data[1] = 0x02   # external input 1
            self._next_trigger += TICKS
        memcpy(data + 4, &stamp, 4)
        self._schedule()

    cdef inline uint64_t _packet(self, uint64_t at, uint8_t *io_channel) noexcept nogil:
        """Return a packet word that reaches the board at tick `at`, and its io_channel unless `io_channel` is NULL."""
        # Two random numbers, but the state is written once, because the next word waits for it.
        cdef uint64_t state = self._state + STEP
        cdef uint64_t r = _mixed(state), s = _mixed(state + STEP)
        self._state = state + STEP
        cdef uint64_t group = ((r & 0xFFFF) * <uint64_t>self._io_channels) >> 16
        cdef uint64_t chip = (((r >> 16) & 0xFFFF) * <uint64_t>self._chips) >> 16
        cdef uint64_t channel = (r >> 32) & <uint64_t>(self._channels - 1)
        cdef uint64_t adc = self._pedestals[(group * self._chips + chip) * self._channels + channel]
        cdef uint64_t sent, ticks, trigger, fifo, word
        adc += ((r >> 38) & 7) + ((r >> 41) & 7)   # triangular noise, 3.2 counts rms
        if (r >> 44) & 15 == 0:
            adc += (r >> 48) & 127                  # a hit well above threshold
        # both times are sorted: the chip's time, and the board's time with a few ticks of jitter
        sent = at - LATENCY if at >= LATENCY else 0
        self._receipt = min(max(self._receipt, at + (s & 7)), self._next_reset - 1)
        # a packet sent before the last reset of the clock has a time of the previous period
        ticks = sent - self._epoch if sent >= self._epoch else sent - self._epoch_before
        if io_channel != NULL:
            io_channel[0] = <uint8_t>(group + 1)
        chip += CHIP_BASE
        if self._odd and (s >> 16) & 0xFFFF < self._odd:
            return self._odd_packet(chip, channel, r, s)
        trigger = (s >> 32) & 3 if (s >> 34) & 63 == 0 else 0
        # sometimes a FIFO is half full (bits 0 and 2); with probability `fifo_full` one is full (bits 1 and 3)
        fifo = (s >> 40) & 5 if (s >> 44) & 1023 == 0 else 0
        if self._fifo_full and _random(&self._state) & 0xFFFF < self._fifo_full:
            fifo |= 2
            self.full += 1
        if self._asic == Asic.V2:
            word = (
                (chip << 2) | (channel << 10) | ((ticks & <uint64_t>0x7FFFFFFF) << 16)
                | (<uint64_t>((s >> 54) & 7 != 0) << 47) | (adc << 48) | (trigger << 56) | (fifo << 58)
                | (<uint64_t>1 << 62)
            )
        elif self._asic == Asic.V1:
            # clock of 5 MHz with 24 bits; one bit each for half full and full
            word = (
                (chip << 2) | (channel << 10) | (((ticks >> 1) & <uint64_t>0xFFFFFF) << 17) | (adc << 41)
                | ((fifo & 3) << 51)
            )
            return with_odd_parity(word, 53)
        elif self._asic == Asic.V2_DIAGNOSTICS:
            word = (
                (chip << 2) | (channel << 10) | ((ticks & 0xFFFF) << 16) | (((s >> 54) & 7) << 32)
                | (((s >> 57) & 3) << 44) | (adc << 48) | (trigger << 56) | (fifo << 58) | (<uint64_t>1 << 62)
            )
        else:
            word = (
                <uint64_t>1 | (chip << 2) | (channel << 10) | ((ticks & <uint64_t>0xFFFFFFF) << 16) | (adc << 46)
                | (trigger << 56) | (fifo << 58) | (<uint64_t>1 << 62)
            )
        return with_odd_parity(word, 63)

    cdef uint64_t _odd_packet(self, uint64_t chip, uint64_t channel, uint64_t r, uint64_t s) noexcept nogil:
        """Return an answer to a configuration read of register `channel`; every second answer has a wrong parity."""
        cdef int bit = 53 if self._asic == Asic.V1 else 63
        cdef uint64_t word = <uint64_t>3 | (chip << 2) | (channel << 10) | (((r >> 48) & 0xFF) << 18)
        if self._asic == Asic.V3:
            word |= <uint64_t>0x89504E47 << 26
        if self._asic != Asic.V1:
            word |= <uint64_t>1 << 62
        return with_odd_parity(word, bit) ^ (((s >> 32) & 1) << bit)


def count_words(buffer, spans):
    cdef const uint8_t[::1] data = buffer
    cdef const Span[::1] parts = spans
    cdef const uint8_t *word
    cdef uint64_t size = data.shape[0], n, k, words = 0, d = 0, s = 0, t = 0
    cdef Py_ssize_t i, outside = -1
    with nogil:
        for i in range(parts.shape[0]):
            if <uint64_t>parts[i].start + parts[i].length > size:
                outside = i
                break
            if parts[i].length < HEADER:
                continue
            word = &data[parts[i].start]
            n = min(<uint64_t>(word[6] | (word[7] << 8)), <uint64_t>(parts[i].length - HEADER) // WORD)
            word += HEADER
            for k in range(n):
                d += word[0] == c'D'
                s += word[0] == c'S'
                t += word[0] == c'T'
                word += WORD
            words += n
    if outside >= 0:
        raise ValueError(f"message {outside}: span {spans[outside]} lies outside of the buffer of {size} bytes")
    return d, s, t, words - d - s - t
