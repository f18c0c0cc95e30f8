"""Measure how fast rows are exported, and how many bytes a row takes: Parquet, CSV, numpy.

    python bench/export.py [--rows N] [-o DIR]

Emulated hits of one board with a header for each 100 words, in a finished packet file. Start-up is not included. The
last column compares with a program of ten lines (h5py, pandas.DataFrame, to_parquet).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import h5py
from common import argument_parser
from raw_files import packet_file

from larpixdaq import open_run
from larpixdaq.hdf5.export import FORMATS, export
from larpixdaq.hdf5.row_reader import Selection


def peer(packets: Path, target: Path) -> float:
    """Return the seconds of pandas for the same; 0 without pandas."""
    try:
        import pandas
    except ImportError:
        return 0.0
    began = time.perf_counter()
    with h5py.File(packets) as file:
        pandas.DataFrame(file["packets"][:]).to_parquet(target)
    return time.perf_counter() - began


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows of the file (default %(default)d)")
    parser.add_argument("-o", "--output-dir", type=Path, help="directory for the files (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.output_dir) as folder:
        packets = packet_file(Path(folder), options.rows, 100)
        print(f"packet file: {packets.stat().st_size / options.rows:.2f} bytes a row")
        for form in FORMATS:
            for _ in range(3):
                target = Path(folder) / f"x.{form}"
                began, used = time.perf_counter(), time.process_time()
                with open_run(packets, parts=False) as run:
                    report = export(run, target, form, Selection())
                wall, cpu = time.perf_counter() - began, time.process_time() - used
                print(
                    f"{form:8} {report.rows / wall / 1e6:6.2f} M rows/s by the clock, {report.rows / cpu / 1e6:6.2f} "
                    f"of a core, {report.bytes / report.rows:6.2f} bytes a row"
                )
                target.unlink()
                if form == "csv":
                    break
        if seconds := peer(packets, Path(folder) / "peer.parquet"):
            size = (Path(folder) / "peer.parquet").stat().st_size
            print(f"pandas   {options.rows / seconds / 1e6:6.2f} M rows/s, {size / options.rows:6.2f} bytes a row")


if __name__ == "__main__":
    main()
