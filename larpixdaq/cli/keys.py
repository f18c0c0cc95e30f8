"""Commands `larpixdaq keys …`: invite other users and hosts, join with an invitation, list, revoke and rotate keys."""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.control.connection import join_core
from larpixdaq.errors import ConfigError, RequestError, UsageError, printable
from larpixdaq.keys import credentials
from larpixdaq.keys.credentials import Credentials
from larpixdaq.keys.key_store import MAX_OPEN, ROLES
from larpixdaq.operator import Operator
from larpixdaq.runtime.units import parse_positive_duration, utc

#: Maximum seconds until a core has answered.
_LIMIT: Final = 5.0
#: Maximum seconds until connected members have stored the core's new key.
_INFORMED: Final = 2.0
#: Maximum bytes of a token that are read from standard input.
_LONGEST_TOKEN: Final = 4096


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "keys",
        help="who may connect: invite, join, list, revoke, rotate",
        description="On its own host, the user who started the core needs no keys: its components and Operators find "
        "them. Other users and other hosts need an invitation.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser(
        "invite",
        help="print a token for another user or host",
        description="Prints a token, with which `larpixdaq keys join` gets a key on another host, or as another user. "
        "It can be used once. Run this as the user, and on the host, of the core. With --host, the token is for all "
        "components that a host of a configuration file runs.",
    )
    action.add_argument(
        "name",
        metavar="NAME",
        help="the component's --name, or a person's name; with --host, the configuration file, such as detector.toml",
    )
    action.add_argument(
        "--role",
        choices=ROLES,
        help="component: register under this name; operator: look and change; observer: look, never change",
    )
    action.add_argument("--host", metavar="HOST", help="a host of the configuration file, all of whose components join")
    action.add_argument(
        "--expires",
        type=partial(parse_positive_duration, most=MAX_OPEN),
        default=600.0,
        metavar="TIME",
        help="how long it can be used (default 10min)",
    )
    action.add_argument(
        "--address",
        default="",
        metavar="ADDRESS",
        help="the core's address for the other host, if it listens at several (default: the one that it listens at)",
    )
    config.add_core_argument(action)
    action.set_defaults(function=invite)
    action = actions.add_parser(
        "join",
        help="get a key with a token",
        description="Makes a key on this host, for this user, and has the core accept it. After that components of "
        "this name, or Operators, find the key by the core's address.",
    )
    action.add_argument(
        "token",
        metavar="TOKEN",
        nargs="*",
        help="as `larpixdaq keys invite` has printed it; without it, a line of standard input, because other users of "
        "this host can see command lines",
    )
    action.set_defaults(function=join)
    action = actions.add_parser("list", help="the keys and open invitations", description="Lists who has a key.")
    action.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    config.add_core_argument(action)
    action.set_defaults(function=show)
    action = actions.add_parser(
        "revoke",
        help="take a key or an invitation back",
        description="Takes the key, or the open invitation, of a name back. Its connections are closed at once.",
    )
    action.add_argument("name", metavar="NAME")
    config.add_core_argument(action)
    action.set_defaults(function=revoke)
    action = actions.add_parser(
        "rotate",
        help="new keys for the core and its user",
        description="Makes new key pairs for the core and its user, which count from the next start of the core on; "
        "stop the core and start it again, also during a run. Processes of the core's user find the new keys. All who "
        "were invited keep their keys, and store the core's new one if they are connected at some time before that "
        "start. Those who have not stored it are listed: afterwards they need a new invitation.",
    )
    config.add_core_argument(action)
    action.set_defaults(function=rotate)


def invite(options: argparse.Namespace) -> int:
    if options.host is not None:
        return _invite_host(options)
    if options.role is None:
        raise UsageError("--role is missing, or --host with a configuration file")
    try:
        name = config.parse_name(options.name)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"NAME: {error}") from None
    with Operator(options.core) as operator:
        made = operator.invite(name, options.role, options.expires, options.address).result(timeout=_LIMIT)
    _show_token(made["token"], "the other host, or as the other user,", made)
    return 0


def _invite_host(options: argparse.Namespace) -> int:
    """Invite all components that a host of a configuration file runs and that have no key yet, with one token."""
    from larpixdaq.cli.detector import PROGRAMS  # late, because it imports all programs
    from larpixdaq.detector_config import DetectorConfig

    if options.role is not None or options.core != config.LOOPBACK:
        raise UsageError("--host goes without --role and --core, which follow from the configuration file")
    file = DetectorConfig(Path(options.name), PROGRAMS)
    host = file.find_host(options.host)
    if host == file.core_host:
        raise ConfigError(f"{file.path}: {host} is the host of the core, whose user needs no keys there")
    names = file.members(host)
    with Operator(file.core_address(file.core_host)) as operator:
        members = operator.keys().result(timeout=_LIMIT)["members"]
        known = [name for name in names if any((one["name"], one["role"]) == (name, "component") for one in members)]
        invited = [name for name in names if name not in known]
        if not invited:
            raise ConfigError(
                f"all components of {host} have keys: {', '.join(names)}; `larpixdaq keys revoke NAME` takes one back"
            )
        address = options.address or file.core_address(host).partition(",")[0]
        answers = [
            operator.invite(name, "component", options.expires, address).result(timeout=_LIMIT) for name in invited
        ]
    found = [credentials.read_token(answer["token"])[0] for answer in answers]
    token = credentials.make_token(found[0].address, found[0].server, *(one.pair for one in found))
    _show_token(token, host, answers[0])
    with_keys = f"; {', '.join(known)} have keys already" if known else ""
    plain_console(stderr=True).print(printable(f"it is for {', '.join(invited)}{with_keys}"))
    return 0


def _show_token(token: str, where: str, made: dict[str, Any]) -> None:
    """Print the command that uses a token. `made`: answer of the core."""
    print(f"larpixdaq keys join {token}")
    console = plain_console(stderr=True)
    console.print(f"run this command on {where} before {utc(made['expires'])}; it can be used once")
    if made["only_here"]:
        console.print(
            "the core listens at this host alone: other hosts need a core that was started with --address tcp://HOST"
        )


def show(options: argparse.Namespace) -> int:
    with Operator(options.core) as operator:
        keys = operator.keys().result(timeout=_LIMIT)
    if options.json:
        print(json.dumps(keys))
        return 0
    for member in keys["members"]:
        problem = "" if member["informed"] else f"; {_uninformed(keys)}"
        print(f"{printable(member['name'])}: {member['role']}, since {utc(member['since'])}{problem}")
    for invitation in keys["invitations"]:
        name = printable(invitation["name"])
        print(f"{name}: invited as {invitation['role']}, open until {utc(invitation['expires'])}")
    if not keys["members"] and not keys["invitations"]:
        print("nobody was invited; the core's own user needs no key here")
    if keys["rotates"]:
        print("the core and its user have new keys from the core's next start on")
    return 0


def _uninformed(keys: dict[str, Any]) -> str:
    again = "a new invitation (larpixdaq keys revoke, invite)"
    if keys["rotates"]:
        return f"does not know the core's new key: it must connect before the core's next start, or needs {again}"
    return f"does not know the core's key: it needs {again}"


def rotate(options: argparse.Namespace) -> int:
    with Operator(options.core) as operator:
        keys = operator.rotate().result(timeout=_LIMIT)
        limit = time.monotonic() + _INFORMED
        while time.monotonic() < limit and not all(member["informed"] for member in keys["members"]):
            time.sleep(0.1)
            keys = operator.keys().result(timeout=_LIMIT)
    print("the core and its user have new keys from the core's next start on: stop it and start it again")
    for member in keys["members"]:
        says = "knows the core's new key" if member["informed"] else _uninformed(keys)
        print(f"{printable(member['name'])}: {says}")
    for invitation in keys["invitations"]:
        print(f"{printable(invitation['name'])}: the invitation can be used until then")
    return 0


def revoke(options: argparse.Namespace) -> int:
    with Operator(options.core) as operator:
        operator.revoke(options.name).result(timeout=_LIMIT)
    print(f"{printable(options.name)} has no key any more")
    return 0


def join(options: argparse.Namespace) -> int:
    text = "".join(options.token)
    if not text:
        if sys.stdin.isatty():
            print("token: ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.buffer.readline(_LONGEST_TOKEN).decode("utf-8", "replace")
    problems = []
    for invitation in credentials.read_token(text):
        try:
            _join_one(invitation)
        except RequestError as error:  # the others are open nevertheless
            problems.append(error)
    if problems:
        raise RequestError("; ".join(map(str, problems)))
    return 0


def _join_one(invitation: Credentials) -> None:
    own = join_core(invitation)
    path = credentials.joined_file(own.address, own.name)
    credentials.write(path, own)
    use = f"--core {own.address} --name {own.name!r}" if own.role == "component" else f"Operator({own.address!r})"
    print(f"joined as {own.role} {printable(own.name)}: {use} finds the key in {path}", flush=True)
