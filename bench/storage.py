"""Measure the maximum rate of a storage without the stream, and the time of a rotation, for each durability.

    python bench/storage.py [--seconds S] [-o DIR]

"full blocks": emulated hits in full blocks are written into files in DIR. "small blocks": blocks of 200 rows, each of
which must be in the journal before it is acknowledged. "rotation" is the time from the last block of a part until the
first block of the next part is accepted: totals, seal, close, a new file.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import argument_parser

from larpixdaq import constants, schema
from larpixdaq._native import board_emulator, word_codec
from larpixdaq.hdf5 import writer
from larpixdaq.protocol.stream import Block, BlockOrigin
from larpixdaq.runtime.record_file import crc32
from larpixdaq.storage.limits import Limits, parse_limit
from larpixdaq.storage.service import StorageService


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
    data = hits(rows)
    crc = crc32(data.view(np.uint8))
    view = memoryview(data.view(np.uint8))
    for sequence in itertools.count():
        yield Block(1, "board", 7, sequence, sequence * rows, rows, 2, 0, 0, 0, crc, [], []), view


def stored(directory: Path, rows: int, seconds: float, limits: Limits, *, fsync: bool) -> tuple[float, list[float]]:
    """Store blocks of `rows` rows. Returns rows/s and the seconds of each rotation."""
    service = StorageService(directory, "Offline storage", "", fsync=fsync, limits=limits)
    stream = NullStream()
    service.prepare_run(None, 1, "bench", "", "", time.time_ns(), 2, "2", [], {})  # type: ignore[arg-type]
    rotations = []
    written = 0
    began = time.monotonic()
    for block, view in blocks(rows):
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
    rate = written / (time.monotonic() - began)
    service.close()
    return rate, rotations


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="length of each measurement, s (default %(default)g)"
    )
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=None, metavar="DIR", help="directory on the disk to measure"
    )
    options = parser.parse_args()

    def measure(rows: int, wait: float, fsync: bool, limits: Limits = Limits()) -> tuple[float, list[float]]:  # noqa: B008
        writer.WAIT = wait  # type: ignore[misc]
        with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-", dir=options.output_dir) as folder:
            return stored(Path(folder), rows, options.seconds, limits, fsync=fsync)

    print("durability  full blocks, rows/s  small blocks, rows/s  rotation, ms (median, longest)")
    for fsync in (False, True):
        full, _ = measure(constants.BLOCK_ROWS, 0.02, fsync)
        small, _ = measure(200, 0.0, fsync)
        _, times = measure(constants.BLOCK_ROWS, 0.02, fsync, parse_limit("5Mrows"))
        rotation = f"{1000 * float(np.median(times)):.0f}, {1000 * max(times):.0f}" if times else "none"
        print(f"{'fsync' if fsync else 'flush':<10} {full:>20,.0f} {small:>21,.0f} {rotation:>31}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
