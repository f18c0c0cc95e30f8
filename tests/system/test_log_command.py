"""Commands `larpixdaq log` and `log-level` on files and on real processes."""

import contextlib
import json
import logging
import re
import signal
import subprocess
import time

import pytest
import zmq
from processes import LIMIT, Process, until
from system import system

from larpixdaq import cli
from larpixdaq.control.log_file import LogRecord, line
from larpixdaq.control.log_shipping import LogShipper
from larpixdaq.errors import LarpixDaqError, RequestError
from larpixdaq.log import LogFile
from larpixdaq.protocol.control import Endpoint
from larpixdaq.runtime.launcher import command


def stamped(second, name="core", level=logging.INFO, text="x"):
    return line(LogRecord(1_700_000_000 + second, level, name, str(text)))


def log(*arguments):
    """Run `larpixdaq log`. Returns its exit status, output and errors."""
    ended = subprocess.run(command("cli", "log", *map(str, arguments)), capture_output=True, text=True, timeout=LIMIT)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def followed():
    """Function that starts `larpixdaq log --follow`, which is ended by Ctrl-C."""
    started = []

    def start(directory, *arguments):
        started.append(Process("larpixdaq.cli", "log", "--follow", *arguments, directory=directory))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            assert process.stop(signal.SIGINT) == 0
        assert "Traceback" not in process.stderr


def test_the_commands_are_those_of_their_modules():
    for module, names in cli._COMMANDS.items():
        for name in names:
            with pytest.raises(SystemExit, match="0"):
                cli.argument_parser([module]).parse_args([name, "--help"])
        texts = cli.argument_parser([module]).format_help()
        others = {other for key, found in cli._COMMANDS.items() if key != module for other in found}
        assert not any(f"\n    {other} " in texts for other in others)


def test_lines_of_a_log(tmp_path):
    file = tmp_path / "log.txt"
    lines = [stamped(second, ("core", "LArPix board")[second % 2], 10 * (1 + second % 4)) for second in range(40)]
    file.write_text("".join([*lines[20:], "torn \x1b[31m", "\n", *lines[:20]]))
    assert log(file)[:2] == (0, "".join([*lines, "torn \\x1b[31m\n"]))
    assert log("--state-dir", tmp_path, "--level", "error", "--component", "LArPix board")[1] == "".join(
        [text for text in lines if " ERROR LArPix board: " in text] + ["torn \\x1b[31m\n"]
    )
    times = "--since", lines[10][:27], "--until", lines[12][:27].replace("T", " ").replace("Z", " UTC")
    assert log(file, *times) == (0, "".join(lines[10:13]), "")
    assert log(file, "-n", 3)[1] == "".join(lines[17:20])
    found = [json.loads(text) for text in log(file, "--json", *times)[1].splitlines()]
    assert found[0] == {"time": lines[10][:27], "level": "WARNING", "component": "core", "text": "x"}
    assert json.loads(log(file, "--json", "-n", 21)[1].splitlines()[-1]) == {"line": "torn \\x1b[31m"}
    (tmp_path / "zeros.txt").write_bytes(b"\0" * 100_000 + b"\n")
    assert log(tmp_path / "zeros.txt")[1] == "\\x00" * 2000 + "... (100000 bytes)\n"
    for arguments, words in (
        ((tmp_path / "none.txt",), "none.txt: no such file"),
        ((tmp_path,), "is not a regular file"),
    ):
        status, out, error = log(*arguments)
        assert (status, out, error.count("\n")) == (1, "", 1), error
        assert words in error
    some = log(file, "--component", "core", "--component", "LArPix bord")
    assert (some[0], some[1].count(" core: x"), some[2].count("\n")) == (1, 20, 1)
    assert f"{file} and its older files: no record of 'LArPix bord'; did you mean LArPix board?" in some[2]
    assert "'x'; there are records of LArPix board, core" in log(file, "-n", 5, "--component", "x")[2]
    file.write_text("".join(lines))
    for few in (("--level", "critical"), ("--since", "1h", "--component", "core"), ("--since", "1h", "--json")):
        assert log(file, *few) == (0, "", "larpixdaq: no record is like this\n")
    for arguments, words in (
        (("--since", "1h", "--until", "2h"), "--until is before --since"),
        (("--follow", "--until", "1h"), "--until cannot be used with --follow"),
        (("--level", "loud"), "level 'loud': expected debug"),
        (("-n", "-1"), "expected a whole number of at least 0, found -1"),
        (("--since", "yesterday"), "time 'yesterday': expected a UTC time"),
    ):
        status, out, error = log(file, *arguments)
        assert (status, out, error.count("\n")) == (2, "", 1), error
        assert words in error


def test_head_ends_the_command(tmp_path, followed):
    file = tmp_path / "log.txt"
    file.write_text("".join(map(stamped, range(50_000))))
    for arguments in ((), ("--follow",)):
        writer = subprocess.Popen(
            command("cli", "log", str(file), *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert writer.stdout.readline()
        writer.stdout.close()
        assert writer.wait(LIMIT) == 1
        assert writer.stderr.read() == b""
        writer.stderr.close()


def test_follow_across_rotations(tmp_path, followed):
    file = LogFile(tmp_path / "log.txt", max_bytes=2000)
    file._append([stamped(second).encode() for second in range(15)])
    reader = followed(tmp_path, "--component", "core", tmp_path / "log.txt")
    until(lambda: reader.stdout == "".join(map(stamped, range(5, 15))), "the last ten lines")
    written = 15
    for turn in range(8):
        for _ in range(20):
            file._append([stamped(written).encode(), stamped(written, "other").encode()])
            written += 1
        expected = stamped(written - 1)
        until(lambda text=expected: reader.stdout.endswith(text), "the new lines")
        if turn == 4:
            (tmp_path / "log.txt").unlink()
            until(lambda: file._append([]) or (tmp_path / "log.txt").exists(), "a new file")
    assert reader.stdout == "".join(map(stamped, range(5, written)))
    assert reader.stderr == ""
    file.close()


def test_follow_before_there_is_a_log(tmp_path, followed):
    reader = followed(tmp_path, "--state-dir", tmp_path)
    until(lambda: "no such file; waiting for it" in reader.stderr, "its message")
    (tmp_path / "log.txt").write_text(stamped(1) + "torn\n")
    until(lambda: reader.stdout == stamped(1) + "torn\n", "the first lines")


def test_a_late_starter_and_levels_that_change(tmp_path, followed):
    with system(tmp_path) as line:
        line.insecure = True
        line.launch_core()
        line.launch_monitor()
        line.launch_log()
        operator = line.operator()
        line.await_kinds(operator, "run_data", "log")
        state = tmp_path / "state"
        file = state / "log.txt"
        until(lambda: file.exists() and "Online monitor is registered" in file.read_text(), "the first records")
        reader = followed(tmp_path, "--state-dir", state)
        until(lambda: "Online monitor is registered" in reader.stdout, "the last lines")

        context = zmq.Context()
        shipper = LogShipper("late one", context)
        early = logging.LogRecord("larpixdaq.test", logging.WARNING, "", 0, "before the log", None, None)
        early.created = time.time() - 60
        shipper.emit(early)
        until(lambda: shipper.ship(Endpoint(line.log), None), "shipping")
        until(lambda: "late one: before the log  (late)\n" in reader.stdout, "the late line")
        shipper.ship(Endpoint(), None)
        context.destroy(0)
        first, *rest = file.read_text().splitlines()
        assert "late one" not in first
        assert sum(text.endswith("late one: before the log") for text in rest) == 1
        assert "late one: before the log" in log("--state-dir", state)[1].splitlines()[0]

        def change(*arguments):
            where = "--core", line.core, "--insecure"
            ended = subprocess.run(
                command("cli", "log-level", *arguments, *where), capture_output=True, text=True, timeout=LIMIT
            )
            return ended.returncode, ended.stdout, ended.stderr

        def lines(words):
            return file.read_text().count(words)

        assert change("debug", "--component", "Online monitor") == (0, "log level DEBUG: Online monitor\n", "")
        operator.packet_rate(channels=False).result(LIMIT)
        until(lambda: lines("DEBUG Online monitor: packet_rate(channels=False) done in"), "a record of level debug")
        assert "log level DEBUG" in operator.status().readable(LIMIT)
        assert lines(" DEBUG core: ") == 0
        status, out, _ = change("warning")
        assert (status, sorted(out.split(": ")[1].strip().split(", "))) == (0, ["Log", "Online monitor", "core"])
        status = operator.status().result(LIMIT)
        assert {one["log_level"] for one in status["components"]} | {status["log_level"]} == {"WARNING"}
        before = lines("packet_rate")
        operator.packet_rate(channels=False).result(LIMIT)
        assert change("info")[0] == 0
        line.processes["run_data"].stop()
        line.restart("run_data")
        until(lambda: lines("Online monitor (run_data) has registered") == 2, "its return")
        assert lines("packet_rate") == before
        assert change("loud", "--component", "core")[0] == 2
        status, _, error = change("info", "--component", "nobody")
        assert (status, error.count("\n")) == (1, 1)
        assert "no component is named 'nobody'; there are core, " in error
        with pytest.raises(RequestError, match="level 'loud': expected debug, info"):
            operator.set_log_level("loud").result(LIMIT)
        operator.set_log_level("error", "core").result(LIMIT)
        assert operator.status().result(LIMIT)["log_level"] == "ERROR"


def test_what_is_logged_of_a_run(tmp_path):
    """Each fact in one line: who asked for what, the changes of state, what was refused, routines and chips."""
    with system(tmp_path) as line:
        line.launch_core()
        line.launch_log()
        operator = line.start("--fake", "1000")
        line.await_kinds(operator, "log")
        file = tmp_path / "state" / "log.txt"
        until(lambda: file.exists() and "connected (io_group 1)" in file.read_text(), "the board")
        for call in (
            operator.begin_run,
            lambda: operator.prepare_run(comment="cosmics"),
            operator.begin_run,
            lambda: operator.run_routine("hello_world"),
            lambda: operator.run_routine("nothing"),
            lambda: operator.call("LArPix board", "dance"),
            lambda: operator.power(True),
            operator.end_run,
        ):
            with contextlib.suppress(LarpixDaqError):
                call().result(LIMIT)
        line.processes["run_data"].kill()
        until(lambda: "Online monitor is lost" in file.read_text(), "its loss")
        line.restart("run_data")
        until(lambda: file.read_text().count("Online monitor (run_data) has registered") == 2, "its return")
        text = log("--state-dir", tmp_path / "state", "--component", "core", "--component", "LArPix board")[1]
    found = [words.partition("Z ")[2] for words in text.splitlines()]
    me = re.escape(operator._connection.name)
    expected = [
        r"INFO core: LArPix board \(producer\) has registered: process \d+ on .*",
        r"INFO LArPix board: fake .*: connected \(io_group 1\)",
        rf"INFO core: {me}: begin_run\(\)",
        rf"INFO core: {me}: begin_run refused: begin_run is not allowed in STOP: .*",
        rf"INFO core: {me}: prepare_run\(comment='cosmics'\)",
        rf"INFO core: run 1: STOP to READY by {me}, test, producers LArPix board, storages Offline storage: cosmics",
        rf"INFO core: {me}: begin_run\(\)",
        rf"INFO core: run 1: READY to RUN by {me}",
        rf"INFO core: {me}: run_routine\(name='hello_world'\) of LArPix board",
        r"INFO LArPix board: run_routine\(name='hello_world'\) done in \d\.\d s: 'Hello, world!'",
        rf"INFO core: {me}: run_routine\(name='nothing'\) of LArPix board",
        r"WARNING LArPix board: run_routine\(name='nothing'\) failed after \d\.\d s: no routine 'nothing'; .*",
        rf"INFO core: {me}: dance refused: LArPix board has no action 'dance'; .*",
        rf"INFO core: {me}: power\(on=True, ramp=False\) of LArPix board",
        r"WARNING LArPix board: power\(on=True, ramp=False\) failed after \d\.\d s: .*",
        rf"INFO core: {me}: end_run\(\)",
        rf"INFO core: run 1: RUN to STOP by {me}, COMPLETE, \d+ rows made, \d+ stored in 1 file",
        r"WARNING core: Online monitor is lost",
        r"INFO core: Online monitor \(run_data\) has registered: process \d+ on \S+, after \d+\.\d s and a restart",
    ]
    place = -1
    for pattern in expected:
        matches = [index for index, words in enumerate(found) if index > place and re.fullmatch(pattern, words)]
        assert matches, (pattern, found[place + 1 :])
        place = matches[0]
    assert len(found) == len(set(found)) + 1  # the two requests to begin the run
