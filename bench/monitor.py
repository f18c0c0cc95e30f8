"""Measure what the online monitor sees, its processor time, and what its actions cost.

    python bench/monitor.py [--seconds S] [--update DOCUMENT] [--json]

Saturated: 8 emulated PACMANs send messages of 1000 words as fast as the producer receives them. Every second the
monitor says how many packets of each io_group there are and how many of them it has seen; the last numbers are compared
with the run's file. "Channels" compares the numbers of packets seen of each channel with those in the file: the sum of
squared deviations over their expectation for a random sample (chi-square), per degree of freedom.

Actions: 8 boards with 800 chips each send 1 M packets/s; in every other span of 4 s the monitor is asked for summary()
and pixel_map() once a second.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from common import STEP, argument_parser, begin_run, processor_seconds, temporary_system, update, with_source
from emulated_board import Emulator
from loss_accounting import parts_of
from null_line import offer
from numpy.typing import NDArray
from processes import until

from larpixdaq._native.monitor_counters import PacketCounters

BOARDS = 8
#: Seconds until the monitor has found its share.
SETTLE = 3.0
#: Seconds until each of many channels has sent.
FILL = 10.0
#: Seconds without and with requests in turn, and number of turns.
SPAN, TURNS = 4, 10
MARK = "what the monitor sees"


def saturated(seconds: float) -> dict[str, Any]:
    """Measure the share of rows seen, by second and io_group, and the monitor's cores, at the highest rate."""
    with temporary_system() as line, contextlib.closing(Emulator(*offer(BOARDS, "1000"))) as board:
        operator = begin_run(line, "--ring", "64MiB", "--when-full", "wait", "--pacman", *board.addresses)
        pids = {key: process.popen.pid for key, process in line.processes.items()} | {"boards": board.process.pid}
        board.go()
        time.sleep(SETTLE)
        used = {key: -processor_seconds(pid) for key, pid in pids.items()}
        counts, times = [], []
        began = time.monotonic()
        for second in range(round(seconds) + 1):
            time.sleep(max(0.0, began + second - time.monotonic()))
            counts.append(_counts(operator))
            times.append(time.monotonic())
        used = {key: round((used[key] + processor_seconds(pid)) / (times[-1] - began), 3) for key, pid in pids.items()}
        board.stop()
        sent = sum(words["D"] for words in board.finish()["sent"].values())
        producer = lambda: line.status_of(operator, "producer")  # noqa: E731
        until(lambda: producer()["packets"] >= sent and not producer()["owed_blocks"], "all words to be stored", STEP)
        ended = operator.end_run().result(STEP)
        rates = operator.packet_rate().result(STEP)
        parts = parts_of([line.data], ended["run"])
        stored = _channels_of(parts)
    packets, seen = np.moveaxis(np.diff(counts, axis=0), 1, 0)  # by second, io_group
    share = seen.sum() / packets.sum()
    by_second = seen.sum(axis=1) / packets.sum(axis=1)
    # an io_group that hardly sends in a second says nothing
    cells = (seen / np.maximum(packets, 1) / by_second[:, None])[packets > packets.mean() / 10]
    found = {each[:4]: each[-1] for each in rates["channels"].tolist()}  # io_group to channel_id, seen_packets
    groups = rates["io_groups"][rates["io_groups"]["packets"] > 0]
    exact = {int(each["io_group"]): int(each["packets"]) for each in groups}
    of_file: dict[int, int] = {}
    for (io_group, *_), n in stored.items():
        of_file[io_group] = of_file.get(io_group, 0) + n
    return {
        "rate": float(packets.sum() / (times[-1] - times[0])),
        "condition": ended["condition"],
        "totals_as_in_file": exact == of_file,
        "seen": float(share),
        "by_io_group": _spread(seen.sum(axis=0) / packets.sum(axis=0)),
        "by_second": _spread(by_second),
        "within_seconds": _spread(cells),
        "channels": _chi_square(found, stored),
        "cores": used,
    }


def _counts(operator: Any) -> NDArray[np.int64]:
    """Return packets and seen packets of each board so far, shape (2, boards)."""
    groups = operator.packet_rate(channels=False).result(STEP)["io_groups"]
    groups = groups[(groups["io_group"] >= 1) & (groups["io_group"] <= BOARDS)]
    return np.array([groups["packets"], groups["seen_packets"]], np.int64)


def _channels_of(parts: list[Path]) -> dict[tuple[int, ...], int]:
    """Return the number of packets of each channel in the files of a run."""
    counters = PacketCounters()
    for path in parts:
        with h5py.File(path, "r") as file:
            rows = file["packets"]
            for start in range(0, len(rows), 1 << 20):
                counters.count(rows[start : start + (1 << 20)])
    keys, channels = counters.chips()[["io_group", "io_channel", "chip_id"]].tolist(), counters.channels()
    return {(*keys[chip], channel): int(channels[chip, channel]) for chip, channel in np.argwhere(channels).tolist()}


def _chi_square(found: dict[tuple[int, ...], int], stored: dict[tuple[int, ...], int]) -> float:
    """Return chi-square per degree of freedom of the channels' parts in what was seen of their io_groups."""
    total, degrees = 0.0, 0
    for io_group in sorted({key[0] for key in stored}):
        keys = [key for key in stored if key[0] == io_group]
        expected = np.array([stored[key] for key in keys], float)
        seen = np.array([found.get(key, 0) for key in keys], float)
        share = seen.sum() / expected.sum()
        expected *= share
        total += float(((seen - expected) ** 2 / expected).sum()) / max(1.0 - share, 1e-9)
        degrees += len(keys) - 1
    return total / degrees


def _spread(shares: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in (shares.min(), np.median(shares), shares.max())]


def actions() -> dict[str, Any]:
    """Measure the monitor's processor time with and without a request for summary() and pixel_map() each second."""
    options = ["--rate", str(1e6 / BOARDS), "--io-groups", str(BOARDS), "--words-per-message", "1000", "--lossless"]
    options += ["--io-channels", "32", "--chips-per-io-channel", "25", "--wait-for-go"]
    used = {False: 0.0, True: 0.0}
    took: list[float] = []
    with temporary_system() as line, contextlib.closing(Emulator(*options)) as board:
        operator = begin_run(line, "--pacman", *board.addresses)
        pid = line.processes["run_data"].popen.pid
        board.go()
        time.sleep(FILL)
        size = operator.pixel_map().result(STEP)["values"].size
        for turn in range(2 * TURNS):
            asks = turn % 2 == 1
            before, began = _nanoseconds(pid), time.monotonic()
            for second in range(SPAN):
                time.sleep(max(0.0, began + second - time.monotonic()))
                if asks:
                    asked = time.monotonic()
                    operator.summary().result(STEP)
                    operator.pixel_map().result(STEP)
                    took.append(time.monotonic() - asked)
            time.sleep(max(0.0, began + SPAN - time.monotonic()))
            used[asks] += (_nanoseconds(pid) - before) / (time.monotonic() - began) / TURNS / 1e9
        seen = operator.packet_rate(channels=False).result(STEP)["seen"]
        board.stop()
        board.finish()
        operator.end_run().result(STEP)
    return {
        "pixels": size,
        "seen": round(seen, 3),
        "without": round(used[False], 4),
        "with": round(used[True], 4),
        "more": round(used[True] / used[False] - 1, 3),
        "ms": round(1e3 * statistics.median(took), 1),
    }


def _nanoseconds(pid: int) -> int:
    """Return the processor time of a process so far. That in /proc/PID/stat has steps of 10 ms."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def table(line: dict[str, Any], asked: dict[str, Any]) -> str:
    def shares(name: str) -> str:
        return ", ".join(f"{100 * share:.1f} %" for share in line[name])

    rows = [
        ("packets/s, 8 boards, as fast as they are stored", f"{line['rate'] / 1e6:.1f} M"),
        ("share of the packets that the monitor has seen", f"{100 * line['seen']:.1f} %"),
        ("the same by io_group: lowest, median, highest", shares("by_io_group")),
        ("the same by second", shares("by_second")),
        ("the same by io_group and second, as part of that of all io_groups in the second", shares("within_seconds")),
        ("channels: chi-square per degree of freedom", f"{line['channels']:.2f}"),
        ("totals of all io_groups as in the file", "yes" if line["totals_as_in_file"] else "no"),
        ("cores of the monitor", f"{line['cores']['run_data']:.2f}"),
        (f"cores at 1 M packets/s with {asked['pixels']:,} channels", f"{asked['without']:.3f}"),
        ("the same with summary() and pixel_map() each second", f"{asked['with']:.3f} ({100 * asked['more']:+.1f} %)"),
        ("time from request to result of both", f"{asked['ms']:.0f} ms"),
    ]
    return "\n".join(["| what | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="at the highest rate (default %(default)g)"
    )
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="write the table into this document")
    options = parser.parse_args()
    line, asked = saturated(options.seconds), actions()
    shown = table(line, asked)
    if options.update:
        update(options.update, MARK, with_source(shown, "python bench/monitor.py"))
    print(json.dumps({"saturated": line, "actions": asked}) if options.json else shown)
    return 0 if line["condition"] == "COMPLETE" and line["totals_as_in_file"] else 1


if __name__ == "__main__":
    sys.exit(main())
