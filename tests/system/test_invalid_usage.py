"""Wrong options, files, ports and directories: one clear line with name and place, and the right exit status."""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from file_builder import Feed, write
from processes import Process, free_port

from larpixdaq import cli, producer

MAIN = {"larpixdaq": "larpixdaq.cli", "emulator": "larpixdaq.emulators"}


class Started(contextlib.ExitStack):
    """Processes that run at the same time. The end of the context checks their exit status and output."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._expected: list[tuple[Process, int, str]] = []

    def run(self, module: str, *arguments: object, status: int = 1) -> Process:
        module = MAIN.get(module, f"larpixdaq.{module}")
        process = self.enter_context(Process(module, *arguments, directory=self._folder / "out"))
        self._expected.append((process, status, ""))
        return process

    def fails(self, module: str, *arguments: object, words: str, status: int = 1) -> None:
        """Start a process that must have this exit status, no output, and one line with these words on stderr."""
        process = self.run(module, *arguments)
        self._expected[-1] = (process, status, words)

    def __exit__(self, *exc: Any) -> Any:
        try:
            for process, status, words in self._expected if exc[0] is None else ():
                assert process.wait() == status, (process.name, process.stdout, process.stderr)
                if words:
                    assert process.stdout == ""
                    assert len(process.stderr.splitlines()) == 1, process.stderr
                    assert words in process.stderr
        finally:
            super().__exit__(*exc)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    with Started(tmp_path) as processes:
        yield processes


Fails = Callable[..., None]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Function as Started.fails, in the test's process."""

    def fail(module: str, *arguments: object, words: str) -> None:
        main = importlib.import_module(MAIN.get(module, f"larpixdaq.{module}")).main
        assert main([*map(str, arguments)]) == 1, (module, arguments)
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert words in err

    return fail


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "file").write_bytes(b"not a directory")


@pytest.fixture
def busy() -> Iterator[str]:
    """Address at which another socket listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


def components() -> dict[str, list[object]]:
    """Return every component with its options for these tests."""
    return {
        "run_data": [],
        "offline_storage": [],
        "log": ["--address", f"tcp://127.0.0.1:{free_port()}"],
        "producer": ["--fake", "--ring", "16MiB"],
    }


# Files


def good_bytes(folder: Path) -> bytes:
    report, _ = write(folder, Feed(), [100, 200])
    return report.path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "not an HDF5 file"),
        ("empty", "it is empty"),
        ("directory", "is not a file"),
        ("missing", "there is no such file"),
        ("truncated", "truncated file"),
        ("header only", "truncated file"),
        ("foreign", "has no /_header"),
        ("part", "not an HDF5 file"),
    ],
)
def test_invalid_files(tmp_path: Path, kind: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("bad.h5.part" if kind == "part" else "bad.h5")
    if kind in ("text", "part"):
        path.write_text("this is not HDF5\n" * 100)
    elif kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind in ("truncated", "header only"):
        data = good_bytes(tmp_path)
        path.write_bytes(data[: len(data) // 2 if kind == "truncated" else 100])
    elif kind == "foreign":
        with h5py.File(path, "w") as file:
            file["x"] = [1, 2, 3]
    for more in ([], ["--json"]):
        assert cli.main(["info", str(path), *more]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        (reason,) = err.splitlines()
        assert words in reason
        assert str(path) in reason
    if kind != "directory":
        assert producer.main(["--replay", str(path)]) == 1
        (reason,) = capsys.readouterr().err.splitlines()
        assert str(path) in reason
    assert cli.main(["verify", str(path)]) == 1
    text, err = capsys.readouterr()
    assert err == ""
    title, reason = text.splitlines()
    assert title == f"{path}: BAD, 0 rows"
    assert words in reason
    assert str(path) in reason
    assert cli.main(["verify", str(path), "--json"]) == 1
    machine, err = capsys.readouterr()
    assert err == ""
    (found,) = json.loads(machine)["files"].values()
    (finding,) = found["findings"]
    assert not found["ok"]
    assert words in finding


# Options


@pytest.mark.parametrize(
    "command",
    [
        "core --bogus",
        "log --bogus",
        "run_data --bogus",
        "run_data --name=",
        "run_data --name core",
        "offline_storage --bogus",
        "offline_storage -o",
        f"offline_storage --name {'x' * 65}",
        "offline_storage --rotate 5",
        "offline_storage --rotate 5parsecs",
        "offline_storage --rotate 0s",
        "offline_storage --rotate -3min",
        "offline_storage --on-close=",
        "offline_storage --on-close 'unclosed",
        "offline_storage --durability never",
        "offline_storage --threads 0",
        "offline_storage --threads 65",
        "producer",
        "producer --fake --serial /dev/null",
        "producer --fake --ring twelve",
        "producer --fake -5",
        "producer --fake --asic 7",
        "producer --fake --when-full never",
        f"producer --fake --name {'x' * 65}",
        "producer --replay x --speed 0",
        "producer --fake --baud 9600",
        "producer --fake 1",
        "producer --pacman 1=a 1=b",
        "producer --io-config a:b.c",
        "larpixdaq",
        "larpixdaq fly",
        "larpixdaq verify",
        "larpixdaq info",
        "larpixdaq export x.h5",
        "larpixdaq split x.h5 -o .",
        "larpixdaq split x.h5 -o . --rows 0",
        "larpixdaq cat x.h5 --types hit",
        "larpixdaq cat x.h5 --chips 1-2",
        "larpixdaq cat x.h5 --rows 5",
        "larpixdaq diff x.h5",
        "larpixdaq up",
        "larpixdaq up --host daq1 --fake",
        "larpixdaq up --fake --address nonsense:zz",
        "larpixdaq up --pacman host:0",
        "larpixdaq down --host daq1",
        "larpixdaq config",
        "larpixdaq status --bogus",
        "larpixdaq status --core tcp://127.0.0.1:99999",
        "larpixdaq run --duration 10s --every 5s",
        f"larpixdaq run --duration 10s --comment {'x' * 10_001}",
        "larpixdaq run --duration 0s",
        "larpixdaq log --since 1h --until 2h",
        "larpixdaq log --follow --until 1h",
        "larpixdaq runs --since 1h --until 2h",
        "larpixdaq runs 3 --by Ada",
        "larpixdaq comment now \udcff",
        "larpixdaq keys invite disk --role component --expires 0s",
        "larpixdaq keys invite core --role component",
        "larpixdaq keys invite disk",
        "larpixdaq keys invite detector.toml --host daq2 --role component",
        "larpixdaq demo --seconds 0",
        "larpixdaq demo --seconds nan",
        "larpixdaq demo --rate -1",
        "larpixdaq demo --rate 1",
        "larpixdaq demo --io-groups 0",
        "larpixdaq demo --io-groups 256",
        "larpixdaq demo --words-per-message 0",
        "emulator",
        "emulator bern",
        "emulator pacman --rate 0",
        "emulator pacman --io-groups 300",
        "emulator pacman --data-port 70000",
        "emulator pacman --chips 0",
        "emulator pacman --chips 4 --dead-chips first",
    ],
)
def test_wrong_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, *arguments = command.split()
    main = importlib.import_module(MAIN.get(module, f"larpixdaq.{module}")).main
    try:
        status = main(arguments)
    except SystemExit as ended:  # by the parser
        status = ended.code
    out, err = capsys.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1), err


@pytest.mark.parametrize("command", ["verify", "recover", "info"])
def test_an_empty_path_is_not_the_current_folder(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, ""])
    assert ended.value.code == 2
    assert "expected a path, found an empty text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nonsense:zz", "address 'nonsense:zz': expected tcp://HOST"),
        ("tcp://127.0.0.1:99999", "port 99999 is above 65535"),
    ],
)
def test_invalid_addresses(address: str, words: str, started: Started) -> None:
    for module, options in components().items():
        started.fails(module, "--core", address, *options, words=words, status=2)


# Ports, directories, no core


def test_busy_ports(busy: str, tmp_path: Path, started: Started) -> None:
    for module, *more in (("core",), ("log",), ("producer", "--fake", "--ring", "16MiB")):
        started.fails(module, "--address", busy, *more, words=busy)
    started.fails("emulator", "pacman", "--data-port", busy.rpartition(":")[2], words=busy)
    up = ("up", "--fake", "--address", busy, "--log-address", f"tcp://127.0.0.1:{free_port()}", "-o", tmp_path)
    started.fails("larpixdaq", *up, "--state-dir", tmp_path / "up", words=busy)


@pytest.mark.parametrize("place", ["/proc/nothing", "file", "file/under", "missing"])
def test_directories_that_cannot_be_used(place: str, tmp_path: Path, fails: Fails) -> None:
    where = tmp_path / place
    core = ["--core", f"tcp://127.0.0.1:{free_port()}"]
    fails("offline_storage", *core, "-o", where, words=f"--output-dir {where}: no such directory")
    fails("larpixdaq", "demo", "-o", where, words=f"--output-dir {where}: no such directory")
    fails("larpixdaq", "up", "--fake", "-o", where, words=f"--output-dir {where}: no such directory")
    fails("producer", "--fake", *core, "--ring-dir", where, words=f"--ring-dir {where}: ")
    fails("producer", "--fake", *core, "--routines", where, words=f"--routines {where}: no such directory")
    if place != "missing":  # a missing state directory is made
        address = ["--address", f"tcp://127.0.0.1:{free_port()}"]
        fails("core", *address, "--state-dir", where, words=f"state directory {where}: ")
        fails("log", *core, *address, "--state-dir", where, words=f"state directory {where}: ")
        fails("producer", "--fake", *core, "--state-dir", where, words=f"state directory {where}: ")
        fails("log", *core, *address, "-o", where / "log.txt", words=f"log file {where}/log.txt: ")


def test_paths_with_bytes_that_are_not_utf8(tmp_path: Path, started: Started) -> None:
    where = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(where)
    core = ["--core", f"tcp://127.0.0.1:{free_port()}"]
    shown = ascii(where)[1:-1]
    started.fails("larpixdaq", "info", f"{where}/x.h5", words=f"cannot open {shown}/x.h5: there is no such file")
    started.fails("offline_storage", *core, "-o", where, words="expected UTF-8", status=2)


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "larpixdaq", "recover", str(tmp_path)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.endswith("cannot write to standard output: No space left on device\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_directories_without_write_permission(tmp_path: Path, fails: Fails) -> None:
    where = tmp_path / "closed"
    where.mkdir(mode=0o500)
    core = ["--core", f"tcp://127.0.0.1:{free_port()}"]
    fails("offline_storage", *core, "-o", where, words=f"--output-dir {where}: not writable")
    fails("producer", "--fake", *core, "--ring-dir", where, words=f"--ring-dir {where}: ")
    fails("core", "--address", "tcp://127.0.0.1:0", "--state-dir", where, words=f"state directory {where}: ")


def test_rings_of_invalid_sizes(started: Started) -> None:
    started.fails(
        "producer",
        "--fake",
        "--ring",
        "1000000GiB",
        words="make it smaller with --ring or put it elsewhere with --ring",
    )
    started.fails("producer", "--fake", "--ring", "1MiB", words="--ring: expected at least")


def test_without_a_core(started: Started) -> None:
    """Every program ends with one line after about 5 s, also at the default address."""
    core = f"tcp://127.0.0.1:{free_port()}"
    for module, options in components().items():
        started.fails(module, "--core", core, *options, words=f"no core answers at {core} (waited 5 s)")
    started.fails("larpixdaq", "status", "--core", core, words=f"no core answers at {core} (waited 2 s)")
    with socket.socket() as probe:  # no core listens at the default address, unless a real system is up
        if probe.connect_ex(("127.0.0.1", 5551)):
            started.fails("run_data", words="no core answers at tcp://127.0.0.1:5551 (waited 5 s)")
    with started:
        pass


@pytest.mark.parametrize("module", cli._COMMANDS)
def test_each_module_adds_the_commands_for_which_it_is_imported(module: str) -> None:
    """Otherwise `larpixdaq COMMAND` would import all modules."""
    (commands,) = (action for action in cli.argument_parser([module])._actions if action.dest == "command")
    assert tuple(commands.choices) == cli._COMMANDS[module]
