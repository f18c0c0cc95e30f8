"""Measure the latency from a board's socket to the online monitor's counters, as an Operator sees them.

    python bench/latency.py [--rates R,...] [--samples N] [--json]

One emulated PACMAN sends at each rate, with message sizes of a real board. A second board, a socket of this program,
sends single words at random moments. The latency is the time until packet_rate() has counted the word, including the
request to the monitor and its answer.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import struct
import sys
import time
from typing import Any

import numpy as np
import zmq
from common import STEP, argument_parser, begin_run, temporary_system
from emulated_board import Emulator
from system import System

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


class TimedBoard:
    """Board that sends single words through a socket of this program. Measures when the monitor has counted them."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.linger = 0
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.sent = 0

    def await_subscriber(self) -> None:
        if not self._socket.poll(LIMIT * 1000):
            raise SystemExit(f"no subscriber after {LIMIT:g} s")

    def latency(self, operator: Any, pause: float = PAUSE) -> float:
        """Send a word after `pause` seconds. Returns the milliseconds until the monitor has counted it."""
        time.sleep(pause)
        sent = time.monotonic()
        self.sent += 1
        self._socket.send(word(self.sent))
        while counted(operator) < self.sent:
            if time.monotonic() > sent + LIMIT:
                raise SystemExit(f"word {self.sent} was not counted after {LIMIT:g} s")
        return (time.monotonic() - sent) * 1000

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def measure(line: System, rate: float, samples: int) -> dict[str, Any]:
    options = ("--rate", str(rate), "--words-per-message", "auto", "--wait-for-go")
    with contextlib.closing(Emulator(*options)) as busy, contextlib.closing(TimedBoard()) as timed:
        data, command = (busy.ready["1"][name] for name in ("data", "command"))
        boards = (f"{BUSY}=127.0.0.1:{data}:{command}", f"{TIMED}=127.0.0.1:{timed.port}:{command}")
        operator = begin_run(line, "--pacman", *boards)
        timed.await_subscriber()
        busy.go()
        chance = random.Random(1)
        times = [timed.latency(operator, PAUSE * (1 + chance.random())) for _ in range(samples)]
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
    parser = argument_parser(__doc__)
    parser.add_argument("--rates", default="5000,1000000", metavar="R,...", help="packets/s (default %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=300, metavar="N", help="timed words at each rate (default %(default)d)"
    )
    options = parser.parse_args()
    results = []
    for rate in map(float, options.rates.split(",")):
        with temporary_system() as line:
            results.append(measure(line, rate, options.samples))
        if not options.json:
            print("  ".join(f"{name} {value:g}" for name, value in results[-1].items()), flush=True)
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
