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


class RecordHandler(logging.Handler):
    """Collects records in any thread; ship() sends them, in the thread that owns the socket. Neither ever blocks."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component
        self._records: deque[tuple[int, bytes]] = deque()
        self._guard = threading.Lock()
        self._lost = 0
        self.setFormatter(logging.Formatter("%(message)s"))

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

    def ship(self, socket: zmq.Socket[bytes] | None) -> bool:
        """Send what is there as far as it goes (None: the log is nowhere); True when nothing is left."""
        with self._guard:
            try:
                while socket is not None and (self._records or self._lost):
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


def push_socket(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """A socket for ship(). It takes records only while the log is connected, so that none is queued for nobody."""
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.ipv6 = config.is_ipv6(address)
    # Records for a host that vanished would be lost; a log whose disk hangs takes none for a while, and is not dead.
    config.close_dead_connections(socket, 10 * config.DEAD_CONNECTION)
    socket.connect(address)
    return socket
