"""A Bern board: data messages of its DAQ server (8-byte header, 8-byte words)."""

from __future__ import annotations

from larpixdaq._native.frames import BernDecoder
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.board import BoardSource

#: Its time comes each second, or a heartbeat after a second without data.
SILENCE = 5.0


class BernSource(BoardSource):
    def __init__(
        self, io_group: int, host: str, data_port: int = 5556, command_port: int = 5555, *, asic: Asic = Asic.V2
    ) -> None:
        self.command_port = command_port
        super().__init__(
            "Bern board",
            io_group,
            host,
            data_port,
            decoder=BernDecoder(io_group, asic),
            layout=layout_of(asic),
            silence=SILENCE,
        )
