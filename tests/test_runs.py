"""The run states without sockets: any order of requests, answers, losses and delays, against a simple model."""

import shutil
import tempfile
from pathlib import Path

import pytest
from actors import counts
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from larpixdaq.control.catalogue import Catalogue, Run
from larpixdaq.control.messages import Answer, Register, packed
from larpixdaq.control.peers import Peers
from larpixdaq.control.runs import RunControl
from larpixdaq.errors import ComponentError, FileError, LarpixDaqError, StateError
from larpixdaq.states import ABORTED, COMPLETE, ENDED, INCOMPLETE, INTERRUPTED, PREPARING, SUSPECT

KINDS = {
    "board 1": "producer",
    "board 2": "producer",
    "disk 1": "storage",
    "disk 2": "storage",
    "monitor": "run_data",
}
EPOCHS = {"board 1": 1, "board 2": 2}


class Team:
    """Components that wait to be told what to answer. What is sent is checked against the catalogue."""

    def __init__(self, directory):
        self.catalogue = Catalogue(directory)
        self.peers = Peers()
        self.runs = RunControl(self.peers, self.catalogue, self)
        self.waiting = []  # (name, request, action, params)
        self.sent = []  # (name, action)
        self.ids = 0
        self.now = 1000.0
        self.instance = {}
        self.inside = {}  # name -> run it is in

    def new_id(self):
        self.ids += 1
        return str(self.ids)

    def send(self, name, request, action, params):
        if name not in self.peers.components:
            return False
        run = self.catalogue.find(params["run"])
        assert run is not None, "somebody was told of a run before the catalogue was"
        self.sent.append((name, action))
        if request not in [one[1] for one in self.waiting]:
            self.waiting.append((name, request, action, params))
        return True

    def register(self, name, instance="1", run=None, **info):
        self.instance[name] = instance
        info = {"layout": 2, "asic": "2", "epoch": EPOCHS.get(name, 0), "free_bytes": 1 << 40, "directory": "/d"} | info
        message = Register(name=name, kind=KINDS[name], instance=instance, info=info, run=run)
        component = self.peers.register(message, name.encode(), self.now)
        self.runs.registered(component, self.now)
        return component

    def lose(self, name):
        self.peers.goodbye(self.peers.components[name])
        self.runs.lost(name, self.now)

    def value(self, name, action, params):
        if KINDS[name] == "producer":
            epoch = EPOCHS[name]
            if action == "prepare_run":
                return {"epoch": epoch, "layout": 2}
            if action in ("end_run", "abort_run"):
                return {"epoch": epoch, "next": 4, "rows": 10, "counts": [counts(1, 10)], "warning": None}
        if KINDS[name] == "storage":
            if action == "prepare_run":
                return {"file": f"/d/{name}", "free_bytes": 1 << 40}
            if action == "end_run":
                stored = [[one["name"], one["epoch"], 1, 10] for one in params["producers"] if one["next"] is not None]
                whole = all(one["next"] is not None for one in params["producers"])
                condition = COMPLETE if whole else INTERRUPTED
                return {"files": [name], "condition": condition, "rows": 10 * len(stored), "stored": stored}
        return {}

    def answer(self, index=0, failing=False, **changed):
        name, request, action, params = self.waiting.pop(index)
        component = self.peers.components.get(name)
        if component is None:
            return
        if failing:
            answer = Answer(request=request, kind="error", text="it broke", error="failed")
        else:
            answer = Answer(request=request, kind="result", value=packed(self.value(name, action, params) | changed))
        self.runs.answered(component, answer, self.now)

    def answer_all(self):
        while self.waiting:
            self.answer()

    def advance(self, seconds):
        self.now += seconds
        self.runs.tick(self.now)

    def close(self):
        self.catalogue.close()


class Reply:
    def __init__(self):
        self.ends = []

    def progress(self, component, text, done=0, total=0):
        assert not self.ends

    def result(self, value):
        self.ends.append(value)

    def error(self, error):
        assert isinstance(error, LarpixDaqError)
        self.ends.append(error)

    def value(self):
        (value,) = self.ends
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture
def team(tmp_path):
    team = Team(tmp_path)
    for name in KINDS:
        team.register(name)
    yield team
    team.close()


def ask(team, action):
    """Start a step of the run; its Reply."""
    reply = Reply()
    if action == "prepare":
        team.runs.prepare("c", "physics", "me", reply, team.now)
    elif action == "abort":
        team.runs.abort("me", reply, team.now)
    else:
        getattr(team.runs, action)(reply, team.now)
    return reply


def do(team, action):
    reply = ask(team, action)
    team.answer_all()
    return reply.value()


def test_a_run_from_beginning_to_end(team):
    assert do(team, "prepare") == {"run": 1, "files": ["/d/disk 1", "/d/disk 2"], "warnings": []}
    assert (team.runs.state, team.runs.number) == ("READY", 1)
    assert do(team, "begin") == {"run": 1, "warnings": []}
    assert team.runs.state == "RUN"
    result = do(team, "end")
    assert result == {
        "run": 1,
        "condition": COMPLETE,
        "rows": 20,
        "stored": 20,
        "files": ["disk 1", "disk 2"],
        "reasons": [],
    }
    assert (team.runs.state, team.runs.number, team.runs.run) == ("STOP", None, None)
    found = team.catalogue.find(1)
    assert (found.condition, found.phase, found.operator, found.comment) == (COMPLETE, ENDED, "me", "c")
    assert found.prepared_ns < found.begun_ns < found.ended_ns
    order = [name for name, action in team.sent if action == "begin_run"]
    assert order.index("disk 1") < order.index("board 1")
    order = [name for name, action in team.sent if action == "end_run"]
    assert order.index("board 2") < order.index("disk 1")
    assert do(team, "prepare")["run"] == 2


def test_io_groups_that_two_producers_have_are_a_warning(team):
    team.peers.components["board 1"].info["io_groups"] = [1, 2]
    team.peers.components["board 2"].info["io_groups"] = [2, 3]
    assert do(team, "prepare")["warnings"] == ["io_group 2 belongs to board 1 and board 2"]


def test_ready_may_end_without_having_begun(team):
    do(team, "prepare")
    assert do(team, "end")["condition"] == COMPLETE


@pytest.mark.parametrize(
    ("steps", "refused", "why"),
    [
        ((), "begin", "not allowed in STOP"),
        ((), "end", "not allowed in STOP"),
        (("prepare",), "prepare", "not allowed in READY"),
        (("prepare", "begin"), "prepare", "not allowed in RUN"),
        (("prepare", "begin"), "begin", "not allowed in RUN"),
    ],
)
def test_what_is_not_allowed_says_why(team, steps, refused, why):
    for step in steps:
        do(team, step)
    with pytest.raises(StateError, match=why):
        ask(team, refused)


def test_one_step_at_a_time(team):
    ask(team, "prepare")
    for action in ("prepare", "begin", "end"):
        with pytest.raises(StateError, match="prepare_run is still going on"):
            ask(team, action)


def test_the_run_number_is_above_all_that_anybody_has_seen(team):
    team.peers.components["disk 2"].info["highest_run"] = 41
    assert do(team, "prepare")["run"] == 42


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda team: [team.lose("board 1"), team.lose("board 2")], "no producer is registered"),
        (lambda team: [team.lose("disk 1"), team.lose("disk 2")], "no offline storage is registered"),
        (lambda team: team.peers.components["board 2"].info.update(layout=4), "2.4: board 1; 3.0: board 2"),
        (lambda team: team.peers.components["board 2"].info.update(layout="?"), "unknown layout '[?]': board 2"),
        (lambda team: team.peers.components["disk 2"].info.update(free_bytes=5 << 20), "disk 2 has 5.0 MiB .* /d,"),
        (lambda team: team.peers.components["disk 2"].status.update(free_bytes=0), "disk 2 has 0.0 MiB"),
    ],
)
def test_a_run_that_cannot_be_prepared(team, change, why):
    change(team)
    with pytest.raises(ComponentError, match=why):
        ask(team, "prepare")
    assert team.runs.state == "STOP"
    assert team.catalogue.highest() == 0


@pytest.mark.parametrize("broken", ["board 2", "disk 1"])
@pytest.mark.parametrize("how", ["fails", "is silent", "is lost", "talks nonsense"])
def test_when_a_required_component_fails_prepare_all_go_back(team, broken, how):
    reply = ask(team, "prepare")
    while not reply.ends:
        names = [one[0] for one in team.waiting]
        others = [i for i, name in enumerate(names) if name != broken]
        if others:
            team.answer(others[0])
        elif how == "fails":
            team.answer(failing=True)
        elif how == "talks nonsense":
            team.answer(layout="x", file=7)
        elif how == "is lost":
            team.waiting.clear()
            team.lose(broken)
            team.advance(0.1)
        else:
            team.advance(10.1)
            team.waiting.clear()
            team.advance(1.1)
    with pytest.raises(ComponentError, match=broken):
        reply.value()
    assert team.runs.state == "STOP"
    cancelled = {name for name, action in team.sent if action == "cancel_run"}
    assert cancelled >= {"board 1", "board 2", "disk 1", "disk 2"} - {broken}
    assert team.catalogue.find(1).condition == "CANCELLED"
    for name in KINDS:
        if name not in team.peers.components:
            team.register(name, "2")
    team.waiting.clear()
    for component in team.peers.components.values():
        component.run = None
    assert do(team, "prepare")["run"] == 2


def test_when_begin_fails_nothing_taken_is_thrown_away(team):
    do(team, "prepare")
    reply = ask(team, "begin")
    while any(name != "board 2" for name, *_ in team.waiting):
        team.answer(next(i for i, one in enumerate(team.waiting) if one[0] != "board 2"))
    team.answer(failing=True)
    team.answer_all()
    with pytest.raises(ComponentError, match="board 2: it broke"):
        reply.value()
    assert team.runs.state == "STOP"
    assert team.catalogue.find(1).condition == ABORTED
    assert ("disk 1", "end_run") in team.sent


def test_a_silent_monitor_is_only_a_warning(team):
    def without_monitor(action):
        reply = ask(team, action)
        while not reply.ends:
            index = next((i for i, one in enumerate(team.waiting) if one[0] != "monitor"), None)
            if index is None:
                team.advance(1.01)
            else:
                team.answer(index)
        return reply.value()

    warning = "monitor has not answered prepare_run within 1 s"
    assert without_monitor("prepare") == {"run": 1, "files": ["/d/disk 1", "/d/disk 2"], "warnings": [warning]}
    assert without_monitor("begin")["warnings"]
    assert without_monitor("end")["condition"] == COMPLETE


def test_rows_that_are_missing_are_named(team):
    do(team, "prepare")
    reply = ask(team, "end")
    while not reply.ends:
        name = team.waiting[0][0]
        stored = {"stored": [["board 1", 1, 1, 10], ["board 2", 2, 1, 7]]} if name.startswith("disk") else {}
        team.answer(**stored)
    assert reply.value()["condition"] == INCOMPLETE
    assert "disk 1: 3 of 10 rows are missing of board 2 io_group 1 (epoch 2)" in reply.value()["reasons"]
    assert (reply.value()["rows"], reply.value()["stored"]) == (20, 17)


@pytest.mark.parametrize(
    ("first", "second", "run"),
    [
        (COMPLETE, INCOMPLETE, COMPLETE),
        (SUSPECT, INTERRUPTED, SUSPECT),
        (INTERRUPTED, INCOMPLETE, INCOMPLETE),
        ("nonsense", "nonsense", INTERRUPTED),
    ],
)
def test_the_better_copy_counts(team, first, second, run):
    do(team, "prepare")
    reply = ask(team, "end")
    while not reply.ends:
        name = team.waiting[0][0]
        team.answer(**({"condition": first if name == "disk 1" else second} if name.startswith("disk") else {}))
    assert reply.value()["condition"] == run


def test_warnings_of_producers_are_reasons(team):
    do(team, "prepare")
    reply = ask(team, "end")
    while not reply.ends:
        team.answer(**({"warning": "still reading after 5 s"} if team.waiting[0][0] == "board 1" else {}))
    assert reply.value()["condition"] == COMPLETE
    assert reply.value()["reasons"] == ["board 1: still reading after 5 s"]


def test_end_does_not_wait_for_a_lost_producer_longer_than_5_s(team):
    do(team, "prepare")
    do(team, "begin")
    team.lose("board 2")
    reply = ask(team, "end")
    team.answer_all()
    team.advance(4.9)
    assert not reply.ends
    team.advance(0.2)
    team.answer_all()
    assert reply.value()["condition"] == INTERRUPTED
    assert "board 2 is lost" in reply.value()["reasons"]
    # It was only away: back in its run, it is told that this is over, and the run is judged anew.
    team.register("board 2", run=1)
    assert team.waiting == [("board 2", team.waiting[0][1], "end_run", {"run": 1})]
    team.answer_all()
    assert team.catalogue.find(1).rows == 20
    assert team.runs.state == "STOP"


def test_end_reaches_stop_within_30_s_whatever_the_storages_do(team):
    do(team, "prepare")
    reply = ask(team, "end")
    team.answer()
    team.answer()
    team.advance(29.0)
    assert not reply.ends
    team.advance(1.1)
    assert reply.value()["condition"] == INTERRUPTED
    assert team.runs.state == "STOP"
    team.answer_all()  # they were only slow: delivery makes the run complete
    assert team.catalogue.find(1).condition == COMPLETE
    assert team.catalogue.find(1).files == ["disk 1", "disk 2"]


def test_a_question_is_asked_again_when_a_component_comes_back(team):
    do(team, "prepare")
    reply = ask(team, "end")
    team.waiting.clear()  # lost on the way
    team.lose("board 1")
    team.lose("board 2")
    team.advance(3)
    team.register("board 1", run=1)
    team.register("board 2", instance="restarted")
    team.answer_all()
    assert "board 2 was restarted during end_run" in reply.value()["reasons"]
    assert not any("board 1" in reason for reason in reply.value()["reasons"])


def test_a_restarted_producer_joins_the_run_under_a_new_epoch(team, monkeypatch):
    do(team, "prepare")
    do(team, "begin")
    team.lose("board 2")
    monkeypatch.setitem(EPOCHS, "board 2", 99)
    team.register("board 2", instance="restarted")
    team.answer_all()
    assert team.runs.run.producers == {"board 1": [1], "board 2": [2, 99]}
    assert [action for name, action in team.sent if name == "board 2"] == ["prepare_run", "begin_run"] * 2
    result = do(team, "end")
    assert result["condition"] == INTERRUPTED
    assert "board 2: totals of epoch 2 did not reach the core" in result["reasons"]


def test_a_name_that_was_not_there_stays_out_but_a_monitor_joins(team):
    team.lose("board 2")
    team.lose("monitor")
    do(team, "prepare")
    do(team, "begin")
    team.register("board 2")
    team.register("monitor", instance="2")
    team.answer_all()
    assert not [one for one in team.sent if one[0] == "board 2"]
    assert ("monitor", "begin_run") in team.sent


@pytest.mark.parametrize("steps", [("prepare",), ("prepare", "begin")])
def test_abort_keeps_what_was_taken(team, steps):
    for step in steps:
        do(team, step)
    result = do(team, "abort")
    assert (result["condition"], result["stored"], team.runs.state) == (ABORTED, 20, "STOP")
    assert ("board 1", "abort_run") in team.sent


def test_abort_interrupts_what_is_going_on(team):
    do(team, "prepare")
    ending = ask(team, "end")
    team.answer()
    aborting = ask(team, "abort")
    with pytest.raises(StateError, match="end_run was aborted by me"):
        ending.value()
    team.answer_all()
    assert aborting.value()["condition"] == ABORTED
    assert aborting.value()["rows"] == 20


def test_abort_of_prepare_and_in_stop(team):
    preparing = ask(team, "prepare")
    team.answer()
    aborting = ask(team, "abort")
    team.answer_all()
    with pytest.raises(StateError, match="aborted by me"):
        preparing.value()
    assert aborting.value()["condition"] == "CANCELLED"
    assert team.runs.state == "STOP"
    assert do(team, "abort")["run"] is None


def restart(team):
    """Another core with the same catalogue."""
    new = object.__new__(Team)
    team.close()
    new.__init__(team.catalogue.path.parent)
    return new


@pytest.mark.parametrize(("steps", "state"), [(("prepare",), "READY"), (("prepare", "begin"), "RUN")])
def test_a_restarted_core_picks_the_run_up(team, steps, state):
    for step in steps:
        do(team, step)
    second = restart(team)
    assert second.runs.state == "STOP"
    for name in KINDS:
        component = second.register(name, run=1)
        component.begun = state == "RUN"
    assert (second.runs.state, second.runs.number) == (state, 1)
    if state == "READY":
        do(second, "begin")
    assert do(second, "end")["condition"] == COMPLETE
    second.close()


def test_a_restarted_core_finishes_what_it_had_begun(team):
    do(team, "prepare")
    do(team, "begin")
    ask(team, "end")
    team.answer()  # board 1 has ended, nobody else
    second = restart(team)
    second.register("board 1")
    for name in ("board 2", "disk 1", "disk 2", "monitor"):
        second.register(name, run=1)
    second.advance(2.1)
    second.answer_all()
    assert second.runs.state == "STOP"
    assert second.catalogue.find(1).phase == ENDED
    assert not [one for one in second.sent if one[1] == "prepare_run"]
    second.close()


def test_a_restarted_core_with_fresh_components_starts_anew(team):
    do(team, "prepare")
    second = restart(team)
    for name in KINDS:
        second.register(name, instance="fresh")
    assert second.runs.state == "STOP"
    assert do(second, "prepare")["run"] == 2
    assert second.catalogue.find(1).condition == INTERRUPTED
    second.close()


def test_a_core_that_died_in_prepare_cancels(team):
    ask(team, "prepare")
    second = restart(team)
    assert second.catalogue.find(1).phase == PREPARING
    second.register("board 1", run=1)
    assert second.waiting[0][2] == "cancel_run"
    second.answer_all()
    for name in list(KINDS)[1:]:
        second.register(name)
    assert do(second, "prepare")["run"] == 2
    second.close()


def test_a_run_that_the_catalogue_does_not_know_is_left_alone_until_aborted(team):
    team.lose("board 1")
    team.register("board 1", instance="2", run=77)
    assert not team.waiting
    with pytest.raises(ComponentError, match="board 1 is still in run 77"):
        ask(team, "prepare")
    team.catalogue.save(Run(77, "", "", "", 0, phase=ENDED), new=True)  # what Team.send() checks
    do(team, "abort")
    assert do(team, "prepare")["run"] == 78


def test_two_cores_never_share_a_catalogue(team):
    with pytest.raises(FileError, match="another core"):
        Catalogue(team.catalogue.path.parent)


def test_a_catalogue_that_is_none(tmp_path):
    (tmp_path / "catalogue.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(FileError, match="not a database"):
        Catalogue(tmp_path)


def test_comments_are_kept_with_the_run(team):
    with pytest.raises(StateError):
        team.runs.comment("me", "too early")
    do(team, "prepare")
    assert team.runs.comment("me", "beam is on") == 1
    (comment,) = team.catalogue.comments(1)
    assert (comment["operator"], comment["text"]) == ("me", "beam is on")


class AnyOrder(RuleBasedStateMachine):
    """The model: the state follows from which steps have ended well; every step ends exactly once."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.team = Team(self.directory)
        for name in KINDS:
            self.team.register(name)
        self.state = "STOP"
        self.going_on = None  # (action, reply)
        self.numbers = []
        self.restarts = 0

    def teardown(self):
        try:
            # Whatever has happened: within a minute all is quiet again, and the next run can be taken.
            for _ in range(12):
                self.team.answer_all()
                self.team.advance(6)
            self.look()
            assert self.team.runs.main is None
            if self.team.runs.state != "STOP":
                do(self.team, "abort")
            for name in KINDS:
                if name not in self.team.peers.components:
                    self.team.register(name, "last")
            do(self.team, "abort")
            assert self.team.runs.state == "STOP"
            assert do(self.team, "prepare")["run"] > max(self.numbers, default=0)
        finally:
            self.team.close()
            shutil.rmtree(self.directory)

    def look(self):
        """Follow in the model what has ended."""
        if self.going_on is not None and self.going_on[1].ends:
            action, reply = self.going_on
            (value,) = reply.ends
            self.going_on = None
            if action == "prepare":
                self.state = "STOP" if isinstance(value, Exception) else "READY"
            elif action == "begin":
                self.state = "STOP" if isinstance(value, Exception) else "RUN"
            else:
                assert not isinstance(value, Exception), f"{action} did not reach STOP: {value}"
                self.state = "STOP"

    @rule(action=st.sampled_from(["prepare", "begin", "end", "abort"]))
    def ask(self, action):
        self.look()
        before = self.going_on
        refusal = None
        try:
            reply = ask(self.team, action)
        except LarpixDaqError as error:
            refusal = error
        if refusal is not None:
            assert action != "abort"
            allowed = {"prepare": ("STOP",), "begin": ("READY",), "end": ("READY", "RUN")}[action]
            if self.state in allowed and before is None:
                assert action == "prepare"
                assert isinstance(refusal, ComponentError)
            return
        if before is not None:
            assert action == "abort"
            assert isinstance(before[1].ends[0], StateError)
        if action == "prepare":
            number = self.team.catalogue.highest()
            assert number not in self.numbers
            self.numbers.append(number)
        self.going_on = (action, reply)

    @precondition(lambda self: self.team.waiting)
    @rule(data=st.data(), failing=st.sampled_from([False, False, False, True]))
    def answer(self, data, failing):
        self.team.answer(data.draw(st.integers(0, len(self.team.waiting) - 1)), failing)

    @rule()
    def answer_all(self):
        self.team.answer_all()

    @rule(seconds=st.sampled_from([0.1, 1.1, 5.5, 31.0]))
    def wait(self, seconds):
        self.team.advance(seconds)

    @rule(name=st.sampled_from(list(KINDS)))
    def lose(self, name):
        if name in self.team.peers.components:
            self.team.inside[name] = self.team.peers.components[name].run
            self.team.lose(name)

    @rule(name=st.sampled_from(list(KINDS)), restarted=st.booleans())
    def come_back(self, name, restarted):
        if name not in self.team.peers.components:
            self.restarts += 1
            instance = str(self.restarts) if restarted else self.team.instance[name]
            self.team.register(name, instance, None if restarted else self.team.inside[name])

    @invariant()
    def state_is_that_of_the_model(self):
        self.look()
        if self.going_on is None:
            assert self.team.runs.state == self.state
            assert (self.team.runs.number is None) == (self.state == "STOP")


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
