"""Decode the bytes of all boards into rows, and encode rows as board messages.

The interface is documented in decoders.pyi; the formats are in pacman_decoder.pxd, bern_decoder.pxd and serial_decoder.pxd.
"""

cimport cython
from libc.math cimport INFINITY
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, UINT32_MAX
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

import numpy as np

from bern_decoder cimport Bern, bern_rows, inspect_last as inspect_bern
from loss_evidence cimport (
    Evidence, N_NOTICES, Notice, fold_clock, forget_context, keep_message, next_batch, note,
)
from pacman_encoder cimport (
    BOARD_DETAIL, BOARD_TIME, HEADER_TIME, MOST_WORDS, Misfit, RECEIPT_TIME, Writer, write_rows,
)
from pacman_decoder cimport FORMAT_1_0, LEGACY, NO_FORMAT, Pacman, inspect_last as inspect_pacman, pacman_rows
from row_codec cimport load32
from serial_decoder cimport FRAME, Serial, inherit_bytes, receive_bytes, serial_rows
from decoder_state cimport KEPT, Messages, Sink
from row_structs cimport (
    KIND10, KIND24, KIND24_CLOCK64, N_COUNTS, Row10, Row24, Row24Clock64, Row30, Rows, Span, UnknownWord, checked_asic,
    checked_byte, open_rows,
)

_SPAN = np.dtype([("start", "<u4"), ("length", "<u4")])
_NOTICE = np.dtype([("events", "<u8"), ("amount", "<u8"), ("first_ns", "<u8"), ("last_ns", "<u8")])
_UNKNOWN_WORD = np.dtype([("seconds", "<u8"), ("io_group", "u1"), ("reason", "u1"), ("size", "u1"), ("raw", "u1", (24,))])


cdef class _Decoder:
    """Base of all decoders: the counters, the words that made no row, and the evidence of losses."""

    cdef readonly int io_group
    cdef Sink* sink                  # in the state of the subclass
    cdef object kept                 # array, dtype _UNKNOWN_WORD
    cdef UnknownWord[::1] kept_view
    cdef uint64_t[::1] counts
    cdef object notices              # array, dtype _NOTICE
    cdef Notice[::1] notices_view

    cdef int _attach(self, Sink* sink) except -1:
        self.sink = sink
        self.kept = np.zeros(KEPT, _UNKNOWN_WORD)
        self.kept_view = self.kept
        sink.kept = &self.kept_view[0]
        self.notices = np.zeros(N_NOTICES, _NOTICE)
        self.notices_view = self.notices
        sink.evidence.notices = &self.notices_view[0]
        forget_context(&sink.evidence)
        return 0

    def __dealloc__(self):
        if self.sink != NULL:
            free(self.sink.evidence.copy)

    cdef int _identify(self, object io_group, object asic) except -1:
        self.io_group = self.sink.io_group = checked_byte("io_group", io_group)
        self.sink.asic = checked_asic(asic)
        return 0

    cdef int _check_started(self) except -1:
        if self.sink.counts == NULL:
            raise ValueError(f"decoder of io_group {self.io_group}: start() names the counters; it was not called yet")
        return 0

    def start(self, uint64_t[::1] counts not None):
        if counts.shape[0] != N_COUNTS:
            raise ValueError(f"counts: expected {N_COUNTS} (constants.Count), found {counts.shape[0]}")
        self.counts = counts
        self.sink.counts = &counts[0]
        self.sink.n_kept = 0
        self.sink.room = KEPT
        self.notices[:] = 0

    def heard(self, uint64_t now_ns, double since=-INFINITY, double until=INFINITY):
        next_batch(&self.sink.evidence, now_ns, since, until)

    def forget(self):
        forget_context(&self.sink.evidence)

    def note(self, int what, uint64_t events, uint64_t amount):
        if not 0 <= what < N_NOTICES:
            raise ValueError(f"what: expected 0 to {N_NOTICES - 1} (schema.NOTICES), found {what}")
        note(&self.sink.evidence, what, amount, self.sink.evidence.now_ns)
        self.sink.evidence.notices[what].events += events - 1

    def noticed(self):
        return self.notices.copy()

    def clock_bounds(self):
        cdef Evidence* evidence = &self.sink.evidence
        fold_clock(evidence)
        bounds = evidence.lowest, evidence.highest
        evidence.lowest = -INFINITY
        evidence.highest = INFINITY
        return None if bounds[0] == -INFINITY else bounds

    def take_unknown(self):
        taken = self.kept[: self.sink.n_kept].copy()
        self.sink.n_kept = 0
        return taken


cdef class _MessageDecoder(_Decoder):
    """Base of decoders whose input is whole board messages, which are read in place."""

    cdef Messages* messages          # in the state of the subclass
    cdef const uint8_t[::1] data
    cdef const Span[::1] spans

    def feed(self, const uint8_t[::1] buffer not None, const Span[::1] spans not None):
        cdef Messages* input = self.messages
        cdef Py_ssize_t i, size = buffer.shape[0], n = spans.shape[0]
        if input.words or input.i < input.n:
            raise ValueError(f"decoder of io_group {self.io_group}: fed before its input was used up")
        for i in range(n):
            if <Py_ssize_t>spans[i].start + <Py_ssize_t>spans[i].length > size:
                raise ValueError(
                    f"span {i}: bytes {spans[i].start} to {<Py_ssize_t>spans[i].start + <Py_ssize_t>spans[i].length} "
                    f"of a buffer of {size}"
                )
        self.data = buffer
        self.spans = spans
        input.data = &buffer[0] if size else <const uint8_t*>b""  # no NULL, because empty messages have an address, too
        input.spans = &spans[0] if n else NULL
        input.n = n
        input.i = 0

    cdef void _release(self):
        """Release the input, so that its owner may change it again."""
        cdef Messages* input = self.messages
        if input.n:
            keep_message(
                &self.sink.evidence, input.data + input.spans[input.n - 1].start, input.spans[input.n - 1].length
            )
        self.data = None
        self.spans = None
        memset(self.messages, 0, sizeof(Messages))


@cython.final
cdef class PacmanDecoder(_MessageDecoder):
    cdef Pacman board

    def __cinit__(self, *args, **kwargs):
        self._attach(&self.board.sink)
        self.messages = &self.board.messages

    def __init__(self, io_group, asic, *, format="auto", clock64=False):
        formats = {"auto": NO_FORMAT, "legacy": LEGACY, "1.0": FORMAT_1_0}
        if format not in formats:
            raise ValueError(f"format: expected one of {', '.join(formats)}, found {format!r}")
        self._identify(io_group, asic)
        self.board.fixed = formats[format]
        self.board.clock64 = bool(clock64)

    @property
    def format(self):
        return {NO_FORMAT: None, LEGACY: "legacy", FORMAT_1_0: "1.0"}[self.board.seen]

    def decode(self, rows):
        cdef Rows out = open_rows(rows, self.sink.asic, True)
        cdef Py_ssize_t made
        self._check_started()
        with nogil:
            if out.kind == KIND10:
                made = pacman_rows(&self.board, <Row10*>out.at, out.n)
            elif out.kind == KIND24:
                made = pacman_rows(&self.board, <Row24*>out.at, out.n)
            elif out.kind == KIND24_CLOCK64:
                made = pacman_rows(&self.board, <Row24Clock64*>out.at, out.n)
            else:
                made = pacman_rows(&self.board, <Row30*>out.at, out.n)
        if made < out.n:
            inspect_pacman(&self.board)
            self._release()
        return made


@cython.final
cdef class BernDecoder(_MessageDecoder):
    cdef Bern board

    def __cinit__(self, *args, **kwargs):
        self._attach(&self.board.sink)
        self.messages = &self.board.messages

    def __init__(self, io_group, asic):
        self._identify(io_group, asic)

    def decode(self, rows):
        cdef Rows out = open_rows(rows, self.sink.asic, True)
        cdef Py_ssize_t made
        self._check_started()
        with nogil:
            if out.kind == KIND10:
                made = bern_rows(&self.board, <Row10*>out.at, out.n)
            elif out.kind == KIND24:
                made = bern_rows(&self.board, <Row24*>out.at, out.n)
            elif out.kind == KIND24_CLOCK64:
                made = bern_rows(&self.board, <Row24Clock64*>out.at, out.n)
            else:
                made = bern_rows(&self.board, <Row30*>out.at, out.n)
        if made < out.n:
            inspect_bern(&self.board)
            self._release()
        return made


@cython.final
cdef class SerialDecoder(_Decoder):
    cdef Serial line
    cdef uint8_t* buffer             # bytes without a frame so far, and the bytes fed last
    cdef Py_ssize_t capacity
    cdef bint timed                  # a time row was made since start()
    cdef bint used_up

    def __cinit__(self, *args, **kwargs):
        self._attach(&self.line.sink)
        self.used_up = True

    def __init__(self, io_group, asic, *, rule="strict"):
        if rule not in ("strict", "larpix-control"):
            raise ValueError(f"rule: expected strict or larpix-control, found {rule!r}")
        self._identify(io_group, asic)
        self.line.strict = rule == "strict"

    def __dealloc__(self):
        free(self.buffer)

    def start(self, uint64_t[::1] counts not None):
        cdef Py_ssize_t pending = self.line.end - self.line.at
        _Decoder.start(self, counts)
        inherit_bytes(self.sink.counts, pending)
        self.timed = False

    def feed(self, const uint8_t[::1] buffer not None, uint64_t seconds):
        cdef Py_ssize_t size = buffer.shape[0], pending = self.line.end - self.line.at
        cdef uint8_t* grown
        self._check_started()
        if not self.used_up:
            raise ValueError(f"decoder of io_group {self.io_group}: fed before its input was used up")
        if size == 0:
            return
        if pending:
            memmove(self.buffer, self.line.at, pending)
            self.line.at = self.buffer
            self.line.end = self.buffer + pending
        if pending + size > self.capacity:
            grown = <uint8_t*>realloc(self.buffer, pending + size)
            if grown == NULL:
                raise MemoryError(f"decoder of io_group {self.io_group}: no memory for {pending + size} bytes")
            self.buffer = grown
            self.capacity = pending + size
        memcpy(self.buffer + pending, &buffer[0], size)
        self.line.at = self.buffer
        self.line.end = self.buffer + pending + size
        self.line.silent = False
        self.line.new_second = not self.timed or seconds != self.line.sink.seconds
        self.line.sink.seconds = seconds
        self.timed = True
        self.used_up = False
        receive_bytes(self.sink.counts, size)

    def flush(self):
        self.line.silent = True

    def decode(self, rows):
        cdef Rows out = open_rows(rows, self.sink.asic, True)
        cdef Py_ssize_t made
        self._check_started()
        with nogil:
            if out.kind == KIND10:
                made = serial_rows(&self.line, <Row10*>out.at, out.n)
            elif out.kind == KIND24:
                made = serial_rows(&self.line, <Row24*>out.at, out.n)
            elif out.kind == KIND24_CLOCK64:
                made = serial_rows(&self.line, <Row24Clock64*>out.at, out.n)
            else:
                made = serial_rows(&self.line, <Row30*>out.at, out.n)
        if made < out.n:
            self.used_up = True
            self.line.silent = False
        return made


def encode_serial(const uint64_t[::1] words):
    cdef Py_ssize_t i, n = words.shape[0]
    frames = bytearray(FRAME * n)
    cdef uint8_t[::1] view = frames
    for i in range(n):
        view[FRAME * i] = c's'
        memcpy(&view[FRAME * i + 1], &words[i], 8)
        view[FRAME * i + 9] = c'q'
    return bytes(frames)


_MISFITS = {
    HEADER_TIME: "its time does not fit the header",
    RECEIPT_TIME: "its receipt_timestamp does not fit the word",
    BOARD_TIME: "its timestamp does not fit the word",
    BOARD_DETAIL: "its dataword or counter has no place in the word",
}


def encode_pacman(rows, *, asic, format="legacy", clock64=False, uint64_t seconds=0):
    cdef Rows source = open_rows(rows, checked_asic(asic), False)
    cdef Writer out
    cdef Misfit misfit
    cdef uint8_t[::1] view
    cdef Span[::1] span_view
    if format not in ("legacy", "1.0"):
        raise ValueError(f"format: expected legacy or 1.0, found {format!r}")
    memset(&out, 0, sizeof(Writer))
    out.asic = asic
    out.legacy = format == "legacy"
    out.clock64 = bool(clock64)
    out.seconds = seconds
    # Every row makes at most a header or a word; a first header, and one for each full message, may be ours.
    most = 24 * (source.n + 1 + source.n // MOST_WORDS)
    if most > UINT32_MAX:
        raise ValueError(f"rows: {source.n} are too many for one buffer of messages, whose spans count in 32 bits")
    buffer = bytearray(most)
    spans = np.empty(source.n + 1 + source.n // MOST_WORDS, _SPAN)
    view = buffer
    span_view = spans
    out.begin = out.at = &view[0]
    out.spans = &span_view[0]
    with nogil:
        if source.kind == KIND10:
            misfit = write_rows(&out, <const Row10*>source.at, source.n)
        elif source.kind == KIND24:
            misfit = write_rows(&out, <const Row24*>source.at, source.n)
        elif source.kind == KIND24_CLOCK64:
            misfit = write_rows(&out, <const Row24Clock64*>source.at, source.n)
        else:
            misfit = write_rows(&out, <const Row30*>source.at, source.n)
    if misfit:
        raise ValueError(f"row {out.row} of {source.n} as a PACMAN word of format {format}: {_MISFITS[misfit]}")
    view = None
    del buffer[out.at - out.begin:]
    return buffer, spans[: out.n_spans]


def split_log(const uint8_t[::1] buffer not None):
    cdef Py_ssize_t size = buffer.shape[0], at = 0, n = 0, length
    cdef const uint8_t* data = &buffer[0] if size else NULL
    cdef Span[::1] view
    while at + 4 <= size and at + 4 + <Py_ssize_t>load32(data + at) <= size and at + 4 <= UINT32_MAX:
        at += 4 + <Py_ssize_t>load32(data + at)
        n += 1
    spans = np.empty(n, _SPAN)
    view = spans
    at = 0
    for n in range(n):
        length = load32(data + at)
        view[n].start = <uint32_t>(at + 4)
        view[n].length = <uint32_t>length
        at += 4 + length
    return spans, at


def count_words(const uint8_t[::1] buffer not None, const Span[::1] spans not None):
    cdef Py_ssize_t i, length, size = buffer.shape[0], words = 0, others = 0
    cdef const uint8_t* at
    cdef uint16_t counted
    for i in range(spans.shape[0]):
        length = spans[i].length
        if <Py_ssize_t>spans[i].start + length > size:
            raise ValueError(f"span {i}: {length} bytes from {spans[i].start} on, of a buffer of {size}")
        at = &buffer[0] + spans[i].start if length else NULL
        if length < 8 or at[0] != c'D':
            others += 1
            continue
        memcpy(&counted, at + 6, 2)
        if length == 8 + 16 * <Py_ssize_t>counted:
            words += counted
        elif length >= 24 and at[2] == 1 and at[3] == 0 and length == 24 + <Py_ssize_t>load32(at + 4) and length % 24 == 0:
            words += length // 24 - 1
        else:
            others += 1
    return words, others
