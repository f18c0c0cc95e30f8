"""The null pipeline: what the line could do at most if it did nothing with the packets.

The same bytes over the same processes and hops as the line (emulated PACMANs → producer → storage and monitor, TCP),
but nothing is decoded, compressed, checked or acknowledged before it is written: for each board word the producer
sends 36 bytes that lie there already, and the storage writes them over one file of 1 GiB that is there from the
beginning.
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
#: More words/s than all boards together are taken for. Boards that are late wait, and their time goes slower.
OFFERED = 40_000_000
#: Seconds without a message after which all is taken to have come.
SILENT = 1.0
#: What a process has to say or to do is waited for so long (seconds).
LIMIT = 20.0


def producer(ports: list[int], pipe: Connection) -> None:
    """Counts words, and sends a block for as many of them as fill one; ends when nothing comes any more."""
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
    words = rows = flying = 0
    heard = time.monotonic()
    while time.monotonic() - heard < SILENT or not words:
        poller.poll(100)
        with contextlib.suppress(zmq.Again):
            while True:
                route, _ = router.recv_multipart(zmq.NOBLOCK)
                if route == storage:
                    flying -= BLOCK
                else:
                    credit += 1
        if flying >= WINDOW:
            continue
        for receiver in boards:
            if n := receiver.receive():
                heard = time.monotonic()
                words += (int(receiver.spans["length"][:n].sum()) - n * HEADER) // WORD
        while words - rows >= BLOCK_ROWS:
            router.send_multipart([storage, block], copy=False)
            flying += BLOCK
            rows += BLOCK_ROWS
            if credit:
                router.send_multipart([monitor, block])
                credit -= 1
    for route in consumers.values():
        router.send_multipart([route, b""])
    pipe.send((words, heard))
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
        raise SystemExit(f"the null pipeline's producer has said nothing for {LIMIT:g} s")
    return pipe.recv()


@contextlib.contextmanager
def _processes() -> Iterator[list[Any]]:
    made: list[Any] = []
    try:
        yield made
    finally:
        for process in made:
            process.join(LIMIT)
            if process.is_alive():
                process.kill()
                process.join()


def offer(boards: int, words: str) -> tuple[str, ...]:
    """The emulator's options for boards that send as fast as somebody takes their words."""
    rate = str(OFFERED / boards)
    always = ("--lossless", "--wait-for-go")
    return "--io-groups", str(boards), "--words-per-message", words, "--rate", rate, *always


def measure(boards: int, words: str, seconds: float, directory: Path | None = None) -> dict[str, Any]:
    """Let the boards send as fast as they are taken for so long: {"words", "seconds", "rate" in words/s}."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile(dir=directory, prefix="larpixdaq-null-") as file,
        contextlib.closing(Emulator(*offer(boards, words))) as board,
        _processes() as made,
    ):
        piece = bytes(16 << 20)
        for at in range(0, FILE, len(piece)):
            os.pwrite(file.fileno(), piece, at)
        os.fsync(file.fileno())
        ours, theirs = spawn.Pipe()
        ports = [port["data"] for port in board.ready.values()]
        made.append(spawn.Process(target=producer, args=(ports, theirs)))
        made[0].start()
        port = _answer(ours)
        made += [spawn.Process(target=storage, args=(port, file.name)), spawn.Process(target=monitor, args=(port,))]
        for process in made[1:]:
            process.start()
        board.go()
        began = time.monotonic()
        time.sleep(seconds)
        board.stop()
        said = board.finish()
        taken, heard = _answer(ours)  # the clock is the same for all processes
    sent = sum(counts["words"] for counts in said["sent"].values())
    if taken != sent:
        raise SystemExit(f"the null pipeline took {taken} of {sent} words")
    return {"words": sent, "seconds": heard - began, "rate": sent / (heard - began)}
