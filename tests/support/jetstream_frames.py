"""Reads the frames of a run out of a JetStream stream, and checks that each is there once and in order."""

from __future__ import annotations

from typing import Any

import numpy as np
from brokers import Brokers

from larpixdaq import schema
from larpixdaq.protocol.packed_rows import PackedRows
from larpixdaq.protocol.stream import End
from larpixdaq.protocol.stream_messages import ID, Frame, Identity, Unpacker
from larpixdaq.runtime.record_file import crc32
from larpixdaq.stream import jetstream

PRODUCER = "board"


def frames_of(cluster: Brokers, run: int = 1, producer: str = PRODUCER) -> list[Frame]:
    """Return the frames of a run in the stream, whose messages are checked."""

    async def read(client: Any) -> list[Any]:
        context = client.jetstream()
        name = jetstream.stream_name(producer)
        found = []
        sequence = 0
        info = await context.stream_info(name)
        while sequence < info.state.last_seq:
            message = await context.get_msg(
                jetstream.stream_name(producer), seq=sequence + 1, subject="larpixdaq.>", next=True
            )
            sequence = message.seq
            found.append(message)
        return found

    frames: list[Frame] = []
    unpacker = Unpacker(producer)
    for message in cluster.call(read):
        of, number = jetstream.parse_subject(message.subject)
        assert of == producer
        identity = Identity.parse(message.headers[ID])
        assert identity.run == number
        if number != run:
            continue
        new = unpacker.unpack(message.data)
        assert not new or new[-1].frame.following == identity.next
        assert not new or identity.first == new[0].frame.following - 1
        frames += new
    return frames


def check(frames: list[Frame], *, ended: bool = True) -> list[int]:
    """Check that the frames of an epoch are whole, in order, not doubled and without a gap. Returns the timestamps of
    their rows."""
    stamps: list[int] = []
    following = 0
    for frame, parts in frames:
        assert frame.following == following + 1
        following = frame.following
        if isinstance(frame, End):
            assert following == len(frames)
            continue
        layout = schema.layout(frame.layout)
        if len(parts) == 2:
            packed = PackedRows.parse(*parts, frame.rows)
            assert packed.is_intact()
            assert packed.rows_crc32 == frame.crc32
            rows = packed.unpack(frame.rows, layout)
        else:
            assert crc32(parts[0]) == frame.crc32
            rows = np.frombuffer(parts[0], layout.dtype)
        assert len(rows) == frame.rows
        stamps += rows["timestamp"][rows["packet_type"] != 5].tolist()
    assert isinstance(frames[-1].frame, End) == ended
    return stamps
