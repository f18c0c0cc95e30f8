"""Sockets of programs that speak to a core or to its components without larpixdaq.control, with the user's own key, and
of programs without libzmq."""

import contextlib
import socket as sockets
import threading
from typing import Any

import zmq

from larpixdaq.keys import credentials
from larpixdaq.keys.curve import connect_with


class Context(zmq.Context):
    """Keeps its sockets until it is destroyed, which closes them."""

    def socket(self, *arguments: Any, **options: Any) -> Any:
        made = super().socket(*arguments, **options)
        self.__dict__.setdefault("made", []).append(made)
        return made


def use_key(socket: Any, core: str, server: str = "") -> None:
    """Give a socket, before connect(), the key of this user for the core at this address.

    `server`: the public key of the component that the socket will connect to; "": the core's.
    """
    own = credentials.find(core)
    assert own is not None, f"no key for {core}"
    if own.server:
        connect_with(socket, own.pair, server or own.server)


def zmtp(body: bytes, flags: int) -> bytes:
    """A frame of ZMTP 3.1. `flags`: 1 more frames follow, 4 a command."""
    return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body


def zmtp_greeting(kind: bytes) -> bytes:
    """What a socket of this kind sends first, without keys."""
    ready = b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    return b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48) + zmtp(ready, 4)


class RawPeer:
    """A program that listens, and sends each peer frames of `size` bytes: first `burst` bytes, and then more slowly.

    All frames are one message without end, or each of them is a message (`whole`).

    Without libzmq, because that sends a message when its last frame is there.
    """

    def __init__(self, kind: bytes, burst: int, size: int = 100_000, *, whole: bool = False) -> None:
        self._kind, self._burst = kind, burst
        self._frame = zmtp(bytes(size), 0 if whole else 1)
        #: Bytes sent over the present connection, and over each one that was closed.
        self.sent = 0
        self.closed: list[int] = []
        self._ending = threading.Event()
        self._listener = sockets.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                with connection:
                    self._send(connection)

    def _send(self, connection: sockets.socket) -> None:
        self.sent = 0
        try:
            connection.sendall(zmtp_greeting(self._kind))
            connection.settimeout(5)
            answer = b""
            while b"Socket-Type" not in answer:  # it takes no messages before it has sent this
                answer += connection.recv(1000) or b"Socket-Type"
            while not self._ending.is_set():
                connection.sendall(self._frame)
                self.sent += len(self._frame)
                self._ending.wait(0.01 if self.sent > self._burst else 0)
        except OSError:
            self.closed.append(self.sent)

    def close(self) -> None:
        self._ending.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(sockets.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
