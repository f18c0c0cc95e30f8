"""Boards that only an IO class can speak to, larpix-control's or anybody's: in a process of its own, at Python's speed.

The process (io_class_child.py) asks the class for packets and hands them over as messages of a PACMAN, which are
decoded
and counted like any board's; words to chips go through it too. One that dies is started again after 1 s, then 2 s, 4 s
and so on up to a minute, until it has lived for a minute.

Words and orders to boards that an IO class speaks to.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import split_log
from larpixdaq.constants import IO_GROUPS
from larpixdaq.errors import ConfigError
from larpixdaq.protocol.io_class import LARGEST, Data, Failed, FromChild, Hello, Idle, Order, Send, Sent, answers, pack
from larpixdaq.protocol.stream import LossVerdict
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.command_channel import BoardReply, Channel
from larpixdaq.sources.data_quality import Presence, verdicts
from larpixdaq.sources.replay_batches import Decoders, PieceSource, RecordedMessages
from larpixdaq.sources.source import BoardStatus

#: Seconds that a class has to be there.
START_LIMIT: Final = 30.0
#: Seconds until a process that died is started again, at first and at most; and for which it has to live to be trusted.
AGAIN, MOST_AGAIN = 1.0, 60.0
#: Seconds that a process has to end by itself: when it is told to, and when it seems to have done so.
_END_LIMIT: Final = 1.0
_ENDED_LIMIT: Final = 0.2
#: Seconds after which a killed process counts as gone.
_KILLED_LIMIT: Final = 1.0
_ENDED: Final = "its process ended"
#: Messages of one read.
_BATCH: Final = 64
#: Seconds that a class has to send a request.
SEND_LIMIT: Final = 10.0
#: Words of one request.
_WORDS: Final = 256


class IoClassSource(PieceSource):
    """One object of an IO class; implements `sources.base.Source`. `io_groups` are known when it is open.

    `io_class` is the name of a class in larpix.io, package.module:Class or package.module.Class, `arguments` what it is
    made with. `clock64`: its boards' clocks have 64 bits. `revisions`: register maps of PACMAN boards by io_group, 0
    for those that are not named.
    """

    waits = False
    recorded = False
    finished = False
    kind = "IO class"

    def __init__(
        self,
        io_class: str,
        arguments: Sequence[str] = (),
        *,
        asic: Asic,
        clock64: bool = False,
        revisions: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.name = f"IO class {io_class}"
        self.address = " ".join((io_class, *arguments))
        self.layout = layout_of(asic, clock64=clock64)
        self.io_groups: tuple[int, ...] = ()
        self.channels: tuple[Channel, ...] = ()
        self.sockets: tuple[Any, ...] = ()
        self.drained = True
        form = "wide" if clock64 else "narrow"
        self._command = [str(Path(__file__).with_name("io_class_child.py")), str(int(asic)), form, io_class, *arguments]
        self._channels: dict[int, IoClassChannel] = {}
        self._revisions = dict(revisions or {})
        self._decoders = Decoders(asic, format="auto", clock64=clock64)
        self._presence = Presence()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._pidfd = -1
        self._there = False  # it has said Hello
        self._more = False  # the class may have more than it has handed over
        self._again_at: float | None = None
        self._again = AGAIN
        self._trusted_at = math.inf
        self._gone_since = 0.0
        self._gone = ""  # why the process is not there

    def open(self) -> None:
        """Start the process and wait until the class is there; ConfigError says why it is not."""
        self._start()
        deadline = time.monotonic() + START_LIMIT
        while not self._there:
            left = deadline - time.monotonic()
            if self._process is None or left <= 0:
                self.close()
                raise ConfigError(
                    self._problems[-1] if self._problems else f"{self.name}: not there in {START_LIMIT:g} s"
                )
            select.select(self.sockets, [], [], left)
            self._take(time.monotonic())

    def close(self) -> None:
        self._again_at = None
        self._end(_END_LIMIT)

    def start(self, counts: NDArray[np.uint64]) -> None:
        self._decoders.start(counts)
        self._presence.start(time.time_ns())

    def due(self) -> float | None:
        return self._again_at

    def read(self) -> bool:
        now = time.monotonic()
        if self._again_at is not None and now >= self._again_at:
            self._again_at = None
            self._start()
        if now >= self._trusted_at:
            self._trusted_at, self._again = math.inf, AGAIN
        return self._take(now) or self._more

    def texts(self) -> list[tuple[str, int]]:
        return []

    def evidence(self, now: int) -> list[LossVerdict]:
        return [
            line
            for io_group in self.io_groups
            for line in verdicts(io_group, self._decoders.noticed(io_group), self._presence.findings(io_group, now))
        ]

    def delivered(self, made: int, stored: int, now: int) -> None:
        self._presence.delivered(made, stored, now)

    def boards(self) -> list[BoardStatus]:
        away, why = self._presence.away_ns, self._gone
        return [board._replace(away_ns=away, problem=why) for board in super().boards()]

    def _take(self, now: float) -> bool:
        """What the process has handed over by now; False when that is nothing."""
        found: list[Data] = []
        reason = ""
        if self._sock is not None:
            # asked first: what it said before is in the socket still
            ended = bool(select.select([self._pidfd], [], [], 0)[0])
            there = self._there
            while not reason and len(found) < _BATCH and self._there == there:
                try:
                    message = answers.decode(self._sock.recv(LARGEST))
                except BlockingIOError:
                    reason = _ENDED if ended else ""
                    break
                except (OSError, msgspec.MsgspecError):  # it has closed its end
                    reason = _ENDED
                    break
                if isinstance(message, Data):
                    found.append(message)
                    self._more = True
                else:
                    reason = self._hear(message, now)
        if reason:
            self._lose(now, reason)
        self.drained = not self._more
        return bool(found) and self._release(found)

    def _release(self, found: list[Data]) -> bool:
        self._presence.heard(time.time_ns())
        data = np.frombuffer(b"".join(one.log for one in found), np.uint8)
        spans, _ = split_log(data)
        groups = np.frombuffer(b"".join(one.io_groups for one in found), np.uint8)
        self._piece = RecordedMessages(self._decoders, data, spans, groups, None)
        return self._piece.release(0.0)

    def _hear(self, message: FromChild, now: float) -> str:
        """Why the process is of no use any more, or nothing."""
        if isinstance(message, Idle):
            self._more = False
        elif isinstance(message, Sent):
            if message.io_group in self._channels:
                self._channels[message.io_group].done(message)
        elif isinstance(message, Failed):
            return message.text
        elif isinstance(message, Hello):
            io_groups = tuple(message.io_groups)
            if not io_groups or not all(0 < group < IO_GROUPS for group in io_groups):
                return f"its io_groups: expected some from 1 to {IO_GROUPS - 1}, found {list(io_groups)}"
            strangers = self._revisions.keys() - {0, *io_groups}
            if strangers:
                return f"--pacman-revision: no board has io_group {min(strangers)}, its io_groups: {list(io_groups)}"
            if not self.io_groups:
                self.io_groups = io_groups
                self._channels = {
                    group: IoClassChannel(
                        self.name,
                        group,
                        self._post,
                        registers=message.registers,
                        revision=self._revisions.get(group, self._revisions.get(0, 0)),
                    )
                    for group in io_groups
                }
                self.channels = tuple(self._channels.values())
            elif self.io_groups != io_groups:
                return f"its io_groups were {list(self.io_groups)} and are {list(io_groups)} now"
            elif self._gone_since:
                self._problems.append(f"{self.name}: connected again after {now - self._gone_since:.1f} s")
            self._there = True
            self._gone = ""
            self._trusted_at = now + MOST_AGAIN
            self._presence.connected(time.time_ns())
        return ""

    def _post(self, message: bytes) -> bool:
        try:
            return self._sock is not None and self._there and bool(self._sock.send(message))
        except OSError:
            return False

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        script, *arguments = self._command
        try:
            # As the process for routines (hardware/supervisor.py): no fork of our memory, a session of its own.
            self._process = subprocess.Popen(
                [sys.executable, script, str(theirs.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            self._lose(time.monotonic(), f"its process cannot be started: {error.strerror}")
            return
        finally:
            theirs.close()
        self._sock = ours
        self._pidfd = os.pidfd_open(self._process.pid)  # what the class may have forked keeps the socket open
        self.sockets = (ours.fileno(), self._pidfd)

    def _lose(self, now: float, reason: str) -> None:
        status = self._end(_ENDED_LIMIT)
        if status is not None and reason == _ENDED:
            reason += f" by signal {signal.Signals(-status).name}" if status < 0 else f" with status {status}"
        self._again_at = now + self._again
        self._problems.append(
            f"{self.name}: {reason}" + (f"; starts again in {self._again:g} s" if self.io_groups else "")
        )
        self._again = min(2 * self._again, MOST_AGAIN)
        self._gone_since = now
        self._gone = reason
        self._presence.lost(time.time_ns())
        for channel in self._channels.values():
            channel.lost(reason)

    def _end(self, limit: float) -> int | None:
        """End the process, which has so many seconds to do so by itself; its status, None when there was none."""
        self.sockets = ()
        self._there = self._more = False
        self._trusted_at = math.inf
        if self._process is None or self._sock is None:
            return None
        process, self._process = self._process, None
        self._sock.close()
        self._sock = None
        select.select([self._pidfd], [], [], limit)
        os.close(self._pidfd)
        # With whatever it has started. Nobody has waited for it yet, so the number is still its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(_KILLED_LIMIT)
        except subprocess.TimeoutExpired:  # it waits for a device or a disk that does not answer, and dies after that
            return -signal.SIGKILL


class IoClassChannel:
    """Words to the chips of one io_group, through the class's `send`; done when that has returned. With the methods of
    PACMAN_IO for registers the class also takes orders to the board, as those of a PACMAN."""

    batch = _WORDS
    identify = b""
    sockets: tuple[Any, ...] = ()  # answers come among the data

    def __init__(
        self, name: str, io_group: int, post: Callable[[bytes], bool], *, registers: bool, revision: int = 0
    ) -> None:
        """`post` sends a message to the process, or returns False."""
        self.kind = "pacman" if registers else "class"
        self.revision = revision
        self.io_group = io_group
        self.name = f"{name}, io_group {io_group}"
        self.busy = False
        self._post = post
        self._number = 0
        self._reply: BoardReply | None = None
        self._limit = SEND_LIMIT
        self._deadline = 0.0

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        self._number += 1
        self._ask(Send(self._number, self.io_group, io_channels.tobytes(), words.astype("<u8").tobytes()))

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        self._number += 1
        self._ask(Order(self._number, self.io_group, body), seconds)

    def _ask(self, request: Send | Order, seconds: float = 0.0) -> None:
        self._limit = SEND_LIMIT + seconds
        self._deadline = time.monotonic() + self._limit
        self._reply = None if self._post(pack(request)) else self._failed("its process takes nothing")
        self.busy = True

    def take(self) -> BoardReply | None:
        if self._reply is None and time.monotonic() >= self._deadline:
            self._reply = self._failed(f"not sent within {self._limit:g} s")
        self.busy = self._reply is None
        return self._reply

    def due(self) -> float | None:
        if not self.busy:
            return None
        return self._deadline if self._reply is None else 0.0

    def close(self) -> None:
        self.busy = False

    def firmware(self, answer: bytes) -> str:
        return ""

    def done(self, said: Sent) -> None:
        """The process says what became of a request."""
        if said.number == self._number and self._reply is None:
            self._reply = self._failed(said.error) if said.error else BoardReply(said.body)

    def lost(self, reason: str) -> None:
        """The process is gone."""
        if self.busy and self._reply is None:
            self._reply = self._failed(reason)

    def _failed(self, error: str) -> BoardReply:
        return BoardReply(b"", f"{self.name}: {error}")
