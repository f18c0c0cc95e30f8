"""Addresses, ports, and arguments that several command lines share."""

from __future__ import annotations

import argparse
import getpass
import ipaddress
import os
import re
import socket
from typing import TYPE_CHECKING, Any, Final, NoReturn

from larpixdaq.errors import ConfigError, UsageError, printable
from larpixdaq.runtime.units import LEVEL_NAMES, parse_level

if TYPE_CHECKING:
    import zmq

CORE_PORT: Final = 5551
LOG_PORT: Final = 5678
WEB_PORT: Final = 5580
METRICS_PORT: Final = 5581
#: Ports of a broker, for clients and for the other brokers: those of NATS.
BROKER_PORT: Final = 4222
CLUSTER_PORT: Final = 6222
LOOPBACK: Final = "tcp://127.0.0.1"
LOG_ADDRESS: Final = f"{LOOPBACK}:{LOG_PORT}"
#: Milliseconds without progress until a connection is closed. Those of log and consumers have longer limits.
DEAD_CONNECTION: Final = 3000

#: An address that stands for any other host; nothing is sent to it.
_ELSEWHERE: Final = "tcp://192.0.2.1"

_TCP: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+)(?::(?P<port>\d{1,5}|\*))?")


def _split(text: str) -> tuple[str, str | None]:
    """Return host and port of `[tcp://]HOST[:PORT]`. Raises UsageError."""
    match = _TCP.fullmatch(text.removeprefix("tcp://"))
    if match is None:
        raise UsageError(f"address {text!r}: expected tcp://HOST[:PORT], an IPv6 address as in tcp://[::1]:5551")
    if match["host"].startswith("["):
        try:
            ipaddress.IPv6Address(match["host"][1:-1].partition("%")[0])
        except ValueError as error:
            raise UsageError(f"address {text!r}: {error}") from None
    port = match["port"]
    if port not in (None, "*") and int(port) > 65535:
        raise UsageError(f"address {text!r}: port {port} is above 65535")
    return match["host"], port


def address(text: str, default_port: int) -> str:
    """Return the ZeroMQ address of a text. `tcp://` and the port may be left out. Raises UsageError."""
    if text.startswith(("ipc://", "inproc://")):
        if text.endswith("//"):
            raise UsageError(f"address {text!r}: expected a path or a name after //")
        return text
    host, port = _split(text)
    return f"tcp://{host}:{default_port if port is None else port}"


def core_addresses(text: str) -> str:
    """Return the ZeroMQ addresses of one core, or of several that take over from each other, with commas between them.

    Raises UsageError.
    """
    return ",".join(dict.fromkeys(address(one.strip(), CORE_PORT) for one in text.split(",")))


def is_ipv6(full: str) -> bool:
    """Return whether the host of a ZeroMQ address is an IPv6 literal. Host names are looked up as IPv4."""
    return full.startswith("tcp://[")


def _ip(host: str, text: str) -> str:
    """Return the IP address of a host name, which a listening socket needs. `text`: the whole address, for errors."""
    if host == "*":
        return host
    bare = host.strip("[]")
    try:
        ipaddress.ip_address(bare.partition("%")[0])
        return host
    except ValueError:
        pass
    try:
        return str(socket.getaddrinfo(bare, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"address {text!r}: host {bare!r} is not known: {error.strerror or error}") from None


def listen_address(text: str, default_port: int) -> str:
    """Return the address for a listening socket, with the IP address of a host name."""
    full = address(text, default_port)
    if full.startswith(("ipc://", "inproc://")):
        return full
    host, port = _split(full)
    return f"tcp://{_ip(host, full)}:{port}"


def with_ip_address(full: str) -> str:
    """Return a ZeroMQ address with the IP address of its host name; unchanged if the name is not known."""
    if not full.startswith("tcp://"):
        return full
    host, _, port = full.removeprefix("tcp://").rpartition(":")
    try:
        return f"tcp://{_ip(host, full)}:{port}"
    except ConfigError:
        return full


def interface_towards(core: str) -> str:
    """Return the IP address of this machine's interface towards the core, 127.0.0.1 for a core on this machine.

    Of several cores, towards the first one that is not at 127.0.0.1.
    """
    addresses = core.split(",")
    core = next((one for one in addresses if not is_loopback(one)), addresses[0])
    if core.startswith(("ipc://", "inproc://")):
        return "127.0.0.1"
    host = _ip(_split(core)[0], core).strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, CORE_PORT))  # sends nothing
        except OSError as error:
            raise ConfigError(f"core address {core}: no way there: {error.strerror}") from None
        found = str(probe.getsockname()[0])
    return f"[{found}]" if ":" in found else found


def reachable_address(endpoint: str, core: str) -> str:
    """Return the address at which other processes reach a socket bound to `endpoint`, which may name all interfaces."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return endpoint
    host, port = _split(endpoint)
    if host in ("*", "0.0.0.0", "[::]"):
        host = interface_towards(core)
    return f"tcp://{host}:{port}"


def is_loopback(full: str) -> bool:
    """Return whether a ZeroMQ address with an IP address is one that only this host can reach."""
    if full.startswith(("ipc://", "inproc://")):
        return True
    host = _split(full)[0].strip("[]").partition("%")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def outside_address(endpoint: str) -> str:
    """Return the address under which other hosts probably reach a socket that listens at all interfaces."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return endpoint
    host, port = _split(endpoint)
    if host in ("*", "0.0.0.0", "[::]"):
        try:
            host = interface_towards(_ELSEWHERE)
        except ConfigError:  # there is no network
            host = socket.getfqdn()
    return f"tcp://{host}:{port}"


def process_identity() -> dict[str, Any]:
    """Return a description of this process: `pid`, `host` (host name), `user` (login name, or `uid` and the id)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this user id
        user = f"uid {os.getuid()}"
    return {"pid": os.getpid(), "host": socket.gethostname(), "user": user}


def close_dead_connections(socket: zmq.Socket[Any], after: int) -> None:
    """Let the kernel close connections whose peer is dead. Call it before bind() and connect().

    A connection is closed when the peer takes or acknowledges no data for `after` milliseconds, or when the connection
    is idle and the peer does not answer for 25 s. The heartbeats of libzmq are not used, because libzmq 4.3.5 aborts
    the process (`Assertion failed: !_io_error`) when a heartbeat is due on a connection whose input queue was full when
    its peer died.
    """
    import zmq  # late, so that programs without sockets start faster

    socket.setsockopt(zmq.TCP_MAXRT, after)  # TCP_USER_TIMEOUT; also for a peer whose window stays closed
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)


class ArgumentParser(argparse.ArgumentParser):
    """Parser of a command line whose errors are one line, because the usage of some commands has forty."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, printable(f"{self.prog}: error: {message}; `{self.prog} --help` shows the options") + "\n")


def add_core_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--core",
        default=LOOPBACK,
        metavar="ADDRESS",
        help="The address of the DAQ Core, not including port number "
        f"(default %(default)s; a port that is given replaces {CORE_PORT}); with a second core that takes over, both: "
        "ADDRESS,ADDRESS",
    )


def parse_name(text: str) -> str:
    """Check the name of a component or key, which must fit into messages, files and the ring. Raises
    ArgumentTypeError."""
    if not 1 <= len(text.encode("utf-8", "replace")) <= 64 or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected a name of 1 to 64 printable characters, found {text[:80]!r}")
    if text == "core":
        raise argparse.ArgumentTypeError("core is the name of the core")
    return text


def parse_module(text: str) -> str:
    """Check the name of a module as parse_name() does; "" is none. Raises ArgumentTypeError."""
    return parse_name(text) if text else ""


def add_insecure_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="use no keys: everybody who can connect can control the detector and read its data",
    )


def add_address_argument(parser: argparse.ArgumentParser, default: str | None = LOOPBACK, more: str = "") -> None:
    shown = f" (default {default})" if default else ""
    parser.add_argument(
        "--address", default=default, metavar="ADDRESS", help=f"base address for ZMQ connections{shown}{more}"
    )


def add_log_address_argument(parser: argparse.ArgumentParser, default: str | None = LOG_ADDRESS) -> None:
    shown = default or f"the host of the core's address, port {LOG_PORT}"
    parser.add_argument(
        "--log-address", default=default, metavar="ADDRESS", help=f"Address to connect to global log (default {shown})"
    )


def add_state_dir_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="directory for run catalogue, keys and log (default $XDG_STATE_HOME/larpixdaq)",
    )


def add_log_level_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level",
        type=parse_level,
        default="INFO",
        metavar="LEVEL",
        help=f"level from which on it logs: {LEVEL_NAMES} (default info); `larpixdaq log-level` changes it",
    )


def add_name_argument(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument("--name", type=parse_name, default=name, help=f"{what} (default %(default)r)")


def add_component_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the arguments of every component: --core, --name, --module, --insecure, --log-level."""
    add_core_argument(parser)
    add_name_argument(parser, name, "unique name of this component")
    parser.add_argument(
        "--module",
        type=parse_module,
        default="",
        metavar="NAME",
        help="part of the detector under which `status` and the page show this component (default: none; then it is "
        "its host where there are many components)",
    )
    add_insecure_argument(parser)
    add_log_level_argument(parser)
