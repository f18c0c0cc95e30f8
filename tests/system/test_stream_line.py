"""A producer with --stream, emulated boards and a real broker: each block of a run is in the stream once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

from brokers import Brokers, brokers
from emulated_board import Emulator
from fake_core import Actor, storage_status
from jetstream_frames import check, frames_of
from processes import LIMIT, until
from system import System, system

from larpixdaq.constants import rows_made
from larpixdaq.operator import Operator
from larpixdaq.protocol.stream import End

NAME = "LArPix board"


def storage(core: str, brokers: str) -> Actor:
    """A storage that says that it reads the brokers, and stores nothing."""
    end = {"files": [], "condition": "INCOMPLETE", "rows": 0, "stored": []}
    replies = {"prepare_run": {"file": "/data/x.h5.part", "free_bytes": 1 << 40}, "begin_run": {}, "end_run": end,
               "abort_run": end, "cancel_run": {}}  # fmt: skip
    info = {"directory": "/data", "highest_run": 0, "free_bytes": 1 << 40, "brokers": brokers}
    actor = Actor(core, "Offline storage", "storage", info, replies)
    actor.status = storage_status()
    return actor


class Run:
    """A run of two emulated boards."""

    def __init__(self, line: System, cluster: Brokers, board: Emulator) -> None:
        self.line, self.cluster, self.board = line, cluster, board
        line.launch_core()
        self.launch_producer()
        self.operator: Operator = line.operator()
        line.await_kinds(self.operator, "producer")
        until(lambda: self.uplink["connected"], "the uplink to be connected")

    def launch_producer(self) -> None:
        self.line.launch_producer(
            "--pacman", *self.board.addresses, "--stream", self.cluster.urls, "--stream-size", "256MiB"
        )

    @property
    def uplink(self) -> dict[str, Any]:
        """The uplink's status."""
        status = self.line.status_of(self.operator, "producer")
        uplink: dict[str, Any] = status.get("uplink") or {"connected": False, "acknowledged_messages": 0}
        return uplink

    def await_messages(self, more: int = 20) -> None:
        first = self.uplink["acknowledged_messages"]
        until(lambda: self.uplink["acknowledged_messages"] >= first + more, "more messages at the brokers", 60.0)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    @property
    def child(self) -> int:
        """The process id of the uplink."""
        producer = self.line.processes["producer"].popen.pid
        children = Path(f"/proc/{producer}/task/{producer}/children").read_text().split()
        (found,) = [pid for pid in children if b"uplink_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return int(found)


def test_a_run_survives_killed_processes_and_brokers(tmp_path: Path) -> None:
    options = ("--io-groups", "2", "--rate", "200000", "--lossless", "--wait-for-go", "--stay")
    with (
        brokers(1) as cluster,
        system(tmp_path) as line,
        contextlib.closing(Emulator(*options)) as board,
        contextlib.ExitStack() as stack,
    ):
        run = Run(line, cluster, board)
        stack.enter_context(storage(line.core, cluster.urls).running())
        operator = run.operator
        line.await_kinds(operator, "storage")
        number = operator.prepare_run().result(LIMIT)["run"]
        operator.begin_run().result(LIMIT)
        board.go()
        run.await_messages()
        run.kill(run.child)
        until(lambda: run.uplink.get("restarts"), "the uplink to be started again")
        run.await_messages()
        cluster.kill(0)
        until(lambda: not run.uplink["connected"], "the broker's death in the status")
        assert "\n" not in run.uplink["problem"]
        cluster.start(0)
        run.await_messages()
        cluster.stop(0)
        until(lambda: not run.uplink["connected"], "the broker's stillness in the status")
        cluster.resume(0)
        run.await_messages()
        producer = line.processes.pop("producer").popen
        producer.kill()
        producer.wait(LIMIT)
        run.launch_producer()
        line.await_kinds(operator, "producer")
        until(lambda: line.status_of(operator, "producer").get("state") == "RUN", "the run to be resumed")
        run.await_messages()
        ended = operator.end_run().result(60)
        until(lambda: line.status_of(operator, "producer").get("owed_blocks") == 0, "all blocks to be acknowledged")
        frames = frames_of(cluster, number, NAME)
        by_epoch = defaultdict(list)
        for frame in frames:
            by_epoch[frame.frame.epoch].append(frame)
        assert len(by_epoch) == 2
        rows = 0
        for found in by_epoch.values():
            check(found)
            end = found[-1].frame
            assert isinstance(end, End)
            made = sum(block.rows for block, _ in found if not isinstance(block, End))
            assert made == sum(rows_made(counts) for _, *counts in end.counts)
            rows += made
        assert rows == ended["rows"]
