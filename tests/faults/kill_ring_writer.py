"""Kills the writer of a producer's ring at random moments, and checks the rows that a successor finds.

    python tests/faults/kill_ring_writer.py FOLDER SEED TRIALS

runs TRIALS trials. It exits with 1 if a ring does not have exactly the published rows. It is a separate program,
because it forks often.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from larpixdaq import schema
from larpixdaq._native.ring_buffer import END, SMALLEST
from larpixdaq.buffer.block_builder import BlockBuilder
from larpixdaq.buffer.crash_recovery import Predecessors
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.buffer.spool import SpoolDirectory
from larpixdaq.constants import Count
from larpixdaq.protocol.stream import Block, End, unpack_producer
from larpixdaq.runtime.event_loop import Worker
from larpixdaq.runtime.record_file import crc32

NAME = "LArPix board"
LAYOUT = schema.layout(2)


class Writer:
    """Does the work of a producer on a ring, in random order. The timestamps number the kept rows of each run.

    `progress`: three numbers in shared memory that survive the writer: run, rows published in it, and 1 once it has its
    end record.
    """

    def __init__(self, ring_file: RingFile, rng: random.Random, progress: Any) -> None:
        self.ring = ring_file.ring
        self.rng = rng
        self.progress = progress
        self.recorder = BlockBuilder(self.ring, NAME, self.ring.epoch, LAYOUT, [1, 200])
        self.recorder.begin(1, ["storage"])
        progress[:] = (1, 0, 0)

    def _count(self, rows: int) -> None:
        # One after the other, as in a decoder, so that the counters agree only between batches.
        for name in (Count.WORD_ROWS, Count.PACKETS, Count.BYTES_IN):
            self.ring.counts[1, name] += np.uint64(rows)

    def write(self) -> None:
        rows = self.recorder.rows()
        n = min(self.rng.choice((1, 3, 50, 2000)), 0 if rows is None else len(rows))
        if rows is None:
            self.drop()
            return
        first = int(self.progress[1])
        self._count(n)
        rows["packet_type"][:n] = 0
        rows["io_group"][:n] = 1
        rows["timestamp"][:n] = np.arange(first, first + n)
        self.recorder.publish(n)
        self.progress[1] += n

    def drop(self) -> None:
        rows = self.recorder.scratch[: self.rng.choice((1, 7, 500))]
        rows["io_group"] = 1
        self._count(len(rows))
        self.recorder.drop(rows)

    def info(self) -> None:
        self.recorder.info("x" * self.rng.choice((3, 100)))

    def run(self) -> None:
        self.recorder.end("closed", [], self.recorder.counts(self.ring.outside_counts))
        self.progress[2] = 1
        if self.rng.random() < 0.5:  # a storage has acknowledged everything
            self.ring.free_to(self.ring.head)
        run = int(self.progress[0]) + 1
        self.recorder.begin(run, ["storage", "other"])
        self.progress[1] = self.progress[2] = 0  # first, because the writer may be killed before the next line
        self.progress[0] = run

    def work(self) -> None:
        steps = ((self.write, 60), (self.recorder.close_block, 20), (self.drop, 5), (self.info, 5), (self.run, 3))
        choices, weights = zip(*steps, strict=True)
        while self.ring.fill < 0.95:
            self.rng.choices(choices, weights)[0]()


def check(folder: Path, epoch: int, progress: tuple[int, int, int]) -> None:
    """Take over the ring of the dead writer, and compare it with its progress."""
    worker = Worker("spool")
    spool = SpoolDirectory(folder / "spool", "larpixdaq", 0, worker)
    for _ in range(2):  # the second time as if the first successor had been killed at once
        (left,) = Predecessors(NAME, folder, folder, spool, time.time_ns()).take_over(())
        assert left.epoch == epoch
        assert left.ring_file is not None
        left.ring_file.leave()
    worker.close(5)
    ring = left.ring_file.ring
    assert not ring.run_open
    rows: list[int] = []
    texts = gaps = sequence = 0
    run = 0
    for index in range(ring.tail, ring.head):
        frame = unpack_producer(ring.packed_header(index), "ring")
        if frame.run != run:
            run, rows, texts, gaps, sequence = frame.run, [], 0, 0, 0
        gaps += sum(gap.rows for gap in frame.gaps)
        if isinstance(frame, Block):
            found = np.frombuffer(ring.payload(index), LAYOUT.dtype)
            assert (frame.sequence, frame.rows, frame.crc32) == (sequence, len(found), crc32(ring.payload(index)))
            assert frame.first_packet == len(rows) + texts
            sequence += 1
            if frame.text is not None:
                texts += len(found)
            else:
                rows += found["timestamp"].tolist()
        else:
            assert isinstance(frame, End)
            assert ring.kind(index) == END
            counts = {line[0]: line[1:] for line in frame.counts}
            words, infos = counts.get(1, [0] * len(Count)), counts.get(0, [0] * len(Count))
            assert frame.next == sequence
            assert rows == list(range(len(rows))), "rows are missing or double"
            batch = (Count.WORD_ROWS, Count.PACKETS, Count.BYTES_IN)
            assert len({words[count] for count in batch}) == 1, "counters of a batch that was cut"
            assert words[Count.WORD_ROWS] - words[Count.DROPPED] == len(rows), "equation (d)"
            assert infos[Count.INFO_ROWS] - infos[Count.DROPPED] == texts
            assert gaps == words[Count.DROPPED] + infos[Count.DROPPED]
    if run == progress[0]:
        assert progress[1] <= len(rows) <= progress[1] + 2000, f"{progress[1]} rows published, {len(rows)} in the ring"
        if frame.how == "recovered":
            assert {(line.io_group, line.verdict) for line in frame.verdicts} == {(1, "suspect"), (200, "suspect")}
    else:
        assert run == progress[0] + 1 or (progress[2] and ring.tail == ring.head), (run, progress)


def kill(folder: Path, seed: int) -> None:
    """Run one trial."""
    rng = random.Random(seed)
    ring_file = RingFile.make(folder, folder, NAME, seed, SMALLEST + (8 << 20))
    shared = mmap.mmap(-1, 4096)
    progress = np.frombuffer(shared, np.int64, 3)
    child = os.fork()
    if not child:
        try:
            Writer(ring_file, rng, progress).work()
            os._exit(0)
        finally:
            os._exit(1)
    while not progress[0]:
        os.sched_yield()
    end = time.monotonic() + rng.random() * 0.02
    while time.monotonic() < end:
        pass
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the writer has failed, exit status {status}"
    ring_file.leave()
    check(folder, seed, (int(progress[0]), int(progress[1]), int(progress[2])))
    ring_file.path.unlink()


def main(folder: str, seed: str, trials: str) -> int:
    for trial in itertools.islice(itertools.count(int(seed)), int(trials)):
        try:
            kill(Path(folder), trial)
        except AssertionError as error:
            print(f"trial {trial}: {error}", file=sys.stderr)
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
