"""Words and messages as a detector would send them: plausible, seeded, and faster than anything behind them."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

@final
class PacmanBoard:
    """One PACMAN's data stream (legacy format): `fill()` writes messages into `buffer`, `packets()` bare packet words.

    `asic`: a schema.Asic. `rate`: words a second by the board's own clock, 10 to 1e9. `seconds`: unix seconds at tick
    0, for the headers. `tick`: where the 10 MHz clock begins. `io_channels` count from 1, the `chips` on each have
    chip_ids from 11 on. Beside hits there are a heartbeat (S, type H) each 10 s, a trigger word (T) each second, and
    a sync word (S, type S) at each reset of the board's clock: each second with `pps`, else each 2^32 ticks. `odd`:
    the fraction of packets that are something else: answers to configuration reads, half of them with bad parity.
    `fifo_full`: the fraction of packets whose flags say that the chip's FIFO is full. `words`: the most that one fill()
    makes. The same arguments give the same words, however they are fetched.
    """

    @property
    def buffer(self) -> NDArray[np.uint8]: ...
    @property
    def spans(self) -> NDArray[Any]: ...
    @property
    def words(self) -> int: ...
    @property
    def left(self) -> bool:
        """True: there is always more to come."""
    @property
    def full(self) -> int:
        """Packets so far with the flag of a full FIFO."""
    @property
    def tick(self) -> int:
        """Ticks of the board's 10 MHz clock, without its resets."""
    @property
    def receipt(self) -> int:
        """What the board's 32-bit clock shows."""
    def __init__(
        self,
        asic: int,
        *,
        rate: float,
        seed: int = 0,
        seconds: int = 0,
        tick: int = 0,
        io_channels: int = 8,
        chips: int = 16,
        pps: bool = False,
        odd: float = 0.0,
        fifo_full: float = 0.0,
        words: int = 16384,
    ) -> None: ...
    def jump(self, seconds: int) -> None:
        """The clock for the headers is set: it goes on by `seconds`, which may be negative."""
    def restart(self) -> None:
        """The board starts again: both its clocks count from 0."""
    def fill(self, words: int, per_message: int = 0, window: int = 200) -> int:
        """Write messages with `words` words in all into `buffer` and `spans`; return how many messages.

        Each holds `per_message` words (the last one the rest); with 0 a message holds what came within `window` ticks
        after its first word, as a data server does that sends whatever is complete when it is through with the
        message before.
        """
    def packets(self, out: NDArray[np.uint64]) -> None:
        """Fill `out`, shape (N,), with packet words alone, as `fill()` puts them into data words."""

def count_words(buffer: NDArray[np.uint8], spans: NDArray[Any]) -> tuple[int, int, int, int]:
    """How many words the legacy PACMAN messages at `spans` of `buffer` hold: (D, S, T, others).

    Counted are the whole words that are there, and no more of them than the header says.
    """
