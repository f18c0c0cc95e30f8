"""The e-log in the catalogue: comments, shifters and attachments, their way to the storages, and `larpixdaq runs`."""

import io
import json
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from example_counts import examples
from fake_core import all_running, core, producer, storage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import LIMIT, until
from run_control_harness import KINDS, Team, do, open_catalogue, restart

from larpixdaq.cli import main
from larpixdaq.constants import ENDED, MAX_ATTACHMENT
from larpixdaq.control import attachments as attachments_module
from larpixdaq.control.attachments import safe_name
from larpixdaq.control.catalogue import (
    _SCHEMA,
    MAX_COMMENT_BYTES,
    MAX_COMMENTS,
    Author,
    Catalogue,
    Run,
    attachments_dir,
    read_audit,
)
from larpixdaq.control.run_list import RunList, Selection
from larpixdaq.errors import FileError, RequestError, printable
from larpixdaq.operator import Operator
from larpixdaq.protocol.reports import RunEnd
from larpixdaq.protocol.stream import ConnectedBoard

ME = Author("Ada", "ada@daq1", "owner")
#: Every text that a message can carry.
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=300)


@pytest.fixture
def team(tmp_path):
    team = Team(tmp_path)
    for name in KINDS:
        team.register(name)
    yield team
    team.close()


def ended(number, **more):
    fields = {"kind": "physics", "comment": "cosmics", "operator": "me", "prepared_ns": number * 10**9} | more
    return Run(number, phase=ENDED, **{"condition": "COMPLETE", **fields})


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=5))
@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_comments_come_out_of_the_catalogue_as_they_went_in(tmp_path_factory, entries):
    directory = tmp_path_factory.mktemp("state")
    begun = time.time()
    with closing(open_catalogue(directory)) as catalogue:
        catalogue.save(ended(7), new=True)
        for text, shifter in entries:
            catalogue.add_comment(7, text, Author(shifter, "ada@daq1", "owner"))
    with closing(RunList(directory)) as found:
        comments = found.describe(found.find(7))["comments"]
        assert [(one["text"], one["by"]) for one in comments] == entries
        assert all(begun - 1 < one["time"] < time.time() + 1 for one in comments)
        for text, shifter in entries:
            for selection in (Selection(comment=text[:50]), Selection(by=shifter[:50])):
                # SQLite's LIKE ends at a NUL
                assert found.select(selection, 5) == [7] or "\0" in text + shifter


def test_searches_know_no_case_in_any_script(tmp_path):
    with closing(open_catalogue(tmp_path)) as catalogue:
        for number, (comment, shifter) in enumerate(
            [("Beam 100% on_", ""), ("Ärger mit Kühlung", "Ωmega"), ("ΣΉΜΑ", "Łukasz"), ("x", "")], start=1
        ):
            catalogue.save(ended(number, comment=comment, shifter=shifter), new=True)
        catalogue.add_comment(4, "STRASSE gesperrt", Author("Зоя", "z@daq", "night"))
    with closing(RunList(tmp_path)) as found:
        for text, numbers in (
            ("beam 100% ON_", [1]), ("%", [1]), ("_", [1]), ("!", []), ("ÄRGER", [2]), ("kühl", [2]), ("σήμα", [3]),
            ("straße", [4]), ("nothing", []),
        ):  # fmt: skip
            assert found.select(Selection(comment=text), 9) == numbers, text
        for name, numbers in (("ωMEGA", [2]), ("ŁUK", [3]), ("зоя", [4]), ("me", [4, 3, 2, 1]), ("Z@DAQ", [4])):
            assert found.select(Selection(by=name), 9) == numbers, name
        for words, numbers in (
            ("beam %", [1]), ("2", [2]), ("ÄRGER ωmega", [2]), ("ärger Łuk", []), ("straSSe ЗОЯ complete", [4]),
            ("", [4, 3, 2, 1]), ("physics", [4, 3, 2, 1]), ("9" * 30, []), ("x gesperrt", [4]),
        ):  # fmt: skip
            assert found.select(Selection(words=words.split()), 9) == numbers, words
        assert found.select(Selection(words=["me"], before=3), 1) == [2]


def test_rows_of_the_e_log_are_only_appended(tmp_path):
    with closing(open_catalogue(tmp_path)) as catalogue:
        catalogue.add_comment(1, "one", ME)
        catalogue.set_shifter(ME)
        catalogue.add_attachment(1, "a.png", "a.png", 5, "00", ME)
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite", isolation_level=None)) as db:
        for table in ("comments", "shifters", "attachments"):
            for statement in (
                f"UPDATE {table} SET operator = 'x'", f"DELETE FROM {table}",
                f"UPDATE OR REPLACE {table} SET rowid = 2", f"REPLACE INTO {table} SELECT * FROM {table}",
            ):  # fmt: skip
                if statement.startswith("REPLACE") and table == "comments":
                    continue  # without its rowid it is a further comment
                with pytest.raises(sqlite3.IntegrityError, match=f"rows of the {table} are never"):
                    db.execute(statement)


OLD = """
    CREATE TABLE runs (
        run INTEGER PRIMARY KEY, phase TEXT NOT NULL, kind TEXT NOT NULL, comment TEXT NOT NULL, operator TEXT
        NOT NULL, prepared_ns INTEGER NOT NULL, begun_ns INTEGER, ended_ns INTEGER, condition TEXT NOT NULL,
        details TEXT NOT NULL);
    CREATE TABLE comments (run INTEGER NOT NULL, time_ns INTEGER NOT NULL, operator TEXT NOT NULL, text TEXT NOT NULL);
    INSERT INTO runs VALUES (7, 'ENDED', 'physics', 'c', 'me', 1, 2, 3, 'COMPLETE', '{"files": ["a.h5"]}');
    INSERT INTO comments VALUES (7, 5000000000, 'me', 'beam is on');
    PRAGMA user_version=3;
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_catalogue_of_schema_3_gets_the_e_log(tmp_path, damaged):
    """Also when it is damaged, so that its rows are copied."""
    path = tmp_path / "catalogue.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(OLD)
        if damaged:
            db.execute("INSERT INTO runs VALUES (8, '', '', '', '', 1, 2, 3, '', 'no JSON')")
            db.commit()
    (tmp_path / "highest_run").write_text("8\n" if damaged else "7\n")
    with pytest.raises(
        FileError, match=f"of an earlier version \\(schema 3, here {_SCHEMA}\\): a core of this version"
    ):
        RunList(tmp_path)
    with closing(Catalogue(tmp_path)) as catalogue:
        assert bool(catalogue.warnings) == damaged
        assert catalogue.find(7).shifter == ""
        assert catalogue.comments(7) == [{"time": 5.0, "by": "", "operator": "me", "key": "", "text": "beam is on"}]
        catalogue.add_storage("disk")
        assert catalogue.undelivered("disk") == []  # it was written before storages got comments
        catalogue.add_comment(7, "again", ME)
        catalogue.add_storage("disk")
        assert [comment.text for _, comment in catalogue.undelivered("disk")] == ["again"]
        assert catalogue.shifter()["name"] == ""
    with closing(Catalogue(tmp_path)) as catalogue:
        assert len(catalogue.comments(7)) == 2
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=99")
    for opening in (Catalogue, RunList):
        with pytest.raises(FileError, match=f"made by another larpix-daq \\(schema 99, here {_SCHEMA}\\)"):
            opening(tmp_path)


def test_a_damaged_catalogue_keeps_the_e_log(tmp_path):
    with closing(open_catalogue(tmp_path)) as catalogue:
        catalogue.save(ended(7, shifter="Ada"), new=True)
        catalogue.add_comment(7, "one", ME)
        catalogue.add_attachment(7, "a.png", "a.png", 5, "00", ME)
        catalogue.set_shifter(ME)
        catalogue.add_storage("disk")
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as db:
        db.execute("UPDATE runs SET details = 'no JSON' WHERE run = 7")
        columns = "phase, kind, comment, operator, prepared_ns, begun_ns, ended_ns, condition, '{}', shifter"
        db.execute(f"INSERT INTO runs SELECT 6, {columns} FROM runs")
        db.commit()
    with closing(Catalogue(tmp_path)) as catalogue:
        assert "was damaged" in catalogue.warnings[0]
        assert (catalogue.find(6).shifter, catalogue.shifter()["name"]) == ("Ada", "Ada")
        assert [one["text"] for one in catalogue.comments(7)] == ["one"]
        assert [one["file"] for one in catalogue.attachments(7)] == ["a.png"]
        assert catalogue.undelivered("disk") == []


# The way to the storages


def comments_for(team, name):
    """Return the comments in the waiting requests to a storage: {run: [text]}."""
    return {
        params["run"]: [comment.text for comment in params["comments"]]
        for waiting, _, action, params in team.waiting
        if (waiting, action) == (name, "add_comments")
    }


def beat(team):
    for name in ("disk 1", "disk 2"):
        if name in team.peers.components:
            team.beat(name)
    team.advance(0.0)


def test_comments_go_to_all_storages_of_the_run(team):
    with pytest.raises(RequestError, match="comment: there is no run yet"):
        team.runs.comment(None, "too early", ME)
    do(team, "prepare")
    assert team.runs.comment(None, "beam is on", ME) == 1
    beat(team)
    for name in ("disk 1", "disk 2"):
        assert comments_for(team, name) == {1: ["beam is on"]}
    team.answer_all()
    assert team.peers.components["disk 1"].run == 1  # the storages are still in the run
    do(team, "begin")
    assert do(team, "end")["condition"] == "COMPLETE"
    do(team, "prepare")
    assert team.runs.comment(1, "late", ME) == 1
    assert team.runs.comment(None, "now", ME) == 2
    assert team.runs.comment(1, "later", ME) == 1
    with pytest.raises(RequestError, match="comment: there is no run 3"):
        team.runs.comment(3, "never", ME)
    team.beat("disk 1")
    for expected in ({1: ["late"]}, {2: ["now"]}, {1: ["later"]}):
        assert comments_for(team, "disk 1") == expected
        team.answer()
    assert not team.waiting
    assert [one["text"] for one in team.catalogue.comments(1)] == ["beam is on", "late", "later"]


def test_a_storage_that_comes_later_gets_its_comments(team):
    do(team, "prepare")
    do(team, "begin")
    team.lose("disk 1")
    team.runs.comment(None, "one", ME)
    beat(team)
    team.answer_all()
    second = restart(team)
    second.runs.comment(1, "two", ME)
    for name in KINDS:
        second.register(
            name, instance="2" if name == "disk 1" else "1", run=None if name == "disk 1" else 1, begun=True
        )
    second.beat("disk 1")
    assert comments_for(second, "disk 1") == {}  # it has not opened the run again
    second.beat("disk 2")
    assert comments_for(second, "disk 2") == {1: ["two"]}
    second.answer_all()
    second.beat("disk 1")
    assert comments_for(second, "disk 1") == {1: ["one", "two"]}
    second.answer_all()
    second.beat("disk 1")
    assert comments_for(second, "disk 1") == {}
    second.close()


def test_a_storage_that_is_restarted_while_it_gets_comments_gets_them_again(team):
    do(team, "prepare")
    team.runs.comment(None, "one", ME)
    team.beat("disk 1")
    team.waiting.clear()
    team.lose("disk 1")
    team.register("disk 1", instance="2", run=None)
    team.advance(0.0)
    team.answer_all()
    team.beat("disk 1")
    assert comments_for(team, "disk 1") == {1: ["one"]}


def test_a_comment_that_a_storage_refuses_stays_in_the_catalogue_alone(team, caplog):
    do(team, "prepare")
    team.runs.comment(None, "one", ME)
    team.beat("disk 1")
    team.answer(failing=True)
    team.runs.comment(None, "two", ME)
    team.answer(failing=True)
    assert "run 1: only the catalogue has a comment on it: disk 1: it broke" in caplog.text
    assert comments_for(team, "disk 1") == {1: ["two"]}
    team.answer_all()
    assert team.runs.state == "READY"


# Through the core


def test_comments_need_no_control_and_know_their_author(tmp_path):
    with core(tmp_path / "state") as running, Operator(running.address, name="alice") as alice:
        actors = producer(running.address), storage(running.address, add_comments={})
        with all_running(*actors) as (_, disk), Operator(running.address, name="bob") as bob:
            assert (alice.shifter, "shifter" in alice.status().readable(LIMIT)) == ("", False)
            alice.shifter = "Zoë \u202e Ω"
            assert bob.shifter == "Zoë \u202e Ω"
            alice.prepare_run(comment="c", by=None).result(LIMIT)
            assert disk.calls[0][1]["shifter"] == "Zoë \u202e Ω"
            text = "line 1\nline\t2 \x1b[31m\0 漢字 \u202e"
            assert bob.comment(text).result(LIMIT) == {"run": 1}
            assert bob.comment("by me", by="Bob").result(LIMIT) == {"run": 1}
            assert bob.comment("by nobody", by=" ").result(LIMIT) == {"run": 1}
            for bad, words in (
                ({"text": "x" * 10_001}, "the text has 10001 characters, at most 10000"),
                ({"text": " \n"}, "expected a text, found nothing"),
                ({"text": "x", "by": "y" * 101}, "the shifter's name has 101 characters, at most 100"),
                ({"text": "x", "run": 9}, "there is no run 9"),
            ):
                with pytest.raises(RequestError, match=f"^comment: {words}"):
                    bob.comment(**bad).result(LIMIT)
            with pytest.raises(RequestError, match=r"^prepare_run: the comment has 10001 characters"):
                alice.prepare_run("x" * 10_001).result(LIMIT)
            comments = bob.run_info(1).result(LIMIT)["comments"]
            assert [(one["text"], one["by"], one["operator"], one["key"]) for one in comments] == [
                (text, "Zoë \u202e Ω", "bob", "owner"),
                ("by me", "Bob", "bob", "owner"),
                ("by nobody", "", "bob", "owner"),
            ]
            delivered = until(lambda: [p for action, p in disk.calls if action == "add_comments"], "comments")
            assert (delivered[0]["run"], delivered[0]["comments"][0]["text"]) == (1, text)
            assert "shifter: Zoë \\u202e Ω, since " in printable(alice.status().readable(LIMIT).replace("\n", " "))
            assert alice.run_info(1).result(LIMIT)["shifter"] == "Zoë \u202e Ω"
            bob.close()
            assert alice.abort_run().result(LIMIT)["run"] == 1


def test_comments_on_a_run_are_bounded(tmp_path):
    with closing(open_catalogue(tmp_path)) as catalogue:
        for _ in range(MAX_COMMENT_BYTES // 40_000):
            catalogue.add_comment(7, "\0" + "\U0001f4a1" * 9_999, ME)
        with pytest.raises(
            RequestError, match=f"53 comments of 21.* bytes, at most {MAX_COMMENTS} of {MAX_COMMENT_BYTES}"
        ):
            catalogue.add_comment(7, "\U0001f4a1" * 10_000, ME)
        catalogue.add_comment(8, "x" * 10_000, ME)
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite", isolation_level=None)) as db:
        many = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n WHERE i < {MAX_COMMENTS})"
        db.execute(f"{many} INSERT INTO comments SELECT 9, i, '', 'x', '', '' FROM n")
    with (
        closing(open_catalogue(tmp_path)) as catalogue,
        pytest.raises(RequestError, match="run 9 would have 5001 comm"),
    ):
        catalogue.add_comment(9, "x", ME)


def accepted_attachments(state, number):
    rows = [row for row in read_audit(state) if (row.action, row.outcome) == ("attach", "accepted")]
    return rows if len(rows) >= number else None


def test_attachments_through_the_core(tmp_path):
    state = tmp_path / "state"
    with core(state) as running, Operator(running.address, name="alice") as alice:
        with pytest.raises(RequestError, match="attach: there is no run yet"):
            alice.attach(__file__).result(LIMIT)
        running._catalogue.save(ended(1), new=True)
        big = tmp_path / "big picture.png"
        big.write_bytes(os.urandom((512 << 10) * 2 + 7))
        odd = tmp_path / ".Ω\n..\x1b"
        odd.write_bytes(b"")
        kept = [alice.attach(path, by="Ada").result(LIMIT) for path in (big, big, str(odd))]
        assert [Path(one["file"]).name for one in kept] == ["big_picture.png", "big_picture-2.png", "Ω_.._"]
        for one, path in zip(kept, (big, big, odd), strict=True):
            assert Path(one["file"]).parent == attachments_dir(state, 1)
            assert Path(one["file"]).read_bytes() == path.read_bytes()
            assert Path(one["file"]).stat().st_mode & 0o777 == 0o600
        found = alice.run_info(1).result(LIMIT)["attachments"]
        assert [(one["name"], one["bytes"], one["by"], one["sha256"]) for one in found] == [
            (path.name, path.stat().st_size, "Ada", one["sha256"])
            for one, path in zip(kept, (big, big, odd), strict=True)
        ]
        assert list((state / "attachments" / "incoming").iterdir()) == []
        with pytest.raises(FileError, match=r"[Nn]o such"):
            alice.attach(tmp_path / "none")
        for params, words in (
            ({"offset": 5, "data": b"x"}, "piece at byte 5, expected 0"),
            ({"offset": 0, "data": b"x" * 11}, "11 bytes at 0 of 10"),
            ({"offset": 0, "data": b"", "size": MAX_ATTACHMENT + 1}, "attachments have at most 67.1 MB"),
            ({"offset": 0, "data": b"x", "name": ""}, "name"),
        ):
            with pytest.raises(RequestError, match=f"attach: .*{words}"):
                alice.call("core", "attach", **{"name": "n", "size": 10, **params}).result(LIMIT)
        alice.call("core", "attach", name="half", size=10, offset=0, data=b"12345").result(LIMIT)
        rows = until(lambda: accepted_attachments(state, 3), "rows of the audit")
        assert len(rows) <= 5  # one a file, not one a piece
        assert not any("data=" in row.detail for row in rows)
    with core(state) as running, Operator(running.address, name="alice") as alice:
        alice.attach(big, 1).result(LIMIT)
        assert list((state / "attachments" / "incoming").iterdir()) == []  # what the first core left is gone


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=255))
@settings(max_examples=examples(100), deadline=None)
def test_names_of_attachments_are_safe(name):
    safe = safe_name(name)
    assert safe
    assert len(safe.encode()) <= 110
    assert "/" not in safe
    assert "\0" not in safe
    assert not safe.startswith((".", "-"))
    assert printable(safe) == safe


def test_attachments_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(attachments_module, "MAX_ATTACHED", 15)
    state = tmp_path / "state"
    with core(state) as running, Operator(running.address) as operator:
        running._catalogue.save(ended(1), new=True)
        (tmp_path / "a").write_bytes(b"0123456789")
        operator.attach(tmp_path / "a").result(LIMIT)
        with pytest.raises(RequestError, match="run 1 has attachments of 10 B, with a it would have more than 15 B"):
            operator.attach(tmp_path / "a").result(LIMIT)
        monkeypatch.setattr(attachments_module, "MIN_FREE", 1 << 60)
        monkeypatch.setattr(attachments_module, "MAX_ATTACHED", 100)
        with pytest.raises(RequestError, match="a of 10 B does not fit"):
            operator.attach(tmp_path / "a").result(LIMIT)


# larpixdaq runs


def test_runs_on_the_command_line(tmp_path, capsys):
    state = ("--state-dir", str(tmp_path))
    counts = [[1, *range(22)], [2, *range(22)]]
    board = ConnectedBoard("LArPix board", 1, "PACMAN", "pacman.local", "daq1", "4.2")
    with closing(open_catalogue(tmp_path)) as catalogue:
        for number in range(1, 31):
            bad = number % 10 == 0
            run = ended(
                number, condition="INCOMPLETE" if bad else "COMPLETE", kind="test" if number == 4 else "physics",
                begun_ns=number * 10**9, stopped_ns=(number + 600) * 10**9, reasons=["2 rows \x1b[31m"] if bad else [],
                ends=[RunEnd(7, 3, 40, counts, "LArPix board")], connected=[board], producers={"LArPix board": [7, 8]},
                storages=["disk"], files=["/data/a.h5"], rows=40, stored=None if bad else 40, shifter="Ada",
            )  # fmt: skip
            catalogue.save(run, new=True)
        catalogue.save(Run(31, "physics", "y" * 200, "me", 10**18, phase="RUN", begun_ns=10**18), new=True)
        catalogue.add_file("disk", "/data/a.h5", 30, 1234, "ab" * 32, "COMPLETE")
        catalogue.add_comment(30, "beam \x1b[31m is on", ME)
        catalogue.add_attachment(30, "a.png", "a.png", 5, "00", ME)
        catalogue.add_attachment(30, "b.png", "b.png", 5, "00", ME)
        attachments_dir(tmp_path, 30).mkdir(parents=True)
        (attachments_dir(tmp_path, 30) / "a.png").write_bytes(b"12345")

        def lines(*arguments):
            assert main(["runs", *arguments, *state]) == 0
            out = capsys.readouterr().out
            assert "\x1b" not in out
            return out.splitlines()

        shown = lines()
        assert len(shown) == 22
        assert shown[0].split() == ["run", "condition", "kind", "begun", "length", "rows", "stored", "comment"]
        assert shown[1].split()[:6] == ["31", "RUNNING", "(RUN)", "physics", "2001-09-09", "01:46:40"]
        assert shown[1].endswith("  not known yet  " + "y" * 60 + "…")
        assert shown[2].split()[:3] == ["30", "INCOMPLETE", "physics"]
        assert shown[2].endswith("  10 min      not known  cosmics [1 comment]")
        assert shown[3].endswith("  10 min             40  cosmics")
        assert shown[-1] == "and older ones: --last 200 shows more, --last 0 all"
        assert len(lines("--last", "0")) == 32
        assert [line.split()[0] for line in lines("--condition", "incomplete")[1:]] == ["30", "20", "10"]
        assert [line.split()[0] for line in lines("--kind", "test")[1:]] == ["4"]
        assert [line.split()[0] for line in lines("--comment", "BEAM")[1:]] == ["30"]
        assert [line.split()[0] for line in lines("--since", "1970-01-01T00:00:28", "--until", "1980-01-01")[1:]] == [
            "30", "29", "28",
        ]  # fmt: skip
        assert lines("--comment", "nothing like it")[1:] == ["no run is like this"]
        assert lines("--kind", "tset")[1:] == ["no run is like this: none is of the kind 'tset'; did you mean test?"]
        found = "\n".join(lines("30"))
        for words in (
            "run          30 (physics)", "condition    INCOMPLETE\n             2 rows \\x1b[31m", "shifter      Ada",
            "length       600.0 s", "rows         40 made by the producers, not known stored",
            "LArPix board, io_group 1: PACMAN pacman.local, read on daq1, firmware 4.2",
            "LArPix board, 2 processes one after the other", "/data/a.h5, 1.23 kB, COMPLETE, disk, sha256 abab",
            "totals       without those of 1 of 2 processes of LArPix board, which are in the files alone",
            "all: bytes in 2,", "LArPix board, io_group 2: bytes in 1,",
            "Ada, ada@daq1, key owner: beam \\x1b[31m is on", "b.png, 5 B, sha256 00, THE FILE IS GONE",
        ):  # fmt: skip
            assert words in found, (words, found)
        assert found.count("THE FILE") == 1
        assert "as the core last wrote" in "\n".join(lines("31"))
        (one,) = lines("30", "--json")
        facts = json.loads(one)
        assert (facts["run"], facts["length_s"], facts["comments"][0]["by"]) == (30, 600.0, "Ada")
        assert facts["ledger"][1]["bytes_in"] == 1
        everything = json.loads("\n".join(lines("--json", "--last", "2")))
        assert ([run["run"] for run in everything["runs"]], everything["more"]) == ([31, 30], True)
        assert everything["runs"][1] == facts
        for arguments, status, words in (
            (("99",), 1, "there is no run 99"),
            (("3", "--kind", "x"), 2, "give one of them"),
            (("--since", "1h", "--until", "2h"), 2, "--until is before --since"),
        ):
            assert main(["runs", *arguments, *state]) == status
            assert words in capsys.readouterr().err
    empty = tmp_path / "empty"
    assert main(["runs", "--state-dir", str(empty)]) == 1
    assert "there is no run catalogue" in capsys.readouterr().err
    Catalogue(empty).close()
    assert main(["runs", "--state-dir", str(empty)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["no run yet"]


def test_comment_shifter_and_attach_on_the_command_line(tmp_path, capsys, monkeypatch):
    with core(tmp_path / "state") as running:
        running._catalogue.save(ended(7), new=True)
        where = ("--core", running.address)

        def said(*arguments):
            assert main([*arguments, *where]) == 0
            return capsys.readouterr().out

        assert said("shifter") == "nobody is on shift\n"
        assert said("shifter", "Zo\u202eë") == "shifter: Zo\\u202eë\n"
        assert said("comment", "7", "beam", "is on") == "run 7: comment written\n"
        for given, words in (
            (b"\n", "expected a text, found nothing"),
            (b"\xff", "expected UTF-8, found the byte 0xff"),
        ):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
            assert main(["comment", "now", "-", *where]) == 1
            assert words in capsys.readouterr().err
        (tmp_path / "a.txt").write_text("x")
        assert said("attach", "now", str(tmp_path / "a.txt"), "--by", "Bob").startswith("run 7: a.txt, 1 B, kept as ")
        assert main(["comment", "8", "x", *where]) == 1
        assert "comment: there is no run 8 in the catalogue" in capsys.readouterr().err
        assert main(["comment", "now", "x" * 10_001, *where]) == 1
        assert "has 10001 characters, at most 10000" in capsys.readouterr().err
        assert main(["comment", "now", "\udcff", *where]) == 2
        assert "expected UTF-8" in capsys.readouterr().err
        assert said("shifter", "") == "nobody is on shift\n"
        with Operator(running.address) as operator:
            info = operator.run_info(7).result(LIMIT)
        assert [(one["text"], one["by"]) for one in info["comments"]] == [("beam is on", "Zo\u202eë")]
        assert [(one["name"], one["by"]) for one in info["attachments"]] == [("a.txt", "Bob")]
