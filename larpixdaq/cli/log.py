"""Commands `larpixdaq log` and `log-level`: show or follow the log's file, and change what components log."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import select
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Final

from larpixdaq import config
from larpixdaq.control.log_file import UNKNOWN, Follower, LogFiles, Merger, Wanted, parse
from larpixdaq.errors import ComponentError, ConfigError, UsageError, advice, printable
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.units import LEVEL_NAMES, parse_level, parse_since, parse_whole

#: Milliseconds between two looks at a followed file.
_LOOK_MS: Final = 100
#: Lines that are written at once.
_TOGETHER: Final = 200
#: Maximum bytes that are shown of a line that is no record.
_SHOWN: Final = 2000
#: Lines that --follow shows first.
_FIRST: Final = 10
#: Maximum seconds until all components have changed their level.
_LEVEL_LIMIT: Final = 3.0


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "log",
        help="show or follow the log",
        description="Shows the lines of the log's file and its older files in the order of their times. A line that is "
        "damaged is shown as it is.",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="the log's file (default: in the state directory)")
    parser.add_argument("-f", "--follow", action="store_true", help="show new lines as they come, until Ctrl-C")
    parser.add_argument(
        "--level", type=parse_level, default="DEBUG", metavar="LEVEL", help=f"from this level on: {LEVEL_NAMES}"
    )
    parser.add_argument(
        "--component",
        action="append",
        default=[],
        metavar="NAME",
        help="only lines of this component, as in `larpixdaq status`; can be given several times",
    )
    parser.add_argument(
        "--since",
        type=parse_since,
        default=-math.inf,
        metavar="TIME",
        help="only from this time on: UTC, such as 2023-03-15T02:48, or before now, such as 90min, 12h, 3d",
    )
    parser.add_argument("--until", type=parse_since, default=math.inf, metavar="TIME", help="only until this time")
    parser.add_argument(
        "-n",
        "--lines",
        type=lambda text: parse_whole(text, 0),
        metavar="N",
        help=f"only the last N of these lines that were written (default: all; with --follow {_FIRST}, or all --since)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each line instead of the line")
    config.add_state_dir_argument(parser)
    parser.set_defaults(function=log)
    parser = commands.add_parser(
        "log-level",
        help="change the level of log records",
        description="Changes the level from which on components write log records, until they are started again. "
        "`larpixdaq status` shows levels other than info.",
    )
    parser.add_argument("level", type=parse_level, metavar="LEVEL", help=LEVEL_NAMES)
    parser.add_argument("--component", metavar="NAME", help="of this component, or the core (default: of all)")
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.set_defaults(function=log_level)


def log(options: argparse.Namespace) -> int:
    path = Path(options.file) if options.file else state_dir(options.state_dir) / "log.txt"
    wanted = Wanted(getattr(logging, options.level), options.component, options.since, options.until)
    if options.until < options.since:
        raise UsageError("--until is before --since")
    if options.follow:
        if options.until < math.inf:
            raise UsageError("--until cannot be used with --follow")
        try:
            _follow(path.absolute(), wanted, options)
        except KeyboardInterrupt:  # the way in which this command ends
            return 0
        return 1
    with contextlib.closing(LogFiles(path.absolute())) as files:
        if options.lines is None:
            shown = _print(((text, False) for text in files.in_order(wanted)), options.json)
        else:
            shown = _print(((text, False) for _, text in files.last(options.lines, wanted)), options.json)
        if problem := _unknown(files, wanted, path):
            raise ConfigError(problem)
    if not shown and options.lines != 0:
        print("larpixdaq: no record is like this", file=sys.stderr)
    return 0


def _unknown(files: LogFiles, wanted: Wanted, path: Path) -> str:
    """Return a line about wanted components that have no record at all; "" if there are none."""
    names, known = files.unknown(wanted)
    lines = [f"no record of {name!r}; {advice(name, known, 'there are records of')}" for name in names]
    return f"{path} and its older files: {'; '.join(lines)}" if lines else ""


def _follow(path: Path, wanted: Wanted, options: argparse.Namespace) -> None:
    """Show the last lines of the log and then new ones, until a signal comes, or until nobody reads the output."""
    shown, follower = UNKNOWN, Follower(path)
    if path.exists():
        with contextlib.closing(LogFiles(path, growing=True)) as files:
            if options.lines is None and options.since > -math.inf:
                _print(((text, False) for text in files.in_order(wanted)), options.json)
                last = files.last(1, wanted)
            else:
                last = files.last(_FIRST if options.lines is None else options.lines, wanted)
                _print(((text, False) for _, text in last), options.json)
            shown = last[-1][0] if last else UNKNOWN
            follower = files.follow(path)
            if problem := _unknown(files, wanted, path):
                print(printable(f"larpixdaq: {problem}; waiting for the first"), file=sys.stderr)
    else:
        print(f"larpixdaq: {path}: no such file; waiting for it", file=sys.stderr)
    merger = Merger(min(shown, round(time.time() * 1e6)))
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)  # reports only that nobody reads the output any more
    missed = False
    while True:
        sys.stdout.flush()
        if reader.poll(_LOOK_MS):
            return
        now = time.monotonic()
        for data in follower.read():
            for start, end, when in wanted.select(data):
                merger.add(when, data[start:end], now)
        _print(merger.take(now, time.time()), options.json)
        if follower.missed and not missed:
            print("larpixdaq: lines may be missing: files were removed before they were read", file=sys.stderr)
        missed = follower.missed


def _print(lines: Iterable[tuple[bytes, bool]], as_json: bool) -> bool:
    """Print lines, each with whether it is late. Returns whether there were any."""
    texts = (_json(line, late) if as_json else _text(line, late) for line, late in lines)
    shown = False
    while many := "".join(islice(texts, _TOGETHER)):
        sys.stdout.write(many)
        shown = True
    return shown


def _text(line: bytes, late: bool) -> str:
    if len(line) > _SHOWN and parse(line) is None:
        return f"{_damaged(line)}\n"
    text = printable(line.decode("utf-8", "backslashreplace"))
    return f"{text}  (late)\n" if late else f"{text}\n"


def _damaged(line: bytes) -> str:
    """Return a line that is no record as text, cut if it is long: after a power cut a file may have many zero bytes."""
    more = f"... ({len(line)} bytes)" if len(line) > _SHOWN else ""
    return printable(line[:_SHOWN].decode("utf-8", "backslashreplace")) + more


def _json(line: bytes, late: bool) -> str:
    return json.dumps(_facts(line) | ({"late": True} if late else {})) + "\n"


def _facts(line: bytes) -> dict[str, Any]:
    record = parse(line)
    if record is None:
        return {"line": _damaged(line)}
    return {
        "time": line[: line.index(b" ")].decode(),
        "level": logging.getLevelName(record.level),
        "component": record.component,
        "text": record.text,
    }


def log_level(options: argparse.Namespace) -> int:
    from larpixdaq.operator import Operator  # late: the other command needs no connection

    with Operator(options.core, insecure=options.insecure) as operator:
        asked = operator.set_log_level(options.level, options.component).result(timeout=5)["levels"]
        until = time.monotonic() + _LEVEL_LIMIT
        while True:
            status = operator.status().result(timeout=5)
            levels = {one["name"]: one["log_level"] for one in status["components"] if one["alive"]}
            levels["core"] = status["log_level"]
            # A component that has ended meanwhile has no level to change.
            remaining = [name for name, level in asked.items() if levels.get(name, level) != level]
            if not remaining:
                break
            if time.monotonic() > until:
                raise ComponentError(f"{', '.join(remaining)}: no change of the log level within {_LEVEL_LIMIT:g} s")
            time.sleep(0.05)
    print(f"log level {options.level}: {', '.join(map(printable, asked))}")
    return 0
