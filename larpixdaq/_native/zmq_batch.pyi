"""Many ZeroMQ messages a call: receiving into one buffer, sending out of one, without the GIL in between."""

from typing import Any, final

import numpy as np
import zmq
from numpy.typing import NDArray

@final
class Receiver:
    """Takes what waits in a SUB, PULL or DEALER socket, up to `messages` messages and `size` bytes a call.

    After `n = receive()` message i < n lies in `buffer` at `spans[i]` (dtype schema.SPAN), until the next call. The
    parts of a multipart message are joined. One that does not fit the rest of the buffer waits for the next call; one
    larger than the whole buffer is dropped and counted. `plain` keeps to pyzmq's own methods, as where libzmq's
    functions cannot be had. `emptied`: the last call ended because the socket had nothing more.
    """

    @property
    def buffer(self) -> NDArray[np.uint8]: ...
    @property
    def spans(self) -> NDArray[Any]: ...
    @property
    def native(self) -> bool: ...
    @property
    def emptied(self) -> bool: ...
    @property
    def oversized(self) -> int: ...
    @property
    def oversized_bytes(self) -> int: ...
    def __init__(
        self, socket: zmq.Socket[bytes], *, messages: int = 4096, size: int = 8388608, plain: bool = False
    ) -> None: ...
    def receive(self) -> int:
        """Take what is there, without waiting; return how many messages. zmq.ZMQError when the socket is closed."""

@final
class Sender:
    """Sends messages that lie in one buffer, without waiting."""

    @property
    def native(self) -> bool: ...
    def __init__(self, socket: zmq.Socket[bytes], *, plain: bool = False) -> None: ...
    def send(self, buffer: NDArray[np.uint8], spans: NDArray[Any]) -> int:
        """Send the messages at `spans` (dtype schema.SPAN) in order; return how many were handed over.

        Fewer than len(spans): the socket's queue is full. ValueError for a span outside of the buffer (nothing is
        sent then).
        """
