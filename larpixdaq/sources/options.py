"""The producer's options for sources, and the sources that they make.

`--io-config` reads io configuration files of larpix-control (JSON), which give the address of each io_group:

    {"_config_type": "io", "io_class": "PACMAN_IO", "io_group": [[1, "pacman.local"], [2, "pacman2.local"]]}

A file of PACMAN_IO may also have the boards' revisions (`--pacman-revision`), for all or for each io_group, which
larpix-control ignores: "pacman_revision": 4, or {"1": 4, "2": 5}.

A file is looked up in the working directory, and then among the files of larpix-control. `_include` lists files whose
fields count where the file itself does not have them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from larpixdaq.constants import IO_GROUPS
from larpixdaq.errors import ConfigError, UsageError
from larpixdaq.runtime.units import parse_positive, parse_whole
from larpixdaq.schema import ASICS, Asic
from larpixdaq.sources.command_channel import COMMAND_PORT, DATA_PORT, REVISIONS
from larpixdaq.sources.source import Source

#: The options that name a source.
SOURCES: Final = ("--serial", "--pacman", "--bern", "--replay", "--fake", "--io-config")
#: Numbers of UARTs that --pacman-uarts takes.
_UARTS: Final = (32, 32)
#: The key for all other boards in revisions by io_group.
ALL: Final = 0
#: Packets per second of `--fake` without a rate.
FAKE_RATE: Final = 10_000.0
_BOARD: Final = re.compile(
    r"(?:(?P<group>\d{1,9})=)?(?:tcp://)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:=/\[\]]+)(?::(?P<data>\d{1,9})(?::(?P<command>\d{1,9}))?)?"
)
_FORM: Final = "[IO_GROUP=]HOST[:DATA_PORT[:COMMAND_PORT]]"
_CLASS: Final = re.compile(r"([A-Za-z_]\w*\.)*([A-Za-z_]\w*:)?[A-Za-z_]\w*", re.ASCII)
#: The source for each IO class of larpix-control.
_IO_CLASSES: Final = {"PACMAN_IO": "pacman", "SerialPort": "serial", "ZMQ_IO": "bern", "MultiZMQ_IO": "bern"}
#: Options of some sources only. With another source they are an error, because they would have no effect.
_ONLY_FOR: Final = {
    "pacman_format": ("pacman", "replay"),
    "clock64": ("pacman", "replay", "io-config"),
    "pacman_revision": ("pacman", "io-config"),
    "pacman_uarts": ("pacman",),
    "baud": ("serial",),
    "serial_rule": ("serial",),
    "speed": ("replay",),
    "io_groups": ("fake",),
}
#: The file of each IO class if no file is given.
DEFAULTS: Final = {"PACMAN_IO": "io/pacman.json", "ZMQ_IO": "io/loopback.json", "MultiZMQ_IO": "io/default.json"}
#: ZMQ_IO also reads the files of MultiZMQ_IO.
_ACCEPTS: Final = {"ZMQ_IO": ("ZMQ_IO", "MultiZMQ_IO")}
_GROUP: Final = re.compile(r"\d{1,3}", re.ASCII)
_MAX_DEPTH: Final = 8
_MAX_BYTES: Final = 1 << 20


class BoardAddress(NamedTuple):
    io_group: int
    host: str
    data_port: int
    command_port: int


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the producer's options for sources; create() makes the sources of the parsed options.

    `required`: the parser refuses a command line that names no source.
    """
    group = parser.add_argument_group("source", "where the packets come from: exactly one of these")
    kind = group.add_mutually_exclusive_group(required=required)
    kind.add_argument("--serial", metavar="DEVICE", help="a board on a serial line, such as /dev/ttyUSB0 (io_group 1)")
    kind.add_argument(
        "--pacman",
        nargs="+",
        metavar="BOARD",  # argparse before 3.13 cannot wrap a usage line with brackets in it
        help=f"PACMAN boards, each as {_FORM}; io_groups count from 1 in the order given unless named; ports default "
        f"to {DATA_PORT} (data) and {COMMAND_PORT} (command), a command port beside a given data port to that less 1",
    )
    kind.add_argument("--bern", nargs="+", metavar="BOARD", help="boards of the Bern type; addresses as for --pacman")
    kind.add_argument(
        "--replay",
        nargs="+",
        metavar="FILE",
        help="recorded files, one after another: raw HDF5, LArPix+HDF5 packet files, or logs of PACMAN messages "
        "(u32 length + message); logs have no io_group, IO_GROUP=FILE gives it (default: 1)",
    )
    kind.add_argument(
        "--fake",
        nargs="?",
        const=FAKE_RATE,
        type=parse_positive,
        metavar="RATE",
        help=f"made-up packets, RATE a second in all (default {FAKE_RATE:g}), to try the system without a board",
    )
    kind.add_argument(
        "--io-config",
        nargs="+",
        metavar=("CLASS", "ARG"),
        help="boards of a larpix-control IO class: PACMAN_IO, ZMQ_IO or MultiZMQ_IO [FILE], or SerialPort FILE or "
        "DEVICE [BAUD]; FILE is an io configuration (JSON) of larpix-control. Any other CLASS, of larpix.io or "
        "package.module:Class, is called with the ARGs (as numbers where they look like numbers) in a process of its "
        "own, which reads its packets at Python's speed: it is a program that runs with your rights",
    )

    board = parser.add_argument_group("board", "kind of the boards and chips")
    board.add_argument("--asic", choices=list(ASICS), default="2", help="generation of the chips (default: 2)")
    board.add_argument(
        "--fifo-diagnostics",
        action="store_true",
        help="the fifo diagnostics mode of the chips is on (v2 chips; the packets do not show it)",
    )
    board.add_argument(
        "--pacman-format",
        choices=["auto", "legacy", "1.0"],
        help="format of PACMAN messages (default: auto, found for each message)",
    )
    board.add_argument(
        "--clock64", action="store_const", const=True, help="PACMAN firmware with 64-bit timestamps (DUNE timing)"
    )
    board.add_argument(
        "--pacman-revision",
        nargs="+",
        metavar="REVISION",
        help="register maps of the PACMAN boards' command servers, each as [IO_GROUP=]N, without IO_GROUP for all: 2 "
        "(server v1.2), 3 (v1.3, also of uci_* and r/oldtimestamp_rev4 firmware), 4 (v1.4) or 5 (pacman-server 2, "
        "which reports it itself); without it no DAC is set and no voltage is shown",
    )
    board.add_argument(
        "--pacman-uarts",
        nargs="+",
        metavar="UARTS",
        help="PACMAN boards of revision 5 whose firmware has 32 UARTs instead of 40, each as [IO_GROUP=]32: they have "
        "no io_channels 12, 16, ..., 40, and the UARTs of the others are numbered without gaps",
    )
    board.add_argument(
        "--baud", type=parse_whole, metavar="BITS_PER_SECOND", help="speed of the serial line (default: 1000000)"
    )
    board.add_argument(
        "--serial-rule",
        choices=["strict", "larpix-control"],
        help="how frames are found after lost bytes: strict requires odd parity or a next frame (default), "
        "larpix-control accepts every start and stop byte at the right distance",
    )
    board.add_argument(
        "--speed",
        type=_speed,
        metavar="X|max",
        help="replay X times as fast as recorded (default: 1), or as fast as possible; pauses longer than 60 s are "
        "skipped",
    )
    board.add_argument("--io-groups", type=parse_whole, metavar="N", help="number of boards of --fake (default: 1)")


def names_source(args: argparse.Namespace) -> bool:
    """Return whether the options name a source."""
    return any(getattr(args, option[2:].replace("-", "_")) is not None for option in SOURCES)


def create(args: argparse.Namespace) -> list[Source]:
    """Make the sources of the options, without opening them. UsageError for impossible options, ConfigError for files
    of --io-config, both in one line."""
    kind, values = _kind(args)
    for option, kinds in _ONLY_FOR.items():
        if getattr(args, option) is not None and kind not in kinds:
            names = " and ".join(f"--{name}" for name in kinds)
            raise UsageError(f"--{option.replace('_', '-')} is for {names} only, not for --{kind}")
    asic = asic_of(args)
    if kind == "serial":
        return _serial(args, asic, values)
    if kind == "replay":
        return _replay(args, asic, values)
    if kind == "fake":
        return _fake(args, asic, values)
    if kind == "io-config":
        from larpixdaq.sources.io_class import IoClassSource

        return [IoClassSource(*values, asic=asic, clock64=bool(args.clock64), revisions=_revisions(args, kind))]
    return _boards(args, asic, kind, values)


def asic_of(args: argparse.Namespace) -> Asic:
    """Return the chips' generation for the decoders. UsageError for options that contradict each other."""
    asic = ASICS[args.asic]
    if args.fifo_diagnostics:
        if asic != Asic.V2:
            raise UsageError(f"--fifo-diagnostics is for v2 chips only, not for --asic {args.asic}")
        asic = Asic.V2_DIAGNOSTICS
    return asic


def _kind(args: argparse.Namespace) -> tuple[str, Any]:
    """Return the kind of source and its values: (io_group, device, baud), addresses, files, rate or (class, args)."""
    if args.io_config is not None:
        return _from_io_config(*args.io_config)
    if args.serial is not None:
        return "serial", (1, args.serial, None)
    kind = next(kind for kind in ("pacman", "bern", "replay", "fake") if getattr(args, kind) is not None)
    return kind, getattr(args, kind)


def _from_io_config(io_class: str, *arguments: str) -> tuple[str, Any]:
    kind = _IO_CLASSES.get(io_class)
    if kind is None:
        if _CLASS.fullmatch(io_class) is None:
            raise UsageError(f"--io-config {io_class}: expected a class of larpix.io or package.module:Class")
        return "io-config", (io_class, arguments)
    if len(arguments) > (2 if kind == "serial" else 1):
        raise UsageError(f"--io-config {io_class}: too many arguments: {' '.join(arguments)}")
    if kind == "serial":
        if not arguments:
            raise UsageError("--io-config SerialPort: name the device or an io configuration file")
        baud = (
            None if len(arguments) == 1 else _number(arguments[1], "--io-config SerialPort: baud rate", 1, 100_000_000)
        )
        if not arguments[0].endswith(".json"):
            return "serial", (1, arguments[0], baud)
        devices = read_io_config(io_class, arguments[0])
        if len(devices) != 1:
            raise ConfigError(f"io config {arguments[0]}: SerialPort has one device, found {len(devices)}")
        return "serial", (*devices[0], baud)
    file = arguments[0] if arguments else DEFAULTS[io_class]
    found = read_io_config(io_class, file)
    if io_class == "ZMQ_IO" and len(found) != 1:
        raise ConfigError(f"io config {file}: ZMQ_IO has one address, found {len(found)}; use MultiZMQ_IO")
    addresses = [f"{io_group}={address}" for io_group, address in found]
    try:
        boards(addresses)
    except UsageError as error:
        raise ConfigError(f"io config {file}: {error}") from None
    return kind, addresses


def boards(addresses: list[str]) -> list[BoardAddress]:
    """Parse addresses `[IO_GROUP=]HOST[:DATA_PORT[:COMMAND_PORT]]`. UsageError for wrong and for duplicate ones."""
    parsed: list[BoardAddress] = []
    for place, text in enumerate(addresses, start=1):
        match = _BOARD.fullmatch(text)
        if match is None:
            raise UsageError(f"board address {text!r}: expected {_FORM}")
        io_group = _io_group(match["group"], text) if match["group"] else place
        data = _number(match["data"], f"board address {text!r}: data port", 1, 65_535) if match["data"] else DATA_PORT
        if match["command"]:
            command = _number(match["command"], f"board address {text!r}: command port", 1, 65_535)
        else:
            command = data - 1 if match["data"] else COMMAND_PORT
            if command == 0:
                raise UsageError(f"board address {text!r}: data port 1 leaves no command port; give one")
        if command == data:
            raise UsageError(f"board address {text!r}: data port and command port are both {data}")
        board = BoardAddress(io_group, match["host"], data, command)
        for other in parsed:
            if other.io_group == board.io_group:
                raise UsageError(f"board address {text!r}: io_group {io_group} is that of {other.host} already")
            if (other.host, other.data_port) == (board.host, board.data_port):
                raise UsageError(f"board address {text!r}: io_group {other.io_group} has the same address")
        parsed.append(board)
    if len(parsed) >= IO_GROUPS:
        raise UsageError(f"{len(parsed)} boards: a producer has at most {IO_GROUPS - 1}")
    return parsed


def _boards(args: argparse.Namespace, asic: Asic, kind: str, addresses: list[str]) -> list[Source]:
    if kind == "bern":
        from larpixdaq.sources.bern import BernSource

        return [BernSource(*board, asic=asic) for board in boards(addresses)]
    from larpixdaq.sources.pacman import PacmanSource

    parsed = boards(addresses)
    revisions = _revisions(args, kind)
    uarts = _by_group("--pacman-uarts", args.pacman_uarts, "UARTs", *_UARTS)
    io_groups = {ALL} | {board.io_group for board in parsed}
    for io_group in revisions.keys() - io_groups:
        wrong = UsageError if args.pacman_revision else ConfigError  # of the command line, or of the file
        raise wrong(f"--pacman-revision {io_group}={revisions[io_group]}: no board has io_group {io_group}")
    for io_group in uarts.keys() - io_groups:
        raise UsageError(f"--pacman-uarts {io_group}={uarts[io_group]}: no board has io_group {io_group}")
    form = args.pacman_format or "auto"
    return [
        PacmanSource(
            *board,
            asic=asic,
            format=form,
            clock64=bool(args.clock64),
            revision=revisions.get(board.io_group, revisions.get(ALL, 0)),
            uarts=uarts.get(board.io_group, uarts.get(ALL, 0)),
        )
        for board in parsed
    ]


def _revisions(args: argparse.Namespace, kind: str) -> dict[int, int]:
    """Return the register maps of PACMAN boards by io_group, and ALL for the others."""
    configured: dict[int, int] = {}
    if args.io_config is not None and kind == "pacman":
        configured = configured_revisions(*args.io_config)
    given = _by_group("--pacman-revision", args.pacman_revision, "revision", REVISIONS[0], REVISIONS[-1])
    return (configured if ALL not in given else {}) | given


def _by_group(option: str, texts: list[str] | None, quantity: str, low: int, high: int) -> dict[int, int]:
    """Return numbers given as [IO_GROUP=]N by io_group, and ALL for the others."""
    given: dict[int, int] = {}
    for text in texts or ():
        group, equals, number = text.rpartition("=")
        io_group = _io_group(group, f"{option} {text}") if equals else ALL
        if io_group in given:
            raise UsageError(f"{option} {text}: {'all boards' if io_group == ALL else f'io_group {io_group}'} twice")
        given[io_group] = _number(number, f"{option} {text}: {quantity}", low, high)
    return given


def _serial(args: argparse.Namespace, asic: Asic, values: tuple[int, str, int | None]) -> list[Source]:
    from larpixdaq.sources.serial import BAUD, SerialSource

    io_group, device, baud = values
    baud = args.baud or baud or BAUD
    return [SerialSource(device, io_group, asic=asic, baud=baud, rule=args.serial_rule or "strict")]


def _replay(args: argparse.Namespace, asic: Asic, files: list[str]) -> list[Source]:
    from larpixdaq.sources.replay import ReplaySource

    recordings = []
    for text in files:
        group, equals, file = text.partition("=")
        if equals and group.isdecimal():
            recordings.append((_io_group(group, text), file))
        else:
            recordings.append((1, text))
    form = args.pacman_format or "auto"
    return [ReplaySource(recordings, asic=asic, format=form, clock64=bool(args.clock64), speed=args.speed or 1.0)]


def _fake(args: argparse.Namespace, asic: Asic, rate: float) -> list[Source]:
    from larpixdaq.sources.fake import FakeSource

    count = args.io_groups or 1
    if count >= IO_GROUPS:
        raise UsageError(f"--io-groups {count}: a producer has at most {IO_GROUPS - 1}")
    return [FakeSource(io_group, rate / count, asic=asic, seed=io_group) for io_group in range(1, count + 1)]


def _io_group(text: str, context: str) -> int:
    return _number(text, f"{context}: io_group", 1, IO_GROUPS - 1)


def _number(text: str, quantity: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and low <= int(text) <= high):
        raise UsageError(f"{quantity}: expected {f'{low} to {high}' if low < high else low}, found {text}")
    return int(text)


def _speed(text: str) -> float:
    """Parse --speed; math.inf for max."""
    value = math.inf if text == "max" else float(text)
    if math.isnan(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"expected a factor above 0 or max, found {text}")
    return value


def read_io_config(io_class: str, name: str) -> list[tuple[int, str]]:
    """Read (io_group, address) of each board, in the file's order. ConfigError when it is no file of this class."""
    config = _of_class(io_class, name)
    table = config.get("io_group")
    boards = []
    for entry in table if isinstance(table, list) else ():
        match entry:
            case [int(io_group), str(address)] if not isinstance(io_group, bool):
                if not 1 <= io_group < IO_GROUPS:
                    raise ConfigError(f"io config {name}: io_group: expected 1 to {IO_GROUPS - 1}, found {io_group}")
                boards.append((io_group, address))
            case _:
                raise ConfigError(f"io config {name}: io_group: expected [number, address], found {entry!r}")
    if not boards:
        raise ConfigError(f"io config {name}: io_group: expected a list of [number, address], found {table!r}")
    return boards


def configured_revisions(io_class: str, name: str = DEFAULTS["PACMAN_IO"]) -> dict[int, int]:
    """Read the revisions by io_group, and ALL for the others; {} when the file has none."""
    revisions = _of_class(io_class, name).get("pacman_revision")
    if revisions is None:
        return {}
    by_group = revisions if isinstance(revisions, dict) else {"0": revisions}
    for group, revision in by_group.items():
        if not _GROUP.fullmatch(group) or type(revision) is not int or revision not in REVISIONS:
            raise ConfigError(
                f"io config {name}: pacman_revision: expected one of {', '.join(map(str, REVISIONS))}, or "
                f'{{"io_group": revision}}, found {revisions!r:.100}'
            )
    return {int(group): revision for group, revision in by_group.items()}


def _of_class(io_class: str, name: str) -> dict[str, Any]:
    config = _load(name, _MAX_DEPTH)
    actual = config.get("io_class")
    if actual not in _ACCEPTS.get(io_class, (io_class,)):
        raise ConfigError(f"io config {name}: expected io_class {io_class}, found {actual!r}")
    return config


def _load(name: str, depth: int) -> dict[str, Any]:
    if depth == 0:
        raise ConfigError(f"io config {name}: more than {_MAX_DEPTH} files include each other")
    path = _find(name)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"io config {path}: larger than {_MAX_BYTES} bytes")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"io config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"io config {path}: not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("_config_type") != "io":
        raise ConfigError(f'io config {path}: "_config_type": "io" is missing')
    included = config.get("_include", [])
    if not isinstance(included, list) or not all(isinstance(other, str) for other in included):
        raise ConfigError(f"io config {path}: _include: expected a list of file names, found {included!r}")
    merged: dict[str, Any] = {}
    for other in included:
        merged.update(_load(other, depth - 1))
    return merged | config


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    # find_spec does not import the package, because that would take 1 s.
    spec = find_spec("larpix")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        shipped = Path(folder) / "configs" / name
        if shipped.is_file():
            return shipped
    raise ConfigError(f"io config {name}: no such file here or in larpix-control")
