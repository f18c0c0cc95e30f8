"""Emulated chips execute configuration words in order of arrival: writes set registers, reads are answered."""

from enum import IntEnum
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

class PathEnd(IntEnum):
    """Entries of `hears` and `leaves` in place of a chip or io_channel: none, several, not found yet."""

    NONE = -1
    SEVERAL = -2
    UNKNOWN = -3

class Stop(IntEnum):
    """Reason why serve() returned.

    DONE: no more words, or no more room for answers. PATH_UNKNOWN: the caller must find the chips that hear the next
    word, or the io_channels of its answers. REGISTER_CHANGED: a watched register has changed.
    """

    DONE = 0
    PATH_UNKNOWN = 1
    REGISTER_CHANGED = 2

@final
class RegisterBank:
    """Registers of a board's chips, which execute configuration words.

    `registers`, `keep` and `force`: shape (chips, 256), u1; a write stores (value & keep) | force. `watched`: shape
    (256,), u1, not 0 for addresses whose change stops serve(). `changed`: shape (chips,), u1, set to 1 by any change.
    `hears`: shape (256, 256), i4, the chip that hears a word on [io_channel, chip_id]. `leaves`: shape (chips,), i2,
    the io_channel on which the chip's answers reach the board. `hears` and `leaves` may hold a PathEnd. Addresses from
    `count` on are no registers and read as 0. `v1`: the parity is bit 53, not bit 63. `magic`: chips accept only words
    with the magic word of v2d and v3. `checks_parity`: chips accept only words with correct parity. Caller and kernel
    both write the arrays in place.
    """

    @property
    def unheard(self) -> int:
        """Number of words that no chip heard."""
    @property
    def refused(self) -> int:
        """Number of words that no chip accepts: no configuration word, downstream, or refused as above."""
    @property
    def chip(self) -> int:
        """Chip of the last REGISTER_CHANGED."""
    @property
    def address(self) -> int:
        """Address of the last REGISTER_CHANGED."""
    @property
    def old_value(self) -> int:
        """Value before the last REGISTER_CHANGED."""
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
        checks_parity: bool = False,
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
        """Execute words from index `start` on, which came on io_channels `channels`, and append to the `made` answers.

        Returns the index of the next word, the number of answers, and the reason for the stop, a Stop.
        """
    def deliver(self, chip: int, word: Any) -> int:
        """Execute a word in one chip. Returns its answer, or 0 when there is none (no answer is 0)."""
