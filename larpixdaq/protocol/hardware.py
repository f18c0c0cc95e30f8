"""The messages between a producer and its child process: u32 little-endian length, then a msgpack array."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from larpixdaq.errors import ProtocolError
from larpixdaq.schema import PacketType, types_of

#: Maximum bytes of a message: the result of a routine must fit into an answer to the Operator.
MAX_MESSAGE: Final = (64 << 20) - (1 << 17)
# Rows for which the child listens.
NO_ROWS: Final = 0
#: Configuration answers of chips: received rows of packet type 3.
CONFIG_ANSWERS: Final = 1
#: All rows, while the child takes them.
ALL_ROWS: Final = 2


class Parameter(msgspec.Struct, frozen=True):
    name: str
    type: str = ""  # from the function's annotation
    required: bool = True
    default: Any = None


class ListRoutines(msgspec.Struct, array_like=True, tag=1, frozen=True):
    request: int
    folders: list[str]  # of routine files, in addition to those of larpixdaq


class RunRoutine(msgspec.Struct, array_like=True, tag=2, frozen=True):
    request: int
    folders: list[str]
    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    time_limit: float  # seconds


class BoardInfo(msgspec.Struct, frozen=True):
    """A board, as the child needs it."""

    io_group: int
    kind: str  # as in sources.command_channel; "" if the board takes no commands
    name: str
    revision: int = 0  # of a PACMAN's registers, 2 to 5; 0: not known
    uarts: int = 0  # of a PACMAN of revision 5 with 32 UARTs; 0: as others of its revision


class Setup(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """The first message: the boards, and the state of chips that the previous child has left."""

    boards: list[BoardInfo]
    asic: str  # as in --asic
    generation: int  # schema.Asic
    layout: int  # of the rows in ListenedRows
    board_file: str = ""
    chips: bytes = b""  # these five as in Remember and readout/configuration_tracker.py
    wanted: bytes = b""
    given: bytes = b""
    read: bytes = b""
    known: bytes = b""
    pixel_layout: str = ""
    power_settings: str = ""  # of --power-settings: the path of a file, or JSON


class Action(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """Do an action on chips, boards or pixel layouts (hardware/actions.py)."""

    request: int
    action: str
    params: dict[str, Any]
    time_limit: float  # seconds


class ListenedRows(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """Recorded rows for which the child listens, in the producer's layout."""

    rows: bytes
    left_out: int = 0  # rows before these that were dropped, because the child did not take them in time


class CommandDone(msgspec.Struct, array_like=True, tag=6, frozen=True):
    """A command was sent whole and answered by the board, or has failed. The answers of chips come as rows."""

    command: int
    reply: bytes = b""
    error: str = ""


class RoutineInfo(msgspec.Struct, frozen=True):
    """A routine, or a routine file that could not be loaded: `error` has its path and the reason, in one line."""

    name: str
    params: list[Parameter] = []
    help: str = ""  # the function's docstring
    error: str = ""


class RoutineList(msgspec.Struct, array_like=True, tag=11, frozen=True):
    request: int
    routines: list[RoutineInfo]  # those with an error last


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
    """Send words to chips of one board. `io_channels` has a byte for each word, `words` 8 bytes, little-endian."""

    command: int
    io_group: int
    io_channels: bytes
    words: bytes


class BoardOrder(msgspec.Struct, array_like=True, tag=16, frozen=True):
    """Send an order to the board itself, in the form that boards of its kind understand."""

    command: int
    io_group: int
    body: bytes
    seconds: float = 0.0  # that the board needs in addition to the usual limit


class Listen(msgspec.Struct, array_like=True, tag=17, frozen=True):
    what: int  # NO_ROWS, CONFIG_ANSWERS or ALL_ROWS


class Remember(msgspec.Struct, array_like=True, tag=18, frozen=True):
    """State of N chips that the producer keeps for the next child, if this child ends."""

    board_file: str
    chips: bytes  # (N, 3): io_group, io_channel, chip_id
    wanted: bytes  # (N, registers of a chip): the wanted values
    given: bytes  # the same shape: 1 where a value is wanted
    pixel_layout: str = ""


class Invalidate(msgspec.Struct, array_like=True, tag=19, frozen=True):
    """The chips of these boards will be reset, or get or lose their power."""

    io_groups: list[int]


class PowerReport(msgspec.Struct, array_like=True, tag=20, frozen=True):
    """The supplies of a board were measured: a text for the run's file."""

    io_group: int
    text: Annotated[str, msgspec.Meta(max_length=20_000)]


class Ramp(msgspec.Struct, array_like=True, tag=21, frozen=True):
    """The supplies of a tile are being ramped up: to be switched off if the child dies meanwhile."""

    io_group: int
    tile: int  # from 0; -1: the ramp has ended
    dacs: list[int] = []  # addresses of the tile's DACs


def config_answers(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the configuration answers of chips among these rows."""
    found = rows[types_of(rows) == PacketType.CONFIG_READ]
    answers: NDArray[Any] = found[found["direction"] == 1]
    return answers


Request = ListRoutines | RunRoutine | Action

FromParent = Request | Setup | ListenedRows | CommandDone

Answer = RoutineList | Progress | Result | ActionFailed

FromChild = Answer | SendWords | BoardOrder | Listen | Remember | Invalidate | PowerReport | Ramp


def _plain(value: Any) -> Any:
    """Convert a value that msgpack does not support: numpy to lists and numbers, other values to their repr()."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return repr(value)


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_plain)

_requests: Final = msgspec.msgpack.Decoder(FromParent)

_answers: Final = msgspec.msgpack.Decoder(FromChild)


def pack(message: FromParent | FromChild) -> bytes:
    """Pack a message; ProtocolError for an unsupported value: too large, too deep, a number above 64 bits."""
    try:
        body = _encoder.encode(message)
    except Exception as error:  # a value's repr() may raise any exception
        raise ProtocolError(f"{type(message).__name__}: a value that cannot be sent: {error}") from None
    if len(body) > MAX_MESSAGE:
        raise ProtocolError(f"{type(message).__name__}: expected at most {MAX_MESSAGE} bytes, found {len(body)}")
    return len(body).to_bytes(4, "little") + body


class Inbox:
    """Assembles messages from the pieces that a socket receives."""

    def __init__(self, *, requests: bool) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = _requests if requests else _answers
        self._pending = bytearray()

    def take(self, data: bytes) -> Iterator[Any]:
        """Give the messages that `data` completes; ProtocolError if a message is malformed."""
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
