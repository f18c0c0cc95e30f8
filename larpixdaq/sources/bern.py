"""A Bern board: data messages of its DAQ server (8-byte header, 8-byte words)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from larpixdaq._native.decoders import BernDecoder
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.command_channel import COMMAND_PORT, DATA_PORT, BoardReply, HostLookup, RequestChannel
from larpixdaq.sources.zmq_board import BoardSource

#: Its time comes each second, or a heartbeat after a second without data.
SILENCE = 5.0


class BernChannel(RequestChannel):
    """The command server of a Bern board: lines of ASCII. A request carries one word; chains count from 0 there,
    io_channels from 1."""

    kind = "bern"

    def __init__(self, io_group: int, host: HostLookup, port: int) -> None:
        super().__init__("Bern board", io_group, host, port)
        self._said = ""

    def send_words(self, io_channels: NDArray[np.uint8], words: NDArray[np.uint64]) -> None:
        self._say(f"SNDWORD 0x{int(words[0]):016x} {int(io_channels[0]) - 1}")

    def send_raw(self, body: bytes, seconds: float = 0.0) -> None:
        self._say(body.decode("ascii", "replace"), seconds)

    def _say(self, text: str, seconds: float = 0.0) -> None:
        self._said = text
        self._request(text.encode(), seconds)

    def _understand(self, message: bytes) -> BoardReply:
        text = message.rstrip(b"\0 \n").decode("ascii", "replace")
        if text.startswith("ERR"):
            return BoardReply(b"", f"{self.name}: {self._said}: the board answers {text!r}")
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
