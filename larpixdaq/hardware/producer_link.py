"""The child's side of the connection to its producer: sends commands to boards, receives answers and rows."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq.errors import RequestError
from larpixdaq.protocol import hardware

#: Maximum bytes of rows that wait for a routine that listens but does not take them. Further rows are left out.
_MOST_ROWS: Final = 64 << 20


class BoardError(RequestError):
    """A board did not accept a command or did not answer. The text names the board and the reason."""

    code = "component"


class ProducerPipe:
    """The connection; the child has one. The thread that reads the socket calls put(), the main thread all the rest."""

    def __init__(self, sock: socket.socket, setup: hardware.Setup) -> None:
        """`setup`: the producer's first message."""
        self.setup = setup
        self._dtype = schema.layout(setup.layout).dtype
        self._sock = sock
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._rows: list[NDArray[Any]] = []
        self._bytes = 0
        self._answered: dict[int, hardware.CommandDone] = {}
        self._awaited: set[int] = set()
        self._command = 0
        self._listening = hardware.NO_ROWS
        #: Number of rows that were left out since listen().
        self.left_out = 0

    def send(self, message: hardware.FromChild) -> None:
        data = hardware.pack(message)
        with self._sending:
            self._sock.sendall(data)

    def listen(self, what: int) -> None:
        """Select the rows to get from now on (hardware.NO_ROWS, CONFIG_ANSWERS, ALL_ROWS). Drops rows that wait."""
        with self._changed:
            self._listening = what
            self._rows.clear()
            self._bytes = self.left_out = 0
        self.send(hardware.Listen(what))

    def send_words(self, io_group: int, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> int:
        """Send words to chips. Returns the number of the command, for await_answer() and poll()."""
        number = self._number()
        channels = np.asarray(io_channels, np.uint8).tobytes()
        self.send(hardware.SendWords(number, io_group, channels, np.asarray(words, "<u8").tobytes()))
        return number

    def ask(self, io_group: int, body: bytes, seconds: float = 0.0) -> bytes:
        """Send an order to a board and return its answer; BoardError if there is none.

        `seconds`: time that the board needs beyond the usual limit.
        """
        number = self.post(io_group, body, seconds)
        return self.await_answer(number)

    def post(self, io_group: int, body: bytes, seconds: float = 0.0) -> int:
        """Send an order to a board without waiting for its answer. Returns the command's number, for await_answer()."""
        number = self._number()
        self.send(hardware.BoardOrder(number, io_group, body, seconds))
        return number

    def await_answer(self, number: int) -> bytes:
        """Wait for the end of a command. Returns the board's answer; BoardError if the command failed."""
        with self._changed:
            while number not in self._answered:
                self._changed.wait()
            return self._result(number)

    def poll(self, number: int) -> bool:
        """Return whether the command has ended; BoardError if it failed."""
        with self._changed:
            if number not in self._answered:
                return False
            self._result(number)
            return True

    def rows(self) -> list[NDArray[Any]]:
        """Return the rows that came since listen() or the last call."""
        with self._changed:
            rows, self._rows = self._rows, []
            self._bytes = 0
            return rows

    def wait(self, until: float) -> None:
        """Wait until rows or answers are there, or until the time `until` (monotonic seconds)."""
        with self._changed:
            if not self._rows and not self._answered:
                self._changed.wait(max(0.0, until - time.monotonic()))

    def put(self, message: hardware.ListenedRows | hardware.CommandDone) -> None:
        """Take a message of the producer."""
        with self._changed:
            if isinstance(message, hardware.CommandDone):
                if message.command in self._awaited:
                    self._answered[message.command] = message
            elif self._listening != hardware.NO_ROWS:
                self.left_out += message.left_out
                rows = np.frombuffer(message.rows, self._dtype)
                if self._bytes + rows.nbytes > _MOST_ROWS:  # answers up to twice the limit, as in supervisor.Child
                    kept = hardware.config_answers(rows) if self._bytes <= 2 * _MOST_ROWS else rows[:0]
                    self.left_out += len(rows) - len(kept)
                    rows = kept
                if len(rows):
                    self._rows.append(rows)
                    self._bytes += rows.nbytes
            self._changed.notify_all()

    def forget(self) -> None:
        """Drop all commands and rows at the end of a request."""
        with self._changed:
            self._answered.clear()
            self._awaited.clear()
        if self._listening != hardware.NO_ROWS:
            self.listen(hardware.NO_ROWS)

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
