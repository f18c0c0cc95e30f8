"""Commands `larpixdaq status` and `audit`: show the state of a system, and who did what."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec
from rich.console import Console

from larpixdaq import config
from larpixdaq.control.catalogue import read_audit
from larpixdaq.control.component_groups import described
from larpixdaq.control.display import audit_line, needs_attention, status_lines
from larpixdaq.errors import printable
from larpixdaq.operator import Operator
from larpixdaq.runtime.file_access import state_dir
from larpixdaq.runtime.units import parse_since, utc


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="the run, and every component",
        description="Shows the run state, the Operator in control, the last run, and the status of every component. "
        "Exits with 1 when a component is LOST, PAUSED or GIVEN UP, or MISSING in the run. More than 12 components, or "
        "those with a module, are shown in groups, the worst first; a group in which nothing is wrong is one line.",
    )
    config.add_core_argument(parser)
    config.add_insecure_argument(parser)
    parser.add_argument("--all", action="store_true", help="show every component of every group")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=status)
    parser = commands.add_parser(
        "audit",
        help="who did what when",
        description="Shows the audit in the run catalogue: changes of the run state, control, actions on chips and "
        "boards, routines, keys, and refused attempts, with the key and role in use. The core may be running.",
    )
    parser.add_argument(
        "--since",
        type=parse_since,
        default=0.0,
        metavar="TIME",
        help="only from this time on: UTC, such as 2023-03-15T02:48, or before now, such as 90min, 12h, 3d",
    )
    config.add_state_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=audit)


def status(options: argparse.Namespace) -> int:
    with Operator(options.core, insecure=options.insecure) as operator:
        answer = operator.status().result(timeout=5)
    if options.json:
        print(json.dumps(answer | {"groups": described(answer)}))
    else:
        console = plain_console()
        for line in status_lines(answer, unfold=options.all):
            console.print(printable(line))
    return 1 if needs_attention(answer) else 0


def audit(options: argparse.Namespace) -> int:
    rows = read_audit(state_dir(options.state_dir), round(options.since * 1e9))
    if options.json:
        print(json.dumps({"rows": [msgspec.structs.asdict(row) for row in rows]}))
        return 0
    console, shown = plain_console(), False
    for row in rows:
        console.print(printable(audit_line(row)))
        shown = True
    if not shown:
        console.print(f"nothing since {utc(options.since)}" if options.since else "nothing yet")
    return 0


def plain_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return a console that prints texts unchanged: brackets are no markup, and colons no emoji."""
    return Console(quiet=quiet, stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
