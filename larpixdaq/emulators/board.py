"""Emulated PACMAN board: its sockets, its rate, its faults on request, and exact counts of the sent words.

The messages come from a generator, from emulated chips, or from a recording.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import zmq
from numpy.typing import NDArray

from larpixdaq._native import board_emulator, zmq_batch
from larpixdaq.emulators.board_registers import BoardRegisters, ServerCrashError
from larpixdaq.emulators.command_server import CommandServer
from larpixdaq.emulators.recording import LEGACY_SIZES, SIZES_1_0, Recording, count_1_0, words_of
from larpixdaq.errors import ConfigError
from larpixdaq.runtime.timing import Pace

#: Maximum words of a turn, so that other boards, commands and signals get their turns.
BATCH = 16_384
#: Ticks of 10 MHz that a data server needs for a message (20 us); its next message has the words of this time.
SERVICE_TICKS = 200
#: Without --lossless: maximum messages in the queue of a subscriber, as on a board.
QUEUE = 100
#: Without --lossless: maximum messages sent without a pause, and seconds of the pause, in which the I/O thread sends.
BURST = 64
BURST_PAUSE = 50e-6
#: With --lossless: bytes in a board's queue, approximately.
QUEUE_BYTES = 4 << 20
#: Maximum seconds that a board is late before its messages become longer.
LATE = 0.01
#: Seconds between two turns of a board that keeps its rate.
TURN = 0.001
#: Milliseconds for which a board that closes its data port still sends queued messages.
LINGER = 5000
#: Maximum bytes of a request: the largest PACMAN message has 1 MiB.
MAX_REQUEST = 2 << 20
#: Seconds until a full queue is tried again, because XPUB does not tell when it is free.
RETRY = 0.001
#: Maximum number of missing words that a wrong header counts.
LIE: Final = 5


class MessageSource(Protocol):
    """Source of a board's messages: `board_emulator.PacmanBoard`, `EmulatedTile` or `Recording`.

    `fill()` makes the next messages, in `buffer` at `spans`, and returns their number. `receipt`: the board's clock in
    ticks. `full`: packets so far with the flag of a full FIFO. `left`: whether there are more messages.
    """

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
    def fill(self, words: int, per_message: int, window: int) -> int: ...
    def jump(self, seconds: int) -> None: ...
    def restart(self) -> None: ...


class EmulatedBoard:
    """Board with a data and a command socket. `sent`: words by type, and messages, that ZeroMQ has taken."""

    def __init__(
        self,
        io_group: int,
        source: MessageSource,
        registers: BoardRegisters,
        *,
        rate: float | None,
        per_message: int,
        lossless: bool,
        limit: int | None,
        faults: Faults | None,
        queue: int,
        transmit: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        """`rate`: words/s, None for the maximum. `per_message`: words in a message, 0 as the real data server does.

        `limit`: words to send, None without limit. `queue`: maximum messages in the queue of a subscriber.
        `transmit` sends command words to the chips.
        """
        self.io_group = io_group
        self.sent = {"words": 0, "D": 0, "S": 0, "T": 0, "messages": 0}
        self.finished = False
        registers.clock = lambda: self._source.receipt
        self.commands = CommandServer(registers, transmit)
        self.crashed = False  # the command server
        self.echo: zmq.Socket[bytes] | None = None  # repeats replies, and on revision 5 also requests
        self._echoes_requests = registers.revision.echoes_requests
        self._reply = b""
        self._reply_due = float("inf")
        self._source = source
        self._pace = Pace(rate, 1.0 + per_message / rate) if rate else None
        self._per_message = per_message
        self._lossless = lossless
        self._queue = queue
        self._remaining = limit  # words to make
        self._overdue = False  # more words are due than the last turn has made
        self._spans: NDArray[Any] = source.spans[:0]
        self._sizes = source.sizes if isinstance(source, Recording) else LEGACY_SIZES
        self._faults = faults
        if faults is not None:
            faults.sizes = self._sizes
        self._first_turn: float | None = None
        #: Seconds that the clock for the headers, which starts with a whole second, is late.
        self._clock_lag = (time.time() - source.receipt / 1e7) % 1.0
        self._paused_at: float | None = time.monotonic()  # since then no words are made, and their clock stops
        self._reopen_at: float | None = None  # while the data port is closed
        self._topics: set[bytes] = set()

    def open(
        self, context: zmq.Context[Any], host: str, data_port: int, command_port: int, echo_port: int | None = None
    ) -> dict[str, int]:
        """Bind the sockets (port 0: any free port) and return their ports by name. Raises ConfigError for a busy port.

        `echo_port`: where the command server repeats its replies; None: nowhere.
        """
        self._context = context
        self.command = context.socket(zmq.REP)
        self._open_data()
        port = self._bind(self.data, "data", f"tcp://{host}:{data_port}")
        self._data_address = f"tcp://{host}:{port}"
        command_port = self._bind(self.command, "command", f"tcp://{host}:{command_port}")
        self._command_address = f"tcp://{host}:{command_port}"
        ports = {"data": port, "command": command_port}
        if echo_port is not None:
            self.echo = context.socket(zmq.PUB)
            ports["echo"] = self._bind(self.echo, "echo", f"tcp://{host}:{echo_port}")
        return ports

    def _open_data(self) -> None:
        self.data = self._context.socket(zmq.XPUB)
        if self._lossless:
            self.data.setsockopt(zmq.XPUB_NODROP, 1)
            message = 8 + 16 * (self._per_message or 400)
            self.data.setsockopt(zmq.SNDHWM, min(100_000, max(100, QUEUE_BYTES // message)))
        else:
            self.data.setsockopt(zmq.SNDHWM, self._queue)
        self._sender = zmq_batch.Sender(self.data)

    def _bind(self, socket: zmq.Socket[bytes], channel: str, address: str) -> int:
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            text = zmq.strerror(error.errno or 0)
            raise ConfigError(f"io_group {self.io_group}: cannot bind its {channel} port {address}: {text}") from None
        endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    def counts(self) -> dict[str, int]:
        """Return the counts of sent words and messages, and of faults."""
        full = {"full": self._source.full} if self._source.full else {}
        if isinstance(self._source, Recording) and self._source.left_out:
            full["left_out"] = self._source.left_out
        crashed = {"server_crashes": 1} if self.crashed else {}
        return self.sent | full | crashed | (self._faults.counts if self._faults else {})

    def close(self, linger: int) -> None:
        """Close the sockets. Queued data are sent for `linger` ms, replies are discarded."""
        self.data.close(linger=linger)
        self.command.close(linger=0)
        if self.echo is not None:
            self.echo.close(linger=0)

    @property
    def subscribed(self) -> bool:
        """Whether a subscription matches data messages."""
        return bool(self._topics & {b"", b"D"})

    def read_subscriptions(self) -> None:
        """Read new subscriptions and cancellations."""
        while True:
            try:
                frame = self.data.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            if frame[:1] == b"\1":
                self._topics.add(frame[1:])
            elif frame[:1] == b"\0":
                self._topics.discard(frame[1:])

    def serve_request(self) -> None:
        """Serve one request on the command channel. If the server sleeps before its reply, `reply()` sends it later."""
        request = b"".join(self.command.recv_multipart())
        if self.echo is not None and self._echoes_requests:
            self.echo.send(request)
        try:
            self._reply = self.commands.answer(request)
        except ServerCrashError as error:
            print(f"larpixdaq-emulator: io_group {self.io_group}: command server crashed: {error}", file=sys.stderr)
            self.crashed = True
            self.command.close(linger=0)
            return
        self._reply_due = time.monotonic() + self.commands.seconds
        self.reply()

    def reply(self) -> float:
        """Send the reply if it is due. Returns the seconds until it is due, infinity without a reply."""
        wait = self._reply_due - time.monotonic()
        if wait > 0:
            return wait
        self._reply_due = float("inf")
        self.command.send(self._reply)
        if self.echo is not None:
            self.echo.send(self._reply)
        return self._reply_due

    def turn(self, now: float) -> float:
        """Send the words that are due. Returns the seconds until the next turn, infinity after the last word."""
        if self.finished:
            return float("inf")
        if self._faults and (wait := self._apply_faults(now, self._faults)):
            return wait
        if self._lossless and not self.subscribed:
            if self._pace:
                self._pace.pause(now)
            self._paused_at = self._paused_at or now
            return float("inf")
        if self._paused_at is not None and isinstance(self._source, board_emulator.PacmanBoard):
            # A board's clock runs on without words, that of PacmanBoard does not; it can jump by whole seconds.
            lag = self._clock_lag + now - self._paused_at
            self._source.jump(round(lag))
            self._clock_lag = lag - round(lag)
        self._paused_at = None
        if not len(self._spans) and (wait := self._make(now)):
            return wait
        self._send()
        if len(self._spans):
            return RETRY
        self.finished = self._remaining == 0 or not self._source.left
        return 0.0 if self._overdue else TURN

    def _apply_faults(self, now: float, faults: Faults) -> float:
        """Apply the faults that are due. Returns the seconds to wait while the data port is closed, else 0."""
        plan = faults.plan
        if self._first_turn is None:
            self._first_turn = now
        age = now - self._first_turn
        if plan.jump and age >= plan.jump[0]:
            self._source.jump(int(plan.jump[1]))
            faults.plan = plan = plan._replace(jump=None)
        if plan.restart is not None and age >= plan.restart:
            faults.plan = plan = plan._replace(restart=None)
            self._source.restart()
        if plan.reboot and age >= plan.reboot[0]:
            self._reopen_at = now + plan.reboot[1]
            faults.plan = plan = plan._replace(reboot=None)
            faults.skip(self._spans)
            self._spans = self._spans[:0]
            self._reply_due = float("inf")
            self.data.close(linger=LINGER)
            self.command.close(linger=0)
            self.commands.registers.restart()
            self._source.restart()
        if plan.disconnect and age >= plan.disconnect[0]:
            self._reopen_at = now + plan.disconnect[1]
            faults.plan = plan._replace(disconnect=None)
            faults.skip(self._spans)
            self._spans = self._spans[:0]
            self.data.close(linger=LINGER)
        if self._reopen_at is None:
            return 0.0
        if now >= self._reopen_at and self._reopen_command() and self._reopen_data():
            self._reopen_at = None
            return 0.0
        if self._pace and not self._make(now):  # the chips continue to send
            faults.skip(self._spans)
            self._spans = self._spans[:0]
            self.finished = self._remaining == 0
        return TURN

    def _reopen_command(self) -> bool:
        if self.crashed or not self.command.closed:
            return True
        self.command = self._context.socket(zmq.REP)
        return _bind_again(self.command, self._command_address)

    def _reopen_data(self) -> bool:
        self._topics.clear()
        self._open_data()
        return _bind_again(self.data, self._data_address)

    def _make(self, now: float) -> float:
        """Make messages of the words that are due. Returns 0, or the seconds until words are due if there are none."""
        whole = self._per_message or 1
        limit = max(BATCH - BATCH % whole, whole)
        window = SERVICE_TICKS
        due = limit
        if self._pace:
            due = self._pace.due(now)
            late = due / self._pace.rate
            if late > LATE:
                # a late server finds more complete words for its next message
                window = int(late * 10_000_000)
        words = min(due - due % whole, limit)
        if self._remaining is not None and due >= self._remaining:
            words = min(self._remaining, limit)
        if words < 1:
            assert self._pace
            return max(self._pace.time_of(min(whole, self._remaining or whole)) - now, RETRY)
        self._overdue = self._pace is None or due - words >= whole
        self._take(words, window)
        return 0.0

    def _take(self, words: int, window: int) -> None:
        """Take the next messages, of `words` words in all, from the source."""
        messages = self._source.fill(words, self._per_message, window)
        self._spans = self._source.spans[:messages]
        made = int(words_of(self._spans, self._sizes).sum())
        if self._faults:
            self._spans = self._faults.change(self._source.buffer, self._spans)
        if self._pace:
            self._pace.add_made(made)
        if self._remaining is not None:
            self._remaining -= made

    def _send(self) -> None:
        step = len(self._spans) if self._lossless else BURST
        while len(self._spans):
            sent = self._sender.send(self._source.buffer, self._spans[:step])
            count = count_1_0 if self._sizes == SIZES_1_0 else board_emulator.count_words
            d, s, t, others = count(self._source.buffer, self._spans[:sent])
            for name, number in zip(self.sent, (d + s + t + others, d, s, t, sent), strict=True):
                self.sent[name] += number
            self._spans = self._spans[sent:]
            if self._lossless:
                return
            if len(self._spans):
                time.sleep(BURST_PAUSE)


def _bind_again(socket: zmq.Socket[bytes], address: str) -> bool:
    """Bind a socket. If its port is not free yet, close it and return False: the next turn tries again."""
    try:
        socket.bind(address)
    except zmq.ZMQError:
        socket.close(linger=0)
        return False
    return True


class FaultPlan(NamedTuple):
    """Faults of a board: fractions of messages, and events at seconds after the board's first turn."""

    #: Fractions of messages that are not sent, that are sent twice, and whose headers count missing words.
    skip: float = 0.0
    double: float = 0.0
    lie: float = 0.0
    #: Close the data port at the first time, for the second number of seconds.
    disconnect: tuple[float, float] | None = None
    #: Move the clock for the headers at the first time, by the second number of seconds.
    jump: tuple[float, float] | None = None
    #: Restart both clocks.
    restart: float | None = None
    #: Restart the board at the first time: both ports are closed for the second number of seconds, and registers and
    #: clocks begin anew.
    reboot: tuple[float, float] | None = None


class Faults:
    """Applies a plan to messages, and counts its effects.

    `counts`: words and messages skipped (also while the data port is closed), words and messages sent a second time,
    and missing words and messages of wrong headers.
    """

    def __init__(self, plan: FaultPlan, seed: int) -> None:
        self.plan = plan
        self.sizes = LEGACY_SIZES  # bytes of a header and of a word
        self.counts = dict.fromkeys(
            ("skipped", "skipped_messages", "doubled", "doubled_messages", "lied", "lied_messages"), 0
        )
        # Two of them, because the messages of a turn depend on time: the faults must not.
        self._random, self._lies = np.random.default_rng(seed), np.random.default_rng([seed, 1])

    def change(self, buffer: NDArray[np.uint8], spans: NDArray[Any]) -> NDArray[Any]:
        """Return the spans to send, in order, and change headers in place. A message has at most one fault."""
        plan = self.plan
        if not (plan.skip or plan.double or plan.lie):
            return spans
        fate = self._random.random(len(spans))
        skip = fate < plan.skip
        double = ~skip & (fate < plan.skip + plan.double)
        lie = ~skip & ~double & (fate < plan.skip + plan.double + plan.lie)
        self.skip(spans[skip])
        self.counts["doubled"] += int(words_of(spans[double], self.sizes).sum())
        self.counts["doubled_messages"] += int(double.sum())
        for span in spans[lie]:
            position, bits = int(span["start"]) + 6, 16
            if self.sizes == SIZES_1_0:
                position, bits = position - 2, 32
            counted = buffer[position : position + bits // 8].view(f"<u{bits // 8}")
            unit = self.sizes[1] if self.sizes == SIZES_1_0 else 1  # the header of format 1.0 counts bytes
            excess = min(int(self._lies.integers(1, LIE + 1)), ((1 << bits) - 1 - int(counted[0])) // unit)
            counted += np.array(excess * unit, counted.dtype)
            self.counts["lied"] += excess
            self.counts["lied_messages"] += 1
        return np.repeat(spans, np.where(skip, 0, 1 + double))

    def skip(self, spans: NDArray[Any]) -> None:
        """Count messages that are not sent."""
        self.counts["skipped"] += int(words_of(spans, self.sizes).sum())
        self.counts["skipped_messages"] += len(spans)
