"""Metrics: every one is documented and clean, scraped by a real Prometheus, and absent when its source is gone."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from detector import Detector, detector
from emulated_board import Emulator
from fake_core import Actor, core, producer, storage_status
from hypothesis import given
from hypothesis import strategies as st
from processes import LIMIT, Process, free_port, in_thread, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from system import system

from larpixdaq import metrics
from larpixdaq.constants import Count
from larpixdaq.control import metric_samples
from larpixdaq.errors import ConfigError, LarpixDaqError, printable
from larpixdaq.operator import Operator
from larpixdaq.protocol import reports
from larpixdaq.runtime.launcher import end_process, is_running

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana"
#: A clock's drift is known after two minutes.
NOT_IN_A_SHORT_RUN = "larpixdaq_board_clock_drift_ratio"
Found = dict[tuple[str, frozenset[tuple[str, str]]], float]


def tool(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is missing: install the Debian package prometheus"
    return path


def promtool(*arguments: object, text: bytes = b"") -> None:
    done = subprocess.run([tool("promtool"), *map(str, arguments)], input=text, capture_output=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, b""), (done.stdout + done.stderr).decode()


def rendered(samples: metric_samples.Samples) -> tuple[bytes, bytes]:
    """Return the text of samples in both formats."""
    exporter = metrics.Exporter(None, hottest=0, chips=False)  # type: ignore[arg-type]
    exporter._read = lambda: samples  # type: ignore[method-assign]
    return exporter.text(openmetrics=False), exporter.text(openmetrics=True)


def values(text: bytes, parse: Callable[[str], Any] = parse_text) -> Found:
    """Return the samples by name and labels. Fails if one is there twice."""
    found: Found = {}
    for family in parse(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found: Found, name: str, **labels: str) -> float | None:
    return found.get((f"larpixdaq_{name}", frozenset(labels.items())))


# What is documented.


def test_the_tables_in_the_documentation_are_those_of_the_code() -> None:
    assert metric_samples.table().strip() in (GRAFANA.parent / "metrics.md").read_text()


def test_names_are_those_of_openmetrics() -> None:
    names = [metric.full_name for section in metric_samples.SECTIONS.values() for metric in section]
    assert len(names) == len(set(names))
    for section in metric_samples.SECTIONS.values():
        for metric in section:
            assert re.fullmatch("larpixdaq_[a-z]+(_[a-z]+)*", metric.full_name)
            assert metric.full_name.endswith("_total") == (metric.kind == "counter")
            assert not re.search(r"_(ms|ns|us|percent|mb|kb|hz|ppm|count|sum|bucket|created)(_|$)", metric.name) or (
                metric.name == "board_messages_wrong_count"
            ), metric.name
            assert metric.text
            assert metric.text[-1] != "."


def test_alert_rules(tmp_path: Path) -> None:
    promtool("check", "rules", "--lint-fatal", GRAFANA / "alerts.yml")
    promtool("test", "rules", GRAFANA / "alerts_test.yml")


def expressions() -> dict[str, str]:
    """Return all expressions of the dashboard and of the alerts, as Grafana sends them, by where they are."""
    found = {}
    for panel in json.loads((GRAFANA / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable, text in {"$instance": ".*", "$__rate_interval": "20s", "$__range": "1h"}.items():
        found = {where: expression.replace(variable, text) for where, expression in found.items()}
    return found


def test_the_dashboard_shows_every_metric_or_says_why_not() -> None:
    dashboard = (GRAFANA / "dashboard.json").read_text()
    shown = set(re.findall(r"larpixdaq_\w+", dashboard))
    names = {metric.full_name for section in metric_samples.SECTIONS.values() for metric in section}
    assert shown - names <= {"larpixdaq"}
    assert names - shown == {
        # beside others that say the same, or for alerts alone
        "larpixdaq_exporter_info", "larpixdaq_core_info", "larpixdaq_core_start_time_seconds",
        "larpixdaq_component_stuck", "larpixdaq_last_run_number", "larpixdaq_last_run_end_time_seconds",
        "larpixdaq_monitor_packets_per_second", "larpixdaq_monitor_up", "larpixdaq_process_state",
    }  # fmt: skip
    panels = json.loads(dashboard)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    cells = [(x + i, y + j) for h, w, x, y in places for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


# What one status gives.

NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20) | st.sampled_from(
    ['<script>alert("1")</script>', 'a"b\\c', "a\\n", "{}", '"} 1\nlarpixdaq_up 7', "\x00\x1b[31m", "‮x", "é" * 20]
)


@given(NAMES, NAMES)
def test_odd_characters_in_names_are_escaped(name: str, board: str) -> None:
    boards = [reports.BoardReport(1, board)]
    status = reports.ProducerStatus(boards=boards, totals=[], verdicts={"1": "lost"})
    samples = metric_samples.Samples()
    metric_samples.add_component(
        samples, metric_samples.ComponentStatus(name, "producer", status=msgspec.to_builtins(status))
    )
    for text, parse in zip(rendered(samples), (parse_text, parse_openmetrics), strict=True):
        found = values(text, parse)
        labels = {"producer": printable(name), "io_group": "1"}
        assert value(found, "board_connected", **labels, board=printable(board)) == 1.0
        assert value(found, "rows_lost_total", **labels, place="ring_full") == 0.0
        assert value(found, "io_group_verdict", **labels, larpixdaq_io_group_verdict="lost") == 1.0
        assert {name for name, _ in found if not name.startswith("larpixdaq_")} == set()
        assert value(found, "up") is None


STATUS_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(reports.STATUS)), st.data())
def test_a_status_of_another_version_does_not_fail(kind: str, data: st.DataObject) -> None:
    fields = [field.name for field in msgspec.structs.fields(reports.STATUS[kind])]
    status = data.draw(st.dictionaries(st.sampled_from(fields) | st.text(max_size=5), STATUS_VALUES, max_size=4))
    samples = metric_samples.Samples()
    metric_samples.add_component(samples, metric_samples.ComponentStatus("a", kind, status=status))
    assert value(values(rendered(samples)[0]), "component_up", component="a", kind=kind) == 1.0


def test_numbers_of_a_lost_or_stuck_component_are_left_out() -> None:
    for alive, stuck in ((True, False), (False, False), (True, True)):
        samples = metric_samples.Samples()
        metric_samples.add_component(
            samples, metric_samples.ComponentStatus("a", "storage", alive, stuck, heard_s=3.5, status=storage_status())
        )
        found = values(rendered(samples)[0])
        about = {"component": "a", "kind": "storage"}
        assert value(found, "component_up", **about) == alive
        assert value(found, "component_stuck", **about) == stuck
        assert value(found, "component_heartbeat_age_seconds", **about) == 3.5
        assert (value(found, "disk_free_bytes", storage="a") is None) == (not alive or stuck)


def test_values_of_all_metrics() -> None:
    """A core, and a component of each kind, with everything that they can say."""
    totals = [[g, *(100 * g + i for i in range(len(Count)))] for g in (0, 2)]
    clock = reports.ClockReport(0.25, 0.1, 3.0, 0.1, "")
    load = reports.LoadShares(0.25, 0.5)
    statuses = {
        "producer": reports.ProducerStatus(
            ring=0.5, owed_blocks=7, spooled_blocks=3, spooled_bytes=99, spool_limit=1000, subscribers=["a", "b"],
            refused_connections=4, totals=totals, total_outside=5, verdicts={"1": "suspect"}, load=load,
            boards=[reports.BoardReport(1, "x"), reports.BoardReport(2, "y", 5.0, clock=clock)],
            groups=[reports.IoGroupReport(2, 1, silent=2.5, total_fifo_full=8)],
        ),
        "storage": reports.StorageStatus(
            ["f"], free_bytes=10, seconds_left=20, paused="full", not_recovered=["x"], total_rows=30, total_bytes=40,
            duplicates=50, on_close_failed=60,
        ),
        "log": reports.LogStatus(written=1, lost=2, held_back=3, refused_connections=4),
        "supervisor": reports.SupervisorStatus([reports.SupervisedProcess("p", state="given up", restarts=9)]),
        "run_data": reports.MonitorStatus(1, 5.0, hottest=[], dead_channels=0),
    }  # fmt: skip
    samples = metric_samples.Samples()
    for kind, status in statuses.items():
        component = metric_samples.ComponentStatus(kind, kind, heard_s=0.125, status=msgspec.to_builtins(status))
        metric_samples.add_component(samples, component)
    run = metric_samples.RunStatus(8, begun=1000.0, missing=["x"])
    last = metric_samples.RunStatus(7, "COMPLETE, suspect", 10.0, 20.0, 30, 29)
    alarms = [metric_samples.OpenAlarm("disk-left", "alarm"), metric_samples.OpenAlarm("disk-left", "alarm", 5.0)]
    status = metric_samples.CoreStatus(
        "RUN", [], run, last, ["o"], alarms, load, 3, 4, metric_samples.AuditStatus(5), "0.3", 7.0
    )
    metric_samples.add_core(samples, status)
    samples.add("exporter", 1, "0.3")
    samples.add("up", 1)
    found = values(rendered(samples)[0])
    p = {"producer": "producer"}
    expected = {
        ("rows_made_total", "word", "2"): 200 + Count.WORD_ROWS,
        ("rows_made_total", "info", "0"): Count.INFO_ROWS,
        ("rows_lost_total", "ring_full", "2"): 200 + Count.DROPPED,
        ("rows_lost_total", "ring_full", "1"): 0,
        ("rows_lost_total", "unknown_words", "2"): 200 + Count.UNKNOWN_WORDS,
        ("bytes_unused_total", "resync", "2"): 200 + Count.RESYNC_BYTES,
    }
    for (name, part, io_group), number in expected.items():
        label = "kind" if name == "rows_made_total" else "place"
        assert value(found, name, **p, io_group=io_group, **{label: part}) == number
    assert value(found, "packets_total", **p, io_group="1") == 0
    assert value(found, "packets_total", **p, io_group="2") == 200 + Count.PACKETS
    assert value(found, "packets_fifo_full_total", **p, io_group="2") == 8
    assert value(found, "board_connected", **p, io_group="2", board="y") == 0
    assert value(found, "board_clock_drift_ratio", **p, io_group="2") == pytest.approx(3e-6)
    assert value(found, "alarms_open", condition="disk-left", level="alarm") == 2
    assert value(found, "alarms_open", condition="rows-dropped", level="alarm") == 0
    assert value(found, "alarms_unacknowledged", level="alarm") == 1
    assert value(found, "last_run_condition", larpixdaq_last_run_condition="COMPLETE, suspect") == 1
    assert value(found, "last_run_condition", larpixdaq_last_run_condition="COMPLETE") == 0
    assert value(found, "run_number") == 8
    assert value(found, "process_state", supervisor="supervisor", process="p", larpixdaq_process_state="given up") == 1
    there = {name for name, _ in found}
    of_monitors = {metric.full_name for metric in metric_samples.SECTIONS["Monitors"]}
    names = {metric.full_name for section in metric_samples.SECTIONS.values() for metric in section}
    assert names - there == of_monitors
    assert values(rendered(samples)[1], parse_openmetrics) == found
    promtool("check", "metrics", text=rendered(samples)[0])


# Real processes of this thread: an Operator at a core with components that answer as they are told.


def monitor(address: str, **replies: Any) -> Actor:
    return Actor(address, "Online monitor", "run_data", {}, replies)


def test_monitors_of_all_versions(tmp_path: Path) -> None:
    channel = {"io_group": 1, "io_channel": 2, "chip_id": 11, "channel_id": 3, "rate": 70.0}
    summary = {
        "run": 1, "rate": 100.0, "seen": 0.5, "io_groups": np.array([(1, 100.0)], [("io_group", "u1"), ("rate", "f8")]),
        "hottest": [channel, {**channel, "channel_id": 4, "rate": 60.0}], "dead_channels": 3,
        "channel_rates": {"edges": np.ones(2), "channels": np.ones(1), "silent": 9},
    }  # fmt: skip
    chips = np.array([(1, 2, 11, 5.0)], [("io_group", "u1"), ("io_channel", "u1"), ("chip_id", "u1"), ("rate", "f8")])
    rates = {"rate": 99.0, "seen": 1.0, "io_groups": summary["io_groups"], "chips": chips}
    status = {"hottest": [{"channel": "1-2-11-5", "rate": 50.0}], "dead_channels": 4}
    m = {"monitor": "Online monitor"}

    def hottest(found: Found) -> set[tuple[str | None, float]]:
        return {
            (dict(labels).get("channel_id"), number)
            for (name, labels), number in found.items()
            if name == "larpixdaq_channel_packets_per_second"
        }

    with core(tmp_path / "state") as running, Operator(running.address) as operator:
        exporter = metrics.Exporter(operator, hottest=1, chips=True)
        moment = 0.0
        exporter._clock = lambda: moment

        def read() -> Found:
            nonlocal moment
            moment += 1.0
            return values(exporter.text(openmetrics=False))

        assert value(read(), "up") == 1.0
        with monitor(running.address, summary=summary, packet_rate=rates).running():
            found = read()
            assert value(found, "monitor_up", **m) == 1.0
            assert value(found, "monitor_packets_per_second", **m) == 100.0
            assert value(found, "io_group_packets_per_second", **m, io_group="1") == 100.0
            assert value(found, "silent_channels", **m) == 9.0
            assert hottest(found) == {("3", 70.0)}
            chip = {**m, "io_group": "1", "io_channel": "2", "chip_id": "11"}
            assert value(found, "chip_packets_per_second", **chip) == 5.0
            rates["chips"]["rate"] = 6.0
            assert value(read(), "chip_packets_per_second", **chip) == 5.0
            moment += metrics.CHIPS_INTERVAL
            assert value(read(), "chip_packets_per_second", **chip) == 6.0
        found = read()
        assert not [name for name, labels in found if ("monitor", "Online monitor") in labels]
        old = monitor(running.address, packet_rate=rates)
        old.status = status
        with old.running():
            found = until(lambda: hottest(found := read()) and found, "the status of the monitor")
            assert value(found, "monitor_packets_per_second", **m) == 99.0
            assert hottest(found) == {("5", 50.0)}
            assert value(found, "dead_channels", **m) == 4.0
        for answer in (LarpixDaqError("no"), "text", {"rate": "much"}, {}):
            with monitor(running.address, summary=answer).running():
                assert value(found := read(), "monitor_up", **m) == 0.0
                assert value(found, "up") == 1.0
                assert value(found, "monitor_packets_per_second", **m) is None


def test_a_monitor_that_does_not_answer_delays_a_scrape_by_a_second(tmp_path: Path) -> None:
    with core(tmp_path / "state") as running, Operator(running.address) as operator:
        exporter = metrics.Exporter(operator, hottest=1, chips=False)
        with monitor(running.address, summary=None).running(), producer(running.address).running():
            found = values(exporter.text(openmetrics=False))
            assert value(found, "monitor_up", monitor="Online monitor") == 0.0
            assert value(found, "component_up", component="LArPix board", kind="producer") == 1.0


def test_without_the_core_nothing_else_is_shown(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with core(tmp_path / "state") as running:
            operator = stack.enter_context(Operator(running.address))
            exporter = metrics.Exporter(operator, hottest=1, chips=False)
            with producer(running.address).running():
                assert len(values(exporter.text(openmetrics=False))) > 10

        def missed() -> Found | None:
            found = values(exporter.text(openmetrics=False))
            return None if value(found, "up") else found

        found = until(missed, "the core to be missed")
    assert {name for name, _ in found} == {"larpixdaq_up", "larpixdaq_exporter_info"}


# The server.


class Stub:
    """Stands in for an Exporter."""

    def text(self, *, openmetrics: bool) -> bytes:
        return b"openmetrics" if openmetrics else b"text"


@contextmanager
def serving(token: str = "", names: tuple[str, ...] = ("localhost",)) -> Iterator[tuple[str, int]]:
    with metrics._Server("tcp://127.0.0.1:*", names, token) as server:
        server.exporter = Stub()  # type: ignore[assignment]
        with in_thread(lambda: server.serve_forever(0.01), server.shutdown):
            yield server.server_address  # type: ignore[misc]


def ask(address: tuple[str, int], request: str) -> tuple[int, str]:
    """Send a request, and return status and body. Status 0: the connection was closed without an answer."""
    with socket.create_connection(address, LIMIT) as client:
        client.sendall(request.encode("latin-1"))
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    if answer and not answer.startswith("HTTP/"):  # to a request without a version
        return 400, answer
    head, _, body = answer.partition("\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def get(address: tuple[str, int], path: str = "/metrics", host: str = "localhost", **headers: str) -> tuple[int, str]:
    lines = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in headers.items())
    return ask(address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n")


def test_requests() -> None:
    with serving(names=("localhost", "DAQ1")) as address:
        for host in ("localhost", "127.0.0.1:5581", "[::1]:5581", "daq1", "DAQ1:80"):
            assert get(address, host=host) == (200, "text")
        assert get(address, "/metrics?x=1", Accept="application/openmetrics-text;version=1.0.0,*/*")[1] == "openmetrics"
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "a b",
            "localhost:x",
            "[::",
        ):
            status, words = get(address, host=host)
            assert status == 403
            assert "--allow-host" in words
        assert get(address, host="x\r\nHost: localhost")[0] == 403
        assert ask(address, "GET /metrics HTTP/1.0\r\n\r\n")[0] == 403
        assert get(address, "/")[0] == get(address, "/../etc/passwd")[0] == get(address, "/<script>")[0] == 404
        for request in ("POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", "x\r\n\r\n", "\x00\x01\r\n\r\n"):
            status, words = ask(address, request)
            assert status in (400, 501)
            assert words.count("\n") == 1
        assert ask(address, f"GET /{'x' * 70000} HTTP/1.1\r\n\r\n")[0] in (0, 414)
        assert ask(address, "GET / HTTP/1.1\r\n" + "a: b\r\n" * 200 + "\r\n")[0] == 431


def test_a_token_is_needed() -> None:
    with serving(token="a long secret".replace(" ", "-")) as address:
        assert get(address, Authorization="Bearer a-long-secret") == (200, "text")
        for wrong in ("Bearer a-long-secre", "bearer a-long-secret", "Bearer \xff", "a-long-secret", ""):
            status, words = get(address, Authorization=wrong)
            assert status == 401
            assert "secret" not in words
        assert get(address)[0] == 401


def test_slow_and_many_connections_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    with serving() as address:
        slow = [socket.create_connection(address, LIMIT) for _ in range(metrics.MAX_CONNECTIONS)]
        for client in slow:
            client.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert get(address) == (200, "text")  # in place of the oldest one
        assert slow[0].recv(10) == b""
        monkeypatch.setattr(metrics, "CONNECTION_LIMIT", 0.0)
        for client in slow:
            assert client.recv(10) == b""
            client.close()
        until(lambda: threading.active_count() <= before + 1, "all connections to be closed")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "0.0.0.0"], "--address 0.0.0.0: other hosts could read the metrics: give --token-file"),
        (["--address", "ipc://x"], "--address ipc://x: expected HOST[:PORT]"),
        (["--address", "a b"], "address 'a b': expected"),
        (["--token-file", "none"], "--token-file none: no such file"),
        (["--token-file", "short"], "--token-file short: expected 16 or more ASCII characters without spaces"),
        (["--token-file", "open"], "open: expected mode 600, found 644"),
    ],
)
def test_options_that_cannot_be_served(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, mode in {"short": 0o600, "open": 0o644}.items():
        Path(name).write_text("short\n")
        Path(name).chmod(mode)
    options = metrics.argument_parser().parse_args(arguments)
    with pytest.raises(LarpixDaqError, match=f"^{re.escape(words)}"):
        metrics.check(options)


def test_without_prometheus_client_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r'^metrics need prometheus-client: pip install "larpix-daq\[metrics\]"$'):
        metrics.check(argparse.Namespace(address="127.0.0.1", token_file=None))


def test_it_ends_with_one_line_without_a_core_or_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with Process("larpixdaq.metrics", "--address", f"127.0.0.1:{port}", directory=tmp_path) as process:
            assert process.wait() == 1
            assert process.stderr.endswith(f"--address 127.0.0.1:{port}: Address already in use\n")
    where = "--core", f"tcp://127.0.0.1:{free_port()}", "--address", "127.0.0.1:*"
    with Process("larpixdaq.metrics", *where, directory=tmp_path) as process:
        assert process.wait() == 1
        assert "no core answers at" in process.stderr
        assert len(process.stderr.splitlines()) == 1


def test_it_ends_at_a_signal(tmp_path: Path) -> None:
    with system(tmp_path) as line:
        line.launch_core()
        for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            process = line.launch("metrics", "--core", line.core, "--address", "localhost:*", key=how.name)
            url = until(lambda p=process: p.stdout.strip(), "its address").removeprefix("larpixdaq-metrics: ")
            with urllib.request.urlopen(url, timeout=LIMIT) as answer:
                assert value(values(answer.read()), "up") == 1.0
            assert process.stop(how) == 0
            assert process.stderr == ""


# A detector, and a real Prometheus.


class Prometheus:
    """A Prometheus that scrapes one address each second, with the alert rules."""

    def __init__(self, folder: Path, target: str, token_file: Path) -> None:
        folder.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        shutil.copy(GRAFANA / "alerts.yml", folder)
        scrape = {
            "job_name": "larpixdaq",
            "static_configs": [{"targets": [target]}],
            "authorization": {"credentials_file": str(token_file)},
        }
        settings = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        content = {"global": settings, "rule_files": ["alerts.yml"], "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(json.dumps(content))  # which is YAML
        promtool("check", "config", folder / "prometheus.yml")
        self.output = folder / "output"
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                [
                    tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={self.address}",
                    "--web.enable-lifecycle",
                ],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder,
            )  # fmt: skip

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(LIMIT)

    def api(self, path: str, **parameters: str) -> Any:
        assert self.process.poll() is None, self.output.read_text()
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{query}", timeout=LIMIT) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None
        except urllib.error.URLError:  # it has not started yet
            return None
        assert not content.get("warnings"), content
        return content["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.api("query", query=expression)
        return [] if answer is None else answer["result"]

    def number(self, expression: str) -> float | None:
        found = self.query(expression)
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None


def test_a_real_prometheus_scrapes_a_real_run(tmp_path: Path) -> None:
    """All expressions of the dashboard and of the alerts give series, counters are exact, and the dead have none."""
    token_file = tmp_path / "token"
    token_file.write_text("0123456789abcdef\n")
    token_file.chmod(0o600)
    more = ("--io-groups", "2", "--rate", "20000", "--pps", "--fifo-full", "0.01", "--wait-for-go", "--lossless")
    with detector(tmp_path) as made, closing(Emulator(*more)) as boards:
        target = f"127.0.0.1:{free_port()}"
        table = f'[metrics]\naddress = "{target}"\ntoken-file = "token"\nchips = true\n'
        name = '<b>"a\\b"</b>'
        made.write(table, made.producer(name, f"pacman = {json.dumps(boards.addresses)}", "64MiB"))
        status, words = made.up()
        assert status == 0, words
        assert list(made.pids()) == ["core", "Log", "Offline storage", "Online monitor", name, "Metrics"]
        with Prometheus(tmp_path / "prometheus", target, token_file) as prometheus, Operator(made.core) as operator:
            operator.prepare_run().result(LIMIT)
            operator.end_run().result(LIMIT)
            operator.prepare_run().result(LIMIT)
            operator.begin_run().result(LIMIT)
            boards.go()
            check_expressions(prometheus, operator)
            rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
            assert {rule["health"] for rule in rules} == {"ok"}
            assert prometheus.query('ALERTS{alertname!="LarpixdaqAlarm", alertstate="firing"}') == []
            request = urllib.request.Request(f"http://{target}/metrics", headers={"Authorization": "Bearer " + "x" * 9})
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=LIMIT)
            request = urllib.request.Request(
                f"http://{target}/metrics", headers={"Authorization": "Bearer 0123456789abcdef"}
            )
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                promtool("check", "metrics", text=answer.read())
            boards.stop()
            sent = boards.finish()["sent"]
            operator.end_run().result(LIMIT)
            # Exact, and over the runs since the producer's start.
            for io_group, counts in sent.items():
                words_of = f'larpixdaq_words_total{{io_group="{io_group}"}}'
                until(lambda w=words_of, n=counts["words"]: prometheus.number(w) == n, words_of)
                for name, kind in (("packets", "D"), ("packets_fifo_full", "full")):
                    series = words_of.replace("words", name)
                    until(lambda s=series, n=counts[kind]: prometheus.number(s) == n, series)
            rest = "sum(larpixdaq_rows_made_total) - sum(larpixdaq_storage_rows_total)"
            until(lambda: prometheus.number(rest) == 0, "all rows to be stored")
            rows = until(lambda: prometheus.number("larpixdaq_storage_rows_total"), "the rows of the storage")
            operator.prepare_run().result(LIMIT)
            until(lambda: prometheus.number("larpixdaq_run_number") == 3, "the next run")
            made_rows = "sum(larpixdaq_rows_made_total)"
            until(lambda: (prometheus.number(made_rows) or 0) >= rows, "the rows of both runs")
            operator.abort_run().result(LIMIT)
            check_deaths(made, prometheus)


def check_expressions(prometheus: Prometheus, operator: Operator) -> None:
    """Wait until every expression gives a series, and until the metrics of all alerts do.

    On a busy machine the emulated boards are late, so that the monitor cannot compare their clocks and gives no number.
    """
    missing = expressions()
    late = [where for where, text in missing.items() if NOT_IN_A_SHORT_RUN in text]
    assert [prometheus.query(missing.pop(where)) for where in late] == [[]]
    rules = (GRAFANA / "alerts.yml").read_text()
    for selector in re.findall(r"(?<![\w{])larpixdaq_\w+(?:\{[^}]*\})?", "\n".join(re.findall(r"expr: (.*)", rules))):
        missing[f"alerts {selector}"] = selector

    def all_there() -> bool:
        for where, text in list(missing.items()):
            if prometheus.query(text):
                del missing[where]
        return not missing

    try:
        until(all_there, "all expressions", 2 * LIMIT)
    except AssertionError:
        clocks = [where for where, text in missing.items() if "time_stamp_spread" in text]
        if {one["how"] for one in operator.summary().result(LIMIT)["spread"]} == {""}:
            for where in clocks:
                del missing[where]
        if missing:
            raise AssertionError(f"no series: {missing}") from None
    # On a busy machine a scrape may fail, so that for a second there is no series.
    state = until(lambda: prometheus.query("larpixdaq_run_state == 1"), "the state of the run")
    assert [one["metric"]["larpixdaq_run_state"] for one in state] == ["RUN"]
    for rate in ("sum(rate(larpixdaq_packets_total[10s]))", "sum(larpixdaq_io_group_packets_per_second)"):
        until(lambda rate=rate: prometheus.number(rate) == pytest.approx(40000, rel=0.5), rate)


def check_deaths(made: Detector, prometheus: Prometheus) -> None:
    """A process that is restarted, one that is lost, and the core."""
    restarts = 'larpixdaq_process_restarts_total{process="Offline storage"}'
    until(lambda: prometheus.number(restarts) == 0, "no restart so far")
    made.await_back("Offline storage", made.kill("Offline storage"))
    until(lambda: prometheus.number(restarts) == 1, "the restart")
    killed = made.kill("Metrics")
    made.await_back("Metrics", killed)
    until(lambda: prometheus.number('larpixdaq_process_restarts_total{process="Metrics"}') == 1, "metrics again")
    supervisor = made.supervisor()
    os.kill(supervisor.pid, signal.SIGKILL)
    until(lambda: not is_running(supervisor), "the supervisor to be dead")
    of_monitor = '{__name__=~"larpixdaq_.*", monitor="Online monitor", __name__!="larpixdaq_monitor_up"}'
    until(lambda: prometheus.query(of_monitor), "the monitor's numbers")
    made.kill("Online monitor")
    until(lambda: prometheus.number('larpixdaq_component_up{component="Online monitor"}') == 0, "the loss")
    until(lambda: not prometheus.query(of_monitor), "the monitor's numbers to go")
    until(lambda: prometheus.number("larpixdaq_monitor_up") == 0, "the monitor to be missed")
    until(
        lambda: prometheus.query('ALERTS{alertname="LarpixdaqComponentLost", component="Online monitor"}'), "an alert"
    )
    made.kill("core")
    until(lambda: prometheus.number("larpixdaq_up") == 0, "the core to be missed")
    ours = 'count by (__name__) ({__name__=~"larpixdaq_.*"})'
    found = until(lambda: len(found := prometheus.query(ours)) == 2 and found, "all other series to go")
    assert {one["metric"]["__name__"] for one in found} == {"larpixdaq_up", "larpixdaq_exporter_info"}
    end_process(made.entries()["Metrics"])


def test_up_names_the_reason_when_metrics_do_not_start(tmp_path: Path) -> None:
    with detector(tmp_path) as made, socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        made.write(f'[metrics]\naddress = "127.0.0.1:{port}"\n', made.producer("north", "fake = 10"))
        status, words = made.up()
        assert status == 1
        assert f"Metrics ended with status 1: metrics.py: --address 127.0.0.1:{port}: Address already in use" in words
        made.write('[metrics]\naddress = "0.0.0.0"\n', made.producer("north", "fake = 10"))
        assert f"{made.path}:8: metrics: --address 0.0.0.0: other hosts could read" in made.up()[1]
