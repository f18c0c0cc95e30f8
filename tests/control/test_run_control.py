"""The run states without sockets: the requests to components, the steps after their answers, and a run's condition."""

import json
import os
import re
import sqlite3

import msgspec
import numpy as np
import pytest
from fake_core import counts, storage_status
from hypothesis import given
from hypothesis import strategies as st
from run_control_harness import EPOCHS, KINDS, Team, ask, do, finished, restart

from larpixdaq.constants import ENDED, Count, RunCondition, best, worst
from larpixdaq.control.catalogue import Author, Catalogue, Run
from larpixdaq.control.scatter_gather import MANY_NAMES, fold_reasons
from larpixdaq.errors import ComponentError, FileError, StateError


@pytest.fixture
def team(tmp_path):
    team = Team(tmp_path)
    for name in KINDS:
        team.register(name)
    yield team
    team.close()


def test_a_run_from_beginning_to_end(team):
    assert do(team, "prepare") == {"run": 1, "files": ["/d/disk 1", "/d/disk 2"], "warnings": []}
    assert (team.runs.state, team.runs.number) == ("READY", 1)
    assert do(team, "begin") == {"run": 1, "warnings": []}
    assert team.runs.state == "RUN"
    result = do(team, "end")
    assert result == {
        "run": 1,
        "condition": RunCondition.COMPLETE,
        "rows": 20,
        "stored": 20,
        "files": ["disk 1", "disk 2"],
        "reasons": [],
    }
    assert (team.runs.state, team.runs.number, team.runs.run) == ("STOP", None, None)
    found = team.catalogue.find(1)
    assert (found.condition, found.phase, found.operator, found.comment) == (RunCondition.COMPLETE, ENDED, "me", "c")
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
    assert do(team, "end")["condition"] == RunCondition.COMPLETE


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
def test_refused_requests_name_the_reason(team, steps, refused, why):
    for step in steps:
        do(team, step)
    with pytest.raises(StateError, match=why):
        ask(team, refused)


def test_one_step_at_a_time(team):
    ask(team, "prepare")
    for action in ("prepare", "begin", "end"):
        with pytest.raises(StateError, match="prepare_run is still going on"):
            ask(team, action)


def test_the_run_number_is_above_those_of_all_storages(team):
    team.peers.components["disk 2"].info["highest_run"] = 41
    assert do(team, "prepare")["run"] == 42


@pytest.mark.parametrize("number", [2**63 - 2, 10**18 - 1, 9_999_999, 1_000_001])
def test_an_impossible_run_number_of_a_storage_is_ignored(team, number):
    """All later numbers would be above it."""
    team.peers.components["disk 1"].info["highest_run"] = 7
    team.peers.components["disk 2"].info["highest_run"] = number
    prepared = do(team, "prepare")
    assert prepared["run"] == 8
    assert f"disk 2: the highest run in /d is {number}, more than 1000000 above" in prepared["warnings"][0]


def test_no_run_follows_the_last_number(team):
    team.catalogue.save(Run(9_999_999, "", "", "", 0, phase="ENDED"), new=True)
    with pytest.raises(StateError, match="run 9999999 was the last one, numbers have 7 digits"):
        ask(team, "prepare")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda team: [team.lose("board 1"), team.lose("board 2")], "no producer is registered"),
        (lambda team: [team.lose("disk 1"), team.lose("disk 2")], "no offline storage is registered"),
        (lambda team: team.peers.components["board 2"].info.update(layout=4), "2.4: board 1; 3.0: board 2"),
        (lambda team: team.peers.components["board 2"].info.update(layout="?"), "unknown layout '[?]': board 2"),
        (lambda team: team.peers.components["disk 2"].info.update(free_bytes=5 << 20), "disk 2 has 5.0 MiB .* /d,"),
        (
            lambda team: team.peers.components["disk 2"].status.update(storage_status(free_bytes=0)),
            "disk 2 has 0.0 MiB",
        ),
    ],
)
def test_a_run_that_cannot_be_prepared(team, change, why):
    change(team)
    with pytest.raises(ComponentError, match=why):
        ask(team, "prepare")
    assert team.runs.state == "STOP"
    assert team.catalogue.highest == 0


@pytest.mark.parametrize("line", [[], [1], [1, 2, 3]])
def test_totals_without_all_counters_do_not_stop_the_run_states(team, line, monkeypatch):
    do(team, "prepare")
    do(team, "begin")
    whole = team.value

    def value(name, action, params):
        wrong = {"counts": [line]} if action == "end_run" and KINDS[name] == "producer" else {}
        return whole(name, action, params) | wrong

    monkeypatch.setattr(team, "value", value)
    assert do(team, "end")["condition"] != RunCondition.COMPLETE
    assert team.runs.state == "STOP"


@pytest.mark.parametrize("broken", ["board 2", "disk 1"])
@pytest.mark.parametrize("how", ["fails", "is silent", "is lost", "talks nonsense"])
def test_when_prepare_fails_all_components_cancel_the_run(team, broken, how):
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


def test_when_begin_fails_the_data_are_kept(team):
    do(team, "prepare")
    reply = ask(team, "begin")
    while any(name != "board 2" for name, *_ in team.waiting):
        team.answer(next(i for i, one in enumerate(team.waiting) if one[0] != "board 2"))
    team.answer(failing=True)
    team.answer_all()
    with pytest.raises(ComponentError, match="board 2: it broke"):
        reply.value()
    assert team.runs.state == "STOP"
    assert team.catalogue.find(1).condition == RunCondition.ABORTED
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
    assert without_monitor("end")["condition"] == RunCondition.COMPLETE


def end_with(team, **answers):
    """The result of end_run, if these fields of answers differ, by component: `disk_1={"rows": 5}`."""
    reply = ask(team, "end")
    while not reply.ends:
        team.answer(**answers.get(team.waiting[0][0].replace(" ", "_"), {}))
    return reply.value()


def test_rows_that_are_missing_are_named(team):
    do(team, "prepare")
    stored = {"stored": [["board 1", 1, 1, 10], ["board 2", 2, 1, 7]]}
    result = end_with(team, disk_1=stored, disk_2=stored)
    assert result["condition"] == RunCondition.INCOMPLETE
    assert "disk 1: 3 of 10 rows are missing of board 2 io_group 1 (epoch 2)" in result["reasons"]
    assert (result["rows"], result["stored"]) == (20, 17)


@pytest.mark.parametrize(
    ("first", "second", "run"),
    [
        (RunCondition.COMPLETE, RunCondition.INCOMPLETE, RunCondition.COMPLETE),
        (RunCondition.COMPLETE, RunCondition.SUSPECT, RunCondition.SUSPECT),
        (RunCondition.SUSPECT, RunCondition.INTERRUPTED, RunCondition.SUSPECT),
        (RunCondition.INTERRUPTED, RunCondition.INCOMPLETE, RunCondition.INCOMPLETE),
        ("nonsense", "nonsense", RunCondition.INTERRUPTED),
        (RunCondition.CONTINUED, RunCondition.CONTINUED, RunCondition.INTERRUPTED),
        (RunCondition.CONTINUED, RunCondition.INCOMPLETE, RunCondition.INCOMPLETE),
    ],
)
def test_the_better_copy_counts(team, first, second, run):
    do(team, "prepare")
    assert end_with(team, disk_1={"condition": first}, disk_2={"condition": second})["condition"] == run


def test_conditions_have_one_order_and_are_sent_and_stored_as_their_texts():
    ladder = []
    for text in ("ABORTED", "INTERRUPTED", "INCOMPLETE", "CONTINUED", "COMPLETE, suspect"):
        found = {one: one not in ("RUNNING", "CANCELLED", *ladder) for one in RunCondition}
        ladder.append(worst(found))
        assert (str(ladder[-1]), f"{ladder[-1]}", json.dumps(ladder[-1])) == (text, text, f'"{text}"')
        assert msgspec.msgpack.encode(ladder[-1]) == msgspec.msgpack.encode(text)
        assert np.array([ladder[-1]], "S32")[0].decode() == text
    assert (worst({}), worst({}, "no condition"), best([])) == ("COMPLETE", "INTERRUPTED", "INTERRUPTED")


def test_warnings_of_producers_are_reasons(team):
    do(team, "prepare")
    result = end_with(team, board_1={"warning": "still reading after 5 s"})
    assert (result["condition"], result["reasons"]) == (RunCondition.COMPLETE, ["board 1: still reading after 5 s"])


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
    assert reply.value()["condition"] == RunCondition.INTERRUPTED
    assert "board 2 is lost" in reply.value()["reasons"]
    # It comes back and is still in the run: it gets end_run, and the run is judged again.
    team.register("board 2", run=1)
    assert team.waiting == [("board 2", team.waiting[0][1], "end_run", {"run": 1})]
    team.answer_all()
    assert team.catalogue.find(1).rows == 20
    assert team.runs.state == "STOP"


def test_end_reaches_stop_within_30_s_without_answers_of_storages(team):
    do(team, "prepare")
    reply = ask(team, "end")
    team.answer()
    team.answer()
    team.advance(29.0)
    assert not reply.ends
    team.advance(1.1)
    assert reply.value()["condition"] == RunCondition.INTERRUPTED
    assert team.runs.state == "STOP"
    team.answer_all()  # late answers make the run complete
    assert team.catalogue.find(1).condition == RunCondition.COMPLETE
    assert team.catalogue.find(1).files == ["disk 1", "disk 2"]


def test_a_request_is_repeated_when_a_component_comes_back(team):
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
    assert result["condition"] == RunCondition.INTERRUPTED
    assert result["rows"] is None
    assert "board 2: the totals of epoch 2 are unknown" in result["reasons"]


def restart_board_2(team, monkeypatch, name="board 2", epoch=99):
    """A producer dies in RUN and comes back with another epoch. Returns its first epoch."""
    do(team, "prepare")
    do(team, "begin")
    before = EPOCHS[name]
    team.lose(name)
    monkeypatch.setitem(EPOCHS, name, epoch)
    team.register(name, instance="restarted")
    team.answer_all()
    return before


AWAY = "board 2 was down for part of the run: data that its boards sent then are lost"


def test_totals_that_a_successor_found_in_the_ring_count(team, monkeypatch):
    before = restart_board_2(team, monkeypatch)
    team.inherited["board 2"] = [before]
    reply = ask(team, "end")
    while not reply.ends:
        name, _, action, params = team.waiting[0]
        if name == "disk 1" and action == "end_run":
            reported = [(one["name"], one["epoch"], one["next"]) for one in params["producers"]]
            assert reported == [("board 1", 1, 4), ("board 2", 2, 4), ("board 2", 99, 4)]
        team.answer()
    result = reply.value()
    assert (result["condition"], result["rows"], result["stored"]) == (RunCondition.SUSPECT, 30, 30)
    assert result["reasons"] == [AWAY]


def test_a_predecessor_unknown_to_the_core_counts_too(team):
    do(team, "prepare")
    team.inherited["board 1"] = [55]
    result = do(team, "end")
    assert team.catalogue.find(1).producers["board 1"] == [55, 1]
    assert (result["condition"], result["rows"]) == (RunCondition.SUSPECT, 30)


def test_totals_from_an_end_record_in_a_file(team, monkeypatch):
    before = restart_board_2(team, monkeypatch)
    stored = [["board 1", 1, 1, 10], ["board 2", 2, 1, 8], ["board 2", 99, 1, 10]]
    # Disk 1 has the end record, and two rows fewer than the record says; disk 2 has all rows.
    ends = [["board 2", before, 4, "recovered", 10]]
    whole = [*stored[:1], ["board 2", 2, 1, 10], stored[2]]
    complete = {"condition": RunCondition.COMPLETE}
    result = end_with(team, disk_1=complete | {"stored": stored, "ends": ends}, disk_2=complete | {"stored": whole})
    assert (result["condition"], result["rows"], result["stored"]) == (RunCondition.SUSPECT, 30, 30)
    assert result["reasons"] == [AWAY, "disk 1: 8 rows of board 2 (epoch 2) are stored, 10 were made"]


def test_rows_that_found_no_room_are_not_missing_in_a_file(team):
    do(team, "prepare")
    line = counts(1, 10)
    line[1 + Count.DROPPED] = 3
    stored = [["board 1", 1, 1, 7], ["board 2", 2, 1, 10]]
    report = {"stored": stored, "condition": RunCondition.INCOMPLETE, "reasons": ["3 rows found no room"]}
    result = end_with(team, board_1={"counts": [line]}, disk_1=report, disk_2=report)
    assert result["condition"] == RunCondition.INCOMPLETE
    assert result["reasons"] == ["disk 1: 3 rows found no room", "disk 2: 3 rows found no room"]


def end_without_board_2(team):
    """Run 1 has ended without the lost board 2."""
    do(team, "prepare")
    do(team, "begin")
    team.lose("board 2")
    reply = ask(team, "end")
    team.answer_all()
    team.advance(5.1)
    team.answer_all()
    assert reply.value()["condition"] == RunCondition.INTERRUPTED
    assert "board 2 is lost" in reply.value()["reasons"]


def full_report(name="disk 1", *more):
    """A storage's report of all rows of run 1, with the end record of board 2 from its successor."""
    stored = [["board 1", 1, 1, 10], ["board 2", 2, 1, 10]]
    ends = [["board 1", 1, 4, "closed", 10], ["board 2", 2, 4, "recovered", 10]]
    return {"files": [name, *more], "condition": RunCondition.SUSPECT, "rows": 20, "stored": stored, "ends": ends}


def test_blocks_delivered_after_the_end_complete_the_run(team):
    end_without_board_2(team)
    team.beat("disk 1", finished=[finished(1, "disk 1", RunCondition.INTERRUPTED)])
    team.answer_all()
    assert team.catalogue.find(1).condition == RunCondition.INTERRUPTED
    team.reports["disk 1", 1] = full_report("disk 1", "further")
    reported = [finished(1, "disk 1", RunCondition.INTERRUPTED), finished(1, "/d/further", RunCondition.SUSPECT)]
    team.beat("disk 1", finished=reported)
    assert [one[:3:2] for one in team.waiting] == [("disk 1", "report_run")]
    team.answer_all()
    found = team.catalogue.find(1)
    assert (found.condition, found.rows, found.stored) == (RunCondition.SUSPECT, 20, 20)
    assert found.files == ["disk 1", "further", "disk 2"]
    assert found.reasons[0] == AWAY
    details = team.catalogue.files(1)
    assert [(one["storage"], one["path"], one["condition"]) for one in details] == [
        ("disk 1", "/d/disk 1", RunCondition.INTERRUPTED),
        ("disk 1", "/d/further", RunCondition.SUSPECT),
    ]
    assert (details[0]["bytes"], details[0]["sha256"]) == (1234, "ab" * 32)
    # No new files, no request: also from a restarted core.
    team.beat("disk 1", finished=reported)
    assert not team.waiting
    second = restart(team)
    for name in KINDS:
        second.register(name)
    second.beat("disk 1", finished=reported)
    assert not second.waiting
    second.close()


def test_copies_that_are_delivered_later_at_the_same_time(team):
    end_without_board_2(team)
    for name in ("disk 1", "disk 2"):
        team.reports[name, 1] = full_report(name, f"{name} later")
        team.beat(name, finished=[finished(1, f"{name} later")])
    team.answer_all()
    assert team.catalogue.find(1).files == ["disk 1", "disk 1 later", "disk 2", "disk 2 later"]


def test_a_storage_that_comes_back_is_asked_about_the_newest_run(team):
    do(team, "prepare")
    do(team, "begin")
    team.lose("disk 1")
    team.lose("disk 2")
    reply = ask(team, "end")
    team.answer_all()
    team.advance(5.1)
    team.answer_all()
    assert reply.value()["condition"] == RunCondition.INTERRUPTED
    team.reports["disk 2", 1] = full_report("disk 2") | {"condition": RunCondition.COMPLETE, "ends": []}
    team.register("disk 2", instance="restarted")
    assert [one[:3:2] for one in team.waiting] == [("disk 2", "report_run")]
    team.answer_all()
    found = team.catalogue.find(1)
    assert (found.condition, found.files) == (RunCondition.COMPLETE, ["disk 2"])
    assert found.reasons == ["disk 1: has not reported"]
    team.register("disk 1", instance="restarted")  # it cannot improve the run, but has not reported yet
    team.answer_all()
    assert team.catalogue.find(1).condition == RunCondition.COMPLETE
    team.lose("disk 1")
    team.register("disk 1")
    assert not team.waiting


def test_an_aborted_run_stays_aborted_after_later_deliveries(team):
    do(team, "prepare")
    do(team, "abort")
    team.reports["disk 1", 1] = full_report("disk 1", "further")
    team.beat("disk 1", finished=[finished(1, "further")])
    team.answer_all()
    found = team.catalogue.find(1)
    assert (found.condition, found.files) == (RunCondition.ABORTED, ["disk 1", "further", "disk 2"])


@pytest.mark.parametrize("reported", ["x", [1], [{"run": 1}], [finished(2**63, "a")], [finished(0, "a")], {"a": 1}])
def test_a_malformed_list_of_finished_files_is_ignored(team, reported, caplog):
    end_without_board_2(team)
    team.beat("disk 1", finished=reported)
    team.beat("disk 1", finished=reported)
    assert not team.waiting
    assert caplog.text.count("disk 1: its status is not understood") == 1


def test_end_does_not_wait_for_a_component_lost_long_ago(team):
    do(team, "prepare")
    do(team, "begin")
    component = team.peers.components["disk 2"]
    team.lose("disk 2")
    team.peers.lost["disk 2"] = component
    team.advance(30)
    result = do(team, "end")
    assert (result["condition"], result["files"]) == (RunCondition.COMPLETE, ["disk 1"])
    assert result["reasons"] == ["disk 2 is lost", "disk 2: has not reported"]
    assert team.catalogue.find(1).storages == ["disk 1", "disk 2"]


def test_a_storage_whose_answer_was_lost_with_the_core_is_asked_for_a_report(team):
    do(team, "prepare")
    do(team, "begin")
    ask(team, "end")
    team.answer_all()  # the catalogue is set back to ENDING below
    run = team.catalogue.find(1)
    run.phase, run.reports, run.ends = "ENDING", {}, []
    team.catalogue.save(run)
    second = restart(team)
    complete = {"condition": RunCondition.COMPLETE}
    second.reports = {(name, 1): full_report(name) | complete for name in ("disk 1", "disk 2")}
    for one in second.reports.values():
        one["ends"] = [["board 1", 1, 4, "closed", 10], ["board 2", 2, 4, "closed", 10]]
    second.register("monitor", run=1)  # it alone has not got end_run
    for name in KINDS:
        if name != "monitor":
            second.register(name)
    second.advance(2.1)
    while second.waiting:
        second.answer(failing=second.waiting[0][2] == "end_run" and second.waiting[0][0] != "monitor")
    found = second.catalogue.find(1)
    assert (found.condition, found.rows, found.stored, found.reasons) == (RunCondition.COMPLETE, 20, 20, [])
    second.close()


def test_a_new_producer_stays_out_of_the_run_but_a_monitor_joins(team):
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
def test_abort_keeps_the_data(team, steps):
    for step in steps:
        do(team, step)
    result = do(team, "abort")
    assert (result["condition"], result["stored"], team.runs.state) == (RunCondition.ABORTED, 20, "STOP")
    assert ("board 1", "abort_run") in team.sent


def test_abort_interrupts_the_running_step(team):
    do(team, "prepare")
    ending = ask(team, "end")
    team.answer()
    aborting = ask(team, "abort")
    with pytest.raises(StateError, match="end_run was aborted by me"):
        ending.value()
    team.answer_all()
    assert aborting.value()["condition"] == RunCondition.ABORTED
    assert aborting.value()["rows"] == 20


def test_late_answers_to_an_aborted_step_count(team):
    do(team, "prepare")
    ask(team, "end")
    aborting = ask(team, "abort")
    for name in ("board 1", "board 2"):
        assert team.waiting[0][::2] == (name, "end_run")
        team.answer()
    for name in ("board 1", "board 2"):
        assert team.waiting[0][::2] == (name, "abort_run")
        team.answer(failing=True)
    assert [one.run for one in team.peers.of_kind("producer")] == [None, None]
    team.answer_all()
    result = aborting.value()
    assert (result["condition"], result["rows"], result["reasons"]) == (RunCondition.ABORTED, 20, [])


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


@pytest.mark.parametrize(("steps", "state"), [(("prepare",), "READY"), (("prepare", "begin"), "RUN")])
def test_a_restarted_core_continues_the_run(team, steps, state):
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
    assert do(second, "end")["condition"] == RunCondition.COMPLETE
    second.close()


def test_a_restarted_core_continues_an_interrupted_end(team):
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


def test_a_restarted_core_gives_up_a_run_without_components(team):
    do(team, "prepare")
    second = restart(team)
    for name in KINDS:
        second.register(name, instance="fresh")
    assert second.runs.state == "STOP"
    run = second.catalogue.find(1)
    assert (run.phase, run.condition, run.stored) == (ENDED, RunCondition.INTERRUPTED, None)
    assert {one[:3:2] for one in second.waiting} == {("disk 1", "report_run"), ("disk 2", "report_run")}
    second.answer_all()
    assert second.catalogue.find(1).stored is not None  # both have reported
    assert do(second, "prepare")["run"] == 2
    second.close()


def test_a_core_that_died_in_prepare_cancels_the_run(team):
    ask(team, "prepare")
    second = restart(team)
    assert second.catalogue.find(1).condition == "CANCELLED"
    second.register("board 1", run=1)
    assert second.waiting[0][2] == "cancel_run"
    second.answer_all()
    for name in list(KINDS)[1:]:
        second.register(name)
    assert do(second, "prepare")["run"] == 2
    second.close()


def test_heartbeats_report_steps_answered_to_a_dead_core(team):
    ask(team, "prepare")
    second = restart(team)
    for name in KINDS:
        second.register(name)  # prepare_run is still running in all: none is in the run yet
    second.beat("board 1", 1, False)
    second.beat("board 1", 1, False)
    assert [one[:3:2] for one in second.waiting] == [("board 1", "cancel_run")]
    second.answer_all()
    assert second.peers.components["board 1"].run is None
    do(second, "prepare")
    do(second, "begin")
    third = restart(second)
    for name in KINDS:
        third.register(name, run=2, begun=name != "disk 1")
    assert [one[:3:2] for one in third.waiting] == [("disk 1", "begin_run")]
    third.beat("disk 1", 2, True)  # while a request is open, its answer counts, not the heartbeat
    assert not third.peers.components["disk 1"].begun
    third.answer_all()
    assert third.peers.components["disk 1"].begun
    assert do(third, "end")["condition"] == RunCondition.COMPLETE
    third.close()


def test_a_disk_that_will_soon_be_full_is_a_warning(team):
    team.beat("disk 1", seconds_left=700, bytes_per_second=18_000_000, paused="")
    team.beat("disk 2", seconds_left=None, bytes_per_second=0, paused="no space left")
    warnings = do(team, "prepare")["warnings"]
    assert warnings == [
        "disk 1: disk full in 11 min at 18 MB/s",
        "disk 2 is not writing: no space left",
    ]


def test_a_run_that_the_catalogue_does_not_know_is_left_alone_until_aborted(team):
    team.lose("board 1")
    team.register("board 1", instance="2", run=77)
    assert not team.waiting
    with pytest.raises(ComponentError, match="board 1 is still in run 77"):
        ask(team, "prepare")
    team.catalogue.save(Run(77, "", "", "", 0, phase=ENDED), new=True)  # what Team.send() checks
    do(team, "abort")
    assert do(team, "prepare")["run"] == 78


def filled_catalogue(directory, runs=40):
    catalogue = Catalogue(directory)
    for number in range(1, runs + 1):
        catalogue.save(Run(number, "physics", "c" * 300, "me", number, phase=ENDED), new=True)
        catalogue.add_comment(number, f"comment on {number}", Author("", "me", "owner"))
    catalogue.close()
    return (directory / "catalogue.sqlite").read_bytes()


def test_a_damaged_catalogue_never_gives_a_number_twice(tmp_path):
    """It is kept, its readable rows are copied, and the damage is reported in one line."""
    whole = filled_catalogue(tmp_path)
    path = tmp_path / "catalogue.sqlite"
    page = whole.index(b'{"layout":') // 4096 * 4096  # some of the runs
    ruined = {
        "no database": b"not a database" * 100,
        "nothing": b"",
        "truncated": whole[: len(whole) // 2],
        "a page": whole[:page] + bytes(4096) + whole[page + 4096 :],
        "the last run": whole.replace(b'{"layout":', b'{"lay\xffut":'),
        "a run's text": whole.replace(b'{"layout":', b'["layout":'),
    }
    for what, content in ruined.items():
        path.write_bytes(content)
        catalogue = Catalogue(tmp_path)
        assert catalogue.highest == 40, what
        assert (
            "was damaged (" if what != "nothing" else "ends with run 0, but run 40 was drawn"
        ) in catalogue.warnings[0], what
        assert all("\n" not in line for line in catalogue.warnings)
        kept = tmp_path / "catalogue.sqlite.damaged"
        assert kept.exists() == (what != "nothing")
        if what != "nothing":
            assert kept.read_bytes() == content
            kept.unlink()
        if what == "a page":
            assert all(len(catalogue.comments(number)) == 1 for number in range(1, 41))
            assert 0 < sum(catalogue.find(number) is not None for number in range(1, 41)) < 40
        catalogue.find()
        catalogue.save(Run(41, "", "", "", 0), new=True)
        catalogue.close()
        catalogue = Catalogue(tmp_path)
        assert (catalogue.highest, catalogue.warnings) == (41, [])
        catalogue.close()
        (tmp_path / "highest_run").write_text("40\n")


def test_a_damaged_catalogue_without_the_highest_number_stops_the_core(tmp_path):
    """Until the number is written into highest_run. An older catalogue without this file gets one."""
    filled_catalogue(tmp_path, 3)
    (tmp_path / "highest_run").unlink()
    Catalogue(tmp_path).close()
    assert (tmp_path / "highest_run").read_text() == "3\n"
    path = tmp_path / "catalogue.sqlite"
    path.write_bytes(b"not a database" * 100)
    for content in (None, b"", b"-1", b"\xff", b"9" * 30):
        (tmp_path / "highest_run").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "highest_run").write_bytes(content)
        with pytest.raises(
            FileError, match=r"is damaged \(.*\), and the highest run number is not known: write it into"
        ):
            Catalogue(tmp_path)
        assert path.read_bytes() == b"not a database" * 100
    (tmp_path / "highest_run").write_text("700\n")
    catalogue = Catalogue(tmp_path)
    assert catalogue.highest == 700
    catalogue.close()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileError, match="is not a regular file"):
        Catalogue(tmp_path)


@pytest.mark.parametrize("removed", ["everything", "the directory", "the lock", "the catalogue alone"])
def test_a_removed_catalogue_is_written_again(tmp_path, removed):
    directory = tmp_path / "state"
    directory.mkdir()
    catalogue = Catalogue(directory)
    catalogue.save(Run(7, "physics", "cosmics", "me", 1), new=True)
    catalogue.add_comment(7, "beam is on", Author("", "me", "owner"))
    assert not catalogue.keep()
    if removed == "the lock":
        (directory / "catalogue.lock").unlink()
    elif removed == "the catalogue alone":
        (directory / "catalogue.sqlite").unlink()
    else:
        for path in directory.iterdir():
            path.unlink()
    if removed == "the directory":
        directory.rmdir()
    catalogue.save(Run(8, "physics", "cosmics", "me", 2), new=True)
    assert catalogue.keep()
    assert not catalogue.keep()
    catalogue.save(Run(9, "physics", "cosmics", "me", 3), new=True)
    with pytest.raises(FileError, match="another core"):
        Catalogue(directory)
    catalogue.close()
    reopened = Catalogue(directory)
    assert [reopened.find(number).comment for number in (7, 8, 9)] == ["cosmics"] * 3
    assert reopened.comments(7)[0]["text"] == "beam is on"
    reopened.close()


def test_a_catalogue_of_schema_1(tmp_path):
    db = sqlite3.connect(tmp_path / "catalogue.sqlite")
    db.executescript("""
        CREATE TABLE runs (
            run INTEGER PRIMARY KEY, phase TEXT NOT NULL, kind TEXT NOT NULL, comment TEXT NOT NULL, operator TEXT
            NOT NULL, prepared_ns INTEGER NOT NULL, begun_ns INTEGER, ended_ns INTEGER, condition TEXT NOT NULL,
            details TEXT NOT NULL);
        CREATE TABLE comments (
            run INTEGER NOT NULL, time_ns INTEGER NOT NULL, operator TEXT NOT NULL, text TEXT NOT NULL);
        INSERT INTO runs VALUES (7, 'ENDED', 'physics', 'c', 'me', 1, 2, 3, 'COMPLETE', '{"files": ["a.h5"]}');
        PRAGMA user_version=1;
    """)
    db.close()
    catalogue = Catalogue(tmp_path)
    assert (catalogue.highest, catalogue.find(7).files, catalogue.files(7)) == (7, ["a.h5"], [])
    assert catalogue.add_file("disk", "/d/a.h5", 7, 10, "", RunCondition.COMPLETE)
    # The same file: its checksum is known now. Another process reports it, without the checksum.
    assert not catalogue.add_file("disk", "/d/a.h5", 7, 10, "00", RunCondition.COMPLETE)
    assert not catalogue.add_file("disk", "/d/a.h5", 7, 10, "", RunCondition.COMPLETE)
    assert catalogue.files(7)[0]["sha256"] == "00"
    assert catalogue.add_file("disk", "/d/a.h5", 7, 20, "11", RunCondition.COMPLETE)
    catalogue.close()
    catalogue = Catalogue(tmp_path)
    assert [(one["path"], one["bytes"]) for one in catalogue.files(7)] == [("/d/a.h5", 20)]
    catalogue.close()
    db = sqlite3.connect(tmp_path / "catalogue.sqlite")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(FileError, match="schema 99, here 4"):
        Catalogue(tmp_path)


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A core with 100 producers, storages and monitors in modules."""
    monkeypatch.setattr("run_control_harness.KINDS", kinds := {})
    monkeypatch.setattr("run_control_harness.EPOCHS", epochs := {})
    team = Team(tmp_path)
    for host in range(100):
        names = {f"board {host}": "producer", f"disk {host}": "storage", f"monitor {host}": "run_data"}
        kinds |= names
        epochs[f"board {host}"] = host + 1
        for name in names:
            team.register(name).module = f"module {host // 4}"
    yield team
    team.close()


def take_without(team, action, silent, limit=1000):
    """Take a step in which these components do not answer. Returns its Reply, and the seconds that it has taken."""
    started, reply = team.now, ask(team, action)
    for _ in range(limit):
        for _ in range(len(team.waiting)):
            if team.waiting[0][0] in silent:
                team.waiting.append(team.waiting.pop(0))
            else:
                team.answer()
        if reply.ends:
            break
        team.advance(1.0)
    team.waiting.clear()
    return reply, team.now - started


def test_all_components_that_fail_are_named_and_have_one_deadline(many):
    silent = {f"disk {host}" for host in range(8, 28)}
    reply, seconds = take_without(many, "prepare", silent)
    with pytest.raises(ComponentError) as caught:
        reply.value()
    modules = ", ".join(
        f"module {module} ({', '.join(f'disk {host}' for host in range(4 * module, 4 * module + 4))})"
        for module in range(2, 7)
    )
    named = f"20 components have not answered prepare_run within 10 s: {modules}"
    assert str(caught.value) == (
        f"20 of 100 storages have failed: {named}; restart what does not answer, or end it, and prepare_run again: a "
        "run goes without what is not there"
    )
    assert seconds <= 12  # 10 s for all of them together, and 1 s for those that cancel the run
    run = many.catalogue.find(1)
    assert (run.condition, run.reasons) == ("CANCELLED", [f"20 of 100 storages have failed: {named}"])
    for name in silent:  # as the advice says
        many.lose(name)
    reply, _ = take_without(many, "prepare", {"monitor 1"})
    assert reply.value()["warnings"] == ["monitor 1 has not answered prepare_run within 1 s"]
    assert len(many.catalogue.find(2).storages) == 80
    reply, _ = take_without(many, "begin", silent := {f"board {host}" for host in range(6)})
    with pytest.raises(
        ComponentError, match="run 2 was aborted, since it could not begin: 6 components have not"
    ) as caught:
        reply.value()
    assert str(caught.value).count("board") == 6
    reasons = many.catalogue.find(2).reasons
    assert len(reasons) < 10
    assert all(any(f"({name}" in text or f", {name}" in text for text in reasons) for name in silent)


def test_answers_of_many_producers_that_fail(many):
    reply = ask(many, "prepare")
    while many.waiting:
        name, _, action, _ = many.waiting[0]
        many.answer(failing=action == "prepare_run" and name in ("board 1", "board 2"))
    with pytest.raises(ComponentError, match=r"^2 of 100 producers have failed: board 1: it broke; board 2: it broke$"):
        reply.value()


@given(st.lists(st.sampled_from(["is lost", "has not answered x", "broke"])), st.integers(0, 12))
def test_folded_reasons_name_every_component(what, modules):
    names = [f"disk {place}" for place in range(len(what))]
    texts = [
        f"{name}: {words}" if words == "broke" else f"{name} {words}" for name, words in zip(names, what, strict=True)
    ]
    folded = fold_reasons(["the core failed", *texts], dict.fromkeys(names, f"module {modules}" if modules else ""))
    assert folded[0] == "the core failed"
    assert len(folded) <= 1 + 3 * MANY_NAMES
    words = re.findall(r"disk \d+", " ".join(folded))
    assert sorted(words) == sorted(names)
