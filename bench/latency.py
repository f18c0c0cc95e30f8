"""Measure the latency from a board's socket to the online monitor's counters, as an Operator sees them.

    python bench/latency.py [--rates R,...] [--samples N] [--json]

One emulated PACMAN sends at each rate, with message sizes of a real board. A second board, a socket of this program,
sends single words at random moments. The latency is the time until packet_rate() has counted the word, including the
request to the monitor and its answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from emulated_board import Emulator
from saturated import STEP
from system import System, system

from larpixdaq._native import word_codec
from larpixdaq.schema import Asic

#: The io_groups of the busy board and of the one whose words are timed.
BUSY, TIMED = 1, 2
#: Minimum seconds between two timed words; the maximum is twice as long.
PAUSE = 0.02
#: Seconds after which a word that is not counted is lost.
LIMIT = 10.0


def word(tick: int) -> bytes:
    """Return a message with one data word."""
    packet = word_codec.parity(np.array([20 << 2 | tick << 16], np.uint64), asic=Asic.V2)
    return struct.pack("<cIxHcBLxx", b"D", int(time.time()), 1, b"D", 1, tick) + packet.tobytes()


def counted(operator: Any) -> int:
    table = operator.packet_rate(channels=False).result(timeout=5)["io_groups"]
    return int(table["packets"][table["io_group"] == TIMED].sum())


def measure(line: System, rate: float, samples: int) -> dict[str, Any]:
    options = ("--rate", str(rate), "--words-per-message", "auto", "--wait-for-go")
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(contextlib.closing(Emulator(*options)))
        context: zmq.Context[Any] = stack.enter_context(zmq.Context())
        socket = stack.enter_context(context.socket(zmq.XPUB))
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        data, command = (busy.ready["1"][name] for name in ("data", "command"))
        operator = line.start("--pacman", f"{BUSY}=127.0.0.1:{data}:{command}", f"{TIMED}=127.0.0.1:{port}:{command}")
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        if not socket.poll(LIMIT * 1000):
            raise SystemExit(f"no subscriber after {LIMIT:g} s")
        busy.go()
        chance = random.Random(1)
        times = []
        for n in range(1, samples + 1):
            time.sleep(PAUSE * (1 + chance.random()))
            sent = time.monotonic()
            socket.send(word(n))
            while counted(operator) < n:
                if time.monotonic() > sent + LIMIT:
                    raise SystemExit(f"word {n} was not counted after {LIMIT:g} s")
            times.append((time.monotonic() - sent) * 1000)
        seen = operator.packet_rate(channels=False).result(STEP)["io_groups"]
        busy.stop()
        busy.finish()
        operator.end_run().result(STEP)
    times.sort()
    cuts = statistics.quantiles(times, n=100)
    return {
        "rate": rate,
        "reached": round(float(seen["mean_rate"][seen["io_group"] == BUSY].sum())),
        "samples": samples,
        "p50_ms": round(cuts[49], 1),
        "p95_ms": round(cuts[94], 1),
        "p99_ms": round(cuts[98], 1),
        "max_ms": round(times[-1], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rates", default="5000,1000000", metavar="R,...", help="packets/s (default %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=300, metavar="N", help="timed words at each rate (default %(default)d)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    results = []
    for rate in map(float, options.rates.split(",")):
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder, system(Path(folder)) as line:
            results.append(measure(line, rate, options.samples))
        if not options.json:
            print("  ".join(f"{name} {value:g}" for name, value in results[-1].items()), flush=True)
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
