"""Child processes: a Python program of ours in a process of its own, with a socket between it and its parent.

It runs beside the receive loop of a producer, so that Python code of others can neither slow the loop down nor end it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

#: Maximum bytes of one receive() or printed(), so that a child that sends a lot does not hold up the loop.
PIECE: Final = 1 << 16
#: Seconds that a killed process has to be gone before the loop continues without its exit status.
_REAP_LIMIT: Final = 0.5
_PR_SET_PDEATHSIG: Final = 1


class ChildProcess:
    """One process at a time, which runs `script`; after its end start() can start another one.

    Only end() blocks, for a limited time. `fileno()` polls readable when the process has sent or printed something, has
    ended, or takes more of what waits for it. All methods belong to one thread, which must live as long as the process:
    Linux ends the process together with the thread that started it.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str] = (),
        *,
        kind: socket.SocketKind = socket.SOCK_STREAM,
        capture: bool = False,
    ) -> None:
        """`script` is called with the number of its socket, of this `kind`, and the `arguments`; see parent_socket().

        `capture`: printed() returns what the process writes to stdout and stderr. Otherwise it shares ours.
        """
        self._script, self._arguments = script, arguments
        self._kind, self._capture = kind, capture
        self._epoll = select.epoll()
        self._process: subprocess.Popen[bytes] | None = None
        self._stuck: list[subprocess.Popen[bytes]] = []  # killed, but not yet gone
        self._sock: socket.socket | None = None
        self._pidfd = -1
        self._unsent = bytearray()

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def alive(self) -> bool:
        """Whether a process was started and end() was not called since; it may have ended by itself."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The id of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def unsent(self) -> int:
        """Bytes of write() that the process has not taken yet."""
        return len(self._unsent)

    def start(self) -> None:
        """Start the program. OSError when the system refuses it."""
        self._stuck = [process for process in self._stuck if process.poll() is None]
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, self._kind)
        self._sock.setblocking(False)
        try:
            with theirs:
                # Without preexec_fn subprocess uses vfork: our mapped memory is neither copied nor marked. In a session
                # of its own the process does not get the Ctrl-C of our terminal, and end() reaches what it has started.
                self._process = subprocess.Popen(
                    [sys.executable, str(self._script), str(theirs.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if self._capture else None,
                    stderr=subprocess.STDOUT if self._capture else None,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            # The end of the socket does not show the end of the process, because processes forked by it keep it open.
            self._pidfd = os.pidfd_open(self._process.pid)
            self._epoll.register(self._pidfd, select.EPOLLIN)
            self._epoll.register(self._sock, select.EPOLLIN)
            if self._process.stdout is not None:
                os.set_blocking(self._process.stdout.fileno(), False)
                self._epoll.register(self._process.stdout, select.EPOLLIN)
        except OSError:
            self.end()
            self._sock.close()
            raise

    def ready(self) -> bool:
        """Whether receive() or printed() may return something. Sends what the process takes of write()."""
        ready = bool(self._epoll.poll(0))
        if ready and self._unsent:
            self._flush()
        return ready

    def receive(self) -> bytes | None:
        """The next packet, or piece of the stream; None while there is none; b"" after the last one: it has ended."""
        assert self._sock is not None
        ended = False
        while True:
            try:
                return self._sock.recv(PIECE)
            except BlockingIOError:
                if ended:
                    return b""
                if not self._ends_within(0):
                    return None
                ended = True  # what it sent just before its end may have come after recv()
            except OSError:
                return b""

    def printed(self) -> bytes:
        """The next piece of what the process has printed; b"" while there is none."""
        if self._process is None or self._process.stdout is None or self._process.stdout.closed:
            return b""
        try:
            data = os.read(self._process.stdout.fileno(), PIECE)
        except BlockingIOError:
            return b""
        if not data:
            self._process.stdout.close()
        return data

    def send(self, packet: bytes) -> bool:
        """Send a packet; False when the process does not take it now."""
        try:
            return self._sock is not None and bool(self._sock.send(packet))
        except OSError:
            return False

    def write(self, data: bytes) -> None:
        """Append to the stream. What the process does not take now is kept until it does, or until its end."""
        if self._process is not None:
            self._unsent += data
            self._flush()

    def end(self, limit: float = 0.0) -> int | None:
        """Kill the process with all that it has started, and reap it; its exit status, None when there was no process.

        Before that it has `limit` seconds to end by itself when it finds its socket closed.
        """
        process, self._process = self._process, None
        if process is None or self._sock is None:
            return None
        if limit:
            self._sock.close()
            self._ends_within(limit)
        # The id still belongs to this process, because it has not been reaped. If it has ended by itself, the signal
        # does not change its status.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            status = process.wait(_REAP_LIMIT)
        except subprocess.TimeoutExpired:  # it waits for a disk or a device that does not answer, and dies after that
            self._stuck.append(process)
            status = -signal.SIGKILL
        # Closed descriptors leave the epoll set.
        self._sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if process.stdout is not None:
            process.stdout.close()
        self._unsent.clear()
        return status

    def close(self) -> None:
        """Kill the process, if there is one. fileno() is no longer valid."""
        self.end()
        self._epoll.close()

    def _ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def _flush(self) -> None:
        assert self._sock is not None
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, as receive() will say
            self._unsent.clear()
        self._epoll.modify(self._sock, select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0))


def signal_name(number: int) -> str:
    """The name of a signal, or its number if it has none, as most real-time signals."""
    return {int(one): one.name for one in signal.Signals}.get(number, str(number))


def parent_socket(number: str) -> socket.socket:
    """In the child process: the socket of this number, to the parent. From now on this process ends with its parent."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sock = socket.socket(fileno=int(number))
    sock.set_inheritable(False)
    return sock
