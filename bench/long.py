"""Measure in a long run whether processor time per packet and memory stay constant.

    python bench/long.py [--rate R] [--boards N] [--minutes M] [--json]

Emulated PACMANs send messages of 1000 words at a rate that all processes can follow. "ns a packet" is the processor
time of all processes but the boards divided by the packets, from a tenth of the given number of packets to that number.
Memory is resident memory without shared memory (the ring): its median, and its growth from the second to the last
quarter of the run. "lost" follows from the boards' count and the ledger in the files. The files (some 7 bytes per
packet) are written to a temporary directory.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import h5py
from common import STEP, argument_parser, begin_run, processor_seconds, temporary_system
from emulated_board import Emulator
from loss_accounting import parts_of
from memory_usage import Memory
from system import System

#: Seconds between two readings of processor time.
EVERY = 0.25


def measure(line: System, rate: float, boards: int, seconds: float) -> dict[str, Any]:
    options = ("--rate", str(rate / boards), "--io-groups", str(boards), "--words-per-message", "1000", "--wait-for-go")
    with contextlib.closing(Emulator(*options, "--lossless")) as board:
        operator = begin_run(line, "--ring", "512MiB", "--pacman", *board.addresses)
        pids = {key: process.popen.pid for key, process in line.processes.items()}
        board.go()
        began = time.monotonic()
        readings = []  # packets so far, processor seconds
        with contextlib.closing(Memory(line, list(pids))) as memory:
            while (now := time.monotonic() - began) < seconds:
                readings.append((rate * now, sum(map(processor_seconds, pids.values()))))
                time.sleep(EVERY)
        board.stop()
        counts = board.finish()
        took = time.monotonic() - began
        ended = operator.end_run().result(STEP)
    sent = {int(group): words["words"] for group, words in counts["sent"].items()}
    dropped, made = ledger(line.data, ended["run"])
    uses = {key: use.summary() for key, use in memory.uses.items()}
    return {
        "sent": sum(sent.values()),
        "kept_up": round(sum(sent.values()) / rate / took, 3),
        "dropped": dropped,
        "lost": sum(sent.values()) - made,
        "condition": ended["condition"],
        "ns_a_packet": costs(readings),
        "mib": {key: {"median": use["mib_median"], "growth": use["mib_growth"]} for key, use in uses.items()},
    }


def ledger(directory: Path, run: int) -> tuple[int, int]:
    """Return the dropped rows and all rows of words, dropped ones included, by the ledger in the run's files.

    To read all rows, as saturated.py does, would take as long as the run.
    """
    dropped = made = 0
    for part in parts_of([directory], run):
        with h5py.File(part, "r") as file:
            counts = file["ledger/counts"][:]
        dropped, made = dropped + int(counts["dropped"].sum()), made + int(counts["word_rows"].sum())
    return dropped, made


def costs(readings: list[tuple[float, float]]) -> dict[str, float]:
    """Return ns per packet up to each power of ten of packets, and up to all packets."""
    result = {}
    last = readings[-1][0]
    for most in [*(10.0**power for power in range(7, 12) if 10.0**power < last), last]:
        some = [reading for reading in readings if most / 10 <= reading[0] <= most]
        (first, before), (end, after) = some[0], some[-1]
        result[f"{most:.3g}"] = round((after - before) / (end - first) * 1e9, 1)
    return result


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--rate", type=float, default=6e6, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--boards", type=int, default=4, metavar="N", help="number of boards (default %(default)d)")
    add("--minutes", type=float, default=10.0, metavar="M", help="length of the run (default %(default)g)")
    add("--directory", type=Path, metavar="DIR", help="for the files (default: a temporary one)")
    options = parser.parse_args()
    with temporary_system(options.directory) as line:
        result = measure(line, options.rate, options.boards, 60 * options.minutes)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{result['sent']:,} sent ({result['kept_up']:.1%} of the rate), {result['dropped']:,} counted lost,")
        print(f"{result['lost']} unaccounted; {result['condition']}")
        print("packets so far: ns a packet   " + "   ".join(f"{n}: {ns}" for n, ns in result["ns_a_packet"].items()))
        for key, use in result["mib"].items():
            print(f"{key}: {use['median']:.1f} MiB, growth {use['growth'] / use['median']:+.2%}")
    return 1 if result["lost"] or result["dropped"] else 0


if __name__ == "__main__":
    sys.exit(main())
