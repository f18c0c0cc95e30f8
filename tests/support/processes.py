"""Child processes, threads, and waits with a limit, for tests."""

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from larpixdaq.runtime.launcher import command, free_port

__all__ = ["LIMIT", "Process", "free_port", "in_thread", "until", "wait_for_line"]

#: Maximum seconds of a wait. A wait that fails names the awaited condition.
LIMIT = 20.0


def until(condition: Callable[[], Any], what: str, limit: float = LIMIT, pause: float = 0.02) -> Any:
    """Wait until `condition()` is true. Returns its value.

    It is looked at every 5 ms at first, and later less often, up to every `pause` seconds, because each look may be a
    request to a process that has other work.
    """
    began = time.monotonic()
    turn = threading.Event()
    while (waited := time.monotonic() - began) < limit:
        found = condition()
        if found:
            return found
        turn.wait(min(pause, 0.005 + waited / 50))
    raise AssertionError(f"after {limit:g} s still waiting: {what}")


def wait_for_line(process: subprocess.Popen[bytes], seconds: float = LIMIT) -> str:
    """Return the next line of a child process. Its stdout must be a pipe with bufsize=0, so that select sees it."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            raise AssertionError(f"the child printed no line within {seconds:g} s")
    return process.stdout.readline().decode().strip()


class Process:
    """Runs `python -m MODULE ...` with output to files, and ends it when the context ends.

    Modules of larpixdaq are those of the installed package, in any working directory. `prefix` goes before the command,
    for example to run it in another network namespace.
    """

    def __init__(
        self,
        module: str,
        *args: object,
        directory: Path,
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.name = module
        start = [sys.executable, "-m", module, *map(str, args)]
        if module.startswith("larpixdaq."):
            start = command(module.removeprefix("larpixdaq."), *map(str, args))
        self._out = directory / f"{module}.{os.urandom(3).hex()}.out"
        with open(self._out, "wb") as out, open(self._out.with_suffix(".err"), "wb") as err:
            self.popen = subprocess.Popen(
                [*prefix, *start],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **(env or {})},
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.terminate()
            try:
                self.popen.wait(LIMIT)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"{self.name} did not end on SIGTERM: {self.stderr}") from None

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and wait. Returns the exit status."""
        self.popen.send_signal(how)
        return self.wait()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(LIMIT)

    def wait(self, limit: float = LIMIT) -> int:
        try:
            return self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {limit:g} s; stderr: {self.stderr}") from None

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._out.with_suffix(".err").read_text()


@contextmanager
def in_thread(loop: Callable[[], object], stop: Callable[[], object]) -> Iterator[None]:
    """Run `loop()` in a thread while the context lasts. An exception in the thread is raised at the end."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            loop()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(LIMIT)
        assert not thread.is_alive(), "the loop did not end"
        if failure:
            raise failure[0]
