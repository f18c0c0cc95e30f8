"""How fast a whole emulated detector can be verified: every register of every chip, in messages of many words.

    python bench/chips.py [--boards 8] [--chips 800] [--words 16384]

prints one JSON object: seconds to set up the networks and to read all registers, reads/s, and the share of a core that
the emulator, one process for all boards, needed for the latter. Every answer is compared with what it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import time
from typing import Any

import numpy as np
import zmq

from larpixdaq.emulators import network
from larpixdaq.emulators.network import register_map
from larpixdaq.runtime.launcher import command

WRITE, READ = 2, 3
ID, UP, DOWN = 122, 124, 125
LIMIT = 60_000  # ms


def words(io_channels: Any, kind: int, chip_ids: Any, addresses: Any, data: Any) -> Any:
    """D words for a request, shape (N, 16)."""
    made = np.zeros(len(io_channels), [("type", "S1"), ("io_channel", "u1"), ("pad", "V6"), ("packet", "<u8")])
    made["type"], made["io_channel"] = b"D", io_channels
    made["packet"] = kind | np.asarray(chip_ids) << 2 | np.asarray(addresses) << 10 | np.asarray(data) << 18
    return made


def setup(board: network.Wiring) -> Any:
    """What brings up the network: chips near to the board first. The chips' ids and ways as registers."""
    uart = {(a, b): u for a, u, b, _ in board.wires}
    up = [0] * len(board.keys)
    found = []
    for chip, u, _ in board.exits:
        channel, chip_id = board.keys[chip]
        found += [(channel, 1, ID, chip_id), (channel, chip_id, DOWN, 1 << u)]
    for parent, chip in board.tree:
        channel, chip_id = board.keys[chip]
        up[parent] |= 1 << uart[parent, chip]
        found += [(channel, board.keys[parent][1], UP, up[parent])]
        found += [(channel, 1, ID, chip_id), (channel, chip_id, DOWN, 1 << uart[chip, parent])]
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=8)
    parser.add_argument("--chips", type=int, default=800, help="on each board")
    parser.add_argument("--words", type=int, default=16_384, help="of a message, at most")
    args = parser.parse_args()
    known = register_map("2b")
    board = network.tile_wiring(args.chips, asic="2b")
    keys = np.array(board.keys)
    steps = setup(board)
    expected = np.tile(known.defaults, (args.chips, 1))
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

        def send_all(what: Any) -> None:
            for start in range(0, len(what), args.words):
                part = what[start : start + args.words]
                message = struct.pack("<cIxH", b"?", 0, len(part)) + part.tobytes()
                for request, _ in boards:
                    request.send(message)
                for request, _ in boards:
                    assert request.poll(LIMIT), "no reply"
                    request.recv()

        began = time.monotonic()
        send_all(words(steps[:, 0], WRITE, steps[:, 1], steps[:, 2], steps[:, 3]))
        ready_after = time.monotonic() - began
        every = np.repeat(keys, known.count, axis=0)
        addresses = np.tile(np.arange(known.count), len(keys))
        began, ticks = time.monotonic(), cpu(emulator.pid)
        send_all(words(every[:, 0], READ, every[:, 1], addresses, np.zeros_like(addresses)))
        for _, data in boards:
            got = 0
            read = np.full((256, 256, 256), -1, np.int16)
            while got < len(every):
                assert data.poll(LIMIT), f"{got} of {len(every)} answers"
                found = np.frombuffer(data.recv()[8:], [("head", "u1", 8), ("packet", "<u8")])
                found = found[found["head"][:, 0] == ord("D")]
                packet = found["packet"].astype(np.int64)
                read[found["head"][:, 1], packet >> 2 & 255, packet >> 10 & 255] = packet >> 18 & 255
                got += len(found)
            assert (read[keys[:, 0], keys[:, 1]][:, : known.count] == expected).all()
        seconds = time.monotonic() - began
        share = (cpu(emulator.pid) - ticks) / seconds
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


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
