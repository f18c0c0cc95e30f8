"""Measure the maximum rate of a storage without the stream, and the time of a rotation, for each durability.

    python bench/storage.py [--seconds S] [--threads N] [-o DIR]

"full blocks": emulated hits in full blocks are written into files in DIR, out of 64 MiB like those of a ring; "ns a
row" is the processor time of the process for them, and that of its main thread. "small blocks": blocks of 200 rows,
each of which must be in the journal before it is acknowledged. "rotation" is the time from the last block of a part
until the first block of the next part is accepted: totals, seal, close, a new file.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from common import argument_parser

from larpixdaq import constants, schema
from larpixdaq._native import board_emulator, word_codec
from larpixdaq.hdf5 import writer
from larpixdaq.offline_storage import default_threads
from larpixdaq.protocol.stream import Block, BlockOrigin
from larpixdaq.runtime.record_file import crc32
from larpixdaq.storage.limits import Limits, parse_limit
from larpixdaq.storage.service import StorageService

#: Bytes of the rows that are stored again and again: more than any cache has.
POOL: Final = 64 << 20


class NullStream:
    """Stands for the stream to the producers."""

    def acknowledge(self, source: BlockOrigin, following: int) -> None: ...
    def resubscribe(self, *, send_rows: bool = False) -> None: ...


def hits(rows: int) -> Any:
    words = np.zeros(rows, np.uint64)
    board_emulator.PacmanBoard(schema.Asic.V2, rate=1e6, seed=3).packets(words)
    made = np.zeros(rows, schema.layout(2).dtype)
    word_codec.decode(words, made, asic=schema.Asic.V2, io_group=1, io_channel=1, receipt=0, direction=1)
    return made


def blocks(rows: int) -> Any:
    """Yield blocks without end, after a first one of 100 rows, so that they do not begin where chunks begin."""
    data = hits(POOL // (36 * rows) * rows)
    given = [memoryview(data[at : at + rows].view(np.uint8)) for at in range(0, len(data), rows)]
    sums = [crc32(view) for view in given]
    first = memoryview(data[:100].view(np.uint8))
    yield Block(1, "board", 7, 0, 0, 100, 2, 0, 0, 0, crc32(first), [], []), first
    for number in itertools.count():
        place = 1, "board", 7, number + 1, 100 + number * rows
        at = number % len(given)
        yield Block(*place, rows, 2, 0, 0, 0, sums[at], [], []), given[at]


class Result(NamedTuple):
    rate: float  # rows/s
    ns: float  # processor time of the process, ns a row
    main_ns: float  # of its main thread
    rotations: list[float]  # seconds of each


def stored(directory: Path, rows: int, seconds: float, limits: Limits, *, fsync: bool, threads: int) -> Result:
    """Store blocks of `rows` rows."""
    service = StorageService(directory, "Offline storage", "", fsync=fsync, limits=limits, threads=threads)
    stream = NullStream()
    service.prepare_run(None, 1, "bench", "", "", time.time_ns(), 2, "2", [], {})  # type: ignore[arg-type]
    rotations = []
    written = 0
    source = blocks(rows)
    service.receive("board", *next(source))
    began, used, used_main = time.monotonic(), time.process_time(), time.thread_time()
    for block, view in source:
        file, start = service._runs[1].file, time.monotonic()
        service.receive("board", block, view)
        if service._runs[1].file is not file:
            rotations.append(time.monotonic() - start)
        service.report_to(stream)
        service.work()
        service.report_to(stream)
        written += rows
        if time.monotonic() - began > seconds:
            break
    took, used, used_main = time.monotonic() - began, time.process_time() - used, time.thread_time() - used_main
    service.close()
    return Result(written / took, 1e9 * used / written, 1e9 * used_main / written, rotations)


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="length of each measurement, s (default %(default)g)"
    )
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=None, metavar="DIR", help="directory on the disk to measure"
    )
    parser.add_argument(
        "--threads", type=int, default=default_threads(), metavar="N", help="packing threads (default %(default)d)"
    )
    options = parser.parse_args()

    def measure(rows: int, wait: float, fsync: bool, limits: Limits = Limits()) -> Result:  # noqa: B008
        writer.WAIT = writer.WAIT_FSYNC = wait  # type: ignore[misc]
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-", dir=options.output_dir) as folder:
            return stored(Path(folder), rows, options.seconds, limits, fsync=fsync, threads=options.threads)

    print("durability  full blocks, rows/s  ns a row  small blocks, rows/s  rotation, ms (median, longest)")
    for fsync in (False, True):
        full = measure(constants.BLOCK_ROWS, 0.02, fsync)
        small = measure(200, 0.0, fsync)
        times = measure(constants.BLOCK_ROWS, 0.02, fsync, parse_limit("5Mrows")).rotations
        rotation = f"{1000 * float(np.median(times)):.0f}, {1000 * max(times):.0f}" if times else "none"
        cost = f"{full.ns:.1f}, {full.main_ns:.1f}"
        print(
            f"{'fsync' if fsync else 'flush':<10} {full.rate:>20,.0f} {cost:>9} {small.rate:>21,.0f} {rotation:>31}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
