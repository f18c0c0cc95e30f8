"""Emulated serial board: chips at a pseudo-terminal, with frames `s` + packet + `q` and commands `c...q`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import select
import struct
import termios
import time
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import encode_serial
from larpixdaq.emulators import detector
from larpixdaq.emulators.tile import EmulatedTile
from larpixdaq.errors import ConfigError, UsageError
from larpixdaq.runtime.event_loop import Signals

DESCRIPTION = """\
A board on a serial line, as a pseudo-terminal, with v1 chips unless --chips or --asic ask for others. At the start it
prints one JSON line with its path, {"ready": {"1": {"device": "/dev/pts/3"}}}; at the end one with the frames that were
sent, {"sent": {"1": {"words": 10, "D": 10}}, "seconds": 0.1}. SIGINT and SIGTERM end it cleanly."""

#: Bytes of a frame.
FRAME: Final = 10
_START, _COMMAND, _STOP = b"scq"
#: Commands by address: ticks for each bit, length of a reset in ticks less one, and resets of the chips.
_CLOCK_RATIO: Final = 0
_RESET_LENGTH: Final = 1
_RESETS: Final = (2, 6)
#: Ticks of a reset without a command for its length.
_DEFAULT_RESET: Final = 128
#: Speed of the line, and bits of a byte on it: 10,000 frames/s.
BAUD: Final = 1_000_000
BITS: Final = 10
#: Maximum bytes of a read.
_READ: Final = 65_536
#: Maximum bytes that wait for the line; further frames are lost.
_QUEUE: Final = 1_000_000
#: Seconds after the opening of the terminal in which the host sets it up; until then it echoes what it receives.
_SETTLE: Final = 0.01
#: Seconds between two turns.
_TURN: Final = 0.002
#: Maximum seconds at the end for the host to read the last bytes.
_LAST_READ: Final = 1.0
_IO_CHANNEL: Final = 1
#: Maximum share of the line for noise, so that answers are sent too: chips keep both in one queue.
NOISE_SHARE: Final = 0.9
#: Default chips: a configuration in larpix-control's package.
V1_CHIPS: Final = "controller/pcb-1_chip_info.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(io_groups=1)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the random numbers (default 0)")
    parser.add_argument("--baud", type=int, default=BAUD, metavar="B", help="speed of the line (default %(default)d)")
    detector.add_arguments(parser, tile_channels=1)


def check_arguments(args: argparse.Namespace) -> None:
    """Check the options, and set `args.detector`. Raises UsageError, ConfigError and FileError."""
    if args.baud < 1:
        raise UsageError(f"--baud: expected a positive number, found {args.baud}")
    if args.chips is None:
        args.chips = V1_CHIPS if args.asic in (None, "1") else "1"
    args.power_on = True  # a serial board has no supplies to switch
    args.detector = detector.check_arguments(args)
    if len(args.detector.boards) != 1:
        io_groups = sorted(args.detector.boards)
        raise ConfigError(f"{args.chips}: a serial line has one io_group, found {io_groups}")


class SerialBoard:
    """Chips at a serial line: passes frames on to the chips, executes commands, and sends the chips' packets."""

    def __init__(self, tile: EmulatedTile, line: SerialLine) -> None:
        self.tile = tile
        self.line = line
        self.commands = 0
        self._reset_length = _DEFAULT_RESET
        self._frames = Frames()

    def receive(self, data: bytes) -> None:
        """Process bytes from the host. Consecutive words go to the chips together."""
        words: list[bytes] = []
        for frame in self._frames.feed(data):
            if frame[0] == _START:
                words.append(frame[1:-1])
                continue
            self._send(words)
            words = []
            self.commands += 1
            if frame[1] == _CLOCK_RATIO:
                self.tile.set_ticks_per_bit(_IO_CHANNEL, frame[2])
            elif frame[1] == _RESET_LENGTH:
                self._reset_length = frame[2] + 1
            elif frame[1] in _RESETS:
                self.tile.reset(self._reset_length)
        self._send(words)

    def _send(self, words: list[bytes]) -> None:
        if words:
            board_words = np.zeros((len(words), 16), np.uint8)
            board_words[:, 0], board_words[:, 1] = ord("D"), _IO_CHANNEL
            board_words[:, 8:] = np.frombuffer(b"".join(words), np.uint8).reshape(-1, 8)
            self.tile.transmit(board_words)

    def turn(self) -> None:
        """Send the chips' packets."""
        self.line.enqueue(self.tile.take_packets())
        self.line.write()

    def counts(self) -> dict[str, int]:
        own = {"commands": self.commands, "skipped_bytes": self._frames.skipped, "lost": self.line.lost}
        return {"words": self.line.sent, "D": self.line.sent} | own | self.tile.counts()


class Frames:
    """Cuts bytes of the host into frames of ten bytes, from `s` or `c` to `q`. Other bytes are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        #: Number of bytes outside of frames.
        self.skipped = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the complete frames."""
        data = self._rest + data
        start = 0
        while start + FRAME <= len(data):
            if data[start] in (_START, _COMMAND) and data[start + FRAME - 1] == _STOP:
                yield data[start : start + FRAME]
                start += FRAME
            else:
                self.skipped += 1
                start += 1
        self._rest = data[start:]


class SerialLine:
    """Pseudo-terminal with the speed of a serial line, and the queue of bytes to send.

    While no host has it open, all frames are lost, as on a real line. `sent`: whole frames written. `lost`: frames
    that the host did not read in time, or that the queue could not take.
    """

    def __init__(self, baud: int) -> None:
        self.master, host = os.openpty()
        os.set_blocking(self.master, False)
        self.device = os.ttyname(host)
        os.close(host)
        self._poll = select.poll()
        self._poll.register(self.master, select.POLLIN)
        self._open_since: float | None = None  # time at which the host has set it up
        self.sent = 0
        self.lost = 0
        self._bytes_per_second = baud / BITS
        self._budget = 0.0  # bytes that the line carries now
        self._updated = time.monotonic()
        self._queue = b""
        self._written = 0

    def enqueue(self, packets: NDArray[np.uint64]) -> None:
        """Enqueue one frame per packet."""
        free = max(0, _QUEUE - len(self._queue)) // FRAME
        self.lost += max(0, len(packets) - free)
        self._queue += encode_serial(packets[:free])

    def write(self) -> None:
        """Write the queued bytes that the line carries now and the host takes."""
        now = time.monotonic()
        if self._open_since is None:
            self.lost += -(-len(self._queue) // FRAME)
            self._queue = b""
            self._written -= self._written % FRAME  # the rest of that frame is lost
            self._budget = 0.0
            return
        if now < self._open_since:
            self._updated = now
            return
        self._budget = min(self._budget + (now - self._updated) * self._bytes_per_second, self._bytes_per_second / 20)
        self._updated = now
        rest = -self._written % FRAME  # of a frame whose first bytes were written
        part = self._queue[: max(0, rest + (int(self._budget) - rest) // FRAME * FRAME)]
        if not part:
            return
        try:
            n = os.write(self.master, part)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EIO):
                raise
            n = 0
        # whole frames that the host did not take are lost, because a line does not wait
        self._written += n
        rest = -self._written % FRAME
        self.lost += (len(part) - n - rest) // FRAME
        self._queue = part[n : n + rest] + self._queue[len(part) :]
        self._budget -= len(part)
        self.sent = self._written // FRAME

    def read(self) -> bytes:
        """Read bytes of the host, and wait for them at most _TURN seconds."""
        events = dict(self._poll.poll(_TURN * 1000)).get(self.master, 0)
        if events & select.POLLHUP:
            self._open_since = None
            if not events & select.POLLIN:
                time.sleep(_TURN)  # poll() does not wait while no host has the terminal open
        elif self._open_since is None:
            self._open_since = time.monotonic() + _SETTLE
        try:
            return os.read(self.master, _READ) if events & select.POLLIN else b""
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EIO):
                return b""
            raise

    def close(self) -> None:
        """Close the terminal, which discards what the host has not read: it gets a moment for that."""
        with contextlib.suppress(OSError):
            host = os.open(self.device, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                end = time.monotonic() + _LAST_READ
                empty = 0
                # Twice empty, because bytes are on their way from one end of the terminal to the other.
                while self._open_since is not None and empty < 2 and time.monotonic() < end:
                    time.sleep(_TURN)
                    (waiting,) = struct.unpack("i", fcntl.ioctl(host, termios.FIONREAD, bytes(4)))
                    empty = 0 if waiting else empty + 1
            finally:
                os.close(host)
        os.close(self.master)


def run(args: argparse.Namespace) -> None:
    """Emulate the board of the command line until SIGINT or SIGTERM."""
    (io_group,) = args.detector.boards
    noise = detector.make_noise(args, io_group)
    carries = int(args.baud / BITS / FRAME * NOISE_SHARE) or 1
    losses = detector.make_losses(args, io_group)
    # no heartbeats, because a serial line carries packets alone
    tile = EmulatedTile(noise, seconds=0, tick=0, heartbeat=0, carries=carries, losses=losses)
    if args.truth:
        args.detector.write_truth(args.truth, {io_group: noise})
    with Signals() as signals, contextlib.closing(SerialLine(args.baud)) as line:
        board = SerialBoard(tile, line)
        print(args.detector.ready_line({str(io_group): {"device": line.device}}), flush=True)
        start = time.monotonic()
        while not signals.stop:
            board.turn()
            board.receive(line.read())
        sent = {str(io_group): board.counts()}
        print(json.dumps({"sent": sent, "seconds": round(time.monotonic() - start, 6)}), flush=True)
