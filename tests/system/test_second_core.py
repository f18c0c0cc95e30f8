"""A second core that takes over from the first one, with real brokers and processes."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from brokers import Brokers, brokers
from processes import LIMIT, Process, free_port, until
from stream_log import brokers_of
from system import System, rows_of

from larpixdaq.cli.detector import PROGRAMS
from larpixdaq.core import Core, show_active
from larpixdaq.detector_config import DetectorConfig
from larpixdaq.errors import ComponentError, ConfigError, NoCore
from larpixdaq.hdf5.verify import verify
from larpixdaq.keys import credentials
from larpixdaq.keys.key_store import KeyStore
from larpixdaq.operator import Operator
from larpixdaq.stream.lease import Bucket

#: Seconds until the second core has taken over a run, with what a busy test machine adds to 15.
TAKEOVER = 20.0


class Pair(System):
    """A system with two cores, `first` and `second`, which know each other by the brokers."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, broker: Brokers) -> None:
        super().__init__(folder, stack)
        self.broker = broker
        self.addresses = {name: f"tcp://127.0.0.1:{free_port()}" for name in ("first", "second")}
        self.core = ",".join(self.addresses.values())

    def launch_one(self, name: str, *more: object) -> Process:
        where = ("--address", self.addresses[name], "--log-address", self.log, "--state-dir", self.folder / name)
        return self.launch("core", *where, "--stream", self.broker.urls, *more, key=name)

    def launch_core(self) -> Process:
        """Start both cores, the first one as the active one, with the same key store."""
        first = self.launch_one("first", "--standby")
        self.operator_of("first").close()
        shutil.copytree(self.folder / "first" / "keys", self.folder / "second" / "keys")
        (self.folder / "second").chmod(0o700)
        self.processes["core"] = first  # as System knows it
        second = self.launch_one("second", "--standby")
        until(lambda: f"on standby: the core at {self.addresses['first']}" in second.stderr, "the second to wait")
        return first

    def operator_of(self, name: str, timeout: float = LIMIT) -> Operator:
        return Operator(self.addresses[name], timeout=timeout)

    def state(self, operator: Operator) -> Any:
        with contextlib.suppress(NoCore, ComponentError):
            return operator.state().result(LIMIT)
        return None

    def await_second(self, operator: Operator) -> None:
        until(lambda: self.addresses["second"] in repr(operator), "the Operator to find the second core", TAKEOVER)
        until(lambda: self.state(operator) == "RUN", "the run to go on", TAKEOVER)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with brokers(1) as broker, contextlib.ExitStack() as stack:
        line = Pair(tmp_path, stack, broker)
        try:
            yield line
        finally:
            line.terminate_all()


def begin(line: Pair) -> tuple[Operator, int]:
    operator = line.start("--fake", "20000")
    run = operator.prepare_run(comment="two cores").result(LIMIT)["run"]
    operator.begin_run().result(LIMIT)
    operator.comment("by the first core").result(LIMIT)
    return operator, run


def end(line: Pair, operator: Operator) -> dict[str, Any]:
    """End a run that must be complete, and return the core's report."""
    ended: dict[str, Any] = operator.end_run().result(LIMIT)
    assert (ended["condition"], ended["reasons"]) == ("COMPLETE", [])
    (path,) = ended["files"]
    assert verify(Path(path)).ok
    assert ended["rows"] == ended["stored"]
    assert len(rows_of(path)) >= ended["rows"] > 0
    return ended


def test_second_core_goes_on_with_the_run_of_a_killed_one(pair: Pair) -> None:
    operator, run = begin(pair)
    text = f"second core: on standby at {pair.addresses['second']}"
    until(lambda: text in operator.status().readable(LIMIT), "the second core in the status")
    pair.processes["first"].kill()
    del pair.processes["first"], pair.processes["core"]
    pair.await_second(operator)
    pair.await_kinds(operator, "storage", "producer", "run_data")
    operator.comment("by the second core").result(LIMIT)
    ended = end(pair, operator)
    assert ended["run"] == run
    text = "NO SECOND CORE is on standby"
    until(lambda: text in operator.status().readable(LIMIT), "its absence in the status")
    texts = [comment["text"] for comment in operator.run_info(run).result(LIMIT)["comments"]]
    assert texts == ["by the first core", "by the second core"]
    assert operator.prepare_run().result(LIMIT)["run"] == run + 1
    # The first one comes back, waits, and takes over in its turn.
    first = pair.launch_one("first", "--standby")
    until(lambda: f"on standby: the core at {pair.addresses['second']}" in first.stderr, "the first to wait")
    pair.processes["second"].stop()
    del pair.processes["second"]
    until(lambda: pair.addresses["first"] in repr(operator), "the first core again", TAKEOVER)
    until(lambda: pair.state(operator) == "READY", "the state of the second core's run")
    pair.await_kinds(operator, "storage", "producer", "run_data")
    operator.begin_run().result(LIMIT)
    assert end(pair, operator)["run"] == run + 1


def test_core_that_stood_still_is_not_active_when_it_goes_on(pair: Pair) -> None:
    operator, run = begin(pair)
    first = pair.processes["first"]
    with pair.operator_of("first") as old:
        first.popen.send_signal(signal.SIGSTOP)
        request = old.end_run()  # waits in the socket of the first core
        pair.await_second(operator)
        first.popen.send_signal(signal.SIGCONT)
        until(lambda: "has taken over, this one is on standby" in first.stderr, "the first to step down")
        with pytest.raises((NoCore, ComponentError)):
            request.result(LIMIT)
    with pytest.raises(NoCore):
        pair.operator_of("first", timeout=1.0)
    assert pair.state(operator) == "RUN"
    assert end(pair, operator)["run"] == run


def test_without_brokers_the_core_stands_still_and_the_run_goes_on(pair: Pair) -> None:
    operator, run = begin(pair)
    first, second = pair.processes["first"], pair.processes["second"]
    pair.broker.kill(0)
    until(lambda: "does nothing until the brokers answer" in first.stderr, "the core to stand still", TAKEOVER)
    with pytest.raises(NoCore):
        pair.operator_of("first", timeout=1.0)
    pair.broker.start(0)
    until(lambda: "the core goes on" in first.stderr, "the core to go on")
    assert first.stderr.count("does nothing until") == 1
    until(lambda: pair.state(operator) == "RUN", "the run")
    assert end(pair, operator)["run"] == run
    assert "on standby" not in first.stderr
    assert second.popen.poll() is None


def test_core_without_standby_does_not_wait_for_a_living_one(pair: Pair) -> None:
    pair.launch_one("first")
    pair.operator_of("first").close()
    second = pair.launch_one("second")
    assert second.wait() == 1
    assert "has another key than this one: copy its key store" in second.stderr
    with contextlib.closing(Bucket(brokers_of(pair.broker), "test")) as bucket:
        assert bucket.get(["core.waits"]) == [None]  # so that no status shows it as on standby
    shutil.copy(pair.folder / "first" / "keys" / "core.json", pair.folder / "second" / "keys" / "core.json")
    second = pair.launch_one("second")
    assert second.wait() == 1
    assert f"the core at {pair.addresses['first']}" in second.stderr
    assert "is active; --standby waits until it has died" in second.stderr
    assert len(second.stderr.splitlines()) == 2  # also that it waits


def test_restarted_core_waits_for_its_own_old_lease(pair: Pair) -> None:
    first = pair.launch_one("first")
    pair.operator_of("first").close()
    first.kill()
    again = pair.launch_one("first")
    pair.operator_of("first").close()
    assert "on standby" not in again.stderr  # nor that the dead one is active


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--standby"], "--standby: expected --stream with it"),
        (["--stream", "tcp://here"], "expected nats://"),
        (["--stream", "nats://127.0.0.1:1"], "no broker"),
    ],
)
def test_unusable_options_are_one_clear_line(tmp_path: Path, options: list[str], says: str) -> None:
    with Process("larpixdaq.core", *options, "--state-dir", tmp_path / "state", directory=tmp_path) as core:
        assert core.wait() in (1, 2)
        assert says in core.stderr
        assert len(core.stderr.splitlines()) == 1


CONFIGURATION = """\
[hosts.daq1]
address = "10.0.0.1"
[hosts.daq2]
address = "10.0.0.2"
[standby]
host = "daq2"
[alarms]
[detector]
stream = "nats://10.0.0.3"
[producers.north]
host = "daq2"
fake = 1
"""


def load(folder: Path, text: str) -> DetectorConfig:
    (folder / "detector.toml").write_text(text)
    return DetectorConfig(folder / "detector.toml", PROGRAMS)


def test_configuration_file_names_the_second_core(tmp_path: Path) -> None:
    file = load(tmp_path, CONFIGURATION)
    core, log, *_ = file.wanted("daq1")
    standby, north = file.wanted("daq2")
    assert (core.name, standby.name, standby.module) == ("core", "standby", "core")
    for process, host in ((core, 1), (standby, 2)):
        assert f"--address=tcp://10.0.0.{host}" in process.arguments
        assert {"--stream=nats://10.0.0.3", "--standby"} <= set(process.arguments)
    for process in (log, north):
        assert process.arguments[0] == "--core=tcp://10.0.0.1:5551,tcp://10.0.0.2:5551"
    assert load(tmp_path, CONFIGURATION.replace('[standby]\nhost = "daq2"\n', "")).wanted("daq1")[0].arguments == [
        "--log-address=tcp://10.0.0.1:5678", "--address=tcp://10.0.0.1",
    ]  # fmt: skip


def test_second_core_without_brokers_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"detector.toml:5: standby: needs the brokers of a table \[brokers\], or"):
        load(tmp_path, CONFIGURATION.replace('stream = "nats://10.0.0.3"', ""))
    with pytest.raises(
        ConfigError, match=r"detector.toml:6: standby.host: expected another host than that of the core"
    ):
        load(tmp_path, CONFIGURATION.replace('[standby]\nhost = "daq2"', '[standby]\nhost = "daq1"'))


def test_key_of_one_core_is_found_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    own = credentials.Credentials("tcp://10.0.0.1:5551", *["k" * 40] * 3, "north", "component")
    credentials.write(credentials.joined_file(own.address, own.name), own)
    assert credentials.find("tcp://10.0.0.1:5551,tcp://10.0.0.2:5551", "north") == own
    assert credentials.find("tcp://10.0.0.2:5551,tcp://10.0.0.1:5551", "north") == own
    assert credentials.find("tcp://10.0.0.2:5551", "north") is None


def test_user_on_the_host_of_the_standby_finds_the_key_of_the_active_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    keys = KeyStore(tmp_path)
    remove = show_active({"core": "tcp://10.0.0.1:5551"}, keys)
    found = credentials.find("tcp://10.0.0.2:5551,tcp://10.0.0.1:5551")
    assert found is not None
    assert (found.server, found.pair) == (keys.server.public, keys.owner)
    remove()
    assert credentials.find("tcp://10.0.0.2:5551,tcp://10.0.0.1:5551") is None


def test_operator_goes_to_the_address_that_answers(running: Core) -> None:
    dead = f"tcp://127.0.0.1:{free_port()}"
    with Operator(f"{dead},{running.address}") as operator:
        assert operator.state().result(LIMIT) == "STOP"
        assert running.address in repr(operator)
    with pytest.raises(NoCore, match=r"^no core answers at tcp://\[::1\]:1 or tcp://\[::1\]:2 "):
        Operator("[::1]:1, [::1]:2", timeout=0.2)
