"""The core with real sockets, and as a process that dies."""

import os
import random
import signal
import subprocess
import sys
import time

import msgspec
import pytest
import zmq
from fake_core import Actor, Stopper, all_running, monitor, producer, storage
from processes import LIMIT, Process, free_port, until
from raw_sockets import Context, use_key

from larpixdaq.control import registry
from larpixdaq.control.catalogue import read_audit
from larpixdaq.core import Core
from larpixdaq.errors import (
    ComponentError,
    ConfigError,
    ControlHeld,
    FileError,
    NoCore,
    RequestError,
    StateError,
    UnknownAction,
)
from larpixdaq.keys.curve import connect_with, new_pair
from larpixdaq.keys.key_store import ANYONE
from larpixdaq.operator import Operator
from larpixdaq.protocol.control import (
    MAX_FRAME,
    MAX_REQUEST,
    ActionRequest,
    Bye,
    Endpoint,
    Heartbeat,
    Open,
    Register,
    Update,
    pack,
    unpack_core,
)
from larpixdaq.runtime.timing import Throttle


@pytest.fixture
def dealer(running):
    """A socket that can send any bytes to the core."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, int(LIMIT * 1000))
    use_key(socket, running.address)
    socket.connect(running.address)
    yield socket
    context.destroy(0)


def component_of(operator, name):
    """The core's description of a component; None if the core does not know it."""
    return next((one for one in operator.components().result(LIMIT) if one["name"] == name), None)


def test_an_impossible_run_number_is_refused(operator):
    with pytest.raises(RequestError, match=r"run_info: Expected `int` <= 9999999 - at `\$.run`"):
        operator.run_info(2**63).result(LIMIT)


def test_the_numbers_of_components_and_operators_are_limited(running, dealer, monkeypatch):
    monkeypatch.setattr(registry, "MAX_COMPONENTS", 1)
    monkeypatch.setattr(registry, "MAX_OPERATORS", 1)

    def ask(message):
        dealer.send(pack(message))
        while type(answer := unpack_core(dealer.recv())) is Update:  # after changes
            pass
        return answer

    log = {"kind": "log", "instance": "i"}
    first = ask(Register(name="a", **log))
    refused = ask(Register(name="b", **log))
    assert (refused.error, "there are 1 components already" in refused.text) == ("failed", True)
    dealer.send(pack(Bye(session=first.session)))
    assert ask(Register(name="b", **log)).session
    assert ask(Open(name="o", instance="1")).session
    assert "there are 1 Operators already" in ask(Open(name="p", instance="2")).text


def invited(running, name, role):
    """A key that was invited as `name`."""
    pair = new_pair()
    running._keys.join(running._keys.invite(name, role, 60.0).public, pair.public)
    return pair


@pytest.fixture
def observer(running):
    """A function that opens a socket with an observer's key, and its session."""
    context, pair = Context(), invited(running, "night", "observer")

    def open_operator(instance):
        socket = context.socket(zmq.DEALER)
        socket.linger, socket.rcvtimeo, socket.immediate = 0, int(LIMIT * 1000), 1
        connect_with(socket, pair, running._keys.server.public)
        socket.connect(running.address)
        socket.send(pack(Open(name="x", instance=instance)))
        return socket, unpack_core(socket.recv())

    yield open_operator
    context.destroy(0)


def limits(operator):
    return {(one["peer"], one["limit"]): one["count"] for one in operator.status().result(LIMIT)["limits"]}


def test_the_operators_of_one_key_are_limited(running, operator, observer, monkeypatch):
    monkeypatch.setattr(registry, "MAX_KEY_OPERATORS", 2)
    sessions = [observer(str(number)) for number in range(2)]
    assert all(answer.session for _, answer in sessions)
    assert "observer 'night' has 2 Operators already" in observer("3")[1].text
    assert limits(operator) == {("observer 'night'", "Operators"): 1}
    with Operator(running.address) as another:
        assert another.state().result(LIMIT) == "STOP"


def test_the_requests_of_one_key_are_limited_by_the_second(running, operator, observer, caplog):
    running._requests._rate = Throttle(0, 5, shares=1000)
    sockets = [observer(str(number)) for number in range(2)]
    answers = []
    for number in range(10):
        socket, welcome = sockets[number % 2]
        socket.send(pack(ActionRequest(session=welcome.session, request=f"r{number}", action="state")))
        while getattr(answer := unpack_core(socket.recv()), "kind", "ack") == "ack":
            pass
        answers.append(answer.kind)
        if answer.kind == "error":
            assert answer.text == "state: too many requests: the limit is 0 requests a second"
    assert answers == ["result"] * 5 + ["error"] * 5
    socket.send(pack(Heartbeat(session=welcome.session)))  # its session goes on
    while not isinstance(answer := unpack_core(socket.recv()), Update):
        pass
    assert operator.state().result(LIMIT) == "STOP"
    assert limits(operator) == {("observer 'night'", "0 requests a second"): 5}
    lines = [record.getMessage() for record in caplog.records if "has reached a limit" in record.getMessage()]
    assert lines == ["core: observer 'night' has reached a limit: 0 requests a second (1 times so far)"]


def test_supervisors_know_the_processes_of_supervised_operators(running, operator):
    """By name; a component of this name counts before it."""

    def registered():
        return running._current_state()["registered"]

    with Operator(running.address, name="Metrics", supervised=True):
        assert registered() == {"Metrics": os.getpid()}
        with Actor(running.address, "Metrics", "log", {}, {}).running():
            running._peers.components["Metrics"].info["pid"] = 7
            assert registered() == {"Metrics": 7}
    until(lambda: registered() == {}, "the Operator to be gone")


def test_the_log_level_needs_an_operators_key_and_no_control(running, operator, observer):
    socket, welcome = observer("1")
    params = {"level": "debug"}
    socket.send(pack(ActionRequest(session=welcome.session, request="r", action="set_log_level", params=params)))
    while getattr(answer := unpack_core(socket.recv()), "kind", "ack") == "ack":
        pass
    assert (answer.error, "allows to look" in answer.text) == ("not_allowed", True)
    with producer(running.address).running() as board, Operator(running.address) as other:
        other.take_control().result(LIMIT)
        assert operator.set_log_level("Debug", board.node.name).result(LIMIT) == {"levels": {"LArPix board": "DEBUG"}}

        def level():
            return operator.components().result(LIMIT)[0]["log_level"]

        until(lambda: level() == "DEBUG", "the level in its heartbeat")
        assert operator.set_log_level("info").result(LIMIT)["levels"] == {"core": "INFO", "LArPix board": "INFO"}
        until(lambda: level() == "INFO", "the level in its heartbeat")

    def outcomes():
        rows = read_audit(running._catalogue.path.parent)
        return [row.outcome for row in rows if row.action == "set_log_level"]

    until(lambda: outcomes() == ["accepted", "done"] * 2, "the audit")


def test_the_unanswered_requests_of_an_operator_are_limited(running, operator, monkeypatch):
    monkeypatch.setattr("larpixdaq.control.request_router.MAX_UNANSWERED", 3)
    with monitor(running.address).running() as online, Operator(running.address) as another:
        waiting = [operator.packets() for _ in range(3)]
        until(lambda: len(online.open) == 3, "three requests")
        with pytest.raises(RequestError, match="too many requests: the limit is 3 unanswered requests"):
            operator.state().result(LIMIT)
        assert another.state().result(LIMIT) == "STOP"
        online.open[0].result(1)
        assert waiting[0].result(LIMIT) == 1
        assert operator.state().result(LIMIT) == "STOP"
        for call in online.open[1:]:
            call.result(1)
        assert [request.result(LIMIT) for request in waiting[1:]] == [1, 1]


def test_registrations_of_one_key_are_limited_by_the_second(running, operator, observer):
    running._rate = Throttle(0, 2, shares=1000)
    assert [bool(observer(str(number))[1].session) for number in range(3)] == [True, True, False]
    assert limits(operator) == {("observer 'night'", "registrations a second"): 1}
    with producer(running.address).running():
        pass


def test_lost_components_are_shown_for_12_hours():
    known = registry.Registry()
    known.register(Register(name="a", kind="log", instance="i"), b"", 100.0, ANYONE)
    assert [change.what for change in known.check(102.0)] == ["lost"]
    known.check(43_000.0)
    assert [one["name"] for one in known.describe(43_000.0)] == ["a"]
    known.check(43_400.0)
    assert known.describe(43_400.0) == []


def test_a_flood_of_messages_hides_no_lost_component(tmp_path, monkeypatch):
    """Components are checked when the socket is empty, and in a flood after a second."""
    core = Core("tcp://127.0.0.1:0", "", tmp_path)
    try:
        now = time.monotonic()
        core._peers.register(Register(name="a", kind="log", instance="i"), b"", now - 2, ANYONE)
        monkeypatch.setattr(core, "_take", lambda now: False)
        core.turn()
        assert "a" in core._peers.components
        core._drained = now - 2
        core.turn()
        assert "a" in core._peers.lost
    finally:
        core.close()


def test_messages_take_a_bounded_time_of_a_turn(tmp_path, monkeypatch):
    core = Core("tcp://127.0.0.1:0", "", tmp_path)
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            use_key(dealer, core.address)
            dealer.connect(core.address)
            for _ in range(3):
                dealer.send(b"garbage")
            until(lambda: core._door.answer() or core._router.poll(10), "messages")
            monkeypatch.setattr("larpixdaq.core._TAKE_LIMIT", 0.0)
            assert not core._take(time.monotonic())
            assert core._actions.refused <= 1
            monkeypatch.undo()
            until(lambda: core._take(time.monotonic()) and core._actions.refused == 3, "the rest")
    finally:
        core.close()


def test_a_run_through_the_operator(running, operator):
    actors = producer(running.address), storage(running.address, highest=41), monitor(running.address)
    with all_running(*actors) as (board, disk, _):
        assert operator.state().result(LIMIT) == "STOP"
        responses = list(operator.prepare_run(comment="cosmics"))
        assert [one.kind for one in responses] == ["ack", *["progress"] * 3, "result"]
        assert responses[-1].value["run"] == 42
        until(lambda: board.node.state == "READY" and board.node.run == 42, "READY at the board")
        assert operator.begin_run().result(LIMIT)["run"] == 42
        until(lambda: disk.node.state == "RUN", "RUN at the disk")
        assert disk.node.producers == {"LArPix board": Endpoint("tcp://127.0.0.1:1")}
        operator.comment("beam is on").result(LIMIT)
        board.status = {"rows": 5}
        until(lambda: operator.run_info().result(LIMIT)["live"]["LArPix board"].get("rows") == 5, "live numbers")
        result = operator.end_run().result(LIMIT)
        assert (result["condition"], result["rows"], result["stored"]) == ("COMPLETE", 100, 100)
        until(lambda: (board.node.state, board.node.run) == ("STOP", None), "STOP at the board")
        info = operator.run_info().result(LIMIT)
        assert (info["run"], info["comment"], info["condition"]) == (42, "cosmics", "COMPLETE")
        assert info["comments"][0]["text"] == "beam is on"
        assert board.actions() == ["prepare_run", "begin_run", "end_run"]
        assert disk.calls[0][1] == {
            "run": 42,
            "kind": "physics",
            "comment": "cosmics",
            "operator": info["operator"],
            "shifter": "",
            "started_ns": disk.calls[0][1]["started_ns"],
            "layout": 2,
            "asic_version": "2",
            "producers": ["LArPix board"],
            "versions": disk.calls[0][1]["versions"],
            "connected": [],
            "begun_ns": 0,
            "stopped_ns": 0,
        }
        assert disk.calls[1][1] == {"run": 42, "begun_ns": info["begun_ns"]}
        assert disk.calls[2][1] == {
            "run": 42,
            "how": "closed",
            "producers": [{"name": "LArPix board", "epoch": 7, "next": 3}],
            "connected": [],
            "stopped_ns": info["stopped_ns"],
        }
        assert info["prepared"] < info["begun_ns"] / 1e9 < info["stopped_ns"] / 1e9 < info["ended"]


def test_refused_requests_name_the_reason(operator):
    with pytest.raises(StateError, match="STOP"):
        operator.begin_run().result(LIMIT)
    with pytest.raises(ComponentError, match="no producer is registered"):
        operator.prepare_run().result(LIMIT)
    with pytest.raises(RequestError, match="no run yet"):
        operator.run_info().result(LIMIT)
    with pytest.raises(RequestError, match="no run 7"):
        operator.run_info(7).result(LIMIT)
    with pytest.raises(RequestError, match="comment"):
        operator.prepare_run(comment=5).result(LIMIT)
    with pytest.raises(RequestError, match="no action 'dance'; it has abort_run"):
        operator.call("core", "dance").result(LIMIT)


def test_actions_of_components(running, operator):
    with pytest.raises(ComponentError, match="no online monitor is alive"):
        operator.packet_rate().result(LIMIT)
    with all_running(producer(running.address), monitor(running.address)) as (board, online):
        assert operator.packet_rate().result(LIMIT) == {"now": 5.0}
        assert operator.list_routines(component="LArPix board").result(LIMIT) == ["hello_world"]
        assert operator.actions("Online monitor").result(LIMIT) == {"Online monitor": sorted(online.replies)}
        with pytest.raises(UnknownAction, match="Online monitor has no action 'adc_histogram'; it has begin_run"):
            operator.adc_histogram().result(LIMIT)
        with pytest.raises(ComponentError, match="no component is named 'nobody'; there are LArPix board"):
            operator.packet_rate(component="nobody").result(LIMIT)
        with pytest.raises(RequestError, match="only the core may request"):
            operator.call("LArPix board", "begin_run", run=1).result(LIMIT)
        request = operator.run_routine("hello_world", 1, gain=2)
        (call,) = until(lambda: board.open, "the routine")
        assert call.params == {"name": "hello_world", "args": [1], "kwargs": {"gain": 2}}
        call.ack("started")
        call.progress(1, 3, "one")
        call.result({"greeting": "hello"}, "done")
        got = [(one.kind, one.component, one.text, one.value, one.done, one.total) for one in request]
        assert got == [
            ("ack", "core", "", None, 0, 0),
            ("ack", "LArPix board", "started", None, 0, 0),
            ("progress", "LArPix board", "one", None, 1, 3),
            ("result", "LArPix board", "done", {"greeting": "hello"}, 0, 0),
        ]


def test_a_request_to_a_component_that_ends_or_is_lost_fails(running, operator):
    with producer(running.address).running() as board:
        request = operator.run_routine("forever")
        until(lambda: board.open, "the routine")
    with pytest.raises(ComponentError, match="LArPix board was closed while it worked on run_routine"):
        request.result(LIMIT)


def test_names_of_living_components_are_unique(running, operator, monkeypatch):
    monkeypatch.setattr("larpixdaq.control.node.REGISTER_LIMIT", 1.5)
    with producer(running.address).running():
        second = producer(running.address)
        with pytest.raises(RequestError, match="the name 'LArPix board' is in use by a producer"):
            second.node.connect()
        second.close()
        assert component_of(operator, "LArPix board")["alive"]
    with producer(running.address).running():  # closed properly: the name is free at once
        pass


def test_two_operators_and_control(running, operator):
    with all_running(producer(running.address), storage(running.address)), Operator(running.address, name="B") as other:
        assert operator.status().result(LIMIT)["control"] is None
        operator.prepare_run().result(LIMIT)
        with pytest.raises(ControlHeld, match="take_control") as held:
            other.begin_run().result(LIMIT)
        holder = operator.status().result(LIMIT)["control"]
        assert (held.value.by, held.value.since) == (holder["by"], holder["since"])
        assert other.state().result(LIMIT) == "READY"
        with pytest.raises(ControlHeld):
            other.run_routine("x").result(LIMIT)
        assert other.take_control().result(LIMIT)["by"] == "B"
        other.begin_run().result(LIMIT)
        with pytest.raises(ControlHeld):
            operator.end_run().result(LIMIT)
        other.release_control().result(LIMIT)
        operator.end_run().result(LIMIT)
        operator.close()
        other.prepare_run().result(LIMIT)
        assert other.abort_run().result(LIMIT)["condition"] == "ABORTED"


def test_control_is_free_after_its_holder_has_vanished(running, operator, dealer, monkeypatch):
    monkeypatch.setattr("larpixdaq.control.registry.CONTROL_FREE", 1.5)  # 5 s else
    dealer.send(pack(Open(name="ghost", instance="g")))
    session = unpack_core(dealer.recv()).session
    started = time.monotonic()
    dealer.send(pack(ActionRequest(request="1", session=session, action="abort_run")))
    until(lambda: operator.status().result(LIMIT)["control"], "control for the ghost")
    with pytest.raises(ControlHeld, match="ghost"):
        operator.abort_run().result(LIMIT)
    until(lambda: operator.status().result(LIMIT)["control"] is None, "control to be free")
    assert time.monotonic() - started > 1.5
    operator.abort_run().result(LIMIT)


def test_a_repeated_request_is_done_once(running, dealer):
    with all_running(producer(running.address), storage(running.address)) as (board, _):
        dealer.send(pack(Open(name="o", instance="i")))
        session = unpack_core(dealer.recv()).session
        ends = []
        for _ in range(3):
            dealer.send(pack(ActionRequest(request="7", session=session, action="prepare_run")))
        while len(ends) < 2:
            message = unpack_core(dealer.recv())
            if getattr(message, "kind", "") == "result":
                ends.append(msgspec.msgpack.decode(message.value)["run"])
                dealer.send(pack(ActionRequest(request="7", session=session, action="prepare_run", again=True)))
        assert ends == [1, 1]
        assert board.actions() == ["prepare_run"]
        dealer.send(pack(ActionRequest(request="8", session=session, action="prepare_run", again=True)))
        while getattr(message, "kind", "") != "error":
            message = unpack_core(dealer.recv())
        assert "no longer known" in message.text


def test_results_with_large_arrays_pass_through_the_core_in_many_frames(running, operator):
    reply = bytes(range(256)) * (5 * MAX_FRAME // 256)
    with Actor(running.address, "large", "run_data", {}, {"look": reply}).running():
        assert operator.call("large", "look").result(LIMIT) == reply


def test_malformed_messages_get_a_clear_answer(running, operator, dealer):
    def refusal():
        message = unpack_core(dealer.recv())
        assert message.error == "malformed"
        return message

    dealer.send(b"\x00garbage")
    assert "message from" in refusal().text
    dealer.send_multipart([b"a", b"b", b"c"])
    assert "3 parts" in refusal().text
    dealer.send_multipart(10_000 * [b""])
    assert "more than 64 parts" in refusal().text
    dealer.send(msgspec.msgpack.encode({"type": "dance", "request": "r1"}))
    answer = refusal()
    assert (answer.request, "dance" in answer.text) == ("r1", True)
    dealer.send(msgspec.msgpack.encode({"type": "open", "version": 99, "request": "r2"}))
    answer = refusal()
    assert (answer.request, "protocol version 99" in answer.text) == ("r2", True)
    dealer.send(b"\x80" * (MAX_REQUEST + 1))
    assert str(MAX_REQUEST) in refusal().text
    dealer.send(pack(Heartbeat(session="made up")))
    assert unpack_core(dealer.recv()).error == "unknown_session"
    dealer.send(pack(Register(name="x", kind="log", instance="i")))
    session = unpack_core(dealer.recv()).session
    dealer.send(pack(ActionRequest(session=session, action="abort_run")))
    assert "may not send" in refusal().text
    assert operator.status().result(LIMIT)["refused_messages"] == 7


def test_a_flood_of_random_bytes(running, operator, dealer):
    noise = random.Random(1)
    with producer(running.address).running() as board:
        for _ in range(3000):
            dealer.send(noise.randbytes(noise.randrange(300)))
        refused = until(lambda: operator.status().result(LIMIT)["refused_messages"] >= 3000, "3000 refusals")
        assert refused
        assert component_of(operator, "LArPix board")["alive"]
        assert board.node.changes == 1  # it never had to register again


def test_a_result_that_cannot_be_sent_is_an_error(running, operator):
    online = monitor(running.address)
    online.replies["packet_rate"] = {"now": object()}
    with online.running():
        with pytest.raises(RequestError, match="object cannot be sent"):
            operator.packet_rate().result(LIMIT)
        online.replies["packet_rate"] = lambda call: call.result(b"1" * (9 << 20))
        assert len(operator.packet_rate().result(LIMIT)) == 9 << 20


def test_stuck_and_lost(running, operator, dealer):
    with producer(running.address).running() as board:
        board.queued = 3
        until(lambda: component_of(operator, "LArPix board")["stuck"], "stuck")
        board.progress += 1
        until(lambda: not component_of(operator, "LArPix board")["stuck"], "moving again")
    dealer.send(pack(Register(name="silent", kind="storage", instance="i")))
    session = unpack_core(dealer.recv()).session
    assert component_of(operator, "silent")["alive"]
    until(lambda: not component_of(operator, "silent")["alive"], "silent to be lost")
    dealer.send(pack(Heartbeat(session=session)))
    while getattr(message := unpack_core(dealer.recv()), "error", "") != "unknown_session":
        pass
    assert message.session == session


def test_a_pause_of_the_core_loses_no_component(tmp_path):
    core = Core("tcp://127.0.0.1:0", "", tmp_path)
    board = producer(core.address)
    try:
        stopper = Stopper()
        board.node._link.start()
        until(lambda: core.turn() or core._peers.components, "the registration")
        session = core._peers.components["LArPix board"].session
        deadline = time.monotonic() + 1.5
        until(lambda: time.monotonic() > deadline, "1.5 s in which the core does nothing")
        core.turn()
        core.turn()
        assert core._peers.components["LArPix board"].session == session
        stopper.close()
    finally:
        core.close()
        board.close()


def test_a_used_port_and_a_used_state_directory(tmp_path, running):
    with pytest.raises(ConfigError, match=r"cannot listen at .*another core"):
        Core(running.address, "", tmp_path)
    with pytest.raises(FileError, match=r"catalogue.sqlite: another core"):
        Core("tcp://127.0.0.1:0", "", tmp_path / "state")


def start_core(tmp_path, port, *more):
    address = f"tcp://127.0.0.1:{port}"
    args = ("--address", address, "--log-address", f"tcp://127.0.0.1:{free_port()}", "--state-dir", tmp_path / "state")
    return Process("larpixdaq.core", *args, *more, directory=tmp_path)


def all_back(operator: Operator, components: int) -> bool:
    try:
        return len(operator.components().result(LIMIT)) == components
    except (ComponentError, NoCore):  # the request was sent at the moment of the restart
        return False


def test_a_core_killed_during_a_run(tmp_path):
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    first = start_core(tmp_path, port)
    with first, all_running(producer(address), storage(address), monitor(address)) as (board, disk, online):
        with Operator(address, timeout=LIMIT) as operator:
            operator.prepare_run().result(LIMIT)
            operator.begin_run().result(LIMIT)
            until(lambda: board.node.state == "RUN", "RUN")
            session = board.node.session
            first.kill()
            with pytest.raises(NoCore):
                operator.state().result(LIMIT)
            with start_core(tmp_path, port):
                until(lambda: board.node.session != session, "the board's new session")
                until(lambda: all_back(operator, 3), "all components to be back")
                assert operator.status().result(LIMIT)["run"]["phase"] == "RUN"
                assert board.node.state == "RUN"
                result = operator.end_run().result(LIMIT)
                assert (result["run"], result["condition"]) == (1, "COMPLETE")
        assert [actor.actions() for actor in (board, disk, online)] == [["prepare_run", "begin_run", "end_run"]] * 3


def test_requests_are_not_done_after_a_restart_of_the_core(tmp_path):
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    first = start_core(tmp_path, port)
    with first, producer(address).running() as board, Operator(address, timeout=LIMIT) as operator:
        open_request = operator.run_routine("forever")
        until(lambda: board.open, "the routine")
        first.kill()
        until(lambda: operator._connection.link.silence() > 2, "the Operator to notice")
        late = operator.run_routine("late")
        with pytest.raises(NoCore):
            late.result(LIMIT)
        with start_core(tmp_path, port):
            until(lambda: open_request.done, "the error of the open request")
            with pytest.raises(ComponentError, match="the core was restarted"):
                open_request.result(LIMIT)
            until(lambda: all_back(operator, 1), "the board to be back")
            assert len(board.open) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_core_cleanly(tmp_path, how):
    port = free_port()
    with start_core(tmp_path, port) as process:
        Operator(f"tcp://127.0.0.1:{port}", timeout=LIMIT).close()
        process.popen.send_signal(how)
        assert process.stop(how) == 0  # a second signal, as from a terminal and from `down` together, changes nothing
        assert process.stderr == ""


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["--address", "nonsense:port"], 2, "address 'nonsense:port': expected"),
        (["--state-dir", "/proc/nowhere"], 1, "state directory /proc/nowhere"),
        (["--wrong"], 2, "unrecognized arguments: --wrong; `larpixdaq-core --help` shows the options"),
    ],
)
def test_wrong_options(tmp_path, args, status, text):
    with Process("larpixdaq.core", *args, directory=tmp_path) as process:
        assert process.wait() == status
        assert text in process.stderr
        assert process.stderr.count("\n") == 1


def test_insecure_is_logged_at_start_and_shown_in_status(tmp_path):
    port = free_port()
    address = f"tcp://0.0.0.0:{port}"
    args = ("--address", address, "--insecure", "--state-dir", tmp_path / "state")
    with (
        Process("larpixdaq.core", *args, directory=tmp_path) as process,
        Operator(f"127.0.0.1:{port}", timeout=LIMIT) as operator,
    ):
        assert operator.status().result(LIMIT)["insecure"] is True
        assert "--insecure" in process.stderr


def test_scripts_run_by_their_path(tmp_path):
    import subprocess
    import sys

    import larpixdaq

    folder = os.path.dirname(larpixdaq.__file__)
    for cwd, script in ((folder, "core.py"), (os.path.dirname(folder), "larpixdaq/core.py"), (folder, "log.py")):
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=True
        )
        assert "base address for ZMQ connections" in done.stdout
    subprocess.run([sys.executable, "operator.py"], cwd=folder, timeout=LIMIT, check=True)


@pytest.mark.parametrize("module", ["core", "log"])
def test_core_and_log_import_no_large_modules(module):
    """So that they start fast, also on a small computer."""
    code = f"import larpixdaq.{module}, sys; print([m for m in ('numpy', 'h5py', 'larpix') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["core", "producer", "offline_storage", "run_data"])
def test_processes_without_brokers_import_nothing_of_them(module):
    code = f"import larpixdaq.{module}, sys; print([m for m in ('nats', 'asyncio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
