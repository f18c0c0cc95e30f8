"""The private file by which `larpixdaq up` and `web-link` find the web servers of this user on this host."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from larpixdaq.errors import ConfigError
from larpixdaq.keys.credentials import read_private, write_private
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.launcher import start_time


class WebServer(msgspec.Struct, frozen=True):
    """A running web server: its URL, the address of its core, and the token in the link of its own user."""

    url: str
    core: str
    token: str
    pid: int
    started: int

    @property
    def link(self) -> str:
        return f"{self.url}/login#{self.token}"


def private_file(port: int, what: str) -> Path:
    """Return the path of a private file of the web server at a port; of this host, since homes may be shared."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "host"
    return state_dir() / "web" / f"{host}-{port}.{what}.json"


@contextlib.contextmanager
def announced(port: int, url: str, core: str, token: str) -> Iterator[WebServer]:
    """Leave the file while the context lasts. FileError if it cannot be written."""
    path = private_file(port, "link")
    own = WebServer(url, core, token, os.getpid(), start_time(os.getpid()) or 0)
    write_private(path, msgspec.json.encode(own))
    try:
        yield own
    finally:
        with contextlib.suppress(OSError):
            if _read(path) == own:
                path.unlink()


def _read(path: Path) -> WebServer | None:
    data = read_private(path, 64 << 10)
    with contextlib.suppress(msgspec.MsgspecError, ValueError):
        return None if data is None else msgspec.json.decode(data, type=WebServer)
    return None


def running_servers() -> Iterator[WebServer]:
    """Yield the web servers of this user that run. A file that cannot be read is left out."""
    for path in sorted(private_file(0, "link").parent.glob("*.link.json")):
        with contextlib.suppress(OSError):
            found = _read(path)
            if found is not None and start_time(found.pid) == found.started:
                yield found


def find_server(core: str) -> WebServer:
    """Return the web server of the core at this address, or at one of several. ConfigError if there is none."""
    for found in running_servers():
        if set(core.split(",")) & set(found.core.split(",")):
            return found
    raise ConfigError(
        f"no web server of this user runs here for the core at {core}: start `larpixdaq-web`, or name another one with "
        "--url"
    )
