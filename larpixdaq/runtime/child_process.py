"""Child processes: each runs a Python program of this package, with a socket between child and parent.

A producer runs Python code of users in a child, so that this code can neither slow down nor end the receive loop.
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

#: Maximum bytes of one receive() or read_output(), so that a child that sends a lot does not delay the loop.
PIECE: Final = 1 << 16
#: Maximum seconds that end() waits for the exit status of a killed process.
_REAP_LIMIT: Final = 0.5
_PR_SET_PDEATHSIG: Final = 1


class ChildProcess:
    """One process at a time, which runs `script`. After its end start() starts the next one.

    Only end() blocks, for a limited time. `fileno()` polls readable when the process has sent or printed something, has
    ended, or can take more bytes of write(). All methods must be called in one thread, which must live as long as the
    process, because Linux ends the process together with the thread that started it.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str] = (),
        *,
        kind: socket.SocketKind = socket.SOCK_STREAM,
        capture: bool = False,
    ) -> None:
        """The arguments of `script` are the number of its socket, of this `kind`, and `arguments`; see parent_socket().

        `capture`: read_output() returns the text that the process writes to stdout and stderr. Otherwise the process
        shares stdout and stderr with its parent.
        """
        self._script, self._arguments = script, arguments
        self._kind, self._capture = kind, capture
        self._epoll = select.epoll()
        self._process: subprocess.Popen[bytes] | None = None
        self._unreaped: list[subprocess.Popen[bytes]] = []  # killed, but not ended yet
        self._sock: socket.socket | None = None
        self._pidfd = -1
        self._unsent = bytearray()

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def alive(self) -> bool:
        """Whether end() has not been called since start(). The process may have ended by itself."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Id of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def unsent(self) -> int:
        """Number of bytes of write() that the process has not taken yet."""
        return len(self._unsent)

    def start(self) -> None:
        """Start the program. Raises OSError if the system refuses it."""
        self._unreaped = [process for process in self._unreaped if process.poll() is None]
        self._sock, child_end = socket.socketpair(socket.AF_UNIX, self._kind)
        self._sock.setblocking(False)
        try:
            with child_end:
                # Without preexec_fn subprocess uses vfork, which neither copies nor marks the parent's mapped memory.
                # In its own session the process gets no Ctrl-C from the terminal, and end() kills its children too.
                self._process = subprocess.Popen(
                    [sys.executable, str(self._script), str(child_end.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if self._capture else None,
                    stderr=subprocess.STDOUT if self._capture else None,
                    pass_fds=[child_end.fileno()],
                    start_new_session=True,
                )
            # The end of the socket does not show the end of the process, because its own children keep the socket open.
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
        """Send bytes of write() that the process takes. Returns whether receive() or read_output() may return data."""
        ready = bool(self._epoll.poll(0))
        if ready and self._unsent:
            self._flush()
        return ready

    def receive(self) -> bytes | None:
        """Return the next packet, or the next part of the stream. Returns None if there is none, b"" after the end."""
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
                ended = True  # data sent just before its end may have arrived after recv()
            except OSError:
                return b""

    def read_output(self) -> bytes:
        """Return the next part of the process's output, b"" if there is none."""
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
        """Send a packet. Returns False if the process does not take it now."""
        try:
            return self._sock is not None and bool(self._sock.send(packet))
        except OSError:
            return False

    def write(self, data: bytes) -> None:
        """Append to the stream. Bytes that the process does not take now are sent later, until its end."""
        if self._process is not None:
            self._unsent += data
            self._flush()

    def end(self, limit: float = 0.0) -> int | None:
        """Kill the process and its children. Returns its exit status, None if there was no process.

        With a `limit`, first close the socket and give the process this many seconds to end by itself.
        """
        process, self._process = self._process, None
        if process is None or self._sock is None:
            return None
        if limit:
            self._sock.close()
            self._ends_within(limit)
        # The id still belongs to this process, because wait() has not been called. The signal does not change the
        # status of a process that has ended by itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            status = process.wait(_REAP_LIMIT)
        except subprocess.TimeoutExpired:  # it waits for a disk or device that does not answer, and ends after that
            self._unreaped.append(process)
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
        """Kill the process, if there is one. Afterwards fileno() is no longer valid."""
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
        except OSError:  # it has ended, which receive() reports
            self._unsent.clear()
        self._epoll.modify(self._sock, select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0))


def signal_name(number: int) -> str:
    """Return the name of a signal, or its number if it has no name, as most real-time signals."""
    return {int(known): known.name for known in signal.Signals}.get(number, str(number))


def end_with_parent(number: int) -> None:
    """Let the kernel send this signal to this process at the end of the thread that has started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def parent_socket(number: str) -> socket.socket:
    """Return the child's socket to the parent, and let the kernel end the child together with the parent."""
    end_with_parent(signal.SIGKILL)
    sock = socket.socket(fileno=int(number))
    sock.set_inheritable(False)
    return sock
