"""Attack a running line from outside, and report what was refused, and whether data or heartbeats suffered.

    python bench/attack.py [--seconds S] [--frames N] [--flood S] [--rate R] [--limit S] [--seed S]
                           [--update docs/security.md] [--json]

Emulated PACMANs send R packets/s through producer and storage in one run, which is attacked in three ways:

strangers  Another user of this host (uid 65534; needs root) knows all addresses and public keys. For S seconds it tries
           to register, command, subscribe, acknowledge and log without key, with an unknown key and for a wrong server,
           sends raw bytes and GET requests, holds connections open without a handshake, and opens all files and
           directories of the system and of its processes.
members    N mutated frames are sent to each port with a key of the lowest role: of an observer to the core, of a
           component to stream and log. They are made from valid messages of each kind.
floods     Members and strangers send as fast as they can, --flood seconds each, from two processes.

A heartbeat of one more component is sent every 250 ms; its slowest answer is reported. The exit status is 1 when an
attempt was not refused, a process ended or was reported lost or stuck, the state changed, a packet was lost, or an
answer took longer than --limit. As another user than root the strangers are of the same user, and leave files and
processes alone. The attacks are in strangers.py and members.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import members
import strangers
from common import STEP, argument_parser, begin_run, machine, update, with_source
from emulated_board import Emulator
from loss_accounting import parts_of, tally
from processes import until as wait_until
from strangers import Found, Port, Tries
from system import System, system

from larpixdaq.keys import credentials
from larpixdaq.keys.curve import KeyPair
from larpixdaq.operator import Operator
from larpixdaq.runtime import launcher

MARK = "attacks on one host"
#: User id of strangers.
NOBODY = 65534
#: The process under attack, by port.
PROCESSES = {"core": "core", "stream": "producer", "log": "log"}


class Attacker:
    """A process that does jobs. It is forked, because strangers may not be able to read the package's files."""

    def __init__(self, *, stranger: bool) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=self._serve, args=(theirs, stranger), daemon=True)
        self._process.start()
        theirs.close()

    def _serve(self, pipe: Any, stranger: bool) -> None:
        self._pipe.close()
        if stranger and os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.chdir("/")
        logging.disable()
        with contextlib.suppress(EOFError, ConnectionError):
            while (job := pipe.recv()) is not None:
                do, arguments, env = job
                os.environ.update(env)
                try:
                    pipe.send((do(*arguments), ""))
                except BaseException as error:
                    pipe.send((None, f"{do.__name__}: {type(error).__name__}: {error}"))

    def start(self, do: Callable[..., Any], *arguments: Any, env: dict[str, str] | None = None) -> None:
        self._pipe.send((do, arguments, env or {}))

    @property
    def done(self) -> bool:
        return bool(self._pipe.poll(0))

    def result(self) -> Any:
        value, failure = self._pipe.recv()
        if failure:
            raise SystemExit(f"an attacker failed: {failure}")
        return value

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(STEP)


class Watch:
    """One more component, whose heartbeats are timed, and the descriptors and memory of the processes."""

    def __init__(self, core: str, pids: dict[str, int]) -> None:
        self._node = members.monitor_node("Watch", core)
        self._pids = pids
        self._stop = threading.Event()
        self.slowest = 0.0  # seconds until a heartbeat was answered, since reset()
        self.descriptors: dict[str, int] = {}
        self.memory: dict[str, int] = {}  # MiB
        self._node.connect(STEP)
        wait_until(lambda: self._node.confirmed, "the first heartbeat to be answered")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.slowest, self.descriptors, self.memory = 0.0, {}, {}

    def _run(self) -> None:
        confirmed, sampled = self._node.confirmed, 0.0
        while not self._stop.is_set():
            select.select([self._node.fileno()], [], [], 0.005)
            self._node.dispatch()
            self._node.report(0, 0)
            now = time.monotonic()
            if self._node.confirmed != confirmed:
                confirmed = self._node.confirmed
                self.slowest = max(self.slowest, self._node.heard - confirmed)
            self.slowest = max(self.slowest, now - confirmed - 0.3)  # the next one, 0.25 s later, has no answer yet
            if now - sampled > 0.05:
                sampled = now
                for name, pid in self._pids.items():
                    with contextlib.suppress(OSError):
                        count = len(os.listdir(f"/proc/{pid}/fd"))
                        self.descriptors[name] = max(self.descriptors.get(name, 0), count)
                        total, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
                        resident = (total - shared) >> 8  # without ring and libraries
                        self.memory[name] = max(self.memory.get(name, 0), resident)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._node.close()


class Siege:
    """One run under attack. `failures`: broken promises."""

    def __init__(self, line: System, options: argparse.Namespace, outside: list[Attacker], inside: list[Attacker]):
        """`outside`: four processes of strangers; `inside`: two of members."""
        self.line, self.options = line, options
        self.outside, self.inside = outside, inside
        self.failures: list[str] = []
        self.tries = Found(Tries)
        self.rows: list[dict[str, Any]] = []
        self.disturbed: Counter[str] = Counter()  # components that were reported lost or stuck
        self.reported: set[str] = set()  # processes with a traceback
        self.env = {"XDG_STATE_HOME": str(line.folder / "members")}  # of members

    def prepare(self, board: Emulator) -> None:
        line = self.line
        (line.folder / "state").mkdir(mode=0o755)  # made by hand, so that its files protect themselves
        line.launch_core()
        line.launch_log()
        self.operator = begin_run(line, "--pacman", *board.addresses, "--ring", "512MiB")
        line.await_kinds(self.operator, "log")
        info = {c["kind"]: c["info"] for c in self.operator.components().result(STEP)}
        own = credentials.find(line.core)
        assert own is not None
        self.ports = [
            Port("core", line.core, own.server),
            Port("stream", *info["producer"]["stream"]),
            Port("log", *info["log"]["log"]),
        ]
        self.pids = {name: process.popen.pid for name, process in line.processes.items()}
        component = self._join(members.COMPONENT, "component")
        self.keys = {"core": self._join(members.OBSERVER, "observer"), "stream": component, "log": component}
        self.watch = Watch(line.core, self.pids)
        board.go()
        self.before = self._state()

    def _join(self, name: str, role: str) -> KeyPair:
        token = self.operator.invite(name, role).result(STEP)["token"]
        env = os.environ | self.env
        subprocess.run(launcher.command("cli", "keys", "join", token), env=env, check=True, capture_output=True)
        for path in (self.line.folder / "members").rglob("*.key.json"):
            found = credentials.read(path)
            if found is not None and found.name == name:
                return found.pair
        raise SystemExit(f"no key of {name}")

    def _state(self) -> dict[str, Any]:
        """Return what no attack may change."""
        status = self.operator.status().result(STEP)
        return {
            "state": status["state"],
            "run": status["run"]["run"],
            "components": sorted(
                (c["name"], c["kind"]) for c in status["components"] if c["alive"] and c["name"] != members.COMPONENT
            ),
            "control": status["control"]["by"] if status["control"] else None,
            "keys": [(key["name"], key["role"]) for key in self.operator.keys().result(STEP)["members"]],
        }

    def phase(self, name: str, port: str, attackers: list[Attacker]) -> tuple[list[Any], dict[str, Any]]:
        """Wait for attackers of a port ("": of all). Returns their results, and the figures of the time until then."""
        self.watch.reset()
        slowest, began = 0.0, time.monotonic()
        while not all(attacker.done for attacker in attackers):
            asked = time.monotonic()
            for component in self.operator.components().result(STEP):
                if component["name"] != members.COMPONENT and (component["stuck"] or not component["alive"]):
                    what = "stuck" if component["alive"] else "lost"
                    self.disturbed[f"{name}: {component['name']} was {what}"] += 1
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.1)
        results = [attacker.result() for attacker in attackers]
        attacked = [PROCESSES[port]] if port else list(PROCESSES.values())
        figures = {
            "attack": name,
            "port": port,
            "seconds": round(time.monotonic() - began, 1),
            "heartbeat_s": round(self.watch.slowest, 3),
            "answer_s": round(slowest, 3),
            "descriptors": max(self.watch.descriptors.get(process, 0) for process in attacked),
            "memory_mib": max(self.watch.memory.get(process, 0) for process in attacked),
        }
        if self.watch.slowest > self.options.limit:
            self.failures.append(f"{name}: a heartbeat was answered after {self.watch.slowest:.2f} s")
        for process, started in self.line.processes.items():
            if started.popen.poll() is not None:
                self.failures.append(f"{name}: {process} has ended: {started.stderr[-500:]}")
            elif "Traceback" in started.stderr and process not in self.reported:
                self.reported.add(process)
                self.failures.append(f"{name}: {process}: {started.stderr[-1500:]}")
        if (after := self._state()) != self.before:
            self.failures.append(f"{name}: the state was {self.before}, is {after}")
            self.before = after
        self.rows.append(figures)
        print(figures, file=sys.stderr, flush=True)
        return results, figures

    def attack_as_strangers(self) -> None:
        until = time.monotonic() + self.options.seconds
        jobs: list[tuple[Any, ...]] = [
            (strangers.keyless, self.ports, until),
            (strangers.raw, self.ports, until),
            (strangers.half_open, self.ports, until),
        ]
        if os.geteuid() == 0:  # else the files are the strangers' own
            jobs.append((strangers.files, self._paths(), self.pids, until))
        busy = self.outside[: len(jobs)]
        for attacker, job in zip(busy, jobs, strict=True):
            attacker.start(*job)
        results, _ = self.phase("strangers", "", busy)
        for found in results:
            for name, tries in found.items():
                self.tries[name].add(tries)
        for name, tries in self.tries.items():
            if tries.through:
                self.failures.append(f"not refused: {name}: {tries.through}")

    def _paths(self) -> list[tuple[str, str]]:
        """Return all files and directories of the system, except the data."""
        found = []
        for top, what in (
            (self.line.rings, "a ring"),
            (self.line.folder / "state" / "spool", "the spool"),
            (self.line.folder / "state" / "keys", "the core's keys"),
            (self.line.folder / "xdg" / "larpixdaq", "a connection file"),
            (self.line.folder / "members" / "larpixdaq", "a member's key"),
            (self.line.folder / "state", "run catalogue and log"),
        ):
            for directory, _, names in os.walk(top):
                if directory != str(self.line.folder / "state"):
                    found.append(("directory", directory))
                found += [(what, os.path.join(directory, name)) for name in names]
        return found

    def attack_as_members(self) -> None:
        for port in self.ports:
            arguments = (port, self.keys[port.name], self.line.core, self.options.frames, self.options.seed)
            self.inside[0].start(members.mutated, *arguments, env=self.env)
            before = self._counted_by_log()
            (found,), figures = self.phase("mutated frames", port.name, self.inside[:1])
            handled = found["answers"] if port.name != "log" else self._counted_by_log() - before
            figures |= {"frames": self.options.frames, "handled": handled}
            if handled < 0.5 * self.options.frames:
                self.failures.append(f"{port.name}: {self.options.frames} mutated frames, only {handled} were handled")

    def _counted_by_log(self) -> int:
        """Return the number of records that the log has written, held back or refused."""
        status = self.line.status_of(self.operator, "log")
        return sum(status[name] for name in ("written", "held_back", "refused"))

    def flood(self) -> None:
        for port in self.ports:
            key = self.keys[port.name]
            for what in members.FLOODS[port.name]:
                busy = self.inside[:1] if port.name == "stream" else self.inside  # it has one session
                self._flood(f"{what}, with a valid key", busy, members.flood, port, key, self.line.core, what)
            self._flood("connections with a valid key", self.inside, strangers.flood, port, "handshakes", key)
            for how in strangers.FLOODS:
                self._flood(f"{how}, of strangers", self.outside[:2], strangers.flood, port, how, None)

    def _flood(self, name: str, busy: list[Attacker], do: Callable[..., int], port: Port, *arguments: Any) -> None:
        until = time.monotonic() + self.options.flood
        for attacker in busy:
            attacker.start(do, port, *arguments, until, env=self.env)
        counts, figures = self.phase(name, port.name, busy)
        figures["per_second"] = round(sum(counts) / self.options.flood)

    def end(self, board: Emulator) -> dict[str, Any]:
        """End the run, and count the words in its files."""
        board.stop()
        sent = {int(group): counts["words"] for group, counts in board.finish()["sent"].items()}
        self.watch.close()
        with Operator(self.line.core, timeout=STEP):  # a new one is served
            pass
        ended = self.operator.end_run().result(STEP)
        totals = tally(parts_of([self.line.data], ended["run"]), os.cpu_count() or 1)
        lost = {group: n - totals.stored.get(group, 0) for group, n in sent.items()}
        self.failures += [f"{what}, in {n} looks" for what, n in self.disturbed.items()] + totals.problems
        if ended["condition"] != "COMPLETE":
            self.failures.append(f"the run is {ended['condition']}: {ended['reasons']}")
        if any(lost.values()):
            self.failures.append(f"packets lost, by io_group: {lost}")
        status = self.operator.status().result(STEP)
        return {
            "sent": sum(sent.values()),
            "stored": sum(totals.stored.values()),
            "lost": sum(lost.values()),
            "condition": ended["condition"],
            "refused_messages": status["refused_messages"],
        }


def text(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    outcome = report["outcome"]
    slowest = max(row["heartbeat_s"] for row in report["attacks"])
    lines = [
        f"{outcome['sent']:,} packets sent in {outcome['seconds']:.0f} s, {outcome['lost']:,} lost, run "
        f"{outcome['condition']}; slowest answer to a heartbeat {slowest:.2f} s.",
        "",
        "| tried by strangers | attempts | refused |",
        "| --- | ---: | ---: |",
    ]
    groups: dict[tuple[str, str], dict[str, Tries]] = {}  # one row for all messages with the same key
    for name, tries in report["tries"].items():
        place, _, what = name.partition(": ")
        what, _, key = what.partition(", with ")
        groups.setdefault((place, f", with {key}" if key else what), {})[what] = Tries(**tries)
    for (place, key), group in groups.items():
        what = ", ".join(group) + (key if key.startswith(",") else "")
        tried, refused = (sum(getattr(tries, name) for tries in group.values()) for name in ("tries", "refused"))
        lines.append(f"| {place}: {what} | {tried:,} | {refused:,} |")
    lines += [
        "",
        "| attack | port | rate, number | slowest heartbeat, s | slowest request, s | descriptors | memory, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["attacks"]:
        amount = f"{row['per_second']:,}/s" if "per_second" in row else f"{row['frames']:,}" if "frames" in row else ""
        figures = f"{row['heartbeat_s']:.2f} | {row['answer_s']:.2f} | {row['descriptors']} | {row['memory_mib']}"
        lines.append(f"| {row['attack']} | {row['port'] or 'all'} | {amount} | {figures} |")
    failures = [f"- {failure}" for failure in report["failures"]]
    lines += ["", *(["Failures:", "", *failures] if failures else ["No failures."])]
    return "\n".join(lines)


def attack(options: argparse.Namespace, folder: Path, outside: list[Attacker], inside: list[Attacker]) -> Any:
    """Attack one run. Returns the report."""
    board_options = ("--io-groups", "2", "--rate", str(options.rate / 2), "--words-per-message", "auto")
    with contextlib.closing(Emulator(*board_options, "--wait-for-go", "--lossless")) as board, system(folder) as line:
        siege = Siege(line, options, outside, inside)
        siege.prepare(board)
        began = time.monotonic()
        siege.attack_as_strangers()
        siege.attack_as_members()
        siege.flood()
        seconds = time.monotonic() - began
        outcome = siege.end(board) | {"seconds": round(seconds, 1)}
    tries = {name: asdict(found) for name, found in siege.tries.items()}
    return {"outcome": outcome, "tries": tries, "attacks": siege.rows, "failures": siege.failures}


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=10.0, metavar="S", help="length of strangers' attempts (default %(default)g)")
    add("--frames", type=int, default=100_000, metavar="N", help="mutated frames a port (default %(default)d)")
    add("--flood", type=float, default=3.0, metavar="S", help="length of each flood (default %(default)g)")
    add("--rate", type=float, default=500_000.0, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--limit", type=float, default=0.5, metavar="S", help="for the answer to a heartbeat (default %(default)g)")
    add("--seed", type=int, default=1, metavar="S", help="of the random numbers (default %(default)d)")
    add("--update", type=Path, metavar="FILE", help=f"write the report into this document, at the marks '{MARK}'")
    options = parser.parse_args()
    outside = [Attacker(stranger=True) for _ in range(4)]
    inside = [Attacker(stranger=False) for _ in range(2)]
    try:
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as name:
            folder = Path(name)
            folder.chmod(0o755)  # as many home directories: what is in it protects itself
            os.environ["XDG_STATE_HOME"] = str(folder / "xdg")
            report = attack(options, folder, outside, inside)
    finally:
        for attacker in (*outside, *inside):
            attacker.close()
    command = (
        f"python bench/attack.py --seconds {options.seconds:g} --frames {options.frames} --flood {options.flood:g}"
    )
    shown = with_source(text(report), command)
    print(json.dumps(report | {"command": command, "machine": machine()}) if options.json else shown)
    if options.update:
        update(options.update, MARK, shown)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
