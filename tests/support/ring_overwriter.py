"""A program for test_ring_reader.py: it overwrites a small ring again and again, without waiting for acknowledgements.

Stdout: the ring's path, then the number of each block; after 64 of them it waits for a line on stdin.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np

from larpixdaq._native.ring_buffer import SMALLEST
from larpixdaq.buffer.ring_file import RingFile
from larpixdaq.schema import PACKETS_2_4

NAME = "LArPix board"
EPOCH = 5
ROWS = 3000


def publish(ring_file: RingFile, index: int) -> None:
    """Block `index`, whose rows say so, once there is room."""
    ring = ring_file.ring
    while (room := ring.rows(0, ROWS)) is None:
        ring.free_to(ring.tail + 1)
    rows = np.frombuffer(room, PACKETS_2_4)
    rows["timestamp"] = index
    ring.publish(len(rows))
    ring.close_block(0, 0)


def main() -> None:
    folder = Path(sys.argv[1])
    with contextlib.closing(RingFile.make(folder, folder, NAME, EPOCH, SMALLEST)) as ring_file:
        ring_file.ring.begin(1, 2, PACKETS_2_4.itemsize, [])
        publish(ring_file, 0)
        print(ring_file.path, flush=True)
        index = 0
        while True:
            index += 1
            publish(ring_file, index)
            print(index, flush=True)
            if index % 64 == 0 and not sys.stdin.readline():
                return


if __name__ == "__main__":
    main()
