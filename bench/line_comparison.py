"""The same fault in a real line and in its simulation (line_model.py): --compare and --compare-brokers of scaling.py.

Over ZeroMQ the only storage of a line of one emulated board is stopped (SIGSTOP), or runs only a share of the time;
ring and spool are read from the producer's status. Over brokers the packets are made up (--fake), and a storage is
stopped, or a broker killed; the brokers are asked what their stream has and what the storage has acknowledged. Their
simulation gives all processes together the cores of this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import cluster as cluster_bench
from bursts import slowed
from common import STEP, begin_run, temporary_system, update, with_source
from emulated_board import Emulator
from line_model import Line, Sample
from line_parts import RESERVED, ROW, Costs, Fault, Plan
from processes import until
from system import System

from brokers import Brokers, brokers  # isort: skip  after common, which finds tests/support
from larpixdaq.stream import jetstream
from larpixdaq.stream.downlink import ACK_DELAY

HEADINGS = "| packets/s | {} | quantity | real | simulated | ratio |\n| ---: | --- | --- | ---: | ---: | ---: |"

# Over ZeroMQ

#: Ring and spool limit of the real line and of its simulation.
RING = 64 << 20


class Case(NamedTuple):
    """`rate`: packets/s of one board in messages of 1,000 words; `stop`: seconds for which the storage is stopped."""

    rate: int
    seconds: float
    stop: float


CASES = [Case(20_000, 12, 8), Case(200_000, 10, 5), Case(400_000, 10, 6), Case(500_000, 7, 2)]
#: Seconds before the storage is stopped.
BEFORE = 2.0
#: The highest rate at which a storage that runs a twentieth of the time stores: packets/s that come, and seconds.
OFFERED, OFFERED_SECONDS, SHARE = 2_000_000, 10.0, 0.05
#: Seconds after which the ring is full.
FULL_AFTER = 3.0


class Seen(NamedTuple):
    ring: float  # the fullest
    spool: float  # MiB, the most
    caught_up: float  # seconds after the storage's continuation


def real(case: Case) -> Seen:
    """Take a run with one producer and one storage, and stop the storage in it."""
    count = int(case.rate * case.seconds)
    board_options = ("--rate", str(case.rate), "--words-per-message", "1000", "--count", str(count), "--queue", "10000")
    with (
        temporary_system() as line,
        contextlib.closing(Emulator(*board_options, "--stay", "--wait-for-go")) as board,
    ):
        operator = begin_run(line, "--ring", "64MiB", "--spool-limit", "8GiB", "--pacman", *board.addresses)
        storage = line.processes["offline_storage"].popen
        status: Callable[[], dict[str, Any]] = lambda: line.status_of(operator, "producer")  # noqa: E731
        ring = spool = 0.0
        board.go()
        time.sleep(BEFORE)
        storage.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        while time.monotonic() - stopped < case.stop:
            time.sleep(0.05)
            now = status()
            ring, spool = max(ring, now["ring"]), max(spool, now["spooled_bytes"])
        storage.send_signal(signal.SIGCONT)
        continued = time.monotonic()

        def done() -> bool:
            nonlocal ring, spool
            now = status()
            ring, spool = max(ring, now["ring"]), max(spool, now["spooled_bytes"])
            return not now["spooled_bytes"] and now["ring"] < settled(case)

        until(done, "the backlog to be stored", STEP)
        took = time.monotonic() - continued
        until(board.ended, "the board to have sent everything", STEP)
        board.stop()
        ended = operator.end_run().result(STEP)
        if ended["condition"] != "COMPLETE":
            raise SystemExit(f"the run is {ended['condition']}")
    return Seen(ring, spool / 2**20, took)


def settled(case: Case) -> float:
    """Fill of the ring below which there is no backlog: rows of half a second."""
    return max(0.02, 0.5 * case.rate * 36 / RING)


def simulated(case: Case) -> Seen:
    plan = Plan(
        rates=[(0.0, float(case.rate))], seconds=case.seconds, same_host=True, ring=RING, tick=0.02,
        faults=[Fault("storage", 0, BEFORE, case.stop)],
    )  # fmt: skip
    result = Line(plan, Costs.measured()).run()
    continued = BEFORE + case.stop
    caught_up = next(
        look.at - continued
        for look in result.samples
        if look.at > continued and look.ring < settled(case) and not look.spool
    )
    return Seen(result.ring, result.spool / 2**20, caught_up)


def real_limit() -> float:
    """Return the rows/s that a storage stores which runs a twentieth of the time, while rows wait in ring and spool."""
    count = str(int(OFFERED * OFFERED_SECONDS))
    board_options = ("--rate", str(OFFERED), "--words-per-message", "1000", "--count", count, "--queue", "10000")
    with (
        temporary_system() as line,
        contextlib.closing(Emulator(*board_options, "--stay", "--wait-for-go")) as board,
    ):
        operator = begin_run(line, "--ring", "64MiB", "--spool-limit", "8GiB", "--pacman", *board.addresses)
        with slowed(line.processes["offline_storage"].popen, SHARE):
            board.go()
            time.sleep(FULL_AFTER)
            began, before = time.monotonic(), waiting_rows(line, operator)
            time.sleep(OFFERED_SECONDS - FULL_AFTER - 1.0)
            took, grown = time.monotonic() - began, waiting_rows(line, operator) - before
        until(board.ended, "the board to have sent everything", STEP)
        board.stop()
        until(lambda: not line.status_of(operator, "producer")["owed_blocks"], "all rows to be stored", STEP)
        operator.end_run().result(STEP)
    return OFFERED - grown / took


def waiting_rows(line: System, operator: Any) -> float:
    """Return the rows in ring and spool, from the producer's status."""
    status = line.status_of(operator, "producer")
    return float(status["ring"] * (RING - RESERVED) + status["spooled_bytes"]) / ROW


def simulated_limit() -> float:
    plan = Plan(
        rates=[(0.0, float(OFFERED))], seconds=OFFERED_SECONDS, same_host=True, ring=RING, tick=0.02,
        faults=[Fault("processor", 0, 0.0, OFFERED_SECONDS, SHARE)],
    )  # fmt: skip
    samples = Line(plan, Costs.measured()).run().samples
    first = next(sample for sample in samples if sample.at >= FULL_AFTER)
    last = next(sample for sample in samples if sample.at >= OFFERED_SECONDS - 1.0)
    return OFFERED - (last.waiting - first.waiting) / (last.at - first.at)


def compare(options: Any) -> int:
    rows = [HEADINGS.format("storage")]

    def add(rate: int, what: str, quantity: str, found: float, expected: float, digits: int) -> None:
        ratio = f"{expected / found:.2f}" if found else ""
        rows.append(f"| {rate:,} | {what} | {quantity} | {found:.{digits}f} | {expected:.{digits}f} | {ratio} |")
        print(rows[-1], flush=True)

    print(rows[-1])
    for case in CASES:
        found, expected = real(case), simulated(case)
        what = f"stopped for {case.stop:g} s"
        add(case.rate, what, "fullest ring", found.ring, expected.ring, 3)
        add(case.rate, what, "largest spool, MiB", found.spool, expected.spool, 1)
        add(case.rate, what, "s until all was stored", found.caught_up, expected.caught_up, 2)
    limits = [limit() / 1e6 for limit in (real_limit, simulated_limit)]
    add(OFFERED, f"runs {SHARE:.0%} of the time", "M rows/s stored", *limits, 2)
    if options.update:
        update(options.update, "comparison", with_source("\n".join(rows), "python bench/scaling.py --compare"))
    return 0


# Over brokers


class BrokerCase(NamedTuple):
    """`rate`: packets/s; `seconds`: at least; `stop`: seconds.

    `fault`: "" (none), "storage" (stopped), "leader" (of the stream, killed for good), or "broker" (the only one,
    killed and started again).
    """

    brokers: int
    rate: int
    seconds: float
    fault: str = ""
    stop: float = 0.0

    @property
    def what(self) -> str:
        return {
            "": "no fault",
            "storage": f"storage stopped for {self.stop:g} s",
            "leader": "leader killed",
            "broker": f"broker killed, started after {self.stop:g} s",
        }[self.fault]


BROKER_CASES = [
    BrokerCase(3, 200_000, 6),
    BrokerCase(1, 400_000, 11, "storage", 6),
    BrokerCase(3, 200_000, 12, "leader"),
    BrokerCase(1, 2_000_000, 10, "broker", 3),
]
#: Seconds of the rate that are no backlog, and fewer messages than these.
SETTLED, FEW = 0.5, 10
#: Name of the producer.
NAME = "LArPix board"


class BrokerLine:
    """A real line with made-up packets (--fake), brokers and a storage, in a run; `looks`: those so far."""

    def __init__(self, cluster: Brokers, line: System, rate: int) -> None:
        self.cluster, self._line = cluster, line
        line.launch_core()
        where = ("--stream", cluster.urls)
        self.producer = line.launch_producer("--fake", str(rate), *where, "--stream-size", "4GiB", "--ring", "512MiB")
        self.operator = line.operator()
        line.await_kinds(self.operator, "producer")
        until(lambda: (self.status().get("uplink") or {}).get("connected"), "the uplink to be connected", STEP)
        self.storage = line.launch_storage(*where)
        line.await_kinds(self.operator, "storage")
        self.operator.prepare_run(kind="bench").result(STEP)
        self.operator.begin_run().result(STEP)
        self.stream = jetstream.stream_name(NAME)
        self.began = time.monotonic()
        self.looks: list[BrokerLook] = []
        self._fill = 0.0, 0.0

    def status(self) -> dict[str, Any]:
        return self._line.status_of(self.operator, "producer")

    def look(self) -> BrokerLook:
        status = self.status()
        if "ring" in status:  # else the core has just lost the producer, as on a busy machine
            self._fill = status["ring"], status["spooled_bytes"]
        stored = read = 0
        led = False
        for n in range(len(self.cluster)):
            for stream in self.cluster.streams(n):
                if stream["name"] == self.stream:
                    stored = max(stored, stream["state"]["last_seq"])
                    led |= (stream.get("cluster") or {}).get("leader") == f"broker-{n}"
                    for consumer in stream.get("consumer_detail") or []:
                        read = max(read, consumer["ack_floor"]["stream_seq"])
        if self.looks:  # a broker that has just been started knows nothing yet
            stored, read = max(stored, self.looks[-1].stored), max(read, self.looks[-1].read)
        at = time.monotonic() - self.began
        self.looks.append(BrokerLook(at, *self._fill, stored, read, led))
        return self.looks[-1]

    def watch(self, condition: Callable[[BrokerLook], bool], what: str) -> float:
        """Look until a condition holds; return when that was."""
        until(lambda: condition(self.look()), what, STEP)
        return self.looks[-1].at

    def uplink_at(self, broker: int) -> bool:
        """Return whether the uplink is connected to this broker."""
        port = int(self.cluster.url(broker).rpartition(":")[2])
        return port in connections(cluster_bench.child_of(self.producer.popen.pid))


class BrokerLook(NamedTuple):
    """At `at` (s) the brokers had the messages up to `stored`, the storage had acknowledged those up to `read`, and the
    stream had a leader or not."""

    at: float
    ring: float
    spool: float
    stored: int
    read: int
    led: bool


def connections(pid: int) -> set[int]:
    """Return the remote ports of the TCP connections of a process."""
    mine = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(entry))
    rows = [row.split() for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[2].rpartition(":")[2], 16) for row in rows if f"socket:[{row[9]}]" in mine}


class Trial(NamedTuple):
    """A run over brokers. `rate`: rows/s that came; `fault`: as it was; `connected`: the uplink, to the broker that was
    killed."""

    case: BrokerCase
    rate: float
    fault: Fault | None
    connected: bool
    samples: list[Sample]


def real_over_brokers(case: BrokerCase) -> Trial:
    """Take a run over brokers with a fault."""
    with brokers(case.brokers) as cluster, temporary_system() as system:
        line = BrokerLine(cluster, system, case.rate)
        line.watch(lambda look: look.at > BEFORE, "the time of the fault")
        fault, connected = None, False
        at = time.monotonic() - line.began
        if case.fault == "storage":
            line.storage.popen.send_signal(signal.SIGSTOP)
            line.watch(lambda look: look.at > at + case.stop, "the end of the stop")
            line.storage.popen.send_signal(signal.SIGCONT)
            fault = Fault("storage", 0, at, time.monotonic() - line.began - at)
        elif case.fault:
            leader = cluster.leader_of(line.stream) if case.brokers > 1 else 0
            connected = line.uplink_at(leader)
            at = time.monotonic() - line.began
            cluster.kill(leader)
            if case.fault == "broker":
                line.watch(lambda look: look.at > at + case.stop, "the time of the start")
                cluster.start(leader, wait=False)
            fault = Fault("broker", 0, at, line.watch(lambda look: look.led, "a leader") - at)
        ready = lambda look: look.at > case.seconds and look.stored - look.read < FEW  # noqa: E731
        end = line.watch(ready, "the rows to be stored") + 1.0
        line.watch(lambda look: look.at > end, "the end of the run")
        ended = line.operator.end_run().result(STEP)
        if ended["condition"] != "COMPLETE":
            raise SystemExit(f"the run is {ended['condition']}")
        rows = [0, *accumulate(message.rows for message in cluster_bench.read(cluster, line.stream))]
    looks = line.looks
    samples = [Sample(look.at, look.ring, look.spool, 0, rows[look.stored], rows[look.read]) for look in looks]
    rate = (samples[-1].published - samples[0].published) / (samples[-1].at - samples[0].at)
    return Trial(case, rate, fault, connected, samples)


def simulated_over_brokers(trial: Trial) -> Trial:
    """Simulate a run with the fault as it was: an election, and a start of a broker, take the time that they took."""
    case, fault, costs = trial.case, trial.fault, Costs.measured()
    if case.fault == "leader" and fault is not None:
        costs = costs._replace(election=(fault.seconds, fault.seconds))
        fault = dataclasses.replace(fault, seconds=math.inf)
    plan = Plan(
        rates=[(0.0, trial.rate)], seconds=trial.samples[-1].at + 2.0, brokers=case.brokers, replicas=case.brokers,
        tick=0.02, look=ACK_DELAY / 2, cores=os.cpu_count() or 1, faults=[fault] if fault else [],
    )  # fmt: skip
    line = Line(plan, costs)
    line.streams[0].connected = 0 if trial.connected else case.brokers - 1
    samples = line.run().samples
    # Brokers hear of what is stored some time later.
    heard = [look._replace(stored=samples[max(0, n - 2)].stored) for n, look in enumerate(samples)]
    return trial._replace(samples=heard)


def quantities(trial: Trial) -> dict[str, tuple[float, int]]:
    """Return what is compared, each with its number of digits; nan: not within the run."""
    case, fault, samples = trial.case, trial.fault, trial.samples
    behind = [(look.at, look.published - look.stored) for look in samples]
    if fault is None:
        usual = [rows for at, rows in behind if BEFORE < at < case.seconds]
        return {"ms of rows at the brokers and not stored, mean": (1e3 * statistics.mean(usual) / trial.rate, 0)}
    ended = fault.at + fault.seconds
    most = max(look.ring for look in samples)
    first = samples[0]

    def stored(look: Sample) -> bool:
        return look.stored > first.stored + trial.rate * (look.at - first.at - SETTLED)

    caught_up = next((look.at - ended for look in samples if look.at > ended and stored(look)), math.nan)
    if case.fault == "storage":
        found = {"M rows at the brokers and not stored, most": (max(rows for _, rows in behind) / 1e6, 2)}
    else:
        empty = next((look.at - ended for look in samples if look.at > ended and look.ring < most / 10), math.nan)
        found = {"fullest ring": (most, 3), "s until the ring was empty": (empty, 2)}
    return found | {"s until all was stored": (caught_up, 2)}


def compare_over_brokers(options: Any) -> int:
    """Compare runs over brokers, each taken some times; the ratio is the median."""
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # it logs each connection to a dead broker
    rows = [HEADINGS.format("brokers")]
    print(rows[-1])
    for case in BROKER_CASES:
        trials = [real_over_brokers(case) for _ in range(options.rounds)]
        found = [quantities(trial) for trial in trials]
        expected = [quantities(simulated_over_brokers(trial)) for trial in trials]
        for quantity, (_, digits) in found[0].items():
            texts = [", ".join(f"{each[quantity][0]:.{digits}f}" for each in which) for which in (found, expected)]
            ratio = statistics.median(
                there[quantity][0] / here[quantity][0] for here, there in zip(found, expected, strict=True)
            )
            rows.append(
                f"| {case.rate:,} | {case.brokers}, {case.what} | {quantity} | {texts[0]} | {texts[1]} | {ratio:.2f} |"
            )
            print(rows[-1], flush=True)
    if options.update:
        command = f"python bench/scaling.py --compare-brokers --rounds {options.rounds}"
        update(options.update, "broker comparison", with_source("\n".join(rows), command))
    return 0
