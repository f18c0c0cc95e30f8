"""Command `larpixdaq alarms`: shows and acknowledges alarms."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

import msgspec

from larpixdaq import config
from larpixdaq.cli.system import plain_console
from larpixdaq.control.alarms import Alarm, open_line, row_line
from larpixdaq.control.catalogue import AlarmRow
from larpixdaq.errors import RequestError, printable
from larpixdaq.operator import Operator
from larpixdaq.runtime.units import parse_since, parse_whole, utc

#: Seconds for an answer of the core.
_LIMIT: Final = 5.0
#: Maximum number of rows of the history that are shown: the last ones.
_ROWS: Final = 10_000


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "alarms",
        help="open alarms, their history, and their acknowledgement",
        description="Shows the open alarms: those that nobody has acknowledged first. Exits with 1 when an alarm of "
        "the level ALARM is open and not acknowledged. `larpixdaq alarms ack ID ...` acknowledges alarms.",
    )
    parser.add_argument("--all", action="store_true", help="show also the history: raised, acknowledged, cleared")
    parser.add_argument(
        "--since",
        type=parse_since,
        metavar="TIME",
        help="show the history from this time on: UTC, such as 2023-03-15T02:48, or before now, such as 90min, 12h, 3d",
    )
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=alarms)
    actions = parser.add_subparsers(metavar="ack")
    ack = actions.add_parser(
        "ack",
        help="acknowledge alarms",
        description="Acknowledges open alarms, so that others see that somebody cares. An acknowledged alarm stays "
        "open until its condition is in order. The key in use must be that of an operator or of the core's user.",
    )
    ack.add_argument("ids", nargs="+", type=parse_whole, metavar="ID", help="number of an alarm")
    ack.add_argument("--comment", default="", metavar="TEXT", help="what is done about it")
    # Without defaults, which would replace the values that stand before `ack`.
    ack.add_argument("--core", default=argparse.SUPPRESS, metavar="ADDRESS", help="the address of the DAQ Core")
    ack.add_argument("--insecure", action="store_true", default=argparse.SUPPRESS, help="use no keys")
    ack.set_defaults(function=acknowledge)


def alarms(options: argparse.Namespace) -> int:
    history = options.all or options.since is not None
    with Operator(options.core, insecure=options.insecure) as operator:
        answer = operator.alarms(history=history, since=options.since or 0.0, limit=_ROWS).result(timeout=_LIMIT)
    found = [msgspec.convert(alarm, Alarm) for alarm in answer["open"]]
    if options.json:
        print(json.dumps(answer))
    else:
        console = plain_console()
        for row in answer.get("history", []):
            console.print(printable(row_line(msgspec.convert(row, AlarmRow))))
        if history and not answer["history"]:
            console.print(f"no event since {utc(options.since)}" if options.since else "no event yet")
        for alarm in found:
            console.print(printable(open_line(alarm)))
        if not found:
            console.print("no alarm is open")
    return int(any(alarm.level == "alarm" and alarm.acknowledged is None for alarm in found))


def acknowledge(options: argparse.Namespace) -> int:
    failed = []
    with Operator(options.core, insecure=options.insecure) as operator:
        for number in dict.fromkeys(options.ids):
            try:
                alarm = operator.acknowledge_alarm(number, options.comment).result(timeout=_LIMIT)
            except RequestError as error:
                failed.append(str(error))
            else:
                plain_console().print(printable(open_line(msgspec.convert(alarm, Alarm))))
    if failed:
        raise RequestError("; ".join(failed))
    return 0
