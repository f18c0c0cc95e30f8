"""The frames of the stream between a producer and its consumers: kinds, headers, packing.

A frame is one byte of kind, a msgpack array (the header), and, for BLOCK, a second ZeroMQ part with the rows. To a
consumer on the same host, which reads the producer's ring itself (MAPS), the second part is empty and a third one has
the number of the block in the ring, 8 bytes, little-endian.
Everything that arrives is validated against these structs; what does not fit raises ProtocolError and harms nobody.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from larpixdaq.errors import ProtocolError

STREAM_VERSION: Final = 1
#: No header is larger: an END carries up to 1,000 unknown words of each io_group.
MAX_HEADER: Final = 32 << 20


class Source(NamedTuple):
    """Whose blocks they are: sequences count from 0 per (run, producer, epoch)."""

    run: int
    producer: str
    epoch: int


class Totals(msgspec.Struct, array_like=True, frozen=True):
    """What one io_group has delivered since the run began, at the end of the block that carries this."""

    io_group: int
    packets: int  # rows of types 0 to 3 with direction 1
    rows: int  # all rows
    bad_parity: int
    unknown: int  # unknown and rejected words
    dropped: int  # rows that found no room


class Gap(msgspec.Struct, array_like=True, frozen=True):
    """Rows of one io_group that were decoded and counted, but found no room, before the block that carries this."""

    io_group: int
    rows: int
    first_ns: int  # host clock, unix ns
    last_ns: int


class Position(msgspec.Struct, array_like=True, frozen=True):
    run: int
    producer: str
    epoch: int
    next: int


class Configs(msgspec.Struct, array_like=True, frozen=True):
    """Configurations of chips: what their registers were last told, and what they last said (configurations.py)."""

    asic: str  # as --asic has it
    chips: bytes  # io_group, io_channel, chip_id of each
    registers: bytes  # packed


# Consumer to producer


class Hello(msgspec.Struct, array_like=True, tag=1, frozen=True):
    version: int
    name: str
    session: str
    mode: str  # "all" (every block, acknowledged) or "latest" (credit, blocks may be skipped)
    positions: list[Position]


class Ack(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """All of (run, epoch) below `next` is durable. An END counts as the sequence it names: its ACK is END.next + 1."""

    run: int
    epoch: int
    next: int


class Credit(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Room for this many blocks in all since the HELLO: a running total, so repeating it is harmless."""

    blocks: int


class Bye(msgspec.Struct, array_like=True, tag=4, frozen=True):
    pass


class Maps(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """The consumer reads the ring of this epoch itself: rows need not be sent."""

    epoch: int


# Producer to consumer


class Welcome(msgspec.Struct, array_like=True, tag=11, frozen=True):
    producer: str
    epoch: int
    run: int | None
    layout: int
    ring: str = ""  # the file of the producer's ring, for consumers on its host


class Block(msgspec.Struct, array_like=True, tag=12, frozen=True):
    """Header of a block: what the payload, `rows` rows of `layout`, is and where it belongs."""

    run: int
    producer: str
    epoch: int
    sequence: int
    first_packet: int  # index, in this run and epoch, of the first row
    rows: int
    layout: int
    flags: int
    first_ns: int  # host clock, unix ns, when the first row came
    last_ns: int
    crc32: int
    totals: list[Totals]
    gaps: list[Gap]
    text: str | None = None  # an INFO message: the rows are of type 5
    configs: Configs | None = None  # what the text is about

    @property
    def source(self) -> Source:
        return Source(self.run, self.producer, self.epoch)


class UnknownWord(msgspec.Struct, array_like=True, frozen=True):
    io_group: int
    seconds: int  # unix
    reason: int  # schema.REASONS
    raw: bytes


class Verdict(msgspec.Struct, array_like=True, frozen=True):
    """What became of an io_group's data before they reached us, as far as a producer can tell.

    Boards do not number what they send, so this is inferred. Several lines about one io_group are several findings.
    """

    io_group: int
    verdict: str  # VERDICTS
    why: str  # one sentence; empty for "complete"
    lost: int  # packets at least; 0: nobody knows
    first_ns: int  # unix ns: the time that the finding is about; both 0 for "complete"
    last_ns: int


#: From best to worst: nothing speaks against it, something may be missing, something is missing.
VERDICTS: Final = ("complete", "suspect", "lost")


class End(msgspec.Struct, array_like=True, tag=13, frozen=True):
    """The last of a run and epoch. `counts` has one list per io_group: the io_group, then schema.COUNTS in order."""

    run: int
    producer: str
    epoch: int
    next: int
    how: str  # "closed", "aborted" or "recovered"
    first_ns: int
    last_ns: int
    counts: list[list[int]]
    gaps: list[Gap]
    unknown: list[UnknownWord]
    outside: list[list[int]] = []  # counts of run 0 since the end before, in the same form
    verdicts: list[Verdict] = []  # of each io_group at least one line

    @property
    def source(self) -> Source:
        return Source(self.run, self.producer, self.epoch)


class Refused(msgspec.Struct, array_like=True, tag=14, frozen=True):
    reason: str  # "hello", "version", "superseded", "silent", or a sentence


FromConsumer = Hello | Ack | Credit | Bye | Maps
FromProducer = Welcome | Block | End | Refused

_encoder: Final = msgspec.msgpack.Encoder()
_from_consumer: Final = msgspec.msgpack.Decoder(FromConsumer)
_from_producer: Final = msgspec.msgpack.Decoder(FromProducer)


def pack(frame: FromConsumer | FromProducer) -> bytes:
    """One kind byte and the header. The kind stands in the array's tag too, which is what is checked."""
    tag = frame.__struct_config__.tag
    return bytes((tag,)) + _encoder.encode(frame)  # type: ignore[arg-type]


def _unpack(data: Any, decoder: msgspec.msgpack.Decoder[Any], sender: str) -> Any:
    if not 2 <= len(data) <= MAX_HEADER:
        raise ProtocolError(f"stream frame from {sender}: expected 2 to {MAX_HEADER} bytes, found {len(data)}")
    view = memoryview(data)
    try:
        frame = decoder.decode(view[1:])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ProtocolError(f"stream frame of kind {view[0]} from {sender}: {error}") from None
    if frame.__struct_config__.tag != view[0]:
        raise ProtocolError(f"stream frame from {sender}: kind {view[0]} around a header of another kind")
    return frame


def unpack_consumer(data: Any, sender: str) -> FromConsumer:
    """What a consumer sent to a producer."""
    frame: FromConsumer = _unpack(data, _from_consumer, sender)
    return frame


def unpack_producer(data: Any, sender: str) -> FromProducer:
    """What a producer sent to a consumer."""
    frame: FromProducer = _unpack(data, _from_producer, sender)
    return frame


def text_pieces(text: str, size: int) -> list[bytes]:
    """The text in UTF-8 in pieces of at most `size` bytes, none of which ends within a character; at least one piece.

    A NUL would be lost at a piece's end; it becomes U+FFFD.
    """
    data = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    found = []
    while len(data) > size:
        end = size
        while data[end] & 0xC0 == 0x80:
            end -= 1
        found.append(data[:end])
        data = data[end:]
    return [*found, data]
