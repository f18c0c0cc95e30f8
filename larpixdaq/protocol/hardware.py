"""What the producer and its child process say to each other over their socket: u32 little-endian length, msgpack
array.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import ProtocolError
from larpixdaq.schema import PacketType, types_of

#: No message of either side is longer: what a routine returns has to fit into an answer to the Operator.
MAX_MESSAGE: Final = (64 << 20) - (1 << 17)
NO_ROWS: Final = 0
#: Configuration answers of chips (rows of packet type 3, received).
CONFIG_ANSWERS: Final = 1
#: All rows, as long as the child takes them.
ALL_ROWS: Final = 2


class Parameter(msgspec.Struct, frozen=True):
    name: str
    type: str = ""  # as the function's annotation says it
    required: bool = True
    default: Any = None


class ListRoutines(msgspec.Struct, array_like=True, tag=1, frozen=True):
    request: int
    folders: list[str]  # of routine files, beside those that ship


class RunRoutine(msgspec.Struct, array_like=True, tag=2, frozen=True):
    request: int
    folders: list[str]
    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    time_limit: float  # seconds


class BoardInfo(msgspec.Struct, frozen=True):
    """What the child has to know of a board."""

    io_group: int
    kind: str  # as in sources.channel; "" when nothing can be sent there
    name: str
    revision: int = 0  # of a PACMAN's registers, 2 to 5; 0: not known


class Setup(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """The first message: what there is to configure, and what was known of it when another child ended."""

    boards: list[BoardInfo]
    asic: str  # as --asic has it
    generation: int  # schema.Asic
    layout: int  # of the rows in `Rows`
    board_file: str = ""
    chips: bytes = b""  # these five as `Remember` and `configuration_tracker.ConfigurationTracker` have them
    wanted: bytes = b""
    given: bytes = b""
    read: bytes = b""
    known: bytes = b""
    pixel_layout: str = ""


class RunAction(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """Do an action on chips, boards or pixel layouts (hardware/actions.py)."""

    request: int
    action: str
    params: dict[str, Any]
    time_limit: float  # seconds


class ListenedRows(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """What the child listens for: rows of the producer's layout, as they are recorded."""

    rows: bytes
    left_out: int = 0  # rows before these that found no room, because the child did not take them


class CommandDone(msgspec.Struct, array_like=True, tag=6, frozen=True):
    """All of a command has been handed over and answered (by the board; the chips' answers are rows), or it failed."""

    command: int
    reply: bytes = b""
    error: str = ""


class RoutineInfo(msgspec.Struct, frozen=True):
    name: str
    params: list[Parameter]
    help: str  # the function's docstring


class RoutineList(msgspec.Struct, array_like=True, tag=11, frozen=True):
    request: int
    routines: list[RoutineInfo]
    broken: list[str]  # files that could not be loaded, and why


class Progress(msgspec.Struct, array_like=True, tag=12, frozen=True):
    request: int
    done: int
    total: int
    text: str
    value: Any = None


class Result(msgspec.Struct, array_like=True, tag=13, frozen=True):
    request: int
    value: Any
    text: str = ""


class ActionFailed(msgspec.Struct, array_like=True, tag=14, frozen=True):
    request: int
    text: str  # one line
    code: str = "failed"  # as in errors.RequestError
    traceback: str = ""


class SendWords(msgspec.Struct, array_like=True, tag=15, frozen=True):
    """Send words to chips of one board: their io_channels, a byte each, and the words, 8 bytes each, little-endian."""

    command: int
    io_group: int
    io_channels: bytes
    words: bytes


class BoardOrder(msgspec.Struct, array_like=True, tag=16, frozen=True):
    """Send an order to the board itself, in the form that boards of its kind understand."""

    command: int
    io_group: int
    body: bytes
    seconds: float = 0.0  # that the board needs for it beyond the usual limit


class Listen(msgspec.Struct, array_like=True, tag=17, frozen=True):
    what: int  # NO_ROWS, CONFIG_ANSWERS or ALL_ROWS


class Remember(msgspec.Struct, array_like=True, tag=18, frozen=True):
    """What the next child begins with, should this one end: of N chips, in bytes."""

    board_file: str
    chips: bytes  # (N, 3): io_group, io_channel, chip_id
    wanted: bytes  # (N, registers of a chip): how they ought to be
    given: bytes  # the same shape, 1 where that is known
    pixel_layout: str = ""


class Invalidate(msgspec.Struct, array_like=True, tag=19, frozen=True):
    """The chips of these boards will be reset, or get or lose their power."""

    io_groups: list[int]


def config_answers(rows: NDArray[Any]) -> NDArray[Any]:
    """Configuration answers of chips among rows (schema.py)."""
    found = rows[types_of(rows) == PacketType.CONFIG_READ]
    answers: NDArray[Any] = found[found["direction"] == 1]
    return answers


Request = ListRoutines | RunRoutine | RunAction

FromParent = ListRoutines | RunRoutine | RunAction | Setup | ListenedRows | CommandDone

Answer = RoutineList | Progress | Result | ActionFailed

FromChild = RoutineList | Progress | Result | ActionFailed | SendWords | BoardOrder | Listen | Remember | Invalidate


def _plain(value: Any) -> Any:
    """What msgpack does not know: numpy becomes lists and numbers, anything else its text."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return repr(value)


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_plain)

_requests: Final = msgspec.msgpack.Decoder(FromParent)

_answers: Final = msgspec.msgpack.Decoder(FromChild)


def pack(message: FromParent | FromChild) -> bytes:
    """ProtocolError when a value in it cannot travel (too large, too deep, a number beyond 64 bits)."""
    try:
        body = _encoder.encode(message)
    except Exception as error:  # of a value whose repr() fails, anything
        raise ProtocolError(f"{type(message).__name__}: a value that cannot be sent: {error}") from None
    if len(body) > MAX_MESSAGE:
        raise ProtocolError(f"{type(message).__name__}: expected at most {MAX_MESSAGE} bytes, found {len(body)}")
    return len(body).to_bytes(4, "little") + body


class Inbox:
    """Puts the pieces that a socket gives together to messages."""

    def __init__(self, *, requests: bool) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = _requests if requests else _answers
        self._pending = bytearray()

    def take(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes; ProtocolError when they are none."""
        self._pending += data
        while len(self._pending) >= 4:
            length = int.from_bytes(self._pending[:4], "little")
            if length > MAX_MESSAGE:
                raise ProtocolError(
                    f"message of the child process: expected at most {MAX_MESSAGE} bytes, found {length}"
                )
            if len(self._pending) < 4 + length:
                return
            body = bytes(self._pending[4 : 4 + length])
            del self._pending[: 4 + length]
            try:
                yield self._decoder.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ProtocolError(f"message of the child process: {error}") from None
