"""The stream over real sockets, from a producer's ring to consumers."""

import contextlib
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMIT
from stream_harness import LAYOUT, STORAGE, Core, Line, Reader, make_consumer, until

from larpixdaq import constants
from larpixdaq.errors import ProtocolError
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.stream import (
    MAX_FROM_CONSUMER,
    MAX_POSITIONS,
    Ack,
    Block,
    BlockOrigin,
    Bye,
    Configurations,
    Credit,
    End,
    Gap,
    Hello,
    LossVerdict,
    Position,
    Refused,
    Totals,
    UnknownWord,
    Welcome,
    pack,
    unpack_consumer,
    unpack_producer,
)
from larpixdaq.stream import Consumer, publisher
from larpixdaq.stream.subscriber import CREDIT, MAX_DISCONNECTED, RING_CREDIT


@pytest.fixture(params=["packed", "read out of the ring"])
def line(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Line]:
    line = Line(folder=None if request.param == "packed" else tmp_path)
    yield line
    line.close()


@pytest.fixture
def sockets() -> Iterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def consumers() -> Iterator[list[Consumer]]:
    made: list[Consumer] = []
    yield made
    for consumer in made:
        consumer.close()


def test_every_block_in_order_and_freed_when_acknowledged(line: Line, consumers: list[Consumer]) -> None:
    consumers.append(make_consumer())
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0])
    line.begin()
    line.recorder.info("Beginning run")
    for n in (1, 5, 1000, 16384, 3, 16384, 16384):
        line.write(n)
    until(line, reader.has(lambda r: len(r.blocks) == 8), "8 blocks")
    end = line.end()
    until(line, reader.has(lambda r: r.ends), "the end record")
    assert [b.sequence for b in reader.blocks] == list(range(8))
    assert reader.stamps == list(range(line.written))
    assert reader.blocks[0].text == "Beginning run"
    assert reader.blocks[3].first_packet == 1 + 1 + 5
    assert reader.ends == [end]
    assert end.next == 8
    until(line, lambda: line.ring.tail == line.ring.head == 9, "the ring to be freed")
    totals = {t.io_group: t for t in reader.blocks[-1].totals}
    assert totals[1].packets == line.written
    assert not line.publisher.own.segments


def test_blocks_without_acknowledgement_are_kept_and_sent_again_to_a_new_subscription(
    line: Line, consumers: list[Consumer]
) -> None:
    first = make_consumer(session="s1")
    consumers.append(first)
    first.connect({"board": line.endpoint})
    reader = Reader(first, acknowledge=False)
    line.begin()
    for _ in range(4):
        line.write(100)
    until(line, reader.has(lambda r: len(r.blocks) == 4), "4 blocks")
    assert line.ring.tail == 0
    second = make_consumer(session="s2", positions=lambda: [Position(1, "board", 5, 2)])
    consumers.append(second)
    second.connect({"board": line.endpoint})
    again = Reader(second)
    until(line, again.has(lambda r: len(r.blocks) == 2), "the two blocks that it does not have")
    assert [b.sequence for b in again.blocks] == [2, 3]
    until(line, lambda: line.ring.tail == 4, "the ring to be freed")
    until(line, reader.has(lambda r: r.other), "the first consumer to be refused")


def test_frames_of_a_previous_subscription_are_discarded(line: Line, consumers: list[Consumer]) -> None:
    """A consumer that skipped blocks and subscribes again must not get a later block before them."""
    consumers.append(make_consumer())
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0], acknowledge=False)
    line.begin()
    for _ in range(3):
        line.write(10)
    until(line, reader.has(lambda r: len(r.blocks) == 3), "3 blocks")
    for _ in range(3):
        line.write(10)
    until(line, lambda: consumers[0].queued == 3, "3 more to wait")
    consumers[0].resubscribe()
    assert consumers[0].next() is None
    until(line, reader.has(lambda r: len(r.blocks) == 9), "all of them anew")
    assert [block.sequence for block in reader.blocks] == [0, 1, 2, 0, 1, 2, 3, 4, 5]


def refused(reader: Reader) -> bool:
    return any(isinstance(frame, Refused) for frame in reader.other)


def test_a_stalled_consumer_does_not_insist_on_its_name(line: Line, consumers: list[Consumer]) -> None:
    """Another consumer may have its name now, and the newest HELLO of a name wins: the core must answer first."""
    core, ahead = Core(), [0.0]
    stopped = make_consumer(session="s1", core=core, clock=lambda: time.monotonic() + ahead[0])
    consumers.append(stopped)
    stopped.connect({"board": line.endpoint})
    reader = Reader(stopped)
    line.begin()
    line.write(10)
    until(line, reader.has(lambda r: len(r.blocks) == 1), "a block")
    until(line, lambda: not line.publisher.pending(), "its acknowledgement")
    other = make_consumer(session="s2")
    core.heard = time.monotonic() + 1000  # it still sends messages
    ahead[0] = 10.0
    consumers.append(other)
    other.connect({"board": line.endpoint})
    new = Reader(other)
    until(line, reader.has(refused), "the first consumer to be superseded")
    stopped.session = "s1 anew"
    for _ in range(5):
        line.write(10)
        until(line, new.has(lambda r: len(r.blocks) == line.written // 10 - 1), "blocks at the newer consumer")
    assert not refused(new)
    core.confirmed = time.monotonic() + ahead[0] + 1
    until(line, new.has(refused), "the first consumer to be back, because the core has confirmed it")


def test_the_window_limits_the_bytes_on_their_way(line: Line, consumers: list[Consumer]) -> None:
    consumers.append(make_consumer())
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0], acknowledge=False)
    line.begin()
    block_bytes = constants.BLOCK_ROWS * LAYOUT.dtype.itemsize
    for _ in range(40):
        line.write(constants.BLOCK_ROWS)
    most = (16 << 20) // block_bytes + 1
    until(line, reader.has(lambda r: len(r.blocks) == most), f"{most} blocks")
    for _ in range(20):
        line.publisher.socket.poll(5)
        line.publisher.work()
    reader.take()
    assert len(reader.blocks) == most
    reader.acknowledge = True
    consumers[0].acknowledge(BlockOrigin(1, "board", 5), most)
    until(line, reader.has(lambda r: len(r.blocks) == 40), "the rest")
    assert reader.stamps == list(range(line.written))


def test_a_storage_that_is_not_required_gets_no_blocks_of_the_run(line: Line, consumers: list[Consumer]) -> None:
    consumers.append(make_consumer("second storage"))
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0])
    until(line, reader.has(lambda r: r.other), "WELCOME")
    line.begin(1)
    line.write(10)
    line.end()
    line.begin(2, ("second storage",))
    line.write(10)
    until(line, reader.has(lambda r: r.blocks), "a block of run 2")
    assert {b.run for b in reader.blocks} == {2}


def test_a_monitor_without_credit_skips_blocks_but_never_messages(line: Line, consumers: list[Consumer]) -> None:
    consumers.append(make_consumer("Online monitor", "m", "latest"))
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0], acknowledge=False)
    until(line, reader.has(lambda r: r.other), "WELCOME")
    reads = line.ring_file is not None
    credit = RING_CREDIT if reads else CREDIT
    until(line, lambda: any(s.credit == credit for s in line.publisher.subscribers.values()), "credit")
    line.begin(1, ())
    blocks = credit + 10
    for _ in range(blocks):
        line.write(10)
    line.recorder.info("Ending run")
    line.end()
    until(line, reader.has(lambda r: r.ends), "the end record")
    *sequences, last = [block.sequence for block in reader.blocks]
    assert len(sequences) == credit
    assert sequences == sorted(set(sequences))
    assert last == blocks
    assert reader.blocks[-1].text == "Ending run"
    totals = {t.io_group: t.packets for t in reader.blocks[-1].totals}
    assert totals[1] == 10 * blocks  # exact although blocks were skipped
    assert line.ring.tail == line.ring.head  # it held no rows in the ring


@settings(max_examples=examples(20))
@given(every=st.floats(1.0, 20.0), boards=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_a_sample_has_equal_parts_of_all_boards_and_times(every: float, boards: int, seed: int) -> None:
    """Blocks come from the boards in turn, so that a sample of every n-th one would have only some boards."""
    random.seed(seed)
    sample = publisher.Sample()
    sample.every = every
    taken = np.array([sample.takes_next() for _ in range(4800)])
    if every == 1.0:
        assert taken.all()
    for piece in taken.reshape(8, 600):
        assert piece.sum() == pytest.approx(600 / every, abs=3 * np.sqrt(600 / every) / every + 2)
    for board in range(boards):
        part = taken[board::boards]
        assert part.mean() == pytest.approx(taken.mean(), abs=6 * np.sqrt(taken.mean() / len(part)))


def test_a_monitor_gets_the_part_of_the_blocks_that_it_wants(tmp_path: Path, consumers: list[Consumer]) -> None:
    with contextlib.closing(Line(folder=tmp_path)) as line:
        consumers.append(make_consumer("Online monitor", "m", "latest"))
        consumers[0].connect({"board": line.endpoint})
        consumers[0].sample(10.0)
        reader = Reader(consumers[0], acknowledge=False)
        until(line, lambda: any(s.credit == RING_CREDIT for s in line.publisher.subscribers.values()), "credit")
        assert [s.sample.every for s in line.publisher.subscribers.values()] == [10.0]
        line.begin(1, ())
        for _ in range(15):
            for _ in range(20):
                line.write(10)
            line.work()
            reader.take()
        line.end()
        until(line, reader.has(lambda r: r.ends), "the end record")
        assert len(reader.blocks) == pytest.approx(30, abs=1)
        assert sorted(set(reader.stamps)) == reader.stamps


def test_a_silent_subscriber_is_dropped_and_subscribes_again(line: Line, consumers: list[Consumer]) -> None:
    now = [0.0]
    line.publisher._clock = lambda: now[0]
    consumers.append(make_consumer())
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0])
    until(line, lambda: line.publisher.subscribers, "the subscription")
    now[0] += 1000.0
    line.publisher._emptied_at = now[0]  # as if the socket had been found empty after a long silence
    for subscriber in list(line.publisher.subscribers.values()):
        subscriber.heard_at = now[0] - 2
    line.begin()
    line.write(10)
    until(line, reader.has(lambda r: len(r.blocks) >= 1), "the block after a new HELLO")


def test_a_stalled_producer_drops_no_subscriber(line: Line, consumers: list[Consumer]) -> None:
    now = [0.0]
    line.publisher._clock = lambda: now[0]
    consumers.append(make_consumer())
    consumers[0].connect({"board": line.endpoint})
    until(line, lambda: line.publisher.subscribers, "the subscription")
    (subscriber,) = line.publisher.subscribers.values()
    assert line.publisher.socket.poll(int(LIMIT * 1000)), "a repeated frame"
    now[0] += 5.0  # the whole process stalled; the frames that came meanwhile wait in the socket
    line.publisher.work()
    assert line.publisher.subscribers == {subscriber.route: subscriber}


BUSY = """
import sys, zmq
from larpixdaq.stream.publisher import stream_router

socket = stream_router(zmq.Context())
socket.bind("tcp://127.0.0.1:0")
print(socket.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
sys.stdin.readline()
while socket.poll(100):
    socket.recv_multipart()
print("done", flush=True)
"""


def test_a_peer_that_dies_with_a_full_queue_does_not_end_the_producer() -> None:
    """libzmq aborts the process in that case when its own heartbeats are in use."""
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.set_hwm(0)
            peer.linger = int(LIMIT * 1000)
            peer.connect(child.stdout.readline().strip())
            for _ in range(1500):
                peer.send(b"x" * 20)
        # The peer has gone, and the producer reads nothing while libzmq sends some of its heartbeats.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.8)
        assert child.communicate("\n", LIMIT)[0] == "done\n"
    finally:
        child.kill()
        child.communicate()


def raw_peer(line: Line) -> zmq.Socket[bytes]:
    peer = line.context.socket(zmq.DEALER)
    peer.connect(line.address)
    line.peers.append(peer)
    return peer


def answer(line: Line, peer: zmq.Socket[bytes]) -> Any:
    until(line, lambda: peer.poll(0), "an answer")
    return unpack_producer(peer.recv(), "producer")


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([pack(Credit(5))], "hello"),
        ([pack(Ack(1, 5, 3))], "hello"),
        ([pack(Hello(99, "x", "", "all", []))], "version"),
        ([pack(Hello(1, "x", "", "some", []))], "mode"),
        ([b""], "expected 2 to"),
        ([b"\x01garbage"], "kind 1"),
        ([b"\x02" + pack(Credit(5))[1:]], "another kind"),
        ([pack(Welcome("x", 1, None, 2))], "kind 11"),
        ([b"a", b"b", b"c"], "1 part"),
    ],
)
def test_invalid_frames_are_refused_in_one_line(line: Line, frames: list[bytes], reason: str) -> None:
    peer = raw_peer(line)
    peer.send_multipart(frames)
    refused = answer(line, peer)
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert not line.publisher.subscribers


def test_acknowledgements_of_a_superseded_peer_are_ignored(line: Line) -> None:
    old, new = raw_peer(line), raw_peer(line)
    hello = pack(Hello(1, STORAGE, "", "all", []))
    old.send(hello)
    assert isinstance(answer(line, old), Welcome)
    new.send(hello)
    assert isinstance(answer(line, new), Welcome)
    line.begin()
    line.write(10)
    old.send(pack(Ack(1, 5, 1)))
    reasons = [answer(line, old), answer(line, old)]
    assert [r.reason for r in reasons] == ["superseded", "hello"]
    assert line.ring.tail == 0
    new.send(pack(Ack(1, 4, 1)))  # of another epoch
    new.send(pack(Ack(1, 5, 1)))
    until(line, lambda: line.ring.tail == 1, "the block to be freed")
    new.send(pack(Bye()))
    until(line, lambda: not line.publisher.subscribers, "BYE")


def test_an_acknowledgement_beyond_the_last_block_frees_no_later_block(line: Line) -> None:
    peer = raw_peer(line)
    peer.send(pack(Hello(1, STORAGE, "", "all", [])))
    line.begin()
    line.write(10)
    peer.send(pack(Ack(1, 5, 2**47)))
    until(line, lambda: line.ring.tail == 1, "the block to be freed")
    line.write(10)
    line.publisher.work()
    assert (line.ring.tail, line.ring.head) == (1, 2)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_unpacking(data: bytes) -> None:
    for unpack in (unpack_consumer, unpack_producer):
        with contextlib.suppress(ProtocolError):
            unpack(data, "peer")


BLOCK = Block(1, "p", 2**64 - 1, 0, 0, 0, 2, 0, 1, 2, 0, [Totals(255, 1, 1, 0, 0, 0)], [])
END = End(1, "p", 2**64 - 1, 9, "closed", 1, 2, [[1, *range(22)]], [], [], [])


WRONG: list[tuple[Block | End, dict[str, Any]]] = [
    (BLOCK, {"run": -1}),
    (BLOCK, {"run": 0}),
    (BLOCK, {"run": 10**7}),
    (BLOCK, {"layout": 9}),
    (BLOCK, {"producer": ""}),
    (BLOCK, {"sequence": -1}),
    (BLOCK, {"sequence": 2**48}),
    (BLOCK, {"first_packet": 2**56}),
    (BLOCK, {"rows": 16_385}),
    (BLOCK, {"first_ns": 2**63}),
    (BLOCK, {"crc32": 2**32}),
    (BLOCK, {"totals": [Totals(256, 0, 0, 0, 0, 0)]}),
    (BLOCK, {"gaps": [Gap(1, 1, 1, 1)] * 257}),
    (BLOCK, {"text": "x" * (1 << 21)}),
    (END, {"run": -1}),
    (END, {"counts": [[]]}),
    (END, {"counts": [[1, *range(21)]]}),
    (END, {"counts": [[1] * 23] * 257}),
    (END, {"counts": [[2**56] * 23]}),
    (END, {"outside": [[-1] * 23]}),
    (END, {"how": "closed\n"}),
    (END, {"unknown": [UnknownWord(1, 1, 1, bytes(25))]}),
    (END, {"verdicts": [LossVerdict(1, "fine", "", 0, 0, 0)]}),
]


def test_frames_with_values_out_of_range_are_refused_and_the_next_frame_is_taken(
    sockets: zmq.Context[Any], consumers: list[Consumer], caplog: pytest.LogCaptureFixture
) -> None:
    """No such value may reach a file or a monitor. Each frame is refused, with one line in the log."""
    with sockets.socket(zmq.ROUTER) as producer:
        producer.rcvtimeo = int(LIMIT * 1000)
        producer.bind("tcp://127.0.0.1:0")
        consumers.append(make_consumer())
        consumers[0].connect({"p": Endpoint(producer.getsockopt_string(zmq.LAST_ENDPOINT))})
        route, hello = producer.recv_multipart()
        assert isinstance(unpack_consumer(hello, "c"), Hello)
        welcome = Welcome("p", 5, None, 2)
        for frame in (welcome, *(msgspec.structs.replace(right, **fields) for right, fields in WRONG), END):
            producer.send_multipart([route, pack(frame), *([b""] if isinstance(frame, Block) else [])])
        found: list[Any] = []
        while not found or found[-1] != END:
            select.select([consumers[0].fileno()], [], [], LIMIT)
            received = consumers[0].next()
            if received is not None:
                found.append(received[1])
    assert found == [welcome, END]
    assert all("stream frame of kind" in record.message for record in caplog.records)


def test_the_largest_end_record_fits() -> None:
    words = [UnknownWord(group, 2**64 - 1, 1, bytes(24)) for group in range(256) for _ in range(1000)]
    end = msgspec.structs.replace(END, counts=[[group] + [2**56 - 1] * 22 for group in range(256)], unknown=words)
    assert unpack_producer(pack(end), "p") == end


def test_the_largest_configurations_fit() -> None:
    random = np.random.default_rng(1)
    chips, *registers = (random.integers(0, 256, (256, n), np.uint8) for n in (3, 256, 256, 256))
    found = Configurations("lightpix-1", chips, *registers)
    block = msgspec.structs.replace(BLOCK, rows=1, text=found.text(), configs=found.pack())
    assert unpack_producer(pack(block), "p") == block


def test_the_number_of_connections_to_gone_producers_is_limited(line: Line, consumers: list[Consumer]) -> None:
    consumers.append(make_consumer())
    connections = consumers[0]._connections
    consumers[0].connect({"board": line.endpoint} | {f"gone {n}": Endpoint("tcp://127.0.0.1:1") for n in range(50)})
    until(line, lambda: len(connections) == 51 and connections["board"].subscribed, "the subscription")
    consumers[0].connect({})  # as from a core that was just restarted
    until(line, lambda: len(connections) == 1 + MAX_DISCONNECTED, "most to be dropped")
    assert "board" in connections


def test_the_size_of_a_consumer_s_frame_is_limited(line: Line) -> None:
    positions = [Position(9_999_999, "p" * 64, 2**64 - 1, 2**48 - 1)] * MAX_POSITIONS
    hello = Hello(1, STORAGE, "s" * 64, "all", positions)
    assert unpack_consumer(pack(hello), "c") == hello
    with pytest.raises(ProtocolError, match="length <= 256"):
        unpack_consumer(pack(msgspec.structs.replace(hello, positions=[*positions, positions[0]])), "c")
    with pytest.raises(ProtocolError, match="expected 2 to 131072 bytes, found 4000003"):
        unpack_consumer(b"\1" * 4_000_003, "c")
    assert line.publisher.socket.get(zmq.MAXMSGSIZE) == MAX_FROM_CONSUMER


def test_a_hello_has_the_newest_positions_of_its_producer(line: Line, consumers: list[Consumer]) -> None:
    known = [Position(run, name, 5, 1) for run in range(1, 1001) for name in ("board", "other")]
    consumers.append(make_consumer(positions=lambda: known))
    consumers[0].connect({"board": line.endpoint})
    until(line, lambda: line.publisher.subscribers, "the subscription")
    (subscriber,) = line.publisher.subscribers.values()
    assert {position.producer for position in subscriber.positions} == {"board"}
    assert sorted(position.run for position in subscriber.positions) == list(range(745, 1001))


def test_credit_has_a_limit(line: Line) -> None:
    peer = raw_peer(line)
    peer.send(pack(Hello(1, "Online monitor", "", "latest", [])))
    assert isinstance(answer(line, peer), Welcome)
    peer.send(pack(Credit(2**48 - 1)))
    refused = answer(line, peer)
    assert "at most 64 blocks more than the 0 that were sent" in refused.reason
    (subscriber,) = line.publisher.subscribers.values()
    assert subscriber.credit == 0


def test_the_number_of_consumers_is_limited_but_not_for_required_storages(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MAX_SUBSCRIBERS", 1)
    line.begin()
    monitor, other, storage = raw_peer(line), raw_peer(line), raw_peer(line)
    monitor.send(pack(Hello(1, "Online monitor", "", "latest", [])))
    assert isinstance(answer(line, monitor), Welcome)
    other.send(pack(Hello(1, "other", "", "latest", [])))
    assert "1 consumers have subscribed" in answer(line, other).reason
    storage.send(pack(Hello(1, STORAGE, "", "all", [])))
    assert isinstance(answer(line, storage), Welcome)


def test_frames_of_consumers_take_a_limited_time_of_a_turn(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other frames are taken in the next turns."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    refused: list[str] = []
    monkeypatch.setattr(line.publisher, "_clock", clock)
    monkeypatch.setattr(line.publisher, "_refuse", lambda route, reason: refused.append(reason))
    peer = raw_peer(line)
    for _ in range(20):
        peer.send(pack(Credit(1)))
    until(line, lambda: refused, "the first frames", LIMIT)
    turns = 1
    while len(refused) < 20:
        before = len(refused)
        line.publisher.receive()
        assert len(refused) - before <= 5
        turns += 1
    assert turns >= 4


def test_silent_subscribers_are_dropped_in_a_flood_too(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    line.publisher._clock = lambda: now[0]
    line.publisher._emptied_at = 0.0
    peer = raw_peer(line)
    peer.send(pack(Hello(1, STORAGE, "", "all", [])))
    assert isinstance(answer(line, peer), Welcome)
    monkeypatch.setattr(publisher, "RECEIVE_LIMIT", 0.0)  # never are all frames taken
    for now[0], there in ((0.5, 1), (1.4, 1), (1.6, 0)):
        line.publisher.work()
        assert len(line.publisher.subscribers) == there


def test_a_frame_is_equal_after_packing_and_unpacking() -> None:
    assert unpack_producer(pack(END), "p") == END
    assert msgspec.structs.replace(END, next=8) != END


def test_a_new_run_frees_no_block_of_the_previous_run(line: Line, consumers: list[Consumer]) -> None:
    """The storage was disconnected when run 1 ended: its blocks wait while run 2 is prepared and acknowledged."""
    line.begin(1)
    for _ in range(3):
        line.write(10)
    line.end()
    line.begin(2)
    line.write(10)
    line.publisher.work()
    assert (line.ring.tail, line.publisher.pending()) == (0, 5)
    # It has some blocks of run 2 already, from a previous subscription.
    positions = [Position(1, "board", 5, 1), Position(2, "board", 5, 1)]
    consumers.append(make_consumer(positions=lambda: positions))
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0])
    line.write(10)
    until(line, reader.has(lambda r: len(r.blocks) >= 3), "the blocks that it does not have")
    assert [(b.run, b.sequence) for b in reader.blocks] == [(1, 1), (1, 2), (2, 1)]
    until(line, lambda: line.ring.tail == line.ring.head, "the ring to be freed")


def test_acknowledging_a_later_run_does_not_acknowledge_the_previous_run(line: Line) -> None:
    peer = raw_peer(line)
    peer.send(pack(Hello(1, STORAGE, "", "all", [])))
    assert isinstance(answer(line, peer), Welcome)
    line.begin(1)
    line.write(10)
    line.end()
    line.begin(2)
    line.write(10)
    until(line, lambda: next(iter(line.publisher.subscribers.values())).flight_bytes == 720, "two blocks in flight")
    peer.send(pack(Ack(2, 5, 1)))
    subscriber = next(iter(line.publisher.subscribers.values()))
    until(line, lambda: subscriber.flight_bytes == 360, "the window to open")
    assert line.ring.tail == 0
    peer.send(pack(Ack(1, 5, 2)))
    until(line, lambda: line.ring.tail == 3, "the ring to be freed")
    assert not subscriber.in_flight


def test_a_storage_can_get_blocks_again_that_it_did_not_acknowledge(line: Line, consumers: list[Consumer]) -> None:
    consumers.append(make_consumer())
    consumers[0].connect({"board": line.endpoint})
    reader = Reader(consumers[0], acknowledge=False)
    line.begin()
    line.write(10)
    line.write(20)
    until(line, reader.has(lambda r: len(r.blocks) == 2), "two blocks")
    consumers[0].acknowledge(BlockOrigin(1, "board", 5), 1)
    until(line, lambda: line.ring.tail == 1, "the first to be free")
    consumers[0].resubscribe()
    until(line, reader.has(lambda r: len(r.blocks) == 3), "the second again")
    assert reader.blocks[2] == reader.blocks[1]


def test_acknowledgements_from_before_the_close_are_sent(line: Line) -> None:
    consumer = make_consumer()
    consumer.connect({"board": line.endpoint})
    reader = Reader(consumer, acknowledge=False)
    line.begin()
    line.write(10)
    until(line, reader.has(lambda r: r.blocks), "a block")
    consumer.acknowledge(BlockOrigin(1, "board", 5), 1)
    consumer.close()
    until(line, lambda: line.ring.tail == 1, "the block to be freed")


def test_an_invalid_address_of_a_producer_affects_no_other_producer(
    line: Line, consumers: list[Consumer], caplog: pytest.LogCaptureFixture
) -> None:
    consumers.append(make_consumer())
    consumers[0].connect({"a": Endpoint("nonsense"), "board": line.endpoint})
    reader = Reader(consumers[0])
    line.begin()
    line.write(10)
    until(line, reader.has(lambda r: r.blocks), "a block of the other producer")
    assert sum("cannot subscribe at" in record.message for record in caplog.records) == 1


def test_two_consumers_of_one_name_do_not_supersede_each_other_in_turn(line: Line, consumers: list[Consumer]) -> None:
    """The newer consumer has the name. The other waits until the core has confirmed one of them."""
    core = Core()
    for session in ("old", "new"):
        consumers.append(make_consumer(session=session, core=core if session == "old" else Core()))
        consumers[-1].connect({"board": line.endpoint})
        second = Reader(consumers[-1])
        until(line, second.has(lambda r: r.other), "WELCOME")
    (subscriber,) = line.publisher.subscribers.values()
    first = Reader(consumers[0], acknowledge=False)
    until(
        line,
        first.has(lambda r: any(isinstance(frame, Refused) for frame in r.other)),
        "the older consumer to be refused",
    )
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        line.publisher.socket.poll(20)
        line.publisher.work()
    assert list(line.publisher.subscribers.values()) == [subscriber]
    # The core confirms the older consumer, because it was the newer one that had stalled.
    core.confirmed = time.monotonic()
    until(line, lambda: list(line.publisher.subscribers.values()) != [subscriber], "the confirmed consumer to be back")
    until(
        line,
        second.has(lambda r: any(isinstance(frame, Refused) for frame in r.other)),
        "the other consumer to be refused",
    )
