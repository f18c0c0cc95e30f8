"""Log records on their way to the log process: made by the standard library's logging, kept while the log is away."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any, Final

import msgspec
import zmq

from larpixdaq import config
from larpixdaq.errors import ProtocolError

_log = logging.getLogger("larpixdaq.control.log_shipping")
#: Records of level warning and above that are kept while the log is away.
KEPT: Final = 1000
#: Longer texts (tracebacks) are cut.
MAX_TEXT: Final = 32 << 10
_MAX_RECORD: Final = 256 << 10


class LogRecord(msgspec.Struct, array_like=True, frozen=True):
    """One log record on the wire; `time` in unix seconds, `level` as in logging."""

    time: float
    level: int
    component: str
    text: str


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(LogRecord)


def unpack_record(data: Any) -> LogRecord:
    """ProtocolError, in one line, when it is none."""
    if len(data) > _MAX_RECORD:
        raise ProtocolError(f"log record: {len(data)} bytes, the limit is {_MAX_RECORD}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"log record: {error}") from None


class LogShipper(logging.Handler):
    """Collects the log records of this process, in any thread, and sends them to the log. No method ever blocks.

    ship() is for the thread that closes the sockets of `context`.
    """

    def __init__(self, component: str, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__()
        self._component, self._context = component, context
        self._address = ""
        self._socket: zmq.Socket[bytes] | None = None
        self._records: deque[tuple[int, bytes]] = deque()
        self._guard = threading.Lock()
        self._lost = 0
        self.setFormatter(logging.Formatter("%(message)s"))

    def attach(self) -> None:
        """Collect the package's records from now on, those of level INFO and above unless another level is set."""
        logger = logging.getLogger("larpixdaq")
        logger.addHandler(self)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)

    def close(self) -> None:
        """Collect no more records."""
        logging.getLogger("larpixdaq").removeHandler(self)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)[:MAX_TEXT].encode("utf-8", "replace").decode()
            data = _encoder.encode(LogRecord(record.created, record.levelno, self._component, text))
        except Exception:
            self.handleError(record)
            return
        with self._guard:
            self._records.append((record.levelno, data))
            if len(self._records) > 2 * KEPT:  # twice, so that thinning is rare
                self._thin()

    def _thin(self) -> None:
        """Keep the warnings, of them the newest; the rest is counted."""
        before = len(self._records)
        warnings = [one for one in self._records if one[0] >= logging.WARNING]
        self._records = deque(warnings[-KEPT:])
        self._lost += before - len(self._records)

    def ship(self, address: str) -> bool:
        """Send the collected records to the log at this address ("": there is no log). True when no record is left that
        could be sent."""
        if address != self._address:
            self._connect(address)
        socket = self._socket
        if socket is None:
            return True
        with self._guard:
            try:
                while self._records or self._lost:
                    if self._lost:
                        text = f"{self._lost} log records were lost while the log was disconnected"
                        note = LogRecord(time.time(), logging.WARNING, self._component, text)
                        socket.send(_encoder.encode(note), zmq.NOBLOCK)
                        self._lost = 0
                        continue
                    socket.send(self._records[0][1], zmq.NOBLOCK)
                    self._records.popleft()
            except zmq.Again:
                pass
            return not self._records

    def _connect(self, address: str) -> None:
        if self._socket is not None:
            self._socket.close(0)
        self._address, self._socket = address, None
        if not address:
            return
        try:
            socket = self._context.socket(zmq.PUSH)
            # Takes records only while the log is connected, so that they are not queued for a log that is away.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            socket.ipv6 = config.is_ipv6(address)
            # Records for a host that vanished would be lost; a log whose disk hangs takes none for a while, and is not
            # dead.
            config.close_dead_connections(socket, 10 * config.DEAD_CONNECTION)
            socket.connect(address)
            self._socket = socket
        except zmq.ZMQError as error:
            _log.error("log address %s: %s", address, error)
