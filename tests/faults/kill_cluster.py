"""A run over brokers, in which storages, uplinks, producers, the monitor and brokers are killed by a seed.

The files of every storage are counted, with plain h5py, against the boards' own count.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brokers import Brokers, brokers
from emulated_board import Emulator
from loss_accounting import Tally, parts_of, tally
from processes import until
from system import System

from larpixdaq.errors import ComponentError, LarpixDaqError
from larpixdaq.operator import Operator

#: Maximum seconds of a step of the run, and until a process or broker is back.
STEP = 60.0
#: Seconds of words that a killed producer may have had from its boards, but not yet in its ring, at each end of a gap.
IN_FLIGHT = 1.0
PRODUCERS = "north", "south"
#: What is killed.
KINDS = "storage", "uplink", "producer", "monitor", "broker"


@dataclass
class Result:
    """What the files of a run show. `lost`: rows that a producer made and that are not in the files, of the worst
    storage. `before_ring`: words that a killed producer had received, but not yet made into rows, in marked gaps."""

    run: int
    condition: str
    kills: dict[str, int]
    seconds: float
    sent: int = 0
    stored: int = 0
    lost: int = 0
    doubled: int = 0
    before_ring: int = 0
    longest_pause: float = 0.0  # seconds without a further row at any storage
    failures: list[str] = field(default_factory=list)


class Cluster:
    """Three brokers, eight boards, two producers, storages with a directory each, and a monitor, in a run.

    `rate`: packets/s of all boards together. `down`: maximum seconds until what was killed is started again.
    """

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, seed: int, *, rate: float, storages: int = 3, boards: int = 8,
        fsync: bool = False, ring: str = "64MiB", down: float = 2.0,
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.notes: list[str] = []
        self._rate, self._boards, self._down, self._began = rate, boards, down, time.monotonic()
        self._begun = self._began
        self._watch: Watch | None = None
        self._never = threading.Event()
        self.brokers: Brokers = stack.enter_context(brokers(3, folder / "brokers", fsync=fsync))
        self.line = System(folder, stack)
        stack.callback(self.line.terminate_all)
        stream = "--stream", self.brokers.urls
        self.line.launch_core()
        self.line.launch_log()
        self.storages = [f"disk-{number}" for number in range(storages)]
        self.directories = {name: folder / name for name in self.storages}
        for name, directory in self.directories.items():
            directory.mkdir()
            own = "--name", name, "--standby", "-o", directory
            self.line.launch("offline_storage", "--core", self.line.core, *own, *stream, key=name)
        self.line.launch_monitor(*stream)
        self.boards: list[Emulator] = []
        half = boards // len(PRODUCERS)
        for number, name in enumerate(PRODUCERS):
            board = Emulator(
                "--io-groups", str(half), "--rate", str(rate / boards), "--wait-for-go", "--lossless",
                "--seed", str(seed + number),
            )  # fmt: skip
            stack.enter_context(contextlib.closing(board))
            self.boards.append(board)
            addresses = [f"{group + number * half}={address.partition('=')[2]}"
                         for group, address in enumerate(board.addresses, 1)]  # fmt: skip
            self.line.launch(
                "producer", "--core", self.line.core, "--name", name, "--state-dir", folder / "state",
                "--ring", ring, "--ring-dir", self.line.rings, *stream, "--pacman", *addresses, key=name,
            )  # fmt: skip
        self.operator = self.line.operator()
        for name in (*self.storages, *PRODUCERS, "Online monitor"):
            self.await_component(name)

    def close(self) -> None:
        """End the watch. May be repeated."""
        if self._watch is not None:
            self._watch.close()

    def note(self, text: str) -> None:
        self.notes.append(f"{time.monotonic() - self._began:7.2f} s: {text}")

    # The run.

    def begin(self) -> None:
        until(self._published, "the streams to be made", STEP)
        until(self._prepared, "a run to be prepared", STEP)
        self.operator.begin_run().result(STEP)
        self._begun = time.monotonic()
        for board in self.boards:
            board.go()
        self.await_rows()
        self._watch = Watch(self.line.operator())

    def _published(self) -> bool:
        producers = [c["status"] for c in living(self.operator) if c["kind"] == "producer"]
        return all((status.get("uplink") or {}).get("connected") for status in producers)

    def _prepared(self) -> bool:
        try:
            self.operator.prepare_run(comment="cluster").result(STEP)
        except ComponentError as error:  # the streams are made meanwhile
            if "stream" not in str(error) or "--stream" in str(error):
                raise
            self._never.wait(0.3)
            return False
        return True

    def await_component(self, name: str, pid: int = 0) -> None:
        """Wait until a component is registered, with this process id if it is given, and not stuck."""

        def there() -> bool:
            found = [c for c in living(self.operator) if c["name"] == name and not c["stuck"]]
            return any(not pid or c["info"].get("pid") == pid for c in found)

        until(there, f"{name} to be back", STEP)

    def rows(self) -> dict[str, int]:
        return rows_of(self.operator)

    def await_rows(self) -> None:
        """Wait until every storage stores more rows."""
        low = self.rows()

        def more() -> bool:
            now = self.rows()
            for name, count in now.items():
                low[name] = min(low.get(name, count), count)
            return len(now) == len(self.storages) and all(now[name] > low[name] for name in self.storages)

        until(more, f"all storages to store more than {low}", STEP)

    def kill_for(self, seconds: float, kinds: Sequence[str] = KINDS, every: float = 2.0) -> None:
        """Kill for this time, each kind at least once, at random times with a mean distance of `every` seconds."""
        end = time.monotonic() + seconds
        first = self.random.sample(kinds, len(kinds))
        while first or time.monotonic() < end:
            self.pause(2 * every)
            self.kill(first.pop() if first else self.random.choice(kinds))
        self.await_rows()

    def end(self) -> Result:
        """End boards and run, and count what the files have."""
        seconds = time.monotonic() - self._begun
        self.close()
        sent: dict[int, int] = {}
        for number, board in enumerate(self.boards):
            board.stop()
            for group, counts in board.finish()["sent"].items():
                sent[int(group) + number * (self._boards // len(PRODUCERS))] = counts["words"]
        ended = self.operator.end_run().result(STEP)
        run = ended["run"]

        def condition() -> str:
            with contextlib.suppress(LarpixDaqError):
                return str(self.operator.run_info(run=run).result(STEP)["condition"])
            return ""

        # After a kill just before the end, a storage gets the rest of the run from the brokers after end_run.
        until(lambda: condition() not in ("", "INTERRUPTED"), "the rest of the run to be stored", STEP)
        result = Result(run, condition(), dict(self.kills), round(seconds, 1), sum(sent.values()))
        result.longest_pause = round(self._watch.longest, 1) if self._watch is not None else 0.0
        for name, directory in self.directories.items():
            until(lambda where=directory: not [*where.glob("*.part")], f"{name} to finish its files", STEP)
            self._judge(result, name, tally(parts_of([directory], run, "" if len(self.storages) == 1 else name)), sent)
        if result.condition not in ("COMPLETE", *(("COMPLETE, suspect",) if self.kills["producer"] else ())):
            result.failures.append(f"the run is {result.condition}: {ended}")
        return result

    def _judge(self, result: Result, name: str, found: Tally, sent: dict[int, int]) -> None:
        missing = found.unaccounted(sent)
        result.failures += [f"{name}: {problem}" for problem in found.problems]
        result.stored = sum(found.stored.values())
        result.doubled += found.doubled
        result.lost = max(result.lost, sum(found.counted.values()))
        result.before_ring = max(result.before_ring, sum(missing.values()))
        if found.doubled:
            result.failures.append(f"{name}: {found.doubled} blocks are in the files twice")
        for group, count in missing.items():
            marked = sum(mark.seconds + 2 * IN_FLIGHT for mark in found.gaps if mark.io_group == group)
            if not 0 <= count <= (marked * self._rate / self._boards if self.kills["producer"] else 0):
                result.failures.append(f"{name}: {count} words of io_group {group} are unaccounted for")

    # Kills.

    def kill(self, kind: str) -> None:
        """Kill a process of a kind, start it again, and wait until it works."""
        self.kills[kind] += 1
        {
            "storage": lambda: self._kill_process(self.random.choice(self.storages)),
            "producer": lambda: self._kill_process(self.random.choice(PRODUCERS)),
            "monitor": lambda: self._kill_process("run_data"),
            "uplink": self._kill_uplink,
            "broker": self._kill_broker,
        }[kind]()

    def pause(self, most: float) -> None:
        self._never.wait(self.random.uniform(0.0, most))

    def _kill_process(self, key: str) -> None:
        self.note(f"{key} killed")
        self.line.processes[key].kill()
        self.pause(self._down)
        process = self.line.restart(key)
        self.await_component("Online monitor" if key == "run_data" else key, process.popen.pid)
        self.note(f"{key} is back")

    def _kill_uplink(self) -> None:
        producer = self.random.choice(PRODUCERS)
        old = until(lambda: uplink_of(self.line.processes[producer].popen.pid), f"an uplink of {producer}", STEP)
        self.note(f"uplink of {producer} killed")
        os.kill(old, signal.SIGKILL)
        until(
            lambda: uplink_of(self.line.processes[producer].popen.pid) not in (0, old),
            f"{producer}'s next uplink",
            STEP,
        )
        self.note(f"uplink of {producer} is back")

    def _kill_broker(self) -> None:
        broker = self.random.randrange(len(self.brokers))
        self.note(f"broker {broker} killed")
        self.brokers.kill(broker)
        self.pause(self._down)
        self.brokers.start(broker)
        self.note(f"broker {broker} is back")


def uplink_of(pid: int) -> int:
    """Return the process id of a producer's uplink, 0 if there is none."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    if b"uplink" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return int(child)
    return 0


def living(operator: Operator) -> list[dict[str, Any]]:
    """Return the living components; none while the core does not answer."""
    try:
        return [component for component in operator.components().result(STEP) if component["alive"]]
    except LarpixDaqError:
        return []


def rows_of(operator: Operator) -> dict[str, int]:
    """Return the rows that each storage has stored. A restarted one counts from 0."""
    return {c["name"]: int(c["status"].get("rows", 0)) for c in living(operator) if c["kind"] == "storage"}


class Watch:
    """Measures in a thread the longest time in which no storage has stored a further row."""

    def __init__(self, operator: Operator) -> None:
        self.longest = 0.0
        self._operator = operator
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join(STEP)

    def _run(self) -> None:
        known, since = rows_of(self._operator), time.monotonic()
        while not self._end.wait(0.1):
            now = rows_of(self._operator)
            if any(count > known.get(name, 0) for name, count in now.items()):
                self.longest = max(self.longest, time.monotonic() - since)
                since = time.monotonic()
            known = now


@contextlib.contextmanager
def cluster(folder: Path, seed: int, **how: Any) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        made = Cluster(folder, stack, seed, **how)
        stack.callback(made.close)
        yield made
