"""Measure the start-up times of `larpixdaq-core --help` and of `larpixdaq demo`.

    python bench/startup.py [--rounds R] [--json]

"help" is the time of the whole process. "demo" is the time until h5py can read rows in the demo's file. Prints medians
in seconds.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
from common import argument_parser

from larpixdaq.runtime.launcher import command

#: Maximum seconds until the demo's first rows, and seconds between two tries to read them.
LIMIT = 30.0
RETRY = 0.01


def show_help() -> float:
    began = time.monotonic()
    subprocess.run(command("core", "--help"), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def demo(folder: Path) -> float:
    began = time.monotonic()
    process = subprocess.Popen(
        command("cli", "demo", "--seconds", "20", "--rate", "1000000", "-o", str(folder)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not has_rows(folder):
            if time.monotonic() > began + LIMIT or process.poll() is not None:
                raise SystemExit(f"no rows of the demo after {time.monotonic() - began:.1f} s")
            time.sleep(RETRY)
        return time.monotonic() - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT)


def has_rows(folder: Path) -> bool:
    for part in folder.rglob("*.h5.part"):
        try:
            with h5py.File(part, "r", swmr=True, locking=False) as file:
                return bool(file["packets"].shape[0])
        except (OSError, KeyError):
            continue  # the file is incomplete
    return False


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="R", help="measurements of each command (default %(default)d)"
    )
    options = parser.parse_args()
    helps = [show_help() for _ in range(options.rounds)]
    demos = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder:
            demos.append(demo(Path(folder)))
    result = {"help": round(statistics.median(helps), 3), "demo": round(statistics.median(demos), 2)}
    print(json.dumps(result) if options.json else f"help {result['help']} s, demo's first rows {result['demo']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
