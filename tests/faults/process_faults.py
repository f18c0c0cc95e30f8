"""Rows of the fault table: what happens to the processes of larpix-daq, and to the people who steer them."""

from __future__ import annotations

import subprocess
import sys

from processes import until
from table import row
from trial import STEP, Trial

from larpixdaq.errors import ControlHeld
from larpixdaq.offline_storage import DEFAULT_NAME as STORAGE
from larpixdaq.producer import DEFAULT_NAME as PRODUCER
from larpixdaq.run_data import DEFAULT_NAME as MONITOR

#: Rows that must have come through, in part or file, for a fault to be over.
AGAIN = 10_000


def killed(trial: Trial, key: str, name: str) -> None:
    trial.strikes(name)
    trial.faults.kill(key)
    trial.faults.moment(2.0)
    trial.faults.restart(key)
    trial.back(name)


@row("storage killed (`kill -9`) and started again", "recovers and resumes: 0 lost, none twice")
def storage_killed(trial: Trial) -> None:
    killed(trial, "offline_storage", STORAGE)
    trial.flowing(AGAIN)


@row("the same at one-word messages", "0 lost, none twice", words="1", rate=100_000.0)
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
        trial.flowing(AGAIN)
        trial.faults.moment(1.0)


@row("storage stopped (SIGSTOP) for 10 s", "`lost` within 1.25 s, back by itself, 0 lost", becomes="lost")
def storage_stopped(trial: Trial) -> None:
    trial.strikes(STORAGE)
    trial.faults.stop_for("offline_storage", 10.0)
    trial.back(STORAGE)
    trial.flowing(AGAIN)


@row(
    "storage stopped for 10 s, another of its name started meanwhile, same directory",
    "never two writers, 0 lost, none twice",
    becomes="lost",
)
def storage_stopped_another_started(trial: Trial) -> None:
    _stopped_until_lost(trial)
    trial.faults.note("another storage of the name started, same directory")
    waiting = trial.line.restart("offline_storage")
    until(lambda: "waiting until it has ended" in waiting.stderr, "the second storage to wait for its turn", STEP)
    trial.faults.pause(8.0)
    _goes_on(trial)
    trial.expect(waiting.stop() == 0, f"the storage that waited did not end cleanly: {waiting.stderr}")
    trial.line.processes["offline_storage"] = trial.line.processes.pop("stopped")


@row(
    "the same, another directory",
    "never two writers, 0 lost; all is there, in two directories, of which no storage sees both",
    becomes="lost",
    conditions=("COMPLETE", "INCOMPLETE"),
    once=True,
)
def storage_stopped_another_directory(trial: Trial) -> None:
    _stopped_until_lost(trial)
    other = trial.folder / "other"
    other.mkdir()
    trial.directories[""].append(other)
    trial.faults.note("another storage of the name started, other directory")
    trial.line.launch_storage("-o", other)
    trial.faults.pause(8.0)
    _goes_on(trial)
    status = trial.line.processes["stopped"].wait()
    trial.expect(status == 1, "the one that was stopped did not leave the name to the other")


def _stopped_until_lost(trial: Trial) -> None:
    trial.strikes(STORAGE)
    trial.faults.stop("offline_storage")
    until(lambda: trial.watch.first("lost", STORAGE, trial.hit_at) is not None, "the storage to be lost", STEP)
    trial.line.processes["stopped"] = trial.line.processes["offline_storage"]


def _goes_on(trial: Trial) -> None:
    trial.faults.go_on("stopped")
    trial.back(STORAGE)
    trial.flowing(AGAIN)


@row(
    "one of two storages killed for good",
    "0 lost: the other has all; what was kept for it is released after `--forget-after`",
    storages=2,
    producer=("--forget-after", "5s"),
)
def storage_killed_for_good(trial: Trial) -> None:
    trial.strikes(STORAGE)
    trial.faults.kill("offline_storage")
    trial.faults.pause(5.0)
    del trial.directories[""]  # what it leaves is not to be judged


@row("monitor killed and started again", "0 lost, nobody else notices, its rates are exact again")
def monitor_killed(trial: Trial) -> None:
    killed(trial, "run_data", MONITOR)
    trial.exact_monitor = True


@row("monitor stopped for 10 s", "0 lost, nobody else notices, back by itself, its rates are exact", becomes="lost")
def monitor_stopped(trial: Trial) -> None:
    trial.strikes(MONITOR)
    trial.faults.stop_for("run_data", 10.0)
    trial.back(MONITOR)
    trial.exact_monitor = True


@row("monitor 100 times slower for 10 s", "0 lost, nobody else notices, its rates are exact")
def monitor_slow(trial: Trial) -> None:
    trial.strikes(MONITOR)
    trial.faults.slow_down("run_data", 100.0, 10.0)
    trial.back(MONITOR)
    trial.exact_monitor = True


@row("core killed and started again", "data flow on, same run and number, `end_run` works, 0 lost")
def core_killed(trial: Trial) -> None:
    number = trial.operator.run_info().result(STEP)["run"]
    trial.strikes()
    trial.faults.kill("core")
    trial.faults.moment(5.0)
    trial.faults.restart("core")
    for name in (STORAGE, PRODUCER, MONITOR):
        trial.back(name)
    status = trial.operator.status().result(STEP)
    state, run = status["state"], (status["run"] or {}).get("run")
    trial.expect((state, run) == ("RUN", number), f"the core came back in {state}, run {run}")
    trial.flowing(AGAIN)


@row("core stopped for 5 s", "nobody is condemned, 0 lost")
def core_stopped(trial: Trial) -> None:
    trial.strikes()
    trial.faults.stop_for("core", 5.0)
    trial.back(STORAGE)
    trial.flowing(AGAIN)


@row("log killed and started again", "the warnings of meanwhile arrive, 0 lost")
def log_killed(trial: Trial) -> None:
    trial.strikes("Log", MONITOR)
    trial.faults.kill("log")
    until(lambda: trial.watch.first("lost", "Log", trial.hit_at) is not None, "the log to be lost", STEP)
    # A monitor that is gone is something that the core warns of.
    trial.faults.kill("run_data")
    until(lambda: trial.watch.first("lost", MONITOR, trial.hit_at) is not None, "the monitor to be lost", STEP)
    trial.faults.restart("run_data")
    trial.back(MONITOR)
    trial.faults.restart("log")
    trial.back("Log")
    text = trial.line.folder / "state" / "log.txt"
    until(lambda: f"{MONITOR} is lost" in text.read_text(), "the warning of meanwhile to be in the log", STEP)


@row(
    "producer killed and started again",
    "what its ring held is delivered; the rest lies in a marked gap, `suspect`",
    conditions=("COMPLETE, suspect",),
    gap=True,
    lossless=False,
)
def producer_killed(trial: Trial) -> None:
    killed(trial, "producer", PRODUCER)
    trial.flowing(AGAIN)


@row("operator killed in a request", "nothing; control is free after 5 s, another can go on")
def operator_killed(trial: Trial) -> None:
    trial.operator.release_control().result(STEP)
    program = (
        "import sys; from larpixdaq.operator import Operator; o = Operator(sys.argv[1], name='doomed', timeout=20)\n"
    )
    program += (
        "o.comment('mine').result(20); o.run_routine('hello_world'); print('asked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, trial.line.core]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as doomed:
        assert doomed.stdout is not None
        trial.expect(doomed.stdout.readline() == b"asked\n", "the operator to be killed did not get that far")
        trial.faults.moment(0.02)
        trial.strikes()
        trial.faults.note("operator killed")
        doomed.kill()
    try:
        trial.operator.comment("too early").result(STEP)
        trial.expect(False, "control was free at once")
    except ControlHeld:
        pass

    def free() -> bool:
        try:
            trial.operator.comment("mine now").result(STEP)
        except ControlHeld:
            return False
        return True

    until(free, "control to be free", STEP)
    trial.faults.note("control is free")
