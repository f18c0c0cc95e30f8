"""Measure the cores that each process uses at ordinary rates, and the times of prepare_run, begin_run and end_run.

    python bench/cores.py [--rates R,...] [--seconds S] [--json]

One emulated PACMAN sends at each rate, with message sizes of a real board; at rate 0 it is silent and there is no run.
"all" is the sum over all processes but the emulated board. "states" are the times from request to result; for end_run
without the 200 ms for which producers continue to read.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

from common import STEP, argument_parser, processor_seconds, temporary_system
from emulated_board import Emulator
from system import System

from larpixdaq.producer import END_READ_ON

#: Seconds before each measurement.
SETTLE = 3.0


def timed(request: Any, least: float = 0.0) -> float:
    """Return the milliseconds until the request has its result, minus `least` seconds."""
    began = time.monotonic()
    request.result(STEP)
    return round((time.monotonic() - began - least) * 1000, 1)


def measure(line: System, rate: float, seconds: float) -> dict[str, Any]:
    options = ("--rate", str(rate or 1000.0), "--words-per-message", "auto", "--wait-for-go", "--lossless")
    with contextlib.closing(Emulator(*options)) as board:
        operator = line.start("--pacman", *board.addresses)
        line.launch_log()
        line.await_kinds(operator, "log")
        states = {}
        if rate:
            states["prepare"] = timed(operator.prepare_run(kind="bench"))
            states["begin"] = timed(operator.begin_run())
            board.go()
        time.sleep(SETTLE)
        pids = {key: process.popen.pid for key, process in line.processes.items()}
        before, began = {key: processor_seconds(pid) for key, pid in pids.items()}, time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        cores = {key: (processor_seconds(pid) - before[key]) / took for key, pid in pids.items()}
        if rate:
            board.stop()
            board.finish()
            states["end"] = timed(operator.end_run(), END_READ_ON)
    return {
        "rate": rate,
        "all": round(sum(cores.values()), 3),
        "cores": {key: round(value, 3) for key, value in cores.items()},
        "states_ms": states,
    }


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--rates", default="0,5000,200000,1000000", metavar="R,...", help="packets/s (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="length of each measurement, s (default %(default)g)"
    )
    options = parser.parse_args()
    results = []
    for rate in map(float, options.rates.split(",")):
        with temporary_system() as line:
            results.append(measure(line, rate, options.seconds))
        if not options.json:
            result = results[-1]
            each = ", ".join(f"{key} {value:.3f}" for key, value in result["cores"].items())
            states = ", ".join(f"{key} {value:g} ms" for key, value in result["states_ms"].items())
            print(f"{rate:>10,.0f} packets/s: {result['all']:.3f} cores ({each}) {states}", flush=True)
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
