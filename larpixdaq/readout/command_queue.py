"""Commands to the boards, in the producer's loop: a queue for each board, with one request in flight.

Nothing here waits. A request is sent when its board has answered the previous request and the rows of its words are in
the ring, so that the row of a sent word precedes the chip's answer.
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

#: Maximum number of commands that wait for one board. A child process that sends more is faulty.
_MAX_WAITING: Final = 1000

#: Record rows of words about to be sent to an io_group; return how many of them had room (0: try again later).
Record = Callable[[NDArray[Any], int], int]
#: Take the result of a command: the board's answer, and the error or "".
Done = Callable[[bytes, str], None]


def sent_rows(
    words: NDArray[np.uint64], io_channels: NDArray[np.uint8], io_group: int, asic: Asic, layout: RowLayout
) -> NDArray[Any]:
    """Make the rows of words that go to the chips, direction 0, in the same order.

    Returns one row per valid word. If any word is invalid, rows and words do not correspond, and the caller must reject
    the command.
    """
    rows = np.zeros(len(words), layout.dtype)
    if "io_channel" in (layout.dtype.names or ()):
        valid = word_codec.decode(words, rows, asic=asic, io_group=io_group, direction=0)
        rows["io_channel"] = io_channels
        return rows[:valid]
    valid = 0
    for io_channel in np.unique(io_channels).tolist():  # layout 1.0 has it in a text
        of_channel = io_channels == io_channel
        decoded = rows[of_channel]
        valid += word_codec.decode(
            words[of_channel], decoded, asic=asic, io_group=io_group, io_channel=io_channel, direction=0
        )
        rows[of_channel] = decoded
    return rows[:valid]


@dataclass
class _Command:
    done: Done
    io_channels: NDArray[np.uint8]
    words: NDArray[np.uint64]
    body: bytes | None = None
    seconds: float = 0.0  # that the board needs beyond the usual limit
    sent: int = 0  # number of words sent so far


class CommandQueue:
    """Queues of commands, by io_group. Each command ends with exactly one call of its `done`, unless clear() drops it.

    `asic` and `layout` are those of the producer's rows.
    """

    def __init__(self, channels: Iterable[Channel], asic: Asic, layout: RowLayout, record: Record) -> None:
        self._channels = {channel.io_group: channel for channel in channels}
        self._asic, self._layout, self._record = asic, layout, record
        self._waiting: dict[int, deque[_Command]] = {io_group: deque() for io_group in self._channels}
        self._in_flight: dict[int, _Command] = {}  # by io_group
        self._polled: dict[int, tuple[Any, ...]] = {}
        #: A command waits or is in flight.
        self.busy = False
        #: In the last turn words were not sent, because their rows had no room.
        self.blocked = False

    def send_words(self, io_group: int, io_channels: bytes, words: bytes, done: Done) -> None:
        """Send words to chips: 8 bytes a word, and one io_channel (1 byte) for each word."""
        if len(words) != 8 * len(io_channels):
            done(b"", f"expected 8 bytes a word, found {len(words)} for {len(io_channels)} io_channels")
            return
        channels = np.frombuffer(io_channels, np.uint8)
        self._add(io_group, _Command(done, channels, np.frombuffer(words, "<u8").astype(np.uint64)))

    def send_order(self, io_group: int, body: bytes, done: Done, seconds: float = 0.0) -> None:
        """Send an order to the board itself. The board needs `seconds` for it beyond the usual limit."""
        no_words = np.zeros(0, np.uint64)
        self._add(io_group, _Command(done, no_words.astype(np.uint8), no_words, body, seconds))

    def clear(self) -> None:
        """Drop all commands, because their sender has died. The answer to a request in flight will be ignored."""
        for waiting in self._waiting.values():
            waiting.clear()
        self._in_flight.clear()

    def work(self) -> None:
        """Take the boards' answers and send the next requests; called once in each turn of the loop."""
        if not self.busy:
            return
        self.busy = False
        self.blocked = False
        for io_group, channel in self._channels.items():
            waiting = self._waiting[io_group]
            if channel.busy and (reply := channel.take()) is not None:
                command = self._in_flight.pop(io_group, None)
                if command is not None and (reply.error or command.sent >= len(command.words)):
                    waiting.popleft()
                    command.done(reply.body, reply.error)
            if not channel.busy and waiting:
                self._send(channel, waiting)
            self.busy |= channel.busy or bool(waiting)

    def watch(self, poller: zmq.Poller) -> None:
        """Have the poller poll exactly the sockets on which answers may come."""
        for io_group, channel in self._channels.items():
            keep_polled(poller, self._polled, io_group, channel.sockets if channel.busy else ())

    def due(self) -> list[float]:
        """Times (monotonic seconds) at which work() must be called even if no socket is readable."""
        if not self.busy:
            return []
        times = [channel.due() for channel in self._channels.values() if channel.busy]
        return [moment for moment in times if moment is not None]

    def _add(self, io_group: int, command: _Command) -> None:
        if io_group not in self._channels:
            others = ", ".join(map(str, self._channels)) or "none"
            command.done(b"", f"io_group {io_group} takes no commands; those that do: {others}")
        elif len(self._waiting[io_group]) >= _MAX_WAITING:
            command.done(b"", f"io_group {io_group}: {_MAX_WAITING} commands wait already")
        else:
            self._waiting[io_group].append(command)
            self.busy = True

    def _send(self, channel: Channel, waiting: deque[_Command]) -> None:
        command = waiting[0]
        if command.body is not None:
            self._in_flight[channel.io_group] = command
            channel.send_raw(command.body, command.seconds)
            return
        words = command.words[command.sent : command.sent + channel.batch]
        if not len(words):
            waiting.popleft()
            command.done(b"", "")
            return
        io_channels = command.io_channels[command.sent : command.sent + channel.batch]
        rows = sent_rows(words, io_channels, channel.io_group, self._asic, self._layout)
        if len(rows) != len(words):
            waiting.popleft()
            command.done(b"", f"{channel.name}: {len(words) - len(rows)} words are not valid for these chips")
            return
        n = self._record(rows, channel.io_group)
        if n == 0:
            self.blocked = True
            return
        command.sent += n
        self._in_flight[channel.io_group] = command
        channel.send_words(io_channels[:n], words[:n])
