"""Measure what a scrape of the metrics costs, by process.

    python bench/metrics.py [--rate R] [--scrapes N] [--json]

Emulated PACMANs send to a complete system, in a run; each line has another number of chips, without and with the series
of all chips (--chips). A scrape is one GET of /metrics; with --chips they are so far apart that each one reads the
chips. Times are those of the client, in ms; processor time is that of each process in excess of an equal time without
scrapes, in ms per scrape.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
import urllib.request
from typing import Any

from common import argument_parser, begin_run, processor_seconds, temporary_system
from emulated_board import Emulator
from processes import LIMIT, free_port, until
from system import System

#: Number of boards, io_channels per board, and chips per io_channel.
SIZES = ((1, 4, 4), (8, 16, 50))
#: Seconds until most channels have sent.
SETTLE = 8.0
#: Seconds between two scrapes, without and with --chips.
INTERVALS = (0.3, 10.5)
PROCESSES = ("metrics", "core", "run_data", "producer")


def scrape(url: str) -> tuple[float, bytes]:
    """Return the seconds that a scrape took, and its text."""
    began = time.perf_counter()
    with urllib.request.urlopen(url, timeout=LIMIT) as answer:
        text = answer.read()
    return time.perf_counter() - began, text


def used(line: System, interval: float, scrapes: int, url: str = "") -> tuple[dict[str, float], list[float], bytes]:
    """Return the processor time of each process in this time, and the times and the last text of the scrapes. Without a
    URL there are none."""
    pids = {key: line.processes[key].popen.pid for key in PROCESSES}
    before = {key: processor_seconds(pid) for key, pid in pids.items()}
    times, text = [], b""
    due = time.monotonic()
    for _ in range(scrapes):
        due += interval
        if url:
            took, text = scrape(url)
            times.append(took)
        time.sleep(max(0.0, due - time.monotonic()))
    return {key: processor_seconds(pid) - before[key] for key, pid in pids.items()}, times, text


def measure(rate: float, size: tuple[int, int, int], scrapes: int, *, chips: bool) -> dict[str, Any]:
    boards, io_channels, chips_each = size
    options = ["--io-groups", str(boards), "--rate", str(rate / boards), "--words-per-message", "1000", "--lossless"]
    options += ["--io-channels", str(io_channels), "--chips-per-io-channel", str(chips_each), "--wait-for-go"]
    address = f"127.0.0.1:{free_port()}"
    url = f"http://{address}/metrics"
    with temporary_system() as line, contextlib.closing(Emulator(*options)) as board:
        begin_run(line, "--pacman", *board.addresses)
        metrics = line.launch("metrics", "--core", line.core, "--address", address, *(["--chips"] if chips else []))
        until(lambda: "http://" in metrics.stdout, "the metrics")
        board.go()
        time.sleep(SETTLE)
        scrape(url)
        interval = INTERVALS[chips]
        time.sleep(interval)
        quiet, _, _ = used(line, interval, scrapes)
        busy, times, text = used(line, interval, scrapes, url)
        board.stop()
        board.finish()
    samples = [one for one in text.splitlines() if not one.startswith(b"#")]
    return {
        "chips": boards * io_channels * chips_each,
        "with_chips": chips,
        "series": len(samples),
        "kB": round(len(text) / 1e3, 1),
        "median_ms": round(statistics.median(times) * 1e3, 1),
        "slowest_ms": round(max(times) * 1e3, 1),
        "processor_ms": {key: round((busy[key] - quiet[key]) / len(times) * 1e3, 1) for key in PROCESSES},
    }


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--rate", type=float, default=2e5, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--scrapes", type=int, default=100, metavar="N", help="scrapes, with --chips a 20th (default %(default)d)")
    options = parser.parse_args()
    results = []
    for size in SIZES:
        for chips in (False, True):
            scrapes = max(2, options.scrapes // 20) if chips else options.scrapes
            result = measure(options.rate, size, scrapes, chips=chips)
            results.append(result)
            if not options.json:
                each = ", ".join(f"{key} {value}" for key, value in result["processor_ms"].items())
                print(
                    f"{result['chips']:>5,} chips{', --chips' if chips else '':<9}: {result['series']:>5} series, "
                    f"{result['kB']} kB, {result['median_ms']} ms (slowest {result['slowest_ms']}); processor ms: "
                    f"{each}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
