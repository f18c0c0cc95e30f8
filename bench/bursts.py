"""A burst far above what is stored: what is kept, what is counted lost, and when all is as before.

    python bench/bursts.py [--rate R] [--seconds S] [--share F] [--json]

The storage is given a share of its time only (it is stopped and let go on, every 50 ms), with a ring and a spool of
64 MiB each. One board sends slowly all the time, a second one words that are timed until the monitor counts them, a
third one the burst; none of them waits. "stored" is the rate at which rows were stored while there was a backlog: what
can be sustained. The backlog ends when the spool is empty and the ring nearly so; "normal again" is how long after that
a timed word still took longer than one and a half times the longest before the burst. "lost" are words for which
neither the files nor the ledger account.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/faults"))

from emulated_board import Emulator
from latency import LIMIT, PAUSE, TIMED, counted, word
from loss_accounting import parts_of, tally
from memory_usage import Memory
from saturated import STEP
from system import System, system

BOUND = "64MiB"
#: Messages that may wait in the board; a real one drops more of them when the machine is busy, and counts none.
QUEUE = "10000"
#: Packets/s of the board that sends all the time.
SLOW = 100_000
#: The io_group of the board with the burst.
BURST = 3
#: One turn of the storage's being stopped and let go on (seconds).
TURN = 0.05
#: Filled so far the ring has no backlog: what a storage that is stopped for one turn is owed.
NEARLY_EMPTY = 0.1
#: Timed words before the burst and after the backlog.
SAMPLES = 60


@contextlib.contextmanager
def slowed(process: Any, share: float) -> Iterator[None]:
    """The process has this share of its time."""
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


class Words:
    """The board whose words are timed."""

    def __init__(self, socket: zmq.Socket[bytes], operator: Any) -> None:
        self._socket, self._operator = socket, operator
        self.sent = 0

    def take(self) -> float:
        """Milliseconds until one more is counted."""
        time.sleep(PAUSE)
        sent = time.monotonic()
        self.sent += 1
        self._socket.send(word(self.sent))
        while counted(self._operator) < self.sent:
            if time.monotonic() > sent + LIMIT:
                raise SystemExit(f"word {self.sent} was not counted after {LIMIT:g} s")
        return (time.monotonic() - sent) * 1000


def measure(line: System, rate: float, seconds: float, share: float) -> dict[str, Any]:
    count = int(rate * seconds)
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(contextlib.closing(Emulator("--rate", str(SLOW), "--queue", QUEUE, "--wait-for-go")))
        options = ("--rate", str(rate), "--words-per-message", "1000", "--count", str(count), "--queue", QUEUE)
        burst = stack.enter_context(contextlib.closing(Emulator(*options, "--stay", "--wait-for-go")))
        socket = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.XPUB))
        socket.linger = 0
        timed = socket.bind_to_random_port("tcp://127.0.0.1")
        data = {1: slow.ready["1"]["data"], TIMED: timed, BURST: burst.ready["1"]["data"]}
        ports = [f"{group}=127.0.0.1:{port}:{slow.ready['1']['command']}" for group, port in data.items()]
        operator = line.start("--ring", BOUND, "--spool-limit", BOUND, "--pacman", *ports)
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        if not socket.poll(LIMIT * 1000):
            raise SystemExit(f"no subscriber after {LIMIT:g} s")
        memory = stack.enter_context(contextlib.closing(Memory(line, list(line.processes))))
        words = Words(socket, operator)
        with slowed(line.processes["offline_storage"].popen, share):
            slow.go()
            usual = [words.take() for _ in range(SAMPLES)]
            before = {key: use.memory[-1] for key, use in memory.uses.items()}
            burst.go()
            began = time.monotonic()
            meanwhile = []
            status: dict[str, Any] = {"spooled_bytes": 0, "ring": 1.0}
            while not burst.ended() or status["spooled_bytes"] or status["ring"] > NEARLY_EMPTY:
                meanwhile.append(words.take())
                status = line.status_of(operator, "producer")
                if time.monotonic() - began > STEP:
                    raise SystemExit(f"still a backlog after {STEP:g} s: {status}")
            ended = time.monotonic()
            after = [(words.take(), time.monotonic() - ended) for _ in range(SAMPLES)]
        slow.stop()
        said = slow.finish()
        burst.stop()
        burst.process.wait(LIMIT)
        verdict = operator.end_run().result(STEP)
    found = tally(parts_of([line.data], verdict["run"]))
    sent = {
        1: said["sent"]["1"]["words"], TIMED: words.sent, BURST: burst.said["sent"]["1"]["words"],
    }  # fmt: skip
    late = [at for took, at in after if took > 1.5 * max(usual)]
    stored = (found.rows - SLOW * SAMPLES * 2 * PAUSE) / (ended - began)
    return {
        "rate": rate,
        "stored": round(stored),
        "times": round(rate / stored, 1),
        "sent": sum(sent.values()),
        "dropped": sum(found.counted.values()),
        "lost": sum(found.unaccounted(sent).values()),
        "condition": verdict["condition"],
        "latency_ms": {
            "before": round(max(usual), 1), "meanwhile": round(max(meanwhile), 1), "after": round(max(after)[0], 1),
        },
        "backlog_s": round(ended - began - seconds, 1),
        "normal_again_s": round(max(late, default=0.0), 2),
        "mib": {key: [round(n / 2**20, 1) for n in (before[key], max(use.memory), use.memory[-1])]
                for key, use in memory.uses.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rate", type=float, default=6.5e6, metavar="R", help="of the burst, packets/s (default %(default)g)")
    add("--seconds", type=float, default=5.0, metavar="S", help="of the burst (default %(default)g)")
    add("--share", type=float, default=0.1, metavar="F", help="of its time that the storage has (default %(default)g)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder, system(Path(folder)) as line:
        one = measure(line, options.rate, options.seconds, options.share)
    if options.json:
        print(json.dumps(one))
        return 1 if one["lost"] else 0
    print(
        f"burst of {one['rate'] / 1e6:g} M/s, {one['times']} times the {one['stored'] / 1e6:.2f} M/s that were stored: "
        f"{one['sent']:,} sent, {one['dropped']:,} counted lost, {one['lost']} unaccounted, {one['condition']}\n"
        f"longest latency, ms: {one['latency_ms']}; backlog for {one['backlog_s']} s more, normal again "
        f"{one['normal_again_s']} s after it"
    )
    for key, (before, most, last) in one["mib"].items():
        print(f"{key}: {before} MiB before, {most} at most, {last} at the end")
    return 1 if one["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
