"""Boards in threads that misbehave: random messages, and chips that answer twice, wrongly or never."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq
from processes import in_thread

from larpixdaq.hardware.register_map import words
from larpixdaq.schema import Asic

#: Seconds between two random messages.
PAUSE = 0.005


@contextmanager
def nonsense(dice: random.Random) -> Iterator[int]:
    """Send random messages while the context lasts; half of them begin like those of a PACMAN. Yields the data port."""
    end = threading.Event()
    with zmq.Context() as context, context.socket(zmq.PUB) as board:
        board.linger = 0
        port = board.bind_to_random_port("tcp://127.0.0.1")

        def send() -> None:
            while not end.wait(PAUSE):
                message = dice.randbytes(dice.randrange(400))
                if dice.random() < 0.5:  # the header of a data message, before words of random types
                    message = b"D" + dice.randbytes(5) + len(message).to_bytes(2, "little") + message
                board.send(message)

        with in_thread(send, end.set):
            yield port


#: (io_channel, chip_id, address, value) -> values of the answers; above 255: value - 256 with wrong parity.
Answers = Callable[[int, int, int, int], list[int]]


class AnsweringBoard:
    """A PACMAN on which every chip id of every io_channel can be written and read. `sent` counts words for chips."""

    def __init__(self, answers: Answers, *, reply: Callable[[bytes], bytes] | None = None) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.command = self.context.socket(zmq.REP)
        self.data = self.context.socket(zmq.PUB)
        self.command_port = self.command.bind_to_random_port("tcp://127.0.0.1")
        self.data_port = self.data.bind_to_random_port("tcp://127.0.0.1")
        self.registers: dict[tuple[int, int, int], int] = {}
        self.sent = 0
        self._answers = answers
        self._reply = reply or (lambda reply: reply)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self.command.poll(20):
                continue
            message = self.command.recv()
            out = b"".join(self._chips(message[at : at + 16]) for at in range(8, len(message), 16))
            if out:
                self.data.send(b"D" + bytes(5) + struct.pack("<H", len(out) // 16) + out)
            self.command.send(self._reply(b"!" + message[1:]))

    def _chips(self, word: bytes) -> bytes:
        if word[:1] != b"D":
            return b""
        self.sent += 1
        io_channel, packet = word[1], int.from_bytes(word[8:], "little")
        kind, chip, address = packet & 3, packet >> 2 & 255, packet >> 10 & 255
        key = (io_channel, chip, address)
        if kind == 2:
            self.registers[key] = packet >> 18 & 255
        if kind != 3:
            return b""
        answers = []
        for value in self._answers(io_channel, chip, address, self.registers.get(key, 0)):
            answer = int(words(Asic.V2, 3, [chip], [address], [value & 255])[0]) ^ (1 << 63 if value > 255 else 0)
            answers.append(struct.pack("<cB6xQ", b"D", io_channel, answer))
        return b"".join(answers)
