"""`larpixdaq up detector.toml`: real processes of a file, kept running by a supervisor, changed by the same command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from detector import Detector, detector
from emulated_board import Emulator
from network import Network, missing_rights
from processes import LIMIT, Process, free_port, until

from larpixdaq.hdf5.verify import verify
from larpixdaq.operator import Operator
from larpixdaq.runtime.launcher import is_running, start_time


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Detector]:
    with detector(tmp_path) as made:
        yield made


def free_ports(number: int) -> list[int]:
    found: set[int] = set()
    while len(found) < number:
        found.add(free_port())
    return sorted(found)


def test_a_detector_of_eight_boards_runs_and_changes(made: Detector) -> None:
    ports = free_ports(16)
    tables = [
        f'[boards.module{group}]\naddress = "127.0.0.1:{data}:{command}"\nio-group = {group}\n'
        for group, (data, command) in enumerate(zip(ports[:8], ports[8:], strict=True), 1)
    ]
    options = f"io-groups = 8\nrate = 100\ndata-port = {ports[:8]}\ncommand-port = {ports[8:]}\n"
    tables.append(f"[emulators.rack]\n{options}[storages.disk]\nrotate = ['1h']\nmodule = 'rack 1'\n[monitors.rates]\n")
    north = made.producer("north", f"boards = {[f'module{group}' for group in range(1, 9)]}")
    made.write(*tables, north)
    assert made.up() == (
        0, f"detector.toml: up at {made.core}; the output of the processes is in {made.state / 'out'}\n"
    )  # fmt: skip
    first = made.pids()
    assert list(first) == ["core", "Log", "disk", "rates", "rack", "north"]
    with Operator(made.core) as operator:

        def producer() -> Any:
            (found,) = (c for c in operator.components().result(LIMIT) if c["kind"] == "producer")
            return found

        assert producer()["info"]["io_groups"] == list(range(1, 9))
        modules = {component["name"]: component["module"] for component in operator.components().result(LIMIT)}
        assert (modules["disk"], modules["north"]) == ("rack 1", "")
        until(lambda: producer()["status"].get("outside_run"), "packets of the emulated boards")
    # the same again changes nothing
    assert made.up() == (0, f"detector.toml: up already at {made.core}: all 6 processes are running\n")
    assert made.pids() == first
    # a changed producer alone is restarted, a further one started, the monitor ended
    made.write(*(t.replace("[monitors.rates]", "[monitors]") for t in tables), north.replace("16MiB", "17MiB"),
               made.producer("south", "fake = 10"))  # fmt: skip
    status, words = made.up()
    assert (status, words) == (
        0, f"detector.toml: up at {made.core}: started south; restarted north; ended rates; 4 others were running\n"
    )  # fmt: skip
    second = made.pids()
    assert {name for name in second if first.get(name) == second[name]} == {"core", "Log", "disk", "rack"}
    assert start_time(first["rates"]) is None
    assert not [path for path in made.data.iterdir() if path.suffix == ".part"]
    made.await_back("rack", made.kill("rack"))
    assert made.run("down", made.path) == (0, "ended Supervisor, south, north, rack, disk, Log, core\n")
    assert made.run("down", made.path)[0] == 1
    assert not any(map(start_time, second.values()))


def test_nothing_is_changed_in_a_run_without_force(made: Detector) -> None:
    south = made.producer("south", "fake = 10")
    made.write("[monitors]\n", made.producer("north", "fake = 10"), south)
    assert made.up()[0] == 0
    first = made.pids()
    with Operator(made.core) as operator:
        operator.prepare_run().result(LIMIT)
        made.write("[monitors]\n", made.producer("north", "fake = 20"))
        status, words = made.up()
        assert status == 1
        assert "not changed: north, south: run 1 is in progress: give the same command after the run, or now" in words
        assert made.pids() == first
        operator.end_run().result(LIMIT)
        assert made.up()[1].endswith("restarted north; ended south; 3 others were running\n")
        operator.prepare_run().result(LIMIT)
        made.write("[monitors]\n", made.producer("north", "fake = 30"))
        assert made.up("--force")[1].endswith("restarted north; 3 others were running\n")


def test_processes_come_back_and_the_run_is_complete(made: Detector) -> None:
    """Every kind is killed in a run with lossless boards; the supervisor, too."""
    with closing(Emulator("--io-groups", "2", "--rate", "20000", "--wait-for-go", "--lossless")) as boards:
        made.write(made.producer("LArPix board", f"pacman = {boards.addresses}", "64MiB"))
        assert made.up()[0] == 0
        with Operator(made.core) as operator:
            operator.prepare_run().result(LIMIT)
            operator.begin_run().result(LIMIT)
            boards.go()
            for name in ("Offline storage", "Online monitor", "Log", "core"):
                made.await_back(name, made.kill(name))
            # without a supervisor everything goes on; `up` starts another one, which adopts the processes
            pids, dead = made.pids(), made.supervisor()
            os.kill(dead.pid, signal.SIGKILL)
            until(lambda: not is_running(dead), "the supervisor to be dead")
            status = made.run("status", "--core", made.core)
            assert "Supervisor" in status[1]
            assert made.up() == (0, f"detector.toml: up already at {made.core}: all 5 processes are running\n")
            assert made.pids() == pids
            killed = made.kill("LArPix board")  # a process that the new supervisor did not start
            entry = made.await_back("LArPix board", killed)
            assert (entry.restarts, entry.last_exit) == (1, "ended")
            made.await_back("LArPix board", made.kill("LArPix board"))
            assert made.entries()["LArPix board"].last_exit == "was killed by SIGKILL"
            until(lambda: "was started again 2 times, last: it was killed by SIGKILL"
                  in made.run("status", "--core", made.core)[1], "the restarts in the status")  # fmt: skip
            boards.stop()
            sent = boards.finish()["sent"]
            ended = operator.end_run().result(LIMIT)
    assert ended["condition"].startswith("COMPLETE")
    assert [verify(Path(file)).findings for file in ended["files"]] == [[] for _ in ended["files"]]
    assert ended["stored"] > sum(counts["words"] for counts in sent.values()) / 2
    assert (
        "Offline storage was killed by SIGKILL: without a word; it is started again now"
        in (made.state / "log.txt").read_text()
    )


def test_what_does_not_start_leaves_everything_as_it_was(made: Detector) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        good = made.producer("north", "fake = 10")
        bad = good + f'address = "tcp://127.0.0.1:{port}"\n'
        made.write(bad)
        status, words = made.up()
        assert status == 1
        assert f"north ended with status 1: producer.py: --address tcp://127.0.0.1:{port}: Address already" in words
        assert made.entries() == {}
        made.write(good)
        assert made.up()[0] == 0
        before = made.pids()
        made.write(bad)
        status, words = made.up()
        assert (status, len(words.splitlines())) == (1, 1)
        entry = until(lambda: (e := made.entries().get("north")) and e.registered and e, "the producer as it was")
        assert "--address" not in " ".join(entry.arguments)
        assert {name: pid for name, pid in made.pids().items() if name != "north"} == {
            name: pid for name, pid in before.items() if name != "north"
        }


def test_a_process_that_dies_at_each_start_is_given_up(made: Detector) -> None:
    """With its last line, and tried again by the next `up`. Here there is no pause between the starts."""
    made.write(made.producer("north", "fake = 10"), made.producer("south", "fake = 100\nio-groups = 2"))
    assert made.up()[0] == 0
    supervisor = made.supervisor()
    os.kill(supervisor.pid, signal.SIGKILL)
    until(lambda: not is_running(supervisor), "the supervisor to be dead")
    hurry = "import sys, larpixdaq.supervisor as s; s.DELAYS = (0.0, 0.01); sys.exit(s.main(sys.argv[1:]))"
    with open(made.folder / "hurry.out", "wb") as out:
        other = subprocess.Popen([sys.executable, "-c", hurry, "--state-dir", str(made.state)], stdout=out, stderr=out)
    try:
        until(lambda: made.supervisor().pid == other.pid, "the other supervisor")
        ring_dir = Path(made.ring_dir)
        ring_dir.chmod(0o500)
        moved = ring_dir.rename(f"{ring_dir}-moved")
        made.kill("north")
        given_up = until(lambda: (e := made.entries()["north"]).state == "given up" and e, "the end", 3 * LIMIT)
        moved.rename(ring_dir).chmod(0o700)
        assert given_up.failures == 10
        assert "--ring-dir" in given_up.last_line
        words = until(lambda: "GIVEN UP: north: ended with status 1: " in (
            out := made.run("status", "--core", made.core))[1] and out, "the status")  # fmt: skip
        assert words[0] == 1
        assert made.entries()["south"].registered
        assert made.up()[1].endswith(": started north; 5 others were running\n")
        assert made.entries()["north"].failures == 0
    finally:
        other.terminate()
        other.wait(LIMIT)


def test_the_unit_of_systemd_brings_a_detector_back(made: Detector) -> None:
    """The commands of the unit, run as systemd runs them: start, death of the supervisor, power cut, stop."""
    made.write(made.producer("north", "fake = 10"))
    status, text = made.up("--systemd")
    assert status == 0
    if shutil.which("systemd-analyze") is not None:
        (made.folder / "larpixdaq.service").write_text(text)
        words = subprocess.run(
            ["systemd-analyze", "verify", made.folder / "larpixdaq.service"],
            capture_output=True,
            check=True,
            timeout=60,
        )
        assert (words.stdout, words.stderr) == (b"", b"")
    unit = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert (unit["Type"], unit["KillMode"], unit["Restart"]) == ("notify", "process", "always")
    address = str(made.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(LIMIT)

        def start() -> subprocess.Popen[bytes]:
            with open(made.folder / "service.out", "ab") as out:
                process = subprocess.Popen(
                    shlex.split(unit["ExecStart"]), cwd="/", env={**os.environ, "NOTIFY_SOCKET": address},
                    stdout=out, stderr=out,
                )  # fmt: skip
            assert systemd.recv(100) == b"READY=1"
            until(lambda: made.supervisor().pid == process.pid, "the new supervisor")
            until(lambda: made.entries() and all(e.registered for e in made.entries().values()), "all to be registered")
            return process

        service = start()
        try:
            first = made.pids()
            service.kill()
            service.wait(LIMIT)
            service = start()
            assert made.pids() == first
            for pid in (service.pid, *first.values()):  # a power cut
                os.kill(pid, signal.SIGKILL)
            service.wait(LIMIT)
            until(lambda: not any(map(start_time, first.values())), "the processes to be dead")
            service = start()
            assert not set(made.pids().values()) & set(first.values())
            done = subprocess.run(shlex.split(unit["ExecStop"]), cwd="/", check=False, timeout=3 * LIMIT)
            assert done.returncode == 0
            assert service.wait(LIMIT) == 0
            assert made.entries() == {}
        finally:
            service.kill()
            service.wait(LIMIT)


def test_wrong_uses_have_one_line(made: Detector) -> None:
    good = made.producer("north", "fake = 10")
    hosts = '[hosts.here]\naddress = "198.51.100.1"\n[hosts.there]\naddress = "198.51.100.2"\n'
    for tables, arguments, status, words in (
        ([good], ["--pacman", "x"], 2, "--pacman: with a configuration file, all options of the processes are in"),
        ([good], ["--host", "there"], 1, "--host there: no such host; the hosts are none"),
        ([hosts, good], [], 1, "of the hosts here, there, none is this machine"),
        ([good.replace("16MiB", "x")], [], 1, "detector.toml:10: producers.north.ring: size 'x'"),
        (["[storages.a]\noutput-dir = 'gone'", good], [], 1, "detector.toml:9: storages.a.output-dir: no such dir"),
    ):
        made.write(*tables)
        found, text = made.up(*arguments)
        assert (found, words in text) == (status, True), text
        assert len(text.splitlines()) == 1 or status == 2
        assert made.entries() == {}
    assert made.run("up", "--fake", "--force")[0] == 2
    assert "one of the arguments --serial" in made.run("up", "-o", made.data)[1]


@pytest.mark.timeout(300)
def test_three_hosts_of_one_file(tmp_path: Path) -> None:
    """Each host starts its own part; the components of others than the core's have invitations, as docs/operate.md
    says."""
    if reason := missing_rights():
        pytest.skip(reason)
    names = "daq1", "daq2", "daq3"
    with closing(Network(*names)) as net, net.inside("daq1"), detector(tmp_path, net.address("daq1")) as made:
        states = {name: f"state-{name}" for name in names} | {"daq1": "state"}
        hosts = [
            f'[hosts.{name}]\naddress = "{net.address(name)}"\nstate-dir = "{state}"\n'
            for name, state in states.items()
        ]
        made.ring_dir = str(tmp_path)  # because the other hosts do not have the /dev/shm of this one
        storage = '[storages.disk]\nhost = "daq2"\n[monitors."far rates"]\nhost = "daq2"\n'
        made.write(*hosts, storage, made.producer("north", 'host = "daq3"\nfake = 1000'))
        far = {
            name: {"prefix": net.prefix(name), "env": {"XDG_STATE_HOME": str(tmp_path / f"home of {name}")}}
            for name in names[1:]
        }
        status, words = made.up(**far["daq2"])
        assert (status, len(words.splitlines())) == (1, 1)
        assert "daq2 has no keys for disk, far rates, Supervisor daq2: `larpixdaq keys invite detector.toml " in words
        assert made.up()[1].startswith(f"detector.toml on daq1: up at {made.core}; ")
        with Operator(made.core) as operator:
            invite = "keys", "invite", made.path, "--host"
            for host, members in (("daq2", "disk, far rates, Supervisor daq2"), ("daq3", "north, Supervisor daq3")):
                status, words = made.run(*invite, host)
                assert (status, words.splitlines()[-1]) == (0, f"it is for {members}"), words
                token = words.splitlines()[0].removeprefix("larpixdaq keys join ")
                status, words = made.run("keys", "join", token, **far[host])
                assert (status, words.count("joined as component ")) == (0, members.count(",") + 1), words
                status, words = made.run("keys", "join", token, **far[host])
                assert (status, words.count(" was used ")) == (1, members.count(",") + 1), words
            operator.revoke("far rates").result(LIMIT)
            status, words = made.run(*invite, "daq2")
            assert words.endswith("it is for far rates; disk, Supervisor daq2 have keys already\n")
            assert made.run("keys", "join", words.split()[3], **far["daq2"])[0] == 0
            assert "all components of daq3 have keys: north, Supervisor daq3; " in made.run(*invite, "daq3")[1]
            assert "daq1 is the host of the core" in made.run(*invite, "daq1")[1]
            for host in names[1:]:
                assert (told := made.up(**far[host]))[0] == 0, told
            components = operator.components().result(LIMIT)
            assert {c["name"] for c in components if c["alive"]} == {
                "Log", "disk", "far rates", "north", *(f"Supervisor {name}" for name in names),
            }  # fmt: skip
            operator.prepare_run().result(LIMIT)
            operator.begin_run().result(LIMIT)
            assert made.up(**far["daq2"])[1].endswith("all 2 processes are running\n")
            made.write(*hosts, storage, made.producer("north", 'host = "daq3"\nfake = 2000'))
            assert "not changed: north: run 1 is in progress" in made.up(**far["daq3"])[1]
            assert operator.end_run().result(LIMIT)["condition"] == "COMPLETE"


def test_the_examples_of_the_documentation(made: Detector) -> None:
    """Those of docs/operate.md, with other ports, and with the emulated board of the page."""
    first, emulator, modules, generations, settings, hosts = re.findall(
        r"^```toml\n(.*?)^```$", (Path(__file__).parents[2] / "docs" / "operate.md").read_text(), re.M | re.S
    )
    data, command = free_ports(2)
    emulated = first.replace("pacman.local", f"127.0.0.1:{data}:{command}") + f"ring-dir = '{made.ring_dir}'\n"
    emulated += f"{emulator}data-port = [{data}]\ncommand-port = [{command}]\nlossless = true\n"
    own = made.head.replace('[detector]\nstate-dir = "state"\noutput-dir = "data"\n', "")
    for text in (first, emulated):
        made.path.write_text(text.replace("[detector]", '[detector]\nstate-dir = "state"') + own)
        assert made.run("config", made.path)[0] == 0
    assert made.up()[1].startswith("test stand: up at ")
    assert made.run("status", "--core", made.core)[0] == 0
    status, words = made.run("run", "--core", made.core, "--duration", "1s")
    assert status == 0, words
    assert re.search("run 1: COMPLETE, [1-9] s, ", words), words
    assert made.run("down", made.path)[0] == 0
    made.path.write_text(modules)
    status, commands = made.run("config", made.path, "--commands", "--host", "daq3")
    assert (status, re.findall(r"--module=([\w ]+)", commands)) == (0, ["module 3", "spare boards"])
    for text in (generations, f'{settings}[producers.v2b]\nboards = ["module2"]\n'):
        made.path.write_text(text)
        assert made.run("config", made.path)[0] == 0
    made.path.write_text(hosts)
    status, commands = made.run("config", made.path, "--commands", "--host", "daq2")
    assert (status, len(commands.splitlines())) == (0, 2)
    assert "--core=tcp://daq1.lab:5551" in commands


def test_the_supervisor_needs_a_plan_and_is_alone(made: Detector) -> None:
    made.state.mkdir()
    with Process("larpixdaq.supervisor", "--state-dir", made.state, directory=made.folder / "output") as process:
        assert process.wait() == 1
        assert "there is no plan in" in process.stderr
    made.write(made.producer("north", "fake = 10"))
    assert made.up()[0] == 0
    with Process("larpixdaq.supervisor", "--state-dir", made.state, directory=made.folder / "output") as process:
        assert process.wait() == 1
        assert "another supervisor runs" in process.stderr
    pids = made.supervisor().pid, *made.pids().values()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(start_time, pids)), "all to be dead")
    assert made.run("down", made.path) == (
        0,
        "nothing was running any more; not running: Supervisor, north, Online monitor, Offline storage, Log, core\n",
    )


def test_other_alarms_are_for_the_core_which_reads_a_copy_of_them(made: Detector) -> None:
    producer = made.producer("LArPix board", "fake = 10")
    made.write(producer)
    assert made.up()[0] == 0
    first, raised = made.pids(), made.folder / "raised"
    made.write(producer, f"[alarms]\ncommand = [{{argv = ['/bin/cp', '/dev/stdin', '{raised}']}}]\n")
    status, words = made.up()
    assert status == 0
    assert "restarted core; " in words
    (copy,) = made.state.glob("alarms-*.toml")
    assert copy.read_bytes() == made.path.read_bytes()
    second = made.pids()
    assert {name for name in first if first[name] != second[name]} == {"core"}
    os.kill(second["Log"], signal.SIGKILL)
    until(lambda: raised.exists() and raised.read_bytes(), "the command of an alarm")
