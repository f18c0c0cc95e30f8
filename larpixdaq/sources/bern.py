"""Bern board: data messages (8-byte header, 8-byte words) and commands of its DAQ server."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import BernDecoder
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.command_channel import COMMAND_PORT, DATA_PORT, BoardReply, HostLookup, RequestChannel
from larpixdaq.sources.zmq_board import BoardSource

#: Seconds without a message until a warning. The board sends its time each second, or a heartbeat.
SILENCE = 5.0


class BernChannel(RequestChannel):
    """Command server of a Bern board, which takes lines of ASCII.

    A request has one word. The board counts its chains from 0, io_channels count from 1."""

    kind = "bern"

    def __init__(self, io_group: int, host: HostLookup, port: int) -> None:
        super().__init__("Bern board", io_group, host, port, self._check)
        self._sent = ""

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        self._send(f"SNDWORD 0x{int(words[0]):016x} {int(io_channels[0]) - 1}")

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        self._send(body.decode("ascii", "replace"), seconds)

    def _send(self, text: str, seconds: float = 0.0) -> None:
        self._sent = text
        self._request(text.encode(), seconds)

    def _check(self, answer: bytes) -> BoardReply:
        text = answer.rstrip(b"\0 \n").decode("ascii", "replace")
        if text.startswith("ERR"):
            return self._failure(f"{self._sent}: the board answers {text!r}")
        return BoardReply(text.encode())


class BernSource(BoardSource):
    def __init__(
        self,
        io_group: int,
        host: str,
        data_port: int = DATA_PORT,
        command_port: int = COMMAND_PORT,
        *,
        asic: Asic = Asic.V2,
    ) -> None:
        lookup = HostLookup(host)
        self.channels = (BernChannel(io_group, lookup, command_port),)
        super().__init__(
            "Bern board",
            io_group,
            lookup,
            data_port,
            decoder=BernDecoder(io_group, asic),
            layout=layout_of(asic),
            silence=SILENCE,
        )
