"""A PACMAN board: data messages of its data server, legacy (8-byte header, 16-byte words) or format 1.0 (24 and 24)."""

from __future__ import annotations

from larpixdaq._native.frames import PacmanDecoder
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.board import BoardSource

#: A heartbeat comes every 10 s.
SILENCE = 15.0


class PacmanSource(BoardSource):
    """One PACMAN. `format`: auto, legacy or 1.0; `clock64`: firmware with a 64-bit clock."""

    def __init__(
        self,
        io_group: int,
        host: str,
        data_port: int = 5556,
        command_port: int = 5555,
        *,
        asic: Asic = Asic.V2,
        format: str = "auto",
        clock64: bool = False,
    ) -> None:
        self.command_port = command_port
        super().__init__(
            "PACMAN",
            io_group,
            host,
            data_port,
            decoder=PacmanDecoder(io_group, asic, format=format, clock64=clock64),
            # format 1.0 has 64-bit timestamps
            layout=layout_of(asic, clock64=clock64 or format == "1.0"),
            silence=SILENCE,
        )
