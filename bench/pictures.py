"""Measure how long the summary of a run takes, of which `larpixdaq plot` and `hot` make pictures and lists.

    python bench/pictures.py [--rows N] [--read N ...] [-o DIR]

A file in DIR has N rows of eight boards with 6,400 chips at their highest rate, 19.4 M packets/s. Each reading is a
process of its own; its time is that of the processor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from common import argument_parser
from file_builder import NS, V2, Feed, run_info

from larpixdaq import constants
from larpixdaq.hdf5.writer import RunFile

RATE = 19.4e6
BLOCK = 16_384
READ = """
import json, resource, sys, time
from larpixdaq.hdf5.run_summary import summarise
began = time.process_time()
summary = summarise(sys.argv[1], rows=int(sys.argv[2]))
seconds, memory = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([summary.rows_read, summary.seen, len(summary.chips), seconds, memory]))
"""


def write(directory: Path, rows: int) -> Path:
    rng = np.random.default_rng(1)
    templates = []
    for _ in range(16):
        made = np.zeros(BLOCK, V2.dtype)
        made["io_channel"], made["chip_id"] = rng.integers(1, 33, BLOCK), rng.integers(11, 36, BLOCK)
        made["channel_id"], made["dataword"] = rng.integers(0, 64, BLOCK), rng.integers(20, 60, BLOCK)
        made["direction"] = made["valid_parity"] = 1
        templates.append(made)
    file = RunFile(directory, run_info())
    feeds = {group: Feed(producer=f"board {group}", epoch=group) for group in range(1, 9)}
    length = 8 * BLOCK / RATE
    for number in range(-(-rows // BLOCK)):
        group, begin = 1 + number % 8, number // 8 * length
        made = templates[number % 16].copy()
        made["io_group"], made["receipt_timestamp"] = group, (int(begin * 1e7) + np.arange(BLOCK) // 2) % (1 << 32)
        block, made = feeds[group].block(made)
        feeds[group].rows.clear()
        times = {"first_ns": NS + int(begin * 1e9), "last_ns": NS + int((begin + length) * 1e9)}
        file.add(msgspec.structs.replace(block, **times), made)
    for group, feed in feeds.items():
        made_rows = feed.first_packet
        counts = dict.fromkeys(constants.COUNTS, 0)
        counts |= dict.fromkeys(("word_rows", "packets", "words_in"), made_rows)
        counts |= dict.fromkeys(("word_bytes", "bytes_in"), 16 * made_rows)
        file.end(msgspec.structs.replace(feed.end(), counts=[[group, *counts.values()]]))
    return file.close().path


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000_000, help="rows of the file (default %(default)d)")
    parser.add_argument(
        "--read", type=int, nargs="+", default=[2_000_000, 20_000_000], help="rows to read (default %(default)s)"
    )
    parser.add_argument(
        "-o", "--output-dir", type=Path, help="for the file, which is removed (default: a temporary one)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.output_dir) as folder:
        path = write(Path(folder), options.rows)
        size = path.stat().st_size
        results = []
        for read in options.read:
            command = [sys.executable, "-c", READ, str(path), str(read)]
            results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    if options.json:
        names = ("rows_read", "seen", "chips", "seconds", "memory")
        print(json.dumps({"bytes": size, "readings": [dict(zip(names, line, strict=True)) for line in results]}))
        return 0
    print(f"{options.rows} rows, {size / 1e9:.1f} GB")
    for rows, seen, chips, seconds, memory in results:
        print(
            f"{rows} rows ({seen:.2%}) of {chips} chips in {seconds:.1f} s of processor time "
            f"({rows / seconds / 1e6:.1f} M rows/s), {memory:.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
