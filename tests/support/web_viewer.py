"""A web server in a process of its own, and viewers of it: HTTP requests, and the live state over a websocket."""

from __future__ import annotations

import http.client
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from processes import LIMIT, Process, until
from system import System
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

#: Codes with which the server closes a page.
NOT_LOGGED_IN, REFUSED, TOO_SLOW, TOO_MANY, CORE_GONE = 4401, 4403, 4408, 4429, 4503


def launch_web(line: System, *more: object, key: str = "web") -> Process:
    """Start a web server of a system at a free port, and wait for its link, which `link_of()` returns."""
    process = line.launch("web", "--core", line.core, "--address", "127.0.0.1:0", *more, key=key)

    def printed() -> bool:
        assert process.popen.poll() is None, f"the web server ended: {process.stderr}"
        return "\n" in process.stdout

    until(printed, "the link of the web server")
    return process


def patched_web(line: System, **limits: float) -> Process:
    """Return a web server, to be used as a context, with other limits: `live.CORE_INTERVAL` is live__CORE_INTERVAL."""
    settings = [f"{name.replace('__', '.', 1)}={number}" for name, number in limits.items()]
    process = Process(
        "patched_web",
        *(*settings, "--", "--core", line.core, "--address", "127.0.0.1:0"),
        directory=line.folder / "out",
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )
    until(lambda: "\n" in process.stdout, "the link of the web server")
    return process


def link_of(process: Process) -> str:
    return process.stdout.strip()


class Viewer:
    """A browser: it keeps the cookie."""

    def __init__(self, link: str) -> None:
        url = urlsplit(link)
        assert url.hostname is not None
        self.host, self.port, self.token = url.hostname, url.port or 80, url.fragment
        self.origin = f"http://{self.host}:{self.port}"
        self.cookie = ""

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers (names in lower case) and body. A POST has the page's Origin unless given another."""
        sent = {"Cookie": self.cookie} if self.cookie else {}
        if method == "POST":
            sent |= {"Origin": self.origin, "Content-Type": "application/json"}
        sent |= headers or {}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=LIMIT)
        try:
            connection.request(method, path, body, {name: value for name, value in sent.items() if value != "-"})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return the JSON of a successful GET."""
        status, _, body = self.request("GET", path)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def log_in(self, token: str = "") -> tuple[int, dict[str, Any]]:
        """Log in with a token, by default that of the link. Returns status and answer."""
        body = json.dumps({"token": token or self.token}).encode()
        status, headers, answer = self.request("POST", "/login", body)
        if status == 200:
            self.cookie = headers["set-cookie"].split(";")[0]
        return status, json.loads(answer)

    @contextmanager
    def live(self, **more: Any) -> Iterator[LivePage]:
        """Open the websocket, and wait for the snapshot."""
        with self.socket(**more) as socket:
            page = LivePage(socket)
            page.until(lambda: page.sequence > 0, "the snapshot")
            yield page

    def socket(self, origin: str | None = "", **more: Any) -> ClientConnection:
        headers = {"Cookie": self.cookie} if self.cookie else {}
        return connect(
            f"ws://{self.host}:{self.port}/live",
            origin=self.origin if origin == "" else origin,  # type: ignore[arg-type]
            additional_headers=headers | more.pop("headers", {}),
            max_size=None,
            compression=None,
            proxy=None,
            close_timeout=1,
            **more,
        )


class LivePage:
    """Applies the frames of a websocket as the page does."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.sequence = 0
        self.viewer: dict[str, str] = {}
        self.state: dict[str, Any] = {}
        self.arrays: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
        self.responses: dict[str, list[dict[str, Any]]] = {}
        self.frames = 0
        self._number = 0

    def take(self, limit: float) -> bool:
        """Receive and apply a frame. Returns False if none has come within `limit` seconds."""
        try:
            frame = self.socket.recv(timeout=limit)
        except TimeoutError:
            return False
        self.frames += 1
        if isinstance(frame, bytes):
            header, values = read_array(frame)
            self.arrays[header["name"]] = header, values
            return True
        message = json.loads(frame)
        if message["type"] == "snapshot":
            self.sequence, self.viewer, self.state = message["sequence"], message["viewer"], message["state"]
        elif message["type"] == "delta":
            assert message["sequence"] == self.sequence + 1, "a delta is missing"
            self.sequence += 1
            self.state |= message["set"]
            for name, items in message["append"].items():
                self._append(name, items)
        else:
            assert message["type"] == "response", message
            self.responses.setdefault(message["id"], []).append(message)
        return True

    def _append(self, name: str, items: list[Any]) -> None:
        if name != "history":
            self.state[name] = [*self.state[name], *items]
            return
        history = self.state["history"]
        for item in items:
            history["times"].append(item["time"])
            history["total"].append(item["total"])
            for group in history["io_groups"].keys() | item["rates"].keys():
                column = history["io_groups"].setdefault(group, [None] * (len(history["times"]) - 1))
                column.append(item["rates"].get(group))

    def until(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Take frames until `condition()` is true. Returns its value."""
        end = time.monotonic() + limit
        while not (found := condition()):
            left = end - time.monotonic()
            assert left > 0, f"after {limit:g} s still waiting: {what}"
            self.take(min(left, 0.5))
        return found

    def closed(self, limit: float = LIMIT) -> int:
        """Take frames until the server closes the socket. Returns the code."""
        end = time.monotonic() + limit
        try:
            while time.monotonic() < end:
                self.take(0.2)
        except ConnectionClosed as error:
            return error.rcvd.code if error.rcvd is not None else 1006
        raise AssertionError(f"the page is still open after {limit:g} s")

    def send(self, frame: Any) -> None:
        self.socket.send(frame if isinstance(frame, str) else json.dumps(frame))

    def watch(self, **what: Any) -> None:
        self.send({"type": "watch", **what})

    def ask(self, action: str, params: dict[str, Any] | None = None, **where: str) -> dict[str, Any]:
        """Make a request and return its last response; the earlier ones are in `responses`."""
        return self.last(self.request(action, params, **where))

    def request(self, action: str, params: dict[str, Any] | None = None, **where: str) -> str:
        """Make a request. Returns its id."""
        self._number += 1
        name = f"r{self._number}"
        self.send({"type": "request", "id": name, "action": action, "params": params or {}, **where})
        return name

    def last(self, name: str) -> dict[str, Any]:
        """Return the last response to a request, when it has come."""

        def found() -> dict[str, Any] | None:
            got = self.responses.get(name, [])
            return got[-1] if got and got[-1]["kind"] in ("result", "error") else None

        response: dict[str, Any] = self.until(found, f"the result of request {name}")
        return response


def is_open(server: int, client: int) -> bool:
    """Return whether the server's end of a connection between two ports of this host is open."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = f":{server:04X}", f":{client:04X}"
    return any(line[1].endswith(ends[0]) and line[2].endswith(ends[1]) and line[3] == "01" for line in lines)


def read_array(frame: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """Read a binary frame as the page does; pixel codes are u1, positions and quantities of files f4."""
    (size,) = struct.unpack_from("<I", frame)
    header = json.loads(frame[4 : 4 + size])
    assert header["coding"] == "deflate-raw"
    content = zlib.decompress(frame[4 + size :], -15)
    cells = int(np.prod(header["shape"]))
    dtype = "u1" if len(content) == cells else "<f4"
    return header, np.frombuffer(content, dtype).reshape(header["shape"])
