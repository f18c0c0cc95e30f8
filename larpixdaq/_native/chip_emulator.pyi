"""Configuration words through emulated chips, in the order in which they came: a chip that hears a write takes it, one
that hears a read answers."""

from enum import IntEnum
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

class Heard(IntEnum):
    """In `hears` and `leaves`: no chip (io_channel), several, not worked out yet."""

    NOBODY = -1
    SEVERAL = -2
    UNKNOWN = -3

class Stop(IntEnum):
    """Why serve() returned: no more words, or no more room for answers; somebody has to say who hears this word, or
    where its answer leaves; a watched register has changed."""

    THROUGH = 0
    ASK = 1
    CHANGED = 2

@final
class RegisterBank:
    """The registers of a board's chips, and the words that come to them.

    `registers`, `keep` and `force`: shape (chips, 256), u1; a write stores (value & keep) | force. `watched`: (256,)
    u1, addresses whose change stops serve(). `changed`: (chips,) u1, set by any change. `hears`: (256, 256) i4, the
    chip that hears a word on [io_channel, chip_id]; `leaves`: (chips,) i2, the io_channel on which its answers leave;
    both may hold a Heard. Addresses from `count` on are no registers: they read as 0. All are written in place by
    both sides.
    """

    @property
    def unheard(self) -> int:
        """Words that no chip heard."""
    @property
    def refused(self) -> int:
        """Words that no chip takes: no configuration, downstream; v3: wrong parity or magic."""
    @property
    def chip(self) -> int:
        """Of the last CHANGED."""
    @property
    def address(self) -> int: ...
    @property
    def before(self) -> int: ...
    def __init__(
        self,
        registers: NDArray[np.uint8],
        keep: NDArray[np.uint8],
        force: NDArray[np.uint8],
        watched: NDArray[np.uint8],
        changed: NDArray[np.uint8],
        hears: NDArray[np.int32],
        leaves: NDArray[np.int16],
        *,
        count: int,
        v1: bool = False,
        magic: bool = False,
    ) -> None: ...
    def serve(
        self,
        words: NDArray[np.uint64],
        channels: NDArray[np.uint8],
        start: int,
        answers: NDArray[np.uint64],
        answer_channels: NDArray[np.uint8],
        made: int,
    ) -> tuple[int, int, int]:
        """Go on with word `start` of `words` on io_channels `channels`; answers go to place `made` and on.

        Returns (next word, answers in all, why it stopped: a Stop).
        """
    def one(self, chip: int, word: Any) -> int:
        """The one chip has heard the word: what it answers, 0 for nothing."""
