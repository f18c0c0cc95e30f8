"""A component: registration, heartbeats, actions, names, and a core that is restarted."""

import logging
import os
import select
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import msgspec
import pytest
import zmq
from fake_core import Actor, Stopper, core, producer
from processes import LIMIT, Process, free_port, until

from larpixdaq import config
from larpixdaq.control.connection import RecentRequests
from larpixdaq.control.node import Node
from larpixdaq.errors import ConfigError, FileError, NoCore, RequestError
from larpixdaq.operator import Operator
from larpixdaq.protocol.control import Answer, Endpoint, content, packed
from larpixdaq.runtime.event_loop import Signals, Stopped, Waker
from larpixdaq.runtime.file_access import state_dir


def described(operator):
    """The core's description of the only component."""
    (component,) = operator.components().result(LIMIT)
    return component


def alive(operator):
    return [component["alive"] for component in operator.components().result(LIMIT)]


def actor(address, replies, **options):
    return Actor(address, "it", "run_data", {}, replies, **options)


def test_no_core():
    node = Node("n", "log", f"tcp://127.0.0.1:{free_port()}", {}, info={})
    try:
        with pytest.raises(NoCore, match=r"no core answers at tcp://127\.0\.0\.1:\d+ \(waited 0.3 s\)"):
            node.connect(0.3)
    finally:
        node.close()
        node.close()


@pytest.fixture
def second(tmp_path):
    """A component that waits in a thread for its name, which is in use: (future of connect(), stopper, core)."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        stopper = stack.enter_context(closing(Stopper()))
        cores = stack.enter_context(ExitStack())
        running = cores.enter_context(core(tmp_path / "state"))
        stack.enter_context(actor(running.address, {}).running())
        node = stack.enter_context(closing(Node("it", "run_data", running.address, {}, info={})))
        waiting = pool.submit(node.connect, 0.3, signals=stopper)
        until(lambda: node._refusal is not None, "the refusal")
        yield waiting, stopper, cores


def test_a_component_that_waits_for_its_name_ends_at_a_signal(second):
    waiting, stopper, _ = second
    stopper.halt()
    with pytest.raises(Stopped):
        waiting.result(LIMIT)


def test_a_core_that_dies_while_a_component_waits_for_its_name_is_no_core(second):
    waiting, _, cores = second
    cores.close()
    with pytest.raises(NoCore, match=r"no core answers at .* \(waited 0.3 s\)"):
        waiting.result(LIMIT)


def test_a_registration_that_is_too_large_is_refused(running):
    node = Node("it", "run_data", running.address, {}, info={"boards": "x" * (1 << 18)})
    with closing(node), pytest.raises(RequestError, match=r"it: register of 262\d+ bytes .* the limit is 262144"):
        node.connect()


def test_invalid_addresses_of_the_core():
    with pytest.raises(ConfigError, match="address 'tcp://'"):
        Node("n", "log", "tcp://", {}, info={})
    with pytest.raises(ConfigError, match="address 'ipc://'"):
        Node("n", "log", "ipc://", {}, info={})


def test_the_connection_to_the_core_uses_no_heartbeats_of_libzmq(running):
    """These heartbeats abort the process if the core dies while the queue is full."""
    node = Node("n", "log", running.address, {}, info={})
    assert node._link._client.socket.get(zmq.HEARTBEAT_IVL) == 0
    node.close()


def test_exceptions_of_handlers_become_errors(running, operator, caplog):
    def raises(call):
        return {}["missing"]

    def twice(call):
        call.result(1)
        call.result(2)

    replies = {"ours": RequestError("it is\nnot ready"), "theirs": raises, "twice": twice, "none": None}
    with actor(running.address, replies).running() as it:
        with pytest.raises(RequestError, match=r"^it is not ready$"):
            operator.call("it", "ours").result(LIMIT)
        with pytest.raises(RequestError, match="KeyError: 'missing'"):
            operator.call("it", "theirs").result(LIMIT)
        assert "Traceback" in caplog.text
        assert operator.call("it", "twice").result(LIMIT) == 1
        it.node._actions["strict"] = it.node._actions["none"]
        with pytest.raises(RequestError, match="has no action 'strict'; it has none, ours"):
            operator.call("it", "strict").result(LIMIT)  # it has not registered this action


def test_wrong_parameters_are_named(running, operator):
    with closing(
        Node("it", "run_data", running.address, {"packets": lambda call, count=100, text=False: count}, info={})
    ) as node:
        node.connect()
        request = operator.call("it", "packets", kount=3)
        until(lambda: node.dispatch() or request.done, "the answer")
        with pytest.raises(
            RequestError, match=r"packets: got an unexpected .*'kount'; expected packets\(count=100, tex"
        ):
            request.result(LIMIT)
        request = operator.call("it", "packets", call=3)
        until(lambda: node.dispatch() or request.done, "the answer")
        with pytest.raises(RequestError, match="multiple values"):
            request.result(LIMIT)


def test_a_request_with_a_malformed_array_is_answered(running, operator):
    """Only the component unpacks arrays: the core passes them on."""
    with actor(running.address, {"a": 1}).running() as it:
        request = operator.call("it", "a", x=msgspec.msgpack.Ext(1, b"nonsense"))
        with pytest.raises(RequestError, match="impossible description"):
            request.result(LIMIT)
        assert operator.call("it", "a").result(LIMIT) == 1
        assert [call[0] for call in it.calls] == ["a"]


def test_a_wake_up_is_one_turn_of_the_loop():
    """The loop goes on while the other thread is still in wake(), and must not turn until that thread has ended it."""
    waker, queue, taken = Waker(), deque(), threading.Event()

    def send() -> None:
        for number in range(300):
            taken.clear()
            queue.append(number)
            waker.wake()
            assert taken.wait(LIMIT)

    poller = select.poll()
    poller.register(waker, select.POLLIN)
    turns = frames = 0
    with closing(waker), ThreadPoolExecutor() as threads:
        sent = threads.submit(send)
        while frames < 300:
            assert poller.poll(LIMIT * 1000)
            waker.clear()
            turns += 1
            while queue:
                queue.popleft()
                frames += 1
                taken.set()
        sent.result(LIMIT)
    assert turns <= 310


def test_changes_wake_the_main_loop(running, operator):
    with closing(Node("it", "run_data", running.address, {}, info={})) as node:
        node.connect()
        assert (node.state, node.run, len(node.session)) == ("STOP", None, 64)
        before = node.changes
        poller = zmq.Poller()
        poller.register(node, zmq.POLLIN)

        def turn() -> int:
            """Take the changes after a wake-up, which may come once too often, but not without end."""
            assert poller.poll(LIMIT * 1000)
            node.dispatch()
            return node.changes - before

        with producer(running.address).running():
            until(lambda: turn() == 1, "the producer")
            assert node.producers == {"LArPix board": Endpoint("tcp://127.0.0.1:1")}
        until(lambda: turn() == 2, "its end")
        assert node.producers == {}
        node.dispatch()
        assert not poller.poll(400)  # heartbeats and their answers wake nobody


def test_heartbeats_continue_while_the_main_loop_is_blocked(running, operator):
    with closing(Node("it", "storage", running.address, {"wait": lambda call: 1}, info={})) as node:
        node.connect()
        node.report(5, 0)
        request = operator.call("it", "wait")

        # The main loop does not run: the component is alive, but stuck, because a request waits.
        until(lambda: described(operator)["stuck"], "stuck")
        assert described(operator)["alive"]
        assert described(operator)["queued"] == 1
        node.dispatch()
        assert request.result(LIMIT) == 1


def test_requests_wait_for_the_main_loop_and_heartbeats_are_confirmed(running, operator):
    """connect() leaves requests to dispatch(), because the component is not ready before."""
    asked = []
    with closing(
        Node("Offline storage", "storage", running.address, {"look": lambda call: asked.append(1) or 1}, info={})
    ) as node:
        node.connect()
        session = node.session
        request = operator.call("Offline storage", "look")
        until(lambda: node._waiting_requests(), "the request to arrive")
        assert not asked
        assert select.select([node.fileno()], [], [], LIMIT)[0]
        now = time.monotonic()
        until(lambda: node.confirmed > now, "a heartbeat that was sent after this to be answered")
        assert node.heard >= node.confirmed
        node.dispatch()
        assert request.result(LIMIT) == 1
        assert node.session == session


def test_a_component_with_a_blocked_main_loop_is_stuck(running, operator):
    with closing(Node("it", "storage", running.address, {}, info={})) as node:
        node.connect()
        until(
            lambda: described(operator)["heard_s"] < 0.2 and not described(operator)["stuck"],
            "heartbeats before the loop begins",
        )
        node.report(5, 0)  # the last report, without queued work
        until(lambda: described(operator)["stuck"], "stuck")
        assert (described(operator)["alive"], described(operator)["queued"]) == (True, 0)
        operator.set_log_level("debug", "it").result(LIMIT)  # also now, when it is needed
        until(lambda: described(operator)["log_level"] == "DEBUG", "its level")
        operator.set_log_level("info").result(LIMIT)
        until(lambda: described(operator)["log_level"] == "INFO", "its level")
        until(lambda: node.report(5, 0) or not described(operator)["stuck"], "moving again")


def test_a_callback_that_fails_does_not_end_the_connection(running, operator, caplog):
    with actor(running.address, {"a": 1}).running() as it:
        hello, it.node._link._beat = it.node._link._beat, lambda: 1 / 0
        until(lambda: "has failed" in caplog.text, "the complaint")
        it.node._link._beat = hello
        until(lambda: alive(operator) == [True], "life")
        assert operator.call("it", "a").result(LIMIT) == 1


def test_a_status_that_cannot_be_sent_does_not_stop_the_heartbeats(running, operator, caplog):
    with actor(running.address, {}).running() as it:
        it.status = {"x": object()}
        until(lambda: "cannot be sent" in caplog.text, "the complaint")
        assert operator.components().result(LIMIT)[0]["alive"]


def test_a_component_registers_with_a_restarted_core(tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    it = actor(address, {"a": 1})
    with core(tmp_path / "state", address):
        it.node.connect()
        first = it.node.session
    until(lambda: it.node._link.silence() > 1, "silence")
    with core(tmp_path / "state", address), Operator(address, timeout=LIMIT) as operator:
        until(lambda: it.node.dispatch() or it.node.session != first, "a new session")
        request = operator.call("it", "a")
        until(lambda: it.node.dispatch() or request.done, "the answer")
        assert request.result() == 1
    it.close()


STAND_IN = """
import sys, zmq
import larpixdaq.control.node
from larpixdaq.runtime.event_loop import run_main
from larpixdaq.control.node import Node

larpixdaq.control.node.REGISTER_LIMIT = 1.5

def main():
    taken = []
    node = Node("it", "storage", sys.argv[1], {"a": lambda call: 1}, info={}, on_name_taken=lambda: taken.append(1))
    try:
        node.connect()
        poller = zmq.Poller()
        poller.register(node, zmq.POLLIN)
        while not taken:
            poller.poll(100)
            node.dispatch()
            node.report(0, 0)
        print("my name was taken", flush=True)
        return 1
    finally:
        node.close()

sys.exit(run_main(main))
"""


def test_a_lost_component_whose_name_was_taken(tmp_path, running, operator):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with Process("stand_in", running.address, directory=tmp_path, env=env) as first:
        until(lambda: alive(operator) == [True], "the first")
        first.popen.send_signal(signal.SIGSTOP)
        with actor(running.address, {}).running() as second:  # waits until the first counts as lost
            first.popen.send_signal(signal.SIGCONT)
            assert first.wait() == 1
            assert "my name was taken" in first.stdout
            assert second.node.session


def test_a_lost_component_that_comes_back(tmp_path, running, operator):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with Process("stand_in", running.address, directory=tmp_path, env=env) as it:
        until(lambda: alive(operator) == [True], "registration")
        it.popen.send_signal(signal.SIGSTOP)
        until(lambda: alive(operator) == [False], "loss")
        it.popen.send_signal(signal.SIGCONT)
        until(lambda: alive(operator) == [True], "return")
        assert operator.call("it", "a").result(LIMIT) == 1
        assert it.stop(signal.SIGTERM) == 0
        until(lambda: alive(operator) == [], "goodbye")


def result(request, value=0):
    return Answer(request=request, kind="result", value=packed(value))


def test_only_finished_requests_are_forgotten():
    recent = RecentRequests()
    assert not recent.is_repeat("unfinished")
    for i in range(5000):
        assert not recent.is_repeat(str(i))
        recent.keep(str(i), result(str(i), i))
    assert recent.is_repeat("unfinished")
    assert content(recent.answer("4999")) == 4999
    assert not recent.is_repeat("0")


def test_large_results_are_kept_up_to_a_limit():
    recent = RecentRequests()
    for i in range(500):
        recent.is_repeat(str(i))
        recent.keep(str(i), result(str(i), bytes(100_000)))
    assert len(content(recent.answer("499"))) == 100_000
    assert sum(len(bytes(recent.answer(str(i)).value)) for i in range(500)) < 10_000_000
    forgotten = recent.answer("0")  # the request is still known as done
    assert (forgotten.kind, forgotten.request) == ("error", "0")
    assert "ask again" in forgotten.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://127.0.0.1", "tcp://127.0.0.1:5551"),
        ("tcp://127.0.0.1:7", "tcp://127.0.0.1:7"),
        ("daq1.lab", "tcp://daq1.lab:5551"),
        ("daq1.lab:9", "tcp://daq1.lab:9"),
        ("tcp://*", "tcp://*:5551"),
        ("tcp://[::1]", "tcp://[::1]:5551"),
        ("tcp://[::1]:*", "tcp://[::1]:*"),
        ("ipc:///tmp/x", "ipc:///tmp/x"),
    ],
)
def test_addresses(text, expected):
    assert config.address(text, 5551) == expected


@pytest.mark.parametrize(
    "text", ["", "tcp://", "a b", "tcp://a:b", "tcp://a:99999", "udp://a", "a:1:2", "tcp://a/b:", "::1", "[::zz]"]
)
def test_invalid_addresses(text):
    with pytest.raises(ConfigError, match="address"):
        config.listen_address(text, 5551)


def test_addresses_that_others_can_reach():
    assert config.listen_address("localhost:7", 1) == "tcp://127.0.0.1:7"
    assert config.interface_towards("tcp://127.0.0.1:5551") == "127.0.0.1"
    assert config.reachable_address("tcp://0.0.0.0:9", "tcp://127.0.0.1:5551") == "tcp://127.0.0.1:9"
    assert config.reachable_address("tcp://127.0.0.1:9", "tcp://192.0.2.1:5551") == "tcp://127.0.0.1:9"
    with pytest.raises(ConfigError, match="not known"):
        config.listen_address("no-such-host.invalid", 1)


def test_a_process_that_was_started_to_ignore_hangups_continues():
    """As with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.stop
            os.kill(os.getpid(), signal.SIGQUIT)
            assert signals.stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_state_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir() == tmp_path / "larpixdaq"
    assert (tmp_path / "larpixdaq").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file/x"):
        state_dir(str(tmp_path / "file" / "x"))
    with pytest.raises(FileError, match=r"udcff': expected UTF-8"):
        state_dir(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))


def test_log_records_never_wait(caplog):
    with caplog.at_level(logging.CRITICAL):
        node = Node("n", "log", f"tcp://127.0.0.1:{free_port()}", {}, info={})
        with pytest.raises(NoCore):
            node.connect(0.1)
        for i in range(20_000):
            logging.getLogger("larpixdaq.test").critical("%d", i)
        assert len(node._shipper._records) <= 2000
        node.close()
