"""Command `larpixdaq web-link`: print a link with which a viewer logs in to the web page."""

from __future__ import annotations

import argparse
import secrets
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.errors import UsageError
from larpixdaq.keys.key_store import MAX_OPEN
from larpixdaq.operator import Operator
from larpixdaq.runtime.units import parse_positive_duration, utc
from larpixdaq.web.links import find_server

#: Maximum seconds until the core has answered.
_LIMIT: Final = 5.0


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "web-link",
        help="print a link that logs a viewer in to the web page",
        description="Prints a link with which somebody logs in to the web page, once. The viewer gets a key of this "
        "name, which `larpixdaq keys list` shows and `larpixdaq keys revoke` takes back. Run this as the user, and on "
        "the host, of the core.",
    )
    parser.add_argument(
        "--role",
        choices=("operator", "observer"),
        default="observer",
        help="operator: look and change; observer: look, never change (default)",
    )
    parser.add_argument("--name", default="", metavar="NAME", help="the viewer's name, for log and audit")
    parser.add_argument(
        "--expires",
        type=partial(parse_positive_duration, most=MAX_OPEN),
        default=600.0,
        metavar="TIME",
        help="how long it can be used (default 10min)",
    )
    parser.add_argument(
        "--url",
        default="",
        metavar="URL",
        help="of the web server, as browsers reach it (default: that of the one which runs on this host)",
    )
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.set_defaults(function=web_link)


def web_link(options: argparse.Namespace) -> int:
    core = config.core_addresses(options.core)
    if options.url and (urlsplit(options.url).scheme not in ("http", "https") or not urlsplit(options.url).hostname):
        raise UsageError(f"--url {options.url}: expected http://HOST or https://HOST")
    console = plain_console(stderr=True)
    if options.insecure:
        print(find_server(core).link)
        console.print("without keys everybody with this link may change things, until the web server is started again")
        return 0
    url = options.url.rstrip("/") or find_server(core).url
    name = options.name or f"{options.role}-{secrets.token_hex(3)}"
    with Operator(core) as operator:
        made = operator.invite(name, options.role, options.expires).result(timeout=_LIMIT)
    print(f"{url}/login#{made['token']}")
    console.print(f"logs in as {options.role} {name!r}, once, before {utc(made['expires'])}", markup=False)
    return 0
