"""Measure the processor time per packet, by process, for different numbers of channels.

    python bench/channels.py [--rate R] [--boards N] [--seconds S] [--json]

Emulated PACMANs send messages of 1000 words at an even rate that all processes can follow. Each round has another
number of io_channels and chips, with 64 channels per chip. "ns a packet" is the processor time of a process divided by
the packets of that time, after SETTLE seconds, when every channel has sent. The monitor's resident memory grows with
the channels, because it has a histogram for each.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

from common import STEP, argument_parser, begin_run, processor_seconds, temporary_system
from emulated_board import Emulator
from memory_usage import Memory
from system import System

#: Number of io_channels per board, and of chips per io_channel.
SIZES = ((1, 1), (4, 4), (8, 16), (32, 50))
#: Seconds until most channels have sent and have their histograms.
SETTLE = 5.0


def measure(line: System, rate: float, boards: int, size: tuple[int, int], seconds: float) -> dict[str, Any]:
    io_channels, chips = map(str, size)
    options = ["--rate", str(rate / boards), "--io-groups", str(boards), "--words-per-message", "1000", "--lossless"]
    options += ["--io-channels", io_channels, "--chips-per-io-channel", chips, "--wait-for-go"]
    with contextlib.closing(Emulator(*options)) as board:
        operator = begin_run(line, "--pacman", *board.addresses)
        pids = {key: process.popen.pid for key, process in line.processes.items()}
        board.go()
        time.sleep(SETTLE)
        before, began = {key: processor_seconds(pid) for key, pid in pids.items()}, time.monotonic()
        with contextlib.closing(Memory(line, ["run_data"])) as memory:
            time.sleep(seconds)
        took = time.monotonic() - began
        used = {key: processor_seconds(pid) - before[key] for key, pid in pids.items()}
        seen = operator.packet_rate(channels=False).result(STEP)["seen"]
        board.stop()
        board.finish()
        dropped = line.status_of(operator, "producer")["dropped"]
        operator.end_run().result(STEP)
    return {
        "channels": boards * size[0] * size[1] * 64,
        "ns_a_packet": {key: round(value / took / rate * 1e9, 1) for key, value in used.items()},
        "all": round(sum(used.values()) / took / rate * 1e9, 1),
        "monitor_saw": round(seen, 3),
        "monitor_mib": round(memory.uses["run_data"].summary()["mib_max"]),
        "dropped": dropped,
    }


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--rate", type=float, default=4e6, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--boards", type=int, default=4, metavar="N", help="number of boards (default %(default)d)")
    add("--seconds", type=float, default=10.0, metavar="S", help="length of each round, s (default %(default)g)")
    options = parser.parse_args()
    results = []
    for size in SIZES:
        with temporary_system() as line:
            result = measure(line, options.rate, options.boards, size, options.seconds)
        results.append(result)
        if not options.json:
            each = ", ".join(f"{key} {value}" for key, value in result["ns_a_packet"].items())
            print(
                f"{result['channels']:>9,} channels: {result['all']} ns a packet ({each}); the monitor saw "
                f"{result['monitor_saw']:.0%} and has {result['monitor_mib']} MiB; {result['dropped']} dropped",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))
    return 1 if any(result["dropped"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
