"""Commands `larpixdaq keys …`: invite other users and hosts, join with an invitation, list, revoke and rotate keys."""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from typing import Any, Final

import zmq

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.errors import ConfigError, NoCore, error_from_code, printable
from larpixdaq.keys import credentials
from larpixdaq.keys.credentials import Credentials
from larpixdaq.keys.curve import dealer, new_pair
from larpixdaq.keys.key_store import MAX_OPEN, ROLES
from larpixdaq.operator import Operator
from larpixdaq.protocol.control import MAX_REQUEST, Answer, Join, content, pack, unpack_core
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
        "It can be used once. Run this as the user, and on the host, of the core.",
    )
    action.add_argument(
        "name", type=config.parse_name, metavar="NAME", help="the component's --name, or a person's name"
    )
    action.add_argument(
        "--role",
        choices=ROLES,
        required=True,
        help="component: register under this name; operator: look and change; observer: look, never change",
    )
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
    with Operator(options.core) as operator:
        made = operator.invite(options.name, options.role, options.expires, options.address).result(timeout=_LIMIT)
    print(f"larpixdaq keys join {made['token']}")
    console = plain_console(stderr=True)
    console.print(
        f"run this command on the other host, or as the other user, before {utc(made['expires'])}; it can be used once"
    )
    if made["only_here"]:
        console.print(
            "the core listens at this host alone: other hosts need a core that was started with --address tcp://HOST"
        )
    return 0


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
    invitation = credentials.read_token(text)
    pair = new_pair()
    value = _ask(invitation, Join(public=pair.public, request="join"))
    name, role = str(value["name"]), str(value["role"])
    path = credentials.joined_file(invitation.address, name)
    credentials.write(path, Credentials(invitation.address, invitation.server, *pair, name, role))
    use = f"--core {invitation.address} --name {name!r}" if role == "component" else f"Operator({invitation.address!r})"
    print(f"joined as {role} {printable(name)}: {use} finds the key in {path}")
    return 0


def _ask(invitation: Credentials, message: Join) -> dict[str, Any]:
    """Send a message to the core with the key of an invitation, and return its result. Raises a LarpixDaqError."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        address, pair = invitation.address, invitation.pair
        socket, handshakes = dealer(context, address, MAX_REQUEST, own=pair, server=invitation.server)
        limit, sent = time.monotonic() + _LIMIT, False
        while time.monotonic() < limit:
            if failure := handshakes.look():
                why = "does not know this invitation" if failure == "key" else "is not the one that made this token"
                raise ConfigError(f"the core at {invitation.address} {why}: ask for a new invitation")
            if not sent and socket.poll(50, zmq.POLLOUT):
                socket.send(pack(message), zmq.NOBLOCK)
                sent = True
            if sent and socket.poll(50) and isinstance(answer := unpack_core(socket.recv()), Answer):
                if answer.kind == "error":
                    raise error_from_code(answer.error, answer.text)
                result: dict[str, Any] = content(answer)
                return result
        raise NoCore(f"no core answers at {invitation.address} (waited {_LIMIT:g} s)")
    except zmq.ZMQError as error:
        raise ConfigError(f"core address {invitation.address}: {error}") from None
    finally:
        context.destroy(0)
