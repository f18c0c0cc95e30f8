"""A whole system of real processes, for tests: core, storage, monitor and producer, an Operator, and what they left
behind."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from processes import LIMIT, Process, free_port, until

from larpixdaq.arena import DEFAULT_DIRECTORY
from larpixdaq.operator import Operator


class System:
    """`start(source options)` brings it up; the processes are in `processes` by module, files in `data`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.env = env
        self.data = folder / "data"
        self.data.mkdir()
        self.core = f"tcp://127.0.0.1:{free_port()}"
        self.log = f"tcp://127.0.0.1:{free_port()}"
        self.processes: dict[str, Process] = {}
        self._stack = stack
        # A producer that is killed leaves its ring for a successor; what tests leave goes with its folder.
        shared = DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else folder
        self._rings = stack.enter_context(tempfile.TemporaryDirectory(prefix="larpixdaq-test-", dir=shared))

    def launch(self, module: str, *arguments: object) -> Process:
        process = self._stack.enter_context(
            Process(f"larpixdaq.{module}", *arguments, directory=self.folder / "out", env=self.env)
        )
        self.processes[module] = process
        return process

    def launch_core(self) -> None:
        self.launch("core", "--address", self.core, "--log-address", self.log, "--state-dir", self.folder / "state")

    def launch_log(self) -> None:
        self.launch("log", "--core", self.core, "--address", self.log, "--state-dir", self.folder / "state")

    def launch_storage(self, *more: object) -> None:
        self.launch("offline_storage", "--core", self.core, "-o", self.data, *more)

    def launch_producer(self, *source: object) -> None:
        ring = ("--ring", "64MiB", "--ring-dir", self._rings)
        self.launch("producer", "--core", self.core, "--state-dir", self.folder / "state", *ring, *source)

    def start(self, *source: object, kinds: tuple[str, ...] = ("storage", "run_data", "producer")) -> Operator:
        """Bring everything up with this source; the Operator is closed with the system."""
        self.launch_core()
        self.launch_storage()
        self.launch("run_data", "--core", self.core)
        self.launch_producer(*source)
        operator = self.operator()
        self.await_kinds(operator, *kinds)
        return operator

    def operator(self) -> Operator:
        """Closed with the system."""
        return self._stack.enter_context(Operator(self.core, timeout=LIMIT))

    def await_kinds(self, operator: Operator, *kinds: str) -> None:
        def there() -> bool:
            for module, process in self.processes.items():
                assert process.popen.poll() is None, f"{module} ended: {process.stderr}"
            return set(kinds) <= {c["kind"] for c in operator.components().result(LIMIT) if c["alive"]}

        until(there, f"components {kinds}")

    def status_of(self, operator: Operator, kind: str) -> dict[str, Any]:
        found = [c for c in operator.components().result(LIMIT) if c["kind"] == kind]
        assert found, f"no {kind} among the components"
        status: dict[str, Any] = found[0]["status"]
        return status

    def await_status(self, operator: Operator, kind: str, name: str, value: Any) -> None:
        until(lambda: self.status_of(operator, kind).get(name) == value, f"{name} of {kind} to be {value}")


@contextlib.contextmanager
def system(folder: Path, env: dict[str, str] | None = None) -> Iterator[System]:
    """`env`: what the processes find in their environment beside ours."""
    with contextlib.ExitStack() as stack:
        made = System(folder, stack, env)
        yield made
        # All are told at once; the stack then waits for each, and complains of those that do not end.
        for process in made.processes.values():
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.popen.terminate()


def rows_of(path: str | Path) -> np.ndarray:
    """All rows of a file, with plain h5py."""
    with h5py.File(path, "r") as file:
        rows: np.ndarray = file["packets"][:]
    return rows
