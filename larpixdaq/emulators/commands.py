"""The command channel of an emulated PACMAN (legacy format): ping, register read and write, words for the chips."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<cIxH")
_REGISTER = struct.Struct("<c3xI4xI")
_ERROR = struct.Struct("<cB14s")
_WORD = 16
_U32 = 0xFFFFFFFF

CLOCK_STATUS = 0x1000
CLOCK_TIMESTAMP = 0x1004
#: global, clock and trigger bank and 32 UARTs, 0x1000 each; behind them the power supply's I2C registers, one by one
_BANKS_END = 0x23000
_POWER = range(0x24000, 0x25000)

#: Reset values. The power readings are those of a tile at 1.8 V: larpix-control makes 1800 mV and 500 mA of them.
DEFAULTS: dict[int, int] = {
    0x10: 0,  # tiles enabled, a bit each
    0x14: 0,  # analog power
    CLOCK_STATUS: 0b1011,  # both PLLs locked, clock valid
    0x1010: 0b10,  # heartbeat enabled
    0x1014: 0x100,  # ticks of a reset
    0x1018: 1_000_000_000,  # heartbeat, in ticks of 100 MHz
    0x101C: 4,  # divider of the master clock: 10 MHz
    0x2010: 0,  # periodic trigger
    0x2018: 10_000_000,  # its period
    **{0x2000 + 0x1000 * uart + 0x10: 10 for uart in range(1, 33)},  # clock ratio: 5 Mb/s
    0x24021: 100 << 16,  # input current and voltage
    0x24022: 3000 << 19,
    0x24031: 100 << 16,  # VDDD current and voltage
    0x24032: 450 << 19,
    0x24041: 100 << 16,  # VDDA current and voltage
    0x24042: 450 << 19,
}

BAD_MESSAGE, BAD_WORD, BAD_REGISTER = 1, 2, 3


def _error(code: int, text: str) -> bytes:
    return _ERROR.pack(b"E", code, text.encode("ascii", "replace")[:14])


class Behind(Protocol):
    """What the board's commands act on: its chips."""

    def transmit(self, words: NDArray[np.uint8]) -> None:
        """Words for the chips, shape (N, 16), in order."""

    def written(self, register: int, before: int, value: int) -> None:
        """A register of the board was written."""


class Commands:
    """The registers of one board and its answers. `clock` gives the board's 32-bit timestamp."""

    def __init__(self, clock: Callable[[], int], behind: Behind | None = None) -> None:
        self._clock = clock
        self._behind = behind
        self.registers = dict(DEFAULTS)

    def answer(self, request: bytes) -> bytes:
        """The reply to any bytes: one word for each word of the request; an E word for what a board does not know.

        (A real server crashes on an unknown register, so nobody relies on how it answers that.)
        """
        words = self._words(request)
        return _HEADER.pack(b"!", int(time.time()) & _U32, len(words) // _WORD) + words

    def _words(self, request: bytes) -> bytes:
        if len(request) < _HEADER.size:
            return _error(BAD_MESSAGE, "no header")
        kind, _, count = _HEADER.unpack_from(request)
        if kind != b"?":
            return _error(BAD_MESSAGE, "not a request")
        if len(request) != _HEADER.size + _WORD * count:
            return _error(BAD_MESSAGE, "wrong length")
        words = np.frombuffer(request, np.uint8, offset=_HEADER.size).reshape(-1, _WORD)
        (bounds,) = np.nonzero(np.diff(words[:, 0] == ord("D"), prepend=False, append=False))
        return b"".join(self._run(words, a, b) for a, b in pairwise([0, *bounds.tolist(), count]) if a < b)

    def _run(self, words: NDArray[np.uint8], first: int, end: int) -> bytes:
        """Answers to words that all are for the chips, or none of which is."""
        run = words[first:end]
        if run[0, 0] != ord("D"):
            return b"".join(self._word(word.tobytes()) for word in run)
        if self._behind:
            self._behind.transmit(run)
        return run.tobytes()

    def _word(self, word: bytes) -> bytes:
        kind = word[:1]
        if kind == b"P":
            return b"P" + bytes(_WORD - 1)
        if kind not in (b"R", b"W"):
            return _error(BAD_WORD, f"word 0x{word[0]:02x}")
        _, register, value = _REGISTER.unpack(word)
        if not (register < _BANKS_END and register % 4 == 0) and register not in _POWER:
            return _error(BAD_REGISTER, f"reg 0x{register:x}")
        if kind == b"R":
            value = self._clock() & _U32 if register == CLOCK_TIMESTAMP else self.registers.get(register, 0)
        elif register not in (CLOCK_STATUS, CLOCK_TIMESTAMP):
            before = self.registers.get(register, 0)
            self.registers[register] = value
            if self._behind:
                self._behind.written(register, before, value)
        return _REGISTER.pack(kind, register, value)
