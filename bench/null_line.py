"""The null pipeline: maximum rate of a line that does not process its packets.

The same messages of the same boards pass the same processes, connections, queues and memory as in the line (emulated
PACMANs → producer → storage and monitor): the producer writes 36 constant bytes a word into a shared ring of the same
size, and sends headers and places in the ring. The consumers copy the rows out of the ring. The storage overwrites a
file of 1 GiB with as many bytes a row as the line's files have. Nothing is decoded, compressed, checked, or made
durable.

`cores` in the result says what bounds it: with boards on the same machine usually all processors together.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from common import processor_seconds
from emulated_board import Emulator

from larpixdaq._native.zmq_batch import Receiver, send_parts
from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY
from larpixdaq.constants import BLOCK_ROWS
from larpixdaq.protocol.stream import Ack, Block, Credit, Totals, pack
from larpixdaq.schema import PACKETS_2_4
from larpixdaq.sources.zmq_board import WAITING_BATCH, WAITING_QUEUE
from larpixdaq.stream.publisher import WINDOW
from larpixdaq.stream.subscriber import RING_CREDIT

ROW = PACKETS_2_4.itemsize
WORD, HEADER = 16, 8
FILE = 1 << 30
BLOCK = BLOCK_ROWS * ROW
#: Words/s of all boards together, more than can be received. The boards then wait, and their clocks are slower.
OFFERED = 40_000_000
#: Bytes that the line writes for a row, unless they are given.
BYTES_A_ROW = 6.8
#: Seconds without a message after which all messages are assumed to have arrived.
SILENT = 1.0
#: Maximum seconds to wait for a process.
LIMIT = 20.0


def producer(ports: list[int], ring_name: str, pipe: Connection) -> None:
    """Count words, and send a block for each BLOCK_ROWS words, until no more words arrive."""
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.SNDHWM, 0)
    pipe.send(router.bind_to_random_port("tcp://127.0.0.1"))
    consumers: dict[bytes, bytes] = {}
    credit = RING_CREDIT
    while len(consumers) < 2:  # the storage and the monitor
        route, name = router.recv_multipart()
        consumers[name] = route
    storage, monitor = consumers[b"storage"], consumers[b"monitor"]
    boards = []
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    for port in ports:
        own: zmq.Context[Any] = zmq.Context()  # a thread for each board, as in the line
        socket = own.socket(zmq.SUB)
        socket.rcvhwm = WAITING_QUEUE
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(f"tcp://127.0.0.1:{port}")
        poller.register(socket, zmq.POLLIN)
        boards.append(Receiver(socket, messages=WAITING_BATCH))
    ring = _ring(ring_name)
    block = np.random.default_rng(1).integers(0, 255, BLOCK, np.uint8)
    totals = [Totals(group, 1 << 30, 1 << 30, 0, 0, 0) for group in range(len(ports) + 1)]
    header = pack(Block(1, "board", 1 << 60, 1 << 20, 1 << 34, BLOCK_ROWS, 2, 0, 1 << 60, 1 << 60, 1 << 31, totals, []))
    words = rows = unacknowledged = blocks = 0
    last_message = time.monotonic()
    while time.monotonic() - last_message < SILENT or not words:
        poller.poll(100)
        with contextlib.suppress(zmq.Again):
            while True:
                route, _ = router.recv_multipart(zmq.NOBLOCK)
                if route == storage:
                    unacknowledged -= BLOCK
                else:
                    credit += RING_CREDIT // 4
        if unacknowledged >= WINDOW:
            continue
        for receiver in boards:
            if n := receiver.receive():
                last_message = time.monotonic()
                words += (int(receiver.spans["length"][:n].sum()) - n * HEADER) // WORD
        while words - rows >= BLOCK_ROWS:
            np.copyto(ring[blocks % len(ring)], block)
            place = blocks.to_bytes(8, "little")
            send_parts(router, storage, header, b"", place)
            unacknowledged += BLOCK
            rows += BLOCK_ROWS
            blocks += 1
            if credit:
                send_parts(router, monitor, header, b"", place)
                credit -= 1
    for route in consumers.values():
        router.send_multipart([route, b""])
    pipe.send((words, last_message))
    context.destroy(linger=5000)


def storage(port: int, ring_name: str, path: str, bytes_a_row: float) -> None:
    socket = _consumer(port, b"storage")
    ring, rows = _ring(ring_name), np.zeros(BLOCK, np.uint8)
    packed = memoryview(rows)[: int(BLOCK_ROWS * bytes_a_row)]
    answer = pack(Ack(1, 1 << 60, 1 << 20))
    file = os.open(path, os.O_WRONLY)
    at = 0
    while (place := _place(socket)) is not None:
        np.copyto(rows, ring[place % len(ring)])
        os.pwrite(file, packed, at)
        at = (at + len(packed)) % (FILE - BLOCK)
        socket.send(answer)
    os.close(file)


def monitor(port: int, ring_name: str) -> None:
    socket = _consumer(port, b"monitor")
    ring, rows = _ring(ring_name), np.zeros(BLOCK, np.uint8)
    answer = pack(Credit(1 << 20, 1.0))
    taken = 0
    while (place := _place(socket)) is not None:
        np.copyto(rows, ring[place % len(ring)])
        taken += 1
        if taken % (RING_CREDIT // 4) == 0:
            socket.send(answer)


def _ring(name: str) -> Any:
    """Return the shared ring, shape (blocks, BLOCK)."""
    memory = np.memmap(name, np.uint8, "r+")
    return memory[: len(memory) // BLOCK * BLOCK].reshape(-1, BLOCK)


def _consumer(port: int, name: bytes) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(name)
    return socket


def _place(socket: zmq.Socket[bytes]) -> int | None:
    """Receive a block. Returns its place in the ring, None at the end."""
    parts = socket.recv_multipart()
    return int.from_bytes(parts[2], "little") if len(parts) > 1 else None


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


def measure(
    boards: int,
    words: str,
    seconds: float,
    directory: Path | None = None,
    *,
    ring: int = 64 << 20,
    bytes_a_row: float = BYTES_A_ROW,
) -> dict[str, Any]:
    """Let the boards send as fast as possible. Returns the number of words, seconds, words/s, and cores by process."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.NamedTemporaryFile(dir=directory, prefix="larpixdaq-null-") as file,
        tempfile.NamedTemporaryFile(dir=DEFAULT_DIRECTORY, prefix="larpixdaq-null-") as shared,
        contextlib.closing(Emulator(*offer(boards, words))) as board,
        _processes() as processes,
    ):
        piece = bytes(16 << 20)
        for at in range(0, FILE, len(piece)):
            os.pwrite(file.fileno(), piece, at)
        os.fsync(file.fileno())
        os.truncate(shared.fileno(), ring)
        ours, theirs = spawn.Pipe()
        ports = [port["data"] for port in board.ready.values()]
        processes.append(spawn.Process(target=producer, args=(ports, shared.name, theirs)))
        processes[0].start()
        port = _answer(ours)
        consumers = [(storage, (port, shared.name, file.name, bytes_a_row)), (monitor, (port, shared.name))]
        for target, arguments in consumers:
            processes.append(spawn.Process(target=target, args=arguments))
            processes[-1].start()
        pids = {name: process.pid for name, process in zip(("producer", "storage", "monitor"), processes, strict=True)}
        pids["boards"] = board.process.pid
        before = {name: processor_seconds(pid) for name, pid in pids.items()}
        board.go()
        began = time.monotonic()
        time.sleep(seconds)
        cores = {name: (processor_seconds(pid) - before[name]) / seconds for name, pid in pids.items()}
        board.stop()
        counts = board.finish()
        received, last_message = _answer(ours)  # all processes have the same clock
    sent = sum(words["words"] for words in counts["sent"].values())
    if received != sent:
        raise SystemExit(f"the null pipeline received {received} of {sent} words")
    took = last_message - began
    return {
        "words": sent,
        "seconds": took,
        "rate": sent / took,
        "cores": {name: round(value, 3) for name, value in cores.items()},
    }
