"""Receive many ZeroMQ messages into one buffer, or send many from one, in one call without the GIL."""

from typing import Any, final

import numpy as np
import zmq
from numpy.typing import NDArray

def drop_rest(socket: zmq.Socket[bytes]) -> int:
    """Drop the further parts of the message of which a part was received last. Returns their number."""

def send_parts(socket: zmq.Socket[bytes], *parts: bytes | memoryview) -> None:
    """Send a message of these parts without waiting. The parts are copied. zmq.ZMQError when it cannot be sent."""

@final
class Receiver:
    """Receives the queued messages of a SUB, PULL or DEALER socket, up to `messages` messages and `size` bytes per
    call.

    After `n = receive()` message i < n is in `buffer` (shape (size,), u1) at `spans[i]` (dtype schema.SPAN), until the
    next call. The parts of a multipart message are joined. A message without room in the rest of the buffer waits for
    the next call; a message larger than the whole buffer is dropped and counted.
    """

    @property
    def buffer(self) -> NDArray[np.uint8]: ...
    @property
    def spans(self) -> NDArray[Any]: ...
    @property
    def native(self) -> bool:
        """Whether libzmq's functions are used, not pyzmq's methods."""
    @property
    def emptied(self) -> bool:
        """Whether the last call ended because the socket had no more messages."""
    @property
    def oversized(self) -> int:
        """Number of messages dropped so far."""
    @property
    def oversized_bytes(self) -> int:
        """Their bytes."""
    def __init__(self, socket: zmq.Socket[bytes], *, messages: int = 4096, size: int = 8388608) -> None: ...
    def receive(self) -> int:
        """Receive queued messages without waiting. Returns their number. zmq.ZMQError when the socket is closed."""

@final
class Sender:
    """Sends messages of one buffer without waiting."""

    @property
    def native(self) -> bool: ...
    def __init__(self, socket: zmq.Socket[bytes]) -> None: ...
    def send(self, buffer: NDArray[np.uint8], spans: NDArray[Any]) -> int:
        """Send the messages at `spans` (dtype schema.SPAN) of `buffer` in order. Returns the number of messages sent.

        It is less than len(spans) when the socket's queue is full. ValueError, with no message sent, for a span outside
        of the buffer.
        """
