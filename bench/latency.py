"""How long a packet takes from the board's socket to the online monitor, at a low rate with one-word messages.

    python bench/latency.py [--rate 5000] [--samples 50]

A PUB socket stands in for the board. Now and then a packet carries a chip_id that no other has; the time until the
monitor's `packets()` shows it, as an Operator sees it, is the latency: the answer's own way is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import zmq

from larpixdaq._native import packets
from larpixdaq.cli.local import wait_for
from larpixdaq.launch import Group, components, free_port
from larpixdaq.operator import Operator
from larpixdaq.schema import Asic

MARKED = 250


class Board:
    """Sends one-word PACMAN messages at `rate`; mark() makes the next one stand out."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], rate: float) -> None:
        self._socket = context.socket(zmq.PUB)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._rate = rate
        self._stop = threading.Event()
        self._marks: list[float] = []
        self._wanted = 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    def mark(self) -> int:
        self._wanted += 1
        return self._wanted

    def sent(self, mark: int) -> float | None:
        return self._marks[mark - 1] if len(self._marks) >= mark else None

    def _run(self) -> None:
        due, tick = time.monotonic(), 0
        while not self._stop.is_set():
            due += 1 / self._rate
            delay = due - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            tick = (tick + 2000) % 2**31
            marked = len(self._marks) < self._wanted
            word = packets.parity(
                np.array([(MARKED if marked else 20) << 2 | (len(self._marks) if marked else tick) << 16], np.uint64),
                asic=Asic.V2,
            )
            head = struct.pack("<cIxHcBLxx", b"D", int(time.time()), 1, b"D", 1, tick)
            if marked:
                self._marks.append(time.monotonic())
            self._socket.send(head + word.tobytes())

    def close(self) -> None:
        self._stop.set()
        self.thread.join()
        self._socket.close(0)


def sample(operator: Operator, board: Board) -> float:
    mark = board.mark()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        rows = operator.packets(count=10_000).result(timeout=5)
        found = rows[(rows["chip_id"] == MARKED) & (rows["timestamp"] == mark - 1)]
        sent = board.sent(mark)
        if len(found) and sent is not None:
            return time.monotonic() - sent
    raise SystemExit("a marked packet never came")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=5000.0, help="packets/s (default %(default)g)")
    parser.add_argument("--samples", type=int, default=50, help="marked packets (default %(default)d)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="larpixdaq-bench-")))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        board = Board(context, options.rate)
        stack.callback(board.close)
        group = stack.enter_context(contextlib.closing(Group(folder / "out")))
        core, log = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        for module, arguments in components(core, log, folder, folder, ["--pacman", f"127.0.0.1:{board.port}"]):
            group.start(module, *arguments)
        operator = stack.enter_context(Operator(core, timeout=20))
        wait_for(operator, {"producer", "storage", "run_data", "log"}, group)
        operator.prepare_run(kind="bench").result(timeout=20)
        operator.begin_run().result(timeout=20)
        board.thread.start()
        while not len(operator.packets(count=1).result(timeout=5)):
            time.sleep(0.05)
        found = sorted(sample(operator, board) * 1000 for _ in range(options.samples))
        operator.end_run().result(timeout=60)
    figures = {
        "rate": options.rate,
        "samples": len(found),
        "median_ms": round(statistics.median(found), 1),
        "p95_ms": round(found[int(0.95 * (len(found) - 1))], 1),
        "max_ms": round(found[-1], 1),
    }
    print(json.dumps(figures) if options.json else "  ".join(f"{name} {value:g}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
