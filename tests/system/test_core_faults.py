"""Core, Operator, log and components that die or stand still during a run, and the effects on the run."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fake_core import Actor, all_running, monitor, producer, storage
from processes import LIMIT, Process, free_port, until

from larpixdaq.errors import ComponentError, ControlHeld, NoCore, RequestError
from larpixdaq.operator import Operator, Request

STEPS = {"prepare": "prepare_run", "begin": "begin_run", "end": "end_run"}


class Plant:
    """Core and log as processes. The components are actors in the test's process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.log_port = free_port()

    def core(self) -> Process:
        addresses = ("--address", self.address, "--log-address", f"tcp://127.0.0.1:{self.log_port}")
        return Process("larpixdaq.core", *addresses, "--state-dir", self.folder / "state", directory=self.folder)

    def log(self) -> Process:
        where = ("--core", self.address, "--address", f"tcp://127.0.0.1:{self.log_port}")
        return Process("larpixdaq.log", *where, "-o", self.folder / "log.txt", directory=self.folder)

    def logged(self, text: str) -> list[float]:
        """Return the times (unix s) of log records with this text."""
        path = self.folder / "log.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            datetime.fromisoformat(line.split()[0].replace("Z", "+00:00")).timestamp() for line in lines if text in line
        ]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    return Plant(tmp_path)


@contextmanager
def team(plant: Plant) -> Iterator[tuple[Actor, Actor, Actor, Operator]]:
    actors = producer(plant.address), storage(plant.address), monitor(plant.address)
    with all_running(*actors) as (board, disk, online), Operator(plant.address, timeout=LIMIT) as operator:
        yield board, disk, online, operator


def await_actors(operator: Operator, *actors: Actor) -> None:
    """Wait until a restarted core knows all actors."""
    names = {actor.node.name for actor in actors}

    def known() -> bool:
        try:
            return names <= {c["name"] for c in operator.components().result(LIMIT) if c["alive"]}
        except (ComponentError, NoCore):  # requested while the core restarts
            return False

    until(known, "all components to be back")


def retry(ask: Callable[[], Request]) -> Any:
    """Repeat a request until it is not refused, and return its result. Other steps, or components, may delay it."""

    def done() -> Any:
        with suppress(RequestError):
            return ask().result(LIMIT)
        return None

    return until(done, "the step to be possible", 2 * LIMIT)


def kinds(operator: Operator) -> set[str]:
    return {c["kind"] for c in operator.components().result(LIMIT) if c["alive"]}


@pytest.mark.parametrize("state", ["READY", "RUN"])
def test_a_restarted_core_continues_the_run(plant: Plant, state: str) -> None:
    with plant.core() as first, team(plant) as (board, disk, online, operator):
        operator.prepare_run().result(LIMIT)
        if state == "RUN":
            operator.begin_run().result(LIMIT)
        until(lambda: board.node.state == state, state)
        first.kill()
        with plant.core():
            await_actors(operator, board, disk, online)
            until(lambda: operator.state().result(LIMIT) == state, f"{state} again")
            assert operator.status().result(LIMIT)["run"]["run"] == 1
            if state == "READY":
                operator.begin_run().result(LIMIT)
            ended = operator.end_run().result(LIMIT)
            assert (ended["run"], ended["condition"], ended["reasons"]) == (1, "COMPLETE", [])
            assert operator.prepare_run().result(LIMIT)["run"] == 2


@pytest.mark.parametrize("step", ["prepare", "begin", "end"])
@pytest.mark.parametrize("slow", ["board", "disk"])
def test_a_core_killed_during_a_step(plant: Plant, step: str, slow: str) -> None:
    """The slow component answers only to the next core, which does not know the request."""
    with plant.core() as first, team(plant) as (board, disk, online, operator):
        actor = {"board": board, "disk": disk}[slow]
        answer = actor.replies[STEPS[step]]
        actor.replies[STEPS[step]] = None
        for name in ("prepare", "begin", "end"):
            request = getattr(operator, STEPS[name])()
            if name == step:
                break
            request.result(LIMIT)
        (call,) = until(lambda: actor.open, f"{step} at the {slow}")
        first.kill()
        with plant.core():
            await_actors(operator, board, disk, online)
            actor.replies[STEPS[step]] = answer
            call.result(answer)
            if step == "prepare":
                # nothing of the run is left, and its number is not used again
                until(lambda: all(each.node._joined_run is None for each in (board, disk)), "all to be out of run 1")
                assert operator.run_info(1).result(LIMIT)["condition"] == "CANCELLED"
                assert retry(operator.prepare_run)["run"] == 2
                return
            if step == "begin":
                until(lambda: operator.state().result(LIMIT) == "RUN", "RUN")
                assert retry(operator.end_run)["condition"] == "COMPLETE"
            else:
                until(lambda: operator.state().result(LIMIT) == "STOP", "STOP", 2 * LIMIT)
            info = operator.run_info().result(LIMIT)
            assert (info["run"], info["phase"], info["stored"]) == (1, "ENDED", 100)
            assert retry(operator.prepare_run)["run"] == 2


def test_a_core_that_stands_still_loses_no_component(plant: Plant) -> None:
    with plant.core() as core, plant.log(), team(plant) as (board, disk, online, operator):
        until(lambda: "log" in kinds(operator), "the log")
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        until(lambda: board.node.state == "RUN", "RUN")
        sessions = [actor.node.session for actor in (board, disk, online)]
        began = time.monotonic()
        core.popen.send_signal(signal.SIGSTOP)
        until(lambda: time.monotonic() - began > 5, "5 s in which the core stands still")
        core.popen.send_signal(signal.SIGCONT)
        with Operator(plant.address, name="other", timeout=LIMIT) as other:
            with pytest.raises(ControlHeld):  # the first Operator was connected all the time
                other.end_run().result(LIMIT)
            until(lambda: operator._connection.link.silence() < 1, "the core to be heard again")
            seen = other.components().result(LIMIT)
            assert [component["alive"] for component in seen] == [True] * 4
        assert operator.end_run().result(LIMIT)["condition"] == "COMPLETE"
        assert [actor.node.session for actor in (board, disk, online)] == sessions
        until(lambda: plant.logged(": end_run"), "the log to be up to date")
        assert plant.logged("is lost") == plant.logged("is stuck") == []


STAND_IN = """
import sys, zmq
from larpixdaq.runtime.event_loop import run_main
from larpixdaq.control.node import Node

def main():
    node = Node("silent", "storage", sys.argv[1], {}, info={})
    try:
        node.connect()
        poller = zmq.Poller()
        poller.register(node, zmq.POLLIN)
        while True:
            poller.poll(100)
            node.dispatch()
            node.report(0, 0)
    finally:
        node.close()

sys.exit(run_main(main))
"""


def test_stopped_components_are_lost_and_components_without_progress_are_stuck(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    env = {"PYTHONPATH": str(tmp_path)}
    with plant.core(), plant.log(), Operator(plant.address, timeout=LIMIT) as operator:
        with Process("stand_in", plant.address, directory=tmp_path, env=env) as silent:

            def alive() -> list[bool]:
                return [c["alive"] for c in operator.components().result(LIMIT) if c["name"] == "silent"]

            until(lambda: alive() == [True], "registration")
            stopped = time.time()
            silent.popen.send_signal(signal.SIGSTOP)
            (lost,) = until(lambda: plant.logged("silent is lost"), "the loss")
            assert 0.7 < lost - stopped < LIMIT  # 1 s after its last heartbeat; see the figures in docs/reliability.md
            silent.popen.send_signal(signal.SIGCONT)
            until(lambda: alive() == [True], "its return")
            silent.kill()
        with producer(plant.address).running() as board:
            until(lambda: board.node.session, "registration")
            queued = time.time()
            board.queued = 3
            (stuck,) = until(lambda: plant.logged("LArPix board is stuck"), "stuck")
            assert 0.7 < stuck - queued < LIMIT
            board.progress += 1
            until(lambda: plant.logged("LArPix board is no longer stuck"), "moving")
            until(lambda: len(plant.logged("LArPix board is stuck")) == 2, "stuck once more")


OPERATOR = """
import sys
from larpixdaq.operator import Operator

operator = Operator(sys.argv[1], name="doomed")
request = operator.prepare_run()
print(next(request).kind, flush=True)
request.result()
"""


def test_an_operator_killed_during_a_request(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "doomed.py").write_text(OPERATOR)
    env = {"PYTHONPATH": str(tmp_path)}
    with plant.core(), team(plant) as (board, disk, _, operator):
        answer, disk.replies["prepare_run"] = disk.replies["prepare_run"], None
        with Process("doomed", plant.address, directory=tmp_path, env=env) as doomed:
            (call,) = until(lambda: disk.open, "prepare_run at the disk")
            doomed.kill()
        with pytest.raises(ControlHeld, match="doomed"):
            operator.begin_run().result(LIMIT)
        disk.replies["prepare_run"] = answer
        call.result(answer)
        until(lambda: operator.state().result(LIMIT) == "READY", "READY, although no Operator waits for it")
        until(lambda: operator.status().result(LIMIT)["control"] is None, "control to be free")
        assert operator.begin_run().result(LIMIT)["run"] == 1
        assert operator.end_run().result(LIMIT)["condition"] == "COMPLETE"
        assert board.actions() == ["prepare_run", "begin_run", "end_run"]


def test_a_restarted_log_gets_the_kept_records(plant: Plant) -> None:
    with plant.core(), Operator(plant.address, timeout=LIMIT) as operator, plant.log() as log:
        with producer(plant.address).running():
            until(lambda: plant.logged("LArPix board is registered"), "the log to work")
            log.kill()
            until(lambda: "log" not in kinds(operator), "the log to be lost")
        with producer(plant.address).running() as board:  # while no log runs
            board.replies["run_routine"] = OSError("the cable is out")
            with pytest.raises(RequestError, match="the cable is out"):
                operator.run_routine("x").result(LIMIT)
            with plant.log():
                until(lambda: plant.logged("the cable is out"), "the record that the producer kept")
                until(lambda: plant.logged("Log is lost"), "the record that the core kept")
    for line in (plant.folder / "log.txt").read_text().splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z [A-Z]+ [^:]+: ", line)


def test_a_storage_lost_for_good_while_another_has_a_copy(plant: Plant) -> None:
    actors = producer(plant.address), storage(plant.address, "first"), storage(plant.address, "second")
    with plant.core(), all_running(*actors), Operator(plant.address, timeout=LIMIT) as operator:
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        actors[2].node._link._transmit = lambda message: True  # sends nothing any more, as if it were killed
        until(lambda: operator.status().result(LIMIT)["run"]["missing"] == ["second"], "the loss to be seen")
        ended = operator.end_run().result(LIMIT)
        assert (ended["condition"], ended["files"]) == ("COMPLETE", ["/data/first.h5"])
        assert ended["reasons"] == ["second is lost", "second: has not reported"]
        assert operator.run_info().result(LIMIT)["storages"] == ["first", "second"]
