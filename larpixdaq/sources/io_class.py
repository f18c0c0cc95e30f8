"""Boards behind an IO class of larpix-control or of a user, which runs in a process of its own, at Python's speed.

The process (io_class_child.py) asks the class for packets and passes them on as messages of a PACMAN, which are decoded
and counted like those of any board. Words to the chips and orders to the board go through it too. A dead process is
started again after 1 s, then after 2 s, 4 s and so on up to 60 s. When a process has lived for 60 s, the delay is 1 s
again.
"""

from __future__ import annotations

import math
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import split_log
from larpixdaq.constants import IO_GROUPS
from larpixdaq.errors import ConfigError
from larpixdaq.protocol.io_class import Data, Failed, FromChild, Hello, Idle, Order, Send, Sent, answers, pack
from larpixdaq.runtime.child_process import ChildProcess, signal_name
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.command_channel import BoardReply, Channel
from larpixdaq.sources.replay_batches import Decoders, PieceSource, RecordedMessages

#: Seconds within which the class has to be ready.
START_LIMIT: Final = 30.0
#: First and maximum seconds until a dead process is started again. After a process has lived for the maximum, the next
#: delay is the first one.
RESTART_DELAY, MAX_RESTART_DELAY = 1.0, 60.0
#: Seconds for a process to end by itself: after its socket was closed, and after it seems to have ended.
_END_LIMIT: Final = 1.0
_ENDED_LIMIT: Final = 0.2
_ENDED: Final = "its process ended"
#: Maximum messages of a read().
_BATCH: Final = 64
#: Seconds for the class to execute a request.
SEND_LIMIT: Final = 10.0
#: Maximum words of one request.
_WORDS: Final = 256


class IoClassSource(PieceSource):
    """Boards of one object of an IO class. `io_groups` are known after open().

    `io_class` is the name of a class in larpix.io, package.module:Class or package.module.Class, and `arguments` are
    the arguments of its constructor. `clock64`: the clocks of its boards have 64 bits. `revisions`: register maps of
    PACMAN boards by io_group; key 0 is for all others.
    """

    waits = False
    kind = "IO class"
    channels: tuple[IoClassChannel, ...] = ()

    def __init__(
        self,
        io_class: str,
        arguments: Sequence[str] = (),
        *,
        asic: Asic,
        clock64: bool = False,
        revisions: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(f"IO class {io_class}", layout_of(asic, clock64=clock64), ())
        self.address = " ".join((io_class, *arguments))
        self._process = ChildProcess(
            Path(__file__).with_name("io_class_child.py"),
            [str(int(asic)), "wide" if clock64 else "narrow", io_class, *arguments],
            kind=socket.SOCK_SEQPACKET,
        )
        self.sockets = (self._process.fileno(),)
        self._revisions = dict(revisions or {})
        self._decoders = Decoders(asic, format="auto", clock64=clock64)
        self._ready = False  # the process has sent Hello
        self._more = False  # the class may have more packets than it has passed on
        self._restart_at: float | None = None
        self._restart_delay = RESTART_DELAY
        self._stable_at = math.inf

    def open(self) -> None:
        """Start the process and wait until the class is ready; ConfigError says why it is not."""
        self._start()
        deadline = time.monotonic() + START_LIMIT
        while not self._ready:
            left = deadline - time.monotonic()
            if not self._process.alive or left <= 0:
                self.close()
                raise ConfigError(
                    self._problems[-1] if self._problems else f"{self.name}: not there in {START_LIMIT:g} s"
                )
            select.select(self.sockets, [], [], left)
            self._receive(time.monotonic())

    def close(self) -> None:
        self._restart_at = None
        self.sockets = ()
        self._end(_END_LIMIT)
        self._process.close()

    def due(self) -> float | None:
        return self._restart_at

    def read(self) -> bool:
        now = time.monotonic()
        if self._restart_at is not None and now >= self._restart_at:
            self._restart_at = None
            self._start()
        if now >= self._stable_at:
            self._stable_at, self._restart_delay = math.inf, RESTART_DELAY
        return self._receive(now) or self._more

    def _receive(self, now: float) -> bool:
        """Take the messages of the process. Returns whether there are board messages among them."""
        data_messages: list[Data] = []
        reason = ""
        ready = self._ready
        while self._process.alive and not reason and len(data_messages) < _BATCH and self._ready == ready:
            packet = self._process.receive()
            if packet is None:
                break
            try:
                message = answers.decode(packet)
            except msgspec.MsgspecError:  # nothing: the process has ended, or closed its socket
                reason = _ENDED
            else:
                if isinstance(message, Data):
                    data_messages.append(message)
                    self._more = True
                else:
                    reason = self._handle(message, now)
        if reason:
            self._lose(now, reason)
        self.drained = not self._more
        return bool(data_messages) and self._release_messages(data_messages)

    def _release_messages(self, messages: list[Data]) -> bool:
        self._presence.heard(time.time_ns())
        data = np.frombuffer(b"".join(message.log for message in messages), np.uint8)
        spans, _ = split_log(data)
        groups = np.frombuffer(b"".join(message.io_groups for message in messages), np.uint8)
        self._piece = RecordedMessages(self._decoders, data, spans, groups, None)
        return self._piece.release(0.0)

    def _handle(self, message: FromChild, now: float) -> str:
        """Handle a message. Returns the reason why the process is useless, or ""."""
        if isinstance(message, Idle):
            self._more = False
        elif isinstance(message, Sent):
            for channel in self.channels:
                if channel.io_group == message.io_group:
                    channel.finish(message)
        elif isinstance(message, Failed):
            return message.text
        elif isinstance(message, Hello):
            io_groups = tuple(message.io_groups)
            if not io_groups or not all(0 < group < IO_GROUPS for group in io_groups):
                return f"its io_groups: expected some from 1 to {IO_GROUPS - 1}, found {list(io_groups)}"
            unknown = self._revisions.keys() - {0, *io_groups}
            if unknown:
                return f"--pacman-revision: no board has io_group {min(unknown)}, its io_groups: {list(io_groups)}"
            if not self.io_groups:
                self.io_groups = io_groups
                self.channels = tuple(
                    IoClassChannel(
                        self.name,
                        group,
                        self._post,
                        registers=message.registers,
                        revision=self._revisions.get(group, self._revisions.get(0, 0)),
                    )
                    for group in io_groups
                )
            elif self.io_groups != io_groups:
                return f"its io_groups were {list(self.io_groups)} and are {list(io_groups)} now"
            self._ready = True
            self._stable_at = now + MAX_RESTART_DELAY
            self._note_connection()
        return ""

    def _post(self, message: bytes) -> bool:
        return self._ready and self._process.send(message)

    def _start(self) -> None:
        try:
            self._process.start()
        except OSError as error:
            self._lose(time.monotonic(), f"its process cannot be started: {error.strerror}")

    def _lose(self, now: float, reason: str) -> None:
        status = self._end(_ENDED_LIMIT)
        if status is not None and reason == _ENDED:
            reason += f" by signal {signal_name(-status)}" if status < 0 else f" with status {status}"
        self._restart_at = now + self._restart_delay
        self._note_loss(reason, reason + (f"; starts again in {self._restart_delay:g} s" if self.io_groups else ""))
        self._restart_delay = min(2 * self._restart_delay, MAX_RESTART_DELAY)
        for channel in self.channels:
            channel.fail(reason)

    def _end(self, limit: float) -> int | None:
        """End the process, which has `limit` seconds to end by itself. Returns its exit status; None: no process."""
        self._ready = self._more = False
        self._stable_at = math.inf
        return self._process.end(limit)


class IoClassChannel(Channel):
    """Words to the chips of one io_group by the class's `send`; a request ends when `send` has returned.

    The source receives the outcome among the data. A class with the methods of PACMAN_IO for registers also takes
    orders to the board, in the format of a PACMAN."""

    batch = _WORDS

    def __init__(
        self, name: str, io_group: int, post: Callable[[bytes], bool], *, registers: bool, revision: int
    ) -> None:
        """`post` sends a message to the process, or returns False."""
        super().__init__(f"{name}, io_group {io_group}", io_group, SEND_LIMIT)
        self.kind = "pacman" if registers else "class"
        self.revision = revision
        self._post = post
        self._number = 0

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        self._number += 1
        self._request(Send(self._number, self.io_group, io_channels.tobytes(), words.astype("<u8").tobytes()))

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        self._number += 1
        self._request(Order(self._number, self.io_group, body), seconds)

    def _request(self, request: Send | Order, seconds: float = 0.0) -> None:
        self._begin(seconds)
        if not self._post(pack(request)):
            self._refuse("its process does not accept the request")

    def take(self) -> BoardReply | None:
        if self._reply is None and time.monotonic() >= self._deadline:
            self._reply = self._failure(f"not sent within {self._limit:g} s")
        return super().take()

    def finish(self, sent: Sent) -> None:
        """Take the outcome of a request."""
        if sent.number == self._number and self._reply is None:
            self._reply = self._failure(sent.error) if sent.error else BoardReply(sent.body)

    def fail(self, reason: str) -> None:
        """Fail the request in flight, because the process has ended."""
        if self.busy and self._reply is None:
            self._reply = self._failure(reason)
