"""A producer's uplink with real brokers: each block is in the stream once and in order, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from brokers import Brokers, brokers
from jetstream_frames import PRODUCER, check, frames_of
from nats.js.errors import APIError
from processes import LIMIT, until
from stream_harness import LAYOUT, Core, Line, make_consumer

from larpixdaq.keys.curve import Admission, new_pair
from larpixdaq.protocol.control import ConsumerSession, Endpoint, Update, session_digest
from larpixdaq.protocol.stream_messages import EXPECTED_SEQUENCE, ID, Frame, Identity, Unpacker
from larpixdaq.stream import jetstream, publisher
from larpixdaq.stream.jetstream import Settings
from larpixdaq.stream.uplink import Uplink, uplink_name

SETTINGS = Settings(1, 1 << 28, 3600.0)


class Station:
    """The parts of a producer that make blocks, and their uplink."""

    def __init__(self, folder: Path, servers: str, settings: Settings = SETTINGS) -> None:
        self.line = Line(folder=folder, extra=64 << 20)
        endpoint = Endpoint(self.line.address)
        self.uplink = Uplink(
            self.line.publisher, endpoint, PRODUCER, jetstream.Brokers(jetstream.parse_servers(servers)), settings
        )

    def begin(self, run: int = 1) -> None:
        self.line.begin(run, (self.uplink.name,))

    def work(self) -> None:
        self.uplink.work()
        self.line.publisher.socket.poll(5)
        self.line.work()

    def until(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"waited {limit} s for {what}; {self.uplink.status()}"
            self.work()

    def until_stored(self, limit: float = LIMIT) -> None:
        self.until(lambda: not self.line.publisher.pending(), "all blocks to be stored", limit)

    def until_problem(self, text: str, limit: float = LIMIT) -> str:
        self.until(lambda: text in self.uplink.status().problem, f"the problem {text!r}", limit)
        problem = self.uplink.status().problem
        assert "\n" not in problem
        return problem

    @property
    def pid(self) -> int:
        return self.uplink._process.pid

    def close(self) -> None:
        self.uplink.close()
        self.line.close()


@contextmanager
def station(folder: Path, servers: str, settings: Settings = SETTINGS) -> Iterator[Station]:
    made = Station(folder, servers, settings)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def one() -> Iterator[Brokers]:
    with brokers(1) as made:
        yield made


@pytest.fixture
def single() -> Iterator[Brokers]:
    with brokers(1) as made:
        yield made


def test_each_block_is_in_the_stream_once_and_in_order(single: Brokers, tmp_path: Path) -> None:
    with station(tmp_path, single.urls) as made:
        made.begin()
        made.line.recorder.info("Beginning run")
        for n in (1, 5, 63, 64, 1000, 16384, 3, 16384, 16384):
            made.line.write(n)
            made.work()
        made.line.end()
        made.until_stored()
        assert check(frames_of(single)) == list(range(made.line.written))
        made.begin(2)
        made.line.write(100)
        made.line.end()
        made.until_stored()
        assert len(frames_of(single, 2)) == 2
        made.until(lambda: 0 < made.uplink.status().acknowledged_messages == made.uplink.status().messages, "status")
        status = made.uplink.status()
        assert status.connected
        assert not status.problem
        assert status.acknowledged_bytes == status.bytes > 0
        assert status.stream == "larpixdaq_board"
        assert status.restarts == status.lost_messages == 0


def test_killed_processes_and_brokers_lose_and_double_nothing(single: Brokers, tmp_path: Path) -> None:
    """The process is killed and stopped, and the broker killed, between any two messages."""
    draw = random.Random(11)
    with station(tmp_path, single.urls) as made:
        made.begin()
        for turn in range(30):
            for _ in range(draw.randrange(1, 12)):
                made.line.write(draw.choice((3, 500, 16384)))
                made.work()
            event = draw.randrange(6)
            if event == 0 and made.uplink._process.alive:
                os.kill(made.pid, signal.SIGKILL)
            elif event == 1:
                single.kill(0)
                made.work()
                single.start(0, wait=False)
            elif event == 2:
                single.stop(0)
                for _ in range(draw.randrange(1, 60)):
                    made.work()
                single.resume(0)
            if turn % 10 == 9:
                made.until_stored(60.0)
        made.line.end()
        made.until_stored(60.0)
        assert check(frames_of(single)) == list(range(made.line.written))
        assert made.uplink.status().restarts > 0
        assert made.uplink.status().lost_messages == 0


@pytest.mark.cluster
def test_a_killed_leader_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with brokers(3) as cluster, station(tmp_path, cluster.urls, Settings(3, 1 << 28, 3600.0)) as made:
        made.begin()
        for follower in (True, False):
            made.line.write(1000)
            made.until_stored(60.0)
            leader = cluster.leader_of("larpixdaq_board")
            killed = (leader + 1) % 3 if follower else leader
            for n in range(40):
                made.line.write(4000)
                made.work()
                if n == 5:
                    cluster.kill(killed)
            made.until_stored(60.0)
            cluster.start(killed)
        made.line.end()
        made.until_stored(60.0)
        assert check(frames_of(cluster)) == list(range(made.line.written))
        assert made.uplink.status().lost_messages == 0


def test_a_restarted_uplink_resends_no_block_that_is_stored(single: Brokers, tmp_path: Path) -> None:
    """The acknowledgement of the brokers came, and that of the uplink did not: the producer is stopped meanwhile."""
    with station(tmp_path, single.urls) as made:
        made.begin()
        made.line.write(3)
        made.until_stored()
        for _ in range(5):
            made.line.write(100)
        made.line.publisher.work()  # sends them, and takes no acknowledgement

        async def stored(client: Any) -> int:
            return int((await client.jetstream().stream_info("larpixdaq_board")).state.last_seq)

        made.line.publisher.socket.poll(1000)
        last = single.call(stored)
        os.kill(made.pid, signal.SIGKILL)
        made.line.end()
        made.until_stored()
        assert last >= 1
        assert check(frames_of(single)) == list(range(503))


def test_blocks_are_held_while_there_is_no_broker(single: Brokers, tmp_path: Path) -> None:
    single.kill(0)
    with station(tmp_path, single.urls.replace("nats://", "nats://user:secret@")) as made:
        problem = made.until_problem("no broker: ")
        assert single.url(0) in problem
        assert "secret" not in str(made.uplink.status())
        made.begin()
        for _ in range(3):
            made.line.write(100)
        made.line.end()
        assert made.line.publisher.pending() == 4
        single.start(0, wait=False)
        made.until_stored()
        made.until(lambda: made.uplink.status().connected, "connected")
        assert check(frames_of(single)) == list(range(300))


def test_wrong_password(tmp_path: Path) -> None:
    with brokers(1, password="right") as cluster:
        for login, found in (("", "refused"), ("larpixdaq:wrong@", "refused"), ("larpixdaq:right@", "")):
            with station(tmp_path, cluster.urls.replace("nats://", f"nats://{login}")) as made:
                if found:
                    assert "user, password or credentials are refused" in made.until_problem(found)
                else:
                    made.until(lambda: made.uplink.status().connected, "connected")


def test_a_stream_with_other_settings_is_refused(one: Brokers, tmp_path: Path) -> None:
    with station(tmp_path, one.urls) as made:
        made.until(lambda: made.uplink.status().connected, "connected")
    with station(tmp_path, one.urls, Settings(1, 1 << 27, 60.0)) as made:
        problem = made.until_problem("10058")
    assert "stream larpixdaq_board: the brokers have it with other settings: " in problem
    assert "max_bytes is 268 MB, expected 134 MB, max_age is 60 min, expected 1 min" in problem


def test_brokers_without_room_for_the_stream(tmp_path: Path) -> None:
    with brokers(1, limit=1 << 20) as cluster, station(tmp_path, cluster.urls) as made:
        made.until_problem("the brokers have no room for the stream (error 10047)")


def test_three_replicas_need_three_brokers(single: Brokers, tmp_path: Path) -> None:
    with station(tmp_path, single.urls, Settings(3, 1 << 28, 3600.0)) as made:
        made.until_problem("a single broker keeps one replica only (error 10074)")


def change_configuration(cluster: Brokers, change: Callable[[dict[str, Any]], Any]) -> None:
    """Start a single broker again with a changed configuration."""
    path = cluster.directory(0) / "nats-server.conf"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    cluster.terminate(0)
    cluster.start(0, wait=False)


def test_a_broker_without_jetstream(single: Brokers, tmp_path: Path) -> None:
    change_configuration(single, lambda content: content.pop("jetstream"))
    with station(tmp_path, single.urls) as made:
        made.until_problem("no JetStream")


def random_write(line: Line, n: int) -> None:
    """Write a block of n random rows, or fewer as Line.write(), which cannot be packed smaller."""
    rows = line.recorder.rows()
    assert rows is not None
    n = min(n, len(rows))
    rows[:n] = np.frombuffer(np.random.default_rng(line.written).bytes(n * LAYOUT.dtype.itemsize), LAYOUT.dtype)
    rows["timestamp"][:n] = np.arange(line.written, line.written + n)
    rows["packet_type"][:n] = 0
    line.recorder.publish(n)
    line.recorder.close_block()
    line.written += n


def test_blocks_above_the_limit_of_the_brokers_are_cut(single: Brokers, tmp_path: Path) -> None:
    change_configuration(single, lambda content: content.update(max_payload=1 << 16, max_pending=1 << 22))
    with station(tmp_path, single.urls) as made:
        made.begin()
        for n in (10, 3000, 16384, 1000, 16384, 2):
            random_write(made.line, n)
        made.until(lambda: made.uplink.status().acknowledged_messages > 3, "some pieces")
        os.kill(made.pid, signal.SIGKILL)
        random_write(made.line, 5000)
        made.line.end()
        made.until_stored()
        assert check(frames_of(single)) == list(range(made.line.written))


def test_too_small_a_limit_of_the_brokers_is_refused(single: Brokers, tmp_path: Path) -> None:
    change_configuration(single, lambda content: content.update(max_payload=1 << 12))
    with station(tmp_path, single.urls) as made:
        made.until_problem("expected max_payload of at least 65.5 kB")


def test_a_full_stream_takes_no_more_until_storages_have_it(single: Brokers, tmp_path: Path) -> None:
    with station(tmp_path, single.urls, Settings(1, 4 << 20, 0.0)) as made:
        made.begin()
        frames: list[Frame] = []
        unpacker = Unpacker(PRODUCER)

        async def take(client: Any) -> None:
            """Take all messages, as the storage "first" does."""
            from nats.js import api

            config = api.ConsumerConfig(durable_name="first", ack_policy=api.AckPolicy.ALL)
            subscription = await client.jetstream().pull_subscribe("larpixdaq.board.*", "first", config=config)
            while (await subscription.consumer_info()).num_pending:
                for message in await subscription.fetch(10, timeout=5):
                    frames.extend(unpacker.unpack(message.data))
                    await message.ack()

        def write(rows: int) -> None:
            wanted = made.line.written + rows
            while made.line.written < wanted:
                random_write(made.line, 8000)
                made.work()

        def drain() -> None:
            deadline = time.monotonic() + 60
            while made.line.publisher.pending():
                assert time.monotonic() < deadline, made.uplink.status()
                single.call(take)
                for _ in range(20):
                    made.work()

        write(250_000)  # 7 MB
        made.until_problem("and no storage reads it")
        drain()
        write(250_000)
        made.until_problem("and the storage first has none of it")
        made.line.end()
        drain()
        made.until(lambda: not made.uplink.status().problem, "no problem")
        assert made.uplink.status().fill is not None
        single.call(take)
        assert check(frames) == list(range(made.line.written))


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_late_message_of_a_dead_uplink(single: Brokers, tmp_path: Path, late: bool) -> None:
    """It arrives before or after the first message of the next uplink, which has read the end of the stream before
    both: it takes its place in the stream, or none."""
    with station(tmp_path, single.urls) as made:
        made.until(lambda: made.uplink.status().connected, "connected")
        made.begin()
        made.line.write(100)
        made.until(lambda: made.line.publisher.subscribers, "the uplink's subscription")

        async def first(client: Any) -> Any:
            return await client.jetstream().get_msg("larpixdaq_board", seq=1)

        async def messages(client: Any) -> int:
            return int((await client.jetstream().stream_info("larpixdaq_board")).state.last_seq)

        made.line.publisher.work()  # sends the block, and takes no acknowledgement
        until(lambda: single.call(messages), "the message")
        message = single.call(first)
        assert message.headers[EXPECTED_SEQUENCE] == "0"
        os.kill(made.pid, signal.SIGKILL)

        async def forget(client: Any) -> None:
            """Leave the stream as if the message were still on its way."""
            await client.jetstream().delete_stream("larpixdaq_board")
            await jetstream.ensure_stream(client.jetstream(), PRODUCER, SETTINGS)

        async def arrive(client: Any) -> None:
            await client.jetstream().publish("larpixdaq.board.1", message.data, headers=message.headers)

        single.call(forget)

        def works() -> bool:
            made.uplink.work()
            return made.uplink.status().restarts == 1 and made.uplink.status().connected

        until(works, "the next uplink to read the end of the stream")
        if not late:
            single.call(arrive)
        made.line.write(100)
        made.line.end()
        made.until_stored()
        if late:
            with pytest.raises(APIError, match="wrong last sequence"):
                single.call(arrive)
        assert check(frames_of(single)) == list(range(200))
        assert made.uplink.status().lost_messages == 0


def test_messages_of_another_program_stop_nothing(single: Brokers, tmp_path: Path) -> None:
    with station(tmp_path, single.urls) as made:
        made.begin()
        made.line.write(10)
        made.until_stored()

        async def disturb(client: Any) -> None:
            await client.jetstream().publish("larpixdaq.board.1", b"noise")

        single.call(disturb)
        made.line.write(10)
        made.until_stored()
        single.call(disturb)
        os.kill(made.pid, signal.SIGKILL)
        made.line.write(10)
        made.line.end()
        made.until_stored()

        async def identities(client: Any) -> list[Any]:
            context = client.jetstream()
            last = (await context.stream_info("larpixdaq_board")).state.last_seq
            return [(await context.get_msg("larpixdaq_board", seq=sequence)).headers for sequence in range(1, last + 1)]

        found = [headers[ID] for headers in single.call(identities) if headers]
        assert [Identity.parse(text)[2:4] for text in found][-1][1] == 4
        assert [Identity.parse(text).first for text in found] == [
            0,
            *(Identity.parse(text).next for text in found[:-1]),
        ]


def test_a_removed_stream_is_made_anew_and_the_loss_is_said(
    single: Brokers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with station(tmp_path, single.urls) as made:
        made.begin()
        for _ in range(3):
            made.line.write(10)
            made.until_stored()

        async def remove(client: Any) -> None:
            await client.jetstream().delete_stream("larpixdaq_board")

        single.call(remove)
        made.line.write(10)
        made.line.end()
        made.until_stored()
        made.until(lambda: made.uplink.status().lost_messages == 3, "lost messages in the status")
        assert [frame.following for frame, _ in frames_of(single)] == [4, 5]
    assert "the brokers have lost 3 messages" in caplog.text


def test_two_uplinks_never_publish_in_turns(single: Brokers, tmp_path: Path) -> None:
    """A second producer of the same name: each message directly follows the one that its sender knows."""
    (tmp_path / "other").mkdir()
    with station(tmp_path, single.urls) as made, station(tmp_path / "other", single.urls) as other:
        for each, run in ((made, 1), (other, 2)):
            each.begin(run)
        for _ in range(30):
            for each in (made, other):
                each.line.write(500)
                each.work()
        for each in (made, other):
            each.line.end()
        deadline = time.monotonic() + 60
        while made.line.publisher.pending() or other.line.publisher.pending():
            assert time.monotonic() < deadline
            made.work()
            other.work()
        for each, run in ((made, 1), (other, 2)):
            assert check(frames_of(single, run)) == list(range(each.line.written))


def test_only_the_child_has_its_name(single: Brokers, tmp_path: Path) -> None:
    """With keys, and without the core's word: the child subscribes; others of its name or without a key do not."""
    context: zmq.Context[Any] = zmq.Context()
    pair = new_pair()
    admission = Admission(context, pair, "stream")
    socket = publisher.stream_router(context)
    admission.door.guard(socket)
    socket.bind("tcp://127.0.0.1:0")
    endpoint = Endpoint(socket.get(zmq.LAST_ENDPOINT).decode(), pair.public)
    line = Line(folder=tmp_path)
    made = publisher.Publisher(line.publisher.own, socket, forget_after=60.0, admission=admission)
    uplink = Uplink(made, endpoint, PRODUCER, jetstream.Brokers(jetstream.parse_servers(single.urls)), SETTINGS)
    try:

        def work(condition: Callable[[], Any], what: str) -> None:
            deadline = time.monotonic() + LIMIT
            while not condition():
                assert time.monotonic() < deadline, f"waited for {what}"
                uplink.work()
                socket.poll(5)
                made.work()

        work(lambda: made.subscribers, "the child's subscription")
        (route,) = made.subscribers
        other = new_pair()  # a member, which the core knows under the same name
        keys = {other.public: uplink.name}
        made.admit(
            Update(
                consumers={uplink.name: ConsumerSession(other.public, session_digest("s"))}, keys=keys, insecure=False
            )
        )
        core = Core()
        core.key_pair = other  # type: ignore[assignment]
        core.heard = core.confirmed = float("inf")
        thief = make_consumer(uplink.name, core=core)
        thief.connect({"board": endpoint})
        try:
            work(lambda: made.refused >= 2, "the refusal")
            assert list(made.subscribers) == [route]
        finally:
            thief.close()
    finally:
        uplink.close()
        admission.door.close()
        context.destroy(linger=0)
        line.close()


def test_the_name_of_an_uplink_is_limited() -> None:
    assert uplink_name("LArPix board") == "LArPix board uplink"
    assert len(uplink_name("é" * 32).encode()) <= 64
