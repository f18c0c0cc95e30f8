"""Words and orders to boards that an IO class speaks to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq.sources.channel import Reply
from larpixdaq.sources.ioclass_talk import Order, Send, Sent, pack

#: Seconds that a class has to send a request.
SEND_LIMIT: Final = 10.0
#: Words of one request.
_WORDS: Final = 256


class IoClassChannel:
    """Words to the chips of one io_group, through the class's `send`; done when that has returned. With the methods of
    PACMAN_IO for registers the class also takes orders to the board, as those of a PACMAN."""

    batch = _WORDS
    identify = b""
    sockets: tuple[Any, ...] = ()  # answers come among the data

    def __init__(
        self, name: str, io_group: int, post: Callable[[bytes], bool], *, registers: bool, revision: int = 0
    ) -> None:
        """`post` sends a message to the process, or returns False."""
        self.kind = "pacman" if registers else "class"
        self.revision = revision
        self.io_group = io_group
        self.name = f"{name}, io_group {io_group}"
        self.busy = False
        self._post = post
        self._number = 0
        self._reply: Reply | None = None
        self._limit = SEND_LIMIT
        self._deadline = 0.0

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        self._number += 1
        self._ask(Send(self._number, self.io_group, io_channels.tobytes(), words.astype("<u8").tobytes()))

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        self._number += 1
        self._ask(Order(self._number, self.io_group, body), seconds)

    def _ask(self, request: Send | Order, seconds: float = 0.0) -> None:
        self._limit = SEND_LIMIT + seconds
        self._deadline = time.monotonic() + self._limit
        self._reply = None if self._post(pack(request)) else self._failed("its process takes nothing")
        self.busy = True

    def take(self) -> Reply | None:
        if self._reply is None and time.monotonic() >= self._deadline:
            self._reply = self._failed(f"not sent within {self._limit:g} s")
        self.busy = self._reply is None
        return self._reply

    def due(self) -> float | None:
        if not self.busy:
            return None
        return self._deadline if self._reply is None else 0.0

    def close(self) -> None:
        self.busy = False

    def firmware(self, answer: bytes) -> str:
        return ""

    def done(self, said: Sent) -> None:
        """The process says what became of a request."""
        if said.number == self._number and self._reply is None:
            self._reply = self._failed(said.error) if said.error else Reply(said.body)

    def lost(self, reason: str) -> None:
        """The process is gone."""
        if self.busy and self._reply is None:
            self._reply = self._failed(reason)

    def _failed(self, error: str) -> Reply:
        return Reply(b"", f"{self.name}: {error}")
