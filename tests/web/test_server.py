"""The web server with real processes: log-in, the live state, requests, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import LIMIT, until
from system import System
from web_viewer import NOT_LOGGED_IN, LivePage, Viewer, launch_web, link_of, read_array
from websockets.exceptions import InvalidStatus

from larpixdaq.operator import Operator

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


@pytest.fixture(scope="module")
def operator(line: System) -> Operator:
    line.launch_core()
    line.operator()  # waits for the core
    line.launch_log()
    return line.start("--fake", "20000")


@pytest.fixture(scope="module")
def link(line: System, operator: Operator) -> str:
    return link_of(launch_web(line))


@pytest.fixture
def viewer(link: str) -> Iterator[Viewer]:
    viewer = Viewer(link)
    status, answer = viewer.log_in()
    assert status == 200, answer
    yield viewer
    viewer.request("POST", "/logout", b"")


def test_page_files_and_headers(link: str) -> None:
    stranger = Viewer(link)
    for path in ("/", "/login", "/static/favicon.svg", "/favicon.ico", "/healthz", "/bokeh/bokeh.min.js", "/nothing"):
        status, headers, body = stranger.request("GET", path)
        assert status == (404 if path == "/nothing" else 200), path
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cache-control"] in ("no-store", "no-cache")
        assert "server" not in headers
        assert body


def test_who_has_not_logged_in_gets_no_data(link: str) -> None:
    stranger = Viewer(link)
    for path in ("/api/session", "/api/runs", "/api/runs/1", "/api/runs/1/summary", "/api/layout"):
        status, _, body = stranger.request("GET", path)
        assert status == 401, path
        assert "not logged in" in json.loads(body)["error"]
    with stranger.socket() as socket:
        assert LivePage(socket).closed() == NOT_LOGGED_IN
    for token in ("x", "larpixdaq1.5.aaaaa", "é" * 40, stranger.token[:-1]):
        status, answer = stranger.log_in(token)
        assert status == 400
        assert "\n" not in answer["error"]


def test_live_state(viewer: Viewer, operator: Operator) -> None:
    with viewer.live() as page:
        assert page.viewer["role"] == "operator"
        page.until(lambda: page.state["core"]["connected"], "the core")
        page.until(lambda: page.state["status"], "the status")
        assert page.state["status"]["state"] == "STOP"
        kinds = {one["kind"] for one in page.state["status"]["components"]}
        assert {"log", "storage", "run_data", "producer"} <= kinds
        page.until(lambda: page.state["actions"], "the actions")
        assert "prepare_run" in page.state["actions"]["core"]
        page.until(lambda: any("core listens" in one["text"] for one in page.state["log"]), "the log's first records")
        newest = operator.log_records(1).result(LIMIT)["records"]
        assert [set(one) for one in newest] == [{"time", "level", "component", "text"}]
        assert page.ask("prepare_run", {"comment": "from a page"})["value"]["run"] == 1
        page.until(lambda: page.state["status"]["state"] == "READY", "READY in the state")
        assert page.ask("begin_run")["kind"] == "result"
        page.until(lambda: page.state["ledger"]["producers"]["LArPix board"].get("packets"), "packets in the ledger")
        ended = page.ask("end_run")
        assert ended["value"]["condition"] == "COMPLETE"
        kinds = [one["kind"] for one in page.responses["r3"]]
        assert kinds[0] == "ack"
        page.until(lambda: page.state["status"]["state"] == "STOP", "STOP in the state")
        refused = page.ask("begin_run")
        assert (refused["kind"], refused["error"]) == ("error", "StateError")
        assert page.ask("no_such_action")["error"] == "RequestError"


def test_past_runs(viewer: Viewer, operator: Operator) -> None:
    operator.prepare_run(comment="cosmics, <b>threshold</b> 20").result(LIMIT)
    run = operator.begin_run().result(LIMIT)["run"]
    operator.comment("beam is back").result(LIMIT)
    until(lambda: operator.packet_rate(channels=False).result(LIMIT)["packets"] > 1000, "packets")
    operator.end_run().result(LIMIT)
    assert [one["run"] for one in viewer.get("/api/runs?search=threshold+cosm")["runs"]] == [run]
    assert [one["run"] for one in viewer.get(f"/api/runs?search={run}+BEAM")["runs"]] == [run]
    assert viewer.get("/api/runs?search=nothing_has_this") == {"runs": [], "more": False}
    assert viewer.get("/api/runs?search=100%25")["runs"] == []
    listed = viewer.get("/api/runs?limit=1")
    assert [one["run"] for one in listed["runs"]] == [run]
    assert viewer.get(f"/api/runs?before={run}&limit=5")["runs"] == [] or listed["more"]
    facts = viewer.get(f"/api/runs/{run}")
    assert facts["comment"] == "cosmics, <b>threshold</b> 20"
    assert [one["text"] for one in facts["comments"]] == ["beam is back"]
    status, _, body = viewer.request(
        "POST", f"/api/runs/{run}/attachments?name=shift.png&by=anna", b"\x89PNG" * 300_000
    )
    assert (status, json.loads(body)["bytes"]) == (200, 1_200_000)
    status, headers, body = viewer.request("GET", f"/api/runs/{run}/attachments/shift.png")
    assert (status, headers["content-type"], body) == (200, "image/png", b"\x89PNG" * 300_000)
    viewer.request("POST", f"/api/runs/{run}/attachments?name=x.svg", b"<svg onload='alert(1)'/>")
    status, headers, _ = viewer.request("GET", f"/api/runs/{run}/attachments/x.svg")
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"].startswith("attachment;")
    summary = viewer.get(f"/api/runs/{run}/summary")
    assert summary["run"] == run
    assert sum(group["packets"] for group in summary["io_groups"]) > 1000
    status, _, frame = viewer.request("GET", f"/api/runs/{run}/pixels?quantity=mean")
    header, values = read_array(frame)
    assert values.shape == (len(header["chips"]), 64)
    assert 0 < float(np.nanmean(values)) < 256
    for path in (
        "/api/runs?limit=0", "/api/runs?limit=501", "/api/runs?limit=x", "/api/runs?before=-1",
        "/api/runs?search=" + "+".join("abcdefghijkl"), f"/api/runs/{run}/pixels?quantity=x", "/api/runs/99",
        f"/api/runs/{run}/attachments/..%2f..%2fcore.json", f"/api/runs/{run}/attachments/none", "/api/runs/0",
        "/api/runs/" + "9" * 30,
    ):  # fmt: skip
        status, _, body = viewer.request("GET", path)
        assert status in (400, 404), (path, status)
        assert "\n" not in json.loads(body)["error"]


def test_what_the_monitor_sees(viewer: Viewer, operator: Operator) -> None:
    operator.prepare_run().result(LIMIT)
    run = operator.begin_run().result(LIMIT)["run"]
    with viewer.live() as page:
        page.until(lambda: (page.state["monitor"] or {}).get("run") == run, "the run in the monitor's summary")
        page.until(lambda: page.state["monitor"]["rate"] > 10_000, "the rate of the board")
        assert page.state["monitor_problem"] == ""
        page.until(lambda: (page.state["history"]["total"] or [0])[-1] > 10_000, "the rate in the history")
        assert len(page.state["history"]["io_groups"]["1"]) == len(page.state["history"]["times"])
        assert "pixels" not in page.arrays
        page.watch(pixels="packets", histogram={"io_group": 1}, packets={"count": 3, "types": [0]})
        page.until(lambda: "pixels" in page.arrays, "a pixel map")
        header, values = page.arrays["pixels"]
        assert (header["quantity"], header["run"]) == ("packets", run)
        assert values.shape == (len(page.state["chips"]), 64)
        chip, channel = np.unravel_index(values.argmax(), values.shape)
        io_group, io_channel, chip_id = page.state["chips"][chip]
        where = {"io_group": io_group, "io_channel": io_channel, "chip": chip_id, "channel": int(channel)}
        exact = page.ask("pixel", where, kind="run_data")["value"]
        scale = header["scale"]
        shown = scale["low"] * (scale["high"] / scale["low"]) ** ((int(values[chip, channel]) - 1) / 254)
        assert 0 < shown < 1.1 * exact["seen_packets"]
        page.until(lambda: (page.state.get("histogram") or {}).get("entries"), "a histogram")
        assert page.state["histogram"]["of"] == {"io_group": 1, "io_channel": None, "chip": None, "channel": None}
        assert sum(page.state["histogram"]["counts"]) == page.state["histogram"]["entries"]
        page.until(lambda: (page.state.get("packets") or {}).get("rows"), "packets")
        assert len(page.state["packets"]["rows"]) == 3
        assert {row["packet_type"] for row in page.state["packets"]["rows"]} == {0}
        page.watch(pixels="mean_adc")
        page.until(lambda: page.arrays["pixels"][0]["quantity"] == "mean_adc", "the other map")
        page.watch(histogram={"io_group": 1}, packets={"count": 2, "types": [99]})
        page.until(lambda: page.state["packets"]["of"]["types"] == [99], "no packets")
        assert page.state["packets"]["rows"] == []
    operator.end_run().result(LIMIT)


def test_the_audit_names_the_viewer(viewer: Viewer, operator: Operator) -> None:
    names = [one["name"] for one in operator.keys().result(LIMIT)["members"]]
    with viewer.live() as page:
        assert page.viewer["name"] in names
        page.ask("take_control")

        def holder() -> str:
            control = (page.state["status"] or {}).get("control")
            return str(control["by"]) if control else ""

        page.until(lambda: holder() == page.viewer["name"], "control in the state")
        page.ask("release_control")


def test_foreign_origin_and_host_are_refused(viewer: Viewer) -> None:
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{viewer.port + 1}", "file://"):
        with pytest.raises(InvalidStatus) as refused:
            viewer.socket(origin=origin)
        assert refused.value.response.status_code == 403
        status, _, _ = viewer.request("POST", "/logout", b"", {"Origin": origin})
        assert status == 403
        status, _, _ = viewer.request("GET", "/api/session", headers={"Origin": origin})
        assert status == 403
    with pytest.raises(InvalidStatus):
        viewer.socket(origin=None)
    for host in ("evil.example", "127.0.0.1.evil.example", "", "x" * 300, "127.0.0.1:x", "[::1", "10.0.0.1"):
        status, _, body = viewer.request("GET", "/api/session", headers={"Host": host})
        assert status in (400, 403), (host, status, body)
    assert viewer.get("/api/session")["role"] == "operator"


def test_a_revoked_key_ends_the_session(link: str, operator: Operator) -> None:
    viewer = Viewer(link)
    viewer.log_in()
    name = viewer.get("/api/session")["name"]
    with viewer.live() as page:
        operator.revoke(name).result(LIMIT)
        assert page.closed() == NOT_LOGGED_IN
    status, _, _ = viewer.request("GET", "/api/session")
    assert status == 401


def test_an_observer_changes_nothing(link: str, operator: Operator) -> None:
    token = operator.invite("eve", "observer").result(LIMIT)["token"]
    viewer = Viewer(link)
    status, answer = viewer.log_in(token)
    assert (status, answer) == (200, {"name": "eve", "role": "observer"})
    status, answer = viewer.log_in(token)
    assert status == 400
    assert "was used" in answer["error"]
    with viewer.live() as page:
        for action in ("prepare_run", "begin_run", "abort_run", "take_control", "set_log_level", "comment"):
            params = {"set_log_level": {"level": "DEBUG"}, "comment": {"text": "x"}}.get(action, {})
            answer = page.ask(action, params)
            assert answer["error"] == "NotAllowed", action
        assert page.ask("power", {"on": True}, kind="producer")["error"] in ("NotAllowed", "UnknownAction")
        assert page.ask("invite", {"name": "x", "role": "operator"})["error"] == "NotAllowed"
        assert page.ask("state")["value"] == "STOP"
    operator.revoke("eve").result(LIMIT)


def test_sessions_survive_a_restart(line: System, viewer: Viewer, operator: Operator, tmp_path: Path) -> None:
    port = until(lambda: viewer.port, "a port")
    line.processes["web"].stop()
    line.launch("web", "--core", line.core, "--address", f"127.0.0.1:{port}", key="web")
    until(lambda: "\n" in line.processes["web"].stdout, "the link of the web server")
    with viewer.live() as page:
        page.until(lambda: page.state["status"], "the status")
        assert page.viewer["role"] == "operator"
