"""The audit: rows of who did what when, refused attempts that share rows, full disks, and `larpixdaq audit`."""

import argparse
import contextlib
import datetime
import json
import sqlite3
import time
from contextlib import closing

import msgspec
import pytest
import zmq
from disk import Disk
from fake_core import all_running, core, producer, storage
from hypothesis import given
from hypothesis import strategies as st
from processes import LIMIT, Process, free_port, until
from raw_sockets import Context

from larpixdaq.cli import main
from larpixdaq.control import audit as audit_module
from larpixdaq.control.audit import Audit, parameters
from larpixdaq.control.catalogue import AuditRow, Catalogue, append_audit, read_audit
from larpixdaq.control.display import audit_line
from larpixdaq.errors import ControlHeld, FileError, RequestError, printable
from larpixdaq.keys.curve import connect_with, new_pair
from larpixdaq.keys.key_store import Member
from larpixdaq.operator import Operator
from larpixdaq.protocol.control import ActionRequest, Heartbeat, Join, Open, pack, unpack_core
from larpixdaq.runtime.units import parse_since

OBSERVER = Member("night", "observer", "k" * 40)


@pytest.fixture
def directory(tmp_path):
    """A state directory with a catalogue that is open."""
    with closing(Catalogue(tmp_path)):
        yield tmp_path


@pytest.fixture
def audit(directory):
    made = Audit(directory / "catalogue.sqlite")
    yield made
    made.close(LIMIT)


def rows_of(directory, action=""):
    return [row for row in read_audit(directory) if action in ("", row.action)]


def wait_for(directory, action, outcome=""):
    """Wait for a row; returns it."""
    found = until(
        lambda: [row for row in rows_of(directory, action) if row.outcome.startswith(outcome)], f"{action} {outcome}"
    )
    return found[-1]


def test_who_did_what_when(tmp_path):
    begun = time.time_ns()
    with core(tmp_path / "state") as running:
        actors = producer(running.address), storage(running.address)
        with all_running(*actors) as (board, _), Operator(running.address, name="alice") as alice:
            alice.prepare_run(comment="a\x1b[31mred").result(LIMIT)
            alice.begin_run().result(LIMIT)
            routine = alice.run_routine("hello_world", gain=2)
            until(lambda: board.open, "the routine")
            board.replies["run_routine"] = RequestError("no chip 9")
            with pytest.raises(RequestError, match="no chip 9"):
                alice.run_routine("leakage", chip=9).result(LIMIT)
            with Operator(running.address, name="bob") as bob:
                with pytest.raises(ControlHeld):
                    bob.end_run().result(LIMIT)
                bob.take_control().result(LIMIT)
                bob.end_run().result(LIMIT)
                bob.release_control().result(LIMIT)
                bob.invite("carol", "observer").result(LIMIT)
                bob.revoke("carol").result(LIMIT)
                bob.rotate().result(LIMIT)
                bob.state().result(LIMIT)
            alice.close()  # who does not wait for her routine
            board.open[0].result("hello")
            wait_for(tmp_path / "state", "run_routine", "done")
            del routine
    rows = rows_of(tmp_path / "state")
    assert all(begun <= row.time_ns <= time.time_ns() and row.count >= 1 for row in rows)
    accepted = [(row.name, row.action, row.component, row.detail, row.outcome) for row in rows if row.name != "core"]
    for expected in (
        ("alice", "control taken", "", "", ""),
        ("alice", "prepare_run", "", "comment='a\\x1b[31mred'", "accepted"),
        ("alice", "prepare_run", "", "", "done"),
        ("alice", "run_routine", "LArPix board", "name='hello_world', args=[], kwargs={'gain': 2}", "accepted"),
        ("alice", "run_routine", "LArPix board", "", "done"),
        ("alice", "run_routine", "LArPix board", "'chip': 9", "accepted"),
        ("alice", "run_routine", "LArPix board", "", "failed: no chip 9"),
        ("bob", "without control", "", "end_run", "refused"),
        ("bob", "control taken", "", "from alice", ""),
        ("bob", "end_run", "", "", "done"),
        ("bob", "control released", "", "", ""),
        ("bob", "invite", "", "name='carol', role='observer', expires=600.0, address=''", "accepted"),
        ("bob", "revoke", "", "name='carol'", "accepted"),
        ("bob", "rotate", "", "", "accepted"),
        ("LArPix board", "registered", "", "", "done"),
    ):
        assert any(row[:3] == expected[:3] and row[4] == expected[4] and expected[3] in row[3] for row in accepted), (
            expected,
            accepted,
        )
    assert {(row.key, row.role) for row in rows} == {("owner", "owner"), ("core", "core")}
    states = [row.detail for row in rows if row.action == "run 1"]
    assert states == ["STOP to READY", "READY to RUN", "RUN to STOP, COMPLETE"]
    assert (rows[0].action, rows[-1].action) == ("core started", "core ended")
    assert not any(row.action == "state" for row in rows)  # queries leave no row


def test_refused_attempts_and_keys(tmp_path):
    state = tmp_path / "state"
    with core(state) as running, Operator(running.address) as owner:
        context = Context()

        def connected(pair):
            socket = context.socket(zmq.DEALER)
            socket.linger, socket.rcvtimeo, socket.immediate = 0, int(LIMIT * 1000), 1
            connect_with(socket, pair, running._keys.server.public)
            socket.connect(running.address)
            return socket

        try:
            connected(new_pair())
            assert wait_for(state, "connection without a known key").name == "127.0.0.1"
            invitation, pair = running._keys.invite("night", "observer", 600.0), new_pair()
            guest = connected(invitation)
            guest.send(pack(Join(public=pair.public, request="j")))
            assert unpack_core(guest.recv()).kind == "result"
            row = wait_for(state, "joined", "done")
            assert (row.key, row.role, pair.public in row.detail) == ("night", "observer", True)
            guest.send(pack(Join(public=new_pair().public, request="j")))
            assert "was used" in unpack_core(guest.recv()).text
            assert "was used" in wait_for(state, "invitation", "refused").detail
            night = connected(pair)
            night.send(pack(Open(name="x", instance="i")))
            session = unpack_core(night.recv()).session
            night.send(pack(ActionRequest(session=session, request="1", action="abort_run")))
            row = wait_for(state, "not allowed to a role", "refused")
            assert (row.key, row.role, row.detail) == ("night", "observer", "abort_run")
            owners = next(iter(running._peers.operators.values())).session
            night.send(pack(Heartbeat(session=owners)))
            assert wait_for(state, "session of another key", "refused").key == "night"
            night.send(pack(Heartbeat(session="made up")))
            assert wait_for(state, "unknown session", "refused").key == "night"
            night.send(b"garbage")
            assert wait_for(state, "invalid message", "refused").key == "night"
            owner.revoke("night").result(LIMIT)
            assert wait_for(state, "revoke", "done").detail == ""
        finally:
            context.destroy(0)


def test_a_session_of_an_earlier_core_is_no_refused_attempt_unless_of_another_key(tmp_path):
    state, address, pair = tmp_path / "state", f"tcp://127.0.0.1:{free_port()}", new_pair()
    context = Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, 0)
        with core(state, address) as running:
            store = stack.enter_context(storage(address).running())
            owner = stack.enter_context(Operator(address))
            invitation = running._keys.invite("night", "observer", 600.0)
            running._keys.join(invitation.public, pair.public)
            old = store.node.session
        with core(state, address) as running:
            until(lambda: store.node.session not in ("", old), "the storage to be back")
            until(lambda: running._peers.operators, "the Operator to be back")
            assert owner.state().result(LIMIT) == "STOP"
            night = context.socket(zmq.DEALER)
            connect_with(night, pair, running._keys.server.public)
            night.connect(address)
            night.send(pack(Heartbeat(session=old)))
            assert wait_for(state, "unknown session", "refused").key == "night"
    assert [row.count for row in rows_of(state, "unknown session")] == [1]


def test_what_components_have_refused(tmp_path):
    with core(tmp_path / "state") as running, producer(running.address).running() as board:
        peers = running._peers.components  # a repeated registration replaces the component in it
        until(lambda: peers, "the board")
        for count in (5, 8):  # the first is from before, as after a restart of the core
            board.status = {"refused_connections": count, "refused_frames": 0}
            until(lambda count=count: peers["LArPix board"].status.get("refused_connections") == count, "its status")
        row = wait_for(tmp_path / "state", "connection without a known key")
        assert (row.count, row.component) == (3, "LArPix board")


def test_control_of_an_operator_that_has_gone_is_freed_in_the_audit(tmp_path):
    with core(tmp_path / "state") as running:
        with Operator(running.address, name="alice") as alice:
            alice.take_control().result(LIMIT)
        assert wait_for(tmp_path / "state", "control freed").name == "alice"


def test_rows_are_only_appended(directory, audit):
    audit.note(None, "one")
    audit.note(None, "two")
    audit.close(LIMIT)
    with closing(sqlite3.connect(directory / "catalogue.sqlite", isolation_level=None)) as db:
        for statement in (
            "UPDATE audit SET name = 'x'",
            "UPDATE OR REPLACE audit SET id = 2 WHERE id = 1",
            "DELETE FROM audit",
            "INSERT OR REPLACE INTO audit SELECT 1, 0, '', '', '', '', '', '', '', 1",
            "REPLACE INTO audit SELECT * FROM audit",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="rows of the audit are never"):
                db.execute(statement)
    assert [row.action for row in rows_of(directory)] == ["one", "two"]


def test_a_flood_of_refused_attempts_shares_rows(directory, audit):
    now, number = 1000.0, 200_000
    for index in range(number):
        audit.refuse("invalid message", OBSERVER, f"name {index}", "x" * 10_000)
        audit.refuse("unknown session", None, "", "")
        if index % 1000 == 0:
            now += 0.5
            audit.turn(now)
    audit.close(LIMIT)
    for kind in ("invalid message", "unknown session"):
        rows = rows_of(directory, kind)
        assert sum(row.count for row in rows) == number
        assert len(rows) <= 9  # of 100 s: after 1, 2, 4 … s
        assert all(len(row.detail) < 400 and len(row.name) < 400 for row in rows)
    assert (row := rows_of(directory, "invalid message")[1]).key == "night"
    assert row.name.endswith(", others")
    assert (directory / "catalogue.sqlite").stat().st_size < 200_000


def test_one_attempt_is_written_at_once_again_after_a_quiet_time(directory, audit):
    for now in (1000.0, 1000.1, 1200.0):
        audit.refuse("invalid message", OBSERVER, "", "")
        audit.turn(now)
    audit.close(LIMIT)
    assert [row.count for row in rows_of(directory)] == [1, 2]


def test_too_many_actions_of_one_key_share_rows_and_others_have_their_own(directory, audit, monkeypatch):
    monkeypatch.setattr(audit_module, "WAITING", 10**6)
    for _ in range(20_000):
        audit.note_member(OBSERVER, "control taken")
    audit.note_member(Member("other", "operator", "o" * 40), "control taken")
    audit.turn(1000.0)
    audit.close(LIMIT)
    rows = rows_of(directory)
    assert 3000 <= len(rows) < 3100
    assert sum(row.count for row in rows) == 20_001
    assert [row.count for row in rows if row.key == "other"] == [1]


def test_rows_without_room_are_lost_and_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(audit_module, "WAITING", 10)
    audit = Audit(tmp_path / "catalogue.sqlite")  # not there yet
    for number in range(25):
        audit.note(None, f"action {number}")
    until(lambda: audit.turn(time.monotonic()) or audit.error, "an error")
    assert audit.status() == {"lost": 15, "waiting": 10, "error": audit.error}
    assert "unable to open database file" in audit.error
    with closing(Catalogue(tmp_path)):
        until(lambda: audit.turn(time.monotonic()) or not audit.status()["waiting"], "the rows")
        audit.close(LIMIT)
        assert audit.status() == {"lost": 15, "waiting": 0, "error": ""}
    *rows, lost = rows_of(tmp_path)
    assert [row.action for row in rows] == [f"action {number}" for number in range(10)]
    assert (lost.action, lost.count) == ("rows lost", 15)
    assert len([one for one in caplog.records if "audit" in one.getMessage()]) == 1


def test_a_core_whose_disk_is_full_goes_on_and_says_what_the_audit_lost(tmp_path):
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with closing(Disk(tmp_path, state)) as disk:
        address = f"tcp://127.0.0.1:{free_port()}"
        arguments = "--address", address, "--log-address", f"tcp://127.0.0.1:{free_port()}", "--state-dir", state
        with (
            Process("larpixdaq.core", *arguments, directory=tmp_path / "out", env=disk.env) as process,
            Operator(address, timeout=LIMIT) as operator,
        ):
            wait_for(state, "core started")
            disk.full()
            requests = [operator.abort_run() for _ in range(1100)]
            for request in requests:
                request.result(LIMIT)
            until(lambda: operator.status().result(LIMIT)["audit"]["lost"], "lost rows")
            found = operator.status().result(LIMIT)
            assert found["audit"]["waiting"] == audit_module.WAITING
            assert "disk" in found["audit"]["error"]
            assert found["state"] == "STOP"
            disk.heal()
            until(lambda: not operator.status().result(LIMIT)["audit"]["waiting"], "the rows")
            lost = operator.status().result(LIMIT)["audit"]["lost"]
            disk.hang()
            affected = disk.affected
            operator.release_control().result(LIMIT)
            until(lambda: disk.affected > affected, "the disk to hang")
            for _ in range(20):
                operator.take_control().result(LIMIT)
            disk.heal()
            assert process.stop() == 0
    rows = rows_of(state)
    assert [row.count for row in rows if row.action == "rows lost"] == [lost]
    written = sum(row.count for row in rows if row.action in ("abort_run", "further actions"))
    assert [row.action for row in rows if row.action.startswith("control")][-2:] == [
        "control released",
        "control taken",
    ]
    assert written + lost == 2200


def test_a_catalogue_that_is_replaced_or_damaged_keeps_the_audit(tmp_path):
    with closing(Catalogue(tmp_path)) as catalogue:
        append_audit(catalogue.path, [AuditRow(number, "k", "owner", "n", "a") for number in range(100)])
        catalogue.path.unlink()
        with pytest.raises(FileError):
            append_audit(catalogue.path, [AuditRow(0, "k", "owner", "n", "a")])
        assert catalogue.keep()
        append_audit(catalogue.path, [AuditRow(100, "k", "owner", "n", "a")])
    with closing(sqlite3.connect(catalogue.path, isolation_level=None)) as db:
        db.execute("INSERT INTO runs VALUES (1, 'ENDED', '', '', '', 0, 0, 0, 'COMPLETE', 'damaged', '')")
    with closing(Catalogue(tmp_path)) as catalogue:
        assert catalogue.warnings
    assert [row.time_ns for row in read_audit(tmp_path)] == list(range(101))


def test_an_older_catalogue_gets_the_table(tmp_path, capsys):
    with closing(Catalogue(tmp_path)):
        pass
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite", isolation_level=None)) as db:
        db.executescript("DROP TABLE audit; PRAGMA user_version=2;")
    assert main(["audit", "--state-dir", str(tmp_path)]) == 1
    assert "has no audit yet; it begins when a core of this version starts" in capsys.readouterr().err
    with closing(Catalogue(tmp_path)) as catalogue:
        append_audit(catalogue.path, [AuditRow(1, "k", "owner", "n", "a")])
    assert len(rows_of(tmp_path)) == 1


def test_the_command(directory, capsys):
    row = AuditRow(
        1_700_000_000_000_000_000, "night", "operator", "night", "power", "board\n", "on=\x1b[1m", "accepted"
    )
    shared = AuditRow(1_800_000_000_000_000_000, "", "", "127.0.0.1", "invalid message", "Log", "", "refused", 7)
    append_audit(directory / "catalogue.sqlite", [row, shared])
    program = ["audit", "--state-dir", str(directory)]
    assert main(program) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2023-11-14 22:13:20 UTC  operator 'night': power of board\\n, on=\\x1b[1m: accepted",
        "2027-01-15 08:00:00 UTC  127.0.0.1: invalid message at Log: refused, 7 times",
    ]
    assert main([*program, "--json", "--since", "2023-11-14 22:13:21 UTC"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [msgspec.structs.asdict(shared)]}
    assert main([*program, "--since", "2100-01-01"]) == 0
    assert capsys.readouterr().out == "nothing since 2100-01-01 00:00:00 UTC\n"
    assert main(["audit", "--state-dir", str(directory / "none")]) == 1
    assert "there is no run catalogue" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*program, "--since", "yesterday"])
    assert "expected a UTC time such as 2023-03-15T02:48" in capsys.readouterr().err


def test_many_rows_and_a_damaged_one(directory, capsys):
    rows = [AuditRow(number, "k", "owner", "n", "a") for number in range(2500)]
    append_audit(directory / "catalogue.sqlite", rows)
    assert list(read_audit(directory)) == rows
    assert list(read_audit(directory, 2499)) == rows[-1:]
    append_audit(directory / "catalogue.sqlite", [AuditRow(1, "k", "owner", "n", b"\0blob")])  # type: ignore[arg-type]
    assert main(["audit", "--state-dir", str(directory), "--since", "1970-01-01T00:00"]) == 1
    assert "audit, row 2501: Expected `str`, got `bytes`" in capsys.readouterr().err


@given(
    st.text(max_size=40)
    | st.from_regex(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?Z?")
    | st.from_regex(r"\d+(\.\d+)?[a-z]+")
)
def test_every_text_is_a_time_or_refused(text):
    with contextlib.suppress(argparse.ArgumentTypeError):
        assert 0.0 <= parse_since(text) < 1e12


@given(st.datetimes(min_value=datetime.datetime(1970, 1, 1)))
def test_every_utc_time_is_read(moment):
    seconds = moment.replace(microsecond=0, tzinfo=datetime.timezone.utc)
    for text in (seconds.strftime("%Y-%m-%dT%H:%M:%SZ"), seconds.strftime("%Y-%m-%d %H:%M:%S UTC")):
        if len(text.partition("-")[0]) == 4:
            assert parse_since(text) == seconds.timestamp()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
)


@given(st.dictionaries(st.text(), values), st.text(), st.integers(0, 2**63 - 1))
def test_any_parameters_and_names_make_one_line(params, text, number):
    row = AuditRow(number, text, text, text, text, text, parameters(params), text, number)
    assert len(parameters(params)) < 2100
    assert len(printable(audit_line(row)).splitlines()) == 1
