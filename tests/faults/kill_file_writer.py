"""Kills writers of files at random moments, recovers the files, and checks that everything acknowledged is in them.

`python tests/faults/kill_file_writer.py --kills 500 --seed 1` prints the result as one JSON line, and exits with 1 if a
block was lost or doubled or a check failed. Each trial forks a writer that writes runs with RunFile as fast as it can:
blocks of any size, journal, rotation, end records, rows shown to readers. The writer reports durable positions over a
pipe, and dies in one of these ways:

- acknowledged: by SIGKILL, some microseconds after a number of acknowledgements;
- clock: at a random time, by the signal of a timer, whose default action ends a process like SIGKILL, also in C code;
- operation: before, during or after the n-th call of one kind of operation (flush, resize, rename, ...).

Then everything acknowledged must be in /run/blocks of files that open (parts with swmr=True), or in journals. Recovery
runs; in some trials it is killed, too, and runs again. Then every file must open normally and have each acknowledged
block exactly once, with its rows. `verify` may only report missing end records. Finally the run continues from its
positions in the next part, and must be COMPLETE over all parts.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import h5py
import numpy as np
from file_builder import Feed, random_rows, run_info

from larpixdaq import schema
from larpixdaq.constants import BLOCK_ROWS
from larpixdaq.hdf5 import chunk_writer, layout, names, repair, tables, writer
from larpixdaq.hdf5.chunk_writer import Batch
from larpixdaq.hdf5.journal import read as read_journal
from larpixdaq.hdf5.reader import DataFile
from larpixdaq.hdf5.recovery import prepare, recover
from larpixdaq.hdf5.run_report import positions, survey_run
from larpixdaq.hdf5.verify import verify_all
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol import stream
from larpixdaq.protocol.packed_rows import PackedRows, RowPacker
from larpixdaq.protocol.stream import BlockOrigin

POOL = random_rows(np.random.default_rng(9), 40_000)
PRODUCERS = (("LArPix board", 7), ("second", 1 << 63))
#: Operations at which writers die, and the highest number of the fatal call.
OPERATIONS = {
    "create": 3,
    "flush": 60,
    "resize": 60,
    "write": 30,
    "append": 200,
    "chunk": 60,
    "pwritev": 30,
    "ftruncate": 8,
    "fsync": 20,
    "link": 4,
    "rename": 4,
    "unlink": 12,
    "close": 6,
}
#: The same for recoveries, which make fewer calls.
RECOVERY = {"flush": 12, "resize": 12, "write": 6, "append": 20, "chunk": 4, "pwrite": 1, "fsync": 4} | dict.fromkeys(
    ("link", "rename", "unlink", "close"), 2
)
MIDST = 300e-6  # maximum seconds from the begin of an operation to death


class Plan(NamedTuple):
    """How a process dies: after a number of acknowledgements, at a time (seconds), or at an operation."""

    mode: str
    operation: str = ""
    when: str = ""
    number: int = 0
    seconds: float = 0.0
    links: bool = True  # whether the file system has hard links


# Content: everything follows from seed, run, producer and sequence


def content(seed: int, source: BlockOrigin, sequence: int) -> tuple[Any, str | None]:
    """Return the rows of a block, shape (N,), and None, or None and the text of an INFO message."""
    rng = random.Random(f"{seed} {source} {sequence}")
    kind = rng.random()
    saturated = random.Random(f"{seed} {source.run}").random() < 0.3  # full blocks, nearly all of them
    if saturated and kind < 0.97:
        return POOL[:BLOCK_ROWS] if sequence % 2 else POOL[-BLOCK_ROWS:], None
    if kind < 0.08:
        return None, rng.choice(["Beginning run", "żółw " * rng.randrange(60), ""])
    size = rng.randrange(31) if kind < 0.3 else rng.randrange(200, 4000) if kind < 0.6 else rng.randrange(9000, 16385)
    start = rng.randrange(len(POOL) - size)
    return POOL[start : start + size], None


def add(file: RunFile, block: stream.Block, rows: Any) -> None:
    """Add a block, a full one packed, as it comes from another host."""
    if block.rows != BLOCK_ROWS:
        file.add(block, rows)
        return
    parts = RowPacker().pack(0, 0, rows.view(np.uint8), schema.layout(block.layout), lambda: True)
    assert parts is not None
    file.add(block, None, PackedRows.parse(memoryview(parts[0]), memoryview(parts[1]), block.rows))


def next_block(feed: Feed, seed: int) -> tuple[stream.Block, Any]:
    rows, text = content(seed, feed.origin, feed.sequence)
    if text is not None:
        return feed.info(text)
    gaps = [stream.Gap(1, 0, 5, 6)] if len(rows) % 7 == 0 else []
    return feed.block(rows.copy(), gaps=gaps)


# The writer


class Writer:
    def __init__(self, directory: Path, seed: int, report: Callable[[BlockOrigin, int], None]) -> None:
        self._directory = directory
        self._seed = seed
        self._report = report
        self._acknowledged: dict[BlockOrigin, int] = {}
        self._rng = random.Random(seed)

    def write(self) -> None:
        if self._rng.random() < 0.5:
            writer.SHOW_INTERVAL = 0.0  # rows are shown to readers at once, not every few seconds
        chunk_writer.MOST = self._rng.choice([chunk_writer.LEAST, 8, chunk_writer.MOST])
        self._threads = self._rng.choice([1, 2])
        for run in range(1, 4):
            self._run(run)

    def _run(self, run: int) -> None:
        rng = self._rng
        feeds = [Feed(run, *producer) for producer in PRODUCERS[: rng.choice([1, 2])]]
        required = tuple(feed.origin.producer for feed in feeds)
        info = run_info(run=run, required_producers=required)
        file = RunFile(self._directory, info, threads=self._threads)
        works = rng.choice([0.5, 0.05])
        for _ in range(rng.randrange(20, 60)):
            add(file, *next_block(rng.choice(feeds), self._seed))
            self._acknowledge(file)
            if rng.random() < works:
                file.work(pressed=rng.random() < 0.8)
                self._acknowledge(file)
            if rng.random() < 0.1:
                file = self._rotate(file)
        for feed in feeds:
            file.end(feed.end())
            if rng.random() < 0.5:
                file.work(pressed=True)
                self._acknowledge(file)
        file.seal()
        self._acknowledge(file)
        file.publish()

    def _rotate(self, file: RunFile) -> RunFile:
        following = RunFile(self._directory, file.info, file.part + 1, file.positions(), threads=self._threads)
        following.set_text("previous part", file.final.name)
        file.set_text("next part", following.final.name)
        file.seal(continued=True)
        self._acknowledge(file)
        file.publish()
        return following

    def _acknowledge(self, file: RunFile) -> None:
        for source, following in file.durable.items():
            if self._acknowledged.get(source) != following:
                self._acknowledged[source] = following
                self._report(source, following)


# Death


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillPoint:
    """Counts the calls of one kind of operation, and kills the process at the planned one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._calls = 0

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        if name != self._plan.operation:
            return real

        def call(*args: Any, **more: Any) -> Any:
            self._calls += 1
            if self._calls != self._plan.number:
                return real(*args, **more)
            if self._plan.when == "before":
                die()
            if self._plan.when == "midst":
                signal.setitimer(signal.ITIMER_REAL, self._plan.seconds)
            found = real(*args, **more)
            die()
            return found

        return call

    def arm(self) -> None:
        """Replace the operations. Only for a child process, because nothing is restored."""
        if not self._plan.links:
            os.link = _no_links  # type: ignore[assignment]
        for name in ("pwritev", "pwrite", "ftruncate", "fsync", "link", "rename", "unlink"):
            setattr(os, name, self.wrap(name, getattr(os, name)))
        for owner, attribute, name in (
            (layout, "_fill", "create"),
            (h5py.File, "flush", "flush"),
            (h5py.File, "close", "close"),
            (h5py.Dataset, "resize", "resize"),
            (h5py.Dataset, "__setitem__", "write"),
            (tables.Tables, "append", "append"),
        ):
            setattr(owner, attribute, self.wrap(name, getattr(owner, attribute)))
        make = Batch.__init__

        def made(this: Batch, packets: Any, itemsize: int, threads: int = 1) -> None:
            make(this, packets, itemsize, threads)
            this._packets = _Packets(
                packets,
                self.wrap("chunk", packets.id.write_direct_chunk),
                self.wrap("resize", packets.id.set_extent),
            )

        chunk_writer.Batch.__init__ = made  # type: ignore[method-assign]


def _no_links(*names: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


class _Packets:
    """The dataset /packets, whose id has another write_direct_chunk and set_extent."""

    def __init__(self, packets: Any, write: Callable[..., None], resize: Callable[..., None]) -> None:
        self._real = packets
        self.id = _Id(packets.id, write, resize)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __getitem__(self, key: Any) -> Any:
        return self._real[key]


class _Id:
    def __init__(self, real: Any, write: Callable[..., None], resize: Callable[..., None]) -> None:
        self._real = real
        self.write_direct_chunk = write
        self.set_extent = resize

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def run_and_die(plan: Plan, do: Callable[[], None]) -> str:
    """Run `do()` in a child process. Returns how it died; empty if it finished."""
    pid = os.fork()
    if not pid:
        _child(plan, do)
    return _ended(pid, plan)


def _child(plan: Plan, do: Callable[[], None]) -> None:
    status = 1
    try:
        KillPoint(plan).arm()
        if plan.mode == "clock":
            signal.setitimer(signal.ITIMER_REAL, plan.seconds)
        do()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _ended(pid: int, plan: Plan) -> str:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL, -signal.SIGALRM):
        raise AssertionError(f"the process ended with {status}")
    if not status:
        return ""
    if not plan.operation:
        return plan.mode
    # An operation that ended before the signal of the timer was killed after it.
    when = "after" if plan.when == "midst" and status == -signal.SIGKILL else plan.when
    return f"{plan.operation} {when}"


def killed_writer(directory: Path, seed: int, plan: Plan) -> tuple[str, dict[BlockOrigin, int]]:
    """Run a writer. Returns how it died, empty if it finished, and the acknowledged positions by origin."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)

        def report(source: BlockOrigin, following: int) -> None:
            os.write(writing, json.dumps([*source, following]).encode() + b"\n")

        _child(plan, Writer(directory, seed, report).write)
    os.close(writing)
    acknowledged: dict[BlockOrigin, int] = {}
    with open(reading, "rb", buffering=0) as pipe:
        for count, line in enumerate(iter(pipe.readline, b""), 1):
            *source, following = json.loads(line)
            acknowledged[BlockOrigin(*source)] = following
            if plan.mode == "acknowledged" and count == plan.number:
                limit = time.perf_counter() + plan.seconds
                while time.perf_counter() < limit:
                    pass
                os.kill(pid, signal.SIGKILL)
    return _ended(pid, plan), acknowledged


# Checks


def rows_in_file(path: Path) -> Iterator[tuple[BlockOrigin, int, Any]]:
    """Yield (origin, sequence, rows) of each block."""
    with DataFile(path) as file:
        for row in file.table("run/blocks"):
            first = int(row["first_row"])
            yield file.origin(row), int(row["sequence"]), file.packets(first, first + int(row["rows"]))


def rows_in_journal(path: Path) -> Iterator[tuple[BlockOrigin, int, Any]]:
    for record in read_journal(path).records:
        if isinstance(record.frame, stream.Block):
            rows = np.frombuffer(record.rows, schema.layout(record.frame.layout).dtype)
            yield record.frame.origin, record.frame.sequence, rows


def check_rows(seed: int, source: BlockOrigin, sequence: int, rows: Any) -> None:
    given, text = content(seed, source, sequence)
    if text is not None:
        given = Feed(*source).info(text)[1]
        given["counter"] = rows["counter"]
    assert np.array_equal(rows, given), f"{source}, block {sequence}: wrong rows"


def check_unrecovered(directory: Path, seed: int, acknowledged: dict[BlockOrigin, int]) -> None:
    """Check before recovery that all parts can be read, and that every acknowledged block is in a file."""
    found: dict[BlockOrigin, set[int]] = {}
    for _, ending, path in names.run_files(directory):
        if ending == names.JOURNAL:
            blocks_of = rows_in_journal(path)
        elif (ending == names.PART and not was_created(path)) or not path.stat().st_size:  # empty: a reserved name
            continue
        else:
            if ending == names.PART:
                h5py.File(path, "r", swmr=True).close()
            blocks_of = rows_in_file(path)
        for source, sequence, rows in blocks_of:
            if sequence < acknowledged.get(source, 0):
                check_rows(seed, source, sequence, rows)
            found.setdefault(source, set()).add(sequence)
    next_sequences = positions(directory)
    for source, following in acknowledged.items():
        lost = set(range(following)) - found.get(source, set())
        # The last sequence may be that of the end record, which only positions() knows.
        assert lost <= {following - 1}, f"{source}: blocks {sorted(lost)} are in no file"
        found_next = next_sequences.get(source, 0)
        assert found_next >= following, f"{source}: acknowledged to {following}, found {found_next}"


def was_created(part: Path) -> bool:
    first = repair.read_superblock(part)
    return first is not None and first.flags != repair.WRITING


class Held(NamedTuple):
    rows: int
    acknowledged: int  # rows
    lost: int  # blocks
    doubled: int


def check_recovered(directory: Path, seed: int, acknowledged: dict[BlockOrigin, int]) -> Held:
    """Check after recovery that all files are finished and open normally, and have each acknowledged block once."""
    count: Counter[tuple[BlockOrigin, int]] = Counter()
    kept = 0
    for _, ending, path in names.run_files(directory):
        assert ending == names.FINISHED, f"{path.name} is not recovered"
        with h5py.File(path) as plain:
            assert plain["packets"].shape[0] == plain["run/info"]["rows"][0]
        for source, sequence, rows in rows_in_file(path):
            check_rows(seed, source, sequence, rows)
            count[source, sequence] += 1
            kept += len(rows)
    ends = {
        BlockOrigin(run, *end[:2]): end[2]
        for run in {source.run for source in acknowledged}
        for end in survey_run(directory, run).ends
    }
    acknowledged_rows = lost = 0
    for source, following in acknowledged.items():
        for sequence in range(following):
            if ends.get(source) != sequence:  # the end record has a sequence, too
                given, text = content(seed, source, sequence)
                acknowledged_rows += len(given if text is None else Feed(*source).info(text)[1])
                lost += (source, sequence) not in count
    outcome = verify_all([directory]) if count else None
    reasons = [line for run in (outcome.runs if outcome else []) for line in run.reasons]
    reasons += [line for file in (outcome.files if outcome else []) for line in file.findings]
    others = [line for line in reasons if "no end record" not in line and ": no data came," not in line]
    assert not others, f"verify: {others}"
    return Held(kept, acknowledged_rows, lost, sum(n > 1 for n in count.values()))


def check_continuation(directory: Path, seed: int) -> None:
    """Check that pending blocks can be written to the next part, and that each run is complete then."""
    for run in sorted({run for run, _, _ in names.run_files(directory)}):
        before = survey_run(directory, run)
        ended = {(producer, epoch) for producer, epoch, *_ in before.ends}
        run_positions = positions(directory, run)
        part = names.files_of_storage(directory, "", run)[-1][1] + 1
        file = None
        for source, following in run_positions.items():
            if source[1:] in ended:
                continue
            file = file or RunFile(directory, run_info(run=run), part, run_positions)
            feed = Feed(*source)
            for _ in range(following):
                next_block(feed, seed)
            for _ in range(3):
                file.add(*next_block(feed, seed))
            file.end(feed.end())
        if file is not None:
            file.close()
        lacking = [line for line in before.reasons if ": no data came," in line]
        after = survey_run(directory, run)
        assert after.reasons == lacking, f"run {run}: {after.reasons}"
        for found in after.ends:
            made = sum(rows for producer, epoch, _, rows in after.stored if (producer, epoch) == found[:2])
            assert made == found[4], f"run {run}: {made} rows of {found}"


# Trials


def plan_for(rng: random.Random, operations: dict[str, int], seconds: float) -> Plan:
    links = rng.random() > 0.2
    mode = (
        rng.choice(["acknowledged", "clock", *["operation"] * 3])
        if "create" in operations
        else rng.choice(["clock", "operation", "operation"])
    )
    if mode == "clock":
        return Plan(mode, seconds=rng.uniform(1e-4, seconds), links=links)
    if mode == "acknowledged":
        return Plan(mode, number=rng.randrange(1, 60), seconds=rng.uniform(0, 1e-3), links=links)
    operation = rng.choice(list(operations))
    if operation == "rename":
        links = False
    elif operation == "link":
        links = True
    when = rng.choice(["before", "midst", "midst", "after"])
    return Plan(mode, operation, when, rng.randint(1, operations[operation]), rng.uniform(1e-6, MIDST), links)


class Tally:
    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()
        self.recoveries: Counter[str] = Counter()
        self.acknowledged = 0
        self.rows = 0
        self.lost = 0
        self.doubled = 0
        self.failures: list[str] = []


def trial(directory: Path, seed: int, tally: Tally) -> bool:
    """Run one trial. Returns False if the writer finished before it was killed."""
    rng = random.Random(f"trial {seed}")
    plan = plan_for(rng, OPERATIONS, 0.5)
    died, acknowledged = killed_writer(directory, seed, plan)
    if not died:
        return False
    tally.kills[died] += 1
    check_unrecovered(directory, seed, acknowledged)
    while (parts := names.unfinished_parts(directory)) and rng.random() < 0.4:
        again = plan_for(rng, RECOVERY, 0.05)
        if died := run_and_die(again, lambda parts=parts: [recover(part) for part in parts]):
            tally.recoveries[died] += 1
        check_unrecovered(directory, seed, acknowledged)
    # A storage continues from the positions in unfinished parts, and recovers the parts meanwhile.
    for part in names.unfinished_parts(directory):
        prepare(part)
    before = set(positions(directory).items())
    for part in names.unfinished_parts(directory):
        assert not (damaged := recover(part).damaged), f"a killed writer damages nothing, found {damaged}"
    assert not (kept := list(directory.glob("*.damaged*"))), f"kept as damaged: {kept}"
    after = set(positions(directory).items())
    assert after == before, f"positions {before - after} became {after - before}"
    held = check_recovered(directory, seed, acknowledged)
    tally.rows += held.rows
    tally.acknowledged += held.acknowledged
    tally.lost += held.lost
    tally.doubled += held.doubled
    check_continuation(directory, seed)
    return True


def run(kills: int, seed: int, keep: Path | None = None) -> dict[str, Any]:
    tally = Tally()
    began = time.monotonic()
    number = 0
    while sum(tally.kills.values()) < kills and len(tally.failures) < 10:
        directory = Path(tempfile.mkdtemp(prefix="larpixdaq-killing-"))
        this = seed * 1_000_000 + number
        number += 1
        try:
            trial(directory, this, tally)
        except Exception as error:
            tally.failures.append(f"trial {this}: {type(error).__name__}: {error}"[:1000])
            if keep is not None:
                shutil.copytree(directory, keep / str(this))
        finally:
            shutil.rmtree(directory)
    return {
        "kills": sum(tally.kills.values()),
        "recoveries_killed": sum(tally.recoveries.values()),
        "rows_acknowledged": tally.acknowledged,
        "rows_stored": tally.rows,
        "blocks_lost": tally.lost,
        "blocks_doubled": tally.doubled,
        "seconds": round(time.monotonic() - began, 1),
        "kills_by": dict(sorted(tally.kills.items())),
        "recoveries_killed_by": dict(sorted(tally.recoveries.items())),
        "failures": tally.failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill writers of files at random moments, and recover their files.")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trial", type=int, help="repeat one trial, by the number in its failure")
    parser.add_argument("--keep", type=Path, help="copy the files of failed trials to this directory")
    options = parser.parse_args()
    if options.trial is not None:
        directory = Path(tempfile.mkdtemp(prefix="larpixdaq-killing-"))
        trial(directory, options.trial, Tally())
        shutil.rmtree(directory)
        return 0
    found = run(options.kills, options.seed, options.keep)
    print(json.dumps(found))
    return 0 if not (found["failures"] or found["blocks_lost"] or found["blocks_doubled"]) else 1


if __name__ == "__main__":
    sys.exit(main())
