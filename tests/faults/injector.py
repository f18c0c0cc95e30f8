"""Kills, stops and slows processes of a System, repeatably by seed, and notes the time of each action."""

from __future__ import annotations

import random
import signal
import threading
import time

from processes import Process
from system import System


class Faults:
    """Faults of the processes in System.processes. `longest`: maximum seconds of a pause(), for short tests."""

    def __init__(self, line: System, seed: int, longest: float = float("inf")) -> None:
        self.line = line
        self.random = random.Random(seed)
        self.longest = longest
        self.notes: list[tuple[float, str]] = []  # (monotonic time, text)
        self._never = threading.Event()

    def note(self, text: str) -> None:
        self.notes.append((time.monotonic(), text))

    def pause(self, seconds: float) -> None:
        """Wait for the duration of a fault, or without any fault."""
        self._never.wait(min(seconds, self.longest))

    def random_pause(self, seconds: float) -> None:
        """Wait for a random time of at most `seconds`."""
        self._never.wait(self.random.uniform(0.0, min(seconds, self.longest)))

    def kill(self, key: str) -> None:
        self.note(f"{key} killed")
        self.line.processes[key].kill()

    def restart(self, key: str) -> Process:
        """Start an ended process again, with the same arguments."""
        process = self.line.processes[key]
        if process.popen.poll() is None:
            raise AssertionError(f"{key} still runs: kill it first")
        self.note(f"{key} started again")
        return self.line.restart(key)

    def stop(self, key: str) -> None:
        """Stop a process with SIGSTOP; its sockets and files stay open."""
        self.note(f"{key} stopped")
        self.line.processes[key].popen.send_signal(signal.SIGSTOP)

    def resume(self, key: str) -> None:
        self.note(f"{key} continues")
        self.line.processes[key].popen.send_signal(signal.SIGCONT)

    def stop_for(self, key: str, seconds: float) -> None:
        self.stop(key)
        try:
            self.pause(seconds)
        finally:
            self.resume(key)

    def slow_down(self, key: str, factor: float, seconds: float) -> None:
        """Give a process only 1/`factor` of the time, in turns of 2 ms."""
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
