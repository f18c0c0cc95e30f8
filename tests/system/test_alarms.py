"""Alarms of a complete system: a board that is unplugged, falls silent or comes back as another one, and a killed
storage, as commands, webhooks, `larpixdaq alarms` and the run's file tell it."""

import contextlib
import json
import signal
import sys

import h5py
import pytest
from alarm_receivers import RECORD, Web, lines
from emulated_board import Emulator
from processes import LIMIT, free_port, until
from system import system

from larpixdaq.cli import main
from larpixdaq.hdf5.verify import verify
from larpixdaq.offline_storage import DEFAULT_NAME


@pytest.fixture
def line(tmp_path):
    """A system of its own, whose core has a configuration of alarms."""
    (tmp_path / "system").mkdir()
    with system(tmp_path / "system") as started:
        yield started


@pytest.fixture
def web():
    server = Web()
    with server.running():
        yield server


def start(line, tmp_path, web, *source):
    """Start a system with a command and a webhook for alarms. Returns the Operator, and the command's file."""
    out = tmp_path / "told"
    argv = json.dumps([sys.executable, "-c", RECORD, str(out)])
    config = tmp_path / "detector.toml"
    config.write_text(
        "[producer.board]\nring = '64MiB'\n\n"  # for others
        "[alarms]\nhold-off = 0.5\n\n"
        f"[[alarms.command]]\nargv = {argv}\nper-minute = 600\n\n"
        "[[alarms.webhook]]\nname = 'phone'\nurl-env = 'PHONE_URL'\nper-minute = 600\n"
    )
    line.env["core"] = {"PHONE_URL": web.url}
    directory = ("--state-dir", line.folder / "state")
    line.launch("core", "--address", line.core, "--log-address", line.log, *directory, "--alarms", config)
    return line.start(*source), out


def told(web, condition, event, component):
    return [
        post["alarm"]
        for _, _, post in list(web.posts)
        if post["event"] == event
        and post["alarm"]["condition"] == condition
        and component in ("", post["alarm"]["component"])
    ]


def wait_for(web, condition, event="raised", count=1, component=""):
    """Wait for this number of such alarms, of a component or of all, and return the last one."""

    def last():
        found = told(web, condition, event, component)
        return len(found) >= count and found[-1]

    return until(last, f"{condition} {event}")


def texts(path):
    with h5py.File(path) as file:
        return [message.decode() for message in file["messages"]["message"]]


def test_a_board_is_unplugged_and_comes_back_as_another_one(line, tmp_path, web, capsys):
    ports = str(free_port()), str(free_port())

    def plugged(revision):
        data, command = ports
        return Emulator("--rate", "2000", "--revision", revision, "--data-port", data, "--command-port", command)

    with contextlib.ExitStack() as stack:
        board = stack.enter_context(contextlib.closing(plugged("5")))
        o, out = start(line, tmp_path, web, "--pacman", *board.addresses)
        o.prepare_run().result(LIMIT)
        o.begin_run().result(LIMIT)
        until(lambda: [b["changed"] for b in line.status_of(o, "producer").get("boards", [])] == [""], "the firmware")
        board.stop(signal.SIGKILL)
        alarm = wait_for(web, "board-disconnected")
        assert (alarm["level"], alarm["subject"]) == ("alarm", "LArPix board, io_group 1")
        assert "PACMAN io_group 1" in alarm["text"]
        command = ["alarms", "--core", line.core]
        assert main(command) == 1
        assert f"ALARM {alarm['id']} since" in capsys.readouterr().out
        found = until(lambda: [post for post, _ in lines(out) if post["alarm"]["id"] == alarm["id"]], "the command")
        assert found[0]["event"] == "raised"
        board = stack.enter_context(contextlib.closing(plugged("4")))
        another = wait_for(web, "board-changed")
        assert "register map 0; the run began with " in another["text"]
        cleared = wait_for(web, "board-disconnected", "cleared")
        assert cleared["id"] == alarm["id"]
        board.stop(signal.SIGKILL)
        wait_for(web, "board-disconnected", count=2)
        stack.enter_context(contextlib.closing(plugged("5")))
        wait_for(web, "board-changed", "cleared")
        wait_for(web, "board-disconnected", "cleared", count=2)
        ended = o.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE, suspect"
        assert wait_for(web, "run-verdict")["level"] == "warning"
        until(lambda: main([*command, "--all", "--json"]) == 0, "no open alarm")
        capsys.readouterr()
        assert main([*command, "--since", "1h", "--json"]) == 0
        rows = [row for row in json.loads(capsys.readouterr().out)["history"] if row["alarm"] == alarm["id"]]
        assert [row["event"] for row in rows] == ["raised", "cleared"] * 2
    (path,) = ended["files"]
    said = [text for text in texts(path) if text.startswith("io_group 1: board")]
    assert said == ["io_group 1: board not connected", "io_group 1: board connected again"] * 2
    assert any(text.startswith("io_group 1: another board: firmware ") for text in texts(path))
    assert any(text.startswith("io_group 1: the first board again: ") for text in texts(path))
    assert verify(path).ok


def test_a_board_that_falls_silent(line, tmp_path, web):
    with contextlib.closing(Emulator("--rate", "2000", "--count", "14000", "--wait-for-go", "--stay")) as board:
        o, _ = start(line, tmp_path, web, "--pacman", *board.addresses)
        o.prepare_run().result(LIMIT)
        o.begin_run().result(LIMIT)
        board.go()
        alarm = wait_for(web, "io-group-silent")
        assert alarm["text"].startswith("SILENT: io_group 1 of LArPix board: no packet for ")
        ended = o.end_run().result(LIMIT)
        wait_for(web, "io-group-silent", "cleared")  # with the run
    (path,) = ended["files"]
    assert "io_group 1: no packets any more" in texts(path)
    assert verify(path).ok


def test_a_killed_storage_and_a_killed_core(line, tmp_path, web):
    o, _ = start(line, tmp_path, web, "--fake", "1000")
    o.prepare_run().result(LIMIT)
    o.begin_run().result(LIMIT)
    line.processes["offline_storage"].kill()
    alarm = wait_for(web, "component-lost", component=DEFAULT_NAME)
    assert (alarm["level"], "run 1 requires it" in alarm["text"]) == ("alarm", True)
    line.processes["core"].kill()
    line.restart("core")
    with line.operator() as o:
        # A busy machine may have others, such as that of a component whose heartbeats are late.
        assert alarm["id"] in [one["id"] for one in o.alarms().result(LIMIT)["open"]]
        line.restart("offline_storage")
        assert wait_for(web, "component-lost", "cleared", component=DEFAULT_NAME)["id"] == alarm["id"]
        line.await_kinds(o, "storage", "producer")
        line.processes["offline_storage"].kill()
        again = wait_for(web, "component-lost", count=2, component=DEFAULT_NAME)
        assert (again["id"], again["count"]) == (alarm["id"], 2)
        line.restart("offline_storage")
        wait_for(web, "component-restarted", component=DEFAULT_NAME)
        until(lambda: o.end_run().result(LIMIT)["condition"] == "COMPLETE", "the run's end")
