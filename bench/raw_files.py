"""Measure how fast raw files are made and verified, and their size, for messages of several lengths.

    python bench/raw_files.py [--words N] [-o DIR]

Emulated hits of one board in a finished packet file, behind a header for each 1, 10, 100 and 1000 words.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from common import argument_parser

from larpixdaq import schema
from larpixdaq._native import board_emulator, word_codec
from larpixdaq.hdf5.raw_file import make_raw, verify_raw
from larpixdaq.hdf5.tables import RunInfo
from larpixdaq.hdf5.writer import RunFile
from larpixdaq.protocol.stream import Block
from larpixdaq.runtime.record_file import crc32

ROWS = schema.CHUNK_ROWS


def packet_file(directory: Path, words: int, each: int) -> Path:
    packets = np.zeros(words, np.uint64)
    board_emulator.PacmanBoard(schema.Asic.V2, rate=1e6, seed=3).packets(packets)
    rows = np.zeros(words + -(-words // each), schema.PACKETS_2_4)
    header = np.arange(len(rows)) % (each + 1) == 0
    hits = np.zeros(words, schema.PACKETS_2_4)
    word_codec.decode(packets, hits, asic=schema.Asic.V2, io_group=1, io_channel=1, receipt=0, direction=1)
    hits["receipt_timestamp"] = hits["timestamp"] + 300
    rows[~header] = hits
    rows["packet_type"][header], rows["timestamp"][header], rows["io_group"][header] = 4, 1_700_000_000, 1
    file = RunFile(directory, RunInfo(each, "bench", "", "", time.time_ns(), schema.layout(2), "2"))
    for sequence, first in enumerate(range(0, len(rows), ROWS)):
        part = rows[first : first + ROWS]
        crc = crc32(part.view(np.uint8))
        file.add(Block(each, "board", 7, sequence, first, len(part), 2, 0, 0, 0, crc, [], []), part)
    return file.close().path


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--words", type=int, default=2_000_000, help="words of a file (default %(default)d)")
    parser.add_argument("-o", "--output-dir", type=Path, help="directory for the files (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.output_dir) as folder:
        for each in (1, 10, 100, 1000):
            packets = packet_file(Path(folder), options.words, each)
            began, used = time.perf_counter(), time.process_time()
            report = make_raw(packets)
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            used = time.process_time()
            words, findings, _ = verify_raw(report.path)
            assert (words, findings) == (options.words, [])
            size = report.path.stat().st_size
            print(
                f"{each:5} words a message: {words / cpu / 1e6:5.2f} M words/s of a core, {words / wall / 1e6:5.2f} by "
                f"the clock; verified at {words / (time.process_time() - used) / 1e6:5.2f}; {size / words:5.1f} bytes "
                f"a word, {size / packets.stat().st_size:.1f} times the packet file"
            )


if __name__ == "__main__":
    main()
