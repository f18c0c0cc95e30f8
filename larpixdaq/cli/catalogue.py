"""Commands `larpixdaq runs`, `comment`, `attach` and `shifter`: the runs of the catalogue, and the e-log.

Imports that take time are inside the functions, because `runs` must answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any, Final

from larpixdaq import config
from larpixdaq.constants import LAST_RUN, RunCondition
from larpixdaq.errors import ConfigError, UsageError, advice, is_text, printable
from larpixdaq.runtime.units import parse_since, parse_text, parse_whole

#: Maximum seconds until the core has answered.
_LIMIT: Final = 10.0
#: Maximum characters of a text that is searched.
_MAX_SEARCHED: Final = 1000
#: Maximum bytes of a comment that are read from standard input: more than the core accepts.
_MAX_READ: Final = 100_000
_CONDITIONS: Final = {condition.name.lower(): condition for condition in RunCondition if condition.name != "CONTINUED"}


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "runs",
        help="the runs of the catalogue, and one run with all that is known of it",
        description="Lists the runs in the run catalogue, the newest first, or shows one run: times, condition with "
        "its reasons, boards, files, totals, comments and attachments. The core may be running or not.",
    )
    parser.add_argument("run", nargs="?", type=partial(parse_whole, high=LAST_RUN), metavar="RUN", help="show this run")
    parser.add_argument(
        "--last",
        type=partial(parse_whole, low=0),
        default=20,
        metavar="N",
        help="at most N runs, 0: all (default %(default)d)",
    )
    searched = partial(parse_text, most=_MAX_SEARCHED)
    when = "UTC, such as 2023-03-15T02:48, or before now, such as 90min, 12h, 3d"
    parser.add_argument("--since", type=parse_since, metavar="TIME", help=f"prepared from this time on: {when}")
    parser.add_argument("--until", type=parse_since, metavar="TIME", help="prepared until this time")
    parser.add_argument("--condition", type=str.lower, choices=_CONDITIONS, help="only runs of this condition")
    parser.add_argument("--kind", type=searched, default="", help="only runs of this kind, such as physics")
    parser.add_argument(
        "--comment",
        type=searched,
        default="",
        metavar="TEXT",
        help="only runs with this text in their comment, or in a comment on them",
    )
    parser.add_argument(
        "--by",
        type=searched,
        default="",
        metavar="NAME",
        help="only runs with this text in the name of their shifter or Operator, or of somebody who commented on them",
    )
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=runs)
    parser = commands.add_parser(
        "comment",
        help="write into the e-log of a run",
        description="Writes a comment on a run: into the catalogue, and into the open file, or the sidecars of the "
        "files when the run is over. It needs no control.",
    )
    parser.add_argument("run", type=_run_or_now, metavar="RUN", help="its number, or now: the current run, or the last")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="the comment; - reads it from standard input")
    _add_author_arguments(parser)
    parser.set_defaults(function=comment)
    parser = commands.add_parser(
        "attach",
        help="attach files, such as pictures, to a run",
        description="Copies files of at most 64 MiB into the state directory of the core, from any host, and lists "
        "them with the run in the catalogue. It needs no control.",
    )
    parser.add_argument("run", type=_run_or_now, metavar="RUN", help="its number, or now: the current run, or the last")
    parser.add_argument("files", nargs="+", metavar="FILE")
    _add_author_arguments(parser)
    parser.set_defaults(function=attach)
    parser = commands.add_parser(
        "shifter",
        help="who is on shift",
        description="Sets who is on shift: the name goes into the files of runs, and is the default of comments. "
        "Without a name, shows it.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the shifter; '' for nobody")
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.set_defaults(function=shifter)


def _add_author_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", metavar="NAME", help="your name (default: the shifter of `larpixdaq shifter`)")
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)


def _run_or_now(text: str) -> int | None:
    return None if text == "now" else parse_whole(text, high=LAST_RUN)


def runs(options: argparse.Namespace) -> int:
    from larpixdaq.control.run_list import RunList, Selection, list_lines, run_lines
    from larpixdaq.runtime.file_access import state_dir

    selection = Selection(
        condition=_CONDITIONS[options.condition] if options.condition else "",
        kind=options.kind,
        comment=options.comment,
        by=options.by,
    )
    if options.since is not None:
        selection = selection._replace(since_ns=round(options.since * 1e9))
    if options.until is not None:
        selection = selection._replace(until_ns=round(options.until * 1e9))
    if None not in (options.since, options.until) and options.until < options.since:
        raise UsageError("--until is before --since")
    if options.run is not None and selection != Selection():
        raise UsageError(f"run {options.run} and a search: give one of them")
    catalogue = RunList(state_dir(options.state_dir))
    try:
        if options.run is not None:
            facts = catalogue.describe(catalogue.find(options.run))
            if options.json:
                print(json.dumps(facts))
            else:
                for name, text in run_lines(facts):
                    print(f"{name:<12} {printable(text)}".rstrip())
            return 0
        most = options.last or LAST_RUN
        numbers = catalogue.select(selection, most + 1)
        more, numbers = len(numbers) > most, numbers[:most]
        if options.json:
            # In pieces, because a hundred thousand runs would take a gigabyte of memory.
            print('{"runs": [', end="")
            for index, run in enumerate(catalogue.runs(numbers)):
                print(", " if index else "", json.dumps(catalogue.describe(run)), sep="", end="")
            print(f'], "more": {json.dumps(more)}}}')
            return 0
        counts = catalogue.comment_counts(numbers)
        for line in list_lines([(run, counts.get(run.run, 0)) for run in catalogue.runs(numbers)]):
            print(line)
        if more:
            print(f"and older ones: --last {10 * most} shows more, --last 0 all")
        elif not numbers:
            text = "no run is like this" if selection != Selection() else "no run yet"
            if options.kind and options.kind not in (kinds := catalogue.kinds()):
                text += f": none is of the kind {options.kind!r}; {advice(options.kind, kinds, 'the kinds are')}"
            print(printable(text))
    finally:
        catalogue.close()
    return 0


def comment(options: argparse.Namespace) -> int:
    _check_texts({"TEXT": " ".join(options.text), "--by": options.by or ""})
    text = _read_comment() if options.text == ["-"] else " ".join(options.text)
    from larpixdaq.operator import Operator

    with Operator(options.core, insecure=options.insecure) as operator:
        number = operator.comment(text, options.run, options.by).result(_LIMIT)["run"]
    print(f"run {number}: comment written")
    return 0


def _read_comment() -> str:
    """Read a comment from standard input. Raises ConfigError."""
    try:
        return sys.stdin.buffer.read(_MAX_READ).decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: expected UTF-8, found the byte 0x{error.object[error.start]:02x}") from None


def attach(options: argparse.Namespace) -> int:
    _check_texts({"--by": options.by or "", **{f"FILE {index + 1}": file for index, file in enumerate(options.files)}})
    from larpixdaq.operator import Operator
    from larpixdaq.runtime.units import size

    with Operator(options.core, insecure=options.insecure) as operator:
        for file in options.files:
            kept = operator.attach(file, options.run, options.by).result(_LIMIT)
            print(printable(f"run {kept['run']}: {kept['name']}, {size(kept['bytes'])}, kept as {kept['file']}"))
    return 0


def shifter(options: argparse.Namespace) -> int:
    _check_texts({"NAME": options.name or ""})
    from larpixdaq.operator import Operator

    with Operator(options.core, insecure=options.insecure) as operator:
        if options.name is not None:
            operator.shifter = options.name
        name = operator.shifter
    print(f"shifter: {printable(name)}" if name else "nobody is on shift")
    return 0


def _check_texts(texts: dict[str, str]) -> None:
    for what, text in texts.items():
        if not is_text(text):
            raise UsageError(f"{what} {text[:40]!r}: expected UTF-8")
