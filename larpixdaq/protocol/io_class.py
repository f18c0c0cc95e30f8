"""What a producer and the process of an IO class say to each other: msgpack arrays, each one message of a SEQPACKET
socket."""

from __future__ import annotations

from typing import Final

import msgspec

from larpixdaq.runtime.child_process import PIECE

#: Maximum bytes of a message, so that one receive() gets it whole. It also fits into the socket's buffer.
MAX_MESSAGE: Final = PIECE


class Send(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """Send words to chips: their io_channels, a byte each, and the words, 8 bytes each, little-endian."""

    number: int
    io_group: int
    io_channels: bytes
    words: bytes


class Order(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """An order to the board itself: words of 16 bytes, as a PACMAN takes them."""

    number: int
    io_group: int
    body: bytes


class Hello(msgspec.Struct, array_like=True, tag=11, frozen=True):
    """The class is there, and listens. `registers`: it takes orders."""

    io_groups: list[int]
    registers: bool


class Data(msgspec.Struct, array_like=True, tag=12, frozen=True):
    """What came, as messages of a PACMAN, each behind its length (u32); the io_group of each, a byte."""

    io_groups: bytes
    log: bytes


class Idle(msgspec.Struct, array_like=True, tag=15, frozen=True):
    """After Data: the class was asked again, and had nothing more."""


class Sent(msgspec.Struct, array_like=True, tag=13, frozen=True):
    """What became of a Send or an Order: the board's answer to it, or, in one line, why there is none."""

    number: int
    io_group: int
    body: bytes = b""
    error: str = ""


class Failed(msgspec.Struct, array_like=True, tag=14, frozen=True):
    """The last message: why the process ends, in one line."""

    text: str


FromChild = Hello | Data | Idle | Sent | Failed

pack: Final = msgspec.msgpack.Encoder().encode
requests: Final = msgspec.msgpack.Decoder(Send | Order)
answers: Final = msgspec.msgpack.Decoder(FromChild)
