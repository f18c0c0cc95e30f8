"""Measure how long after the board has sent them rows appear in `larpixdaq cat --follow`.

    python bench/follow.py [--seconds S] [--rates R ...]

An emulated PACMAN → producer → storage → `cat --follow --json --types timestamp`, each a process. A row of type 4 has
the second in which the board has sent its message, so that delays are known to within a second: the largest possible
one is shown. The first figure is the time from the board's first message to the first line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

from common import STEP, argument_parser, temporary_system
from emulated_board import emulator


def measure(rate: float, seconds: float) -> tuple[float, float, float, int]:
    """Return the delays of the first row, of the median row and of the last row in s, and the number of lines."""
    delays: list[tuple[float, float]] = []
    with temporary_system() as line, emulator("--rate", str(rate), "--lossless", "--stay") as board:
        operator = line.start("--pacman", f"1=127.0.0.1:{board.ready['1']['data']}")
        operator.prepare_run(kind="bench").result(STEP)
        command = [sys.executable, "-m", "larpixdaq", "cat", "--follow", "--json", "--types", "timestamp", line.data]
        cat = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert cat.stdout is not None

        def read() -> None:
            assert cat.stdout is not None
            for text in cat.stdout:
                delays.append((time.time(), json.loads(text)["timestamp"]))

        reader = threading.Thread(target=read)
        reader.start()
        began = time.time()
        operator.begin_run().result(STEP)
        time.sleep(seconds)
        operator.end_run().result(STEP)
        cat.wait(STEP)
        reader.join(STEP)
    late = sorted(at - second for at, second in delays)
    return delays[0][0] - began, late[len(late) // 2], late[-1], len(late)


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a run (default %(default)g)")
    parser.add_argument("--rates", type=float, nargs="+", default=[20, 2000, 200_000, 2_000_000], help="words/s")
    options = parser.parse_args()
    for rate in options.rates:
        first, median, last, count = measure(rate, options.seconds)
        print(
            f"{rate:9.0f} words/s: first line after {first:.2f} s; the median row at most {median:.2f} s after it was "
            f"sent, the latest {last:.2f} s; {count} lines"
        )


if __name__ == "__main__":
    main()
