"""The online monitor as a process: its loop on a real stream socket, its actions, its command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq
from stream_harness import make_consumer

from larpixdaq import run_data, schema
from larpixdaq.constants import MONITOR_QUERIES
from larpixdaq.monitor.monitor import Monitor
from larpixdaq.protocol.control import Endpoint
from larpixdaq.protocol.stream import Block as Header
from larpixdaq.protocol.stream import Credit, End, Hello, Totals, Welcome, pack, unpack_consumer
from larpixdaq.run_data import RunData, actions

LIMIT = 10.0


class Board:
    """Producer's end of the stream for one consumer: answers WELCOME, then sends blocks within the credit."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.address = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.route = b""
        self.credit = self.sent = self.sequence = self.rows = 0

    def listen(self, milliseconds: int = 0) -> None:
        while self.socket.poll(milliseconds):
            self.route, frame = self.socket.recv_multipart()
            message = unpack_consumer(frame, "monitor")
            if isinstance(message, Hello):
                assert message.mode == "latest"
                self.socket.send_multipart([self.route, pack(Welcome("board", 1, 3, 2))])
            elif isinstance(message, Credit):
                self.credit = max(self.credit, message.blocks)
            milliseconds = 0

    def send(self, rows: np.ndarray[Any, Any], text: str | None = None, cut: int = 0) -> None:
        now = time.time_ns()
        self.rows += len(rows)
        header = Header(
            run=3,
            producer="board",
            epoch=1,
            sequence=self.sequence,
            first_packet=self.rows - len(rows),
            rows=len(rows),
            layout=2,
            flags=0,
            first_ns=now - 20_000_000,
            last_ns=now,
            crc32=0,
            totals=[Totals(1, self.rows, self.rows, 0, 0, 0)],
            gaps=[],
            text=text,
        )
        self.sequence += 1
        self.sent += text is None
        self.socket.send_multipart([self.route, pack(header), rows.tobytes()[cut:]])


class StandIn:
    """Simulated node that is registered and knows one producer."""

    def __init__(self, producers: dict[str, Endpoint]) -> None:
        self.producers = producers
        self.session = "session"
        self.reports: list[tuple[int, int]] = []

    def dispatch(self) -> None:
        pass

    def report(self, progress: int, queued: int) -> None:
        self.reports.append((progress, queued))


def packets(n: int, first: int = 0) -> np.ndarray[Any, Any]:
    rows = np.zeros(n, schema.PACKETS_2_4)
    rows["io_group"] = rows["direction"] = rows["valid_parity"] = 1
    rows["timestamp"] = first + np.arange(n)
    return rows


@pytest.fixture
def bench() -> Iterator[Any]:
    """A board, a connected monitor, and `until`, which runs both until a condition holds."""
    context: zmq.Context[Any] = zmq.Context()
    board = Board(context)
    consumer = make_consumer("Online monitor", "session", "latest")
    monitor = Monitor()
    node = StandIn({"board": Endpoint(board.address)})
    loop = RunData(monitor, node, consumer)  # type: ignore[arg-type]
    poller = zmq.Poller()
    poller.register(consumer.fileno(), zmq.POLLIN)
    poller.register(board.socket, zmq.POLLIN)

    def until(condition: Callable[[], Any], event: str) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, f"after {LIMIT:g} s still waiting: {event}"
            poller.poll(10)
            board.listen()
            loop.turn()

    try:
        loop.turn()
        until(lambda: board.credit, "HELLO and credit")
        yield SimpleNamespace(board=board, consumer=consumer, monitor=monitor, node=node, loop=loop, until=until)
    finally:
        consumer.close()
        board.socket.close(linger=0)
        context.term()


def test_every_block_within_the_credit_is_counted(bench: Any) -> None:
    for i in range(25):
        bench.board.send(packets(100, 100 * i))
        bench.until(lambda i=i: bench.monitor.run_info()["seen_rows"] == 100 * (i + 1), f"block {i}")
    assert bench.monitor.packets(1)["timestamp"] == 2499


def test_credit_is_renewed_for_blocks_not_for_info_messages(bench: Any) -> None:
    first = bench.board.credit
    for i in range(5):
        bench.until(lambda: bench.board.sent < bench.board.credit, "credit")
        bench.board.send(packets(10, i))
        bench.board.send(packets(1), text=f"message {i}")
    bench.until(lambda: bench.board.credit == first + 5, "credit for 5 blocks")
    bench.until(lambda: len(bench.monitor.messages()) == 5, "the last message, which follows the last block")
    assert [message["text"] for message in bench.monitor.messages()] == [f"message {i}" for i in range(5)]
    assert bench.node.reports[-1][0] >= 10
    bench.board.socket.send_multipart(
        [bench.board.route, pack(End(3, "board", 1, 10, "closed", 0, time.time_ns(), [], [], []))]
    )
    bench.until(lambda: bench.monitor.run_info()["producers"][0]["ended"], "the end")
    assert bench.board.credit == first + 5


def test_an_invalid_block_is_logged_once_and_the_next_counts(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = bench.board.credit
    for _ in range(2):
        bench.board.send(packets(10), cut=1)
    bench.until(lambda: bench.board.credit == first + 2, "credit for the wrong blocks")
    bench.board.send(packets(10))
    bench.until(lambda: bench.monitor.run_info()["seen_rows"] == 10, "the right block")
    assert bench.monitor.run_info()["skipped_rows"] == 20
    assert [record.message for record in caplog.records] == [
        "not counted: block 0 of run 3 from board: 10 rows of 36 bytes announced, 359 bytes found"
    ]


def test_handlers_have_the_parameters_of_the_monitor_methods() -> None:
    handlers = actions(Monitor())
    assert set(handlers) == {"prepare_run", "begin_run", "end_run", "run_info", *MONITOR_QUERIES}
    assert list(inspect.signature(handlers["packets"]).parameters) == ["call", "count", "text", "types"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'number'"):
        inspect.signature(handlers["messages"]).bind(None, number=3)
    call: Any = None
    assert handlers["prepare_run"](call, run=5, kind="physics", comment="first light") == {}
    assert handlers["begin_run"](call, run=5) == {}
    assert handlers["run_info"](call)["comment"] == "first light"
    assert handlers["begin_run"](call, run=6) == {}
    assert handlers["end_run"](call, run=6).run == 6
    assert "first light" not in str(handlers["run_info"](call))
    assert handlers["messages"](call, count=3) == []


def test_help() -> None:
    for command in (["-m", "larpixdaq.run_data"], [run_data.__file__]):
        shown = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        text = " ".join(shown.stdout.split())
        assert "Launch the data consumer providing the online data monitor" in text
        assert "The address of the DAQ Core, not including port number" in text
        assert "Online monitor" in text
