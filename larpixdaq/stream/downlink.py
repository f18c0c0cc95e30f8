"""The consumers' side of the stream over NATS JetStream: a thread that reads the streams of all producers.

A Downlink has the interface of stream.Consumer, and three modes. "all", for a storage: each message, in its order,
acknowledged to the brokers when the storage has acknowledged all of its frames. "latest", for a monitor: the newest
messages, as many as it has time for. "run", for a late analysis: all messages of one past run.

A storage has a durable consumer at the brokers for each producer and each directory, so that the position there is that
of the files in this directory. The rule of the files (run, producer, epoch, sequence) decides what is stored and what
is missing; the position only says where to begin. So a reader never takes a message after one that it has not taken:
when one is missing it begins again after the last acknowledged one, with a new consumer, since the brokers send again
in no order.

A run that has no file in the directory when it is prepared is read from its first message in the stream. That makes the
files of a storage complete that takes over from another one on another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import re
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from larpixdaq import schema
from larpixdaq.errors import BrokerError, LarpixDaqError, ProtocolError
from larpixdaq.protocol.packed_rows import PackedRows
from larpixdaq.protocol.stream import Block, BlockOrigin, End
from larpixdaq.protocol.stream_messages import ID, Unpacker
from larpixdaq.runtime.event_loop import Waker
from larpixdaq.stream import jetstream
from larpixdaq.stream.jetstream import Brokers
from larpixdaq.stream.publisher import Sample
from larpixdaq.stream.subscriber import Received

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext
    from nats.js.api import ConsumerConfig, StreamInfo

log = logging.getLogger(__name__)
#: Maximum number of messages of a producer that are requested, or wait for the process's loop.
WINDOW: Final = 32
#: Bytes of a producer that wait for the process's loop, above which no more messages are requested.
MAX_WAITING: Final = 32 << 20
#: Maximum number of messages that the brokers send without acknowledgement. A storage that writes nothing, because its
#: disk is full, reads no further.
MAX_UNACKNOWLEDGED: Final = 1024
#: Seconds between two signs of life of a consumer at the brokers, and without one after which it is made anew.
HEARTBEAT: Final = 1.0
SILENT_AFTER: Final = 3.0
#: Seconds without a message between two looks whether the stream has further ones, which then should have come.
LOOK_INTERVAL: Final = 2.0
#: Seconds after which a request for messages that found none is made again.
REQUEST_LIMIT: Final = 30.0
#: Seconds after which the brokers would send a message without acknowledgement again. A reader begins anew instead.
ACK_WAIT: Final = 3600.0
#: Seconds after which the brokers remove the consumer of a monitor or an analysis that has gone.
FORGOTTEN_AFTER: Final = 30.0
#: The same for that of a storage: it would keep the stream from making room.
ABANDONED_AFTER: Final = 7 * 24 * 3600.0
#: Seconds between an acknowledgement of the storage and that to the brokers.
ACK_DELAY: Final = 0.05
#: Seconds between two attempts to connect to the brokers, or to subscribe.
RETRY_INTERVAL: Final = 0.5
#: Failures to subscribe after which another broker is tried, because this one may be cut off from the others; then
#: after twice as many each time, because all streams are read anew from there.
MAX_FAILURES: Final = 2
#: Seconds for which a producer that has registered may be without a stream at the brokers, which it makes itself.
MISSING_AFTER: Final = 10.0
#: Seconds between two looks for consumers that were left behind.
CLEANING_INTERVAL: Final = 30.0
#: Maximum number of blocks that wait for a monitor; further ones are skipped.
LATEST_BLOCKS: Final = 32
#: Messages behind the newest one from which on a monitor begins again at the newest.
LATEST_BEHIND: Final = 64
#: Seconds for which a run may be unknown before it counts as prepared without this storage: the core prepares it soon
#: after the registration.
FOREIGN_AFTER: Final = 2.0
#: Maximum number of origins whose acknowledged positions are remembered.
_ORIGINS: Final = 4096
#: The end of the name of a durable consumer: after the storage's token, the place of the files and an attempt.
_PLACE: Final = "_[0-9a-f]{8}"
_ATTEMPT: Final = "(_[0-9a-f]*)?"


class _Lost(Exception):
    """The consumer at the brokers must be made anew."""


class _Queued(NamedTuple):
    """A frame that waits for the process's loop. `size`: bytes; `last`: the last frame of its message."""

    reader: StreamReader
    received: Received
    size: int
    last: bool


class _Unacknowledged(NamedTuple):
    """A message whose frames end at `following` of `origin`; None: it has no frame that could be stored.

    `reply`: the subject of its acknowledgement, "" if it came from a previous consumer.
    """

    sequence: int
    reply: str
    origin: BlockOrigin | None
    following: int


class Downlink:
    """Reads the streams of producers at the brokers. All methods belong to the process's loop.

    `mode` is "all", "latest" or "run". Mode "all": `directory` is that of the files; `newest_run()` returns the newest
    run with files there (0: none), and `has_run()` whether a run is open or has files there: only frames of such runs
    are handed over. `holds()` returns whether the storage has the lease of its name: without it nothing is
    acknowledged, and no consumer made. All three are also called in the thread. Mode "run": `run` is the run to read.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        brokers: Brokers,
        *,
        directory: Path | None = None,
        newest_run: Callable[[], int] = int,
        has_run: Callable[[int], bool] | None = None,
        holds: Callable[[], bool] = lambda: True,
        run: int = 0,
    ) -> None:
        self.name, self.mode, self.run = name, mode, run
        self.session = ""  # as in stream.Consumer; the brokers need none
        self.newest_run, self.holds = newest_run, holds
        #: The beginning of the names of the durable consumers for these files.
        self.durable = "" if directory is None else durable_name(name, directory)
        self.sample_every = 1.0
        self.acknowledged: dict[BlockOrigin, int] = {}  # of the thread
        self._brokers = brokers
        self._has_run = has_run
        self._known: dict[int, bool] = {}  # answers of has_run()
        #: Run and producer of frames that were not handed over -> when they are named, monotonic.
        self._foreign: dict[tuple[int, str], float] = {}
        self._readers: dict[str, StreamReader] = {}  # of the thread
        #: The producers of the last connect() -> since when they are among them, monotonic. Of the thread.
        self.present: dict[str, float] = {}
        self._queue: deque[_Queued] = deque()
        #: Restarts that the loop has asked for, and that the thread has done. In between the loop takes no frame.
        self._restarts = self._restarted = 0
        self._lock = threading.Lock()
        self._new: dict[BlockOrigin, int] = {}  # acknowledgements for the thread
        self._arrived = Waker()
        self._problem = ""
        self._warned = ""
        self._loop = asyncio.new_event_loop()
        self._connection: asyncio.Future[Client] | None = None
        self._broker = ""  # address of the last one
        self._ended = asyncio.Event()  # of the present connection
        self._knows_streams = False  # those with a position of this storage
        self._closing = asyncio.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"stream of {name}", daemon=True)

    # Called by the process's loop

    def connect(self, producers: Iterable[str]) -> None:
        """Read the streams of these producers, which are there now, also before they exist, and those of earlier calls.

        The first call starts the thread.
        """
        if self._thread.ident is None:
            self._thread.start()
        self._post(self._set_present, list(producers))

    def begin(self, run: int, producers: Iterable[str]) -> None:
        """Mode "all": read this run, which has no file yet, from its first message."""
        self._restarts += 1
        self._known.clear()
        self._foreign = {key: due for key, due in self._foreign.items() if key[0] != run}
        self._post(self._add, list(producers))
        self._post(self._restart, run)

    def fileno(self) -> int:
        """Polls readable while next() has something."""
        return self._arrived.fileno()

    @property
    def queued(self) -> int:
        """The number of frames that wait for next()."""
        return len(self._queue)

    @property
    def problem(self) -> str:
        """Why nothing can be read now, in one line; empty when all is well. Any thread may ask."""
        return self._problem or next((text for reader in list(self._readers.values()) if (text := reader.problem)), "")

    @property
    def is_complete(self) -> bool:
        """Mode "run": whether next() has returned all that the streams had when they were opened."""
        readers = list(self._readers.values())
        return bool(readers) and all(reader.is_complete for reader in readers) and not self._queue

    def processor_time(self) -> float:
        """Return the processor time (s) of the thread so far."""
        ident = self._thread.ident
        return 0.0 if ident is None else time.clock_gettime(time.pthread_getcpuclockid(ident))

    def next(self) -> Received | None:
        """Return the oldest waiting frame (Block or End) with its producer and rows, or None."""
        while self._restarts == self._restarted:
            if not self._queue:
                self._arrived.clear()  # before the second look at the queue, because a frame may have come meanwhile
                if not self._queue:
                    break
            reader, received, size, last = self._queue.popleft()
            reader.taken_bytes += size
            reader.taken += last
            if last and reader.starved:
                self._post(reader.request_more)
            frame = received[1]
            assert isinstance(frame, Block | End)
            if self._belongs(frame.run):
                return received
            self._leave(frame)
        return None

    def _belongs(self, run: int) -> bool:
        """Whether frames of this run are handed over."""
        if self._has_run is None:
            return True
        if run not in self._known:
            self._known[run] = self._has_run(run)
        return self._known[run]

    def _leave(self, frame: Block | End) -> None:
        """Pass over a frame of a run in which this storage is not, and count it as acknowledged."""
        now, key = time.monotonic(), (frame.run, frame.producer)
        if now >= self._foreign.setdefault(key, now + FOREIGN_AFTER):
            self._foreign[key] = math.inf
            log.warning(
                "run %d of %s is not stored here: it was prepared without this directory; "
                "`larpixdaq fetch %d` writes its files",
                frame.run, frame.producer, frame.run,
            )  # fmt: skip
        self.acknowledge(frame.origin, frame.following)

    def add_credit(self, producer: str) -> None:
        """No effect: LATEST_BLOCKS limit what waits for a monitor."""

    def sample(self, every: float) -> None:
        """Mode "latest": hand over one of each `every` blocks, chosen at random."""
        self.sample_every = every

    def rest(self, rests: bool) -> None:
        """No effect: a message has several blocks already."""

    def acknowledge(self, origin: BlockOrigin, following: int) -> None:
        """Mode "all": acknowledge all blocks of `origin` below sequence `following`, which are durable."""
        with self._lock:
            posted = bool(self._new)
            self._new[origin] = following
        if not posted:
            self._post(self._loop.call_later, ACK_DELAY, self._acknowledge)

    def resubscribe(self, *, send_rows: bool = False) -> None:
        """Begin again after the last acknowledged message of each producer, because the caller has skipped frames.

        `send_rows` has no effect: the stream has the rows in one form only.
        """
        self._restarts += 1
        self._post(self._restart, 0)

    def close(self) -> None:
        """Send the last acknowledgements and stop. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        if self._thread.ident is None:
            self._loop.close()
        else:
            self._post(self._closing.set)
            self._thread.join(timeout=5)
        self._queue.clear()
        self._arrived.close()

    def _post(self, function: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the thread has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    # Called by the thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except Exception as error:  # an error in larpixdaq
            log.exception("stream of %s", self.name)
            self._problem = f"{type(error).__name__}: {error}"
        finally:
            self._loop.close()

    async def _main(self) -> None:
        self._connection = self._loop.create_future()
        keep = self._loop.create_task(self._keep_connected())
        await self._closing.wait()
        self._acknowledge()
        await _cancelled([reader.task for reader in self._readers.values()])
        if self.is_connected:
            with contextlib.suppress(Exception):
                await self._connection.result().flush(timeout=1)
        await _cancelled([keep])
        await _cancelled(asyncio.all_tasks() - {asyncio.current_task()})  # those of nats-py

    async def _keep_connected(self) -> None:
        """Connect to the brokers, and again when the connection is lost."""
        assert self._connection is not None
        while True:
            ended = self._ended = asyncio.Event()
            reasons: list[str] = []

            def lost(reason: str, ended: asyncio.Event = ended, reasons: list[str] = reasons) -> None:
                reasons.append(reason)
                ended.set()

            try:
                client = await jetstream.connect(self._brokers, self.name, lost, avoid=self._broker)
            except LarpixDaqError as error:
                self._fail(str(error))
                await asyncio.sleep(RETRY_INTERVAL)
                continue
            try:
                if self._warned:
                    log.warning("the brokers are connected again")
                self._problem = self._warned = ""
                self._broker = jetstream.broker_of(client)
                if self.mode == "all" and not self._knows_streams:
                    await self._add_known(client)
                self._connection.set_result(client)
                await ended.wait()
                if reasons:  # otherwise a reader has left it, and has said why
                    self._fail(f"connection to the brokers lost: {reasons[0]}")
            finally:
                self._connection = self._loop.create_future()
                await jetstream.close(client)
            for reader in self._readers.values():
                reader.renew()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the brokers."""
        return self._connection is not None and self._connection.done()

    def _fail(self, reason: str) -> None:
        self._problem = reason
        if reason != self._warned:
            self._warned = reason
            log.warning("%s", reason)

    async def client(self) -> Client:
        """Wait for the connection to the brokers."""
        assert self._connection is not None
        return await asyncio.shield(self._connection)

    def leave(self, client: Client) -> None:
        """End this connection, if it is still the present one, and connect to another broker, if there is one."""
        present = self._connection is not None and self._connection.done() and self._connection.result() is client
        if present and len(self._brokers.servers) > 1:
            self._ended.set()

    def _set_present(self, producers: list[str]) -> None:
        now = time.monotonic()
        self.present = {producer: self.present.get(producer, now) for producer in producers}
        self._add(producers)

    def _add(self, producers: Iterable[str]) -> None:
        for producer in producers:
            if producer not in self._readers:
                self._readers[producer] = StreamReader(self, producer)

    async def _add_known(self, client: Client) -> None:
        """Read all streams in which this storage has a position, also those of producers that do not run any more.

        They are asked for once, because later only this storage adds to them.
        """
        context = client.jetstream(timeout=jetstream.API_LIMIT)
        try:
            for name in await stream_names(context, "larpixdaq.>"):
                token = name.removeprefix("larpixdaq_")
                if token != name and any(map(self.is_own, await self.floors(context, name))):
                    with contextlib.suppress(ValueError):
                        self._add([jetstream.producer_of(token)])
            self._knows_streams = True
        except Exception as error:  # the core names the living producers
            log.warning("the streams of producers that have ended are not known: %s", jetstream.describe(error))

    def is_own(self, consumer: str) -> bool:
        """Whether a consumer with this name is for these files."""
        return re.fullmatch(re.escape(self.durable) + _ATTEMPT, consumer) is not None

    async def floors(self, context: JetStreamContext, stream: str) -> dict[str, int]:
        """Return, by durable consumer of this storage's name, the message up to which all are acknowledged."""
        ours = re.compile(re.escape(jetstream.stream_token(self.name)) + _PLACE + _ATTEMPT)
        found = {}
        for info in await jetstream.all_consumers(context, stream):
            if ours.fullmatch(info.name):
                floor = info.ack_floor.stream_seq if info.ack_floor is not None else 0
                found[info.name] = max(floor, (info.config.opt_start_seq or 1) - 1)
        return found

    def _restart(self, run: int) -> None:
        """Discard all that waits, and begin again after the acknowledged messages, or earlier, with a new run."""
        self._take_acknowledgements()
        # Those of the new run are of frames that were left out before it was prepared here.
        self.acknowledged = {origin: following for origin, following in self.acknowledged.items() if origin.run != run}
        self._queue.clear()
        for reader in self._readers.values():
            reader.restart(run)
        self._restarted += 1

    def put(self, queued: list[_Queued]) -> None:
        """Put the frames of a message into the queue."""
        self._queue.extend(queued)
        self._arrived.wake()

    @property
    def room(self) -> int:
        """Mode "latest": the number of further blocks that may wait for the loop."""
        return LATEST_BLOCKS - len(self._queue)

    def _take_acknowledgements(self) -> None:
        with self._lock:
            new, self._new = self._new, {}
        for origin, following in new.items():
            self.acknowledged[origin] = max(following, self.acknowledged.get(origin, 0))
        while len(self.acknowledged) > _ORIGINS:
            del self.acknowledged[min(self.acknowledged)]

    def _acknowledge(self) -> None:
        self._take_acknowledgements()
        for reader in self._readers.values():
            reader.acknowledge()


class StreamReader:
    """Reads the stream of one producer. All belongs to the thread of its Downlink, except where stated."""

    def __init__(self, downlink: Downlink, producer: str) -> None:
        self.producer = producer
        self.stream = jetstream.stream_name(producer)
        #: Why the stream cannot be read, in one line; empty when it can, or when its producer has still to make it.
        self.problem = ""
        self._missing_since: float | None = None  # when the stream did not exist first, monotonic; None: it was read
        #: Messages, and their bytes, that the process's loop has taken. Written by the loop.
        self.taken = self.taken_bytes = 0
        #: Whether the loop calls request_more() when it has taken a message.
        self.starved = False
        self._downlink = downlink
        self._mode = downlink.mode
        self._queued = self._queued_bytes = 0  # in all, as `taken`
        self._requested = 0  # messages that the brokers may still send
        self._expected: int | None = None  # sequence of the next message in the stream; None: not known yet
        self._acked = 0  # all messages up to this one are acknowledged
        self._last: int | None = None  # mode "run": the last message that is read
        self._unacknowledged: deque[_Unacknowledged] = deque()
        self._runs: set[int] = set()  # that are to be read from their first message
        self._delivery = 0  # messages that the present consumer has sent
        self._look_at = 0.0  # monotonic time of the next look at the stream, if no message comes before
        self._missed: int | None = None  # the next message at the last look, if the stream had it
        self._generation = 0
        self._unpacker = Unpacker(producer)
        self._sample = Sample()
        self._inbox: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._client: Client | None = None
        self._consumer = ""
        self._reply = ""
        self._sending: set[asyncio.Task[None]] = set()
        self.task = asyncio.get_running_loop().create_task(self._run())

    @property
    def is_complete(self) -> bool:
        """Whether all messages up to the last one were put into the queue. Any thread may ask."""
        return self._last is not None and self._expected is not None and self._expected > self._last

    def renew(self) -> None:
        """Make the consumer at the brokers anew, and continue with the next message."""
        self._generation += 1
        self._inbox.put_nowait(None)

    def restart(self, run: int) -> None:
        """Begin again after the last acknowledged message, or, if it is earlier, with the first one of `run`."""
        self.acknowledge()
        if self._expected is not None:
            self._expected = self._acked + 1
        if run:
            self._runs.add(run)
        self._unacknowledged.clear()
        self._unpacker = Unpacker(self.producer)
        self._queued, self._queued_bytes = self.taken, self.taken_bytes  # the loop takes nothing meanwhile
        self.renew()

    def acknowledge(self) -> None:
        """Acknowledge the messages whose frames are all acknowledged, and that follow acknowledged ones."""
        if not self._downlink.holds():  # they come again, here or to the storage that has the lease now
            return
        known, reply = self._downlink.acknowledged, ""
        while self._unacknowledged:
            first = self._unacknowledged[0]
            if first.origin is not None and known.get(first.origin, 0) < first.following:
                break
            self._unacknowledged.popleft()
            self._acked, reply = first.sequence, first.reply or reply
        if reply:
            self._send(reply, b"+ACK")

    def request_more(self) -> None:
        """Request further messages, if there is room for them."""
        self.starved = True  # before the look at what was taken, since the loop may take one meanwhile
        waiting = 0 if self._mode == "latest" else self._queued - self.taken  # a monitor skips blocks instead
        room = WINDOW - self._requested - waiting
        full = self._queued_bytes - self.taken_bytes > MAX_WAITING
        if self._requested and (full or room < WINDOW // 2):
            self.starved = False  # the next message calls this again
            return
        if full or room <= 0 or not self._consumer:
            return
        self._requested += room
        self.starved = False
        wanted = f'{{"batch":{room},"expires":{_ns(REQUEST_LIMIT)},"idle_heartbeat":{_ns(HEARTBEAT)}}}'
        self._send(f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self._consumer}", wanted.encode(), self._reply)

    def _send(self, subject: str, data: bytes, reply: str = "") -> None:
        async def send(client: Client) -> None:
            with contextlib.suppress(Exception):  # a lost connection is noticed elsewhere
                await client.publish(subject, data, reply)

        if self._client is not None:
            task = asyncio.get_running_loop().create_task(send(self._client))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _run(self) -> None:
        failures = 0
        while True:
            generation = self._generation
            client = None
            try:
                client = await self._downlink.client()
                while not self._downlink.holds():  # the storage with the lease removes all consumers but its own
                    await asyncio.sleep(RETRY_INTERVAL / 10)
                async with contextlib.AsyncExitStack() as stack:
                    await self._subscribe(client, stack)
                    failures, self._missing_since = 0, None
                    if self.problem:
                        log.warning("the stream of %s is read again", self.producer)
                        self.problem = ""
                    while self._generation == generation:
                        await self._receive(generation)
            except _Lost as error:
                log.debug("the stream of %s is read anew: %s", self.producer, error)
                if self._generation == generation:
                    await asyncio.sleep(RETRY_INTERVAL if self._delivery == 0 else RETRY_INTERVAL / 10)
            except Exception as error:
                self._fail(error)
                leaves = isinstance(error, jetstream.CutOff)
                if not leaves and jetstream.error_code(error) in jetstream.UNANSWERED:  # else the brokers refuse
                    failures += 1
                    leaves = failures >= MAX_FAILURES and failures.bit_count() == 1
                if leaves and client is not None:
                    self._downlink.leave(client)
                await asyncio.sleep(RETRY_INTERVAL)

    def _fail(self, error: Exception) -> None:
        reason = f"the stream of {self.producer} cannot be read: {jetstream.describe(error)}"
        if not self._downlink.is_connected:
            return
        if jetstream.error_code(error) == jetstream.NO_STREAM and not self._is_overdue(reason):
            self.problem = ""
        elif reason != self.problem:
            self.problem = reason
            log.warning("%s", reason)

    def _is_overdue(self, reason: str) -> bool:
        """Whether the producer of a stream that does not exist is there, and had the time to make it."""
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
            log.info("%s", reason)
        came = self._downlink.present.get(self.producer)
        return came is not None and now - max(came, self._missing_since) >= MISSING_AFTER

    # The consumer at the brokers

    async def _subscribe(self, client: Client, stack: contextlib.AsyncExitStack) -> None:
        """Make the consumer. What `stack` closes ends it."""
        self._consumer = ""  # nothing is requested meanwhile: it would come from the previous one
        context = client.jetstream(timeout=jetstream.API_LIMIT)
        info = await jetstream.stream_info(context, self.stream)
        config = await self._config(context, info)
        inbox: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._inbox = inbox
        self._reply = client.new_inbox()
        subscription = await client.subscribe(self._reply, cb=inbox.put)
        stack.push_async_callback(_quietly, subscription.unsubscribe)
        made = await context.add_consumer(self.stream, config)
        if config.durable_name:
            cleaning = asyncio.get_running_loop().create_task(self._remove_others(context, made.name))
            stack.push_async_callback(_cancelled, [cleaning])
        else:
            stack.push_async_callback(_quietly, partial(remove_consumer, context, self.stream, made.name))
        self._unacknowledged = deque(entry._replace(reply="") for entry in self._unacknowledged)
        self._client, self._consumer = client, made.name
        self._requested = self._delivery = 0
        self._put_off_look()
        self.request_more()

    async def _remove_others(self, context: JetStreamContext, present: str) -> None:
        """Remove all other durable consumers of this storage's name, which would keep the stream from making room.

        One that was asked for without an answer may be made late, so they are looked for again and again. None of them
        is that of a storage which takes the lease over meanwhile, because that one is made after the look.
        """
        while True:
            try:
                found = await self._downlink.floors(context, self.stream)
                if self._downlink.holds():
                    for name in found.keys() - {present}:
                        await remove_consumer(context, self.stream, name)
                await asyncio.sleep(CLEANING_INTERVAL)
            except Exception:  # during an election
                await asyncio.sleep(RETRY_INTERVAL)

    async def _config(self, context: JetStreamContext, info: StreamInfo) -> ConsumerConfig:
        """Return the configuration of the consumer, which begins with the next message that is wanted."""
        from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

        if self._mode == "latest":
            begin = DeliverPolicy.LAST if self._delivery else DeliverPolicy.NEW  # the last one may be the end record
            return ConsumerConfig(
                ack_policy=AckPolicy.NONE, deliver_policy=begin, inactive_threshold=FORGOTTEN_AFTER,
                num_replicas=1, mem_storage=True,
            )  # fmt: skip
        if self._mode == "run":
            subject = jetstream.subject(self.producer, self._downlink.run)
            if self._expected is None or self._last is None:
                first = await first_message(context, self.stream, subject)
                self._last = (await context.get_last_msg(self.stream, subject)).seq or 0
                self._expected = first or self._last + 1
            return ConsumerConfig(
                ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self._expected, filter_subject=subject, inactive_threshold=FORGOTTEN_AFTER,
                num_replicas=1, mem_storage=True,
            )  # fmt: skip
        await self._find_start(context, info)
        # Not the one of the last attempt: its group of brokers may have lost its first leader, and elect another one.
        name = f"{self._downlink.durable}_{secrets.token_hex(4)}"
        return ConsumerConfig(
            durable_name=name, inactive_threshold=ABANDONED_AFTER, ack_policy=AckPolicy.ALL,
            ack_wait=ACK_WAIT, max_ack_pending=MAX_UNACKNOWLEDGED, deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=self._acked + 1,
        )  # fmt: skip

    async def _find_start(self, context: JetStreamContext, info: StreamInfo) -> None:
        """Set where the storage begins: after what it has acknowledged, as the durable consumer says after a restart,
        or with the first message of a run that it has not read from there yet.

        Only the first time the consumers at the brokers are asked, since during an election there is no answer. They
        are removed when there is a new one (_remove_others), also those of other directories, because this storage has
        the lease now. Not before, because what no consumer needs may be removed from a stream.
        """
        last, runs = info.state.last_seq, set(self._runs)
        if self._expected is None:
            floors = await self._downlink.floors(context, self.stream)
            known = [floor for name, floor in floors.items() if self._downlink.is_own(name)]
            # Without own ones: what is after the former storage's position is at least named.
            floor = min(known) if known else min([*floors.values(), last])
            if not known and (newest := self._downlink.newest_run()):
                runs.add(newest)
            self._expected, self._acked = floor + 1, floor
        elif last + 1 < self._expected:  # after a power cut
            log.error(
                "the brokers have lost the last messages of %s: the stream ends at %d, the storage has read up to %d",
                self.producer, last, self._expected - 1,
            )  # fmt: skip
            self._expected, self._acked = last + 1, min(self._acked, last)
            self._unacknowledged = deque(entry for entry in self._unacknowledged if entry.sequence <= last)
        self._runs |= runs
        for run in runs:
            first = await first_message(context, self.stream, jetstream.subject(self.producer, run))
            if first is not None and first <= self._acked:
                self._expected, self._acked = first, first - 1
        self._runs -= runs

    # Messages

    async def _receive(self, generation: int) -> None:
        try:
            message = await asyncio.wait_for(self._inbox.get(), SILENT_AFTER)
        except asyncio.TimeoutError:
            if self._requested:
                raise _Lost(f"no sign of life for {SILENT_AFTER:g} s") from None
            return
        if message is None:
            return
        headers = message.headers or {}
        if status := headers.get("Status"):
            if status in ("404", "408"):  # a request has ended
                self._requested = max(0, self._requested - int(headers.get("Nats-Pending-Messages", WINDOW)))
                self.request_more()
            elif status == "100":
                await self._look()
            else:
                raise _Lost(f"{status} {headers.get('Description', '')}")
            return
        self._requested = max(0, self._requested - 1)
        await self._take(message, generation)
        self._put_off_look()
        self.request_more()

    def _put_off_look(self) -> None:
        self._look_at, self._missed = time.monotonic() + LOOK_INTERVAL, None

    async def _look(self) -> None:
        """Begin again when requested messages that the stream has do not come. Called at each sign of life.

        Each consumer has its own leader among the brokers. One that stood still for a time may know nothing of newer
        messages for minutes, though it gives signs of life. The leader of the stream knows them.
        """
        if time.monotonic() < self._look_at or self._expected is None or self._client is None:
            return
        if not self._requested or len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            self._put_off_look()
            return
        self._look_at = time.monotonic() + LOOK_INTERVAL
        last = self._last
        if last is None:
            context = self._client.jetstream(timeout=jetstream.API_LIMIT)
            last = (await jetstream.stream_info(context, self.stream)).state.last_seq
        if last < self._expected:
            self._missed = None
        elif self._missed == self._expected:
            log.warning("the stream of %s: the broker that sends it lags behind the others: read anew", self.producer)
            raise _Lost("a broker lags behind")
        else:
            self._missed = self._expected

    async def _take(self, message: Msg, generation: int) -> None:
        """Take a message of the stream: the next one, or one that came before."""
        about = message.metadata
        sequence, delivery = about.sequence.stream, about.sequence.consumer
        first = self._delivery == 0
        followed, self._delivery = delivery == self._delivery + 1, delivery
        if self._mode == "latest":
            if about.num_pending > LATEST_BEHIND and not first:
                raise _Lost(f"{about.num_pending} messages behind")
        else:
            assert self._expected is not None
            if sequence < self._expected:
                self._note_again(sequence, message.reply)
                return
            if not followed:
                raise _Lost(f"message {delivery} of the consumer does not follow")
            if self._mode == "all" and sequence > self._expected:
                log.error(
                    "messages %d to %d of %s are not in the stream any more",
                    self._expected, sequence - 1, self.producer,
                )  # fmt: skip
        frames = await self._unpack(message, sequence)
        if self._generation != generation:
            return
        if self._mode == "all" and not self._unpacker.joining:
            last = frames[-1][1] if frames else None
            assert last is None or isinstance(last, Block | End)
            origin, following = (None, 0) if last is None else (last.origin, last.following)
            self._unacknowledged.append(_Unacknowledged(sequence, message.reply, origin, following))
            if origin is None or self._downlink.acknowledged.get(origin, 0) >= following:
                self.acknowledge()
        if frames:
            size = len(message.data) // len(frames)
            queued = [_Queued(self, frame, max(size, _bytes(frame)), False) for frame in frames]
            queued[-1] = queued[-1]._replace(last=True)
            self._queued += 1
            self._queued_bytes += sum(each.size for each in queued)
            self._downlink.put(queued)
        self._expected = sequence + 1

    def _note_again(self, sequence: int, reply: str) -> None:
        """Note the acknowledgement's subject of a message that was taken already, from an earlier consumer."""
        if sequence <= self._acked:
            if self._mode == "all":
                self._send(reply, b"+ACK")
            return
        for index, entry in enumerate(self._unacknowledged):
            if entry.sequence == sequence:
                self._unacknowledged[index] = entry._replace(reply=reply)
                break

    async def _unpack(self, message: Msg, sequence: int) -> list[Received]:
        """Return the frames of a message. A damaged one is requested once more; then what is damaged is named."""
        try:
            return self._frames(message.data)
        except ProtocolError as error:
            name = f"message {sequence} of {self.producer} ({(message.headers or {}).get(ID, 'without id')})"
            log.warning("%s: %s: requested again", name, error)
            data = message.data
            try:
                assert self._client is not None
                context = self._client.jetstream(timeout=jetstream.API_LIMIT)
                data = (await context.get_msg(self.stream, sequence)).data or b""
            except Exception as problem:
                log.warning("%s: %s", name, jetstream.describe(problem))
            try:
                return self._frames(data, damaged=name)
            except ProtocolError as again:
                log.error("%s: %s: its blocks are missing", name, again)
                return []

    def _frames(self, data: bytes, damaged: str = "") -> list[Received]:
        """Return the frames of a message. ProtocolError if it is damaged; but with `damaged`, its name, blocks with
        damaged rows are named and left out."""
        found: list[Received] = []
        for frame, parts in self._unpacker.unpack(data):
            if isinstance(frame, End):
                found.append((self.producer, frame, None, None))
                continue
            if self._mode == "latest" and frame.text is None:
                self._sample.every = self._downlink.sample_every
                if not self._sample.takes_next() or len(found) >= self._downlink.room:
                    continue
            try:
                found.append((self.producer, frame, *self._rows(frame, parts)))
            except ProtocolError as error:
                if not damaged:
                    raise
                log.error("%s: block %d of run %d: %s: it is missing", damaged, frame.sequence, frame.run, error)
        return found

    def _rows(self, block: Block, parts: tuple[memoryview, ...]) -> tuple[memoryview | None, PackedRows | None]:
        """Return the rows of a block, or its packed rows if they fill a chunk of a file. ProtocolError if damaged."""
        layout = schema.layout(block.layout)
        if len(parts) == 2:
            packed = PackedRows.parse(parts[0], parts[1], block.rows)
            if self._mode != "latest" and block.rows == schema.CHUNK_ROWS:
                return None, packed
            return packed.unpack(block.rows, layout).data.cast("B"), None
        rows = parts[0] if parts else memoryview(b"")
        if len(rows) != (size := block.rows * layout.dtype.itemsize):
            raise ProtocolError(f"block {block.sequence} of run {block.run}: expected {size} bytes, found {len(rows)}")
        return rows, None


# Requests to the brokers


async def stream_names(context: JetStreamContext, subject: str) -> list[str]:
    """Return the names of all streams with subjects that fit to `subject`."""
    found: list[str] = []
    while True:
        request = f'{{"subject":"{subject}","offset":{len(found)}}}'
        answer = await context._api_request("$JS.API.STREAM.NAMES", request.encode(), timeout=jetstream.API_LIMIT)
        found += answer["streams"] or []
        if not answer["streams"] or len(found) >= answer["total"]:
            return found


async def first_message(context: JetStreamContext, stream: str, subject: str) -> int | None:
    """Return the sequence of the first message with this subject; None if there is none."""
    from nats.js.errors import NotFoundError

    try:
        return (await context.get_msg(stream, seq=1, subject=subject, next=True)).seq
    except NotFoundError:
        return None


async def remove_consumer(context: JetStreamContext, stream: str, consumer: str) -> None:
    """Remove a consumer, if there is one."""
    from nats.js.errors import NotFoundError

    with contextlib.suppress(NotFoundError):
        await context.delete_consumer(stream, consumer)


async def highest_run(brokers: Brokers, name: str) -> int:
    """Return the highest run of which the brokers have messages; 0 without any. BrokerError without an answer."""
    client = await jetstream.connect(brokers, name, lambda reason: None)
    highest = 0
    try:
        context = client.jetstream(timeout=jetstream.API_LIMIT)
        for stream in await jetstream.retried(partial(stream_names, context, "larpixdaq.>")):
            with contextlib.suppress(BrokerError, ValueError):  # without messages, or of another program
                last = await jetstream.retried(partial(context.get_msg, stream, subject="larpixdaq.>"))
                highest = max(highest, jetstream.parse_subject(last.subject or "")[1])
        return highest
    finally:
        await jetstream.close(client)


async def producers_of_run(brokers: Brokers, name: str, run: int) -> list[str]:
    """Return the producers that have messages of a run at the brokers. BrokerError without an answer."""
    client = await jetstream.connect(brokers, name, lambda reason: None)
    try:
        context = client.jetstream(timeout=jetstream.API_LIMIT)
        found = []
        for stream in await jetstream.retried(partial(stream_names, context, f"larpixdaq.*.{run}")):
            with contextlib.suppress(ValueError):  # of another program
                producer = jetstream.producer_of(stream.removeprefix("larpixdaq_"))
                subject = jetstream.subject(producer, run)
                if await jetstream.retried(partial(first_message, context, stream, subject)) is not None:
                    found.append(producer)
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise BrokerError(f"unexpected answer of the brokers: {error!r}") from None
    finally:
        await jetstream.close(client)


def durable_name(name: str, directory: Path) -> str:
    """Return the beginning of the names of a storage's durable consumers, with its files in this directory here."""
    place = f"{socket.gethostname()}:{directory.resolve()}".encode("utf-8", "surrogateescape")
    return f"{jetstream.stream_token(name)}_{hashlib.sha256(place).hexdigest()[:8]}"


async def _cancelled(tasks: Collection[asyncio.Task[Any] | None]) -> None:
    """Cancel tasks, and wait until they have ended."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running, timeout=2)


async def _quietly(end: Callable[[], Coroutine[Any, Any, object]]) -> None:
    with contextlib.suppress(Exception):
        await end()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _bytes(received: Received) -> int:
    rows, packed = received[2], received[3]
    return len(rows) if rows is not None else len(packed.data) if packed is not None else 0
