"""Leases in a key-value bucket of the brokers: of all processes that want a lease, at most one holds it at a time.

The entry of a lease names its holder, who writes it again several times in `seconds`. Every write names the revision
that it replaces, so that of two writes only one succeeds. No clocks of different hosts are compared:

- the holder counts from the sending of its last successful write, and holds the lease for `seconds` - MARGIN;
- everybody else counts from the first sight of a revision, which is later, and may replace it after `seconds` in which
  the brokers answered: after a pause of the brokers, a holder that lives can write first.

A holder that could not write in time thus knows it before another process can hold the lease, also after it was
stopped: it only compares its own clock. If it can write again before anybody else, it continues in the same term.

LeaseRule is this rule, without clock, thread and connection. Bucket is the connection, with a thread of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgspec

from larpixdaq.errors import BrokerError, LarpixDaqError, RevisionConflict
from larpixdaq.runtime.event_loop import Waker
from larpixdaq.stream import jetstream
from larpixdaq.stream.jetstream import Brokers

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext

_log = logging.getLogger("larpixdaq.stream.lease")
_T = TypeVar("_T")
#: The bucket of larpix-daq.
BUCKET: Final = "larpixdaq"
#: Default seconds after which a lease may be taken from a holder that does not write it.
SECONDS: Final = 3.0
#: Seconds by which a holder stops earlier: for clocks of different speed, and for what it is doing at that moment.
MARGIN: Final = 1.0
#: Writes of the holder in the time of a lease.
_RENEWALS: Final = 6
#: Seconds between two looks at a lease of another process.
_LOOK: Final = 0.25
#: Maximum seconds for one read or write of a lease, and for those of Bucket.get() and put() by default.
LIMIT: Final = 1.0
#: Maximum bytes of a value.
MAX_VALUE: Final = 512 << 10
#: Codes of the brokers: the last revision is another one; there is no message of this subject.
_WRONG_LAST: Final = (10071, 10164)
_NO_MESSAGE: Final = 10037


def clock() -> float:
    """Return seconds of this host's clock since it was started. It also counts the time in which the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Entry(NamedTuple):
    """A value of a bucket, and its revision (above 0; of two revisions the later one is higher)."""

    value: bytes
    revision: int


class LeaseRecord(msgspec.Struct, frozen=True):
    """The value of a lease. `holder`: an id that is unique for each process, "" when the lease was given back.

    `count`: number of the holder's write. `seconds`: as in the rule. `about`: what people and other candidates should
    know of the holder.
    """

    holder: str
    count: int
    seconds: float
    about: dict[str, str] = {}


#: In place of a value that is no LeaseRecord: somebody holds the lease.
_UNREADABLE: Final = LeaseRecord("?", 0, SECONDS)


class LeaseRule:
    """What one candidate knows of a lease. `now`, in each call, is a time of one clock that never goes back.

    A write is begun with attempt(); then written(), or, if it was refused or nobody knows, must_read() follows, and
    seen() with what was read afterwards.
    """

    def __init__(self, holder: str, seconds: float, about: dict[str, str] | None = None) -> None:
        if seconds <= MARGIN:
            raise ValueError(f"seconds of a lease: expected more than {MARGIN:g}, found {seconds:g}")
        self._holder, self._seconds, self._about = holder, seconds, about or {}
        self._count = 0
        self._sent: dict[int, float] = {}  # times of the writes that may have succeeded, by count
        self._next_write = 0.0
        self._entry: LeaseRecord | None = None
        self._revision = 0
        self._since = self._looked = 0.0  # when this revision was seen first, and when it was read last
        self._gone_since: float | None = None  # when the entry, which was seen before, was not there any more
        self._reads = True
        self._term = 0
        self._until = float("-inf")
        #: Another holder that has written the lease since it was read here first, so that it lives or has just died;
        #: None: none is known.
        self.rival: LeaseRecord | None = None
        #: Set by any thread: hold the lease no longer, whatever is written from now on.
        self.is_over = False

    @property
    def owner(self) -> LeaseRecord | None:
        """Who had the lease when it was last read or written; None: nobody has ever had it."""
        return self._entry

    @property
    def is_own(self) -> bool:
        """Whether this candidate was the last one to have the lease, though the time may be over."""
        entry = self._entry  # once, because another thread may replace it
        return entry is not None and entry.holder == self._holder

    @property
    def reads(self) -> bool:
        """Whether the entry must be read before the next write."""
        return self._reads or not self.is_own

    def term(self, now: float) -> int | None:
        """Return the number of the term in which the lease is held at `now`; None if it is not held.

        It is the revision of the term's first write: it rises from term to term, over all holders.
        """
        return self._term if self.is_own and now < self._until and not self.is_over else None

    def attempt(self, now: float) -> tuple[bytes, int] | None:
        """Return a value to be written now, and the revision that it must replace; None if it is not time for it."""
        entry = self._entry
        if self._reads or now < self._next_write:
            return None
        if entry is None:
            waits = self._gone_since is not None and now - self._gone_since < self._seconds
        else:
            others = entry.holder not in ("", self._holder)
            waits = others and now - self._since < max(entry.seconds, self._seconds)
        if waits:
            return None
        self._count += 1
        self._sent = {count: sent for count, sent in self._sent.items() if now - sent < self._seconds}
        self._sent[self._count] = now
        self._next_write = now + self._seconds / _RENEWALS
        return self._value(self._holder), self._revision

    def _value(self, holder: str) -> bytes:
        return msgspec.json.encode(LeaseRecord(holder, self._count, self._seconds, self._about))

    def written(self, revision: int) -> None:
        """The last attempt() has succeeded."""
        self._take(LeaseRecord(self._holder, self._count, self._seconds, self._about), revision)

    def must_read(self) -> None:
        """The last attempt() was refused, or it is not known whether it has succeeded."""
        self._reads = True

    def seen(self, entry: Entry | None, now: float) -> None:
        """Take what was read; `now`: after the reading."""
        self._reads = False
        if entry is None:
            if self._revision:  # somebody has removed the bucket, and the holder may not know it yet
                self._gone_since = now
            self._entry, self._revision, self.rival = None, 0, None
            return
        # The revision may be lower than the known one: from a broker that lags behind, so that the next write will be
        # refused, or after brokers have lost their last writes.
        gap, self._looked = now - self._looked, now
        if entry.revision == self._revision:
            if gap > self._seconds / 2:  # the brokers were away, for the holder too
                self._since = now
            return
        try:
            record = msgspec.json.decode(entry.value, type=LeaseRecord)
        except (msgspec.MsgspecError, ValueError):
            record = _UNREADABLE
        self._since = now
        is_new = 0 < self._revision < entry.revision
        self._take(record, entry.revision)
        self.rival = record if is_new and record.holder not in ("", self._holder) else None

    def _take(self, record: LeaseRecord, revision: int) -> None:
        if record.holder == self._holder:
            self.rival = None
            if not self.is_own:
                self._term = revision
            if (sent := self._sent.get(record.count)) is not None:
                self._until = max(self._until, sent + self._seconds - MARGIN)
            self._sent = {count: sent for count, sent in self._sent.items() if count > record.count}
        else:
            self._until = float("-inf")
        self._entry, self._revision = record, revision

    def release(self) -> tuple[bytes, int] | None:
        """Hold the lease no longer. Returns the write that gives it to others at once; None if it is not ours."""
        self.is_over = True
        if not self.is_own:
            return None
        self._count += 1
        return self._value(""), self._revision


class Bucket:
    """A key-value bucket of the brokers. Its thread holds the connection; get() and put() are for any other thread.

    `who`: as the brokers list the connection. The bucket is made if there is none. BrokerError if that fails for
    `limit` seconds.
    """

    def __init__(self, brokers: Brokers, who: str, *, name: str = BUCKET, limit: float = 12.0) -> None:
        self.name = name
        self._brokers, self._who = brokers, who
        self._client: Client | None = None
        self._broker = ""  # address of the last one
        self._connecting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"bucket {name}", daemon=True)
        self._thread.start()
        try:
            self._wait(self._open(limit), limit + LIMIT)
        except BaseException:
            self.close()
            raise

    async def _open(self, limit: float) -> None:
        from nats.js.api import StorageType

        deadline = time.monotonic() + limit
        replicas = 3 if len(self._brokers.servers) >= 3 else 1
        while True:
            problem = "no answer"
            try:
                context = await self._context()
                await _checked(
                    context.create_key_value(
                        bucket=self.name,
                        history=1,
                        replicas=replicas,
                        storage=StorageType.FILE,
                        max_value_size=MAX_VALUE,
                    )
                )
                return
            except BucketExists:
                found = (await _checked(context.stream_info(f"KV_{self.name}"))).config
                if (found.num_replicas or 1) < replicas:
                    _log.warning(
                        "bucket %s has %s replicas, expected %d: `nats stream edit KV_%s --replicas %d` changes that",
                        self.name, found.num_replicas, replicas, self.name, replicas,
                    )  # fmt: skip
                return
            except (BrokerError, asyncio.TimeoutError) as error:
                problem = str(error) or problem
                waits = not isinstance(error, BrokerError) or error.code in jetstream.TEMPORARY
            if time.monotonic() > deadline:
                raise (NoMajority if waits else BrokerError)(f"bucket {self.name}: {problem}")
            await asyncio.sleep(_LOOK)

    async def _context(self) -> JetStreamContext:
        """Return JetStream of the present connection, which is made again if it was lost. Raises BrokerError."""
        if self._client is None or not self._client.is_connected:
            if self._connecting is None or self._connecting.done():
                self._connecting = asyncio.ensure_future(self._make_connection())
                # Its error may come when nobody waits for it any more.
                self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._connecting)  # a time limit of the caller must not end it
        assert self._client is not None
        return self._client.jetstream(timeout=LIMIT)

    async def _make_connection(self) -> None:
        await self._drop()
        self._client = await jetstream.connect(self._brokers, self._who, lambda reason: None, avoid=self._broker)
        self._broker = jetstream.broker_of(self._client)

    async def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await jetstream.close(client)

    def get(self, keys: Sequence[str], limit: float = LIMIT) -> list[Entry | None]:
        """Read the newest entry of each key, None if there is none.

        BrokerError if the brokers do not answer within `limit` seconds.
        """

        async def read_all() -> list[Entry | None]:
            return list(await asyncio.gather(*(self.read(key, limit) for key in keys)))

        return self._wait(read_all(), 2 * limit)

    def put(self, key: str, value: bytes, revision: int | None, limit: float = LIMIT) -> int:
        """Write an entry in place of `revision` (0: there is none; None: whatever there is). Returns the new revision.

        RevisionConflict if another revision is the last one. BrokerError if no broker has answered within `limit`
        seconds: the entry may have been written, or may still be.
        """
        return self._wait(self.write(key, value, revision, limit), 2 * limit)

    def remove(self, key: str) -> None:
        """Remove an entry in the background, if the brokers answer."""
        self.start(self._remove(key))

    def start(self, work: Coroutine[Any, Any, None]) -> concurrent.futures.Future[None]:
        """Run a coroutine in the thread of the bucket."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # Coroutines, for the thread of the bucket.

    async def read(self, key: str, limit: float = LIMIT) -> Entry | None:
        """As get(), for one key."""
        from nats.js.errors import NotFoundError

        async def ask() -> Entry | None:
            context = await self._context()
            try:
                # Of the leader, because the other brokers may lag behind.
                found = await context.get_msg(f"KV_{self.name}", subject=f"$KV.{self.name}.{key}", direct=False)
            except NotFoundError as error:
                if error.err_code != _NO_MESSAGE:
                    raise
                return None
            if found.headers and "KV-Operation" in found.headers:  # was removed
                return None
            return Entry(found.data or b"", found.seq or 0)

        return await self._limited(key, ask(), limit)

    async def write(self, key: str, value: bytes, revision: int | None, limit: float = LIMIT) -> int:
        """As put()."""
        if len(value) > MAX_VALUE:
            raise BrokerError(f"bucket {self.name}, key {key}: {len(value)} bytes, the limit is {MAX_VALUE}")
        from nats.js.api import Header

        async def ask() -> int:
            context = await self._context()
            headers = {} if revision is None else {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision)}
            answer = await context.publish(f"$KV.{self.name}.{key}", value, timeout=limit, headers=headers)
            return answer.seq

        return await self._limited(key, ask(), limit)

    async def _limited(self, key: str, request: Coroutine[Any, Any, _T], limit: float) -> _T:
        try:
            return await asyncio.wait_for(_checked(request), limit)
        except (BrokerError, asyncio.TimeoutError) as error:
            # The broker of this connection may stand still, or be cut off from the others.
            if not isinstance(error, BrokerError) or error.code in jetstream.UNANSWERED:
                self._loop.create_task(self._drop())
            why = str(error) or f"no broker has answered within {limit:g} s"
            raise BrokerError(f"bucket {self.name}, key {key}: {why}") from None

    async def _remove(self, key: str) -> None:
        with contextlib.suppress(BrokerError):
            context = await self._context()
            await _checked(context.purge_stream(f"KV_{self.name}", subject=f"$KV.{self.name}.{key}"))

    def _wait(self, work: Coroutine[Any, Any, _T], limit: float) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(limit)
        except concurrent.futures.TimeoutError:
            future.cancel()
            asked = f"the brokers {self._brokers} do not answer"
            raise BrokerError(f"bucket {self.name}: {asked} (waited {limit:g} s)") from None

    def close(self) -> None:
        """Close the connection, and end the thread; a second call has no effect."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=LIMIT)
            await self._drop()

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(3 * LIMIT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT)
        if not self._thread.is_alive():
            self._loop.close()


class NoMajority(BrokerError):
    """A broker is there, but not a majority of them, or they elect a leader."""


class BucketExists(BrokerError):
    """With other settings, such as another number of replicas."""


async def _checked(request: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of a request to the brokers. Raises RevisionConflict, BrokerError, or asyncio.TimeoutError."""
    from nats.errors import Error
    from nats.errors import TimeoutError as NoAnswer

    try:
        return await request
    except (NoAnswer, asyncio.TimeoutError):
        raise asyncio.TimeoutError from None
    except (Error, OSError) as error:
        code = jetstream.error_code(error)
        if code in _WRONG_LAST:
            raise RevisionConflict("another process has written it") from None
        kind = BucketExists if code == jetstream.OTHER_SETTINGS else BrokerError
        raise kind(jetstream.describe(error), code) from None


class Lease:
    """A candidate for the lease `key` of a bucket, which takes it when it can, until close().

    All attributes may be read in any thread. fileno() polls readable when a term has begun, or another process has the
    lease; the end of a term by time alone is seen in `term` only.
    """

    def __init__(
        self,
        bucket: Bucket,
        key: str,
        *,
        seconds: float = SECONDS,
        about: dict[str, str] | None = None,
    ) -> None:
        self.key, self.seconds = key, seconds
        self._limit = min(LIMIT, seconds / 4)
        self._bucket = bucket
        self._rule = LeaseRule(secrets.token_hex(16), seconds, about)
        self._about = about or {}
        self._sign: int | None = None  # revision of the last sign of a waiting candidate; None: none was looked for
        self._sign_heard = self._sign_due = 0.0
        #: `about` of another candidate that waits for this lease; empty if none was heard for `seconds`. None: unknown
        #: yet, and while another process has the lease.
        self.waiting: dict[str, str] | None = None
        self._waker = Waker()
        self._ends = False
        #: Why the last read or write of the lease has failed; "" if it has not.
        self.problem = ""
        self._work = bucket.start(self._run())

    @property
    def term(self) -> int | None:
        """The number of the term in which this process holds the lease now; None: it does not hold it.

        As long as the number is the same, nobody else has held it in between, though it was None for a time.
        """
        return self._rule.term(clock())

    @property
    def owner(self) -> LeaseRecord | None:
        """Who had the lease when it was last read or written; None before that, or if nobody has ever had it."""
        return self._rule.owner

    @property
    def rival(self) -> LeaseRecord | None:
        """Another process that has it, and has written it while this one looked; None: none is known. `owner` may have
        died long ago."""
        return self._rule.rival

    @property
    def is_own(self) -> bool:
        """Whether this process was the last one to have it, though `term` may be None until it can write again."""
        return self._rule.is_own

    def fileno(self) -> int:
        return self._waker.fileno()

    def clear(self) -> None:
        """Let fileno() poll readable only at the next change."""
        self._waker.clear()

    def close(self) -> None:
        """Give the lease back, if it is held (at most 1 s), and end."""
        self._ends = self._rule.is_over = True
        if not concurrent.futures.wait([self._work], 3 * LIMIT).not_done:  # else a write may still be going on
            with contextlib.suppress(LarpixDaqError):
                if (released := self._rule.release()) is not None:
                    self._bucket.put(self.key, *released)
        self._waker.close()

    async def _run(self) -> None:
        while not self._ends:
            had = self._rule.owner
            try:
                await self._turn()
                self.problem = ""
                # Only who has the lease, or waits for a process that has it, gives signs. Any other candidate may get
                # the lease in a moment, or end.
                if clock() >= self._sign_due and (self._rule.is_own or self._rule.rival is not None):
                    self._sign_due = clock() + self.seconds / 3
                    await self._exchange_signs()
            except BrokerError as error:
                self.problem = str(error)
                await asyncio.sleep(_LOOK)
            except Exception:  # an error in larpixdaq or its library: the lease ends by time
                _log.exception("lease %s", self.key)
                await asyncio.sleep(1.0)
            has = self._rule.owner
            if (had and had.holder) != (has and has.holder):
                self._waker.wake()

    async def _exchange_signs(self) -> None:
        """Give a sign that this candidate waits, or, as the holder, look for a sign of another one."""
        key = f"{self.key}.waits"
        if not self._rule.is_own:
            self.waiting, self._sign = None, None
            value = msgspec.json.encode(LeaseRecord("", 0, self.seconds, self._about))
            await self._bucket.write(key, value, None, self._limit)
            return
        entry = await self._bucket.read(key, self._limit)
        revision = entry.revision if entry is not None else 0
        if self._sign is None:  # this sign may be old
            self._sign_heard = clock()
        if entry is not None and self._sign not in (None, revision):  # was written since the last look
            with contextlib.suppress(msgspec.MsgspecError, ValueError):
                self.waiting = msgspec.json.decode(entry.value, type=LeaseRecord).about
                self._sign_heard = clock()
        elif clock() - self._sign_heard > self.seconds:
            self.waiting = {}
        self._sign = revision

    async def _turn(self) -> None:
        rule = self._rule
        if rule.reads:
            entry = await self._bucket.read(self.key, self._limit)
            rule.seen(entry, clock())
        attempt = rule.attempt(clock())
        if attempt is None:
            await asyncio.sleep(min(_LOOK, self.seconds / _RENEWALS / 2))
            return
        try:
            rule.written(await self._bucket.write(self.key, *attempt, self._limit))
        except (BrokerError, RevisionConflict) as error:
            rule.must_read()
            if isinstance(error, BrokerError):
                raise
