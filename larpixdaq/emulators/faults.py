"""What an emulated board does wrong on request, and its own exact count of it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Words that a header claims too many, at most.
LIE: Final = 5


class Wrongs(NamedTuple):
    """Fractions of messages that are not sent, sent twice, or whose headers count words that do not follow; times are
    seconds since the board's first turn: at the first the board is away for the second; its clock is set by the second;
    it starts again."""

    skip: float = 0.0
    double: float = 0.0
    lie: float = 0.0
    away: tuple[float, float] | None = None
    jump: tuple[float, float] | None = None
    restart: float | None = None

    @property
    def any(self) -> bool:
        return self != Wrongs()


class Faults:
    """`count` has what was done: words and messages skipped (also while the board is away), words and messages that
    were sent a second time, messages with a wrong header and the words that it claims too many."""

    def __init__(self, wrongs: Wrongs, seed: int) -> None:
        self.wrongs = wrongs
        self.count = dict.fromkeys(
            ("skipped", "skipped_messages", "doubled", "doubled_messages", "lied", "lied_messages"), 0
        )
        self._random = np.random.default_rng(seed)

    def spoil(self, buffer: NDArray[np.uint8], spans: NDArray[Any]) -> NDArray[Any]:
        """The spans to send of these, in order; headers are changed in place. No message suffers twice."""
        wrongs = self.wrongs
        if not (wrongs.skip or wrongs.double or wrongs.lie):
            return spans
        fate = self._random.random(len(spans))
        skip = fate < wrongs.skip
        double = ~skip & (fate < wrongs.skip + wrongs.double)
        lie = ~skip & ~double & (fate < wrongs.skip + wrongs.double + wrongs.lie)
        self.skip(spans[skip])
        self.count["doubled"] += words_in(spans[double])
        self.count["doubled_messages"] += int(double.sum())
        for span in spans[lie]:
            place = int(span["start"]) + 6
            counted = buffer[place : place + 2].view("<u2")
            more = min(int(self._random.integers(1, LIE + 1)), 65_535 - int(counted[0]))
            counted += np.uint16(more)
            self.count["lied"] += more
            self.count["lied_messages"] += 1
        return np.repeat(spans, np.where(skip, 0, 1 + double))

    def skip(self, spans: NDArray[Any]) -> None:
        """These are made, and nobody gets them."""
        self.count["skipped"] += words_in(spans)
        self.count["skipped_messages"] += len(spans)


def words_in(spans: NDArray[Any]) -> int:
    """Words of board messages, by their lengths."""
    return int((np.maximum(spans["length"].astype(np.int64) - 8, 0) // 16).sum())
