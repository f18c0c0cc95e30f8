"""One trial: a whole system takes a run of emulated boards, something happens to it, and the files say what is lost."""

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

#: A step of the run, or what must follow a fault, gets so long (seconds).
STEP = 60.0
#: Words sent in this time (seconds) may be missing beside a marked gap: what was under way at its ends.
UNDER_WAY = 1.0


@dataclass
class Setup:
    """What a trial is done with."""

    rate: float = 500_000.0  # packets/s of all boards
    boards: int = 2
    words: str = "auto"  # in a message
    lossless: bool = True  # the boards wait for the producer; otherwise they go on, as real ones do
    longest: float = 10.0  # seconds that a fault lasts at most
    before: float = 4.0  # it comes at a random moment of the run's first seconds
    after: float = 3.0  # and the run goes on for so long
    ring: str = "512MiB"
    producer: tuple[object, ...] = ()  # further options
    storage: tuple[object, ...] = ()
    storages: int = 1
    disk: bool = False  # storage gets a disk that can misbehave
    clock: bool = False  # all get a wall clock that can be stepped
    nonsense: bool = False  # a further board, io_group boards + 1, sends nonsense
    hosts: dict[str, str] = field(default_factory=dict)  # board, producer and the rest ("") on hosts of their own


@dataclass
class Outcome:
    """What came of a trial; `ok` when it is what the fault's row expects."""

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
    lost_after: float | None = None  # seconds from the fault until the process that it hit was read as lost
    stuck_after: float | None = None
    noticed: list[str] = field(default_factory=list)  # others that were read as lost or stuck
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0
    kept: str = ""  # where files and logs of a failed trial are


class Watch:
    """Looks at the components all the time, as a second Operator would, and notes who is lost or stuck and when."""

    def __init__(self, operator: Operator) -> None:
        self.events: list[tuple[float, str, str]] = []  # (monotonic, name, what)
        self._operator = operator
        self._known: dict[str, str] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join(STEP)

    def first(self, what: str, name: str, since: float) -> float | None:
        """Seconds from `since` until the component was first read as `what`."""
        times = [when - since for when, who, is_ in self.events if (who, is_) == (name, what) and when >= since]
        return round(min(times), 3) if times else None

    def _run(self) -> None:
        while not self._end.wait(0.02):
            try:
                components = self._operator.components().result(2.0)
            except (LarpixDaqError, TimeoutError):
                continue  # the core is away
            now = time.monotonic()
            for one in components:
                what = "lost" if not one["alive"] else "stuck" if one["stuck"] else "fine"
                if what != self._known.get(one["name"], "fine"):
                    self.events.append((now, one["name"], what))
                self._known[one["name"]] = what


class Trial:
    """A running system in a run; a row's function injects its fault and heals it."""

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
        self.hit_at = 0.0
        self.hit: tuple[str, ...] = ()  # the names of the components that the fault hits
        self.directories = {"": [self.line.data]}  # of each storage, by its label
        self.failures: list[str] = []
        self.exact_monitor = False  # in the end the monitor must have counted what the boards sent
        self._start()

    # the parts

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
                # The producer has its ring there.
                line.prefix[key] = self.net.prefix(host, memory=host == setup.hosts.get("producer", "core"))
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
        """A further storage of its own name, and directory."""
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
        self.flowing()

    def strikes(self, *names: str) -> None:
        """To be called where the fault begins, with the names of the components that it hits; of the first it is timed
        when others see it."""
        self.hit, self.hit_at = names, time.monotonic()

    def flowing(self, more: int = 1) -> None:
        """Wait until storage has stored (that much) more; one that was started again counts from 0."""
        low = self.stored_rows()

        def stored() -> bool:
            nonlocal low
            now = self.stored_rows()
            low = min(low, now)
            return now >= low + more

        until(stored, "storage to store more", STEP)

    def stored_rows(self) -> int:
        return sum(int(one["status"].get("rows", 0)) for one in self.components("storage"))

    def components(self, kind: str) -> list[dict[str, Any]]:
        try:
            found = self.operator.components().result(STEP)
        except LarpixDaqError:
            return []
        return [one for one in found if one["kind"] == kind and one["alive"]]

    def back(self, name: str) -> None:
        """Wait until a component is there, and neither lost nor stuck."""

        def fine() -> bool:
            try:
                found = self.operator.components().result(STEP)
            except LarpixDaqError:
                return False
            return any(one["name"] == name and one["alive"] and not one["stuck"] for one in found)

        until(fine, f"{name} to be back", STEP)

    def status(self, kind: str) -> dict[str, Any]:
        """The status of the first living component of this kind; empty when there is none."""
        found = self.components(kind)
        return found[0]["status"] if found else {}

    def expect(self, holds: object, what: str) -> None:
        if not holds:
            self.failures.append(what)

    def take_count(self) -> None:
        """The boards end; what they say they sent is added to what was sent before."""
        self.board.stop()
        for group, counts in self.board.finish()["sent"].items():
            mine = self.sent.setdefault(int(group), {})
            for name, n in counts.items():
                mine[name] = mine.get(name, 0) + n

    def end(self) -> dict[str, Any]:
        """End boards and run, and wait until nothing is owed any more."""
        self.take_count()
        ended: dict[str, Any] = self.operator.end_run().result(STEP)
        producers = self.components("producer")
        if producers:
            owed = lambda: sum(one["status"].get("owed_blocks", 0) for one in self.components("producer"))  # noqa: E731
            until(lambda: owed() == 0, "nothing to be owed", STEP)
        if self.exact_monitor:
            sent = sum(counts["D"] for counts in self.sent.values())
            monitor = lambda: self.operator.packet_rate(channels=False).result(STEP)["packets"]  # noqa: E731
            until(lambda: monitor() == sent, f"the monitor to have counted {sent} packets", STEP)
        info = self.operator.run_info(ended["run"]).result(STEP)
        ended["condition"] = info["condition"]
        return ended


@contextlib.contextmanager
def trial(setup: Setup, seed: int, folder: Path) -> Iterator[Trial]:
    with contextlib.ExitStack() as stack:
        yield Trial(setup, seed, folder, stack)


def judge(outcome: Outcome, made: Trial, run: int, *, gap: bool, counted: bool) -> None:
    """Fill in what the files say. `gap`: words may be missing where a gap is marked; `counted`: some may be counted as
    lost."""
    sent = {group: counts["words"] for group, counts in made.sent.items()}
    found = [tally(parts_of(directories, run, label)) for label, directories in made.directories.items()]
    for directories in made.directories.values():
        if len(directories) > 1 and not (outcome_of := verify_all(directories)).ok:
            outcome.failures += [line for one in outcome_of.runs for line in one.reasons]
    best = min(found, key=lambda one: (len(one.problems), sum(one.unaccounted(sent).values())))
    missing = best.unaccounted(sent)
    outcome.sent = sum(sent.values())
    outcome.stored = sum(n for group, n in best.stored.items() if group in sent)
    outcome.counted = sum(n for group, n in best.counted.items() if group in sent)
    outcome.unaccounted = sum(missing.values())
    outcome.doubled = best.doubled
    outcome.parts = best.parts
    outcome.gaps = [f"io_group {one.io_group}, {one.seconds:.3f} s: {one.what}" for one in best.gaps]
    outcome.failures += best.problems
    if best.doubled:
        outcome.failures.append(f"{best.doubled} blocks are in the files twice")
    if outcome.counted and not counted:
        outcome.failures.append(f"{outcome.counted} words are counted as lost: nothing should be")
    for group, n in missing.items():
        marked = [one for one in best.gaps if one.io_group == group]
        most = (sum(one.seconds for one in marked) + UNDER_WAY) * made.setup.rate / made.setup.boards
        if n and not gap:
            outcome.failures.append(f"io_group {group}: {n} words are unaccounted for")
        elif n < 0 or (n and not marked):
            outcome.failures.append(f"io_group {group}: {n} words are unaccounted for, and no gap is marked")
        elif n > most:
            outcome.failures.append(
                f"io_group {group}: {n} words are unaccounted for, the marked gaps allow {most:.0f}"
            )
        if sum(one.lost for one in marked) > max(n, 0):
            outcome.failures.append(f"io_group {group}: more is marked as lost than the {n} words that are")


def keep(folder: Path, where: Path, name: str) -> str:
    """Move what a failed trial left to where people can look at it."""
    where.mkdir(parents=True, exist_ok=True)
    kept = where / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}"
    shutil.move(folder, kept)
    return str(kept)
