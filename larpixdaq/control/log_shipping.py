"""Log records on their way from a process to the log process. They wait while the log is disconnected."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any, Final

import msgspec
import zmq

from larpixdaq import config
from larpixdaq.control.log_file import LogRecord
from larpixdaq.errors import ProtocolError
from larpixdaq.keys.curve import Handshakes, KeyPair, connect_with, new_pair
from larpixdaq.keys.inflow import Inflow
from larpixdaq.protocol.control import Endpoint
from larpixdaq.runtime.timing import Throttle

_log = logging.getLogger("larpixdaq.control.log_shipping")
#: Maximum number of records of level WARNING and above that wait while the log is disconnected.
KEPT: Final = 1000
#: Lines of one kind that LimitedLog writes at once, and lines a second after that.
BURST: Final = 50
RATE: Final = 2
#: Seconds between two attempts to connect to a log that refuses the key.
_RETRY: Final = 1.0
#: Seconds for which records wait until this is reported.
_REPORT_AFTER: Final = 5.0
#: Maximum bytes of a message from the log, which has nothing to send beyond the handshake.
_MAX_RECEIVED: Final = 1 << 10
#: Maximum number of characters of a text; longer ones (tracebacks) are cut.
MAX_TEXT: Final = 32 << 10
_MAX_RECORD: Final = 256 << 10


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(LogRecord)


def unpack_record(data: Any) -> LogRecord:
    """Unpack a log record; ProtocolError if the bytes are no record."""
    if len(data) > _MAX_RECORD:
        raise ProtocolError(f"log record: {len(data)} bytes, the limit is {_MAX_RECORD}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"log record: {error}") from None


def set_level(level: str) -> None:
    """Set the level from which on this process writes log records."""
    logging.getLogger("larpixdaq").setLevel(level)


def present_level() -> str:
    """Return the level from which on this process writes log records."""
    return str(logging.getLevelName(logging.getLogger("larpixdaq").getEffectiveLevel()))


class LimitedLog:
    """Logs lines of which there may be many: of each kind BURST at once, then RATE a second. The others are counted."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._throttle = Throttle(RATE, BURST, shares=1000)

    def __call__(self, kind: str, level: int, text: str, *args: object) -> None:
        """Log a line. `kind` names lines that share a limit, in the line that says how many were left out."""
        if self._logger.isEnabledFor(level) and self._throttle.passes(kind, 1):
            for summary in self._throttle.summaries():
                self._logger.log(level, "%s", summary)
            self._logger.log(level, text, *args)


class LogShipper(logging.Handler):
    """Collects the log records of this process, in any thread, and sends them to the log. No method waits.

    Only the thread that closes the sockets of `context` may call ship().
    """

    def __init__(self, component: str, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__()
        self._component, self._context = component, context
        self._endpoint: tuple[Endpoint, KeyPair | None] = Endpoint(), None
        self._socket: zmq.Socket[bytes] | None = None
        self._handshakes: Handshakes | None = None
        self._retry_at = 0.0
        self._waiting_since: float | None = None  # monotonic; None: no records wait
        self._reported = False  # that they wait
        self._records: deque[tuple[int, bytes]] = deque()
        self._guard = threading.Lock()
        self._lost = 0
        self.setFormatter(logging.Formatter("%(message)s"))

    def attach(self) -> None:
        """Start to collect the package's records, from level INFO on unless another level is set."""
        logger = logging.getLogger("larpixdaq")
        logger.addHandler(self)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)

    def close(self) -> None:
        """Stop collecting records."""
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
            if len(self._records) > 2 * KEPT:  # not at KEPT, so that _thin() is rare
                self._thin()

    def _thin(self) -> None:
        """Keep the newest warnings; count the other records as lost."""
        count = len(self._records)
        warnings = [record for record in self._records if record[0] >= logging.WARNING]
        self._records = deque(warnings[-KEPT:])
        self._lost += count - len(self._records)

    def ship(self, log: Endpoint, own: KeyPair | None) -> bool:
        """Send the collected records to the log at this endpoint (address "": no log), with the key pair `own`.

        Returns False while records wait for a log that does not take them.
        """
        if (log, own) != self._endpoint or self._refused():
            self._connect(log, own)
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
            waiting = bool(self._records)
        self._report(log.address, waiting)
        return not waiting

    def _report(self, address: str, waiting: bool) -> None:
        """Say once that the log takes no records, because whoever reads the log misses them."""
        now = time.monotonic()
        if not waiting:
            self._waiting_since, self._reported = None, False
        elif self._waiting_since is None:
            self._waiting_since = now
        elif not self._reported and now - self._waiting_since > _REPORT_AFTER:
            self._reported = True
            local = address.startswith(("tcp://127.", "tcp://[::1]"))
            where = ", where only its own host reaches it (larpixdaq-log --address)" if local else ""
            _log.warning("log records wait, and the oldest will be lost: no log takes them at %s%s", address, where)

    def _refused(self) -> bool:
        """Whether the log has refused the key, at most once a second: libzmq does not connect again after that."""
        now = time.monotonic()
        if self._handshakes is None or now < self._retry_at or self._handshakes.look() != "key":
            return False
        self._retry_at = now + _RETRY
        return True

    def _connect(self, log: Endpoint, own: KeyPair | None) -> None:
        if self._socket is not None and self._handshakes is not None:
            self._handshakes.close()
            self._socket.close(0)
        if (log, own) != self._endpoint:
            self._waiting_since, self._reported = None, False
        self._endpoint, self._socket, self._handshakes = (log, own), None, None
        if not log.address:
            return
        try:
            socket = self._context.socket(zmq.PUSH)
            # The socket takes records only while the log is connected, so that none wait in its queue.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.setsockopt(zmq.RCVHWM, 1)
            socket.setsockopt(zmq.MAXMSGSIZE, _MAX_RECEIVED)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            if log.key:
                connect_with(socket, own or new_pair(), log.key)
            socket.ipv6 = config.is_ipv6(log.address)
            # Records sent to a dead host would be lost. The limit is long, because a log whose disk hangs is not dead.
            config.close_dead_connections(socket, 10 * config.DEAD_CONNECTION)
            handshakes = Handshakes(socket, Inflow(log.address, _MAX_RECEIVED))
            socket.connect(log.address)
            self._socket, self._handshakes = socket, handshakes
        except zmq.ZMQError as error:
            _log.error("log address %s: %s", log.address, error)
