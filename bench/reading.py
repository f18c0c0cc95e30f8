"""Measure how fast the rows of a file are read and verified, beside h5py and inflating alone.

    python bench/reading.py [--rows N] [--turns N] [-o DIR] [--update DOCUMENT]

Emulated hits of eight boards in full blocks of a finished packet file, which the page cache holds. Each reading is one
process; all take turns, and the medians count. "inflating alone" unpacks the deflated chunks in one thread and does
nothing with them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from common import argument_parser, update, with_source
from numpy.typing import NDArray

from larpixdaq import open_run, schema
from larpixdaq._native import board_emulator, decoders
from larpixdaq.constants import COUNTS
from larpixdaq.hdf5.reader import PIECE_ROWS, DataFile
from larpixdaq.hdf5.tables import RunInfo
from larpixdaq.hdf5.verify import verify_all
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.packed_rows import inflate
from larpixdaq.protocol.stream import Block, End
from larpixdaq.runtime.record_file import crc32

MARK: Final = "reading"
ROWS: Final = schema.CHUNK_ROWS
BOARDS: Final = 8
#: Columns of a short selection, of one and eight bytes: those of a hit.
THREE: Final = ["channel_id", "timestamp", "dataword"]


class Board:
    """One emulated board, with the decoder of a producer."""

    def __init__(self, io_group: int) -> None:
        self.counts = np.zeros(len(COUNTS), np.uint64)
        self._board = board_emulator.PacmanBoard(schema.Asic.V2, rate=1e6, seed=io_group, words=4 * ROWS)
        self._decoder = decoders.PacmanDecoder(io_group, schema.Asic.V2)
        self._decoder.start(self.counts)

    def rows(self, out: NDArray[Any], *, more: bool) -> int:
        """Decode rows until `out` is full, or without `more` until all received words are decoded."""
        made = 0
        while made < len(out):
            n = self._decoder.decode(out[made:])
            made += n
            if not n and not more:
                break
            if not n:
                self._decoder.feed(self._board.buffer, self._board.spans[: self._board.fill(2 * ROWS, 1000)])
        return made


def packet_file(directory: Path, rows: int) -> Path:
    """Write a finished file of at least `rows` rows, with a ledger that balances."""
    file = RunFile(directory, RunInfo(1, "bench", "", "", time.time_ns(), schema.layout(2), "2"))
    boards = [Board(io_group) for io_group in range(1, BOARDS + 1)]
    out, sequence, first = np.zeros(ROWS, schema.PACKETS_2_4), 0, 0
    for more in (True, False):
        turns = -(-rows // (ROWS * BOARDS)) if more else 8
        for board in boards * turns:
            made = out[: board.rows(out, more=more)]
            if len(made):
                crc = crc32(made.view(np.uint8))
                file.add(Block(1, "boards", 7, sequence, first, len(made), 2, 0, 0, 0, crc, [], []), made)
                sequence, first = sequence + 1, first + len(made)
    counts = [[number, *board.counts.tolist()] for number, board in enumerate(boards, 1)]
    file.end(End(1, "boards", 7, sequence, "closed", 0, 0, counts, [], []))
    return file.close().path


def inflate_alone(path: Path) -> int:
    with DataFile(path) as file:
        rows, size = file.rows, ROWS * file.dtype.itemsize
    with h5py.File(path) as plain:
        for first in range(0, rows, ROWS):
            inflate(plain["packets"].id.read_direct_chunk((first,))[1], size)
    return rows


def by_h5py(path: Path, columns: list[str] | None = None) -> int:
    with h5py.File(path) as file:
        packets = file["packets"] if columns is None else file["packets"].fields(columns)
        rows = file["packets"].shape[0]
        for first in range(0, rows, PIECE_ROWS):
            packets[first : first + PIECE_ROWS]
        return int(rows)


def by_open_run(path: Path, **selection: object) -> int:
    with open_run(path) as run:
        for _ in run.chunks(**selection):  # type: ignore[arg-type]
            pass
        return run.rows


def by_verify(path: Path) -> int:
    outcome = verify_all([path])
    assert outcome.ok, outcome
    return outcome.files[0].rows


READINGS = {
    "h5py, all columns": by_h5py,
    "h5py, three columns": lambda path: by_h5py(path, THREE),
    "inflating alone, one thread": inflate_alone,
    "`open_run`, all columns": by_open_run,
    "`open_run`, three columns": lambda path: by_open_run(path, columns=THREE),
    "`open_run`, all columns, one thread": lambda path: by_open_run(path, threads=1),
    "`open_run`, one of eight io_groups": lambda path: by_open_run(path, io_group=3),
    "`open_run`, the packets of one channel": lambda path: by_open_run(path, chip="3-2-11", channel=5),
    "`larpixdaq verify`": by_verify,
}


def measure(name: str, path: Path) -> dict[str, float]:
    """Read in a process of its own: rows, seconds by the clock and of processors, memory in MiB."""
    code = f"import reading, json; print(json.dumps(reading.timed({name!r}, {str(path)!r})))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, float] = json.loads(run.stdout)
    return found


def timed(name: str, path: str) -> dict[str, float]:
    before = most_memory()
    began, used = time.perf_counter(), time.process_time()
    rows = READINGS[name](Path(path))
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    return {"rows": rows, "wall": wall, "cpu": cpu, "memory": (most_memory() - before) / 1024}


def most_memory() -> int:
    """Return the highest memory of this process so far, in KiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000, help="rows of the file (default %(default)d)")
    parser.add_argument("--turns", type=int, default=5, help="readings of each kind (default %(default)d)")
    parser.add_argument("-o", "--output-dir", type=Path, help="directory for the file (default: a temporary one)")
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="put the table into this document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.output_dir) as folder:
        path = packet_file(Path(folder), options.rows)
        size = path.stat().st_size
        path.read_bytes()
        found: dict[str, list[dict[str, float]]] = {name: [] for name in READINGS}
        for _ in range(options.turns):
            for name, results in found.items():
                results.append(measure(name, path))
    rows = next(iter(found.values()))[0]["rows"]
    if options.json:
        print(json.dumps({"rows": rows, "bytes": size, "readings": found}))
        return
    lines = ["| | M rows/s | of h5py | ns of processors a row | memory |", "| --- | ---: | ---: | ---: | ---: |"]
    rates = {name: statistics.median(rows / one["wall"] / 1e6 for one in each) for name, each in found.items()}
    for name, each in found.items():
        peer = rates["h5py, three columns" if "three" in name else "h5py, all columns"]
        times = "" if "h5py" in name else f"{rates[name] / peer:.1f}"
        spread = sorted(rows / one["wall"] / 1e6 for one in each)
        cpu = statistics.median(one["cpu"] for one in each) / rows * 1e9
        memory = max(one["memory"] for one in each)
        rate = f"{rates[name]:.1f} ({spread[0]:.1f} to {spread[-1]:.1f})"
        lines.append(f"| {name} | {rate} | {times} | {cpu:.0f} | {memory:.0f} MiB |")
    text = (
        f"{rows / 1e6:.0f} M rows of {BOARDS} boards, {size / rows:.1f} bytes a row; medians of {options.turns} turns"
    )
    text = f"{text}, the lowest and the highest in brackets.\n\n" + "\n".join(lines)
    shown = with_source(text, f"python bench/reading.py --rows {options.rows} --turns {options.turns}")
    print(shown)
    if options.update:
        update(options.update, MARK, shown)


if __name__ == "__main__":
    main()
