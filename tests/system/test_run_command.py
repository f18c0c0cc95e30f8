"""`larpixdaq run` with real processes: sequences, signals, a killed core, runs that others end; its progress line."""

import io
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_core import producer_status, storage_status
from processes import LIMIT, Process, until
from system import System, system

from larpixdaq.cli.run_sequence import ProgressLine, RunNumbers
from larpixdaq.errors import LarpixDaqError
from larpixdaq.hdf5.run_report import file_info
from larpixdaq.hdf5.verify import verify


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def larpixdaq_run(line: System, *arguments: object) -> Process:
    return Process("larpixdaq.cli", "run", "--core", line.core, *arguments, directory=line.folder / "out")


def state(operator: Any) -> str:
    try:
        found: str = operator.state().result(LIMIT)
    except LarpixDaqError:
        return ""
    return found


def await_rows(line: System, operator: Any) -> None:
    until(lambda: line.status_of(operator, "storage").get("rows", 0) > 100, "rows in the storage")


def test_a_sequence_of_runs_and_its_worth(line: System) -> None:
    operator = line.start("--fake", "5000", "--io-groups", "2")
    operator.shifter = "Ada"
    more = ("--comment", "night [1] Ω", "--count", "2", "--every", "4s", "--kind", "cosmics")
    with larpixdaq_run(line, "--duration", "2s", *more) as command:
        assert command.wait(2 * LIMIT) == 0, command.stderr
    out = command.stdout.splitlines()
    assert re.match("run 1: COMPLETE, [2-9] s, ", out[0])
    assert out[1].startswith("  file: ")
    assert out[2].startswith("run 2: COMPLETE, ")
    assert out[-1] == "2 of 2 runs are COMPLETE and as long as wanted"
    shown = command.stderr.splitlines()
    assert re.search("run 1: 0:0[0-2] of 0:02, ", shown[0])
    for words in (" packets/s, ", " packets, 0 rows lost, file ", " free"):
        assert words in shown[0].replace("disk full in", " free")
    assert all("NO CORE" not in text and "MISSING" not in text for text in shown)
    begun = [operator.run_info(number).result(LIMIT)["begun"] for number in (1, 2)]
    assert 2.5 < begun[1] - begun[0] < 10
    info = operator.run_info(2).result(LIMIT)
    assert (info["comment"], info["kind"], info["shifter"]) == ("night [1] Ω", "cosmics", "Ada")
    assert info["stopped_ns"] - info["begun_ns"] >= 2e9
    (file,) = info["files"]
    assert verify(Path(file)).findings == []
    assert file_info(Path(file))["texts"]["shifter"] == "Ada"
    # As JSON, and with the comment of somebody else in the middle.
    with larpixdaq_run(line, "--duration", "2s", "--json", "--by", "Bob") as command:
        until(lambda: state(operator) == "RUN", "the third run")
        assert operator.comment("beam is on").result(LIMIT) == {"run": 3}
        assert command.wait(2 * LIMIT) == 0, command.stderr
    third = json.loads(command.stdout)
    assert (third["run"], third["condition"], third["shifter"]) == (3, "COMPLETE", "Bob")
    found = file_info(Path(third["files"][0]))
    assert [(one["text"], one["by"]) for one in found["comments"]] == [("beam is on", "Ada")]
    sidecar = Path(third["files"][0]).with_suffix(".json")
    until(lambda: sidecar.exists(), "the sidecar")
    operator.comment("the beam was off", run=3).result(LIMIT)

    def texts() -> list[str]:
        return [comment["text"] for comment in json.loads(sidecar.read_text())["comments"]]

    until(lambda: texts() == ["beam is on", "the beam was off"], "the comment in the sidecar")
    with Process(
        "larpixdaq.cli", "runs", "3", "--state-dir", line.folder / "state", directory=line.folder
    ) as shown_run:
        assert shown_run.wait() == 0
    assert "COMPLETE\n" in shown_run.stdout
    assert "totals       all: messages " in shown_run.stdout or "totals       all: " in shown_run.stdout
    assert "the beam was off" in shown_run.stdout


def test_a_signal_ends_the_run_properly_and_the_sequence(line: System) -> None:
    operator = line.start("--fake", "5000")
    with larpixdaq_run(line, "--duration", "1h", "--count", "5") as command:
        until(lambda: state(operator) == "RUN", "the run")
        await_rows(line, operator)
        for _ in range(2):  # as `timeout` sends a signal: twice at once
            command.popen.send_signal(signal.SIGINT)
        assert command.wait(2 * LIMIT) == 130
    assert command.stdout.startswith("run 1: COMPLETE, ")
    assert "0 of 5 runs are COMPLETE and as long as wanted" in command.stdout
    assert "run 1 was ended before its 60 min" in command.stderr
    assert "interrupted by SIGINT" in command.stderr
    assert "Traceback" not in command.stderr
    assert (state(operator), operator.run_info().result(LIMIT)["run"]) == ("STOP", 1)


def test_a_second_signal_aborts_the_run(line: System) -> None:
    operator = line.start("--fake", "5000")
    with larpixdaq_run(line, "--duration", "1h") as command:
        until(lambda: state(operator) == "RUN", "the run")
        await_rows(line, operator)
        line.processes["offline_storage"].popen.send_signal(signal.SIGSTOP)  # so that end_run waits for it
        command.popen.send_signal(signal.SIGINT)
        until(lambda: operator.status().result(LIMIT)["busy"] == "end_run", "end_run")

        def aborts() -> Any:
            """Look first, so that no signal comes when the command has done its work and Python ends."""
            if operator.status().result(LIMIT)["busy"] != "end_run":
                return True
            command.popen.send_signal(signal.SIGINT)
            return False

        until(aborts, "abort_run")
        line.processes["offline_storage"].popen.send_signal(signal.SIGCONT)
        assert command.wait(3 * LIMIT) == 130
    assert command.stdout.startswith("run 1: ABORTED, ")
    assert "nobody looked" not in command.stderr


def test_a_core_that_is_killed_in_the_middle(line: System) -> None:
    operator = line.start("--fake", "5000")
    with larpixdaq_run(line, "--duration", "6s") as command:
        until(lambda: state(operator) == "RUN", "the run")
        await_rows(line, operator)
        line.processes.pop("core").kill()
        until(lambda: "NO CORE is heard" in command.stderr or command.popen.poll() is not None, "a core that is missed")
        line.launch_core()
        assert command.wait(3 * LIMIT) == 0, command.stderr + command.stdout
    assert re.match(r"run 1: COMPLETE, ([6-9]|[1-5]\d) s, ", command.stdout)
    assert "nobody looked" not in command.stderr


def test_a_run_that_somebody_else_ends(line: System) -> None:
    operator = line.start("--fake", "5000")
    with larpixdaq_run(line, "--duration", "1h") as command:
        until(lambda: state(operator) == "RUN", "the run")
        operator.take_control().result(LIMIT)
        operator.end_run().result(LIMIT)
        assert command.wait(2 * LIMIT) == 1
    assert command.stdout.startswith("run 1: COMPLETE, ")
    assert "run 1 was ended before its 60 min" in command.stderr
    # Who has control now keeps it, unless it is taken.
    with larpixdaq_run(line, "--duration", "1s") as command:
        assert command.wait(LIMIT) == 1
    assert "control is held by " in command.stderr
    assert "--take-control takes it" in command.stderr
    operator.prepare_run().result(LIMIT)
    with larpixdaq_run(line, "--duration", "1s", "--take-control") as command:
        assert command.wait(LIMIT) == 1
    assert "run 2 is in progress (READY): it must end first" in command.stderr
    operator.abort_run().result(LIMIT)
    line.processes.pop("offline_storage").stop()
    with larpixdaq_run(line, "--duration", "1s", "--take-control") as command:
        assert command.wait(LIMIT) == 1
    assert "the run could not be taken: prepare_run: no offline storage is registered" in command.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "--duration"),
        (("--duration", "0s"), 2, "expected more than 0 s"),
        (("--duration", "1 day"), 2, "expected a number and one of s, min, h"),
        (("--duration", "10s", "--count", "0"), 2, "from 1 to 1000000"),
        (("--duration", "10min", "--every", "5min"), 2, "--every 5 min is shorter than --duration 10 min"),
        (("--duration", "10s"), 1, "no core answers at tcp://127.0.0.1:1"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: tuple[str, ...], status: int, words: str) -> None:
    with Process("larpixdaq.cli", "run", "--core", "tcp://127.0.0.1:1", *arguments, directory=tmp_path) as command:
        assert command.wait(LIMIT) == status
    assert words in command.stderr
    assert len(command.stderr.splitlines()) == 1


# The progress line


def component(name: str, kind: str, status: Any, pid: int = 1, alive: bool = True) -> dict[str, Any]:
    return {"name": name, "kind": kind, "alive": alive, "status": status, "info": {"pid": pid}}


def status_of(*components: Any, missing: tuple[str, ...] = ()) -> dict[str, Any]:
    run = {"run": 7, "producers": ["board"], "storages": ["disk"], "missing": list(missing)}
    return {"run": run, "components": list(components)}


def test_numbers_that_are_not_known_say_so() -> None:
    numbers = RunNumbers(7)
    board = component("board", "producer", producer_status(run=7, packets=100, dropped=2, verdicts={"1": "suspect"}))
    disk = component("disk", "storage", storage_status(bytes=5000, free_bytes=10**10, seconds_left=1200))
    watch = component("monitor", "run_data", {"run": 7, "rate": 12.5})
    assert numbers.text(status_of(board, disk, watch)) == (
        "io_group 1 is suspect, 12.5 packets/s, 100 packets, 2 rows lost, file 5 kB, disk full in 20 min"
    )
    gone = board | {"alive": False}
    assert numbers.text(status_of(gone, disk, missing=("board",))) == (
        "MISSING: board, rate not known (no monitor), at least 100 packets, at least 2 rows lost, file 5 kB, "
        "disk full in 20 min"
    )
    again = component("board", "producer", producer_status(run=7, packets=50), pid=2)
    full = component("disk", "storage", storage_status(bytes=10, free_bytes=10**8, paused="no space left"), pid=2)
    assert numbers.text(status_of(again, full, watch)) == (
        "NOT WRITING: no space left, 12.5 packets/s, at least 150 packets, at least 2 rows lost, "
        "file at least 5.01 kB, 100 MB free"
    )
    assert RunNumbers(7).text(status_of()) == (
        "rate not known (no monitor), packets not known, rows lost not known, file size not known, free space not known"
    )
    other = component("board", "producer", {"packets": "many"})
    assert "packets not known, rows lost not known" in RunNumbers(7).text(status_of(other))


def test_the_progress_line_is_rewritten_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    progress = ProgressLine(file)
    for text in ("one", "two\x1b"):
        progress.show(text)
    progress.clear()
    progress.show("three\x1b")
    assert file.getvalue() == "one\nthree\\x1b\n"
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    progress = ProgressLine(terminal)
    progress.show("one")
    progress.show("12 packets, 123456 rows")
    progress.clear()
    progress.clear()
    assert terminal.getvalue() == "\rone\x1b[K\r12 packets, …\x1b[K\r\x1b[K"
    terminal.close()
    progress.show("nobody sees this")  # a terminal that is gone does not end the run
