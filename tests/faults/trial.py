"""One trial: a complete system takes a run of emulated boards, a fault happens, and the files show what is lost."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disk import Disk
from emulated_board import Emulator
from injector import Faults
from loss_accounting import parts_of, tally
from misbehaving_board import nonsense
from network import Network
from processes import until
from system import System
from wall_clock import Clock

from larpixdaq.errors import LarpixDaqError
from larpixdaq.hdf5.verify import verify_all
from larpixdaq.operator import Operator

#: Maximum seconds for a step of the run, or for the recovery from a fault.
STEP = 60.0
#: Seconds whose words may be missing beside a marked gap, because they were on their way at its ends.
IN_FLIGHT = 1.0


@dataclass
class Setup:
    """Settings of a trial."""

    rate: float = 500_000.0  # packets/s of all boards together
    boards: int = 2
    words: str = "auto"  # words in a board message
    lossless: bool = True  # the boards wait for the producer; real boards do not
    longest: float = 10.0  # maximum seconds of a fault
    before: float = 4.0  # the fault comes in these first seconds of the run, at random
    after: float = 3.0  # seconds of the run after the fault
    ring: str = "512MiB"
    producer: tuple[object, ...] = ()  # further options of the producer
    storage: tuple[object, ...] = ()
    storages: int = 1
    disk: bool = False  # the storage has a faulty disk
    clock: bool = False  # all processes have a wall clock that can be stepped
    nonsense: bool = False  # one more board, io_group boards + 1, sends random bytes
    hosts: dict[str, str] = field(default_factory=dict)  # "board" or "producer" -> name of its own host


@dataclass
class Outcome:
    """Result of a trial; `ok`: it is what the row of the fault table promises."""

    row: str
    seed: int
    rate: float
    ok: bool = False
    failures: list[str] = field(default_factory=list)
    sent: int = 0
    stored: int = 0
    counted: int = 0
    unaccounted: int = 0
    doubled: int = 0
    parts: int = 0
    condition: str = ""
    reasons: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    lost_after: float | None = None  # seconds from the fault until an Operator read its component as lost
    stuck_after: float | None = None
    noticed: list[str] = field(default_factory=list)  # other components that were read as lost or stuck
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0
    kept: str = ""  # folder with files and logs of a failed trial


class Watch:
    """A second Operator that polls the components in a thread, and notes when one is lost or stuck."""

    def __init__(self, operator: Operator) -> None:
        self.events: list[tuple[float, str, str]] = []  # (monotonic time, name, "lost", "stuck" or "fine")
        self._operator = operator
        self._known: dict[str, str] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join(STEP)

    def first(self, what: str, name: str, since: float) -> float | None:
        """Return the seconds from `since` until a component was first read as `what`."""
        times = [when - since for when, *event in self.events if event == [name, what] and when >= since]
        return round(min(times), 3) if times else None

    def _run(self) -> None:
        while not self._end.wait(0.02):
            try:
                components = self._operator.components().result(2.0)
            except (LarpixDaqError, TimeoutError):
                continue  # the core does not answer
            now = time.monotonic()
            for component in components:
                name = component["name"]
                what = "lost" if not component["alive"] else "stuck" if component["stuck"] else "fine"
                if what != self._known.get(name, "fine"):
                    self.events.append((now, name, what))
                self._known[name] = what


class Trial:
    """A system in a run. The function of a row causes a fault and repairs it."""

    def __init__(self, setup: Setup, seed: int, folder: Path, stack: contextlib.ExitStack) -> None:
        self.setup = setup
        self.folder = folder
        self._stack = stack
        self.net: Network | None = None
        if setup.hosts:
            names = list(dict.fromkeys(["core", *setup.hosts.values()]))
            self.net = stack.enter_context(contextlib.closing(Network(*names, seed=seed)))
        host = self.net.address("core") if self.net else "127.0.0.1"
        self.line = System(folder, stack, host)
        stack.callback(self.line.terminate_all)
        self.faults = Faults(self.line, seed, setup.longest)
        self.disk = stack.enter_context(contextlib.closing(Disk(folder, self.line.data))) if setup.disk else None
        self.clock = stack.enter_context(contextlib.closing(Clock(folder))) if setup.clock else None
        self.board = self.make_board(seed)
        self.sent: dict[int, dict[str, int]] = {}
        self.fault_time = 0.0
        self.targets: tuple[str, ...] = ()  # names of the components that the fault hits
        self.directories = {"": [self.line.data]}  # of the storages, by label
        self.failures: list[str] = []
        self.exact_monitor = False  # at the end the monitor must have counted all packets of the boards
        self._start()

    # setup

    def make_board(self, seed: int, ports: Emulator | None = None) -> Emulator:
        setup = self.setup
        options = ["--io-groups", setup.boards, "--rate", setup.rate / setup.boards, "--seed", seed]
        options += ["--words-per-message", setup.words, "--wait-for-go"]
        options += ["--lossless"] if setup.lossless else ["--queue", 100_000]
        if ports is not None:
            for kind in ("data", "command"):
                options += [f"--{kind}-port", *(port[kind] for port in ports.ready.values())]
        host = setup.hosts.get("board", "core")
        if self.net:
            options += ["--address", self.net.address(host)]
        board = Emulator(*map(str, options), prefix=self.net.prefix(host) if self.net else ())
        self._stack.callback(board.close)
        return board

    def _start(self) -> None:
        line, setup = self.line, self.setup
        keys = ("core", "log", "offline_storage", "run_data", "producer")
        if self.net:
            for key in keys:
                host = setup.hosts.get(key, "core")
                on_producer_host = host == setup.hosts.get("producer", "core")  # where its ring is
                line.prefix[key] = self.net.prefix(host, memory=on_producer_host)
        for key in keys:
            shims = [self.clock.env] if self.clock else []
            shims += [self.disk.env] if self.disk and key == "offline_storage" else []
            libraries = ":".join(shim["LD_PRELOAD"] for shim in shims)
            line.env[key] = {name: value for shim in shims for name, value in shim.items()} | {"LD_PRELOAD": libraries}
        line.launch_core()
        line.launch_log()
        line.launch_storage(*setup.storage)
        for n in range(2, setup.storages + 1):
            self.second_storage(f"Storage {n}")
        line.launch_monitor()
        host = self.net.address(setup.hosts.get("board", "core")) if self.net else "127.0.0.1"
        ports = [f"{group}={host}:{port['data']}:{port['command']}" for group, port in self.board.ready.items()]
        if setup.nonsense:
            ports.append(f"{setup.boards + 1}=127.0.0.1:{self._stack.enter_context(nonsense(self.faults.random))}")
        line.launch_producer("--ring", setup.ring, "--pacman", *ports, *setup.producer)
        self.operator = self.new_operator()
        line.await_kinds(self.operator, "storage", "run_data", "producer", "log")
        until(lambda: len(self.components("storage")) == setup.storages, f"{setup.storages} storages to be there")
        self.watch = Watch(self.new_operator())
        self._stack.callback(self.watch.close)

    def second_storage(self, name: str) -> None:
        """Start one more storage, with its own name and directory."""
        directory = self.folder / name.replace(" ", "-")
        directory.mkdir()
        self.directories[name.replace(" ", "-")] = [directory]
        self.line.launch_storage("--name", name, "-o", directory, *self.setup.storage, key=name)

    def new_operator(self) -> Operator:
        with self.net.inside("core") if self.net else contextlib.nullcontext():
            return self._stack.enter_context(Operator(self.line.core, timeout=STEP))

    # the run

    def begin(self) -> None:
        self.operator.prepare_run(comment="trial").result(STEP)
        self.operator.begin_run().result(STEP)
        self.board.go()
        self.await_rows()

    def begin_fault(self, *targets: str) -> None:
        """Note that a fault begins, and the names of the components that it hits. Only the first one is timed."""
        self.targets, self.fault_time = targets, time.monotonic()

    def await_rows(self, more: int = 1) -> None:
        """Wait until the storages have stored `more` rows. A restarted storage counts from 0."""
        low = self.stored_rows()

        def stored() -> bool:
            nonlocal low
            now = self.stored_rows()
            low = min(low, now)
            return now >= low + more

        until(stored, "storage to store more", STEP)

    def stored_rows(self) -> int:
        return sum(int(storage["status"].get("rows", 0)) for storage in self.components("storage"))

    def components(self, kind: str = "") -> list[dict[str, Any]]:
        """Return the living components of this kind, or of all kinds; none while the core does not answer."""
        try:
            components = self.operator.components().result(STEP)
        except LarpixDaqError:
            return []
        return [component for component in components if component["alive"] and kind in ("", component["kind"])]

    def await_component(self, name: str) -> None:
        """Wait until a component is registered, and neither lost nor stuck."""
        until(lambda: any(c["name"] == name and not c["stuck"] for c in self.components()), f"{name} to be back", STEP)

    def status(self, kind: str) -> dict[str, Any]:
        """Return the status of the first living component of this kind; empty without one."""
        found = self.components(kind)
        return found[0]["status"] if found else {}

    def expect(self, holds: object, what: str) -> None:
        if not holds:
            self.failures.append(what)

    def end_boards(self) -> None:
        """End the boards, and add their counts to those of ended boards."""
        self.board.stop()
        for group, counts in self.board.finish()["sent"].items():
            totals = self.sent.setdefault(int(group), {})
            for name, n in counts.items():
                totals[name] = totals.get(name, 0) + n

    def end(self) -> dict[str, Any]:
        """End boards and run, and wait until no block is pending."""
        counted = lambda: self.operator.packet_rate(channels=False).result(STEP)["packets"]  # noqa: E731
        if self.exact_monitor:  # one that has just come back hears nothing of a run that has ended meanwhile
            before = counted()
            until(lambda: counted() > before, "the monitor to count", STEP)
        self.end_boards()
        ended: dict[str, Any] = self.operator.end_run().result(STEP)
        producers = self.components("producer")
        if producers:
            pending = lambda: sum(c["status"].get("owed_blocks", 0) for c in self.components("producer"))  # noqa: E731
            until(lambda: pending() == 0, "no block to be pending", STEP)
        if self.exact_monitor:
            sent = sum(counts["D"] for counts in self.sent.values())
            until(lambda: counted() == sent, f"the monitor to have counted {sent} packets", STEP)
        info = self.operator.run_info(ended["run"]).result(STEP)
        ended["condition"] = info["condition"]
        return ended


@contextlib.contextmanager
def trial(setup: Setup, seed: int, folder: Path) -> Iterator[Trial]:
    with contextlib.ExitStack() as stack:
        yield Trial(setup, seed, folder, stack)


def judge(outcome: Outcome, made: Trial, run: int, *, gap: bool, counted: bool) -> None:
    """Fill in the numbers in the files, and the failures. `gap`: words may be missing inside a marked gap. `counted`:
    words may be counted as lost."""
    sent = {group: counts["words"] for group, counts in made.sent.items()}
    found = [tally(parts_of(directories, run, label)) for label, directories in made.directories.items()]
    for directories in made.directories.values():
        if len(directories) > 1 and not (verified := verify_all(directories)).ok:
            outcome.failures += [line for judgement in verified.runs for line in judgement.reasons]
    best = min(found, key=lambda storage: (len(storage.problems), sum(storage.unaccounted(sent).values())))
    missing = best.unaccounted(sent)
    outcome.sent = sum(sent.values())
    outcome.stored = sum(n for group, n in best.stored.items() if group in sent)
    outcome.counted = sum(n for group, n in best.counted.items() if group in sent)
    outcome.unaccounted = sum(missing.values())
    outcome.doubled = best.doubled
    outcome.parts = best.parts
    outcome.gaps = [f"io_group {mark.io_group}, {mark.seconds:.3f} s: {mark.what}" for mark in best.gaps]
    outcome.failures += best.problems
    if best.doubled:
        outcome.failures.append(f"{best.doubled} blocks are in the files twice")
    if outcome.counted and not counted:
        outcome.failures.append(f"{outcome.counted} words are counted as lost: nothing should be")
    for group, n in missing.items():
        marked = [mark for mark in best.gaps if mark.io_group == group]
        most = (sum(mark.seconds for mark in marked) + IN_FLIGHT) * made.setup.rate / made.setup.boards
        if n and not gap:
            outcome.failures.append(f"io_group {group}: {n} words are unaccounted for")
        elif n < 0 or (n and not marked):
            outcome.failures.append(f"io_group {group}: {n} words are unaccounted for, and no gap is marked")
        elif n > most:
            outcome.failures.append(
                f"io_group {group}: {n} words are unaccounted for, the marked gaps allow {most:.0f}"
            )
        if sum(mark.lost for mark in marked) > max(n, 0):
            outcome.failures.append(f"io_group {group}: more words are marked as lost than the {n} that are missing")


def keep(folder: Path, where: Path, name: str) -> str:
    """Move the folder of a failed trial to `where`. Returns its new path."""
    where.mkdir(parents=True, exist_ok=True)
    kept = where / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}"
    shutil.move(folder, kept)
    return str(kept)
