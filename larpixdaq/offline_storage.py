"""Offline storage: the stream's blocks into LArPix+HDF5 files. `larpixdaq-offline-storage -o /data`."""

import sys

if __spec__ is None:  # run by its path: its folder would shadow the standard library's `operator`
    sys.path[0:1] = []

import argparse
import os
import time
from math import ceil
from pathlib import Path

import zmq

from larpixdaq import config
from larpixdaq.errors import FileError
from larpixdaq.files.names import highest_run
from larpixdaq.node import Node
from larpixdaq.storing import Storing
from larpixdaq.stream import Consumer

DEFAULT_NAME = "Offline storage"
#: Frames taken in one turn of the loop.
TURN = 64
#: Seconds that the loop waits at most.
IDLE = 0.25


class Storage:
    """The process around Storing: node, stream, loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        directory = _usable(options.output_dir)
        name: str = options.name
        self.storing = Storing(directory, name, "" if name == DEFAULT_NAME else name)
        self.node = Node(
            name,
            "storage",
            options.core,
            {
                "prepare_run": self.storing.prepare_run,
                "begin_run": self.storing.begin_run,
                "end_run": self.storing.end_run,
                "cancel_run": self.storing.cancel_run,
            },
            info={
                "directory": str(directory.resolve()),
                "highest_run": highest_run(directory),
                "free_bytes": self.storing.free(),
            },
            status=self.storing.status,
        )
        self.consumer: Consumer | None = None

    def run(self, signals: config.Signals) -> None:
        """Store and acknowledge until a signal comes."""
        self.node.connect()
        self.storing.resume()  # after connect(), so that what is wrong with a file reaches the log
        self.consumer = Consumer(self.node.name, self.node.session, "all", positions=self.storing.where)
        self.storing.stream = self.consumer
        poller = zmq.Poller()
        for descriptor in (signals.fileno(), self.node.fileno(), self.consumer.fileno()):
            poller.register(descriptor, zmq.POLLIN)
        frames, changes = 0, -1
        while not signals.stop:
            poller.poll(ceil(self._timeout() * 1000))
            self.node.dispatch()
            if self.node.changes != changes:
                changes = self.node.changes
                self.consumer.session = self.node.session
                self.consumer.connect(self.node.producers)
            for _ in range(TURN):
                received = self.consumer.next()
                if received is None:
                    break
                frames += 1
                self.storing.receive(*received)
            self.storing.work()
            self.node.report(frames, self.consumer.queued)

    def _timeout(self) -> float:
        assert self.consumer is not None
        if self.consumer.queued:
            return 0.0
        due = self.storing.due()
        return IDLE if due is None else min(IDLE, max(0.0, due - time.monotonic()))

    def close(self) -> None:
        self.storing.close()
        if self.consumer is not None:
            self.consumer.close()
        self.node.close()


def _usable(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileError(f"--output-dir {directory}: no such directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise FileError(f"--output-dir {directory}: not writable")
    return directory.absolute()  # its files are named to people and programs that may stand elsewhere


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="larpixdaq-offline-storage", description="Launch the data consumer to save LArPix data to disk"
    )
    config.add_component_arguments(parser, DEFAULT_NAME)
    parser.add_argument(
        "-o", "--output-dir", type=Path, default=Path("."), metavar="DIR",
        help="directory for the files (default: the current one)",
    )  # fmt: skip
    options = parser.parse_args(argv)

    def work() -> None:
        storage = Storage(options)
        try:
            with config.Signals() as signals:
                storage.run(signals)
        finally:
            storage.close()

    return config.run_main(work)


if __name__ == "__main__":
    sys.exit(main())
