"""The child's side of the connection to its producer: commands to boards out, answers and rows back."""

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

#: Maximum bytes of rows that wait for a routine that listens but does not take them; further rows are left out.
_MOST_ROWS: Final = 64 << 20


class BoardError(RequestError):
    """A board did not accept a command, or did not answer; the text says which board, and why."""

    code = "component"


class ProducerPipe:
    """One for the life of the child. The thread that reads the socket calls put(); all else belongs to the worker."""

    def __init__(self, sock: socket.socket, setup: hardware.Setup) -> None:
        """`setup` is the producer's first message."""
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
        #: Rows that were left out since listen().
        self.left_out = 0

    def send(self, message: hardware.FromChild) -> None:
        data = hardware.pack(message)
        with self._sending:
            self._sock.sendall(data)

    def listen(self, what: int) -> None:
        """From now on these rows (hardware.NO_ROWS, CONFIG_ANSWERS, ALL_ROWS); what waits of others is forgotten."""
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

    def put(self, message: hardware.ListenedRows | hardware.CommandDone) -> None:
        with self._changed:
            if isinstance(message, hardware.CommandDone):
                if message.command in self._awaited:
                    self._answered[message.command] = message
            elif self._listening != hardware.NO_ROWS:
                self.left_out += message.left_out
                rows = np.frombuffer(message.rows, self._dtype)
                if self._bytes + rows.nbytes > _MOST_ROWS:  # but for answers, for a while: as the producer has it
                    kept = hardware.config_answers(rows) if self._bytes <= 2 * _MOST_ROWS else rows[:0]
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
