"""Results as text for people: tables, times, and the lines of `larpixdaq status`."""

import time

import msgspec
import numpy as np
import pytest
from fake_core import producer_status, storage, storage_status
from processes import until

from larpixdaq.cli import demo, main, system
from larpixdaq.control import disk_watch, display
from larpixdaq.control.client import Request, Response
from larpixdaq.control.display import MAX_SHOWN, readable
from larpixdaq.protocol.reports import MonitorStatus, StorageStatus, SupervisedProcess, SupervisorStatus
from larpixdaq.runtime import units

CHIPS = np.dtype([("io_group", "u1"), ("chip_id", "u1"), ("rate", "<f8"), ("seen_bad_parity", "<u8")])


def test_a_structured_array_is_an_aligned_table_without_columns_of_zeros():
    rows = np.array([(1, 11, 10005.6, 0), (2, 103, 2.5, 0)], CHIPS)
    assert readable(rows).splitlines() == [
        "io_group  chip_id   rate",
        "       1       11  10006",
        "       2      103    2.5",
    ]
    rows["seen_bad_parity"][1] = 7
    assert readable(rows).splitlines()[0].endswith("seen_bad_parity")
    assert readable(rows[:0]) == "no rows of io_group, chip_id, rate, seen_bad_parity"


def test_a_long_table_shows_its_ends():
    rows = np.zeros(1000, CHIPS)
    rows["rate"] = np.arange(1000)
    lines = readable(rows).splitlines()
    assert len(lines) == 1 + MAX_SHOWN + 1
    assert lines[1 + MAX_SHOWN // 2] == f"... {1000 - MAX_SHOWN} more ..."
    assert lines[-1].split() == ["0", "999"]


def test_a_dict_is_a_line_per_entry():
    answer = {
        "run": 3,
        "rate": 2_420_000.4,
        "begun": 1795355408.87,
        "files": ["a.h5", "b.h5"],
        "reasons": [],
        "live": {"Log": {"written": 2, "lost": 0}},
        "counts": np.arange(1024),
        "chips": np.array([(1, 11, 5.0, 0)], CHIPS),
    }
    assert readable(answer).splitlines() == [
        "run      3",
        "rate     2420000",
        "begun    2026-11-22 13:50:08 UTC",
        "files    a.h5",
        "         b.h5",
        "reasons  -",
        "live     Log  written 2, lost 0",
        "counts   [   0    1    2 ... 1021 1022 1023]",
        "chips    (1)",
        "    io_group  chip_id  rate",
        "           1       11     5",
    ]


def test_lists_of_dicts():
    assert readable([{"name": "hello", "params": ["a", "b"]}, {"name": "x", "params": []}]).splitlines() == [
        "name   params",
        "hello  a, b",
        "x      -",
    ]
    nested = readable([{"name": "Log", "status": {"lost": 0}}, {"name": "Core", "status": {}}])
    assert nested == "name    Log\nstatus  lost 0\n\nname    Core\nstatus  -"


def test_control_characters_reach_no_terminal():
    answer = {"comment": "red \x1b[31m", "reasons": ["\x9b2J", "\u202ea"], "rows": [{"name": "\r\udcff"}]}
    shown = readable(answer)
    assert all(line.isprintable() for line in shown.splitlines())
    assert "red \\x1b[31m" in shown


def test_tables_in_a_list_of_dicts_stay_tables():
    board = {"io_group": 1, "supplies": [{"tile": 0, "vdda_mv": 1792.0}, {"tile": 2, "vdda_mv": 1800.0}]}
    assert readable([board]).splitlines() == [
        "io_group  1",
        "supplies  (2)",
        "    tile  vdda_mv",
        "       0     1792",
        "       2     1800",
    ]


def test_plain_values_stay_unchanged():
    assert readable("STOP") == "STOP"
    assert readable(None) == "-"
    assert readable([]) == "-"


def test_a_request_gives_its_result_as_text():
    request = Request("state", lambda: 0.0)
    request.take(Response("result", value={"by": "me@daq", "since": 1795355408.0}))
    assert request.readable(1) == "by     me@daq\nsince  2026-11-22 13:50:08 UTC"


def component(name, kind, info, facts, alive=True):
    return {"name": name, "kind": kind, "alive": alive, "stuck": False, "info": info, "status": facts}


BOARD = producer_status(run=4, packets=120, unknown=3, ring=0.25, owed_blocks=2, finished=True)
IDLE = msgspec.to_builtins(MonitorStatus(run=None, rate=0.0, packets=0, bad_parity=0, skipped_rows=0, seen=1.0))
RUN = {"run": 4, "kind": "physics", "begun": 1795355408.0, "comment": "cosmics", "missing": ["Offline storage"]}


def test_status_as_text():
    found = {
        "state": "RUN",
        "run": RUN,
        "busy": None,
        "last_run": {"run": 3, "condition": "INCOMPLETE", "stored": 9, "files": ["/data/a.h5"], "reasons": ["block 7"]},
        "control": {"by": "me@daq", "since": 1795355408.0},
        "insecure": True,
        "components": [
            component("LArPix board", "producer", {"source": "PACMAN io_group 1"}, BOARD),
            component("Offline storage", "storage", {"directory": "/data"}, {}, alive=False),
            component("Online monitor", "run_data", {}, IDLE),
        ],
    }
    assert display.status_lines(found) == [
        "state RUN, run 4 (physics), since 2026-11-22 13:50:08 UTC: cosmics",
        "MISSING in this run: Offline storage",
        "control: me@daq, since 2026-11-22 13:50:08 UTC",
        "last run: 3 INCOMPLETE, 9 rows stored, /data/a.h5; block 7",
        "INSECURE: no keys are in use: anybody who can connect to the core can control the detector",
        "LArPix board     alive  PACMAN io_group 1; 120 packets of the run; 3 unknown words; "
        "2 blocks pending (ring 25% full); source finished",
        "Offline storage  LOST   /data",
        "Online monitor   alive  no run yet",
    ]


def test_packets_after_a_run_are_shown_with_its_number():
    after = BOARD | {"run": None, "counted_run": 4, "outside_run": 7, "unknown": 0, "owed_blocks": 0, "finished": False}
    before = after | {"counted_run": None, "packets": 0}
    found = {
        "state": "STOP",
        "components": [component("A", "producer", {"source": "x"}, one) for one in (after, before)],
    }
    assert display.status_lines(found)[1:] == [
        "A  alive  x; 120 packets of run 4; 7 packets outside of runs",
        "A  alive  x; 7 packets outside of runs",
    ]


def test_what_a_producer_has_at_the_brokers():
    def status(**uplink):
        found = BOARD | {"run": None, "unknown": 0, "owed_blocks": 0, "finished": False, "uplink": uplink}
        return {"state": "STOP", "components": [component("A", "producer", {"source": "x"}, found)]}

    counts = {"messages": 15, "in_flight": 2}
    counts |= {"bytes": 2_000_000, "acknowledged_messages": 10, "acknowledged_bytes": 1_500_000}
    good = status(connected=True, fill=0.25, **counts)
    assert display.status_lines(good)[1].endswith("; 10 messages (1.5 MB) at the brokers; their stream 25% full")
    assert not display.needs_attention(good)
    bad = status(problem="no broker: a:4222: connection refused", lost_messages=3, **counts)
    assert display.status_lines(bad)[1].endswith(
        "; 10 messages (1.5 MB) at the brokers; NOT PUBLISHING: no broker: a:4222: connection refused; "
        "3 messages lost by the brokers"
    )
    assert display.needs_attention(bad)


def test_an_unknown_number_of_stored_rows_is_called_unknown():
    last = {"run": 3, "condition": "INTERRUPTED", "stored": None, "files": [], "reasons": ["disk: has not reported"]}
    assert display.status_lines({"state": "STOP", "last_run": last, "components": []})[1] == (
        "last run: 3 INTERRUPTED, number of rows stored unknown; disk: has not reported"
    )


def test_the_demo_shows_texts_as_they_are(capsys):
    missing = 'no picture of the rates: it needs pip install "larpix-daq[plot]"'
    outcome = {
        "io_groups": {1: {"sent": 5, "stored": 5}}, "packets_per_second": 5, "seconds": 1.0, "lost": 0, "run": 1,
        "condition": "COMPLETE", "verified": True, "reasons": [], "files": ["/data [1]/12:on:30.h5"],
    }  # fmt: skip
    demo._show(outcome, system.plain_console())
    assert capsys.readouterr().out.endswith("file: /data [1]/12:on:30.h5\n")
    calibration = {
        "seconds": 9.0, "within": 5, "live": 6, "low_hz": 2.0, "high_hz": 20.0, "registers": 256, "registers_ok": True,
        "hot_found": 1, "hot_planted": 1, "dead_found": 1, "dead_planted": 1, "disabled": 1, "saturated_after": [],
        "report": ["/data [1]/a.json"], "no_picture": missing, "truth": "/data [1]/truth.json",
    }  # fmt: skip
    demo._show(outcome | {"calibration": calibration}, system.plain_console())
    assert f"report: /data [1]/a.json\n{missing}\n" in capsys.readouterr().out


FULL = storage_status(
    files=["run0000004_x_001.h5.part"], rows=5, bytes=1500, free_bytes=13_000_000_000,
    paused="no space left on /data", seconds_left=720, bytes_per_second=18_000_000,
    finished=[{"run": 4, "file": "/d/run0000004_x_000.h5", "bytes": 2500, "sha256": "", "condition": "CONTINUED"}],
)  # fmt: skip


FAILING = {"on_close": "--on-close: copy a.h5: ended with status 1: no such host", "on_close_failed": 2}


def test_a_supervisor_in_the_status():
    def supervisor(state):
        process = SupervisedProcess("north", "producer", None, state, 0.0, 3, "ended with status 1", "no such board")
        status = SupervisorStatus([process, SupervisedProcess("core", "core", 7, "running")])
        return {"run": None, "state": "STOP", "components": [
            component("Supervisor", "supervisor", {}, msgspec.to_builtins(status))]}  # fmt: skip

    last = "Supervisor  alive  {} of 2 processes running; north was started again 3 times, last: it ended with status 1"
    assert display.status_lines(supervisor("running")) == ["state STOP", last.format(2)]
    assert not display.needs_attention(supervisor("running"))
    assert display.status_lines(supervisor("given up")) == [
        "state STOP",
        "GIVEN UP: north: ended with status 1: no such board; `larpixdaq up` tries again",
        last.format(1),
    ]
    assert display.needs_attention(supervisor("given up"))
    assert display.needs_attention(supervisor("waiting"))


@pytest.mark.parametrize(
    ("run", "change", "wrong"),
    [
        (None, {}, False),
        ({"missing": []}, {"status": storage_status()}, False),
        ({"missing": ["Offline storage"]}, {}, True),
        (None, {"alive": False}, True),
        (None, {"status": storage_status(paused="no space left on /data")}, True),
        (None, {"status": storage_status(rows="nonsense")}, True),
    ],
    ids=["no run", "well", "missing", "lost", "paused", "not understood"],
)
def test_components_that_need_attention(run, change, wrong):
    components = [component("Log", "log", {}, {}), component("Offline storage", "storage", {}, {}) | change]
    assert display.needs_attention({"run": run, "components": components}) is wrong


def test_status_exits_with_1_when_something_needs_attention(running, capsys):
    status = ["status", "--core", running.address]
    with storage(running.address).running() as store:
        assert (main(status), main([*status, "--json"])) == (0, 0)
        store.status = storage_status(paused="no space left on /data")
        until(lambda: main(status) == 1, "the pause to be seen")
        assert "PAUSED: Offline storage" in capsys.readouterr().out
        assert main([*status, "--json"]) == 1


def test_alarms_in_the_status():
    spooling = BOARD | {"spooled_blocks": 7, "spooled_bytes": 3_400_000, "inherited": 5, "finished": False}
    found = {
        "state": "STOP",
        "run": None,
        "components": [
            component("Offline storage", "storage", {"directory": "/data"}, FULL | FAILING),
            component("Old storage", "storage", {"directory": "/data"}, FULL, alive=False),
            component("LArPix board", "producer", {"source": "x"}, spooling),
        ],
    }
    shown = display.status_lines(found)
    assert shown[1:4] == [
        "PAUSED: Offline storage is not writing: no space left on /data",
        "DISK NEARLY FULL: Offline storage: disk full in 12 min at 18 MB/s",
        "COMMAND FAILED: Offline storage: --on-close: copy a.h5: ended with status 1: no such host",
    ]
    assert shown[4] == (
        "Offline storage  alive  /data; 13 GB free; PAUSED; disk full in 12 min at 18 MB/s; "
        "writing run0000004_x_001.h5.part: 5 rows, 1.5 kB; last closed: run0000004_x_000.h5, 2.5 kB, CONTINUED; "
        "--on-close or --raw failed for 2 files"
    )
    assert shown[6].endswith(
        "2 blocks pending (ring 25% full); 7 of them in the spool (3.4 MB); 5 blocks of its predecessor pending"
    )


def test_limits_and_the_audit_in_the_status():
    reached = {"peer": "observer 'x'", "limit": "64 open connections", "count": 7, "last": time.time()}
    old = {**reached, "last": time.time() - 86400}
    board = component("board", "producer", {}, producer_status(limits=[reached, old]))
    log = component("Log", "log", {}, {"limits": [reached], "held_back": 3})
    status = {"state": "STOP", "components": [board, log], "limits": [reached]}
    status["audit"] = {"lost": 5, "waiting": 2000, "error": "disk is full"}
    lines = display.status_lines(status)
    for where in ("core", "board", "Log"):
        begins = f"LIMIT at {where}: observer 'x': 64 open connections, 7 times"
        assert sum(one.startswith(begins) for one in lines) == 1
    assert "AUDIT: 5 rows lost, 2000 wait: disk is full" in lines
    assert lines[-1].endswith("3 lines held back")
    assert not any("AUDIT" in line for line in display.status_lines(status | {"audit": {"lost": 0, "error": ""}}))


def test_durations():
    assert [units.duration(seconds) for seconds in (0, 59.4, 60, 719, 5999, 6000, 12_000, 200_000)] == [
        "0 s",
        "59 s",
        "1 min",
        "11 min",
        "99 min",
        "1 h 40 min",
        "3 h 20 min",
        "2 days",
    ]
    assert disk_watch.time_to_full(msgspec.convert(storage_status(), StorageStatus)) == ""


def test_a_status_of_another_form():
    stranger = component("other", "producer", {}, {"packets": "five"})
    assert display.status_lines({"state": "STOP", "run": None, "components": [stranger]}) == [
        "state STOP",
        "other  alive  packets five",
    ]


def test_a_status_without_some_fields_raises_its_alarms():
    """Of a component of another version."""
    older = {"paused": "no space left on /data", "a later field": 1}
    facts = {"state": "STOP", "run": None, "components": [component("disk", "storage", {}, older)]}
    assert display.needs_attention(facts)
    assert "PAUSED" in display.status_lines(facts)[1]


def test_sizes():
    assert [units.size(count) for count in (0, 512, 25139, 77.3e9, 5e15)] == [
        "0 B",
        "512 B",
        "25.1 kB",
        "77.3 GB",
        "5000 TB",
    ]
