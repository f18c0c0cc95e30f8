"""The commands to the boards, in the producer's loop: a queue for each board, with one request in flight.

Nothing here waits. A request goes out when its board has answered the previous one and the rows of its words are in the
stream, so that the row of a sent word precedes the chip's answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import zmq
from numpy.typing import NDArray

from larpixdaq._native import word_codec
from larpixdaq.runtime.event_loop import keep_polled
from larpixdaq.schema import Asic, RowLayout
from larpixdaq.sources.command_channel import Channel

#: Maximum number of commands that wait for one board; a child process that sends more is faulty.
_MOST_WAITING: Final = 1000

#: Records rows of words about to be sent to an io_group; returns the number of rows that had room (0: try again).
Record = Callable[[NDArray[Any], int], int]
#: Takes the outcome of a command: the board's answer, and the error or "".
Done = Callable[[bytes, str], None]


def sent_rows(
    words: NDArray[np.uint64], io_channels: NDArray[np.uint8], io_group: int, asic: Asic, layout: RowLayout
) -> NDArray[Any]:
    """The rows of words on their way to the chips, direction 0, in the same order."""
    rows = np.zeros(len(words), layout.dtype)
    if "io_channel" in (layout.dtype.names or ()):
        made = word_codec.decode(words, rows, asic=asic, io_group=io_group, direction=0)
        if made == len(words):
            rows["io_channel"] = io_channels
            return rows
    kept = np.zeros(len(words), bool)
    for io_channel in np.unique(io_channels).tolist():  # layout 1.0 has it in a text; v3 has impossible words
        for at in np.flatnonzero(io_channels == io_channel).tolist():
            one = rows[at : at + 1]
            made = word_codec.decode(
                words[at : at + 1], one, asic=asic, io_group=io_group, io_channel=io_channel, direction=0
            )
            kept[at] = made == 1
    return rows[kept]


@dataclass
class _Command:
    done: Done
    io_channels: NDArray[np.uint8]
    words: NDArray[np.uint64]
    body: bytes | None = None
    seconds: float = 0.0  # that the board needs beyond the usual limit
    at: int = 0  # number of words sent so far


class CommandQueue:
    """`asic` and `layout` are those of the producer's rows. Each command ends with exactly one call of its `done`,
    unless forget() drops it."""

    def __init__(self, channels: Iterable[Channel], asic: Asic, layout: RowLayout, record: Record) -> None:
        self._channels = {channel.io_group: channel for channel in channels}
        self._asic, self._layout, self._record = asic, layout, record
        self._waiting: dict[int, deque[_Command]] = {io_group: deque() for io_group in self._channels}
        self._flying: dict[int, _Command] = {}  # by io_group, the command whose request is in flight
        self._watched: dict[int, tuple[Any, ...]] = {}
        #: Anything waits or is in flight.
        self.busy = False
        #: Words could not be sent in the last turn, because their rows had no room.
        self.blocked = False

    def words(self, io_group: int, io_channels: bytes, words: bytes, done: Done) -> None:
        """Send words of 8 bytes, one for each io_channel."""
        if len(words) != 8 * len(io_channels):
            done(b"", f"expected 8 bytes a word, found {len(words)} for {len(io_channels)} io_channels")
            return
        channels = np.frombuffer(io_channels, np.uint8)
        self._add(io_group, _Command(done, channels, np.frombuffer(words, "<u8").astype(np.uint64)))

    def ask(self, io_group: int, body: bytes, done: Done, seconds: float = 0.0) -> None:
        """Send an order to the board itself, which needs `seconds` for it beyond the usual limit."""
        nothing = np.zeros(0, np.uint64)
        self._add(io_group, _Command(done, nothing.astype(np.uint8), nothing, body, seconds))

    def forget(self) -> None:
        """Drop all commands, because their sender has died; the board's answer to a request in flight is ignored."""
        for waiting in self._waiting.values():
            waiting.clear()
        self._flying.clear()

    def work(self) -> None:
        """The loop's turn: take answers, send what may be sent."""
        if not self.busy:
            return
        self.busy = False
        self.blocked = False
        for io_group, channel in self._channels.items():
            waiting = self._waiting[io_group]
            if channel.busy:
                reply = channel.take()
                command = self._flying.pop(io_group, None) if reply is not None else None
                if reply is not None and command is not None and (reply.error or command.at >= len(command.words)):
                    waiting.popleft()
                    command.done(reply.body, reply.error)
            if not channel.busy and waiting:
                self._send(channel, waiting)
            self.busy |= channel.busy or bool(waiting)

    def watch(self, poller: zmq.Poller) -> None:
        """Keep the poller to the sockets on which answers may come."""
        for io_group, channel in self._channels.items():
            keep_polled(poller, self._watched, io_group, channel.sockets if channel.busy else ())

    def due(self) -> list[float]:
        """When work() wants to be called although no socket is readable (monotonic seconds)."""
        if not self.busy:
            return []
        times = [channel.due() for channel in self._channels.values() if channel.busy]
        return [moment for moment in times if moment is not None]

    def _add(self, io_group: int, command: _Command) -> None:
        if io_group not in self._channels:
            there = ", ".join(map(str, self._channels)) or "none"
            command.done(b"", f"io_group {io_group} takes no commands; those that do: {there}")
        elif len(self._waiting[io_group]) >= _MOST_WAITING:
            command.done(b"", f"io_group {io_group}: {_MOST_WAITING} commands wait already")
        else:
            self._waiting[io_group].append(command)
            self.busy = True

    def _send(self, channel: Channel, waiting: deque[_Command]) -> None:
        command = waiting[0]
        if command.body is not None:
            self._flying[channel.io_group] = command
            channel.send_raw(command.body, command.seconds)
            return
        words = command.words[command.at : command.at + channel.batch]
        if not len(words):
            waiting.popleft()
            command.done(b"", "")
            return
        io_channels = command.io_channels[command.at : command.at + channel.batch]
        rows = sent_rows(words, io_channels, channel.io_group, self._asic, self._layout)
        if len(rows) != len(words):
            waiting.popleft()
            command.done(b"", f"{channel.name}: {len(words) - len(rows)} words are none for these chips")
            return
        n = self._record(rows, channel.io_group)
        if n == 0:
            self.blocked = True
            return
        command.at += n
        self._flying[channel.io_group] = command
        channel.send_words(io_channels[:n], words[:n])
