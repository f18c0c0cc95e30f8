"""The messages between a producer and the process of an IO class: a msgpack array each, over a SEQPACKET socket."""

from __future__ import annotations

from typing import Final

import msgspec

from larpixdaq.runtime.child_process import PIECE

#: Maximum bytes of a message: it fits into the socket's buffer, and one recv() gets it whole.
LIMIT: Final = PIECE


class Send(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """Send words to chips. `io_channels` has a byte for each word, `words` 8 bytes, little-endian."""

    number: int
    io_group: int
    io_channels: bytes
    words: bytes


class Order(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """An order to the board itself: words of 16 bytes, as for a PACMAN."""

    number: int
    io_group: int
    body: bytes


class Hello(msgspec.Struct, array_like=True, tag=11, frozen=True):
    """The first message: the IO class is loaded and listens. `registers`: it takes orders."""

    io_groups: list[int]
    registers: bool


class Data(msgspec.Struct, array_like=True, tag=12, frozen=True):
    """Received data. `log`: messages of a PACMAN, a u32 length before each; `io_groups`: a byte for each message."""

    io_groups: bytes
    log: bytes


class Idle(msgspec.Struct, array_like=True, tag=15, frozen=True):
    """The IO class has no more data. Comes after Data."""


class Sent(msgspec.Struct, array_like=True, tag=13, frozen=True):
    """The board's answer to a Send or an Order, or the error in one line."""

    number: int
    io_group: int
    body: bytes = b""
    error: str = ""


class Failed(msgspec.Struct, array_like=True, tag=14, frozen=True):
    """The last message: the reason why the process ends, in one line."""

    text: str


FromChild = Hello | Data | Idle | Sent | Failed

pack: Final = msgspec.msgpack.Encoder().encode
requests: Final = msgspec.msgpack.Decoder(Send | Order)
answers: Final = msgspec.msgpack.Decoder(FromChild)
