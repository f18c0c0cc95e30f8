"""Board on a serial line (FTDI or Raspberry Pi UART with an FPGA): 10-byte frames without a time.

The seconds of the time rows come from the host's clock. The decoder checks a frame of even parity by the bytes that
follow it; after 20 ms without a byte it decides with the bytes that it has. The source tries to open a disconnected
device (an unplugged cable) once a second.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import termios
import time
from typing import Final

import numpy as np
import serial
from numpy.typing import NDArray

from larpixdaq._native.decoders import SerialDecoder, encode_serial
from larpixdaq.errors import ConfigError
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.command_channel import BoardReply, Channel
from larpixdaq.sources.source import LiveSource

BAUD: Final = 1_000_000
#: Seconds without a byte after which the decoder no longer waits for the next frame.
SILENCE: Final = 0.02
#: Seconds between two attempts to open a disconnected device.
RETRY: Final = 1.0
#: Maximum bytes of a read(): more than the kernel's tty buffer holds.
_READ: Final = 65_536

_REASONS: Final = {
    errno.ENOENT: "no such device",
    errno.ENXIO: "no such device",
    errno.ENODEV: "no such device",
    errno.EACCES: "no permission (is this user in the group of the device, often dialout?)",
    errno.EBUSY: "in use by another program",
    errno.EAGAIN: "in use by another program",
    errno.ENOTTY: "not a serial device",
    errno.EINVAL: "not a serial device",
}


def _reason(error: BaseException) -> str:
    """Return the reason of an error in plain words. Some errors of pyserial have its number only in their cause."""
    for cause in (error, error.__context__):
        if cause is not None and cause.args and cause.args[0] in _REASONS:
            return _REASONS[cause.args[0]]
    return str(error)


#: Maximum frames of a request: 250 bytes, which the board's parser is known to take at once.
_FRAMES: Final = 25
#: Seconds until a full line is tried again: the time of 100 bytes at 1 Mbaud.
_WRITE_RETRY: Final = 0.001


class SerialChannel(Channel):
    """Frames to the board on its serial line. The board does not answer; a request ends when the line has taken it."""

    kind = "serial"
    batch = _FRAMES

    def __init__(self, device: str, io_group: int) -> None:
        super().__init__(f"serial device {device}, io_group {io_group}", io_group)
        self._rest = b""
        self._write_at = 0.0
        self.fd: int | None = None  # file descriptor of the source's device; None: disconnected

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        self.send_raw(encode_serial(words))

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        self._begin(seconds)
        self._rest = body
        self._write_at = 0.0

    def take(self) -> BoardReply | None:
        self._reply = self._write()
        return super().take()

    def due(self) -> float | None:
        return self._write_at if self.busy else None

    def _write(self) -> BoardReply | None:
        now = time.monotonic()
        if self.fd is None:
            return self._failure("device disconnected")
        try:
            while self._rest:
                self._rest = self._rest[os.write(self.fd, self._rest) :]
        except BlockingIOError:
            if now >= self._deadline:
                return self._failure(f"the line has not taken {len(self._rest)} bytes within {self._limit:g} s")
            self._write_at = now + _WRITE_RETRY
            return None
        except OSError as error:
            return self._failure(f"cannot send: {os.strerror(error.errno or errno.EIO)}")
        return BoardReply(b"")


class SerialSource(LiveSource):
    """Board on one serial device.

    `device` is a path such as /dev/ttyUSB0, `baud` the speed in bits per second. `rule`, "strict" or "larpix-control",
    says how the decoder finds frames after lost bytes.
    """

    kind = "serial"
    small_buffer = True  # 4 kB of a terminal
    _decoder: SerialDecoder

    def __init__(self, device: str, io_group: int = 1, *, asic: Asic, baud: int = BAUD, rule: str = "strict") -> None:
        decoder = SerialDecoder(io_group, int(asic), rule=rule)
        super().__init__(f"serial device {device}, io_group {io_group}", layout_of(asic), io_group, decoder)
        self.address = device
        self._line = SerialChannel(device, io_group)
        self.channels = (self._line,)
        self._baud = baud
        self._buffer = bytearray(_READ)
        self._port: serial.Serial | None = None
        self._poll = select.poll()
        self._flush_at: float | None = None
        self._retry_at: float | None = None

    def close(self) -> None:
        self._disconnect()
        self._retry_at = None

    def due(self) -> float | None:
        times = [moment for moment in (self._flush_at, self._retry_at) if moment is not None]
        return min(times, default=None)

    def read(self) -> bool:
        now = time.monotonic()
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = now + RETRY
            with contextlib.suppress(ConfigError):
                self.open()
        if self._take(now):
            return True
        if self._flush_at is not None and now >= self._flush_at:
            self._flush_at = None
            self._decoder.flush()
            return True
        return False

    def _take(self, now: float) -> bool:
        """Feed the bytes in the kernel's buffer to the decoder. A readable device without a byte has hung up."""
        self.drained = True
        if self._port is None or not self._poll.poll(0):
            return False
        try:
            count = os.readv(self._port.fileno(), [self._buffer])
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(now, os.strerror(error.errno or errno.EIO))
            return False
        if count == 0:
            self._lose(now, "it hung up")
            return False
        self.drained = count < len(self._buffer)
        wall = time.time_ns()
        self._presence.heard(wall)
        self._decoder.heard(wall)
        self._decoder.feed(memoryview(self._buffer)[:count], wall // 10**9)
        self._flush_at = now + SILENCE
        return True

    def open(self) -> None:
        try:
            # The lock keeps out a second reader, which would take bytes out of the middle of frames.
            self._port = serial.Serial(self.address, self._baud, timeout=0, exclusive=True)
        except (OSError, ValueError, OverflowError, termios.error) as error:
            raise ConfigError(f"serial device {self.address}: {_reason(error)}") from None
        self._poll.register(self._port.fileno(), select.POLLIN)
        self.sockets = (self._port.fileno(),)
        self._line.fd = self._port.fileno()
        self._note_connection()
        self._retry_at = None

    def _disconnect(self) -> None:
        self.sockets = ()
        self._line.fd = None
        if self._port is None:
            return
        self._poll.unregister(self._port.fileno())
        port, self._port = self._port, None
        # A device that is gone may refuse every request; close() frees the descriptor nevertheless.
        try:
            port.close()
        except OSError as error:
            self._problem(f"closing it failed: {error}")

    def _lose(self, now: float, reason: str) -> None:
        self._disconnect()
        self._note_loss(reason, f"disconnected ({reason}); trying again every {RETRY:g} s")
        self._retry_at = now + RETRY
