"""A producer's stream at real brokers, written by hand in place of the producer, and what brokers know of readers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from brokers import Brokers
from file_builder import Feed, random_rows

from larpixdaq.protocol import stream, stream_messages
from larpixdaq.protocol.packed_rows import MIN_ROWS, RowPacker
from larpixdaq.protocol.stream_messages import Identity
from larpixdaq.stream import jetstream
from larpixdaq.stream.downlink import Downlink
from larpixdaq.stream.jetstream import Settings, parse_servers

PRODUCER = "LArPix board"


def brokers_of(brokers: Brokers) -> jetstream.Brokers:
    return jetstream.Brokers(parse_servers(brokers.urls))


class StreamLog:
    """The stream of a producer. Every method waits until the brokers have what it sends."""

    def __init__(self, brokers: Brokers, producer: str = PRODUCER) -> None:
        self.brokers, self.producer = brokers, producer
        self.name = jetstream.stream_name(producer)
        settings = Settings(min(3, len(brokers)), 1 << 30, 3600.0)
        brokers.call(lambda client: jetstream.ensure_stream(client.jetstream(), producer, settings))

    def publish(self, feed: Feed, *messages: Sequence[Any]) -> None:
        """Send messages of frames: blocks with their rows, as a Feed makes them, and end records."""
        coded = []
        for frames in messages:
            heads = [frame if isinstance(frame, stream.End) else frame[0] for frame in frames]
            data = b"".join(stream_messages.encode(parts(frame)) for frame in frames)
            first, last = heads[0], heads[-1]
            name = Identity(first.run, first.epoch, first.following - 1, last.following)
            coded.append((jetstream.subject(self.producer, first.run), data, {stream_messages.ID: str(name)}))
        self.send(coded)

    def send(self, messages: Iterable[tuple[str, bytes, dict[str, str]]]) -> None:
        async def send(client: Any) -> None:
            for subject, data, headers in messages:
                await client.jetstream().publish(subject, data, headers=headers)

        self.brokers.call(send)

    def damaged(self, run: int, data: bytes) -> None:
        self.send([(jetstream.subject(self.producer, run), data, {})])

    def floor(self, link: Downlink) -> int:
        """Return the message up to which a storage has acknowledged all; 0 for none."""

        async def ask(client: Any) -> int:
            infos = await client.jetstream().consumers_info(self.name)
            return min((info.ack_floor.stream_seq for info in infos if link.is_own(info.name)), default=0)

        found: int = self.brokers.call(ask)
        return found

    def consumers(self) -> list[str]:
        """Return the names of the durable consumers."""

        async def ask(client: Any) -> list[str]:
            return [
                info.name for info in await client.jetstream().consumers_info(self.name) if info.config.durable_name
            ]

        found: list[str] = self.brokers.call(ask)
        return found

    def purge(self, below: int) -> None:
        self.brokers.call(lambda client: client.jetstream().purge_stream(self.name, seq=below))


def parts(frame: Any) -> list[bytes]:
    """Return the parts of a frame, as a publisher sends them to a consumer that packs."""
    if isinstance(frame, stream.End):
        return [stream.pack(frame)]
    block, rows = frame
    data = rows.view(np.uint8).tobytes()
    if len(rows) < MIN_ROWS:
        return [stream.pack(block), data]
    packed = RowPacker().pack(1, 1, data, _layout(block), lambda: True)
    assert packed is not None
    return [stream.pack(block), *packed]


def _layout(block: stream.Block) -> Any:
    from larpixdaq import schema

    return schema.layout(block.layout)


def blocks(feed: Feed, *sizes: int, seed: int = 1) -> list[Any]:
    """Return blocks of these numbers of rows."""
    rng = np.random.default_rng(seed)
    return [feed.block(random_rows(rng, size)) for size in sizes]
