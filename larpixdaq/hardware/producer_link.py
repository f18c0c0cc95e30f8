"""The child's way to its producer: what it sends, and what came back until somebody takes it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq.errors import RequestError
from larpixdaq.protocol import hardware

#: Rows that wait for a routine which listens and does not take them (bytes); what comes then is left out.
_MOST_ROWS: Final = 64 << 20


class BoardError(RequestError):
    """A board did not take what was sent to it, or did not answer; the text says which and why."""

    code = "component"


class ProducerPipe:
    """One for the life of the child. put() is called by the thread that reads the socket, all else by the worker."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._rows: list[NDArray[Any]] = []
        self._bytes = 0
        self._answered: dict[int, hardware.Answered] = {}
        self._awaited: set[int] = set()
        self._command = 0
        self._listening = hardware.NOTHING
        #: Rows that found no room since listen().
        self.left_out = 0
        #: Told of io_groups whose chips lose what they hold.
        self.doubted: Callable[[list[int]], None] = lambda io_groups: None
        self.setup = hardware.Setup([], "2", schema.Asic.V2, 2)

    @property
    def layout(self) -> schema.RowLayout:
        return schema.layout(self.setup.layout)

    def send(self, message: hardware.FromChild) -> None:
        data = hardware.pack(message)
        with self._sending:
            self._sock.sendall(data)

    def listen(self, what: int) -> None:
        """From now on these rows (hardware.NOTHING, ANSWERS, EVERYTHING); what waits of others is forgotten."""
        with self._changed:
            self._listening = what
            self._rows.clear()
            self._bytes = self.left_out = 0
        self.send(hardware.Listen(what))

    def words(self, io_group: int, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> int:
        """Send words to chips; returns the command's number, for finished()."""
        number = self._number()
        channels = np.asarray(io_channels, np.uint8).tobytes()
        self.send(hardware.SendWords(number, io_group, channels, np.asarray(words, "<u8").tobytes()))
        return number

    def ask(self, io_group: int, body: bytes, seconds: float = 0.0) -> bytes:
        """What the board says to this order; BoardError when it says nothing. `seconds`: what the board needs for it
        beyond the usual limit."""
        number = self.post(io_group, body, seconds)
        return self.finished(number)

    def post(self, io_group: int, body: bytes, seconds: float = 0.0) -> int:
        """Send an order to a board without waiting for its answer, which finished() has then."""
        number = self._number()
        self.send(hardware.BoardOrder(number, io_group, body, seconds))
        return number

    def finished(self, number: int) -> bytes:
        """Wait until this command has been done; BoardError when it failed."""
        with self._changed:
            while number not in self._answered:
                self._changed.wait()
            return self._result(number)

    def poll(self, number: int) -> bool:
        """Whether the command has been done; BoardError when it failed."""
        with self._changed:
            if number not in self._answered:
                return False
            self._result(number)
            return True

    def doubt(self, io_groups: list[int]) -> None:
        """The chips of these boards are about to be reset, or to get or lose their power."""
        self.send(hardware.Doubt(io_groups))
        self.doubted(io_groups)

    def rows(self) -> list[NDArray[Any]]:
        """The rows that came since listen() or the last call."""
        with self._changed:
            rows, self._rows = self._rows, []
            self._bytes = 0
            return rows

    def wait(self, until: float) -> None:
        """Until something has come that was not taken yet, or the time (monotonic seconds) has."""
        with self._changed:
            if not self._rows and not self._answered:
                self._changed.wait(max(0.0, until - time.monotonic()))

    def put(self, message: hardware.ListenedRows | hardware.Answered) -> None:
        with self._changed:
            if isinstance(message, hardware.Answered):
                if message.command in self._awaited:
                    self._answered[message.command] = message
            elif self._listening != hardware.NOTHING:
                self.left_out += message.left_out
                rows = np.frombuffer(message.rows, self.layout.dtype)
                if self._bytes + rows.nbytes > _MOST_ROWS:  # but for answers, for a while: as the producer has it
                    kept = hardware.answers_in(rows) if self._bytes <= 2 * _MOST_ROWS else rows[:0]
                    self.left_out += len(rows) - len(kept)
                    rows = kept
                if len(rows):
                    self._rows.append(rows)
                    self._bytes += rows.nbytes
            self._changed.notify_all()

    def forget(self) -> None:
        """A request is over: what still comes of its commands is nobody's."""
        with self._changed:
            self._answered.clear()
            self._awaited.clear()
        if self._listening != hardware.NOTHING:
            self.listen(hardware.NOTHING)

    def _number(self) -> int:
        with self._changed:
            self._command += 1
            self._awaited.add(self._command)
            return self._command

    def _result(self, number: int) -> bytes:
        self._awaited.discard(number)
        answered = self._answered.pop(number)
        if answered.error:
            raise BoardError(answered.error)
        return answered.reply
