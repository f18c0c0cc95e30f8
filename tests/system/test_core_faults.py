"""Core, Operator, log and components that die or stand still in the middle of a run: who notices, and what it costs."""

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
    """A core and a log as processes of their own; the components are actors in this one."""

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
        """When (unix s) records with this text were made."""
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


def back(operator: Operator, *actors: Actor) -> None:
    """Wait until a core that has come back knows all of them."""
    names = {actor.node.name for actor in actors}

    def known() -> bool:
        try:
            return names <= {one["name"] for one in operator.components().result(LIMIT) if one["alive"]}
        except (ComponentError, NoCore):  # asked in the very moment in which the core comes back
            return False

    until(known, "all components to be back")


def once_possible(ask: Callable[[], Request]) -> Any:
    """What comes of a step that is refused at first: another goes on, or not all have said yet that they are free."""

    def done() -> Any:
        with suppress(RequestError):
            return ask().result(LIMIT)
        return None

    return until(done, "the step to be possible", 2 * LIMIT)


def kinds(operator: Operator) -> set[str]:
    return {one["kind"] for one in operator.components().result(LIMIT) if one["alive"]}


@pytest.mark.parametrize("state", ["READY", "RUN"])
def test_a_core_that_is_killed_picks_the_run_up(plant: Plant, state: str) -> None:
    with plant.core() as first, team(plant) as (board, disk, online, operator):
        operator.prepare_run().result(LIMIT)
        if state == "RUN":
            operator.begin_run().result(LIMIT)
        until(lambda: board.node.state == state, state)
        first.kill()
        with plant.core():
            back(operator, board, disk, online)
            until(lambda: operator.state().result(LIMIT) == state, f"{state} again")
            assert operator.status().result(LIMIT)["run"]["run"] == 1
            if state == "READY":
                operator.begin_run().result(LIMIT)
            ended = operator.end_run().result(LIMIT)
            assert (ended["run"], ended["condition"], ended["reasons"]) == (1, "COMPLETE", [])
            assert operator.prepare_run().result(LIMIT)["run"] == 2


@pytest.mark.parametrize("step", ["prepare", "begin", "end"])
@pytest.mark.parametrize("slow", ["board", "disk"])
def test_a_core_that_is_killed_in_the_middle_of_a_step(plant: Plant, step: str, slow: str) -> None:
    """The slow one answers only when the next core is there, which does not know the question."""
    with plant.core() as first, team(plant) as (board, disk, online, operator):
        slow_one = {"board": board, "disk": disk}[slow]
        answer = slow_one.replies[STEPS[step]]
        slow_one.replies[STEPS[step]] = None
        for before in ("prepare", "begin", "end"):
            request = getattr(operator, STEPS[before])()
            if before == step:
                break
            request.result(LIMIT)
        (call,) = until(lambda: slow_one.open, f"{step} at the {slow}")
        first.kill()
        with plant.core():
            back(operator, board, disk, online)
            slow_one.replies[STEPS[step]] = answer
            call.result(answer)
            if step == "prepare":
                # Nothing of it is left, wherever it had got to, and its number is not used again.
                until(lambda: all(actor.node._joined_run is None for actor in (board, disk)), "all to be out of run 1")
                assert operator.run_info(1).result(LIMIT)["condition"] == "CANCELLED"
                assert once_possible(operator.prepare_run)["run"] == 2
                return
            if step == "begin":
                until(lambda: operator.state().result(LIMIT) == "RUN", "RUN")
                assert once_possible(operator.end_run)["condition"] == "COMPLETE"
            else:
                until(lambda: operator.state().result(LIMIT) == "STOP", "STOP", 2 * LIMIT)
            info = operator.run_info().result(LIMIT)
            assert (info["run"], info["phase"], info["stored"]) == (1, "ENDED", 100)
            assert once_possible(operator.prepare_run)["run"] == 2


def test_a_core_that_stands_still_condemns_nobody(plant: Plant) -> None:
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
            with pytest.raises(ControlHeld):  # the first one was here all the time
                other.end_run().result(LIMIT)
            until(lambda: operator._connection.link.silence() < 1, "the core to be heard again")
            seen = other.components().result(LIMIT)
            assert [one["alive"] for one in seen] == [True] * 4
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


def test_who_is_stopped_is_lost_and_who_does_not_move_is_stuck(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    env = {"PYTHONPATH": str(tmp_path)}
    with plant.core(), plant.log(), Operator(plant.address, timeout=LIMIT) as operator:
        with Process("stand_in", plant.address, directory=tmp_path, env=env) as silent:

            def alive() -> list[bool]:
                return [one["alive"] for one in operator.components().result(LIMIT) if one["name"] == "silent"]

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


def test_an_operator_that_is_killed_in_the_middle_of_a_request(plant: Plant, tmp_path: Path) -> None:
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
        until(lambda: operator.state().result(LIMIT) == "READY", "READY, though nobody waits for it any more")
        until(lambda: operator.status().result(LIMIT)["control"] is None, "control to be free")
        assert operator.begin_run().result(LIMIT)["run"] == 1
        assert operator.end_run().result(LIMIT)["condition"] == "COMPLETE"
        assert board.actions() == ["prepare_run", "begin_run", "end_run"]


def test_a_log_that_is_killed_gets_what_was_kept(plant: Plant) -> None:
    with plant.core(), Operator(plant.address, timeout=LIMIT) as operator, plant.log() as log:
        with producer(plant.address).running():
            until(lambda: plant.logged("LArPix board is registered"), "the log to work")
            log.kill()
            until(lambda: "log" not in kinds(operator), "the log to be lost")
        with producer(plant.address).running() as board:  # while nobody listens
            board.replies["run_routine"] = OSError("the cable is out")
            with pytest.raises(RequestError, match="the cable is out"):
                operator.run_routine("x").result(LIMIT)
            with plant.log():
                until(lambda: plant.logged("the cable is out"), "what was kept")
                until(lambda: plant.logged("Log is lost"), "what the core kept")
    for line in (plant.folder / "log.txt").read_text().splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z [A-Z]+ [^:]+: ", line)


def test_copies_one_of_which_is_gone_for_good(plant: Plant) -> None:
    actors = producer(plant.address), storage(plant.address, "first"), storage(plant.address, "second")
    with plant.core(), all_running(*actors), Operator(plant.address, timeout=LIMIT) as operator:
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        actors[2].node._link._transmit = lambda message: True  # says nothing any more, as one that was killed
        until(lambda: operator.status().result(LIMIT)["run"]["missing"] == ["second"], "the loss to be seen")
        ended = operator.end_run().result(LIMIT)
        assert (ended["condition"], ended["files"]) == ("COMPLETE", ["/data/first.h5"])
        assert ended["reasons"] == ["second is lost", "second: has not reported"]
        assert operator.run_info().result(LIMIT)["storages"] == ["first", "second"]
