"""The tables and keys of a detector's configuration file, with their types, limits and descriptions.

The keys of a process's table are the long options of its program, with the type, the description and the default that
the program's own argument parser has, so that file and command line cannot differ.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import UNSET, Meta, UnsetType, inspect

from larpixdaq.alarm_config import AlarmConfig

#: Options that the file determines elsewhere, by other tables or by the name of the table, and one that needs somebody
#: who writes to standard input.
_ELSEWHERE: Final = frozenset({"help", "core", "log-address", "state-dir", "insecure", "alarms", "wait-for-go"})

#: Options of producers, the settings of their streams, that [brokers] may have for all producers.
STREAM_SETTINGS: Final = ("stream-replicas", "stream-size", "stream-age")


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A table with these keys and no others."""


class Detector(_Table, frozen=True):
    """What all processes have in common."""

    name: Annotated[str, Meta(max_length=64, description="name of the detector, for people")] = ""
    state_dir: Annotated[
        str, Meta(description="directory for run catalogue, keys and log (default: $XDG_STATE_HOME/larpixdaq)")
    ] = ""
    output_dir: Annotated[str, Meta(description="for the files of storages that name no directory (default: .)")] = "."
    insecure: Annotated[
        bool,
        Meta(description="use no keys: everybody who can connect can control the detector and read its data"),
    ] = False
    stream: Annotated[
        str,
        Meta(
            pattern=r"^(nats|tls)://[^\s]+$",
            description="your own brokers, as nats://HOST[:PORT],…, that keep the stream of each producer; [brokers] "
            "starts some (default: producers send to storages and monitors themselves)",
        ),
    ] = ""


class Host(_Table, frozen=True):
    """A computer with processes. Without any such table, all processes are on one computer, at 127.0.0.1."""

    address: Annotated[
        str, Meta(description="host name or IP address at which the other hosts reach it (default: NAME)")
    ] = ""
    state_dir: Annotated[str, Meta(description="its state directory (default: that of [detector])")] = ""
    module: Annotated[
        str,
        Meta(max_length=64, description="`module` of its components that have none of their own"),
    ] = ""


_Tile = Annotated[int, Meta(ge=0, le=9)]
_Dac = Annotated[int, Meta(ge=0, le=0xFFFF)]
_Limit = float | Annotated[list[float], Meta(min_length=2, max_length=2)]


class Board(_Table, frozen=True):
    """A PACMAN or Bern board. A producer reads it if its `boards` name it."""

    address: Annotated[
        str,
        Meta(
            pattern=r"^(tcp://)?(\[[0-9A-Fa-f:.%\w]+\]|[^\s:=/\[\]]+)(:\d{1,5}){0,2}$",
            description="HOST[:DATA_PORT[:COMMAND_PORT]]",
        ),
    ]
    io_group: Annotated[int, Meta(ge=1, le=255, description="io_group of its packets, which no other board has")]
    kind: Annotated[Literal["pacman", "bern"], Meta(description="kind of the board (default: pacman)")] = "pacman"
    revision: Annotated[
        Annotated[int, Meta(ge=2, le=5)] | UnsetType,
        Meta(description="register map of a PACMAN's command server, as --pacman-revision"),
    ] = UNSET
    uarts: Annotated[
        Literal[32] | UnsetType,
        Meta(description="of a PACMAN of revision 5 whose firmware has 32 UARTs, as --pacman-uarts"),
    ] = UNSET
    asic: Annotated[
        Literal["1", "2", "2b", "2d", "lightpix-1", "3"] | UnsetType,
        Meta(description="generation of its chips, one for all boards of a producer (default: `asic` of the producer)"),
    ] = UNSET
    tiles: Annotated[
        list[_Tile] | UnsetType, Meta(description="tiles of a PACMAN, from 0, that power_up switches on")
    ] = UNSET
    vdda_dac: Annotated[
        _Dac | list[_Dac] | UnsetType, Meta(description="DAC of VDDA for power_up: for all tiles, or a list by tile")
    ] = UNSET
    vddd_dac: Annotated[
        _Dac | list[_Dac] | UnsetType, Meta(description="DAC of VDDD for power_up: for all tiles, or a list by tile")
    ] = UNSET
    limits: Annotated[
        dict[str, _Limit] | UnsetType,
        Meta(
            description="monitors beyond which power_up switches a tile off: highest value or [lowest, highest], as in "
            "{vdda_ma = 600, vdda_mv = [1700, 1900]}"
        ),
    ] = UNSET
    inverted: Annotated[
        bool | UnsetType, Meta(description="power_up inverts the lines of its tiles, as v2b tiles of the 2x2 need it")
    ] = UNSET


class Routines(_Table, frozen=True):
    """Files of routines for all producers."""

    directories: Annotated[
        list[str],
        Meta(description="directories of routine files, beside those of each producer; they run with your rights"),
    ] = []


class File(_Table, frozen=True):
    """The tables that belong to no program; Program.table names the others."""

    detector: Detector = Detector()
    hosts: dict[str, Host] = {}
    brokers: dict[str, Any] | UnsetType = UNSET
    core: dict[str, Any] = {}
    standby: dict[str, Any] | UnsetType = UNSET
    log: dict[str, Any] = {}
    metrics: dict[str, Any] | UnsetType = UNSET
    storages: dict[str, dict[str, Any]] | UnsetType = UNSET
    monitors: dict[str, dict[str, Any]] | UnsetType = UNSET
    boards: dict[str, Board] = {}
    emulators: dict[str, dict[str, Any]] = {}
    producers: dict[str, dict[str, Any]] = {}
    routines: Routines = Routines()
    alarms: AlarmConfig = AlarmConfig()
    web: dict[str, Any] | UnsetType = UNSET


class Program(NamedTuple):
    """A program of larpixdaq, and the table in the file with its options.

    `many`: the file has a table [TABLE.NAME] for each process, whose name is the component's. `check` raises
    LarpixDaqError for parsed options that cannot work. `ports` returns further ports at which a process listens.
    `by_host`: the table is for a process on each of its `hosts`, from which the options in `by_host` follow.
    """

    module: str
    table: str
    many: bool
    parser: Callable[[], argparse.ArgumentParser]
    check: Callable[[argparse.Namespace], object] = lambda options: None
    ports: Callable[[argparse.Namespace], list[int]] = lambda options: []
    by_host: frozenset[str] = frozenset()

    @property
    def command(self) -> list[str]:
        """Its command and, of an emulator, the kind of board."""
        return self.parser().prog.split()

    @property
    def is_component(self) -> bool:
        """Whether its processes register with the core under their names."""
        return "name" in all_options_of(self)


# Keys of a process's table, from the argument parser of its program.


def options_of(program: Program) -> dict[str, argparse.Action]:
    """Return the options of a program that its table may have, by their names without dashes."""
    elsewhere = _ELSEWHERE | program.by_host | ({"name"} if program.many else set())
    return {key: action for key, action in all_options_of(program).items() if key not in elsewhere}


@functools.cache
def all_options_of(program: Program) -> dict[str, argparse.Action]:
    """Return all options of a program, by their names without dashes."""
    return {
        next(text for text in reversed(action.option_strings) if text.startswith("--"))[2:]: action
        for action in program.parser()._actions
        if action.option_strings
    }


def _is_repeated(action: argparse.Action) -> bool:
    return isinstance(action.default, list)


def _value_type(action: argparse.Action) -> Any:
    """Return the type of an option's value in the file. The program's own function then converts the text."""
    if action.nargs == 0:
        return bool
    one: Any = str if action.type in (None, Path) else str | int | float
    if action.choices is not None:
        one = Literal[tuple(action.choices)]
    if action.nargs == "?":
        return bool | one
    if action.nargs == "+" or _is_repeated(action):
        return Annotated[list[one], Meta(min_length=1)]
    return one


def _help(action: argparse.Action) -> str:
    return (action.help or "") % vars(action)


def _table_type(program: Program, programs: Sequence[Program]) -> type[msgspec.Struct]:
    """Make the type of a program's table: a field for each option, and fields that only the file has."""
    own: dict[str, tuple[Any, str]] = {
        "host": (str, "the host, by its name in [hosts.NAME] (default: that of the core, which is the first one)")
    }
    if program.by_host:
        own = {
            "hosts": (
                Annotated[list[str], Meta(min_length=1)],
                "the hosts, one, three or five, by their names in [hosts.NAME] (default: that of the core)",
            )
        }
        own |= {
            key: (_value_type(action), f"of all producers: {_help(action)}")
            for other in programs
            if other.table == "producers"
            for key, action in options_of(other).items()
            if key in STREAM_SETTINGS
        }
    if program.table == "storages":
        own["standby-hosts"] = (
            Annotated[list[str], Meta(min_length=1)],
            "further hosts with a storage of this name, of which one works and the others wait until it has died; with "
            "brokers only",
        )
    if program.table == "producers":
        own["boards"] = (
            Annotated[list[str], Meta(min_length=1)],
            "names of the boards, in place of the options that name a source",
        )
    options = {key: (_value_type(action), _help(action)) for key, action in options_of(program).items()}
    fields: list[tuple[str, Any, Any]] = [
        (key.replace("-", "_"), Annotated[kind | UnsetType, Meta(description=text)], UNSET)
        for key, (kind, text) in (own | options).items()
    ]
    made = msgspec.defstruct(program.table.capitalize(), fields, bases=(_Table,), rename="kebab", frozen=True)
    made.__doc__ = f"The options of `{' '.join(program.command)}`."
    return made


def file_type(programs: Sequence[Program]) -> type[msgspec.Struct]:
    """Return the type of the whole file."""
    fields: list[tuple[str, Any, Any]] = []
    by_table = {program.table: program for program in programs}
    for field in msgspec.structs.fields(File):
        kind, default = field.type, field.default
        if (program := by_table.get(field.name)) is not None:
            table = _table_type(program, programs)
            kind, default = (dict[str, table] if program.many else table) | UnsetType, UNSET  # type: ignore[valid-type]
        fields.append((field.name, kind, UNSET if default is msgspec.NODEFAULT else default))
    made = msgspec.defstruct("Detector configuration", fields, forbid_unknown_fields=True, frozen=True)
    made.__doc__ = "Configuration file of larpix-daq."
    return made


def without_unset(kind: Any) -> Any:
    """Return a type without Unset, which stands for a key that is not there."""
    parts = [part for part in get_args(kind) if part is not UnsetType]
    if len(parts) == 1 and UnsetType in get_args(kind) and get_origin(kind) is not Annotated:
        return parts[0]
    return kind


def expected(kind: Any) -> str:
    """Describe the values of a type: `a whole number from 1 to 255`."""
    return _words(inspect.type_info(kind))


def _words(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return _words(kind.type)
    if isinstance(kind, inspect.UnionType):
        parts = [part for part in kind.types if not isinstance(part, inspect.NoneType)]
        numbers = any(isinstance(part, inspect.FloatType) for part in parts)
        words = [_words(part) for part in parts if not (numbers and isinstance(part, inspect.IntType))]
        return " or ".join(words)
    if isinstance(kind, inspect.LiteralType):
        return f"one of {', '.join(json.dumps(value) for value in kind.values)}"
    if isinstance(kind, inspect.ListType):
        return f"a list of values, each {_words(kind.item_type)}"
    if isinstance(kind, inspect.DictType | inspect.StructType):
        return "a table"
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        word = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
        low = kind.ge if kind.ge is not None else kind.gt
        high = kind.le if kind.le is not None else kind.lt
        above = "" if low is None else f" {'from' if kind.ge is not None and high is not None else 'above'} {low}"
        if low is not None and kind.ge is not None and high is None:
            above = f" of at least {low}"
        return word + above + ("" if high is None else f" {'to' if kind.le is not None else 'below'} {high}")
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.StrType):
        return "a text" if kind.max_length is None else f"a text of at most {kind.max_length} characters"
    return type(kind).__name__.removesuffix("Type").lower()


# Descriptions of all keys.


class Explanation(NamedTuple):
    """A table or a key. `table`: as in [hosts.NAME]; `key` "": the table itself; `values`: what it may be."""

    table: str
    key: str
    values: str
    text: str


def explanations(programs: Sequence[Program]) -> Iterator[Explanation]:
    """Yield all tables with their keys."""
    for table in msgspec.structs.fields(file_type(programs)):
        kind = without_unset(table.type)
        name = table.encode_name
        if get_origin(kind) is dict:
            kind, name = get_args(kind)[1], f"{name}.NAME"
        yield Explanation(name, "", "", " ".join((kind.__doc__ or "").split()))
        for field in msgspec.structs.fields(kind):
            info = inspect.type_info(field.type)
            text = (info.extra_json_schema or {}).get("description", "") if isinstance(info, inspect.Metadata) else ""
            yield Explanation(name, field.encode_name, _words(info), text)


def json_schema(programs: Sequence[Program]) -> dict[str, Any]:
    """Return the JSON schema of the file, for editors."""
    return msgspec.json.schema(file_type(programs))
