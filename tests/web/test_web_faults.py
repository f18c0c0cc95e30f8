"""The live state while components, boards, the monitor and the core come and go, and viewers that take nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from emulated_board import Emulator
from processes import LIMIT, in_thread, until
from system import System, system
from web_viewer import CORE_GONE, LivePage, Viewer, is_open, launch_web, link_of, patched_web, read_array

from larpixdaq.constants import PRODUCER, RUN_DATA
from larpixdaq.control.node import Call, Node
from larpixdaq.protocol.reports import ProducerStatus


@pytest.fixture
def line(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as line:
        line.launch_core()
        yield line


def viewer_of(line: System) -> Viewer:
    viewer = Viewer(link_of(launch_web(line)))
    status, answer = viewer.log_in()
    assert status == 200, answer
    return viewer


def component(page: LivePage, kind: str) -> dict[str, object]:
    found = [one for one in (page.state["status"] or {}).get("components", []) if one["kind"] == kind]
    return found[0] if found else {"alive": False}


def test_boards_and_components_that_go(line: System) -> None:
    with contextlib.closing(Emulator("--rate", "2000", "--io-groups", "1")) as board:
        operator = line.start("--pacman", *board.addresses)
        viewer = viewer_of(line)
        operator.prepare_run().result(LIMIT)
        operator.begin_run().result(LIMIT)
        with viewer.live() as page:
            page.until(lambda: component(page, "producer").get("status"), "the producer's status")
            page.until(lambda: component(page, "run_data")["alive"], "the monitor")
            board.stop(signal.SIGKILL)

            def away() -> bool:
                boards = component(page, "producer")["status"]["boards"]  # type: ignore[index]
                return bool(boards and boards[0]["away_since"])

            page.until(away, "the board's loss in the status")
            opened = page.until(
                lambda: [one for one in page.state["alarms"] if one["condition"] == "board-disconnected"], "an alarm"
            )
            done = page.ask("acknowledge_alarm", {"alarm": opened[0]["id"], "comment": "<script>alert(1)</script>"})
            assert done["kind"] == "result"
            page.until(
                lambda: any(one["comment"] == "<script>alert(1)</script>" for one in page.state["alarms"]),
                "the acknowledgement",
            )
            line.processes["run_data"].kill()
            page.until(lambda: not component(page, "run_data")["alive"], "the loss of the monitor")
            page.until(lambda: page.state["monitor"] is None, "a state without monitor")
            page.until(lambda: "no online monitor is alive" in page.state["monitor_problem"], "the reason")
            line.restart("run_data")
            page.until(lambda: page.state["monitor"] is not None, "the monitor again")
            assert page.state["monitor_problem"] == ""


def test_a_core_that_is_gone_and_back(line: System) -> None:
    line.start("--fake", "1000")
    viewer = viewer_of(line)
    with viewer.live() as page:
        page.until(lambda: page.state["status"], "the status")
        line.processes["core"].kill()
        page.until(lambda: not page.state["core"]["connected"], "the loss of the core")
        asked = page.request("state")
        page.until(lambda: page.responses.get(asked), "word of the core")
        word = page.responses[asked][0]
        assert word["error"] == "NoCore" or "the core was not heard" in word["text"], word
        assert viewer.request("GET", "/healthz")[2] == b'{"ok":true,"core":false}'
        line.restart("core")
        page.until(lambda: page.state["core"]["connected"], "the core again")
        page.until(lambda: page.ask("state")["value"] == "STOP", "the core in STOP")
    line.processes["core"].kill()
    line.processes["web"].stop()
    again = line.launch("web", "--core", line.core, "--address", f"127.0.0.1:{viewer.port}", key="web")
    until(lambda: "\n" in again.stdout, "the link of the web server")
    # A session whose key cannot be checked shows nothing, because it may have been revoked.
    with viewer.socket() as raw:
        assert LivePage(raw).closed() == CORE_GONE
    assert viewer.request("GET", "/api/session")[0] == 503
    line.restart("core")
    until(lambda: viewer.request("GET", "/api/session")[0] == 200, "the session with the core")


def test_requests_wait_for_a_core_that_is_silent_for_a_while(line: System) -> None:
    line.start("--fake", "1000")
    with viewer_of(line).live() as page:
        assert page.ask("state")["value"] == "STOP"
        line.processes["core"].popen.send_signal(signal.SIGSTOP)
        asked = page.request("state")
        page.until(lambda: page.responses.get(asked), "word of the core")
        word = page.responses[asked][0]
        assert (word["kind"], "the core was not heard for 2 s" in word["text"]) == ("progress", True), word
        line.processes["core"].popen.send_signal(signal.SIGCONT)
        assert page.last(asked)["value"] == "STOP"


def test_a_monitor_of_another_version(line: System) -> None:
    node = Node("Old monitor", RUN_DATA, line.core, {}, info={})
    node.start()
    try:
        viewer = viewer_of(line)
        with viewer.live() as page:
            page.watch(pixels="rate", histogram={})
            page.until(lambda: "another version" in page.state["monitor_problem"], "the reason")
            assert page.state["monitor"] is None
            page.until(lambda: page.state["status"], "the status")
    finally:
        node.close()


def test_a_pixel_layout(line: System) -> None:
    """A layout that is loaded while a page is open; its positions come over HTTP."""
    summary = {"name": "tile", "pitch": 4.4, "pixels": 3, "chips": 2, "tiles": 1, "x": [0, 1], "y": [0, 1]}
    positions = {
        "1-1-11": {"x": [0.0, None], "y": [1.0, None], "z": 0.0, "tile": 1},
        "1-1-12": {"x": [0.5, 1.0], "y": [0.0, 0.25], "z": 0.0, "tile": 1},
    }
    status = ProducerStatus()
    asked: list[bool] = []

    def retrieve_pixel_layout(call: Call) -> dict[str, object]:
        asked.append(True)
        return {**summary, "channels": positions}

    def load_pixel_layout(call: Call, name: str) -> dict[str, object]:
        status.pixel_layout = {**summary, "loaded": len(asked)}
        return summary

    actions = {"retrieve_pixel_layout": retrieve_pixel_layout, "load_pixel_layout": load_pixel_layout}
    board = Node("board", PRODUCER, line.core, actions, info={}, status=lambda: status)
    with component_loop(board):
        viewer = viewer_of(line)
        with viewer.live() as page:
            page.until(lambda: page.state["actions"] and "board" in page.state["actions"], "the actions")
            assert page.state["layout"] is None
            answer, _, body = viewer.request("GET", "/api/layout")
            assert (answer, "no pixel layout" in json.loads(body)["error"]) == (400, True)
            assert page.ask("load_pixel_layout", {"name": "tile"}, kind=PRODUCER)["kind"] == "result"
            page.until(lambda: page.state["layout"], "the layout")
            assert page.state["layout"] == {**summary, "loaded": 0}
            for _ in range(3):
                answer, _, frame = viewer.request("GET", "/api/layout")
            assert asked == [True]
            page.ask("load_pixel_layout", {"name": "tile"}, kind=PRODUCER)
            page.until(lambda: page.state["layout"]["loaded"] == 1, "the layout again")
            viewer.request("GET", "/api/layout")
            assert asked == [True, True]
        header, places = read_array(frame)
        assert (answer, header["chips"], header["tiles_of"]) == (200, ["1-1-11", "1-1-12"], [1, 1])
        assert np.array_equal(places, [[[0, 1], [np.nan] * 2], [[0.5, 0], [1, 0.25]]], equal_nan=True)


@contextlib.contextmanager
def component_loop(node: Node) -> Iterator[None]:
    """Let a component answer in a thread while the context lasts."""
    ended = threading.Event()
    node.start()

    def answer() -> None:
        while not ended.wait(0.01):
            node.dispatch()
            node.report(0, 0)
        node.close()

    with in_thread(answer, ended.set):
        yield


def test_a_viewer_who_takes_nothing_holds_up_nobody(line: System) -> None:
    line.start("--fake", "200000")
    viewer = viewer_of(line)
    with viewer.live() as page:
        page.until(lambda: page.state["actions"], "the actions")
        page.ask("prepare_run")
        page.ask("begin_run")
        with contextlib.closing(slow_socket(viewer)):
            times = []
            for _ in range(20):
                sequence = page.sequence
                page.until(lambda n=sequence: page.sequence > n, "a delta", limit=5)  # type: ignore[misc]
                times.append(time.monotonic())
            assert max(later - earlier for earlier, later in pairwise(times)) < 5


@pytest.mark.parametrize("how", ["too slow", "revoked"])
def test_a_viewer_who_takes_nothing_is_cut_off(line: System, how: str) -> None:
    operator = line.start("--fake", "1000")
    with patched_web(line, open_page__SLOW=0.5 if how == "too slow" else 1000) as web:
        viewer = Viewer(link_of(web))
        assert viewer.log_in()[0] == 200
        name = viewer.get("/api/session")["name"]
        with contextlib.closing(slow_socket(viewer)) as slow:
            ports = viewer.port, slow.getsockname()[1]
            until(lambda: is_open(*ports), "its connection")
            for number in range(100):
                slow.sendall(masked(json.dumps({"type": "request", "id": str(number), "action": "status"})))
            until(lambda: operator.status().result(LIMIT)["operators"].count(name), "its Operator")
            if how == "revoked":
                operator.revoke(name).result(LIMIT)
            until(lambda: not is_open(*ports), "the end of its connection")
        assert viewer.request("GET", "/api/session")[0] == (401 if how == "revoked" else 200)
        assert web.stderr == ""


def slow_socket(viewer: Viewer) -> socket.socket:
    """Open a websocket from which nothing is read."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((viewer.host, viewer.port))
    slow.sendall(
        f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{viewer.port}\r\nOrigin: {viewer.origin}\r\n"
        f"Cookie: {viewer.cookie}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n".encode()
    )
    return slow


def masked(text: str) -> bytes:
    """Return a text frame of a websocket client, with a mask of zeros."""
    data = text.encode()
    assert len(data) < 126
    return bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data


def test_pages_and_frames_beyond_their_limits(line: System) -> None:
    line.start("--fake", "1000")
    viewer = viewer_of(line)
    with contextlib.ExitStack() as stack, viewer.live() as page:
        others = [stack.enter_context(viewer.socket()) for _ in range(16)]
        assert LivePage(others[-1]).closed() == 4429
        for number in range(300):
            page.send({"type": "request", "id": str(number), "action": "state"})

        def all_answered() -> bool:
            ends = [responses[-1]["kind"] for responses in page.responses.values()]
            return len(ends) == 300 and "ack" not in ends

        page.until(all_answered, "an answer to each request")
        last = [responses[-1] for responses in page.responses.values()]
        assert {one["kind"] for one in last} == {"result", "error"}
        assert {one["error"] for one in last} == {"", "ProtocolError"}
        page.send("x" * (64 << 10))
        page.until(lambda: "" in page.responses, "the refusal of a frame that is no JSON")
        page.send("x" * ((64 << 10) + 1))
        assert page.closed() == 1009


def test_it_ends_at_once_and_says_so(line: System) -> None:
    viewer = viewer_of(line)
    with viewer.live() as page:
        assert line.processes["web"].stop() == 0
        assert page.closed() == 1012
    assert line.processes["web"].stderr == ""
    folder = Path(os.environ["XDG_STATE_HOME"]) / "larpixdaq" / "web"
    assert not list(folder.glob(f"*-{viewer.port}.link.json"))
    sessions = json.loads(next(folder.glob(f"*-{viewer.port}.sessions.json")).read_text())["sessions"]
    assert len(sessions) == 1
    assert viewer.cookie.split("=")[1] not in json.dumps(sessions)
