"""The child process as the system has it: started, sent to and heard over a socket, its output read, reaped.

What the child process prints: taken in bounded pieces, so that a talkative routine fills neither memory nor log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from larpixdaq.errors import ConfigError, ProtocolError

#: Bytes that one turn takes from a child, so that a talkative one holds up nobody.
_TAKE: Final = 1 << 16
#: Seconds that a killed child has until the readout goes on without having reaped it.
_REAP_LIMIT: Final = 0.5
#: Lines of a routine's own output that go to the log; the rest is counted.
_LOGGED: Final = 100
_LINE: Final = 500
_log: Final = logging.getLogger(__name__)


class ChildProcess:
    """One child at a time, which runs `script`; after it has died start() makes another. None of the methods blocks.

    `splitter` makes, for each child, the function that puts the pieces of its socket together to messages.
    `took` is given every message of the child; `died` its exit status, and the reason when it was ended here ("": by
    itself). `fileno()` polls readable when dispatch() has something to do. To be used from one thread, which has to
    live as long as the child (Linux ends a child with the thread that started it).
    """

    def __init__(
        self,
        script: Path,
        splitter: Callable[[], Callable[[bytes], Iterator[Any]]],
        took: Callable[[Any], None],
        died: Callable[[int, str], None],
    ) -> None:
        self._script, self._splitter = script, splitter
        self._took, self._died = took, died
        self._epoll = select.epoll()
        self._process: subprocess.Popen[bytes] | None = None
        self._stuck: list[subprocess.Popen[bytes]] = []  # killed, and not dead yet
        self._sock: socket.socket | None = None
        self._split = self._splitter()
        self._unsent = bytearray()
        self.output = Output()

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def closed(self) -> bool:
        return self._epoll.closed

    @property
    def alive(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        """Of the one that is alive."""
        assert self._process is not None
        return self._process.pid

    @property
    def unsent(self) -> int:
        """Bytes that the child has not taken yet."""
        return len(self._unsent)

    def start(self) -> None:
        """ConfigError when it cannot be started."""
        self._stuck = [process for process in self._stuck if process.poll() is None]
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise ConfigError(f"the process for routines cannot be started: {error}") from None
        ours.setblocking(False)
        command = [sys.executable, str(self._script), str(theirs.fileno())]
        try:
            # Without preexec_fn subprocess uses vfork: the producer's mapped memory is neither copied nor marked. A
            # session of its own: Ctrl-C in the producer's terminal is the producer's business, and whatever a routine
            # starts ends with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise ConfigError(f"the process for routines cannot be started: {error}") from None
        finally:
            theirs.close()
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._sock = ours
        self._split = self._splitter()
        self.output = Output()
        self._epoll.register(ours.fileno(), select.EPOLLIN)
        self._epoll.register(self._process.stdout.fileno(), select.EPOLLIN)

    def send(self, data: bytes) -> None:
        """What hardware.pack() made; nobody gets it when no child is alive."""
        if self._sock is not None:
            self._unsent += data
            self._flush()

    def dispatch(self) -> None:
        """Take what the child has said, a bounded piece of it, and send what it takes."""
        for fd, events in self._epoll.poll(0):
            if self._sock is not None and fd == self._sock.fileno():
                if events & select.EPOLLOUT:
                    self._flush()
                if self._sock is not None and events & ~select.EPOLLOUT:
                    self._receive()
            elif self._process is not None:
                self._read_output()

    def end(self, reason: str = "") -> None:
        """Kill it, with whatever it has started, and reap it."""
        process, sock = self._process, self._sock
        if process is None or sock is None:
            return
        assert process.stdout is not None
        # Nobody has waited for it yet, so the number is still its own; of one that has died already this does not
        # change the status.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            status = process.wait(_REAP_LIMIT)
        except subprocess.TimeoutExpired:  # it waits for a disk or a device that does not answer, and dies after that
            self._stuck.append(process)
            status = -signal.SIGKILL
        self._read_output()
        self._epoll.unregister(sock.fileno())
        sock.close()
        process.stdout.close()
        self._process = self._sock = None
        self._unsent.clear()
        self._died(status, reason)

    def close(self) -> None:
        """fileno() is no longer valid."""
        self._epoll.close()

    def _flush(self) -> None:
        """Send as much as the socket takes; the rest when it polls writable."""
        assert self._sock is not None
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.end()
            return
        self._epoll.modify(self._sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0))

    def _receive(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(_TAKE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end()
            return
        try:
            for message in self._split(data):
                self._took(message)
                if self._sock is None:  # it died meanwhile; what it said last is nobody's any more
                    return
        except ProtocolError as error:
            self.end(str(error))

    def _read_output(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        try:
            data = os.read(self._process.stdout.fileno(), _TAKE)
        except BlockingIOError:
            return
        if data:
            self.output.take(data)
        else:
            self._process.stdout.close()


class Output:
    """What a routine prints: the first lines go to the log, the last are kept in case that it dies."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines = 0
        self._tail = b""

    def take(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-4096:]
        if self._lines >= _LOGGED:
            self._lines += data.count(b"\n")
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:_LINE]
        for line in lines[: _LOGGED - self._lines]:
            _log.info("routine says: %s", line[:_LINE].decode(errors="replace"))
        self._lines += len(lines)

    def end(self, what: str) -> None:
        if self._rest:
            _log.info("routine says: %s", self._rest.decode(errors="replace"))
        if self._lines > _LOGGED:
            _log.info("%s: %d further lines of output left out", what, self._lines - _LOGGED)
        self._rest, self._lines = b"", 0

    def tail(self) -> str:
        return self._tail.decode(errors="replace").strip()
