"""A detector of one configuration file, started with `larpixdaq up` and ended with `larpixdaq down`."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import LIMIT, Process, free_port, until

from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY
from larpixdaq.runtime.launcher import Entry, end_process, read_running


class Detector:
    """The folder of a detector with its configuration file `path`. Core and log listen at free ports of `address`.

    `ring_dir`: for the producers' rings, removed at the end, because a killed producer leaves its ring.
    """

    def __init__(self, folder: Path, ring_dir: str, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.ring_dir = ring_dir
        self.path = folder / "detector.toml"
        self.state, self.data = folder / "state", folder / "data"
        self.data.mkdir()
        self.core, self.log = (f"tcp://{address}:{free_port()}" for _ in range(2))
        self.head = (
            f'[detector]\nstate-dir = "state"\noutput-dir = "data"\n[core]\naddress = "{self.core}"\n'
            f'[log]\naddress = "{self.log}"\n'
        )

    def producer(self, name: str, source: str, ring: str = "16MiB") -> str:
        """Return the table of a producer. `source`: its key for a source, such as `fake = 100`."""
        return f"[producers.{json.dumps(name)}]\n{source}\nring = '{ring}'\nring-dir = {json.dumps(self.ring_dir)}\n"

    def write(self, *tables: str) -> None:
        self.path.write_text(self.head + "\n".join(tables))

    def command(self, *arguments: object, prefix: Sequence[str] = (), env: dict[str, str] | None = None) -> Process:
        return Process("larpixdaq.cli", *arguments, directory=self.folder / "output", prefix=prefix, env=env)

    def run(self, *arguments: object, **how: Any) -> tuple[int, str]:
        """Run a command of larpixdaq. Returns its exit status, and what it has written to stdout and stderr."""
        with self.command(*arguments, **how) as process:
            return process.wait(3 * LIMIT), process.stdout + process.stderr

    def up(self, *more: object, **how: Any) -> tuple[int, str]:
        return self.run("up", self.path, *more, **how)

    def entries(self) -> dict[str, Entry]:
        """Return the processes by name, as the supervisor has written them."""
        running = read_running(self.state)
        return {} if running is None else {entry.name: entry for entry in running.processes}

    def pids(self) -> dict[str, int]:
        return {name: entry.pid for name, entry in self.entries().items()}

    def supervisor(self) -> Entry:
        running = read_running(self.state)
        assert running is not None
        assert running.supervisor is not None
        return running.supervisor

    def kill(self, name: str) -> int:
        """Kill a process. Returns its id."""
        pid = self.entries()[name].pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def await_back(self, name: str, killed: int, limit: float = LIMIT) -> Entry:
        """Wait until a process that was killed runs and is registered again."""

        def back() -> Entry | None:
            entry = self.entries().get(name)
            return entry if entry is not None and entry.registered and entry.pid not in (0, killed) else None

        entry: Entry = until(back, f"{name} to be back", limit)
        return entry

    def close(self) -> None:
        """End the supervisor, and then all processes, whatever state they are in."""
        for state in (self.state, *self.folder.glob("state-*")):
            running = read_running(state)
            if running is not None and running.supervisor is not None:
                end_process(running.supervisor)
                running = read_running(state)
            for entry in running.processes if running is not None else ():
                end_process(entry)


@contextmanager
def detector(folder: Path, address: str = "127.0.0.1") -> Iterator[Detector]:
    shared = DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else folder
    with tempfile.TemporaryDirectory(prefix="larpixdaq-test-", dir=shared) as rings:
        made = Detector(folder, rings, address)
        try:
            yield made
        finally:
            made.close()
