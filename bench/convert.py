"""Measure how fast recordings are converted, start-up included, and larpix-control's script on the same file.

    python bench/convert.py [--words N] [--peer CHECKOUT] [--peer-words N] [--peer-python PYTHON] [-o DIR]

Raw files with messages of 1, 10, 100 and 1000 words are converted by `larpixdaq convert`, one file with one command;
then a log of messages, and a packet file as larpix-control writes it. The time is that of the command by the clock.

--peer: a checkout of larpix-control with hdf5format_direct (HEAD of larpix/larpix-control), whose script
scripts/convert_rawhdf5_to_hdf5.py --direct converts a smaller file, as does `larpixdaq convert`, three times in turn.
It needs numba: --peer-python names an interpreter that has it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from common import argument_parser, machine
from numpy.typing import NDArray

from larpixdaq import schema
from larpixdaq._native import board_emulator, word_codec
from larpixdaq._native.decoders import encode_pacman
from larpixdaq.hdf5.raw_file import MessageWriter
from larpixdaq.runtime.launcher import command

#: Words of a piece that are encoded once and written again and again.
PIECE: Final = 2_000_000
LENGTHS: Final = (1, 10, 100, 1000)


def rows_of(words: int, each: int) -> NDArray[Any]:
    """Return emulated hits of one board, behind a header for each `each` words."""
    packets = np.zeros(words, np.uint64)
    board_emulator.PacmanBoard(schema.Asic.V2, rate=1e6, seed=3).packets(packets)
    hits = np.zeros(words, schema.PACKETS_2_4)
    word_codec.decode(packets, hits, asic=schema.Asic.V2, io_group=1, io_channel=1, receipt=0, direction=1)
    hits["receipt_timestamp"] = hits["timestamp"] + 300
    rows = np.zeros(words + words // each, schema.PACKETS_2_4)
    header = np.arange(len(rows)) % (each + 1) == 0
    rows[~header] = hits
    rows["packet_type"][header], rows["timestamp"][header], rows["io_group"][header] = 4, 1_700_000_000, 1
    return rows


def raw_file(path: Path, words: int, each: int) -> None:
    """Write a raw file as PACMAN_IO does, in many calls with some messages each."""
    data, spans = encode_pacman(rows_of(min(words, PIECE), each), asic=int(schema.Asic.V2))
    buffer = np.frombuffer(data, np.uint8)
    writer = MessageWriter(path)
    for _ in range(words // min(words, PIECE)):
        for first in range(0, len(spans), 4096):
            some = spans[first : first + 4096]
            writer.add(buffer, some, np.ones(len(some), np.uint8))
    writer.finish(np.zeros(0, schema.NOTICE), {"version": "0.0", "io_version": "0.0", "created": 0.0, "modified": 0.0})


def log_file(path: Path, words: int, each: int) -> None:
    data, spans = encode_pacman(rows_of(min(words, PIECE), each), asic=int(schema.Asic.V2))
    size = int(spans["length"][0])
    assert (spans["length"] == size).all()
    entries = np.zeros(len(spans), [("length", "<u4"), ("message", "u1", (size,))])
    entries["length"], entries["message"] = size, np.frombuffer(data, np.uint8).reshape(-1, size)
    with path.open("wb") as file:
        for _ in range(words // min(words, PIECE)):
            file.write(entries.tobytes())


def packet_file(path: Path, words: int, each: int) -> None:
    """Write a packet file with the chunks that larpix-control makes, without compression."""
    rows = rows_of(min(words, PIECE), each)
    with h5py.File(path, "w") as file:
        file.create_group("_header").attrs.update({"version": "2.4", "created": 0.0, "modified": 0.0})
        stored = file.create_dataset("packets", (0,), rows.dtype, maxshape=(None,), chunks=(783,))
        for _ in range(words // min(words, PIECE)):
            stored.resize((len(stored) + len(rows),))
            stored[-len(rows) :] = rows


def timed(arguments: list[str], **options: Any) -> tuple[float, float]:
    """Run a command; return its seconds by the clock, and its processor time."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, **options)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


def converted(source: Path, words: int) -> tuple[float, float, int]:
    """Convert a recording; return seconds, processor seconds and bytes of the new file, which is removed."""
    new = source.with_name(source.name.removesuffix(".h5") + ".converted.h5")
    seconds, used = timed(command("cli", "convert", str(source)))
    with h5py.File(new) as file:
        assert int(file["ledger/counts"]["word_rows"].sum()) == words
    size = new.stat().st_size
    new.unlink()
    return seconds, used, size


def measure(folder: Path, words: int) -> None:
    print("recording                words/message  M words/s  core ns/word  MB/s   bytes/word before, after")
    kinds = [("raw file", raw_file, each) for each in LENGTHS]
    kinds += [("log of messages", log_file, 1), ("log of messages", log_file, 1000)]
    kinds += [("packet file", packet_file, 1000)]
    for name, write, each in kinds:
        source = folder / "recording.h5"
        write(source, words, each)
        os.sync()
        size = source.stat().st_size
        seconds, used, new = converted(source, words)
        print(
            f"{name:<24} {each:>13} {words / seconds / 1e6:>10.1f} {1e9 * used / words:>13.0f}"
            f" {size / seconds / 1e6:>5.0f} {size / words:>12.1f}, {new / words:.1f}",
            flush=True,
        )
        source.unlink()


def compare(folder: Path, words: int, checkout: Path, python: str) -> None:
    print(f"\nthe same file with {words} words: ours, theirs (M words/s; medians of three in turn)")
    for each in (1, 1000):
        source, theirs = folder / "small.h5", folder / "theirs.h5"
        raw_file(source, words, each)
        own, other = [], []
        for _ in range(3):
            own.append(converted(source, words)[0])
            theirs.unlink(missing_ok=True)
            script = checkout / "scripts/convert_rawhdf5_to_hdf5.py"
            arguments = [python, str(script), "-i", str(source), "-o", str(theirs), "--direct"]
            other.append(timed(arguments, env=os.environ | {"PYTHONPATH": str(checkout)})[0])
            with h5py.File(theirs) as file:
                assert len(file["packets"]) == words + words // each
        ours, their = statistics.median(own), statistics.median(other)
        print(
            f"{each:>5} words a message: {words / ours / 1e6:.2f}, {words / their / 1e6:.4f}: {their / ours:.0f} times",
            flush=True,
        )
        source.unlink()


def main() -> None:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--words", type=int, default=50_000_000, help="words of a file (default %(default)d)")
    parser.add_argument("--peer", type=Path, metavar="CHECKOUT", help="larpix-control, to compare with")
    parser.add_argument("--peer-words", type=int, default=4_000_000, help="words of its file (default %(default)d)")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter for its script")
    parser.add_argument("-o", "--output-dir", type=Path, help="directory for the files (default: a temporary one)")
    options = parser.parse_args()
    for name, words in (("--words", options.words), ("--peer-words", options.peer_words)):
        if words % 1000 or words % min(words, PIECE):
            parser.error(f"{name}: expected a multiple of 1000, and above {PIECE} of that, found {words}")
    print(machine())
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-", dir=options.output_dir) as folder:
        measure(Path(folder), options.words)
        if options.peer is not None:
            compare(Path(folder), options.peer_words, options.peer, options.peer_python)


if __name__ == "__main__":
    main()
