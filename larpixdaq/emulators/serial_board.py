"""An emulated serial board: chips behind a pseudo-terminal, frames `s` + packet + `q`, and the commands `c...q`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import select
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import encode_serial
from larpixdaq.emulators import detector
from larpixdaq.emulators.tile import EmulatedTile
from larpixdaq.errors import ConfigError
from larpixdaq.runtime.event_loop import catch

DESCRIPTION = """\
A board on a serial line, as a pseudo-terminal, with v1 chips unless --chips or --asic say otherwise. At the start it
prints one JSON line with its path, {"ready": {"1": {"device": "/dev/pts/3"}}}; at the end one with the frames that were
sent, {"sent": {"1": {"words": 10, "D": 10}}, "seconds": 0.1}. SIGINT and SIGTERM end it cleanly."""

FRAME: Final = 10
_START, _STOP, _COMMAND = b"scq"[0], b"scq"[2], b"scq"[1]
#: Commands by address: ticks for each bit, the length of a reset, in ticks less one, and those that reset the chips.
_CLOCK_RATIO: Final = 0
_RESET_LENGTH: Final = 1
_RESETS: Final = (2, 6)
#: Ticks.
_USUAL_RESET: Final = 128
#: 1,000,000 baud carry so many frames a second.
BAUD: Final = 1_000_000
BITS: Final = 10  # of a byte on the line
_READ: Final = 65_536
#: Bytes that may wait for the line; chips that say more lose it.
_QUEUE: Final = 1_000_000
#: Seconds that whoever opens the terminal gets to set it up; until then it would send back what it is sent.
_SETTLE: Final = 0.01
#: Seconds between two looks at what is to be sent.
_TURN: Final = 0.002
_IO_CHANNEL: Final = 1
#: Of the line that noise may fill, so that answers get through: chips keep both in one queue.
NOISE_SHARE: Final = 0.9
V1_CHIPS: Final = "controller/pcb-1_chip_info.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(io_groups=1)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another number, other data (default 0)")
    parser.add_argument("--baud", type=int, default=BAUD, metavar="B", help="speed of the line (default %(default)d)")
    detector.add_arguments(parser, tile_channels=1)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2 for options that do not go together."""
    if args.baud < 1:
        parser.error(f"--baud: expected a positive number, found {args.baud}")
    if args.chips is None:
        args.chips = V1_CHIPS if args.asic in (None, "1") else "1"
    args.power_on = True  # there is nothing to switch
    args.detector = detector.check_arguments(parser, args)
    if len(args.detector.boards) != 1:
        found = sorted(args.detector.boards)
        raise ConfigError(f"{args.chips}: a serial line has one io_group, found {found}")


class Frames:
    """Cuts what the host writes into frames of ten bytes, as the board does: it slides over the bytes and takes ten
    that begin with `s` or `c` and end with `q`."""

    def __init__(self) -> None:
        self._rest = b""
        #: Bytes that belonged to no frame.
        self.skipped = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        data = self._rest + data
        at = 0
        while at + FRAME <= len(data):
            if data[at] in (_START, _COMMAND) and data[at + FRAME - 1] == _STOP:
                yield data[at : at + FRAME]
                at += FRAME
            else:
                self.skipped += 1
                at += 1
        self._rest = data[at:]


class SerialLine:
    """The pseudo-terminal and what waits for it. `sent` counts frames that were handed to it, whole ones.

    While nobody has it open all that is sent is lost, as on a line.
    """

    def __init__(self, baud: int) -> None:
        self.master, host = os.openpty()
        os.set_blocking(self.master, False)
        self.device = os.ttyname(host)
        os.close(host)
        self._poll = select.poll()
        self._poll.register(self.master, select.POLLIN)
        self._from: float | None = None  # when somebody listens, since someone has opened it
        self.sent = 0
        #: Frames that nobody took, or that found no room.
        self.lost = 0
        self._bytes_per_second = baud / BITS
        self._budget = 0.0
        self._at = time.monotonic()
        self._waiting = b""
        self._written = 0

    def put(self, packets: NDArray[np.uint64]) -> None:
        room = max(0, _QUEUE - len(self._waiting)) // FRAME
        self.lost += max(0, len(packets) - room)
        self._waiting += encode_serial(packets[:room])

    def write(self) -> None:
        """As much as the line carries by now, and whoever reads takes."""
        now = time.monotonic()
        if self._from is None:
            self.lost += -(-len(self._waiting) // FRAME)
            self._waiting = b""
            self._written -= self._written % FRAME  # the rest of that frame is gone
            self._budget = 0.0
            return
        if now < self._from:
            self._at = now
            return
        self._budget = min(self._budget + (now - self._at) * self._bytes_per_second, self._bytes_per_second / 20)
        self._at = now
        rest = -self._written % FRAME  # of a frame whose beginning was written
        part = self._waiting[: max(0, rest + (int(self._budget) - rest) // FRAME * FRAME)]
        if not part:
            return
        try:
            n = os.write(self.master, part)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EIO):
                raise
            n = 0
        # nobody makes a line wait: whole frames that were not taken are lost
        self._written += n
        rest = -self._written % FRAME
        self.lost += (len(part) - n - rest) // FRAME
        self._waiting = part[n : n + rest] + self._waiting[len(part) :]
        self._budget -= len(part)
        self.sent = self._written // FRAME

    def read(self) -> bytes:
        """What has come; waits for it, but not long."""
        events = dict(self._poll.poll(_TURN * 1000)).get(self.master, 0)
        if events & select.POLLHUP:
            self._from = None
            if not events & select.POLLIN:
                time.sleep(_TURN)  # poll() does not wait for somebody to open it
        elif self._from is None:
            self._from = time.monotonic() + _SETTLE
        try:
            return os.read(self.master, _READ) if events & select.POLLIN else b""
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EIO):
                return b""
            raise

    def close(self) -> None:
        os.close(self.master)


class SerialBoard:
    """Chips at a line: frames to them, commands to the board, what they say."""

    def __init__(self, tile: EmulatedTile, line: SerialLine) -> None:
        self.tile = tile
        self.line = line
        self.commands = 0
        self._reset_length = _USUAL_RESET
        self._frames = Frames()

    def heard(self, data: bytes) -> None:
        """Bytes from the host; words in a row go to the chips together."""
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
        self.line.put(self.tile.take())
        self.line.write()

    def counts(self) -> dict[str, int]:
        own = {"commands": self.commands, "skipped_bytes": self._frames.skipped, "lost": self.line.lost}
        return {"words": self.line.sent, "D": self.line.sent} | own | self.tile.counts()


def run(args: argparse.Namespace) -> None:
    """Emulate what the command line asks for, until SIGINT or SIGTERM."""
    ((io_group, _),) = args.detector.boards.items()
    noise = detector.make(args, args.detector, io_group)
    # no heartbeats here: a serial line carries packets alone
    carries = int(args.baud / BITS / FRAME * NOISE_SHARE) or 1
    tile = EmulatedTile(noise, seconds=0, tick=0, heartbeat=0, carries=carries, losses=detector.losses(args, io_group))
    if args.truth:
        detector.write_truth(args.truth, args.detector, {io_group: noise})
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    line = SerialLine(args.baud)
    try:
        catch(stop)
        board = SerialBoard(tile, line)
        print(detector.ready(args.detector, {str(io_group): {"device": line.device}}), flush=True)
        began = time.monotonic()
        while not stopped:
            board.turn()
            board.heard(line.read())
        said = {str(io_group): board.counts()}
        print(json.dumps({"sent": said, "seconds": round(time.monotonic() - began, 6)}), flush=True)
    finally:
        line.close()
