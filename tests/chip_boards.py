"""Helpers for tests with emulated chips: a board on a loopback address of its own, where larpix-control finds it, and
requests to its command port."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from boards import LIMIT, Emulator

WRITE, READ = 2, 3


class OwnAddress(Emulator):
    """`larpixdaq-emulator pacman` with the ports that larpix-control knows, on an address that nobody else uses."""

    def __init__(self, *args: str) -> None:
        for last in range(2, 40):
            self.address = f"127.0.79.{last}"
            try:
                super().__init__("--data-port", "5556", "--command-port", "5555", "--address", self.address, *args)
            except AssertionError:  # the ports are busy there
                self.close()
                continue
            return
        raise AssertionError("no loopback address with ports 5555 and 5556 free")


@contextmanager
def own_address(*args: str) -> Iterator[OwnAddress]:
    board = OwnAddress(*args)
    try:
        yield board
    finally:
        board.close()


def control(script: str, board: OwnAddress, folder: Path, *args: object, limit: float = 60) -> Any:
    """Run a script with larpix-control in a process of its own (PACMAN_IO forks); what it prints last, from JSON.

    It finds `io`, a PACMAN_IO, `controller`, a Controller with it, and `args`.
    """
    config = folder / "io.json"
    config.write_text(json.dumps({"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[1, board.address]]}))
    start = (
        "import json, sys\nfrom larpix import Controller\nfrom larpix.io import PACMAN_IO\nargs = sys.argv[3:]\n"
        "io = PACMAN_IO(config_filepath=sys.argv[1], raw_directory=sys.argv[2], timeout=10000)\n"
        "controller = Controller()\ncontroller.io = io\ntry:\n"
    )
    body = "".join(f"    {line}\n" for line in script.strip().splitlines())
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{start}{body}finally:\n    io.cleanup()\n    io.join()\n",
            str(config),
            str(folder),
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


#: What larpix-control does to power the first three tiles of a board of revision 5: it has no names for its registers.
POWER_UP = """
for tile in (0, 1, 2):
    io.set_reg(0x24010 + tile, 46000, io_group=1)
    io.set_reg(0x24020 + tile, 46000, io_group=1)
io.set_reg(0x14, 1, io_group=1)
io.enable_tile([0, 1, 2], io_group=1)
"""


def powered(tiles: int) -> list[tuple[int, int]]:
    """The registers, and their values, that power so many tiles of a board of revision 5."""
    dacs = [(register + tile, 46_000) for tile in range(tiles) for register in (0x24010, 0x24020)]
    return [*dacs, (0x14, 1), (0x10, (1 << tiles) - 1)]


def word(kind: int, chip_id: int, address: int, data: int = 0) -> int:
    """A v2 configuration word with odd parity."""
    bare = kind | chip_id << 2 | address << 10 | data << 18
    return bare | (bare.bit_count() & 1 ^ 1) << 63


def request(words: Sequence[tuple[int, int]]) -> bytes:
    """A message with (io_channel, word) for the chips."""
    body = b"".join(struct.pack("<cB6xQ", b"D", channel, packet) for channel, packet in words)
    return struct.pack("<cIxH", b"?", 0, len(words)) + body


def board_register(kind: bytes, address: int, value: int = 0) -> bytes:
    return struct.pack("<cIxH", b"?", 0, 1) + struct.pack("<c3xI4xI", kind, address, value)


def asked(socket: zmq.Socket[bytes], message: bytes) -> bytes:
    socket.send(message)
    assert socket.poll(LIMIT * 1000), "no reply on the command port"
    return socket.recv()


def data_words(messages: Sequence[bytes]) -> np.ndarray:
    """The D words of messages: dtype io_channel, receipt, packet."""
    kind = np.dtype([("type", "S1"), ("io_channel", "u1"), ("receipt", "<u4"), ("pad", "<u2"), ("packet", "<u8")])
    if not messages:
        return np.zeros(0, kind)
    words = np.frombuffer(b"".join(message[8:] for message in messages), kind)
    return words[words["type"] == b"D"]
