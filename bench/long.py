"""A long run at an even rate: whether what a packet costs, and the memory, stay what they were.

    python bench/long.py [--rate R] [--boards N] [--minutes M] [--json]

Emulated PACMANs, 1000-word messages, at a rate that all keep up with. "ns a packet" is processor time of all
processes but the boards over the packets of that time, from a tenth of the packets named until all of them. "memory" is
resident memory, shared memory (the ring) apart: its median in the run's second quarter, and what it has grown by in the
last quarter. "lost" is by the boards' count and the files' ledger. The files (some 7 bytes a packet) go to a
temporary directory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/faults"))

from emulated_board import Emulator
from loss_accounting import parts_of
from memory_usage import Memory
from saturated import STEP, processor_seconds
from system import System, system

#: Processor time is noted so often (seconds).
EVERY = 0.25


def measure(line: System, rate: float, boards: int, seconds: float) -> dict[str, Any]:
    options = ("--rate", str(rate / boards), "--io-groups", str(boards), "--words-per-message", "1000", "--wait-for-go")
    with contextlib.closing(Emulator(*options, "--lossless")) as board:
        operator = line.start("--ring", "512MiB", "--pacman", *board.addresses)
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        pids = {key: process.popen.pid for key, process in line.processes.items()}
        board.go()
        began = time.monotonic()
        notes = []  # packets so far, processor seconds
        with contextlib.closing(Memory(line, list(pids))) as memory:
            while (now := time.monotonic() - began) < seconds:
                notes.append((rate * now, sum(map(processor_seconds, pids.values()))))
                time.sleep(EVERY)
        board.stop()
        said = board.finish()
        took = time.monotonic() - began
        ended = operator.end_run().result(STEP)
    sent = {int(group): counts["words"] for group, counts in said["sent"].items()}
    dropped, made = ledger(line.data, ended["run"])
    uses = {key: use.summary() for key, use in memory.uses.items()}
    return {
        "sent": sum(sent.values()),
        "kept_up": round(sum(sent.values()) / rate / took, 3),
        "dropped": dropped,
        "lost": sum(sent.values()) - made,
        "condition": ended["condition"],
        "ns_a_packet": costs(notes),
        "mib": {key: {"median": use["mib_median"], "growth": use["mib_growth"]} for key, use in uses.items()},
    }


def ledger(directory: Path, run: int) -> tuple[int, int]:
    """Rows that the files of a run count as dropped, and words that became rows, dropped or not. (To read all rows, as
    saturated.py does, takes as long as the run.)"""
    dropped = made = 0
    for part in parts_of([directory], run):
        with h5py.File(part, "r") as file:
            counts = file["ledger/counts"][:]
        dropped, made = dropped + int(counts["dropped"].sum()), made + int(counts["word_rows"].sum())
    return dropped, made


def costs(notes: list[tuple[float, float]]) -> dict[str, float]:
    """By the number of packets, each power of ten of them and all."""
    found = {}
    last = notes[-1][0]
    for most in [*(10.0**power for power in range(7, 12) if 10.0**power < last), last]:
        some = [note for note in notes if most / 10 <= note[0] <= most]
        (first, before), (end, after) = some[0], some[-1]
        found[f"{most:.3g}"] = round((after - before) / (end - first) * 1e9, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rate", type=float, default=6e6, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--boards", type=int, default=4, metavar="N", help="(default %(default)d)")
    add("--minutes", type=float, default=10.0, metavar="M", help="(default %(default)g)")
    add("--directory", type=Path, metavar="DIR", help="for the files (default: a temporary one)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    temporary = tempfile.TemporaryDirectory(prefix="larpixdaq-bench-", dir=options.directory)
    with temporary as folder, system(Path(folder)) as line:
        one = measure(line, options.rate, options.boards, 60 * options.minutes)
    if options.json:
        print(json.dumps(one))
    else:
        print(f"{one['sent']:,} sent ({one['kept_up']:.1%} of the pace), {one['dropped']:,} counted lost,")
        print(f"{one['lost']} unaccounted; {one['condition']}")
        print("packets so far: ns a packet   " + "   ".join(f"{n}: {ns}" for n, ns in one["ns_a_packet"].items()))
        for key, use in one["mib"].items():
            print(f"{key}: {use['median']:.1f} MiB, grown by {use['growth'] / use['median']:+.2%}")
    return 1 if one["lost"] or one["dropped"] else 0


if __name__ == "__main__":
    sys.exit(main())
