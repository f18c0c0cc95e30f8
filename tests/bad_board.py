"""A board that sends nonsense: messages of any length and content, some of which begin as a PACMAN's would."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

#: Seconds between two messages, about.
PAUSE = 0.005


@contextmanager
def nonsense(dice: random.Random) -> Iterator[int]:
    """Sends while the context lasts; gives the port."""
    end = threading.Event()
    with zmq.Context() as context, context.socket(zmq.PUB) as board:
        board.linger = 0
        port = board.bind_to_random_port("tcp://127.0.0.1")

        def send() -> None:
            while not end.wait(PAUSE):
                message = dice.randbytes(dice.randrange(400))
                if dice.random() < 0.5:  # a data message's header, of now or nonsense, and words of unknown types
                    message = b"D" + dice.randbytes(5) + len(message).to_bytes(2, "little") + message
                board.send(message)

        thread = threading.Thread(target=send, name="nonsense")
        thread.start()
        try:
            yield port
        finally:
            end.set()
            thread.join()
