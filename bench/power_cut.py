"""Cut the power of all brokers in a run, and count what was acknowledged and is lost. For root, with loop devices.

    python bench/power_cut.py [--brokers 1|3] [--durability flush|fsync] [--rate R] [--seconds S] [--rounds R] [--json]

The streams of all brokers are on an ext4 file system in a file. The storage is killed, so that blocks that the brokers
have acknowledged are only in the streams. Seconds later the file system is shut down as by a power cut (the ioctl
EXT4_IOC_SHUTDOWN without a flush: what was not synced is gone, also the journal in memory), and all brokers are killed.
Then the file system is mounted again, brokers and storage are started, and the run goes on and ends. Its rows are
counted, with plain h5py, against the board's own count. The disk under the file system keeps what it was given.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import STEP, argument_parser, machine, temporary_system

from brokers import brokers  # isort: skip  after common, which finds tests/support
from emulated_board import Emulator
from loss_accounting import parts_of, tally
from processes import until

#: The request of ext4 and xfs to stop at once, and its flag not to write the journal before.
SHUTDOWN = 0x8004587D
NO_FLUSH = struct.pack("I", 2)
#: Size of the file system.
SIZE = "2G"


class Disk:
    """An ext4 file system in a file, mounted in a folder."""

    def __init__(self, folder: Path) -> None:
        self._image, self.folder = folder / "disk.img", folder / "disk"
        self.folder.mkdir()
        subprocess.run(["truncate", "-s", SIZE, self._image], check=True)
        subprocess.run(["mkfs.ext4", "-q", self._image], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self.folder], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.folder], check=True)

    def cut_power(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, NO_FLUSH)
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk() -> Iterator[Disk]:
    with tempfile.TemporaryDirectory(prefix="larpixdaq-bench-") as folder:
        made = Disk(Path(folder))
        try:
            yield made
        finally:
            made.unmount()


def trial(options: Any) -> dict[str, Any]:
    rate = ("--rate", str(options.rate), "--words-per-message", "auto", "--lossless", "--wait-for-go")
    with (
        disk() as where,
        brokers(options.brokers, where.folder / "brokers", fsync=options.durability == "fsync") as cluster,
        temporary_system() as line,
        contextlib.closing(Emulator(*rate)) as board,
    ):
        for n in range(options.brokers):
            sync(cluster.directory(n) / "nats-server.conf")  # which the brokers of a detector write at each start
        line.launch_core()
        stream = ("--stream", cluster.urls, "--stream-size", "1GiB")
        line.launch_producer("--pacman", *board.addresses, *stream, "--ring", "256MiB")
        operator = line.operator()
        line.await_kinds(operator, "producer")

        def uplink() -> dict[str, Any]:
            return line.status_of(operator, "producer").get("uplink") or {}

        until(lambda: uplink().get("connected"), "the uplink to be connected", STEP)
        line.launch_storage("--stream", cluster.urls)
        line.await_kinds(operator, "storage")
        operator.prepare_run(kind="bench").result(STEP)
        operator.begin_run().result(STEP)
        board.go()
        until(lambda: line.status_of(operator, "storage").get("rows"), "the first rows in the file", STEP)
        line.processes["offline_storage"].kill()
        time.sleep(options.seconds)
        acknowledged = uplink()["acknowledged_messages"]
        where.cut_power()
        cluster.kill_all()
        where.unmount()
        where.mount()
        for n in range(options.brokers):
            cluster.start(n, wait=False)
        for n in range(options.brokers):
            cluster.await_ready(n, STEP)
        line.restart("offline_storage")
        until(lambda: uplink().get("connected"), "the uplink to publish again", STEP)
        until(lambda: uplink()["acknowledged_messages"] > acknowledged + 10, "further acknowledgements", STEP)
        line.await_kinds(operator, "storage")
        lost_messages = uplink()["lost_messages"]
        board.stop()
        sent = {int(group): counts["words"] for group, counts in board.finish()["sent"].items()}
        ended = operator.end_run().result(STEP)

        def condition() -> str:
            return str(operator.run_info(run=ended["run"]).result(STEP)["condition"])

        if not lost_messages:
            until(lambda: condition() == "COMPLETE", "the run to be complete", STEP)
        found = tally(parts_of([line.data], ended["run"], ""))
        return {
            "acknowledged": acknowledged, "lost_messages": lost_messages, "sent": sum(sent.values()),
            "lost": sum(found.unaccounted(sent).values()) + sum(found.counted.values()), "doubled": found.doubled,
            "condition": condition(),
        }  # fmt: skip


def main() -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--brokers", type=int, choices=(1, 3), default=3, help="number of brokers (default %(default)d)")
    add("--durability", choices=("flush", "fsync"), default="fsync", help="of the brokers (default %(default)s)")
    add("--rate", type=float, default=100_000.0, metavar="R", help="packets/s (default %(default)g)")
    add("--seconds", type=float, default=5.0, metavar="S", help="from kill to power cut, s (default %(default)g)")
    add("--rounds", type=int, default=3, metavar="R", help="number of power cuts (default %(default)d)")
    options = parser.parse_args()
    results = []
    for _ in range(options.rounds):
        results.append(trial(options))
        if not options.json:
            each = results[-1]
            print(
                f"{each['acknowledged']} messages acknowledged before the cut, {each['lost_messages']} of them lost; "
                f"{each['sent']:,} rows sent, {each['lost']:,} lost, {each['doubled']} blocks doubled, "
                f"{each['condition']}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"durability": options.durability, "rounds": results, "machine": machine()}))
    return 1 if any(each["lost"] or each["lost_messages"] or each["doubled"] for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
