"""Rows of the fault table: faults of the processes of larpix-daq, and of Operators."""

from __future__ import annotations

import subprocess
import sys

from processes import until
from table import row
from trial import STEP, Trial

from larpixdaq.errors import ControlHeld, StateError
from larpixdaq.offline_storage import DEFAULT_NAME as STORAGE
from larpixdaq.producer import DEFAULT_NAME as PRODUCER
from larpixdaq.run_data import DEFAULT_NAME as MONITOR

#: Rows that storage must store after a fault before the fault counts as over.
MORE_ROWS = 10_000


def killed(trial: Trial, key: str, name: str) -> None:
    trial.begin_fault(name)
    trial.faults.kill(key)
    trial.faults.random_pause(2.0)
    trial.faults.restart(key)
    trial.await_component(name)


@row("storage killed (`kill -9`) and started again", "recovers and resumes: 0 lost, none twice")
def storage_killed(trial: Trial) -> None:
    killed(trial, "offline_storage", STORAGE)
    trial.await_rows(MORE_ROWS)


@row("the same with one-word messages", "0 lost, none twice", words="1", rate=100_000.0)
def storage_killed_one_word(trial: Trial) -> None:
    storage_killed(trial)


@row(
    "storage killed three times, files rotated every second",
    "0 lost, none twice",
    storage=("--rotate", "1s"),
)
def storage_killed_rotating(trial: Trial) -> None:
    for _ in range(3):
        killed(trial, "offline_storage", STORAGE)
        trial.await_rows(MORE_ROWS)
        trial.faults.random_pause(1.0)


@row("storage stopped (SIGSTOP) for 10 s", "`lost` within 1.25 s, returns by itself, 0 lost", becomes="lost")
def storage_stopped(trial: Trial) -> None:
    trial.begin_fault(STORAGE)
    trial.faults.stop_for("offline_storage", 10.0)
    trial.await_component(STORAGE)
    trial.await_rows(MORE_ROWS)


@row(
    "storage stopped for 10 s, a second one of its name started meanwhile in the same directory",
    "never two writers, 0 lost, none twice",
    becomes="lost",
)
def storage_stopped_another_started(trial: Trial) -> None:
    _stopped_until_lost(trial)
    trial.faults.note("second storage of the name started, same directory")
    waiting = trial.line.restart("offline_storage")
    until(lambda: "waiting until it has ended" in waiting.stderr, "the second storage to wait for its turn", STEP)
    trial.faults.pause(8.0)
    _resume(trial)
    trial.expect(waiting.stop() == 0, f"the waiting storage did not end cleanly: {waiting.stderr}")
    trial.line.processes["offline_storage"] = trial.line.processes.pop("stopped")


@row(
    "the same, in another directory",
    "never two writers, 0 lost; the data are in two directories, and no storage sees both",
    becomes="lost",
    conditions=("COMPLETE", "INCOMPLETE"),
    once=True,
)
def storage_stopped_another_directory(trial: Trial) -> None:
    _stopped_until_lost(trial)
    other = trial.folder / "other"
    other.mkdir()
    trial.directories[""].append(other)
    trial.faults.note("second storage of the name started, other directory")
    trial.line.launch_storage("-o", other)
    trial.await_component(STORAGE)  # of two processes the first one to register has the name
    trial.faults.pause(8.0)
    _resume(trial)
    status = trial.line.processes["stopped"].wait()
    trial.expect(status == 1, "the stopped storage did not leave the name to the second one")


def _stopped_until_lost(trial: Trial) -> None:
    trial.begin_fault(STORAGE)
    trial.faults.stop("offline_storage")
    until(lambda: trial.watch.first("lost", STORAGE, trial.fault_time) is not None, "the storage to be lost", STEP)
    trial.line.processes["stopped"] = trial.line.processes["offline_storage"]


def _resume(trial: Trial) -> None:
    trial.faults.resume("stopped")
    trial.await_component(STORAGE)
    trial.await_rows(MORE_ROWS)


@row(
    "one of two storages killed and not started again",
    "0 lost: the other storage has all; blocks for the dead one are released after `--forget-after`",
    storages=2,
    producer=("--forget-after", "5s"),
)
def storage_killed_for_good(trial: Trial) -> None:
    trial.begin_fault(STORAGE)
    trial.faults.kill("offline_storage")
    trial.faults.pause(5.0)
    del trial.directories[""]  # the directory of the dead storage is not judged


@row("monitor killed and started again", "0 lost, no other component is affected, exact rates again")
def monitor_killed(trial: Trial) -> None:
    killed(trial, "run_data", MONITOR)
    trial.exact_monitor = True


@row(
    "monitor stopped for 10 s",
    "0 lost, no other component is affected, returns by itself, exact rates",
    becomes="lost",
)
def monitor_stopped(trial: Trial) -> None:
    trial.begin_fault(MONITOR)
    trial.faults.stop_for("run_data", 10.0)
    trial.await_component(MONITOR)
    trial.exact_monitor = True


@row("monitor 100 times slower for 10 s", "0 lost, no other component is affected, exact rates")
def monitor_slow(trial: Trial) -> None:
    trial.begin_fault(MONITOR)
    trial.faults.slow_down("run_data", 100.0, 10.0)
    trial.await_component(MONITOR)
    trial.exact_monitor = True


@row("core killed and started again", "data continue, same run and number, `end_run` works, 0 lost")
def core_killed(trial: Trial) -> None:
    number = trial.operator.run_info().result(STEP)["run"]
    trial.begin_fault()
    trial.faults.kill("core")
    trial.faults.random_pause(5.0)
    trial.faults.restart("core")
    for name in (STORAGE, PRODUCER, MONITOR):
        trial.await_component(name)
    status = trial.operator.status().result(STEP)
    state, run = status["state"], (status["run"] or {}).get("run")
    trial.expect((state, run) == ("RUN", number), f"the restarted core is in {state}, run {run}")
    trial.await_rows(MORE_ROWS)


@row("core stopped for 5 s", "no component is taken for lost, 0 lost")
def core_stopped(trial: Trial) -> None:
    trial.begin_fault()
    trial.faults.stop_for("core", 5.0)
    trial.await_component(STORAGE)
    trial.await_rows(MORE_ROWS)


@row("log killed and started again", "warnings from the time without log arrive, 0 lost")
def log_killed(trial: Trial) -> None:
    trial.begin_fault("Log", MONITOR)
    trial.faults.kill("log")
    until(lambda: trial.watch.first("lost", "Log", trial.fault_time) is not None, "the log to be lost", STEP)
    # Without log, the core warns of the lost monitor.
    trial.faults.kill("run_data")
    until(lambda: trial.watch.first("lost", MONITOR, trial.fault_time) is not None, "the monitor to be lost", STEP)
    trial.faults.restart("run_data")
    trial.await_component(MONITOR)
    trial.faults.restart("log")
    trial.await_component("Log")
    text = trial.line.folder / "state" / "log.txt"
    until(lambda: f"{MONITOR} is lost" in text.read_text(), "the core's warning to be in the log", STEP)


@row(
    "producer killed and started again",
    "the rows in its ring are delivered; the loss is inside a marked gap, `suspect`",
    conditions=("COMPLETE, suspect",),
    gap=True,
    lossless=False,
)
def producer_killed(trial: Trial) -> None:
    killed(trial, "producer", PRODUCER)
    trial.await_rows(MORE_ROWS)


@row("operator killed in a request", "no effect on the run; control is free for another Operator after 5 s")
def operator_killed(trial: Trial) -> None:
    trial.operator.release_control().result(STEP)
    program = (
        "import sys; from larpixdaq.operator import Operator; o = Operator(sys.argv[1], name='doomed', timeout=20)\n"
    )
    program += "o.take_control().result(20); o.run_routine('hello_world'); print('asked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, trial.line.core]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as doomed:
        assert doomed.stdout is not None
        trial.expect(doomed.stdout.readline() == b"asked\n", "the operator did not reach its request")
        trial.faults.random_pause(0.02)
        trial.begin_fault()
        trial.faults.note("operator killed")
        doomed.kill()
    try:
        trial.operator.begin_run().result(STEP)
        trial.expect(False, "control was free at once")
    except ControlHeld:
        pass

    def free() -> bool:
        try:
            trial.operator.begin_run().result(STEP)
        except ControlHeld:
            return False
        except StateError:  # after it has got control
            return True
        return False

    until(free, "control to be free", STEP)
    trial.faults.note("control is free")
