"""SIGINT, SIGTERM, SIGHUP or SIGQUIT to every process, during a run and outside: it exits with 0 and leaves no files.

All processes have the same handler, so that each gets two of the signals. An interrupted command reports the signal and
exits with another status.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import LIMIT, Process, until
from system import System, rows_of, system

from larpixdaq import cli
from larpixdaq.errors import LarpixDaqError
from larpixdaq.hdf5.verify import verify
from larpixdaq.operator import Operator

#: Every process with the signal that ends it outside of a run; in a run it gets another one.
OUTSIDE = {
    "producer": signal.SIGHUP,
    "run_data": signal.SIGINT,
    "offline_storage": signal.SIGTERM,
    "log": signal.SIGQUIT,
    "core": signal.SIGHUP,
}


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as started:
        yield started


def start(line: System) -> tuple[Operator, Path]:
    """Start a whole system. Returns an Operator, and the folder of the producer's ring."""
    ring = line.folder / "ring"
    ring.mkdir()
    operator = line.start("--fake", "20000", "--ring-dir", ring)
    line.launch_log()
    line.await_kinds(operator, "log")
    assert len(list(ring.iterdir())) == 1
    return operator, ring


def ends_well(line: System, module: str, how: signal.Signals) -> None:
    process = line.processes.pop(module)
    assert process.stop(how) == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""


def take(line: System, operator: Operator) -> None:
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    until(lambda: line.status_of(operator, "storage").get("rows", 0) > 500, "500 rows in the storage")


def state(operator: Operator) -> str:
    """Return the run state, empty while no core runs or the core restarts."""
    try:
        found: str = operator.state().result(LIMIT)
    except LarpixDaqError:
        return ""
    return found


def test_outside_of_a_run(line: System) -> None:
    _, ring = start(line)
    for module, how in OUTSIDE.items():
        ends_well(line, module, how)
    assert list(ring.iterdir()) == []
    assert list(line.data.iterdir()) == []


def test_core_log_and_monitor_during_a_run(line: System) -> None:
    """The run goes on without them, and a restarted core continues it."""
    operator, _ = start(line)
    take(line, operator)
    for module, how in (("log", signal.SIGINT), ("run_data", signal.SIGHUP), ("core", signal.SIGQUIT)):
        ends_well(line, module, how)
    line.launch_core()
    until(lambda: state(operator) == "RUN", "the run to continue")
    line.await_kinds(operator, "producer", "storage")
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    (path,) = ended["files"]
    assert verify(path).ok
    assert len(rows_of(path)) == ended["rows"]


def test_producer_during_a_run(line: System) -> None:
    """The producer delivers all blocks with its totals, and removes its ring."""
    operator, ring = start(line)
    take(line, operator)
    ends_well(line, "producer", signal.SIGTERM)
    assert list(ring.iterdir()) == []
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "ABORTED"
    assert "LArPix board ended in the middle of the run" in ended["reasons"]
    (path,) = ended["files"]
    report = verify(path)
    assert report.ok, report.findings
    assert report.condition == "ABORTED"
    assert len(rows_of(path)) == ended["stored"] > 500
    assert operator.state().result(LIMIT) == "STOP"


def test_storage_during_a_run(line: System) -> None:
    """The storage closes its file without end record. All later rows are in the next part, after a restart."""
    operator, _ = start(line)
    take(line, operator)
    ends_well(line, "offline_storage", signal.SIGINT)
    (first,) = line.data.glob("*.h5")
    assert {path.suffix for path in line.data.iterdir()} == {".h5", ".json"}
    report = verify(first)
    assert report.condition == "INTERRUPTED"
    assert all("no end record" in finding for finding in report.findings)
    line.launch_storage()
    until(lambda: len(list(line.data.glob("*_001.h5.part"))) == 1, "a second part")
    ended = operator.end_run().result(2 * LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    assert ended["files"][0] == str(first)
    (second,) = ended["files"][1:]
    assert verify(second).ok
    assert len(rows_of(first)) + len(rows_of(second)) == ended["rows"]
    line.await_status(operator, "producer", "owed_blocks", 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_reports_the_signal(tmp_path: Path, how: signal.Signals) -> None:
    arguments = ("demo", "--seconds", "60", "-o", tmp_path)
    with Process("larpixdaq.cli", *arguments, directory=tmp_path, env={"PYTHONUNBUFFERED": "1"}) as demo:
        until(lambda: "emulated boards" in demo.stdout, "the run to begin")
        assert demo.stop(how) == 128 + how
        assert demo.stderr.endswith(f"interrupted by {how.name}\n")
        assert "Traceback" not in demo.stderr


def test_ctrl_c_while_the_command_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "import_module", lambda _name: signal.raise_signal(signal.SIGINT))
    assert cli.main(["status"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "larpixdaq: interrupted by SIGINT\n"
