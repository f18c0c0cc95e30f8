"""Routines through the real child process: results, errors, time limits, floods of output, deaths."""

import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from example_counts import examples

from larpixdaq import routines, schema
from larpixdaq.errors import ProtocolError
from larpixdaq.hardware.supervisor import Child
from larpixdaq.protocol import hardware
from larpixdaq.protocol.hardware import Parameter
from larpixdaq.readout.command_queue import CommandQueue
from larpixdaq.readout.configuration_tracker import ConfigurationTracker
from larpixdaq.routines import Routine, load

ROUTINES = '''
import os, signal, sys, time
import numpy as np
from larpixdaq.routines import Routine

def _add(controller, send_data, send_info, a, b=2):
    """Adds.

    More about it."""
    send_info("adding")
    send_data(b"12345678")
    return controller, a + b

def _state(controller, send_data, send_info):
    controller.seen = getattr(controller, "seen", 0) + 1
    return controller, [type(controller).__module__, controller.seen, controller.io]

def _numpy(controller, send_data, send_info):
    return controller, {"array": np.arange(3), "number": np.float32(0.5), "other": object}

def _raises(controller, send_data, send_info):
    raise KeyError("no such chip")

def _exits(controller, send_data, send_info):
    sys.exit(3)

def _nothing(controller, send_data, send_info):
    pass

def _other(controller, send_data, send_info):
    return "other", 3

class Unsaid(BaseException):
    def __str__(self):
        raise RuntimeError

def _unsaid(controller, send_data, send_info):
    raise Unsaid

def _no_text(controller, send_data, send_info):
    raise ValueError("\\udcff")

def _spoils(controller, send_data, send_info):
    del controller.chips
    raise ValueError("spoilt")

def _large(controller, send_data, send_info):
    return controller, "x" * ((64 << 20) - (1 << 17))

def _big(controller, send_data, send_info):
    return controller, "x" * (8 << 20)

def _prints(controller, send_data, send_info, lines):
    for i in range(lines):
        print("line", i)
    os.system("echo from a shell; yes | head -c 1000000")
    return controller, "printed"

def _reports(controller, send_data, send_info):
    for i in range(100_000):
        send_info("step", i, 100_000)
    return controller, "reported"

def _waits(controller, send_data, send_info, path=None):
    send_info("waiting")
    if path:
        os.system(f"sleep 600 & echo $! > {path}")
    time.sleep(600)

def _spins(controller, send_data, send_info):
    list(zip(iter(int, 1), iter(int, 1)))

def _dies(controller, send_data, send_info):
    print("these were my last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def _kills(controller, send_data, send_info):
    os.kill(os.getpid(), 40)

def _leaves(controller, send_data, send_info):
    os._exit(7)

def _old(controller, send_data, send_info, *args):
    return controller, [args[0], float(args[1])]

def _typed(controller, send_data, send_info, chip: str, seconds: float = 1.0, channels: "list[int] | None" = None):
    return controller, [chip, seconds, channels]

registration = {
    f.__name__[1:]: Routine(f.__name__[1:], f, p) for f, p in [
        (_add, ["a", "b"]), (_state, None), (_numpy, []), (_raises, []), (_exits, []), (_nothing, []), (_large, []),
        (_other, []), (_unsaid, []), (_no_text, []), (_spoils, []),
        (_big, []), (_prints, ["lines"]), (_reports, []), (_waits, []), (_spins, []), (_dies, []), (_kills, []),
        (_leaves, []), (_old, ["chip", "seconds"]), (_typed, ["chip", "seconds", "channels"]),
    ]
}
'''


class Call:
    """Stands in for node.Call and keeps its messages."""

    action = "run_routine"

    def __init__(self):
        self.events = []

    def ack(self, text=""):
        self.events.append(("ack", text))

    def progress(self, done, total, text="", value=None):
        self.events.append(("progress", done, total, text, value))

    def result(self, value=None, text=""):
        assert not self.ended
        self.events.append(("result", value, text))

    def fail(self, text, code="failed"):
        assert not self.ended
        self.events.append(("fail", text, code))

    @property
    def ended(self):
        return bool(self.events) and self.events[-1][0] in ("result", "fail")

    @property
    def last(self):
        return self.events[-1]


def until(child, condition, what, limit=30.0):
    """Dispatch until the condition holds."""
    poll = select.poll()
    poll.register(child.fileno(), select.POLLIN)
    end = time.monotonic() + limit
    while not condition():
        left = end - time.monotonic()
        assert left > 0, f"not within {limit} s: {what}"
        poll.poll(left * 1000)
        child.dispatch()


def run(child, name, *args, limit=30.0, time_limit=None, **kwargs):
    call = Call()
    child.run_routine(call, name, list(args), kwargs, time_limit)
    until(child, lambda: call.ended, f"the end of routine {name}", limit)
    return call


@contextmanager
def child_of(folder):
    child = without_boards(folder)
    yield child
    child.close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "routines"
    folder.mkdir()
    (folder / "mine.py").write_text(ROUTINES)
    return folder


def without_boards(folder):
    commands = CommandQueue([], schema.Asic.V2, schema.layout(2), lambda rows, io_group: 0)
    return Child(
        [folder], commands, hardware.Setup([], "2", schema.Asic.V2, 2), ConfigurationTracker("2"), lambda: None
    )


@pytest.fixture
def child(folder):
    with child_of(folder) as child:
        yield child


@pytest.fixture(scope="module")
def same_child(tmp_path_factory):
    """A child for tests that neither end it nor change its Controller."""
    folder = tmp_path_factory.mktemp("routines")
    (folder / "mine.py").write_text(ROUTINES)
    with child_of(folder) as child:
        yield child


def test_hello_world_greets_and_reports_progress(same_child):
    call = run(same_child, "hello_world", "LArPix")
    assert call.events[0] == ("ack", "routine hello_world")
    assert [event[1:3] for event in call.events[1:-1]] == [(0, 2), (1, 2), (2, 2)]
    assert call.last == ("result", "Hello, LArPix!", "")
    assert run(same_child, "hello_world").last[1] == "Hello, world!"


def test_routines_are_listed_with_their_parameters(same_child):
    call = Call()
    same_child.list_routines(call)
    until(same_child, lambda: call.ended, "the list")
    listed = {routine["name"]: routine for routine in call.last[1]}
    assert listed["add"] == {
        "name": "add",
        "params": [
            {"name": "a", "type": "", "required": True, "default": None},
            {"name": "b", "type": "", "required": False, "default": 2},
        ],
        "help": "Adds.\n\nMore about it.",
        "error": "",
    }
    assert listed["state"]["params"] == []
    assert listed["hello_world"]["params"] == [{"name": "name", "type": "str", "required": False, "default": "world"}]
    assert [p["name"] for p in listed["old"]["params"]] == ["chip", "seconds"]


def test_arguments_results_and_the_controller_pass(child):
    assert run(child, "add", 1, b=5).last == ("result", 6, "")
    assert run(child, "add", 1).events[1:3] == [
        ("progress", 0, 0, "adding", None),
        ("progress", 0, 0, "data (8 bytes): its packets are in the stream already", None),
    ]
    assert run(child, "state").last[1] == ["larpix.controller", 1, None]
    assert run(child, "state").last[1] == ["larpix.controller", 2, None], "the Controller is kept"
    assert run(child, "numpy").last[1] == {"array": [0, 1, 2], "number": 0.5, "other": "<class 'object'>"}
    assert len(run(child, "big").last[1]) == 8 << 20


@pytest.mark.parametrize(
    ("name", "args", "code", "words"),
    [
        ("nonsense", (), "unknown", "no routine 'nonsense'; there are add, big, calibrate, dies"),
        ("add", (), "failed", "routine add(a, b=2): missing a required argument: 'a'"),
        ("add", (1, 2, 3), "failed", "too many positional arguments"),
        ("add", (1, "2"), "failed", "routine add: TypeError: unsupported operand"),
        ("typed", (3,), "failed", "(chip, seconds=1.0, channels=None): chip: expected str, found 3"),
        ("typed", ("1-1-2", "fast"), "failed", "seconds: expected float, found 'fast'"),
        ("typed", ("1-1-2", 1, [1, "2"]), "failed", "channels: expected int, found [1, '2']"),
        ("old", (1, 2, 3), "failed", "routine old(chip, seconds): expected at most 2 arguments, found 3: its Routine"),
        ("raises", (), "failed", "routine raises: KeyError: 'no such chip'"),
        ("exits", (), "failed", "routine exits: SystemExit: 3"),
        ("nothing", (), "failed", "routine nothing: expected (controller, result) from it, found NoneType"),
        ("other", (), "failed", "routine other: expected (controller, result) from it, found (str, int)"),
        ("unsaid", (), "failed", "routine unsaid: larpixdaq_routine_mine.Unsaid: <"),
        ("no_text", (), "failed", "routine no_text: ValueError: \\udcff"),
        ("spoils", (), "failed", "routine spoils: ValueError: spoilt"),
        ("large", (), "failed", "routine large: its result: Result: expected at most 66977792 bytes"),
    ],
)
def test_failures_are_reported_and_change_nothing_else(same_child, name, args, code, words):
    event, text, found = run(same_child, name, *args).last
    assert (event, found) == ("fail", code)
    first, *traceback = text.split("\n")
    assert words in first
    raises = name in ("raises", "exits", "unsaid", "no_text", "spoils") or args == (1, "2")
    assert ("Traceback (most recent call last):" in traceback) == raises
    process = same_child._process.pid
    assert run(same_child, "add", 1).last == ("result", 3, "")
    assert same_child._process.pid == process


def test_a_traceback_goes_to_the_operator_and_to_the_log(same_child, caplog):
    for said in (run(same_child, "raises").last[1], caplog.text):
        assert "mine.py" in said
        assert 'raise KeyError("no such chip")' in said


def test_arguments_by_name_and_by_place(same_child):
    assert run(same_child, "typed", "1-1-2", channels=[3]).last[1] == ["1-1-2", 1.0, [3]]
    assert run(same_child, "typed", seconds=2, chip="1-1-2").last[1] == ["1-1-2", 2.0, None]
    # a routine of an earlier version
    assert run(same_child, "old", "1-1-2", 3).last[1] == ["1-1-2", 3.0]
    assert run(same_child, "old", seconds=3, chip="1-1-2").last[1] == ["1-1-2", 3.0]
    assert (
        "tuple index out of range (given 1 of the arguments of old(chip, seconds))"
        in run(same_child, "old", "x").last[1]
    )
    assert "missing a required argument: 'chip'" in run(same_child, "old", seconds=3).last[1]
    assert "multiple values for argument 'chip'" in run(same_child, "old", "x", chip="y").last[1]
    assert "unexpected keyword argument 'chips'" in run(same_child, "old", chips="y").last[1]
    assert (
        run(same_child, "old", "x", timeout=None)
        .last[1]
        .endswith("'timeout'; run_routine(..., time_limit=) ends the routine, .result(timeout=) ends the waiting")
    )


def test_directories_below_the_allowed_ones_can_be_added(child, folder, tmp_path):
    routine = "from larpixdaq.routines import Routine\nregistration = {'%s': Routine('%s', lambda c, d, i: (c, 1))}\n"
    for name, where in (("more", folder / "more"), ("outside", tmp_path / "outside")):
        where.mkdir()
        (where / "file.py").write_text(routine % (name, name))
    (folder / "link").symlink_to(tmp_path / "outside")
    assert run(child, "more").last[2] == "unknown"
    for directory in ("more", str(folder / "more"), "more"):
        call = Call()
        child.load_routines(call, directory)
        until(child, lambda call=call: call.ended, "the list")
        assert "more" in [listed_["name"] for listed_ in call.last[1]]
    assert run(child, "more").last == ("result", 1, "")
    for directory in ("..", str(tmp_path / "outside"), "link", "../outside", "/"):
        call = Call()
        child.load_routines(call, directory)
        assert call.last[:2] == (
            "fail",
            f"load_routines: {directory}: not below a directory of --routines: {folder}",
        )
    for directory, says in [
        ("absent", f"{folder / 'absent'}: no such directory"),
        (None, "expected the name of a directory, found None"),
        ("a\0b", r"expected the name of a directory, found 'a\x00b'"),
        ("x" * 5000, f"'{'x' * 99}: File name too long"),
    ]:
        call = Call()
        child.load_routines(call, directory)
        assert call.last[1] == f"load_routines: {says}"
    assert run(child, "outside").last[2] == "unknown"


def test_params_of_routines_without_a_list_are_those_of_the_signature():
    params = routines.init_routines()["pedestal"].params
    assert params[:4] == ["chips", "samples", "trigger_hz", "leave_off"]
    assert routines.Routine("two", lambda controller, send_data, send_info, *args: None).params is None


def test_without_a_daq(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(ROUTINES)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setattr(routines, "ROUTINES", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ImportError, match=r"broken.py: ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        routines.init_routines(tmp_path)
    said = []
    assert routines.test_routine("add", "controller", None, said.append, [1]) == ("controller", 3)
    assert said == ["adding"]
    assert routines.test_routine("old", None, args=("1-1-2", 3)) == (None, ["1-1-2", 3.0])


def test_wrong_requests_are_refused_at_once(same_child):
    for bad in [
        (3, [], {}, None),
        ("add", "1", {}, None),
        ("add", [], [], None),
        ("add", [], {}, -1),
        ("add", [], {}, "x"),
        ("add", [], {}, 1e30),
        ("add", [], {1: 2}, None),
        ("x" * 1_000_000, 3, {}, None),
        ("add", [1], "x" * 1_000_000, None),
    ]:
        call = Call()
        same_child.run_routine(call, *bad)
        assert call.last[0] == "fail"
        assert "expected" in call.last[1]
        assert len(call.last[1]) < 200
    call = Call()
    same_child.run_routine(call, "add", [1 << 70])
    assert "cannot be sent" in call.last[1]
    assert run(same_child, "add", 1).last == ("result", 3, "")


def test_only_one_routine_runs_and_the_list_is_still_available(child):
    listed = Call()
    child.list_routines(listed)
    until(child, lambda: listed.ended, "the list")
    first, second, again = Call(), Call(), Call()
    child.run_routine(first, "waits")
    until(child, lambda: len(first.events) == 2, "its progress")
    assert child.running == "waits"
    child.run_routine(second, "add", [1])
    assert second.last == ("fail", "routine waits is running, and only one can", "state")
    child.list_routines(again)
    assert again.last[1] == listed.last[1]
    abort, none = Call(), Call()
    child.abort_routine(abort)
    assert first.last == ("fail", "routine waits: aborted by the operator", "failed")
    assert abort.last == ("result", "waits", "routine waits is aborted")
    assert child.running is None
    child.abort_routine(none)
    assert none.last == ("fail", "no routine is running", "state")
    assert run(child, "add", 1).last == ("result", 3, "")


@pytest.mark.parametrize("name", ["waits", "spins"])
def test_a_time_limit_ends_a_routine(child, name):
    assert run(child, name, time_limit=0.5).last == (
        "fail",
        f"routine {name}: stopped at its time limit of 0.5 s",
        "failed",
    )
    assert run(child, "add", 1).last == ("result", 3, "")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("dies", "its process was ended by signal SIGSEGV"),
        ("kills", "its process was ended by signal 40"),
        ("leaves", "its process ended with status 7"),
    ],
)
def test_a_dead_child_fails_the_call_and_a_new_child_starts(child, name, how, caplog):
    assert run(child, name).last == ("fail", f"routine {name}: {how}", "failed")
    if name == "dies":
        assert "these were my last words" in caplog.text
    assert run(child, "add", 1).last == ("result", 3, "")


def test_a_million_lines_of_output_do_not_hold_up_the_loop(child, caplog):
    caplog.set_level("INFO")
    call = Call()
    child.run_routine(call, "prints", [examples(100) * 10_000])
    slowest = 0.0
    end = time.monotonic() + 60
    poll = select.poll()
    poll.register(child.fileno(), select.POLLIN)
    while not call.ended:
        assert time.monotonic() < end
        poll.poll(1000)
        started = time.thread_time()
        child.dispatch()
        slowest = max(slowest, time.thread_time() - started)
    assert call.last == ("result", "printed", "")
    assert slowest < 0.05
    assert "routine says: line 0" in caplog.text
    assert len(caplog.records) < 110


def test_progress_is_limited_in_rate(same_child):
    call = run(same_child, "reports")
    assert 100 <= len(call.events) < 2000
    assert call.last[:2] == ("result", "reported")
    assert "progress reports were left out" in call.last[2]


def test_files_are_read_again_and_broken_files_do_not_affect_others(child, folder, caplog):
    assert run(child, "later").last[2] == "unknown"
    (folder / "later.py").write_text(
        "from larpixdaq.routines import Routine\nregistration = {'later': Routine('later', lambda c, d, i: (c, 1))}\n"
    )
    (folder / "syntax.py").write_text("def (:\n")
    (folder / "types.py").write_text("registration = {'a': 3}\n")
    (folder / "leaves.py").write_text("raise SystemExit('gone')\n")
    assert run(child, "later").last == ("result", 1, "")
    assert all(name in run(child, "nonsense").last[1] for name in ("syntax.py", "types.py", "leaves.py"))
    call = Call()
    child.list_routines(call)
    until(child, lambda: call.ended, "the list")
    assert "later" in [routine["name"] for routine in call.last[1]]
    assert "types.py: TypeError: registration['a']: expected a Routine with a function, found 3" in call.last[2]
    broken = {listed_["name"]: listed_ for listed_ in call.last[1] if listed_["error"]}
    assert list(broken) == ["leaves.py", "syntax.py", "types.py"]
    assert broken["leaves.py"]["error"] == f"{folder / 'leaves.py'}: SystemExit: gone"
    assert broken["leaves.py"]["params"] == []
    assert "routine file not loaded" in caplog.text


def test_load_names_a_missing_folder(tmp_path):
    found, broken = load([tmp_path / "absent"])
    assert isinstance(found["hello_world"], Routine)
    assert broken == {str(tmp_path / "absent"): "No such file or directory"}


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def gone(pid):
    end = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < end, f"process {pid} lives on"
        select.select([], [], [], 0.01)
    return True


def test_close_ends_the_child_and_what_it_started(child, tmp_path):
    call = Call()
    child.run_routine(call, "waits", [str(tmp_path / "pid")])
    until(child, lambda: len(call.events) == 2, "its progress")
    own = tmp_path / "pid"
    end = time.monotonic() + 10
    while not (own.exists() and own.read_text().endswith("\n")):
        assert time.monotonic() < end, "no process of the routine"
        select.select([], [], [], 0.01)
    pids = child._process.pid, int(own.read_text())
    child.close()
    assert call.last == ("fail", "routine waits: the producer is closing", "failed")
    assert all(gone(pid) for pid in pids)


def test_the_child_ends_with_its_parent(folder):
    program = f"""
import os, sys, select
from pathlib import Path
sys.path += {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]!r}
from test_routines import without_boards
class Call:
    action = "run_routine"
    def ack(self, text=""): pass
    def progress(self, *args):
        print(child._process.pid, flush=True)
        os._exit(0)
child = without_boards(Path({str(folder)!r}))
child.run_routine(Call(), "waits")
while True:
    select.select([child.fileno()], [], [], 20)
    child.dispatch()
"""
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert gone(int(parent.stdout))


def test_messages_in_any_pieces_and_garbage():
    listed_ = hardware.RoutineList(
        1, [hardware.RoutineInfo("a", [Parameter("b")], "c"), hardware.RoutineInfo("d", error="e")]
    )
    data = hardware.pack(listed_) + hardware.pack(hardware.Result(2, {"x": [1]}))
    inbox = hardware.Inbox(requests=False)
    found = [message for i in range(len(data)) for message in inbox.take(data[i : i + 1])]
    assert found == [listed_, hardware.Result(2, {"x": [1]})]
    for garbage in (b"\xff" * 8, b"\x01\x00\x00\x00\xc1", hardware.pack(hardware.ListRoutines(1, []))):
        with pytest.raises(ProtocolError, match="message of the child process"):
            list(hardware.Inbox(requests=False).take(garbage))
