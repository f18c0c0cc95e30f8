"""The configuration file of a detector (TOML), checked, and the processes that it describes.

`larpixdaq config` shows a file as it is understood; config_schema.py has its tables and keys.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, NoReturn, get_args, get_origin

import msgspec
from msgspec import UNSET

from larpixdaq import config
from larpixdaq.config_schema import (
    STREAM_SETTINGS,
    Board,
    File,
    Program,
    all_options_of,
    expected,
    file_type,
    options_of,
    without_unset,
)
from larpixdaq.constants import MIN_FREE
from larpixdaq.errors import ConfigError, LarpixDaqError, advice
from larpixdaq.runtime.file_access import read_regular
from larpixdaq.runtime.launcher import Wanted
from larpixdaq.runtime.units import size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Maximum bytes of a file.
_LARGEST: Final = 256 << 10
#: Options of processes that name a directory which must exist.
_DIRECTORIES: Final = ("output-dir", "routines", "ring-dir", "lock-dir", "directory")
#: The keys that count where a table of a process does not have its own, the first one that is in the file.
_INHERITED: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "host": (("core", "host"),),
    "output-dir": (("detector", "output-dir"),),
    "stream": (("detector", "stream"), ("brokers", "hosts"), ("brokers",)),
    "stream-password-file": (("brokers", "password-file"),),
    "stream-ca": (("brokers", "tls-ca"),),
    **{key: (("brokers", key),) for key in STREAM_SETTINGS},
}
#: Tables of the processes that use the brokers.
_STREAMING: Final = ("producers", "storages", "monitors")
_CORES: Final = ("core", "standby")
#: Options of a process whose default is in other tables, and not that of the program.
_DERIVED: Final = (
    "address", "output-dir", "asic", "module", "stream", "stream-password-file", "stream-ca", *STREAM_SETTINGS,
)  # fmt: skip
#: A board's address, and the port of its data where the address has none.
_BOARD_ADDRESS: Final = re.compile(r"(?:tcp://)?(?P<host>\[[^]]*\]|[^:]+)(?::(?P<data>\d+))?")
_BOARD_DATA_PORT: Final = 5556
#: Keys of a board for power_up, and those under which --power-settings has them.
_POWER_KEYS: Final = {
    "tiles": "io_group_pacman_tile_", "vdda_dac": "iog_VDDA_DAC", "vddd_dac": "iog_VDDD_DAC",
    "limits": "power_limits", "inverted": "line_inversion",
}  # fmt: skip
_WHERE: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
Keys = tuple[str, ...]


class Component(NamedTuple):
    """A process of the file. `keys`: its table, whose content is `table`. `options`: its values by long option, from
    this table and from others."""

    program: Program
    keys: Keys
    table: Mapping[str, Any]
    name: str
    host: str
    options: dict[str, Any]


def _paths(table: Mapping[str, Any]) -> Iterator[Keys]:
    for key, value in table.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _paths(value))


def find_lines(text: str) -> dict[Keys, int]:
    """Return the line of each table and key of a valid TOML text, from 1.

    The parser does not tell lines. So each statement is parsed alone, with as many lines as it needs to be valid.
    """
    found: dict[Keys, int] = {}
    table: Keys = ()
    lines = text.split("\n")
    begin = 0
    for end in range(1, len(lines) + 1):
        statement = "\n".join(lines[begin:end])
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        header = statement.startswith("[", len(statement) - len(statement.lstrip()))
        paths = list(_paths(parsed))
        for keys in paths:
            found.setdefault(keys if header else (*table, *keys), begin + 1)
        if header:
            table = paths[-1]
        begin = end
    return found


def _parse_toml(path: Path) -> tuple[str, dict[str, Any], dict[Keys, int]]:
    """Read a file once. Returns its text, its content and the line of each key. Raises FileError and ConfigError."""
    data = read_regular(path, _LARGEST)
    try:
        text = data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: expected UTF-8, found the byte 0x{data[error.start]:02x}") from None
    try:
        return text, tomllib.loads(text), find_lines(text)
    except tomllib.TOMLDecodeError as error:
        match = _WHERE.search(str(error))
        line = int(match[1]) if match is not None and match[1] else text.rstrip("\n").count("\n") + 1
        raise ConfigError(f"{path}:{line}: not TOML: {_WHERE.sub('', str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path}:1: not TOML: too many brackets in each other") from None


def _text(value: Any) -> str:
    """Return a value of the file as an argument of a command line."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _arguments(key: str, action: argparse.Action, value: Any) -> list[str]:
    """Return the arguments that give an option a value."""
    if value is False:
        return []
    if value is True:
        return [f"--{key}"]
    if action.nargs == "+":
        return [f"--{key}", *map(_text, value)]
    return [f"--{key}={_text(one)}" for one in (value if isinstance(value, list) else [value])]


def _parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. Raises ConfigError in place of ending the process."""

    def fail(message: str) -> NoReturn:
        raise ConfigError(message)

    vars(parser)["error"] = fail
    return parser.parse_args(arguments)


class DetectorConfig:
    """A configuration file, checked. `components`: its processes in the order of starting.

    Every ConfigError is one line with the file, the line and the key.
    """

    def __init__(self, path: Path, programs: Sequence[Program]) -> None:
        """Read a file once. Raises FileError if it cannot be read, and ConfigError."""
        self.path = path.absolute()
        self.programs = programs
        self.text, self._content, self._lines = _parse_toml(self.path)
        self._check(self._content, file_type(programs), ())
        file = msgspec.convert(self._content, File)
        self.detector, self.hosts, self.boards = file.detector, file.hosts, file.boards
        self.routines, self.alarms = file.routines, file.alarms
        self._file = file
        if not file.producers:
            raise ConfigError(f"{self.path}:1: expected a table [producers.NAME], found none")
        self.core_host = str(file.core.get("host", next(iter(self.hosts), "")))
        self.broker_hosts = self._broker_hosts()
        self.stream = self._stream()
        self.components = [component for program in programs for component in self._components(program)]
        self._check_names()
        self._check_boards()
        ports = self._check_addresses()
        for component in self.components:
            self._check_options(component, ports)

    @property
    def directory(self) -> Path:
        """Directory of the file, from which relative paths in it count."""
        return self.path.parent

    @property
    def core(self) -> Component:
        return next(component for component in self.components if component.program.table == "core")

    @property
    def cores(self) -> list[Component]:
        """The core, and the second core if there is one."""
        return [component for component in self.components if component.program.table in _CORES]

    def where(self, *keys: str) -> str:
        """Return `FILE:LINE` of a key, or of the innermost table around it that is in the file."""
        while keys and keys not in self._lines:
            keys = keys[:-1]
        return f"{self.path}:{self._lines.get(keys, 1)}"

    def fail(self, keys: Keys, text: str) -> NoReturn:
        """Raise the ConfigError for a key."""
        raise ConfigError(f"{self.where(*keys)}: {_dotted(keys)}: {text}")

    # Checks.

    def _check(self, value: Any, kind: Any, keys: Keys) -> None:
        """Check types, limits and names of keys."""
        kind = without_unset(kind)
        if get_origin(kind) is Annotated and get_origin(table := without_unset(get_args(kind)[0])) is dict:
            kind = table  # whose keys are checked one by one, so that the error names the wrong one
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
            self._check_table(value, keys)
            for key in value:
                if key not in fields:
                    self._unknown((*keys, key), list(fields))
            for key, field in fields.items():
                if key in value:
                    self._check(value[key], field.type, (*keys, key))
                elif field.required:
                    self.fail(keys, f"the key {key} is missing: {expected(field.type)}")
        elif get_origin(kind) is dict:
            self._check_table(value, keys)
            for name, part in value.items():
                self._check(part, get_args(kind)[1], (*keys, name))
        else:
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError:
                self.fail(keys, f"expected {expected(kind)}, found {_shown(value)}")

    def _check_table(self, value: Any, keys: Keys) -> None:
        if not isinstance(value, dict):
            self.fail(keys, f"expected a table, found {_shown(value)}")

    def _unknown(self, keys: Keys, known: Sequence[str]) -> NoReturn:
        what = "key" if len(keys) > 1 else "table"
        self.fail(keys, f"unknown {what}; {advice(keys[-1].replace('_', '-').lower(), known, 'expected one of')}")

    def _components(self, program: Program) -> Iterator[Component]:
        tables = getattr(self._file, program.table)
        if program.by_host:
            for host in self.broker_hosts:
                name = f"Broker {host}".strip()
                yield Component(program, (program.table,), tables, name, host, self._broker(host))
            return
        if not program.many:
            if tables is UNSET:
                return
            default = program.table if program.table in _CORES else program.module
            name = str(tables.get("name", program.parser().get_default("name") or default))
            yield self._component(program, (program.table,), name, tables)
            return
        if tables is UNSET:  # one with the default name
            tables = {program.parser().get_default("name"): {}}
        for name, table in tables.items():
            keys = program.table, name
            first = self._component(program, keys, name, table)
            yield first
            hosts = table.get("standby-hosts", [])
            if hosts and not first.options.get("stream"):
                self.fail((*keys, "standby-hosts"), "needs brokers: [brokers], or `stream` in [detector]")
            for number, host in enumerate(hosts):
                if host in (first.host, *hosts[:number]):
                    self.fail((*keys, "standby-hosts"), f"host {host!r} twice")
                yield self._component(program, keys, name, {**table, "host": host})

    def _component(self, program: Program, keys: Keys, name: str, table: Mapping[str, Any]) -> Component:
        host = str(table.get("host", self.core_host))
        if host not in self.hosts and (host or self.hosts):
            known = ", ".join(self.hosts) or "none: there is no table [hosts.NAME]"
            self.fail((*keys, "host"), f"unknown host {host!r}; the hosts are {known}")
        options = {key: value for key, value in table.items() if key not in ("host", "boards", "standby-hosts")}
        if "module" in options_of(program) and (module := self.module(host)):
            options.setdefault("module", module)
        if "standby-hosts" in table:
            options["standby"] = True
        second = program.table in _CORES and self._file.standby is not UNSET
        if "stream" not in table and (program.table in _STREAMING or second):
            actions = options_of(program)
            options |= {key: value for key, value in self._stream_options().items() if key in actions} | options
        if program.table == "storages":
            options.setdefault("output-dir", self.detector.output_dir)
        elif program.table in (*_CORES, "log"):
            options.setdefault("address", self._default_address(host))
            if second:
                options["standby"] = True
                if "stream" not in options:
                    self.fail(("standby",), "needs the brokers of a table [brokers], or stream in [detector]")
                if program.table == "standby" and host == self.core_host:
                    where = f"on {host!r}" if host else "on this one"
                    self.fail(("standby", "host"), f"expected another host than that of the core, which is {where}")
        elif program.table == "producers":
            options.update(self._board_options(keys, table))
            if routines := [*table.get("routines", []), *self.routines.directories]:
                options["routines"] = routines
        return Component(program, keys, table, name, host, options)

    def _broker_hosts(self) -> list[str]:
        """Return the hosts that have a broker."""
        if self._file.brokers is UNSET:
            return []
        hosts: list[str] = self._file.brokers.get("hosts", [self.core_host])
        for number, host in enumerate(hosts):
            if host not in self.hosts and (host or self.hosts):
                known = ", ".join(self.hosts) or "none: there is no table [hosts.NAME]"
                self.fail(("brokers", "hosts"), f"unknown host {host!r}; the hosts are {known}")
            if host in hosts[:number]:
                self.fail(("brokers", "hosts"), f"host {host!r} twice")
        if len(hosts) % 2 == 0:
            self.fail(("brokers", "hosts"), f"expected an odd number, because a majority decides, found {len(hosts)}")
        replicas = str(self._file.brokers.get("stream-replicas", ""))
        if replicas.isdecimal() and int(replicas[:9]) > len(hosts):
            self.fail(("brokers", "stream-replicas"), f"expected at most the {len(hosts)} brokers, found {replicas}")
        return hosts

    def _broker(self, host: str) -> dict[str, Any]:
        """Return the options of the broker on a host."""
        assert self._file.brokers is not UNSET
        options = {
            key: value for key, value in self._file.brokers.items() if key != "hosts" and key not in STREAM_SETTINGS
        }
        options["server-name"] = host.replace(".", "-") or "broker"
        options["listen"] = self._broker_address(host)
        if len(self.broker_hosts) > 1:
            port = options.get("cluster-port", config.CLUSTER_PORT)
            options["peers"] = [f"{self._broker_address(other)}:{port}" for other in self.broker_hosts]
        return options

    def _broker_address(self, host: str) -> str:
        return "127.0.0.1" if len(self.hosts) < 2 else self.host_address(host)

    def _stream(self) -> str:
        """Return the address of all brokers, as --stream takes it; empty if there are none."""
        if not self.broker_hosts:
            return self.detector.stream
        if self.detector.stream:
            self.fail(("detector", "stream"), "the brokers of [brokers] are the stream's: leave one of both out")
        assert self._file.brokers is not UNSET
        port = self._file.brokers.get("port", config.BROKER_PORT)
        return "nats://" + ",".join(f"{self._broker_address(host)}:{port}" for host in self.broker_hosts)

    def _stream_options(self) -> dict[str, Any]:
        """Return the options by which components reach the brokers of the file."""
        if not self.stream:
            return {}
        options = {"stream": self.stream}
        if self._file.brokers is not UNSET:
            table = self._file.brokers
            keys = [("stream-password-file", "password-file"), ("stream-ca", "tls-ca")]
            keys += [(key, key) for key in STREAM_SETTINGS]
            options |= {option: table[key] for option, key in keys if key in table}
        return options

    def _default_address(self, host: str) -> str:
        return config.LOOPBACK if len(self.hosts) < 2 else f"tcp://{self.host_address(host)}"

    def host_address(self, host: str) -> str:
        """Return the name or IP address of a host; IPv6 addresses in brackets."""
        address = (self.hosts[host].address or host) if host else "127.0.0.1"
        return f"[{address}]" if ":" in address and not address.startswith("[") else address

    def _board_options(self, keys: Keys, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a producer for its `boards`."""
        boards: dict[str, Board] = {}
        for name in table.get("boards", ()):
            if name not in self.boards:
                self.fail((*keys, "boards"), f"unknown board {name!r}; {advice(name, self.boards, 'the boards are')}")
            if name in boards:
                self.fail((*keys, "boards"), f"board {name!r} twice")
            boards[name] = self.boards[name]
        if not boards:
            return {}
        kinds = {board.kind for board in boards.values()}
        if len(kinds) > 1:
            self.fail((*keys, "boards"), "a producer reads boards of one kind: found bern and pacman")
        kind = kinds.pop()
        options: dict[str, Any] = {kind: [f"{board.io_group}={board.address}" for board in boards.values()]}
        if power := self._power_settings(boards):
            if "power-settings" in table:
                self.fail((*keys, "power-settings"), "the boards have settings of their own: leave one of both out")
            options["power-settings"] = json.dumps(power)
        for key in ("bern", "pacman", "pacman-revision", "pacman-uarts"):
            if key in table:
                self.fail((*keys, key), "is given by the boards: leave it out")
        for name, board in boards.items():
            for key, value in (("revision", board.revision), ("uarts", board.uarts)):
                if value is UNSET:
                    continue
                if kind != "pacman":
                    self.fail(("boards", name, key), f"is for PACMAN boards only, not for kind {kind}")
                options.setdefault(f"pacman-{key}", []).append(f"{board.io_group}={value}")
            if board.asic is not UNSET:
                asic = options.setdefault("asic", table.get("asic", board.asic))
                if asic != board.asic:
                    self.fail(
                        ("boards", name, "asic"),
                        f"expected {asic} as for other boards of {_dotted(keys)}, found {board.asic}",
                    )
        return options

    def _power_settings(self, boards: Mapping[str, Board]) -> dict[str, dict[str, Any]]:
        """Return the settings of boards for power_up, as --power-settings takes them. There tiles count from 1."""
        settings: dict[str, dict[str, Any]] = {}
        for name, board in boards.items():
            for key, theirs in _POWER_KEYS.items():
                value = getattr(board, key)
                if value is UNSET:
                    continue
                if board.kind != "pacman":
                    where = ("boards", name, key.replace("_", "-"))
                    self.fail(where, f"is for PACMAN boards only, not for kind {board.kind}")
                value = [tile + 1 for tile in value] if key == "tiles" else value
                settings.setdefault(theirs, {})[str(board.io_group)] = value
        return settings

    def _check_names(self) -> None:
        known: dict[str, Component] = {}
        for component in self.components:
            if component is not self.core:
                try:
                    config.parse_name(component.name)
                except argparse.ArgumentTypeError as error:
                    self.fail(component.keys, str(error))
            if (other := known.get(component.name)) is not None and other.keys != component.keys:
                self.fail(component.keys, f"the name {component.name!r} is that of {self._place(other.keys)} already")
            known[component.name] = component

    def _check_boards(self) -> None:
        groups: dict[int, Keys] = {}
        for name, board in self.boards.items():
            keys = "boards", name, "io-group"
            if (other := groups.get(board.io_group)) is not None:
                self.fail(keys, f"io_group {board.io_group} is that of {self._place(other)} already")
            groups[board.io_group] = keys
        readers: dict[str, Keys] = {}
        addresses: dict[tuple[str, str, int], Keys] = {}  # by host that reads: a board may be an emulator on it
        for producer, table in self._file.producers.items():
            keys = "producers", producer, "boards"
            for board_name in table.get("boards", ()):
                if (other := readers.get(board_name)) is not None:
                    self.fail(keys, f"board {board_name!r} is read by {self._place(other)} already")
                readers[board_name] = keys
                if board_name in self.boards:
                    self._check_board_address(board_name, str(table.get("host", self.core_host)), addresses)

    def _check_board_address(self, name: str, host: str, known: dict[tuple[str, str, int], Keys]) -> None:
        """Check that no board is read twice, because its packets would be in the file twice."""
        keys = "boards", name, "address"
        parts = _BOARD_ADDRESS.match(self.boards[name].address)
        assert parts is not None  # by the pattern in config_schema
        address = host, parts["host"], int(parts["data"] or _BOARD_DATA_PORT)
        if (other := known.get(address)) is not None:
            self.fail(keys, f"{address[1]}, port {address[2]}, is that of {self._place(other)} already")
        known[address] = keys

    def _check_addresses(self) -> dict[tuple[str, str], Keys]:
        """Check that no two processes of a host listen at the same port. Returns the keys by host and port."""
        ports: dict[tuple[str, str], Keys] = {}
        for component in self.components:
            if "address" not in component.options or component.program.table == "emulators":  # which has an IP address
                continue
            keys = (*component.keys, "address")
            try:
                full = config.address(component.options["address"], _default_port(component))
            except ConfigError as error:
                self.fail(keys, str(error))
            _, _, port = full.rpartition(":")
            if not full.startswith("tcp://") or port in ("0", "*"):
                if component.program.table != "producers":
                    self.fail(keys, f"expected tcp://HOST[:PORT] with a port that other hosts can know, found {full}")
                continue
            self._check_port(component.host, port, keys, ports)
        return ports

    def _check_port(self, host: str, port: str, keys: Keys, known: dict[tuple[str, str], Keys]) -> None:
        if (other := known.get((host, port))) is not None:
            self.fail(keys, f"port {port} is that of {self._place(other)} already")
        known[host, port] = keys

    def _check_options(self, component: Component, ports: dict[tuple[str, str], Keys]) -> None:
        """Check each option by its own, and then all of a process together, as its program would."""
        actions = all_options_of(component.program)
        for key, value in component.options.items():
            convert = actions[key].type
            if callable(convert):
                for one in value if isinstance(value, list) else [] if isinstance(value, bool) else [value]:
                    try:
                        convert(_text(one))
                    except argparse.ArgumentTypeError as error:
                        self.fail(self._origin(component, key), str(error))
                    except (TypeError, ValueError):
                        self.fail(self._origin(component, key), f"not a valid value: {_shown(one)}")
        for port in component.program.ports(self.parsed(component)):
            self._check_port(component.host, str(port), component.keys, ports)

    def _origin(self, component: Component, key: str) -> Keys:
        """Return the keys under which the file has the value of an option."""
        places = ((*component.keys, key), *_INHERITED.get(key, ()))
        return next((place for place in places if place in self._lines), places[0])

    def _place(self, keys: Keys) -> str:
        in_file = any(keys[:length] in self._lines for length in range(1, len(keys) + 1))
        return f"{_dotted(keys)} ({'line ' + self.where(*keys).rpartition(':')[2] if in_file else 'default'})"

    # Processes.

    def core_address(self, host: str) -> str:
        """Return the address at which processes of a host reach the core; with a second core both addresses."""
        return ",".join(self._address_of(core, host) for core in self.cores)

    def _address_of(self, core: Component, host: str) -> str:
        full = config.address(core.options["address"], config.CORE_PORT)
        listens, _, port = full.removeprefix("tcp://").rpartition(":")
        if listens not in ("*", "0.0.0.0", "[::]"):
            return full
        return f"{config.LOOPBACK if host == core.host else f'tcp://{self.host_address(core.host)}'}:{port}"

    def supervisor(self, host: str) -> str:
        """Return the name of the supervisor of a host as a component."""
        return f"Supervisor {host}".strip()

    def module(self, host: str) -> str:
        """Return the module of those components of a host that name none in their own table; "" for none."""
        return self.hosts[host].module if host else ""

    def members(self, host: str) -> list[str]:
        """Return the names of all components of a host, each of which needs a key if the core is on another host."""
        components = [each for each in self.components if each.host == host and each.program.is_component]
        return [*(component.name for component in components), self.supervisor(host)]

    def find_host(self, name: str) -> str:
        """Return the host of this name. Raises ConfigError if there is none."""
        if name not in self.hosts:
            known = ", ".join(self.hosts) or "none"
            raise ConfigError(f"{self.path}: --host {name}: no such host; the hosts are {known}")
        return name

    def state_dir(self, host: str) -> str | None:
        """Return the state directory of a host; None: the default one of its user."""
        own = self.hosts[host].state_dir if host else ""
        text = own or self.detector.state_dir
        return os.path.join(self.directory, text) if text else None

    def arguments(self, component: Component) -> list[str]:
        """Return the arguments of a process, in the order in which its program has the options."""
        options = all_options_of(component.program)
        arguments: list[str] = []
        if "core" in options:
            arguments.append(f"--core={self.core_address(component.host)}")
        if "log-address" in options:
            log = next(other for other in self.components if other.program.table == "log")
            arguments.append(f"--log-address={config.address(log.options['address'], config.LOG_PORT)}")
        if "name" in options:
            arguments.append(f"--name={component.name}")
        if "state-dir" in options and (state := self.state_dir(component.host)) is not None:
            arguments.append(f"--state-dir={state}")
        if self.detector.insecure:
            arguments.append("--insecure")
        for key, action in options.items():
            if key in component.options and key != "name":
                arguments += _arguments(key, action, component.options[key])
        return arguments

    def parsed(self, component: Component) -> argparse.Namespace:
        """Return the options of a process as its program gets them."""
        try:
            return _parse_arguments(component.program.parser(), self.arguments(component))
        except ConfigError as error:
            self.fail(component.keys, str(error).removeprefix("argument "))

    @property
    def has_alarms(self) -> bool:
        """Whether the file has the table [alarms]."""
        return "alarms" in self._content

    def wanted(self, host: str, alarms: Path | None = None) -> list[Wanted]:
        """Return the processes of a host, in the order of starting. `alarms`: file with the
        table [alarms], for the core."""
        own = {"core": [] if alarms is None else [f"--alarms={alarms}"]}
        return [
            Wanted(
                component.program.module,
                component.name,
                [
                    *component.program.command[1:],
                    *self.arguments(component),
                    *own.get(component.program.module, []),
                ],
            )
            for component in self.components
            if component.host == host
        ]

    def check_start(self, host: str, names: frozenset[str]) -> None:
        """Check what these processes need on this host: directories with free space, boards and files that exist."""
        for component in self.components:
            if component.host != host or component.name not in names:
                continue
            for key in _DIRECTORIES:
                for text in _as_list(component.options.get(key, [])):
                    self._check_directory(component, key, text)
            with _working_directory(self.directory):
                try:
                    component.program.check(self.parsed(component))
                except LarpixDaqError as error:
                    self.fail(component.keys, str(error))

    def _check_directory(self, component: Component, key: str, text: str) -> None:
        path = self.directory / text
        keys = (*component.keys, key)
        if keys not in self._lines and component.program.table == "storages":
            keys = ("detector", key)
        elif keys not in self._lines and key == "routines":
            keys = ("routines", "directories")
        if not path.is_dir():
            self.fail(keys, f"no such directory: {path}")
        if key not in ("output-dir", "directory"):
            return
        if not os.access(path, os.W_OK | os.X_OK):
            self.fail(keys, f"not writable: {path}")
        free = shutil.disk_usage(path).free
        if free < MIN_FREE:
            who = "a broker" if key == "directory" else "a storage"
            self.fail(keys, f"the disk of {path} is full: {size(free)} left, {who} needs {size(MIN_FREE)}")

    # The file as it is understood.

    def effective(self) -> Iterator[str]:
        """Yield the lines of a TOML text with every value, and in a comment the place that it comes from."""
        yield from self._lines_of(("detector",), _set(self.detector))
        for name, host in self.hosts.items():
            yield from self._lines_of(("hosts", name), {"address": name, **_set(host)})
        shown: set[Keys] = set()
        for component in self.components:
            if component.keys not in shown:  # one table for all brokers
                shown.add(component.keys)
                yield from self._component_lines(component)
        for name, board in self.boards.items():
            yield from self._lines_of(("boards", name), _set(board))
        yield from self._lines_of(("routines",), _set(self.routines))
        yield from self._lines_of(("alarms",), _set(self.alarms))

    def _component_lines(self, component: Component) -> Iterator[str]:
        values: dict[str, Any] = {"host": component.host} if component.host else {}
        if component.program.by_host:
            values = {"hosts": self.broker_hosts} if self.hosts else {}
        for key, action in options_of(component.program).items():
            if action.nargs == 0:
                values[key] = False
            elif isinstance(action.default, str | int | float | Path):
                values[key] = action.default if isinstance(action.default, int | float) else str(action.default)
            elif isinstance(action.default, list) and action.default:
                values[key] = action.default
        values |= {key: component.options[key] for key in _DERIVED if key in component.options}
        inherited = {**_INHERITED, "module": (("hosts", component.host, "module"),)}
        yield from self._lines_of(component.keys, {**values, **component.table}, inherited)

    def _lines_of(
        self, keys: Keys, values: Mapping[str, Any], inherited: Mapping[str, tuple[Keys, ...]] = _INHERITED
    ) -> Iterator[str]:
        if not values:
            return
        yield f"[{_dotted(keys)}]"
        for key, value in values.items():
            places = ((*keys, key), *inherited.get(key, ()))
            origin = next((self.where(*place) for place in places if place in self._lines), "default")
            yield f"{key} = {_toml(value)}  # {origin}"
        yield ""


def _set(table: msgspec.Struct) -> dict[str, Any]:
    """Return the keys of a table that are set or have a default."""
    return {key: value for key, value in msgspec.to_builtins(table).items() if value not in ("", [])}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _dotted(keys: Keys) -> str:
    """Return keys as TOML writes them: producers."LArPix board".ring."""
    return ".".join(key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key) for key in keys)


def _toml(value: Any) -> str:
    """Return a text, number, truth value, list or table as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_dotted((key,))} = {_toml(part)}' for key, part in value.items())}}}"
    if isinstance(value, float) and not value.is_integer():
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    text = _toml(value) if isinstance(value, bool | int | float | str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _default_port(component: Component) -> int:
    ports = {
        **dict.fromkeys(_CORES, config.CORE_PORT),
        "log": config.LOG_PORT,
        "metrics": config.METRICS_PORT,
        "web": config.WEB_PORT,
    }
    return ports.get(component.program.table, 0)


@contextlib.contextmanager
def _working_directory(directory: Path) -> Iterator[None]:
    previous = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(previous)
