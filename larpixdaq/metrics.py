"""The metrics of a detector for Prometheus, in a process of its own: `larpixdaq-metrics`, then GET /metrics.

Each scrape asks the core for its status and the monitors for their summaries, as any Operator does; nothing runs in the
processes of the data. Series whose source does not answer are left out, so that old numbers never look like new ones.
control/metric_samples.py has the metrics, and what each one is.
"""

from __future__ import annotations

import sys

if __spec__ is None:  # run by its path: its folder would hide the standard library's `operator`
    sys.path[0:1] = []

import argparse
import contextlib
import hmac
import ipaddress
import logging
import re
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

import msgspec

from larpixdaq import config
from larpixdaq.constants import REGISTER_LIMIT, RUN_DATA
from larpixdaq.control.metric_samples import (
    Channel,
    ComponentStatus,
    CoreStatus,
    Samples,
    Summary,
    add_component,
    add_core,
    add_summary,
)
from larpixdaq.errors import ConfigError, LarpixDaqError, UsageError, printable
from larpixdaq.keys.credentials import read_private
from larpixdaq.operator import Operator, Request
from larpixdaq.protocol.reports import MonitorStatus
from larpixdaq.runtime.event_loop import Signals, run_main
from larpixdaq.runtime.units import parse_whole
from larpixdaq.version import VERSION

_log = logging.getLogger("larpixdaq.metrics")  # __name__ is "__main__" in the process

DEFAULT_NAME: Final = "Metrics"
#: Seconds for which a reading is given to further scrapes, so that many of them cost the core no more than one.
FRESH: Final = 0.25
#: Maximum seconds for the answer of the core, and then for those of all monitors.
LIMIT: Final = 1.0
#: Seconds between two readings of the chips.
CHIPS_INTERVAL: Final = 10.0
#: Maximum number of the hottest channels, which is what monitors report.
MAX_HOTTEST: Final = 20
#: Maximum number of connections; a further one closes the oldest. Maximum seconds of one.
MAX_CONNECTIONS: Final = 32
CONNECTION_LIMIT: Final = 10.0
#: Maximum bytes of a token file, and minimum characters of a token.
_MAX_TOKEN: Final = 1024
_MIN_TOKEN: Final = 16
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+)(?::\d{1,5})?")


def _take_watch(summary: Summary, monitor: ComponentStatus) -> None:
    """Take the hottest channels, and the number of dead ones, from a monitor's last heartbeat."""
    with contextlib.suppress(msgspec.ValidationError, ValueError):
        status = msgspec.convert(monitor.status, MonitorStatus)
        summary.dead_channels = status.dead_channels
        summary.hottest = [Channel.named(one.channel, one.rate) for one in status.hottest or []]


def _records(value: Any) -> Any:
    """Return a structured array as a list of dicts, and other values as they are."""
    names = getattr(getattr(value, "dtype", None), "names", None)
    return value if names is None else [dict(zip(names, row, strict=True)) for row in value.tolist()]


class Exporter:
    """Reads core and monitors through an Operator, and renders the metrics. Its methods may be called in any thread."""

    def __init__(self, operator: Operator, *, hottest: int, chips: bool, clock: Callable[[], float] = time.monotonic):
        self._operator, self._hottest, self._with_chips, self._clock = operator, hottest, chips, clock
        self._guard = threading.Lock()
        self._read_at = self._chips_at = -float("inf")
        self._samples = Samples()
        self._rendered: dict[bool, bytes] = {}  # of the last reading, by whether it is OpenMetrics
        self._chips, self._rendered_chips = Samples(), dict[bool, bytes]()
        self._counted: list[str] = []  # monitors that have answered in the last reading
        self._problem = ""

    def text(self, *, openmetrics: bool) -> bytes:
        """Return all metrics in Prometheus' text format 0.0.4, or as OpenMetrics 1.0.0."""
        from prometheus_client import exposition
        from prometheus_client.openmetrics import exposition as openmetrics_exposition

        render: Callable[[Any], bytes] = (openmetrics_exposition if openmetrics else exposition).generate_latest
        with self._guard:
            if self._clock() - self._read_at >= FRESH:
                self._samples, self._rendered = self._read(), {}
                self._read_at = self._clock()
            if openmetrics not in self._rendered:
                if openmetrics not in self._rendered_chips:
                    self._rendered_chips[openmetrics] = render(self._chips)
                head = render(self._samples).removesuffix(b"# EOF\n")
                self._rendered[openmetrics] = head + self._rendered_chips[openmetrics]
            return self._rendered[openmetrics]

    def _read(self) -> Samples:
        samples = Samples()
        samples.add("exporter", 1, VERSION)
        try:
            status = msgspec.convert(_result(self._operator.status(), LIMIT), CoreStatus)
            problem = ""
        except (LarpixDaqError, msgspec.ValidationError) as error:
            status, problem = None, str(error)
        if bool(problem) != bool(self._problem):
            _log.warning("%s", f"larpixdaq_up is 0: {problem}" if problem else "the core answers again")
        self._problem = problem
        samples.add("up", int(status is not None))
        counted = []
        if status is not None:
            add_core(samples, status)
            for component in status.components:
                add_component(samples, component)
            counted = self._add_monitors(samples, [one for one in status.components if one.kind == RUN_DATA])
        self._read_chips(counted)
        return samples

    def _add_monitors(self, samples: Samples, monitors: list[ComponentStatus]) -> list[str]:
        """Ask all monitors at the same time. Returns the names of those that have answered."""
        requests = {}
        for monitor in monitors:
            samples.add("monitor_up", 0, monitor.name)
            if monitor.alive and not monitor.stuck:
                requests[monitor.name] = self._ask(monitor)
        answered, until = [], self._clock() + LIMIT
        for monitor in monitors:
            if monitor.name not in requests:
                continue
            try:
                answer = _result(requests[monitor.name], until - self._clock())
                answer = {key: _records(value) for key, value in answer.items()}
                summary = msgspec.convert(answer, Summary)
            except (LarpixDaqError, msgspec.ValidationError, AttributeError) as error:
                _log.debug("%s: %s", monitor.name, error)
                continue
            samples.add("monitor_up", 1, monitor.name)
            if summary.hottest is None:  # of a monitor without summary()
                _take_watch(summary, monitor)
            add_summary(samples, monitor.name, summary, self._hottest)
            answered.append(monitor.name)
        return answered

    def _ask(self, monitor: ComponentStatus) -> Request:
        if "summary" in monitor.actions:
            return self._operator.call(monitor.name, "summary")
        return self._operator.packet_rate(channels=False, component=monitor.name)

    def _read_chips(self, monitors: list[str]) -> None:
        """Read the chips of these monitors, if that is due."""
        now = self._clock()
        if not self._with_chips or (monitors == self._counted and now - self._chips_at < CHIPS_INTERVAL):
            return
        self._chips, self._rendered_chips = Samples(), {}
        self._counted, self._chips_at = monitors, now
        requests = [self._operator.packet_rate(channels=False, component=name) for name in monitors]
        for name, request in zip(monitors, requests, strict=True):
            with contextlib.suppress(LarpixDaqError, TypeError, KeyError, IndexError):
                chips = _result(request, now + LIMIT - self._clock())["chips"]
                columns = (chips[key].tolist() for key in ("rate", "io_group", "io_channel", "chip_id"))
                for rate, *where in zip(*columns, strict=True):
                    self._chips.add("chip_packets_per_second", rate, name, *where)


def _result(request: Request, limit: float) -> Any:
    try:
        return request.result(max(0.0, limit))
    finally:
        request.outcome.mark_seen()  # an error that comes later is not printed


# The server.


class _Server(socketserver.ThreadingTCPServer):
    """Answers GET /metrics. A connection has one request; the oldest one is closed when there are too many."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: str, names: Iterable[str], token: str) -> None:
        """Listen at a ZeroMQ address with an IP address and port, tcp://IP:PORT. Raises ConfigError.

        `names`: by which clients may call this server, beside IP addresses. `token`: that they must show, "" for none.
        """
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        host = {"*": "0.0.0.0"}.get(host, host.strip("[]"))
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.names, self.token = frozenset(map(str.lower, names)), token.encode()
        self.exporter: Exporter | None = None
        self._open: dict[socket.socket, float] = {}  # the oldest first, with the time of its begin
        try:
            super().__init__((host, 0 if port == "*" else int(port)), _Handler)
        except OSError as error:
            raise ConfigError(f"--address {address.removeprefix('tcp://')}: {error.strerror or error}") from None

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open[request] = time.monotonic()
        for oldest in list(self._open)[:-MAX_CONNECTIONS]:
            self._cut(oldest)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        limit = time.monotonic() - CONNECTION_LIMIT
        for connection in [connection for connection, began in list(self._open.items()) if began < limit]:
            self._cut(connection)

    def _cut(self, connection: socket.socket) -> None:
        """End a connection, whose thread then closes it."""
        self._open.pop(connection, None)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # else the client has gone
            _log.error("a scrape failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5.0
    server_version = f"larpixdaq/{VERSION}"
    sys_version = ""

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            self._answer(403, f"not the name of this server: {', '.join(hosts)[:200]!a}; --allow-host permits a name")
            return
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if self.server.token and not hmac.compare_digest(given, b"Bearer " + self.server.token):
            self._answer(401, "expected the header Authorization: Bearer TOKEN, with the content of --token-file")
            return
        if self.path.partition("?")[0] != "/metrics":
            self._answer(404, "the metrics are at /metrics")
            return
        assert self.server.exporter is not None
        openmetrics = "application/openmetrics-text" in self.headers.get("Accept", "")
        kind = "application/openmetrics-text; version=1.0.0" if openmetrics else "text/plain; version=0.0.4"
        self._send(200, self.server.exporter.text(openmetrics=openmetrics), kind)

    def _is_own(self, host: str) -> bool:
        """Return whether a client may call this server by this name. A page of another site has another name, whatever
        address the name leads to."""
        match = _HOST.fullmatch(host.strip())
        if match is None:
            return False
        name = match[1].strip("[]").lower()
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name in self.server.names

    def _answer(self, status: int, text: str) -> None:
        self._send(status, f"{text}\n".encode(), "text/plain")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not HTTP, or not GET."""
        self._answer(code, printable(message or self.responses[code][0])[:200])

    def log_message(self, format: str, *values: Any) -> None:
        pass


def read_token(path: Path) -> str:
    """Return the token in a private file. Raises FileError and ConfigError."""
    data = read_private(path, _MAX_TOKEN)
    if data is None:
        raise ConfigError(f"--token-file {path}: no such file")
    token = data.decode("utf-8", "replace").strip()
    if len(token) < _MIN_TOKEN or not re.fullmatch("[!-~]+", token):
        raise ConfigError(f"--token-file {path}: expected {_MIN_TOKEN} or more ASCII characters without spaces")
    return token


def check(options: argparse.Namespace) -> tuple[str, str]:
    """Return address and token of these options. UsageError, ConfigError or FileError if that is impossible."""
    address = config.listen_address(options.address, config.METRICS_PORT)
    if not address.startswith("tcp://"):
        raise UsageError(f"--address {options.address}: expected HOST[:PORT]")
    token = read_token(options.token_file) if options.token_file is not None else ""
    if not config.is_loopback(address) and not token:
        raise UsageError(
            f"--address {options.address}: other hosts could read the metrics: give --token-file FILE, or stay at "
            "127.0.0.1 behind a proxy"
        )
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise ConfigError('metrics need prometheus-client: pip install "larpix-daq[metrics]"') from None
    return address, token


def serve(options: argparse.Namespace) -> None:
    """Serve metrics until a signal comes. Raises ConfigError, FileError, NoCore and NotAllowed."""
    address, token = check(options)
    own, asked = socket.gethostname(), options.address.removeprefix("tcp://").partition(":")[0]
    server = _Server(address, {"localhost", own, own.partition(".")[0], asked, *options.allow_host}, token)
    core, limit = config.core_addresses(options.core), REGISTER_LIMIT
    with (
        server,
        Operator(core, name=options.name, timeout=limit, insecure=options.insecure, supervised=True) as operator,
        Signals() as signals,
    ):
        server.exporter = Exporter(operator, hottest=options.hottest, chips=options.chips)
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        host, port = map(str, server.server_address[:2])
        print(f"larpixdaq-metrics: http://{f'[{host}]' if ':' in host else host}:{port}/metrics", flush=True)
        try:
            while not signals.stop:
                select.select([signals], [], [])
        finally:
            server.shutdown()
            thread.join()


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-metrics",
        description="Serves the metrics of a detector to Prometheus, at http://ADDRESS/metrics (docs/metrics.md).",
    )
    config.add_core_argument(parser)
    config.add_name_argument(parser, DEFAULT_NAME, "name of its Operator, by which `status` and a supervisor know it")
    config.add_insecure_argument(parser)
    parser.add_argument(
        "--address",
        default=f"127.0.0.1:{config.METRICS_PORT}",
        metavar="HOST[:PORT]",
        help="where Prometheus finds it (default %(default)s); an address that other hosts reach needs --token-file",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"private file with a token, of {_MIN_TOKEN} or more characters, that each request must show",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further host name by which it may be called, such as that of a proxy; can be given several times",
    )
    parser.add_argument(
        "--hottest",
        type=lambda text: parse_whole(text, 0, MAX_HOTTEST),
        default=10,
        metavar="N",
        help=f"number of channels with the highest rates, at most {MAX_HOTTEST} (default %(default)s)",
    )
    parser.add_argument(
        "--chips", action="store_true", help="also the rate of each chip, read every 10 s; a series for each chip"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)
    return run_main(lambda: serve(options))


if __name__ == "__main__":
    sys.exit(main())
