"""A producer's uplink to NATS JetStream: the child process that publishes its blocks, as the producer sees it.

The child (uplink_child.py) subscribes to its producer as a storage does, and acknowledges a block when the brokers have
it. So ring and spool hold what the brokers do not take, and a restarted producer delivers it. A child that ends is
started again after 0.5 s, then after 1 s, 2 s and so on up to 10 s.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from larpixdaq.keys.curve import KeyPair, new_pair
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.reports import UplinkStatus
from larpixdaq.runtime.child_process import ChildProcess, signal_name
from larpixdaq.stream.jetstream import Brokers, Settings, stream_name
from larpixdaq.stream.publisher import Publisher

log = logging.getLogger(__name__)
#: First and maximum seconds until a dead child is started again. After it has lived for STABLE, the next delay is the
#: first one.
RESTART_DELAY, MAX_RESTART_DELAY, STABLE = 0.5, 10.0, 30.0
#: Seconds between two reports of the child, and without one after which it is killed, because it hangs.
REPORT_INTERVAL: Final = 0.25
SILENT_LIMIT: Final = 15.0
#: Maximum bytes of a message between producer and child.
LIMIT: Final = 1 << 16
#: Maximum messages of the child that are taken in one turn.
_TURN: Final = 64
_SUFFIX: Final = " uplink"
#: Counts of a status that go on when another child is started.
_COUNTS: Final = ("messages", "bytes", "acknowledged_messages", "acknowledged_bytes", "lost_messages")


class Setup(msgspec.Struct, frozen=True):
    """The first message to the child. `keys`: None without keys; `session`: as Publisher.admit_child() knows it."""

    name: str
    session: str
    producer: str
    endpoint: Endpoint
    keys: KeyPair | None
    brokers: Brokers
    settings: Settings


class Line(msgspec.Struct, tag=True, frozen=True):
    """A log record of the child."""

    level: int
    text: str


class Report(msgspec.Struct, tag=True, frozen=True):
    status: UplinkStatus


encode: Final = msgspec.msgpack.Encoder().encode
setup_decoder: Final = msgspec.msgpack.Decoder(Setup)
_decoder: Final = msgspec.msgpack.Decoder(Line | Report)


def uplink_name(producer: str) -> str:
    """Return the name under which the blocks of a producer are required: `LArPix board uplink`, of 64 bytes at most."""
    return producer.encode()[: 64 - len(_SUFFIX)].decode(errors="ignore") + _SUFFIX


class Uplink:
    """The child process of a producer. All methods belong to the producer's loop, and only close() blocks."""

    def __init__(
        self, publisher: Publisher, endpoint: Endpoint, producer: str, brokers: Brokers, settings: Settings
    ) -> None:
        """`endpoint`: where `publisher` listens."""
        self.name = uplink_name(producer)
        keys = new_pair() if endpoint.key else None
        session = secrets.token_hex(16)
        publisher.admit_child(self.name, session, keys.public if keys is not None else "")
        self._setup = encode(Setup(self.name, session, producer, endpoint, keys, brokers, settings))
        self._process = ChildProcess(Path(__file__).with_name("uplink_child.py"), kind=socket.SOCK_SEQPACKET)
        self._ended = UplinkStatus(
            stream=stream_name(producer), brokers=str(brokers)
        )  # of the children before this one
        self._status = UplinkStatus()
        self._problem = ""  # of the process itself
        self._delay = RESTART_DELAY
        self._start_at: float | None = 0.0  # monotonic; None: it runs
        self._started_at = self._heard_at = 0.0

    def fileno(self) -> int:
        """Polls readable when work() has something to take."""
        return self._process.fileno()

    def due(self) -> float:
        """Return the monotonic time at which work() must be called."""
        return self._heard_at + SILENT_LIMIT if self._start_at is None else self._start_at

    def is_due(self) -> bool:
        return time.monotonic() >= self.due()

    def work(self) -> None:
        """Take what the child has sent; start it, and end one that hangs."""
        now = time.monotonic()
        if self._start_at is not None:
            if now >= self._start_at:
                self._start(now)
            return
        if now - self._started_at > STABLE:
            self._delay = RESTART_DELAY
        for _ in range(_TURN):
            packet = self._process.receive()
            if packet is None:
                if now - self._heard_at > SILENT_LIMIT:
                    self._lose(f"it has not answered for {SILENT_LIMIT:g} s", 0.0)
                return
            try:
                message = _decoder.decode(packet)
            except msgspec.MsgspecError:  # nothing: the process has ended
                self._lose("", 1.0)
                return
            self._heard_at = now
            if isinstance(message, Line):
                log.log(message.level, "%s", message.text)
            else:
                self._status = message.status

    def _start(self, now: float) -> None:
        self._start_at = None
        self._started_at = self._heard_at = now
        try:
            self._process.start()
            sent = self._process.send(self._setup)
        except OSError as error:
            self._lose(error.strerror or str(error), 0.0)
            return
        if sent:
            self._problem = ""
        else:
            self._lose("", 1.0)

    def _lose(self, reason: str, limit: float) -> None:
        """End the child, and start another one later."""
        status = self._process.end(limit)
        if not reason:
            killed = status is not None and status < 0
            reason = f"it was killed by {signal_name(-(status or 0))}" if killed else f"it ended with status {status}"
        self._problem = f"the process that publishes to the brokers runs no more: {reason}"
        log.error("%s: %s; it is started again", self.name, self._problem)
        self._ended = self._total()
        self._ended.restarts += 1
        self._status = UplinkStatus()
        self._start_at = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, MAX_RESTART_DELAY)

    def _total(self) -> UplinkStatus:
        sums = {name: getattr(self._ended, name) + getattr(self._status, name) for name in _COUNTS}
        return msgspec.structs.replace(self._ended, **sums)

    def status(self) -> UplinkStatus:
        status = self._status
        return msgspec.structs.replace(
            self._total(),
            connected=status.connected and not self._problem,
            fill=status.fill,
            problem=self._problem or status.problem,
        )

    def close(self) -> None:
        """End the child. What the brokers have not acknowledged is kept in ring and spool."""
        with contextlib.suppress(OSError):
            self._process.end(1.0)
        self._process.close()
