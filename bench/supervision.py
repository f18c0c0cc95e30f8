"""A supervised detector: start, the same command again, the supervisor's own cost, and killed processes of every kind.

    python bench/supervision.py [--boards N] [--rate R] [--kills N] [--seed S] [--cost S] [--update docs/reliability.md]
    python bench/supervision.py --together 600 [--boards N] [--rate R] [--seed S] [--update docs/reliability.md]
    python bench/supervision.py --hosts 1,3 [--boards N] [--rate R] [--rounds N] [--update docs/reliability.md]

Emulated PACMANs that wait for the producer send in all R packets/s (500,000) in one run of each kind of process. In
it, the processes of this kind are killed N times (10), each some time after it was back. "back" is the time from the
kill until the new process is registered. "unaccounted" are the words that the boards have sent and that are neither
stored nor counted as lost. The supervisor is a kind, too: `larpixdaq up` starts it again, and the other processes must
have been left alone. Exit status 1 if a promise is broken.

With --together, processes of all kinds are killed in one run of that many seconds, in random order. Then an alarm must
have told of each kill within 2 s, and all alarms must clear by themselves, some minutes after so many kills.

With --hosts, nothing is killed: hosts in network namespaces, with keys, are started by `larpixdaq up` on all of them at
the same time, from one file with emulated boards; the numbers of hosts take turns. The time is that until the last of
the commands has returned, when all processes have registered. "processor" is the time that all of them and the commands
have needed for it: the hosts have to share the cores of this machine. Needs root.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import STEP, argument_parser, processor_seconds, update, with_source
from detector import Detector, detector
from emulated_board import Emulator
from loss_accounting import parts_of, tally
from network import Network, missing_rights
from processes import until

from larpixdaq.control.catalogue import AlarmRow, read_alarms
from larpixdaq.operator import Operator
from larpixdaq.runtime.launcher import is_running, read_running

MARK, MARK_TOGETHER, MARK_HOSTS = "supervision", "killer of all kinds", "up on hosts"
#: Maximum seconds until an alarm tells of a killed process, and until all alarms have cleared after the run.
ALARM_LIMIT, CLEAR_LIMIT = 2.0, 420.0
#: Conditions of alarms that tell of a killed process.
CONDITIONS = ("component-lost", "component-restarted")
#: Kinds of processes, by the names of their components. The producer is last: only its kills may lose words, which are
#: then inside marked gaps.
KINDS = ("core", "Log", "Offline storage", "Online monitor", "supervisor", "LArPix board")
#: Maximum seconds until a killed process is back, and until all processes have registered after `up`.
BACK_LIMIT = UP_LIMIT = 5.0
#: Maximum processor time of the supervisor, in cores.
COST_LIMIT = 0.005


@dataclass
class Result:
    kind: str
    up: float = 0.0
    again: float = 0.0
    back: list[float] = field(default_factory=list)
    cost: float = 0.0
    sent: int = 0
    stored: int = 0
    counted: int = 0
    doubled: int = 0
    condition: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def unaccounted(self) -> int:
        return self.sent - self.stored - self.counted


def up(made: Detector, result: Result) -> float:
    """Run `up`. Returns its time in seconds."""
    began = time.monotonic()
    status, words = made.up()
    if status:
        result.failures.append(f"up: {words.strip()}")
    return time.monotonic() - began


def kill_process(made: Detector, name: str) -> float:
    """Kill a process, and wait until it is back. Returns the seconds until then."""
    began = time.monotonic()
    made.await_back(name, made.kill(name), STEP)
    return time.monotonic() - began


def kill_supervisor(made: Detector, result: Result) -> float:
    """Kill the supervisor, and start it again with `up`. Returns the seconds of `up`."""
    pids, dead = made.pids(), made.supervisor()
    os.kill(dead.pid, signal.SIGKILL)
    until(lambda: not is_running(dead), "the supervisor to be dead")
    time.sleep(1.0)
    seconds = up(made, result)
    if made.pids() != pids:
        result.failures.append("processes were changed by the death of the supervisor")
    return seconds


def end_run(made: Detector, boards: Emulator, operator: Operator, result: Result) -> None:
    """Stop the boards, end the run, wait until all data are delivered, and count words and rows."""
    boards.stop()
    sent = boards.finish()["sent"]
    ended = operator.end_run().result(STEP)
    result.condition = until(
        lambda: (c := operator.run_info(ended["run"]).result(STEP)["condition"]) != "INTERRUPTED" and c,
        "all data to be delivered",
        STEP,
    )
    found = tally(parts_of([made.data], ended["run"]))
    result.sent = sum(counts["words"] for counts in sent.values())
    result.stored, result.counted = sum(found.stored.values()), sum(found.counted.values())
    result.doubled = found.doubled
    result.failures += found.problems


def trial(kind: str, options: argparse.Namespace, made: Detector, boards: Emulator) -> Result:
    result = Result(kind)
    choose = random.Random(f"{options.seed} {kind}")
    made.write(made.producer("LArPix board", f"pacman = {boards.addresses}", "512MiB"))
    result.up = up(made, result)
    before = made.pids()
    result.again = up(made, result)
    if made.pids() != before:
        result.failures.append("the same command again has changed something")
    with Operator(made.core) as operator:
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        boards.go()
        supervisor = made.supervisor().pid
        used, began = processor_seconds(supervisor), time.monotonic()
        time.sleep(options.cost)
        result.cost = (processor_seconds(supervisor) - used) / (time.monotonic() - began)
        for _ in range(options.kills):
            time.sleep(choose.uniform(0.5, 2.5))
            seconds = kill_supervisor(made, result) if kind == "supervisor" else kill_process(made, kind)
            result.back.append(seconds)
        time.sleep(2.0)
        end_run(made, boards, operator, result)
    if kind != "LArPix board" and (result.unaccounted or result.counted):
        result.failures.append(f"{result.unaccounted} words are unaccounted for, {result.counted} are counted as lost")
    if result.doubled:
        result.failures.append(f"{result.doubled} blocks are in the files twice")
    if max(result.back) > BACK_LIMIT:
        result.failures.append(f"back after {max(result.back):.1f} s")
    if result.up > UP_LIMIT:
        result.failures.append(f"up took {result.up:.1f} s")
    if result.cost > COST_LIMIT:
        result.failures.append(f"the supervisor took {result.cost:.4f} cores")
    return result


def open_times(rows: list[AlarmRow], name: str) -> list[tuple[float, float]]:
    """Return from when to when (unix s) an alarm about a component was open."""
    opened: dict[int, float] = {}
    times = []
    for row in rows:
        if name.lower() not in row.subject.lower() or row.condition not in CONDITIONS:
            continue
        if row.event == "raised":
            opened.setdefault(row.alarm, row.time_ns / 1e9)
        elif row.event == "cleared":
            times.append((opened.pop(row.alarm), row.time_ns / 1e9))
    return times + [(since, math.inf) for since in opened.values()]


def about_components(operator: Operator) -> list[str]:
    """Return the texts of open alarms about components. Others are of boards, which end with the run."""
    alarms = operator.alarms().result(STEP)["open"]
    return [alarm["text"] for alarm in alarms if alarm["condition"] in CONDITIONS]


def together(options: argparse.Namespace, made: Detector, boards: Emulator) -> tuple[Result, str]:
    """Kill processes of all kinds in one run. Returns its result, and the table of kinds."""
    result = Result("all kinds")
    choose = random.Random(options.seed)
    made.write(made.producer("LArPix board", f"pacman = {boards.addresses}", "512MiB"))
    result.up = up(made, result)
    kills: dict[str, list[float]] = {kind: [] for kind in KINDS}
    back: dict[str, list[float]] = {kind: [] for kind in KINDS}
    catalogue = made.state / "catalogue.sqlite"
    with Operator(made.core) as operator:
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        boards.go()
        end = time.monotonic() + options.together
        while time.monotonic() < end:
            time.sleep(choose.uniform(1.0, 6.0))
            kind = choose.choice(KINDS)
            kills[kind].append(time.time())
            back[kind].append(kill_supervisor(made, result) if kind == "supervisor" else kill_process(made, kind))
        time.sleep(ALARM_LIMIT + 1.0)
        end_run(made, boards, operator, result)
        began = time.monotonic()
        while (still := about_components(operator)) and time.monotonic() - began < CLEAR_LIMIT:
            time.sleep(1.0)
        result.failures += [f"still open: {text}" for text in still]
    if not result.condition.startswith("COMPLETE"):
        result.failures.append(f"the run is {result.condition}")
    if not kills["LArPix board"] and (result.unaccounted or result.counted):
        result.failures.append(f"{result.unaccounted} words are unaccounted for, {result.counted} are counted as lost")
    rows = read_alarms(catalogue, limit=100_000)
    lines = ["| killed | times | back after, s | alarm after, s |", "| --- | ---: | --- | --- |"]
    for kind in KINDS:
        times = open_times(rows, kind)
        told = [
            min((max(0.0, since - at) for since, until_ in times if until_ >= at), default=math.inf)
            for at in kills[kind]
        ]
        late = [seconds for seconds in told if seconds > ALARM_LIMIT]
        result.failures += [f"{kind}: an alarm only after {seconds:.1f} s" for seconds in late]
        spans = [f"{min(values):.2f} to {max(values):.2f}" if values else "" for values in (back[kind], told)]
        lines.append(f"| {kind} | {len(kills[kind])} | {spans[0]} | {spans[1]} |")
    lines.append("")
    lines.append(
        f"{result.sent:,} words sent, {result.stored:,} stored, {result.counted:,} counted lost, "
        f"{result.unaccounted:,} unaccounted for, {result.doubled} blocks twice; run {result.condition}; "
        f"{sum(row.event == 'raised' for row in rows)} times an alarm was raised, "
        f"{sum(row.event == 'cleared' for row in rows)} times one cleared."
    )
    lines += [f"\n- {text}" for text in result.failures]
    return result, "\n".join(lines)


def tables_of_hosts(net: Network, made: Detector, options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables of a detector with the core on the first host, the storage on the second, and a producer with
    half of the boards on the first and on the last."""
    for host in net.hosts:
        yield f'[hosts.{host}]\naddress = "{net.address(host)}"\nstate-dir = "state-{host}"\n'
    yield f'[storages.disk]\nhost = "{net.hosts[len(net.hosts) > 1]}"\n[monitors.rates]\n'
    half = options.boards // 2
    for place, host in enumerate((net.hosts[0], net.hosts[-1])):
        names = [f"module{place * half + number}" for number in range(1, half + 1)]
        ports = [5556 + 1000 * place + 10 * number for number in range(half)]
        for number, name in enumerate(names):
            group = place * half + number + 1
            yield f'[boards.{name}]\naddress = "127.0.0.1:{ports[number]}"\nio-group = {group}\n'
        yield f'[emulators.rack{place}]\nhost = "{host}"\nio-groups = {half}\nrate = {options.rate / options.boards}\n'
        yield f"data-port = {ports}\ncommand-port = {[port - 1 for port in ports]}\n"
        yield made.producer(f"producer{place}", f'host = "{host}"\nboards = {names}')


class Hosts:
    """A detector on some hosts, whose components have keys. `failures`: what went wrong, one line each."""

    def __init__(self, net: Network, made: Detector, options: argparse.Namespace) -> None:
        made.ring_dir = str(made.folder)  # because the hosts have no common /dev/shm
        made.write(*tables_of_hosts(net, made, options))
        self.failures: list[str] = []
        self._made = made
        self._where: dict[str, dict[str, Any]] = {
            host: {"prefix": net.prefix(host), "env": {"XDG_STATE_HOME": str(made.folder / f"home of {host}")}}
            for host in net.hosts
        }
        first, *others = net.hosts
        self._on(first, "up", made.path)
        for host in others:
            invitation = self._on(first, "keys", "invite", made.path, "--host", host)
            self._on(host, "keys", "join", invitation.split()[3])
        self._on(first, "down", made.path)

    def _on(self, host: str, *words: object) -> str:
        status, said = self._made.run(*words, **self._where[host])
        if status:
            self.failures.append(f"{' '.join(map(str, words))} on {host}: {said.strip()}")
        return said

    def on_all(self, command: str) -> tuple[float, float]:
        """Run `up` or `down` on all hosts at once. Returns seconds, and processor seconds."""
        began, used = time.monotonic(), self._processor()
        with ExitStack() as stack:
            commands = {
                host: stack.enter_context(self._made.command(command, self._made.path, **where))
                for host, where in self._where.items()
            }
            for host, process in commands.items():
                if process.wait(STEP):
                    self.failures.append(f"{command} on {host}: {process.stderr.strip()}")
        return time.monotonic() - began, self._processor() - used

    def _processor(self) -> float:
        """Return the processor seconds of all commands so far, and of the processes that run now."""
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        systems = filter(None, map(read_running, self._made.folder.glob("state-*")))
        entries = [entry for one in systems for entry in (*one.processes, one.supervisor) if entry is not None]
        return own.ru_utime + own.ru_stime + sum(processor_seconds(entry.pid) for entry in entries)


def up_on_hosts(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Start detectors on these numbers of hosts in turns. Returns the table, and what went wrong."""
    times: dict[int, list[tuple[float, float, float]]] = {number: [] for number in options.hosts}
    failures: list[str] = []
    for _ in range(options.rounds):
        for number, found in times.items():
            names = [f"daq{each}" for each in range(1, number + 1)]
            with (
                tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder,
                closing(Network(*names)) as net,
                net.inside(names[0]),
                detector(Path(folder), net.address(names[0])) as made,
            ):
                hosts = Hosts(net, made, options)
                up, used = hosts.on_all("up")
                again, _ = hosts.on_all("up")
                hosts.on_all("down")
                found.append((up, used, again))
                failures += hosts.failures
            if up > UP_LIMIT:
                failures.append(f"{number} hosts: up took {up:.1f} s")
    lines = [
        "| hosts | boards | times | `up`, s | processor, s | the same again, s |",
        "| ---: | ---: | ---: | --- | --- | --- |",
    ]
    for number, found in times.items():
        spans = [f"{min(column):.2f} to {max(column):.2f}" for column in zip(*found, strict=True)]
        lines.append(f"| {number} | {options.boards} | {len(found)} | {' | '.join(spans)} |")
    return "\n".join([*lines, *(f"\n- {text}" for text in failures)]), failures


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def table(results: list[Result]) -> str:
    lines = [
        "| killed | times | back after, s | sent | stored | counted lost | unaccounted | condition | `up`, again, s | "
        "supervisor, cores |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    for each in results:
        back = f"{min(each.back):.2f} to {max(each.back):.2f}" if each.back else ""
        cells = [each.kind, str(len(each.back)), back, f"{each.sent:,}", f"{each.stored:,}", f"{each.counted:,}"]
        cells += [f"{each.unaccounted:,}", each.condition, f"{each.up:.1f}, {each.again:.1f}", f"{each.cost:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n- {each.kind}: {text}" for each in results for text in each.failures)])


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    add = parser.add_argument
    add("--boards", type=int, default=8, metavar="N", help="emulated boards (default %(default)d)")
    add("--rate", type=float, default=500_000.0, metavar="R", help="packets/s of all boards (default %(default)g)")
    add("--kills", type=int, default=10, metavar="N", help="kills of each kind (default %(default)d)")
    add("--kinds", default=",".join(KINDS), metavar="NAME,...", help="only these kinds (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="of the random pauses (default %(default)d)")
    add("--cost", type=float, default=20.0, metavar="S", help="seconds in which the supervisor's processor time counts")
    add("--together", type=float, default=0.0, metavar="S", help="kill all kinds in one run of S seconds")
    add("--hosts", type=numbers, metavar="N,...", help="start N hosts in network namespaces, and kill nothing")
    add("--rounds", type=int, default=5, metavar="N", help="with --hosts: times of starting (default %(default)d)")
    add(
        "--update", type=Path, metavar="FILE",
        help=f"write the table into this document, at the marks '{MARK}', '{MARK_TOGETHER}' or '{MARK_HOSTS}'",
    )  # fmt: skip
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: no such kind: {', '.join(unknown)}")
    if options.hosts:
        if reason := missing_rights():
            raise SystemExit(reason)
        if min(options.hosts) < 1 or options.boards < 2:
            parser.error("--hosts: expected at least 1 host and 2 boards")
        text, failures = up_on_hosts(options)
        command = f"python bench/supervision.py --hosts {','.join(map(str, options.hosts))} --boards {options.boards}"
        text = with_source(text, f"{command} --rate {options.rate:g} --rounds {options.rounds}")
        print(text)
        if options.update:
            update(options.update, MARK_HOSTS, text)
        return 1 if failures else 0
    words = ["--io-groups", str(options.boards), "--rate", str(options.rate / options.boards)]
    if options.together:
        with (
            tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder,
            detector(Path(folder)) as made,
            closing(Emulator(*words, "--wait-for-go", "--lossless", "--seed", str(options.seed))) as boards,
        ):
            result, text = together(options, made, boards)
        command = f"python bench/supervision.py --together {options.together:g} --boards {options.boards}"
        text = with_source(text, f"{command} --rate {options.rate:g} --seed {options.seed}")
        print(text)
        if options.update:
            update(options.update, MARK_TOGETHER, text)
        return 1 if result.failures else 0
    results = []
    for kind in kinds:
        with (
            tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder,
            detector(Path(folder)) as made,
            closing(Emulator(*words, "--wait-for-go", "--lossless", "--seed", str(options.seed))) as boards,
        ):
            results.append(trial(kind, options, made, boards))
        print(table(results[-1:]), file=sys.stderr, flush=True)
    command = f"python bench/supervision.py --boards {options.boards} --rate {options.rate:g} --kills {options.kills}"
    text = with_source(table(results), f"{command} --seed {options.seed}")
    print(text)
    if options.update:
        update(options.update, MARK, text)
    return 1 if any(each.failures for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
