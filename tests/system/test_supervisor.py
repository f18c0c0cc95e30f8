"""The supervisor with processes that do nothing, and without a core: plans, kills and supervisors in any order."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from processes import LIMIT, until

from larpixdaq import supervisor
from larpixdaq.runtime.event_loop import Waker
from larpixdaq.runtime.launcher import (
    Entry,
    Plan,
    Wanted,
    end_process,
    is_running,
    read_running,
    start_time,
    write_plan,
)
from larpixdaq.supervisor import MAX_FAILURES, Supervisor


class FakeNode:
    """Stands for the connection to a core that answers, and with which every process registers."""

    state, run = "STOP", 0
    answers = True
    refusal = None
    registers = True

    def __init__(self, *arguments: Any, status: Any, **more: Any) -> None:
        self.status, self.session = status, "a session"
        self._waker = Waker()

    def fileno(self) -> int:
        return self._waker.fileno()

    @property
    def heard(self) -> float:
        return time.monotonic() if self.answers else 0.0

    @property
    def update(self) -> SimpleNamespace:
        known = {process.name: process.pid for process in self.status().processes if process.pid}
        return SimpleNamespace(registered=known if self.registers else {})

    def dispatch(self) -> None:
        pass

    def report(self, progress: int, queued: int) -> None:
        pass

    def close(self) -> None:
        self._waker.close()


@contextmanager
def without_core() -> Iterator[None]:
    children: list[subprocess.Popen[bytes]] = []  # they are this process's, whichever supervisor started them

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(popen(*arguments, **options))
        return children[-1]

    popen = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        patch.setattr(supervisor, "Node", FakeNode)
        patch.setattr(supervisor, "command", lambda module, *arguments: [module, *arguments])
        patch.setattr(supervisor, "DELAYS", (0.0, 0.0))
        patch.setattr(supervisor, "MANY", 10**9)
        for name, value in (("state", "STOP"), ("answers", True), ("registers", True)):
            patch.setattr(FakeNode, name, value)
        yield
    for child in children:
        child.wait(LIMIT)


def plan(wanted: dict[str, str], directory: Path, *, force: bool = False, module: str = "sleep") -> Plan:
    processes = [Wanted(module, name, [seconds]) for name, seconds in wanted.items()]
    return Plan(os.urandom(4).hex(), "tcp://127.0.0.1:1", str(directory), processes, force=force)


def entries(directory: Path) -> dict[str, Entry]:
    running = read_running(directory)
    return {} if running is None else {entry.name: entry for entry in running.processes}


def close(directory: Path) -> None:
    for entry in entries(directory).values():
        end_process(entry)


class Supervision(RuleBasedStateMachine):
    """`wanted` has the argument of each process that must run, `pids` what they were after the last step."""

    @initialize()
    def start(self) -> None:
        self._context = without_core()
        self._context.__enter__()
        self._folder = tempfile.TemporaryDirectory()
        self.directory = Path(self._folder.name)
        self.wanted: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        self.plan = plan({}, self.directory)
        write_plan(self.directory, self.plan)
        self.supervisor = Supervisor(self.directory, self.plan)

    def teardown(self) -> None:
        if hasattr(self, "supervisor"):
            self.supervisor.close()
            close(self.directory)
            self._folder.cleanup()
            self._context.__exit__(None, None, None)

    def _applied(self) -> None:
        """Take the plan over into what is wanted: in a run, only processes that do not run yet."""
        new = {process.name: process.arguments[0] for process in self.plan.processes}
        if FakeNode.state != "STOP" and not self.plan.force:
            new |= self.wanted
        self.pids = {name: pid for name, pid in self.pids.items() if new.get(name) == self.wanted[name]}
        self.wanted = new

    @rule(
        wanted=st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["1000", "2000"]), max_size=4),
        force=st.booleans(),
    )
    def change(self, wanted: dict[str, str], force: bool) -> None:
        self.plan = plan(wanted, self.directory, force=force)
        write_plan(self.directory, self.plan)
        self.supervisor.read_plan()
        self._applied()

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGTERM]), data=st.data())
    def kill(self, number: signal.Signals, data: st.DataObject) -> None:
        if self.pids:
            name = data.draw(st.sampled_from(sorted(self.pids)))
            pid = self.pids.pop(name)
            os.kill(pid, number)
            until(lambda: start_time(pid) is None, f"the end of {name}")

    @rule()
    def replace_supervisor(self) -> None:
        self.supervisor.close()
        self.supervisor = Supervisor(self.directory, self.plan)
        self._applied()

    @rule(state=st.sampled_from(["STOP", "RUN"]))
    def change_run_state(self, state: str) -> None:
        FakeNode.state = state

    @invariant()
    def what_runs_is_what_is_wanted(self) -> None:
        if not hasattr(self, "supervisor"):
            return

        def reached() -> bool:
            self.supervisor.turn(5)
            found = entries(self.directory)
            running = {name: entry.arguments[0] for name, entry in found.items() if entry.state == "running"}
            return running == self.wanted == {n: e.arguments[0] for n, e in found.items()} and all(
                is_running(entry) and entry.registered for entry in found.values()
            ) and self.pids.items() <= {name: entry.pid for name, entry in found.items()}.items()  # fmt: skip

        until(reached, f"{self.wanted} with {self.pids}, found {entries(self.directory)}")
        self.pids = {name: entry.pid for name, entry in entries(self.directory).items()}


Supervision.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestSupervision = Supervision.TestCase


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Function that returns a supervisor of a plan."""
    made: list[Supervisor] = []

    def start(wanted: dict[str, str], module: str = "sleep") -> Supervisor:
        new = plan(wanted, tmp_path, module=module)
        write_plan(tmp_path, new)
        made.append(Supervisor(tmp_path, new))
        return made[-1]

    with without_core():
        yield start
        made[-1].close()
        close(tmp_path)


def test_failed_starts_are_counted_only_with_a_core(started: Any, tmp_path: Path) -> None:
    FakeNode.registers = False
    FakeNode.answers = False
    of = started({"a": "1"}, module="false")
    until(lambda: of.turn(5) or entries(tmp_path)["a"].restarts > 2 * MAX_FAILURES, "many failed starts")
    assert entries(tmp_path)["a"].failures < MAX_FAILURES
    FakeNode.answers = True
    until(lambda: of.turn(5) or entries(tmp_path)["a"].state == "given up", "it to be given up")
    assert entries(tmp_path)["a"].last_exit == "ended with status 1"
    assert [(p.state, p.pid, p.last_line) for p in of.status().processes] == [("given up", None, "without a word")]


def test_a_program_that_cannot_be_started(started: Any, tmp_path: Path) -> None:
    FakeNode.registers = False
    of = started({"a": "1", "b": "1000"}, module="no such program")
    until(lambda: of.turn(5) or entries(tmp_path)["a"].state == "given up", "it to be given up")
    assert entries(tmp_path)["a"].last_line == "cannot be started: No such file or directory"


def test_a_process_that_does_not_end_is_killed(started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_LIMIT", 0.1)
    fifo = tmp_path / "waits"
    os.mkfifo(fifo)
    stubborn = f"trap '' TERM; echo up; read x < {fifo}"
    monkeypatch.setattr(supervisor, "command", lambda module, *arguments: ["sh", "-c", stubborn])
    of = started({"a": "1"})
    until(lambda: of.turn(5) or "up" in (tmp_path / "out" / "a.out").read_text(), "it to run")
    pid = entries(tmp_path)["a"].pid
    write_plan(tmp_path, plan({}, tmp_path))
    of.read_plan()
    until(lambda: of.turn(5) or not entries(tmp_path), "it to be gone")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_nothing_is_changed_while_the_run_state_is_unknown(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "CONTACT", 0.2)
    of = started({"a": "1000"})
    until(lambda: of.turn(5) or entries(tmp_path)["a"].registered, "it to run")
    FakeNode.answers = False
    write_plan(tmp_path, new := plan({"a": "2000", "b": "1000"}, tmp_path))
    of.read_plan()
    until(lambda: of.turn(5) or read_running(tmp_path).plan == new.id, "the plan to be in effect")
    assert "a: the core does not answer" in read_running(tmp_path).waiting
    assert {name: entry.arguments for name, entry in entries(tmp_path).items()} == {"a": ["1000"], "b": ["1000"]}
