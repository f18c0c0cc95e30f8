"""One emulated board: its sockets, its pace, and the count of what was really sent.

What an emulated board does wrong on request, and its own exact count of it.

Recorded board messages, to be sent again byte for byte.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import zmq
from numpy.typing import NDArray

from larpixdaq._native import board_emulator, zmq_batch
from larpixdaq._native.decoders import split_log
from larpixdaq.emulators.board_registers import BoardRegisters, ServerCrashError
from larpixdaq.emulators.command_server import CommandServer
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.runtime.timing import Pace

#: A turn makes at most this many words, so that other boards, commands and signals get theirs.
BATCH = 16_384
#: What a data server needs per message (20 us), in ticks of 10 MHz: what comes meanwhile is in its next message.
SERVICE_TICKS = 200
#: Without --lossless: messages that wait for a subscriber, as many as on a board, and messages sent at once, before the
#: I/O thread gets a moment.
QUEUE = 100
BURST = 64
BURST_PAUSE = 50e-6
#: With --lossless: what may wait in a board's queue, about.
QUEUE_BYTES = 4 << 20
#: Seconds that a board may be late before it makes its messages longer.
LATE = 0.01
#: Seconds between two turns of a board that keeps up: busy enough, and the machine has other work.
TURN = 0.001
#: Milliseconds that a board that goes away gives what it has sent to arrive.
GOODBYE = 5000
#: Maximum bytes of a request: the largest PACMAN message has 1 MiB.
LARGEST_REQUEST = 2 << 20
#: Seconds until a full queue is tried again: XPUB does not say when it has room.
RETRY = 0.001
#: Words that a header claims too many, at most.
LIE: Final = 5


class MessageSource(Protocol):
    """Where the messages come from: emulate.PacmanBoard or Recording."""

    @property
    def buffer(self) -> NDArray[np.uint8]: ...
    @property
    def spans(self) -> NDArray[Any]: ...
    @property
    def receipt(self) -> int: ...
    @property
    def full(self) -> int: ...
    @property
    def left(self) -> bool: ...
    def fill(self, words: int, per_message: int = 0, window: int = 0) -> int: ...
    def jump(self, seconds: int) -> None: ...
    def restart(self) -> None: ...


class EmulatedBoard:
    """`turn()` sends what is due. `sent` counts words by type and messages, after they were handed to ZeroMQ."""

    def __init__(
        self,
        io_group: int,
        words: MessageSource,
        registers: BoardRegisters,
        *,
        rate: float | None,
        per_message: int,
        lossless: bool,
        limit: int | None,
        faults: Faults | None = None,
        queue: int = QUEUE,
        transmit: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        """`limit`: words to send, None: until told to stop. `per_message` 0: as the real data server does."""
        self.io_group = io_group
        self.sent = {"words": 0, "D": 0, "S": 0, "T": 0, "messages": 0}
        self.finished = False
        registers.clock = lambda: self._words.receipt
        self.commands = CommandServer(registers, transmit)
        self.crashed = False  # its command server
        self._reply = b""
        self._reply_at = float("inf")
        self._words = words
        self._pace = Pace(rate, 1.0 + per_message / rate) if rate else None
        self._per_message = per_message
        self._lossless = lossless
        self._queue = queue
        self._left = limit
        self._behind = False
        self._spans: NDArray[Any] = words.spans[:0]
        self._faults = faults
        self._began: float | None = None
        #: Seconds that the clock for the headers, which begins with a whole second, is behind.
        self._late = (time.time() - words.receipt / 1e7) % 1.0
        self._stopped_at: float | None = time.monotonic()  # nothing is made since then, and its clock stands still
        self._back_at: float | None = None  # when it is away
        self._topics: set[bytes] = set()

    def open(self, context: zmq.Context[Any], host: str, data_port: int, command_port: int) -> tuple[int, int]:
        """Bind both sockets (port 0: any free one) and return their ports. ConfigError names a port that is busy."""
        self._context = context
        self.command = context.socket(zmq.REP)
        self._open_data()
        port = self._bind(self.data, "data", f"tcp://{host}:{data_port}")
        self._data_address = f"tcp://{host}:{port}"
        return port, self._bind(self.command, "command", f"tcp://{host}:{command_port}")

    def _open_data(self) -> None:
        self.data = self._context.socket(zmq.XPUB)
        if self._lossless:
            self.data.setsockopt(zmq.XPUB_NODROP, 1)
            message = 8 + 16 * (self._per_message or 400)
            self.data.setsockopt(zmq.SNDHWM, min(100_000, max(100, QUEUE_BYTES // message)))
        else:
            self.data.setsockopt(zmq.SNDHWM, self._queue)
        self._sender = zmq_batch.Sender(self.data)

    def _bind(self, socket: zmq.Socket[bytes], what: str, address: str) -> int:
        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_REQUEST)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            text = zmq.strerror(error.errno or 0)
            raise ConfigError(f"io_group {self.io_group}: cannot bind its {what} port {address}: {text}") from None
        endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    def counts(self) -> dict[str, int]:
        """What was sent, and what was done wrong on request."""
        full = {"full": self._words.full} if self._words.full else {}
        crashed = {"server_crashes": 1} if self.crashed else {}
        return self.sent | full | crashed | (self._faults.count if self._faults else {})

    def close(self, linger: int) -> None:
        """Close both sockets; data that are queued stay for `linger` ms, answers have nobody to wait for them."""
        self.data.close(linger=linger)
        self.command.close(linger=0)

    @property
    def subscribed(self) -> bool:
        """At least one subscription is in force that data messages match."""
        return bool(self._topics & {b"", b"D"})

    def subscriptions(self) -> None:
        """Take note of who came and went."""
        while True:
            try:
                frame = self.data.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            if frame[:1] == b"\1":
                self._topics.add(frame[1:])
            elif frame[:1] == b"\0":
                self._topics.discard(frame[1:])

    def answer(self) -> None:
        """Answer one request on the command channel; `reply()` sends what the server sleeps over."""
        parts = self.command.recv_multipart()
        try:
            self._reply = self.commands.answer(b"".join(parts))
        except ServerCrashError as error:
            print(f"larpixdaq-emulator: io_group {self.io_group}: command server crashed: {error}", file=sys.stderr)
            self.crashed = True
            self.command.close(linger=0)
            return
        self._reply_at = time.monotonic() + self.commands.seconds
        self.reply()

    def reply(self) -> float:
        """Send the reply that is due; return the seconds until it is (infinite without one)."""
        wait = self._reply_at - time.monotonic()
        if wait > 0:
            return wait
        self._reply_at = float("inf")
        self.command.send(self._reply)
        return self._reply_at

    def turn(self, now: float) -> float:
        """Send what is due; return the seconds until the next turn makes sense (infinite once finished)."""
        if self.finished:
            return float("inf")
        if self._faults and (wait := self._misbehave(now, self._faults)):
            return wait
        if self._lossless and not self.subscribed:
            if self._pace:
                self._pace.pause(now)
            self._stopped_at = self._stopped_at or now
            return float("inf")
        if self._stopped_at is not None and isinstance(self._words, board_emulator.PacmanBoard):
            # its clock follows its words, a board's goes on without them; only whole seconds can be made up for
            late = self._late + now - self._stopped_at
            self._words.jump(round(late))
            self._late = late - round(late)
        self._stopped_at = None
        if not len(self._spans):
            wait = self._make(now)
            if wait:
                return wait
        self._send()
        if len(self._spans):
            return RETRY
        self.finished = self._left == 0 or not self._words.left
        return 0.0 if self._behind else TURN

    def _misbehave(self, now: float, faults: Faults) -> float:
        """Do what is due of that; return how long to wait while the board is away, 0 when it is there."""
        wrongs = faults.wrongs
        if self._began is None:
            self._began = now
        age = now - self._began
        if wrongs.jump and age >= wrongs.jump[0]:
            self._words.jump(int(wrongs.jump[1]))
            faults.wrongs = wrongs = wrongs._replace(jump=None)
        if wrongs.restart is not None and age >= wrongs.restart:
            faults.wrongs = wrongs = wrongs._replace(restart=None)
            self._words.restart()
        if wrongs.away and age >= wrongs.away[0]:
            self._back_at = now + wrongs.away[1]
            faults.wrongs = wrongs._replace(away=None)
            faults.skip(self._spans)
            self._spans = self._spans[:0]
            self.data.close(linger=GOODBYE)
        return 0.0 if self._back_at is None or self._come_back(now) else self._be_away(now, faults)

    def _come_back(self, now: float) -> bool:
        if self._back_at is None or now < self._back_at:
            return False
        self._topics.clear()
        self._open_data()
        try:
            self.data.bind(self._data_address)
        except zmq.ZMQError:  # the port is not free yet: the next turn tries again
            self.data.close(linger=0)
            return False
        self._back_at = None
        return True

    def _be_away(self, now: float, faults: Faults) -> float:
        """The chips go on, and nobody gets what they say."""
        if self._pace and not self._make(now):
            faults.skip(self._spans)
            self._spans = self._spans[:0]
            self.finished = self._left == 0
        return TURN

    def _make(self, now: float) -> float:
        """Make the words that are due; return how long to wait instead if there are none yet."""
        whole = self._per_message or 1
        most = max(BATCH - BATCH % whole, whole)
        window = SERVICE_TICKS
        due = most
        if self._pace:
            due = self._pace.due(now)
            late = due / self._pace.rate
            if late > LATE:
                # one that is behind finds more words complete, as the server's busy loop would
                window = int(late * 10_000_000)
        words = min(due - due % whole, most)
        if self._left is not None and due >= self._left:
            words = min(self._left, most)
        if words < 1:
            assert self._pace
            return max(self._pace.when(min(whole, self._left or whole)) - now, RETRY)
        self._behind = self._pace is None or due - words >= whole
        self._take(words, window)
        return 0.0

    def _take(self, words: int, window: int) -> None:
        """Make `words` words the next to be sent."""
        messages = self._words.fill(words, self._per_message, window)
        self._spans = self._words.spans[:messages]
        made = words_in(self._spans)
        if self._faults:
            self._spans = self._faults.spoil(self._words.buffer, self._spans)
        if self._pace:
            self._pace.made(made)
        if self._left is not None:
            self._left -= made

    def _send(self) -> None:
        step = len(self._spans) if self._lossless else BURST
        while len(self._spans):
            sent = self._sender.send(self._words.buffer, self._spans[:step])
            d, s, t, others = board_emulator.count_words(self._words.buffer, self._spans[:sent])
            for name, number in zip(self.sent, (d + s + t + others, d, s, t, sent), strict=True):
                self.sent[name] += number
            self._spans = self._spans[sent:]
            if self._lossless:
                return
            if len(self._spans):
                time.sleep(BURST_PAUSE)


class FaultCounts(NamedTuple):
    """Fractions of messages that are not sent, sent twice, or whose headers count words that do not follow; times are
    seconds since the board's first turn: at the first the board is away for the second; its clock is set by the second;
    it starts again."""

    skip: float = 0.0
    double: float = 0.0
    lie: float = 0.0
    away: tuple[float, float] | None = None
    jump: tuple[float, float] | None = None
    restart: float | None = None

    @property
    def any(self) -> bool:
        return self != FaultCounts()


class Faults:
    """`count` has what was done: words and messages skipped (also while the board is away), words and messages that
    were sent a second time, messages with a wrong header and the words that it claims too many."""

    def __init__(self, wrongs: FaultCounts, seed: int) -> None:
        self.wrongs = wrongs
        self.count = dict.fromkeys(
            ("skipped", "skipped_messages", "doubled", "doubled_messages", "lied", "lied_messages"), 0
        )
        self._random = np.random.default_rng(seed)

    def spoil(self, buffer: NDArray[np.uint8], spans: NDArray[Any]) -> NDArray[Any]:
        """The spans to send of these, in order; headers are changed in place. No message suffers twice."""
        wrongs = self.wrongs
        if not (wrongs.skip or wrongs.double or wrongs.lie):
            return spans
        fate = self._random.random(len(spans))
        skip = fate < wrongs.skip
        double = ~skip & (fate < wrongs.skip + wrongs.double)
        lie = ~skip & ~double & (fate < wrongs.skip + wrongs.double + wrongs.lie)
        self.skip(spans[skip])
        self.count["doubled"] += words_in(spans[double])
        self.count["doubled_messages"] += int(double.sum())
        for span in spans[lie]:
            place = int(span["start"]) + 6
            counted = buffer[place : place + 2].view("<u2")
            more = min(int(self._random.integers(1, LIE + 1)), 65_535 - int(counted[0]))
            counted += np.uint16(more)
            self.count["lied"] += more
            self.count["lied_messages"] += 1
        return np.repeat(spans, np.where(skip, 0, 1 + double))

    def skip(self, spans: NDArray[Any]) -> None:
        """These are made, and nobody gets them."""
        self.count["skipped"] += words_in(spans)
        self.count["skipped_messages"] += len(spans)


def words_in(spans: NDArray[Any]) -> int:
    """Words of board messages, by their lengths."""
    return int((np.maximum(spans["length"].astype(np.int64) - 8, 0) // 16).sum())


class Recording:
    """The messages of a log (each preceded by its length, u32 little-endian), in the manner of emulate.PacmanBoard.

    `fill()` makes the next messages the ones at `spans` of `buffer`; `left` is False once all have been handed out.
    """

    receipt = 0
    full = 0

    def __init__(self, path: Path) -> None:
        try:
            self.buffer: NDArray[np.uint8] = np.fromfile(path, np.uint8)
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from None
        self._all = _split(self.buffer, path)
        words = np.maximum(self._all["length"].astype(np.int64) - 8, 0) // 16
        self._before = np.concatenate(([0], np.cumsum(words)))
        self._next = 0
        self.spans: NDArray[Any] = self._all[:0]

    @property
    def left(self) -> bool:
        return self._next < len(self._all)

    def fill(self, words: int, per_message: int = 0, window: int = 0) -> int:
        """Hand out messages of at most `words` words in all, but at least one; return how many."""
        end = int(np.searchsorted(self._before, self._before[self._next] + words, side="right")) - 1
        end = min(max(end, self._next + 1), len(self._all))
        self.spans = self._all[self._next : end]
        self._next = end
        return len(self.spans)

    def jump(self, seconds: int) -> None:
        raise FileError("recorded messages keep their times")

    def restart(self) -> None:
        raise FileError("recorded messages keep their times")


def _split(buffer: NDArray[np.uint8], path: Path) -> NDArray[Any]:
    spans, used = split_log(buffer)
    if used < len(buffer) or not len(spans):
        raise FileError(
            f"{path}: expected a message log (u32 length + message, at most 4 GiB), "
            f"found {len(spans)} messages in the first {used} of {len(buffer)} bytes"
        )
    return spans
