"""Command server of an emulated PACMAN (legacy format): ping, register read and write, words for the chips."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from larpixdaq.emulators.board_registers import BoardRegisters, ServerCrashError

_HEADER = struct.Struct("<cIxH")
_REGISTER = struct.Struct("<c3xI4xI")
#: Replies have garbage where requests have zeros, because servers make them in memory that is not cleared.
_REPLY_HEADER = struct.Struct("<cIsH")
_REPLY_REGISTER = struct.Struct("<c3sI4sI")
_GARBAGE = b"\xa5"
_ERROR = struct.Struct("<cB14s")
_BAD_MESSAGE = 1
#: Bytes of a word.
_WORD = 16
_U32 = 0xFFFFFFFF


class CommandServer:
    """Answers the requests of one board. `transmit` sends words to its chips, shape (N, 16), in order.

    `seconds`: time that the server sleeps before it replies to the last request.
    """

    def __init__(self, registers: BoardRegisters, transmit: Callable[[NDArray[np.uint8]], None] | None = None) -> None:
        self.registers = registers
        self.seconds = 0.0
        self._transmit = transmit

    def answer(self, request: bytes) -> bytes:
        """Return the reply to a request: a word for each of its words, in the same order, or an E word if malformed.

        Raises ServerCrashError for a word of unknown type or a register past the end, because real servers crash.
        """
        self.seconds = 0.0
        words = self._reply_words(request)
        return _REPLY_HEADER.pack(b"!", int(time.time()) & _U32, _GARBAGE, len(words) // _WORD) + words

    def _reply_words(self, request: bytes) -> bytes:
        if len(request) < _HEADER.size:
            return _error("no header")
        kind, _, count = _HEADER.unpack_from(request)
        if kind != b"?":
            return _error("not a request")
        if len(request) != _HEADER.size + _WORD * count:
            return _error("wrong length")
        words = np.frombuffer(request, np.uint8, offset=_HEADER.size).reshape(-1, _WORD)
        (bounds,) = np.nonzero(np.diff(words[:, 0] == ord("D"), prepend=False, append=False))
        return b"".join(self._execute(words[a:b]) for a, b in pairwise([0, *bounds.tolist(), count]) if a < b)

    def _execute(self, words: NDArray[np.uint8]) -> bytes:
        """Execute consecutive words that are all for the chips, or all for the board. Returns their replies."""
        if words[0, 0] != ord("D"):
            return b"".join(self._execute_word(word.tobytes()) for word in words)
        if self._transmit:
            self._transmit(words)
        return words.tobytes()

    def _execute_word(self, word: bytes) -> bytes:
        kind = word[:1]
        if kind == b"P":
            return b"P" + _GARBAGE * (_WORD - 1)
        if kind not in (b"R", b"W"):
            raise ServerCrashError(f"word of unknown type 0x{word[0]:02x}")
        _, register, value = _REGISTER.unpack(word)
        if kind == b"R":
            value = self.registers.read(register)
            self.seconds += self.registers.read_seconds(register)
        else:
            self.registers.write(register, value)
        return _REPLY_REGISTER.pack(kind, _GARBAGE * 3, register, _GARBAGE * 4, value)


def _error(text: str) -> bytes:
    return _ERROR.pack(b"E", _BAD_MESSAGE, text.encode("ascii")[:14])
