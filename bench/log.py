"""Measure `larpixdaq log` on five full files of the log.

    python bench/log.py [--rounds R] [--json]

The files have 64 MiB each: records of four components, 9 % warnings and 1 % errors, and in each file 2,000 records of a
component that has found the log an hour late. Prints, for each command, the medians of its processor time and of the
whole time, in seconds.
"""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import argument_parser

from larpixdaq.control.log_file import LogRecord, line
from larpixdaq.runtime.launcher import command

FILES, BYTES, LATE = 5, 64 << 20, 2000
#: Records a second.
RATE = 20.0
COMPONENTS = ("core", "LArPix board", "Offline storage", "Online monitor")
TEXTS = (
    "anna@daq1: run_routine(name='threshold_scan', args=[1, 2]) of LArPix board",
    "PACMAN io_group 1 at tcp://pacman.local:5556: silent for 2 s",
    "run0000042_20261122T071251Z_000.h5: 123456 rows, COMPLETE",
    "run 42: 123456 rows in 1 files, COMPLETE",
)


def fill(folder: Path) -> tuple[int, float]:
    """Write the files. Returns the number of lines, and the time of the last one in unix seconds."""
    chance, now, count = random.Random(1), 1.76e9, 0
    for number in reversed(range(FILES)):
        late = [LogRecord(now - 3600 + n, logging.WARNING, "late", TEXTS[0]) for n in range(LATE)]
        with open(folder / f"log.txt.{number}".removesuffix(".0"), "w") as file:
            while count % 1000 or file.tell() < BYTES - 200_000:
                now += chance.expovariate(RATE)
                level = chance.choices((logging.INFO, logging.WARNING, logging.ERROR), (90, 9, 1))[0]
                text = f"{chance.choice(TEXTS)} {chance.random()}"
                file.write(line(LogRecord(now, level, chance.choice(COMPONENTS), text)))
                count += 1
                if late and count % 10_000 == 0:
                    file.writelines(map(line, late))
                    count, late = count + LATE, []
    return count, now


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run the command. Returns its processor time and the whole time, in seconds."""
    began = time.monotonic()
    child = subprocess.Popen(command("cli", "log", *arguments), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"larpixdaq log {' '.join(arguments)} has failed")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="R", help="measurements of each command (default %(default)d)"
    )
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder:
        lines, last = fill(Path(folder))
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(last - 3600))
        for arguments in (
            ["-n", "100"],
            ["-n", "100", "--level", "error"],
            ["--level", "error"],
            ["--level", "warning"],
            ["--component", "core"],
            ["--since", since],
            [],
        ):
            found = [measure([*arguments, f"{folder}/log.txt"]) for _ in range(options.rounds)]
            shown = " ".join("TIME" if argument == since else argument for argument in ["larpixdaq log", *arguments])
            results[shown] = [round(statistics.median(values), 2) for values in zip(*found, strict=True)]
    if options.json:
        print(json.dumps({"lines": lines, "seconds": results}))
        return 0
    print(f"{lines} lines in {FILES} files\n\n| command | processor, s | whole, s |\n| --- | ---: | ---: |")
    for shown, (processor, whole) in results.items():
        print(f"| `{shown}` | {processor:.2f} | {whole:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
