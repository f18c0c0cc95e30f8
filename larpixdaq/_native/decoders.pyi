"""Decode the bytes of all boards into rows, and encode rows as board messages.

All decoders have the same interface. `start(counts)` sets the counters to add to, shape (len(Count),), u8: one line of
the ledger. `feed` sets the input, which must not change until it is used up. `decode(rows)` fills rows and returns
their number: less than len(rows) when the input is used up; otherwise call it again with free rows. The counters always
describe exactly the rows returned so far, and equations (a) to (c) of the ledger hold between any two calls.

`rows` has the dtype of the chips' layout (`schema.layout_of(asic)`), for v2 chips either `2.4` or `2.4-clock64`. Layout
2.4 gets the lower 32 bits of a receipt timestamp of PACMAN format 1.0, and a notice. ValueError for rows of another
dtype, new input before the last was used up, a span outside of its buffer, or a call before `start`.

`take_unknown` returns the words without a row since its last call, dtype schema.UNKNOWN_WORD: at most UNKNOWN_KEPT per
`start`, all are counted. Their `seconds` are the time of their message (Bern: of the last T message, serial: of
`feed`).

`noticed` returns the evidence of losses before the bytes arrived, since `start`: dtype schema.NOTICE, one for each of
schema.NOTICES. Call `heard(now_ns, since, until)` before `feed`: its input reached the host at `now_ns` (unix), between
`since` and `until` of the monotonic clock (seconds). Without these bounds a later time in a header is no evidence.
`note` adds evidence found elsewhere (`what`: index in schema.NOTICES). `forget` tells that the next input does not
continue the previous one, for example at the beginning of another recorded file.

`clock_bounds` returns bounds of the board's clock minus the host's clock since its last call, in ns, infinite when
unknown; None without a header. The upper bound is right only if the network delayed no message.
"""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

@final
class PacmanDecoder:
    """Decoder of PACMAN messages.

    `format`: "legacy" (header of 8 bytes, words of 16), "1.0" (24 and 24) or "auto", which recognises the format from
    each message's length and header. A message whose length contradicts its header has the format of the board's last
    consistent message, and is rejected without one.

    Each accepted message makes a row of type 4 with its unix seconds (format 1.0: whole seconds of its nanoseconds). D
    words, and C words of format 1.0, make rows of the chips' types. S and T words make rows of types 6 and 7:
    `trigger_type` is the sync character or the trigger bits, `dataword` the clock source (T of format 1.0: the trigger
    source), `counter` the status (S of format 1.0). Layout 1.0 has `register` and `value` for `trigger_type` and
    `dataword`. All rows but type 4 have direction 1.

    `clock64`: firmware with a 64-bit clock in legacy messages. D words have bits 63..16 of this clock, which become
    `receipt_timestamp` with the lower 16 bits zero. S and T words have all 64 bits.
    """

    def __init__(self, io_group: int, asic: int, *, format: str = "auto", clock64: bool = False) -> None: ...
    @property
    def io_group(self) -> int: ...
    @property
    def format(self) -> str | None:
        """Format of the last unambiguous message, "legacy" or "1.0", also with a fixed `format`; None before it."""
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
    """Decoder of a Bern board's messages.

    Words of D messages make rows. A T message makes a row of type 4, and its 8 bytes of time count as header. H
    messages make no rows.
    """

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
    """Decoder of a serial board's byte stream, cut anywhere. The io_channel is 1.

    A frame is 's', a word of 8 bytes (v1: 7 and an ignored one), 'q'.

    With `rule` "larpix-control" every 's' with a 'q' nine bytes later is a frame. "strict" also needs odd parity, or
    another frame directly after it, and therefore waits with words of even parity. `flush`, called when the board is
    silent, lets the next `decode` judge them by the bytes that have arrived: they are frames unless one of these bytes
    contradicts a next frame.

    `feed` copies its input. A row of type 4 comes first when `seconds` (unix, of the host) has changed, and after each
    `start`. The ledger's pending bytes stay right when counters are continued later.
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
    """Return a frame of 10 bytes for each word. The upper 10 bits of v1 words should be 0."""

def encode_pacman(
    rows: NDArray[Any], *, asic: int, format: str = "legacy", clock64: bool = False, seconds: int = 0
) -> tuple[bytearray, NDArray[Any]]:
    """Encode rows of one io_group as PACMAN messages. Returns their bytes and spans (dtype schema.SPAN).

    A row of type 4 begins a message with its time. Rows of types 0 to 3 with direction 1, and of types 6 and 7, become
    words; other rows are left out. Words before the first row of type 4 get their own message with the time `seconds`.
    A legacy message with 65,535 words is full and continued by another message with the same time. Format "1.0" holds
    every column of a received row, "legacy" only clocks of 32 bits (`clock64`: 64 bits, of D words without the lower
    16). A row that does not fit is a ValueError; no column is cut.
    """

def split_log(buffer: Any) -> tuple[NDArray[Any], int]:
    """Find the messages in a log of u32 (little-endian) lengths and messages. Returns their spans, dtype schema.SPAN.

    The second value is the number of bytes of these messages with their lengths. The bytes after them are an incomplete
    message, or begin beyond 4 GiB, where spans end: pass them again, with the next bytes of the file.
    """

def count_words(buffer: Any, spans: NDArray[Any]) -> tuple[int, int]:
    """Count the words of PACMAN messages by their headers and lengths alone, without decoding them.

    Returns the words of all data messages whose header agrees with their length, and the number of the other messages.
    """
