"""The web server: the detector live in a browser, `larpixdaq-web`.

This module has its command line alone, which needs no package of the extra [web].
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import socket
from typing import Final
from urllib.parse import urlsplit

from larpixdaq import config
from larpixdaq.errors import ConfigError, UsageError
from larpixdaq.runtime.event_loop import run_main
from larpixdaq.runtime.units import parse_whole

#: Packages of the extra [web] that the server imports.
EXTRA: Final = ("bokeh", "starlette", "uvicorn", "websockets")


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-web",
        description="Shows the detector live in a browser, and controls it from there. It prints a link with which its "
        "user logs in; `larpixdaq web-link` makes links for others (docs/web.md).",
    )
    config.add_core_argument(parser)
    parser.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="host name or IP address at which it listens, with or without a port (default 127.0.0.1, port "
        f"{config.WEB_PORT}); other than loopback only if the core uses keys",
    )
    parser.add_argument(
        "--url",
        default="",
        metavar="URL",
        help="under which browsers reach it, if a reverse proxy stands before it, such as https://daq.example.org",
    )
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="IP",
        help="address of a reverse proxy whose --trusted-header names the viewer; can be given several times",
    )
    parser.add_argument(
        "--trusted-header", default="", metavar="NAME", help="header with the viewer's name, such as X-Remote-User"
    )
    parser.add_argument(
        "--proxy-operator",
        action="append",
        default=[],
        metavar="NAME",
        help="this viewer of a trusted proxy may change things, the others only look; can be given several times",
    )
    parser.add_argument(
        "--max-viewers",
        type=lambda text: parse_whole(text, 1, 1000),
        default=100,
        metavar="N",
        help="open pages at the same time, of all viewers (default %(default)s)",
    )
    config.add_insecure_argument(parser)
    return parser


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of `--address`. UsageError if it is not an address."""
    full = config.address(text.removeprefix("http://").rstrip("/"), config.WEB_PORT).removeprefix("tcp://")
    host, _, port = full.rpartition(":")
    if not port.isdecimal():
        raise UsageError(f"--address {text}: expected HOST[:PORT]")
    return host.strip("[]").replace("*", "0.0.0.0"), int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host) if ":" not in host else host).is_loopback
    except (OSError, ValueError):
        return False


def check(options: argparse.Namespace) -> None:
    """UsageError for options that cannot work, ConfigError if a package of the extra [web] is missing."""
    host, _ = split_address(options.address)
    if options.insecure and not is_loopback(host):
        raise UsageError(f"--address {host}: other hosts could control the detector: not with --insecure")
    if options.url and (urlsplit(options.url).scheme not in ("http", "https") or not urlsplit(options.url).hostname):
        raise UsageError(f"--url {options.url}: expected http://HOST or https://HOST")
    if bool(options.trusted_proxy) != bool(options.trusted_header):
        raise UsageError("--trusted-proxy and --trusted-header go together")
    if options.insecure and options.trusted_proxy:
        raise UsageError("--trusted-proxy: without keys every viewer may change things: not with --insecure")
    if options.proxy_operator and not options.trusted_proxy:
        raise UsageError("--proxy-operator goes with --trusted-proxy and --trusted-header")
    for proxy in options.trusted_proxy:
        try:
            ipaddress.ip_address(proxy)
        except ValueError:
            raise UsageError(f"--trusted-proxy {proxy}: expected an IP address") from None
    for package in EXTRA:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f'{package} is not installed: pip install "larpix-daq[web]"')


def main(argv: list[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)

    def run() -> None:
        check(options)
        from larpixdaq.web import server  # late, because it needs the extra

        server.serve(options)

    return run_main(run)
