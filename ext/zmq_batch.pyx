"""Receive many ZeroMQ messages into one buffer, or send many from one, in one call without the GIL.

Boards send mostly messages of one word (24 bytes), so the cost per message matters. pyzmq returns to the interpreter for
each message, this module once per batch. libzmq is not linked: its functions are those that pyzmq's extension module has
loaded, so that both work on the same sockets. Without them pyzmq's methods do the same work more slowly (`native` is False).
The interface is documented in zmq_batch.pyi.
"""

import ctypes

import zmq

cimport cython
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove
from row_structs cimport Span

ctypedef int (*msg_call_t)(void *message) noexcept nogil
ctypedef int (*msg_recv_t)(void *message, void *socket, int flags) noexcept nogil
ctypedef size_t (*msg_size_t)(const void *message) noexcept nogil
ctypedef void *(*msg_data_t)(void *message) noexcept nogil
ctypedef int (*send_t)(void *socket, const void *data, size_t size, int flags) noexcept nogil

cdef msg_call_t msg_init = NULL
cdef msg_call_t msg_close = NULL
cdef msg_call_t msg_more = NULL
cdef msg_recv_t msg_recv = NULL
cdef msg_size_t msg_size = NULL
cdef msg_data_t msg_data = NULL
cdef send_t zmq_send = NULL
cdef int DONTWAIT = zmq.DONTWAIT
cdef int SNDMORE = zmq.SNDMORE


cdef size_t _address(library, str name) except 0:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


def _socket_class():
    """Load libzmq's functions. Returns the class of sockets that they accept, or None without these functions."""
    global msg_init, msg_close, msg_more, msg_recv, msg_size, msg_data, zmq_send
    # A zmq_msg_t has 64 bytes since libzmq 4.1. pyzmq's wheels have newer versions, but it can be built with an older one.
    if zmq.zmq_version_info() < (4, 1):
        return None
    try:
        from zmq.backend.cython import _zmq

        library = ctypes.CDLL(_zmq.__file__)
        msg_init = <msg_call_t>_address(library, "zmq_msg_init")
        msg_close = <msg_call_t>_address(library, "zmq_msg_close")
        msg_more = <msg_call_t>_address(library, "zmq_msg_more")
        msg_recv = <msg_recv_t>_address(library, "zmq_msg_recv")
        msg_size = <msg_size_t>_address(library, "zmq_msg_size")
        msg_data = <msg_data_t>_address(library, "zmq_msg_data")
        zmq_send = <send_t>_address(library, "zmq_send")
    except (ImportError, OSError, AttributeError):
        return None
    return _zmq.Socket


_NATIVE = _socket_class()


def _is_native(socket):
    return _NATIVE is not None and isinstance(socket, _NATIVE)


def drop_rest(socket):
    cdef uint64_t message[8]
    cdef void *handle
    cdef size_t dropped = 0
    cdef bint more
    if socket.closed:
        raise zmq.ZMQError(zmq.ENOTSOCK)
    more = socket.getsockopt(zmq.RCVMORE)
    if not _is_native(socket):
        while socket.getsockopt(zmq.RCVMORE):
            socket.recv(zmq.DONTWAIT)
            dropped += 1
        return dropped
    handle = <void *><size_t>socket.underlying
    with nogil:
        while more:
            msg_init(message)
            if msg_recv(message, handle, DONTWAIT) >= 0:
                dropped += 1
                more = msg_more(message)
            elif errno != EINTR:
                more = False
            msg_close(message)
    return dropped


def send_parts(socket, *parts):
    cdef size_t i, n = len(parts)
    cdef const uint8_t[::1] data
    cdef const void *at
    cdef size_t size
    cdef int flags, error
    cdef void *handle
    if not _is_native(socket) or socket.closed:
        socket.send_multipart(parts, zmq.DONTWAIT)
        return
    handle = <void *><size_t>socket.underlying
    for i in range(n):
        data = parts[i]
        size = data.shape[0]
        at = &data[0] if size else NULL
        flags = DONTWAIT | (SNDMORE if i + 1 < n else 0)
        error = EINTR
        with nogil:
            while error == EINTR:
                error = errno if zmq_send(handle, at, size, flags) < 0 else 0
        if error:
            raise zmq.Again() if error == EAGAIN else zmq.ZMQError(error)


@cython.final
cdef class Receiver:
    """Receives the queued messages of a SUB, PULL or DEALER socket."""

    cdef object _socket
    cdef object _held_part       # with pyzmq's methods: (part, whether more parts follow) without room in the buffer
    cdef void *_handle
    cdef uint64_t _message[8]
    cdef bint _held              # _message is a part without room in the buffer
    cdef bint _dropping          # the rest of this message is dropped
    cdef uint8_t[::1] _bytes
    cdef Span[::1] _spans
    cdef size_t _capacity
    cdef size_t _start           # of the message that is being received
    cdef size_t _fill            # end of the bytes received
    cdef size_t _count
    cdef size_t _limit
    cdef readonly object buffer
    cdef readonly object spans
    cdef readonly bint native
    cdef readonly bint emptied
    cdef readonly uint64_t oversized
    cdef readonly uint64_t oversized_bytes

    def __init__(self, socket, *, messages=4096, size=8 << 20):
        if self.buffer is not None:
            raise TypeError("Receiver: __init__ called twice")
        if messages < 1 or not 1 <= size < 1 << 32:
            raise ValueError(f"Receiver: needs messages >= 1 and 1 <= size < 2^32, found {messages} and {size}")
        import numpy as np  # late, because core and log use only drop_rest()

        self.native = _is_native(socket)
        self._socket = socket
        self._handle = <void *><size_t>socket.underlying if self.native else NULL
        self.buffer = np.empty(size, np.uint8)
        self.spans = np.zeros(messages, [("start", "<u4"), ("length", "<u4")])
        self._bytes = self.buffer
        self._spans = self.spans
        self._capacity = size
        self._limit = messages

    def __dealloc__(self):
        if self._held:
            msg_close(self._message)

    def receive(self):
        if self.buffer is None or self._socket.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        if self._fill > self._start:
            # the first parts of a message whose next part had no room
            memmove(&self._bytes[0], &self._bytes[self._start], self._fill - self._start)
        self._fill -= self._start
        self._start = 0
        self._count = 0
        self.emptied = False
        cdef int error
        if self.native:
            with nogil:
                error = self._receive()
        else:
            error = self._receive_plain()
        if error and self._count == 0:
            raise zmq.ContextTerminated() if error == zmq.ETERM else zmq.ZMQError(error)
        return self._count

    cdef int _receive(self) noexcept nogil:
        while self._count < self._limit:
            if not self._held:
                msg_init(self._message)
                if msg_recv(self._message, self._handle, DONTWAIT) < 0:
                    msg_close(self._message)
                    if errno == EINTR:
                        continue
                    self.emptied = errno == EAGAIN
                    return 0 if self.emptied else errno
            self._held = not self._append(
                msg_data(self._message), msg_size(self._message), msg_more(self._message) != 0
            )
            if self._held:
                return 0
            msg_close(self._message)
        return 0

    def _receive_plain(self):
        cdef const uint8_t[::1] data
        while self._count < self._limit:
            part = self._held_part
            if part is None:
                try:
                    part = self._socket.recv(zmq.DONTWAIT), bool(self._socket.getsockopt(zmq.RCVMORE))
                except zmq.Again:
                    self.emptied = True
                    return 0
                except zmq.ZMQError as error:
                    return error.errno
            data = part[0]
            if not self._append(&data[0] if len(data) else NULL, len(data), part[1]):
                self._held_part = part
                return 0
            self._held_part = None
        return 0

    cdef bint _append(self, const void *data, size_t size, bint more) noexcept nogil:
        """Append a part of a message. Returns False when it must wait for the next call."""
        if not self._dropping:
            if self._fill - self._start + size > self._capacity:
                self.oversized_bytes += self._fill - self._start
                self._fill = self._start
                self._dropping = True
            elif self._fill + size > self._capacity:
                return False
        if self._dropping:
            self.oversized_bytes += size
            if not more:
                self.oversized += 1
                self._dropping = False
            return True
        if size:
            memcpy(&self._bytes[self._fill], data, size)
        self._fill += size
        if not more:
            self._spans[self._count].start = <uint32_t>self._start
            self._spans[self._count].length = <uint32_t>(self._fill - self._start)
            self._count += 1
            self._start = self._fill
        return True


@cython.final
cdef class Sender:
    """Sends messages of one buffer without waiting."""

    cdef object _socket
    cdef void *_handle
    cdef readonly bint native

    def __init__(self, socket):
        self.native = _is_native(socket)
        self._socket = socket
        self._handle = <void *><size_t>socket.underlying if self.native else NULL

    def send(self, buffer, spans):
        cdef const uint8_t[::1] data = buffer
        cdef const Span[::1] parts = spans
        cdef size_t i, sent = 0, n = parts.shape[0], size = data.shape[0]
        cdef int error = 0
        if self._socket is None or self._socket.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        for i in range(n):
            if <uint64_t>parts[i].start + parts[i].length > size:
                raise ValueError(f"message {i}: span {spans[i]} lies outside of the buffer of {size} bytes")
        if n == 0 or size == 0 or not self.native:
            return self._send_plain(buffer, spans)
        with nogil:
            while sent < n:
                # the start of an empty message may equal size, so this is address arithmetic, not an index
                if zmq_send(self._handle, &data[0] + parts[sent].start, parts[sent].length, DONTWAIT) >= 0:
                    sent += 1
                elif errno != EINTR:
                    error = errno
                    break
        if error and error != EAGAIN and sent == 0:
            raise zmq.ContextTerminated() if error == zmq.ETERM else zmq.ZMQError(error)
        return sent

    def _send_plain(self, buffer, spans):
        data = memoryview(buffer)
        for sent, (start, length) in enumerate(spans.tolist()):
            try:
                self._socket.send(data[start : start + length], zmq.DONTWAIT)
            except zmq.ZMQError as error:
                if sent or error.errno == zmq.EAGAIN:
                    return sent
                raise
        return len(spans)
