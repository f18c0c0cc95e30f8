"""PACMAN board: data messages, legacy (8-byte header, 16-byte words) or format 1.0 (24 and 24), and commands."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import PacmanDecoder
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.command_channel import COMMAND_PORT, DATA_PORT, BoardReply, HostLookup, RequestChannel
from larpixdaq.sources.source import BoardStatus
from larpixdaq.sources.zmq_board import BoardSource

#: Seconds without a message until a warning. The board sends a heartbeat every 10 s.
SILENCE = 15.0
#: Maximum words of a request. The board passes them on at the speed of its UARTs: 4,096 on one of them take 54 ms.
WORDS: Final = 4_096

_HEADER: Final = struct.Struct("<cIxH")
_WORD: Final = np.dtype([("type", "S1"), ("io_channel", "u1"), ("unused", "V6"), ("word", "<u8")])
_WORD_BYTES: Final = 16
_REGISTER: Final = struct.Struct("<c3xI4xI")
#: Registers of the firmware's version: major, minor, build, debug. Before v1.4 all of them read 0.
_VERSION: Final = (0x0, 0x4, 0x8, 0xC)
#: These registers of the firmware uci_rev5 of larpix/pacman (77621a9): its transmitters take a tile and a UART in place
#: of the io_channel, and its receivers give no io_channel.
_UCI_REV5: Final = [4, 0, 0x1024_2024, 0x1024_2024]
#: Register with the revision of the register map: 5, and 0 on boards of revisions 2 to 4.
_MAP: Final = 0x24220


class PacmanChannel(RequestChannel):
    """Command server of a PACMAN (legacy format). Orders and answers are words of 16 bytes."""

    kind = "pacman"
    batch = WORDS

    def __init__(
        self,
        io_group: int,
        host: HostLookup,
        port: int,
        *,
        revision: int = 0,
        uarts: int = 0,
        board_format: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`board_format` returns the format of the board, "legacy" or "1.0"; None while it is not known."""
        super().__init__("PACMAN", io_group, host, port, self._check)
        self.revision = revision
        self.uarts = uarts
        self._board_format = board_format
        self._sent = 0
        self._uci_rev5 = False

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        if self._uci_rev5:
            self._refuse(
                "its firmware (uci_rev5) numbers io_channels in another way: the words would reach chips of other "
                "tiles, and answers would not tell their io_channel"
            )
            return
        message = np.zeros(len(words), _WORD)
        message["type"] = b"D"
        message["io_channel"] = io_channels
        message["word"] = words
        self.send_raw(message.tobytes())

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        if self._board_format() == "1.0":  # a legacy request would crash the command server of such a board
            self._refuse("commands are known for the legacy format only, and the board sends format 1.0")
        elif not body or len(body) % _WORD_BYTES or len(body) > 65_535 * _WORD_BYTES:
            self._refuse(f"expected 1 to 65535 words of {_WORD_BYTES} bytes, found {len(body)} bytes")
        else:
            self._sent = len(body) // _WORD_BYTES
            self._request(_HEADER.pack(b"?", int(time.time()) & 0xFFFFFFFF, self._sent) + body, seconds)

    @property
    def identify(self) -> bytes:
        """Empty until the board's format is known to be legacy, because an unknown request may crash the server."""
        if self._board_format() != "legacy":
            return b""
        return b"".join(_REGISTER.pack(b"R", register, 0) for register in (*_VERSION, _MAP))

    def firmware(self, answer: bytes) -> str:
        """Return the firmware's version. From then on words for chips are refused if it does not know io_channels."""
        version = self._values(answer)[: len(_VERSION)]
        self._uci_rev5 = version == _UCI_REV5
        return " ".join(f"{value:#x}" for value in version)

    def identity(self, answer: bytes) -> str:
        return f"firmware {self.firmware(answer)}, register map {self._values(answer)[-1]}"

    def _values(self, answer: bytes) -> list[int]:
        return [value for _, _, value in _REGISTER.iter_unpack(answer)]

    def _check(self, answer: bytes) -> BoardReply:
        body = answer[_HEADER.size :]
        if answer[:1] != b"!" or len(body) != self._sent * _WORD_BYTES:
            return self._failure(
                f"expected an answer of {self._sent} words, found {len(answer)} bytes "
                f"that begin with {answer[:8].hex(' ')}"
            )
        errors = [body[at : at + _WORD_BYTES] for at in range(0, len(body), _WORD_BYTES) if body[at] == 0x45]
        if errors:
            text = errors[0][2:].rstrip(b"\0").decode("ascii", "replace")
            return self._failure(f"the board refuses {len(errors)} of {self._sent} words: {text!r}")
        return BoardReply(body)


class PacmanSource(BoardSource):
    """PACMAN board.

    `format`: auto, legacy or 1.0; `clock64`: its firmware has a 64-bit clock; `revision`: register map of its command
    server, 0 for an unknown one; `uarts`: 32 for the firmware of revision 5 with so few, otherwise 0."""

    _decoder: PacmanDecoder

    def __init__(
        self,
        io_group: int,
        host: str,
        data_port: int = DATA_PORT,
        command_port: int = COMMAND_PORT,
        *,
        asic: Asic = Asic.V2,
        format: str = "auto",
        clock64: bool = False,
        revision: int = 0,
        uarts: int = 0,
    ) -> None:
        lookup = HostLookup(host)
        self._format = format
        decoder = PacmanDecoder(io_group, asic, format=format, clock64=clock64)
        channel = PacmanChannel(
            io_group,
            lookup,
            command_port,
            revision=revision,
            uarts=uarts,
            board_format=lambda: decoder.format if format == "auto" else format,
        )
        self.channels = (channel,)
        super().__init__(
            "PACMAN",
            io_group,
            lookup,
            data_port,
            decoder=decoder,
            layout=layout_of(asic, clock64=clock64 or format == "1.0"),  # format 1.0 has 64-bit timestamps
            silence=SILENCE,
        )

    def boards(self) -> list[BoardStatus]:
        (board,) = super().boards()
        detected = self._decoder.format
        text = f"{self.name} sends PACMAN format {detected}"
        if detected is not None and self._format not in ("auto", detected):
            text += f", not {self._format}: start the producer with --pacman-format {detected}"
        elif self.layout == layout_of(Asic.V2) and detected == "1.0":
            text += ", whose clock has 64 bits: start the producer with --pacman-format 1.0"
        else:
            return [board]
        return [board._replace(refusal=text)]
