"""Boards that publish over ZeroMQ: subscription, state of the connection, and batches of board messages."""

from __future__ import annotations

import contextlib
import math
import os
import socket as sockets
import stat
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray
from zmq.utils.monitor import recv_monitor_message

from larpixdaq._native.decoders import BernDecoder, PacmanDecoder
from larpixdaq._native.zmq_batch import Receiver
from larpixdaq.constants import Count
from larpixdaq.keys.curve import has_message
from larpixdaq.keys.inflow import Inflow
from larpixdaq.schema import NOTICES, RowLayout
from larpixdaq.sources.command_channel import HostLookup, RequestChannel, endpoint
from larpixdaq.sources.data_quality import BoardClock
from larpixdaq.sources.source import BoardStatus, LiveSource

#: Maximum board messages in the queue of the subscription. A one-word message takes 64 bytes; a saturated board
#: (39 MB/s) sends far fewer and larger ones. When the queue is full, libzmq stops reading, the kernel's buffer fills,
#: and the board drops messages. The limit stays as it is while messages arrive, because libzmq's two ends could
#: otherwise wait for each other.
RECEIVE_QUEUE = 100_000
#: The same for boards that wait: no message is lost, and little is left to read when the run ends.
WAITING_QUEUE = 1_024
#: Maximum messages of a read(). After a read() with half of them more messages wait: the queue was empty only because
#: libzmq had not filled it again yet.
BATCH, WAITING_BATCH = 4_096, 256
#: Maximum bytes of a message. A larger one ends the connection before memory is taken for it. The largest message of a
#: PACMAN has 1 MiB.
LARGEST_MESSAGE = 64 << 20
#: Detects a board without power: the kernel sends a probe after 5 s of silence and gives up after 3 probes of 2 s.
KEEPALIVE = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 5,
    zmq.TCP_KEEPALIVE_INTVL: 2,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
#: Bytes that the kernel keeps of a held source before it passes them on anyway. They fit the smallest receive buffer.
HELD_BYTES = 32 << 10
#: Seconds without a connection until the source connects again. libzmq does so by itself within a second, but gives up
#: for good after an error of the protocol (a message above the limit, or a program that is no board).
RECONNECT_AFTER = 2.0

_WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_OVERSIZED = NOTICES.index("oversized")
#: Seconds between two readings of the board's clock.
CLOCK_INTERVAL = 1.0
#: Seconds between two looks at the events of the connection while messages arrive.
EVENTS_INTERVAL = 0.25


class BoardSource(LiveSource):
    """Board at tcp://host:data_port. `silence`: seconds without any message until a warning."""

    waits = False
    channels: tuple[RequestChannel, ...]
    _decoder: PacmanDecoder | BernDecoder

    def __init__(
        self,
        kind: str,
        io_group: int,
        host: HostLookup,
        data_port: int,
        *,
        decoder: PacmanDecoder | BernDecoder,
        layout: RowLayout,
        silence: float,
    ) -> None:
        self.kind = kind
        self.address = endpoint(host.host, data_port)
        super().__init__(f"{kind} io_group {io_group} at {self.address}", layout, io_group, decoder, silence)
        self._host = host
        self._port = data_port
        self._endpoint = ""  # numeric address of the connection; empty: not known yet
        self._silence = silence
        self._counts: NDArray[np.uint64] = np.zeros(len(Count), np.uint64)
        self._context: zmq.Context[Any] | None = None
        self._last_message = 0.0  # or the time of open(); monotonic
        self._drained_at = -math.inf  # beginning of the last read() that left no message behind (monotonic)
        self._events_at = self._look_at = 0.0
        self._silent = False
        self._connected: bool | None = None
        self._not_zeromq = False
        self._reconnect_at: float | None = None
        self._clock = BoardClock()
        self._clock_at = 0.0
        self._host_problem = ""  # the last one in a warning
        self._connection: sockets.socket | None = None  # a duplicate of that of libzmq

    def open(self) -> None:
        """Connect, and try again while the board is disconnected or its host's name is not found."""
        self._presence.lost(time.time_ns())  # until it connects
        # A context of its own, because its I/O thread then reads this board alone.
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
        self._inflow = Inflow(self.name, LARGEST_MESSAGE)
        self._endpoint = ""
        self._find_host()
        self.sockets = (self._data, self._monitor)
        self._last_message = time.monotonic()

    def close(self) -> None:
        self._release_connection()
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
        times = [] if self._silent else [self._last_message + self._silence]
        if self._reconnect_at is not None:
            times.append(self._reconnect_at)
        return min(times, default=None)

    def read(self) -> bool:
        receiver = self._receiver
        oversized, oversized_bytes = receiver.oversized, receiver.oversized_bytes
        began = time.monotonic()
        n = receiver.receive()
        if n or receiver.oversized_bytes != oversized_bytes:
            self._inflow.took()
        self.drained = receiver.emptied and n < self._batch // 2
        now = time.monotonic()
        since = self._drained_at
        if self.drained:
            self._drained_at = began
        if n and (self._connected is False or now >= self._events_at + EVENTS_INTERVAL):
            self._take_events(now, self._events_at)
        if receiver.oversized_bytes != oversized_bytes:
            self._reject_oversized(receiver.oversized - oversized, receiver.oversized_bytes - oversized_bytes)
        elif n == 0:
            self._watch(now)
            return False
        if now >= self._clock_at:
            self._clock_at = now + CLOCK_INTERVAL
            self._clock.take(now, self._decoder.clock_bounds())
        if self._silent:
            self._problem(f"sends again after {now - self._last_message:.0f} s of silence")
            self._silent = False
        self._last_message = now
        wall = time.time_ns()
        self._presence.heard(wall)
        self._decoder.heard(wall, since, now)
        self._decoder.feed(receiver.buffer, receiver.spans[:n])
        return True

    def hold(self, held: bool) -> None:
        """Let the kernel wake libzmq's thread for HELD_BYTES bytes (True), or for each message.

        At 5,000 packets a second, waking it for each message takes a third of the producer's processor time.
        """
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVLOWAT, HELD_BYTES if held else 1)

    def _keep_connection(self, descriptor: int) -> None:
        """Duplicate the descriptor of a new connection, because libzmq's thread may close it and use its number again.

        The connection stays open until this is released, too.
        """
        self._release_connection()
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return
            self._connection = sockets.socket(fileno=os.dup(descriptor))
            if self._connection.getpeername()[1:2] == (self._port,):
                return
        self._release_connection()  # a descriptor that was used again, or closed

    def _release_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _reject_oversized(self, messages: int, size: int) -> None:
        self._decoder.heard(time.time_ns())
        self._decoder.note(_OVERSIZED, messages, size)
        self._counts[Count.REJECTED_MESSAGES] += np.uint64(messages)
        self._counts[Count.REJECTED_BYTES] += np.uint64(size)
        self._counts[Count.BYTES_IN] += np.uint64(size)
        self._problem(
            f"dropped {messages} board messages ({size} bytes in all), larger than {len(self._receiver.buffer)} bytes"
        )

    def _watch(self, now: float) -> None:
        """Check the connection while no messages arrive."""
        self._take_events(now)
        if self._reconnect_at is not None and now >= self._reconnect_at:
            self._reconnect_at = None
            self._host.forget()
            self._release_connection()
            if self._endpoint:
                with contextlib.suppress(zmq.ZMQError):  # libzmq has given up: there is no connection
                    self._data.disconnect(self._endpoint)
            self._endpoint = ""
        if not self._endpoint:
            self._find_host()
        if not self._silent and now >= self._last_message + self._silence:
            self._problem(f"silent for {self._silence:g} s" + ("" if self._connected else ", not connected"))
            self._silent = True

    def _find_host(self) -> None:
        """Connect as soon as the host's address is known."""
        host = self._host.find()
        if host:
            self._endpoint = endpoint(host, self._port)
            self._data.connect(self._endpoint)
        elif self._host.problem and self._host.problem != self._host_problem:
            self._problem(f"{self._host.problem}; trying again")
        self._host_problem = self._host.problem

    def _take_events(self, now: float, since: float | None = None) -> None:
        """Handle events of the connection. `since`: it was in order then, because messages arrive (monotonic)."""
        self._events_at = now
        for event, value in self._events():
            if event == zmq.EVENT_CONNECTED:
                self._inflow.connected(value)
                self._keep_connection(value)
                continue
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._connected is False:
                    self._problem("connected again")
                self._connected = True
                self._presence.connected(time.time_ns())
                self._not_zeromq = False
                self._reconnect_at = None
                continue
            self._release_connection()
            self._reconnect_at = now + RECONNECT_AFTER
            if event == zmq.EVENT_DISCONNECTED:
                if self._connected:
                    self._problem("connection lost; trying to reconnect")
                    self._connected = False
                    wall = time.time_ns()
                    self._presence.lost(wall, 0 if since is None else wall - int((now - since) * 1e9))
            elif not self._not_zeromq:
                self._problem("the program at this address does not speak ZeroMQ as a board does")
                self._not_zeromq = True
        if now >= self._look_at:
            self._look_at = now + EVENTS_INTERVAL
            self._inflow.look()
            for channel in self.channels:
                channel.watch()

    def _events(self) -> Iterator[tuple[int, int]]:
        """The events of the connection, each with its value."""
        while has_message(self._monitor):
            found = recv_monitor_message(self._monitor, zmq.DONTWAIT)
            yield found["event"], found["value"]
