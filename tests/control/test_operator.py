"""The Operator: requests as generators, waiting, IPython, Ctrl-C, and missing cores."""

import contextlib
import gc
import re
import signal
import sys
import threading
import time

import pytest
from fake_core import all_running, core, monitor, producer, storage
from processes import LIMIT, Process, free_port, until

from larpixdaq.control.client import Request, Response
from larpixdaq.errors import NoCore, ProtocolError, RequestError, RequestTimeout
from larpixdaq.operator import Operator


class Printer:
    """The printer that IPython gives to _repr_pretty_."""

    def __init__(self):
        self.shown = ""

    def text(self, text):
        self.shown += text

    def pretty(self, value):
        self.shown += repr(value)


def shown(request):
    printer = Printer()
    request._repr_pretty_(printer, False)
    return printer.shown


def fed(*responses):
    request = Request("test", lambda: 0.0)
    for response in responses:
        request.take(response)
    return request


FAILED = RequestError("it broke")
ENDED_WELL = (Response("ack"), Response("progress", "it", "half", done=1, total=2), Response("result", value=5))
ENDED_ILL = (Response("ack"), Response("error", text="it broke", error=FAILED))


def test_iterating_ends_with_the_result():
    request = fed(*ENDED_WELL)
    kinds = []
    for response in request:
        kinds.append(response.kind)
    assert kinds == ["ack", "progress", "result"]
    assert response.value == 5
    assert request.result() == request.result(0) == 5
    with pytest.raises(StopIteration):
        next(request)

    values = []

    def outer():
        values.append((yield from fed(*ENDED_WELL)))

    assert len(list(outer())) == 3
    assert values == [5]


def test_iterating_over_a_failed_request_raises():
    request = fed(*ENDED_ILL)
    kinds = []
    with pytest.raises(RequestError, match="it broke"):
        kinds.extend(response.kind for response in request)
    assert kinds == ["ack", "error"]
    with pytest.raises(StopIteration):
        next(request)
    for _ in range(2):
        with pytest.raises(RequestError, match="it broke"):
            request.result()


UNSEEN = "larpixdaq: test failed and nobody looked at it: RequestError: it broke (.result() waits and raises)\n"


def test_an_unseen_error_is_printed_when_the_request_is_dropped(capsys):
    fed(*ENDED_WELL)
    assert capsys.readouterr().err == ""
    request = fed(Response("ack"), Response("error", text="it broke", error=RequestError("it broke\nand how")))
    assert (request.done, next(request).kind) == (True, "ack")
    assert capsys.readouterr().err == ""
    del request
    assert capsys.readouterr().err == UNSEEN


@pytest.mark.parametrize("look", [list, repr, Request.result, Request.readable, lambda it: it.latest, shown])
def test_a_seen_error_is_not_printed(look, capsys):
    with contextlib.suppress(RequestError):
        look(fed(*ENDED_ILL))
    assert capsys.readouterr().err == ""


def test_an_error_of_a_dropped_request_is_printed(running, operator, capsys):
    operator.begin_run()
    said = []
    until(lambda: said.append(capsys.readouterr().err) or "".join(said), "the error of begin_run")
    assert re.fullmatch(r"larpixdaq: begin_run failed and nobody looked at it: StateError: .+\n", "".join(said))


def test_unseen_errors_are_printed_at_exit(tmp_path, running):
    script = tmp_path / "hasty.py"
    script.write_text(
        f"from larpixdaq.operator import Operator\no = Operator({running.address!r})\n"
        "kept = o.begin_run()\nseen = o.begin_run()\no.state().result(5)\nrepr(seen)\no.end_run()\n"
    )
    with Process("hasty", directory=tmp_path, env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])}) as process:
        assert process.wait() == 0, process.stderr
    lines = sorted(process.stderr.splitlines())
    assert [line.split(" failed and nobody")[0] for line in lines] == ["larpixdaq: begin_run", "larpixdaq: end_run"]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda it: it["condition"],
        lambda it: "condition" in it,
        lambda it: it == "STOP",
        lambda it: it != {},
    ],
)
def test_a_request_used_as_its_result_says_how_to_get_the_result(misuse):
    request = fed(*ENDED_WELL)
    with pytest.raises(TypeError, match=r"^test: .*\.result\(\)"):
        misuse(request)
    assert request in [fed(), request], "Requests are compared as objects"
    assert len({request, fed()}) == 2
    assert len(list(request)) == 3


def test_a_request_is_a_generator():
    request = fed(*ENDED_WELL)
    assert next(request).kind == "ack"
    with pytest.raises(ZeroDivisionError):
        request.throw(ZeroDivisionError())
    assert list(request) == []
    assert request.result() == 5
    request = fed(*ENDED_WELL)
    request.close()
    assert list(request) == []


def test_a_timeout_leaves_the_request_usable():
    request = fed(Response("ack"))
    with pytest.raises(RequestTimeout, match=r"test: no result within 0.05 s"):
        request.result(0.05)
    with pytest.raises(TimeoutError):
        request.result(0)
    request.take(Response("result", value=1))
    request.take(Response("progress"))  # too late, and without effect
    assert request.result(0) == 1
    assert [one.kind for one in request] == ["ack", "result"]


def test_a_silent_core_raises_no_core_and_leaves_the_request_usable():
    silence = [3.0]
    request = Request("test", lambda: silence[0])
    with pytest.raises(NoCore, match="not heard for 2 s"):
        request.result()
    with pytest.raises(NoCore):
        next(request)
    silence[0] = 0.1
    request.take(Response("result", value=1))
    assert next(request).value == 1


def test_responses_as_text():
    assert str(Response("progress", "LArPix board", "half", None, 1, 2)) == "LArPix board: progress 1/2 half"
    assert str(Response("result", value=[1])) == "result [1]"
    assert repr(fed()) == "<Request test: no answer yet>"


def test_showing_a_request_waits_and_consumes_nothing(monkeypatch):
    request = fed(*ENDED_WELL)
    assert shown(request) == shown(request) == "5"
    assert len(list(request)) == 3
    assert shown(fed(*ENDED_ILL)) == "RequestError: it broke"
    request = fed(Response("ack"))
    threading.Timer(0.1, lambda: request.take(Response("result", value=7))).start()
    assert shown(request) == "7"
    monkeypatch.setattr("larpixdaq.control.client._SHOW", 0.05)
    assert shown(fed(Response("progress", "it", "half"))) == "<Request test: it: progress half>"


def test_in_ipython(running, operator):
    pytest.importorskip("IPython")
    from IPython.lib.pretty import pretty

    assert pretty(operator.state()) == "'STOP'"
    assert "no run is prepared" in pretty(operator.end_run())


def test_without_ipython(tmp_path, running):
    script = tmp_path / "alone.py"
    script.write_text(
        "import sys\nsys.modules['IPython'] = None\nfrom larpixdaq.operator import Operator\n"
        f"o = Operator({running.address!r})\nprint(o.state().result(5))\n"
        "heavy = {'h5py', 'larpix', 'serial', 'IPython', 'matplotlib'} & {n for n, m in sys.modules.items() if m}\n"
        "assert not heavy, heavy\n"
    )
    with Process("alone", directory=tmp_path, env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])}) as process:
        assert process.wait() == 0, process.stderr
        assert process.stdout == "STOP\n"
        assert process.stderr == ""
    until(lambda: not running._peers.operators, "goodbye at exit")


@pytest.fixture
def ctrl_c_interrupts():
    """As at a terminal: a process that a script starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_while_waiting_leaves_the_request_usable(running, operator):
    with producer(running.address).running() as board:
        request = operator.run_routine("long")
        (call,) = until(lambda: board.open, "the routine")
        main = threading.main_thread().ident
        threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            request.result(LIMIT)
        assert operator.state().result(LIMIT) == "STOP"
        call.result("late")
        assert request.result(LIMIT) == "late"


def test_dropping_a_request_does_not_cancel_it(running, operator):
    with producer(running.address).running() as board:
        operator.run_routine("long")
        (call,) = until(lambda: board.open, "the routine")
        gc.collect()
        call.result("nobody cares")
        assert operator.state().result(LIMIT) == "STOP"
        until(lambda: not operator._connection._sent, "the connection to forget it")


def test_no_core():
    started = time.monotonic()
    with pytest.raises(NoCore, match=r"no core answers at tcp://127\.0\.0\.1"):
        Operator(f"tcp://127.0.0.1:{free_port()}")
    assert 1.5 < time.monotonic() - started < 10


def test_a_core_that_vanishes_raises_no_core_after_2_s(tmp_path):
    with core(tmp_path / "state") as running:
        operator = Operator(running.address)
        board = producer(running.address)
        board.node.connect()
        request = operator.run_routine("long")
        assert next(request).kind == "ack"
    started = time.monotonic()
    with pytest.raises(NoCore):
        request.result(LIMIT)
    assert 1.0 < time.monotonic() - started < 10
    assert "no core is heard" in shown(operator.state())
    operator.close()
    board.close()


def test_closing_an_operator_fails_its_open_requests(running):
    with producer(running.address).running():
        operator = Operator(running.address)
        request = operator.run_routine("long")
        operator.close()
        with pytest.raises(NoCore, match="closed"):
            request.result(LIMIT)
        operator.close()
        with pytest.raises(NoCore, match="state: this Operator is closed"):
            operator.state().result(LIMIT)


def test_a_dropped_operator_is_closed(running):
    operator = Operator(running.address)
    operator.state().result(LIMIT)
    del operator
    gc.collect()
    until(lambda: not running._peers.operators, "goodbye")


def test_a_parameter_that_cannot_be_sent_raises_at_once(operator):
    with pytest.raises(ProtocolError, match="cannot be sent"):
        operator.run_routine("x", object())


def test_many_threads_share_an_operator(running, operator):
    with all_running(monitor(running.address)):
        failures = []

        def look():
            try:
                for _ in range(50):
                    assert operator.packet_rate().result(LIMIT) == {"now": 5.0}
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert not failures


def test_the_older_names(running, operator):
    with all_running(producer(running.address), storage(running.address)):
        assert operator.prepare_physics_run(comment="c").result(LIMIT)["run"] == 1
        assert "READY, run 1" in until(lambda: "READY" in repr(operator) and repr(operator), "READY")
        operator.begin_physics_run().result(LIMIT)
        assert operator.end_physics_run().result(LIMIT)["condition"] == "COMPLETE"


def test_an_operator_without_an_address_is_for_this_machine(monkeypatch, running):
    monkeypatch.setattr("larpixdaq.config.LOOPBACK", running.address)
    for arguments in ((), (None,)):
        with Operator(*arguments) as operator:
            assert operator.state().result(LIMIT) == "STOP"
