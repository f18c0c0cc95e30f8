"""A complete system of real processes for tests: core, storage, monitor and producer, with an Operator."""

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

from larpixdaq.buffer.ring_file import DEFAULT_DIRECTORY
from larpixdaq.operator import Operator


class System:
    """Starts processes and ends them. start(source options) starts all; the next start() replaces only the producer.

    `processes` has the processes by key, which is the module's name by default. `prefix` and `env`, by key, are put
    before the command and into the environment of processes that are launched later. The files are in `data`. Core and
    log listen at `host`. With `insecure`, processes and Operators that are started later use no keys.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.insecure = False
        self.data = folder / "data"
        self.data.mkdir()
        self.core = f"tcp://{host}:{free_port()}"
        self.log = f"tcp://{host}:{free_port()}"
        self.processes: dict[str, Process] = {}
        self.started: list[Process] = []  # all processes, also ended ones
        self.prefix: dict[str, list[str]] = {}
        self.env: dict[str, dict[str, str]] = {}
        self._commands: dict[str, tuple[str, tuple[object, ...]]] = {}
        self._operator: Operator | None = None
        self._stack = stack
        # A killed producer leaves its ring for a successor. The rings of tests are removed with their folder.
        shared = DEFAULT_DIRECTORY if DEFAULT_DIRECTORY.is_dir() else folder
        self.rings = stack.enter_context(tempfile.TemporaryDirectory(prefix="larpixdaq-test-", dir=shared))

    def launch(self, module: str, *arguments: object, key: str = "") -> Process:
        """Start a process. An older process of the same key continues, without key."""
        key = key or module
        self._commands[key] = module, arguments
        process = Process(
            f"larpixdaq.{module}",
            *arguments,
            *(["--insecure"] if self.insecure else []),
            directory=self.folder / "out",
            env=self.env.get(key),
            prefix=self.prefix.get(key, ()),
        )
        self.started.append(process)
        self.processes[key] = self._stack.enter_context(process)
        return process

    def launch_refused(self, module: str, *arguments: object) -> Process:
        """Start a process that refuses to work, and wait for its end. It does not become one of the system's."""
        process = self.launch(module, *arguments, key="refused")
        process.wait()
        return self.processes.pop("refused")

    def restart(self, key: str) -> Process:
        """Start the last process of this key again, with the same arguments and ports."""
        module, arguments = self._commands[key]
        return self.launch(module, *arguments, key=key)

    def launch_core(self) -> Process:
        directory = ("--state-dir", self.folder / "state")
        return self.launch("core", "--address", self.core, "--log-address", self.log, *directory)

    def launch_log(self) -> Process:
        return self.launch("log", "--core", self.core, "--address", self.log, "--state-dir", self.folder / "state")

    def launch_storage(self, *more: object, key: str = "offline_storage") -> Process:
        return self.launch("offline_storage", "--core", self.core, "-o", self.data, *more, key=key)

    def launch_monitor(self, *more: object) -> Process:
        return self.launch("run_data", "--core", self.core, *more)

    def launch_producer(self, *source: object) -> Process:
        ring = ("--ring", "64MiB", "--ring-dir", self.rings)
        return self.launch("producer", "--core", self.core, "--state-dir", self.folder / "state", *ring, *source)

    def start(self, *source: object) -> Operator:
        """Start core, storage and monitor if they do not run yet, and a producer with this source.

        A previous producer and its run are ended first. Returns the Operator, which is closed with the system.
        """
        if self._operator is not None:
            self._end_producer(self._operator)
        launches = {"core": self.launch_core, "offline_storage": self.launch_storage, "run_data": self.launch_monitor}
        for module, launch in launches.items():
            if module not in self.processes:
                launch()
        self.launch_producer(*source)
        if self._operator is None:
            self._operator = self.operator()
        self.await_kinds(self._operator, "storage", "run_data", "producer")
        return self._operator

    def _end_producer(self, operator: Operator) -> None:
        if operator.state().result(LIMIT) != "STOP":
            operator.abort_run().result(LIMIT)
        self.processes.pop("producer").stop()

        def gone() -> bool:
            return not any(c["alive"] for c in operator.components().result(LIMIT) if c["kind"] == "producer")

        until(gone, "the previous producer to be gone")

    def operator(self) -> Operator:
        """Return a new Operator, which is closed with the system."""
        return self._stack.enter_context(Operator(self.core, timeout=LIMIT, insecure=self.insecure))

    def await_kinds(self, operator: Operator, *kinds: str) -> None:
        def there() -> bool:
            for module, process in self.processes.items():
                assert process.popen.poll() is None, f"{module} ended: {process.stderr}"
            return set(kinds) <= {c["kind"] for c in operator.components().result(LIMIT) if c["alive"]}

        until(there, f"components {kinds}")

    def status_of(self, operator: Operator, kind: str) -> dict[str, Any]:
        components = [c for c in operator.components().result(LIMIT) if c["kind"] == kind]
        assert components, f"no {kind} among the components"
        status: dict[str, Any] = components[0]["status"]
        return status

    def await_status(self, operator: Operator, kind: str, name: str, value: Any) -> None:
        until(lambda: self.status_of(operator, kind).get(name) == value, f"{name} of {kind} to be {value}")

    def terminate_all(self) -> None:
        """Send SIGTERM to all processes. Their contexts then wait for them, and fail if a process does not end."""
        for process in self.started:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)
                process.popen.terminate()


@contextlib.contextmanager
def system(folder: Path, host: str = "127.0.0.1") -> Iterator[System]:
    with contextlib.ExitStack() as stack:
        line = System(folder, stack, host)
        yield line
        line.terminate_all()


def rows_of(path: str | Path) -> np.ndarray:
    """Return all rows of a file, read with plain h5py."""
    with h5py.File(path, "r") as file:
        rows: np.ndarray = file["packets"][:]
    return rows
