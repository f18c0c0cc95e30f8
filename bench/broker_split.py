"""The pause of a run while the network of one of three brokers is cut for 20 s.

    python bench/broker_split.py [--seconds S] [--rate R] [--rounds N] [--update docs/cluster.md] [--json]

A producer with emulated packets (--fake) and a storage on one host, and three real brokers each on its own host; hosts
are network namespaces, so that this needs root. A broker that leads the producer's stream, or does not, is cut off from
all hosts, or from the other brokers only, so that clients still reach it. Connections stay open, and nothing passes.
The pause is the longest time in which the storage took no row. At the end the blocks in the files are counted. The exit
status is 1 when a block is missing or there twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import argument_parser, temporary_system, update, with_source  # isort: skip  finds the others
from brokers import Brokers, brokers
from network import Network, missing_rights
from processes import LIMIT, until
from system import System

from larpixdaq.errors import ComponentError
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.operator import Operator
from larpixdaq.stream.jetstream import stream_name

MARK = "broker split"
#: The host of producer and storage, and those of the brokers.
CLIENTS, HOSTS = "daq", ("broker-0", "broker-1", "broker-2")
#: What is cut: whether it is the leader of the producer's stream, and whether clients still reach it.
CUTS = {
    "follower": (False, False),
    "leader": (True, False),
    "leader, from the brokers only": (True, True),
}


def taken(operator: Operator) -> int:
    """Return the rows that the storage has taken."""
    (storage,) = [each for each in operator.components().result(LIMIT) if each["kind"] == "storage"]
    return int(storage["status"].get("total_rows", 0))


def longest_pause(operator: Operator, seconds: float) -> float:
    """Watch the storage for `seconds`, and on until it takes rows. Returns the longest time (s) without a new row."""
    began = changed = time.monotonic()
    rows, longest = taken(operator), 0.0
    while True:
        found, now = taken(operator), time.monotonic()
        longest = max(longest, now - changed)
        if found != rows:
            rows, changed = found, now
            if now > began + seconds:
                return longest
        if now > began + seconds + 60:
            raise SystemExit(f"the storage has taken no row for {now - changed:.0f} s")
        time.sleep(0.05)


def begin(operator: Operator) -> None:
    def prepared() -> bool:
        try:
            operator.prepare_run().result(LIMIT)
        except ComponentError:  # the producer's stream is made meanwhile
            return False
        return True

    until(prepared, "a run to be prepared")
    operator.begin_run().result(LIMIT)
    until(lambda: taken(operator) > 20_000, "rows in the file")


def blocks_of(files: list[str]) -> tuple[int, int]:
    """Return how many blocks are missing in the files of a run, and how many are there twice."""
    found: Counter[tuple[int, int]] = Counter()
    following: dict[int, int] = {}
    for path in files:
        with DataFile(Path(path)) as file:
            table, ends = file.table("run/blocks"), file.table("run/ends")
            found.update(zip(table["epoch"].tolist(), table["sequence"].tolist(), strict=True))
            following |= dict(zip(ends["epoch"].tolist(), ends["next"].tolist(), strict=True))
    return sum(following.values()) - len(found), sum(many - 1 for many in found.values())


def split(line: System, made: Brokers, net: Network, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Cut off one broker after the other, in one run. Returns a line for each, and one for the run."""
    line.launch_core()
    line.launch_storage("--stream", made.urls)
    operator = line.start(
        "--fake", options.rate, "--stream", made.urls, "--stream-size", "4GiB", "--name", "board",
        "--spool-limit", "2GiB",
    )  # fmt: skip
    begin(operator)
    found: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for kind, (of_leader, reached) in CUTS.items():
            leader = made.leader_of(stream_name("board"))
            alone = leader if of_leader else (leader + 1) % len(made)
            others = [host for host in HOSTS if host != HOSTS[alone]] + ([] if reached else [CLIENTS])
            for host in others:
                net.fault(HOSTS[alone], host, cut=True)
            try:
                pause = longest_pause(operator, options.seconds)
            finally:
                for host in others:
                    net.heal(HOSTS[alone], host)
            began = time.monotonic()
            made.await_ready(alone, 120.0)
            ready = time.monotonic() - began
            after = longest_pause(operator, 5.0)
            found.append({"cut": kind, "pause": pause, "ready": ready, "after": after})
            print(
                f"{kind}: {pause:.1f} s; it is ready after {ready:.1f} s, then {after:.1f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    ended = operator.end_run().result(60)
    missing, doubled = blocks_of(ended["files"])
    found.append({"condition": ended["condition"], "rows": ended["rows"], "missing": missing, "doubled": doubled})
    return found


def text(found: list[dict[str, Any]], seconds: float) -> str:
    *cuts, run = found
    lines = [
        f"| cut off for {seconds:g} s | times | longest pause, s | it has all again after, s | longest pause then, s |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for kind in CUTS:
        of = [cut for cut in cuts if cut["cut"] == kind]
        spans = [sorted(cut[key] for cut in of) for key in ("pause", "ready", "after")]
        lines.append(f"| {kind} | {len(of)} | " + " | ".join(f"{s[0]:.1f} to {s[-1]:.1f}" for s in spans) + " |")
    counts = f"{run['rows']:,} rows, {run['missing']} blocks lost, {run['doubled']} doubled"
    return "\n".join([*lines, "", f"Run {run['condition']}: {counts}."])


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=20.0, metavar="S", help="time for which a broker is cut off")
    add("--rate", type=int, default=50_000, metavar="R", help="rows/s (default %(default)d)")
    add("--rounds", type=int, default=3, metavar="N", help="times that each cut is made (default %(default)d)")
    add("--update", type=Path, metavar="FILE", help=f"write the result into this document, at the marks '{MARK}'")
    options = parser.parse_args()
    if reason := missing_rights():
        parser.error(reason)
    with (
        contextlib.closing(Network(CLIENTS, *HOSTS)) as net,
        net.inside(CLIENTS),
        brokers(len(HOSTS), network=net) as made,
        temporary_system() as line,
    ):
        found = split(line, made, net, options)
    if options.json:
        print(json.dumps(found))
    else:
        command = f"python bench/broker_split.py --seconds {options.seconds:g} --rate {options.rate}"
        shown = with_source(text(found, options.seconds), f"{command} --rounds {options.rounds}")
        print(shown)
        if options.update is not None:
            update(options.update, MARK, shown)
    return 1 if found[-1]["missing"] or found[-1]["doubled"] else 0


if __name__ == "__main__":
    sys.exit(main())
