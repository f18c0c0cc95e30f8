"""Fake board: plausible PACMAN messages at a given rate, to try the system without hardware."""

from __future__ import annotations

import time

from larpixdaq._native.board_emulator import PacmanBoard
from larpixdaq._native.decoders import PacmanDecoder
from larpixdaq.errors import UsageError
from larpixdaq.runtime.timing import Pace
from larpixdaq.schema import Asic, layout_of
from larpixdaq.sources.source import LiveSource

#: Maximum words of a read(), and seconds between two read(): together far above any rate that can be decoded.
BATCH = 65_536
TURN = 0.001
#: Ticks of the board's clock at the start: 2 s before the chips' 31-bit timestamps roll over, so that users see it.
CLOCK_START = 2**31 - 20_000_000


class FakeSource(LiveSource):
    """Fake board with `rate` words/s. The same seed gives the same packets."""

    kind = "fake"
    address = ""
    _decoder: PacmanDecoder

    def __init__(self, io_group: int, rate: float, *, asic: Asic = Asic.V2, seed: int = 0) -> None:
        decoder = PacmanDecoder(io_group, asic, format="legacy")
        super().__init__(f"fake board io_group {io_group}", layout_of(asic), io_group, decoder)
        try:
            self._board = PacmanBoard(
                asic,
                rate=rate,
                seed=seed * 256 + io_group,
                seconds=int(time.time() - CLOCK_START / 1e7),
                tick=CLOCK_START,
                words=BATCH,
            )
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from None
        self._pace = Pace(rate)
        self._next = 0.0

    def open(self) -> None:
        self._pace.due(time.monotonic())
        self._presence.connected(time.time_ns())

    def close(self) -> None:
        self._pace.pause(time.monotonic())

    def due(self) -> float | None:
        return self._next

    def read(self) -> bool:
        now = time.monotonic()
        due = self._pace.due(now) if now >= self._next else 0
        words = min(due, BATCH)
        self.drained = words == due
        if not words:
            self._next = max(self._next, self._pace.time_of(1))
            return False
        messages = self._board.fill(words)
        self._pace.add_made(words)
        self._next = max(now + TURN, self._pace.time_of(1))
        self._decoder.heard(time.time_ns())
        self._decoder.feed(self._board.buffer, self._board.spans[:messages])
        return True
