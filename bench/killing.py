"""Kill writers of files at random moments, recover their files, and print a table.

    python bench/killing.py [--kills N] [--seed S] [--update docs/reliability.md]

The trials are those of tests/faults/kill_file_writer.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import argument_parser, update, with_source
from kill_file_writer import run

MARK = "killed writers"
NUMBERS = ("kills", "recoveries_killed", "rows_acknowledged", "rows_stored", "blocks_lost", "blocks_doubled")


def text(result: dict[str, Any]) -> str:
    lines = [
        "| writers killed | recoveries killed | rows acknowledged | rows stored | blocks lost | blocks doubled |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {' | '.join(f'{result[name]:,}' for name in NUMBERS)} |",
        "",
        "Killed in: " + ", ".join(f"{name} {n}" for name, n in result["kills_by"].items()) + ".",
        *(f"- {failure}" for failure in result["failures"]),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argument_parser(__doc__, json=False)
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="number of kills (default %(default)d)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the random numbers (default %(default)d)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="directory for the files of failed trials")
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help=f"write the table into this document, at the marks '{MARK}'"
    )
    options = parser.parse_args()
    result = run(options.kills, options.seed, options.keep)
    command = f"python bench/killing.py --kills {options.kills} --seed {options.seed}"
    shown = with_source(text(result), command)
    print(shown)
    if options.update:
        update(options.update, MARK, shown)
    return 0 if not (result["failures"] or result["blocks_lost"] or result["blocks_doubled"]) else 1


if __name__ == "__main__":
    sys.exit(main())
