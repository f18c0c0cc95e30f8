"""Bytes of every board to rows: serial frames, PACMAN messages, Bern messages; and rows back to messages.

All decoders work alike. `start(counts)` names the counters to add to (one row of a (IO_GROUPS, len(Count)) u8 array);
`feed` hands over input, which must stay unchanged until it is used up; `decode(rows)` fills rows and returns how many.
Fewer than len(rows) means that the input is used up; as many means: call again with fresh rows. The counters always
describe exactly the rows returned so far, and equations (a) to (c) of the ledger hold between any two calls.

`rows` has the dtype of the chips' layout (`schema.layout_of(asic)`); for v2 chips both `2.4` and `2.4-clock64` will
do, and of receipt timestamps of PACMAN format 1.0 the former gets the lower 32 bits, which is noticed. ValueError:
rows of another dtype, input fed before the last was used up, a span outside of its buffer, no `start` yet.

`take_unknown` returns the words without a row (dtype schema.UNKNOWN_WORD) since it was last called: at most
UNKNOWN_KEPT per `start`; all are counted. `seconds` is the time of the message that they came in (serial: that was
fed; Bern: of the last T).

`noticed` is what speaks for a loss before the bytes came, since `start`: dtype schema.NOTICE, one for each of
schema.NOTICES. `heard(now_ns, since, until)`, before `feed`, says when its input reached the host: unix ns, and between
which moments of the monotonic clock (seconds; where it is not known, a later time in a header proves nothing). `note`
adds what was noticed elsewhere (`what`: the index). `forget`: what comes next does not go on from what came before, as
when another recorded file begins.

`clock_bounds`, since it was last called: the board's clock less the host's, in ns, is at least the first and, unless
the network held messages up, at most the second; None when no header came. Infinite where it is not known.
"""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

@final
class PacmanDecoder:
    """Messages of a PACMAN, `format` "legacy" (8-byte header, 16-byte words), "1.0" (24 and 24) or "auto": told by each
    message's length and header; one that contradicts itself is taken as the board's last good one, or rejected.

    Every accepted message makes a type-4 row with its unix seconds (of 1.0: its nanoseconds, whole seconds), words of
    type D (1.0: and C) rows of the chips' types, S and T rows of types 6 and 7: `trigger_type` the sync character or
    the trigger bits, `dataword` the clock source (1.0, T: the trigger source), `counter` the status (1.0, S); in
    layout 1.0 `register` and `value` stand for `trigger_type` and `dataword`. All but type 4 have direction 1.

    `clock64`: firmware with a 64-bit clock in legacy messages. D words carry bits 63..16: `receipt_timestamp` is in
    ticks of that clock, its lower 16 bits zero. S and T words carry all 64.
    """

    def __init__(self, io_group: int, asic: int, *, format: str = "auto", clock64: bool = False) -> None: ...
    @property
    def io_group(self) -> int: ...
    @property
    def format(self) -> str | None:
        """Of the last message that left no doubt, whatever was asked for: "legacy" or "1.0"; None before that."""
    def start(self, counts: NDArray[np.uint64]) -> None: ...
    def feed(self, buffer: Any, spans: NDArray[Any]) -> None: ...
    def decode(self, rows: NDArray[Any]) -> int: ...
    def take_unknown(self) -> NDArray[Any]: ...
    def heard(self, now_ns: int, since: float = ..., until: float = ...) -> None: ...
    def noticed(self) -> NDArray[Any]: ...
    def clock_bounds(self) -> tuple[float, float] | None: ...
    def note(self, what: int, events: int, amount: int) -> None: ...
    def forget(self) -> None: ...

@final
class BernDecoder:
    """Messages of a Bern board: D makes rows, T a type-4 row (its 8 bytes of time count as header), H nothing."""

    def __init__(self, io_group: int, asic: int) -> None: ...
    @property
    def io_group(self) -> int: ...
    def start(self, counts: NDArray[np.uint64]) -> None: ...
    def feed(self, buffer: Any, spans: NDArray[Any]) -> None: ...
    def decode(self, rows: NDArray[Any]) -> int: ...
    def take_unknown(self) -> NDArray[Any]: ...
    def heard(self, now_ns: int, since: float = ..., until: float = ...) -> None: ...
    def noticed(self) -> NDArray[Any]: ...
    def clock_bounds(self) -> tuple[float, float] | None: ...
    def note(self, what: int, events: int, amount: int) -> None: ...
    def forget(self) -> None: ...

@final
class SerialDecoder:
    """The byte stream of a serial board, cut anywhere: 's', 8 bytes of word (v1: 7 and one ignored), 'q'. io_channel
    is 1.

    `rule` "larpix-control" takes every 's' with a 'q' nine bytes on for a frame; "strict" wants odd parity besides, or
    another frame right behind. It therefore waits with words of even parity; `flush` (after a silence) lets the next
    `decode` judge them by the bytes that are there: such a frame is taken unless one of them contradicts a next frame.

    `feed` copies its input. A type-4 row comes first whenever `seconds` (unix, of the host) differs from the last,
    and after each `start`. The ledger's pending bytes add up when counters are left and taken up again.
    """

    def __init__(self, io_group: int, asic: int, *, rule: str = "strict") -> None: ...
    @property
    def io_group(self) -> int: ...
    def start(self, counts: NDArray[np.uint64]) -> None: ...
    def feed(self, buffer: Any, seconds: int) -> None: ...
    def flush(self) -> None: ...
    def decode(self, rows: NDArray[Any]) -> int: ...
    def take_unknown(self) -> NDArray[Any]: ...
    def heard(self, now_ns: int, since: float = ..., until: float = ...) -> None: ...
    def noticed(self) -> NDArray[Any]: ...
    def clock_bounds(self) -> tuple[float, float] | None: ...
    def note(self, what: int, events: int, amount: int) -> None: ...
    def forget(self) -> None: ...

def encode_serial(words: NDArray[np.uint64]) -> bytes:
    """Frames of 10 bytes, one for each word (of a v1 word the upper 10 bits should be 0)."""

def encode_pacman(
    rows: NDArray[Any], *, asic: int, format: str = "legacy", clock64: bool = False, seconds: int = 0
) -> tuple[bytearray, NDArray[Any]]:
    """The messages that a PACMAN would have sent for these rows of one io_group, and their spans (dtype schema.SPAN).

    A row of type 4 begins a message with its time; rows of types 0 to 3 with direction 1, 6 and 7 are words; all
    others are left out. Words before the first type 4 get a message of their own, with the time `seconds`; a legacy
    message is full with 65,535 words, and one with the same time follows. Format "1.0" has room for every column of a
    received row, "legacy" only for clocks of 32 bits (`clock64`: 64, of which D words lack the lower 16); a row that
    does not fit is a ValueError, never cut.
    """

def split_log(buffer: Any) -> tuple[NDArray[Any], int]:
    """Where the messages of a log lie (u32 LE length, message, ...): spans, dtype schema.SPAN, without the lengths.

    The second number is how many bytes they cover with their lengths: what is behind is not whole (or would begin
    beyond 4 GiB, where spans end) and wants to be handed over again, with what follows in the file.
    """
