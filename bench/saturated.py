"""The line at its limit, beside the null pipeline: as many packets/s as are stored without loss.

    python bench/saturated.py [--boards N] [--words W] [--seconds S] [--rounds R] [--json]

Emulated PACMANs send as fast as the producer takes their words (`--when-full wait`), for so many seconds; the line and
the null pipeline (null_line.py) take turns. "sent" is the boards' own count, "lost" its difference to the rows of the
run's files; rates are words/s from the boards' first word until the last one is stored; "cores" is processor time
over the time of sending.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/faults"))

import null_line
from emulated_board import Emulator
from loss_accounting import parts_of, tally
from processes import until
from system import System, system

#: Steps of the run, and the rest of what the ring holds, have so long (seconds).
STEP = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def take(line: System, boards: int, words: str, seconds: float, ring: str) -> dict[str, Any]:
    with contextlib.closing(Emulator(*null_line.offer(boards, words))) as board:
        operator = line.start("--ring", ring, "--when-full", "wait", "--pacman", *board.addresses)
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        pids = {key: process.popen.pid for key, process in line.processes.items()} | {"boards": board.process.pid}
        before = {key: processor_seconds(pid) for key, pid in pids.items()}
        board.go()
        began = time.monotonic()
        time.sleep(seconds)
        used = {key: (processor_seconds(pid) - before[key]) / seconds for key, pid in pids.items()}
        seen = operator.packet_rate(channels=False).result(STEP)["seen"]
        board.stop()
        said = board.finish()
        data = sum(counts["D"] for counts in said["sent"].values())
        producer = lambda: line.status_of(operator, "producer")  # noqa: E731
        # What still waits in queues is more than end_run has time for.
        until(lambda: producer()["packets"] >= data and not producer()["owed_blocks"], "all to be stored", STEP)
        took = time.monotonic() - began
        ended = operator.end_run().result(STEP)
    sent = {int(group): counts["words"] for group, counts in said["sent"].items()}
    found = tally(parts_of([line.data], ended["run"]))
    return {
        "sent": sum(sent.values()),
        "lost": sum(found.unaccounted(sent).values()),
        "rate": sum(sent.values()) / took,
        "condition": ended["condition"],
        "problems": found.problems,
        "seen": round(seen, 3),
        "cores": {key: round(cores, 2) for key, cores in used.items()},
        "bytes_a_row": round(sum(path.stat().st_size for path in parts_of([line.data], ended["run"])) / found.rows, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--boards", type=int, default=8, metavar="N", help="(default %(default)d)")
    add("--words", default="1000", metavar="W", help="in a message, or auto (default %(default)s)")
    add("--seconds", type=float, default=20.0, metavar="S", help="of sending (default %(default)g)")
    add("--rounds", type=int, default=3, metavar="R", help="of each (default %(default)d)")
    add("--ring", default="64MiB", metavar="SIZE", help="of the producer: boards wait (default %(default)s)")
    add("--directory", type=Path, metavar="DIR", help="for the files (default: a temporary one)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    line, null = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-", dir=options.directory) as folder:
            with system(Path(folder)) as made:
                line.append(take(made, options.boards, options.words, options.seconds, options.ring))
            null.append(null_line.measure(options.boards, options.words, options.seconds, Path(folder)))
        if not options.json:
            show(line[-1], null[-1])
    rates = [statistics.median(one["rate"] for one in each) for each in (line, null)]
    ratio = rates[0] / rates[1]
    if options.json:
        print(json.dumps({"line": line, "null": null, "rate": rates[0], "null_rate": rates[1], "ratio": ratio}))
    else:
        print(f"median: {rates[0] / 1e6:.2f} M/s, null pipeline {rates[1] / 1e6:.2f} M/s, ratio {ratio:.2f}")
    good = all(not one["lost"] and not one["problems"] and one["condition"] == "COMPLETE" for one in line)
    return 0 if good else 1


def show(one: dict[str, Any], null: dict[str, Any]) -> None:
    cores = ", ".join(f"{key} {value:.2f}" for key, value in one["cores"].items())
    print(
        f"{one['rate'] / 1e6:.2f} M/s, {one['sent']:,} sent, {one['lost']} lost, {one['condition']}, the monitor saw "
        f"{one['seen']:.0%}, {one['bytes_a_row']} bytes a row; null pipeline {null['rate'] / 1e6:.2f} M/s\n"
        f"  cores: {cores}",
        flush=True,
    )
    for problem in one["problems"]:
        print(f"  {problem}")


if __name__ == "__main__":
    sys.exit(main())
