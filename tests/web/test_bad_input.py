"""Whatever comes from outside: hosts, origins, paths, bodies, cookies, tokens, frames, and texts with scripts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import string
from collections.abc import Iterator
from typing import Any

import pytest
from example_counts import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import until
from system import System
from web_viewer import Viewer, launch_web, link_of
from websockets.exceptions import ConnectionClosed

from larpixdaq.operator import Operator
from larpixdaq.web.connections import Guard
from larpixdaq.web.links import private_file

_SAME_SERVER = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
SCRIPT = "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(1)>\x1b[31m\x00'\"`${1}"


@pytest.fixture(scope="module")
def operator(line: System) -> Operator:
    return line.start("--fake", "1000")


@pytest.fixture(scope="module")
def viewer(line: System, operator: Operator) -> Viewer:
    viewer = Viewer(link_of(launch_web(line)))
    assert viewer.log_in()[0] == 200
    until(lambda: viewer.request("GET", "/api/runs")[0] == 200, "the catalogue")
    return viewer


def guard_answer(host: list[str], origin: list[str], kind: str, method: str, any_address: bool = False) -> int:
    """Return the status with which the guard of a server at loopback answers; 200: it lets the request through."""
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        statuses.append(200)

    async def send(message: Any) -> None:
        if "status" in message:
            statuses.append(message["status"])

    async def receive() -> Any:
        raise AssertionError

    headers = [(b"host", text.encode("latin-1", "replace")) for text in host]
    headers += [(b"origin", text.encode("latin-1", "replace")) for text in origin]
    scope = {"type": kind, "method": method, "path": "/", "headers": headers, "query_string": b"", "extensions": {
        "websocket.http.response": {}}}  # fmt: skip
    guard = Guard(app, frozenset({"localhost", "127.0.0.1", "::1"}), any_address)
    asyncio.run(guard(scope, receive, send))
    assert len(statuses) == 1
    return statuses[0]


_KINDS = st.sampled_from([("http", "GET"), ("http", "POST"), ("websocket", "")])
_HOSTS = st.text(string.printable + "äß\u212a", max_size=40) | st.sampled_from(
    ["localhost.evil.example", "127.0.0.1@evil.example", "evil.example#127.0.0.1", "localhost, evil.example", "",
     "[::1", "localhost:99999999", "127.1", "0x7f000001", "LOCALHOST\u212a", "[::ffff:127.0.0.1]"]
)  # fmt: skip


@given(_HOSTS, _KINDS)
def test_no_other_host_is_served(host: str, kind: tuple[str, str]) -> None:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name.strip("[]").lower().rstrip(".") not in ("localhost", "127.0.0.1", "::1"):
        assert guard_answer([host], [f"http://{host}"], *kind) == 403
    assert guard_answer([host, host], [f"http://{host}"], *kind) == 403
    assert guard_answer([], [f"http://{host}"], *kind) == 403


@pytest.mark.parametrize("kind", [("http", "GET"), ("http", "POST"), ("websocket", "")])
def test_any_ip_address_where_all_are_listened_at(kind: tuple[str, str]) -> None:
    for host in ("10.1.2.3:5580", "[fe80::1]:5580", "192.0.2.1", "localhost:9000"):
        assert guard_answer([host], [f"http://{host}"], *kind, any_address=True) == 200
        assert guard_answer([host], ["http://evil.example"], *kind, any_address=True) == 403
    for host in ("evil.example", "10.1.2.3.evil.example", "010.1.2.3", "10.1.2.3.4", ""):
        assert guard_answer([host], [f"http://{host}"], *kind, any_address=True) == 403


@given(_HOSTS, st.sampled_from(["http", "https", "ws", "file", ""]), _KINDS)
def test_no_other_origin_is_served(host: str, scheme: str, kind: tuple[str, str]) -> None:
    if host.lower() != "localhost:5580":
        assert guard_answer(["localhost:5580"], [f"{scheme}://{host}"], *kind) == 403
    same = "http://localhost:5580"
    assert guard_answer(["localhost:5580"], [same, f"{scheme}://{host}"], *kind) == 403
    assert guard_answer(["localhost:5580"], [same], *kind) == 200
    assert guard_answer(["localhost:5580"], [], *kind) == (200 if kind == ("http", "GET") else 403)


def raw(viewer: Viewer, data: bytes) -> bytes:
    """Send bytes over a connection of their own, and return the beginning of the answer."""
    with socket.create_connection((viewer.host, viewer.port), 10) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        with contextlib.suppress(OSError):  # the server may have closed it already
            connection.shutdown(socket.SHUT_WR)
        return connection.recv(4096)
    return b""


_LONG = b"(70,000 letters)"  # a line of them would be more than hypothesis likes to print
_LINES = st.lists(
    st.sampled_from(
        [b"GET / HTTP/1.1", b"GET /live HTTP/1.1", b"POST /login HTTP/1.1", b"GET /%2e%2e/%00 HTTP/1.1",
         b"PRI * HTTP/2.0",
         b"Host: 127.0.0.1", b"Host: evil", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
         b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", b"Transfer-Encoding: chunked", b"Content-Length: 99999999999",
         b"Content-Length: -1", b"Cookie: larpixdaq-1=\xff", b"Origin: http://127.0.0.1", b"Expect: 100-continue", b"",
         b"0", _LONG, b"{}"]
    )
    | st.binary(max_size=40),
    max_size=12,
)  # fmt: skip


@given(_LINES)
@_SAME_SERVER
def test_any_bytes_as_a_request(viewer: Viewer, lines: list[bytes]) -> None:
    answer = raw(viewer, b"\r\n".join(b"x" * 70_000 if line == _LONG else line for line in lines) + b"\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.")
    assert not answer.startswith(b"HTTP/1.1 5"), answer
    assert viewer.request("GET", "/healthz")[0] == 200


@given(
    st.text(max_size=60) | st.sampled_from(["../../etc/passwd", "..%2f..%2f__init__.py", "%00", "static/../server.py"])
)
@_SAME_SERVER
def test_any_path(viewer: Viewer, path: str) -> None:
    quoted = "".join(
        c if c.isascii() and c.isprintable() and c not in " \x7f" else f"%{ord(c) & 255:02x}" for c in path
    )
    for folder in ("", "static/", "bokeh/", "api/", "api/runs/", "api/runs/1/attachments/"):
        status, headers, body = viewer.request("GET", f"/{folder}{quoted}")
        assert status in (200, 307, 400, 404, 405, 429), (folder, quoted, status, body)
        assert "content-security-policy" in headers
        if status != 200:
            assert b"\n" not in body
        assert b"larpixdaq.web" not in body


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: json.dumps({"token": text}).encode()))
@_SAME_SERVER
def test_any_body_and_cookie(viewer: Viewer, body: bytes) -> None:
    status, _, answer = viewer.request("POST", "/login", body, {"Cookie": f"larpixdaq-{viewer.port}={body.hex()}"})
    assert status in (400, 429), answer
    json.loads(answer)
    assert viewer.request("GET", "/api/session", headers={"Cookie": f"larpixdaq-{viewer.port}={body.hex()}"})[0] == 401


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
_FRAMES = (
    st.text(max_size=50)
    | _JSON.map(json.dumps)
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["request", "watch", "snapshot", ""])},
        optional={
            "id": st.text(max_size=70) | _JSON,
            "action": st.sampled_from(["state", "comment", "run_info", "", "x" * 65]) | _JSON,
            "params": st.dictionaries(st.sampled_from(["run", "text", "x"]), _JSON, max_size=3) | _JSON,
            "component": st.text(max_size=70), "kind": st.sampled_from(["", "producer", "run_data", "x"]),
            "pixels": st.sampled_from([None, "rate", "x"]), "histogram": _JSON, "packets": _JSON,
        },
    ).map(json.dumps)
)  # fmt: skip


@given(st.lists(_FRAMES, max_size=8))
@_SAME_SERVER
def test_any_frames(viewer: Viewer, frames: list[str]) -> None:
    with viewer.live() as page:
        for frame in frames:
            page.send(frame)
        assert page.ask("state")["value"] == "STOP"
        page.watch(pixels=None)


@given(st.binary(max_size=60))
@_SAME_SERVER
def test_any_bytes_after_the_handshake(viewer: Viewer, data: bytes) -> None:
    with viewer.live() as page, contextlib.suppress(ConnectionClosed, OSError):
        page.socket.socket.sendall(data)
        page.take(0.05)
    assert viewer.get("/api/session")["role"] == "operator"


_WRONG = st.none() | st.integers() | st.text(max_size=20) | st.lists(st.integers(), max_size=2)


@given(
    st.sampled_from(["save_snapshot", "load_snapshot", "compare_snapshot"]),
    st.dictionaries(
        st.sampled_from(["name", "snapshot", "other", "skip_missing", "data", "content"]), _WRONG, max_size=3
    ),
)
@_SAME_SERVER
def test_any_parameters_for_snapshots(viewer: Viewer, action: str, params: dict[str, Any]) -> None:
    with viewer.live() as page:
        answer = page.ask(action, params)
        assert answer["kind"] == "error"
        assert answer["text"].count("\n") == 0
        assert answer["error"] in ("RequestError", "NotAllowed", "NoComponent", "ProtocolError"), answer


def test_deep_and_large_frames(viewer: Viewer) -> None:
    with viewer.live() as page:
        page.send('{"type":"request","id":"deep","action":"state","params":' + "[" * 20_000 + "]" * 20_000 + "}")
        page.send('{"type":"request","id":"nested","action":"state","params":' + '{"a":' * 100 + "1" + "}" * 101)
        page.send(json.dumps({"type": "request", "id": "long", "action": "comment", "params": {"text": "x" * 60_000}}))
        page.until(lambda: page.responses.get("long", [{}])[-1].get("kind") == "error", "the refusal of a long comment")
        page.until(lambda: "nested" in page.responses, "an answer")
        page.socket.send(b"\x00\x01")
        assert page.closed() == 1003


def test_scripts_in_texts_stay_texts(viewer: Viewer, operator: Operator) -> None:
    shown = SCRIPT.replace("\x00", "")
    operator.prepare_run(comment=shown, kind="<b>kind</b>").result(20)
    with viewer.live() as page:
        page.until(lambda: (page.state["status"] or {}).get("run"), "the run")
        assert page.state["status"]["run"]["comment"] == shown
        run = page.state["status"]["run"]["run"]
        assert page.ask("comment", {"text": shown, "by": "<i>anna</i>"})["kind"] == "result"
        assert page.ask(shown, {})["kind"] == "error"
        assert page.ask("state", {}, component=shown[:40])["kind"] == "error"
    operator.abort_run().result(20)
    assert viewer.get(f"/api/runs/{run}")["comments"][-1]["text"] == shown
    for path in (f"/api/runs/{run}", "/api/runs?search=script"):
        _, headers, body = viewer.request("GET", path)
        assert headers["content-type"] == "application/json"
        assert headers["x-content-type-options"] == "nosniff"
        assert shown in json.dumps(json.loads(body), ensure_ascii=False).replace("\\u001b", "\x1b").replace('\\"', '"')


def test_log_ins_are_limited(line: System, operator: Operator) -> None:
    web = launch_web(line, key="other")
    viewer = Viewer(link_of(web))
    statuses = [viewer.log_in("x")[0] for _ in range(60)]
    assert {400, 429} == set(statuses)
    assert statuses[0] == 400
    body = json.dumps({"token": "x" * 20_000}).encode()
    until(lambda: viewer.request("POST", "/login", body)[0] == 413, "the refusal of a long body")
    assert viewer.request("POST", "/login", b"{}", {"Content-Type": "text/plain"})[0] in (415, 429)
    web.stop()


def test_idle_connections_keep_nobody_out(line: System, operator: Operator) -> None:
    web = launch_web(line, key="other")
    viewer = Viewer(link_of(web))
    with contextlib.ExitStack() as stack:
        for _ in range(700):
            connection = stack.enter_context(contextlib.closing(socket.socket()))
            connection.connect((viewer.host, viewer.port))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1")
        assert viewer.request("GET", "/healthz")[0] == 200
        assert viewer.log_in()[0] == 200
    web.stop()


def test_private_files_of_others_are_refused(line: System, operator: Operator) -> None:
    web = launch_web(line, key="other")
    viewer = Viewer(link_of(web))
    assert viewer.log_in()[0] == 200
    web.stop()
    sessions = private_file(viewer.port, "sessions")
    assert sessions.stat().st_mode & 0o777 == 0o600
    content = sessions.read_bytes()
    for damage, what in (
        (lambda: sessions.write_bytes(content[:-9]), "expected sessions"),
        (lambda: sessions.write_bytes(b""), "expected sessions"),
        (lambda: sessions.write_bytes(content.replace(b'"version":1', b'"version":7')), "found 7"),
        (lambda: os.chmod(sessions, 0o644), "mode 600"),
    ):
        damage()
        refused = line.launch_refused("web", "--core", line.core, "--address", f"127.0.0.1:{viewer.port}")
        assert refused.wait() == 1
        assert what in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert str(sessions) in refused.stderr
        sessions.unlink()
        sessions.write_bytes(content)
        sessions.chmod(0o600)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--address", "nowhere.invalid"), "cannot listen at nowhere.invalid"),
        (("--address", "127.0.0.1:99999"), "port 99999"),
        (("--address", "http://x/y"), "address"),
        (("--insecure", "--address", "0.0.0.0:0"), "not with --insecure"),
        (("--url", "javascript:alert(1)"), "expected http://HOST"),
        (("--trusted-proxy", "127.0.0.1"), "go together"),
        (("--trusted-proxy", "x", "--trusted-header", "X-User"), "expected an IP address"),
        (("--proxy-operator", "anna"), "goes with --trusted-proxy"),
    ],
)
def test_options_that_cannot_work(line: System, options: tuple[str, ...], text: str) -> None:
    process = line.launch_refused("web", *options)
    assert process.wait() == (1 if "cannot listen" in text else 2)
    assert text in process.stderr
    assert process.stderr.count("\n") == 1


def test_the_port_is_in_use(line: System, viewer: Viewer) -> None:
    process = line.launch_refused("web", "--core", line.core, "--address", f"127.0.0.1:{viewer.port}")
    assert process.wait() == 1
    assert f"port {viewer.port}: Address already in use" in process.stderr


@pytest.fixture(autouse=True)
def _nothing_is_wrong(line: System) -> Iterator[None]:
    yield
    web = line.processes.get("web")
    assert web is None or (web.popen.poll() is None and "Traceback" not in web.stderr), web.stderr
