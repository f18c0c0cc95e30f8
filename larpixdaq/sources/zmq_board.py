"""What boards that publish over ZeroMQ have in common: the subscription, its watch, and one batch at a time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import zmq
from numpy.typing import NDArray
from zmq.utils.monitor import recv_monitor_message

from larpixdaq._native.zmq_batch import Receiver
from larpixdaq.constants import Count
from larpixdaq.errors import ConfigError
from larpixdaq.schema import NOTICES, RowLayout
from larpixdaq.sources.command_channel import HostLookup, endpoint
from larpixdaq.sources.data_quality import BoardClock
from larpixdaq.sources.source import BoardStatus, Decoder, LiveSource

#: Messages that may wait for us. One-word messages take 64 bytes each here; a saturated board (39 MB/s) sends far
#: fewer, larger ones. When it is full libzmq stops reading, the kernel's buffer fills, and then the board drops. (To
#: change it while messages come is no way to bound the bytes: libzmq's two ends can then wait for each other.)
RECEIVE_QUEUE = 100_000
#: The same for boards that wait: nothing is lost, and little has to be read when the run ends.
WAITING_QUEUE = 1_024
#: Messages that are taken in one read, at most. When half of them were there, there are taken to be more: a queue that
#: is empty then has only not been filled again yet.
BATCH, WAITING_BATCH = 4_096, 256
#: A message above this ends the connection, before memory is taken for it (the largest PACMAN message has 1 MiB).
LARGEST_MESSAGE = 64 << 20
#: A board that lost its power says nothing: the kernel asks after 5 s of silence and gives up after 3 x 2 s.
KEEPALIVE = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 5,
    zmq.TCP_KEEPALIVE_INTVL: 2,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
#: libzmq connects again by itself, within a second, unless the other end broke the rules of ZeroMQ (a message above the
#: limit, what is no board): then it gives up for good. So we connect anew when it has not for so long (seconds).
CONNECT_ANEW = 2.0
#: Warnings kept until somebody asks for them.
MOST_PROBLEMS = 100

_WATCHED = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_OVERSIZED = NOTICES.index("oversized")
#: The board's clock is looked at so often (seconds).
CLOCK = 1.0
#: While messages come, what became of the connection is asked for so often (seconds).
EVENTS = 0.25


class MessageDecoder(Decoder, Protocol):
    def feed(self, buffer: Any, spans: NDArray[Any]) -> None: ...
    def clock_bounds(self) -> tuple[float, float] | None: ...


class BoardSource(LiveSource):
    """A board at tcp://host:data_port. `silence`: seconds without any message after which that is a problem."""

    waits = False
    _decoder: MessageDecoder

    def __init__(
        self,
        kind: str,
        io_group: int,
        host: HostLookup,
        data_port: int,
        *,
        decoder: MessageDecoder,
        layout: RowLayout,
        silence: float,
    ) -> None:
        self.kind = kind
        self.address = endpoint(host.host, data_port)
        super().__init__(f"{kind} io_group {io_group} at {self.address}", layout, io_group, decoder, silence)
        self._host = host
        self._port = data_port
        self._endpoint = ""  # that we connect to
        self._silence = silence
        self._counts: NDArray[np.uint64] = np.zeros(len(Count), np.uint64)
        self._context: zmq.Context[Any] | None = None
        self._heard = 0.0
        self._emptied = -math.inf  # when the last read began that left nothing behind (monotonic)
        self._events_at = 0.0
        self._silent = False
        self._connected: bool | None = None
        self._strange = False
        self._connect_at: float | None = None
        self._clock = BoardClock()
        self._clock_at = 0.0
        self._unknown = ""  # the problem with the host that was told last

    def open(self) -> None:
        """Connect; while the board is away, or its host's name is not found, that is tried again and again. ConfigError
        for a port that cannot be."""
        if not 1 <= self._port <= 65_535:
            raise ConfigError(f"{self.name}: expected a port from 1 to 65535")
        self._presence.expect(time.time_ns())
        # a context of its own: its thread reads this board alone
        self._context = zmq.Context()
        self._data: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        self._data.linger = 0
        self._data.rcvhwm = WAITING_QUEUE if self.waits else RECEIVE_QUEUE
        self._data.ipv6 = ":" in self._host.host
        self._data.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE)
        self._data.setsockopt(zmq.RECONNECT_IVL, 100)
        self._data.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        for option, value in KEEPALIVE.items():
            self._data.setsockopt(option, value)
        self._data.setsockopt(zmq.SUBSCRIBE, b"")
        self._batch = WAITING_BATCH if self.waits else BATCH
        self._receiver = Receiver(self._data, messages=self._batch)
        self._monitor = self._data.get_monitor_socket(_WATCHED)
        self._endpoint = ""
        self._find_host()
        self.sockets = (self._data, self._monitor)
        self._heard = time.monotonic()

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        if self._context is not None:
            self.sockets = ()
            self._data.disable_monitor()
            self._monitor.close(linger=0)
            self._data.close(linger=0)
            self._context.term()
            self._context = None

    def start(self, counts: NDArray[np.uint64]) -> None:
        super().start(counts)
        self._counts = counts[self.io_groups[0]]

    def boards(self) -> list[BoardStatus]:
        (board,) = super().boards()
        return [board._replace(problem=self._host.problem, clock=self._clock.reading())]

    def due(self) -> float | None:
        if self._context is None:
            return None
        silent = [] if self._silent else [self._heard + self._silence]
        return min([*silent, *([] if self._connect_at is None else [self._connect_at])], default=None)

    def read(self) -> bool:
        receiver = self._receiver
        dropped, dropped_bytes = receiver.oversized, receiver.oversized_bytes
        began = time.monotonic()
        n = receiver.receive()
        self.drained = receiver.emptied and n < self._batch // 2
        now = time.monotonic()
        since = self._emptied
        if self.drained:
            self._emptied = began
        if n and (self._connected is False or now >= self._events_at + EVENTS):
            self._take_events(now, self._events_at)
        if receiver.oversized_bytes != dropped_bytes:
            self._too_large(receiver.oversized - dropped, receiver.oversized_bytes - dropped_bytes)
        elif n == 0:
            self._watch(now)
            return False
        if now >= self._clock_at:
            self._clock_at = now + CLOCK
            self._clock.take(now, self._decoder.clock_bounds())
        if self._silent:
            self._problem(f"sends again after {now - self._heard:.0f} s of silence")
            self._silent = False
        self._heard = now
        wall = time.time_ns()
        self._presence.heard(wall)
        self._decoder.heard(wall, since, now)
        self._decoder.feed(receiver.buffer, receiver.spans[:n])
        return True

    def _problem(self, text: str) -> None:
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(f"{self.name}: {text}")

    def _too_large(self, messages: int, size: int) -> None:
        self._decoder.heard(time.time_ns())
        self._decoder.note(_OVERSIZED, messages, size)
        self._counts[Count.REJECTED_MESSAGES] += np.uint64(messages)
        self._counts[Count.REJECTED_BYTES] += np.uint64(size)
        self._counts[Count.BYTES_IN] += np.uint64(size)
        self._problem(
            f"dropped {messages} board messages ({size} bytes in all), larger than {len(self._receiver.buffer)} bytes"
        )

    def _watch(self, now: float) -> None:
        """Nothing came: note how the connection is."""
        self._take_events(now)
        if self._connect_at is not None and now >= self._connect_at:
            self._connect_at = None
            self._host.forget()
            self._disconnect()
        if not self._endpoint:
            self._find_host()
        if not self._silent and now >= self._heard + self._silence:
            self._problem(f"silent for {self._silence:g} s" + ("" if self._connected else ", not connected"))
            self._silent = True

    def _find_host(self) -> None:
        """Connect as soon as the host's address is known."""
        host = self._host.find()
        if host:
            self._endpoint = endpoint(host, self._port)
            self._data.connect(self._endpoint)
        elif self._host.problem and self._host.problem != self._unknown:
            self._problem(f"{self._host.problem}; trying again")
        self._unknown = self._host.problem

    def _disconnect(self) -> None:
        if self._endpoint:
            with contextlib.suppress(zmq.ZMQError):  # it has given up: nothing to disconnect
                self._data.disconnect(self._endpoint)
        self._endpoint = ""

    def _take_events(self, now: float, since: float | None = None) -> None:
        """What became of the connection; `since`: messages come, so that it was in order then (monotonic)."""
        self._events_at = now
        for event in self._events():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._connected is False:
                    self._problem("connected again")
                self._connected = True
                self._presence.connected(time.time_ns())
                self._strange = False
                self._connect_at = None
                continue
            self._connect_at = now + CONNECT_ANEW
            if event == zmq.EVENT_DISCONNECTED:
                if self._connected:
                    self._problem("connection lost; trying to reconnect")
                    self._connected = False
                    wall = time.time_ns()
                    self._presence.lost(wall, 0 if since is None else wall - int((now - since) * 1e9))
            elif not self._strange:
                self._problem("the program at this address does not speak ZeroMQ as a board does")
                self._strange = True

    def _events(self) -> Iterator[int]:
        while True:
            try:
                yield recv_monitor_message(self._monitor, zmq.DONTWAIT)["event"]
            except zmq.Again:
                return
