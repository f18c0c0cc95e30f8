"""Measure the core with hundreds of components: registration, run transitions, processor time, and components that die.

    python bench/components.py [--hosts N] [--seconds S] [--json]

Each host has a producer, a storage and a monitor, and four hosts are a module. The components answer all actions at
once and have no data. Twelve processes hold them all, and their registrations begin together. "lost" is the time from
the SIGKILL of processes with 50 of them until the core's status has all 50 as lost. "groups" is the time in which a
viewer makes the groups of a status, and the number of lines that `larpixdaq status` then shows. Everything is on this
machine, and the components' processes take most of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from typing import Any

import zmq
from common import STEP, argument_parser, processor_seconds, temporary_system
from fake_core import Actor, producer_status, storage_status
from processes import until
from system import System

from larpixdaq.control.display import status_lines
from larpixdaq.runtime.event_loop import Signals

#: Processes that hold the components; those that are killed together have 50 components of 300.
PROCESSES, KILLED = 12, 2


def actors(core: str, host: int) -> list[Actor]:
    """Return the components of one host. Nothing listens at the producer's stream address."""
    end = {"epoch": host + 1, "next": 0, "rows": 0, "counts": [], "warning": None}
    produced: dict[str, Any] = {key: {} for key in ("begin_run", "cancel_run")} | dict.fromkeys(
        ("end_run", "abort_run"), end
    )
    module = f"module {host // 4}"
    producer = Actor(
        core, f"boards of {host}", "producer",
        {"stream": [f"tcp://127.0.0.1:{20_000 + host}", ""], "epoch": host + 1, "layout": 2, "asic": "2",
         "io_groups": [host % 255 + 1], "source": "none"},
        produced | {"prepare_run": {"epoch": host + 1, "layout": 2}}, module=module,
    )  # fmt: skip
    stored = {"files": [], "condition": "COMPLETE", "rows": 0, "stored": [], "reasons": []}
    storage = Actor(
        core, f"storage of {host}", "storage",
        {"directory": f"/data/{host}", "highest_run": 0, "free_bytes": 1 << 40},
        {"prepare_run": {"file": f"/data/{host}/x.h5.part", "free_bytes": 1 << 40}, "begin_run": {}, "cancel_run": {},
         "end_run": stored}, module=module,
    )  # fmt: skip
    joins = {key: {} for key in ("prepare_run", "begin_run", "end_run")}
    monitor = Actor(core, f"monitor of {host}", "run_data", {}, joins, module=module)
    producer.status, storage.status = producer_status(), storage_status()
    return [producer, storage, monitor]


def hold(core: str, first: int, stop: int) -> None:
    """Be the components of hosts `first` to `stop` until SIGTERM. One loop serves them all."""
    with Signals() as signals, contextlib.ExitStack() as stack:
        held = [actor for host in range(first, stop) for actor in actors(core, host)]
        poller = zmq.Poller()
        poller.register(signals.fileno(), zmq.POLLIN)
        nodes = {}
        for actor in held:
            stack.callback(actor.close)
            nodes[actor.node.fileno()] = actor.node
            poller.register(actor.node.fileno(), zmq.POLLIN)
        print("ready", flush=True)
        sys.stdin.readline()
        for node in nodes.values():
            node.start()
        while not signals.stop:
            for descriptor, _ in poller.poll(min(node.wait_ms() for node in nodes.values())):
                if descriptor in nodes:
                    nodes[descriptor].dispatch()
            for node in nodes.values():
                node.report(0, 0)


def alive(operator: Any) -> int:
    return sum(one["alive"] for one in operator.components().result(STEP))


def measure(line: System, hosts: int, seconds: float) -> dict[str, Any]:
    core = line.launch_core()
    found: dict[str, Any] = {"components": 3 * hosts}
    with contextlib.ExitStack() as stack:
        bounds = [hosts * i // PROCESSES for i in range(PROCESSES + 1)]
        processes = []
        for first, stop in itertools.pairwise(bounds):
            command = [sys.executable, __file__, "--hold", line.core, str(first), str(stop)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        operator = stack.enter_context(line.operator())
        began, before = time.monotonic(), processor_seconds(core.popen.pid)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        until(lambda: alive(operator) == 3 * hosts, "all components", STEP)
        found["registered_s"] = round(time.monotonic() - began, 2)
        found["registering_core_s"] = round(processor_seconds(core.popen.pid) - before, 2)
        states: dict[str, list[float]] = {"prepare_s": [], "begin_s": [], "end_s": []}
        for _ in range(3):
            for name, action in zip(states, (operator.prepare_run, operator.begin_run, operator.end_run), strict=True):
                began = time.monotonic()
                action().result(STEP)
                states[name].append(round(time.monotonic() - began, 2))
        found |= states
        before, began = processor_seconds(core.popen.pid), time.monotonic()
        time.sleep(seconds)
        found["core"] = round((processor_seconds(core.popen.pid) - before) / (time.monotonic() - began), 3)
        status = operator.status().result(STEP)
        began, lines = time.monotonic(), status_lines(status)
        found["groups_s"], found["lines"] = round(time.monotonic() - began, 3), len(lines)
        killed = processes[:KILLED]
        for process in killed:
            process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        dead = 3 * bounds[KILLED]
        until(lambda: alive(operator) == 3 * hosts - dead, "the lost components", STEP)
        found["killed"], found["lost_s"] = dead, round(time.monotonic() - began, 2)
        found["lines_lost"] = len(status_lines(operator.status().result(STEP)))
        for process in processes[KILLED:]:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(STEP)
    return found


def main() -> int:
    if sys.argv[1:2] == ["--hold"]:
        hold(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return 0
    parser = argument_parser(__doc__)
    parser.add_argument("--hosts", type=int, default=100, metavar="N", help="hosts (default %(default)d)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="(default %(default)g)")
    options = parser.parse_args()
    with temporary_system() as line:
        found = measure(line, options.hosts, options.seconds)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['components']} components registered in {found['registered_s']} s")
    for name in ("prepare", "begin", "end"):
        print(f"  {name}_run: {', '.join(map(str, found[f'{name}_s']))} s")
    print(f"  core: {found['core']} cores; {found['killed']} killed, all lost after {found['lost_s']} s")
    print(f"  status: {found['lines']} lines, {found['lines_lost']} then; groups made in {found['groups_s']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
