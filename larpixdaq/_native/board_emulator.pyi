"""Make words and messages as a detector sends them: plausible, from a seed, and faster than the rest of the system."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

@final
class PacmanBoard:
    """Data stream of one PACMAN in the legacy format.

    `asic`: a schema.Asic. `rate`: words per second of the board's clock, 10 to 1e9. `seconds`: unix seconds at tick 0,
    for the headers. `tick`: first value of the 10 MHz clock. `io_channels`: their number, from 1 on, each with `chips`
    chips with chip_ids from 11 on. Hits are mixed with a heartbeat (S, type H) every 10 s, a trigger word (T) every
    second, and a sync word (S, type S) at each reset of the board's clock, every second with `pps`, otherwise every
    2^32 ticks. `odd`: fraction of packets that are answers to configuration reads, half of them with wrong parity.
    `fifo_full`: fraction of packets with the flag of a full FIFO. `words`: maximum number of words per fill(). The same
    arguments give the same words, whatever the sizes of the calls.
    """

    @property
    def buffer(self) -> NDArray[np.uint8]: ...
    @property
    def spans(self) -> NDArray[Any]: ...
    @property
    def words(self) -> int: ...
    @property
    def left(self) -> bool:
        """True, because there are always more messages."""
    @property
    def full(self) -> int:
        """Number of packets so far with the flag of a full FIFO."""
    @property
    def tick(self) -> int:
        """Ticks of the 10 MHz clock since the start, regardless of resets."""
    @property
    def receipt(self) -> int:
        """The board's 32-bit clock, in ticks."""
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
        """Set the clock of the headers forward by `seconds`, which may be negative."""
    def restart(self) -> None:
        """Restart the board: both its clocks count from 0."""
    def fill(self, words: int, per_message: int = 0, window: int = 200) -> int:
        """Write messages with `words` words in total into `buffer` and `spans`. Returns the number of messages.

        Each message has `per_message` words, the last message the rest. With 0, a message has the words of `window`
        ticks from its first word on, as a data server sends all words that arrived while it sent the previous message.
        """
    def packets(self, out: NDArray[np.uint64]) -> None:
        """Fill `out`, shape (N,), with the packets that `fill()` would put into data words."""

def count_words(buffer: NDArray[np.uint8], spans: NDArray[Any]) -> tuple[int, int, int, int]:
    """Count the words of legacy PACMAN messages by type: D, S, T, others.

    Counts complete words, at most as many as the message's header says.
    """
