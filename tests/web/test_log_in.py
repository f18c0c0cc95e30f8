"""Ways to log in: the printed link, links of web-link, a trusted proxy, and a core without keys."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from processes import LIMIT, free_port, until
from system import System, system
from web_viewer import NOT_LOGGED_IN, LivePage, Viewer, launch_web, link_of

from larpixdaq.errors import ConfigError
from larpixdaq.keys.credentials import read_token
from larpixdaq.operator import Operator
from larpixdaq.runtime.launcher import command
from larpixdaq.web import argument_parser, check
from larpixdaq.web.links import private_file
from larpixdaq.web.sessions import SESSION


@pytest.fixture(scope="module")
def operator(line: System) -> Operator:
    line.launch_core()
    return line.operator()


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("cli", *map(str, arguments)), capture_output=True, text=True, timeout=LIMIT, check=False
    )


def test_links_of_web_link(line: System, operator: Operator) -> None:
    web = launch_web(line)
    made = run_cli("web-link", "--core", line.core, "--role", "operator", "--name", "anna")
    assert made.returncode == 0, made.stderr
    link = made.stdout.strip()
    assert "operator 'anna'" in made.stderr
    viewer = Viewer(link)
    assert viewer.origin == Viewer(link_of(web)).origin
    assert viewer.log_in() == (200, {"name": "anna", "role": "operator"})

    def members() -> list[str]:
        return [one["name"] for one in operator.keys().result(LIMIT)["members"]]

    assert members() == ["anna"]
    assert viewer.log_in()[0] == 400  # once
    assert run_cli("web-link", "--core", line.core, "--name", "anna").returncode == 1
    observer = Viewer(run_cli("web-link", "--core", line.core).stdout.strip())
    assert observer.log_in()[1]["role"] == "observer"
    assert observer.request("POST", "/logout", b"")[0] == 200
    until(lambda: members() == ["anna"], "the key to be given back")
    assert observer.request("GET", "/api/session")[0] == 401
    other = run_cli("web-link", "--core", line.core, "--url", "https://daq.example.org/")
    assert other.stdout.startswith("https://daq.example.org/login#larpixdaq1.")
    web.stop()
    assert "no web server" in run_cli("web-link", "--core", line.core).stderr
    assert "expected http" in run_cli("web-link", "--core", line.core, "--url", "daq").stderr


def test_tokens_of_another_kind_or_core(line: System, operator: Operator, tmp_path: Path) -> None:
    viewer = Viewer(link_of(launch_web(line)))
    token = operator.invite("a component", "component").result(LIMIT)["token"]
    status, answer = viewer.log_in(token)
    assert (status, "for the component" in answer["error"]) == (400, True)
    with system(tmp_path) as other:
        other.launch_core()
        foreign = other.operator().invite("anna", "operator").result(LIMIT)["token"]
        assert read_token(foreign)[0].address == other.core
        status, answer = viewer.log_in(foreign)
    assert (status, "another core" in answer["error"]) == (400, True)
    expired = operator.invite("late", "operator", expires=0.01).result(LIMIT)["token"]
    until(lambda: "late" not in str(operator.keys().result(LIMIT)["invitations"]), "the invitation to expire")
    assert "expired" in viewer.log_in(expired)[1]["error"]


def test_several_viewers_and_pages(line: System, operator: Operator) -> None:
    link = link_of(launch_web(line))
    first, second = Viewer(link), Viewer(link)
    assert first.log_in()[0] == second.log_in()[0] == 200
    with first.live() as one, first.live() as same, second.live() as other:
        assert one.viewer == same.viewer != other.viewer
        assert one.ask("take_control")["value"]["by"] == one.viewer["name"]
        assert same.ask("release_control")["kind"] == "result"
        other.ask("take_control")
        held = one.ask("prepare_run")
        assert (held["error"], held["by"]) == ("ControlHeld", other.viewer["name"])
        assert first.request("POST", "/logout", b"")[0] == 200
        assert one.closed() == same.closed() == NOT_LOGGED_IN
        assert other.ask("state")["value"] == "STOP"


def test_sessions_end_after_seven_days(line: System, operator: Operator) -> None:
    web = launch_web(line)
    viewer = Viewer(link_of(web))
    assert viewer.log_in()[0] == 200
    name = viewer.get("/api/session")["name"]
    web.stop()
    path = private_file(viewer.port, "sessions")
    stored = json.loads(path.read_bytes())
    stored["sessions"][0]["since"] -= SESSION
    path.write_text(json.dumps(stored))
    again = line.launch("web", "--core", line.core, "--address", f"127.0.0.1:{viewer.port}", key="web")
    until(lambda: "\n" in again.stdout, "the link of the web server")
    assert viewer.request("GET", "/api/session")[0] == 401
    until(lambda: name not in str(operator.keys().result(LIMIT)["members"]), "the key to be given back")


def test_a_trusted_proxy_names_the_viewer(line: System, operator: Operator) -> None:
    url = ("--url", "https://daq.example.org")
    proxy = ("--trusted-proxy", "127.0.0.1", "--trusted-header", "X-Remote-User", "--proxy-operator", "anna")
    port = free_port()
    link = link_of(launch_web(line, "--address", f"127.0.0.1:{port}", *url, *proxy))
    assert link.startswith("https://daq.example.org/login#")
    viewer = Viewer(f"http://127.0.0.1:{port}/")
    from_proxy = {"Host": "daq.example.org", "Origin": "https://daq.example.org"}

    def session(**headers: str) -> tuple[int, dict[str, str], bytes]:
        return viewer.request("GET", "/api/session", headers=from_proxy | headers)

    assert session()[0] == 401
    status, headers, body = session(**{"X-Remote-User": "anna"})
    assert (status, json.loads(body)["role"]) == (200, "operator")
    assert json.loads(body)["name"].startswith("anna@web-")
    assert "Secure" in headers["set-cookie"]
    viewer.cookie = headers["set-cookie"].split(";")[0]
    assert session(**{"X-Remote-User": "anna"})[0] == 200
    assert session()[0] == 401  # the cookie alone is not enough
    status, headers, body = session(**{"X-Remote-User": "bob"})  # another one logs in with the same browser
    assert (status, json.loads(body)["role"]) == (200, "observer")
    assert session(**{"X-Remote-User": "x" * 41})[0] == 400
    for name, code in (("bob", NOT_LOGGED_IN), ("anna", None)):
        with viewer.socket(headers={"X-Remote-User": name}) as raw:
            page = LivePage(raw)
            if code is not None:
                assert page.closed() == code
            else:
                page.until(lambda page=page: page.viewer, "the snapshot")  # type: ignore[misc]
                assert page.viewer["name"].startswith("anna@web-")


def test_a_header_counts_only_from_the_trusted_proxy(line: System, operator: Operator) -> None:
    options = ("--trusted-proxy", "127.0.0.2", "--trusted-header", "X-Remote-User")
    viewer = Viewer(link_of(launch_web(line, *options)))
    assert viewer.request("GET", "/api/session", headers={"X-Remote-User": "anna"})[0] == 401


@pytest.fixture
def insecure(tmp_path: Path) -> Iterator[System]:
    with system(tmp_path) as line:
        line.insecure = True
        line.launch_core()
        yield line


def test_a_core_without_keys(insecure: System) -> None:
    web = launch_web(insecure)
    viewer = Viewer(link_of(web))
    assert viewer.log_in("x")[0] == 400
    assert viewer.request("GET", "/api/session")[0] == 401
    assert viewer.log_in()[1]["role"] == "operator"
    with viewer.live() as page:
        page.until(lambda: page.state["core"]["insecure"], "the core without keys")
        assert page.ask("state")["value"] == "STOP"
    assert run_cli("web-link", "--core", insecure.core, "--insecure").stdout.strip() == link_of(web)


def test_up_starts_it_and_says_the_link(tmp_path: Path) -> None:
    core, log, port = (free_port() for _ in range(3))
    file = tmp_path / "detector.toml"
    file.write_text(
        f'[detector]\nstate-dir = "{tmp_path}/state"\n[core]\naddress = "tcp://127.0.0.1:{core}"\n'
        f'[log]\naddress = "tcp://127.0.0.1:{log}"\n[producers.board]\nfake = 1000\n'
        f'[web]\naddress = "127.0.0.1:{port}"\n'
    )
    try:
        up = run_cli("up", file)
        assert up.returncode == 0, up.stderr
        link = up.stdout.strip().splitlines()[-1].removeprefix("web page: ")
        assert urlsplit(link).port == port
        viewer = Viewer(link)
        assert viewer.log_in()[0] == 200
        with viewer.live() as page:
            page.until(lambda: page.state["status"], "the status")
            supervisor = next(one for one in page.state["status"]["components"] if one["kind"] == "supervisor")
            web = next(one for one in supervisor["status"]["processes"] if one["name"] == "web")
            assert web["state"] == "running"
            subprocess.run(["kill", "-9", str(web["pid"])], check=True)

        def restarted() -> bool:
            try:
                return viewer.request("GET", "/api/session")[0] == 200
            except OSError:
                return False

        until(restarted, "the web server to be started again")
    finally:
        down = run_cli("down", file)
    assert down.returncode == 0, down.stderr
    file.write_text(file.read_text().replace(f'"127.0.0.1:{port}"', f'"127.0.0.1:{core}"'))
    refused = run_cli("config", file)
    assert f"port {core} is that of core" in refused.stderr


def test_demo_with_the_page(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        command("cli", "demo", "--web", "--rate", "5000", "--seconds", "300", "-o", str(tmp_path)),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert demo.stdout is not None
        viewer = Viewer(demo.stdout.readline().strip().removeprefix("web page: "))
        assert viewer.log_in()[0] == 200
        with viewer.live() as page:
            page.until(lambda: (page.state["status"] or {}).get("state") == "RUN", "the run")
            page.until(
                lambda: sum(rate > 0 for rate in page.state["history"]["total"]) > 2, "rates that move", LIMIT * 2
            )
    finally:
        demo.send_signal(signal.SIGINT)
        assert demo.wait(2 * LIMIT) == 128 + signal.SIGINT
        demo.communicate()


def test_a_server_for_all_hosts(line: System, operator: Operator) -> None:
    web = launch_web(line, "--address", "*:0")
    assert "without encryption" in web.stderr
    link = urlsplit(link_of(web))
    assert link.hostname not in ("*", "0.0.0.0")
    viewer = Viewer(f"http://127.0.0.1:{link.port}/login#{link.fragment}")
    assert viewer.log_in()[0] == 200
    assert viewer.request("GET", "/healthz", headers={"Host": "evil.example"})[0] == 403
    web.stop()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r'uvicorn is not installed: pip install "larpix-daq\[web\]"'):
        check(argument_parser().parse_args([]))
