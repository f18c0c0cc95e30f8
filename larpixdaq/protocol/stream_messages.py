"""The messages of a producer's stream on NATS JetStream: consecutive frames of one origin, packed, and their ids.

A frame (stream.py) is a BLOCK with its parts, packed rows and their description if it has many rows, or an END with one
part. It is encoded as one byte with the number of its parts, 1 to 3, their lengths as little-endian u32, and the parts.
A message has the frames of one origin in the order of their sequences, one after the other.

A frame that is larger than a message may be is cut: each of its messages has a byte 0, the offset and the total size as
u32, and a piece of the encoded frame. An attempt that was interrupted begins again with offset 0.

The id of a message, in its header Nats-Msg-Id, is RUN-EPOCH-FIRST-NEXT, with the epoch in hexadecimal and NEXT the
sequence after its last frame. Pieces have an id with -ATTEMPT.OFFSET after it; NEXT is FIRST in all but the last one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from larpixdaq.errors import ProtocolError
from larpixdaq.protocol.stream import MAX_HEADER, Block, End, unpack_producer

#: Headers of a message: its id; the sequence after which alone the broker takes it; and the positions of the other
#: origins.
ID: Final = "Nats-Msg-Id"
EXPECTED_SEQUENCE: Final = "Nats-Expected-Last-Sequence"
POSITIONS: Final = "Larpixdaq-Positions"
#: Maximum parts of a frame.
MAX_PARTS: Final = 3
#: Maximum bytes of an encoded frame: the largest header, and twice the largest rows.
MAX_FRAME: Final = MAX_HEADER + (4 << 20)
#: Bytes before the data of a piece.
PIECE_HEADER: Final = 9
#: Maximum number of origins whose positions a message tells.
MAX_ORIGINS: Final = 8
_PIECE: Final = struct.Struct("<BII")
_NUMBER: Final = r"(0|[1-9][0-9]{0,18})"
_EPOCH: Final = r"([0-9a-f]{1,16})"
_IDENTITY: Final = re.compile(rf"{_NUMBER}-{_EPOCH}-{_NUMBER}-{_NUMBER}(?:-([0-9a-f]{{1,16}})\.{_NUMBER})?", re.ASCII)
_POSITION: Final = re.compile(rf"{_NUMBER}-{_EPOCH}-{_NUMBER}", re.ASCII)


class Identity(NamedTuple):
    """The id of a message: its frames have the sequences from `first` to below `next`.

    A piece of a frame has the `attempt` to send it, in hexadecimal, and the `offset` of its data.
    """

    run: int
    epoch: int
    first: int
    next: int
    attempt: str = ""
    offset: int = 0

    def __str__(self) -> str:
        piece = f"-{self.attempt}.{self.offset}" if self.attempt else ""
        return f"{self.run}-{self.epoch:x}-{self.first}-{self.next}{piece}"

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Parse the text of an id. ProtocolError if it is not one."""
        match = _IDENTITY.fullmatch(text)
        if match is None:
            raise ProtocolError(f"message id: expected RUN-EPOCH-FIRST-NEXT, found {text[:80]!r}")
        run, epoch, first, following, attempt, offset = match.groups()
        found = cls(int(run), int(epoch, 16), int(first), int(following), attempt or "", int(offset or 0))
        if found.next < found.first or (found.next == found.first and not attempt):
            raise ProtocolError(f"message id {text}: expected the next sequence above the first one")
        return found


#: (run, epoch) of one producer -> the next sequence.
Positions = Mapping[tuple[int, int], int]


def pack_positions(positions: Positions) -> str:
    """Return the header with the last MAX_ORIGINS of `positions`, which are those of the newest origins."""
    newest = list(positions.items())[-MAX_ORIGINS:]
    return ",".join(f"{run}-{epoch:x}-{following}" for (run, epoch), following in newest)


def unpack_positions(text: str) -> dict[tuple[int, int], int]:
    """Parse the header with positions. ProtocolError if it is malformed."""
    found: dict[tuple[int, int], int] = {}
    for entry in text.split(",") if text else ():
        match = _POSITION.fullmatch(entry)
        if match is None or len(found) == MAX_ORIGINS:
            raise ProtocolError(f"positions of a message: expected RUN-EPOCH-NEXT,..., found {text[:80]!r}")
        found[int(match[1]), int(match[2], 16)] = int(match[3])
    return found


def encode(parts: Sequence[Any]) -> bytes:
    """Encode a frame of 1 to 3 parts (bytes-like)."""
    lengths = struct.pack(f"<B{len(parts)}I", len(parts), *map(len, parts))
    return b"".join((lengths, *parts))


def cut(frame: bytes, most: int) -> Iterator[tuple[int, bytes]]:
    """Cut an encoded frame into messages of at most `most` bytes (above PIECE_HEADER); yields offset and message."""
    step = most - PIECE_HEADER
    for offset in range(0, len(frame), step):
        yield offset, _PIECE.pack(0, offset, len(frame)) + frame[offset : offset + step]


class Frame(NamedTuple):
    """A frame of a message, with its further parts: rows, or packed rows and their description, or none."""

    frame: Block | End
    parts: tuple[memoryview, ...]


class Unpacker:
    """Unpacks the messages of one stream, in their order, and joins the pieces of large frames.

    A reader begins at the first message of a frame, so that the acknowledgement of a message concerns whole frames.
    """

    def __init__(self, producer: str) -> None:
        """`producer`: whose frames these are."""
        self._producer = producer
        self._pieces = bytearray()
        self._total = 0

    @property
    def joining(self) -> bool:
        """Whether the last message was a piece of a frame that is not complete yet."""
        return self._total > 0

    def unpack(self, message: bytes) -> list[Frame]:
        """Return the frames of a message, none while pieces are missing. ProtocolError if it is malformed.

        The frames belong to one origin, and their sequences increase. They keep the message's memory.
        """
        if message[:1] == b"\0":
            joined = self._join(message)
            return [] if joined is None else self._frames(joined)
        self._discard()  # of an attempt that was interrupted
        return self._frames(message)

    def _discard(self) -> None:
        self._pieces, self._total = bytearray(), 0

    def _join(self, message: bytes) -> bytes | None:
        if len(message) <= PIECE_HEADER:
            self._discard()
            raise ProtocolError(f"piece of a frame of {self._producer}: {len(message)} bytes have no data")
        _, offset, total = _PIECE.unpack_from(message)
        if offset == 0:
            self._discard()
            self._total = total
        end = offset + len(message) - PIECE_HEADER
        if offset != len(self._pieces) or total != self._total or not end <= total <= MAX_FRAME:
            expected = f"offset {len(self._pieces)} of {self._total} bytes" if self._total else "offset 0"
            self._discard()
            raise ProtocolError(
                f"piece of a frame of {self._producer}: expected {expected}, found bytes {offset} to {end} of {total}"
            )
        self._pieces += memoryview(message)[PIECE_HEADER:]
        if end < total:
            return None
        joined = bytes(self._pieces)
        self._discard()
        return joined

    def _frames(self, message: bytes) -> list[Frame]:
        found: list[Frame] = []
        for parts in _split(memoryview(message), self._producer):
            frame = unpack_producer(parts[0], self._producer)
            if not isinstance(frame, Block | End):
                raise ProtocolError(f"message of {self._producer}: expected blocks and end records only")
            if frame.producer != self._producer:
                raise ProtocolError(f"message of {self._producer}: found a frame of {frame.producer}")
            if isinstance(frame, End) and len(parts) > 1:
                raise ProtocolError(f"message of {self._producer}: an end record of {len(parts)} parts, expected 1")
            if found and (frame.origin != found[-1].frame.origin or frame.following <= found[-1].frame.following):
                raise ProtocolError(
                    f"message of {self._producer}: expected frames of one origin in their order, found sequence "
                    f"{frame.following - 1} of run {frame.run} after {found[-1].frame.following - 1} of run "
                    f"{found[-1].frame.run}"
                )
            found.append(Frame(frame, tuple(parts[1:])))
        return found


def _split(message: memoryview, producer: str) -> Iterable[list[memoryview]]:
    """Split a message into the parts of its frames. ProtocolError if their lengths do not fit."""
    at = 0
    if not len(message):
        raise ProtocolError(f"message of {producer}: it is empty")
    while at < len(message):
        n = message[at]
        if not 1 <= n <= MAX_PARTS:
            raise ProtocolError(f"message of {producer}: expected a frame of 1 to {MAX_PARTS} parts, found {n}")
        begin = at + 1 + 4 * n
        if begin > len(message):
            raise ProtocolError(
                f"message of {producer}: expected {n} lengths of 4 bytes, found its end at byte {len(message)}"
            )
        parts = []
        for length in struct.unpack_from(f"<{n}I", message, at + 1):
            if begin + length > len(message):
                left = len(message) - begin
                raise ProtocolError(f"message of {producer}: expected a part of {length} bytes, found {left}")
            parts.append(message[begin : begin + length])
            begin += length
        yield parts
        at = begin
