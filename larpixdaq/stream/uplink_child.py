"""The program of the child process that publishes a producer's blocks to NATS JetStream, started by uplink.Uplink.

One message is on its way at a time, with all the blocks that fit into it, and the brokers take it only at the end of
the stream that this process knows: it names the sequence of the message before it. So nothing is doubled, nothing comes
in another order, and two processes never both publish. When the acknowledgement fails or does not come, as after the
death of the stream's leader, nobody knows whether the message is stored: then the end of the stream is read, and
everything after it is published again.

It is started by its path, so that neither the working directory nor this folder can hide a module of a library.
"""

from __future__ import annotations

import os
import sys

if __spec__ is None:
    # At the end of the path, so that an installed package is preferred.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    del sys.path[0]

import asyncio
import contextlib
import ctypes
import functools
import itertools
import logging
import math
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from larpixdaq import schema
from larpixdaq.errors import BrokerError, LarpixDaqError, ProtocolError
from larpixdaq.keys.curve import KeyPair
from larpixdaq.protocol.packed_rows import MIN_ROWS, PackedRows, RowPacker
from larpixdaq.protocol.reports import UplinkStatus
from larpixdaq.protocol.stream import Block, BlockOrigin, End, Position, pack
from larpixdaq.protocol.stream_messages import (
    EXPECTED_SEQUENCE,
    ID,
    POSITIONS,
    Identity,
    cut,
    encode,
    pack_positions,
    unpack_positions,
)
from larpixdaq.runtime.child_process import parent_socket
from larpixdaq.runtime.record_file import crc32
from larpixdaq.runtime.units import size
from larpixdaq.stream import jetstream
from larpixdaq.stream.subscriber import Consumer, Received
from larpixdaq.stream.uplink import LIMIT, REPORT_INTERVAL, Line, Report, Setup, setup_decoder
from larpixdaq.stream.uplink import encode as encode_report

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

log = logging.getLogger("larpixdaq.stream.uplink")
#: Maximum bytes of frames that wait to be published. The producer's window is smaller, but does not count headers.
MAX_WAITING: Final = 64 << 20
#: Maximum blocks that are packed at a time.
BATCH: Final = 8
#: Bytes of a message from which on its blocks are acknowledged to the producer at once.
ACK_BYTES: Final = 64 << 10
#: Seconds without an acknowledgement after which the end of the stream is read, which does no harm if it is too early.
ACK_LIMIT: Final = 3.0
#: Seconds for which the end of the stream is asked for on one connection, before another broker is tried.
SYNCHRONIZE_LIMIT: Final = 4.0
#: Seconds between two attempts after a failure, and between two looks at the fill of the stream.
RETRY_INTERVAL: Final = 0.5
LOOK_INTERVAL: Final = 5.0
#: Fraction of the stream's size from which on acknowledged messages are removed, and down to which.
HIGH, LOW = 0.8, 0.6
#: Minimum for the brokers' max_payload, and bytes of it that a message's headers may need.
MIN_PAYLOAD: Final = 64 << 10
HEADERS: Final = 4 << 10
#: Maximum number of messages of other programs at the end of the stream.
MAX_FOREIGN: Final = 100
#: Maximum number of origins whose positions are kept.
MAX_KEPT: Final = 64
#: Parameters of glibc's mallopt(), and freed bytes that the process keeps for the next messages.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_MEMORY: Final = 32 << 20
Origin = tuple[int, int]  # run and epoch


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _PubAck(msgspec.Struct):
    seq: Annotated[int, Meta(ge=0)] = 0
    error: _Error | None = None


class Frame(NamedTuple):
    """An encoded frame that waits to be published, and its sequences."""

    origin: Origin
    first: int
    following: int
    data: bytes


class _OwnName:
    """Says that this process always has its name, because only its producer starts another one after its end."""

    heard = confirmed = math.inf

    def __init__(self, key_pair: KeyPair | None) -> None:
        self.key_pair = key_pair


class Encoder:
    """Encodes the frames of a subscription, in a thread of its own: packing takes most of this process's time."""

    def __init__(self) -> None:
        self._packer = RowPacker()
        self._packed = 0
        self._requested: set[tuple[Origin, int]] = set()  # blocks whose rows were requested again

    def encode(self, batch: list[Received]) -> tuple[list[Frame], Block | None]:
        """Encode blocks and end records. Returns those before the first block whose rows must be requested again, and
        that block."""
        frames: list[Frame] = []
        for _, frame, payload, packed in batch:
            assert isinstance(frame, Block | End)
            origin = frame.run, frame.epoch
            parts: tuple[Any, ...] = (pack(frame),)
            rows: tuple[Any, ...] | None
            if isinstance(frame, Block):
                try:
                    rows, intact = self._rows(frame, payload, packed)
                except ProtocolError as error:
                    log.warning("block %d of run %d: %s", frame.sequence, frame.run, error)
                    rows, intact = None, False
                if not intact and (origin, frame.sequence) not in self._requested:
                    self._requested.add((origin, frame.sequence))
                    return frames, frame
                if rows is None:
                    log.error("block %d of run %d: its rows are damaged: it is missing", frame.sequence, frame.run)
                    continue
                parts += rows  # if they are wrong again, the storages judge
            frames.append(Frame(origin, frame.following - 1, frame.following, encode(parts)))
        return frames, None

    def _rows(self, block: Block, payload: Any, packed: PackedRows | None) -> tuple[tuple[Any, ...], bool]:
        """Return the further parts of a block, and whether they are the rows that the producer made: those in its ring
        may be overwritten meanwhile. ProtocolError for damaged packed rows."""
        layout = schema.layout(block.layout)
        if packed is not None:
            payload = packed.unpack(block.rows, layout).data.cast("B")
        if not len(payload):
            return (), True
        if block.rows < MIN_ROWS:
            rows = bytes(payload)
            return (rows,), crc32(rows) == block.crc32
        self._packed += 1
        parts = self._packer.pack(0, self._packed, payload, layout, lambda: True)
        assert parts is not None
        # Of the rows after they were packed: rows that are overwritten meanwhile never fit again.
        found = PackedRows.parse(memoryview(parts[0]), memoryview(parts[1]), block.rows)
        return parts, found.rows_crc32 == block.crc32


class UplinkProcess:
    """Publishes the blocks of one producer. Everything happens in one asyncio loop, but packing."""

    def __init__(self, setup: Setup, sock: socket.socket) -> None:
        self._setup, self._sock = setup, sock
        self._stream = jetstream.stream_name(setup.producer)
        self.status = UplinkStatus(stream=self._stream, brokers=str(setup.brokers))
        self._encoder = Encoder()
        self._thread = ThreadPoolExecutor(1, "packing")
        self._news = asyncio.Event()  # frames, or the end of the connection
        self._room = asyncio.Event()  # frames have gone
        self._made = False  # the stream exists, with the right settings
        self._frames: deque[Frame] = deque()  # that the brokers have not acknowledged, the oldest first
        self._waiting_bytes = 0
        self._sent = 0  # number of messages so far
        #: The answer to the last message, while it is awaited; its result is None when the connection has ended.
        self._answer: asyncio.Future[Msg | None] | None = None
        self._lost = ""  # why the connection has ended
        self._last_broker = ""  # address
        #: Next sequences by origin: received; and stored by the brokers.
        self._received: dict[Origin, int] = {}
        self._stored: dict[Origin, int] = {}
        self._stored_sequence = 0  # of the last message in the stream
        self._foreign: set[int] = set()  # sequences of messages of other programs
        self._failures = 0  # failures since the last acknowledgement
        self._warned = ""
        self._consumer = Consumer(
            setup.name, setup.session, "all", core=_OwnName(setup.keys), positions=self._positions
        )
        self._consumer.rest(True)
        self._consumer.connect({setup.producer: setup.endpoint})

    async def run(self) -> None:
        """Work until the producer closes the socket."""
        parent = asyncio.create_task(self._await_end())
        tasks = [
            parent,
            *(asyncio.create_task(task) for task in (self._read(), self._publish_always(), self._report())),
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what has ended it

    # The producer's process

    async def _await_end(self) -> None:
        while await asyncio.get_running_loop().sock_recv(self._sock, LIMIT):
            pass

    async def _report(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._sock.send(encode_report(Report(self.status)))
            await asyncio.sleep(REPORT_INTERVAL)

    # From the producer

    def _positions(self) -> list[Position]:
        """Return the positions of what the brokers have. Called by the stream's thread."""
        return [
            Position(run, self._setup.producer, epoch, following) for (run, epoch), following in self._stored.items()
        ]

    async def _read(self) -> None:
        """Take frames from the producer and encode them, the next batch while the last one is taken over."""
        loop = asyncio.get_running_loop()
        before: asyncio.Future[tuple[list[Frame], Block | None]] | None = None
        while True:
            batch = self._next_batch()
            after = loop.run_in_executor(self._thread, self._encoder.encode, batch) if batch else None
            if before is not None:
                frames, damaged = await before
                for frame in frames:
                    self._take(frame)
                self._news.set()
                if damaged is not None:
                    log.warning(
                        "block %d of run %d: its rows do not fit their CRC-32: requested again",
                        damaged.sequence, damaged.run,
                    )  # fmt: skip
                    if after is not None:
                        await after  # and nothing of it is taken, because it would follow a gap
                        after = None
                    self._consumer.resubscribe(send_rows=True)
            elif after is None:
                await _readable(self._consumer.fileno())
            before = after
            while self._waiting_bytes > MAX_WAITING:
                self._room.clear()
                await self._room.wait()

    def _next_batch(self) -> list[Received]:
        batch: list[Received] = []
        while len(batch) < BATCH and (received := self._consumer.next()) is not None:
            if isinstance(received[1], Block | End):
                batch.append(received)
        return batch

    def _take(self, frame: Frame) -> None:
        if frame.following <= self._received.get(frame.origin, 0):  # it came again
            if frame.following <= self._stored.get(frame.origin, 0):
                self._acknowledge(frame.origin)
            return
        self._received[frame.origin] = frame.following
        _limit(self._received)
        self._frames.append(frame)
        self._waiting_bytes += len(frame.data)

    def _acknowledge(self, origin: Origin, *, at_once: bool = False) -> None:
        """Tell the producer what the brokers have."""
        run, epoch = origin
        self._consumer.acknowledge(BlockOrigin(run, self._setup.producer, epoch), self._stored[origin], at_once=at_once)

    def _drop_frames(self, n: int) -> None:
        for _ in range(n):
            self._waiting_bytes -= len(self._frames.popleft().data)
        self._room.set()

    # To the brokers

    async def _publish_always(self) -> None:
        """Connect, publish, and begin anew whenever that fails."""
        from nats.errors import Error

        while True:
            client = None
            try:
                self._lost = ""
                client = await jetstream.connect(
                    self._setup.brokers, self._setup.name, self._note_lost, avoid=self._last_broker
                )
                self._last_broker = jetstream.broker_of(client)
                await self._serve(client)
            except (LarpixDaqError, Error, OSError, asyncio.TimeoutError) as error:
                self._say(self._lost or jetstream.describe(error))
            finally:
                self.status.connected = False
                if client is not None:
                    await jetstream.close(client)
            await asyncio.sleep(RETRY_INTERVAL)

    def _note_lost(self, reason: str) -> None:
        self._lost = f"the connection to the brokers was lost: {reason}"
        self._news.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)

    def _say(self, problem: str) -> None:
        """Put a problem into the status, and log it once."""
        self.status.problem = problem
        if problem != self._warned:
            self._warned = problem
            log.warning("%s: %s; ring and spool hold the blocks", self._stream, problem)

    def _say_right(self) -> None:
        self.status.connected, self.status.problem = True, ""
        if self._warned:
            self._warned = ""
            log.info("%s: the brokers take blocks again", self._stream)

    async def _serve(self, client: Client) -> None:
        """Publish over a connection. BrokerError or ConfigError when that is not possible any more."""
        if client.max_payload < MIN_PAYLOAD:
            raise BrokerError(
                f"the brokers take messages of {size(client.max_payload)} only, expected max_payload of at least "
                f"{size(MIN_PAYLOAD)}"
            )
        context = client.jetstream(timeout=jetstream.API_LIMIT)
        if not self._made:
            await jetstream.ensure_stream(context, self._setup.producer, self._setup.settings, SYNCHRONIZE_LIMIT)
            self._made = True
        inbox = client.new_inbox()
        await client.subscribe(f"{inbox}.*", cb=self._take_answer)
        while True:
            await self._synchronize(context)
            code, reason = await self._publish(client, context, inbox)
            full = code == jetstream.STREAM_FULL and "is full" in reason  # else its disk is, or has failed
            stale = code in (jetstream.WRONG_LAST_SEQUENCE, jetstream.ID_IN_PROCESS)
            self._failures += 1
            if stale and self._failures < 4:  # as after an election, or when a message came late
                continue
            self.status.connected = False
            if stale:
                reason = f"another process publishes to the stream ({reason})"
            if (code == 0 or stale) and self._failures > 1:  # this broker may be cut off from the others
                raise BrokerError(reason)
            if full:
                reason = await self._make_room(context, LOW)
                if not reason:
                    continue
            self._say(reason)
            await asyncio.sleep(RETRY_INTERVAL)

    async def _synchronize(self, context: JetStreamContext) -> None:
        """Read the end of the stream, and drop the frames that are stored. BrokerError if its leader is cut off, which
        may not know the last messages."""
        try:
            info = await jetstream.retried(lambda: jetstream.stream_info(context, self._stream), SYNCHRONIZE_LIMIT)
        except BrokerError as error:
            if error.code == jetstream.NO_STREAM:
                self._made = False  # somebody has removed it
            raise
        sequence = info.state.last_seq
        stored = await self._read_positions(context, info.state.first_seq, sequence) if info.state.messages else {}
        if (lost := self._stored_sequence - sequence) > 0:
            self.status.lost_messages += lost
            log.error(
                "%s: the brokers have lost %d messages that they had acknowledged: the stream ends at %d, expected %d; "
                "storages that had not read them miss their blocks",
                self._stream, lost, sequence, self._stored_sequence,
            )  # fmt: skip
        self._stored_sequence = sequence
        for origin, following in stored.items():
            self._stored = {**self._stored, origin: following}
            self._received[origin] = max(self._received.get(origin, 0), following)
            self._acknowledge(origin)
        n = 0
        while n < len(self._frames) and self._frames[n].following <= self._stored.get(self._frames[n].origin, 0):
            n += 1
        self._drop_frames(n)
        self._note_fill(info.config.max_bytes, info.state.bytes)
        if not self._failures or not self._frames:
            self._say_right()

    async def _read_positions(self, context: JetStreamContext, first: int, last: int) -> dict[Origin, int]:
        """Return the positions at the end of the stream, from its newest message that an uplink has published."""
        for sequence in range(last, max(first, last - MAX_FOREIGN + 1) - 1, -1):
            message = await jetstream.retried(
                functools.partial(context.get_msg, self._stream, seq=sequence), SYNCHRONIZE_LIMIT
            )
            headers = message.headers or {}
            try:
                identity = Identity.parse(headers.get(ID, ""))
                positions = unpack_positions(headers.get(POSITIONS, ""))
            except ProtocolError:
                if sequence not in self._foreign:
                    self._foreign.add(sequence)
                    log.error("%s: message %d is of another program: it is ignored", self._stream, sequence)
                continue
            return positions | {(identity.run, identity.epoch): identity.next}
        raise BrokerError(f"stream {self._stream}: its last messages are of another program")

    async def _publish(self, client: Client, context: JetStreamContext, inbox: str) -> tuple[int, str]:
        """Publish until a message fails; returns JetStream's error code or 0, and the reason."""
        look_at = time.monotonic() + LOOK_INTERVAL
        while True:
            self._news.clear()
            if self._lost:
                raise BrokerError(self._lost)
            now = time.monotonic()
            if now >= look_at:
                look_at = now + LOOK_INTERVAL
                await self._look(context)
            if not self._frames:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), max(0.0, look_at - now))
            elif failure := await self._publish_next(client, inbox):
                return failure

    async def _publish_next(self, client: Client, inbox: str) -> tuple[int, str] | None:
        """Publish the oldest frames: as many of one origin as fit into a message, or one in pieces.

        Returns why that failed, None if the brokers have them.
        """
        most = client.max_payload // 2
        first = last = self._frames[0]
        if len(first.data) > client.max_payload - HEADERS:
            attempt = secrets.token_hex(4)
            *pieces, (end, rest) = cut(first.data, most)
            for offset, data in pieces:
                identity = Identity(*first.origin, first.first, first.first, attempt, offset)
                if failure := await self._publish_message(client, inbox, identity, data):
                    return failure
            identity = Identity(*first.origin, first.first, first.following, attempt, end)
            failure = await self._publish_message(client, inbox, identity, rest)
            frames = 1
        else:
            joined: list[bytes] = []
            total = 0
            for frame in self._frames:
                total += len(frame.data)
                if joined and (frame.origin != first.origin or total > most):
                    break
                joined.append(frame.data)
                last = frame
            frames = len(joined)
            identity = Identity(*first.origin, first.first, last.following)
            failure = await self._publish_message(client, inbox, identity, b"".join(joined))
        if failure is None:
            self._take_over(first.origin, frames)
        return failure

    async def _publish_message(
        self, client: Client, inbox: str, identity: Identity, data: bytes
    ) -> tuple[int, str] | None:
        """Publish one message at the end of the stream. Returns why that failed, None if the brokers have it."""
        from nats.errors import Error

        origin = identity.run, identity.epoch
        others = {other: following for other, following in self._stored.items() if other != origin}
        headers = {ID: str(identity), EXPECTED_SEQUENCE: str(self._stored_sequence)}
        if others:
            headers[POSITIONS] = pack_positions(others)
        self.status.messages += 1
        self.status.bytes += len(data)
        self._sent += 1
        self._answer = asyncio.get_running_loop().create_future()
        try:
            await client.publish(
                jetstream.subject(self._setup.producer, identity.run),
                data,
                reply=f"{inbox}.{self._sent}",
                headers=headers,
            )
            answer = await asyncio.wait_for(self._answer, ACK_LIMIT)
        except asyncio.TimeoutError:  # also that of nats-py
            return 0, f"no acknowledgement of the brokers for {ACK_LIMIT:g} s"
        except (Error, OSError) as error:
            return 0, self._lost or jetstream.describe(error)
        finally:
            self._answer = None
        if answer is None:
            raise BrokerError(self._lost)
        if failure := self._refusal(answer, identity):
            return failure
        self._failures = 0
        self._stored_sequence += 1
        if not self.status.connected:
            self._say_right()
        self.status.acknowledged_messages += 1
        self.status.acknowledged_bytes += len(data)
        return None

    async def _take_answer(self, found: Msg) -> None:
        """Take the brokers' answer to a message."""
        number = found.subject.rpartition(".")[2]
        if number == str(self._sent) and self._answer is not None and not self._answer.done():
            self._answer.set_result(found)

    def _refusal(self, found: Msg, identity: Identity) -> tuple[int, str] | None:
        """Return JetStream's error code or 0, and the reason; None for an acknowledgement."""
        if (found.headers or {}).get("Status") == "503":
            return 0, "no broker takes the messages, because the stream has no leader or does not exist"
        try:
            answer = msgspec.json.decode(found.data, type=_PubAck)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return 0, f"unexpected answer of the brokers: {error}"
        if answer.error is not None:
            code = answer.error.err_code
            return code, jetstream.meaning(code, answer.error.description or f"code {answer.error.code}")
        if answer.seq != (expected := self._stored_sequence + 1):
            return (
                jetstream.WRONG_LAST_SEQUENCE,
                f"message {identity} has the sequence {answer.seq}, expected {expected}",
            )
        return None

    def _take_over(self, origin: Origin, n: int) -> None:
        """Take note that the brokers have the oldest `n` frames, of this origin."""
        size = sum(len(frame.data) for frame in itertools.islice(self._frames, n))
        following = self._frames[n - 1].following
        self._drop_frames(n)
        # Another dictionary, because the stream's thread reads this one; the newest origin is the last one.
        stored = {other: position for other, position in self._stored.items() if other != origin}
        stored[origin] = following
        _limit(stored)
        self._stored = stored
        self._acknowledge(origin, at_once=size > ACK_BYTES)

    # Room in the stream

    def _note_fill(self, limit: int | None, used: int) -> None:
        self.status.fill = round(used / limit, 4) if limit and limit > 0 else None

    async def _look(self, context: JetStreamContext) -> None:
        """Look at the fill of the stream, and make room in time."""
        with contextlib.suppress(BrokerError):
            info = await jetstream.retried(lambda: context.stream_info(self._stream), 0.0)
            self._note_fill(info.config.max_bytes, info.state.bytes)
            if self.status.fill is not None and self.status.fill > HIGH:
                await self._make_room(context, LOW)

    async def _make_room(self, context: JetStreamContext, target: float) -> str:
        """Remove the oldest messages that every storage has acknowledged, until the stream is filled to `target`.

        Returns why there is no room.
        """
        try:
            info = await jetstream.retried(lambda: context.stream_info(self._stream), 0.0)
            self._note_fill(info.config.max_bytes, info.state.bytes)
            storages = {
                consumer.config.durable_name: consumer.ack_floor.stream_seq if consumer.ack_floor is not None else 0
                for consumer in await jetstream.retried(lambda: jetstream.all_consumers(context, self._stream), 0.0)
                if consumer.config.durable_name
            }
            if not storages:
                return f"the stream is full ({size(info.state.bytes)}), and no storage reads it"
            slowest = min(storages, key=lambda name: storages[name])
            done = min(storages[slowest], info.state.last_seq - 1)  # the last one tells the positions
            if done < info.state.first_seq:
                return f"the stream is full ({size(info.state.bytes)}), and the storage {slowest} has none of it"
            fill = self.status.fill or 1.0
            share = max(0.0, 1 - target / fill) if fill > target else 0.0
            wanted = info.state.first_seq + math.ceil(share * info.state.messages)
            await jetstream.retried(
                lambda: context.purge_stream(self._stream, seq=min(done + 1, max(wanted, info.state.first_seq + 1))),
                0.0,
            )
        except BrokerError as error:
            return str(error)
        return ""


def _limit(positions: dict[Origin, int]) -> None:
    while len(positions) > MAX_KEPT:
        del positions[next(iter(positions))]


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _readable(descriptor: int) -> None:
    """Wait until a descriptor is readable."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


class _ToParent(logging.Handler):
    """Sends log records to the producer, which passes them on."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # its queue is full, or it has ended
            self._sock.send(encode_report(Line(record.levelno, self.format(record)[: LIMIT // 4])))


def _keep_memory() -> None:
    """Let the allocator keep the memory of messages. Otherwise it comes from the system for each of them, which takes a
    quarter of this process's time."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _KEPT_MEMORY)
        mallopt(_TRIM_THRESHOLD, _KEPT_MEMORY)


def main(arguments: Iterable[str]) -> None:
    (number,) = arguments
    sock = parent_socket(number)
    data = sock.recv(LIMIT)
    if not data:  # the producer has ended
        return
    setup = setup_decoder.decode(data)
    _keep_memory()
    sock.setblocking(False)
    sys.setswitchinterval(0.0005)  # because three threads take turns within the time of a block
    logger = logging.getLogger("larpixdaq")
    logger.setLevel(logging.INFO)
    logger.addHandler(_ToParent(sock))
    logger.propagate = False
    status = 0
    try:

        async def run() -> None:
            await UplinkProcess(setup, sock).run()

        asyncio.run(run())
    except ConnectionError:  # the producer has ended
        pass
    except BaseException:
        log.exception("the uplink has failed")
        status = 1
    os._exit(status)  # without waiting for threads


if __name__ == "__main__":
    main(sys.argv[1:])
