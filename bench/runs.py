"""Measure `larpixdaq runs` with a large run catalogue: time and processor time of whole processes.

    python bench/runs.py [--runs N]

The catalogue is made with runs of two producers with four boards each, two files, and a comment on every tenth run.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from common import argument_parser

from larpixdaq.constants import COUNTS, ENDED, RunCondition
from larpixdaq.control.catalogue import Author, Catalogue, Run
from larpixdaq.protocol.reports import RunEnd, StorageEnd, StoredRows
from larpixdaq.protocol.stream import ConnectedBoard

COMMANDS = (
    ("runs",),
    ("runs", "77777"),
    ("runs", "--comment", "purity monitor"),
    ("runs", "--comment", "nothing like it"),
    ("runs", "--comment", "Übertragung"),
    ("runs", "--by", "nobody"),
    ("runs", "--condition", "aborted"),
    ("runs", "--since", "2023-06-01", "--until", "2023-06-02"),
    ("--help",),
)


def fill(directory: Path, runs: int) -> None:
    producers = ("LArPix board", "second board")
    boards = [
        ConnectedBoard(name, group, "PACMAN", "pacman.local", "daq1") for name in producers for group in range(1, 5)
    ]
    counts = [[group, *range(10**6, 10**6 + len(COUNTS))] for group in range(5)]
    ends = [RunEnd(7 + n, 1000, 10**7, counts, name) for n, name in enumerate(producers)]
    stored = [StoredRows(name, 7 + n, group, 10**6) for n, name in enumerate(producers) for group in range(5)]
    with closing(Catalogue(directory)) as catalogue:
        catalogue._db.execute("PRAGMA synchronous=OFF")
        catalogue._db.execute("BEGIN")
        for number in range(1, runs + 1):
            begun = 1_672_531_200 * 10**9 + number * 600 * 10**9
            files = [f"/data/run{number:07d}_20230101T000000Z_{part:03d}.h5" for part in range(2)]
            comment = f"cosmics, threshold {number % 100}, tile {number % 8}: the night's usual settings"
            run = Run(
                number, "physics", comment, "me", begun, phase=ENDED, begun_ns=begun,
                stopped_ns=begun + 590 * 10**9, ended_ns=begun + 591 * 10**9,
                condition=RunCondition.ABORTED if number % 1000 == 0 else RunCondition.COMPLETE, shifter="Ada Lovelace",
                connected=boards, producers={name: [7 + n] for n, name in enumerate(producers)}, ends=ends,
                storages=["Offline storage"], files=files, rows=2 * 10**7, stored=2 * 10**7,
                reports={"Offline storage": StorageEnd(files, "COMPLETE", 2 * 10**7, stored)},
            )  # fmt: skip
            catalogue.highest = number  # so that save() does not sync it for each run
            catalogue.save(run, new=True)
            for file in files:
                catalogue.add_file("Offline storage", file, number, 10**9, "ab" * 32, "COMPLETE")
            if number % 10 == 0:
                text = (
                    "purity monitor filled" if number % 5000 == 0 else "beam is back, HV at 5 kV, all tiles as before"
                )
                catalogue.add_comment(number, text, Author("Ada Lovelace", "ada@daq1", "owner"))
        catalogue._db.execute("COMMIT")
        catalogue._write_highest(runs)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=int, default=100_000, metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        fill(directory, options.runs)
        print(f"{options.runs} runs, {(directory / 'catalogue.sqlite').stat().st_size / 1e6:.0f} MB")
        for command in COMMANDS:
            state = ("--state-dir", str(directory)) if command[0] == "runs" else ()
            seconds, processor = [], []
            for _ in range(7):
                began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
                found = subprocess.run(
                    [sys.executable, "-m", "larpixdaq.cli", *command, *state], check=True, capture_output=True
                )
                seconds.append(time.monotonic() - began)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            lines = found.stdout.count(b"\n")
            times = f"{statistics.median(seconds):.3f} s, processor {statistics.median(processor):.3f} s"
            print(f"larpixdaq {' '.join(command)}: {times}, {lines} lines")


if __name__ == "__main__":
    main()
