"""Alarms: raising, clearing, flapping, acknowledgement, numbers that are not known, and a restart of the core."""

import contextlib
import json
import re
import sqlite3
import sys
import time
import types
from contextlib import closing
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from fake_core import all_running, core, producer, producer_status, storage, storage_status
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from processes import LIMIT, free_port, until

from larpixdaq.alarm_config import AlarmConfig, Condition, RateBand, convert_alarms, load_alarms
from larpixdaq.cli import main
from larpixdaq.control import alarms as alarms_module
from larpixdaq.control.alarm_conditions import Evaluation, Reading, present_readings
from larpixdaq.control.alarms import AlarmBook, Alarms, alarm_of, alarm_row, open_line, row_line, sentence
from larpixdaq.control.catalogue import AlarmRow, Catalogue, append_alarms, open_alarms, read_alarms, read_audit
from larpixdaq.control.display import needs_attention, status_lines
from larpixdaq.control.registry import OperatorPeer
from larpixdaq.errors import ConfigError, FileError, NotAllowed, RequestError, printable
from larpixdaq.keys.key_store import Member
from larpixdaq.operator import Operator
from larpixdaq.protocol.reports import (
    BoardReport,
    ChannelRate,
    ClockReport,
    IoGroupReport,
    LogStatus,
    MonitorStatus,
    ProducerStatus,
    StorageStatus,
    SupervisedProcess,
    SupervisorStatus,
)

HOLD = 5.0
CONDITIONS = {"board-disconnected": 0.75, "component-stuck": 0.0}  # with the delays until they are raised
KEYS = [(condition, subject) for condition in CONDITIONS for subject in ("a", "b")]


class Book(RuleBasedStateMachine):
    """Any sequence of readings, pauses, acknowledgements and restarts: who is raised and cleared, and when."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0
        self.rows = {}  # the last row of each alarm
        self.level = dict.fromkeys(KEYS)  # of the last reading, None: not known
        self.since = dict.fromkeys(KEYS, 0.0)  # of this reading and those before that agree
        self.heard = dict.fromkeys(KEYS, 0.0)
        self.open = {}  # key: id
        self.over = {}  # key: (id, time)
        self.flaps = dict.fromkeys(KEYS, 0)
        self.ids = {key: set() for key in KEYS}
        self.book = AlarmBook(HOLD, self.changed, wall=lambda: self.now)

    def changed(self, event, alarm):
        key = alarm.condition, alarm.subject
        self.rows[alarm.id] = alarm_row(event, alarm)
        steady = self.now - self.since[key]
        if event == "raised" and key not in self.open:
            assert self.level[key], "raised without a true reading"
            assert steady >= CONDITIONS[key[0]]
            before, at = self.over.pop(key, (0, 0.0))
            if before and self.since[key] - at < alarms_module._MEMORY:
                assert alarm.id == before, "an alarm that flaps has got another number"
                assert alarm.count > 1
            else:
                assert not any(alarm.id in ids for ids in self.ids.values())
                assert alarm.count == 1
            self.ids[key].add(alarm.id)
            self.open[key] = alarm.id
            assert alarm.acknowledged is None
        elif event == "raised":
            assert alarm.level == "alarm", "raised again without a higher level"
            assert alarm.acknowledged is None
        elif event == "cleared":
            assert self.open.pop(key) == alarm.id
            ordered = self.level[key] == "" and steady >= HOLD
            forgotten = alarm.acknowledged is not None and self.now - self.heard[key] >= alarms_module._NO_NEWS
            assert ordered or forgotten, f"cleared, although it is {self.level[key]!r} since {steady} s"
            self.over[key] = alarm.id, self.now
            if forgotten:
                self.level[key] = None

    def read(self, key, level):
        if bool(self.level[key]) != bool(level) or self.level[key] is None:
            self.since[key] = self.now
        self.level[key] = level
        self.heard[key] = self.now
        self.book.take("board", [Reading(*key, level, f"{key} at {self.now}")], self.now)

    @rule(key=st.sampled_from(KEYS), level=st.sampled_from(["warning", "alarm"]))
    def is_true(self, key, level):
        self.read(key, level)

    @rule(key=st.sampled_from(KEYS))
    def is_in_order(self, key):
        self.read(key, "")

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0, 12.0, 400.0, 700.0, 50_000.0]))
    def nothing_is_known(self, seconds):
        for _ in range(2):
            self.now += seconds / 2
            self.book.tick(self.now)

    @rule(key=st.sampled_from(KEYS), period=st.sampled_from([1.0, 7.0, 30.0]), times=st.integers(2, 40))
    def flap(self, key, period, times):
        """However long it flaps, it is one alarm, and few messages."""
        before = len(self.ids[key])
        raised = 0
        for _ in range(times):
            was = key in self.open
            self.read(key, "alarm")
            self.nothing_is_known(1.0)
            raised += not was and key in self.open
            self.read(key, "")
            self.nothing_is_known(period)
        assert len(self.ids[key]) <= before + 1
        assert raised <= 6

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def acknowledge(self, data):
        number = data.draw(st.sampled_from(sorted(self.open.values())))
        alarm = self.book.acknowledge(number, "night", "seen")
        assert (alarm.by, alarm.comment, alarm.acknowledged) == ("night", "seen", self.now)

    @rule(number=st.integers(1, 50))
    def acknowledge_another(self, number):
        if number not in self.open.values():
            with pytest.raises(RequestError, match=f"no alarm {number} is open"):
                self.book.acknowledge(number, "night", "")

    @rule()
    def restart(self):
        """The next core knows the last rows only: open alarms go on, and nothing is known of any condition."""
        found = [row for row in self.rows.values() if row.event != "cleared"]
        before = {(a.id, a.condition, a.subject, a.level, a.by, a.comment) for a in self.book.open()}
        self.book = AlarmBook(HOLD, self.changed, highest=max(self.rows, default=0), wall=lambda: self.now)
        for row in found:
            self.book.restore(alarm_of(row), self.now)
        assert {(a.id, a.condition, a.subject, a.level, a.by, a.comment) for a in self.book.open()} == before
        self.level, self.over = dict.fromkeys(KEYS), {}
        self.heard = dict.fromkeys(KEYS, self.now)

    @invariant()
    def what_is_steady_is_known(self):
        self.book.tick(self.now)
        found = {(alarm.condition, alarm.subject): alarm.id for alarm in self.book.open()}
        assert found == self.open
        for alarm in self.book.open():
            level = self.level[alarm.condition, alarm.subject]
            assert level is None or (alarm.in_order is None) == bool(level)
        for key, level in self.level.items():
            steady = self.now - self.since[key]
            if level and steady >= CONDITIONS[key[0]] and self.heard[key] > self.now - 40_000:
                assert key in found
            if level == "" and steady >= max(alarms_module._MAX_HOLD, HOLD):
                assert key not in found


TestBook = Book.TestCase
TestBook.settings = settings(stateful_step_count=40)


def readings(status, config=None, *, name="board", evaluation=None, now=0.0):
    """Return the levels by condition and subject."""
    evaluation = evaluation or Evaluation(config or AlarmConfig())
    return {(r.condition, r.subject): r.level for r in evaluation.readings(name, status, now)}


def test_a_board_in_a_status():
    board = BoardReport(3, "PACMAN io_group 3", away_since=1.7e9, problem="cannot find host", setup=["use --clock64"])
    board.clock = ClockReport(-7.5, 0.5, None, 0.0, "clock -7.5 ± 0.5 s from the host's")
    found = readings(ProducerStatus(boards=[board]))
    assert found["board-disconnected", "board, io_group 3"] == "warning"
    assert found["clock-offset", "board, io_group 3"] == "warning"
    assert found["board-setup", "board, io_group 3"] == "warning"
    assert ("board-changed", "board, io_group 3") not in found  # not known
    in_run = readings(ProducerStatus(boards=[board], run=7))
    assert in_run["board-disconnected", "board, io_group 3"] == "alarm"
    board = BoardReport(3, "PACMAN io_group 3", clock=ClockReport(-1.4, 0.5, None, 0.0, ""), changed="")
    found = readings(ProducerStatus(boards=[board]))
    assert set(found.values()) == {""}  # the offset may be 0.9 s
    board.changed = "firmware 0x2, but 0x1 when the run began"
    assert readings(ProducerStatus(boards=[board]))["board-changed", "board, io_group 3"] == "warning"


def test_losses_ring_and_spool_in_a_status():
    full = ProducerStatus(
        run=7, counted_run=7, dropped=12, ring=0.95, waits=False, spooled_bytes=600, spool_limit=1000,
        verdicts={"1": "suspect", "2": "lost", "3": "complete"}, nameless=["a"], kept_aside=["b"],
    )  # fmt: skip
    found = readings(full)
    assert found["rows-dropped", "board"] == "alarm"
    assert found["ring-filling", "board"] == "alarm"
    assert found["spool-filling", "board"] == "alarm"
    assert [found["board-losses", f"board, io_group {n}"] for n in (1, 2, 3)] == ["warning", "alarm", ""]
    assert found["producer-files", "board, removed"] == "alarm"
    assert found["producer-files", "board, damaged"] == "warning"
    over = readings(msgspec.structs.replace(full, run=None))  # the run is over: its verdict tells its losses
    assert over["rows-dropped", "board"] == over["board-losses", "board, io_group 2"] == ""
    waiting = readings(msgspec.structs.replace(full, waits=True, spool_limit=0))  # a replay waits for room
    assert waiting["ring-filling", "board"] == waiting["spool-filling", "board"] == ""
    older = readings(ProducerStatus(run=7, ring=0.95, spooled_bytes=600))  # of a version without these fields
    assert not {"ring-filling", "spool-filling", "io-group-silent"} & {condition for condition, _ in older}


def test_a_storage_in_a_status():
    found = readings(StorageStatus(paused="no space", seconds_left=700, not_recovered=["a"], on_close="failed"))
    assert set(found.values()) == {"alarm", "warning"}
    assert found["disk-left", "board"] == "warning"
    assert readings(StorageStatus(seconds_left=500))["disk-left", "board"] == "alarm"
    assert readings(StorageStatus(seconds_left=5000))["disk-left", "board"] == ""
    assert ("disk-left", "board") not in readings(StorageStatus())  # the free space is not known
    assert ("disk-left", "board") not in readings(StorageStatus(files=["a"], free_bytes=5))  # its rate is not known
    assert readings(StorageStatus(free_bytes=5))["disk-left", "board"] == ""


def test_lost_log_records_and_given_up_processes():
    evaluation = Evaluation(AlarmConfig())
    for now, lost, level in ((0.0, 5, ""), (1.0, 6, "warning"), (50.0, 6, "warning"), (62.0, 6, "")):
        found = readings(LogStatus(lost=lost), name="Log", evaluation=evaluation, now=now)
        assert found == {("log-losses", "Log"): level}
    processes = [SupervisedProcess("disk", state="given up"), SupervisedProcess("log", state="running")]
    found = readings(SupervisorStatus(processes=processes))
    assert found == {("given-up", "disk"): "alarm", ("given-up", "log"): ""}
    for since, level in ((time.time(), "warning"), (time.time() - 100, "")):
        restarted = SupervisedProcess("core", state="running", since=since, restarts=1)
        assert readings(SupervisorStatus([restarted]))["component-restarted", "core"] == level


def in_run(packets, **changed):
    return ProducerStatus(run=7, counted_run=7, state="RUN", groups=[IoGroupReport(1, packets, **changed)])


def test_rates_and_fractions():
    config = AlarmConfig(rate=[RateBand(1, min=90.0, max=200.0)], bad_parity=0.1, fifo_full=0.2)
    evaluation = Evaluation(config)

    def at(now, packets, **changed):
        found = readings(in_run(packets, **changed), evaluation=evaluation, now=now)
        return {condition: level for (condition, subject), level in found.items() if subject == "board, io_group 1"}

    seen = [at(quarter / 4, quarter * 23) for quarter in range(80)]  # 92 packets/s
    assert all("rate" not in found for found in seen[:20])  # the first 5 s
    assert all(found["rate"] == "" for found in seen[24:])
    assert all("bad-parity" not in found for found in seen)  # fewer than 1000 packets in 10 s
    assert at(25.0, 2000)["rate"] == "warning"
    slow = at(26.0, 60_000, bad_parity=1000, fifo_full=9)
    assert (slow["rate"], slow["bad-parity"]) == ("warning", "")
    assert "fifo-full" not in slow  # it was not counted before
    bad = at(36.0, 120_000, bad_parity=10_000, fifo_full=30_009)
    assert (bad["bad-parity"], bad["fifo-full"]) == ("warning", "warning")
    restarted = at(36.25, 10)
    assert "rate" not in restarted
    assert readings(ProducerStatus(groups=[IoGroupReport(1, 9)]), evaluation=evaluation, now=37.0)[
        "rate", "board, io_group 1"
    ] == ""  # fmt: skip


def test_silent_and_expected_io_groups():
    assert readings(in_run(5, silent=1.5))["io-group-silent", "board, io_group 1"] == "alarm"
    assert readings(in_run(5))["io-group-silent", "board, io_group 1"] == ""
    evaluation = Evaluation(AlarmConfig(expected_io_groups=[1], expected_after=5.0))
    for now, packets, level in ((0.0, 0, ""), (4.0, 0, ""), (5.5, 0, "alarm"), (6.0, 1, "")):
        found = readings(in_run(packets), evaluation=evaluation, now=now)
        assert found["io-group-silent", "board, io_group 1"] == level, now


def test_hot_and_dead_channels_of_a_monitor():
    config = AlarmConfig(hot_channel=100.0, dead_channels=1)

    def found(**status):
        readings = present_readings("Online monitor", MonitorStatus(**status), config)
        return {reading.condition: (reading.level, reading.text) for reading in readings}

    channels = [ChannelRate(f"1-2-11-{n}", 150.0 - n) for n in range(20)]
    assert found() == found(hottest=channels, dead_channels=9) == {}  # no run
    assert found(run=7) == {}  # not known
    in_order = found(run=7, hottest=[ChannelRate("1-2-11-5", 100.0)], dead_channels=1, dead=channels[:1])
    assert in_order == {"hot-channels": ("", ""), "dead-channels": ("", "")}
    bad = found(run=7, hottest=[*channels[:2], ChannelRate("1-2-12-6", 99.0)], dead_channels=12, dead=channels[:5])
    assert bad["hot-channels"] == (
        "warning", "HOT CHANNELS: 2 above 100 Hz in run 7: 1-2-11-0 at 150 Hz, 1-2-11-1 at 149 Hz"
    )  # fmt: skip
    level, text = bad["dead-channels"]
    assert level == "warning"
    assert text.startswith("DEAD CHANNELS: 12 (limit 1) have stopped in run 7 while their io_groups go on; rates")
    assert text.count(" Hz") == 5
    level, text = found(run=7, hottest=channels)["hot-channels"]
    assert text.startswith("HOT CHANNELS: 20 or more above 100 Hz in run 7: ")
    assert text.count("1-2-11-") == 5


def test_expected_io_group_that_no_producer_reads() -> None:
    evaluation = Evaluation(AlarmConfig(expected_io_groups=[1, 2], expected_after=5.0))
    for now, level in ((0.0, None), (4.0, None), (5.5, "alarm")):
        readings(in_run(9), evaluation=evaluation, now=now)
        found = {reading.subject: reading.level for reading in evaluation.unread(now)}
        assert (found.get("io_group 1"), found.get("io_group 2")) == ("" if level else None, level), now
    evaluation.forget("board")  # a producer that is lost has an alarm of its own
    assert {reading.level for reading in evaluation.unread(6.0)} == {""}


texts = st.text(max_size=5)
numbers = st.integers(0, 2**62)
boards = st.builds(BoardReport, st.integers(0, 255), texts, st.none() | st.floats(), texts, st.none(), st.lists(texts))
channels = st.lists(st.builds(ChannelRate, texts, st.floats()))
groups = st.builds(IoGroupReport, st.integers(0, 255), numbers, numbers, st.none() | numbers, st.none() | st.floats())
statuses = st.one_of(
    st.builds(LogStatus, lost=numbers),
    st.builds(MonitorStatus, st.none() | numbers, hottest=st.none() | channels, dead_channels=numbers, dead=channels),
    st.builds(StorageStatus, paused=texts, seconds_left=st.none() | st.integers(), free_bytes=st.none() | numbers),
    st.builds(SupervisorStatus, st.lists(st.builds(SupervisedProcess, texts, state=st.just("given up") | texts))),
    st.builds(
        ProducerStatus,
        ring=st.floats(),
        spooled_bytes=numbers,
        spool_limit=st.none() | numbers,
        run=st.none() | numbers,
        counted_run=st.none() | numbers,
        state=st.sampled_from(["STOP", "READY", "RUN", ""]),
        boards=st.lists(boards),
        groups=st.none() | st.lists(groups),
        waits=st.none() | st.booleans(),
        verdicts=st.dictionaries(texts, texts),
    ),
)


@given(st.lists(st.tuples(statuses, st.floats(0, 30)), max_size=6))
def test_any_statuses_have_readings(found):
    evaluation = Evaluation(AlarmConfig(rate=[RateBand(1, 5.0)], expected_io_groups=[1]))
    now = 0.0
    for status, pause in found:
        now += pause
        for reading in evaluation.readings("x", status, now):
            assert reading.level in ("", "warning", "alarm")
            assert reading.condition in get_args(Condition)
        list(present_readings("x", status, AlarmConfig()))


@given(st.text(), st.text(), st.text(), st.text(), st.integers(0, 2**62))
def test_any_text_makes_one_line(text, name, comment, level, ns):
    row = AlarmRow(ns, 1, "acknowledged", "rate", name, name, level, text, ns, 2, name, comment)
    for line in (row_line(row), open_line(alarm_of(row)), sentence("raised", alarm_of(row))):
        assert len(printable(line).splitlines()) == 1


def test_the_documentation_has_every_condition():
    text = (Path(__file__).parents[2] / "docs" / "alarms.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE) == list(get_args(Condition))


def test_texts():
    row = AlarmRow(
        1_700_000_060_000_000_000, 3, "cleared", "rate", "", "x", "alarm", "too slow", 1_700_000_000_000_000_000
    )
    alarm = alarm_of(row)
    alarm.cleared = 1_700_000_060.0
    assert sentence("cleared", alarm) == "ALARM 3 cleared after 1 min: too slow"
    alarm.count, alarm.acknowledged, alarm.by = 4, 1_700_000_030.0, "night"
    assert open_line(alarm) == "ALARM 3 since 2023-11-14 22:13:20 UTC, 4 times: too slow (acknowledged by night)"
    alarm.as_of = alarm.raised
    assert "too slow (as of 2023-11-14 22:13:20 UTC, before a restart of the core) (ack" in open_line(alarm)
    alarm.in_order = alarm.raised + 60
    assert "too slow (in order since 2023-11-14 22:14:20 UTC, clears soon) (ack" in open_line(alarm)
    assert row_line(row) == "2023-11-14 22:14:20 UTC  ALARM 3 cleared: too slow"


def test_rows_are_only_appended_and_open_alarms_are_found(tmp_path):
    with closing(Catalogue(tmp_path)) as catalogue:

        def row(number, event, ns):
            return AlarmRow(ns, number, event, "rate", "", "x", "alarm", "t", ns)

        append_alarms(catalogue.path, [row(1, "raised", 1), row(2, "raised", 2), row(2, "acknowledged", 3)])
        append_alarms(catalogue.path, [row(1, "cleared", 4), row(3, "raised", 5), row(4, "raised", 6)])
        append_alarms(catalogue.path, [row(4, "cleared", 7)])
        found, highest = open_alarms(catalogue.path)
        assert [(one.alarm, one.event) for one in found] == [(2, "acknowledged"), (3, "raised")]
        assert highest == 4
        assert [one.time_ns for one in read_alarms(catalogue.path, 3, 2)] == [6, 7]
        assert [one.time_ns for one in read_alarms(catalogue.path, 3)] == [3, 4, 5, 6, 7]
        with closing(sqlite3.connect(catalogue.path, isolation_level=None)) as db:
            for statement in (
                "UPDATE alarms SET text = 'x'",
                "DELETE FROM alarms",
                "INSERT OR REPLACE INTO alarms SELECT * FROM alarms",
            ):
                with pytest.raises(sqlite3.IntegrityError, match="rows of the alarms are never"):
                    db.execute(statement)
            db.execute("INSERT INTO runs VALUES (1, 'ENDED', '', '', '', 0, 0, 0, 'COMPLETE', 'damaged', '')")
    with closing(Catalogue(tmp_path)) as catalogue:
        assert catalogue.warnings
        assert open_alarms(catalogue.path)[1] == 4
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite", isolation_level=None)) as db:
        db.executescript("DROP TABLE alarms; PRAGMA user_version=3;")
    with pytest.raises(FileError, match="no such table"):
        open_alarms(tmp_path / "catalogue.sqlite")
    with closing(Catalogue(tmp_path)) as catalogue:
        assert open_alarms(catalogue.path) == ([], 0)


def alarms_of(operator, condition):
    return [one for one in operator.alarms().result(LIMIT)["open"] if one["condition"] == condition]


def test_from_a_status_to_operator_and_command(tmp_path, capsys):
    config = AlarmConfig(hold_off=0.2, off=["component-restarted"])
    with core(tmp_path / "state", alarms=config) as running, Operator(running.address, name="night") as o:
        command = ["alarms", "--core", running.address]
        assert main(command) == 0
        assert capsys.readouterr().out == "no alarm is open\n"
        assert main([*command, "--all"]) == 0
        assert capsys.readouterr().out == "no event yet\nno alarm is open\n"
        with storage(running.address).running() as store:
            store.status = storage_status(paused="no space left on /data")
            (alarm,) = until(lambda: alarms_of(o, "storage-paused"), "the alarm")
            assert (alarm["level"], alarm["component"], alarm["count"]) == ("alarm", "Offline storage", 1)
            lines = o.status().readable().splitlines()
            assert lines[1].startswith(f"ALARM {alarm['id']} since ")
            assert sum("PAUSED: Offline storage is not writing: no space" in line for line in lines) == 1
            assert main(command) == 1
            assert main([*command, "--json"]) == 1
            capsys.readouterr()
            assert (
                main(["alarms", "ack", str(alarm["id"]), "999", "--core", running.address, "--comment", "I clean"]) == 1
            )
            out, err = capsys.readouterr()
            assert "(acknowledged by " in out
            assert "no alarm 999 is open" in err
            assert main(command) == 0  # still open, but somebody cares
            assert main(["alarms", "--core", running.address, "ack", str(alarm["id"]), "--comment", "I clean"]) == 0
            assert "I clean" in capsys.readouterr().out
            store.status = storage_status()
            until(lambda: not alarms_of(o, "storage-paused"), "the alarm to be cleared")
        until(lambda: main([*command, "--all"]) == 0 and "cleared" in capsys.readouterr().out, "the history")
        assert main([*command, "--since", "1h", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["history"]
        assert [row["event"] for row in rows] == ["raised", "acknowledged", "acknowledged", "cleared"]
        assert rows[1]["comment"] == "I clean"
        found = o.status().result(LIMIT)
        assert found["alarm_state"]["history"] == {"lost": 0, "waiting": 0, "error": ""}
        assert found["alarm_state"]["off"] == ["component-restarted"]


def test_a_lost_component_and_the_next_core(tmp_path):
    state = tmp_path / "state"
    with core(state) as running, Operator(running.address) as o, producer(running.address).running() as board:
        board.status = producer_status(boards=[msgspec.to_builtins(BoardReport(1, "B", away_since=1.7e9))])
        (away,) = until(lambda: alarms_of(o, "board-disconnected"), "the board's alarm")
        with storage(running.address).running():
            o.prepare_run().result(LIMIT)
        (lost,) = until(lambda: alarms_of(o, "component-lost"), "the storage's alarm")
        assert lost["level"] == "alarm"
        assert "run 1 requires it" in lost["text"]
        o.acknowledge_alarm(lost["id"], comment="on my way").result(LIMIT)
        o.abort_run().result(LIMIT)
        (verdict,) = until(lambda: alarms_of(o, "run-verdict"), "the run's alarm")
        assert (verdict["level"], "run 1 is ABORTED" in verdict["text"]) == ("warning", True)
    with core(state, alarms=AlarmConfig(hold_off=5.0)) as running, Operator(running.address) as o:
        before = {one["id"]: one for one in o.alarms().result(LIMIT)["open"]}
        # The producer has ended outside of a run, so that nobody reads its board. But its alarm was not cleared yet.
        assert before.keys() == {lost["id"], verdict["id"], away["id"]}
        assert before[lost["id"]]["comment"] == "on my way"
        assert before[lost["id"]]["by"]
        # The run that required the storage is over, and its verdict is read anew. Of the board nothing is known.
        until(lambda: not alarms_of(o, "component-lost"), "the alarm to be cleared")
        assert alarms_of(o, "run-verdict")[0]["as_of"] is None
        assert alarms_of(o, "board-disconnected")[0]["as_of"] == pytest.approx(away["raised"])
        assert "B: NOT CONNECTED since 2023-11-14 22:13:20 UTC (as of 20" in o.alarms().readable(LIMIT)


def test_the_next_core_of_a_run_misses_components_and_clears_their_alarms_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("larpixdaq.core._RETURN", 0.5)
    state, config, address = tmp_path / "state", AlarmConfig(hold_off=0.1), f"tcp://127.0.0.1:{free_port()}"

    def missed(operator):
        return {one["subject"]: one for one in alarms_of(operator, "component-lost")}

    with contextlib.ExitStack() as stack, contextlib.ExitStack() as gone:
        with core(state, address, alarms=config), Operator(address) as o:
            stack.enter_context(all_running(producer(address), storage(address)))
            gone.enter_context(storage(address, "gone").running())
            with storage(address, "ended").running():
                o.prepare_run().result(LIMIT)
            ended = until(lambda: missed(o).get("ended, run 1"), "the alarm")
        gone.close()  # while there is no core
        with core(state, address, alarms=config), Operator(address) as o:
            again = missed(o)["ended, run 1"]
            assert (again["id"], again["text"], again["as_of"]) == (
                ended["id"], ended["text"], pytest.approx(ended["raised"]),
            )  # fmt: skip
            text = until(lambda: missed(o).get("gone, run 1"), "the other alarm")["text"]
            assert text == "gone has not registered since the start of the core, and run 1 requires it"
            o.abort_run().result(LIMIT)
            until(lambda: not missed(o), "both to be cleared")


def test_a_component_that_has_ended_in_a_run_is_missed_until_the_runs_end(tmp_path):
    with core(tmp_path / "state", alarms=AlarmConfig(hold_off=0.1)) as running, Operator(running.address) as o:
        with storage(running.address).running(), producer(running.address).running():
            with storage(running.address, "Second storage").running():
                o.prepare_run().result(LIMIT)
            (missed,) = until(lambda: alarms_of(o, "component-lost"), "the alarm")
            assert missed["text"] == "Second storage has ended, and run 1 requires it"
            o.abort_run().result(LIMIT)
            until(lambda: not alarms_of(o, "component-lost"), "it to be cleared")
        assert not alarms_of(o, "component-lost")  # the others have ended outside of a run


def test_an_observer_may_look_and_not_acknowledge(tmp_path):
    with core(tmp_path / "state") as running:
        running._alarms.catalogue("disk is full", time.monotonic())
        router = running._requests._actions
        night = OperatorPeer("s", b"r", "night", "i", 0.0, Member("night", "observer", "k" * 40))
        with pytest.raises(NotAllowed, match="allows to look, not to change"):
            router.handle(night, "acknowledge_alarm", {"alarm": 1}, None, 0.0)


def test_acknowledgements_are_in_the_audit(tmp_path):
    with core(tmp_path / "state") as running, Operator(running.address, name="night") as o:
        with storage(running.address).running() as store:
            store.status = storage_status(paused="no space")
            (alarm,) = until(lambda: alarms_of(o, "storage-paused"), "the alarm")
            o.acknowledge_alarm(alarm["id"], "seen").result(LIMIT)
            with pytest.raises(RequestError, match="open alarms: "):
                o.acknowledge_alarm(77).result(LIMIT)

        def audited():
            return [row for row in read_audit(tmp_path / "state") if row.action == "acknowledge_alarm"]

        until(lambda: len(audited()) == 4, "the rows")
        assert [row.outcome.partition(":")[0] for row in audited()] == ["accepted", "done", "accepted", "failed"]
        assert audited()[0].detail == f"alarm={alarm['id']}, comment='seen'"


def test_ipython_tells_a_new_alarm_at_the_next_prompt(tmp_path, monkeypatch, capsys):
    class Events:
        def __init__(self):
            self.callbacks = {"pre_run_cell": [], "post_run_cell": []}

        def register(self, event, function):
            self.callbacks[event].append(function)

        def unregister(self, event, function):
            self.callbacks[event].remove(function)

        def trigger(self, event):
            for function in list(self.callbacks[event]):
                function(None)

    shell = types.SimpleNamespace(events=Events())
    with core(tmp_path / "state") as running:
        with Operator(running.address):  # a script: IPython does not run
            pass
        module = types.ModuleType("IPython")
        module.get_ipython = lambda: shell
        monkeypatch.setitem(sys.modules, "IPython", module)
        with Operator(running.address) as o, storage(running.address).running() as store:
            shell.events.trigger("post_run_cell")
            assert capsys.readouterr().out == ""
            store.status = storage_status(paused="no space", on_close="failed")
            until(lambda: o._connection.last_update.alarms[0] == 2, "two alarms")
            shell.events.trigger("pre_run_cell")
            shown = capsys.readouterr().out
            assert len(shown.splitlines()) == 1
            assert "(1 more were raised)" in shown
            shell.events.trigger("post_run_cell")
            assert capsys.readouterr().out == ""
        shell.events.trigger("post_run_cell")
        assert not any(shell.events.callbacks.values())


def test_status_of_a_core_with_other_alarms():
    alarm = alarm_of(AlarmRow(1, 1, "raised", "rate", "", "x", "alarm", "too\nslow", 1))
    found = {"state": "STOP", "components": [], "alarms": [{"id": "?"}, msgspec.to_builtins(alarm)]}
    found["alarm_state"] = {"destinations": [
        {"name": "webhook 1", "failed": 3, "lost": 0, "waiting": 0, "error": "no answer within 10 s"},
        {"name": "mail 1", "failed": 0, "lost": 0, "waiting": 1, "error": ""},
    ]}  # fmt: skip
    lines = [printable(line) for line in status_lines(found)]
    assert lines[1] == "ALARM 1 since 1970-01-01 00:00:00 UTC: too\\nslow"
    assert lines[2:] == ["ALARMS to webhook 1: 3 not sent: no answer within 10 s"]
    assert not needs_attention(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[alarms]\nhold_off = 3", r"\[alarms\]: unknown key 'hold_off'; did you mean hold-off\?"),
        ("[alarms]\nhold-off = -3", r"hold-off: Expected `float` > 0.0"),
        ("[alarms]\noff = ['rates']", r"off\[0\]: no condition is named 'rates'; did you mean rate\?"),
        ("[alarms]\noff = ['?']", r"off\[0\]: no condition is named '\?'; there are component-lost, "),
        (
            "[[alarms.rate]]\nio-group = 1\nmin = 3\nmax = 2",
            r"rate\[0\]: max 2 packets/s of io_group 1 is not above min 3",
        ),
        ("[[alarms.rate]]\nio-group = 1\n[[alarms.rate]]\nio-group = 1", "io_group 1 has two bands"),
        ("[[alarms.webhook]]\nurl = 'file:///etc/passwd'", "expected http://HOST"),
        ("[[alarms.webhook]]\nurl = 'http://a/'\nurl-env = 'X'", "exactly one of url, url-file and url-env"),
        ("[[alarms.command]]\nargv = []", r"command\[0\].argv: Expected `array` of length >= 1"),
        ("[[alarms.command]]\nargs = ['a']", r"command\[0\]: unknown key 'args'; did you mean argv\?"),
        ("[[alarms.mail]]\nhost='h'\nsender='a@b'\nto=[\"x\\ny@b\"]", "expected NAME@HOST"),
        ("[[alarms.mail]]\nhost='h'\nsender='a@b'\nto=['y@b']\nuser='u'\npassword-env='P'", "needs starttls"),
        ("[alarms\n", "at line 1"),
        ("alarms = 3", "Expected `object`, got `int`"),
    ],
)
def test_errors_of_the_configuration_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "detector.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_alarms(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_configuration_without_alarms_and_one_that_is_not_there(tmp_path):
    path = tmp_path / "detector.toml"
    path.write_text("[storage]\nname = 'x'\n")
    assert load_alarms(path) == AlarmConfig()
    with pytest.raises(ConfigError, match="No such file"):
        load_alarms(tmp_path / "none.toml")


KEYS_OF_TABLES = st.sampled_from(["rate", "command", "mail", "webhook", "off", "argv", "url", "to"])
tables = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS_OF_TABLES | st.text(), inner),
)


@given(tables)
def test_any_table_is_read_or_refused_in_one_line(table):
    with contextlib.suppress(ConfigError):
        convert_alarms(table, "file")


def test_the_alarm_of_a_restart_clears_under_the_next_core_too(tmp_path):
    """The next core does not see the restart; it counts the time from its own start."""
    with closing(Catalogue(tmp_path)) as catalogue:
        path = catalogue.path
    ns = time.time_ns()
    text = "RESTARTED: disk: an earlier process was lost"
    append_alarms(path, [AlarmRow(ns, 1, "raised", "component-restarted", "disk", "disk", "warning", text, ns)])
    alarms = Alarms(AlarmConfig(), path, "tcp://127.0.0.1:1")
    try:
        now = time.monotonic()
        for seconds, still_open in ((1, [1]), (59, [1]), (62, [1]), (70, [])):
            alarms.turn(now + seconds)
            assert [alarm["id"] for alarm in alarms.open()] == still_open, seconds
    finally:
        alarms.close(LIMIT)
