"""Emulated boards in separate processes, and the messages of a PACMAN's command port.

Tests with larpix-control need a board on its own loopback address, because larpix-control knows only the default ports.
"""

from __future__ import annotations

import json
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from processes import LIMIT, until, wait_for_line

from larpixdaq.runtime.launcher import command


class Emulator:
    """A `larpixdaq-emulator pacman` process. `ready`: ports of each io_group; finish() returns the board's counts."""

    def __init__(self, *args: str, prefix: Sequence[str] = ()) -> None:
        ports = () if "--data-port" in args else ("--data-port", "0", "--command-port", "0")
        start = [*prefix, *command("emulators", "pacman", *ports, *args)]
        self.process = subprocess.Popen(
            start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        first = self.line()
        self.ready: dict[str, dict[str, Any]] = first["ready"]
        self.planted: dict[str, list[str]] = first.get("planted", {})
        self.summary: dict[str, Any] = {}

    @property
    def addresses(self) -> list[str]:
        """Values for --pacman: IO_GROUP=HOST:DATA_PORT:COMMAND_PORT of each board."""
        return [f"{group}=127.0.0.1:{port['data']}:{port['command']}" for group, port in self.ready.items()]

    def line(self) -> dict[str, Any]:
        line = wait_for_line(self.process)
        assert line, "the emulator ended without its line"
        return json.loads(line)

    def ended(self) -> bool:
        """Return, without waiting, whether the board has printed its counts, which are then in `summary`."""
        assert self.process.stdout is not None
        if not self.summary and select.select([self.process.stdout], [], [], 0)[0]:
            self.summary = self.line()
        return bool(self.summary)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def finish(self) -> dict[str, Any]:
        sent = self.line()
        self.process.wait(LIMIT)
        assert self.process.stderr is not None
        assert self.process.returncode == 0, self.process.stderr.read().decode()
        return sent

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=LIMIT)


class SerialEmulator(Emulator):
    """A `larpixdaq-emulator serial` process. `device` is the path of its pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            command("emulators", "serial", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self.summary = {}
        self.device = self.line()["ready"]["1"]["device"]


def emulator(*args: str) -> closing[Emulator]:
    return closing(Emulator(*args))


class Sockets:
    """Makes sockets and closes all of them, because a socket closed by the garbage collector raises a warning."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self._kept: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        self._kept.append(self.context.socket(kind))
        return self._kept[-1]

    def close(self) -> None:
        for socket in self._kept:
            socket.close(linger=0)
        self.context.term()


def context() -> closing[Sockets]:
    return closing(Sockets())


def subscriber(ctx: Sockets, port: int, topic: bytes = b"") -> zmq.Socket[bytes]:
    socket = ctx.socket(zmq.SUB)
    socket.rcvhwm = 10_000
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


WRITE, READ = 2, 3


def drain(socket: zmq.Socket[bytes], done: Callable[[list[bytes]], bool]) -> list[bytes]:
    """Receive messages until `done(messages)`."""
    got: list[bytes] = []

    def turn() -> bool:
        for _ in range(1000):
            if not socket.poll(20):
                break
            got.append(socket.recv())
        return done(got)

    until(turn, "the emulator's messages")
    return got


class OwnAddress(Emulator):
    """A `larpixdaq-emulator pacman` process with the default ports, on a loopback address of its own."""

    def __init__(self, *args: str) -> None:
        for last in range(2, 40):
            self.address = f"127.0.79.{last}"
            try:
                super().__init__("--data-port", "5556", "--command-port", "5555", "--address", self.address, *args)
            except AssertionError:  # the ports of this address are in use
                self.close()
                continue
            return
        raise AssertionError("no loopback address with ports 5555 and 5556 free")


def own_address(*args: str) -> closing[OwnAddress]:
    return closing(OwnAddress(*args))


def run_script(script: str, board: OwnAddress, folder: Path, *args: object) -> Any:
    """Run a larpix-control script in a separate process, because PACMAN_IO forks. Returns its last line, from JSON.

    The script uses `io` (a PACMAN_IO), `controller` (a Controller with this io) and `args`.
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
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


#: Powers the first three tiles of a board of revision 5. larpix-control has no names for these registers.
POWER_UP = """
for tile in (0, 1, 2):
    io.set_reg(0x24010 + tile, 46000, io_group=1)
    io.set_reg(0x24020 + tile, 46000, io_group=1)
io.set_reg(0x14, 1, io_group=1)
io.enable_tile([0, 1, 2], io_group=1)
"""


def power_registers(tiles: int) -> list[tuple[int, int]]:
    """Return (register, value) pairs that power the first `tiles` tiles of a board of revision 5."""
    dacs = [(register + tile, 46_000) for tile in range(tiles) for register in (0x24010, 0x24020)]
    return [*dacs, (0x14, 1), (0x10, (1 << tiles) - 1)]


def word(kind: int, chip_id: int, address: int, data: int = 0) -> int:
    """Return a v2 configuration word with odd parity."""
    bare = kind | chip_id << 2 | address << 10 | data << 18
    return bare | (bare.bit_count() & 1 ^ 1) << 63


def request(words: Sequence[tuple[int, int]]) -> bytes:
    """Return a message with (io_channel, word) pairs for the chips."""
    body = b"".join(struct.pack("<cB6xQ", b"D", channel, packet) for channel, packet in words)
    return struct.pack("<cIxH", b"?", 0, len(words)) + body


def board_register(kind: bytes, address: int, value: int = 0) -> bytes:
    return struct.pack("<cIxH", b"?", 0, 1) + struct.pack("<c3xI4xI", kind, address, value)


def reply_to(socket: zmq.Socket[bytes], message: bytes) -> bytes:
    socket.send(message)
    assert socket.poll(LIMIT * 1000), "no reply on the command port"
    return socket.recv()


def data_words(messages: Sequence[bytes]) -> np.ndarray:
    """Return the data words of messages. Columns: type, io_channel, receipt, packet."""
    kind = np.dtype([("type", "S1"), ("io_channel", "u1"), ("receipt", "<u4"), ("pad", "<u2"), ("packet", "<u8")])
    if not messages:
        return np.zeros(0, kind)
    words = np.frombuffer(b"".join(message[8:] for message in messages), kind)
    return words[words["type"] == b"D"]
