"""Who has no key, or not the right one, changes nothing. Another state directory stands for another user or host."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from processes import LIMIT, Process, free_port, until
from raw_sockets import Context, use_key
from system import System, system
from wall_clock import Clock

from larpixdaq.control.catalogue import read_audit
from larpixdaq.control.display import status_lines
from larpixdaq.control.log_shipping import LogRecord
from larpixdaq.errors import ComponentError, NoCore, NotAllowed, RequestError
from larpixdaq.hdf5.verify import verify
from larpixdaq.keys import credentials
from larpixdaq.keys.curve import Handshakes, connect_with, new_pair
from larpixdaq.keys.peer_limits import OPEN
from larpixdaq.operator import Operator
from larpixdaq.protocol.control import Open, Register, pack, unpack_core
from larpixdaq.protocol.stream import STREAM_VERSION, Ack, Hello, Refused, unpack_producer
from larpixdaq.protocol.stream import pack as pack_frame


class Other:
    """Another user, or the same one on another host: with an own state directory, and at first without a key."""

    def __init__(self, folder: Path, core: str) -> None:
        self.folder, self.core = folder, core
        self.env = {"XDG_STATE_HOME": str(folder)}
        folder.mkdir()

    def run(self, module: str, *arguments: object, status: int = 1) -> str:
        """Run a program to its end, and return what it has printed."""
        with Process(f"larpixdaq.{module}", *arguments, directory=self.folder / "out", env=self.env) as process:
            assert process.wait() == status, process.stderr
            return process.stdout + process.stderr

    @contextlib.contextmanager
    def here(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Be this user in the process of the test."""
        with monkeypatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self.folder))
            yield

    def join(self, operator: Operator, name: str, role: str) -> str:
        """Invite this user and join; returns the token."""
        token: str = operator.invite(name, role).result(LIMIT)["token"]
        assert f"joined as {role} {name}" in self.run("cli", "keys", "join", token, status=0)
        return token


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(tmp_path_factory.mktemp("system")) as made:
        (made.folder / "state").mkdir(mode=0o755)
        made.start("--fake", "5000")
        made.launch_log()
        yield made


@pytest.fixture
def operator(line: System) -> Iterator[Operator]:
    with Operator(line.core, timeout=LIMIT) as operator:
        line.await_kinds(operator, "log", "storage", "run_data", "producer")
        yield operator


@pytest.fixture
def other(line: System, tmp_path: Path) -> Other:
    return Other(tmp_path / "other", line.core)


@pytest.fixture
def sockets() -> Iterator[zmq.Context[Any]]:
    context = Context()
    yield context
    context.destroy(0)


def dealer(context: zmq.Context[Any], kind: int = zmq.DEALER) -> Any:
    socket = context.socket(kind)
    socket.linger, socket.rcvtimeo, socket.sndtimeo, socket.immediate = 0, int(LIMIT * 1000), int(LIMIT * 1000), 1
    return socket


@contextlib.contextmanager
def complete_run(operator: Operator) -> Iterator[None]:
    """A run that must be complete, and whose file must be good, whatever happens in it."""
    operator.prepare_run().result(LIMIT)
    operator.begin_run().result(LIMIT)
    yield
    ended = operator.end_run().result(LIMIT)
    assert ended["condition"] == "COMPLETE", ended
    assert all(verify(Path(path)).ok for path in ended["files"])


def info_of(operator: Operator, kind: str) -> dict[str, Any]:
    (found,) = [c["info"] for c in operator.components().result(LIMIT) if c["kind"] == kind]
    return dict(found)


def test_a_user_without_a_key_gets_one_line_that_says_what_to_do(line, operator, other):
    says = other.run("cli", "status", "--core", line.core)
    assert (
        f"this user has no key for the core at {line.core}: its owner makes an invitation with `larpixdaq keys" in says
    )
    assert says.count("\n") == 1
    for module, *more in (
        ("run_data",),
        ("log", "--address", "tcp://127.0.0.1:0"),
        ("offline_storage", "-o", other.folder),
    ):
        assert "--role component`" in other.run(module, "--core", line.core, "--name", "New", *more)


def test_sockets_without_a_known_key_change_nothing_in_a_run(line, operator, sockets):
    stream, log = info_of(operator, "producer")["stream"], info_of(operator, "log")["log"]
    own = credentials.find(line.core)
    with complete_run(operator):
        for kind, address, server in ((zmq.DEALER, line.core, own.server), (zmq.DEALER, *stream), (zmq.PUSH, *log)):
            for pair, key in ((None, ""), (new_pair(), server), (own.pair, new_pair().public)):
                socket = dealer(sockets, kind)
                socket.sndtimeo = 300
                if pair is not None:
                    connect_with(socket, pair, key)
                socket.connect(address)
                with pytest.raises(zmq.Again):  # never connected
                    socket.send(pack(Register(name="Offline storage", kind="storage", instance="i")))
    until(lambda: "refused a connection from 127.0.0.1" in line.processes["core"].stderr, "the refusal")


def test_who_says_insecure_to_a_core_with_keys_is_told(line, operator, other):
    assert "uses keys: leave out --insecure" in other.run(
        "run_data", "--core", line.core, "--insecure", "--name", "New"
    )
    with pytest.raises(NotAllowed, match="uses keys"):
        Operator(line.core, insecure=True, timeout=LIMIT)


def test_an_observer_looks_and_changes_nothing(line, operator, other, monkeypatch):
    other.join(operator, "watcher", "observer")
    with other.here(monkeypatch), Operator(line.core, timeout=LIMIT) as observer:
        assert observer.state().result(LIMIT) == "STOP"
        assert observer.status().result(LIMIT)["insecure"] is False
        producer = "LArPix board"
        for request in (
            observer.prepare_run(), observer.abort_run(), observer.comment("x"), observer.take_control(),
            observer.release_control(), observer.call(producer, "power", on=True),
            observer.call("core", "set_shifter", name="x"), observer.attach(__file__),
            observer.call(producer, "run_routine"), observer.invite("more", "operator"), observer.revoke("watcher"),
            observer.keys(),
        ):  # fmt: skip
            with pytest.raises(NotAllowed, match=r"observer 'watcher'"):
                request.result(LIMIT)
    operator.revoke("watcher").result(LIMIT)


def test_an_operators_key_works_under_its_own_name_and_is_no_components(line, operator, other, monkeypatch):
    other.join(operator, "night", "operator")
    with other.here(monkeypatch), Operator(line.core, name="somebody else", timeout=LIMIT) as invited:
        assert invited.take_control().result(LIMIT)["by"] == "night"
        with pytest.raises(NotAllowed, match="keys are for the core's own user"):
            invited.invite("more", "operator").result(LIMIT)
        # It writes into the e-log, without control, under the shifter's name and that of its key.
        operator.take_control().result(LIMIT)
        run = operator.prepare_run().result(LIMIT)["run"]
        invited.comment("from another host", by="Zoë").result(LIMIT)
        assert invited.attach(__file__).result(LIMIT)["run"] == run
        (comment,) = operator.run_info(run).result(LIMIT)["comments"]
        assert (comment["by"], comment["operator"], comment["key"]) == ("Zoë", "night", "night")
        operator.abort_run().result(LIMIT)
        operator.release_control().result(LIMIT)
    assert "this user has no key" in other.run("run_data", "--core", line.core, "--name", "New")
    operator.revoke("night").result(LIMIT)


def test_a_components_key_registers_under_its_name_alone(line, operator, other, sockets):
    other.join(operator, "Second monitor", "component")
    with other_monitor(other, line.core):
        until(lambda: "Second monitor" in names(operator), "the monitor with its own key")
        rate = operator.packet_rate(channels=False, component="Second monitor")
        assert rate.result(LIMIT)["run"] is None
    pair = credentials.read(next(other.folder.rglob("*.key.json"))).pair
    socket = dealer(sockets)
    connect_with(socket, pair, credentials.find(line.core).server)
    socket.connect(line.core)
    for message in (Register(name="Offline storage", kind="storage", instance="i"), Open(name="o", instance="i")):
        socket.send(pack(message))
        assert unpack_core(socket.recv()).error == "not_allowed"
    operator.revoke("Second monitor").result(LIMIT)


def names(operator: Operator) -> list[str]:
    return [c["name"] for c in operator.components().result(LIMIT) if c["alive"]]


def other_monitor(other: Other, core: str) -> Process:
    arguments = ("--core", core, "--name", "Second monitor")
    return Process("larpixdaq.run_data", *arguments, directory=other.folder / "out", env=other.env)


def test_a_component_acknowledges_and_logs_under_no_other_name(line, operator, other, sockets):
    """With a valid key, at the producer and the log."""
    other.join(operator, "Second monitor", "component")
    pair = credentials.read(next(other.folder.rglob("*.key.json"))).pair
    address, server = info_of(operator, "producer")["stream"]
    with complete_run(operator):
        stream = dealer(sockets)
        connect_with(stream, pair, server)
        stream.connect(address)
        epoch = info_of(operator, "producer")["epoch"]
        for _ in range(2):  # the core's word on a new consumer may come after its first HELLO
            stream.send(pack_frame(Hello(STREAM_VERSION, "Offline storage", "made up", "all", [])))
        stream.send(pack_frame(Ack(1, epoch, 1 << 40)))
        answers = [unpack_producer(stream.recv(), "producer") for _ in range(2)]
        assert answers == [Refused("the core does not confirm the session of Offline storage"), Refused("hello")]
        address, server = info_of(operator, "log")["log"]
        push = dealer(sockets, zmq.PUSH)
        connect_with(push, pair, server)
        push.connect(address)
        refused = line.status_of(operator, "log")["refused"]
        push.send(msgspec.msgpack.encode(LogRecord(0.0, logging.ERROR, "LArPix board", "forged")))
        until(lambda: line.status_of(operator, "log")["refused"] > refused, "the record to be refused")
        watch = Handshakes(push)
        operator.revoke("Second monitor").result(LIMIT)
        until(watch.look, "the log to close the connection, and to refuse the next one")
        watch.close()
    assert "forged" not in Path(info_of(operator, "log")["file"]).read_text()


def test_what_one_key_does_too_much_is_limited_at_every_port_and_shown(line, operator, other, sockets):
    other.join(operator, "Second monitor", "component")
    pair = credentials.read(next(other.folder.rglob("*.key.json"))).pair
    core = line.core, credentials.find(line.core).server
    stream, log = info_of(operator, "producer")["stream"], info_of(operator, "log")["log"]
    record = msgspec.msgpack.encode(LogRecord(0.0, logging.ERROR, "Second monitor", "x" * 10_000))
    with complete_run(operator):
        opened = []
        for kind, (address, server) in ((zmq.DEALER, core), (zmq.DEALER, stream), (zmq.PUSH, log)):
            for _ in range(OPEN + 10):
                socket = dealer(sockets, kind)
                connect_with(socket, pair, server)
                socket.connect(address)
                opened.append((kind, socket))

        def flood() -> list[str]:
            for kind, socket in opened:
                with contextlib.suppress(zmq.Again):
                    socket.send(record if kind == zmq.PUSH else b"garbage", zmq.NOBLOCK)
            lines = status_lines(operator.status().result(LIMIT))
            return [text for text in lines if text.startswith("LIMIT at") and "Second monitor" in text]

        wanted = {("core", "open"), ("LArPix board", "open"), ("Log", "open"), ("Log", "bytes of lines a second")}
        until(
            lambda: all(any(f"at {where}:" in one and what in one for one in flood()) for where, what in wanted),
            "the limits in the status",
        )
    operator.revoke("Second monitor").result(LIMIT)
    rows = list(read_audit(line.folder / "state"))
    invalid = [row for row in rows if row.action == "invalid message"]
    assert {row.component for row in invalid} >= {"", "LArPix board"}
    assert any("Second monitor" in row.key for row in invalid)


def test_a_revoked_key_loses_its_connections(line, operator, other, monkeypatch):
    other.join(operator, "Second monitor", "component")
    with other_monitor(other, line.core) as process, complete_run(operator):
        until(lambda: "Second monitor" in names(operator), "the monitor")
        until(
            lambda: operator.packet_rate(channels=False, component="Second monitor").result(LIMIT)["packets"],
            "packets in the monitor",
        )
        operator.revoke("Second monitor").result(LIMIT)
        assert "Second monitor" not in names(operator)
        until(lambda: "has no key any more: disconnected" in line.processes["producer"].stderr, "the producer")
        until(lambda: "it was revoked" in process.stderr, "the monitor to say why it is not connected")
        assert process.stop() == 0
        assert process.stderr.count("LArPix board refuses the key") <= 1, "one line, however often it is tried"
    assert "it was revoked" in other.run("run_data", "--core", line.core, "--name", "Second monitor")
    other.join(operator, "alice", "operator")
    with other.here(monkeypatch), Operator(line.core, timeout=LIMIT) as alice:
        assert alice.state().result(LIMIT) == "STOP"
        operator.revoke("alice").result(LIMIT)
        for _ in range(2):  # what was asked before the refusal, and after it
            with pytest.raises(NotAllowed, match="refuses the key of 'alice': it was revoked"):
                alice.state().result(LIMIT)
        with pytest.raises(NotAllowed, match="refuses the key of 'alice': it was revoked"):
            Operator(line.core, timeout=LIMIT)


def test_used_expired_revoked_and_cut_tokens(line, operator, other):
    token = other.join(operator, "bob", "operator")
    assert "the invitation of 'bob' was used" in other.run("cli", "keys", "join", token)
    with pytest.raises(RequestError, match="'bob' has a key already"):
        operator.invite("bob", "operator").result(LIMIT)
    operator.revoke("bob").result(LIMIT)
    token = operator.invite("eve", "operator", expires=0.001).result(LIMIT)["token"]
    assert "the invitation of 'eve' expired" in other.run("cli", "keys", "join", token)
    token = operator.invite("eve", "operator").result(LIMIT)["token"]
    operator.revoke("eve").result(LIMIT)
    assert "the invitation of 'eve' was revoked" in other.run("cli", "keys", "join", token)
    assert "token: expected" in other.run("cli", "keys", "join", token[: len(token) // 2])
    token = credentials.make_token(line.core, credentials.find(line.core).server, new_pair())
    assert "does not know this invitation" in other.run("cli", "keys", "join", token)
    token = credentials.make_token(line.core, new_pair().public, new_pair())
    assert "is not the one that made this token" in other.run("cli", "keys", "join", token)


def test_refused_connections_are_in_the_status(line, operator, sockets):
    addresses = {"core": (line.core, credentials.find(line.core).server)}
    addresses |= {kind: info_of(operator, kind)[entry] for kind, entry in (("producer", "stream"), ("log", "log"))}
    for address, server in addresses.values():
        stranger = dealer(sockets)
        connect_with(stranger, new_pair(), server)
        stranger.connect(address)

    def counted():
        status = operator.status().result(LIMIT)
        of_components = {c["kind"]: c["status"].get("refused_connections", 0) for c in status["components"]}
        return {"core": status["refused_connections"]} | of_components

    until(lambda: all(counted()[kind] for kind in addresses), "a refused connection at each port")


def test_a_token_that_is_not_on_the_command_line(line, operator, other):
    """Other users of the host see command lines."""
    token = operator.invite("frank", "observer").result(LIMIT)["token"]
    program = [sys.executable, "-m", "larpixdaq", "keys", "join"]
    for given, status, says in ((f"{token}\n", 0, "joined as observer frank"), ("", 1, "token: expected larpixdaq1.")):
        done = subprocess.run(
            program, input=given, env=os.environ | other.env, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert (done.returncode, says in done.stdout + done.stderr) == (status, True), done
    operator.revoke("frank").result(LIMIT)


def test_keys_are_listed(line, operator, other):
    other.join(operator, "carol", "observer")
    operator.invite("dave", "component").result(LIMIT)
    says = keys_command(line, "list")
    assert "carol: observer, since 20" in says
    assert "dave: invited as component, open until 20" in says
    for name in ("carol", "dave"):
        operator.revoke(name).result(LIMIT)
    assert operator.keys().result(LIMIT) == {"members": [], "invitations": [], "rotates": False}


def is_heard(operator: Operator) -> bool:
    """Whether an Operator is connected to a core that was restarted; until then its requests fail."""
    try:
        operator.state().result(LIMIT)
    except (ComponentError, NoCore):
        return False
    return True


def keys_command(line: System, *arguments: str) -> str:
    """Run `larpixdaq keys` as the core's user, and return what it has printed."""
    program = [sys.executable, "-m", "larpixdaq", "keys", *arguments, "--core", line.core]
    return subprocess.run(program, check=True, capture_output=True, text=True, timeout=LIMIT).stdout


def test_new_keys_of_the_core_count_from_its_next_start_on_and_lock_out_only_who_was_away(
    line, operator, other, tmp_path
):
    """A run, with a component from elsewhere, goes on meanwhile."""
    away = Other(tmp_path / "away", line.core)
    away.join(operator, "away", "operator")
    other.join(operator, "night", "operator")
    other.join(operator, "Second monitor", "component")
    token = operator.invite("late", "operator").result(LIMIT)["token"]
    old = credentials.find(line.core)
    with other_monitor(other, line.core) as monitor:
        until(lambda: "Second monitor" in names(operator), "the monitor with its own key")
        with complete_run(operator):
            says = keys_command(line, "rotate")
            assert "Second monitor: knows the core's new key" in says
            for name in ("away", "night"):
                assert f"{name}: does not know the core's new key: it must connect before the core's next start" in says
            assert "late: the invitation can be used until then" in says
            assert "state RUN" in other.run("cli", "status", "--core", line.core, status=0)
            assert "night: knows the core's new key" in keys_command(line, "rotate")
            assert credentials.find(line.core) == old
            assert line.processes["core"].stop() == 0
            line.restart("core")
            until(lambda: is_heard(operator), "the Operator to find the restarted core")
            line.await_kinds(operator, "log", "storage", "run_data", "producer")
            until(lambda: "Second monitor" in names(operator), "the monitor with the core's new key")
        assert monitor.stop() == 0
    new = credentials.find(line.core)
    assert not {new.server, new.public} & {old.server, old.public}
    assert "state STOP" in other.run("cli", "status", "--core", line.core, status=0)
    stored = [credentials.read(path) for path in other.folder.rglob("*.key.json")]
    assert [(one.server, one.next) for one in stored] == [(new.server, "")] * 2
    says = away.run("cli", "status", "--core", line.core)
    assert f"at {line.core} is another core than that of the key in use" in says
    assert "is not the one that made this token" in away.run("cli", "keys", "join", token)
    says = keys_command(line, "list")
    assert "away: operator, since" in says
    assert says.count("does not know the core's key: it needs a new invitation") == 1
    operator.revoke("away").result(LIMIT)
    away.join(operator, "away", "operator")
    assert "state STOP" in away.run("cli", "status", "--core", line.core, status=0)
    for name in ("away", "night", "Second monitor"):
        operator.revoke(name).result(LIMIT)


def test_a_member_that_cannot_store_the_new_key_goes_on_and_is_not_counted_as_informed(line, operator, other):
    other.join(operator, "Second monitor", "component")
    path = next(other.folder.rglob("*.key.json"))
    with other_monitor(other, line.core) as monitor:
        until(lambda: "Second monitor" in names(operator), "the monitor")
        path.parent.chmod(0o755)  # in which nothing is written
        assert "Second monitor: does not know the core's new key" in keys_command(line, "rotate")
        until(lambda: "the new key of the core" in monitor.stderr, "the error")
        line.processes["core"].kill()
        line.restart("core")
        with Operator(line.core, timeout=LIMIT) as again:
            until(lambda: "Second monitor" in names(again), "the monitor with the core's new key")
            (member,) = again.keys().result(LIMIT)["members"]
            assert not member["informed"]
            path.parent.chmod(0o700)
            until(lambda: again.keys().result(LIMIT)["members"][0]["informed"], "the new key in the file")
        assert monitor.stop() == 0
    assert credentials.read(path).server == credentials.find(line.core).server
    operator.revoke("Second monitor").result(LIMIT)


def test_key_files_that_cannot_be_used_give_one_line(line, operator, other):
    other.join(operator, "Second monitor", "component")
    path = next(other.folder.rglob("*.key.json"))
    whole = path.read_bytes()

    def says() -> str:
        text = other.run("run_data", "--core", line.core, "--name", "Second monitor")
        assert text.count("\n") == 1
        return text

    path.chmod(0o640)
    assert f"{path}: expected mode 600, found 640" in says()
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        assert f"{path}: expected a file of user 0, found one of user 65534" in says()
        os.chown(path, 0, 0)
    for damaged in (b"", whole[: len(whole) // 2], b"[]"):
        path.write_bytes(damaged)
        assert f"{path}: expected a key, found " in says()
        assert "remove it and join again" in says()
    of_another = msgspec.structs.replace(msgspec.json.decode(whole, type=credentials.Credentials), server=new_pair()[0])
    path.write_bytes(msgspec.json.encode(of_another))
    assert f"at {line.core} is another core than that of the key in use" in says()
    path.write_bytes(whole)
    operator.revoke("Second monitor").result(LIMIT)


@pytest.mark.parametrize("hours", [-7, 7])
def test_only_the_clock_of_the_core_decides_whether_an_invitation_is_open(line, operator, other, tmp_path, hours):
    with contextlib.closing(Clock(tmp_path)) as wall:
        wall.step(hours * 3600)
        other.env |= wall.env
        other.join(operator, "night", "operator")
        assert "state STOP" in other.run("cli", "status", "--core", line.core, status=0)
        token = operator.invite("eve", "operator", expires=0.001).result(LIMIT)["token"]
        assert "the invitation of 'eve' expired" in other.run("cli", "keys", "join", token)
    operator.revoke("night").result(LIMIT)


def test_a_second_core_with_the_same_key_store_is_refused(line, operator, other):
    state = line.folder / "state"
    before = (state / "keys" / "core.json").read_bytes()
    says = other.run("core", "--address", f"tcp://127.0.0.1:{free_port()}", "--state-dir", state)
    assert says.count("\n") == 1
    assert "another core" in says
    assert (state / "keys" / "core.json").read_bytes() == before


def test_a_core_with_a_new_key_store_is_found_by_its_own_user_again(line, operator, sockets):
    """Its components and Operators take over the new key while they run, and the run goes on."""
    with complete_run(operator):
        line.processes["core"].kill()
        (line.folder / "state" / "keys" / "core.json").rename(line.folder / "old.json")
        line.restart("core")
        until(lambda: is_heard(operator), "the Operator to find the restarted core")
        line.await_kinds(operator, "log", "storage", "run_data", "producer")
    use_key(dealer(sockets), line.core)
    assert credentials.find(line.core).server not in (line.folder / "old.json").read_text()


def test_a_core_without_a_place_for_its_connection_file_starts_and_says_so(tmp_path):
    env = {"XDG_STATE_HOME": "/proc/nothing"}
    arguments = ("--address", f"tcp://127.0.0.1:{free_port()}", "--state-dir", tmp_path)
    with Process("larpixdaq.core", *arguments, directory=tmp_path / "out", env=env) as process:
        until(lambda: "cannot find the core's key" in process.stderr, "the error")
        assert process.stop() == 0
    assert process.stderr.count("cannot find the core's key") == 1


def test_files_in_a_state_directory_that_others_may_enter_are_private(line, operator):
    with complete_run(operator):
        found = [path for path in (line.folder / "state").rglob("*") if path.is_file()]
    assert {"catalogue.sqlite", "highest_run", "log.txt", "core.json"} <= {path.name for path in found}
    assert [path for path in found if path.stat().st_mode & 0o077] == []


def test_a_connection_file_that_was_removed_is_written_again(line, operator):
    path = credentials.connection_file(line.core)
    path.unlink()
    until(path.exists, "the connection file")
    assert line.processes["core"].popen.poll() is None
