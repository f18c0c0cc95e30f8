"""The fault injection works as described, because otherwise the trials would prove nothing."""

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from disk import Disk
from network import FOLDER, Network, missing_rights
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
    with closing(Disk(tmp_path, tmp_path / "data")) as faulty:
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
    with closing(Disk(tmp_path, tmp_path / "elsewhere")) as faulty:
        faulty.fail()
        writer = Writer(tmp_path, faulty)
        try:
            assert writer.do(1000) == "1000"
            assert faulty.operations == 0
        finally:
            writer.process.communicate(timeout=20)


@pytest.fixture
def net() -> Iterator[Network]:
    if reason := missing_rights():
        pytest.skip(reason)
    with closing(Network("one", "two", "three", seed=5)) as made:
        yield made


def test_the_network_passes_loses_delays_and_cuts(net: Network) -> None:
    with net.inside("one"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((net.address("one"), 0))
        receiver.settimeout(20)
        with net.inside("two"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(receiver.getsockname())

            def send(n: int) -> None:
                for i in range(n):
                    sender.send(i.to_bytes(4, "little"))

            send(10)
            assert [int.from_bytes(receiver.recv(4), "little") for _ in range(10)] == list(range(10))
            net.fault("one", "two", drop=0.5)
            send(100)
            until(lambda: sum(net.fault("one", "two", drop=0.5).values()) >= 110, "all packets to have been looked at")
            counts = net.heal("one", "two")
            assert 20 < counts["lost"] < 80
            for _ in range(counts["passed"] - 10):
                receiver.recv(4)
            net.fault("one", "two", cut=True)
            send(5)
            until(lambda: net.fault("one", "two", cut=True)["lost"] == counts["lost"] + 5, "the packets to be lost")
            net.fault("one", "two", delay=0.2)
            began = time.monotonic()
            send(1)
            assert receiver.recv(4) == bytes(4)
            assert time.monotonic() - began >= 0.2
            net.fault("one", "three", cut=True)  # between other hosts
            net.heal("one", "two")
            send(1)
            assert receiver.recv(4) == bytes(4)


def test_the_network_is_removed_even_if_its_maker_is_killed() -> None:
    if reason := missing_rights():
        pytest.skip(reason)
    program = "import network, signal; n = network.Network('a', 'b'); print(' '.join(n._names), flush=True)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"{program}; signal.pause()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as maker:
        assert maker.stdout is not None
        names = maker.stdout.readline().split()
        assert len(names) == 2
        assert all((FOLDER / name).exists() for name in names)
        maker.kill()
    until(lambda: not any((FOLDER / name).exists() for name in names), "the namespaces to be removed")
