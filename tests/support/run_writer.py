"""A process that writes a run step by step, as a storage does, for tests of readers in another process.

HDF5 shares one open file within a process, so that a reader there would see what is not in the file. Commands and
answers are lines of JSON. Blocks are described by [producer, seed, size], INFO messages by [producer, text]: their rows
follow from that on both sides.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from file_builder import V2, Feed, random_rows, run_info
from numpy.typing import NDArray

from larpixdaq.buffer.block_builder import info_rows
from larpixdaq.hdf5 import names, writer
from larpixdaq.hdf5.recovery import prepare, recover
from larpixdaq.hdf5.writer import RunFile

PRODUCERS = (("LArPix board", 7), ("second", 1 << 63))


def rows_of(description: list[Any]) -> NDArray[Any]:
    """Return the rows of a block; INFO messages without the number that the storage gives them."""
    if len(description) == 2:
        return info_rows(description[1], V2, 1_795_331_571)
    _, seed, size = description
    return random_rows(np.random.default_rng(seed), size)


class RunWriter:
    """The run in the writing process. Every command returns the descriptions of all acknowledged blocks, in order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._feeds = [Feed(producer=name, epoch=epoch) for name, epoch in PRODUCERS]
        self._blocks: list[tuple[int, int, list[Any]]] = []  # producer, sequence, description
        self._part = 0
        self._file = RunFile(folder, run_info())

    def _acknowledged(self, producer: int) -> int:
        origin = self._feeds[producer].origin
        return self._file.durable.get(origin, self._file._start_positions.get(origin, 0))

    def acknowledged(self) -> list[list[Any]]:
        return [what for producer, sequence, what in self._blocks if sequence < self._acknowledged(producer)]

    def add(self, producer: int, seed: int, size: int) -> None:
        feed, what = self._feeds[producer], [producer, seed, size]
        self._blocks.append((producer, feed.sequence, what))
        self._file.add(*feed.block(rows_of(what)))

    def info(self, producer: int, text: str) -> None:
        feed = self._feeds[producer]
        self._blocks.append((producer, feed.sequence, [producer, text]))
        self._file.add(*feed.info(text))

    def work(self, show: bool) -> None:
        """Write waiting blocks to the journal; `show`: also the rows of the batch into the part, for readers."""
        writer.SHOW_INTERVAL = 0.0 if show else 1e9
        self._file.work(pressed=True)

    def rotate(self) -> None:
        self._part += 1
        previous, self._file = self._file, RunFile(self._folder, run_info(), self._part, self._file.positions())
        previous.close(continued=True)

    def die(self, whole: bool) -> None:
        """Die and start again, with a recovery at once, or only so far as a storage does before it continues a run."""
        self._blocks = [each for each in self._blocks if each[1] < self._acknowledged(each[0])]
        positions = {feed.origin: self._acknowledged(number) for number, feed in enumerate(self._feeds)}
        path = self._file.path
        self._file.abandon()
        report = recover(path) if whole else prepare(path)
        if report is None or report.path is not None:
            self._part += 1
        self._file = RunFile(self._folder, run_info(), self._part, {key: n for key, n in positions.items() if n})
        for number, feed in enumerate(self._feeds):
            sent = [rows_of(what) for producer, _, what in self._blocks if producer == number]
            feed.sequence, feed.first_packet, feed.rows = positions[feed.origin], sum(map(len, sent)), sent

    def abandon(self) -> None:
        self._file.abandon()

    def recover(self) -> None:
        for path in names.unfinished_parts(self._folder):
            recover(path)

    def end(self) -> None:
        for number, feed in enumerate(self._feeds):
            if self._acknowledged(number) or feed.sequence:
                self._file.end(feed.end())
        self._file.close()


class WriterProcess:
    """The client: commands as methods of RunWriter, after new(folder)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, command: str, *arguments: Any) -> NDArray[Any]:
        """Run a command; return all acknowledged rows."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the writer died"
        return np.concatenate([np.zeros(0, V2.dtype), *map(rows_of, json.loads(answer))])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


def main() -> None:
    run: RunWriter | None = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "new":
            run = RunWriter(Path(arguments[0]))
        else:
            assert run is not None
            getattr(run, command)(*arguments)
        print(json.dumps(run.acknowledged()), flush=True)


if __name__ == "__main__":
    main()
