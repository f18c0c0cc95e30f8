"""The frames of the stream between a producer and its consumers: kinds, headers, packing.

A frame is one byte of kind, a msgpack array (the header), and, for BLOCK, a second ZeroMQ part with the rows. A
consumer on the same host may read the rows out of the producer's ring (MAPS): then the second part is empty, and a
third part has the number of the block in the ring, 8 bytes, little-endian. For a consumer on another host (PACKS) the
second part has the rows packed, and the third part describes them (packed_rows.py); small blocks come as they are.
Every received frame is checked against these structs, with sizes and ranges; ProtocolError if it does not fit.

Configurations are the registers of chips as arrays, which a block carries packed (Configs) on their way to the file.
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
    Name,
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
RunNumber = Annotated[int, Meta(ge=1, le=LAST_RUN)]
#: 64 bits: msgpack has no larger numbers.
Epoch = Annotated[int, Meta(ge=0)]
_64Bits = Annotated[int, Meta(ge=0)]
#: Unix ns by a host's clock.
Time = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: Counts of rows, packets or bytes; the sum over all 256 io_groups is below 2^64.
_56Bits = Annotated[int, Meta(ge=0, lt=2**56)]
#: Numbers of blocks; the sum over 65,536 origins is below 2^64.
Sequence = Annotated[int, Meta(ge=0, lt=2**48)]
IoGroup = Annotated[int, Meta(ge=0, lt=IO_GROUPS)]
LayoutCode = Annotated[int, Meta(ge=1, le=len(LAYOUT_NAMES))]
_32Bits = Annotated[int, Meta(ge=0, lt=2**32)]
#: Kinds of sources whose data do not come from a detector now.
KINDS_WITHOUT_DETECTOR: Final = ("fake", "replay")
#: A list for each io_group: the io_group, then its counters in the order of constants.Count.
Counters = Annotated[
    list[Annotated[list[_56Bits], Meta(min_length=1 + len(Count), max_length=1 + len(Count))]],
    Meta(max_length=IO_GROUPS),
]
#: Verdicts on the data of an io_group, from best to worst: no sign of a loss, data may be lost, data are lost.
VERDICTS: Final = ("complete", "suspect", "lost")
_encoder: Final = msgspec.msgpack.Encoder()
_totals: Final = itemgetter(Count.PACKETS, Count.BAD_PARITY, Count.UNKNOWN_WORDS, Count.REJECTED_WORDS, Count.DROPPED)
#: Registers of a chip in these arrays; registers that the chip does not have are 0 in all arrays.
REGISTERS: Final = 256
#: Bits of `known`: a value was sent to the register; a value was read from the register, and none was sent since.
SENT, READ = 1, 2
#: Maximum number of differing registers that a text names.
_MAX_NAMED: Final = 5
#: Maximum number of chips of a block: about 200 kB before packing.
_PIECE: Final = 256


class BlockOrigin(NamedTuple):
    """The origin of blocks: their sequences count from 0 per (run, producer, epoch)."""

    run: int
    producer: str
    epoch: int


class Totals(msgspec.Struct, array_like=True, frozen=True):
    """Rows of one io_group from the beginning of the run to the end of the block that carries this struct."""

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
    """Rows of one io_group that were counted but found no room, before the block that carries this struct."""

    io_group: IoGroup
    rows: _56Bits
    first_ns: Time  # host clock, unix ns
    last_ns: Time


Gaps = Annotated[list[Gap], Meta(max_length=IO_GROUPS)]


class _OriginFields(msgspec.Struct, array_like=True, frozen=True):
    """The first fields of all frames about one origin."""

    run: RunNumber
    producer: Name
    epoch: Epoch

    @property
    def origin(self) -> BlockOrigin:
        return BlockOrigin(self.run, self.producer, self.epoch)


class Position(_OriginFields, frozen=True):
    next: Sequence


class Configs(msgspec.Struct, array_like=True, frozen=True):
    """Packed Configurations: the values last sent to the registers of chips, and last read from them."""

    asic: Annotated[str, Meta(max_length=16)]  # as --asic has it
    chips: Annotated[bytes, Meta(max_length=1 << 10)]  # io_group, io_channel, chip_id of each chip
    registers: Annotated[bytes, Meta(max_length=1 << 20)]  # sent, read and known, compressed by zlib


class ConnectedBoard(msgspec.Struct, frozen=True):
    """One io_group of a producer in a run, with the board, device or recording behind it."""

    producer: Name
    io_group: Annotated[int, Meta(ge=0, le=255)]
    #: "PACMAN", "Bern board", "serial", "IO class", "fake", "replay", or, in a converted file, "recording"
    kind: Annotated[str, Meta(max_length=16)]
    address: Annotated[str, Meta(max_length=256)]  # network address, device, class with arguments, or files
    host: Annotated[str, Meta(max_length=256)]  # the computer on which the producer runs
    firmware: Annotated[str, Meta(max_length=256)] = ""  # by the board itself; "": not known


# Consumer to producer


class Hello(msgspec.Struct, array_like=True, tag=1, frozen=True):
    version: int
    name: Name
    session: Annotated[str, Meta(max_length=64)]
    mode: str  # "all" (every block, acknowledged) or "latest" (credit, blocks may be skipped)
    positions: Annotated[list[Position], Meta(max_length=MAX_POSITIONS)]  # of this producer's blocks


class Ack(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """All of (run, epoch) below `next` is durable. An END counts as one sequence: its ACK is END.next + 1."""

    run: RunNumber
    epoch: Epoch
    next: Sequence


class Credit(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Room for this number of blocks in all since the HELLO: a running total, so that it may be repeated.

    Of successive blocks, one of each `every` is wanted; an earlier producer takes no notice of it.
    """

    blocks: Sequence
    every: Annotated[float, Meta(ge=1, le=1 << 20)] = 1.0


class Bye(msgspec.Struct, array_like=True, tag=4, frozen=True):
    pass


class Maps(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """The consumer reads the rows out of the ring of this epoch: they need not be sent."""

    epoch: Epoch


class Packs(msgspec.Struct, array_like=True, tag=6, frozen=True):
    """The consumer cannot read the ring: rows are to be sent packed."""


# Producer to consumer


class Welcome(msgspec.Struct, array_like=True, tag=11, frozen=True):
    producer: Name
    epoch: Epoch
    run: RunNumber | None
    layout: Annotated[int, Meta(ge=0, le=len(LAYOUT_NAMES))]  # 0: no run yet
    ring: Annotated[str, Meta(max_length=4096)] = ""  # the file of the producer's ring, for consumers on its host
    packs: bool = False  # the producer takes PACKS; an earlier version would refuse the consumer for it


class Block(_OriginFields, tag=12, frozen=True):
    """Header of a block; the payload is `rows` rows of `layout`."""

    sequence: Sequence
    first_packet: _56Bits  # index of the first row in this run and epoch
    rows: Annotated[int, Meta(ge=0, le=BLOCK_ROWS)]
    layout: LayoutCode
    flags: _32Bits
    first_ns: Time  # arrival of the first row: host clock, unix ns
    last_ns: Time
    crc32: _32Bits
    totals: Annotated[list[Totals], Meta(max_length=IO_GROUPS)]
    gaps: Gaps
    text: Annotated[str, Meta(max_length=1 << 20)] | None = None  # an INFO message: the rows are of type 5
    configs: Configs | None = None  # the configurations of which the text tells

    @property
    def following(self) -> int:
        """The next sequence of the origin."""
        return self.sequence + 1


class UnknownWord(msgspec.Struct, array_like=True, frozen=True):
    io_group: IoGroup
    seconds: _64Bits  # unix seconds, by the board
    reason: Annotated[int, Meta(ge=0, lt=256)]  # schema.REASONS
    raw: Annotated[bytes, Meta(max_length=UNKNOWN_BYTES)]


class LossVerdict(msgspec.Struct, array_like=True, frozen=True):
    """A finding of a producer on the data of one io_group before they reached the host.

    It is inferred, because boards do not number their messages. An io_group may have several findings.
    """

    io_group: IoGroup
    verdict: Annotated[str, Meta(pattern=r"^(complete|suspect|lost)\Z")]  # VERDICTS
    why: str  # one sentence; for "complete": "", or another fact about the board, such as its clock
    lost: _64Bits  # at least this number of packets; 0: unknown
    first_ns: _64Bits  # start of the time that the finding is about, unix ns; 0 for an empty "complete"
    last_ns: _64Bits  # its end


class End(_OriginFields, tag=13, frozen=True):
    """The end record: the last record of an origin, with its exact totals."""

    next: Sequence
    how: Annotated[str, Meta(pattern=r"^(closed|aborted|recovered)\Z")]
    first_ns: Time
    last_ns: Time
    counts: Counters
    gaps: Gaps
    unknown: list[UnknownWord]
    outside: Counters = []  # counts of run 0 since the previous end record, in the same form
    verdicts: list[LossVerdict] = []  # at least one for each io_group

    @property
    def following(self) -> int:
        """The next sequence of the origin: an end record counts as the sequence `next`."""
        return self.next + 1


class Refused(msgspec.Struct, array_like=True, tag=14, frozen=True):
    reason: str  # "hello", "version", "superseded", "silent", or a sentence


FromConsumer = Hello | Ack | Credit | Bye | Maps | Packs

FromProducer = Welcome | Block | End | Refused

_from_consumer: Final = msgspec.msgpack.Decoder(FromConsumer)

_from_producer: Final = msgspec.msgpack.Decoder(FromProducer)


def pack(frame: FromConsumer | FromProducer) -> bytes:
    """Pack the kind byte and the header. The header has the kind again, as its tag, which is checked."""
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
        raise ProtocolError(f"stream frame from {sender}: kind {view[0]}, its header is of another kind")
    return frame


def unpack_consumer(data: Any, sender: str) -> FromConsumer:
    """Unpack a frame of a consumer; ProtocolError if it is malformed."""
    frame: FromConsumer = _unpack(data, _from_consumer, sender, MAX_FROM_CONSUMER)
    return frame


def unpack_producer(data: Any, sender: str) -> FromProducer:
    """Unpack a frame of a producer; ProtocolError if it is malformed."""
    frame: FromProducer = _unpack(data, _from_producer, sender, MAX_HEADER)
    return frame


def text_pieces(text: str, size: int) -> list[bytes]:
    """Split a text into pieces of at most `size` bytes of UTF-8, between characters. Returns at least one piece.

    NUL becomes U+FFFD, because a NUL at the end of a piece would be lost in the file.
    """
    data = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    pieces = []
    while len(data) > size:
        end = size
        while data[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(data[:end])
        data = data[end:]
    return [*pieces, data]


class Configurations(NamedTuple):
    """Configurations of N chips of one generation (`asic`, as in --asic).

    `chips`, shape (N, 3): io_group, io_channel, chip_id. `sent`, `read` and `known`, shape (N, REGISTERS): the values
    last sent and last read, and the bits SENT and READ.
    """

    asic: str
    chips: NDArray[np.uint8]
    sent: NDArray[np.uint8]
    read: NDArray[np.uint8]
    known: NDArray[np.uint8]

    @property
    def different(self) -> NDArray[np.bool_]:
        """Whether a register's value read differs from the value sent, shape (N, REGISTERS)."""
        differ: NDArray[np.bool_] = (self.known == SENT | READ) & (self.sent != self.read)
        return differ

    def pieces(self) -> Iterator[Configurations]:
        """Split into pieces that fit into a block each."""
        for first in range(0, len(self.chips), _PIECE):
            part = slice(first, first + _PIECE)
            yield Configurations(self.asic, *(array[part] for array in self[1:]))

    def text(self) -> str:
        """Return the text of the INFO message: the chips and the numbers of registers."""
        import numpy as np

        keys = ["-".join(map(str, chip)) for chip in self.chips[[0, -1]].tolist()]
        which = f"chip {keys[0]}" if len(self.chips) == 1 else f"{len(self.chips)} chips, {keys[0]} to {keys[1]}"
        sent, read = (int(np.count_nonzero(self.known & bit)) for bit in (SENT, READ))
        differ = int(np.count_nonzero(self.different))
        return f"Configuration of {which}: {sent} registers sent, {read} read back, {differ} different"

    def differences(self) -> str:
        """Name the registers whose value read differs from the value sent, in one line; "" if there are none."""
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
    """Unpack Configs; ProtocolError if they are malformed."""
    import numpy as np

    n, rest = divmod(len(found.chips), 3)
    size = 3 * n * REGISTERS
    if rest or not 0 < n <= _PIECE:
        raise ProtocolError(f"configurations: expected 1 to {_PIECE} chips of 3 bytes, found {len(found.chips)} bytes")
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(found.registers, size)
        more = decoder.decompress(decoder.unconsumed_tail, 1)  # also checks the checksum, which comes last
    except zlib.error as error:
        raise ProtocolError(f"configurations: {error}") from None
    if len(data) != size or more or not decoder.eof:
        raise ProtocolError(f"configurations: expected {size} bytes for {n} chips, found {len(data)} or more")
    sent, read, known = np.frombuffer(data, np.uint8).reshape(3, n, REGISTERS)
    return Configurations(found.asic, np.frombuffer(found.chips, np.uint8).reshape(n, 3), sent, read, known)
