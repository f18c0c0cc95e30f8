"""Measure a burst far above the storage's rate: losses, latency, and the time until normal operation.

    python bench/bursts.py [--rate R] [--seconds S] [--share F] [--json]

The storage runs only a share of the time (it is stopped and continued every 50 ms). Ring and spool have 64 MiB each.
One board sends slowly all the time, a second board sends words whose latency to the monitor is measured, and a third
board sends the burst; none of them waits. "stored" is the rate at which rows were stored during the backlog. The
backlog ends when the spool is empty and the ring nearly empty. "normal again" is the time after the backlog until
latencies are below 1.5 times the longest latency before the burst. "lost" is the number of words that are neither in
the files nor in the ledger.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from common import STEP, argument_parser, begin_run, temporary_system
from emulated_board import Emulator
from latency import LIMIT, PAUSE, TIMED, TimedBoard
from loss_accounting import parts_of, tally
from memory_usage import Memory
from system import System

BOUND = "64MiB"
#: Maximum number of messages that wait in an emulated board. A real board drops messages uncounted on a busy machine.
QUEUE = "10000"
#: Packets/s of the board that always sends.
SLOW = 100_000
#: The io_group of the board with the burst.
BURST = 3
#: Seconds of one stop and one continuation of the storage.
TURN = 0.05
#: Fill level of a ring without backlog: the blocks of one turn are pending while the storage is stopped.
NEARLY_EMPTY = 0.1
#: Number of timed words before the burst and after the backlog.
SAMPLES = 60


@contextlib.contextmanager
def slowed(process: Any, share: float) -> Iterator[None]:
    """Let the process run only this share of the time."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            process.send_signal(signal.SIGSTOP)
            time.sleep(TURN * (1 - share))
            process.send_signal(signal.SIGCONT)
            time.sleep(TURN * share)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measure(line: System, rate: float, seconds: float, share: float) -> dict[str, Any]:
    count = int(rate * seconds)
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(contextlib.closing(Emulator("--rate", str(SLOW), "--queue", QUEUE, "--wait-for-go")))
        options = ("--rate", str(rate), "--words-per-message", "1000", "--count", str(count), "--queue", QUEUE)
        burst = stack.enter_context(contextlib.closing(Emulator(*options, "--stay", "--wait-for-go")))
        timed = stack.enter_context(contextlib.closing(TimedBoard()))
        data = {1: slow.ready["1"]["data"], TIMED: timed.port, BURST: burst.ready["1"]["data"]}
        ports = [f"{group}=127.0.0.1:{port}:{slow.ready['1']['command']}" for group, port in data.items()]
        operator = begin_run(line, "--ring", BOUND, "--spool-limit", BOUND, "--pacman", *ports)
        timed.await_subscriber()
        memory = stack.enter_context(contextlib.closing(Memory(line, list(line.processes))))
        with slowed(line.processes["offline_storage"].popen, share):
            slow.go()
            usual = [timed.latency(operator) for _ in range(SAMPLES)]
            before = {key: use.memory[-1] for key, use in memory.uses.items()}
            burst.go()
            began = time.monotonic()
            during = []
            status: dict[str, Any] = {"spooled_bytes": 0, "ring": 1.0}
            while not burst.ended() or status["spooled_bytes"] or status["ring"] > NEARLY_EMPTY:
                during.append(timed.latency(operator))
                status = line.status_of(operator, "producer")
                if time.monotonic() - began > STEP:
                    raise SystemExit(f"still a backlog after {STEP:g} s: {status}")
            ended = time.monotonic()
            after = [(timed.latency(operator), time.monotonic() - ended) for _ in range(SAMPLES)]
        slow.stop()
        counts = slow.finish()
        burst.stop()
        burst.process.wait(LIMIT)
        verdict = operator.end_run().result(STEP)
    totals = tally(parts_of([line.data], verdict["run"]))
    sent = {
        1: counts["sent"]["1"]["words"], TIMED: timed.sent, BURST: burst.summary["sent"]["1"]["words"],
    }  # fmt: skip
    late = [at for took, at in after if took > 1.5 * max(usual)]
    stored = (totals.rows - SLOW * SAMPLES * 2 * PAUSE) / (ended - began)
    return {
        "rate": rate,
        "stored": round(stored),
        "times": round(rate / stored, 1),
        "sent": sum(sent.values()),
        "dropped": sum(totals.counted.values()),
        "lost": sum(totals.unaccounted(sent).values()),
        "condition": verdict["condition"],
        "latency_ms": {
            "before": round(max(usual), 1), "meanwhile": round(max(during), 1), "after": round(max(after)[0], 1),
        },
        "backlog_s": round(ended - began - seconds, 1),
        "normal_again_s": round(max(late, default=0.0), 2),
        "mib": {key: [round(n / 2**20, 1) for n in (before[key], max(use.memory), use.memory[-1])]
                for key, use in memory.uses.items()},
    }  # fmt: skip


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--rate", type=float, default=6.5e6, metavar="R", help="packets/s of the burst (default %(default)g)")
    add("--seconds", type=float, default=5.0, metavar="S", help="length of the burst, s (default %(default)g)")
    add(
        "--share",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the time for which the storage runs (default %(default)g)",
    )
    options = parser.parse_args()
    with temporary_system() as line:
        result = measure(line, options.rate, options.seconds, options.share)
    if options.json:
        print(json.dumps(result))
        return 1 if result["lost"] else 0
    print(
        f"burst of {result['rate'] / 1e6:g} M/s, {result['times']} times the {result['stored'] / 1e6:.2f} M/s stored: "
        f"{result['sent']:,} sent, {result['dropped']:,} counted lost, {result['lost']} unaccounted, "
        f"{result['condition']}\nlongest latency, ms: {result['latency_ms']}; backlog until "
        f"{result['backlog_s']} s after the burst, normal again {result['normal_again_s']} s later"
    )
    for key, (before, most, last) in result["mib"].items():
        print(f"{key}: {before} MiB before, maximum {most}, {last} at the end")
    return 1 if result["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
