"""Runs trials in separate processes, some at a time. Each has an Outcome, even if its process dies.

`python trial_processes.py ROW SEED FOLDER KEEP SETUP` runs one trial and prints its Outcome as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import environment_faults  # noqa: F401  (its functions are rows of the table)
import process_faults  # noqa: F401
from network import missing_rights
from table import ROWS, run_trial, timing_failures
from trial import Outcome, Setup, keep

__all__ = ["ROWS", "Outcome", "obstacle", "timing_failures", "trials"]

#: Maximum seconds of a trial. A longer one is killed, with all processes that it started.
LIMIT = 400.0


def obstacle(row: str) -> str:
    """Return why this user cannot run trials of a row; empty if it can."""
    return missing_rights() if ROWS[row].network else ""


class Trials:
    """Runs `jobs` trials at a time. The folders of failed trials are moved to `kept`."""

    def __init__(self, setup: dict[str, Any], kept: Path, jobs: int = 1) -> None:
        self._setup = setup
        self._kept = kept
        self._pool = ThreadPoolExecutor(jobs)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        # pytest changes this process's environment between its tests. A child that is just started in another thread
        # would read it at that moment ("Bad address").
        self._environment = dict(os.environ)

    def submit(self, row: str, seed: int) -> Future[Outcome]:
        return self._pool.submit(self._run, row, seed)

    def close(self) -> None:
        """Cancel waiting trials and kill running ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._running:
                _end(process)
        self._pool.shutdown()

    def _run(self, row: str, seed: int) -> Outcome:
        with tempfile.TemporaryDirectory(prefix=f"larpixdaq-trial-{row}-", ignore_cleanup_errors=True) as folder:
            place = Path(folder) / "trial"
            command = [sys.executable, str(Path(__file__)), row, str(seed), str(place), str(self._kept)]
            process = subprocess.Popen(
                [*command, json.dumps(self._setup)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=self._environment,
            )
            with self._lock:
                self._running.add(process)
            try:
                text, errors = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                _end(process)
                text, errors = process.communicate()
            finally:
                with self._lock:
                    self._running.discard(process)
            with contextlib.suppress(IndexError, ValueError):
                return Outcome(**json.loads(text.splitlines()[-1]))
            failure = f"the trial ended with status {process.returncode}: {errors.strip()[-2000:]}"
            kept = keep(place, self._kept, f"{row}-{seed}") if place.exists() else ""
            return Outcome(row, seed, 0.0, failures=[failure], kept=kept)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all processes that it started, which are one session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def trials(setup: dict[str, Any], kept: Path, jobs: int = 1) -> Iterator[Trials]:
    made = Trials(setup, kept, jobs)
    try:
        yield made
    finally:
        made.close()


def main(row: str, seed: str, folder: str, kept: str, setup: str) -> None:
    place = Path(folder)
    place.mkdir()
    outcome = run_trial(ROWS[row], Setup(**json.loads(setup)), int(seed), place)
    if not outcome.ok:
        outcome.kept = keep(place, Path(kept), f"{row}-{seed}")
    else:
        shutil.rmtree(place)
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(*sys.argv[1:])
