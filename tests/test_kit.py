"""The fault-injection kit does what it says: otherwise the trials that stand on it would prove nothing."""

import errno
import subprocess
import sys
from pathlib import Path

from disk import Disk, disk
from processes import until

WRITER = """
import os, sys
import h5py
path, other = sys.argv[1:]
fd = os.open(path, os.O_CREAT | os.O_RDWR)
for line in sys.stdin:
    try:
        if line.strip() == "h5":
            with h5py.File(path + ".h5", "w") as file:
                file["x"] = list(range(10_000))
        elif line.strip() == "free":
            print(os.statvfs(path).f_bavail * os.statvfs(path).f_frsize, flush=True)
            continue
        elif line.strip() == "other":
            with open(other, "wb") as file:
                file.write(bytes(1000))
        else:
            size = os.write(fd, bytes(int(line)))
            os.fsync(fd)
            print(size, flush=True)
            continue
        print("done", flush=True)
    except (OSError, RuntimeError) as error:  # h5py raises both
        print(getattr(error, "errno", None) or "h5", flush=True)
"""


class Writer:
    def __init__(self, folder: Path, disk: Disk) -> None:
        command = [sys.executable, "-c", WRITER, str(folder / "data" / "file"), str(folder / "other")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=disk.env
        )

    def ask(self, what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, what: object) -> str:
        self.ask(what)
        return self.answer()


def test_the_disk_hangs_fails_is_slow_and_full(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with disk(tmp_path, tmp_path / "data") as faulty:
        writer = Writer(tmp_path, faulty)
        try:
            assert writer.do(1000) == "1000"
            faulty.fail(errno.EIO, times=1)
            assert writer.do(1000) == str(errno.EIO)
            assert writer.do(1000) == "1000"
            faulty.full(room=300)
            assert writer.do("free") == "0"  # less than a block
            assert writer.do(1000) == "300"
            assert writer.do(1000) == str(errno.ENOSPC)
            assert writer.do("h5") != "done"
            assert writer.do("other") == "done"
            faulty.heal()
            assert writer.do("h5") == "done"
            before = faulty.affected
            faulty.hang()
            writer.ask(1000)
            until(lambda: faulty.affected > before, "the write to hang")
            faulty.heal()
            assert writer.answer() == "1000"
            faulty.slow(1_000_000)
            assert writer.do(10_000) == "10000"
            assert faulty.affected > before + 1
        finally:
            writer.process.communicate(timeout=20)


def test_the_disk_of_another_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    with disk(tmp_path, tmp_path / "elsewhere") as faulty:
        faulty.fail()
        writer = Writer(tmp_path, faulty)
        try:
            assert writer.do(1000) == "1000"
            assert faulty.operations == 0
        finally:
            writer.process.communicate(timeout=20)
