"""Regression gate: compare the speed of each compiled kernel, and of the producer's loop, with its speed in gate.json.

    python bench/gate.py [--json] [--update]

The figure of a kernel is its rows/s divided by the rows/s of a plain copy (limit.c), so that the speed of the machine
cancels out. Kernel and copy are measured in turn, and the best round of each counts. The exit status is 1 when a kernel
reaches less than SLACK of its figure for this processor. A processor gets its figures with --update; on other
processors a kernel must reach ELSEWHERE of its lowest figure.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from common import argument_parser
from stream_harness import STORAGE, Line
from test_kernels import messages, pacman_decoding, rows, serial_decoding

from larpixdaq import constants
from larpixdaq._native import board_emulator, hdf5_chunks, monitor_counters, ring_buffer, word_codec
from larpixdaq.protocol.stream import STREAM_VERSION, Ack, Hello, Maps, pack
from larpixdaq.schema import Asic

FIGURES = Path(__file__).with_name("gate.json")
#: Required share of a kernel's figure: a kernel that takes 1.5 times the time (0.67) fails.
SLACK, ELSEWHERE = 0.72, 0.5
#: Rows of a call, and calls of kernel and copy in turn.
ROWS = 4 * constants.BLOCK_ROWS
ROUNDS = 25
#: Maximum number of repeated measurements of a slow kernel, because other processes may have disturbed it.
REPEATS = 3
#: Maximum seconds for the publisher to send its blocks.
LIMIT = 20.0

Call = Callable[[], Any]


def copy(folder: Path) -> Call:
    """Return the copy of ROWS words."""
    library = folder / "limit.so"
    source = Path(__file__).with_name("limit.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).copy_words
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = None
    words, out = np.ones(16 * constants.BLOCK_ROWS, np.uint8), np.zeros(36 * constants.BLOCK_ROWS, np.uint8)

    def run() -> None:
        for _ in range(ROWS // constants.BLOCK_ROWS):
            function(words.ctypes.data, out.ctypes.data, constants.BLOCK_ROWS)

    return run


def closed_blocks() -> Call:
    """Return a call that makes and closes blocks of 64 rows of eight io_groups, as a producer does at low rates."""
    ring = ring_buffer.Ring(bytearray(ring_buffer.SMALLEST), producer="board", epoch=1)
    ring.begin(1, 2, 36, [STORAGE], range(9))

    def run() -> None:
        for _ in range(ROWS // 64):
            ring.rows(0, constants.BLOCK_ROWS)
            ring.publish(64)
            ring.close_block(0, 0)
        ring.free_to(ring.head)

    return run


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[Call]:
    """Give a call that sends blocks of 1,024 rows to a storage that reads the ring, with 15 turns without news after
    each, until all are acknowledged and freed."""
    with contextlib.closing(Line(folder=folder)) as line:
        line.begin()
        recorder, publisher = line.recorder, line.publisher
        storage = line.context.socket(zmq.DEALER)
        storage.rcvhwm = 0
        storage.connect(line.address)
        line.peers.append(storage)
        storage.send(pack(Hello(STREAM_VERSION, STORAGE, "session", "all", [])))
        storage.send(pack(Maps(publisher.own.epoch)))

        def until(condition: Callable[[], bool]) -> None:
            deadline = time.monotonic() + LIMIT
            while not condition():
                if time.monotonic() > deadline:
                    raise SystemExit(f"the publisher has not served its storage for {LIMIT:g} s")
                publisher.socket.poll(1)
                publisher.work()

        until(lambda: any(subscriber.maps for subscriber in publisher.subscribers.values()))
        storage.recv()  # the WELCOME

        def run() -> None:
            for _ in range(ROWS // 1024):
                recorder.rows()
                recorder.publish(1024)
                recorder.close_block()
                for _ in range(16):
                    publisher.work()
            for _ in range(ROWS // 1024):
                storage.recv_multipart()
            storage.send(pack(Ack(1, publisher.own.epoch, line.ring.sequence)))
            until(lambda: publisher.own.tail == publisher.own.head)

        yield run


def kernels() -> dict[str, Call]:
    """Return the calls of all kernels, with ROWS words or rows each, by name."""
    made = rows(ROWS)[:ROWS].copy()
    data = made.view(np.uint8)
    packer = hdf5_chunks.Packer(ROWS, 36)
    tallied = np.zeros((256, len(hdf5_chunks.TALLY)), np.uint64)
    counter = monitor_counters.PacketCounters()
    board = board_emulator.PacmanBoard(Asic.V2, rate=1e6, seed=1, words=ROWS)
    sent, spans = messages(ROWS, 1000)
    return {
        "PACMAN, 1000 words a message": pacman_decoding(ROWS, 1000),
        "PACMAN, one word a message": pacman_decoding(ROWS, 1),
        "serial": serial_decoding(ROWS, 0.0),
        "serial, 1 % garbage": serial_decoding(ROWS, 0.01),
        "counting, all counters": lambda: counter.count(made),
        "rows to words": lambda: word_codec.encode(made, asic=Asic.V2),
        "tally of a file's rows": lambda: hdf5_chunks.tally(data, 2, tallied),
        "shuffled and deflated": lambda: packer.pack(data),
        "emulated board": lambda: board.fill(ROWS, 1000),
        "words of an emulated board counted": lambda: board_emulator.count_words(sent, spans),
        "blocks of 64 rows closed": closed_blocks(),
    }


def ratio(kernel: Call, reference: Call) -> tuple[float, float]:
    """Return the rows of the kernel for each row of the copy, and the kernel's rows/s."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for at, call in enumerate((kernel, reference)):
            began = time.perf_counter()
            call()
            best[at] = min(best[at], time.perf_counter() - began)
    return best[1] / best[0], ROWS / best[0]


def processor() -> str:
    """Return name, family and model of the processor. A name alone may stand for several generations."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    return ", ".join(facts.get(name, "?") for name in ("model name", "cpu family", "model"))


def minimum(known: dict[str, dict[str, float]], model: str) -> dict[str, float]:
    """Return the minimum figure of each kernel on this processor."""
    if model in known:
        return {name: SLACK * figure for name, figure in known[model].items()}
    names = {name for figures in known.values() for name in figures}
    return {name: ELSEWHERE * min(figures[name] for figures in known.values() if name in figures) for name in names}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--update", action="store_true", help=f"write the ratios of this run into {FIGURES.name}")
    options = parser.parse_args()
    known: dict[str, dict[str, float]] = json.loads(FIGURES.read_text())
    figures = {} if options.update else minimum(known, processor())
    measured: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder, publishing(Path(folder)) as publisher:
        reference = copy(Path(folder))
        for name, kernel in (kernels() | {"blocks of 1,024 rows sent": publisher}).items():
            if options.update:
                measured[name] = sorted(ratio(kernel, reference) for _ in range(5))[2]
                continue
            measured[name] = ratio(kernel, reference)
            for _ in range(REPEATS):
                if measured[name][0] >= figures.get(name, 0):
                    break
                measured[name] = max(measured[name], ratio(kernel, reference))
    if options.update:
        known[processor()] = {name: round(figure, 3) for name, (figure, _) in measured.items()}
        FIGURES.write_text(json.dumps(known, indent=1) + "\n")
    slow = [name for name, (figure, _) in measured.items() if figure < figures.get(name, 0)]
    slow += [f"{name} (not measured)" for name in figures if name not in measured]
    if options.json:
        kernels_ = {name: {"ratio": figure, "rows/s": rate} for name, (figure, rate) in measured.items()}
        print(json.dumps({"kernels": kernels_, "least": figures, "slow": slow}))
    else:
        print(f"{'kernel':<36} {'M rows/s':>9} {'of a copy':>10} {'least':>8}")
        for name, (figure, rate) in measured.items():
            print(f"{name:<36} {rate / 1e6:>9.1f} {figure:>10.3f} {figures.get(name, 0):>8.3f}")
    for name in slow:
        print(f"slower than before: {name}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
