"""Connecting sockets whose peer sends too much: a message without end, or more than may wait."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from processes import LIMIT, until
from raw_sockets import Context, RawPeer
from source_driver import Driver
from stream_harness import Line, make_consumer
from stream_harness import until as run_until

from larpixdaq.control import connection as control_connection
from larpixdaq.control.connection import CoreConnection
from larpixdaq.control.log_shipping import LogShipper
from larpixdaq.keys import inflow
from larpixdaq.keys.curve import Client, Doorkeeper, new_pair
from larpixdaq.keys.inflow import Inflow
from larpixdaq.protocol.control import Endpoint, Heartbeat, Open
from larpixdaq.protocol.stream import Block, Hello, Welcome, pack, unpack_consumer
from larpixdaq.sources import command_channel, zmq_board
from larpixdaq.sources.pacman import PacmanSource
from larpixdaq.stream import subscriber

#: The limits of the clients in these tests, bytes.
LARGEST = 1 << 20
MOST = LARGEST + 200_000


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflow, "UNFINISHED", MOST - LARGEST)
    monkeypatch.setattr(control_connection, "MAX_ANSWER", LARGEST)
    monkeypatch.setattr(subscriber, "MAX_HEADER", LARGEST // 3)
    monkeypatch.setattr(subscriber, "MAX_WAITING", LARGEST)
    monkeypatch.setattr(zmq_board, "LARGEST_MESSAGE", LARGEST)
    monkeypatch.setattr(command_channel, "_LARGEST_REPLY", LARGEST)


@contextlib.contextmanager
def core_connection(address: str) -> Iterator[Callable[[], object]]:
    link = CoreConnection(
        address, name="it", hello=lambda: Open(name="it", instance="i"), beat=Heartbeat, received=print, refused=print,
        each_turn=lambda: True, insecure=True,
    )  # fmt: skip
    link.start()
    try:
        yield lambda: None
    finally:
        link.close()


@contextlib.contextmanager
def consumer(address: str) -> Iterator[Callable[[], object]]:
    made = make_consumer()
    made.connect({"producer": Endpoint(address)})
    try:
        yield lambda: None
    finally:
        made.close()


@contextlib.contextmanager
def log_shipper(address: str) -> Iterator[Callable[[], object]]:
    context = Context()
    shipper = LogShipper("it", context)
    try:
        yield lambda: shipper.ship(Endpoint(address), None)
    finally:
        context.destroy(0)


@contextlib.contextmanager
def board(address: str) -> Iterator[Callable[[], object]]:
    with contextlib.closing(PacmanSource(1, "127.0.0.1", int(address.rpartition(":")[2]), 1)) as source:
        source.open()
        yield Driver(source).take


@contextlib.contextmanager
def command_server(address: str) -> Iterator[Callable[[], object]]:
    """The board sends no data, and answers nothing that was asked."""
    with contextlib.closing(
        PacmanSource(1, "127.0.0.1", 1, int(address.rpartition(":")[2]), format="legacy")
    ) as source:
        source.open()
        source.channels[0].send_raw(bytes(16))
        yield Driver(source).take


@pytest.mark.parametrize(
    ("client", "kind"),
    [
        (core_connection, b"ROUTER"),
        (consumer, b"ROUTER"),
        (log_shipper, b"PULL"),
        (board, b"PUB"),
        (command_server, b"REP"),
    ],
)
def test_a_message_without_end_is_cut_off(client: Any, kind: bytes, caplog: pytest.LogCaptureFixture) -> None:
    burst = MOST - LARGEST if client is log_shipper else LARGEST
    peer = RawPeer(kind, burst, 1000 if client is log_shipper else 100_000)
    try:
        with client(f"tcp://127.0.0.1:{peer.port}") as turn:
            until(lambda: (turn(), len(peer.closed) >= 2)[1], "two connections to be closed")
    finally:
        peer.close()
    assert all(sent > burst for sent in peer.closed)
    (line,) = [record.getMessage() for record in caplog.records if "closed the connection, because" in record.message]
    assert f"{peer.port}" in line


@pytest.mark.parametrize(("client", "kind"), [(core_connection, b"ROUTER"), (consumer, b"ROUTER"), (board, b"PUB")])
def test_any_number_of_whole_messages_may_come(client: Any, kind: bytes) -> None:
    """More than the limit, and over several looks. Those that cannot be understood are refused."""
    peer = RawPeer(kind, 0, whole=True)
    try:
        with client(f"tcp://127.0.0.1:{peer.port}") as turn:
            until(lambda: (turn(), peer.sent > 5 * MOST)[1], "many messages")
            assert not peer.closed
    finally:
        peer.close()


def test_any_number_of_answers_may_come_over_a_command_channel() -> None:
    context = Context()
    server = context.socket(zmq.REP)
    server.bind("tcp://127.0.0.1:0")
    try:
        with command_server(server.getsockopt_string(zmq.LAST_ENDPOINT)) as turn:
            channel = turn.__self__.source.channels[0]  # type: ignore[attr-defined]
            watch = channel._inflow
            for _ in range(5):
                until(lambda: server.poll(0), "a request")
                server.send(server.recv() + bytes(LARGEST // 2))
                until(lambda: (turn(), channel.take())[1], "the answer")
                channel.send_raw(bytes(16))
                watch._look_at = 0.0
                channel.watch()
            assert watch._received > 2 * MOST
            assert not watch.closed
    finally:
        context.destroy(0)


@pytest.mark.parametrize("keys", [True, False])
def test_the_bytes_of_messages_that_were_taken_do_not_wait(keys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted exactly, so that after any number of messages only those of the handshake are left."""
    monkeypatch.setattr(inflow, "_INTERVAL", 0.0)
    contexts = Context(), Context()
    pair = new_pair() if keys else None
    door = Doorkeeper(contexts[0], pair, lambda key: "", "test")
    router = contexts[0].socket(zmq.ROUTER)
    door.guard(router)
    router.bind("tcp://127.0.0.1:0")
    address = router.getsockopt_string(zmq.LAST_ENDPOINT)
    own, server = (new_pair(), pair.public) if pair is not None else (None, "")
    client = Client(contexts[1], address, 10_000, own=own, server=server, parts=3, backlog=20_000)
    found = client._inflow
    try:

        def connected() -> list[bytes]:
            door.answer()
            client.look()
            with contextlib.suppress(zmq.Again):
                client.socket.send(b"hello", zmq.NOBLOCK)
            return router.recv_multipart() if router.poll(10) else []

        route, _ = until(connected, "a connection")

        def waiting() -> int:
            client.look()
            return found._waiting

        handshake = waiting()
        assert 0 < handshake < 1000
        sizes = [*range(210, 260), 0, 1, 9000]
        for size in sizes:
            router.send_multipart([route, bytes(size), b"", bytes(300)])
        for size in sizes:
            assert client.socket.poll(1000 * LIMIT)
            assert [len(frame) for frame in client.receive()] == [size, 0, 300]
        assert waiting() == handshake
        router.send_multipart([route, bytes(9000)])
        until(lambda: waiting() > handshake + 9000, "a message that waits")
        assert client.socket.poll(1000 * LIMIT)
        client.receive()
        assert waiting() == handshake
        assert not found.closed
    finally:
        client.close(0)
        door.close()
        for context in contexts:
            context.destroy(0)


def test_a_descriptor_that_is_another_connection_now_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflow, "UNFINISHED", 10_000)  # the kernel takes some 100 kB that nobody reads
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        first, second = (stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(2))
        listener.accept()[0].close()
        other = stack.enter_context(listener.accept()[0])
        watch = Inflow("it", 1000)
        watch.connected(first.fileno())
        os.dup2(second.fileno(), first.fileno())  # as when the number is used again
        other.sendall(bytes(50_000))
        assert not any(watch.look() for _ in range(3))
        watch.connected(first.fileno())
        until(watch.look, "the connection to be closed")
        assert other.recv(1) == b""
        watch.connected(first.fileno())  # not connected any more
        with open(os.devnull) as file:
            watch.connected(file.fileno())
        assert not watch.look()


class Greedy:
    """A producer that sends all its blocks at once after each HELLO, whatever the window."""

    def __init__(self, context: Context) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind("tcp://127.0.0.1:0")
        self.endpoint = Endpoint(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self.blocks = [Block(1, "greedy", 5, n, 0, 0, 2, 0, 0, 0, 0, [], [], "x" * 10_000) for n in range(1000)]
        self.hellos = 0

    def work(self, first: int) -> None:
        """Answer the storage, which has the blocks below `first`."""
        while self.socket.poll(0):
            route, frame = self.socket.recv_multipart()
            if isinstance(unpack_consumer(frame, "storage"), Hello):
                self.hellos += 1
                self.socket.send_multipart([route, pack(Welcome("greedy", 5, 1, 2))])
                for block in self.blocks[first:]:
                    self.socket.send_multipart([route, pack(block), b""])


def test_a_producer_that_exceeds_its_window_fills_no_memory_and_another_one_goes_on() -> None:
    """The storage's loop takes nothing for 2 s, as when its disk hangs, and then takes everything in order."""
    context, line, storage = Context(), Line(), make_consumer()
    greedy, taken = Greedy(context), 0
    try:
        storage.connect({"board": line.endpoint, "greedy": greedy.endpoint})
        line.begin()
        end = time.monotonic() + 2.0
        while time.monotonic() < end or len(line.publisher.subscribers) < 1:
            line.work()
            greedy.work(0)
            assert storage._queued["greedy"] < LARGEST + 20_000
        line.write(100)
        assert greedy.hellos == 1, "it is asked for more when there is room"

        def all_taken() -> bool:
            nonlocal taken
            greedy.work(taken)
            while (received := storage.next()) is not None:
                producer, frame, _, _ = received
                if isinstance(frame, Block) and producer == "greedy":
                    assert frame.sequence <= taken, "a gap"
                    taken = max(taken, frame.sequence + 1)
                elif isinstance(frame, Block):
                    storage.acknowledge(frame.origin, frame.following)
            return taken == len(greedy.blocks) and not line.publisher.pending()

        run_until(line, all_taken, "all blocks of both producers")
        assert greedy.hellos > 1
    finally:
        storage.close()
        line.close()
        context.destroy(0)
