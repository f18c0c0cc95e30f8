"""What can happen to the processes of a System, on purpose and repeatably; each action is noted with its time."""

from __future__ import annotations

import random
import signal
import threading
import time

from processes import Process
from system import System


class Faults:
    """`longest` bounds every pause(), for tests that have little time. Keys are those of System.processes."""

    def __init__(self, line: System, seed: int, longest: float = float("inf")) -> None:
        self.line = line
        self.random = random.Random(seed)
        self.longest = longest
        self.notes: list[tuple[float, str]] = []  # (monotonic, what)
        self._never = threading.Event()

    def note(self, text: str) -> None:
        self.notes.append((time.monotonic(), text))

    def pause(self, seconds: float) -> None:
        """The time that a fault lasts, or that the system is left alone."""
        self._never.wait(min(seconds, self.longest))

    def moment(self, seconds: float) -> None:
        """A random time of at most so long."""
        self._never.wait(self.random.uniform(0.0, min(seconds, self.longest)))

    def kill(self, key: str) -> None:
        self.note(f"{key} killed")
        self.line.processes[key].kill()

    def restart(self, key: str) -> Process:
        """Start a process anew that has ended, with the arguments that it had."""
        process = self.line.processes[key]
        if process.popen.poll() is None:
            raise AssertionError(f"{key} still runs: kill it first")
        self.note(f"{key} started again")
        return self.line.restart(key)

    def stop(self, key: str) -> None:
        """SIGSTOP: it stands still, with all its sockets and files."""
        self.note(f"{key} stopped")
        self.line.processes[key].popen.send_signal(signal.SIGSTOP)

    def go_on(self, key: str) -> None:
        self.note(f"{key} goes on")
        self.line.processes[key].popen.send_signal(signal.SIGCONT)

    def stop_for(self, key: str, seconds: float) -> None:
        self.stop(key)
        try:
            self.pause(seconds)
        finally:
            self.go_on(key)

    def slow_down(self, key: str, factor: float, seconds: float) -> None:
        """It gets one part in `factor` of the time, in turns of 2 ms."""
        popen = self.line.processes[key].popen
        self.note(f"{key} is {factor:g} times slower")
        end = time.monotonic() + min(seconds, self.longest)
        try:
            while time.monotonic() < end:
                popen.send_signal(signal.SIGSTOP)
                self._never.wait(0.002 * (factor - 1))
                popen.send_signal(signal.SIGCONT)
                self._never.wait(0.002)
        finally:
            popen.send_signal(signal.SIGCONT)
        self.note(f"{key} is fast again")
