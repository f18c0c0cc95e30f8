"""`larpixdaq up`, `status` and `down`: a whole system on this machine, which leaves no process."""

import json
import os
import pwd
import signal
import socket
import sys
from pathlib import Path

import pytest
from processes import LIMIT, Process, free_port, until

from larpixdaq.cli import detector, main
from larpixdaq.control.catalogue import Catalogue
from larpixdaq.operator import Operator
from larpixdaq.runtime.launcher import is_running, logind_removes_files, read_running, start_time


def output(folder: Path, *arguments: object) -> str:
    """Return the output of a command, which must succeed without errors."""
    with Process("larpixdaq.cli", *arguments, directory=folder / "output") as process:
        assert process.wait(2 * LIMIT) == 0, process.stderr
        assert process.stderr == ""
        return process.stdout


def host() -> str:
    """Return the loopback address of IPv6, or that of IPv4 on machines without IPv6."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return "127.0.0.1"
    return "[::1]"


def test_up_takes_a_run_and_down_leaves_no_process(tmp_path):
    core, log = (f"tcp://{host()}:{free_port()}" for _ in range(2))
    state, data, ring = tmp_path / "state", tmp_path / "data", tmp_path / "ring"
    data.mkdir()
    ring.mkdir()
    # options of the producer
    options = ("--fake", "2000", "--io-groups", "2", "--ring", "16MiB", "--ring-dir", ring, "--when-full", "wait")
    # options of the storage
    closed = tmp_path / "closed files"
    closed.mkdir()
    script = "import os, sys; os.link(sys.argv[2], os.path.join(sys.argv[1], os.path.basename(sys.argv[2])))"
    command = f"{sys.executable} -c '{script}'"
    options += (
        "--rotate",
        "1000rows",
        "--rotate",
        "2h",
        "--on-close",
        f"{command} '{closed}'",
        "--durability",
        "fsync",
        "--threads",
        "2",
        "--log-level",
        "debug",
    )
    output(tmp_path, "up", "--address", core, "--log-address", log, "--state-dir", state, "-o", data, *options)
    running = read_running(state)
    try:
        assert running is not None
        assert len(list(ring.iterdir())) == 1
        with Operator(core) as operator:
            operator.prepare_run(comment="cosmics [1]").result(LIMIT)
            text = output(tmp_path, "status", "--core", core)
            assert text.startswith("state READY, run 1 (test): cosmics [1]\ncontrol: ")
            assert "fake board io_group 1; fake board io_group 2; " in text
            assert text.count("log level DEBUG") == 5
            operator.begin_run().result(LIMIT)
            until(lambda: list(data.glob("*_001.h5")), "the second part")
            ended = operator.end_run().result(LIMIT)
        assert ended["condition"] == "COMPLETE"
        files = [Path(file) for file in ended["files"]]
        assert {file.parent for file in files} == {data}
        assert [file.name[-7:] for file in files] == [f"_{part:03d}.h5" for part in range(len(files))]
        assert "last run: 1 COMPLETE, " in output(tmp_path, "status", "--core", core)
        assert json.loads(output(tmp_path, "status", "--core", core, "--json"))["last_run"]["run"] == 1
    finally:
        assert output(tmp_path, "down", "--state-dir", state) == (
            "ended Supervisor, LArPix board, Online monitor, Offline storage, Log, core\n"
        )
    assert {file.name for file in closed.iterdir()} == {file.name for file in files}
    assert {path.suffix for path in data.iterdir()} == {".h5", ".json"}
    assert [entry.module for entry in running.processes if start_time(entry.pid) is not None] == []
    assert list(ring.iterdir()) == []
    assert read_running(state) is None


@pytest.mark.parametrize("insecure", [(), ("--insecure",)])
def test_up_at_an_address_that_other_machines_can_reach(tmp_path, insecure):
    state, port = tmp_path / "state", free_port()
    where = ("--address", f"tcp://0.0.0.0:{port}", "--log-address", f"tcp://127.0.0.1:{free_port()}")
    common = ("--state-dir", state, "-o", tmp_path, "--fake")
    with Process(
        "larpixdaq.cli", "up", *insecure, *where, *common, "10", "--ring", "16MiB", directory=tmp_path / "output"
    ) as up:
        assert up.wait(2 * LIMIT) == 0, up.stderr
        assert "but not the producer" in up.stderr
    try:
        status = output(tmp_path, "status", "--core", f"tcp://127.0.0.1:{port}")
        assert ("INSECURE" in status) == bool(insecure)
    finally:
        output(tmp_path, "down", "--state-dir", state)


class Up:
    """`larpixdaq up` with a fake board, on fixed ports, with a state directory for each name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.core, self.log = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))

    def start(self, name: str, *more: object) -> Process:
        for directory in (self.folder / name / "state", self.folder / name / "data"):
            directory.mkdir(parents=True, exist_ok=True)
        where = ("--address", self.core, "--log-address", self.log, "--state-dir", self.folder / name / "state")
        options = ("-o", self.folder / name / "data", "--fake", "20", "--ring", "16MiB", *more)
        return Process("larpixdaq.cli", "up", *where, *options, directory=self.folder / name)

    def run(self, name: str, *more: object) -> tuple[int, str]:
        """Return exit status and output of `up`."""
        with self.start(name, *more) as process:
            return process.wait(2 * LIMIT), process.stdout + process.stderr

    def down(self, name: str) -> str:
        return output(self.folder, "down", "--state-dir", self.folder / name / "state")

    def running(self, name: str) -> dict[str, int]:
        running = read_running(self.folder / name / "state")
        return {} if running is None else {entry.module: entry.pid for entry in running.processes}

    def kill_supervisor(self, name: str) -> None:
        running = read_running(self.folder / name / "state")
        assert running is not None
        assert running.supervisor is not None
        supervisor = running.supervisor
        os.kill(supervisor.pid, signal.SIGKILL)
        until(lambda: not is_running(supervisor), "the supervisor to be dead")


def test_up_restarts_ended_processes_and_recognises_another_system(tmp_path):
    up = Up(tmp_path)
    # two at once, with the same options: the first starts the system, the second reports that or finds it complete
    with up.start("first") as first, up.start("first") as second:
        outcomes = sorted((each.wait(2 * LIMIT), each.stdout + each.stderr) for each in (first, second))
    try:
        assert outcomes[0][0] == 0
        assert outcomes[0][1].startswith(("up at", "up already at"))
        assert outcomes[1][0] == 0 or "another `larpixdaq up` is starting" in outcomes[1][1]
        before = up.running("first")
        # the ports belong to another system
        status, words = up.run("second")
        assert status == 1
        assert f"another core answers at {up.core}: process {before['core']} of " in words
        assert str(tmp_path / "first" / "state") in words
        assert up.running("second") == {}
        # a component has died, and the supervisor
        up.kill_supervisor("first")
        os.kill(before["offline_storage"], signal.SIGKILL)
        until(lambda: start_time(before["offline_storage"]) is None, "the storage to be dead")
        status, words = up.run("first")
        assert (status, words) == (0, f"up at {up.core}: started Offline storage; 4 others were running\n")
        after = up.running("first")
        assert {name for name in before if before[name] != after[name]} == {"offline_storage"}
        assert up.run("first") == (0, f"up already at {up.core}: all 5 processes are running\n")
        status, words = up.run("first", "--io-groups", "2")
        assert status == 1
        assert "producer runs with " in words
    finally:
        up.down("first")


def test_up_gives_the_core_a_file_of_alarms(tmp_path):
    up = Up(tmp_path)
    file = tmp_path / "alarms.toml"
    file.write_text("[alarms]\nhold-of = 1.0\n")
    status, words = up.run("first", "--alarms", file)
    assert (status, up.running("first")) == (1, {})
    assert words.endswith(f"{file}: [alarms]: unknown key 'hold-of'; did you mean hold-off?\n")
    assert up.run("first", "--alarms", tmp_path / "none")[0] == 1
    file.write_text("[alarms]\noff = ['rate']\n")
    assert up.run("first", "--alarms", file)[0] == 0
    try:
        with Operator(up.core) as operator:
            assert operator.status().result(LIMIT)["alarm_state"]["off"] == ["rate"]
        assert up.run("first", "--alarms", file) == (0, f"up already at {up.core}: all 5 processes are running\n")
        file.write_text("[alarms]\noff = []\n")
        status, words = up.run("first", "--alarms", file)
        assert status == 1
        assert "core runs with " in words
    finally:
        up.down("first")


def test_up_does_not_take_the_place_of_a_component_of_another_user(tmp_path):
    up = Up(tmp_path)
    assert up.run("first")[0] == 0
    try:
        before = up.running("first")
        up.kill_supervisor("first")
        os.kill(before["run_data"], signal.SIGTERM)
        until(lambda: start_time(before["run_data"]) is None, "the monitor to be gone")
        with Process("larpixdaq.run_data", "--core", up.core, directory=tmp_path / "stranger") as stranger:
            with Operator(up.core) as operator:
                until(lambda: any(c["info"]["pid"] == stranger.popen.pid for c in operator.components().result(LIMIT)),
                      "the other monitor to be registered")  # fmt: skip
            status, words = up.run("first")
        assert status == 1
        assert f"is in use by a monitor (process {stranger.popen.pid} on " in words
        assert {name for name, pid in up.running("first").items() if pid == before[name]} == set(before) - {"run_data"}
        with Operator(up.core) as operator:
            operator.prepare_run().result(LIMIT)
            operator.begin_run().result(LIMIT)
    finally:
        said = up.down("first")  # during a run
    catalogue = Catalogue(tmp_path / "first" / "state")
    run = catalogue.find()
    catalogue.close()
    assert (run.condition, len(run.files)) == ("ABORTED", 1)
    assert said.endswith("core; run 1 was aborted\n")


USER = pwd.getpwuid(65534)
SHIPPED = "[Login]\n#KillUserProcesses=no\n#RemoveIPC=yes\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"etc/systemd/logind.conf": SHIPPED}, True),
        ({"usr/lib/systemd/logind.conf": SHIPPED, "etc/systemd/logind.conf": "RemoveIPC=no"}, False),
        ({"etc/systemd/logind.conf": SHIPPED.replace("IPC=yes", "IPC=no")}, False),  # the built-in default, of RHEL
        ({"etc/systemd/logind.conf": "#RemoveIPC=no\nRemoveIPC = yes\n"}, True),
        ({"etc/systemd/logind.conf": "RemoveIPC=yes", "etc/systemd/logind.conf.d/50.conf": "RemoveIPC=off"}, False),
        ({"run/systemd/logind.conf.d/50.conf": "RemoveIPC=0", "etc/systemd/logind.conf.d/50.conf": "[Login]"}, True),
        ({f"var/lib/systemd/linger/{USER.pw_name}": ""}, False),
        ({"etc/login.defs": f"SYS_UID_MAX {USER.pw_uid}\n"}, False),
    ],
)
def test_logind_settings_that_remove_rings(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert not logind_removes_files(Path("/dev/shm"), USER.pw_uid, tmp_path)  # logind does not run there
    (tmp_path / "run/systemd/users").mkdir(parents=True)
    assert logind_removes_files(Path("/dev/shm/rings"), USER.pw_uid, tmp_path) is expected
    assert not logind_removes_files(Path("/tmp"), USER.pw_uid, tmp_path)
    assert not logind_removes_files(Path("/dev/shm"), 0, tmp_path)


def test_up_warns_where_logind_removes_rings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detector, "logind_removes_files", lambda directory, uid: directory == tmp_path)
    arguments = (
        "--state-dir",
        str(tmp_path),
        "-o",
        str(tmp_path),
        "--ring-dir",
        str(tmp_path),
        "--pacman",
        "no address:",
    )
    assert main(["up", *arguments]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "systemd-logind removes the ring's file" in warning
    assert "no address" in error
