"""The null pipeline: maximum rate of a line that does not process its packets.

The same bytes pass the same processes and connections as in the line (emulated PACMANs → producer → storage and
monitor, over TCP), but nothing is decoded, compressed, checked, or acknowledged as durable. For each board word the
producer sends 36 constant bytes, and the storage overwrites one existing file of 1 GiB.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from emulated_board import Emulator

from larpixdaq._native.zmq_batch import Receiver
from larpixdaq.constants import BLOCK_ROWS
from larpixdaq.schema import PACKETS_2_4
from larpixdaq.stream.publisher import WINDOW

ROW = PACKETS_2_4.itemsize
WORD, HEADER = 16, 8
FILE = 1 << 30
BLOCK = BLOCK_ROWS * ROW
#: Words/s of all boards together, more than can be received. The boards then wait, and their clocks are slower.
OFFERED = 40_000_000
#: Seconds without a message after which all messages are assumed to have arrived.
SILENT = 1.0
#: Maximum seconds to wait for a process.
LIMIT = 20.0


def producer(ports: list[int], pipe: Connection) -> None:
    """Count words, and send a block for each BLOCK_ROWS words, until no more words arrive."""
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.SNDHWM, 0)
    pipe.send(router.bind_to_random_port("tcp://127.0.0.1"))
    consumers: dict[bytes, bytes] = {}
    credit = 0
    while len(consumers) < 2:  # the storage and the monitor
        route, name = router.recv_multipart()
        if name:
            consumers[name] = route
        else:
            credit += 1
    storage, monitor = consumers[b"storage"], consumers[b"monitor"]
    boards = []
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    for port in ports:
        own: zmq.Context[Any] = zmq.Context()  # a thread for each board, as in the line
        socket = own.socket(zmq.SUB)
        socket.rcvhwm = 100_000
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(f"tcp://127.0.0.1:{port}")
        poller.register(socket, zmq.POLLIN)
        boards.append(Receiver(socket))
    block = np.random.default_rng(1).integers(0, 255, BLOCK, np.uint8)
    words = rows = unacknowledged = 0
    last_message = time.monotonic()
    while time.monotonic() - last_message < SILENT or not words:
        poller.poll(100)
        with contextlib.suppress(zmq.Again):
            while True:
                route, _ = router.recv_multipart(zmq.NOBLOCK)
                if route == storage:
                    unacknowledged -= BLOCK
                else:
                    credit += 1
        if unacknowledged >= WINDOW:
            continue
        for receiver in boards:
            if n := receiver.receive():
                last_message = time.monotonic()
                words += (int(receiver.spans["length"][:n].sum()) - n * HEADER) // WORD
        while words - rows >= BLOCK_ROWS:
            router.send_multipart([storage, block], copy=False)
            unacknowledged += BLOCK
            rows += BLOCK_ROWS
            if credit:
                router.send_multipart([monitor, block])
                credit -= 1
    for route in consumers.values():
        router.send_multipart([route, b""])
    pipe.send((words, last_message))
    context.destroy(linger=5000)


def storage(port: int, path: str) -> None:
    socket = _consumer(port, b"storage")
    file = os.open(path, os.O_WRONLY)
    at = 0
    while len(block := socket.recv(copy=False).buffer):
        os.pwrite(file, block, at)
        at = (at + BLOCK) % (FILE - BLOCK)
        socket.send(b"")
    os.close(file)


def monitor(port: int) -> None:
    socket = _consumer(port, b"monitor")
    socket.send(b"")
    while len(socket.recv(copy=False).buffer):
        socket.send(b"")


def _consumer(port: int, name: bytes) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(name)
    return socket


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT):
        raise SystemExit(f"the null pipeline's producer has not answered for {LIMIT:g} s")
    return pipe.recv()


@contextlib.contextmanager
def _processes() -> Iterator[list[Any]]:
    processes: list[Any] = []
    try:
        yield processes
    finally:
        for process in processes:
            process.join(LIMIT)
            if process.is_alive():
                process.kill()
                process.join()


def offer(boards: int, words: str, rate: float = OFFERED) -> tuple[str, ...]:
    """Return the emulator's options for boards that send `rate` words/s in all, or as fast as these are received."""
    always = ("--lossless", "--wait-for-go")
    return "--io-groups", str(boards), "--words-per-message", words, "--rate", str(rate / boards), *always


def measure(boards: int, words: str, seconds: float, directory: Path | None = None) -> dict[str, Any]:
    """Let the boards send as fast as possible. Returns the number of words, seconds, and words/s."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile(dir=directory, prefix="larpixdaq-null-") as file,
        contextlib.closing(Emulator(*offer(boards, words))) as board,
        _processes() as processes,
    ):
        piece = bytes(16 << 20)
        for at in range(0, FILE, len(piece)):
            os.pwrite(file.fileno(), piece, at)
        os.fsync(file.fileno())
        ours, theirs = spawn.Pipe()
        ports = [port["data"] for port in board.ready.values()]
        processes.append(spawn.Process(target=producer, args=(ports, theirs)))
        processes[0].start()
        port = _answer(ours)
        consumers = [(storage, (port, file.name)), (monitor, (port,))]
        for target, arguments in consumers:
            processes.append(spawn.Process(target=target, args=arguments))
            processes[-1].start()
        board.go()
        began = time.monotonic()
        time.sleep(seconds)
        board.stop()
        counts = board.finish()
        received, last_message = _answer(ours)  # all processes have the same clock
    sent = sum(words["words"] for words in counts["sent"].values())
    if received != sent:
        raise SystemExit(f"the null pipeline received {received} of {sent} words")
    return {"words": sent, "seconds": last_message - began, "rate": sent / (last_message - began)}
