"""The frames of the stream between a producer and its consumers: kinds, headers, packing.

A frame is one byte of kind, a msgpack array (the header), and, for BLOCK, a second ZeroMQ part with the rows. To a
consumer on the same host, which reads the producer's ring itself (MAPS), the second part is empty and a third one has
the number of the block in the ring, 8 bytes, little-endian.
Everything that arrives is validated against these structs, sizes and ranges included; what does not fit raises
ProtocolError and harms nobody.

Configurations of chips on their way from a producer into the file: arrays, and what carries them in a block.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from larpixdaq.constants import (
    BLOCK_ROWS,
    IO_GROUPS,
    LAST_RUN,
    LAYOUT_NAMES,
    UNKNOWN_BYTES,
    Count,
    rows_made,
)
from larpixdaq.errors import ProtocolError

if TYPE_CHECKING:  # the core needs no numpy
    import numpy as np
    from numpy.typing import NDArray

STREAM_VERSION: Final = 1
#: Maximum bytes of a producer's header: an END carries up to 1,000 unknown words of each io_group.
MAX_HEADER: Final = 16 << 20
#: Maximum bytes of a consumer's frame: a HELLO with all its positions.
MAX_FROM_CONSUMER: Final = 128 << 10
#: Maximum number of positions in a HELLO; consumers send those of the newest runs.
MAX_POSITIONS: Final = 256
#: Names of components and actions: no control characters, so that they can stand in a line of text.
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
#: A run's number.
RunNumber = Annotated[int, Meta(ge=1, le=LAST_RUN)]
#: 64 bits; msgpack has no larger numbers.
Epoch = Annotated[int, Meta(ge=0)]
_64Bits = Annotated[int, Meta(ge=0)]
#: Unix ns by a host's clock.
Time = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: Rows, packets, bytes: those of all 256 io_groups add up to less than 2^64.
_56Bits = Annotated[int, Meta(ge=0, lt=2**56)]
#: Numbers of blocks: those of 65,536 sources add up to less than 2^64.
Sequence = Annotated[int, Meta(ge=0, lt=2**48)]
IoGroup = Annotated[int, Meta(ge=0, lt=IO_GROUPS)]
LayoutCode = Annotated[int, Meta(ge=1, le=len(LAYOUT_NAMES))]
_32Bits = Annotated[int, Meta(ge=0, lt=2**32)]
#: Kinds of sources whose data come from no detector now.
KINDS_WITHOUT_DETECTOR: Final = ("fake", "replay")
#: One list per io_group: the io_group, then its counters in the order of constants.Count.
Counters = Annotated[
    list[Annotated[list[_56Bits], Meta(min_length=1 + len(Count), max_length=1 + len(Count))]],
    Meta(max_length=IO_GROUPS),
]
#: From best to worst: nothing speaks against it, something may be missing, something is missing.
VERDICTS: Final = ("complete", "suspect", "lost")
_encoder: Final = msgspec.msgpack.Encoder()
_totals: Final = itemgetter(Count.PACKETS, Count.BAD_PARITY, Count.UNKNOWN_WORDS, Count.REJECTED_WORDS, Count.DROPPED)
#: Registers of a chip here; those that it does not have are 0 and not KNOWN.
REGISTERS: Final = 256
#: Bits of `known`: the register was told a value; it said one, and was not told another since.
SENT, READ = 1, 2
#: Of registers that differ, so many are named.
_MAX_NAMED: Final = 5
#: Chips of one block: some 200 kB before they are packed.
_PIECE_CHIPS: Final = 256


class BlockOrigin(NamedTuple):
    """Whose blocks they are: sequences count from 0 per (run, producer, epoch)."""

    run: int
    producer: str
    epoch: int


class Totals(msgspec.Struct, array_like=True, frozen=True):
    """The rows of one io_group from the beginning of the run to the end of the block that carries this."""

    io_group: IoGroup
    packets: _56Bits  # rows of types 0 to 3 with direction 1
    rows: _56Bits  # all rows
    bad_parity: _56Bits
    unknown: _56Bits  # unknown and rejected words
    dropped: _56Bits  # rows that found no room

    @classmethod
    def of(cls, io_group: int, counts: list[int]) -> Totals:
        """Sum up the counters of one io_group, in the order of constants.Count."""
        packets, bad_parity, unknown, rejected, dropped = _totals(counts)
        return cls(io_group, packets, rows_made(counts), bad_parity, unknown + rejected, dropped)


class Gap(msgspec.Struct, array_like=True, frozen=True):
    """Rows of one io_group that were decoded and counted, but found no room, before the block that carries this."""

    io_group: IoGroup
    rows: _56Bits
    first_ns: Time  # host clock, unix ns
    last_ns: Time


Gaps = Annotated[list[Gap], Meta(max_length=IO_GROUPS)]


class Position(msgspec.Struct, array_like=True, frozen=True):
    run: RunNumber
    producer: Name
    epoch: Epoch
    next: Sequence


class Configs(msgspec.Struct, array_like=True, frozen=True):
    """Configurations of chips: what their registers were last told, and what they last said."""

    asic: Annotated[str, Meta(max_length=16)]  # as --asic has it
    chips: Annotated[bytes, Meta(max_length=1 << 10)]  # io_group, io_channel, chip_id of each
    registers: Annotated[bytes, Meta(max_length=1 << 20)]  # packed


class ConnectedBoard(msgspec.Struct, frozen=True):
    """One io_group of a board, or of what stands for one, as a producer reads it in a run."""

    producer: Annotated[str, Meta(min_length=1, max_length=256)]
    io_group: Annotated[int, Meta(ge=0, le=255)]
    kind: Annotated[str, Meta(max_length=16)]  # "PACMAN", "Bern board", "serial", "IO class", "fake" or "replay"
    address: Annotated[str, Meta(max_length=256)]  # network address, device, class with arguments, or files
    host: Annotated[str, Meta(max_length=256)]  # the computer on which the producer runs
    firmware: Annotated[str, Meta(max_length=256)] = ""  # as the board says it; empty: not known


# Consumer to producer


class Hello(msgspec.Struct, array_like=True, tag=1, frozen=True):
    version: int
    name: Name
    session: Annotated[str, Meta(max_length=64)]
    mode: str  # "all" (every block, acknowledged) or "latest" (credit, blocks may be skipped)
    positions: Annotated[list[Position], Meta(max_length=MAX_POSITIONS)]  # of this producer's blocks


class Ack(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """All of (run, epoch) below `next` is durable. An END counts as the sequence it names: its ACK is END.next + 1."""

    run: RunNumber
    epoch: Epoch
    next: Sequence


class Credit(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Room for this many blocks in all since the HELLO: a running total, so repeating it is harmless."""

    blocks: Sequence


class Bye(msgspec.Struct, array_like=True, tag=4, frozen=True):
    pass


class Maps(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """The consumer reads the ring of this epoch itself: rows need not be sent."""

    epoch: Epoch


# Producer to consumer


class Welcome(msgspec.Struct, array_like=True, tag=11, frozen=True):
    producer: Name
    epoch: Epoch
    run: RunNumber | None
    layout: Annotated[int, Meta(ge=0, le=len(LAYOUT_NAMES))]  # 0: no run yet
    ring: Annotated[str, Meta(max_length=4096)] = ""  # the file of the producer's ring, for consumers on its host


class Block(msgspec.Struct, array_like=True, tag=12, frozen=True):
    """Header of a block: what the payload, `rows` rows of `layout`, is and where it belongs."""

    run: RunNumber
    producer: Name
    epoch: Epoch
    sequence: Sequence
    first_packet: _56Bits  # index, in this run and epoch, of the first row
    rows: Annotated[int, Meta(ge=0, le=BLOCK_ROWS)]
    layout: LayoutCode
    flags: _32Bits
    first_ns: Time  # host clock, unix ns, when the first row came
    last_ns: Time
    crc32: _32Bits
    totals: Annotated[list[Totals], Meta(max_length=IO_GROUPS)]
    gaps: Gaps
    text: Annotated[str, Meta(max_length=1 << 20)] | None = None  # an INFO message: the rows are of type 5
    configs: Configs | None = None  # what the text is about

    @property
    def source(self) -> BlockOrigin:
        return BlockOrigin(self.run, self.producer, self.epoch)

    @property
    def following(self) -> int:
        """The sequence that comes next."""
        return self.sequence + 1


class UnknownWord(msgspec.Struct, array_like=True, frozen=True):
    io_group: IoGroup
    seconds: _64Bits  # unix, as the board says it
    reason: Annotated[int, Meta(ge=0, lt=256)]  # schema.REASONS
    raw: Annotated[bytes, Meta(max_length=UNKNOWN_BYTES)]


class LossVerdict(msgspec.Struct, array_like=True, frozen=True):
    """What became of an io_group's data before they reached us, as far as a producer can tell.

    Boards do not number what they send, so this is inferred. Several lines about one io_group are several findings.
    """

    io_group: IoGroup
    verdict: Annotated[str, Meta(pattern=r"^(complete|suspect|lost)\Z")]  # VERDICTS
    why: str  # one sentence; for "complete": empty, or what else is known of the board, such as its clock
    lost: _64Bits  # packets at least; 0: nobody knows
    first_ns: _64Bits  # unix ns: the time that the finding is about; both 0 for an empty "complete"
    last_ns: _64Bits


class End(msgspec.Struct, array_like=True, tag=13, frozen=True):
    """The last of a run and epoch."""

    run: RunNumber
    producer: Name
    epoch: Epoch
    next: Sequence
    how: Annotated[str, Meta(pattern=r"^(closed|aborted|recovered)\Z")]
    first_ns: Time
    last_ns: Time
    counts: Counters
    gaps: Gaps
    unknown: list[UnknownWord]
    outside: Counters = []  # counts of run 0 since the end before, in the same form
    verdicts: list[LossVerdict] = []  # of each io_group at least one line

    @property
    def source(self) -> BlockOrigin:
        return BlockOrigin(self.run, self.producer, self.epoch)

    @property
    def following(self) -> int:
        """The sequence that comes next: an end counts as the sequence that it names."""
        return self.next + 1


class Refused(msgspec.Struct, array_like=True, tag=14, frozen=True):
    reason: str  # "hello", "version", "superseded", "silent", or a sentence


FromConsumer = Hello | Ack | Credit | Bye | Maps

FromProducer = Welcome | Block | End | Refused

_from_consumer: Final = msgspec.msgpack.Decoder(FromConsumer)

_from_producer: Final = msgspec.msgpack.Decoder(FromProducer)


def pack(frame: FromConsumer | FromProducer) -> bytes:
    """One kind byte and the header. The kind stands in the array's tag too, which is what is checked."""
    tag = frame.__struct_config__.tag
    return bytes((tag,)) + _encoder.encode(frame)  # type: ignore[arg-type]


def _unpack(data: Any, decoder: msgspec.msgpack.Decoder[Any], sender: str, most: int) -> Any:
    if not 2 <= len(data) <= most:
        raise ProtocolError(f"stream frame from {sender}: expected 2 to {most} bytes, found {len(data)}")
    view = memoryview(data)
    try:
        frame = decoder.decode(view[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"stream frame of kind {view[0]} from {sender}: {error}") from None
    if frame.__struct_config__.tag != view[0]:
        raise ProtocolError(f"stream frame from {sender}: kind {view[0]} around a header of another kind")
    return frame


def unpack_consumer(data: Any, sender: str) -> FromConsumer:
    """What a consumer sent to a producer."""
    frame: FromConsumer = _unpack(data, _from_consumer, sender, MAX_FROM_CONSUMER)
    return frame


def unpack_producer(data: Any, sender: str) -> FromProducer:
    """What a producer sent to a consumer."""
    frame: FromProducer = _unpack(data, _from_producer, sender, MAX_HEADER)
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


class Configurations(NamedTuple):
    """Of N chips of one generation (`asic`, as --asic has it). Bytes, of shape (N, 3): io_group, io_channel, chip_id;
    and three of shape (N, REGISTERS)."""

    asic: str
    chips: NDArray[np.uint8]
    sent: NDArray[np.uint8]
    read: NDArray[np.uint8]
    known: NDArray[np.uint8]

    @property
    def different(self) -> NDArray[np.bool_]:
        """Registers that said something else than they had been told, shape (N, REGISTERS)."""
        differ: NDArray[np.bool_] = (self.known == SENT | READ) & (self.sent != self.read)
        return differ

    def pieces(self) -> Iterator[Configurations]:
        """As many of them as fit a block."""
        for first in range(0, len(self.chips), _PIECE_CHIPS):
            part = slice(first, first + _PIECE_CHIPS)
            yield Configurations(self.asic, *(array[part] for array in self[1:]))

    def text(self) -> str:
        """What there is, in a line."""
        import numpy as np

        keys = ["-".join(map(str, chip)) for chip in self.chips[[0, -1]].tolist()]
        which = f"chip {keys[0]}" if len(self.chips) == 1 else f"{len(self.chips)} chips, {keys[0]} to {keys[1]}"
        told, said = (int(np.count_nonzero(self.known & bit)) for bit in (SENT, READ))
        differ = int(np.count_nonzero(self.different))
        return f"Configuration of {which}: {told} registers sent, {said} read back, {differ} different"

    def differences(self) -> str:
        """Which registers said something else than they had been told, in a line; empty when none did."""
        import numpy as np

        at = np.argwhere(self.different)
        named = [
            f"{'-'.join(map(str, self.chips[chip].tolist()))} register {register} was told {self.sent[chip, register]}"
            f" and says {self.read[chip, register]}"
            for chip, register in at[:_MAX_NAMED].tolist()
        ]
        more = f", and {len(at) - _MAX_NAMED} more" if len(at) > _MAX_NAMED else ""
        return f"chip {', '.join(named)}{more}" if named else ""

    def pack(self) -> Configs:
        import numpy as np

        arrays = np.stack(self[2:])
        return Configs(self.asic, self.chips.tobytes(), zlib.compress(arrays.tobytes(), 1))


def unpack_configurations(found: Configs) -> Configurations:
    """ProtocolError when that is none."""
    import numpy as np

    n, rest = divmod(len(found.chips), 3)
    size = 3 * n * REGISTERS
    if rest or not 0 < n <= _PIECE_CHIPS:
        raise ProtocolError(
            f"configurations: expected 1 to {_PIECE_CHIPS} chips of 3 bytes, found {len(found.chips)} bytes"
        )
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(found.registers, size)
    except zlib.error as error:
        raise ProtocolError(f"configurations: {error}") from None
    if len(data) != size or decoder.decompress(decoder.unconsumed_tail, 1):
        raise ProtocolError(f"configurations: expected {size} bytes for {n} chips, found {len(data)} or more")
    sent, read, known = np.frombuffer(data, np.uint8).reshape(3, n, REGISTERS)
    return Configurations(found.asic, np.frombuffer(found.chips, np.uint8).reshape(n, 3), sent, read, known)
