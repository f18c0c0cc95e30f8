"""Measure the maximum packets/s that the line stores without loss, compared with the null pipeline.

    python bench/saturated.py [--boards N] [--words W] [--seconds S] [--rounds R] [--json]

Emulated PACMANs send as fast as the producer receives their words (`--when-full wait`). The line and the null pipeline
(null_line.py) take turns. "sent" is the boards' count, "lost" its difference to the rows of the run's files. Rates are
words/s from the boards' first word until the last word is stored. "cores" is processor time divided by the time of
sending, "ns" in the JSON object the processor time per word of all processes but the boards, until the last is stored.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import null_line
from common import STEP, argument_parser, begin_run, processor_seconds
from emulated_board import Emulator
from loss_accounting import parts_of, tally
from processes import until
from system import System, system

from larpixdaq.runtime.units import parse_size


def measure(
    line: System,
    boards: int,
    words: str,
    seconds: float,
    ring: str,
    *,
    rate: float = null_line.OFFERED,
    label: str = "",
) -> dict[str, Any]:
    """Measure a line. `rate`: words/s of all boards; `label`: of its storage, in the names of the files."""
    with contextlib.closing(Emulator(*null_line.offer(boards, words, rate))) as board:
        operator = begin_run(line, "--ring", ring, "--when-full", "wait", "--pacman", *board.addresses)
        pids = {key: process.popen.pid for key, process in line.processes.items()} | {"boards": board.process.pid}
        before = {key: processor_seconds(pid) for key, pid in pids.items()}
        board.go()
        began = time.monotonic()
        time.sleep(seconds)
        used = {key: (processor_seconds(pid) - before[key]) / seconds for key, pid in pids.items()}
        seen = operator.packet_rate(channels=False).result(STEP)["seen"]
        board.stop()
        counts = board.finish()["sent"]
        data = sum(words["D"] for words in counts.values())
        producer = lambda: line.status_of(operator, "producer")  # noqa: E731
        # Wait here, because end_run does not wait until long queues are empty.
        until(lambda: producer()["packets"] >= data and not producer()["owed_blocks"], "all words to be stored", STEP)
        took = time.monotonic() - began
        spent = sum(processor_seconds(pid) - before[key] for key, pid in pids.items() if key != "boards")
        ended = operator.end_run().result(STEP)
    sent = {int(group): words["words"] for group, words in counts.items()}
    parts = parts_of([line.data], ended["run"], label)
    totals = tally(parts)
    return {
        "sent": sum(sent.values()),
        "lost": sum(totals.unaccounted(sent).values()),
        "rate": sum(sent.values()) / took,
        "condition": ended["condition"],
        "problems": totals.problems,
        "seen": round(seen, 3),
        "ns": 1e9 * spent / sum(sent.values()),
        "cores": {key: round(cores, 3) for key, cores in used.items()},
        "bytes_a_row": round(sum(path.stat().st_size for path in parts) / totals.rows, 2),
    }


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--boards", type=int, default=8, metavar="N", help="number of boards (default %(default)d)")
    add("--words", default="1000", metavar="W", help="words per message, or auto (default %(default)s)")
    add("--seconds", type=float, default=20.0, metavar="S", help="time of sending, s (default %(default)g)")
    add(
        "--rounds",
        type=int,
        default=3,
        metavar="R",
        help="measurements of line and null pipeline (default %(default)d)",
    )
    add("--ring", default="64MiB", metavar="SIZE", help="ring of the producer (default %(default)s)")
    add("--directory", type=Path, metavar="DIR", help="for the files (default: a temporary one)")
    options = parser.parse_args()
    line, null = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-", dir=options.directory) as folder:
            with system(Path(folder)) as processes:
                line.append(measure(processes, options.boards, options.words, options.seconds, options.ring))
            null.append(
                null_line.measure(
                    options.boards,
                    options.words,
                    options.seconds,
                    Path(folder),
                    ring=parse_size(options.ring),
                    bytes_a_row=line[-1]["bytes_a_row"],
                )
            )
        if not options.json:
            show(line[-1], null[-1])
    rates = [statistics.median(result["rate"] for result in results) for results in (line, null)]
    ratio = rates[0] / rates[1]
    if options.json:
        print(json.dumps({"line": line, "null": null, "rate": rates[0], "null_rate": rates[1], "ratio": ratio}))
    else:
        print(f"median: {rates[0] / 1e6:.2f} M/s, null pipeline {rates[1] / 1e6:.2f} M/s, ratio {ratio:.2f}")
    good = all(not result["lost"] and not result["problems"] and result["condition"] == "COMPLETE" for result in line)
    return 0 if good else 1


def show(result: dict[str, Any], null: dict[str, Any]) -> None:
    cores, null_cores = (
        ", ".join(f"{key} {value:.2f}" for key, value in each["cores"].items()) for each in (result, null)
    )
    print(
        f"{result['rate'] / 1e6:.2f} M/s, {result['sent']:,} sent, {result['lost']} lost, {result['condition']}, the "
        f"monitor saw {result['seen']:.0%}, {result['bytes_a_row']} bytes a row; "
        f"null pipeline {null['rate'] / 1e6:.2f} M/s\n"
        f"  cores: {cores}\n"
        f"  null pipeline: {null_cores}; all {sum(null['cores'].values()):.2f} of {os.cpu_count()}",
        flush=True,
    )
    for problem in result["problems"]:
        print(f"  {problem}")


if __name__ == "__main__":
    sys.exit(main())
