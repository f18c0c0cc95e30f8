"""Measure how fast all registers of all chips of an emulated detector are read, in messages of many words.

    python bench/chips.py [--boards 8] [--chips 800] [--words 16384]

Prints one JSON object: seconds to configure the networks and to read all registers, reads/s, and the processor time of
the emulator (one process for all boards) per second while reading. Every answer is compared with the expected value.
"""

from __future__ import annotations

import json
import struct
import subprocess
import time
from typing import Any

import numpy as np
import zmq
from common import argument_parser, processor_seconds

from larpixdaq.emulators import network
from larpixdaq.emulators.network import register_map
from larpixdaq.runtime.launcher import command

WRITE, READ = 2, 3
ID, UP, DOWN = 122, 124, 125
LIMIT = 60_000  # ms


def words(io_channels: Any, kind: int, chip_ids: Any, addresses: Any, data: Any) -> Any:
    """Return D words of a request, shape (N,), 16 bytes each."""
    made = np.zeros(len(io_channels), [("type", "S1"), ("io_channel", "u1"), ("pad", "V6"), ("packet", "<u8")])
    made["type"], made["io_channel"] = b"D", io_channels
    made["packet"] = kind | np.asarray(chip_ids) << 2 | np.asarray(addresses) << 10 | np.asarray(data) << 18
    return made


def setup(board: network.Wiring) -> Any:
    """Return the writes that configure the network, nearest chips first: io_channel, chip_id, address, value."""
    uart = {(a, b): u for a, u, b, _ in board.wires}
    up = [0] * len(board.keys)
    writes = []
    for chip, u, _ in board.exits:
        channel, chip_id = board.keys[chip]
        writes += [(channel, 1, ID, chip_id), (channel, chip_id, DOWN, 1 << u)]
    for parent, chip in board.tree:
        channel, chip_id = board.keys[chip]
        up[parent] |= 1 << uart[parent, chip]
        writes += [(channel, board.keys[parent][1], UP, up[parent])]
        writes += [(channel, 1, ID, chip_id), (channel, chip_id, DOWN, 1 << uart[chip, parent])]
    return np.array(writes)


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--boards", type=int, default=8, help="number of boards (default %(default)d)")
    parser.add_argument("--chips", type=int, default=800, help="chips per board (default %(default)d)")
    parser.add_argument("--words", type=int, default=16_384, help="maximum words per message (default %(default)d)")
    args = parser.parse_args()
    registers = register_map("2b")
    board = network.tile_wiring(args.chips, asic="2b")
    keys = np.array(board.keys)
    steps = setup(board)
    expected = np.tile(registers.defaults, (args.chips, 1))
    for chip, (channel, chip_id) in enumerate(keys.tolist()):
        for c, i, address, value in steps[steps[:, 0] == channel].tolist():
            if i == chip_id or (address == ID and value == chip_id and c == channel):
                expected[chip, address] = value
    options = ["--io-groups", str(args.boards), "--chips", str(args.chips), "--asic", "2b", "--power-on", "--lossless"]
    ports = ["--data-port", "0", "--command-port", "0"]
    emulator = subprocess.Popen(command("emulators", "pacman", *ports, *options), stdout=subprocess.PIPE)
    context: Any = zmq.Context()
    boards: list[Any] = []
    try:
        assert emulator.stdout is not None
        ready = json.loads(emulator.stdout.readline())["ready"]

        for at in ready.values():
            request, data = context.socket(zmq.REQ), context.socket(zmq.SUB)
            data.rcvhwm = 0
            data.subscribe(b"")
            request.connect(f"tcp://127.0.0.1:{at['command']}")
            data.connect(f"tcp://127.0.0.1:{at['data']}")
            boards.append((request, data))

        def send_all(requested: Any) -> None:
            for start in range(0, len(requested), args.words):
                part = requested[start : start + args.words]
                message = struct.pack("<cIxH", b"?", 0, len(part)) + part.tobytes()
                for request, _ in boards:
                    request.send(message)
                for request, _ in boards:
                    assert request.poll(LIMIT), "no reply"
                    request.recv()

        began = time.monotonic()
        send_all(words(steps[:, 0], WRITE, steps[:, 1], steps[:, 2], steps[:, 3]))
        ready_after = time.monotonic() - began
        every = np.repeat(keys, registers.count, axis=0)
        addresses = np.tile(np.arange(registers.count), len(keys))
        began, ticks = time.monotonic(), processor_seconds(emulator.pid)
        send_all(words(every[:, 0], READ, every[:, 1], addresses, np.zeros_like(addresses)))
        for _, data in boards:
            answered = 0
            read = np.full((256, 256, 256), -1, np.int16)
            while answered < len(every):
                assert data.poll(LIMIT), f"{answered} of {len(every)} answers"
                answers = np.frombuffer(data.recv()[8:], [("head", "u1", 8), ("packet", "<u8")])
                answers = answers[answers["head"][:, 0] == ord("D")]
                packet = answers["packet"].astype(np.int64)
                read[answers["head"][:, 1], packet >> 2 & 255, packet >> 10 & 255] = packet >> 18 & 255
                answered += len(answers)
            assert (read[keys[:, 0], keys[:, 1]][:, : registers.count] == expected).all()
        seconds = time.monotonic() - began
        share = (processor_seconds(emulator.pid) - ticks) / seconds
        reads = args.boards * len(every)
        print(
            json.dumps(
                {
                    "chips": args.boards * args.chips,
                    "setup_seconds": round(ready_after, 2),
                    "reads": reads,
                    "seconds": round(seconds, 2),
                    "reads_per_second": round(reads / seconds),
                    "emulator_cores": round(share, 2),
                }
            )
        )
    finally:
        emulator.terminate()
        emulator.communicate()
        for pair in boards:
            for socket in pair:
                socket.close(linger=0)
        context.term()


if __name__ == "__main__":
    main()
