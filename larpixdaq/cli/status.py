"""`larpixdaq status`: the run, who steers it, and what every component says of itself, in words."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.markup import escape

from larpixdaq import config
from larpixdaq.control.words import lines, needs_attention
from larpixdaq.errors import printable
from larpixdaq.operator import Operator


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="the run, and every component",
        description="Shows the run state, who has control, the last run, and what every component says of itself. "
        "Exits with 1 when a component is LOST or PAUSED, or MISSING in the run.",
    )
    config.add_core_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=status)


def status(options: argparse.Namespace) -> int:
    with Operator(options.core) as operator:
        found = operator.status().result(timeout=5)
    if options.json:
        print(json.dumps(found))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for line in lines(found):
            console.print(escape(printable(line)))
    return 1 if needs_attention(found) else 0
