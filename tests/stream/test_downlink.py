"""Readers of streams at real brokers: every message once, in order; nothing acknowledged that is not stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import Brokers, brokers
from example_counts import examples
from file_builder import Feed
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import until
from stream_log import StreamLog, blocks, brokers_of

from larpixdaq import schema
from larpixdaq.protocol.stream import Block, BlockOrigin, End
from larpixdaq.stream import downlink, jetstream
from larpixdaq.stream.downlink import WINDOW, Downlink


@pytest.fixture(scope="module")
def one() -> Iterator[Brokers]:
    with brokers(1) as made:
        yield made


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


class Taker:
    """Takes frames as a storage does. `acknowledge`: at once."""

    def __init__(self, link: Downlink, *, acknowledge: bool = True) -> None:
        self.link, self.acknowledge = link, acknowledge
        self.frames: list[Any] = []
        self.rows: list[bytes] = []

    def take(self, most: int = 1 << 30) -> int:
        select.select([self.link.fileno()], [], [], 0.01)
        taken = 0
        while taken < most and (received := self.link.next()) is not None:
            _, frame, payload, packed = received
            taken += 1
            self.frames.append(frame)
            if isinstance(frame, Block):
                if packed is not None:
                    assert frame.rows == schema.CHUNK_ROWS
                    payload = packed.unpack(frame.rows, schema.layout(frame.layout)).data.cast("B")
                assert payload is not None
                self.rows.append(bytes(payload))
            if self.acknowledge:
                self.link.acknowledge(frame.origin, frame.following)
        return taken

    def wait(self, many: int) -> None:
        def enough() -> bool:
            self.take()
            return len(self.frames) >= many

        until(enough, f"{many} frames, of which {len(self.frames)} have come")
        assert len(self.frames) == many

    @property
    def sequences(self) -> list[int]:
        return [frame.sequence if isinstance(frame, Block) else frame.next for frame in self.frames]


def storage(made: Brokers, folder: Path, stack: contextlib.ExitStack, **options: Any) -> Downlink:
    link = Downlink("Offline storage", "all", brokers_of(made), directory=folder, **options)
    stack.callback(link.close)
    return link


def a_producer() -> str:
    """The name of a producer, with characters that NATS does not take, and of this test alone."""
    return f"board.{uuid.uuid4().hex[:8]} *"


def test_every_frame_once_in_order_and_acknowledged_after_the_storage(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    log, feed = StreamLog(one, a_producer()), Feed(1)
    feed.origin = BlockOrigin(1, log.producer, 7)
    link = storage(one, tmp_path, stack)
    link.connect([log.producer])
    taker = Taker(link, acknowledge=False)
    link.begin(1, [log.producer])
    sent = [[feed.info("Beginning run")], blocks(feed, 3, 100, schema.CHUNK_ROWS), blocks(feed, 5)]
    log.publish(feed, *sent, [feed.end()])
    taker.wait(6)
    assert taker.sequences == [0, 1, 2, 3, 4, 5]
    assert taker.rows == [rows.tobytes() for rows in feed.rows]
    assert isinstance(taker.frames[-1], End)
    assert log.floor(link) == 0
    link.acknowledge(feed.origin, 3)  # all of the first message, and two of three blocks of the second
    until(lambda: log.floor(link) == 1, "the first message to be acknowledged")
    link.acknowledge(feed.origin, 4)
    until(lambda: log.floor(link) == 2, "the second one too")
    link.acknowledge(feed.origin, 6)
    until(lambda: log.floor(link) == 4, "all")
    assert link.problem == ""


def test_a_storage_that_has_skipped_frames_gets_all_that_is_not_acknowledged_again(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    log, feed, link = begun(one, tmp_path, stack)
    taker = Taker(link, acknowledge=False)
    log.publish(feed, *([block] for block in blocks(feed, *[10] * 6)))
    taker.wait(6)
    link.acknowledge(feed.origin, 2)
    link.resubscribe()
    again = Taker(link)
    again.wait(4)
    assert again.sequences == [2, 3, 4, 5]
    until(lambda: log.floor(link) == 6, "all to be acknowledged")


def feed_of(log: StreamLog, run: int = 1, epoch: int = 7) -> Feed:
    return Feed(run, log.producer, epoch)


def begun(made: Brokers, folder: Path, stack: contextlib.ExitStack) -> tuple[StreamLog, Feed, Downlink]:
    """Return a new stream, a feed for its run 1, and a storage that reads this run."""
    log = StreamLog(made, a_producer())
    link = storage(made, folder, stack)
    link.connect([log.producer])
    link.begin(1, [])
    return log, feed_of(log), link


def test_a_restarted_storage_continues_after_what_it_has_acknowledged(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    log = StreamLog(one, a_producer())
    feed = feed_of(log)
    first = storage(one, tmp_path, stack)
    first.connect([log.producer])
    taker = Taker(first)
    first.begin(1, [])
    log.publish(feed, *([block] for block in blocks(feed, *[10] * 4)))
    taker.wait(4)
    until(lambda: log.floor(first) == 4, "4 messages to be acknowledged")
    first.close()
    log.publish(feed, blocks(feed, 10, 10))
    second = storage(one, tmp_path, stack)
    second.connect([])  # the producer has ended, too: the brokers know that the storage reads its stream
    later = Taker(second)
    later.wait(2)
    assert later.sequences == [4, 5]


def test_a_storage_in_another_directory_reads_the_run_from_its_first_message(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """And before the core has prepared the run here, nothing of it is handed over, nor counted as stored."""
    log = StreamLog(one, a_producer())
    earlier, feed = feed_of(log, 1), feed_of(log, 2)
    log.publish(earlier, blocks(earlier, 10), [earlier.end()])
    log.publish(feed, *([block] for block in blocks(feed, *[10] * 5)))
    known: set[int] = set()
    link = storage(one, tmp_path, stack, has_run=known.__contains__)
    link.connect([log.producer])
    until(lambda: log.floor(link) == 7, "it to begin at the end of the stream")
    log.publish(feed, blocks(feed, 10))
    taker = Taker(link, acknowledge=False)
    until(lambda: not taker.take() and log.floor(link) == 8, "a message to be left out")
    known.add(2)
    link.begin(2, [])
    taker.wait(6)
    assert taker.sequences == list(range(6))
    assert {frame.run for frame in taker.frames} == {2}
    assert log.floor(link) == 2  # of run 2, nothing
    link.acknowledge(feed.origin, 6)
    until(lambda: log.floor(link) == 8, "all to be acknowledged")
    link.close()
    (tmp_path / "other").mkdir()
    other = storage(one, tmp_path / "other", stack, has_run=known.__contains__)
    other.connect([log.producer])
    until(lambda: log.floor(other) == 8, "another storage of this name to begin")
    until(lambda: all(map(other.is_own, log.consumers())), "the position of the former directory to be removed")


def test_a_new_position_begins_with_the_newest_run_that_the_directory_has(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    log = StreamLog(one, a_producer())
    for run in (1, 2, 3):
        feed = feed_of(log, run)
        log.publish(feed, blocks(feed, 10), [feed.end()])
    link = storage(one, tmp_path, stack, newest_run=lambda: 2)
    link.connect([log.producer])
    taker = Taker(link)
    taker.wait(4)
    assert [frame.run for frame in taker.frames] == [2, 2, 3, 3]


def test_a_broker_that_is_killed_and_started_again(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    made = stack.enter_context(brokers(1, fsync=True))
    log = StreamLog(made, a_producer())
    feed = feed_of(log)
    link = storage(made, tmp_path, stack)
    link.connect([log.producer])
    link.begin(1, [])
    taker = Taker(link)
    log.publish(feed, *([block] for block in blocks(feed, *[10] * 5)))
    taker.wait(5)
    until(lambda: log.floor(link) == 5, "5 messages to be acknowledged")
    made.kill(0)
    until(lambda: link.problem, "the storage to notice it")
    made.start(0)
    log.publish(feed, *([block] for block in blocks(feed, *[10] * 5)))
    taker.wait(10)
    assert taker.sequences == list(range(10))
    until(lambda: log.floor(link) == 10, "all to be acknowledged")
    assert link.problem == ""


def test_a_stream_that_has_lost_its_end_acknowledges_no_message_before_the_storage_has_it(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    log, holds = StreamLog(one, a_producer()), [True]
    feed, later = feed_of(log, 1), feed_of(log, 2)
    link = storage(one, tmp_path, stack, holds=lambda: holds[0])
    link.connect([log.producer])
    link.begin(1, [])
    taker = Taker(link, acknowledge=False)
    sent = [[block] for block in blocks(feed, 10, 10, 10)]
    log.publish(feed, *sent)
    taker.wait(3)
    holds[0] = False  # meanwhile it does not look at the stream
    one.call(lambda client: client.jetstream().delete_stream(log.name))
    StreamLog(one, log.producer).publish(feed, *sent[:2])
    holds[0] = True
    until(lambda: "the brokers have lost the last messages" in caplog.text, "the loss to be named")
    log.publish(later, blocks(later, 10))
    taker.wait(4)
    link.acknowledge(later.origin, 1)
    link.acknowledge(feed.origin, 1)
    until(lambda: log.floor(link) >= 1, "the first message to be acknowledged")
    assert log.floor(link) == 1
    link.acknowledge(feed.origin, 2)
    until(lambda: log.floor(link) == 3, "all to be acknowledged")


def test_a_consumer_that_an_earlier_attempt_has_left_behind_is_removed(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the brokers make late, when the storage has another one already; those of other storages stay."""
    monkeypatch.setattr(downlink, "CLEANING_INTERVAL", 0.1)
    log, feed, link = begun(one, tmp_path, stack)
    taker = Taker(link)
    log.publish(feed, blocks(feed, 10))
    taker.wait(1)

    async def make(client: Any) -> None:
        for name in (f"{link.durable}_0123abcd", downlink.durable_name("Offline", tmp_path)):
            await client.jetstream().add_consumer(log.name, durable_name=name)

    one.call(make)
    until(lambda: len(log.consumers()) == 2, "one of three to be removed")
    assert len([name for name in log.consumers() if link.is_own(name)]) == 1
    log.publish(feed, blocks(feed, 10))
    taker.wait(2)
    until(lambda: log.floor(link) == 2, "all to be acknowledged")
    assert link.problem == ""


def test_a_consumer_that_sends_no_message_though_it_lives_is_made_anew(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As one whose leader lags behind: a paused consumer gives signs of life, and no message."""
    monkeypatch.setattr(downlink, "LOOK_INTERVAL", 0.1)
    log, feed, link = begun(one, tmp_path, stack)
    taker = Taker(link)
    log.publish(feed, blocks(feed, 10))
    taker.wait(1)
    (paused,) = until(lambda: len(found := log.consumers()) == 1 and found, "one consumer")

    async def pause(client: Any) -> None:
        request = b'{"pause_until": "2999-01-01T00:00:00Z"}'
        answer = await client.request(f"$JS.API.CONSUMER.PAUSE.{log.name}.{paused}", request)
        assert json.loads(answer.data)["paused"]

    one.call(pause)
    log.publish(feed, blocks(feed, 10))
    taker.wait(2)
    assert taker.sequences == [0, 1]
    until(lambda: log.floor(link) == 2 and paused not in log.consumers(), "the new one to take its place")
    line = f"the stream of {log.producer}: the broker that sends it lags behind the others: read anew"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_damaged_messages_are_named_and_nothing_else_is_lost(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    log, feed, link = begun(one, tmp_path, stack)
    taker = Taker(link)
    with caplog.at_level(logging.WARNING):
        first, second, third = blocks(feed, 10, 200, 10)
        log.publish(feed, [first])
        log.damaged(1, b"\x07nonsense")
        log.damaged(1, b"")
        coded = bytearray(stream_data(second))
        coded[-100] ^= 0xFF  # in the packed rows, or in their description
        log.damaged(1, bytes(coded))
        log.publish(feed, [third])
        taker.wait(2)
        assert taker.sequences == [0, 2]
    until(lambda: log.floor(link) == 5, "all to be acknowledged")
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(named) == 3
    assert all(log.producer in line and "missing" in line and "\n" not in line for line in named), named


def stream_data(frame: Any) -> bytes:
    from stream_log import parts

    from larpixdaq.protocol.stream_messages import encode

    return encode(parts(frame))


def test_messages_that_the_stream_has_no_more_are_named(
    one: Brokers, tmp_path: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    log, feed, link = begun(one, tmp_path, stack)
    log.publish(feed, *([block] for block in blocks(feed, *[10] * (WINDOW + 8))))
    until(lambda: link.queued == WINDOW, "as many as may wait")
    log.purge(WINDOW + 4)
    taker = Taker(link)
    taker.wait(WINDOW + 5)
    assert taker.sequences == [*range(WINDOW), *range(WINDOW + 3, WINDOW + 8)]
    line = f"messages {WINDOW + 1} to {WINDOW + 3} of {log.producer} are not in the stream any more"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_monitor_begins_with_the_newest_message_and_skips_what_it_has_no_time_for(
    one: Brokers, stack: contextlib.ExitStack
) -> None:
    log = StreamLog(one, a_producer())
    feed = feed_of(log)
    log.publish(feed, blocks(feed, 10, 10))
    link = Downlink("Online monitor", "latest", brokers_of(one))
    stack.callback(link.close)
    link.connect([log.producer])
    taker = Taker(link, acknowledge=False)

    def reads() -> bool:
        log.publish(feed, blocks(feed, 10))
        return taker.take() > 0

    until(reads, "a block of the monitor")
    assert taker.frames[0].sequence > 1
    log.publish(feed, *([block] for block in blocks(feed, *[5] * 200)), [feed.info("a message")], [feed.end()])
    until(lambda: taker.take() and isinstance(taker.frames[-1], End), "the end record")
    assert len(taker.frames) < 150  # of 200: it took none meanwhile


def test_a_past_run_is_read_whole(one: Brokers, stack: contextlib.ExitStack) -> None:
    log = StreamLog(one, a_producer())
    feeds = [feed_of(log, run) for run in (101, 102, 103)]
    for feed in feeds:
        log.publish(feed, *([block] for block in blocks(feed, *[10] * 100)), [feed.end()])
    assert asyncio.run(downlink.highest_run(brokers_of(one), "storage")) == 103
    assert log.producer in asyncio.run(downlink.producers_of_run(brokers_of(one), "fetch", 102))
    link = Downlink("fetch", "run", brokers_of(one), run=102)
    stack.callback(link.close)
    link.connect([log.producer])
    taker = Taker(link, acknowledge=False)
    until(lambda: not taker.take() and link.is_complete, "all of the run")
    assert taker.sequences == list(range(101))
    assert {frame.run for frame in taker.frames} == {102}


def test_no_broker_and_no_stream_are_one_clear_line(
    tmp_path: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from processes import free_port

    from larpixdaq.stream import jetstream

    nowhere = jetstream.Brokers((f"nats://127.0.0.1:{free_port()}",))
    link = Downlink("Offline storage", "all", nowhere, directory=tmp_path)
    stack.callback(link.close)
    link.connect(["LArPix board"])
    until(lambda: "no broker" in link.problem, "the reason")
    assert "\n" not in link.problem
    made = stack.enter_context(brokers(1))
    other = storage(made, tmp_path, stack)
    with caplog.at_level(logging.INFO):
        other.connect(["LArPix board"])
        until(lambda: "does not exist" in caplog.text, "a look at the stream")
        assert other.problem == ""  # because its producer has just come
    other.begin(1, [])
    monkeypatch.setattr(downlink, "MISSING_AFTER", 0.0)
    until(lambda: "does not exist" in other.problem, "the reason")
    other.connect([])
    until(lambda: other.problem == "", "the producer to be gone")
    other.connect(["LArPix board"])
    until(lambda: "does not exist" in other.problem, "the reason again")
    log = StreamLog(made)  # and then the producer makes it
    feed = feed_of(log)
    log.publish(feed, blocks(feed, 10))
    Taker(other).wait(1)
    assert other.problem == ""


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 5)),
        st.tuples(st.just("take"), st.integers(1, 12)),
        st.tuples(st.just("store"), st.integers(0, 12)),
        st.tuples(st.just("resubscribe"), st.just(0)),
        st.tuples(st.just("renew"), st.just(0)),
        st.tuples(st.just("die"), st.just(0)),
    ),
    min_size=3,
    max_size=20,
)


@settings(max_examples=examples(12))
@given(actions=ACTIONS)
def test_no_frame_is_lost_or_follows_a_gap_whatever_happens(one: Brokers, tmp_path_factory: Any, actions: Any) -> None:
    """`stored` is what the files have. A storage that dies keeps it, and its successor gets all that follows."""
    log = StreamLog(one, a_producer())
    feed = feed_of(log)
    folder = tmp_path_factory.mktemp("storage")
    published = stored = seen = 0
    with contextlib.ExitStack() as stack:

        def start() -> Downlink:
            link = storage(one, folder, stack, newest_run=lambda: 1)
            link.connect([log.producer])
            if stored:  # as a storage does that has read its files
                link.acknowledge(feed.origin, stored)
            return link

        def take(most: int) -> int:
            nonlocal seen
            select.select([link.fileno()], [], [], 0.02)
            taken = 0
            while taken < most and (received := link.next()) is not None:
                frame = received[1]
                assert isinstance(frame, Block)
                assert frame.sequence <= seen, "a frame after a gap"
                seen = max(seen, frame.following)
                taken += 1
            return taken

        link = start()
        for action, many in actions:
            if action == "publish":
                log.publish(feed, blocks(feed, *[3] * many, seed=published))
                published += many
            elif action == "take":
                take(many)
            elif action == "store":
                stored = max(stored, min(seen, stored + many))
                if stored:
                    link.acknowledge(feed.origin, stored)
            elif action == "resubscribe":
                link.resubscribe()
                seen = stored
            elif action == "renew":
                link._post(lambda link=link: [reader.renew() for reader in link._readers.values()])
            else:
                link.close()
                link, seen = start(), stored
        until(lambda: take(100) is not None and seen == published, f"all of {published} frames")
        if published:
            link.acknowledge(feed.origin, published)
            until(lambda: log.floor(link) == last_of(log), "all to be acknowledged")


def last_of(log: StreamLog) -> int:
    async def ask(client: Any) -> int:
        found: int = (await client.jetstream().stream_info(log.name)).state.last_seq
        return found

    found: int = log.brokers.call(ask)
    return found


def test_names_of_durable_consumers_differ_by_storage_and_directory(tmp_path: Path) -> None:
    made = [
        downlink.durable_name(name, tmp_path / folder)
        for name in ("Offline storage", "Offline_storage", "copy.2")
        for folder in ("a", "b")
    ]
    assert len(set(made)) == 6
    assert all(name.replace("_", "").replace("-", "").isalnum() and len(name) < 80 for name in made)
    link = Downlink("copy.2", "all", jetstream.Brokers(()), directory=tmp_path / "a")
    assert [link.is_own(made[4] + end) for end in ("", "_", "_0f", "0", "_x")] == [True, True, True, False, False]
    link.close()
